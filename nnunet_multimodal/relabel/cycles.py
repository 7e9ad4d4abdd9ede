"""What is known of the trainings: options, what each was trained on, and which labels it does not know yet."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from nnunet_multimodal.data.modality import first_names
from nnunet_multimodal.relabel.ledger import ACCEPTED, Row
from nnunet_multimodal.relabel.project import Project

BEGUN, TRAINED, ABANDONED = "begun", "trained", "abandoned"


@dataclass(frozen=True)
class Options:
    """What makes one training differ from another.

    Attributes:
        trainer: its name, a length at its end if wanted.
        configuration: ``2d``, ``3d_fullres``, ...
        folds: ``0`` to ``4``, or ``all``.
        plan: words for nnUNetv2_plan_experiment, in the first cycle.
        device: cpu, cuda or mps.
        model_plans: in the first cycle, the starting model's plans instead.
    """

    trainer: str
    configuration: str
    folds: tuple[str, ...]
    plan: tuple[str, ...] = ()
    device: str = "cuda"
    model_plans: bool = False

    def same_training(self, other: Options) -> bool:
        """Whether weights of one can go on in the other; how was planned, and where it runs, does not matter."""
        return (self.trainer, self.configuration, self.folds) == (other.trainer, other.configuration, other.folds)


@dataclass(frozen=True)
class Cycle:
    """A cycle that has begun or is trained."""

    number: int
    options: Options
    cases: int
    changed: tuple[str, ...] = ()  # cases whose accepted mask is another one by now
    new: tuple[str, ...] = ()  # cases that were accepted since


def open_cycle(project: Project) -> Row | None:
    """The cycle that has begun and is not trained yet."""
    return project.ledger.one("SELECT * FROM cycles WHERE state = ? ORDER BY number DESC LIMIT 1", BEGUN)


def cycle_of(project: Project, number: int, options: Options) -> Cycle:
    changed, new = stale(project, number)
    count = project.ledger.value("SELECT count(*) FROM cycle_cases WHERE cycle = ?", number)
    return Cycle(number, options, count, tuple(changed), tuple(new))


def stale(project: Project, cycle: int) -> tuple[list[str], list[str]]:
    """Cases of a cycle whose mask is another one now (or none), and cases accepted since; faults.md row 40."""
    ledger = project.ledger
    changed = ledger.all(
        "SELECT c.name FROM cycle_cases t JOIN cases c ON c.id = t.case_id WHERE t.cycle = ? AND c.mask IS NOT t.mask "
        "ORDER BY c.name",
        cycle,
    )
    new = ledger.all(
        "SELECT c.name FROM cases c WHERE c.state = ? AND c.id NOT IN "
        "(SELECT case_id FROM cycle_cases WHERE cycle = ?) ORDER BY c.name",
        ACCEPTED,
        cycle,
    )
    return [row[0] for row in changed], [row[0] for row in new]


def options_from(text: str) -> Options:
    content = json.loads(text)
    return Options(**{**content, "folds": tuple(content["folds"]), "plan": tuple(content["plan"])})


def describe_options(options: Options) -> str:
    return f"-tr {options.trainer} -c {options.configuration} --folds {' '.join(options.folds)}"


def describe_stale(cycle: Cycle, project: Path) -> list[str]:
    """What the user is told of labels that the open cycle does not know."""
    lines = []
    restart = f"nnunet_multimodal relabel train {shlex.quote(str(project))} --restart"
    if cycle.changed:
        lines.append(
            f"{len(cycle.changed)} labels changed since cycle {cycle.number} was begun; the next cycle takes them in, "
            f"or run {restart} (cases: {first_names([*cycle.changed])})"
        )
    if cycle.new:
        lines.append(f"{len(cycle.new)} new cases are in no split of cycle {cycle.number}: {first_names([*cycle.new])}")
    return lines
