"""Agreement with numbers of the official evaluators, to 1e-6, on whatever a reference folder holds.

The folder is given by SPARROW_EVAL_REFERENCE; parts and cases are discovered, none is named here.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modeling_sparrow.evaluation import (
    MevisDataset,
    ReasonVosDataset,
    RefDavis17Dataset,
    RevosDataset,
    VidStgDataset,
    score_davis,
    score_expressions,
    score_vidstg,
    video_gcg,
    vidstg,
)
from modeling_sparrow.evaluation.captions import Cider, Meteor, cider_scores
from modeling_sparrow.evaluation.region_similarity import (
    boundary_radius,
    mean_recall_decay,
    pairwise_region_and_boundary,
    region_and_boundary,
)
from modeling_sparrow.evaluation.video_gcg_dataset import parse_links

REFERENCE = Path(os.environ.get("SPARROW_EVAL_REFERENCE", Path(__file__).parents[2] / ".." / "shared" / "eval"))
TOLERANCE = 1e-6


def load(name: str):
    path = REFERENCE / name
    return json.loads(path.read_text()) if path.is_file() else None


def cases(name: str, key: str | None = None) -> list:
    content = load(name) or []
    found = content[key] if key and content else content
    return [pytest.param(case, id=str(case.get("name", index))) for index, case in enumerate(found)]


def require(name: str) -> Path:
    if not (REFERENCE / name).exists():
        pytest.skip(f"no {name} in the reference folder {REFERENCE}")
    return REFERENCE / name


def close(value, expected) -> bool:
    return np.allclose(np.asarray(value, float), np.asarray(expected, float), rtol=0, atol=TOLERANCE)


def davis_cases() -> list:
    found = []
    for path in sorted(REFERENCE.glob("*/expected.json")):
        if (path.parent / "ImageSets").is_dir():
            found += [
                pytest.param(path.parent, task, id=f"{path.parent.name}-{task}")
                for task in json.loads(path.read_text())
            ]
    return found


def test_reference_folder_is_there():
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference folder {REFERENCE}; set SPARROW_EVAL_REFERENCE")
    assert any(REFERENCE.iterdir())


@pytest.fixture(scope="module")
def frame_masks():
    with np.load(require("frames.npz")) as archive:
        return dict(archive)


@pytest.mark.parametrize("case", cases("frames.json", "cases"))
def test_mask_pair(case, frame_masks):
    prediction, truth = frame_masks[case["name"] + "|pred"], frame_masks[case["name"] + "|gt"]
    void = frame_masks.get(case["name"] + "|void")
    void = None if void is None else void.astype(bool)
    assert boundary_radius(*truth.shape) == case["radius"]
    assert close(region_and_boundary(prediction, truth, void), [case["J"], case["F"]])
    labels = [(mask != 0).astype(np.uint8) for mask in (prediction, truth)]
    table = pairwise_region_and_boundary(*labels, 1, 1, void)
    assert close(np.ravel(table), [case["J"], case["F"]])


@pytest.mark.parametrize("case", cases("stats.json"))
def test_statistics(case):
    assert close(mean_recall_decay(case["values"]), [case["M"], case["R"], case["D"]])


@pytest.mark.parametrize(("folder", "task"), davis_cases())
def test_davis(folder, task):
    expected = json.loads((folder / "expected.json").read_text())[task]
    annotations = folder / "Annotations_unsupervised" / "480p"
    results = folder / "results" / task
    result = score_davis(annotations, results, expected["sequences"], task)
    for metric in ("J", "F"):
        for name, key in (("", "mean"), ("_recall", "recall"), ("_decay", "decay")):
            assert close(result.metrics[metric + name], expected[metric][key])
    assert close(result.metrics["J&F"], expected["J&F"])
    for metric in ("J", "F"):
        ours = {}
        for video in expected["sequences"]:
            rows = [row for item, row in result.per_item.items() if item.rsplit("_", 1)[0] == video]
            if task == "unsupervised":  # the official evaluator lists objects in the order of the proposals
                rows.sort(key=lambda row: row["proposal"])
            ours |= {f"{video}_{index + 1}": row for index, row in enumerate(rows)}
        assert list(ours) == list(expected[metric]["per_object"])
        for name, key in (("", "M"), ("_recall", "R"), ("_decay", "D")):
            assert close([row[metric + name] for row in ours.values()], expected[metric][key])


def check_expressions(result, expected: dict, keys: dict[str, str], names: tuple[str, ...]) -> None:
    """`keys`: our item name -> theirs; items the official script dropped are in neither."""
    ours = {keys[item]: [row[name] for name in names] for item, row in result.per_item.items()}
    assert sorted(ours) == sorted(expected)
    assert all(close(ours[key], values) for key, values in expected.items())


def test_mevis():
    folder = require("mevis")
    dataset = MevisDataset(REFERENCE, split="mevis")
    result = score_expressions(dataset, folder / "pred", missing="official")
    expected = load("mevis/expected.json")
    check_expressions(result, expected["per_expression"], {sample.key: sample.key for sample in dataset}, ("J", "F"))
    assert close(
        [result.metrics["J"], result.metrics["F"], result.metrics["J&F"]],
        [expected["J"], expected["F"], expected["JF"]],
    )


@pytest.mark.parametrize("masks", ["mask_dict.json", "mask_dict.pkl"])
def test_ref_davis17_per_expression(masks):
    folder = require("refdavis_rle")
    dataset = RefDavis17Dataset(
        folder, expressions_file=folder / "meta_expressions.json", mask_file=require(f"refdavis_rle/{masks}")
    )
    result = score_expressions(dataset, folder / "pred", missing="official")
    expected = load("refdavis_rle/expected.json")
    check_expressions(result, expected["per_expression"], {sample.key: sample.key for sample in dataset}, ("J", "F"))
    printed = {name: round(100 * result.metrics[name], 2) for name in expected["printed_percent"]}
    assert printed == expected["printed_percent"]


def test_reasonvos():
    folder = require("reasonvos")
    dataset = ReasonVosDataset(folder)
    result = score_expressions(dataset, folder / "pred", missing="official")
    expected = load("reasonvos/expected.json")
    keys = {}
    for video, meta in dataset.videos.items():
        for entry in meta["expressions"]:
            keys[f"{video}_{entry['exp_id']}"] = f"{meta['source']}_{video}_{entry['obj_id']}_{entry['exp_id']}"
    check_expressions(result, expected["per_expression"], keys, ("J", "F"))
    assert close([result.metrics["J"], result.metrics["F"]], [expected["J"], expected["F"]])


def test_revos():
    folder = require("revos")
    dataset = RevosDataset(folder)
    result = score_expressions(dataset, folder / "pred", missing="official")
    expected = load("revos/expected.json")
    names = ("J", "F", "A_official", "R_official")
    keys = {sample.key: sample.key for sample in dataset}
    check_expressions(result, expected["per_expression_JFAR"], keys, names)
    for group, suffix in (("referring", "_referring"), ("reason", "_reasoning"), ("overall", "")):
        summary = expected["summary_percent"][group]
        ours = [100 * result.metrics[name + suffix] for name in (*names, "J&F")]
        assert close(ours, [summary[name] for name in ("J", "F", "A", "R", "JF")])


def vidstg_dataset(sentence: str, **changes) -> VidStgDataset:
    folder = require("vidstg")
    protocol = replace(vidstg.TUBEDETR_PROTOCOL, **changes)
    return VidStgDataset(folder, sentence, protocol, annotations_file=folder / "test.json")


def vidstg_sentences() -> list[str]:
    return sorted({video["qtype"] for video in (load("vidstg/test.json") or {"videos": []})["videos"]})


@pytest.mark.parametrize("sentence", vidstg_sentences())
def test_vidstg_sampling(sentence):
    for case in load("vidstg/expected.json")["sampling"]:
        dataset = vidstg_dataset(
            sentence, fps=case["fps"], max_frames=case["video_max_len"], temporal=case["tmp_loc"], shrunk=True
        )
        for sample in dataset:
            assert list(sample.frame_ids) == case["frames"][sample.sample_id]
            assert sorted(sample.moment_ids) == sorted(case["inside"][sample.sample_id])


def test_vidstg_boxes():
    require("vidstg")
    expected = load("vidstg/expected.json")
    for case in expected["gt_boxes"]:
        size = (case["height"], case["width"])
        assert list(vidstg.shrunk_size(*size)) == case["size"]
        for target, name in ((size, "clamped"), (tuple(case["size"]), "scaled")):
            box = vidstg.annotated_box(case["ltwh"], size, target)
            assert (box is None) == (not case[name])
            assert box is None or close(box, case[name][0])
    with np.load(REFERENCE / "vidstg" / "masks.npz") as masks:
        for case in expected["mask_boxes"]:
            box = vidstg.mask_to_box(masks[case["name"]])
            assert (box or [1e8, 1e8, 0.0, 0.0]) == case["box"]  # the official way to write an empty box
    for case in expected["box_iou"]:
        assert close(vidstg.box_iou(case["pred"], case["gt"]), case["iou"])


@pytest.mark.parametrize("sentence", vidstg_sentences())
def test_vidstg_tubes(sentence, tmp_path):
    tube = load("vidstg/expected.json")["tube"]
    dataset = vidstg_dataset(sentence, fps=tube["fps"], max_frames=tube["video_max_len"])
    for sample in dataset:
        boxes = {frame: tube["predictions"].get(f"{sample.sample_id}_{frame}") for frame in sample.frame_ids}
        vidstg.write_prediction(tmp_path, sample, boxes, tube["intervals"][sample.sample_id]["sted"])
    result = score_vidstg(dataset, tmp_path)
    names = {"mIoU": "gt_viou", "tIoU": "tiou", "vIoU": "viou"}
    for item, row in result.per_item.items():
        official = tube["per_video"][item]
        for ours, theirs in (*names.items(), ("vIoU@0.3", "viou@0.3"), ("mIoU@0.5", "gt_viou@0.5")):
            assert close(row[ours], official[theirs])
    assert len(result.per_item) == tube["per_type"][sentence]["n"]
    assert all(close(result.metrics[ours], tube["per_type"][sentence][theirs]) for ours, theirs in names.items())


@pytest.fixture(scope="module")
def tubes():
    with np.load(require("gcg.npz")) as archive:
        return dict(archive)


def gcg_table(case: dict, tubes: dict, host: str) -> np.ndarray:
    truth = np.stack([tubes[f"{case['name']}|gt{i}"] for i in range(case["n_gt"])]) != 0
    predicted = np.stack([tubes[f"{case['name']}|pred{i}"] for i in range(case["n_pred"])]) != 0
    return video_gcg.tube_ious(((truth[:, t], predicted[:, t]) for t in range(truth.shape[1])), host)


@pytest.mark.parametrize("host", ["sparrow", "videoglamm"])
@pytest.mark.parametrize("case", cases("gcg.json", "cases"))
def test_video_gcg_sample(case, host, tubes):
    ious = gcg_table(case, tubes, host)
    assert close(video_gcg.sample_miou(ious), case[f"{host}_miou"])
    phrases, predicted = (range(length) for length in ious.shape)
    matches = video_gcg.match_phrases(ious, phrases, predicted, lambda i, j: case["text_similarity"][i][j])
    assert [list(pair) for pair in matches] == case[f"{host}_matches"]


@pytest.mark.parametrize("host", ["sparrow", "videoglamm"])
def test_video_gcg_summary(host, tubes):
    content = load("gcg.json")
    tables = [gcg_table(case, tubes, host) for case in content["cases"]]
    matches = sum(len(case[f"{host}_matches"]) for case in content["cases"])
    recall = matches / sum(case["n_gt"] for case in content["cases"])
    assert close(np.mean([video_gcg.sample_miou(table) for table in tables]), content["summary"][f"{host}_miou"])
    assert close(recall, content["summary"][f"{host}_recall"])


@pytest.mark.parametrize("case", cases("gcg.json", "clean_caption"))
def test_caption_cleaning(case):
    assert video_gcg.clean_caption(case["raw"]) == (case["cleaned"], case["phrases"])


@pytest.mark.parametrize("case", cases("gcg.json", "annotation_markup"))
def test_caption_links(case):
    caption = parse_links(case["caption"])
    assert (caption.text, caption.phrases, caption.objects) == (case["with_tokens"], case["phrases"], case["objects"])


def test_cider_of_given_tokens():
    require("text.json")
    text = load("text.json")
    scores = cider_scores(text["tokens_hyp"], text["tokens_ref"])
    assert close(scores, text["CIDEr_each"]) and close(scores.mean(), text["CIDEr"])


@pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed")
def test_caption_metrics_with_java():
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap (extra 'eval') is not installed")
    require("text.json")
    text = load("text.json")
    assert close(Cider()(text["hypotheses"], text["references"])["CIDEr"], text["CIDEr"])
    assert close(Meteor()(text["hypotheses"], text["references"])["METEOR"], text["METEOR"])


def test_full_davis_validation_set():
    """Needs the two result sets of the davis2017-evaluation repository: its folder `results`."""
    results = os.environ.get("SPARROW_DAVIS_RESULTS")
    expected = load("davis_full_unsupervised.json")
    if not results or not expected:
        pytest.skip("set SPARROW_DAVIS_RESULTS to the folder 'results' of davis2017-evaluation")
    truth, predictions = Path(results) / "semi-supervised" / "osvos", Path(results) / "unsupervised" / "rvos"
    result = score_davis(truth, predictions, sorted(expected["sequences"]), num_workers=2)
    assert close([result.metrics["J"], result.metrics["F"]], [expected["J"], expected["F"]])
    for video, official in expected["sequences"].items():
        rows = [row for item, row in result.per_item.items() if item.rsplit("_", 1)[0] == video]
        rows.sort(key=lambda row: row["proposal"])
        for metric in ("J", "F"):
            for name, key in (("", "M"), ("_recall", "R"), ("_decay", "D")):
                assert close([row[metric + name] for row in rows], official[metric][key])
