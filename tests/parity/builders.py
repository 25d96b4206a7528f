"""Our models in the sizes of official `config.json` files, with official weights."""

import torch


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
