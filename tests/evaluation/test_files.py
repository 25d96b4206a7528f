"""Reading and writing of masks and dictionaries; what cannot be read names the file."""

import pickle

import numpy as np
import pytest
from PIL import Image

from modeling_sparrow.evaluation.files import (
    EvaluationError,
    MissingPredictionError,
    atomic_path,
    davis_palette,
    decode_rle,
    read_json,
    read_label_map,
    read_mask,
    read_mask_dict,
    write_label_map,
    write_mask,
)


def test_mask_round_trip(tmp_path):
    mask = np.random.default_rng(0).random((7, 9)) < 0.5
    write_mask(tmp_path / "a" / "m.png", mask)
    with Image.open(tmp_path / "a" / "m.png") as image:
        assert (image.format, image.mode) == ("PNG", "L")
        assert set(np.unique(image)) == {0, 255}
    assert np.array_equal(read_mask(tmp_path / "a" / "m.png", (7, 9)), mask)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["m.png"]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_any_non_zero_value_is_foreground(tmp_path, mode):
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 2:5] = 1
    if mode in ("RGB", "RGBA"):
        image = np.zeros((4, 6, len(mode)), np.uint8)
        image[..., 2] = mask
        image[..., 3:] = 255  # opaque everywhere: transparency is not foreground
        picture = Image.fromarray(image)
    elif mode == "I;16":
        picture = Image.fromarray(mask.astype(np.uint16) * 256)
    elif mode == "P":
        picture = Image.fromarray(mask).convert("P")
        picture.putpalette([0, 0, 0] * 256)  # a black entry stays an object: the index counts, not the colour
        picture.putdata(mask.ravel().tolist())
    else:
        picture = Image.fromarray(mask.astype(bool) if mode == "1" else mask)
    picture.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), mask != 0)


def test_label_map_round_trip(tmp_path):
    labels = np.arange(30, dtype=np.uint8).reshape(5, 6)
    labels[0, 0] = 255
    write_label_map(tmp_path / "m.png", labels)
    assert np.array_equal(read_label_map(tmp_path / "m.png"), labels)
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P" and image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert davis_palette()[-3:] == [224, 224, 192]


def test_unreadable_masks_name_the_file(tmp_path):
    path = tmp_path / "m.png"
    with pytest.raises(MissingPredictionError, match=r"m\.png: missing"):
        read_mask(path)
    write_mask(path, np.ones((40, 60), bool) ^ np.eye(40, 60, dtype=bool))
    with pytest.raises(EvaluationError, match=r"m\.png: 40 x 60 pixels .* expected 40 x 61"):
        read_mask(path, (40, 61))
    content = path.read_bytes()
    for damaged in (b"", b"not a picture", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(EvaluationError, match=r"m\.png: not a readable PNG"):
            read_mask(path)
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(path)
    with pytest.raises(EvaluationError, match=r"m\.png: image mode RGB"):
        read_label_map(path)


def test_atomic_path_leaves_nothing_behind(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_bad_json_names_the_file(tmp_path):
    with pytest.raises(EvaluationError, match=r"a\.json: cannot be read"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_uncompressed_and_damaged_encodings():
    mask = decode_rle({"size": [2, 3], "counts": [1, 2, 3]}, "somewhere")
    assert mask.T.ravel().tolist() == [0, 1, 1, 0, 0, 0]
    with pytest.raises(EvaluationError, match="somewhere: not a COCO"):
        decode_rle({"size": [2, 3]}, "somewhere")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_mask_dictionary_from_pickle(tmp_path, protocol):
    shared = {"size": [2, 3], "counts": "abc"}
    content = {"0": [shared, None, shared], "1": [{"size": (2, 3), "counts": "é"}, 300, -5, 1 << 40, 0.5, True]}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(content, protocol))
    read = read_mask_dict(tmp_path / "m.pkl")
    assert read["0"] == content["0"]
    assert read["1"][0] == {"size": [2, 3], "counts": "é"} and read["1"][1:] == content["1"][1:]


def test_mask_dictionary_with_bytes(tmp_path):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"0": [{"size": [2, 3], "counts": b"\x00\xff"}]}, 4))
    assert read_mask_dict(tmp_path / "m.pkl") == {"0": [{"size": [2, 3], "counts": b"\x00\xff"}]}


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_executed(tmp_path):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"0": _Harmful(tmp_path / "written")}))
    with pytest.raises(EvaluationError, match=r"m\.pkl: not a pickle of plain .*STACK_GLOBAL.* as JSON"):
        read_mask_dict(tmp_path / "m.pkl")
    assert not (tmp_path / "written").exists()
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"0": [1, 2]})[:-4])
    with pytest.raises(EvaluationError, match=r"m\.pkl: not a pickle"):
        read_mask_dict(tmp_path / "m.pkl")
    (tmp_path / "m.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(EvaluationError, match=r"m\.pkl: expected a dictionary"):
        read_mask_dict(tmp_path / "m.pkl")
