"""A code for every (modality, class): fixed numbers that tell the network's head what to look for, and in what.

Source: MulModSeg, e_txt of θ_k = MLP(e_txt^k ⊕ e_vis) (methods.md, 2.1). Raw CLIP features there, not normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.text import files
from nnunet_multimodal.text.names import BACKGROUND, find_row
from nnunet_multimodal.text.templates import make_prompts, modality_words, require_known_words

ONE_HOT = "one_hot"
_SAME = 1e-6  # of a row's length: closer rows cannot be told apart in float32


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Embeddings with the names of their rows.

    Attributes:
        embeddings: [M, C, E] float32, on the CPU.
        modalities: M names.
        labels: C names in the order of the network's outputs (background first, then by id).
        template: the template of the prompts; None for codes that are no text, or where it is not known.
        encoder: what made them, such as ``ViT-B-32/openai`` or ``one_hot``.
        normalised: whether each row has length 1 (a row of zeros stays zero).
        prompts: [M][C] the encoded text; empty where it is not known.
        notes: what a user should know about how they were made.

    Raises:
        DataProblem: the shape does not fit the names, a value is not finite, or two classes of a modality have the
            same row, so that no head could tell them apart.
    """

    embeddings: Tensor
    modalities: tuple[str, ...]
    labels: tuple[str, ...]
    template: str | None
    encoder: str
    normalised: bool
    prompts: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, names in (("modality", self.modalities), ("label", self.labels)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice or not names or "" in names:
                raise DataProblem(f"text embeddings need a distinct name for each {what}, found {[*names]}.")
        shape = (len(self.modalities), len(self.labels))
        if self.embeddings.ndim != 3 or tuple(self.embeddings.shape[:2]) != shape or self.embeddings.shape[2] == 0:
            raise DataProblem(f"text embeddings must be {[*shape, 'E']}, found {[*self.embeddings.shape]}.")
        if self.embeddings.dtype != torch.float32:
            raise DataProblem(f"text embeddings must be float32, found {self.embeddings.dtype}.")
        for modality, rows in zip(self.modalities, self.embeddings):
            for label, row in zip(self.labels, rows):
                bad = int((~torch.isfinite(row)).sum())
                if bad:
                    raise DataProblem(
                        f"the embedding of '{label}' in {modality} ({self.encoder}) has {bad} of {len(row)} values "
                        "that are NaN or infinite. Make it again."
                    )
            self._refuse_equal_rows(modality, rows)

    def _refuse_equal_rows(self, modality: str, rows: Tensor) -> None:
        distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        same = torch.triu(distance <= _SAME * rows.norm(dim=1).max(), diagonal=1).nonzero().tolist()
        if same:
            first, second = (self.labels[index] for index in same[0])
            raise DataProblem(
                f"'{first}' and '{second}' have the same embedding in {modality} ({self.encoder}), so the network "
                "could not tell them apart. Give each its own words or row: --words NAME='its words'"
            )

    # --- making ------------------------------------------------------------------------------------------------------

    @classmethod
    def one_hot(cls, modalities: Sequence[str], labels: Sequence[str]) -> TextEmbeddings:
        """The identity: E = M * C, and row (m, c) is 1 at m * C + c. Needs no text encoder and no file."""
        shape = (len(modalities), len(labels))
        codes = torch.eye(shape[0] * shape[1]).reshape(*shape, -1)
        return cls(codes, tuple(modalities), tuple(labels), None, ONE_HOT, True)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        modalities: Sequence[str],
        labels: Sequence[str],
        names: str | Path | None = None,
        *,
        file_modalities: Sequence[str] | None = None,
        words: Mapping[str, str] | None = None,
        normalise: bool = False,
        expected_dimension: int | None = None,
    ) -> TextEmbeddings:
        """The rows that are asked for, picked by name out of a file that may hold others, in any order.

        A class without a row is an error, but for the background: it gets zeros. No sentence describes it, zeros say
        nothing about any organ, and the bias of the layer that reads them is then its own learnt code. A tensor
        [C, E] has no modalities: all get the same rows, and ``notes`` says so.

        Args:
            path: .npz or .safetensors that :meth:`save` wrote, or a bare tensor [C, E] or [M, C, E] as .pth or .pt.
            modalities: the modalities wanted.
            labels: the classes wanted, as the network's outputs.
            names: for a bare tensor, the text file with a name a row; None looks for it beside the tensor.
            file_modalities: for a bare tensor [M, C, E], its modalities in the order of the file.
            words: the file's name for single labels or modalities, where it is another: {"aorta": "Arota"}.
            normalise: scale each row to length 1.
            expected_dimension: the E that the network was built for.

        Raises:
            UsageError: the file is missing or of another kind, a class or modality is not in it, or E is not the
                expected one (faults.md 33).
            DataProblem: it is damaged, changed, holds more than tensors, or its numbers are unfit.
        """
        path, words = Path(path), words or {}
        require_known_words(words, modalities, labels)
        content = files.read(path, None if names is None else Path(names), file_modalities)
        has_background = any(name.casefold() == BACKGROUND for name in content.labels)
        columns: list[int | None] = []
        hint = "Say which row is meant: --words {name}='{near}'"
        for label in labels:
            if label == BACKGROUND and label not in words and not has_background:
                columns.append(None)
            else:
                columns.append(_find_wanted(label, words, content.labels, "embedding", str(path), hint))
        if content.modalities is None:
            rows = [0] * len(modalities)
        else:
            hint = "Modalities have to be those of the file, or: --words {name}='{near}'"
            # MR is MRI, but T1w is not T2w: compared as written, then by what they stand for
            ways = (str, lambda name: modality_words(name).casefold())
            rows = [
                _find_wanted(name, words, content.modalities, "modality", str(path), hint, ways) for name in modalities
            ]
        zeros = torch.zeros(content.embeddings.shape[2])
        picked = torch.stack(
            [torch.stack([zeros if c is None else content.embeddings[m, c] for c in columns]) for m in rows]
        )
        prompts: tuple[tuple[str, ...], ...] = ()
        if content.prompts:
            prompts = tuple(tuple("" if c is None else content.prompts[m][c] for c in columns) for m in rows)
        found = cls(
            picked,
            tuple(modalities),
            tuple(labels),
            content.template,
            content.encoder,
            content.normalised,
            prompts,
            (*content.notes, *_notes_on_rows(content, modalities, labels, columns)),
        )
        if expected_dimension is not None:
            found.require_dimension(expected_dimension)
        return found.normalise() if normalise else found

    @classmethod
    def from_open_clip(
        cls,
        modalities: Sequence[str],
        labels: Sequence[str],
        encoder: str = "ViT-B-32",
        pretrained: str | None = "openai",
        template: str = "V3",
        *,
        words: Mapping[str, str] | None = None,
        checkpoint: str | Path | None = None,
        normalise: bool = False,
    ) -> TextEmbeddings:
        """Prompts encoded by a CLIP model; downloads its weights once, if they are not on this computer.

        Args:
            modalities: written out in the prompts: CT -> computed tomography.
            labels: the classes; underscores become spaces.
            encoder: a model of open_clip, ``biomedclip``, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``.
            pretrained: the tag of its weights in open_clip; None takes openai's, or the only ones.
            template: ``V1``, ``V2``, ``V3`` of the paper's Table 1, or a text with {organ} and {modality}.
            words: other words for single labels or modalities: {"postcava": "inferior vena cava"}.
            checkpoint: a file with the weights, used instead of a download.
            normalise: scale each row to length 1; the reference code does not.

        Raises:
            UsageError: the encoder, weights or template do not exist, or a prompt is empty (faults.md 33).
            EnvironmentProblem: open_clip or the weights are missing and cannot be downloaded (faults.md 34).
            DataProblem: the checkpoint is damaged or of another model.
        """
        from nnunet_multimodal.text.clip import encode

        prompts = make_prompts(template, modalities, labels, words)
        distinct = [*dict.fromkeys(prompt for of_modality in prompts for prompt in of_modality)]
        encoded = encode(distinct, encoder, pretrained, checkpoint)
        position = {prompt: index for index, prompt in enumerate(distinct)}
        rows = torch.tensor([[position[prompt] for prompt in of_modality] for of_modality in prompts])
        notes = encoded.notes
        if len(modalities) > 1 and len(set(prompts)) == 1:
            notes += (f"the template names no modality: {', '.join(modalities)} share their embeddings",)
        made = cls(
            encoded.features[rows], tuple(modalities), tuple(labels), template, encoded.encoder, False, prompts, notes
        )
        return made.normalise() if normalise else made

    # --- using -------------------------------------------------------------------------------------------------------

    @property
    def checksum(self) -> str:
        """sha256 of the numbers, their names and where they come from."""
        return files.checksum(self)

    @property
    def dimension(self) -> int:
        """E."""
        return int(self.embeddings.shape[2])

    def save(self, path: str | Path) -> None:
        """Write .npz or .safetensors, whole or not at all."""
        files.write(Path(path), self)

    def require_dimension(self, expected: int) -> None:
        """
        Raises:
            UsageError: E is another one (faults.md 33).
        """
        if self.dimension != expected:
            raise UsageError(
                f"the text embeddings ({self.encoder}) have the wrong length: found {self.dimension}, expected "
                f"{expected}. Take those that the network was built with, or train it anew."
            )

    def normalise(self) -> TextEmbeddings:
        """Each row at length 1; a row of zeros stays zero."""
        length = self.embeddings.norm(dim=2, keepdim=True)
        scaled = torch.where(length > 0, self.embeddings / length.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        return replace(self, embeddings=scaled, normalised=True)

    def cosines(self) -> Tensor:
        """[M, C, M, C] cosine of the angle between any two rows; NaN where a row is zero."""
        unit = self.normalise().embeddings
        unit = torch.where(unit.norm(dim=2, keepdim=True) > 0, unit, torch.nan)
        return torch.einsum("mce,nde->mcnd", unit.double(), unit.double()).clamp(-1, 1)


def _find_wanted(
    name: str,
    words: Mapping[str, str],
    rows: Sequence[str],
    what: str,
    where: str,
    hint: str,
    ways: Sequence[Callable[[str], Any]] | None = None,
) -> int:
    """:func:`find_row`, under the name that the user says the row has, if any."""
    if not words.get(name, name).strip():
        raise UsageError(f"--words {name}= is empty; expected the name of a row of {where}.")
    return find_row(words.get(name, name), rows, what, where, hint.replace("{name}", name), ways)


def _notes_on_rows(
    content: files.Content, modalities: Sequence[str], labels: Sequence[str], columns: Sequence[int | None]
) -> tuple[str, ...]:
    notes = []
    renamed = [
        f"{label} = '{content.labels[c]}'"
        for label, c in zip(labels, columns)
        if c is not None and content.labels[c] != label
    ]
    if renamed:
        notes.append(f"rows by another name: {', '.join(renamed)}")
    if None in columns:
        notes.append("the file has no background: its embedding is zeros")
    if content.modalities is None and len(modalities) > 1:
        notes.append(f"the file has no modalities: {', '.join(modalities)} share their embeddings")
    return tuple(notes)
