"""Cross-validation by modality and patient: properties over random data sets, and small cases by hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_multimodal.data.modality import ModalityTable
from nnunet_multimodal.data.splits import (
    advise,
    folds_without,
    parted_patients,
    read_splits,
    stratified_splits,
    training_counts,
)
from nnunet_multimodal.errors import DataProblem

MODALITIES = ("CT", "MR", "PET")

alone = st.lists(st.sampled_from(MODALITIES), max_size=60)
of_patients = st.lists(st.tuples(st.sampled_from(MODALITIES), st.integers(0, 12)), min_size=1, max_size=60)
folds_and_seed = {"folds": st.integers(2, 7), "seed": st.integers(0, 3)}


def make_table(modalities: list[str], patients: list[str | None] | None = None) -> ModalityTable:
    cases = [f"case_{index:02d}" for index in range(len(modalities))]
    people = {case: patient for case, patient in zip(cases, patients or []) if patient is not None}
    return ModalityTable(MODALITIES, dict(zip(cases, modalities)), people)


@given(modalities=alone, **folds_and_seed)
@settings(max_examples=60, deadline=None)
def test_every_case_is_validated_once_and_modalities_are_even(modalities: list[str], folds: int, seed: int) -> None:
    table = make_table(modalities)
    splits = stratified_splits(table.case_modality, table, folds, seed)
    assert len(splits) == folds
    assert Counter(case for split in splits for case in split["val"]) == Counter([*table.case_modality])
    for split in splits:
        assert not {*split["train"]} & {*split["val"]}
        assert {*split["train"]} | {*split["val"]} == {*table.case_modality}
        assert split["train"] == sorted(split["train"]) and split["val"] == sorted(split["val"])
    validated = training_counts(splits, table, "val")
    for name in MODALITIES:
        counts = [of_fold[name] for of_fold in validated]
        assert max(counts) - min(counts) <= 1


@given(rows=of_patients, **folds_and_seed)
@settings(max_examples=60, deadline=None)
def test_patients_are_never_parted(rows: list[tuple[str, int]], folds: int, seed: int) -> None:
    # Patient 0 stands for "unknown": such a case is its own patient.
    table = make_table([name for name, _ in rows], [str(patient) if patient else None for _, patient in rows])
    splits = stratified_splits(table.case_modality, table, folds, seed)
    assert Counter(case for split in splits for case in split["val"]) == Counter([*table.case_modality])
    assert parted_patients(splits, table) == []
    if folds <= len(MODALITIES):
        return
    owners: dict[str, set[str]] = {name: set() for name in MODALITIES}
    for case, name in table.case_modality.items():
        owners[name].add(table.case_patient.get(case, f"alone {case}"))
    for counts in training_counts(splits, table):
        for name, people in owners.items():
            assert counts[name] > 0 or len(people) < 2


@given(rows=of_patients, shuffle=st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_the_order_of_cases_and_table_does_not_matter(rows: list[tuple[str, int]], shuffle: random.Random) -> None:
    table = make_table([name for name, _ in rows], [str(patient) for _, patient in rows])
    cases = [*table.case_modality]
    shuffle.shuffle(cases)
    other = ModalityTable(
        MODALITIES,
        {case: table.case_modality[case] for case in cases},
        {case: table.case_patient[case] for case in reversed(cases)},
    )
    assert stratified_splits(cases, other) == stratified_splits(table.case_modality, table)


def test_seeds_differ() -> None:
    table = make_table(["CT"] * 10 + ["MR"] * 10)
    assert stratified_splits(table.case_modality, table) != stratified_splits(table.case_modality, table, seed=1)


def test_few_cases_of_a_modality_lie_in_the_first_folds(recwarn: pytest.WarningsRecorder) -> None:
    table = make_table(["CT"] * 2 + ["MR"] * 14)
    validated = training_counts(stratified_splits(table.case_modality, table), table, "val")
    assert [counts["CT"] for counts in validated] == [1, 1, 0, 0, 0]
    assert sorted(counts["MR"] for counts in validated) == [2, 3, 3, 3, 3]
    assert not recwarn.list


def test_fewer_cases_than_folds() -> None:
    table = make_table(["CT", "MR", "MR"])
    splits = stratified_splits(table.case_modality, table)
    assert [len(split["val"]) for split in splits] == [1, 1, 0, 0, 1]
    assert splits[4]["val"] == ["case_00"]  # without the only CT nothing can be trained, so not in the first folds


def test_a_patient_with_all_of_a_modality_leaves_the_last_fold_without() -> None:
    table = make_table(["CT", "CT"] + ["MR"] * 8, ["p", "p"] + [None] * 8)
    splits = stratified_splits(table.case_modality, table)
    assert [counts["CT"] for counts in training_counts(splits, table)] == [2, 2, 2, 2, 0]
    two = ModalityTable(("CT", "MR"), table.case_modality, table.case_patient)
    assert folds_without(splits, two) == [f"fold 4 trains on 0 CT, {8 - len(splits[4]['val']) + 2} MR"]
    assert "Other splits are no better" in advise(splits, two)


def test_bad_splits_are_told_from_unavoidable_ones() -> None:
    table = ModalityTable(("CT", "MR"), {case: "CT" if case < "e" else "MR" for case in "abcdefgh"})
    by_name = [{"train": [*"efgh"], "val": [*"abcd"]}, {"train": [*"abcd"], "val": [*"efgh"]}]
    assert folds_without(by_name, table) == ["fold 0 trains on 0 CT, 4 MR", "fold 1 trains on 4 CT, 0 MR"]
    assert advise(by_name, table).startswith("Delete the file")


def test_cases_without_a_modality_are_refused() -> None:
    with pytest.raises(DataProblem, match="1 cases are not in the modality table: x"):
        stratified_splits(["case_00", "x"], make_table(["CT"]))
    with pytest.raises(ValueError, match="at least 2 folds"):
        stratified_splits([], make_table([]), folds=1)


def test_parted_patients() -> None:
    table = make_table(["CT", "MR", "MR"], ["p", "p", "q"])
    splits = [{"train": ["case_00", "case_02"], "val": ["case_01"]}]
    assert parted_patients(splits, table) == ["p"]


def test_read_splits(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    good = [{"train": ["a"], "val": ["b"]}]
    path.write_text(json.dumps(good), encoding="utf-8")
    assert read_splits(path) == good
    for bad in ('[{"train": ["a"],}]', "\xff"):
        path.write_bytes(bad.encode("latin-1"))
        with pytest.raises(DataProblem, match=r"is not valid JSON.*delete it"):
            read_splits(path)
    for wrong in ({"train": []}, [{"train": ["a"]}], [["a"]], [{"train": "a", "val": []}], [{"train": [1], "val": []}]):
        path.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(DataProblem, match="has to be a list with one"):
            read_splits(path)
