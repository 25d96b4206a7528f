"""Samples: words, frames, masks, boxes and crops belong together."""

import numpy as np
import pytest
import torch

from modeling_sparrow.training.records import RecordError, SkipRecordError, parse_record
from modeling_sparrow.training.samples import (
    IGNORED,
    FrameSettings,
    GroundingCollator,
    SampleBuilder,
    TrackedFeatureSettings,
    choose_crops,
    cut,
    evaluation_crops,
)
from sparrow_processing.pixel_streams import segmenter_pixels, spatial_pixels
from sparrow_processing.synthetic import SyntheticVideos

from ..tiny import IDS, SIZE, TOKENIZER, random_model, random_processor
from .conftest import object_content, write_clip

FRAMES = 12


@pytest.fixture
def clip(tmp_path):
    return write_clip(tmp_path / "clip", FRAMES)


def record_of(tmp_path, masks, **changes):
    content = {"video": "clip", "question": "where is the ring ?", "answer": "it is [SEG] .", "objects": None}
    content |= {"objects": [object_content(masks)]} | changes
    return parse_record(content, "here", tmp_path)


def builder(training=True, max_length=512, mask_frames=4, grounded_only=False, **tracked) -> SampleBuilder:
    settings = FrameSettings(mask_frames=mask_frames), TrackedFeatureSettings(**tracked)
    return SampleBuilder(random_processor(), max_length, *settings, training, grounded_only)


def test_masks_and_boxes_are_those_of_the_frames_shown(clip, tmp_path):
    frames, masks = clip
    build, record = builder(), record_of(tmp_path, masks)
    drawn = set()
    for seed in range(30):
        sample = build([record], np.random.default_rng(seed))
        shown = sample["frames"]["mask"]
        drawn |= set(shown)
        assert len(shown) == 4 and shown[0] == 0 and shown == sorted(set(shown))
        for place, index in enumerate(shown):
            pixels = segmenter_pixels(frames[index], SIZE)
            torch.testing.assert_close(sample["mask_pixel_values"][place], pixels)
            assert (sample["mask_labels"][0, place].numpy() == masks[index]).all()
            rows, columns = np.nonzero(masks[index])
            box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / [64, 48, 64, 48]
            assert sample["box_labels"][0, 0, place].tolist() == pytest.approx(box)
    assert drawn == set(range(FRAMES))


def test_frames_of_the_language_model_are_those_of_inference(clip, tmp_path):
    frames, masks = clip
    build, record = builder(), record_of(tmp_path, masks)
    sample = build([record], np.random.default_rng(0))
    inputs = random_processor()(text="x", videos=str(tmp_path / "clip"), task="ask")
    for name in ("spatial_pixel_values", "temporal_pixel_values"):
        torch.testing.assert_close(sample[name], inputs[name])
    for place, index in enumerate(sample["frames"]["language"]):
        pixels = spatial_pixels(frames[index], build.processor.spatial_size, build.processor.spatial_crop)
        torch.testing.assert_close(sample["spatial_pixel_values"][place], pixels)


def test_crops_lie_on_the_object_in_the_frames_they_claim(clip, tmp_path):
    frames, masks = clip
    record = record_of(tmp_path, masks)
    sample = builder(mode="train", crops=6)([record], np.random.default_rng(0))
    chosen = sample["frames"]["crops"][0]
    assert len(chosen) == 6 and len({crop.frame_index for crop in chosen}) == 6
    side = random_processor().spatial_size
    for crop, pixels in zip(chosen, sample["crops"][0], strict=True):
        mask, picture = masks[crop.frame_index], frames[crop.frame_index]
        x0, y0, x1, y1 = crop.box.astype(int)
        assert mask[y0:y1, x0:x1].all() and mask.sum() == (y1 - y0) * (x1 - x0)
        torch.testing.assert_close(pixels, spatial_pixels(picture[y0:y1, x0:x1], side, crop=False))
        assert pixels.flatten(1).std(dim=1).max() < 0.05  # the square has one colour


def test_each_object_that_is_meant_gets_crops(clip, tmp_path):
    _, masks = clip
    objects = [object_content(masks, 4), object_content(np.roll(masks, 3, axis=0), 9), object_content(masks, 5)]
    record = record_of(tmp_path, masks, objects=objects, targets=[[4, 9]])
    crops = choose_crops(
        record, TrackedFeatureSettings(mode="train", crops=8), (48, 64), np.random.default_rng(0), True
    )
    assert [crop.object_id for crop in crops] == [4] * 4 + [9] * 4


