import os
import resource
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from sparrow_processing.errors import ExportError
from sparrow_processing.overlays import (
    OUTLINES,
    PALETTE,
    VideoWriter,
    draw_overlay,
    film_strip,
    object_color,
    object_outline,
    write_overlay,
)
from sparrow_processing.results import GroundingResult
from sparrow_processing.video_io import open_video

from .clip_factory import numbered_picture, write_clip

NO_BOX = np.full((1, 4), np.nan)


def square_mask(height, width, top, left, side):
    mask = np.zeros((height, width), dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_palette_colors_are_distinct():
    colors = np.array(PALETTE, dtype=float)
    assert len(colors) >= 16
    distances = np.linalg.norm(colors[:, None] - colors[None], axis=2) + 1000 * np.eye(len(colors))
    assert distances.min() > 50
    assert object_color(3) == PALETTE[3] == object_color(3 + len(PALETTE))


# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# severity 1.0, for linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def to_lab(linear):
    """CIE Lab of linear sRGB (n, 3), white point D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_first_colors_are_told_apart_without_full_colour_vision(deficiency):
    colors = np.array(PALETTE[:7]) / 255
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    lab = to_lab(np.clip(linear @ np.array(DEFICIENCIES[deficiency]).T, 0, 1))
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=2) + 1000 * np.eye(7)
    assert distances.min() > 15  # 2.3 is a just noticeable difference


def test_outlines_are_told_apart_without_colour():
    frame, mask = np.zeros((200, 300, 3), dtype=np.uint8), square_mask(200, 300, 80, 50, 60)
    edges = []
    for number, name in enumerate(OUTLINES):
        drawn = draw_overlay(frame, mask[None], NO_BOX, [""], [number])
        edges.append((drawn == object_color(number)).all(axis=2) & mask)
        assert object_outline(number) == object_outline(number + len(OUTLINES)) == name
    solid, dashed, dotted, double = (int(edge.sum()) for edge in edges)
    assert solid == 60**2 - 58**2 and double == solid + 56**2 - 54**2
    assert dotted < dashed < solid
    for edge in (edges[1], edges[2]):
        assert not (edge & ~edges[0]).any()


def test_mask_is_tinted_and_has_a_contour():
    frame = np.full((200, 300, 3), 100, dtype=np.uint8)
    mask = square_mask(200, 300, 80, 50, 40)
    drawn = draw_overlay(frame, mask[None], NO_BOX, [""], [4])  # one with a solid outline
    color = np.array(object_color(4))
    np.testing.assert_allclose(drawn[100, 70].astype(int), 100 * 0.55 + color * 0.45, atol=1)
    for place in ((80, 70), (119, 70), (100, 50), (100, 89)):
        assert drawn[place].tolist() == color.tolist()
    outside = ~mask
    outside[:80] = False  # where the label is
    assert (drawn[outside] == 100).all()
    assert (frame == 100).all()


def test_box_lies_on_its_outermost_pixels():
    frame = np.zeros((200, 300, 3), dtype=np.uint8)
    masks = np.zeros((1, 200, 300), dtype=bool)
    drawn = draw_overlay(frame, masks, np.array([[50.2, 80.0, 90.0, 119.6]]), [""], [2])
    painted = (drawn[90:] == object_color(2)).all(axis=2)  # below the label
    rows, columns = np.nonzero(painted)
    assert (columns.min(), columns.max(), rows.max() + 90) == (50, 89, 119)


def test_absent_object_leaves_no_trace():
    frame = numbered_picture(9)
    drawn = draw_overlay(frame, np.zeros((1, 48, 64), dtype=bool), NO_BOX, ["ghost"], [0])
    np.testing.assert_array_equal(drawn, frame)
    np.testing.assert_array_equal(
        draw_overlay(frame, np.zeros((0, 48, 64), dtype=bool), np.zeros((0, 4)), [], []), frame
    )


@pytest.mark.parametrize("height, width", [(64, 64), (480, 854), (2000, 4000), (8, 8), (1, 1)])
def test_label_scales_with_the_picture(height, width):
    frame = np.zeros((height, width, 3), dtype=np.uint8)
    side = max(1, min(height, width) // 3)
    mask = square_mask(height, width, height // 2, width // 4, side)
    drawn = draw_overlay(frame, mask[None], NO_BOX, ["turtle"], [2])
    assert drawn.shape == frame.shape
    if height >= 64:
        # The plate directly above the mask is a line of text high: readable, and not hiding the picture.
        plate = (drawn[: height // 2, width // 4] == object_color(2)).all(axis=1)
        assert max(9, height / 30) <= plate.sum() <= max(16, height / 12)


def test_labels_of_neighbours_do_not_cover_each_other():
    frame = np.zeros((480, 640, 3), dtype=np.uint8)
    masks = np.zeros((2, 480, 640), dtype=bool)
    boxes = np.array([[100, 100, 200, 300], [110, 100, 220, 300]], dtype=float)
    drawn = draw_overlay(frame, masks, boxes, ["same words", "same words"], [0, 1])
    areas = [(drawn == object_color(number)).all(axis=2)[:, 100:200].sum() for number in (0, 1)]
    alone = [
        (draw_overlay(frame, masks[:1], boxes[k : k + 1], ["same words"], [k]) == object_color(k)).all(axis=2)[
            :, 100:200
        ]
        for k in (0, 1)
    ]
    assert areas[0] > 0.8 * alone[0].sum() and areas[1] > 0.8 * alone[1].sum()


@pytest.mark.parametrize(
    "label", ["", "x" * 5000, "two\nlines\t\0", "\ud800 lone surrogate", "海龟 🐢", '<b>"quoted"</b>']
)
def test_any_label_can_be_drawn(label):
    frame = numbered_picture(1)
    drawn = draw_overlay(frame, square_mask(48, 64, 30, 10, 10)[None], np.array([[10, 30, 20, 40.0]]), [label], [7])
    assert drawn.shape == frame.shape


@pytest.mark.parametrize("box", [[-50, -50, 500, 500], [1e9, 1e9, 2e9, 2e9], [10, 10, 10, 10]])
def test_boxes_beyond_the_picture_are_clipped(box):
    drawn = draw_overlay(numbered_picture(1), np.zeros((1, 48, 64), dtype=bool), np.array([box], float), ["a"], [0])
    assert drawn.shape == (48, 64, 3)


@pytest.mark.parametrize(
    "masks, boxes, labels",
    [
        (np.zeros((1, 48, 63), dtype=bool), NO_BOX, ["a"]),
        (np.zeros((1, 48, 64), dtype=np.uint8), NO_BOX, ["a"]),
        (np.zeros((1, 48, 64), dtype=bool), np.zeros((2, 4)), ["a"]),
        (np.zeros((1, 48, 64), dtype=bool), NO_BOX, []),
    ],
)
def test_sizes_that_do_not_agree_are_refused(masks, boxes, labels):
    with pytest.raises(ValueError, match=r"masks|boxes"):
        draw_overlay(numbered_picture(0), masks, boxes, labels, [1])


def write_frames(path, count=4, height=48, width=64, **clock):
    with VideoWriter(path, width, height, **clock or {"fps": 25}) as writer:
        for number in range(count):
            writer.write(numbered_picture(number, width, height))
    return path


def test_written_video_plays_in_browsers(tmp_path):
    path = write_frames(tmp_path / "out.mp4", fps=24)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (container.format.name.split(",")[0], stream.codec_context.name, stream.pix_fmt) == (
            "mov",
            "h264",
            "yuv420p",
        )
        assert stream.frames == 4
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # starts to play before it is loaded
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fps", [24, 25, 30_000 / 1001, 0.5])
def test_constant_rate_round_trip(fps, tmp_path):
    reader = open_video(write_frames(tmp_path / "out.mp4", count=30, fps=fps))
    assert len(reader) == 30
    np.testing.assert_allclose(reader.timestamps, np.arange(30) / fps, atol=1e-4)


def test_variable_rate_round_trip(tmp_path):
    timestamps = [0, 0.04, 0.5, 0.5005, 0.51, 3, 3.04]
    path = write_frames(tmp_path / "out.mp4", count=7, timestamps=timestamps)
    np.testing.assert_allclose(open_video(path).timestamps, timestamps, atol=1e-4)
    with av.open(str(path)) as container:
        assert container.duration / av.time_base >= 3.04  # players stop where the header says


@pytest.mark.parametrize("height, width, even", [(63, 127, (64, 128)), (1, 1, (2, 2)), (47, 64, (48, 64))])
def test_odd_sizes_repeat_the_last_row_and_column(height, width, even, tmp_path):
    path = tmp_path / "out.mp4"
    with VideoWriter(path, width, height, fps=25) as writer:
        writer.write(np.full((height, width, 3), (200, 60, 60), dtype=np.uint8))
    (frame,) = open_video(path)
    assert frame.shape[:2] == even
    np.testing.assert_allclose(frame[-1, -1].astype(int), [200, 60, 60], atol=6)


def test_times_closer_than_a_tick_stay_apart(tmp_path):
    reader = open_video(write_frames(tmp_path / "out.mp4", count=3, timestamps=[0, 1e-9, 2e-9]))
    assert len(reader) == 3 and reader.warnings == []


@pytest.mark.parametrize(
    "clock",
    [{}, {"fps": 25, "timestamps": [0.0]}, {"fps": 0}, {"timestamps": [0, 0]}, {"timestamps": [0, float("nan")]}],
)
def test_bad_clocks_are_refused(clock, tmp_path):
    with pytest.raises(ValueError):
        VideoWriter(tmp_path / "out.mp4", 64, 48, **clock)
    assert list(tmp_path.iterdir()) == []


def test_bad_frames_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected uint8"), VideoWriter(tmp_path / "a.mp4", 64, 48, fps=1) as writer:
        writer.write(np.zeros((64, 48, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="more frames"):
        write_frames(tmp_path / "b.mp4", count=3, timestamps=[0, 1])
    with pytest.raises(ExportError, match="no frame"):
        write_frames(tmp_path / "c.mp4", count=0)
    assert list(tmp_path.iterdir()) == []


def test_error_in_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), VideoWriter(path, 64, 48, fps=25) as writer:
        writer.write(numbered_picture(0))
        raise KeyboardInterrupt
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["missing/out.mp4", "file.txt/out.mp4", "folder", "x" * 300 + ".mp4"])
def test_paths_that_cannot_be_written(name, tmp_path):
    (tmp_path / "file.txt").write_text("a file, not a folder")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="cannot write"):
        write_frames(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="cannot write"):
        write_frames(tmp_path / "out.mp4")


@pytest.mark.parametrize("limit", [100, 20_000])
def test_full_disk_leaves_nothing(limit, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 255, (20, 240, 320, 3), dtype=np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ExportError), VideoWriter(tmp_path / "out.mp4", 320, 240, fps=25) as writer:
            for frame in noise:
                writer.write(frame)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a b.mp4", "clip [SEG] \"q\" 'q'.mp4", "🐢.mp4", "a:b%03d.mp4", "n" * 251 + ".mp4"])
def test_unusual_names_can_be_written(name, tmp_path):
    assert len(open_video(write_frames(tmp_path / name))) == 4


def moving_track(number, phrase, count, height, width):
    """A square of 16 pixels that moves right by 4 pixels per frame and is absent in the last frame."""
    masks = [square_mask(height, width, 30, 4 + 4 * t, 16) for t in range(count - 1)] + [
        np.zeros((height, width), bool)
    ]
    boxes = np.array([[4 + 4 * t, 30, 20 + 4 * t, 46] for t in range(count)], dtype=np.float32)
    boxes[-1] = np.nan
    return SimpleNamespace(id=number, phrase=phrase, boxes=boxes, mask=lambda t: masks[t])


def test_overlay_of_a_clip(tmp_path):
    milliseconds = [0, 40, 80, 1000, 1010, 3000]
    clip = write_clip(tmp_path / "clip.mp4", count=6, width=126, height=62, milliseconds=milliseconds)
    with open_video(clip) as reader:
        plain = list(reader)
        write_overlay(tmp_path / "out.mp4", reader, [moving_track(1, None, 6, 62, 126)], progress=False)
    written = open_video(tmp_path / "out.mp4")
    assert (len(written), written.width, written.height) == (6, 126, 62)
    np.testing.assert_allclose(written.timestamps, reader.timestamps, atol=1e-3)
    for t, frame in enumerate(written):
        center = frame[36:42, 10 + 4 * t : 14 + 4 * t].astype(int).mean(axis=(0, 1))
        before = plain[t][36:42, 10 + 4 * t : 14 + 4 * t].astype(int).mean(axis=(0, 1))
        tinted = before * 0.55 + np.array(object_color(1)) * 0.45
        np.testing.assert_allclose(center, tinted if t < 5 else before, atol=20)


def test_overlay_without_objects_is_the_clip(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=3))
    write_overlay(tmp_path / "out.mp4", reader, [])
    for written, frame in zip(open_video(tmp_path / "out.mp4"), reader, strict=True):
        assert np.abs(written.astype(int) - frame).mean() < 6


def test_overlay_refuses_tracks_of_another_clip(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=3))
    with pytest.raises(ValueError, match="4 frames, the clip 3"):
        write_overlay(tmp_path / "out.mp4", reader, [moving_track(0, "a", 4, 48, 64)])
    assert not (tmp_path / "out.mp4").exists()


def test_film_strip_shows_evenly_spaced_frames(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=7, width=64, height=48))
    frames = list(reader)
    strip = film_strip(reader, [moving_track(1, None, 7, 48, 64)], count=3, gap=2)
    assert strip.shape == (48, 3 * 64 + 2 * 2, 3) and strip.dtype == np.uint8
    assert (strip[:, 64:66] == 255).all()
    assert (strip[40, :64] != frames[0][40]).any()  # the square of the first frame
    np.testing.assert_array_equal(strip[:, 132:], frames[6])  # absent in the last frame
    assert film_strip(reader, [], count=20).shape[1] == 7 * 64 + 6 * 4


def test_strip_file_of_a_result(tmp_path):
    reader = open_video(write_clip(tmp_path / "clip.mp4", count=3))
    result = GroundingResult("q", "a", [], (reader.height, reader.width), reader.fps, reader.timestamps, [0])
    result.save_strip(tmp_path / "strip.png", reader, frames=2)
    with pytest.raises(ExportError, match="exists"):
        result.save_strip(tmp_path / "strip.png", reader)
    assert np.array(Image.open(tmp_path / "strip.png")).shape == (reader.height, 2 * reader.width + 4, 3)
