"""Rerun a comparison of comparisons.py: methods x seeds x contrasts, by the commands a user types.

    python benchmarks/compare.py phantom_table1 --work DIR --seeds 0 1 2 --jobs 2
    python benchmarks/compare.py phantom_table1 --work DIR --only-table

Makes the phantom, converts its reference contrast for each kind of trainer, plans and preprocesses, trains
(train_one.py), predicts every contrast of the test subjects, evaluates, and writes benchmarks/results/NAME.json and
NAME.md. What is finished is not done again; an interrupted training goes on from its latest checkpoint. Below DIR:

    phantom/  train/  truth/SUBJECT/CONTRAST.nii.gz  inputs/  nnUNet_raw/  nnUNet_preprocessed/
    results/seed_0/          the nnUNet_results of that seed
    pred/METHOD/seed_0/SUBJECT/CONTRAST.nii.gz
    scores/METHOD/seed_0/    what `nnunet_multimodal evaluate` says
    logs/METHOD_seed_0.log
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import common
import numpy as np
from comparisons import COMPARISONS, Comparison, Method
from main_job import ENDING, link, set_environment

BIN = Path(sys.executable).parent
HERE = Path(__file__).resolve().parent
SECTION = "nnunet_multimodal"
METRICS = {"DSC": "dsc", "NSD": "nsd"}  # name to key in evaluation.json
DATASETS = {
    "plain": (701, "Plain", "--images"),
    "scribble": (702, "Scribble", "--images"),
    "crossmr": (703, "CrossMR", "--reference-images"),
}


@dataclass(frozen=True)
class Workshop:
    """Where a comparison is worked on, and with what."""

    comparison: Comparison
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

    def fold(self, name: str, seed: int) -> Path:
        method = self.comparison.methods[name]
        folder = f"{method.trainer}__{plans_name(name)}__2d/fold_all"
        return self.results(seed) / dataset_name(method) / folder

    def predictions(self, name: str, seed: int) -> Path:
        return self.work / f"pred/{name}/seed_{seed}"

    def scores(self, name: str, seed: int) -> Path:
        return self.work / f"scores/{name}/seed_{seed}"


running: set[subprocess.Popen[bytes]] = set()
stopping = threading.Event()


def dataset_name(method: Method) -> str:
    number, name, _ = DATASETS[method.data]
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


# --- data ------------------------------------------------------------------------------------------------------------


def prepare(shop: Workshop, methods: Iterable[str], phantom: Path | None) -> None:
    """Everything before the first training."""
    comparison, work = shop.comparison, shop.work
    make_phantom(shop, phantom)
    train, test = shop.subjects
    for subject in train:
        for kind in ("images", "labels"):
            link(
                work / f"phantom/{kind}/{comparison.reference}/{subject}{ENDING}",
                work / f"train/{kind}/{subject}{ENDING}",
            )
    for subject in test:
        for contrast in comparison.contrasts:
            label = work / f"phantom/labels/{contrast}/{subject}{ENDING}"
            link(label, work / f"truth/{subject}/{contrast}{ENDING}")
            link(label, work / f"inputs/labels/{case(subject, contrast)}{ENDING}")
    kinds = {comparison.methods[name].data for name in methods}
    for kind in sorted(kinds):
        make_dataset(shop, kind)
        make_inputs(shop, kind)
    for name in methods:
        write_plans(shop, name)


def case(subject: str, contrast: str) -> str:
    """One image of one subject as a case of nnUNetv2_predict."""
    return f"{subject}__{contrast}"


def make_phantom(shop: Workshop, phantom: Path | None) -> None:
    comparison, folder = shop.comparison, shop.work / "phantom"
    if phantom is not None and not folder.exists():
        shop.work.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(phantom.resolve())
    if not folder.is_symlink():  # the command keeps what is there
        count = comparison.train_subjects + comparison.test_subjects
        call("nnunet_multimodal", "phantom", folder, "--subjects", count, "--contrasts", *comparison.contrasts,
             "--seed", comparison.phantom_seed, *comparison.phantom_options)  # fmt: skip
    train, test = shop.subjects
    needed = [(comparison.reference, subject) for subject in train]
    needed += [(contrast, subject) for contrast in comparison.contrasts for subject in test]
    for kind in ("images", "labels"):
        for contrast, subject in needed:
            if not (folder / kind / contrast / f"{subject}{ENDING}").is_file():
                raise SystemExit(f"{folder} has no {kind}/{contrast}/{subject}{ENDING} (yet)")


def make_dataset(shop: Workshop, kind: str) -> None:
    """Raw data, and nnU-Net's plans and preprocessed data of it."""
    number, name, flag = DATASETS[kind]
    work = shop.work
    if not (work / f"nnUNet_raw/Dataset{number}_{name}").exists():
        names = [f"{organ}={value}" for organ, value in shop.organs.items()]
        call("nnunet_multimodal", "convert", kind, flag, work / "train/images", "--labels", work / "train/labels",
             "-d", number, "--name", name, "--label-names", *names)  # fmt: skip
    done = work / f"nnUNet_preprocessed/Dataset{number}_{name}/.done"
    if not done.exists():
        thickness, pixels = slice_thickness(work / "train/images"), shop.comparison.pixels
        call("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "2d", "-np", "2", "-npfp", "2",
             "-gpu_memory_target", "1", "-overwrite_target_spacing", thickness, pixels, pixels)  # fmt: skip
        done.touch()


