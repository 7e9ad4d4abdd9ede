"""``convert mixed``: CT and MR with common labels and a modality table; and the paper's intensities."""

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

from nnunet_multimodal.conversion.dataset import CaseFiles, find_cases
from nnunet_multimodal.conversion.harmonise import METHODS, harmonise
from nnunet_multimodal.conversion.mixed import Source, common_labels, convert_mixed
from nnunet_multimodal.conversion.verify import verify_raw_dataset
from nnunet_multimodal.data.modality import SECTION, ModalityTable
from nnunet_multimodal.errors import DataProblem, UsageError

Call = Callable[..., tuple[int, str, str]]

CT_ORDER = AFFINE @ np.diag([-1, 1, 1, 1])  # stored right to left: R, A, S


def make_ct(seed: int = 0) -> np.ndarray:
    """The body at about 0 HU in air."""
    return make_image(seed) * np.int16(10) - np.int16(1000)


@pytest.fixture
def folders(tmp_path: Path, nnunet_folders: dict[str, str]) -> Path:
    """CT of cases c1 and p; MR of cases m1 and p. Organ 1 of make_label is 5 in CT, organ 2 is 3; 7 is one more."""
    for seed, case in enumerate(("c1", "p")):
        save(tmp_path / "ct" / "images" / f"{case}_0000.nii.gz", make_ct(seed), CT_ORDER)
        label = np.array([0, 5, 3], dtype=np.uint8)[make_label()]
        label[0, 0, 0] = 7
        save(tmp_path / "ct" / "labels" / f"{case}.nii.gz", label, CT_ORDER)
    for seed, case in enumerate(("m1", "p")):
        save(tmp_path / "mr" / "images" / f"{case}_0000.nii.gz", make_image(seed))
        save(tmp_path / "mr" / "labels" / f"{case}.nii.gz", make_label())
    return tmp_path


@pytest.fixture
def raw(folders: Path) -> Path:
    return folders / "nnUNet_raw" / "Dataset602_Mixed"


NAMES = ("--label-names", "CT:spleen=3", "CT:liver=5", "CT:stomach=7", "MR:liver=1", "MR:spleen=2")


def arguments(folders: Path, *more: str, names: tuple[str, ...] = NAMES) -> list[str]:
    images = [f"{name}={folders / name.lower() / 'images'}" for name in ("CT", "MR")]
    labels = [f"{name}={folders / name.lower() / 'labels'}" for name in ("CT", "MR")]
    return ["convert", "mixed", "-d", "602", "--images", *images, "--labels", *labels, *names, *more]


def content_of(folder: Path) -> Any:
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def test_data_set(folders: Path, raw: Path, call: Call, caplog: pytest.LogCaptureFixture) -> None:
    code, out, error = call(arguments(folders))
    assert code == 0, error
    assert f"{raw}\n2 CT, 2 MR\n" in out and "nnUNetv2_train 602 2d 0 -tr nnUNetTrainerMulModSeg" in out
    assert caplog.messages == ["note: of CT, these become background: stomach"]
    content = content_of(raw)
    assert content["channel_names"] == {"0": "CT_or_MR"}
    assert content["labels"] == {"background": 0, "spleen": 1, "liver": 2}  # those of both, in the order of CT
    assert content["numTraining"] == 4
    assert content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    own = content[SECTION]
    assert own["layout"] == "mixed" and own["modalities"] == ["CT", "MR"]
    # Only the case that both have gets its modality in front.
    assert own["case_modality"] == {"CT_p": "CT", "MR_p": "MR", "c1": "CT", "m1": "MR"}
    assert "case_patient" not in own and "harmonise" not in own
    assert own["source"]["sources"][1] == {
        "modality": "MR",
        "images": str(folders / "mr" / "images"),
        "labels": str(folders / "mr" / "labels"),
        "cases": 2,
        "label_names": {"liver": 1, "spleen": 2},
    }
    swapped = np.array([0, 2, 1])[make_label()]
    for case, modality in own["case_modality"].items():
        assert (voxels(raw / "labelsTr" / f"{case}.nii.gz") == swapped).all(), case
        image = raw / "imagesTr" / f"{case}_0000.nii.gz"
        source = folders / modality.lower() / "images" / f"{case.removeprefix(f'{modality}_')}_0000.nii.gz"
        assert image.is_symlink() and image.resolve() == source.resolve()
    assert verify_raw_dataset(raw) == []


