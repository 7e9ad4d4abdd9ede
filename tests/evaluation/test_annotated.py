"""References that annotate some organs only: the others are counted as such, and are neither missed nor found."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_folders import organs, save, shifted

from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.evaluation import evaluate_folders

LABELS = {"liver": 1, "spleen": 2}
CASE_LABELS = {"a": ["liver"], "b": ["spleen"]}


def only(value: int) -> np.ndarray:
    return np.where(organs() == value, value, 0).astype(np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A raw data set whose case a annotates the liver, b the spleen, c both; predictions of both organs, moved by 1."""
    for case, reference in (("a", only(1)), ("b", only(2)), ("c", organs())):
        save(tmp_path / "raw" / "labelsTr" / f"{case}.nii.gz", reference)
        save(tmp_path / "pred" / f"{case}.nii.gz", shifted(1))
    declare(tmp_path, CASE_LABELS)
    return tmp_path / "pred", tmp_path / "raw" / "labelsTr"


def declare(folder: Path, case_labels: Any, labels: dict[str, Any] = LABELS) -> Path:
    """dataset.json of the references."""
    content = {"labels": {"background": 0, **labels}, "nnunet_multimodal": {"case_labels": case_labels}}
    path = folder / "raw" / "dataset.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def run(folders: tuple[Path, Path], output: Path | None = None, labels: Any = None, **options: Any) -> dict[str, Any]:
    return evaluate_folders(*folders, output, labels, progress=False, **{"report": False, **options})


def states(content: dict[str, Any]) -> dict[str, list[str]]:
    return {each["case"]: [m["status"] for m in each["organs"].values()] for each in content["cases"]}


def test_what_nobody_looked_for_is_counted_as_such_and_in_no_mean(folders: tuple[Path, Path], tmp_path: Path) -> None:
    content = run(folders)
    assert states(content) == {"a": ["ok", "not_annotated"], "b": ["not_annotated", "ok"], "c": ["ok", "ok"]}
    assert content["mean"]["dsc"] == pytest.approx(5 / 6)
    assert content["counts"]["not_annotated"] == 2 and content["counts"]["false_positive"] == 0
    liver = next(row for row in content["summary"] if row["organ"] == "liver")
    assert (liver["dsc_n"], liver["not_annotated"], liver["cases"]) == (2, 1, 3)
    spleen = content["cases"][0]["organs"]["spleen"]
    assert {spleen[key] for key in ("dsc", "nsd", "hd95_mm", "asd_mm")} == {None}
    assert spleen["volume_pred_ml"] > 0 and spleen["volume_ref_ml"] == 0
    assert content["settings"]["case_labels"] == str(tmp_path / "raw" / "dataset.json") and content["notes"] == []


def test_without_it_they_are_false_positives(folders: tuple[Path, Path]) -> None:
    """What it is there for."""
    content = run(folders, case_labels="none")
    assert content["counts"]["false_positive"] == 2 and content["counts"]["not_annotated"] == 0
    assert content["mean"]["dsc"] == pytest.approx(2 / 3 * 5 / 6) and content["settings"]["case_labels"] is None


def test_an_annotated_organ_can_still_be_missed(folders: tuple[Path, Path]) -> None:
    (folders[0] / "a.nii.gz").unlink()
    save(folders[0] / "b.nii.gz", organs()[1:])
    content = run(folders, distance_when_missed=50)
    assert states(content)["a"] == ["missed", "not_annotated"] and states(content)["b"] == ["not_annotated", "missed"]
    assert content["cases"][0]["organs"]["spleen"]["hd95_mm"] is None


