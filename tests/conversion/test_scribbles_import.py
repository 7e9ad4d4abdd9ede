"""``scribbles import``: values, names, coverage, links, channels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny_data import AFFINE, make_image, make_label, save
from tiny_scribbles import Scribbled, make_scribbled, make_scribbles

from nnunet_multimodal.conversion.channel_files import find_channel_files

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def scribbled(tmp_path: Path, nnunet_folders: dict[str, str]) -> Scribbled:
    return make_scribbled(tmp_path / "in", Path(nnunet_folders["nnUNet_raw"]))


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_dataset_and_coverage(scribbled: Scribbled, call: Call) -> None:
    names = ["--label-names", "liver=1", "spleen=2"]
    code, text, error = call(scribbled.arguments(*names, "--dense", str(scribbled.dense().parent)))
    assert code == 0, error
    folder = scribbled.dataset
    content = read_json(folder / "dataset.json")
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert content["channel_names"] == {"0": "MR"} and content["numTraining"] == 2
    assert content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    assert (voxels(folder / "labelsTr" / "a.nii.gz") == make_scribbles(unlabelled=3)).all()
    assert (folder / "imagesTr" / "a_0000.nii.gz").is_symlink()
    assert (folder / "labelsTr_dense" / "b.nii.gz").resolve() == scribbled.dense("b").resolve()

    report = read_json(folder / "coverage.json")
    liver = report["cases"]["a"]["liver"]
    assert liver == {"voxels": 3, "of_all": round(3 / (16 * 14 * 6), 6), "of_class": 3 / 120, "right": 1.0}
    assert report["classes"]["spleen"]["voxels"] == 4 and report["classes"]["background"]["voxels"] == 24
    assert "liver: 6 voxels drawn, 0.223% of all, 2.5% of the class; 100.0% of them as in the dense labels" in text


def test_itk_snap_style(scribbled: Scribbled, call: Call) -> None:
    """0 is where nobody drew, 9 is background; the classes are numbered from 1 whatever their values."""
    for case in "ab":
        drawn = make_scribbles(unlabelled=0, background=9)
        drawn[drawn == 2] = 5
        save(scribbled.scribbles(case), drawn)
    save(scribbled.dense(), np.where(make_label() == 2, 5, make_label()))
    scribbled.dense("b").unlink()
    words = [
        "--background-label",
        "9",
        "--label-names",
        "liver=1",
        "spleen=5",
        "--dense",
        str(scribbled.dense().parent),
    ]
    code, _, error = call(scribbled.arguments(*words, unlabelled="0"))
    assert code == 0, error
    assert (voxels(scribbled.dataset / "labelsTr" / "b.nii.gz") == make_scribbles(unlabelled=3)).all()
    assert [path.name for path in (scribbled.dataset / "labelsTr_dense").iterdir()] == ["a.nii.gz"]
    assert (voxels(scribbled.dataset / "labelsTr_dense" / "a.nii.gz") == make_label()).all()
    report = read_json(scribbled.dataset / "coverage.json")
    assert report["cases"]["a"]["background"]["right"] == 1.0
    assert report["classes"]["spleen"]["of_class"] == pytest.approx(2 / 48, abs=1e-6)
    assert "of_class" not in report["cases"]["b"]["liver"]


def test_classes_without_names(scribbled: Scribbled, call: Call) -> None:
    code, text, error = call(scribbled.arguments())
    assert code == 0, error
    labels = read_json(scribbled.dataset / "dataset.json")["labels"]
    assert labels == {"background": 0, "class_1": 1, "class_2": 2, "ignore": 3}
    assert "of the class" not in text  # without dense labels nobody knows
    assert not (scribbled.dataset / "labelsTr_dense").exists()


def test_names_and_unlabelled_value_from_json(scribbled: Scribbled, call: Call) -> None:
    names = scribbled.root / "names.json"
    names.write_text('{"labels": {"background": 0, "liver": 1, "spleen": 2, "ignore": 4}}', encoding="utf-8")
    words = scribbled.arguments("--labels-json", str(names))
    del words[words.index("--unlabelled") : words.index("--unlabelled") + 2]
    assert call(words)[0] == 0
    assert (voxels(scribbled.dataset / "labelsTr" / "a.nii.gz") == make_scribbles(unlabelled=3)).all()
    code, _, error = call([*words, "--unlabelled", "255", "--overwrite"])
    assert code == 2 and "--unlabelled is 255, but the label names have ignore=4" in error


def test_merged_classes(scribbled: Scribbled, call: Call) -> None:
    """Drawn as 2 where the dense labels say 1 is right, if both are the tumour."""
    drawn = make_scribbles()
    drawn[3, 4, 1] = 2
    save(scribbled.scribbles(), drawn)
    words = ["--label-names", "tumour=1,2", "--dense", str(scribbled.dense().parent)]
    code, _, error = call(scribbled.arguments(*words))
    assert code == 0, error
    assert read_json(scribbled.dataset / "dataset.json")["labels"] == {"background": 0, "tumour": 1, "ignore": 2}
    label = voxels(scribbled.dataset / "labelsTr" / "a.nii.gz")
    assert (label == 1).sum() == 6 and (label == 2).sum() == (drawn == 4).sum()
    assert (voxels(scribbled.dataset / "labelsTr_dense" / "a.nii.gz") == (make_label() > 0)).all()
    tumour = read_json(scribbled.dataset / "coverage.json")["cases"]["a"]["tumour"]
    assert tumour["right"] == 1.0 and tumour["of_class"] == pytest.approx(6 / 168, abs=1e-6)


def test_unnamed_classes_to_background(scribbled: Scribbled, call: Call) -> None:
    """What was drawn on the spleen teaches that it is not liver."""
    dense = ["--dense", str(scribbled.dense().parent)]
    code, _, error = call(scribbled.arguments("--label-names", "liver=1", *dense))
    assert code == 4 and "undeclared labels, found 2" in error
    code, _, error = call(scribbled.arguments("--label-names", "liver=1", *dense, "--unnamed-to-background"))
    assert code == 0, error
    label = voxels(scribbled.dataset / "labelsTr" / "a.nii.gz")
    assert (label == 0).sum() == 12 + 2 and (label == 1).sum() == 3
    assert (voxels(scribbled.dataset / "labelsTr_dense" / "a.nii.gz") == (make_label() == 1)).all()
    assert read_json(scribbled.dataset / "coverage.json")["cases"]["a"]["background"]["right"] == 1.0


def test_wrong_strokes_are_counted(scribbled: Scribbled, call: Call) -> None:
    drawn = make_scribbles()
    drawn[9:12, 5, 3] = 1  # on organ 2
    save(scribbled.scribbles(), drawn)
    code, _, error = call(scribbled.arguments("--dense", str(scribbled.dense().parent)))
    assert code == 0, error
    assert read_json(scribbled.dataset / "coverage.json")["cases"]["a"]["class_1"]["right"] == 0.5


def test_uncompressed_files_and_repairs(scribbled: Scribbled, call: Call) -> None:
    """What cannot be linked as it is gets written, on the grid of its own file."""
    image = make_image().astype(np.float32)
    image[3, 3, 3] = np.nan
    scribbled.image().unlink()
    save(scribbled.image().with_suffix(""), image)
    assert call(scribbled.arguments())[0] == 4
    code, _, error = call(scribbled.arguments("--nan-to", "0"))
    assert code == 0, error
    written = scribbled.dataset / "imagesTr" / "a_0000.nii.gz"
    assert not written.is_symlink() and voxels(written)[3, 3, 3] == 0
    assert np.allclose(nibabel.load(scribbled.dataset / "labelsTr" / "a.nii.gz").affine, AFFINE)


def test_patients_stay_together(scribbled: Scribbled, call: Call) -> None:
    for case in "ab":
        for path in (scribbled.image(case), scribbled.scribbles(case)):
            path.rename(path.with_name(f"p1_{case}.nii.gz"))
    assert call(scribbled.arguments("--patient-pattern", r"p\d+"))[0] == 0
    section = read_json(scribbled.dataset / "dataset.json")["nnunet_multimodal"]
    assert section["case_patient"] == {"p1_a": "p1", "p1_b": "p1"}
    assert section["modalities"] == ["MR"]


# --- several channels ------------------------------------------------------------------------------------------------


def in_hounsfield_units(seed: int) -> np.ndarray:
    image = make_image(seed)
    return np.where(image == 0, -1000, image).astype(np.int16)


def test_two_channels_in_two_folders(scribbled: Scribbled, call: Call) -> None:
    for seed, case in enumerate("ab"):
        save(scribbled.root / "ct" / f"{case}.nii.gz", in_hounsfield_units(seed))
    images = ["--images", f"CT={scribbled.root / 'ct'}", f"MR={scribbled.image().parent}"]
    code, text, error = call(scribbled.arguments(*images))
    assert code == 0, error
    assert read_json(scribbled.dataset / "dataset.json")["channel_names"] == {"0": "CT", "1": "MR"}
    assert voxels(scribbled.dataset / "imagesTr" / "b_0000.nii.gz").min() == -1000
    assert voxels(scribbled.dataset / "imagesTr" / "b_0001.nii.gz").min() == 0
    assert read_json(scribbled.dataset / "coverage.json")["body_overlap"]["a"]["MR"] > 0.9
    assert "nnUNetTrainerCmFNet" in text
    assert call(["doctor", "-d", "7"])[0] == 0


def test_two_folders_of_numbered_cases(tmp_path: Path) -> None:
    """In a folder of its own the second channel's p_0001 is case p_0001, if the first has it, and no channel 1 of p."""
    names = {"ct": ("p_0000", "p_0001", "p_0002", "q_0000"), "mr": ("p_0000", "p_0001", "p_0002", "q_0001")}
    for folder, stems in names.items():
        for stem in stems:
            save(tmp_path / folder / f"{stem}.nii.gz", make_image())
    found = find_channel_files({"CT": tmp_path / "ct", "MR": tmp_path / "mr"})
    assert {case: [path.name.removesuffix(".nii.gz") for path in files] for case, files in found.items()} == {
        "p": ["p_0000"] * 2, "p_0001": ["p_0001"] * 2, "p_0002": ["p_0002"] * 2, "q": ["q_0000", "q_0001"],
    }  # fmt: skip


