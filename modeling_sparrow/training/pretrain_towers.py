"""From scratch, towers: what each patch of the spatial and the temporal tower shows, on generated videos.

Throw-away heads say for every patch which noun, colour and size covers it, in which direction that object moves,
where its box is and what happens to it. Without this the towers of a small model never learn motion from the answers
alone, and their tokens forget where in the picture they come from.
"""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparrow_processing.frame_sampling import sample_frame_indices
from sparrow_processing.pixel_streams import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from sparrow_processing.synthetic import PRESETS, SPEEDS, SyntheticClip, SyntheticObject, WorldConfig

from ..modeling_sparrow import SparrowForVideoGrounding
from .loop import run_stage
from .object_facts import EVENT_NAMES, MOST_RANKS, UNKNOWN, ObjectFacts, object_facts
from .pretrain_segmenter import batch_clips, long_world

DIRECTIONS = ("still", "left", "right", "up", "down")
SPEED_WORDS = ("still", *SPEEDS)
ACTIONS = ("still", "straight", "turn", "stop", "start")
MOTION_WORDS = {"direction": DIRECTIONS, "speed": SPEED_WORDS, "action": ACTIONS}
BACKGROUND = UNKNOWN  # patches without an object count for nothing
RARE = 3.0  # weight of an event that happens against one that does not


class TowerSide(nn.Module):
    def __init__(self, model: SparrowForVideoGrounding, world: WorldConfig):
        super().__init__()
        host, config = model.model.host, model.config
        self.spatial_tower, self.temporal_tower = host.spatial_tower, host.temporal_tower
        self.spatial_layer = config.spatial_feature_layer
        self.patch_size = config.spatial_config.patch_size
        self.tubelet_size, self.num_frames = config.temporal_config.tubelet_size, config.num_frames
        self.words = {"noun": world.nouns, "colour": world.colours, "size": world.sizes}
        width = config.spatial_config.hidden_size
        sizes = {name: len(words) for name, words in self.words.items()} | {"box": 4}
        self.spatial_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        width = config.temporal_config.hidden_size
        sizes |= {name: len(words) for name, words in MOTION_WORDS.items()}
        sizes |= {"events": len(EVENT_NAMES), "partner": len(world.colours)}
        self.temporal_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})


@dataclass
class PatchOwners:
    """What the patches of one frame show: `index` `(P,)` of the object that covers each, BACKGROUND for none."""

    index: np.ndarray
    clip: SyntheticClip
    boxes: np.ndarray  # (N, 4) normalised cxcywh, NaN where hidden
    facts: ObjectFacts | None = None


def as_seen(clip: SyntheticClip, num_frames: int) -> SyntheticClip:
    """The clip with only the frames that the language model sees of it."""
    if len(clip.frames) <= num_frames:
        return clip
    kept = sample_frame_indices(np.arange(len(clip.frames)), num_frames)
    places = {name: getattr(clip, name)[:, kept] for name in ("masks", "boxes", "full_boxes", "visibility")}
    return replace(clip, frames=clip.frames[kept], **places)


def spatial_input(frames: np.ndarray) -> torch.Tensor:
    """uint8 `(F, H, W, 3)` at the tower's own size to its float32 `(F, 3, H, W)`."""
    return _scale(frames, CLIP_MEAN, CLIP_STD)


def temporal_input(frames: np.ndarray) -> torch.Tensor:
    return _scale(frames, IMAGENET_MEAN, IMAGENET_STD)


