"""Folds never change, new cases go where there are fewest, patients stay together."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_multimodal.relabel.folds import assign_folds, splits_of


def case(number: int, fold: int | None = None, modality: str | None = "MR", patient: str | None = None) -> Any:
    return {"id": number, "fold": fold, "modality": modality, "patient": patient}


def test_new_cases_go_to_the_smallest_fold_of_their_modality() -> None:
    old = [case(1, 0, "CT"), case(2, 1, "CT"), case(3, 2, "MR"), case(4, 2, "MR"), case(5, 0, "MR")]
    # CT: 1, 1, 0 in the folds; MR: 1, 0, 2
    assert assign_folds([*old, case(9, None, "CT")], 3, 0) == {9: 2}
    assert assign_folds([*old, case(9, None, "MR")], 3, 0) == {9: 1}
    two = assign_folds([*old, case(8, None, "CT"), case(9, None, "CT")], 3, 0)
    assert sorted(two.values()) == [1, 2], "the second to the smaller of the two that are level"


def test_a_patients_cases_stay_together() -> None:
    old = [case(1, 3, patient="x"), case(2, 0)]
    assert assign_folds([*old, case(3, patient="x"), case(4, patient="x")], 5, 0) == {3: 3, 4: 3}
    together = assign_folds([case(1, patient="y"), case(2, patient="y"), case(3)], 5, 0)
    assert together[1] == together[2] != together[3]
    assert assign_folds([case(1, patient="z")], 5, 0, {"z": 4}) == {1: 4}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.sampled_from(["CT", "MR", None]), max_size=12), max_size=6), st.integers(0, 9))
def test_over_many_cycles(cycles: list[list[str | None]], seed: int) -> None:
    """Whatever comes in whichever cycle: known folds stay, and a modality's counts differ by at most one."""
    known: list[Any] = []
    for modalities in cycles:
        new = [case(len(known) + i, None, modality) for i, modality in enumerate(modalities)]
        before = {each["id"]: each["fold"] for each in known}
        given_folds = assign_folds([*known, *new], 5, seed)
        assert given_folds.keys() == {each["id"] for each in new}
        known += [{**each, "fold": given_folds[each["id"]]} for each in new]
        assert all(each["fold"] == before[each["id"]] for each in known if each["id"] in before)
        for modality in ("CT", "MR", None):
            counts = Counter(each["fold"] for each in known if each["modality"] == modality)
            sizes = [counts[fold] for fold in range(5)]
            assert max(sizes) - min(sizes) <= 1


def test_splits_are_nnunets() -> None:
    splits = splits_of({"b": 0, "a": 1, "c": 0}, 2)
    assert splits == [{"train": ["a"], "val": ["b", "c"]}, {"train": ["b", "c"], "val": ["a"]}]
