"""Prompts to features with a CLIP model of open_clip, without its traps.

Checked against open_clip 3.3.0: OpenAI's weights need QuickGELU, for which it only warns; a hub model whose weights
cannot be fetched is left at random; a missing network is retried for most of a minute (text/weights.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nnunet_multimodal.errors import DataProblem, EnvironmentProblem, UsageError
from nnunet_multimodal.text import weights
from nnunet_multimodal.text.names import listed, nearest

ALIASES = {"biomedclip": "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"}
PREFERRED = "openai"  # the paper's weights
HUB, FOLDER = "hf-hub:", "local-dir:"

_CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
_BATCH = 64  # prompts at once


@dataclass(frozen=True)
class Encoded:
    """Attributes:
    features: [N, E] float32, as the encoder gives them, not normalised.
    encoder: which model and weights.
    notes: what a user should know about how it was loaded.
    """

    features: Tensor
    encoder: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Model:
    """What to hand to open_clip: ``weights`` is a file, or None where ``name`` says it all (hf-hub:, local-dir:)."""

    name: str
    weights: Path | None
    quick_gelu: bool
    trusted: bool
    encoder: str
    notes: tuple[str, ...] = ()


def encode(
    prompts: Sequence[str], encoder: str, pretrained: str | None = PREFERRED, checkpoint: str | Path | None = None
) -> Encoded:
    """The text features of prompts, on the CPU.

    Args:
        prompts: N texts.
        encoder, pretrained, checkpoint: as in ``TextEmbeddings.from_open_clip``.

    Raises:
        UsageError: no such encoder or weights.
        EnvironmentProblem: open_clip, transformers, weights or a tokenizer are missing and cannot be downloaded.
        DataProblem: the weights are damaged or of another model.
    """
    open_clip = _import_open_clip()
    model, tokenizer, found = _load(open_clip, ALIASES.get(encoder.lower(), encoder), pretrained, checkpoint)
    features = []
    with torch.no_grad():
        for start in range(0, len(prompts), _BATCH):
            tokens = tokenizer([*prompts[start : start + _BATCH]])
            features.append(model.encode_text(tokens, normalize=False).float())
    return Encoded(torch.cat(features), found.encoder, found.notes)


def _import_open_clip() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's and torch.jit's, which no user can do anything about
            import open_clip
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "open_clip"
        problem = "is not installed" if missing else f"does not import ({error})"
        raise EnvironmentProblem(
            f"open_clip {problem}; text is encoded with it. Run: pip install 'nnunet_multimodal[text]'. Or: "
            "--from-file FILE (embeddings made on another computer), --one-hot (no text)."
        ) from error
    module: ModuleType = open_clip
    return module


def _load(
    open_clip: ModuleType, name: str, pretrained: str | None, checkpoint: str | Path | None
) -> tuple[Any, Any, _Model]:
    """The model with its weights, in evaluation mode, and its tokenizer."""
    if name.startswith(HUB) or name.startswith(FOLDER):
        if checkpoint is not None:
            raise UsageError(
                f"{name} brings its own weights, so --checkpoint {checkpoint} has no use. For a model on this "
                f"computer: --encoder {FOLDER}FOLDER, with {_CONFIG} and the weights in it"
            )
        found = _in_folder(name) if name.startswith(FOLDER) else _on_hub(name)
        text = _text_configuration(found, name)
    else:
        found = _built_in(open_clip, name, pretrained, checkpoint)
        text = open_clip.get_model_config(found.name)["text_cfg"]
    _require_text_files(text, found)
    # Whatever it needs is here by now: asked to look no further, it cannot hang.
    with weights.hub_from_cache_only(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = open_clip.create_model(
                found.name,
                pretrained=str(found.weights) if found.weights else None,
                force_quick_gelu=found.quick_gelu,
                pretrained_text=False,  # the text tower is in the weights; it would be downloaded to be replaced
                require_pretrained=True,  # else a model without weights stays random
                weights_only=not found.trusted,
            )
            tokenizer = open_clip.get_tokenizer(found.name)
        except ImportError as error:
            raise EnvironmentProblem(f"{found.encoder} needs another package: {_short(error)}") from error
        except pickle.UnpicklingError as error:
            raise DataProblem(
                f"{found.weights or found.name} holds more than tensors, and reading that could run foreign code; "
                "it was not read. Save the state_dict alone, or take a .safetensors file."
            ) from error
        except (
            OSError,
            EOFError,
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            StopIteration,
        ) as error:
            source = f"{found.weights} as weights of {found.name}" if found.weights else found.name
            raise DataProblem(f"Cannot load {source}: {_short(error)}") from error
    return model.eval(), tokenizer, found


# --- where the weights are -------------------------------------------------------------------------------------------


def _built_in(open_clip: ModuleType, name: str, pretrained: str | None, checkpoint: str | Path | None) -> _Model:
    """A model whose configuration comes with open_clip, and weights by their tag or from a file."""
    if name not in open_clip.list_models():
        near = nearest(name, [*open_clip.list_models(), *ALIASES])
        question = f" Did you mean {near}?" if near else ""
        raise UsageError(
            f"unknown encoder '{name}'.{question} Take a model of open_clip, {', '.join(ALIASES)}, {HUB}ORG/NAME or "
            f"{FOLDER}FOLDER."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if checkpoint is None and pretrained is not None and pretrained not in tags and Path(pretrained).is_file():
        pretrained, checkpoint = None, pretrained  # as open_clip has it: a tag or a file
    if pretrained is None and (PREFERRED in tags or len(tags) == 1):
        pretrained = PREFERRED if PREFERRED in tags else tags[0]
    if pretrained not in tags and not (checkpoint is not None and (pretrained is None or not tags)):
        known = f"one of {listed(tags)}" if tags else "--checkpoint FILE, open_clip has none"
        raise UsageError(f"no weights '{pretrained}' for {name}; expected {known}.")
    tag = pretrained if pretrained in tags else None
    quick_gelu = bool(tag and open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    label = f"{name}/{tag}" if tag else name
    notes: tuple[str, ...] = ()
    if checkpoint is not None:
        file = Path(checkpoint)
        if not file.is_file():
            raise UsageError(f"--checkpoint {file} {'is a folder' if file.is_dir() else 'does not exist'}.")
        label = f"{label} ({file.name})"
        if tag:
            gelu = "QuickGELU" if quick_gelu else "GELU"
            notes = (f"{file.name} taken for weights like '{tag}' ({gelu}); if it is others: --pretrained TAG",)
    else:
        file = _of_tag(open_clip, name, str(tag))
    return _Model(name, file, quick_gelu, _is_published_archive(open_clip, file), label, notes)


def _of_tag(open_clip: ModuleType, name: str, tag: str) -> Path:
    """The file of open_clip's own weights: cached from the hub or the URL, else downloaded."""
    known = open_clip.get_pretrained_cfg(name, tag)
    what = f"weights of {name}/{tag}"
    url = known.get("url", "")
    if not known.get("hf_hub"):
        return weights.fetch_from_url(url, what)
    repository, _, file_name = known["hf_hub"].rpartition("/")
    names = (file_name,) if file_name else _WEIGHTS
    cached = weights.find_in_hub_cache(repository, names) or (weights.find_in_url_cache(url) if url else None)
    return cached or weights.fetch_from_hub(repository, names, what, as_checkpoint=True)


