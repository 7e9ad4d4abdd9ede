"""predict, through the command, with tiny models: which modality, what goes where, what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_mixed import TRAINER, mixed_result_folder, picture
from tiny_model import SHAPE, save

from nnunet_multimodal.cli import main
from nnunet_multimodal.conversion.harmonise import harmonise
from nnunet_multimodal.environment import extension_value
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.inference import folder as folder_module
from nnunet_multimodal.inference.modality import ModalityPredictor, _votes
from nnunet_multimodal.inference.told import match_modality, told_by_case
from nnunet_multimodal.inference.workers import Workers

SLICES = SHAPE[0]
LOOKS = SLICES * 4  # 2 x 2 tiles of 32 x 32 in a slice of 40 x 36


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """nnU-Net's folders and a model of each kind."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_compile", "f")
        patch.setenv("nnUNet_extTrainer", extension_value())
        (root / "raw/Dataset001_Tiny").mkdir()
        found = {"text": mixed_result_folder(folds=(0, 1)), "stock": mixed_result_folder("nnUNetTrainer")}
        found["noText"] = mixed_result_folder(f"{TRAINER}_noText")
        found["CTonly"] = mixed_result_folder(f"{TRAINER}_CTonly")
        found["CTonly_noText"] = mixed_result_folder(f"{TRAINER}_CTonly_1epoch", settings={"text_head": False})
        found["harmonised"] = mixed_result_folder(f"{TRAINER}_1epoch", harmonise="paper")
        yield found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """One CT, one MR."""
    save(tmp_path / "in/ct_0000.nii.gz", picture("CT", 1))
    save(tmp_path / "in/mr_0000.nii.gz", picture("MR", 2))
    return tmp_path / "in"


def predict(model: Path, images: Path, *more: str, fold: str = "0") -> int:
    return main([
        "predict", "-i", str(images), "-o", str(images.parent / "out"), "-m", str(model), "-f", fold,
        "-device", "cpu", "--disable_tta", *more,
    ])  # fmt: skip


def report(images: Path) -> dict[str, Any]:
    return json.loads((images.parent / "out/predictions.json").read_text(encoding="utf-8"))


def segmentation(images: Path, case: str) -> np.ndarray:
    return np.asarray(nib.load(images.parent / f"out/{case}.nii.gz").dataobj)


def stock_predictor(model: Path, folds: tuple[int, ...] = (0,), kind: type = nnUNetPredictor) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = kind(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), folds)
    return predictor


def tensor(*pictures: np.ndarray) -> torch.Tensor:
    """[1, Z, Y, X] as the network gets it."""
    return torch.from_numpy(np.concatenate(pictures))[None] / 100


# --- the network's modality -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_told_what_it_would_infer_it_predicts_exactly_as_nnunet(models, modality: str) -> None:
    """Two folds with other weights, mirrored: every logit is the stock predictor's."""
    image = tensor(picture(modality, 3))
    expected = stock_predictor(models["text"], (0, 1)).predict_logits_from_preprocessed_data(image)
    predictor = stock_predictor(models["text"], (0, 1), ModalityPredictor)
    for told in (None, modality):
        predictor.told = told
        assert torch.equal(predictor.predict_logits_from_preprocessed_data(image), expected)
        verdict = predictor.verdict
        assert (verdict.modality, verdict.how) == (modality, "told" if told else "inferred")
        assert verdict.tiles == verdict.tiles_agreeing == LOOKS * 4 * 2, "each tile in 4 mirrorings and 2 folds"
        assert verdict.inferred == modality and verdict.confidence == verdict.inferred_confidence > 0.9
        assert not verdict.predicted_twice


def test_told_another_modality_it_obeys_and_says_what_it_would_have_inferred(models) -> None:
    image = tensor(picture("CT", 3))
    predictor = stock_predictor(models["text"], kind=ModalityPredictor)
    own = predictor.predict_logits_from_preprocessed_data(image)
    predictor.told = "MR"
    forced = predictor.predict_logits_from_preprocessed_data(image)
    verdict = predictor.verdict
    assert (verdict.modality, verdict.how, verdict.inferred) == ("MR", "told", "CT")
    assert verdict.confidence < 0.1 and verdict.inferred_confidence > 0.9
    assert not torch.allclose(own, forced, atol=1e-2)
    predictor.told = None
    assert torch.equal(predictor.predict_logits_from_preprocessed_data(image), own), "the next image is its own"


