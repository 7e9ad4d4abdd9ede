"""refer, through the command, with a model of random weights: what goes where, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny_model import ORGANS, SHAPE, image, save, tiny_result_folder

from nnunet_multimodal.cli import main
from nnunet_multimodal.conversion.images import read_volume
from nnunet_multimodal.inference.export import write_segmentation
from nnunet_multimodal.inference.model import load_referring_model
from nnunet_multimodal.inference.referring import (
    ReferringPredictor,
    covering_windows,
    join_prompts,
    mix_prompts,
)
from nnunet_multimodal.networks import Prompt


def scribbles() -> np.ndarray:
    """Liver on slices 1 and 4, right kidney on slice 2, left kidney nowhere."""
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[1, 5:12, 8] = drawn[4, 20, 10:18] = 1
    drawn[2, 30, 20:25] = 2
    return drawn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """nnU-Net's folders and a model for each dimension."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_compile", "f")
        yield {2: tiny_result_folder(2, folds=(0, 1)), 3: tiny_result_folder(3)}


@pytest.fixture
def subject(tmp_path: Path) -> dict[str, Path]:
    return {
        "reference": save(tmp_path / "in/T1.nii.gz", image(1)),
        "scribbles": save(tmp_path / "in/S.nii.gz", scribbles()),
        "target": save(tmp_path / "in/T2.nii.gz", image(2)),
        "output": tmp_path / "out",
    }


def refer(model: Path, subject: dict[str, Path], *more: str, targets: list[Path] | None = None) -> int:
    return main([
        "refer", "--reference", str(subject["reference"]), "--scribbles", str(subject["scribbles"]), "--targets",
        *map(str, targets or [subject["target"]]), "-o", str(subject["output"]), "-m", str(model),
        "-device", "cpu", *more,
    ])  # fmt: skip


def test_each_target_gets_a_segmentation_on_its_own_grid(folders, subject, tmp_path: Path) -> None:
    """Another spacing, another shape, stored left to right reversed: the result has the target's header."""
    turned = np.diag([-0.8, 0.9, 2.0, 1.0])
    turned[:3, 3] = (35, 0, 1)
    other = save(tmp_path / "in/DWI.nii.gz", image(3, (8, 44, 45)), turned)
    assert refer(folders[2], subject, targets=[subject["target"], other]) == 0
    for target in (subject["target"], other):
        result, source = nib.load(subject["output"] / target.name), nib.load(target)
        assert result.shape == source.shape
        np.testing.assert_allclose(result.affine, source.affine, atol=1e-6)
        assert set(np.unique(result.dataobj)) <= {0, *ORGANS.values()}
    report = json.loads((subject["output"] / "refer.json").read_text(encoding="utf-8"))
    assert [r["matching"] for r in report["results"]] == ["position", "position"]
    assert not report["failed"]
    assert (subject["output"] / "overlays/T2.png").read_bytes().startswith(b"\x89PNG")


def test_organs_are_only_looked_for_between_their_scribbles(folders, subject) -> None:
    assert refer(folders[2], subject, "--no-overlays") == 0
    result = np.asarray(nib.load(subject["output"] / "T2.nii.gz").dataobj).transpose(2, 1, 0)
    found = {label: set(np.flatnonzero((result == label).any(axis=(1, 2)))) for label in ORGANS.values()}
    assert found[ORGANS["liver"]] <= {1, 2, 3, 4}
    assert found[ORGANS["right_kidney"]] <= {2}
    assert found[ORGANS["left_kidney"]] == set(), "an organ without a scribble comes out empty"
    report = json.loads((subject["output"] / "refer.json").read_text(encoding="utf-8"))
    assert report["results"][0]["slices"] == {"liver": 4, "right_kidney": 1, "left_kidney": 0}


def test_reach_looks_further(folders, subject) -> None:
    assert refer(folders[2], subject, "--no-overlays", "--reach", "3") == 0
    report = json.loads((subject["output"] / "refer.json").read_text(encoding="utf-8"))
    assert report["results"][0]["slices"] == {"liver": 6, "right_kidney": 3, "left_kidney": 0}


def test_volumes(folders, subject) -> None:
    assert refer(folders[3], subject, "--no-overlays") == 0
    report = json.loads((subject["output"] / "refer.json").read_text(encoding="utf-8"))
    assert report["results"][0]["matching"] == "volume"
    assert report["results"][0]["millilitres"]["left_kidney"] == 0


