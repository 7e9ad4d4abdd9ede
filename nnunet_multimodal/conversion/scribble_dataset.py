"""Images and scribbles become a raw data set in which nnU-Net's ``ignore`` label is what nobody drew on (contract 5).

Scribble files are label maps in which one value means "not drawn on": 4, 255, or the 0 of ITK-SNAP, where background
then has a label of its own. The data set has background 0, the classes 1..K, and ignore K+1. Dense label maps, where
there are any, go to ``labelsTr_dense``: no training reads them, they only judge what was learnt from the scribbles.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_multimodal import __version__
from nnunet_multimodal.conversion import dataset
from nnunet_multimodal.conversion.channel_files import find_channel_files
from nnunet_multimodal.conversion.dataset import FILE_ENDING, Repairs, first_names
from nnunet_multimodal.conversion.images import (
    Volume,
    check_label_values,
    check_not_constant,
    compare_geometry,
    read_labels,
    read_volume,
    refuse_outside_body,
    write_like,
)
from nnunet_multimodal.conversion.mixed import doubt_modality
from nnunet_multimodal.conversion.registration import LOWEST_OVERLAP, body_overlap
from nnunet_multimodal.data.modality import ModalityTable
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import DataProblem, UsageError

log = logging.getLogger(__name__)

LAYOUT = "weak_scribbles"
DENSE = "labelsTr_dense"  # the trainers look for it there when training has ended
COVERAGE = "coverage.json"
MAX_BACKGROUND_AS_UNLABELLED = 0.9  # real scribbles leave more than that out; dense labels of organs never do


@dataclass(frozen=True)
class ScribbledFiles:
    """The files of one case.

    Attributes:
        case: its name.
        images: one file per channel.
        scribbles: label map with the unlabelled value.
        dense: label map without it, where there is one.
    """

    case: str
    images: tuple[Path, ...]
    scribbles: Path
    dense: Path | None = None


@dataclass(frozen=True)
class Legend:
    """What the values in the files mean.

    Attributes:
        unlabelled: nobody drew there.
        background: drawn background in the scribble files; None where background has no value, so nobody drew it.
        classes: name -> its values, the same in scribbles and dense labels, in the order of the data set; None takes
            what is found.
        also_background: values of what is no class of the data set: background, in scribbles and dense labels.
        unnamed_to_background: so are all values that no class has; otherwise they are an error.
    """

    unlabelled: int
    background: int | None = 0
    classes: Mapping[str, tuple[int, ...]] | None = None
    also_background: frozenset[int] = frozenset()
    unnamed_to_background: bool = False

    def __post_init__(self) -> None:
        if self.unlabelled == self.background:
            raise UsageError(
                f"{self.unlabelled} cannot be both what nobody drew on and drawn background. Which label has the drawn "
                "background? Pass it as --background-label N; if nobody drew background, pass --no-background."
            )
        for name, values in (self.classes or {}).items():
            for value in values:
                if value in (self.unlabelled, self.background):
                    what = "--unlabelled" if value == self.unlabelled else "drawn background"
                    raise UsageError(f"{name} cannot be {value}, which is {what}.")

    @property
    def others(self) -> set[int]:
        """The values in scribble files that are no class."""
        return {self.unlabelled} if self.background is None else {self.unlabelled, self.background}

    def of_scribbles(self, data: np.ndarray) -> np.ndarray:
        """The array with one value per class, the first that it has."""
        return self._merged(data, self.others, self.background)

    def of_dense(self, data: np.ndarray) -> np.ndarray:
        """The same of a dense label map, with background as in the scribbles (0 if those have none)."""
        background = self.background or 0
        merged = self._merged(data, {0}, background)
        return np.where(data == 0, background, merged) if background else merged

    def _merged(self, data: np.ndarray, others: set[int], background: int | None) -> np.ndarray:
        if self.classes is None:
            return data
        merged = data
        for first, *more in self.classes.values():
            if more and np.isin(data, more).any():
                merged = np.where(np.isin(data, more), first, merged)
        if background is not None and (self.unnamed_to_background or self.also_background):
            named = {value for values in self.classes.values() for value in values} | others
            rest = ~np.isin(data, [*named]) if self.unnamed_to_background else np.isin(data, [*self.also_background])
            merged = np.where(rest, background, merged)
        return merged


@dataclass
class _Counts:
    """Voxels of one case by value in the files, several of a class counted as its first.

    ``hit``, ``drawn_on_dense`` and ``dense`` are empty where there is no dense label map.
    """

    drawn: Counter[int]
    hit: Counter[int] = field(default_factory=Counter)  # drawn as what the dense map says
    drawn_on_dense: Counter[int] = field(default_factory=Counter)
    dense: Counter[int] = field(default_factory=Counter)
    doubts: list[str] = field(default_factory=list)
    overlap: dict[str, float] = field(default_factory=dict)  # of the body in each further channel with the first


def find_scribbled_cases(images: Mapping[str, Path], scribbles: Path, dense: Path | None) -> list[ScribbledFiles]:
    """Pair images, scribbles and dense labels by case name; only dense labels may be there for some cases alone.

    Args:
        images: folder of each channel.
        scribbles, dense: folders of label maps, named as the cases are.

    Raises:
        UsageError, DataProblem: as find_channel_files; images and scribbles do not pair up; dense labels of no case.
    """
    channels = find_channel_files(images)
    drawn = dataset.find_files(scribbles, "scribble")
    unmarked, orphans = sorted(channels.keys() - drawn.keys()), sorted(drawn.keys() - channels.keys())
    if unmarked or orphans:
        lines = [f"Images and the scribbles in {scribbles} do not pair up; a scribble file has its case's name."]
        if unmarked:
            lines.append(f"  {len(unmarked)} images without a scribble file: {first_names(unmarked)}")
        if orphans:
            lines.append(f"  {len(orphans)} scribble files without an image: {first_names(orphans)}")
        raise DataProblem("\n".join([*lines, "Add, rename or take away files until both agree."]))
    known = dataset.find_files(dense, "dense label") if dense is not None else {}
    strange = sorted(known.keys() - channels.keys())
    if strange:
        raise DataProblem(f"{len(strange)} dense labels in {dense} without an image: {first_names(strange)}.")
    return [ScribbledFiles(case, files, drawn[case], known.get(case)) for case, files in sorted(channels.items())]


def import_scribbles(
    cases: Sequence[ScribbledFiles],
    channels: Sequence[str],
    legend: Legend,
    dataset_id: int,
    name: str,
    repairs: Repairs = Repairs(),  # noqa: B008 (frozen)
    overwrite: bool = False,
    keep_empty: bool = False,
    allow_outside_body: bool = False,
    allow_unregistered: bool = False,
    strict: bool = False,
    patients: Mapping[str, str] | None = None,
    source: Mapping[str, Any] | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Make a data set out of images and scribbles.

    Args:
        cases: from :func:`find_scribbled_cases`.
        channels: name of each image of a case; "CT" makes nnU-Net clip that channel to the CT window.
        legend: what the values in the files mean.
        dataset_id: XXX of DatasetXXX_Name.
        name: Name of DatasetXXX_Name.
        repairs: what may be put right in the input.
        overwrite: replace a data set of this id once the new one is complete.
        keep_empty: also take cases that nobody drew on; otherwise they are left out and named (faults.md 26).
        allow_outside_body: a class may be drawn where there is nothing but air (faults.md 27).
        allow_unregistered: the channels of a case may show bodies that do not lie on each other.
        strict: an image that does not look like its channel is an error instead of a warning (faults.md 21).
        patients: case -> patient, for splits that keep a patient together; data sets of one channel only.
        source: further entries for the record in dataset.json.

    Returns:
        The folder of the data set, and what was written to coverage.json in it.

    Raises:
        UsageError, EnvironmentProblem, DataProblem: nothing was written.
    """
    raw = require_nnunet_path("nnUNet_raw")
    final = dataset.require_free(raw, dataset_id, name, overwrite)
    for files in cases:
        dense = [] if files.dense is None else [files.dense]
        dataset.require_outside(raw, dataset_id, [*files.images, files.scribbles, *dense])
    if patients and len(channels) > 1:
        raise UsageError("Patients can be told for data sets of one channel only.")

    def check(files: ScribbledFiles) -> _Counts:
        return _check_case(files, channels, legend, repairs, allow_outside_body, allow_unregistered)

    results = dict(zip((files.case for files in cases), dataset.check_all(cases, check, "cases")))
    doubts = [doubt for counts in results.values() for doubt in counts.doubts]
    if doubts and strict:
        raise DataProblem(dataset.numbered("Nothing was written.", doubts))
    for doubt in doubts[: dataset.LISTED]:
        log.warning("warning: %s", doubt)

    _require_unlabelled(results.values(), legend, cases[0].scribbles.parent)
    classes = _classes(legend, results.values())
    _require_drawn(results, classes, legend)
    empty = [case for case, counts in results.items() if not _is_drawn_on(counts, legend)]
    kept = [files for files in cases if keep_empty or files.case not in empty]
    if empty:
        fate = "kept" if keep_empty else "left out"
        log.warning("note: %d cases that nobody drew on are %s: %s", len(empty), fate, first_names(empty))

    numbers = {name: number for number, name in enumerate(classes, start=1)}
    labels = dataset.declared_labels({**numbers, "ignore": len(classes) + 1})
    of_class = {value: numbers[name] for name, values in classes.items() for value in values}
    ids = {legend.unlabelled: labels["ignore"], **of_class}  # what has none becomes background
    report = _report({files.case: results[files.case] for files in kept}, classes, legend, empty)
    record = {
        **(source or {}),
        "values": {
            "unlabelled": legend.unlabelled,
            **({} if legend.background is None else {"background": legend.background}),
            **{key: values[0] if len(values) == 1 else [*values] for key, values in classes.items()},
        },
        **dataset.describe_repairs(repairs),
        "nnunet_multimodal": __version__,
    }
    own = {}
    if patients:
        of_kept = {files.case: patients[files.case] for files in kept}
        own = ModalityTable((channels[0],), dict.fromkeys(of_kept, channels[0]), of_kept).section()
    with dataset.new_dataset(raw, dataset_id, name, overwrite) as folder:
        for files in tqdm(kept, desc=f"writing {final.name}", unit="case", disable=None):
            _write_case(folder, files, ids, of_class, repairs)
        dataset.write_json(folder / COVERAGE, report)
        dataset.write_dataset_json(folder, LAYOUT, channels, labels, len(kept), record, own)
    return final, report


