"""RLE helpers, `ObjectTrack` and `GroundingResult`."""

import json
import sys
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from sparrow_processing.errors import ExportError
from sparrow_processing.results import (
    MAX_MASK_PIXELS,
    GroundingResult,
    ObjectTrack,
    decode_mask,
    encode_mask,
    mask_to_box,
    validate_rle,
)


def make_track(masks, id=0, phrase=None, span=None, score=0.9, **changes):
    """A track of bool masks (T, H, W), absent where a mask is empty."""
    boxes = np.stack([mask_to_box(mask) for mask in masks])
    visible = np.array([mask.any() for mask in masks])
    fields = {
        "boxes": boxes,
        "scores": np.where(visible, np.float32(0.7), np.float32(0)),
        "visible": visible,
        "rles": [encode_mask(mask) if mask.any() else None for mask in masks],
        "size": masks.shape[1:],
    }
    return ObjectTrack(id=id, phrase=phrase, span=span, score=score, **(fields | changes))


def make_result(tracks, frames=3, size=(63, 127), text="the red car and a dog", **changes):
    fields = {
        "query": "what moves?",
        "text": text,
        "objects": tracks,
        "size": size,
        "fps": 25.0,
        "timestamps": np.arange(frames) / 25,
        "sampled_frames": [0],
    }
    return GroundingResult(**(fields | changes))


def rectangle(frames=3, size=(63, 127), box=(10, 5, 30, 25)):
    masks = np.zeros((frames, *size), dtype=bool)
    x0, y0, x1, y1 = box
    masks[:, y0:y1, x0:x1] = True
    return masks


# --- RLE ---


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (63, 127), (64, 48)])
@pytest.mark.parametrize("density", [0.0, 0.03, 0.5, 1.0])
def test_encode_decode_identity(size, density):
    generator = np.random.default_rng(size[0] * 1000 + int(100 * density))
    for _ in range(10):
        mask = generator.random(size) < density
        rle = encode_mask(mask)
        decoded = decode_mask(json.loads(json.dumps(rle)))
        assert decoded.dtype == np.bool_ and np.array_equal(decoded, mask)
        assert rle["size"] == list(size)
        assert int(mask_utils.area(rle)) == mask.sum()


def test_agrees_with_pycocotools_on_long_runs():
    """Runs of up to 25 bits, which take 5 and 6 characters, and large negative differences."""
    mask = np.zeros((4096, 8192), dtype=bool)
    mask[0, 0] = mask[-1, -1] = True
    mask[:, 3000:6000] = True
    theirs = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    rle = encode_mask(mask)
    assert rle["counts"] == theirs["counts"].decode()
    validate_rle(rle)
    assert np.array_equal(decode_mask(rle), mask)


def test_known_encoding():
    """Column order: [[0, 1], [1, 1]] has the runs 1, 3, which are the characters chr(48 + 1), chr(48 + 3)."""
    assert encode_mask(np.array([[False, True], [True, True]])) == {"size": [2, 2], "counts": "13"}


@pytest.mark.parametrize(
    "mask",
    [np.zeros((2, 2), np.uint8), np.zeros((2, 2, 2), bool), np.zeros((0, 4), bool)],
    ids=["uint8", "3d", "empty"],
)
def test_encode_refuses_what_is_not_a_mask(mask):
    with pytest.raises(ValueError, match=r"expected a bool array \(H, W\)"):
        encode_mask(mask)


def number(value):
    """One number of COCO's compressed RLE, written independently of the library: 5 bits a character, sign-extended."""
    text = ""
    while True:
        bits, value = value & 31, value >> 5
        more = value != (-1 if bits & 16 else 0)
        text += chr(48 + bits + 32 * more)
        if not more:
            return text


def test_number_helper_agrees_with_pycocotools():
    assert encode_mask(np.ones((40, 50), dtype=bool))["counts"] == number(0) + number(2000)


