"""Drawing objects on frames, and writing frames as an H.264 video that plays in browsers."""

import os
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from .errors import ExportError
from .video_io import VideoReader

# RGB. The first seven are the colours of Okabe and Ito ("Color Universal Design", 2008), which people with any of the
# common colour-vision deficiencies tell apart; the others lie far from them and from each other.
PALETTE = (
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (255, 60, 60),
    (30, 75, 255),
    (0, 220, 60),
    (255, 0, 240),
    (30, 195, 210),
    (150, 60, 180),
    (45, 120, 0),
    (255, 165, 240),
    (135, 90, 30),
    (0, 255, 165),
    (240, 0, 135),
    (165, 225, 45),
    (150, 75, 120),
)

# How contour and box of an object are drawn, so that objects can be told apart without their colour. The names are
# also CSS border styles.
OUTLINES = ("solid", "dashed", "dotted", "double")

MASK_OPACITY = 0.45
# Ticks per second of a written video: exact for the usual frame rates, within 6 µs of any other time.
TICKS_PER_SECOND = 90_000
CONSTANT_RATE_FACTOR = "20"  # x264's quality scale: lower is better and larger, 18 looks lossless


Plate = tuple[float, float, float, float]


class Track(Protocol):
    """What `write_overlay` needs of an object: the fields of `ObjectTrack` that are drawn."""

    id: int
    phrase: str | None
    boxes: np.ndarray

    def mask(self, frame: int) -> np.ndarray: ...


def object_color(object_id: int) -> tuple[int, int, int]:
    """RGB colour of an object, the same in every picture; colours repeat after len(PALETTE) ids."""
    return PALETTE[object_id % len(PALETTE)]


def object_outline(object_id: int) -> str:
    """One of `OUTLINES`, the same in every picture; neighbouring ids differ."""
    return OUTLINES[object_id % len(OUTLINES)]


