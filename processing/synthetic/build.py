"""Write the generated world as a dataset that `datasets.load_dataset` reads.

    python -m sparrow_processing.synthetic.build --split train --clips 10000 --output DIR

One split at a time, in parquet shards. Interrupted, the same command goes on behind the last finished shard.
"""

import argparse
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .config import RESOLUTIONS
from .dataset import SPLITS, SyntheticVideos
from .rows import make_row

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError as error:
    raise ImportError("Writing parquet needs pyarrow: pip install 'sparrow-video-grounding[train]'.") from error

logger = logging.getLogger(__name__)

SHARD_CLIPS = 500
_ROWS_AT_ONCE = 50

_FRAME = pa.struct(
    [
        ("index", pa.int32()),
        ("box", pa.list_(pa.float32())),
        ("mask", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("video", pa.binary()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("objects", pa.list_(pa.struct([("id", pa.int32()), ("frames", pa.list_(_FRAME))]))),
        ("targets", pa.list_(pa.list_(pa.int32()))),
        ("time_span", pa.list_(pa.float32())),
        ("kind", pa.string()),
        ("expression", pa.string()),
        ("seed", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("num_frames", pa.int32()),
        ("frames_per_second", pa.float32()),
    ]
)

_CARD = """---
license: apache-2.0
task_categories:
- image-segmentation
- video-classification
language:
- en
pretty_name: SPARROW generated referring videos
configs:
- config_name: default
  data_files:
{data_files}
---

# Generated referring videos

Short clips of coloured shapes and emoji that move, meet, hide, enter and leave; questions about them; exact boxes and
masks. Written by `python -m sparrow_processing.synthetic.build`. Columns: {columns}; what they hold is documented at
`sparrow_processing.synthetic.rows.SyntheticRow`.

Noun-colour pairs of `test_new_words` occur in no other split. Sprites: Noto Color Emoji (SIL OFL 1.1; drawings Apache
2.0). Photographic textures: CC0.
"""


def build_split(
    split: str,
    clips: int,
    output: Path,
    seed: int = 0,
    resolutions: Iterable[tuple[int, int]] | None = RESOLUTIONS,
    shard_clips: int = SHARD_CLIPS,
) -> list[Path]:
    """Write one split and the dataset card; returns the shards.

    Args:
        split: one of ``SPLITS``.
        clips: number of rows.
        output: folder of the dataset; other splits in it stay.
        seed: another seed gives other clips.
        resolutions: (height, width) pixels that take turns; None for the resolution of the split's preset.
        shard_clips: rows of a shard.

    Raises:
        ValueError: if the folder holds the same split with other settings, or a number is not positive.
    """
    if clips < 1 or shard_clips < 1:
        raise ValueError(f"clips={clips}, shard_clips={shard_clips}: expected at least 1")
    sizes = None if resolutions is None else [tuple(size) for size in resolutions]
    videos = SyntheticVideos(split, size=clips, seed=seed, resolutions=sizes)
    settings = {"clips": clips, "seed": seed, "resolutions": sizes, "shard_clips": shard_clips}
    _check_settings(output / "settings" / f"{split}.json", settings)
    name = _name(split)
    count = -(-clips // shard_clips)
    shards = [output / "data" / f"{name}-{k:05d}-of-{count:05d}.parquet" for k in range(count)]
    (output / "data").mkdir(exist_ok=True)
    with tqdm(total=clips, desc=split, unit="clip") as bar:
        for k, shard in enumerate(shards):
            indices = range(k * shard_clips, min((k + 1) * shard_clips, clips))
            if shard.exists():
                bar.update(len(indices))
            else:
                _write_shard(shard, videos, indices, bar)
    _write_card(output)
    return shards


def _name(split: str) -> str:
    """Names of splits must be identifiers for ``datasets``."""
    return split.replace("-", "_")


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a split, or compare with those it was begun with."""
    wanted = json.loads(json.dumps(settings))
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != wanted:
            raise ValueError(f"{path} says that this split was begun with {found}, not {wanted}: take another folder")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace_text(path, json.dumps(wanted))


def _replace_text(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _write_shard(shard: Path, videos: SyntheticVideos, indices: range, bar: tqdm) -> None:
    """A few rows at a time, so that memory does not grow with the shard; its name appears when it is complete."""
    unfinished = shard.with_name(f".{shard.name}.tmp")
    with parquet.ParquetWriter(unfinished, SCHEMA) as writer:
        for start in range(indices.start, indices.stop, _ROWS_AT_ONCE):
            rows = []
            for index in range(start, min(start + _ROWS_AT_ONCE, indices.stop)):
                rows.append(asdict(make_row(videos, index)))
                bar.update()
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    os.replace(unfinished, shard)


def _write_card(output: Path) -> None:
    splits = [split for split in SPLITS if list((output / "data").glob(f"{_name(split)}-*.parquet"))]
    files = "\n".join(f"  - split: {_name(split)}\n    path: data/{_name(split)}-*.parquet" for split in splits)
    columns = ", ".join(f"`{name}`" for name in SCHEMA.names)
    _replace_text(output / "README.md", _CARD.format(data_files=files, columns=columns))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--clips", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-resolution", action="store_true", help="that of the split's preset, not a mix")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    resolutions = None if options.one_resolution else RESOLUTIONS
    shards = build_split(options.split, options.clips, options.output, options.seed, resolutions)
    logger.info("%d shards in %s", len(shards), options.output)


if __name__ == "__main__":
    main()
