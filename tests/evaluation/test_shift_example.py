"""The slice that shows the shifts: radiological, in whatever order the image is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_multimodal.evaluation.shift_report import Example, example_slices
from nnunet_multimodal.inference.position import affine_of

AFFINE = np.diag([1.0, 2.0, 5.0, 1.0])


@pytest.mark.parametrize("reader", [NibabelIO, SimpleITKIO])
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAS", "SPL"])
def test_right_is_left_and_front_is_up(tmp_path: Path, monkeypatch, reader: Any, orientation: str) -> None:
    """The patient's right front corner is bright; the slices are the thick ones, from feet to head."""
    array = np.zeros((6, 5, 3), np.float32)
    array[4:, 3:] = 1  # x towards the right, y towards the front
    image = nib.Nifti1Image(array, AFFINE)
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt(tuple(orientation)))
    nib.save(image.as_reoriented(turn), tmp_path / "a.nii.gz")
    images, properties = reader().read_images((str(tmp_path / "a.nii.gz"),))
    monkeypatch.setattr(
        "nnunet_multimodal.evaluation.shift_report.tables", lambda content: {"gamma": {"severities": [1.0, 1.0]}}
    )
    example = Example("a", images, properties["spacing"], 0, (0,), affine_of(properties))
    found, aspect = example_slices({}, example)
    assert aspect == 2 and len(found["gamma"]) == 2
    for _, picture in found["gamma"]:  # first row at the bottom
        assert picture.shape == (5, 6)
        assert picture[3:, :2].all() and picture.sum() == 4
