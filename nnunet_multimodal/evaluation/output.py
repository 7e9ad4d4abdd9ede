"""cases.csv and summary.csv: one row for each case and organ, one for each scope and organ."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_multimodal.conversion.images import written_whole
from nnunet_multimodal.evaluation.cases import CaseResult, Settings
from nnunet_multimodal.evaluation.measures import STATES
from nnunet_multimodal.evaluation.summary import METRICS

VALUES = (*METRICS, "volume_ref_ml", "volume_pred_ml")
CASE_COLUMNS = ("case", "modality", "organ", *VALUES, "status", "surface", "tolerance_mm")
SUMMARY_COLUMNS = (
    "scope",
    "name",
    "organ",
    "cases",
    *(f"{metric}_{what}" for metric in METRICS for what in ("mean", "sd", "n")),
    *STATES,
    "surface",
    "tolerance_mm",
)


@contextlib.contextmanager
def all_or_none(output: Path) -> Iterator[Path]:
    """A folder to write into; its files go to ``output`` when all of them are there. Tables of two runs never mix."""
    output.mkdir(parents=True, exist_ok=True)
    partial = output / f".partial-{os.getpid()}"
    partial.mkdir(exist_ok=True)
    try:
        yield partial
        for path in sorted(partial.iterdir()):
            os.replace(path, output / path.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tables(
    folder: Path,
    results: Sequence[CaseResult],
    modality_of: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    settings: Settings,
    below: float | None = None,
) -> None:
    """Undefined is an empty cell, the distance of a missed organ ``inf``; the status says which."""
    definition = {"surface": settings.surface}
    columns = SUMMARY_COLUMNS if below is None else (*SUMMARY_COLUMNS, "below", "below_share", "below_dsc")
    write_csv(
        folder / "cases.csv",
        CASE_COLUMNS,
        (
            {
                "case": result.name,
                "modality": modality_of[result.name],
                "organ": organ,
                **{column: getattr(measures, column) for column in VALUES},
                "status": measures.status,
                "tolerance_mm": settings.tolerances[organ],
                **definition,
            }
            for result in results
            for organ, measures in result.organs.items()
        ),
    )
    write_csv(
        folder / "summary.csv",
        columns,
        ({**row, "tolerance_mm": _tolerance(row["organ"], settings), "below_dsc": below, **definition} for row in rows),
    )


def _tolerance(organ: str, settings: Settings) -> str:
    """Of an organ; of all organs, all that were used."""
    if organ in settings.tolerances:
        return f"{settings.tolerances[organ]:g}"
    return " ".join(f"{value:g}" for value in sorted({*settings.tolerances.values()}))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(row[column]) for column in columns] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return "" if value is None else value


def plain(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has not: they become None."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
