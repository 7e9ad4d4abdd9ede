"""One text an organ, for a network that is told nothing of modalities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_multimodal.text import FILE_NAME, files
from nnunet_multimodal.text.embeddings import ONE_HOT, TextEmbeddings
from nnunet_multimodal.text.find import find_embeddings

ANY = "any"  # the one "modality"


def find_organ_texts(text: str, beside: Path | None, organs: Sequence[str]) -> TextEmbeddings:
    """The embeddings [1, organs, E] that the setting ``text`` names; of a file with several modalities, their mean.

    Args:
        text: "one_hot", a file, or "auto": the file that ``nnunet_multimodal embed`` wrote, one_hot without it.
        beside: folder of the plans, where that command writes and where a bare file name is looked for.
        organs: their names, in the order wanted.

    Raises:
        EnvironmentProblem: the file is missing.
        UsageError: it has no row for an organ.
    """
    path = None
    if text == "auto" and beside is not None and (beside / FILE_NAME).is_file():
        path = beside / FILE_NAME
    elif text not in ("auto", ONE_HOT):
        path = Path(text)
        if not path.is_file() and not path.is_absolute() and beside is not None:
            path = beside / text
    if path is None or not path.is_file():
        return find_embeddings(ONE_HOT if text == "auto" else text, beside, (ANY,), organs)
    modalities = files.read(path, None, None).modalities or (ANY,)
    found = TextEmbeddings.from_file(path, modalities, organs)
    notes = found.notes
    if len(modalities) > 1:
        notes += (f"the mean of the texts of {', '.join(modalities)}: this network is told no modality",)
    return replace(
        found,
        embeddings=found.embeddings.mean(0, keepdim=True),
        modalities=(ANY,),
        prompts=found.prompts[:1] if len(modalities) == 1 else (),
        normalised=found.normalised and len(modalities) == 1,
        notes=notes,
    )
