"""Checkpoints that are broken, incomplete or made to do harm, and models that answer nonsense.

Numbers are cases of the agreed list.
"""

import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import pipeline

from modeling_sparrow import SparrowProcessor
from modeling_sparrow.cli import load_model, main
from modeling_sparrow.modeling_outputs import LocatedBoxes
from sparrow_processing import GroundingResult

from ..byte_tokenizer import byte_tokenizer
from ..tiny import random_clip, random_model, say


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of a good checkpoint."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def rewrite_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused_by_command(folder, capsys) -> str:
    """The one line that `sparrow info` says about a bad checkpoint."""
    capsys.readouterr()
    assert main(["info", str(folder)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("sparrow: ")]
    assert "Traceback" not in printed.err
    return line


def test_a_good_checkpoint_is_loaded(folder, shared_model):
    model, processor = load_model(str(folder), "cpu")
    assert not model.training and type(processor) is SparrowProcessor
    for name, tensor in shared_model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


HEADS = [
    "model.seg_head.fc2.weight",
    "model.box_head.fc1.bias",
    "model.filtration_head.score_head.0.weight",
    "model.region_proposer.box_heads.0.layers.0.weight",
    "model.mask_tracker.sam2.no_memory_embedding",
    "model.host.temporal_adapter.fc1.weight",
    "model.host.language_model.lm_head.weight",
]


@pytest.mark.parametrize("name", HEADS)
def test_29_missing_tensor(name, folder):
    rewrite_weights(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"1 tensors are absent or do not fit.*{name}"):
        load_model(str(folder), "cpu")


@pytest.mark.parametrize("name", HEADS[:3])
def test_29_tensor_of_another_shape(name, folder, capsys):
    def enlarge(tensors):
        tensors[name] = torch.zeros(7, *tensors[name].shape[1:])

    rewrite_weights(folder, enlarge)
    assert name in refused_by_command(folder, capsys)
    with pytest.raises(ValueError, match=rf"1 tensors are absent or do not fit.*{name}"):
        load_model(str(folder), "cpu")


def test_29_all_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    rewrite_json(folder / "config.json", filtration_config=config["filtration_config"] | {"hidden_size": 48})
    with pytest.raises(ValueError, match=r"\d\d tensors are absent or do not fit .* …"):
        load_model(str(folder), "cpu")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "model.pt"])
def test_29_pickled_weights_are_never_opened(name, folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    torch.save({"model.seg_head.fc1.bias": Bomb(tmp_path / "exploded")}, folder / name)
    assert "safetensors" in refused_by_command(folder, capsys)
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(folder), "cpu")
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        pipeline("video-grounding", model=str(folder))
    assert not (tmp_path / "exploded").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "exploded").exists()  # the bomb was live


@pytest.mark.parametrize("kept", [0, 4, 5000, -1000])
def test_29_weights_cut_short(kept, folder, capsys):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert refused_by_command(folder, capsys)


def test_29_weights_that_are_no_safetensors(folder, capsys):
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)
    assert "cannot be loaded" in refused_by_command(folder, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"brightness": 3}, "brightness"),
        ({"num_frames": "many"}, "num_frames"),
        ({"num_frames": 3}, "multiple of the temporal tower's chunk of 2"),
        ({"seg_token_id": 3}, "must differ"),
        ({"model_type": "bert"}, "type 'bert', not 'sparrow'"),
        ({"model_type": "no_such_model"}, "no_such_model"),
    ],
)
def test_29_bad_configuration(change, message, folder, capsys):
    rewrite_json(folder / "config.json", **change)
    assert message in refused_by_command(folder, capsys)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ud800"])
def test_29_configuration_that_is_no_json_object(text, folder, capsys):
    (folder / "config.json").write_text(text, errors="surrogatepass")
    assert refused_by_command(folder, capsys)


@pytest.mark.parametrize("model_type", ["sparrow", "no_such_model"])
def test_29_code_beside_the_weights_is_not_run(model_type, folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n\nclass Evil:\n    pass\n")
    names = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoProcessor": "evil.Evil"}
    rewrite_json(folder / "config.json", auto_map=names, model_type=model_type)
    rewrite_json(folder / "processor_config.json", auto_map=names)
    if model_type == "sparrow":
        model, processor = load_model(str(folder), "cpu")  # our own classes
        assert type(model).__module__.startswith("modeling_sparrow") and type(processor) is SparrowProcessor
    else:
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_model(str(folder), "cpu")
    assert not (tmp_path / "ran").exists()


def test_30_tokenizer_without_the_tokens(folder, capsys):
    byte_tokenizer(["<pad>", "<|end|>", "[SEG]"]).save_pretrained(folder)
    assert "lacks [BOX], <video>, <tsf>" in refused_by_command(folder, capsys)


@pytest.mark.parametrize("load", [load_model, lambda name, device: pipeline("video-grounding", model=name)])
def test_30_tokenizer_with_other_ids(load, folder):
    order = ["<pad>", "<unk>", "<|end|>", "[SEG]", "[BOX]", "<video>", "<tsf>"]
    byte_tokenizer(order).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"\[BOX\]: processor 4, model 3; \[SEG\]: processor 3, model 4"):
        load(str(folder), "cpu")


