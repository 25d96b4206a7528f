"""MeViS, Ref-YouTube-VOS, Ref-DAVIS17 4B, ReVOS and ReasonVOS on small trees: listing, scoring, bad inputs."""

import json
import shutil

import numpy as np
import pytest

from modeling_sparrow.evaluation import (
    EvaluationError,
    EvaluationResult,
    MevisDataset,
    ReasonVosDataset,
    RefDavis17Dataset,
    RefYoutubeVosDataset,
    RevosDataset,
    region_and_boundary,
    score_expressions,
)
from modeling_sparrow.evaluation.files import write_mask
from modeling_sparrow.evaluation.prompts import conversation_prompt, referring_prompt, vidstg_prompt

from .fake_data import SIZE, dump, moving_square


def ref_davis(root, host="sparrow"):
    return RefDavis17Dataset(root, host, mask_file=root / "valid" / "mask_dict.json")


def test_mevis_listing(mevis_root):
    dataset = MevisDataset(mevis_root)
    assert [sample.key for sample in dataset] == ["aaa_0", "aaa_1", "bbb_0", "bbb_1"]
    sample = dataset[0]
    assert sample.expression == "The square moving right"
    assert sample.prompt == ("What is the square moving right in this video? Please respond with segmentation masks.")
    assert sample.frame_paths[2] == mevis_root / "valid_u" / "JPEGImages" / "aaa" / "00002.jpg"
    assert all(path.is_file() for path in sample.frame_paths)
    assert sample.prediction_paths("out")[1].as_posix() == "out/aaa/0/00001.png"
    both = dataset.ground_truth(dataset[1])
    assert np.array_equal(both.frame(0), moving_square(0))
    assert np.array_equal(both.frame(2) > 0, moving_square(2) | moving_square(2, 10))
    assert dataset.version == "unrecognised: 2 videos, 4 expressions or objects"


def test_mevis_perfect_and_wrong_predictions(mevis_root, tmp_path, write_predictions):
    dataset = MevisDataset(mevis_root)
    predictions = write_predictions(dataset, tmp_path / "pred")
    perfect = score_expressions(dataset, predictions)
    assert perfect.metrics == {"J": 1.0, "F": 1.0, "J&F": 1.0}
    assert perfect.counts == {"videos": 2, "expressions": 4, "frames": 12, "in_mean": 4, "missing": 0, "extra": 0}
    shifted = np.roll(moving_square(1), 2, axis=1)
    write_mask(dataset[0].prediction_paths(predictions)[1], shifted)
    result = score_expressions(dataset, predictions)
    region, boundary = region_and_boundary(shifted, moving_square(1))
    # One of 3 frames of one of 4 expressions.
    assert result.metrics["J"] == pytest.approx(1 - (1 - region) / 12)
    assert result.metrics["F"] == pytest.approx(1 - (1 - boundary) / 12)
    assert result.per_item["aaa_0"]["J"] == pytest.approx((2 + region) / 3)


def test_workers_change_nothing(mevis_root, tmp_path, write_predictions):
    dataset = MevisDataset(mevis_root)
    predictions = write_predictions(dataset, tmp_path / "pred")
    write_mask(dataset[3].prediction_paths(predictions)[0], moving_square(7))
    one, two = (score_expressions(dataset, predictions, num_workers=n) for n in (0, 2))
    assert one == two and one.metrics["J"] < 1


def test_result_round_trip(mevis_root, tmp_path, write_predictions):
    dataset = MevisDataset(mevis_root)
    result = score_expressions(dataset, write_predictions(dataset, tmp_path / "pred"))
    result.save(tmp_path / "result.json")
    assert EvaluationResult.load(tmp_path / "result.json") == result
    dump(tmp_path / "result.json", {"J": 1})
    with pytest.raises(EvaluationError, match=r"result\.json: not a saved"):
        EvaluationResult.load(tmp_path / "result.json")


