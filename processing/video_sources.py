"""Where frames come from: a video file, separate pictures, or arrays, behind one small interface.

Every source has `width` and `height` (pixels of the upright picture), `times` (float64 (T,), seconds from 0), `rate`
(frames per second that the source states, used where T = 1 leaves it open), `warnings` (list of sentences), and
`pick(indices)`, which yields the frames at increasing `indices` as (H, W, 3) uint8 RGB without keeping any of them.
Creating a source reads the whole clip once, so errors show up there and not half-way through a run.
"""

import io
import math
import re
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

import av
import av.logging
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image, ImageOps

from .errors import LimitExceededError, VideoReadError

DEFAULT_FPS = 25.0

# FFmpeg demuxers by name: only containers that hold their frames themselves. Playlists (hls, dash, concat, sdp) and
# numbered picture patterns (image2) are absent because they make FFmpeg open further files or addresses.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,ivf,obu,av1,h264,hevc,m4v,nut,mxf,dv,yuv4mpegpipe,"
    "aac,flac,mp3,wav"  # sound only: accepted so that the error can say so
)
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM")

READ_BUFFER_BYTES = 1 << 18
# Broken containers can answer every read with an error; a healthy one recovers at the next packet or two.
MAX_READ_ERRORS_IN_A_ROW = 8
# H.264 and HEVC reorder at most 16 frames, so times further out of order than that are not a reordering.
MAX_REORDERED_FRAMES = 16
# Resizing with a cubic filter overshoots the range of float pictures a little; values beyond this are another range.
FLOAT_TOLERANCE = 1e-3
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # what PIL raises on broken pictures

OpenFile = Callable[[], AbstractContextManager[BinaryIO]]


@dataclass(frozen=True)
class VideoLimits:
    """What a clip may cost to read.

    Attributes:
        max_bytes: size of the file, or of all pictures of a folder together.
        max_frames: frames in the clip.
        max_side: width or height of a frame in pixels.
        max_frame_pixels: width × height of a frame.
        max_total_pixels: width × height summed over all frames; stops small files that unpack to huge clips.
        max_decode_seconds: wall time of the pass over the whole clip that opening it takes.
    """

    max_bytes: int = 2_000_000_000
    max_frames: int = 36_000
    max_side: int = 8_192
    max_frame_pixels: int = 8_192 * 4_096
    max_total_pixels: int = 100_000_000_000
    max_decode_seconds: float = 600.0

    def check(self, limit: str, value: float, clip: str) -> None:
        """Raises LimitExceededError if `value` is above the limit called `limit`."""
        allowed = getattr(self, limit)
        if value > allowed:
            raise LimitExceededError(
                f"{clip}: {value:.10g} is above the limit {limit} = {allowed:.10g}; "
                f"to allow it pass limits=VideoLimits({limit}=...)"
            )

    def check_picture(self, width: int, height: int, clip: str) -> None:
        """Raises LimitExceededError if a frame of width × height pixels is too large."""
        self.check("max_side", max(width, height), clip)
        self.check("max_frame_pixels", width * height, clip)


class _Budget:
    """Adds up what the first pass over a clip has cost and stops it at the first limit crossed."""

    def __init__(self, limits: VideoLimits, clip: str):
        self.limits, self.clip = limits, clip
        self.frames = self.pixels = 0
        self.start = time.monotonic()

    def add_frame(self, width: int, height: int) -> None:
        self.frames += 1
        self.pixels += width * height
        self.limits.check_picture(width, height, self.clip)
        self.limits.check("max_frames", self.frames, self.clip)
        self.limits.check("max_total_pixels", self.pixels, self.clip)
        self.check_time()

    def check_time(self) -> None:
        self.limits.check("max_decode_seconds", time.monotonic() - self.start, self.clip)


# --------------------------------------------------------------------------------------------------------------------
# Video files
# --------------------------------------------------------------------------------------------------------------------


