"""`sparrow evaluate`, `submit` and `benchmark` from end to end, on small trees in the official layouts."""

import json
import shutil
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from modeling_sparrow import cli
from modeling_sparrow.cli import build_parser, main
from modeling_sparrow.evaluation import benchmark, commands, davis
from modeling_sparrow.evaluation.files import read_json, write_label_map, write_mask
from modeling_sparrow.evaluation.predict import Grounder
from modeling_sparrow.evaluation.report import hash_checkpoint
from modeling_sparrow.registration import DEFAULT_CHECKPOINT

from ..processing.clip_factory import write_clip
from .answering import save_checkpoint
from .fake_data import SIZE, moving_square, write_picture

PREDICTIONS = {
    "mevis": 12,
    "ref-youtube-vos": 6,
    "ref-davis17": 32,
    "revos": 9,
    "reasonvos": 4,
    "vidstg": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"), "it is <p> a ring </p> [BOX] [SEG] .")


@pytest.fixture(scope="module", autouse=True)
def load_each_model_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "load_model", cache(cli.load_model))
        yield


@pytest.fixture
def roots(request) -> Path:
    """The tree of a benchmark, by name, with what the fixtures of the scores leave out."""

    def build(name: str) -> Path:
        names = {"ref-youtube-vos": "youtube", "ref-davis17": "davis", "video-gcg": "gcg"}
        root = request.getfixturevalue(f"{names.get(name, name)}_root")
        if name == "ref-youtube-vos":
            (root / "objects.json").write_text('{"v1": {"0": 1, "1": 2}}')
        elif name == "vidstg":
            (root / "vidstg" / "video" / "0").mkdir(parents=True)
            clip = root / "vidstg" / "video" / "0" / "clip.mp4"
            write_clip(clip, count=100, width=320, height=240, rate=10, codec_options={"preset": "ultrafast"})
        elif name == "video-gcg":
            for index in range(2):
                write_picture(root / "ytvis" / "vos" / "train" / "JPEGImages" / "seq" / f"{index:05d}.jpg")
        elif name == "revos":
            for index in range(3):
                write_picture(root / "JPEGImages" / "SRC" / "clip" / f"{index:05d}.jpg")
        elif name == "reasonvos":
            for frame in ("00000", "00005"):
                write_picture(root / "JPEGImages" / "v" / f"{frame}.jpg")
        return root

    return build


def extra_options(name: str, root: Path) -> list[str]:
    return {
        "ref-youtube-vos": ["--objects-file", str(root / "objects.json")],
        "ref-davis17": ["--mask-file", str(root / "valid" / "mask_dict.json")],
    }.get(name, [])


@pytest.fixture
def evaluate(model, roots, tmp_path):
    """Runs `sparrow evaluate`; returns its exit code and what `--json` wrote."""

    def run(name: str, *options: str, predictions: str = "pred", root: Path | None = None):
        root = root or roots(name)
        target = tmp_path / "numbers.json"
        target.unlink(missing_ok=True)
        words = ["evaluate", name, "--data", str(root), "--predictions", str(tmp_path / predictions)]
        words += ["--model", str(model), "--device", "cpu", "--max-new-tokens", "16", "--json", str(target)]
        code = main([*words, *extra_options(name, root), *options])
        return code, read_json(target) if target.is_file() else None

    return run


def scores_of(numbers: dict) -> list[dict]:
    return [result["metrics"] for result in numbers["results"]]


# ---------------------------------------------------------------------- every benchmark


@pytest.mark.parametrize("name", commands.BENCHMARKS)
def test_end_to_end(evaluate, model, tmp_path, name):
    code, numbers = evaluate(name, "--seed", "7")
    assert code == 0 and numbers["predictions"]["failures"] == []
    run, reports = numbers["run"], tmp_path / "pred.report"
    assert run["seed"] == 7 and run["checkpoint_hash"] == hash_checkpoint(model)
    assert run["command"].startswith(f"sparrow evaluate {name} --data ") and "--seed 7" in run["command"]
    files = [path for path in (tmp_path / "pred").rglob("*") if path.is_file()]
    if name in PREDICTIONS:
        assert len(files) == PREDICTIONS[name]
    for result in numbers["results"]:
        assert result["benchmark"] == name and result["problems"] == [] and result["counts"]["missing"] == 0
        assert all(0 <= value <= 1 for name, value in result["metrics"].items() if "decay" not in name)
    protocols = {result["protocol"][:2] for result in numbers["results"]}
    if name == "ref-davis17":
        assert protocols == {"4A", "4B"}
    assert len(list((reports / ".eval_results").glob("*.yaml"))) == len(numbers["results"])
    for path in (reports / ".eval_results").glob("*.yaml"):
        notes = yaml.safe_load(path.read_text())[0]["notes"]
        assert run["checkpoint_hash"] in notes and "seed 7" in notes and run["command"] in notes
    table = (reports / "results.md").read_text()
    assert run["checkpoint_hash"] in table and "VideoGLaMM + SPARROW" in table and "seed: 7" in table
    # Scoring alone gives the same numbers, and remembers what made the predictions.
    code, again = evaluate(name, "--stage", "score", root=Path(run["command"].split(" --data ")[1].split()[0]))
    assert code == 0 and again["results"] == numbers["results"] and again["run"] == run
    assert again["predictions"] is None


