"""Referring expressions about generated clips: questions, and which objects they mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .config import DIRECTIONS, SIZES
from .scene import SyntheticObject
from .sprites import COLOURS, NOUNS
from .world import SyntheticClip

# Margins as shares of the picture's short side: what is closer than this is too ambiguous to be asked about.
POSITION_MARGIN = 10 / 128
MOTION_MARGIN = 6 / 128  # a moving object must come this far within the clip for its motion to be asked about
FASTEST_RATIO = 1.5  # how much faster than all others the fastest object must be
SEEN_SHARE = 0.3  # a target must be visible this much in at least two frames (or in the only one)

_Item = TypeVar("_Item")

PLURALS = {noun: "crosses" if noun == "cross" else f"{noun}s" for noun in NOUNS}
POSITIONS = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}  # axis and sign
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}

# {head} is a noun phrase: "ring", "red ring", "red object", "object".
TEMPLATES: dict[str, tuple[str, ...]] = {
    "class": ("the {noun}", "{noun}", "the {noun} in the video"),
    "colour_class": ("the {colour} {noun}", "{colour} {noun}", "the {noun} that is {colour}"),
    "colour": ("the {colour} one", "the {colour} object", "the {colour} shape", "the object that is {colour}"),
    "size": ("the {size} {head}", "{size} {head}", "the {head} that is {size}"),
    "position": ("the {position} {head}", "{position} {head}", "the {head} that is {position} at the start"),
    "direction": (
        "the {head} moving {direction}",
        "the {head} that moves {direction}",
        "the {head} going {direction}",
        "{head} moving {direction}",
    ),
    "still": ("the {head} that stays still", "the still {head}", "the {head} that does not move"),
    "moving": ("the moving {head}", "the {head} that moves"),
    "fastest": ("the fastest {head}", "the {head} that moves fastest"),
    "relation": ("the {head} {relation} the {anchor}", "the {head} that is {relation} the {anchor}"),
    "multi": ("both {plural}", "the two {plural}", "all {plural}"),
}
SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "nearest": ("nearest to", "closest to"),
}
# Not used by the expressions: words of answers and of later questions.
SPARE_WORDS = (
    "and", "are", "behind", "color", "every", "first", "front", "how", "it", "its", "last", "many", "moved", "next",
    "no", "none", "on", "or", "other", "second", "slow", "stops", "there", "these", "third", "three", "turns", "what",
    "where", "which", "with", "yes",
)  # fmt: skip


def _vocabulary() -> tuple[str, ...]:
    texts = [text for texts in (*TEMPLATES.values(), *SYNONYMS.values()) for text in texts]
    words = {word for text in texts for word in text.split() if not word.startswith("{")}
    words.update(NOUNS, PLURALS.values(), COLOURS, SIZES, POSITIONS, SPARE_WORDS, ("object", "objects"))
    return tuple(sorted(words))


VOCABULARY = _vocabulary()


@dataclass(frozen=True)
class Expression:
    """A referring expression.

    Attributes:
        text: lower-case words of ``VOCABULARY``.
        target_ids: indices of the objects that are meant, none for kind ``none``.
        kind: one of ``KINDS``.
        candidates: number of objects in the clip; one drawn by chance is right with 1 / candidates.
    """

    text: str
    target_ids: tuple[int, ...]
    kind: str
    candidates: int


@dataclass(frozen=True)
class _Head:
    """A noun phrase and the objects that it fits."""

    text: str
    plural: str
    ids: tuple[int, ...]


# For each object of a clip: a property holds (True), does not hold (False), or cannot be told with certainty (None).
_States = list[bool | None]
_Found = Iterator[tuple[str, tuple[int, ...]]]  # texts and the objects they mean


def all_expressions(clip: SyntheticClip, rng: np.random.Generator) -> list[Expression]:
    """Everything that can be asked about a clip, of the kinds ``clip.config.kinds``, each in one random wording.

    An expression is produced only if it fits its targets beyond doubt and no other object even nearly. Sizes,
    positions, motions and relations are produced only if the noun phrase alone would fit several objects.
    Positions and relations are those of the first frame, and need every object to be visible there.
    """
    writer = _Writer(clip, rng)
    seen = (clip.visibility >= SEEN_SHARE).sum(axis=1) >= min(2, clip.config.num_frames)
    expressions = []
    for kind in clip.config.kinds:
        for text, targets in _GENERATORS[kind](writer):
            if all(seen[i] for i in targets):
                expressions.append(Expression(text, tuple(targets), kind, clip.num_objects))
    return expressions


def sample_expressions(expressions: list[Expression], count: int, rng: np.random.Generator) -> list[Expression]:
    """Draw up to ``count`` different expressions, giving each kind the same chance at every draw."""
    left: dict[str, list[Expression]] = {}
    for expression in expressions:
        left.setdefault(expression.kind, []).append(expression)
    drawn = []
    while left and len(drawn) < count:
        kind = list(left)[int(rng.integers(len(left)))]
        drawn.append(left[kind].pop(int(rng.integers(len(left[kind])))))
        if not left[kind]:
            del left[kind]
    return drawn


class _Writer:
    """The noun phrases of one clip, and random wordings."""

    def __init__(self, clip: SyntheticClip, rng: np.random.Generator):
        self.clip = clip
        self.rng = rng
        self.objects = clip.objects
        self.margin = POSITION_MARGIN * clip.config.short_side
        first = clip.full_boxes[:, 0]
        self.centres = ((first[:, :2] + first[:, 2:]) / 2).tolist()
        self.all_at_start = bool((clip.visibility[:, 0] >= SEEN_SHARE).all())
        self.nouns = self._group(lambda thing: (thing.noun, PLURALS[thing.noun]))
        self.pairs = self._group(
            lambda thing: (f"{thing.colour} {thing.noun}", f"{thing.colour} {PLURALS[thing.noun]}")
        )
        self.colours = self._group(lambda thing: (f"{thing.colour} object", f"{thing.colour} objects"))
        self.everything = _Head("object", "objects", tuple(range(len(self.objects))))
        self.ambiguous_heads = [
            head for head in (*self.nouns, *self.pairs, *self.colours, self.everything) if len(head.ids) > 1
        ]

    def _group(self, describe: Callable[[SyntheticObject], tuple[str, str]]) -> list[_Head]:
        """Objects by what ``describe`` calls them, in singular and plural."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, thing in enumerate(self.objects):
            groups.setdefault(describe(thing), []).append(i)
        return [_Head(text, plural, tuple(ids)) for (text, plural), ids in groups.items()]

    def moves_far(self, thing: SyntheticObject) -> bool:
        """Whether an object moves far enough within the clip to speak of it."""
        config = self.clip.config
        return thing.speed * (config.num_frames - 1) >= MOTION_MARGIN * config.short_side

    def pick(self, options: Sequence[_Item]) -> _Item:
        return options[int(self.rng.random() * len(options))]

    def write(self, template: str, **words: str) -> str:
        return self.pick(TEMPLATES[template]).format(**words)


