"""What a user writes down: checked early, with the place of what is wrong."""

import contextlib
import json
import re

import datasets
import numpy as np
import pytest

from modeling_sparrow.training.records import (
    RecordError,
    RecordFile,
    SkipRecordError,
    SyntheticRecords,
    normalize_answer,
    parse_record,
)
from sparrow_processing.processing_sparrow import BOX_TOKEN, SEG_TOKEN
from sparrow_processing.results import encode_mask

from .conftest import object_content, write_clip, write_lines


@pytest.fixture
def clip(tmp_path):
    frames, masks = write_clip(tmp_path / "clip")
    return frames, masks


def content(masks, **changes) -> dict:
    record = {
        "video": "clip",
        "question": "Where is it?",
        "answer": "It is [SEG].",
        "objects": [object_content(masks)],
    }
    return record | changes


def test_a_record(clip, tmp_path):
    record = parse_record(content(clip[1], time_span=[0, 1.5], kind="where", remark="ignored"), "here", tmp_path)
    assert record.video == str(tmp_path / "clip") and record.time_span == (0.0, 1.5) and record.kind == "where"
    assert record.answer == "It is [BOX] [SEG]." and record.targets == ((0,),)
    frame = record.objects[0].frames[2]
    assert (frame.read_mask((48, 64), "here") == clip[1][2]).all()
    assert frame.read_box((48, 64), "here").tolist() == [18, 11, 32, 25]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a [SEG] b", "a [BOX] [SEG] b"),
        ("[BOX] [SEG]", "[BOX] [SEG]"),
        ("[BOX][SEG] and [SEG]", "[BOX] [SEG] and [BOX] [SEG]"),
        ("nothing there", "nothing there"),
    ],
)
def test_every_seg_gets_its_box(answer, expected):
    assert normalize_answer(answer) == expected


def test_targets_by_default(clip, tmp_path):
    two = [object_content(clip[1], 3), object_content(clip[1], 8)]
    assert parse_record(content(clip[1], objects=two), "here", tmp_path).targets == ((3, 8),)
    each = content(clip[1], objects=two, answer="[SEG] and [SEG]")
    assert parse_record(each, "here", tmp_path).targets == ((3,), (8,))
    named = content(clip[1], objects=two, answer="[SEG], [SEG], [SEG]", targets=[[8], [3, 8], []])
    assert parse_record(named, "here", tmp_path).targets == ((8,), (3, 8), ())
    nothing = content(clip[1], objects=two, answer="There is none.")
    assert parse_record(nothing, "here", tmp_path).targets == ()


def damaged(masks, **frame):
    item = object_content(masks)
    item["frames"][1] |= frame
    return [item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, "question: expected a text"),
        ({"answer": 3}, "answer: expected a text"),
        ({"answer": "[BOX] it is"}, r"every \[BOX\] must stand right before"),
        ({"answer": "<video> [SEG]"}, "placeholder"),
        ({"video": "absent.mp4"}, r"video: there is no file .*absent\.mp4"),
        ({"video": None}, "video: expected a path"),
        ({"objects": "all"}, "objects: expected a list"),
        ({"objects": [{"id": "frog", "frames": []}]}, r"objects\[0\]: expected an object with an integer id"),
        ({"objects": [{"id": 1, "frames": []}]}, "at least one annotated frame"),
        ({"objects": [{"id": 1, "frames": [{"index": -1}]}]}, r"frames\[0\]: .*the index 0 or more"),
        (
            {"objects": lambda m: damaged(m, box=[1, 2, 3])},
            r"objects\[0\].frames\[1\].box: expected \[x0, y0",
        ),
        ({"objects": lambda m: damaged(m, box=[5, 5, 5, 9])}, "x0 < x1"),
        ({"objects": lambda m: damaged(m, box=[1, 2, float("nan"), 9])}, "in pixels"),
        ({"objects": lambda m: damaged(m, mask={"size": [48, 64], "counts": "0"})}, r"frames\[1\].mask: RLE counts"),
        ({"objects": lambda m: [object_content(m), object_content(m)]}, "distinct ids"),
        ({"answer": "[SEG] [SEG] [SEG]"}, "targets must say"),
        ({"targets": [[0], [0]]}, "expected 1 lists"),
        ({"targets": [[5]]}, r"no object has the id \[5\]"),
        ({"time_span": [1]}, "time_span"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change, message, clip, tmp_path):
    change = {key: value(clip[1]) if callable(value) else value for key, value in change.items()}
    with pytest.raises(RecordError, match=f"file:3: .*{message}"):
        parse_record(content(clip[1], **change), "file:3", tmp_path)


def test_bad_lines_are_reported_together_when_the_file_is_opened(clip, tmp_path):
    good = content(clip[1])
    file = write_lines(tmp_path / "data.jsonl", [good, good | {"video": "lost.mp4"}, good])
    file.write_text(file.read_text() + "\n\n{broken\n" + json.dumps(good | {"answer": ""}) + "\n")
    with pytest.raises(RecordError) as error:
        RecordFile(file)
    lines = str(error.value).splitlines()
    assert lines[0] == "3 of 5 records cannot be used:"
    for line, number in zip(lines[1:], (2, 5, 6), strict=True):
        assert line.startswith(f"{file}:{number}: ")


