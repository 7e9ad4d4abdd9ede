"""``nnunet_multimodal scribbles fingerprint``: CT statistics of what was drawn, before nnU-Net plans."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnunet_multimodal.environment import find_raw_dataset, require_nnunet_path

WHAT = "make the CT statistics of a data set of scribbles from what was drawn"

DESCRIPTION = """\
For data sets of scribbles with a channel called CT: nnU-Net clips and normalises CT by the intensities of everything
labelled, and counts ignore, which is nearly the whole image with its air. This writes dataset_fingerprint.json into
nnUNet_preprocessed from the drawn classes alone; nnUNetv2_plan_and_preprocess then takes it (without --clean)."""

EXAMPLE = """\
nnunet_multimodal scribbles fingerprint -d 604
nnUNetv2_plan_and_preprocess -d 604 -c 3d_fullres"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--dataset", required=True, metavar="DATASET", help="id or DatasetXXX_Name in nnUNet_raw")


def run(args: argparse.Namespace) -> int:
    preprocessed = require_nnunet_path("nnUNet_preprocessed")
    folder: Path = find_raw_dataset(args.dataset)
    from nnunet_multimodal.conversion.fingerprint import FILE_NAME, write_fingerprint
    from nnunet_multimodal.conversion.verify import load_json

    statistics = write_fingerprint(folder, preprocessed)
    names = (load_json(folder)[0] or {})["channel_names"]
    for channel, of in statistics.items():
        print(
            f"{names[channel]}: mean {of['mean']:.1f}, standard deviation {of['std']:.1f}, "
            f"0.5 to 99.5 percent {of['percentile_00_5']:.1f} to {of['percentile_99_5']:.1f}"
        )
    print(preprocessed / folder.name / FILE_NAME)
    return 0
