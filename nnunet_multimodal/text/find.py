"""Which embeddings a training uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_multimodal.errors import EnvironmentProblem, UsageError
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


def source_of(embeddings: TextEmbeddings) -> dict[str, Any]:
    """Where embeddings come from, for the plans of the result folder."""
    return {
        "encoder": embeddings.encoder,
        "template": embeddings.template,
        "checksum": embeddings.checksum,
    }


def agreeing(embeddings: TextEmbeddings, text: str, results: Path | None, configuration: str) -> TextEmbeddings:
    """The embeddings with which the folds of this model were trained before: they are predicted with together.

    Args:
        embeddings: what ``text`` names today.
        text: the setting. "auto" follows the other folds where they had one-hot codes.
        results: folder of the model, with its plans.json and fold_0, fold_1, ...; it need not exist.
        configuration: 2d, 3d_fullres, ...

    Raises:
        UsageError: there are trained folds, and they had another text.
    """
    if results is None or not (results / "plans.json").is_file() or not any(results.glob("fold_*/checkpoint_*.pth")):
        return embeddings
    plans = json.loads((results / "plans.json").read_text(encoding="utf-8"))
    before = plans["configurations"][configuration].get("nnunet_multimodal", {}).get("text_source", {})
    if before.get("checksum", embeddings.checksum) == embeddings.checksum:
        return embeddings
    one_hot = TextEmbeddings.one_hot(embeddings.modalities, embeddings.labels)
    if text == "auto" and before["checksum"] == one_hot.checksum:
        return one_hot
    raise UsageError(
        f"folds in {results} were trained with text of {before['encoder']} (template {before['template']}, checksum "
        f"{before['checksum'][:12]}); now it would be {embeddings.encoder} ({embeddings.template}, "
        f"{embeddings.checksum[:12]}), and the folds could not predict together. Bring the earlier embeddings back "
        '(nnunet_multimodal embed, or "text" in the plans\' section nnunet_multimodal), or move that folder away.'
    )