def draw_overlay(
    frame: np.ndarray, masks: np.ndarray, boxes: np.ndarray, labels: Sequence[str], ids: Sequence[int]
) -> np.ndarray:
    """Draws every object as a translucent mask, its contour and box in the outline of the object, and a label.

    Args:
        frame: (H, W, 3) uint8 RGB; not changed.
        masks: (N, H, W) bool.
        boxes: (N, 4) xyxy in pixels, maximum edges exclusive; a row of NaN where an object has no box.
        labels: N phrases; shortened to fit the picture.
        ids: N object ids, which choose the colours.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: sizes that do not agree.
    """
    masks, boxes = np.asarray(masks), np.asarray(boxes, dtype=np.float64)
    height, width = frame.shape[:2]
    count = len(ids)
    if masks.shape != (count, height, width) or masks.dtype != np.bool_:
        raise ValueError(f"masks: expected bool {(count, height, width)}, got {masks.dtype} {masks.shape}")
    if boxes.shape != (count, 4) or len(labels) != count:
        raise ValueError(f"{count} ids, but boxes of shape {boxes.shape} and {len(labels)} labels")
    line = max(1, round(min(height, width) / 360))
    picture = frame.copy()
    for mask, object_id in zip(masks, ids, strict=True):
        _paint_mask(picture, mask, object_color(object_id), object_outline(object_id), min(line, 2))
    for box, object_id in zip(boxes, ids, strict=True):
        if np.isfinite(box).all():
            x0, y0, x1, y1 = np.rint(np.clip(box, 0, [width, height, width, height])).astype(int)
            region = picture[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
            inside = np.ones(region.shape[:2], dtype=bool)
            region[_outline(inside, object_outline(object_id), line)] = object_color(object_id)
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    plates = []
    for box, mask, label, object_id in zip(boxes, masks, labels, ids, strict=True):  # last: no box crosses a label
        corner = _top_left(box, mask)
        if corner is not None:
            plates.append(
                _draw_label(draw, image.size, corner, f"{object_id} {label}", object_color(object_id), plates)
            )
    return np.asarray(image)


def _paint_mask(picture: np.ndarray, mask: np.ndarray, color: tuple[int, int, int], outline: str, width: int) -> None:
    """Tints `picture` in place where `mask` is set and draws its inner edge, `width` pixels wide."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    mask, region = mask[window], picture[window]
    region[mask] = np.rint(region[mask] * (1 - MASK_OPACITY) + np.array(color) * MASK_OPACITY).astype(np.uint8)
    region[_outline(mask, outline, width)] = color


def _outline(mask: np.ndarray, outline: str, width: int) -> np.ndarray:
    """The inner edge of a mask (H, W), `width` pixels wide, as one of `OUTLINES`: bool (H, W)."""
    inner = _eroded(mask, width)
    edge = mask & ~inner
    if outline == "solid":
        return edge
    if outline == "double":
        gap = _eroded(inner, width)
        return edge | (gap & ~_eroded(gap, width))
    rows, columns = np.indices(mask.shape, sparse=True)
    dash, space = (6 * width, 4 * width) if outline == "dashed" else (2 * width, 2 * width)
    return edge & ((rows + columns) % (dash + space) < dash)


def _eroded(mask: np.ndarray, steps: int) -> np.ndarray:
    """The mask without the pixels at most `steps` from its edge; the picture's border counts as edge."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _top_left(box: np.ndarray, mask: np.ndarray) -> tuple[float, float] | None:
    """Top left corner of an object in pixels, by its box or else its mask; None if it has neither."""
    if np.isfinite(box).all():
        return float(box[0]), float(box[1])
    if not mask.any():
        return None
    return float(mask.any(axis=0).argmax()), float(mask.any(axis=1).argmax())


def _draw_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    text: str,
    color: tuple[int, int, int],
    plates: Sequence[Plate],
) -> Plate:
    """Writes `text` on a plate above the object's corner, or below it where the picture ends or a plate lies there.

    Returns the plate as (x0, y0, x1, y1) pixels.
    """
    width, height = size
    font = _font(max(9, round(min(width, height) / 28)))
    margin = max(1, round(font.size / 6))
    text = _fit(" ".join(text.encode("utf-8", "replace").decode().split()), font, width / 2)
    plate_width, plate_height = font.getlength(text) + 2 * margin, sum(font.getmetrics()) + margin
    x = max(0, min(corner[0], width - plate_width))
    y = max(0, min(corner[1] - plate_height, height - plate_height))
    for x0, y0, x1, y1 in sorted(plates, key=lambda plate: plate[1]):
        below = y1 + plate_height <= height
        if below and x < x1 and x0 < x + plate_width and y < y1 and y0 < y + plate_height:
            y = y1
    plate = (x, y, x + plate_width, y + plate_height)
    draw.rectangle((x, y, plate[2] - 1, plate[3] - 1), fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    draw.text((x + margin, y + margin / 2), text, font=font, fill=(0, 0, 0) if luminance > 128 else (255, 255, 255))
    return plate


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cuts `text` so that it is at most `width` pixels wide."""
    text = text[:200]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


class VideoWriter:
    """Writes frames one at a time as an H.264 MP4 with true frame times, playable in browsers.

    Use it in a `with` block: the file appears at `path` when the block ends, and not at all if it ends with an error.
    Until then a hidden temporary file lies in the same folder. H.264 with 4:2:0 colour needs even sizes, so the last
    column or row is repeated where the width or height is odd.

    Args:
        path: file to write; an existing one is replaced at the end. Always MP4, whatever its suffix.
        width, height: size of the frames in pixels.
        fps: constant frame rate; or
        timestamps: (T,) strictly increasing seconds, one for each frame that will be written.

    Raises:
        ExportError: the file cannot be written: no such folder, no permission, disk full, size refused by the encoder.
        ValueError: arguments or frames that do not fit.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        width: int,
        height: int,
        *,
        fps: float | None = None,
        timestamps: Sequence[float] | None = None,
    ):
        if (fps is None) == (timestamps is None):
            raise ValueError("pass either fps or timestamps")
        if fps is not None and not 0 < fps <= TICKS_PER_SECOND:
            raise ValueError(f"fps = {fps}: expected more than 0 and at most {TICKS_PER_SECOND}")
        self._ticks = None if timestamps is None else _ticks(timestamps)
        self._fps = fps
        self.width, self.height = width, height
        self.num_frames = 0
        self.path = os.path.abspath(os.fsdecode(path))
        # Absolute, because FFmpeg takes the beginning of "name:rest" for a protocol; short, because `path` may have
        # the longest name that the file system allows.
        self._temporary = os.path.join(os.path.dirname(self.path), f".{uuid.uuid4().hex}.part")
        self._container = None
        try:
            self._open()
        except (av.FFmpegError, OSError) as error:
            self.abort()
            raise self._export_error(error) from error

    def _open(self) -> None:
        open(self._temporary, "xb").close()  # FFmpeg opens its file late; a folder that refuses it is known now
        self._container = av.open(self._temporary, "w", format="mp4", options={"movflags": "+faststart"})
        # No B-frames: MP4 counts its duration in decoding times, which lag behind where frames are reordered, so that
        # players would cut off the end of a clip of variable frame rate.
        quality = {"crf": CONSTANT_RATE_FACTOR, "preset": "veryfast", "bf": "0"}
        self._stream = self._container.add_stream("libx264", rate=self._mean_rate(), options=quality)
        self._stream.width = self.width + self.width % 2
        self._stream.height = self.height + self.height % 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, TICKS_PER_SECOND)

    def _mean_rate(self) -> Fraction:
        """Mean frames per second, which the encoder needs for its rate control only."""
        rate = self._fps or 1.0
        if self._ticks is not None and len(self._ticks) > 1:
            rate = (len(self._ticks) - 1) * TICKS_PER_SECOND / int(self._ticks[-1] - self._ticks[0])
        return Fraction(max(rate, 0.001)).limit_denominator(1001)

    def write(self, frame: np.ndarray) -> None:
        """Appends one frame (H, W, 3) uint8 RGB."""
        if frame.shape != (self.height, self.width, 3) or frame.dtype != np.uint8:
            expected = (self.height, self.width, 3)
            raise ValueError(f"frame: expected uint8 {expected}, got {frame.dtype} {frame.shape}")
        if self._ticks is not None and self.num_frames == len(self._ticks):
            raise ValueError(f"more frames than the {self.num_frames} timestamps")
        padding = ((0, self.height % 2), (0, self.width % 2), (0, 0))
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.pad(frame, padding, mode="edge")), format="rgb24")
        picture.time_base = Fraction(1, TICKS_PER_SECOND)
        picture.pts = self._tick(self.num_frames)
        try:
            self._container.mux(self._stream.encode(picture))
        except (av.FFmpegError, OSError) as error:
            raise self._export_error(error) from error
        self.num_frames += 1

    def _tick(self, index: int) -> int:
        return round(index * TICKS_PER_SECOND / self._fps) if self._ticks is None else int(self._ticks[index])

    def close(self) -> None:
        """Finishes the file and moves it to `path`."""
        if self._container is None:
            return
        try:
            if self.num_frames == 0:
                raise ExportError(f"{self.path}: no frame was written")
            self._container.mux(self._stream.encode(None))
            self._container.close()
            os.replace(self._temporary, self.path)
        except (av.FFmpegError, OSError) as error:
            raise self._export_error(error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Drops what has been written."""
        container, self._container = self._container, None
        # Closing tries to complete the file, which may fail once more for the reason that led here.
        with suppress(av.FFmpegError, OSError):
            if container is not None:
                container.close()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.remove(self._temporary)

    def _export_error(self, error: Exception) -> ExportError:
        return ExportError(f"{self.path}: cannot write the video: {getattr(error, 'strerror', None) or error}")

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _ticks(timestamps: Sequence[float]) -> np.ndarray:
    """Frame times as whole ticks from the first frame on, kept apart by at least one tick."""
    times = np.asarray(timestamps, dtype=np.float64)
    if times.ndim != 1 or times.size == 0 or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise ValueError("timestamps: expected (T,) finite, strictly increasing seconds")
    ticks = np.rint((times - times[0]) * TICKS_PER_SECOND).astype(np.int64)
    order = np.arange(len(ticks))
    return np.maximum.accumulate(ticks - order) + order


def write_overlay(
    path: str | os.PathLike, reader: VideoReader, tracks: Iterable[Track], *, progress: bool = False
) -> None:
    """Writes the clip with its objects drawn in, frame by frame, at the clip's own frame times.

    Args:
        path: MP4 to write, see VideoWriter.
        reader: the clip, T frames.
        tracks: N objects with `id`, `phrase`, `boxes` (T, 4) xyxy in pixels and `mask(t)` -> (H, W) bool.
        progress: show a progress bar.

    Raises:
        ExportError: the file cannot be written.
        ValueError: a track of another length or size than the clip.
    """
    tracks = _check_tracks(tracks, reader)
    with VideoWriter(path, reader.width, reader.height, timestamps=reader.timestamps) as writer:
        for t, frame in enumerate(tqdm(reader, desc="overlay", unit="frame", disable=not progress)):
            writer.write(_draw_tracks(frame, tracks, t))


def film_strip(reader: VideoReader, tracks: Iterable[Track], count: int = 4, gap: int = 4) -> np.ndarray:
    """Some frames of a clip side by side with its objects drawn in, evenly spaced from the first to the last.

    Args:
        reader, tracks: see `write_overlay`.
        count: number of frames; a shorter clip gives all it has.
        gap: white pixels between two frames.

    Returns:
        uint8 RGB `(H, W', 3)`.
    """
    tracks = _check_tracks(tracks, reader)
    indices = np.linspace(0, len(reader) - 1, min(count, len(reader))).round().astype(int)
    pictures = [_draw_tracks(frame, tracks, t) for t, frame in zip(indices, reader.read(indices), strict=True)]
    space = np.full((reader.height, gap, 3), 255, dtype=np.uint8)
    return np.concatenate([part for picture in pictures for part in (space, picture)][1:], axis=1)


def _check_tracks(tracks: Iterable[Track], reader: VideoReader) -> list[Track]:
    tracks = list(tracks)
    for track in tracks:
        if len(track.boxes) != len(reader):
            raise ValueError(f"object {track.id} has {len(track.boxes)} frames, the clip {len(reader)}")
    return tracks


def _draw_tracks(frame: np.ndarray, tracks: list[Track], t: int) -> np.ndarray:
    masks = np.zeros((len(tracks), *frame.shape[:2]), dtype=bool)
    boxes = np.full((len(tracks), 4), np.nan)
    for number, track in enumerate(tracks):
        masks[number], boxes[number] = track.mask(t), track.boxes[t]
    return draw_overlay(frame, masks, boxes, [track.phrase or "" for track in tracks], [track.id for track in tracks])
