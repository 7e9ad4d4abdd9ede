"""The next model from what is accepted: nnU-Net's own commands on a data set of links, step by step, each resumable."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nnunet_multimodal.conversion.dataset import link_or_copy, write_json
from nnunet_multimodal.data.modality import SECTION
from nnunet_multimodal.environment import EXTENSION_VARIABLE, extension_folder
from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError
from nnunet_multimodal.programs import program_environment, run_program
from nnunet_multimodal.registry import parse_trainer_name
from nnunet_multimodal.relabel.cycles import (
    ABANDONED,
    BEGUN,
    TRAINED,
    Cycle,
    Options,
    cycle_of,
    describe_options,
    open_cycle,
    options_from,
    stale,
)
from nnunet_multimodal.relabel.dataset import PLANS, cases_of_cycle, write_preprocessed, write_raw
from nnunet_multimodal.relabel.folds import assign_folds
from nnunet_multimodal.relabel.ledger import ACCEPTED
from nnunet_multimodal.relabel.pool import checked_hash, remember_hash
from nnunet_multimodal.relabel.project import FOLDS, Project

FINAL, LATEST = "checkpoint_final.pth", "checkpoint_latest.pth"
_EPOCH = r": Epoch (\d+)\s*$"


# --- the cycle -------------------------------------------------------------------------------------------------------


def begin(project: Project, options: Options, who: str, restart: bool = False, again: bool = False) -> Cycle:
    """The open cycle, or a new one with all that is accepted now.

    Raises:
        UsageError: the open one has other options, or nothing was accepted since the last training (``again`` allows).
        DataProblem: too little is accepted for the folds.
    """
    ledger = project.ledger
    with project.changing("train"):
        row = open_cycle(project)
        if row is not None and not restart:
            before = options_from(row["options"])
            if not before.same_training(options):
                raise UsageError(
                    f"cycle {row['number']} was begun with {describe_options(before)}, now it is "
                    f"{describe_options(options)}. Give the same options to go on with it, or --restart to leave it."
                )
            return cycle_of(project, row["number"], replace(options, plan=options.plan or before.plan))
        if row is None and not again:
            _require_news(project, options)
        accepted = ledger.all("SELECT * FROM cases WHERE state = ? ORDER BY id", ACCEPTED)
        seen = {case["id"]: checked_hash(case) for case in accepted}
        with ledger.transaction():
            if row is not None:
                ledger.run("UPDATE cycles SET state = ? WHERE number = ?", ABANDONED, row["number"])
            number = int(ledger.value("SELECT coalesce(max(number), 0) + 1 FROM cycles"))
            seed = ledger.setting("seed") + number
            patients = dict(
                tuple(each)
                for each in ledger.all("SELECT patient, fold FROM cases WHERE patient IS NOT NULL AND fold IS NOT NULL")
            )
            for case_id, fold in assign_folds(accepted, FOLDS, seed, patients).items():
                ledger.run("UPDATE cases SET fold = ? WHERE id = ?", fold, case_id)
            _require_folds(project, options, len(accepted))
            ledger.run("INSERT INTO cycles VALUES (?, ?, ?)", number, BEGUN, json.dumps(asdict(options)))
            for case in accepted:
                image_hash, stamp = seen[case["id"]]
                remember_hash(ledger, case["id"], image_hash, stamp)
            ledger.run(
                "INSERT INTO cycle_cases SELECT ?, id, mask, image_hash, fold FROM cases WHERE state = ?",
                number,
                ACCEPTED,
            )
            details = {"cycle": number, "cases": len(accepted), **asdict(options)}
            ledger.append("begin", who, ledger.new_operation(), details)
        return cycle_of(project, number, options)


def _require_news(project: Project, options: Options) -> None:
    """A training that was interrupted after its last step must not be followed by another one."""
    model = project.model()
    row = None if model is None else project.ledger.one("SELECT * FROM cycles WHERE number = ?", model["cycle"])
    if row is None or not options_from(row["options"]).same_training(options):
        return
    if stale(project, row["number"]) == ([], []):
        raise UsageError(
            f"cycle {row['number']} was trained on all that is accepted, in this way. Propose and accept first, or "
            "train on the same once more with --again."
        )


def _require_folds(project: Project, options: Options, accepted: int) -> None:
    """Each fold that is trained has something to validate and something to train on."""
    rows = project.ledger.all("SELECT fold, count(*) FROM cases WHERE state = ? GROUP BY fold", ACCEPTED)
    counts = dict(tuple(row) for row in rows)
    for fold in options.folds:
        if fold != "all" and not 0 < counts.get(int(fold), 0) < accepted:
            raise DataProblem(
                f"fold {fold} has {counts.get(int(fold), 0)} of {accepted} accepted cases; it needs at least one, and "
                f"one in another fold. Accept at least {FOLDS} cases, or train --folds all."
            )
    if not accepted:
        raise DataProblem(
            "nothing is accepted yet, so there is nothing to train on. See: nnunet_multimodal relabel status"
        )


# --- preparing -------------------------------------------------------------------------------------------------------


def prepare(project: Project, cycle: Cycle, processes: int) -> int:
    """Data set, plans, preprocessed cases, starting weights; how many cases had to be preprocessed."""
    cases = cases_of_cycle(project, cycle.number)
    write_raw(project, cycle.number, cases)
    if not project.plans.is_file():
        _plan(project, cycle)
    plans = read_plans(project.plans)
    if cycle.options.configuration not in plans["configurations"]:
        there = ", ".join(plans["configurations"])
        raise UsageError(f"{project.plans} has no configuration {cycle.options.configuration}: {there}.")
    count = write_preprocessed(project, cycle.number, cases, plans, cycle.options.configuration, processes)
    fingerprint = project.folder / "dataset_fingerprint.json"
    folder = project.nnunet("preprocessed") / project.dataset_name(cycle.number)
    if fingerprint.is_file():
        shutil.copyfile(fingerprint, folder / fingerprint.name)
    _write_plans(project, cycle, plans)
    return count


def read_plans(path: Path) -> dict[str, Any]:
    """Raises UsageError for plans that are none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "configurations": dict(content["configurations"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} are no plans of nnU-Net: {error}. Correct them, or delete them to plan anew."
        ) from error


