"""SAM2 checkpoints of Meta (2.0, 2.1) and of SPARROW / VideoGLaMM into the names of transformers' `Sam2VideoModel`."""

import re

import torch
from transformers import Sam2VideoConfig

from .key_map import rename_keys

# Image encoder: also used alone, inside detector checkpoints.
_IMAGE_ENCODER_RULES = [
    (r"^image_encoder\.trunk\.patch_embed\.proj\.", "vision_encoder.backbone.patch_embed.projection."),
    (r"^image_encoder\.trunk\.(blocks\.\d+)\.norm(\d)\.", r"vision_encoder.backbone.\1.layer_norm\2."),
    (r"^image_encoder\.trunk\.(blocks\.\d+\.mlp)\.layers\.0\.", r"vision_encoder.backbone.\1.proj_in."),
    (r"^image_encoder\.trunk\.(blocks\.\d+\.mlp)\.layers\.1\.", r"vision_encoder.backbone.\1.proj_out."),
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
]

# Three-layer perceptrons; the rules of their owners are applied as well.
_MLP_RULES = [
    (rf"^({owner})\.layers\.{official}\.", rf"\1.{ours}.")
    for owner in (
        r"sam_mask_decoder\.output_hypernetworks_mlps\.\d+",
        r"sam_mask_decoder\.iou_prediction_head",
        r"sam_mask_decoder\.pred_obj_score_head",
        "obj_ptr_proj",
    )
    for official, ours in ((0, "proj_in"), (2, "proj_out"), (1, r"layers.0"))
]

_RULES = [
    *_IMAGE_ENCODER_RULES,
    *_MLP_RULES,
    (r"^memory_encoder\.mask_downsampler\.encoder\.12\.", "memory_encoder.mask_downsampler.final_conv."),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"^memory_encoder\.fuser\.layers\.(\d+)\.(gamma|weight)$", r"memory_encoder.memory_fuser.layers.\1.scale"),
    (r"^memory_encoder\.fuser\.layers\.(\d+)\.dwconv\.", r"memory_encoder.memory_fuser.layers.\1.depthwise_conv."),
    (r"^memory_encoder\.fuser\.layers\.(\d+)\.norm\.", r"memory_encoder.memory_fuser.layers.\1.layer_norm."),
    (
        r"^memory_encoder\.fuser\.layers\.(\d+)\.pwconv(\d)\.",
        r"memory_encoder.memory_fuser.layers.\1.pointwise_conv\2.",
    ),
    (r"^memory_attention\.norm\.", "memory_attention.layer_norm."),
    (r"^(memory_attention\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^(memory_attention\.layers\.\d+\..*)\.out_proj\.", r"\1.o_proj."),
    (r"^sam_prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^sam_prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^sam_prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^(sam_mask_decoder\.transformer\..*)\.mlp\.layers\.0\.", r"\1.mlp.proj_in."),
    (r"^(sam_mask_decoder\.transformer\..*)\.mlp\.layers\.1\.", r"\1.mlp.proj_out."),
    (r"^(sam_mask_decoder\.transformer\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^(sam_mask_decoder\.transformer)\.norm_final_attn\.", r"\1.layer_norm_final_attn."),
    (r"^(sam_mask_decoder\..*)\.out_proj\.", r"\1.o_proj."),
    (r"^sam_mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^sam_mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^sam_mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"^obj_ptr_proj\.", "object_pointer_proj."),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
]

_GAUSSIAN = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_POINT_EMBEDDING = re.compile(r"^sam_prompt_encoder\.point_embeddings\.(\d+)\.weight$")
_DOWNSAMPLER = re.compile(r"^memory_encoder\.mask_downsampler\.encoder\.(\d+)\.(weight|bias)$")


