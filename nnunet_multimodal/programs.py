"""Other programs run from here: their output in a log, a bar while they run, ended with us, no zombie left training."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nnunet_multimodal.environment import EXTENSION_VARIABLE, extension_folder
from nnunet_multimodal.errors import EnvironmentProblem, MultimodalError

SECONDS_TO_END = 10.0  # that a command has for ending itself before it is killed
LAST_LINES = 15
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_program(
    words: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    progress: tuple[str, int] | None = None,
    afterwards: str = "",
) -> None:
    """Runs a command to its end.

    Args:
        words: the command; a program beside this Python wins over one in the PATH.
        environment: all variables that it sees.
        log: what it says is appended here.
        progress: a pattern in the log whose last group is how far it is, and how far it goes.
        afterwards: said to the user after a failure.

    Raises:
        MultimodalError: it failed; what it said last is in the message.
        KeyboardInterrupt: after it was ended with all that it had started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = log.stat().st_size if log.exists() else 0
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [find_program(words[0]), *words[1:]],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us; we end it with all processes that it has started
            preexec_fn=_die_with_parent(),
        )
        with _interruptible():
            try:
                _wait(process, log, start, progress)
            except BaseException:
                _end(process)
                raise
    if process.returncode:
        said = _text(log, start).strip().splitlines()[-LAST_LINES:]
        raise MultimodalError(
            f"{words[0]} failed with exit code {process.returncode}. The end of {log}:\n"
            + "\n".join(f"    {text}" for text in said)
            + (f"\n{afterwards}" if afterwards else "")
        )


def program_environment() -> dict[str, str]:
    """Ours, with our trainers, and output that shows at once how far a program is."""
    return {
        **os.environ,
        EXTENSION_VARIABLE: str(extension_folder()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def find_program(name: str) -> str:
    """A command of this Python's installation, else of the PATH."""
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    found = beside or shutil.which(name)
    if found is None:
        raise EnvironmentProblem(
            f"{name} was not found beside {sys.executable} nor in the PATH. Run: nnunet_multimodal doctor"
        )
    return found


def duration(seconds: float) -> str:
    """``4 s``, ``2 min 05 s``"""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def _die_with_parent() -> Callable[[], None] | None:
    """Where we are killed outright, a training must not go on beside the one that the next run starts (Linux only)."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)  # before the fork: nothing may be loaded in between
    return lambda: library.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _wait(process: subprocess.Popen[bytes], log: Path, start: int, progress: tuple[str, int] | None) -> None:
    """A bar while the command runs, where the output is a terminal."""
    from tqdm import tqdm

    pattern, total = progress if progress else ("", None)
    form = (
        "  {desc}{percentage:3.0f}%|{bar:30}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]" if total else "  {elapsed}"
    )
    with tqdm(total=total, disable=None, leave=False, bar_format=form, unit="epoch") as bar:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
                return
            if total and not bar.disable:
                found = re.findall(pattern, _text(log, start), flags=re.MULTILINE)
                bar.n = int(found[-1]) if found else 0
            bar.refresh()


def _text(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode("utf-8", "replace")


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """A polite ``kill`` of the demo, or a closed terminal, is like Ctrl-C: the command must not stay behind."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it has started: asked first, then killed."""

    def send(name: str) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, getattr(signal, name))
            else:
                process.kill()

    send("SIGTERM")
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=SECONDS_TO_END)
    send("SIGKILL")  # what is left of its group
    process.wait()
