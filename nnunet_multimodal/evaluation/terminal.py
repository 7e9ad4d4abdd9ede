"""What the terminal shows at the end: a small table, and all that was not measured as a user might expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_multimodal.conversion.dataset import LISTED, first_names
from nnunet_multimodal.evaluation.measures import FALSE_POSITIVE, MISSED, NOT_ANNOTATED
from nnunet_multimodal.evaluation.summary import ALL_CASES, ALL_ORGANS, find_row


def describe(content: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The table (organs down, modalities across, ``DSC/NSD``), and lines about problems.

    Args:
        content: what :func:`nnunet_multimodal.evaluation.evaluate_folders` returns.
    """
    rows, counts, settings = content["summary"], content["counts"], content["settings"]
    modalities = [("modality", m) for m in dict.fromkeys(row["name"] for row in rows if row["scope"] == "modality")]
    scopes = [*(m for m in modalities if len(modalities) > 1), *(("group", g) for g in settings["groups"])]
    scopes.append(("all", ALL_CASES))
    organs = [row["organ"] for row in rows if row["scope"] == "all"]
    tolerances = " or ".join(f"{value:g}" for value in sorted({*settings["tolerances_mm"].values()}))
    lines = [f"DSC/NSD, surface {settings['surface']}, tolerance {tolerances} mm; {counts['measured']} cases"]
    below = settings.get("below")
    table = [["", *(name for _, name in scopes), *([f"DSC < {below:g}"] if below else [])]]
    for organ in [*organs[1:], organs[0]]:
        cells = [find_row(rows, scope, name, organ) for scope, name in scopes]
        table.append([organ, *(f"{_number(row['dsc_mean'])}/{_number(row['nsd_mean'])}" for row in cells)])
        if below:
            table[-1].append(share_below(cells[-1]))
    lines += aligned(table)
    if counts[MISSED] or counts[FALSE_POSITIVE]:
        note = f"missed: {counts[MISSED]}; found where the reference has none: {counts[FALSE_POSITIVE]}"
        lines.append(f"{note} (DSC and NSD 0, no distances)")
    lines += describe_unannotated(content)
    if content.get("sides"):
        lines.append(f"left and right: {describe_sides(content['sides'])}")
    return "\n".join(line.rstrip() for line in lines), _problems(content)


def describe_comparison(content: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The table of several models (organs down; models, then differences across), and lines about their problems.

    Args:
        content: what :func:`nnunet_multimodal.evaluation.compare.evaluate_models` returns.
    """
    models, below = content["models"], content["settings"]["below"]
    first = next(iter(models.values()))["summary"]
    tests = [test for test in content["tests"] if (test["scope"], test["metric"]) == ("all", "dsc")]
    pairs = list(dict.fromkeys((test["a"], test["b"]) for test in tests))
    table = [["", *(f"{name} DSC/NSD" for name in models), *(f"{a} - {b}, p" for a, b in pairs)]]
    organs = [row["organ"] for row in first if row["scope"] == "all"]
    for organ in [*organs[1:], organs[0]]:
        rows = [find_row(each["summary"], organ=organ) for each in models.values()]
        cells = [
            f"{_number(row['dsc_mean'])}/{_number(row['nsd_mean'])}" + (f" {share_below(row)}" if below else "")
            for row in rows
        ]
        for a, b in pairs:
            test = next(t for t in tests if (t["organ"], t["a"], t["b"]) == (organ, a, b))
            p = test["p"] if organ == ALL_ORGANS else test["p_holm"]
            difference = "-" if test["difference"] is None else f"{test['difference']:+.3f}"
            cells.append(f"{difference} {probability(p)}")
        table.append([organ, *cells])
    lines = [f"{len(models)} models on the same cases; DSC differences, p by Wilcoxon, of organs after Holm"]
    if below:
        lines[0] += f"; cases with a DSC below {below:g}"
    problems = [f"{name}: {problem}" for name, each in models.items() for problem in _problems(each)]
    odd = [f"{name}: left and right: {describe_sides(each['sides'])}" for name, each in models.items() if each["sides"]]
    lines += [*aligned(table), *describe_unannotated(next(iter(models.values()))), *odd]
    return "\n".join(line.rstrip() for line in lines), problems


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in table]


def describe_unannotated(content: Mapping[str, Any]) -> list[str]:
    """``not annotated, in no mean: spleen in 2 cases``; nothing where all is."""
    rows = [row for row in content["summary"] if row["scope"] == "all" and row["organ"] != ALL_ORGANS]
    found = [(row["organ"], row[NOT_ANNOTATED]) for row in rows if row.get(NOT_ANNOTATED)]
    said = [f"{organ} in {count} case{'s' * (count > 1)}" for organ, count in found]
    return [f"not annotated, in no mean: {first_names(said)}"] if said else []


def probability(p: float | None) -> str:
    """``.032``, ``<.001``, ``1``; a dash for None."""
    if p is None:
        return "-"
    return "<.001" if p < 0.001 else "1" if p >= 0.9995 else f"{p:.3f}".lstrip("0")


def describe_sides(sides: Mapping[str, Sequence[str]]) -> str:
    """``exchanged in 2 cases (a, b); pieces in 1 case (c)``"""
    return "; ".join(
        f"{kind} in {len(cases)} case{'s' * (len(cases) > 1)} ({first_names([*cases])})"
        for kind, cases in sides.items()
    )


def share_below(row: Mapping[str, Any]) -> str:
    """``3 (12 %)`` of the cases."""
    return "-" if row["below_share"] is None else f"{row['below']} ({100 * row['below_share']:.0f} %)"


def _problems(content: Mapping[str, Any]) -> list[str]:
    lines = []
    if content["missing_predictions"]:
        names = first_names(content["missing_predictions"])
        lines.append(f"without a prediction, counted as missed ({len(content['missing_predictions'])}): {names}")
    if content["without_reference"]:
        names = first_names(content["without_reference"])
        lines.append(f"predictions without a reference ({len(content['without_reference'])}): {names}")
    failed: dict[bool, list[str]] = {True: [], False: []}
    for name, problem in content["failed"].items():
        failed[name in content["left_out"]].append(problem)
    for left_out, problems in failed.items():
        what = "failed, not in any mean" if left_out else "failed, counted as missed"
        lines += [f"{what}: {problem}" for problem in problems[:LISTED]]
        if len(problems) > LISTED:
            lines.append(f"{what}: {len(problems) - LISTED} more, in evaluation.json")
    if content["counts"]["resampled"]:
        lines.append(f"predictions that were resampled to their reference's grid: {content['counts']['resampled']}")
    for what, values in content["unknown_labels"].items():
        if values:
            lines.append(f"values in the {what}s that no label has, taken for background: {_tally(values)}")
    lines += content.get("notes", [])  # an evaluation.json of an earlier version has none
    if content["without_modality"]:
        lines.append(f"no modality is known of {first_names(content['without_modality'])}")
    return lines


def _tally(values: Mapping[str, Mapping[str, int]]) -> str:
    return first_names([f"{value} ({n['voxels']} voxels in {n['cases']} cases)" for value, n in values.items()])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
