"""The scripts that mix public CT and MR, on made-up trees of the layouts that their docstrings describe."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from test_dataset_scripts import SCRIPTS, in_lps, load, make_case, write_chaos, write_series
from tiny_data import SHAPE, make_image, save

from nnunet_multimodal.conversion.images import Volume, read_labels, read_volume
from nnunet_multimodal.conversion.merge_masks import merge_masks
from nnunet_multimodal.conversion.mixed_script import choose_cases
from nnunet_multimodal.conversion.script import run_script
from nnunet_multimodal.errors import DataProblem, UsageError


def ct_image(seed: int = 0) -> np.ndarray:
    image = make_image(seed)
    return np.where(image == 0, -1000, image).astype(np.int16)  # air around the body, as in HU


def blocks(values: list[int]) -> np.ndarray:
    """int16 [X, Y, Z]: four voxels of each value, the rest 0."""
    label = np.zeros(SHAPE, dtype=np.int16)
    for index, value in enumerate(values):
        label[index % SHAPE[0], 4 * (index // SHAPE[0]) : 4 * (index // SHAPE[0]) + 4, 2] = value
    return label


def made(folders: dict[str, str], name: str) -> tuple[Path, dict[str, Any]]:
    folder = Path(folders["nnUNet_raw"]) / name
    return folder, json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def end(script: str, *words: str | Path) -> int:
    """The exit code that a user's script ends with, in this process."""
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: load(script).main([*map(str, words)]))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def nothing_made(folders: dict[str, str]) -> bool:
    return not any(Path(folders["nnUNet_raw"]).iterdir())


# --- AMOS ------------------------------------------------------------------------------------------------------------

ALL_15 = blocks([*range(1, 16)])


def write_amos(root: Path, *numbers: int, split: str = "Tr") -> Path:
    for number in numbers:
        image = ct_image(number) if number <= 500 else make_image(number)
        save(root / f"images{split}" / f"amos_{number:04d}.nii.gz", image)
        save(root / f"labels{split}" / f"amos_{number:04d}.nii.gz", ALL_15)
    return root


