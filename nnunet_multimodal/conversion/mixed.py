"""Labelled images of several modalities become one data set with common labels and a modality table (contract 1)."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_multimodal import __version__
from nnunet_multimodal.conversion import dataset
from nnunet_multimodal.conversion.cases import (
    CheckedCase,
    check_volumes,
    note_what_is_absent,
    place_labels,
    read_case,
)
from nnunet_multimodal.conversion.dataset import FILE_ENDING, LISTED, CaseFiles, Repairs
from nnunet_multimodal.conversion.harmonise import METHODS
from nnunet_multimodal.conversion.harmonise import harmonise as harmonised
from nnunet_multimodal.conversion.images import Volume, write_like
from nnunet_multimodal.data.case_labels import KEY as CASE_LABELS
from nnunet_multimodal.data.modality import ModalityTable
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.inference.hounsfield import AIR

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """The cases of one modality, with the labels as their own files have them.

    Attributes:
        modality: its name, e.g. "CT"; two sources may have the same.
        cases: image and label of each.
        labels: organ -> id in these files, without background; may hold more organs than are wanted.
        patients: case -> patient, where known. A name means the same person in all sources.
        further: ids of these files that ``labels`` does not have -> the organ that they are a part of, as each vertebra
            is of the spine, or "" for background.
        name: tells it from another source of its modality.
    """

    modality: str
    cases: Sequence[CaseFiles]
    labels: Mapping[str, int]
    patients: Mapping[str, str] = field(default_factory=dict)
    further: Mapping[int, str] = field(default_factory=dict)
    name: str = ""

    @property
    def title(self) -> str:
        """CT, or CT/lits."""
        return f"{self.modality}/{self.name}" if self.name else self.modality


def convert_mixed(
    sources: Sequence[Source],
    dataset_id: int,
    name: str,
    labels: Mapping[str, int] | None = None,
    harmonise: str | None = None,
    repairs: Repairs = Repairs(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    unnamed_to_background: bool = False,
    strict: bool = False,
    partial: bool = False,
) -> Path:
    """Make a data set of one channel, ``CT_or_MR``, with common labels and a modality table.

    Args:
        sources: the cases of each modality, in the order in which training is to alternate.
        dataset_id: XXX of DatasetXXX_Name.
        name: Name of DatasetXXX_Name.
        labels: organ -> id in the data set, 1..K; None takes the organs that all sources have, in the first's order.
        harmonise: "paper" writes all images on one scale (harmonise.py); None leaves them as they are.
        repairs: what may be put right in the input.
        overwrite: replace a data set of this id once the new one is complete.
        unnamed_to_background: ids that ``Source.labels`` does not name become background instead of being an error.
        strict: an image that does not look like its modality is an error instead of a warning (faults.md 21).
        partial: organs that only some sources label are kept, by default all of them, and ``case_labels`` of
            dataset.json says which case is annotated for which; one modality is then enough.

    Returns:
        The folder of the data set.

    Raises:
        UsageError, EnvironmentProblem, DataProblem: nothing was written.
    """
    raw = require_nnunet_path("nnUNet_raw")
    final = dataset.require_free(raw, dataset_id, name, overwrite)
    for source in sources:
        dataset.require_outside(raw, dataset_id, (path for case in source.cases for path in (case.image, case.label)))
    modalities = _modalities(sources, 1 if partial else 2)
    if harmonise is not None and harmonise not in METHODS:
        raise UsageError(f"Unknown harmonisation {harmonise!r}. There is: {', '.join(METHODS)}.")
    declared = dataset.declared_labels(
        labels if labels is not None else all_labels(sources) if partial else common_labels(sources)
    )
    _require_organs(declared, sources, partial)
    _note_left_out(declared, sources)
    cases = _name_cases(sources, declared)

    def check(case: _Case) -> tuple[CheckedCase, str | None]:
        return _check_case(case, harmonise, repairs, unnamed_to_background, strict)

    results = dataset.check_all(cases, check, "cases")
    _warn([doubt for _, doubt in results if doubt])
    for modality in modalities:
        of_modality = [checked for case, (checked, _) in zip(cases, results) if case.modality == modality]
        annotated = {name for source in sources if source.modality == modality for name in source.labels}
        looked_for = {name: value for name, value in dataset.organs_of(declared).items() if name in annotated}
        note_what_is_absent(looked_for, of_modality, f"{modality} ")
    case_labels = _case_labels(cases, declared)
    for source in sources if case_labels else ():
        missing = [name for name in dataset.organs_of(declared) if name not in source.labels]
        if missing:
            log.warning("note: %s does not annotate %s (case_labels)", source.title, dataset.first_names(missing))

    table = ModalityTable(
        modalities,
        {case.name: case.modality for case in cases},
        {case.name: case.patient for case in cases if case.patient is not None},
    )
    own = table.section() | ({"harmonise": harmonise} if harmonise else {})
    own |= {CASE_LABELS: case_labels} if case_labels else {}
    record = {
        "sources": [_describe(source) for source in sources],
        **({"harmonise": harmonise} if harmonise else {}),
        **({"unnamed_to_background": True} if unnamed_to_background else {}),
        **({"partial": True} if partial else {}),
        **dataset.describe_repairs(repairs),
        "nnunet_multimodal": __version__,
    }
    with dataset.new_dataset(raw, dataset_id, name, overwrite) as folder:
        for case in tqdm(cases, desc=f"writing {final.name}", unit="case", disable=None):
            _write_case(folder, case, harmonise, repairs)
        # Any name but CT: that one would make nnU-Net clip every image to the CT window (faults.md 22).
        channel = "_or_".join(modalities)
        dataset.write_dataset_json(folder, "mixed", (channel,), declared, len(cases), record, own)
    return final


@dataclass(frozen=True)
class _Case:
    """A case as it will be."""

    name: str
    modality: str
    files: CaseFiles
    patient: str | None
    ids: Mapping[int, int]  # from those of its label file to the common ones; 0 is background
    annotated: frozenset[str]  # organs that its source labels


# --- what is asked for -----------------------------------------------------------------------------------------------


def common_labels(sources: Sequence[Source]) -> dict[str, int]:
    """The organs that all sources have, numbered from 1 in the order of the first; ``ignore`` last where any has it.

    Raises:
        UsageError: there is none.
    """
    names = [
        name
        for name in sources[0].labels
        if name not in ("background", "ignore") and all(name in source.labels for source in sources)
    ]
    if not names:
        lists = "; ".join(f"{source.modality}: {dataset.first_names([*source.labels])}" for source in sources)
        raise UsageError(f"No organ is labelled in all modalities ({lists}). Spell the same organ the same way.")
    if any("ignore" in source.labels for source in sources):
        names.append("ignore")
    return {name: index for index, name in enumerate(names, start=1)}


def all_labels(sources: Sequence[Source]) -> dict[str, int]:
    """The organs that any source has, numbered from 1 in the order in which they come; ``ignore`` last if there."""
    names = dict.fromkeys(name for source in sources for name in source.labels if name not in ("background", "ignore"))
    ignore = ["ignore"] if any("ignore" in source.labels for source in sources) else []
    return {name: index for index, name in enumerate([*names, *ignore], start=1)}


def _case_labels(cases: Sequence[_Case], declared: Mapping[str, int]) -> dict[str, list[str]]:
    """The organs of each case that lacks one; a case that is not here is annotated in full."""
    organs = dataset.organs_of(declared)
    return {
        case.name: [name for name in organs if name in case.annotated]
        for case in cases
        if not organs.keys() <= case.annotated
    }


def _modalities(sources: Sequence[Source], fewest: int) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(source.modality for source in sources))
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UsageError(f"Modality {name!r} must consist of letters, digits, '_', '-' and '.'.")
    for source in sources:
        _check_source(source)
    if len({name.casefold() for name in names}) < len(names):
        raise UsageError(f"Modalities must differ by more than capitals, found {', '.join(names)}.")
    for source in sources:
        if source.name and not re.fullmatch(r"[\w.-]+", source.name):
            raise UsageError(f"Source {source.name!r} must consist of letters, digits, '_', '-' and '.'.")
    if len(names) < fewest:
        raise UsageError(
            f"A mixed data set has at least two modalities, found {', '.join(names) or 'none'}. "
            "For one there is `nnunet_multimodal convert plain --modality NAME`."
        )
    return names


def _check_source(source: Source) -> None:
    ids = [*source.labels.values()]
    if not source.cases:
        raise DataProblem(f"There is no case of {source.title}.")
    if any(value <= 0 for value in ids) or "background" in source.labels:
        raise UsageError(f"Labels of {source.title} have to be numbers from 1 on; background is 0 by itself.")
    twice = sorted({value for value in ids if ids.count(value) > 1})
    if twice:
        names = ", ".join(name for name, value in source.labels.items() if value == twice[0])
        raise UsageError(f"Labels of {source.title} must differ, found {twice[0]} for {names}.")


def _require_organs(declared: Mapping[str, int], sources: Sequence[Source], partial: bool) -> None:
    """An organ that one source does not label would be taught as background in its images, if nobody said so."""
    organs = dataset.organs_of(declared)
    for source in sources if partial else ():
        if not organs.keys() & source.labels.keys():
            raise UsageError(
                f"{source.title} labels none of {dataset.first_names([*organs])}, so there is nothing to learn from "
                f"its cases; it labels {dataset.first_names([*source.labels])}. Leave {source.title} out."
            )
    for organ in organs:
        if partial and any(organ in source.labels for source in sources):
            continue
        for source in sources:
            if organ not in source.labels:
                close = difflib.get_close_matches(organ, source.labels, n=1)
                raise UsageError(
                    f"{organ!r} is not among the labels of {source.title}: "
                    f"{dataset.first_names([*source.labels])}. "
                    + (f"Is it {close[0]!r} there? Name it {organ!r} then. " if close else "")
                    + (
                        "Some modality has to label it."
                        if partial
                        else "Every organ has to be labelled in all modalities, or it would be taught as background in "
                        "some. Or pass --partial: what is not labelled is then not taught (nnUNetTrainerContextPrior)."
                    )
                )


def _note_left_out(declared: Mapping[str, int], sources: Sequence[Source]) -> None:
    for source in sources:
        left_out = [name for name in source.labels if name not in declared]
        if left_out:
            log.warning("note: of %s, these become background: %s", source.title, dataset.first_names(left_out))


def _name_cases(sources: Sequence[Source], declared: Mapping[str, int]) -> list[_Case]:
    """Names stay as they are where only one source has them, and get their modality in front where several do."""
    times = Counter(files.case for source in sources for files in source.cases)
    cases = [
        _Case(
            files.case if times[files.case] == 1 else f"{source.title.replace('/', '_')}_{files.case}",
            source.modality,
            files,
            source.patients.get(files.case),
            {0: 0}
            | {value: declared.get(organ, 0) for value, organ in source.further.items()}
            | {value: declared.get(organ, 0) for organ, value in source.labels.items()},
            frozenset(source.labels),
        )
        for source in sources
        for files in source.cases
    ]
    first: dict[str, Path] = {}
    twice = []
    for case in cases:
        if case.name in first:
            twice.append(f"Case id '{case.name}' comes from {first[case.name]} and {case.files.image}.")
        first.setdefault(case.name, case.files.image)
    if twice:
        raise DataProblem(dataset.numbered("Every image needs a case id of its own; rename them:", twice))
    return sorted(cases, key=lambda case: case.name)


def _describe(source: Source) -> dict[str, Any]:
    def folder(files: Iterable[Path]) -> str:
        return os.path.commonpath([file.absolute().parent for file in files])

    return {
        "modality": source.modality,
        **({"name": source.name} if source.name else {}),
        "images": folder(files.image for files in source.cases),
        "labels": folder(files.label for files in source.cases),
        "cases": len(source.cases),
        "label_names": dict(source.labels),
        **({"further_ids": {str(value): name for value, name in source.further.items()}} if source.further else {}),
    }


# --- one case --------------------------------------------------------------------------------------------------------


def _check_case(
    case: _Case, harmonise: str | None, repairs: Repairs, unnamed_to_background: bool, strict: bool
) -> tuple[CheckedCase, str | None]:
    """The case with its common ids, and what makes one doubt its modality."""
    image, label = read_case(case.files, repairs)
    try:
        checked = check_volumes(case.files, image, label, None if unnamed_to_background else case.ids)
    except DataProblem as problem:
        if "undeclared labels" not in str(problem):
            raise
        raise DataProblem(f"{problem} Or pass --unnamed-to-background.") from problem
    doubt = doubt_modality(case.modality, image)
    if doubt:
        doubt = f"case {case.name}: {doubt}"
        if strict:
            raise DataProblem(f"{doubt} Look at {case.files.image}, or leave --strict out.")
    if harmonise:
        harmonised(image.data, case.modality, str(case.files.image))  # it may find nothing to scale
    return replace(checked, ids=frozenset(case.ids.get(value, 0) for value in checked.ids)), doubt


def doubt_modality(modality: str, image: Volume) -> str | None:
    """What is odd about an image for one of its modality (faults.md 20 and 21), None if nothing is."""
    lowest, highest = float(image.data.min()), float(image.data.max())
    if modality.casefold() == "ct" and lowest >= AIR:
        return (
            f"{modality} has no value below {AIR} (found {lowest:g} to {highest:g}); looks like MR, or is not in HU "
            "(rescale slope and intercept lost?)."
        )
    if modality.casefold() != "ct" and lowest < AIR:
        return f"{modality} has values below {AIR} (found {lowest:g} to {highest:g}); looks like CT."
    return None


def _write_case(folder: Path, case: _Case, harmonise: str | None, repairs: Repairs) -> None:
    image, label = read_case(case.files, repairs)
    channel, labels = folder / "imagesTr" / f"{case.name}_0000{FILE_ENDING}", folder / "labelsTr"
    if harmonise:
        write_like(channel, harmonised(image.data, case.modality, str(case.files.image)), image)
    else:
        dataset.place_file(case.files.image, channel, image)
    place_labels(case.files, labels / f"{case.name}{FILE_ENDING}", label, case.ids)


def _warn(doubts: Sequence[str]) -> None:
    for doubt in doubts[:LISTED]:
        log.warning("warning: %s", doubt)
    if len(doubts) > LISTED:
        log.warning("warning: the same of %d more cases.", len(doubts) - LISTED)
