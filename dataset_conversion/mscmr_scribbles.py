"""MSCMR (https://zmiclab.github.io/zxh/0/mscmrseg19) with the scribbles of CycleMix: late enhancement MR of the heart.

Expects subject1_DE.nii.gz, subject1_DE_scribble.nii.gz and, where there are any, subject1_DE_manual.nii.gz anywhere
under the folder given: MSCMR_dataset of BWGZK/CycleMix has them in {train,val,TestSet}/{images,labels}. In scribbles
0 is drawn background, 1 right ventricle, 2 myocardium, 3 left ventricle, and 4 what nobody drew on; the manual labels
have the same numbers or MSCMR's own, 600, 200 and 500. Only subjects with scribbles become cases; val and TestSet have
manual labels alone and are passed over: predict their images, and compare with `nnunet_multimodal evaluate`.

    python dataset_conversion/mscmr_scribbles.py CycleMix/MSCMR_dataset -d 608

Where this comes from: folders and names, the files of BWGZK/CycleMix; values, public readers of the data ("0:BG, 1:RV,
2:Myo, 3:LV, 4:unlabeled pixels"; 200 to 2, 500 to 3, 600 to 1). This script was tested on made-up files of this layout,
not on the data itself.
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

CLASSES = {"right_ventricle": (1, 600), "myocardium": (2, 200), "left_ventricle": (3, 500)}
UNLABELLED = 4
NAME = re.compile(r"(?P<case>subject\d+_DE)(_(?P<part>manual|scribble))?\.nii(\.gz)?")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_scribble_parser(__doc__, default_name="MSCMRScribbles")
    parser.add_argument("--scribbles", type=Path, metavar="DIR", help="where the scribbles are (default: under root)")
    args = parse(parser, argv)
    parts = find_parts([args.root, *([args.scribbles] if args.scribbles else [])], NAME)
    cases = scribbled_cases(parts, args.root, "scribble", "manual")
    return make_dataset(args, cases, ["MR"], Legend(UNLABELLED, 0, CLASSES))


if __name__ == "__main__":
    run_script(main)