def test_where_tiles_disagree_the_case_is_predicted_as_one_modality(models) -> None:
    """Two noisy slices on four with spots: nnU-Net would mix the two."""
    image = tensor(picture("MR", 3, (2, *SHAPE[1:])), picture("CT", 4, (4, *SHAPE[1:])))
    predictor = stock_predictor(models["text"], kind=ModalityPredictor)
    logits = predictor.predict_logits_from_preprocessed_data(image)
    verdict = predictor.verdict
    assert (verdict.modality, verdict.how, verdict.predicted_twice) == ("CT", "inferred", True)
    assert verdict.tiles == LOOKS * 4 and verdict.tiles_agreeing == LOOKS * 4 * 4 // 6
    assert 0.5 < verdict.confidence < 0.9
    predictor.told = "CT"
    assert torch.equal(predictor.predict_logits_from_preprocessed_data(image), logits)
    assert not predictor.verdict.predicted_twice
    mixed = stock_predictor(models["text"]).predict_logits_from_preprocessed_data(image)
    assert torch.equal(mixed[:, 2:], logits[:, 2:]) and not torch.allclose(mixed[:, :2], logits[:, :2], atol=1e-2)


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_flat_tiles_have_no_say(models, modality: str) -> None:
    """Half of the slices are constant, as outside the body; which the network takes for one of the two as well."""
    predictor = stock_predictor(models["text"], kind=ModalityPredictor)
    half = SLICES // 2
    flat = np.full((SLICES - half + 1, *SHAPE[1:]), -100, np.float32)
    flat[0, 0, 0] = -99.9  # nearly constant
    picture_of = picture(modality, 3, (half, *SHAPE[1:]))
    logits = predictor.predict_logits_from_preprocessed_data(tensor(picture_of, flat))
    verdict = predictor.verdict
    assert (verdict.modality, verdict.predicted_twice) == (modality, False) and verdict.confidence > 0.9
    assert verdict.tiles == verdict.tiles_agreeing == half * 4 * 4
    stock = stock_predictor(models["text"]).predict_logits_from_preprocessed_data(tensor(picture_of, flat))
    assert torch.equal(logits, stock)


def test_an_image_that_is_flat_all_over_is_judged_all_the_same(models) -> None:
    predictor = stock_predictor(models["text"], kind=ModalityPredictor)
    predictor.predict_logits_from_preprocessed_data(tensor(np.zeros(SHAPE, np.float32)))
    assert predictor.verdict.tiles == LOOKS * 4 and predictor.verdict.modality in ("CT", "MR")


def test_tiles_vote_by_their_spread() -> None:
    """Worked by hand: 4 is less than 5 % of 100."""
    assert _votes(torch.tensor([100.0, 4.0, 60.0, 0.0])).tolist() == pytest.approx([0.625, 0, 0.375, 0])
    assert _votes(torch.zeros(4)).tolist() == [0.25] * 4


def test_tiles_of_an_attempt_that_ran_out_of_memory_do_not_count(models, monkeypatch) -> None:
    image = tensor(picture("CT", 3))
    predictor = stock_predictor(models["text"], kind=ModalityPredictor)
    predictor.perform_everything_on_device = True
    run, calls = nnUNetPredictor._internal_predict_sliding_window_return_logits, []

    def run_out(self, data, slicers, do_on_device=True):
        calls.append(do_on_device)
        logits = run(self, data, slicers, False)
        if do_on_device:
            raise RuntimeError("out of memory")
        return logits

    monkeypatch.setattr(nnUNetPredictor, "_internal_predict_sliding_window_return_logits", run_out)
    predictor.predict_logits_from_preprocessed_data(image)
    assert calls == [True, False] and predictor.verdict.tiles == LOOKS * 4


def test_progress_ends_at_one_and_never_goes_back(models) -> None:
    predictor = stock_predictor(models["text"], (0, 1), ModalityPredictor)
    seen: list[float] = []
    predictor.on_progress = seen.append
    predictor.predict_logits_from_preprocessed_data(tensor(picture("CT", 3), picture("MR", 3)))
    assert predictor.verdict.predicted_twice and seen == sorted(seen) and seen[-1] == pytest.approx(1)


# --- the command ------------------------------------------------------------------------------------------------------


