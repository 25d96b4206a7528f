"""The generated referring-video world: trains and tests the tiny model without any download."""

from .config import HELD_OUT_PAIRS, KINDS, PRESETS, SINGLE_TARGET_KINDS, WorldConfig
from .contact_sheet import render_contact_sheet
from .dataset import SPLITS, SyntheticVideos, split_seed
from .expressions import VOCABULARY, Expression, all_expressions, sample_expressions
from .scene import SyntheticObject
from .sprites import COLOURS, NOUNS
from .world import SyntheticClip, generate_clip

__all__ = [
    "COLOURS",
    "HELD_OUT_PAIRS",
    "KINDS",
    "NOUNS",
    "PRESETS",
    "SINGLE_TARGET_KINDS",
    "SPLITS",
    "VOCABULARY",
    "Expression",
    "SyntheticClip",
    "SyntheticObject",
    "SyntheticVideos",
    "WorldConfig",
    "all_expressions",
    "generate_clip",
    "render_contact_sheet",
    "sample_expressions",
    "split_seed",
]