class _ByteStream:
    """The three calls FFmpeg needs of a file, at a position of its own.

    Several passes can so share one file object, and FFmpeg sees no file name: only the content decides the format.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._position = file, 0

    def read(self, count: int) -> bytes:
        self._file.seek(self._position)
        data = self._file.read(count)[:count]
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset += self._position
        elif whence == io.SEEK_END:
            offset += self._file.seek(0, io.SEEK_END)
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position


@dataclass
class _Scan:
    """What one complete pass over a video file has found."""

    pts: list[int | None] = field(default_factory=list)
    keyframes: list[int] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    resized: list[int] = field(default_factory=list)
    packets: int = 0
    lost_before: list[int] = field(default_factory=list)
    ended_early: str | None = None
    first_error: Exception | None = None
    last_duration: int = 0

    @property
    def clean(self) -> bool:
        return not (self.damaged or self.lost_before or self.ended_early)

    def note_loss(self, error: Exception) -> None:
        self.lost_before.append(len(self.pts))
        self.first_error = self.first_error or error


class FileSource:
    """A video file decoded by FFmpeg, one frame at a time.

    Args:
        open_file: returns the file as a new binary stream in a context manager.
        clip: how to call the clip in messages.
        limits: see VideoLimits.
        strict: raise on damaged or missing data instead of going on with a warning.

    Raises:
        VideoReadError: no readable video stream, or damage while `strict`.
        LimitExceededError: a limit was crossed; reading stopped there.
    """

    def __init__(self, open_file: OpenFile, clip: str, limits: VideoLimits, strict: bool):
        self._open_file, self._clip, self._limits = open_file, clip, limits
        self.warnings: list[str] = []
        self._threads = "AUTO"
        scan = self._scan()
        if not scan.clean or scan.packets != len(scan.pts):
            # Where a threaded decoder meets damage, which frames it gives depends on timing and it may drop good ones
            # at the end. One thread always gives the same frames, so every later pass agrees with this scan.
            self._threads = "NONE"
            scan = self._scan()
        if not scan.pts:
            reason = _reason(scan.first_error) if scan.first_error else "it holds no frames"
            raise VideoReadError(f"{clip}: not one frame could be decoded: {reason}") from scan.first_error
        self._note_damage(scan, strict)
        self.times, problem = usable_times(scan.pts, self._time_base, self.rate)
        if problem:
            self.warnings.append(problem)
        # Seeking finds frames by their pts; where that cannot be relied on, every pass starts at the first frame.
        seekable = scan.clean and problem is None
        self._pts = np.array(scan.pts if seekable else [], dtype=np.int64)
        self._keyframes = np.array(scan.keyframes if seekable else [], dtype=np.int64)

    @contextmanager
    def _opened(self) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
        options = {
            "format_whitelist": CONTAINERS,
            "protocol_whitelist": "file",
            "max_pixels": str(self._limits.max_frame_pixels),
        }
        with self._open_file() as file:
            try:
                container = av.open(
                    _ByteStream(file), options=options, buffer_size=READ_BUFFER_BYTES, metadata_errors="replace"
                )
            except av.error.ArgumentError as error:
                raise VideoReadError(
                    f"{self._clip}: neither a whole picture nor an accepted video container; playlists and other "
                    "formats that can open further files are refused. Convert the clip to MP4, MKV or WebM"
                ) from error
            except (av.FFmpegError, OSError) as error:
                raise VideoReadError(f"{self._clip}: not a video FFmpeg can read: {_reason(error)}") from error
            with container:
                stream = self._video_stream(container)
                stream.thread_type = self._threads
                stream.codec_context.options = {"max_pixels": str(self._limits.max_frame_pixels)}
                yield container, stream

    def _video_stream(self, container: av.container.InputContainer) -> av.VideoStream:
        # A cover picture inside a sound file is no video.
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not videos:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise VideoReadError(f"{self._clip}: no video stream (the file holds {kinds})")
        stream = videos[0]
        if stream.codec_context is None:
            raise VideoReadError(f"{self._clip}: this FFmpeg has no decoder for the codec {_codec_name(container)}")
        return stream

    def _scan(self) -> _Scan:
        scan, budget = _Scan(), _Budget(self._limits, self._clip)
        with self._opened() as (container, stream):
            context = stream.codec_context
            self._limits.check_picture(context.width, context.height, self._clip)
            self._limits.check("max_frames", stream.frames, self._clip)
            self.rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
            self._time_base = stream.time_base
            self._header_frames = stream.frames
            self._header_seconds = _stated_seconds(container, stream)
            for index, frame in enumerate(_decode(container, stream, scan, budget.check_time)):
                budget.add_frame(frame.width, frame.height)
                if index == 0:
                    self._coded_size = frame.width, frame.height
                    self._quarter_turns = round(frame.rotation / 90) % 4
                if (frame.width, frame.height) != self._coded_size:
                    scan.resized.append(index)
                if frame.is_corrupt:
                    scan.damaged.append(index)
                # An I picture that the decoder also calls a key frame: decoding can start there without a trace of
                # what came before, which is not so for a gradual intra refresh.
                if frame.key_frame and frame.pict_type == av.video.frame.PictureType.I:
                    scan.keyframes.append(index)
                scan.pts.append(frame.pts)
                scan.last_duration = frame.duration or 0
        if scan.pts:
            width, height = self._coded_size
            self.width, self.height = (height, width) if self._quarter_turns % 2 else (width, height)
        return scan

    def _note_damage(self, scan: _Scan, strict: bool) -> None:
        """Turns what the scan found into sentences; raises VideoReadError if `strict` and data is damaged."""
        count = len(scan.pts)
        missing_seconds = self._missing_seconds(scan)
        if scan.ended_early is None and missing_seconds:
            scan.ended_early = f"{missing_seconds:.3g} s less than the header states"
        damage = []
        if scan.ended_early:
            damage.append(f"the file ended early at frame {count}: {scan.ended_early}")
        if scan.damaged:
            damage.append(f"damaged frames, shown as far as they decode: {_listed(scan.damaged)}")
        if scan.lost_before:
            places = _listed(scan.lost_before)
            damage.append(f"data that could not be decoded, before frames {places}: {_reason(scan.first_error)}")
        if strict and damage:
            raise VideoReadError(f"{self._clip}: {'; '.join(damage)} (strict=True)") from scan.first_error
        self.warnings += damage
        if self._header_frames and self._header_frames != count:
            self.warnings.append(f"the header states {self._header_frames} frames, {count} were decoded")
        if scan.resized:
            self.warnings.append(f"the picture size changes at frame {scan.resized[0]}; scaled to the first size")

    def _missing_seconds(self, scan: _Scan) -> float:
        """How much shorter the decoded clip is than its header states; 0 where it is not, or cannot be known."""
        known = [pts for pts in (scan.pts[0], scan.pts[-1]) if pts is not None]
        if len(known) < 2 or self._header_seconds is None or self._header_frames:
            return 0.0
        frame_seconds = max(float(scan.last_duration * self._time_base), 1 / self.rate)
        missing = self._header_seconds - float((known[1] - known[0]) * self._time_base) - frame_seconds
        # Containers round, and some count a start offset of a few frames.
        return missing if missing > max(0.25, 4 * frame_seconds) else 0.0

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        numbered, position = self._decode_from(0), -1
        try:
            for index in indices:
                starts = self._starting_points(index)
                if starts[0] > position + 1:  # a place to start nearer than the frame that comes next
                    numbered.close()
                    numbered = self._decode_from(starts[0])
                found = _first_from(numbered, index)
                for start in starts[1:]:
                    if found is not None and found[0] == index:
                        break
                    # The container has led to a place behind the key frame, as MPEG-TS does: start further ahead.
                    numbered.close()
                    numbered = self._decode_from(start)
                    found = _first_from(numbered, index)
                if found is None or found[0] != index:
                    raise VideoReadError(f"{self._clip}: frame {index} is gone; the file has changed while in use")
                position = index
                yield self._to_rgb(found[1])
        finally:
            numbered.close()

    def _starting_points(self, index: int) -> list[int]:
        """Frames to decode from in order to reach `index`: the key frame before it, the one before that, the first."""
        place = int(np.searchsorted(self._keyframes, index, side="right"))
        nearest = self._keyframes[max(place - 2, 0) : place][::-1].tolist()
        return nearest if 0 in nearest else [*nearest, 0]

    def _decode_from(self, keyframe: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields (index, frame) from frame number `keyframe` on, decoded and not yet converted."""
        with self._opened() as (container, stream):
            if keyframe == 0:
                yield from enumerate(_decode(container, stream))
                return
            try:
                container.seek(int(self._pts[keyframe]), stream=stream)
            except av.FFmpegError:
                return  # not seekable: pick() starts over at the first frame
            started = False
            for frame in _decode(container, stream):
                index = int(np.searchsorted(self._pts, frame.pts)) if frame.pts is not None else len(self._pts)
                if index == len(self._pts) or self._pts[index] != frame.pts:
                    continue  # a leading picture of the seek point that a pass from the start does not show
                started = started or index in self._keyframes
                if started:
                    yield index, frame

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = self._coded_size
        transparent = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
        try:
            picture = frame.to_ndarray(format="rgba" if transparent else "rgb24", width=width, height=height)
        except (av.FFmpegError, ValueError) as error:
            raise VideoReadError(f"{self._clip}: pixel format {frame.format.name} has no conversion to RGB") from error
        if transparent:
            picture = on_black(picture)
        return np.ascontiguousarray(np.rot90(picture, self._quarter_turns))


