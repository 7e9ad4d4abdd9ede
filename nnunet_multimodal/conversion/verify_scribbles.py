"""What in the labels of a data set with nnU-Net's ignore label would keep a network from learning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from nnunet_multimodal.conversion.dataset import find_files, first_names
from nnunet_multimodal.conversion.images import check_label_values, compare_geometry, read_labels
from nnunet_multimodal.conversion.scribble_dataset import DENSE
from nnunet_multimodal.data.modality import SECTION
from nnunet_multimodal.errors import DataProblem


def check_drawn(labels: Mapping[str, Any], found: Mapping[str, Set[int]]) -> tuple[list[str], list[str]]:
    """Problems and warnings of what is drawn.

    Args:
        labels: of dataset.json; nothing is said if there is no label ``ignore``.
        found: the values in the label file of each case.
    """
    ignore = labels.get("ignore")
    if not isinstance(ignore, int) or not found:
        return [], []
    drawn = frozenset().union(*found.values()) - {ignore}
    empty = sorted(case for case, values in found.items() if values <= {ignore})
    if not drawn:
        return [f"Nobody drew on any of the {len(found)} cases: all labels hold nothing but ignore ({ignore})."], []
    problems, warnings = [], []
    if 0 not in drawn:
        problems.append(
            "background (0) is drawn in no case. Without background scribbles everything becomes foreground; draw "
            "some, or simulate them: nnunet_multimodal scribbles simulate --background."
        )
    never = [
        name
        for name, value in labels.items()
        if name not in ("background", "ignore") and not drawn & {*(value if isinstance(value, list) else [value])}
    ]
    if never:
        problems.append(
            f"{first_names(never)}: drawn in no case, so it cannot be learnt. Draw it or take its name out."
        )
    if empty:
        warnings.append(f"{len(empty)} cases have no annotated voxel: {first_names(empty)}. They teach nothing.")
    if not any(ignore in values for values in found.values()):
        warnings.append(f"ignore ({ignore}) is declared, but in no label file: are these dense labels?")
    return problems, warnings


def check_fingerprint(folder: Path, content: Mapping[str, Any], preprocessed: Path | None) -> list[str]:
    """Warnings of CT statistics that count what nobody drew on.

    Args:
        folder: of the raw data set.
        content: its dataset.json.
        preprocessed: nnUNet_preprocessed, if it is known.
    """
    if "ignore" not in content["labels"] or preprocessed is None:
        return []
    path = preprocessed / folder.name / "dataset_fingerprint.json"
    channels = [index for index, name in content["channel_names"].items() if str(name).casefold() == "ct"]
    try:
        fingerprint = json.loads(path.read_text(encoding="utf-8"))
        if SECTION in fingerprint:
            return []
        means = [fingerprint["foreground_intensity_properties_per_channel"][index]["mean"] for index in channels]
    except (OSError, ValueError, KeyError):
        return []  # not planned yet, or nothing that we could judge
    return [
        f"{path} has a mean of {mean:.0f} HU for CT: nnU-Net counts ignore as foreground. Run nnunet_multimodal "
        f"scribbles fingerprint -d {folder.name}, then plan and preprocess again."
        for mean in means
    ]


def check_dense(folder: Path, labels: Mapping[str, Any], label_files: Mapping[str, Path]) -> list[str]:
    """Problems of the dense labels beside the scribbles.

    Args:
        folder: of the data set.
        labels: of dataset.json.
        label_files: scribbles of each case.
    """
    if not (folder / DENSE).is_dir():
        return []
    try:
        files = find_files(folder / DENSE, "dense label")
    except DataProblem as problem:
        return [str(problem)]
    problems = []
    strange = sorted(files.keys() - label_files.keys())
    if strange:
        problems.append(f"{len(strange)} files in {DENSE} are of no case: {first_names(strange)}")
    members = (value if isinstance(value, list) else [value] for value in labels.values())
    allowed = {member for values in members for member in values} - {labels.get("ignore")}
    for case in sorted(files.keys() & label_files.keys()):
        try:
            dense = read_labels(files[case])
            check_label_values(dense, allowed)
            compare_geometry(read_labels(label_files[case]), dense, "dense label")
        except DataProblem as problem:
            problems.append(str(problem))
    return problems
