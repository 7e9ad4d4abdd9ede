"""Which organs are measured: names and ids from a file, from the command line, or as they are found."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.evaluation.measures import Ids


@dataclass(frozen=True)
class Labels:
    """What is measured.

    Attributes:
        organs: name -> id, or name -> ids of a region.
        ignore: the value that counts in neither map; None if there is none.
        source: where the names come from, for the report.
    """

    organs: dict[str, Ids]
    ignore: int | None
    source: str

    def known(self) -> set[int]:
        """All values that a label map may hold."""
        ids = {value for entry in self.organs.values() for value in ([entry] if isinstance(entry, int) else entry)}
        return ids | {0} | ({self.ignore} if self.ignore is not None else set())


def labels_from(declared: Mapping[str, Any], source: str) -> Labels:
    """Labels out of what dataset.json holds under ``labels``: ids, lists of ids (regions), background, ignore.

    ``{"0": "background", "1": "liver"}``, the order of the Medical Segmentation Decathlon, is understood too.

    Raises:
        UsageError: an entry is neither an id nor a list of ids, an id has two names, or there is nothing to measure.
    """
    if declared and all(str(key).isdigit() and isinstance(value, str) for key, value in declared.items()):
        names = [*declared.values()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"{source} has more than one id for '{twice[0]}'; a region is a list: [1, 2].")
        declared = {name: int(key) for key, name in declared.items()}
    organs: dict[str, Ids] = {}
    plain: dict[int, str] = {}
    ignore = None
    for name, value in declared.items():
        ids = value if isinstance(value, (list, tuple)) else [value]
        if not ids or not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v >= 0 for v in ids):
            raise UsageError(f"label '{name}' in {source} is {value!r}; expected an id, or a list of ids for a region.")
        if name == "ignore":
            if len(ids) != 1:
                raise UsageError(f"ignore in {source} must be one id, found {value!r}.")
            ignore = int(ids[0])
        elif [int(v) for v in ids] != [0] and name != "background":
            if 0 in ids:
                raise UsageError(f"region '{name}' in {source} holds 0, which is background: {value!r}.")
            organs[str(name)] = int(ids[0]) if len(ids) == 1 else [int(v) for v in ids]
            if value is ids:
                continue
            if plain.setdefault(int(value), str(name)) != str(name):
                raise UsageError(f"{source} gives the id {value} two names: {plain[int(value)]} and {name}.")
    if not organs:
        raise UsageError(f"{source} names no organ to measure.")
    if ignore is not None and any(ignore in ([ids] if isinstance(ids, int) else ids) for ids in organs.values()):
        raise UsageError(f"the ignore label {ignore} in {source} is also the id of an organ.")
    return Labels(organs, ignore, source)


def labels_from_file(path: Path) -> Labels:
    """From a dataset.json, or from a file like ``{"liver": 1, "kidneys": [2, 3]}``.

    Raises:
        UsageError: the file is missing or is neither.
    """
    content = read_json(path)
    declared = content.get("labels", content)
    if not isinstance(declared, dict):
        raise UsageError(f'{path} holds no label names; expected a dataset.json or {{"liver": 1, "spleen": 2}}.')
    return labels_from(declared, str(path))


def check_agreement(first: Labels, second: Labels) -> None:
    """Two files mean the same: no id has another name and no name another id. Either may have organs of its own.

    Raises:
        UsageError: they contradict each other; it says what each says.
    """
    names, ids = zip(*(_lookups(labels) for labels in (first, second)))
    wrong_ids = {key for key in names[0].keys() & names[1].keys() if not names[0][key] & names[1][key]}
    wrong_names = {name for name in ids[0].keys() & ids[1].keys() if not ids[0][name] & ids[1][name]}
    if not wrong_ids and not wrong_names:
        return
    said = []
    for labels in (first, second):
        entries = [
            f"{name}={','.join(map(str, sorted(key)))}"
            for name, key in _entries(labels)
            if key in wrong_ids or name.casefold() in wrong_names
        ]
        said.append(f"{labels.source} says {' '.join(entries)}")
    raise UsageError(
        f"The label names contradict each other: {'; '.join(said)}. "
        "Say what holds: --label-names NAME=ID ... or --labels-json FILE."
    )


def _entries(labels: Labels) -> list[tuple[str, frozenset[int]]]:
    """Name and ids of each organ, and of what is ignored."""
    entries = {**labels.organs, **({"ignore": labels.ignore} if labels.ignore is not None else {})}
    return [(name, frozenset([ids] if isinstance(ids, int) else ids)) for name, ids in entries.items()]


def _lookups(labels: Labels) -> tuple[dict[frozenset[int], set[str]], dict[str, set[frozenset[int]]]]:
    """Ids -> names and name -> ids; Liver is liver."""
    names, ids = defaultdict(set), defaultdict(set)
    for name, key in _entries(labels):
        names[key].add(name.casefold())
        ids[name.casefold()].add(key)
    return names, ids


def labels_found(values: Iterable[int]) -> Labels:
    """``class_1``, ``class_4``, ... for ids that were found in the references.

    Raises:
        DataProblem: there are none.
    """
    organs: dict[str, Ids] = {f"class_{value}": value for value in sorted(set(values) - {0})}
    if not organs:
        raise DataProblem("The references hold no label above 0: there is nothing to measure.")
    return Labels(organs, None, "the ids found in the references")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UsageError: it cannot be read or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a JSON object ({{...}}), found {type(content).__name__}.")
    return content


def tolerances_for(labels: Labels, default: float, per_organ: Mapping[str, float]) -> dict[str, float]:
    """The tolerance of each organ in mm.

    Raises:
        UsageError: an organ is not measured, or a tolerance is negative or no number.
    """
    unknown = [name for name in per_organ if name not in labels.organs]
    if unknown:
        raise UsageError(f"--tolerance names '{unknown[0]}', which is not measured: {', '.join(labels.organs)}.")
    result = {name: float(per_organ.get(name, default)) for name in labels.organs}
    for name, value in result.items():
        if not np.isfinite(value) or value < 0:
            raise UsageError(f"the tolerance of {name} must be 0 mm or more, found {value:g}.")
    return result
