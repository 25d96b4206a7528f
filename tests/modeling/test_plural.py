"""One object or several: what a plural head changes in the choice among proposals."""

import pytest
import torch

from modeling_sparrow.configuration_sparrow import FiltrationHeadConfig
from modeling_sparrow.filtration_head import FiltrationOutput, select_boxes
from modeling_sparrow.losses import filter_losses
from modeling_sparrow.modeling_outputs import FilteredFrame, LocatedBoxes
from modeling_sparrow.region_proposer import RegionProposals

from ..tiny import random_clip, random_config, random_model, say

RULES = FiltrationHeadConfig(score_threshold=0.6, plural_threshold=0.3, fallback_threshold=0.2, plural_head=True)
BOXES = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.4, 0.4, 0.6, 0.6], [0.7, 0.7, 0.9, 0.9]])


@pytest.mark.parametrize(
    ("confidence", "is_plural", "chosen"),
    [
        ([0.7, 0.9, 0.4], None, [0, 1]),
        ([0.7, 0.9, 0.4], True, [0, 1, 2]),
        ([0.7, 0.9, 0.4], False, [1]),
        ([0.1, 0.25, 0.2], None, [1]),
        ([0.1, 0.25, 0.2], True, [1]),
        ([0.1, 0.25, 0.2], False, [1]),
        ([0.1, 0.15, 0.1], True, []),
        ([0.1, 0.15, 0.1], False, []),
    ],
)
def test_one_means_the_best_and_several_all_that_are_likely(confidence, is_plural, chosen):
    found = select_boxes(torch.tensor(confidence), BOXES, RULES, is_plural)
    assert sorted(found.tolist()) == chosen


def filtered(frame: int, confidence: list[float], plural_logit: float | None) -> FilteredFrame:
    values = torch.tensor(confidence)[None, None]
    return FilteredFrame(
        frame,
        RegionProposals(boxes=BOXES[None], scores=torch.ones(1, 3), features=None, valid=torch.ones(1, 3).bool()),
        FiltrationOutput(
            logits=values.logit(),
            confidence=values,
            boxes=BOXES[None, None],
            plural_logits=None if plural_logit is None else torch.tensor([plural_logit]),
        ),
    )


@pytest.mark.parametrize(("plural_logit", "frame", "count"), [(2.0, 4, 2), (-2.0, 0, 1), (None, 0, 1)])
def test_several_are_looked_for_where_most_of_them_are(plural_logit, frame, count):
    frames = [filtered(0, [0.9, 0.1, 0.1], plural_logit), filtered(4, [0.8, 0.7, 0.1], plural_logit)]
    frames.append(filtered(7, [0.1, 0.4, 0.35], plural_logit))
    place = LocatedBoxes.choose(frames, 0, torch.zeros(4), RULES)
    assert place.frame_index == frame and len(place.boxes) == count


def test_the_head_learns_from_the_boxes_of_a_token_and_not_from_its_mask():
    config = random_config(filtration_config={"plural_head": True})
    masks = torch.zeros(1, 2, 8, 8)
    masks[0, :, 2:5, 2:5] = 1
    one = torch.full((1, 2, 2, 4), torch.nan)
    one[0, 0] = BOXES[0]
    two = one.clone()
    two[0, 1, 1] = BOXES[1]  # the second one comes later

    def loss(plural_logit, boxes):
        frame = filtered(0, [0.5, 0.5, 0.5], plural_logit)
        return float(filter_losses(config, [frame], masks, boxes)["filter_class_loss"])

    plain = loss(None, one)
    assert loss(-20.0, one) == pytest.approx(plain) and loss(20.0, one) == pytest.approx(plain + 20, abs=1e-3)
    assert loss(20.0, two) == pytest.approx(loss(None, two)) and loss(-20.0, two) > loss(None, two) + 19
    assert loss(20.0, None) == loss(-20.0, None) == loss(None, None)


def test_a_model_with_the_head_looks_at_all_candidate_frames_for_several(processor):
    rules = {"plural_head": True, "score_threshold": 0.0, "plural_threshold": 0.0, "nms_threshold": 0.0}
    model = random_model(filtration_config=rules, num_prompt_frames=2)
    inputs = processor(text="the rings", videos=random_clip(4))
    asked = []
    original = model._filter_frames
    model._filter_frames = lambda *arguments: asked.append(arguments[2]) or original(*arguments)
    bias = model.model.filtration_head.plural_head[-1].bias
    counts = {}
    for logit in (-100.0, 100.0):
        with torch.no_grad():
            bias.fill_(logit)
        asked.clear()
        counts[logit] = len(model.ground(**inputs, **say(inputs)).objects[0]), len(asked)
    assert counts[-100.0] == (1, 1) and counts[100.0][0] >= 1 and counts[100.0][1] == 2
