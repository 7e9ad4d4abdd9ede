"""``nnunet_multimodal convert``: labelled images become the raw data set, or prediction channels, of a trainer."""

from __future__ import annotations

import argparse
import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nnunet_multimodal.environment import find_raw_dataset, require_nnunet_path
from nnunet_multimodal.errors import DataProblem, UsageError

if TYPE_CHECKING:
    from nnunet_multimodal.conversion.dataset import Repairs

DESCRIPTION = """\
Make what a trainer needs out of folders of NIfTI images and labels of the same names.

crossmr    target, reference and a scribble per organ, for nnUNetTrainerCrossMR
scribble   the image and a scribble per organ, for nnUNetTrainerScribble
plain      the image alone, for nnUNetTrainer and nnUNetTrainerContrastAug
mixed      images of several modalities with common labels, for nnUNetTrainerMulModSeg
table      which case is CT and which MR, added to a data set that exists, for nnUNetTrainerMulModSeg
channels   a scribbled reference on the grid of new images, as input of nnUNetv2_predict

All input is checked before anything is written. A data set appears in nnUNet_raw whole or not at all; images that
need no repair are linked, not copied."""

EXAMPLE = """\
nnunet_multimodal convert crossmr --reference-images T1 --labels T1_labels -d 601 --label-names liver=1 spleen=2
nnunet_multimodal convert plain --images T1 --labels T1_labels -d 603 --labels-json names.json
nnunet_multimodal convert plain --images CT --labels CT_labels -d 606 --label-map totalsegmentator_ct --modality CT
nnunet_multimodal convert channels --reference T1.nii.gz --scribbles S.nii.gz --targets T2.nii.gz -d 601 -o IN"""

# kind: what it is, the trainer to go on with, the name of the data set unless the user has one
_DATASETS = {
    "crossmr": ("make a data set of target, reference and scribbles", "nnUNetTrainerCrossMR", "CrossMR"),
    "scribble": ("make a data set of image and scribbles", "nnUNetTrainerScribble", "Scribble"),
    "plain": ("make a data set of the image alone", "nnUNetTrainerContrastAug", "Plain"),
}


LABEL_MAP_HELP = (
    "ids of amos, totalsegmentator_ct, totalsegmentator_mr or totalsegmentator_mr_56 become MRSegmentator's organs"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, title="kinds")
    for kind, (what, _, _) in _DATASETS.items():
        subparser = add_kind(kinds, kind, what)
        _add_dataset_arguments(subparser, kind)
    for kind, module in _modules().items():
        module.add_arguments(add_kind(kinds, kind, module.WHAT, module.DESCRIPTION, module.EXAMPLE))
    channels = add_kind(kinds, "channels", "bring a scribbled reference onto the grid of new images")
    _add_channel_arguments(channels)


def _modules() -> dict[str, ModuleType]:
    """The kinds with a module of their own; they use what is here, so they are imported late."""
    from nnunet_multimodal.commands import convert_mixed, convert_table

    return {"mixed": convert_mixed, "table": convert_table}


