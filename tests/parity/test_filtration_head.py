"""The released choice among proposals: `filtration_config.variant="released"`, and the rules around it."""

import functools
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from modeling_sparrow.box_ops import pairwise_iou, roi_align
from modeling_sparrow.configuration_sparrow import FiltrationHeadConfig, SparrowConfig
from modeling_sparrow.conversion.videoglamm import convert_filtration_head
from modeling_sparrow.filtration_head import FiltrationOutput, ReleasedFiltrationHead, select_boxes
from modeling_sparrow.losses import (
    boxes_over_time,
    filter_losses,
    filtration_targets,
    mask_bce_loss,
    mask_dice_loss,
)
from modeling_sparrow.modeling_outputs import FilteredFrame
from modeling_sparrow.modeling_sparrow import SparrowForVideoGrounding
from modeling_sparrow.region_proposer import RegionProposals
from modeling_sparrow.released_rules import align_boxes, box_prior_scores

from .builders import our_names
from .fixtures import Recording, for_cases, for_families

folders = for_families("selector")


def head_config(sizes: dict, **changes) -> FiltrationHeadConfig:
    settings = {
        "variant": "released",
        "hidden_size": sizes["selector_hidden_dim"],
        "roi_hidden_size": sizes["roi_helper_hidden_dim"],
        "roi_size": sizes["roi_align_output_size"],
        "roi_sampling_ratio": 0,
        "score_threshold": sizes["proposal_score_threshold"],
        "fallback_threshold": 0.0,
        "max_boxes_per_token": sizes["max_selected_boxes_per_token"],
        "nms_threshold": None,
        "positive_iou": sizes["proposal_iou_threshold"],
        "negative_iou": sizes["proposal_iou_threshold"],
        "box_regression": sizes["use_proposal_box_regression"],
    }
    return FiltrationHeadConfig(**settings | changes)


@functools.cache
def converted(official: Recording) -> dict[str, torch.Tensor]:
    return convert_filtration_head(official.weights).tensors


def build_head(official: Recording, **changes) -> ReleasedFiltrationHead:
    sizes = official.config
    config = head_config(sizes, **changes)
    head = ReleasedFiltrationHead(config, sizes["seg_dim"], sizes["prop_dim"], sizes["level_in_dims"])
    unused = () if config.box_regression else ("box_head.",)
    head.load_state_dict({key: value for key, value in converted(official).items() if not key.startswith(unused)})
    return head


@pytest.fixture
def head(official: Recording) -> ReleasedFiltrationHead:
    return build_head(official)


def pyramid(official: Recording, name: str = "pyramid") -> list[torch.Tensor]:
    return [official[f"in.{name}.{k}"] for k in range(official.config["max_levels"])]


def fit_channels(levels: list[torch.Tensor], channels: list[int]) -> list[torch.Tensor]:
    """What the official code does with a pyramid of other channels: pads with zeros or cuts off. We refuse one."""
    fitted = []
    for level, wanted in zip(levels, channels, strict=True):
        filled = level.new_zeros(len(level), wanted, *level.shape[2:])
        kept = min(wanted, level.shape[1])
        filled[:, :kept] = level[:, :kept]
        fitted.append(filled)
    return fitted


def in_picture_heights(official: Recording) -> torch.Tensor:
    """Boxes `(Q, 4)` in units of the picture's height on both axes, as ROIAlign reads them; normalised if square."""
    H, W = official.config["image_hw"]
    return official["in.prop_boxes"] * torch.tensor([W / H, 1.0, W / H, 1.0])


def proposals_of(
    official: Recording, valid: torch.Tensor | None = None, scores: bool = True, count: int | None = None
) -> RegionProposals:
    boxes = in_picture_heights(official)[:count]
    valid = torch.ones(len(boxes), dtype=torch.bool) if valid is None else valid
    return RegionProposals(
        boxes=boxes[None],
        scores=official["in.prop_scores"][None, :count] if scores else None,
        features=official["in.prop_features"][None, :count],
        valid=valid[None],
    )


# ------------------------------------------------------------------ scores


@for_cases("selector_", "selector")
@torch.no_grad()
def test_scores(official: Recording, head: ReleasedFiltrationHead, case: str):
    proposals = {
        "plain": proposals_of(official, scores=False),
        "scores": proposals_of(official),
        "masked": proposals_of(official, valid=official["in.prop_mask_partial"]),
    }[case]
    output = head(official["in.seg"], proposals, levels=None)
    official.check(f"selector_{case}.logits", output.logits[:, 0])
    official.check(f"selector_{case}.attention", output.attention)
    official.check(f"selector_{case}.refined", output.tokens)
    official.check(f"selector_{case}.pred_boxes", output.regressed_boxes[:, 0])


