"""refer with an open-set model of random weights: organs that are not in the data set, and where they are written."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny_model import ORGANS, SHAPE, image, save, tiny_result_folder

from nnunet_multimodal.cli import main
from nnunet_multimodal.conversion.images import read_volume
from nnunet_multimodal.inference.frame import own_frame, shared_frame
from nnunet_multimodal.inference.model import load_referring_model
from nnunet_multimodal.inference.referring import ReferringPredictor

NAME = "nnUNetTrainerCrossMR_openSet"


def scribbles() -> np.ndarray:
    """Liver on slices 1 and 4, something called 9 on slice 2, 200 on slice 3."""
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[1, 5:12, 8] = drawn[4, 20, 10:18] = 1
    drawn[2, 30, 20:25] = 9
    drawn[3, 10:16, 25:28] = 200
    return drawn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_compile", "f")
        yield {
            2: tiny_result_folder(2, folds=(0, 1), name=NAME),
            3: tiny_result_folder(3, name=NAME),
            "CrossMR": tiny_result_folder(2),
        }


@pytest.fixture
def subject(tmp_path: Path) -> dict[str, Path]:
    return {
        "reference": save(tmp_path / "in/T1.nii.gz", image(1)),
        "scribbles": save(tmp_path / "in/S.nii.gz", scribbles()),
        "target": save(tmp_path / "in/T2.nii.gz", image(2)),
        "output": tmp_path / "out",
    }


def refer(model: Path, subject: dict[str, Path], *more: str) -> int:
    return main([
        "refer", "--reference", str(subject["reference"]), "--scribbles", str(subject["scribbles"]), "--targets",
        str(subject["target"]), "-o", str(subject["output"]), "-m", str(model), "-device", "cpu", *more,
    ])  # fmt: skip


def report(subject: dict[str, Path]) -> dict:
    return json.loads((subject["output"] / "refer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_any_number_may_be_scribbled_and_is_what_is_written(folders, subject, dimensions: int) -> None:
    assert refer(folders[dimensions], subject, "--organ-names", "pancreas=9") == 0
    result = np.asarray(nib.load(subject["output"] / "T2.nii.gz").dataobj).transpose(2, 1, 0)
    assert set(np.unique(result)) <= {0, 1, 9, 200} and result.any()
    written = report(subject)["results"][0]
    assert set(written["millilitres"]) == {*ORGANS, "pancreas", "organ_200"}
    assert written["millilitres"]["pancreas"] == pytest.approx((result == 9).sum() * 0.003, abs=1e-3)
    assert written["millilitres"]["left_kidney"] == 0
    assert (subject["output"] / "overlays/T2.png").exists()
    if dimensions == 2:
        assert written["slices"]["liver"] == 4 and written["slices"]["pancreas"] == written["slices"]["organ_200"] == 1
        assert set(np.flatnonzero((result == 9).any((1, 2)))) <= {2}


def test_subjects_may_have_other_organs(folders, subject, tmp_path: Path) -> None:
    """What one subject's scribbles hold is not looked for in the next."""
    drawn = scribbles()
    for name, value in (("a", 7), ("b", 8)):
        for file, source in (("reference", "reference"), ("T2", "target")):
            save(tmp_path / f"subjects/{name}/{file}.nii.gz", read_volume(subject[source]).data)
        save(tmp_path / f"subjects/{name}/scribbles.nii.gz", np.where(drawn == 9, value, drawn).astype(np.uint8))
    arguments = ["refer", "--subjects", str(tmp_path / "subjects"), "-o", str(subject["output"]), "-m", str(folders[2])]
    assert main([*arguments, "-device", "cpu", "--no-overlays"]) == 0
    first, second = (set(r["millilitres"]) - set(ORGANS) for r in report(subject)["results"])
    assert (first, second) == ({"organ_7", "organ_200"}, {"organ_8", "organ_200"})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["spleen"], "--organ-names spleen: expected NAME=NUMBER with a number from 1 to 255"),
        (["spleen=0"], "from 1 to 255"),
        (["spleen=256"], "from 1 to 255"),
        (["spleen=4", "gallbladder=4"], "names an organ or a number twice"),
        (["liver=4"], "contradicts the data set of the model: liver=1"),
        (["spleen=1"], "contradicts the data set"),
    ],
)
def test_names_that_cannot_be(folders, subject, capsys, names: list[str], message: str) -> None:
    assert refer(folders[2], subject, "--organ-names", *names) == 2
    assert message in capsys.readouterr().err
    assert not subject["output"].exists()


