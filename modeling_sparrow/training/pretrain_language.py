"""From scratch, language side of sparrow-tiny: questions to [BOX] and [SEG] embeddings that find the right region.

Stage "text": no visual tokens, the question alone has to pick the region by its SAM2 features. Stages "visual" and
"motion": with them, and with attention led to the tokens of the target and of what the question refers to, which is
what makes questions about motion and relations learnable. What is not there is denied in words. The second is a second
pass over new clips; "polish" is a third, slower, with all kinds of questions alike.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sparrow_processing import SparrowProcessor
from sparrow_processing.synthetic import PRESETS, SyntheticClip, WorldConfig
from sparrow_processing.synthetic.answers import NO_ANSWER

from ..box_ops import pairwise_iou, xyxy_to_cxcywh
from ..filtration_head import FiltrationOutput, apply_box_offsets
from ..frame_pyramid import FramePyramid
from ..losses import box_regression_loss, filtration_class_loss, filtration_targets, mask_bce_loss, mask_dice_loss
from ..mask_tracker import MaskPrompt
from ..modeling_sparrow import SparrowForVideoGrounding
from ..region_proposer import RegionProposals
from .loop import computes_in_bfloat16, run_stage, share_of
from .object_facts import EVENT_NAMES, MOST_RANKS, RANK_NAMES, ObjectFacts, object_facts
from .packed_questions import (
    WELL_SEEN,
    PackedQuestions,
    Question,
    answer_ids,
    draw_questions,
    is_askable,
    pack_questions,
    shared_ids,
)
from .pretrain_segmenter import JITTER, PixelSide, batch_clips, encode_frozen
from .pretrain_towers import (
    MOTION_WORDS,
    PatchOwners,
    as_seen,
    frame_owners,
    head_loss,
    patch_owner,
    patch_targets,
    spatial_input,
    temporal_input,
    tubelet_owners,
)
from .question_facts import QuestionHeads

# Added to the seed of a run, so that no stage sees the clips of another.
STREAMS = {"text": 3, "visual": 4, "motion": 6, "polish": 8}
# kinds that a model learns last: what else there is has to be found, or counted, first
LATE_KINDS = ("relation", "ordinal", "meeting", "event", "none")

# kinds that ask how one thing looks, and by what
LOOKS = {"class": ("noun",), "colour": ("colour",), "colour_class": ("noun", "colour")}

# of the losses that keep what the visual tokens tell
PATCH_WEIGHT = {
    "box": 1.0,
    "direction": 1.0,
    "noun": 0.3,
    "colour": 0.3,
    "size": 0.3,
    "speed": 0.3,
    "action": 0.5,
    "events": 1.0,
    "partner": 1.0,
    "ranks": 1.0,
}


class LanguageSide(nn.Module):
    """What the language stages train, beside throw-away heads; the pixel side is frozen and not registered here.

    Args:
        attributes: whether the attribute embeddings of the pixel side are trained.
        towers: whether the towers learn along.
    """

    def __init__(
        self,
        model: SparrowForVideoGrounding,
        processor: SparrowProcessor,
        pixel_side: PixelSide,
        attributes: bool = False,
        towers: bool = False,
    ):
        super().__init__()
        if towers:
            self.spatial_tower, self.temporal_tower = model.model.host.spatial_tower, model.model.host.temporal_tower
        self.language_model = model.model.host.language_model
        self.adapters = nn.ModuleList([model.model.host.spatial_adapter, model.model.host.temporal_adapter])
        self.box_head, self.seg_head = model.model.box_head, model.model.seg_head
        self.filtration_head = model.model.filtration_head
        size = model.config.prompt_size
        self.words = pixel_side.words | MOTION_WORDS
        looks = {name: pixel_side.words[name] for name in ("noun", "colour")}
        # of [BOX] embeddings: where their target is, and what it looks like, whether the question says so or not
        self.box_regressor = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 4))
        self.look_heads = nn.ModuleDict({name: nn.Linear(size, len(own)) for name, own in looks.items()})
        size = model.config.text_config.hidden_size
        self.name_heads, self.question_heads = QuestionHeads(size, looks, False), QuestionHeads(size, looks, True)
        # of the visual tokens as they come from the adapters, and as attention to the target reads them
        self.patch_heads = nn.ModuleList(PatchHeads(size, self.words) for _ in range(2))
        self.knows_attributes = attributes
        self.frozen = {"model": model, "processor": processor, "pixels": pixel_side}

    @property
    def model(self) -> SparrowForVideoGrounding:
        return self.frozen["model"]

    @property
    def processor(self) -> SparrowProcessor:
        return self.frozen["processor"]


class PatchHeads(nn.Module):
    """Throw-away heads on visual tokens `(…, D)`: what the object of a token is, where, and what becomes of it."""

    def __init__(self, size: int, words: dict[str, tuple[str, ...]]):
        super().__init__()
        looks = {name: len(own) for name, own in words.items() if name not in MOTION_WORDS}
        looks |= {"box": 4, "ranks": len(RANK_NAMES) * MOST_RANKS}
        doings = {name: len(own) for name, own in MOTION_WORDS.items()}
        doings |= {"events": len(EVENT_NAMES), "partner": len(words["colour"])}
        self.spatial = nn.ModuleDict({name: nn.Linear(size, count) for name, count in looks.items()})
        self.temporal = nn.ModuleDict({name: nn.Linear(size, count) for name, count in (looks | doings).items()})


@dataclass
class LanguageStates:
    """What the language model makes of `S` packed questions.

    Args:
        box, seg: `(S, D)` states that predict [BOX] and [SEG].
        text_loss: of the next token.
        decision_loss: of the first word of the answer, which says whether there is an object.
        says_none: `(S,)` bool, whether the first word that the model would say is that there is none.
        name, query: `(S, D)` states of the [BOX] positions as they enter the last layer but two, and but one: from
            them the anchor and the target are looked for.
        tokens, clips: `(C, prefix, D)` the shared prefix of each clip as it enters the first layer, and that one.
        attention: `(S, heads, prefix)` of the [BOX] states in that layer onto the prefix; in training with video.
        anchor_attention: the same in the layer before.
    """

    box: torch.Tensor
    seg: torch.Tensor
    text_loss: torch.Tensor
    decision_loss: torch.Tensor
    says_none: torch.Tensor
    name: torch.Tensor
    query: torch.Tensor
    tokens: torch.Tensor
    clips: torch.Tensor
    attention: torch.Tensor | None = None
    anchor_attention: torch.Tensor | None = None


def language_states(
    side: LanguageSide, clips: list[SyntheticClip], questions: list[Question], with_video: bool
) -> LanguageStates:
    """Run the language model over the packed questions, which are put in the order of the states."""
    prefix = shared_ids(side.processor, len(clips[0].frames) if with_video else 0)
    packed = pack_questions(side.processor, side.model.config, prefix, len(clips), questions)
    questions[:] = packed.order
    with torch.autocast("cpu", torch.bfloat16, enabled=side.training and computes_in_bfloat16()):
        output = side.language_model(
            inputs_embeds=_embed(side, packed.ids, clips, with_video),
            attention_mask=packed.mask,
            position_ids=packed.positions,
            output_hidden_states=True,
        )
    tokens, *_, early, middle, _, hidden = (states.float() for states in output.hidden_states)
    attention = anchor_attention = None
    if with_video and side.training:  # it is supervised
        anchor_attention = _attention_onto_prefix(side, -3, early, packed)
        attention = _attention_onto_prefix(side, -2, middle, packed)
    box_at, seg_at, first_at = (tuple(zip(*places, strict=True)) for places in (packed.box, packed.seg, packed.first))
    scores = output.logits[:, :-1].flatten(0, 1).float()
    first_scores = output.logits[first_at].float()
    first_words = packed.labels[first_at[0], [column + 1 for column in first_at[1]]]
    denial = answer_ids(side.processor, NO_ANSWER)[0]
    return LanguageStates(
        box=hidden[box_at],
        seg=hidden[seg_at],
        text_loss=F.cross_entropy(scores, packed.labels[:, 1:].flatten(), ignore_index=-100),
        decision_loss=F.cross_entropy(first_scores, first_words),
        says_none=first_scores.argmax(-1) == denial,
        name=early[box_at],
        query=middle[box_at],
        tokens=tokens[:, : packed.prefix],
        clips=middle[:, : packed.prefix],
        attention=attention,
        anchor_attention=anchor_attention,
    )


def _attention_onto_prefix(
    side: LanguageSide, index: int, states: torch.Tensor, packed: PackedQuestions
) -> torch.Tensor:
    """Attention `(S, heads, prefix)` of the [BOX] positions in one layer, from the states `(C, L, D)` that enter it:
    what the layer computes, for these positions alone."""
    model = side.language_model.model
    layer = model.layers[index]
    states = layer.input_layernorm(states)
    cos, sin = model.rotary_emb(states, packed.positions)
    width = layer.self_attn.head_dim
    key = layer.self_attn.k_proj(states).unflatten(-1, (-1, width))
    rows, columns = (list(places) for places in zip(*packed.box, strict=True))
    query = layer.self_attn.q_proj(states[rows, columns]).unflatten(-1, (-1, width))
    key, _ = apply_rotary_pos_emb(key, key, cos, sin, unsqueeze_dim=2)
    query, _ = apply_rotary_pos_emb(query, query, cos[rows, columns], sin[rows, columns], unsqueeze_dim=1)
    parts = []
    for number in sorted(set(rows)):  # questions lie clip by clip
        own = [s for s, row in enumerate(rows) if row == number]
        scores = torch.einsum("shd,lhd->shl", query[own], key[number]) * layer.self_attn.scaling
        seen = packed.mask[number, 0, [columns[s] for s in own]][:, None]
        parts.append((scores + seen).softmax(-1)[..., : packed.prefix])
    return torch.cat(parts)


def _embed(side: LanguageSide, ids: torch.Tensor, clips: list[SyntheticClip], with_video: bool) -> torch.Tensor:
    host = side.model.model.host
    if not with_video:
        return host.embed(ids)
    frames = np.concatenate([clip.frames for clip in clips])
    counts = torch.tensor([len(clip.frames) for clip in clips])
    return host.embed(ids, spatial_input(frames), temporal_input(frames), counts)


def frozen_pixels(side: LanguageSide, clips: list[SyntheticClip], frame: int) -> tuple[FramePyramid, RegionProposals]:
    """Pyramid and proposals of one frame of each clip."""
    pixels: PixelSide = side.frozen["pixels"]
    with torch.no_grad():
        pyramid = encode_frozen(pixels.mask_tracker, np.stack([clip.frames[frame] for clip in clips]))
        return pyramid, pixels.region_proposer.propose(list(pyramid.levels))


def true_boxes(clips: list[SyntheticClip], frame: int) -> list[torch.Tensor]:
    """Normalised xyxy boxes of the objects of each clip on one frame, NaN where hidden."""
    H, W = clips[0].frames.shape[1:3]
    size = torch.tensor([W, H, W, H], dtype=torch.float32)
    return [torch.from_numpy(clip.boxes[:, frame]) / size for clip in clips]


def add_true_boxes(proposals: RegionProposals, boxes: list[torch.Tensor]) -> RegionProposals:
    """Proposals and jittered true boxes together, so that every target has a good region while training."""
    longest = max(len(box) for box in boxes)
    extra = torch.zeros(len(boxes), longest, 4)
    valid = torch.zeros(len(boxes), longest, dtype=torch.bool)
    for row, box in enumerate(boxes):
        extra[row, : len(box)] = torch.nan_to_num(box) + torch.randn_like(box) * 0.015
        valid[row, : len(box)] = ~torch.isnan(box[:, 0])
    width = proposals.features.shape[-1]
    return RegionProposals(
        boxes=torch.cat([proposals.boxes, extra], dim=1),
        scores=torch.cat([proposals.scores, torch.full(valid.shape, 0.8)], dim=1),
        features=torch.cat([proposals.features, torch.zeros(*valid.shape, width)], dim=1),
        valid=torch.cat([proposals.valid, valid], dim=1),
    )


def region_features(
    side: LanguageSide, proposals: RegionProposals, pyramid: FramePyramid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled regions and region tokens of the proposals, see [`FiltrationHead.encode_regions`]."""
    tracker = side.frozen["pixels"].mask_tracker
    levels = [*pyramid.levels[:-1], tracker.features_without_memory(pyramid).detach()]
    return side.filtration_head.encode_regions(proposals.boxes, levels)


