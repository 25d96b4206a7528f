"""The ablation at toy scale: all cells, resuming, the table."""

from modeling_sparrow.cli import main
from modeling_sparrow.evaluation.files import read_json
from modeling_sparrow.training.ablation import ROWS, AblationSettings, write_table
from modeling_sparrow.training.run import HISTORY_FILE
from modeling_sparrow.training.settings import read_settings
from modeling_sparrow.training.stages import FilterStage, TargetInjectionStage

from .conftest import toy_content, write_yaml

CELLS = [f"{row.name}-boxes-{boxes}.json" for row in ROWS for boxes in ("off", "on")]


def write_settings(tmp_path, checkpoint):
    stages = {}
    for stage in ("target_injection", "filter"):
        changes = {"optimization": {"steps": 1, "batch_size": 1}}
        if stage == "filter":
            changes["allow_untrained_start"] = False
        content = toy_content(stage, checkpoint, tmp_path / "unused", **changes)
        stages[stage] = str(write_yaml(tmp_path / f"{stage}.yaml", content))
    ablation = {"output": str(tmp_path / "ablation"), "model": str(checkpoint), "seeds": [3], **stages}
    ablation |= {"clips": 1, "split": "validation", "max_new_tokens": 4}
    return write_yaml(tmp_path / "ablation.yaml", ablation)


def test_all_cells_once(checkpoint, tmp_path, capsys):
    config, table = write_settings(tmp_path, checkpoint), tmp_path / "docs" / "ablation.md"
    command = ["ablate", str(config), "--table", str(table)]
    assert main(command) == 0
    folder = tmp_path / "ablation" / "seed-3"
    assert {file.name for file in (folder / "cells").iterdir()} == set(CELLS)
    runs = {path.name: read_json(path / "final" / HISTORY_FILE)["history"] for path in folder.glob("*-*")}
    shown = {name: [entry["settings"]["tracked_features"]["mode"] for entry in own] for name, own in runs.items()}
    assert shown == {
        "target_injection-tsf-none": ["none"],
        "target_injection-tsf-train": ["train"],
        "filter-none": ["none"],
        "filter-control": ["none", "none"],
        "filter-train": ["train", "none"],
        "filter-train_and_inference": ["train", "train_and_inference"],
    }
    assert all(entry["settings"]["optimization"]["seed"] == 3 for own in runs.values() for entry in own)
    text = table.read_text()
    assert all(f"| {row.title} |" in text for row in ROWS) and "sparrow ablate" in text

    # what is finished is kept, what is absent is made from the finished runs, other settings are refused
    times = {file.name: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}
    (folder / "cells" / CELLS[2]).unlink()
    assert main(command) == 0
    again = {file.name: file.stat().st_mtime_ns for file in (folder / "cells").iterdir()}
    assert {name for name in times if times[name] != again[name]} == {CELLS[2]}
    assert main([*command, "--set", "clips=2"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_mean_and_spread(tmp_path):
    settings = AblationSettings(output="runs", target_injection="a", filter="b", seeds=[0, 1, 2])
    figures = [{"j_and_f": value, "right_object": None, "identity_switches": 0.25} for value in (0.5, 0.6, 0.7)]
    cells = {
        (row.name, boxes): [cell | {"cell_seconds": 3600.0} for cell in figures]
        for row in ROWS
        for boxes in ("off", "on")
    }
    write_table(settings, cells, "sparrow ablate a.yaml", tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| TSF in training |"))
    assert row == "| TSF in training | 60.0 ± 10.0 | 60.0 ± 10.0 | – | – | 25.0 ± 0.0 | 25.0 ± 0.0 |"
    assert "Time: 24.00 hours" in text


def test_the_shipped_ablation_names_shipped_stages():
    settings = read_settings("tiny_ablation", AblationSettings)
    assert settings.split == "test-hard" and len(settings.seeds) > 1
    assert read_settings(settings.target_injection, TargetInjectionStage).lora is None
    assert read_settings(settings.filter, FilterStage).box_guidance
