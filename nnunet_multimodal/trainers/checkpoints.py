"""Checkpoints that are either old or new, never half (faults.md rows 35 and 38)."""

from __future__ import annotations

import contextlib
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnunet_multimodal.errors import DataProblem, MultimodalError

# What nnU-Net writes, best first: what to fall back to where the wanted one cannot be read.
PREFERENCE = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")
SURELY_DEAD = 3600.0  # seconds since a temporary file grew; no process id tells, on a cluster


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, brings it to disk, and puts it in place in one step.

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
            f"cannot write {path}: {reason}{size}. The checkpoint from before, if any, is untouched. "
            "Make room, then go on with nnUNetv2_train ... --c"
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
            epoch = torch.load(candidate, map_location="cpu", weights_only=False, mmap=True).get("current_epoch")
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
    for title, names in (("new", new), ("skipped", skipped)):
        lines += [f"  {title}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"] if names else []
    return "\n".join(lines)
