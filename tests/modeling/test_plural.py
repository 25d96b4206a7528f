"""One object or several: what a plural head changes in the choice among proposals."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from modeling_sparrow.box_ops import tight_boxes
from modeling_sparrow.cli import load_model
from modeling_sparrow.configuration_sparrow import FiltrationHeadConfig
from modeling_sparrow.filtration_head import FiltrationOutput, select_boxes
from modeling_sparrow.losses import filter_losses
from modeling_sparrow.modeling_outputs import FilteredFrame, GroundingOutput, LocatedBoxes
from modeling_sparrow.region_proposer import RegionProposals
from modeling_sparrow.registration import DEFAULT_CHECKPOINT
from sparrow_processing import open_video
from sparrow_processing.synthetic import PRESETS, generate_clip

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
    assert [other.frame_index for other in place.elsewhere] == ([0, 7] if count == 2 else [])


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


def test_what_no_mask_covers_on_another_frame():
    place = LocatedBoxes(4, BOXES, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(4), None, torch.zeros(3))
    followed = torch.stack([BOXES[1] + 0.02, torch.full((4,), torch.nan)])
    missed = place.not_covered(followed, 0.3)
    assert torch.equal(missed.boxes, BOXES[[0, 2]]) and missed.scores.tolist() == pytest.approx([0.9, 0.7])
    assert missed.frame_index == 4 and len(place.not_covered(followed, 0.9).boxes) == 3


@pytest.mark.parametrize("completion_iou", [None, 0.3])
def test_objects_that_were_missed_at_first_are_followed_too(completion_iou):
    """Two things of a clip, of which the frame that is prompted shows one; others show both."""
    model, processor = load_model(DEFAULT_CHECKPOINT, "cpu")
    model.config.filtration_config.completion_iou = completion_iou
    clip = generate_clip(4, PRESETS["easy"])
    height, width = clip.frames.shape[1:3]
    boxes = torch.from_numpy(clip.boxes) / torch.tensor([width, height, width, height])
    assert clip.visibility[:2, [0, 4, 7]].min() > 0.8

    def place(frame, ids):
        return LocatedBoxes(frame, boxes[ids, frame], torch.ones(len(ids)), torch.zeros(64), None, torch.ones(1))

    first = place(0, [0])
    first.elsewhere = [place(4, [0, 1]), place(7, [0, 1])]
    model.locate = lambda *_: [first]
    inputs = processor(text="both things", videos=open_video(clip.frames, fps=8))
    output = GroundingOutput()
    answer = say(inputs, "they are [BOX] [SEG] . <|end|>")
    walk = model.ground_iter(**inputs, **answer, output=output, keep_logits=True)
    steps = [(own.objects, own.frame_index) for _, own in walk]
    prompted = [0] if completion_iou is None else [0, 4]
    assert [found.frame_index for found in output.objects[0]] == prompted
    assert [tracked.frame_index for tracked in output.tracked[0]] == prompted
    assert sorted(steps) == [([k], t) for k in range(len(prompted)) for t in range(8)]
    (result,) = processor.post_process_grounding(output)
    for found, mask, truth in zip(output.objects[0], result.masks, clip.masks, strict=False):
        assert (mask & truth).sum() / (mask | truth).sum() > 0.6
        torch.testing.assert_close(found.frame_boxes, tight_boxes(found.mask_logits), equal_nan=True)


def test_what_completion_needs():
    with pytest.raises(StrictDataclassClassValidationError, match="needs plural_head=True"):
        FiltrationHeadConfig(completion_iou=0.3)
    rules = {"filtration_config": {"plural_head": True, "completion_iou": 0.3}}
    with pytest.raises(StrictDataclassClassValidationError, match="not with framewise masks"):
        random_config(**rules, mask_tracker_config={"propagation": "framewise"})
    assert random_config(**rules).filtration_config.completion_iou == 0.3