@pytest.mark.parametrize("name", commands.BENCHMARKS)
def test_end_to_end_with_the_shipped_checkpoint(evaluate, name):
    """Real answers of sparrow-tiny, whatever they are worth on these pictures."""
    code, numbers = evaluate(name, "--model", DEFAULT_CHECKPOINT, "--limit", "1")
    assert code == 0 and numbers["predictions"]["failures"] == [] and numbers["predictions"]["predicted"] >= 1
    assert numbers["run"]["checkpoint_hash"] == hash_checkpoint(DEFAULT_CHECKPOINT)
    for result in numbers["results"]:
        assert result["counts"]["missing"] == 0 and result["metrics"]


@pytest.mark.parametrize("name", ["mevis", "video-gcg"])
def test_interrupted_and_resumed_gives_the_same_scores(evaluate, roots, monkeypatch, tmp_path, name):
    root = roots(name)
    whole = evaluate(name, predictions="whole", root=root)[1]
    passes, answer = [], Grounder._pass

    def interrupted(self, video, prompts):
        passes.append(prompts)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return answer(self, video, prompts)

    monkeypatch.setattr(Grounder, "_pass", interrupted)
    code, numbers = evaluate(name, "--queries-per-pass", "1", root=root)
    assert code == 130 and numbers is None
    code, numbers = evaluate(name, root=root)
    assert code == 0 and numbers["predictions"]["already_done"] == 1
    assert scores_of(numbers) == scores_of(whole)


def test_limit_and_stages(evaluate, roots, tmp_path):
    root = roots("mevis")
    code, numbers = evaluate("mevis", "--limit", "1", "--stage", "predict", root=root)
    assert code == 0 and numbers["results"] == [] and numbers["predictions"]["predicted"] == 2
    assert [path.name for path in (tmp_path / "pred").iterdir()] == ["aaa"]
    code, numbers = evaluate("mevis", "--limit", "1", root=root)
    (result,) = numbers["results"]
    assert result["counts"]["videos"] == 1 and result["counts"]["expressions"] == 2
    assert result["dataset_version"] == "unrecognised: 1 videos, 2 expressions or objects"
    for name, count in (("ref-davis17", "videos"), ("vidstg", "samples"), ("video-gcg", "samples")):
        code, numbers = evaluate(name, "--limit", "1", predictions=name)
        assert code == 0 and {result["counts"][count] for result in numbers["results"]} == {1}


def test_predictions_of_other_weights_or_settings_are_not_mixed(evaluate, roots, model, tmp_path, capsys):
    root = roots("mevis")
    assert evaluate("mevis", "--limit", "1", root=root)[0] == 0
    other = save_checkpoint(tmp_path / "other", "it is [BOX] [SEG] .", seed=1)
    assert evaluate("mevis", "--model", str(other), root=root)[0] == 2
    assert "run.json: the predictions in" in (message := capsys.readouterr().err) and "checkpoint_hash" in message
    assert evaluate("mevis", "--host", "unipixel", root=root)[0] == 2
    assert "host videoglamm, now unipixel" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "pred")
    assert evaluate("mevis", "--model", str(other), "--host", "unipixel", root=root)[0] == 0


def test_predictions_from_elsewhere_are_scored(evaluate, roots, write_predictions, tmp_path):
    root = roots("mevis")
    write_predictions(commands.MevisDataset(root), tmp_path / "pred")
    code, numbers = evaluate("mevis", "--stage", "score", root=root)
    assert code == 0 and scores_of(numbers) == [{"J": 1.0, "F": 1.0, "J&F": 1.0}]
    assert numbers["run"]["checkpoint_hash"] == "not recorded"
    assert "not recorded" in (tmp_path / "pred.report" / "results.md").read_text()


