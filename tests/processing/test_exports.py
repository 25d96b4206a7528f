"""Round trips of every format, hostile files, and writing that fails half-way."""

import builtins
import csv
import io
import json
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from sparrow_processing.errors import ExportError
from sparrow_processing.exports import (
    davis_palette,
    read_coco,
    read_csv,
    read_indexed_pngs,
    read_json,
    read_mot,
    read_pngs,
    safe_stem,
    write_coco,
    write_csv,
    write_indexed_pngs,
    write_json,
    write_mot,
    write_pngs,
)
from sparrow_processing.results import GroundingResult, ObjectTrack, decode_mask, encode_mask, mask_to_box

SIZE = (63, 127)  # odd on purpose
WRITERS = [write_json, write_coco, write_mot, write_csv, write_pngs, write_indexed_pngs]
FOLDER_WRITERS = [write_pngs, write_indexed_pngs]


def make_track(masks, id, phrase, seed=0):
    generator = np.random.default_rng(seed)
    boxes = np.stack([mask_to_box(mask) for mask in masks]) + generator.random(4, dtype=np.float32) / 8
    visible = np.array([mask.any() for mask in masks])
    return ObjectTrack(
        id=id,
        phrase=phrase,
        span=None if phrase is None else (4, 4 + len(phrase)),
        score=0.1 + 0.2,
        boxes=boxes,
        scores=np.where(visible, generator.random(len(masks), dtype=np.float32), np.float32(0)),
        visible=visible,
        rles=[encode_mask(mask) if mask.any() else None for mask in masks],
        size=masks.shape[1:],
    )


def make_result(tracks, timestamps=(0.0, 1 / 30, 0.1), **changes):
    fields = {
        "query": 'what "moves"? 🚗',
        "text": "the red car, a dog\nand nothing else",
        "objects": tracks,
        "size": SIZE,
        "fps": 29.97,
        "timestamps": timestamps,
        "sampled_frames": [0, len(timestamps) - 1],
        "path": "clips/a b.mp4",
        "timings": {"host": 0.25},
        "warnings": ["ended early at frame 3"],
        "time_span": (0.0, 0.05),
    }
    return GroundingResult(**(fields | changes))


def two_objects():
    """A car in every frame and a dog that is absent from the middle one; they overlap in the first and last."""
    car, dog = np.zeros((3, *SIZE), dtype=bool), np.zeros((3, *SIZE), dtype=bool)
    car[:, 10:30, 20:60] = True
    dog[0, 25:40, 50:80] = dog[2, 25:40, 55:127] = True
    return make_result([make_track(car, 2, "red car", seed=1), make_track(dog, 7, None, seed=2)])


def one_frame():
    mask = np.random.default_rng(3).random((1, *SIZE)) < 0.3
    return make_result([make_track(mask, 0, "red car")], timestamps=[0.0])


def never_seen():
    return make_result([make_track(np.zeros((3, *SIZE), dtype=bool), 4, "red car")])


def empty_mask_rles():
    """Absence written as an empty mask instead of None."""
    track = never_seen()[0]
    rles = [encode_mask(np.zeros(SIZE, dtype=bool))] * 3
    fields = {name: getattr(track, name) for name in ("id", "phrase", "span", "score", "boxes", "scores", "visible")}
    return make_result([ObjectTrack(**fields, rles=rles, size=SIZE)])


def no_objects():
    return make_result([], text="There is no such object.", time_span=None, path=None)


RESULTS = [two_objects, one_frame, never_seen, empty_mask_rles, no_objects]


@pytest.fixture(params=RESULTS, ids=lambda make: make.__name__)
def result(request):
    return request.param()


def present(result):
    """The objects that some frame shows: what formats without a list of objects keep."""
    return [track for track in result if track.visible.any()]


def same_masks(rles, track):
    masks = [np.zeros(SIZE, dtype=bool) if rle is None else decode_mask(rle) for rle in rles]
    return np.array_equal(np.stack(masks), track.masks)


# --- JSON ---