def _scale(frames: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def patch_owner(masks: np.ndarray, patch_size: int) -> np.ndarray:
    """Object that covers most of each patch, `(N, T, H, W)` to `(T, h, w)`; BACKGROUND below a fifth of the patch."""
    N, T, H, W = masks.shape
    h, w = H // patch_size, W // patch_size
    share = masks.reshape(N, T, h, patch_size, w, patch_size).mean((3, 5))
    return np.where(share.max(0) > 0.2, share.argmax(0), BACKGROUND)


def tower_step(
    step: int, side: TowerSide, worlds: list[WorldConfig], clips: int, seed: int
) -> dict[str, torch.Tensor]:
    world = worlds[step % len(worlds)]
    batch = batch_clips(step, clips, seed + 2, world)
    rng = np.random.default_rng([seed, 2, step])
    losses = {}
    for name, (output, target) in _answers(side, batch, rng).items():
        loss = head_loss(name.split("_")[1], output, target)
        if loss is not None:
            losses[name] = loss
    return {"loss": sum(losses.values()), **losses}


def head_loss(name: str, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """Loss of a throw-away head over the patches of which the answer is known; None if there is no such patch."""
    if name == "box":
        return 10 * box_distance(output, target)
    if name == "events":
        known = ~target.isnan()
        weight = torch.tensor(RARE)
        return F.binary_cross_entropy_with_logits(output[known], target[known], pos_weight=weight)
    if name == "ranks":
        output, target = output.unflatten(-1, (-1, MOST_RANKS)).flatten(0, 1), target.flatten()
    if not (target != UNKNOWN).any():
        return None
    return F.cross_entropy(output, target, ignore_index=UNKNOWN)


def box_distance(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean distance of normalised cxcywh coordinates, over patches with an object."""
    known = ~target.isnan().any(-1)
    return (output[known].sigmoid() - target[known]).abs().mean()


def _answers(side: TowerSide, clips: list[SyntheticClip], rng: np.random.Generator) -> dict:
    """Outputs and targets of all heads; the towers see the clips as the language model does."""
    facts = [object_facts(clip, side.words["colour"]) for clip in clips]
    batch = [as_seen(clip, side.num_frames) for clip in clips]
    return {**_spatial(side, batch, rng), **_temporal(side, batch, facts)}


def _spatial(side: TowerSide, batch: list[SyntheticClip], rng: np.random.Generator) -> dict:
    """Outputs and targets of the patches of two frames of each clip."""
    frames, owners = [], []
    for clip in batch:
        index = patch_owner(clip.masks, side.patch_size)
        for t in rng.choice(len(clip.frames), size=2, replace=False):
            frames.append(clip.frames[t])
            owners.append(_owners(clip, index[t], t))
    output = side.spatial_tower(spatial_input(np.stack(frames)), output_hidden_states=[side.spatial_layer])
    features = output.hidden_states[side.spatial_layer][:, 1:].flatten(0, 1)
    return {
        f"spatial_{name}": (head(features), patch_targets(owners, name, side.words.get(name)))
        for name, head in side.spatial_heads.items()
    }


def _temporal(side: TowerSide, batch: list[SyntheticClip], facts: list[ObjectFacts]) -> dict:
    """Outputs and targets of every tubelet, by the object in the middle of its time."""
    frames = np.stack([clip.frames for clip in batch])
    features = side.temporal_tower(
        temporal_input(frames.reshape(-1, *frames.shape[2:])).unflatten(0, frames.shape[:2])
    )
    features = features.last_hidden_state[:, 1:].flatten(0, 1)
    owners = tubelet_owners(batch, facts, side.patch_size, side.tubelet_size)
    words = side.words | MOTION_WORDS
    return {
        f"temporal_{name}": (head(features), patch_targets(owners, name, words.get(name)))
        for name, head in side.temporal_heads.items()
    }


def tubelet_owners(
    batch: list[SyntheticClip], facts: list[ObjectFacts], patch_size: int, tubelet_size: int
) -> list[PatchOwners]:
    """Of the temporal tower's tokens: one item per clip and tubelet, by the object in the middle of its time."""
    owners = []
    for clip, own in zip(batch, facts, strict=True):
        middle = range(tubelet_size // 2, len(clip.frames), tubelet_size)
        index = patch_owner(clip.masks[:, list(middle)], patch_size)
        owners += [_owners(clip, slot, t, own) for slot, t in zip(index, middle, strict=True)]
    return owners


def frame_owners(batch: list[SyntheticClip], patch_size: int, t: int) -> list[PatchOwners]:
    """Of the spatial tower's patches of frame `t`: one item per clip."""
    return [_owners(clip, patch_owner(clip.masks[:, [t]], patch_size)[0], t) for clip in batch]


def _owners(clip: SyntheticClip, index: np.ndarray, t: int, facts: ObjectFacts | None = None) -> PatchOwners:
    H, W = clip.frames.shape[1:3]
    corners = clip.boxes[:, t] / np.array([W, H, W, H], np.float32)
    boxes = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
    return PatchOwners(index.ravel(), clip, boxes, facts)


def patch_targets(owners: list[PatchOwners], name: str, words: tuple[str, ...] | None) -> torch.Tensor:
    """Word index of the owner of each patch, or its box, or one of its facts."""
    rows = []
    for owner in owners:
        if words is not None:
            said = [_word(owner.clip, item, name) for item in owner.clip.objects]
            values = np.array([BACKGROUND if word is None else words.index(word) for word in said])
        else:
            values = owner.boxes if name == "box" else getattr(owner.facts, name)
        nothing = np.nan if np.issubdtype(values.dtype, np.floating) else BACKGROUND
        values = np.concatenate([values, np.full_like(values[:1], nothing)])
        rows.append(values[owner.index])  # BACKGROUND picks the last entry
    targets = np.concatenate(rows)
    return torch.from_numpy(targets.astype(np.float32) if np.issubdtype(targets.dtype, np.floating) else targets)


def _word(clip: SyntheticClip, item: SyntheticObject, name: str) -> str | None:
    """What is said of an object. One that turned, or moved only for a while, has no direction; a clip of which only
    some frames are seen does not tell its speeds."""
    if name == "direction":
        return None if item.bounces or item.action != "straight" else item.direction
    if name == "action":
        return "still" if item.direction == "still" else "turn" if item.bounces else item.action
    if name == "speed":
        if len(clip.frames) < clip.config.num_frames:
            return None
        if item.direction == "still":
            return "still"
        per_second = item.speed * clip.config.frames_per_second / clip.config.short_side
        return min(SPEEDS, key=lambda word: abs(sum(SPEEDS[word]) / 2 - per_second))
    return getattr(item, name)


def evaluate_towers(side: TowerSide, world: WorldConfig, seed: int, clips: int = 48) -> dict[str, float]:
    batch = batch_clips(0, clips, seed, world, split="validation")
    figures = {}
    for name, (output, target) in _answers(side, batch, np.random.default_rng(seed)).items():
        if name.endswith("box"):
            figures[f"val_{name}"] = box_distance(output, target)
        elif name.endswith("events"):  # balanced: of those that happen, and of those that do not
            figures[f"val_{name}"] = (
                sum(((output > 0) == happens)[target == happens].float().mean() for happens in (0, 1)) / 2
            )
        else:
            known = target != BACKGROUND
            figures[f"val_{name}"] = (output.argmax(-1) == target)[known].float().mean()
    return figures


def train_tower_stage(
    model: SparrowForVideoGrounding, output: Path, world_name: str, steps: int, clips: int = 16, seed: int = 0
):
    """Stage "towers": dense attributes, motion and boxes. Every other step sees long clips at every other frame."""
    torch.manual_seed(seed + 2)
    world = replace(PRESETS[world_name], still=0.2)
    side = TowerSide(model, world)
    run_stage(
        "towers",
        side,
        functools.partial(
            tower_step,
            side=side,
            worlds=[world, replace(long_world(world), still=world.still)],
            clips=clips,
            seed=seed,
        ),
        output=output,
        steps=steps,
        learning_rate=1e-3,
        evaluate=functools.partial(evaluate_towers, side, world, seed),
    )