def test_prompts_of_the_host(evaluate, roots, monkeypatch):
    asked, answer = [], Grounder._pass

    def record(self, video, prompts):
        asked.extend(prompts)
        return answer(self, video, prompts)

    monkeypatch.setattr(Grounder, "_pass", record)
    root = roots("mevis")
    evaluate("mevis", "--host", "unipixel", "--limit", "1", "--stage", "predict", root=root)
    assert asked[0] == "Please segment the square moving right in this video."
    root = roots("vidstg")
    evaluate("vidstg", "--split", "declarative", "--stage", "predict", root=root, predictions="vidstg")
    assert asked[-1] == "Can you segment a child holds a ball in this video?"


# ---------------------------------------------------------------------- what goes wrong


def test_a_missing_video_is_listed_and_ends_with_1(evaluate, roots, capsys, caplog, tmp_path):
    root = roots("mevis")
    shutil.rmtree(root / "valid_u" / "JPEGImages" / "aaa")
    code, numbers = evaluate("mevis", root=root)
    assert code == 1 and numbers["results"] == [] and numbers["predictions"]["predicted"] == 2
    (failure,) = numbers["predictions"]["failures"]
    assert failure.startswith("aaa: ") and "aaa/00000.jpg: No such file" in failure and failure in caplog.text
    assert "not scored because videos failed" in caplog.text
    code, numbers = evaluate("mevis", "--missing", "zero", root=root)
    assert (
        code == 1 and numbers["results"][0]["counts"] | {"missing": 2, "in_mean": 4} == numbers["results"][0]["counts"]
    )
    assert any("pred/aaa: missing video" in line for line in numbers["results"][0]["problems"])
    assert evaluate("mevis", "--fail-fast", root=root)[0] == 2
    assert "00000.jpg: No such file" in capsys.readouterr().err


def test_a_missing_video_file(evaluate, roots, caplog):
    root = roots("vidstg")
    (root / "vidstg" / "video" / "0" / "clip.mp4").unlink()
    assert evaluate("vidstg", root=root)[0] == 1
    assert "clip.mp4" in caplog.text and "No such file" in caplog.text


@pytest.mark.parametrize("damage", ["corrupt", "size", "missing", "extra"])
def test_bad_predictions_name_the_file(evaluate, roots, capsys, tmp_path, damage):
    root = roots("mevis")
    assert evaluate("mevis", "--stage", "predict", root=root)[0] == 0
    file = tmp_path / "pred" / "bbb" / "1" / "00002.png"
    if damage == "corrupt":
        file.write_bytes(file.read_bytes()[:40])
    elif damage == "size":
        Image.fromarray(np.zeros((7, 9), np.uint8)).save(file)
    elif damage == "missing":
        file.unlink()
    else:
        write_mask(tmp_path / "pred" / "bbb" / "9" / "00000.png", moving_square(0))
    code, numbers = evaluate("mevis", "--stage", "score", root=root)
    message = capsys.readouterr().err
    if damage == "extra":
        assert code == 0 and numbers["results"][0]["counts"]["extra"] == 1
        assert numbers["results"][0]["problems"] == [f"{tmp_path}/pred/bbb/9: not part of the benchmark, ignored"]
        return
    reasons = {"corrupt": "not a readable PNG", "size": "7 x 9 pixels (height x width), expected 24 x 40"}
    assert code == 2 and f"{file}: {reasons.get(damage, 'missing')}" in message
    assert len(message.splitlines()[-1].split("problem(s)")) == 2


def test_an_extra_object_of_a_label_map_names_the_file(roots, tmp_path):
    """Protocol 4A allows 20 proposals."""
    root = roots("ref-davis17") / "DAVIS"
    for index in range(4):
        labels = np.full(SIZE, 21 if index == 2 else 1, np.uint8)
        for name in davis.ANNOTATOR_SETS:
            write_label_map(tmp_path / "maps" / name / "clip" / f"{index:05d}.png", labels)
    annotations = root / "Annotations_unsupervised" / "480p"
    with pytest.raises(ValueError, match=r"00002\.png: label 21, expected at most 20"):
        davis.score_ref_davis17(annotations, tmp_path / "maps", ["clip"])


def test_an_extra_object_of_a_conversation_counts_for_nothing(evaluate, roots, tmp_path):
    root = roots("video-gcg")
    numbers = evaluate("video-gcg", root=root)[1]
    folder = tmp_path / "pred" / "mevis_gcg" / "aaa"
    write_mask(folder / "pred_masks_1" / "mask_0.png", np.zeros(SIZE))
    code, again = evaluate("video-gcg", "--stage", "score", "--missing", "zero", root=root)
    assert code == 0 and scores_of(again) == scores_of(numbers)
    assert "pred_masks_1/mask_1.png: missing (2 of 6 masks)" in again["results"][0]["problems"][0]


