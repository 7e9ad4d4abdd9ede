"""Labelled images of one contrast become the raw data set of a trainer.

crossmr   target, reference, and a scribble per organ. Target and reference are the same file: the trainer makes two
          appearances of it on the fly. The stored scribbles serve nnU-Net's own validation.
scribble  the image and a scribble per organ.
plain     the image alone, for the baselines.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunet_multimodal import __version__
from nnunet_multimodal.conversion import dataset
from nnunet_multimodal.conversion.cases import CheckedCase, check_case, note_what_is_absent, place_labels, read_case
from nnunet_multimodal.conversion.dataset import FILE_ENDING, Repairs
from nnunet_multimodal.conversion.images import Volume, write_like
from nnunet_multimodal.data.modality import ModalityTable
from nnunet_multimodal.data.scribbles import scribble_scale, simulate_label_scribbles
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import UsageError

SCRIBBLE_CHANNEL = "noNorm"  # the name is the normalisation: a scribble must stay 0 and 1


@dataclass(frozen=True)
class Layout:
    """What the channels of a data set are."""

    name: str
    images: tuple[str, ...]  # names of the channels that hold the image
    scribbles: bool  # whether one scribble channel per organ follows


def convert_crossmr(
    reference_images: Path,
    labels: Path,
    dataset_id: int,
    name: str,
    label_names: Mapping[str, int] | None = None,
    seed: int = 0,
    every: int = 1,
    repairs: Repairs = Repairs(),  # noqa: B008 (frozen)
    overwrite: bool = False,
) -> Path:
    """Make a CrossMR data set: 2 + K channels for K organs.

    Args:
        reference_images: folder of images of the reference contrast.
        labels: folder of their label maps, of the same names.
        dataset_id: XXX of DatasetXXX_Name.
        name: Name of DatasetXXX_Name.
        label_names: organ to id, 1..K; None takes the ids found in the labels and calls them class_1...
        seed: of the stored scribbles; a case gets the same scribble whatever other cases there are.
        every: scribble on every n-th slice of an organ.
        repairs: what may be put right in the input.
        overwrite: replace a data set of this id once the new one is complete.

    Returns:
        The folder of the data set.

    Raises:
        UsageError, EnvironmentProblem, DataProblem: nothing was written.
    """
    layout = Layout("crossmr", ("target", "reference"), scribbles=True)
    return _convert(layout, reference_images, labels, dataset_id, name, label_names, seed, every, repairs, overwrite)


def convert_scribble(
    images: Path,
    labels: Path,
    dataset_id: int,
    name: str,
    label_names: Mapping[str, int] | None = None,
    seed: int = 0,
    every: int = 1,
    repairs: Repairs = Repairs(),  # noqa: B008
    overwrite: bool = False,
    channel_name: str = "MR",
) -> Path:
    """Make a data set of the image and a scribble per organ: 1 + K channels; arguments as in convert_crossmr."""
    layout = Layout("scribble", (channel_name,), scribbles=True)
    return _convert(layout, images, labels, dataset_id, name, label_names, seed, every, repairs, overwrite)


def convert_plain(
    images: Path,
    labels: Path,
    dataset_id: int,
    name: str,
    label_names: Mapping[str, int] | None = None,
    repairs: Repairs = Repairs(),  # noqa: B008
    overwrite: bool = False,
    channel_name: str | None = None,
    modality: str | None = None,
    label_ids: Mapping[int, int] | None = None,
    unnamed_to_background: bool = False,
) -> Path:
    """Make a data set of the image alone; arguments as in convert_crossmr.

    With a ``modality``, a table that says that all cases are of it is written, and the channel is called so too unless
    it has a ``channel_name``. With ``label_ids`` (id in the label files -> id of ``label_names``) labels are rewritten;
    an id that it lacks is an error, or background with ``unnamed_to_background``.
    """
    channel = channel_name or modality or "MR"
    if modality is not None and channel.casefold() == "ct" != modality.casefold():
        raise UsageError(f"A channel named {channel!r} turns on CT clipping, for images that are {modality}.")
    layout = Layout("plain", (channel,), scribbles=False)
    return _convert(
        layout, images, labels, dataset_id, name, label_names, 0, 1, repairs, overwrite, modality, label_ids,
        unnamed_to_background,
    )  # fmt: skip


def _convert(
    layout: Layout,
    images: Path,
    labels: Path,
    dataset_id: int,
    name: str,
    label_names: Mapping[str, int] | None,
    seed: int,
    every: int,
    repairs: Repairs,
    overwrite: bool,
    modality: str | None = None,
    label_ids: Mapping[int, int] | None = None,
    unnamed_to_background: bool = False,
) -> Path:
    if every < 1:
        raise UsageError(f"--every counts slices and must be at least 1, found {every}.")
    raw = require_nnunet_path("nnUNet_raw")
    final = dataset.require_free(raw, dataset_id, name, overwrite)
    declared = None if label_names is None else dataset.declared_labels(label_names)
    allowed = None
    if declared is not None and not unnamed_to_background:
        allowed = frozenset(declared.values() if label_ids is None else label_ids)
    cases = dataset.find_cases(images, labels)
    dataset.require_outside(raw, dataset_id, (path for case in cases for path in (case.image, case.label)))
    check = functools.partial(check_case, allowed=allowed, repairs=repairs)
    checked = dataset.check_all(cases, check, "cases")
    if label_ids is not None:
        checked = [replace(case, ids=frozenset(label_ids.get(value, 0) for value in case.ids)) for case in checked]
    found = frozenset().union(*(case.ids for case in checked))
    if declared is None:
        declared = dataset.declared_labels({f"class_{value}": value for value in sorted(found - {0})})
    organs = dataset.organs_of(declared)
    note_what_is_absent(organs, checked)

    channels = [*layout.images, *([SCRIBBLE_CHANNEL] * len(organs) if layout.scribbles else [])]
    source = {
        "images": str(images.resolve()),
        "labels": str(labels.resolve()),
        **({"seed": seed, "every": every} if layout.scribbles else {}),
        **dataset.describe_repairs(repairs),
        "nnunet_multimodal": __version__,
    }
    own = {}
    if modality is not None:
        own = ModalityTable((modality,), {case.files.case: modality for case in checked}).section()
    with dataset.new_dataset(raw, dataset_id, name, overwrite) as folder:
        for case in tqdm(checked, desc=f"writing {final.name}", unit="case", disable=None):
            _write_case(folder, case, layout, [*organs.values()], seed, every, repairs, label_ids)
        dataset.write_dataset_json(folder, layout.name, channels, declared, len(checked), source, own)
    return final


def _write_case(
    folder: Path,
    checked: CheckedCase,
    layout: Layout,
    organs: Sequence[int],
    seed: int,
    every: int,
    repairs: Repairs,
    label_ids: Mapping[int, int] | None = None,
) -> None:
    """The image for each image channel, the label, and a scribble channel per organ."""
    files = checked.files
    image, label = None, None
    if checked.needs_writing or layout.scribbles or label_ids is not None:
        image, label = read_case(files, repairs)

    def channel(index: int) -> Path:
        return folder / "imagesTr" / f"{files.case}_{index:04d}{FILE_ENDING}"

    dataset.place_file(files.image, channel(0), image)
    for index in range(1, len(layout.images)):
        if channel(0).is_symlink():
            dataset.place_file(files.image, channel(index), None)
        else:  # written once, because it was repaired; the name alone still leads there after the folder is renamed
            dataset.link_or_copy(Path(channel(0).name), channel(index))
    target = folder / "labelsTr" / f"{files.case}{FILE_ENDING}"
    if label_ids is not None and label is not None:
        place_labels(files, target, label, label_ids)
    else:
        dataset.place_file(files.label, target, label)
    if layout.scribbles and image is not None and label is not None:
        scribbles = draw_scribbles(label, organs, seed, files.case, every)
        for index, organ in enumerate(organs, start=len(layout.images)):
            write_like(channel(index), scribbles == organ, image)


def draw_scribbles(
    label: Volume, organs: Sequence[int], seed: int, case: str, every: int = 1, style: str = "freeform"
) -> np.ndarray:
    """Scribbles [Z, Y, X] of a label map, drawn in the plane that a reader looks at: across the coarsest axis.

    The same seed and case name draw the same scribbles, whatever else is drawn before.
    """
    axis, scale = drawing_plane(label)
    rng = np.random.default_rng([seed, zlib.crc32(case.encode())])
    return simulate_label_scribbles(label.data, organs, rng, scale, every, axis, style)


def drawing_plane(label: Volume) -> tuple[int, float]:
    """The axis of [Z, Y, X] across which a reader looks at a volume, and the scale of strokes in its slices."""
    axis = int(np.argmax(np.round(label.spacing, 3)))  # the first, z, if they are equal
    return axis, scribble_scale([size for other, size in enumerate(label.data.shape) if other != axis])
