"""What the scripts that make a data set of images and scribbles share: arguments, files by name, the last step."""

from __future__ import annotations

import argparse
import filecmp
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_multimodal.commands.convert import add_repairs, repairs_of
from nnunet_multimodal.commands.scribbles_import import add_checks, print_report
from nnunet_multimodal.conversion.dataset import numbered, require_free
from nnunet_multimodal.conversion.scribble_dataset import Legend, ScribbledFiles, import_scribbles
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import DataProblem, UsageError


def make_scribble_parser(description: str | None, default_name: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all these scripts have; nothing but the data set is written."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("root", type=Path, help="the unpacked data set")
    parser.add_argument("-d", "--dataset-id", type=int, required=True, metavar="ID", help="of the data set, 1 to 999")
    parser.add_argument("--name", default=default_name, help="of the data set (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set of this id")
    add_checks(parser)
    add_repairs(parser)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, once it is clear that the data set can be made."""
    args = parser.parse_args(argv)
    if not args.root.is_dir():
        raise UsageError(f"No such folder: {args.root}")
    require_free(require_nnunet_path("nnUNet_raw"), args.dataset_id, args.name, args.overwrite)
    return args


def find_parts(roots: Sequence[Path], pattern: re.Pattern[str]) -> dict[str, dict[str, Path]]:
    """Files by what their names say: case -> part -> path.

    Args:
        roots: folders, and all in them.
        pattern: fits the whole name of a file, with the groups ``case`` and ``part`` (None counts as "image").

    Raises:
        DataProblem: two different files are the same part of a case; copies of one file are taken as one.
    """
    parts: dict[str, dict[str, Path]] = {}
    problems = []
    for root in roots:
        for parent, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            for name in sorted(names):
                match = pattern.fullmatch(name)
                if match is None:
                    continue
                path, part = Path(parent, name), match["part"] or "image"
                first = parts.setdefault(match["case"], {}).setdefault(part, path)
                if first != path and not filecmp.cmp(first, path, shallow=False):
                    problems.append(f"The {part} of '{match['case']}' is {first} and also {path}, which differ.")
    if problems:
        raise DataProblem(numbered("Take one of each pair away:", problems))
    return parts


def scribbled_cases(
    parts: Mapping[str, Mapping[str, Path]], root: Path, scribble: str, dense: str
) -> list[ScribbledFiles]:
    """The cases that have an image and scribbles; the others are counted.

    Args:
        parts: from :func:`find_parts`.
        root: for the message.
        scribble, dense: the names of these parts.

    Raises:
        DataProblem: there is none.
    """
    cases = [
        ScribbledFiles(case, (of["image"],), of[scribble], of.get(dense))
        for case, of in sorted(parts.items())
        if "image" in of and scribble in of
    ]
    if not cases:
        raise DataProblem(
            f"{len(parts)} cases in {root}, none with an image and scribbles. "
            "Expected the files that this script's --help shows."
        )
    rest = sum("image" in of and scribble not in of for of in parts.values())
    alone = sorted(case for case, of in parts.items() if scribble in of and "image" not in of)
    if rest:
        print(f"passed over: {rest} images without scribbles")
    if alone:
        print(f"passed over: scribbles without an image: {', '.join(alone)}")
    return cases


def make_dataset(
    args: argparse.Namespace,
    cases: Sequence[ScribbledFiles],
    channels: Sequence[str],
    legend: Legend,
    patients: Mapping[str, str] | None = None,
) -> int:
    """Make the data set and say how to go on; the exit code."""
    folder, report = import_scribbles(
        cases,
        channels,
        legend,
        args.dataset_id,
        args.name,
        repairs=repairs_of(args),
        overwrite=args.overwrite,
        keep_empty=args.keep_empty,
        allow_outside_body=args.allow_outside_body,
        allow_unregistered=args.allow_unregistered,
        strict=args.strict,
        patients=patients,
        source={"images": str(args.root.resolve())},
    )
    print_report(folder, report, args.dataset_id, channels)
    return 0
