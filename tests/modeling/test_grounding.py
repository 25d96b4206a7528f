"""`ground` and its four steps on a random model."""

import pytest
import torch

from modeling_sparrow.frame_pyramid import TensorFrames
from modeling_sparrow.mask_tracker import FrameMasks, MaskPrompt, TrackedObject

from ..tiny import SIZE, random_clip, random_model, say

ATOL = 1e-4


class EncoderCalls:
    """Counts the frames that go through the segmenter's image encoder."""

    def __init__(self, model):
        self.frames = 0
        self.handle = model.model.mask_tracker.sam2.vision_encoder.register_forward_pre_hook(
            lambda module, args, kwargs: self.count(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
        )

    def count(self, pixel_values):
        self.frames += len(pixel_values)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.handle.remove()


def same_objects(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert (a.token_position, a.frame_index) == (b.token_position, b.frame_index)
        torch.testing.assert_close(a.box, b.box, atol=ATOL, rtol=ATOL)
        torch.testing.assert_close(a.mask_logits, b.mask_logits, atol=ATOL, rtol=ATOL)
        torch.testing.assert_close(a.frame_scores, b.frame_scores, atol=ATOL, rtol=ATOL)


def test_batch_of_two_videos_equals_two_single_runs(shared_model, processor):
    clips = [random_clip(6, seed=1), random_clip(9, height=40, width=56, seed=2)]
    queries = ["the red ring", "the blue star that moves to the left"]
    both = processor(text=queries, videos=clips)
    batch = shared_model.ground(**both, **say(both))
    for row, (clip, query) in enumerate(zip(clips, queries, strict=True)):
        alone = processor(text=query, videos=clip)
        single = shared_model.ground(**alone, **say(alone))
        assert torch.equal(single.sequences[0], batch.sequences[row])
        same_objects(single.objects[0], batch.objects[row])
        assert batch.num_frames[row] == len(clip)


def test_two_queries_encode_each_frame_once(shared_model, processor):
    clip = random_clip(7)
    inputs = processor(text=["the red ring", "the star"], videos=clip)
    assert inputs["video_index"].tolist() == [0, 0] and len(inputs["mask_pixel_values"]) == 1
    with EncoderCalls(shared_model) as calls:
        output = shared_model.ground(**inputs, **say(inputs))
    assert calls.frames == 7
    assert all(output.objects)


def test_two_queries_equal_two_runs(shared_model, processor):
    clip = random_clip(6)
    queries = ["the red ring", "the large yellow star moving up"]
    both = processor(text=queries, videos=clip)
    together = shared_model.ground(**both, **say(both))
    for row, query in enumerate(queries):
        alone = processor(text=query, videos=clip)
        same_objects(shared_model.ground(**alone, **say(alone)).objects[0], together.objects[row])


def test_several_pairs_and_none(shared_model, processor):
    inputs = processor(text="the rings", videos=random_clip(5))
    many = shared_model.ground(**inputs, **say(inputs, "it is [BOX] [SEG] and [BOX] [SEG] . <|end|>"))
    positions = [found.token_position for found in many.objects[0]]
    assert sorted(set(positions)) == [3, 6] and not any("tokens" in warning for warning in many.warnings[0])
    none = shared_model.ground(**inputs, **say(inputs, "there is no such object . <|end|>"))
    assert none.objects == [[]] and none.num_frames == [5]


@pytest.mark.parametrize(
    ("answer", "expected", "warned"),
    [
        ("it is [BOX] [SEG] [SEG] . <|end|>", {3}, True),
        ("it is [BOX] [BOX] [SEG] . <|end|>", {4}, True),
        ("it is [SEG] . <|end|>", {2}, False),
        ("it is [BOX] . <|end|>", {2}, False),
        ("[SEG] [BOX] <|end|>", {0}, False),
    ],
)
def test_tokens_without_a_partner(answer, expected, warned, shared_model, processor):
    inputs = processor(text="the ring", videos=random_clip(4))
    output = shared_model.ground(**inputs, **say(inputs, answer))
    assert {found.token_position for found in output.objects[0]} == expected
    assert any("of each are used" in warning for warning in output.warnings[0]) == warned
    for found in output.objects[0]:
        assert found.mask_logits.shape == (4, SIZE // 4, SIZE // 4) and found.mask_logits.isfinite().all()


def test_fifty_tokens(shared_model, processor):
    inputs = processor(text="the ring", videos=random_clip(3))
    output = shared_model.ground(**inputs, **say(inputs, "[BOX] [SEG] " * 25 + "<|end|>"))
    assert len({found.token_position for found in output.objects[0]}) == 25


def test_tokens_in_the_prompt_count_for_nothing(shared_model, processor):
    inputs = processor(text="the ring [BOX] [SEG] [SEG]", videos=random_clip(3))
    output = shared_model.ground(**inputs, **say(inputs))
    assert {found.token_position for found in output.objects[0]} == {3}


def test_stream_equals_tensor(shared_model, processor):
    clip = random_clip(9)
    whole = processor(text="the ring", videos=clip)
    stream = processor(text="the ring", videos=clip, stream=True)
    assert "mask_pixel_values" not in stream
    same_objects(
        shared_model.ground(**whole, **say(whole)).objects[0], shared_model.ground(**stream, **say(stream)).objects[0]
    )


def test_sink_sees_every_frame_once_and_nothing_is_kept(shared_model, processor):
    inputs = processor(text=["the ring", "the star"], videos=random_clip(6), stream=True)
    seen = []
    output = shared_model.ground(**inputs, **say(inputs), mask_sink=lambda row, masks: seen.append((row, masks)))
    for row, objects in enumerate(output.objects):
        frames = [(masks.frame_index, item) for r, masks in seen if r == row for item in masks.objects]
        assert sorted(frames) == sorted((t, k) for t in range(6) for k in range(len(objects)))
        assert all(found.mask_logits is None for found in objects)


def test_beam_search_is_refused(shared_model, processor):
    inputs = processor(text="the ring", videos=random_clip(3))
    with pytest.raises(ValueError, match="num_beams=1"):
        shared_model.ground(**inputs, num_beams=2)


def test_one_frame(shared_model, processor):
    inputs = processor(text="the ring", videos=random_clip(1))
    assert inputs["num_frames"].tolist() == [1] and "temporal_pixel_values" not in inputs
    output = shared_model.ground(**inputs, **say(inputs))
    assert output.objects[0][0].mask_logits.shape[0] == 1


def test_propagation_goes_both_ways_from_the_prompted_frame(shared_model):
    """Backwards is forwards on the reversed video."""
    tracker = shared_model.model.mask_tracker
    frames = torch.randn(7, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0.2, 0.3, 0.6, 0.7]])

    def track(frames, start):
        objects = [TrackedObject(start, [MaskPrompt(boxes=box)])]
        masks = {m.frame_index: m.logits for m in tracker.propagate(tracker.encode_video(frames), objects)}
        assert sorted(masks) == list(range(len(frames)))
        return masks

    forwards, backwards = track(frames, 2), track(frames.flip(0), 4)
    for t in range(7):
        torch.testing.assert_close(forwards[t], backwards[6 - t], atol=1e-3, rtol=1e-3)


def test_objects_together_equal_objects_alone(shared_model):
    tracker = shared_model.model.mask_tracker
    frames = torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.5, 0.2, 0.9, 0.6], [0.3, 0.4, 0.6, 0.9]])
    objects = [
        TrackedObject(start, [MaskPrompt(boxes=box[None])]) for start, box in zip((0, 3, 0), boxes, strict=True)
    ]

    def track(objects):
        found = {}
        for masks in tracker.propagate(tracker.encode_video(frames), objects):
            for row, item in enumerate(masks.objects):
                found[item, masks.frame_index] = masks.logits[row]
        return found

    together = track(objects)
    assert len(together) == 18
    for k, item in enumerate(objects):
        for (_, t), logits in track([item]).items():
            torch.testing.assert_close(together[k, t], logits, atol=ATOL, rtol=ATOL)


