"""Dialogues about generated clips: what a user asks and what the model should say, in every form of task.

The form of an answer is that of the package: ``[BOX] [SEG]`` after what is grounded (one pair stands for all objects
that are meant), ``<p>`` and ``</p>`` around a grounded phrase, ``frames : ( a , b )`` for a time span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..frame_sampling import sample_frame_indices
from ..processing_sparrow import BOX_TOKEN, SEG_TOKEN, TASK_PROMPTS
from .expressions import Expression, Writer, all_expressions
from .sprites import COLOURS
from .words import EVENTS, NUMBERS, expression_words, words_of
from .world import SyntheticClip

PAIR = f"{BOX_TOKEN} {SEG_TOKEN}"
MAX_PHRASES = 5  # in a caption
MAX_SAMPLED = 16  # frames that a time span can count

REFER_QUESTIONS = (
    TASK_PROMPTS["refer"],
    TASK_PROMPTS["box"],
    "where is {query} ?",
    "find {query} .",
    "show me {query} .",
    "please segment {query} .",
)
ONE_ANSWER = f"it is {PAIR} ."
MANY_ANSWER = f"they are {PAIR} ."
NO_ANSWER = "nothing matches ."
SEEN_QUESTIONS = ("when and where is the {name} ?", "when and where do you see the {name} ?")
MOVING_QUESTIONS = ("when and where does the {name} move ?", "when does the {name} move ?")
TIME_ANSWER = "frames : ( {start} , {end} ) " + PAIR + " ."
COUNT_QUESTION = "how many {plural} are there ?"
COLOUR_QUESTIONS = ("which color is the {noun} ?", "what color is the {noun} ?")
DIRECTION_QUESTIONS = ("where does the {name} move ?", "which way does the {name} move ?")
EVENT_QUESTION = "is it true that the {name} {event} ?"

# Kinds of dialogues beside those of the expressions.
DIALOGUE_KINDS = ("caption", "time", "question")


@dataclass(frozen=True)
class Dialogue:
    """One question about a clip and its answer.

    Attributes:
        question: the user's words.
        answer: with one ``[BOX] [SEG]`` for each entry of ``targets``, in this order.
        targets: the objects that each pair of tokens means.
        time_span: first and last frame of the clip that the answer speaks of; None if it speaks of no time.
        kind: kind of the expression it asks for, or one of ``DIALOGUE_KINDS``.
    """

    question: str
    answer: str
    targets: tuple[tuple[int, ...], ...]
    time_span: tuple[int, int] | None
    kind: str


def refer_dialogue(expression: Expression, rng: np.random.Generator) -> Dialogue:
    """Ask for the objects of an expression; "nothing matches ." if there is none."""
    question = _pick(rng, REFER_QUESTIONS).format(query=expression.text)
    targets = expression.target_ids
    answer = NO_ANSWER if not targets else ONE_ANSWER if len(targets) == 1 else MANY_ANSWER
    return Dialogue(question, answer, (targets,) if targets else (), None, expression.kind)


def all_dialogues(clip: SyntheticClip, rng: np.random.Generator, sampled: int = MAX_SAMPLED) -> list[Dialogue]:
    """Every dialogue about a clip, each in one random wording: those of its expressions and ``DIALOGUE_KINDS``.

    Args:
        clip: of the generated world.
        rng: chooses the wordings; the same generator state gives the same dialogues.
        sampled: frames that the language model sees; a time span counts in these.

    Raises:
        ValueError: if ``sampled`` is not in 1..16.
    """
    if not 1 <= sampled <= MAX_SAMPLED:
        raise ValueError(f"sampled={sampled}: expected 1 to {MAX_SAMPLED} frames, which is what the words can count")
    writer = Writer(clip, rng)
    dialogues = [refer_dialogue(expression, rng) for expression in all_expressions(clip, rng)]
    for form in (_caption, _times, _questions):
        dialogues.extend(form(writer, sampled))
    return dialogues


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


# ---------------------------------------------------------------------- captions


def _caption(writer: Writer, sampled: int) -> Iterator[Dialogue]:
    """All objects with what each of them does; no caption if there are too many, if one is hardly seen, or if what is
    said of one red frog could be said of another red frog too."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i in _reading_order(writer):
        doing = _doing(writer, i)
        if doing is None or not writer.facts.seen_enough[i]:
            return
        groups.setdefault((f"{writer.objects[i].colour} {writer.objects[i].noun}", doing), []).append(i)
    if len(groups) > MAX_PHRASES or any(_fits_others(writer, ids, doing) for (_, doing), ids in groups.items()):
        return
    clauses = [_clause(writer, ids, doing) for (_, doing), ids in groups.items()]
    if len(clauses) <= 2:
        text = " while ".join(clauses)
    else:
        text = " , ".join(clauses[:-1]) + f" and {clauses[-1]}"
    yield Dialogue(TASK_PROMPTS["describe"], f"{text} .", tuple(map(tuple, groups.values())), None, "caption")


