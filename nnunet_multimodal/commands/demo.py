"""``nnunet_multimodal demo``: from nothing to segmented contrasts, in minutes and without data."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from nnunet_multimodal.commands.convert import natural_number
from nnunet_multimodal.errors import EnvironmentProblem, UsageError

DESCRIPTION = """\
Show the whole way on made-up patients: phantom, convert, plan and preprocess, train (on T1w only), scribbles, refer to
every contrast, evaluate, report. Each command is shown as you can type it. No data, no GPU and no nnU-Net variables are
needed: everything lies below the output folder. Takes about {minutes} minutes on two CPU cores.

What is done is not done again: after Ctrl-C the same line goes on, also in the middle of the training."""

EXAMPLE = """\
nnunet_multimodal demo
nnunet_multimodal demo -o /tmp/demo --subjects 40 --epochs 40"""

MINUTES = "9"
DESCRIPTION = DESCRIPTION.format(minutes=MINUTES)
FOLDER = Path("nnunet_multimodal_demo")
REPORT = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, metavar="DIR", help="default: %(default)s")
    parser.add_argument("-device", "--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    parser.add_argument("--subjects", type=natural_number, metavar="N", help="patients to train on (24)")
    parser.add_argument("--epochs", type=natural_number, metavar="N", help="of 150 steps (10)")
    parser.add_argument(
        "--quick", action="store_true", help="only whether everything runs: tiny images, six steps, useless numbers"
    )


def run(args: argparse.Namespace) -> int:
    """Does what is not done yet, then shows what came out."""
    from nnunet_multimodal.demo.recipe import steps
    from nnunet_multimodal.demo.run import Record, environment_lines, only_one, read_record, run_steps
    from nnunet_multimodal.programs import find_program

    options = _options(args, read_record(args.output))
    for program in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train"):
        find_program(program)
    record = Record(args.output, options)
    again = _again(args)
    try:
        with only_one(args.output):
            print("\n".join(environment_lines(args.output, options)))
            run_steps(args.output, options, steps(args.output, options, _organs()), record)
            return _finish(args.output, options, record)
    except KeyboardInterrupt:
        print(f"\nTo go on where it stopped: {again}", file=sys.stderr)
        raise


def _options(args: argparse.Namespace, before: dict[str, Any] | None) -> Any:
    """What the user asked for; the device of a demo that goes on is its own unless another is named."""
    from nnunet_multimodal.demo.recipe import QUICK, Options

    for name, least in (("subjects", 5), ("epochs", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            why = ": nnU-Net's five folds need so many" if name == "subjects" else ""
            raise UsageError(f"--{name} must be at least {least}{why}, found {value}.")
    options = QUICK if args.quick else Options()
    changes: dict[str, Any] = {"device": args.device or (before["options"].get("device") if before else None)}
    changes["device"] = changes["device"] or ("cuda" if _has_cuda() else "cpu")
    if args.device == "cuda" and not _has_cuda():
        raise EnvironmentProblem("--device cuda: torch finds no GPU here. Leave the option out, or see `doctor`.")
    if args.subjects is not None:
        changes["train_subjects"] = args.subjects
    if args.epochs is not None:
        changes["epochs"] = args.epochs
    return dataclasses.replace(options, **changes)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _organs() -> dict[str, int]:
    from nnunet_multimodal.data.phantom.anatomy import ORGANS

    return dict(ORGANS)


def _again(args: argparse.Namespace) -> str:
    """The line that goes on."""
    words = ["nnunet_multimodal", "demo"]
    if args.output != FOLDER:
        words += ["-o", str(args.output)]
    for name in ("device", "subjects", "epochs"):
        if getattr(args, name) is not None:
            words += [f"--{name}", str(getattr(args, name))]
    return shlex.join([*words, *(["--quick"] if args.quick else [])])


def _finish(folder: Path, options: Any, record: Any) -> int:
    """The report, the summary, and the table on the terminal."""
    import json

    from nnunet_multimodal.demo.recipe import environment
    from nnunet_multimodal.demo.story import results, write_story
    from nnunet_multimodal.evaluation.terminal import describe
    from nnunet_multimodal.programs import duration

    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    done = record.content["steps"]
    write_story(folder / REPORT, folder, options, done, environment(folder, options))
    seconds = sum(step["seconds"] for step in done.values())
    record.content |= {
        "results": results(evaluation, options.contrasts),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(step["cpu_seconds"] for step in done.values()), 1),
        "report": str(folder / REPORT),
    }
    record.save()
    table, problems = describe(evaluation)
    print(f"\n{table}")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"\n{duration(seconds)} in all; everything is in {folder}\n{folder / REPORT}")
    return 0
