"""The generated referring-video world: trains and tests the tiny model without any download."""

from .answers import (
    DIALOGUE_KINDS,
    MAX_SAMPLED,
    VOCABULARY,
    Dialogue,
    all_dialogues,
    refer_dialogue,
)
from .config import HELD_OUT_PAIRS, KINDS, PRESETS, RESOLUTIONS, SINGLE_TARGET_KINDS, SPEEDS, WorldConfig
from .contact_sheet import render_contact_sheet
from .dataset import SPLITS, SyntheticVideos, split_seed
from .expressions import Expression, all_expressions, sample_expressions
from .scene import SyntheticObject
from .sprites import COLOURS, NOUNS
from .world import SyntheticClip, generate_clip

__all__ = [
    "COLOURS",
    "DIALOGUE_KINDS",
    "HELD_OUT_PAIRS",
    "KINDS",
    "MAX_SAMPLED",
    "NOUNS",
    "PRESETS",
    "RESOLUTIONS",
    "SINGLE_TARGET_KINDS",
    "SPEEDS",
    "SPLITS",
    "VOCABULARY",
    "Dialogue",
    "Expression",
    "SyntheticClip",
    "SyntheticObject",
    "SyntheticVideos",
    "WorldConfig",
    "all_dialogues",
    "all_expressions",
    "generate_clip",
    "refer_dialogue",
    "render_contact_sheet",
    "sample_expressions",
    "split_seed",
]
