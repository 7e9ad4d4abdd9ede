"""Runs the steps: each once, each shown as the line that a user can type, resumable, and stopped cleanly."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nnunet_multimodal import __version__
from nnunet_multimodal.demo.recipe import FOLDERS, Options, Step, check_options, environment, write_json
from nnunet_multimodal.environment import EXTENSION_VARIABLE
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.programs import duration, program_environment, run_program

RECORD = "demo.json"
_AFTERWARDS = "Once that is put right, the same demo goes on from here."


class Record:
    """demo.json: the options, and of each step that is done its command and its time."""

    def __init__(self, folder: Path, options: Options) -> None:
        """Raises UsageError for a folder with other things in it, or with a demo of other options."""
        self.path = folder / RECORD
        before = read_record(folder)
        if before is not None:
            check_options(before["options"], options, folder)
            self.content = before
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"{folder} is there already and holds no {RECORD}. Choose another folder with -o.")
        folder.mkdir(parents=True, exist_ok=True)
        self.content = {
            "nnunet_multimodal": __version__,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "cores": os.cpu_count(),
            "options": options.as_json(),
            "steps": {},
        }
        self.save()

    def save(self) -> None:
        write_json(self.path, self.content)

    def done(self, name: str) -> dict[str, Any] | None:
        """What is written down of a step that is done."""
        step: dict[str, Any] = self.content["steps"].get(name, {})
        return step if step.get("done") else None

    def add(self, step: Step, command: str, seconds: float, cpu_seconds: float, done: bool) -> None:
        """Time of interrupted attempts counts, too."""
        before = self.content["steps"].get(step.name, {})
        self.content["steps"][step.name] = {
            "title": step.title,
            "command": before.get("command", command),
            "own": step.do is not None,
            "seconds": round(before.get("seconds", 0.0) + seconds, 1),
            "cpu_seconds": round(before.get("cpu_seconds", 0.0) + cpu_seconds, 1),
            "done": done,
        }
        self.save()


def read_record(folder: Path) -> dict[str, Any] | None:
    """demo.json of a folder; None where there is none.

    Raises:
        DataProblem: it is not what the demo wrote.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content["options"], dict) and isinstance(content["steps"], dict):
            return dict(content)
    except (ValueError, KeyError, TypeError):
        pass
    raise DataProblem(f"{path} is not what the demo wrote. Choose another folder with -o, or delete it: rm -r {folder}")


def run_steps(folder: Path, options: Options, steps: Sequence[Step], record: Record) -> None:
    """Do what is not done yet.

    Raises:
        MultimodalError: a command failed; what it said last is in the message.
        KeyboardInterrupt: after the command was ended.
    """
    variables = environment(folder, options)
    for name in FOLDERS:
        (folder / name).mkdir(exist_ok=True)
    for number, step in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {step.title}")
        before = record.done(step.name)
        if before is not None:
            print(f"  $ {before['command']}\n  done before, in {duration(before['seconds'])}", flush=True)
            continue
        words = (*step.command, *step.go_on())
        line = shlex.join(words) if step.do is None else " ".join(words)
        print(f"  {'#' if step.do else '$'} {line}", flush=True)
        begin, cpu = time.perf_counter(), _cpu_seconds()
        done = False
        try:
            if step.do is not None:
                step.do()
            else:
                log = folder / "logs" / f"{step.name}.log"
                run_program(words, {**_own_environment(), **variables}, log, step.progress, _AFTERWARDS)
            done = True
        finally:
            record.add(step, line, time.perf_counter() - begin, _cpu_seconds() - cpu, done)
        print(f"  done in {duration(time.perf_counter() - begin)}", flush=True)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock: two demos in one folder would train over each other. It goes with the process.

    Raises:
        UsageError: another process holds it; says which, and since when.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UsageError(
                f"{folder} is locked by another demo ({file.read().strip() or 'just started'}). Wait for it, or choose "
                "another folder with -o."
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}")
        file.flush()
        yield


def environment_lines(folder: Path, options: Options) -> list[str]:
    """What a user types before the commands."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment(folder, options).items()]
    return ["  $ " + line for line in (*lines, 'eval "$(nnunet_multimodal env)"')]


def _cpu_seconds() -> float:
    """Of this process and of the commands that have ended; on a busy machine a better measure than the clock."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _own_environment() -> dict[str, str]:
    """The user's environment without nnU-Net's variables: a demo is the same for everybody."""
    kept = (EXTENSION_VARIABLE, *(name for name in program_environment() if not name.startswith("nnUNet_")))
    return {name: program_environment()[name] for name in kept}