def _decode(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    scan: _Scan | None = None,
    each_packet: Callable[[], None] = lambda: None,
) -> Iterator[av.VideoFrame]:
    """All frames from the container's position on, in order of display; what cannot be decoded is left out.

    Args:
        scan: receives the count of packets and what was left out.
        each_packet: called before every packet; may raise to stop.
    """
    scan = scan or _Scan()
    packets, errors_in_a_row, cut_off = container.demux(stream), 0, False
    while True:
        each_packet()
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as error:
            scan.note_loss(error)
            errors_in_a_row += 1
            if errors_in_a_row > MAX_READ_ERRORS_IN_A_ROW:
                scan.ended_early = _reason(error)
                return
            packets = container.demux(stream)  # an error ends PyAV's iterator, not the file
            continue
        if packet is None:
            return
        errors_in_a_row = 0
        if packet.size:
            scan.packets += 1
            cut_off = packet.is_corrupt
        elif cut_off:  # the empty packet at the end, which makes the decoder give its last frames
            scan.ended_early = "its last packet is cut off"
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            scan.note_loss(error)
            continue
        yield from frames


def _codec_name(container: av.container.InputContainer) -> str:
    """Name and FourCC of the video codec, from FFmpeg's description: PyAV only names codecs that it can decode."""
    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        description = container.dumps_format()
    finally:
        av.logging.set_level(level)
    name = re.search(r"Video: (\w+( \([^)]*\))?)", description)
    return name[1] if name else "of an unknown name"


