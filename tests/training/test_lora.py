"""LoRA: which layers and rows, adapter alone, merging."""

import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from modeling_sparrow import SparrowForVideoGrounding
from modeling_sparrow.training.lora import LoraSettings, add_lora, merge_adapter, target_pattern
from modeling_sparrow.training.run import load_start
from modeling_sparrow.training.settings import SettingsError
from modeling_sparrow.training.trainer import base_model, trained_names

from ..tiny import IDS, random_config, random_model
from .conftest import toy_stage

PHI3 = {"model_type": "phi3", "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
WHOLE = ["host.spatial_adapter", "host.temporal_adapter", "seg_head"]


def matched(model, settings: LoraSettings) -> list[str]:
    return [name for name, _ in model.named_modules() if re.fullmatch(target_pattern(settings), name)]


@pytest.mark.parametrize(
    ("text", "expected"), [({}, {"q_proj", "v_proj"}), (PHI3, {"qkv_proj"})], ids=["llama", "phi3"]
)
def test_layers_of_the_language_model_alone(text, expected):
    model = random_model(text_config=text)
    elsewhere = [name for name, _ in model.named_modules() if name.endswith(("q_proj", "v_proj"))]
    assert any("tower" in name for name in elsewhere) and any("mask_tracker" in name for name in elsewhere)
    names = matched(model, LoraSettings())
    assert all(name.startswith("model.host.language_model.") for name in names)
    assert {name.rpartition(".")[2] for name in names} == expected
    assert len(names) == 2 * len(expected)  # in both layers


def test_parts_beside_the_language_model():
    names = matched(random_model(), LoraSettings(parts=["seg_head", "host.spatial_adapter"]))
    beside = [name for name in names if "language_model" not in name]
    assert {name.rpartition(".")[0] for name in beside} >= {"model.seg_head"}
    assert all(name.startswith(("model.seg_head.", "model.host.spatial_adapter")) for name in beside)


def test_no_layer_of_that_name():
    with pytest.raises(SettingsError, match="no layer"):
        add_lora(random_model(), LoraSettings(language_modules=["wqkv"]), [])


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_the_new_tokens_learn_and_others_do_not(tied):
    start = random_model(text_config={"tie_word_embeddings": tied})
    start.tie_weights()
    tables = (start.get_input_embeddings().weight, start.get_output_embeddings().weight)
    before = [table.detach().clone() for table in tables]
    model = add_lora(start.requires_grad_(False), LoraSettings(), ["seg_head"]).train()
    ids = torch.tensor([[IDS["box_token_id"], IDS["seg_token_id"], 20, 21]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    merged = model.merge_and_unload()
    after = (merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)
    for old, new in zip(before, after, strict=True):
        changed = (old != new).any(dim=1).nonzero().flatten().tolist()
        assert changed == sorted([IDS["box_token_id"], IDS["seg_token_id"]])


def test_trained_names_are_those_of_the_settings():
    model = add_lora(random_model().requires_grad_(False), LoraSettings(), WHOLE)
    kinds = {
        "lora": "lora_",
        "rows": "trainable_tokens_delta",
        **{part: f"{part}.modules_to_save" for part in ("spatial_adapter", "temporal_adapter", "seg_head")},
    }
    names = trained_names(model)
    assert all(any(word in name for name in names) for word in kinds.values())
    assert all(any(word in name for word in kinds.values()) for name in names)


def outputs_of(model) -> dict[str, torch.Tensor]:
    config = random_config()
    generator = torch.Generator().manual_seed(5)
    frames = torch.randn(4, 3, 32, 32, generator=generator)
    tokens = [IDS["video_token_id"]] * config.num_visual_tokens(4)
    tokens += [20, IDS["box_token_id"], IDS["seg_token_id"], 21]
    inputs = {"input_ids": torch.tensor([tokens]), "num_frames": torch.tensor([4])}
    inputs |= {"spatial_pixel_values": frames, "temporal_pixel_values": frames}
    masks = torch.randn(1, 2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        output = model(**inputs, mask_pixel_values=masks, box_guidance=False)
    return {name: output[name] for name in ("logits", "seg_embeddings", "mask_logits")}


def test_the_adapter_alone_and_merged_give_the_same_outputs(checkpoint, injected):
    """Peft's own loading on the model it started from, and the merged model, which is what stage 2 starts from."""
    start = SparrowForVideoGrounding.from_pretrained(checkpoint)
    untrained = outputs_of(start.eval())
    adapted = outputs_of(PeftModel.from_pretrained(start, injected).eval())
    again = SparrowForVideoGrounding.from_pretrained(checkpoint)
    merged = outputs_of(merge_adapter(again, injected).eval())
    for name, expected in adapted.items():
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(untrained[name], expected, atol=1e-5)
    torch.testing.assert_close(outputs_of(load_start(str(injected)).model)["logits"], adapted["logits"])


def test_the_adapter_is_small_and_holds_no_frozen_tensor(checkpoint, injected):
    adapter = load_file(injected / "adapter_model.safetensors")
    whole = load_file(checkpoint / "model.safetensors")
    assert sum(t.numel() for t in adapter.values()) < 0.05 * sum(t.numel() for t in whole.values())
    assert not any("tower" in name or "mask_tracker" in name for name in adapter)
    assert not any(file.suffix in (".bin", ".pt", ".pth") for file in injected.iterdir())


def test_stage_settings_reach_the_adapter(checkpoint, tmp_path):
    settings = toy_stage("target_injection", checkpoint, tmp_path, lora={"rank": 4, "alpha": 8})
    model = add_lora(random_model().requires_grad_(False), settings.lora, settings.trainable)
    ranks = {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert ranks == {4}
    assert isinstance(base_model(model), SparrowForVideoGrounding)
