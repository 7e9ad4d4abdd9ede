"""What all tests share: the real images, and commands run the way a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

# Before torch is imported: on tiny tensors threads only wait for one another, minutes of it on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a developer's shell says to nnU-Net must neither help nor hinder a test: a new machine's says nothing.
for _name in [name for name in os.environ if name.startswith("nnUNet_")]:
    del os.environ[_name]

REPOSITORY = Path(__file__).resolve().parents[1]
TIMEOUT = 300  # seconds; a command that takes longer in a test hangs

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real example images; NNUNET_MULTIMODAL_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("NNUNET_MULTIMODAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no example images: {folder} does not exist; set NNUNET_MULTIMODAL_DATA")
    return folder


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No nnU-Net variable is set in this process, whatever the developer's shell says."""
    for name in [name for name in os.environ if name.startswith("nnUNet_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def nnunet_folders(tmp_path: Path, clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """nnU-Net's three folders, empty, below tmp_path; set in this process and returned for ``run_command(env=...)``."""
    folders = {name: tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture
def run_python(tmp_path: Path) -> Run:
    """``run_python(*arguments, env=None)``: a fresh interpreter in tmp_path with only the nnUNet_* variables in env."""

    def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture
def run_command(run_python: Run) -> Run:
    """``run_command("list", "--json", env=None)``: ``nnunet_multimodal list --json`` in a fresh process."""

    def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "nnunet_multimodal.cli", *arguments, env=env)

    return run