def test_amos(tmp_path: Path, nnunet_folders: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """The number tells the modality; bladder and prostate/uterus are background."""
    root = tmp_path / "AMOS"
    write_amos(root / "amos22", 1, 410, 500, 501, 600)
    assert load("amos").main([str(root), "-d", "604"]) == 0
    folder, content = made(nnunet_folders, "Dataset604_AMOS")
    assert content["labels"] == {
        "background": 0,
        "spleen": 1,
        "right_kidney": 2,
        "left_kidney": 3,
        "gall_bladder": 4,
        "esophagus": 5,
        "liver": 6,
        "stomach": 7,
        "aorta": 8,
        "postcava": 9,
        "pancreas": 10,
        "right_adrenal_gland": 11,
        "left_adrenal_gland": 12,
        "duodenum": 13,
    }
    assert content["nnunet_multimodal"]["modalities"] == ["CT", "MR"]
    assert content["nnunet_multimodal"]["case_modality"] == {
        "amos_0001": "CT",
        "amos_0410": "CT",
        "amos_0500": "CT",
        "amos_0501": "MR",
        "amos_0600": "MR",
    }
    label = read_labels(folder / "labelsTr" / "amos_0501.nii.gz").data
    expected = read_labels(root / "amos22" / "labelsTr" / "amos_0501.nii.gz").data
    assert (label == np.where(expected > 13, 0, expected)).all() and set(np.unique(label)) == set(range(14))
    assert (folder / "imagesTr" / "amos_0410_0000.nii.gz").exists()
    assert "warning" not in caplog.text  # no image looks like the other modality


def test_amos_validation_and_organs(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    write_amos(tmp_path / "amos22", 1, 507)
    write_amos(tmp_path / "amos22", 8, 540, split="Va")
    words = [str(tmp_path / "amos22"), "-d", "604", "--with-validation", "--organs", "liver", "spleen", "liver"]
    assert load("amos").main([*words, "--harmonise", "paper"]) == 0
    folder, content = made(nnunet_folders, "Dataset604_AMOS")
    assert [*content["nnunet_multimodal"]["case_modality"]] == ["amos_0001", "amos_0008", "amos_0507", "amos_0540"]
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert content["nnunet_multimodal"]["harmonise"] == "paper"
    label = read_labels(folder / "labelsTr" / "amos_0540.nii.gz").data
    assert (np.bincount(label.ravel(), minlength=3)[1:] == 4).all() and label.max() == 2
    image = read_volume(folder / "imagesTr" / "amos_0001_0000.nii.gz").data
    assert image.min() == 0 and image.max() <= 1


def chosen(ct: int, mr: int, ratio: float | None, seed: int = 0) -> tuple[list[str], list[str]]:
    args = argparse.Namespace(balance=ratio, seed=seed, roots=["root"], root=Path("data"))
    found = {
        "CT": {f"c{index:03d}": index for index in range(ct)},
        "MR": {f"m{index:03d}": index for index in range(mr)},
    }
    cases = choose_cases(args, found)
    assert all(found[modality][case] == value for modality, of in cases.items() for case, value in of.items())
    return [*cases["CT"]], [*cases["MR"]]


@pytest.mark.parametrize(
    ("ratio", "counts"),
    [
        (None, (162, 54)),
        (1, (54, 54)),
        (2, (108, 54)),
        (3, (162, 54)),
        (5, (160, 32)),
        (0.5, (27, 54)),
        (2.5, (135, 54)),
    ],
)
def test_balance(ratio: float | None, counts: tuple[int, int]) -> None:
    """162 CT and 54 MR are the paper's; a ratio that there are too few CT cases for leaves out MR cases."""
    ct, mr = chosen(162, 54, ratio)
    assert (len(ct), len(mr)) == counts
    assert ct == sorted(set(ct)) and mr == sorted(set(mr))


def test_balance_is_drawn_with_the_seed() -> None:
    assert chosen(162, 54, 1, seed=3) == chosen(162, 54, 1, seed=3)
    assert chosen(162, 54, 1, seed=3)[0] != chosen(162, 54, 1, seed=4)[0]
    with pytest.raises(UsageError, match="--balance 200 leaves no case of 162 CT and 54 MR cases"):
        chosen(162, 54, 200)


def amos_faults(root: Path) -> dict[str, tuple[Callable[[], object], list[str], int, str]]:
    """What is wrong -> how, more arguments, exit code, message."""

    def rename(old: int, new: str) -> None:
        for part in ("imagesTr", "labelsTr"):
            (root / part / f"amos_{old:04d}.nii.gz").rename(root / part / f"{new}.nii.gz")

    def drop(*parts: str) -> None:
        root.joinpath(*parts).unlink()

    def only_ct() -> None:
        for part in ("imagesTr", "labelsTr"):
            drop(part, "amos_0507.nii.gz")

    def image_tr() -> None:
        (root / "imagesTr").rename(root / "images")

    def nothing() -> None:
        pass

    return {
        "not AMOS": (image_tr, [], 4, "has no imagesTr"),
        "no MR": (only_ct, [], 4, "1 CT and 0 MR cases found in .*; a mixed data set needs both"),
        "number too high": (lambda: rename(507, "amos_0601"), [], 4, "not of AMOS22.*: amos_0601"),
        "other name": (lambda: rename(507, "liver_1"), [], 4, "not of AMOS22.*: liver_1"),
        "label missing": (lambda: drop("labelsTr", "amos_0001.nii.gz"), [], 4, "1 without a label: amos_0001"),
        "orphan label": (lambda: drop("imagesTr", "amos_0001.nii.gz"), [], 4, "1 labels without an image: amos_0001"),
        "no validation": (nothing, ["--with-validation"], 2, "No such folder of images: .*imagesVa"),
        "case in both": (
            lambda: write_amos(root, 1, split="Va"),
            ["--with-validation"],
            4,
            "Case id 'amos_0001' comes",
        ),
        "unknown organ": (nothing, ["--organs", "heart"], 2, "invalid choice: 'heart'"),
        "no ratio": (nothing, ["--balance", "0"], 2, "expected CT cases per MR case"),
        "no number": (nothing, ["-d", "0"], 2, "from 1 to 999, found 0"),
    }


@pytest.mark.parametrize("fault", [*amos_faults(Path())])
def test_amos_faults(
    fault: str, tmp_path: Path, nnunet_folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_amos(tmp_path / "amos", 1, 507)
    damage, more, code, message = amos_faults(root)[fault]
    damage()
    assert end("amos", root, "-d", "604", *more) == code
    assert re.search(message, capsys.readouterr().err)
    assert nothing_made(nnunet_folders)


# --- MM-WHS ----------------------------------------------------------------------------------------------------------

WHS_VALUES = [500, 600, 420, 550, 205, 820, 850]  # in the order of the script's labels


def write_mm_whs(root: Path) -> Path:
    for index, name in enumerate(("ct_train/ct_train_1001", "mr_train/mr_train_1010", "mr_train/mr_train_1011")):
        save(root / f"{name}_image.nii.gz", ct_image(index) if name.startswith("ct") else make_image(index))
        save(root / f"{name}_label.nii.gz", blocks(WHS_VALUES))
    save(root / "mr_test" / "mr_test_2001_image.nii.gz", make_image())
    return root


def test_mm_whs(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    root = write_mm_whs(tmp_path / "whs")
    save(root / "mr_train" / "mr_train_1010_label.nii.gz", blocks([*WHS_VALUES, 421]))
    assert load("mm_whs").main([str(root), "-o", str(tmp_path / "out"), "-d", "605"]) == 0
    folder, content = made(nnunet_folders, "Dataset605_MMWHS")
    assert [*content["labels"]][1:] == [
        "left_ventricle",
        "right_ventricle",
        "left_atrium",
        "right_atrium",
        "myocardium",
        "ascending_aorta",
        "pulmonary_artery",
    ]
    assert content["nnunet_multimodal"]["case_modality"] == {
        "ct_train_1001": "CT",
        "mr_train_1010": "MR",
        "mr_train_1011": "MR",
    }
    for case, last in (("mr_train_1010", [3]), ("mr_train_1011", [])):  # 421 is the left atrium
        label = read_labels(folder / "labelsTr" / f"{case}.nii.gz").data
        save(tmp_path / "expected.nii.gz", blocks([*range(1, 8), *last]))
        assert (label == read_labels(tmp_path / "expected.nii.gz").data).all()
    assert (folder / "imagesTr" / "ct_train_1001_0000.nii.gz").resolve() == root / "ct_train/ct_train_1001_image.nii.gz"


def test_mm_whs_leaves_out_a_bad_case(tmp_path: Path, nnunet_folders: dict[str, str], run_python: Callable) -> None:
    root = write_mm_whs(tmp_path / "whs")
    save(root / "mr_train" / "mr_train_1010_label.nii.gz", blocks([*WHS_VALUES, 430]))
    words = (SCRIPTS / "mm_whs.py", root, "-o", tmp_path / "out", "-d", "605")
    result = run_python(*words, env=nnunet_folders)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "failed: mr_train_1010" in result.stderr and "found 430 (4 voxels)" in result.stderr
    content = made(nnunet_folders, "Dataset605_MMWHS")[1]
    assert [*content["nnunet_multimodal"]["case_modality"]] == ["ct_train_1001", "mr_train_1011"]
    save(root / "mr_train" / "mr_train_1010_label.nii.gz", blocks(WHS_VALUES))
    result = run_python(*words, "--overwrite", env=nnunet_folders)
    assert result.returncode == 0, result.stderr
    assert made(nnunet_folders, "Dataset605_MMWHS")[1]["numTraining"] == 3


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("mr_train/mr_train_1010_label.nii.gz", None, r"mr_train_1010 in .* has no label"),
        ("ct_train/ct_train_1001_image.nii.gz", None, r"ct_train_1001 in .* has no image"),
        (None, "copy/mr_train_1010_image.nii.gz", r"Case id 'mr_train_1010' comes from .* and "),
    ],
)
def test_mm_whs_faults(
    drop: str | None, add: str | None, message: str, tmp_path: Path, nnunet_folders: dict[str, str]
) -> None:
    root = write_mm_whs(tmp_path / "whs")
    if drop:
        (root / drop).unlink()
    if add:
        save(root / add, make_image())
    with pytest.raises(DataProblem, match=message):
        load("mm_whs").main([str(root), "-o", str(tmp_path / "out"), "-d", "605"])
    assert nothing_made(nnunet_folders) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["amos", "empty"], "error: empty has no imagesTr"),
        (["mm_whs", "empty", "-o", "out"], "error: 0 CT and 0 MR cases found in empty; a mixed"),
        (["chaos_mixed", "empty", "-o", "out"], "error: 0 CT and 0 MR cases found in empty; a mixed"),
        (
            ["totalsegmentator", "empty", "empty", "-o", "out"],
            "error: 0 CT and 0 MR cases found in empty and empty; a mixed",
        ),
    ],
)
def test_a_wrong_folder(
    words: list[str], message: str, tmp_path: Path, nnunet_folders: dict[str, str], run_python: Callable
) -> None:
    """As a user runs the scripts."""
    (tmp_path / "empty").mkdir()
    result = run_python(SCRIPTS / f"{words[0]}.py", *words[1:], "-d", "605", env=nnunet_folders)
    assert result.returncode == 4 and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert nothing_made(nnunet_folders) and not (tmp_path / "out").exists()


