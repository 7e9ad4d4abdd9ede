"""CHAOS, CT and MR (https://chaos.grand-challenge.org, Zenodo record 3431873): the liver, mixed.

Expects Train_Sets/CT/<patient>/{DICOM_anon,Ground} and Train_Sets/MR/<patient> as chaos.py does, under the folder given
(which may be Train_Sets). The ground truth of the CT is the liver alone, one PNG per slice; of the MR it is liver,
kidneys and spleen, so the liver is what both have. Every MR contrast is a case of its own; the table says which are of
one patient, so that they stay together in the splits. CT and MR are of different patients, whatever their numbers.

    python dataset_conversion/chaos_mixed.py CHAOS_Train_Sets -o chaos_liver --contrasts t1in t2spir -d 606

Where this comes from: https://chaos.grand-challenge.org/Data ("no connection between the data sets obtained from CT and
MR databases"); folders and names (i0000,0000b.dcm or IMG-0001-00001.dcm, liver_GT_000.png), the readme of
ImageMask-Dataset-CHAOS-CT-Liver. CT slices and masks are paired in the order of their names, as the public readers of
the data do; neither says which slice a mask is of, so look at one CT of the result before training on it. This
script was tested on made-up files of this layout, not on the data itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from chaos import CONTRASTS
from chaos import LABELS as MR_LABELS
from chaos import find_cases as find_mr_cases

from nnunet_multimodal.conversion.dicom import read_series, stack_masks, write_pair
from nnunet_multimodal.conversion.mixed_script import make_mixed_parser, parse, write_and_convert
from nnunet_multimodal.conversion.script import WriteCase, run_script
from nnunet_multimodal.errors import DataProblem

LABELS = {"CT": {"liver": 1}, "MR": MR_LABELS}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_mixed_parser(__doc__, default_name="CHAOSLiver")
    parser.add_argument("--contrasts", nargs="+", choices=CONTRASTS, default=[*CONTRASTS], help="of MR (default: all)")
    args = parse(parser, argv)
    found = {"CT": find_ct_cases(args.root), "MR": {}}
    for contrast in args.contrasts:
        for case, write in find_mr_cases(args.root, contrast).items():
            found["MR"][f"{case.replace('chaos', 'mr')}_{contrast}"] = write
    patients = {case: case.partition("_")[0] for of in found.values() for case in of}
    return write_and_convert(args, found, LABELS, {"root": args.root}, patients=patients)


def find_ct_cases(root: Path) -> dict[str, WriteCase]:
    for below in ("Train_Sets/CT", "CT"):
        patients = [path for path in (root / below).glob("*") if path.is_dir() and path.name.isdecimal()]
        if patients:
            return {f"ct{int(path.name):02d}": functools.partial(write_ct_case, path) for path in patients}
    return {}


def write_ct_case(patient: Path, image: Path, label: Path) -> None:
    series = read_series(patient / "DICOM_anon")
    mask = stack_masks(series, patient / "Ground", (".png",))
    values = np.unique(mask)
    if len(values) > 2 or values[0] != 0:
        found = ", ".join(map(str, values[:10]))
        raise DataProblem(f"{patient / 'Ground'} has grey values {found}, expected 0 and one for the liver.")
    write_pair(series, mask > 0, image, label)


if __name__ == "__main__":
    run_script(main)
