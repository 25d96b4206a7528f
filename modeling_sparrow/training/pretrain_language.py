"""From scratch, language side of sparrow-tiny: questions to [BOX] and [SEG] embeddings that find the right region.

Stage "text": no visual tokens, the question alone has to pick the region by its SAM2 features. Stages "visual" and
"motion": with them, and with attention led to the tokens of the target, which is what makes questions about motion
learnable. The second is a second pass over new clips; "polish" is a third, slower, with all kinds of questions alike.

Several questions about a clip are packed into one sequence: each sees the clip and itself, and counts its positions
from the end of the clip, so the result equals one row per question.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparrow_processing import SparrowProcessor
from sparrow_processing.synthetic import (
    PRESETS,
    Expression,
    SyntheticClip,
    WorldConfig,
    all_expressions,
    sample_expressions,
)

from ..box_ops import pairwise_iou, xyxy_to_cxcywh
from ..filtration_head import FiltrationOutput, apply_box_offsets
from ..frame_pyramid import FramePyramid
from ..losses import box_regression_loss, filtration_class_loss, filtration_targets, mask_bce_loss, mask_dice_loss
from ..mask_tracker import MaskPrompt
from ..modeling_sparrow import SparrowForVideoGrounding
from ..region_proposer import RegionProposals
from .loop import run_stage
from .pretrain_segmenter import JITTER, PixelSide, batch_clips, encode_frames
from .pretrain_towers import (
    BACKGROUND,
    DIRECTIONS,
    MOTION_WORDS,
    as_seen,
    box_distance,
    patch_owner,
    patch_targets,
    spatial_input,
    temporal_input,
    tubelet_owners,
)
from .tiny_tokenizer import ANSWER

# Added to the seed of a run, so that no stage sees the clips of another.
STREAMS = {"text": 3, "visual": 4, "motion": 6, "polish": 8}
# questions whose answer depends on the first frame or on the whole clip, not on how the object looks in a frame
FIRST_FRAME_KINDS = ("position", "ordinal", "relation", "motion", "speed", "event", "meeting")

# kinds that (also) ask what no single frame answers
MOVING_KINDS = ("motion", "speed", "event", "meeting", "multi", "none")

# kinds that ask how one thing looks, and by what
LOOKS = {"class": ("noun",), "colour": ("colour",), "colour_class": ("noun", "colour")}

# of the losses that keep what the temporal tokens tell
PATCH_WEIGHT = {"direction": 1.0, "noun": 0.3, "colour": 0.3, "size": 0.3, "speed": 0.3, "action": 0.5}

WELL_SEEN = 0.3  # visible share of an object that a frame can be asked about


@dataclass
class Question:
    """One question about clip number `clip` of a batch, with the objects it means: one, several, or none."""

    clip: int
    expression: Expression
    targets: tuple[int, ...]
    ids: list[int]  # without the part that all questions about a clip share


class LanguageSide(nn.Module):
    """What the language stages train, beside throw-away heads; the pixel side is frozen and not registered here.

    Args:
        attributes: whether the attribute embeddings of the pixel side are trained.
    """

    def __init__(
        self,
        model: SparrowForVideoGrounding,
        processor: SparrowProcessor,
        pixel_side: PixelSide,
        attributes: bool = False,
    ):
        super().__init__()
        self.language_model = model.model.host.language_model
        self.adapters = nn.ModuleList([model.model.host.spatial_adapter, model.model.host.temporal_adapter])
        self.box_head, self.seg_head = model.model.box_head, model.model.seg_head
        self.filtration_head = model.model.filtration_head
        size = model.config.prompt_size
        self.box_regressor = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 4))
        size = model.config.text_config.hidden_size
        self.motion_classifier = nn.Linear(size, len(DIRECTIONS))
        self.words = pixel_side.words | MOTION_WORDS
        self.patch_heads = nn.ModuleDict({name: nn.Linear(size, len(words)) for name, words in self.words.items()})
        self.patch_heads["box"] = nn.Linear(size, 4)
        self.knows_attributes = attributes
        self.frozen = {"model": model, "processor": processor, "pixels": pixel_side}

    @property
    def model(self) -> SparrowForVideoGrounding:
        return self.frozen["model"]

    @property
    def processor(self) -> SparrowProcessor:
        return self.frozen["processor"]


def shared_ids(side: LanguageSide, num_frames: int) -> list[int]:
    """Ids before the words of a question: the user's turn, and the clip if there is one."""
    ids = side.processor.prompt_ids("x", "ask", num_frames)
    return ids[: ids.index(side.processor.tokenizer.convert_tokens_to_ids("x"))]


