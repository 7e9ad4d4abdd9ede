"""A whole relabel project, simulated: 10 labelled cases, then batches of 20 whose correction is the real label.

    python benchmarks/relabel_project.py IMAGES LABELS --label-names anterior=1 posterior=2 --work DIR

Everything that a person does is done through the commands: init, train, propose, accept, report; between propose and
accept, the real labels of the proposed cases are laid into a folder, as a person would save corrections. The network is
small and the trainings are short, so that two CPU cores can do it: see ``shrink``. What is finished in DIR stays; run
it again and it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import write_result

ENDING = ".nii.gz"
TRAINER = "nnUNetTrainerMRSegmentator"


def run(*words: object, log: list[dict[str, Any]]) -> None:
    """``nnunet_multimodal relabel ...`` in a process of its own; its processor time goes into the log."""
    command = [str(word) for word in words]
    print("$ nnunet_multimodal relabel", *command, flush=True)
    before, begin = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "nnunet_multimodal.cli", "relabel", *command], check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    log.append({"step": command[0], "cpu_seconds": round(cpu, 1), "seconds": round(time.perf_counter() - begin, 1)})


def shrink(plans_file: Path, configuration: str, iterations: int) -> None:
    """A network and a training that a CPU can do: an edit that a user makes by hand in PROJECT/plans.json."""
    plans = json.loads(plans_file.read_text(encoding="utf-8"))
    configured = plans["configurations"][configuration]
    network = configured["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [features // 2 for features in network["features_per_stage"]]
    network["n_conv_per_stage"] = [1] * len(network["n_conv_per_stage"])
    network["n_conv_per_stage_decoder"] = [1] * len(network["n_conv_per_stage_decoder"])
    configured["batch_size"] = 8
    configured["nnunet_multimodal"] = {
        "num_iterations_per_epoch": iterations,
        "num_val_iterations_per_epoch": 2,
        "save_every": 1,
        "initial_lr": 0.1,  # nnU-Net's 0.01 is made for 250,000 steps; after 240 it had found nothing at all
    }
    plans_file.write_text(json.dumps(plans, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class Simulation:
    """A project: where its images and its truth are, and how a person would go about it."""

    images: Path
    labels: Path
    label_names: Sequence[str]
    work: Path
    first: Sequence[str]  # cases labelled before the start
    model: Path | None = None  # the one to start from; then it proposes before the first training
    modality: str = "MR"
    batch: int = 20
    cycles: int = 4
    order: str = "random"
    folds: Sequence[str] = ("0",)
    epochs: int = 3
    iterations: int = 200
    plan: Sequence[str] = ("-gpu_memory_target", "1")

    def run(self) -> dict[str, Any]:
        """All cycles through the commands; what the project's report says, and the processor time of each command."""
        self.work.mkdir(parents=True, exist_ok=True)
        project, start = self.work / "project", self.work / "start"
        log_file = self.work / "steps.json"
        log: list[dict[str, Any]] = json.loads(log_file.read_text(encoding="utf-8")) if log_file.exists() else []
        begin: list[object] = [] if self.model is None else ["--model", self.model]
        if self.first:
            start.mkdir(exist_ok=True)
            for case in self.first:
                shutil.copy(self.labels / f"{case}{ENDING}", start)
            begin += ["--labels", start]
        run("init", project, "--images", self.images, *begin, "--label-names", *self.label_names, "--modality",
            self.modality, log=log)  # fmt: skip
        training = ["train", project, "-tr", f"{TRAINER}_{self.epochs}epochs", "-c", "2d", "--folds", *self.folds,
                    "-device", "cpu", "--processes", "0"]  # fmt: skip
        if self.model is not None:
            self.correct(project, 0, log)
        if not (project / "plans.json").exists():
            run(*training, "--prepare-only", "--plan", *self.plan, log=log)
            shrink(project / "plans.json", "2d", self.iterations)
        for cycle in range(1, self.cycles + 1):
            if sum(each["state"] == "trained" for each in status(project)["cycles"]) < cycle:
                run(*training, log=log)
            self.correct(project, cycle, log)
            log_file.write_text(json.dumps(log), encoding="utf-8")
        report: dict[str, Any] = json.loads((project / "report" / "report.json").read_text(encoding="utf-8"))
        spent: dict[str, float] = {}
        for each in log:
            spent[each["step"]] = round(spent.get(each["step"], 0.0) + each["cpu_seconds"], 1)
        return {
            "start": len(self.first), "batch": self.batch, "order": self.order, "folds": list(self.folds),
            "configuration": "2d", "steps_of_a_training": self.epochs * self.iterations, "curve": report["curve"],
            "good_share": report["good_share"], "good_from_cycle": report["good_from_cycle"], "cpu_seconds": spent,
            "trainings": report["trainings"],
        }  # fmt: skip

    def correct(self, project: Path, cycle: int, log: list[dict[str, Any]]) -> None:
        """A batch is proposed by the model of this cycle, corrected to the real labels, and accepted."""
        if not any(batch["cycle"] == cycle for batch in status(project)["batches"]):
            run("propose", project, "-n", self.batch, "--order", self.order, "-device", "cpu", "--processes", "0",
                log=log)  # fmt: skip
        corrected = self.work / f"corrected_{cycle}"
        corrected.mkdir(exist_ok=True)
        batch = next(each["batch"] for each in status(project)["batches"] if each["cycle"] == cycle)
        for package in (project / "batches" / f"batch_{batch:03d}").iterdir():
            if package.is_dir():
                shutil.copy(self.labels / f"{package.name}{ENDING}", corrected)
        run("accept", project, corrected, "--who", "the real labels", log=log)
        run("report", project, log=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--label-names", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--start", type=int, default=10)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--cycles", type=int, default=4)
    parser.add_argument("--order", default="random")
    parser.add_argument("--folds", nargs="+", default=["0"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200, help="an epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="relabel_project", help="of the result")
    args = parser.parse_args()
    measured = Simulation(
        images=args.images,
        labels=args.labels,
        label_names=args.label_names,
        work=args.work.resolve(),
        first=sorted(random.Random(args.seed).sample(cases_in(args.labels), args.start)),
        batch=args.batch,
        cycles=args.cycles,
        order=args.order,
        folds=args.folds,
        epochs=args.epochs,
        iterations=args.iterations,
    ).run()
    note = f"images {args.images.resolve().parent.name}; a correction is the real label; small network, short trainings"
    print(write_result(args.name, measured, note))


def cases_in(folder: Path) -> list[str]:
    return sorted(path.name.removesuffix(ENDING) for path in folder.glob(f"*{ENDING}"))


def status(project: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "nnunet_multimodal.cli", "relabel", "status", str(project), "--json"]
    content: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return content


if __name__ == "__main__":
    main()
