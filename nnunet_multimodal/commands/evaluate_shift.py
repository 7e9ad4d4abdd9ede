"""``nnunet_multimodal evaluate --shift``: a model under controlled shifts of its images."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_multimodal.data.shifts import SHIFTS, Change, parse_shifts
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.relabel.locks import held

DESCRIPTION = f"""\
Shifts: --shift NAMES -m RESULT_FOLDER -i IMAGES REF predicts IMAGES with any trained model, as they are and changed
({", ".join(SHIFTS)}; or all), each at --levels severities, and draws Dice against severity,
per modality and organ. OUT gets shift.html, shift.csv, shift_cases.csv and shift.json; the severity at which 5 points
of Dice are lost is the number to compare. The same line goes on after an interruption, and adds shifts or levels to an
OUT that has others. What has no reference, no image, or cannot be predicted as it is, is listed and in no curve."""

EXAMPLE = """\
nnunet_multimodal evaluate --shift gamma,noise,bias,resolution,ghosting --levels 5 -m RESULT_FOLDER -i imagesTs \\
    labelsTs -o SHIFTS"""

ONLY_HERE = {
    "levels": "--levels", "model_folder": "-m", "input": "-i", "folds": "-f", "checkpoint": "-chk", "device": "-device",
    "step_size": "-step_size", "disable_tta": "--disable_tta", "nan_to": "--nan-to", "seed": "--seed",
    "tell_modality": "--tell-modality", "keep_predictions": "--keep-predictions",
}  # fmt: skip
NOT_HERE = {
    "compare": "--compare", "name": "--name", "below": "--below", "in_distribution": "--in-distribution",
    "images": "--images",
}  # fmt: skip

FEW = 8  # cases that a process measures sooner than it has started


class _Shift(argparse.Action):
    """Where a model predicts, PRED is not given: REF may then be the only one of the two."""

    def __init__(self, *args: Any, reference: argparse.Action, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference = reference

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        namespace.shift = values
        self.reference.required = False


def add_arguments(parser: argparse.ArgumentParser, reference: argparse.Action) -> None:
    """The options of ``--shift``; what nnUNetv2_predict has is named as there.

    Args:
        parser: of the command.
        reference: its last positional argument.
    """
    from nnunet_multimodal.commands.predict import _share

    group = parser.add_argument_group("shifts of the images (instead of PRED)")
    group.add_argument(
        "--shift", action=_Shift, reference=reference, metavar="NAMES", help=f"{','.join(SHIFTS)} or all; some of them"
    )
    group.add_argument("--levels", type=int, metavar="N", help="severities of each (default: 5)")
    group.add_argument("-m", dest="model_folder", type=Path, metavar="DIR", help="result folder of nnUNetv2_train")
    group.add_argument("-i", dest="input", type=Path, metavar="IN", help="folder of images, CASE_0000.nii.gz")
    group.add_argument(
        "-f", dest="folds", type=_fold, nargs="+", metavar="FOLD", help="default: every fold that was trained"
    )
    group.add_argument("-chk", dest="checkpoint", metavar="FILE", help="default: checkpoint_final.pth")
    group.add_argument("-device", "--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    group.add_argument("-step_size", type=_share, metavar="SHARE", help="of a tile (default: 0.5)")
    group.add_argument("--disable_tta", action="store_true", default=None, help="no mirroring: faster, a little worse")
    group.add_argument("--nan-to", type=float, metavar="VALUE", help="replace NaN and infinite voxels first")
    group.add_argument("--seed", type=int, metavar="N", help="of what is drawn for each case (default: 0)")
    group.add_argument(
        "--tell-modality", action="store_true", default=None, help="to a network that can be told (default: it infers)"
    )
    group.add_argument(
        "--keep-predictions", action="store_true", default=None, help="in OUT/predictions (default: until measured)"
    )


def check_options(args: argparse.Namespace) -> None:
    """Options that would have no effect are a mistake.

    Raises:
        UsageError: names the first, or what is missing.
    """
    if args.shift is None:
        for name, option in ONLY_HERE.items():
            if getattr(args, name) is not None:
                raise UsageError(f"{option} is for --shift: give both, or leave it out.")
        return
    for name, option in NOT_HERE.items():
        if getattr(args, name):
            raise UsageError(f"{option} has no effect with --shift: leave it out.")
    if args.reference is not None:
        raise UsageError(
            f"--shift lets the model predict: give the references alone, found {args.prediction} and {args.reference}."
        )
    args.reference, args.prediction = args.prediction, None
    if args.model_folder is None or args.input is None:
        missing = "which model? Give -m RESULT_FOLDER" if args.model_folder is None else "which images? Give -i IMAGES"
        raise UsageError(f"--shift: {missing}.")
    for folder, what in ((args.model_folder, "-m"), (args.input, "-i"), (args.reference, "REF")):
        if not folder.is_dir():
            raise UsageError(
                f"{what} {folder} {'is a file, expected a folder' if folder.exists() else 'does not exist'}."
            )
        out = args.output.resolve()
        if folder.resolve() == out or (what == "REF" and folder.resolve() in out.parents):
            where = "is" if folder.resolve() == out else "lies in"
            raise UsageError(f"-o {args.output} {where} {what}: results would lie among its files. Choose another.")


def run(args: argparse.Namespace, labels: Any, options: dict[str, Any]) -> int:
    """Checks all that can be checked without torch, then predicts and measures.

    Args:
        args: of ``evaluate``, after ``check_options``.
        labels: None, or what is measured.
        options: of ``evaluate_folders``.
    """
    from nnunet_multimodal.evaluation.evaluate import check_output
    from nnunet_multimodal.evaluation.shift_study import make_levels

    levels = make_levels(parse_shifts(args.shift), 5 if args.levels is None else args.levels)
    check_output(args.output)
    wait = "Wait for it to end, or choose another -o."
    with held(args.output / ".locks", "shift", "evaluate --shift", hint=wait):
        return _study(args, levels, labels, options)


def _study(args: argparse.Namespace, levels: Sequence[Any], labels: Any, options: dict[str, Any]) -> int:
    from tqdm import tqdm

    from nnunet_multimodal.conversion.dataset import first_names
    from nnunet_multimodal.evaluation.annotated import annotated_organs
    from nnunet_multimodal.evaluation.cases import Case, find_volumes
    from nnunet_multimodal.evaluation.evaluate import dataset_jsons, labels_of, reference_jsons
    from nnunet_multimodal.evaluation.shift_report import describe
    from nnunet_multimodal.evaluation.shift_study import Level, Study, run_study
    from nnunet_multimodal.inference.images import find_cases

    messages: list[str] = []
    predictor, model = _load(args, messages)
    names, ending = _channels(predictor.dataset_json), predictor.dataset_json["file_ending"]
    channels = tuple(index for index, name in enumerate(names) if name.casefold() != "nonorm")
    if not channels:
        raise UsageError(f"{args.model_folder} has no image channel, only {', '.join(names)}: nothing to shift.")
    images = {case.name: case for case in find_cases(args.input, ending, len(names))}
    references = find_volumes(args.reference)
    both = sorted(images.keys() & references.keys())
    if not both:
        raise DataProblem(
            f"-i {args.input} and {args.reference} have no case in common: found {first_names(sorted(images)[:3])}, "
            f"expected {first_names(sorted(references)[:3])}. CASE_0000{ending} has the reference CASE{ending}."
        )
    cases = [Case(name, references[name], None) for name in both]
    chosen = labels_of(labels, dataset_jsons(args.model_folder, args.reference), cases)
    whose = reference_jsons(args.model_folder, args.reference)
    annotated = annotated_organs(options["case_labels"], whose, chosen, both)
    messages += annotated.notes
    settings = _settings(chosen, options, annotated.unannotated)
    modality_of = _modalities(args, options, both, messages)
    told, harmonise = _told(args, predictor, modality_of)
    for message in messages:
        print(message)
    seed = args.seed or 0
    study = Study(
        args.output,
        levels,
        {case: references[case] for case in both},
        ending,
        settings,
        modality_of,
        {
            **model,
            **_measured(settings),
            "images": str(args.input.resolve()),
            "reference": str(args.reference.resolve()),
        },
        {case: _stamp([*images[case].files, references[case]], told.get(case)) for case in both},
        bool(args.keep_predictions),
        min(args.jobs, max(1, len(both) // FEW)),
        lambda case: _example(predictor, images[case], seed, channels, args.nan_to),
        sorted(images.keys() - references.keys()),
        sorted(references.keys() - images.keys()),
        options["report"],
    )
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total_fmt} images [{elapsed}<{remaining}]"
    with tqdm(total=len(levels) * len(both), bar_format=bar_format, disable=None) as bar:

        def predict(level: Level, wanted: Sequence[str], folder: Path) -> dict[str, str]:
            bar.set_description(level.key)
            change = Change(level.shift, level.severity, seed, channels) if level.unit else None
            how = {"model": model, "shift": level.shift, "severity": level.severity}
            chosen = [images[name] for name in wanted]
            return _predict(predictor, chosen, folder, how, told, harmonise, change, bar, args)

        taken: list[str] = []

        def after(level: Level, new: bool) -> None:
            bar.update((levels.index(level) + 1) * len(both) - bar.n)
            taken.extend([] if new else [level.key])

        content = run_study(study, predict, after)
    if taken:
        print(f"taken from an earlier run: {first_names(taken)}")
    table, problems = describe(content)
    print(table)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(args.output / ("shift.html" if options["report"] else "shift.json"))
    return int(bool(problems))


def _load(args: argparse.Namespace, messages: list[str]) -> tuple[Any, dict[str, Any]]:
    """The predictor, and all that makes two predictions of it differ."""
    import torch

    from nnunet_multimodal.inference.modality import ModalityPredictor
    from nnunet_multimodal.inference.model import load_model

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    step_size = args.step_size or 0.5
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net remarks on the device
        predictor = ModalityPredictor(step_size, True, not args.disable_tta, True, device, allow_tqdm=False)
    checkpoint = args.checkpoint or "checkpoint_final.pth"
    folds, checkpoint = load_model(predictor, args.model_folder, args.folds, checkpoint, messages)
    if predictor.configuration_manager.previous_stage_name is not None:
        raise UsageError(f"{args.model_folder} is the second stage of a cascade, which needs the first one's results.")
    return predictor, {
        "model": "/".join(args.model_folder.resolve().parts[-2:]),
        "trainer": predictor.trainer_name,
        "folds": folds,
        "checkpoint": checkpoint,
        "weights": _digest([args.model_folder / f"fold_{fold}" / checkpoint for fold in folds]),
        "seed": args.seed or 0,
        "step_size": step_size,
        "mirroring": not args.disable_tta,
        "told": bool(args.tell_modality),
        "nan_to": args.nan_to,
    }


def _settings(chosen: Any, options: dict[str, Any], unannotated: Any) -> Any:
    """What is measured of which labels, as ``evaluate_folders`` would."""
    from nnunet_multimodal.evaluation.cases import Settings
    from nnunet_multimodal.evaluation.labels import tolerances_for

    return Settings(
        chosen,
        tolerances_for(chosen, options["tolerance"], options["tolerances"]),
        options["surface"],
        options["distance_when_missed"],
        options["resample_to_reference"],
        unannotated,
    )


def _measured(settings: Any) -> dict[str, Any]:
    """What makes two measurements differ."""
    unannotated = {case: sorted(organs) for case, organs in settings.unannotated.items()}
    return {
        "surface": settings.surface,
        "tolerances_mm": settings.tolerances,
        "label_ids": settings.labels.organs,
        "ignore": settings.labels.ignore,
        "distance_when_missed": settings.distance_when_missed,
        "resample_to_reference": settings.resample,
        **({"not_annotated": unannotated} if unannotated else {}),
    }


def _predict(
    predictor: Any,
    cases: Sequence[Any],
    folder: Path,
    how: dict[str, Any],
    told: dict[str, str],
    harmonise: bool,
    change: Change | None,
    bar: Any,
    args: argparse.Namespace,
) -> dict[str, str]:
    """Predicts the cases of one level that are not there yet; case -> what went wrong."""
    from nnunet_multimodal.inference.folder import FILE_NAME, Finishing, Report, predict_cases
    from nnunet_multimodal.inference.workers import processes_for

    report = Report(folder / FILE_NAME, how)
    kept = report.take_over(told)
    waiting = [case for case in cases if case.name not in kept]
    processes = processes_for(predictor.device.type, len(waiting))
    start = bar.n + len(cases) - len(waiting)

    def fail(case: str, error: BaseException) -> None:
        if args.debug:
            raise error
        bar.write(f"{folder.name}: {report.failed[case]['error']}", file=sys.stderr)

    predict_cases(
        predictor, waiting, report, told, harmonise, args.nan_to, Finishing(), (processes, processes),
        lambda done: bar.update(start + done - bar.n), fail, change=change,
    )  # fmt: skip
    return {case: entry["error"] for case, entry in report.failed.items()}


def _example(predictor: Any, case: Any, seed: int, channels: tuple[int, ...], nan_to: float | None) -> Any:
    """An image to show the shifts on; None if it cannot be read again."""
    import numpy as np

    from nnunet_multimodal.evaluation.shift_report import Example
    from nnunet_multimodal.inference.position import affine_of

    reader = predictor.plans_manager.image_reader_writer_class()
    try:
        images, properties = reader.read_images([str(path) for path in case.files])
    except Exception:  # nnU-Net's readers raise anything; a report without the example is better than none
        return None
    if nan_to is not None:
        images = np.where(np.isfinite(images), images, np.float32(nan_to))
    return Example(case.name, images, properties["spacing"], seed, channels, affine_of(properties))


def _fold(text: str) -> str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is no fold: expected 0, 1, ... or all. REF goes before -f.")
    return text


def _channels(dataset_json: dict[str, Any]) -> list[str]:
    """Their names; older data sets call them modality."""
    channels = dataset_json["modality"] if "modality" in dataset_json else dataset_json["channel_names"]
    return [str(channels[key]) for key in sorted(channels, key=int)]


def _modalities(
    args: argparse.Namespace, options: dict[str, Any], cases: Sequence[str], messages: list[str]
) -> dict[str, str]:
    """case -> modality: what the user says, then what any dataset.json near references, images and model says."""
    from nnunet_multimodal.conversion.dataset import first_names
    from nnunet_multimodal.evaluation.evaluate import dataset_jsons, modality_table
    from nnunet_multimodal.evaluation.modalities import UNKNOWN, Modalities, told_by_case

    told, unused = told_by_case(options["modality_map"] or {}, [*cases])
    if unused:
        messages.append(f"keys of --modality-map that are no case ({len(unused)}): {first_names(unused)}")
    table: dict[str, str] = {}
    for path in [*dataset_jsons(args.model_folder, args.model_folder), *dataset_jsons(args.input, args.reference)]:
        table |= modality_table([path])
    modalities = Modalities(told, options["modality_pattern"], table)
    found = {case: modalities.of(case) for case in cases}
    unknown = [case for case, modality in found.items() if modality == UNKNOWN]
    if modalities and unknown:
        messages.append(f"no modality is known of {first_names(unknown)}")
    return found


def _told(args: argparse.Namespace, predictor: Any, modality_of: dict[str, str]) -> tuple[dict[str, str], bool]:
    """case -> modality in the model's spelling, and whether its data set was harmonised."""
    from nnunet_multimodal.conversion.dataset import first_names
    from nnunet_multimodal.data.modality import SECTION, ModalityTable, has_table
    from nnunet_multimodal.evaluation.modalities import UNKNOWN
    from nnunet_multimodal.inference.told import match_modality

    harmonise = bool((predictor.dataset_json.get(SECTION) or {}).get("harmonise"))
    if not args.tell_modality:
        if harmonise:
            raise UsageError(
                "the model's data set was harmonised, each modality in its own way: say which image is of which "
                "(--modality-map or --modality-pattern), and add --tell-modality."
            )
        return {}, False
    unknown = [case for case, modality in modality_of.items() if modality == UNKNOWN]
    if unknown:
        raise UsageError(
            f"--tell-modality: no modality is known of {first_names(unknown)}. Say it with --modality-map FILE or "
            "--modality-pattern REGEX."
        )
    known: Sequence[str] = predictor.modalities
    if not known and has_table(predictor.dataset_json):
        known = ModalityTable.from_dataset_json(predictor.dataset_json).modalities
    return {case: match_modality(name, known, "--tell-modality") for case, name in modality_of.items()}, harmonise


def _stamp(files: Sequence[Path], told: str | None) -> str:
    """Sizes and times of files, and what the network is told: another one of the same name is noticed."""
    seen = [f"{path.stat().st_size}-{path.stat().st_mtime_ns}" for path in files]
    return " ".join([*seen, *([] if told is None else [told])])


def _digest(files: Sequence[Path]) -> str:
    """Of the weights, so that a model that was trained on is another one."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]