def _first_from(numbered: Iterator[tuple[int, av.VideoFrame]], index: int) -> tuple[int, av.VideoFrame] | None:
    """The first (number, frame) whose number is at least `index`."""
    return next((pair for pair in numbered if pair[0] >= index), None)


def _stated_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """Duration of the video stream as the header has it, in seconds, if it says."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", "").strip())  # Matroska
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def usable_times(pts: list[int | None], time_base: Fraction, rate: float) -> tuple[np.ndarray, str | None]:
    """Frame times that strictly increase from 0, whatever the file says.

    Args:
        pts: presentation times in units of `time_base`, in order of display; None where the file gives none.
        rate: frames per second, used where no interval between two frames is known.

    Returns:
        float64 (T,) seconds, and a sentence about what had to be repaired, or None.
    """
    first = next((value for value in pts if value is not None), 0)
    ticks = np.array([np.nan if value is None else value - first for value in pts], dtype=np.float64)
    times = ticks * time_base.numerator / time_base.denominator
    intervals = np.diff(times)
    if np.isfinite(times).all() and (intervals > 0).all():
        return times, None
    order = np.argsort(times)
    distinct = np.isfinite(times).all() and (np.diff(times[order]) > 0).all()
    if distinct and np.abs(order - np.arange(len(order))).max() <= MAX_REORDERED_FRAMES:
        # All times are there, swapped between neighbours, as in AVI files with B-frames.
        return times[order] - times[order[0]], "frame times were out of order and have been sorted"
    sound = intervals > 0  # False for NaN
    usual = float(np.median(intervals[sound])) if sound.any() else 1 / rate
    times = np.concatenate([[0.0], np.cumsum(np.where(sound, intervals, usual))])
    return times, f"{int((~sound).sum())} frames had no usable time; they follow at intervals of {usual:.4g} s"


def _reason(error: Exception) -> str:
    """FFmpeg's sentence without its error number."""
    return getattr(error, "strerror", None) or str(error)


