"""Small fake data sets in the official layouts, and predictions for them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modeling_sparrow.evaluation.files import write_label_map, write_mask

from .fake_data import SIZE, dump, moving_square, rectangle, rle, write_picture


@pytest.fixture
def write_predictions() -> Callable:
    """Writes the ground truth of every expression as its prediction."""

    def write(dataset, folder: Path) -> Path:
        for sample in dataset:
            track = dataset.ground_truth(sample)
            for index, path in enumerate(sample.prediction_paths(folder)):
                write_mask(path, track.frame(index) != 0)
        return folder

    return write


@pytest.fixture
def mevis_root(tmp_path: Path) -> Path:
    """Two videos with two expressions each, one of them about two objects."""
    root = tmp_path / "mevis"
    for split in ("valid_u", "valid"):
        videos, masks = {}, {}
        for number, video in enumerate(("aaa", "bbb")):
            frames = [f"{i:05d}" for i in range(3)]
            entries = {
                "0": {"exp": "The square moving right", "obj_id": [0], "anno_id": [2 * number]},
                "1": {"exp": "both squares", "obj_id": [0, 1], "anno_id": [2 * number, 2 * number + 1]},
            }
            if split == "valid":
                entries = {key: {"exp": entry["exp"]} for key, entry in entries.items()}
            videos[video] = {"vid_id": number, "frames": frames, "expressions": entries}
            masks[str(2 * number)] = [rle(moving_square(i)) for i in range(3)]
            masks[str(2 * number + 1)] = [None, rle(moving_square(1, 10)), rle(moving_square(2, 10))]
            for frame in frames:
                write_picture(root / split / "JPEGImages" / video / f"{frame}.jpg")
        dump(root / split / "meta_expressions.json", {"videos": videos})
        if split == "valid_u":
            dump(root / split / "mask_dict.json", masks)
    return root


@pytest.fixture
def youtube_root(tmp_path: Path) -> Path:
    """A validation list that also holds a test video, and annotations as label maps."""
    root = tmp_path / "refer_youtube_vos"
    frames = ["00000", "00005", "00015"]
    video = {"frames": frames, "expressions": {"0": {"exp": "a cat"}, "1": {"exp": "the other cat"}}}
    dump(root / "meta_expressions" / "valid" / "meta_expressions.json", {"videos": {"v1": video, "t1": video}})
    dump(root / "meta_expressions" / "test" / "meta_expressions.json", {"videos": {"t1": video}})
    for index, frame in enumerate(frames):
        write_picture(root / "valid" / "JPEGImages" / "v1" / f"{frame}.jpg")
        labels = np.zeros(SIZE, np.uint8)
        labels[moving_square(index)] = 1
        labels[moving_square(index, 10)] = 2
        write_label_map(root / "valid" / "Annotations" / "v1" / f"{frame}.png", labels)
    return root


@pytest.fixture
def davis_root(tmp_path: Path) -> Path:
    """One video with two objects, four expressions each, annotated as label maps and as a mask dictionary."""
    root = tmp_path / "ref_davis"
    frames = [f"{i:05d}" for i in range(4)]
    entries = {
        str(4 * obj + annotator): {"exp": f"object {obj} by {annotator}", "obj_id": str(obj + 1)}
        for obj in range(2)
        for annotator in range(4)
    }
    dump(
        root / "meta_expressions" / "valid" / "meta_expressions.json",
        {"videos": {"clip": {"frames": frames, "expressions": entries}}},
    )
    masks = {str(k): [rle(moving_square(i, 10 * (k // 4))) for i in range(4)] for k in range(8)}
    dump(root / "valid" / "mask_dict.json", masks)
    for index, frame in enumerate(frames):
        write_picture(root / "valid" / "JPEGImages" / "clip" / f"{frame}.jpg")
        labels = np.zeros(SIZE, np.uint8)
        labels[moving_square(index)] = 1
        labels[moving_square(index, 10)] = 2
        write_label_map(root / "DAVIS" / "Annotations_unsupervised" / "480p" / "clip" / f"{frame}.png", labels)
    (root / "DAVIS" / "ImageSets" / "2017").mkdir(parents=True)
    (root / "DAVIS" / "ImageSets" / "2017" / "val.txt").write_text("clip\n")
    return root


@pytest.fixture
def revos_root(tmp_path: Path) -> Path:
    """One video in a sub-folder, with a referring, a reasoning and a target-less expression."""
    root = tmp_path / "ReVOS"
    frames = [f"{i:05d}" for i in range(3)]
    entries = {
        "0": {"exp": "square", "obj_id": [0], "anno_id": [0], "type_id": 0},
        "1": {"exp": "Which one could roll?", "obj_id": [1], "anno_id": [1], "type_id": 1},
        "2": {"exp": "the unicorn", "obj_id": [], "anno_id": [], "type_id": 2},
    }
    video = {"frames": frames, "expressions": entries, "height": SIZE[0], "width": SIZE[1]}
    dump(root / "meta_expressions_valid_.json", {"videos": {"SRC/clip": video}})
    masks = {str(k): [rle(moving_square(i, 10 * k)) for i in range(3)] for k in range(2)}
    dump(root / "mask_dict.json", masks)
    union = [rle(moving_square(i) | moving_square(i, 10)) for i in range(3)]
    dump(root / "mask_dict_foreground.json", {"SRC/clip": {"masks_rle": union}})
    return root


@pytest.fixture
def reasonvos_root(tmp_path: Path) -> Path:
    root = tmp_path / "ReasonVOS"
    frames = ["00000", "00005"]
    entries = [{"obj_id": 0, "exp_id": k, "exp_text": f"why {k}", "is_sent": True} for k in range(2)]
    dump(
        root / "meta_expressions.json", {"videos": {"v": {"source": "MOSE", "frames": frames, "expressions": entries}}}
    )
    for index, frame in enumerate(frames):
        write_mask(root / "Annotations" / "MOSE_v_0" / f"{frame}.png", moving_square(index))
    return root


@pytest.fixture
def vidstg_root(tmp_path: Path) -> Path:
    """A question and a statement about 10 seconds of a 10 fps video; the annotated moment is [20, 60)."""
    root = tmp_path / "video_dataset"
    base = {
        "original_video_id": "o1",
        "frame_count": 100,
        "fps": 10.0,
        "width": 320,
        "height": 240,
        "start_frame": 0,
        "end_frame": 100,
        "tube_start_frame": 20,
        "tube_end_frame": 60,
        "video_path": "0/clip.mp4",
        "target_id": 7,
    }
    videos = [
        {**base, "video_id": 0, "caption": "What does the child hold?", "qtype": "interrogative", "type": "object"},
        {**base, "video_id": 1, "caption": "a child holds a ball", "qtype": "declarative", "type": "subject"},
    ]
    boxes = {str(f): {"bbox": [f, 40, 80, 60], "generated": 0, "tracker": "none"} for f in range(20, 60)}
    dump(
        root / "processed" / "vidstg" / "vidstg_annotations" / "test.json",
        {"videos": videos, "trajectories": {"o1": {"7": boxes}}, "obj_categories": {"o1": {"7": "ball"}}},
    )
    return root


@pytest.fixture
def gcg_root(tmp_path: Path, mevis_root: Path) -> Path:
    """One sample of each of the three sets; the last has 3 objects."""
    root = tmp_path
    frames = [f"seq/{i:05d}.jpg" for i in range(2)]
    tracks = [[rle(moving_square(i)) for i in range(2)], [rle(moving_square(0, 10)), None]]
    dump(
        root / "video_gcg" / "instruction_data" / "test.json",
        {
            "videos": [
                {
                    "file_names": frames,
                    "width": SIZE[1],
                    "height": SIZE[0],
                    "length": 2,
                    "dense_cap": {"caption": "a dog chases two cats", "token_pos": [1, 4], "mask_id": [10, 11]},
                    "metadata": {"dataset": "yt19"},
                }
            ],
            "annotations": [{"id": 10, "segmentations": tracks[0]}, {"id": 11, "segmentations": tracks[1]}],
        },
    )
    dump(root / "mevis_gcg" / "valid_u" / "aaa.json", {"caption": "[A square](0) and [both of them](0, 1) move."})
    dump(
        root / "vidstg_gcg" / "val_captions" / "12.json",
        {"caption": "[a child](1, 2) on [a swing](2) near [a cat](3)"},
    )
    for index in range(2):
        write_picture(root / "vidstg_gcg" / "val" / "12" / "frames" / f"{index:05d}.png")
        for number in (1, 2, 3):
            path = root / "vidstg_gcg" / "val" / "12" / "masks" / f"{number:03d}" / f"{index:05d}.png"
            write_mask(path, rectangle(2, 12 * number - 10, 10, 12 * number - 2))
    return root
