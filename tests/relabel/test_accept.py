"""accept, reject, undo: what is checked, what is measured, what is kept."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_project import AFFINE, Workshop, anatomy, load, save

from nnunet_multimodal.relabel.store import MaskStore


def propose(call, workshop: Workshop, count: int = 4) -> None:
    code, out, err = call("propose", workshop.place, "-n", count, "-device", "cpu")
    assert code == 0, err
    assert f"{count} cases" in out


def details(call, workshop: Workshop, case: str) -> dict:
    return json.loads(call("log", workshop.place, "--case", case, "-n", 1, "--json")[1])[0]["details"]


# --- what is measured ------------------------------------------------------------------------------------------------


def test_a_correction_is_measured_against_its_proposal(call, workshop: Workshop) -> None:
    """The proposal lacks the liver's last slice of 5 x 4 voxels: by hand, 20 voxels and a Dice of 2*60/(80+60)."""
    propose(call, workshop)
    workshop.correct("p7")
    code, out, _ = call("accept", workshop.place, "--who", "Dr. A", "--minutes", 3.5)
    assert code == 0 and out.startswith("1 accepted: p7")
    assert "3 not saved since they were proposed, left alone" in out
    found = details(call, workshop, "p7")
    assert found["changed"] == 20
    assert found["voxels"] == 80 + 18 + 18
    assert found["minutes"] == 3.5
    assert (found["batch"], found["model"], found["cycle"]) == (1, 1, 0)
    assert found["organs"]["liver"] == {"voxels": 80, "dsc": 120 / 140, "added": 20, "removed": 0}
    assert found["organs"]["left_kidney"] == {"voxels": 18, "dsc": 1.0, "added": 0, "removed": 0}
    event = json.loads(call("log", workshop.place, "-n", 1, "--json")[1])[0]
    assert (event["kind"], event["who"], event["case"]) == ("accept", "Dr. A", "p7")
    state = workshop.state("p7")
    assert state["state"] == "accepted"
    stored = MaskStore(workshop.place / "masks")
    np.testing.assert_array_equal(load(stored.path(state["mask"])), anatomy(7))
    assert stored.path(state["mask"]).stat().st_mode & 0o222 == 0, "read-only: links lead to it"


def test_the_same_again_is_no_event_and_another_one_is_a_new_version(call, workshop: Workshop) -> None:
    propose(call, workshop)
    workshop.correct("p7")
    call("accept", workshop.place)
    first = workshop.state("p7")
    given = workshop.folder / "given"
    save(given / "p7.nii.gz", anatomy(7).astype(np.float32))  # the same numbers in another type
    code, out, _ = call("accept", workshop.place, given)
    assert (code, workshop.state("p7")) == (0, first)
    assert "1 were accepted before" in out
    better = anatomy(7)
    better[4, 3, 3] = 0
    save(given / "p7.nii.gz", better)
    assert call("accept", workshop.place, given)[0] == 0
    second = workshop.state("p7")
    assert second["mask"] != first["mask"]
    assert MaskStore(workshop.place / "masks").path(first["mask"]).is_file(), "the earlier one is kept"
    assert call("undo", workshop.place)[0] == 0
    assert workshop.state("p7") == first


def test_unsaved_proposals_are_accepted_only_if_asked(call, workshop: Workshop) -> None:
    propose(call, workshop)
    assert call("accept", workshop.place)[1].startswith("0 accepted")
    code, out, _ = call("accept", workshop.place, "--unchanged", "--cases", "p7", "p6")
    assert code == 0 and out.startswith("2 accepted: p7, p6")
    assert details(call, workshop, "p6")["changed"] == 0


def test_labels_from_the_start_have_no_proposal(call, workshop: Workshop) -> None:
    found = details(call, workshop, "p0")
    assert found["start"] and found["changed"] is None
    assert found["organs"]["liver"]["dsc"] is None


