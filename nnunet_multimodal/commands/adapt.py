"""``nnunet_multimodal adapt``: a trained model for another modality, by few parameters."""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from pathlib import Path
from typing import Any

from nnunet_multimodal.environment import find_raw_dataset, require_nnunet_path, use_own_trainers
from nnunet_multimodal.errors import UsageError

DESCRIPTION = """\
Adapt a trained model to another data set: a good CT model to MR, say, with a few labelled MR scans.

--from RESULT_FOLDER -d DATASET looks whether the model and the data set fit (channels, class names, axes,
normalisation), writes plans for the data set that are the model's own, with what the trainer needs, and says what to
type next. Two trainers: nnUNetTrainerLoRA makes a model for the new modality; nnUNetTrainerMoA one for both, whose
answers for the old modality do not change at all.

--merge RESULT_FOLDER -o OUT makes a stock nnU-Net model of an adapted one, which predicts without this package; of a
mixture with the adapter of --modality. --export RESULT_FOLDER -o FILE writes only what was learned, a few per cent of
the model; --merge FILE --from BASE -o OUT puts it on the model again that it was learned for, and on no other.

Checkpoints and adapter files are read as data only: one that holds anything that could run is refused."""

EXAMPLE = """\
nnunet_multimodal adapt --from RESULTS/Dataset601_CT/nnUNetTrainer__nnUNetPlans__3d_fullres -d 605
nnunet_multimodal adapt --from CT_MODEL -d 605 -tr nnUNetTrainerMoA --base-modality CT --modality MR
nnunet_multimodal adapt --merge RESULTS/Dataset605_MR/nnUNetTrainerLoRA__nnUNetPlansFrom601__3d_fullres -o MR_MODEL
nnunet_multimodal adapt --export LORA_MODEL -o mr_adapter.pt -f 0
nnunet_multimodal adapt --merge mr_adapter.pt --from CT_MODEL -o MR_MODEL"""

