"""Whatever is done in whatever order, and wherever it is cut: ledger, events and masks say the same (faults.md 3.7)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_project import Workshop, anatomy, load, save

from nnunet_multimodal.cli import main
from nnunet_multimodal.relabel.status import verify

CASES = 5


class Crash(BaseException):
    """As if the process were gone: nothing that would tidy up after an Exception is run on it."""


class Fuse:
    """Lets the n-th durable step of a command fail: a file put in place, or a transaction brought to its end."""

    def __init__(self, monkeypatch: Any) -> None:
        self.left: int | None = None
        from nnunet_multimodal.relabel import ledger

        replace, transaction = os.replace, ledger.Ledger.transaction

        def burning(action: Callable) -> Callable:
            def step(*arguments: Any, **more: Any) -> Any:
                self.burn()
                result = action(*arguments, **more)
                self.burn()
                return result

            return step

        def cut(ledger_: Any):
            self.burn()
            return transaction(ledger_)

        monkeypatch.setattr(os, "replace", burning(replace))
        monkeypatch.setattr(ledger.Ledger, "transaction", cut)

    def burn(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Crash


names = st.sampled_from([f"p{i}" for i in range(CASES)])
steps = st.one_of(
    st.tuples(st.just("propose"), st.integers(1, 3)),
    st.tuples(st.just("accept"), names, st.integers(0, 2)),
    st.tuples(st.just("correct"), names),
    st.tuples(st.just("reject"), names),
    st.tuples(st.just("undo"), st.none()),
    st.tuples(st.just("undo"), names),
)
crashes = st.one_of(st.none(), st.integers(0, 12))


def variant(name: str, number: int) -> np.ndarray:
    """One of three good masks of a case."""
    labels = anatomy(int(name[1:]))
    labels[1, 4, 3 : 3 + number] = 0
    return labels


def do(workshop: Workshop, step: tuple) -> None:
    place = str(workshop.place)
    if step[0] == "propose":
        main(["relabel", "propose", place, "-n", str(step[1]), "-device", "cpu"])
    elif step[0] == "accept":
        given_folder = workshop.folder / "given"
        shutil.rmtree(given_folder, ignore_errors=True)
        save(given_folder / f"{step[1]}.nii.gz", variant(step[1], step[2]))
        main(["relabel", "accept", place, str(given_folder)])
    elif step[0] == "correct":
        for package in workshop.place.glob(f"batches/batch_*/{step[1]}"):
            save(package / "mask.nii.gz", variant(step[1], 0))
        main(["relabel", "accept", place])
    elif step[0] == "reject":
        main(["relabel", "reject", place, step[1]])
    else:
        main(["relabel", "undo", place, *([step[1]] if step[1] else [])])


def snapshot(workshop: Workshop) -> dict[str, tuple]:
    project = workshop.project
    rows = project.ledger.all("SELECT name, state, mask, proposal, acceptance FROM cases ORDER BY id")
    project.ledger.close()
    return {row["name"]: tuple(row)[1:] for row in rows}


def check(workshop: Workshop) -> None:
    """Events make the cases; every mask is there and is what its name says; nothing half is anywhere."""
    project = workshop.project
    assert verify(project) == []
    events = project.ledger.all("SELECT id FROM events ORDER BY id")
    assert [row[0] for row in events] == [*range(1, len(events) + 1)]
    for row in project.ledger.all("SELECT name, mask FROM cases WHERE state = 'accepted'"):
        stored = load(project.masks.path(row["mask"]))
        assert any(np.array_equal(stored, variant(row["name"], number)) for number in range(3))
    project.ledger.close()


def make(folder: Path) -> Workshop:
    workshop = Workshop(folder)
    workshop.make_images(CASES)
    workshop.init(labelled=1)
    workshop.pretend_model()
    return workshop


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(steps, crashes), min_size=1, max_size=6))
def test_any_sequence_of_steps_and_crashes(monkeypatch, clean_environment, sequence) -> None:
    with tempfile.TemporaryDirectory() as name, monkeypatch.context() as patch:
        workshop = make(Path(name))
        fuse = Fuse(patch)
        for step, crash in sequence:
            before = snapshot(workshop)
            fuse.left = crash
            try:
                do(workshop, step)
                crashed = False
            except Crash:
                crashed = True
            fuse.left = None
            check(workshop)
            after = snapshot(workshop)
            if crashed:
                accepted = [case for case, state in before.items() if state[0] == "accepted"]
                lost = [case for case in accepted if after[case][0] != "accepted" and step[0] not in ("undo", "reject")]
                assert lost == []
                if not (step[0] == "undo" and after != before):  # an undo that came through is not said twice
                    do(workshop, step)  # again, to its end
                check(workshop)
