"""A CLIP model small enough to be made in a test, and a data set for its sentences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

NAME = "tiny-clip-of-the-tests"
CONFIGURATION = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def make(folder: Path) -> Path:
    """A model folder as on the hub: configuration and random weights; the configuration also becomes built in."""
    folder.mkdir()
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIGURATION), encoding="utf-8")
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(NAME)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights_of(folder))
    content = {"model_cfg": CONFIGURATION, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def weights_of(folder: Path) -> Path:
    return folder / "open_clip_model.safetensors"


def by_hand(folder: Path, prompts: Sequence[str], quick_gelu: bool = False) -> Tensor:
    """[N, 16]: what open_clip itself makes of the prompts."""
    weights = str(weights_of(folder))
    model = open_clip.create_model(NAME, pretrained=weights, force_quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        return model.encode_text(open_clip.get_tokenizer(NAME)([*prompts]))


def write_dataset(root: Path, labels: dict[str, Any] | None = None, modalities: Sequence[str] = ("CT", "MR")) -> Path:
    """``Dataset602_Abdomen/dataset.json`` with a modality table and no image."""
    folder = root / "Dataset602_Abdomen"
    folder.mkdir(parents=True)
    content = {
        "channel_names": {"0": "CT_or_MR"},
        "labels": labels or {"background": 0, "left_kidney": 2, "right_kidney": 1, "gallbladder": 3, "ignore": 4},
        "nnunet_multimodal": {
            "modalities": [*modalities],
            "case_modality": {f"case_{index}": name for index, name in enumerate(modalities)},
        },
    }
    (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