def test_json_round_trip(result, tmp_path):
    write_json(result, tmp_path / "result.json")
    loaded = read_json(tmp_path / "result.json")
    for name in ("query", "text", "size", "fps", "sampled_frames", "path", "timings", "warnings", "time_span"):
        assert getattr(loaded, name) == getattr(result, name), name
    for ours, theirs in zip(result, loaded, strict=True):
        for name in ("id", "phrase", "span", "score", "rles"):
            assert getattr(ours, name) == getattr(theirs, name), name
        for name in ("boxes", "scores", "visible"):
            assert getattr(ours, name).dtype == getattr(theirs, name).dtype
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    if len(result):
        np.testing.assert_array_equal(loaded.timestamps, result.timestamps)
    write_json(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "result.json").read_bytes()


def test_json_schema():
    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    document = json.loads(two_objects().to_json(), parse_constant=refuse)
    assert list(document) == [
        "query",
        "text",
        "video",
        "sampled_frames",
        "objects",
        "time_span",
        "warnings",
        "timings",
    ]
    assert document["video"] == {
        "path": "clips/a b.mp4", "width": 127, "height": 63, "frames": 3, "fps": 29.97, "duration": 0.15,
    }  # fmt: skip
    assert list(document["objects"][0]) == ["id", "phrase", "span", "score", "frames"]
    assert document["objects"][0]["span"] == [4, 11]
    assert document["time_span"] == [0.0, 0.05]
    seen, absent = document["objects"][1]["frames"][:2]
    assert list(seen) == ["index", "time", "visible", "score", "box", "mask"]
    assert seen["mask"]["size"] == [63, 127] and len(seen["box"]) == 4
    assert absent == {"index": 1, "time": 1 / 30, "visible": False, "score": 0.0, "box": None, "mask": None}


def test_json_of_float32_is_short_and_exact():
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32)
    scores = bits.view(np.float32)
    scores = np.concatenate(([0.9], scores[np.abs(scores) < 1e37])).astype(np.float32)
    track = never_seen()[0]
    fields = {"id": 0, "phrase": None, "span": None, "score": 0.9, "size": SIZE, "scores": scores}
    frames = len(scores)
    boxes, visible = np.full((frames, 4), np.nan), np.zeros(frames, dtype=bool)
    track = ObjectTrack(**fields, boxes=boxes, visible=visible, rles=[None] * frames)
    text = make_result([track], timestamps=np.arange(frames) / 30).to_json()
    assert json.loads(text)["objects"][0]["frames"][0]["score"] == 0.9
    np.testing.assert_array_equal(GroundingResult.from_json(text)[0].scores, scores)


@pytest.mark.parametrize(
    ("timestamps", "fps"), [([0.0], 30.0), ([0.0], 0.0), ([2.5], 24.0), (np.arange(7) / 7.3, 7.3)]
)
def test_json_without_objects_keeps_count_and_duration(timestamps, fps):
    result = make_result([], timestamps=timestamps, fps=fps)
    loaded = GroundingResult.from_json(result.to_json())
    assert loaded.to_json() == result.to_json()
    np.testing.assert_allclose(loaded.timestamps, timestamps, atol=1e-6)


def test_lone_surrogate_survives_json(tmp_path):
    result = make_result([], path="bad\udcff.mp4")
    write_json(result, tmp_path / "result.json")
    assert read_json(tmp_path / "result.json").path == "bad\udcff.mp4"


