"""``convert table``: a modality table for a data set that exists, and what doctor says about a bad one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_data import make_image, make_label, save

from nnunet_multimodal.conversion.verify import verify_raw_dataset
from nnunet_multimodal.data.modality import SECTION, ModalityTable
from nnunet_multimodal.data.splits import FILE_NAME, stratified_splits

Call = Callable[..., tuple[int, str, str]]

NAME = "Dataset005_Both"
CASES = {"amos_0001": "CT", "amos_0002": "CT", "amos_0507": "MR", "amos_0510": "MR"}


@pytest.fixture
def raw(nnunet_folders: dict[str, str]) -> Path:
    """Two CT and two MR that nnU-Net would take, without a table; a test case too."""
    folder = Path(nnunet_folders["nnUNet_raw"]) / NAME
    for seed, case in enumerate(CASES):
        save(folder / "imagesTr" / f"{case}_0000.nii.gz", make_image(seed))
        save(folder / "labelsTr" / f"{case}.nii.gz", make_label())
    save(folder / "imagesTs" / "amos_0600_0000.nii.gz", make_image())
    content = {
        "channel_names": {"0": "CT_or_MR"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
        SECTION: {"layout": "plain", "harmonise": "paper"},
    }
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def preprocessed(raw: Path, nnunet_folders: dict[str, str]) -> Path:
    folder = Path(nnunet_folders["nnUNet_preprocessed"]) / NAME
    folder.mkdir()
    (folder / "dataset.json").write_bytes((raw / "dataset.json").read_bytes())
    return folder


def section(folder: Path) -> Any:
    return json.loads((folder / "dataset.json").read_text(encoding="utf-8"))[SECTION]


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def write_csv(folder: Path, text: str) -> str:
    path = folder / "modalities.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


BY_NAME = ("--pattern", "CT=^amos_0[0-4]", "MR=^amos_0[5-6]")
GOOD_CSV = "case,modality\n" + "".join(f"{case},{modality}\n" for case, modality in CASES.items())


def test_pattern_for_each_modality(raw: Path, call: Call) -> None:
    code, out, error = call(["convert", "table", "-d", "5", *BY_NAME])
    assert code == 0, error
    assert f"{NAME}: 2 CT, 2 MR\n" in out and "nnUNetv2_plan_and_preprocess -d 5 " in out
    assert section(raw) == {
        "layout": "plain",
        "harmonise": "paper",
        "modalities": ["CT", "MR"],
        "case_modality": CASES,
    }
    assert verify_raw_dataset(raw) == []
    assert call(["doctor", "-d", "5"])[0] == 0


def test_pattern_with_groups_renaming_and_order(raw: Path, call: Call) -> None:
    pattern = r"^amos_(?P<modality>00|05)(?P<patient>\d)"
    code, out, error = call(
        ["convert", "table", "-d", NAME, "--pattern", pattern, "--rename", "00=CT,05=MR", "--modalities", "MR,CT"]
    )
    assert code == 0, error
    assert "2 MR, 2 CT; 2 patients" in out
    assert section(raw)["modalities"] == ["MR", "CT"]
    assert section(raw)["case_modality"] == CASES
    assert section(raw)["case_patient"] == {"amos_0001": "0", "amos_0002": "0", "amos_0507": "0", "amos_0510": "1"}


def test_patient_pattern_goes_before_the_csv(raw: Path, call: Call) -> None:
    csv = write_csv(raw, GOOD_CSV.replace("modality\n", "modality,patient\n").replace("CT\n", "CT,x\n"))
    assert call(["convert", "table", "-d", "5", "--csv", csv])[0] == 0
    assert section(raw)["case_patient"] == {"amos_0001": "x", "amos_0002": "x"}
    assert call(["convert", "table", "-d", "5", "--csv", csv, "--overwrite", "--patient-pattern", r"\d+$"])[0] == 0
    assert section(raw)["case_patient"] == {case: case[5:] for case in CASES}
    assert (
        call(["convert", "table", "-d", "5", "--csv", csv, "--overwrite", "--patient-pattern", r"^amos_(\d\d)"])[0] == 0
    )
    assert {*section(raw)["case_patient"].values()} == {"00", "05"}


@pytest.mark.parametrize(
    "text",
    [
        GOOD_CSV,
        "\ufeff" + GOOD_CSV.replace(",", ";").replace("\n", "\r\n"),  # as a spreadsheet saves it in half of Europe
        "Patient, Modality ,CASE\n" + "".join(f",{modality}, {case}_0000.nii.gz\n" for case, modality in CASES.items()),
        GOOD_CSV.replace("amos_0507", "imagesTr/amos_0507_0000.nii.gz") + "\n ,\namos_0600,MR\n",
        GOOD_CSV.replace("amos_0001", "amos_0001.nii.gz"),
    ],
)
def test_csv_spellings(raw: Path, call: Call, text: str) -> None:
    code, _, error = call(["convert", "table", "-d", "5", "--csv", write_csv(raw, text)])
    assert code == 0, error
    assert section(raw)["case_modality"] == CASES
    assert "case_patient" not in section(raw)


def test_the_preprocessed_copy_gets_it_too(raw: Path, preprocessed: Path, call: Call) -> None:
    code, out, error = call(["convert", "table", "-d", "5", *BY_NAME])
    assert code == 0, error
    assert out.count("written: ") == 2 and "Next: nnUNetv2_train 5 2d 0 -tr nnUNetTrainerMulModSeg" in out
    assert section(preprocessed) == section(raw)
    assert [path.name for path in preprocessed.iterdir()] == ["dataset.json"]
    code, out, _ = call(["convert", "table", "-d", "5", *BY_NAME])
    assert code == 0 and "was there already" in out and "written" not in out


def test_another_table_is_replaced_only_with_overwrite(raw: Path, preprocessed: Path, call: Call) -> None:
    call(["convert", "table", "-d", "5", *BY_NAME])
    before = section(raw)
    other = ["convert", "table", "-d", "5", "--pattern", "CT=1$", "MR=[^1]$"]
    code, _, error = call(other)
    assert code == 2 and "another modality table (2 CT, 2 MR). Pass --overwrite" in error
    assert section(raw) == section(preprocessed) == before
    assert call([*other, "--overwrite"])[0] == 0
    assert section(raw)["case_modality"]["amos_0002"] == section(preprocessed)["case_modality"]["amos_0002"] == "MR"


FAULTS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no expression fits": (("--pattern", "CT=^amos_00"), 4, r"fits 2 cases not at all: amos_0507, amos_0510"),
    "two fit": (("--pattern", "CT=amos_0", "MR=amos_05"), 4, r"two modalities for 2 cases: amos_0507 \(CT, MR\)"),
    "neither form": (("--pattern", "amos"), 2, r"'amos' has neither a group \(\?P<modality>"),
    "not an expression": (("--pattern", "CT=("), 2, r"'\(' is no regular expression"),
    "32 unknown modality": (
        ("--pattern", "CT=^amos_00", "PET=^amos_05", "--modalities", "CT,MR"),
        4,
        r"2 cases have an unknown modality \(PET\): amos_0507, amos_0510\. Allowed: CT, MR",
    ),
    "capitals": (("--pattern", "ct=^amos_00", "MR=^amos_05", "--modalities", "CT,MR"), 4, r"--rename ct=CT"),
    "no patient": ((*BY_NAME, "--patient-pattern", "x(.)"), 4, r"--patient-pattern finds no patient in 4 cases"),
    "names twice": ((*BY_NAME, "--modalities", "CT,CT"), 2, r"expected different names such as CT,MR"),
    "bad renaming": ((*BY_NAME, "--rename", "CT"), 2, r"expected FOUND=NAME"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_patterns(fault: str, raw: Path, preprocessed: Path, call: Call) -> None:
    arguments, expected, message = FAULTS[fault]
    before = (raw / "dataset.json").read_bytes()
    code, _, error = call(["convert", "table", "-d", "5", *arguments])
    assert (code, bool(re.search(message, error))) == (expected, True), error
    assert (raw / "dataset.json").read_bytes() == (preprocessed / "dataset.json").read_bytes() == before


CSV_FAULTS: dict[str, tuple[str, str]] = {
    "32 cases missing": (
        GOOD_CSV.replace("amos_0002,CT\n", "").replace("amos_0510,MR\n", ""),
        r"modalities\.csv: 2 cases are not in the modality table: amos_0002, amos_0510\. Add them with one of CT, MR",
    ),
    "unknown case": (GOOD_CSV + "amos_0003,CT\n", r"names 1 cases that are not in the data set: amos_0003\. Did you"),
    "twice": (GOOD_CSV + "amos_0001_0000.nii.gz,MR\n", r"case amos_0001 is in lines 2 and 6"),
    "empty cell": (GOOD_CSV.replace("amos_0507,MR", "amos_0507,"), r"line 4: no modality in 'amos_0507,'"),
    "short line": (GOOD_CSV.replace("amos_0507,MR", "amos_0507"), r"line 4: no modality in 'amos_0507'"),
    "no header": (GOOD_CSV.partition("\n")[2], r"no column case and no column modality; its first line is 'amos_0001"),
    "empty file": ("", r"no column case"),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_bad_csv(fault: str, raw: Path, call: Call) -> None:
    text, message = CSV_FAULTS[fault]
    before = (raw / "dataset.json").read_bytes()
    code, _, error = call(["convert", "table", "-d", "5", "--csv", write_csv(raw, text)])
    assert code == 4 and re.search(message, error), error
    assert (raw / "dataset.json").read_bytes() == before


def test_unreadable_csv(raw: Path, call: Call) -> None:
    assert call(["convert", "table", "-d", "5", "--csv", str(raw / "none.csv")])[0] == 2
    path = raw / "latin.csv"
    path.write_bytes("case,modality\namos_0001,é\n".encode("latin-1"))
    code, _, error = call(["convert", "table", "-d", "5", "--csv", str(path)])
    assert code == 4 and "is not UTF-8 text" in error


@pytest.mark.parametrize("where", ["raw", "preprocessed"])
def test_a_channel_called_ct_is_refused(where: str, raw: Path, preprocessed: Path, call: Call) -> None:
    """Row 22: also where only the preprocessed copy still says so, because its plans then clip."""
    folder = raw if where == "raw" else preprocessed
    edit(folder, channel_names={"0": "ct"})
    before = [(path / "dataset.json").read_bytes() for path in (raw, preprocessed)]
    code, _, error = call(["convert", "table", "-d", "5", *BY_NAME])
    assert code == 4
    assert str(folder / "dataset.json") in error and "channel name 'CT' turns on CT clipping for MR" in error
    assert '"channel_names": {"0": "either_CT_or_MR"}' in error and "plan and preprocess again" in error
    assert [(path / "dataset.json").read_bytes() for path in (raw, preprocessed)] == before


def test_a_channel_called_ct_is_right_for_ct(raw: Path, call: Call) -> None:
    edit(raw, channel_names={"0": "CT"})
    code, out, error = call(["convert", "table", "-d", "5", "--pattern", "CT=amos"])
    assert code == 0, error
    assert "needs two modalities" in out


def test_damaged_preprocessed_json_stops_it_before_anything_is_written(
    raw: Path, preprocessed: Path, call: Call
) -> None:
    (preprocessed / "dataset.json").write_text("{", encoding="utf-8")
    before = (raw / "dataset.json").read_bytes()
    code, _, error = call(["convert", "table", "-d", "5", *BY_NAME])
    assert code == 4 and f"{preprocessed / 'dataset.json'} is not valid JSON" in error
    assert (raw / "dataset.json").read_bytes() == before


def write_splits(preprocessed: Path, splits: Any) -> bytes:
    path = preprocessed / FILE_NAME
    path.write_text(json.dumps(splits), encoding="utf-8")
    return path.read_bytes()


ONE_SIDED = [{"train": ["amos_0507", "amos_0510"], "val": ["amos_0001"]}, {"train": [*CASES][:3], "val": ["amos_0510"]}]


def test_existing_splits_are_kept_and_judged(raw: Path, preprocessed: Path, call: Call) -> None:
    before = write_splits(preprocessed, ONE_SIDED)
    code, out, error = call(["convert", "table", "-d", "5", *BY_NAME])
    assert code == 0
    assert "fold 0: trains on 0 CT, 2 MR; validates on 1 CT, 0 MR" in out
    assert "fold 1: trains on 2 CT, 1 MR; validates on 0 CT, 1 MR" in out
    assert "warning: fold 0 trains on 0 CT, 2 MR. Delete the file" in error
    assert (preprocessed / FILE_NAME).read_bytes() == before
    write_splits(preprocessed, [{"train": ["amos_0001", "gone"], "val": ["amos_0507"]}])
    _, _, error = call(["convert", "table", "-d", "5", *BY_NAME, "--patient-pattern", "amos", "--overwrite"])
    assert "cases that are not there: gone" in error and "cases in no fold: amos_0002, amos_0510" in error
    assert "patients in training and in validation of a fold: amos" in error
    (preprocessed / FILE_NAME).write_text("[", encoding="utf-8")
    code, _, error = call(["convert", "table", "-d", "5", *BY_NAME, "--overwrite"])
    assert code == 0 and "is not valid JSON" in error


# --- doctor ----------------------------------------------------------------------------------------------------------

DOCTOR: dict[str, tuple[dict[str, Any], Any, str]] = {
    "32 missing": (
        {"case_modality": {"amos_0001": "CT"}},
        None,
        r"3 cases are not in the modality table: amos_0002, amos_0507, amos_0510",
    ),
    "32 unknown": ({"modalities": ["CT", "PET"]}, None, r"unknown modality \(MR\): .* Allowed: CT, PET"),
    "malformed": ({"case_modality": [1]}, None, r'"case_modality" has to be'),
    "31 fold without one": ({}, ONE_SIDED, r"fold 0 trains on 0 CT, 2 MR\. Delete the file"),
    "40 gone": ({}, [{"train": [*CASES, "old"], "val": [*CASES]}], r"names 1 cases that are not in the data set: old"),
    "40 new": ({}, [{"train": [*CASES][1:], "val": []}], r"1 cases are in no split of .*: amos_0001"),
    "splits broken": ({}, {"train": []}, r"has to be a list with one"),
}


@pytest.mark.parametrize("fault", DOCTOR)
def test_doctor_reports(fault: str, raw: Path, preprocessed: Path, call: Call) -> None:
    changes, splits, message = DOCTOR[fault]
    edit(raw, **{SECTION: {"modalities": ["CT", "MR"], "case_modality": CASES, **changes}})
    if splits is not None:
        write_splits(preprocessed, splits)
    code, out, _ = call(["doctor", "-d", "5"])
    assert code == 4 and re.search(message, out), out
    assert out.count("✗") == 1, out


def test_doctor_accepts_our_own_splits(raw: Path, preprocessed: Path, call: Call) -> None:
    call(["convert", "table", "-d", "5", *BY_NAME])
    table = ModalityTable(("CT", "MR"), CASES)
    write_splits(preprocessed, stratified_splits(CASES, table))
    code, out, _ = call(["doctor", "-d", "5"])
    assert code == 0, out


# --- row 21: CT and MR exchanged -------------------------------------------------------------------------------------

SIX = {f"case_{number}": "CT" if number < 4 else "MR" for number in range(1, 7)}
EXCHANGED = {case: "MR" if modality == "CT" else "CT" for case, modality in SIX.items()}


@pytest.fixture
def six(nnunet_folders: dict[str, str]) -> Path:
    """Three CT in Hounsfield units and three MR; no table yet."""
    folder = Path(nnunet_folders["nnUNet_raw"]) / "Dataset006_Six"
    for seed, (case, modality) in enumerate(SIX.items()):
        image = make_image(seed)
        image = image * np.int16(10) - np.int16(1000) if modality == "CT" else image
        save(folder / "imagesTr" / f"{case}_0000.nii.gz", image)
        save(folder / "labelsTr" / f"{case}.nii.gz", make_label())
    content = {
        "channel_names": {"0": "CT_or_MR"},
        "labels": {"background": 0, "liver": 1, "spleen": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def csv_of(folder: Path, modalities: dict[str, str]) -> str:
    return write_csv(folder, "case,modality\n" + "".join(f"{case},{name}\n" for case, name in modalities.items()))


def named(text: str, mark: str) -> list[str]:
    """The cases of which ``text`` doubts the modality, in words for a CT and for an MR."""
    is_mr = re.findall(rf"{mark} case (\w+): CT has no value below -200 \(found 0 to \d+\); looks like MR", text)
    is_ct = re.findall(rf"{mark} case (\w+): MR has values below -200 \(found -1000 to \d+\); looks like CT", text)
    return [*is_ct, *is_mr]


def test_exchanged_modalities_are_all_named(six: Path, call: Call) -> None:
    code, _, error = call(["convert", "table", "-d", "6", "--csv", csv_of(six, EXCHANGED)])
    assert (code, named(error, "warning:")) == (0, [*SIX]), error
    assert section(six)["case_modality"] == EXCHANGED, "a warning only"
    code, out, _ = call(["doctor", "-d", "6"])
    assert (code, named(out, "!")) == (0, [*SIX]), out
    assert "✓ Dataset006_Six: nothing found that would stop nnU-Net" in out
    code, out, _ = call(["doctor", "-d", "6", "--json"])
    found = json.loads(out)
    assert (code, found["ok"], found["problems"], len(found["warnings"])) == (0, True, [], 6)
    code, out, error = call(["convert", "table", "-d", "6", "--csv", csv_of(six, SIX), "--overwrite", "--strict"])
    assert code == 0 and "warning" not in error, error
    code, out, _ = call(["doctor", "-d", "6"])
    assert code == 0 and "!" not in out, out


def test_exchanged_modalities_are_an_error_under_strict(six: Path, call: Call) -> None:
    before = (six / "dataset.json").read_bytes()
    code, _, error = call(["convert", "table", "-d", "6", "--csv", csv_of(six, EXCHANGED), "--strict"])
    assert (code, named(error, "-")) == (4, [*SIX]), error
    assert "Nothing was written" in error and "leave --strict out" in error
    assert (six / "dataset.json").read_bytes() == before


def test_harmonised_images_are_not_doubted(six: Path, call: Call) -> None:
    edit(six, **{SECTION: {"harmonise": "paper"}})
    code, _, error = call(["convert", "table", "-d", "6", "--csv", csv_of(six, EXCHANGED), "--strict"])
    assert code == 0 and "warning" not in error, error
    code, out, _ = call(["doctor", "-d", "6"])
    assert code == 0 and "!" not in out, out


def test_an_image_that_cannot_be_read_is_named_and_costs_nothing_else(six: Path, call: Call) -> None:
    (six / "imagesTr" / "case_2_0000.nii.gz").write_bytes(b"")
    call_of = ["convert", "table", "-d", "6", "--csv", csv_of(six, SIX)]
    assert call([*call_of, "--strict"])[0] == 4
    assert SECTION not in json.loads((six / "dataset.json").read_text(encoding="utf-8"))
    code, _, error = call(call_of)
    assert code == 0 and error.count("warning: ") == 1, error
    assert re.search(r"warning: case case_2: Cannot read .*case_2_0000\.nii\.gz: file ends early", error), error


def test_many_doubts_are_counted(six: Path, call: Call) -> None:
    for number in range(7, 13):
        save(six / "imagesTr" / f"case_{number}_0000.nii.gz", make_image(number))
    code, _, error = call(["convert", "table", "-d", "6", "--pattern", "CT=case_([4-9]|..)", "MR=case_[1-3]$"])
    assert code == 0 and error.count("warning: case ") == 10, error
    assert "warning: the same of 2 more cases; doctor -d lists them all" in error


def test_real_command(raw: Path, run_command: Callable[..., Any], nnunet_folders: dict[str, str]) -> None:
    done = run_command("convert", "table", "-d", "5", *BY_NAME, env=nnunet_folders)
    assert done.returncode == 0, done.stderr
    assert section(raw)["case_modality"] == CASES
    assert run_command("convert", "table", "--help").returncode == 0
