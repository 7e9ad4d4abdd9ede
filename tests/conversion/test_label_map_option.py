"""``--label-map``: the ids of public data sets become MRSegmentator's organs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from tiny_data import make_image, make_label, save

from nnunet_multimodal.data.modality import SECTION

Call = Callable[..., tuple[int, str, str]]
# make_label has 0, 1 and 2; these ids of TotalSegmentator stand for them in the files
CT_FILES = np.array([0, 5, 30], dtype=np.uint8)  # liver, vertebra L2
MR_FILES = np.array([0, 5, 19], dtype=np.uint8)  # liver, vertebrae


@pytest.fixture
def folders(tmp_path: Path, nnunet_folders: dict[str, str]) -> Path:
    for name, ids in (("ct", CT_FILES), ("mr", MR_FILES)):
        label = ids[make_label()]
        label[0, 0, 0] = 26 if name == "ct" else 50  # S1 is of the spine too; the brain is none of the 40
        image = make_image() * np.int16(10) - np.int16(1000) if name == "ct" else make_image()
        save(tmp_path / name / "images" / f"{name}_1.nii.gz", image)
        save(tmp_path / name / "labels" / f"{name}_1.nii.gz", label)
    return tmp_path


def content_of(folder: Path) -> Any:
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def mixed(folders: Path, *more: str) -> list[str]:
    images, labels = ([f"{k}={folders / k.lower() / part}" for k in ("CT", "MR")] for part in ("images", "labels"))
    return ["convert", "mixed", "-d", "602", "--images", *images, "--labels", *labels, *more]


def plain(folders: Path, *more: str) -> list[str]:
    return [
        "convert", "plain", "-d", "603", "--images", str(folders / "ct/images"), "--labels", str(folders / "ct/labels"),
        *more,
    ]  # fmt: skip


def test_mixed(folders: Path, call: Call) -> None:
    code, _, error = call(mixed(folders, "--label-map", "CT=totalsegmentator_ct", "MR=totalsegmentator_mr"))
    assert code == 0, error
    raw = folders / "nnUNet_raw/Dataset602_Mixed"
    labels = content_of(raw)["labels"]
    assert len(labels) == 41 and [labels[name] for name in ("spleen", "liver", "spine", "right_gluteus_minimus")] == [
        1, 5, 25, 40,
    ]  # fmt: skip
    expected = np.array([0, 5, 25])[make_label()]
    expected[0, 0, 0] = 25
    assert (voxels(raw / "labelsTr/ct_1.nii.gz") == expected).all()
    expected[0, 0, 0] = 0
    assert (voxels(raw / "labelsTr/mr_1.nii.gz") == expected).all()
    further = content_of(raw)[SECTION]["source"]["sources"][0]["further_ids"]
    assert further["27"] == "spine" and further["16"] == ""


def test_mixed_with_names_of_the_other_modality(folders: Path, call: Call) -> None:
    names = ("--label-map", "CT=totalsegmentator_ct", "--label-names", "liver=5", "MR:spine=19", "MR:brain=50")
    code, _, error = call(mixed(folders, *names))
    assert code == 0, error
    assert content_of(folders / "nnUNet_raw/Dataset602_Mixed")["labels"] == {"background": 0, "liver": 1, "spine": 2}


def test_plain(folders: Path, call: Call) -> None:
    code, out, error = call(plain(folders, "--label-map", "totalsegmentator_ct", "--modality", "CT"))
    assert code == 0, error
    assert "nnUNetv2_train 603 2d 0 -tr nnUNetTrainerMRSegmentator" in out
    raw = folders / "nnUNet_raw/Dataset603_Plain"
    content = content_of(raw)
    assert content["channel_names"] == {"0": "CT_or_MR"}, "CT would switch its clipping on"
    assert len(content["labels"]) == 41 and content[SECTION]["modalities"] == ["CT"]
    expected = np.array([0, 5, 25])[make_label()]
    expected[0, 0, 0] = 25
    assert (voxels(raw / "labelsTr/ct_1.nii.gz") == expected).all()
    assert (raw / "imagesTr/ct_1_0000.nii.gz").is_symlink()


def test_plain_amos_has_thirteen_of_the_forty(folders: Path, call: Call) -> None:
    save(folders / "ct/labels/ct_1.nii.gz", np.array([0, 6, 14], dtype=np.uint8)[make_label()])
    code, _, error = call(plain(folders, "--label-map", "amos", "--channel-name", "MR"))
    assert code == 0, error
    raw = folders / "nnUNet_raw/Dataset603_Plain"
    content = content_of(raw)
    assert content["channel_names"] == {"0": "MR"} and list(content["labels"])[4:7] == [
        "gallbladder",
        "liver",
        "stomach",
    ]
    assert content["labels"]["duodenum"] == 13, "numbered without gaps, as nnU-Net wants it"
    assert (voxels(raw / "labelsTr/ct_1.nii.gz") == np.array([0, 5, 0])[make_label()]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--label-map", "CT=total", "MR=totalsegmentator_mr"), "no label map 'total'. There are: amos (AMOS22"),
        (("--label-map", "PET=amos"), "--label-map PET=amos: the modalities are CT, MR."),
        (("--label-map", "CT=amos", "CT=amos"), "--label-map has CT more than once."),
        (("--label-map", "CT=totalsegmentator_ct"), "--label-map names no organ of MR."),
        ((), "nothing names an organ of CT, MR"),
        (("--label-map", "amos"), "expected NAME=MAP"),
        (
            ("--label-map", "CT=totalsegmentator_ct", "--label-names", "CT:liver=5"),
            "CT has a --label-map, which names its organs; leave --label-names CT:liver=5 out.",
        ),
    ],
)
def test_wrong_usage(folders: Path, call: Call, arguments: tuple[str, ...], message: str) -> None:
    code, _, error = call(mixed(folders, *arguments))
    assert code == 2 and message in error
    assert not [*(folders / "nnUNet_raw").iterdir()]


@pytest.mark.parametrize("command", [mixed, plain])
def test_ids_that_the_data_set_has_not_are_refused(folders: Path, call: Call, command: Callable) -> None:
    save(folders / "ct/labels/ct_1.nii.gz", np.array([0, 5, 118], dtype=np.uint8)[make_label()])
    maps = ("totalsegmentator_ct",) if command is plain else ("CT=totalsegmentator_ct", "MR=totalsegmentator_mr")
    code, _, error = call(command(folders, "--label-map", *maps))
    assert code == 4 and "undeclared labels, found 118" in error and "declared 0..117" in error


def test_unnamed_ids_become_background(folders: Path, call: Call) -> None:
    source = voxels(folders / "ct/labels/ct_1.nii.gz")
    names = ("--label-names", "vertebra=30", "liver=5")
    code, _, error = call(plain(folders, *names))
    assert code == 4 and "gaps" in error
    code, _, error = call(plain(folders, *names, "--unnamed-to-background"))
    assert code == 0, error
    raw = folders / "nnUNet_raw/Dataset603_Plain"
    assert content_of(raw)["labels"] == {"background": 0, "vertebra": 1, "liver": 2}
    found = voxels(raw / "labelsTr/ct_1.nii.gz")
    assert np.array_equal(found == 1, source == 30) and np.array_equal(found == 2, source == 5)
    assert found[0, 0, 0] == 0 != source[0, 0, 0]


def test_unnamed_to_background_needs_names(folders: Path, call: Call) -> None:
    code, _, error = call(plain(folders, "--unnamed-to-background"))
    assert code == 2 and "--label-names" in error
