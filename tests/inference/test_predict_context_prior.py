"""Prediction with context priors: as nnU-Net's, told or inferred."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_mixed import MODALITIES, mixed_result_folder, picture

from nnunet_multimodal.environment import extension_value
from nnunet_multimodal.inference.modality import ModalityPredictor

NAME = "nnUNetTrainerContextPrior"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """Two models whose priors have a say: what begins at zero no longer is."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_compile", "f")
        patch.setenv("nnUNet_extTrainer", extension_value())
        found = {name: mixed_result_folder(name) for name in (NAME, f"{NAME}_noModality")}
        for folder in found.values():
            disturb(folder / "fold_0/checkpoint_final.pth")
        yield found


def disturb(file: Path) -> None:
    checkpoint = torch.load(file, weights_only=False)
    generator = torch.Generator().manual_seed(0)
    for name, value in checkpoint["network_weights"].items():
        if name.startswith(("fusions.", "prototypes.")) and not value.any():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    torch.save(checkpoint, file)


def predictor_of(model: Path, kind: Any = nnUNetPredictor) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = kind(use_mirroring=True, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), (0,))
    return predictor


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image)[None] / 100


@pytest.mark.parametrize("modality", MODALITIES)
def test_told_what_it_would_infer_it_predicts_exactly_as_nnunet(models: Any, modality: str) -> None:
    image = tensor(picture(modality, 3))
    expected = predictor_of(models[NAME]).predict_logits_from_preprocessed_data(image)
    predictor = predictor_of(models[NAME], ModalityPredictor)
    assert predictor.modalities == MODALITIES
    for told in (None, modality):
        predictor.told = told
        assert torch.equal(predictor.predict_logits_from_preprocessed_data(image), expected)
        assert (predictor.verdict.modality, predictor.verdict.how) == (modality, "told" if told else "inferred")
    predictor.told = next(name for name in MODALITIES if name != modality)
    forced = predictor.predict_logits_from_preprocessed_data(image)
    assert predictor.verdict.inferred == modality and not torch.allclose(forced, expected, atol=1e-2)
    assert torch.isfinite(forced).all() and forced.abs().max() <= 1000


def test_without_modalities_there_is_nothing_to_tell(models: Any) -> None:
    image, model = tensor(picture("CT", 3)), models[f"{NAME}_noModality"]
    predictor = predictor_of(model, ModalityPredictor)
    assert predictor.conditioned is None and predictor.modalities == ()
    found = predictor.predict_logits_from_preprocessed_data(image)
    assert torch.equal(found, predictor_of(model).predict_logits_from_preprocessed_data(image))
    assert predictor.verdict is None
