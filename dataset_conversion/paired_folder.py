"""Registered CT and MR of the same patients (or other contrasts): a data set of two channels for nnUNetTrainerCmFNet.

{case} stands for the name of the case. The images of a case have to be registered: one grid, one frame, and bodies that
lie on each other; a pair that does not is named with what was found, and nothing is written. Scribbles come from files,
or are simulated on the dense labels; dense labels stay beside the data set and judge what is learnt.

    python dataset_conversion/paired_folder.py DATA -d 604 --images CT="{case}/ct.nii.gz" MR="{case}/mr.nii.gz" \\
        --scribbles "{case}/scribbles.nii.gz" --unlabelled 255 --label-names tumour=1 --dense "{case}/tumour.nii.gz"
    python dataset_conversion/paired_folder.py DATA -d 604 --images T1="{case}_T1.nii.gz" T2="{case}_T2.nii.gz" \\
        --dense "labels/{case}.nii.gz" --simulate skeleton --label-names tumour=1,2,3,4
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from nnunet_multimodal.commands.convert import natural_number
from nnunet_multimodal.commands.scribbles_import import class_values
from nnunet_multimodal.conversion.dataset import FILE_ENDING, first_names
from nnunet_multimodal.conversion.scribble_dataset import Legend, ScribbledFiles
from nnunet_multimodal.conversion.scribble_script import make_dataset, make_scribble_parser, parse
from nnunet_multimodal.conversion.script import match_template, run_script
from nnunet_multimodal.conversion.simulated import Drawing, legend_of, simulate_file
from nnunet_multimodal.data.background import BACKGROUNDS
from nnunet_multimodal.data.scribbles import STYLES
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import DataProblem, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_scribble_parser(__doc__, default_name="Paired")
    parser.add_argument("--images", nargs="+", required=True, metavar="NAME=TEMPLATE", help="of each channel, in order")
    parser.add_argument("--label-names", type=class_values, nargs="+", required=True, metavar="NAME=ID[,ID...]")
    parser.add_argument("--dense", metavar="TEMPLATE", help="dense label maps")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--scribbles", metavar="TEMPLATE", help="scribble files")
    source.add_argument("--simulate", choices=STYLES, metavar="STYLE", help="draw on --dense: " + ", ".join(STYLES))
    parser.add_argument("--unlabelled", type=natural_number, metavar="N", help="value in --scribbles where nobody drew")
    parser.add_argument(
        "--background-label", type=natural_number, default=0, metavar="N", help="of drawn background (0)"
    )
    parser.add_argument("--background", choices=BACKGROUNDS, default="drawn", help="of --simulate (%(default)s)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="--simulate draws on every n-th slice")
    parser.add_argument("--seed", type=natural_number, default=0, help="of --simulate (%(default)s)")
    args = parse(parser, argv)
    channels = dict(_named(word) for word in args.images)
    if len(channels) < 2:
        raise UsageError(f"--images needs two channels of different names at least, found {', '.join(channels)}.")
    if args.every < 1:
        raise UsageError(f"--every counts slices and must be at least 1, found {args.every}.")
    classes = dict(args.label_names)
    images = [match_template(args.root, template) for template in channels.values()]
    dense = match_template(args.root, args.dense) if args.dense else {}
    if args.scribbles:
        if args.unlabelled is None:
            raise UsageError("--scribbles needs --unlabelled N, the value where nobody drew.")
        scribbles = match_template(args.root, args.scribbles)
        legend = Legend(args.unlabelled, args.background_label, classes)
        return make_dataset(args, _cases(images, scribbles, dense), [*channels], legend)
    if not dense:
        raise UsageError("--simulate needs --dense, the label maps to draw on.")
    args.allow_outside_body = True  # a label map that leaves the body is no slip of a pen
    drawing = Drawing(args.simulate, args.background, args.every, args.seed)
    with tempfile.TemporaryDirectory(dir=require_nnunet_path("nnUNet_raw"), prefix=".scribbles-") as folder:
        cases = _cases(images, {case: Path(folder, f"{case}{FILE_ENDING}") for case in dense}, dense)
        for case, path in tqdm(dense.items(), desc="drawing scribbles", unit="file", disable=None):
            simulate_file(path, case, Path(folder), drawing, classes)
        return make_dataset(args, cases, [*channels], legend_of(drawing, classes))


def _named(word: str) -> tuple[str, str]:
    name, separator, template = word.partition("=")
    if not (separator and name and template):
        raise UsageError(f"--images: expected NAME=TEMPLATE such as CT={{case}}/ct.nii.gz, found {word!r}.")
    return name, template


def _cases(
    images: Sequence[dict[str, Path]], scribbles: dict[str, Path], dense: dict[str, Path]
) -> list[ScribbledFiles]:
    """Cases with all channels and scribbles; one that lacks any is an error."""
    parts = [*images, scribbles]
    alone = sorted(case for case in set().union(*parts) if not all(case in of for of in parts))
    if alone:
        raise DataProblem(f"{len(alone)} cases lack an image or their scribbles: {first_names(alone)}")
    return [
        ScribbledFiles(case, tuple(of[case] for of in images), path, dense.get(case))
        for case, path in sorted(scribbles.items())
    ]


if __name__ == "__main__":
    run_script(main)
