"""``doctor -d`` on raw data sets with one fault each (rows 7 to 9, 11 to 19, 22 to 25, and broken dataset.json)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from tiny_data import AFFINE, SHAPE, Inputs, make_image, make_label, save

from nnunet_multimodal.conversion.verify import verify_raw_dataset

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(inputs: Inputs, call: Call) -> Path:
    """A sound CrossMR data set of the cases a and b, its images copied so that a test may damage them."""
    assert call(inputs.arguments("--label-names", "liver=1", "spleen=2"))[0] == 0
    path = inputs.raw / "Dataset007_CrossMR"
    for case, seed in (("a", 0), ("b", 1)):
        for channel in ("0000", "0001"):
            file = path / "imagesTr" / f"{case}_{channel}.nii.gz"
            file.unlink()
            save(file, make_image(seed))
        (path / "labelsTr" / f"{case}.nii.gz").unlink()
        save(path / "labelsTr" / f"{case}.nii.gz", make_label())
    return path


def image(folder: Path, channel: int = 0) -> Path:
    return folder / "imagesTr" / f"a_{channel:04d}.nii.gz"


def label(folder: Path) -> Path:
    return folder / "labelsTr" / "a.nii.gz"


def edit_json(folder: Path, **changes: Any) -> None:
    path = folder / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def with_voxel(path: Path, value: float, dtype: type) -> None:
    array = np.asanyarray(nibabel.load(path).dataobj).astype(dtype)
    array[0, 0, 0] = value
    save(path, array)


def far() -> np.ndarray:
    affine = AFFINE.copy()
    affine[2, 3] += 6
    return affine


def coarse() -> np.ndarray:
    return AFFINE @ np.diag([1, 1, 2, 1])


def trailing_comma(folder: Path) -> None:
    path = folder / "dataset.json"
    path.write_text(path.read_text(encoding="utf-8").rstrip().removesuffix("}").rstrip() + ",\n}")


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/x.nii.gz")


LABELS = {"background": 0, "liver": 1, "spleen": 2}
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "7 channel missing": (lambda f: image(f, 1).unlink(), r"case a: expected channels .*; found 0000,0002,0003 in"),
    "8 no channel suffix": (
        lambda f: image(f).rename(f / "imagesTr" / "liver.nii.gz"),
        r"^liver\.nii\.gz has no channel suffix; rename to liver_0000\.nii\.gz\.",
    ),
    "9 label missing": (lambda f: label(f).unlink(), r"1 cases in imagesTr without a label in labelsTr: a"),
    "9 orphan label": (lambda f: save(f / "labelsTr" / "z.nii.gz", make_label()), r"1 labels .* without an image.*z"),
    "9 numTraining": (lambda f: edit_json(f, numTraining=3), r"numTraining 3, found 2 cases"),
    "11 empty": (lambda f: image(f).write_bytes(b""), r"Cannot read .*a_0000\.nii\.gz: file ends early"),
    "11 dangling link": (lambda f: dangle(image(f, 1)), r"a_0001\.nii\.gz is a link to /nowhere/x\.nii\.gz"),
    "11 dangling label": (lambda f: dangle(label(f)), r"a\.nii\.gz is a link to /nowhere"),
    "12 PNG": (lambda f: label(f).write_bytes(b"\x89PNG" + bytes(60)), r"a\.nii\.gz is not NIfTI \(starts with PNG"),
    "13 shape": (lambda f: save(label(f), make_label()[:, :, :4]), r"label .*16x14x4, its image .*16x14x6"),
    "13 channel shape": (lambda f: save(image(f, 1), make_image()[:9]), r"channel .*a_0001.* has shape 9x14x6"),
    "14 spacing": (lambda f: save(label(f), make_label(), coarse()), r"1\.5, 12\.0\) mm.*1\.5, 6\.0\) mm"),
    "15 place": (lambda f: save(label(f), make_label(), far()), r"label .* origin by 6\.00 mm"),
    "18 NaN": (lambda f: with_voxel(image(f), np.nan, np.float32), r"1 voxels that are not numbers"),
    "19 constant": (lambda f: save(image(f), np.full(SHAPE, 7, np.int16)), r"a_0000\.nii\.gz is constant \(7\)"),
    "22 CT in MR": (
        lambda f: edit_json(f, channel_names={str(n): "noNorm" if n > 1 else "CT" for n in range(4)}),
        r"channel name 'CT' turns on CT clipping for MR; use 'either_CT_or_MR'",
    ),
    "22 CT in a mixed set": (
        lambda f: edit_json(
            f,
            channel_names={str(n): "noNorm" if n > 1 else "ct" for n in range(4)},
            nnunet_multimodal={"modalities": ["CT", "MR"], "case_modality": {"a": "CT", "b": "MR"}},
        ),
        r"channel name 'CT' turns on",
    ),
    "23 mask of 255": (lambda f: save(label(f), make_label() // 2 * 255), r"a 0/255 mask, found 255"),
    "23 fraction": (lambda f: with_voxel(label(f), 0.9999, np.float32), r"found 0\.9999 \(1 voxel\)"),
    "24 undeclared": (lambda f: with_voxel(label(f), 5, np.uint8), r"found 5 \(1 voxel\), declared 0\.\.2"),
    "24 gap": (lambda f: edit_json(f, labels={"background": 0, "liver": 1, "spleen": 3}), r"gaps: found 0, 1, 3"),
    "25 ignore not highest": (
        lambda f: edit_json(f, labels={"background": 0, "ignore": 1, "spleen": 2}),
        r"ignore must be 3 \(max label 2 \+ 1\); found 1",
    ),
    "25 ignore misnamed": (lambda f: edit_json(f, labels=LABELS | {"Ignore": 3}), r"'Ignore' .* be named 'ignore'"),
    "27 scribble values": (lambda f: with_voxel(image(f, 2), 3, np.uint8), r"scribble channel .* holds 0, 1, 3"),
    "28 scribble shape": (
        lambda f: save(image(f, 3), np.zeros((16, 14, 5), np.uint8)),
        r"scribble .*a_0003\.nii\.gz has shape 16x14x5",
    ),
    "JSON missing": (lambda f: (f / "dataset.json").unlink(), r"dataset\.json is missing"),
    "JSON trailing comma": (trailing_comma, r"not valid JSON: .* line \d+.* comma too many"),
    "JSON is a list": (lambda f: (f / "dataset.json").write_text("[]"), r"holds a list, expected an object"),
    "JSON key missing": (lambda f: edit_json(f, file_ending=None), r"lacks file_ending"),
    "v1 modality": (lambda f: edit_json(f, modality={"0": "MR"}), r'key "modality" of nnU-Net v1.*"channel_names"'),
    "v1 labels": (lambda f: edit_json(f, labels={"0": "background", "1": "liver"}), r"inverted as in nnU-Net v1"),
    "other file ending": (lambda f: edit_json(f, file_ending=".png"), r"file_ending is '\.png', expected \.nii\.gz"),
    "mixed file endings": (lambda f: save(f / "imagesTr" / "c_0000.nii", make_image()), r"does not see c_0000\.nii"),
    "no labelsTr": (lambda f: (f / "labelsTr").rename(f / "labels"), r"labelsTr is missing"),
}


def test_sound(folder: Path, call: Call) -> None:
    assert verify_raw_dataset(folder) == []
    assert call(["doctor", "-d", "7"])[0] == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault: str, folder: Path, call: Call) -> None:
    make, message = FAULTS[fault]
    make(folder)
    problems = verify_raw_dataset(folder)
    assert any(re.search(message, problem) for problem in problems), problems
    code, out, error = call(["doctor", "-d", "7"])
    assert code == 4, out + error


def test_one_fault_gives_one_problem(folder: Path) -> None:
    with_voxel(label(folder), 5, np.uint8)
    assert len(verify_raw_dataset(folder)) == 1


def test_every_fault_is_reported(folder: Path) -> None:
    with_voxel(label(folder), 5, np.uint8)
    with_voxel(image(folder), np.nan, np.float32)
    save(folder / "labelsTr" / "z.nii.gz", make_label())
    assert len(verify_raw_dataset(folder)) == 3


def test_cases_listed_in_dataset_json(folder: Path) -> None:
    """nnU-Net also takes the files from a list, wherever they lie."""
    listed = {
        case: {
            "images": [f"imagesTr/{case}_{channel:04d}.nii.gz" for channel in range(4)],
            "label": f"labelsTr/{case}.nii.gz",
        }
        for case in "ab"
    }
    edit_json(folder, dataset=listed)
    assert verify_raw_dataset(folder) == []
    label(folder).unlink()
    assert any("a.nii.gz does not exist" in problem for problem in verify_raw_dataset(folder))


def test_shear_matters_only_to_itk(folder: Path) -> None:
    """Row 16: nibabel, which our data sets ask for, reads sheared directions; nnU-Net's default reader does not."""
    affine = AFFINE.copy()
    affine[0, 1] = 0.003 * 1.5
    for path in (*(image(folder, channel) for channel in range(4)), label(folder)):
        sheared = nibabel.Nifti1Image(np.asanyarray(nibabel.load(path).dataobj), affine)
        sheared.set_qform(None, 0)
        sheared.set_sform(affine, 1)
        nibabel.save(sheared, path)
    assert verify_raw_dataset(folder) == []
    edit_json(folder, overwrite_image_reader_writer=None)
    problems = verify_raw_dataset(folder)
    assert len(problems) == 5 and all("ITK cannot read" in problem for problem in problems)


def test_regions_are_legal(folder: Path) -> None:
    edit_json(folder, labels={"background": 0, "abdomen": [1, 2], "spleen": 2}, regions_class_order=[1, 2])
    assert verify_raw_dataset(folder) == []
