"""The whole model: VideoGLaMM (`full_plain`) and SPARROW (`full_tiny`), training and inference.

`released_config` sets the released rules; frame-wise inference uses its FRAMEWISE options, the video branch
VIDEO_BRANCH (with `memory_dtype=None` in the cases called `_fp32mem`).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from modeling_sparrow.box_ops import pairwise_iou
from modeling_sparrow.conversion.released import FRAMEWISE, VIDEO_BRANCH
from modeling_sparrow.filtration_head import FiltrationOutput, select_boxes
from modeling_sparrow.frame_pyramid import FramePyramid
from modeling_sparrow.losses import boxes_over_time, filter_losses, filtration_targets
from modeling_sparrow.modeling_outputs import AnswerTokens, FilteredFrame, GroundingOutput, LocatedBoxes
from modeling_sparrow.modeling_sparrow import SparrowForVideoGrounding
from modeling_sparrow.region_proposer import RegionProposals
from modeling_sparrow.released_rules import box_prior_scores, decode_box_masks, filter_by_box_prior

from .fixtures import BFLOAT16_TOLERANCE, TOLERANCE, Recording, for_cases, for_families
from .full_model import (
    Batch,
    batch_of,
    build_model,
    detector_picture,
    detector_pixels,
    first_pyramid,
    parameter_names,
    released_rules,
    token_embeddings,
)
from .knife_edges import PromptedMasks, compare_across_knife_edge, holds_for_one, nearby_inputs

FAMILIES = ("full_plain", "full_tiny")
folders = for_families(*FAMILIES)


@pytest.fixture
def model(official: Recording) -> Iterator[SparrowForVideoGrounding]:
    model = build_model(official)
    yield model
    model.eval()
    model.zero_grad()


def resize(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mask logits `(M, N, h, w)` at `size`."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def decode_nothing(model: SparrowForVideoGrounding, pyramid: FramePyramid) -> torch.Tensor:
    """What the decoder makes of the rows that the official code adds to reach a fixed number of tokens.

    Their sparse and dense prompt embeddings are zeros. Returns `(h, w)` logits.
    """
    tracker = model.model.mask_tracker
    features = tracker.features_without_memory(pyramid)
    sparse = features.new_zeros(1, 1, 1, features.shape[1])
    logits, *_ = tracker.decode(pyramid, features, sparse, torch.zeros_like(features), multimask=False)
    return logits[0]


# ------------------------------------------------------------------ boxes


@folders
def test_detector_picture(official: Recording):
    """The preparation of the detector's input that the tests below use."""
    if not official.config["guidance"]:
        pytest.skip("no detector in this folder")
    picture, resized = detector_picture(official, official["in.sam_video"][0])
    official.check("detector_picture", torch.from_numpy(picture))
    (name,) = official.names("detector_picture_")
    stride = int(name.split("every")[-1])
    official.check(name, torch.from_numpy(resized[::stride, ::stride]))


def check_proposals(official: Recording, name: str, proposals: RegionProposals):
    """Depends on how Pillow rounds the detector's picture: with another version of it these may be what differs."""
    for output, value in (("boxes", proposals.boxes), ("scores", proposals.scores), ("mask", proposals.valid)):
        official.check(f"{name}.{output}", value[0])
    if f"out.{name}.features" in official:
        official.check(f"{name}.features", proposals.features[0])


def check_refinement(
    official: Recording, model: SparrowForVideoGrounding, name: str, output: FiltrationOutput
) -> list[torch.Tensor]:
    """Embeddings after attending to the proposals, and the chosen boxes, which are returned."""
    official.check(f"{name}.refined", output.tokens)
    boxes = []
    for s, (confidence, own) in enumerate(zip(output.confidence[:, 0], output.boxes[:, 0], strict=True)):
        boxes.append(own[select_boxes(confidence, own, model.config.filtration_config)])
        official.check(f"{name}.selected.{s}", boxes[-1])
    return boxes


