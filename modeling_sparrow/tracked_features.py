"""Target-Specific Tracked Features (TSF): a few representative views of a tracked referent.

Paper section "TSF": crops of the referent over time, clustered by K-means with K = 4; the real crop nearest to each
centre becomes an extra token. Used in training, absent at inference unless crops are given.
"""

import torch


def cluster_medoids(features: torch.Tensor, num_clusters: int, iterations: int = 8) -> torch.Tensor:
    """Indices of the vectors nearest to the centres of K-means.

    Centres start at evenly spaced vectors, so that the result is deterministic and roughly in order of time. Lloyd
    rounds stop early when the centres rest; an empty cluster keeps its centre; two centres may share a medoid
    (released training code).

    Args:
        features: `(n, D)`, one vector per crop.
        num_clusters: `K`; if `n <= K` every vector is its own medoid.
        iterations: most Lloyd rounds.

    Returns:
        int64 `(min(n, K),)`.
    """
    n = len(features)
    if n <= num_clusters:
        return torch.arange(n, device=features.device)
    points = features.detach().float()
    start = torch.linspace(0, n - 1, num_clusters, device=points.device).round().long()
    centers = points[start]
    for _ in range(iterations):
        nearest = torch.cdist(points, centers).argmin(dim=1)
        moved = torch.stack(
            [points[nearest == k].mean(0) if (nearest == k).any() else centers[k] for k in range(num_clusters)]
        )
        rest = torch.allclose(moved, centers, atol=1e-4, rtol=1e-4)
        centers = moved
        if rest:
            break
    return torch.cdist(centers, points).argmin(dim=1)


def select_medoids(features: torch.Tensor, num_clusters: int, iterations: int = 8) -> torch.Tensor:
    """The medoids themselves, `(min(n, K), D)`; gradients reach the chosen vectors, not the choice."""
    return features[cluster_medoids(features, num_clusters, iterations)]
