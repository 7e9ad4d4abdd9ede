"""Whole batches of one modality in turn (MulModSeg, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nnunet_multimodal.errors import UsageError


class Alternating:
    """Batches of each modality in a fixed order, again and again; each batch is one optimiser step.

    The paper takes as many rounds as its longer loader has batches and cycles the shorter one. Loaders that end are
    begun anew here; nnU-Net's never end, so there an epoch is as long as the trainer says.

    Args:
        loaders: modality -> batches, in the order of training.
        ratio: modality -> batches of it in a round; 1 where none is given.

    Raises:
        UsageError: a ratio of an unknown modality, or below 1.
    """

    def __init__(self, loaders: Mapping[str, Iterable[Any]], ratio: Mapping[str, int] | None = None) -> None:
        self.loaders = dict(loaders)
        self.round = rounds(list(loaders), ratio or {})
        self.iterators: dict[str, Iterator[Any]] = {}
        self.place = 0

    def start_at(self, step: int) -> None:
        """Go on as after ``step`` batches, so that a continued training has the order of one that was not stopped."""
        self.place = step % len(self.round)

    def __iter__(self) -> Alternating:
        return self

    def __next__(self) -> Any:
        modality = self.round[self.place]
        self.place = (self.place + 1) % len(self.round)
        if modality not in self.iterators:
            self.iterators[modality] = iter(self.loaders[modality])
        try:
            return next(self.iterators[modality])
        except StopIteration:
            self.iterators[modality] = iter(self.loaders[modality])
            return next(self.iterators[modality])

    def _finish(self) -> None:
        """Shut down the loaders' worker processes; nnU-Net's name for it."""
        for loader in self.loaders.values():
            if hasattr(loader, "_finish"):
                loader._finish()


def rounds(modalities: list[str], ratio: Mapping[str, int]) -> list[str]:
    """One round of training: each modality as often as its ratio, spread out evenly.

    Example:
        >>> rounds(["CT", "MR"], {})
        ['CT', 'MR']
        >>> rounds(["CT", "MR"], {"CT": 3})
        ['CT', 'MR', 'CT', 'CT']
    """
    for name, share in ratio.items():
        if name not in modalities:
            raise UsageError(f"sampling_ratio names {name!r}; the modalities are {', '.join(modalities)}.")
        if isinstance(share, bool) or not isinstance(share, int) or share < 1:
            raise UsageError(f"sampling_ratio of {name} has to be a whole number from 1 on, found {share!r}.")
    shares = {name: ratio.get(name, 1) for name in modalities}
    turns = [(turn / share, place, name) for place, (name, share) in enumerate(shares.items()) for turn in range(share)]
    return [name for _, _, name in sorted(turns)]
