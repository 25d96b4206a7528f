"""VidSTG: spatio-temporal grounding of sentences, scored by boxes.

What SPARROW and its hosts report as mIoU: the interrogative sentences of the test split, the video cut to the
annotated moment and sampled at 1 frame per second (at most 40 frames), frames shrunk to a short side of 224 pixels,
one box around the predicted mask of each frame, IoU with the annotated box, mean over the frames of a sample, mean
over samples. TubeDETR's evaluation (5 frames per second, at most 200, the whole clip, original pixels) adds temporal
localisation:

* tIoU: IoU of the predicted and the annotated time span;
* vIoU: sum of box IoUs over the sampled frames in both spans / number of sampled frames in their hull.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from .files import EvaluationError, MissingPredictionError, read_json, write_json
from .prompts import Host, vidstg_prompt
from .results import EvaluationResult, MissingPolicy, Scores, average, merge_scores

Sentence = Literal["interrogative", "declarative"]

#: Predicted components with fewer pixels are dropped before a box is drawn.
MIN_COMPONENT = 20
SHORT_SIDE, LONG_SIDE = 224, 373
THRESHOLDS = (0.3, 0.5)


@dataclass(frozen=True)
class VidStgProtocol:
    """How frames are sampled and in which units boxes and time are compared.

    Attributes:
        fps: sampled frames per second.
        max_frames: longer lists are thinned out evenly.
        temporal: whether the whole clip is shown and the time span is scored; otherwise the annotated moment is given.
        shrunk: boxes in pixels of the shrunk frame (see [`shrunk_size`]); otherwise of the original one.
        sampled_time: spans count sampled frames, and the annotated one ends at its last frame, as in VideoGLaMM's and
            SPARROW's scripts (so that a moment of one frame has length 0); otherwise they are frame numbers with an
            exclusive end, as in TubeDETR's.
    """

    name: str
    fps: float
    max_frames: int
    temporal: bool
    shrunk: bool
    sampled_time: bool

    def frame_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of the frames that are shown and in which boxes are drawn."""
        return shrunk_size(height, width) if self.shrunk else (height, width)

    def read_span(self, answer: str, frame_ids: Sequence[int]) -> tuple[int, int] | None:
        """Time span that an answer names, in the protocol's unit; `None` if it names none or none is asked for."""
        span = parse_span("".join(answer.split())) if self.temporal else None
        if span is None or self.sampled_time:
            return span
        start, end = (frame_ids[min(index, len(frame_ids) - 1)] for index in span)
        return start, end + 1


#: Spatial grounding within the annotated moment: the column "VidSTG mIoU" of SPARROW and its hosts.
MOMENT_PROTOCOL = VidStgProtocol("moment", 1, 40, temporal=False, shrunk=True, sampled_time=True)
#: The same with the whole clip and a predicted span (`--tmp_loc` of the host scripts).
MOMENT_TEMPORAL_PROTOCOL = VidStgProtocol("moment, temporal", 1, 40, temporal=True, shrunk=True, sampled_time=True)
TUBEDETR_PROTOCOL = VidStgProtocol("TubeDETR", 5, 200, temporal=True, shrunk=False, sampled_time=False)


@dataclass(frozen=True)
class VidStgSample:
    """One sentence about one clip.

    Attributes:
        sample_id: running number of the annotation file, also the name of its prediction.
        video_path: the video file.
        caption: sentence as annotated.
        prompt: what the host model is asked.
        fps: frames per second of the video.
        height: of the video, in pixels.
        width: of the video, in pixels.
        clip: first frame and exclusive last frame of what the model sees.
        moment: first frame and exclusive last frame of the annotated moment.
        frame_ids: sampled frames, numbered in the whole video.
        moment_ids: those of them inside the moment; they are scored.
        boxes: annotated box of each of them, xyxy in pixels of the protocol; `None` where it is degenerate.
    """

    sample_id: str
    video_path: Path
    caption: str
    prompt: str
    fps: float
    height: int
    width: int
    clip: tuple[int, int]
    moment: tuple[int, int]
    frame_ids: tuple[int, ...]
    moment_ids: tuple[int, ...]
    boxes: dict[int, np.ndarray | None]


