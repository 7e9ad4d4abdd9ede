"""Several models on the same references, side by side: means, tests and box plots; each evaluated as one alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_multimodal.conversion.dataset import first_names, write_json
from nnunet_multimodal.conversion.images import written_whole
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.evaluation.cases import CaseResult
from nnunet_multimodal.evaluation.evaluate import choose_labels, evaluate_folders
from nnunet_multimodal.evaluation.labels import Labels
from nnunet_multimodal.evaluation.measures import Measures
from nnunet_multimodal.evaluation.output import all_or_none, plain, write_csv
from nnunet_multimodal.evaluation.report import describe_tolerances, embed, environment
from nnunet_multimodal.evaluation.significance import METRICS, TEST, compare_models
from nnunet_multimodal.evaluation.summary import MEANS, find_row
from nnunet_multimodal.evaluation.terminal import describe_unannotated

COMPARISON_COLUMNS = ("scope", "name", "organ", "model", "cases", *(
    f"{metric}_{what}" for metric in ("dsc", "nsd", "hd95_mm", "asd_mm") for what in ("mean", "sd", "n")
), "missed", "false_positive", "not_annotated")  # fmt: skip
TEST_COLUMNS = (
    "scope", "name", "metric", "a", "b", "organ", "pairs", "unpaired", "differing", "mean_a", "mean_b", "difference",
    "p", "p_holm", "note",
)  # fmt: skip


def evaluate_models(
    predictions: Mapping[str, str | Path], reference: str | Path, output: str | Path, labels: Any = None, **options: Any
) -> dict[str, Any]:
    """Evaluates each model into ``output/MODEL``, and writes what compares them into ``output``.

    That is comparison.csv (the means), significance.csv (the tests), comparison.json (both) and comparison.html.

    Args:
        predictions: model -> folder of its predictions, two or more.
        reference: folder of the references.
        output: folder for the files.
        labels, options: as of ``evaluate_folders``.

    Returns:
        The content of comparison.json: ``settings``, ``definitions``, ``models`` (name -> what ``evaluate_folders``
        returns but its cases), ``tests``.

    Raises:
        UsageError: there are fewer than two models, a name is no folder name, or what is given are no folders.
        DataProblem, EnvironmentProblem: as ``evaluate_folders``.
    """
    reference, output = Path(reference), Path(output)
    folders = {name: Path(folder) for name, folder in predictions.items()}
    if len(folders) < 2:
        raise UsageError("a comparison needs two models or more.")
    for name, folder in folders.items():
        if not re.fullmatch(r"[\w][\w.+-]*", name):
            raise UsageError(f"a model's name must consist of letters, digits, '_', '-', '+' and '.', found {name!r}.")
        if folder.exists() and not (folder.is_dir() and reference.is_dir()):
            raise UsageError(f"{folder} and {reference}: models are compared folder by folder.")
    chosen = {
        name: choose_labels(folder, reference, labels) for name, folder in folders.items()
    }  # before hours of work
    first_name = next(iter(chosen))
    for name, each in chosen.items():
        if (each.organs, each.ignore) != (chosen[first_name].organs, chosen[first_name].ignore):
            raise UsageError(
                f"{first_name} has the labels {_describe(chosen[first_name])}, {name} {_describe(each)}. "
                "Say what holds for all: --label-names NAME=ID ... or --labels-json FILE."
            )
    contents = {
        name: evaluate_folders(folder, reference, output / name, chosen[name], **options)
        for name, folder in folders.items()
    }
    first = next(iter(contents.values()))
    modality_of = {case["case"]: case["modality"] for case in first["cases"]}
    results = {name: [case_result(case) for case in content["cases"]] for name, content in contents.items()}
    organs = [*first["settings"]["labels"]]
    shared = ("surface", "surface_definition", "tolerances_mm", "labels", "ignore", "case_labels", "groups", "below")
    content = plain(
        {
            "settings": {"reference": str(reference), **{key: first["settings"][key] for key in shared}},
            "definitions": {"means": MEANS, "test": TEST},
            "versions": first["versions"],
            "date": first["date"],
            "models": {
                name: {key: value for key, value in each.items() if key not in ("cases", "versions", "definitions")}
                for name, each in contents.items()
            },
            "tests": compare_models(results, modality_of, organs),
        }
    )
    with all_or_none(output) as folder:
        _write_tables(folder, content)
        if options.get("report", True):
            _write_report(folder / "comparison.html", content, results, modality_of)
        write_json(folder / "comparison.json", content)
    if not options.get("report", True):
        (output / "comparison.html").unlink(missing_ok=True)  # of an earlier run, which the new tables contradict
    return content


def _describe(labels: Labels) -> str:
    names = [
        f"{name}={ids if isinstance(ids, int) else ','.join(map(str, ids))}" for name, ids in labels.organs.items()
    ]
    return f"{first_names(names)} (from {labels.source})"


def case_result(case: Mapping[str, Any]) -> CaseResult:
    """A case as it was measured; what evaluation.json calls None is undefined again."""
    undefined: Any = float("nan")
    organs = {
        organ: Measures(**{key: undefined if value is None else value for key, value in measures.items()})
        for organ, measures in case["organs"].items()
    }
    return CaseResult(case["case"], case["reference"], case["prediction"], organs)


def _write_tables(folder: Path, content: Mapping[str, Any]) -> None:
    below = content["settings"]["below"] is not None
    rows = [
        {**row, "model": model}
        for index in range(len(next(iter(content["models"].values()))["summary"]))
        for model, each in content["models"].items()
        for row in [each["summary"][index]]
    ]
    write_csv(folder / "comparison.csv", (*COMPARISON_COLUMNS, *(("below", "below_share") if below else ())), rows)
    write_csv(folder / "significance.csv", TEST_COLUMNS, content["tests"])


def _write_report(
    path: Path,
    content: Mapping[str, Any],
    results: Mapping[str, Sequence[CaseResult]],
    modality_of: Mapping[str, str],
) -> None:
    models = content["models"]
    page = environment().get_template("comparison.html.jinja").render(
        content=content,
        scopes=[(row["scope"], row["name"]) for row in next(iter(models.values()))["summary"][:: _organs(content) + 1]],
        organs=[row["organ"] for row in next(iter(models.values()))["summary"][: _organs(content) + 1]],
        find_row=find_row,
        tests=_tests_by_place(content["tests"]),
        unannotated=describe_unannotated(next(iter(models.values()))),
        plots=_plots(content, results, modality_of),
        tolerances=describe_tolerances(content["settings"]["tolerances_mm"]),
    )  # fmt: skip
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _organs(content: Mapping[str, Any]) -> int:
    return len(content["settings"]["labels"])


def _tests_by_place(tests: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """(scope, name, metric) -> rows of the organs."""
    found: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for test in tests:
        found.setdefault((test["scope"], test["name"], test["metric"]), []).append(test)
    return found


def _plots(
    content: Mapping[str, Any], results: Mapping[str, Sequence[CaseResult]], modality_of: Mapping[str, str]
) -> list[dict[str, str]]:
    """Box plots of all models beside each other, one picture for each modality and metric."""
    from nnunet_multimodal.evaluation.pictures import box_plots

    organs = [*content["settings"]["labels"]]
    modalities = sorted({*modality_of.values()})
    plots = []
    for modality in modalities:
        for metric in METRICS:
            title = metric.upper() if len(modalities) == 1 else f"{metric.upper()}, {modality}"
            values = {
                organ: {
                    model: [
                        getattr(case.organs[organ], metric)
                        for case in cases
                        if case.organs
                        and modality_of[case.name] == modality
                        and getattr(case.organs[organ], metric) == getattr(case.organs[organ], metric)  # not NaN
                    ]
                    for model, cases in results.items()
                }
                for organ in organs
            }
            plots.append({"title": title, "picture": embed(box_plots(values, title))})
    return plots
