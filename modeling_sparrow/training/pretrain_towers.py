"""From scratch, towers: what each patch of the spatial and the temporal tower shows, on generated videos.

Throw-away classifiers say for every patch which noun, colour and size covers it, and in which direction that object
moves. Without this the towers of a small model never learn motion from the answers alone.
"""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparrow_processing.pixel_streams import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from sparrow_processing.synthetic import PRESETS, SyntheticClip, WorldConfig

from ..modeling_sparrow import SparrowForVideoGrounding
from .loop import run_stage
from .pretrain_segmenter import batch_clips

DIRECTIONS = ("still", "left", "right", "up", "down")
BACKGROUND = -1  # patches without an object count for nothing


class TowerSide(nn.Module):
    def __init__(self, model: SparrowForVideoGrounding, world: WorldConfig):
        super().__init__()
        host, config = model.model.host, model.config
        self.spatial_tower, self.temporal_tower = host.spatial_tower, host.temporal_tower
        self.spatial_layer = config.spatial_feature_layer
        self.patch_size = config.spatial_config.patch_size
        self.tubelet_size = config.temporal_config.tubelet_size
        self.words = {"noun": world.nouns, "colour": world.colours, "size": world.sizes}
        width = config.spatial_config.hidden_size
        self.spatial_heads = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in self.words.items()})
        width = config.temporal_config.hidden_size
        self.temporal_heads = nn.ModuleDict(
            {"direction": nn.Linear(width, len(DIRECTIONS)), "colour": nn.Linear(width, len(world.colours))}
        )


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


def tower_step(step: int, side: TowerSide, world: WorldConfig, clips: int, seed: int) -> dict[str, torch.Tensor]:
    batch = batch_clips(step, clips, seed + 2, world)
    rng = np.random.default_rng([seed, 2, step])
    losses = {}
    for name, (logits, labels) in {**_spatial(side, batch, rng), **_temporal(side, batch)}.items():
        losses[name] = F.cross_entropy(logits, labels, ignore_index=BACKGROUND)
    return {"loss": sum(losses.values()), **losses}


def _spatial(side: TowerSide, batch: list[SyntheticClip], rng: np.random.Generator) -> dict:
    """Logits and labels of the patches of two frames of each clip."""
    frames, owners, objects = [], [], []
    for clip in batch:
        owner = patch_owner(clip.masks, side.patch_size)
        for t in rng.choice(len(clip.frames), size=2, replace=False):
            frames.append(clip.frames[t])
            owners.append(owner[t].ravel())
            objects.append(clip.objects)
    output = side.spatial_tower(spatial_input(np.stack(frames)), output_hidden_states=[side.spatial_layer])
    features = output.hidden_states[side.spatial_layer][:, 1:].flatten(0, 1)
    return {
        f"spatial_{name}": (head(features), _labels(owners, objects, name, side.words[name]))
        for name, head in side.spatial_heads.items()
    }


def _temporal(side: TowerSide, batch: list[SyntheticClip]) -> dict:
    """Logits and labels of every tubelet, by the object in the middle of its time."""
    frames = np.stack([clip.frames for clip in batch])
    features = side.temporal_tower(
        temporal_input(frames.reshape(-1, *frames.shape[2:])).unflatten(0, frames.shape[:2])
    )
    features = features.last_hidden_state[:, 1:].flatten(0, 1)
    middle = slice(side.tubelet_size // 2, None, side.tubelet_size)
    owners = [patch_owner(clip.masks[:, middle], side.patch_size).ravel() for clip in batch]
    objects = [clip.objects for clip in batch]
    words = {"direction": DIRECTIONS, "colour": side.words["colour"]}
    return {
        f"temporal_{name}": (head(features), _labels(owners, objects, name, words[name]))
        for name, head in side.temporal_heads.items()
    }


def _labels(owners: list[np.ndarray], objects: list, name: str, words: tuple[str, ...]) -> torch.Tensor:
    """Word index of the owner of each patch. An object that turned, or moved only for a while, has no direction."""
    rows = []
    for owner, items in zip(owners, objects, strict=True):
        index = [
            BACKGROUND
            if name == "direction" and (item.bounces or item.action != "straight")
            else words.index(getattr(item, name))
            for item in items
        ]
        rows.append(np.array([*index, BACKGROUND])[owner])  # owner -1 picks the last entry
    return torch.from_numpy(np.concatenate(rows))


def evaluate_towers(side: TowerSide, world: WorldConfig, seed: int, clips: int = 48) -> dict[str, float]:
    batch = batch_clips(0, clips, seed, world, split="validation")
    figures = {}
    for name, (logits, labels) in {
        **_spatial(side, batch, np.random.default_rng(seed)),
        **_temporal(side, batch),
    }.items():
        known = labels != BACKGROUND
        figures[f"val_{name}"] = (logits.argmax(-1) == labels)[known].float().mean()
    return figures


def train_tower_stage(model: SparrowForVideoGrounding, output: Path, steps: int, clips: int = 16, seed: int = 0):
    """Stage "towers": dense attributes and motion."""
    torch.manual_seed(seed + 2)
    world = replace(PRESETS["easy"], still=0.2)
    side = TowerSide(model, world)
    run_stage(
        "towers",
        side,
        functools.partial(tower_step, side=side, world=world, clips=clips, seed=seed),
        output=output,
        steps=steps,
        learning_rate=1e-3,
        evaluate=functools.partial(evaluate_towers, side, world, seed),
    )
