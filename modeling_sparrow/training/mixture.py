"""What sample number `i` of a run is: a weighted mixture of sources that needs no state.

Everything about a sample follows from (seed, i): its source, its place in it, and what is drawn while it is made. So a
run that was interrupted goes on with the very samples it would have seen, processes that take different numbers see
different samples, and no global random state is touched.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from sparrow_processing.errors import VideoGroundingError

from .records import RecordError, SkipRecordError

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 64


class MixtureDataset(Dataset):
    """Samples of several sources.

    A source is walked through in random order: within one pass none of its items comes twice. An item that does not
    fit ([`SkipRecordError`]) is replaced by another, and so is one that turns out to be damaged, with a warning: one
    broken video does not end a long run. The sample says how many were replaced.

    Args:
        sources: with `len()` and `read(index, rng)`.
        weights: how often each is drawn, relative to each other.
        build: makes a sample, a dict, from what a source gives.
        size: number of samples.
        seed: of the run.

    Raises:
        ValueError: no source, an empty one, or weights that are not positive.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        weights: Sequence[float],
        build: Callable[[Any, np.random.Generator], dict[str, Any]],
        size: int,
        seed: int,
    ):
        if not sources or len(sources) != len(weights) or min(weights) <= 0:
            raise ValueError(f"A mixture needs sources with positive weights, got {len(sources)} and {list(weights)}.")
        if empty := [number for number, source in enumerate(sources) if not len(source)]:
            raise ValueError(f"Source {empty[0]} of the mixture is empty.")
        self.sources, self.build, self.size, self.seed = list(sources), build, size, seed
        self.shares = np.array(weights, dtype=np.float64) / np.sum(weights)

    def __len__(self) -> int:
        return self.size

    def place(self, number: int, attempt: int = 0) -> tuple[int, int]:
        """Source and index in it of sample `number`; later attempts are drawn freely."""
        rng = np.random.default_rng([self.seed, 0, number, attempt])
        source = int(rng.choice(len(self.sources), p=self.shares))
        length = len(self.sources[source])
        if attempt:
            return source, int(rng.integers(length))
        turn, position = divmod(number, length)
        return source, int(_order(length, self.seed, source, turn)[position])

    def __getitem__(self, number: int) -> dict[str, Any]:
        reason = None
        for attempt in range(MAX_ATTEMPTS):
            source, index = self.place(number, attempt)
            rng = np.random.default_rng([self.seed, 1, number, attempt])
            try:
                sample = self.build(self.sources[source].read(index, rng), rng)
            except SkipRecordError as error:
                reason = error
                logger.debug("sample %d: item %d of source %d skipped: %s", number, index, source, error)
                continue
            except (RecordError, VideoGroundingError) as error:
                reason = error
                logger.warning("item %d of source %d is damaged and left out: %s", index, source, error)
                continue
            return sample | {"num_skipped": sample.get("num_skipped", 0) + attempt}
        raise RuntimeError(f"{MAX_ATTEMPTS} items in a row could not be used; the last one: {reason}")


@functools.lru_cache(maxsize=16)
def _order(length: int, seed: int, source: int, turn: int) -> np.ndarray:
    """Random order of the items of a source on one pass."""
    return np.random.default_rng([seed, 2, source, turn]).permutation(length)
