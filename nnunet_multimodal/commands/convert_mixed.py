"""``nnunet_multimodal convert mixed``: folders of CT and folders of MR become one data set with common labels."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_multimodal.commands.convert import LABEL_MAP_HELP, add_repairs, repairs_of
from nnunet_multimodal.commands.convert_table import name_list
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import UsageError

if TYPE_CHECKING:
    from nnunet_multimodal.conversion.mapped_labels import MappedLabels

WHAT = "make one data set with common labels out of images of several modalities"

DESCRIPTION = """\
Make one data set out of folders of two or more modalities, with common labels and the modality table.

Each modality has its own folders, and its own label ids where they differ:
  --label-names CT:spleen=1 CT:liver=5 MR:liver=1 MR:spleen=4    or  --labels-json CT=ct.json MR=mr.json
  --label-names liver=1 spleen=2     (all label files are alike)  or  --labels-json both.json
Those of AMOS and TotalSegmentator are known: --label-map CT=totalsegmentator_ct MR=totalsegmentator_mr gives
MRSegmentator's 40 organs (lobes become lungs, vertebrae the spine). total_mr had 56 classes once, with other ids:
totalsegmentator_mr_56.
The data set gets the organs that all modalities have, or those of --organs, numbered from 1 in that order; all other
organs become background. Training alternates in the order of --images.
With --partial it gets the organs that any of them has, and says which case is annotated for which: for
nnUNetTrainerContextPrior, which teaches nothing of an organ where nobody labelled it. Data sets of one modality with
other organs get a name: --images CT/lits=DIR CT/spleens=DIR."""

EXAMPLE = """\
nnunet_multimodal convert mixed -d 602 --images CT=ct/images MR=mr/images --labels CT=ct/labels MR=mr/labels \\
    --labels-json CT=ct/names.json MR=mr/names.json --organs liver,spleen,right_kidney,left_kidney"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--images", type=named_path, nargs="+", required=True, metavar="NAME=DIR", help="folder of images of a modality"
    )
    data.add_argument(
        "--labels", type=named_path, nargs="+", required=True, metavar="NAME=DIR", help="its label maps of these names"
    )
    names = data.add_mutually_exclusive_group()
    names.add_argument(
        "--label-names", nargs="+", metavar="[NAME:]ORGAN=ID", help="organs and ids, of one modality or of all"
    )
    names.add_argument("--labels-json", nargs="+", metavar="[NAME=]FILE", help="the same from JSON files")
    data.add_argument("--label-map", type=named_map, nargs="+", default=[], metavar="NAME=MAP", help=LABEL_MAP_HELP)
    data.add_argument("--organs", type=name_list, metavar="A,B,...", help="organs of the data set, in this order")
    data.add_argument(
        "--partial", action="store_true", help="keep organs that only some label; case_labels says where they are"
    )
    data.add_argument(
        "--unnamed-to-background",
        action="store_true",
        help="ids in label files that no name is given for are background, not an error",
    )
    data.add_argument(
        "--patient-pattern",
        metavar="REGEX",
        help="its group, or all that it matches, in a file's name is the patient; the same in all modalities",
    )
    out = parser.add_argument_group("data set")
    out.add_argument("-d", "--dataset-id", type=int, required=True, metavar="ID", help="its number, 1 to 999")
    out.add_argument("--name", default="Mixed", help="its name (default: %(default)s)")
    out.add_argument("--overwrite", action="store_true", help="replace the data set of this id")
    out.add_argument(
        "--harmonise",
        choices=("paper",),  # conversion.harmonise.METHODS, which takes numpy to import
        help="store CT clipped to [-275, 125] HU, others to their 0.5 and 99.5 percentiles, both as 0 to 1",
    )
    out.add_argument("--strict", action="store_true", help="an image that does not look like its modality is an error")
    add_repairs(parser)


