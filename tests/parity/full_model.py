"""The whole model with official weights, and official batches as ours."""

import functools
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_sparrow.configuration_sparrow import SparrowConfig
from modeling_sparrow.conversion.released import released_config
from modeling_sparrow.conversion.videoglamm import convert_released
from modeling_sparrow.frame_pyramid import FramePyramid
from modeling_sparrow.modeling_sparrow import SparrowForVideoGrounding

from .builders import host_sizes, options, our_names, proposer_sizes, set_sam2_rules, trunk_settings
from .fixtures import Recording
from .knife_edges import chosen, holds_for_one, possible_choices
from .sequences import Clip, Rows, expand_rows, pixel_inputs

# Mean and deviation of the segmenter's frames, for values of 0 to 255.
PIXEL_MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
PIXEL_STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]


def detector_of(official: Recording) -> dict[str, torch.Tensor] | None:
    return official.load("weights_ddetr.safetensors") if official.config["guidance"] else None


def full_config(official: Recording, detector: dict[str, torch.Tensor] | None) -> SparrowConfig:
    """`released_config` with everything that a config.json of the fixtures may change."""
    sizes, guide, weights = official.config, official.config["guide"], official.config["weights"]
    guidance = None
    if detector is not None:
        guidance = {
            "score_threshold": guide["proposal_score_threshold"],
            "max_boxes_per_token": guide["max_selected_boxes_per_token"],
            "positive_iou": guide["proposal_iou_threshold"],
            "negative_iou": guide["proposal_iou_threshold"],
            "roi_size": guide["roi_align_output_size"],
            "prior_min_score": None,  # the box prior is on in the cases called "prior"
            "prior_max_keep": guide["box_prior_max_keep"],
        }
    config = released_config(
        official.weights,
        detector,
        **host_sizes(sizes, official.weights),
        image_size=sizes["sam2"]["image_size"],
        trunk=trunk_settings(sizes["sam2"]),
        detector_image_size=sizes["detector_input"][0],
        detector_heads=sizes["ddetr"]["encoder_attention_heads"] if detector is not None else 8,
        guidance=guidance,
        max_training_tokens=sizes["max_seg_tokens_per_sample"],
        ce_loss_weight=weights["ce_loss_weight"],
        mask_bce_loss_weight=weights["bce_loss_weight"],
        mask_dice_loss_weight=weights["dice_loss_weight"],
        filter_class_loss_weight=weights["proposal_loss_weight"],
        filter_box_loss_weight=weights["proposal_box_loss_weight"],
    )
    set_sam2_rules(config.mask_tracker_config.sam2_config, sizes["sam2"])
    if detector is not None:
        for name, value in proposer_sizes(sizes["ddetr"]).items():
            setattr(config.proposer_config, name, value)
        config.proposer_config.max_proposals = guide["proposal_topk"]
        config.proposer_config.objectness_powers = guide["proposal_score_power"]
    return config


@functools.cache
def build_model(official: Recording) -> SparrowForVideoGrounding:
    detector = detector_of(official)
    config = full_config(official, detector)
    model = SparrowForVideoGrounding(config).eval()
    conversion = convert_released(official.weights, config.temporal_config.num_hidden_layers, detector)
    model.load_state_dict(conversion.tensors)
    if detector is not None:
        model.model.region_proposer.requires_grad_(False)  # as in official training
    return model


@functools.cache
def parameter_names(official: Recording) -> dict[str, str]:
    """Official name of a parameter to ours."""
    num_layers = build_model(official).config.temporal_config.num_hidden_layers
    converted = convert_released(official.weights, num_layers, detector_of(official))
    return our_names(official.weights, converted.tensors)


def detector_picture(official: Recording, frame: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """A segmenter frame `(3, S, S)` as the detector gets it: uint8 `(S, S, 3)`, and resized by Pillow."""
    picture = (frame * PIXEL_STD + PIXEL_MEAN).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    height, width = official.config["detector_input"]
    return picture, np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))


