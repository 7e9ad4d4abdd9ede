"""Prompts out of templates: which sentence the text encoder reads for a class in a modality.

Source: MulModSeg, Table 1, and the authors' notebook, which writes the modality out and ends with a period
(methods.md, 2.1 and 2.2).
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.text.names import listed, nearest

TEMPLATES = {
    "V1": "A photo of a {organ}.",
    "V2": "There is a {organ} in this {modality}.",
    "V3": "A {modality} imaging of a {organ}.",
}

_MR = "magnetic resonance"

# By casefolded name without separators; a leading "mr" or "mri" is ignored where the rest is known (MR_T2w).
_MODALITY_WORDS = {
    "ct": "computed tomography",
    "cta": "computed tomography angiography",
    "cbct": "cone-beam computed tomography",
    "mr": _MR,
    "mri": _MR,
    "mra": f"{_MR} angiography",
    "t1": f"T1-weighted {_MR}",
    "t1w": f"T1-weighted {_MR}",
    "t1c": f"contrast-enhanced T1-weighted {_MR}",
    "t1ce": f"contrast-enhanced T1-weighted {_MR}",
    "t1gd": f"contrast-enhanced T1-weighted {_MR}",
    "t2": f"T2-weighted {_MR}",
    "t2w": f"T2-weighted {_MR}",
    "flair": f"fluid-attenuated inversion recovery {_MR}",
    "pd": f"proton density-weighted {_MR}",
    "pdw": f"proton density-weighted {_MR}",
    "dwi": f"diffusion-weighted {_MR}",
    "adc": f"apparent diffusion coefficient {_MR}",
    "swi": f"susceptibility-weighted {_MR}",
    "lge": f"late gadolinium enhancement {_MR}",
    "bssfp": f"balanced steady-state free precession {_MR}",
    "inphase": f"in-phase {_MR}",
    "t1inphase": f"in-phase T1-weighted {_MR}",
    "outphase": f"opposed-phase {_MR}",
    "opposedphase": f"opposed-phase {_MR}",
    "t1outphase": f"opposed-phase T1-weighted {_MR}",
    "pet": "positron emission tomography",
    "spect": "single-photon emission computed tomography",
    "us": "ultrasound",
    "xray": "X-ray",
}


def modality_words(modality: str) -> str:
    """``CT`` -> computed tomography, ``T2w`` -> T2-weighted magnetic resonance; what is not known stays as written."""
    key = re.sub(r"[\W_]+", "", modality.casefold())
    for candidate in (key, re.sub(r"^mri?", "", key)):
        if candidate in _MODALITY_WORDS:
            return _MODALITY_WORDS[candidate]
    return modality.replace("_", " ").strip()


def organ_words(label: str) -> str:
    """``right_kidney`` -> right kidney."""
    return " ".join(label.replace("_", " ").split())


def find_template(template: str) -> str:
    """The text of ``V1``, ``V2`` or ``V3``; a text with ``{organ}`` (or the paper's ``[CLS]``) is one itself.

    Raises:
        UsageError: it is neither, or has other placeholders than ``{organ}`` and ``{modality}``.
    """
    if template.upper() in TEMPLATES:
        return TEMPLATES[template.upper()]
    text = template.replace("[CLS]", "{organ}")
    own = "your own text with {organ} and, if it matters, {modality}"
    try:
        parts = [(field, spec, conversion) for _, field, spec, conversion in string.Formatter().parse(text)]
    except ValueError as error:
        raise UsageError(f"template {template!r} has unpaired braces ({error}). Expected {own}.") from error
    fields = {field for field, _, _ in parts if field is not None}
    plain = not any(spec or conversion for _, spec, conversion in parts)
    if "organ" not in fields or not fields <= {"organ", "modality"} or not plain:
        found = ", ".join(f"{{{field}}}" for field in sorted(fields)) or "no placeholder"
        raise UsageError(f"unknown template {template!r} ({found}). Take {', '.join(TEMPLATES)}, or {own}.")
    return text


def make_prompts(
    template: str, modalities: Sequence[str], labels: Sequence[str], words: Mapping[str, str] | None = None
) -> tuple[tuple[str, ...], ...]:
    """The prompts, [modality][label].

    Args:
        template: ``V1``, ``V2``, ``V3`` or a text with placeholders.
        modalities: their names, written out by :func:`modality_words`.
        labels: names of classes; underscores become spaces.
        words: what to write instead for single modalities or labels, e.g. {"postcava": "inferior vena cava"}.

    Raises:
        UsageError: a word is for no modality or label, a prompt would be empty, or two labels have the same
            (faults.md 33).
    """
    words = words or {}
    require_known_words(words, modalities, labels)
    text = find_template(template)
    spoken = {name: words.get(name, modality_words(name)).strip() for name in modalities}
    spoken |= {name: words.get(name, organ_words(name)).strip() for name in labels}
    empty = sorted(name for name, said in spoken.items() if not said)
    if empty:
        raise UsageError(f"the prompt for {empty[0]!r} is empty. Give it words: --words NAME='its words'")
    by_words: dict[str, str] = {}
    for label in labels:
        other = by_words.setdefault(spoken[label], label)
        if other != label:
            raise UsageError(
                f"'{other}' and '{label}' both read '{spoken[label]}', so the network could not tell them apart. "
                f"Give one other words: --words {label}='its words'"
            )
    return tuple(
        tuple(text.format(organ=spoken[label], modality=spoken[modality]) for label in labels)
        for modality in modalities
    )


def require_known_words(words: Mapping[str, str], modalities: Sequence[str], labels: Sequence[str]) -> None:
    """Every word is for a modality or a label.

    Raises:
        UsageError: names the first that is not, and what it may have meant.
    """
    known = [*labels, *modalities]
    for name in words:
        if name not in known:
            near = nearest(name, known)
            question = f" Did you mean '{near}'?" if near else ""
            raise UsageError(f"--words: no label or modality '{name}'.{question} There are: {listed(known)}.")
