"""TotalSegmentator's CT and MR (https://doi.org/10.5281/zenodo.10047292 and 14710732), mixed.

Expects two folders: of the CT data set with sXXXX/ct.nii.gz, of the MR data set with sXXXX/mri.nii.gz, both with
sXXXX/segmentations/<organ>.nii.gz, one mask per organ, and meta.csv, which says which cases are for the official test;
these are left out unless --split all. Organs are called as their files; without --organs, all that CT and MR both have
(lung lobes and single vertebrae, which MR has not, are not joined to its lungs and vertebrae).

The masks become one label map. Where they overlap, the organ with fewer voxels in that case gets the voxel, and the
number of such voxels is reported. A mask that is missing is an error; an empty mask is an organ that is not there. In
some 50 MR cases all masks are empty; --skip-empty leaves out the cases without any of the organs.

    python dataset_conversion/totalsegmentator.py Totalsegmentator_dataset_v201 TotalsegmentatorMRI_dataset_v200 \\
        -o totalseg --organs spleen kidney_right kidney_left liver pancreas -d 607

Where this comes from: folders, names and meta.csv (semicolons, columns image_id and split), TotalSegmentator's
resources/convert_dataset_to_nnunet.py and its issue 511 (splits of CT and MR, empty masks); mri.nii.gz, nnunetv2's
Dataset227_TotalSegmentatorMRI; organs, totalsegmentator/map_to_binary.py. CT and MR are numbered each for itself, so
cases are called CT_sXXXX and MR_sXXXX. This script was tested on made-up files of this layout, not on the data itself.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_multimodal.commands.convert import repairs_of
from nnunet_multimodal.conversion.dataset import FILE_ENDING, CaseFiles, Repairs, first_names, numbered, place_file
from nnunet_multimodal.conversion.images import check_not_constant, read_labels, read_volume, write_like
from nnunet_multimodal.conversion.merge_masks import merge_masks
from nnunet_multimodal.conversion.mixed_script import make_mixed_parser, parse, write_and_convert
from nnunet_multimodal.conversion.script import WriteCase, run_script
from nnunet_multimodal.errors import DataProblem, UsageError

IMAGES = {"CT": "ct.nii.gz", "MR": "mri.nii.gz"}
SPLITS = ("train", "val", "test")


def main(argv: Sequence[str] | None = None) -> int:
    roots = {"ct": "folder of the CT data set", "mr": "folder of the MR data set"}
    parser = make_mixed_parser(__doc__, default_name="TotalSegmentator", roots=roots)
    parser.add_argument("--organs", nargs="+", metavar="NAME", help="masks to take (default: those of both)")
    parser.add_argument("--split", choices=("train", "all"), default="train", help="(default: without the test cases)")
    parser.add_argument("--skip-empty", action="store_true", help="leave out cases without any of the organs")
    args = parse(parser, argv)
    folders = {modality: find_folders(getattr(args, modality.lower()), modality, args.split) for modality in IMAGES}
    organs = choose_organs(folders, args.organs)
    overlaps: dict[str, int] = {}
    found: dict[str, dict[str, WriteCase]] = {
        modality: {
            f"{modality}_{folder.name}": functools.partial(
                write_case, folder, modality, organs, repairs_of(args), overlaps
            )
            for folder in of
        }
        for modality, of in folders.items()
    }
    code = write_and_convert(
        args,
        found,
        {modality: organs for modality in found},
        {"ct": args.ct, "mr": args.mr, "organs": [*organs]},
        wanted=organs,
        keep=has_label if args.skip_empty else None,
    )
    if overlaps:
        print(f"{sum(overlaps.values())} voxels in {len(overlaps)} cases lay in several masks: {tally(overlaps)}")
    return code


def find_folders(root: Path, modality: str, split: str) -> list[Path]:
    """The folders of the cases, without those of the official test set unless ``split`` is "all"."""
    folders = sorted(path for path in root.glob("s*") if path.is_dir() and re.fullmatch(r"s\d{4}", path.name))
    image = IMAGES[modality]
    without = [path.name for path in folders if not (path / image).exists()]
    if without:
        swapped = any((root / without[0] / other).exists() for other in IMAGES.values())
        hint = "Are the folders of CT and MR swapped?" if swapped else "Unpack the data set again."
        raise DataProblem(f"{root}: {len(without)} cases have no {image}: {first_names(without)}. {hint}")
    if split == "all" or not folders:
        return folders
    split_of = read_splits(root / "meta.csv")
    unknown = [path.name for path in folders if path.name not in split_of]
    if unknown:
        raise DataProblem(
            f"{root / 'meta.csv'} does not say of what split {len(unknown)} cases are: {first_names(unknown)}. "
            "Take the meta.csv of this version of the data set, or --split all."
        )
    return [path for path in folders if split_of[path.name] != "test"]


def read_splits(path: Path) -> dict[str, str]:
    """Case -> train, val or test."""
    if not path.exists():
        raise DataProblem(f"{path} is missing, so the test cases are not known. Copy it there, or pass --split all.")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    reader = csv.DictReader(io.StringIO(text), delimiter=";" if ";" in text.partition("\n")[0] else ",")
    columns = [name for name in reader.fieldnames or [] if name]
    missing = [name for name in ("image_id", "split") if name not in columns]
    if missing:
        raise DataProblem(f"{path} lacks the column {missing[0]}; found {', '.join(columns)}.")
    splits = {(row["image_id"] or "").strip(): (row["split"] or "").strip() for row in reader}
    wrong = sorted({split for split in splits.values() if split not in SPLITS})
    if wrong:
        raise DataProblem(f"{path} has the split {wrong[0]!r}, expected {', '.join(SPLITS)}.")
    return splits


def choose_organs(folders: Mapping[str, Sequence[Path]], wanted: Sequence[str] | None) -> dict[str, int]:
    """Organ -> label: those asked for, or those that CT and MR both have, once every case has a mask of each.

    Raises:
        UsageError: no case of a modality has such an organ.
        DataProblem: a case lacks the mask of an organ, or CT and MR have none in common.
    """
    masks = {modality: {path: mask_names(path / "segmentations") for path in of} for modality, of in folders.items()}
    known = {modality: set().union(*of.values()) for modality, of in masks.items()}
    common = sorted(known["CT"] & known["MR"])
    for organ in wanted or []:
        lacking = [modality for modality, of in folders.items() if of and organ not in known[modality]]
        if lacking:
            close = difflib.get_close_matches(organ, common, n=1)
            raise UsageError(
                f"No {' and no '.join(lacking)} case has a mask of '{organ}'. "
                + (f"Did you mean '{close[0]}'? " if close else "")
                + f"CT and MR both have: {', '.join(common) or 'none'}."
            )
    organs = [*dict.fromkeys(wanted or common)]
    if not organs and all(folders.values()):
        raise DataProblem("CT and MR have no organ in common. Expected segmentations/<organ>.nii.gz in every case.")
    missing = [
        f"{path} lacks segmentations/{', '.join(organ + FILE_ENDING for organ in organs if organ not in names)}."
        for of in masks.values()
        for path, names in of.items()
        if not names.issuperset(organs)
    ]
    if missing:
        raise DataProblem(numbered("Unpack these cases again, or leave the organ out (--organs):", missing))
    return {organ: label for label, organ in enumerate(organs, start=1)}


def mask_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    names = (path.name for path in folder.iterdir())
    return {name.removesuffix(FILE_ENDING) for name in names if name.endswith(FILE_ENDING) and name[0] != "."}


def write_case(
    folder: Path,
    modality: str,
    organs: Mapping[str, int],
    repairs: Repairs,
    overlaps: dict[str, int],
    image: Path,
    label: Path,
) -> None:
    source = folder / IMAGES[modality]
    volume = read_volume(source, repairs.nan_to, repairs.reorthonormalize)
    check_not_constant(volume)
    masks = {value: folder / "segmentations" / f"{organ}{FILE_ENDING}" for organ, value in organs.items()}
    labels, shared = merge_masks(volume, masks, repairs)
    place_file(source, image, volume)
    write_like(label, labels, volume)
    if shared:
        overlaps[f"{modality}_{folder.name}"] = shared


def has_label(files: CaseFiles) -> bool:
    return bool(read_labels(files.label).data.any())


def tally(counts: Mapping[str, int]) -> str:
    return first_names([f"{case} ({count})" for case, count in counts.items()])


if __name__ == "__main__":
    run_script(main)