@pytest.mark.parametrize(
    "name", ["p7.nrrd", "p7_mask.mha", "p7-label.nii.gz", "p7.seg.nrrd", "p7/mask.nii.gz", "a/p7.nii"]
)
def test_masks_under_the_names_that_viewers_give(call, workshop: Workshop, name: str) -> None:
    given = workshop.folder / "given" / name
    truth = save(workshop.folder / "t.nii.gz", anatomy(7))
    given.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.ReadImage(str(truth)), str(given))
    code, _, err = call("accept", workshop.place, workshop.folder / "given")
    assert code == 0, err
    stored = MaskStore(workshop.place / "masks").path(workshop.state("p7")["mask"])
    np.testing.assert_array_equal(load(stored), anatomy(7))


# --- what is refused -------------------------------------------------------------------------------------------------


def swapped() -> np.ndarray:
    labels = anatomy(7)
    return np.array([0, 1, 3, 2], np.uint8)[labels]


def with_value(value: float, dtype: type = np.float32) -> np.ndarray:
    labels = anatomy(7).astype(dtype)
    labels[0, 0, 0] = value
    return labels


def moved(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


ERRORS = [
    (anatomy(7)[:, :, :-1], AFFINE, r"mask .*p7.nii.gz has shape 15x12x6, its image .* has 16x12x6"),
    (anatomy(7), AFFINE * [[1.1], [1], [1], [1]], r"spacing \(2.2, 2.0, 4.0\) mm, its image .*\(2.0, 2.0, 4.0\)"),
    (anatomy(7), moved(9), r"origin by 9.00 mm"),
    (with_value(7), AFFINE, r"undeclared labels, found 7 \(1 voxel\), declared 0..3"),
    (with_value(0.5), AFFINE, r"no whole numbers, found 0.5 \(1 voxel\)"),
    (with_value(-1), AFFINE, r"negative labels, found -1"),
    (with_value(np.nan), AFFINE, r"holds NaN"),
    (255 * (anatomy(7) > 0).astype(np.uint8), AFFINE, r"0/255 mask"),
]


@pytest.mark.parametrize(("mask", "affine", "message"), ERRORS)
def test_what_is_wrong_is_refused_and_costs_its_case_only(call, workshop, mask, affine, message: str) -> None:
    propose(call, workshop)
    given = workshop.folder / "given"
    save(given / "p7.nii.gz", mask, affine)
    save(given / "p6.nii.gz", anatomy(6))
    code, out, err = call("accept", workshop.place, given, "--confirm", "p7")  # no confirming makes it right
    assert code == 1
    assert re.search(message, err), err
    assert "1 accepted: p6" in out
    assert workshop.state("p7")["state"] == "proposed"


def without(label: int) -> np.ndarray:
    labels = anatomy(7)
    labels[labels == label] = 0
    return labels


DOUBTS = [
    (np.zeros_like(anatomy(7)), "the mask is empty"),
    (without(2), "in the proposal but not in the mask: right_kidney"),
    (swapped(), r"left_kidney lies to the right of right_kidney \(by 1\d mm\)"),
]


@pytest.mark.parametrize(("mask", "message"), DOUBTS)
def test_what_looks_wrong_has_to_be_confirmed(call, workshop: Workshop, mask, message: str) -> None:
    propose(call, workshop)
    save(workshop.package("p7") / "mask.nii.gz", mask)
    code, _, err = call("accept", workshop.place)
    assert code == 1
    assert re.search(rf"not accepted: p7: {message}\. If that is meant: --confirm p7", err), err
    assert workshop.state("p7")["state"] == "proposed"
    code, out, _ = call("accept", workshop.place, "--confirm", "p7")
    assert code == 0 and "p7: accepted, as you confirm" in out
    assert re.search(message, details(call, workshop, "p7")["doubts"][0])


def test_sides_are_the_patients_whatever_the_storage_order(call, workshop: Workshop) -> None:
    """The same anatomy, stored right to left: accepted, and stored in the image's order."""
    flipped = AFFINE @ np.array([[-1, 0, 0, 15], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    given = workshop.folder / "given"
    save(given / "p7.nii.gz", anatomy(7)[:, :, ::-1], flipped)
    assert call("accept", workshop.place, given)[0] == 0
    stored = MaskStore(workshop.place / "masks").path(workshop.state("p7")["mask"])
    np.testing.assert_array_equal(load(stored), anatomy(7))


def test_files_that_belong_to_nobody(call, workshop: Workshop) -> None:
    given = workshop.folder / "given"
    save(given / "p99.nii.gz", anatomy(7))
    save(given / "p7.nii.gz", anatomy(7))
    save(given / "again" / "p7.nii.gz", anatomy(7))
    code, out, err = call("accept", workshop.place, given)
    assert code == 1 and out.startswith("0 accepted")
    assert "p99.nii.gz belongs to no case: no image is named p99" in err
    assert "are both of p7. Take one away." in err
    assert call("accept", workshop.place, workshop.folder / "nowhere")[0] == 2
    assert call("accept", workshop.place, workshop.images / "..")[0] == 1


def test_a_damaged_file_costs_its_case(call, workshop: Workshop) -> None:
    given = workshop.folder / "given"
    path = save(given / "p7.nii.gz", anatomy(7))
    path.write_bytes(path.read_bytes()[:60])
    code, _, err = call("accept", workshop.place, given)
    assert code == 1 and "p7.nii.gz" in err
    assert workshop.state("p7")["state"] == "pool"


def test_an_image_that_was_exchanged_is_noticed(call, workshop: Workshop) -> None:
    from tiny_project import picture

    save(workshop.images / "p1.nii.gz", picture(77))
    given = workshop.folder / "given"
    changed = anatomy(1)
    changed[1, 3, 3] = 0
    save(given / "p1.nii.gz", changed)
    code, _, err = call("accept", workshop.place, given)
    assert code == 1 and "was changed since it was first used" in err
    code, out, _ = call("status", workshop.place, "--verify")
    assert code == 4 and "1 problems" in out


def test_minutes_are_numbers_of_cases_that_are_there(call, workshop: Workshop) -> None:
    given = workshop.folder / "given"
    for name in ("p6", "p7"):
        save(given / f"{name}.nii.gz", anatomy(int(name[1:])))
    assert call("accept", workshop.place, given, "--minutes", "p9=3")[0] == 2
    assert call("accept", workshop.place, given, "--minutes", "-3")[0] == 2
    assert call("accept", workshop.place, given, "--minutes", "p6=3", "10")[0] == 0
    assert [details(call, workshop, name)["minutes"] for name in ("p6", "p7")] == [3, 10]


# --- rejecting -------------------------------------------------------------------------------------------------------


def test_rejected_cases_are_out_until_undone(call, workshop: Workshop) -> None:
    before = workshop.state("p0")
    code, out, _ = call("reject", workshop.place, "p0", "p7", "--reason", "motion")
    assert code == 0 and out == "2 rejected: p0, p7\n"
    assert workshop.state("p0")["mask"] is None
    propose(call, workshop, 5)
    assert workshop.state("p7")["state"] == "rejected"
    assert call("undo", workshop.place)[0] == 0  # the proposal
    assert call("undo", workshop.place)[0] == 0
    assert workshop.state("p0") == before
    assert call("reject", workshop.place, "p99")[0] == 2


def test_a_mask_that_was_tampered_with_is_noticed(call, workshop: Workshop) -> None:
    path = MaskStore(workshop.place / "masks").path(workshop.state("p0")["mask"])
    assert call("status", workshop.place, "--verify")[0] == 0
    path.chmod(0o644)
    save(path, anatomy(5))
    code, out, _ = call("status", workshop.place, "--verify", "--json")
    assert code == 4
    assert "its content is not what its name says" in json.loads(out)["problems"][0]


def test_no_project(call, tmp_path: Path) -> None:
    code, _, err = call("status", tmp_path)
    assert code == 2 and "is no relabel project" in err
    assert list(tmp_path.iterdir()) == []
