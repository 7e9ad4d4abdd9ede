"""report: the numbers are those of the acceptances; the files are there all or none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from tiny_project import Workshop, anatomy, save

from nnunet_multimodal.relabel import report as module
from nnunet_multimodal.relabel.report import good_from, saved_share


def entry(cycle: int | None, voxels: int, changed: int | None) -> dict:
    return {"cycle": cycle, "voxels": voxels, "changed": changed}


def test_saved_is_of_all_voxels_together() -> None:
    assert saved_share([entry(1, 100, 10), entry(1, 300, 90)]) == 0.75
    assert saved_share([entry(1, 0, 0)]) is None
    assert saved_share([entry(1, 100, 150)]) == -0.5, "worse than empty is possible"


def test_from_which_cycle_on() -> None:
    cases = [entry(0, 100, 10), entry(1, 100, 50), entry(2, 100, 30), entry(3, 100, 5), entry(None, 100, None)]
    assert good_from(cases) == 2, "cycle 0 was good, but not all after it"
    assert good_from(cases[:2]) is None
    assert good_from([entry(None, 9, None)]) is None


def test_the_report(call, workshop: Workshop) -> None:
    """Two corrections by hand: the liver lacks 20 of 80 voxels in the proposals (test_accept.py)."""
    call("propose", workshop.place, "-n", 3, "-device", "cpu")
    for name in ("p6", "p7"):
        workshop.correct(name)
    call("accept", workshop.place, "--minutes", "p6=4", "p7=8")
    code, out, err = call("report", workshop.place)
    assert code == 0, err
    assert "cycle 0: 2 cases, DSC 0.952, share of edited voxels saved 0.828" in out
    folder = workshop.place / "report"
    assert sorted(path.name for path in folder.iterdir()) == ["cases.csv", "organs.csv", "report.html", "report.json"]
    content = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (point,) = content["curve"]
    assert point["dsc_of_organs"]["liver"] == pytest.approx(120 / 140)
    assert point["dsc_of_organs"]["right_kidney"] == 1
    assert point["saved"] == pytest.approx(1 - 40 / 232)
    assert point["minutes_median"] == 6 and point["changed_median"] == 20
    assert content["good_from_cycle"] == 0
    with (folder / "cases.csv").open(encoding="utf-8") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert rows["p7"]["changed"] == "20" and rows["p0"]["changed"] == ""
    with (folder / "organs.csv").open(encoding="utf-8") as file:
        assert len([*csv.DictReader(file)]) == 4 * 3
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 4 + 2
    assert 'src="http' not in page and "NaN" not in page


def test_an_undone_acceptance_is_not_in_it(call, workshop: Workshop) -> None:
    call("propose", workshop.place, "-n", 1, "-device", "cpu")
    workshop.correct("p7")
    call("accept", workshop.place)
    call("undo", workshop.place)
    assert call("report", workshop.place)[0] == 0
    content = json.loads((workshop.place / "report/report.json").read_text(encoding="utf-8"))
    assert content["curve"] == [] and len(content["cases"]) == 2


def test_a_full_disk_leaves_the_report_before(call, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    assert call("report", workshop.place)[0] == 0
    before = {path.name: path.read_bytes() for path in (workshop.place / "report").iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_csv", full)
    code, _, err = call("report", workshop.place)
    assert code == 1 and "cannot write" in err and "No space left" in err
    assert before == {path.name: path.read_bytes() for path in (workshop.place / "report").iterdir()}


def test_a_full_disk_accepts_nothing(call, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from nnunet_multimodal.relabel import store

    given = workshop.folder / "given"
    mask = anatomy(7)
    mask[1, 4, 3] = 0  # one that is not in the store yet
    save(given / "p7.nii.gz", mask)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(workshop.place / "masks"))

    monkeypatch.setattr(store, "write_like", full)
    code, _, err = call("accept", workshop.place, given)
    assert code == 1 and "No space left" in err
    assert workshop.state("p7")["state"] == "pool"
    monkeypatch.undo()
    assert call("accept", workshop.place, given)[0] == 0
    assert Path(workshop.place / "relabel.sqlite").is_file()