def test_a_model_of_fixed_organs_says_which_one_takes_any(folders, subject, capsys) -> None:
    assert refer(folders["CrossMR"], subject, "--organ-names", "pancreas=9") == 2
    assert f"A model of {NAME} takes any." in capsys.readouterr().err
    assert refer(folders["CrossMR"], subject) == 4
    message = capsys.readouterr().err
    assert "undeclared class 9" in message and f"A model of {NAME} takes any organ." in message


@pytest.mark.parametrize("value", [-1, 256, 1.5])
def test_values_that_are_no_labels(folders, subject, capsys, value: float) -> None:
    drawn = scribbles().astype(np.float32)
    drawn[2, 5, 5] = value
    save(subject["scribbles"], drawn)
    assert refer(folders[2], subject) == 4
    assert "error" in capsys.readouterr().err


def test_refer_equals_nnunets_predictor_on_stacked_channels(folders, subject) -> None:
    """One scribbled slice, same grid, one tile: the kept memory must not change a logit."""
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[3, 10:20, 12], drawn[3, 30, 5:15] = 1, 2
    predictor = load_referring_model(folders[2], ["0"], "checkpoint_final.pth", torch.device("cpu"), [])
    network = predictor.network
    referring = ReferringPredictor(predictor)
    reference = referring.reference(read_volume(subject["reference"]), drawn)
    target = referring.prepare(read_volume(subject["target"]))
    predictor.configuration_manager.configuration["patch_size"] = [40, 40]
    stacked = torch.cat((target.image, reference.prepared.image, reference.scribbles.float()))[:, 3:4]
    predictor.network = network
    expected = predictor.predict_sliding_window_return_logits(stacked)
    predictor.network = referring.prompted
    referring.prompted.prompt = referring._encode_slices(reference)[3]
    frame = own_frame(reference.prepared.volume)
    kept = referring._slide(target, frame, slice(3, 4))
    assert kept.shape == (1 + len(ORGANS), 1, *SHAPE[1:])
    torch.testing.assert_close(kept[:3], expected[:3].float(), atol=1e-3, rtol=1e-3)


def test_places_are_those_of_the_reference_whatever_the_targets_grid(folders, subject, tmp_path: Path) -> None:
    """A target stored from left to right reversed, of another size and spacing, cropped and padded."""
    predictor = ReferringPredictor(
        load_referring_model(folders[2], ["0"], "checkpoint_final.pth", torch.device("cpu"), [])
    )
    turned = np.diag([-0.8, 0.9, 2.0, 1.0])
    turned[:3, 3] = (35, 3, 1)
    data = image(3, (8, 30, 45))
    data[:, :4] = data[:, :, -6:] = 0  # nnU-Net crops these
    target = read_volume(save(tmp_path / "other.nii.gz", data, turned))
    reference = read_volume(subject["reference"])
    prepared = predictor.prepare(target)
    frame = shared_frame(target, reference, by_position=True)
    size = tuple(prepared.image.shape[1:])
    places = predictor._places(prepared, frame, [0, 0, 0], size)
    assert places.shape == (2, *size)
    centre = reference.affine @ [*(np.array(SHAPE)[::-1] - 1) / 2, 1]
    for voxel in ((0, 0, 0), (3, 10, 20), tuple(n - 1 for n in size)):
        low = [edge for edge, _ in prepared.properties["bbox_used_for_cropping"]]
        cropped = prepared.properties["shape_after_cropping_and_before_resampling"]
        read = [(v + 0.5) * c / s - 0.5 + edge for v, c, s, edge in zip(voxel, cropped, size, low)]
        world = target.affine @ [*read[::-1], 1] - centre
        np.testing.assert_allclose(places[:, voxel[0], voxel[1], voxel[2]], world[[1, 0]], atol=1e-3)
    own = predictor._places(prepared, shared_frame(target, reference, by_position=False), [0, 0, 0], size)
    assert abs(float(own[0].mean())) < 6 and not torch.allclose(own, places)
