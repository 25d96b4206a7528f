"""Dialogues about generated clips: their tokens, what they ground, and whether they are true."""

import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from modeling_sparrow.training.tiny_tokenizer import build_tokenizer
from sparrow_processing.frame_sampling import sample_frame_indices
from sparrow_processing.processing_sparrow import read_time_span
from sparrow_processing.synthetic import (
    COLOURS,
    DIALOGUE_KINDS,
    PRESETS,
    VOCABULARY,
    Expression,
    WorldConfig,
    all_dialogues,
    generate_clip,
    refer_dialogue,
)

from .test_synthetic_expressions import SINGULAR_EVENTS, fitting, happens, meant, moving, singular

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
CLIPS = [generate_clip(seed, PRESETS[name]) for name in ("train", "hard") for seed in range(60)]


def dialogues(*kinds):
    """(clip, dialogue) of some of the kinds that only dialogues have, or of all others."""
    for number, clip in enumerate(CLIPS):
        for item in all_dialogues(clip, np.random.default_rng(number)):
            if item.kind in kinds if kinds else item.kind not in DIALOGUE_KINDS:
                yield clip, item


def test_every_pair_of_tokens_has_its_objects_and_every_word_an_id():
    tokenizer = build_tokenizer()
    kinds, words = Counter(), set()
    for number, clip in enumerate(CLIPS):
        found = all_dialogues(clip, np.random.default_rng(number))
        assert found == all_dialogues(clip, np.random.default_rng(number))
        for item in found:
            kinds[item.kind] += 1
            assert item.answer.count("[BOX] [SEG]") == item.answer.count("[SEG]") == len(item.targets)
            assert all(item.targets) and item.answer.count("[BOX]") == len(item.targets)
            words.update(re.findall(r"\w+|[^\w\s]", re.sub(r"\[\w+\]|</?p>", "", f"{item.question} {item.answer}")))
    assert set(kinds) == {*PRESETS["train"].kinds, *DIALOGUE_KINDS} and min(kinds.values()) > 50
    assert {word.lower() for word in words} <= set(VOCABULARY)
    ids = tokenizer(" ".join(VOCABULARY) + " <p> </p> [BOX] [SEG]").input_ids
    assert tokenizer.unk_token_id not in ids and len(ids) == len(VOCABULARY) + 4  # one id per word


def test_answers_to_expressions():
    answers = {
        (): "nothing matches .",
        (2,): "it is [BOX] [SEG] .",
        (0, 2): "they are [BOX] [SEG] .",
    }
    questions = set()
    for targets, answer in answers.items():
        for seed in range(40):
            item = refer_dialogue(Expression("the red frog", targets, "class", 3), np.random.default_rng(seed))
            assert (item.answer, item.targets) == (answer, (targets,) if targets else ())
            assert (item.kind, item.time_span) == ("class", None)
            questions.add(item.question)
    assert len(questions) >= 5 and all("the red frog" in question for question in questions)


def test_referring_dialogues_are_true():
    frame = r"(?:What is|Can you segment|where is|find|show me|please segment) (.+?) ?(?:in this video\?.*|\?|\.)"
    for clip, item in dialogues():
        text = re.fullmatch(frame, item.question)[1]
        if item.kind != "none":
            assert {i for ids in item.targets for i in ids} == meant(text, clip)


def doing(words, ids, clip):
    """Objects of ``ids`` that do what a caption says."""
    if words.split()[0] in ("stays", "stay"):
        return moving("still", ids, clip)
    if match := re.fullmatch("moves? (left|right|up|down)", words):
        return moving(match[1], ids, clip)
    return {i for i in ids if happens(words if re.fullmatch(SINGULAR_EVENTS, words) else singular(words), i, clip)}


def test_captions_name_every_object_once_and_say_what_it_does():
    several = 0
    for clip, item in dialogues("caption"):
        parts = re.findall(r"<p> (.+?) </p> \[BOX\] \[SEG\] (.+?)(?: ,| and(?= <p>)| while| \.)", item.answer)
        assert len(parts) == len(item.targets) and item.answer.endswith(" .")
        assert sorted(i for ids in item.targets for i in ids) == list(range(clip.num_objects))
        for (phrase, words), ids in zip(parts, item.targets, strict=True):
            article, name = phrase.split(maxsplit=1)
            assert article == ("an" if name[0] == "o" else "a") if len(ids) == 1 else NUMBERS[article] == len(ids)
            assert doing(words, fitting(name, clip), clip) == set(ids)
            several += len(ids) > 1
    assert several > 3


@pytest.mark.parametrize("sampled", [3, 5, 8, 16])
def test_time_spans_are_read_back_as_the_frames_they_mean(sampled):
    for number, clip in enumerate(CLIPS):
        frames = clip.config.num_frames
        chosen = sample_frame_indices(np.arange(frames), sampled)
        request = SimpleNamespace(sampled_frames=chosen.tolist(), timestamps=[t / 8 for t in range(frames)])
        for item in all_dialogues(clip, np.random.default_rng(number), sampled):
            assert (item.time_span is None) == (item.kind != "time")
            if item.kind == "time":
                start, end = item.time_span
                assert read_time_span(item.answer, request) == (start / 8, end / 8)
                ((target,),) = item.targets
                assert spans(item.question, target, clip, start, end, chosen)


def test_most_time_spans_are_shorter_than_the_clip():
    found = [item.time_span == (0, clip.config.num_frames - 1) for clip, item in dialogues("time")]
    assert 0.1 < np.mean(found) < 0.65


def spans(question, target, clip, start, end, chosen):
    """Whether the span holds the sampled frames that the question asks for, and no others."""
    if question.startswith("when and where is") or " see " in question:
        right = clip.visibility[target] >= 0.3
    else:
        steps = np.abs(np.diff(clip.full_boxes[target], axis=0)).sum(axis=1) > 0
        right = np.append(steps, False) | np.insert(steps, 0, False)
    inside = [t for t in chosen if start <= t <= end]
    assert {start, end} <= set(inside)
    return all(right[t] for t in inside) and not any(right[t] for t in chosen if t not in inside)


def test_spoken_answers_are_true():
    answers = Counter()
    for clip, item in dialogues("question"):
        answer = item.answer.removesuffix(" .")
        answers[answer] += 1
        if match := re.fullmatch(r"how many (.+) are there \?", item.question):
            assert NUMBERS[answer] == len(fitting(match[1].replace("objects", "object"), clip))
        elif match := re.fullmatch(r"(?:which|what) color is the (.+) \?", item.question):
            (i,) = fitting(match[1], clip)
            assert answer == clip.objects[i].colour
        elif match := re.fullmatch(rf"is it true that the (.+?) ({SINGULAR_EVENTS}) \?", item.question):
            (i,) = fitting(match[1], clip)
            assert answer == ("yes" if happens(match[2], i, clip) else "no")
        else:
            name = re.fullmatch(r"(?:where does|which way does) the (.+) move \?", item.question)[1]
            assert moving(answer, fitting(name, clip), clip) == fitting(name, clip)
    assert set(COLOURS) | {"yes", "no", "left", "right", "up", "down", "one", "two"} <= set(answers)
    assert answers["yes"] == answers["no"]


def test_a_single_frame_has_no_time():
    clip = generate_clip(3, WorldConfig(num_frames=1))
    kinds = {item.kind for item in all_dialogues(clip, np.random.default_rng(0))}
    assert "question" in kinds and not kinds & {"time", "caption"}


def test_more_frames_than_words_are_refused():
    with pytest.raises(ValueError, match="expected 1 to 16"):
        all_dialogues(CLIPS[0], np.random.default_rng(0), 17)
