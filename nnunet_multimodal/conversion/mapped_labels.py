"""A public data set's label ids as organs of MRSegmentator (data/label_maps.py), for the converters."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_multimodal.data.label_maps import find_label_map


@dataclass(frozen=True)
class MappedLabels:
    """What the ids of a data set's label files are.

    Attributes:
        labels: organ -> its id, the first if it has several, in the order of the 40 classes.
        further: each other id -> the organ that it is a part of, or "" for background.
    """

    labels: dict[str, int]
    further: dict[int, str]

    def declared(self) -> dict[str, int]:
        """The organs numbered from 1, as nnU-Net wants it."""
        return {organ: number for number, organ in enumerate(self.labels, start=1)}

    def ids(self) -> dict[int, int]:
        """Id in the files -> id of ``declared``, 0 for background."""
        numbers = self.declared()
        further = {value: numbers.get(organ, 0) for value, organ in self.further.items()}
        return {0: 0, **further, **{value: numbers[organ] for organ, value in self.labels.items()}}


def mapped_labels(name: str) -> MappedLabels:
    """The ids of the label map of this name.

    Raises:
        UsageError: there is none of this name.
    """
    found = find_label_map(name)
    ids = found.ids()
    further = {value: organ for organ, values in ids.items() for value in values[1:]}
    further |= {value: "" for value in found.left_out().values()}
    return MappedLabels({organ: values[0] for organ, values in ids.items()}, further)
