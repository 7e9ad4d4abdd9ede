"""``nnunet_multimodal evaluate``: predictions against references, per case, organ and modality."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nnunet_multimodal.commands import evaluate_shift
from nnunet_multimodal.commands.convert import natural_number
from nnunet_multimodal.errors import UsageError

DESCRIPTION = f"""\
Measure predictions: DSC, NSD, HD95 and ASD of each case, organ and modality.

PRED and REF are folders (a case is the path in the folder, without .nii.gz) or two files. OUT gets cases.csv,
summary.csv, evaluation.json and report.html. An organ that is missed has DSC and NSD 0, and its distances are counted
as undefined. A prediction that is missing or cannot be used (damaged, on another grid, no whole numbers) counts as an
empty one; a case whose reference cannot be used is not in any mean. All of these are listed, and the command ends
with 1. An organ that a reference does not annotate ("case_labels" of the references' dataset.json, or of --case-labels)
is in no mean and counted as such. Organs that come in a left and a right are checked in the predictions: exchanged,
astray, in pieces, of very different volumes.

Several models: --compare NAME=DIR adds further folders of predictions for the same REF. OUT/NAME then holds each one's
own evaluation, and OUT comparison.csv, significance.csv, comparison.json and comparison.html: means side by side, box
plots, and Wilcoxon's paired test of each two models, over all organs and organ by organ (Holm's correction).

{evaluate_shift.DESCRIPTION}"""

EXAMPLE = f"""\
nnunet_multimodal evaluate PREDICTIONS labelsTs -o RESULTS
nnunet_multimodal evaluate PREDICTIONS labels -o RESULTS --label-names liver=1 kidneys=2,3 --tolerance 2 liver=3 \\
    --modality-pattern '^(?P<modality>[^/]+)/' --in-distribution T1w
