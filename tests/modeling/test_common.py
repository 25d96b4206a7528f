"""The checks transformers runs on its own models, restated for this one."""

import copy

import pytest
import torch

from modeling_sparrow import SparrowConfig, SparrowForVideoGrounding, SparrowModel

from ..tiny import IDS, TOKENIZER, random_clip, random_config, random_model, say

ATOL = 1e-4


@pytest.fixture(scope="module")
def inputs(processor):
    clips = [random_clip(6, seed=1), random_clip(5, seed=2)]
    return processor(text=["the red ring", "the blue star moving left"], videos=clips)


def answered(inputs) -> dict[str, torch.Tensor]:
    """Inputs of `forward` with an answer behind every prompt."""
    answer = torch.tensor(TOKENIZER.encode("it is [BOX] [SEG] . <|end|>", add_special_tokens=False))
    rows = answer.expand(len(inputs["input_ids"]), -1)
    keys = ("spatial_pixel_values", "temporal_pixel_values", "num_frames", "video_index")
    batch = {key: inputs[key] for key in keys}
    batch["input_ids"] = torch.cat([inputs["input_ids"], rows], dim=1)
    batch["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(rows)], dim=1)
    batch["labels"] = torch.cat([torch.full_like(inputs["input_ids"], -100), rows], dim=1)
    return batch


def with_masks(inputs, batch: dict) -> dict:
    generator = torch.Generator().manual_seed(0)
    labels = [(torch.rand(1, int(T), 24, 32, generator=generator) > 0.7).float() for T in inputs["num_mask_frames"]]
    for label in labels:
        label[:, :, 4:20, 6:20] = 1.0  # present in every frame
    return batch | {
        "mask_pixel_values": inputs["mask_pixel_values"],
        "num_mask_frames": inputs["num_mask_frames"],
        "mask_labels": labels,
    }


def test_config_without_arguments_round_trips(tmp_path):
    config = SparrowConfig()
    config.save_pretrained(tmp_path)
    assert SparrowConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert SparrowConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_config_is_strict():
    with pytest.raises(ValueError, match="no field num_framez"):
        SparrowConfig(num_framez=3)
    with pytest.raises(Exception, match="num_frames"):
        SparrowConfig(num_frames="16")
    with pytest.raises(Exception, match="multiple"):
        SparrowConfig(num_frames=15)
    with pytest.raises(Exception, match="differ"):
        SparrowConfig(box_token_id=5, seg_token_id=5)


def test_save_and_load(tmp_path, model, inputs):
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.bin")] == []
    loaded, info = SparrowForVideoGrounding.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    assert state.keys() == loaded.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    batch = answered(inputs)
    torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits)


