"""Evaluation: benchmarks in their official layouts, exact metrics, submission archives, result tables.

Scores are computed from prediction files, so that they can be made anywhere and scored again. A [`Grounder`] asks the
model, and the predict functions write its answers where the official layouts have them. Every score function takes a
data set, a folder of predictions and a policy for missing ones, and returns an [`EvaluationResult`].
"""

from .benchmark import MetricBenchmark, benchmark_metrics
from .captions import BertSimilarity, Cider, Clair, LocalJudge, Meteor
from .davis import read_sequences, score_davis, score_ref_davis17, write_label_maps
from .expressions import score_expressions
from .files import EvaluationError, MissingPredictionError, write_mask
from .metrics import BoxIouMetric, CaptionMetrics, GroundedConversationMetric, RegionBoundaryMetric, TrainerMetrics
from .predict import (
    GroundedAnswer,
    Grounder,
    PredictionSummary,
    predict_expressions,
    predict_video_gcg,
    predict_vidstg,
)
from .referring_datasets import (
    MevisDataset,
    ReasonVosDataset,
    RefDavis17Dataset,
    ReferringSample,
    RefYoutubeVosDataset,
    RevosDataset,
)
from .region_similarity import mean_recall_decay, pairwise_region_and_boundary, region_and_boundary
from .report import RunInfo, results_table, write_eval_results
from .results import EvaluationResult, MissingPolicy
from .submit import Submission, check_submission, write_submission
from .synthetic import evaluate_synthetic
from .video_gcg import score_video_gcg
from .video_gcg_dataset import GcgSample, VideoGcgDataset
from .vidstg import VidStgDataset, VidStgSample, score_vidstg

__all__ = [
    "BertSimilarity",
    "BoxIouMetric",
    "CaptionMetrics",
    "Cider",
    "Clair",
    "EvaluationError",
    "EvaluationResult",
    "GcgSample",
    "GroundedAnswer",
    "GroundedConversationMetric",
    "Grounder",
    "LocalJudge",
    "Meteor",
    "MetricBenchmark",
    "MevisDataset",
    "MissingPolicy",
    "MissingPredictionError",
    "PredictionSummary",
    "ReasonVosDataset",
    "RefDavis17Dataset",
    "RefYoutubeVosDataset",
    "ReferringSample",
    "RegionBoundaryMetric",
    "RevosDataset",
    "RunInfo",
    "Submission",
    "TrainerMetrics",
    "VidStgDataset",
    "VidStgSample",
    "VideoGcgDataset",
    "benchmark_metrics",
    "check_submission",
    "evaluate_synthetic",
    "mean_recall_decay",
    "pairwise_region_and_boundary",
    "predict_expressions",
    "predict_video_gcg",
    "predict_vidstg",
    "read_sequences",
    "region_and_boundary",
    "results_table",
    "score_davis",
    "score_expressions",
    "score_ref_davis17",
    "score_video_gcg",
    "score_vidstg",
    "write_eval_results",
    "write_label_maps",
    "write_mask",
    "write_submission",
]
