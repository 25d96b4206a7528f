"""Pictures with boxes for stage 0."""

import json

import numpy as np
import pytest
from PIL import Image

from modeling_sparrow.training.pictures import BoxedPicture, CocoPictures, PictureBuilder, SyntheticPictures
from modeling_sparrow.training.records import RecordError, SkipRecordError


def write_coco(folder, annotations, images=({"id": 7, "file_name": "a.png"},)):
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(folder / "a.png")
    file = folder / "boxes.json"
    file.write_text(json.dumps({"images": list(images), "annotations": annotations}), encoding="utf-8")
    return file


def test_crowds_and_specks_are_left_out(tmp_path):
    annotations = [
        {"image_id": 7, "bbox": [10, 5, 20, 30], "category_id": 3},
        {"image_id": 7, "bbox": [0, 0, 30, 30], "iscrowd": 1},
        {"image_id": 7, "bbox": [4, 4, 1.5, 20]},
        {"image_id": 7, "bbox": [1, 2, 2, 2], "iscrowd": 0},
    ]
    source = CocoPictures(write_coco(tmp_path, annotations), tmp_path)
    item = source.read(0, np.random.default_rng(0))
    assert len(source) == 1 and item.picture.shape == (40, 60, 3)
    assert item.boxes.tolist() == [[10, 5, 30, 35], [1, 2, 3, 4]]


def test_a_picture_without_boxes_is_kept(tmp_path):
    item = CocoPictures(write_coco(tmp_path, []), tmp_path).read(0, np.random.default_rng(0))
    assert item.boxes.shape == (0, 4)
    sample = PictureBuilder(64, augment=True)(item, np.random.default_rng(0))
    assert sample["boxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("annotations", "images", "message"),
    [
        ([{"image_id": 8, "bbox": [0, 0, 9, 9]}], [{"id": 7, "file_name": "a.png"}], "COCO's form"),
        ([{"image_id": 7, "bbox": [0, 0, 9]}], [{"id": 7, "file_name": "a.png"}], "COCO's form"),
        ([], [{"id": 7}], "COCO's form"),
        ([], [], "lists no images"),
    ],
)
def test_files_of_another_form(annotations, images, message, tmp_path):
    with pytest.raises(RecordError, match=message):
        CocoPictures(write_coco(tmp_path, annotations, images), tmp_path)


def test_absent_files(tmp_path):
    with pytest.raises(RecordError, match="No such file"):
        CocoPictures(tmp_path / "boxes.json", tmp_path)
    source = CocoPictures(write_coco(tmp_path, []), tmp_path / "elsewhere")
    with pytest.raises(RecordError, match=r"picture .*a\.png"):
        source.read(0, np.random.default_rng(0))


def test_boxes_stay_on_their_object_through_flips_and_cuts():
    picture = np.zeros((60, 80, 3), dtype=np.uint8)
    picture[20:40, 10:50] = 255
    item = BoxedPicture(picture, np.array([[10, 20, 50, 40]], dtype=np.float32))
    size, seen = 96, 0
    for seed in range(40):
        sample = PictureBuilder(size, augment=True)(item, np.random.default_rng(seed))
        bright = sample["mask_pixel_values"][0].numpy() > 0
        if not len(sample["boxes"]):
            continue
        seen += 1
        x, y, w, h = (sample["boxes"][0] * size).tolist()
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert found == pytest.approx([x - w / 2, y - h / 2, x + w / 2, y + h / 2], abs=1.5)
    assert seen > 30


def test_without_augmentation_the_whole_picture():
    picture = np.zeros((50, 100, 3), dtype=np.uint8)
    item = BoxedPicture(picture, np.array([[20, 10, 60, 30]], dtype=np.float32))
    sample = PictureBuilder(64, augment=False)(item, np.random.default_rng(0))
    assert sample["boxes"].tolist() == [pytest.approx([0.4, 0.4, 0.4, 0.4])]
    with pytest.raises(SkipRecordError):
        PictureBuilder(64, augment=False)(BoxedPicture(picture[:1], item.boxes), np.random.default_rng(0))


def test_frames_of_the_generated_world():
    source = SyntheticPictures(world={"height": 64, "width": 64}, size=5)
    item = source.read(3, np.random.default_rng(0))
    again = source.read(3, np.random.default_rng(0))
    assert item.picture.shape == (64, 64, 3) and len(item.boxes)
    assert (item.picture == again.picture).all() and (item.boxes == again.boxes).all()
    assert (item.boxes[:, 2:] > item.boxes[:, :2]).all() and item.boxes.max() <= 64
