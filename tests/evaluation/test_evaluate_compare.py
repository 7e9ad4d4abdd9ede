"""Several models side by side, cases below a limit, and odd lefts and rights, through the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import Page
from tiny_folders import organs, save, shifted

from nnunet_multimodal.cli import main
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.evaluation.compare import evaluate_models

LABELS = {"liver": 1, "spleen": 2}
NAMES = ("--label-names", "liver=1", "spleen=2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight cases of two modalities; ``ours`` is moved by 0 or 1, ``stock`` by 2 where it is there."""
    root = tmp_path_factory.mktemp("models")
    for number in range(8):
        case = f"{('CT', 'MR')[number % 2]}/case_{number}.nii.gz"
        save(root / "ref" / case, organs())
        save(root / "ours" / case, shifted(number // 4))
        save(root / "stock" / case, shifted(2 + number % 2))
        save(root / "twin" / case, shifted(number // 4))
    return root


def evaluate(root: Path, output: Path, *more: str) -> int:
    words = [str(root / "ours"), str(root / "ref"), "-o", str(output), *NAMES, "-j", "1"]
    return main(["evaluate", *words, "--modality-pattern", "^(?P<modality>[^/]+)/", *more])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def test_two_models(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert evaluate(folders, out, "--compare", f"stock={folders / 'stock'}", "--below", "0.6") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "2 models on the same cases; DSC differences, p by Wilcoxon, of organs after Holm; cases"
    )
    assert lines[1].split() == ["ours", "DSC/NSD", "stock", "DSC/NSD", "ours", "-", "stock,", "p"]
    # ours: 1 or 5/6; stock: 4/6 or 3/6. Both organs are the same, so Holm doubles p = 2 / 2^8.
    liver = next(line for line in lines if line.startswith("liver")).split()
    assert liver[0] == "liver" and liver[1].startswith("0.917/") and liver[2:4] == ["0", "(0"]
    assert liver[-2:] == ["+0.333", ".016"]
    assert next(line for line in lines if line.startswith("all organs")).split()[-2:] == ["+0.333", ".008"]
    assert lines[-1] == str(out / "comparison.html")
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.csv", "comparison.html", "comparison.json", "ours", "significance.csv", "stock",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "stock").iterdir()) == [
        "cases.csv", "evaluation.json", "report.html", "summary.csv",
    ]  # fmt: skip

    means = rows(out / "comparison.csv")
    assert [row["model"] for row in means[:4]] == ["ours", "stock", "ours", "stock"]
    of = {(row["model"], row["name"], row["organ"]): row for row in means}
    assert float(of["stock", "all cases", "spleen"]["dsc_mean"]) == pytest.approx(7 / 12, abs=1e-5)
    assert float(of["stock", "MR", "spleen"]["dsc_mean"]) == pytest.approx(0.5)
    assert of["stock", "MR", "spleen"]["below_share"] == "1" and of["stock", "CT", "spleen"]["below"] == "0"
    tests = {(row["name"], row["metric"], row["organ"]): row for row in rows(out / "significance.csv")}
    assert float(tests["all cases", "dsc", "liver"]["p"]) == pytest.approx(2 / 2**8)
    assert float(tests["all cases", "dsc", "liver"]["p_holm"]) == pytest.approx(4 / 2**8)
    assert tests["CT", "dsc", "liver"]["p"] == "" and "too few pairs" in tests["CT", "dsc", "liver"]["note"]
    content = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert content["models"]["ours"]["mean"]["dsc"] == pytest.approx(11 / 12)
    assert content["tests"][0]["p_holm"] is None and "Holm" in content["definitions"]["test"]


def test_the_page(folders: Path, tmp_path: Path) -> None:
    models = f"stock={folders / 'stock'}", f"twin={folders / 'twin'}"
    assert evaluate(folders, tmp_path, "--name", "our+model", "--compare", *models) == 0
    page = Page((tmp_path / "comparison.html").read_text(encoding="utf-8"))
    assert page.open == [] and not {"link", "iframe", "object", "script"} & {*page.tags}
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name == "src")
    assert [value for name, value in page.attributes if name == "href"] == [
        "our%2Bmodel/report.html", "stock/report.html", "twin/report.html",
    ]  # fmt: skip
    assert len(page.pictures()) == 4, "DSC and NSD of each of two modalities"
    for words in (
        "Comparison of 3 models",
        "our+model − stock",
        "our+model − twin",
        "no pair differs",
        "DSC, CT",
        ".016",
    ):
        assert words in page.text, words


def test_three_models_are_compared_two_by_two(folders: Path, tmp_path: Path) -> None:
    models = {name: folders / name for name in ("ours", "stock", "twin")}
    content = evaluate_models(models, folders / "ref", tmp_path, LABELS, report=False, progress=False)
    assert not [*tmp_path.rglob("*.html")]
    pairs = {
        (row["a"], row["b"]): row for row in content["tests"] if row["organ"] == "liver" and row["metric"] == "dsc"
    }
    assert [*pairs] == [("ours", "stock"), ("ours", "twin"), ("stock", "twin")]
    assert pairs["ours", "twin"]["p"] == 1 and pairs["stock", "twin"]["difference"] == pytest.approx(-1 / 3)


def test_trouble_of_one_model_is_named_and_ends_with_1(folders: Path, tmp_path: Path, capsys) -> None:
    for path in (folders / "stock").rglob("*.nii.gz"):
        if path.name != "case_0.nii.gz":
            (tmp_path / "half" / path.parent.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "half" / path.parent.name / path.name).write_bytes(path.read_bytes())
    assert evaluate(folders, tmp_path / "out", "--no-report", "--compare", f"half={tmp_path / 'half'}") == 1
    captured = capsys.readouterr()
    assert "half: without a prediction, counted as missed (1): CT/case_0" in captured.err
    assert captured.out.splitlines()[-1] == str(tmp_path / "out/comparison.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--compare", "stock"), "expected NAME=DIR"),
        (("--compare", "ours={root}/stock"), "--compare has ours more than once"),
        (("--compare", "a/b={root}/stock"), "a model's name must consist of letters"),
        (("--compare", "stock={root}/nowhere"), "nowhere does not exist"),
        (("--compare", "stock={root}/stock/CT/case_0.nii.gz"), "models are compared folder by folder"),
        (("--name", "ours"), "give --compare, too"),
        (("--below", "0"), "expected a DSC above 0"),
        (("--below", "70"), "expected a DSC above 0"),
    ],
)
def test_wrong_usage(folders: Path, tmp_path: Path, capsys, more: tuple[str, ...], message: str) -> None:
    assert evaluate(folders, tmp_path / "out", *(word.format(root=folders) for word in more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_with_other_labels_are_not_compared(folders: Path, tmp_path: Path) -> None:
    for name, labels in (("a", {"background": 0, "liver": 1}), ("b", {"background": 0, "liver": 2})):
        save(tmp_path / name / "case_0.nii.gz", organs())
        (tmp_path / name / "dataset.json").write_text(json.dumps({"labels": labels}), encoding="utf-8")
    models = {name: tmp_path / name for name in ("a", "b")}
    with pytest.raises(UsageError, match=r"a has the labels liver=1 .*, b liver=2 .*--label-names"):
        evaluate_models(models, folders / "ref/CT", tmp_path / "out")
    with pytest.raises(UsageError, match="two models or more"):
        evaluate_models({"a": tmp_path / "a"}, folders / "ref/CT", tmp_path / "out")


# --- below, and sides ------------------------------------------------------------------------------------------------


def test_cases_below_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four cases moved by 0 to 3: DSC 1, 5/6, 4/6, 3/6; a fifth is missed, a sixth has no spleen anywhere."""
    for number in range(6):
        reference = np.where(organs() == 1, 1, 0).astype(np.uint8) if number == 5 else organs()
        save(tmp_path / f"ref/{number}.nii.gz", reference)
        if number < 4:
            save(tmp_path / f"pred/{number}.nii.gz", shifted(number))
    save(tmp_path / "pred/4.nii.gz", np.zeros_like(organs()))
    save(tmp_path / "pred/5.nii.gz", np.where(organs() == 1, 1, 0).astype(np.uint8))
    words = ["evaluate", str(tmp_path / "pred"), str(tmp_path / "ref"), "-o", str(tmp_path / "out"), *NAMES, "-j", "1"]
    assert main([*words, "--below", "0.7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("DSC < 0.7")
    assert next(line for line in lines if line.startswith("liver")).endswith("3 (50 %)")
    assert next(line for line in lines if line.startswith("spleen")).endswith("3 (60 %)"), "of those that have one"
    assert next(line for line in lines if line.startswith("all organs")).endswith("3 (50 %)"), "of cases"
    summary = rows(tmp_path / "out/summary.csv")
    assert [(row["organ"], row["below"], row["below_share"], row["below_dsc"]) for row in summary[:3]] == [
        ("all organs", "3", "0.5", "0.7"), ("liver", "3", "0.5", "0.7"), ("spleen", "3", "0.6", "0.7"),
    ]  # fmt: skip
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "DSC below 0.7" in page and "3 (60 %)" in page
    assert main(words) == 0
    assert "below" not in rows(tmp_path / "out/summary.csv")[0]
    assert "DSC below" not in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def kidneys(exchanged: bool = False) -> np.ndarray:
    """uint8 [X, Y, Z], stored from right to left as ``tiny_folders`` stores it: the left kidney at large x."""
    labels = np.zeros((16, 14, 6), np.uint8)
    labels[11:14, 4:8, 2:5], labels[2:5, 4:8, 2:5] = (2, 1) if exchanged else (1, 2)
    return labels


def test_exchanged_sides_are_said_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for case, prediction, reference in (
        ("good", kidneys(), kidneys()),
        ("bad", kidneys(True), kidneys()),
        ("situs", kidneys(True), kidneys(True)),
    ):
        save(tmp_path / f"ref/{case}.nii.gz", reference)
        save(tmp_path / f"pred/{case}.nii.gz", prediction)
    words = ["evaluate", str(tmp_path / "pred"), str(tmp_path / "ref"), "-o", str(tmp_path / "out"), "-j", "1"]
    assert main([*words, "--label-names", "left_kidney=1", "right_kidney=2"]) == 0
    assert "left and right: exchanged in 1 case (bad)" in capsys.readouterr().out.splitlines()
    content = json.loads((tmp_path / "out/evaluation.json").read_text(encoding="utf-8"))
    assert content["sides"] == {"exchanged": ["bad"]}
    found: dict[str, Any] = {case["case"]: case["sides"] for case in content["cases"]}
    assert found["good"] == [] and found["situs"][0]["in_reference"] is True
    assert found["bad"][0]["kind"] == "exchanged" and found["bad"][0]["in_reference"] is False
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert "bad: left_kidney lies to the right of right_kidney (by 14 mm) (exchanged)" in page.text
    assert "situs: left_kidney" not in page.text