def _only(states: _States, ids: tuple[int, ...]) -> int | None:
    """The one of ``ids`` whose state is True, if the states of all the others are False."""
    possible = [i for i in ids if states[i] is not False]
    return possible[0] if len(possible) == 1 and states[possible[0]] else None


def _class(writer: _Writer) -> _Found:
    for head in writer.nouns:
        if len(head.ids) == 1:
            yield writer.write("class", noun=head.text), head.ids


def _colour_class(writer: _Writer) -> _Found:
    for head in writer.pairs:
        if len(head.ids) == 1:
            thing = writer.objects[head.ids[0]]
            yield writer.write("colour_class", colour=thing.colour, noun=thing.noun), head.ids


def _colour(writer: _Writer) -> _Found:
    for head in writer.colours:
        if len(head.ids) == 1:
            yield writer.write("colour", colour=writer.objects[head.ids[0]].colour), head.ids


def _size(writer: _Writer) -> _Found:
    for head in writer.ambiguous_heads:
        for size in SIZES:
            target = _only([thing.size == size for thing in writer.objects], head.ids)
            if target is not None:
                yield writer.write("size", size=writer.pick(SYNONYMS[size]), head=head.text), (target,)


def _position(writer: _Writer) -> _Found:
    if not writer.all_at_start:
        return
    for head in writer.ambiguous_heads:
        for position, (axis, sign) in POSITIONS.items():
            ranked = sorted(head.ids, key=lambda i: -sign * writer.centres[i][axis])
            first, second = (sign * writer.centres[i][axis] for i in ranked[:2])
            if first - second >= writer.margin:
                yield writer.write("position", position=position, head=head.text), (ranked[0],)