# --- one case --------------------------------------------------------------------------------------------------------


def _read_case(files: ScribbledFiles, repairs: Repairs) -> tuple[list[Volume], Volume, Volume | None]:
    """Images, scribbles and dense labels on one grid, with the repairs that were allowed."""
    images = [read_volume(path, repairs.nan_to, repairs.reorthonormalize) for path in files.images]
    first = images[0]

    def fitted(volume: Volume, what: str) -> Volume:
        return compare_geometry(first, volume, what, repairs.allow_affine_mismatch, repairs.fix_header)

    images[1:] = [fitted(image, "channel") for image in images[1:]]
    scribbles = fitted(read_labels(files.scribbles, repairs.reorthonormalize), "scribble")
    dense = None
    if files.dense is not None:
        dense = fitted(read_labels(files.dense, repairs.reorthonormalize), "dense label")
    return images, scribbles, dense


def _check_case(
    files: ScribbledFiles,
    channels: Sequence[str],
    legend: Legend,
    repairs: Repairs,
    allow_outside_body: bool,
    allow_unregistered: bool,
) -> _Counts:
    images, scribbles, dense = _read_case(files, repairs)
    overlap = {name: round(body_overlap(images[0], image), 3) for name, image in zip(channels[1:], images[1:])}
    for name, value in overlap.items():
        if value < LOWEST_OVERLAP and not allow_unregistered:
            raise DataProblem(
                f"case {files.case}: the bodies in {channels[0]} and {name} overlap by {value:.2f} (Dice), expected "
                f"{LOWEST_OVERLAP} or more. Register {files.images[channels.index(name)]} to {files.images[0]}; "
                "--allow-unregistered takes them as they are, for images that show different parts of the patient."
            )
    doubts = []
    for name, image in zip(channels, images):
        check_not_constant(image)
        doubt = doubt_modality(name, image)
        doubts += [f"case {files.case}: {doubt}"] if doubt else []
    _check_values(scribbles, legend.others, legend)
    marks = legend.of_scribbles(scribbles.data)
    if not allow_outside_body:
        names = {values[0]: name for name, values in (legend.classes or {}).items()}
        refuse_outside_body(replace(scribbles, data=marks), ~np.isin(marks, [*legend.others]), images, names)
    counts = _Counts(_count(marks), doubts=doubts, overlap=overlap)
    if dense is not None:
        _check_values(dense, {0}, legend)
        truth = legend.of_dense(dense.data)
        drawn = marks != legend.unlabelled
        counts.dense = _count(truth)
        counts.drawn_on_dense = _count(marks[drawn])
        counts.hit = _count(marks[drawn & (marks == truth)])
    return counts