def test_a_mask_of_another_size_than_the_video(clip, tmp_path):
    other = encode_mask(np.ones((20, 20), dtype=bool))
    record = parse_record(content(clip[1], objects=damaged(clip[1], mask=other)), "file:3", tmp_path)
    with pytest.raises(RecordError, match=r"file:3: mask of frame 1 has the size \(20, 20\)"):
        record.objects[0].frames[1].read_mask((48, 64), record.where)


def test_boxes_alone_leave_the_shape_open(clip, tmp_path):
    boxes = [object_content(clip[1], with_masks=False)]
    record = parse_record(content(clip[1], objects=boxes), "here", tmp_path)
    frame = record.objects[0].frames[2]
    assert frame.read_mask((48, 64), "here") is None
    assert frame.read_box((48, 64), "here").tolist() == [18, 11, 32, 25]


def test_parquet_and_lines_say_the_same(clip, tmp_path):
    records = [content(clip[1], question=f"Question {n}?", objects=[object_content(clip[1], n)]) for n in range(3)]
    write_lines(tmp_path / "data.jsonl", records)
    data = (tmp_path / "clip" / "000.png").read_bytes()
    rows = [record | {"video": {"bytes": data, "path": None}} for record in records]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    first, second = RecordFile(tmp_path / "data.jsonl"), RecordFile(tmp_path / "data.parquet")
    rng = np.random.default_rng(0)
    for n in range(3):
        (line,), (row,) = first.read(n, rng), second.read(n, rng)
        assert (line.question, line.answer, line.targets) == (row.question, row.answer, row.targets)
        assert row.video == data and row.where.endswith(f"row {n}")
        for t, frame in line.objects[0].frames.items():
            assert frame.box == row.objects[0].frames[t].box and frame.mask == row.objects[0].frames[t].mask


def test_questions_about_one_video_come_together(clip, tmp_path):
    write_clip(tmp_path / "other", seed=1)
    records = [content(clip[1], question=f"{n}") for n in range(5)]
    records.insert(2, content(clip[1], video="other", question="other"))
    file = write_lines(tmp_path / "data.jsonl", records)
    alone = RecordFile(file)
    assert len(alone) == 6 and all(len(alone.read(n, np.random.default_rng(0))) == 1 for n in range(6))
    shared = RecordFile(file, questions_per_video=3)
    assert len(shared) == 2
    drawn = {record.question for seed in range(20) for record in shared.read(0, np.random.default_rng(seed))}
    assert drawn == set("01234")
    assert [record.question for record in shared.read(1, np.random.default_rng(0))] == ["other"]


def test_empty_and_absent_files(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(RecordError, match="holds no records"):
        RecordFile(tmp_path / "data.jsonl")
    with pytest.raises(RecordError, match="No such file"):
        RecordFile(tmp_path / "absent.jsonl")
    with pytest.raises(RecordError, match=r"absent\.parquet"):
        RecordFile(tmp_path / "absent.parquet")


def test_the_generated_world_by_number():
    source = SyntheticRecords(world={"height": 64, "width": 64}, size=10, questions_per_video=3)
    first, again = (source.read(4, np.random.default_rng(1)) for _ in range(2))
    assert [record.question for record in first] == [record.question for record in again]
    assert len(first) == 3 and (first[0].video == again[0].video).all()
    for record in first:
        assert record.answer.count(f"{BOX_TOKEN} {SEG_TOKEN}") == len(record.targets)
        assert {target for targets in record.targets for target in targets} <= set(record.objects_by_id)
    assert {record.kind for index in range(5) for record in source.read(index, np.random.default_rng(1))} > {"none"}
    few = SyntheticRecords(world={"height": 64, "width": 64}, size=10, kinds=["colour", "caption"])
    assert {record.kind for record in few.read(4, np.random.default_rng(1))} <= {"colour", "caption"}
    other = SyntheticRecords(world={"height": 64, "width": 64}, seed=1, size=10).read(4, np.random.default_rng(1))
    assert (other[0].video != first[0].video).any()


@pytest.mark.parametrize("sampled", [8, 16])
def test_time_spans_count_in_the_frames_that_the_model_sees(sampled):
    source = SyntheticRecords(preset="hard", size=12, kinds=["time"], sampled_frames=sampled)
    ends = set()
    for index in range(12):
        with contextlib.suppress(SkipRecordError):  # a clip in which nothing has a span
            answers = [record.answer for record in source.read(index, np.random.default_rng(1))]
            ends.update(int(number) for answer in answers for number in re.findall(r"\d+", answer))
    assert max(ends) == sampled - 1


@pytest.mark.parametrize(
    "arguments", [{"split": "test"}, {"preset": "simple"}, {"world": {"hight": 64}}, {"kinds": ["color"]}]
)
def test_worlds_that_do_not_exist(arguments):
    with pytest.raises(ValueError):
        SyntheticRecords(**arguments)