def _reading_order(writer: Writer) -> list[int]:
    """Objects by when they are first seen, then from the left."""
    seen, centres = writer.facts.seen, writer.facts.centres
    first = [int(row.argmax()) for row in seen]
    return sorted(writer.everything.ids, key=lambda i: (first[i], centres[i, first[i], 0]))


def _doing(writer: Writer, i: int) -> str | None:
    """What one object does, as a key of ``_DOINGS``; None if people could disagree."""
    facts = writer.facts
    for name in ("enters", "leaves", "turns", "stops", "starts"):
        state = getattr(facts, name)[i]
        if state or state is None:
            return name if state else None
    if facts.still[i]:
        return "still"
    return next((direction for direction, states in writer.directions().items() if states[i]), None)


def _fits_others(writer: Writer, ids: list[int], doing: str) -> bool:
    """Whether another object of the same colour and noun does, or may do, the same."""
    states = writer.directions().get(doing) or getattr(writer.facts, doing)
    head = next(head for head in writer.pairs if ids[0] in head.ids)
    return any(states[i] is not False for i in head.ids if i not in ids)


# For one object and for several.
_DOINGS = {name: EVENTS[name][0] for name in ("enters", "leaves", "turns", "stops", "starts")}
_DOINGS |= {"still": ("stays still", "stay still")}
_DOINGS |= {direction: (f"moves {direction}", f"move {direction}") for direction in ("left", "right", "up", "down")}


def _clause(writer: Writer, ids: list[int], doing: str) -> str:
    thing = writer.objects[ids[0]]
    head = next(head for head in writer.pairs if ids[0] in head.ids)
    if len(ids) == 1:
        name = f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {head.text}"
    else:
        name = f"{NUMBERS[len(ids)]} {head.plural}"
    return f"<p> {name} </p> {PAIR} {_DOINGS[doing][len(ids) > 1]}"


# ---------------------------------------------------------------------- time


def _times(writer: Writer, sampled: int) -> Iterator[Dialogue]:
    """When an object is in the picture, or moves; the span runs over the sampled frames.

    Spans over the whole clip are at most as many as others (or one), so that they cannot be guessed.
    """
    clip = writer.clip
    if clip.config.num_frames == 1:
        return
    whole: list[Dialogue] = []
    partial: list[Dialogue] = []
    chosen = sample_frame_indices(np.arange(clip.config.num_frames), sampled)
    for i in writer.everything.ids:
        names = writer.names(i)
        if not names or not writer.facts.seen_enough[i]:
            continue
        spans = ((SEEN_QUESTIONS, _frames_in_view(writer, i)), (MOVING_QUESTIONS, _frames_of_motion(writer, i)))
        for questions, frames in spans:
            if frames is None:
                continue
            inside = np.flatnonzero((chosen >= frames[0]) & (chosen <= frames[1]))
            if len(inside):
                start, end = int(inside[0]), int(inside[-1])
                question = _pick(writer.rng, questions).format(name=_pick(writer.rng, names))
                span = (int(chosen[start]), int(chosen[end]))
                dialogue = Dialogue(question, TIME_ANSWER.format(start=start, end=end), ((i,),), span, "time")
                (whole if span == (0, clip.config.num_frames - 1) else partial).append(dialogue)
    yield from partial
    for k in writer.rng.permutation(len(whole))[: max(1, len(partial))]:
        yield whole[k]