def detector_pixels(official: Recording, frame: torch.Tensor) -> torch.Tensor:
    """`proposer_pixel_values` `(1, 3, s, s)` of a segmenter frame."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    resized = torch.from_numpy(detector_picture(official, frame)[1]).permute(2, 0, 1) / 255
    return ((resized - mean) / std)[None]


@dataclass
class Batch:
    """An official call as ours.

    Args:
        name: of its inputs.
        clips: what the language model sees of each video.
        video_index: video of each row.
        frames: what the segmenter sees of each video, `(T_v, 3, S, S)`.
        rows: the expanded rows.
    """

    name: str
    clips: list[Clip]
    video_index: list[int]
    frames: list[torch.Tensor]
    rows: Rows

    def language_inputs(self, official: Recording, config: SparrowConfig) -> dict[str, torch.Tensor]:
        pixels = pixel_inputs(official, config, self.rows, self.clips, self.video_index)
        mask = self.rows.attention_mask.long()
        return {"input_ids": self.rows.input_ids, "attention_mask": mask, **pixels}

    def inputs(self, official: Recording, config: SparrowConfig) -> dict[str, torch.Tensor]:
        """Arguments of `SparrowForVideoGrounding.forward` without labels; short clips are padded at the end."""
        T = max(len(frames) for frames in self.frames)
        padded = [torch.cat([frames, frames[-1:].expand(T - len(frames), -1, -1, -1)]) for frames in self.frames]
        inputs = self.language_inputs(official, config) | {
            "mask_pixel_values": torch.stack(padded),
            "num_mask_frames": torch.tensor([len(frames) for frames in self.frames]),
        }
        if config.box_guidance:
            inputs["proposer_pixel_values"] = torch.cat([detector_pixels(official, clip[0]) for clip in self.frames])
        return inputs


def batch_of(official: Recording, config: SparrowConfig, name: str, num_frames: int | None = None) -> Batch:
    """The call whose inputs are `in.<name>_*`.

    Args:
        num_frames: frames of the video that the segmenter sees; not of a picture.
    """
    video = Clip("v4", "t6" if "in.t6" in official else None)
    sam_video, sam_image = official["in.sam_video"][:num_frames], official["in.sam_image"]
    clips, video_index, frames = {
        "train": ([video, Clip("i")], [0, 0, 1], [sam_video, sam_image[:1]]),
        "train_edge": ([Clip("i"), Clip("i2")], [0, 1], [sam_image[:1], sam_image[1:2]]),
        "forward_video": ([video], [0], [sam_video]),
        "forward_image": ([Clip("i")], [0], [sam_image[:1]]),
        "forward_no_seg": ([Clip("i")], [0], [sam_image[:1]]),
        "generate": ([video], [0], [sam_video]),
    }[name]
    return Batch(name, clips, video_index, frames, expand_rows(official, config, name, clips, video_index))


def token_embeddings(
    model: SparrowForVideoGrounding, batch: Batch, states: torch.Tensor, token_id: int
) -> list[torch.Tensor]:
    """Of each video `(S, P)`: embeddings of all its tokens of one kind, from the states `(B, L, D)` before them."""
    found = []
    for video in range(len(batch.clips)):
        own = [row for row, index in enumerate(batch.video_index) if index == video]
        following = batch.rows.input_ids[own, 1:] == token_id
        found.append(model.model.token_embeddings(states[own, :-1][following], token_id))
    return found


@functools.cache
def crop_choice(official: Recording) -> torch.Tensor | None:
    """The crops that became tracked features; None if ours are those, see `knife_edges`."""
    model = build_model(official)
    batch = batch_of(official, model.config, "forward_video", num_frames=1)
    pixels = batch.clips[0].crop_pixels(official)
    if pixels is None:
        return None
    config = model.config
    name = next(name for name in official.names("forward_video") if name.endswith("rec.token_embeddings.0.0"))

    def compare(choice: torch.Tensor | None):
        with chosen(choice):
            states = model.model(**batch.language_inputs(official, config)).last_hidden_state
        official.check(name, token_embeddings(model, batch, states, config.seg_token_id)[0])

    with torch.no_grad():
        vectors = model.model.host.encode_pictures(pixels).mean(dim=1)
        choices = possible_choices(vectors, config.tsf_num_clusters, config.tsf_iterations)
        return holds_for_one(itertools.chain([None], choices), compare)


@contextmanager
def released_rules(official: Recording, model: SparrowForVideoGrounding, kind: str, **tracker) -> Iterator[None]:
    """Settings of a case.

    Args:
        kind: `unguided`: `box_guidance=False`; `guided`; `guided_prior`: with `filtration_config.prior_min_score`.
        tracker: fields of `mask_tracker_config`.
    """
    config = model.config
    with ExitStack() as stack:
        stack.enter_context(chosen(crop_choice(official)))
        stack.enter_context(options(config.mask_tracker_config, **tracker))
        if kind == "unguided":
            stack.enter_context(options(config, box_guidance=False))
        elif kind == "guided_prior":
            least = official.config["guide"]["box_prior_min_score"]
            stack.enter_context(options(config.filtration_config, prior_min_score=least))
        else:
            assert kind == "guided", kind
        yield


def first_pyramid(model: SparrowForVideoGrounding, frames: torch.Tensor) -> FramePyramid:
    return model.model.mask_tracker.encode_frames(frames[:1])