def edit(*keys, value):
    """A change of the JSON document of `two_objects`: the field at the end of `keys` gets the value."""

    def apply(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return apply


FRAME = ("objects", 0, "frames", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(*FRAME, "mask", "counts", value="4"), r"objects\[0\]: frames\[1\]: mask: RLE counts: runs add up to 4"),
        (edit(*FRAME, "mask", "size", value=[10**9, 10**9]), r"frames\[1\]: mask: RLE size"),
        (edit(*FRAME, "mask", value={"size": [2, 2], "counts": "4"}), r"mask: size: expected \[63, 127\]"),
        (edit(*FRAME, "mask", value=3), r"frames\[1\]: mask: expected object, got int"),
        (edit(*FRAME, "box", value=[1, 2, 3]), r"frames\[1\]: box: expected 4 items, got 3"),
        (edit(*FRAME, "box", value=[1, 2, 10**400, 4]), r"box\[2\]: expected a finite number"),
        (edit(*FRAME, "box", value=[1, 2, "3", 4]), r"box\[2\]: expected number, got str"),
        (edit(*FRAME, "box", value=[9, 2, 3, 4]), r"objects\[0\]: boxes: expected rows"),
        (edit(*FRAME, "index", value=7), r"frames\[1\]: index: expected 1, got 7"),
        (edit(*FRAME, "visible", value=1), r"frames\[1\]: visible: expected boolean, got int"),
        (edit(*FRAME, "time", value=0.09), r"objects\[1\]: frames: the times differ from those of objects\[0\]"),
        (edit(*FRAME, value=[]), r"frames\[1\]: expected object, got list"),
        (edit("objects", 0, "frames", value=[]), "at least one frame"),
        (edit("objects", 0, "span", value=[0, 999]), "span .* outside the answer"),
        (edit("objects", 0, "id", value=True), r"objects\[0\]: id: expected integer, got bool"),
        (edit("objects", 0, value={}), r"objects\[0\]: frames: missing"),
        (edit("objects", value=None), "objects: expected list, got NoneType"),
        (edit("video", "frames", value=4), "video: frames: 4, but the objects have 3"),
        (edit("video", "width", value="127"), "video: width: expected integer, got str"),
        (edit("video", "fps", value=-1), "fps"),
        (edit("query", value=None), "query: expected string, got NoneType"),
        (edit("warnings", value=[1]), r"warnings\[0\]: expected string, got int"),
        (edit("timings", value={"host": "fast"}), "timings.host: expected number, got str"),
        (edit("time_span", value=[0]), "time_span: expected 2 items, got 1"),
        (edit("sampled_frames", value=[3]), "sampled_frames: expected indices from 0 to 2"),
    ],
)
def test_json_with_a_bad_field_is_refused(change, message, tmp_path):
    document = json.loads(two_objects().to_json())
    change(document)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "Expecting value"),
        (b"[]", "expected object, got list"),
        (b"{", "Expecting property name"),
        (b'{"video": NaN}', "NaN is not JSON"),
        (b'{"video": -Infinity}', "-Infinity is not JSON"),
        (b"\xff\xfe", "utf-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"query": 1}', "video: missing"),
    ],
)
def test_what_is_not_such_json_is_refused(data, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(str(path))


def test_frame_count_of_a_small_file_cannot_exhaust_memory(tmp_path):
    document = json.loads(no_objects().to_json())
    document["video"]["frames"] = 10**12
    (tmp_path / "bomb.json").write_text(json.dumps(document))
    (tmp_path / "bomb.txt").write_text("1,1,0,0,1,1,1,-1,-1,-1\n")
    tracemalloc.start()
    with pytest.raises(ValueError, match="1 tracks of 1000000000000 frames"):
        read_json(tmp_path / "bomb.json")
    with pytest.raises(ValueError, match="1 tracks of 1000000000000 frames"):
        read_mot(tmp_path / "bomb.txt", num_frames=10**12)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


# --- COCO ---


def test_coco_round_trip(result, tmp_path):
    write_coco(result, tmp_path / "coco.json")
    loaded = read_coco(tmp_path / "coco.json")
    assert list(loaded) == [track.id for track in present(result)]
    for track in present(result):
        phrase, boxes, scores, rles = loaded[track.id]
        assert phrase == (track.phrase or "object")
        np.testing.assert_allclose(boxes, track.boxes, atol=2e-3)
        np.testing.assert_array_equal(scores, track.scores)
        assert same_masks(rles, track)


def test_coco_is_read_by_pycocotools(result):
    coco = COCO()
    coco.dataset = json.loads(json.dumps(result.to_coco()))
    coco.createIndex()
    assert len(coco.imgs) == result.num_frames
    assert len(coco.anns) == sum(int(track.visible.sum()) for track in result)
    for track in result:
        for frame in range(result.num_frames):
            annotations = [a for a in coco.imgToAnns[frame + 1] if a["track_id"] == track.id]
            assert len(annotations) == int(track.visible[frame])
            for annotation in annotations:
                assert np.array_equal(coco.annToMask(annotation), track.mask(frame))
                assert annotation["area"] == track.mask(frame).sum()
                assert coco.cats[annotation["category_id"]]["name"] == (track.phrase or "object")


def test_coco_box_without_mask_and_mask_without_box():
    nothing = np.full((1, 4), np.nan, dtype=np.float32)
    fields = {"phrase": "car", "span": None, "score": 1.0, "scores": [0.5], "visible": [True], "size": SIZE}
    mask = np.zeros(SIZE, dtype=bool)
    mask[2:4, 5:9] = True
    box_only = ObjectTrack(id=1, boxes=[[1, 2, 4.5, 4]], rles=[None], **fields)
    mask_only = ObjectTrack(id=2, boxes=nothing, rles=[encode_mask(mask)], **fields)
    result = make_result([box_only, mask_only], timestamps=[0.0])
    first, second = result.to_coco()["annotations"]
    assert (first["segmentation"], first["bbox"], first["area"]) == ([], [1.0, 2.0, 3.5, 2.0], 7.0)
    assert (second["bbox"], second["area"]) == ([5.0, 2.0, 4.0, 2.0], 8)
    assert result.to_mot() == "1,1,1.0,2.0,3.5,2.0,0.5,-1,-1,-1\n1,2,5.0,2.0,4.0,2.0,0.5,-1,-1,-1\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("annotations", 1, "image_id", value=99), r"annotations\[1\]: image_id: no image has the id 99"),
        (edit("annotations", 1, "category_id", value=99), r"annotations\[1\]: category_id: no category"),
        (edit("annotations", 1, "image_id", value=1), r"annotations\[1\]: the object has two boxes in frame 0"),
        (edit("annotations", 0, "bbox", value=[0, 0, -1, 2]), r"annotations\[0\]: box: expected a width"),
        (edit("annotations", 0, "segmentation", "counts", value="4"), r"annotations\[0\]: mask: RLE counts"),
        (edit("annotations", 0, "segmentation", value=[[1, 2, 3]]), "segmentation: expected object, got list"),
        (edit("annotations", 0, "track_id", value=None), r"annotations\[0\]: track_id: expected integer"),
        (edit("images", 1, "id", value=1), r"images\[1\]: id: 1 is used twice"),
        (edit("categories", 0, "name", value=1), r"categories\[0\]: name: expected string"),
        (edit("images", value={}), "images: expected list, got dict"),
    ],
)
def test_coco_with_a_bad_field_is_refused(change, message, tmp_path):
    document = two_objects().to_coco()
    change(document)
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as error:
        read_coco(path)
    assert str(error.value).startswith(str(path))


