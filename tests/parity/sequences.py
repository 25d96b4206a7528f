"""Official token rows as ours: placeholders in their real length, pixels of a batch one after the other.

Officially a picture or each frame of a video is one placeholder, a tracked feature another, and the model replaces
them; ours are expanded before the model sees them.
"""

from dataclasses import dataclass

import torch

from modeling_sparrow.configuration_sparrow import SparrowConfig

from .fixtures import Recording


@dataclass
class Clip:
    """What one video of a batch shows: names of its pictures and of its crops among the inputs of a folder."""

    visual: str
    crops: str | None = None

    def spatial(self, official: Recording) -> torch.Tensor:
        """`(F, 3, h, w)` for the spatial tower."""
        return official[f"in.{self.visual}_context"] if self.is_video(official) else official[f"in.{self.visual}"]

    def temporal(self, official: Recording) -> torch.Tensor | None:
        """`(F, 3, h, w)` for the temporal tower; None of a still picture."""
        return official[f"in.{self.visual}_images"] if self.is_video(official) else None

    def crop_pixels(self, official: Recording) -> torch.Tensor | None:
        """`(n, 3, h, w)` crops of the tracked referent; a single one may come without its first axis."""
        if self.crops is None:
            return None
        pixels = official[f"in.{self.crops}"]
        return pixels[None] if pixels.ndim == 3 else pixels

    def is_video(self, official: Recording) -> bool:
        return f"in.{self.visual}_images" in official


@dataclass
class Rows:
    """Expanded rows `(B, L)`, and the length of each before padding."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    lengths: torch.Tensor


def expand_rows(
    official: Recording, config: SparrowConfig, name: str, clips: list[Clip], video_index: list[int]
) -> Rows:
    """Rows of the inputs `in.<name>_*` (or `in.<name>.*`); without labels all are ignored, without a mask all count.

    Everything from the first to the last picture placeholder becomes the visual tokens. Of the placeholders for
    tracked features the first K (or as many as there are crops) stay, the others go. Rows are padded at the end.
    """
    separator = "." if f"in.{name}.input_ids" in official else "_"
    ids = official[f"in.{name}{separator}input_ids"]
    labels = official.tensors.get(f"in.{name}{separator}labels", torch.full_like(ids, -100))
    mask = official.tensors.get(f"in.{name}{separator}attention_mask", torch.ones_like(ids, dtype=torch.bool))
    image, tsf = official.config["image_token_index"], official.config["tsf_token_index"]
    rows = []
    for row, index in zip(range(len(ids)), video_index, strict=True):
        clip = clips[index]
        num_visual = config.num_visual_tokens(len(clip.spatial(official)))
        crops = clip.crop_pixels(official)
        num_kept = config.tsf_num_clusters if crops is None else min(config.tsf_num_clusters, len(crops))
        pictures = (ids[row] == image).nonzero().flatten().tolist()
        expanded = []
        for position, (token, label, attended) in enumerate(
            zip(ids[row].tolist(), labels[row].tolist(), mask[row].tolist(), strict=True)
        ):
            if pictures and pictures[0] <= position <= pictures[-1]:
                if position == pictures[0]:
                    expanded += [(config.video_token_id, -100, True)] * num_visual
            elif token == tsf:
                if num_kept:
                    expanded.append((config.tsf_token_id, -100, True))
                    num_kept -= 1
            else:
                expanded.append((token, label, attended))
        rows.append(expanded)
    length = max(len(row) for row in rows)
    padding = (official.config["pad_token_id"], -100, False)
    padded = [list(zip(*row, *[padding] * (length - len(row)), strict=True)) for row in rows]
    columns = [torch.tensor([row[k] for row in padded]) for k in range(3)]
    return Rows(*columns, lengths=torch.tensor([len(row) for row in rows]))


def pixel_inputs(
    official: Recording, config: SparrowConfig, rows: Rows, clips: list[Clip], video_index: list[int]
) -> dict[str, torch.Tensor]:
    """Pixels of a batch as `SparrowModel.forward` takes them."""
    spatial = [clip.spatial(official) for clip in clips]
    temporal = [clip.temporal(official) for clip in clips if clip.is_video(official)]
    inputs = {
        "spatial_pixel_values": torch.cat(spatial),
        "num_frames": torch.tensor([len(frames) for frames in spatial]),
        "video_index": torch.tensor(video_index),
    }
    if temporal:
        inputs["temporal_pixel_values"] = torch.cat(temporal)
    has_tsf = (rows.input_ids == config.tsf_token_id).any(1).tolist()
    crops = [
        clips[index].crop_pixels(official) if asked else None
        for index, asked in zip(video_index, has_tsf, strict=True)
    ]
    if any(pixels is not None for pixels in crops):
        inputs["tsf_pixel_values"] = torch.cat([pixels for pixels in crops if pixels is not None])
        inputs["num_tsf_crops"] = torch.tensor([0 if pixels is None else len(pixels) for pixels in crops])
    return inputs