def _check_values(volume: Volume, others: set[int], legend: Legend) -> None:
    """Rows 23 and 24; ``others`` may be there beside the classes."""
    if legend.classes is not None and not legend.unnamed_to_background:
        allowed = {value for values in legend.classes.values() for value in values} | others | legend.also_background
    else:
        values = np.unique(volume.data)
        lowest = 0 if legend.unnamed_to_background else 1  # 0 is never a class
        allowed = {int(value) for value in values if value >= lowest and value == np.rint(value)} | others
        if 255 not in others and set(values.tolist()) == {0, 255}:
            allowed.discard(255)
    try:
        check_label_values(volume, allowed)
    except DataProblem as problem:
        for value in (0, 255):
            if value not in others and (volume.data == value).any():
                hint = f"If {value} is what nobody drew on, pass --unlabelled {value}"
                hint += "." if value else "; if it is background that was drawn, --background-label 0."
                raise DataProblem(f"{problem} {hint}") from problem
        raise


def _count(data: np.ndarray) -> Counter[int]:
    values, counts = np.unique(data, return_counts=True)
    return Counter(dict(zip(map(int, values), map(int, counts))))


def _write_case(
    folder: Path, files: ScribbledFiles, ids: Mapping[int, int], of_class: Mapping[int, int], repairs: Repairs
) -> None:
    images, scribbles, dense = _read_case(files, repairs)
    for index, (path, image) in enumerate(zip(files.images, images)):
        dataset.place_file(path, folder / "imagesTr" / f"{files.case}_{index:04d}{FILE_ENDING}", image)
    _place_labels(folder / "labelsTr" / f"{files.case}{FILE_ENDING}", scribbles, ids)
    if dense is not None:
        (folder / DENSE).mkdir(exist_ok=True)
        _place_labels(folder / DENSE / f"{files.case}{FILE_ENDING}", dense, of_class)