def test_the_command_and_its_files(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["evaluate", *map(str, folders), "-o", str(out), "-j", "1"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not annotated, in no mean: liver in 1 case, spleen in 1 case" in lines
    assert not [line for line in lines if line.startswith("missed")]
    with (out / "cases.csv").open(encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if (row["case"], row["organ"]) == ("a", "spleen"))
    assert row["status"] == "not_annotated" and row["dsc"] == "" and float(row["volume_pred_ml"]) > 0
    with (out / "summary.csv").open(encoding="utf-8") as file:
        assert [row["not_annotated"] for row in csv.DictReader(file)][:3] == ["2", "1", "1"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Not annotated, in no mean: liver in 1 case, spleen in 1 case (by " in page
    assert "<th>not annotated</th>" in page and "<td>1</td></tr>" in page

    assert main([*words, "--case-labels", "none"]) == 0
    assert "missed: 0; found where the reference has none: 2" in capsys.readouterr().out
    assert "not annotated</th>" not in (out / "report.html").read_text(encoding="utf-8")


def test_a_table_of_ones_own(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of cases that no training data set has; files and folders may be named."""
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"a.nii.gz": ["liver"], "gone": ["liver"]}), encoding="utf-8")
    words = ["evaluate", *map(str, folders), "-o", str(tmp_path / "out"), "-j", "1", "--no-report"]
    assert main([*words, "--case-labels", str(own)]) == 0
    printed = capsys.readouterr()
    assert "not annotated, in no mean: spleen in 1 case" in printed.out
    assert "found where the reference has none: 1" in printed.out  # of b, which the table does not name
    assert f"{own} names 1 cases that are not there: gone" in printed.err
    for name in ("a", "b", "c"):
        for folder in folders:
            (folder / "sub").mkdir(exist_ok=True)
            (folder / f"{name}.nii.gz").rename(folder / "sub" / f"{name}.nii.gz")
    assert states(run(folders))["sub/a"] == ["ok", "not_annotated"]
    assert states(run(folders, case_labels={"sub/c": ["liver"]}))["sub/c"] == ["ok", "not_annotated"]


def test_organs_are_known_by_their_ids(folders: tuple[Path, Path]) -> None:
    """Other names, and regions: of several classes all have to be annotated."""
    content = run(folders, labels={"Leber": 1, "both": [1, 2], "Milz": [2]})
    assert states(content)["a"] == ["ok", "not_annotated", "not_annotated"]
    assert states(content)["c"] == ["ok", "ok", "ok"]
    assert content["notes"] == []  # that the region has voxels is not strange
    content = run(folders, labels={**LABELS, "both": [1, 2]}, case_labels={"c": ["liver", "spleen"]})
    assert states(content)["c"] == ["ok", "ok", "ok"]


def test_regions_of_the_data_set(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The whole is annotated, its core is not: neither the core nor what is left of the whole is known."""
    declare(tmp_path, {"a": ["whole"], "b": ["whole", "core"]}, {"whole": [1, 2], "core": [2]})
    assert states(run(folders)) == {"a": ["ok", "not_annotated"], "b": ["ok", "ok"], "c": ["ok", "ok"]}
    rest = run(folders, labels={"rim": 1, "core": 2})
    assert states(rest)["a"] == ["not_annotated"] * 2 and states(rest)["b"] == ["not_annotated", "ok"]


def test_a_reference_with_what_it_does_not_annotate_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    declare(tmp_path, {"c": ["liver"]})
    content = run(folders)
    assert states(content)["c"] == ["ok", "not_annotated"]
    assert content["notes"] == ["references with organs that they do not annotate (not measured): c (spleen)"]


def test_whose_dataset_json(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """That of the predictions is the model's: it is asked only where the references have none."""
    (folders[0] / "dataset.json").write_text(declare(tmp_path, {"c": ["liver"]}).read_text(encoding="utf-8"))
    own = declare(tmp_path, {})
    assert run(folders)["counts"]["not_annotated"] == 0
    own.unlink()
    assert states(run(folders))["c"] == ["ok", "not_annotated"]
    (folders[0] / "dataset.json").write_text("{", encoding="utf-8")
    (note,) = [note for note in run(folders, labels=LABELS)["notes"] if note.startswith("no case_labels are taken")]
    assert "not valid JSON" in note


def test_models_are_compared_where_the_reference_speaks(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", *map(str, folders), "-o", str(tmp_path / "out"), "-j", "1"]
    assert main([*words, "--compare", f"true={folders[1]}", "--label-names", "Liver=1", "spleen=2"]) == 0
    assert "not annotated, in no mean: Liver in 1 case, spleen in 1 case" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "comparison.json").read_text(encoding="utf-8"))
    assert [(test["pairs"], test["unpaired"]) for test in content["tests"] if test["metric"] == "dsc"] == [
        (3, 0), (2, 0), (2, 0),
    ]  # fmt: skip
    with (tmp_path / "out" / "comparison.csv").open(encoding="utf-8") as file:
        assert {row["not_annotated"] for row in csv.DictReader(file) if row["organ"] == "Liver"} == {"1"}
    for page in ("comparison.html", "true/report.html"):
        assert "Not annotated, in no mean: Liver in 1 case" in (tmp_path / "out" / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ({"a": ["livr"]}, DataProblem, "names 'livr' for a, which is no class .* did you mean 'liver'"),
        ({"a": []}, DataProblem, "names no class for a"),
        ({"a": "liver"}, DataProblem, "has to list the classes of a"),
        ({"z": ["liver"]}, UsageError, "names no case of these: z; the cases: a, b, c"),
        ({}, UsageError, "names no case"),
        ({"a": ["liver"], "a.nii.gz": ["spleen"]}, DataProblem, "says two things of a"),
        ({"labels": LABELS}, UsageError, 'has no "nnunet_multimodal": "case_labels"'),
        (["a"], UsageError, "must hold a JSON object"),
    ],
)
def test_tables_that_cannot_be(
    folders: tuple[Path, Path], tmp_path: Path, table: Any, error: type[Exception], message: str
) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(error, match=message):
        run(folders, case_labels=path)


def test_a_dataset_json_that_cannot_be(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = declare(tmp_path, {"a": ["livr"]})
    with pytest.raises(DataProblem, match=r"names 'livr'.*Or say what holds: --case-labels FILE, or none"):
        run(folders)
    assert run(folders, case_labels="none")["counts"]["not_annotated"] == 0
    declare(tmp_path, {"z": ["liver"]})
    (note,) = run(folders, case_labels=path)["notes"]
    assert note == f"case_labels of {path} name no case of these: all are taken for annotated in full"