@pytest.mark.parametrize("names", [("Flair", "T1c"), ("0000", "0001")])
def test_two_channels_in_one_folder(names: tuple[str, str], scribbled: Scribbled, call: Call) -> None:
    folder = scribbled.root / "both"
    for case in "ab":
        for number, name in enumerate(names):
            save(folder / f"{case}_{name}.nii.gz", make_image(number) + number)
    code, _, error = call(scribbled.arguments("--images", f"FLAIR={folder}", f"T1c={folder}"))
    assert code == 0, error
    for number in (0, 1):
        placed = scribbled.dataset / "imagesTr" / f"a_{number:04d}.nii.gz"
        assert placed.resolve() == (folder / f"a_{names[number]}.nii.gz").resolve()


def test_channels_that_do_not_pair_up(scribbled: Scribbled, call: Call) -> None:
    folder = scribbled.root / "both"
    save(folder / "a_Flair.nii.gz", make_image())
    save(folder / "a_T1c.nii.gz", make_image())
    save(folder / "b_T1c.nii.gz", make_image())
    images = ["--images", f"FLAIR={folder}", f"T1c={folder}"]
    code, _, error = call(scribbled.arguments(*images))
    assert code == 4 and "FLAIR" in error and "1 cases without an image: b" in error
    code, _, error = call(scribbled.arguments("--images", f"FLAIR={folder}", f"DWI={folder}"))
    assert code == 4 and "holds no image of DWI" in error and "_DWI or _0001" in error
    save(folder / "b_Flair.nii.gz", make_image())
    save(folder / "b_0000.nii.gz", make_image())
    code, _, error = call(scribbled.arguments(*images))
    assert code == 4 and "Case id 'b' comes from" in error
    code, _, error = call(scribbled.arguments("--images", f"FLAIR={folder}", f"FLAIR={folder}"))
    assert code == 2 and "FLAIR more than once" in error
    code, _, error = call(scribbled.arguments("--images", str(folder), str(folder)))
    assert code == 2 and "NAME=DIR" in error
    assert not scribbled.dataset.exists()