def test_refer_equals_nnunets_predictor_on_stacked_channels(folders, subject) -> None:
    """One scribbled slice, same grid, one tile: the kept prompt must not change a single logit."""
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[3, 10:20, 12], drawn[3, 30, 5:15] = 1, 2
    save(subject["scribbles"], drawn)
    predictor = load_referring_model(folders[2], ["0"], "checkpoint_final.pth", torch.device("cpu"), [])
    network = predictor.network
    referring = ReferringPredictor(predictor)
    reference = referring.reference(read_volume(subject["reference"]), drawn)
    target = referring.prepare(read_volume(subject["target"]))
    assert list(referring.encode(reference)[0]) == [3]
    stacked = torch.cat((target.image, reference.prepared.image, reference.scribbles.float()))[:, 3:4]
    predictor.network = network
    # a patch that covers the slice, as in the comparison that the documentation promises
    predictor.configuration_manager.configuration["patch_size"] = [40, 40]
    expected = predictor.predict_sliding_window_return_logits(stacked)
    predictor.network = referring.prompted
    referring.prompted.prompt = referring._encode_slices(reference)[3]
    kept = predictor.predict_sliding_window_return_logits(target.image[:, 3:4])
    assert kept.shape == (1 + len(ORGANS), 1, *SHAPE[1:])
    torch.testing.assert_close(kept[:3], expected[:3])
    assert (kept[3] < 0).all() and (expected[3] < 0).all(), "the left kidney has no scribble"


def test_many_subjects_go_on_after_a_bad_one(folders, subject, tmp_path: Path, capsys) -> None:
    for name in ("a", "b", "c"):
        save(tmp_path / f"many/{name}/reference.nii.gz", image(1))
        save(tmp_path / f"many/{name}/scribbles.nii.gz", scribbles())
        save(tmp_path / f"many/{name}/T2.nii.gz", image(2))
    (tmp_path / "many/b/T2.nii.gz").write_bytes(b"")
    command = ["refer", "--subjects", str(tmp_path / "many"), "-o", str(tmp_path / "out"), "-m", str(folders[2]),
               "-device", "cpu", "--no-overlays"]  # fmt: skip
    assert main(command) == 1
    assert (tmp_path / "out/a/T2.nii.gz").exists() and (tmp_path / "out/c/T2.nii.gz").exists()
    assert not (tmp_path / "out/b/T2.nii.gz").exists()
    report = json.loads((tmp_path / "out/refer.json").read_text(encoding="utf-8"))
    assert [f["subject"] for f in report["failed"]] == ["b"]
    assert "2 segmented, 0 kept from before, 1 failed" in capsys.readouterr().out

    before = (tmp_path / "out/a/T2.nii.gz").stat().st_mtime_ns
    save(tmp_path / "many/b/T2.nii.gz", image(2))
    assert main([*command, "--continue"]) == 0
    assert (tmp_path / "out/a/T2.nii.gz").stat().st_mtime_ns == before, "what was finished is kept"
    assert (tmp_path / "out/b/T2.nii.gz").exists()


FAULTS = pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("shape", 4, r"S\.nii\.gz.*\(5, 40, 36\)|5 x 40 x 36|36.*40.*5"),
        ("undeclared", 4, r"undeclared class 7"),
        ("outside", 4, r"outside the body"),
        ("empty", 4, r"is empty: draw on at least one slice"),
        ("shifted", 4, r"S\.nii\.gz"),
        ("truncated", 4, r"ends early"),
    ],
)


def test_no_result_takes_the_place_of_an_image(folders, subject, capsys) -> None:
    before = subject["target"].read_bytes()
    subject["output"] = subject["target"].parent
    assert refer(folders[2], subject) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert subject["target"].read_bytes() == before


def test_anything_that_goes_wrong_costs_one_image(folders, subject, monkeypatch, capsys, tmp_path: Path) -> None:
    """Such as no memory for one big target."""
    other = save(tmp_path / "in/big.nii.gz", image(3))
    answer = ReferringPredictor.answer

    def fail(self, target, *args):
        if target.path.name == "big.nii.gz":
            raise RuntimeError("out of memory")
        return answer(self, target, *args)

    monkeypatch.setattr(ReferringPredictor, "answer", fail)
    assert refer(folders[2], subject, "--no-overlays", targets=[other, subject["target"]]) == 1
    assert "out of memory" in capsys.readouterr().err
    assert (subject["output"] / "T2.nii.gz").exists() and not (subject["output"] / "big.nii.gz").exists()