def _plan(project: Project, cycle: Cycle) -> None:
    """nnU-Net plans once, or the starting model did; all further cycles use these plans, so that weights fit."""
    name = project.dataset_name(cycle.number)
    log = project.folder / "logs" / f"cycle_{cycle.number:03d}_plan.log"
    number = str(cycle.number)
    environment = nnunet_environment(project)
    if environment.get("nnUNet_n_proc_DA") == "0":  # nnU-Net's planner asks for so many threads, and stops
        environment["nnUNet_n_proc_DA"] = "1"
    folder = project.nnunet("preprocessed") / name
    moved = _plans_of_the_model(project, cycle) if cycle.options.model_plans else None
    run_program(("nnUNetv2_extract_fingerprint", "-d", number, "-np", "1"), environment, log)
    if moved is not None:
        plans = moved
    else:
        run_program(("nnUNetv2_plan_experiment", "-d", number, *cycle.options.plan), environment, log)
        made = sorted(folder.glob("*Plans*.json"))
        if len(made) != 1:
            raise MultimodalError(
                f"nnUNetv2_plan_experiment left {len(made)} plans in {folder}, expected one. See {log}."
            )
        plans = {**json.loads(made[0].read_text(encoding="utf-8")), "plans_name": PLANS}
        made[0].unlink()  # with another planner it has another name
        _warn_of_another_network(project, plans, cycle.options.configuration)
    shutil.copyfile(folder / "dataset_fingerprint.json", project.folder / "dataset_fingerprint.json")
    write_json(project.plans, plans)


def _warn_of_another_network(project: Project, plans: dict[str, Any], configuration: str) -> None:
    """Before the hours of a training whose starting weights do not fit."""
    model = project.model()
    path = None if model is None else project.model_folder(model) / "plans.json"
    if path is None or not path.is_file() or configuration not in plans["configurations"]:
        return
    theirs = read_plans(path)["configurations"].get(configuration, {}).get("architecture")
    if theirs != plans["configurations"][configuration].get("architecture"):
        print(
            f"  warning: the network planned for these images is not the starting model's ({path}), so not all of its "
            f"weights fit. To keep its network, delete {project.plans} and give --model-plans."
        )


