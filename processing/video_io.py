"""Video input: any local clip as a sequence of upright RGB frames with true times, streamed, within limits."""

import io
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from .errors import VideoReadError
from .video_sources import (
    ArraySource,
    Clock,
    FileSource,
    OpenFile,
    PictureSource,
    VideoLimits,
    opened_picture,
    picture_to_rgb,
)

DEFAULT_LIMITS = VideoLimits()


class VideoReader:
    """A clip as a sequence of upright RGB frames. Frames are decoded as they are asked for and never all kept.

    Made by `open_video`. Can be iterated any number of times, also by several iterators at once in one thread.

    Attributes:
        path: file or folder the clip comes from; None for bytes, file objects and arrays.
        width, height: size in pixels of the upright picture.
        num_frames: T, counted by decoding.
        timestamps: float64 (T,), seconds, strictly increasing from 0: the true times, also of a variable frame rate.
        fps: mean frames per second. A clip of one frame has the rate its file states, else 25.
        duration: seconds, with the last frame lasting as long as the mean frame.
        warnings: sentences about damage and oddities met while reading.
    """

    REVERSE_BLOCK = 16  # frames that `frames_reversed` holds at a time

    def __init__(
        self,
        source: FileSource | PictureSource | ArraySource,
        path: str | None = None,
        num_frames: int | None = None,
    ):
        self._source, self._closed = source, False
        self.path = path
        self.width, self.height = source.width, source.height
        self.timestamps = source.times[:num_frames]
        self.timestamps.flags.writeable = False
        self.num_frames = len(self.timestamps)
        self.fps = (self.num_frames - 1) / float(self.timestamps[-1]) if self.num_frames > 1 else source.rate
        self.duration = self.num_frames / self.fps
        self.warnings = list(source.warnings)

    def __len__(self) -> int:
        return self.num_frames

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.frames()

    def __repr__(self) -> str:
        size = f"{self.width}×{self.height}"
        return f"VideoReader({self.path!r}, {self.num_frames} frames, {size}, {self.fps:.3f} fps)"

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields frames start … stop-1 as (H, W, 3) uint8 RGB.

        Raises:
            IndexError: not 0 <= start <= stop <= T.
        """
        stop = self.num_frames if stop is None else stop
        if not 0 <= start <= stop <= self.num_frames:
            raise IndexError(f"frames({start}, {stop}) of a clip of {self.num_frames} frames")
        return self._pick(range(start, stop))

    def frames_reversed(self, start: int | None = None) -> Iterator[np.ndarray]:
        """Yields frames start, start-1, … 0 as (H, W, 3) uint8 RGB; from the last frame if `start` is None.

        Holds REVERSE_BLOCK frames at a time; each block is decoded forward from the key frame before it.

        Raises:
            IndexError: not 0 <= start < T.
        """
        start = self.num_frames - 1 if start is None else start
        self._check_indices(np.array([start]))
        return self._blocks_reversed(start)

    def _blocks_reversed(self, start: int) -> Iterator[np.ndarray]:
        for last in range(start, -1, -self.REVERSE_BLOCK):
            block = list(self._pick(range(max(0, last - self.REVERSE_BLOCK + 1), last + 1)))
            while block:
                yield block.pop()

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (n,), in any order and with repeats, as (n, H, W, 3) uint8 RGB.

        Equal to the same frames met while iterating, whatever the codec and the spacing of key frames, unless the
        data are damaged in a way that the decoder does not notice.

        Raises:
            IndexError: an index is not in 0 … T-1.
            TypeError: indices are not integers.
        """
        indices = np.asarray(indices)
        if indices.size and indices.dtype.kind not in "iu":
            raise TypeError(f"frame indices must be integers, got {indices.dtype}")
        self._check_indices(indices)
        pictures = np.empty((len(indices), self.height, self.width, 3), dtype=np.uint8)
        wanted, places = np.unique(indices, return_inverse=True)
        for number, frame in enumerate(self._pick(wanted.tolist())):
            pictures[places == number] = frame
        return pictures

    def head(self, num_frames: int) -> "VideoReader":
        """The first frames of the clip as a clip of its own; the whole clip if it has no more.

        Raises:
            ValueError: fewer than one frame is asked for.
        """
        if num_frames < 1:
            raise ValueError(f"head: expected at least 1 frame, got {num_frames}")
        if num_frames >= self.num_frames:
            return self
        reader = VideoReader(self._source, self.path, num_frames)
        reader.warnings.append(f"cut to the first {num_frames} of {self.num_frames} frames")
        return reader

    def close(self) -> None:
        """Ends the use of this reader. No file stays open between passes; a pass under way stops with an error."""
        self._closed = True

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_indices(self, indices: np.ndarray) -> None:
        outside = indices[(indices < 0) | (indices >= self.num_frames)]
        if outside.size:
            raise IndexError(f"frame {outside[0]} of a clip of {self.num_frames} frames")

    def _pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for frame in self._source.pick(indices):
            if self._closed:
                raise VideoReadError(f"{self!r} is closed")
            yield frame


