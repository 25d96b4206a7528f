"""The knobs of the generated world and its fixed sets of words."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .shapes import SHAPES
from .sprites import COLOURS, NOUNS

# Pairs that no object has unless WorldConfig.new_pairs asks for them: they test whether words are combined.
HELD_OUT_PAIRS = (
    ("circle", "purple"),
    ("square", "orange"),
    ("triangle", "white"),
    ("star", "blue"),
    ("ring", "yellow"),
    ("cross", "green"),
    ("heart", "black"),
    ("diamond", "red"),
    ("arrow", "purple"),
    ("house", "blue"),
    ("cat", "green"),
    ("elephant", "orange"),
    ("turtle", "purple"),
    ("fish", "yellow"),
    ("owl", "red"),
    ("butterfly", "white"),
    ("car", "black"),
    ("train", "orange"),
    ("plane", "green"),
    ("banana", "blue"),
    ("mushroom", "purple"),
    ("umbrella", "red"),
    ("key", "white"),
    ("guitar", "black"),
    ("shoe", "yellow"),
    ("tree", "blue"),
)

# Length of an object's longest side, as a share of the picture's short side (23-28 and 37-46 px at 128 px).
SIZES = {"small": (23 / 128, 28 / 128), "large": (37 / 128, 46 / 128)}
# Unit steps (x, y); y points down.
DIRECTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Speed in short sides per second (1.5-2.5 and 4-6 px per frame at 128 px and 8 frames per second).
SPEEDS = {"slow": (1.5 / 16, 2.5 / 16), "fast": (4 / 16, 6 / 16)}

# Kinds of expressions that the easy presets ask: one target, which looks, lies or moves in some way.
SINGLE_TARGET_KINDS = ("class", "colour_class", "colour", "size", "position", "motion", "relation", "speed")
KINDS = (*SINGLE_TARGET_KINDS, "multi", "none", "ordinal", "event", "meeting")

MOST_OBJECTS = 8  # the words count no further

# (height, width) in pixels, for data at more than one resolution.
RESOLUTIONS = ((128, 128), (128, 192), (192, 128), (160, 160), (144, 256), (192, 192), (256, 192), (256, 256))


@dataclass(frozen=True)
class WorldConfig:
    """Everything that shapes the generated clips.

    Raises:
        ValueError: if a value is out of range, with what was expected.
    """

    height: int = 128  # pixels
    width: int = 128
    num_frames: int = 8
    frames_per_second: float = 8.0  # speeds are per second: a longer clip lasts longer, objects are no slower
    min_objects: int = 2
    max_objects: int = 4
    nouns: tuple[str, ...] = NOUNS
    colours: tuple[str, ...] = tuple(COLOURS)
    sizes: tuple[str, ...] = tuple(SIZES)
    same_noun: float = 0.55  # probability that an object copies the noun of an earlier one
    same_colour: float = 0.3  # the same for the colour
    always_same_noun: bool = False  # the first two objects of every clip share their noun
    still: float = 0.25  # probability that an object does not move
    turn: float = 0.0  # probability that a moving object turns around
    stop: float = 0.0  # probability that a moving object stops
    start: float = 0.0  # probability that a moving object stands still at first
    edge: float = 0.35  # probability of a thin dark or light edge around a shape
    bounce: bool = True  # turn at the walls (needed in long clips) instead of leaving the picture
    crossing: float = 0.0  # probability that the first two objects meet and overlap
    late_entry: float = 0.0  # probability that one object enters after the first frame
    leaving: float = 0.0  # probability that one object leaves before the last frame
    occluder: float = 0.0  # probability of a bar that hides a moving object for a while, where the paths allow one
    photographs: float = 0.5  # probability of a photographic texture in the background
    new_pairs: bool = False  # show one of HELD_OUT_PAIRS, with distractors of its noun and of its colour
    kinds: tuple[str, ...] = SINGLE_TARGET_KINDS  # kinds of expressions that are asked about the clips

    def __post_init__(self):
        if min(self.height, self.width) < 48:
            raise ValueError(f"pictures need at least 48 × 48 pixels to hold shapes, got {self.height} × {self.width}")
        if self.num_frames < 1 or self.frames_per_second <= 0:
            raise ValueError("num_frames must be at least 1 and frames_per_second positive")
        fewest = 3 if self.new_pairs else 2 if self.always_same_noun or self.crossing else 1
        if not fewest <= self.min_objects <= self.max_objects:
            raise ValueError(
                f"these settings need {fewest} <= min_objects <= max_objects, "
                f"got {self.min_objects} and {self.max_objects}"
            )
        if self.max_objects > MOST_OBJECTS:
            raise ValueError(f"max_objects is at most {MOST_OBJECTS}, which is what the words can count to")
        for name in _PROBABILITIES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability between 0 and 1, got {getattr(self, name)}")
        if self.turn + self.stop + self.start > 1:
            raise ValueError(f"turn + stop + start is at most 1, got {self.turn} + {self.stop} + {self.start}")
        for name, known in (("nouns", NOUNS), ("colours", COLOURS), ("sizes", SIZES), ("kinds", KINDS)):
            words = getattr(self, name)
            if not words or not set(words) <= set(known):
                raise ValueError(f"{name} must be some of {tuple(known)}, got {words}")
        if not self.known_pairs or (self.new_pairs and not self.unseen_pairs):
            raise ValueError("nouns and colours allow no pair: give more of them, see HELD_OUT_PAIRS")

    @property
    def short_side(self) -> int:
        return min(self.height, self.width)

    @property
    def known_pairs(self) -> list[tuple[str, str]]:
        """(noun, colour) pairs that may appear in every clip."""
        return [(n, c) for n in self.nouns for c in self.colours if (n, c) not in _HELD_OUT]

    @property
    def unseen_pairs(self) -> list[tuple[str, str]]:
        """(noun, colour) pairs that appear only with ``new_pairs``."""
        return [(n, c) for n, c in HELD_OUT_PAIRS if n in self.nouns and c in self.colours]


_HELD_OUT = frozenset(HELD_OUT_PAIRS)
_PROBABILITIES = (
    "same_noun", "same_colour", "still", "turn", "stop", "start", "edge", "crossing", "late_entry", "leaving",
    "occluder", "photographs",
)  # fmt: skip

_EASY = WorldConfig()
PRESETS = {
    "easy": _EASY,
    # A world to begin with: no emoji, no photographs, few words.
    "shapes": replace(
        _EASY,
        nouns=SHAPES,
        photographs=0.0,
        kinds=tuple(kind for kind in SINGLE_TARGET_KINDS if kind != "speed"),
    ),
    "hard": WorldConfig(
        num_frames=16,  # two seconds: time to vanish behind something and to come back
        min_objects=3,
        max_objects=5,
        always_same_noun=True,
        still=0.15,
        turn=0.15,
        stop=0.12,
        start=0.12,
        crossing=0.6,
        late_entry=0.4,
        leaving=0.3,
        occluder=0.6,
        photographs=0.7,
        kinds=KINDS,
    ),
    "new_words": replace(_EASY, new_pairs=True, min_objects=3, kinds=("colour_class",)),
    "train": WorldConfig(
        min_objects=2,
        max_objects=5,
        same_noun=0.6,
        still=0.2,
        turn=0.12,
        stop=0.12,
        start=0.12,
        crossing=0.35,
        late_entry=0.25,
        leaving=0.2,
        occluder=0.3,
        kinds=KINDS,
    ),
}
