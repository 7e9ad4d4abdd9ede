"""``nnunet_multimodal predict``: nnUNetv2_predict that can be told each image's modality, and says which it used."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_multimodal.commands import predict_prompted
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import DataProblem, UsageError

DESCRIPTION = """\
Predict a folder of images (CASE_0000.nii.gz), as nnUNetv2_predict does, with any trained model.

A model of nnUNetTrainerMulModSeg is told each image's modality with --modality or --modality-map; an image of which
nobody says it is predicted as the modality that the network takes it for. What you say is always obeyed, also where the
network disagrees; such cases are listed. A model that has no modalities predicts as ever.

A model of nnUNetTrainerCmFNet fuses two registered images. Where one of them was not acquired, --missing says so, and
the branch of the other one answers.

--fix-sides gives each connected piece of an organ that comes in a left and a right the name of the side of the body on
which it lies; what is not clear stays as it is and is named. --slabs N predicts and finishes a large volume in N parts
along its longest axis: the same labels, in less memory and more time.

A model of nnUNetTrainerSegVol is asked by --text, --points or --box, alone or together; coordinates are x,y,z in mm
(RAS). --zoom looks at the whole volume coarsely, then closely where the organ is. With --box-from-labels and
--box-shift the command measures how well boxes have to be drawn. docs/prompts.md says more.

OUT gets the segmentations and predictions.json: for each case its modality, whether it was told or inferred, and how
sure the network is of it. Was the data set made with --harmonise, its intensities are harmonised here too; each image's
modality must then be told. A bad image costs its case: the rest is done, and the command ends with 1."""

EXAMPLE = """\
nnunet_multimodal predict -i imagesTs -o OUT -d 602 -c 2d
nnunet_multimodal predict -i imagesTs -o OUT -d 602 -c 3d_fullres -f 0 --modality MR
nnunet_multimodal predict -i imagesTs -o OUT -d 602 -c 2d --modality-map cases.json
nnunet_multimodal predict -i imagesTs -o OUT -d 604 -c 3d_fullres -tr nnUNetTrainerCmFNet --missing MR
nnunet_multimodal predict -i imagesTs -o OUT -m RESULT_FOLDER --slabs 4 --fix-sides
nnunet_multimodal predict -i imagesTs -o OUT -m RESULT_FOLDER --text liver spleen --zoom
nnunet_multimodal predict -i imagesTs -o OUT -m RESULT_FOLDER --points prompts.json --text"""

TRAINER = "nnUNetTrainerMulModSeg"
SURE = 0.9  # of another modality than was told: worth a warning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; what nnUNetv2_predict has is named as there."""
    parser.add_argument("-i", dest="input", type=Path, required=True, metavar="IN", help="folder of images")
    parser.add_argument("-o", dest="output", type=Path, required=True, metavar="OUT", help="folder for the results")
    model = parser.add_argument_group("model")
    model.add_argument("-d", dest="dataset", metavar="ID", help="data set of the training, number or name")
    model.add_argument("-c", dest="configuration", metavar="NAME", help="2d, 3d_fullres, ...")
    model.add_argument(
        "-tr", dest="trainer", metavar="NAME", help=f"default: {TRAINER}, with prompts {predict_prompted.TRAINER}"
    )
    model.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="NAME", help="default: %(default)s")
    model.add_argument("-f", dest="folds", nargs="+", metavar="FOLD", help="default: every fold that was trained")
    model.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="FILE", help="%(default)s")
    model.add_argument("-m", dest="model_folder", type=Path, metavar="DIR", help="result folder, instead of -d and -c")
    modality = parser.add_argument_group("modality (default: the network finds it out)").add_mutually_exclusive_group()
    modality.add_argument("--modality", metavar="NAME", help="of all images, such as MR")
    modality.add_argument(
        "--modality-map", type=Path, metavar="FILE", help='JSON: {"case_001": "MR", ...}; others are inferred'
    )
    parser.add_argument_group("registered pairs (nnUNetTrainerCmFNet)").add_argument(
        "--missing", nargs="+", metavar="CHANNEL", help="this one, such as MR, was not acquired: the other one answers"
    )
    predict_prompted.add_arguments(parser)
    how = parser.add_argument_group("prediction")
    how.add_argument("-device", "--device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one")
    how.add_argument("-step_size", type=_share, default=0.5, metavar="SHARE", help="of a tile (default: %(default)s)")
    how.add_argument("--disable_tta", action="store_true", help="no mirroring: faster, a little worse")
    how.add_argument("--not_on_device", action="store_true", help="results in main memory, for very large images")
    how.add_argument("--nan-to", type=float, metavar="VALUE", help="replace NaN and infinite voxels")
    how.add_argument(
        "-npp", type=_count, metavar="N", help="processes that prepare images; 0 does it here (default: 0 on a CPU)"
    )
    how.add_argument("-nps", type=_count, metavar="N", help="processes that write results; as -npp")
    how.add_argument(
        "--slabs", type=_positive, metavar="N", help="in N parts, for volumes that do not fit into memory (same labels)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--continue_prediction", "--continue", dest="go_on", action="store_true", help="keep what is finished in OUT"
    )
    output.add_argument("--save_probabilities", action="store_true", help="CASE.npz too, for ensembles")
    output.add_argument(
        "--fix-sides",
        action="store_true",
        help="left and right by where a piece lies; predictions.json says what changed",
    )