# --- MOTChallenge and CSV ---


def test_mot_round_trip(result, tmp_path):
    write_mot(result, tmp_path / "mot.txt")
    loaded = read_mot(tmp_path / "mot.txt", result.num_frames)
    assert list(loaded) == [track.id for track in present(result)]
    for track in present(result):
        boxes, scores = loaded[track.id]
        np.testing.assert_allclose(boxes, track.boxes, atol=2e-3)
        np.testing.assert_array_equal(scores, track.scores)


def test_mot_lines_are_sorted_by_frame():
    rows = [line.split(",") for line in two_objects().to_mot().splitlines()]
    assert [(row[0], row[1]) for row in rows] == [("1", "2"), ("1", "7"), ("2", "2"), ("3", "2"), ("3", "7")]
    assert all(row[7:] == ["-1", "-1", "-1"] for row in rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,0,0,1,1,1\n", "line 1: expected 10 values, got 7"),
        ("1,1,0,0,1,1,1,-1,-1,-1\n0,1,0,0,1,1,1,-1,-1,-1\n", "line 2: frame: expected 1 to 3, got 0"),
        ("4,1,0,0,1,1,1,-1,-1,-1\n", "line 1: frame: expected 1 to 3, got 4"),
        ("1,1,0,0,nan,1,1,-1,-1,-1\n", "line 1: w: expected a finite number"),
        ("1,1,0,0,x,1,1,-1,-1,-1\n", "line 1: w: expected float, got 'x'"),
        ("1,1,0,0,-1,1,1,-1,-1,-1\n", "line 1: box: expected a width and height"),
        ("1,1,0,0,1,1,1,-1,-1,-1\n" * 2, "line 2: the object has two boxes in frame 0"),
    ],
)
def test_bad_mot_is_refused(text, message, tmp_path):
    (tmp_path / "mot.txt").write_text(text)
    with pytest.raises(ValueError, match=f"mot.txt: {message}"):
        read_mot(tmp_path / "mot.txt", 3)


