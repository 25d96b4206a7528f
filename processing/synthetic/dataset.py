"""Fixed splits of generated clips: one clip and one question a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .config import HELD_OUT_PAIRS, PRESETS, WorldConfig
from .expressions import Expression, all_expressions
from .world import SyntheticClip, generate_clip

# Preset and number of records. The order of the splits is part of their seeds.
_SPLITS = {
    "train": ("train", 1_000_000),
    "validation": ("train", 512),
    "test-easy": ("easy", 512),
    "test-hard": ("hard", 512),
    "test-new-words": ("new_words", 512),
}
SPLITS = tuple(_SPLITS)
_MAX_ATTEMPTS = 256


def split_seed(split: str, index: int, stream: int = 0, attempt: int = 0) -> int:
    """Seed of a clip. Different arguments give different seeds, so the splits share no clip.

    Args:
        split: one of ``SPLITS``.
        index: 0 <= index < 2**32.
        stream: 0 <= stream < 2**16, for example the seed of a training run.
        attempt: 0 <= attempt < 256, counts the clips of a record that its question did not fit.

    Raises:
        ValueError: for an unknown split or a number out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {SPLITS}")
    if not (0 <= index < 2**32 and 0 <= stream < 2**16 and 0 <= attempt < _MAX_ATTEMPTS):
        raise ValueError(f"index, stream or attempt out of range: {index}, {stream}, {attempt}")
    return (SPLITS.index(split) + 1) << 56 | stream << 40 | index << 8 | attempt


class SyntheticVideos:
    """A split of the generated world, indexable; each record is generated when it is asked for.

    Records are dicts:
        id (str), seed (int): of the clip;
        clip: the ``SyntheticClip``;
        frames (T, H, W, 3) uint8, masks (N, T, H, W) bool, boxes and full_boxes (N, T, 4) float32 xyxy pixels: see
            ``SyntheticClip``;
        objects: list of N ``SyntheticObject``;
        expression (str), kind (str), target_ids (tuple of int), candidates (int): the question, see ``Expression``;
        expressions: list of all questions about the clip, for training with several of them.

    The kinds of questions take turns, so that every kind is equally frequent.

    Args:
        split: one of ``SPLITS``. Objects of ``HELD_OUT_PAIRS`` appear in ``test-new-words`` only, where every
            question is about one of them, by colour and noun.
        config: the world; by default the preset that belongs to the split.
        size: number of records; by default 512, and a million for ``train``.
        seed: another seed (below 65,536) gives other clips of the same split; published figures use 0.
        resolutions: (height, width) pixels that take turns; by default that of the config.

    Raises:
        ValueError: for an unknown split, or a config with ``new_pairs`` for another split than ``test-new-words``.
    """

    def __init__(
        self,
        split: str,
        config: WorldConfig | None = None,
        size: int | None = None,
        seed: int = 0,
        resolutions: Sequence[tuple[int, int]] | None = None,
    ):
        split_seed(split, 0, seed)  # checks both
        preset, default_size = _SPLITS[split]
        self.split = split
        self.seed = seed
        self.size = default_size if size is None else size
        self.config = config or PRESETS[preset]
        if split == "test-new-words":
            fewest = max(3, self.config.min_objects)
            self.config = replace(
                self.config,
                new_pairs=True,
                min_objects=fewest,
                max_objects=max(fewest, self.config.max_objects),
                kinds=("colour_class",),
            )
        elif self.config.new_pairs:
            raise ValueError(f"split {split!r} must not show HELD_OUT_PAIRS: use a config without new_pairs")
        sizes = [(self.config.height, self.config.width)] if resolutions is None else resolutions
        self.configs = [replace(self.config, height=height, width=width) for height, width in sizes]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(f"record {index} of {self.size}")
        kind = self.config.kinds[index % len(self.config.kinds)]
        config = self.configs[index // len(self.config.kinds) % len(self.configs)]
        for attempt in range(_MAX_ATTEMPTS):
            clip = generate_clip(split_seed(self.split, index, self.seed, attempt), config)
            rng = np.random.default_rng([clip.seed, 1])
            expressions = all_expressions(clip, rng)
            suitable = [expression for expression in expressions if self._suits(expression, kind, clip)]
            if suitable:
                return self._record(index, clip, suitable[int(rng.integers(len(suitable)))], expressions)
        raise RuntimeError(f"no clip of {_MAX_ATTEMPTS} allows an expression of kind {kind!r} with {config}")

    def _suits(self, expression: Expression, kind: str, clip: SyntheticClip) -> bool:
        if self.split == "test-new-words":
            target = clip.objects[expression.target_ids[0]]
            return (target.noun, target.colour) in HELD_OUT_PAIRS
        return expression.kind == kind

    def _record(self, index: int, clip: SyntheticClip, asked: Expression, expressions: list[Expression]) -> dict:
        return {
            "id": f"{self.split}-{index:06d}",
            "seed": clip.seed,
            "clip": clip,
            "frames": clip.frames,
            "masks": clip.masks,
            "boxes": clip.boxes,
            "full_boxes": clip.full_boxes,
            "objects": clip.objects,
            "expression": asked.text,
            "kind": asked.kind,
            "target_ids": asked.target_ids,
            "candidates": asked.candidates,
            "expressions": expressions,
        }