def _on_hub(name: str) -> _Model:
    repository = name.removeprefix(HUB)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"--encoder {name}: expected {HUB}ORG/NAME.")
    weights.fetch_from_hub(repository, (_CONFIG,), f"configuration of {repository}")
    weights.fetch_from_hub(repository, _WEIGHTS, f"weights of {repository}")
    return _Model(name, None, False, False, repository)


def _in_folder(name: str) -> _Model:
    folder = Path(name.removeprefix(FOLDER))
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"--encoder {name}: {folder} has no {_CONFIG}.")
    return _Model(name, None, False, False, folder.resolve().name)


def _text_configuration(found: _Model, name: str) -> dict[str, Any]:
    """``text_cfg`` out of a model's own open_clip_config.json."""
    if name.startswith(FOLDER):
        path = Path(name.removeprefix(FOLDER)) / _CONFIG
    else:
        path = weights.fetch_from_hub(name.removeprefix(HUB), (_CONFIG,), f"configuration of {found.encoder}")
    try:
        text: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
        return text
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataProblem(f'{path} is no configuration of open_clip: no "model_cfg" with "text_cfg".') from error


def _require_text_files(text: dict[str, Any], found: _Model) -> None:
    """Text towers and tokenizers of transformers (BiomedCLIP, SigLIP) keep files in repositories of their own."""
    tower, tokenizer = text.get("hf_model_name"), text.get("hf_tokenizer_name")
    if (tower or tokenizer) and importlib.util.find_spec("transformers") is None:
        raise EnvironmentProblem(
            f"transformers is not installed; the text encoder of {found.encoder} needs it. "
            "Run: pip install 'nnunet_multimodal[text]'. Or take --encoder ViT-B-32, which does not."
        )
    if tower:
        weights.fetch_from_hub(tower, ("config.json",), f"configuration of the text encoder {tower}")
    if tokenizer and not found.name.startswith(FOLDER):
        new = weights.find_in_hub_cache(tokenizer, _TOKENIZERS) is None
        weights.fetch_from_hub(tokenizer, _TOKENIZERS, f"files of the tokenizer {tokenizer}")
        for name in _TOKENIZER_EXTRAS if new else ():
            _fetch_if_there(tokenizer, name)


def _fetch_if_there(repository: str, name: str) -> None:
    """Files that only some tokenizers have."""
    try:
        weights.fetch_from_hub(repository, (name,), name)
    except EnvironmentProblem:
        return


def _is_published_archive(open_clip: ModuleType, path: Path) -> bool:
    """Whether a file is, byte for byte, one of OpenAI's TorchScript archives, as their clip package caches them.

    torch reads such an archive only as a program, so no other one is read: the digest is in the published URL.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return False
    except zipfile.BadZipFile:
        return False
    with path.open("rb") as file:
        digest = _digest(file)
    if digest in _published_digests(open_clip):
        return True
    raise DataProblem(
        f"{path} is a program (TorchScript) and none that OpenAI published, so it was not read. "
        "Save the state_dict alone, or take a .safetensors file."
    )


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def _published_digests(open_clip: ModuleType) -> set[str]:
    urls = [open_clip.get_pretrained_url(name, tag) for name, tag in open_clip.list_pretrained() if tag == PREFERRED]
    return {url.split("/")[-2] for url in urls if "openaipublic" in url}


def _short(error: BaseException) -> str:
    """The first lines of what torch says about a state_dict that does not fit can be thousands of names long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
