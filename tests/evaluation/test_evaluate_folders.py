"""evaluate_folders(): pairing, labels, modalities, means, and every way in which something is missing or wrong."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_folders import AFFINE, SHAPE, organs, save, shifted

from nnunet_multimodal.errors import DataProblem, EnvironmentProblem, UsageError
from nnunet_multimodal.evaluation import evaluate_folders
from nnunet_multimodal.evaluation.output import all_or_none

LABELS = {"liver": 1, "spleen": 2}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and references of T1/a (equal), T1/b (moved by 1) and T2/a (moved by 2)."""
    for case, by in (("T1/a", 0), ("T1/b", 1), ("T2/a", 2)):
        save(tmp_path / "ref" / f"{case}.nii.gz", organs())
        save(tmp_path / "pred" / f"{case}.nii.gz", shifted(by))
    return tmp_path / "pred", tmp_path / "ref"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


def row(content: dict, name: str, organ: str = "all organs") -> dict:
    return next(r for r in content["summary"] if (r["name"], r["organ"]) == (name, organ))


def run(folders, labels=LABELS, output=None, **options) -> dict:
    return evaluate_folders(*folders, output, labels, progress=False, report=False, **options)


def case(content: dict, name: str) -> dict:
    return next(entry for entry in content["cases"] if entry["case"] == name)


# --- means -----------------------------------------------------------------------------------------------------------


def test_means_by_modality_group_and_organ(folders, tmp_path):
    content = run(
        folders, output=tmp_path / "out", modality_pattern="^(?P<modality>[^/]+)/", in_distribution=["T1"], jobs=1
    )
    assert content["mean"]["dsc"] == pytest.approx((1 + 5 / 6 + 4 / 6) / 3)
    assert row(content, "T1")["dsc_mean"] == row(content, "in-distribution")["dsc_mean"] == pytest.approx(11 / 12)
    assert row(content, "T2")["dsc_mean"] == row(content, "out-of-distribution")["dsc_mean"] == pytest.approx(2 / 3)
    liver = row(content, "T1", "liver")
    assert liver["dsc_sd"] == pytest.approx(math.sqrt(2) / 12) and liver["dsc_n"] == 2
    assert row(content, "T2", "liver")["dsc_sd"] is None
    # moved by 1.5 and 3 mm: within 2 mm, and partly without
    assert row(content, "T1")["nsd_mean"] == 1 and row(content, "T2")["nsd_mean"] < 1
    assert row(content, "T2")["hd95_mm_mean"] == pytest.approx(3)
    assert content["settings"]["groups"] == {"in-distribution": ["T1"], "out-of-distribution": ["T2"]}
    in_csv = rows(tmp_path / "out" / "summary.csv")
    assert [float(r["dsc_mean"]) for r in in_csv] == pytest.approx(
        [r["dsc_mean"] for r in content["summary"]], abs=1e-5
    )
    assert {r["surface"] for r in in_csv} == {"border"} and {r["tolerance_mm"] for r in in_csv} == {"2"}


def test_all_organs_is_a_mean_of_the_organs_means(folders):
    """The spleen is in one case of three: it still counts as much as the liver."""
    for name in ("T1/b", "T2/a"):
        for folder in folders:
            data = shifted(0 if folder == folders[1] else 2)
            save(folder / f"{name}.nii.gz", np.where(data == 1, data, 0).astype(np.uint8))
    content = run(folders)
    liver, spleen = (1 + 2 / 3 + 2 / 3) / 3, 1.0
    assert content["mean"]["dsc"] == pytest.approx((liver + spleen) / 2)
    assert row(content, "all cases")["both_empty"] == 2 and row(content, "all cases", "spleen")["dsc_n"] == 1


def test_the_table_of_cases(folders, tmp_path):
    run(folders, output=tmp_path / "out", tolerance=1.0, tolerances={"liver": 3.0})
    table = rows(tmp_path / "out" / "cases.csv")
    assert [*table[0]] == [
        "case", "modality", "organ", "dsc", "nsd", "hd95_mm", "asd_mm", "volume_ref_ml", "volume_pred_ml", "status",
        "surface", "tolerance_mm",
    ]  # fmt: skip
    moved = [r for r in table if r["case"] == "T2/a"]
    assert [r["organ"] for r in moved] == ["liver", "spleen"]
    assert [r["tolerance_mm"] for r in moved] == ["3", "1"]
    assert [float(r["nsd"]) for r in moved] == [1, pytest.approx(float(moved[1]["nsd"]))] and float(moved[1]["nsd"]) < 1
    assert float(moved[0]["volume_ref_ml"]) == pytest.approx(5 * 6 * 4 * 1.5 * 1.5 * 6 / 1000)


