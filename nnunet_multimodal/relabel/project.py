"""A relabel project: a folder with the ledger, the masks, and what is made of them.

PROJECT/relabel.sqlite          the ledger
PROJECT/masks/                  every accepted mask and every proposal, by content; nothing is ever deleted here
PROJECT/batches/batch_001/      packages to correct: image, mask, colours, pictures, and a page
PROJECT/plans.json              nnU-Net's plans, the same in all cycles; edit it to change the network or the settings
PROJECT/nnunet/raw|preprocessed|results    a data set for each cycle, links only
PROJECT/logs/                   what nnU-Net said
PROJECT/cache/                  images as .nii.gz, predictions of the pool, preprocessed cases: can be made again
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nnunet_multimodal.conversion.dataset import declared_labels, is_running, organs_of
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.relabel import locks
from nnunet_multimodal.relabel.ledger import Ledger
from nnunet_multimodal.relabel.store import MaskStore

LEDGER = "relabel.sqlite"
FOLDS = 5
PATIENCE = 3600.0  # seconds; an acceptance of many large masks takes minutes
SURELY_LEFT = 3600.0  # seconds; where several machines write, no process number tells whether the writer lives
_PARTIAL = re.compile(r"\.(\d+)\.partial\..+|(?:\..+)?\.partial-(\d+)")


class Project:
    """An open project.

    Args:
        folder: of the project.
        wait: seconds to wait for the locks of other processes.
        create: make what is not there yet.

    Raises:
        UsageError: it is no project.
    """

    def __init__(self, folder: Path, wait: float = 0.0, create: bool = False) -> None:
        self.folder = folder.resolve()
        self.wait = wait
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.folder / LEDGER, create)
        self.masks = MaskStore(self.folder / "masks")
        if not create and self.ledger.setting("labels") is None:
            raise UsageError(f"{folder} was never finished: run nnunet_multimodal relabel init on it again.")

    @property
    def labels(self) -> dict[str, int]:
        """Name -> id, background first."""
        return dict(self.ledger.setting("labels"))

    @property
    def organs(self) -> dict[str, int]:
        """The labels that are drawn: without background and ignore."""
        return organs_of(self.labels)

    @property
    def images(self) -> Path:
        return self.folder / "cache" / "images"

    @property
    def batches(self) -> Path:
        return self.folder / "batches"

    @property
    def plans(self) -> Path:
        return self.folder / "plans.json"

    def predictions(self, model: int) -> Path:
        return self.folder / "cache" / f"predictions_{model:03d}"

    def nnunet(self, kind: str) -> Path:
        """nnU-Net's folder: raw, preprocessed or results."""
        return self.folder / "nnunet" / kind

    def dataset_name(self, cycle: int) -> str:
        return f"Dataset{cycle:03d}_{self.ledger.setting('name')}"

    def model_folder(self, row: Mapping[str, Any]) -> Path:
        """A model's result folder; those trained here move with the project."""
        return self.folder / row["folder"]

    def model(self) -> dict[str, Any] | None:
        """The current model's row."""
        number = self.ledger.setting("model")
        row = None if number is None else self.ledger.one("SELECT * FROM models WHERE id = ?", number)
        return None if row is None else dict(row)

    @contextlib.contextmanager
    def changing(self, command: str, patient: bool = False) -> Iterator[None]:
        """The lock for changes of the ledger; ``patient`` after long work, which must not fail for it."""
        with locks.held(
            self.folder / ".locks", "project", f"relabel {command}", max(self.wait, PATIENCE if patient else 0.0)
        ):
            yield

    @contextlib.contextmanager
    def working(self, name: str, command: str) -> Iterator[None]:
        """The lock of long work, ``propose`` or ``train``: corrections can be accepted meanwhile."""
        with locks.held(self.folder / ".locks", name, f"relabel {command}", self.wait):
            yield

    def tidy(self, training: bool = False) -> None:
        """Removes half-written files of processes that are gone. None of them was ever part of the project.

        Args:
            training: also those of data sets, which are many files after many cycles.
        """
        patterns = ["masks/*", "report"]
        if training:
            patterns += ["cache/preprocessed/*", "nnunet/preprocessed/*", "nnunet/preprocessed/*/*"]
        folders = {path for pattern in patterns for path in self.folder.glob(pattern) if path.is_dir()}
        for parent in (self.folder, self.batches, self.images, *folders):
            if parent.is_dir():
                remove_partials(parent)


def remove_partials(folder: Path, older_than: float | None = None) -> None:
    """Removes what was left half-written: by processes that are gone, or so many seconds ago."""
    for path in folder.iterdir():
        match = _PARTIAL.fullmatch(path.name)
        if match is None:
            continue
        if older_than is not None:
            gone = time.time() - path.lstat().st_mtime > older_than
        else:
            gone = not is_running(int(match[1] or match[2]))
        if gone:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def dataset_word(text: str) -> str:
    """A name that nnU-Net takes for a data set, out of a folder's."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_.-") or "Relabel"


def check_same_labels(before: Mapping[str, int], now: Mapping[str, int], folder: Path) -> None:
    """Raises UsageError where a project has other labels: masks of both could not be told apart."""
    if dict(before) != declared_labels(now):
        raise UsageError(f"{folder} has the labels {dict(before)}, now {declared_labels(now)}. Make another project.")
