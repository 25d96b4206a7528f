"""A request without a page: what it costs, what it keeps, what it writes."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from modeling_sparrow.cli import load_model
from sparrow_processing.errors import LimitExceededError, PromptError, VideoGroundingError, VideoReadError
from sparrow_processing.exports import read_coco, read_csv, read_json, read_pngs
from sparrow_processing.processing_sparrow import MaskFrameStream
from sparrow_processing.video_io import open_video
from sparrow_processing.video_sources import VideoLimits

pytest.importorskip("gradio", reason="needs gradio: pip install '.[demo]'")

from sparrow_space import fragments
from sparrow_space.grounding import Grounder, StreamTail, moved
from sparrow_space.interface import summary
from sparrow_space.pictures import best_rejected, pipeline_steps
from sparrow_space.session import DemoLimits, Session, read_queries, visitor_folder

from ..end_to_end.conftest import NUM_FRAMES
from ..evaluation.answering import save_checkpoint

LIMITS = DemoLimits()


@pytest.fixture(scope="module")
def grounder(answering):
    return Grounder(*load_model(str(answering), "cpu"))


def new_session(tmp_path, clip, queries="the red ring", task="refer", limits=LIMITS) -> Session:
    return Session(tmp_path / "visitor", str(clip), queries, task, limits)


@pytest.fixture
def session(tmp_path, clip, grounder):
    session = new_session(tmp_path, clip, "the red ring\nthe triangle")
    session.progress = list(session.ground(grounder))
    return session


# --- what comes in ---


def test_a_query_per_line():
    assert read_queries(" the ring \n\n the star\n", "refer", 8) == ["the ring", "the star"]
    assert read_queries("whatever", "describe", 8) == []
    for text in ("", " \n ", "\n".join("abc"), "x" * 5000, "a\0b"):
        with pytest.raises(PromptError):
            read_queries(text, "refer", 2)


def test_a_broken_file_is_named_without_its_path(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_text("not a video")
    with pytest.raises(VideoReadError) as error:
        new_session(tmp_path, broken)
    assert str(error.value).startswith("This file cannot be read as a video") and str(tmp_path) not in str(error.value)
    assert not list((tmp_path / "visitor").iterdir())
    with pytest.raises(VideoReadError, match="Choose a video"):
        Session(tmp_path / "visitor", None, "the ring", "refer", LIMITS)


def test_a_long_clip_is_refused_with_all_limits(tmp_path, clip):
    with pytest.raises(LimitExceededError, match=r"3 frames .* and 4096 pixels") as error:
        new_session(tmp_path, clip, limits=DemoLimits(video=VideoLimits(max_frames=3, max_side=4096)))
    assert "VideoLimits" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_folders_of_visitors(tmp_path):
    assert visitor_folder(tmp_path, "../../etc").parent == tmp_path / "requests"
    assert visitor_folder(tmp_path, "a") != visitor_folder(tmp_path, "b")


def test_a_new_request_deletes_the_one_before(tmp_path, clip):
    first = new_session(tmp_path, clip)
    second = new_session(tmp_path, clip)
    assert not first.folder.exists() and second.folder.exists()
    second.close()
    assert not second.folder.exists()


# --- grounding ---


def test_objects_of_all_answers_are_numbered_through(session):
    assert [track.id for track in session.tracks] == [0, 1] and session.places == [(0, 0), (1, 0)]
    assert [result.query for result in session.results] == ["the red ring", "the triangle"]
    assert [progress.done for progress in session.progress][-1] == NUM_FRAMES == session.progress[0].total
    assert session.frames_done == set(range(NUM_FRAMES)) and not session.stopped
    assert summary(session, {}, None).startswith("Done: 2 objects in 7 frames")


def test_stopping_keeps_text_and_frames(tmp_path, clip, grounder):
    session, done = new_session(tmp_path, clip), 0
    for progress in session.ground(grounder):
        done = progress.done
        if done == 2:
            session.stop.set()
    assert done == 2 and session.stopped and len(session.frames_done) == 2
    result = session.results[0]
    assert (
        result.text == "it is a ring." and result[0].span == (6, 12) and "Stopped after 2 of 7" in result.warnings[-1]
    )
    reached = [session.results[0][0].scores[frame] > 0 for frame in range(NUM_FRAMES)]
    assert {frame for frame in range(NUM_FRAMES) if reached[frame]} <= session.frames_done
    assert fragments.frame_states(session, result[0]).count("not computed") == NUM_FRAMES - 2
    assert session.overlay_video().stat().st_size > 0


def test_the_clock_stops_a_run_too(tmp_path, clip, grounder):
    session = new_session(tmp_path, clip, limits=dataclasses.replace(LIMITS, max_seconds=0.0))
    assert list(session.ground(grounder)) == [] and session.stopped and session.results[0].text == "it is a ring."


def test_a_run_ends_when_its_visitor_has_left(tmp_path, clip, grounder):
    session = new_session(tmp_path, clip)
    steps = session.ground(grounder)
    next(steps)
    session.close()
    assert list(steps) == [] and session.stopped


def test_answer_without_an_object_shows_the_best_region(tmp_path, clip):
    model = save_checkpoint(tmp_path, "there is no such object .")
    grounder = Grounder(*load_model(str(model), "cpu"))
    session = new_session(tmp_path, clip, "the cow")
    assert list(session.ground(grounder)) == [] and session.tracks == []
    sentence, picture = best_rejected(session, grounder)[0]
    assert "Nothing in the video matched “the cow”" in sentence and "objectness" in sentence
    assert picture.url.startswith("data:image/jpeg")
    assert summary(session, {0: sentence}, None).startswith("Nothing matched")
    assert "No objects" in fragments.objects_table(session) and session.overlay_video().exists()
    assert [title for title, _, _ in pipeline_steps(session, grounder)] == ["Sampled frames"]


def test_rejected_boxes_are_told_with_their_score(tmp_path, clip, answering):
    grounder = Grounder(*load_model(str(answering), "cpu"))
    grounder.model.config.filtration_config.fallback_threshold = 1.0
    session = new_session(tmp_path, clip, "the cow")
    list(session.ground(grounder))
    assert session.tracks == []
    sentence, picture = best_rejected(session, grounder)[0]
    best = max(place.confidence.max().item() for place in session.output.located[0])
    assert f"it scored {best:.2f}, and 1.00 is needed" in sentence and picture


def test_describe_needs_no_question_and_ask_may_have_no_object(tmp_path, clip, grounder):
    session = new_session(tmp_path, clip, "", "describe")
    list(session.ground(grounder))
    assert session.results[0].text == "it is a ring." and "sp-question" not in fragments.answers(session, {})
    session = new_session(tmp_path, clip, "is it red?", "ask")
    list(session.ground(grounder))
    assert best_rejected(session, grounder) == {}


def test_the_task_box_draws_no_masks(tmp_path, clip, grounder):
    session = new_session(tmp_path, clip, task="box")
    list(session.ground(grounder))
    assert all(rle is None for rle in session.shown[0].rles) and any(session.tracks[0].rles)


# --- correction ---


def same_frame(before, after, t: int) -> bool:
    return before.rles[t] == after.rles[t] and before.scores[t] == after.scores[t]


def test_a_correction_changes_the_frames_from_there_on(session, grounder):
    before = session.tracks
    progress = list(session.correct(grounder, 1, 4, [40, 30, 10, 8], whole=False))
    after = session.tracks
    assert [p.done for p in progress] == [1, 2, 3] and progress[0].total == 3
    assert all(same_frame(before[0], after[0], t) for t in range(NUM_FRAMES))
    assert all(same_frame(before[1], after[1], t) for t in range(4))
    assert not any(same_frame(before[1], after[1], t) for t in range(4, NUM_FRAMES))
    assert after[1].phrase == before[1].phrase and "corrected on frame 4" in session.results[1].warnings[-1]
    assert session.frames_done == set(range(NUM_FRAMES))


def test_a_correction_of_the_whole_clip(session, grounder):
    before = session.tracks[0]
    list(session.correct(grounder, 0, 4, [10, 8, 40, 30], whole=True))
    assert not any(same_frame(before, session.tracks[0], t) for t in range(NUM_FRAMES))


@pytest.mark.parametrize(
    "object_id, frame, box",
    [
        (9, 0, [0, 0, 9, 9]),
        ("0", 0, [0, 0, 9, 9]),
        (0, 99, [0, 0, 9, 9]),
        (0, 0, [0, 0, 0, 0]),
        (0, 0, [0, 0, 9, float("nan")]),
        (0, 0, [1, 2]),
        (0, 0, [900, 900, 990, 990]),
    ],
)
def test_impossible_corrections_are_refused(session, grounder, object_id, frame, box):
    with pytest.raises(VideoGroundingError):
        list(session.correct(grounder, object_id, frame, box, whole=False))


# --- pictures, files ---


def test_downloads_open_with_our_readers(session, tmp_path):
    files = {path.name: path for path in session.write_downloads()}
    assert len(files) == 9 and {"overlay.mp4", "result_0.json", "masks_1.zip"} <= set(files)
    result = read_json(files["result_1.json"])
    assert [track.id for track in result] == [1] and result.path is None and result.query == "the triangle"
    assert list(read_csv(files["boxes_1.csv"])) == [1] and set(read_coco(files["coco_1.json"])) <= {1}
    assert read_pngs(files["masks_1.zip"].with_suffix("")) == {1: session.tracks[1].rles}
    assert len(open_video(files["overlay.mp4"])) == NUM_FRAMES


def test_hidden_objects_are_not_drawn(session):
    plain = session.reader.read([0])[0]
    shown, first = session.draw(0), session.overlay_video()
    session.hidden = {0, 1}
    np.testing.assert_array_equal(session.draw(0), plain)
    assert (shown != plain).any() and session.overlay_video() != first
    session.hidden.clear()
    assert session.overlay_video() == first  # kept for a quick return


def test_how_it_got_there(session, grounder):
    steps = pipeline_steps(session, grounder)
    titles = [title for title, _, _ in steps]
    assert titles == ["Sampled frames"] + ["Proposals and chosen boxes", "First masks"] * 2 + ["Later prompts"]
    page = fragments.how_it_got_there(steps)
    assert page.count("<img") == 4 + 3 * 2


def test_later_prompts_are_shown(tmp_path, clip, grounder):
    config = grounder.model.config
    config.mask_tracker_config.reprompt_threshold, config.filtration_config.score_threshold = 1.0, 0.0
    try:
        session = new_session(tmp_path, clip)
        list(session.ground(grounder))
        assert session.reprompts and {item.object_id for item in session.reprompts} <= set(range(len(session.places)))
        assert pipeline_steps(session, grounder)[-1][2]
    finally:
        config.mask_tracker_config.reprompt_threshold, config.filtration_config.score_threshold = None, 1.0


# --- the GPU's side ---


def test_what_crosses_to_a_gpu_process_can_be_pickled(session, grounder, clip):
    reader = pickle.loads(pickle.dumps(open_video(clip)))
    np.testing.assert_array_equal(reader.read([3]), open_video(clip).read([3]))
    inputs = grounder.processor(text="a", videos=[open_video(clip)], stream=True)
    steps = list(grounder.ground(pickle.loads(pickle.dumps(dict(inputs)))))
    assert len(pickle.loads(pickle.dumps(steps))) == NUM_FRAMES + 2


def test_stream_tail(clip, grounder):
    stream = MaskFrameStream(open_video(clip), grounder.processor.mask_size)
    frames, tail = torch.stack(list(stream.frames())), StreamTail(stream, 3)
    assert len(tail) == 4
    assert torch.equal(torch.stack(list(tail.frames(1))), frames[4:])
    assert torch.equal(torch.stack(list(tail.frames_reversed(2))), frames[3:6].flip(0))
    assert torch.equal(tail.read([0, 2]), frames[[3, 5]])


def test_moved_keeps_the_structure(session):
    copy = moved(session.output, "cpu")
    assert copy is not session.output and torch.equal(copy.sequences, session.output.sequences)
    assert type(copy.tracked[0][0]) is type(session.output.tracked[0][0])


# --- what the page says ---


def test_texts_of_users_and_models_are_escaped(tmp_path, clip, grounder):
    session = new_session(tmp_path, clip, '<img src=x onerror="alert(1)"> [SEG]')
    list(session.ground(grounder))
    page = fragments.answers(session, {}) + fragments.objects_table(session) + fragments.timeline(session)
    assert "<img" not in page and "&lt;img src=x onerror=&quot;alert(1)&quot;&gt; [SEG]" in page
    assert len(session.tracks) == 1  # the [SEG] of the question is text
    assert "<b>" not in fragments.status("<b>", "error")


def test_runs_of_states():
    assert fragments.runs(["a", "a", "b", "a"]) == [("a", 0, 2), ("b", 2, 3), ("a", 3, 4)]


def test_every_moment_lies_inside_its_frame(session):
    times = session.reader.timestamps
    for frame in range(NUM_FRAMES):
        moment = float(fragments.moment(session, frame).split('data-time="')[1].rstrip('"'))
        assert times[frame] < moment < (times[frame + 1] if frame + 1 < NUM_FRAMES else session.reader.duration)
