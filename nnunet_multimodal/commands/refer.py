"""``nnunet_multimodal refer``: scribble on one contrast, get the organs in the others."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError

DESCRIPTION = """\
Segment target images by a reference image of the same or another patient on which the organs were scribbled.

The scribble file is a label map on the reference's grid (from ITK-SNAP, 3D Slicer, ...): the value is the organ's
number in the data set, 0 is unlabelled. With the 2d configuration each target slice is matched to a reference slice, by
position in space where both agree about it, else by relative order; between an organ's first and last scribbled
slice the nearest scribbled slice answers. Beyond them the organ is not looked for, unless --reach says so.

A model of nnUNetTrainerCrossMR_openSet takes any organ: give one that was not labelled in training a number of its own,
up to 255, and a name with --organ-names.

One subject: --reference, --scribbles and --targets. Many: --subjects DIR with a folder for each, holding
reference.nii.gz, scribbles.nii.gz and any other images, which are the targets."""

EXAMPLE = """\
nnunet_multimodal refer --reference T1.nii.gz --scribbles S.nii.gz --targets T2.nii.gz DWI.nii.gz -o OUT -d 601 -c 2d
nnunet_multimodal refer --subjects DIR -o OUT -d 601 -c 2d -f 0 --reach 10"""

ENDINGS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Subject:
    """One reference and what it is to be carried to."""

    name: str  # the sub-folder of the output; empty for a single subject
    reference: Path
    scribbles: Path
    targets: tuple[Path, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; model options are named as nnUNetv2_predict names them."""
    who = parser.add_argument_group("images")
    who.add_argument("--reference", type=Path, metavar="FILE", help="image that was scribbled on")
    who.add_argument("--scribbles", type=Path, metavar="FILE", help="label map of scribbles on the reference's grid")
    who.add_argument("--targets", type=Path, nargs="+", metavar="FILE", help="images to segment")
    who.add_argument("--subjects", type=Path, metavar="DIR", help="instead: a folder of subject folders")
    who.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the results go")
    model = parser.add_argument_group("model")
    model.add_argument("-d", "--dataset", metavar="ID", help="data set of the training, number or name")
    model.add_argument("-c", "--configuration", metavar="NAME", help="2d, 3d_fullres, ...")
    model.add_argument("-tr", "--trainer", default="nnUNetTrainerCrossMR", metavar="NAME", help="default: %(default)s")
    model.add_argument("-p", "--plans", default="nnUNetPlans", metavar="NAME", help="default: %(default)s")
    model.add_argument("-f", "--folds", nargs="+", metavar="FOLD", help="default: every fold that was trained")
    model.add_argument("-chk", "--checkpoint", default="checkpoint_final.pth", metavar="FILE", help="%(default)s")
    model.add_argument("-m", "--model-folder", type=Path, metavar="DIR", help="result folder, instead of -d and -c")
    model.add_argument(
        "--organ-names", nargs="+", metavar="NAME=NUMBER", help="of organs that are not in the data set (openSet)"
    )
    model.add_argument("-device", "--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    how = parser.add_argument_group("slices (2d)")
    how.add_argument("--reach", type=float, default=0.0, metavar="MM", help="look so far beyond the outer scribbles")
    how.add_argument("--matching", choices=("auto", "position", "order"), default="auto", help="default: %(default)s")
    more = parser.add_argument_group("output and checks")
    more.add_argument("--no-overlays", action="store_true", help="write no pictures")
    more.add_argument("--continue", dest="go_on", action="store_true", help="keep what an earlier run has finished")
    more.add_argument("--nan-to", type=float, metavar="VALUE", help="replace NaN and infinite voxels")
    more.add_argument("--allow-affine-mismatch", action="store_true", help="trust the voxels where headers disagree")
    more.add_argument("--fix-header", action="store_true", help="scribbles take their image's geometry")
    more.add_argument("--reorthonormalize", action="store_true", help="accept slightly sheared headers")


def run(args: argparse.Namespace) -> int:
    """Checks all that can be checked without torch, then predicts subject by subject."""
    subjects = _subjects(args)
    _check_outputs(subjects, args.output)
    if math.isnan(args.reach) or args.reach < 0:
        raise UsageError(f"--reach {args.reach}: expected millimetres, 0 or more, or inf.")
    names = _organ_names(args.organ_names or [])
    if args.model_folder is None:
        if args.dataset is None or args.configuration is None:
            raise UsageError("which model? Give -d DATASET and -c CONFIGURATION, or -m RESULT_FOLDER.")
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            require_nnunet_path(variable)
    predictor, folder = _load_model(args)
    if names and not predictor.open_set:
        raise UsageError(
            f"--organ-names: {folder.name} knows the organs of its data set only, {', '.join(predictor.names)}. A "
            "model of nnUNetTrainerCrossMR_openSet takes any."
        )
    _check_names(predictor.names, names)
    return _predict_all(args, predictor, folder, subjects)


def _organ_names(given: list[str]) -> dict[str, int]:
    """``["spleen=4"]`` -> ``{"spleen": 4}``."""
    names: dict[str, int] = {}
    for word in given:
        name, _, number = word.partition("=")
        if not name or not number.isascii() or not number.isdigit() or not 0 < int(number) < 256:
            raise UsageError(f"--organ-names {word}: expected NAME=NUMBER with a number from 1 to 255.")
        if name in names or int(number) in names.values():
            raise UsageError(f"--organ-names: {word} names an organ or a number twice.")
        names[name] = int(number)
    return names


def _check_names(known: dict[str, int], given: dict[str, int]) -> None:
    """The user's names must not contradict the data set's."""
    for name, number in given.items():
        if known.get(name, number) != number or any(n != name for n, value in known.items() if value == number):
            declared = ", ".join(f"{n}={value}" for n, value in known.items())
            raise UsageError(f"--organ-names {name}={number} contradicts the data set of the model: {declared}.")


def _subjects(args: argparse.Namespace) -> list[Subject]:
    single = (args.reference, args.scribbles, args.targets)
    if args.subjects is not None:
        if any(value is not None for value in single):
            raise UsageError("--subjects replaces --reference, --scribbles and --targets: give one or the other.")
        return _subject_folders(args.subjects, args.output)
    if any(value is None for value in single):
        raise UsageError("give --reference, --scribbles and --targets, or --subjects DIR.")
    for path in (args.reference, args.scribbles, *args.targets):
        if not path.is_file():
            raise DataProblem(f"{path} does not exist.")
    return [Subject("", args.reference, args.scribbles, tuple(args.targets))]


def _subject_folders(root: Path, output: Path) -> list[Subject]:
    if not root.is_dir():
        raise DataProblem(f"{root} is no folder.")
    subjects = []
    for folder in sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")):
        if folder.resolve() == output.resolve():
            continue  # results of an earlier run
        images = {_stem(f): f for f in sorted(folder.iterdir()) if f.name.endswith(ENDINGS)}
        reference = images.pop("reference", folder / "reference.nii.gz")
        scribbles = images.pop("scribbles", folder / "scribbles.nii.gz")
        subjects.append(Subject(folder.name, reference, scribbles, tuple(images.values())))
    if not subjects:
        raise DataProblem(f"{root} holds no subject folders (each with reference.nii.gz, scribbles.nii.gz, targets).")
    return subjects


def _check_outputs(subjects: list[Subject], output: Path) -> None:
    """Two targets must not fight for one result, and no result may take the place of an image."""
    inputs = {path.resolve() for s in subjects for path in (s.reference, s.scribbles, *s.targets)}
    for subject in subjects:
        seen: dict[str, Path] = {}
        for target in subject.targets:
            other = seen.setdefault(_stem(target), target)
            if other is not target:
                raise UsageError(f"{other} and {target} would both be written to {_stem(target)}.nii.gz; rename one.")
            result = output / subject.name / f"{_stem(target)}.nii.gz"
            if result.resolve() in inputs:
                raise UsageError(f"{result} is one of the images and would be overwritten; choose another -o.")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


def _load_model(args: argparse.Namespace):
    import torch

    from nnunet_multimodal.inference.model import load_referring_model, result_folder
    from nnunet_multimodal.inference.referring import ReferringPredictor

    folder = args.model_folder
    if folder is None:
        folder = result_folder(args.dataset, args.trainer, args.plans, args.configuration)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    messages: list[str] = []
    predictor = ReferringPredictor(load_referring_model(folder, args.folds, args.checkpoint, device, messages))
    for message in messages:
        print(message)
    return predictor, folder


def _predict_all(args: argparse.Namespace, predictor: Any, folder: Path, subjects: list[Subject]) -> int:
    from tqdm import tqdm

    report: dict[str, Any] = {"model": str(folder), "reach_mm": str(args.reach), "results": [], "failed": []}
    total = sum(max(1, len(subject.targets)) for subject in subjects)
    try:
        with tqdm(total=total, unit="target", disable=None) as bar:
            for subject in subjects:
                bar.set_description(subject.name or subject.reference.name)
                _predict_subject(args, predictor, subject, report, bar)
    finally:  # also what an interrupted run has finished
        args.output.mkdir(parents=True, exist_ok=True)
        _write_json(args.output / "refer.json", report)
    _print_table(report)
    if not report["failed"]:
        return 0
    if len(subjects) == 1 and not report["results"]:
        return report["failed"][0]["exit_code"]
    return 1


def _predict_subject(args: argparse.Namespace, predictor: Any, subject: Subject, report: dict, bar: Any) -> None:
    """One subject; a bad image costs that image, a bad reference the subject, nothing else."""
    output = args.output / subject.name
    waiting = [t for t in subject.targets if not (args.go_on and (output / f"{_stem(t)}.nii.gz").exists())]
    bar.update(len(subject.targets) - len(waiting))
    for target in sorted(set(subject.targets) - set(waiting)):
        report["results"].append({"subject": subject.name, "target": str(target), "kept": True})
    try:
        if not subject.targets:
            raise DataProblem(f"{subject.reference.parent} holds no target image.")
        if not waiting:
            return
        reference, scribbles = _read_reference(args, predictor, subject)
        encoded = predictor.reference(reference, scribbles)
        prompts = predictor.encode(encoded)
    except Exception as error:
        _fail(args, report, bar, subject, str(subject.reference), error)
        bar.update(max(1, len(waiting)))
        return
    for target in waiting:
        try:
            report["results"].append(_predict_target(args, predictor, subject, target, encoded, prompts, scribbles))
        except Exception as error:  # out of memory on one big target must not cost the other subjects
            _fail(args, report, bar, subject, str(target), error)
        bar.update()


def _read_reference(args: argparse.Namespace, predictor: Any, subject: Subject):
    import numpy as np

    from nnunet_multimodal.conversion.images import check_scribbles, read_labels, read_volume

    for path in (subject.reference, subject.scribbles):
        if not path.is_file():
            raise DataProblem(f"{path} does not exist.")
    reference = read_volume(subject.reference, args.nan_to, args.reorthonormalize)
    drawn = read_labels(subject.scribbles, args.reorthonormalize)
    if predictor.open_set:
        predictor.ask_for(_organ_names(args.organ_names or []))
        found = {int(v) for v in np.unique(drawn.data) if 0 < v < 256 and v == int(v)}
        unnamed = {f"organ_{v}": v for v in found - set(predictor.names.values())}
        predictor.ask_for({**_organ_names(args.organ_names or []), **unnamed})
    try:
        drawn = check_scribbles(drawn, reference, predictor.names, None, args.allow_affine_mismatch, args.fix_header)
    except DataProblem as error:
        if "undeclared class" not in str(error) or predictor.open_set:
            raise
        raise DataProblem(f"{error} A model of nnUNetTrainerCrossMR_openSet takes any organ.") from error
    if not drawn.data.any():
        raise DataProblem(f"{subject.scribbles} is empty: draw on at least one slice, values {predictor.names}.")
    return reference, drawn.data.astype(int)


def _predict_target(
    args: argparse.Namespace, predictor: Any, subject: Subject, path: Path, encoded: Any, prompts: Any, scribbles: Any
) -> dict[str, Any]:
    from nnunet_multimodal.conversion.images import read_volume
    from nnunet_multimodal.inference.export import write_segmentation
    from nnunet_multimodal.inference.overlay import write_overlay
    from nnunet_multimodal.inference.referring import organ_volumes

    begin = time.perf_counter()
    target = read_volume(path, nan_to=args.nan_to, reorthonormalize=args.reorthonormalize)
    answer = predictor.answer(target, encoded, prompts, args.reach, args.matching)
    output = args.output / subject.name / f"{_stem(path)}.nii.gz"
    write_segmentation(output, answer.segmentation, path)
    result: dict[str, Any] = {
        "subject": subject.name,
        "target": str(path),
        "output": str(output),
        "matching": answer.match.method if answer.match else "volume",
        "millilitres": organ_volumes(answer.segmentation, target, predictor.names),
        "seconds": round(time.perf_counter() - begin, 2),
    }
    if answer.served is not None:
        result["slices"] = {name: int((row >= 0).sum()) for name, row in zip(predictor.names, answer.served)}
    if not args.no_overlays:
        picture = args.output / "overlays" / f"{subject.name + '_' if subject.name else ''}{_stem(path)}.png"
        write_overlay(
            picture, encoded.prepared.volume, scribbles, target, answer.segmentation, predictor.names,
            predictor.slice_axis, answer.served,
        )  # fmt: skip
        result["overlay"] = str(picture)
    return result


def _fail(args: argparse.Namespace, report: dict, bar: Any, subject: Subject, what: str, error: Exception) -> None:
    message, code = str(error), 1
    if isinstance(error, MultimodalError):
        code = error.exit_code
    else:
        if getattr(args, "debug", False):
            raise error
        message = f"{what}: {type(error).__name__}: {error}"
    report["failed"].append({"subject": subject.name, "file": what, "error": message, "exit_code": code})
    bar.write(f"error: {message}", file=sys.stderr)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _print_table(report: dict[str, Any]) -> None:
    done = [r for r in report["results"] if not r.get("kept")]
    for result in done:
        found = ", ".join(f"{organ} {ml:.1f} ml" for organ, ml in result["millilitres"].items())
        print(f"{result['output']}  ({result['matching']}): {found}")
    kept = len(report["results"]) - len(done)
    print(f"{len(done)} segmented, {kept} kept from before, {len(report['failed'])} failed")
