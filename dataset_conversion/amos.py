"""AMOS22 (https://amos22.grand-challenge.org, Zenodo record 7262581): abdominal CT and MR with 15 organs, mixed.

Expects imagesTr/amos_XXXX.nii.gz and labelsTr/amos_XXXX.nii.gz, with --with-validation imagesVa and labelsVa too, under
the folder given or under amos22/ in it. CT and MR lie in the same folders; only the number tells: 1 to 500 are CT, 501
to 600 MR, although dataset.json calls all of them CT. The 13 organs of the MulModSeg paper are taken unless --organs
says otherwise: bladder and prostate/uterus are left to the background, because the MR lacks them. The labels are used
as they are, so nothing but the data set is written.

    python dataset_conversion/amos.py amos22 --with-validation --balance 1 -d 604

Where this comes from: folders and names, the readme.md in the zip and nnunetv2's Dataset219_Amos2022_task2; ids of the
organs, the zip's dataset.json (which spells aorta "arota"). The number: readme.md says "less than 500 belong to CT" and
also 500 CT and 100 MR of 600; nnunetv2's Dataset218_Amos2022_task1 takes CT up to 500, and others who looked at the
voxels report HU in amos_0500 and none in amos_0501. No labelled case is near: their CT ends at 410, their MR begins at
507 (Dataset218; README of U-Mamba). This script was tested on made-up files of this layout, not on the data itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_multimodal.conversion import dataset
from nnunet_multimodal.conversion.dataset import CaseFiles
from nnunet_multimodal.conversion.mixed import Source
from nnunet_multimodal.conversion.mixed_script import choose_cases, convert_sources, make_mixed_parser, parse
from nnunet_multimodal.conversion.script import run_script
from nnunet_multimodal.errors import DataProblem

ORGANS = {
    "spleen": 1,
    "right_kidney": 2,
    "left_kidney": 3,
    "gall_bladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "postcava": 9,
    "pancreas": 10,
    "right_adrenal_gland": 11,
    "left_adrenal_gland": 12,
    "duodenum": 13,
    "bladder": 14,
    "prostate_uterus": 15,
}
PAPER = [*ORGANS][:13]
LAST_CT, LAST = 500, 600


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_mixed_parser(__doc__, default_name="AMOS", output=False)
    parser.add_argument("--with-validation", action="store_true", help="take imagesVa and labelsVa too")
    parser.add_argument("--organs", nargs="+", choices=ORGANS, default=PAPER, metavar="NAME", help="(default: 13)")
    args = parse(parser, argv)
    cases = choose_cases(args, find_cases(args.root, args.with_validation))
    sources = [Source(modality, [*of.values()], ORGANS) for modality, of in cases.items()]
    return convert_sources(args, sources, {organ: i for i, organ in enumerate(dict.fromkeys(args.organs), start=1)})


def find_cases(root: Path, with_validation: bool) -> dict[str, dict[str, CaseFiles]]:
    """Modality -> case -> its files."""
    for folder in (root, root / "amos22"):
        if (folder / "imagesTr").is_dir():
            break
    else:
        raise DataProblem(f"{root} has no imagesTr. Expected the folder that holds imagesTr and labelsTr of AMOS22.")
    found: dict[str, dict[str, CaseFiles]] = {"CT": {}, "MR": {}}
    strange = []
    for split in ("Tr", "Va") if with_validation else ("Tr",):
        for files in dataset.find_cases(folder / f"images{split}", folder / f"labels{split}"):
            match = re.fullmatch(r"amos_(\d{4})", files.case)
            if match is None or not 1 <= int(match[1]) <= LAST:
                strange.append(files.case)
                continue
            of = found["CT" if int(match[1]) <= LAST_CT else "MR"]
            if files.case in of:
                raise DataProblem(f"Case id '{files.case}' comes from {of[files.case].image} and {files.image}.")
            of[files.case] = files
    if strange:
        raise DataProblem(
            f"{folder}: {len(strange)} cases are not of AMOS22, so their modality is not known: "
            f"{dataset.first_names(strange)}. Expected amos_0001 to amos_{LAST:04d}; take the others out."
        )
    return found


if __name__ == "__main__":
    run_script(main)
