"""Where rounding decides.

Official and our numbers differ in the last bits. In a few places the last bit decides between two outcomes that are
far apart: a mask is thresholded before it enters memory, two crops are equally near to the centre of a cluster, a
gradient passes a kink. No tolerance of the numbers themselves covers that. So every comparison is strict first; if it
fails, it must hold just as strictly for one of the outcomes that rounding could have had.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar
from unittest import mock

import torch
import torch.nn.functional as F

from modeling_sparrow import modeling_videoglamm
from modeling_sparrow.frame_pyramid import FramePyramid
from modeling_sparrow.mask_tracker import FrameMasks, FrameMemory, MaskTracker
from modeling_sparrow.tracked_features import cluster_medoids

from .fixtures import TOLERANCE

ROUNDING_ERROR = 1e-6  # relative; ours and the recorded features of a crop differ by less
NUM_DRAWS = 64  # of rounding errors, for choices that cost little
NUM_RUNS = 12  # of rounding errors, for whole runs
MAX_DOUBTFUL_PIXELS = 5

Outcome = TypeVar("Outcome")


def holds_for_one(outcomes: Iterable[Outcome], compare: Callable[[Outcome], None]) -> Outcome:
    """The first outcome for which `compare` does not raise AssertionError; if there is none, the first error."""
    failure = None
    for outcome in outcomes:
        try:
            compare(outcome)
        except AssertionError as error:
            failure = failure or error
        else:
            return outcome
    raise failure


# ------------------------------------------------------------------ thresholded masks


@dataclass(frozen=True)
class Pixel:
    """A pixel of a prompted mask whose logit is next to zero: which call of `remember`, which object, where."""

    call: int
    row: int
    y: int
    x: int


class PromptedMasks:
    """Watches `tracker.remember` on prompted frames; the pixels in `flipped` are rounded the other way there."""

    def __init__(self, tracker: MaskTracker, flipped: tuple[Pixel, ...] = ()):
        self.tracker, self.flipped = tracker, flipped
        self.remembered: list[FrameMemory] = []
        self.doubtful: list[tuple[float, Pixel]] = []

    def __enter__(self) -> "PromptedMasks":
        self.original = self.tracker.remember
        self.tracker.remember = self.remember
        return self

    def __exit__(self, *_):
        del self.tracker.remember  # back to the method of the class

    def remember(self, pyramid: FramePyramid, masks: FrameMasks, prompted: bool) -> FrameMemory:
        if not prompted:
            return self.original(pyramid, masks, prompted)
        call, size = len(self.remembered), self.tracker.config.image_size
        logits = F.interpolate(masks.logits[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
        for row, y, x in (logits.abs() < TOLERANCE).nonzero().tolist():
            self.doubtful.append((logits[row, y, x].abs().item(), Pixel(call, row, y, x)))
        for pixel in self.flipped:
            if pixel.call == call:
                logits[pixel.row, pixel.y, pixel.x] *= -1
        # logits of the size of the frame are taken as they are
        memory = self.original(pyramid, replace(masks, logits=logits) if self.flipped else masks, prompted)
        self.remembered.append(memory)
        return memory


def compare_across_knife_edge(tracker: MaskTracker, run: Callable, compare: Callable):
    """Run and compare, allowing a pixel next to zero to be rounded either way before it enters memory.

    The official predictor thresholds the mask of a prompted frame before it encodes it into memory
    (`binarize_prompted_memory`). A pixel whose logit is about 1e-6 may then fall on the other side here, and one
    flipped pixel moves the logits of later frames by about 1e-2. The other outcomes are those where pixels of
    prompted frames within 1e-4 of zero are flipped; without such pixels there is none.

    Args:
        run: without arguments; its result and the [`PromptedMasks`] go to `compare`.
        compare: raises AssertionError.
    """
    first = PromptedMasks(tracker)

    def flips() -> Iterator[tuple[Pixel, ...]]:
        yield ()
        nearest = sorted(first.doubtful, key=lambda item: item[0])[:MAX_DOUBTFUL_PIXELS]
        for count in range(1, len(nearest) + 1):
            yield from itertools.combinations([pixel for _, pixel in nearest], count)

    def attempt(flipped: tuple[Pixel, ...]):
        with PromptedMasks(tracker, flipped) if flipped else first as prompted:
            result = run()
        compare(result, prompted)

    holds_for_one(flips(), attempt)


# ------------------------------------------------------------------ tied crops


def possible_choices(features: torch.Tensor, num_clusters: int, iterations: int) -> Iterator[torch.Tensor]:
    """Indices of the medoids of K-means, ours first, then those that features off by a rounding error give.

    A cluster of two has its mean halfway between them: in exact arithmetic both are nearest to it.
    """
    generator = torch.Generator().manual_seed(0)
    noise = ROUNDING_ERROR * features.abs().max()
    seen = set()
    for draw in range(NUM_DRAWS):
        shift = noise * torch.randn(features.shape, generator=generator) if draw else 0.0
        choice = tuple(cluster_medoids(features + shift, num_clusters, iterations).tolist())
        if choice not in seen:
            seen.add(choice)
            yield torch.tensor(choice)


@contextmanager
def chosen(indices: torch.Tensor | None) -> Iterator[None]:
    """Of more crops than clusters these are taken; None: the model chooses."""
    if indices is None:
        yield
        return

    def select_medoids(features: torch.Tensor, num_clusters: int, iterations: int) -> torch.Tensor:
        return features[indices] if len(features) > num_clusters else features

    with mock.patch.object(modeling_videoglamm, "select_medoids", select_medoids):
        yield


# ------------------------------------------------------------------ kinks


def nearby_inputs(inputs: dict[str, torch.Tensor], names: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs as they are, then with rounding errors on those named.

    The gradient of a ReLU near zero, or of a maximum over boxes that are nearly equal, jumps.
    """
    yield inputs
    generator = torch.Generator().manual_seed(0)
    for _ in range(NUM_RUNS):
        noise = {
            name: ROUNDING_ERROR * torch.randn(inputs[name].shape, generator=generator)
            for name in names
            if name in inputs
        }
        yield inputs | {name: inputs[name] + error for name, error in noise.items()}
