"""How fast J and F are: ours against a plain implementation of the same definitions, in one run, on the same masks.

The plain reference works as the official code does, pair by pair on whole frames: contours from shifted copies,
dilation of both contours by the full disk, counts of what overlaps. The official code dilates with OpenCV; the
reference ORs one shifted copy for each of the disk's pixels, in NumPy. Both give the same numbers, which the
benchmark checks.
"""

import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .davis import score_davis
from .files import write_label_map
from .region_similarity import boundary_radius, pairwise_region_and_boundary, region_and_boundary

FRAME_SIZE = (480, 854)
NUM_PROPOSALS, NUM_OBJECTS = 20, 2
#: Frames of the two videos whose peak memory is compared.
SHORT_VIDEO, LONG_VIDEO = 8, 64


@dataclass(frozen=True)
class MetricTiming:
    """Processor time of one operation, in seconds, ours and the reference's."""

    name: str
    ours: float
    reference: float

    @property
    def speedup(self) -> float:
        return self.reference / self.ours


@dataclass(frozen=True)
class MetricBenchmark:
    """Results of [`benchmark_metrics`].

    Attributes:
        timings: one mask pair, and one frame with 20 proposals and 2 objects.
        short_peak: peak memory of scoring a video of 8 frames, in bytes.
        long_peak: the same for 64 frames.
    """

    timings: list[MetricTiming]
    short_peak: int
    long_peak: int

    def to_markdown(self) -> str:
        lines = ["| operation (480 x 854, one core) | ours | plain reference | speed-up |", "|---|---|---|---|"]
        for timing in self.timings:
            ours, reference = f"{1 / timing.ours:.0f} /s", f"{1 / timing.reference:.1f} /s"
            lines.append(f"| {timing.name} | {ours} | {reference} | {timing.speedup:.1f} x |")
        peaks = {SHORT_VIDEO: self.short_peak, LONG_VIDEO: self.long_peak}
        memory = ", ".join(f"{peak / 2**20:.1f} MiB for {length} frames" for length, peak in peaks.items())
        return "\n".join([*lines, "", f"Peak memory of scoring one video: {memory}."])


def benchmark_metrics(num_frames: int = 8, repeats: int = 3, seed: int = 0) -> MetricBenchmark:
    """Times ours and the reference on the same generated masks, and measures memory.

    Args:
        num_frames: different frames to time each operation on.
        repeats: rounds, of which the fastest counts; ours and the reference take turns.
        seed: of the masks.

    Raises:
        RuntimeError: if ours and the reference differ.
    """
    generator = np.random.default_rng(seed)
    frames = [_make_frame(generator) for _ in range(num_frames)]
    pairs = [(proposals == 1, objects == 1) for proposals, objects in frames]
    few = frames[: max(num_frames // 4, 1)]  # the reference takes most of a second for one of them
    pair_timing = _compare(
        "J and F of one mask pair",
        lambda: [region_and_boundary(*pair) for pair in pairs],
        lambda: [reference_region_and_boundary(*pair) for pair in pairs],
        num_frames,
        repeats,
    )
    table_timing = _compare(
        f"frame with {NUM_PROPOSALS} proposals and {NUM_OBJECTS} objects",
        lambda: [pairwise_region_and_boundary(*frame, NUM_PROPOSALS, NUM_OBJECTS) for frame in few],
        lambda: [_reference_table(*frame) for frame in few],
        len(few),
        repeats,
    )
    peaks = [_peak_memory(frames, length) for length in (SHORT_VIDEO, LONG_VIDEO)]
    return MetricBenchmark([pair_timing, table_timing], *peaks)


def reference_region_and_boundary(prediction: np.ndarray, ground_truth: np.ndarray) -> tuple[float, float]:
    """Plain J and F of one pair of `(H, W)` bool masks; see [`region_similarity`] for the definitions."""
    union = np.sum(prediction | ground_truth)
    region = np.sum(prediction & ground_truth) / union if union else 1.0
    contours = _reference_contour(prediction), _reference_contour(ground_truth)
    radius = boundary_radius(*prediction.shape)
    zones = [_reference_dilation(contour, radius) for contour in contours]
    lengths = [np.sum(contour) for contour in contours]
    if not lengths[0] or not lengths[1]:
        return float(region), float(lengths[0] == lengths[1])
    precision = np.sum(contours[0] & zones[1]) / lengths[0]
    recall = np.sum(contours[1] & zones[0]) / lengths[1]
    total = precision + recall
    return float(region), float(2 * precision * recall / total) if total else 0.0


def _reference_contour(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from their right, lower or lower-right neighbour; none differs from the outside."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask ^ padded[:-1, 1:]) | (mask ^ padded[1:, :-1]) | (mask ^ padded[1:, 1:])


def _reference_dilation(contour: np.ndarray, radius: int) -> np.ndarray:
    height, width = contour.shape
    padded = np.pad(contour, radius)
    zone = np.zeros_like(contour)
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            if dy * dy + dx * dx <= radius * radius:
                zone |= padded[radius + dy : radius + dy + height, radius + dx : radius + dx + width]
    return zone


def _reference_table(proposals: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """J and F of all pairs of labels, `(2, Q, N)`."""
    pairs = [
        [reference_region_and_boundary(proposals == q, objects == n) for n in range(1, NUM_OBJECTS + 1)]
        for q in range(1, NUM_PROPOSALS + 1)
    ]
    return np.moveaxis(np.array(pairs), 2, 0)


def _make_frame(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Label maps of overlapping ellipses: 20 proposals, and 2 objects close to the first two of them."""
    height, width = FRAME_SIZE
    y, x = np.mgrid[:height, :width]
    proposals, objects = np.zeros(FRAME_SIZE, np.uint8), np.zeros(FRAME_SIZE, np.uint8)
    for label in range(NUM_PROPOSALS, 0, -1):
        centre = generator.uniform((60, 100), (height - 60, width - 100))
        axes = generator.uniform(40, 110, 2)
        proposals[((y - centre[0]) / axes[0]) ** 2 + ((x - centre[1]) / axes[1]) ** 2 < 1] = label
        if label <= NUM_OBJECTS:
            centre = centre + generator.uniform(-6, 6, 2)
            objects[((y - centre[0]) / axes[0]) ** 2 + ((x - centre[1]) / axes[1]) ** 2 < 1] = label
    return proposals, objects


def _compare(
    name: str, ours: Callable[[], object], reference: Callable[[], object], count: int, repeats: int
) -> MetricTiming:
    if not np.allclose(ours(), reference(), rtol=0, atol=1e-12):
        raise RuntimeError(f"{name}: ours and the plain reference differ")
    times = [(_processor_time(ours), _processor_time(reference)) for _ in range(repeats)]
    return MetricTiming(name, min(t[0] for t in times) / count, min(t[1] for t in times) / count)


def _processor_time(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _peak_memory(frames: list[tuple[np.ndarray, np.ndarray]], length: int) -> int:
    """Peak of the memory that scoring one video of `length` frames allocates, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for index in range(length):
            _, objects = frames[index % len(frames)]
            for kind in ("annotations", "predictions"):
                write_label_map(root / kind / "video" / f"{index:05d}.png", objects)
        tracemalloc.start()
        try:
            score_davis(root / "annotations", root / "predictions", ["video"], task="semi-supervised")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
