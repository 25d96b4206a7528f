"""From scratch, pixel side: SAM2, region proposer and region encoder of sparrow-tiny on generated videos.

Stage "image": masks from jittered boxes, proposals, and attributes of regions (noun, colour, size: throw-away
classifiers that make the region features worth filtering). Stage "video": the memory, with the image encoder frozen.
"""

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparrow_processing.pixel_streams import segmenter_pixels
from sparrow_processing.synthetic import PRESETS, RESOLUTIONS, SyntheticClip, WorldConfig, generate_clip, split_seed

from ..box_ops import pairwise_iou, xyxy_to_cxcywh
from ..frame_pyramid import ClipPyramids, FramePyramid
from ..losses import mask_bce_loss, mask_dice_loss
from ..mask_tracker import FrameMasks, MaskPrompt, MaskTracker, TrackedObject
from ..modeling_sparrow import SparrowForVideoGrounding
from .loop import computes_in_bfloat16, run_stage, share_of
from .tiny_model import initialize_attributes, initialize_for_scratch

JITTER = 1.5 / 128  # of the corners of true boxes, normalised: as much as those of proposals are off
JUMPS = 5  # frames of a clip in random order
MATCHING_WEIGHT = 0.1  # of the loss that leads attention from an object to the same object in memory


class PixelSide(nn.Module):
    """The parts of the model that the pixel stages train, and throw-away heads for the attributes of objects."""

    def __init__(self, model: SparrowForVideoGrounding, world: WorldConfig):
        super().__init__()
        self.mask_tracker = model.model.mask_tracker
        self.region_proposer = model.model.region_proposer
        self.filtration_head = model.model.filtration_head
        self.words = {"noun": world.nouns, "colour": world.colours, "size": world.sizes}
        hidden, prompt_size = model.config.filtration_config.hidden_size, model.config.prompt_size
        self.classifiers = nn.ModuleDict({name: nn.Linear(hidden, len(words)) for name, words in self.words.items()})
        # language-like prompts: the decoder learns to read an embedding of what the object is
        self.attribute_prompts = nn.ModuleDict(
            {name: nn.Embedding(len(words), prompt_size) for name, words in self.words.items()}
        )

    def labels(self, objects) -> dict[str, torch.Tensor]:
        return {
            name: torch.tensor([words.index(getattr(item, name)) for item in objects])
            for name, words in self.words.items()
        }


def encode_frames(tracker: MaskTracker, frames: np.ndarray) -> FramePyramid:
    """Pyramid of frames `(F, H, W, 3)` uint8, which the processor would prepare alike."""
    size = tracker.config.image_size
    return tracker.encode_frames(torch.stack([segmenter_pixels(frame, size) for frame in frames]))


@torch.no_grad()
def encode_frozen(tracker: MaskTracker, frames: np.ndarray) -> FramePyramid:
    """The same for training what comes behind the encoder: where the CPU can, in bfloat16, which takes less than half
    of the time."""
    with torch.autocast("cpu", torch.bfloat16, enabled=computes_in_bfloat16()):
        return encode_frames(tracker, frames).float()