def test_left_is_left_in_both(folders: Path, raw: Path, call: Call) -> None:
    """The same anatomy stored left to right in one and right to left in the other is one and the same to nnU-Net."""
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

    save(folders / "ct" / "images" / "c1_0000.nii.gz", make_ct()[::-1], CT_ORDER)
    save(folders / "ct" / "labels" / "c1.nii.gz", np.array([0, 5, 3], dtype=np.uint8)[make_label()[::-1]], CT_ORDER)
    assert call(arguments(folders))[0] == 0
    ct, mr = (NibabelIOWithReorient().read_seg(str(raw / "labelsTr" / f"{case}.nii.gz"))[0] for case in ("c1", "m1"))
    assert (ct == mr).all() and len(np.unique(ct)) == 3


def test_organs_name_and_patients(folders: Path, call: Call) -> None:
    more = ("--organs", "liver", "--name", "Liver", "--patient-pattern", "^([a-z])", "--overwrite")
    code, out, error = call(arguments(folders, *more))
    assert code == 0, error
    folder = folders / "nnUNet_raw" / "Dataset602_Liver"
    assert content_of(folder)["labels"] == {"background": 0, "liver": 1}
    assert (voxels(folder / "labelsTr" / "c1.nii.gz") == (make_label() == 1)).all()
    assert content_of(folder)[SECTION]["case_patient"] == {"CT_p": "p", "MR_p": "p", "c1": "c", "m1": "m"}
    assert "2 CT, 2 MR; 3 patients" in out


def test_one_set_of_labels_for_all(folders: Path, raw: Path, call: Call, tmp_path: Path) -> None:
    for case in ("c1", "p"):
        save(folders / "ct" / "labels" / f"{case}.nii.gz", make_label(), CT_ORDER)
    both = tmp_path / "both=all.json"
    both.write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}), encoding="utf-8")
    for names in (("--label-names", "liver=1", "spleen=2"), ("--labels-json", str(both))):
        code, _, error = call(arguments(folders, "--overwrite", names=names))
        assert code == 0, error
        assert content_of(raw)["labels"] == {"background": 0, "liver": 1, "spleen": 2}
        assert (raw / "labelsTr" / "c1.nii.gz").is_symlink()  # nothing to change


