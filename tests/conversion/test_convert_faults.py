"""Bad inputs (rows 9 to 19, 23 and 24 of the fault table), each through the command that a user types."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny_data import AFFINE, SHAPE, Inputs, make_image, make_label, save

NAMES = ("--label-names", "first=1", "second=2")


def set_voxels(path: Path, values: dict[tuple[int, int, int], float], dtype: type = np.float32) -> None:
    image = nibabel.load(path)
    array = np.asanyarray(image.dataobj).astype(dtype)
    for voxel, value in values.items():
        array[voxel] = value
    save(path, array, image.affine)


def moved(path: Path, affine: np.ndarray) -> None:
    save(path, np.asanyarray(nibabel.load(path).dataobj), affine)


def scaled(z: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[2, 2] = z
    return affine


def rotated(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return turn @ AFFINE


def shifted(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def sheared(amount: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 1] = amount * 1.5
    return affine


def shear_all(inputs: Inputs) -> None:
    for path in (inputs.image(), inputs.label()):
        array = np.asanyarray(nibabel.load(path).dataobj)
        image = nibabel.Nifti1Image(array, sheared(0.003))
        image.set_qform(None, 0)  # a qform cannot hold a shear, and ITK would fall back to it
        image.set_sform(sheared(0.003), 1)
        nibabel.save(image, path)


def truncate(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def set_pixdim(path: Path, values: tuple[float, float, float]) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[80:92] = np.array(values, dtype="<f4").tobytes()  # pixdim[1..3] of a NIfTI-1 header
    path.write_bytes(gzip.compress(bytes(raw)))


def colour(path: Path) -> None:
    array = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    save(path, array)


def twice(inputs: Inputs) -> None:
    save(inputs.images / "copy" / "a.nii", make_image())


FAULTS: dict[str, tuple[Callable[[Inputs], object], tuple[str, ...], int, str]] = {
    "9 label missing": (lambda i: i.label("b").unlink(), (), 4, r"1 without a label: b\b"),
    "9 orphan label": (lambda i: save(i.labels / "c.nii.gz", make_label()), (), 4, r"1 labels without an image: c\b"),
    "9 both": (
        lambda i: (i.label("b").unlink(), save(i.labels / "c.nii.gz", make_label())),
        (),
        4,
        r"(?s)without a label: b.*without an image: c",
    ),
    "9 ten names": (
        lambda i: [save(i.images / f"x{n:02d}.nii.gz", make_image()) for n in range(13)],
        (),
        4,
        r"13 without a label: x00, x01, .*x09 and 3 more",
    ),
    "9 no folder": (lambda i: i.images.rename(i.images.parent / "gone"), (), 2, r"No such folder of images: .*images"),
    "9 no NIfTI": (
        lambda i: [path.rename(path.with_suffix(".mha")) for path in i.images.iterdir()],
        (),
        4,
        r"No \.nii\.gz or \.nii file in .*2 other files, such as a_0000\.nii\.mha",
    ),
    "10 two sources": (twice, (), 4, r"Case id 'a' comes from a_0000\.nii\.gz and copy/a\.nii"),
    "11 empty file": (lambda i: i.image().write_bytes(b""), (), 4, r"Cannot read .*a_0000.*ends early \(got 0 bytes"),
    "11 truncated gzip": (
        lambda i: truncate(i.image(), 0.5),
        (),
        4,
        r"Cannot read .*a_0000\.nii\.gz: file ends early \(got .* of 3 kB\)",
    ),
    "11 truncated in the header": (lambda i: truncate(i.label(), 0.2), (), 4, r"a\.nii\.gz: file ends early"),
    "11 corrupt gzip": (
        lambda i: i.image().write_bytes(i.image().read_bytes()[:60] + b"\xff" * 400),
        (),
        4,
        r"Cannot read .*corrupt",
    ),
    "11 dangling link": (
        lambda i: (i.image().unlink(), i.image().symlink_to(i.images / "nowhere.nii.gz")),
        (),
        4,
        r"a_0000\.nii\.gz is a link to .*nowhere\.nii\.gz, which does not exist",
    ),
    "12 PNG": (
        lambda i: i.image().write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
        (),
        4,
        r"a_0000\.nii\.gz is not NIfTI \(starts with PNG signature\)",
    ),
    "12 not compressed": (
        lambda i: i.image().write_bytes(gzip.decompress(i.image().read_bytes())),
        (),
        4,
        r"NIfTI but not gzip-compressed\. Rename it to a_0000\.nii",
    ),
    "12 gzip of something else": (
        lambda i: i.image().write_bytes(gzip.compress(b"hello" * 200)),
        (),
        4,
        r"is not NIfTI .*bytes 68 65 6c 6c",
    ),
    "13 shape": (
        lambda i: save(i.label(), make_label()[:, :, :5]),
        (),
        4,
        r"label .*a\.nii\.gz has shape 16x14x5, its image .*a_0000\.nii\.gz has 16x14x6.*re-export the label",
    ),
    "14 spacing": (
        lambda i: moved(i.label(), scaled(5)),
        (),
        4,
        r"spacing \(1\.5, 1\.5, 5\.0\) mm.*\(1\.5, 1\.5, 6\.0\) mm.*--fix-header",
    ),
    "15 angle": (
        lambda i: moved(i.label(), rotated(3)),
        (),
        4,
        r"direction off by 3\.00 degrees.*--allow-affine-mismatch",
    ),
    "15 shift": (lambda i: moved(i.label(), shifted(2)), (), 4, r"0\.00 degrees, origin by 2\.00 mm"),
    "16 shear": (shear_all, (), 4, r"ITK cannot read .*a_0000\.nii\.gz \(shear 0\.003\).*--reorthonormalize"),
    "17 zero spacing": (
        lambda i: set_pixdim(i.image(), (0, 1.5, 6)),
        (),
        4,
        r"spacing \(0\.0, 1\.5, 6\.0\) is invalid in .*a_0000",
    ),
    "17 negative spacing": (lambda i: set_pixdim(i.image(), (1.5, -1.5, 6)), (), 4, r"\(1\.5, -1\.5, 6\.0\) is inv"),
    "17 NaN spacing": (lambda i: set_pixdim(i.label(), (1.5, 1.5, np.nan)), (), 4, r"\(1\.5, 1\.5, nan\) is invalid"),
    "18 NaN": (
        lambda i: set_voxels(i.image(), {(3, 3, 3): np.nan, (4, 3, 3): np.inf}),
        (),
        4,
        r"a_0000\.nii\.gz has 2 voxels that are not numbers \(1 NaN, 1 infinite\).*--nan-to",
    ),
    "18 NaN label": (lambda i: set_voxels(i.label(), {(3, 3, 3): np.nan}), ("--nan-to", "0"), 4, r"a\.nii\.gz .*nan"),
    "19 constant": (
        lambda i: save(i.image(), np.full(SHAPE, -1024, np.int16)),
        (),
        4,
        r"a_0000\.nii\.gz is constant \(-1024\); normalisation would divide by zero",
    ),
    "19 constant once NaN is replaced": (
        lambda i: save(i.image(), np.full(SHAPE, np.nan, np.float32)),
        ("--nan-to", "0"),
        4,
        r"is constant \(0\)",
    ),
    "23 mask of 255": (
        lambda i: save(i.label(), make_label() // 2 * 255),
        (),
        4,
        r"a 0/255 mask, found 255 \(48 voxels\).*Map 255 to 1",
    ),
    "23 fraction": (
        lambda i: set_voxels(i.label(), {(3, 3, 2): 0.9999, (4, 3, 2): 0.9999}),
        NAMES,
        4,
        r"no whole numbers, found 0\.9999 \(2 voxels\), expected 0\.\.2.*never rounded",
    ),
    "23 fraction, nothing declared": (lambda i: set_voxels(i.label(), {(3, 3, 2): 1.5}), (), 4, r"found 1\.5 \(1 "),
    "23 negative": (
        lambda i: set_voxels(i.label(), {(0, 0, 0): -1}, np.int16),
        (),
        4,
        r"negative labels, found -1 \(1 voxel\)",
    ),
    "24 undeclared": (
        lambda i: set_voxels(i.label(), {(0, 0, 0): 5}, np.uint8),
        NAMES,
        4,
        r"found 5 \(1 voxel\), declared 0\.\.2",
    ),
    "24 gap in the files": (
        lambda i: set_voxels(i.label(), {(0, 0, 0): 5}, np.uint8),
        (),
        4,
        r"gaps: found 0, 1, 2, 5, nnU-Net needs 0\.\.3\. Map 5 to 3",
    ),
    "24 gap in the names": (lambda i: None, ("--label-names", "first=1", "second=3"), 4, r"found 0, 1, 3, nnU"),
    "25 ignore not highest": (
        lambda i: None,
        ("--label-names", "ignore=1", "second=2"),
        4,
        r"ignore must be 3 \(max label 2 \+ 1\); found 1",
    ),
    "4D": (
        lambda i: save(i.image(), np.zeros((*SHAPE, 2), np.int16)),
        (),
        4,
        r"has 4 axes \(16x14x6x2\), expected 3\.",
    ),
    "2D": (lambda i: save(i.image(), np.zeros(SHAPE[:2], np.int16)), (), 4, r"has 2 axes \(16x14\), expected 3"),
    "RGB": (lambda i: colour(i.image()), (), 4, r"is a colour image \(R/G/B\)"),
    "no such repair value": (lambda i: None, ("--nan-to", "nan"), 2, r"expected a number, found 'nan'"),
    "bad name": (lambda i: None, ("--name", "a b"), 2, r"Data set name 'a b' must consist of"),
    "bad id": (lambda i: None, ("-d", "1000"), 2, r"from 1 to 999, found 1000"),
    "bad label name": (lambda i: None, ("--label-names", "liver"), 2, r"expected NAME=ID such as liver=1"),
    "every 0": (lambda i: None, ("--every", "0"), 2, r"--every .*at least 1, found 0"),
    "JSON is no label map": (
        lambda i: (i.raw.parent / "n.json").write_text("[1,]"),
        ("--labels-json", "n.json"),
        2,
        r"n\.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_nothing_is_written(
    fault: str,
    inputs: Inputs,
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    make, options, code, message = FAULTS[fault]
    make(inputs)
    monkeypatch.chdir(tmp_path)
    found_code, _, error = call(inputs.arguments(*options))
    assert re.search(message, error), error
    assert found_code == code
    assert "Traceback" not in error
    assert [*inputs.raw.iterdir()] == []


def test_problems_of_all_cases_are_listed(inputs: Inputs, call: Callable[..., tuple[int, str, str]]) -> None:
    inputs.image("a").write_bytes(b"")
    moved(inputs.label("b"), scaled(5))
    code, _, error = call(inputs.arguments())
    assert code == 4
    assert "2 problems" in error and "a_0000" in error and "b.nii.gz" in error


def test_raw_folder_must_be_set(
    inputs: Inputs, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("nnUNet_raw")
    code, _, error = call(inputs.arguments())
    assert code == 3 and "nnUNet_raw is not set" in error


REPAIRS: dict[str, tuple[Callable[[Inputs], object], tuple[str, ...]]] = {
    "18": (lambda i: set_voxels(i.image(), {(3, 3, 3): np.nan}), ("--nan-to", "0")),
    "14": (lambda i: moved(i.label(), scaled(5)), ("--fix-header",)),
    "15": (lambda i: moved(i.label(), rotated(3)), ("--fix-header",)),
    "16": (shear_all, ("--reorthonormalize",)),
}


@pytest.mark.parametrize("row", REPAIRS)
def test_repaired_data_set_is_sound(row: str, inputs: Inputs, call: Callable[..., tuple[int, str, str]]) -> None:
    from nnunet_multimodal.conversion.verify import verify_raw_dataset

    make, options = REPAIRS[row]
    make(inputs)
    before = {path: path.read_bytes() for path in (inputs.image(), inputs.label())}
    code, _, error = call(inputs.arguments(*options))
    assert code == 0, error
    assert verify_raw_dataset(inputs.raw / "Dataset007_CrossMR") == []
    assert before == {path: path.read_bytes() for path in before}, "the user's files must not be touched"


def test_allowed_affine_mismatch_keeps_both_headers(inputs: Inputs, call: Callable[..., tuple[int, str, str]]) -> None:
    moved(inputs.label(), shifted(2))
    assert call(inputs.arguments("--allow-affine-mismatch"))[0] == 0
    written = nibabel.load(inputs.raw / "Dataset007_CrossMR" / "labelsTr" / "a.nii.gz")
    assert np.allclose(written.affine, shifted(2))
    scribble = nibabel.load(inputs.raw / "Dataset007_CrossMR" / "imagesTr" / "a_0002.nii.gz")
    assert np.allclose(scribble.affine, AFFINE)
