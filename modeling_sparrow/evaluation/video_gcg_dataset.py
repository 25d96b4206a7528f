"""VideoGCG test set (grounded conversation generation) in its official layout: three sets, in this order.

1. `video_gcg`: BURST and YouTube-VIS videos, `video_gcg/instruction_data/test.json`; single words are grounded.
2. `mevis_gcg`: captions `mevis_gcg/valid_u/<video>.json` with `[phrase](object, object)`, masks of MeViS `valid_u`.
3. `vidstg_gcg`: captions `vidstg_gcg/val_captions/<id>.json` with the same mark-up, frames and masks under
   `vidstg_gcg/val/<id>/`; only the first object of a phrase counts.

The official scripts number samples in the order in which the file system lists sets 2 and 3, so their numbers mean
different samples on different machines. Here the sets are sorted and results are keyed by name.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .files import EvaluationError, read_json, read_mask_dict
from .prompts import conversation_prompt
from .referring_datasets import FileTrack, RleTrack

GCG_SETS = ("video_gcg", "mevis_gcg", "vidstg_gcg")
_LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")


class GroundedCaption(NamedTuple):
    """A caption and what its phrases stand for.

    Attributes:
        text: with each grounded phrase as `<p> phrase </p> [SEG]`.
        phrases: in order.
        objects: object ids of each phrase.
    """

    text: str
    phrases: list[str]
    objects: list[list[str]]


@dataclass(frozen=True)
class GcgSample:
    """One video with a grounded caption.

    Attributes:
        name: `<set>/<video>`, also the folder of its prediction.
        frame_paths: the pictures.
        caption: with each grounded phrase as `<p> phrase </p> [SEG]`.
        prompt: what the model is asked.
        tracks: ground truth of each phrase, in order.
    """

    name: str
    frame_paths: tuple[Path, ...]
    caption: str
    prompt: str
    tracks: tuple[RleTrack | FileTrack, ...]


def parse_links(caption: str) -> GroundedCaption:
    """Reads the mark-up `[phrase](id, id)` of the MeViS and VidSTG parts."""
    links = _LINK.findall(caption)
    return GroundedCaption(
        text=_LINK.sub(r"<p> \1 </p> [SEG]", caption),
        phrases=[phrase for phrase, _ in links],
        objects=[ids.split(", ") for _, ids in links],
    )


def mark_words(caption: str, positions: Sequence[int], objects: Sequence[Any]) -> GroundedCaption:
    """Marks single words, as the BURST / YouTube-VIS part does.

    Args:
        caption: words separated by single spaces.
        positions: word indices; one that occurs several times unites its objects.
        objects: object id of each entry of `positions`.
    """
    of_word: dict[int, list[str]] = {}
    for position, object_id in zip(positions, objects, strict=True):
        of_word.setdefault(position, []).append(str(object_id))
    words = caption.split(" ")
    marked = sorted(position for position in of_word if position < len(words))
    text = " ".join(f"<p> {word} </p> [SEG]" if i in of_word else word for i, word in enumerate(words))
    return GroundedCaption(text, [words[i] for i in marked], [of_word[i] for i in marked])


class VideoGcgDataset:
    """The VideoGCG test set. Listing needs only annotation files and folders; masks and pictures are opened when used.

    Args:
        root: folder that holds `video_gcg`, `mevis_gcg`, `mevis`, `vidstg_gcg`, `ytvis` and `burst`.
        sets: which of the three sets; published numbers need all.

    Raises:
        EvaluationError: if an annotation file is absent or damaged, or a caption names an object without masks.
    """

    benchmark: ClassVar[str] = "video-gcg"

    def __init__(self, root: str | Path, sets: Sequence[str] = GCG_SETS) -> None:
        self.root = Path(root)
        unknown = set(sets) - set(GCG_SETS)
        if unknown or not sets:
            raise ValueError(f"sets={list(sets)}: expected some of {', '.join(GCG_SETS)}")
        listings = {
            "video_gcg": self._list_video_gcg,
            "mevis_gcg": self._list_mevis_gcg,
            "vidstg_gcg": self._list_vidstg_gcg,
        }
        self.samples = [sample for name in GCG_SETS if name in sets for sample in listings[name]()]
        if not self.samples:
            raise EvaluationError(f"{self.root}: no samples in {', '.join(sets)}")
        self.sets = tuple(sets)

    @property
    def version(self) -> str:
        """Number of samples of each set."""
        counts = {name: sum(sample.name.startswith(f"{name}/") for sample in self.samples) for name in self.sets}
        return ", ".join(f"{name}: {count}" for name, count in counts.items())

    def limit(self, count: int) -> None:
        """Keeps only the first samples."""
        self.samples = self.samples[:count]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> GcgSample:
        return self.samples[index]

    def __iter__(self) -> Iterator[GcgSample]:
        return iter(self.samples)

    def _list_video_gcg(self) -> Iterator[GcgSample]:
        path = self.root / "video_gcg" / "instruction_data" / "test.json"
        content = read_json(path)
        segmentations = {str(entry["id"]): entry["segmentations"] for entry in content["annotations"]}
        for index, video in enumerate(content["videos"]):
            dense = video["dense_cap"]
            caption = mark_words(dense["caption"], dense["token_pos"], dense["mask_id"])
            source = video["metadata"]["dataset"] if "metadata" in video else video["dataset_split"]
            folder = Path("ytvis/vos/train/JPEGImages") if source == "yt19" else Path("burst/frames/val")
            frames = tuple(self.root / folder / name for name in video["file_names"])
            size = (video["height"], video["width"])
            yield _sample(f"video_gcg/{index:06d}", frames, caption, segmentations, size, path)

    def _list_mevis_gcg(self) -> Iterator[GcgSample]:
        captions = self._caption_files(self.root / "mevis_gcg" / "valid_u")
        split = self.root / "mevis" / "valid_u"
        videos = read_json(split / "meta_expressions.json")["videos"]
        masks = read_mask_dict(split / "mask_dict.json")
        for path in captions:
            if path.stem not in videos:
                raise EvaluationError(f"{path}: MeViS valid_u has no video {path.stem}")
            video = videos[path.stem]
            annotation_of = {
                str(object_id): str(annotation_id)
                for expression in video["expressions"].values()
                for object_id, annotation_id in zip(expression["obj_id"], expression["anno_id"], strict=True)
            }
            tracks = {object_id: masks.get(annotation, []) for object_id, annotation in annotation_of.items()}
            size = next((tuple(rle["size"]) for track in tracks.values() for rle in track if rle), None)
            frames = tuple(split / "JPEGImages" / path.stem / f"{name}.jpg" for name in sorted(video["frames"]))
            caption = parse_links(read_json(path)["caption"])
            yield _sample(f"mevis_gcg/{path.stem}", frames, caption, tracks, size, path)

    def _list_vidstg_gcg(self) -> Iterator[GcgSample]:
        for path in self._caption_files(self.root / "vidstg_gcg" / "val_captions"):
            folder = self.root / "vidstg_gcg" / "val" / path.stem
            if not (folder / "frames").is_dir():
                raise EvaluationError(f"{folder / 'frames'}: no such folder of frames")
            frames = tuple(sorted((folder / "frames").iterdir()))
            names = tuple(frame.stem for frame in frames)
            caption = parse_links(read_json(path)["caption"])
            tracks = tuple(
                FileTrack(names, tuple(folder / "masks" / ids[0].zfill(3) / frame.name for frame in frames))
                for ids in caption.objects
            )
            yield GcgSample(f"vidstg_gcg/{path.stem}", frames, caption.text, conversation_prompt(), tracks)

    @staticmethod
    def _caption_files(folder: Path) -> list[Path]:
        files = sorted(folder.glob("*.json"))
        if not files:
            raise EvaluationError(f"{folder}: no captions (JSON files)")
        return files


def _sample(
    name: str,
    frames: tuple[Path, ...],
    caption: GroundedCaption,
    masks: dict[str, list],
    size: tuple[int, int] | None,
    source: Path,
) -> GcgSample:
    """A sample whose ground truth are run-length encodings, object id -> one per frame."""
    names = tuple(path.stem for path in frames)
    tracks = []
    for ids in caption.objects:
        absent = [object_id for object_id in ids if object_id not in masks]
        if absent:
            raise EvaluationError(f"{source}: {name} names object {absent[0]}, which has no masks")
        annotations = tuple(masks[object_id] for object_id in ids)
        tracks.append(RleTrack(names, annotations, size, f"{source}, {name}"))
    return GcgSample(name, frames, caption.text, conversation_prompt(), tuple(tracks))
