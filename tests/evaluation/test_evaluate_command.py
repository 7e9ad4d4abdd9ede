"""``nnunet_multimodal evaluate`` as a user runs it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from tiny_folders import organs, save, shifted


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for case, by in (("T1/a", 0), ("T2/a", 2)):
        save(tmp_path / "ref" / f"{case}.nii.gz", organs())
        save(tmp_path / "pred" / f"{case}.nii.gz", shifted(by))
    return tmp_path / "pred", tmp_path / "ref"


def test_from_folders_to_report(folders, tmp_path, run_command):
    (tmp_path / "cases.json").write_text(json.dumps({"T1/a": "T1", "T2/a": "T2"}))
    done = run_command(
        "evaluate", *folders, "-o", "out", "--label-names", "liver=1", "spleen=2", "both=1,2", "--tolerance", "2",
        "spleen=4", "--modality-map", "cases.json", "--in-distribution", "T1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "DSC/NSD, surface border, tolerance 2 or 4 mm; 2 cases"
    assert lines[1].split() == ["T1", "T2", "in-distribution", "out-of-distribution", "all", "cases"]
    liver = next(line for line in lines if line.startswith("liver")).split()
    assert liver[1] == "1.000/1.000" and liver[2].startswith("0.667/")
    assert next(line for line in lines if line.startswith("all organs")).split()[2] == "1.000/1.000"
    assert lines[-1] == str(Path("out") / "report.html")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cases.csv", "evaluation.json", "report.html", "summary.csv",
    ]  # fmt: skip
    settings = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["settings"]
    assert settings["labels"] == {"liver": 1, "spleen": 2, "both": [1, 2]}
    assert settings["tolerances_mm"] == {"liver": 2, "spleen": 4, "both": 2}


def test_trouble_is_listed_and_ends_with_1(folders, tmp_path, run_command):
    (folders[0] / "T1/a.nii.gz").unlink()
    save(folders[0] / "T2/extra.nii.gz", organs())
    save(folders[1] / "T2/b.nii.gz", organs())
    save(folders[0] / "T2/b.nii.gz", organs()[1:])
    (folders[1] / "T2/c.nii.gz").write_bytes(b"PK\x03\x04")
    save(folders[0] / "T2/c.nii.gz", organs())
    done = run_command("evaluate", *folders, "-o", "out", "--no-report", "-j", "1")
    assert done.returncode == 1
    assert "counted as missed (1): T1/a" in done.stderr
    assert "without a reference (1): T2/extra" in done.stderr
    assert "failed, counted as missed: prediction" in done.stderr and "15x14x6" in done.stderr
    assert "failed, not in any mean: " in done.stderr and "ZIP signature" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == str(Path("out") / "evaluation.json")
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--label-names", "liver"], 2, "NAME=ID"),
        (["--label-names", "liver=1", "liver=2"], 2, "liver more than once"),
        (["--label-names", "liver=1", "spleen=1"], 2, "the id 1 two names: liver and spleen"),
        (["-o", "pred/T1/a.nii.gz/sub"], 2, "a.nii.gz is no folder and cannot hold"),
        (["--tolerance", "near"], 2, "0 mm or more"),
        (["--tolerance", "lung=3"], 2, "lung"),
        (["--distance-when-missed", "far"], 2, "diagonal"),
        (["--labels-json", "nowhere.json"], 2, "nowhere.json"),
        (["--in-distribution", "T1"], 2, "--modality-pattern"),
    ],
)
def test_wrong_usage_ends_with_2(folders, run_command, arguments, code, message):
    done = run_command("evaluate", *folders, "-o", "out", *arguments)
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_file_in_place_of_a_folder_is_no_bug(monkeypatch, capsys):
    """It came up after OUT was tried."""
    from nnunet_multimodal import cli
    from nnunet_multimodal.commands import evaluate

    def fail(args: object) -> int:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", "/d/file.txt/sub")

    monkeypatch.setattr(evaluate, "run", fail)
    assert cli.main(["evaluate", "pred", "ref", "-o", "out"]) == 1
    assert capsys.readouterr().err == "error: cannot write /d/file.txt/sub: Not a directory\n"


def test_bad_data_ends_with_4(folders, tmp_path, run_command):
    (tmp_path / "empty").mkdir()
    done = run_command("evaluate", tmp_path / "empty", folders[1], "-o", "out")
    assert done.returncode == 4 and "No .nii.gz or .nii file" in done.stderr


def test_real_label_maps(data_dir, tmp_path, run_command):
    """Two real patients of one grid size cannot be mixed up; a map against itself is perfect."""
    labels = data_dir / "abdomen_mr_t2" / "labels"
    names = ["liver=1", "right_kidney=2", "left_kidney=3", "spleen=4"]
    same = labels / "mr01.nii.gz"
    done = run_command("evaluate", same, same, "-o", "out", "--no-report", "--label-names", *names)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["mean"] == {
        "dsc": 1, "nsd": 1, "hd95_mm": 0, "asd_mm": 0,
    }  # fmt: skip
    done = run_command("evaluate", labels / "mr02.nii.gz", labels / "mr01.nii.gz", "-o", "out")
    assert done.returncode == 4 and "not on the grid" in done.stderr
