"""Which organs a reference annotates: what nobody looked for is neither missed nor found by mistake.

It is said by ``"case_labels"`` of the references' dataset.json (data/case_labels.py), or by the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnunet_multimodal.conversion.dataset import first_names
from nnunet_multimodal.conversion.images import split_suffix
from nnunet_multimodal.data.case_labels import KEY, CaseLabels, has_case_labels
from nnunet_multimodal.data.modality import SECTION
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.evaluation.labels import Labels, read_json
from nnunet_multimodal.evaluation.measures import Ids
from nnunet_multimodal.text.names import BACKGROUND

NOBODY = "none"  # in place of a file: all references are annotated in full, whatever dataset.json says


@dataclass(frozen=True)
class Annotated:
    """What the references lack.

    Attributes:
        unannotated: case -> the measured organs that its reference does not annotate; cases that lack none are not
            there.
        strange: the same of organs of which its reference should not have a single voxel: a region may be annotated in
            part.
        source: who says so; None where nobody does.
        notes: what was of no use.
    """

    unannotated: Mapping[str, frozenset[str]] = field(default_factory=dict)
    strange: Mapping[str, frozenset[str]] = field(default_factory=dict)
    source: str | None = None
    notes: tuple[str, ...] = ()


def annotated_organs(
    given: str | Path | Mapping[str, Sequence[str]] | None, jsons: Sequence[Path], labels: Labels, cases: Sequence[str]
) -> Annotated:
    """Which of the measured organs each case's reference annotates; of a case that nobody names, all.

    An organ counts where the case lists a class of the very same ids, or classes of one id each that make it up: both
    kidneys, where left and right are listed.

    Args:
        given: a dataset.json, a file like ``{"case_001": ["liver"], ...}`` with names of measured organs, the content
            of such a file, or ``"none"``; None asks ``jsons``.
        jsons: dataset.json files; the first with labels is that of the references.
        labels: what is measured.
        cases: ``folder/name``; a key may be the name alone.

    Raises:
        UsageError: the file holds nothing of the kind, or names no case of these.
        DataProblem: it is malformed, or names a class that does not exist.
    """
    if given == NOBODY:
        return Annotated()
    if given is None:
        return _of_references(jsons, labels, cases)
    if isinstance(given, Mapping):
        return _of_table(given, "the arguments", labels, cases)
    path = Path(given)
    content = read_json(path)
    if SECTION not in content and "labels" not in content:
        return _of_table(content, str(path), labels, cases)
    if not has_case_labels(content):
        raise UsageError(f'{path} has no "{SECTION}": "{KEY}", so it says of no case what is annotated.')
    found = _of_dataset(content, path, labels, cases)
    if any(name in content[SECTION][KEY] for case in cases for name in _names(case)):
        return found
    return replace(found, notes=(f"{KEY} of {path} name no case of these: all are taken for annotated in full",))


def _of_references(jsons: Sequence[Path], labels: Labels, cases: Sequence[str]) -> Annotated:
    """What the references' own dataset.json says; one that cannot be read is noted."""
    try:
        own = next(((path, content) for path in jsons if "labels" in (content := read_json(path))), None)
    except UsageError as error:
        return Annotated(notes=(f"no {KEY} are taken from dataset.json: {error}",))
    if own is None or not has_case_labels(own[1]):
        return Annotated()
    try:
        found = _of_dataset(own[1], own[0], labels, cases)
    except DataProblem as problem:
        raise DataProblem(f"{problem} Or say what holds: --case-labels FILE, or none.") from problem
    return found if found.unannotated else Annotated()


def _of_dataset(content: Mapping[str, Any], path: Path, labels: Labels, cases: Sequence[str]) -> Annotated:
    table = CaseLabels.from_dataset_json(content, str(path))
    ids = {name: _ids(value) for name, value in content["labels"].items() if name in table.outputs}
    return _measured(table.of_case, ids, str(path), labels, cases)


def _of_table(written: Mapping[str, Any], where: str, labels: Labels, cases: Sequence[str]) -> Annotated:
    table = CaseLabels.from_table(written, (BACKGROUND, *labels.organs), where)
    of_case: dict[str, frozenset[str]] = {}
    for key, names in table.of_case.items():
        case = (Path(key).parent / split_suffix(Path(key))[0]).as_posix()
        if of_case.setdefault(case, names) != names:
            raise DataProblem(f"{where} says two things of {case}.")
    known = {name for case in cases for name in _names(case)}
    unused = [case for case in of_case if case not in known]
    if len(unused) == len(of_case):
        raise UsageError(f"{where} names no case of these: {first_names(unused)}; the cases: {first_names([*cases])}.")
    notes = (f"{where} names {len(unused)} cases that are not there: {first_names(unused)}",) if unused else ()
    ids = {name: _ids(value) for name, value in labels.organs.items()}
    return _measured(of_case, ids, where, labels, cases, notes)


def _measured(
    of_case: Mapping[str, frozenset[str]],
    ids: Mapping[str, frozenset[int]],
    source: str,
    labels: Labels,
    cases: Sequence[str],
    notes: tuple[str, ...] = (),
) -> Annotated:
    """The measured organs of each case, by the ids of the classes that it lists."""
    unannotated, strange = {}, {}
    for case in cases:
        key = next((name for name in _names(case) if name in of_case), None)
        if key is None:
            continue
        classes = [ids[name] for name in of_case[key]]
        single = frozenset().union(*(each for each in classes if len(each) == 1))
        touched = frozenset().union(*classes)
        organs = {name: _ids(value) for name, value in labels.organs.items()}
        lacking = {name: own for name, own in organs.items() if not (own in classes or own <= single)}
        if lacking:
            unannotated[case] = frozenset(lacking)
            strange[case] = frozenset(name for name, own in lacking.items() if not own & touched)
    return Annotated(unannotated, strange, source, notes)


def _ids(value: Ids) -> frozenset[int]:
    return frozenset([value] if isinstance(value, int) else value)


def _names(case: str) -> tuple[str, str]:
    """``folder/name`` and ``name``."""
    return case, case.rsplit("/", 1)[-1]
