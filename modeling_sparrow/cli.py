"""The command `sparrow`: ground, demo, info, export, convert; evaluation and training add their own."""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path

from sparrow_processing.errors import ExportError, VideoGroundingError
from sparrow_processing.exports import write_text

logger = logging.getLogger("sparrow")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparrow", description="SPARROW: ask about a video, get text, boxes and masks."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    ground = commands.add_parser("ground", help="ground queries in a video")
    ground.add_argument("video", help="a video file, a GIF, or a folder of pictures")
    ground.add_argument("query", nargs="*", help="what to find; several queries share the work on the video")
    ground.add_argument("--model", default=None, help="folder or Hub id (default: the embedded sparrow-tiny)")
    ground.add_argument("--output", default="sparrow_output", help="folder for result.json, overlay.mp4 and masks/")
    ground.add_argument("--device", default=None, help="cpu, cuda, mps (default: the best there is)")
    ground.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    ground.add_argument("--max-frames", type=int, default=None, help="use only the first frames of the video")
    ground.add_argument("--task", default="refer", choices=["refer", "box", "describe", "ask"])
    ground.add_argument("--max-new-tokens", type=int, default=None, help="longest answer (default: the checkpoint's)")
    ground.add_argument("--json", default=None, metavar="FILE", help="also write the result here; - prints it")
    ground.add_argument("--no-overlay", action="store_true", help="do not write overlay.mp4 and overlay.png")
    ground.set_defaults(run=run_ground)

    demo = commands.add_parser("demo", help="ask in the browser (needs the extra demo)")
    demo.add_argument("--model", default=None, help="folder or Hub id (default: the embedded sparrow-tiny)")
    demo.add_argument("--device", default=None, help="cpu, cuda, mps (default: the best there is)")
    demo.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    demo.add_argument("--port", type=int, default=None, help="default: the first free one from 7860 on")
    demo.set_defaults(run=run_demo)

    info = commands.add_parser("info", help="say what a checkpoint is")
    info.add_argument("model", nargs="?", default=None)
    info.set_defaults(run=run_info)

    export = commands.add_parser("export", help="write a complete Hub repository: weights, code, processor, card")
    export.add_argument("model")
    export.add_argument("directory")
    export.set_defaults(run=run_export)

    convert = commands.add_parser("convert", help="turn the files of a release into a folder for from_pretrained")
    convert.add_argument(
        "source", help="folder of the SPARROW or VideoGLaMM checkpoint, with config.json and tokenizer"
    )
    convert.add_argument("directory")
    convert.add_argument("--clip", required=True, help="folder of openai/clip-vit-large-patch14-336")
    convert.add_argument(
        "--internvideo", default=None, help="file of InternVideo2 stage 2, if the source has no tower"
    )
    convert.add_argument("--detector", default=None, help="folder of the detector; without it there are no boxes")
    convert.add_argument("--video-branch", action="store_true", help="carry masks on with SAM2's memory")
    convert.add_argument("--dtype", default="float16", choices=["float32", "bfloat16", "float16"])
    convert.set_defaults(run=run_convert)

    from .evaluation.commands import add_commands
    from .training.commands import add_commands as add_training_commands

    add_commands(commands)
    add_training_commands(commands)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return options.run(options)
    except (VideoGroundingError, OSError, ValueError) as error:
        print(f"sparrow: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparrow: interrupted", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):  # torch's, which is slow to import
            raise
        print(f"sparrow: out of memory: try --dtype bfloat16 or --max-frames. {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def load_model(name: str | None, device: str | None, dtype: str = "float32"):
    """Model in evaluation mode and its processor.

    Args:
        name: folder or Hub id; None for the embedded checkpoint.
        device: None picks cuda, then mps, then cpu.
        dtype: of the weights.

    Raises:
        ValueError, OSError: no folder, not a SPARROW, no safetensors, tensors absent or of another shape than the
            configuration says, a processor that does not fit.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoProcessor

    from .configuration_sparrow import SparrowConfig
    from .registration import DEFAULT_CHECKPOINT

    name = DEFAULT_CHECKPOINT if name is None else name
    if os.sep in name and not os.path.isdir(name) and name.count("/") != 1:
        raise ValueError(f"{name}: no such folder.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type != SparrowConfig.model_type:
            raise ValueError(f"{name} holds a model of type {config.model_type!r}, not {SparrowConfig.model_type!r}.")
        model, loading = AutoModel.from_pretrained(
            name,
            config=config,
            trust_remote_code=False,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, with the absent ones
            output_loading_info=True,
        )
    except (SafetensorError, StrictDataclassError, TypeError) as error:  # TypeError: config.json holds no object
        raise ValueError(f"{name} cannot be loaded: {error}") from error
    wrong = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} tensors are absent or do not fit config.json, and would be random: "
            f"{', '.join(sorted(wrong)[:5])}{' …' * (len(wrong) > 5)}."
        )
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    processor.check_config(config)
    return model.to(device).eval(), processor


# ---------------------------------------------------------------------- ground


def run_ground(options: argparse.Namespace) -> int:
    from sparrow_processing.processing_sparrow import check_prompt

    queries = [check_prompt(query) for query in options.query]
    if not queries and options.task != "describe":
        raise ValueError("Give at least one query, for example: sparrow ground clip.mp4 'the red ring'.")
    if options.max_frames is not None and options.max_frames < 1:
        raise ValueError(f"--max-frames must be at least 1, got {options.max_frames}.")
    from sparrow_processing.video_io import open_video

    reader = open_video(options.video)
    folders = _output_folders(Path(options.output), max(len(queries), 1))
    if options.json not in (None, "-") and not Path(options.json).absolute().parent.is_dir():
        raise ExportError(f"--json {options.json}: there is no such folder.")
    model, processor = load_model(options.model, options.device, options.dtype)
    if options.max_frames is not None:
        reader = reader.head(options.max_frames)
    results, interrupted = ground_video(
        model, processor, reader, queries or None, options.task, options.max_new_tokens
    )
    for result, folder in zip(results, folders, strict=True):
        write_result(result, reader, folder, overlay=not options.no_overlay)
        _report(result, folder, overlay=not options.no_overlay)
    if options.json is not None:
        _write_json(results, options.json)
    return 130 if interrupted else 0


def ground_video(model, processor, reader, queries: list[str] | None, task: str, max_new_tokens: int | None = None):
    """Ground queries in an open video with a progress bar.

    Returns the results and whether the user interrupted; an interrupted run keeps the frames that are done.
    """
    from tqdm import tqdm

    began = time.perf_counter()
    inputs = processor(text=queries, videos=[reader], task=task, stream=True).to(model.device)
    prepared = time.perf_counter() - began
    collector = processor.collector(inputs["metadata"])
    steps = model.ground_iter(**inputs, max_new_tokens=max_new_tokens)
    interrupted, output, seen = False, None, set()
    with tqdm(total=len(reader), desc="frames", unit="frame") as bar:
        try:
            while True:
                row, masks = next(steps)
                collector(row, masks)
                if masks.frame_index not in seen:
                    seen.add(masks.frame_index)
                    bar.update()
        except StopIteration as end:
            output = end.value
        except KeyboardInterrupt:
            interrupted = True
            logger.info("interrupted after %d of %d frames; writing what is done", len(seen), len(reader))
    if output is None:
        return processor.partial_results(collector), interrupted
    results = processor.post_process_grounding(output, collector)
    for result in results:
        result.timings["prepare"] = prepared
    return results, interrupted


def _output_folders(root: Path, count: int) -> list[Path]:
    """Make `root` itself for one query, a numbered folder in it for each of several."""
    folders = [root] if count == 1 else [root / f"query_{index}" for index in range(count)]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(f"{folder}: {error.strerror}") from error
    return folders


def write_result(result, reader, folder: Path, overlay: bool = True):
    """Write `result.json`, `masks/<object>/<frame>.png`, `overlay.mp4` and `overlay.png` (four frames of it).

    Those of an earlier run are replaced.
    """
    result.save_json(folder / "result.json", overwrite=True)
    result.save_pngs(folder / "masks", overwrite=True)
    if overlay:
        result.save_video(folder / "overlay.mp4", reader, overwrite=True, progress=True)
        result.save_strip(folder / "overlay.png", reader, overwrite=True)


def _write_json(results: list, target: str):
    text = (
        results[0].to_json() if len(results) == 1 else json.dumps([json.loads(result.to_json()) for result in results])
    )
    if target == "-":
        print(text)
    else:
        write_text(target, text + "\n", overwrite=True)


def _report(result, folder: Path, overlay: bool):
    print(f"query:   {result.query}", file=sys.stderr)
    print(f"answer:  {result.text}", file=sys.stderr)
    for track in result:
        seen = f"visible in {int(track.visible.sum())} of {len(track)} frames"
        print(f"object {track.id}: {track.phrase or ''} (score {track.score:.2f}, {seen})", file=sys.stderr)
    for warning in result.warnings:
        print(f"note:    {warning}", file=sys.stderr)
    files = f"result.json, masks{os.sep}" + (", overlay.mp4, overlay.png" if overlay else "")
    print(f"written: {folder}{os.sep}{files}", file=sys.stderr)


# ---------------------------------------------------------------------- demo, info, export, convert


def run_demo(options: argparse.Namespace) -> int:
    try:
        from sparrow_space.interface import serve
    except ImportError as error:
        raise ValueError(
            f"{error}. The demo needs more packages: pip install 'sparrow-video-grounding[demo]'."
        ) from error
    logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there
    model, processor = load_model(options.model, options.device, options.dtype)
    name = Path(options.model).name if options.model else "sparrow-tiny"
    serve(model, processor, name, server_port=options.port)
    return 0


def run_info(options: argparse.Namespace) -> int:
    model, _ = load_model(options.model, "cpu")
    config = model.config
    print(f"checkpoint      {options.model or 'sparrow-tiny (embedded)'}")
    print(f"parameters      {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")
    for name, part in model.model.named_children():
        print(f"  {name:<16}{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M")
    print(f"language model  {config.text_config.model_type}, {config.text_config.vocab_size} tokens")
    print(f"frames          {config.num_frames} to the language model, all to the mask tracker")
    print(f"mask tracker    {config.mask_tracker_config.image_size} px, {config.mask_tracker_config.propagation}")
    print(f"proposals       {config.proposer_config.num_queries}, filter {config.filtration_config.variant}")
    return 0


def run_export(options: argparse.Namespace) -> int:
    directory = Path(options.directory)
    _check_empty(directory)
    model, processor = load_model(options.model, "cpu")
    export_repository(model, processor, directory, source=options.model)
    logger.info("written: %s", options.directory)
    return 0


def _check_empty(directory: Path):
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty.")


def run_convert(options: argparse.Namespace) -> int:
    import torch

    from .conversion.checkpoint import convert_checkpoint

    convert_checkpoint(
        options.source,
        options.directory,
        clip=options.clip,
        internvideo=options.internvideo,
        detector=options.detector,
        video_branch=options.video_branch,
        dtype=getattr(torch, options.dtype),
    )
    logger.info("written: %s", options.directory)
    return 0


def export_repository(model, processor, directory: Path, source: str | None = None):
    """Write a folder that can be pushed to the Hub and loads with `trust_remote_code=True` without this package.

    It holds weights (safetensors), configuration, code, processor, pipeline and a model card.

    Args:
        directory: created; an existing one must be empty.
        source: folder whose README.md is taken over as the model card.
    """
    from .registration import VideoGroundingPipeline

    _check_empty(directory)
    directory.mkdir(parents=True, exist_ok=True)
    classes = {
        type(model.config): "AutoConfig",
        type(model): "AutoModel",
        type(processor): "AutoProcessor",
    }
    before = {cls: cls._auto_class for cls in classes}
    try:
        for cls, auto_class in classes.items():
            cls.register_for_auto_class(auto_class)
        VideoGroundingPipeline(model=model, processor=processor).save_pretrained(directory)
    finally:
        for cls, auto_class in before.items():
            cls._auto_class = auto_class
    card = Path(source) / "README.md" if source else None
    if card is not None and card.is_file():
        shutil.copyfile(card, directory / "README.md")
    else:
        template = Path(__file__).parent / "templates" / "model_card.md"
        (directory / "README.md").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
