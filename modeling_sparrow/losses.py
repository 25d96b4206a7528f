"""Loss terms of SPARROW, small and pure: masks, filtration head, region proposer."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .box_ops import cxcywh_to_xyxy, generalized_iou, pairwise_iou, tight_boxes
from .configuration_sparrow import SparrowConfig

if TYPE_CHECKING:
    from .modeling_outputs import FilteredFrame

# What `SparrowForVideoGrounding.forward` can compute; the weight of `x` is the config's `x_weight`.
LOSS_NAMES = ("ce_loss", "mask_bce_loss", "mask_dice_loss", "filter_class_loss", "filter_box_loss")


def mask_bce_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each mask, mean over its pixels.

    Args:
        logits: `(M, H, W)`.
        targets: `(M, H, W)` with 0, 1 or -1; -1 pixels add nothing but stay in the mean (released training code).

    Returns:
        `(M,)` float32.
    """
    valid = targets >= 0
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.clamp(min=0).float(), reduction="none")
    return (loss * valid).flatten(1).mean(1)


def mask_dice_loss(
    logits: torch.Tensor, targets: torch.Tensor, scale: float = 1000.0, eps: float = 1e-6
) -> torch.Tensor:
    """Dice loss of each mask `(M, H, W)`, -1 pixels left out; `scale` and `eps` as in the LISA family.

    Returns `(M,)`.
    """
    valid = targets >= 0
    probability = (logits.float().sigmoid() * valid).flatten(1)
    target = (targets.clamp(min=0).float() * valid).flatten(1)
    intersection = (probability / scale * target).sum(1)
    total = (probability / scale).sum(1) + (target / scale).sum(1)
    return 1 - (2 * intersection + eps) / (total + eps)


def filtration_targets(iou: torch.Tensor, positive: float, negative: float) -> torch.Tensor:
    """Labels of proposals by their IoU with the target of the same frame (paper, task adaptation).

    1 above `positive`, 0 below `negative`, -1 (ignored) between. Any shape; NaN IoU (target absent) gives 0.
    """
    iou = torch.nan_to_num(iou, nan=0.0)
    return torch.where(iou > positive, 1.0, torch.where(iou < negative, 0.0, -1.0))


def filtration_class_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy over the proposals whose target is 0 or 1; -1 is ignored. Scalar."""
    valid = targets >= 0
    if not valid.any():
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(logits[valid].float(), targets[valid])


def box_regression_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 + (1 - generalised IoU), mean over boxes. Both `(M, 4)` normalised xyxy; zero (with gradient) if `M` is 0."""
    if predicted.shape[0] == 0:
        return predicted.sum() * 0.0
    return (
        F.l1_loss(predicted.float(), target.float()) + (1 - generalized_iou(predicted.float(), target.float())).mean()
    )


def sigmoid_focal_loss(logits: torch.Tensor, targets: torch.Tensor, alpha: float, gamma: float = 2.0) -> torch.Tensor:
    """Focal loss (arXiv 1708.02002) per element; any shape."""
    probability = logits.sigmoid()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    missed = probability * (1 - targets) + (1 - probability) * targets
    return (alpha * targets + (1 - alpha) * (1 - targets)) * loss * missed**gamma


