"""``nnunet_multimodal list``: the trainers, from the registry."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap

from nnunet_multimodal.registry import TRAINERS, TrainerEntry, require_trainer

DESCRIPTION = """\
Show each trainer: its paper, the data set it needs, how it differs from nnUNetTrainer, and its variants.
Every name takes a length at its end: nnUNetTrainerContrastAug_50epochs."""

EXAMPLE = """\
nnunet_multimodal list nnUNetTrainerCrossMR
nnunet_multimodal list --json"""

_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("trainer", nargs="*", help="show only these (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    entries = [require_trainer(name) for name in args.trainer] or [*TRAINERS.values()]
    if args.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
    else:
        print("\n\n".join(_describe(entry) for entry in entries))
    return 0


def _describe(entry: TrainerEntry) -> str:
    rows = [(key, getattr(entry, key)) for key in ("paper", "dataset", "differs")]
    lines = [entry.name, *(_wrap(f"  {key + ':':<9} ", text) for key, text in rows)]
    if entry.ablations:
        lines.append("  variants, the word goes behind the name:")
    width = max((len(word) for word in entry.ablations), default=0)
    lines += [_wrap(f"    _{word:<{width}}  ", sentence) for word, sentence in entry.ablations.items()]
    return "\n".join(lines)


def _wrap(head: str, text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