def _plans_of_the_model(project: Project, cycle: Cycle) -> dict[str, Any]:
    """The starting model's plans for this data set: its network, so that all its weights fit."""
    from nnunet_multimodal.adaptation.base_model import read_base
    from nnunet_multimodal.adaptation.plans import move_plans

    model = project.model()
    if model is None:
        raise UsageError("--model-plans: the project has no model to start from (relabel init --model).")
    base = read_base(project.model_folder(model))
    if base.configuration != cycle.options.configuration:
        raise UsageError(f"--model-plans: the model was trained in {base.configuration}; train -c {base.configuration}")
    name = project.dataset_name(cycle.number)
    dataset_json = json.loads((project.nnunet("raw") / name / "dataset.json").read_text(encoding="utf-8"))
    trainer = cycle.options.trainer if parse_trainer_name(cycle.options.trainer) is not None else "nnUNetTrainer"
    moved = move_plans(base, dataset_json, name, PLANS, trainer, {})
    for note in moved.notes:
        print(f"  {note}")
    for warning in moved.warnings:
        print(f"  warning: {warning}")
    configuration = moved.plans["configurations"][base.configuration]
    configuration[SECTION].pop("starting_model", None)  # each cycle names its own
    return moved.plans


def _write_plans(project: Project, cycle: Cycle, plans: dict[str, Any]) -> None:
    """The project's plans under the cycle's name; those of a training that has begun stay as they are."""
    path = project.nnunet("preprocessed") / project.dataset_name(cycle.number) / f"{PLANS}.json"
    if path.is_file() and any(has_checkpoint(_fold_folder(project, cycle, fold)) for fold in cycle.options.folds):
        return
    plans = {**plans, "dataset_name": project.dataset_name(cycle.number), "plans_name": PLANS}
    weights = link_starting_weights(project, cycle)
    if weights is not None and parse_trainer_name(cycle.options.trainer) is not None:
        configuration = dict(plans["configurations"][cycle.options.configuration])
        configuration[SECTION] = {**configuration.get(SECTION, {}), "starting_model": str(weights)}
        plans["configurations"] = {**plans["configurations"], cycle.options.configuration: configuration}
    write_json(path, plans)


def starting_checkpoints(project: Project, folds: Sequence[str]) -> dict[str, tuple[Path, str | None]]:
    """For each fold the weights that it starts from, and what is to be said about them.

    A fold goes on from its own weights of the latest cycle that trained it: those have never seen the cases that it
    validates. A fold that was never trained takes another's, with a warning; before the first training, those of the
    model that the project started from.
    """
    rows = project.ledger.all(
        "SELECT * FROM models WHERE id <= ? ORDER BY id DESC", project.ledger.setting("model", 0) or 0
    )
    result: dict[str, tuple[Path, str | None]] = {}
    for fold in folds:
        for row in rows:
            own = project.model_folder(dict(row)) / f"fold_{fold}" / row["checkpoint"]
            if fold in json.loads(row["folds"]) and own.is_file():
                result[fold] = (own, None)
                break
        else:
            if rows:
                row = rows[0]
                other = json.loads(row["folds"])[0]
                warning = None
                if row["cycle"]:
                    warning = (
                        f"fold {fold} was never trained and starts from fold {other}, which has seen its validation "
                        "cases: its validation Dice will be too good"
                    )
                result[fold] = (project.model_folder(dict(row)) / f"fold_{other}" / row["checkpoint"], warning)
    return result


def link_starting_weights(project: Project, cycle: Cycle) -> Path | None:
    """A folder ``fold_K/checkpoint_final.pth`` with the weights that each fold starts from; None if from scratch."""
    found = starting_checkpoints(project, cycle.options.folds)
    if not found:
        return None
    folder = project.nnunet("starting") / project.dataset_name(cycle.number)
    for fold, (source, _) in found.items():
        link = folder / f"fold_{fold}" / FINAL
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link_or_copy(source, link)
    return folder


# --- training --------------------------------------------------------------------------------------------------------


def nnunet_variables(project: Project) -> dict[str, str]:
    """nnU-Net's folders are the project's own."""
    folders = {f"nnUNet_{kind}": str(project.nnunet(kind)) for kind in ("raw", "preprocessed", "results")}
    return {**folders, EXTENSION_VARIABLE: str(extension_folder())}


def nnunet_environment(project: Project) -> dict[str, str]:
    for kind in ("raw", "preprocessed", "results"):
        project.nnunet(kind).mkdir(parents=True, exist_ok=True)
    return {**program_environment(), **nnunet_variables(project)}


def _result_folder(project: Project, cycle: Cycle) -> Path:
    name = f"{cycle.options.trainer}__{PLANS}__{cycle.options.configuration}"
    return project.nnunet("results") / project.dataset_name(cycle.number) / name


def _fold_folder(project: Project, cycle: Cycle, fold: str) -> Path:
    return _result_folder(project, cycle) / f"fold_{fold}"


