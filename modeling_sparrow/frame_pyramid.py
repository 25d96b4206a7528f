"""SAM2 features of frames, and the two ways to walk through them: a streamed video and a training batch.

One frame is encoded once; region proposer, filtration head and mask tracker share what comes out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass
class FramePyramid:
    """SAM2 features of `F` frames, shared by region proposer, filtration head and mask decoder.

    Args:
        levels: `(F, C/8, S/4, S/4)`, `(F, C/4, S/8, S/8)`, `(F, C, S/16, S/16)`; the first two are already projected
            for the mask decoder.
        position: `(1, C, S/16, S/16)` position code of the last level.
    """

    levels: tuple[torch.Tensor, ...]
    position: torch.Tensor

    def __len__(self) -> int:
        return len(self.levels[0])

    def __getitem__(self, frames: slice | list[int]) -> "FramePyramid":
        return FramePyramid(tuple(level[frames] for level in self.levels), self.position)

    def float(self) -> "FramePyramid":
        return FramePyramid(tuple(level.float() for level in self.levels), self.position.float())

    @staticmethod
    def cat(pyramids: list["FramePyramid"]) -> "FramePyramid":
        levels = tuple(torch.cat(level) for level in zip(*(pyramid.levels for pyramid in pyramids), strict=True))
        return FramePyramid(levels, pyramids[0].position)


class FrameStream(Protocol):
    """A video of any length as the tracker reads it: frames `(3, S, S)` ready for SAM2, decoded when asked for."""

    def __len__(self) -> int: ...

    def read(self, indices: list[int]) -> torch.Tensor:
        """Some frames, `(n, 3, S, S)`."""

    def frames(self, start: int = 0) -> Iterator[torch.Tensor]:
        """Frames `start`, `start + 1`, … one by one."""

    def frames_reversed(self, start: int) -> Iterator[torch.Tensor]:
        """Frames `start`, `start - 1`, … 0 one by one."""


class TensorFrames:
    """A clip held in memory, `(T, 3, S, S)`, as a [`FrameStream`]."""

    def __init__(self, pixel_values: torch.Tensor):
        self.pixel_values = pixel_values

    def __len__(self) -> int:
        return len(self.pixel_values)

    def read(self, indices: list[int]) -> torch.Tensor:
        return self.pixel_values[indices]

    def frames(self, start: int = 0) -> Iterator[torch.Tensor]:
        return iter(self.pixel_values[start:])

    def frames_reversed(self, start: int) -> Iterator[torch.Tensor]:
        return iter(self.pixel_values[: start + 1].flip(0))


class VideoPyramids:
    """Pyramids of the frames of one video, each encoded once as far as the bounded cache reaches.

    Args:
        encode: frames `(n, 3, S, S)` to their pyramid.
        frames: the video.
        batch_size: frames encoded at once on a walk.
        max_cached: pyramids kept.
    """

    def __init__(
        self,
        encode: Callable[[torch.Tensor], FramePyramid],
        frames: FrameStream | torch.Tensor,
        batch_size: int,
        max_cached: int,
    ):
        self.encode, self.batch_size, self.max_cached = encode, batch_size, max_cached
        self.frames = TensorFrames(frames) if isinstance(frames, torch.Tensor) else frames
        self.cache: dict[int, FramePyramid] = {}

    def __len__(self) -> int:
        return len(self.frames)

    def at(self, index: int) -> FramePyramid:
        """Pyramid of one frame (`F` = 1); stays in the cache."""
        if index not in self.cache:
            self._store(index, self.encode(self.frames.read([index])))
        return self.cache[index]

    def walk(
        self, start: int, reverse: bool = False, keep_from: int | None = None
    ) -> Iterator[tuple[int, FramePyramid]]:
        """(frame index, its pyramid) from `start` to the end of the video, or back to its beginning.

        Args:
            keep_from: frames from this index on will be needed again and are kept in the cache.
        """
        indices = range(start, -1, -1) if reverse else range(start, len(self))
        stream = self.frames.frames_reversed(start) if reverse else self.frames.frames(start)
        waiting: list[tuple[int, torch.Tensor]] = []
        for index, frame in zip(indices, stream, strict=True):
            waiting.append((index, frame))
            if len(waiting) == self.batch_size:
                yield from self._flush(waiting, keep_from)
                waiting = []
        yield from self._flush(waiting, keep_from)

    def _flush(
        self, waiting: list[tuple[int, torch.Tensor]], keep_from: int | None
    ) -> Iterator[tuple[int, FramePyramid]]:
        new = [(index, frame) for index, frame in waiting if index not in self.cache]
        encoded = {}
        if new:
            batch = self.encode(torch.stack([frame for _, frame in new]))
            encoded = {index: batch[row : row + 1] for row, (index, _) in enumerate(new)}
        for index, _ in waiting:
            pyramid = encoded[index] if index in encoded else self.cache.pop(index)
            if keep_from is not None and index >= keep_from:
                self._store(index, pyramid)
            yield index, pyramid

    def _store(self, index: int, pyramid: FramePyramid):
        while len(self.cache) >= self.max_cached:
            del self.cache[next(iter(self.cache))]
        self.cache[index] = pyramid


class ClipPyramids:
    """Pyramids of a training batch: `V` clips of `T` frames, one row per object.

    Args:
        pyramid: of `V * T` frames, clip by clip.
        num_frames: `T`.
        clips: for each object, its clip.
    """

    def __init__(self, pyramid: FramePyramid, num_frames: int, clips: torch.Tensor):
        self.pyramid, self.num_frames, self.clips = pyramid, num_frames, clips

    def __len__(self) -> int:
        return self.num_frames

    def walk(
        self, start: int, reverse: bool = False, keep_from: int | None = None
    ) -> Iterator[tuple[int, FramePyramid]]:
        for index in range(start, -1, -1) if reverse else range(start, self.num_frames):
            yield index, self.pyramid[self.clips * self.num_frames + index]
