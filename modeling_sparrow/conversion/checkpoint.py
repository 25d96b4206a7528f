"""From the files of a release to a folder that `from_pretrained` loads.

A release is scattered: the SPARROW (or VideoGLaMM) checkpoint, a separate detector, and the two vision towers that
some exports leave out. Weights are read with `weights_only=True`; nothing else is unpickled.
"""

import json
import logging
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from sparrow_processing.processing_sparrow import BOX_TOKEN, SEG_TOKEN, TSF_TOKEN, VIDEO_TOKEN, SparrowProcessor

from ..modeling_sparrow import SparrowForVideoGrounding
from .released import VIDEO_BRANCH, released_config
from .videoglamm import convert_released

logger = logging.getLogger(__name__)

# Fields of Phi-3 that the config.json of a release shares with transformers' own.
_TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "original_max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters",
    "sliding_window", "hidden_act", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
)  # fmt: skip

# Phi-3's turns, with the clip before the words and tracked features after them. `{start}` and `{gap}`: see
# `chat_template`.
_PHI3_TURNS = (
    "{start}<|system|>\nYou are a helpful AI assistant.<|end|>\n"
    "{% for message in messages %}<|{{ message.role }}|>\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for item in message.content %}"
    "{% if item.type == 'video' %}<video>{gap}\n"
    "{% elif item.type == 'tracked_features' %}\n<tsf>"
    "{% else %}{{ item.text }}{% endif %}{% endfor %}{% endif %}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint: a `.safetensors`, `.bin` or `.pt` file, or a folder with one or several of them.

    The containers `model` and `module` and the prefixes that DeepSpeed and peft put before every key are removed.

    Raises:
        FileNotFoundError: if there are no weights.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise FileNotFoundError(f"{path}: no .safetensors or pytorch_model*.bin files.")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"{path}: no such file or folder.")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        for container in ("model", "module"):
            if isinstance(part.get(container), dict):
                part = part[container]
        tensors |= {key: value for key, value in part.items() if isinstance(value, torch.Tensor)}
    for prefix in ("module.", "base_model.model."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def merge_lora(tensors: dict[str, torch.Tensor], alpha: float = 16.0) -> dict[str, torch.Tensor]:
    """Fold low-rank updates into their layers: W + alpha / r * B A. A merged checkpoint comes back unchanged."""
    merged = {}
    for key, value in tensors.items():
        if ".lora_" in key:
            continue
        name = key.replace(".base_layer.", ".")
        if name != key and name.endswith(".weight"):
            stem = key.removesuffix(".base_layer.weight")
            down, up = tensors[f"{stem}.lora_A.default.weight"], tensors[f"{stem}.lora_B.default.weight"]
            value = (value.float() + alpha / len(down) * (up.float() @ down.float())).to(value.dtype)
        merged[name] = value
    return merged


def internvideo2_config(weights: dict[str, torch.Tensor], num_attention_heads: int = 16, num_frames: int = 4) -> dict:
    """Fields of an `InternVideo2Config`, read off tensors named `vision_encoder.*`; the last block is not used."""
    patch = weights["vision_encoder.patch_embed.proj.weight"]  # (D, 3, tubelet, p, p)
    depth = 1 + max(int(m[1]) for key in weights if (m := re.match(r"^vision_encoder\.blocks\.(\d+)\.", key)))
    side = round((weights["vision_encoder.img_pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "image_size": side * patch.shape[-1],
        "patch_size": patch.shape[-1],
        "num_frames": num_frames,
        "tubelet_size": patch.shape[2],
        "hidden_size": patch.shape[0],
        "intermediate_size": weights["vision_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": depth - 1,
        "num_attention_heads": num_attention_heads,
    }


def convert_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    clip: str | Path,
    internvideo: str | Path | None = None,
    detector: str | Path | None = None,
    video_branch: bool = False,
    dtype: torch.dtype = torch.float16,
    internvideo_heads: int = 16,
    lora_alpha: float = 16.0,
    **sizes,
) -> SparrowForVideoGrounding:
    """Convert a release and write model and processor to `output`.

    Args:
        source: folder of the SPARROW or VideoGLaMM checkpoint with its `config.json` and tokenizer.
        clip: folder of the CLIP vision tower (its `config.json`, and its weights if `source` has none).
        internvideo: file of the temporal tower; needed if `source` has none.
        detector: folder of the detector; without it the model has no box guidance (VideoGLaMM).
        video_branch: carry masks on with SAM2's memory as the released video branch does, instead of decoding every
            frame alone as the released evaluation does.
        dtype: of the written weights.
        sizes: further arguments of `released_config`, for models that are not the released size.

    Raises:
        ValueError: if tensors are missing or left over; all of them are named.
    """
    source, output = Path(source), Path(output)
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    official = _release_with_towers(source, clip, internvideo, lora_alpha)
    temporal = {k.removeprefix("model.vision_tower."): v for k, v in official.items() if "vision_encoder." in k}
    temporal_config = internvideo2_config(temporal, internvideo_heads)
    weights = None if detector is None else read_state_dict(detector)
    share = weights is not None and _shares_encoder(official, weights)
    tokenizer = load_tokenizer(source)
    config = released_config(
        official,
        weights,
        text_config={name: settings[name] for name in _TEXT_FIELDS if name in settings},
        spatial_config=_clip_vision_config(Path(clip)),
        temporal_config=temporal_config,
        seg_token_id=settings["seg_token_idx"],
        box_token_id=settings.get("box_token_idx", tokenizer.convert_tokens_to_ids(BOX_TOKEN)),
        share_encoder=share,
        **(
            {
                "video_token_id": tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
                "tsf_token_id": tokenizer.convert_tokens_to_ids(TSF_TOKEN),
            }
            | sizes
        ),
    )
    if video_branch:
        for name, value in VIDEO_BRANCH.items():
            setattr(config.mask_tracker_config, name, value)
    conversion = convert_released(official, temporal_config["num_hidden_layers"], weights, share)
    model = SparrowForVideoGrounding(config)
    result = model.load_state_dict(conversion.tensors, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(f"missing: {result.missing_keys}; not understood: {result.unexpected_keys}")
    for reason in sorted(set(conversion.dropped.values())):
        count = sum(value == reason for value in conversion.dropped.values())
        logger.info("left out %d tensors: %s", count, reason)
    model = model.to(dtype).eval()
    # the release samples its answers; ours are greedy unless asked otherwise
    model.generation_config = GenerationConfig.from_model_config(config.text_config)
    model.generation_config.update(do_sample=False, max_new_tokens=512)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    if end not in (None, tokenizer.unk_token_id):
        model.generation_config.eos_token_id = sorted({end, tokenizer.eos_token_id})
    model.save_pretrained(output)
    SparrowProcessor.from_config(config, tokenizer).save_pretrained(output)
    return model


def _release_with_towers(
    source: Path, clip: str | Path, internvideo: str | Path | None, lora_alpha: float
) -> dict[str, torch.Tensor]:
    """Merged tensors of a release; towers that it does not hold come from their own files."""
    official = merge_lora(read_state_dict(source), lora_alpha)
    if not any(key.startswith("model.vision_tower.") for key in official):
        if internvideo is None:
            raise ValueError(f"{source} holds no temporal tower: pass internvideo=, the InternVideo2 stage 2 file.")
        tower = read_state_dict(internvideo)
        official |= {f"model.vision_tower.{k}": v for k, v in tower.items() if k.startswith("vision_encoder.")}
    spatial = "model.image_vision_tower.vision_tower."
    if not any(key.startswith(spatial) for key in official):
        tower = {k: v for k, v in read_state_dict(clip).items() if k.startswith("vision_model.")}
        official |= {spatial + key: value for key, value in tower.items()}
    return official


def load_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a release: control tokens made special, placeholders added, Phi-3's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([SEG_TOKEN, BOX_TOKEN, VIDEO_TOKEN, TSF_TOKEN], special_tokens=True)
    tokenizer.padding_side = "left"
    tokenizer.chat_template = chat_template(tokenizer)
    return tokenizer


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Phi-3's chat template so that it gives the ids of the released code.

    That code encodes the text before and after the clip apart, each as if it began a text: a tokenizer that starts
    texts with <s> does so once, and one that marks the start of a text by a space does so after the clip as well.

    Raises:
        ValueError: if the tokenizer follows neither convention.
    """
    before = tokenizer("<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n")["input_ids"]
    after = tokenizer("\nwhere<|end|>\n<|assistant|>\n", add_special_tokens=False)["input_ids"]
    expected = [*before, tokenizer.convert_tokens_to_ids(VIDEO_TOKEN), *after]
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "where"}]}]
    start = "{{ bos_token }}" if before[0] == tokenizer.bos_token_id else ""
    for gap in ("", " "):
        template = _PHI3_TURNS.replace("{start}", start).replace("{gap}", gap)
        ids = tokenizer.apply_chat_template(
            turn, chat_template=template, tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"]
        if ids == expected:
            return template
    raise ValueError("The tokenizer of this release encodes a prompt in a way that this converter does not know.")


def _clip_vision_config(folder: Path) -> dict:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("vision_config", settings)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    fields += ("patch_size", "hidden_act", "projection_dim", "layer_norm_eps")
    return {name: settings[name] for name in fields if name in settings}


def _shares_encoder(official: dict[str, torch.Tensor], detector: dict[str, torch.Tensor]) -> bool:
    """Whether the detector's image encoder is the segmenter's, tensor by tensor."""
    own = {
        key.removeprefix("vis_encoder."): value for key, value in detector.items() if key.startswith("vis_encoder.")
    }
    prefix = "model.visual_model.image_encoder."
    others = {key.removeprefix(prefix): value for key, value in official.items() if key.startswith(prefix)}
    return own.keys() == others.keys() and all(torch.equal(own[key].float(), others[key].float()) for key in own)