def test_images_of_two_patients_are_no_pair(scribbled: Scribbled, call: Call) -> None:
    for case in "ab":
        moved = np.roll(make_image(), 6 if case == "b" else 0, axis=0)
        save(scribbled.root / "t2" / f"{case}.nii.gz", moved)
    images = ["--images", f"T1={scribbled.image().parent}", f"T2={scribbled.root / 't2'}"]
    code, _, error = call(scribbled.arguments(*images))
    assert code == 4
    assert re.search(r"case b: the bodies in T1 and T2 overlap by 0\.\d+ \(Dice\), expected 0\.9", error), error
    assert "case a" not in error and not scribbled.dataset.exists()
    assert call(scribbled.arguments(*images, "--allow-unregistered"))[0] == 0


# --- a mask per class ------------------------------------------------------------------------------------------------


def save_masks(scribbled: Scribbled) -> list[str]:
    """Folders of masks as in ITK-SNAP: 0 and one other value; case b has nothing drawn on the spleen."""
    for case in "ab":
        drawn = make_scribbles()
        for name, value in (("background", 0), ("liver", 1), ("spleen", 2)):
            if (case, name) != ("b", "spleen"):
                save(scribbled.root / name / f"{case}.nii.gz", ((drawn == value) * 7).astype(np.uint8))
    return [f"{name}={scribbled.root / name}" for name in ("liver", "spleen", "background")]


