"""The modality table for a data set that nnU-Net has already: from a CSV, or from the names of the cases.

Case names are matched with ``re.search``, so a pattern says ``^`` and ``$`` where it means them.
"""

from __future__ import annotations

import csv
import difflib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_multimodal.conversion.dataset import first_names, numbered, write_json
from nnunet_multimodal.conversion.images import SUFFIXES, read_volume
from nnunet_multimodal.conversion.mixed import doubt_modality
from nnunet_multimodal.conversion.verify import NOT_CHECKED, collect_cases, ct_channel, is_harmonised, load_json
from nnunet_multimodal.data.modality import SECTION, ModalityTable
from nnunet_multimodal.errors import DataProblem, UsageError

_OF_TABLE = ("modalities", "case_modality", "case_patient")  # its keys within the section


@dataclass(frozen=True)
class Entry:
    """What was found out about one case."""

    modality: str
    patient: str | None = None


# --- the data set ----------------------------------------------------------------------------------------------------


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """dataset.json with the keys that are needed here.

    Raises:
        DataProblem: it is missing or damaged.
    """
    content, problems = load_json(folder)
    if content is None:
        raise DataProblem(problems[0])
    for key, kind in (("channel_names", dict), ("file_ending", str)):
        if not isinstance(content.get(key), kind):
            raise DataProblem(f"{folder / 'dataset.json'} has no {key}. See: nnunet_multimodal doctor -d DATASET")
    if not isinstance(content.get(SECTION, {}), dict):
        raise DataProblem(f'{folder / "dataset.json"}: "{SECTION}" has to be an object, found {content[SECTION]!r}.')
    return content


def training_cases(folder: Path, content: Mapping[str, Any]) -> list[str]:
    """The cases of a raw data set that have images.

    Raises:
        DataProblem: there are none.
    """
    cases, problems = collect_cases(folder, content, content["file_ending"])
    names = sorted(case for case, files in cases.items() if files.channels)
    if not names:
        raise DataProblem(problems[0] if problems else f"No *_0000{content['file_ending']} in {folder / 'imagesTr'}.")
    return names


def doubtful_cases(folder: Path, content: Mapping[str, Any], table: ModalityTable) -> list[str]:
    """Images that do not look like what the table says (faults.md 20 and 21); reads channel 0 of all cases.

    Args:
        folder: the raw data set.
        content: its dataset.json. Harmonised images are not read: their values tell nothing.
        table: case -> modality.

    Returns:
        A sentence for each such case, and for each image that cannot be read.
    """
    ending = content["file_ending"]
    if is_harmonised(content):
        return []
    if ending not in SUFFIXES:
        return [f"file_ending is {ending!r}, expected {' or '.join(SUFFIXES)}; {NOT_CHECKED}."]
    doubts = []
    cases, _ = collect_cases(folder, content, ending)
    with_image = {case: files.channels[0] for case, files in sorted(cases.items()) if 0 in files.channels}
    for case, path in tqdm(with_image.items(), desc=f"reading {folder.name}", unit="case", disable=None):
        try:
            doubt = doubt_modality(table.case_modality[case], read_volume(path, nan_to=0.0, reorthonormalize=True))
        except DataProblem as problem:
            doubt = str(problem)
        if doubt:
            doubts.append(f"case {case}: {doubt}")
    return doubts


def held_out_cases(folder: Path, ending: str) -> set[str]:
    """The cases of imagesTs, which a CSV may list too."""
    test = folder / "imagesTs"
    names = os.listdir(test) if test.is_dir() else []
    return {re.sub(r"_\d{4}$", "", name.removesuffix(ending)) for name in names if name.endswith(ending)}


# --- from a CSV ------------------------------------------------------------------------------------------------------


