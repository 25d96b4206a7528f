"""An exported repository works where this package is not installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoProcessor, pipeline

from modeling_sparrow import SparrowForVideoGrounding, SparrowProcessor, VideoGroundingPipeline
from modeling_sparrow.cli import export_repository, load_model, main

# Runs in a process that cannot import the package. Prints what a user would compare.
STRANGER = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_sparrow", "sparrow_processing"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

folder, clip, again = sys.argv[1:4]
refused = []
for load in (AutoConfig.from_pretrained, AutoModel.from_pretrained, AutoProcessor.from_pretrained):
    try:
        load(folder, trust_remote_code=False)
    except ValueError as error:
        refused.append(str(error))
try:
    pipeline("video-grounding", model=folder, trust_remote_code=False)
except ValueError as error:
    refused.append(str(error))

model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=["the ring", "the star"], videos=clip)
results = processor.post_process_grounding(model.ground(**inputs))
ground = pipeline("video-grounding", model=folder, trust_remote_code=True)
piped = ground(clip, ["the ring", "the star"])
streamed = sorted({step["frame"] for step in ground(clip, "the ring", stream=True)})
ground.save_pretrained(again)
print(json.dumps({
    "refused": refused,
    "classes": [type(model).__module__, type(processor).__module__, type(ground).__module__],
    "results": [json.loads(result.to_json()) for result in results],
    "piped": [json.loads(result.to_json()) for result in piped],
    "streamed": streamed,
    "torchvision": "torchvision" in sys.modules,
}))
"""


def run_stranger(tmp_path: Path, *arguments) -> dict:
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def exported(answering, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "repository"
    assert main(["export", str(answering), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def stranger(exported, clip, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("stranger")
    return run_stranger(folder, exported, clip, folder / "again") | {"again": folder / "again"}


def without_times(document: dict) -> dict:
    return {name: value for name, value in document.items() if name != "timings"}


def same_documents(first: list[dict], second: list[dict]):
    """Equal up to rounding in scores; texts, masks and boxes exactly."""
    for a, b in zip(first, second, strict=True):
        scores = []
        for document in (a, b):
            found = [track.pop("score") for track in document["objects"]]
            frames = [frame.pop("score") for track in document["objects"] for frame in track["frames"]]
            scores.append(found + frames)
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
        assert without_times(a) == without_times(b)


def test_files_of_a_repository(exported):
    names = {path.name for path in exported.iterdir()}
    assert names >= {"README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json"}
    assert {"modeling_sparrow.py", "processing_sparrow.py", "pipeline_video_grounding.py"} <= names
    assert all(path.is_file() for path in exported.iterdir())
    suffixes = {path.suffix for path in exported.iterdir()}
    assert suffixes <= {".md", ".json", ".safetensors", ".py", ".jinja"}
    assert [path.name for path in exported.glob("*.safetensors")] == ["model.safetensors"]


def test_no_path_of_this_machine_in_a_repository(exported, answering, tmp_path):
    package = Path(sys.modules["modeling_sparrow"].__file__).parents[1]
    for path in exported.iterdir():
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            for place in (answering, tmp_path.parent, package, Path.home(), sys.prefix):
                assert str(place) not in text, f"{path.name} names {place}"
            assert not re.search(r'"(/|[A-Za-z]:\\)[\w/\\.-]+"', text) or path.suffix == ".py"


def test_code_of_a_repository_is_flat(exported):
    names = {path.stem for path in exported.glob("*.py")}
    for path in exported.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for module in re.findall(r"^\s*from \.(\w*) import|^\s*from (\.\.)", text, re.MULTILINE):
            assert module[0] in names and not module[1], f"{path.name} imports {module}"


def test_configuration_of_a_repository(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_sparrow.SparrowConfig",
        "AutoModel": "modeling_sparrow.SparrowForVideoGrounding",
    }
    assert config["custom_pipelines"]["video-grounding"]["impl"] == "pipeline_video_grounding.VideoGroundingPipeline"
    processor = json.loads((exported / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_sparrow.SparrowProcessor"}


def test_without_trust_nothing_is_run(stranger):
    assert len(stranger["refused"]) == 4
    assert all("trust_remote_code" in message for message in stranger["refused"])


def test_a_stranger_gets_the_same_results(stranger, answering, clip):
    assert all(module.startswith("transformers_modules.") for module in stranger["classes"])
    assert not stranger["torchvision"] and stranger["streamed"] == list(range(7))
    model, processor = load_model(str(answering), "cpu")
    inputs = processor(text=["the ring", "the star"], videos=clip)
    expected = [json.loads(r.to_json()) for r in processor.post_process_grounding(model.ground(**inputs))]
    assert all(any(frame["visible"] for frame in document["objects"][0]["frames"]) for document in expected)
    copies = [json.loads(json.dumps(expected)) for _ in range(2)]
    same_documents(stranger["results"], copies[0])
    same_documents(stranger["piped"], copies[1])


def test_saving_again_keeps_the_code(stranger, exported):
    again = stranger["again"]
    assert {path.name for path in again.glob("*.py")} == {path.name for path in exported.glob("*.py")}
    for path in exported.glob("*.py"):
        assert (again / path.name).read_text() == path.read_text()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (again, exported))
    assert (config["auto_map"], config["custom_pipelines"]) == (before["auto_map"], before["custom_pipelines"])
    processor = json.loads((again / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": "processing_sparrow.SparrowProcessor"}


def test_with_the_package_no_trust_is_needed(exported, clip):
    model, processor = AutoModel.from_pretrained(exported), AutoProcessor.from_pretrained(exported)
    assert (type(model), type(processor)) == (SparrowForVideoGrounding, SparrowProcessor)
    load_model(str(exported), "cpu")
    ground = pipeline("video-grounding", model=str(exported))
    assert type(ground) is VideoGroundingPipeline
    assert ground(str(clip), "the ring").text == "it is a ring."


def test_exporting_leaves_the_classes_as_they_were(exported, answering, tmp_path):
    model, processor = load_model(str(answering), "cpu")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_an_export_can_be_exported_again(exported, clip, tmp_path):
    model, processor = load_model(str(exported), "cpu")
    export_repository(model, processor, tmp_path / "again", source=str(exported))
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in exported.iterdir()}
    for name in ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes(), name


def test_model_card(answering, exported, tmp_path):
    assert (exported / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    model, processor = load_model(str(answering), "cpu")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "README.md").write_text("my card")
    export_repository(model, processor, tmp_path / "own", source=str(tmp_path / "source"))
    assert (tmp_path / "own" / "README.md").read_text() == "my card"
    with pytest.raises(ValueError, match="is not empty"):
        export_repository(model, processor, tmp_path / "own")
