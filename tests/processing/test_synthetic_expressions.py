"""What expressions about generated clips mean, worked out again from the words, the boxes and the visible shares."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sparrow_processing.synthetic import (
    COLOURS,
    HELD_OUT_PAIRS,
    KINDS,
    NOUNS,
    PRESETS,
    VOCABULARY,
    WorldConfig,
    all_expressions,
    generate_clip,
    sample_expressions,
)
from sparrow_processing.synthetic.shapes import SHAPES
from sparrow_processing.synthetic.words import ANY_SHAPE, PLURALS

EVERY_KIND = {name: replace(config, kinds=KINDS) for name, config in PRESETS.items()}
EVERY_KIND["wide"] = replace(PRESETS["train"], height=160, width=256, num_frames=12)
SINGULARS = {plural: noun for noun, plural in PLURALS.items()} | {"objects": "object"}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1), "up": (1, -1), "down": (1, 1)}


def centres(clip):
    """(N, T, 2)"""
    return (clip.full_boxes[..., :2] + clip.full_boxes[..., 2:]) / 2


def fitting(phrase, clip):
    """Objects that a noun phrase fits: every word must hold."""
    found = set(range(clip.num_objects))
    for word in phrase.split():
        word = {"little": "small", "big": "large"}.get(word, word)
        word = SINGULARS.get(word, word)
        if word in ("the", "that", "is", "in", "video", "object", "one", "shape"):
            continue
        assert word in COLOURS or word in NOUNS or word in ("small", "large"), (
            f"unexpected word {word!r} in {phrase!r}"
        )
        found &= {i for i, o in enumerate(clip.objects) if word in (o.colour, o.size, o.noun)}
    return found


def steps_of(clip, i):
    """(T - 1, 2) pixels; boxes are rounded to whole pixels, so a step may be off by one."""
    return np.diff(centres(clip)[i], axis=0)


def speed_of(clip, i):
    """Pixels per frame over the longest way without a turn, from the boxes: they are rounded, and it may turn between
    two frames."""
    steps = steps_of(clip, i).sum(axis=1)  # an object moves along one axis only
    turns = np.flatnonzero(np.diff(np.sign(steps)))
    ways = np.split(steps, np.unique(np.concatenate([turns, turns + 1, turns + 2]).clip(0, len(steps))))
    return max(abs(float(way.mean())) for way in ways if len(way) == max(map(len, ways)))


def moving(word, ids, clip):
    still = {i for i in ids if not steps_of(clip, i).any()}
    if word in ("still", "moving"):
        return still if word == "still" else ids - still
    axis, sign = SIDES[word]
    far = 5 / 128 * clip.config.short_side
    return {
        i
        for i in ids
        if (sign * steps_of(clip, i)[:, axis] >= 0).all() and sign * steps_of(clip, i)[:, axis].sum() >= far
    }


def of_speed(word, ids, clip):
    per_second = {i: speed_of(clip, i) * clip.config.frames_per_second / clip.config.short_side for i in ids}
    if word in ("fastest", "slowest"):
        return {(max if word == "fastest" else min)(ids, key=per_second.get)}
    # between the slow ones (below 0.16 short sides a second) and the fast ones (above 0.25)
    return {i for i in ids if (per_second[i] > 0.2 if word in ("fast", "quick") else 0 < per_second[i] < 0.2)}


def outside(clip, i, t):
    left, top, right, bottom = clip.full_boxes[i, t]
    return right <= 0 or bottom <= 0 or left >= clip.config.width or top >= clip.config.height


def happens(event, i, clip):
    """Whether an event of the vocabulary happens to object i."""
    shares, steps = clip.visibility[i], steps_of(clip, i)
    axis = int(np.abs(steps).sum(axis=0).argmax())
    along = steps[:, axis]
    if event in ("enters later", "appears later", "comes in later"):
        return outside(clip, i, 0) and shares[0] == 0 and shares.max() > 0.25
    if event in ("leaves", "leaves the picture", "goes away"):
        return outside(clip, i, -1) and shares[-1] == 0 and shares.max() > 0.25
    if event in ("is hidden for a while", "vanishes and comes back"):
        return vanishes(shares)
    if event in ("goes behind the bar", "passes behind the bar"):
        return any(behind_bar(i, t, clip) for t in hidden_between(shares))
    if event in ("turns around", "turns back"):
        return bool((along > 0).any() and (along < 0).any())
    if event in ("stops", "moves and then stops"):
        return bool(along.any() and not along[-2:].any())
    if event in ("starts moving later", "waits and then moves"):
        return bool(along.any() and not along[:2].any())
    side = re.fullmatch(r"ends (?:on|at) the (left|right|top|bottom)", event)[1]
    axis, sign = SIDES[side]
    size = (clip.config.width, clip.config.height)[axis]
    return bool(shares[-1] >= 0.3 and sign * (centres(clip)[i, -1, axis] - size / 2) >= size / 6)


def vanishes(shares):
    return bool(hidden_between(shares))


def hidden_between(shares):
    """Frames on which an object is hidden that is seen well before and after."""
    return [t for t in np.flatnonzero(shares <= 0.03) if min(shares[:t].max(initial=0), shares[t:].max()) >= 0.6]


def behind_bar(i, t, clip):
    low, high = clip.full_boxes[i, t, clip.bar.axis], clip.full_boxes[i, t, clip.bar.axis + 2]
    return low >= clip.bar.start - 1 and high <= clip.bar.stop + 1


def over(front, behind, clip):
    """Whether a box comes to lie over another one, which was apart at the start."""
    one, other = clip.full_boxes[front], clip.full_boxes[behind]
    low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    smaller = np.minimum((one[:, 2:] - one[:, :2]).prod(axis=1), (other[:, 2:] - other[:, :2]).prod(axis=1))
    return shared[0] == 0 and (shared / smaller).max() > 0.03


def meeting(verb, ids, anchor, clip):
    pairs = {"in front of": lambda i: i > anchor, "behind": lambda i: i < anchor, "": lambda i: True}
    in_order = pairs[verb]
    return {
        i
        for i in ids - {anchor}
        if in_order(i) and over(max(i, anchor), min(i, anchor), clip) and steps_of(clip, i).any()
    }


def ranked(ids, side, clip):
    axis, sign = SIDES[side]
    assert min(clip.visibility[i, 0] for i in ids) >= 0.3  # these are questions about the first frame
    return sorted(ids, key=lambda i: -sign * centres(clip)[i, 0, axis])


def related(words, ids, anchor, clip):
    start = centres(clip)[:, 0]
    others = ids - {anchor}
    assert min(clip.visibility[i, 0] for i in others | {anchor}) >= 0.3
    if words in ("nearest to", "closest to"):
        return {min(others, key=lambda i: np.linalg.norm(start[i] - start[anchor]))}
    words = words.removeprefix("to the ")
    sides = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1), "under": (1, 1)}
    axis, sign = sides[words]
    return {i for i in others if sign * (start[i, axis] - start[anchor, axis]) > 0}


SINGULAR_EVENTS = (
    "enters later|appears later|comes in later|leaves|leaves the picture|goes away|is hidden for a while|"
    "vanishes and comes back|goes behind the bar|passes behind the bar|turns around|turns back|stops|"
    "moves and then stops|starts moving later|waits and then moves|ends (?:on|at) the (?:left|right|top|bottom)"
)
VERBS = ("enter", "appear", "come", "leave", "go", "vanish", "pass", "turn", "stop", "move", "start", "wait", "end")


def singular(event):
    """The words of an event of several objects as said of one."""
    event = event.replace("are hidden", "is hidden")
    for verb in VERBS:
        event = re.sub(rf"\b{verb}\b", f"{verb}es" if verb in ("go", "vanish", "pass") else f"{verb}s", event)
    return event


RELATIONS = (
    r"(.+?) (?:that is )?(left of|to the left of|right of|to the right of|above|below|under|nearest to|closest to)"
    " the (.+)"
)
POSITION = {"leftmost": "left", "rightmost": "right", "topmost": "top", "bottommost": "bottom"}
POSITIONS = "|".join(POSITION)


def meant(text, clip):
    """The objects that a text means."""
    text = text.removeprefix("the ")
    if match := re.fullmatch(r"(?:all|every one of the|both|two|three|four|five) (.+)", text):
        found = meant_by_plural(match[1], clip)
        number = 2 if text.startswith("both") else NUMBERS.get(text.split()[0], len(found))
        assert number == len(found), text
        return found
    if match := re.fullmatch(rf"(.+) that ({SINGULAR_EVENTS})", text):
        return {i for i in fitting(match[1], clip) if happens(match[2], i, clip)}
    if match := re.fullmatch(r"(.+) that (?:passes|moves|goes) (in front of|behind) the (.+)", text):
        (anchor,) = fitting(match[3], clip)
        return meeting(match[2], fitting(match[1], clip), anchor, clip)
    if match := re.fullmatch(r"(.+) that (?:crosses|meets) the (.+)", text):
        (anchor,) = fitting(match[2], clip)
        return meeting("", fitting(match[1], clip), anchor, clip)
    if match := re.fullmatch(r"(second|third) (.+) from the (left|right|top|bottom)", text):
        return {ranked(fitting(match[2], clip), match[3], clip)[("first", "second", "third").index(match[1])]}
    if match := re.fullmatch(RELATIONS, text):
        (anchor,) = fitting(match[3], clip)
        return related(match[2], fitting(match[1], clip), anchor, clip)
    if match := re.fullmatch(f"({POSITIONS}) (.+)", text):
        return {ranked(fitting(match[2], clip), POSITION[match[1]], clip)[0]}
    if match := re.fullmatch(f"(.+) that is ({POSITIONS}) at the start", text):
        return {ranked(fitting(match[1], clip), POSITION[match[2]], clip)[0]}
    return meant_by_motion(text, clip)


def meant_by_motion(text, clip):
    if match := re.fullmatch(r"(fast|quick|slow|fastest|slowest) (.+)", text):
        return of_speed(match[1], fitting(match[2], clip), clip)
    if match := re.fullmatch(r"(.+) that (?:is (fast|quick|slow)|moves (fastest|slowest))", text):
        return of_speed(match[2] or match[3], fitting(match[1], clip), clip)
    if match := re.fullmatch(r"(still|moving) (.+)", text):
        return moving(match[1], fitting(match[2], clip), clip)
    if match := re.fullmatch(r"(.+) that (stays still|does not move)", text):
        return moving("still", fitting(match[1], clip), clip)
    if match := re.fullmatch(r"(.+) that moves", text):
        return moving("moving", fitting(match[1], clip), clip)
    if match := re.fullmatch(r"(.+) (?:moving|that moves|going) (?:to the )?(left|right|up|down)(?:wards)?", text):
        return moving(match[2], fitting(match[1], clip), clip)
    return fitting(text, clip)


def meant_by_plural(text, clip):
    if match := re.fullmatch(r"(.+) (?:moving|that move) (?:to the )?(left|right|up|down)(?:wards)?", text):
        return moving(match[2], fitting(match[1], clip), clip)
    if match := re.fullmatch(r"(.+) that (?:stay still|do not move)", text):
        return moving("still", fitting(match[1], clip), clip)
    if match := re.fullmatch(r"(.+) that (.+)", text):
        return {i for i in fitting(match[1], clip) if happens(singular(match[2]), i, clip)}
    return fitting(text, clip)


@pytest.mark.parametrize("world", EVERY_KIND)
def test_expressions_mean_their_targets(world):
    counts = Counter()
    for seed in range(120):
        clip = generate_clip(seed, EVERY_KIND[world])
        for expression in all_expressions(clip, np.random.default_rng(seed)):
            assert meant(expression.text, clip) == set(expression.target_ids), (seed, expression)
            assert expression.candidates == clip.num_objects
            number = len(expression.target_ids)
            assert number >= 2 if expression.kind == "multi" else number == (expression.kind != "none")
            assert all((clip.visibility[i] >= 0.3).sum() >= 2 for i in expression.target_ids)
            counts[expression.kind] += 1
    rare = {"meeting"} if world in ("easy", "shapes", "new_words") else set()  # nothing crosses there
    assert set(KINDS) - set(counts) <= rare
    assert min(counts[kind] for kind in set(KINDS) - rare) > 30


def test_every_event_occurs_for_one_and_for_several():
    seen = {False: set(), True: set()}
    for seed in range(250):
        clip = generate_clip(seed, EVERY_KIND["hard"])
        for expression in all_expressions(clip, np.random.default_rng(seed)):
            match = re.search(f"that ({SINGULAR_EVENTS})$", expression.text)
            if match and expression.kind == "event":
                seen[False].add(match[1])
            match = re.search(r"that (.+)$", expression.text)
            if match and expression.kind == "multi" and re.fullmatch(SINGULAR_EVENTS, singular(match[1])):
                seen[True].add(singular(match[1]))
    assert len(seen[False]) == 20
    assert len(seen[True]) >= 12


def test_position_expressions_keep_their_margins():
    for seed in range(100):
        clip = generate_clip(seed, PRESETS["easy"])
        start = centres(clip)[:, 0]
        for expression in all_expressions(clip, np.random.default_rng(seed)):
            if expression.kind == "position":
                axis = 0 if re.search("leftmost|rightmost", expression.text) else 1
                phrase = re.sub(f"{POSITIONS}|at the start", "", expression.text)
                rivals = fitting(phrase, clip) - set(expression.target_ids)
                assert rivals  # the noun phrase alone is not enough
                target = expression.target_ids[0]
                assert min(abs(start[i, axis] - start[target, axis]) for i in rivals) >= 10


@pytest.mark.parametrize("kind", ["event", "meeting", "motion", "ordinal", "position", "relation", "size", "speed"])
def test_the_noun_phrase_alone_is_never_enough(kind):
    for seed in range(60):
        clip = generate_clip(seed, replace(PRESETS["hard"], kinds=(kind,)))
        for expression in all_expressions(clip, np.random.default_rng(seed)):
            words = expression.text.removeprefix("the ").split()
            named = next(word for word in words if word in (*NOUNS, *ANY_SHAPE))
            if named in NOUNS:
                assert sum(thing.noun == named for thing in clip.objects) > 1
            assert named != "shape" or all(thing.noun in SHAPES for thing in clip.objects)


def test_nothing_matches_in_several_convincing_ways():
    ways = Counter()
    for seed in range(150):
        clip = generate_clip(seed, replace(PRESETS["train"], kinds=("none",)))
        nouns, colours = ({getattr(thing, name) for thing in clip.objects} for name in ("noun", "colour"))
        for expression in all_expressions(clip, np.random.default_rng(seed)):
            words = set(expression.text.split())
            named = [word for word in expression.text.split() if word in NOUNS]
            if named and not words & nouns:
                ways["colour of the clip, another noun" if words & colours else "another noun"] += 1
            elif fitting(
                re.split(" that | moving | going ", expression.text)[0].replace("still ", "").replace("moving ", ""),
                clip,
            ):
                ways["another motion or event"] += 1
            else:
                ways["noun of the clip, another colour or size"] += 1
    assert len(ways) == 4
    assert min(ways.values()) > 100


def test_questions_of_absent_things_use_the_words_of_present_ones():
    """No word gives away that nothing matches."""
    counts = {True: Counter(), False: Counter()}
    world = replace(PRESETS["train"], nouns=NOUNS[:20])  # fewer nouns: each occurs often enough
    for seed in range(150):
        clip = generate_clip(seed, world)
        for expression in all_expressions(clip, np.random.default_rng(seed)):
            counts[expression.kind == "none"].update(set(expression.text.split()))
    assert set(counts[True]) <= set(counts[False])


def test_words_come_from_the_vocabulary():
    assert len(VOCABULARY) < 400
    assert list(VOCABULARY) == sorted(set(VOCABULARY))
    used = set()
    for seed in range(200):
        clip = generate_clip(seed, EVERY_KIND["hard"])
        for expression in all_expressions(clip, np.random.default_rng(seed)):
            used.update(expression.text.split())
    assert used <= set(VOCABULARY)
    assert {"both", "nearest", "leftmost", "still", "fastest", "little", "second", "bar", "later"} <= used


def test_only_the_configured_kinds_are_asked():
    clip = generate_clip(3, replace(PRESETS["easy"], kinds=("colour", "none")))
    assert {expression.kind for expression in all_expressions(clip, np.random.default_rng(0))} <= {"colour", "none"}
    assert not {"multi", "none", "event"} & set(PRESETS["easy"].kinds)


def test_single_frames_have_no_questions_about_time():
    config = WorldConfig(num_frames=1, kinds=("motion", "event", "meeting"))
    assert not any(all_expressions(generate_clip(seed, config), np.random.default_rng(0)) for seed in range(30))


def test_held_out_pairs_are_not_named_in_other_splits():
    pairs = "|".join(
        f"{colour} {noun}\\b|{colour} {PLURALS[noun]}\\b|{noun} that is {colour}" for noun, colour in HELD_OUT_PAIRS
    )
    for seed in range(150):
        clip = generate_clip(seed, PRESETS["train"])
        for expression in all_expressions(clip, np.random.default_rng(seed)):
            assert not re.search(pairs, expression.text)


def test_sample_expressions_draws_different_ones_over_the_kinds():
    expressions = all_expressions(generate_clip(1, PRESETS["easy"]), np.random.default_rng(0))
    drawn = sample_expressions(expressions, 6, np.random.default_rng(0))
    assert len(drawn) == len({id(item) for item in drawn}) == 6
    assert len(sample_expressions(expressions, 10_000, np.random.default_rng(0))) == len(expressions)
    counts = Counter()
    for seed in range(300):
        counts[sample_expressions(expressions, 1, np.random.default_rng(seed))[0].kind] += 1
    kinds = {item.kind for item in expressions}
    assert all(0.5 < counts[kind] * len(kinds) / 300 < 1.6 for kind in kinds)


# Every word that the tokenizer of the first sparrow-tiny knows and that its world asks with.
FIRST_WORDS = """
above all are arrow at below big black blue bolt both bottommost circle closest cross diamond does down downwards
fastest going green heart house in is large left leftmost little moon move moves moving nearest not object of one
orange purple red right rightmost ring shape small square star start stays still that the to topmost triangle under
up upwards video white yellow
"""


def test_the_world_of_shapes_asks_with_its_first_words():
    used = set()
    for seed in range(150):
        clip = generate_clip(seed, PRESETS["shapes"])
        assert {thing.noun for thing in clip.objects} <= set(SHAPES)
        for expression in all_expressions(clip, np.random.default_rng(seed)):
            used.update(expression.text.split())
    assert used <= set(FIRST_WORDS.split()) <= set(VOCABULARY)
    assert {"shape", "fastest", "nearest"} <= used
