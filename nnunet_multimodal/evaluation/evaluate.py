"""A folder of predictions against a folder of references: every case, organ and modality, and what is missing."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
import multiprocessing
import os
import platform
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from nnunet_multimodal import __version__
from nnunet_multimodal.conversion.dataset import first_names, numbered, write_json
from nnunet_multimodal.errors import DataProblem, EnvironmentProblem, UsageError
from nnunet_multimodal.evaluation.annotated import Annotated, annotated_organs
from nnunet_multimodal.evaluation.cases import (
    DIAGONAL,
    Case,
    CaseResult,
    Settings,
    count_values,
    evaluate_case,
    pair_cases,
    read_reference,
)
from nnunet_multimodal.evaluation.labels import (
    Labels,
    check_agreement,
    labels_found,
    labels_from,
    labels_from_file,
    read_json,
    tolerances_for,
)
from nnunet_multimodal.evaluation.measures import STATES, Ids
from nnunet_multimodal.evaluation.modalities import UNKNOWN, Modalities, groups, told_by_case
from nnunet_multimodal.evaluation.output import all_or_none, plain, write_tables
from nnunet_multimodal.evaluation.summary import MEANS, METRICS, find_row, summarize
from nnunet_multimodal.evaluation.surfaces import DEFINITIONS


def evaluate_folders(
    prediction: str | Path,
    reference: str | Path,
    output: str | Path | None = None,
    labels: Mapping[str, Ids] | Labels | None = None,
    *,
    tolerance: float = 2.0,
    tolerances: Mapping[str, float] | None = None,
    surface: str = "border",
    case_labels: str | Path | Mapping[str, Sequence[str]] | None = None,
    modality_map: Mapping[str, str] | None = None,
    modality_pattern: str | None = None,
    in_distribution: Sequence[str] = (),
    distance_when_missed: float | str | None = None,
    resample_to_reference: bool = False,
    below: float | None = None,
    images: str | Path | None = None,
    report: bool = True,
    jobs: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure predictions, and write cases.csv, summary.csv, evaluation.json and report.html.

    Args:
        prediction, reference: two folders, walked recursively (a case is the relative path without suffix),
            or two files.
        output: folder for the files, each written whole or not at all; None writes none. That it can be written to is
            tried before anything is measured.
        labels: name -> id or ids (a region), with ``ignore`` if there is one. Default: dataset.json in ``prediction``,
            in ``reference`` or beside it, which must not contradict each other; else the ids found in the references.
        tolerance: of NSD in mm; ``tolerances`` has those of single organs.
        surface: ``border`` or ``area`` (:mod:`nnunet_multimodal.evaluation.surfaces`).
        case_labels: which organs each reference annotates, case -> organs, or a file that says so (a dataset.json with
            ``case_labels``, or a mapping); a case that is not named is annotated in full. What is not annotated is in
            no mean, and counted. Default: the references' dataset.json; ``"none"``: all are annotated in full.
        modality_map: case (or its file name) -> modality; comes before ``modality_pattern`` (a regular expression with
            a group ``modality``, searched in the case), and that before dataset.json's
            ``nnunet_multimodal.case_modality``.
        in_distribution: modalities that were seen in training.
        distance_when_missed: HD95 and ASD in mm of a missed organ, or ``diagonal``; None keeps it out of the means.
        resample_to_reference: bring predictions on another grid onto the reference's by nearest neighbour.
        below: count the cases whose DSC is lower than this.
        images: folder of images with the cases' names, for the report's pictures.
        report: whether to write report.html.
        jobs: processes. With more than one, a script needs ``if __name__ == "__main__":``.
        progress: whether to show a bar where the output is a terminal.

    Returns:
        The content of evaluation.json: ``settings``, ``counts``, ``mean`` (all cases, all organs), ``summary`` (rows of
        scope, name, organ), ``cases``, ``missing_predictions``, ``without_reference``, ``failed`` (case -> what is
        wrong; a prediction that cannot be used counts as an empty one), ``left_out`` (the failed cases that are in no
        mean: their reference cannot be used), ``sides`` (odd lefts and rights: ``kind`` -> the cases in which the
        prediction is odd and the reference is not), ``notes``. Undefined is None.

    Raises:
        UsageError: an argument does not fit, or dataset.json files contradict each other.
        DataProblem: the folders have no case in common, or no case could be measured.
        EnvironmentProblem: a process was killed, or nothing can be written to ``output``.
    """
    prediction, reference = Path(prediction), Path(reference)
    output = Path(output) if output is not None else None
    _check_arguments(surface, distance_when_missed, jobs, images, below)
    cases, without_reference = pair_cases(prediction, reference)
    if output is not None:
        check_output(output)
    jsons = dataset_jsons(prediction, reference)
    chosen = labels_of(labels, jsons, cases)
    names = [case.name for case in cases]
    modalities, notes = _modalities(modality_map or {}, modality_pattern, jsons, names, strict=bool(in_distribution))
    modality_of = {name: modalities.of(name) for name in names}
    grouped = groups(modality_of.values(), in_distribution)
    millimetres = tolerances_for(chosen, tolerance, tolerances or {})
    annotated = annotated_organs(case_labels, reference_jsons(prediction, reference), chosen, names)
    settings = Settings(
        chosen, millimetres, surface, distance_when_missed, resample_to_reference, annotated.unannotated
    )

    results = evaluate_all(cases, settings, jobs, progress)
    failed = {result.name: result.failed for result in results if result.failed}
    if all(result.failed for result in results if result.prediction is not None):
        raise DataProblem(numbered("No case could be measured:", [str(problem) for problem in failed.values()]))
    left_out = [result.name for result in results if not result.organs]
    rows = summarize(results, modality_of, grouped, chosen.organs, below)
    overall = find_row(rows)
    missing = [case.name for case in cases if case.prediction is None]
    content = plain(
        {
            "settings": {
                "prediction": str(prediction),
                "reference": str(reference),
                "surface": surface,
                "surface_definition": DEFINITIONS[surface],
                "tolerances_mm": settings.tolerances,
                "labels": chosen.organs,
                "ignore": chosen.ignore,
                "labels_source": chosen.source,
                "case_labels": annotated.source,
                "groups": grouped,
                "modality_pattern": modality_pattern,
                "distance_when_missed": distance_when_missed,
                "resample_to_reference": resample_to_reference,
                "below": below,
                "images": str(images) if images is not None else None,
            },
            "definitions": {"means": MEANS, "surface": DEFINITIONS[surface], "states": STATES},
            "versions": versions(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "counts": {
                "cases": len(cases),
                "measured": len(cases) - len(left_out),
                "missing_predictions": len(missing),
                "without_reference": len(without_reference),
                "failed": len(failed),
                "left_out": len(left_out),
                "resampled": sum(result.resampled is not None for result in results),
                **{state: overall[state] for state in STATES},
            },
            "mean": {metric: overall[f"{metric}_mean"] for metric in METRICS},
            "summary": rows,
            "missing_predictions": missing,
            "without_reference": without_reference,
            "failed": failed,
            "left_out": left_out,
            "sides": odd_sides(results),
            "notes": [*notes, *annotated.notes, *_strange(results, annotated)],
            "unknown_labels": {what: _total(results, what) for what in ("prediction", "reference")},
            "without_modality": [name for name, m in modality_of.items() if modalities and m == UNKNOWN],
            "cases": [result.as_json(modality_of[result.name]) for result in results],
        }
    )
    if output is not None:
        with all_or_none(output) as folder:
            write_tables(folder, results, modality_of, rows, settings, below)
            if report:
                from nnunet_multimodal.evaluation.report import write_report

                write_report(folder / "report.html", content, cases, settings, Path(images) if images else None)
            write_json(folder / "evaluation.json", content)
        if not report:
            (output / "report.html").unlink(missing_ok=True)  # of an earlier run, which the new tables contradict
    return content


def choose_labels(prediction: Path, reference: Path, labels: Mapping[str, Ids] | Labels | None = None) -> Labels:
    """The labels that ``evaluate_folders`` would measure; raises what it would about labels and folders."""
    cases, _ = pair_cases(prediction, reference)
    return labels_of(labels, dataset_jsons(prediction, reference), cases)


def _strange(results: Sequence[CaseResult], annotated: Annotated) -> list[str]:
    """A note on the references that hold what they should not have been searched for."""
    found = {
        result.name: [name for name in annotated.strange.get(result.name, ()) if result.organs[name].volume_ref_ml]
        for result in results
        if result.organs
    }
    said = [f"{case} ({', '.join(sorted(organs))})" for case, organs in found.items() if organs]
    return [f"references with organs that they do not annotate (not measured): {first_names(said)}"] if said else []


def odd_sides(results: Sequence[CaseResult]) -> dict[str, list[str]]:
    """What is odd about left and right -> the cases in which it is so in the prediction and not in the reference."""
    found: dict[str, list[str]] = {}
    for result in results:
        for kind in dict.fromkeys(each["kind"] for each in result.sides if not each["in_reference"]):
            found.setdefault(kind, []).append(result.name)
    return dict(sorted(found.items()))


def _check_arguments(
    surface: str, distance: float | str | None, jobs: int, images: str | Path | None, below: float | None
) -> None:
    if surface not in DEFINITIONS:
        raise UsageError(f"surface must be {' or '.join(DEFINITIONS)}, found {surface!r}.")
    if isinstance(distance, str) and distance != DIAGONAL:
        raise UsageError(f"distance_when_missed must be millimetres or '{DIAGONAL}', found {distance!r}.")
    if isinstance(distance, (int, float)) and not 0 <= distance < float("inf"):
        raise UsageError(f"distance_when_missed must be 0 mm or more, found {distance:g}.")
    if below is not None and not 0 < below <= 1:
        raise UsageError(f"below is a DSC above 0, at most 1; found {below:g}.")
    if jobs < 1:
        raise UsageError(f"jobs counts processes and must be at least 1, found {jobs}.")
    if images is not None and not Path(images).exists():
        raise UsageError(f"No such folder of images: {images}")


def check_output(output: Path) -> None:
    """The results can be written. It is tried (and undone): permissions alone do not say it of every file system."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            output.lstat()  # a name that is too long
        nearest = next(path for path in (output, *output.parents) if os.path.lexists(path))
        if not nearest.is_dir():
            where = "" if nearest == output else f" and cannot hold {output}"
            raise UsageError(f"{nearest} is no folder{where}; the results need a folder.")
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise EnvironmentProblem(f"Cannot write to {output}: {error.strerror}. Choose another folder (-o).") from error


# --- labels and modalities -------------------------------------------------------------------------------------------


def dataset_jsons(prediction: Path, reference: Path) -> list[Path]:
    """The dataset.json files in or beside the two, in the order in which they are asked; read only when they are."""
    folders = [path if path.is_dir() else path.parent for path in (prediction, reference)]
    paths = [folder / "dataset.json" for folder in (*folders, folders[1].resolve().parent)]
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def reference_jsons(prediction: Path, reference: Path) -> list[Path]:
    """The same, those of the references first."""
    return [*dict.fromkeys([*dataset_jsons(reference, reference), *dataset_jsons(prediction, reference)])]


def labels_of(given: Mapping[str, Ids] | Labels | None, jsons: Sequence[Path], cases: Sequence[Case]) -> Labels:
    if isinstance(given, Labels):
        return given
    if given is not None:
        return labels_from(given, "the arguments")
    declared = [labels_from_file(path) for path in jsons if "labels" in read_json(path)]
    for first, second in itertools.combinations(declared, 2):
        check_agreement(first, second)
    return declared[0] if declared else _labels_of(cases)


def _labels_of(cases: Sequence[Case]) -> Labels:
    """The ids found in the references. What cannot be read is said again, and counted, when it is measured."""
    found: set[int] = set()
    problems = []
    for case in cases:
        try:
            found |= {*count_values(read_reference(case).data)[0]}
        except (DataProblem, OSError) as problem:
            problems.append(str(problem))
    found = {value for value in found if value > 0}
    if not found and problems:
        raise DataProblem(numbered("No label was found in the references:", problems))
    return labels_found(found)


def _modalities(
    told: Mapping[str, str], pattern: str | None, jsons: Sequence[Path], cases: Sequence[str], strict: bool
) -> tuple[Modalities, list[str]]:
    """How to tell the modalities, and notes on what was of no use.

    dataset.json is asked only about cases of which the user has said nothing; one that cannot be read ends the run only
    if the modalities are needed (``strict``).
    """
    told, unused = told_by_case(told, cases)
    notes = [f"keys of --modality-map that are no case ({len(unused)}): {first_names(unused)}"] if unused else []
    modalities = Modalities(told, pattern)
    if all(modalities.of(case) != UNKNOWN for case in cases):
        return modalities, notes
    try:
        return Modalities(told, pattern, modality_table(jsons)), notes
    except UsageError as error:
        if strict:
            raise
        return modalities, [*notes, f"no modalities are taken from dataset.json: {error}"]


def modality_table(jsons: Sequence[Path]) -> dict[str, str]:
    for path in jsons:
        ours = read_json(path).get("nnunet_multimodal")
        table = ours.get("case_modality") if isinstance(ours, dict) else None
        if table is None:
            continue
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise UsageError(f"nnunet_multimodal.case_modality in {path} must map cases to modalities.")
        return table
    return {}


# --- the cases -------------------------------------------------------------------------------------------------------


def evaluate_all(cases: Sequence[Case], settings: Settings, jobs: int, progress: bool) -> list[CaseResult]:
    from tqdm import tqdm

    jobs = min(jobs, len(cases))
    with tqdm(total=len(cases), desc="measuring", unit="case", disable=None if progress else True) as bar:
        if jobs == 1:
            results = []
            for case in cases:
                results.append(evaluate_case(case, settings))
                bar.update()
            return results
        # spawn: the caller may have started threads (torch), which a forked process does not survive
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_ignore_interrupt)
        try:
            with _interrupts_held_back():
                places = {pool.submit(evaluate_case, case, settings): index for index, case in enumerate(cases)}
            done: dict[int, CaseResult] = {}
            for future in as_completed(places):
                done[places[future]] = future.result()
                bar.update()
            return [done[index] for index in range(len(cases))]
        except BrokenProcessPool as error:
            raise EnvironmentProblem(
                "A measuring process was killed, most likely because memory ran out. Use fewer processes: -j 1."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started here never see Ctrl-C, not even while they import: it is for us, and comes when we are done.

    Else each of them prints a traceback. Windows cannot hold signals back.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_interrupt() -> None:
    """The same from the first case on, for Windows too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _total(results: Sequence[CaseResult], what: str) -> dict[str, dict[str, int]]:
    """Undeclared values: in how many cases, and how many voxels in all."""
    total: dict[str, dict[str, int]] = {}
    for result in results:
        for value, voxels in result.unknown.get(what, {}).items():
            entry = total.setdefault(value, {"cases": 0, "voxels": 0})
            entry["cases"] += 1
            entry["voxels"] += voxels
    return dict(sorted(total.items(), key=lambda pair: int(pair[0])))


def versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "nibabel", "monai")}
    return {"nnunet_multimodal": __version__, "python": platform.python_version(), **packages}
