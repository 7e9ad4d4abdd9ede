"""Which modality each case of a mixed data set is of (design.md, contract 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnunet_multimodal.errors import DataProblem

SECTION = "nnunet_multimodal"  # the key of dataset.json; never "modality", which nnU-Net reads
LISTED = 10  # names shown in a message
_OTHER_NAME = {"mri": "mr", "mr": "mri"}  # the two spellings of one thing that people mix up


@dataclass(frozen=True)
class ModalityTable:
    """The modality table of dataset.json.

    Attributes:
        modalities: their names in the fixed order in which training alternates, e.g. ("CT", "MR").
        case_modality: case -> modality.
        case_patient: case -> patient, where known: a patient's cases never part between training and validation.
    """

    modalities: tuple[str, ...]
    case_modality: Mapping[str, str]
    case_patient: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any], where: str = "dataset.json") -> ModalityTable:
        """Reads and checks the table.

        Raises:
            DataProblem: there is none, it is malformed, or a case's modality is not in ``modalities`` (faults.md 32).
        """
        section = dataset_json.get(SECTION, {})
        if not isinstance(section, Mapping) or "case_modality" not in section:
            raise DataProblem(
                f"{where} has no modality table, so nobody knows which case is CT and which MR. Add it: "
                "nnunet_multimodal convert table -d DATASET --pattern '(?P<modality>CT|MR)' (or --csv FILE)"
            )
        of_case, patients = section["case_modality"], section.get("case_patient", {})
        for key, found in (("case_modality", of_case), ("case_patient", patients)):
            if not (isinstance(found, Mapping) and all(isinstance(value, str) for value in found.values())):
                raise DataProblem(f'{where}: "{SECTION}": "{key}" has to be {{"case": "name", ...}}.')
        modalities = section.get("modalities") or sorted(set(of_case.values()))
        if not (isinstance(modalities, (list, tuple)) and all(isinstance(name, str) and name for name in modalities)):
            raise DataProblem(f'{where}: "modalities" has to be a list of names, found {modalities!r}.')
        if len(set(modalities)) != len(modalities):
            raise DataProblem(f'{where}: "modalities" names one twice: {", ".join(modalities)}.')
        table = cls(tuple(modalities), dict(of_case), dict(patients))
        unknown = sorted(case for case, modality in of_case.items() if modality not in table.modalities)
        if unknown:
            found = sorted({of_case[case] for case in unknown})
            close = difflib.get_close_matches(found[0], table.modalities, n=1, cutoff=0.5)
            raise DataProblem(
                f"{where}: {len(unknown)} cases have an unknown modality ({', '.join(found)}): {first_names(unknown)}. "
                f"Allowed: {', '.join(table.modalities)}." + (f" Did you mean {close[0]}?" if close else "")
            )
        return table

    def section(self) -> dict[str, Any]:
        """What goes under ``nnunet_multimodal`` of dataset.json."""
        content: dict[str, Any] = {"modalities": list(self.modalities), "case_modality": dict(self.case_modality)}
        return content | ({"case_patient": dict(self.case_patient)} if self.case_patient else {})

    def require(self, cases: Iterable[str], where: str = "dataset.json") -> None:
        """Every case has a modality.

        Raises:
            DataProblem: names the cases that have none.
        """
        missing = sorted(set(cases) - self.case_modality.keys())
        if missing:
            raise DataProblem(
                f"{where}: {len(missing)} cases are not in the modality table: {first_names(missing)}. Add them with "
                f"one of {', '.join(self.modalities)}: nnunet_multimodal convert table"
            )

    def index(self, case: str) -> int:
        """Position of the case's modality in ``modalities``."""
        return self.modalities.index(self.case_modality[case])

    def by_modality(self, cases: Iterable[str]) -> dict[str, list[str]]:
        """The cases of each modality, in the order of ``modalities``; a modality may be empty."""
        cases = list(cases)
        return {name: [case for case in cases if self.case_modality[case] == name] for name in self.modalities}


def known_spelling(name: str, known: Iterable[str]) -> str | None:
    """How ``known`` spells a modality: ``mr``, ``MRI`` -> ``MR``; None if it is none of them."""
    known = list(known)
    if name in known:
        return name
    folded = {each.casefold(): each for each in known}
    return folded.get(name.casefold()) or folded.get(_OTHER_NAME.get(name.casefold(), ""))


def has_table(dataset_json: Mapping[str, Any]) -> bool:
    """Whether dataset.json carries a modality table."""
    return "case_modality" in (dataset_json.get(SECTION) or {})


def first_names(cases: list[str]) -> str:
    """The first ten names, and how many more there are."""
    more = f" and {len(cases) - LISTED} more" if len(cases) > LISTED else ""
    return ", ".join(cases[:LISTED]) + more
