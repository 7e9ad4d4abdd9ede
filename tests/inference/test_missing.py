"""predict of registered pairs, through the command: which branch answers, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_model import AFFINE, SHAPE, save
from tiny_paired import TRAINER, pair, paired_result_folder

from nnunet_multimodal.cli import main
from nnunet_multimodal.environment import extension_value
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.inference.missing import answering, find_missing, with_stand_in
from nnunet_multimodal.inference.modality import ModalityPredictor

CASES = ("p1", "p2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """nnU-Net's folders and the models."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_compile", "f")
        patch.setenv("nnUNet_extTrainer", extension_value())
        (root / "raw/Dataset001_Tiny").mkdir()
        yield {
            "pairs": paired_result_folder(),
            "other order": paired_result_folder(("MR", "CT"), f"{TRAINER}_1epoch"),
            "contrasts": paired_result_folder(("FLAIR", "T1c"), f"{TRAINER}_2epochs"),
            "one": paired_result_folder(("MR",), f"{TRAINER}_3epochs"),
            "stock": paired_result_folder(trainer_name="nnUNetTrainer"),
        }


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two patients with CT (0000) and MR (0001)."""
    for number, case in enumerate(CASES):
        for channel, image in enumerate(pair(number)):
            save(tmp_path / f"in/{case}_{channel:04d}.nii.gz", image)
    return tmp_path / "in"


def take_away(images: Path, channel: int, cases: tuple[str, ...] = CASES) -> None:
    for case in cases:
        (images / f"{case}_{channel:04d}.nii.gz").unlink()


def predict(model: Path, images: Path, *more: str) -> int:
    return main([
        "predict", "-i", str(images), "-o", str(images.parent / "out"), "-m", str(model), "-f", "0",
        "-device", "cpu", "--disable_tta", *more,
    ])  # fmt: skip


def report(images: Path) -> dict[str, Any]:
    return json.loads((images.parent / "out/predictions.json").read_text(encoding="utf-8"))


def found(images: Path, case: str) -> np.ndarray:
    return np.asarray(nib.load(images.parent / f"out/{case}.nii.gz").dataobj).transpose(2, 1, 0)


def by_stock(model: Path, images: Path, case: str, branch: str) -> np.ndarray:
    """nnU-Net's own prediction of a complete case by one branch."""
    files = [[str(images / f"{case}_{channel:04d}.nii.gz") for channel in range(2)]]
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
        predictor.network.output_branch = branch
        return predictor.predict_from_files_sequential(files, None)[0]


def test_with_both_it_predicts_as_nnunet(models, images: Path) -> None:
    expected = by_stock(models["pairs"], images, "p1", "mm")
    assert predict(models["pairs"], images) == 0
    assert np.array_equal(found(images, "p1"), expected) and len(np.unique(expected)) > 1
    entry = report(images)["cases"]["p1"]
    assert entry["branch"] == "mm" and entry["missing"] is None and report(images)["missing"] is None


@pytest.mark.parametrize(("word", "channel", "branch", "answers"), [("mri", 1, "ct", "CT"), ("CT", 0, "mr", "MR")])
def test_without_one_the_branch_of_the_other_answers_as_if_both_were_there(
    models, images: Path, capsys: pytest.CaptureFixture[str], word: str, channel: int, branch: str, answers: str
) -> None:
    """Also where the missing CT's air kept nnU-Net from cropping, and so from another mean of the MR."""
    expected = [by_stock(models["pairs"], images, case, branch) for case in CASES]
    fused = by_stock(models["pairs"], images, "p1", "mm")
    take_away(images, channel)
    assert predict(models["pairs"], images, "--missing", word) == 0
    for case, segmentation in zip(CASES, expected):
        assert np.array_equal(found(images, case), segmentation)
    assert not np.array_equal(expected[0], fused)
    name = ("CT", "MR")[channel]
    assert report(images)["missing"] == name
    for entry in report(images)["cases"].values():
        assert (entry["branch"], entry["missing"]) == (answers, name)
    assert f"without {name}: the branch of {answers} answers" in capsys.readouterr().out


def test_the_missing_channels_files_are_passed_over_where_they_are_there(models, images: Path) -> None:
    expected = by_stock(models["pairs"], images, "p2", "ct")
    (images / "p1_0001.nii.gz").write_bytes(b"never read")
    assert predict(models["pairs"], images, "--missing", "MR") == 0
    assert np.array_equal(found(images, "p2"), expected)


def test_ct_has_its_branch_whichever_channel_it_is(models, images: Path) -> None:
    for case in CASES:  # the model has MR first
        (images / f"{case}_0001.nii.gz").rename(images / f"{case}_tmp")
        (images / f"{case}_0000.nii.gz").rename(images / f"{case}_0001.nii.gz")
        (images / f"{case}_tmp").rename(images / f"{case}_0000.nii.gz")
    expected = by_stock(models["other order"], images, "p1", "ct")
    take_away(images, 0)
    assert predict(models["other order"], images, "--missing", "MR") == 0
    assert np.array_equal(found(images, "p1"), expected)
    assert report(images)["cases"]["p1"]["branch"] == "CT"


