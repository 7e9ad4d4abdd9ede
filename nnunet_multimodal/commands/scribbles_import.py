"""``nnunet_multimodal scribbles import``: images and what was drawn on them become a raw data set with ignore label."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_multimodal.commands.convert import add_repairs, natural_number, repairs_of
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

Or one mask per class and case: --scribbles liver=DIR spleen=DIR background=DIR. Dense labels then have 1 for the first
class, and so on.

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
    data.add_argument(
        "--scribbles", nargs="+", required=True, metavar="[NAME=]DIR", help="folder of scribble files; or of each class"
    )
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
    add_class_names(data)
    data.add_argument(
        "--unnamed-to-background",
        action="store_true",
        help="values that no name is given for are background, in scribbles and dense labels, not an error",
    )
    data.add_argument(
        "--dense",
        type=Path,
        metavar="DIR",
        help="dense label maps of all or some cases; they judge, nothing learns them",
    )
    data.add_argument(
        "--patient-pattern",
        metavar="REGEX",
        help="its group, or all that it matches, in a case's name is the patient, who is never split (one channel)",
    )
    add_dataset_arguments(parser, "Scribbled")
    add_checks(parser)
    add_repairs(parser)


def add_class_names(group: Any) -> None:
    """The options that ``class_names_of`` reads."""
    names = group.add_mutually_exclusive_group()
    names.add_argument(
        "--label-names",
        type=class_values,
        nargs="+",
        metavar="NAME=ID[,ID...]",
        help="classes and their values, several for one that is merged (default: class_1, ... for the values found)",
    )
    names.add_argument(
        "--labels-json", type=Path, metavar="FILE", help='the same from a dataset.json or {"liver": 1, ...}'
    )


def class_values(text: str) -> tuple[str, tuple[int, ...]]:
    """``tumour=1,2,3``"""
    name, separator, values = text.rpartition("=")
    ids = [value.strip() for value in values.split(",")]
    if not (separator and name.strip() and all(value.isdecimal() for value in ids)):
        raise argparse.ArgumentTypeError(f"expected NAME=ID such as liver=1 or tumour=1,2,3, found {text!r}")
    return name.strip(), tuple(dict.fromkeys(map(int, ids)))


def class_names_of(args: argparse.Namespace) -> dict[str, tuple[int, ...]] | None:
    """Name -> values, in order of the values; ``background`` and ``ignore`` among them if the user named them."""
    if args.labels_json is not None:
        from nnunet_multimodal.conversion.dataset import labels_from_json

        named = [(name, (value,)) for name, value in labels_from_json(args.labels_json).items()]
    elif args.label_names is not None:
        named = args.label_names
    else:
        return None
    classes = dict(named)
    if len(classes) < len(named):
        names = [name for name, _ in named]
        raise UsageError(f"--label-names has {next(name for name in names if names.count(name) > 1)} more than once.")
    every = [value for values in classes.values() for value in values]
    twice = sorted({value for value in every if every.count(value) > 1})
    if twice:
        names = [name for name, values in classes.items() if twice[0] in values]
        raise UsageError(f"Label ids must differ, found {twice[0]} for {', '.join(names)}.")
    return dict(sorted(classes.items(), key=lambda pair: min(pair[1])))


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


def add_checks(parser: argparse.ArgumentParser, drawn_by_hand: bool = True) -> None:
    checks = parser.add_argument_group("checks")
    checks.add_argument("--keep-empty", action="store_true", help="keep cases that nobody drew on, too")
    checks.add_argument("--allow-unregistered", action="store_true", help="channels may show different bodies")
    if drawn_by_hand:
        checks.add_argument("--allow-outside-body", action="store_true", help="classes may be drawn in the air")
    checks.add_argument(
        "--strict", action="store_true", help="an image that does not look like its channel is an error"
    )


def run(args: argparse.Namespace) -> int:
    channels = named_folders(args.images, args.channel_name, "--images")
    require_nnunet_path("nnUNet_raw")  # before the imports, which take a second
    from nnunet_multimodal.conversion.scribble_dataset import find_scribbled_cases, import_scribbles
    from nnunet_multimodal.conversion.table import match_patients

    with _label_maps(args) as (scribbles, legend):
        cases = find_scribbled_cases(channels, scribbles, args.dense)
        folder, report = import_scribbles(
            cases,
            [*channels],
            legend,
            args.dataset_id,
            args.name,
            repairs=repairs_of(args),
            overwrite=args.overwrite,
            keep_empty=args.keep_empty,
            allow_outside_body=args.allow_outside_body,
            allow_unregistered=args.allow_unregistered,
            strict=args.strict,
            patients=match_patients([files.case for files in cases], args.patient_pattern)
            if args.patient_pattern
            else None,
            source={
                "images": {name: str(path.resolve()) for name, path in channels.items()},
                "scribbles": args.scribbles,
                **({"dense": str(args.dense.resolve())} if args.dense else {}),
            },
        )
    print_report(folder, report, args.dataset_id, [*channels])
    return 0


def named_folders(words: list[str], name: str, option: str) -> dict[str, Path]:
    """Name -> folder, of ``DIR`` (which is ``name``'s) or ``CT=DIR MR=DIR``."""
    if len(words) == 1 and ("=" not in words[0] or Path(words[0]).is_dir()):
        return {name: Path(words[0])}
    folders: dict[str, Path] = {}
    for word in words:
        key, separator, path = word.partition("=")
        if not (separator and key and path):
            raise UsageError(f"{option}: expected one folder, or NAME=DIR for each, found {word!r}.")
        if key in folders:
            raise UsageError(f"{option} has {key} more than once; folders within a folder are read too.")
        folders[key] = Path(path)
    return folders


@contextlib.contextmanager
def _label_maps(args: argparse.Namespace) -> Iterator[tuple[Path, Legend]]:
    """The folder of the user's label maps, or one of those that are made of a folder per class; what they mean."""
    folders = named_folders(args.scribbles, "", "--scribbles")
    if "" in folders:
        yield folders[""], _legend(args)
        return
    from nnunet_multimodal.conversion.class_masks import combine_class_masks

    for option in ("unlabelled", "label_names", "labels_json"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')} is for label maps; here the folders name the classes.")
    if "background" not in folders and not args.no_background:
        raise UsageError("Which folder has the drawn background? Pass background=DIR, too, or --no-background.")
    with tempfile.TemporaryDirectory(dir=require_nnunet_path("nnUNet_raw"), prefix=".scribbles-") as temporary:
        yield Path(temporary), combine_class_masks(folders, Path(temporary))


def _legend(args: argparse.Namespace) -> Legend:
    from nnunet_multimodal.conversion.scribble_dataset import Legend

    classes, unlabelled = class_names_of(args), args.unlabelled
    if classes is not None:
        named = classes.pop("ignore", None)
        if named is not None and unlabelled is not None and named != (unlabelled,):
            raise UsageError(f"--unlabelled is {unlabelled}, but the label names have ignore={named[0]}.")
        unlabelled = named[0] if named is not None else unlabelled
        drawn = classes.pop("background", (args.background_label,))
        if drawn != (args.background_label,):
            raise UsageError(
                f"--background-label is {args.background_label}, but the label names have background={drawn[0]}."
            )
        if not classes:
            raise UsageError("The label names hold no class.")
    if unlabelled is None:
        raise UsageError("Which value means that nobody drew there? Pass it as --unlabelled N, e.g. 4, 255 or 0.")
    background = None if args.no_background else args.background_label
    return Legend(unlabelled, background, classes, unnamed_to_background=args.unnamed_to_background)


def print_report(folder: Path, report: Mapping[str, Any], dataset_id: int, channels: Sequence[str]) -> None:
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
    paired = len(channels) > 1
    configuration, trainer = ("3d_fullres", "nnUNetTrainerCmFNet") if paired else ("2d", "nnUNetTrainerPartialCE_CRF")
    steps = [
        f"nnUNetv2_plan_and_preprocess -d {dataset_id} -c {configuration} --verify_dataset_integrity",
        f"nnUNetv2_train {dataset_id} {configuration} 0 -tr {trainer}",
    ]
    if any(name.casefold() == "ct" for name in channels):  # nnU-Net's own statistics count what nobody drew on
        steps.insert(0, f"nnunet_multimodal scribbles fingerprint -d {dataset_id}")
    print("Next: " + "\n      ".join(steps))