class HungarianMatcher:
    """One-to-one assignment of proposals to ground-truth boxes, costs of Deformable DETR (arXiv 2010.04159)."""

    def __init__(self, class_cost: float, l1_cost: float, giou_cost: float, focal_alpha: float):
        self.class_cost, self.l1_cost, self.giou_cost = class_cost, l1_cost, giou_cost
        self.focal_alpha = focal_alpha

    @torch.no_grad()
    def __call__(
        self, logits: torch.Tensor, boxes: torch.Tensor, targets: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Match `logits` `(B, Q)` and `boxes` `(B, Q, 4)` to `targets[b]` `(N_b, 4)`, all boxes normalised cxcywh.

        Returns for each picture the matched proposal and target indices.
        """
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError as error:
            raise ImportError(
                "The loss of the region proposer needs scipy: pip install 'sparrow-video-grounding[train]'"
            ) from error

        probability = logits.float().sigmoid()
        alpha, eps = self.focal_alpha, 1e-8
        negative = (1 - alpha) * probability**2 * -(1 - probability + eps).log()
        positive = alpha * (1 - probability) ** 2 * -(probability + eps).log()
        matches = []
        for b, target in enumerate(targets):
            predicted = boxes[b].float()
            giou = generalized_iou(cxcywh_to_xyxy(predicted)[:, None], cxcywh_to_xyxy(target.float())[None])
            cost = (
                self.class_cost * (positive[b] - negative[b])[:, None]
                + self.l1_cost * torch.cdist(predicted, target.float(), p=1)
                - self.giou_cost * giou
            )
            rows, columns = linear_sum_assignment(cost.cpu().numpy())
            matches.append((torch.as_tensor(rows, device=boxes.device), torch.as_tensor(columns, device=boxes.device)))
        return matches


def proposal_loss(
    logits: torch.Tensor, boxes: torch.Tensor, targets: list[torch.Tensor], matcher: HungarianMatcher
) -> dict[str, torch.Tensor]:
    """Objectness, L1 and GIoU of one set of proposals (one decoder layer, or the encoder stage).

    Args:
        logits: `(B, Q)` objectness logits.
        boxes: `(B, Q, 4)` normalised cxcywh.
        targets: per picture `(N_b, 4)` normalised cxcywh.

    Returns:
        `loss_ce`, `loss_bbox`, `loss_giou`, each divided by the number of ground-truth boxes (at least one).
    """
    matches = matcher(logits, boxes, targets)
    num_boxes = max(sum(len(target) for target in targets), 1)
    labels = torch.zeros_like(logits, dtype=torch.float32)
    for b, (rows, _) in enumerate(matches):
        labels[b, rows] = 1.0
    predicted = torch.cat([boxes[b, rows] for b, (rows, _) in enumerate(matches)]).float()
    target = torch.cat([targets[b][columns] for b, (_, columns) in enumerate(matches)]).float()
    giou = generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(target))
    return {
        "loss_ce": sigmoid_focal_loss(logits.float(), labels, matcher.focal_alpha).sum() / num_boxes,
        "loss_bbox": F.l1_loss(predicted, target, reduction="sum") / num_boxes,
        "loss_giou": (1 - giou).sum() / num_boxes,
    }


def count_items(
    config: SparrowConfig,
    labels: torch.Tensor | None,
    mask_labels: list[torch.Tensor],
    box_labels: list[torch.Tensor] | None,
    frames: list[list[int]],
) -> dict[str, int]:
    """By what each loss of a batch is divided; where nothing counts, 0, which the caller takes for 1 once it has added
    up all parts of a step.

    `ce_loss`: words of the answers. `mask_…`: masks that count. `filter_class_loss`: pairs of token and candidate
    frame; `filter_box_loss`: those of them that show a target; in released training both are a mean over videos.

    Args:
        labels: `(B, L)`, -100 where ignored.
        mask_labels: per video `(S, T, H, W)`.
        box_labels: per video `(S, M, T, 4)` normalised xyxy; default the tight boxes of the masks.
        frames: per video those the filter looks at.
    """
    counts = dict.fromkeys(LOSS_NAMES, 0)
    if labels is not None:
        counts["ce_loss"] = int((labels[:, 1:] != -100).sum())
    for v, (masks, own) in enumerate(zip(mask_labels, frames, strict=True)):
        masks = masks[: config.max_training_tokens]
        num_masks = int(masks_that_count(config, masks).sum())
        counts["mask_bce_loss"] += num_masks
        counts["mask_dice_loss"] += num_masks
        if config.filtration_config.variant == "released":
            counts["filter_class_loss"] += len(masks) > 0
            counts["filter_box_loss"] += len(masks) > 0
            continue
        targets = filter_targets(config, own, masks, None if box_labels is None else box_labels[v])
        counts["filter_class_loss"] += len(masks) * len(own)
        counts["filter_box_loss"] += int((~targets[: len(masks)].isnan().any(-1)).any(-1).sum())
    return counts


def filter_losses(
    config: SparrowConfig,
    filtered: "list[FilteredFrame]",
    mask_labels: torch.Tensor,
    box_labels: torch.Tensor | None = None,
    num_items: dict[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """Class and box loss of the filtration head on some frames of one video, against the boxes of those frames.

    Args:
        config: which IoU makes a positive or a negative.
        filtered: scores of `S` tokens.
        mask_labels: `(S', T, H, W)`; tokens without a mask are left out.
        box_labels: `(S', M, T, 4)` normalised xyxy, NaN where absent; default the tight boxes of the masks.
        num_items: by what the losses are divided; default: by the pairs of token and frame, for boxes those that
            have positives. With it the losses of several videos add up to the mean over all of them. In released
            training that is a mean over videos, whatever the number of their tokens.

    Returns:
        `filter_class_loss`, for each token and frame the mean over its proposals that are not ignored, and, with a
        plural head and `box_labels`, beside it the loss of whether the token means several objects; and
        `filter_box_loss`, the mean over its positives, if boxes are regressed.
    """
    rules = config.filtration_config
    logits = torch.cat([frame.output.logits for frame in filtered], dim=1)  # (S, F, Q)
    proposals = torch.cat([frame.proposals.boxes for frame in filtered])  # (F, Q, 4)
    valid = torch.cat([frame.proposals.valid for frame in filtered])
    S = min(len(logits), len(mask_labels))
    if S == 0:
        return {}
    targets = filter_targets(config, [frame.frame_index for frame in filtered], mask_labels, box_labels)[:S]
    iou, nearest = pairwise_iou(proposals, targets.to(proposals.dtype)).nan_to_num(nan=-1.0).max(dim=-1)  # (S, F, Q)
    labels = filtration_targets(iou, rules.positive_iou, rules.negative_iou).masked_fill(~valid, -1.0)
    known, positive = labels >= 0, labels == 1
    per_proposal = F.binary_cross_entropy_with_logits(
        logits[:S].masked_fill(~known, 0.0).float(), labels.clamp(min=0), reduction="none"
    )
    classes = _mean_where(per_proposal, known)
    plural_logits = filtered[0].output.plural_logits
    if plural_logits is not None and box_labels is not None:  # a mask alone does not tell how many objects it shows
        several = (~box_labels[:S].isnan().any(-1)).any(-1).sum(-1) > 1  # (S,)
        classes = classes + F.binary_cross_entropy_with_logits(
            plural_logits[:S].float(), several.float(), reduction="none"
        ).unsqueeze(-1)
    by_video = rules.variant == "released" or num_items is None
    losses = {"filter_class_loss": classes.mean() if by_video else classes.sum()}
    if filtered[0].output.regressed_boxes is not None:
        regressed = torch.cat([frame.output.regressed_boxes for frame in filtered], dim=1)[:S].float()
        wanted = targets.gather(2, nearest[..., None].expand(-1, -1, -1, 4))
        wanted = torch.where(positive[..., None], wanted, regressed.detach())  # absent targets are NaN
        per_proposal = F.l1_loss(regressed, wanted, reduction="none").mean(-1) + 1 - generalized_iou(regressed, wanted)
        boxes = _mean_where(per_proposal, positive).sum()
        losses["filter_box_loss"] = boxes / positive.any(-1).sum().clamp(min=1) if by_video else boxes
    return losses if num_items is None else {name: value / num_items[name] for name, value in losses.items()}


def filter_targets(
    config: SparrowConfig, frames: list[int], mask_labels: torch.Tensor, box_labels: torch.Tensor | None
) -> torch.Tensor:
    """What the filter is to find for each token on some frames: `(S, F, M, 4)` normalised xyxy, NaN where absent.

    Arguments as in `filter_losses`. The released rule compares every frame with the box of all frames together.
    """
    if config.filtration_config.variant == "released":
        return boxes_over_time(mask_labels)[:, None, None].expand(-1, len(frames), -1, -1)
    boxes = tight_boxes(mask_labels)[:, None] if box_labels is None else box_labels
    return boxes[:, :, frames].transpose(1, 2)


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the chosen values along the last axis, 0 where none is chosen."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def mask_losses(
    config: SparrowConfig,
    mask_logits: list[list[torch.Tensor]],
    num_frames: list[int],
    mask_labels: list[torch.Tensor],
    num_items: dict[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """BCE and Dice over the frames of every token, mean over the masks that count.

    Args:
        config: `max_training_tokens` and the way of propagation.
        mask_logits: per video and token `(T, h, w)`.
        num_frames: per video, frames that are not padding.
        mask_labels: per video `(S, T_v, H, W)` of 1, 0 and -1.
        num_items: by what the losses are divided; default: by the masks of this call that count.

    Raises:
        ValueError: if a video has not as many masks as [SEG] tokens.
    """
    bce, dice, count = [], [], 0
    for logits, T, labels in zip(mask_logits, num_frames, mask_labels, strict=True):
        labels = labels[: config.max_training_tokens]
        if len(logits) != len(labels):
            raise ValueError(f"A video has {len(logits)} [SEG] tokens, but masks for {len(labels)} are given.")
        if not logits:
            continue
        target, use = labels.flatten(0, 1), masks_that_count(config, labels).flatten()  # (S * T, H, W), (S * T,)
        predicted = torch.stack(logits)[:, :T].flatten(0, 1)[use, None].float()
        predicted = F.interpolate(predicted, size=target.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        bce.append(mask_bce_loss(predicted, target[use]).sum())
        dice.append(mask_dice_loss(predicted, target[use]).sum())
        count += int(use.sum())
    if not bce:
        return {}
    if num_items is None:
        num_items = dict.fromkeys(("mask_bce_loss", "mask_dice_loss"), max(count, 1))
    return {
        "mask_bce_loss": torch.stack(bce).sum() / num_items["mask_bce_loss"],
        "mask_dice_loss": torch.stack(dice).sum() / num_items["mask_dice_loss"],
    }


def masks_that_count(config: SparrowConfig, mask_labels: torch.Tensor) -> torch.Tensor:
    """Which masks `(S, T, H, W)` are compared: bool `(S, T)`.

    With memory propagation a frame without the object is left to SAM2's own object score; frame-wise decoding
    compares it with an empty mask, as released training does. Masks of -1 alone are unknown.
    """
    framewise = config.mask_tracker_config.propagation == "framewise"
    return ((mask_labels >= 0) if framewise else (mask_labels > 0)).flatten(2).any(-1)


def boxes_over_time(masks: torch.Tensor) -> torch.Tensor:
    """Released targets of the filter: masks `(S, T, H, W)` united over time, `(S, 4)` normalised xyxy.

    The proposals come from the first frame alone, so a moving object gets a box that fits none of them.
    """
    return tight_boxes((masks > 0).any(dim=1))
