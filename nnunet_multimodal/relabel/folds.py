"""Folds that stay: a case that was once validated by a fold is never trained on by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_multimodal.relabel.ledger import Row


def assign_folds(
    cases: Sequence[Row], folds: int, seed: int, patients: Mapping[str, int] | None = None
) -> dict[int, int]:
    """A fold for each case that has none yet.

    New cases go, one after the other in random order, to the fold with fewest cases of their modality (then fewest in
    all, then the first); to their patient's fold, if one of the patient's cases has one.

    Args:
        cases: all that are to be trained on, old and new.
        folds: how many there are.
        seed: of the order.
        patients: patient -> fold, from cases that are not trained on at present.

    Returns:
        case id -> fold, of the new ones only.

    Example:
        >>> old = {"id": 1, "fold": 0, "modality": "CT", "patient": None}
        >>> new = {"id": 2, "fold": None, "modality": "CT", "patient": None}
        >>> assign_folds([old, new], folds=2, seed=0)
        {2: 1}
    """
    count: Counter[tuple[int, str | None]] = Counter()
    total: Counter[int] = Counter()
    of_patient = dict(patients or {})

    def enter(case: Row, fold: int) -> None:
        count[fold, case["modality"]] += 1
        total[fold] += 1
        if case["patient"] is not None:
            of_patient[case["patient"]] = fold

    for case in cases:
        if case["fold"] is not None:
            enter(case, case["fold"])
    new = sorted((case for case in cases if case["fold"] is None), key=lambda case: case["id"])
    given: dict[int, int] = {}
    for index in np.random.default_rng(seed).permutation(len(new)):
        case = new[index]

        def crowd(fold: int, modality: str | None = case["modality"]) -> tuple[int, int, int]:
            return count[fold, modality], total[fold], fold

        fold = of_patient.get(case["patient"]) if case["patient"] is not None else None
        if fold is None:
            fold = min(range(folds), key=crowd)
        given[case["id"]] = fold
        enter(case, fold)
    return given


def splits_of(folds_of: Mapping[str, int], folds: int) -> list[dict[str, list[str]]]:
    """nnU-Net's splits_final.json: each fold validates its own cases and trains on all others."""
    names = sorted(folds_of)
    return [
        {"train": [n for n in names if folds_of[n] != fold], "val": [n for n in names if folds_of[n] == fold]}
        for fold in range(folds)
    ]
