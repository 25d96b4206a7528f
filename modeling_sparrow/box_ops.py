"""Boxes and regions in plain torch: conversions, IoU, suppression, ROIAlign.

Nothing here needs torchvision, whose operators do not load beside every build of torch.
"""

import math

import torch


def cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """Centre and size to corners, same unit. `(…, 4)` to `(…, 4)`."""
    center, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def xyxy_to_cxcywh(boxes: torch.Tensor) -> torch.Tensor:
    """Corners to centre and size, same unit. `(…, 4)` to `(…, 4)`."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([0.5 * (low + high), high - low], dim=-1)


def sine_box_embedding(boxes: torch.Tensor, width: int) -> torch.Tensor:
    """Sine and cosine of normalised cxcywh boxes `(…, 4)` at `width / 2` frequencies, one cycle per picture and
    slower: `(…, 4 * width)` (DETR, arXiv 2005.12872, of box coordinates as in Deformable DETR, arXiv 2010.04159).
    """
    index = torch.arange(width, device=boxes.device, dtype=boxes.dtype)
    frequency = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / width)
    angles = (boxes * 2 * math.pi)[..., None] / frequency
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(-3)


def box_area(boxes: torch.Tensor) -> torch.Tensor:
    """Area of xyxy boxes `(…, 4)`, negative sides counted as zero. Returns `(…)`."""
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def pairwise_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """IoU of every xyxy box in `first` `(…, N, 4)` with every one in `second` `(…, M, 4)`; returns `(…, N, M)`."""
    intersection, union = _intersection_and_union(first[..., :, None, :], second[..., None, :, :])
    return intersection / union.clamp(min=torch.finfo(union.dtype).eps)


def generalized_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Generalised IoU of xyxy boxes `(…, 4)`, element by element (arXiv 1902.09630).

    Broadcast `first[:, None]` against `second[None]` for all pairs. Returns `(…)` in [-1, 1].
    """
    intersection, union = _intersection_and_union(first, second)
    eps = torch.finfo(union.dtype).eps
    hull = torch.cat(
        [torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:])], -1
    )
    hull_area = box_area(hull).clamp(min=eps)
    return intersection / union.clamp(min=eps) - (hull_area - union) / hull_area


def _intersection_and_union(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    overlap = torch.cat(
        [torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])], dim=-1
    )
    intersection = box_area(overlap)
    return intersection, box_area(first) + box_area(second) - intersection


def non_maximum_suppression(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedy suppression of xyxy boxes `(Q, 4)` by `scores` `(Q,)`.

    Returns the int64 indices that stay, best score first. A box is dropped if its IoU with a better one that stayed
    is above `iou_threshold`.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = (pairwise_iou(boxes[order], boxes[order]) > iou_threshold).cpu()
    suppressed = torch.zeros(len(order), dtype=torch.bool)
    keep = []
    for rank in range(len(order)):
        if not suppressed[rank]:
            keep.append(rank)
            suppressed |= overlaps[rank]
    return order[torch.tensor(keep, dtype=torch.int64, device=order.device)]


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Tight boxes of masks `(…, H, W)`: xyxy in pixels, maximum edge exclusive, float32 `(…, 4)`; NaN where empty."""
    masks = masks > 0
    H, W = masks.shape[-2:]
    columns, rows = masks.any(dim=-2), masks.any(dim=-1)
    x = torch.arange(W, device=masks.device)
    y = torch.arange(H, device=masks.device)
    x0 = torch.where(columns, x, W).amin(-1)
    y0 = torch.where(rows, y, H).amin(-1)
    x1 = torch.where(columns, x, -1).amax(-1) + 1
    y1 = torch.where(rows, y, -1).amax(-1) + 1
    boxes = torch.stack([x0, y0, x1, y1], dim=-1).float()
    return boxes.masked_fill(~columns.any(-1, keepdim=True), float("nan"))


def tight_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes of masks `(…, H, W)` as a share of the picture: `(…, 4)` normalised xyxy, NaN where empty."""
    H, W = masks.shape[-2:]
    return masks_to_boxes(masks) / torch.tensor([W, H, W, H], device=masks.device, dtype=torch.float32)


def roi_align(
    features: torch.Tensor, boxes: torch.Tensor, output_size: int, scale: float, sampling_ratio: int = 0
) -> torch.Tensor:
    """ROIAlign (Mask R-CNN, half-pixel aligned) as two matrix products per region.

    Bilinear sampling on a regular grid followed by averaging is separable, so each region is
    `rows @ feature map @ columns` with one averaging matrix per axis; exact for any number of samples per bin.

    Args:
        features: `(F, C, H, W)` feature maps, one per frame.
        boxes: `(F, Q, 4)` xyxy in pixels of the picture; gradients do not reach them.
        output_size: bins per side, `P`.
        scale: feature pixels per picture pixel, on both axes.
        sampling_ratio: samples per bin and axis; 0 means ceil(region side / P), as the released detectors use.

    Returns:
        `(F, Q, C, P, P)` in the dtype of `features`.
    """
    H, W = features.shape[-2:]
    boxes = boxes.detach().to(torch.float32) * scale - 0.5
    columns = _bin_averages(boxes[..., 0], boxes[..., 2], W, output_size, sampling_ratio).to(features.dtype)
    rows = _bin_averages(boxes[..., 1], boxes[..., 3], H, output_size, sampling_ratio).to(features.dtype)
    pooled = torch.einsum("fqph,fchw->fqcpw", rows, features)
    return torch.einsum("fqcpw,fqrw->fqcpr", pooled, columns)


def _bin_averages(low: torch.Tensor, high: torch.Tensor, size: int, bins: int, sampling_ratio: int) -> torch.Tensor:
    """Averaging matrix of one axis, `(…, bins, size)`: weight of each feature pixel in each bin's mean.

    A sample further than one pixel outside the map counts as zero; nearer ones are clamped to the edge.
    """
    bin_size = (high - low) / bins
    if sampling_ratio > 0:
        count = torch.full_like(bin_size, sampling_ratio)
    else:
        count = bin_size.ceil().clamp(min=1)
    sample = torch.arange(int(count.max()) if count.numel() else 1, device=low.device, dtype=low.dtype)
    bin_index = torch.arange(bins, device=low.device, dtype=low.dtype)
    within = (sample + 0.5) / count[..., None]  # (…, S) position inside a bin
    position = low[..., None, None] + (bin_index[:, None] + within[..., None, :]) * bin_size[..., None, None]
    weight = (sample < count[..., None])[..., None, :] & (position >= -1) & (position <= size)
    weight = weight / count[..., None, None]
    position = position.nan_to_num().clamp(0, size - 1)  # a box that is not finite has no sample inside
    left = position.floor().clamp(max=max(size - 2, 0))
    fraction = position - left
    matrix = torch.zeros(*low.shape, bins, size, device=low.device, dtype=low.dtype)
    matrix.scatter_add_(-1, left.long(), weight * (1 - fraction))
    matrix.scatter_add_(-1, (left.long() + 1).clamp(max=size - 1), weight * fraction)
    return matrix
