"""``convert channels``: a scribbled reference on the grid of targets that lie and are cut differently."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny_data import save

from nnunet_multimodal.conversion.channels import prepare_channels
from nnunet_multimodal.conversion.images import read_volume

Call = Callable[..., tuple[int, str, str]]
ORGANS = {"liver": 1, "spleen": 2}
REFERENCE = np.diag([2.0, 2.0, 8.0, 1.0])  # 24 x 20 voxels in plane, 6 slices
SHAPE = (24, 20, 6)


def ramp(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """An image whose value is a linear function of the place: linear interpolation keeps it exactly."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    return (100 + places @ (3.0, 2.0, 1.0)).astype(np.float32)


def rotation(degrees: float, axis: int = 2) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    first, second = (other for other in range(3) if other != axis)
    turn = np.eye(4)
    turn[np.ix_([first, second], [first, second])] = [[c, -s], [s, c]]
    return turn


def world(affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Places [n, 3] in mm of the voxels of a mask [X, Y, Z]."""
    return np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """From each place of ``first`` to the nearest of ``second``, in mm."""
    return np.linalg.norm(first[:, None] - second[None], axis=-1).min(axis=1)


@pytest.fixture
def scribbled(tmp_path: Path) -> tuple[Path, Path, np.ndarray]:
    """Reference, scribble file and scribbles [X, Y, Z]: liver in slices 2 and 4, spleen in slice 2."""
    scribbles = np.zeros(SHAPE, np.uint8)
    scribbles[5:12, 6, 2] = 1
    scribbles[6, 5:9, 4] = 1
    scribbles[15, 10, 2] = 2  # a single voxel
    return (
        save(tmp_path / "T1.nii.gz", ramp(SHAPE, REFERENCE), REFERENCE),
        save(tmp_path / "S.nii.gz", scribbles, REFERENCE),
        scribbles,
    )


def run(scribbled: tuple, target: Path, out: Path, dims: int, **options: object) -> list[np.ndarray]:
    """Channels [X, Y, Z] in RAS of the target."""
    files = prepare_channels(scribbled[0], scribbled[1], [target], ORGANS, out, dims, **options)  # type: ignore[arg-type]
    name = target.name.removesuffix(".nii.gz")
    assert [path.name for path in files] == [f"{name}_{channel:04d}.nii.gz" for channel in range(4)]
    volumes = [read_volume(path) for path in files]
    for volume in volumes:
        assert np.allclose(volume.affine, volumes[0].affine)
    return [volume.data.transpose(2, 1, 0) for volume in volumes]


@pytest.mark.parametrize("dims", [2, 3])
def test_same_grid_changes_nothing(dims: int, scribbled: tuple, tmp_path: Path) -> None:
    target = save(tmp_path / "T2.nii.gz", 500 - ramp(SHAPE, REFERENCE), REFERENCE)
    channels = run(scribbled, target, tmp_path / "out", dims)
    assert (tmp_path / "out" / "T2_0000.nii.gz").resolve() == target
    assert np.allclose(channels[0], 500 - ramp(SHAPE, REFERENCE))
    assert (channels[2] == (scribbled[2] == 1)).sum() == channels[2].size - 7 * (dims == 2)
    assert (channels[3] == (scribbled[2] == 2)).all()
    if dims == 3:
        assert np.allclose(channels[1], ramp(SHAPE, REFERENCE))
    else:
        # Slice 3 lies between the scribbled 2 and 4 of the liver and shows the lower; the others show themselves.
        expected = ramp(SHAPE, REFERENCE)
        expected[:, :, 3] = expected[:, :, 2]
        assert np.allclose(channels[1], expected)
        assert (channels[2][:, :, 3] == (scribbled[2][:, :, 2] == 1)).all()


def rotated_target() -> tuple[np.ndarray, tuple[int, int, int]]:
    """Turned by 12 degrees about z and 5 about x, finer in plane, thinner slices, stored left to right."""
    affine = rotation(12) @ rotation(5, axis=0) @ np.diag([-1.3, 1.1, 5.0, 1.0])
    affine[:3, 3] += np.array([23, 19, 22]) - affine[:3, :3] @ (19, 17, 4)
    return affine, (40, 36, 9)


def test_rotated_target_3d(scribbled: tuple, tmp_path: Path) -> None:
    affine, shape = rotated_target()
    target = save(tmp_path / "T2.nii.gz", ramp(shape, affine), affine)
    channels = run(scribbled, target, tmp_path / "out", 3)
    truth = channels[0]  # what the reference shows at each place, as the ramp depends on the place alone
    canonical = read_volume(target).affine
    places = world(canonical, np.ones(truth.shape, bool)).reshape(*truth.shape, 3)
    index = places @ np.linalg.inv(REFERENCE[:3, :3]).T
    well_inside = ((index >= 0) & (index <= np.array(SHAPE) - 1)).all(axis=-1)
    assert well_inside.mean() > 0.3
    assert np.allclose(channels[1][well_inside], truth[well_inside], atol=1e-2)
    outside = ((index < -0.51) | (index > np.array(SHAPE) - 0.49)).any(axis=-1)
    assert outside.any() and np.allclose(channels[1][outside], ramp(SHAPE, REFERENCE).min())
    half_voxel = np.linalg.norm([1.3, 1.1, 5.0]) / 2
    for organ in (1, 2):
        wanted = world(REFERENCE, scribbled[2] == organ)
        marked = world(canonical, channels[1 + organ] > 0)
        assert distances(wanted, marked).max() <= half_voxel, "a scribbled voxel has vanished"
        assert distances(marked, wanted).max() <= np.linalg.norm([2, 2, 8]) / 2 + 1e-6, "a mark far from any scribble"


def test_rotated_target_2d(scribbled: tuple, tmp_path: Path) -> None:
    affine, shape = rotated_target()
    target = save(tmp_path / "T2.nii.gz", ramp(shape, affine), affine)
    channels = run(scribbled, target, tmp_path / "out", 2)
    canonical = read_volume(target).affine
    centres = (np.array([[19.5, 17.5, z, 1] for z in range(9)]) @ canonical.T)[:, 2] / 8
    served = [-1 if round(z) not in (2, 3, 4) else 2 if round(z) in (2, 3) else 4 for z in centres]
    assert {2, 4, -1} == set(served)
    for z, slice_ in enumerate(served):
        if slice_ < 0:
            assert not channels[2][:, :, z].any() and not channels[3][:, :, z].any()
            continue
        for organ in (1, 2):
            wanted = world(REFERENCE, scribbled[2] == organ)
            wanted = wanted[wanted[:, 2] == 8 * slice_][:, :2]
            if organ == 2 and slice_ == 4:
                continue  # the spleen is asked for in its own slice alone
            mask = np.zeros(shape, bool)
            mask[:, :, z] = channels[1 + organ][:, :, z]
            if organ == 2 and round(centres[z]) != 2:
                assert not mask.any()
                continue
            marked = world(canonical, mask)[:, :2]
            assert distances(wanted, marked).max() < 1.1, "a scribbled pixel has vanished"
            assert distances(marked, wanted).max() < 2.0


@pytest.mark.parametrize("dims", [2, 3])
def test_single_voxels_survive_on_a_coarse_grid(dims: int, scribbled: tuple, tmp_path: Path) -> None:
    """Nearest-neighbour sampling of 10 mm pixels would step over almost every voxel of 2 mm."""
    affine = np.diag([10.0, 10.0, 8.0, 1.0])
    target = save(tmp_path / "T2.nii.gz", ramp((5, 4, 6), affine), affine)
    channels = run(scribbled, target, tmp_path / "out", dims)
    assert np.argwhere(channels[3]).tolist() == [[3, 2, 2]]  # 30 mm, 20 mm: voxel (15, 10) of the reference
    assert [2, 1, 2] in np.argwhere(channels[2]).tolist()


@pytest.mark.parametrize("dims", [2, 3])
def test_other_frame_is_matched_by_order(
    dims: int, scribbled: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another patient: twice as many slices elsewhere; laid over each other centre on centre."""
    affine = np.diag([2.0, 2.0, 4.0, 1.0])
    affine[:3, 3] = 0, 0, 5000
    shape = (24, 20, 11)
    target = save(tmp_path / "T2.nii.gz", ramp(shape, affine), affine)
    channels = run(scribbled, target, tmp_path / "out", dims)
    assert "do not share a frame" in caplog.text
    assert (channels[2][:, :, 4] == (scribbled[2][:, :, 2] == 1)).all()  # slice 4 of 11 goes with slice 2 of 6
    assert np.allclose(channels[1][:, :, 4], ramp(SHAPE, REFERENCE)[:, :, 2])


def test_reach_serves_slices_beyond_the_scribbles(scribbled: tuple, tmp_path: Path) -> None:
    target = save(tmp_path / "T2.nii.gz", ramp(SHAPE, REFERENCE), REFERENCE)
    for reach, slices in ((0.0, [2]), (8.0, [1, 2, 3]), (np.inf, [0, 1, 2, 3, 4, 5])):
        channels = run(scribbled, target, tmp_path / f"out{reach}", 2, reach=reach)
        assert np.flatnonzero(channels[3].any(axis=(0, 1))).tolist() == slices


def arguments(scribbled: tuple, out: Path, *targets: Path) -> list[str]:
    names = [f"{name}={value}" for name, value in ORGANS.items()]
    return [
        "convert",
        "channels",
        "--reference",
        str(scribbled[0]),
        "--scribbles",
        str(scribbled[1]),
        "--targets",
        *map(str, targets),
        "-o",
        str(out),
        "--label-names",
        *names,
    ]


def test_command(scribbled: tuple, tmp_path: Path, call: Call, nnunet_folders: dict[str, str]) -> None:
    """Organs from the model's data set, targets from a folder; a second run needs --overwrite."""
    folder = Path(nnunet_folders["nnUNet_raw"]) / "Dataset005_X"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))
    save(tmp_path / "targets" / "p1.nii.gz", ramp(SHAPE, REFERENCE), REFERENCE)
    save(tmp_path / "targets" / "p2.nii", ramp(SHAPE, REFERENCE), REFERENCE)
    out = tmp_path / "out"
    words = [*arguments(scribbled, out, tmp_path / "targets")[: -len(ORGANS) - 1], "-d", "5"]
    code, text, error = call(words)
    assert code == 0, error
    assert "nnUNetv2_predict" in text
    assert len([*out.iterdir()]) == 8
    assert not (out / "p2_0000.nii.gz").is_symlink()
    code, _, error = call(words)
    assert code == 2 and "already holds p1_0000.nii.gz" in error and "--overwrite" in error
    assert call([*words, "--overwrite"])[0] == 0
    assert len([*out.iterdir()]) == 8


FAULTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "reference missing": (lambda p: (p / "T1.nii.gz").unlink(), 4, r"T1\.nii\.gz does not exist"),
    "target constant": (lambda p: save(p / "T2.nii.gz", np.ones(SHAPE)), 4, r"T2\.nii\.gz is constant"),
    "target truncated": (lambda p: (p / "T2.nii.gz").write_bytes(b"\x1f\x8b"), 4, r"Cannot read .*T2\.nii\.gz"),
    "scribble on another grid": (
        lambda p: save(p / "S.nii.gz", np.ones((24, 20, 5), np.uint8), REFERENCE),
        4,
        r"scribble .*S\.nii.* has shape",
    ),
    "scribble of an unknown organ": (
        lambda p: save(p / "S.nii.gz", np.full(SHAPE, 9, np.uint8), REFERENCE),
        4,
        r"undeclared class 9",
    ),
    "no scribble": (lambda p: save(p / "S.nii.gz", np.zeros(SHAPE, np.uint8), REFERENCE), 4, r"S\.nii\.gz holds no"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named_and_nothing_is_written(fault: str, scribbled: tuple, tmp_path: Path, call: Call) -> None:
    make, expected, message = FAULTS[fault]
    target = save(tmp_path / "T2.nii.gz", ramp(SHAPE, REFERENCE), REFERENCE)
    good = save(tmp_path / "A.nii.gz", ramp(SHAPE, REFERENCE), REFERENCE)
    make(tmp_path)
    code, _, error = call(arguments(scribbled, tmp_path / "out", good, target))
    assert (code, bool(re.search(message, error))) == (expected, True), error
    assert not (tmp_path / "out").exists()


def test_scribbles_that_miss_the_target(scribbled: tuple, tmp_path: Path, call: Call) -> None:
    """The lower two slices of the same patient hold no scribble."""
    target = save(tmp_path / "T2.nii.gz", ramp((24, 20, 2), REFERENCE), REFERENCE)
    code, _, error = call(arguments(scribbled, tmp_path / "out", target))
    assert code == 4 and "lies within" in error
    assert not (tmp_path / "out").exists()


def test_two_targets_of_one_name(scribbled: tuple, tmp_path: Path, call: Call) -> None:
    targets = [save(tmp_path / part / "T2.nii.gz", ramp(SHAPE, REFERENCE), REFERENCE) for part in "ab"]
    code, _, error = call(arguments(scribbled, tmp_path / "out", *targets))
    assert code == 4 and "Case id 'T2' comes from" in error


def test_failure_while_writing_leaves_no_half_case(
    scribbled: tuple, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = save(tmp_path / "T2.nii.gz", ramp(SHAPE, REFERENCE), REFERENCE)
    written: list[object] = []
    save_nifti = nibabel.save

    def fail_at_the_third(image: object, path: Path) -> None:
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        save_nifti(image, path)

    monkeypatch.setattr(nibabel, "save", fail_at_the_third)
    assert call(arguments(scribbled, tmp_path / "out", target))[0] == 1
    assert len(written) == 3 and [*(tmp_path / "out").iterdir()] == []


def test_slices_are_those_of_the_plans(tmp_path, monkeypatch) -> None:
    """The plans of the data set say along which axis the model takes its slices; without plans nobody does."""
    from nnunet_multimodal.commands.convert import _slice_axis

    for name in ("raw", "preprocessed"):
        (tmp_path / name / "Dataset007_Seven").mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    assert _slice_axis("7") is None
    (tmp_path / "preprocessed/Dataset007_Seven/nnUNetPlans.json").write_text('{"transpose_forward": [2, 0, 1]}')
    assert _slice_axis("7") == 2
    assert _slice_axis(None) is None
