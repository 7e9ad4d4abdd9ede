"""Text embeddings: a code for every pair of modality and class, which conditions the network's last layers.

``TextEmbeddings`` is imported with torch only when it is asked for; names and templates need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnunet_multimodal.text.names import output_names
from nnunet_multimodal.text.templates import TEMPLATES

if TYPE_CHECKING:
    from nnunet_multimodal.text.embeddings import TextEmbeddings

FILE_NAME = "text_embeddings.npz"  # in nnUNet_preprocessed/DatasetXXX_Name, beside the plans

__all__ = ["FILE_NAME", "TEMPLATES", "TextEmbeddings", "output_names"]


def __getattr__(name: str) -> Any:
    if name != "TextEmbeddings":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from nnunet_multimodal.text.embeddings import TextEmbeddings

    return TextEmbeddings