def test_the_spacing_of_thick_slices_is_along_the_right_axis(folders):
    save(folders[0] / "T1/a.nii.gz", np.roll(organs(), 1, axis=2))
    assert case(run(folders), "T1/a")["organs"]["liver"]["hd95_mm"] == pytest.approx(6)


def test_two_processes_give_the_same_in_the_same_order(folders):
    one, two = run(folders), run(folders, jobs=2)
    assert one["cases"] == two["cases"] and one["summary"] == two["summary"]


def test_two_files_of_any_name(folders, tmp_path):
    content = run((folders[0] / "T2/a.nii.gz", folders[1] / "T1/a.nii.gz"))
    assert [entry["case"] for entry in content["cases"]] == ["a"]
    assert content["mean"]["dsc"] == pytest.approx(2 / 3)


def test_storage_order_does_not_matter(folders):
    """The same patient, stored right to left instead of left to right."""
    flipped = AFFINE.copy()
    flipped[0] = [1.5, 0, 0, 20 - 1.5 * (SHAPE[0] - 1)]
    save(folders[0] / "T1/a.nii.gz", organs()[::-1], flipped)
    assert case(run(folders), "T1/a")["organs"]["liver"]["dsc"] == 1


# --- what is missing -------------------------------------------------------------------------------------------------


def test_a_missing_prediction_counts_as_missed(folders):
    (folders[0] / "T1/a.nii.gz").unlink()
    content = run(folders)
    assert content["missing_predictions"] == ["T1/a"] and content["counts"]["missed"] == 2
    assert [m["status"] for m in case(content, "T1/a")["organs"].values()] == ["missed", "missed"]
    assert content["mean"]["dsc"] == pytest.approx((0 + 5 / 6 + 4 / 6) / 3)
    assert row(content, "all cases", "liver")["hd95_mm_n"] == 2
    assert content["counts"]["measured"] == 3


def test_a_prediction_without_reference_is_listed(folders):
    save(folders[0] / "T9/z.nii.gz", organs())
    content = run(folders)
    assert content["without_reference"] == ["T9/z"] and content["counts"]["measured"] == 3


def test_missed_and_false_positive_organs_are_zero_and_counted(folders, tmp_path):
    data = organs()
    save(folders[0] / "T1/a.nii.gz", np.where(data == 2, 2, 0).astype(np.uint8))
    save(folders[1] / "T1/b.nii.gz", np.where(data == 1, 1, 0).astype(np.uint8))
    content = run(folders, output=tmp_path / "out")
    missed, extra = case(content, "T1/a")["organs"]["liver"], case(content, "T1/b")["organs"]["spleen"]
    assert (missed["status"], extra["status"]) == ("missed", "false_positive")
    assert (missed["dsc"], extra["dsc"], missed["nsd"], extra["nsd"]) == (0, 0, 0, 0)
    assert missed["hd95_mm"] is None and extra["hd95_mm"] is None
    assert row(content, "all cases", "liver")["dsc_mean"] == pytest.approx((0 + 5 / 6 + 4 / 6) / 3)
    assert row(content, "all cases", "liver")["hd95_mm_mean"] == pytest.approx((1.5 + 3) / 2)
    table = {(r["case"], r["organ"]): r for r in rows(tmp_path / "out" / "cases.csv")}
    assert table["T1/a", "liver"]["hd95_mm"] == "inf" and table["T1/b", "spleen"]["hd95_mm"] == ""


@pytest.mark.parametrize(("given", "expected"), [(50.0, 50.0), ("diagonal", math.hypot(24, 21, 36))])
def test_a_distance_for_missed_organs(folders, given, expected):
    (folders[0] / "T1/a.nii.gz").unlink()
    content = run(folders, distance_when_missed=given)
    liver = case(content, "T1/a")["organs"]["liver"]
    assert liver["hd95_mm"] == liver["asd_mm"] == pytest.approx(expected)
    assert liver["status"] == "missed"
    assert row(content, "all cases", "liver")["hd95_mm_mean"] == pytest.approx((expected + 1.5 + 3) / 3)