def is_askable(clip: SyntheticClip, item: Expression, frame: int, with_video: bool) -> bool:
    """Whether a question can be answered by the regions of one frame: each target is either well seen there or not
    there at all. What depends on the first frame or on the whole clip is looked for there, or on a later frame if the
    first one shows none of the targets."""
    if not with_video and item.kind in MOVING_KINDS:
        return False
    seen = clip.visibility[list(item.target_ids)]
    if not ((seen[:, frame] > WELL_SEEN) | (seen[:, frame] == 0)).all():
        return False
    return frame == 0 or item.kind not in FIRST_FRAME_KINDS or not seen[:, 0].any()


def draw_questions(
    side: LanguageSide,
    clips: list[SyntheticClip],
    count: int,
    rng: np.random.Generator,
    is_allowed: Callable[[SyntheticClip, Expression], bool],
    favoured: str | None = None,
) -> list[Question]:
    """Up to `count` allowed questions per clip, kinds balanced, or half of them of the favoured kind."""
    tokenizer = side.processor.tokenizer
    answer = tokenizer.encode(ANSWER + " <|end|>", add_special_tokens=False)
    prefix = len(shared_ids(side, 0))
    questions = []
    for number, clip in enumerate(clips):
        possible = [item for item in all_expressions(clip, rng) if is_allowed(clip, item)]
        drawn = sample_expressions([item for item in possible if item.kind == favoured], count // 2, rng)
        drawn += sample_expressions([item for item in possible if item.kind != favoured], count - len(drawn), rng)
        for item in drawn:
            ids = _prompt_ids(side.processor, item.text)[prefix:] + answer
            questions.append(Question(number, item, item.target_ids, ids))
    return questions


@functools.lru_cache(maxsize=100_000)
def _prompt_ids(processor: SparrowProcessor, text: str) -> list[int]:
    return processor.prompt_ids(text, "refer")


@dataclass
class LanguageStates:
    """What the language model makes of `S` packed questions.

    Args:
        box, seg: `(S, D)` states that predict [BOX] and [SEG].
        text_loss: of the next token.
        query: `(S, D)` states of the [BOX] positions as they enter the last layer but one.
        clips: `(C, prefix, D)` states of the shared prefix of each clip as they enter that layer.
        attention: `(S, heads, prefix)` of the [BOX] states in that layer onto the prefix; in training with video.
    """

    box: torch.Tensor
    seg: torch.Tensor
    text_loss: torch.Tensor
    query: torch.Tensor
    clips: torch.Tensor
    attention: torch.Tensor | None = None


def language_states(
    side: LanguageSide, clips: list[SyntheticClip], questions: list[Question], with_video: bool
) -> LanguageStates:
    """Run the language model over the packed questions."""
    processor, model = side.processor, side.model
    T = len(clips[0].frames)
    prefix = shared_ids(side, T if with_video else 0)
    rows = [[q for q in questions if q.clip == number] for number in range(len(clips))]
    length = len(prefix) + max(sum(len(q.ids) for q in row) for row in rows)
    ids = torch.full((len(clips), length), processor.tokenizer.pad_token_id)
    labels = torch.full((len(clips), length), -100)
    positions = torch.zeros(len(clips), length, dtype=torch.int64)
    segment = torch.full((len(clips), length), -1)  # 0 prefix, 1, 2, … questions, -1 padding
    ids[:, : len(prefix)], positions[:, : len(prefix)] = torch.tensor(prefix), torch.arange(len(prefix))
    segment[:, : len(prefix)] = 0
    box_at, seg_at, order = [], [], []
    answer_length = len(processor.tokenizer.encode(ANSWER + " <|end|>", add_special_tokens=False))
    for number, row in enumerate(rows):
        at = len(prefix)
        for index, question in enumerate(row, start=1):
            part = slice(at, at + len(question.ids))
            ids[number, part] = torch.tensor(question.ids)
            positions[number, part] = torch.arange(len(prefix), len(prefix) + len(question.ids))
            segment[number, part] = index
            labels[number, part.stop - answer_length : part.stop] = ids[number, part.stop - answer_length : part.stop]
            box_at.append((number, at + question.ids.index(model.config.box_token_id) - 1))
            seg_at.append((number, at + question.ids.index(model.config.seg_token_id) - 1))
            order.append(question)
            at = part.stop
    questions[:] = order
    same = (segment[:, :, None] == segment[:, None]) | (segment[:, None] == 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (same & causal) | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]
    supervised = with_video and side.training  # the attention is
    with torch.autocast("cpu", torch.bfloat16, enabled=side.training):
        output = side.language_model(
            inputs_embeds=_embed(side, ids, clips, with_video),
            attention_mask=mask,
            position_ids=positions,
            output_hidden_states=True,
            output_attentions=supervised,
        )
    hidden, middle = output.hidden_states[-1].float(), output.hidden_states[-3].float()
    rows, columns = (list(places) for places in zip(*box_at, strict=True))
    scores = output.logits[:, :-1].flatten(0, 1).float()
    return LanguageStates(
        box=hidden[rows, columns],
        seg=hidden[rows, [column for _, column in seg_at]],
        text_loss=F.cross_entropy(scores, labels[:, 1:].flatten(), ignore_index=-100),
        query=middle[rows, columns],
        clips=middle[:, : len(prefix)],
        attention=output.attentions[-2][rows, :, columns, : len(prefix)].float() if supervised else None,
    )


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
        pyramid = encode_frames(pixels.mask_tracker, np.stack([clip.frames[frame] for clip in clips]))
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
    favoured: str | None,
    seg_every: int,
) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng([seed, step])
    torch.manual_seed(seed * 1_000_003 + step)
    world = worlds[step % len(worlds)]
    batch = batch_clips(step, clips, seed, world)
    watched = [as_seen(clip, side.model.config.num_frames) for clip in batch]
    frame = 0 if rng.random() < 0.75 else int(rng.choice(side.model.candidate_frames(world.num_frames)))
    boxes = true_boxes(batch, frame)
    is_allowed = functools.partial(is_askable, frame=frame, with_video=with_video)
    questions = draw_questions(side, batch, per_clip, rng, is_allowed, favoured)
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
    losses["text"] = states.text_loss
    loss = 2 * losses["filter"] + losses["ranking"] + losses["box"] + 0.3 * losses["absence"] + 0.2 * losses["text"]
    if step % seg_every == 0:
        losses["seg"] = seg_loss(side, side.seg_head(states.seg), batch, questions, seen, frame, pyramid)
        loss = loss + 0.5 * losses["seg"]
    if with_video:
        if frame == 0:
            one = [row for row, own in enumerate(seen) if len(own) == 1]
            distance = (side.box_regressor(tokens[one]).sigmoid() - xyxy_to_cxcywh(targets[one, 0])).abs()
            losses["regressor"] = distance.sum() / max(len(one), 1)
            loss = loss + 1.5 * losses["regressor"]
        losses["attention"] = attention_loss(side, states.attention, watched, questions)
        losses["words"] = motion_words_loss(side, states.query, batch, questions)
        losses["patches"] = patch_loss(side, states.clips, watched)
        loss = loss + 0.4 * losses["attention"] + 0.5 * losses["words"] + 0.5 * losses["patches"]
    return {"loss": loss, **losses}


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
    side: LanguageSide, attention: torch.Tensor, clips: list[SyntheticClip], questions: list[Question]
) -> torch.Tensor:
    """-log of the attention that falls on the tokens of the targets: half of the heads on their temporal tokens, the
    other half on their spatial tokens of the first frame. Only questions whose targets are all on the first frame."""
    config = side.model.config
    heads = attention.shape[1]
    spatial_side = config.spatial_pool_size
    first = attention.shape[-1] - config.num_visual_tokens(len(clips[0].frames))
    spatial = attention[..., first : first + spatial_side**2]
    temporal = attention[..., first + len(clips[0].frames) * spatial_side**2 :]
    middle = slice(config.temporal_config.tubelet_size // 2, None, config.temporal_config.tubelet_size)
    patch = config.temporal_config.patch_size
    spatial_target, temporal_target, rows = [], [], []
    for row, seen in enumerate(visible_targets(questions, clips, 0)):
        question = questions[row]
        if not seen or len(seen) < len(question.targets):
            continue
        rows.append(row)
        masks = clips[question.clip].masks[seen].any(0)
        temporal_target.append(patch_owner(masks[None, middle], patch).ravel() == 0)
        grid = F.adaptive_avg_pool2d(torch.from_numpy(masks[0]).float()[None], spatial_side).flatten()
        spatial_target.append((grid > 0.25 * grid.max()).numpy())
    if not rows:
        return attention.sum() * 0.0
    on_temporal = (temporal[rows] * torch.from_numpy(np.stack(temporal_target))[:, None]).sum(-1)[:, : heads // 2]
    on_spatial = (spatial[rows] * torch.from_numpy(np.stack(spatial_target))[:, None]).sum(-1)[:, heads // 2 :]
    return -torch.log(torch.cat([on_temporal, on_spatial], dim=1) + 1e-4).mean() / math.log(10)


def motion_words_loss(
    side: LanguageSide, query: torch.Tensor, clips: list[SyntheticClip], questions: list[Question]
) -> torch.Tensor:
    """Cross-entropy of the direction that a question about motion asks for: what looks for the target must know it."""
    asked = []
    for question in questions:
        if question.expression.kind != "motion":
            asked.append(-1)
            continue
        thing = clips[question.clip].objects[question.targets[0]]
        known = thing.action == "straight" and not thing.bounces
        asked.append(DIRECTIONS.index(thing.direction) if known else -1)
    labels = torch.tensor(asked)
    if (labels < 0).all():
        return query.sum() * 0.0
    return F.cross_entropy(side.motion_classifier(query), labels, ignore_index=-1)


def patch_loss(side: LanguageSide, states: torch.Tensor, clips: list[SyntheticClip]) -> torch.Tensor:
    """What the object of each temporal token is, where it is and how it moves, from the states `(C, prefix, D)` that
    attention reads: an answer can only point to what these still tell."""
    config = side.model.config.temporal_config
    count = (len(clips[0].frames) // config.tubelet_size) * (config.image_size // config.patch_size) ** 2
    features = states[:, -count:].flatten(0, 1)
    owners = tubelet_owners(clips, config.patch_size, config.tubelet_size)
    total = 10 * box_distance(side.patch_heads["box"](features), patch_targets(owners, "box", None))
    for name, words in side.words.items():
        targets = patch_targets(owners, name, words)
        if (targets != BACKGROUND).any():  # speeds are not always known
            logits = side.patch_heads[name](features)
            total = total + PATCH_WEIGHT[name] * F.cross_entropy(logits, targets, ignore_index=BACKGROUND)
    return total


def evaluate_language(
    side: LanguageSide, worlds: dict[str, WorldConfig], seed: int, with_video: bool, clips: int = 48
) -> dict[str, float]:
    """By world: share of questions with one target whose most confident proposal on the first frame lies on it, of all
    and by kind; share of the targets of kind `multi` and of the questions of kind `none` that a keep score of 0.5
    finds or leaves out."""
    figures = {}
    for name, world in worlds.items():
        right, multi, none = _answer_on_first_frames(side, world, seed, with_video, clips)
        figures[f"val_{name}_right"] = np.mean([hit for hits in right.values() for hit in hits])
        by_kind = right | {"multi": multi, "none": none}
        figures |= {f"val_{name}_{kind}": np.mean(hits) for kind, hits in sorted(by_kind.items()) if hits}
    return {name: float(value) for name, value in figures.items()}


def _answer_on_first_frames(
    side: LanguageSide, world: WorldConfig, seed: int, with_video: bool, clips: int
) -> tuple[dict[str, list[bool]], list[bool], list[bool]]:
    """Of each question with one target whether it is found, by kind; of each of several; whether nothing is found."""
    rng = np.random.default_rng(seed)
    right: dict[str, list[bool]] = {}
    multi, none = [], []
    for start in range(0, clips, 16):
        batch = batch_clips(start // 16, 16, seed + 5, world, split="validation")
        questions = draw_questions(side, batch, 6, rng, lambda clip, item: True)
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
            if question.expression.kind == "none":
                none.append(not kept.any())
            elif question.expression.kind == "multi":
                multi += (overlap[kept][:, list(question.targets)] > 0.5).any(0).tolist()
            else:
                chosen = overlap[confidence.argmax()]
                hit = bool(chosen.argmax() == question.targets[0] and chosen.max() > 0.3)
                right.setdefault(question.expression.kind, []).append(hit)
    return right, multi, none


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
):
    """Stages "text", "visual" and "motion": language model, token heads, filtration head; with video the adapters.

    Args:
        world_names: the steps take turns with these presets; the first one has all words.
        pixel_heads: weights of a stage "image", whose throw-away heads teach [SEG] what the decoder understands.
    """
    with_video = stage != "text"
    seed += STREAMS[stage]
    torch.manual_seed(seed)
    worlds = {name: PRESETS[name] for name in world_names}
    pixels = PixelSide(model, worlds[world_names[0]])
    if pixel_heads is not None:
        _load_pixel_heads(pixels, pixel_heads)
    model.requires_grad_(False)
    pixels.requires_grad_(False).eval()
    side = LanguageSide(model, processor, pixels, attributes=pixel_heads is not None)
    side.requires_grad_(True)
    side.adapters.requires_grad_(with_video)
    if with_video:  # attention weights are supervised
        side.language_model.set_attn_implementation("eager")
    if stage == "visual" and from_scratch:
        for adapter in side.adapters:  # visual tokens enter quietly
            with torch.no_grad():
                adapter.fc2.weight.mul_(0.1)
    run_stage(
        stage,
        side,
        functools.partial(
            language_step,
            side=side,
            worlds=list(worlds.values()),
            clips=clips,
            per_clip=8,
            seed=seed,
            with_video=with_video,
            # learned last by a model that knows nothing: ask for it most
            favoured="motion" if from_scratch and stage in ("visual", "motion") else None,
            # a head that knows its task only has to keep up
            seg_every=1 if pixel_heads is not None else 4,
        ),
        output=output,
        steps=steps,
        learning_rate=5e-4 if stage == "polish" else 1e-3,
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