@pytest.mark.parametrize(
    ("size", "counts", "message"),
    [
        ([2, 2], number(3), "add up to 3, expected 4"),
        ([2, 2], number(4) + number(1), "add up to 5"),
        ([2, 2], number(5) + number(-1), "negative run -1"),
        ([2, 2], number(1) + number(1) + number(2) + number(-2) + number(0), "negative run -1"),
        ([2, 2], number(10**9), "longer than 6"),
        ([2, 2], number(2**31), "longer than 6"),
        ([2, 2], number(2**63), "longer than 6"),
        ([2, 2], "o" * 100_000 + "0", "longer than 6"),
        ([2, 2], "P", "middle of a number"),
        ([2, 2], "", "non-empty ASCII"),
        ([2, 2], "4é", "non-empty ASCII"),
        ([2, 2], "4\x00", "outside the RLE alphabet"),
        ([2, 2], "4\x7f", "outside the RLE alphabet"),
        ([2, 2], [1, 3], "compressed string, got list"),
        ([2, 2], b"13", "compressed string, got bytes"),
        ([10**9, 10**9], number(1), "expected 1 to"),
        ([MAX_MASK_PIXELS, 2], number(1), "expected 1 to"),
        ([0, 0], number(0), "expected 1 to"),
        ([-2, -2], number(4), "expected 1 to"),
        ([2], number(4), r"expected \[height, width\]"),
        ([2.0, 2.0], number(4), r"expected \[height, width\]"),
        ([True, 4], number(4), r"expected \[height, width\]"),
        ("22", number(4), r"expected \[height, width\]"),
    ],
)
def test_malicious_rle_is_refused(size, counts, message):
    rle = {"size": size, "counts": counts}
    with pytest.raises(ValueError, match=message):
        validate_rle(rle)
    with pytest.raises(ValueError, match=message):
        decode_mask(rle)


@pytest.mark.parametrize("rle", [None, [], "13", {"size": [2, 2]}, {"counts": "13"}])
def test_rle_needs_both_fields(rle):
    with pytest.raises(ValueError, match="fields size and counts"):
        validate_rle(rle)


def test_validation_allocates_nothing_of_the_mask_size():
    tracemalloc.start()
    with pytest.raises(ValueError, match="add up to"):
        validate_rle({"size": [16384, 16384], "counts": number(1) * 100_000})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_MASK_PIXELS / 10


def test_the_largest_mask_is_valid():
    validate_rle({"size": [16384, 16384], "counts": number(MAX_MASK_PIXELS)})


# --- boxes ---


def test_mask_to_box_has_exclusive_maximum():
    mask = np.zeros((63, 127), dtype=bool)
    mask[5:8, 10:12] = True
    box = mask_to_box(mask)
    assert box.dtype == np.float32 and box.tolist() == [10, 5, 12, 8]
    x, y, width, height = mask_utils.toBbox(encode_mask(mask)).tolist()
    assert [x, y, x + width, y + height] == box.tolist()


def test_mask_to_box_of_full_and_empty_mask():
    assert mask_to_box(np.ones((3, 4), dtype=bool)).tolist() == [0, 0, 4, 3]
    assert np.isnan(mask_to_box(np.zeros((3, 4), dtype=bool))).all()


# --- ObjectTrack ---


def test_track_masks():
    masks = rectangle()
    masks[1] = False
    track = make_track(masks)
    assert len(track) == 3
    assert np.array_equal(track.masks, masks) and track.masks.dtype == np.bool_
    assert not track.mask(1).any() and track.mask(1).shape == (63, 127)
    assert [mask.sum() for mask in track.iter_masks()] == [400, 0, 400]
    assert np.isnan(track.boxes[1]).all()


