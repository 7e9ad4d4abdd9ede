"""Honest validation of a training from scribbles: against dense labels that were kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_multimodal.trainers.checkpoints import write_whole

SUMMARY = "summary_dense.json"


@dataclass(frozen=True)
class DenseValidation:
    """Dice against dense labels: each class's mean over cases, the mean of these, and what could not be judged."""

    of_class: dict[int, float]
    cases: list[str]
    left_out: dict[str, str] = field(default_factory=dict)  # case -> why

    @property
    def mean(self) -> float:
        """Of the classes."""
        return float(np.mean(list(self.of_class.values())))


def dense_validation(
    validation: Path, dense: Path, cases: Sequence[str], ending: str, labels: Sequence[int], reader: Any
) -> DenseValidation:
    """nnU-Net's own metrics of the validation's predictions, written as nnU-Net writes them: ``summary_dense.json``.

    Args:
        validation: nnU-Net's folder of predictions, CASE + ending; the summary is written there.
        dense: folder of dense labels on the same grids.
        cases: the fold's validation cases.
        ending: of the files, such as .nii.gz.
        labels: foreground labels.
        reader: nnU-Net's image reader.
    """
    measured, left_out = {}, {}
    for case in cases:
        reference = dense / f"{case}{ending}"
        if not reference.is_file():
            left_out[case] = "has no dense labels"
            continue
        try:
            measured[case] = compute_metrics(str(reference), str(validation / f"{case}{ending}"), reader, list(labels))
        except Exception as error:  # another grid, or a file that cannot be read: each reader has errors of its own
            left_out[case] = " ".join(str(error).split()) or type(error).__name__
    if not measured:
        return DenseValidation({}, [], left_out)
    names = list(next(iter(measured.values()))["metrics"][labels[0]])
    means = {
        label: {name: _mean([each["metrics"][label][name] for each in measured.values()]) for name in names}
        for label in labels
    }
    foreground = {name: float(np.mean([row[name] for row in means.values()])) for name in names}
    content = {"metric_per_case": list(measured.values()), "mean": means, "foreground_mean": foreground}
    recursive_fix_for_json_export(content)
    write_whole(validation / SUMMARY, lambda path: save_summary_json(content, path))
    return DenseValidation({label: row["Dice"] for label, row in means.items()}, list(measured), left_out)


def _mean(values: list[float]) -> float:
    """Of the cases that have the class; NaN where none has it."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
