"""Which embeddings a training uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_multimodal.errors import EnvironmentProblem
from nnunet_multimodal.text import FILE_NAME
from nnunet_multimodal.text.embeddings import TextEmbeddings


def find_embeddings(text: str, beside: Path | None, modalities: Sequence[str], labels: Sequence[str]) -> TextEmbeddings:
    """The embeddings that the setting ``text`` names.

    Args:
        text: "one_hot", a file, or "auto": the file that ``nnunet_multimodal embed`` wrote, one_hot without it.
        beside: folder of the plans, where that command writes and where a bare file name is looked for.
        modalities, labels: rows wanted, in this order.

    Raises:
        EnvironmentProblem: the file is missing.
    """
    if text == "auto":
        written = beside / FILE_NAME if beside is not None else None
        text = str(written) if written is not None and written.is_file() else "one_hot"
    if text == "one_hot":
        return TextEmbeddings.one_hot(modalities, labels)
    path = Path(text)
    if not path.is_file() and not path.is_absolute() and beside is not None:
        path = beside / text
    if not path.is_file():
        dataset = beside.name if beside is not None else "DATASET"
        raise EnvironmentProblem(
            f'text embeddings {path} not found. Make them: nnunet_multimodal embed {dataset}, or set "text" to '
            '"one_hot" in the plans\' section nnunet_multimodal.'
        )
    return TextEmbeddings.from_file(path, modalities, labels)
