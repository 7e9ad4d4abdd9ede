"""SegVol's public weights, by name, into our network."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_multimodal.errors import DataProblem, EnvironmentProblem
from nnunet_multimodal.trainers.checkpoints import load_fitting

# What the tensors lie in: SegVol_v1.pth, a pretrained vision transformer of theirs, nnU-Net's own checkpoints.
CONTAINERS = ("model", "state_dict", "network_weights")
PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.", "text_encoder.")
# Beginnings that wrappers leave: of DataParallel, of the Hugging Face copy, of the pretraining (encoder only).
WRAPPERS = ("module.", "model.", "_orig_mod.")
PRETRAINED_ENCODER = "encoder."


def load_segvol_weights(path: Path, network: nn.Module) -> str:
    """Copies every tensor of SegVol's file whose name and shape fit into the network.

    What never fits is SegVol's own: CLIP's text model (texts come from ``nnunet_multimodal embed``), its unused encoder
    of masks, and heads that it does not train. The text of our organs stays as it is.

    Args:
        path: SegVol_v1.pth, pytorch_model.bin of the Hugging Face copy, or a .safetensors of the same names.
        network: filled in place.

    Returns:
        What was loaded, is new, and was skipped, in words.

    Raises:
        EnvironmentProblem: there is no such file.
        DataProblem: it is damaged, holds more than tensors (it is never executed), or nothing of it fits.
    """
    weights = {name: value for key, value in _tensors(path).items() if (name := _own_name(key)) is not None}
    own = network.state_dict()
    if not any(name in own and own[name].shape == value.shape for name, value in weights.items()):
        found = ", ".join(f"{name} {[*value.shape]}" for name, value in [*weights.items()][:3]) or "no tensor of SegVol"
        raise DataProblem(
            f"{path}: nothing fits this network, found {found}. SegVol's sizes are vit_width 768, vit_layers 12, "
            "vit_heads 12; its patch is (4, 16, 16) of a window of (32, 256, 256)."
        )
    weights.pop("text_embeddings", None)  # of other organs
    return load_fitting(network, weights).replace("starting model", f"SegVol's weights ({path.name})", 1)


def _own_name(key: str) -> str | None:
    """``module.image_encoder.norm.weight`` -> ``image_encoder.norm.weight``; None for what is no part of SegVol."""
    stripped = True
    while stripped:
        stripped = False
        for wrapper in WRAPPERS:
            if key.startswith(wrapper):
                key, stripped = key.removeprefix(wrapper), True
    if key.startswith(PRETRAINED_ENCODER):
        key = f"image_{key}"
    return key if key.startswith(PARTS) or key == "text_embeddings" else None


def _tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; nothing in it is executed."""
    if not path.is_file():
        raise EnvironmentProblem(
            f"SegVol's weights {path} not found. Download SegVol_v1.pth (BAAI-DCAI/SegVol), or set segvol_weights to "
            "null in the plans' section nnunet_multimodal to train from scratch."
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataProblem(
            f"{path} holds more than tensors, and reading that could run foreign code; it was not read. Save the "
            'tensors alone: torch.save({"model": network.state_dict()}, FILE)'
        ) from error
    except Exception as error:
        if isinstance(error, (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile)) or (
            type(error).__name__ == "SafetensorError"
        ):
            raise DataProblem(f"{path} cannot be read: {' '.join(str(error).split())}. Download it again.") from error
        raise
    for container in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
            break
    if not isinstance(content, Mapping):
        raise DataProblem(f"{path} holds a {type(content).__name__}, expected tensors by name.")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
