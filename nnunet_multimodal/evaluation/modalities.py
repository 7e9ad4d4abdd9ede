"""Which modality a case is of, and which modalities were seen in training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_multimodal.conversion.dataset import first_names
from nnunet_multimodal.conversion.images import split_suffix
from nnunet_multimodal.errors import UsageError

UNKNOWN = "-"
IN_DISTRIBUTION, OUT_OF_DISTRIBUTION = "in-distribution", "out-of-distribution"


@dataclass(frozen=True)
class Modalities:
    """How to tell a case's modality; what the user says comes before what dataset.json says.

    Attributes:
        told: case -> modality, from ``--modality-map``.
        pattern: searched in the case's relative path; its group ``modality`` is the answer.
        table: case -> modality, from ``nnunet_multimodal.case_modality`` of dataset.json (design.md, contract 1).
    """

    told: Mapping[str, str] = field(default_factory=dict)
    pattern: str | None = None
    table: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pattern is None:
            return
        try:
            groups = re.compile(self.pattern).groupindex
        except re.error as error:
            raise UsageError(f"--modality-pattern {self.pattern!r} is no regular expression: {error}.") from error
        if "modality" not in groups:
            raise UsageError(
                f"--modality-pattern {self.pattern!r} has no group named modality; for example '(?P<modality>[^/]+)/'."
            )

    def __bool__(self) -> bool:
        return bool(self.told or self.pattern or self.table)

    def of(self, case: str) -> str:
        """The modality of a case (``folder/name``), or ``-``."""
        for source in (self.told, self.table):
            if source is self.table and self.pattern is not None:
                match = re.search(self.pattern, case)
                if match and match["modality"]:
                    return str(match["modality"])
            for name in (case, case.rsplit("/", 1)[-1]):
                if name in source:
                    return str(source[name])
        return UNKNOWN


def told_by_case(told: Mapping[str, str], cases: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What ``--modality-map`` says, its keys without .nii.gz, and the keys that are no case's.

    Args:
        told: case or file name -> modality.
        cases: ``folder/name``; a key may be the name alone.

    Raises:
        UsageError: no key is a case, or two keys say different things of one case.
    """
    known = {name for case in cases for name in (case, case.rsplit("/", 1)[-1])}
    by_case: dict[str, str] = {}
    unused = []
    for key, modality in told.items():
        path = Path(key)
        name = (path.parent / split_suffix(path)[0]).as_posix()
        if by_case.setdefault(name, modality) != modality:
            raise UsageError(f"--modality-map has two modalities for {name}: {by_case[name]} and {modality}.")
        if name not in known:
            unused.append(key)
    if told and len(unused) == len(told):
        raise UsageError(
            f"--modality-map has no case of these: its keys are {first_names(unused)}, "
            f"the cases {first_names([*cases])}."
        )
    return by_case, unused


def groups(found: Iterable[str], in_distribution: Sequence[str]) -> dict[str, list[str]]:
    """The modalities that were seen in training and those that were not; empty if nobody said which.

    Raises:
        UsageError: a modality is named that no case has.
    """
    if not in_distribution:
        return {}
    present = list(dict.fromkeys(found))
    unknown = [name for name in in_distribution if name not in present]
    if unknown:
        hint = (
            " Say which they are: --modality-pattern, --modality-map or dataset.json." if present == [UNKNOWN] else ""
        )
        raise UsageError(f"--in-distribution names '{unknown[0]}'; the cases have {', '.join(sorted(present))}.{hint}")
    rest = [name for name in present if name not in in_distribution and name != UNKNOWN]
    return {IN_DISTRIBUTION: list(in_distribution), OUT_OF_DISTRIBUTION: rest}