@torch.no_grad()
def check_location(
    official: Recording,
    model: SparrowForVideoGrounding,
    name: str,
    batch: Batch,
    embeddings: list[tuple[torch.Tensor, torch.Tensor]],
    mask_labels: list[torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Proposals, choice and their losses, for each video with tokens: `rec.proposals.<n>`, `rec.refine.<n>`, …

    Args:
        embeddings: [BOX] and [SEG] embeddings of each video.

    Returns:
        the chosen boxes of all tokens.
    """
    chosen = []
    with_tokens = [v for v, (box, seg) in enumerate(embeddings) if len(box) or len(seg)]
    for n, v in enumerate(with_tokens):
        box, seg = embeddings[v]
        queries = box if len(box) else seg
        pyramid = first_pyramid(model, batch.frames[v])
        proposals = model.model.propose(pyramid, detector_pixels(official, batch.frames[v][0]))
        check_proposals(official, f"{name}.rec.proposals.{n}", proposals)
        output = model.model.filter(queries, proposals, pyramid)
        chosen += check_refinement(official, model, f"{name}.rec.refine.{n}", output)
        if mask_labels is not None:
            config = model.config.filtration_config
            targets = boxes_over_time(mask_labels[v][: len(queries)])
            iou = pairwise_iou(targets, proposals.boxes[0])
            labels = filtration_targets(iou, config.positive_iou, config.negative_iou)
            official.check(f"{name}.rec.proposal_targets.{n}", labels)
            losses = filter_losses(model.config, [FilteredFrame(0, proposals, output)], mask_labels[v])
            official.check(f"{name}.rec.refine.{n}.loss", losses["filter_class_loss"])
            if config.box_regression:
                official.check(f"{name}.rec.refine.{n}.box_loss", losses["filter_box_loss"])
    return chosen


# ------------------------------------------------------------------ training


def check_embeddings(
    official: Recording, model: SparrowForVideoGrounding, name: str, batch: Batch, states: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`rec.token_embeddings`: all tokens of each video, also those beyond `max_training_tokens`.

    Returns [BOX] and [SEG] embeddings of each video, as many as are grounded.
    """
    config = model.config
    kinds = {
        kind: token_embeddings(model, batch, states, token_id)
        for kind, token_id in ((0, config.seg_token_id), (1, config.box_token_id))
    }
    for kind, embeddings in kinds.items():
        for v, own in enumerate(embeddings):
            official.check(f"{name}.rec.token_embeddings.{kind}.{v}", own)
    limit = config.max_training_tokens
    return [(box[:limit], seg[:limit]) for box, seg in zip(kinds[1], kinds[0], strict=True)]


@folders
@pytest.mark.parametrize("case", ["train", "train_edge"])
def test_training(official: Recording, model: SparrowForVideoGrounding, case: str):
    """Losses and gradients in training mode; the detector is frozen."""
    num_frames = official["in.gt0"].shape[1] if case == "train" else None
    batch = batch_of(official, model.config, case, num_frames)
    if case == "train":
        mask_labels = [official["in.gt0"], official["in.gt1"]]
    else:  # the second sample has no [SEG]
        mask_labels = [official["in.gt_edge"], official["in.gt_edge"][:0]]
    kind = "guided" if official.config["guidance"] else "unguided"

    def compare(inputs: dict[str, torch.Tensor]):
        model.zero_grad()
        check_training(official, model, case, batch, inputs, mask_labels)

    with released_rules(official, model, kind):
        inputs = batch.inputs(official, model.config)
        holds_for_one(nearby_inputs(inputs, ("spatial_pixel_values", "mask_pixel_values")), compare)


def check_training(
    official: Recording,
    model: SparrowForVideoGrounding,
    case: str,
    batch: Batch,
    inputs: dict[str, torch.Tensor],
    mask_labels: list[torch.Tensor],
):
    model.train()
    output = model(**inputs, labels=batch.rows.labels, mask_labels=mask_labels, output_hidden_states=[-1])
    check_mask_logits(official, model, case, batch, mask_labels, output.mask_logits)
    output.loss.backward()
    model.eval()
    check_training_losses(official, model, case, output)
    embeddings = check_embeddings(official, model, case, batch, output.hidden_states[-1])
    assert torch.equal(output.seg_embeddings, torch.cat([seg for _, seg in embeddings]))
    if model.config.box_guidance:
        boxes = check_location(official, model, case, batch, embeddings, mask_labels)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(boxes, output.boxes, strict=True))
    parameters = dict(model.named_parameters())
    for name in official.names(f"{case}.grad."):
        parameter = parameters[parameter_names(official)[name.removeprefix(f"{case}.grad.")]]
        official.check_gradient(name, parameter.grad)


def check_training_losses(official: Recording, model: SparrowForVideoGrounding, case: str, output):
    """The official code reports losses with their weights, those of the proposals without; 0 where there is none."""
    config = model.config
    bce = config.mask_bce_loss_weight * output.mask_bce_loss
    dice = config.mask_dice_loss_weight * output.mask_dice_loss
    zero = torch.zeros(1)
    for name, value in (
        ("loss", output.loss),
        ("ce_loss", config.ce_loss_weight * output.ce_loss),
        ("mask_bce_loss", bce),
        ("mask_dice_loss", dice),
        ("mask_loss", bce + dice),
        ("proposal_loss", zero if output.filter_class_loss is None else output.filter_class_loss),
        ("proposal_box_loss", zero if output.filter_box_loss is None else output.filter_box_loss),
    ):
        official.check(f"{case}.{name}", value)


def check_mask_logits(
    official: Recording,
    model: SparrowForVideoGrounding,
    case: str,
    batch: Batch,
    mask_labels: list[torch.Tensor],
    mask_logits: torch.Tensor,
):
    """`rec.mask_logits.<n>`: `(tokens, 1, H, W)` of each frame of each video, unguided with rows of empty prompts."""
    call = start = 0
    limit = model.config.max_training_tokens
    for frames, labels in zip(batch.frames, mask_labels, strict=True):
        count = min(len(labels), limit)
        own = mask_logits[start : start + count]  # (S, T, h, w)
        start += count
        for t in range(len(frames) if count else 0):
            name = f"{case}.rec.mask_logits.{call}"
            call += 1
            rows = list(own[:, t])
            with torch.no_grad():
                nothing = decode_nothing(model, model.model.mask_tracker.encode_frames(frames[t : t + 1]))
            rows += [nothing] * (len(official[f"out.{name}"]) - count)
            official.check(name, resize(torch.stack(rows)[:, None], labels.shape[-2:]))


# ------------------------------------------------------------------ forward in evaluation mode


@for_cases("forward_", *FAMILIES)
@torch.no_grad()
def test_forward(official: Recording, model: SparrowForVideoGrounding, case: str):
    """`forward` as the official evaluation loss uses it: masks of the tokens in the rows, no labels."""
    name = f"forward_{case}"
    picture, _, kind = case.partition("_")
    inputs_of = name if case == "no_seg" else f"forward_{picture}"
    kind = "unguided" if case == "no_seg" else kind
    expected = official[f"out.{name}.pred_masks"]
    T, size = len(expected), expected.shape[-2:]
    batch = batch_of(official, model.config, inputs_of, T)
    with released_rules(official, model, kind):
        inputs = batch.inputs(official, model.config)
        output = model(**inputs, original_sizes=torch.tensor([size]), output_hidden_states=[-1])
        embeddings = check_embeddings(official, model, name, batch, output.hidden_states[-1])
        if kind != "unguided":
            boxes = check_location(official, model, name, batch, embeddings)
            if kind == "guided_prior":
                boxes = check_box_prior(official, model, name, batch.frames[0], boxes, size)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(boxes, output.boxes, strict=True))
    # rows up to a fixed number of tokens: zeros with boxes or without any token, otherwise empty prompts
    masks = torch.zeros_like(expected)
    if output.mask_logits is None:
        assert case == "no_seg"
    else:
        count = len(output.mask_logits)
        masks[:, :count] = resize(output.mask_logits.transpose(0, 1), size)
        if kind == "unguided":
            for t in range(T):
                pyramid = model.model.mask_tracker.encode_frames(batch.frames[0][t : t + 1])
                masks[t, count:] = resize(decode_nothing(model, pyramid)[None, None], size)[0]
    official.check(f"{name}.pred_masks", masks)


