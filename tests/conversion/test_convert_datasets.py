"""What ``convert crossmr | scribble | plain`` write, and what they leave behind when they are stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny_data import Inputs, make_image, make_label, save

from nnunet_multimodal.conversion import crossmr, dataset
from nnunet_multimodal.conversion.verify import verify_raw_dataset

Call = Callable[..., tuple[int, str, str]]


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def test_crossmr_layout(inputs: Inputs, call: Call) -> None:
    code, out, error = call(inputs.arguments("--label-names", "liver=1", "spleen=2", "--seed", "3"))
    assert code == 0, error
    folder = inputs.raw / "Dataset007_CrossMR"
    assert str(folder) in out and "nnUNetv2_train 7 2d 0 -tr nnUNetTrainerCrossMR" in out
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert content["channel_names"] == {"0": "target", "1": "reference", "2": "noNorm", "3": "noNorm"}
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert (content["numTraining"], content["file_ending"]) == (2, ".nii.gz")
    assert content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    assert "modality" not in content
    assert content["nnunet_multimodal"]["layout"] == "crossmr"
    assert content["nnunet_multimodal"]["source"]["seed"] == 3
    names = sorted(path.name for path in (folder / "imagesTr").iterdir())
    assert names == [f"{case}_{channel:04d}.nii.gz" for case in "ab" for channel in range(4)]
    for channel in ("0000", "0001"):
        link = folder / "imagesTr" / f"a_{channel}.nii.gz"
        assert link.is_symlink() and link.resolve() == inputs.image("a").resolve()
    label = make_label()
    for organ in (1, 2):
        scribble = voxels(folder / "imagesTr" / f"a_{organ + 1:04d}.nii.gz")
        assert scribble.dtype == np.uint8
        assert set(np.unique(scribble)) == {0, 1}
        assert (label[scribble > 0] == organ).all()
        drawn = scribble.any(axis=(0, 1))  # every slice of the organ, across the coarse axis z
        assert (drawn == (label == organ).any(axis=(0, 1))).all()


def test_nnunet_reads_all_channels_on_one_grid(inputs: Inputs, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

    call(inputs.arguments())
    folder = inputs.raw / "Dataset007_CrossMR"
    files = [str(path) for path in sorted((folder / "imagesTr").glob("a_*"))]
    data, properties = NibabelIOWithReorient().read_images(files)
    label, _ = NibabelIOWithReorient().read_seg(str(folder / "labelsTr" / "a.nii.gz"))
    assert "WARNING" not in capsys.readouterr().out
    assert data.shape == (4, 6, 14, 16)
    assert np.allclose(properties["spacing"], (6, 1.5, 1.5))
    for organ in (1, 2):
        assert data[organ + 1].any() and (label[0][data[organ + 1] > 0] == organ).all()
    # The files are stored left to right; in RAS organ 1 has to come out mirrored.
    assert (label[0] == make_label()[::-1].transpose(2, 1, 0)).all()


@pytest.mark.parametrize(("kind", "channels"), [("scribble", ["MR", "noNorm", "noNorm"]), ("plain", ["MR"])])
def test_other_layouts(kind: str, channels: list[str], inputs: Inputs, call: Call) -> None:
    code, _, error = call(["convert", kind, "--images", str(inputs.images), "--labels", str(inputs.labels), "-d", "8"])
    assert code == 0, error
    folder = inputs.raw / f"Dataset008_{kind.capitalize()}"
    content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert [*content["channel_names"].values()] == channels
    assert content["labels"] == {"background": 0, "class_1": 1, "class_2": 2}
    assert len([*(folder / "imagesTr").iterdir()]) == 2 * len(channels)
    assert verify_raw_dataset(folder) == []


def test_names_from_a_dataset_json(inputs: Inputs, call: Call, tmp_path: Path) -> None:
    names = tmp_path / "dataset.json"
    names.write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))
    assert call(inputs.arguments("--labels-json", str(names)))[0] == 0
    content = json.loads((inputs.raw / "Dataset007_CrossMR" / "dataset.json").read_text(encoding="utf-8"))
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2}


def test_uncompressed_input_is_compressed(inputs: Inputs, call: Call) -> None:
    inputs.image("a").unlink()
    inputs.label("a").unlink()
    save(inputs.images / "a.nii", make_image())
    save(inputs.labels / "a.nii", make_label())
    assert call(inputs.arguments())[0] == 0
    folder = inputs.raw / "Dataset007_CrossMR"
    assert not (folder / "imagesTr" / "a_0000.nii.gz").is_symlink()
    for channel in ("0000", "0001"):
        assert (voxels(folder / "imagesTr" / f"a_{channel}.nii.gz") == make_image()).all()
    assert (voxels(folder / "labelsTr" / "a.nii.gz") == make_label()).all()


def test_a_case_has_the_same_scribble_whatever_else_is_converted(inputs: Inputs, call: Call) -> None:
    call(inputs.arguments())
    scribble = inputs.raw / "Dataset007_CrossMR" / "imagesTr" / "b_0002.nii.gz"
    before = voxels(scribble)
    for path in (inputs.image("a"), inputs.label("a")):
        path.unlink()
    assert call(inputs.arguments("--overwrite"))[0] == 0
    assert (voxels(scribble) == before).all()
    assert call(inputs.arguments("--overwrite", "--seed", "1"))[0] == 0
    assert (voxels(scribble) != before).any()


def test_existing_data_set_is_kept_without_overwrite(inputs: Inputs, call: Call) -> None:
    old = inputs.raw / "Dataset007_Other"
    old.mkdir()
    (old / "precious").touch()
    code, _, error = call(inputs.arguments())
    assert code == 2 and "Data set 7 exists" in error and "--overwrite" in error
    assert [*inputs.raw.iterdir()] == [old]
    assert call(inputs.arguments("--overwrite"))[0] == 0
    assert [path.name for path in inputs.raw.iterdir()] == ["Dataset007_CrossMR"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_interruption_leaves_what_was_there(
    stop: BaseException, overwrite: bool, inputs: Inputs, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    if overwrite:
        call(inputs.arguments("--name", "Old"))
    before = sorted(path.name for path in inputs.raw.rglob("*"))
    seen: list[str] = []
    write_case = crossmr._write_case

    def write_then_stop(folder: Path, checked: crossmr.CheckedCase, *rest: object) -> None:
        if seen:
            raise stop
        seen.append(checked.files.case)
        write_case(folder, checked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(crossmr, "_write_case", write_then_stop)
    code, _, _ = call(inputs.arguments(*(["--overwrite"] if overwrite else [])))
    assert seen == ["a"]
    assert code == (130 if stop is KeyboardInterrupt else 1)
    assert sorted(path.name for path in inputs.raw.rglob("*")) == before


def test_failing_rename_brings_the_old_data_set_back(
    inputs: Inputs, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(inputs.arguments("--name", "Old"))
    before = sorted(path.name for path in inputs.raw.rglob("*"))
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == "Dataset007_New":
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    code, _, error = call(inputs.arguments("--name", "New", "--overwrite"))
    assert code == 1 and "Permission denied" in error
    assert sorted(path.name for path in inputs.raw.rglob("*")) == before


def test_leftovers_of_dead_processes_are_cleared(inputs: Inputs, call: Call) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = process.pid
    stale = inputs.raw / f".Dataset007_CrossMR.partial-{dead}"
    alive = inputs.raw / f".Dataset007_CrossMR.partial-{os.getppid()}"
    other = inputs.raw / f".Dataset008_CrossMR.partial-{dead}"
    for folder in (stale, alive, other):
        (folder / "imagesTr").mkdir(parents=True)
    assert call(inputs.arguments())[0] == 0
    assert not stale.exists() and alive.exists() and other.exists()


def test_data_set_set_aside_by_a_killed_run_comes_back(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    aside = tmp_path / f".Dataset007_Old.replaced-{process.pid}"
    aside.mkdir()
    (aside / "dataset.json").touch()
    dataset.remove_stale(tmp_path, 7)
    assert (tmp_path / "Dataset007_Old" / "dataset.json").exists() and not aside.exists()


def test_files_are_copied_where_links_are_not_allowed(
    inputs: Inputs, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("links are not supported")

    monkeypatch.setattr(os, "symlink", refuse)
    assert call(inputs.arguments())[0] == 0
    folder = inputs.raw / "Dataset007_CrossMR" / "imagesTr"
    for channel in ("0000", "0001"):
        copied = folder / f"a_{channel}.nii.gz"
        assert not copied.is_symlink() and copied.read_bytes() == inputs.image("a").read_bytes()


def test_names_with_spaces_and_umlauts(inputs: Inputs, call: Call) -> None:
    inputs.image("a").rename(inputs.images / "Fall ä 1.nii.gz")
    inputs.label("a").rename(inputs.labels / "Fall ä 1.nii.gz")
    assert call(inputs.arguments())[0] == 0
    folder = inputs.raw / "Dataset007_CrossMR"
    assert (folder / "imagesTr" / "Fall ä 1_0003.nii.gz").exists()
    assert verify_raw_dataset(folder) == []


def test_absent_organs_and_empty_cases_are_noted(inputs: Inputs, call: Call, caplog: pytest.LogCaptureFixture) -> None:
    save(inputs.label("b"), np.zeros_like(make_label()))
    assert call(inputs.arguments("--label-names", "liver=1", "spleen=2", "aorta=3"))[0] == 0
    assert "no case has aorta (3)" in caplog.text
    assert "1 cases have no labelled voxel: b" in caplog.text


def test_real_mr(data_dir: Path, nnunet_folders: dict[str, str], tmp_path: Path, call: Call) -> None:
    """Two patients of CHAOS, stored L, A, S."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
        for case in ("mr01", "mr02"):
            os.symlink(data_dir / "abdomen_mr_t2" / kind / f"{case}.nii.gz", tmp_path / kind / f"{case}.nii.gz")
    code, _, error = call(
        [
            "convert",
            "crossmr",
            "--reference-images",
            str(tmp_path / "images"),
            "--labels",
            str(tmp_path / "labels"),
            "-d",
            "601",
            "--label-names",
            "liver=1",
            "right_kidney=2",
            "left_kidney=3",
            "spleen=4",
        ]
    )
    assert code == 0, error
    folder = Path(nnunet_folders["nnUNet_raw"]) / "Dataset601_CrossMR"
    assert verify_raw_dataset(folder) == []
    liver = voxels(folder / "imagesTr" / "mr01_0002.nii.gz")
    organ = voxels(folder / "labelsTr" / "mr01.nii.gz") == 1
    assert not (liver[~organ]).any()
    assert 0.002 < liver.sum() / organ.sum() < 0.5