def test_json_has_no_nan(folders, tmp_path):
    (folders[0] / "T1/a.nii.gz").unlink()
    content = run(folders, output=tmp_path / "out", labels={**LABELS, "pancreas": 7})

    def refuse(word: str):
        raise AssertionError(word)

    text = (tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == content
    assert row(content, "all cases", "pancreas")["dsc_mean"] is None


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "affine", "words"),
    [
        (organs()[:-1], AFFINE, ["shape found 15x14x6", "expected 16x14x6"]),
        (organs(), AFFINE * [1, 1, 1.01, 1], ["spacing in mm found (1.5, 1.5, 6.06)", "expected (1.5, 1.5, 6)"]),
        (organs(), AFFINE + np.eye(4)[0][:, None] * [0, 0, 0, 4.0], ["origin in mm found (1.5,", "expected (-2.5,"]),
    ],
)
def test_another_grid_is_missed_in_that_case_only(folders, data, affine, words):
    save(folders[0] / "T1/a.nii.gz", data, affine)
    content = run(folders)
    assert [*content["failed"]] == ["T1/a"]
    for word in [*words, "--resample-to-reference", "pred/T1/a.nii.gz", "ref/T1/a.nii.gz"]:
        assert word in content["failed"]["T1/a"]
    assert content["mean"]["dsc"] == pytest.approx((0 + 5 / 6 + 4 / 6) / 3) and content["counts"]["failed"] == 1


def test_resampling_to_the_reference(folders):
    """Every voxel cut into two along x: by nearest neighbour it is the same again."""
    fine = AFFINE @ np.diag([0.5, 1, 1, 1])
    fine[:3, 3] += AFFINE[:3, 0] * -0.25
    save(folders[0] / "T1/b.nii.gz", np.repeat(shifted(1), 2, axis=0), fine)
    content = run(folders, resample_to_reference=True)
    assert case(content, "T1/b")["organs"]["liver"]["dsc"] == pytest.approx(5 / 6)
    assert "32x14x6" in case(content, "T1/b")["resampled"] and content["counts"]["resampled"] == 1


def test_resampling_a_smaller_image_leaves_background_outside(folders):
    cut = AFFINE.copy()
    cut[:3, 3] += AFFINE[:3, :3] @ [4, 0, 0]
    save(folders[0] / "T1/a.nii.gz", organs()[4:], cut)
    found = case(run(folders, resample_to_reference=True), "T1/a")["organs"]["liver"]
    assert found["dsc"] == pytest.approx(2 * 4 / (4 + 5))  # one of the liver's five columns is cut off


def test_files_that_are_no_label_maps_are_missed(folders):
    save(folders[0] / "T1/a.nii.gz", organs() * np.float32(0.5))
    (folders[0] / "T1/b.nii.gz").write_bytes(b"PK\x03\x04")
    content = run(folders)
    assert "no whole numbers, the first 0.5" in content["failed"]["T1/a"]
    assert "ZIP signature" in content["failed"]["T1/b"]
    assert row(content, "all cases")["cases"] == 3 and content["left_out"] == []
    assert content["mean"]["dsc"] == pytest.approx((0 + 0 + 4 / 6) / 3)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def on_another_grid(path: Path) -> None:
    save(path, organs()[1:])


def with_nan(path: Path) -> None:
    save(path, np.where(organs() == 1, np.nan, organs()).astype(np.float32))


@pytest.mark.parametrize("spoil", [truncated, on_another_grid, with_nan])
def test_a_bad_prediction_scores_as_a_missing_one(folders, tmp_path, spoil):
    spoil(folders[0] / "T1/b.nii.gz")
    bad = run(folders, output=tmp_path / "out")
    (folders[0] / "T1/b.nii.gz").unlink()
    missing = run(folders)
    assert bad["mean"] == missing["mean"] and bad["summary"] == missing["summary"]
    assert [*bad["failed"]] == ["T1/b"] and bad["missing_predictions"] == [] and bad["left_out"] == []
    assert (bad["counts"]["failed"], bad["counts"]["measured"], bad["counts"]["missed"]) == (1, 3, 2)
    listed = [r["status"] for r in rows(tmp_path / "out" / "cases.csv") if r["case"] == "T1/b"]
    assert listed == ["missed", "missed"]


