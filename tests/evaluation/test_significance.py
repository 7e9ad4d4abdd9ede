"""Paired tests: against all signs by brute force, published numbers, and where there is nothing to test."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import rankdata

from nnunet_multimodal.evaluation.cases import CaseResult
from nnunet_multimodal.evaluation.measures import Measures
from nnunet_multimodal.evaluation.significance import compare_models, compare_values, holm

NAN = math.nan


def brute_force(differences: np.ndarray) -> float:
    """Two-sided p: the share of all 2^n signs whose sum of positive ranks is at least as far from its mean."""
    ranks = rankdata(np.abs(differences))
    middle = ranks.sum() / 2
    observed = abs(ranks[differences > 0].sum() - middle)
    sums = [
        sum(rank for rank, sign in zip(ranks, signs) if sign) for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    return float(np.mean([abs(total - middle) >= observed - 1e-9 for total in sums]))


@pytest.mark.parametrize("seed", range(5))
def test_p_is_that_of_all_signs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a = rng.uniform(0.5, 1, 10)
    b = a - rng.normal(0.02, 0.04, 10)
    found = compare_values(a, b)
    assert found.p == pytest.approx(brute_force(a - b), abs=1e-12)
    assert (found.pairs, found.differing, found.unpaired) == (10, 10, 0)
    assert found.difference == pytest.approx(found.mean_a - found.mean_b)


def test_a_published_example() -> None:
    """Darwin's maize plants (Wilcoxon's test in scipy's documentation): T = 24, p = 0.0413."""
    d = [6, 8, 14, 16, 23, 24, 28, 29, 41, -48, 49, 56, 60, -67, 75]
    assert compare_values(d, [0.0] * 15).p == pytest.approx(0.041259765625)


def test_equal_pairs_are_left_out() -> None:
    a = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    b = a - [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 1e-12]  # the last is rounding
    found = compare_values(a, b)
    assert (found.pairs, found.differing) == (8, 6) and found.p == pytest.approx(2 / 2**6)


@pytest.mark.parametrize(
    ("a", "b", "p", "note", "pairs", "unpaired"),
    [
        ([0.5] * 7, [0.5] * 7, 1.0, "no pair differs", 7, 0),
        ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], None, "too few pairs that differ (3; 6 are needed)", 3, 0),
        ([0.5] * 9, [0.5] * 4 + [0.4] * 5, None, "too few pairs that differ (5; 6 are needed)", 9, 0),
        ([], [], None, "no case in which both have a value", 0, 0),
        ([NAN, 0.5], [0.0, NAN], None, "no case in which both have a value", 0, 2),
        ([NAN, NAN, 0.5], [NAN, 0.0, 0.5], 1.0, "no pair differs", 1, 1),
    ],
)
def test_nothing_to_test(a: list, b: list, p: float | None, note: str, pairs: int, unpaired: int) -> None:
    found = compare_values(a, b)
    assert (found.p, found.note, found.pairs, found.unpaired) == (p, note, pairs, unpaired)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0] and holm([]) == [] and holm([None]) == [None]


def measures(dsc: float, status: str = "ok") -> Measures:
    return Measures(dsc, dsc, 1.0, 1.0, 1.0, 1.0, status)


def results(values: dict[str, list[float]]) -> list[CaseResult]:
    """Cases c0, c1, ... with these DSC of each organ."""
    count = len(next(iter(values.values())))
    return [
        CaseResult(f"c{i}", "r", "p", {organ: measures(of[i]) for organ, of in values.items()}) for i in range(count)
    ]


def test_pairs_of_models_organs_and_modalities() -> None:
    high, low = [0.9] * 12, [0.9 - 0.01 * i for i in range(1, 13)]
    models = {
        "a": results({"liver": high, "spleen": high}),
        "b": results({"liver": low, "spleen": high}),
        "c": results({"liver": high, "spleen": [NAN, *high[1:]]}),
    }
    modality_of = {f"c{i}": ("CT", "MR")[i % 2] for i in range(12)}
    rows = compare_models(models, modality_of, ["liver", "spleen"])
    assert len(rows) == 3 * 2 * 3 * 3, "scopes, metrics, pairs of models, organs and all of them"

    def row(organ: str, a: str, b: str, scope: str = "all cases") -> dict:
        return next(
            r for r in rows if (r["organ"], r["a"], r["b"], r["name"], r["metric"]) == (organ, a, b, scope, "dsc")
        )

    liver = row("liver", "a", "b")
    assert liver["p"] == pytest.approx(2 / 2**12) and liver["p_holm"] == pytest.approx(4 / 2**12)
    assert liver["difference"] == pytest.approx(0.065)
    assert row("spleen", "a", "b")["p"] == 1 and row("spleen", "a", "b")["note"] == "no pair differs"
    overall = row("all organs", "a", "b")
    assert overall["difference"] == pytest.approx(0.0325) and overall["p_holm"] is None
    assert row("liver", "a", "b", "CT")["pairs"] == 6 and row("liver", "a", "b", "CT")["p"] == pytest.approx(2 / 2**6)
    assert row("spleen", "a", "c")["unpaired"] == 1
    assert row("all organs", "a", "c")["pairs"] == 12, "the case counts by the organ that both have"


def test_a_case_that_could_not_be_measured_is_no_pair() -> None:
    first = results({"liver": [0.9, 0.8]})
    second = [first[0], CaseResult("c1", "r", None)]
    (overall, _) = [r for r in compare_models({"a": first, "b": second}, dict.fromkeys(("c0", "c1"), "-"), ["liver"])][
        :2
    ]
    assert overall["pairs"] == 1
