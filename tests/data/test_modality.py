"""The modality table of dataset.json: what is read, what is refused, what is written."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nnunet_multimodal.data.modality import SECTION, ModalityTable, has_table
from nnunet_multimodal.errors import DataProblem


def dataset_json(**changes: Any) -> dict[str, Any]:
    section = {"modalities": ["CT", "MR"], "case_modality": {"a": "MR", "b": "CT", "c": "MR"}, **changes}
    return {"labels": {"background": 0}, SECTION: section}


def test_reads_what_it_writes() -> None:
    table = ModalityTable(("MR", "CT"), {"b": "CT", "a": "MR"}, {"a": "p1"})
    assert table.section() == {
        "modalities": ["MR", "CT"],
        "case_modality": {"b": "CT", "a": "MR"},
        "case_patient": {"a": "p1"},
    }
    assert ModalityTable.from_dataset_json({SECTION: table.section()}) == table
    assert "case_patient" not in ModalityTable(("MR",), {"a": "MR"}).section()


def test_the_order_of_modalities_is_the_files() -> None:
    table = ModalityTable.from_dataset_json(dataset_json(modalities=["MR", "CT"]))
    assert table.modalities == ("MR", "CT")
    assert [table.index(case) for case in "abc"] == [0, 1, 0]
    assert table.by_modality(["c", "a"]) == {"MR": ["c", "a"], "CT": []}


def test_without_a_list_modalities_are_those_found() -> None:
    assert ModalityTable.from_dataset_json(dataset_json(modalities=None)).modalities == ("CT", "MR")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"d\.json has no modality table.*convert table -d DATASET"),
        ({SECTION: {"layout": "plain"}}, r"no modality table"),
        ({SECTION: ["CT"]}, r"no modality table"),
        (dataset_json(case_modality=["a"]), r'"case_modality" has to be \{"case": "name"'),
        (dataset_json(case_modality={"a": 1}), r'"case_modality" has to be'),
        (dataset_json(case_patient={"a": 7}), r'"case_patient" has to be'),
        (dataset_json(modalities="CT"), r'"modalities" has to be a list of names, found \'CT\''),
        (dataset_json(modalities=["CT", ""]), r'"modalities" has to be a list of names'),
        (dataset_json(modalities=["CT", "MR", "CT"]), r"names one twice"),
        (
            dataset_json(case_modality={"a": "PET", "b": "CT", "c": "PET"}),
            r"2 cases have an unknown modality \(PET\): a, c\. Allowed: CT, MR\.",
        ),
        (dataset_json(case_modality={"a": "MRI", "b": "CT"}), r"Did you mean MR\?"),
    ],
)
def test_bad_tables(content: dict[str, Any], message: str) -> None:
    with pytest.raises(DataProblem) as caught:
        ModalityTable.from_dataset_json(content, "d.json")
    assert re.search(message, str(caught.value)), caught.value


def test_a_case_that_is_missing_is_named() -> None:
    table = ModalityTable.from_dataset_json(dataset_json())
    table.require(["a", "b"])
    with pytest.raises(DataProblem, match=r"2 cases are not in the modality table: x, y\. .* CT, MR"):
        table.require(["y", "a", "x"])
    many = [f"n{index:02d}" for index in range(12)]
    with pytest.raises(DataProblem, match=r"12 cases .*n09 and 2 more"):
        table.require(many)


def test_has_table() -> None:
    assert has_table(dataset_json())
    assert not has_table({}) and not has_table({SECTION: None}) and not has_table({SECTION: {"layout": "plain"}})
