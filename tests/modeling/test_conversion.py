"""A release, scattered over files as it is published, to a folder that from_pretrained loads.

The real checkpoints cannot be had here: the tensors are those of a small official model.
"""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Metaspace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoProcessor, PreTrainedTokenizerFast

from modeling_sparrow.conversion.checkpoint import chat_template, convert_checkpoint, merge_lora, read_state_dict
from modeling_sparrow.conversion.videoglamm import convert_released

FOLDER = Path(os.environ.get("SPARROW_PARITY_DIR", Path(__file__).parents[2] / "../shared/parity")) / "full_tiny"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is absent; set SPARROW_PARITY_DIR")

CLIP = "model.image_vision_tower.vision_tower."
TOWER = "model.vision_tower."


@pytest.fixture(scope="module")
def sizes() -> dict:
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    return {key: value.float() for key, value in load_file(FOLDER / "weights.safetensors").items()}


def save_tokenizer(folder: Path, sizes: dict):
    words = {
        "<unk>": 0,
        "<s>": 1,
        "<|endoftext|>": 2,
        "<|end|>": 3,
        "<|user|>": 4,
        "<|assistant|>": 5,
        "<|system|>": 6,
    }
    words |= {f"word{number}": number for number in range(len(words), sizes["seg_token_idx"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|endoftext|>", pad_token="<unk>"
    )
    tokenizer.add_tokens(["[SEG]", "[BOX]"])
    assert tokenizer.convert_tokens_to_ids("[BOX]") == sizes["box_token_idx"]
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def release(tmp_path_factory, sizes, official) -> dict[str, Path]:
    """Checkpoint in two pickled shards, CLIP and detector folders, InternVideo2 file under `module`."""
    root = tmp_path_factory.mktemp("release")
    paths = {name: root / name for name in ("source", "clip", "detector")}
    for path in paths.values():
        path.mkdir()
    own = {key: value for key, value in official.items() if not key.startswith((CLIP, TOWER))}
    names = sorted(own)
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        file = paths["source"] / f"pytorch_model-0000{shard}-of-00002.bin"
        torch.save({key: own[key].half() for key in part}, file)
    text = sizes["llm"] | {"model_type": "VideoGPT+", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = text | {"seg_token_idx": sizes["seg_token_idx"], "box_token_idx": sizes["box_token_idx"]}
    (paths["source"] / "config.json").write_text(json.dumps(settings))
    save_tokenizer(paths["source"], sizes)
    clip = {key.removeprefix(CLIP): value for key, value in official.items() if key.startswith(CLIP)}
    save_file(clip, paths["clip"] / "model.safetensors")
    (paths["clip"] / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": sizes["clip"]}))
    tower = {key.removeprefix(TOWER): value for key, value in official.items() if key.startswith(TOWER)}
    paths["internvideo"] = root / "InternVideo2.pt"
    torch.save({"module": tower | {"text_encoder.weight": torch.zeros(2)}}, paths["internvideo"])
    detector = load_file(FOLDER / "weights_ddetr.safetensors")
    save_file(detector, paths["detector"] / "model.safetensors")
    return paths


def convert(release: dict[str, Path], sizes: dict, output: Path, **changes):
    sam2 = sizes["sam2"]
    trunk = {
        "num_attention_heads": sam2["num_heads"],
        "global_attention_blocks": sam2["global_att_blocks"],
        "window_size_per_stage": sam2["window_spec"],
    }
    parts = {name: release[name] for name in ("clip", "internvideo", "detector")}
    settings = {
        "dtype": torch.float32,
        "internvideo_heads": sizes["tower"]["num_heads"],
        "image_size": sam2["image_size"],
        "trunk": trunk,
        "num_frames": sizes["tower"]["num_frames"],
        "tsf_num_clusters": sizes["tsf_k"],
    }
    return convert_checkpoint(release["source"], output, **(parts | settings | changes))


def test_released_files_become_a_folder(release, sizes, official, tmp_path):
    convert(release, sizes, tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    processor.check_config(model.config)
    detector = load_file(FOLDER / "weights_ddetr.safetensors")
    expected = convert_released(official, model.config.temporal_config.num_hidden_layers, detector).tensors
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor.float(), rtol=1e-3, atol=1e-6)  # the shards are float16
    assert model.config.seg_token_id == sizes["seg_token_idx"]
    assert model.config.text_config.rope_parameters["rope_theta"] == sizes["llm"]["rope_theta"]
    assert model.config.text_config.sliding_window == sizes["llm"]["sliding_window"]
    assert not model.generation_config.do_sample
    assert {2, 3} <= set(model.generation_config.eos_token_id)
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Where is it?"}]}]
    assert processor.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == (
        "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n<video>\nWhere is it?<|end|>\n<|assistant|>\n"
    )


def test_converted_model_grounds_a_video(release, sizes, tmp_path):
    model = convert(release, sizes, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    ids = processor.tokenizer.convert_tokens_to_ids(["[BOX]", "[SEG]", "<|end|>"])
    ids = [processor.tokenizer.convert_tokens_to_ids("<|assistant|>"), *ids]
    model.generation_config.sequence_bias = [[[ids[0], ids[1]], 1e4], [[ids[1], ids[2]], 1e4], [[ids[2], ids[3]], 1e4]]
    frames = torch.randint(0, 255, (5, 40, 56, 3), dtype=torch.uint8).numpy()
    inputs = processor(text="word9", videos=[frames])
    output = model.ground(**inputs, max_new_tokens=3)
    result = processor.post_process_grounding(output)[0]
    assert len(result) == 1 and result[0].masks.shape == (5, 40, 56)


def test_without_detector_there_are_no_boxes(release, sizes, tmp_path):
    official = read_state_dict(release["source"])
    source = tmp_path / "source"
    source.mkdir()
    for file in release["source"].iterdir():
        if file.suffix != ".bin":
            (source / file.name).write_bytes(file.read_bytes())
    kept = {
        key: value for key, value in official.items() if "proposal_selector" not in key and "roi_helper" not in key
    }
    torch.save(kept, source / "pytorch_model.bin")
    model = convert(release | {"source": source}, sizes, tmp_path / "out", detector=None, video_branch=True)
    assert not model.config.box_guidance
    assert model.config.mask_tracker_config.propagation == "memory"


def test_missing_parts_are_named(release, sizes, tmp_path):
    with pytest.raises(ValueError, match="no temporal tower"):
        convert(release, sizes, tmp_path / "out", internvideo=None)
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert(release, sizes, tmp_path / "out", internvideo=tmp_path / "nowhere.pt")
    assert not (tmp_path / "out").exists()


def test_pickled_objects_are_refused(tmp_path):
    torch.save({"weight": os.system}, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_state_dict(tmp_path / "bad.pt")


@pytest.mark.parametrize("adds_start", [False, True])
@pytest.mark.parametrize("scheme", ["first", "always"])
def test_prompt_is_encoded_in_two_parts(adds_start, scheme):
    """As a tokenizer with byte fallback does it, whichever way it marks the start of a text by a space."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyzYAI.",
    ]
    tokenizer = Tokenizer(
        BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens(["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<video>", "<tsf>"])
    if adds_start:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    tokenizer.chat_template = chat_template(tokenizer)
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "where is it"}]}]
    ids = tokenizer.apply_chat_template(turn, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert (tokens[0] == "<s>") == adds_start and tokens.count("<s>") <= 1
    after = tokens.index("<video>") + 1
    assert tokens[after : after + 4] == ["▁", "<0x0A>", "w", "h"]


def test_low_rank_updates_are_folded_in():
    torch.manual_seed(0)
    down, up, weight = torch.randn(2, 6), torch.randn(5, 2), torch.randn(5, 6)
    stem = "model.layers.0.self_attn.qkv_proj"
    merged = merge_lora(
        {
            f"{stem}.base_layer.weight": weight,
            f"{stem}.lora_A.default.weight": down,
            f"{stem}.lora_B.default.weight": up,
            "lm_head.weight": weight,
        },
        alpha=16,
    )
    assert merged.keys() == {f"{stem}.weight", "lm_head.weight"}
    torch.testing.assert_close(merged[f"{stem}.weight"], weight + 8 * up @ down)
