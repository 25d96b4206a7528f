"""The commands `sparrow evaluate`, `sparrow submit` and `sparrow benchmark`."""

import argparse
import json
import logging
import os
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .captions import BertSimilarity, Cider, Clair, LocalJudge, Meteor
from .davis import read_sequences, score_ref_davis17, write_label_maps
from .expressions import score_expressions
from .files import EvaluationError, atomic_path, read_json, write_json
from .referring_datasets import MevisDataset, ReasonVosDataset, RefDavis17Dataset, RefYoutubeVosDataset, RevosDataset
from .report import HEADLINES, RunInfo, hash_checkpoint, results_table, write_eval_results
from .results import EvaluationResult, list_problems
from .synthetic import CONTROLS
from .video_gcg import score_video_gcg
from .video_gcg_dataset import VideoGcgDataset
from .vidstg import MOMENT_PROTOCOL, MOMENT_TEMPORAL_PROTOCOL, TUBEDETR_PROTOCOL, VidStgDataset, score_vidstg

logger = logging.getLogger(__name__)

BENCHMARKS = ("mevis", "ref-youtube-vos", "ref-davis17", "vidstg", "video-gcg", "revos", "reasonvos")
#: The first is the default.
SPLITS = {
    "mevis": ("valid_u", "valid", "train"),
    "ref-youtube-vos": ("valid", "train"),
    "vidstg": ("interrogative", "declarative"),
}
SYNTHETIC_SPLITS = ("test-easy", "test-hard", "test-new-words", "validation")
VIDSTG_PROTOCOLS = {
    "moment": MOMENT_PROTOCOL,
    "moment-temporal": MOMENT_TEMPORAL_PROTOCOL,
    "tubedetr": TUBEDETR_PROTOCOL,
}
#: VideoGLaMM's and SPARROW's scripts cut the videos of Ref-DAVIS17 into pieces of this many frames.
DAVIS_CHUNK = 64


def add_commands(commands: Any) -> None:
    """Adds the commands to the sub-parsers of `sparrow`."""
    evaluate = commands.add_parser("evaluate", help="predict and score a benchmark")
    benchmarks = evaluate.add_subparsers(dest="benchmark", required=True, metavar="benchmark")
    for name in BENCHMARKS:
        _add_benchmark(benchmarks, name)
    _add_synthetic(benchmarks)

    submit = commands.add_parser("submit", help="pack predictions for a benchmark's server")
    submit.add_argument("benchmark", choices=["mevis", "ref-youtube-vos"])
    submit.add_argument("--data", required=True, metavar="ROOT", help="folder of the data set")
    submit.add_argument("--predictions", required=True, metavar="DIR")
    submit.add_argument("--output", required=True, metavar="ZIP")
    submit.set_defaults(run=run_submit)

    benchmark = commands.add_parser("benchmark", help="measure speed and memory")
    benchmark.add_argument("subject", choices=["metrics"])
    benchmark.add_argument("--json", default=None, metavar="FILE", help="write the numbers here; - prints them")
    benchmark.set_defaults(run=run_benchmark_metrics)