nnunet_multimodal evaluate OURS labelsTs -o RESULTS --name ours --compare stock=STOCK --below 0.7
{evaluate_shift.EXAMPLE}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prediction", type=Path, metavar="PRED", help="label maps to measure: a folder or a file")
    reference = parser.add_argument(
        "reference", type=Path, metavar="REF", help="the true label maps: a folder or a file; with --shift REF alone"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    labels = parser.add_argument_group(
        "labels (default: dataset.json in PRED, in REF or beside it; else class_1, ... as found in REF)"
    ).add_mutually_exclusive_group()
    labels.add_argument(
        "--labels-json", type=Path, metavar="FILE", help='a dataset.json or {"liver": 1, "kidneys": [2, 3]}'
    )
    labels.add_argument(
        "--label-names", type=_name_and_ids, nargs="+", metavar="NAME=ID", help="or NAME=ID,ID for a region; ignore=ID"
    )
    parser.add_argument(
        "--case-labels",
        metavar="FILE",
        help='a dataset.json with "case_labels", or {"case_001": ["liver"], ...}: organs that the references annotate, '
        "of cases that lack some; or 'none' (default: the references' dataset.json)",
    )
    models = parser.add_argument_group("several models")
    models.add_argument(
        "--compare",
        type=_named_folder,
        nargs="+",
        default=[],
        metavar="NAME=DIR",
        help="further folders of predictions",
    )
    models.add_argument("--name", metavar="NAME", help="of PRED beside them (default: its folder's)")
    evaluate_shift.add_arguments(parser, reference)
    how = parser.add_argument_group("measures")
    how.add_argument(
        "--tolerance", nargs="+", default=["2"], metavar="MM", help="of NSD; NAME=MM for single organs (default: 2)"
    )
    how.add_argument(
        "--surface",
        choices=("border", "area"),
        default="border",
        help="border: surface voxels, as MONAI; area: by mm², as surface-distance (default: %(default)s)",
    )
    how.add_argument(
        "--distance-when-missed", type=_distance, metavar="MM", help="HD95 and ASD of a missed organ, or 'diagonal'"
    )
    how.add_argument("--below", type=_dice, metavar="DSC", help="count the cases with a lower DSC, such as 0.7")
    how.add_argument(
        "--resample-to-reference", action="store_true", help="bring predictions onto another grid by nearest neighbour"
    )
    modality = parser.add_argument_group("modalities (default: the modality table in dataset.json)")
    modality.add_argument(
        "--modality-pattern", metavar="REGEX", help="searched in the case; its group 'modality' is the modality"
    )
    modality.add_argument("--modality-map", type=Path, metavar="FILE", help='JSON: {"case_001": "T1w", ...}')
    modality.add_argument(
        "--in-distribution", nargs="+", default=[], metavar="NAME", help="modalities that were seen in training"
    )
    more = parser.add_argument_group("report and speed")
    more.add_argument("--images", type=Path, metavar="DIR", help="images with the cases' names, for the pictures")
    more.add_argument("--no-report", action="store_true", help="write no report.html")
    more.add_argument("-j", "--jobs", type=natural_number, default=2, metavar="N", help="processes (%(default)s)")


def run(args: argparse.Namespace) -> int:
    evaluate_shift.check_options(args)
    from nnunet_multimodal.evaluation.compare import evaluate_models
    from nnunet_multimodal.evaluation.evaluate import evaluate_folders
    from nnunet_multimodal.evaluation.labels import labels_from, labels_from_file, read_json
    from nnunet_multimodal.evaluation.terminal import describe, describe_comparison

    labels = None
    if args.labels_json is not None:
        labels = labels_from_file(args.labels_json)
    elif args.label_names is not None:
        labels = labels_from(_unique(args.label_names, "--label-names"), "--label-names")
    tolerance, tolerances = _tolerances(args.tolerance)
    modality_map: dict[str, Any] | None = None
    if args.modality_map is not None:
        modality_map = read_json(args.modality_map)
        if not all(isinstance(value, str) for value in modality_map.values()):
            raise UsageError(f'{args.modality_map} must map cases to modalities: {{"case_001": "T1w", ...}}.')
    options = {
        "tolerance": tolerance,
        "tolerances": tolerances,
        "surface": args.surface,
        "case_labels": args.case_labels,
        "modality_map": modality_map,
        "modality_pattern": args.modality_pattern,
        "in_distribution": args.in_distribution,
        "distance_when_missed": args.distance_when_missed,
        "resample_to_reference": args.resample_to_reference,
        "below": args.below,
        "images": args.images,
        "report": not args.no_report,
        "jobs": args.jobs,
    }
    if args.shift is not None:
        return evaluate_shift.run(args, labels, options)
    if args.name is not None and not args.compare:
        raise UsageError("--name is of PRED beside others: give --compare, too.")
    if args.compare:
        models = _unique([(args.name or args.prediction.resolve().name, args.prediction), *args.compare], "--compare")
        content = evaluate_models(models, args.reference, args.output, labels, **options)
        table, problems = describe_comparison(content)
        contents = [*content["models"].values()]
        names = ("comparison.json", "comparison.html")
    else:
        content = evaluate_folders(args.prediction, args.reference, args.output, labels, **options)
        table, problems = describe(content)
        contents, names = [content], ("evaluation.json", "report.html")
    print(table)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(args.output / names[not args.no_report])
    return int(any(each["missing_predictions"] or each["without_reference"] or each["failed"] for each in contents))


def _named_folder(text: str) -> tuple[str, Path]:
    """``stock=PREDICTIONS``"""
    name, equals, folder = text.partition("=")
    if not name or not equals or not folder:
        raise argparse.ArgumentTypeError(f"'{text}': expected NAME=DIR, such as stock=PREDICTIONS")
    return name, Path(folder)


def _dice(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a DSC above 0, at most 1")
    return value


def _name_and_ids(text: str) -> tuple[str, int | list[int]]:
    """``liver=1`` or ``kidneys=2,3``."""
    name, equals, value = text.rpartition("=")
    try:
        ids = [natural_number(part) for part in value.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        ids = []
    if not name or not equals or not ids:
        raise argparse.ArgumentTypeError(f"'{text}': expected NAME=ID, such as liver=1, or NAME=ID,ID")
    return name, ids[0] if len(ids) == 1 else ids


def _distance(text: str) -> float | str:
    if text == "diagonal":
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}': expected millimetres, 0 or more, or 'diagonal'")
    return value


def _tolerances(words: list[str]) -> tuple[float, dict[str, float]]:
    """``["2", "liver=3"]`` -> 2, {"liver": 3}."""
    default, pairs = 2.0, []
    for word in words:
        name, equals, value = word.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number < float("inf") or (equals and not name):
            raise UsageError(f"--tolerance {word}: expected MM or NAME=MM, 0 mm or more.")
        if equals:
            pairs.append((name, number))
        else:
            default = number
    return default, _unique(pairs, "--tolerance")


def _unique(pairs: list[tuple[str, Any]], option: str) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{option} has {twice[0]} more than once.")
    return dict(pairs)