def _frames_in_view(writer: Writer, i: int) -> tuple[int, int] | None:
    """First and last frame on which the object is seen, if it enters or leaves at most and is not hidden between."""
    seen = np.flatnonzero(writer.facts.seen[i])
    without_gap = len(seen) == seen[-1] - seen[0] + 1
    return (int(seen[0]), int(seen[-1])) if without_gap else None


def _frames_of_motion(writer: Writer, i: int) -> tuple[int, int] | None:
    """First and last frame of the motion of an object that stops, or that stands still at first, in full view."""
    facts = writer.facts
    if not (facts.stops[i] or facts.starts[i]) or not facts.seen[i].all():
        return None
    moving = np.flatnonzero(np.abs(np.diff(writer.objects[i].centres, axis=0)).sum(axis=1))
    return int(moving[0]), int(moving[-1]) + 1


# ---------------------------------------------------------------------- answers without objects


def _questions(writer: Writer, sampled: int) -> Iterator[Dialogue]:
    """How many, which colour, which way, and whether something happens: text answers."""
    if all(writer.facts.seen_enough):
        for head in (*writer.nouns, *writer.colours, writer.everything):
            yield _text(COUNT_QUESTION.format(plural=head.plural), NUMBERS[len(head.ids)])
    for head in writer.nouns:
        if len(head.ids) == 1 and writer.facts.seen_enough[head.ids[0]]:
            question = _pick(writer.rng, COLOUR_QUESTIONS).format(noun=head.text)
            yield _text(question, writer.objects[head.ids[0]].colour)
    yield from _motion_questions(writer)


def _motion_questions(writer: Writer) -> Iterator[Dialogue]:
    named = {i: names for i in writer.everything.ids if (names := writer.names(i))}
    for direction, states in writer.directions().items():
        for i, names in named.items():
            if states[i]:
                yield _text(_pick(writer.rng, DIRECTION_QUESTIONS).format(name=_pick(writer.rng, names)), direction)
    for event, states in writer.facts.events().items():
        truths = [[i for i in named if states[i] is truth and writer.facts.seen_enough[i]] for truth in (True, False)]
        if not all(truths):
            continue  # each event happens as often as it does not: the words tell nothing
        for ids, answer in zip(truths, ("yes", "no"), strict=True):
            words = {"name": _pick(writer.rng, named[writer.pick(ids)]), "event": writer.pick(EVENTS[event])[0]}
            yield _text(EVENT_QUESTION.format(**words), answer)


def _text(question: str, answer: str) -> Dialogue:
    return Dialogue(question, f"{answer} .", (), None, "question")


# ---------------------------------------------------------------------- words


def _vocabulary() -> tuple[str, ...]:
    forms = [TASK_PROMPTS["describe"], ONE_ANSWER, MANY_ANSWER, NO_ANSWER, TIME_ANSWER]
    forms += [*REFER_QUESTIONS, *SEEN_QUESTIONS, *MOVING_QUESTIONS]
    forms += [*COLOUR_QUESTIONS, *DIRECTION_QUESTIONS, COUNT_QUESTION, EVENT_QUESTION]
    forms += [form for pair in _DOINGS.values() for form in pair]
    words = {word.lower().rstrip("?.") for word in words_of(forms)} - {"", "[box]", "[seg]"}
    words |= expression_words() | set(COLOURS) | {"a", "an", "and", "while", "yes", "no", "the", ".", ",", "?"}
    return tuple(sorted(words | {str(number) for number in range(MAX_SAMPLED)}))


#: Every word and sign of the questions and answers, in lower case; control tokens are left out.
VOCABULARY = _vocabulary()