# ------------------------------------------------------------------ box prior


def check_prior_masks(
    official: Recording,
    model: SparrowForVideoGrounding,
    name: str,
    pyramid: FramePyramid,
    boxes: torch.Tensor,
    size: tuple[int, int],
):
    """Masks of single boxes, thresholded at the size of the video and then resized to a small grid.

    Cells that saw a pixel whose logit is within the tolerance of zero are not compared.
    """
    tracker = model.model.mask_tracker
    decoded = []

    def decode(*args, **kwargs):
        decoded.append(type(tracker).decode(tracker, *args, **kwargs))
        return decoded[-1]

    with mock.patch.object(tracker, "decode", decode):
        masks = decode_box_masks(tracker, pyramid, boxes, size)
    doubtful = resize(decoded[0][0][:, None], size).abs() < TOLERANCE
    doubtful = resize(doubtful.float(), masks.shape[-2:]) > 0
    official.check(name, masks[:, None], where=~doubtful)


def check_box_prior(
    official: Recording,
    model: SparrowForVideoGrounding,
    name: str,
    frames: torch.Tensor,
    boxes: list[torch.Tensor],
    size: tuple[int, int],
) -> list[torch.Tensor]:
    """`rec.prior.<k>` of each token; returns the boxes that stay."""
    pyramid = first_pyramid(model, frames)
    kept = []
    for k, own in enumerate(boxes):
        prior = f"{name}.rec.prior.{k}"
        check_prior_masks(official, model, f"{prior}.masks", pyramid, own, size)
        official.check(f"{prior}.scores", box_prior_scores(official[f"out.{prior}.masks"][:, 0], own))
        tracker, config = model.model.mask_tracker, model.config.filtration_config
        kept.append(own[filter_by_box_prior(tracker, pyramid, own, tuple(size), config)])
    return kept


