"""Which classes each case's data set annotates (``"case_labels"`` beside the modality table of dataset.json).

    "nnunet_multimodal": {"case_labels": {"case_001": ["liver", "spleen"], ...}}

A case that is not listed is annotated in full. A class that is not listed for a case may be there or not: its voxels
carry the label 0 in this case's file, which then means "background, or one of the classes that nobody looked for".
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_multimodal.data.modality import SECTION, first_names
from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.text.names import BACKGROUND, output_names

KEY = "case_labels"


@dataclass(frozen=True)
class CaseLabels:
    """The classes that are annotated, case by case.

    Attributes:
        outputs: the network's output channels by name, background first where the labels are no regions.
        of_case: case -> its annotated classes; others are annotated in full.
    """

    outputs: tuple[str, ...]
    of_case: Mapping[str, frozenset[str]]

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any], where: str = "dataset.json") -> CaseLabels:
        """Reads and checks the key.

        Raises:
            DataProblem: it is malformed, a class is none of the data set's, or a case has no class at all.
        """
        section = dataset_json.get(SECTION)
        written = section.get(KEY, {}) if isinstance(section, Mapping) else {}
        return cls.from_table(written, output_names(dataset_json["labels"], where), f'{where}: "{SECTION}": "{KEY}"')

    @classmethod
    def from_table(cls, written: Any, outputs: tuple[str, ...], key: str) -> CaseLabels:
        """The same from ``{"case": ["class", ...], ...}`` alone.

        Args:
            written: what is under the key.
            outputs: as the attribute.
            key: where it is written, for messages.
        """
        if not isinstance(written, Mapping):
            raise DataProblem(f'{key} has to be {{"case": ["class", ...], ...}}, found {written!r}.')
        classes = [name for name in outputs if name != BACKGROUND]
        of_case: dict[str, frozenset[str]] = {}
        for case, names in written.items():
            if not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
                raise DataProblem(f"{key} has to list the classes of {case}, found {names!r}.")
            wrong = [name for name in names if name not in classes and name != BACKGROUND]
            if wrong:
                close = difflib.get_close_matches(wrong[0], classes, n=1)
                raise DataProblem(
                    f"{key} names {wrong[0]!r} for {case}, which is no class of the data set"
                    + (f"; did you mean {close[0]!r}?" if close else ".")
                    + f" Its classes: {', '.join(classes)}."
                )
            of_case[str(case)] = frozenset(names) - {BACKGROUND}
            if not of_case[str(case)]:
                raise DataProblem(
                    f"{key} names no class for {case}: nothing is annotated there, so there is nothing to learn or to "
                    "measure. List its classes, or take the case out."
                )
        return cls(outputs, of_case)

    @property
    def partial(self) -> bool:
        """Whether a case lacks a class."""
        return any(not all(self.annotated(case)) for case in self.of_case)

    def require_known(self, cases: Collection[str], where: str = "dataset.json") -> None:
        """Every case that is listed exists.

        Raises:
            DataProblem: names those that do not.
        """
        unknown = sorted(self.of_case.keys() - set(cases))
        if unknown:
            close = difflib.get_close_matches(unknown[0], cases, n=1)
            raise DataProblem(
                f'{where}: "{KEY}" names {len(unknown)} cases that are not in the data set: {first_names(unknown)}.'
                + (f" Did you mean {close[0]}?" if close else "")
            )

    def annotated(self, case: str) -> list[bool]:
        """For each output channel whether the case's label says where the class is; background always does."""
        names = self.of_case.get(case)
        return [names is None or name == BACKGROUND or name in names for name in self.outputs]

    def mask(self, cases: Iterable[str]) -> np.ndarray:
        """bool [cases, outputs]."""
        return np.array([self.annotated(case) for case in cases], dtype=bool)

    def unannotated(self, case: str) -> list[str]:
        """The classes that nobody looked for in a case."""
        return [name for name, there in zip(self.outputs, self.annotated(case)) if not there]

    def count(self, cases: Sequence[str]) -> dict[str, int]:
        """Class -> in how many of these cases it is annotated."""
        counts = self.mask(cases).sum(0) if cases else np.zeros(len(self.outputs), dtype=int)
        return {name: int(count) for name, count in zip(self.outputs, counts) if name != BACKGROUND}


def has_case_labels(dataset_json: Mapping[str, Any]) -> bool:
    """Whether dataset.json says which classes are annotated in which case."""
    section = dataset_json.get(SECTION)
    return isinstance(section, Mapping) and bool(section.get(KEY))