def test_csv_round_trip(result, tmp_path):
    write_csv(result, tmp_path / "boxes.csv")
    loaded = read_csv(tmp_path / "boxes.csv")
    assert list(loaded) == [track.id for track in result]
    for track in result:
        phrase, times, visible, scores, boxes = loaded[track.id]
        assert phrase == track.phrase
        for ours, theirs in [
            (times, result.timestamps),
            (visible, track.visible),
            (scores, track.scores),
            (boxes, track.boxes),
        ]:
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_csv_table():
    rows = list(csv.DictReader(io.StringIO(two_objects().to_csv(), newline="")))
    assert list(rows[0]) == ["frame", "time", "object", "phrase", "visible", "score", "x0", "y0", "x1", "y1"]
    assert len(rows) == 6
    assert rows[4] == {
        "frame": "1", "time": str(1 / 30), "object": "7", "phrase": "", "visible": "0", "score": "0.0",
        "x0": "", "y0": "", "x1": "", "y1": "",
    }  # fmt: skip


@pytest.mark.parametrize("phrase", ['a "car", red', "two\nlines", "old\rmac", "win\r\ndows", "🚗", "[SEG]"])
def test_csv_keeps_any_phrase(phrase, tmp_path):
    track = make_track(np.ones((3, *SIZE), dtype=bool), 0, phrase)
    write_csv(make_result([track]), tmp_path / "boxes.csv")
    assert read_csv(tmp_path / "boxes.csv")[0].phrase == phrase


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("frame,time", "index,time", "line 1: expected the columns frame,time"),
        ("\r\n1,", "\r\n2,", "row 3: frame: expected 1, the next one of object 2, got 2"),
        ("red car,1,", "red car,yes,", "row 2: visible: expected 0 or 1, got 'yes'"),
        (",2,red", ",two,red", "row 2: object: expected int, got 'two'"),
        ("\r\n1,", "\r\n1,1,", "row 3: expected 10 values, got 11"),
        ("0,0.0,2", "0,inf,2", "row 2: time: expected a finite number"),
    ],
)
def test_bad_csv_is_refused(old, new, message, tmp_path):
    text = two_objects().to_csv()
    assert old in text
    (tmp_path / "boxes.csv").write_bytes(text.replace(old, new, 1).encode())
    with pytest.raises(ValueError, match=f"boxes.csv: {message}"):
        read_csv(tmp_path / "boxes.csv")


# --- PNG folders ---


def test_pngs_round_trip(result, tmp_path):
    write_pngs(result, tmp_path / "masks")
    loaded = read_pngs(tmp_path / "masks")
    assert sorted(loaded) == [track.id for track in result]
    for track in result:
        assert same_masks(loaded[track.id], track)
        for frame in range(result.num_frames):
            with Image.open(tmp_path / "masks" / str(track.id) / f"{frame:05d}.png") as image:
                assert (image.mode, image.size) == ("L", (127, 63))
                assert np.array_equal(np.asarray(image), track.mask(frame) * np.uint8(255))


