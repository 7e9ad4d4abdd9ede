"""SIGKILL at random moments: the project opens, nothing accepted is lost, no half file, the command again finishes.

A process is forked for each command, killed after some time, and the command is run again to its end in another.
Forked, for starting Python and torch takes longer than most commands. Fifty kills are in benchmarks/relabel_kill.py,
one of a real training in test_real_cycle.py.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from test_training import Programs
from tiny_project import Workshop, anatomy, load, save

from nnunet_multimodal.cli import main
from nnunet_multimodal.relabel import training
from nnunet_multimodal.relabel.packages import MASK
from nnunet_multimodal.relabel.project import Project
from nnunet_multimodal.relabel.status import verify

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
TRAIN = ("-tr", "nnUNetTrainerMRSegmentator_2epochs", "--folds", "0", "-device", "cpu", "--processes", "0")


def start(*words: object) -> int:
    """The command in a forked process; its pid."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = main(["relabel", *map(str, words)])
        finally:
            os._exit(code)
    return pid


def run_to_the_end(*words: object) -> tuple[int, float]:
    begin = time.perf_counter()
    _, status = os.waitpid(start(*words), 0)
    return os.waitstatus_to_exitcode(status), time.perf_counter() - begin


def killed(after: float, *words: object) -> bool:
    """Whether the command was still running when it was killed."""
    pid = start(*words)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def accepted(place: Path) -> dict[str, str]:
    project = Project(place)
    rows = project.ledger.all("SELECT name, mask FROM cases WHERE state = 'accepted'")
    project.ledger.close()
    return {row["name"]: row["mask"] for row in rows}


def check(place: Path, before: dict[str, str], step: str) -> None:
    """What must hold at every moment."""
    project = Project(place)
    assert verify(project) == []
    project.ledger.close()
    after = accepted(place)
    if step not in ("undo", "reject"):
        assert before.items() <= after.items(), "nothing accepted is lost"
    hidden = [path for path in place.rglob("*") if path.name.startswith(".")]
    for path in place.rglob("*.nii.gz"):
        if path not in hidden and not any(parent in hidden for parent in path.parents):
            load(path)  # no half file under a name that counts


class Story:
    """A project and the commands that its life consists of."""

    def __init__(self, folder: Path) -> None:
        self.workshop = Workshop(folder)
        self.workshop.make_images(10)
        for name in self.workshop.names[:5]:
            save(folder / "start" / f"{name}.nii.gz", load(self.workshop.truth / f"{name}.nii.gz"))

    @property
    def place(self) -> Path:
        return self.workshop.place

    def last_event(self) -> int:
        if not (self.place / "relabel.sqlite").exists():
            return 1
        project = Project(self.place)
        number = project.ledger.value("SELECT max(id) FROM events WHERE kind = 'reject'")
        project.ledger.close()
        return int(number or 1)

    def commands(self) -> list[tuple[str, ...]]:
        place, folder = str(self.place), self.workshop.folder
        names = ("liver=1", "right_kidney=2", "left_kidney=3")
        start_labels = ("--labels", str(folder / "start"), "--label-names", *names)
        return [
            ("init", place, "--images", str(self.workshop.images), *start_labels),
            ("train", place, *TRAIN),
            ("propose", place, "-n", "3", "-device", "cpu"),
            ("accept", place),
            ("report", place),
            ("reject", place, "p9"),
            ("undo", place, "--event", str(self.last_event())),
        ]

    def between(self, step: str) -> None:
        """What others do before a command: predictions of the trained model, corrections."""
        if step == "propose" and self.place.is_dir() and not list(self.place.glob("batches/*")):
            project = Project(self.place)
            if project.model() is not None and project.model()["folder"] != "/none":
                self.workshop.pretend_model(1)
            project.ledger.close()
        if step == "accept":
            for package in self.place.glob("batches/batch_*/p*"):
                save(package / MASK, anatomy(int(package.name[1:])))


def test_killed_at_random_moments(tmp_path: Path, clean_environment, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("RELABEL_KILL_SEED", random.SystemRandom().randrange(10**6)))
    print(f"RELABEL_KILL_SEED={seed}", file=sys.stderr)
    dice = random.Random(seed)
    monkeypatch.setattr(training, "run_program", Programs())
    story = Story(tmp_path)
    for number in range(len(story.commands())):
        words = story.commands()[number]
        story.between(words[0])
        there = (story.place / "relabel.sqlite").exists()
        before = accepted(story.place) if there and words[0] != "init" else {}
        killed(dice.uniform(0.0, 0.6), *words)
        if words[0] != "init":
            check(story.place, before, words[0])
        code, _ = run_to_the_end(*words)
        done = words[0] == "train"  # killed after its last step, it says that there is nothing left to do
        assert code == 0 or (done and code == 2), words
        check(story.place, before, words[0])
    left = [path for path in story.place.rglob("*") if ".partial" in path.name]
    assert left == [], "leftovers are cleared away by the next command"
    packages = {package.name for package in story.place.glob("batches/batch_*/p*")}
    assert len(packages) in (3, 5), "propose, killed after its last step, proposes more when repeated"
    assert set(accepted(story.place)) == {*story.workshop.names[:5], *packages}