def test_missing_predictions_are_counted(mevis_root, tmp_path, write_predictions):
    dataset = MevisDataset(mevis_root)
    predictions = write_predictions(dataset, tmp_path / "pred")
    shutil.rmtree(predictions / "bbb")  # a whole video
    (predictions / "aaa" / "1" / "00001.png").unlink()  # one frame
    with pytest.raises(EvaluationError) as caught:
        score_expressions(dataset, predictions)
    message = str(caught.value)
    assert f"{predictions / 'bbb'}: missing video (expression 0)" in message
    assert f"{predictions / 'aaa' / '1' / '00001.png'}: missing (1 of 3 frames)" in message
    assert message.startswith("3 problem(s)")
    means = {}
    for policy in ("zero", "skip", "official"):
        result = score_expressions(dataset, predictions, missing=policy)
        means[policy] = result.metrics["J"], result.counts["in_mean"], result.counts["missing"]
        assert len(result.problems) == 3
    # MeViS's own script: a missing video scores 0, an expression with a missing frame is dropped.
    assert means == {"zero": (0.25, 4, 3), "skip": (1.0, 1, 3), "official": (pytest.approx(1 / 3), 3, 3)}
    with pytest.raises(ValueError, match="missing='drop'"):
        score_expressions(dataset, predictions, missing="drop")


def test_nothing_left_to_score(mevis_root, tmp_path):
    (tmp_path / "pred").mkdir()
    with pytest.raises(EvaluationError, match="nothing left to score"):
        score_expressions(MevisDataset(mevis_root), tmp_path / "pred", missing="skip")
    with pytest.raises(EvaluationError, match="nowhere: no such folder"):
        score_expressions(MevisDataset(mevis_root), tmp_path / "nowhere")


def test_bad_predictions_name_their_files(mevis_root, tmp_path, write_predictions):
    dataset = MevisDataset(mevis_root)
    predictions = write_predictions(dataset, tmp_path / "pred")
    corrupt, wrong = dataset[0].prediction_paths(predictions)[1], dataset[2].prediction_paths(predictions)[0]
    corrupt.write_bytes(corrupt.read_bytes()[:40])
    write_mask(wrong, np.zeros((SIZE[1], SIZE[0]), bool))
    for policy in ("error", "zero", "skip", "official"):  # a broken file is never excused
        with pytest.raises(EvaluationError) as caught:
            score_expressions(dataset, predictions, missing=policy)
        assert f"{corrupt}: not a readable PNG" in str(caught.value)
        assert f"{wrong}: 40 x 24 pixels (height x width), expected 24 x 40" in str(caught.value)


def test_unexpected_files_are_reported_and_ignored(mevis_root, tmp_path, write_predictions):
    dataset = MevisDataset(mevis_root)
    predictions = write_predictions(dataset, tmp_path / "pred")
    extra = [predictions / "ccc" / "0" / "00000.png", predictions / "aaa" / "7" / "00000.png"]
    extra.append(predictions / "aaa" / "0" / "00009.png")
    for path in extra:
        write_mask(path, moving_square(0))
    result = score_expressions(dataset, predictions)
    assert result.metrics["J"] == 1.0 and result.counts["extra"] == 3
    for path in (extra[0].parent.parent, extra[1].parent, extra[2]):
        assert f"{path}: not part of the benchmark, ignored" in result.problems


def test_no_ground_truth_and_damaged_annotations(mevis_root):
    dataset = MevisDataset(mevis_root, split="valid")
    with pytest.raises(EvaluationError, match=r"no 'anno_id'.*submission"):
        dataset.ground_truth(dataset[0])
    path = mevis_root / "valid_u" / "mask_dict.json"
    masks = json.loads(path.read_text())
    masks["0"].pop()
    dump(path, {key: value for key, value in masks.items() if key != "3"})
    dataset = MevisDataset(mevis_root)
    with pytest.raises(EvaluationError, match=r"mask_dict\.json, expression aaa_0: 2 masks .* each of 3 frames"):
        dataset.ground_truth(dataset[0])
    with pytest.raises(EvaluationError, match=r"mask_dict\.json: no masks for annotation 3 \(bbb_1\)"):
        dataset.ground_truth(dataset[3])
    dump(mevis_root / "valid_u" / "meta_expressions.json", {"clips": {}})
    with pytest.raises(EvaluationError, match=r"meta_expressions\.json: expected .* 'videos'"):
        MevisDataset(mevis_root)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        ({"frames": [], "expressions": {}}, "no frames"),
        ({"expressions": {}}, "'frames'"),
        ({"frames": ["0"], "expressions": {"0": {"exp": " "}}}, "empty expression"),
        ({"frames": ["0"], "expressions": {"../../x": {"exp": "a"}}}, "leads out of the folder"),
        ({"frames": ["/0"], "expressions": {"0": {"exp": "a"}}}, "leads out of the folder"),
    ],
)
def test_damaged_expression_files(mevis_root, video, reason):
    dump(mevis_root / "valid_u" / "meta_expressions.json", {"videos": {"zzz": video}})
    with pytest.raises(EvaluationError, match=rf"meta_expressions\.json: video zzz .*{reason}"):
        len(MevisDataset(mevis_root))


