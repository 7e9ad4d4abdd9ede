"""A relabel project of 100,000 cases: how long status, ranking and log take, and 1,000 acceptances.

    python benchmarks/relabel_scale.py [--cases 100000] [--accepts 1000]

Rows, not images: the ledger is filled as init and propose fill it. Acceptances store a mask file each, on disk before
the ledger says so, but are not checked against an image. Times are by the clock, each the best of three; beside them
the processor time, because the machine may be busy. Of status and log the whole command is timed too, with the start of
Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from common import write_result

from nnunet_multimodal.conversion.images import Volume
from nnunet_multimodal.relabel.accept import Entry, compared, enter
from nnunet_multimodal.relabel.project import Project
from nnunet_multimodal.relabel.ranking import most_uncertain, pool_in_order
from nnunet_multimodal.relabel.status import log, status

LABELS = {"background": 0, "liver": 1, "spleen": 2}


def fill(project: Project, cases: int) -> None:
    """A tenth is accepted, one in a hundred is proposed, the rest is predicted and waits."""
    ledger, rng = project.ledger, np.random.default_rng(0)
    with ledger.transaction():
        for key, value in (("labels", LABELS), ("name", "Scale"), ("seed", 1)):
            ledger.set_setting(key, value)
        ledger.run_many(
            "INSERT INTO cases (name, image, kind, size, mtime_ns, modality) VALUES (?, ?, 'nifti', 1, 1, ?)",
            ((f"case_{i:06d}", f"/images/case_{i:06d}.nii.gz", ("CT", "MR")[i % 2]) for i in range(cases)),
        )
        model = ledger.run("INSERT INTO models (cycle, folder, folds, checkpoint) VALUES (1, '.', '[\"0\"]', 'c.pth')")
        ledger.set_setting("model", model)
        ledger.run(
            "INSERT INTO cycles VALUES (1, 'trained', ?)",
            json.dumps({"trainer": "T", "configuration": "2d", "folds": ["0"]}),
        )
        ledger.append("train", "benchmark", 1, {}, None, {"model": None}, {"model": model})
        scores = rng.random(cases)
        ledger.run_many(
            "INSERT INTO predictions VALUES (?, ?, ?)", ((model, i + 1, float(scores[i])) for i in range(cases))
        )
        batch = ledger.run("INSERT INTO batches (model, ordering) VALUES (?, 'random')", model)
        organs = {name: {"voxels": 50, "dsc": 0.9, "added": 1, "removed": 1} for name in ("liver", "spleen")}
        details = {"minutes": 3.0, "voxels": 100, "changed": 10, "doubts": [], "start": False, "organs": organs}
        for i in range(0, cases, 10):
            proposal = ledger.run(
                "INSERT INTO proposals (batch, case_id, mask, score) VALUES (?, ?, 'm', 0.5)", batch, i + 1
            )
            changes: dict[str, Any] = {"state": "proposed", "proposal": proposal}
            ledger.change_case(
                i + 1, changes, "propose", "benchmark", 2, {"batch": batch, "model": model, "score": 0.5}
            )
            if i % 100:
                changes = {"state": "accepted", "mask": f"{i:064d}", "acceptance": ledger.next_event()}
                source = {"batch": batch, "model": model, "cycle": 1}
                ledger.change_case(i + 1, changes, "accept", "benchmark", 3, {**details, **source})


def accept(project: Project, count: int) -> None:
    """As ``relabel accept`` does it, one transaction and one synced file for each case, without looking at images."""
    rows = project.ledger.all("SELECT id FROM cases WHERE state = 'pool' ORDER BY id LIMIT ?", count)
    operation = project.ledger.new_operation()
    header = nibabel.Nifti1Header()
    header.set_data_shape((32, 32, 16))
    header.set_sform(np.eye(4), 1)
    for number, row in enumerate(rows):
        mask = np.zeros((16, 32, 32), np.uint16)
        mask.reshape(-1)[number : number + 500] = 1
        image = Volume(Path("none"), mask, np.eye(4), (1.0, 1.0, 1.0), header)
        details = {"file": "none", "doubts": [], "minutes": None, "start": False}
        details |= compared(mask, None, image, project.organs)
        enter(project, [Entry(row["id"], project.masks.put(mask, image), details)], "benchmark", operation)


def best(action: Callable[[], object], times: int = 3) -> dict[str, float]:
    """The shortest of some runs: seconds by the clock, and of the processor (children's too)."""
    wall, cpu = [], []
    for _ in range(times):
        before, begin = sum(os.times()[:4]), time.perf_counter()
        action()
        cpu.append(sum(os.times()[:4]) - before)
        wall.append(time.perf_counter() - begin)
    return {"seconds": round(min(wall), 3), "cpu_seconds": round(min(cpu), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--accepts", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder) / "project", create=True)
        begin = time.perf_counter()
        fill(project, args.cases)
        measured: dict[str, Any] = {"cases": args.cases, "filled_in_seconds": round(time.perf_counter() - begin, 1)}

        def command(*words: str) -> None:
            line = [sys.executable, "-m", "nnunet_multimodal.cli", "relabel", *words]
            subprocess.run(line, check=True, stdout=subprocess.DEVNULL)

        model = project.ledger.setting("model")
        measured["status"] = best(lambda: status(project))
        measured["rank_uncertainty"] = best(lambda: most_uncertain(project.ledger, model, 50))
        measured["rank_random"] = best(lambda: pool_in_order(project.ledger, "random", 3))
        measured["log"] = best(lambda: log(project, 20))
        measured["log_of_a_case"] = best(lambda: log(project, None, "case_000010"))
        measured["ledger_against_events"] = best(project.ledger.contradictions)
        measured["command_status"] = best(lambda: command("status", str(project.folder)))
        measured["command_log"] = best(lambda: command("log", str(project.folder)))
        measured["accepts"] = {"count": args.accepts, **best(lambda: accept(project, args.accepts), times=1)}
        assert not project.ledger.contradictions()
        measured["ledger_mb"] = round((project.folder / "relabel.sqlite").stat().st_size / 1e6, 1)
    measured["load_average"] = [round(value, 1) for value in os.getloadavg()]  # what else the cores had to do
    for name, value in measured.items():
        print(f"{name:24s} {value}")
    print(write_result("relabel_scale", measured, "rows of a ledger, no images; one mask file for each acceptance"))


if __name__ == "__main__":
    main()