def without_unlabelled(words: list[str]) -> list[str]:
    at = words.index("--unlabelled")
    return words[:at] + words[at + 2 :]


def test_mask_per_class(scribbled: Scribbled, call: Call) -> None:
    words = ["--scribbles", *save_masks(scribbled), "--dense", str(scribbled.dense().parent)]
    code, _, error = call(without_unlabelled(scribbled.arguments(*words)))
    assert code == 0, error
    assert (voxels(scribbled.dataset / "labelsTr" / "a.nii.gz") == make_scribbles(unlabelled=3)).all()
    assert not (voxels(scribbled.dataset / "labelsTr" / "b.nii.gz") == 2).any()
    labels = read_json(scribbled.dataset / "dataset.json")["labels"]
    assert labels == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert [path.name for path in scribbled.raw.iterdir()] == ["Dataset007_Tiny"]  # no folder left behind


def test_mask_per_class_with_a_voxel_of_two(scribbled: Scribbled, call: Call) -> None:
    """Row 27: file, voxel and classes."""
    masks = save_masks(scribbled)
    drawn = make_scribbles()
    twice = (drawn == 2) | (drawn == 1)
    save(scribbled.root / "spleen" / "a.nii.gz", twice.astype(np.uint8))
    code, _, error = call(without_unlabelled(scribbled.arguments("--scribbles", *masks)))
    assert code == 4
    # stored left to right: the first drawn voxel in RAS, x 6 of 16, is 9
    pattern = r"spleen/a\.nii\.gz has 3 voxels that are drawn as liver and spleen, the first at voxel \(9, 5, 2\)"
    assert re.search(pattern, error), error
    save(scribbled.root / "spleen" / "a.nii.gz", drawn)
    code, _, error = call(without_unlabelled(scribbled.arguments("--scribbles", *masks)))
    assert code == 4 and "is no mask: it has the values 0, 1, 2, 4" in error
    assert not any(scribbled.raw.iterdir())


def test_mask_per_class_usage(scribbled: Scribbled, call: Call) -> None:
    masks = save_masks(scribbled)
    code, _, error = call(scribbled.arguments("--scribbles", *masks))
    assert code == 2 and "--unlabelled is for label maps" in error
    code, _, error = call(without_unlabelled(scribbled.arguments("--scribbles", *masks[:2])))
    assert code == 2 and "background=DIR" in error
    code, _, error = call(without_unlabelled(scribbled.arguments("--scribbles", *masks[:2], "--no-background")))
    assert code == 0, error


# --- real scribbles --------------------------------------------------------------------------------------------------


def test_real_scribbles(data_dir: Path, tmp_path: Path, nnunet_folders: dict[str, str], call: Call) -> None:
    """Three of ACDC's frames: the counts are those of the files themselves."""
    folder = data_dir / "cardiac_scribble"
    for part in ("images", "scribbles", "labels"):
        (tmp_path / part).mkdir()
        for case in ("patient001", "patient012", "patient023"):
            (tmp_path / part / f"{case}.nii.gz").symlink_to((folder / part / f"{case}.nii.gz").resolve())
    words = ["scribbles", "import", "--images", str(tmp_path / "images"), "--scribbles", str(tmp_path / "scribbles")]
    words += ["--unlabelled", "4", "-d", "603", "--dense", str(tmp_path / "labels")]
    code, _, error = call([*words, "--label-names", "right_ventricle=1", "myocardium=2", "left_ventricle=3"])
    assert code == 0, error
    made = Path(nnunet_folders["nnUNet_raw"]) / "Dataset603_Scribbled"
    report = read_json(made / "coverage.json")
    assert report["cases"]["patient001"]["background"]["voxels"] == 4123
    assert report["cases"]["patient001"]["left_ventricle"]["voxels"] == 1265
    assert report["cases"]["patient001"]["myocardium"]["right"] == pytest.approx(0.998, abs=1e-3)
    assert 0.001 < sum(shares["of_all"] for shares in report["classes"].values()) < 0.02
    assert (made / "labelsTr" / "patient001.nii.gz").is_symlink()  # 4 is what the data set calls it, too
    assert call(["doctor", "-d", "603"])[0] == 0
