"""From scratch, towers: what each patch of the spatial and the temporal tower shows, on generated videos.

Throw-away heads say for every patch which noun, colour and size covers it, in which direction that object moves,
where its box is and what happens to it. Without this the towers of a small model never learn motion from the answers
alone, and their tokens forget where in the picture they come from.
"""

import copy
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
from .object_facts import EVENT_NAMES, MOST_RANKS, RANK_NAMES, UNKNOWN, ObjectFacts, object_facts, ranks_on
from .pretrain_segmenter import batch_clips, long_world

DIRECTIONS = ("still", "left", "right", "up", "down")
SPEED_WORDS = ("still", *SPEEDS)
ACTIONS = ("still", "straight", "turn", "stop", "start")
MOTION_WORDS = {"direction": DIRECTIONS, "speed": SPEED_WORDS, "action": ACTIONS}
BACKGROUND = UNKNOWN  # patches without an object count for nothing
RARE = 3.0  # weight of an event that happens against one that does not
KEEP_WEIGHT = 5.0  # of what the adapters give, where that should stay


class TowerSide(nn.Module):
    """What the stage trains, beside throw-away heads.

    Args:
        keeps: whether what the adapters make of the towers stays as it is, so that a language model that has learnt
            to read it still can.
    """

    def __init__(self, model: SparrowForVideoGrounding, world: WorldConfig, keeps: bool = False):
        super().__init__()
        host, config = model.model.host, model.config
        self.spatial_tower, self.temporal_tower = host.spatial_tower, host.temporal_tower
        self.spatial_layer = config.spatial_feature_layer
        self.patch_size = config.spatial_config.patch_size
        self.tubelet_size, self.num_frames = config.temporal_config.tubelet_size, config.num_frames
        self.words = {"noun": world.nouns, "colour": world.colours, "size": world.sizes} | MOTION_WORDS
        width = config.spatial_config.hidden_size
        looks = {name: len(self.words[name]) for name in ("noun", "colour", "size")} | {"box": 4}
        sizes = looks | {"ranks": len(RANK_NAMES) * MOST_RANKS}
        self.spatial_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        width = config.temporal_config.hidden_size
        sizes = looks | {name: len(words) for name, words in MOTION_WORDS.items()}
        sizes |= {"events": len(EVENT_NAMES), "partner": len(world.colours)}
        self.temporal_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.known = None  # frozen, and not registered here
        if keeps:
            self.known = {
                "towers": copy.deepcopy(nn.ModuleList([self.spatial_tower, self.temporal_tower])),
                "adapters": nn.ModuleList([host.spatial_adapter, host.temporal_adapter]).requires_grad_(False),
            }

    def patches(self, pixels: torch.Tensor, towers: nn.ModuleList | None = None) -> torch.Tensor:
        """Features `(…, patches, D)` of frames `(F, 3, h, w)` by the spatial tower, of clips `(C, t, 3, h, w)` by the
        temporal one; of other towers than its own where these are given."""
        spatial_tower, temporal_tower = towers or (self.spatial_tower, self.temporal_tower)
        if pixels.dim() == 5:
            return temporal_tower(pixels).last_hidden_state[:, 1:]
        output = spatial_tower(pixels, output_hidden_states=[self.spatial_layer])
        return output.hidden_states[self.spatial_layer][:, 1:]

    def change(self, pixels: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """How far what the adapter makes of features has moved from what it was, in units of its variance."""
        adapter = self.known["adapters"][1 if pixels.dim() == 5 else 0]
        with torch.no_grad():
            before = adapter(self.patches(pixels, self.known["towers"]))
        return F.mse_loss(adapter(features), before) / before.var()


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
    losses, total = {}, 0.0
    for tower, (pixels, owners) in _shown(side, batch, np.random.default_rng([seed, 2, step])).items():
        features = side.patches(pixels)
        for name, (output, target) in _answers(side, tower, features, owners).items():
            loss = head_loss(name, output, target)
            if loss is not None:
                losses[f"{tower}_{name}"] = loss
                total = total + loss
        if side.known is not None:
            losses[f"{tower}_change"] = side.change(pixels, features)
            total = total + KEEP_WEIGHT * losses[f"{tower}_change"]
    return {"loss": total, **losses}


def head_loss(name: str, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """Loss of a throw-away head over the patches of which the answer is known; None if there is no such patch."""
    if name == "box":
        return 10 * box_distance(output, target)
    if name == "events":
        known = ~target.isnan()
        weight = torch.tensor(RARE)
        return F.binary_cross_entropy_with_logits(output[known], target[known], pos_weight=weight)
    if name == "ranks":
        output, target = _each_rank(output, target)
    if not (target != UNKNOWN).any():
        return None
    return F.cross_entropy(output, target, ignore_index=UNKNOWN)


def box_distance(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean distance of normalised cxcywh coordinates, over patches with an object."""
    known = ~target.isnan().any(-1)
    return (output[known].sigmoid() - target[known]).abs().mean()


def _shown(
    side: TowerSide, clips: list[SyntheticClip], rng: np.random.Generator
) -> dict[str, tuple[torch.Tensor, list[PatchOwners]]]:
    """What each tower sees of the clips, which is what the language model sees, and what its patches show: of the
    spatial one two frames of each clip, of the temporal one all tubelets."""
    facts = [object_facts(clip, side.words["colour"]) for clip in clips]
    batch = [as_seen(clip, side.num_frames) for clip in clips]
    frames, owners = [], []
    for clip, own in zip(batch, facts, strict=True):
        for t in rng.choice(len(clip.frames), size=2, replace=False):
            frames.append(clip.frames[t])
            owners += frame_owners([clip], [own], side.patch_size, t)
    moving = np.stack([clip.frames for clip in batch])
    moving = temporal_input(moving.reshape(-1, *moving.shape[2:])).unflatten(0, moving.shape[:2])
    return {
        "spatial": (spatial_input(np.stack(frames)), owners),
        "temporal": (moving, tubelet_owners(batch, facts, side.patch_size, side.tubelet_size)),
    }


def _answers(
    side: TowerSide, tower: str, features: torch.Tensor, owners: list[PatchOwners]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of the heads of a tower, and what they should be."""
    heads = side.spatial_heads if tower == "spatial" else side.temporal_heads
    features = features.flatten(0, 1)
    return {name: (head(features), patch_targets(owners, name, side.words.get(name))) for name, head in heads.items()}


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


def frame_owners(batch: list[SyntheticClip], facts: list[ObjectFacts], patch_size: int, t: int) -> list[PatchOwners]:
    """Of the spatial tower's patches of frame `t`: one item per clip, with the ranks on that frame."""
    return [
        _owners(clip, patch_owner(clip.masks[:, [t]], patch_size)[0], t, replace(own, ranks=ranks_on(clip, t)))
        for clip, own in zip(batch, facts, strict=True)
    ]


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
    for tower, (pixels, owners) in _shown(side, batch, np.random.default_rng(seed)).items():
        for name, (output, target) in _answers(side, tower, side.patches(pixels), owners).items():
            figures[f"val_{tower}_{name}"] = _accuracy(name, output, target)
    return figures


def _accuracy(name: str, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Share of the patches with an object that a head is right about; of boxes the mean distance."""
    if name == "box":
        return box_distance(output, target)
    if name == "events":  # balanced: of those that happen, and of those that do not
        return sum(((output > 0) == happens)[target == happens].float().mean() for happens in (0, 1)) / 2
    if name == "ranks":
        output, target = _each_rank(output, target)
    known = target != BACKGROUND
    return (output.argmax(-1) == target)[known].float().mean()


def _each_rank(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return output.unflatten(-1, (-1, MOST_RANKS)).flatten(0, 1), target.flatten()


def train_tower_stage(
    model: SparrowForVideoGrounding,
    output: Path,
    world_name: str,
    steps: int,
    clips: int = 16,
    seed: int = 0,
    keeps: bool = False,
):
    """Stage "towers": dense attributes, motion and boxes. Every other step sees long clips at every other frame.

    Args:
        keeps: see [`TowerSide`].
    """
    torch.manual_seed(seed + 2)
    world = replace(PRESETS[world_name], still=0.2)
    side = TowerSide(model, world, keeps)
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
