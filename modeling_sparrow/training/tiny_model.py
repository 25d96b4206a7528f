"""Sizes of sparrow-tiny: the same classes as the full model, small enough to train on two CPU cores."""

import math

import torch
from torch import nn

from ..configuration_sparrow import SparrowConfig

TOWER_SIZE = 128  # what the language model sees, pixels
SEGMENTER_SIZE = 256  # finer: masks are decoded at a quarter of this


def sam2_settings(image_size: int = SEGMENTER_SIZE, hidden_size: int = 128) -> dict:
    """Fields of a `Sam2VideoConfig` of 2.5 M parameters."""
    dims = [24, 48, 96, 192]
    sizes = [[image_size // stride] * 2 for stride in (4, 8, 16)]
    return {
        "image_size": image_size,
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "image_size": [image_size, image_size],
                "hidden_size": dims[0],
                "num_attention_heads": 1,
                "blocks_per_stage": [1, 2, 3, 1],
                "embed_dim_per_stage": dims,
                "num_attention_heads_per_stage": [1, 2, 4, 8],
                # windows that fill the picture from stride 16 on: none needs padding
                "window_size_per_stage": [8, 8, image_size // 16, image_size // 32],
                "global_attention_blocks": [4],
                "window_positional_embedding_background_size": [7, 7],
            },
            "backbone_channel_list": dims[::-1],
            "backbone_feature_sizes": sizes,
            "fpn_hidden_size": hidden_size,
        },
        "prompt_encoder_config": {"hidden_size": hidden_size, "image_size": image_size},
        "mask_decoder_config": {
            "hidden_size": hidden_size,
            "mlp_dim": 256,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 64,
            "dynamic_multimask_via_stability": False,
        },
        "multimask_output_in_sam": False,
        "memory_attention_hidden_size": hidden_size,
        "memory_attention_num_layers": 3,
        "memory_attention_feed_forward_hidden_size": 256,
        "memory_attention_dropout": 0.0,
        "memory_attention_rope_dropout": 0.0,
        "memory_attention_rope_feat_sizes": sizes[-1],
        "memory_encoder_hidden_size": hidden_size,
        "mask_downsampler_embed_dim": hidden_size,
        "memory_fuser_embed_dim": hidden_size,
        "memory_fuser_intermediate_dim": 2 * hidden_size,
    }


def tiny_config(vocab_size: int = 256, **special_token_ids: int) -> SparrowConfig:
    """Configuration of sparrow-tiny.

    Args:
        vocab_size: rows of the embedding table, the tokenizer's words and special tokens.
        special_token_ids: `box_token_id`, `seg_token_id`, `video_token_id`, `tsf_token_id`, `pad_token_id`,
            `eos_token_id`.
    """
    text_ids = {name: special_token_ids.pop(name, None) for name in ("pad_token_id", "eos_token_id")}
    ids = {"box_token_id": 3, "seg_token_id": 4, "video_token_id": 5, "tsf_token_id": 6} | special_token_ids
    tower = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": TOWER_SIZE,
        "patch_size": 16,
    }
    return SparrowConfig(
        spatial_config=tower | {"model_type": "clip_vision_model", "projection_dim": 64},
        temporal_config=tower | {"num_frames": 8, "tubelet_size": 4, "layer_scale_init_value": 1.0},
        text_config={
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            **text_ids,
        },
        mask_tracker_config={"sam2_config": {"model_type": "sam2_video", **sam2_settings()}},
        proposer_config={
            "d_model": 128,
            "encoder_layers": 1,
            "encoder_ffn_dim": 256,
            "encoder_attention_heads": 4,
            "decoder_layers": 2,
            "decoder_ffn_dim": 256,
            "decoder_attention_heads": 4,
            "num_feature_levels": 2,
            "num_queries": 24,
            "dropout": 0.0,
            "box_head_hidden_size": 128,
            "max_proposals": 16,
        },
        filtration_config={
            "hidden_size": 128,
            "roi_size": 5,
            "dot_product_score": True,
            "plural_head": True,
            "completion_iou": 0.3,
            "num_refined": 8,
            "max_boxes_per_token": 4,
            "nms_threshold": 0.5,
            "fallback_threshold": 0.3,  # below: nothing matches
        },
        num_frames=8,
        num_prompt_frames=4,
        spatial_feature_layer=-1,
        spatial_pool_size=8,
        temporal_pool_size=8,
        **ids,
    )


@torch.no_grad()
def initialize_attributes(side: nn.Module):
    """Start the throw-away attribute embeddings of the pixel side at a size that the mask decoder notices."""
    for embedding in side.attribute_prompts.values():
        nn.init.normal_(embedding.weight, std=0.3)


@torch.no_grad()
def initialize_for_scratch(side: nn.Module):
    """Start the pixel side (`mask_tracker`, `region_proposer`, `filtration_head`) where it can learn from little data.

    SAM2 gets torch's default initialisation, as it had when Meta trained it: with transformers' default (normal, std
    0.02), and with Xavier weights around embeddings of that size too, a narrow mask decoder stays for hundreds of
    steps on the plateau where it ignores the box. Halved random position frequencies suit objects of a fifth of the
    picture.
    """
    for module in side.mask_tracker.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for part in (side.region_proposer, side.filtration_head):
        for module in part.modules():
            # what starts at zero does so on purpose: box offsets, deformable sampling
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.any():
                nn.init.xavier_uniform_(module.weight)
    sam2 = side.mask_tracker.sam2
    frequencies = 0.5 * torch.randn_like(sam2.shared_image_embedding.positional_embedding)
    sam2.shared_image_embedding.positional_embedding.copy_(frequencies)
    sam2.prompt_encoder.shared_embedding.positional_embedding.copy_(frequencies)
    for block in sam2.memory_encoder.memory_fuser.layers:
        block.scale.fill_(0.1)
    for embedding in (
        sam2.no_memory_embedding,
        sam2.no_memory_positional_encoding,
        sam2.memory_temporal_positional_encoding,
        sam2.no_object_pointer,
        sam2.occlusion_spatial_embedding_parameter,
    ):
        nn.init.normal_(embedding, std=0.02)


def cosine_schedule(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