def test_track_normalises_its_fields():
    track = make_track(rectangle(1), id=np.int64(4), score=np.float32(0.5), boxes=[[1, 2, 3, 4]], scores=[1])
    assert type(track.id) is int and type(track.score) is float
    assert track.boxes.dtype == np.float32 and track.scores.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": np.zeros((2, 4))}, r"boxes: expected shape \(3, 4\).*received \(2, 4\)"),
        ({"boxes": np.zeros((3, 5))}, r"boxes: expected shape \(3, 4\)"),
        ({"scores": np.zeros(2)}, r"scores: expected shape \(3,\).*received \(2,\)"),
        ({"visible": np.ones((3, 1), bool)}, r"visible: expected shape \(3,\)"),
        ({"visible": np.ones(3)}, "visible: expected bool, received float64"),
        ({"scores": [0, np.nan, 0]}, "scores: expected finite"),
        ({"score": float("inf")}, "scores: expected finite"),
        ({"boxes": [[0, 0, 1, np.nan]] * 3}, "boxes: expected rows of finite"),
        ({"boxes": [[0, 0, 1, np.inf]] * 3}, "boxes: expected rows of finite"),
        ({"boxes": [[5, 0, 1, 2]] * 3}, "x0 <= x1"),
        ({"rles": []}, "at least one frame"),
        ({"rles": [None, None, encode_mask(np.ones((2, 2), bool))]}, r"rles\[2\]: expected size \(63, 127\)"),
        ({"size": (63,)}, r"expected \(height, width\)"),
        ({"size": (0, 127)}, r"expected \(height, width\)"),
        ({"size": (10**9, 10**9)}, "at most"),
        ({"span": (3, 1)}, "span: expected 0 <= start <= end"),
        ({"id": -1}, "id: expected 0 or more"),
    ],
)
def test_track_refuses_wrong_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        make_track(rectangle(), **changes)


# --- GroundingResult ---


def test_result_is_a_sequence_of_objects():
    first, second = make_track(rectangle(), id=3), make_track(rectangle(box=(0, 0, 5, 5)), id=7)
    result = make_result([first, second])
    assert len(result) == 2 and list(result) == [first, second] and result[-1] is second
    assert result.num_frames == 3
    assert result.masks.shape == (2, 3, 63, 127)
    assert result.masks.sum(axis=(1, 2, 3)).tolist() == [3 * 400, 3 * 25]


def test_result_without_objects():
    result = make_result([])
    assert len(result) == 0 and result.masks.shape == (0, 3, 63, 127)


@pytest.mark.parametrize(
    ("timestamps", "fps", "expected"),
    [([0.0, 0.1, 0.4], 5.0, 0.6), ([0.0], 25.0, 0.04), ([0.0], 0.0, 0.0), ([0.0, 0.0], 0.0, 0.0)],
    ids=["variable", "one frame", "one frame, no rate", "two frames at once"],
)
def test_duration(timestamps, fps, expected):
    result = make_result([], timestamps=timestamps, fps=fps)
    assert result.duration == pytest.approx(expected)


def test_span_indexes_the_text():
    text = "the red car and a dog"
    result = make_result([make_track(rectangle(), phrase="red car", span=(4, 11))], text=text)
    start, end = result[0].span
    assert result.text[start:end] == result[0].phrase == "red car"


def test_filter_returns_a_new_result():
    tracks = [make_track(rectangle(), id=position, score=score) for position, score in enumerate([0.2, 0.5, 0.8])]
    result = make_result(tracks, warnings=["dark"])
    kept = result.filter(0.5)
    assert [track.id for track in kept] == [1, 2] and len(result) == 3
    assert kept.warnings == ["dark"] and kept.query == result.query
    assert len(result.filter(0.9)) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamps": []}, "T >= 1"),
        ({"timestamps": [[0.0]]}, r"expected shape \(T,\)"),
        ({"timestamps": [0.0, np.nan, 1.0]}, "timestamps: expected finite"),
        ({"timestamps": [0.0, 0.2, 0.1]}, "never decrease"),
        ({"timestamps": [0.0, 0.1]}, r"objects\[0\]: expected 2 frames.*received 3"),
        ({"size": (127, 63)}, r"objects\[0\]: expected 3 frames of \(127, 63\)"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": -1}, "fps"),
        ({"sampled_frames": [0, 3]}, "sampled_frames: expected indices from 0 to 2"),
        ({"time_span": (2.0, 1.0)}, "time_span"),
        ({"time_span": (0.0, float("inf"))}, "time_span"),
        ({"timings": {"host": float("nan")}}, "timings"),
        ({"text": "car"}, "span .* outside the answer"),
    ],
)
def test_result_refuses_wrong_fields(changes, message):
    track = make_track(rectangle(), span=(0, 5))
    with pytest.raises(ValueError, match=message):
        make_result([track], **changes)


