"""Whether two models differ on the same cases: Wilcoxon's signed-rank test, with Holm's correction over the organs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_multimodal.evaluation.cases import CaseResult
from nnunet_multimodal.evaluation.measures import Measures
from nnunet_multimodal.evaluation.summary import ALL_CASES, ALL_ORGANS

METRICS = ("dsc", "nsd")
FEWEST = 6  # of five pairs that differ, even five of one sign give p = .0625
ROUNDED = 9  # decimals; what differs by less is the same number computed otherwise
TEST = (
    "Wilcoxon's signed-rank test on the differences of the same case, two-sided; pairs that do not differ are left "
    f"out, and fewer than {FEWEST} that do are not tested. p of the organs is corrected by Holm's method over the "
    "organs of one pair of models, metric and group of cases; 'all organs' compares each case's mean over the organs "
    "that both models have a value for, and is not corrected. A missed organ counts 0."
)


@dataclass(frozen=True)
class Comparison:
    """One test.

    Attributes:
        pairs: cases in which both values are defined.
        unpaired: cases in which only one is (one model found what is not there, the other rightly did not).
        differing: pairs that differ.
        mean_a, mean_b, difference: of the pairs; ``difference`` is a minus b.
        p: two-sided; None where there was nothing to test.
        note: why there is no p, or why it is 1.
    """

    pairs: int
    unpaired: int
    differing: int
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    p: float | None
    note: str


def compare_values(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Tests paired values; NaN is undefined.

    Example:
        >>> first = [0.7, 0.8, 0.6, 0.9, 0.75, 0.65]
        >>> round(compare_values(first, [value - 0.01 * i for i, value in enumerate(first, 1)]).p, 5)
        0.03125
    """
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    both = np.isfinite(first) & np.isfinite(second)
    unpaired = int((np.isfinite(first) != np.isfinite(second)).sum())
    first, second = first[both], second[both]
    if not len(first):
        return Comparison(0, unpaired, 0, None, None, None, None, "no case in which both have a value")
    differences = np.round(first - second, ROUNDED)
    differing = differences[differences != 0]
    means = float(first.mean()), float(second.mean()), float(differences.mean())
    if not len(differing):
        return Comparison(len(first), unpaired, 0, *means, 1.0, "no pair differs")
    if len(differing) < FEWEST:
        note = f"too few pairs that differ ({len(differing)}; {FEWEST} are needed)"
        return Comparison(len(first), unpaired, len(differing), *means, None, note)
    from scipy.stats import wilcoxon

    p = float(wilcoxon(differing).pvalue)
    return Comparison(len(first), unpaired, len(differing), *means, p, "")


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction; None stays None and does not count.

    Example:
        >>> holm([0.01, None, 0.04, 0.03])
        [0.03, None, 0.06, 0.06]
    """
    tested = sorted((value, index) for index, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (value, index) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * value))
        corrected[index] = highest
    return corrected


def compare_models(
    results: Mapping[str, Sequence[CaseResult]], modality_of: Mapping[str, str], organs: Sequence[str]
) -> list[dict[str, Any]]:
    """Every pair of models, by metric, over all cases and in each modality.

    Args:
        results: model -> its cases; the same cases in the same order.
        modality_of: case -> modality.
        organs: names.

    Returns:
        Rows of ``scope`` (all, modality), ``name``, ``metric``, ``a``, ``b``, ``organ``, what ``Comparison`` has, and
        ``p_holm`` (of organs).
    """
    modalities = sorted({*modality_of.values()})
    scopes: list[tuple[str, str, Callable[[str], bool]]] = [("all", ALL_CASES, lambda case: True)]
    if len(modalities) > 1:
        scopes += [("modality", m, lambda case, m=m: modality_of[case] == m) for m in modalities]  # type: ignore[misc]
    rows = []
    for (scope, name, belongs), metric, (a, b) in itertools.product(
        scopes, METRICS, itertools.combinations(results, 2)
    ):
        pairs = [
            (first.organs, second.organs)
            for first, second in zip(results[a], results[b])
            if belongs(first.name) and first.organs and second.organs
        ]
        head = {"scope": scope, "name": name, "metric": metric, "a": a, "b": b}
        overall = compare_values(*_columns([_case_means(*pair, metric) for pair in pairs]))
        tests = [
            compare_values(*_columns([(getattr(x[organ], metric), getattr(y[organ], metric)) for x, y in pairs]))
            for organ in organs
        ]
        rows.append({**head, "organ": ALL_ORGANS, **vars(overall), "p_holm": None})
        for organ, test, corrected in zip(organs, tests, holm([test.p for test in tests])):
            rows.append({**head, "organ": organ, **vars(test), "p_holm": corrected})
    return rows


def _case_means(first: Mapping[str, Measures], second: Mapping[str, Measures], metric: str) -> tuple[float, float]:
    """Of one case, over the organs that both have a value for; NaN if there is none."""
    values = [(getattr(first[organ], metric), getattr(second[organ], metric)) for organ in first]
    both = [pair for pair in values if all(math.isfinite(value) for value in pair)]
    if not both:
        return math.nan, math.nan
    a, b = np.mean(both, axis=0)
    return float(a), float(b)


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]