def _add_benchmark(benchmarks: Any, name: str) -> None:
    parser = benchmarks.add_parser(name, help=f"predict and score {name}")
    parser.add_argument("--data", required=True, metavar="ROOT", help="folder of the data set, in its official layout")
    parser.add_argument(
        "--predictions", required=True, metavar="DIR", help="complete ones are kept; reports go to DIR.report"
    )
    parser.add_argument("--stage", default="all", choices=["predict", "score", "all"])
    parser.add_argument("--limit", type=_positive, default=None, help="only the first videos (or sentences, samples)")
    if name in SPLITS:
        parser.add_argument("--split", default=SPLITS[name][0], choices=SPLITS[name])
    _add_model_options(parser)
    parser.add_argument(
        "--host",
        default="videoglamm",
        choices=["videoglamm", "sparrow", "glus", "unipixel"],
        help="whose prompts to use; sparrow's are videoglamm's",
    )
    parser.add_argument(
        "--queries-per-pass", type=_positive, default=4, help="queries that share one video's features"
    )
    parser.add_argument("--fail-fast", action="store_true", help="stop at the first video that fails")
    parser.add_argument(
        "--missing",
        default="error",
        choices=["error", "zero", "skip", "official"],
        help="missing predictions: stop, score 0, leave out, or do as the official script",
    )
    parser.add_argument("--num-workers", type=_count, default=1, help="processes that score")
    parser.add_argument(
        "--table", default=None, metavar="FILE", help="markdown table (default: DIR.report/results.md)"
    )
    if name in ("vidstg", "video-gcg"):
        parser.add_argument(
            "--rules", default="sparrow", choices=["sparrow", "videoglamm"], help="whose rules where scripts differ"
        )
    if name == "ref-youtube-vos":
        parser.add_argument("--objects-file", default=None, help="JSON: video, expression id, object number")
    if name in ("ref-youtube-vos", "ref-davis17"):
        parser.add_argument("--mask-file", default=None, help="mask dictionary, if not in the official place")
    if name == "ref-davis17":
        parser.add_argument(
            "--davis-root", default=None, help="DAVIS 2017, for protocol 4A (default: ROOT/DAVIS if it is there)"
        )
        parser.add_argument(
            "--chunk-frames",
            type=_count,
            default=None,
            help=f"answer pieces of this many frames, 0: whole videos (default: {DAVIS_CHUNK} as VideoGLaMM)",
        )
    if name == "vidstg":
        parser.add_argument("--protocol", default="moment", choices=list(VIDSTG_PROTOCOLS))
    if name == "video-gcg":
        parser.add_argument("--captions", nargs="*", default=[], choices=["cider", "meteor"], help="need Java")
        parser.add_argument("--phrase-encoder", default=None, help="folder or Hub id of bert-base-uncased, for recall")
        parser.add_argument("--judge", default=None, help="folder or Hub id of a chat model, for CLAIR")
    parser.set_defaults(run=run_evaluate)


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=None, help="folder or Hub id (default: the embedded sparrow-tiny)")
    parser.add_argument("--device", default=None, help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=None, help="longest answer (default: the checkpoint's)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default=None, metavar="FILE", help="write the numbers here; - prints them")


def _add_synthetic(benchmarks: Any) -> None:
    parser = benchmarks.add_parser("synthetic", help="the generated world, without any download")
    parser.add_argument("--split", default=SYNTHETIC_SPLITS[0], choices=SYNTHETIC_SPLITS)
    parser.add_argument("--clips", type=_positive, default=64)
    parser.add_argument("--control", default="none", choices=CONTROLS)
    parser.add_argument("--batch-size", type=_positive, default=8)
    _add_model_options(parser)
    parser.set_defaults(run=run_synthetic)


def _count(text: str, smallest: int = 0) -> int:
    value = int(text)
    if value < smallest:
        raise argparse.ArgumentTypeError(f"expected at least {smallest}, got {value}")
    return value


def _positive(text: str) -> int:
    return _count(text, smallest=1)


# ---------------------------------------------------------------------- evaluate


def run_evaluate(options: argparse.Namespace) -> int:
    """Predicts and scores one benchmark; returns 1 if a video failed."""
    dataset = make_dataset(options)
    if options.limit is not None:
        dataset.limit(options.limit)
    reports = report_folder(options.predictions)
    try:
        summary, results, paths = None, [], []
        if options.stage != "score":
            summary = _predict(options, dataset, reports)
        failures = summary.failures if summary else []
        if options.stage != "predict":
            if failures and options.missing == "error":
                logger.error("not scored because videos failed; --missing zero or skip scores the others")
            else:
                results = _score(options, dataset, reports)
                paths = _write_reports(results, _recorded_run(options, reports), options, reports)
    except ImportError as error:  # of an optional package; the message says how to install it
        raise EvaluationError(str(error)) from error
    if options.json is not None:
        content = {"run": asdict(_recorded_run(options, reports)), "results": [result.to_dict() for result in results]}
        _write_numbers(content | {"predictions": None if summary is None else asdict(summary)}, options.json)
    for path in paths:
        logger.info("written: %s", path)
    if failures:
        logger.error("%s", list_problems(failures, "videos that failed"))
    return 1 if failures else 0


def make_dataset(options: argparse.Namespace):
    """The benchmark that the options name."""
    name, data, host = options.benchmark, options.data, options.host
    if name == "mevis":
        return MevisDataset(data, options.split, host)
    if name == "ref-youtube-vos":
        return RefYoutubeVosDataset(data, options.split, host, options.objects_file, options.mask_file)
    if name == "ref-davis17":
        return RefDavis17Dataset(data, host, mask_file=options.mask_file)
    if name == "revos":
        return RevosDataset(data, host)
    if name == "reasonvos":
        return ReasonVosDataset(data, host)
    if name == "vidstg":
        # The same prompts; the rules decide which of several objects counts.
        host = options.rules if host in ("videoglamm", "sparrow") else host
        return VidStgDataset(data, options.split, VIDSTG_PROTOCOLS[options.protocol], host)
    return VideoGcgDataset(data)


def report_folder(predictions: str | Path) -> Path:
    """Beside the predictions, because whatever lies among them is taken for one."""
    predictions = Path(predictions).resolve()
    return predictions.with_name(f"{predictions.name}.report")


def _predict(options: argparse.Namespace, dataset, reports: Path):
    import torch

    from ..cli import load_model
    from .predict import Grounder, predict_expressions, predict_video_gcg, predict_vidstg

    torch.manual_seed(options.seed)
    model, processor = load_model(options.model, options.device, options.dtype)
    _record_run(options, reports)
    grounder = Grounder(model, processor, options.queries_per_pass, options.max_new_tokens)
    if options.benchmark == "vidstg":
        summary = predict_vidstg(grounder, dataset, options.predictions, options.fail_fast)
    elif options.benchmark == "video-gcg":
        summary = predict_video_gcg(grounder, dataset, options.predictions, options.fail_fast)
    else:
        chunk = _chunk_frames(options)
        summary = predict_expressions(grounder, dataset, options.predictions, chunk, options.fail_fast)
    logger.info("%d predicted, %d were there already", summary.predicted, summary.already_done)
    return summary


def _chunk_frames(options: argparse.Namespace) -> int | None:
    if options.benchmark != "ref-davis17":
        return None
    if options.chunk_frames is None:
        return DAVIS_CHUNK if options.host in ("videoglamm", "sparrow") else None
    return options.chunk_frames or None


def _score(options: argparse.Namespace, dataset, reports: Path) -> list[EvaluationResult]:
    predictions, missing, workers = options.predictions, options.missing, options.num_workers
    if options.benchmark == "vidstg":
        return [score_vidstg(dataset, predictions, missing)]
    if options.benchmark == "video-gcg":
        metrics = [{"cider": Cider, "meteor": Meteor}[name]() for name in options.captions]
        metrics += [Clair(LocalJudge(options.judge, options.device or "cpu"))] if options.judge else []
        similarity = (
            BertSimilarity(options.phrase_encoder, options.device or "cpu") if options.phrase_encoder else None
        )
        return [score_video_gcg(dataset, predictions, options.rules, missing, similarity, metrics, workers)]
    results = [score_expressions(dataset, predictions, missing, workers)]
    if options.benchmark == "ref-davis17":
        results += _score_label_maps(options, dataset, reports / "label_maps")
    return results


def _score_label_maps(options: argparse.Namespace, dataset: RefDavis17Dataset, maps: Path) -> list[EvaluationResult]:
    """Ref-DAVIS17 protocol 4A, where DAVIS itself is there."""
    davis = Path(options.davis_root or Path(options.data) / "DAVIS")
    annotations = davis / "Annotations_unsupervised" / "480p"
    if options.davis_root is None and not annotations.is_dir():
        logger.warning("%s: missing, so protocol 4A is not scored; --davis-root names DAVIS 2017", annotations)
        return []
    if maps.exists():  # of an earlier run
        shutil.rmtree(maps)
    workers = options.num_workers
    write_label_maps(dataset, options.predictions, maps, workers, skip_incomplete=options.missing != "error")
    kept = set(dataset.video_names)
    sequences = [name for name in read_sequences(davis) if options.limit is None or name in kept]
    return [score_ref_davis17(annotations, maps, sequences, options.missing, workers)]


def _write_reports(
    results: list[EvaluationResult], run: RunInfo, options: argparse.Namespace, reports: Path
) -> list[Path]:
    """Writes results, `.eval_results` and table; returns their files."""
    paths = write_eval_results(results, run, reports)
    for result, path in zip(results, list(paths), strict=True):
        numbers = ", ".join(f"{name} {result.metrics[name]:.4f}" for name in HEADLINES if name in result.metrics)
        logger.info("%s, %s: %s (%s)", result.benchmark, result.protocol, numbers, result.dataset_version)
        paths.append(reports / f"{path.stem}.json")
        result.save(paths[-1])
        if result.problems:
            logger.warning("%s", list_problems(result.problems, f"all listed in {paths[-1]}"))
    paths.append(Path(options.table) if options.table else reports / "results.md")
    with atomic_path(paths[-1]) as temporary:
        temporary.write_text(results_table(results, run), encoding="utf-8")
    return paths


# ---------------------------------------------------------------------- how the predictions were made


def _record_run(options: argparse.Namespace, reports: Path) -> None:
    """Writes how the predictions are made, and refuses to mix them with those of other weights or settings.

    Raises:
        EvaluationError: if the folder of predictions belongs to another run.
    """
    checkpoint = checkpoint_folder(options.model)
    name = options.model or Path(checkpoint).name
    run = replace(RunInfo.collect(Path(name).name, command_line(options), options.seed, checkpoint), checkpoint=name)
    settings = {"benchmark": options.benchmark, "checkpoint_hash": run.checkpoint_hash}
    settings |= {key: getattr(options, key) for key in ("host", "dtype", "max_new_tokens")}
    settings |= {key: getattr(options, key) for key in ("split", "protocol", "rules") if hasattr(options, key)}
    settings |= {"chunk_frames": _chunk_frames(options)}
    path = reports / "run.json"
    if path.is_file() and Path(options.predictions).is_dir():
        earlier = _read_run(path)[1]
        other = [
            f"{key} {earlier.get(key)}, now {value}" for key, value in settings.items() if earlier.get(key) != value
        ]
        if other:
            raise EvaluationError(
                f"{path}: the predictions in {options.predictions} were made with {'; '.join(other)}; "
                "choose another folder, or delete them"
            )
    write_json(path, {"run": asdict(run), "settings": settings})


def _recorded_run(options: argparse.Namespace, reports: Path) -> RunInfo:
    """How the predictions were made; for predictions from elsewhere only this command is known."""
    path = reports / "run.json"
    if path.is_file():
        return _read_run(path)[0]
    return RunInfo.collect(Path(options.model or options.predictions).name, command_line(options), options.seed, None)


def _read_run(path: Path) -> tuple[RunInfo, dict[str, Any]]:
    content = read_json(path)
    try:
        return RunInfo(**content["run"]), content["settings"]
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: not the record of a run ({error!r}); delete it") from error


def checkpoint_folder(model: str | None) -> str:
    """Local folder of a checkpoint that has been loaded: itself, the embedded one, or its place in the Hub's cache."""
    from huggingface_hub import snapshot_download

    from ..registration import DEFAULT_CHECKPOINT

    if model is None:
        return DEFAULT_CHECKPOINT
    if os.path.isdir(model):
        return model
    return snapshot_download(model, allow_patterns=["*.safetensors"], local_files_only=True)


def command_line(options: argparse.Namespace) -> str:
    """The command with all its settings, defaults included, so that it repeats the run under later defaults too."""
    words = ["sparrow", options.command, options.benchmark]
    for name, value in vars(options).items():
        if name in ("command", "benchmark", "run") or value is None or value is False or value == []:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return shlex.join(words)


# ---------------------------------------------------------------------- synthetic, submit, benchmark


def run_synthetic(options: argparse.Namespace) -> int:
    """Evaluates on generated clips."""
    import torch

    from ..cli import load_model
    from .synthetic import evaluate_synthetic

    torch.manual_seed(options.seed)
    model, processor = load_model(options.model, options.device, options.dtype)
    numbers = evaluate_synthetic(
        model,
        processor,
        options.split,
        options.clips,
        options.seed,
        options.control,
        options.batch_size,
        options.max_new_tokens,
    )
    checkpoint = checkpoint_folder(options.model)
    numbers |= {"model": options.model or Path(checkpoint).name, "checkpoint_sha256": hash_checkpoint(checkpoint)}
    for name, value in numbers.items():
        logger.info("%-20s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    if options.json is not None:
        _write_numbers(numbers, options.json)
    return 0


def run_submit(options: argparse.Namespace) -> int:
    """Packs and checks a submission."""
    from .submit import write_submission

    dataset = (MevisDataset if options.benchmark == "mevis" else RefYoutubeVosDataset)(options.data, "valid")
    submission = write_submission(dataset, options.predictions, options.output)
    logger.info(
        "written: %s (%s: %d videos, %d expressions, %d frames; layout, modes, values and sizes checked)",
        submission.path,
        submission.dataset_version,
        submission.videos,
        submission.expressions,
        submission.frames,
    )
    return 0


def run_benchmark_metrics(options: argparse.Namespace) -> int:
    """Times J and F against a plain reference."""
    from .benchmark import benchmark_metrics

    measured = benchmark_metrics()
    if options.json != "-":
        print(measured.to_markdown())
    if options.json is not None:
        timings = [asdict(timing) | {"speedup": timing.speedup} for timing in measured.timings]
        _write_numbers(asdict(measured) | {"timings": timings}, options.json)
    return 0


def _write_numbers(content: dict[str, Any], target: str) -> None:
    """Writes JSON to a file, or to standard output for `-`."""
    if target == "-":
        json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
        print()
    else:
        write_json(target, content)
