"""What every kind of comparison does the same way: commands, plans, trainings, scores, numbers in tables."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from comparisons import Comparison, Method
from comparisons_adapt import AdaptComparison
from comparisons_mixed import MixedComparison
from comparisons_scribbles import ScribbleComparison
from main_job import ENDING

BIN = Path(sys.executable).parent
HERE = Path(__file__).resolve().parent
SECTION = "nnunet_multimodal"
METRICS = {"DSC": "dsc", "NSD": "nsd"}  # name to key in evaluation.json
DATASETS = {
    "plain": (701, "Plain"),
    "scribble": (702, "Scribble"),
    "crossmr": (703, "CrossMR"),
    "mixed": (704, "Mixed"),
    "scribbles": (705, "Scribbles"),
    "dense": (706, "Dense"),
    "base": (707, "Base"),
    "adapt": (708, "Adapt"),
}


@dataclass(frozen=True)
class Workshop:
    """Where a comparison is worked on, and with what."""

    comparison: Comparison | MixedComparison | ScribbleComparison | AdaptComparison
    work: Path
    device: str
    workers: int  # processes for augmentation; 0: in the training's own

    @property
    def organs(self) -> dict[str, int]:
        labels = json.loads((self.work / "phantom/phantom.json").read_text(encoding="utf-8"))["labels"]
        return {name: value for name, value in labels.items() if value}

    @property
    def subjects(self) -> tuple[list[str], list[str]]:
        """Names of those to train on and of those to test on."""
        names = sorted(json.loads((self.work / "phantom/phantom.json").read_text(encoding="utf-8"))["subjects"])
        train, test = self.comparison.train_subjects, self.comparison.test_subjects
        if len(names) < train + test:
            raise SystemExit(f"the phantom in {self.work} has {len(names)} subjects, {train + test} are needed")
        return names[:train], names[train : train + test]

    def results(self, seed: int) -> Path:
        return self.work / f"results/seed_{seed}"

    def fold_of(self, seed: int) -> str:
        """nnU-Net's fold that this seed trains."""
        return "all"

    def fold(self, name: str, seed: int) -> Path:
        method = self.comparison.methods[name]
        folder = f"{method.trainer}__{plans_name(name)}__2d/fold_{self.fold_of(seed)}"
        return self.results(seed) / dataset_name(method) / folder

    def predictions(self, name: str, seed: int) -> Path:
        return self.work / f"pred/{name}/seed_{seed}"

    def scores(self, name: str, seed: int) -> Path:
        return self.work / f"scores/{name}/seed_{seed}"


running: set[subprocess.Popen[bytes]] = set()
stopping = threading.Event()


def dataset_name(method: Method) -> str:
    number, name = DATASETS[method.data]
    return f"Dataset{number}_{name}"


def plans_name(method_name: str) -> str:
    """Each method has its own copy of the plans: they hold its settings."""
    return f"nnUNetPlans_{method_name}"


def call(*command: object, log: TextIO | None = None, **environment: str) -> None:
    """A command of this Python environment, shown before it is run."""
    words = [str(word) for word in command]
    print("$", *words, file=log, flush=True)
    process = subprocess.Popen(
        [str(BIN / words[0]), *words[1:]], env={**os.environ, **environment}, stdout=log,
        stderr=None if log is None else subprocess.STDOUT, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    running.add(process)
    try:
        if stopping.is_set():
            process.terminate()
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, words)
    finally:
        running.discard(process)


def stop_all() -> None:
    """No further command is started, and those that run are ended; their trainings have checkpoints."""
    stopping.set()
    for process in list(running):
        process.terminate()


# --- data -------------------------------------------------------------------------------------------------------------


def case(subject: str, contrast: str) -> str:
    """One image of one subject as a case of nnUNetv2_predict."""
    return f"{subject}__{contrast}"


def make_phantom(shop: Workshop, phantom: Path | None) -> None:
    """The subjects of a comparison, unless ``phantom`` has them; what is there is kept."""
    comparison, folder = shop.comparison, shop.work / "phantom"
    if phantom is not None and not folder.exists():
        shop.work.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(phantom.resolve())
    if not folder.is_symlink():
        count = comparison.train_subjects + comparison.test_subjects
        call("nnunet_multimodal", "phantom", folder, "--subjects", count, "--contrasts", *comparison.contrasts,
             "--seed", comparison.phantom_seed, *comparison.phantom_options)  # fmt: skip