class VidStgDataset:
    """VidSTG test split as preprocessed by TubeDETR.

    Layout: `<root>/processed/vidstg/vidstg_annotations/test.json` and `<root>/vidstg/video/<video path>`.

    Args:
        root: folder of the data sets.
        sentence: which type of sentences; published numbers are of the interrogative ones.
        protocol: sampling and units.
        host: whose prompts to use.
        annotations_file: if it is not in the official place.
    """

    benchmark: ClassVar[str] = "vidstg"

    def __init__(
        self,
        root: str | Path,
        sentence: Sentence = "interrogative",
        protocol: VidStgProtocol = MOMENT_PROTOCOL,
        host: Host = "sparrow",
        annotations_file: str | Path | None = None,
    ) -> None:
        root = Path(root)
        default = root / "processed" / "vidstg" / "vidstg_annotations" / "test.json"
        self.annotations_file = Path(annotations_file or default)
        self.videos_folder = root / "vidstg" / "video"
        self.sentence, self.protocol, self.host = sentence, protocol, host
        content = read_json(self.annotations_file)
        if not isinstance(content, dict) or not {"videos", "trajectories"} <= content.keys():
            raise EvaluationError(f"{self.annotations_file}: expected the keys 'videos' and 'trajectories'")
        self._trajectories = content["trajectories"]
        self._videos = [video for video in content["videos"] if video["qtype"] == sentence]
        if not self._videos:
            raise EvaluationError(f"{self.annotations_file}: no {sentence} sentences")

    def __len__(self) -> int:
        return len(self._videos)

    def __iter__(self) -> Iterator[VidStgSample]:
        return (self[index] for index in range(len(self)))

    def limit(self, count: int) -> None:
        """Keeps only the first sentences."""
        self._videos = self._videos[:count]

    def __getitem__(self, index: int) -> VidStgSample:
        video = self._videos[index]
        moment = (video["tube_start_frame"], video["tube_end_frame"])
        clip = (video["start_frame"], video["end_frame"]) if self.protocol.temporal else moment
        frame_ids = sample_frames(*clip, video["fps"], self.protocol.fps, self.protocol.max_frames)
        moment_ids = tuple(frame for frame in frame_ids if moment[0] <= frame < moment[1])
        return VidStgSample(
            sample_id=str(video["video_id"]),
            video_path=self.videos_folder / video["video_path"],
            caption=video["caption"],
            prompt=vidstg_prompt(video["caption"], self.sentence == "interrogative", self.host),
            fps=video["fps"],
            height=video["height"],
            width=video["width"],
            clip=clip,
            moment=moment,
            frame_ids=tuple(frame_ids),
            moment_ids=moment_ids,
            boxes=self._boxes(video, moment_ids),
        )

    @property
    def version(self) -> str:
        """Name of the released version with these counts, or the counts."""
        if self.sentence == "interrogative" and len(self) == 5693:
            return "VidSTG test, interrogative"
        return f"unrecognised: {len(self)} {self.sentence} sentences"

    def _boxes(self, video: dict[str, Any], frames: Sequence[int]) -> dict[int, np.ndarray | None]:
        original, target = video["original_video_id"], str(video["target_id"])
        try:
            trajectory = self._trajectories[original][target]
            ltwh = {frame: trajectory[str(frame)]["bbox"] for frame in frames}
        except KeyError as error:
            raise EvaluationError(
                f"{self.annotations_file}: video {original} has no box for target {target} at {error}"
            ) from error
        size = video["height"], video["width"]
        target_size = self.protocol.frame_size(*size)
        return {frame: annotated_box(box, size, target_size) for frame, box in ltwh.items()}


