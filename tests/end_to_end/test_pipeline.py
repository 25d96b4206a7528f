"""`pipeline("video-grounding")` from a folder on disk to results."""

import importlib
import warnings

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, GenerationConfig, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

import modeling_sparrow
from modeling_sparrow import (
    DEFAULT_CHECKPOINT,
    GroundingResult,
    SparrowConfig,
    SparrowForVideoGrounding,
    SparrowProcessor,
    VideoGroundingPipeline,
    register,
    registration,
)
from sparrow_processing import open_video
from sparrow_processing.errors import PromptError, VideoReadError

from ..byte_tokenizer import byte_tokenizer
from ..processing.clip_factory import write_clip
from ..tiny import random_clip, random_config, say
from .conftest import NUM_FRAMES


@pytest.fixture(scope="module")
def ground(answering):
    return pipeline("video-grounding", model=str(answering))


@pytest.fixture(scope="module")
def expected(ground, clip) -> GroundingResult:
    return ground(str(clip), "the ring")


def same_result(first: GroundingResult, second: GroundingResult):
    for name in ("query", "text", "size", "sampled_frames", "time_span"):
        assert getattr(first, name) == getattr(second, name), name
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert (a.id, a.phrase, a.span, a.rles) == (b.id, b.phrase, b.span, b.rles)
        assert a.score == pytest.approx(b.score, abs=1e-5)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)


def test_a_file_and_a_query(expected, clip):
    assert type(expected) is GroundingResult and expected.path == str(clip) and expected.query == "the ring"
    assert expected.text == "it is a ring." and expected.num_frames == NUM_FRAMES and expected.size == (48, 64)
    (track,) = expected
    assert (track.phrase, track.span) == ("a ring", (6, 12)) and track.visible.any()
    assert set(expected.timings) >= {"generate", "locate", "propagate"}


def test_the_pipeline_is_processor_model_and_post_processing(expected, answering, clip):
    model, processor = AutoModel.from_pretrained(answering).eval(), AutoProcessor.from_pretrained(answering)
    assert type(model) is SparrowForVideoGrounding and type(processor) is SparrowProcessor
    inputs = processor(text="the ring", videos=clip)
    (result,) = processor.post_process_grounding(model.ground(**inputs))
    same_result(result, expected)


@pytest.mark.parametrize("kind", ["path", "bytes", "array", "tensor-like list", "pictures", "reader", "dict"])
def test_every_kind_of_video(kind, ground, expected, clip):
    frames = np.stack(list(open_video(clip)))
    video = {
        "path": clip,
        "bytes": clip.read_bytes(),
        "array": frames,
        "tensor-like list": list(frames),
        "pictures": [Image.fromarray(frame) for frame in frames],
        "reader": open_video(clip),
        "dict": {"video": str(clip), "text": "the ring"},
    }[kind]
    same_result(ground(video) if kind == "dict" else ground(video, "the ring"), expected)


def test_a_folder_of_pictures_and_a_still(ground, tmp_path, clip):
    for number, frame in enumerate(open_video(clip)):
        Image.fromarray(frame).save(tmp_path / f"frame{number}.png")
    assert ground(str(tmp_path), "the ring").num_frames == NUM_FRAMES
    assert ground(str(tmp_path / "frame0.png"), "the ring").num_frames == 1


def test_several_queries_about_one_video(ground, expected, clip):
    results = ground(str(clip), ["the ring", "the star"])
    assert [result.query for result in results] == ["the ring", "the star"]
    same_result(results[0], expected)
    (alone,) = ground(str(clip), ["the star"])  # a list of one query gives a list
    same_result(alone, results[1])


def test_several_videos(ground, expected, clip, tmp_path):
    other = write_clip(tmp_path / "other.mp4", count=3, width=32, height=64)
    results = ground([str(clip), str(other)], "the ring")
    assert [result.path for result in results] == [str(clip), str(other)] and results[1].size == (64, 32)
    same_result(results[0], expected)
    own = ground([str(clip), random_clip(2)], ["the ring", "the star"])
    assert [result.query for result in own] == ["the ring", "the star"] and own[1].path is None
    same_result(own[0], expected)
    (first, second), third = ground([str(clip), str(other)], [["the ring", "the star"], "a box"])
    assert [result.query for result in (first, second, third)] == ["the ring", "the star", "a box"]
    dicts = ground([{"video": str(clip), "text": "the ring"}, {"video": str(other), "text": "a box"}])
    same_result(dicts[0], expected)
    same_result(dicts[1], third)


def test_queries_that_do_not_fit_the_videos(ground, clip):
    with pytest.raises(ValueError, match="3 queries were given for 2 videos"):
        ground([str(clip), str(clip)], ["a", "b", "c"])
    with pytest.raises(PromptError, match="text must be"):
        ground(str(clip))
    with pytest.raises(VideoReadError):
        ground("missing.mp4", "the ring")
    with pytest.raises(VideoReadError):
        ground([], "the ring")