def test_objects_beyond_the_batch_size_equal_one_batch():
    frames = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    boxes = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)).sort(-1).values[:, [0, 1, 2, 3]]
    results = []
    for size in (16, 2):
        tracker = random_model(mask_tracker_config={"object_batch_size": size}).model.mask_tracker
        objects = [TrackedObject(0, [MaskPrompt(boxes=box[None])]) for box in boxes]
        found = {}
        for masks in tracker.propagate(tracker.encode_video(frames), objects):
            found |= {(k, masks.frame_index): masks.logits[row] for row, k in enumerate(masks.objects)}
        results.append(found)
    for key, logits in results[0].items():
        torch.testing.assert_close(results[1][key], logits, atol=ATOL, rtol=ATOL)


def test_memory_bank_is_bounded(shared_model):
    tracker = shared_model.model.mask_tracker
    memory = tracker.new_memory()
    frames = torch.randn(1, 3, SIZE, SIZE)
    pyramid = tracker.encode_frames(frames)
    masks = tracker.prompt(pyramid, MaskPrompt(boxes=torch.tensor([[0.1, 0.1, 0.5, 0.5]])))
    memory.add_prompted(0, tracker.remember(pyramid, masks, prompted=True))
    for t in range(1, 30):
        masks = tracker.step(pyramid, memory, t)
        memory.add_recent(t, tracker.remember(pyramid, masks, prompted=False))
        assert len(memory.recent) <= memory.num_pointers
        assert sum(m.features is not None for m in memory.recent.values()) <= memory.num_recent
    assert len(memory.prompted) == 1


