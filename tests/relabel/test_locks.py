"""Two processes at once: the second waits, or says who is at work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_project import Workshop, anatomy, save

from nnunet_multimodal.errors import MultimodalError
from nnunet_multimodal.relabel import locks

pytest.importorskip("fcntl")

HOLD = """
import sys, time
from pathlib import Path
from nnunet_multimodal.relabel import locks
with locks.held(Path(sys.argv[1]), sys.argv[2], "relabel accept"):
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def holder(folder: Path, name: str, seconds: float) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLD, str(folder), name, str(seconds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_holds_the_lock(call, workshop: Workshop) -> None:
    given = workshop.folder / "given"
    save(given / "p7.nii.gz", anatomy(7))
    process = holder(workshop.place / ".locks", "project", 60)
    try:
        code, _, err = call("accept", workshop.place, given)
        assert code == 1
        assert re.search(rf"P is locked by pid {process.pid} on \S+ since 2\d\d\d-.* \(relabel accept\)", err), err
        assert "--wait SECONDS" in err
        assert workshop.state("p7")["state"] == "pool"
        assert call("status", workshop.place)[0] == 0, "reading needs no lock"
        assert call("log", workshop.place)[0] == 0
        for words in (("undo",), ("reject", "p7")):
            assert call(words[0], workshop.place, *words[1:])[0] == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert call("accept", workshop.place, given)[0] == 0, "a lock goes with its process"


def test_the_second_waits_if_asked(call, workshop: Workshop) -> None:
    given = workshop.folder / "given"
    save(given / "p7.nii.gz", anatomy(7))
    process = holder(workshop.place / ".locks", "project", 1.0)
    assert call("accept", workshop.place, given, "--wait", 60)[0] == 0
    process.wait()


def test_two_accepts_at_once_both_come_through(call, workshop: Workshop) -> None:
    """Two real commands that start together; with --wait neither is lost."""
    places = []
    for number, names in enumerate((("p4", "p5"), ("p6", "p7"))):
        places.append(workshop.folder / f"given{number}")
        for name in names:
            save(places[-1] / f"{name}.nii.gz", anatomy(int(name[1:])))
    command = [sys.executable, "-m", "nnunet_multimodal.cli", "relabel", "accept", str(workshop.place)]
    running = [subprocess.Popen([*command, str(place), "--wait", "120"]) for place in places]
    assert [process.wait() for process in running] == [0, 0]
    assert {workshop.state(name)["state"] for name in ("p4", "p5", "p6", "p7")} == {"accepted"}
    assert call("status", workshop.place, "--verify")[0] == 0


def test_training_does_not_keep_people_from_accepting(call, workshop: Workshop) -> None:
    given = workshop.folder / "given"
    save(given / "p7.nii.gz", anatomy(7))
    process = holder(workshop.place / ".locks", "train", 60)
    try:
        assert call("accept", workshop.place, given)[0] == 0
        code, _, err = call("train", workshop.place, "-device", "cpu")
        assert code == 1 and f"pid {process.pid}" in err
    finally:
        process.kill()
        process.wait()


def test_a_lock_without_a_name_yet(tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / "x.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        begin = time.monotonic()
        with (
            pytest.raises(MultimodalError, match="another process that has just started"),
            locks.held(tmp_path, "x", "me", 0.3),
        ):
            pass
        assert time.monotonic() - begin >= 0.3
    with locks.held(tmp_path, "x", "me"):
        assert str(os.getpid()) in (tmp_path / "x.lock").read_text(encoding="utf-8")
    assert (tmp_path / "x.lock").read_text(encoding="utf-8") == ""
