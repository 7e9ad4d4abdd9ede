"""``nnunet_multimodal scribbles import``: images and what was drawn on them become a raw data set with ignore label."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_multimodal.commands.convert import add_label_names, add_repairs, label_names_of, natural_number, repairs_of
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import UsageError

if TYPE_CHECKING:
    from nnunet_multimodal.conversion.scribble_dataset import Legend

WHAT = "make a data set of images and scribbles, with nnU-Net's ignore label"

DESCRIPTION = """\
Make a data set that is trained from scribbles alone: background 0, classes 1..K, and `ignore` K+1 where nobody drew.

Scribble files are label maps on the grid of their image, named as the case is. Draw the background, too: without that,
everything becomes foreground. Which value means what:
  --unlabelled 4                         0 drawn background, 1-3 drawn classes, 4 nobody drew (WSL4MIS, ACDC scribbles)
  --unlabelled 255                       the same with 255
  --unlabelled 0 --background-label 9    nobody drew where there is 0, and 9 was drawn for background (ITK-SNAP)

Several channels of one case, on one grid: --images CT=ct MR=mr (files CASE.nii.gz), or FLAIR=images T1c=images (files
CASE_Flair.nii.gz, CASE_T1c.nii.gz). How much of each class is drawn is printed and written to coverage.json."""

EXAMPLE = """\
nnunet_multimodal scribbles import --images images --scribbles scribbles --unlabelled 4 -d 603 --name Cardiac \\
    --label-names right_ventricle=1 myocardium=2 left_ventricle=3 --dense labels"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="[NAME=]DIR",
        help="folder of images; of each channel, with its name",
    )
    data.add_argument("--scribbles", type=Path, required=True, metavar="DIR", help="folder of scribble files")
    data.add_argument(
        "--unlabelled",
        type=natural_number,
        metavar="N",
        help="value where nobody drew (default: `ignore` of the names)",
    )
    background = data.add_mutually_exclusive_group()
    background.add_argument(
        "--background-label",
        type=natural_number,
        default=0,
        metavar="N",
        help="value of drawn background (%(default)s)",
    )
    background.add_argument("--no-background", action="store_true", help="nobody drew background; rarely goes well")
    add_label_names(data, default="class_1, class_2, ... for the values found")
    data.add_argument(
        "--dense",
        type=Path,
        metavar="DIR",
        help="dense label maps of all or some cases; they judge, nothing learns them",
    )
    add_dataset_arguments(parser, "Scribbled")
    add_checks(parser)
    add_repairs(parser)


def add_dataset_arguments(parser: argparse.ArgumentParser, name: str, required: bool = True) -> None:
    out = parser.add_argument_group("data set")
    out.add_argument("-d", "--dataset-id", type=int, required=required, metavar="ID", help="its number, 1 to 999")
    out.add_argument("--name", default=name, help="its name (default: %(default)s)")
    out.add_argument(
        "--channel-name",
        default="MR",
        metavar="NAME",
        help="of a single image; 'CT' makes nnU-Net clip to the CT window, right for CT (default: %(default)s)",
    )
    out.add_argument("--overwrite", action="store_true", help="replace the data set of this id")


def add_checks(parser: argparse.ArgumentParser) -> None:
    checks = parser.add_argument_group("checks")
    checks.add_argument("--keep-empty", action="store_true", help="keep cases that nobody drew on, too")
    checks.add_argument("--allow-outside-body", action="store_true", help="classes may be drawn in the air")
    checks.add_argument(
        "--strict", action="store_true", help="an image that does not look like its channel is an error"
    )


def run(args: argparse.Namespace) -> int:
    folders = channel_folders(args.images, args.channel_name)
    require_nnunet_path("nnUNet_raw")  # before the imports, which take a second
    from nnunet_multimodal.conversion.scribble_dataset import find_scribbled_cases, import_scribbles

    legend = _legend(args)
    cases = find_scribbled_cases(folders, args.scribbles, args.dense)
    folder, report = import_scribbles(
        cases,
        [*folders],
        legend,
        args.dataset_id,
        args.name,
        repairs=repairs_of(args),
        overwrite=args.overwrite,
        keep_empty=args.keep_empty,
        allow_outside_body=args.allow_outside_body,
        strict=args.strict,
        source={
            "images": {name: str(path.resolve()) for name, path in folders.items()},
            "scribbles": str(args.scribbles.resolve()),
            **({"dense": str(args.dense.resolve())} if args.dense else {}),
        },
    )
    print_report(folder, report, args.dataset_id, len(folders))
    return 0


def channel_folders(words: list[str], channel_name: str) -> dict[str, Path]:
    """Channel -> folder, of ``DIR`` or ``CT=DIR MR=DIR``."""
    if len(words) == 1 and ("=" not in words[0] or Path(words[0]).is_dir()):
        return {channel_name: Path(words[0])}
    folders: dict[str, Path] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if not (separator and name and path):
            raise UsageError(f"--images: expected a folder, or NAME=DIR for each channel, found {word!r}.")
        if name in folders:
            raise UsageError(f"--images has {name} more than once; folders within a folder are read too.")
        folders[name] = Path(path)
    return folders


def _legend(args: argparse.Namespace) -> Legend:
    from nnunet_multimodal.conversion.scribble_dataset import Legend

    names = label_names_of(args)
    unlabelled = args.unlabelled
    if names is not None:
        names = dict(names)
        ignore = names.pop("ignore", None)
        if ignore is not None and unlabelled not in (None, ignore):
            raise UsageError(f"--unlabelled is {unlabelled}, but the label names have ignore={ignore}.")
        unlabelled = ignore if unlabelled is None else unlabelled
        drawn = names.pop("background", args.background_label)
        if drawn != args.background_label:
            raise UsageError(
                f"--background-label is {args.background_label}, but the label names have background={drawn}."
            )
        twice = sorted({value for value in names.values() if [*names.values()].count(value) > 1})
        if twice:
            raise UsageError(f"Label ids must differ, found {twice[0]} more than once.")
    if unlabelled is None:
        raise UsageError("Which value means that nobody drew there? Pass it as --unlabelled N, e.g. 4, 255 or 0.")
    return Legend(unlabelled, None if args.no_background else args.background_label, names)


def print_report(folder: Path, report: Mapping[str, Any], dataset_id: int, channels: int) -> None:
    """The folder, the coverage of each class, and how to go on."""
    print(folder)
    for name, shares in report["classes"].items():
        line = f"{name}: {shares['voxels']} voxels drawn, {shares['of_all']:.3%} of all"
        if shares.get("of_class") is not None:
            line += f", {shares['of_class']:.1%} of the class"
        if shares.get("right") is not None:
            line += f"; {shares['right']:.1%} of them as in the dense labels"
        print(line)
    print(f"{len(report['cases'])} cases; shares per case: {folder / 'coverage.json'}")
    configuration, trainer = (
        ("2d", "nnUNetTrainerPartialCE") if channels == 1 else ("3d_fullres", "nnUNetTrainerCmFNet")
    )
    print(f"Next: nnUNetv2_plan_and_preprocess -d {dataset_id} -c {configuration} --verify_dataset_integrity")
    print(f"      nnUNetv2_train {dataset_id} {configuration} 0 -tr {trainer}")
