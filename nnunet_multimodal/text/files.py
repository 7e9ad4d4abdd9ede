"""Files of text embeddings: our own, with names and checksum, and bare tensors with a list of names beside them."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_multimodal.conversion.images import written_whole
from nnunet_multimodal.errors import DataProblem, UsageError

OWN_SUFFIXES = (".npz", ".safetensors")
BARE_SUFFIXES = (".pth", ".pt")
_KEYS = ("modalities", "labels", "template", "encoder", "normalised", "prompts", "notes")


@dataclass(frozen=True)
class Content:
    """What a file holds, in its own order.

    Attributes:
        embeddings: [M, C, E] float32, or [1, C, E] if ``modalities`` is None.
        labels: C names.
        modalities: M names; None if the file has no axis of modalities.
        template, encoder, normalised, prompts, notes: as in TextEmbeddings.
    """

    embeddings: torch.Tensor
    labels: tuple[str, ...]
    modalities: tuple[str, ...] | None
    template: str | None
    encoder: str
    normalised: bool
    prompts: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def checksum(content: Any) -> str:
    """sha256 over the numbers, their order and where they come from, the same on every machine.

    Args:
        content: a Content with modalities, or a TextEmbeddings.
    """
    digest = hashlib.sha256(json.dumps(_description(content), sort_keys=True).encode("ascii"))
    digest.update(np.asarray(content.embeddings.shape, dtype="<i8").tobytes())
    digest.update(content.embeddings.detach().cpu().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _description(content: Any) -> dict[str, Any]:
    return {key: getattr(content, key) for key in _KEYS}


# --- writing ---------------------------------------------------------------------------------------------------------


def write(path: Path, content: Any) -> None:
    """Write a Content or TextEmbeddings as .npz (strings only, nothing pickled) or .safetensors.

    Raises:
        UsageError: the suffix is neither.
    """
    require_own_suffix(path)
    about = {key: json.dumps(value) for key, value in _description(content).items()} | {"checksum": checksum(content)}
    tensor = content.embeddings.detach().cpu().contiguous()
    with written_whole(path) as temporary:
        if path.suffix.lower() == ".npz":
            with temporary.open("wb") as file:  # a path would get a second .npz
                np.savez(file, allow_pickle=False, embeddings=tensor.numpy(), **_arrays(content, about["checksum"]))
        else:
            from safetensors.torch import save_file

            save_file({"embeddings": tensor}, temporary, metadata=about)


def require_own_suffix(path: Path) -> None:
    if path.suffix.lower() not in OWN_SUFFIXES:
        raise UsageError(f"{path}: text embeddings are written as {' or '.join(OWN_SUFFIXES)}. Take such a name.")


def _arrays(content: Any, digest: str) -> dict[str, np.ndarray]:
    """Readable with numpy alone; an empty template is none."""
    return {
        "labels": np.array(content.labels, dtype=str),
        "modalities": np.array(content.modalities, dtype=str),
        "template": np.array(content.template or "", dtype=str),
        "encoder": np.array(content.encoder, dtype=str),
        "normalised": np.array(content.normalised),
        "prompts": np.array(content.prompts, dtype=str),
        "notes": np.array(content.notes, dtype=str),
        "checksum": np.array(digest, dtype=str),
    }


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path, names: Path | None = None, file_modalities: Sequence[str] | None = None) -> Content:
    """Read any of the four kinds of file; nothing in it is ever executed.

    Args:
        path: .npz or .safetensors of ours, or .pth/.pt with one tensor [C, E] or [M, C, E].
        names: for a tensor, the file that names its C rows, one a line; None looks for it beside the tensor.
        file_modalities: for a tensor [M, C, E], which modality each of its M slices is of.

    Raises:
        UsageError: the file is missing or of another kind, or the names do not fit the tensor (faults.md 33).
        DataProblem: it is damaged, was changed since it was written, or holds more than tensors (faults.md 37).
    """
    suffix = path.suffix.lower()
    if suffix not in OWN_SUFFIXES + BARE_SUFFIXES:
        raise UsageError(f"{path} is of no kind we read; expected {', '.join(OWN_SUFFIXES + BARE_SUFFIXES)}.")
    if not path.is_file():
        raise UsageError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; expected text embeddings.")
    if suffix in BARE_SUFFIXES:
        return _read_bare(path, names, file_modalities)
    if names is not None or file_modalities is not None:
        raise UsageError(f"{path} holds its own names; a file of names is for a bare tensor (.pth, .pt).")
    content, stored = _read_npz(path) if suffix == ".npz" else _read_safetensors(path)
    shape = (len(content.modalities or ()), len(content.labels))
    if content.embeddings.ndim != 3 or tuple(content.embeddings.shape[:2]) != shape:
        raise DataProblem(f"{path}: expected embeddings {[*shape, 'E']}, found {[*content.embeddings.shape]}.")
    found = checksum(content)
    if found != stored:
        raise DataProblem(
            f"{path} was changed after it was written: checksum {found[:12]}, expected {stored[:12]}. "
            "Make it again: nnunet_multimodal embed"
        )
    return content


def _read_npz(path: Path) -> tuple[Content, str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in ("embeddings", *_KEYS, "checksum") if key not in file.files]
            if missing:
                raise DataProblem(_foreign(path, missing, file.files))
            embeddings = torch.from_numpy(file["embeddings"].astype(np.float32))
            content = Content(
                embeddings,
                tuple(file["labels"].tolist()),
                tuple(file["modalities"].tolist()),
                str(file["template"]) or None,
                str(file["encoder"]),
                bool(file["normalised"]),
                tuple(tuple(row) for row in file["prompts"].tolist()),
                tuple(file["notes"].tolist()),
            )
            return content, str(file["checksum"])
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise DataProblem(_damaged(path, error)) from error


def _read_safetensors(path: Path) -> tuple[Content, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            missing = [key for key in (*_KEYS, "checksum") if key not in about]
            if missing or [*file.keys()] != ["embeddings"]:
                raise DataProblem(_foreign(path, missing or ["embeddings"], [*file.keys(), *about]))
            embeddings = file.get_tensor("embeddings").float()
        value = {key: json.loads(about[key]) for key in _KEYS}
        value["prompts"] = tuple(tuple(row) for row in value["prompts"])
        for key in ("labels", "modalities", "notes"):
            value[key] = tuple(value[key])
        return Content(embeddings, **value), about["checksum"]
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise DataProblem(_damaged(path, error)) from error


def _read_bare(path: Path, names: Path | None, file_modalities: Sequence[str] | None) -> Content:
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataProblem(
            f"{path} holds more than tensors, and reading that could run foreign code; it was not read. "
            "Save the tensor alone: torch.save(tensor, FILE)"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataProblem(_damaged(path, error)) from error
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = f"tensor of {tensor.dtype}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        keys = f" with {', '.join(map(str, [*tensor][:5]))}" if isinstance(tensor, dict) else ""
        raise DataProblem(f"{path} holds a {kind}{keys}; expected one tensor of floats, [C, E] or [M, C, E].")
    if tensor.ndim not in (2, 3) or 0 in tensor.shape:
        raise DataProblem(f"{path} has shape {[*tensor.shape]}, expected [C, E] or [M, C, E].")
    names_file = names if names is not None else _names_beside(path)
    labels = _read_names(names_file)
    if len(labels) != tensor.shape[-2]:
        raise UsageError(
            f"{path} has {tensor.shape[-2]} rows, {names_file} has {len(labels)} names. "
            "Name each row once: --names FILE"
        )
    modalities: tuple[str, ...] | None = None
    if tensor.ndim == 3:
        if file_modalities is None:
            raise UsageError(
                f"{path} has shape {[*tensor.shape]}, so {tensor.shape[0]} modalities, and does not say which. Name "
                "them in the order of the file: --file-modalities MR CT"
            )
        modalities = tuple(file_modalities)
        if len(modalities) != tensor.shape[0] or len(set(modalities)) != len(modalities):
            raise UsageError(
                f"{path} has {tensor.shape[0]} modalities, --file-modalities names {', '.join(modalities)}."
            )
    elif file_modalities is not None:
        raise UsageError(f"{path} has shape {[*tensor.shape]}: no axis of modalities for --file-modalities to name.")
    embeddings = tensor.detach().float().clone()
    embeddings = embeddings if embeddings.ndim == 3 else embeddings[None]
    note = f"names of rows from {names_file.name}"
    return Content(embeddings, labels, modalities, None, path.name, False, notes=(note,))


def _names_beside(path: Path) -> Path:
    """``embeddings.txt`` or ``embeddings_names.txt`` for ``embeddings.pth``, or the only .txt in the folder."""
    candidates = [path.with_suffix(".txt"), path.with_name(f"{path.stem}_names.txt")]
    texts = sorted(path.parent.glob("*.txt"))
    found = [candidate for candidate in candidates if candidate in texts] or texts
    if len(found) == 1 or (found and found[0] in candidates):
        return found[0]
    several = f"several could be its names: {', '.join(text.name for text in found)}" if found else "none is beside it"
    raise UsageError(f"{path} needs a file that names its rows, one a line; {several}. Give it: --names FILE")


def _read_names(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UsageError(f"Cannot read the names in {path}: {reason}.") from error
    names = tuple(line.strip() for line in lines)
    for number, name in enumerate(names, start=1):
        if not name:
            raise UsageError(f"{path}, line {number}: empty name. Each line names one row.")
        if name in names[: number - 1]:
            raise UsageError(f"{path}, line {number}: '{name}' was there before. Each row needs its own name.")
    return names


def _foreign(path: Path, missing: Sequence[str], found: Sequence[str]) -> str:
    return (
        f"{path} was not written by nnunet_multimodal: it has no {', '.join(missing)}, found "
        f"{', '.join(found) or 'nothing'}. Save the tensor alone as .pth, with a file of names."
    )


def _damaged(path: Path, error: BaseException) -> str:
    return f"Cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}. Copy or make it again."
