"""What the throw-away heads of the language stages are asked about questions, and what the towers keep."""

import numpy as np
import pytest
import torch

from modeling_sparrow.cli import load_model
from modeling_sparrow.registration import DEFAULT_CHECKPOINT
from modeling_sparrow.training import packed_questions, pretrain_towers, question_facts
from modeling_sparrow.training.object_facts import EVENT_NAMES, RANK_NAMES, ranks_on
from modeling_sparrow.training.pretrain_segmenter import batch_clips
from sparrow_processing.synthetic import PRESETS, all_expressions

WORLD = PRESETS["hard"]
WORDS = {"noun": WORLD.nouns, "colour": WORLD.colours}


@pytest.fixture(scope="module")
def asked():
    """Clips, and every question about them."""
    clips = batch_clips(0, 24, 0, WORLD)
    rng = np.random.default_rng(0)
    items = [(n, item) for n, clip in enumerate(clips) for item in all_expressions(clip, rng)]
    return clips, [packed_questions.Question(n, item, item.target_ids, []) for n, item in items]


def test_the_heads_are_asked_for_the_words_of_the_question(asked):
    clips, questions = asked
    seen = set()
    for question in questions:
        clip, text = clips[question.clip], question.expression.text
        facts = question_facts.question_facts(question, clip, WORDS)
        seen |= set(facts)
        if not question.targets:
            assert "noun" not in facts and "direction" not in facts
        if "noun" in facts:
            assert WORDS["noun"][facts["noun"]] in text
        if question.expression.anchor_id is not None:
            anchor = clip.objects[question.expression.anchor_id]
            assert WORDS["noun"][facts["anchor_noun"]] == anchor.noun and anchor.noun in text
            assert WORDS["colour"][facts["anchor_colour"]] == anchor.colour
        if "rank" in facts:
            ordinal, side = question_facts.RANK_ASKED[facts["rank"]].split()
            assert ordinal in text and text.endswith(side)
        if "relation" in facts:
            name = question_facts.RELATION_NAMES[facts["relation"]]
            assert name in text or {"below": "under", "nearest": "closest"}[name] in text
        if "meeting" in facts:
            name = question_facts.MEETING_NAMES[facts["meeting"]]
            assert name in text if name != "cross" else "crosses" in text or "meets" in text
        if "event" in facts:
            assert question.expression.kind == "event" and facts["event"] < len(EVENT_NAMES)
    assert seen == {
        *("noun", "colour", "anchor_noun", "anchor_colour"),
        *("direction", "event", "meeting", "relation", "rank"),
    }


def test_a_loss_falls_to_nothing_where_the_heads_are_right(asked):
    clips, questions = asked
    questions = [question for question in questions if question.expression.kind == "relation"][:6]
    heads = question_facts.QuestionHeads(32, WORDS, whole=True)
    torch.manual_seed(0)
    states = torch.randn(len(questions), 32)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.05)
    first = float(heads.loss(states, clips, questions).detach())
    for _ in range(150):
        optimizer.zero_grad()
        loss = heads.loss(states, clips, questions)
        loss.backward()
        optimizer.step()
    assert first > 5 and float(loss.detach()) < 0.3
    other = [question for question in asked[1] if question.expression.kind == "none"][:3]
    assert float(heads.loss(states[:3], clips, other).detach()) == 0  # what is not there says nothing


def test_ranks_are_those_of_the_frame():
    clip = batch_clips(0, 1, 3, PRESETS["easy"])[0]
    clip.visibility[:] = 1.0
    N, T = clip.visibility.shape
    sizes = clip.full_boxes[..., 2:] - clip.full_boxes[..., :2]
    for t, order in ((0, range(N)), (T - 1, range(N - 1, -1, -1))):  # from the left, then the other way round
        for place, n in enumerate(order):
            clip.full_boxes[n, t, 0::2] = 30.0 * place + np.array([0.0, sizes[n, t, 0]])
    column = RANK_NAMES.index("all_from_left")
    centres = (clip.full_boxes[:, [0, T - 1], 0] + clip.full_boxes[:, [0, T - 1], 2]) / 2
    for index, t in enumerate((0, T - 1)):
        ranks = ranks_on(clip, t)[:, column]
        if (ranks >= 0).all():  # far enough apart
            assert ranks.tolist() == centres[:, index].argsort().argsort().tolist()
    assert (ranks_on(clip, 0)[:, column] >= 0).any() or (ranks_on(clip, T - 1)[:, column] >= 0).any()


def test_towers_that_keep_start_without_a_change_and_are_held_to_it():
    model, _ = load_model(DEFAULT_CHECKPOINT, "cpu")
    side = pretrain_towers.TowerSide(model, PRESETS["train"], keeps=True)
    clips = batch_clips(0, 2, 0, PRESETS["train"])
    trained = {name for name, value in side.named_parameters() if value.requires_grad}
    assert not any("adapter" in name or "known" in name for name in trained)
    for pixels, _ in pretrain_towers._shown(side, clips, np.random.default_rng(0)).values():
        assert float(side.change(pixels, side.patches(pixels))) == pytest.approx(0, abs=1e-8)
    with torch.no_grad():
        for tower in (side.spatial_tower, side.temporal_tower):
            for value in tower.parameters():
                value.add_(0.02 * torch.randn_like(value))
    losses = pretrain_towers.tower_step(0, side, [PRESETS["train"]], 2, 0)
    assert losses["spatial_change"] > 1e-3 and losses["temporal_change"] > 1e-3
    losses["loss"].backward()
    assert all(value.grad is None for value in side.known["towers"].parameters())
