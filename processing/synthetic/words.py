"""Words of the generated world: nouns in the plural, synonyms, and the forms of expressions."""

from __future__ import annotations

from .config import SIZES
from .sprites import COLOURS, NOUNS

_IRREGULAR = {
    "cross": "crosses", "fish": "fish", "octopus": "octopuses", "butterfly": "butterflies",
    "bus": "buses", "strawberry": "strawberries", "cactus": "cactuses", "snowman": "snowmen",
}  # fmt: skip
PLURALS = {noun: _IRREGULAR.get(noun, f"{noun}s") for noun in NOUNS}

POSITIONS = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}  # axis and sign
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}
MEETINGS = {"front": "front", "behind": "behind", "cross": "any"}  # see Facts.meets
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = {"second": 1, "third": 2}

# {head} is a noun phrase: "ring", "red ring", "red object", "object". The word "object" may become another of these.
ANYTHING = ("object", "one")
ANY_SHAPE = (*ANYTHING, "shape")  # where all objects are flat shapes
TEMPLATES: dict[str, tuple[str, ...]] = {
    "class": ("the {noun}", "{noun}", "the {noun} in the video"),
    "colour_class": ("the {colour} {noun}", "{colour} {noun}", "the {noun} that is {colour}"),
    "colour": ("the {colour} {head}", "the {head} that is {colour}"),
    "size": ("the {size} {head}", "{size} {head}", "the {head} that is {size}"),
    "position": ("the {position} {head}", "{position} {head}", "the {head} that is {position} at the start"),
    "ordinal": ("the {ordinal} {head} from the {side}", "{ordinal} {head} from the {side}"),
    "direction": (
        "the {head} moving {direction}",
        "the {head} that moves {direction}",
        "the {head} going {direction}",
        "{head} moving {direction}",
    ),
    "still": ("the {head} that stays still", "the still {head}", "the {head} that does not move"),
    "moving": ("the moving {head}", "the {head} that moves"),
    "speed": ("the {speed} {head}", "the {head} that is {speed}"),
    "fastest": ("the fastest {head}", "the {head} that moves fastest"),
    "slowest": ("the slowest {head}", "the {head} that moves slowest"),
    "relation": ("the {head} {relation} the {anchor}", "the {head} that is {relation} the {anchor}"),
    "event": ("the {head} that {event}", "{head} that {event}"),
    "front": ("the {head} that passes in front of the {anchor}", "the {head} that moves in front of the {anchor}"),
    "behind": ("the {head} that passes behind the {anchor}", "the {head} that goes behind the {anchor}"),
    "cross": ("the {head} that crosses the {anchor}", "the {head} that meets the {anchor}"),
    "multi": ("all {plural}", "the {number} {plural}", "every one of the {plural}"),
    "both": ("both {plural}",),
    "multi_direction": ("the {number} {plural} moving {direction}", "all {plural} that move {direction}"),
    "multi_still": ("the {number} {plural} that stay still", "all {plural} that do not move"),
    "multi_event": ("the {number} {plural} that {event}", "all {plural} that {event}"),
}
SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "fast": ("fast", "quick"),
    "slow": ("slow",),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "nearest": ("nearest to", "closest to"),
}
# What happens to one object and to several.
EVENTS: dict[str, tuple[tuple[str, str], ...]] = {
    "enters": (
        ("enters later", "enter later"),
        ("appears later", "appear later"),
        ("comes in later", "come in later"),
    ),
    "leaves": (("leaves", "leave"), ("leaves the picture", "leave the picture"), ("goes away", "go away")),
    "hidden": (
        ("is hidden for a while", "are hidden for a while"),
        ("vanishes and comes back", "vanish and come back"),
    ),
    "behind_bar": (("goes behind the bar", "go behind the bar"), ("passes behind the bar", "pass behind the bar")),
    "turns": (("turns around", "turn around"), ("turns back", "turn back")),
    "stops": (("stops", "stop"), ("moves and then stops", "move and then stop")),
    "starts": (("starts moving later", "start moving later"), ("waits and then moves", "wait and then move")),
    "ends_left": (("ends on the left", "end on the left"),),
    "ends_right": (("ends on the right", "end on the right"),),
    "ends_top": (("ends at the top", "end at the top"),),
    "ends_bottom": (("ends at the bottom", "end at the bottom"),),
}


def words_of(texts) -> set[str]:
    """All words of some templates but their placeholders."""
    return {word for text in texts for word in text.split() if "{" not in word}


def expression_words() -> set[str]:
    forms = [form for forms in (*TEMPLATES.values(), *SYNONYMS.values()) for form in forms]
    events = [form for forms in EVENTS.values() for pair in forms for form in pair]
    names = (*NOUNS, *PLURALS.values(), *COLOURS, *ANY_SHAPE, "objects")
    attributes = (*SIZES, *POSITIONS, *SIDES, *ORDINALS, *NUMBERS)
    return words_of(forms) | words_of(events) | set(names) | set(attributes)