def run(args: argparse.Namespace) -> int:
    images, labels = _by_name(args.images, "--images"), _by_name(args.labels, "--labels")
    if images.keys() != labels.keys():
        raise UsageError(
            f"--images has {', '.join(images)}, --labels has {', '.join(labels)}; expected the same names."
        )
    require_nnunet_path("nnUNet_raw")  # before the imports, which take a second
    from nnunet_multimodal.conversion.dataset import find_cases
    from nnunet_multimodal.conversion.mixed import Source, convert_mixed
    from nnunet_multimodal.conversion.table import match_patients

    maps = _maps_by_modality(args.label_map, [*images])
    organs = _organs_by_modality(args, [*images], maps)
    sources = []
    for modality, folder in images.items():
        cases = find_cases(folder, labels[modality])
        names = [files.case for files in cases]
        patients = match_patients(names, args.patient_pattern) if args.patient_pattern else {}
        further = maps[modality].further if modality in maps else {}
        kind, _, title = modality.partition("/")
        sources.append(Source(kind, cases, organs[modality], patients, further, title))
    wanted = {name: index for index, name in enumerate(args.organs, start=1)} if args.organs else None
    folder = convert_mixed(
        sources,
        args.dataset_id,
        args.name,
        wanted,
        harmonise=args.harmonise,
        repairs=repairs_of(args),
        overwrite=args.overwrite,
        unnamed_to_background=args.unnamed_to_background,
        strict=args.strict,
        partial=args.partial,
    )
    print(folder)
    people = {patient for source in sources for patient in source.patients.values()}
    print(
        ", ".join(f"{len(source.cases)} {source.title}" for source in sources)
        + (f"; {len(people)} patients" if people else "")
    )
    print(f"Next: nnUNetv2_plan_and_preprocess -d {args.dataset_id} -c 2d --verify_dataset_integrity")
    trainer = "nnUNetTrainerContextPrior" if args.partial else "nnUNetTrainerMulModSeg"
    print(f"      nnUNetv2_train {args.dataset_id} 2d 0 -tr {trainer}")
    return 0


def _maps_by_modality(pairs: Sequence[tuple[str, str]], modalities: Sequence[str]) -> dict[str, MappedLabels]:
    from nnunet_multimodal.conversion.mapped_labels import mapped_labels

    maps: dict[str, MappedLabels] = {}
    for modality, name in pairs:
        if modality not in modalities:
            raise UsageError(f"--label-map {modality}={name}: the modalities are {', '.join(modalities)}.")
        if modality in maps:
            raise UsageError(f"--label-map has {modality} more than once.")
        maps[modality] = mapped_labels(name)
    return maps


def _organs_by_modality(
    args: argparse.Namespace, modalities: Sequence[str], maps: Mapping[str, MappedLabels]
) -> dict[str, dict[str, int]]:
    """Organ -> id of each modality's files, from --label-names, --labels-json or --label-map; without background."""
    from nnunet_multimodal.commands.convert import label_name
    from nnunet_multimodal.conversion.dataset import labels_from_json

    organs: dict[str, dict[str, int]] = {
        modality: dict(maps[modality].labels) if modality in maps else {} for modality in modalities
    }
    named = [modality for modality in modalities if modality not in maps]
    option = "--label-names" if args.label_names else "--labels-json"
    for text in args.label_names or args.labels_json or []:
        chosen, rest = _of_modality(text, ":" if args.label_names else "=", modalities, named)
        if args.label_names:
            try:
                found = dict([label_name(rest)])
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"--label-names: {error}") from error
        else:
            found = labels_from_json(Path(rest))
        for modality in chosen:
            if modality in maps:
                raise UsageError(f"{modality} has a --label-map, which names its organs; leave {option} {text} out.")
            twice = sorted(organs[modality].keys() & found.keys())
            if twice:
                raise UsageError(f"{option} has {twice[0]} of {modality} more than once.")
            organs[modality] |= {name: value for name, value in found.items() if (name, value) != ("background", 0)}
    nameless = [modality for modality in modalities if not organs[modality]]
    if nameless:
        given = option if args.label_names or args.labels_json else "--label-map" if maps else None
        said = f"{given} names no organ" if given else "nothing names an organ"
        raise UsageError(f"{said} of {', '.join(nameless)}. Give --label-names, --labels-json or --label-map.")
    return organs


def _of_modality(
    text: str, separator: str, modalities: Sequence[str], rest: Sequence[str]
) -> tuple[Sequence[str], str]:
    """``CT:liver=5`` is of CT alone, or of CT/lits and CT/spleens; what no modality begins is of all the ``rest``.

    Raises:
        UsageError: an organ's name has a colon: a modality was meant, which is none.
    """
    name, found, after = text.partition(separator)
    chosen = [each for each in modalities if each == name] or [each for each in rest if each.startswith(f"{name}/")]
    if found and chosen:
        return chosen, after
    if found and separator == ":":
        raise UsageError(f"--label-names {text}: {name} is none of {', '.join(modalities)}.")
    return rest, text


def _by_name(pairs: Sequence[tuple[str, Path]], option: str) -> Mapping[str, Path]:
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"{option} has {twice[0]} more than once; folders within a folder are read too.")
    return dict(pairs)


def named_map(text: str) -> tuple[str, str]:
    """``CT=totalsegmentator_ct``"""
    name, separator, label_map = text.partition("=")
    if not (separator and name.strip() and label_map.strip()):
        raise argparse.ArgumentTypeError(f"expected NAME=MAP such as CT=totalsegmentator_ct, found {text!r}")
    return name.strip(), label_map.strip()


def named_path(text: str) -> tuple[str, Path]:
    """``CT=/data/ct``"""
    name, separator, path = text.partition("=")
    if not (separator and name.strip() and path):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR such as CT=/data/ct/images, found {text!r}")
    return name.strip(), Path(path)