@folders
@torch.no_grad()
def test_region_scores(official: Recording, head: ReleasedFiltrationHead):
    H, W = official.config["image_hw"]
    boxes = official["in.prop_boxes"] * torch.tensor([W, H, W, H])
    official.check("roi.boxes_px", boxes)
    for k, level in enumerate(pyramid(official)):
        scale = level.shape[-2] / H
        official.check(f"roi.aligned.{k}", roi_align(level, boxes[None], head.config.roi_size, scale)[0])
    regions = in_picture_heights(official)[None]
    official.check("roi.logits", head.score_regions(official["in.seg"], regions, pyramid(official)))
    mismatch = pyramid(official, "pyramid_mismatch")
    with pytest.raises(ValueError, match="pyramid channels"):
        head.score_regions(official["in.seg"], regions, mismatch)
    mismatch = fit_channels(mismatch, official.config["level_in_dims"])
    official.check("roi.logits_mismatch", head.score_regions(official["in.seg"], regions, mismatch))


# ------------------------------------------------------------------ cases


@dataclass
class Case:
    """Settings of one case; what is not given is that of config.json.

    Args:
        tokens: which tokens query; None: all.
        masks: which ground-truth masks; None: inference, there is no loss.
        proposals: what makes them differ.
        levels: name of the pyramid; None leaves the region scorer out.
        gate: instead of the learned one, clamped to [0, 1] at use.
        config: fields of the head's configuration.
    """

    tokens: slice | None = None
    masks: slice | None = None
    proposals: dict = field(default_factory=dict)
    levels: str | None = "pyramid"
    gate: float | None = None
    config: dict = field(default_factory=dict)


def cases_of(official: Recording) -> dict[str, Case]:
    """Settings by name. What is not recorded does not matter: a gate above 1 or below 0, a threshold above 1."""
    everything = slice(None)
    empty = int((official["out.gt_boxes"] < 0).all(1).nonzero()[0])  # the token whose ground truth is an empty mask
    partial = {"valid": official["in.prop_mask_partial"]}
    no_proposal = {"count": 0}
    all_masked = {"valid": torch.zeros(official.config["n_prop"], dtype=torch.bool)}
    most = int(official["out.case_too_many.counts"].max())
    return {
        "infer": Case(),
        "train": Case(masks=everything),
        "masked": Case(masks=everything, proposals=partial),
        "no_scores_no_mask": Case(masks=everything, proposals={"scores": False}),
        "no_roi": Case(masks=everything, levels=None),
        "no_box_regression": Case(masks=everything, config={"box_regression": False}),
        "pyramid_mismatch": Case(masks=everything, levels="pyramid_mismatch"),
        "fewer_gt": Case(masks=slice(1)),
        "more_gt": Case(tokens=slice(len(official["out.case_more_gt.counts"])), masks=everything),
        "no_positive": Case(tokens=slice(empty, empty + 1), masks=slice(empty, empty + 1)),
        "no_token": Case(tokens=slice(0)),
        "no_proposal": Case(proposals=no_proposal),
        "all_masked": Case(proposals=all_masked),
        "all_below_threshold": Case(config={"score_threshold": 2.0}),
        "gamma_high": Case(gate=3.0),
        "gamma_negative": Case(gate=-1.0),
        "too_many": Case(config={"score_threshold": 0.0, "max_boxes_per_token": most}),
        "no_limit": Case(config={"score_threshold": 0.0, "max_boxes_per_token": 0}),
    }


def losses_of(
    head: ReleasedFiltrationHead, proposals: RegionProposals, output: FiltrationOutput, masks: torch.Tensor
) -> dict[str, torch.Tensor]:
    config = SparrowConfig(filtration_config=head.config.to_dict())
    return filter_losses(config, [FilteredFrame(0, proposals, output)], masks)


@for_cases("case_", "selector")
def test_case(official: Recording, case: str):
    settings = cases_of(official)[case]
    head = build_head(official, **settings.config)
    if settings.gate is not None:
        head.roi_gate.data.fill_(settings.gate)
    proposals = proposals_of(official, **settings.proposals)
    levels = None if settings.levels is None else pyramid(official, settings.levels)
    tokens = official["in.seg"][settings.tokens or slice(None)]
    if settings.levels == "pyramid_mismatch":
        with pytest.raises(ValueError, match="pyramid channels"):
            head(tokens, proposals, levels)
        levels = fit_channels(levels, official.config["level_in_dims"])
    output = head(tokens, proposals, levels)
    official.check(f"case_{case}.refined", output.tokens)
    boxes = official["in.prop_boxes"]
    chosen = [select_boxes(confidence[0], boxes, head.config) for confidence in output.confidence]
    official.check(f"case_{case}.counts", torch.tensor([len(own) for own in chosen], dtype=torch.int64))
    for s, own in enumerate(chosen):
        official.check(f"case_{case}.selected.{s}", boxes[own])
    losses = {}
    if settings.masks is not None:
        # IoU is measured on normalised boxes
        normalised = RegionProposals(**{**proposals, "boxes": boxes[None, : proposals.boxes.shape[1]]})
        masks = official["in.gt_masks"][settings.masks]
        losses = losses_of(head, normalised, output, masks)
        if case == "masked":  # officially a masked proposal may still be a positive of the box loss
            normalised.valid = torch.ones_like(normalised.valid)
            losses["filter_box_loss"] = losses_of(head, normalised, output, masks)["filter_box_loss"]
    check_losses(official, case, losses)
    if case == "train":
        (losses["filter_class_loss"] + losses["filter_box_loss"]).backward()
        renamed = our_names(official.weights, converted(official))
        parameters = dict(head.named_parameters())
        for name in official.names("case_train.grad."):
            official.check_gradient(name, parameters[renamed[name.removeprefix("case_train.grad.")]].grad)


