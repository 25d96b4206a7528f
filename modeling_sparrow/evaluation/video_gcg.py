"""VideoGCG scores: mask mIoU, recall of grounded phrases, caption quality.

* IoU of two objects is that of their tubes: pixels of all frames of a sample pooled.
* mIoU: repeatedly take the pair with the largest IoU above 0 and remove both; a sample scores the mean over its pairs,
  so objects left over on either side cost nothing; 0 without a pair. The result is the mean over samples.
* Recall: the same greedy pairing, which stops at the first best pair with IoU below 0.5 or text similarity below 0.5;
  all matches / all annotated phrases.

SPARROW's and VideoGLaMM's scripts differ on tubes that are both empty: 1 in the former, not a number in the latter,
where it ends the pairing of the sample.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from .captions import CaptionMetric
from .files import EvaluationError, read_json, read_mask, write_json, write_mask
from .results import EvaluationResult, MissingPolicy, Scores, average, merge_scores, run_jobs
from .video_gcg_dataset import GcgSample, VideoGcgDataset

GcgHost = Literal["sparrow", "videoglamm"]
#: Similarity of an annotated and a predicted phrase, about 0 … 1.
TextSimilarity = Callable[[str, str], float]

_OFFICIAL_MISSING = {
    "sparrow": {"sample": "zero", "frame": "zero"},
    "videoglamm": {"sample": "skip", "frame": "zero"},
}
IOU_THRESHOLD = 0.5
SIMILARITY_THRESHOLD = 0.5

_PHRASE = re.compile(r"<p>(.*?)</p>")
_TAG = re.compile(r"<.*?>")
_MASK_FOLDER = re.compile(r"pred_masks_(\d+)")


def clean_caption(answer: str, tokens: Sequence[str] = ("[SEG]",)) -> tuple[str, list[str]]:
    """Plain text and grounded phrases of an answer, as the official scripts take them apart.

    Args:
        answer: with `<p> phrase </p> [SEG]` mark-up; what precedes the last `ASSISTANT: ` is dropped.
        tokens: removed from the text. The scripts remove only `[SEG]`; name `[BOX]` too for a model that writes it.

    Returns:
        The text without tags and with single spaces, and the phrases in order.
    """
    answer = answer.replace("\n", "").replace("  ", " ").split("ASSISTANT: ")[-1]
    phrases = [phrase.strip() for phrase in _PHRASE.findall(answer)]
    text = _TAG.sub("", answer)
    for token in tokens:
        text = text.replace(token, "")
    return " ".join(text.split()).strip("'").strip(), phrases


def tube_ious(frames: Iterable[tuple[np.ndarray, np.ndarray]], host: GcgHost = "sparrow") -> np.ndarray:
    """IoU of every annotated with every predicted tube.

    Args:
        frames: for each frame the annotated `(N, H, W)` and the predicted `(P, H, W)` bool masks; one is held at a
            time.
        host: whose value two empty tubes get: 1 (`"sparrow"`) or not a number (`"videoglamm"`).

    Returns:
        `(N, P)` float64.

    Raises:
        ValueError: if there is no frame.
    """
    intersection, area_truth, area_prediction, empty = 0.0, 0.0, 0.0, True
    for truth, prediction in frames:
        empty = False
        pixels = truth.shape[1] * truth.shape[2]
        truth = truth.reshape(len(truth), pixels).astype(np.float32)
        prediction = prediction.reshape(len(prediction), pixels).astype(np.float32)
        # float32 holds the counts of one frame exactly; the sums over frames are kept in float64.
        intersection = intersection + (truth @ prediction.T).astype(np.float64)
        area_truth = area_truth + truth.sum(1, dtype=np.float64)
        area_prediction = area_prediction + prediction.sum(1, dtype=np.float64)
    if empty:
        raise ValueError("no frames: expected at least one")
    union = area_truth[:, None] + area_prediction[None, :] - intersection
    both_empty = 1.0 if host == "sparrow" else np.nan
    return np.divide(intersection, union, out=np.full(union.shape, both_empty), where=union > 0)


def sample_miou(ious: np.ndarray) -> float:
    """Mean IoU over the greedily matched pairs of an `(N, P)` table; 0 without a pair."""
    ious, paired = ious.copy(), []
    while ious.size and ious.max() > 0:  # not a number is not above 0: it ends the pairing
        truth, prediction = np.unravel_index(np.argmax(ious), ious.shape)
        paired.append(ious[truth, prediction])
        ious = np.delete(np.delete(ious, truth, axis=0), prediction, axis=1)
    return float(np.mean(paired)) if paired else 0.0


def match_phrases(
    ious: np.ndarray, phrases: Sequence[str], predicted: Sequence[str], text_similarity: TextSimilarity
) -> list[tuple[int, int]]:
    """Pairs (annotated, predicted) that count for the recall.

    Args:
        ious: `(N, P)`.
        phrases: of the annotated masks, in order.
        predicted: of the predicted masks, in order; a mask without a phrase resembles nothing.
        text_similarity: compares two phrases.
    """
    ious, matches = ious.copy(), []
    similarities = np.zeros(ious.shape)
    for i, phrase in enumerate(phrases[: ious.shape[0]]):
        for j, candidate in enumerate(predicted[: ious.shape[1]]):
            similarities[i, j] = text_similarity(phrase, candidate)
    while ious.size:
        best = np.unravel_index(np.argmax(ious), ious.shape)
        if ious[best] < IOU_THRESHOLD or similarities[best] < SIMILARITY_THRESHOLD:
            break
        matches.append((int(best[0]), int(best[1])))
        ious[best[0], :] = 0
        ious[:, best[1]] = 0
    return matches


def write_prediction(
    predictions: str | Path, sample: GcgSample, answer: str, frames: Iterable[np.ndarray], tokens: Sequence[str]
) -> None:
    """Writes one answer in the official form: `pred_masks_<object>/mask_<frame>.png`, then `res.json`.

    `res.json` is written last, so that its presence says the sample is complete.

    Args:
        predictions: folder; the sample goes to `<predictions>/<sample name>/`.
        sample: what was asked.
        answer: the model's text, with mark-up.
        frames: for each frame the `(P, H, W)` masks of the answer's objects, in the order of its phrases.
        tokens: to remove from the text, see [`clean_caption`].
    """
    folder = Path(predictions) / sample.name
    for index, masks in enumerate(frames):
        for number, mask in enumerate(masks):
            write_mask(folder / f"pred_masks_{number}" / f"mask_{index}.png", mask)
    truth_text, truth_phrases = clean_caption(sample.caption)
    text, phrases = clean_caption(answer, tokens)
    content = {"gt_text": sample.caption, "gt_text_cleaned": truth_text, "gt_phrases": truth_phrases}
    content |= {"pred_text": answer, "pred_text_cleaned": text, "pred_phrases": phrases}
    write_json(folder / "res.json", content)


@dataclass
class _Outcome:
    """What a worker found for one sample."""

    name: str
    phrases: list[str]
    text: str
    ious: np.ndarray | None = None
    predicted_phrases: list[str] = field(default_factory=list)
    predicted_text: str = ""
    missing: tuple[str, str] | None = None
    broken: str | None = None


def score_video_gcg(
    dataset: VideoGcgDataset,
    predictions: str | Path,
    host: GcgHost = "sparrow",
    missing: MissingPolicy = "error",
    text_similarity: TextSimilarity | None = None,
    caption_metrics: Sequence[CaptionMetric] = (),
    num_workers: int = 1,
) -> EvaluationResult:
    """Scores grounded captions.

    A sample is missing without its `res.json`, and incomplete without one of the mask files of an object. With
    `missing="zero"` a missing sample has mIoU 0, an empty caption and no match for its phrases, and an absent mask
    file is an empty mask. `"official"` does as the host's script: SPARROW's gives a missing sample mIoU 0 but counts
    none of its phrases and compares an empty caption with an empty reference, and takes an absent mask for empty;
    VideoGLaMM's leaves a missing sample out (and shifts all later ones, which is not imitated) and gives an
    incomplete one mIoU 0.

    Args:
        dataset: lists samples and ground truth.
        predictions: folder with `<sample name>/res.json` and `pred_masks_<object>/mask_<frame>.png` beside it.
        host: whose rules for empty tubes and, if `missing="official"`, for missing files.
        missing: what to do with missing files.
        text_similarity: compares phrases for the recall, e.g. [`captions.BertSimilarity`]; `None` leaves recall out.
        caption_metrics: e.g. [`captions.Cider`], [`captions.Meteor`], [`captions.Clair`].
        num_workers: processes; each holds one frame in memory.

    Raises:
        EvaluationError: for unreadable or wrongly sized files, whatever the policy, and for missing ones if it is
            `"error"`.
    """
    if host not in ("sparrow", "videoglamm"):
        raise ValueError(f"host={host!r}: expected 'sparrow' or 'videoglamm'")
    predictions = Path(predictions)
    if not predictions.is_dir():
        raise EvaluationError(f"{predictions}: no such folder of predictions")
    read = partial(_read_sample, predictions=predictions, host=host)
    outcomes = list(run_jobs(read, dataset.samples, num_workers, "scoring video-gcg"))
    num_phrases = sum(len(outcome.phrases) for outcome in outcomes)
    if missing == "official":
        outcomes = [_as_official(outcome, host) for outcome in outcomes]
    scores = merge_scores(map(_scores, outcomes), missing, _OFFICIAL_MISSING[host], {"mIoU": 0.0})
    kept = [outcome for outcome in outcomes if outcome.name in scores.values]
    extra = _unexpected_samples(dataset, predictions)
    metrics = average(scores.values.values(), ("mIoU",))
    if text_similarity is not None:
        metrics["recall"] = _recall(kept, text_similarity)
    for metric in caption_metrics:
        metrics |= metric([outcome.predicted_text for outcome in kept], [outcome.text for outcome in kept])
    return EvaluationResult(
        benchmark=dataset.benchmark,
        protocol=f"greedy tube IoU, {host} rules",
        dataset_version=dataset.version,
        metrics=metrics,
        per_item=scores.values,
        counts={"samples": len(dataset), "phrases": num_phrases, **scores.counts, "extra": len(extra)},
        missing_policy=missing,
        problems=scores.missing_lines + extra,
    )


def _unexpected_samples(dataset: VideoGcgDataset, predictions: Path) -> list[str]:
    found = {path.parent.relative_to(predictions).as_posix() for path in predictions.glob("*/*/res.json")}
    unknown = sorted(found - {sample.name for sample in dataset})
    return [f"{predictions / name}: not part of the benchmark, ignored" for name in unknown]


def _as_official(outcome: _Outcome, host: GcgHost) -> _Outcome:
    """What the host's script makes of a sample with missing files; see [`score_video_gcg`]."""
    kind = outcome.missing[0] if outcome.missing else None
    if kind == "sample" and host == "sparrow":
        return replace(outcome, phrases=[], text="")
    if kind == "frame" and host == "videoglamm":
        return replace(outcome, ious=None)
    return outcome


