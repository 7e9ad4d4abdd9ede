"""Means and standard deviations for each modality, group of modalities and organ, and what did not enter them.

An organ's mean is taken over the cases in which the value is defined. The mean of *all organs* is the mean of the
organs' means: an organ that few patients have counts as much as one that all have. Cases are pooled: in a group and
overall, a modality counts by its number of cases. The standard deviation (n - 1) is over cases; for all organs, over
the cases' own means of their organs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nnunet_multimodal.evaluation.cases import CaseResult
from nnunet_multimodal.evaluation.measures import STATES, Measures

METRICS = ("dsc", "nsd", "hd95_mm", "asd_mm")
ALL_ORGANS = "all organs"
ALL_CASES = "all cases"
MEANS = (
    "An organ's mean is over the cases in which the value is defined. 'all organs' is the mean of the organs' means. "
    "In a group and in all cases, the cases of the modalities are pooled. The standard deviation (n - 1) is over "
    "cases; for 'all organs' it is over the cases' own means of their organs."
)


def summarize(
    results: Sequence[CaseResult],
    modality_of: Mapping[str, str],
    groups: Mapping[str, Sequence[str]],
    organs: Iterable[str],
    below: float | None = None,
) -> list[dict[str, Any]]:
    """One row for each scope (all cases, group, modality) and organ.

    Args:
        results: cases; those without any measure (their reference cannot be used) are left out, those whose
            prediction cannot be used are in it as missed.
        modality_of: case -> modality.
        groups: name -> modalities.
        organs: names, in the order of the rows.
        below: count the cases whose DSC is lower than this (for all organs: whose own mean is).

    Returns:
        Rows of ``scope`` (all, group, modality), ``name``, ``organ``, ``cases``, then mean, sd and n of each metric and
        the number of cases in each state; None where nothing is defined. With ``below``, also how many cases are below
        it and which share of those with a DSC that is, ``below`` and ``below_share``.
    """
    organs = [*organs]
    measured = [result for result in results if result.organs]
    modalities = sorted({modality_of[result.name] for result in measured})
    scopes: list[tuple[str, str, set[str]]] = [("all", ALL_CASES, set(modalities))]
    scopes += [("group", name, set(members)) for name, members in groups.items()]
    scopes += [("modality", name, {name}) for name in modalities]
    rows = []
    for scope, name, members in scopes:
        chosen = [result for result in measured if modality_of[result.name] in members]
        of_organs = [_row([result.organs[organ] for result in chosen], below) for organ in organs]
        for organ, row in zip([ALL_ORGANS, *organs], [_mean_row(chosen, of_organs, below), *of_organs]):
            rows.append({"scope": scope, "name": name, "organ": organ, **row})
    return rows


def find_row(
    rows: Sequence[dict[str, Any]], scope: str = "all", name: str = ALL_CASES, organ: str = ALL_ORGANS
) -> dict[str, Any]:
    """The row of a scope (all, group, modality), its name, and an organ."""
    return next(row for row in rows if (row["scope"], row["name"], row["organ"]) == (scope, name, organ))


def _row(measures: Sequence[Measures], below: float | None) -> dict[str, Any]:
    """One organ over its cases."""
    row: dict[str, Any] = {"cases": len(measures)}
    for metric in METRICS:
        values = _defined(getattr(m, metric) for m in measures)
        row |= {f"{metric}_mean": _mean(values), f"{metric}_sd": _sd(values), f"{metric}_n": len(values)}
    row |= {state: sum(m.status == state for m in measures) for state in STATES}
    return row | _below(_defined(m.dsc for m in measures), below)


def _mean_row(
    results: Sequence[CaseResult], of_organs: Sequence[dict[str, Any]], below: float | None
) -> dict[str, Any]:
    """All organs: the mean of means; n counts the values behind them."""
    row: dict[str, Any] = {"cases": len(results)}
    of_cases = {}
    for metric in METRICS:
        means = _defined(organ[f"{metric}_mean"] for organ in of_organs)
        of_cases[metric] = _defined(
            _mean(_defined(getattr(m, metric) for m in result.organs.values())) for result in results
        )
        row |= {
            f"{metric}_mean": _mean(means),
            f"{metric}_sd": _sd(of_cases[metric]),
            f"{metric}_n": sum(organ[f"{metric}_n"] for organ in of_organs),
        }
    row |= {state: sum(organ[state] for organ in of_organs) for state in STATES}
    return row | _below(of_cases["dsc"], below)


def _below(values: Sequence[float], limit: float | None) -> dict[str, Any]:
    """How many cases are below a limit, and their share; nothing where nobody asked."""
    if limit is None:
        return {}
    count = sum(value < limit for value in values)
    return {"below": count, "below_share": count / len(values) if values else None}


def _defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