FINGERPRINT = "dataset_fingerprint.json"
LORA, MOA = "nnUNetTrainerLoRA", "nnUNetTrainerMoA"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; what nnU-Net has is named as there."""
    what = parser.add_argument_group("what")
    what.add_argument("--from", dest="base", type=Path, metavar="DIR", help="result folder of the trained model")
    other = what.add_mutually_exclusive_group()
    other.add_argument("--merge", type=Path, metavar="MODEL", help="adapted result folder, or adapter file with --from")
    other.add_argument("--export", type=Path, metavar="DIR", help="adapted result folder")
    target = parser.add_argument_group("to another data set")
    target.add_argument("-d", dest="dataset", metavar="ID", help="data set in nnUNet_raw, number or name")
    target.add_argument("-c", dest="configuration", metavar="NAME", help="default: the one the model was trained in")
    target.add_argument("-tr", dest="trainer", default=LORA, metavar="NAME", help="default: %(default)s")
    target.add_argument("-p", dest="plans", metavar="NAME", help="of the new plans (default: nnUNetPlansFrom601)")
    target.add_argument("--rank", type=_rank, metavar="R", help="of the factors (default: 8)")
    target.add_argument("--alpha", type=float, metavar="A", help="scale A / sqrt(R) (default: 8)")
    target.add_argument("--classic-scale", action="store_true", help="scale A / R")
    target.add_argument("--layers", metavar="REGEX", help="layers that get factors, by name (default: all but outputs)")
    target.add_argument("--train-norm", action="store_true", help=f"normalisation layers learn, too ({LORA})")
    target.add_argument("--train-bias", action="store_true", help=f"biases learn, too ({LORA})")
    target.add_argument("--base-modality", nargs="+", metavar="NAME", help=f"which the model was trained on ({MOA})")
    target.add_argument(
        "--normalisation", choices=("base", "target"), help="where they differ (default: what the channel name means)"
    )
    result = parser.add_argument_group("merge and export")
    result.add_argument("-o", dest="output", type=Path, metavar="OUT", help="new result folder, or file with --export")
    result.add_argument("-f", dest="folds", nargs="+", metavar="FOLD", help="default: every fold that was trained")
    result.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="FILE", help="%(default)s")
    parser.add_argument("--modality", metavar="NAME", help=f"of the data set, or whose adapter is merged ({MOA})")
    parser.add_argument("--overwrite", action="store_true", help="replace plans, a model or a file that is there")


def run(args: argparse.Namespace) -> int:
    """Checks what can be checked without torch, then does one of the three."""
    if args.merge is not None or args.export is not None:
        option = "--merge" if args.merge is not None else "--export"
        if args.output is None:
            raise UsageError(f"{option} needs -o, where the result goes.")
        if args.dataset is not None:
            raise UsageError(f"-d belongs to --from without {option}: leave one of them out.")
        return _merge(args) if args.merge is not None else _export(args)
    if args.base is None:
        raise UsageError("what? Give --from RESULT_FOLDER -d DATASET, --merge or --export; see --help.")
    if args.dataset is None:
        raise UsageError("--from needs -d, the data set that the model is adapted to.")
    return _prepare(args)


# --- plans for another data set ---------------------------------------------------------------------------------------


def _prepare(args: argparse.Namespace) -> int:
    from nnunet_multimodal.registry import is_stock, require_trainer

    if not is_stock(args.trainer):
        require_trainer(args.trainer)
    raw = find_raw_dataset(args.dataset)
    preprocessed = require_nnunet_path("nnUNet_preprocessed") / raw.name
    use_own_trainers()
    from nnunet_multimodal.adaptation.base_model import read_base, read_object, require_stock
    from nnunet_multimodal.adaptation.plans import move_plans, write_plans

    base = read_base(args.base)
    if args.configuration not in (None, base.configuration):
        raise UsageError(f"-c {args.configuration}: the model was trained in {base.configuration}; adapt that.")
    require_stock(base)
    dataset_json = read_object(raw / "dataset.json")
    name = args.plans or f"{base.plans['plans_name']}From{_number(base.name)}"
    if name == base.plans["plans_name"] and raw.name == base.name:
        raise UsageError(f"-p {name}: these are the model's own plans. Take another name.")
    settings = _settings(args, dataset_json)
    fingerprint = preprocessed / FINGERPRINT
    moved = move_plans(base, dataset_json, raw.name, name, args.trainer, settings, args.normalisation, fingerprint)
    _check_settings(moved.plans, base.configuration, dataset_json, args.trainer, moved.notes)
    written = write_plans(moved, raw, preprocessed, args.overwrite)
    if base.model.message:
        print(base.model.message)
    print(f"model: {base.model.file} ({base.model.trainer}, {base.configuration} of {base.name})")
    for note in moved.notes:
        print(note)
    for warning in moved.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for path in written:
        print(f"written: {path}")
    _print_next(raw.name, base, name, args.trainer, preprocessed)
    return 0


def _settings(args: argparse.Namespace, dataset_json: dict[str, Any]) -> dict[str, Any]:
    """What the options say, for the plans' section."""
    from nnunet_multimodal.data.modality import has_table

    given: dict[str, Any] = {
        "rank": args.rank,
        "alpha": args.alpha,
        "rank_stabilised": False if args.classic_scale else None,
        "adapted_layers": args.layers,
        "train_norm": args.train_norm or None,
        "train_bias": args.train_bias or None,
    }
    if args.trainer.startswith(MOA):
        if args.train_norm or args.train_bias:
            raise UsageError(f"--train-norm and --train-bias would change what {MOA} leaves as it is.")
        if not args.trainer.startswith(f"{MOA}_learned"):
            if args.base_modality is None:
                raise UsageError(f"{MOA} needs --base-modality: which modality was the model trained on? Such as CT.")
            if args.modality is None and not has_table(dataset_json):
                raise UsageError(
                    f"{MOA} has to know of which modality the cases are: give --modality, such as MR, or make the "
                    "modality table: nnunet_multimodal convert table"
                )
        given |= {"base_modalities": args.base_modality, "new_modality": args.modality}
    elif args.modality is not None or args.base_modality is not None:
        raise UsageError(f"--modality and --base-modality are for -tr {MOA}; {args.trainer} makes one adapter.")
    return {key: value for key, value in given.items() if value is not None}


def _check_settings(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], trainer: str, notes: list[str]
) -> None:
    """Builds what would be trained, which is where a wrong setting shows, and says how much of it learns."""
    if not trainer.startswith((LORA, MOA)):
        return
    from nnunet_multimodal.adaptation.models import adapting_class, build
    from nnunet_multimodal.networks.lora import count_parameters

    filled = copy.deepcopy(plans)
    adapting_class(trainer, "-tr").fill_section(filled, configuration, dataset_json)
    trainable, original = count_parameters(build(trainer, filled, configuration, dataset_json, "-tr"))
    notes.append(f"to be trained: {trainable:,} parameters, {100 * trainable / original:.1f} % of {original:,}")


