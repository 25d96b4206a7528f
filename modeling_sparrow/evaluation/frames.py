"""Clips as benchmarks give them: lists of picture files, and sampled frames of a video."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sparrow_processing.errors import VideoReadError
from sparrow_processing.video_io import DEFAULT_LIMITS, VideoReader
from sparrow_processing.video_sources import Clock, PictureSource, opened_picture, picture_to_rgb

from .files import EvaluationError


def open_frames(paths: Sequence[Path]) -> VideoReader:
    """A clip of picture files, decoded one at a time whenever they are asked for.

    Args:
        paths: one file per frame, in order.

    Raises:
        VideoReadError: if a file is absent, broken, or of another size than the first; the message names it.
    """
    if not paths:
        raise VideoReadError("the list of frames is empty")
    names = [str(path) for path in paths]

    def load(index: int) -> np.ndarray:
        try:
            with paths[index].open("rb") as file, opened_picture(file, names[index]) as image:
                if image is None:
                    raise VideoReadError(f"{names[index]}: not a picture (or a broken one)")
                return picture_to_rgb(image, names[index], DEFAULT_LIMITS)
        except OSError as error:
            raise VideoReadError(f"{names[index]}: {error.strerror or error}") from error

    return VideoReader(PictureSource(names, load, DEFAULT_LIMITS, Clock(None, None)), str(paths[0].parent))


def select_frames(video: VideoReader, frame_ids: Sequence[int], size: tuple[int, int]) -> VideoReader:
    """Some frames of a video, resized, as a clip of its own.

    Args:
        video: open.
        frame_ids: increasing numbers of frames of the video.
        size: height and width of the clip in pixels.

    Raises:
        EvaluationError: if the video ends before the last of them.
    """
    if frame_ids[-1] >= len(video):
        raise EvaluationError(f"{video.path}: has {len(video)} frames, frame {frame_ids[-1]} is needed")
    return VideoReader(_SelectedFrames(video, frame_ids, size), video.path)


class _SelectedFrames:
    """A source of frames as [`VideoReader`] takes them."""

    BLOCK = 16  # frames of full size decoded in one pass over the video, and held

    def __init__(self, video: VideoReader, frame_ids: Sequence[int], size: tuple[int, int]) -> None:
        self.video, self.frame_ids = video, np.asarray(frame_ids)
        self.height, self.width = size
        times = video.timestamps[self.frame_ids]
        self.times, self.rate, self.warnings = times - times[0], video.fps, list(video.warnings)

    def pick(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        indices = list(indices)
        for start in range(0, len(indices), self.BLOCK):
            for frame in self.video.read(self.frame_ids[indices[start : start + self.BLOCK]]):
                if frame.shape[:2] != (self.height, self.width):
                    frame = np.asarray(Image.fromarray(frame).resize((self.width, self.height), Image.BILINEAR))
                yield frame
