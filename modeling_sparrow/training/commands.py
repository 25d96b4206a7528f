"""The commands `sparrow train` and `sparrow ablate`."""

import argparse
import shlex
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds the commands to the sub-parsers of `sparrow`."""
    train = commands.add_parser("train", help="run a training stage")
    train.add_argument("config", help="YAML file of the stage, or the name of one that is shipped (tiny_filter)")
    train.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on from the last checkpoint in the output; --no-resume deletes what lies there",
    )
    _add_set(train)
    train.add_argument("--merge", default=None, metavar="DIR", help="also write the model with its adapter merged in")
    train.set_defaults(run=run_train)

    ablation = commands.add_parser("ablate", help="repeat the paper's ablation of tracked features and boxes")
    ablation.add_argument("config", help="YAML file, or the name of one that is shipped (tiny_ablation)")
    _add_set(ablation)
    ablation.add_argument("--table", default="docs/ablation.md", metavar="FILE", help="where the table goes")
    ablation.set_defaults(run=run_ablate)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another value for a key, for example optimization.steps=100; may be given several times",
    )


def run_train(options: argparse.Namespace) -> int:
    """Runs a stage and, on request, merges its adapter."""
    from .run import merge_stage, train_stage
    from .settings import read_settings
    from .stages import AnyStage

    settings = read_settings(options.config, AnyStage, options.set)
    final = train_stage(settings, options.resume)
    if options.merge is not None:
        merge_stage(final, options.merge)
    return 0


def run_ablate(options: argparse.Namespace) -> int:
    """Runs the cells that are not finished and writes the table."""
    from .ablation import AblationSettings, ablate, write_table
    from .settings import read_settings

    settings = read_settings(options.config, AblationSettings, options.set)
    changes = [word for change in options.set for word in ("--set", change)]
    command = shlex.join(["sparrow", "ablate", options.config, *changes, "--table", options.table])
    write_table(settings, ablate(settings), command, Path(options.table))
    return 0
