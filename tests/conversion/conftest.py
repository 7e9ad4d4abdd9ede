"""Two tiny labelled cases on disk, and the command line called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_data import Inputs, make_image, make_label, save

from nnunet_multimodal.cli import main


@pytest.fixture
def inputs(tmp_path: Path, nnunet_folders: dict[str, str]) -> Inputs:
    data = Inputs(tmp_path / "in" / "images", tmp_path / "in" / "labels", Path(nnunet_folders["nnUNet_raw"]))
    for seed, case in enumerate("ab"):
        save(data.image(case), make_image(seed))
        save(data.label(case), make_label())
    return data


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``call([...])``: exit code, stdout and stderr of a command."""

    def run(arguments: list[str]) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