def slice_thickness(images: Path) -> float:
    """Median in mm; nnU-Net's 2d plans take it for the axis of the slices, and resample within slices only."""
    import nibabel as nib

    return round(float(np.median([nib.load(path).header.get_zooms()[2] for path in images.iterdir()])), 3)


def make_inputs(shop: Workshop, kind: str) -> None:
    """The test images as each kind of method takes them; the scribbles are of the same simulation for all."""
    folder = shop.work / "inputs" / kind
    if folder.exists():
        return
    reference, contrasts = shop.comparison.reference, shop.comparison.contrasts
    images, drawn = shop.work / "phantom/images", shop.work / "inputs/scribbles"
    if kind != "plain" and not (drawn / "coverage.json").exists():
        call("nnunet_multimodal", "scribbles", "simulate", "--labels", shop.work / "inputs/labels", "-o", drawn,
             "--seed", "1")  # fmt: skip
    partial = fresh(folder.with_name(f"{kind}.partial"))
    for subject in shop.subjects[1]:
        if kind == "crossmr":
            link(images / f"{reference}/{subject}{ENDING}", partial / f"{subject}/reference{ENDING}")
            link(drawn / f"{case(subject, reference)}{ENDING}", partial / f"{subject}/scribbles{ENDING}")
        for contrast in contrasts:
            image = images / f"{contrast}/{subject}{ENDING}"
            if kind == "crossmr":
                link(image, partial / f"{subject}/{contrast}{ENDING}")
                continue
            link(image, partial / f"{case(subject, contrast)}_0000{ENDING}")
            if kind == "scribble":  # of this very image: the baseline is told where the organ is in the target
                split_scribbles(drawn / f"{case(subject, contrast)}{ENDING}", partial, list(shop.organs.values()))
    partial.rename(folder)


def split_scribbles(drawn: Path, folder: Path, organs: Sequence[int]) -> None:
    """A binary channel per organ behind the image's, as `convert scribble` has them."""
    import nibabel as nib

    image = nib.load(drawn)
    values = np.asarray(image.dataobj)
    for channel, organ in enumerate(organs, start=1):
        name = f"{drawn.name.removesuffix(ENDING)}_{channel:04d}{ENDING}"
        nib.save(nib.Nifti1Image((values == organ).astype(np.uint8), image.affine), folder / name)


