"""``nnunet_multimodal evaluate --shift``, with a tiny model: curves, what is listed, going on, and bad input."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from nnunet_multimodal import cli
from nnunet_multimodal.data.shifts import SHIFTS
from nnunet_multimodal.environment import extension_value
from nnunet_multimodal.evaluation import shift_study
from nnunet_multimodal.inference import folder as folder_module
from nnunet_multimodal.relabel.locks import held

TINY = Path(__file__).resolve().parents[1] / "inference"
SHAPE = (6, 20, 18)  # z, y, x
CASES = {"ct_a": "CT", "mr_a": "MR", "mr_b": "MR"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """A result folder with random weights."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TINY))
        from tiny_volumes import volume_model

        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_compile", "f")
        patch.setenv("nnUNet_extTrainer", extension_value())
        yield volume_model(2)


def write(path: Path, array_zyx: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array_zyx.transpose(2, 1, 0), np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


@pytest.fixture(scope="module")
def predicted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """in: three images; ref: what the model itself predicts of them, so that level 0 is perfect."""
    root = tmp_path_factory.mktemp("shift")
    for seed, case in enumerate(CASES):
        image = np.random.default_rng(seed).normal(100, 20, SHAPE).astype(np.float32)
        image[2:5, 5:14, 4:12] += 80 * (seed + 1)
        write(root / f"in/{case}_0000.nii.gz", image - (1000 if case == "ct_a" else 0))
    arguments = ["predict", "-i", root / "in", "-o", root / "ref", "-m", model, "-device", "cpu", "--disable_tta"]
    assert cli.main([str(word) for word in arguments]) == 0
    for name in ("dataset.json", "plans.json", "predictions.json"):
        (root / "ref" / name).unlink()
    (root / "ref/dataset.json").write_text(
        json.dumps({"nnunet_multimodal": {"modalities": ["CT", "MR"], "case_modality": CASES}}), encoding="utf-8"
    )
    return root


@pytest.fixture
def work(predicted: Path, tmp_path: Path) -> Path:
    shutil.copytree(predicted, tmp_path, dirs_exist_ok=True)
    return tmp_path


def shift(work: Path, model: Path, names: str, *more: str) -> int:
    return cli.main([
        "evaluate", "--shift", names, "-m", str(model), "-i", str(work / "in"), str(work / "ref"),
        "-o", str(work / "out"), "-device", "cpu", "--disable_tta", "-j", "1", *more,
    ])  # fmt: skip


def result(work: Path) -> dict[str, Any]:
    return json.loads((work / "out/shift.json").read_text(encoding="utf-8"))


def rows_of(content: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if all(row[key] == value for key, value in wanted.items())]


def test_curves_per_modality_and_organ(work: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shift(work, model, "noise,ghosting", "--levels", "2") == 0
    content = result(work)
    assert content["cases"] == 3 and content["modalities"] == ["CT", "MR"]
    start = rows_of(content, shift="none", organ="all organs")
    assert {(row["name"], row["cases"]) for row in start} == {("all cases", 3), ("CT", 1), ("MR", 2)}
    assert all(row["dsc_mean"] == 1 and row["dsc_change"] == 0 for row in start), "the reference is the prediction"
    noise = rows_of(content, shift="noise", organ="all organs", name="MR")
    assert [(row["level"], row["severity"]) for row in noise] == [(1, 0.5), (2, 1.0)]
    assert 1 > noise[0]["dsc_mean"] > noise[1]["dsc_mean"] > 0
    assert noise[1]["dsc_change"] == pytest.approx(noise[1]["dsc_mean"] - 1)
    lost = {(row["shift"], row["name"], row["organ"]): row for row in content["lost_5_points"]}
    first = noise[0]["dsc_mean"]
    expected = 0.5 * 0.05 / (1 - first) if first < 0.95 else 0.5 + 0.5 * (first - 0.95) / (first - noise[1]["dsc_mean"])
    assert lost["noise", "MR", "all organs"]["severity"] == pytest.approx(expected)
    assert {row["organ"] for row in content["rows"]} == {"all organs", "spine", "left_kidney", "right_kidney", "liver"}
    printed = capsys.readouterr().out
    assert "noise" in printed and f"{noise[0]['dsc_mean']:.3f}" in printed
    assert printed.splitlines()[-1] == str(work / "out/shift.html")


def test_files(work: Path, model: Path) -> None:
    assert shift(work, model, "gamma", "--levels", "1") == 0
    assert sorted(path.name for path in (work / "out").iterdir() if path.name != ".locks") == [
        "levels", "shift.csv", "shift.html", "shift.json", "shift_cases.csv", "study.json",
    ]  # fmt: skip
    with (work / "out/shift_cases.csv").open(encoding="utf-8") as file:
        cases = [*csv.DictReader(file)]
    assert len(cases) == 2 * 3 * 4
    of = [float(row["dsc"]) for row in cases if row["shift"] == "gamma" and row["case"] == "ct_a" and row["dsc"]]
    content = result(work)
    mean = rows_of(content, shift="gamma", name="CT", organ="all organs")[0]["dsc_mean"]
    assert np.mean(of) == pytest.approx(mean, abs=1e-5)
    with (work / "out/shift.csv").open(encoding="utf-8") as file:
        table = [*csv.DictReader(file)]
    assert len(table) == len(content["rows"]) == 2 * 3 * 5
    page = html.unescape((work / "out/shift.html").read_text(encoding="utf-8"))
    assert page.count("data:image/png;base64,") == 2, "the curves and the examples"
    assert "http" not in page and f"{mean:.3f}" in page and SHIFTS["gamma"].what in page


def test_modalities_that_are_said_later_are_in_all_tables(work: Path, model: Path) -> None:
    (work / "ref/dataset.json").unlink()
    names = ["--label-names", "liver=1", "--levels", "1", "--no-report"]
    assert shift(work, model, "noise", *names) == 0
    (work / "map.json").write_text(json.dumps(CASES), encoding="utf-8")
    assert shift(work, model, "noise", *names, "--modality-map", str(work / "map.json")) == 0
    assert {row["name"] for row in rows_of(result(work), scope="modality")} == {"CT", "MR"}
    with (work / "out/shift_cases.csv").open(encoding="utf-8") as file:
        assert {row["case"]: row["modality"] for row in csv.DictReader(file)} == CASES


def test_the_example_of_an_image_with_nan_is_what_was_predicted(work: Path, model: Path, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(shift_study, "write_report", lambda path, content, example: seen.append(example.images))
    image = np.asanyarray(nib.load(work / "in/ct_a_0000.nii.gz").dataobj).copy()
    image[0, 0, 0] = np.nan
    write(work / "in/ct_a_0000.nii.gz", image.transpose(2, 1, 0))
    assert shift(work, model, "noise", "--levels", "1", "--nan-to", "-1000") == 0
    assert seen[0][0, 0, 0, 0] == -1000 and np.isfinite(seen[0]).all()


def test_all_shifts_leave_the_grid_and_the_images_alone(work: Path, model: Path) -> None:
    before = {path.name: path.read_bytes() for path in (work / "in").iterdir()}
    assert shift(work, model, "all", "--levels", "1", "--keep-predictions", "--no-report") == 0
    assert {path.name: path.read_bytes() for path in (work / "in").iterdir()} == before
    folders = sorted(path.name for path in (work / "out/predictions").iterdir())
    assert folders == ["bias-9", "gamma-2.5", "ghosting-25", "noise-1", "none", "resolution-5"]
    maps = {name: nib.load(work / "out/predictions" / name / "mr_a.nii.gz") for name in folders}
    for name, found in maps.items():
        assert np.array_equal(found.affine, maps["none"].affine) and found.shape == maps["none"].shape
        assert np.array_equal(found.get_fdata(), maps["none"].get_fdata()) == (name == "none"), name
    assert not (work / "out/shift.html").exists()


def test_goes_on_and_grows(work: Path, model: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Interrupted at the fifth image: the first level stays, the second goes on behind its first case."""
    predicted = []

    def prepare(case: Any, how: Any, *rest: Any, real: Any = folder_module.prepare) -> Any:
        predicted.append((None if how.change is None else how.change.shift, case.name))
        if len(predicted) == 5 and not (work / "stop").exists():
            (work / "stop").touch()
            raise KeyboardInterrupt
        return real(case, how, *rest)

    monkeypatch.setattr(folder_module, "prepare", prepare)
    assert shift(work, model, "noise", "--levels", "2") == 130
    assert not (work / "out/shift.json").exists() and (work / "out/levels/none.json").exists()
    del predicted[:]
    assert shift(work, model, "noise", "--levels", "2") == 0
    assert predicted == [("noise", case) for case in ("mr_a", "mr_b", "ct_a", "mr_a", "mr_b")]
    assert "taken from an earlier run: none" in capsys.readouterr().out
    first = result(work)
    del predicted[:]
    assert shift(work, model, "noise,gamma", "--levels", "1") == 0
    assert {name for name, _ in predicted} == {"gamma"}, "noise of 1 is there"
    grown = result(work)
    assert rows_of(grown, shift="noise")[0]["dsc_mean"] == rows_of(first, shift="noise", level=2)[0]["dsc_mean"]
    shutil.rmtree(work / "out")
    assert shift(work, model, "noise", "--levels", "2") == 0
    assert result(work)["rows"] == first["rows"], "the same as without the interruption"


def test_another_model_or_seed_does_not_mix(work: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shift(work, model, "noise", "--levels", "1") == 0
    first = result(work)
    assert shift(work, model, "noise", "--levels", "1", "--seed", "1") == 2
    assert "holds a study with seed 0, now it is 1" in capsys.readouterr().err
    shutil.rmtree(work / "out")
    assert shift(work, model, "noise", "--levels", "1", "--seed", "1") == 0
    assert result(work)["rows"] != first["rows"]


def test_another_image_of_the_same_name_is_predicted_again(work: Path, model: Path) -> None:
    assert shift(work, model, "noise", "--levels", "1", "--no-report") == 0
    first = result(work)
    shutil.copy(work / "in/mr_b_0000.nii.gz", work / "in/mr_a_0000.nii.gz")
    assert shift(work, model, "noise", "--levels", "1", "--no-report") == 0
    second = result(work)
    for row, again in zip(first["rows"], second["rows"]):
        assert (row["dsc_mean"] == again["dsc_mean"]) == (row["name"] == "CT"), row
    shutil.rmtree(work / "out")
    assert shift(work, model, "noise", "--levels", "1", "--no-report") == 0
    assert result(work)["rows"] == second["rows"]


def test_what_is_alone_or_cannot_be_predicted_is_listed(work: Path, model: Path, capsys) -> None:
    shutil.copy(work / "in/mr_a_0000.nii.gz", work / "in/lonely_0000.nii.gz")
    shutil.copy(work / "ref/mr_a.nii.gz", work / "ref/orphan.nii.gz")
    write(work / "in/mr_b_0000.nii.gz", np.full(SHAPE, 3.0, np.float32))
    assert shift(work, model, "noise", "--levels", "1") == 1
    content = result(work)
    assert content["cases"] == 2 and [*content["left_out"]] == ["mr_b"] and "constant" in content["left_out"]["mr_b"]
    assert content["without_reference"] == ["lonely"] and content["without_image"] == ["orphan"]
    assert {row["cases"] for row in rows_of(content, name="all cases", organ="liver")} == {2}
    printed = capsys.readouterr().err
    assert "images without a reference, in no curve (1): lonely" in printed
    assert "references without an image, in no curve (1): orphan" in printed and "left out: " in printed
    page = (work / "out/shift.html").read_text(encoding="utf-8")
    assert "lonely" in page and "orphan" in page and "mr_b" in page


def test_what_fails_at_a_level_counts_as_missed_there_and_is_tried_again(work: Path, model: Path, monkeypatch) -> None:
    broken = [True]

    def prepare(case: Any, how: Any, *rest: Any, real: Any = folder_module.prepare) -> Any:
        if broken[0] and how.change is not None and case.name == "ct_a":
            raise RuntimeError("out of memory")
        return real(case, how, *rest)

    monkeypatch.setattr(folder_module, "prepare", prepare)
    assert shift(work, model, "noise", "--levels", "1") == 1
    content = result(work)
    assert "out of memory" in content["failed"]["noise-1"]["ct_a"]
    assert rows_of(content, shift="noise", name="CT", organ="all organs")[0]["dsc_mean"] == 0
    broken[0] = False
    assert shift(work, model, "noise", "--levels", "1") == 0
    assert rows_of(result(work), shift="noise", name="CT", organ="all organs")[0]["dsc_mean"] > 0


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda a: [*a[:2], "gama", *a[3:]], 2, "no shift is called 'gama'. Did you mean gamma?"),
        (lambda a: [*a, "--levels", "0"], 2, "--levels 0: expected 1 or more"),
        (lambda a: [*a, "--levels", "many"], 2, "invalid int value"),
        (lambda a: [*a, "--compare", "x=in"], 2, "--compare has no effect with --shift"),
        (lambda a: ["evaluate", *a[3:]], 2, "REF"),
        (lambda a: [*a[:3], *a[5:]], 2, "which model? Give -m RESULT_FOLDER"),
        (lambda a: [*a[:5], *a[7:]], 2, "which images? Give -i IMAGES"),
        (lambda a: [*a[:7], "in", *a[7:]], 2, "give the references alone, found in and ref"),
        (lambda a: [*a[:4], "nowhere", *a[5:]], 2, "-m nowhere does not exist"),
        (lambda a: [*a[:4], "ref", *a[5:]], 3, "holds no plans.json"),
        (lambda a: [*a[:9], "ref"], 2, "-o ref is REF: results would lie among its files"),
        (lambda a: [*a[:9], "ref/out"], 2, "-o ref/out lies in REF"),
        (lambda a: [*a[:7], "-f", "0", *a[7:]], 2, "'ref' is no fold: expected 0, 1, ... or all. REF goes before -f."),
        (lambda a: [*a, "-f", "3"], 3, "fold 3 was not trained"),
        (lambda a: [*a, "--modality-map", "map.json", "--tell-modality"], 2, "no modality is known of ct_a"),
    ],
)
def test_bad_input(work, model, monkeypatch, capsys, change, code: int, message: str) -> None:
    monkeypatch.chdir(work)
    (work / "ref/dataset.json").unlink()
    (work / "map.json").write_text('{"mr_a": "MR", "mr_b": "MR"}', encoding="utf-8")
    arguments = ["evaluate", "--shift", "gamma", "-m", str(model), "-i", "in", "ref", "-o", "out"]
    assert cli.main(change(arguments)) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_second_process_is_told_who_is_at_work(work: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(work / "out/.locks", "shift", "evaluate --shift"):
        assert shift(work, model, "noise") == 1
    said = capsys.readouterr().err
    assert re.search(rf"out is locked by pid {os.getpid()} on .* \(evaluate --shift\)", said) and "another -o" in said
    assert [path.name for path in (work / "out").iterdir()] == [".locks"]


def test_options_of_shift_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "pred", "ref", "-o", "out", "--levels", "3"]) == 2
    assert "--levels is for --shift" in capsys.readouterr().err
    assert cli.main(["evaluate", "pred", "-o", "out"]) == 2
    assert "required: REF" in capsys.readouterr().err


def test_bad_images(work: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A channel that is missing or too many, no case in common, nothing that can be predicted."""
    shutil.copy(work / "in/mr_a_0000.nii.gz", work / "in/mr_a_0001.nii.gz")
    assert shift(work, model, "noise") == 4
    assert "case mr_a: expected channels 0000; found 0000,0001" in capsys.readouterr().err
    (work / "in/mr_a_0001.nii.gz").unlink()
    for path in (work / "ref").glob("*.nii.gz"):
        path.rename(path.with_name(f"other_{path.name}"))
    assert shift(work, model, "noise") == 4
    assert "have no case in common: found ct_a, mr_a, mr_b, expected other_ct_a" in capsys.readouterr().err
    for case in CASES:
        (work / f"ref/other_{case}.nii.gz").rename(work / f"ref/{case}.nii.gz")
        write(work / f"in/{case}_0000.nii.gz", np.zeros(SHAPE, np.float32))
    assert shift(work, model, "noise") == 4
    assert "No case could be predicted and measured" in capsys.readouterr().err


def test_told_modalities_reach_the_network(work: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that knows CT and MR is told each image's, in its own spelling; otherwise it infers."""
    monkeypatch.syspath_prepend(str(TINY))
    from tiny_mixed import mixed_result_folder

    from nnunet_multimodal.inference.modality import ModalityPredictor

    told = []
    real = ModalityPredictor.predict_logits_from_preprocessed_data

    def predict(self: ModalityPredictor, data: Any) -> Any:
        told.append(self.told)
        return real(self, data)

    monkeypatch.setattr(ModalityPredictor, "predict_logits_from_preprocessed_data", predict)
    mixed = mixed_result_folder()
    (work / "map.json").write_text('{"ct_a": "ct", "mr_a": "MRI", "mr_b": "mr"}', encoding="utf-8")
    names = ["--label-names", "liver=1", "--no-report", "--levels", "1"]
    assert shift(work, mixed, "noise", *names) == 0
    assert told == [None] * 6
    more = ["--tell-modality", "--modality-map", str(work / "map.json")]
    assert shift(work, mixed, "noise", *names, *more) == 2, "told and not told are two studies"
    shutil.rmtree(work / "out")
    del told[:]
    assert shift(work, mixed, "noise", *names, *more) == 0
    assert told == ["CT", "MR", "MR"] * 2
    assert result(work)["modalities"] == ["MRI", "ct", "mr"], "the curves have the names that the user gave"
    del told[:]
    (work / "map.json").write_text('{"ct_a": "ct", "mr_a": "mr", "mr_b": "CT"}', encoding="utf-8")
    assert shift(work, mixed, "noise", *names, *more) == 0
    assert told == ["CT", "MR", "CT"] * 2, "what was told otherwise is not taken from the earlier run"


@pytest.mark.parametrize(
    ("names", "trainer", "shifted"),
    [(("CT", "MR"), "nnUNetTrainerCmFNet", (0, 1)), (("MR", "noNorm"), "nnUNetTrainer", (0,))],
)
def test_channels_that_are_images(work: Path, model: Path, monkeypatch, names, trainer: str, shifted) -> None:
    """Two registered images are shifted both, a mask beside an image is not."""
    monkeypatch.syspath_prepend(str(TINY))
    from tiny_paired import pair, paired_result_folder

    seen = []

    def prepare(case: Any, how: Any, *rest: Any, real: Any = folder_module.prepare) -> Any:
        seen.append(None if how.change is None else how.change.channels)
        return real(case, how, *rest)

    monkeypatch.setattr(folder_module, "prepare", prepare)
    shutil.rmtree(work / "in")
    shutil.rmtree(work / "ref")
    ct, mr = pair(0)
    for channel, image in enumerate((ct, mr)):
        write(work / f"in/a_{channel:04d}.nii.gz", image)
    write(work / "ref/a.nii.gz", (mr > 300).astype(np.uint8))
    folder = paired_result_folder(names, trainer)
    assert shift(work, folder, "bias", "--levels", "1", "--no-report") == 0
    assert seen == [None, shifted]
    (work / "in/a_0001.nii.gz").unlink()
    assert shift(work, folder, "bias", "--levels", "1") == 4


def test_what_a_reference_does_not_annotate_is_in_no_curve(work: Path, model: Path, capsys) -> None:
    told = work / "annotated.json"
    told.write_text(json.dumps({"mr_a": ["liver", "spine"], "mr_b": ["liver"]}), encoding="utf-8")
    assert shift(work, model, "noise", "--levels", "1", "--case-labels", str(told), "--no-report") == 0
    rows = rows_of(result(work), shift="noise", scope="all")
    assert {row["organ"]: row["not_annotated"] for row in rows} == {
        "all organs": 5, "spine": 1, "left_kidney": 2, "right_kidney": 2, "liver": 0,
    }  # fmt: skip
    told.write_text(json.dumps({"mr_a": ["liver"]}), encoding="utf-8")
    capsys.readouterr()
    assert shift(work, model, "noise", "--levels", "1", "--case-labels", str(told), "--no-report") == 2
    assert "holds a study with not_annotated" in capsys.readouterr().err