@folders
@torch.no_grad()
def test_box_prior_masks(official: Recording, model: SparrowForVideoGrounding):
    """Three boxes in pixels of the video, the last as position and size."""
    if not official.config["guidance"]:
        pytest.skip("no detector in this folder")
    official.leave_out("box_prior_boxes", "what the routine was given")
    pyramid = first_pyramid(model, official["in.sam_video"])
    H, W = size = official["out.inference_framewise_guided.masks"].shape[-2:]
    boxes = official["out.box_prior_boxes"] / torch.tensor([W, H, W, H])
    check_prior_masks(official, model, "box_prior_masks", pyramid, boxes, size)


# ------------------------------------------------------------------ inference


@dataclass
class Answer:
    """One run of `ground`, and what passed through on the way.

    Args:
        selected: boxes of each token before the box prior.
        located: after it.
    """

    output: GroundingOutput
    tokens: AnswerTokens
    selected: list[torch.Tensor] = field(default_factory=list)
    located: list[LocatedBoxes] = field(default_factory=list)

    def mask_logits(self, size: tuple[int, int]) -> torch.Tensor:
        """`(T, N, 1, H, W)`."""
        logits = torch.stack([found.mask_logits for found in self.output.objects[0]], dim=1)
        return resize(logits, size)[:, :, None]


@contextmanager
def watched(model: SparrowForVideoGrounding, seen: dict) -> Iterator[None]:
    """Keep the embeddings of the answer and the located boxes, before the box prior changes them."""

    def read_answer(*args) -> AnswerTokens:
        seen["tokens"] = type(model)._read_answer(model, *args)
        return seen["tokens"]

    def locate(*args) -> list[LocatedBoxes]:
        seen["located"] = type(model).locate(model, *args)
        seen["selected"] = [place.boxes for place in seen["located"]]
        return seen["located"]

    with mock.patch.object(model, "_read_answer", read_answer), mock.patch.object(model, "locate", locate):
        yield


def ground(
    official: Recording, model: SparrowForVideoGrounding, batch: Batch, num_tokens: int, size: tuple[int, int]
) -> Answer:
    inputs = batch.inputs(official, model.config)
    seen = {}
    with watched(model, seen):
        output = model.ground(
            **inputs, original_sizes=torch.tensor([size]), max_new_tokens=num_tokens, do_sample=False
        )
    return Answer(output, **seen)


def video_options(branch: str, exact_memory: bool) -> dict:
    if branch == "framewise":
        return FRAMEWISE
    return VIDEO_BRANCH | ({"memory_dtype": None} if exact_memory else {})


