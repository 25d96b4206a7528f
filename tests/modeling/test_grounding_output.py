"""What is known of a run on its way, and how the answer came about."""

import pytest
import torch

from modeling_sparrow import GroundingOutput
from modeling_sparrow.mask_tracker import FrameMasks

from ..tiny import random_clip, random_model, say


def test_the_output_fills_up_on_the_way(shared_model, processor):
    """Who stops after the first frame has the text, the places and the prompts."""
    inputs = processor(text=["the ring", "the star"], videos=random_clip(5))
    output = GroundingOutput()
    steps = shared_model.ground_iter(**inputs, **say(inputs), output=output)
    _, first = next(steps)
    steps.close()
    whole = shared_model.ground(**inputs, **say(inputs))
    assert torch.equal(output.sequences, whole.sequences) and output.num_frames == [5, 5]
    assert [len(objects) for objects in output.objects] == [len(objects) for objects in whole.objects]
    for row in (0, 1):
        (place,), (expected,) = output.located[row], whole.located[row]
        assert torch.equal(place.boxes, expected.boxes) and torch.equal(place.confidence, expected.confidence)
        for tracked, found in zip(whole.tracked[row], whole.objects[row], strict=True):
            assert tracked.frame_index == found.frame_index == place.frame_index
            assert torch.equal(tracked.prompts[0].boxes[0], found.box)
    scores = torch.stack([found.frame_scores for objects in output.objects for found in objects])
    assert scores.count_nonzero(dim=0).nonzero().flatten().tolist() == [first.frame_index]


def test_a_given_output_is_returned(shared_model, processor):
    inputs = processor(text="the ring", videos=random_clip(4))
    output = GroundingOutput()
    assert shared_model.ground(**inputs, **say(inputs), output=output) is output


def test_an_answer_without_tokens_locates_nothing(shared_model, processor):
    inputs = processor(text="the ring", videos=random_clip(4))
    output = shared_model.ground(**inputs, **say(inputs, "there is no such object . <|end|>"))
    assert output.objects == output.located == output.tracked == [[]] and output.num_frames == [4]


@pytest.mark.parametrize("seed, is_better", [(1, False), (2, True)])
def test_masks_tell_where_an_object_was_prompted_again(processor, seed, is_better):
    """On every later frame with a threshold that no score reaches, but only where the new mask was taken."""
    inputs = processor(text="the ring", videos=random_clip(6))
    filtration = {"score_threshold": 0.0, "max_boxes_per_token": 2}
    tracker = {"reprompt_threshold": 2.0}
    model = random_model(seed, mask_tracker_config=tracker, filtration_config=filtration)
    steps = [masks for _, masks in model.ground_iter(**inputs, **say(inputs))]
    again = {masks.frame_index: masks.reprompt_boxes for masks in steps if masks.reprompt_boxes is not None}
    assert bool(again) == is_better and steps[0].frame_index not in again
    for boxes in again.values():
        assert boxes.shape == (len(steps[0].objects), 4) and boxes.isfinite().all()


def test_boxes_of_later_prompts_are_split_by_row():
    empty = torch.zeros(2, 1, 1)
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.5], [torch.nan] * 4])
    scores = torch.zeros(2)
    masks = FrameMasks(
        frame_index=1,
        objects=[0, 1],
        logits=empty,
        raw_logits=empty,
        score=scores,
        object_logits=scores,
        pointer=torch.zeros(2, 4),
        reprompt_boxes=boxes,
    )
    split = masks.by_owner([(0, 0), (1, 0)])
    assert torch.equal(split[0].reprompt_boxes, boxes[:1]) and split[1].reprompt_boxes.isnan().all()