def at_resolution(world: WorldConfig, step: int) -> WorldConfig:
    """The world at its own resolution, every third step at another one."""
    if step % 3 != 2:
        return world
    height, width = RESOLUTIONS[step // 3 % len(RESOLUTIONS)]
    return replace(world, height=height, width=width)


def long_world(world: WorldConfig) -> WorldConfig:
    """Long clips full of crossings and occlusions, of the things and backgrounds of a world."""
    return replace(PRESETS["hard"], nouns=world.nouns, photographs=world.photographs)


def batch_clips(step: int, count: int, seed: int, config: WorldConfig, split: str = "train") -> list[SyntheticClip]:
    return [generate_clip(split_seed(split, step * count + i, seed), config) for i in range(count)]


def mask_losses(masks: FrameMasks, targets: torch.Tensor, present: torch.Tensor) -> dict[str, torch.Tensor]:
    """Losses of one decoded frame; `targets` `(N, H, W)` 0/1, `present` `(N,)` bool."""
    object_loss = F.binary_cross_entropy_with_logits(masks.object_logits, present.float())
    size = targets.shape[-2:]
    logits = F.interpolate(masks.raw_logits[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    weight = present.float() / present.sum().clamp(min=1)
    bce = (mask_bce_loss(logits, targets) * weight).sum()
    dice = (mask_dice_loss(logits, targets, scale=1.0, eps=1.0) * weight).sum()
    with torch.no_grad():
        predicted, truth = logits > 0, targets > 0
        iou = (predicted & truth).flatten(1).sum(1) / (predicted | truth).flatten(1).sum(1).clamp(min=1)
    quality = masks.score / masks.object_logits.sigmoid().clamp(min=1e-6)  # the predicted IoU alone
    iou_loss = ((quality - iou).abs() * weight).sum()
    return {"bce": bce, "dice": dice, "object": object_loss, "iou_head": iou_loss, "iou": (iou * weight).sum()}


def image_step(step: int, side: PixelSide, world: WorldConfig, clips: int, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng([seed, step])
    torch.manual_seed(seed * 1_000_003 + step)
    world = at_resolution(world, step)
    batch = batch_clips(step, clips, seed, world)
    frames, boxes, masks, objects, frame_of = [], [], [], [], []
    for clip in batch:
        for t in rng.choice(clip.frames.shape[0], size=2, replace=False):
            visible = [n for n in range(len(clip.objects)) if clip.visibility[n, t] > 0.2]
            frame_of += [len(frames)] * len(visible)
            frames.append(clip.frames[t])
            boxes.append(torch.from_numpy(clip.boxes[visible, t]))
            masks.append(torch.from_numpy(clip.masks[visible, t]))
            objects += [clip.objects[n] for n in visible]
    pyramid = encode_frames(side.mask_tracker, np.stack(frames))
    size = torch.tensor([world.width, world.height] * 2)
    normalized = [box / size for box in boxes]
    rows = torch.tensor(frame_of)
    losses = decode_losses(side, pyramid[rows], torch.cat(normalized), torch.cat(masks), objects)
    proposer = side.region_proposer
    detection = proposer.loss(proposer(list(pyramid.levels)), [xyxy_to_cxcywh(box) for box in normalized])
    attributes = attribute_loss(side, pyramid, normalized, objects)
    loss = 5 * losses["bce"] + losses["dice"] + losses["object"] + losses["iou_head"]
    loss = loss + 0.5 * detection["loss"] + 0.5 * attributes
    return {"loss": loss, **losses, "detection": detection["loss"], "attributes": attributes}


def decode_losses(
    side: PixelSide, pyramid: FramePyramid, boxes: torch.Tensor, targets: torch.Tensor, objects
) -> dict[str, torch.Tensor]:
    """Masks from jittered boxes, half of them beside an embedding of the attributes, some from that embedding alone,
    some for a box that holds nothing."""
    N = len(boxes)
    jitter = torch.randn(N, 4) * JITTER
    prompts = boxes + jitter
    embedding = sum(side.attribute_prompts[name](label) for name, label in side.labels(objects).items())
    present = torch.ones(N, dtype=torch.bool)
    features = side.mask_tracker.features_without_memory(pyramid)
    kind = torch.rand(N)
    totals: dict[str, torch.Tensor] = {}
    for low, high, use_box, use_token in ((0, 0.4, True, False), (0.4, 0.85, True, True), (0.85, 1.0, False, True)):
        chosen = ((kind >= low) & (kind < high)).nonzero().flatten()
        if not len(chosen):
            continue
        prompt = MaskPrompt(
            boxes=prompts[chosen] if use_box else None, tokens=embedding[chosen, None] if use_token else None
        )
        target, there = targets[chosen].float(), present[chosen].clone()
        if use_box and not use_token:  # a tenth of the boxes move to where nothing is
            empty = torch.rand(len(chosen)) < 0.15
            shifted = (prompt.boxes + 0.5 + 0.3 * (torch.rand(len(chosen), 1) - 0.5)) % 1.0
            shifted = torch.cat([shifted[:, :2], shifted[:, :2] + (prompt.boxes[:, 2:] - prompt.boxes[:, :2])], dim=-1)
            inside = _covered(targets[chosen], shifted) > 0
            empty &= ~inside
            prompt.boxes = torch.where(empty[:, None], shifted, prompt.boxes)
            there &= ~empty
        masks = side.mask_tracker.prompt(pyramid[chosen], prompt, image_features=features[chosen])
        share = len(chosen) / N
        for name, value in mask_losses(masks, target, there).items():
            totals[name] = totals.get(name, 0.0) + share * value
    return totals


def _covered(masks: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Mask pixels `(N, H, W)` inside normalised boxes `(N, 4)`."""
    H, W = masks.shape[-2:]
    y = (torch.arange(H) + 0.5) / H
    x = (torch.arange(W) + 0.5) / W
    rows = (y >= boxes[:, 1:2]) & (y < boxes[:, 3:4])
    columns = (x >= boxes[:, 0:1]) & (x < boxes[:, 2:3])
    return (masks & rows[:, :, None] & columns[:, None]).flatten(1).sum(1)


def attribute_loss(side: PixelSide, pyramid: FramePyramid, boxes: list[torch.Tensor], objects) -> torch.Tensor:
    """Cross-entropy of noun, colour and size from the region features of jittered true boxes."""
    longest = max(len(box) for box in boxes)
    padded = torch.zeros(len(boxes), max(longest, 1), 4)
    valid = torch.zeros(len(boxes), max(longest, 1), dtype=torch.bool)
    for row, box in enumerate(boxes):
        padded[row, : len(box)] = box
        valid[row, : len(box)] = True
    padded = padded + valid[..., None] * torch.randn_like(padded) * JITTER
    levels = [*pyramid.levels[:-1], side.mask_tracker.features_without_memory(pyramid)]
    regions, _ = side.filtration_head.encode_regions(padded, levels)
    losses = [
        F.cross_entropy(side.classifiers[name](regions[valid]), label) for name, label in side.labels(objects).items()
    ]
    return sum(losses)


def evaluate_image(side: PixelSide, world: WorldConfig, seed: int, clips: int = 32) -> dict[str, float]:
    """Mask IoU from true boxes, proposal recall at IoU 0.5 by the best 8 and 16, attribute accuracy."""
    ious, recall8, recall16, right = [], [], [], {name: [] for name in side.words}
    size = torch.tensor([world.width, world.height] * 2)
    for clip in batch_clips(0, clips, seed, world, split="validation"):
        visible = [n for n in range(len(clip.objects)) if clip.visibility[n, 0] > 0.2]
        if not visible:
            continue
        boxes = torch.from_numpy(clip.boxes[visible, 0]) / size
        targets = torch.from_numpy(clip.masks[visible, 0])
        pyramid = encode_frames(side.mask_tracker, clip.frames[:1])
        masks = side.mask_tracker.prompt(pyramid, MaskPrompt(boxes=boxes))
        logits = F.interpolate(masks.logits[:, None], size=targets.shape[-2:], mode="bilinear", align_corners=False)
        predicted = logits[:, 0] > 0
        ious += ((predicted & targets).flatten(1).sum(1) / (predicted | targets).flatten(1).sum(1)).tolist()
        proposals = side.region_proposer.propose(list(pyramid.levels))
        overlap = pairwise_iou(boxes, proposals.boxes[0][proposals.valid[0]]) > 0.5
        recall8 += overlap[:, :8].any(1).tolist()
        recall16 += overlap[:, :16].any(1).tolist()
        levels = [*pyramid.levels[:-1], side.mask_tracker.features_without_memory(pyramid)]
        regions, _ = side.filtration_head.encode_regions(boxes[None], levels)
        for name, label in side.labels([clip.objects[n] for n in visible]).items():
            right[name] += (side.classifiers[name](regions[0]).argmax(-1) == label).tolist()
    figures = {"val_iou": ious, "val_recall_8": recall8, "val_recall_16": recall16}
    figures |= {f"val_{name}": values for name, values in right.items()}
    return {name: float(np.mean(values)) for name, values in figures.items()}


def train_image_stage(
    model: SparrowForVideoGrounding,
    output: Path,
    world_name: str,
    steps: int,
    clips: int = 16,
    seed: int = 0,
    from_scratch: bool = True,
):
    """Stage "image": the whole pixel side on single frames; `from_scratch` says that it has no weights yet."""
    torch.manual_seed(seed)
    world = replace(PRESETS[world_name], occluder=0.15)
    side = PixelSide(model, world)
    if from_scratch:
        initialize_for_scratch(side)
    initialize_attributes(side)
    run_stage(
        "image",
        side,
        functools.partial(image_step, side=side, world=world, clips=clips, seed=seed),
        output=output,
        steps=steps,
        learning_rate=1e-3,
        evaluate=functools.partial(evaluate_image, side, world, seed),
    )


# ---------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Footage:
    """What a step of the stage "video" sees: clips of a world, whole or, with `jumps`, that many of their frames in
    random order, on which nothing but its looks tells an object."""

    world: WorldConfig
    jumps: int | None = None

    @property
    def num_frames(self) -> int:
        return self.jumps or self.world.num_frames

    def frame_order(self, rng: np.random.Generator) -> np.ndarray:
        order = np.arange(self.world.num_frames)
        return order if self.jumps is None else rng.permutation(order)[: self.jumps]

    def can_be_told(self, clip: SyntheticClip) -> list[bool]:
        """Of each object whether it can be found again: where looks have to tell, it is unlike all others."""
        looks = [(thing.noun, thing.colour, thing.size) for thing in clip.objects]
        return [self.jumps is None or looks.count(own) == 1 for own in looks]

    def followed(self, clip: SyntheticClip, frame: int) -> list[int]:
        """Objects that can be prompted on a frame, where they are visible, and found again on others."""
        return [n for n, told in enumerate(self.can_be_told(clip)) if told and clip.visibility[n, frame] > 0.5]


def likeness(clip: SyntheticClip, n: int) -> tuple[int, int]:
    """How many things of a clip have noun and colour of object `n`, and how many have its noun."""
    looks = [(thing.noun, thing.colour) for thing in clip.objects]
    return looks.count(looks[n]), sum(noun == looks[n][0] for noun, _ in looks)


def video_step(
    step: int, side: PixelSide, footage: list[Footage], clips: int, seed: int, share: tuple[int, int] = (0, 1)
) -> dict[str, torch.Tensor]:
    """Up to three objects per clip, those that look most alike first, carried from a prompted frame over all frames
    with soft memory masks.

    Args:
        clips: of a step; twice as many where frames jump.
        share: rank and number of the processes that share them.
    """
    rank, processes = share
    draw = step * processes + rank
    rng = np.random.default_rng([seed, 1, draw])
    torch.manual_seed(seed * 1_000_003 + draw)
    seen = footage[step % len(footage)]
    T = seen.num_frames
    start = 0 if rng.random() < 0.7 else int(rng.integers(T))
    grid = side.mask_tracker.config.sam2_config.memory_attention_rope_feat_sizes
    frames, targets, present, objects, clip_of, owners = [], [], [], [], [], []
    count = (clips if seen.jumps is None else 2 * clips) // processes
    for clip in batch_clips(draw, count, seed + 1, seen.world):
        order = seen.frame_order(rng)
        possible = rng.permutation(seen.followed(clip, order[start])).astype(int).tolist()
        chosen = sorted(possible, key=functools.partial(likeness, clip), reverse=True)[:3]
        for n in chosen:
            box = true_box(clip, n, order[start]) + JITTER * torch.randn(4)
            objects.append(TrackedObject(start, [MaskPrompt(boxes=box)]))
            targets.append(torch.from_numpy(clip.masks[n, order]))
            present.append(torch.from_numpy(clip.visibility[n, order] > 0.1))
            clip_of.append(len(frames))
            owners.append(cell_owners(clip.masks[:, order], seen.can_be_told(clip), grid))
        frames.append(clip.frames[order])
    pyramid = encode_frozen(side.mask_tracker, np.concatenate(frames))
    targets, present, owners = torch.stack(targets).float(), torch.stack(present), torch.stack(owners)
    totals: dict[str, torch.Tensor] = {}
    with matching_attention(side.mask_tracker) as attention:
        for masks in side.mask_tracker.propagate(ClipPyramids(pyramid, T, torch.tensor(clip_of)), objects):
            t = masks.frame_index
            losses = mask_losses(masks, targets[masks.objects, t], present[masks.objects, t])
            if attention:
                remembered = remembered_frames(t, start, side.mask_tracker.new_memory().num_recent)
                losses["matching"] = matching_loss(attention.pop(), owners[masks.objects], t, remembered)
            for name, value in losses.items():
                totals[name] = totals.get(name, 0.0) + value * (len(masks.objects) / len(objects) / T)
    loss = 5 * totals["bce"] + totals["dice"] + 0.5 * totals["object"] + 0.5 * totals["iou_head"]
    return {"loss": loss + MATCHING_WEIGHT * totals["matching"], **totals}


@contextmanager
def matching_attention(tracker: MaskTracker) -> Iterator[list[torch.Tensor]]:
    """A list that gets the attention `(N, h * w, M)` of the last layer onto the memory, one for each call."""
    collected: list[torch.Tensor] = []
    attention = tracker.sam2.memory_attention.layers[-1].cross_attn_image
    config = attention.config
    attention.config = copy.copy(config)
    attention.config._attn_implementation = "eager"  # the others do not give their weights
    handle = attention.register_forward_hook(lambda module, given, output: collected.append(output[1].mean(1)))
    try:
        yield collected
    finally:
        handle.remove()
        attention.config = config


def remembered_frames(t: int, start: int, num_recent: int) -> list[int]:
    """Frames whose maps frame `t` attends to, in the order of [`MemoryBank.spatial`], after a prompt on `start`."""
    step = 1 if t > start else -1
    recent = [t - step * distance for distance in range(num_recent, 0, -1)]
    return [start] + [frame for frame in recent if (frame - start) * step > 0]


def cell_owners(masks: np.ndarray, counted: list[bool], grid: tuple[int, int]) -> torch.Tensor:
    """Which object fills most of each cell of a grid, -1 for none or one that does not count: `(T, h * w)`."""
    share = F.adaptive_avg_pool2d(torch.from_numpy(masks).float(), tuple(grid)).flatten(2)
    best, owner = share.max(0)
    return torch.where((best > 0.5) & torch.tensor(counted)[owner], owner, -1)


def matching_loss(attention: torch.Tensor, owners: torch.Tensor, t: int, remembered: list[int]) -> torch.Tensor:
    """-log of the attention that the cells of an object pay to the cells of the same object in memory.

    Args:
        attention: `(N, h * w, M)`; the maps of the remembered frames come first in memory.
        owners: `(N, T, h * w)` object of each cell, -1 for none.
    """
    query, memory = owners[:, t], owners[:, remembered].flatten(1)
    same = (query[:, :, None] == memory[:, None]) & (query >= 0)[:, :, None]
    known = same.any(-1)
    if not known.any():
        return attention.sum() * 0.0
    mass = (attention[..., : memory.shape[1]] * same).sum(-1)[known]
    return -(mass + 1e-4).log().mean()


def true_box(clip: SyntheticClip, n: int, frame: int) -> torch.Tensor:
    """Box `(1, 4)` of an object on a frame, normalised xyxy."""
    height, width = clip.frames.shape[1:3]
    return torch.from_numpy(clip.boxes[n, frame])[None] / torch.tensor([width, height] * 2)


def evaluate_video(side: PixelSide, footage: Footage, seed: int, clips: int = 24) -> tuple[float, float]:
    """J of objects followed from their true box on the first frame, over all frames and on the last one."""
    values, last = [], []
    rng = np.random.default_rng(seed)
    for clip in batch_clips(0, clips, seed, footage.world, split="validation"):
        order = footage.frame_order(rng)
        followed = footage.followed(clip, order[0])
        objects = [TrackedObject(0, [MaskPrompt(boxes=true_box(clip, n, order[0]))]) for n in followed]
        pyramid = encode_frames(side.mask_tracker, clip.frames[order])
        whole = ClipPyramids(pyramid, len(order), torch.zeros(len(followed), dtype=torch.int64))
        for masks in side.mask_tracker.propagate(whole, objects):
            targets = torch.from_numpy(clip.masks[followed, order[masks.frame_index]])
            logits = F.interpolate(
                masks.logits[:, None], size=targets.shape[-2:], mode="bilinear", align_corners=False
            )
            predicted = logits[:, 0] > 0
            union = (predicted | targets).flatten(1).sum(1)
            iou = torch.where(union > 0, (predicted & targets).flatten(1).sum(1) / union.clamp(min=1), 1.0)
            values += iou.tolist()
            last += iou.tolist() if masks.frame_index == len(order) - 1 else []
    return float(np.mean(values)), float(np.mean(last))


def memory_figures(side: PixelSide, footage: list[Footage], seed: int) -> dict[str, float]:
    """Figures of the stage "video" on whole clips and on frames in random order."""
    whole = next(seen for seen in footage if seen.jumps is None)
    jumps = next(seen for seen in footage if seen.jumps is not None)
    j, last = evaluate_video(side, whole, seed)
    return {"val_j": j, "val_j_last_frame": last, "val_j_jumps": evaluate_video(side, jumps, seed)[0]}


def train_video_stage(
    model: SparrowForVideoGrounding,
    output: Path,
    world_name: str,
    steps: int,
    clips: int = 8,
    seed: int = 0,
    learning_rate: float = 8e-4,
):
    """Stage "video": mask decoder, prompt encoder and memory; what makes the features is frozen.

    Half of the steps see frames in random order, which take less than half of the time of a whole clip: whole clips
    alone teach to look for an object where it was.

    Raises:
        ValueError: the clips cannot be dealt out evenly among the processes.
    """
    share = share_of(clips)
    hard = long_world(PRESETS[world_name])
    jumps = Footage(hard, jumps=JUMPS)
    footage = [Footage(hard), jumps, Footage(replace(hard, num_frames=8)), jumps]
    side = PixelSide(model, hard)
    side.requires_grad_(False)
    sam2 = side.mask_tracker.sam2
    sam2.requires_grad_(True)
    sam2.vision_encoder.requires_grad_(False)
    for projection in (sam2.mask_decoder.conv_s0, sam2.mask_decoder.conv_s1):
        projection.requires_grad_(False)
    run_stage(
        "video",
        side.mask_tracker,
        functools.partial(video_step, side=side, footage=footage, clips=clips, seed=seed, share=share),
        output=output,
        steps=steps,
        learning_rate=learning_rate,
        evaluate=functools.partial(memory_figures, side, footage, seed),
    )