def test_indexed_pngs_round_trip(result, tmp_path):
    write_indexed_pngs(result, tmp_path / "labels")
    loaded = read_indexed_pngs(tmp_path / "labels")
    assert len(list((tmp_path / "labels").iterdir())) == result.num_frames
    expected = result.masks
    expected[1:] &= ~expected[:1]  # the first object wins
    for position, masks in enumerate(expected):
        assert (position + 1 in loaded) == masks.any()
        for frame, rle in enumerate(loaded.get(position + 1, [])):
            assert np.array_equal(masks[frame], np.zeros(SIZE, bool) if rle is None else decode_mask(rle))


def test_indexed_pngs_where_objects_overlap(tmp_path):
    result = two_objects()
    write_indexed_pngs(result, tmp_path / "labels")
    with Image.open(tmp_path / "labels" / "00000.png") as image:
        assert image.mode == "P" and image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
        labels = np.asarray(image)
    assert result[0].mask(0)[27, 55] and result[1].mask(0)[27, 55] and labels[27, 55] == 1
    assert (labels[39, 79], labels[0, 0]) == (2, 0)


def test_davis_palette():
    palette = davis_palette()
    assert palette.shape == (256, 3) and palette.dtype == np.uint8
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 4: (0, 0, 128), 7: (128, 128, 128), 8: (64, 0, 0), 22: (0, 192, 128)}
    assert {value: tuple(palette[value].tolist()) for value in expected} == expected
    assert palette[255].tolist() == [224, 224, 192]


def test_indexed_pngs_number_at_most_255_objects(tmp_path):
    result = one_frame()
    mask = np.ones((1, *SIZE), dtype=bool)
    tracks = [make_track(mask, number, None) for number in range(256)]
    with pytest.raises(ExportError, match="at most 255 objects, got 256"):
        write_indexed_pngs(make_result(tracks, timestamps=result.timestamps), tmp_path / "labels")
    assert not list(tmp_path.iterdir())