def convert_sam2(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a SAM2 state dict (the content of `"model"` in Meta's files).

    The position matrix is stored twice by transformers, the four point embeddings are one table there. Both spellings
    of the fuser's layer scale (`gamma`, and `weight` in SPARROW's copy) are accepted.
    """
    official = dict(official)
    converted = {}
    matrix = official.pop(_GAUSSIAN)
    converted["shared_image_embedding.positional_embedding"] = matrix
    converted["prompt_encoder.shared_embedding.positional_embedding"] = matrix.clone()
    points = {int(match[1]): official.pop(key) for key in list(official) if (match := _POINT_EMBEDDING.match(key))}
    converted["prompt_encoder.point_embed.weight"] = torch.cat([points[label] for label in sorted(points)])
    for key in list(official):
        match = _DOWNSAMPLER.match(key)
        if match and int(match[1]) < 12:  # convolutions at 0, 3, 6, 9 and their norms right after
            layer, part = divmod(int(match[1]), 3)
            name = ("conv", "layer_norm")[part]
            converted[f"memory_encoder.mask_downsampler.layers.{layer}.{name}.{match[2]}"] = official.pop(key)
    return converted | rename_keys(official, _RULES)


def convert_sam2_image_encoder(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a SAM2 image encoder alone (keys `trunk.*`, `neck.*`) into those of `Sam2VisionModel`."""
    renamed = rename_keys({f"image_encoder.{key}": value for key, value in official.items()}, _IMAGE_ENCODER_RULES)
    return {key.removeprefix("vision_encoder."): value for key, value in renamed.items()}


# What shapes cannot tell of Meta's four trunks, by embedding width and depth.
_RELEASED_TRUNKS = {
    (96, 12): {
        "num_attention_heads": 1,
        "window_size_per_stage": [8, 4, 14, 7],
        "global_attention_blocks": [5, 7, 9],
    },
    (96, 16): {
        "num_attention_heads": 1,
        "window_size_per_stage": [8, 4, 14, 7],
        "global_attention_blocks": [7, 10, 13],
    },
    (112, 24): {
        "num_attention_heads": 2,
        "window_size_per_stage": [8, 4, 14, 7],
        "global_attention_blocks": [12, 16, 20],
    },
    (144, 48): {
        "num_attention_heads": 2,
        "window_size_per_stage": [8, 4, 16, 8],
        "global_attention_blocks": [23, 33, 43],
    },
}


def sam2_vision_config(official: dict[str, torch.Tensor], image_size: int = 1024, **trunk) -> dict:
    """Fields of a `Sam2VisionConfig`, read off the tensors of an image encoder (`image_encoder.*`).

    Args:
        official: Meta's names.
        image_size: side of the frames; not in the weights.
        trunk: `num_attention_heads`, `window_size_per_stage`, `global_attention_blocks` for a trunk that is not one
            of Meta's four; those are recognised.
    """
    blocks_per_stage, dims = _trunk_stages(official)
    settings = dict(_RELEASED_TRUNKS.get((dims[0], sum(blocks_per_stage)), {})) | trunk
    if not {"num_attention_heads", "window_size_per_stage", "global_attention_blocks"} <= settings.keys():
        raise ValueError(
            f"Unknown Hiera trunk: width {dims[0]}, blocks {blocks_per_stage}. Pass num_attention_heads, "
            "window_size_per_stage and global_attention_blocks."
        )
    return {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "image_size": [image_size, image_size],
            "hidden_size": dims[0],
            "blocks_per_stage": blocks_per_stage,
            "embed_dim_per_stage": dims,
            "num_attention_heads_per_stage": [
                settings["num_attention_heads"] * 2**stage for stage in range(len(dims))
            ],
            "window_positional_embedding_background_size": list(official["image_encoder.trunk.pos_embed"].shape[-2:]),
            **settings,
        },
        "backbone_channel_list": dims[::-1],
        "backbone_feature_sizes": [[image_size // stride] * 2 for stride in (4, 8, 16)],
        "fpn_hidden_size": official["image_encoder.neck.convs.0.conv.weight"].shape[0],
    }


def sam2_config_from_weights(official: dict[str, torch.Tensor], image_size: int = 1024, **trunk) -> Sam2VideoConfig:
    """Sizes of a whole SAM2 checkpoint; arguments as in `sam2_vision_config`."""
    vision = sam2_vision_config(official, image_size, **trunk)
    hidden = vision["fpn_hidden_size"]
    decoder = "sam_mask_decoder."
    return Sam2VideoConfig(
        image_size=image_size,
        vision_config=vision,
        prompt_encoder_config={"hidden_size": hidden, "image_size": image_size},
        mask_decoder_config={
            "hidden_size": hidden,
            "mlp_dim": official[decoder + "transformer.layers.0.mlp.layers.0.weight"].shape[0],
            "iou_head_hidden_dim": official[decoder + "iou_prediction_head.layers.0.weight"].shape[0],
        },
        num_maskmem=len(official["maskmem_tpos_enc"]),
        enable_temporal_pos_encoding_for_object_pointers="obj_ptr_tpos_proj.weight" in official,
        enable_occlusion_spatial_embedding="no_obj_embed_spatial" in official,
        memory_attention_hidden_size=hidden,
        memory_attention_num_layers=_count(official, r"^memory_attention\.layers\.(\d+)\."),
        memory_attention_feed_forward_hidden_size=official["memory_attention.layers.0.linear1.weight"].shape[0],
        memory_attention_rope_feat_sizes=vision["backbone_feature_sizes"][-1],
        memory_encoder_hidden_size=hidden,
        memory_encoder_output_channels=official["maskmem_tpos_enc"].shape[-1],
        mask_downsampler_embed_dim=hidden,
        memory_fuser_embed_dim=hidden,
        memory_fuser_intermediate_dim=official["memory_encoder.fuser.layers.0.pwconv1.weight"].shape[0],
        memory_fuser_num_layers=_count(official, r"^memory_encoder\.fuser\.layers\.(\d+)\."),
    )


def _trunk_stages(official: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """Blocks and width of each stage of the Hiera trunk."""
    depth = _count(official, r"^image_encoder\.trunk\.blocks\.(\d+)\.")
    widths = [official[f"image_encoder.trunk.blocks.{i}.attn.proj.weight"].shape[0] for i in range(depth)]
    dims = sorted(set(widths))
    return [widths.count(dim) for dim in dims], dims


def _count(official: dict[str, torch.Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for key in official if (match := re.match(pattern, key)))
