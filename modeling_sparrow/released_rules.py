"""Rules of the released SPARROW code that its checkpoints were trained with and the paper does not have.

They apply when the configuration says so (`filtration_config.variant == "released"`, `max_training_tokens`,
`filtration_config.prior_min_score`).
"""

import torch
import torch.nn.functional as F

from .box_ops import pairwise_iou, tight_boxes
from .configuration_sparrow import FiltrationHeadConfig
from .frame_pyramid import FramePyramid
from .mask_tracker import MaskTracker


def align_boxes(boxes: list, num_tokens: int) -> list:
    """Boxes of each [SEG] from those of each [BOX]: the last are reused where [BOX] lack, extra ones are dropped."""
    return (boxes + boxes[-1:] * num_tokens)[:num_tokens]


def filter_by_box_prior(
    tracker: MaskTracker,
    pyramid: FramePyramid,
    boxes: torch.Tensor,
    original_size: tuple[int, int],
    config: FiltrationHeadConfig,
) -> torch.Tensor:
    """Keep the boxes whose SAM2 mask agrees with them; returns their indices, at most `prior_max_keep`, best first.

    Args:
        tracker: decodes each box alone, as a click-style prompt.
        pyramid: of the first frame.
        boxes: `(K, 4)` normalised xyxy; a box with x1 < x0 is read as position and size.
        original_size: (H, W) of the video.
        config: `prior_min_score`, `prior_max_keep`.
    """
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    scores = box_prior_scores(decode_box_masks(tracker, pyramid, boxes, original_size), boxes)
    keep = (scores >= config.prior_min_score).nonzero().flatten()
    if not len(keep):
        return scores.argmax()[None]
    return keep[scores[keep].argsort(descending=True, stable=True)][: config.prior_max_keep]


def decode_box_masks(
    tracker: MaskTracker, pyramid: FramePyramid, boxes: torch.Tensor, original_size: tuple[int, int]
) -> torch.Tensor:
    """Mask of each box alone, clamped to the picture, thresholded at the original size, on a grid of four cells per
    feature: `(K, h, w)` in [0, 1]."""
    boxes = _corners(boxes.clamp(0, 1))
    features = tracker.features_without_memory(pyramid)
    points = boxes.unflatten(-1, (2, 2))[:, None] * tracker.config.image_size
    labels = torch.tensor([2, 3], device=boxes.device).expand(len(boxes), 1, 2)
    sparse, dense = tracker.sam2.prompt_encoder(points, labels, None, None)
    logits, *_ = tracker.decode(pyramid, features, sparse, dense, multimask=False)
    masks = F.interpolate(logits[:, None].float(), size=original_size, mode="bilinear", align_corners=False) > 0
    size = [4 * side for side in features.shape[-2:]]
    return F.interpolate(masks.float(), size=size, mode="bilinear", align_corners=False)[:, 0]


def box_prior_scores(masks: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Agreement of masks `(K, h, w)` with the boxes `(K, 4)` that made them: `(K,)`.

    0.8 IoU(box, tight box of mask) + 0.2 / (1 + |ln(mask area / box area)|), a fifth of it if the mask covers less
    than 1e-4 or more than 0.9 of the picture, 0 if it is empty.
    """
    boxes = _corners(boxes).clamp(0, 1)
    binary = masks > 0.5
    tight = tight_boxes(binary)
    mask_area = binary.flatten(1).float().mean(1)
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    iou = torch.stack([pairwise_iou(box[None], other[None])[0, 0] for box, other in zip(boxes, tight, strict=True)])
    ratio = (mask_area / (sides[:, 0] * sides[:, 1]).clamp(min=1e-6)).clamp(min=1e-6)
    score = 0.8 * iou + 0.2 / (1 + ratio.log().abs())
    score = torch.where((mask_area < 1e-4) | (mask_area > 0.9), score * 0.2, score)
    return torch.where(mask_area > 0, score, 0.0)


def _corners(boxes: torch.Tensor) -> torch.Tensor:
    """Read boxes with x1 <= x0 or y1 <= y0 as (x, y, width, height)."""
    as_size = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=-1)
    inverted = (boxes[:, 2:] <= boxes[:, :2]).any(-1, keepdim=True)
    return torch.where(inverted, as_size, boxes)
