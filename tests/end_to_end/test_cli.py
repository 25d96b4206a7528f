"""The command `sparrow`, called in this process; once as the installed script."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_sparrow import SparrowForVideoGrounding, cli
from modeling_sparrow.cli import main
from sparrow_processing import open_video
from sparrow_processing.exports import read_json, read_pngs

from ..evaluation.answering import save_checkpoint
from ..processing.clip_factory import write_clip
from .conftest import NUM_FRAMES


@pytest.fixture(scope="module", autouse=True)
def load_each_model_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "load_model", cache(cli.load_model))
        yield


@pytest.fixture
def sparrow(answering, tmp_path, capsys):
    """Runs `sparrow ground` and returns exit code, stdout and the lines of stderr but for progress bars."""

    def run(*arguments, model=answering, output=tmp_path / "out"):
        capsys.readouterr()
        code = main(["ground", *map(str, arguments), "--model", str(model), "--output", str(output)])
        printed = capsys.readouterr()
        lines = [line.split("\r")[-1] for line in printed.err.splitlines()]
        return code, printed.out, [line for line in lines if line and "%|" not in line]

    return run


# --- what it writes ---


def check_schema(document: dict, num_frames: int, size: tuple[int, int]):
    """Every key of result.json and its type."""
    fields = {"query", "text", "video", "sampled_frames", "objects", "time_span", "warnings", "timings"}
    assert set(document) == fields and type(document["query"]) is str and type(document["text"]) is str
    video = document["video"]
    assert set(video) == {"path", "width", "height", "frames", "fps", "duration"}
    assert (video["height"], video["width"], video["frames"]) == (*size, num_frames)
    assert type(video["path"]) is str and type(video["fps"]) is float and type(video["duration"]) is float
    assert all(type(index) is int and 0 <= index < num_frames for index in document["sampled_frames"])
    assert all(type(warning) is str for warning in document["warnings"])
    assert set(document["timings"]) == {"prepare", "generate", "locate", "propagate"}
    assert all(type(seconds) is float and seconds >= 0 for seconds in document["timings"].values())
    assert document["time_span"] is None or [type(second) for second in document["time_span"]] == [float, float]
    for number, found in enumerate(document["objects"]):
        assert set(found) == {"id", "phrase", "span", "score", "frames"} and found["id"] == number
        assert type(found["phrase"]) in (str, type(None)) and 0 <= found["score"] <= 1
        if found["span"] is not None:
            assert document["text"][slice(*found["span"])] == found["phrase"]
        assert len(found["frames"]) == num_frames
        for index, frame in enumerate(found["frames"]):
            check_frame(frame, index, size)


def check_frame(frame: dict, index: int, size: tuple[int, int]):
    assert set(frame) == {"index", "time", "visible", "score", "box", "mask"} and frame["index"] == index
    assert type(frame["time"]) is float and type(frame["visible"]) is bool and type(frame["score"]) is float
    assert (frame["box"] is not None) == (frame["mask"] is not None) == frame["visible"]
    if frame["visible"]:
        x0, y0, x1, y1 = frame["box"]
        assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]
        assert set(frame["mask"]) == {"size", "counts"} and frame["mask"]["size"] == list(size)
        assert type(frame["mask"]["counts"]) is str


def test_ground_writes_result_overlay_and_masks(sparrow, clip, tmp_path):
    code, printed, lines = sparrow(clip, "the ring")
    assert code == 0 and printed == ""
    assert lines[:2] == ["query:   the ring", "answer:  it is a ring."] and lines[2].startswith("object 0: a ring (")
    assert lines[-1].startswith("written: ") and lines[-1].endswith(f"masks{os.sep}, overlay.mp4, overlay.png")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["masks", "overlay.mp4", "overlay.png", "result.json"]
    with Image.open(out / "overlay.png") as picture:
        assert min(picture.size) > 0
    document = json.loads((out / "result.json").read_text())
    check_schema(document, NUM_FRAMES, (48, 64))
    assert document["query"] == "the ring" and document["video"]["path"] == str(clip)
    assert document["video"]["fps"] == pytest.approx(25) and document["video"]["duration"] == pytest.approx(7 / 25)
    (found,) = document["objects"]
    assert found["phrase"] == "a ring" and any(frame["visible"] for frame in found["frames"])
    assert [frame["time"] for frame in found["frames"]] == pytest.approx([t / 25 for t in range(NUM_FRAMES)])
    overlay = open_video(out / "overlay.mp4")
    assert (len(overlay), overlay.width, overlay.height) == (NUM_FRAMES, 64, 48)
    assert overlay.fps == pytest.approx(25, rel=0.01)
    assert sorted(path.name for path in (out / "masks").iterdir()) == ["0"]
    files = sorted(path.name for path in (out / "masks" / "0").iterdir())
    assert files == [f"{frame:05d}.png" for frame in range(NUM_FRAMES)]
    assert read_pngs(out / "masks")[0] == read_json(out / "result.json")[0].rles


def test_several_queries_have_a_folder_each(sparrow, clip, tmp_path):
    code, _, lines = sparrow(clip, "the ring", "the star")
    out = tmp_path / "out"
    assert code == 0 and sorted(path.name for path in out.iterdir()) == ["query_0", "query_1"]
    for folder, query in [("query_0", "the ring"), ("query_1", "the star")]:
        document = json.loads((out / folder / "result.json").read_text())
        check_schema(document, NUM_FRAMES, (48, 64))
        assert document["query"] == query and f"query:   {query}" in lines
        assert len(open_video(out / folder / "overlay.mp4")) == NUM_FRAMES
        assert (out / folder / "masks" / "0" / "00006.png").is_file()


def test_json_on_standard_output_or_in_a_file(sparrow, clip, tmp_path):
    code, printed, _ = sparrow(clip, "the ring", "--json", "-", "--no-overlay")
    assert code == 0 and json.loads(printed) == json.loads((tmp_path / "out" / "result.json").read_text())
    target = tmp_path / "all.json"
    target.write_text("of an earlier run")
    code, printed, _ = sparrow(clip, "the ring", "the star", "--json", target, "--no-overlay")
    assert code == 0 and printed == ""
    both = json.loads(target.read_text())
    assert both == [
        json.loads((tmp_path / "out" / f"query_{index}" / "result.json").read_text()) for index in range(2)
    ]
    assert [path for path in tmp_path.iterdir() if path.name not in ("all.json", "out")] == []


def test_no_overlay(sparrow, clip, tmp_path):
    code, _, lines = sparrow(clip, "the ring", "--no-overlay")
    assert code == 0 and sorted(path.name for path in (tmp_path / "out").iterdir()) == ["masks", "result.json"]
    assert lines[-1].endswith(f"result.json, masks{os.sep}")


def test_max_frames_and_a_second_run_into_the_same_folder(sparrow, clip, tmp_path):
    assert sparrow(clip, "the ring")[0] == 0
    code, _, lines = sparrow(clip, "the star", "--max-frames", 3)
    assert code == 0 and any("cut to the first 3 of 7 frames" in line for line in lines)
    out = tmp_path / "out"
    document = json.loads((out / "result.json").read_text())
    check_schema(document, 3, (48, 64))
    assert document["query"] == "the star"
    assert len(open_video(out / "overlay.mp4")) == 3
    assert len(list((out / "masks" / "0").iterdir())) == 3


def test_tasks(sparrow, clip, tmp_path):
    assert sparrow(clip, "--task", "describe", "--no-overlay")[0] == 0
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    check_schema(document, NUM_FRAMES, (48, 64))
    assert document["query"] == "describe the video"
    assert sparrow(clip, "the ring", "--task", "box", "--no-overlay", "--max-new-tokens", 2)[0] == 0
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert document["text"] == "it is" and document["objects"] == []
    assert list((tmp_path / "out" / "masks").iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, sparrow, clip, tmp_path):
    assert sparrow(clip, "the ring", "--dtype", dtype, "--device", "cpu", "--no-overlay")[0] == 0
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    check_schema(document, NUM_FRAMES, (48, 64))
    assert document["text"] == "it is a ring." and len(document["objects"]) == 1


def test_time_span_of_an_answer(sparrow, clip, tmp_path):
    model = save_checkpoint(tmp_path / "model", "frames : ( 1 , 3 )")
    assert sparrow(clip, "the ring", model=model)[0] == 0
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    check_schema(document, NUM_FRAMES, (48, 64))
    assert document["time_span"] == pytest.approx([2 / 25, 6 / 25])  # sampled frames 0, 2, 4, 6
    assert len(open_video(tmp_path / "out" / "overlay.mp4")) == NUM_FRAMES  # nothing to draw, yet a video


def test_odd_size_and_odd_name(sparrow, tmp_path):
    video = write_clip(tmp_path / "[SEG] 'x' 🐢.mkv", count=3, width=63, height=47, codec="ffv1", pix_fmt="bgr0")
    assert sparrow(video, "the ring")[0] == 0
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    check_schema(document, 3, (47, 63))
    assert document["video"]["path"] == str(video) and len(open_video(tmp_path / "out" / "overlay.mp4")) == 3


def test_a_picture_and_a_folder_of_pictures(sparrow, clip, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in enumerate(open_video(clip)):
        Image.fromarray(frame).save(folder / f"{number}.png")
    for video, count in [(folder, NUM_FRAMES), (folder / "0.png", 1)]:
        assert sparrow(video, "the ring")[0] == 0
        check_schema(json.loads((tmp_path / "out" / "result.json").read_text()), count, (48, 64))
        assert len(open_video(tmp_path / "out" / "overlay.mp4")) == count


# --- bad input ---


@pytest.fixture
def bad_files(tmp_path, clip):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "model").mkdir()
    shutil.copyfile(clip, tmp_path / "clip.mp4")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4", "a ring"], "missing.mp4': No such file"),
        (["empty.mp4", "a ring"], "the file is empty"),
        (["text.mp4", "a ring"], "not a video"),
        (["https://example.org/clip.mp4", "a ring"], "URLs are not opened"),
        (["clip.mp4", "a ring", "--model", "model"], "model"),
        (["clip.mp4", "a ring", "--model", "no/such/folder"], "no/such/folder: no such folder"),
        (["clip.mp4", ""], "The query is empty"),
        (["clip.mp4", "a ring", " "], "The query is empty"),
        (["clip.mp4", "x" * 2001], "at most 2000"),
        (["clip.mp4"], "Give at least one query"),
        (["clip.mp4", "a ring", "--max-frames", "0"], "--max-frames must be at least 1, got 0"),
        (["clip.mp4", "a ring", "--output", "text.mp4"], "text.mp4: File exists"),
        (["clip.mp4", "a ring", "--output", "text.mp4/deeper"], "text.mp4/deeper: Not a directory"),
        (["clip.mp4", "a ring", "b", "--output", "text.mp4"], "text.mp4"),
        (["clip.mp4", "a ring", "--json", "missing/result.json"], "there is no such folder"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, answering, bad_files, capsys, monkeypatch):
    monkeypatch.chdir(bad_files)
    before = sorted(bad_files.iterdir())
    options = {"--model": str(answering), "--output": "out"}
    for name, value in options.items():
        if name not in arguments:
            arguments = [*arguments, name, value]
    capsys.readouterr()
    assert main(["ground", *arguments]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("sparrow: ") and message in line and printed.out == ""
    written = [path for path in bad_files.rglob("*") if path.is_file() and path not in before]
    assert written == [] and (bad_files / "text.mp4").read_text() == "no video"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["ground"], ["ground", "clip.mp4", "a", "--task", "guess"]])
def test_unknown_words_and_missing_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: sparrow" in capsys.readouterr().err


# --- interruption ---


def interrupt_after(monkeypatch, count):
    """Ctrl-C after `count` frames, or before the first in generation."""
    steps = SparrowForVideoGrounding.ground_iter

    def interrupted(self, *args, **kwargs):
        for done, step in enumerate(steps(self, *args, **kwargs)):
            if done == count:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(SparrowForVideoGrounding, "ground_iter", interrupted)


@pytest.mark.parametrize("count", [0, 3])
def test_interrupted_in_the_middle(count, sparrow, clip, tmp_path, monkeypatch):
    sparrow(clip, "the ring")
    whole = read_json(tmp_path / "out" / "result.json")
    interrupt_after(monkeypatch, count)
    code, _, lines = sparrow(clip, "the ring")
    assert code == 130 and any("Interrupted: not every frame" in line for line in lines)
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert document["text"] == "" and document["video"]["frames"] == NUM_FRAMES
    assert len(open_video(tmp_path / "out" / "overlay.mp4")) == NUM_FRAMES
    result = read_json(tmp_path / "out" / "result.json")
    assert len(result) == (1 if count else 0)
    for track in result:
        done = np.flatnonzero(track.scores)
        assert len(done) == count
        for frame in range(NUM_FRAMES):
            assert track.rles[frame] == (whole[0].rles[frame] if frame in done else None)


def test_interrupted_with_two_queries(sparrow, clip, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 5)
    assert sparrow(clip, "the ring", "the star", "--no-overlay")[0] == 130
    for index in range(2):
        assert (tmp_path / "out" / f"query_{index}" / "result.json").is_file()


def test_interrupted_while_loading(sparrow, clip, tmp_path, monkeypatch):
    def load_model(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_model", load_model)
    code, printed, lines = sparrow(clip, "the ring")
    assert (code, printed, lines) == (130, "", ["sparrow: interrupted"])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("tried to allocate 9 GiB"), MemoryError("no room")])
def test_out_of_memory(sparrow, clip, monkeypatch, error):
    def load_model(*args):
        raise error

    monkeypatch.setattr(cli, "load_model", load_model)
    code, printed, (line,) = sparrow(clip, "the ring")
    assert (code, printed) == (1, "")
    assert line == f"sparrow: out of memory: try --dtype bfloat16 or --max-frames. {error}"


# --- other commands ---


def test_info(answering, capsys):
    assert main(["info", str(answering)]) == 0
    printed = capsys.readouterr().out
    assert str(answering) in printed and "mask_tracker" in printed and "llama" in printed
    parts = {line.split()[0]: line for line in printed.splitlines()}
    total = float(parts["parameters"].split()[1])
    names = ("host", "seg_head", "box_head", "mask_tracker", "region_proposer", "filtration_head")
    assert total == pytest.approx(sum(float(parts[name].split()[1]) for name in names), abs=0.03)


def test_export_into_a_folder_in_use(answering, tmp_path, capsys):
    target = tmp_path / "used"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (tmp_path / "file").touch()
    for directory, message in [(target, "is not empty"), (tmp_path / "file", "file")]:
        capsys.readouterr()
        assert main(["export", str(answering), str(directory)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


def test_installed_script(clip, tmp_path):
    script = Path(sys.executable).with_name("sparrow")
    if not script.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "usage: sparrow" in done.stdout
    for command in ("ground", "info", "export", "evaluate"):
        assert command in done.stdout
