"""Submission archives: exact layout, and every check that an archive can fail."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from modeling_sparrow.evaluation import (
    EvaluationError,
    MevisDataset,
    ReasonVosDataset,
    RefYoutubeVosDataset,
    check_submission,
    write_submission,
)
from modeling_sparrow.evaluation.files import write_label_map, write_mask

from .fake_data import SIZE, moving_square


@pytest.fixture
def mevis(mevis_root):
    return MevisDataset(mevis_root, split="valid")


@pytest.fixture
def predictions(mevis, tmp_path):
    for sample in mevis:
        for index, path in enumerate(sample.prediction_paths(tmp_path / "pred")):
            write_mask(path, moving_square(index))
    return tmp_path / "pred"


def png(mask: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, format="PNG")
    return stream.getvalue()


def test_mevis_archive_has_no_top_folder(mevis, predictions, tmp_path):
    submission = write_submission(mevis, predictions, tmp_path / "out" / "mevis.zip")
    assert (submission.videos, submission.expressions, submission.frames) == (2, 4, 12)
    with zipfile.ZipFile(submission.path) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == sorted(
            f"{video}/{expression}/{frame:05d}.png"
            for video in ("aaa", "bbb")
            for expression in "01"
            for frame in range(3)
        )
        with Image.open(io.BytesIO(archive.read("bbb/1/00002.png"))) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", SIZE[::-1])
            assert set(np.unique(image)) == {0, 255}
    assert check_submission(mevis, submission.path) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mevis.zip"]


def test_youtube_vos_archive_keeps_the_top_folder(youtube_root, tmp_path):
    dataset = RefYoutubeVosDataset(youtube_root)
    for sample in dataset:
        for path in sample.prediction_paths(tmp_path / "pred"):
            write_mask(path, moving_square(0))
    submission = write_submission(dataset, tmp_path / "pred", tmp_path / "rvos.zip")
    with zipfile.ZipFile(submission.path) as archive:
        assert sorted(archive.namelist()) == sorted(
            f"Annotations/v1/{expression}/{frame}.png" for expression in "01" for frame in ("00000", "00005", "00015")
        )
    assert check_submission(dataset, submission.path) == []


def test_bad_predictions_leave_no_archive(mevis, predictions, tmp_path):
    target = tmp_path / "out" / "mevis.zip"
    (predictions / "aaa" / "0" / "00001.png").unlink()
    with pytest.raises(EvaluationError, match=r"aaa/0/00001\.png: missing"):
        write_submission(mevis, predictions, target)
    write_mask(predictions / "aaa" / "0" / "00001.png", np.zeros((10, 10)))
    write_label_map(predictions / "aaa" / "1" / "00000.png", moving_square(0))
    Image.fromarray(moving_square(0).astype(np.uint8)).save(predictions / "bbb" / "0" / "00000.png")
    (predictions / "bbb" / "1" / "00000.png").write_bytes(b"\x89PNG")
    with pytest.raises(EvaluationError) as caught:
        write_submission(mevis, predictions, target)
    message = str(caught.value)
    assert "4 problem(s), no submission written" in message
    assert "aaa/0/00001.png: 10 x 10 pixels (height x width), expected 24 x 40" in message
    assert "aaa/1/00000.png: PNG of mode P, expected an 8-bit grey PNG (mode L)" in message
    assert "bbb/0/00000.png: values [0, 1], expected 0 and 255" in message
    assert "bbb/1/00000.png: not a readable PNG" in message
    assert not target.exists() and not list(tmp_path.glob("out/*"))


def test_foreign_archives_are_checked(mevis, predictions, tmp_path):
    path = tmp_path / "foreign.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for sample in mevis:
            for file in sample.prediction_paths(predictions):
                archive.write(file, "Annotations/" + file.relative_to(predictions).as_posix())
    problems = check_submission(mevis, path)  # the top folder is wrong for MeViS
    assert "aaa/0/00000.png: missing" in problems and len(problems) == 24
    unexpected = "Annotations/aaa/0/00000.png: not expected; entries are <video>/<expression id>/<frame>.png"
    assert unexpected in problems
    good = write_submission(mevis, predictions, tmp_path / "good.zip").path
    with zipfile.ZipFile(good, "a") as archive:
        archive.writestr("readme.txt", "hello")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("aaa/0/00000.png", png(np.zeros(SIZE, np.uint8)))
    problems = check_submission(mevis, good)
    assert problems[0] == "1 entries occur twice"
    assert problems[1].startswith("readme.txt: not expected") and len(problems) == 2
    path.write_bytes(b"not an archive")
    with pytest.raises(EvaluationError, match=r"foreign\.zip: not a readable zip"):
        check_submission(mevis, path)


def test_pictures_are_needed_for_their_size(mevis, mevis_root, predictions, tmp_path):
    (mevis_root / "valid" / "JPEGImages" / "bbb" / "00000.jpg").unlink()
    with pytest.raises(EvaluationError, match=r"bbb/00000\.jpg: video frame cannot be read"):
        write_submission(mevis, predictions, tmp_path / "x.zip")


def test_other_benchmarks_take_no_submissions(reasonvos_root, tmp_path):
    with pytest.raises(ValueError, match="reasonvos takes no submissions"):
        write_submission(ReasonVosDataset(reasonvos_root), tmp_path, tmp_path / "x.zip")