def open_video(
    source: Any,
    *,
    limits: VideoLimits = DEFAULT_LIMITS,
    strict: bool = False,
    fps: float | None = None,
    timestamps: Sequence[float] | None = None,
    channel_order: str | None = None,
) -> VideoReader:
    """Opens a clip and reads it once from end to end, so that whatever is wrong with it is known before work begins.

    Args:
        source: a path to a video, a GIF, a still picture (a clip of one frame) or a folder of pictures (natural order
            of names; hidden files are skipped); `bytes` or a binary file object with such a file; frames as one array
            or tensor (T, H, W, 3) or (T, 3, H, W), RGB, uint8 or float 0..1, or a list of such frames (pictures from
            OpenCV are BGR: pass `frames[..., ::-1]`); a PIL image or a list of them; an open VideoReader, which is
            returned as it is. The content of a file decides what it is, never its name. URLs are not opened.
            Transparent pixels are composited on black.
        limits: see VideoLimits.
        strict: raise on damaged or missing data in a video file; otherwise the reader's `warnings` tell.
        fps, timestamps: frames per second, or (T,) seconds, for pictures and arrays, which have no clock of their own.
            25 fps if neither is given.
        channel_order: "channels_last" or "channels_first", for arrays whose shape leaves it open.

    Raises:
        VideoReadError: the source is not a readable clip.
        LimitExceededError: a limit was crossed; the message names it.
    """
    if isinstance(source, VideoReader):
        return source
    if channel_order not in (None, "channels_last", "channels_first"):
        raise VideoReadError(f"channel_order = {channel_order!r}: expected 'channels_last' or 'channels_first'")
    clock = Clock(fps, timestamps)
    if isinstance(source, str | os.PathLike):
        return _open_path(source, limits, strict, clock)
    if isinstance(source, bytes | bytearray | memoryview):
        return _open_file(lambda: io.BytesIO(source), "video bytes", len(source), limits, strict, clock)
    if isinstance(source, np.ndarray | torch.Tensor):
        return VideoReader(ArraySource(source, limits, clock, channel_order))
    if isinstance(source, Image.Image):
        source = [source]
    if isinstance(source, list | tuple):
        return _open_list(source, limits, clock, channel_order)
    if hasattr(source, "read"):
        return _open_file_object(source, limits, strict, clock)
    raise VideoReadError(
        f"cannot read a clip from {type(source).__name__}: expected a path, bytes, a binary file, an array of frames, "
        "a list of frames or pictures, or a VideoReader"
    )