def _read_sample(sample: GcgSample, predictions: Path, host: GcgHost) -> _Outcome:
    text, phrases = clean_caption(sample.caption)
    outcome = _Outcome(sample.name, phrases, text)
    folder = predictions / sample.name
    path = folder / "res.json"
    try:
        if not path.is_file():
            outcome.missing = ("sample", f"{path}: missing sample")
            return outcome
        content = read_json(path)
        try:
            outcome.predicted_text = str(content["pred_text_cleaned"])
            outcome.predicted_phrases = [str(phrase) for phrase in content["pred_phrases"]]
        except (KeyError, TypeError) as error:
            raise EvaluationError(f"{path}: expected the keys pred_text_cleaned and pred_phrases") from error
        objects = sorted(
            (match for entry in folder.iterdir() if (match := _MASK_FOLDER.fullmatch(entry.name))),
            key=lambda match: int(match[1]),
        )
        folders = [folder / match[0] for match in objects]
        num_frames = len(sample.frame_paths)
        files = [mask_folder / f"mask_{index}.png" for mask_folder in folders for index in range(num_frames)]
        absent = [file for file in files if not file.is_file()]
        if absent:
            outcome.missing = ("frame", f"{absent[0]}: missing ({len(absent)} of {len(files)} masks)")
        outcome.ious = tube_ious((_read_frame(sample, folders, index) for index in range(num_frames)), host)
    except EvaluationError as error:
        outcome.broken = str(error)
    return outcome


