"""K-means over crops has ties that rounding decides.

A cluster of two has its mean halfway between them: in exact arithmetic both are nearest to it, and the last bit of the
features, which differs between machines, tells which one becomes the tracked feature. The comparison is with our
choice first, then with every choice that rounding could make; one of them must hold strictly.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from modeling_sparrow import modeling_videoglamm
from modeling_sparrow.tracked_features import cluster_medoids

NUM_DRAWS = 64
ROUNDING_ERROR = 1e-6  # relative; ours and the recorded features of a crop differ by less


def possible_choices(features: torch.Tensor, num_clusters: int, iterations: int) -> list[torch.Tensor]:
    """Indices of the medoids, ours first, then those that features off by a rounding error give."""
    generator = torch.Generator().manual_seed(0)
    noise = ROUNDING_ERROR * features.abs().max()
    draws = [features] + [
        features + noise * torch.randn(features.shape, generator=generator) for _ in range(NUM_DRAWS)
    ]
    choices = {tuple(cluster_medoids(draw, num_clusters, iterations).tolist()): None for draw in draws}
    return [torch.tensor(choice) for choice in choices]


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


def holds_for_one(
    choices: list[torch.Tensor | None], compare: Callable[[torch.Tensor | None], None]
) -> torch.Tensor | None:
    """The first choice for which `compare` does not raise AssertionError; if there is none, the first error."""
    failure = None
    for choice in choices:
        try:
            compare(choice)
        except AssertionError as error:
            failure = failure or error
        else:
            return choice
    raise failure