def require_images(shop: Workshop, needed: Iterable[tuple[str, str]]) -> None:
    """The phantom has these images (contrast, subject) and their labels."""
    folder = shop.work / "phantom"
    for kind in ("images", "labels"):
        for contrast, subject in needed:
            if not (folder / kind / contrast / f"{subject}{ENDING}").is_file():
                raise SystemExit(f"{folder} has no {kind}/{contrast}/{subject}{ENDING} (yet)")


def plan_and_preprocess(shop: Workshop, kind: str, images: Path) -> None:
    """nnU-Net's 2d plans with the comparison's pixels, and the preprocessed data."""
    number, name = DATASETS[kind]
    done = shop.work / f"nnUNet_preprocessed/Dataset{number}_{name}/.done"
    if not done.exists():
        pixels = shop.comparison.pixels
        thickness = max(slice_thickness(images), pixels)  # nnU-Net slices across the coarsest axis
        call("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "-np", "2", "-npfp", "2",
             "-gpu_memory_target", "1", "-overwrite_target_spacing", thickness, pixels, pixels)  # fmt: skip
        done.touch()


def slice_thickness(images: Path) -> float:
    """Median in mm; nnU-Net's 2d plans take it for the axis of the slices, and resample within slices only."""
    import nibabel as nib

    return round(float(np.median([nib.load(path).header.get_zooms()[2] for path in images.iterdir()])), 3)