def check_losses(official: Recording, case: str, losses: dict[str, torch.Tensor]):
    for ours, theirs in (("filter_class_loss", "loss"), ("filter_box_loss", "box_loss")):
        official.check(f"case_{case}.has_{theirs}", torch.tensor([ours in losses]))
        name = f"case_{case}.{'proposal_loss' if theirs == 'loss' else theirs}"
        if ours not in losses:
            assert f"out.{name}" not in official
        elif case == "masked" and theirs == "loss":
            assert losses[ours].isfinite()
            official.leave_out(name, "the official loss of masked proposals is not finite; its pipeline masks none")
        else:
            official.check(name, losses[ours])


# ------------------------------------------------------------------ targets, losses and helpers


@folders
def test_targets(official: Recording):
    boxes = boxes_over_time(official["in.gt_masks"])
    official.check("gt_boxes", boxes.nan_to_num(nan=-1.0))  # we say NaN where there is no object
    threshold = official.config["proposal_iou_threshold"]
    iou = pairwise_iou(boxes, official["in.prop_boxes"])
    official.check("targets", filtration_targets(iou, threshold, threshold))


@folders
def test_mask_losses(official: Recording):
    """Ours are per mask; the official ones are means over masks. `_noignore`: the masks without ignored pixels."""
    logits, targets = official["in.loss_pred"], official["in.loss_gt"]
    whole = (targets >= 0).flatten(1).all(1)
    for name, loss in (("bce_loss", mask_bce_loss), ("dice_loss", mask_dice_loss)):
        official.check(name, loss(logits, targets).mean())
        official.check(f"{name}_noignore", loss(logits[whole], targets[whole]).mean())


@folders
def test_prior_scores(official: Recording):
    official.check("prior_scores", box_prior_scores(official["in.prior_masks"][:, 0], official["in.prior_boxes"]))


@folders
def test_aligned_boxes(official: Recording):
    """Two lists of boxes, for one token and for four; no list at all, for two."""
    boxes = official["in.prop_boxes"]
    lists = [boxes[:2], boxes[2:3]]
    for count in (1, 4):
        for k, own in enumerate(align_boxes(lists, count)):
            official.check(f"align_{count}.{k}", own)
    assert align_boxes([], 2) == []  # then [SEG] prompts alone, officially told by empty lists
    for name in official.names("align_empty."):
        official.check(name, boxes[:0])


@folders
def test_states_of_tokens(official: Recording):
    """Hidden states of the marked positions, split by sample; ours are found by the token that follows."""
    states, marked = official["in.last_hidden"], official["in.tok_mask"]
    seg = 1
    ids = torch.cat([torch.zeros(len(marked), 1), marked * seg], dim=1).long()
    states = torch.cat([states, torch.zeros_like(states[:, :1])], dim=1)
    rows_of_first = int((marked.sum(1).cumsum(0) == len(official["out.split.0"])).nonzero()[0]) + 1
    video_index = torch.tensor([int(row >= rows_of_first) for row in range(len(marked))])
    model = SimpleNamespace(
        config=SimpleNamespace(box_token_id=2, seg_token_id=seg, max_training_tokens=None),
        model=SimpleNamespace(token_embeddings=lambda states, token_id: states),
    )
    tokens = SparrowForVideoGrounding._tokens_by_video(model, states, ids, video_index, num_videos=2)
    for video, (_, states_of_seg) in enumerate(tokens):
        official.check(f"split.{video}", states_of_seg)


@folders
def test_positions_of_generated_tokens(official: Recording):
    """The state that predicts a token is the one before it, in a prompt lengthened by visual tokens.

    The ids of the two tokens are not recorded: they are read off the first marked position.
    """
    ids = official["in.gen_ids"]
    for kind in ("seg", "box", "none"):
        expected = official[f"out.gen_{kind}_mask"]
        added = expected.shape[1] - (ids.shape[1] - 1)
        lengthened = torch.cat([torch.zeros(len(ids), added, dtype=ids.dtype), ids], dim=1)
        marked = expected.nonzero()
        token = lengthened[marked[0, 0], marked[0, 1] + 1] if len(marked) else -1
        official.check(f"gen_{kind}_mask", lengthened[:, 1:] == token)


@folders
def test_every_output_is_compared(official: Recording, whole_module):
    assert not official.missing()