def run(args: argparse.Namespace) -> int:
    """Checks all that can be checked without torch, then predicts."""
    from nnunet_multimodal.evaluation.labels import read_json

    if not args.input.is_dir():
        raise DataProblem(
            f"-i {args.input} is {'a file, expected' if args.input.exists() else 'not'} a folder of images."
        )
    if args.output.exists() and (not args.output.is_dir() or args.output.samefile(args.input)):
        what = "is the input too: results would lie among the images" if args.output.is_dir() else "is a file"
        raise UsageError(f"-o {args.output} {what}. Choose another folder.")
    if args.slabs is not None and args.save_probabilities:
        raise UsageError("--slabs never has all probabilities at once: leave it or --save_probabilities out.")
    told: dict[str, Any] | None = None
    if args.modality_map is not None:
        told = read_json(args.modality_map)
        if not told or not all(isinstance(value, str) for value in told.values()):
            raise UsageError(f'{args.modality_map} must map cases to modalities: {{"case_001": "MR", ...}}.')
    if args.model_folder is None:
        if args.dataset is None or args.configuration is None:
            raise UsageError("which model? Give -d DATASET and -c CONFIGURATION, or -m RESULT_FOLDER.")
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            require_nnunet_path(variable)
    return predict_prompted.run(args) if predict_prompted.wanted(args) else _predict(args, told)