def _listed(indices: list[int], shown: int = 20) -> str:
    more = f" and {len(indices) - shown} more" if len(indices) > shown else ""
    return ", ".join(map(str, indices[:shown])) + more


# --------------------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------------------


def on_black(rgba: np.ndarray) -> np.ndarray:
    """Composites (H, W, 4) uint8 RGBA with straight alpha on black, giving (H, W, 3) uint8."""
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    return ((colour * alpha + 127) // 255).astype(np.uint8)


@contextmanager
def opened_picture(file: BinaryIO, clip: str) -> Iterator[Image.Image | None]:
    """Opens a still picture by its content, without reading its pixels; None if the content is something else.

    Raises:
        LimitExceededError: PIL takes the picture for a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=PICTURE_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise LimitExceededError(f"{clip}: above PIL's own limit PIL.Image.MAX_IMAGE_PIXELS: {error}") from error
    except PICTURE_ERRORS:
        yield None
        return
    with image:
        yield image


def picture_to_rgb(image: Image.Image, clip: str, limits: VideoLimits) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a PIL picture: upright by its EXIF tag, alpha on black, 16-bit gray scaled to 8 bits.

    Raises:
        VideoReadError: the picture is broken, or its pixel type has no fixed range.
        LimitExceededError: it is too large; checked before the pixels are read.
    """
    limits.check_picture(*image.size, clip)
    if image.mode in ("I", "F"):
        raise VideoReadError(f"{clip}: pixel type {image.mode!r} has no fixed range; convert the picture to 8-bit RGB")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if image.has_transparency_data:
            return on_black(np.asarray(image.convert("RGBA")))
        return np.array(image.convert("RGB"))
    except PICTURE_ERRORS as error:
        raise VideoReadError(f"{clip}: broken picture: {error}") from error


class Clock:
    """Frame times for a source that has none of its own: a constant rate, or one time per frame.

    Args:
        fps: frames per second; 25 if neither argument is given.
        timestamps: (T,) strictly increasing seconds; shifted so that the first is 0.
    """

    def __init__(self, fps: float | None = None, timestamps: Sequence[float] | None = None):
        if fps is not None and timestamps is not None:
            raise VideoReadError("fps and timestamps both given: pass one of them")
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise VideoReadError(f"fps = {fps}: expected a positive number")
        self.is_given = fps is not None or timestamps is not None
        self.rate = DEFAULT_FPS if fps is None else float(fps)
        self._timestamps = timestamps

    def times(self, count: int) -> np.ndarray:
        """float64 (count,) seconds from 0."""
        if self._timestamps is None:
            return np.arange(count) / self.rate
        times = np.asarray(self._timestamps, dtype=np.float64)
        if times.shape != (count,):
            raise VideoReadError(f"timestamps of shape {times.shape} for {count} frames: expected one per frame")
        if not (np.isfinite(times).all() and (np.diff(times) > 0).all()):
            raise VideoReadError("timestamps must be finite and strictly increasing seconds")
        return times - times[0]


class PictureSource:
    """Separate pictures of one size, each decoded when it is asked for.

    Args:
        names: how to call each picture in messages (T,).
        load: gives picture number `index` as (H, W, 3) uint8 RGB.
    """

    def __init__(self, names: Sequence[str], load: Callable[[int], np.ndarray], limits: VideoLimits, clock: Clock):
        self._load = load
        self.width, self.height = _scan_pictures(names, load, limits)
        self.times, self.rate, self.warnings = clock.times(len(names)), clock.rate, []

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        return map(self._load, indices)


def _scan_pictures(names: Sequence[str], load: Callable[[int], np.ndarray], limits: VideoLimits) -> tuple[int, int]:
    """Loads every picture once and returns their common (width, height); raises VideoReadError if they differ."""
    budget, common = _Budget(limits, names[0]), None
    for index, name in enumerate(names):
        height, width = load(index).shape[:2]
        common = common or (width, height)
        if (width, height) != common:
            raise VideoReadError(
                f"{name}: {width}×{height} pixels, but the first frame has {common[0]}×{common[1]}; "
                "all frames of a clip need one size"
            )
        budget.add_frame(width, height)
    return common


# --------------------------------------------------------------------------------------------------------------------
# Arrays
# --------------------------------------------------------------------------------------------------------------------


class ArraySource:
    """Frames in memory: one array or tensor with four axes, or a list of them with three.

    Args:
        frames: (T, H, W, 3) or (T, 3, H, W) RGB, uint8 or float 0..1, or a list of T such frames. Not copied.
        channel_order: "channels_last" or "channels_first"; None finds it by the axis of length 3.

    Raises:
        VideoReadError: wrong dtype, range, layout or size; NaN; no frames.
    """

    def __init__(
        self,
        frames: np.ndarray | torch.Tensor | Sequence[np.ndarray | torch.Tensor],
        limits: VideoLimits,
        clock: Clock,
        channel_order: str | None,
    ):
        if isinstance(frames, np.ndarray | torch.Tensor) and frames.ndim != 4:
            raise VideoReadError(
                f"an array of shape {tuple(frames.shape)}: expected four axes, (T, H, W, 3) or (T, 3, H, W); "
                "pass one RGB picture as picture[None]"
            )
        if len(frames) == 0:
            raise VideoReadError("the array holds no frames")
        self._frames = frames
        self._channels_first = _is_channels_first(tuple(frames[0].shape), channel_order)
        names = [f"frame {index} of the array" for index in range(len(frames))]
        self.width, self.height = _scan_pictures(names, self._frame, limits)
        self.times, self.rate, self.warnings = clock.times(len(names)), clock.rate, []

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        return map(self._frame, indices)

    def _frame(self, index: int) -> np.ndarray:
        frame = self._frames[index]
        if isinstance(frame, torch.Tensor):
            frame = frame.detach().cpu()
            frame = frame.float().numpy() if frame.is_floating_point() else frame.numpy()
        if frame.ndim != 3 or 0 in frame.shape:
            raise VideoReadError(f"frame {index}: expected (H, W, 3) or (3, H, W), got shape {frame.shape}")
        if self._channels_first:
            frame = frame.transpose(1, 2, 0)
        if frame.shape[2] != 3:
            raise VideoReadError(f"frame {index}: expected 3 channels like the first frame, got {frame.shape[2]}")
        if frame.dtype == np.uint8:
            return np.array(frame, order="C")
        if not np.issubdtype(frame.dtype, np.floating):
            raise VideoReadError(f"frame {index}: dtype {frame.dtype}; expected uint8 0..255 or float 0..1")
        low, high = float(frame.min()), float(frame.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise VideoReadError(f"frame {index}: NaN or infinite values")
        if low < -FLOAT_TOLERANCE or high > 1 + FLOAT_TOLERANCE:
            raise VideoReadError(
                f"frame {index}: float values {low:.4g}..{high:.4g}, expected 0..1; "
                "pass 0..255 pictures as uint8, and undo any normalisation"
            )
        return np.rint(np.clip(frame.astype(np.float32), 0, 1) * 255).astype(np.uint8)


def _is_channels_first(shape: tuple[int, ...], channel_order: str | None) -> bool:
    """Whether a frame of this shape is (3, H, W) rather than (H, W, 3)."""
    if len(shape) != 3 or 3 not in (shape[0], shape[2]):
        raise VideoReadError(f"frames of shape {shape}: expected (H, W, 3) or (3, H, W) each")
    if channel_order is not None:
        return channel_order == "channels_first"
    if shape[0] == shape[2]:
        raise VideoReadError(
            f"frames of shape {shape} can be read two ways; pass channel_order='channels_last' or 'channels_first'"
        )
    return shape[0] == 3
