"""Checkpoints that are either old or new, never half (faults.md rows 35 and 38)."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_multimodal.errors import DataProblem, MultimodalError

# What nnU-Net writes, best first: what to fall back to where the wanted one cannot be read.
PREFERENCE = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
SURELY_DEAD = 3600.0  # seconds since a temporary file grew; no process id tells, on a cluster


TRAIN_ON = "go on with nnUNetv2_train ... --c"


def write_whole(path: Path, write: Callable[[str], Any], then: str = TRAIN_ON) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, brings it to disk, and puts it in place in one step.

    Args:
        path: the file.
        write: fills the file whose name it is given.
        then: what to do where there was no room, for the message.

    Raises:
        MultimodalError: it cannot be written. The old file is as it was, and no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a process that was killed while saving
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > SURELY_DEAD:
                left.unlink()
    try:
        write(str(temporary))
        if not temporary.exists():  # nnU-Net writes nothing on other ranks or with checkpointing off
            return
        with open(temporary, "rb+") as file:  # Windows brings only what is open for writing to disk
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        size = f" (need ~{temporary.stat().st_size / 1e6:.0f} MB or more)" if temporary.exists() else ""
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise MultimodalError(
            f"cannot write {path}: {reason}{size}. The file from before, if any, is untouched. Make room, then {then}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_complete(path: Path) -> bool:
    """Whether a checkpoint can be read to its end: a zip archive with a directory whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, zipfile.LargeZipFile):
        return False


def load_plain(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of nnU-Net or of an adapter file, on the CPU, if it is nothing but data.

    A .pth is a pickle, which may call any function while it is read. Here only tensors, numbers and plain containers
    are made, and the numpy numbers that nnU-Net logs; whatever else the file asks for is refused unread.

    Raises:
        DataProblem: it holds something else, or cannot be read (faults.md rows 35 and 37).
    """
    try:
        with torch.serialization.safe_globals(_numpy_numbers()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        said = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line]
        raise DataProblem(
            f"{path} is refused: it holds more than weights and settings, and reading that could run code "
            f"({said[0] if said else str(error).splitlines()[0]}). If you trust where it comes from, load it with "
            "torch.load(..., weights_only=False) and save its weights again; else ask for another file."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise DataProblem(f"{path} cannot be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict):
        raise DataProblem(f"{path} is no checkpoint: it holds a {type(content).__name__}, expected a dict.")
    return content


def _numpy_numbers() -> list[Any]:
    """What numpy needs to make a number or an array of numbers, under its names of numpy 1 and 2."""
    kinds = [np.dtype, np.ndarray, *{type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "?")}]
    functions = {
        "scalar": np.float64(0).__reduce__()[0],
        "_reconstruct": np.zeros(1).__reduce__()[0],
    }
    return [*kinds, *((f, f"numpy.{core}.multiarray.{n}") for n, f in functions.items() for core in ("core", "_core"))]


def readable_checkpoint(wanted: Path) -> tuple[Path, str | None]:
    """The wanted checkpoint, or the next best in its folder with a message that says so.

    Raises:
        DataProblem: none can be read.
    """
    if is_complete(wanted):
        return wanted, None
    found = "is missing" if not wanted.exists() else "is incomplete"
    for name in PREFERENCE:
        candidate = wanted.with_name(name)
        if candidate != wanted and is_complete(candidate):
            epoch = load_plain(candidate).get("current_epoch")
            return candidate, f"{wanted.name} {found}; using {candidate.name} (epoch {epoch})."
    raise DataProblem(
        f"{wanted} {found}, and no other checkpoint in {wanted.parent} can be read. "
        "Train again without --c, or copy a checkpoint back from a backup."
    )


def starting_file(path: Path, fold: int | str | None = None) -> Path:
    """The checkpoint to start from: the file itself, or that of a fold in an nnU-Net result folder.

    That is the fold of the same number, which has never seen the cases that this one validates (if the splits are the
    same), else the first that there is.

    Raises:
        DataProblem: there is none in the folder.
    """
    if not path.is_dir():
        return path
    found = [file for name in PREFERENCE for file in sorted(path.glob(f"fold_*/{name}"))]
    found.sort(key=lambda file: file.parent.name != f"fold_{fold}")
    direct = [path / name for name in PREFERENCE if (path / name).exists()]
    if not direct + found:
        raise DataProblem(f"no checkpoint in {path}: expected fold_*/checkpoint_final.pth.")
    return (direct + found)[0]


def load_fitting(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> str:
    """Copies every tensor whose name and shape fit, and says what was loaded, is new, and was skipped."""
    own = network.state_dict()
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    network.load_state_dict(fitting, strict=False)
    new = sorted(own.keys() - fitting.keys())
    skipped = sorted(weights.keys() - fitting.keys())
    lines = [f"starting model: {len(fitting)} tensors loaded, {len(new)} new, {len(skipped)} skipped"]
    first = {value.data_ptr(): key for key, value in reversed(own.items())}.values()  # nnU-Net's have two names or more
    for title, names in (("new", [key for key in new if key in first]), ("skipped", skipped)):
        lines += [f"  {title}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"] if names else []
    return "\n".join(lines)
