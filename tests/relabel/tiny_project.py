"""Images of 16 x 12 x 6 voxels with a liver and two kidneys, a project of them, and predictions without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from nnunet_multimodal.relabel.project import Project
from nnunet_multimodal.relabel.start import init

SHAPE = (6, 12, 16)  # z, y, x
AFFINE = np.array([[-2.0, 0, 0, 15], [0, 2.0, 0, -7], [0, 0, 4, 5], [0, 0, 0, 1.0]])  # stored left to right: L, A, S
LABELS = {"liver": 1, "right_kidney": 2, "left_kidney": 3}


def anatomy(seed: int = 0) -> np.ndarray:
    """uint8 [Z, Y, X] in storage order, in which x grows to the patient's left."""
    labels = np.zeros(SHAPE, np.uint8)
    shift = seed % 2
    labels[1:5, 2 + shift : 7 + shift, 3:7] = 1
    labels[1:3, 8:11, 3:6] = 2
    labels[1:3, 8:11, 10 + shift : 13 + shift] = 3
    return labels


def picture(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(100, 5, SHAPE)
    return (noise + 20 * anatomy(seed)).astype(np.float32)


def save(path: Path, array_zyx: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array_zyx.transpose(2, 1, 0), affine), path)
    return path


def load(path: Path) -> np.ndarray:
    """[Z, Y, X] in storage order."""
    return np.asanyarray(nibabel.load(path).dataobj).transpose(2, 1, 0)


class Workshop:
    """A folder with images, true labels and a project."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images, self.truth, self.place = folder / "images", folder / "truth", folder / "P"
        self.names: list[str] = []

    def make_images(self, count: int) -> None:
        for seed in range(count):
            name = f"p{seed}"
            save(self.images / f"{name}.nii.gz", picture(seed))
            save(self.truth / f"{name}.nii.gz", anatomy(seed))
            self.names.append(name)

    def init(self, labelled: int = 0, **more: Any) -> None:
        start = self.folder / "start"
        for name in self.names[:labelled]:
            save(start / f"{name}.nii.gz", load(self.truth / f"{name}.nii.gz"))
        labels = start if labelled else None
        begun = init(self.place, self.images, LABELS, labels, modality="MR", **more)
        assert not begun.accepted.failed

    @property
    def project(self) -> Project:
        return Project(self.place)

    def pretend_model(self, cycle: int = 0) -> int:
        """A model in the ledger, and predictions of the pool: the truth, with one slice of the liver missing."""
        project = self.project
        with project.ledger.transaction():
            model = project.ledger.run(
                "INSERT INTO models (cycle, folder, folds, checkpoint) VALUES (?, ?, ?, ?)",
                cycle,
                "/none",
                '["0"]',
                "c",
            )
            before = project.ledger.setting("model")
            project.ledger.set_setting("model", model)
            after = {"model": model}
            project.ledger.append("train", "test", project.ledger.new_operation(), {}, None, {"model": before}, after)
        folder = project.predictions(model)
        from nnunet_multimodal.relabel.formats import file_hash

        for number, name in enumerate(self.names):
            proposal = load(self.truth / f"{name}.nii.gz").copy()
            proposal[4][proposal[4] == 1] = 0
            save(folder / f"{name}.nii.gz", proposal)
            doubt = np.zeros(SHAPE, np.uint8)
            doubt[4, 2:7, 3:7] = 80
            save(folder / f"{name}.doubt.nii.gz", doubt)
            record = {"score": number / 10, "image_hash": file_hash(self.images / f"{name}.nii.gz", "nifti")}
            (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
        project.ledger.close()
        return model

    def state(self, name: str) -> dict[str, Any]:
        project = self.project
        row = dict(project.ledger.case(name) or {})
        project.ledger.close()
        return row

    def package(self, name: str) -> Path:
        (found,) = self.place.glob(f"batches/batch_*/{name}")
        return found

    def correct(self, name: str) -> None:
        """What a person does: the proposal becomes the truth, and is saved."""
        save(self.package(name) / "mask.nii.gz", load(self.truth / f"{name}.nii.gz"))