def _print_next(dataset: str, base: Any, plans: str, trainer: str, preprocessed: Path) -> None:
    from nnunet_multimodal.registry import is_stock

    number, configuration = _number(dataset), base.configuration
    model = f"-tr {trainer} -p {plans}"
    lines = [] if (preprocessed / FINGERPRINT).exists() else [f"nnUNetv2_extract_fingerprint -d {number}"]
    lines.append(f"nnUNetv2_preprocess -d {number} -plans_name {plans} -c {configuration}")
    if is_stock(trainer):  # which knows no settings
        lines.append(
            f"nnUNetv2_train {number} {configuration} 0 {model} -pretrained_weights {shlex.quote(str(base.model.file))}"
        )
    else:
        lines.append(f"nnUNetv2_train {number} {configuration} 0 {model}")
    lines.append(f"nnunet_multimodal predict -i IMAGES -o OUT -d {number} -c {configuration} {model}")
    print("\n".join(f"{'Next:' if index == 0 else '     '} {line}" for index, line in enumerate(lines)))


# --- results ----------------------------------------------------------------------------------------------------------


def _merge(args: argparse.Namespace) -> int:
    use_own_trainers()
    from nnunet_multimodal.adaptation.models import apply_adapter, merged_checkpoint, require_free, write_model
    from nnunet_multimodal.data.modality import SECTION

    require_free(args.output, args.overwrite)
    for source in filter(None, (args.merge, args.base)):
        if source.is_dir() and args.output.resolve() in (source.resolve(), source.resolve().parent):
            raise UsageError(f"-o {args.output} is the model that is read: it would be lost. Choose another -o.")
    messages: list[str] = []
    if args.merge.is_file() and args.merge.suffix != ".zip" and args.base is not None:
        if args.folds is not None:
            raise UsageError("-f: an adapter file is of one fold. Leave it out.")
        adapted = [apply_adapter(args.merge, args.base, messages)]
    else:
        if args.merge.is_file() and args.merge.suffix == ".pt":
            raise UsageError(f"{args.merge} is an adapter file: name the model that it was learned for with --from.")
        if args.base is not None:
            raise UsageError(f"--from: {args.merge} is a folder, which holds the whole model. Leave --from out.")
        adapted = _read(args, args.merge, messages)
    checkpoints = [merged_checkpoint(each, args.modality) for each in adapted]
    write_model(checkpoints, args.output, args.overwrite)
    for message in messages:
        print(message)
    folds = " ".join(str(each.fold) for each in adapted)
    print(f"merged: fold {folds} of {adapted[0].trainer} to nnUNetTrainer in {args.output}")
    model = f"-i IMAGES -o OUT -m {shlex.quote(str(args.output))} -f {folds}"
    if (adapted[0].dataset_json.get(SECTION) or {}).get("harmonise"):  # of which nnU-Net's own command knows nothing
        print(f"Next: nnunet_multimodal predict {model} --modality NAME")
    else:
        print(f"Next: nnUNetv2_predict_from_modelfolder {model}")
    return 0


def _export(args: argparse.Namespace) -> int:
    use_own_trainers()
    from nnunet_multimodal.adaptation.models import write_adapter

    folds = _folds(args, args.export)
    if len(folds) != 1:
        raise UsageError(f"a file holds one fold: choose with -f one of {', '.join(folds)}.")
    messages: list[str] = []
    args.folds = folds
    (adapted,) = _read(args, args.export, messages)
    size, model = write_adapter(adapted, args.output, args.overwrite)
    for message in messages:
        print(message)
    print(
        f"written: {args.output}, {size / 1e6:.2f} MB, {100 * size / model:.1f} % of the model's {model / 1e6:.1f} MB"
    )
    print(f"Next: nnunet_multimodal adapt --merge {shlex.quote(str(args.output))} --from BASE_MODEL -o OUT")
    return 0


def _read(args: argparse.Namespace, folder: Path, messages: list[str]) -> list[Any]:
    from nnunet_multimodal.adaptation.models import read_adapted

    return [read_adapted(folder, fold, args.checkpoint, messages) for fold in _folds(args, folder)]


def _folds(args: argparse.Namespace, folder: Path) -> list[str]:
    """Those that the user names, by -f or by the folder of one; else all that were trained."""
    from nnunet_multimodal.adaptation.base_model import model_folder
    from nnunet_multimodal.adaptation.models import folds_of

    root = model_folder(folder)
    named = [folder.name.removeprefix("fold_")] if root != folder else folds_of(root)
    return args.folds or named


def _number(dataset: str) -> str:
    """601 of Dataset601_Liver."""
    return dataset.removeprefix("Dataset").partition("_")[0].lstrip("0")


def _rank(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}': expected 1, 2, 3, ...")
    return int(text)
