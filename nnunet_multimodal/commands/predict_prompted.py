"""``nnunet_multimodal predict`` with a text, points or boxes: what is asked for, and where (docs/prompts.md)."""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError

TRAINER = "nnUNetTrainerSegVol"
# Of the other models' options, those that mean nothing here.
_OTHERS = {
    "modality": "--modality",
    "modality_map": "--modality-map",
    "missing": "--missing",
    "slabs": "--slabs",
    "save_probabilities": "--save_probabilities",
    "fix_sides": "--fix-sides",
}
_HOPELESS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)  # no other case could be written either


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that make a prediction a prompted one, and how it then goes."""
    group = parser.add_argument_group("prompts (nnUNetTrainerSegVol)")
    group.add_argument("--text", nargs="*", metavar="ORGAN", help="ask by text for these; without names for all")
    group.add_argument("--points", metavar="FILE|X,Y,Z;...", help="ask by points: a JSON file, or points of one image")
    group.add_argument("--negative-points", metavar="X,Y,Z;...", help="points beside it, of one image")
    group.add_argument("--box", metavar="FILE|X,Y,Z;X,Y,Z", help="ask by boxes: a JSON file, or one of one image")
    group.add_argument("--voxels", action="store_true", help="coordinates are voxel indices, not mm (RAS)")
    group.add_argument("--zoom", action="store_true", help="the whole volume coarsely, then closely where it is")
    group.add_argument(
        "--box-from-labels", type=Path, metavar="DIR", help="boxes of these labels: to measure, not to use"
    )
    group.add_argument(
        "--box-shift", type=int, nargs="+", metavar="N",
        help="measure boxes whose corners are off by up to N voxels: a table and a curve, no segmentations",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of --box-shift (default: %(default)s)")
    group.add_argument("--draws", type=int, default=1, metavar="N", help="boxes a shift, of --box-shift (%(default)s)")


def wanted(args: argparse.Namespace) -> bool:
    """Whether it is a prompted prediction. Options without a prompt are an error.

    Raises:
        UsageError: an option of prompts without any prompt.
    """
    if any(value is not None for value in (args.text, args.points, args.box, args.box_from_labels)):
        return True
    given = [
        option
        for option, value in (
            ("--zoom", args.zoom),
            ("--voxels", args.voxels),
            ("--negative-points", args.negative_points),
            ("--box-shift", args.box_shift),
        )
        if value
    ]
    if given:
        raise UsageError(f"{given[0]} goes with a prompt: --text, --points, --box or --box-from-labels.")
    return False


def check(args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]] | None, Any]:
    """All that can be said about the prompts without a model.

    Returns:
        Points and boxes by case and organ (None: no file), and those of the command line (None: none).

    Raises:
        UsageError: options that contradict each other, or a file of another form.
    """
    from nnunet_multimodal.inference.prompts import Asked, parse_box, parse_coordinates

    for name, option in _OTHERS.items():
        if getattr(args, name):
            raise UsageError(f"{option} does not go with prompts: leave one of them out.")
    if args.text is not None and len({*args.text}) < len(args.text):
        raise UsageError(f"--text names an organ twice: {' '.join(args.text)}.")
    if args.box_from_labels is not None:
        if args.box is not None:
            raise UsageError("--box and --box-from-labels both say where boxes are: give one.")
        if not args.box_from_labels.is_dir():
            raise DataProblem(f"--box-from-labels {args.box_from_labels} is no folder.")
    if args.box_shift is not None:
        if args.box_from_labels is None:
            raise UsageError("--box-shift needs --box-from-labels DIR: it moves the boxes of labels, and measures.")
        if min(args.box_shift) < 0:
            raise UsageError(f"--box-shift {min(args.box_shift)}: expected voxels, 0 or more.")
        if args.points is not None:
            raise UsageError("--box-shift measures boxes: leave --points out.")
        if args.draws < 1:
            raise UsageError(f"--draws {args.draws}: expected 1 or more.")
        if args.seed < 0:
            raise UsageError(f"--seed {args.seed}: expected 0 or more.")
    files = {option: path for option in ("points", "box") if (path := _as_file(getattr(args, option))) is not None}
    inline = {option for option in ("points", "box") if getattr(args, option) is not None and option not in files}
    if files and (inline or args.negative_points is not None):
        raise UsageError("points and boxes come from files or from the command line, not from both.")
    if args.negative_points is not None and args.points is None:
        raise UsageError('--negative-points go with --points; in a file they are "negative_points".')
    units = "voxels" if args.voxels else "mm"
    if files:
        return _from_files(files, units), None
    if inline:
        option = "--" + " and --".join(sorted(inline))
        return None, Asked(
            "",
            False,
            parse_coordinates(args.points, "--points") if args.points is not None else (),
            parse_coordinates(args.negative_points, "--negative-points") if args.negative_points else (),
            parse_box(args.box) if args.box is not None else None,
            units,
            option,
        )
    return None, None


def _as_file(value: str | None) -> Path | None:
    """A name that ends in .json, or a file that is there."""
    if value is None:
        return None
    is_file = value.lower().endswith(".json") or os.path.isfile(value)  # of many points, too long for a name: no
    return Path(value) if is_file else None


def _from_files(files: Mapping[str, Path], units: str) -> dict[str, dict[str, Any]]:
    """What the options ask of their files: points of the one, boxes of the other; both may be the same file."""
    from dataclasses import replace

    from nnunet_multimodal.evaluation.labels import read_json
    from nnunet_multimodal.inference.prompts import read_prompts

    merged: dict[str, dict[str, Any]] = {}
    for option, path in files.items():
        found = 0
        for case, organs in read_prompts(read_json(path), str(path), units).items():
            for organ, asked in organs.items():
                kept = replace(asked, box=None) if option == "points" else replace(asked, positive=(), negative=())
                if not (kept.positive or kept.box):
                    continue
                found += 1
                before = merged.setdefault(case, {}).get(organ)
                if before is None:
                    merged[case][organ] = kept
                elif before.units != kept.units:
                    raise UsageError(f"{before.where} is in {before.units}, {path} in {kept.units}: use the same.")
                else:
                    merged[case][organ] = replace(before, box=kept.box, where=f"{before.where} and {path}")
        if not found:
            raise UsageError(f"--{option} {path} holds no {'positive points' if option == 'points' else 'box'}.")
    return merged


def run(args: argparse.Namespace) -> int:
    """Checks what can be checked without torch, then asks."""
    prompts, inline = check(args)
    return _predict(args, prompts, inline)


def _predict(args: argparse.Namespace, prompts: dict[str, dict[str, Any]] | None, inline: Any) -> int:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from tqdm import tqdm

    from nnunet_multimodal.conversion.dataset import write_json
    from nnunet_multimodal.inference.folder import FILE_NAME, Report
    from nnunet_multimodal.inference.images import find_cases
    from nnunet_multimodal.inference.model import load_model, result_folder
    from nnunet_multimodal.inference.prompted import Asker
    from nnunet_multimodal.inference.prompted_cases import Job, predict_case, study_case
    from nnunet_multimodal.networks.segvol import SegVolNetwork

    folder = args.model_folder or result_folder(args.dataset, args.trainer or TRAINER, args.plans, args.configuration)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net remarks on the device
        predictor = nnUNetPredictor(use_mirroring=False, device=device, allow_tqdm=False)
    messages: list[str] = []
    folds, checkpoint = load_model(predictor, folder, args.folds, args.checkpoint, messages)
    network = getattr(predictor.network, "_orig_mod", predictor.network)
    if not isinstance(network, SegVolNetwork):
        raise UsageError(
            f"{folder.name} was trained with {predictor.trainer_name}, which takes no prompts. Train {TRAINER}, or "
            "leave the prompts out."
        )
    dataset_json = predictor.dataset_json
    section = dataset_json.get("nnunet_multimodal")
    if isinstance(section, Mapping) and section.get("harmonise"):
        raise UsageError("the model's data set was harmonised by modality, which prompted prediction does not do.")
    channels = dataset_json.get("modality", dataset_json.get("channel_names"))
    cases = find_cases(args.input, dataset_json["file_ending"], len(channels))
    organs = predictor.configuration_manager.configuration["nnunet_multimodal"]["organs"]
    questions = _questions(args, prompts, inline, [case.name for case in cases], organs)
    for message in messages:
        print(message)
    if args.box_from_labels is not None:
        print(f"boxes are those of the labels in {args.box_from_labels}: this is no prediction of unknown images")
    free = _free_labels(questions, dataset_json["labels"])
    asker = Asker(predictor, args.step_size)
    job = Job(predictor, asker, args.zoom, args.nan_to, args.output, args.box_from_labels, free)
    how: dict[str, Any] = {
        "model": "/".join(folder.resolve().parts[-2:]),
        "trainer": predictor.trainer_name,
        "folds": folds,
        "checkpoint": checkpoint,
        "step_size": args.step_size,
        "zoom": args.zoom,
        "boxes": None if args.box_from_labels is None else f"from the labels in {args.box_from_labels}",
        "objects": free,
    }
    rows: list[dict[str, Any]] = []
    report = Report(args.output / FILE_NAME, how)
    digests = {case: _digest(own) for case, own in questions.items()}
    kept = _keep(report, digests) if args.go_on and args.box_shift is None else []
    args.output.mkdir(parents=True, exist_ok=True)
    if args.box_shift is None:  # evaluate and nnU-Net read the labels' names from it
        write_json(args.output / "dataset.json", {**dataset_json, "labels": {**dataset_json["labels"], **free}})
    waiting = [case for case in cases if case.name not in kept]
    with tqdm(waiting, unit="case", disable=None) as bar:
        for case in bar:
            try:
                if args.box_shift is None:
                    found = predict_case(job, case, questions[case.name])
                    report.cases[case.name] = {**found, "prompts": digests[case.name]}
                else:
                    shifts = sorted({0, *args.box_shift})
                    rows += study_case(job, case, questions[case.name], shifts, args.draws, args.seed)
            except Exception as error:  # a bad image or prompt costs its case
                if args.debug or getattr(error, "errno", None) in _HOPELESS:
                    raise
                known = isinstance(error, MultimodalError)
                text = str(error) if known else f"case {case.name}: {type(error).__name__}: {error}"
                code = error.exit_code if isinstance(error, MultimodalError) else 1
                report.failed[case.name] = {"error": text, "exit_code": code}
                bar.write(f"error: {text}", file=sys.stderr)
            finally:
                if args.box_shift is None:
                    report.write()
    if args.box_shift is None:
        _print_cases(report, len(kept))
    elif rows:
        from nnunet_multimodal.inference.box_study import write_study

        how |= {"seed": args.seed, "draws": args.draws, "failed": report.failed}
        _print_study(write_study(args.output, how, rows), args.output)
    if not report.failed:
        return 0
    codes = {entry["exit_code"] for entry in report.failed.values()}
    return codes.pop() if len(report.failed) == len(cases) and len(codes) == 1 else 1


def _questions(
    args: argparse.Namespace,
    prompts: dict[str, dict[str, Any]] | None,
    inline: Any,
    cases: Sequence[str],
    organs: Sequence[str],
) -> dict[str, list[Any]]:
    """case -> what is asked for in it, with the model's own names.

    Raises:
        UsageError: an organ that the model has no text of, prompts for a case that is not there, or points of the
            command line for several images.
    """
    from dataclasses import replace

    from nnunet_multimodal.conversion.dataset import first_names
    from nnunet_multimodal.inference.prompts import FREE, Asked
    from nnunet_multimodal.text.names import find_row

    def known(name: str, where: str) -> str:
        if name.startswith(FREE):
            return name
        hint = f"What the model has no name for is called {FREE}, or {FREE}_2 and so on, and asked for without --text."
        return organs[find_row(name, organs, "organ", f"the model ({where})", hint)]

    names = None if args.text is None else [known(name, "--text") for name in args.text] or list(organs)
    free = [name for name in names or [] if name.startswith(FREE) and name not in organs]
    if free:
        raise UsageError(f"--text {free[0]}: the model has texts of {', '.join(organs)} only.")
    if prompts is None and inline is None:
        if args.box_from_labels is not None:
            wanted_organs = names or list(organs)
            return {
                case: [Asked(name, names is not None, where=str(args.box_from_labels)) for name in wanted_organs]
                for case in cases
            }
        return {case: [Asked(name, True, where="--text") for name in names or []] for case in cases}
    if args.box_from_labels is not None and inline is not None:
        raise UsageError("--box-from-labels has organs: give --points in a file, which names them.")
    if inline is not None:
        if len(cases) > 1:
            raise UsageError(
                f"{inline.where} on the command line is for one image, found {len(cases)} cases: "
                f"{first_names([*cases])}. Write a JSON file with the prompts of each (docs/prompts.md)."
            )
        if names is not None and (not args.text or len(names) > 1):
            raise UsageError(f"{inline.where}: of which organ? Name one: --text {organs[0]}")
        named = replace(inline, organ=names[0] if names else FREE, text=names is not None)
        return {cases[0]: [named]}
    assert prompts is not None
    absent = [case for case in prompts if case not in cases]
    if absent:
        where = next(iter(prompts[absent[0]].values())).where
        raise UsageError(
            f"{where} has prompts for {first_names(absent)}, which is not in {args.input}: there are "
            f"{first_names([*cases])}."
        )
    missing = [case for case in cases if case not in prompts]
    if missing:
        where = next(iter(next(iter(prompts.values())).values())).where
        raise UsageError(f"{where} has no prompts for {first_names(missing)}. Add them, or take the images out of -i.")
    result: dict[str, list[Any]] = {}
    for case, entries in prompts.items():
        own = {known(name, asked.where): asked for name, asked in entries.items()}
        if len(own) < len(entries):
            raise UsageError(
                f"{next(iter(entries.values())).where}, {case} names an organ twice: {', '.join(entries)}."
            )
        if args.text:
            lacking = [name for name in names or [] if name not in own]
            if lacking:
                where = next(iter(entries.values())).where
                raise UsageError(f"{where}, {case} has nothing for {lacking[0]} (--text); it has {', '.join(own)}.")
            own = {name: own[name] for name in names or []}
        result[case] = [
            replace(asked, organ=name, text=names is not None and name in organs) for name, asked in own.items()
        ]
    return result


def _free_labels(questions: Mapping[str, Sequence[Any]], labels: Mapping[str, int]) -> dict[str, int]:
    """A label for each thing that the data set has no name for, the same in all cases."""
    names = sorted({asked.organ for own in questions.values() for asked in own} - set(labels))
    return {name: max(labels.values()) + 1 + place for place, name in enumerate(names)}


def _digest(own: Sequence[Any]) -> str:
    """Of what a case is asked, whichever file says it."""
    from dataclasses import asdict

    listed = [{**asdict(asked), "where": ""} for asked in sorted(own, key=lambda a: a.organ)]
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()[:12]


def _keep(report: Any, digests: Mapping[str, str]) -> list[str]:
    """The cases that an earlier run has finished; one that is asked otherwise now is predicted again."""
    for case in report.take_over({}):
        if report.cases[case].get("prompts") != digests.get(case, report.cases[case].get("prompts")):
            del report.cases[case]
    return sorted(report.cases)


def _print_cases(report: Any, kept: int) -> None:
    for case, entry in sorted(report.cases.items()):
        found = ", ".join(f"{organ} {each['millilitres']:.1f} ml" for organ, each in entry["organs"].items())
        print(f"{case}: {found}")
    print(f"{len(report.cases) - kept} predicted, {kept} kept from before, {len(report.failed)} failed: {report.path}")


def _print_study(table: Sequence[Mapping[str, Any]], output: Path) -> None:
    print("corners off by up to ... voxels: Dice of the prediction, and of the box itself")
    for row in table:
        if row["organ"] == "mean":
            print(f"{row['shift']:>4}  {row['dice']:.3f}  {row['box_alone']:.3f}  ({row['boxes']} boxes)")
    print(f"{output / 'box_shift.json'}, .csv and .png")