def bomb_png():
    """A PNG of 100 bytes that says it has 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("2/00001.png", b"no picture", "2: 00001.png: not a PNG that can be read"),
        ("2/00001.png", b"\x89PNG\r\n\x1a\n", "2: 00001.png: not a PNG that can be read"),
        ("2/00001.png", png(np.zeros(SIZE, np.uint8))[:60], "2: 00001.png: not a PNG that can be read"),
        ("2/00001.png", bomb_png(), "2: 00001.png: not a PNG that can be read.*exceeds limit"),
        ("2/00001.png", png(np.full(SIZE, 7, np.uint8)), "2: 00001.png: expected only the values 0 and 255"),
        ("2/00001.png", png(np.zeros((*SIZE, 3), np.uint8)), "2: 00001.png: expected mode L.*got mode RGB"),
        (
            "2/00001.png",
            png(np.zeros((5, 6), np.uint8)),
            r"2: 00001.png: expected mode L, size \(127, 63\).*got .*\(6, 5\)",
        ),
        ("2/00004.png", png(np.zeros(SIZE, np.uint8)), "2: expected the frames 00000.png"),
        ("2/00003.png", png(np.zeros(SIZE, np.uint8)), "the objects have different numbers of frames"),
        ("2/notes.txt", b"", "2: expected the frames 00000.png"),
        ("notes.txt", b"", "notes.txt: expected only folders named by object ids"),
    ],
)
def test_bad_png_folder_is_refused(name, data, message, tmp_path):
    write_pngs(two_objects(), tmp_path / "masks")
    (tmp_path / "masks" / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"masks: {message}"):
        read_pngs(tmp_path / "masks")


# --- writing ---


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_existing_target_is_refused_unless_overwrite(write, tmp_path):
    target = tmp_path / "target"
    write(one_frame(), target)
    before = contents(tmp_path)
    with pytest.raises(ExportError, match="target: it exists; pass overwrite=True"):
        write(two_objects(), target)
    assert contents(tmp_path) == before
    write(two_objects(), target, overwrite=True)
    write(two_objects(), tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "target"]
    if target.is_dir():
        assert contents(target) == contents(tmp_path / "fresh") != before
    else:
        assert target.read_bytes() == (tmp_path / "fresh").read_bytes()


@pytest.mark.parametrize("write", FOLDER_WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("name", ["photo.jpg", "5/diary.txt", "holiday.png", ".hidden"])
def test_overwrite_never_deletes_a_folder_of_something_else(write, name, tmp_path):
    file = tmp_path / "target" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"precious")
    with pytest.raises(ExportError, match="holds other files than masks"):
        write(two_objects(), tmp_path / "target", overwrite=True)
    assert contents(tmp_path) == {file.relative_to(tmp_path): b"precious"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("existing", [False, True])
def test_failing_rename_leaves_nothing(write, existing, tmp_path, monkeypatch):
    target = tmp_path / "target"
    if existing:
        write(one_frame(), target)
    before = contents(tmp_path)
    rename = os.replace

    def replace(source, destination):
        if Path(destination) == target and Path(source).suffix == ".tmp":
            raise PermissionError(13, "Permission denied")
        rename(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ExportError, match=r"cannot write .*target.*Permission denied"):
        write(two_objects(), target, overwrite=existing)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["target"] if existing else [])


class FullDisk:
    """A file opened for writing that takes 10 bytes."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        self.file.write(bytes(data)[:10])
        raise OSError(28, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_full_disk_leaves_nothing(write, tmp_path, monkeypatch):
    real_open = open
    wrote = []

    def full_open(file, mode="r", *args, **kwargs):
        opened = real_open(file, mode, *args, **kwargs)
        if "w" not in mode:
            return opened
        wrote.append(file)
        return FullDisk(opened)

    # pathlib opens files by io.open, Pillow by the built-in
    monkeypatch.setattr(io, "open", full_open)
    monkeypatch.setattr(builtins, "open", full_open)
    with pytest.raises(ExportError, match=r"cannot write .*target.*No space left"):
        write(two_objects(), tmp_path / "target")
    monkeypatch.undo()
    assert wrote and not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@pytest.mark.parametrize("parent", ["missing", "file"])
def test_impossible_parent_folder(write, parent, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ExportError, match=r"cannot write .*target"):
        write(two_objects(), tmp_path / parent / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ObjectTrack, "mask", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pngs(two_objects(), tmp_path / "masks")
    assert not list(tmp_path.iterdir())


def test_written_files_obey_the_umask(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    write_json(two_objects(), tmp_path / "result.json")
    write_pngs(two_objects(), tmp_path / "masks")
    assert (tmp_path / "result.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "masks").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_methods_write_the_same_files(tmp_path):
    result = two_objects()
    result.save_json(tmp_path / "result.json")
    result.save_pngs(tmp_path / "masks")
    result.save_indexed_pngs(tmp_path / "labels")
    assert (tmp_path / "result.json").read_text() == result.to_json() + "\n"
    assert sorted(read_pngs(tmp_path / "masks")) == [2, 7]
    assert sorted(read_indexed_pngs(tmp_path / "labels")) == [1, 2]


def test_text_that_utf8_cannot_hold_is_an_export_error(tmp_path):
    track = make_track(np.ones((3, *SIZE), dtype=bool), 0, "a\ud800b")
    with pytest.raises(ExportError, match="surrogates not allowed"):
        write_csv(make_result([track]), tmp_path / "boxes.csv")
    assert not list(tmp_path.iterdir())


# --- file names ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", "clip"),
        ("a b  c", "a_b_c"),
        ("🚗 red 🚗 car", "red_car"),
        ("[SEG]", "SEG"),
        ('"it\'s"', "it_s"),
        ("../../etc/passwd", "etc_passwd"),
        ("..", "unnamed"),
        ("", "unnamed"),
        ("🚗", "unnamed"),
        ("-rf", "rf"),
        ("a\x00b\nc", "a_b_c"),
        ("a\udcffb", "a_b"),
        ("C:\\clip", "C_clip"),
        ("con", "con_"),
        ("été 龟", "été_龟"),
        ("／", "unnamed"),
        ("x" * 255, "x" * 200),
        ("龟" * 255, "龟" * 66),
    ],
)
def test_safe_stem(name, expected, tmp_path):
    stem = safe_stem(name)
    assert stem == expected
    (tmp_path / f"{stem}_overlay.json").write_bytes(b"")
    assert safe_stem(stem) == stem
