"""Evaluation: benchmarks in their official layouts, exact metrics, submission archives, result tables.

Scores are computed from prediction files, so that they can be made anywhere and scored again. Every score function
takes a data set, a folder of predictions and a policy for missing ones, and returns an [`EvaluationResult`].
"""

from .benchmark import MetricBenchmark, benchmark_metrics
from .captions import BertSimilarity, Cider, Clair, LocalJudge, Meteor
from .davis import read_sequences, score_davis, score_ref_davis17, write_label_maps
from .expressions import score_expressions
from .files import EvaluationError, MissingPredictionError, write_mask
from .metrics import BoxIouMetric, CaptionMetrics, GroundedConversationMetric, RegionBoundaryMetric, TrainerMetrics
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
    "GroundedConversationMetric",
    "LocalJudge",
    "Meteor",
    "MetricBenchmark",
    "MevisDataset",
    "MissingPolicy",
    "MissingPredictionError",
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
    "mean_recall_decay",
    "pairwise_region_and_boundary",
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