def add_kind(kinds: Any, name: str, what: str, description: str = "", example: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(
        name,
        help=what,
        description=description or f"{what[0].upper()}{what[1:]}.",
        epilog="example:\n" + textwrap.indent(example, "  ") if example else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return parser


def _add_dataset_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    data = parser.add_argument_group("data")
    flag = "--reference-images" if kind == "crossmr" else "--images"
    data.add_argument(flag, dest="images", type=Path, required=True, metavar="DIR", help="folder of images")
    data.add_argument("--labels", type=Path, required=True, metavar="DIR", help="folder of label maps of these names")
    names = add_label_names(data, default="class_1, class_2, ... for the ids found")
    if kind == "plain":
        names.add_argument("--label-map", metavar="MAP", help=LABEL_MAP_HELP)
    out = parser.add_argument_group("data set")
    out.add_argument("-d", "--dataset-id", type=int, required=True, metavar="ID", help="its number, 1 to 999")
    out.add_argument("--name", default=_DATASETS[kind][2], help="its name (default: %(default)s)")
    out.add_argument("--overwrite", action="store_true", help="replace the data set of this id")
    if kind != "crossmr":
        out.add_argument(
            "--channel-name",
            default="MR" if kind == "scribble" else None,
            metavar="NAME",
            help="of the image; 'CT' makes nnU-Net clip to the CT window (default: MR, or --modality if given)"
            if kind == "plain"
            else "of the image; 'CT' makes nnU-Net clip to the CT window (default: %(default)s)",
        )
    if kind == "plain":
        out.add_argument("--modality", metavar="NAME", help="of all images, for the modality table, e.g. CT")
        out.add_argument(
            "--unnamed-to-background",
            action="store_true",
            help="ids without a name become background, and the named ones are numbered from 1 in their order",
        )
    if kind != "plain":
        drawn = parser.add_argument_group("scribbles")
        drawn.add_argument("--seed", type=natural_number, default=0, help="of the simulation (default: %(default)s)")
        drawn.add_argument("--every", type=int, default=1, metavar="N", help="draw on every n-th slice of an organ")
    add_repairs(parser)


def _add_channel_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--reference", type=Path, required=True, metavar="FILE", help="the scribbled image")
    data.add_argument("--scribbles", type=Path, required=True, metavar="FILE", help="0 none, k organ k, on its grid")
    data.add_argument(
        "--targets", type=Path, required=True, nargs="+", metavar="FILE", help="images to segment, or folders of them"
    )
    data.add_argument("-d", "--dataset", metavar="DATASET", help="data set of the model, for the names of its organs")
    add_label_names(data, default="from -d")
    out = parser.add_argument_group("channels")
    out.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="input folder of nnUNetv2_predict")
    out.add_argument(
        "--dims", type=int, choices=(2, 3), default=2, help="of the model's configuration (default: %(default)s)"
    )
    out.add_argument(
        "--reach",
        type=reach_mm,
        default=0.0,
        metavar="MM",
        help="2d: how far beyond the outer scribbled slices they still serve; inf is everywhere (default: %(default)s)",
    )
    out.add_argument("--overwrite", action="store_true", help="replace files of the same name")
    add_repairs(parser)


def add_label_names(group: Any, default: str) -> Any:
    names = group.add_mutually_exclusive_group()
    names.add_argument(
        "--label-names", type=label_name, nargs="+", metavar="NAME=ID", help=f"organs and ids (default: {default})"
    )
    names.add_argument(
        "--labels-json", type=Path, metavar="FILE", help='the same from a dataset.json or {"liver": 1, ...}'
    )
    return names


def add_repairs(parser: argparse.ArgumentParser) -> None:
    """The options that ``repairs_of`` reads."""
    repairs = parser.add_argument_group("repairs (each only if you ask for it)")
    repairs.add_argument("--nan-to", type=finite_number, metavar="VALUE", help="replace NaN and infinite image voxels")
    repairs.add_argument("--fix-header", action="store_true", help="labels and scribbles take their image's geometry")
    repairs.add_argument("--allow-affine-mismatch", action="store_true", help="accept that headers disagree on place")
    repairs.add_argument("--reorthonormalize", action="store_true", help="straighten sheared direction cosines")


def run(args: argparse.Namespace) -> int:
    module = _modules().get(args.kind)
    if module is not None:
        code: int = module.run(args)
        return code
    return _run_channels(args) if args.kind == "channels" else _run_dataset(args)


def _run_dataset(args: argparse.Namespace) -> int:
    require_nnunet_path("nnUNet_raw")  # before the imports, which take a second
    from nnunet_multimodal.conversion import crossmr

    convert: Callable[..., Path] = getattr(crossmr, f"convert_{args.kind}")
    options: dict[str, Any] = {
        name: getattr(args, name) for name in ("seed", "every", "channel_name", "modality") if hasattr(args, name)
    }
    trainer, names = _DATASETS[args.kind][1], label_names_of(args)
    if getattr(args, "label_map", None) is not None:
        from nnunet_multimodal.conversion.mapped_labels import mapped_labels

        mapped = mapped_labels(args.label_map)
        trainer, names = "nnUNetTrainerMRSegmentator", mapped.declared()
        options |= {"label_ids": mapped.ids(), "channel_name": options["channel_name"] or "CT_or_MR"}
    if getattr(args, "unnamed_to_background", False):
        if getattr(args, "label_map", None) is None:
            names, options["label_ids"] = _numbered_anew(names)
        options["unnamed_to_background"] = True
    folder = convert(
        args.images,
        args.labels,
        args.dataset_id,
        args.name,
        label_names=names,
        repairs=repairs_of(args),
        overwrite=args.overwrite,
        **options,
    )
    print(f"{folder}")
    print(f"Next: nnUNetv2_plan_and_preprocess -d {args.dataset_id} -c 2d --verify_dataset_integrity")
    print(f"      nnUNetv2_train {args.dataset_id} 2d 0 -tr {trainer}")
    return 0


def _numbered_anew(names: Mapping[str, int] | None) -> tuple[dict[str, int], dict[int, int]]:
    """Organs numbered from 1, and the number of each id of the files: nnU-Net takes no gaps."""
    if not names:
        raise UsageError("--unnamed-to-background: which ids have a name? Give --label-names or --labels-json.")
    organs = [name for name, value in names.items() if value]
    numbers = {name: number for number, name in enumerate(organs, start=1)}
    return numbers, {0: 0, **{names[name]: number for name, number in numbers.items()}}


def _slice_axis(dataset: str | None) -> int | None:
    """Along which axis of [Z, Y, X] the data set's 2d plans take slices; None if it is not planned here."""
    preprocessed = os.environ.get("nnUNet_preprocessed")
    if dataset is None or not preprocessed:
        return None
    name = find_raw_dataset(dataset).name
    for path in sorted(Path(preprocessed, name).glob("*.json")):
        axes = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(axes, dict) and "transpose_forward" in axes:
            return int(axes["transpose_forward"][0])
    return None


def _run_channels(args: argparse.Namespace) -> int:
    organs = _organs(args)
    from nnunet_multimodal.conversion.channels import prepare_channels
    from nnunet_multimodal.conversion.dataset import find_files

    targets: list[Path] = []
    for path in args.targets:
        targets += find_files(path, "target").values() if path.is_dir() else [path]
    written = prepare_channels(
        args.reference,
        args.scribbles,
        targets,
        organs,
        args.output,
        configuration_dims=args.dims,
        reach=args.reach,
        repairs=repairs_of(args),
        overwrite=args.overwrite,
        slice_axis=_slice_axis(args.dataset),
    )
    print(f"{len(written)} files for {len(targets)} targets in {args.output}")
    configuration = "2d" if args.dims == 2 else "3d_fullres"
    dataset = args.dataset or "DATASET"
    print(f"Next: nnUNetv2_predict -i {args.output} -o OUT -d {dataset} -c {configuration} -tr nnUNetTrainerCrossMR")
    return 0


def label_names_of(args: argparse.Namespace) -> dict[str, int] | None:
    from nnunet_multimodal.conversion.dataset import labels_from_json

    if args.labels_json is not None:
        return labels_from_json(args.labels_json)
    if args.label_names is None:
        return None
    names = [name for name, _ in args.label_names]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UsageError(f"--label-names has {sorted(twice)[0]} more than once.")
    return dict(args.label_names)


def _organs(args: argparse.Namespace) -> dict[str, int]:
    """The organs in the order of the model's scribble channels."""
    from nnunet_multimodal.conversion.dataset import declared_labels, labels_from_json, organs_of

    names = label_names_of(args)
    if names is None:
        if args.dataset is None:
            raise UsageError("Which organs? Give -d with the data set of the model, or --label-names.")
        names = labels_from_json(find_raw_dataset(args.dataset) / "dataset.json")
    organs = organs_of(declared_labels(names))
    if not organs:
        raise DataProblem("No organ is declared, so there is nothing to scribble.")
    return organs


def repairs_of(args: argparse.Namespace) -> Repairs:
    """What the user allows to be put right."""
    from nnunet_multimodal.conversion.dataset import Repairs

    return Repairs(args.nan_to, args.fix_header, args.allow_affine_mismatch, args.reorthonormalize)


# --- types of arguments ----------------------------------------------------------------------------------------------


def label_name(text: str) -> tuple[str, int]:
    """``liver=1``"""
    name, separator, value = text.rpartition("=")
    if not (separator and name.strip() and value.strip().isdecimal()):
        raise argparse.ArgumentTypeError(f"expected NAME=ID such as liver=1, found {text!r}")
    return name.strip(), int(value)


def natural_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected 0 or a positive whole number, found {text!r}")
    return int(text)


def finite_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}")
    return value


def reach_mm(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected millimetres from 0 on, or inf, found {text!r}")
    return value