def has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoint_*.pth"))


def train_command(project: Project, cycle: Cycle, fold: str) -> tuple[str, ...]:
    """The line that trains a fold, or goes on with it."""
    options = cycle.options
    words = ["nnUNetv2_train", str(cycle.number), options.configuration, fold, "-tr", options.trainer, "-p", PLANS]
    words += ["-device", options.device]
    folder = _fold_folder(project, cycle, fold)
    if has_checkpoint(folder):
        words.append("--c")
    elif parse_trainer_name(options.trainer) is None:  # not one of ours: it reads no starting_model in the plans
        found = starting_checkpoints(project, [fold]).get(fold)
        if found is not None and project.ledger.value("SELECT max(cycle) FROM models"):
            words += ["-pretrained_weights", str(found[0])]
    return tuple(words)


def missing_folds(project: Project, cycle: Cycle) -> list[str]:
    """Folds whose training is not finished."""
    return [fold for fold in cycle.options.folds if not (_fold_folder(project, cycle, fold) / FINAL).is_file()]


def train_folds(project: Project, cycle: Cycle) -> None:
    """Trains what is not trained yet, one fold after the other.

    Raises:
        MultimodalError: nnU-Net failed; what it said last is in the message.
    """
    for fold in missing_folds(project, cycle):
        words = train_command(project, cycle, fold)
        print(f"  $ {shlex.join(words)}", flush=True)
        log = project.folder / "logs" / f"cycle_{cycle.number:03d}_fold_{fold}.log"
        again = f"Once that is put right, nnunet_multimodal relabel train {project.folder} goes on from here."
        epochs = _epochs(project, cycle)
        run_program(words, nnunet_environment(project), log, (_EPOCH, epochs) if epochs else None, again)


def _epochs(project: Project, cycle: Cycle) -> int | None:
    parsed = parse_trainer_name(cycle.options.trainer)
    if parsed is None:
        return None
    plans = read_plans(project.plans)
    section: Mapping[str, Any] = plans["configurations"][cycle.options.configuration].get(SECTION, {})
    return parsed[2] or int(section.get("num_epochs", 1000))


def finish(project: Project, cycle: Cycle, who: str) -> None:
    """The trained model becomes the one that proposes, in one transaction."""
    missing = missing_folds(project, cycle)
    if missing:
        raise MultimodalError(
            f"cycle {cycle.number} is not trained: folds {', '.join(missing)} have no {FINAL} in "
            f"{_result_folder(project, cycle)}. Train them; the lines: --dry-run."
        )
    ledger = project.ledger
    with project.changing("train", patient=True), ledger.transaction():
        before = ledger.setting("model")
        number = ledger.run(
            "INSERT INTO models (cycle, folder, folds, checkpoint) VALUES (?, ?, ?, ?)",
            cycle.number,
            str(_result_folder(project, cycle).relative_to(project.folder)),
            json.dumps(cycle.options.folds),
            FINAL,
        )
        ledger.set_setting("model", number)
        ledger.run("UPDATE cycles SET state = ? WHERE number = ?", TRAINED, cycle.number)
        details = {"cycle": cycle.number, "cases": cycle.cases, "trainer": cycle.options.trainer}
        operation = ledger.new_operation()
        ledger.append("train", who, operation, details, None, {"model": before}, {"model": number})


def dry_run(project: Project, options: Options) -> list[str]:
    """The lines that a person or a job array types; nothing is changed."""
    row = open_cycle(project)
    number = row["number"] if row else int(project.ledger.value("SELECT coalesce(max(number), 0) + 1 FROM cycles"))
    cycle = Cycle(number, options, 0)
    place = shlex.quote(str(project.folder))
    same = f"-tr {options.trainer} -c {options.configuration} --folds {' '.join(options.folds)}"
    lines = [f"export {name}={shlex.quote(value)}" for name, value in nnunet_variables(project).items()]
    plan = ""
    if not project.plans.is_file():
        plan = " --model-plans" if options.model_plans else ""
        plan += f" --plan {shlex.join(options.plan)}" if options.plan else ""
    lines.append(f"nnunet_multimodal relabel train {place} {same} --prepare-only{plan}  # once, before the jobs")
    lines += [
        f"{shlex.join(train_command(project, cycle, fold))}  # job {fold}" for fold in missing_folds(project, cycle)
    ]
    lines.append(f"nnunet_multimodal relabel train {place} {same} --collect  # once, after them")
    return lines


def processors() -> int:
    """Cores that we may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
