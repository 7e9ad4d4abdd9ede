"""Work beside the prediction: in other processes, or here where a process would not pay."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


def processes_for(device: str, cases: int) -> int:
    """How many processes prepare, and how many write, if nobody says.

    None on a CPU, where the network already has all cores and each process first imports torch for seconds, nor for a
    few cases; else as nnU-Net up to three, so that the GPU does not wait.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if device == "cpu" or cases < 3 or cores < 4 else min(3, cores // 2)


class Workers:
    """A pool of processes with ``submit``; with 0 processes the call is made here and now."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None
        if processes:  # spawn: a forked process would not survive our threads and CUDA
            self._pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), initializer=_ignore_interrupt
            )

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """The function, and what it takes and gives, must be picklable."""
        if self._pool is not None:
            with _interrupts_held_back():
                return self._pool.submit(function, *args)
        future: Future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:  # an interrupt is not the call's result: it ends us
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Waits for what has begun, and drops the rest."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """A process that starts in here never sees Ctrl-C, not even while it imports: it is for us. Not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ignore_interrupt() -> None:
    """The same from the first call on, for Windows too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
