"""A random SPARROW small enough for fast tests, and things to feed it with."""

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from modeling_sparrow import SparrowConfig, SparrowForVideoGrounding, SparrowProcessor
from modeling_sparrow.training.tiny_model import sam2_settings
from modeling_sparrow.training.tiny_tokenizer import build_tokenizer

SIZE = 64
TOKENIZER = build_tokenizer()
IDS = {
    name: TOKENIZER.convert_tokens_to_ids(token)
    for name, token in {
        "box_token_id": "[BOX]",
        "seg_token_id": "[SEG]",
        "video_token_id": "<video>",
        "tsf_token_id": "<tsf>",
    }.items()
}


def random_config(**overrides) -> SparrowConfig:
    sam2 = sam2_settings(image_size=SIZE)
    backbone = sam2["vision_config"]["backbone_config"]
    backbone |= {"hidden_size": 8, "embed_dim_per_stage": [8, 16, 32, 64], "blocks_per_stage": [1, 1, 2, 1]}
    backbone |= {"num_attention_heads_per_stage": [1, 1, 2, 4], "global_attention_blocks": [3]}
    backbone |= {"window_size_per_stage": [8, 4, 4, 2]}
    sam2["vision_config"]["backbone_channel_list"] = [64, 32, 16, 8]
    sam2 |= {"memory_attention_num_layers": 1, "multimask_output_in_sam": True, "num_maskmem": 3}
    sam2 |= {"max_object_pointers_in_encoder": 4}
    settings = {
        "spatial_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        "temporal_config": {
            "image_size": 32,
            "patch_size": 8,
            "num_frames": 2,
            "tubelet_size": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "layer_scale_init_value": 0.5,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": len(TOKENIZER),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": TOKENIZER.eos_token_id,
            "pad_token_id": TOKENIZER.pad_token_id,
        },
        "mask_tracker_config": {"sam2_config": {"model_type": "sam2_video", **sam2}, "frame_batch_size": 2},
        "proposer_config": {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 4,
            "decoder_layers": 2,
            "decoder_ffn_dim": 32,
            "decoder_attention_heads": 4,
            "num_queries": 12,
            "dropout": 0.0,
            "box_head_hidden_size": 32,
            "max_proposals": 8,
        },
        "filtration_config": {"hidden_size": 32, "roi_size": 3, "num_refined": 4},
        "num_frames": 4,
        "num_prompt_frames": 2,
        "spatial_pool_size": 2,
        "temporal_pool_size": 2,
        **IDS,
    }
    for name, value in overrides.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            settings[name] |= value
        else:
            settings[name] = value
    return SparrowConfig(**settings)


def random_model(seed: int = 0, **overrides) -> SparrowForVideoGrounding:
    """A model with weights large enough that its outputs differ from input to input."""
    torch.manual_seed(seed)
    model = SparrowForVideoGrounding(random_config(**overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return model.eval()


def random_processor(config: SparrowConfig | None = None) -> SparrowProcessor:
    return SparrowProcessor.from_config(config or random_config(), TOKENIZER, spatial_crop=False)


def random_clip(num_frames: int = 6, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Frames `(T, H, W, 3)` uint8: a bright square that wanders over smooth noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 160, (height // 8 + 1, width // 8 + 1, 3))
    background = np.kron(coarse, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)
    frames = np.repeat(background[None], num_frames, axis=0)
    colour = rng.integers(120, 255, 3)
    for t in range(num_frames):
        y, x = (5 + 3 * t) % (height - 16), (8 + 5 * t) % (width - 16)
        frames[t, y : y + 14, x : x + 14] = colour
    return frames


class ForcedAnswer(LogitsProcessor):
    """Makes a random model say the given words."""

    def __init__(self, prompt_length: int, ids: list[int]):
        self.prompt_length, self.ids = prompt_length, ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = min(input_ids.shape[1] - self.prompt_length, len(self.ids) - 1)
        forced = torch.full_like(scores, -1e9)
        forced[:, self.ids[step]] = 0
        return forced


def say(inputs, text: str = "it is [BOX] [SEG] . <|end|>") -> dict:
    """Keyword arguments for `generate` and `ground` that make every row answer `text`."""
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    forced = ForcedAnswer(inputs["input_ids"].shape[1], ids)
    return {"logits_processor": LogitsProcessorList([forced]), "max_new_tokens": len(ids)}