def filter_scores(
    side: LanguageSide,
    tokens: torch.Tensor,
    clip_of: list[int],
    proposals: RegionProposals,
    features: tuple[torch.Tensor, torch.Tensor],
) -> FiltrationOutput:
    """Filtration of every question over the proposals of its own clip: logits `(S, Q)`, boxes `(S, Q, 4)`."""
    regions, region_tokens = features
    logits, boxes = [], []
    for number in sorted(set(clip_of)):
        own = [s for s, clip in enumerate(clip_of) if clip == number]
        part = slice(number, number + 1)
        score, offsets = side.filtration_head.score(tokens[own], regions[part], region_tokens[part])
        logits.append(score[:, 0].masked_fill(~proposals.valid[part], float("-inf")))
        boxes.append(apply_box_offsets(proposals.boxes[part], offsets)[:, 0])
    logits, boxes = torch.cat(logits), torch.cat(boxes)
    power = side.filtration_head.config.objectness_power
    confidence = logits.sigmoid() * proposals.scores[clip_of] ** power
    return FiltrationOutput(logits=logits, confidence=confidence, boxes=boxes)


def visible_targets(questions: list[Question], clips: list[SyntheticClip], frame: int) -> list[list[int]]:
    """Objects that each question means and that the frame shows."""
    return [[n for n in q.targets if clips[q.clip].visibility[n, frame] > WELL_SEEN] for q in questions]