def test_a_bad_reference_leaves_its_case_out(folders, tmp_path):
    with_nan(folders[1] / "T1/b.nii.gz")
    content = run(folders, output=tmp_path / "out")
    assert content["left_out"] == [*content["failed"]] == ["T1/b"]
    assert content["mean"]["dsc"] == pytest.approx((1 + 4 / 6) / 2)
    assert (content["counts"]["measured"], content["counts"]["left_out"]) == (2, 1)
    assert "T1/b" not in {r["case"] for r in rows(tmp_path / "out" / "cases.csv")}


def test_sheared_headers_are_measured(folders):
    """As nnU-Net's NibabelIOWithReorient reads them."""
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.01
    for folder in folders:
        save(folder / "T1/b.nii.gz", shifted(1) if folder == folders[0] else organs(), sheared)
    content = run(folders)
    assert content["failed"] == {} and case(content, "T1/b")["organs"]["liver"]["dsc"] == pytest.approx(5 / 6)


def test_label_maps_stored_as_floats_are_fine(folders):
    save(folders[0] / "T1/b.nii.gz", shifted(1).astype(np.float64))
    assert case(run(folders), "T1/b")["organs"]["liver"]["dsc"] == pytest.approx(5 / 6)


def test_when_no_case_can_be_measured_nothing_is_written(folders, tmp_path):
    for path in folders[0].rglob("*.nii.gz"):
        path.write_bytes(b"")
    with pytest.raises(DataProblem, match="No case could be measured"):
        run(folders, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_values_are_counted_and_taken_for_background(folders):
    data = shifted(1)
    data[0, 0, :3] = 9
    save(folders[0] / "T1/b.nii.gz", data)
    content = run(folders)
    assert content["unknown_labels"] == {"prediction": {"9": {"cases": 1, "voxels": 3}}, "reference": {}}
    assert case(content, "T1/b")["organs"]["liver"]["dsc"] == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {"liver": "one"}}, "expected an id"),
        ({"labels": {"background": 0}}, "no organ"),
        ({"labels": {"liver": 1, "ignore": 1}}, "also the id"),
        ({"tolerances": {"lung": 3}}, "'lung', which is not measured: liver, spleen"),
        ({"tolerance": -1}, "0 mm or more"),
        ({"surface": "mesh"}, "border or area"),
        ({"modality_pattern": "(T1"}, "no regular expression"),
        ({"modality_pattern": "T1"}, "no group named modality"),
        ({"in_distribution": ["T1"]}, "the cases have -.*--modality-pattern"),
        ({"distance_when_missed": "far"}, "diagonal"),
        ({"jobs": 0}, "at least 1"),
        ({"images": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_measured(folders, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        run(folders, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_belong_together(folders, tmp_path):
    save(tmp_path / "other" / "z.nii.gz", organs())
    with pytest.raises(DataProblem, match=r"no case in common: found z, expected T1/a, T1/b, T2/a"):
        run((tmp_path / "other", folders[1]))
    with pytest.raises(UsageError, match=r"a folder and .* a file"):
        run((folders[0], folders[1] / "T1/a.nii.gz"))
    with pytest.raises(UsageError, match="does not exist"):
        run((tmp_path / "nowhere", folders[1]))
    save(folders[0] / "T1/a.nii", organs())
    with pytest.raises(DataProblem, match="same case"):
        run(folders)


def link(name: Path, target: Path) -> None:
    name.symlink_to(target, target_is_directory=True)


def test_linked_folders_are_followed_and_loops_end(folders, tmp_path):
    for folder in folders:
        (folder / "T2").rename(tmp_path / f"real_{folder.name}")
        link(folder / "T2", tmp_path / f"real_{folder.name}")
        link(folder / "T1" / "up", folder)
        link(folder / "A", folder / "T1")  # sorted before T1, which must keep its cases
    assert [entry["case"] for entry in run(folders)["cases"]] == ["A/a", "A/b", "T1/a", "T1/b", "T2/a"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nothing can be made in")
def test_the_output_is_tried_before_anything_is_measured(folders, tmp_path, monkeypatch):
    from nnunet_multimodal.evaluation import evaluate

    monkeypatch.setattr(evaluate, "evaluate_case", lambda case, settings: pytest.fail("measured"))
    (tmp_path / "file.txt").write_text("")
    link(tmp_path / "dangling", tmp_path / "nowhere")
    for wrong in ("file.txt", "file.txt/sub", "file.txt/sub/sub", "dangling"):
        with pytest.raises(UsageError, match="is no folder"):
            run(folders, output=tmp_path / wrong)
    for wrong in ("/proc/foo", "/proc/foo/bar", tmp_path / ("x" * 300)):
        with pytest.raises(EnvironmentProblem, match=r"Cannot write to .*: "):
            run(folders, output=wrong)


# --- labels and modalities -------------------------------------------------------------------------------------------


def test_labels_and_modalities_from_dataset_json(folders):
    content = {
        "labels": {"background": 0, "organs": [1, 2], "liver": 1, "ignore": 3},
        "nnunet_multimodal": {"case_modality": {"T1/a": "CT", "b": "MR"}},
    }
    (folders[1].parent / "dataset.json").write_text(json.dumps(content))
    data = organs()
    data[:, :, 0] = 3
    save(folders[1] / "T1/a.nii.gz", data)
    found = run(folders, labels=None)
    assert found["settings"]["labels"] == {"organs": [1, 2], "liver": 1} and found["settings"]["ignore"] == 3
    assert found["settings"]["labels_source"].endswith("dataset.json")
    assert [entry["modality"] for entry in found["cases"]] == ["CT", "MR", "-"]
    assert found["without_modality"] == ["T2/a"]
    assert found["mean"]["dsc"] == pytest.approx((1 + 5 / 6 + 4 / 6) / 3)


def test_dataset_json_of_the_predictions_comes_first(folders):
    for folder, labels in ((folders[0], {"Liver": 1}), (folders[1], {"liver": 1, "spleen": 2})):
        (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **labels}}))
    assert [*run(folders, labels=None)["settings"]["labels"]] == ["Liver"]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"liver": 1, "spleen": 2}, "liver=1 spleen=2"),
        ({"kidney": 1}, "kidney=1"),
        ({"liver": 5}, "liver=5"),
        ({"spleen": 1, "liver": 2, "both": [1, 3]}, "both=1,3"),
        ({"a": 5, "ignore": 2}, "ignore=2"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_label_names_that_contradict_each_other_are_refused(folders, second, said, beside):
    first = folders[0] / "dataset.json"
    other = (folders[1].parent if beside else folders[1]) / "dataset.json"
    first.write_text(json.dumps({"labels": {"background": 0, "spleen": 1, "liver": 2, "both": [1, 2]}}))
    other.write_text(json.dumps({"labels": {"background": 0, **second}}))
    with pytest.raises(UsageError, match=r"contradict each other.*--label-names") as raised:
        run(folders, labels=None)
    assert f"{other} says {said}." in str(raised.value) and f"{first} says " in str(raised.value)
    assert run(folders)["settings"]["labels"] == LABELS  # what the user says holds


def test_an_id_has_one_name(folders):
    with pytest.raises(UsageError, match="the id 1 two names: liver and spleen"):
        run(folders, labels={"liver": 1, "spleen": 1})
    with pytest.raises(UsageError, match="more than one id for 'liver'"):
        run(folders, labels={"1": "liver", "2": "liver"})


def test_a_broken_dataset_json_matters_only_where_it_is_needed(folders):
    (folders[0] / "dataset.json").write_text("{")
    content = run(folders)
    assert "not valid JSON" in content["notes"][0] and content["mean"]["dsc"] is not None
    (note,) = run(folders, modality_pattern="^(?P<modality>[^/]+)/", in_distribution=["T1"])["notes"]
    assert note.startswith("no case_labels are taken from dataset.json: ")
    told = {"modality_pattern": "^(?P<modality>[^/]+)/", "case_labels": "none"}
    assert run(folders, in_distribution=["T1"], **told)["notes"] == []
    for needed in ({"labels": None}, {"in_distribution": ["T1"]}):
        with pytest.raises(UsageError, match="not valid JSON"):
            run(folders, **needed)


def test_labels_of_the_decathlon_are_understood(folders):
    (folders[1] / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "2": "spleen"}}))
    assert run(folders, labels=None)["settings"]["labels"] == {"spleen": 2}


