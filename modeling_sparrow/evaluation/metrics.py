"""Metric objects with `add_batch` and `compute`, for notebooks and for `transformers.Trainer`.

```python
metric = RegionBoundaryMetric()
for batch in loader:
    metric.add_batch(predictions=model(batch), references=batch["masks"])
metric.compute()  # {"J": …, "F": …, "J&F": …, …}, and ready for the next round
```

In a trainer, wrap them with [`TrainerMetrics`]; with `TrainingArguments(batch_eval_metrics=True)` no masks are
collected.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from .captions import CaptionMetric
from .region_similarity import mean_recall_decay, region_and_boundary
from .results import average
from .video_gcg import TextSimilarity, match_phrases, sample_miou, tube_ious
from .vidstg import THRESHOLDS, box_iou


class Metric(Protocol):
    """What every metric object offers."""

    def add_batch(self, predictions: Any, references: Any) -> None:
        """Adds predictions and what they should have been."""

    def compute(self) -> dict[str, float]:
        """Numbers over everything added, after which the object is empty again."""


class RegionBoundaryMetric:
    """J and F of object tracks: mean, recall and decay over the frames of each object, then the mean over objects."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []

    def add_batch(self, predictions: Any, references: Any) -> None:
        """Adds object tracks.

        Args:
            predictions: `(N, T, H, W)` array or tensor, or a sequence of `(T, H, W)`; non-zero is foreground.
            references: alike.

        Raises:
            ValueError: if the numbers of tracks, frames or pixels differ.
        """
        for prediction, reference in _pairs(predictions, references):
            if prediction.shape != reference.shape or prediction.ndim != 3:
                raise ValueError(
                    f"tracks of shape {prediction.shape} and {reference.shape}: "
                    "expected the same (frames, height, width)"
                )
            values = np.array([region_and_boundary(p, r) for p, r in zip(prediction, reference, strict=True)])
            region, boundary = mean_recall_decay(values[:, 0]), mean_recall_decay(values[:, 1])
            names = ("J", "J_recall", "J_decay", "F", "F_recall", "F_decay")
            self._rows.append(dict(zip(names, (*region, *boundary), strict=True)))

    def compute(self) -> dict[str, float]:
        """J, F, J&F, and recall and decay of both, in 0 … 1.

        Raises:
            ValueError: if nothing was added.
        """
        rows, self._rows = _drain(self._rows), []
        metrics = average(rows, tuple(rows[0]))
        return metrics | {"J&F": (metrics["J"] + metrics["F"]) / 2}