def _place_labels(target: Path, volume: Volume, ids: Mapping[int, int]) -> None:
    """The label map with the ids of the data set, 0 for values that have none; linked where it has them already."""
    mapped = np.zeros(volume.data.shape, dtype=np.uint8 if max(ids.values()) < 256 else np.uint16)
    for value, number in ids.items():
        mapped[volume.data == value] = number
    if np.array_equal(mapped, volume.data):
        dataset.place_file(volume.path, target, volume)
    else:
        write_like(target, mapped, volume)


# --- all cases -------------------------------------------------------------------------------------------------------


def _is_drawn_on(counts: _Counts, legend: Legend) -> bool:
    return any(value != legend.unlabelled for value in counts.drawn)


def _require_unlabelled(results: Iterable[_Counts], legend: Legend, folder: Path) -> None:
    """A wrong ``unlabelled`` would make dense labels of scribbles."""
    total = _sum(counts.drawn for counts in results)
    if total[legend.unlabelled]:
        return
    found = ", ".join(str(value) for value in sorted(total)[: dataset.LISTED])
    hint = "If the files are dense labels, take `nnunet_multimodal scribbles simulate` or `convert plain`."
    if total[0] > MAX_BACKGROUND_AS_UNLABELLED * sum(total.values()):
        share = total[0] / sum(total.values())
        hint = f"0 fills {share:.1%} of the voxels: if nobody drew there, pass --unlabelled 0 --background-label N."
    raise DataProblem(f"No file in {folder} has the unlabelled value {legend.unlabelled}; found {found}. {hint}")


