"""MM-WHS (https://zmiclab.github.io/zxh/0/mmwhs): 20 CT and 20 MR of the heart with seven substructures, mixed.

Expects ct_train_10XX_image.nii.gz and _label.nii.gz, and mr_train_..., anywhere under the folder given (the zips unpack
as ct_train/, mr_train/ or several of them). The test cases have no labels and are passed over. The label values become
1 to 7; one of the MR labels holds 421 beside 420, a slip for 420 (left atrium), and is put right.

    python dataset_conversion/mm_whs.py MM-WHS -o mm_whs -d 605 --harmonise paper

Where this comes from: label values and structures, the page of the WHS++ track of CARE 2024, which uses the same ones;
names, and 421 as a slip in one MR label, public readers of the data: most make it 420, one background, one refuses it.
CT and MR are unpaired; that no patient has two images is assumed. This script was tested on made-up files of this
layout, not on the data itself.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_multimodal.commands.convert import repairs_of
from nnunet_multimodal.conversion.cases import check_volumes, read_case
from nnunet_multimodal.conversion.dataset import CaseFiles, Repairs, numbered, place_file
from nnunet_multimodal.conversion.images import write_like
from nnunet_multimodal.conversion.mixed_script import make_mixed_parser, parse, write_and_convert
from nnunet_multimodal.conversion.script import WriteCase, run_script
from nnunet_multimodal.errors import DataProblem

VALUES = {
    "left_ventricle": 500,
    "right_ventricle": 600,
    "left_atrium": 420,
    "right_atrium": 550,
    "myocardium": 205,
    "ascending_aorta": 820,
    "pulmonary_artery": 850,
}
LABELS = {name: label for label, name in enumerate(VALUES, start=1)}
MEANING = {value: LABELS[name] for name, value in VALUES.items()} | {421: LABELS["left_atrium"]}
NAME = re.compile(r"(?P<case>(?P<modality>ct|mr)_train_\d{4})_(?P<part>image|label)\.nii(\.gz)?")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(make_mixed_parser(__doc__, default_name="MMWHS"), argv)
    cases = find_cases(args.root, repairs_of(args))
    return write_and_convert(args, cases, {modality: LABELS for modality in cases}, {"root": args.root})


def find_cases(root: Path, repairs: Repairs) -> dict[str, dict[str, WriteCase]]:
    """Modality -> case -> what writes it."""
    parts: dict[str, dict[str, Path]] = {}
    problems = []
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in sorted(names):
            match = NAME.fullmatch(name)
            if match is None:
                continue
            of, path = parts.setdefault(match["case"], {}), Path(parent, name)
            if match["part"] in of:
                problems.append(f"Case id '{match['case']}' comes from {of[match['part']]} and {path}.")
            of[match["part"]] = path
    for case, of in sorted(parts.items()):
        problems += [f"{case} in {root} has no {part}." for part in ("image", "label") if part not in of]
    if problems:
        raise DataProblem(numbered("Add or take away files, so that every case has one image and one label:", problems))
    found: dict[str, dict[str, WriteCase]] = {"CT": {}, "MR": {}}
    for case, of in parts.items():
        found[case[:2].upper()][case] = functools.partial(write_case, of["image"], of["label"], repairs)
    return found


def write_case(source: Path, labels: Path, repairs: Repairs, image: Path, label: Path) -> None:
    files = CaseFiles(source.name, source, labels)
    volume, raw = read_case(files, repairs)
    check_volumes(files, volume, raw, {0, *MEANING})
    mapped = np.zeros(raw.data.shape, dtype=np.uint8)
    for value, meaning in MEANING.items():
        mapped[raw.data == value] = meaning
    place_file(source, image, volume)
    write_like(label, mapped, raw)


if __name__ == "__main__":
    run_script(main)
