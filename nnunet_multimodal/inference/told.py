"""What the user says about modalities, before anything is predicted."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_multimodal.data.modality import first_names, known_spelling
from nnunet_multimodal.errors import UsageError


def match_modality(name: str, known: Sequence[str], where: str) -> str:
    """The model's spelling of a modality: ``mr``, ``MRI`` -> ``MR``.

    Args:
        name: what the user wrote.
        known: the model's modalities; empty for a model that has none, which takes any name.
        where: the option or file that it stands in, for the message.

    Raises:
        UsageError: the model does not know it; names the nearest and all that it knows.
    """
    if not known:
        return name
    spelling = known_spelling(name, known)
    if spelling is not None:
        return spelling
    folded = {each.casefold(): each for each in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    hint = f" Did you mean {folded[close[0]]}?" if close else ""
    raise UsageError(f"{where}: the model does not know the modality '{name}'.{hint} Allowed: {', '.join(known)}.")


def told_by_case(
    told: Mapping[str, str], cases: Sequence[str], ending: str, known: Sequence[str], where: str
) -> tuple[dict[str, str], list[str]]:
    """Each case's modality, as ``--modality-map`` says it.

    Args:
        told: case or file name (``p1``, ``p1.nii.gz``, ``p1_0000.nii.gz``, with or without folders) -> modality.
        cases: the cases that are to be predicted.
        ending: the data set's file ending.
        known: see ``match_modality``.
        where: the map's file, for messages.

    Returns:
        case -> modality of the cases that the map names, and what the user should know: keys that are no case's, and
        cases without a key.

    Raises:
        UsageError: an unknown modality, two modalities for one case, or no key that is a case.
    """
    by_case: dict[str, str] = {}
    unused = []
    for key, name in told.items():
        modality = match_modality(name, known, f"{where}, {key}")
        stem = Path(key).name.removesuffix(ending)
        case = stem if stem in cases else stem.removesuffix("_0000")
        if case not in cases:
            unused.append(key)
        elif by_case.setdefault(case, modality) != modality:
            raise UsageError(f"{where} has two modalities for {case}: {by_case[case]} and {modality}.")
    if not by_case:
        raise UsageError(f"{where} has no case of these: its keys are {first_names(unused)}, the cases {_some(cases)}.")
    messages = []
    if unused:
        messages.append(f"{where}: {len(unused)} keys are no case of the input: {first_names(unused)}")
    missing = [case for case in cases if case not in by_case]
    if missing:
        messages.append(f"{where} does not name {len(missing)} cases: {first_names(missing)}")
    return by_case, messages


def _some(cases: Sequence[str]) -> str:
    return first_names([*cases])
