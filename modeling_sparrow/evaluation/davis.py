"""DAVIS 2017 evaluation of label maps, and Ref-DAVIS17 protocol 4A, which is made of four such evaluations.

Rules of the two tasks:

| | unsupervised | semi-supervised |
|---|---|---|
| objects | highest label of the first annotated frame, void set to 0; later labels above it are ignored | same |
| frames | all | first and last left out |
| void (255) | in no count | background |
| predicted labels | at most 20 | at most the number of objects |
| pairing | Hungarian, on (mean J + mean F) / 2 over all frames | label i with object i |

J and F of an object are means over its frames; the final numbers are means over all objects of all videos. Because
of the pairing, protocol 4A does not notice when two objects are swapped: report it beside 4B, never instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from .files import EvaluationError, read_label_map, read_mask, write_label_map
from .referring_datasets import RefDavis17Dataset
from .region_similarity import mean_recall_decay, pairwise_region_and_boundary
from .results import EvaluationResult, MissingPolicy, Scores, average, merge_scores, run_jobs, version_name

DavisTask = Literal["unsupervised", "semi-supervised"]

VOID = 255
MAX_PROPOSALS = 20
#: (videos, objects) of the released validation split.
KNOWN_VERSIONS = {(30, 61): "DAVIS 2017 val"}
METRICS = ("J", "J_recall", "J_decay", "F", "F_recall", "F_decay")

#: The four sets of expressions of Ref-DAVIS17, in the order of the expression ids (id = 4 · object + set).
ANNOTATOR_SETS = ("Davis17_annot1", "Davis17_annot1_full_video", "Davis17_annot2", "Davis17_annot2_full_video")


def read_sequences(root: str | Path, split: str = "val") -> list[str]:
    """Video names of `<root>/ImageSets/2017/<split>.txt`.

    Raises:
        EvaluationError: if the list is absent or empty.
    """
    path = Path(root) / "ImageSets" / "2017" / f"{split}.txt"
    try:
        names = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from error
    if not names:
        raise EvaluationError(f"{path}: names no video")
    return names


def score_davis(
    annotations: str | Path,
    predictions: str | Path,
    sequences: Sequence[str],
    task: DavisTask = "unsupervised",
    missing: MissingPolicy = "error",
    num_workers: int = 1,
) -> EvaluationResult:
    """Scores label maps as the DAVIS 2017 evaluation does.

    The official script ends at the first missing frame, so `missing="official"` equals `"error"`.

    Args:
        annotations: folder with `<video>/<frame>.png`, palette index = object, 255 = void:
            `Annotations_unsupervised/480p` for the unsupervised task, `Annotations/480p` for the other.
        predictions: folder with `<video>/<frame>.png`, palette index or grey value = proposal.
        sequences: videos to score; see [`read_sequences`].
        task: which rules; Ref-DAVIS17 uses the unsupervised ones.
        missing: what to do with a video of which any frame is missing.
        num_workers: processes; each holds one frame in memory.

    Returns:
        `per_item` is keyed `<video>_<object>` and also tells the proposal paired with it.

    Raises:
        EvaluationError: for unreadable or wrongly sized files and labels beyond the limit, whatever the policy; for
            missing ones if it is `"error"`.
    """
    if task not in ("unsupervised", "semi-supervised"):
        raise ValueError(f"task={task!r}: expected 'unsupervised' or 'semi-supervised'")
    annotations, predictions = Path(annotations), Path(predictions)
    if not predictions.is_dir():
        raise EvaluationError(f"{predictions}: no such folder of predictions")
    score = partial(_score_sequence, annotations=annotations, predictions=predictions, task=task)
    parts = run_jobs(score, sequences, num_workers, f"scoring DAVIS ({task})")
    official = {"video": "error"}
    scores = merge_scores(parts, missing, official, dict.fromkeys((*METRICS, "proposal"), 0.0))
    extra = _unexpected_sequences(predictions, sequences)
    metrics = average(scores.values.values(), METRICS)
    return EvaluationResult(
        benchmark="davis17",
        protocol=f"DAVIS 2017 {task}",
        dataset_version=version_name(KNOWN_VERSIONS, len(sequences), scores.counts.get("objects", 0)),
        metrics=metrics | {"J&F": (metrics["J"] + metrics["F"]) / 2},
        per_item=scores.values,
        counts={"videos": len(sequences), **scores.counts, "extra": len(extra)},
        missing_policy=missing,
        problems=scores.missing_lines + extra,
    )


def score_ref_davis17(
    annotations: str | Path,
    predictions: str | Path,
    sequences: Sequence[str],
    missing: MissingPolicy = "error",
    num_workers: int = 1,
) -> EvaluationResult:
    """Ref-DAVIS17 protocol 4A: the unsupervised DAVIS evaluation of each annotator set, then the mean of the four.

    Args:
        annotations: `Annotations_unsupervised/480p` of DAVIS 2017.
        predictions: folder with `<set>/<video>/<frame>.png` for the four sets in [`ANNOTATOR_SETS`].
        sequences, missing, num_workers: as in [`score_davis`].

    Returns:
        `metrics` holds the mean of the four sets and, for each, `<metric>_<set>`.

    Raises:
        EvaluationError: as in [`score_davis`].
    """
    results = {
        name: score_davis(annotations, Path(predictions) / name, sequences, "unsupervised", missing, num_workers)
        for name in ANNOTATOR_SETS
    }
    metrics = average([result.metrics for result in results.values()], (*METRICS, "J&F"))
    for name, result in results.items():
        metrics |= {f"{metric}_{name}": value for metric, value in result.metrics.items()}
    parts = list(results.values())
    totals = {name: sum(part.counts[name] for part in parts) for name in parts[0].counts}
    return EvaluationResult(
        benchmark="ref-davis17",
        protocol="4A (label maps, Hungarian pairing)",
        dataset_version=parts[0].dataset_version,
        metrics=metrics,
        per_item={f"{name}/{item}": row for name, part in results.items() for item, row in part.per_item.items()},
        counts=totals | {"videos": len(sequences), "sets": len(parts)},
        missing_policy=missing,
        problems=[line for part in parts for line in part.problems],
    )


def write_label_maps(
    dataset: RefDavis17Dataset,
    expression_predictions: str | Path,
    output: str | Path,
    num_workers: int = 1,
    skip_incomplete: bool = False,
) -> None:
    """Joins the masks of single expressions (layout of protocol 4B) into the label maps of protocol 4A.

    Where the masks of two objects overlap, the lower object number wins: that is what the official scripts' argmax
    over 0/1 masks does. Frames are numbered from 00000, as DAVIS names them.

    Args:
        dataset: lists the expressions; a video must have four for every object.
        expression_predictions: folder with `<video>/<expression id>/<frame>.png`.
        output: folder that receives `<set>/<video>/<frame number>.png`.
        num_workers: processes.
        skip_incomplete: leave out videos of which a mask is missing, so that the policy of [`score_ref_davis17`]
            decides about them.

    Raises:
        EvaluationError: if a mask is missing (unless `skip_incomplete`), unreadable, or of another size than the first
            of its frame, or if the expressions of a video do not come in fours.
    """
    predictions, output = Path(expression_predictions), Path(output)
    for name in ANNOTATOR_SETS:
        (output / name).mkdir(parents=True, exist_ok=True)
    complete = dict.fromkeys(dataset.video_names, True)
    for sample in dataset if skip_incomplete else ():
        complete[sample.video] &= all(path.is_file() for path in sample.prediction_paths(predictions))
    jobs = []
    for video in dataset.video_names:
        meta = dataset.videos[video]
        if len(meta["expressions"]) % len(ANNOTATOR_SETS):
            raise EvaluationError(
                f"{dataset.expressions_file}: video {video} has {len(meta['expressions'])} expressions, expected four "
                "per object"
            )
        if complete[video]:
            jobs.append((video, tuple(meta["frames"]), tuple(meta["expressions"])))
    write = partial(_write_video_label_maps, predictions=predictions, output=output)
    for _ in run_jobs(write, jobs, num_workers, "joining masks to label maps"):
        pass


def _write_video_label_maps(
    job: tuple[str, tuple[str, ...], tuple[str, ...]], predictions: Path, output: Path
) -> None:
    video, frames, expressions = job
    for number, frame in enumerate(frames):
        size = None
        for offset, name in enumerate(ANNOTATOR_SETS):
            masks = []
            for expression in expressions[offset :: len(ANNOTATOR_SETS)]:
                masks.append(read_mask(predictions / video / expression / f"{frame}.png", size))
                size = masks[-1].shape
            labels = np.zeros(size, np.uint8)
            for label in range(len(masks), 0, -1):
                labels[masks[label - 1]] = label
            write_label_map(output / name / video / f"{number:05d}.png", labels)


@dataclass
class _FrameTable:
    """J and F of every proposal with every object, frame by frame: `(Q, N, T)` each."""

    region: np.ndarray
    boundary: np.ndarray


def _score_sequence(video: str, annotations: Path, predictions: Path, task: DavisTask) -> Scores:
    try:
        frames = sorted((annotations / video).glob("*.png"))
        if not frames:
            raise EvaluationError(f"{annotations / video}: no annotations (PNG files)")
        first = _without_void(read_label_map(frames[0]))
        num_objects = int(first.max())
        if task == "semi-supervised":
            frames = frames[1:-1]
            if not frames:
                raise EvaluationError(f"{annotations / video}: the semi-supervised task needs at least 3 frames")
        scores = Scores(counts={"objects": num_objects, "frames": len(frames)})
        absent = [
            predictions / video / path.name for path in frames if not (predictions / video / path.name).is_file()
        ]
        if absent:
            line = f"{absent[0]}: missing ({len(absent)} of {len(frames)} frames)"
            scores.missing = {f"{video}_{label}": ("video", line) for label in range(1, num_objects + 1)}
            return scores
        if num_objects:
            table, num_proposals = _compare_frames(frames, predictions / video, num_objects, task)
            scores.values = _pair_objects(video, table, num_proposals, task)
        return scores
    except EvaluationError as error:
        return Scores(broken=[str(error)])


def _compare_frames(
    frames: list[Path], predictions: Path, num_objects: int, task: DavisTask
) -> tuple[_FrameTable, int]:
    """All pairs on all frames, one frame in memory, and the number of proposals (at least N: the rest are empty)."""
    unsupervised = task == "unsupervised"
    limit = MAX_PROPOSALS if unsupervised else num_objects
    rows = max(limit, num_objects)
    shape = (rows, num_objects, len(frames))
    table = _FrameTable(np.zeros(shape), np.zeros(shape))
    num_proposals = num_objects
    for index, path in enumerate(frames):
        truth = read_label_map(path)
        prediction = read_label_map(predictions / path.name, truth.shape)
        highest = int(prediction.max())
        if highest > limit:
            raise EvaluationError(
                f"{predictions / path.name}: label {highest}, expected at most {limit} ({task} task)"
            )
        num_proposals = max(num_proposals, highest)
        void = truth == VOID if unsupervised else None
        region, boundary = pairwise_region_and_boundary(prediction, _without_void(truth), rows, num_objects, void)
        table.region[:, :, index], table.boundary[:, :, index] = region, boundary
    return table, num_proposals


def _pair_objects(video: str, table: _FrameTable, num_proposals: int, task: DavisTask) -> dict[str, dict[str, float]]:
    region, boundary = table.region[:num_proposals], table.boundary[:num_proposals]
    num_objects = region.shape[1]
    if task == "unsupervised":
        quality = (region.mean(axis=2) + boundary.mean(axis=2)) / 2
        proposals, objects = _hungarian(quality)
    else:
        proposals = objects = np.arange(num_objects)
    rows = {}
    for proposal, label in sorted(zip(proposals, objects, strict=True), key=lambda pair: pair[1]):
        j = mean_recall_decay(region[proposal, label])
        f = mean_recall_decay(boundary[proposal, label])
        rows[f"{video}_{label + 1}"] = dict(zip(METRICS, (*j, *f), strict=True)) | {"proposal": float(proposal + 1)}
    return rows


def _hungarian(quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of proposals and objects with the largest total of the `(Q, N)` quality, Q >= N."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "the unsupervised DAVIS protocol pairs proposals with objects by scipy: "
            "pip install 'sparrow-video-grounding[eval]'"
        ) from error
    return linear_sum_assignment(quality, maximize=True)


def _without_void(labels: np.ndarray) -> np.ndarray:
    return np.where(labels == VOID, 0, labels)


def _unexpected_sequences(predictions: Path, sequences: Sequence[str]) -> list[str]:
    wanted = set(sequences)
    return [
        f"{path}: not part of the benchmark, ignored"
        for path in sorted(predictions.iterdir())
        if path.name not in wanted
    ]