def write_plans(shop: Workshop, name: str) -> None:
    """The method's copy of nnU-Net's plans: a small network, and its settings."""
    comparison = shop.comparison
    method = comparison.methods[name]
    folder = shop.work / "nnUNet_preprocessed" / dataset_name(method)
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["plans_name"] = plans_name(name)
    configuration = plans["configurations"]["2d"]
    configuration["batch_size"] = comparison.batch_size
    divisor = 2
    if isinstance(comparison, ScribbleComparison):
        configuration["patch_size"], divisor = list(comparison.patch), comparison.divisor
    if isinstance(comparison, AdaptComparison):
        divisor = comparison.divisor
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [min(comparison.most_features, n // divisor) for n in network["features_per_stage"]]
    configuration[SECTION] = {**comparison.train_options, **method.settings}
    path = folder / f"{plans_name(name)}.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != plans:
        raise SystemExit(
            f"{path} is of other settings of {name} than comparisons.py has now. Take another --work, or delete that "
            f"file, {shop.work}/results/*/*/*__{plans_name(name)}__2d, pred/{name} and scores/{name}."
        )
    path.write_text(json.dumps(plans, indent=2))


def settings_of(shop: Workshop, name: str) -> dict[str, Any]:
    """What the method's plans say, which is what it was trained with."""
    path = shop.work / "nnUNet_preprocessed" / dataset_name(shop.comparison.methods[name]) / f"{plans_name(name)}.json"
    configuration = json.loads(path.read_text(encoding="utf-8"))["configurations"]["2d"]
    return dict(configuration[SECTION])


def fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


# --- training and after -----------------------------------------------------------------------------------------------


Step = Callable[[Workshop, str, int, TextIO], None]


def run_units(shop: Workshop, units: Iterable[tuple[str, int]], jobs: int, steps: Sequence[Step]) -> list[str]:
    """Methods and seeds, ``jobs`` at a time, in their order; those that failed."""
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = [pool.submit(run_unit, shop, *unit, steps) for unit in units]
        try:
            return [failed for outcome in outcomes if (failed := outcome.result())]
        except KeyboardInterrupt:
            stop_all()
            pool.shutdown(cancel_futures=True)
            raise


def run_unit(shop: Workshop, name: str, seed: int, steps: Sequence[Step]) -> str | None:
    """Train, predict, evaluate, or whatever the steps are; None, or what went wrong (the other units go on)."""
    if stopping.is_set():
        return None
    log_file = shop.work / f"logs/{name}_seed_{seed}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with log_file.open("a") as log:
        try:
            for step in steps:
                step(shop, name, seed, log)
        except (subprocess.CalledProcessError, OSError) as error:
            if not stopping.is_set():
                say(f"FAILED  {name} seed {seed}: {error}; see {log_file}")
            return f"{name} seed {seed}"
    say(f"done    {name} seed {seed}, {(time.perf_counter() - begin) / 60:.1f} min")
    return None


def say(line: str) -> None:
    """One write, so that lines of several threads do not mix."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def train(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    if (shop.fold(name, seed) / "checkpoint_final.pth").exists():
        return
    method = shop.comparison.methods[name]
    say(f"train   {name} seed {seed}")
    call("python", HERE / "train_one.py", dataset_name(method), "2d", "-tr", method.trainer, "-p", plans_name(name),
         "--fold", shop.fold_of(seed), "--seed", seed, "--device", shop.device, *(["--adamw"] if method.adamw else []),
         log=log, nnUNet_results=str(shop.results(seed)), nnUNet_n_proc_DA=str(shop.workers))  # fmt: skip


def evaluate(shop: Workshop, predictions: Path, output: Path, log: TextIO, *options: object) -> None:
    """``nnunet_multimodal evaluate`` of SUBJECT/CONTRAST files; a contrast is called a modality there."""
    if output.exists():
        return
    partial = fresh(output.with_name(f"{output.name}.partial"))
    names = [f"{organ}={value}" for organ, value in shop.organs.items()]
    call("nnunet_multimodal", "evaluate", predictions, shop.work / "truth", "-o", partial, "--label-names", *names,
         "--modality-pattern", "(?P<modality>[^/]+)$", "--tolerance", f"{shop.comparison.nsd_tolerance:g}",
         "--no-report", "-j", "1", *options, log=log)  # fmt: skip
    partial.rename(output)


def read_rows(evaluation: Path) -> list[dict[str, Any]]:
    """A row per image and organ of what `evaluate` wrote; None where a measure is undefined."""
    rows = []
    for one in json.loads(evaluation.read_text(encoding="utf-8"))["cases"]:
        for organ, measures in one["organs"].items():
            values = {metric: measures[key] for metric, key in METRICS.items()}
            rows.append({"contrast": one["modality"], "organ": organ, **values})
    return rows


# --- numbers ----------------------------------------------------------------------------------------------------------


def mean_over(rows: Iterable[Mapping[str, Any]], metric: str, organs: Iterable[str]) -> float | None:
    """Mean over images within an organ, then over organs; what is undefined (neither there nor found) is left out."""
    rows = list(rows)
    of_organs = []
    for organ in organs:
        values = [row[metric] for row in rows if row["organ"] == organ and row[metric] is not None]
        if values:
            of_organs.append(float(np.mean(values)))
    return round(float(np.mean(of_organs)), 4) if of_organs else None


def cell(values: Sequence[float | None]) -> str:
    """The mean over seeds, with their standard deviation if there are several; a dash where it is undefined."""
    defined = [value for value in values if value is not None]
    if not defined:
        return "-"
    text = f"{np.mean(defined):.3f}"
    return text if len(defined) == 1 else f"{text} ± {np.std(defined, ddof=1):.3f}"


def metric_title(comparison: Comparison | MixedComparison, metric: str) -> str:
    return f"{metric} at {comparison.nsd_tolerance:g} mm" if metric == "NSD" else metric


def lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown, numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def of_seeds(entry: Mapping[str, Any], *path: str) -> list[Any]:
    """What lies at this path of a method's summary, for each seed."""
    values = []
    for result in entry["seeds"].values():
        for key in path:
            result = result[key]
        values.append(result)
    return values


def records(shop: Workshop, method: str, folder: str, seed: int) -> dict[str, Any]:
    """How a method was trained and how long the predictions in ``folder`` took."""
    training, seconds = shop.fold(method, seed) / "training.json", shop.predictions(folder, seed) / "seconds.json"
    return {
        "training": json.loads(training.read_text(encoding="utf-8")),
        "seconds_of_prediction": json.loads(seconds.read_text(encoding="utf-8")),
    }


def training_lines(summary: Mapping[str, Any]) -> list[str]:
    """The table of how each method was trained."""
    rows = []
    for name, entry in summary.items():
        first = of_seeds(entry, "training")[0]
        rows.append([
            name,
            str(len(entry["seeds"])),
            str(first["iterations"]),
            f"{first.get('optimizer', '')} {first['initial_lr']:g}",
            f"{np.median(of_seeds(entry, 'training', 'seconds_per_iteration')):.3f}",
            f"{first['parameters'] / 1e6:.2f} M",
        ])  # fmt: skip
    return lines(["training", "seeds", "iterations", "optimiser, rate", "s / iteration", "parameters"], rows)


def devices_of(summary: Mapping[str, Any]) -> list[str]:
    """On what the methods were trained."""
    trainings = [training for entry in summary.values() for training in of_seeds(entry, "training")]
    return sorted({f"{training['device']}, {training['threads']} threads" for training in trainings})
