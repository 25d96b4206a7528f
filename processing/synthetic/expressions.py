"""Referring expressions about generated clips: questions, and which objects they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from .config import SIZES, SPEEDS
from .facts import Facts, States
from .scene import SyntheticObject
from .shapes import SHAPES
from .words import (
    ANY_SHAPE,
    ANYTHING,
    EVENTS,
    MEETINGS,
    NUMBERS,
    ORDINALS,
    PLURALS,
    POSITIONS,
    RELATIONS,
    SIDES,
    SYNONYMS,
    TEMPLATES,
)
from .world import SyntheticClip

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Expression:
    """A referring expression.

    Attributes:
        text: lower-case words of ``VOCABULARY``.
        target_ids: indices of the objects that are meant, none for kind ``none``.
        kind: one of ``KINDS``.
        candidates: number of objects in the clip; one drawn by chance is right with 1 / candidates.
        anchor_id: index of the object that a relation or a meeting refers to.
    """

    text: str
    target_ids: tuple[int, ...]
    kind: str
    candidates: int
    anchor_id: int | None = None


class _OfKind(Protocol):
    kind: str


_Kinded = TypeVar("_Kinded", bound=_OfKind)


@dataclass(frozen=True)
class Head:
    """A noun phrase in singular and plural, and the objects that it fits."""

    text: str
    plural: str
    ids: tuple[int, ...]


# texts, the objects they mean, and perhaps the anchor
_Found = Iterator[tuple[str, tuple[int, ...]] | tuple[str, tuple[int, ...], int]]


def all_expressions(clip: SyntheticClip, rng: np.random.Generator) -> list[Expression]:
    """Everything that can be asked about a clip, of the kinds ``clip.config.kinds``, each in one random wording.

    An expression is produced only if it fits its targets beyond doubt and no other object even nearly. Sizes,
    positions, motions, events and relations are produced only if the noun phrase alone would fit several objects.
    Positions, ordinals and relations are those of the first frame. Kind ``none`` says something that is false of
    every object it could be about: another colour or noun than those in the clip, or another motion.
    """
    writer = Writer(clip, rng)
    expressions = []
    for kind in clip.config.kinds:
        for text, targets, *anchor in _GENERATORS[kind](writer):
            if all(writer.facts.seen_enough[i] for i in targets):
                expressions.append(Expression(text, tuple(targets), kind, clip.num_objects, *anchor))
    return expressions


def sample_expressions(expressions: list[_Kinded], count: int, rng: np.random.Generator) -> list[_Kinded]:
    """Draw up to ``count`` different expressions (or dialogues), giving each kind the same chance at every draw."""
    left: dict[str, list[_Kinded]] = {}
    for expression in expressions:
        left.setdefault(expression.kind, []).append(expression)
    drawn = []
    while left and len(drawn) < count:
        kind = list(left)[int(rng.integers(len(left)))]
        drawn.append(left[kind].pop(int(rng.integers(len(left[kind])))))
        if not left[kind]:
            del left[kind]
    return drawn


class Writer:
    """The noun phrases of one clip, the facts about it, and random wordings."""

    def __init__(self, clip: SyntheticClip, rng: np.random.Generator):
        self.clip = clip
        self.rng = rng
        self.objects = clip.objects
        self.facts = Facts(clip)
        self.nouns = self._group(lambda thing: (thing.noun, PLURALS[thing.noun]))
        self.pairs = self._group(
            lambda thing: (f"{thing.colour} {thing.noun}", f"{thing.colour} {PLURALS[thing.noun]}")
        )
        self.colours = self._group(lambda thing: (f"{thing.colour} object", f"{thing.colour} objects"))
        self.everything = Head("object", "objects", tuple(range(len(self.objects))))
        self.heads = [*self.nouns, *self.pairs, *self.colours, self.everything]
        self.ambiguous_heads = [head for head in self.heads if len(head.ids) > 1]
        self.anything = ANY_SHAPE if all(thing.noun in SHAPES for thing in self.objects) else ANYTHING

    def _group(self, describe: Callable[[SyntheticObject], tuple[str, str]]) -> list[Head]:
        """Objects by what ``describe`` calls them, in singular and plural."""
        groups: dict[tuple[str, str], list[int]] = {}
        for i, thing in enumerate(self.objects):
            groups.setdefault(describe(thing), []).append(i)
        return [Head(text, plural, tuple(ids)) for (text, plural), ids in groups.items()]

    def names(self, i: int) -> list[str]:
        """Noun phrases that fit object ``i`` alone."""
        return [head.text for head in (*self.nouns, *self.pairs) if head.ids == (i,)]

    def directions(self) -> dict[str, States]:
        return {direction: self.facts.heads(direction) for direction in ("left", "right", "up", "down")}

    def pick(self, options: Sequence[_Item]) -> _Item:
        return options[int(self.rng.random() * len(options))]

    def write(self, template: str, head: str = "", **words: str) -> str:
        """Fill in one of the forms of a template; the head "object" may become "one"."""
        if head.endswith("object"):
            head = head.removesuffix("object") + self.pick(self.anything)
        return self.pick(TEMPLATES[template]).format(head=head, **words)


def only(states: States, ids: tuple[int, ...]) -> int | None:
    """The one of ``ids`` whose state is True, if the states of all the others are False."""
    possible = [i for i in ids if states[i] is not False]
    return possible[0] if len(possible) == 1 and states[possible[0]] else None


def _class(writer: Writer) -> _Found:
    for head in writer.nouns:
        if len(head.ids) == 1:
            yield writer.write("class", noun=head.text), head.ids


def _colour_class(writer: Writer) -> _Found:
    for head in writer.pairs:
        if len(head.ids) == 1:
            thing = writer.objects[head.ids[0]]
            yield writer.write("colour_class", colour=thing.colour, noun=thing.noun), head.ids


def _colour(writer: Writer) -> _Found:
    for head in writer.colours:
        if len(head.ids) == 1:
            yield writer.write("colour", head="object", colour=writer.objects[head.ids[0]].colour), head.ids


def _size(writer: Writer) -> _Found:
    for head in writer.ambiguous_heads:
        for size in SIZES:
            target = only([thing.size == size for thing in writer.objects], head.ids)
            if target is not None:
                yield writer.write("size", size=writer.pick(SYNONYMS[size]), head=head.text), (target,)


def _position(writer: Writer) -> _Found:
    for head in writer.ambiguous_heads:
        for position, where in POSITIONS.items():
            target = writer.facts.outermost(head.ids, *where, frame=0)
            if target is not None:
                yield writer.write("position", position=position, head=head.text), (target,)


def _ordinal(writer: Writer) -> _Found:
    for head in writer.ambiguous_heads:
        for side, where in SIDES.items():
            ranked = writer.facts.ranked(head.ids, *where, frame=0)
            for ordinal, rank in ORDINALS.items():
                if ranked is not None and rank + 1 < len(ranked):
                    yield writer.write("ordinal", ordinal=ordinal, head=head.text, side=side), (ranked[rank],)


def _motion(writer: Writer) -> _Found:
    facts = writer.facts
    directions = writer.directions()
    for head in writer.ambiguous_heads:
        for direction, states in directions.items():
            target = only(states, head.ids)
            if target is not None:
                word = writer.pick(SYNONYMS[direction])
                yield writer.write("direction", direction=word, head=head.text), (target,)
        for form, states in (("still", facts.still), ("moving", facts.moves)):
            target = only(states, head.ids)
            if target is not None:
                yield writer.write(form, head=head.text), (target,)
        target = facts.fastest(head.ids)
        if target is not None:
            yield writer.write("fastest", head=head.text), (target,)


def _speed(writer: Writer) -> _Found:
    facts = writer.facts
    speeds = {name: facts.speed(name) for name in SPEEDS}
    for head in writer.ambiguous_heads:
        for name, states in speeds.items():
            target = only(states, head.ids)
            if target is not None:
                yield writer.write("speed", speed=writer.pick(SYNONYMS[name]), head=head.text), (target,)
        target = facts.fastest(head.ids, sign=-1)
        if target is not None:
            yield writer.write("slowest", head=head.text), (target,)


def _relation(writer: Writer) -> _Found:
    facts = writer.facts
    for anchor in writer.everything.ids:
        names = writer.names(anchor)
        if not names or not facts.seen[anchor, 0]:
            continue
        sides = {relation: facts.lies(*where, frame=0, anchor=anchor) for relation, where in RELATIONS.items()}
        for head in writer.ambiguous_heads:
            others = tuple(i for i in head.ids if i != anchor)
            if len(others) < 2:
                continue
            found = {relation: only(states, others) for relation, states in sides.items()}
            if facts.seen[list(others), 0].all():
                found["nearest"] = facts.nearest(anchor, others)
            for relation, target in found.items():
                if target is not None:
                    words = {"relation": writer.pick(SYNONYMS[relation]), "anchor": writer.pick(names)}
                    yield writer.write("relation", head=head.text, **words), (target,), anchor


def _event(writer: Writer) -> _Found:
    for event, states in writer.facts.events().items():
        for head in writer.ambiguous_heads:
            target = only(states, head.ids)
            if target is not None:
                yield writer.write("event", head=head.text, event=writer.pick(EVENTS[event])[0]), (target,)


def _meeting(writer: Writer) -> _Found:
    for anchor in writer.everything.ids:
        names = writer.names(anchor)
        if not names or not writer.facts.seen_enough[anchor]:
            continue
        for form, side in MEETINGS.items():
            states = writer.facts.meets(anchor, side)
            for head in writer.ambiguous_heads:
                others = tuple(i for i in head.ids if i != anchor)
                target = only(states, others) if len(others) > 1 else None
                if target is not None:
                    yield writer.write(form, head=head.text, anchor=writer.pick(names)), (target,), anchor


def _multi(writer: Writer) -> _Found:
    predicates = [("multi_direction", word, states) for word, states in writer.directions().items()]
    predicates += [("multi_still", "", writer.facts.still)]
    predicates += [("multi_event", event, states) for event, states in writer.facts.events().items()]
    for head in writer.ambiguous_heads:
        words = {"plural": head.plural, "number": NUMBERS[len(head.ids)]}
        if head is not writer.everything:
            form = "both" if len(head.ids) == 2 and writer.rng.random() < 0.5 else "multi"
            yield writer.write(form, **words), head.ids
        for form, name, states in predicates:
            targets = tuple(i for i in head.ids if states[i])
            if any(states[i] is None for i in head.ids) or not 2 <= len(targets) < len(head.ids):
                continue
            words["number"] = NUMBERS[len(targets)]
            words["direction"] = writer.pick(SYNONYMS[name]) if form == "multi_direction" else ""
            words["event"] = writer.pick(EVENTS[name])[1] if form == "multi_event" else ""
            yield writer.write(form, **words), targets


def _none(writer: Writer) -> _Found:
    """What is not there: one question in each of several ways of being nearly right."""
    yield from _absent_things(writer)
    false = [("direction", SYNONYMS[name], states) for name, states in writer.directions().items()]
    false += [("still", ("",), writer.facts.still), ("moving", ("",), writer.facts.moves)]
    yield from _false_of_all(writer, false)
    events = writer.facts.events()
    singular = {name: [form[0] for form in EVENTS[name]] for name in events}
    yield from _false_of_all(writer, [("event", singular[name], states) for name, states in events.items()])
    sizes = {size: [thing.size == size for thing in writer.objects] for size in SIZES}
    yield from _false_of_all(writer, [("size", SYNONYMS[size], states) for size, states in sizes.items()])
    yield from _false_meeting(writer)


def _false_meeting(writer: Writer) -> _Found:
    """A noun phrase and an anchor that none of its objects meets."""
    anchor = writer.pick(writer.everything.ids)
    names = writer.names(anchor)
    heads = [head for head in writer.heads if head.ids != (anchor,)]
    if not names or not writer.facts.seen_enough[anchor] or writer.clip.config.num_frames == 1:
        return
    options = []
    for form, side in MEETINGS.items():
        states = writer.facts.meets(anchor, side)
        options += [(form, head) for head in heads if all(states[i] is False for i in head.ids)]
    if options:
        form, head = writer.pick(options)
        yield writer.write(form, head=head.text, anchor=writer.pick(names)), ()


def _absent_things(writer: Writer) -> _Found:
    """One absent pair with a noun of the clip and one with a colour of the clip, one absent noun."""
    present = {(thing.noun, thing.colour) for thing in writer.objects}
    thing = writer.pick(writer.objects)
    absent = [pair for pair in writer.clip.config.known_pairs if pair not in present]
    for position, word in enumerate((thing.noun, thing.colour)):
        options = [pair for pair in absent if pair[position] == word]
        if options:
            noun, colour = writer.pick(options)
            yield writer.write("colour_class", colour=colour, noun=noun), ()
    nouns = {thing.noun for thing in writer.objects}
    options = [noun for noun in writer.clip.config.nouns if noun not in nouns]
    if options:
        yield writer.write("class", noun=writer.pick(options)), ()


def _false_of_all(writer: Writer, predicates: list[tuple[str, Sequence[str], States]]) -> _Found:
    """One of the predicates (template, words for its slot, states) about a noun phrase of whose objects none is so."""
    options = [
        (form, words, head)
        for form, words, states in predicates
        for head in writer.heads
        if all(states[i] is False for i in head.ids)
    ]
    if options:
        form, words, head = writer.pick(options)
        yield writer.write(form, head=head.text, **{form: writer.pick(words)}), ()


_GENERATORS: dict[str, Callable[[Writer], _Found]] = {
    "class": _class,
    "colour_class": _colour_class,
    "colour": _colour,
    "size": _size,
    "position": _position,
    "motion": _motion,
    "relation": _relation,
    "speed": _speed,
    "multi": _multi,
    "none": _none,
    "ordinal": _ordinal,
    "event": _event,
    "meeting": _meeting,
}