def filter_loss(
    side: LanguageSide, output: FiltrationOutput, proposals: RegionProposals, clip_of: list[int], targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Keep score as in the paper, a ranking term, and box refinement.

    The ranking term is a softmax over the proposals of a target, all that lie on no target, and "nothing" with
    logit 0: a target has to win against both, and "nothing" has to win where there is no target.

    Args:
        targets: `(S, M, 4)` normalised xyxy, NaN where a question means fewer than `M` objects.
    """
    rules = side.filtration_head.config
    candidates, valid = proposals.boxes[clip_of], proposals.valid[clip_of]
    iou = torch.nan_to_num(pairwise_iou(candidates, targets))  # (S, Q, M)
    best, owner = iou.max(-1)
    labels = filtration_targets(best, rules.positive_iou, rules.negative_iou).masked_fill(~valid, -1.0)
    positive = labels == 1
    wrong = output.logits.masked_fill(positive, float("-inf"))
    wrong = torch.cat([wrong, torch.zeros_like(wrong[:, :1])], dim=-1).logsumexp(-1)  # (S,), with "nothing"
    own = positive[..., None] & (owner[..., None] == torch.arange(targets.shape[1]))  # (S, Q, M)
    s, m = own.any(1).nonzero(as_tuple=True)
    right = output.logits[s].masked_fill(~own[s, :, m], float("-inf")).logsumexp(-1)
    absent = targets.isnan().all(-1).all(-1)
    ranking = torch.cat([F.softplus(wrong[s] - right), wrong[absent]])
    ranking = ranking.sum() / max(len(ranking), 1)  # there may be no proposal on any target
    chosen = targets.gather(1, owner[..., None].expand(-1, -1, 4))[positive]
    boxes = box_regression_loss(output.boxes[positive], chosen)
    return {"filter": filtration_class_loss(output.logits, labels), "ranking": ranking, "box": boxes}


def absence_loss(
    side: LanguageSide,
    tokens: torch.Tensor,
    questions: list[Question],
    clips: list[SyntheticClip],
    proposals: RegionProposals,
    features: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Questions about the look of one thing, put to the regions of the other clips: where no object looks so,
    "nothing" (logit 0) has to win. This is how rare words meet enough things that they do not mean."""
    asked = [row for row, question in enumerate(questions) if question.expression.kind in LOOKS]
    absent = torch.zeros(len(asked), len(clips), dtype=torch.bool)
    for place, row in enumerate(asked):
        question = questions[row]
        words = LOOKS[question.expression.kind]
        target = clips[question.clip].objects[question.targets[0]]
        for number, clip in enumerate(clips):
            alike = [all(getattr(thing, word) == getattr(target, word) for word in words) for thing in clip.objects]
            absent[place, number] = not any(alike)  # never so in its own clip
    if not absent.any():
        return tokens.sum() * 0.0
    logits, _ = side.filtration_head.score(tokens[asked], *features)
    logits = logits.masked_fill(~proposals.valid, float("-inf"))[absent]
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=-1).logsumexp(-1).mean()


