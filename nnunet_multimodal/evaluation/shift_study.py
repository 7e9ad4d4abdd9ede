"""How fast a model gets worse as its images leave what it was trained on: Dice at every level of every shift.

A level is predicted, measured and written down before the next one begins (``levels/KEY.json``); a study that was
interrupted goes on behind the last one. Level 0, the images as they are, is predicted once for all shifts.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_multimodal.conversion.dataset import numbered, write_json
from nnunet_multimodal.data.shifts import SHIFTS
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.evaluation.cases import Case, CaseResult, Settings
from nnunet_multimodal.evaluation.compare import case_result
from nnunet_multimodal.evaluation.evaluate import evaluate_all, versions
from nnunet_multimodal.evaluation.measures import FALSE_POSITIVE, MISSED, NOT_ANNOTATED
from nnunet_multimodal.evaluation.output import all_or_none, plain, write_csv
from nnunet_multimodal.evaluation.shift_curves import NONE, curve_of, severity_at_loss
from nnunet_multimodal.evaluation.shift_report import Example, write_report
from nnunet_multimodal.evaluation.summary import MEANS, summarize
from nnunet_multimodal.evaluation.surfaces import DEFINITIONS

COLUMNS = (
    "shift", "level", "severity", "unit", "scope", "name", "organ", "cases", "dsc_mean", "dsc_sd", "dsc_n",
    "dsc_change", "nsd_mean", "nsd_sd", "nsd_n", "nsd_change", "hd95_mm_mean", "asd_mm_mean", MISSED, FALSE_POSITIVE,
    NOT_ANNOTATED,
)  # fmt: skip
CASE_COLUMNS = (
    "shift", "level", "severity", "case", "modality", "organ", "dsc", "nsd", "hd95_mm", "asd_mm", "volume_ref_ml",
    "volume_pred_ml", "status",
)  # fmt: skip
CHANGE = (
    "dsc_change and nsd_change are differences to the same cases without a shift. A case that fails without a shift is "
    "left out of the study; one that fails at a level counts there as missed. Between two levels, the severity at "
    "which 5 points of Dice are lost is interpolated linearly."
)


@dataclass(frozen=True)
class Level:
    """One severity of one shift; of shift ``none``, the images as they are."""

    shift: str
    number: int
    severity: float

    @property
    def key(self) -> str:
        """Names its file: the same severity has the same name, however many levels there are."""
        return NONE if self.shift == NONE else f"{self.shift}-{self.severity:.4g}"

    @property
    def unit(self) -> str:
        return "" if self.shift == NONE else SHIFTS[self.shift].unit


@dataclass(frozen=True)
class Study:
    """What is studied.

    Attributes:
        output: folder of the results.
        levels: as ``make_levels`` gives them.
        references: case -> its true label map.
        ending: of the predictions' files.
        settings: what is measured.
        modality_of: case -> modality.
        how: model, seed and all else that must not change between two runs into one folder.
        stamps: case -> what changes if its image, its reference or what the network is told of it does; then its levels
            are done again.
        keep: leave the predictions in ``output/predictions``.
        jobs: processes that measure.
        example: case -> its image, to show the shifts on in the report.
        without_reference, without_image: names of images and label maps that are alone, and are in no curve.
        report: whether to write shift.html.
    """

    output: Path
    levels: Sequence[Level]
    references: Mapping[str, Path]
    ending: str
    settings: Settings
    modality_of: Mapping[str, str]
    how: Mapping[str, Any]
    stamps: Mapping[str, str]
    keep: bool = False
    jobs: int = 1
    example: Callable[[str], Example | None] = lambda case: None
    without_reference: Sequence[str] = ()
    without_image: Sequence[str] = ()
    report: bool = True


Predict = Callable[[Level, Sequence[str], Path], dict[str, str]]
"""(level, cases, folder): predicts the cases into the folder, going on where it stopped; case -> what went wrong."""


def make_levels(shifts: Sequence[str], levels: int) -> list[Level]:
    """Level 0, then those of each shift in turn.

    Raises:
        UsageError: there is no level.
    """
    if levels < 1:
        raise UsageError(f"--levels {levels}: expected 1 or more; level 0, the images as they are, is always there.")
    numbers = range(1, levels + 1)
    steps = [Level(name, number, SHIFTS[name].severity(number, levels)) for name in shifts for number in numbers]
    return [Level(NONE, 0, 0.0), *steps]


def run_study(study: Study, predict: Predict, on_level: Callable[[Level, bool], Any] = lambda level, new: None) -> dict:
    """Predicts and measures what is not there yet, then writes shift.csv, shift_cases.csv, shift.json and shift.html.

    Args:
        study: what is studied.
        predict: see ``Predict``.
        on_level: called after each level; whether it was done now or taken from an earlier run.

    Returns:
        The content of shift.json.

    Raises:
        UsageError: the folder holds another study.
        DataProblem: no case can be predicted and measured without a shift.
    """
    check_same_study(study.output, study.how)
    study.output.mkdir(parents=True, exist_ok=True)
    write_json(study.output / "study.json", study.how)
    records: dict[Level, dict[str, Any]] = {}
    cases, left_out = sorted(study.references), {}
    for level in study.levels:
        record = _finished(study, level, cases)
        new = record is None
        if record is None:
            record = _do(study, level, cases, predict)
        if level.shift == NONE:
            left_out = record["failed"]
            cases = [case for case in cases if case not in left_out]
            if not cases:
                raise DataProblem(numbered("No case could be predicted and measured:", [*left_out.values()]))
        records[level] = record
        on_level(level, new)
    content = summary(study, records, left_out)
    write_results(study, content, records, left_out)
    return content


def check_same_study(output: Path, how: Mapping[str, Any]) -> None:
    """Levels of two models never mix.

    Raises:
        UsageError: the folder holds a study of another model, seed, ... or one that cannot be read.
    """
    path = output / "study.json"
    if not path.exists():
        return
    try:
        earlier = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read, so that nothing can be continued. Choose another -o.") from error
    now = json.loads(json.dumps(how))
    for key in {**now, **earlier}:
        if earlier.get(key) != now.get(key):
            raise UsageError(
                f"{output} holds a study with {key} {earlier.get(key)}, now it is {now.get(key)}. "
                "Choose another -o; shifts and levels alone can be added."
            )


def _finished(study: Study, level: Level, cases: Sequence[str]) -> dict[str, Any] | None:
    """What an earlier run found of the same cases; None if it did not finish, or if a case failed and may not now."""
    try:
        record = json.loads((study.output / "levels" / f"{level.key}.json").read_text(encoding="utf-8"))
        same = record["cases"] == _stamps(study, cases) and record["severity"] == level.severity
        return dict(record) if same and not record["failed"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamps(study: Study, cases: Sequence[str]) -> dict[str, str]:
    return {case: study.stamps[case] for case in cases}


def _do(study: Study, level: Level, cases: Sequence[str], predict: Predict) -> dict[str, Any]:
    folder = study.output / "predictions" / level.key
    stamps = folder / "stamps.json"
    if not stamps.exists() or json.loads(stamps.read_text(encoding="utf-8")) != _stamps(study, cases):
        shutil.rmtree(folder, ignore_errors=True)  # of other images, or not ours
        folder.mkdir(parents=True)
        write_json(stamps, _stamps(study, cases))
    failed = predict(level, cases, folder)
    predicted = [
        Case(case, study.references[case], None if case in failed else folder / f"{case}{study.ending}")
        for case in cases
        if not (level.shift == NONE and case in failed)
    ]
    results = evaluate_all(predicted, study.settings, study.jobs, False) if predicted else []
    failed |= {result.name: result.failed for result in results if result.failed}
    record = {
        "shift": level.shift,
        "severity": level.severity,
        "cases": _stamps(study, cases),
        "failed": failed,
        "results": [result.as_json(study.modality_of[result.name]) for result in results],
    }
    record = plain(record)
    (study.output / "levels").mkdir(exist_ok=True)
    write_json(study.output / "levels" / f"{level.key}.json", record)
    if not study.keep and not failed:
        shutil.rmtree(folder, ignore_errors=True)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
    return record


# --- what it comes to ------------------------------------------------------------------------------------------------


def summary(study: Study, records: Mapping[Level, Mapping[str, Any]], left_out: Mapping[str, str]) -> dict[str, Any]:
    """The content of shift.json: ``rows`` (as shift.csv), ``lost_5_points``, ``failed``, ``left_out``, settings."""
    organs = [*study.settings.labels.organs]
    rows: list[dict[str, Any]] = []
    baseline: dict[tuple[str, str, str], dict[str, Any]] = {}
    for level, record in records.items():
        results = _results(record, left_out)
        for row in summarize(results, study.modality_of, {}, organs):
            place = (row["scope"], row["name"], row["organ"])
            start = baseline.setdefault(place, row)  # level 0 comes first
            change = {
                f"{metric}_change": _difference(row[f"{metric}_mean"], start[f"{metric}_mean"])
                for metric in ("dsc", "nsd")
            }
            head = {"shift": level.shift, "level": level.number, "severity": level.severity, "unit": level.unit}
            rows.append({**head, **{key: ({**row, **change})[key] for key in COLUMNS[4:]}})
    used = list(dict.fromkeys(level.shift for level in study.levels if level.shift != NONE))
    lost = []
    for name in used:
        for scope, scope_name, organ in baseline:
            curve = curve_of(rows, name, scope, scope_name, organ)
            lost.append(
                {
                    "shift": name,
                    "scope": scope,
                    "name": scope_name,
                    "organ": organ,
                    "dsc_unshifted": curve[0][1],
                    "dsc_strongest": curve[-1][1],
                    "strongest": curve[-1][0],
                    "severity": severity_at_loss(curve),
                    "unit": SHIFTS[name].unit,
                }
            )
    settings = study.settings
    return dict(
        plain(
            {
                "settings": {
                    **study.how,
                    "levels": max(level.number for level in study.levels),
                    "shifts": used,
                    "labels": settings.labels.organs,
                    "labels_source": settings.labels.source,
                },
                "definitions": {
                    "means": MEANS,
                    "change": CHANGE,
                    "surface": DEFINITIONS[settings.surface],
                    "shifts": {
                        name: {
                            key: getattr(SHIFTS[name], key) for key in ("what", "unit", "none", "strongest", "source")
                        }
                        for name in used
                    },
                },
                "versions": versions(),
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "cases": len(study.references) - len(left_out),
                "modalities": sorted({study.modality_of[case] for case in study.references if case not in left_out}),
                "left_out": dict(left_out),
                "without_reference": [*study.without_reference],
                "without_image": [*study.without_image],
                "failed": {
                    level.key: record["failed"]
                    for level, record in records.items()
                    if record["failed"] and level.shift != NONE
                },
                "lost_5_points": lost,
                "rows": rows,
            }
        )
    )


def _results(record: Mapping[str, Any], left_out: Mapping[str, str]) -> list[CaseResult]:
    return [case_result(each) for each in record["results"] if each["case"] not in left_out]


def _difference(value: float | None, start: float | None) -> float | None:
    return None if value is None or start is None else value - start


def write_results(
    study: Study,
    content: Mapping[str, Any],
    records: Mapping[Level, Mapping[str, Any]],
    left_out: Mapping[str, str],
) -> None:
    """shift.csv, shift_cases.csv, shift.html and, last, shift.json; all of them or none."""
    cases = [
        {
            "shift": level.shift,
            "level": level.number,
            "severity": level.severity,
            **each,
            "modality": study.modality_of[each["case"]],  # an earlier run may not have known it
            "organ": organ,
            **measures,
        }
        for level, record in records.items()
        for each in record["results"]
        if each["case"] not in left_out
        for organ, measures in each["organs"].items()
    ]
    with all_or_none(study.output) as folder:
        write_csv(folder / "shift.csv", COLUMNS, content["rows"])
        write_csv(folder / "shift_cases.csv", CASE_COLUMNS, cases)
        if study.report:
            first = next(case for case in sorted(study.references) if case not in left_out)
            write_report(folder / "shift.html", content, study.example(first))
        write_json(folder / "shift.json", content)
    if not study.report:
        (study.output / "shift.html").unlink(missing_ok=True)  # of an earlier run, which the new tables contradict