def test_inferred(models, images: Path, capsys) -> None:
    """The files are nnUNetv2_predict's."""
    assert predict(models["text"], images) == 0
    with contextlib.redirect_stdout(io.StringIO()):
        stock = stock_predictor(models["text"])
        stock.use_mirroring = False
        (images.parent / "stock").mkdir()
        stock.predict_from_files_sequential(
            [[str(images / "ct_0000.nii.gz")], [str(images / "mr_0000.nii.gz")]],
            [str(images.parent / "stock/ct"), str(images.parent / "stock/mr")],
        )
    for case in ("ct", "mr"):
        expected = np.asarray(nib.load(images.parent / f"stock/{case}.nii.gz").dataobj)
        assert np.array_equal(segmentation(images, case), expected) and len(np.unique(expected)) > 1
    written = report(images)
    assert written["model"].endswith(f"Dataset001_Tiny/{TRAINER}__nnUNetPlans__2d")
    assert (written["trainer"], written["folds"], written["checkpoint"]) == (TRAINER, ["0"], "checkpoint_final.pth")
    assert written["harmonise"] is None and written["failed"] == {}
    assert written["cases"]["mr"] == {
        "modality": "MR", "how": "inferred", "confidence": pytest.approx(1, abs=0.1), "inferred": "MR",
        "inferred_confidence": written["cases"]["mr"]["confidence"], "network": "MR", "tiles": LOOKS,
        "tiles_agreeing": LOOKS, "predicted_twice": False, "used": True, "file": "mr.nii.gz",
    }  # fmt: skip
    assert written["cases"]["ct"]["modality"] == "CT"
    output = capsys.readouterr().out
    assert re.search(r"CT: 1 inferred; lowest confidence (0\.9\d\d|1\.000) \(ct\)", output), output
    assert "2 predicted, 0 kept from before, 0 failed" in output
    assert sorted(path.name for path in (images.parent / "out").iterdir()) == [
        "ct.nii.gz", "dataset.json", "mr.nii.gz", "plans.json", "predictions.json",
    ]  # fmt: skip


def test_air_in_hounsfield_units_gives_ct_away(models, images: Path) -> None:
    """Though the network takes it for MR; what it then predicts is what it would if it were told."""
    noise = picture("MR", 3)
    noise[:, :4] = -1000
    save(images / "mr_0000.nii.gz", noise)
    assert predict(models["text"], images) == 0
    found, entry = segmentation(images, "mr"), report(images)["cases"]["mr"]
    assert (entry["modality"], entry["network"], entry["predicted_twice"]) == ("CT", "MR", True)
    assert predict(models["text"], images, "--modality", "CT") == 0
    assert np.array_equal(segmentation(images, "mr"), found)