def _predict(args: argparse.Namespace, told_map: Mapping[str, str] | None) -> int:
    import torch
    from tqdm import tqdm

    from nnunet_multimodal.inference.folder import FILE_NAME, Finishing, Report, predict_cases
    from nnunet_multimodal.inference.images import find_cases
    from nnunet_multimodal.inference.missing import branched, find_missing
    from nnunet_multimodal.inference.modality import ModalityPredictor
    from nnunet_multimodal.inference.model import load_model, result_folder
    from nnunet_multimodal.inference.workers import processes_for

    folder = args.model_folder
    if folder is None:
        folder = result_folder(args.dataset, args.trainer or TRAINER, args.plans, args.configuration)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net remarks on the device
        predictor = ModalityPredictor(
            args.step_size, True, not args.disable_tta, not args.not_on_device, device, allow_tqdm=False
        )
    messages: list[str] = []
    folds, checkpoint = load_model(predictor, folder, args.folds, args.checkpoint, messages)
    if predictor.configuration_manager.previous_stage_name is not None:
        raise UsageError(f"{folder.name} is the second stage of a cascade: use nnUNetv2_predict.")
    dataset_json = predictor.dataset_json
    if args.fix_sides:
        _require_sides(dataset_json["labels"])
    channels = dataset_json.get("modality", dataset_json.get("channel_names"))  # older data sets call them modality
    names = [channels[key] for key in sorted(channels, key=int)]
    missing = None if args.missing is None else find_missing(predictor, names, args.missing)
    optional = names if branched(predictor) is not None else []
    cases = find_cases(
        args.input, dataset_json["file_ending"], len(names), None if missing is None else missing.channel, optional
    )
    if missing is not None:
        messages.append(f"without {missing.name}: the branch of {missing.answers} answers")
    told = _told(args, told_map, predictor, [case.name for case in cases], messages)
    harmonise = _harmonise(dataset_json, [case.name for case in cases if case.name not in told])
    for message in messages:
        print(message)
    _warn_of_untrained(predictor, told)
    report = Report(
        args.output / FILE_NAME,
        {
            "model": "/".join(folder.resolve().parts[-2:]),
            "trainer": predictor.trainer_name,
            "folds": folds,
            "checkpoint": checkpoint,
            "harmonise": harmonise,
            "step_size": args.step_size,
            "mirroring": not args.disable_tta,
            **({} if predictor.trained_on is None else {"trained_on": predictor.trained_on}),
            **({} if branched(predictor) is None else {"missing": None if missing is None else missing.name}),
            **({"fix_sides": True} if args.fix_sides else {}),
        },
    )
    kept = report.take_over(told) if args.go_on else []
    if args.save_probabilities:
        kept = [case for case in kept if (args.output / f"{case}.npz").is_file()]
    waiting = [case for case in cases if case.name not in kept]
    default = processes_for(device.type, len(waiting))
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total_fmt} cases [{elapsed}<{remaining}]"
    with tqdm(total=len(waiting), desc="predicting", bar_format=bar_format, disable=None) as bar:

        def fail(case: str, error: BaseException) -> None:
            if args.debug:
                raise error
            bar.write(f"error: {report.failed[case]['error']}", file=sys.stderr)

        predict_cases(
            predictor, waiting, report, told, harmonise is not None, args.nan_to,
            Finishing(args.save_probabilities, args.slabs, args.fix_sides),
            (default if args.npp is None else args.npp, default if args.nps is None else args.nps),
            lambda done: bar.update(done - bar.n), fail, missing,
        )  # fmt: skip
    _print_summary(report, [case.name for case in cases], len(kept))
    if not report.failed:
        return 0
    codes = {entry["exit_code"] for entry in report.failed.values()}
    return codes.pop() if len(report.failed) == len(cases) and len(codes) == 1 else 1


def _require_sides(labels: Mapping[str, Any]) -> None:
    """--fix-sides has something to fix."""
    from nnunet_multimodal.data.sides import sided_pairs

    if any(isinstance(value, (list, tuple)) for value in labels.values()):
        raise UsageError(
            "--fix-sides: the model predicts regions, which overlap; sides can be put right in labels only."
        )
    if not sided_pairs([*labels]):
        raise UsageError(f"--fix-sides: no labels of the model come in a left and a right: {', '.join(labels)}.")


def _told(
    args: argparse.Namespace, told_map: Mapping[str, str] | None, predictor: Any, cases: list[str], messages: list[str]
) -> dict[str, str]:
    """case -> modality, in the model's spelling."""
    from nnunet_multimodal.data.modality import ModalityTable, has_table
    from nnunet_multimodal.inference.told import match_modality, told_by_case

    told: dict[str, str] = {}
    known = predictor.modalities
    if not known and has_table(predictor.dataset_json):
        known = ModalityTable.from_dataset_json(predictor.dataset_json).modalities
    if args.modality is not None:
        told = dict.fromkeys(cases, match_modality(args.modality, known, "--modality"))
    elif told_map is not None:
        ending = predictor.dataset_json["file_ending"]
        told, found = told_by_case(told_map, cases, ending, known, str(args.modality_map))
        messages += found
    if told and predictor.conditioned is None:
        messages.append(
            f"the network of {predictor.trainer_name} is the same for every modality: what was told is noted, "
            "and changes no segmentation" + (" but through --harmonise." if _method(predictor.dataset_json) else ".")
        )
    return told