def sample_frames(start: int, end: int, video_fps: float, fps: float = 1, max_frames: int = 40) -> list[int]:
    """Frames that are shown and scored.

    The first frame, then every frame at which the clock of `fps` (running since frame 0, not since `start`) has ticked
    since the last one taken. More than `max_frames` are thinned out evenly.

    Args:
        start: first frame.
        end: exclusive last frame.
        video_fps: frames per second of the video.
        fps: frames per second wanted.
        max_frames: most frames wanted.

    Raises:
        EvaluationError: if the span is empty or the video has fewer frames per second than wanted.
    """
    if end <= start:
        raise EvaluationError(f"frames {start} to {end} (exclusive): expected at least one frame")
    if fps > video_fps:
        raise EvaluationError(f"a video of {video_fps} frames per second cannot be sampled at {fps}")
    rate = fps / video_fps
    frames = [start]
    for frame in range(start, end):
        if int(frames[-1] * rate) < int(frame * rate):
            frames.append(frame)
    if len(frames) > max_frames:
        frames = [frames[index * len(frames) // max_frames] for index in range(max_frames)]
    return frames


def shrunk_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the frames the hosts see: short side 224, unless the long side would exceed 373 pixels."""
    short, long = min(height, width), max(height, width)
    side = SHORT_SIDE
    if long / short * side > LONG_SIDE:
        side = round(LONG_SIDE * short / long)
    if short == side:
        return height, width
    if width < height:
        return int(side * height / width), side
    return side, int(side * width / height)


def annotated_box(ltwh: Sequence[float], size: tuple[int, int], target_size: tuple[int, int]) -> np.ndarray | None:
    """Annotated box in pixels of another resolution.

    Args:
        ltwh: left, top, width, height in pixels of the original frame; may reach outside.
        size: height and width of the original frame.
        target_size: height and width to scale to.

    Returns:
        `(4,)` float32 xyxy in pixels of the target, clamped to the frame; `None` if nothing of it is inside.
    """
    left, top, width, height = (np.float32(value) for value in ltwh)
    box = np.array([left, top, left + width, top + height], np.float32)
    box[0::2] = box[0::2].clip(0, size[1])
    box[1::2] = box[1::2].clip(0, size[0])
    if box[2] <= box[0] or box[3] <= box[1]:
        return None
    ratios = np.array([target_size[1] / size[1], target_size[0] / size[0]] * 2, np.float32)
    return box * ratios


def mask_to_box(mask: np.ndarray) -> list[float] | None:
    """Box around a predicted mask, as the host scripts draw it.

    The corners are the outermost pixel indices, without adding 1, so that a single pixel has a box of area 0. The
    scripts remove small components first; see [`remove_small_components`].

    Args:
        mask: `(H, W)`, non-zero is foreground, at the resolution in which boxes are compared.

    Returns:
        xyxy in pixels, or `None` for an empty mask.
    """
    mask = mask != 0
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    return [float(columns[0]), float(rows[0]), float(columns[-1]), float(rows[-1])]


def remove_small_components(mask: np.ndarray) -> np.ndarray:
    """`(H, W)` bool mask without its 4-connected components of fewer than 20 pixels."""
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ImportError(
            "connected components are found by scipy: pip install 'sparrow-video-grounding[eval]'"
        ) from error
    components, _ = ndimage.label(mask)
    large = np.bincount(components.ravel()) >= MIN_COMPONENT
    large[0] = False
    return large[components]


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """IoU of two boxes with continuous xyxy corners in the same unit (no pixel is added)."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    overlap = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
    intersection = overlap.clip(min=0).prod()
    union = (first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod() - intersection
    return float(intersection / union) if union > 0 else 0.0


def parse_span(answer: str) -> tuple[int, int] | None:
    """Time span that an answer names as `frames:(start,end)`, in sampled frames; `None` if it names none."""
    match = re.search(r"frames:\((\d+),(\d+)\)", answer)
    return (int(match[1]), int(match[2])) if match else None


def write_prediction(
    predictions: str | Path,
    sample: VidStgSample,
    boxes: dict[int, Sequence[float] | None],
    span: tuple[int, int] | None = None,
) -> None:
    """Writes the prediction of one sample, atomically, as `<predictions>/<sample id>.json`.

    Args:
        predictions: folder.
        sample: what was predicted.
        boxes: frame id -> xyxy in pixels of the protocol, or `None` for an empty mask.
        span: predicted time span in the protocol's unit; `None` if the answer names none.
    """
    content = {
        "boxes": {str(frame): None if box is None else [float(x) for x in box] for frame, box in boxes.items()},
        "span": None if span is None else [int(x) for x in span],
    }
    write_json(Path(predictions) / f"{sample.sample_id}.json", content)


def score_vidstg(
    dataset: VidStgDataset, predictions: str | Path, missing: MissingPolicy = "error"
) -> EvaluationResult:
    """Scores the predictions written by [`write_prediction`].

    A frame whose box is null (empty mask) scores 0, and so does a sample whose moment lies between two sampled
    frames. Samples with a degenerate annotated box are left out and counted. `missing` decides about samples without
    a file and about frames without an entry: `"zero"` scores such a frame 0 and such a sample 0. Both official
    scripts leave out a sample that failed; for a missing frame SPARROW's scores 0 and VideoGLaMM's leaves the sample
    out. `missing="official"` does as the script of the data set's `host` (any but VideoGLaMM: SPARROW's).

    Returns:
        `metrics` holds mIoU and the share of samples above 0.3 and 0.5; with temporal localisation also tIoU and vIoU.

    Raises:
        EvaluationError: for unreadable files, whatever the policy, and for missing ones if it is `"error"`.
    """
    predictions = Path(predictions)
    if not predictions.is_dir():
        raise EvaluationError(f"{predictions}: no such folder of predictions")
    samples = list(dataset)
    without_box = [sample for sample in samples if any(box is None for box in sample.boxes.values())]
    unusable = {sample.sample_id for sample in without_box}
    scored = [sample for sample in samples if sample.sample_id not in unusable]
    parts = [_score_sample(sample, predictions, dataset.protocol) for sample in scored]
    official = {"sample": "skip", "frame": "skip" if dataset.host == "videoglamm" else "zero"}
    names = _metric_names(dataset.protocol)
    scores = merge_scores(parts, missing, official, dict.fromkeys(names, 0.0))
    expected = {f"{sample.sample_id}.json" for sample in samples}
    extra = [
        f"{path}: not part of the benchmark, ignored"
        for path in sorted(predictions.iterdir())
        if path.name not in expected
    ]
    invalid = [
        f"{dataset.annotations_file}: sample {sample.sample_id} has no usable box in the moment, left out"
        for sample in without_box
    ]
    counts = {"samples": len(samples), **scores.counts, "without_ground_truth": len(invalid), "extra": len(extra)}
    return EvaluationResult(
        benchmark=dataset.benchmark,
        protocol=f"{dataset.protocol.name}, {dataset.sentence}",
        dataset_version=dataset.version,
        metrics=average(scores.values.values(), names),
        per_item=scores.values,
        counts=counts,
        missing_policy=missing,
        problems=scores.missing_lines + invalid + extra,
    )


def _metric_names(protocol: VidStgProtocol) -> tuple[str, ...]:
    names = ["mIoU", *(f"mIoU@{threshold}" for threshold in THRESHOLDS)]
    if protocol.temporal:
        names += ["tIoU", "vIoU", *(f"vIoU@{threshold}" for threshold in THRESHOLDS)]
    return tuple(names)


def _score_sample(sample: VidStgSample, predictions: Path, protocol: VidStgProtocol) -> Scores:
    path = predictions / f"{sample.sample_id}.json"
    scores = Scores(counts={"frames": len(sample.moment_ids)})
    try:
        boxes, span = _read_prediction(path)
    except MissingPredictionError as error:
        scores.missing[sample.sample_id] = ("sample", str(error))
        return scores
    except EvaluationError as error:
        return Scores(broken=[str(error)])
    absent = [frame for frame in sample.moment_ids if frame not in boxes]
    if absent:
        line = f"{path}: no box for frame {absent[0]} ({len(absent)} of {len(sample.moment_ids)} frames)"
        scores.missing[sample.sample_id] = ("frame", line)
    ious = {
        frame: box_iou(boxes[frame], sample.boxes[frame]) if boxes.get(frame) is not None else 0.0
        for frame in sample.moment_ids
    }
    scores.values[sample.sample_id] = _sample_metrics(sample, ious, span, protocol)
    return scores


def _sample_metrics(
    sample: VidStgSample, ious: dict[int, float], span: tuple[int, int] | None, protocol: VidStgProtocol
) -> dict[str, float]:
    mean = sum(ious.values()) / max(len(ious), 1)
    row = {"mIoU": mean, **{f"mIoU@{threshold}": float(mean > threshold) for threshold in THRESHOLDS}}
    if not protocol.temporal:
        return row
    times = dict(zip(sample.frame_ids, range(len(sample.frame_ids)), strict=True))
    if protocol.sampled_time:
        # A moment between two sampled frames has no time in this unit: no span overlaps with it.
        truth = (times[sample.moment_ids[0]], times[sample.moment_ids[-1]]) if sample.moment_ids else (-100, -100)
    else:
        times, truth = {frame: frame for frame in sample.frame_ids}, sample.moment
    span = span or (0, 0)
    common = max(truth[0], span[0]), min(truth[1], span[1])
    hull = min(truth[0], span[0]), max(truth[1], span[1])
    overlap = max(common[1] - common[0], 0)
    total = (truth[1] - truth[0]) + (span[1] - span[0]) - overlap
    in_hull = sum(hull[0] <= time < hull[1] for time in times.values())
    in_both = sum(iou for frame, iou in ious.items() if common[0] <= times[frame] < common[1])
    video_iou = in_both / max(in_hull, 1)
    row |= {"tIoU": overlap / total if overlap else 0.0, "vIoU": video_iou}
    return row | {f"vIoU@{threshold}": float(video_iou > threshold) for threshold in THRESHOLDS}


def _read_prediction(path: Path) -> tuple[dict[int, list[float] | None], tuple[int, int] | None]:
    if not path.is_file():
        raise MissingPredictionError(f"{path}: missing")
    content = read_json(path)
    try:
        boxes = {int(f): None if box is None else [float(x) for x in box] for f, box in content["boxes"].items()}
        span = content["span"]
        if any(box is not None and len(box) != 4 for box in boxes.values()) or (span is not None and len(span) != 2):
            raise ValueError("a box needs 4 numbers, a span 2")
        return boxes, None if span is None else (int(span[0]), int(span[1]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EvaluationError(
            f'{path}: expected {{"boxes": {{frame: [x1, y1, x2, y2] or null}}, "span": [start, end] or null}} '
            f"({error!r})"
        ) from error