def test_a_ct_with_half_its_slices_constant_is_predicted_once_as_ct(models, images: Path) -> None:
    image = picture("CT", 1)
    image[: SLICES // 2] = image.min()
    save(images / "ct_0000.nii.gz", image)
    assert predict(models["text"], images) == 0
    entry = report(images)["cases"]["ct"]
    assert (entry["modality"], entry["network"], entry["predicted_twice"]) == ("CT", "CT", False)
    assert entry["tiles"] == entry["tiles_agreeing"] == (SLICES - SLICES // 2) * 4


def test_told_for_all_and_warned_where_the_network_is_sure_of_another(models, images: Path, capsys) -> None:
    assert predict(models["text"], images) == 0
    own = {case: segmentation(images, case) for case in ("ct", "mr")}
    assert predict(models["text"], images, "--modality", "mri") == 0
    written = report(images)["cases"]
    assert [written[case]["modality"] for case in ("ct", "mr")] == ["MR", "MR"]
    assert [written[case]["how"] for case in ("ct", "mr")] == ["told", "told"]
    assert written["ct"]["inferred"] == "CT" and written["ct"]["inferred_confidence"] > 0.9
    assert np.array_equal(segmentation(images, "mr"), own["mr"])
    assert not np.array_equal(segmentation(images, "ct"), own["ct"])
    captured = capsys.readouterr()
    assert "MR: 2 told" in captured.out
    assert "above 0.9: ct (CT)" in captured.err and "mr (" not in captured.err


def test_told_by_a_map(models, images: Path, capsys) -> None:
    """A file name is as good as a case; who is not in the map is inferred."""
    table = images.parent / "cases.json"
    table.write_text(json.dumps({"images/ct_0000.nii.gz": "MR", "other": "CT"}), encoding="utf-8")
    assert predict(models["text"], images, "--modality-map", str(table)) == 0
    written = report(images)["cases"]
    assert (written["ct"]["modality"], written["ct"]["how"]) == ("MR", "told")
    assert (written["mr"]["modality"], written["mr"]["how"]) == ("MR", "inferred")
    output = capsys.readouterr().out
    assert "1 keys are no case of the input: other" in output and "does not name 1 cases: mr" in output
    assert "MR: 1 inferred, 1 told" in output


@pytest.mark.parametrize("model", ["stock", "noText"])
def test_a_model_without_modalities_predicts_as_ever(models, images: Path, capsys, model: str) -> None:
    assert predict(models[model], images) == 0
    own = segmentation(images, "ct")
    assert report(images)["cases"]["ct"] == {"modality": None, "how": "none", "used": False, "file": "ct.nii.gz"}
    assert predict(models[model], images, "--modality", "MR") == 0
    assert report(images)["cases"]["ct"] == {"modality": "MR", "how": "told", "used": False, "file": "ct.nii.gz"}
    assert np.array_equal(segmentation(images, "ct"), own)
    assert "is the same for every modality: what was told is noted" in capsys.readouterr().out
    assert predict(models[model], images, "--modality", "PET") == 2, "its data set has a table"


@pytest.mark.parametrize("model", ["CTonly", "CTonly_noText"])
def test_a_model_of_one_modality_says_so(models, images: Path, capsys, model: str) -> None:
    """Whether or not it has a row of text that no image ever went with."""
    assert predict(models[model], images) == 0
    assert report(images)["trained_on"] == "CT" and "warning" not in capsys.readouterr().err
    assert predict(models[model], images, "--modality", "CT") == 0
    assert "warning" not in capsys.readouterr().err
    assert predict(models[model], images, "--modality", "MR") == 0
    assert report(images)["trained_on"] == "CT"
    assert re.search(r"warning: \w+ was trained on CT alone and has never seen MR, which", capsys.readouterr().err)
    assert predict(models["text"], images, "--modality", "MR") == 0
    assert "trained_on" not in report(images) and "trained on" not in capsys.readouterr().err


def test_harmonised_models_harmonise_what_they_predict(models, images: Path, capsys) -> None:
    """Told; the result is that of images which were harmonised by hand."""
    assert predict(models["harmonised"], images) == 2
    message = capsys.readouterr().err
    assert "--modality-map; not told: ct, mr" in message and not (images.parent / "out").exists()
    table = images.parent / "cases.json"
    table.write_text(json.dumps({"ct": "CT", "mr": "MR"}), encoding="utf-8")
    assert predict(models["harmonised"], images, "--modality-map", str(table)) == 0
    found = {case: segmentation(images, case) for case in ("ct", "mr")}
    assert report(images)["harmonise"] == "paper"
    plain = images.parent / "model" / models["harmonised"].name
    shutil.copytree(models["harmonised"], plain)
    content = json.loads((plain / "dataset.json").read_text(encoding="utf-8"))
    del content["nnunet_multimodal"]["harmonise"]
    (plain / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    assert predict(plain, images, "--modality-map", str(table)) == 0
    raw = {case: segmentation(images, case) for case in ("ct", "mr")}
    save(images / "ct_0000.nii.gz", harmonise(picture("CT", 1), "CT"))
    save(images / "mr_0000.nii.gz", harmonise(picture("MR", 2), "MR"))
    assert predict(plain, images, "--modality-map", str(table)) == 0
    for case in ("ct", "mr"):
        assert (segmentation(images, case) != found[case]).mean() < 1e-3
        assert (raw[case] != found[case]).mean() > 1e-2, "harmonising matters"


def test_probabilities(models, images: Path) -> None:
    assert predict(models["text"], images, "--save_probabilities") == 0
    probabilities = np.load(images.parent / "out/ct.npz")["probabilities"]
    assert probabilities.shape == (4, *SHAPE) and (images.parent / "out/ct.pkl").exists()
    np.testing.assert_array_equal(probabilities.argmax(0).transpose(2, 1, 0), segmentation(images, "ct"))


# --- going on, and going wrong ----------------------------------------------------------------------------------------


def test_interrupted_then_continued(models, images: Path, monkeypatch, capsys) -> None:
    """Ctrl-C while the second case is written: the first is whole and listed, of the second nothing is left."""
    save(images / "z_0000.nii.gz", picture("MR", 5))
    export, calls = folder_module.export_prediction_from_logits, []

    def interrupt(*args: Any) -> None:
        calls.append(Path(args[5]).name)
        if len(calls) == 2:
            Path(f"{args[5]}.nii.gz").write_bytes(b"half")
            raise KeyboardInterrupt
        export(*args)

    monkeypatch.setattr(folder_module, "export_prediction_from_logits", interrupt)
    assert predict(models["text"], images) == 130
    output = images.parent / "out"
    assert list(report(images)["cases"]) == ["ct"]
    assert sorted(path.name for path in output.iterdir()) == [
        "ct.nii.gz", "dataset.json", "plans.json", "predictions.json",
    ]  # fmt: skip
    (output / "mr.nii.gz").write_bytes(b"half, by a program that was killed")
    assert predict(models["text"], images, "--continue_prediction") == 0
    assert calls == ["ct", "mr", "mr", "z"], "a file that is not in predictions.json is not finished"
    assert list(report(images)["cases"]) == ["ct", "mr", "z"] and segmentation(images, "mr").shape == SHAPE[::-1]
    assert "2 predicted, 1 kept from before, 0 failed" in capsys.readouterr().out


def test_continue_predicts_again_what_is_told_otherwise_now(models, images: Path, capsys) -> None:
    assert predict(models["text"], images) == 0
    assert predict(models["text"], images, "--continue", "--modality", "CT") == 0
    assert "1 predicted, 1 kept from before" in capsys.readouterr().out
    written = report(images)["cases"]
    assert (written["ct"]["how"], written["mr"]["how"], written["mr"]["modality"]) == ("inferred", "told", "CT")


def test_continue_with_another_model_is_refused(models, images: Path, capsys) -> None:
    assert predict(models["text"], images) == 0
    before = (images.parent / "out/predictions.json").read_bytes()
    assert predict(models["text"], images, "--continue", fold="1") == 2
    assert "was predicted with folds ['0'], now it is ['1']" in capsys.readouterr().err
    assert (images.parent / "out/predictions.json").read_bytes() == before
    (images.parent / "out/predictions.json").write_text("{", encoding="utf-8")
    assert predict(models["text"], images, "--continue") == 2
    assert "cannot be read, so that nothing can be continued" in capsys.readouterr().err


def test_leftovers_of_a_killed_run_are_cleared_away(models, images: Path) -> None:
    left = images.parent / f"out/.partial-{platform.node()}-99999999"
    left.mkdir(parents=True)
    foreign = images.parent / "out/.partial-another-machine-99999999"
    foreign.mkdir()
    assert predict(models["text"], images) == 0
    assert not left.exists() and foreign.exists()


def test_a_bad_image_costs_its_case(models, images: Path, capsys) -> None:
    """Rows 11, 18 and 19 of the faults."""
    broken = picture("CT", 6)
    broken[1, 2, 3] = np.nan
    save(images / "nan_0000.nii.gz", broken)
    save(images / "flat_0000.nii.gz", np.full(SHAPE, -1024, np.float32))
    data = (images / "ct_0000.nii.gz").read_bytes()
    (images / "short_0000.nii.gz").write_bytes(data[: len(data) // 2])
    (images / "zero_0000.nii.gz").write_bytes(b"")
    assert predict(models["text"], images) == 1
    written = report(images)
    assert list(written["cases"]) == ["ct", "mr"] and list(written["failed"]) == ["flat", "nan", "short", "zero"]
    errors = {case: entry["error"] for case, entry in written["failed"].items()}
    assert "1 voxels that are not numbers" in errors["nan"]
    assert "flat_0000.nii.gz is constant (-1024)" in errors["flat"]
    assert "file ends early" in errors["short"] and "got 0 bytes" in errors["zero"]
    captured = capsys.readouterr()
    assert all(f"error: {error}" in captured.err for error in errors.values())
    assert "2 predicted, 0 kept from before, 4 failed" in captured.out
    for name in ("flat", "short", "zero"):
        (images / f"{name}_0000.nii.gz").unlink()
    assert predict(models["text"], images, "--nan-to", "0") == 0


def test_only_bad_images(models, images: Path) -> None:
    for path in images.iterdir():
        path.write_bytes(b"")
    assert predict(models["text"], images) == 4


def test_whatever_goes_wrong_in_one_case(models, images: Path, monkeypatch, capsys) -> None:
    run = nnUNetPredictor.predict_logits_from_preprocessed_data
    calls = []

    def run_out(self, data):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return run(self, data)

    monkeypatch.setattr(nnUNetPredictor, "predict_logits_from_preprocessed_data", run_out)
    assert predict(models["text"], images) == 1
    assert "case ct: RuntimeError: out of memory" in capsys.readouterr().err
    assert list(report(images)["cases"]) == ["mr"]


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("no suffix", 4, r"liver\.nii\.gz has no channel suffix; rename to liver_0000\.nii\.gz"),
        ("missing channel", 4, r"case ct: expected channels 0000; found 0001 in"),
        ("empty", 4, r"holds no image that ends in _0000\.nii\.gz.*it is empty"),
        ("other ending", 4, r"holds no image that ends in _0000\.nii\.gz.*it holds ct_0000\.nii"),
        ("no folder", 4, r"is not a folder of images"),
        ("output is input", 2, r"is the input too"),
        ("unknown modality", 2, r"does not know the modality 'PET'\. Allowed: CT, MR"),
        ("nearly", 2, r"does not know the modality 'MRT'\. Did you mean MR\?"),
        ("map: unknown modality", 2, r"cases\.json, mr: the model does not know the modality 'CTA'"),
        ("map: no case", 2, r"has no case of these: its keys are p1, the cases ct, mr"),
        ("map: two", 2, r"has two modalities for ct: CT and MR"),
        ("map: no names", 2, r"must map cases to modalities"),
        ("map: not JSON", 2, r"not valid JSON"),
        ("no fold", 3, r"fold 7 was not trained in .* There are: 0, 1"),
        ("no model", 3, r"holds no plans\.json"),
    ],
)
def test_refused_before_anything_is_written(models, images: Path, capsys, fault: str, code: int, message: str) -> None:
    """Rows 7, 8, 32 and 33 of the faults, and what else is wrong at once."""
    more: list[str] = []
    model, fold = models["text"], "0"
    table = images.parent / "cases.json"
    if fault == "no suffix":
        save(images / "liver.nii.gz", picture("CT", 1))
    elif fault == "missing channel":
        (images / "ct_0000.nii.gz").rename(images / "ct_0001.nii.gz")
    elif fault in ("empty", "other ending", "no folder"):
        shutil.rmtree(images)
        if fault != "no folder":
            images.mkdir()
        if fault == "other ending":
            save(images / "ct_0000.nii", picture("CT", 1))
    elif fault == "output is input":
        more = ["-o", str(images)]
    elif fault in ("unknown modality", "nearly"):
        more = ["--modality", "PET" if fault == "unknown modality" else "MRT"]
    elif fault.startswith("map: "):
        content: dict[str, Any] = {
            "unknown modality": {"ct": "CT", "mr": "CTA"}, "no case": {"p1": "CT"},
            "two": {"ct": "CT", "ct.nii.gz": "MR"}, "no names": {"ct": 1}, "not JSON": {},
        }[fault[5:]]  # fmt: skip
        table.write_text(json.dumps(content) if content else "{ct: CT}", encoding="utf-8")
        more = ["--modality-map", str(table)]
    elif fault == "no fold":
        fold = "7"
    elif fault == "no model":
        model = models["text"].parent
    assert predict(model, images, *more, fold=fold) == code
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (images.parent / "out").exists()


def test_a_checkpoint_of_another_training_is_named(models, images: Path, capsys) -> None:
    """Row 36 of the faults."""
    model = images.parent / models["text"].name
    shutil.copytree(models["text"], model)
    shutil.copy(models["stock"] / "fold_0/checkpoint_final.pth", model / "fold_0/checkpoint_final.pth")
    assert predict(model, images) == 2
    error = capsys.readouterr().err
    assert "was trained with -d Dataset001_Tiny -tr nnUNetTrainer -p nnUNetPlans -c 2d" in error
    assert f"its folder is for -tr {TRAINER} -p nnUNetPlans -c 2d" in error
    shutil.copy(models["text"] / "fold_0/checkpoint_final.pth", model / "fold_0/checkpoint_final.pth")
    content = json.loads((model / "dataset.json").read_text(encoding="utf-8"))
    content["channel_names"]["1"] = "more"
    (model / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    assert predict(model, images) == 2
    assert "(input channels: found 1, expected 2). It was trained with -d Dataset001_Tiny" in capsys.readouterr().err


def test_a_truncated_checkpoint_falls_back(models, images: Path, capsys) -> None:
    """Row 35 of the faults."""
    model = images.parent / models["text"].name
    shutil.copytree(models["text"], model)
    final = model / "fold_0/checkpoint_final.pth"
    shutil.copy(final, model / "fold_0/checkpoint_best.pth")
    final.write_bytes(final.read_bytes()[:5000])
    assert predict(model, images) == 0
    assert "checkpoint_final.pth is incomplete; using checkpoint_best.pth" in capsys.readouterr().out
    assert report(images)["checkpoint"] == "checkpoint_best.pth"


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("MR", ("CT", "MR"), "MR"),
        ("ct", ("CT", "MR"), "CT"),
        ("MRI", ("CT", "MR"), "MR"),
        ("mr", ("CT", "MRI"), "MRI"),
        ("MRI", ("MR", "MRI"), "MRI"),
        ("T1", (), "T1"),
    ],
)
def test_spellings(name: str, known: tuple[str, ...], found: str) -> None:
    assert match_modality(name, known, "--modality") == found


def test_a_case_may_be_named_like_a_channel() -> None:
    cases = ["p_0000", "q"]
    assert told_by_case({"p_0000": "CT", "q_0000.nii.gz": "MR"}, cases, ".nii.gz", ("CT", "MR"), "m.json") == (
        {"p_0000": "CT", "q": "MR"},
        [],
    )
    with pytest.raises(UsageError, match=r"m\.json, q: the model does not know the modality 'x'"):
        told_by_case({"p_0000": "CT", "q": "x"}, cases, ".nii.gz", ("CT", "MR"), "m.json")


def test_work_without_processes_is_done_at_once_and_keeps_its_error() -> None:
    here = Workers(0)
    assert here.submit(divmod, 7, 2).result(timeout=0) == (3, 1)
    assert isinstance(here.submit(divmod, 7, 0).exception(timeout=0), ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt):
        here.submit(_interrupt)
    here.close()


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_work_in_a_process_comes_back_with_its_error() -> None:
    there = Workers(1)
    try:
        assert there.submit(divmod, 7, 2).result(timeout=120) == (3, 1)
        assert isinstance(there.submit(divmod, 7, 0).exception(timeout=120), ZeroDivisionError)
    finally:
        there.close()


def test_by_data_set(models, images: Path, capsys) -> None:
    """Found as nnUNetv2_predict finds it; without -f, every fold that was trained."""
    call = ["predict", "-i", str(images), "-o", str(images.parent / "out"), "-d", "1", "-c", "2d", "-device", "cpu"]
    assert main([*call, "--disable_tta"]) == 0
    assert report(images)["folds"] == ["0", "1"] and report(images)["cases"]["ct"]["tiles"] == 2 * LOOKS
    assert main([*call, "-tr", "nnUNetTrainerMulModSeg_7epochs"]) == 3
    error = capsys.readouterr().err
    assert "no trained model in" in error and f"{TRAINER}__nnUNetPlans__2d" in error


@pytest.mark.slow
def test_in_other_processes(models, images: Path, run_command) -> None:
    """One process reads, one writes; a bad image is told by name, and the result is the same."""
    (images / "zero_0000.nii.gz").write_bytes(b"")
    env = {name: os.environ[name] for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    call = ("predict", "-i", images, "-o", images.parent / "out", "-d", "1", "-c", "2d", "-f", "0", "-device", "cpu",
            "--disable_tta", "-npp", "1", "-nps", "1")  # fmt: skip
    result = run_command(*call, env=env)
    assert result.returncode == 1, result.stderr
    assert "zero_0000.nii.gz: file ends early (got 0 bytes)" in result.stderr and "Traceback" not in result.stderr
    assert [entry["modality"] for entry in report(images)["cases"].values()] == ["CT", "MR"]
    found = {case: segmentation(images, case) for case in ("ct", "mr")}
    assert predict(models["text"], images) == 1
    for case in ("ct", "mr"):
        assert np.array_equal(segmentation(images, case), found[case])
