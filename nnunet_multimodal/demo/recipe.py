"""What the demo does, step by step; data and file work only, nothing is run here.

DIR/train, DIR/test        two phantoms: subjects to train on, in T1w only, and others in every contrast
DIR/nnUNet_raw, ...        nnU-Net's three folders
DIR/scribbles              simulated scribbles on the T1w of the test subjects
DIR/subjects               what `refer` takes: a folder for each subject
DIR/found, DIR/truth       what was found, and what is true
DIR/evaluation             what `evaluate` wrote
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunet_multimodal.errors import UsageError

DATASET = 601
NAME = "Demo"
PLANS = "nnUNetPlansDemo"
TRAINER = "nnUNetTrainerCrossMR"
REFERENCE = "T1w"
CONTRASTS = ("T1w", "T2w", "DWI", "InPhase", "OpposedPhase", "CT")
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
ENDING = ".nii.gz"
MODALITY = r"(?P<modality>[^/]+)$"  # SUBJECT/CONTRAST


@dataclass(frozen=True)
class Options:
    """What makes one demo differ from another; a folder holds one of them.

    Attributes:
        train_subjects, test_subjects: how many.
        contrasts: of the test subjects; the first is the reference.
        voxel: mm of a T1w voxel (x, y, z).
        pixels: mm that nnU-Net trains at, within slices.
        epochs, iterations: so many epochs of so many steps.
        batch_size: slices in a step.
        most_features: of a stage of the network; nnU-Net's own are halved first.
        network: settings of the method (README, Settings).
        device: cpu, cuda or mps.
    """

    train_subjects: int = 24
    test_subjects: int = 3
    contrasts: tuple[str, ...] = CONTRASTS
    voxel: tuple[float, float, float] = (2.5, 2.5, 7.0)
    pixels: float = 5.0
    epochs: int = 10
    iterations: int = 150
    batch_size: int = 6
    most_features: int = 128
    network: tuple[tuple[str, float], ...] = (("layers", 3), ("repainted", 0.3))
    device: str = "cpu"

    def as_json(self) -> dict[str, Any]:
        """As demo.json has it."""
        return json.loads(json.dumps(asdict(self)))


# Nothing to be learned from its numbers: it shows in a minute or two that everything runs.
QUICK = Options(
    train_subjects=5,  # nnU-Net's five folds need five
    test_subjects=1,
    contrasts=("T1w", "T2w", "CT"),
    voxel=(5.0, 5.0, 14.0),
    pixels=7.0,
    epochs=2,
    iterations=3,
    batch_size=2,
    most_features=16,
    network=(("layers", 2), ("levels", 2), ("queries", 3), ("width", 16), ("hidden", 16), ("heads", 2)),
)


@dataclass(frozen=True)
class Step:
    """One thing that is done.

    Attributes:
        name: of the step, and of its log file.
        title: what it is for, in a few words.
        command: the words of the command that does it; for a step of our own, what it comes to in words.
        do: for a step of our own, in place of a command.
        go_on: words that the command takes in addition when it goes on where it stopped.
        progress: a pattern in the log whose last group is how far it is, and how far it goes.
    """

    name: str
    title: str
    command: tuple[str, ...]
    do: Callable[[], None] | None = None
    go_on: Callable[[], tuple[str, ...]] = tuple
    progress: tuple[str, int] | None = None


def steps(folder: Path, options: Options, organs: dict[str, int]) -> list[Step]:
    """All steps in their order; paths are written as ``folder`` is."""
    train, test, subjects = folder / "train", folder / "test", folder / "subjects"
    voxel = [f"{size:g}" for size in options.voxel]
    label_names = [f"{name}={value}" for name, value in organs.items()]
    model = ["-d", DATASET, "-c", "2d", "-tr", TRAINER, "-p", PLANS, "-f", "0"]
    preprocessed = folder / "nnUNet_preprocessed" / f"Dataset{DATASET}_{NAME}"
    fold = folder / "nnUNet_results" / f"Dataset{DATASET}_{NAME}" / f"{TRAINER}__{PLANS}__2d" / "fold_0"
    raw = folder / "nnUNet_raw" / f"Dataset{DATASET}_{NAME}"

    def words(*parts: object) -> tuple[str, ...]:
        return tuple(str(part) for part in parts)

    def overwrite() -> tuple[str, ...]:  # it is whole, but we were stopped before it was written down
        return ("--overwrite",) if raw.exists() else ()

    def resume() -> tuple[str, ...]:
        return ("--c",) if any(fold.glob("checkpoint_*.pth")) else ()

    return [
        Step(
            "phantom_train",
            f"make {options.train_subjects} patients up, in {REFERENCE} only: what is trained on",
            words("nnunet_multimodal", "phantom", train, "--subjects", options.train_subjects, "--contrasts",
                  REFERENCE, "--spacing", *voxel, "--seed", 0),
        ),
        Step(
            "phantom_test",
            f"{_patients(options.test_subjects)}, in {', '.join(options.contrasts)}",
            words("nnunet_multimodal", "phantom", test, "--subjects", options.test_subjects, "--contrasts",
                  *options.contrasts, "--spacing", *voxel, "--seed", 1),
        ),
        Step(
            "convert",
            f"the labelled {REFERENCE} images become a data set of nnU-Net",
            words("nnunet_multimodal", "convert", "crossmr", "--reference-images", train / "images" / REFERENCE,
                  "--labels", train / "labels" / REFERENCE, "-d", DATASET, "--name", NAME,
                  "--label-names", *label_names),
            go_on=overwrite,
        ),
        Step(
            "plan",
            "nnU-Net plans and preprocesses",
            words("nnUNetv2_plan_and_preprocess", "-d", DATASET, "-c", "2d", "-np", 1, "-npfp", 1,
                  "--verify_dataset_integrity", "-gpu_memory_target", 1,
                  "-overwrite_target_spacing", voxel[2], f"{options.pixels:g}", f"{options.pixels:g}"),
        ),
        Step(
            "shrink",
            "a copy of the plans with a small network and a short training",
            (
                f"copy {preprocessed / 'nnUNetPlans.json'} to {PLANS}.json, and change there plans_name, and in "
                f"configurations.2d batch_size to {options.batch_size}, features_per_stage to half of it and at most "
                f"{options.most_features}, nnunet_multimodal to {json.dumps(settings(options))}",
            ),
            do=lambda: shrink_plans(preprocessed, options),
        ),
        Step(
            "train",
            f"nnU-Net trains {options.epochs} epochs of {options.iterations} steps",
            words("nnUNetv2_train", DATASET, "2d", 0, "-tr", TRAINER, "-p", PLANS, "-device", options.device),
            go_on=resume,
            progress=(r": Epoch (\d+)$", options.epochs),
        ),
        Step(
            "scribbles",
            f"scribbles on the {REFERENCE} of the other patients, as a user would draw them",
            words("nnunet_multimodal", "scribbles", "simulate", "--labels", test / "labels" / REFERENCE,
                  "-o", folder / "scribbles", "--seed", 1),
        ),
        Step(
            "subjects",
            "a folder for each patient: reference, scribbles and the images to segment",
            (
                f"link into {subjects / 'PATIENT'} the {REFERENCE} as reference{ENDING}, its scribbles as "
                f"scribbles{ENDING}, and {', '.join(f'{contrast}{ENDING}' for contrast in options.contrasts)}",
            ),
            do=lambda: link_subjects(folder, options),
        ),
        Step(
            "refer",
            "segment every contrast by the scribbled reference",
            words("nnunet_multimodal", "refer", "--subjects", subjects, "-o", folder / "found", *model,
                  "--device", options.device),
            go_on=lambda: ("--continue",) if (folder / "found").exists() else (),
        ),
        Step(
            "evaluate",
            "compare with the truth",
            words("nnunet_multimodal", "evaluate", folder / "found", folder / "truth", "-o", folder / "evaluation",
                  "--label-names", *label_names, "--modality-pattern", MODALITY, "--in-distribution", REFERENCE,
                  "--images", subjects, "-j", 1),
        ),
    ]  # fmt: skip


def _patients(count: int) -> str:
    return "another patient" if count == 1 else f"{count} other patients"


def environment(folder: Path, options: Options) -> dict[str, str]:
    """nnU-Net's variables, as the demo sets them for its commands."""
    variables = {name: str((folder / name).resolve()) for name in FOLDERS}
    variables["nnUNet_compile"] = "f"  # takes longer than it saves in a training of minutes
    if options.device == "cpu":  # each further process would import torch, and wait for a core
        variables |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    return variables