@pytest.mark.parametrize("load", [load_model, lambda name, device: pipeline("video-grounding", model=name)])
def test_30_processor_of_another_model(load, folder):
    (folder / "processor_config.json").unlink()  # the released sizes are the defaults
    with pytest.raises(ValueError, match="mask_size: processor 1024, model 64"):
        load(str(folder), "cpu")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_29_missing_file(missing, folder, capsys):
    (folder / missing).unlink()
    assert refused_by_command(folder, capsys)


def test_29_no_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("missing", "missing/and/deeper", "empty", "file"):
        assert name.split("/")[0] in refused_by_command(tmp_path / name, capsys)


# --- 31: models that answer nonsense ---

SOUND = [0.2, 0.3, 0.6, 0.7]
BROKEN = {
    "nan": [math.nan, 0.3, 0.6, 0.7],
    "all nan": [math.nan] * 4,
    "infinite": [0.2, 0.3, math.inf, 0.7],
    "inverted x": [0.6, 0.3, 0.2, 0.7],
    "inverted y": [0.2, 0.7, 0.6, 0.3],
}
TOLERATED = {"outside": [1.5, 1.5, 2.0, 2.0], "huge": [-1e6, -1e6, 1e6, 1e6], "a point": [0.5] * 4}
SETTINGS = {
    "memory": {},
    "frame by frame": {"mask_tracker_config": {"propagation": "framewise"}},
    "in turn": {"mask_tracker_config": {"joint_prompt": False}},
}


def located(boxes, scores=None):
    boxes = torch.tensor(boxes).reshape(-1, 4)
    scores = torch.full((len(boxes),), 0.5) if scores is None else torch.tensor(scores)
    return LocatedBoxes(0, boxes, scores, torch.zeros(64), None, scores)


def ground_with(model, processor, places, answer):
    """Result of a model that locates the given boxes for each [BOX]; goes through strict JSON."""
    model.locate = lambda *args: places
    inputs = processor(text="the ring", videos=random_clip(3))
    with torch.no_grad():
        output = model.ground(**inputs, **say(inputs, answer))
    (result,) = processor.post_process_grounding(output)
    return GroundingResult.from_json(result.to_json())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("box", BROKEN)
def test_31_broken_boxes_are_dropped(box, setting, processor):
    model = random_model(**SETTINGS[setting])
    places = [located([SOUND, BROKEN[box]]), located([BROKEN[box]])]
    result = ground_with(model, processor, places, "it is [BOX] [SEG] and [BOX] [SEG] .")
    assert len(result) == 1
    assert any("2 of the boxes found are not finite or inverted" in warning for warning in result.warnings)
    alone = ground_with(model, processor, [located([SOUND]), located([])], "it is [BOX] [SEG] and [BOX] [SEG] .")
    assert result[0].rles == alone[0].rles and result[0].visible.any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_31_nothing_but_broken_boxes(setting, processor):
    model = random_model(**SETTINGS[setting])
    result = ground_with(model, processor, [located(list(BROKEN.values()))], "it is [BOX] [SEG] .")
    assert result.objects == [] and "The answer points at no object." in result.warnings
    assert result.text == "it is."


def test_31_broken_scores(processor):
    places = [located([SOUND, SOUND], [math.nan, 0.5])]
    assert len(ground_with(random_model(), processor, places, "it is [BOX] [SEG] .")) == 1


@pytest.mark.parametrize("box", TOLERATED)
def test_31_odd_boxes_give_a_result_within_the_picture(box, processor):
    result = ground_with(random_model(), processor, [located([TOLERATED[box]])], "it is [BOX] [SEG] .")
    boxes = result[0].boxes[result[0].visible]
    assert len(result) == 1 and (boxes >= 0).all() and (boxes <= [64, 48, 64, 48]).all()


@pytest.mark.parametrize(
    "part",
    [
        "seg_head",
        "box_head",
        "filtration_head.refinement_head",
        "filtration_head.score_head",
        "region_proposer",
        "mask_tracker.sam2.mask_decoder",
        "mask_tracker.sam2.memory_encoder",
        "mask_tracker.sam2.vision_encoder",
        "host.language_model.lm_head",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_31_weights_that_are_not_finite(part, value, processor):
    model = random_model()
    with torch.no_grad():
        for parameter in model.model.get_submodule(part).parameters():
            parameter.fill_(value)
    inputs = processor(text="the ring", videos=random_clip(3))
    for output in (model.ground(**inputs, **say(inputs)), model.ground(**inputs, max_new_tokens=2)):
        (result,) = processor.post_process_grounding(output)
        text = result.to_json()
        assert "NaN" not in text and "Infinity" not in text
        for track in result:
            assert np.isfinite(track.scores).all() and np.isnan(track.boxes[~track.visible]).all()


def test_31_fifty_tokens_in_one_answer(processor, shared_model):
    inputs = processor(text="the ring", videos=random_clip(2))
    output = shared_model.ground(**inputs, **say(inputs, "[BOX] [SEG] " * 50))
    (result,) = processor.post_process_grounding(output)
    assert len({track.id for track in result}) == len(result) >= 50 and result.text == ""