def test_result_refuses_equal_ids():
    track = make_track(rectangle())
    with pytest.raises(ValueError, match="distinct ids"):
        make_result([track, track])


def test_html_is_escaped():
    track = make_track(rectangle(), phrase="<img src=x onerror=alert(1)>")
    attack = "<script>alert('&')</script>"
    html = make_result([track], query=attack, text=attack, warnings=[attack])._repr_html_()
    assert "<script" not in html and "<img" not in html
    assert html.count("&lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;") == 3
    assert "&lt;img src=x onerror=alert(1)&gt;" in html and "3 / 3" in html


# --- hand-over to other modules ---


class Reader:
    """The attributes of a `VideoReader` that `save_video` looks at."""

    height, width = 63, 127

    def __init__(self, frames):
        self.frames = frames

    def __len__(self):
        return self.frames


@pytest.fixture
def overlays(monkeypatch):
    """Calls of `write_overlay`, which has its own tests."""
    calls = []
    module = SimpleNamespace(write_overlay=lambda *args, **options: calls.append((args, options)))
    monkeypatch.setitem(sys.modules, "sparrow_processing.overlays", module)
    return calls


def test_save_video_passes_the_tracks_on(overlays, tmp_path):
    result, reader = make_result([make_track(rectangle())]), Reader(3)
    result.save_video(tmp_path / "out.mp4", reader, progress=True)
    assert overlays == [((tmp_path / "out.mp4", reader, result.objects), {"progress": True})]


def test_save_video_refuses_another_video(overlays, tmp_path):
    result = make_result([make_track(rectangle())])
    with pytest.raises(
        ValueError, match=r"expected the video of this result.*\(3, 63, 127\), received \(2, 63, 127\)"
    ):
        result.save_video(tmp_path / "out.mp4", Reader(2))
    assert not overlays


def test_save_video_keeps_an_existing_file(overlays, tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"precious")
    result = make_result([make_track(rectangle())])
    with pytest.raises(ExportError, match="it exists; pass overwrite=True"):
        result.save_video(path, Reader(3))
    assert not overlays
    result.save_video(path, Reader(3), overwrite=True)
    assert len(overlays) == 1


def test_to_supervision_passes_the_objects_of_the_frame(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    absent = rectangle(box=(0, 0, 5, 5))
    absent[1] = False
    tracks = [make_track(absent, id=5, phrase="dog"), make_track(rectangle(), id=9, phrase="car")]
    detections = make_result(tracks).to_supervision(1)
    assert detections.xyxy.tolist() == [[10, 5, 30, 25]]
    assert detections.mask.shape == (1, 63, 127) and detections.mask.sum() == 400
    assert detections.confidence.tolist() == [np.float32(0.7)]
    assert detections.class_id.tolist() == [1] and detections.tracker_id.tolist() == [9]
    assert detections.data["class_name"].tolist() == ["car"]


def test_to_supervision_with_the_real_package():
    supervision = pytest.importorskip("supervision", reason="supervision is not installed")
    detections = make_result([make_track(rectangle(), id=9, phrase="car")]).to_supervision(0)
    assert isinstance(detections, supervision.Detections) and len(detections) == 1
    assert detections.tracker_id.tolist() == [9]
    assert len(make_result([]).to_supervision(0)) == 0


def test_to_supervision_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        make_result([]).to_supervision(0)


def test_replace_checks_again():
    with pytest.raises(ValueError, match="timestamps"):
        replace(make_result([]), timestamps=[1.0, 0.0])
