"""Released SPARROW and VideoGLaMM checkpoints, and the files they are assembled from, into our names."""

import re
from dataclasses import dataclass, field

import torch

from .key_map import rename_keys
from .sam2 import convert_sam2, convert_sam2_image_encoder

_INTERNVIDEO2_RULES = [
    (r"^cls_token$", "embeddings.class_token"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^img_pos_embed$", "embeddings.image_position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.attn\.", r"layers.\1.attention."),
    (r"^blocks\.(\d+)\.ls1\.(gamma|weight)$", r"layers.\1.attention_scale"),
    (r"^blocks\.(\d+)\.ls2\.(gamma|weight)$", r"layers.\1.mlp_scale"),
    (r"^blocks\.", "layers."),
]
_INTERNVIDEO2_UNUSED = re.compile(
    r"^(clip_projector|clip_decoder|final_clip_decoder|clip_pos_embed|clip_img_pos_embed|vision_proj)"
)

_PROPOSER_RULES = [
    (r"^ddetr_transformer\.", ""),
    (r"^input_proj\.", "input_projections."),
    (r"^level_embed$", "level_embedding"),
    (r"^query_position_embeddings\.", "query_embedding."),
    (r"^enc_output_norm\.", "encoder_output_norm."),
    (r"^enc_output\.", "encoder_output."),
    (r"^pos_trans_norm\.", "position_norm."),
    (r"^pos_trans\.", "position_projection."),
    (r"^(?:decoder\.)?class_embed_enc\.", "encoder_objectness_head."),
    (r"^(?:decoder\.)?class_embed_coco\.", "objectness_heads.0."),
    (r"^(?:decoder\.)?class_embed_sa1b\.", "objectness_heads.1."),
    (r"^(?:decoder\.)?bbox_embed\.", "box_heads."),
    (r"^(en|de)coder\.layers\.", r"\1coder_layers."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.fc(\d)\.", r".mlp.fc\1."),
]

_FILTRATION_RULES = [
    (r"^proposal_selector\.seg_proj\.", "token_projection."),
    (r"^proposal_selector\.prop_proj\.", "proposal_projection."),
    (r"^proposal_selector\.fuse_proj\.", "fusion_projection."),
    (r"^proposal_selector\.box_head\.", "box_head."),
    (r"^roi_helper\.query_proj\.", "roi_query_projection."),
    (r"^roi_helper\.seg_proj\.", "roi_text_projection."),
    (r"^roi_helper\.level_token_proj\.", "roi_token_projections."),
    (r"^roi_helper\.level_pool_proj\.", "roi_pool_projections."),
    (r"^roi_helper\.score_head\.", "roi_score_head."),
    (r"^roi_fusion_gamma$", "roi_gate"),
]

_HOST_RULES = [
    (r"^lm_head\.", "model.host.language_model.lm_head."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.host.language_model.model.\1."),
    (r"^model\.mm_projector\.0\.", "model.host.temporal_adapter.fc1."),
    (r"^model\.mm_projector\.2\.", "model.host.temporal_adapter.fc2."),
    (r"^model\.image_mm_projector\.0\.", "model.host.spatial_adapter.fc1."),
    (r"^model\.image_mm_projector\.2\.", "model.host.spatial_adapter.fc2."),
    (r"^model\.text_hidden_fcs\.0\.0\.", "model.seg_head.fc1."),
    (r"^model\.text_hidden_fcs\.0\.2\.", "model.seg_head.fc2."),
]


@dataclass
class Conversion:
    """Converted tensors, and the keys that were left out with the reason."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def add(self, tensors: dict[str, torch.Tensor], prefix: str = ""):
        for key, tensor in tensors.items():
            name = prefix + key
            if name in self.tensors:
                raise ValueError(f"Two tensors map to {name}.")
            self.tensors[name] = tensor

    def drop(self, keys: list[str], reason: str):
        self.dropped.update(dict.fromkeys(keys, reason))


def convert_internvideo2(official: dict[str, torch.Tensor], num_layers: int) -> Conversion:
    """InternVideo2 stage 2, keys with or without the `vision_encoder.` prefix; `num_layers` of its blocks are used."""
    conversion = Conversion()
    used = {}
    for key, tensor in official.items():
        name = key.removeprefix("vision_encoder.")
        block = re.match(r"^blocks\.(\d+)\.", name)
        if _INTERNVIDEO2_UNUSED.match(name):
            conversion.drop([key], "pooling and distillation heads are not used")
        elif block and int(block[1]) >= num_layers:
            conversion.drop([key], "SPARROW reads the output of the block before")
        else:
            used[name] = tensor
    conversion.add(rename_keys(used, _INTERNVIDEO2_RULES))
    return conversion


def convert_clip(official: dict[str, torch.Tensor]) -> Conversion:
    """A CLIP vision tower, keys with or without the `vision_model.` prefix."""
    conversion = Conversion()
    for key, tensor in official.items():
        name = key.removeprefix("vision_model.")
        if name.endswith("position_ids"):
            conversion.drop([key], "computed, not stored")
        elif name.startswith(("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")):
            conversion.add({name: tensor})
        else:
            conversion.drop([key], "not part of the vision tower")
    return conversion


def convert_proposer(official: dict[str, torch.Tensor], with_encoder: bool = True) -> Conversion:
    """The detector checkpoint (`CustomDDETRSAM2Model`).

    Its heads are stored under two names, of which either may be missing; the image encoder is left out on request,
    when it equals the segmenter's.
    """
    conversion = Conversion()
    prefix = "vis_encoder."
    encoder = {key[len(prefix) :]: value for key, value in official.items() if key.startswith(prefix)}
    if with_encoder:
        conversion.add(convert_sam2_image_encoder(encoder), "vision_encoder.")
    else:
        conversion.drop([prefix + key for key in encoder], "equal to the segmenter's image encoder")
    heads = {}
    for key, tensor in official.items():
        if key.startswith(prefix):
            continue
        name = next(iter(rename_keys({key: tensor}, _PROPOSER_RULES)))
        if name in heads:
            conversion.drop([key], f"second name of {heads[name][0]}")
        else:
            heads[name] = (key, tensor)
    conversion.add({name: tensor for name, (_, tensor) in heads.items()})
    return conversion


def convert_filtration_head(official: dict[str, torch.Tensor]) -> Conversion:
    """Proposal selector, ROI scorer and their gate, keys without the `model.` prefix."""
    conversion = Conversion()
    conversion.add(rename_keys(official, _FILTRATION_RULES))
    return conversion


def convert_released(
    official: dict[str, torch.Tensor],
    num_temporal_layers: int,
    detector: dict[str, torch.Tensor] | None = None,
    share_encoder: bool = False,
) -> Conversion:
    """A SPARROW or VideoGLaMM state dict into that of `SparrowForVideoGrounding`.

    Args:
        official: `model.*` and `lm_head.weight`; with or without the segmenter and the two vision towers, which some
            exports drop.
        num_temporal_layers: blocks of the temporal tower that are used (39 of the released 40).
        detector: the separate detector checkpoint; without it the model has no box guidance.
        share_encoder: the detector's image encoder equals the segmenter's and is left out.
    """
    conversion = Conversion()
    groups = {
        "sam2": "model.visual_model.",
        "temporal": "model.vision_tower.",
        "spatial": "model.image_vision_tower.vision_tower.",
    }
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in (*groups, "filter", "host")}
    for key, tensor in official.items():
        group = next((name for name, prefix in groups.items() if key.startswith(prefix)), None)
        if group is not None:
            parts[group][key[len(groups[group]) :]] = tensor
        elif re.match(r"^model\.(proposal_selector\.|roi_helper\.|roi_fusion_gamma$)", key):
            parts["filter"][key.removeprefix("model.")] = tensor
        elif key.endswith("rotary_emb.inv_freq"):
            conversion.drop([key], "computed, not stored")
        else:
            parts["host"][key] = tensor
    conversion.add(rename_keys(parts["host"], _HOST_RULES))
    if parts["sam2"]:
        conversion.add(convert_sam2(parts["sam2"]), "model.mask_tracker.sam2.")
    towers = {
        "model.host.temporal_tower.": convert_internvideo2(parts["temporal"], num_temporal_layers),
        "model.host.spatial_tower.": convert_clip(parts["spatial"]),
    }
    if detector is None:
        conversion.drop([f"model.{key}" for key in parts["filter"]], "no detector was given")
    else:
        towers["model.filtration_head."] = convert_filtration_head(parts["filter"])
        towers["model.region_proposer."] = convert_proposer(detector, with_encoder=not share_encoder)
    for prefix, part in towers.items():
        conversion.add(part.tensors, prefix)
        conversion.dropped |= part.dropped
    return conversion