def test_task_max_frames_and_generation(ground, clip, answering):
    described = ground(str(clip), task="describe")
    assert described.text == "it is a ring." and described[0].phrase == "a ring"
    assert ground(str(clip), "the ring", task="box", max_frames=2).num_frames == 2
    short = ground(str(clip), "the ring", max_new_tokens=2)
    assert short.text == "it is" and short.objects == []
    with pytest.raises(PromptError, match="Unknown task"):
        ground(str(clip), "the ring", task="guess")
    preset = pipeline("video-grounding", model=str(answering), max_frames=2, max_new_tokens=2)
    assert (preset(str(clip), "the ring").num_frames, preset(str(clip), "the ring").text) == (2, "it is")
    assert list(preset(str(clip), "the ring", stream=True)) == []
    frames = preset(str(clip), "the ring", stream=True, max_new_tokens=9)
    assert sorted(step["frame"] for step in frames) == [0, 1]


def test_answers_are_not_cut_after_twenty_tokens(shared_model, processor):
    """128 is the default of `ground`, 20 that of `generate`."""
    inputs = processor(text="the ring", videos=random_clip(2))
    endless = {"logits_processor": say(inputs, "a ring and")["logits_processor"]}
    length = inputs["input_ids"].shape[1]
    for options, expected in [
        ({}, 128),
        ({"max_new_tokens": 5}, 5),
        ({"max_length": length + 4}, 4),
        ({"generation_config": GenerationConfig(max_new_tokens=3)}, 3),
    ]:
        assert shared_model.ground(**inputs, **endless, **options).sequences.shape == (1, expected)


def test_stream_gives_the_frames_of_the_result(ground, clip):
    queries = ["the ring", "the star"]
    results = dict(zip(queries, ground(str(clip), queries), strict=True))
    seen = set()
    for step in ground(str(clip), queries, stream=True):
        result = results[step["query"]]
        assert step["time"] == pytest.approx(result.timestamps[step["frame"]])
        for found in step["objects"]:
            track, frame = result[found["id"]], step["frame"]
            seen.add((step["query"], found["id"], frame))
            assert found["mask"].dtype == np.bool_ and found["visible"] == track.visible[frame]
            np.testing.assert_array_equal(found["mask"], track.mask(frame))
            assert found["score"] == pytest.approx(track.scores[frame], abs=1e-5)
            assert found["box"] == (track.boxes[frame].tolist() if found["visible"] else None)
    expected = {(query, track.id, t) for query in queries for track in results[query] for t in range(NUM_FRAMES)}
    assert seen == expected


def test_stream_begins_before_the_video_is_done(ground, clip):
    steps = ground(str(clip), "the ring", stream=True)
    first = next(steps)
    assert first["objects"] and 0 <= first["frame"] < NUM_FRAMES
    steps.close()
    with pytest.raises(ValueError, match="one video"):
        ground([str(clip), str(clip)], "the ring", stream=True)


def test_32_streams_at_the_same_time_do_not_mix(ground, clip):
    """One user's run goes on unchanged beside another's, which is given up in the middle."""

    def arrays(steps):
        return [(step["frame"], [found["mask"].tolist() for found in step["objects"]]) for step in steps]

    alone = arrays(ground(str(clip), "the ring", stream=True))
    one, other = ground(str(clip), "the ring", stream=True), ground(random_clip(5), "the star", stream=True)
    mixed = []
    for step in one:
        mixed.append(step)
        if len(mixed) <= 3:
            next(other)
        else:
            other.close()
    assert arrays(mixed) == alone


def test_save_and_load(ground, expected, clip, tmp_path):
    ground.save_pretrained(tmp_path)
    again = pipeline("video-grounding", model=str(tmp_path))
    assert type(again) is VideoGroundingPipeline
    same_result(again(str(clip), "the ring"), expected)


def test_given_model_and_processor(shared_model, processor):
    ground = pipeline("video-grounding", model=shared_model, processor=processor)
    assert ground(random_clip(2), "the ring", max_new_tokens=2).num_frames == 2


def test_wrong_processor(shared_model):
    for wrong in (None, byte_tokenizer()):
        with pytest.raises(ValueError, match="needs a SparrowProcessor"):
            VideoGroundingPipeline(model=shared_model, processor=wrong)
    config = random_config(video_token_id=6, tsf_token_id=5)
    tokens = ["<pad>", "<unk>", "<|end|>", "[BOX]", "[SEG]", "<tsf>", "<video>"]
    other = SparrowProcessor.from_config(config, byte_tokenizer(tokens))
    with pytest.raises(ValueError, match="<video>: processor 6, model 5"):
        pipeline("video-grounding", model=shared_model, processor=other)


# --- registration ---


def test_everything_is_registered(checkpoint):
    task = PIPELINE_REGISTRY.check_task("video-grounding")[1]
    assert task["impl"] is VideoGroundingPipeline and task["default"]["model"][0] == DEFAULT_CHECKPOINT
    assert type(AutoConfig.from_pretrained(checkpoint)) is SparrowConfig
    assert AutoConfig.for_model("sparrow").model_type == "sparrow"


def test_registering_again_changes_nothing(caplog, recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register()
        importlib.reload(registration)
        importlib.reload(modeling_sparrow)
        register()
    assert not caplog.records and not recwarn.list
    task = PIPELINE_REGISTRY.check_task("video-grounding")[1]
    assert task["impl"] is VideoGroundingPipeline
    assert modeling_sparrow.SparrowForVideoGrounding is SparrowForVideoGrounding