def _moves_towards(writer: _Writer, direction: str) -> _States:
    """For each object: whether it moves in a direction (of ``DIRECTIONS``) for the whole clip."""
    states: _States = []
    for thing in writer.objects:
        if thing.direction == "still":
            states.append(direction == "still" if writer.clip.config.num_frames > 1 else None)
        elif not writer.moves_far(thing):
            states.append(None)
        elif direction == "still":
            states.append(False)
        elif thing.bounces and thing.axis == (0 if direction in ("left", "right") else 1):
            states.append(None)
        else:
            states.append(thing.direction == direction)
    return states


def _motion(writer: _Writer) -> _Found:
    states = {direction: _moves_towards(writer, direction) for direction in DIRECTIONS}
    moving: _States = [None if still is None else not still for still in states["still"]]
    for head in writer.ambiguous_heads:
        for direction in DIRECTIONS:
            target = _only(states[direction], head.ids)
            if target is not None and direction == "still":
                yield writer.write("still", head=head.text), (target,)
            elif target is not None:
                word = writer.pick(SYNONYMS[direction])
                yield writer.write("direction", direction=word, head=head.text), (target,)
        target = _only(moving, head.ids)
        if target is not None:
            yield writer.write("moving", head=head.text), (target,)
        fastest, second = sorted(head.ids, key=lambda i: -writer.objects[i].speed)[:2]
        ratio_kept = writer.objects[fastest].speed >= FASTEST_RATIO * writer.objects[second].speed > 0
        if ratio_kept and writer.moves_far(writer.objects[fastest]):
            yield writer.write("fastest", head=head.text), (fastest,)


def _lies(writer: _Writer, anchor: int, axis: int, sign: int) -> _States:
    """For each object: whether it lies on one side of the anchor, beyond the margin."""
    states: _States = []
    for centre in writer.centres:
        distance = sign * (centre[axis] - writer.centres[anchor][axis])
        states.append(True if distance >= writer.margin else False if distance <= 0 else None)
    return states


def _nearest(writer: _Writer, anchor: int, ids: tuple[int, ...]) -> int | None:
    """The object of ``ids`` whose centre is nearest to the anchor's, if it is nearer by the margin."""
    x, y = writer.centres[anchor]
    ranked = sorted((math.hypot(writer.centres[i][0] - x, writer.centres[i][1] - y), i) for i in ids)
    return ranked[0][1] if ranked[1][0] - ranked[0][0] >= writer.margin else None


def _relation(writer: _Writer) -> _Found:
    if not writer.all_at_start:
        return
    for anchor in writer.everything.ids:
        names = [head.text for head in (*writer.nouns, *writer.pairs) if head.ids == (anchor,)]
        if not names:
            continue
        sides = {relation: _lies(writer, anchor, *where) for relation, where in RELATIONS.items()}
        for head in writer.ambiguous_heads:
            others = tuple(i for i in head.ids if i != anchor)
            if len(others) < 2:
                continue
            found = {relation: _only(states, others) for relation, states in sides.items()}
            found["nearest"] = _nearest(writer, anchor, others)
            for relation, target in found.items():
                if target is not None:
                    words = {"relation": writer.pick(SYNONYMS[relation]), "anchor": writer.pick(names)}
                    yield writer.write("relation", head=head.text, **words), (target,)


def _multi(writer: _Writer) -> _Found:
    for head in (*writer.nouns, *writer.pairs, *writer.colours):
        if len(head.ids) == 2:
            yield writer.write("multi", plural=head.plural), head.ids


def _none(writer: _Writer) -> _Found:
    """One absent pair with a noun of the clip and one with a colour of the clip."""
    present = {(thing.noun, thing.colour) for thing in writer.objects}
    thing = writer.pick(writer.objects)
    absent = [pair for pair in writer.clip.config.known_pairs if pair not in present]
    for position, word in enumerate((thing.noun, thing.colour)):
        options = [pair for pair in absent if pair[position] == word]
        if options:
            noun, colour = writer.pick(options)
            yield writer.write("colour_class", colour=colour, noun=noun), ()


_GENERATORS: dict[str, Callable[[_Writer], _Found]] = {
    "class": _class,
    "colour_class": _colour_class,
    "colour": _colour,
    "size": _size,
    "position": _position,
    "motion": _motion,
    "relation": _relation,
    "multi": _multi,
    "none": _none,
}
