"""One process at a time for each kind of work in a project; the others wait, or are told who is at work."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from nnunet_multimodal.errors import MultimodalError

POLL = 0.1  # seconds between two tries


@contextlib.contextmanager
def held(
    folder: Path,
    name: str,
    command: str,
    wait: float = 0.0,
    hint: str = "Wait for it to end, or say for how long to wait: --wait SECONDS.",
) -> Iterator[None]:
    """Holds the lock ``folder/NAME.lock``; it goes with the process, however that ends.

    Args:
        folder: of the locks; made if it is not there.
        name: of the work that is done by one process at a time.
        command: what the others are told that we do.
        wait: seconds to wait for another process.
        hint: what to do if it holds the lock for longer.

    Raises:
        MultimodalError: another process holds it; says which, where and since when.
    """
    try:
        import fcntl
    except ImportError:  # Windows: SQLite's own lock keeps transactions apart, long work is not
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait
    with open(folder / f"{name}.lock", "a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() >= until:
                    file.seek(0)
                    raise MultimodalError(
                        f"{folder.parent} is locked by {_holder(file.read())}. Nothing was changed. {hint}"
                    ) from error
            time.sleep(POLL)
        file.seek(0)
        file.truncate()
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since, "command": command}))
        file.flush()
        yield
        file.seek(0)
        file.truncate()


def _holder(text: str) -> str:
    try:
        who = json.loads(text)
        return f"pid {who['pid']} on {who['host']} since {who['since']} ({who['command']})"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not written yet
        return "another process that has just started"