def test_training_masks_are_inference_masks(processor):
    """The same function makes the masks: a training clip and `ground` agree on the same boxes and embeddings."""
    model = random_model(num_prompt_frames=1)
    clip = random_clip(5)
    inputs = processor(text="the ring", videos=clip)
    grounded = model.ground(**inputs, **say(inputs)).objects[0]
    answer = model.ground(**inputs, **say(inputs)).sequences
    with torch.no_grad():
        trained = model(
            input_ids=torch.cat([inputs["input_ids"], answer], dim=1),
            attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1),
            spatial_pixel_values=inputs["spatial_pixel_values"],
            temporal_pixel_values=inputs["temporal_pixel_values"],
            num_frames=inputs["num_frames"],
            mask_pixel_values=inputs["mask_pixel_values"],
        )
    boxes = torch.stack([found.box for found in grounded])
    torch.testing.assert_close(trained.boxes[0], boxes, atol=ATOL, rtol=ATOL)
    present = torch.stack([found.object_logits for found in grounded]) > 0
    inferred = torch.stack([found.mask_logits for found in grounded])
    if present.all():  # training keeps the logits of objects that count as absent
        torch.testing.assert_close(trained.mask_logits[0], inferred.amax(0), atol=1e-3, rtol=1e-3)
    assert trained.mask_logits.shape == (1, 5, SIZE // 4, SIZE // 4)


def test_steps_are_public(shared_model, processor):
    """generate -> locate -> segment -> propagate by hand gives what `ground` gives."""
    inputs = processor(text="the ring", videos=random_clip(5))
    expected = shared_model.ground(**inputs, **say(inputs)).objects[0]
    keys = ("input_ids", "attention_mask", "spatial_pixel_values", "temporal_pixel_values", "num_frames")
    with torch.no_grad():
        generated = shared_model.generate(
            **{key: inputs[key] for key in keys},
            **say(inputs),
            output_hidden_states=[-1],
            return_dict_in_generate=True,
        )
        states = torch.stack([step[-1][0, -1] for step in generated.hidden_states])
        ids = generated.sequences[0, inputs["input_ids"].shape[1] :]
        box_id, seg_id = shared_model.config.box_token_id, shared_model.config.seg_token_id
        box = shared_model.model.token_embeddings(states[ids == box_id], box_id)
        seg = shared_model.model.token_embeddings(states[ids == seg_id], seg_id)
        pyramids = shared_model.model.mask_tracker.encode_video(inputs["mask_pixel_values"][0])
        (place,) = shared_model.locate(box, pyramids)
        first = shared_model.segment(pyramids.at(place.frame_index), seg.expand(len(place.boxes), -1), place.boxes)
        objects = shared_model.tracked_objects(seg, [place])[0]
        masks = {m.frame_index: m.logits for m in shared_model.propagate(pyramids, objects)}
    for k, found in enumerate(expected):
        torch.testing.assert_close(first.logits[k], found.mask_logits[place.frame_index], atol=ATOL, rtol=ATOL)
        for t in range(5):
            torch.testing.assert_close(masks[t][k], found.mask_logits[t], atol=ATOL, rtol=ATOL)


def test_reprompt_replaces_weak_masks(processor):
    """With a threshold no score can reach, every later frame is located again and the better mask kept."""
    clip = random_clip(6)
    inputs = processor(text="the ring", videos=clip)
    rules = {"score_threshold": 0.0, "nms_threshold": 0.0}
    plain = random_model(filtration_config=rules).ground(**inputs, **say(inputs)).objects[0]
    model = random_model(filtration_config=rules, mask_tracker_config={"reprompt_threshold": 2.0})
    again = model.ground(**inputs, **say(inputs)).objects[0]
    assert len(again) == len(plain) >= 1
    for first, second in zip(plain, again, strict=True):
        following = first.frame_index + 1  # up to here both remember the same
        assert second.frame_scores[following] >= first.frame_scores[following] - 1e-6


def test_absent_object_is_not_drawn(processor):
    """Below the fallback threshold nothing is grounded."""
    model = random_model(filtration_config={"score_threshold": 1.0, "fallback_threshold": 1.0})
    inputs = processor(text="the ring", videos=random_clip(4))
    output = model.ground(**inputs, **say(inputs))
    assert output.objects == [[]]
    assert processor.post_process_grounding(output)[0].objects == []


@pytest.mark.parametrize(("threshold", "doubted"), [(0.0, False), (1.5, True)])
def test_a_region_below_the_threshold_is_taken_with_a_warning(processor, threshold, doubted):
    model = random_model(filtration_config={"score_threshold": threshold})
    inputs = processor(text="the ring", videos=random_clip(4))
    output = model.ground(**inputs, **say(inputs))
    assert len(output.objects[0]) >= 1
    assert any("nothing reached the score threshold 1.5" in warning for warning in output.warnings[0]) == doubted


def test_guidance_off_prompts_with_seg_alone(processor):
    model = random_model(box_guidance=False)
    assert model.model.region_proposer is None
    inputs = processor(text="the ring", videos=random_clip(4))
    (found,) = model.ground(**inputs, **say(inputs)).objects[0]
    assert found.box is None and found.frame_index == 0 and 0 <= found.score <= 1


def test_tracked_features_change_the_answer_and_are_optional(shared_model, processor):
    clip = random_clip(5)
    crops = [frame[:16, :16] for frame in clip] + [frame[10:30, 20:40] for frame in clip]
    without = processor(text="the ring", videos=clip)
    with_crops = processor(text="the ring", videos=clip, tracked_crops=[crops])
    tsf = shared_model.config.tsf_token_id
    assert (with_crops["input_ids"] == tsf).sum() == 4 and (without["input_ids"] == tsf).sum() == 0
    a = shared_model.ground(**without, **say(without)).objects[0][0]
    b = shared_model.ground(**with_crops, **say(with_crops)).objects[0][0]
    assert not torch.allclose(a.frame_scores, b.frame_scores)


def test_placeholders_must_fit_the_clip(shared_model, processor):
    inputs = processor(text="the ring", videos=random_clip(6))
    inputs["input_ids"] = inputs["input_ids"][:, 3:]
    inputs["attention_mask"] = inputs["attention_mask"][:, 3:]
    with pytest.raises(ValueError, match="placeholders"):
        shared_model.ground(**inputs, **say(inputs))


def test_masks_of_one_video_are_split_by_row():
    masks = FrameMasks(
        frame_index=3,
        objects=[2, 0],
        logits=torch.arange(2.0)[:, None, None],
        raw_logits=torch.arange(2.0)[:, None, None],
        score=torch.tensor([0.2, 0.9]),
        object_logits=torch.tensor([1.0, -1.0]),
        pointer=torch.zeros(2, 4),
    )
    split = masks.by_owner([(7, 1), (5, 0), (5, 3)])
    assert split.keys() == {5, 7}
    assert split[5].objects == [3] and split[5].score.tolist() == pytest.approx([0.2])
    assert split[7].objects == [1] and split[7].object_logits.tolist() == [-1.0]


def test_tensor_frames_walk_both_ways():
    frames = TensorFrames(torch.arange(5.0)[:, None, None, None])
    assert [int(f) for f in frames.frames(2)] == [2, 3, 4]
    assert [int(f) for f in frames.frames_reversed(2)] == [2, 1, 0]
    assert frames.read([4, 0]).flatten().tolist() == [4, 0]
