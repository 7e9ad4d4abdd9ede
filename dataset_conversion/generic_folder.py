"""Any folder of NIfTI files: say where a case's image and label are, and which label values mean what.

{case} stands for the name of the case. Label values can be mapped, which is also the way out of 0/255 masks, gaps and
organs that are not wanted: with --map, values that are not named become an error, 0 stays 0.

    python dataset_conversion/generic_folder.py DATA -o out --images "{case}/T1.nii.gz" --labels "{case}/seg.nii.gz" \\
        --map 5=1 2=2 3=3 1=4 7=0 --label-names liver=1 right_kidney=2 left_kidney=3 spleen=4 -d 603
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_multimodal.commands.convert import label_name
from nnunet_multimodal.conversion.dataset import first_names, place_file
from nnunet_multimodal.conversion.images import (
    check_label_values,
    compare_geometry,
    read_labels,
    read_volume,
    write_like,
)
from nnunet_multimodal.conversion.script import WriteCase, finish, make_parser, match_template, run_script
from nnunet_multimodal.errors import DataProblem


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, default_name="Folder")
    parser.add_argument("--images", required=True, metavar="TEMPLATE", help='such as "{case}/T1.nii.gz"')
    parser.add_argument("--labels", required=True, metavar="TEMPLATE", help='such as "{case}/seg.nii.gz"')
    parser.add_argument("--map", type=value_pair, nargs="+", metavar="OLD=NEW", help="label values to change")
    parser.add_argument("--label-names", type=label_name, nargs="+", default=[], metavar="NAME=ID", help="for -d")
    args = parser.parse_args(argv)
    mapping = None if args.map is None else {0: 0, **dict(args.map)}
    return finish(args, find_cases(args.root, args.images, args.labels, mapping), dict(args.label_names))


def value_pair(text: str) -> tuple[int, int]:
    """``255=1``"""
    match = re.fullmatch(r"(\d+)=(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected OLD=NEW such as 255=1, found {text!r}")
    return int(match[1]), int(match[2])


def find_cases(root: Path, images: str, labels: str, mapping: dict[int, int] | None) -> dict[str, WriteCase]:
    image_of, label_of = match_template(root, images), match_template(root, labels)
    alone = sorted(image_of.keys() ^ label_of.keys())
    if alone:
        raise DataProblem(f"{len(alone)} cases lack their image or their label: {first_names(alone)}")
    return {case: functools.partial(write_case, image_of[case], label_of[case], mapping) for case in sorted(image_of)}


def write_case(source: Path, labels: Path, mapping: dict[int, int] | None, image: Path, label: Path) -> None:
    volume = read_volume(source)
    mask = compare_geometry(volume, read_labels(labels), "label")
    if mapping is None:
        place_file(source, image, volume)
        place_file(labels, label, mask)
        return
    check_label_values(mask, set(mapping))
    mapped = np.zeros(mask.data.shape, dtype=np.uint16 if max(mapping.values()) > 255 else np.uint8)
    for old, new in mapping.items():
        mapped[mask.data == old] = new
    place_file(source, image, volume)
    write_like(label, mapped, mask)


if __name__ == "__main__":
    run_script(main)