def test_without_names_the_ids_of_the_references_are_measured(folders):
    data = shifted(1)
    data[0, 0, 0] = 5
    save(folders[0] / "T1/b.nii.gz", data)
    found = run(folders, labels=None)
    assert found["settings"]["labels"] == {"class_1": 1, "class_2": 2}
    assert found["unknown_labels"]["prediction"]["5"]["voxels"] == 1


@pytest.mark.parametrize(("value", "said"), [(np.inf, "first inf"), (5e9, "first 5000000000|first 5e.09")])
def test_without_names_a_reference_with_impossible_ids_is_left_out(folders, value, said):
    save(folders[1] / "T1/b.nii.gz", np.where(organs() == 1, value, organs()))
    found = run(folders, labels=None)
    assert found["settings"]["labels"] == {"class_1": 1, "class_2": 2} and found["left_out"] == ["T1/b"]
    assert re.search(said, found["failed"]["T1/b"])


def test_without_names_the_reason_why_no_reference_can_be_read_is_said(tmp_path):
    for name in ("pred", "ref"):
        (tmp_path / f"{name}.nii.gz").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataProblem, match=r"ref\.nii\.gz is not NIfTI .*ZIP"):
        run((tmp_path / "pred.nii.gz", tmp_path / "ref.nii.gz"), labels=None)


