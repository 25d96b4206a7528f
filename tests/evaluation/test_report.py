"""Result tables and `.eval_results` files."""

import hashlib

import pytest
import yaml

from modeling_sparrow.evaluation import EvaluationError, EvaluationResult, RunInfo, results_table, write_eval_results
from modeling_sparrow.evaluation.report import PUBLISHED, hash_checkpoint


def result(benchmark: str, protocol: str, metrics: dict, version: str = "MeViS v1 valid_u", missing: int = 0):
    counts = {"expressions": 793, "in_mean": 793 - missing, "missing": missing}
    return EvaluationResult(benchmark, protocol, version, metrics, {}, counts, "error")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "model.safetensors").write_bytes(b"weights")
    return RunInfo.collect("sparrow-tiny", "sparrow evaluate mevis --seed 3", 3, tmp_path / "ckpt")


def test_run_info(run, tmp_path):
    assert run.checkpoint_hash == hashlib.sha256(b"model.safetensorsweights").hexdigest()
    assert run.seed == 3 and run.date.endswith("Z")
    (tmp_path / "ckpt" / "config.json").write_text("{}")  # only weights count
    assert hash_checkpoint(tmp_path / "ckpt") == run.checkpoint_hash
    (tmp_path / "ckpt" / "b.safetensors").write_bytes(b"more")
    assert hash_checkpoint(tmp_path / "ckpt") != run.checkpoint_hash
    with pytest.raises(EvaluationError, match="no safetensors file"):
        hash_checkpoint(tmp_path / "nothing")


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {cells[0]: cells for cells in lines}


def test_table_puts_ours_beside_the_published(run):
    results = [
        result("mevis", "per-expression", {"J": 0.5, "F": 0.6, "J&F": 0.55}),
        result("ref-davis17", "4B (per expression)", {"J": 0.1, "F": 0.3, "J&F": 0.2}, "Ref-DAVIS17 val", missing=2),
        result("vidstg", "moment, interrogative", {"mIoU": 0.3}, "unrecognised: 1 interrogative sentences"),
        result("davis17", "DAVIS 2017 unsupervised", {"J": 0.9, "F": 0.9, "J&F": 0.9}, "DAVIS 2017 val"),
    ]
    table = results_table(results, run)
    rows = rows_of(table)
    header, ours, official = rows["model"], rows["**sparrow-tiny**"], rows["VideoGLaMM + SPARROW"]
    column = {title: index for index, title in enumerate(header)}
    assert ours[column["MeViS val_u"]] == "55.00" and official[column["MeViS val_u"]] == "57.40"
    assert ours[column["Ref-DAVIS17 4B"]] == "20.00‡" and ours[column["Ref-DAVIS17 4A"]] == ""
    assert official[column["Ref-DAVIS17 as published"]] == "76.80" and ours[column["Ref-DAVIS17 as published"]] == ""
    assert ours[column["VidSTG"]] == "30.00†" and ours[column["VideoGCG"]] == ""
    assert len({len(cells) for name, cells in rows.items() if name in ("model", "LMPM", "**sparrow-tiny**")}) == 1
    for text in ("sparrow evaluate mevis --seed 3", "seed: 3", run.checkpoint_hash, "J&F 55.00, J 50.00, F 60.00"):
        assert text in table
    assert sum(len(models) for models in PUBLISHED.values()) == sum(f"| {name} " in table for name in _names())


def _names():
    return [row.model for rows in PUBLISHED.values() for row in rows]


def test_eval_results_files(run, tmp_path):
    results = [
        result("mevis", "per-expression", {"J": 0.5, "F": 0.6, "J&F": 0.55, "J_recall": 0.9}),
        result("video-gcg", "greedy tube IoU, sparrow rules", {"mIoU": 0.5, "recall": 0.3, "CIDEr": 0.59}, "x", 1),
    ]
    paths = write_eval_results(results, run, tmp_path, dataset_ids={"mevis": "owner/mevis"})
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        ".eval_results/mevis_per_expression.yaml",
        ".eval_results/video_gcg_greedy_tube_iou_sparrow_rules.yaml",
    ]
    entries = yaml.safe_load(paths[0].read_text())
    assert {entry["dataset"]["task_id"]: entry["value"] for entry in entries} == {
        "j_and_f": 55.0,
        "j": 50.0,
        "f": 60.0,
    }
    assert entries[0]["dataset"]["id"] == "owner/mevis" and entries[0]["date"] == run.date
    for text in ("seed 3", run.checkpoint_hash, "sparrow evaluate mevis", "MeViS v1 valid_u"):
        assert text in entries[0]["notes"]
    entries = yaml.safe_load(paths[1].read_text())
    assert {entry["dataset"]["task_id"]: entry["value"] for entry in entries} == {
        "miou": 50.0,
        "recall": 0.3,
        "cider": 0.59,
    }
    assert entries[0]["dataset"]["id"] == "video-gcg"


def test_another_version_of_the_data_is_marked(run):
    newer = result("mevis", "per-expression", {"J": 0.5, "F": 0.5, "J&F": 0.5}, "MeViS v2 valid_u")
    assert "50.00†" in rows_of(results_table([newer], run))["**sparrow-tiny**"]
