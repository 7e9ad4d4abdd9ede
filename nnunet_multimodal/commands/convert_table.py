"""``nnunet_multimodal convert table``: which modality each case of an existing data set is of."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_multimodal.data.modality import ModalityTable
from nnunet_multimodal.environment import find_raw_dataset
from nnunet_multimodal.errors import DataProblem

WHAT = "say which case is CT and which MR in a data set that exists"

DESCRIPTION = """\
Add the modality table to the dataset.json of a data set in nnUNet_raw, and to its copy in nnUNet_preprocessed where
it is preprocessed already: nothing has to be planned or preprocessed again for it.

The modality comes from a CSV with the columns case,modality[,patient], or from the names of the cases:
  --pattern '_(?P<modality>CT|MR)_'             the group 'modality' is the name of the modality
  --pattern CT='^amos_0[0-4]' MR='^amos_0[56]'  NAME=REGEX for each; a name must fit those of one modality only
Expressions are Python's and are searched for anywhere in the name; a group 'patient' in them names the patient.

All images are read: a CT without a voxel below -200 HU, or another image with one, is named in a warning."""

EXAMPLE = """\
nnunet_multimodal convert table -d 602 --csv modalities.csv
nnunet_multimodal convert table -d 602 --pattern '(?P<patient>p\\d+)_(?P<modality>T1|T2|CT)' --rename T1=MR,T2=MR"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--dataset", required=True, metavar="DATASET", help="id or DatasetXXX_Name in nnUNet_raw")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--csv", type=Path, metavar="FILE", help="columns case,modality[,patient], with a header")
    given.add_argument("--pattern", nargs="+", metavar="REGEX", help="REGEX with a group 'modality', or NAME=REGEX ...")
    parser.add_argument(
        "--modalities",
        type=name_list,
        metavar="CT,MR",
        help="the allowed names, in the order in which training alternates (default: those found)",
    )
    parser.add_argument("--rename", type=renaming, metavar="T1=MR,T2=MR", help="call what is found otherwise")
    parser.add_argument(
        "--patient-pattern", metavar="REGEX", help="its group, or all that it matches, is the patient of the case"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a table that is there")
    parser.add_argument(
        "--strict", action="store_true", help="an image that does not look like its modality is an error"
    )


def run(args: argparse.Namespace) -> int:
    raw = find_raw_dataset(args.dataset)
    from nnunet_multimodal.conversion import table as tables
    from nnunet_multimodal.conversion.verify import splits_file

    content = tables.read_dataset_json(raw)
    cases, ending = tables.training_cases(raw, content), content["file_ending"]
    where = str(args.csv or "--pattern")
    if args.csv is not None:
        found = tables.read_csv(args.csv, cases, tables.held_out_cases(raw, ending), ending)
    else:
        found = tables.match_names(cases, tables.Patterns.parse(args.pattern))
    patients = tables.match_patients(cases, args.patient_pattern) if args.patient_pattern else None
    table = tables.make_table(found, cases, args.modalities, args.rename, patients, where)
    _report_doubts(tables.doubtful_cases(raw, content, table), args.strict)
    preprocessed = _preprocessed(raw.name)
    written = tables.add_table([raw, *([preprocessed] if preprocessed else [])], table, args.overwrite)

    counts = Counter(table.case_modality[case] for case in cases)
    print(f"{raw.name}: {', '.join(f'{counts[name]} {name}' for name in table.modalities)}{_people(table, cases)}")
    for path in written:
        print(f"written: {path}")
    if not written:
        print("This table was there already.")
    folds = splits_file(raw.name)
    if folds is not None:
        _report_splits(folds, table, cases)
    if len(table.modalities) < 2:
        print(f"note: all cases are {table.modalities[0]}; nnUNetTrainerMulModSeg needs two modalities.")
    dataset_id = raw.name.removeprefix("Dataset").partition("_")[0].lstrip("0")
    if preprocessed is None:
        print(f"Next: nnUNetv2_plan_and_preprocess -d {dataset_id} -c 2d --verify_dataset_integrity")
    print(f"{'Next:' if preprocessed else '     '} nnUNetv2_train {dataset_id} 2d 0 -tr nnUNetTrainerMulModSeg")
    return 0


def _report_doubts(doubts: Sequence[str], strict: bool) -> None:
    """Warnings, of which each may be of an exchanged line in a CSV.

    Raises:
        DataProblem: there are some under ``--strict``.
    """
    from nnunet_multimodal.conversion.dataset import LISTED, numbered

    if doubts and strict:
        raise DataProblem(f"{numbered('Nothing was written.', doubts)}\nPut the table right, or leave --strict out.")
    for doubt in doubts[:LISTED]:
        print(f"warning: {doubt}", file=sys.stderr)
    if len(doubts) > LISTED:
        print(f"warning: the same of {len(doubts) - LISTED} more cases; doctor -d lists them all.", file=sys.stderr)


def _preprocessed(name: str) -> Path | None:
    """The preprocessed data set with its copy of dataset.json, if there is one."""
    value = os.environ.get("nnUNet_preprocessed", "").strip()
    folder = Path(value, name)
    return folder if value and (folder / "dataset.json").is_file() else None


def _people(table: ModalityTable, cases: Sequence[str]) -> str:
    known = {table.case_patient[case] for case in cases if case in table.case_patient}
    if not known:
        return ""
    without = sum(case not in table.case_patient for case in cases)
    return f"; {len(known)} patients" + (f" and {without} cases without one" if without else "")


def _report_splits(path: Path, table: ModalityTable, cases: Sequence[str]) -> None:
    """What the folds that exist look like beside the table; they are the user's, so nothing is changed."""
    from nnunet_multimodal.conversion.dataset import first_names
    from nnunet_multimodal.data.splits import (
        advise,
        folds_without,
        parted_patients,
        read_splits,
        stale_cases,
        training_counts,
    )

    try:
        splits = read_splits(path)
    except DataProblem as problem:  # no fault of the table, which is written; training would stop at it
        print(f"warning: {problem}", file=sys.stderr)
        return
    print(f"kept as it is: {path}")
    counts = zip(training_counts(splits, table), training_counts(splits, table, "val"))
    for fold, (train, val) in enumerate(counts):
        print(f"  fold {fold}: trains on {_numbers(train)}; validates on {_numbers(val)}")
    gone, new = stale_cases(splits, cases)
    without = folds_without(splits, table)
    warnings = [f"{'; '.join(without)}. {advise(splits, table)}"] if without else []
    warnings += [f"it names cases that are not there: {first_names(gone)}. Delete the file."] if gone else []
    warnings += [f"cases in no fold: {first_names(new)}. Delete the file, or add them."] if new else []
    parted = parted_patients(splits, table)
    warnings += (
        [f"patients in training and in validation of a fold: {first_names(parted)}. Delete the file."] if parted else []
    )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _numbers(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def name_list(text: str) -> list[str]:
    """``CT,MR``"""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len({*names}) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names such as CT,MR, found {text!r}")
    return names


def renaming(text: str) -> dict[str, str]:
    """``T1=MR,T2=MR``"""
    pairs = [tuple(part.strip() for part in item.split("=")) for item in text.split(",")]
    if not all(len(pair) == 2 and all(pair) for pair in pairs) or len({pair[0] for pair in pairs}) < len(pairs):
        raise argparse.ArgumentTypeError(f"expected FOUND=NAME such as T1=MR,T2=MR, found {text!r}")
    return dict(pairs)  # type: ignore[arg-type]