def write_plans(shop: Workshop, name: str) -> None:
    """The method's copy of nnU-Net's plans: a small network, and its settings."""
    comparison = shop.comparison
    method = comparison.methods[name]
    folder = shop.work / "nnUNet_preprocessed" / dataset_name(method)
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["plans_name"] = plans_name(name)
    configuration = plans["configurations"]["2d"]
    configuration["batch_size"] = comparison.batch_size
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [min(comparison.most_features, n // 2) for n in network["features_per_stage"]]
    configuration[SECTION] = {**comparison.train_options, **method.settings}
    path = folder / f"{plans_name(name)}.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != plans:
        raise SystemExit(
            f"{path} is of other settings of {name} than comparisons.py has now. Take another --work, or delete that "
            f"file, {shop.work}/results/*/*/*__{plans_name(name)}__2d, pred/{name} and scores/{name}."
        )
    path.write_text(json.dumps(plans, indent=2))


def fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


# --- training and after ----------------------------------------------------------------------------------------------


def run_units(shop: Workshop, units: Iterable[tuple[str, int]], jobs: int) -> list[str]:
    """Methods and seeds, ``jobs`` at a time, in their order; those that failed."""
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = [pool.submit(run_unit, shop, *unit) for unit in units]
        try:
            return [failed for outcome in outcomes if (failed := outcome.result())]
        except KeyboardInterrupt:
            stop_all()
            pool.shutdown(cancel_futures=True)
            raise


def run_unit(shop: Workshop, name: str, seed: int) -> str | None:
    """Train, predict, evaluate; None, or what went wrong (the other units go on)."""
    if stopping.is_set():
        return None
    log_file = shop.work / f"logs/{name}_seed_{seed}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with log_file.open("a") as log:
        try:
            for step in (train, predict, score):
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
         "--seed", seed, "--device", shop.device, *(["--adamw"] if method.adamw else []), log=log,
         nnUNet_results=str(shop.results(seed)), nnUNet_n_proc_DA=str(shop.workers))  # fmt: skip


def predict(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    output = shop.predictions(name, seed)
    if output.exists():
        return
    method = shop.comparison.methods[name]
    say(f"predict {name} seed {seed}")
    partial = output.with_name(f"{output.name}.partial")
    begin = time.perf_counter()
    model = ["-d", DATASETS[method.data][0], "-c", "2d", "-tr", method.trainer, "-p", plans_name(name), "-f", "all"]
    results = {"nnUNet_results": str(shop.results(seed))}
    if method.data == "crossmr":
        call("nnunet_multimodal", "refer", "--subjects", shop.work / "inputs/crossmr", "-o", partial, *model,
             "--device", shop.device, "--no-overlays", "--continue", log=log, **results)  # fmt: skip
    else:
        flat = fresh(partial) / "flat"
        call("nnUNetv2_predict", "-i", shop.work / "inputs" / method.data, "-o", flat, *model, "-device", shop.device,
             "-npp", "1", "-nps", "1", log=log, **results)  # fmt: skip
        for subject in shop.subjects[1]:
            (partial / subject).mkdir()
            for contrast in shop.comparison.contrasts:
                (flat / f"{case(subject, contrast)}{ENDING}").rename(partial / subject / f"{contrast}{ENDING}")
        shutil.rmtree(flat)
    (partial / "seconds.json").write_text(json.dumps(round(time.perf_counter() - begin, 1)))
    partial.rename(output)


def score(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    output = shop.scores(name, seed)
    if output.exists():
        return
    partial = fresh(output.with_name(f"{output.name}.partial"))
    names = [f"{organ}={value}" for organ, value in shop.organs.items()]
    call("nnunet_multimodal", "evaluate", shop.predictions(name, seed), shop.work / "truth", "-o", partial,
         "--label-names", *names, "--modality-pattern", "(?P<modality>[^/]+)$",
         "--in-distribution", shop.comparison.reference, "--tolerance", f"{shop.comparison.nsd_tolerance:g}",
         "--no-report", "-j", "1", log=log)  # fmt: skip
    partial.rename(output)


def read_rows(evaluation: Path) -> list[dict[str, Any]]:
    """A row per image and organ of what `evaluate` wrote; None where a measure is undefined."""
    rows = []
    for one in json.loads(evaluation.read_text(encoding="utf-8"))["cases"]:
        for organ, measures in one["organs"].items():
            values = {metric: measures[key] for metric, key in METRICS.items()}
            rows.append({"contrast": one["modality"], "organ": organ, **values})
    return rows


# --- table -----------------------------------------------------------------------------------------------------------


def mean_over(rows: Iterable[Mapping[str, Any]], metric: str, organs: Iterable[str]) -> float | None:
    """Mean over images within an organ, then over organs; what is undefined (neither there nor found) is left out."""
    rows = list(rows)
    of_organs = []
    for organ in organs:
        values = [row[metric] for row in rows if row["organ"] == organ and row[metric] is not None]
        if values:
            of_organs.append(float(np.mean(values)))
    return round(float(np.mean(of_organs)), 4) if of_organs else None


def summarise(shop: Workshop, seeds: Iterable[int], names: Iterable[str]) -> dict[str, Any]:
    """What is there of each method: per seed and metric the means by contrast and by organ, and the training."""
    comparison, summary = shop.comparison, {}
    for name in names:
        of_seeds = {}
        for seed in seeds:
            path = shop.scores(name, seed) / "evaluation.json"
            if path.exists():
                of_seeds[str(seed)] = summarise_seed(shop, read_rows(path))
                of_seeds[str(seed)]["training"] = json.loads(
                    (shop.fold(name, seed) / "training.json").read_text(encoding="utf-8")
                )
                seconds = json.loads((shop.predictions(name, seed) / "seconds.json").read_text(encoding="utf-8"))
                of_seeds[str(seed)]["seconds_of_prediction"] = seconds
        if of_seeds:
            settings = {**comparison.train_options, **comparison.methods[name].settings}
            summary[name] = {"settings": settings, "seeds": of_seeds}
    return summary


def summarise_seed(shop: Workshop, rows: list[dict[str, Any]]) -> dict[str, Any]:
    comparison, organs = shop.comparison, shop.organs
    result: dict[str, Any] = {}
    for metric in METRICS:
        contrasts = {
            contrast: mean_over((r for r in rows if r["contrast"] == contrast), metric, organs)
            for contrast in comparison.contrasts
        }
        groups = {**{c: (c,) for c in comparison.contrasts}, "unseen": comparison.unseen}
        by_organ = {
            group: {
                organ: mean_over((r for r in rows if r["contrast"] in members), metric, [organ]) for organ in organs
            }
            for group, members in groups.items()
        }
        defined = [contrasts[c] for c in comparison.unseen if contrasts[c] is not None]
        unseen = round(float(np.mean(defined)), 4) if defined else None
        result[metric] = {"contrasts": contrasts, "unseen": unseen, "organs": by_organ}
    return result


def cell(values: Sequence[float | None]) -> str:
    """The mean over seeds, with their standard deviation if there are several; a dash where it is undefined."""
    defined = [value for value in values if value is not None]
    if not defined:
        return "-"
    text = f"{np.mean(defined):.3f}"
    return text if len(defined) == 1 else f"{text} ± {np.std(defined, ddof=1):.3f}"


def markdown(comparison: Comparison, summary: Mapping[str, Any], organs: Iterable[str]) -> str:
    """The tables that the README shows."""
    organs = list(organs)
    mean_name = "mean of " + ", ".join(comparison.unseen)

    def lines(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
        rule = ["---", *["---:"] * (len(header) - 1)]
        return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]

    def each(name: str, *path: str) -> list[float]:
        values = []
        for result in summary[name]["seeds"].values():
            for key in path:
                result = result[key]
            values.append(result)
        return values

    def optimiser(name: str) -> str:
        return next(iter(summary[name]["seeds"].values()))["training"].get("optimizer", "")

    parts: list[str] = []
    for metric in METRICS:
        unit = f" at {comparison.nsd_tolerance:g} mm" if metric == "NSD" else ""
        rows = [
            [
                name,
                *(cell(each(name, metric, "contrasts", contrast)) for contrast in comparison.contrasts),
                cell(each(name, metric, "unseen")),
            ]
            for name in summary
        ]
        header = [f"{metric}{unit}", *comparison.contrasts, mean_name]
        parts += [*lines(header, rows), ""]
    rows = [[name, *(cell(each(name, "DSC", "organs", "unseen", organ)) for organ in organs)] for name in summary]
    parts += [*lines([f"DSC, {mean_name}", *organs], rows), ""]
    rows = [
        [
            name,
            str(len(summary[name]["seeds"])),
            f"{each(name, 'training', 'iterations')[0]}",
            f"{optimiser(name)} {each(name, 'training', 'initial_lr')[0]:g}",
            f"{np.median(each(name, 'training', 'seconds_per_iteration')):.3f}",
            f"{each(name, 'training', 'parameters')[0] / 1e6:.2f} M",
        ]
        for name in summary
    ]
    parts += lines(["training", "seeds", "iterations", "optimiser, rate", "s / iteration", "parameters"], rows)
    return "\n".join(parts) + "\n"


def write_table(shop: Workshop, name: str, seeds: Sequence[int], methods: Sequence[str]) -> None:
    summary = summarise(shop, seeds, methods)
    if not summary:
        print("nothing is finished yet: no table")
        return
    comparison = shop.comparison
    devices = sorted({
        f"{s['training']['device']}, {s['training']['threads']} threads"
        for entry in summary.values() for s in entry["seeds"].values()
    })  # fmt: skip
    measured = {
        "title": comparison.title,
        "train_subjects": comparison.train_subjects,
        "test_subjects": comparison.test_subjects,
        "trained_on": comparison.reference,
        "unseen": list(comparison.unseen),
        "nsd_tolerance_mm": comparison.nsd_tolerance,
        "trained_with": devices,
        "methods": summary,
    }
    note = (
        f"2d, {comparison.pixels} mm pixels, batch {comparison.batch_size}, fold all; means over organs and subjects; "
        "scribbles simulated on every slice, on the reference for CrossMR, on the target itself for Scribble"
    )
    path = common.write_result(name, measured, note)
    table = markdown(comparison, summary, shop.organs)
    text = f"{comparison.title}\n\n{table}\nTrained with: {'; '.join(devices)}.\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{path} and {path.with_suffix('.md').name}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=COMPARISONS)
    parser.add_argument("--work", type=Path, help="where it is worked on (default: ./NAME)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all of the comparison")
    parser.add_argument("-device", "--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many trainings at a time")
    parser.add_argument("--workers", type=int, help="processes for augmentation (default: 0 on a CPU, 8 on a GPU)")
    parser.add_argument("--phantom", type=Path, metavar="DIR", help="use this one instead of making one")
    parser.add_argument(
        "--results", type=Path, default=common.RESULTS, metavar="DIR", help="where NAME.json and .md go"
    )
    parser.add_argument("--only-data", action="store_true", help="stop before the first training")
    parser.add_argument("--only-table", action="store_true", help="of what is finished; runs nothing")
    args = parser.parse_args(argv)

    comparison = COMPARISONS[args.name]
    methods = args.methods or list(comparison.methods)
    unknown = [name for name in methods if name not in comparison.methods]
    if unknown:
        parser.error(f"unknown method {unknown[0]}; there are: {', '.join(comparison.methods)}")
    work = (args.work or Path(args.name)).resolve()
    workers = args.workers if args.workers is not None else (0 if args.device == "cpu" else 8)
    shop = Workshop(comparison, work, args.device, workers)
    common.RESULTS = args.results
    failed: list[str] = []
    if not args.only_table:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
        set_environment(work)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends the trainings, too
        try:
            prepare(shop, methods, args.phantom)
            if args.only_data:
                return 0
            failed = run_units(shop, [(name, seed) for seed in args.seeds for name in methods], args.jobs)
        except KeyboardInterrupt:
            stop_all()
            print("interrupted; the same command goes on", file=sys.stderr)
            return 130
    # All seeds that are there, whatever was asked for this time.
    seeds = sorted({int(path.name.removeprefix("seed_")) for path in work.glob("results/seed_*")})
    write_table(shop, args.name, seeds, list(comparison.methods))
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
