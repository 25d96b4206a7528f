"""Our models in the sizes of official `config.json` files, with official weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import Sam2VideoConfig

from modeling_sparrow.configuration_sparrow import MaskTrackerConfig
from modeling_sparrow.conversion.sam2 import convert_sam2, sam2_config_from_weights
from modeling_sparrow.mask_tracker import MaskTracker


@contextmanager
def options(config, **values) -> Iterator[None]:
    """Set fields of a configuration for a while."""
    before = {name: getattr(config, name) for name in values}
    for name, value in values.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def trunk_settings(sizes: dict) -> dict:
    """What the weights of a Hiera trunk do not tell."""
    return {
        "num_attention_heads": sizes["num_heads"],
        "window_size_per_stage": sizes["window_spec"],
        "global_attention_blocks": sizes["global_att_blocks"],
    }


def set_sam2_rules(config: Sam2VideoConfig, sizes: dict):
    """Rules that the weights do not tell, under the names of the official constructor."""
    for name in (
        "sigmoid_scale_for_mem_enc",
        "sigmoid_bias_for_mem_enc",
        "multimask_output_in_sam",
        "multimask_min_pt_num",
        "multimask_max_pt_num",
        "multimask_output_for_tracking",
    ):
        setattr(config, name, sizes[name])
    config.max_object_pointers_in_encoder = sizes["max_obj_ptrs_in_encoder"]
    if "mask_decoder" in sizes:  # VideoGLaMM's family
        decoder = sizes["mask_decoder"]
        config.memory_attention_num_attention_heads = sizes["memory_attention_heads"]
        config.mask_decoder_config.num_attention_heads = decoder["transformer_heads"]
        config.mask_decoder_config.attention_downsample_rate = decoder["attention_downsample_rate"]
    else:  # Meta's constructor
        decoder = sizes["sam_mask_decoder_extra_args"]
        attention = sizes["memory_attention"]["layer"]["self_attention"]
        config.memory_attention_num_attention_heads = attention["num_heads"]
    for name in ("via_stability", "stability_delta", "stability_thresh"):
        setattr(config.mask_decoder_config, f"dynamic_multimask_{name}", decoder[f"dynamic_multimask_{name}"])


def build_tracker(weights: dict[str, torch.Tensor], image_size: int, trunk: dict, rules: dict) -> MaskTracker:
    """A [`MaskTracker`] with official weights and the official order of prompts.

    `joint_prompt=False`, `num_padding_points=2` and `binarize_prompted_memory=True` are what the released video
    predictor does; memory stays float32 until a test sets `memory_dtype`.
    """
    sam2_config = sam2_config_from_weights(weights, image_size, **trunk)
    set_sam2_rules(sam2_config, rules)
    config = MaskTrackerConfig(
        sam2_config=sam2_config, joint_prompt=False, num_padding_points=2, binarize_prompted_memory=True
    )
    tracker = MaskTracker(config).eval()
    tracker.sam2.load_state_dict(convert_sam2(weights))
    return tracker


def internvideo2_sizes(tower: dict, weights: dict[str, torch.Tensor]) -> dict:
    """Fields of an `InternVideo2Config`; the official tower builds one block more than it runs."""
    mlp = next(value for key, value in weights.items() if key.endswith("vision_encoder.blocks.0.mlp.fc1.weight"))
    return {
        "image_size": tower["img_size"],
        "patch_size": tower["patch_size"],
        "num_frames": tower["num_frames"],
        "hidden_size": tower["embed_dim"],
        "intermediate_size": len(mlp),
        "num_hidden_layers": tower["depth"] - 1,
        "num_attention_heads": tower["num_heads"],
    }


def host_sizes(sizes: dict, weights: dict[str, torch.Tensor]) -> dict:
    """Fields of a `SparrowConfig` on the side of the language model."""
    text = dict(sizes["llm"])
    theta = text.pop("rope_theta")
    return {
        "text_config": {
            "model_type": "phi3",
            **text,
            "vocab_size": len(weights["model.embed_tokens.weight"]),
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "pad_token_id": sizes["pad_token_id"],
            "bos_token_id": sizes["bos_token_id"],
            "eos_token_id": sizes["eos_token_id"],
        },
        "spatial_config": {"model_type": "clip_vision_model", **sizes["clip"]},
        "temporal_config": internvideo2_sizes(sizes["tower"], weights),
        "num_frames": sizes["tower"]["num_frames"],
        "spatial_feature_layer": sizes["mm_vision_select_layer"],
        "spatial_pool_size": sizes["context_pool"][0],
        "temporal_pool_size": sizes["video_pool"][0],
        "seg_token_id": sizes["seg_token_idx"],
        "box_token_id": sizes["box_token_idx"],
        "tsf_num_clusters": sizes["tsf_k"],
        "tsf_iterations": sizes["tsf_kmeans_iters"],
    }


def proposer_sizes(ddetr: dict) -> dict:
    """Fields of a `RegionProposerConfig` that have the same meaning in the official detector."""
    same = (
        "d_model",
        "encoder_layers",
        "decoder_layers",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "encoder_attention_heads",
        "decoder_attention_heads",
        "encoder_n_points",
        "decoder_n_points",
        "num_feature_levels",
        "num_queries",
        "class_cost",
        "bbox_cost",
        "giou_cost",
        "focal_alpha",
        "dropout",
        "activation_function",
    )
    renamed = {
        "class_loss_weight": "cls_loss_coefficient",
        "bbox_loss_weight": "bbox_loss_coefficient",
        "giou_loss_weight": "giou_loss_coefficient",
    }
    return {name: ddetr[name] for name in same} | {name: ddetr[official] for name, official in renamed.items()}


def our_names(official: dict[str, torch.Tensor], converted: dict[str, torch.Tensor]) -> dict[str, str]:
    """Official name to ours, of all tensors that conversion passes on unchanged."""
    ours = {id(tensor): name for name, tensor in converted.items()}
    return {name: ours[id(tensor)] for name, tensor in official.items() if id(tensor) in ours}