def test_labels_json_of_each(folders: Path, raw: Path, call: Call, tmp_path: Path) -> None:
    for name, labels in (("ct", {"liver": 5, "spleen": 3, "stomach": 7}), ("mr", {"spleen": 2, "liver": 1})):
        (tmp_path / f"{name}.json").write_text(json.dumps(labels), encoding="utf-8")
    names = ("--labels-json", f"CT={tmp_path / 'ct.json'}", f"MR={tmp_path / 'mr.json'}")
    code, _, error = call(arguments(folders, names=names))
    assert code == 0, error
    assert content_of(raw)["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert (voxels(raw / "labelsTr" / "c1.nii.gz") == make_label()).all()


def test_ids_without_a_name(folders: Path, raw: Path, call: Call) -> None:
    names = tuple(name for name in NAMES if "stomach" not in name)
    code, _, error = call(arguments(folders, names=names))
    assert code == 4 and "undeclared labels, found 7 (1 voxel)" in error and "--unnamed-to-background" in error
    assert not raw.exists()
    assert call(arguments(folders, "--unnamed-to-background", names=names))[0] == 0
    assert voxels(raw / "labelsTr" / "c1.nii.gz").max() == 2


def test_ignore_label_comes_last(folders: Path, raw: Path, call: Call) -> None:
    names = tuple(name.replace("stomach", "ignore") for name in NAMES)
    assert call(arguments(folders, names=names))[0] == 0
    assert content_of(raw)["labels"] == {"background": 0, "spleen": 1, "liver": 2, "ignore": 3}
    label = voxels(raw / "labelsTr" / "c1.nii.gz")
    assert label[0, 0, 0] == 3 and (label == 3).sum() == 1
    assert verify_raw_dataset(raw) == []


# --- intensities -----------------------------------------------------------------------------------------------------


def test_harmonised_images_are_written(folders: Path, raw: Path, call: Call) -> None:
    code, _, error = call(arguments(folders, "--harmonise", "paper"))
    assert code == 0, error
    own = content_of(raw)[SECTION]
    assert own["harmonise"] == "paper" and own["source"]["harmonise"] == "paper"
    for case, original, modality in (("c1", make_ct(), "CT"), ("m1", make_image(), "MR")):
        image = nibabel.load(raw / "imagesTr" / f"{case}_0000.nii.gz")
        assert image.get_data_dtype() == np.float32
        assert np.allclose(np.asanyarray(image.dataobj), harmonise(original, modality))
        assert np.allclose(
            image.affine, nibabel.load(folders / modality.lower() / "images" / f"{case}_0000.nii.gz").affine
        )
    assert verify_raw_dataset(raw) == []


def test_harmonise_by_hand() -> None:
    ct = np.array([-1000, -275, -75, 125, 3000], dtype=np.int16)
    assert harmonise(ct, "CT").tolist() == [0, 0, 0.5, 1, 1]
    assert harmonise(ct, "ct").dtype == np.float32
    mr = np.arange(1001, dtype=np.uint16).reshape(7, 11, 13)  # percentiles 0.5 and 99.5 are 5 and 995
    scaled = harmonise(mr, "MR")
    assert scaled.shape == mr.shape and scaled.dtype == np.float32
    assert scaled.ravel()[[0, 5, 500, 995, 1000]] == pytest.approx([0, 0, 0.5, 1, 1])
    assert harmonise(mr * 3, "T2") == pytest.approx(scaled, abs=1e-6)
    assert METHODS == ("paper",)


@pytest.mark.parametrize(
    ("image", "modality", "message"),
    [
        (np.full((4, 4), 7), "MR", r"x\.nii \(MR\) is constant .*\(7\)"),
        (np.where(np.arange(1000) == 3, 9, 0), "MR", r"between its 0\.5 and 99\.5 percentiles"),  # one bright voxel
        (np.array([500, 900]), "CT", r"between -275 and 125 HU \(125\).*Is it in HU\?"),
    ],
)
def test_nothing_to_harmonise(image: np.ndarray, modality: str, message: str) -> None:
    with pytest.raises(DataProblem, match=message):
        harmonise(image, modality, "x.nii")


def test_harmonise_fault_is_found_before_writing(folders: Path, raw: Path, call: Call) -> None:
    image = np.zeros(SHAPE, dtype=np.int16)
    image[0, 0, 0] = 9
    save(folders / "mr" / "images" / "m1_0000.nii.gz", image)
    assert call(arguments(folders))[0] == 0
    code, _, error = call(arguments(folders, "--harmonise", "paper", "--name", "Other", "--overwrite"))
    assert code == 4 and "m1_0000.nii.gz (MR) is constant" in error
    assert raw.exists() and not raw.with_name("Dataset602_Other").exists()


@pytest.mark.parametrize(
    ("case", "image", "message"),
    [
        (
            "ct/images/c1",
            make_image(),
            r"case c1: CT has no value below -200 \(found 0 to \d+\); looks like MR, or is not",
        ),
        ("mr/images/m1", make_ct(), r"case m1: MR has values below -200 \(found -1000 to .*\); looks like CT"),
    ],
)
def test_an_image_that_looks_like_the_other_modality(
    case: str,
    image: np.ndarray,
    message: str,
    folders: Path,
    raw: Path,
    run_command: Callable[..., Any],
    nnunet_folders: dict[str, str],
) -> None:
    """Row 21: a warning, an error under --strict."""
    save(folders / f"{case}_0000.nii.gz", image, CT_ORDER if case.startswith("ct") else AFFINE)
    done = run_command(*arguments(folders, "--strict"), env=nnunet_folders)
    assert done.returncode == 4 and re.search(message, done.stderr), done.stderr
    assert not raw.exists()
    done = run_command(*arguments(folders), env=nnunet_folders)
    assert done.returncode == 0 and re.search(f"warning: {message}", done.stderr), done.stderr
    assert done.stderr.count("warning") == 1


# --- what is refused -------------------------------------------------------------------------------------------------


def without(*words: str) -> tuple[str, ...]:
    return tuple(name for name in NAMES if name not in words)


FAULTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], int, str]] = {
    "organ of one only": (("--organs", "liver,stomach"), NAMES, 2, r"'stomach' is not among the labels of MR"),
    "spelled otherwise": (
        ("--organs", "livr"),
        NAMES,
        2,
        r"'livr' is not among the labels of CT.*Is it 'liver' there\?",
    ),
    "nothing in common": (
        (),
        ("--label-names", "CT:a=3", "MR:b=1"),
        2,
        r"No organ is labelled in all modalities \(CT: a",
    ),
    "no names for MR": ((), ("--label-names", "CT:liver=5"), 2, r"--label-names names no organ of MR"),
    "organ twice": ((), (*NAMES, "liver=1"), 2, r"has liver of CT more than once"),
    "id twice": (
        (),
        ("--label-names", "CT:liver=5", "CT:x=5", "MR:liver=1"),
        2,
        r"CT must differ, found 5 for liver, x",
    ),
    "not ORGAN=ID": ((), ("--label-names", "CT:liver"), 2, r"expected NAME=ID such as liver=1, found 'liver'"),
    "background": ((), ("--label-names", "liver=0"), 2, r"Labels of CT have to be numbers from 1 on"),
    "json missing": ((), ("--labels-json", "CT=nowhere.json"), 2, r"Cannot read nowhere\.json"),
    "bad patient": (("--patient-pattern", "^c"), NAMES, 4, r"finds no patient in 1 cases: p"),
    "id out of range": (("-d", "1000"), NAMES, 2, r"from 1 to 999"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_arguments(fault: str, folders: Path, call: Call) -> None:
    more, names, expected, message = FAULTS[fault]
    code, _, error = call(arguments(folders, *more, names=names))
    assert (code, bool(re.search(message, error))) == (expected, True), error
    assert [*(folders / "nnUNet_raw").iterdir()] == []


def test_folders_and_modalities_must_agree(folders: Path, call: Call) -> None:
    ct, mr = (str(folders / name / "images") for name in ("ct", "mr"))
    base = ["convert", "mixed", "-d", "602", "--label-names", "liver=1"]
    code, _, error = call([*base, "--images", f"CT={ct}", f"MR={mr}", "--labels", f"CT={ct}"])
    assert code == 2 and "--images has CT, MR, --labels has CT; expected the same names" in error
    code, _, error = call([*base, "--images", f"CT={ct}", f"CT={mr}", "--labels", f"CT={ct}"])
    assert code == 2 and "--images has CT more than once" in error
    code, _, error = call([*base, "--images", ct, "--labels", f"CT={ct}"])
    assert code == 2 and "expected NAME=DIR" in error
    code, _, error = call([*base, "--images", f"CT={ct}", "--labels", f"CT={ct}"])
    assert code == 2 and "at least two modalities, found CT" in error and "plain --modality" in error
    code, _, error = call([*base, "--images", f"CT={ct}", f"ct={mr}", "--labels", f"CT={ct}", f"ct={mr}"])
    assert code == 2 and "differ by more than capitals" in error


def test_bad_images_of_both_are_listed_at_once(folders: Path, raw: Path, call: Call) -> None:
    """The checks are those of the other converters: rows 11 and 13 here."""
    (folders / "ct" / "images" / "c1_0000.nii.gz").write_bytes(b"")
    save(folders / "mr" / "labels" / "m1.nii.gz", make_label()[:-1])
    code, _, error = call(arguments(folders))
    assert code == 4 and "2 problems. Nothing was written." in error
    assert "file ends early (got 0 bytes)" in error and "m1.nii.gz has shape 15x14x6" in error
    assert not raw.exists()


def test_an_organ_that_one_modality_lacks_is_noted(folders: Path, call: Call, caplog: pytest.LogCaptureFixture) -> None:
    for case in ("m1", "p"):
        save(folders / "mr" / "labels" / f"{case}.nii.gz", np.where(make_label() == 1, make_label(), 0))
    assert call(arguments(folders))[0] == 0
    assert "note: no MR case has spleen (1)." in caplog.messages


# --- as a library ----------------------------------------------------------------------------------------------------


def sources(folders: Path) -> list[Source]:
    ct, mr = (find_cases(folders / name / "images", folders / name / "labels") for name in ("ct", "mr"))
    return [
        Source("CT", ct, {"liver": 5, "spleen": 3, "stomach": 7}, {"p": "1"}),
        Source("MR", mr[:1], {"liver": 1, "spleen": 2}),
        Source("MR", mr[1:], {"liver": 1, "spleen": 2}, {"p": "1"}),
    ]


def test_sources_of_one_modality_may_be_several(folders: Path, raw: Path) -> None:
    assert convert_mixed(sources(folders), 602, "Mixed") == raw
    table = ModalityTable.from_dataset_json(content_of(raw))
    assert table.modalities == ("CT", "MR")
    assert table.case_patient == {"CT_p": "1", "MR_p": "1"}


def test_labels_may_be_chosen_and_numbered(folders: Path, raw: Path) -> None:
    convert_mixed(sources(folders), 602, "Mixed", labels={"spleen": 2, "liver": 1})
    assert content_of(raw)["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    with pytest.raises(DataProblem, match="Label ids have gaps"):
        convert_mixed(sources(folders), 602, "Mixed", labels={"spleen": 2}, overwrite=True)
    with pytest.raises(UsageError, match="Unknown harmonisation 'z'"):
        convert_mixed(sources(folders), 602, "Mixed", harmonise="z", overwrite=True)


def test_case_ids_that_collide_within_a_modality(folders: Path, raw: Path) -> None:
    ct, mr, other = sources(folders)
    again = Source("MR", [CaseFiles("m1", other.cases[0].image, other.cases[0].label)], other.labels)
    with pytest.raises(DataProblem, match=r"Case id 'MR_m1' comes from .*m1_0000.* and .*p_0000"):
        convert_mixed([ct, mr, again], 602, "Mixed")
    assert not raw.exists()
    with pytest.raises(DataProblem, match=r"There is no case of PET"):
        convert_mixed([ct, Source("PET", [], {"liver": 1})], 602, "Mixed")


def test_common_labels() -> None:
    assert common_labels(
        [Source("A", [], {"x": 9, "y": 2, "z": 1}), Source("B", [], {"z": 5, "x": 1, "ignore": 9})]
    ) == {
        "x": 1,
        "z": 2,
        "ignore": 3,
    }


def test_large_ids(folders: Path, raw: Path) -> None:
    label = make_label().astype(np.uint16) * 300
    save(folders / "ct" / "labels" / "c1.nii.gz", label, CT_ORDER)
    ct = Source("CT", find_cases(folders / "ct" / "images", folders / "ct" / "labels")[:1], {"a": 300, "b": 600})
    mr = sources(folders)[1]
    convert_mixed([ct, Source("MR", mr.cases, {"a": 1, "b": 2})], 602, "Mixed")
    assert (voxels(raw / "labelsTr" / "c1.nii.gz") == make_label()).all()


# --- plain -----------------------------------------------------------------------------------------------------------


def test_plain_with_a_modality(inputs: Inputs, call: Call) -> None:
    plain = ["convert", "plain", "--images", str(inputs.images), "--labels", str(inputs.labels), "-d", "8"]
    assert call([*plain, "--modality", "CT"])[0] == 0
    content = content_of(inputs.raw / "Dataset008_Plain")
    assert content["channel_names"] == {"0": "CT"}
    assert ModalityTable.from_dataset_json(content).case_modality == {"a": "CT", "b": "CT"}
    assert verify_raw_dataset(inputs.raw / "Dataset008_Plain") == []
    code, _, error = call([*plain, "--modality", "T2", "--channel-name", "CT", "--overwrite"])
    assert code == 2 and "turns on CT clipping, for images that are T2" in error