def _classes(legend: Legend, results: Iterable[_Counts]) -> Mapping[str, tuple[int, ...]]:
    """Name -> values in the files, in the order of the data set."""
    if legend.classes is not None:
        return legend.classes
    found = sorted({value for counts in results for value in counts.drawn + counts.dense} - legend.others - {0})
    gaps = sorted(set(range(1, max(found, default=0))) - set(found) - legend.others)
    if gaps:
        raise DataProblem(
            f"Label ids have gaps: found {first_names([*map(str, found)])}, but not {first_names([*map(str, gaps)])}. "
            "Is one of them the unlabelled value, or a slip? Name those that are meant with --label-names."
        )
    return {f"class_{number}": (value,) for number, value in enumerate(found, start=1)}


def _require_drawn(results: Mapping[str, _Counts], classes: Mapping[str, tuple[int, ...]], legend: Legend) -> None:
    """Every class and the background have to be drawn somewhere, or nothing says what they are."""
    if not any(_is_drawn_on(counts, legend) for counts in results.values()):
        raise DataProblem(
            f"Nobody drew on any of the {len(results)} cases: all voxels are {legend.unlabelled}. "
            "Is that the unlabelled value? Pass the right one as --unlabelled."
        )
    drawn = _sum(counts.drawn for counts in results.values())
    never = [f"{name} ({values[0]})" for name, values in classes.items() if not drawn[values[0]]]
    if never:
        raise DataProblem(
            f"{first_names(never)}: drawn in no case. What was never drawn cannot be learnt; draw it, or leave its "
            "name out."
        )
    if not classes:
        raise DataProblem("No class is drawn in any case, only background. Draw what is to be segmented.")
    if legend.background is not None and not drawn[legend.background]:
        raise DataProblem(
            f"background ({legend.background}) is drawn in no case. Without background scribbles everything becomes "
            "foreground. Draw some, name their label as --background-label N, or pass --no-background to go without."
        )
    if legend.background is None:
        log.warning("warning: nobody drew background; without such scribbles everything tends to become foreground.")


def _report(
    results: Mapping[str, _Counts], classes: Mapping[str, tuple[int, ...]], legend: Legend, empty: Sequence[str]
) -> dict[str, Any]:
    """What coverage.json holds: shares between 0 and 1, per class over all cases, and per case."""
    named = {} if legend.background is None else {"background": legend.background}
    named |= {name: values[0] for name, values in classes.items()}
    overlaps = {case: counts.overlap for case, counts in results.items()}
    return {
        "classes": _shares([*results.values()], named),
        "cases": {case: _shares([counts], named) for case, counts in results.items()},
        **({"body_overlap": overlaps} if any(overlaps.values()) else {}),
        "not_drawn_on": [*empty],
    }


def _shares(results: Sequence[_Counts], named: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Per class: voxels drawn, their share of all voxels; with dense labels, of the class, and drawn rightly."""

    drawn = _sum(counts.drawn for counts in results)
    dense = _sum(counts.dense for counts in results)
    hit, on_dense = _sum(counts.hit for counts in results), _sum(counts.drawn_on_dense for counts in results)
    shares: dict[str, dict[str, Any]] = {}
    for name, value in named.items():
        of_class: dict[str, Any] = {"voxels": drawn[value], "of_all": round(drawn[value] / max(1, drawn.total()), 6)}
        if dense.total():
            of_class["of_class"] = round(hit[value] / dense[value], 6) if dense[value] else None
            of_class["right"] = round(hit[value] / on_dense[value], 6) if on_dense[value] else None
        shares[name] = of_class
    return shares


def _sum(counters: Iterable[Counter[int]]) -> Counter[int]:
    return sum(counters, Counter())