def test_missing_expressions_of_davis(evaluate, roots, tmp_path):
    root = roots("ref-davis17")
    assert evaluate("ref-davis17", root=root)[0] == 0
    (tmp_path / "pred" / "clip" / "3" / "00000.png").unlink()
    code, numbers = evaluate("ref-davis17", "--stage", "score", "--missing", "zero", root=root)
    assert code == 0 and [result["protocol"][:2] for result in numbers["results"]] == ["4B", "4A"]
    per_expression, label_maps = numbers["results"]
    assert per_expression["counts"]["missing"] == 1 and per_expression["metrics"]["J"] > 0
    # The label maps of the earlier run are not taken: without one mask, the video has none.
    assert label_maps["counts"]["missing"] == 8 and label_maps["metrics"]["J"] == 0


def test_davis_is_asked_for_when_it_is_not_there(evaluate, roots, caplog, capsys, tmp_path):
    root = roots("ref-davis17")
    shutil.move(root / "DAVIS", tmp_path / "elsewhere")
    code, numbers = evaluate("ref-davis17", root=root)
    assert code == 0 and len(numbers["results"]) == 1 and "protocol 4A is not scored" in caplog.text
    code, numbers = evaluate("ref-davis17", "--davis-root", str(tmp_path / "elsewhere"), root=root)
    assert code == 0 and len(numbers["results"]) == 2
    assert evaluate("ref-davis17", "--davis-root", str(tmp_path / "nowhere"), root=root)[0] == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_split_without_ground_truth_says_what_to_do(evaluate, roots, capsys):
    root = roots("mevis")
    assert evaluate("mevis", "--split", "valid", "--limit", "1", root=root)[0] == 2
    assert "this split has no public ground truth; write a submission instead" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--limit", "0"], ["--num-workers", "-1"], ["--queries-per-pass", "none"]])
def test_bad_numbers_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "mevis", "--data", "a", "--predictions", "b", *words])
    assert words[0] in capsys.readouterr().err


# ---------------------------------------------------------------------- submit, benchmark


def test_submit(evaluate, roots, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    root = roots("mevis")
    assert evaluate("mevis", "--split", "valid", "--stage", "predict", root=root)[0] == 0
    words = ["submit", "mevis", "--data", str(root), "--predictions", str(tmp_path / "pred")]
    assert main([*words, "--output", str(tmp_path / "out.zip")]) == 0
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert len(archive.namelist()) == 12 and "aaa/0/00000.png" in archive.namelist()
    assert "2 videos, 4 expressions, 12 frames" in caplog.text
    (tmp_path / "pred" / "aaa" / "0" / "00001.png").unlink()
    assert main([*words, "--output", str(tmp_path / "bad.zip")]) == 2
    assert "00001.png: missing" in capsys.readouterr().err and not (tmp_path / "bad.zip").exists()
    root = roots("ref-youtube-vos")
    assert evaluate("ref-youtube-vos", "--stage", "predict", root=root, predictions="youtube")[0] == 0
    words = ["submit", "ref-youtube-vos", "--data", str(root), "--predictions", str(tmp_path / "youtube")]
    assert main([*words, "--output", str(tmp_path / "youtube.zip")]) == 0
    with zipfile.ZipFile(tmp_path / "youtube.zip") as archive:
        assert "Annotations/v1/0/00005.png" in archive.namelist()


def test_benchmark_metrics(monkeypatch, capsys, tmp_path):
    timings = [benchmark.MetricTiming("pair", ours=0.001, reference=0.008)]
    measured = benchmark.MetricBenchmark(timings, short_peak=2**20, long_peak=2**21)
    monkeypatch.setattr(benchmark, "benchmark_metrics", lambda: measured)
    assert main(["benchmark", "metrics", "--json", "-"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["timings"] == [{"name": "pair", "ours": 0.001, "reference": 0.008, "speedup": 8.0}]
    assert (numbers["short_peak"], numbers["long_peak"]) == (2**20, 2**21)
    assert main(["benchmark", "metrics", "--json", str(tmp_path / "numbers.json")]) == 0
    assert "| pair | 1000 /s | 125.0 /s | 8.0 x |" in capsys.readouterr().out
    assert read_json(tmp_path / "numbers.json") == numbers


def test_the_command_repeats_with_all_settings():
    words = ["evaluate", "video-gcg", "--data", "my data", "--predictions", "p", "--captions", "cider", "meteor"]
    command = commands.command_line(build_parser().parse_args([*words, "--fail-fast"]))
    assert command.startswith("sparrow evaluate video-gcg --data 'my data' --predictions p --stage all")
    assert "--seed 0" in command and "--fail-fast" in command and "--captions cider meteor" in command
    assert "None" not in command and "--limit" not in command
