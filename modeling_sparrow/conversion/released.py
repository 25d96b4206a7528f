"""Configuration of released checkpoints: sizes read off the tensors, rules of the released code."""

import re

import torch

from ..configuration_sparrow import SparrowConfig
from .sam2 import sam2_config_from_weights, sam2_vision_config

# Rules of the released code on the mask side. "framewise" is what its evaluation scripts run; the video branch needs a
# method that the released predictor lacks as soon as a box is selected, and is meant for answers without boxes.
FRAMEWISE = {"propagation": "framewise", "num_padding_points": 0}
VIDEO_BRANCH = {
    "propagation": "memory",
    "joint_prompt": False,
    "num_padding_points": 2,
    "memory_dtype": "bfloat16",
    "binarize_prompted_memory": True,
}


def released_config(
    official: dict[str, torch.Tensor],
    detector: dict[str, torch.Tensor] | None,
    *,
    text_config: dict,
    spatial_config: dict,
    temporal_config: dict,
    seg_token_id: int,
    box_token_id: int,
    image_size: int = 1024,
    trunk: dict | None = None,
    detector_image_size: int = 448,
    detector_trunk: dict | None = None,
    detector_heads: int = 8,
    share_encoder: bool = False,
    guidance: dict | None = None,
    **overrides,
) -> SparrowConfig:
    """Configuration that runs a released SPARROW or VideoGLaMM state dict as the released code does.

    Args:
        official, detector: state dicts under their official names; `detector=None` for VideoGLaMM.
        text_config, spatial_config, temporal_config: of the three towers, what their own config files say.
        seg_token_id, box_token_id: from the checkpoint's `config.json` (`seg_token_idx`, `box_token_idx`).
        image_size: side of the segmenter's frames.
        trunk: what shapes do not tell of a Hiera trunk that is not Meta's, see `sam2_config_from_weights`.
        detector_image_size: side of the detector's pictures.
        detector_trunk: as `trunk`, for the detector.
        detector_heads: attention heads of the detector.
        share_encoder: the detector's image encoder equals the segmenter's.
        guidance: `filtration_config` fields that differ from the release (thresholds, box prior, …).
        overrides: further fields of `SparrowConfig`.
    """
    sam2 = {
        key.removeprefix("model.visual_model."): value
        for key, value in official.items()
        if key.startswith("model.visual_model.")
    }
    vocab_size = len(official["model.embed_tokens.weight"])
    settings = {
        "text_config": {"model_type": "phi3", **text_config, "vocab_size": vocab_size},
        "spatial_config": {"model_type": "clip_vision_model", **spatial_config},
        "temporal_config": temporal_config,
        "mask_tracker_config": {
            "sam2_config": sam2_config_from_weights(sam2, image_size, **(trunk or {})).to_dict(),
            "binarize_prompted_memory": True,
            **FRAMEWISE,
        },
        "seg_token_id": seg_token_id,
        "box_token_id": box_token_id,
        "video_token_id": vocab_size,
        "tsf_token_id": vocab_size + 1,
        "shared_token_head": True,
        "num_prompt_frames": 1,
        "max_training_tokens": 4,
        "box_guidance": detector is not None,
        "filter_box_loss_weight": 0.01,
    }
    if detector is not None:
        vision = None
        if not share_encoder:
            encoder = {
                f"image_encoder.{key.removeprefix('vis_encoder.')}": value
                for key, value in detector.items()
                if key.startswith("vis_encoder.")
            }
            vision = sam2_vision_config(encoder, detector_image_size, **(detector_trunk or trunk or {}))
        settings["proposer_config"] = _proposer_config(detector, vision, detector_image_size, detector_heads)
        settings["filtration_config"] = _filtration_config(official) | (guidance or {})
    return SparrowConfig(**(settings | overrides))


def _proposer_config(detector: dict[str, torch.Tensor], vision: dict | None, image_size: int, heads: int) -> dict:
    def layers(part: str) -> int:
        pattern = rf"^ddetr_transformer\.{part}\.layers\.(\d+)\."
        return 1 + max(int(match[1]) for key in detector if (match := re.match(pattern, key)))

    box_hidden = next(value for key, value in detector.items() if key.endswith("bbox_embed.0.layers.0.weight")).shape[
        0
    ]
    return {
        "vision_config": vision,
        "image_size": image_size,
        "d_model": detector["ddetr_transformer.level_embed"].shape[1],
        "num_feature_levels": detector["ddetr_transformer.level_embed"].shape[0],
        "num_queries": len(detector["ddetr_transformer.query_position_embeddings.weight"]),
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "encoder_ffn_dim": detector["ddetr_transformer.encoder.layers.0.fc1.weight"].shape[0],
        "decoder_ffn_dim": detector["ddetr_transformer.decoder.layers.0.fc1.weight"].shape[0],
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "box_head_hidden_size": box_hidden,
        "objectness_powers": [0.3, 0.7],
        "refine_reference_points": False,
        "nms_threshold": None,
        "max_proposals": 100,
    }


def _filtration_config(official: dict[str, torch.Tensor]) -> dict:
    return {
        "variant": "released",
        "hidden_size": official["model.proposal_selector.seg_proj.weight"].shape[0],
        "roi_hidden_size": official["model.roi_helper.query_proj.weight"].shape[0],
        "roi_size": 7,
        "roi_sampling_ratio": 0,
        "score_threshold": 0.4,
        "fallback_threshold": 0.0,
        "max_boxes_per_token": 16,
        "nms_threshold": None,
        "positive_iou": 0.3,
        "negative_iou": 0.3,
        "box_regression": "model.proposal_selector.box_head.0.weight" in official,
        "prior_min_score": 0.35,
        "prior_max_keep": 4,
    }
