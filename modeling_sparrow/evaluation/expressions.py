"""Per-expression protocol: MeViS, Ref-YouTube-VOS, Ref-DAVIS17 (protocol 4B), ReVOS, ReasonVOS.

The score of an expression is the mean over its frames of J and of F; frames on which both masks are empty count 1, no
frame is dropped, nothing is void. The benchmark's number is the plain mean over expressions (not over videos or
objects).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from .files import EvaluationError, read_mask_values
from .referring_datasets import FileTrack, ReferringDataset, ReferringSample, RleTrack
from .region_similarity import region_and_boundary
from .results import EvaluationResult, MissingPolicy, Scores, average, merge_scores, run_jobs


@dataclass(frozen=True)
class _VideoJob:
    video: str
    tracks: dict[str, RleTrack | FileTrack]  # expression id -> ground truth
    foreground: RleTrack | None


def score_expressions(
    dataset: ReferringDataset, predictions: str | Path, missing: MissingPolicy = "error", num_workers: int = 1
) -> EvaluationResult:
    """Scores the predictions of a whole benchmark.

    Args:
        dataset: the benchmark.
        predictions: folder with `<video>/<expression id>/<frame>.png`.
        missing: what to do with an expression of which any frame is missing; see [`MissingPolicy`] and the data set's
            `official_missing`.
        num_workers: processes; each holds one frame in memory.

    Raises:
        EvaluationError: for unreadable or wrongly sized files, whatever the policy, and for missing ones if it is
            `"error"`. The message lists them, one line each.
    """
    predictions = Path(predictions)
    if not predictions.is_dir():
        raise EvaluationError(f"{predictions}: no such folder of predictions")
    by_video: dict[str, list[ReferringSample]] = {}
    for sample in dataset:
        by_video.setdefault(sample.video, []).append(sample)
    jobs = [
        _VideoJob(video, {s.expression_id: dataset.ground_truth(s) for s in samples}, dataset.foreground(video))
        for video, samples in by_video.items()
    ]
    extra = unexpected_files(
        predictions, {path for sample in dataset for path in sample.prediction_paths(predictions)}
    )
    parts = run_jobs(partial(_score_video, predictions=predictions), jobs, num_workers, f"scoring {dataset.benchmark}")
    zero = dict.fromkeys(dataset.metric_names, 0.0)
    scores = merge_scores(parts, missing, dataset.official_missing, zero)
    return EvaluationResult(
        benchmark=dataset.benchmark,
        protocol=dataset.protocol,
        dataset_version=dataset.version,
        metrics=dataset.summarise(scores.values),
        per_item=scores.values,
        counts={"videos": len(by_video), "expressions": len(dataset), **scores.counts, "extra": len(extra)},
        missing_policy=missing,
        problems=scores.missing_lines + extra,
    )


def unexpected_files(predictions: Path, expected: set[Path]) -> list[str]:
    """One line for each file or folder under `predictions` that the benchmark does not have; they are never scored."""
    folders = {parent for path in expected for parent in path.parents}
    lines = []

    def visit(folder: Path) -> None:
        for entry in sorted(folder.iterdir()):
            if entry in folders and entry.is_dir():
                visit(entry)
            elif entry not in expected:
                lines.append(f"{entry}: not part of the benchmark, ignored")

    visit(predictions)
    return lines


def _score_video(job: _VideoJob, predictions: Path) -> Scores:
    scores = Scores(counts={"frames": 0})
    for expression_id, track in job.tracks.items():
        key = f"{job.video}_{expression_id}"
        folder = predictions / job.video / expression_id
        absent = [name for name in track.frame_names if not (folder / f"{name}.png").is_file()]
        if not (predictions / job.video).is_dir():
            scores.missing[key] = ("video", f"{predictions / job.video}: missing video (expression {expression_id})")
        elif absent:
            line = f"{folder / absent[0]}.png: missing ({len(absent)} of {len(track.frame_names)} frames)"
            scores.missing[key] = ("expression", line)
        else:
            try:
                scores.values[key] = _score_track(track, folder, job.foreground)
                scores.counts["frames"] += len(track.frame_names)
            except EvaluationError as error:
                scores.broken.append(str(error))
    return scores


def _score_track(track: RleTrack | FileTrack, folder: Path, foreground: RleTrack | None) -> dict[str, float]:
    rows = []
    for index, name in enumerate(track.frame_names):
        truth = track.frame(index)
        prediction = read_mask_values(folder / f"{name}.png", None if truth is None else truth.shape)
        if truth is None:
            truth = np.zeros_like(prediction)
        region, boundary = region_and_boundary(prediction, truth)
        row = {"J": region, "F": boundary}
        if foreground is not None:
            annotated = foreground.frame(index)
            annotated = np.zeros_like(prediction) if annotated is None else annotated
            row |= _accuracy_and_robustness(prediction, truth, annotated)
        rows.append(row)
    return average(rows, tuple(rows[0]))


def _accuracy_and_robustness(prediction: np.ndarray, truth: np.ndarray, foreground: np.ndarray) -> dict[str, float]:
    """ReVOS's A and R of one frame (`(H, W)` uint8 each), over masks and, as officially, over raw values."""
    predicted, wanted = prediction != 0, truth != 0
    annotated = float(foreground.sum(dtype=np.int64)) + 1e-6
    # In 8 bits 1 - 2 and 254 * 255 wrap around: the official numbers contain that.
    wrong_official = int(((np.uint8(1) - truth) * prediction).sum(dtype=np.int64))
    return {
        "A": float(np.mean(predicted == wanted)),
        "R": max(1 - np.count_nonzero(predicted & ~wanted) / annotated, 0.0),
        "A_official": float(np.mean(prediction == truth)),
        "R_official": max(1 - wrong_official / annotated, 0.0),
    }