def test_every_parameter_is_initialised():
    """Weights that `_init_weights` forgets would keep the values they had before."""
    model = SparrowForVideoGrounding(random_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        for module in model.modules():
            module._is_hf_initialized = False
        for parameter in model.parameters():
            parameter._is_hf_initialized = False
        model.initialize_weights()
    forgotten = [name for name, parameter in model.named_parameters() if parameter.isnan().any()]
    assert forgotten == []


def test_full_size_model_builds_on_meta():
    with torch.device("meta"):
        model = SparrowForVideoGrounding(SparrowConfig())
    parts = dict(model.model.named_children())
    assert {"host", "seg_head", "box_head", "mask_tracker", "region_proposer", "filtration_head"} == parts.keys()
    assert sum(p.numel() for p in parts["mask_tracker"].parameters()) == 224_430_130  # SAM2 Hiera-L


def test_eager_equals_sdpa(model, inputs):
    batch = with_masks(inputs, answered(inputs))
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.model.host.language_model.config._attn_implementation == implementation
        assert model.config.proposer_config._attn_implementation == implementation
        with torch.no_grad():
            outputs[implementation] = model(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(outputs["eager"].logits[real], outputs["sdpa"].logits[real], atol=ATOL, rtol=ATOL)
    torch.testing.assert_close(outputs["eager"].mask_logits, outputs["sdpa"].mask_logits, atol=ATOL, rtol=ATOL)


def test_left_padding_changes_nothing(model, processor):
    clip = random_clip(4)
    alone = processor(text="the ring", videos=clip)
    both = processor(text=["the ring", "the small yellow square moving to the left of the red ring"], videos=clip)
    assert both["attention_mask"][0, 0] == 0
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    keys = (
        "spatial_pixel_values",
        "temporal_pixel_values",
        "num_frames",
        "video_index",
        "attention_mask",
        "input_ids",
    )
    single = model.generate(**{key: alone[key] for key in keys}, **kwargs)
    batch = model.generate(**{key: both[key] for key in keys}, **kwargs)
    assert torch.equal(single[0, alone["input_ids"].shape[1] :], batch[0, both["input_ids"].shape[1] :])


def test_cache_equals_no_cache(model, inputs):
    kwargs = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**inputs, **kwargs, use_cache=True)
    uncached = model.generate(**inputs, **kwargs, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    for first, second in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(first, second, atol=ATOL, rtol=ATOL)


def test_beam_search_shares_the_clip(model, inputs):
    sequences = model.generate(**inputs, num_beams=2, num_return_sequences=2, max_new_tokens=4, do_sample=False)
    assert len(sequences) == 2 * len(inputs["input_ids"])


def test_gradient_checkpointing_gives_the_same_gradients(inputs):
    batch = with_masks(inputs, answered(inputs))
    gradients = []
    for checkpointing in (False, True):
        model = random_model()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_bfloat16_forward_and_ground(inputs):
    model = random_model().to(torch.bfloat16)
    batch = with_masks(inputs, answered(inputs))
    with torch.no_grad():
        output = model(**batch)
    assert output.logits.dtype == torch.bfloat16 and output.loss.isfinite()
    assert output.mask_logits.isfinite().all()
    grounded = model.ground(**inputs, **say(inputs))
    assert all(objects for objects in grounded.objects)


def test_resize_token_embeddings(model, inputs):
    vocab_size = model.config.text_config.vocab_size
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(vocab_size + 7)
    assert model.config.text_config.vocab_size == vocab_size + 7
    assert model.get_output_embeddings().out_features == vocab_size + 7
    assert torch.equal(model.get_input_embeddings().weight[:vocab_size], before)
    batch = answered(inputs)
    assert model(**batch).logits.shape[-1] == vocab_size + 7
    assert model(**batch).loss.isfinite()


def test_tied_embeddings(tmp_path, inputs):
    model = random_model(text_config={"tie_word_embeddings": True})
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = SparrowForVideoGrounding.from_pretrained(tmp_path).eval()
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    batch = answered(inputs)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("model_type", ["phi3", "qwen2", "gpt2", "gemma2"])
def test_other_language_models(model_type, inputs):
    """`text_config` may be any causal language model of transformers."""
    text = {"model_type": model_type, "vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64, "head_dim": 8}
    text |= {"pad_token_id": 0, "eos_token_id": TOKENIZER.eos_token_id, "bos_token_id": None}
    config = random_config()
    model = SparrowForVideoGrounding(SparrowConfig(**(config.to_dict() | {"text_config": text}))).eval()
    batch = answered(inputs)
    output = model(**batch)
    assert output.loss.isfinite() and output.logits.shape[-1] == len(TOKENIZER)
    reference = model.model.host.language_model(
        inputs_embeds=model.model.host.embed(
            batch["input_ids"],
            batch["spatial_pixel_values"],
            batch["temporal_pixel_values"],
            batch["num_frames"],
            batch["video_index"],
        ),
        attention_mask=batch["attention_mask"],
    )
    torch.testing.assert_close(output.logits, reference.logits, atol=ATOL, rtol=ATOL)


def test_model_without_head_classes(inputs):
    model = SparrowModel(random_config()).eval()
    output = model(**{key: value for key, value in answered(inputs).items() if key != "labels"})
    assert output.last_hidden_state.shape[:2] == answered(inputs)["input_ids"].shape


def test_frozen_parts_get_no_gradient_and_stay_in_evaluation_mode(inputs):
    model = random_model()
    frozen = ("host.spatial_tower", "host.temporal_tower", "mask_tracker", "region_proposer")
    for name in frozen:
        model.model.get_submodule(name).requires_grad_(False)
    model.train()
    for name in frozen:
        assert not model.model.get_submodule(name).training, name
    assert model.model.filtration_head.training and model.model.host.language_model.training
    model(**with_masks(inputs, answered(inputs))).loss.backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("part", "loss"),
    [
        ("host.language_model", "ce_loss"),
        ("host.spatial_adapter", "ce_loss"),
        ("host.temporal_adapter", "ce_loss"),
        ("box_head", "filter_class_loss"),
        ("filtration_head.score_head", "filter_class_loss"),
        ("filtration_head.refinement_head", "filter_box_loss"),
        ("host.language_model", "filter_class_loss"),
        ("seg_head", "mask_bce_loss"),
        ("seg_head", "mask_dice_loss"),
        ("host.language_model", "mask_bce_loss"),
        ("mask_tracker.sam2.memory_attention", "mask_bce_loss"),
        ("mask_tracker.sam2.memory_encoder", "mask_bce_loss"),
        ("mask_tracker.sam2.mask_decoder", "mask_dice_loss"),
    ],
)
def test_gradient_flows(part, loss, inputs):
    """Each loss reaches the parts it is there to train."""
    # a seed with which some proposals overlap the targets
    model = random_model(1, filtration_config={"positive_iou": 0.01, "negative_iou": 0.005})
    with torch.no_grad():  # an object that counts as absent has no mask to learn from in memory
        model.model.mask_tracker.sam2.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(5.0)
    model.train()
    output = model(**with_masks(inputs, answered(inputs)))
    output[loss].backward()
    gradients = [p.grad for p in model.model.get_submodule(part).parameters() if p.grad is not None]
    assert gradients and any(gradient.abs().sum() > 0 for gradient in gradients)


def test_box_and_seg_heads_are_separate_unless_shared():
    model = random_model()
    assert model.model.box_head is not None
    shared = random_model(shared_token_head=True)
    assert shared.model.box_head is None
    states = torch.randn(3, 32)
    boxes, masks = (shared.model.token_embeddings(states, IDS[name]) for name in ("box_token_id", "seg_token_id"))
    assert torch.equal(boxes, masks)
    assert not torch.equal(*(model.model.token_embeddings(states, IDS[n]) for n in ("box_token_id", "seg_token_id")))


def test_deepcopy_keeps_outputs(model, inputs):
    twin = copy.deepcopy(model)
    batch = answered(inputs)
    torch.testing.assert_close(twin(**batch).logits, model(**batch).logits)


@torch.no_grad()
def test_labels_of_a_token_that_finds_no_box(inputs):
    """An empty mask is what evaluation during training then scores."""
    model = random_model(filtration_config={"score_threshold": 1.5, "fallback_threshold": 1.5})
    output = model(**with_masks(inputs, answered(inputs)))
    assert [len(boxes) for boxes in output.boxes] == [0, 0]
    assert (output.mask_logits < 0).all() and torch.isfinite(output.loss)
