"""WORD (https://github.com/HiLab-git/WORD) with scribbles: abdominal CT with 16 organs.

Expects imagesTr, scribblesTr and labelsTr with word_XXXX.nii.gz in each, under the folder given or WORD-V0.1.0/ in it.
In the scribbles 0 is drawn background, 1 to 16 an organ, and 255 what nobody drew on (--unlabelled says otherwise).
The dense labels stay beside the data set and judge what is learnt. The seven organs that CmFNet and DMSPS report are
taken unless --organs says otherwise: all other organs are background, also where somebody drew on them.

    python dataset_conversion/word_scribbles.py WORD-V0.1.0 -d 609

Where this comes from: folders, issue 8 of HiLab-git/WORD and public readers of the data; values of the scribbles,
scribbles_generator.py there (unlabelled 255); ids of the organs, public readers. If the files hold other values, the
script stops and says which. It was tested on made-up files of this layout, not on the data itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_multimodal.commands.convert import natural_number
from nnunet_multimodal.conversion.dataset import find_files
from nnunet_multimodal.conversion.scribble_dataset import Legend
from nnunet_multimodal.conversion.scribble_script import make_dataset, make_scribble_parser, parse, scribbled_cases
from nnunet_multimodal.conversion.script import run_script
from nnunet_multimodal.errors import DataProblem, UsageError

ORGANS = {
    "liver": 1,
    "spleen": 2,
    "left_kidney": 3,
    "right_kidney": 4,
    "stomach": 5,
    "gallbladder": 6,
    "esophagus": 7,
    "pancreas": 8,
    "duodenum": 9,
    "colon": 10,
    "intestine": 11,
    "adrenal": 12,
    "rectum": 13,
    "bladder": 14,
    "head_of_left_femur": 15,
    "head_of_right_femur": 16,
}
PAPER = ("liver", "spleen", "left_kidney", "right_kidney", "stomach", "gallbladder", "pancreas")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_scribble_parser(__doc__, default_name="WORDScribbles")
    parser.add_argument("--organs", nargs="+", choices=ORGANS, default=PAPER, metavar="NAME", help="(default: 7)")
    parser.add_argument("--unlabelled", type=natural_number, default=255, metavar="N", help="(default: %(default)s)")
    args = parse(parser, argv)
    for root in (args.root, args.root / "WORD-V0.1.0"):
        if (root / "scribblesTr").is_dir():
            break
    else:
        raise DataProblem(f"{args.root} has no scribblesTr. Expected the folder that holds imagesTr and scribblesTr.")
    parts: dict[str, dict[str, Path]] = {}
    for part, folder in (("image", "imagesTr"), ("scribble", "scribblesTr"), ("dense", "labelsTr")):
        for case, path in find_files(root / folder, part).items():
            parts.setdefault(case, {})[part] = path
    cases = scribbled_cases(parts, root, "scribble", "dense")
    classes = {organ: (value,) for organ, value in ORGANS.items() if organ in args.organs}
    if args.unlabelled in ORGANS.values():
        raise UsageError(f"--unlabelled {args.unlabelled} is an organ's value; expected more than {len(ORGANS)}.")
    others = frozenset(value for organ, value in ORGANS.items() if organ not in args.organs)
    return make_dataset(args, cases, ["CT"], Legend(args.unlabelled, 0, classes, others))


if __name__ == "__main__":
    run_script(main)
