"""Duke Liver Dataset (https://doi.org/10.5281/zenodo.7774566): liver masks on many MR contrasts of 105 patients.

Expects Segmentation/<patient>/<series>/{images,masks}/*.dicom (also Segmentation/Segmentation/..., as the zip unpacks),
and beside it SegmentationKey.csv (DLDS, Series, Label) and SequenceTypes.csv (Label, Series Description, SeriesMap),
which say what each series is. Without --contrast the contrasts found are listed.

    python dataset_conversion/duke_liver.py DukeLiver -o duke_t1 --contrast pre -d 602
"""

from __future__ import annotations

import csv
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_multimodal.conversion.dicom import read_series, stack_masks, write_pair
from nnunet_multimodal.conversion.script import WriteCase, finish, make_parser, run_script
from nnunet_multimodal.errors import DataProblem, UsageError

LABELS = {"liver": 1}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__, default_name="DukeLiver")
    parser.add_argument("--contrast", nargs="+", metavar="NAME", help="names in SequenceTypes.csv, or all")
    args = parser.parse_args(argv)
    contrasts = read_contrasts(args.root)
    if args.contrast is None:
        counts = Counter(contrasts.values())
        listed = ", ".join(f"{'/'.join(names)} ({count})" for names, count in sorted(counts.items()))
        raise UsageError(f"Which contrast? Pass --contrast with some of: {listed}; or all.")
    return finish(args, find_cases(args.root, args.contrast, contrasts), LABELS)


def read_contrasts(root: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """(patient, series) -> what the series is called: its label, and its names in SequenceTypes.csv."""
    names = {}
    if (root / "SequenceTypes.csv").exists():
        for row in _read_csv(root / "SequenceTypes.csv", "Label"):
            names[row["Label"]] = tuple(filter(None, (row.get("SeriesMap"), row.get("Series Description"))))
    return {
        (row["DLDS"].zfill(4), row["Series"]): (row["Label"], *names.get(row["Label"], ()))
        for row in _read_csv(root / "SegmentationKey.csv", "DLDS", "Series", "Label")
    }


def _read_csv(path: Path, *columns: str) -> list[dict[str, str]]:
    if not path.exists():
        raise DataProblem(f"{path} is missing. Download it from the record of the data set.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise DataProblem(f"{path} lacks the column {missing[0]}; found {', '.join(reader.fieldnames or [])}.")
        return [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]


def find_cases(
    root: Path, wanted: Sequence[str], contrasts: dict[tuple[str, str], tuple[str, ...]]
) -> dict[str, WriteCase]:
    """Case ids are ``duke0001_3``: patient and series; the patient first, so that splits can keep them together."""
    known = {name.lower() for names in contrasts.values() for name in names} | {"all"}
    unknown = [name for name in wanted if name.lower() not in known]
    if unknown:
        raise UsageError(f"Unknown contrast '{unknown[0]}'; run without --contrast to see the known ones.")
    chosen = {name.lower() for name in wanted}
    cases: dict[str, WriteCase] = {}
    for (patient, series), names in sorted(contrasts.items()):
        if "all" in chosen or chosen & {name.lower() for name in names}:
            folder = _series_folder(root, patient, series)
            cases[f"duke{patient}_{series}"] = functools.partial(write_case, folder)
    return cases


def _series_folder(root: Path, patient: str, series: str) -> Path:
    nested = root / "Segmentation" / "Segmentation" / patient / series
    return nested if nested.is_dir() else root / "Segmentation" / patient / series


def write_case(folder: Path, image: Path, label: Path) -> None:
    series = read_series(folder / "images")
    mask = stack_masks(series, folder / "masks")
    values = np.unique(mask)
    if len(values) > 2 or values[0] != 0:
        found = ", ".join(map(str, values[:10]))
        raise DataProblem(f"{folder / 'masks'} has values {found}, expected 0 and one for the liver.")
    write_pair(series, mask > 0, image, label)


if __name__ == "__main__":
    run_script(main)