@pytest.mark.parametrize(
    ("mode", "training", "expected"),
    [
        ("none", True, 0),
        ("train", True, 4),
        ("train", False, 0),
        ("train_and_inference", True, 4),
        ("train_and_inference", False, 4),
    ],
)
def test_when_tracked_features_are_shown(mode, training, expected, clip, tmp_path):
    sample = builder(training, mode=mode, crops=4)([record_of(tmp_path, clip[1])], np.random.default_rng(0))
    assert len(sample["crops"][0]) == expected
    assert sample["input_ids"][0].count(IDS["tsf_token_id"]) == expected


def test_crops_at_inference_are_those_of_the_track():
    videos = SyntheticVideos("validation", size=1)
    settings = TrackedFeatureSettings(mode="train_and_inference", crops=5)
    crops = evaluation_crops(settings)(videos[0])
    box = videos[0]["boxes"][videos[0]["target_ids"][0], 0].astype(int)
    assert len(crops) == 5
    assert (crops[0] == videos[0]["frames"][0][box[1] : box[3], box[0] : box[2]]).all()


def test_noise_of_tracks(clip, tmp_path):
    _, masks = clip
    objects = [object_content(masks, 0), object_content(np.roll(masks, 3, axis=0), 1)]
    record = record_of(tmp_path, masks, objects=objects, targets=[[0]])

    def crops(**noise):
        settings = TrackedFeatureSettings(mode="train", crops=12, **noise)
        return choose_crops(record, settings, (48, 64), np.random.default_rng(0), training=True)

    exact = crops()
    assert {crop.object_id for crop in crops(identity_switches=0.5)} == {0, 1}
    jittered = crops(box_jitter=0.2)
    moved = np.array([a.box - b.box for a, b in zip(jittered, exact, strict=True)])
    assert 0.1 < moved.std() / 14 < 0.3
    assert crops(share=0.0) == []


def test_a_crop_is_never_empty():
    picture = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    assert cut(picture, np.array([2.0, 1.0, 4.0, 3.0])).shape == (2, 2, 3)
    for box in ([-9, -9, -5, -5], [20, 20, 30, 30], [3.2, 3.2, 3.1, 3.1]):
        assert cut(picture, np.array(box, dtype=np.float32)).size > 0


def test_labels_are_on_the_answer_alone(clip, tmp_path):
    sample = builder()([record_of(tmp_path, clip[1])], np.random.default_rng(0))
    ids, labels = sample["input_ids"][0], sample["labels"][0]
    learned = [label for label in labels if label != IGNORED]
    assert TOKENIZER.decode(learned) == "it is [BOX] [SEG] . <|end|>"
    assert labels[-len(learned) :] == ids[-len(learned) :] == learned
    prompt = builder().processor.prompt_ids("where is the ring ?", "ask", 4, 0)
    assert ids[: -len(learned)] == prompt  # what generation starts from


def test_long_answers_are_cut_and_long_questions_left_out(clip, tmp_path):
    long_answer = record_of(tmp_path, clip[1], answer="it is [SEG] " + "and the ring " * 200)
    build = builder(max_length=80)
    sample = build([long_answer], np.random.default_rng(0))
    assert len(sample["input_ids"][0]) == 80 and IDS["seg_token_id"] in sample["labels"][0]
    long_question = record_of(tmp_path, clip[1], question="the ring " * 100)
    late_token = record_of(tmp_path, clip[1], answer="and the ring " * 100 + "[SEG]")
    short = record_of(tmp_path, clip[1])
    sample = build([long_question, short, late_token], np.random.default_rng(0))
    assert len(sample["input_ids"]) == 1 and sample["num_skipped"] == 2
    for record in (long_question, late_token):
        with pytest.raises(SkipRecordError, match="longer than 80 tokens"):
            build([record], np.random.default_rng(0))


