"""Cross-validation in which every fold has its share of each modality and nobody is in both of its parts."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_multimodal.data.modality import ModalityTable
from nnunet_multimodal.errors import DataProblem

FILE_NAME = "splits_final.json"  # nnU-Net's, in nnUNet_preprocessed/DatasetXXX_Name

Split = Mapping[str, Sequence[str]]


def stratified_splits(
    cases: Iterable[str], table: ModalityTable, folds: int = 5, seed: int = 12345
) -> list[dict[str, list[str]]]:
    """Splits as nnU-Net's splits_final.json has them, stratified by modality and grouped by patient.

    As scikit-learn's StratifiedGroupKFold (patients are dealt out one by one, the largest first, each to the fold that
    has least of their modalities), but for any number of cases: where a modality has fewer than there are folds, the
    first folds get one each. Patients of one case each: a modality's counts in the validation parts differ by at most
    1. With more folds than modalities, a training part lacks a modality only where one patient has all of it.

    Args:
        cases: their names, in any order; each is in exactly one validation part.
        table: the modality of each, and the patient where known. A case without one is its own patient.
        folds: how many, at least 2; with fewer patients than that the last have an empty validation part.
        seed: of the order among equals.

    Returns:
        One ``{"train": [...], "val": [...]}`` of sorted names per fold.

    Raises:
        DataProblem: a case is not in the table.
    """
    if folds < 2:
        raise ValueError(f"cross-validation needs at least 2 folds, got {folds}")
    cases = sorted(set(cases))
    table.require(cases)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for case in cases:
        patient = table.case_patient.get(case)
        groups[("case", case) if patient is None else ("patient", patient)].append(case)
    dealt = _deal([*groups.values()], table, folds, np.random.default_rng(seed))
    return [{"train": [case for case in cases if case not in val], "val": sorted(val)} for val in dealt]


def _deal(groups: list[list[str]], table: ModalityTable, folds: int, rng: np.random.Generator) -> list[set[str]]:
    """The cases of each fold's validation part; groups are never parted."""
    own = [Counter(table.case_modality[case] for case in group) for group in groups]
    total = sum(own, Counter[str]())
    shuffled = rng.permutation(len(groups)).tolist()
    # The large ones first, while there is choice; among equals the rare modalities, which then lie in the first folds.
    order = sorted(shuffled, key=lambda index: (-len(groups[index]), min(total[name] for name in own[index])))
    counts = [Counter[str]() for _ in range(folds)]
    parts: list[set[str]] = [set() for _ in range(folds)]
    for index in order:

        def cost(fold: int, own: Counter[str] = own[index]) -> tuple[int, float, int, int]:
            there = counts[fold]
            taken_whole = sum(there[name] + count == total[name] for name, count in own.items())
            # The growth of the sum of squared shares, the part of it that differs between folds.
            growth = sum(there[name] * count / total[name] ** 2 for name, count in own.items())
            return taken_whole, round(growth, 12), there.total(), fold

        fold = min(range(folds), key=cost)
        counts[fold] += own[index]
        parts[fold].update(groups[index])

    def use(fold: int) -> tuple[int, int]:
        untrained = sum(count == total[name] for name, count in counts[fold].items())
        return untrained, -len(counts[fold])

    # Fold 0 is the one that everybody trains: a modality that lacks in training or validation lacks in the last ones.
    return [parts[fold] for fold in sorted(range(folds), key=use)]


def read_splits(path: Path) -> list[Split]:
    """nnU-Net's splits_final.json, which people edit by hand.

    Raises:
        DataProblem: it is no list of ``{"train": [...], "val": [...]}``.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also bytes that are no UTF-8
        raise DataProblem(
            f"{path} is not valid JSON: {error}. Correct or delete it; new splits are then made."
        ) from error
    sound = isinstance(content, list) and all(
        isinstance(split, dict)
        and all(isinstance(split.get(part), list) for part in ("train", "val"))
        and all(isinstance(case, str) for part in ("train", "val") for case in split[part])
        for split in content
    )
    if not sound:
        raise DataProblem(
            f'{path} has to be a list with one {{"train": [cases], "val": [cases]}} per fold. '
            "Correct it, or delete it for new splits."
        )
    return list(content)


def stale_cases(splits: Iterable[Split], present: Iterable[str]) -> tuple[list[str], list[str]]:
    """The cases that splits name but that are not ``present``, and those that are but are in no split."""
    named = {case for split in splits for part in ("train", "val") for case in split[part]}
    there = set(present)
    return sorted(named - there), sorted(there - named)


def training_counts(splits: Iterable[Split], table: ModalityTable, part: str = "train") -> list[dict[str, int]]:
    """How many cases of each modality each fold has in a part; cases that are not in the table count nowhere."""
    counts = []
    for split in splits:
        of_fold = Counter(table.case_modality.get(case, "") for case in split[part])
        counts.append({name: of_fold[name] for name in table.modalities})
    return counts


def folds_without(splits: Sequence[Split], table: ModalityTable) -> list[str]:
    """``fold 0 trains on 12 CT, 0 MR`` for every fold whose training part lacks a modality (faults.md 31)."""
    return [
        f"fold {fold} trains on " + ", ".join(f"{count} {name}" for name, count in counts.items())
        for fold, counts in enumerate(training_counts(splits, table))
        if not all(counts.values())
    ]


def advise(splits: Sequence[Split], table: ModalityTable) -> str:
    """What to do about folds that lack a modality: new splits only where those would be better."""
    cases = {case for split in splits for part in ("train", "val") for case in split[part]} & table.case_modality.keys()
    best = stratified_splits(cases, table, max(2, len(splits)))
    if len(folds_without(best, table)) < len(folds_without(splits, table)):
        return "Delete the file for splits by modality and patient; models trained before keep theirs."
    return "Other splits are no better: add patients of that modality, and train the other folds meanwhile."


def parted_patients(splits: Iterable[Split], table: ModalityTable) -> list[str]:
    """Patients with cases in both parts of a fold, whose validation therefore flatters."""
    parted: set[str] = set()
    for split in splits:
        train, val = ({table.case_patient.get(case) for case in split[part]} for part in ("train", "val"))
        parted.update(patient for patient in train & val if patient is not None)
    return sorted(parted)
