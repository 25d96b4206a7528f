"""The result of grounding a query in a video: an answer text and one track of boxes and masks per object.

Shapes: `T` frames, `N` objects, `H, W` pixels. Boxes are xyxy in pixels of the upright frame, the maximum edges
exclusive. Masks are held as COCO run-length encodings (RLE) and decoded on demand, so that a result of a long
video stays small.
"""

import html
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

# 16384 x 16384: above every video format, and its runs still fit the 32-bit counters of pycocotools.
MAX_MASK_PIXELS = 2**28


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a bool mask (H, W) as `{"size": [H, W], "counts": str}`, COCO's compressed RLE.

    Raises:
        ValueError: if `mask` is not a two-dimensional bool array with at least one pixel.
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != np.bool_ or mask.size == 0:
        raise ValueError(f"mask: expected a bool array (H, W), got {mask.dtype} {mask.shape}; threshold logits first")
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """Decode an RLE into a bool mask (H, W). It is validated first (`ValueError`), so any input is safe."""
    validate_rle(rle)
    return np.ascontiguousarray(mask_utils.decode(rle), dtype=bool)


def mask_to_box(mask: np.ndarray) -> np.ndarray:
    """Tight box of a bool mask (H, W): float32 (4,) xyxy in pixels, maximum edges exclusive; NaN if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return np.full(4, np.nan, dtype=np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float32)


def validate_rle(rle: Any) -> None:
    """Check that an RLE of unknown origin can be decoded safely, before anything of the mask's size is allocated.

    pycocotools trusts its input: a number cut short or runs beyond the mask make it leave its buffers.

    Raises:
        ValueError: if the size is absent or too large, `counts` is not a compressed RLE string, a run is negative,
            or the runs do not cover exactly the H * W pixels.
    """
    if not isinstance(rle, dict) or "size" not in rle or "counts" not in rle:
        raise ValueError("RLE: expected an object with the fields size and counts")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(_is_integer(side) for side in size):
        raise ValueError("RLE size: expected [height, width]")
    if min(size) < 1 or size[0] * size[1] > MAX_MASK_PIXELS:
        raise ValueError(f"RLE size: expected 1 to {MAX_MASK_PIXELS} pixels, got {size[0]} x {size[1]}")
    if not isinstance(counts, str):
        raise ValueError(f"RLE counts: expected a compressed string, got {type(counts).__name__}")
    runs = _run_lengths(counts)
    if runs.min() < 0:
        raise ValueError(f"RLE counts: negative run {runs.min()}")
    if runs.sum() != size[0] * size[1]:
        raise ValueError(f"RLE counts: runs add up to {runs.sum()}, expected {size[0] * size[1]} (height * width)")


def _run_lengths(counts: str) -> np.ndarray:
    """Run lengths (int64) of COCO's compressed string, in time and memory linear in its length.

    Each character carries 5 bits (from chr(48), lowest first); bit 32 says that more follow, bit 16 of the last one
    is the sign. From the fourth number on it is the difference to the number two before (pycocotools, maskApi.c).
    """
    if not counts or not counts.isascii():
        raise ValueError("RLE counts: expected a non-empty ASCII string")
    codes = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError("RLE counts: character outside the RLE alphabet ('0' to 'o')")
    last = (codes & 32) == 0
    if not last[-1]:
        raise ValueError("RLE counts: ends in the middle of a number")
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > 6:  # 30 bits hold every run of MAX_MASK_PIXELS with its sign
        raise ValueError("RLE counts: a number is longer than 6 characters")
    shifts = 5 * (np.arange(codes.size) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


@dataclass(frozen=True, eq=False)
class ObjectTrack:
    """One object through the video.

    Args:
        id: Number of the object, not negative, stable over the video.
        phrase: Words of the answer that name it.
        span: Where the phrase stands in the answer: characters [start, end).
        score: Confidence that the object is the one meant.
        boxes: float32 (T, 4) xyxy in pixels; a row of NaN where the object is absent.
        scores: float32 (T,) confidence per frame.
        visible: bool (T,).
        rles: T masks as `encode_mask` returns them; None where the object is absent.
        size: (H, W) of the video.

    Raises:
        ValueError: if a field has not the shape, type or range above. The counts of `rles` are checked when a mask
            is decoded, and by the readers of `exports.py` for files.
    """

    id: int
    phrase: str | None
    span: tuple[int, int] | None
    score: float
    boxes: np.ndarray
    scores: np.ndarray
    visible: np.ndarray
    rles: list[dict[str, Any] | None]
    size: tuple[int, int]

    def __post_init__(self):
        if self.id < 0:
            raise ValueError(f"id: expected 0 or more, got {self.id}")
        if self.span is not None and not 0 <= self.span[0] <= self.span[1]:
            raise ValueError(f"span: expected 0 <= start <= end, got {tuple(self.span)}")
        _set(self, "id", int(self.id))
        _set(self, "span", None if self.span is None else tuple(int(end) for end in self.span))
        _set(self, "score", float(self.score))
        _set(self, "boxes", np.asarray(self.boxes, dtype=np.float32))
        _set(self, "scores", np.asarray(self.scores, dtype=np.float32))
        _set(self, "visible", np.asarray(self.visible))
        _set(self, "rles", list(self.rles))
        _set(self, "size", _checked_size(self.size))
        self._check_frames()

    def _check_frames(self):
        frames = len(self.rles)
        if frames == 0:
            raise ValueError("rles: expected at least one frame")
        for name, expected in {"boxes": (frames, 4), "scores": (frames,), "visible": (frames,)}.items():
            received = getattr(self, name).shape
            if received != expected:
                raise ValueError(f"{name}: expected shape {expected} as there are {frames} rles, received {received}")
        if self.visible.dtype != np.bool_:
            raise ValueError(f"visible: expected bool, received {self.visible.dtype}")
        if not np.isfinite(self.score) or not np.isfinite(self.scores).all():
            raise ValueError("score and scores: expected finite numbers; give absent frames the score 0")
        absent = np.isnan(self.boxes).all(axis=1)
        present = self.boxes[~absent]
        if not np.isfinite(present).all() or (present[:, :2] > present[:, 2:]).any():
            raise ValueError("boxes: expected rows of finite x0 <= x1, y0 <= y1, or of NaN only where absent")
        for frame, rle in enumerate(self.rles):
            if rle is not None and tuple(rle["size"]) != self.size:
                raise ValueError(f"rles[{frame}]: expected size {self.size}, received {tuple(rle['size'])}")

    def __len__(self) -> int:
        """Number of frames, T."""
        return len(self.rles)

    def mask(self, frame: int) -> np.ndarray:
        """Mask of one frame: bool (H, W), all False where the object is absent."""
        rle = self.rles[frame]
        return np.zeros(self.size, dtype=bool) if rle is None else decode_mask(rle)

    def iter_masks(self) -> Iterator[np.ndarray]:
        """The masks frame by frame, each bool (H, W), one in memory at a time."""
        return (self.mask(frame) for frame in range(len(self)))

    @property
    def masks(self) -> np.ndarray:
        """All masks: bool (T, H, W), T * H * W bytes. Prefer `iter_masks` for long videos."""
        return np.stack(list(self.iter_masks()))


@dataclass(frozen=True, eq=False)
class GroundingResult:
    """Answer to one query about one video. A sequence of its objects.

    Args:
        query: What was asked.
        text: Clean answer, without special tokens.
        objects: N tracks of T frames each.
        size: (H, W) of the upright frames.
        fps: Mean frame rate; 0 if unknown.
        timestamps: float64 (T,) times of the frames in seconds, never decreasing.
        sampled_frames: Indices of the frames that the language model saw.
        path: The video's file; None if it came from memory.
        timings: Seconds spent per stage.
        warnings: What the user should know about the run.
        time_span: (start, end) in seconds, when the answer is about a part of the video.

    Raises:
        ValueError: if a field has not the shape or range above, or the objects do not fit the video.

    Example:
        >>> result = pipe("clip.mp4", "the turtle moving left")
        >>> result.objects[0].mask(10).sum()
        >>> result.filter(0.5).save_json("result.json")
    """

    query: str
    text: str
    objects: list[ObjectTrack]
    size: tuple[int, int]
    fps: float
    timestamps: np.ndarray
    sampled_frames: list[int]
    path: str | None = None
    timings: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    time_span: tuple[float, float] | None = None

    def __post_init__(self):
        _set(self, "objects", list(self.objects))
        _set(self, "size", _checked_size(self.size))
        _set(self, "fps", float(self.fps))
        _set(self, "timestamps", np.asarray(self.timestamps, dtype=np.float64))
        _set(self, "sampled_frames", [int(index) for index in self.sampled_frames])
        _set(self, "timings", {stage: float(seconds) for stage, seconds in self.timings.items()})
        _set(self, "warnings", list(self.warnings))
        _set(self, "time_span", None if self.time_span is None else tuple(float(end) for end in self.time_span))
        self._check_times()
        self._check_objects()

    def _check_times(self):
        times = self.timestamps
        if times.ndim != 1 or times.size == 0:
            raise ValueError(f"timestamps: expected shape (T,) with T >= 1, received {times.shape}")
        if not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise ValueError("timestamps: expected finite seconds that never decrease")
        if not np.isfinite(self.fps) or self.fps < 0:
            raise ValueError(f"fps: expected a finite number, 0 or more, received {self.fps}")
        if any(not 0 <= index < times.size for index in self.sampled_frames):
            raise ValueError(f"sampled_frames: expected indices from 0 to {times.size - 1}")
        if not np.isfinite(list(self.timings.values())).all():
            raise ValueError("timings: expected finite seconds")
        if self.time_span is not None:
            start, end = self.time_span
            if not np.isfinite(end - start) or start > end:
                raise ValueError(f"time_span: expected finite start <= end, received {self.time_span}")

    def _check_objects(self):
        for position, track in enumerate(self.objects):
            where = f"objects[{position}]"
            if len(track) != self.num_frames or track.size != self.size:
                raise ValueError(
                    f"{where}: expected {self.num_frames} frames of {self.size}, received {len(track)} of {track.size}"
                )
            if track.span is not None and track.span[1] > len(self.text):
                raise ValueError(f"{where}: span {track.span} is outside the answer of {len(self.text)} characters")
        if len({track.id for track in self.objects}) < len(self.objects):
            raise ValueError("objects: expected distinct ids")

    def __len__(self) -> int:
        """Number of objects, N."""
        return len(self.objects)

    def __iter__(self) -> Iterator[ObjectTrack]:
        return iter(self.objects)

    def __getitem__(self, position: int) -> ObjectTrack:
        return self.objects[position]

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    @property
    def duration(self) -> float:
        """Seconds until the last frame ends: its time plus one mean frame interval."""
        if self.num_frames > 1:
            interval = (self.timestamps[-1] - self.timestamps[0]) / (self.num_frames - 1)
        else:
            interval = 1 / self.fps if self.fps > 0 else 0.0
        return float(self.timestamps[-1] + interval)

    @property
    def masks(self) -> np.ndarray:
        """All masks: bool (N, T, H, W), N * T * H * W bytes. Prefer `ObjectTrack.iter_masks` for long videos."""
        masks = np.zeros((len(self), self.num_frames, *self.size), dtype=bool)
        for position, track in enumerate(self.objects):
            for frame, mask in enumerate(track.iter_masks()):
                masks[position, frame] = mask
        return masks

    def filter(self, min_score: float) -> "GroundingResult":
        """A new result with the objects whose `score` is at least `min_score`."""
        return replace(self, objects=[track for track in self.objects if track.score >= min_score])

    def to_json(self) -> str:
        """The whole result as one line of strict JSON; see `exports.py` for the fields."""
        from .exports import result_to_json

        return result_to_json(self)

    @staticmethod
    def from_json(text: str) -> "GroundingResult":
        """Inverse of `to_json`. Raises `ValueError` naming the field if `text` is not such a result."""
        from .exports import result_from_json

        return result_from_json(text)

    def save_json(self, path: str | PathLike, *, overwrite: bool = False) -> None:
        """Write `to_json` to a file. Raises `ExportError`, also if it exists and `overwrite` is not set."""
        from .exports import write_json

        write_json(self, path, overwrite=overwrite)

    def to_coco(self) -> dict[str, Any]:
        """The frames as images of a COCO data set, the objects as annotations with a `track_id`."""
        from .exports import result_to_coco

        return result_to_coco(self)

    def to_mot(self) -> str:
        """The boxes as MOTChallenge text."""
        from .exports import result_to_mot

        return result_to_mot(self)

    def to_csv(self) -> str:
        """The boxes as a table, one row per object and frame."""
        from .exports import result_to_csv

        return result_to_csv(self)

    def save_pngs(self, folder: str | PathLike, *, overwrite: bool = False, progress: bool = False) -> None:
        """Write `folder/<object id>/<frame>.png`, 8-bit gray, 0 or 255. Raises `ExportError`."""
        from .exports import write_pngs

        write_pngs(self, folder, overwrite=overwrite, progress=progress)

    def save_indexed_pngs(self, folder: str | PathLike, *, overwrite: bool = False, progress: bool = False) -> None:
        """Write `folder/<frame>.png` with DAVIS's palette: value = position of the object + 1, 0 = background.

        One pixel has one value: where objects overlap, the first one wins. Raises `ExportError`.
        """
        from .exports import write_indexed_pngs

        write_indexed_pngs(self, folder, overwrite=overwrite, progress=progress)

    def save_video(self, path: str | PathLike, reader, *, overwrite: bool = False, progress: bool = False) -> None:
        """Write the video with boxes and masks drawn on it; `reader` is the opened video (`open_video`).

        Raises `ExportError`, or `ValueError` if the reader's video is not the one of this result.
        """
        from .exports import check_target
        from .overlays import write_overlay

        check_target(path, overwrite=overwrite)
        self._check_reader(reader)
        write_overlay(path, reader, self.objects, progress=progress)

    def save_strip(self, path: str | PathLike, reader, *, frames: int = 4, overwrite: bool = False) -> None:
        """Write a PNG of evenly spaced frames side by side, with boxes and masks drawn on them.

        Raises `ExportError`, or `ValueError` if the reader's video is not the one of this result.
        """
        from .exports import write_picture
        from .overlays import film_strip

        self._check_reader(reader)
        write_picture(film_strip(reader, self.objects, frames), path, overwrite=overwrite)

    def _check_reader(self, reader) -> None:
        expected, received = (self.num_frames, *self.size), (len(reader), reader.height, reader.width)
        if expected != received:
            raise ValueError(f"reader: expected the video of this result, (T, H, W) = {expected}, received {received}")

    def to_supervision(self, frame: int):
        """The objects that have a box in a frame as `supervision.Detections`.

        `class_id` is the position of the object, `tracker_id` its id, `data["class_name"]` its phrase.

        Raises:
            ImportError: if supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs the supervision package: pip install supervision") from error
        positions = [p for p, track in enumerate(self.objects) if not np.isnan(track.boxes[frame]).any()]
        tracks = [self.objects[position] for position in positions]
        return supervision.Detections(
            xyxy=np.array([track.boxes[frame] for track in tracks], dtype=np.float32).reshape(-1, 4),
            mask=np.array([track.mask(frame) for track in tracks], dtype=bool).reshape(-1, *self.size),
            confidence=np.array([track.scores[frame] for track in tracks], dtype=np.float32),
            class_id=np.array(positions, dtype=int),
            tracker_id=np.array([track.id for track in tracks], dtype=int),
            data={"class_name": np.array([track.phrase or "" for track in tracks], dtype=str)},
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{track.id}</td><td>{html.escape(track.phrase or '')}</td><td>{track.score:.2f}</td>"
            f"<td>{int(track.visible.sum())} / {self.num_frames}</td></tr>"
            for track in self.objects
        )
        return (
            f"<p><b>{html.escape(self.query)}</b><br>{html.escape(self.text)}</p>"
            "<table><tr><th>object</th><th>phrase</th><th>score</th><th>visible frames</th></tr>"
            f"{rows}</table>" + "".join(f"<p>⚠ {html.escape(warning)}</p>" for warning in self.warnings)
        )


def _set(instance: Any, name: str, value: Any) -> None:
    """Normalise a field of a frozen dataclass."""
    object.__setattr__(instance, name, value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _checked_size(size: Any) -> tuple[int, int]:
    if len(size) != 2 or not all(_is_integer(side) and side > 0 for side in size):
        raise ValueError(f"size: expected (height, width) in whole pixels, received {tuple(size)}")
    if size[0] * size[1] > MAX_MASK_PIXELS:
        raise ValueError(f"size: expected at most {MAX_MASK_PIXELS} pixels, received {size[0]} x {size[1]}")
    return int(size[0]), int(size[1])
