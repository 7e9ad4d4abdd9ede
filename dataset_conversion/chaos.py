"""CHAOS, MR part (https://chaos.grand-challenge.org): abdominal MR with liver, both kidneys and spleen.

Expects Train_Sets/MR/<patient>/T1DUAL/{DICOM_anon/{InPhase,OutPhase},Ground} and <patient>/T2SPIR/{DICOM_anon,Ground}
under the folder given (which may be Train_Sets or MR itself). Images are DICOM, labels PNG grey values.

    python dataset_conversion/chaos.py CHAOS_Train_Sets -o chaos_t1 --contrast t1in -d 601
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_multimodal.conversion.dicom import read_series, stack_masks, write_pair
from nnunet_multimodal.conversion.script import WriteCase, finish, make_parser, run_script
from nnunet_multimodal.errors import DataProblem

LABELS = {"liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4}
GREY_VALUES = {1: (55, 70), 2: (110, 135), 3: (175, 200), 4: (240, 255)}  # both ends belong to it; CHAOS' own ranges
CONTRASTS = {  # folder of the images, folder of the labels; the two T1 phases share their labels
    "t1in": ("T1DUAL/DICOM_anon/InPhase", "T1DUAL/Ground"),
    "t1out": ("T1DUAL/DICOM_anon/OutPhase", "T1DUAL/Ground"),
    "t2spir": ("T2SPIR/DICOM_anon", "T2SPIR/Ground"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, default_name="CHAOS")
    parser.add_argument("--contrast", choices=[*CONTRASTS], default="t1in", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    return finish(args, find_cases(args.root, args.contrast), LABELS)


def find_cases(root: Path, contrast: str) -> dict[str, WriteCase]:
    """Case ids are ``chaos01``...: the patient alone, so that the contrasts of one patient belong together."""
    for below in ("Train_Sets/MR", "MR", "."):
        patients = sorted(path for path in (root / below).glob("*") if path.is_dir() and path.name.isdecimal())
        if patients:
            return {f"chaos{int(path.name):02d}": functools.partial(write_case, path, contrast) for path in patients}
    return {}


def write_case(patient: Path, contrast: str, image: Path, label: Path) -> None:
    slices, ground = CONTRASTS[contrast]
    series = read_series(patient / slices)
    write_pair(series, to_labels(stack_masks(series, patient / ground, (".png",)), patient / ground), image, label)


def to_labels(grey: np.ndarray, folder: Path) -> np.ndarray:
    """uint8 [Z, Y, X] of ``LABELS`` from grey values; one that means nothing is an error, not background."""
    labels = np.zeros(grey.shape, dtype=np.uint8)
    known = grey == 0
    for value, (low, high) in GREY_VALUES.items():
        inside = (grey >= low) & (grey <= high)
        labels[inside] = value
        known |= inside
    if not known.all():
        found = ", ".join(map(str, np.unique(grey[~known])[:10]))
        expected = ", ".join(f"{low}..{high}" for low, high in GREY_VALUES.values())
        raise DataProblem(f"{folder} has grey values {found}, expected 0, {expected}.")
    return labels


if __name__ == "__main__":
    run_script(main)
