"""The beginning: labels, images, the first labels and the first model. Run again, it goes on, or adds new images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_multimodal.conversion.dataset import declared_labels
from nnunet_multimodal.errors import EnvironmentProblem, UsageError
from nnunet_multimodal.relabel.accept import Accepted, accept_masks, masks_in
from nnunet_multimodal.relabel.pool import pattern_traits, register, scan
from nnunet_multimodal.relabel.project import Project, check_same_labels, dataset_word

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_best.pth")
CHANNEL = "CT_or_MR"  # any name but CT, which would switch nnU-Net's clipping of CT on


@dataclass
class Begun:
    """What ``init`` did."""

    new_images: int = 0
    images: int = 0
    accepted: Accepted = field(default_factory=Accepted)
    model: str | None = None


def init(
    folder: Path,
    images: Path,
    labels: Mapping[str, int] | None,
    label_files: Path | None = None,
    model: Path | None = None,
    modality: str | None = None,
    pattern: str | None = None,
    who: str = "init",
    wait: float = 0.0,
) -> Begun:
    """Makes a project, or adds to it what is new.

    Args:
        folder: of the project.
        images: folder of images; they stay there.
        labels: name -> id; None takes the project's, else the model's.
        label_files: folder of masks that are good already.
        model: result folder of nnU-Net to propose with until the first training.
        modality, pattern: see ``pattern_traits``.
        who: made the first labels.
        wait: for other processes.

    Raises:
        UsageError: other labels than before, or none at all; a folder that holds something else.
        EnvironmentProblem: the model is no result folder with a checkpoint.
        DataProblem: two images of one name, or no image.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, expected the folder of a project.")
    row = None if model is None else model_row(model)
    if labels is None and model is not None:
        labels = model_labels(model)
    if labels is None and not (folder / "relabel.sqlite").is_file():
        raise UsageError(
            "which labels? Give --label-names liver=1 ..., --labels-json FILE, or a --model that has them."
        )
    declared = None if labels is None else declared_labels(labels)
    traits = pattern_traits(pattern, modality)
    found = scan(images)  # before anything is made
    project = Project(folder, wait, create=True)
    ledger = project.ledger
    begun = Begun()
    with project.changing("init"):
        project.tidy()
        before = ledger.setting("labels")
        if before is not None and declared is not None:
            check_same_labels(before, declared, folder)
        if before is None and declared is None:
            raise UsageError("which labels? Give --label-names, --labels-json or --model.")
        with ledger.transaction():
            if before is None:
                for key, value in (("labels", declared), ("name", dataset_word(project.folder.name)), ("seed", 12345)):
                    ledger.set_setting(key, value)
            begun.new_images = register(ledger, found, traits)
            if begun.new_images:
                details = {"images": begun.new_images, "folder": str(images.resolve())}
                ledger.append("register", who, ledger.new_operation(), details)
            if row is not None and ledger.one("SELECT 1 FROM models WHERE folder = ?", row["folder"]) is None:
                if ledger.one("SELECT 1 FROM models") is not None:
                    raise UsageError(f"{folder} has a model already; it starts from one at most.")
                number = ledger.run(
                    "INSERT INTO models (cycle, folder, folds, checkpoint) VALUES (0, ?, ?, ?)", *row.values()
                )
                ledger.set_setting("model", number)
                ledger.append("start", who, ledger.new_operation(), row, None, {"model": None}, {"model": number})
        if label_files is not None:
            names = [each["name"] for each in ledger.all("SELECT name FROM cases")]
            masks = masks_in(label_files, names, begun.accepted)
            # Once accepted, a first label has been undone or corrected since: to take it again would be a step back.
            query = "SELECT DISTINCT c.name FROM events e JOIN cases c ON c.id = e.case_id WHERE e.kind = 'accept'"
            known = {each["name"] for each in ledger.all(query)}
            begun.accepted.same = sorted(known & masks.keys())
            masks = {name: path for name, path in masks.items() if name not in known}
            accept_masks(project, masks, who, begun.accepted, confirm=masks, start=True)
    begun.images = ledger.value("SELECT count(*) FROM cases")
    begun.model = None if row is None else row["folder"]
    return begun


def model_row(folder: Path) -> dict[str, str]:
    """Folder, folds and checkpoint of a result folder of nnU-Net.

    Raises:
        EnvironmentProblem: it is none.
    """
    folder = folder.resolve()
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise EnvironmentProblem(f"{folder} holds no {name}: this is no result folder of nnUNetv2_train.")
    for checkpoint in CHECKPOINTS:
        folds = sorted(path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}"))
        folds = [fold for fold in folds if fold != "all"] or folds  # as nnUNetv2_predict
        if folds:
            return {"folder": str(folder), "folds": json.dumps(folds), "checkpoint": checkpoint}
    raise EnvironmentProblem(f"no fold in {folder} has a checkpoint: the training has not saved one yet.")


def model_labels(folder: Path) -> dict[str, int]:
    """Raises UsageError for a model of regions, which have no ids of their own."""
    content: dict[str, Any] = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    labels = content["labels"]
    if not all(isinstance(value, int) for value in labels.values()):
        raise UsageError(f"{folder} predicts regions, which overlap; name the labels with --label-names.")
    return dict(labels)
