"""A tiny project for each test, its predictions made up so that no network is needed; the command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

for folder in ("inference",):  # its tiny models
    path = str(Path(__file__).resolve().parents[1] / folder)
    if path not in sys.path:
        sys.path.insert(0, path)

from tiny_project import Workshop  # noqa: E402

from nnunet_multimodal.cli import main  # noqa: E402

Call = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """``call("status", P)``: exit code, stdout and stderr of a relabel step."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["relabel", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def workshop(tmp_path: Path, clean_environment: None) -> Workshop:
    """Eight images, the project with two of them labelled, and a made-up model that has predicted the other six."""
    made = Workshop(tmp_path)
    made.make_images(8)
    made.init(labelled=2)
    made.pretend_model()
    return made
