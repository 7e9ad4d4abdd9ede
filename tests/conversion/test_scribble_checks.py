"""Rows 27 and 28: scribble files that do not fit their image, and reading and writing one grid."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny_data import AFFINE, make_image, save

from nnunet_multimodal.conversion.images import check_scribbles, read_labels, read_volume, write_like
from nnunet_multimodal.errors import DataProblem

ORGANS = {"liver": 1, "spleen": 2}
BIG = (40, 40, 8)


def image_and(tmp_path: Path, voxels: dict[tuple[int, int, int], int], affine: np.ndarray = AFFINE):
    """An image with a body of 20 x 20 pixels in the middle, and a scribble file."""
    image = np.zeros(BIG, np.int16)
    image[10:30, 10:30] = 100
    image[15:20, 15:20] = 0  # bowel gas belongs to the body
    scribbles = np.zeros(BIG, np.uint8)
    for voxel, value in voxels.items():
        scribbles[voxel] = value
    return (
        read_volume(save(tmp_path / "image.nii.gz", image)),
        read_labels(save(tmp_path / "scribbles.nii.gz", scribbles, affine)),
    )


def test_good_scribbles(tmp_path: Path) -> None:
    image, scribbles = image_and(tmp_path, {(12, 12, 3): 1, (17, 17, 3): 2})
    assert check_scribbles(scribbles, image, ORGANS) is scribbles


def test_outside_the_body(tmp_path: Path) -> None:
    image, scribbles = image_and(tmp_path, {(12, 12, 3): 1, (3, 36, 5): 2})
    # stored left to right: x 3 is 40 - 1 - 3 = 36 in RAS; mm from the file's own affine
    place = AFFINE @ (3, 36, 5, 1)
    mm = rf"{place[0]:.1f}, {place[1]:.1f}, {place[2]:.1f} mm"
    with pytest.raises(DataProblem, match=rf"scribbles\.nii\.gz .*outside the body \(spleen\).*\(36, 36, 5\).*{mm}"):
        check_scribbles(scribbles, image, ORGANS)


def test_undeclared_class(tmp_path: Path) -> None:
    image, scribbles = image_and(tmp_path, {(12, 12, 3): 7})
    with pytest.raises(DataProblem, match=r"undeclared class 7, .*\(27, 12, 3\).*declared: 0 none, 1 liver, 2 spleen"):
        check_scribbles(scribbles, image, ORGANS)


def test_on_the_ignore_label(tmp_path: Path) -> None:
    image, scribbles = image_and(tmp_path, {(12, 12, 3): 1})
    dense = np.zeros(BIG, np.uint8)
    dense[12, 12, 3] = 3
    label_map = read_labels(save(tmp_path / "dense.nii.gz", dense))
    with pytest.raises(DataProblem, match=r"1 scribbled voxels on the ignore label \(liver\)"):
        check_scribbles(scribbles, image, {**ORGANS, "ignore": 3}, label_map)
    with pytest.raises(DataProblem, match="undeclared class 3"):
        check_scribbles(label_map, image, {**ORGANS, "ignore": 3})


def test_other_grid_names_the_scribble_file(tmp_path: Path) -> None:
    shifted = AFFINE.copy()
    shifted[1, 3] += 3
    image, scribbles = image_and(tmp_path, {(12, 12, 3): 1}, shifted)
    with pytest.raises(DataProblem, match=r"scribble .*scribbles\.nii\.gz does not lie where .*origin by 3\.00 mm"):
        check_scribbles(scribbles, image, ORGANS)
    fixed = check_scribbles(scribbles, image, ORGANS, fix_header=True)
    assert np.array_equal(fixed.affine, image.affine)


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPS", "PSR", "SAL"])
def test_round_trip_in_any_storage_order(axes: str, tmp_path: Path) -> None:
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    stored = nibabel.Nifti1Image(make_image(), AFFINE)
    stored = stored.as_reoriented(ornt_transform(io_orientation(AFFINE), axcodes2ornt(axes)))
    nibabel.save(stored, tmp_path / "image.nii.gz")
    volume = read_volume(tmp_path / "image.nii.gz")
    assert (volume.data == make_image()[::-1].transpose(2, 1, 0)).all()
    assert volume.spacing == (6, 1.5, 1.5)
    write_like(tmp_path / "mask.nii.gz", volume.data > 50, volume)
    written = nibabel.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(written.affine, stored.affine)
    assert (np.asanyarray(written.dataobj) == (np.asanyarray(stored.dataobj) > 50)).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.nii.gz", "mask.nii.gz"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "image.nii.gz", make_image())
    volume, before = read_volume(path), path.read_bytes()

    def fail(_: object, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel, "save", fail)
    with pytest.raises(OSError, match="No space"):
        write_like(path, volume.data, volume)
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def test_scaled_integers_are_read_as_nnunet_reads_them(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(make_image().astype(np.float32) / 7, AFFINE)
    image.header.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "image.nii.gz")
    volume = read_volume(tmp_path / "image.nii.gz")
    assert volume.header["scl_slope"] != 1  # the file really is scaled
    assert np.allclose(volume.data, make_image()[::-1].transpose(2, 1, 0) / 7, atol=1e-3)
    write_like(tmp_path / "again.nii.gz", volume.data, volume)
    assert np.allclose(read_volume(tmp_path / "again.nii.gz").data, volume.data, atol=1e-4)


def test_reorthonormalized_direction_is_the_nearest_rotation(tmp_path: Path) -> None:
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    affine[0, 1] = 0.1
    image = nibabel.Nifti1Image(make_image(), affine)
    image.set_qform(None, 0)
    image.set_sform(affine, 1)
    nibabel.save(image, tmp_path / "image.nii.gz")
    volume = read_volume(tmp_path / "image.nii.gz", reorthonormalize=True)
    lengths = np.linalg.norm(volume.affine[:3, :3], axis=0)
    directions = volume.affine[:3, :3] / lengths
    assert np.allclose(directions.T @ directions, np.eye(3))
    assert np.allclose(lengths, [2, np.hypot(1, 0.1), 3])
    # The sheared axis is off by atan(0.1) = 5.71 degrees: the nearest rotation shares it between the two axes.
    assert np.degrees(np.arccos(directions[0, 0])) == pytest.approx(5.71 / 2, abs=0.02)