def test_what_is_asked_before_reading(
    tmp_path: Path, nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_mm_whs(tmp_path / "whs")
    words = [root, "-o", tmp_path / "out", "-d", "605"]
    assert end("mm_whs", tmp_path / "missing", *words[1:]) == 2
    assert f"No such folder: {tmp_path / 'missing'}" in capsys.readouterr().err
    (Path(nnunet_folders["nnUNet_raw"]) / "Dataset605_Old").mkdir()
    assert end("mm_whs", *words) == 2
    assert "Data set 605 exists" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_raw")
    assert end("mm_whs", *words) == 3
    assert "nnUNet_raw is not set" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- CHAOS -----------------------------------------------------------------------------------------------------------


def write_chaos_ct(root: Path, patient: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    image, labels = make_case(seed)
    image, liver = image - np.int16(1000), labels == 1
    folder = root / "Train_Sets" / "CT" / patient
    write_series(folder / "DICOM_anon", image, "i{:04d},0000b.dcm", descending=True)
    (folder / "Ground").mkdir()
    for z, plane in enumerate(liver):
        picture = sitk.GetImageFromArray(plane.astype(np.uint8) * 255)
        sitk.WriteImage(picture, str(folder / "Ground" / f"liver_GT_{len(liver) - 1 - z:03d}.png"))
    return image, liver


def test_chaos_mixed(
    tmp_path: Path, nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, run_python: Callable
) -> None:
    root = tmp_path / "CHAOS"
    ct = write_chaos_ct(root, "1", seed=5)
    mr = write_chaos(root, "1", seed=6)[0]
    monkeypatch.syspath_prepend(SCRIPTS)  # where a user's Python looks, because the script lies there
    words = [str(root), "-o", str(tmp_path / "out"), "-d", "606", "--contrasts", "t1in", "t1out"]
    assert load("chaos_mixed").main(words) == 0
    folder, content = made(nnunet_folders, "Dataset606_CHAOSLiver")
    assert content["labels"] == {"background": 0, "liver": 1}
    assert content["nnunet_multimodal"]["case_modality"] == {"ct01": "CT", "mr01_t1in": "MR", "mr01_t1out": "MR"}
    assert content["nnunet_multimodal"]["case_patient"] == {"ct01": "ct01", "mr01_t1in": "mr01", "mr01_t1out": "mr01"}
    assert (in_lps(folder / "imagesTr" / "ct01_0000.nii.gz") == ct[0]).all()
    assert (in_lps(folder / "labelsTr" / "ct01.nii.gz") == ct[1]).all()
    assert (in_lps(folder / "imagesTr" / "mr01_t1out_0000.nii.gz") == 2 * mr).all()
    assert (in_lps(folder / "labelsTr" / "mr01_t1in.nii.gz") == (make_case(6)[1] == 1)).all()
    assert set(np.unique(in_lps(tmp_path / "out" / "labels" / "mr01_t1in.nii.gz"))) == {0, 1, 2, 3, 4}


def test_chaos_mixed_faults(tmp_path: Path, nnunet_folders: dict[str, str], run_python: Callable) -> None:
    """The MR folder alone; a CT that lacks a mask."""
    root = tmp_path / "CHAOS"
    write_chaos(root, "1", seed=6)
    words = ("-o", tmp_path / "out", "-d", "606", "--contrasts", "t1in")
    result = run_python(SCRIPTS / "chaos_mixed.py", root, *words, env=nnunet_folders)
    assert result.returncode == 4 and "0 CT and 1 MR cases" in result.stderr
    write_chaos_ct(root, "2", seed=5)
    (root / "Train_Sets" / "CT" / "2" / "Ground" / "liver_GT_000.png").unlink()
    result = run_python(SCRIPTS / "chaos_mixed.py", root, *words, env=nnunet_folders)
    assert result.returncode == 4 and "Traceback" not in result.stderr
    assert "failed: ct02" in result.stderr and "holds 4 masks" in result.stderr
    assert "0 CT and 1 MR cases can be read" in result.stderr
    assert nothing_made(nnunet_folders)


# --- TotalSegmentator ------------------------------------------------------------------------------------------------


def box(x: slice, y: slice = slice(3, 9)) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=np.uint8)
    mask[x, y, 1:5] = 1
    return mask


LIVER, GALLBLADDER = box(slice(3, 9)), box(slice(7, 10), slice(4, 7))  # they share x 7 and 8: 2 * 3 * 4 voxels
SPLEEN, NOTHING = box(slice(11, 13)), np.zeros(SHAPE, dtype=np.uint8)
SHARED = 24


def write_total(root: Path) -> tuple[Path, Path]:
    masks = {"liver": LIVER, "gallbladder": GALLBLADDER, "spleen": SPLEEN}
    for modality, image in (("ct", ct_image()), ("mri", make_image())):
        for case in ("s0000", "s0001", "s0009"):
            folder = root / modality / case
            save(folder / f"{modality}.nii.gz", image)
            own = {"lung_upper_lobe_left": NOTHING} if modality == "ct" else {"lung_left": NOTHING}
            for organ, mask in {**masks, **own}.items():
                save(folder / "segmentations" / f"{organ}.nii.gz", mask)
        rows = [
            "image_id;age;split",
            "s0000;50;train",
            "s0001;;val" if modality == "ct" else "s0001;;train",
            "s0009;1;test",
        ]
        (root / modality / "meta.csv").write_text("\n".join([*rows, "s0077;3;train"]), encoding="utf-8-sig")
    return root / "ct", root / "mri"


def test_totalsegmentator(tmp_path: Path, nnunet_folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Organs that both have, the test cases left out, overlaps counted and given to the smaller organ."""
    ct, mr = write_total(tmp_path)
    words = [str(ct), str(mr), "-o", str(tmp_path / "out"), "-d", "607"]
    assert load("totalsegmentator").main(words) == 0
    folder, content = made(nnunet_folders, "Dataset607_TotalSegmentator")
    assert content["labels"] == {"background": 0, "gallbladder": 1, "liver": 2, "spleen": 3}
    assert content["nnunet_multimodal"]["case_modality"] == {
        "CT_s0000": "CT",
        "CT_s0001": "CT",
        "MR_s0000": "MR",
        "MR_s0001": "MR",
    }
    expected = np.where(GALLBLADDER, 1, np.where(LIVER, 2, 3 * SPLEEN)).astype(np.uint8)
    save(tmp_path / "expected.nii.gz", expected)
    for case in content["nnunet_multimodal"]["case_modality"]:
        label = read_labels(folder / "labelsTr" / f"{case}.nii.gz").data
        assert (label == read_labels(tmp_path / "expected.nii.gz").data).all()
    assert f"{4 * SHARED} voxels in 4 cases lay in several masks: CT_s0000 ({SHARED})" in capsys.readouterr().out
    with pytest.raises(UsageError, match="made with other settings"):
        load("totalsegmentator").main([*words, "--overwrite", "--organs", "liver"])
    assert load("totalsegmentator").main([*words, "--overwrite", "--split", "all"]) == 0  # goes on with the test cases
    assert made(nnunet_folders, "Dataset607_TotalSegmentator")[1]["numTraining"] == 6


def test_totalsegmentator_organs_and_empty_cases(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    ct, mr = write_total(tmp_path)
    for organ in ("liver", "spleen"):
        save(mr / "s0001" / "segmentations" / f"{organ}.nii.gz", NOTHING)
    words = [str(ct), str(mr), "-o", str(tmp_path / "out"), "-d", "607", "--organs", "spleen", "liver"]
    assert load("totalsegmentator").main(words) == 0
    folder, content = made(nnunet_folders, "Dataset607_TotalSegmentator")
    assert content["labels"] == {"background": 0, "spleen": 1, "liver": 2} and content["numTraining"] == 4
    save(tmp_path / "expected.nii.gz", (SPLEEN + 2 * LIVER).astype(np.uint8))
    label = read_labels(folder / "labelsTr" / "CT_s0001.nii.gz").data
    assert (label == read_labels(tmp_path / "expected.nii.gz").data).all()
    assert load("totalsegmentator").main([*words, "--overwrite", "--skip-empty"]) == 0
    content = made(nnunet_folders, "Dataset607_TotalSegmentator")[1]
    assert [*content["nnunet_multimodal"]["case_modality"]] == ["CT_s0000", "CT_s0001", "MR_s0000"]


def test_totalsegmentator_leaves_out_a_bad_case(tmp_path: Path, nnunet_folders: dict[str, str]) -> None:
    """A constant image, as two of the first version of the CT data set were."""
    ct, mr = write_total(tmp_path)
    save(ct / "s0000" / "ct.nii.gz", np.zeros(SHAPE, dtype=np.int16))
    assert load("totalsegmentator").main([str(ct), str(mr), "-o", str(tmp_path / "out"), "-d", "607"]) == 1
    assert made(nnunet_folders, "Dataset607_TotalSegmentator")[1]["numTraining"] == 3


def total_faults(ct: Path, mr: Path) -> dict[str, tuple[Callable[[], object], list[str], int, str]]:
    def header(text: str) -> None:
        (mr / "meta.csv").write_text(text, encoding="utf-8")

    def swap() -> None:
        ct.rename(ct.parent / "aside")
        mr.rename(ct)
        (ct.parent / "aside").rename(mr)

    def no_cases() -> None:
        for path in mr.glob("s*"):
            path.rename(path.with_name(f"patient_{path.name}"))

    def nothing() -> None:
        pass

    spleen = ct / "s0001" / "segmentations" / "spleen.nii.gz"
    return {
        "mask missing": (spleen.unlink, [], 4, r"s0001 lacks segmentations/spleen\.nii\.gz"),
        "no such organ": (
            nothing,
            ["--organs", "livr"],
            2,
            "No CT and no MR case has a mask of 'livr'. Did you mean 'liver'",
        ),
        "organ of CT alone": (nothing, ["--organs", "lung_upper_lobe_left"], 2, "No MR case has a mask of 'lung_upper"),
        "swapped": (swap, [], 4, r"3 cases have no ct\.nii\.gz: s0000, .* swapped\?"),
        "no image": ((mr / "s0001" / "mri.nii.gz").unlink, [], 4, r"1 cases have no mri\.nii\.gz: s0001\. Unpack"),
        "no MR case": (no_cases, [], 4, "2 CT and 0 MR cases"),
        "no meta.csv": ((ct / "meta.csv").unlink, [], 4, r"meta\.csv is missing, .*--split all"),
        "case not in meta.csv": (lambda: header("image_id,split\ns0000,train"), [], 4, "2 cases are: s0001, s0009"),
        "no split": (lambda: header("image_id,age\ns0000,1"), [], 4, "lacks the column split; found image_id, age"),
        "odd split": (lambda: header("image_id,split\ns0000,tset"), [], 4, "has the split 'tset', expected train"),
    }


@pytest.mark.parametrize("fault", [*total_faults(Path(), Path())])
def test_totalsegmentator_faults(
    fault: str, tmp_path: Path, nnunet_folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    ct, mr = write_total(tmp_path)
    damage, more, code, message = total_faults(ct, mr)[fault]
    damage()
    assert end("totalsegmentator", ct, mr, "-o", tmp_path / "out", "-d", "607", *more) == code
    assert re.search(message, capsys.readouterr().err)
    assert nothing_made(nnunet_folders) and not (tmp_path / "out").exists()


# --- merging masks ---------------------------------------------------------------------------------------------------


def merged(tmp_path: Path, *masks: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels 1, 2, ... [X] of masks [X] of one line."""
    paths = {
        index: save(tmp_path / f"{index}.nii.gz", mask[:, None, None], np.eye(4)) for index, mask in enumerate(masks, 1)
    }
    image = read_volume(save(tmp_path / "image.nii.gz", np.zeros((len(masks[0]), 1, 1), np.int16), np.eye(4)))
    labels, shared = merge_masks(image, paths)
    return labels[0, 0], shared


def test_merge_masks(tmp_path: Path) -> None:
    """Sizes 6, 2 and 4; the voxel of all three goes to the smallest, whatever the order."""
    large = np.array([1, 1, 1, 1, 1, 1, 0, 0], np.uint8)
    small = np.array([0, 0, 0, 1, 1, 0, 0, 0], np.uint8)
    middle = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.uint8)
    labels, shared = merged(tmp_path, large, small, middle)
    assert labels.tolist() == [1, 1, 1, 2, 2, 3, 3, 3] and shared == 3
    assert merged(tmp_path, small, middle, large)[0].tolist() == [3, 3, 3, 1, 1, 2, 2, 2]
    assert merged(tmp_path, middle, large, small)[0].tolist() == [2, 2, 2, 3, 3, 1, 1, 1]


def test_merge_masks_of_equal_size_and_other_values(tmp_path: Path) -> None:
    left, right = np.array([1, 1, 0], np.uint8), np.array([0, 255, 255], np.uint8)
    assert merged(tmp_path, left, right)[0].tolist() == [1, 2, 2]
    assert merged(tmp_path, left, np.zeros(3, np.uint8), np.ones(3, np.float32))[0].tolist() == [1, 1, 3]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([0, 1, 2], np.uint8), "no mask: it has the values 0, 1, 2"),
        (np.array([0, -1, 0], np.int16), "values -1, 0"),
        (np.array([0, 1, 0.5], np.float32), "values 0, 0.5, 1"),
        (np.array([0, 1, np.nan], np.float32), "values 0, 1, nan"),
    ],
)
def test_merge_masks_refuses_what_is_no_mask(mask: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match=message):
        merged(tmp_path, mask)


def test_merge_masks_wants_one_grid(tmp_path: Path) -> None:
    image = Volume(tmp_path / "image.nii.gz", np.zeros((2, 2, 2)), np.eye(4), (1, 1, 1))
    mask = save(tmp_path / "mask.nii.gz", np.zeros((2, 2, 3), np.uint8), np.eye(4))
    with pytest.raises(DataProblem, match=r"mask .*mask\.nii\.gz has shape 2x2x3, its image"):
        merge_masks(image, {1: mask})
