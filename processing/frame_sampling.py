"""Which frames of a clip the language model sees."""

import numpy as np

# Containers round times (WebM to 1 ms). A frame this close to its place in an even rhythm, measured in mean frame
# intervals, counts as lying exactly there.
SNAP_TOLERANCE = 0.1


def sample_frame_indices(timestamps: np.ndarray, count: int) -> np.ndarray:
    """Spreads `count` frames evenly over the time of a clip.

    Targets are `count` evenly spaced moments from the first frame to the last; each takes the last frame that has
    begun by then. At a constant frame rate this is the rule of the released SPARROW code,
    `linspace(0, T - 1, count).astype(int)`. At a variable rate a frame that stays on screen for long can be taken
    more than once.

    Args:
        timestamps: (T,) strictly increasing seconds.
        count: frames wanted.

    Returns:
        int64 (count,), not decreasing; each of the T frames once if T <= count.

    Raises:
        ValueError: no timestamps, or count < 1.
    """
    times = np.asarray(timestamps, dtype=np.float64)
    if times.ndim != 1 or times.size == 0:
        raise ValueError(f"timestamps of shape {times.shape}: expected (T,) with T >= 1")
    if count < 1:
        raise ValueError(f"count = {count}: expected at least 1 frame")
    last = times.size - 1
    if times.size <= count:
        return np.arange(times.size)
    # Time in mean frame intervals: frame i of an even rhythm lies at exactly i, so that rounding noise cannot push a
    # frame behind its own target.
    places = (times - times[0]) / (times[-1] - times[0]) * last
    nearest = np.rint(places)
    places = np.where(np.abs(places - nearest) < SNAP_TOLERANCE, nearest, places)
    return np.searchsorted(places, np.linspace(0, last, count), side="right") - 1


def pad_to_multiple(indices: np.ndarray, multiple: int) -> np.ndarray:
    """Repeats the last index until the length is a multiple of `multiple`, as the temporal tower takes whole chunks.

    A single frame is a still picture and stays single.

    Args:
        indices: int64 (n,), n >= 1.
        multiple: length of a chunk in frames.
    """
    missing = 0 if len(indices) == 1 else -len(indices) % multiple
    return np.concatenate([indices, np.repeat(indices[-1:], missing)])