@FAULTS
def test_bad_scribbles(folders, subject, capsys, fault: str, code: int, message: str) -> None:
    """Rows 27 and 28 of faults.md, and files that cannot be read; nothing is written."""
    drawn = scribbles()
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    if fault == "shape":
        drawn = drawn[:5]
    elif fault == "undeclared":
        drawn[1, 5, 8] = 7
    elif fault == "outside":
        body = image(1)
        body[:, :15] = 0
        save(subject["reference"], body)
        drawn[1, 2, 30] = 1
    elif fault == "empty":
        drawn[:] = 0
    elif fault == "shifted":
        affine[0, 3] = 20
    save(subject["scribbles"], drawn, affine)
    if fault == "truncated":
        subject["scribbles"].write_bytes(subject["scribbles"].read_bytes()[:60])
    assert refer(folders[2], subject) == code
    captured = capsys.readouterr()
    import re

    assert re.search(message, captured.err + captured.out), captured.err + captured.out
    assert not (subject["output"] / "T2.nii.gz").exists()


def test_truncated_final_checkpoint_falls_back(folders, subject, capsys, tmp_path: Path) -> None:
    """Row 35: the next best checkpoint is used, and the user is told."""
    import shutil

    model = tmp_path / folders[2].name
    shutil.copytree(folders[2], model)
    shutil.rmtree(model / "fold_1")
    final = model / "fold_0/checkpoint_final.pth"
    shutil.copy(final, model / "fold_0/checkpoint_best.pth")
    final.write_bytes(final.read_bytes()[:5000])
    assert refer(model, subject, "--no-overlays") == 0
    assert "checkpoint_final.pth is incomplete; using checkpoint_best.pth (epoch 1)" in capsys.readouterr().out


def test_usage_is_checked_before_anything_is_loaded(tmp_path: Path, capsys) -> None:
    assert main(["refer", "-o", str(tmp_path), "-m", str(tmp_path)]) == 2
    assert "give --reference" in capsys.readouterr().err
    assert main(["refer", "--subjects", str(tmp_path / "none"), "-o", str(tmp_path), "-m", str(tmp_path)]) == 4


def test_model_that_does_not_exist(folders, subject, capsys) -> None:
    assert refer(folders[2].parent / "nnUNetTrainerCrossMR__nnUNetPlans__4d", subject) == 3
    assert "plans.json" in capsys.readouterr().err


def prompt(organs: int, tokens: int, value: float) -> Prompt:
    return Prompt(
        [torch.full((1, organs, tokens, 4), value)] * 2,
        torch.ones(1, organs, tokens, dtype=torch.bool),
        torch.full((1, organs, 4), value),
        torch.ones(1, organs, dtype=torch.bool),
    )


def test_mix_prompts_takes_each_organ_from_its_slice() -> None:
    mixed = mix_prompts({3: prompt(3, 5, 3.0), 8: prompt(3, 5, 8.0)}, (8, -1, 3))
    assert mixed.present.tolist() == [[True, False, True]]
    assert mixed.tokens[1][0, :, 0, 0].tolist()[::2] == [8.0, 3.0]
    assert mixed.visible[0].sum(-1).tolist() == [5, 0, 5]
    assert mixed.signature[0, 2, 0] == 3.0


def test_join_prompts_weighs_by_points() -> None:
    first, second = prompt(1, 4, 1.0), prompt(1, 4, 5.0)
    second.visible[..., 1:] = False
    joined = join_prompts([first, second])
    assert joined.tokens[0].shape == (1, 1, 8, 4)
    assert joined.signature[0, 0, 0] == pytest.approx((4 * 1 + 1 * 5) / 5)


@pytest.mark.parametrize("seed", range(20))
def test_windows_cover_every_scribbled_voxel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = torch.zeros(20, 50, 60, dtype=torch.bool)
    for _ in range(4):
        z, y, x = (int(rng.integers(0, n - 6)) for n in drawn.shape)
        drawn[z, y : y + 6, x] = True
    windows = covering_windows(drawn, [8, 32, 32], most=100)
    covered = torch.zeros_like(drawn)
    for window in windows:
        assert [s.stop - s.start for s in window] == [8, 32, 32]
        covered[window] = True
    assert not (drawn & ~covered).any()


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, 1)])
def test_segmentation_keeps_the_storage_order_of_its_image(tmp_path: Path, signs) -> None:
    affine = np.diag([*signs, 1.0])
    array = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)  # z, y, x
    path = save(tmp_path / "image.nii.gz", array, affine)
    canonical = read_volume(path).data
    write_segmentation(tmp_path / "seg.nii.gz", (canonical > 60).astype(np.uint8), path)
    written = nib.load(tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(nib.load(path).dataobj) > 60)
    np.testing.assert_allclose(written.affine, affine)
    assert not math.isnan(written.affine.sum())
