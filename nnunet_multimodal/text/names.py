"""Names of the network's outputs, and rows of a table found by name, so that no order has to be trusted."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nnunet_multimodal.errors import DataProblem, UsageError

BACKGROUND = "background"
LISTED = 10  # names shown in a message


def output_names(labels: Mapping[str, Any], where: str = "dataset.json") -> tuple[str, ...]:
    """The name of each output channel, in the order that nnU-Net's LabelManager gives them.

    Args:
        labels: ``labels`` of dataset.json: ids, or lists of ids where the network predicts regions.
        where: the file they come from, for messages.

    Returns:
        Background first, then by id, without the ignore label; for regions their names as listed, without background.

    Raises:
        DataProblem: there is no background, an entry is no id, or an id has two names.
    """
    if not isinstance(labels, Mapping) or BACKGROUND not in labels:
        raise DataProblem(f'{where}: "labels" has no "background": 0, found {labels!r}. Declare it, nnU-Net needs it.')
    ids: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        entry = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not entry or not all(type(number) is int for number in entry):
            raise DataProblem(f"{where}: label '{name}' is {value!r}; expected an id, or a list of ids for a region.")
        ids[str(name)] = entry
    if set(ids[BACKGROUND]) != {0}:
        raise DataProblem(f"{where}: background must be 0, found {labels[BACKGROUND]!r}.")
    outputs = {name: entry for name, entry in ids.items() if name != "ignore"}
    if any(len(entry) > 1 for entry in outputs.values()):
        return tuple(name for name, entry in outputs.items() if set(entry) != {0})
    by_id: dict[int, str] = {}
    for name, (value,) in outputs.items():
        if value in by_id:
            raise DataProblem(f"{where}: label id {value} has two names, {by_id[value]} and {name}. Keep one.")
        by_id[value] = name
    return tuple(by_id[value] for value in sorted(by_id))


def find_row(
    name: str,
    rows: Sequence[str],
    what: str,
    where: str,
    hint: str = "",
    ways: Sequence[Callable[[str], Any]] | None = None,
) -> int:
    """Position of a name in a table: as it is written, else by letters and digits, else by words in any order.

    ``right_kidney`` finds "Right Kidney", ``gallbladder`` "Gall Bladder" and ``kidney_right`` "Right Kidney"; a looser
    way is tried only if the stricter one found nothing, and is refused where it finds two.

    Args:
        name: the name asked for.
        rows: the names of the table; no two are equal.
        what: what a row is, such as "embedding" or "modality", for messages.
        where: what the table is, for messages.
        hint: what to do if it is not there; ``{near}`` becomes the nearest row.
        ways: the comparisons in place of the three above, strictest first.

    Raises:
        UsageError: no row, or more than one, answers to the name (faults.md 33).
    """
    for way in ways or (str, _letters, _words):
        key = way(name)
        found = [index for index, row in enumerate(rows) if key and way(row) == key]
        if len(found) == 1:
            return found[0]
        if found:
            several = ", ".join(f"'{rows[index]}'" for index in found)
            raise UsageError(f"'{name}' could be {several} in {where}. Name it exactly.{_fill(hint, rows[found[0]])}")
    near = nearest(name, rows)
    question = f" (did you mean '{near}'?)" if near else ""
    raise UsageError(f"no {what} for '{name}'{question} in {where}, which has {listed(rows)}.{_fill(hint, near)}")


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The most similar of the known names, whatever the case and separators; None if nothing is close."""
    by_letters = {_letters(row): row for row in known}
    close = difflib.get_close_matches(_letters(name), by_letters, n=1, cutoff=0.5)
    return by_letters[close[0]] if close else None


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _words(name: str) -> tuple[str, ...]:
    return tuple(sorted(re.findall(r"[^\W_]+", name.casefold())))


def _fill(hint: str, near: str | None) -> str:
    return " " + hint.replace("{near}", near or "ROW") if hint else ""