def _warn_of_untrained(predictor: Any, told: Mapping[str, str]) -> None:
    """A model of one modality (_CTonly) has a row of text for each of its data set's, but has learned only one."""
    other = sorted(set(told.values()) - {predictor.trained_on})
    if predictor.trained_on is not None and other:
        print(
            f"warning: {predictor.trainer_name} was trained on {predictor.trained_on} alone and has never seen "
            f"{' or '.join(other)}, which you say these images are.",
            file=sys.stderr,
        )


def _method(dataset_json: Mapping[str, Any]) -> str | None:
    section = dataset_json.get("nnunet_multimodal")
    return section.get("harmonise") if isinstance(section, Mapping) else None


def _harmonise(dataset_json: Mapping[str, Any], untold: list[str]) -> str | None:
    """How the model's data set was harmonised; None if it was not."""
    from nnunet_multimodal.conversion.dataset import first_names

    method = _method(dataset_json)
    if method is None:
        return None
    from nnunet_multimodal.conversion.harmonise import METHODS

    if method not in METHODS:
        raise UsageError(
            f"the model's data set was harmonised by '{method}'; this version knows only {', '.join(METHODS)}."
        )
    if untold:
        raise UsageError(
            f"the model's data set was harmonised ('{method}'), each modality in its own way, so the network cannot "
            f"find the modality out. Say it with --modality, or with --modality-map; not told: {first_names(untold)}"
        )
    return method


def _print_summary(report: Any, cases: list[str], kept: int) -> None:
    done = {case: report.cases[case] for case in cases if case in report.cases}
    for modality in sorted({entry["modality"] or "-" for entry in done.values()}):
        entries = {case: entry for case, entry in done.items() if (entry["modality"] or "-") == modality}
        ways = [entry["how"] for entry in entries.values()]
        line = f"{modality}: {', '.join(f'{ways.count(way)} {way}' for way in sorted(set(ways)))}"
        sure = {case: entry["confidence"] for case, entry in entries.items() if "confidence" in entry}
        if sure:
            case = min(sure, key=lambda name: sure[name])
            line += f"; lowest confidence {sure[case]:.3f} ({case})"
        print(line if modality != "-" else f"{len(entries)} cases without a modality")
    against = [
        case
        for case, entry in done.items()
        if entry.get("inferred", entry["modality"]) != entry["modality"] and entry["inferred_confidence"] > SURE
    ]
    if against:
        listed = ", ".join(f"{case} ({done[case]['inferred']})" for case in against)
        print(
            f"warning: predicted as told, but the network takes these for another modality with a confidence above "
            f"{SURE}: {listed}",
            file=sys.stderr,
        )
    changed = {case: entry["sides"]["changed"] for case, entry in done.items() if entry.get("sides", {}).get("changed")}
    for case, changes in changed.items():
        moved = ", ".join(f"{each['voxels']} voxels of {each['from']} are {each['to']}" for each in changes)
        print(f"sides put right in {case}: {moved}")
    unclear = [case for case, entry in done.items() if entry.get("sides", {}).get("ambiguous")]
    if unclear:
        print(f"sides not clear, left as they are (see predictions.json): {', '.join(unclear)}")
    print(f"{len(done) - kept} predicted, {kept} kept from before, {len(report.failed)} failed: {report.path}")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}': expected 0, 1, 2, ...")
    return int(text)


def _positive(text: str) -> int:
    count = _count(text)
    if not count:
        raise argparse.ArgumentTypeError("expected 1, 2, 3, ...")
    return count


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a number above 0, at most 1")
    return value