def test_the_modality_map_may_name_files(folders):
    found = run(folders, modality_map={"T1/a.nii.gz": "one", "b.nii": "two", "T9/x.nii.gz": "three"})
    assert [entry["modality"] for entry in found["cases"]] == ["one", "two", "-"]
    assert len(found["notes"]) == 1 and "that are no case (1): T9/x.nii.gz" in found["notes"][0]
    with pytest.raises(UsageError, match=r"its keys are x, T1, the cases T1/a, T1/b, T2/a"):
        run(folders, modality_map={"x": "one", "T1": "two"})
    with pytest.raises(UsageError, match="two modalities for T1/a: one and two"):
        run(folders, modality_map={"T1/a": "one", "T1/a.nii.gz": "two"})


def test_what_the_user_says_of_modalities_comes_first(folders):
    (folders[1] / "dataset.json").write_text(json.dumps({"nnunet_multimodal": {"case_modality": {"T2/a": "table"}}}))
    found = run(folders, modality_map={"T1/a": "told"}, modality_pattern="/(?P<modality>b)$")
    assert [entry["modality"] for entry in found["cases"]] == ["told", "b", "table"]


# --- files -----------------------------------------------------------------------------------------------------------


def test_without_a_report_the_one_of_an_earlier_run_goes(folders, tmp_path):
    run(folders, output=tmp_path / "out")
    (tmp_path / "out" / "report.html").write_text("of an earlier run")
    run(folders, output=tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cases.csv", "evaluation.json", "summary.csv"]


def test_an_interrupted_run_leaves_no_half_file(folders, tmp_path, monkeypatch):
    """Interrupted at the last moment, while a table is written over an older one."""
    import nnunet_multimodal.evaluation.output as output

    out = tmp_path / "out"
    run(folders, output=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    class Interrupted:
        def __init__(self, file, **options):
            self.file = file

        def writerow(self, row):
            self.file.write("half a fi")
            raise KeyboardInterrupt

    monkeypatch.setattr(output.csv, "writer", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folders, output=out, labels={"liver": 1})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_killed_process_is_said_so(folders, monkeypatch):
    """As when memory runs out: the run ends with a message and does not hang."""
    from nnunet_multimodal.errors import EnvironmentProblem
    from nnunet_multimodal.evaluation import evaluate

    monkeypatch.setattr(evaluate, "evaluate_case", _die)
    with pytest.raises(EnvironmentProblem, match="-j 1"):
        run(folders, jobs=2)


def _die(case, settings):
    import os

    os._exit(9)


def test_a_full_disk_leaves_the_earlier_results_as_they_were(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "cases.csv").write_text("of an earlier run")
    with pytest.raises(OSError, match="No space"), all_or_none(output) as folder:
        (folder / "cases.csv").write_text("new")
        raise OSError(28, "No space left on device")
    assert [path.name for path in output.iterdir()] == ["cases.csv"]
    assert (output / "cases.csv").read_text(encoding="utf-8") == "of an earlier run"
    with all_or_none(output) as folder:
        (folder / "cases.csv").write_text("new")
    assert [(path.name, path.read_text(encoding="utf-8")) for path in output.iterdir()] == [("cases.csv", "new")]