def test_youtube_vos_listing_leaves_out_test_videos(youtube_root):
    dataset = RefYoutubeVosDataset(youtube_root)
    assert [sample.key for sample in dataset] == ["v1_0", "v1_1"]
    assert [path.name for path in dataset[0].frame_paths] == ["00000.jpg", "00005.jpg", "00015.jpg"]
    assert dataset[0].prediction_paths("p")[2].as_posix() == "p/v1/0/00015.png"
    with pytest.raises(EvaluationError, match="no 'obj_id'"):
        dataset.ground_truth(dataset[0])


def test_youtube_vos_with_own_ground_truth(youtube_root, tmp_path, write_predictions):
    dump(tmp_path / "objects.json", {"v1": {"0": 1, "1": 2}})
    dataset = RefYoutubeVosDataset(youtube_root, objects_file=tmp_path / "objects.json")
    predictions = write_predictions(dataset, tmp_path / "pred")
    assert score_expressions(dataset, predictions).metrics["J&F"] == 1.0
    # Swapped answers: no pairing hides it.
    (predictions / "v1" / "0").rename(predictions / "v1" / "x")
    (predictions / "v1" / "1").rename(predictions / "v1" / "0")
    (predictions / "v1" / "x").rename(predictions / "v1" / "1")
    assert score_expressions(dataset, predictions).metrics["J"] < 0.2
    (youtube_root / "valid" / "Annotations" / "v1" / "00005.png").unlink()
    with pytest.raises(EvaluationError, match=r"00005\.png: annotation missing"):
        score_expressions(dataset, predictions)


def test_youtube_vos_full_list_needs_the_test_list(youtube_root):
    video = {"frames": ["0"], "expressions": {}}
    path = youtube_root / "meta_expressions"
    dump(path / "valid" / "meta_expressions.json", {"videos": {str(i): video for i in range(507)}})
    dump(path / "test" / "meta_expressions.json", {"videos": {str(i): video for i in range(305)}})
    assert len(RefYoutubeVosDataset(youtube_root).videos) == 202
    (path / "test" / "meta_expressions.json").unlink()
    with pytest.raises(EvaluationError, match="missing; the validation list holds 507"):
        RefYoutubeVosDataset(youtube_root)


def test_ref_davis17_per_expression(davis_root, tmp_path, write_predictions):
    dataset = ref_davis(davis_root)
    assert len(dataset) == 8
    result = score_expressions(dataset, write_predictions(dataset, tmp_path / "pred"))
    assert result.metrics["J&F"] == 1.0 and result.protocol.startswith("4B")


def test_ref_davis17_masks_are_numbered_by_ids_as_strings(tmp_path):
    entries = {str(i): {"exp": "x", "obj_id": "1"} for i in range(12)}
    root = tmp_path / "d"
    videos = {name: {"frames": ["0"], "expressions": entries} for name in ("b", "a")}
    dump(root / "meta_expressions" / "valid" / "meta_expressions.json", {"videos": videos})
    dump(root / "valid" / "mask_dict.json", {str(i): [None] for i in range(24)})
    dataset = ref_davis(root)
    positions = {sample.key: dataset.annotation_ids(sample) for sample in dataset}
    assert positions["a_1"] == ["1"] and positions["a_10"] == ["2"] and positions["a_2"] == ["4"]
    assert positions["b_0"] == ["12"]
    dump(root / "valid" / "mask_dict.json", {"0": [None]})
    with pytest.raises(EvaluationError, match=r"1 entries, expected one per expression \(24\)"):
        score_expressions(ref_davis(root), tmp_path)