def settings(options: Options) -> dict[str, float]:
    """The section ``nnunet_multimodal`` of the plans: a short training, saved after every epoch."""
    return {
        "num_epochs": options.epochs,
        "num_iterations_per_epoch": options.iterations,
        "num_val_iterations_per_epoch": 2,
        "save_every": 1,
        **dict(options.network),
    }


def shrink_plans(preprocessed: Path, options: Options) -> None:
    """A copy of nnU-Net's plans that a CPU can train; an edit that a user makes by hand."""
    plans = json.loads((preprocessed / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["plans_name"] = PLANS
    configuration = plans["configurations"]["2d"]
    configuration["batch_size"] = options.batch_size
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [min(options.most_features, n // 2) for n in network["features_per_stage"]]
    configuration["nnunet_multimodal"] = settings(options)
    write_json(preprocessed / f"{PLANS}.json", plans)


def link_subjects(folder: Path, options: Options) -> None:
    """DIR/subjects for `refer`, and the labels in the same order for `evaluate`."""
    for label in sorted((folder / "test" / "labels" / REFERENCE).glob(f"*{ENDING}")):
        subject = label.name.removesuffix(ENDING)
        place = folder / "subjects" / subject
        link(folder / "test" / "images" / REFERENCE / label.name, place / f"reference{ENDING}")
        link(folder / "scribbles" / label.name, place / f"scribbles{ENDING}")
        for contrast in options.contrasts:
            link(folder / "test" / "images" / contrast / label.name, place / f"{contrast}{ENDING}")
            link(folder / "test" / "labels" / contrast / label.name, folder / "truth" / subject / f"{contrast}{ENDING}")


def link(source: Path, target: Path) -> None:
    """A relative link, so that the folder can be moved; a copy where there are no links (Windows)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.symlink_to(os.path.relpath(source, target.parent))
    except OSError:
        shutil.copyfile(source, target)


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_options(before: dict[str, Any], wanted: Options, folder: Path) -> None:
    """Raises UsageError where a folder holds a demo of other options."""
    now = wanted.as_json()
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        found = "; ".join(f"{key}: {_short(before.get(key))} there, {_short(now[key])} now" for key in differing)
        raise UsageError(
            f"{folder} holds a demo with other options ({found}). Give the same options as before to go on with it, "
            f"choose another folder with -o, or delete it: rm -r {folder}"
        )


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)
