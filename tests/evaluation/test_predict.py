"""What the predictor asks, what it writes, and how it treats videos that fail."""

import shutil

import numpy as np
import pytest
from PIL import Image

from modeling_sparrow.cli import load_model
from modeling_sparrow.evaluation import (
    MevisDataset,
    RefDavis17Dataset,
    VideoGcgDataset,
    VidStgDataset,
)
from modeling_sparrow.evaluation.files import read_json, read_mask, write_mask
from modeling_sparrow.evaluation.frames import open_frames, select_frames
from modeling_sparrow.evaluation.predict import Grounder, predict_expressions, predict_video_gcg, predict_vidstg
from modeling_sparrow.evaluation.prompts import conversation_prompt
from modeling_sparrow.evaluation.vidstg import MOMENT_TEMPORAL_PROTOCOL, TUBEDETR_PROTOCOL, VidStgProtocol
from sparrow_processing.errors import VideoReadError
from sparrow_processing.processing_sparrow import TASK_PROMPTS
from sparrow_processing.video_io import open_video

from ..processing.clip_factory import number_of, numbered_picture, write_clip
from ..tiny import random_clip
from .answering import save_checkpoint
from .fake_data import SIZE


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Model and processor, which answer with one object."""
    return load_model(str(save_checkpoint(tmp_path_factory.mktemp("one"), "it is [BOX] [SEG] .")), "cpu")


@pytest.fixture(scope="module")
def grounder(loaded):
    return Grounder(*loaded, max_new_tokens=8)


def make_grounder(folder, answer, seed=0):
    return Grounder(*load_model(str(save_checkpoint(folder, answer, seed)), "cpu"), max_new_tokens=16)


class Recorder:
    """A grounder that notes what it is asked."""

    def __init__(self, grounder):
        self.grounder, self.asked = grounder, []

    def __call__(self, video, prompts):
        self.asked.append((len(video), list(prompts)))
        return self.grounder(video, prompts)


# ---------------------------------------------------------------------- frames


def write_pictures(folder, count, size=(48, 64)):
    folder.mkdir(parents=True)
    paths = [folder / f"{index:05d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(numbered_picture(index, size[1], size[0])).save(path)
    return paths


def test_open_frames_takes_the_listed_files(tmp_path):
    paths = write_pictures(tmp_path / "frames", 6)
    video = open_frames([paths[1], paths[4], paths[5]])
    assert [number_of(frame) for frame in video] == [1, 4, 5]
    assert (video.height, video.width, len(video)) == (48, 64, 3)
    assert [number_of(frame) for frame in video.frames_reversed(1)] == [4, 1]


@pytest.mark.parametrize("damage", ["missing", "broken", "text", "size"])
def test_open_frames_names_the_bad_file(tmp_path, damage):
    paths = write_pictures(tmp_path / "frames", 3)
    if damage == "missing":
        paths[1].unlink()
    elif damage == "broken":
        paths[1].write_bytes(paths[1].read_bytes()[:100])
    elif damage == "text":
        paths[1].write_text("no picture")
    else:
        Image.fromarray(numbered_picture(1, 64, 50)).save(paths[1])
    with pytest.raises(VideoReadError, match=r"00001\.png: "):
        open_frames(paths)


def test_select_frames_by_number_and_in_blocks(tmp_path):
    video = open_video(write_clip(tmp_path / "clip.mp4", count=60, gop=12))
    numbers = list(range(3, 60, 3))  # more than one block
    clip = select_frames(video, numbers, (48, 64))
    assert [number_of(frame) for frame in clip] == numbers
    assert [number_of(frame) for frame in clip.read([2, 0, 18])] == [9, 3, 57]
    assert clip.timestamps == pytest.approx(np.arange(19) * 3 / 25)
    small = select_frames(video, [7], (24, 32))
    assert small.read([0]).shape == (1, 24, 32, 3) and number_of(small.read([0])[0]) == 7
    with pytest.raises(ValueError, match=r"clip\.mp4: has 60 frames, frame 60 is needed"):
        select_frames(video, [3, 60], (48, 64))


# ---------------------------------------------------------------------- answers


def test_answers_do_not_depend_on_how_queries_are_grouped(loaded):
    video = open_video(random_clip(5, *SIZE))
    prompts = ["the red ring", "the small blue star moving left", "what is it ?"]
    grouped = list(Grounder(*loaded, queries_per_pass=3, max_new_tokens=8)(video, prompts))
    single = list(Grounder(*loaded, queries_per_pass=1, max_new_tokens=8)(video, prompts))
    assert [answer.text for answer in grouped] == ["it is [BOX] [SEG] ."] * 3
    for one, other in zip(grouped, single, strict=True):
        masks = [np.stack([answer.mask(0, frame) for frame in range(5)]) for answer in (one, other)]
        assert masks[0].any() and (masks[0] != masks[1]).mean() < 1e-3


def test_mark_up_is_kept_and_objects_follow_the_tokens(tmp_path, loaded):
    grounder = make_grounder(tmp_path, "<p> a ring </p> [BOX] [SEG] .")
    (answer,) = grounder(open_video(random_clip(2, *SIZE)), ["describe"])
    assert answer.text == "<p> a ring </p> [BOX] [SEG] ." and [len(tracks) for tracks in answer.objects] == [1]
    (silent,) = make_grounder(tmp_path / "none", "there is no such object .")(
        open_video(random_clip(2, *SIZE)), ["the red ring"]
    )
    assert silent.objects == [] and silent.mask(0, 1).shape == SIZE and not silent.mask(-1, 0).any()
    # Two tokens, only the second of which has an object.
    ids = loaded[1].tokenizer.encode("[BOX] [SEG] [BOX] [SEG]", add_special_tokens=False)
    (track,) = answer.objects[0]
    result = type("Result", (), {"objects": [track], "size": SIZE})
    both = grounder._answer(ids, [3], result)
    assert both.objects == [[], [track]] and not both.mask(0, 0).any()


@pytest.mark.parametrize("setting", [{"queries_per_pass": 0}, {"max_new_tokens": 0}])
def test_grounder_checks_its_settings(loaded, setting):
    with pytest.raises(ValueError, match="at least 1"):
        Grounder(*loaded, **setting)


# ---------------------------------------------------------------------- expressions


def test_expressions_are_asked_by_video_and_written_as_masks(grounder, mevis_root, tmp_path):
    dataset, recorder = MevisDataset(mevis_root), Recorder(grounder)
    summary = predict_expressions(recorder, dataset, tmp_path / "pred")
    assert (summary.predicted, summary.already_done, summary.failures) == (4, 0, [])
    prompts = [
        "What is the square moving right in this video? Please respond with segmentation masks.",
        "What is both squares in this video? Please respond with segmentation masks.",
    ]
    assert recorder.asked == [(3, prompts)] * 2
    for sample in dataset:
        (answer,) = grounder(open_frames(sample.frame_paths), [sample.prompt])
        for frame, path in enumerate(sample.prediction_paths(tmp_path / "pred")):
            assert (read_mask(path, SIZE) != answer.mask(0, frame)).mean() < 1e-2
            with Image.open(path) as image:
                assert image.mode == "L" and set(np.unique(image)) <= {0, 255}
    files = [path for path in (tmp_path / "pred").rglob("*") if path.is_file()]
    assert len(files) == 12  # nothing else lies among the predictions


def test_only_what_is_missing_is_predicted_again(grounder, mevis_root, tmp_path):
    dataset, predictions = MevisDataset(mevis_root), tmp_path / "pred"
    predict_expressions(grounder, dataset, predictions)
    (predictions / "bbb" / "1" / "00002.png").unlink()
    write_mask(predictions / "aaa" / "0" / "00000.png", np.ones(SIZE))  # complete: not touched
    recorder = Recorder(grounder)
    summary = predict_expressions(recorder, dataset, predictions)
    assert (summary.predicted, summary.already_done) == (1, 3)
    assert [len(prompts) for _, prompts in recorder.asked] == [1]
    assert read_mask(predictions / "aaa" / "0" / "00000.png").all()
    assert (predictions / "bbb" / "1" / "00002.png").is_file()


def test_a_failing_video_is_named_and_the_others_go_on(grounder, mevis_root, tmp_path, caplog):
    (mevis_root / "valid_u" / "JPEGImages" / "aaa" / "00001.jpg").unlink()
    dataset = MevisDataset(mevis_root)
    summary = predict_expressions(grounder, dataset, tmp_path / "pred")
    assert summary.predicted == 2 and len(summary.failures) == 1
    assert summary.failures[0].startswith("aaa: ") and "00001.jpg: No such file" in summary.failures[0]
    assert summary.failures[0] in caplog.text
    assert not (tmp_path / "pred" / "aaa").exists() and (tmp_path / "pred" / "bbb").is_dir()
    with pytest.raises(VideoReadError, match=r"00001\.jpg"):
        predict_expressions(grounder, dataset, tmp_path / "other", fail_fast=True)


def test_errors_of_the_program_are_not_taken_for_bad_videos(mevis_root, tmp_path):
    def broken(video, prompts):
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        predict_expressions(broken, MevisDataset(mevis_root), tmp_path / "pred")


def test_chunks_are_answered_on_their_own(grounder, davis_root, tmp_path):
    dataset = RefDavis17Dataset(davis_root, mask_file=davis_root / "valid" / "mask_dict.json")
    recorder = Recorder(grounder)
    summary = predict_expressions(recorder, dataset, tmp_path / "pred", chunk_frames=3)
    assert [(length, len(prompts)) for length, prompts in recorder.asked] == [(3, 8), (1, 8)]
    assert summary.predicted == 8
    sample = dataset[0]
    assert all(path.is_file() for path in sample.prediction_paths(tmp_path / "pred"))
    # The last frame is a clip of its own.
    (alone,) = grounder(open_frames(sample.frame_paths[3:]), [sample.prompt])
    last = read_mask(sample.prediction_paths(tmp_path / "pred")[3], SIZE)
    assert (last != alone.mask(0, 0)).mean() < 1e-2


# ---------------------------------------------------------------------- VidSTG


@pytest.fixture
def vidstg_video(vidstg_root):
    path = vidstg_root / "vidstg" / "video" / "0" / "clip.mp4"
    path.parent.mkdir(parents=True)
    return write_clip(path, count=100, width=320, height=240, rate=10, codec_options={"preset": "ultrafast"})


def test_vidstg_boxes_on_the_sampled_frames(grounder, vidstg_root, vidstg_video, tmp_path):
    dataset, asked = VidStgDataset(vidstg_root), []

    def record(video, prompts):
        asked.append(([number_of(frame) for frame in video], (video.height, video.width), list(prompts)))
        return grounder(video, prompts)

    summary = predict_vidstg(record, dataset, tmp_path / "pred")
    prompt = "What does the child hold? Please respond with segmentation masks."
    assert summary.predicted == 1 and asked == [([20, 30, 40, 50], (224, 298), [prompt])]
    content = read_json(tmp_path / "pred" / "0.json")
    assert list(content["boxes"]) == ["20", "30", "40", "50"] and content["span"] is None
    boxes = np.array([box for box in content["boxes"].values() if box])
    assert len(boxes) and (boxes >= 0).all() and (boxes <= [297, 223, 297, 223]).all()
    assert (boxes[:, :2] <= boxes[:, 2:]).all()
    assert predict_vidstg(grounder, dataset, tmp_path / "pred").already_done == 1


def test_vidstg_sentences_about_the_same_frames_share_a_pass(grounder, vidstg_root, vidstg_video, tmp_path):
    path = vidstg_root / "processed" / "vidstg" / "vidstg_annotations" / "test.json"
    text = path.read_text()
    path.write_text(text.replace('"qtype": "declarative"', '"qtype": "interrogative"'))
    recorder = Recorder(grounder)
    assert predict_vidstg(recorder, VidStgDataset(vidstg_root), tmp_path / "pred").predicted == 2
    assert [(length, len(prompts)) for length, prompts in recorder.asked] == [(4, 2)]


@pytest.mark.parametrize("host, place", [("sparrow", 0), ("videoglamm", 1)])
def test_vidstg_takes_the_object_of_the_host_rules(vidstg_root, vidstg_video, tmp_path, host, place):
    masks = np.zeros((2, 224, 298), bool)
    masks[0, 10:30, 20:60] = True
    masks[1, 100:150, 200:240] = True
    masks[:, 0, 0] = True  # a component of one pixel is dropped

    class Answer:
        text = ""

        def mask(self, token, frame):
            return masks[token]

    dataset = VidStgDataset(vidstg_root, host=host)
    predict_vidstg(lambda video, prompts: [Answer()], dataset, tmp_path)
    expected = [[20, 10, 59, 29], [200, 100, 239, 149]][place]
    assert read_json(tmp_path / "0.json")["boxes"]["20"] == expected


def test_vidstg_bad_videos(grounder, vidstg_root, tmp_path):
    dataset = VidStgDataset(vidstg_root)
    path = vidstg_root / "vidstg" / "video" / "0" / "clip.mp4"
    path.parent.mkdir(parents=True)
    for expected in ("No such file", "64 x 48 pixels", "has 30 frames, frame 50 is needed"):
        summary = predict_vidstg(grounder, dataset, tmp_path / "pred")
        assert summary.predicted == 0 and len(summary.failures) == 1
        if expected == "No such file":
            assert expected in summary.failures[0]
            write_clip(path, count=100)
        elif expected == "64 x 48 pixels":
            assert "48 x 64 pixels (height x width), annotated as 240 x 320" in summary.failures[0]
            write_clip(path, count=30, width=320, height=240, codec_options={"preset": "ultrafast"})
        else:
            assert expected in summary.failures[0]
        assert "clip.mp4" in summary.failures[0]


def test_spans_in_the_unit_of_the_protocol():
    frames = [0, 2, 4, 6, 8]
    assert MOMENT_TEMPORAL_PROTOCOL.read_span("it is [SEG] frames : ( 1 , 3 )", frames) == (1, 3)
    assert TUBEDETR_PROTOCOL.read_span("in frames:(1,3).", frames) == (2, 7)
    assert TUBEDETR_PROTOCOL.read_span("in frames:(3,40).", frames) == (6, 9)
    assert TUBEDETR_PROTOCOL.read_span("always", frames) is None
    moment = VidStgProtocol("moment", 1, 40, temporal=False, shrunk=True, sampled_time=True)
    assert moment.read_span("in frames:(1,3).", frames) is None
    assert moment.frame_size(240, 320) == (224, 298) and TUBEDETR_PROTOCOL.frame_size(240, 320) == (240, 320)


# ---------------------------------------------------------------------- VideoGCG


@pytest.fixture
def gcg_pictures(gcg_root):
    write_pictures(gcg_root / "ytvis" / "vos" / "train" / "JPEGImages" / "seq", 2, SIZE)
    for path in (gcg_root / "ytvis" / "vos" / "train" / "JPEGImages" / "seq").iterdir():
        path.rename(path.with_suffix(".jpg"))
    return gcg_root


def test_conversations_are_written_in_the_official_form(gcg_pictures, tmp_path):
    grounder = make_grounder(tmp_path / "model", "it is <p> a red ring </p> [BOX] [SEG] .")
    dataset = VideoGcgDataset(gcg_pictures)
    left_over = tmp_path / "pred" / dataset[0].name / "pred_masks_7" / "mask_0.png"
    write_mask(left_over, np.ones(SIZE))  # of a run that was interrupted before res.json
    recorder = Recorder(grounder)
    assert predict_video_gcg(recorder, dataset, tmp_path / "pred").predicted == 3
    assert recorder.asked == [(2, [conversation_prompt()]), (3, [conversation_prompt()]), (2, [conversation_prompt()])]
    content = read_json(tmp_path / "pred" / dataset[0].name / "res.json")
    assert content["pred_text"] == "it is <p> a red ring </p> [BOX] [SEG] ."
    assert content["pred_text_cleaned"] == "it is a red ring ." and content["pred_phrases"] == ["a red ring"]
    assert content["gt_phrases"] == ["dog", "cats"]
    folder = tmp_path / "pred" / dataset[0].name
    assert sorted(path.name for path in folder.iterdir()) == ["pred_masks_0", "res.json"]
    assert sorted(path.name for path in (folder / "pred_masks_0").iterdir()) == ["mask_0.png", "mask_1.png"]
    assert predict_video_gcg(grounder, dataset, tmp_path / "pred").already_done == 3
    assert conversation_prompt() == TASK_PROMPTS["describe"]


def test_a_missing_picture_of_a_conversation_is_named(grounder, gcg_pictures, tmp_path):
    shutil.rmtree(gcg_pictures / "ytvis")
    summary = predict_video_gcg(grounder, VideoGcgDataset(gcg_pictures), tmp_path / "pred")
    assert summary.predicted == 2 and len(summary.failures) == 1 and "00000.jpg: No such file" in summary.failures[0]