def test_any_two_contrasts_have_a_branch_each(models, images: Path) -> None:
    for number, case in enumerate(CASES):
        save(images / f"{case}_0000.nii.gz", pair(number + 10)[1])  # skull-stripped, both of them
    expected = by_stock(models["contrasts"], images, "p1", "mr")
    take_away(images, 0)
    assert predict(models["contrasts"], images, "--missing", "flair") == 0
    assert np.array_equal(found(images, "p1"), expected)
    assert report(images)["cases"]["p1"]["branch"] == "T1c"


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("pairs", ["PET"], "--missing: the model does not know the modality 'PET'. Did you mean"),
        ("pairs", ["CT", "MR"], "--missing CT MR: then nothing is left to predict from. Name one of them."),
        ("stock", ["MR"], "--missing MR: a model of nnUNetTrainer needs each of its channels (CT, MR)."),
        ("one", ["MR"], f"--missing MR: a model of {TRAINER}_3epochs needs each of its channels (MR)."),
    ],
)
def test_wrong_use(
    models, images: Path, capsys: pytest.CaptureFixture[str], model: str, words: list[str], message: str
) -> None:
    assert predict(models[model], images, "--missing", *words) == 2
    assert message.removesuffix(" Did you mean") in capsys.readouterr().err
    assert not (images.parent / "out").exists()


@pytest.mark.parametrize(("channel", "name"), [(0, "CT"), (1, "MR")])
def test_a_case_without_a_channel_is_an_error_that_names_the_option(
    models, images: Path, capsys: pytest.CaptureFixture[str], channel: int, name: str
) -> None:
    take_away(images, channel, ("p2",))
    assert predict(models["pairs"], images) == 4
    error = capsys.readouterr().err
    assert f"case p2: expected channels 0000,0001; found {1 - channel:04d}" in error
    assert f"add --missing {name}." in error
    assert not (images.parent / "out").exists()
    assert predict(models["stock"], images) == 4
    assert "--missing" not in capsys.readouterr().err  # it cannot do without


def test_without_the_channel_that_is_left_there_is_nothing(
    models, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take_away(images, 0, ("p2",))
    assert predict(models["pairs"], images, "--missing", "MR") == 4
    assert "case p2: expected channels 0000; found none in" in capsys.readouterr().err
    for path in images.iterdir():
        path.unlink()
    assert predict(models["pairs"], images, "--missing", "CT") == 4
    assert "holds no image that ends in _0001.nii.gz" in capsys.readouterr().err


def test_what_is_kept_was_predicted_without_the_same_channel(
    models, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(models["pairs"], images, "--missing", "MR") == 0
    assert predict(models["pairs"], images, "--missing", "CT", "--continue_prediction") == 2
    assert "was predicted with missing MR, now it is CT" in capsys.readouterr().err
    assert predict(models["pairs"], images, "--continue_prediction") == 2  # of the fused branch now
    assert predict(models["pairs"], images, "--missing", "MR", "--continue_prediction") == 0
    assert "2 kept from before" in capsys.readouterr().out


def test_a_constant_image_is_found_though_the_other_one_is_missing(
    models, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take_away(images, 1)
    save(images / "p1_0000.nii.gz", np.full(SHAPE, 7, dtype=np.float32))
    assert predict(models["pairs"], images, "--missing", "MR") == 1
    assert "p1_0000.nii.gz is constant" in capsys.readouterr().err
    assert list(report(images)["cases"]) == ["p2"] and list(report(images)["failed"]) == ["p1"]


def test_images_of_one_modality_need_no_option(models, images: Path) -> None:
    take_away(images, 1)
    for number, case in enumerate(CASES):
        save(images / f"{case}_0000.nii.gz", pair(number)[1])
    assert predict(models["one"], images) == 0
    assert "branch" not in report(images)["cases"]["p1"]


def test_afterwards_the_fused_branch_answers_again(models) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = ModalityPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(models["pairs"]), (0,))
    missing = find_missing(predictor, ["CT", "MR"], ["CT"])
    with pytest.raises(KeyboardInterrupt), answering(predictor, missing):
        assert predictor.network.output_branch == "mr"
        raise KeyboardInterrupt
    assert predictor.network.output_branch == "mm"


def test_two_channels_of_one_name(models) -> None:
    """nnU-Net allows it; which one is missing cannot be told by name then."""
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = ModalityPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(models["contrasts"]), (0,))
    with pytest.raises(UsageError, match="--missing MR: all channels of the model are called so"):
        find_missing(predictor, ["MR", "MR"], ["mri"])


def test_the_stand_in() -> None:
    image = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    assert with_stand_in(image, 0, "CTNormalization")[:, 0].tolist() == [[[-1024] * 2] * 2, [[0, 1], [2, 3]]]
    assert with_stand_in(image, 1, "ZScoreNormalization")[:, 0].tolist() == [[[0, 1], [2, 3]], [[0] * 2] * 2]


def test_geometry_is_the_images(models, images: Path) -> None:
    take_away(images, 0)
    assert predict(models["pairs"], images, "--missing", "CT") == 0
    out = nib.load(images.parent / "out/p1.nii.gz")
    assert out.shape == SHAPE[::-1] and np.allclose(out.affine, AFFINE)


def test_in_slabs_the_same_branch_answers(models, images: Path) -> None:
    for more in ((), ("--missing", "MR")):
        assert predict(models["pairs"], images, *more) == 0
        whole, record = found(images, "p1"), report(images)
        assert predict(models["pairs"], images, *more, "--slabs", "3") == 0
        assert np.array_equal(found(images, "p1"), whole) and report(images) == record