def language_step(
    step: int,
    side: LanguageSide,
    worlds: list[WorldConfig],
    clips: int,
    per_clip: int,
    seed: int,
    with_video: bool,
    favoured: tuple[str, ...],
    seg_every: int,
    share: tuple[int, int] = (0, 1),
) -> dict[str, torch.Tensor]:
    """
    Args:
        clips: of a step.
        share: rank and number of the processes that share them.
    """
    rank, processes = share
    draw = step * processes + rank
    rng = np.random.default_rng([seed, draw])
    torch.manual_seed(seed * 1_000_003 + draw)
    world = worlds[step % len(worlds)]
    batch = batch_clips(draw, clips // processes, seed, world)
    watched = [as_seen(clip, side.model.config.num_frames) for clip in batch]
    frame = 0 if rng.random() < 0.65 else int(rng.choice(side.model.candidate_frames(world.num_frames)))
    boxes = true_boxes(batch, frame)
    is_allowed = functools.partial(is_askable, frame=frame, with_video=with_video)
    questions = draw_questions(side.processor, batch, per_clip, rng, is_allowed, favoured)
    states = language_states(side, watched, questions, with_video)
    clip_of = [q.clip for q in questions]
    seen = visible_targets(questions, batch, frame)
    targets = torch.full((len(questions), max(map(len, boxes)), 4), float("nan"))
    for row, (question, own) in enumerate(zip(questions, seen, strict=True)):
        targets[row, : len(own)] = boxes[question.clip][own]
    pyramid, proposals = frozen_pixels(side, batch, frame)
    if rng.random() < 0.6:
        proposals = add_true_boxes(proposals, boxes)
    tokens = side.box_head(states.box)
    features = region_features(side, proposals, pyramid)
    losses = filter_loss(side, filter_scores(side, tokens, clip_of, proposals, features), proposals, clip_of, targets)
    losses["absence"] = absence_loss(side, tokens, questions, batch, proposals, features)
    losses["text"], losses["decision"] = states.text_loss, states.decision_loss
    loss = 2 * losses["filter"] + losses["ranking"] + losses["box"] + 0.3 * losses["absence"]
    loss = loss + 0.2 * losses["text"] + 0.5 * losses["decision"]
    if step % seg_every == 0:
        losses["seg"] = seg_loss(side, side.seg_head(states.seg), batch, questions, seen, frame, pyramid)
        loss = loss + 0.5 * losses["seg"]
    if with_video:
        losses["regressor"], losses["looks"] = target_losses(side, tokens, questions, batch)
        loss = loss + 1.5 * losses["regressor"] + 0.1 * losses["looks"]
        meant = [q.targets for q in questions]
        losses["attention"] = attention_loss(side, states.attention, watched, clip_of, meant)
        anchors = [() if q.expression.anchor_id is None else (q.expression.anchor_id,) for q in questions]
        losses["anchor"] = attention_loss(side, states.anchor_attention, watched, clip_of, anchors)
        losses["names"] = side.name_heads.loss(states.name, batch, questions)
        losses["words"] = side.question_heads.loss(states.query, batch, questions)
        facts = [object_facts(clip, side.words["colour"]) for clip in batch]
        other = int(rng.integers(len(watched[0].frames)))
        losses["tokens"], losses["patches"] = patch_losses(side, (states.tokens, states.clips), watched, facts, other)
        loss = loss + 0.6 * losses["attention"] + 1.0 * losses["anchor"]
        loss = loss + 0.2 * losses["names"] + 0.2 * losses["words"] + 0.1 * losses["tokens"] + 0.2 * losses["patches"]
    return {"loss": loss, **losses}


def target_losses(
    side: LanguageSide, tokens: torch.Tensor, questions: list[Question], clips: list[SyntheticClip]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the [BOX] embeddings of questions with one target: distance of the box that they tell from the target's on
    the frame that would be prompted, the first candidate that shows it; cross-entropy of its noun and colour."""
    rows, boxes, things = [], [], []
    for row, question in enumerate(questions):
        if len(question.targets) != 1:
            continue
        clip, (target,) = clips[question.clip], question.targets
        candidates = side.model.candidate_frames(len(clip.frames))
        shown = [t for t in candidates if clip.visibility[target, t] > WELL_SEEN]
        if shown:
            rows.append(row)
            boxes.append(true_boxes([clip], shown[0])[0][target])
            things.append(clip.objects[target])
    if not rows:
        return tokens.sum() * 0.0, tokens.sum() * 0.0
    tokens = tokens[rows]
    distance = (side.box_regressor(tokens).sigmoid() - xyxy_to_cxcywh(torch.stack(boxes))).abs().sum() / len(rows)
    looks = 0.0
    for name, head in side.look_heads.items():
        wanted = torch.tensor([side.words[name].index(getattr(thing, name)) for thing in things])
        looks = looks + F.cross_entropy(head(tokens), wanted)
    return distance, looks


def seg_loss(
    side: LanguageSide,
    tokens: torch.Tensor,
    clips: list[SyntheticClip],
    questions: list[Question],
    seen: list[list[int]],
    frame: int,
    pyramid: FramePyramid,
) -> torch.Tensor:
    """[SEG] embeddings: masks from them, and near the attribute embedding that the frozen mask decoder can read, where
    that was learnt in this run.

    A third of the masks have no box beside them, so that the embedding has to say what the object is: only those of
    questions that mean one object.
    """
    pixels: PixelSide = side.frozen["pixels"]
    pairs = [(s, n) for s, own in enumerate(seen) for n in own]
    if not pairs:
        return tokens.sum() * 0.0
    total = 0.0
    if side.knows_attributes:
        with torch.no_grad():
            objects = [clips[questions[s].clip].objects[n] for s, n in pairs]
            wanted = sum(pixels.attribute_prompts[name](label) for name, label in pixels.labels(objects).items())
        total = F.mse_loss(tokens[[s for s, _ in pairs]], wanted)
    pairs = [pairs[i] for i in torch.randperm(len(pairs))[:16]]
    rows = [s for s, _ in pairs]
    boxes = torch.stack([true_boxes(clips, frame)[questions[s].clip][n] for s, n in pairs])
    single = torch.tensor([len(questions[s].targets) == 1 for s in rows])
    with_box = (torch.rand(len(pairs)) > 0.35) | ~single
    masks = torch.stack([torch.from_numpy(clips[questions[s].clip].masks[n, frame]) for s, n in pairs])
    frames = pyramid[[questions[s].clip for s in rows]]
    for part, use_box in ((with_box, True), (~with_box, False)):
        if not part.any():
            continue
        index = part.nonzero().flatten()
        near = boxes[index] + JITTER * torch.randn(len(index), 4)
        prompt = MaskPrompt(tokens=tokens[rows][index, None], boxes=near if use_box else None)
        logits = pixels.mask_tracker.prompt(frames[index], prompt).raw_logits
        target = masks[index].float()
        logits = F.interpolate(logits[:, None], size=target.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        dice = mask_dice_loss(logits, target, scale=1.0, eps=1.0)
        total = total + (5 * mask_bce_loss(logits, target) + dice).sum() / len(pairs)
    return total


def attention_loss(
    side: LanguageSide,
    attention: torch.Tensor,
    clips: list[SyntheticClip],
    clip_of: list[int],
    objects: list[tuple[int, ...]],
) -> torch.Tensor:
    """-log of the attention that falls on the tokens of some objects: half of the heads on their temporal tokens, the
    other half on their spatial tokens of the first frame that shows all of them well.

    Args:
        attention: `(S, heads, prefix)`.
        clips: as the language model sees them.
        clip_of: of each question.
        objects: which each question should look at; none: the question does not count.
    """
    config = side.model.config
    heads = attention.shape[1]
    places = visual_places(side, attention.shape[-1], len(clips[0].frames))
    middle = slice(config.temporal_config.tubelet_size // 2, None, config.temporal_config.tubelet_size)
    patch = config.temporal_config.patch_size
    spatial_target, temporal_target, rows, frames = [], [], [], []
    for row, (number, wanted) in enumerate(zip(clip_of, objects, strict=True)):
        shown = (clips[number].visibility[list(wanted)] > WELL_SEEN).all(0)
        if not wanted or not shown.any():
            continue
        rows.append(row)
        frames.append(int(shown.argmax()))
        masks = clips[number].masks[list(wanted)].any(0)
        temporal_target.append(patch_owner(masks[None, middle], patch).ravel() == 0)
        seen = torch.from_numpy(masks[frames[-1]]).float()[None]
        grid = F.adaptive_avg_pool2d(seen, config.spatial_pool_size).flatten()
        spatial_target.append((grid > 0.25 * grid.max()).numpy())
    if not rows:
        return attention.sum() * 0.0
    spatial, temporal = attention[rows][..., places["spatial"]], attention[rows][..., places["temporal"]]
    spatial = spatial.unflatten(-1, (len(clips[0].frames), -1))[torch.arange(len(rows)), :, frames]
    on_temporal = (temporal * torch.from_numpy(np.stack(temporal_target))[:, None]).sum(-1)[:, : heads // 2]
    on_spatial = (spatial * torch.from_numpy(np.stack(spatial_target))[:, None]).sum(-1)[:, heads // 2 :]
    return -torch.log(torch.cat([on_temporal, on_spatial], dim=1) + 1e-4).mean() / math.log(10)


def visual_places(side: LanguageSide, prefix: int, num_frames: int) -> dict[str, slice]:
    """Where the spatial tokens, frame by frame, and the temporal tokens lie in a prefix that ends with them."""
    config = side.model.config
    first = prefix - config.num_visual_tokens(num_frames)
    middle = first + num_frames * config.spatial_pool_size**2
    return {"spatial": slice(first, middle), "temporal": slice(middle, prefix)}


def patch_losses(
    side: LanguageSide,
    layers: tuple[torch.Tensor, torch.Tensor],
    clips: list[SyntheticClip],
    facts: list[ObjectFacts],
    frame: int,
) -> list[torch.Tensor]:
    """Of each layer's states `(C, prefix, D)`: what the object of each temporal token is, where it is, how it moves
    and what happens to it; what the object of each spatial token of the first frame and of another one is, where, and
    in which place of a row. An answer can only point to what these still tell."""
    config = side.model.config.spatial_config
    places = visual_places(side, layers[0].shape[1], len(clips[0].frames))
    tubelet_size = side.model.config.temporal_config.tubelet_size
    moving = tubelet_owners(clips, facts, config.patch_size, tubelet_size)
    pictures = {}
    if side.model.config.spatial_pool_size * config.patch_size == config.image_size:  # a token is a patch
        pictures = {t: frame_owners(clips, facts, config.patch_size, t) for t in {0, frame}}
    totals = []
    for heads, states in zip(side.patch_heads, layers, strict=True):
        total = _heads_loss(side, heads.temporal, states[:, places["temporal"]].flatten(0, 1), moving)
        spatial = states[:, places["spatial"]].unflatten(1, (len(clips[0].frames), -1))
        for t, owners in pictures.items():
            total = total + 0.5 * _heads_loss(side, heads.spatial, spatial[:, t].flatten(0, 1), owners)
        totals.append(total)
    return totals


def _heads_loss(
    side: LanguageSide, heads: nn.ModuleDict, features: torch.Tensor, owners: list[PatchOwners]
) -> torch.Tensor:
    total = features.sum() * 0.0
    for name, head in heads.items():
        loss = head_loss(name, head(features), patch_targets(owners, name, side.words.get(name)))
        if loss is not None:
            total = total + PATCH_WEIGHT[name] * loss
    return total


def evaluate_language(
    side: LanguageSide, worlds: dict[str, WorldConfig], seed: int, with_video: bool, clips: int = 48
) -> dict[str, float]:
    """By world: share of questions with one target whose most confident proposal on the first frame lies on it, of all
    and by kind; share of the targets of kind `multi` and of the questions of kind `none` that a keep score of 0.5
    finds or leaves out. Where the first word says that there is nothing, nothing is found; `denied` is how often that
    is said of something."""
    figures = {}
    for name, world in worlds.items():
        by_kind = _answer_on_first_frames(side, world, seed, with_video, clips)
        single = [hits for kind, hits in by_kind.items() if kind not in ("multi", "none", "denied")]
        figures[f"val_{name}_right"] = np.mean(np.concatenate(single))
        figures |= {f"val_{name}_{kind}": np.mean(hits) for kind, hits in sorted(by_kind.items()) if hits}
    return {name: float(value) for name, value in figures.items()}


def _answer_on_first_frames(
    side: LanguageSide, world: WorldConfig, seed: int, with_video: bool, clips: int
) -> dict[str, list[bool]]:
    """By kind of question, of each target whether it is found; of `none` whether nothing is; of those with targets
    whether these are `denied`."""
    rng = np.random.default_rng(seed)
    right: dict[str, list[bool]] = {"multi": [], "none": [], "denied": []}
    for start in range(0, clips, 16):
        batch = batch_clips(start // 16, 16, seed + 5, world, split="validation")
        questions = draw_questions(side.processor, batch, 6, rng, lambda clip, item: True)
        questions = [q for q in questions if len(visible_targets([q], batch, 0)[0]) == len(q.targets)]
        watched = [as_seen(clip, side.model.config.num_frames) for clip in batch]
        states = language_states(side, watched, questions, with_video)
        pyramid, proposals = frozen_pixels(side, batch, 0)
        features = region_features(side, proposals, pyramid)
        output = filter_scores(side, side.box_head(states.box), [q.clip for q in questions], proposals, features)
        boxes = true_boxes(batch, 0)
        for row, question in enumerate(questions):
            confidence, kept = output.confidence[row], output.logits[row] > 0
            overlap = pairwise_iou(output.boxes[row], boxes[question.clip]).nan_to_num()  # (Q, N)
            denied = bool(states.says_none[row])
            if question.expression.kind == "none":
                right["none"].append(denied or not kept.any())
                continue
            right["denied"].append(denied)
            if question.expression.kind == "multi":
                found = (overlap[kept][:, list(question.targets)] > 0.5).any(0)
                right["multi"] += (found & (not denied)).tolist()
            else:
                chosen = overlap[confidence.argmax()]
                hit = chosen.argmax() == question.targets[0] and chosen.max() > 0.3 and not denied
                right.setdefault(question.expression.kind, []).append(bool(hit))
    return right


def train_language_stage(
    model: SparrowForVideoGrounding,
    processor: SparrowProcessor,
    output: Path,
    stage: str,
    world_names: list[str],
    steps: int,
    clips: int,
    seed: int = 0,
    from_scratch: bool = True,
    pixel_heads: Path | None = None,
    with_towers: bool = False,
    learning_rate: float = 1e-3,
):
    """Stages "text", "visual" and "motion": language model, token heads, filtration head; with video the adapters.

    Args:
        world_names: the steps take turns with these presets; the first one has all words.
        pixel_heads: weights of a stage "image", whose throw-away heads teach [SEG] what the decoder understands.
        with_towers: whether the towers learn along.
    """
    share = share_of(clips)
    with_video = stage != "text"
    seed += STREAMS[stage]
    torch.manual_seed(seed)
    worlds = {name: PRESETS[name] for name in world_names}
    pixels = PixelSide(model, worlds[world_names[0]])
    if pixel_heads is not None:
        _load_pixel_heads(pixels, pixel_heads)
    model.requires_grad_(False)
    pixels.requires_grad_(False).eval()
    side = LanguageSide(model, processor, pixels, attributes=pixel_heads is not None, towers=with_towers)
    side.requires_grad_(True)
    side.adapters.requires_grad_(with_video)
    if stage == "visual" and from_scratch:
        for adapter in side.adapters:  # visual tokens enter quietly
            with torch.no_grad():
                adapter.fc2.weight.mul_(0.1)
    favoured: tuple[str, ...] = ()
    if stage in ("visual", "motion"):  # what is learnt last is asked most
        favoured = ("motion",) if from_scratch else LATE_KINDS
    run_stage(
        stage,
        side,
        functools.partial(
            language_step,
            side=side,
            worlds=list(worlds.values()),
            clips=clips,
            per_clip=12 if with_towers else 8,
            seed=seed,
            with_video=with_video,
            favoured=favoured,
            # a head that knows its task only has to keep up
            seg_every=1 if pixel_heads is not None else 4,
            share=share,
        ),
        output=output,
        steps=steps,
        learning_rate=learning_rate,
        warmup=200 if with_towers else 50,  # throw-away heads that know nothing should not shake what does
        evaluate=functools.partial(evaluate_language, side, worlds, seed, with_video),
        evaluate_every=250,
    )


def _load_pixel_heads(pixels: PixelSide, weights: Path):
    """The throw-away heads of the image stage: the attribute embeddings teach [SEG] what the decoder understands."""
    from safetensors.torch import load_file

    saved = load_file(weights)
    for name in ("classifiers", "attribute_prompts"):
        part = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
        getattr(pixels, name).load_state_dict(part)