def _read_frame(sample: GcgSample, folders: list[Path], index: int) -> tuple[np.ndarray, np.ndarray]:
    """Annotated and predicted masks of one frame; a mask file that is absent reads as empty."""
    truths = [track.frame(index) for track in sample.tracks]
    size = next((truth.shape for truth in truths if truth is not None), None)
    masks = []
    for folder in folders:
        path = folder / f"mask_{index}.png"
        masks.append(read_mask(path, size) if path.is_file() else None)
        if size is None and masks[-1] is not None:
            size = masks[-1].shape
    size = size or (1, 1)
    truth = [np.zeros(size, bool) if mask is None else mask != 0 for mask in truths]
    prediction = [np.zeros(size, bool) if mask is None else mask for mask in masks]
    return (
        np.array(truth, bool).reshape(len(truth), *size),
        np.array(prediction, bool).reshape(len(prediction), *size),
    )


def _scores(outcome: _Outcome) -> Scores:
    if outcome.broken:
        return Scores(broken=[outcome.broken])
    scores = Scores()
    if outcome.missing:
        scores.missing[outcome.name] = outcome.missing
    if outcome.ious is not None:
        scores.values[outcome.name] = {"mIoU": sample_miou(outcome.ious)}
    return scores


def _recall(outcomes: list[_Outcome], text_similarity: TextSimilarity) -> float:
    matches = phrases = 0
    for outcome in outcomes:
        phrases += len(outcome.phrases)
        if outcome.ious is None:
            continue
        matches += len(match_phrases(outcome.ious, outcome.phrases, outcome.predicted_phrases, text_similarity))
    return matches / phrases if phrases else 0.0