@for_cases("inference_", *FAMILIES)
def test_inference(official: Recording, model: SparrowForVideoGrounding, case: str):
    """`ground`: generated text, boxes and masks on all frames."""
    name = f"inference_{case}"
    branch, kind, rest = re.fullmatch(r"(framewise|video_branch)_(guided_prior|guided|unguided)(.*)", case).groups()
    batch = batch_of(official, model.config, "generate")
    tracker = model.model.mask_tracker
    if rest == "_as_released":
        check_that_boxes_work(official, model, name, batch)
        return
    expected = official[f"out.{name}.masks"]
    size = expected.shape[-2:]
    prompt = official["in.generate_input_ids"]
    num_tokens = official[f"out.{name}.output_ids"].shape[1] - prompt.shape[1]
    rounded = branch == "video_branch" and not rest.endswith("_fp32mem")
    tolerance = BFLOAT16_TOLERANCE if rounded else TOLERANCE

    def compare(answer: Answer, prompted: PromptedMasks):
        logits = answer.mask_logits(size)
        recorded = "mask_logits" if branch == "framewise" else "video_logits"
        official.check(f"{name}.rec.{recorded}", logits, tolerance)
        official.check_mask(f"{name}.masks", logits[:, :, 0], tolerance)

    def run() -> Answer:
        answers.append(ground(official, model, batch, num_tokens, size))
        return answers[-1]

    answers: list[Answer] = []
    with released_rules(official, model, kind, **video_options(branch, not rounded)):
        compare_across_knife_edge(tracker, run, compare)
        check_answer(official, model, name, answers[0], prompt)
        if kind == "guided_prior":
            kept = check_box_prior(official, model, name, batch.frames[0], answers[0].selected, size)
            assert all(torch.equal(a, b.boxes) for a, b in zip(kept, answers[0].located, strict=True))


def check_answer(
    official: Recording, model: SparrowForVideoGrounding, name: str, answer: Answer, prompt: torch.Tensor
):
    """Generated ids, embeddings, boxes. Official ids begin with the prompt, placeholders and all."""
    official.check(f"{name}.output_ids", torch.cat([prompt, answer.output.sequences], dim=1))
    official.check(f"{name}.n_frames", torch.tensor(answer.output.num_frames))
    embeddings = {0: answer.tokens.seg, 1: answer.tokens.box}
    if answer.located:  # those that queried the proposals are overwritten in the recorded list
        refined = torch.stack([place.token for place in answer.located])
        official.check(f"{name}.rec.refine.0.refined", refined)
        embeddings[1 if len(answer.tokens.box) else 0] = refined
    for kind, value in embeddings.items():
        official.check(f"{name}.rec.token_embeddings.{kind}.0", value)
    official.check(f"{name}.debug.enabled", torch.tensor([bool(answer.located)]))
    if not answer.located:
        return
    check_proposals(official, f"{name}.debug.proposals", answer.located[0].proposals)
    for k, (place, selected) in enumerate(zip(answer.located, answer.selected, strict=True)):
        official.check(f"{name}.rec.refine.0.selected.{k}", selected)
        official.check(f"{name}.debug.before.{k}", selected)
        official.check(f"{name}.debug.after.{k}", place.boxes)


def check_that_boxes_work(official: Recording, model: SparrowForVideoGrounding, name: str, batch: Batch):
    """The official video branch raises AttributeError as soon as there is a box; nothing to compare, ours answers."""
    official.check(f"{name}.attribute_error", torch.tensor([True]))
    official.check(f"{name}.mentions_missing_method", torch.tensor([True]))
    size = official["out.inference_video_branch_unguided.masks"].shape[-2:]
    num_tokens = official["out.inference_video_branch_unguided.output_ids"].shape[1]
    with released_rules(official, model, "guided", **VIDEO_BRANCH):
        answer = ground(official, model, batch, num_tokens - official["in.generate_input_ids"].shape[1], size)
    assert answer.located and answer.mask_logits(size).isfinite().all()


@folders
def test_every_output_is_compared(official: Recording, whole_module):
    assert not official.missing()
