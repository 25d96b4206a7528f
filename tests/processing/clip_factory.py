"""Small clips for the tests, made on the spot. Every picture carries its own number, so order can be checked."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RED, GREEN, BLUE, WHITE = (230, 20, 20), (20, 200, 20), (20, 20, 230), (240, 240, 240)


def numbered_picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """(H, W, 3) uint8: red, green, blue and white corners, and `number` in the middle row as 8 black or white bits."""
    picture = np.empty((height, width, 3), dtype=np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, WHITE
    for bit in range(8):
        columns = slice(bit * width // 8, (bit + 1) * width // 8)
        picture[height // 3 : 2 * height // 3, columns] = 255 * (number >> bit & 1)
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number in a picture made by `numbered_picture`, possibly compressed since."""
    height, width = picture.shape[:2]
    bits = [picture[height // 2, (2 * bit + 1) * width // 16].mean() > 128 for bit in range(8)]
    return sum(1 << bit for bit, is_set in enumerate(bits) if is_set)


def corner_colors(picture: np.ndarray) -> list[tuple[int, int, int]]:
    """The nearest of the four corner colours at top left, top right, bottom left and bottom right."""
    colors = np.array([RED, GREEN, BLUE, WHITE])
    height, width = picture.shape[:2]
    spots = [(y, x) for y in (height // 8, -height // 8) for x in (width // 8, -width // 8)]
    nearest = [int(np.abs(colors - picture[spot].astype(int)).sum(axis=1).argmin()) for spot in spots]
    return [tuple(colors[index].tolist()) for index in nearest]


@contextmanager
def same_scheduling() -> Iterator[None]:
    """SVT-AV1, run by root, puts the thread that calls it under real-time scheduling: whatever that starts later, such
    as a browser, would keep all else from running."""
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@same_scheduling()
def write_clip(
    path: str | Path,
    count: int = 12,
    width: int = 64,
    height: int = 48,
    *,
    codec: str = "libx264",
    container: str | None = None,
    pix_fmt: str = "yuv420p",
    rate: int = 25,
    milliseconds: list[int] | None = None,
    rotation: int | None = None,
    gop: int = 5,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    with_audio: bool = False,
) -> Path:
    """Encodes `count` numbered pictures. `milliseconds` gives each its time, else they follow at `rate` per second."""
    options = {"g": str(gop)} | ({"crf": "8", "preset": "veryfast"} if codec == "libx264" else {})
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options | (codec_options or {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = output.add_stream("aac", rate=16_000, layout="mono") if with_audio else None
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number, width, height), format="rgb24")
            if milliseconds is not None:
                frame.pts, frame.time_base = milliseconds[number], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound is not None:
            write_silence(output, sound)
    return Path(path)


def write_silence(output: av.container.OutputContainer, stream: av.AudioStream, blocks: int = 8) -> None:
    for block in range(blocks):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16_000, block * 1024
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def write_sound_only(path: str | Path) -> Path:
    with av.open(str(path), "w", format="mp4") as output:
        write_silence(output, output.add_stream("aac", rate=16_000, layout="mono"))
    return Path(path)


def damaged(data: bytes, start: float = 0.5, length: int = 60) -> bytes:
    """`data` with some bytes flipped in the middle."""
    changed = bytearray(data)
    first = int(len(data) * start)
    for place in range(first, first + length):
        changed[place] ^= 0x55
    return bytes(changed)