def _open_path(source: str | os.PathLike, limits: VideoLimits, strict: bool, clock: Clock) -> VideoReader:
    path = os.fsdecode(source)
    if "://" in path:
        raise VideoReadError(f"{path!r}: URLs are not opened; download the clip and pass the local file")
    try:
        info = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise VideoReadError(f"{path!r}: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(info.st_mode):
        return _open_folder(path, limits, clock)
    if not stat.S_ISREG(info.st_mode):
        raise VideoReadError(f"{path!r}: neither a regular file nor a folder (a pipe, socket or device)")
    # No lambda: the reader of a file can then go to another process.
    return _open_file(partial(_binary, path), repr(path), info.st_size, limits, strict, clock, path)


@contextmanager
def _binary(path: str) -> Iterator[BinaryIO]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise VideoReadError(f"{path!r}: {error.strerror}") from error
        yield file


def _open_file(
    open_file: OpenFile,
    clip: str,
    size: int,
    limits: VideoLimits,
    strict: bool,
    clock: Clock,
    path: str | None = None,
) -> VideoReader:
    """Opens the content of one file of `size` bytes: a still picture, else a video."""
    if size == 0:
        raise VideoReadError(f"{clip}: the file is empty")
    limits.check("max_bytes", size, clip)
    if _is_still_picture(open_file, clip):
        source = PictureSource([clip], lambda _: _load_picture(open_file, clip, limits), limits, clock)
        source.warnings.append("a still picture, read as a clip of one frame")
        return VideoReader(source, path)
    if clock.is_given:
        raise VideoReadError(f"{clip}: a video file has its own times; leave out fps and timestamps")
    return VideoReader(FileSource(open_file, clip, limits, strict), path)


def _is_still_picture(open_file: OpenFile, clip: str) -> bool:
    with open_file() as file, opened_picture(file, clip) as image:
        animated = image is not None and getattr(image, "is_animated", False)
        if animated and image.format == "WEBP":
            raise VideoReadError(f"{clip}: animated WebP is not supported; convert it to MP4 or GIF")
        return image is not None and not (animated and image.format == "PNG")  # FFmpeg plays animated PNG


def _load_picture(open_file: OpenFile, clip: str, limits: VideoLimits) -> np.ndarray:
    with open_file() as file, opened_picture(file, clip) as image:
        if image is None:
            raise VideoReadError(f"{clip}: not a picture (or a broken one)")
        return picture_to_rgb(image, clip, limits)


def _open_file_object(file: BinaryIO, limits: VideoLimits, strict: bool, clock: Clock) -> VideoReader:
    if isinstance(file, io.TextIOBase):
        raise VideoReadError("the file object is open in text mode; open it with mode 'rb'")
    if not (hasattr(file, "seek") and getattr(file, "seekable", lambda: True)()):
        data = file.read(limits.max_bytes + 1)
        return _open_file(lambda: io.BytesIO(data), "video stream", len(data), limits, strict, clock)
    size = file.seek(0, io.SEEK_END)
    return _open_file(lambda: nullcontext(file), "video file object", size, limits, strict, clock)


def _open_folder(folder: str, limits: VideoLimits, clock: Clock) -> VideoReader:
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    for entry in entries:
        if not entry.is_file():
            raise VideoReadError(f"{entry.path!r}: a folder of frames may hold picture files only")
    if not entries:
        raise VideoReadError(f"{folder!r}: the folder holds no pictures")
    limits.check("max_frames", len(entries), repr(folder))
    limits.check("max_bytes", sum(entry.stat().st_size for entry in entries), repr(folder))
    paths = sorted((entry.path for entry in entries), key=_natural_order)

    def load(index: int) -> np.ndarray:
        return _load_picture(lambda: _binary(paths[index]), repr(paths[index]), limits)

    return VideoReader(PictureSource([repr(path) for path in paths], load, limits, clock), folder)


def _natural_order(path: str) -> list[str | int]:
    """Sorts frame2 before frame10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", os.path.basename(path))]


def _open_list(frames: Sequence[Any], limits: VideoLimits, clock: Clock, channel_order: str | None) -> VideoReader:
    if not frames:
        raise VideoReadError("the list holds no frames")
    if all(isinstance(frame, Image.Image) for frame in frames):
        names = [f"picture {index} of the list" for index in range(len(frames))]

        def load(index: int) -> np.ndarray:
            return picture_to_rgb(frames[index], names[index], limits)

        return VideoReader(PictureSource(names, load, limits, clock))
    if all(isinstance(frame, np.ndarray | torch.Tensor) for frame in frames):
        return VideoReader(ArraySource(frames, limits, clock, channel_order))
    kinds = ", ".join(sorted({type(frame).__name__ for frame in frames}))
    raise VideoReadError(f"a list of {kinds}: expected frames, all arrays or tensors, or all PIL images, of one clip")