class BoxIouMetric:
    """Mean IoU of paired boxes, and the share of pairs above 0.3 and 0.5."""

    def __init__(self) -> None:
        self._ious: list[float] = []

    def add_batch(self, predictions: Any, references: Any) -> None:
        """Adds boxes.

        Args:
            predictions: `(N, 4)` array, tensor or list, xyxy, all in the unit of `references`; `None` in a list is an
                absent box with IoU 0.
            references: `(N, 4)`.

        Raises:
            ValueError: if the numbers of boxes differ or a box has not 4 numbers.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} boxes for {len(references)}: expected as many")
        for prediction, reference in zip(predictions, references, strict=True):
            prediction = None if prediction is None else _to_numpy(prediction)
            reference = _to_numpy(reference)
            for box in (prediction, reference):
                if box is not None and box.shape != (4,):
                    raise ValueError(f"box of shape {box.shape}: expected 4 numbers (x1, y1, x2, y2)")
            self._ious.append(0.0 if prediction is None else box_iou(prediction, reference))

    def compute(self) -> dict[str, float]:
        """mIoU and the shares above the thresholds.

        Raises:
            ValueError: if nothing was added.
        """
        ious, self._ious = np.array(_drain(self._ious)), []
        shares = {f"mIoU@{threshold}": float((ious > threshold).mean()) for threshold in THRESHOLDS}
        return {"mIoU": float(ious.mean())} | shares


class GroundedConversationMetric:
    """mIoU and, given a text similarity, recall of grounded captions, by the rules of [`video_gcg`] (SPARROW's)."""

    def __init__(self, text_similarity: TextSimilarity | None = None) -> None:
        self.text_similarity = text_similarity
        self._rows: list[tuple[float, int, int]] = []  # mIoU, matches, annotated phrases

    def add_batch(
        self, predictions: Sequence[tuple[Any, Sequence[str]]], references: Sequence[tuple[Any, Sequence[str]]]
    ) -> None:
        """Adds samples.

        Args:
            predictions: for each sample the masks `(P, T, H, W)` and their phrases.
            references: for each sample the masks `(N, T, H, W)` and their phrases.

        Raises:
            ValueError: if the numbers of samples, frames or pixels differ.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} samples for {len(references)}: expected as many")
        for (masks, phrases), (truth, truth_phrases) in zip(predictions, references, strict=True):
            masks, truth = _to_numpy(masks) != 0, _to_numpy(truth) != 0
            if masks.shape[1:] != truth.shape[1:] or masks.ndim != 4:
                raise ValueError(
                    f"masks of shape {masks.shape} for {truth.shape}: expected (objects, frames, height, width)"
                )
            ious = tube_ious((truth[:, frame], masks[:, frame]) for frame in range(masks.shape[1]))
            matches = 0
            if self.text_similarity is not None:
                matches = len(match_phrases(ious, truth_phrases, phrases, self.text_similarity))
            self._rows.append((sample_miou(ious), matches, len(truth_phrases)))

    def compute(self) -> dict[str, float]:
        """mIoU and, with a text similarity, recall.

        Raises:
            ValueError: if nothing was added.
        """
        rows, self._rows = _drain(self._rows), []
        mious, matches, phrases = zip(*rows, strict=True)
        metrics = {"mIoU": float(np.mean(mious))}
        if self.text_similarity is not None:
            metrics["recall"] = sum(matches) / max(sum(phrases), 1)
        return metrics


class CaptionMetrics:
    """Metrics of captions that depend on the whole set, e.g. [`captions.Cider`] and [`captions.Meteor`]."""

    def __init__(self, metrics: Sequence[CaptionMetric]) -> None:
        self.metrics = metrics
        self._pairs: list[tuple[str, str]] = []

    def add_batch(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Adds captions, one reference each.

        Raises:
            ValueError: if the numbers differ.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} captions for {len(references)}: expected as many")
        self._pairs.extend(zip(predictions, references, strict=True))

    def compute(self) -> dict[str, float]:
        """The numbers of all metrics.

        Raises:
            ValueError: if nothing was added.
        """
        pairs, self._pairs = _drain(self._pairs), []
        candidates, references = zip(*pairs, strict=True)
        return {name: value for metric in self.metrics for name, value in metric(candidates, references).items()}


class TrainerMetrics:
    """`compute_metrics` of a `transformers.Trainer`, made of metric objects.

    Works in both of the trainer's modes: called once with everything, or, with `batch_eval_metrics=True`, called after
    every batch and asked for the result at the last.

    Args:
        metrics: name -> metric object; the results are named `<name>_<metric>`.
        select: takes the trainer's `EvalPrediction` and returns, for each name, predictions and references.
    """

    def __init__(self, metrics: Mapping[str, Metric], select: Callable[[Any], Mapping[str, tuple[Any, Any]]]) -> None:
        self.metrics, self.select = metrics, select

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        for name, (predictions, references) in self.select(prediction).items():
            self.metrics[name].add_batch(predictions, references)
        if not compute_result:
            return {}
        return {
            f"{name}_{key}": value for name, metric in self.metrics.items() for key, value in metric.compute().items()
        }


def _to_numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if hasattr(array, "detach") else np.asarray(array)


def _pairs(predictions: Any, references: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} tracks for {len(references)}: expected as many")
    return [(_to_numpy(p), _to_numpy(r)) for p, r in zip(predictions, references, strict=True)]


def _drain(rows: list) -> list:
    if not rows:
        raise ValueError("nothing to compute: call add_batch first")
    return rows
