"""ACDC (https://humanheart-project.creatis.insa-lyon.fr) with scribbles: cine MR of the heart, two frames a patient.

Expects patient001_frame01.nii.gz, patient001_frame01_gt.nii.gz and patient001_frame01_scribble.nii.gz anywhere under
the folder given; the scribbles (https://vios-s.github.io/multiscale-adversarial-attention-gates/data) may also lie in a
folder of their own, --scribbles. In them 0 is background that was drawn around the heart, 1 right ventricle, 2
myocardium, 3 left ventricle, and 4 what nobody drew on. The dense labels stay beside the data set and judge what is
learnt. Both frames of a patient are on the same side of every split.

    python dataset_conversion/acdc_scribbles.py ACDC/training --scribbles ACDC_scribbles -d 603

Where this comes from: names, acdc_data_processing.py of HiLab-git/WSL4MIS; values, the ignore index of its trainers. It
was tested on made-up files of this layout; thirty real frames in another layout went through `nnunet_multimodal
scribbles import`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_multimodal.conversion.scribble_dataset import Legend
from nnunet_multimodal.conversion.scribble_script import (
    find_parts,
    make_dataset,
    make_scribble_parser,
    parse,
    scribbled_cases,
)
from nnunet_multimodal.conversion.script import run_script

CLASSES = {"right_ventricle": (1,), "myocardium": (2,), "left_ventricle": (3,)}
UNLABELLED = 4
NAME = re.compile(r"(?P<case>patient\d+_frame\d+)(_(?P<part>gt|scribble))?\.nii(\.gz)?")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_scribble_parser(__doc__, default_name="ACDCScribbles")
    parser.add_argument("--scribbles", type=Path, metavar="DIR", help="where the scribbles are (default: under root)")
    args = parse(parser, argv)
    parts = find_parts([args.root, *([args.scribbles] if args.scribbles else [])], NAME)
    cases = scribbled_cases(parts, args.root, "scribble", "gt")
    patients = {files.case: files.case.partition("_")[0] for files in cases}
    return make_dataset(args, cases, ["MR"], Legend(UNLABELLED, 0, CLASSES), patients)


if __name__ == "__main__":
    run_script(main)
