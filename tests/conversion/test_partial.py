"""``convert mixed --partial`` and doctor: which class is annotated in which case."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from tiny_data import make_image, make_label, save

from nnunet_multimodal.conversion.verify import verify_raw_dataset
from nnunet_multimodal.data.case_labels import KEY, CaseLabels
from nnunet_multimodal.data.modality import SECTION

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folders(tmp_path: Path, nnunet_folders: dict[str, str]) -> Path:
    """CT of c1 with organ 5 (liver) alone, MR of m1 and m2 with organs 1 (liver) and 2 (spleen), CT of p with 2."""
    for seed, (folder, case, ids) in enumerate([
        ("ct", "c1", [0, 5, 0]), ("mr", "m1", [0, 1, 2]), ("mr", "m2", [0, 1, 2]), ("spleens", "c1", [0, 0, 3]),
    ]):  # fmt: skip
        image = make_image(seed)
        if folder != "mr":
            image = image * np.int16(10) - np.int16(1000)
        save(tmp_path / folder / "images" / f"{case}_0000.nii.gz", image)
        save(tmp_path / folder / "labels" / f"{case}.nii.gz", np.array(ids, dtype=np.uint8)[make_label()])
    return tmp_path


def arguments(folders: Path, names: tuple[str, ...], sources: dict[str, str], *more: str) -> list[str]:
    images, labels = (
        [f"{name}={folders / at / part}" for name, at in sources.items()] for part in ("images", "labels")
    )
    command = ["convert", "mixed", "-d", "605", "--images", *images, "--labels", *labels]
    return [*command, "--label-names", *names, *more]


BOTH = {"CT": "ct", "MR": "mr"}
NAMES = ("CT:liver=5", "MR:liver=1", "MR:spleen=2")


def content_of(folders: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((raw(folders) / "dataset.json").read_text(encoding="utf-8"))
    return content


def raw(folders: Path) -> Path:
    return folders / "nnUNet_raw" / "Dataset605_Mixed"


def test_organs_that_one_modality_labels_are_kept(folders: Path, call: Call, caplog: pytest.LogCaptureFixture) -> None:
    code, out, error = call(arguments(folders, NAMES, BOTH, "--partial"))
    assert code == 0, error
    content = content_of(folders)
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert content[SECTION][KEY] == {"c1": ["liver"]}  # the others are annotated in full
    assert content[SECTION]["source"]["partial"] is True
    assert caplog.messages == ["note: CT does not annotate spleen (case_labels)"]
    assert "nnUNetv2_train 605 2d 0 -tr nnUNetTrainerContextPrior" in out
    voxels = np.asanyarray(nibabel.load(raw(folders) / "labelsTr" / "c1.nii.gz").dataobj)
    assert (voxels == (make_label() == 1)).all()
    assert verify_raw_dataset(raw(folders)) == []


def test_without_it_they_are_left_out_as_before(folders: Path, call: Call) -> None:
    assert call(arguments(folders, NAMES, BOTH))[0] == 0
    content = content_of(folders)
    assert content["labels"] == {"background": 0, "liver": 1} and KEY not in content[SECTION]
    code, _, error = call(arguments(folders, NAMES, BOTH, "--overwrite", "--organs", "liver,spleen"))
    assert code == 2 and "Or pass --partial: what is not labelled is then not taught" in error


def test_where_all_label_all_there_is_nothing_to_say(folders: Path, call: Call) -> None:
    assert call(arguments(folders, ("CT:liver=5", "MR:liver=1"), BOTH, "--partial", "--unnamed-to-background"))[0] == 0
    assert KEY not in content_of(folders)[SECTION]


def test_data_sets_of_one_modality(folders: Path, call: Call) -> None:
    """Two CT data sets with other organs, and a case name that both have."""
    sources = {"CT/lits": "ct", "CT/msd": "spleens"}
    code, out, error = call(arguments(folders, ("CT/lits:liver=5", "CT/msd:spleen=3"), sources, "--partial"))
    assert code == 0, error
    content = content_of(folders)
    assert content["channel_names"] == {"0": "CT"}
    assert content[SECTION]["modalities"] == ["CT"]
    assert content[SECTION][KEY] == {"CT_lits_c1": ["liver"], "CT_msd_c1": ["spleen"]}
    assert [source["name"] for source in content[SECTION]["source"]["sources"]] == ["lits", "msd"]
    assert "1 CT/lits, 1 CT/msd" in out
    assert verify_raw_dataset(raw(folders)) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--organs", "spleen"), "CT labels none of spleen, so there is nothing to learn from its cases"),
        (("--organs", "liver,kidney"), "Some modality has to label it."),
    ],
)
def test_what_cannot_be(folders: Path, call: Call, more: tuple[str, ...], message: str) -> None:
    code, _, error = call(arguments(folders, NAMES, BOTH, "--partial", *more))
    assert code == 2 and message in error and not raw(folders).exists()


def test_one_modality_without_partial_is_refused_as_before(folders: Path, call: Call) -> None:
    code, _, error = call(arguments(folders, ("CT/a:liver=5", "CT/b:liver=3"), {"CT/a": "ct", "CT/b": "spleens"}))
    assert code == 2 and "at least two modalities" in error


def test_names_of_all_sources_of_a_modality(folders: Path, call: Call) -> None:
    sources = {"CT/lits": "ct", "CT/msd": "spleens", "MR": "mr"}
    names = ("CT/lits:liver=5", "CT:spleen=3", "MR:liver=1", "MR:spleen=2")
    code, _, error = call(arguments(folders, names, sources, "--partial"))
    assert code == 0, error
    assert content_of(folders)["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert content_of(folders)[SECTION][KEY] == {"CT_msd_c1": ["spleen"]}


def test_a_modality_that_is_none_is_no_part_of_an_organs_name(folders: Path, call: Call) -> None:
    code, _, error = call(arguments(folders, ("CT:liver=5", "MRI:liver=1", "MRI:spleen=2"), BOTH, "--partial"))
    assert code == 2 and "--label-names MRI:liver=1: MRI is none of CT, MR." in error and not raw(folders).exists()


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case_labels", "message"),
    [
        ({"c1": ["livr"]}, "names 'livr' for c1, which is no class of the data set; did you mean 'liver'? Its classes"),
        ({"c1": []}, "names no class for c1: nothing is annotated there"),
        ({"c1": "liver"}, "has to list the classes of c1, found 'liver'"),
        (["c1"], 'has to be {"case": ["class", ...], ...}, found [\'c1\']'),
        ({"c11": ["liver"]}, "names 1 cases that are not in the data set: c11. Did you mean c1?"),
        ({"m1": ["liver"]}, 'case m1: its label has spleen, which "case_labels" says is not annotated there.'),
        ({case: ["liver"] for case in ("c1", "m1", "m2")}, '"case_labels": spleen is annotated in no case.'),
    ],
)
def test_doctor_says_what_is_wrong_with_case_labels(folders: Path, call: Call, case_labels: Any, message: str) -> None:
    assert call(arguments(folders, NAMES, BOTH, "--partial"))[0] == 0
    content = content_of(folders)
    content[SECTION][KEY] = case_labels
    (raw(folders) / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    code, out, _ = call(["doctor", "-d", "605"])
    assert code == 4 and message in out


@pytest.mark.parametrize(
    ("labels", "case_labels", "drawn"),
    [
        ({"liver": [1], "spleen": [2]}, {"m1": ["liver"]}, ["spleen"]),  # nnU-Net takes these for plain labels
        ({"whole": [1, 2], "core": [2]}, {"m1": ["whole"]}, []),
        ({"whole": [1, 2], "core": [2]}, {"m1": ["core"]}, ["whole"]),
    ],
)
def test_doctor_looks_at_ids(
    folders: Path, call: Call, labels: dict[str, Any], case_labels: dict[str, list[str]], drawn: list[str]
) -> None:
    assert call(arguments(folders, NAMES, BOTH, "--partial"))[0] == 0
    content = content_of(folders)
    content["labels"] = {"background": 0, **labels}
    content["regions_class_order"] = [1, 2]
    content[SECTION][KEY] = case_labels
    (raw(folders) / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    _, out, _ = call(["doctor", "-d", "605"])
    assert [f"case m1: its label has {name}, which" in out for name in drawn] == [True] * len(drawn)
    assert ("says is not annotated there" in out) is bool(drawn)


def test_doctor_finds_a_copy_that_training_reads_and_nobody_changed(folders: Path, call: Call) -> None:
    """Written by hand after planning, they would be of no effect, and no trainer would say so."""
    assert call(arguments(folders, NAMES, BOTH, "--partial"))[0] == 0
    copy = folders / "nnUNet_preprocessed" / "Dataset605_Mixed" / "dataset.json"
    copy.parent.mkdir()
    content = content_of(folders)
    copy.write_text(json.dumps(content), encoding="utf-8")
    assert call(["doctor", "-d", "605"])[0] == 0
    content[SECTION].pop(KEY)
    copy.write_text(json.dumps(content), encoding="utf-8")
    code, out, _ = call(["doctor", "-d", "605"])
    assert code == 4 and f'{copy}, which training reads, has another "case_labels". Copy {raw(folders)}' in out
    copy.write_text(json.dumps({**content, SECTION: ["no object"]}), encoding="utf-8")
    assert 'has another "case_labels"' in call(["doctor", "-d", "605"])[1]
    copy.write_text("{", encoding="utf-8")
    assert "is not valid JSON" in call(["doctor", "-d", "605"])[1]


def test_the_table_can_be_replaced_without_losing_them(folders: Path, call: Call) -> None:
    assert call(arguments(folders, NAMES, BOTH, "--partial"))[0] == 0
    command = ["convert", "table", "-d", "605", "--pattern", "CT=^c", "T2=^m", "--overwrite"]
    code, _, error = call(command)
    assert code == 0, error
    assert content_of(folders)[SECTION]["modalities"] == ["CT", "T2"]
    assert content_of(folders)[SECTION][KEY] == {"c1": ["liver"]}


# --- reading ---------------------------------------------------------------------------------------------------------


def test_masks() -> None:
    dataset = {
        "labels": {"background": 0, "spleen": 2, "liver": 1},
        SECTION: {KEY: {"a": ["liver"], "b": ["background", "spleen", "liver"]}},
    }
    labels = CaseLabels.from_dataset_json(dataset)
    assert labels.outputs == ("background", "liver", "spleen") and labels.partial
    assert labels.mask(["a", "b", "c"]).tolist() == [[True, True, False], [True] * 3, [True] * 3]
    assert labels.unannotated("a") == ["spleen"] and labels.unannotated("c") == []
    assert labels.count(["a", "b", "c"]) == {"liver": 3, "spleen": 2}
    assert labels.count([]) == {"liver": 0, "spleen": 0}
    dataset[SECTION][KEY].pop("a")
    assert not CaseLabels.from_dataset_json(dataset).partial


def test_masks_of_regions() -> None:
    dataset = {
        "labels": {"background": 0, "whole": [1, 2], "core": [2]},
        "regions_class_order": [1, 2],
        SECTION: {KEY: {"a": ["whole"]}},
    }
    labels = CaseLabels.from_dataset_json(dataset)
    assert labels.outputs == ("whole", "core") and labels.mask(["a"]).tolist() == [[True, False]]