def test_empty_ground_truth_of_unknown_size(tmp_path):
    # No mask of the video tells its size: empty predictions are right, others wrong.
    root = tmp_path / "d"
    videos = {"a": {"frames": ["0"], "expressions": {"0": {"exp": "x", "obj_id": "1"}}}}
    dump(root / "meta_expressions" / "valid" / "meta_expressions.json", {"videos": videos})
    dump(root / "valid" / "mask_dict.json", {"0": [None]})
    write_mask(tmp_path / "pred" / "a" / "0" / "0.png", np.zeros((5, 7)))
    assert score_expressions(ref_davis(root), tmp_path / "pred").metrics["J"] == 1.0
    write_mask(tmp_path / "pred" / "a" / "0" / "0.png", np.eye(5, 7))
    assert score_expressions(ref_davis(root), tmp_path / "pred").metrics["J"] == 0.0


def test_revos(revos_root, tmp_path, write_predictions):
    dataset = RevosDataset(revos_root, host="unipixel")
    assert [sample.prompt for sample in dataset] == [
        "Please segment the square in this video.",
        "Which one could roll? Please provide the segmentation mask.",
        "Please segment the unicorn in this video.",
    ]
    predictions = write_predictions(dataset, tmp_path / "pred")
    perfect = score_expressions(dataset, predictions)
    assert perfect.metrics["J"] == perfect.metrics["A"] == 1.0 and perfect.metrics["R"] == pytest.approx(1.0)
    # The square where the other object is: an eighth of the pixels is wrong, half of the foreground.
    for index, path in enumerate(dataset[0].prediction_paths(predictions)):
        write_mask(path, moving_square(index, 10))
    result = score_expressions(dataset, predictions)
    share = 64 / (SIZE[0] * SIZE[1])
    assert result.metrics["J_referring"] == 0.0 and result.metrics["J_reasoning"] == 1.0
    assert result.metrics["J"] == 0.5
    assert result.metrics["A_referring"] == round(100 * (1 - 2 * share), 2) / 100
    assert result.metrics["R_referring"] == 0.5
    assert result.counts["expressions"] == 3


def test_revos_scores_missing_expressions_zero_officially(revos_root, tmp_path, write_predictions):
    dataset = RevosDataset(revos_root)
    predictions = write_predictions(dataset, tmp_path / "pred")
    shutil.rmtree(predictions / "SRC" / "clip" / "0")
    result = score_expressions(dataset, predictions, missing="official")
    assert result.metrics["J_referring"] == 0.0 and result.metrics["J"] == 0.5
    assert "J" not in score_expressions(dataset, predictions, missing="skip").metrics  # no referring expression left


def test_reasonvos(reasonvos_root, tmp_path, write_predictions):
    dataset = ReasonVosDataset(reasonvos_root, host="glus")
    assert [sample.expression_id for sample in dataset] == ["0", "1"]
    predictions = write_predictions(dataset, tmp_path / "pred")
    assert score_expressions(dataset, predictions).metrics["J&F"] == 1.0
    shutil.rmtree(predictions / "v" / "1")
    result = score_expressions(dataset, predictions, missing="official")
    assert (result.metrics["J"], result.counts["in_mean"], result.counts["missing"]) == (1.0, 1, 1)
    shutil.rmtree(reasonvos_root / "Annotations" / "MOSE_v_0")
    with pytest.raises(EvaluationError, match="MOSE_v_0: no annotations"):
        score_expressions(dataset, predictions)


@pytest.mark.parametrize(
    ("host", "expression", "prompt"),
    [
        ("videoglamm", "The  Dog", "What is the dog in this video? Please respond with segmentation masks."),
        ("glus", "The Dog.", "<image>\nCan you segment the the dog in this frame?"),
        ("unipixel", "The Dog on the left.", "Please segment the Dog on the left in this video."),
        ("unipixel", "An ant", "Please segment the ant in this video."),
        ("unipixel", "Who runs?", "Who runs? Please provide the segmentation mask."),
    ],
)
def test_referring_prompts(host, expression, prompt):
    assert referring_prompt(expression, host) == prompt


def test_other_prompts():
    assert vidstg_prompt("Who runs?", True, "sparrow") == "Who runs? Please respond with segmentation masks."
    assert vidstg_prompt("a dog", False, "sparrow") == "Can you segment a dog in this video?"
    assert conversation_prompt().startswith("Could you please give me a detailed description of the video?")
    with pytest.raises(ValueError, match="empty expression"):
        referring_prompt("  ", "sparrow")
    with pytest.raises(ValueError, match="host='gpt'"):
        vidstg_prompt("a dog", True, "gpt")