def read_csv(path: Path, cases: Collection[str], held_out: Collection[str], ending: str) -> dict[str, Entry]:
    """Columns case, modality and perhaps patient, with a header; commas or semicolons.

    Args:
        path: the file; cases may be named as their files are (``amos_0001_0000.nii.gz``).
        cases: the cases of the data set.
        held_out: cases that may be listed but are left out, because they are in imagesTs.
        ending: of the files.

    Raises:
        UsageError: the file cannot be read.
        DataProblem: it has no such columns, a cell is empty, a case is unknown or there twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataProblem(f"{path} is not UTF-8 text. Save it as CSV (UTF-8).") from error
    head = text.partition("\n")[0]
    rows = csv.reader(text.splitlines(), delimiter=";" if ";" in head and "," not in head else ",")
    columns = [name.strip().casefold() for name in next(rows, [])]
    missing = [name for name in ("case", "modality") if name not in columns]
    if missing:
        raise DataProblem(
            f"{path} has no column {' and no column '.join(missing)}; its first line is {head.strip()!r}, expected "
            "case,modality or case,modality,patient."
        )
    found: dict[str, Entry] = {}
    lines: dict[str, int] = {}
    unknown, problems = [], []
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        cells = {name: cell.strip() for name, cell in zip(columns, row)}
        written, modality = cells.get("case", ""), cells.get("modality", "")
        if not (written and modality):
            lacking = "modality" if written else "case"
            problems.append(f"{path}, line {rows.line_num}: no {lacking} in {','.join(row)!r}.")
            continue
        case = _known_name(written, ending, {*cases, *held_out})
        if case is None:
            unknown.append(written)
        elif case in lines:
            problems.append(f"{path}: case {case} is in lines {lines[case]} and {rows.line_num}.")
        else:
            lines[case] = rows.line_num
            if case in cases:
                found[case] = Entry(modality, cells.get("patient") or None)
    if unknown:
        close = difflib.get_close_matches(unknown[0], cases, n=1)
        problems.append(
            f"{path} names {len(unknown)} cases that are not in the data set: {first_names(unknown)}."
            + (f" Did you mean {close[0]}?" if close else "")
        )
    if problems:
        raise DataProblem(numbered("Nothing was written.", problems))
    return found


def _known_name(written: str, ending: str, known: Collection[str]) -> str | None:
    """The case that a cell means: its name, or the name of one of its files."""
    name = written.replace("\\", "/").rpartition("/")[2]
    stem = name
    for suffix in (ending, *SUFFIXES):
        stem = stem.removesuffix(suffix)
    # The name as it stands first: a case may itself end in four digits, as amos_0001 does.
    return next((form for form in (name, stem, re.sub(r"_\d{4}$", "", stem)) if form in known), None)


# --- from the names --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patterns:
    """How names tell the modality: one expression with a group ``modality``, or one per modality."""

    expressions: tuple[tuple[str | None, re.Pattern[str]], ...]  # modality (None: the group says it), expression

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Patterns:
        """From ``["(?P<modality>CT|MR)"]`` or ``["CT=^amos_0[0-4]", "MR=^amos_0[56]"]``.

        Raises:
            UsageError: it is neither, or no regular expression.
        """
        alone = _compile(texts[0]) if len(texts) == 1 and "(?P<modality>" in texts[0] else None
        if alone is not None:
            return cls(((None, alone),))
        expressions: list[tuple[str | None, re.Pattern[str]]] = []
        for text in texts:
            name, separator, expression = text.partition("=")
            if not (separator and re.fullmatch(r"[\w.-]+", name)):
                raise UsageError(
                    f"--pattern {text!r} has neither a group (?P<modality>...) nor the form NAME=REGEX, such as "
                    "CT='^amos_0[0-4]'."
                )
            expressions.append((name, _compile(expression)))
        return cls(tuple(expressions))

    def find(self, case: str) -> list[Entry]:
        """What the expressions that fit the name say; of one modality each."""
        entries: dict[str, Entry] = {}
        for name, expression in self.expressions:
            match = expression.search(case)
            if match:
                groups = match.groupdict()
                modality = name if name is not None else groups["modality"]
                if modality:
                    entries.setdefault(modality, Entry(modality, groups.get("patient")))
        return [*entries.values()]


def match_names(cases: Iterable[str], patterns: Patterns) -> dict[str, Entry]:
    """The one modality that each name tells.

    Raises:
        DataProblem: names that fit no expression, or those of two modalities.
    """
    found: dict[str, Entry] = {}
    none, several = [], []
    for case in cases:
        entries = patterns.find(case)
        if not entries:
            none.append(case)
        elif len(entries) > 1:
            several.append(f"{case} ({', '.join(entry.modality for entry in entries)})")
        else:
            found[case] = entries[0]
    problems = []
    if none:
        problems.append(f"--pattern fits {len(none)} cases not at all: {first_names(none)}.")
    if several:
        problems.append(f"--pattern says two modalities for {len(several)} cases: {first_names(several)}. Be stricter.")
    if problems:
        raise DataProblem(numbered("Nothing was written.", problems))
    return found


def match_patients(cases: Iterable[str], expression: str, option: str = "--patient-pattern") -> dict[str, str]:
    """The patient in each name: the group ``patient``, else the first group, else all that matches.

    Raises:
        UsageError: it is no regular expression.
        DataProblem: names in which no patient is found.
    """
    pattern = _compile(expression, option)
    patients: dict[str, str] = {}
    none = []
    for case in cases:
        match = pattern.search(case)
        group: str | int = "patient" if "patient" in pattern.groupindex else min(pattern.groups, 1)
        if match and match[group]:
            patients[case] = match[group]
        else:
            none.append(case)
    if none:
        raise DataProblem(f"{option} finds no patient in {len(none)} cases: {first_names(none)}.")
    return patients


def _compile(expression: str, option: str = "--pattern") -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise UsageError(f"{option} {expression!r} is no regular expression: {error}.") from error


# --- the table -------------------------------------------------------------------------------------------------------


def make_table(
    found: Mapping[str, Entry],
    cases: Collection[str],
    modalities: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
    patients: Mapping[str, str] | None = None,
    where: str = "The modality table",
) -> ModalityTable:
    """The table of a data set's cases.

    Args:
        found: what is known of each case.
        cases: all that have to be in the table.
        modalities: the allowed ones in the order in which training is to alternate; None: those found, sorted.
        rename: modality as found -> as it is to be called.
        patients: case -> patient, before those in ``found``.
        where: what ``found`` was read from, for the messages.

    Raises:
        DataProblem: a case has no modality or one that is not allowed (faults.md 32).
    """
    names = {case: (rename or {}).get(entry.modality, entry.modality) for case, entry in found.items()}
    people = {case: entry.patient for case, entry in found.items() if entry.patient is not None} | dict(patients or {})
    of_case = {case: names[case] for case in sorted(names)}
    allowed = tuple(modalities or sorted({*of_case.values()}))
    right = {name.casefold(): name for name in reversed(allowed)}
    wrong = sorted(name for name in {*of_case.values()} if right.get(name.casefold(), name) != name)
    if wrong:
        meant = [right[name.casefold()] for name in wrong]
        raise DataProblem(
            f"{where}: {', '.join(wrong)} and {', '.join(meant)} differ by capitals alone. "
            f"Pass --rename {','.join(f'{name}={other}' for name, other in zip(wrong, meant))}."
        )
    section = {"modalities": list(allowed), "case_modality": of_case, "case_patient": dict(sorted(people.items()))}
    # Through the reader that the trainers use, so that what is written here is what they accept.
    table = ModalityTable.from_dataset_json({SECTION: section}, where)
    table.require(cases, where)
    return table


def add_table(folders: Sequence[Path], table: ModalityTable, overwrite: bool = False) -> list[Path]:
    """Put the table into dataset.json of each folder; all are checked before the first is written, each appears whole.

    Args:
        folders: the raw data set, and the preprocessed one where it exists.
        table: what to write.
        overwrite: replace another table.

    Returns:
        The files that were changed; none that holds the very table already.

    Raises:
        UsageError: there is another table and ``overwrite`` is not set.
        DataProblem: a dataset.json is damaged, or its channel is called CT while not all images are (faults.md 22).
    """
    contents: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        path = folder / "dataset.json"
        content = read_dataset_json(folder)
        problem = ct_channel(content, table.modalities)
        if problem:
            raise DataProblem(f"{path}: {problem}")
        old = content.get(SECTION, {})
        new = {**{key: value for key, value in old.items() if key not in _OF_TABLE}, **table.section()}
        if old == new:
            continue
        if "case_modality" in old and not overwrite:
            raise UsageError(f"{path} has another modality table ({_tally(old)}). Pass --overwrite to replace it.")
        contents[path] = {**content, SECTION: new}
    for path, content in contents.items():
        write_json(path, content)
    return [*contents]


def _tally(section: Mapping[str, Any]) -> str:
    found = section["case_modality"]
    values = found.values() if isinstance(found, dict) else []
    return ", ".join(f"{count} {name}" for name, count in sorted(Counter(map(str, values)).items())) or "damaged"