def test_boxes_without_masks_train_the_filter_alone(clip, tmp_path):
    record = record_of(tmp_path, clip[1], objects=[object_content(clip[1], with_masks=False)])
    sample = builder()([record], np.random.default_rng(0))
    assert (sample["mask_labels"] == -1).all() and not sample["box_labels"].isnan().any()
    batch = GroundingCollator(0)([sample])
    batch.pop("num_skipped")
    model = random_model()
    output = model.train()(**batch)
    assert output.mask_bce_loss == 0 and output.mask_dice_loss == 0 and output.filter_class_loss > 0
    counts = model.count_items(**batch)
    assert counts["mask_bce_loss"] == 0 and counts["filter_box_loss"] == 2  # two frames are searched
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_one_token_for_two_objects(clip, tmp_path):
    _, masks = clip
    objects = [object_content(masks, 0), object_content(np.roll(masks, 4, axis=0), 1)]
    sample = builder(False)([record_of(tmp_path, masks, objects=objects)], np.random.default_rng(0))
    assert sample["mask_labels"].shape[0] == 1 and sample["box_labels"].shape[:2] == (1, 2)
    for place, index in enumerate(sample["frames"]["mask"]):
        both = masks[index] | np.roll(masks, 4, axis=0)[index]
        assert (sample["mask_labels"][0, place].numpy() == both).all()


def test_frames_that_are_annotated_for_all_objects(clip, tmp_path):
    _, masks = clip
    sparse = object_content(masks, 0)
    sparse["frames"] = [sparse["frames"][index] for index in (3, 7, 9)]
    record = record_of(tmp_path, masks, objects=[sparse, object_content(masks, 1)], targets=[[0, 1]])
    assert builder()([record], np.random.default_rng(0))["frames"]["mask"] == [3, 7, 9]
    apart = object_content(masks, 1)
    apart["frames"] = apart["frames"][:2]
    record = record_of(tmp_path, masks, objects=[sparse, apart], targets=[[0, 1]])
    with pytest.raises(SkipRecordError, match="no frame is annotated for all"):
        builder()([record], np.random.default_rng(0))


def test_a_frame_beyond_the_video(clip, tmp_path):
    late = object_content(clip[1])
    late["frames"][-1]["index"] = 40
    with pytest.raises(RecordError, match="frame 40 is annotated, but the video has only 12"):
        builder(mask_frames=FRAMES)([record_of(tmp_path, clip[1], objects=[late])], np.random.default_rng(0))


def test_questions_that_ground_nothing(clip, tmp_path):
    nothing = record_of(tmp_path, clip[1], answer="there is no such object .")
    sample = builder()([nothing], np.random.default_rng(0))
    assert sample["mask_pixel_values"] is None and sample["crops"][0].shape[0] == 0
    with pytest.raises(SkipRecordError, match="grounds anything"):
        builder(grounded_only=True)([nothing], np.random.default_rng(0))
    both = builder(grounded_only=True)([nothing, record_of(tmp_path, clip[1])], np.random.default_rng(0))
    assert len(both["input_ids"]) == 1


def test_a_batch_of_unlike_samples_trains_as_its_parts(clip, tmp_path):
    """Two questions about one clip, one without an object, one with crops: the losses are those of single samples."""
    _, masks = clip
    first = [record_of(tmp_path, masks), record_of(tmp_path, masks, question="the ring ?", answer="it is [SEG]")]
    nothing = record_of(tmp_path, masks, answer="there is no such object .")
    short = record_of(tmp_path, masks, objects=[{"id": 0, "frames": object_content(masks)["frames"][:2]}])
    plain, crops = builder(False), builder(False, mode="train_and_inference", crops=3)
    rng = np.random.default_rng(0)
    samples = [plain(first, rng), plain([nothing], rng), crops([short], rng)]
    model, collate = random_model(), GroundingCollator(TOKENIZER.pad_token_id)
    batches = [collate(group) for group in (samples, *([sample] for sample in samples))]
    for batch in batches:
        batch.pop("num_skipped")
    counts = {name: max(count, 1) for name, count in model.count_items(**batches[0]).items()}
    with torch.no_grad():
        whole, *parts = [model(**batch, num_items=counts) for batch in batches]
    assert batches[0]["video_index"].tolist() == [0, 0, 1, 2]
    assert batches[0]["num_mask_frames"].tolist() == [4, 1, 2]
    for name in ("ce_loss", "mask_bce_loss", "mask_dice_loss", "filter_class_loss", "filter_box_loss"):
        single = sum(part[name].item() for part in parts if part.get(name) is not None)
        assert whole[name].item() == pytest.approx(single, rel=1e-4, abs=1e-6), name


def test_global_random_state_is_left_alone(clip, tmp_path):
    np.random.seed(3)
    torch.manual_seed(3)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    builder(mode="train", box_jitter=0.1)([record_of(tmp_path, clip[1])], np.random.default_rng(0))
    assert (np.random.get_state()[1] == states[0]).all() and torch.equal(torch.get_rng_state(), states[1])
