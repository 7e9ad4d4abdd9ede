"""The cases of a folder of images, named as nnU-Net names them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_multimodal.conversion.dataset import first_names, numbered
from nnunet_multimodal.errors import DataProblem


@dataclass(frozen=True)
class Case:
    """A case's name and its image files, one a channel."""

    name: str
    files: tuple[Path, ...]


def find_cases(
    folder: Path, ending: str, channels: int, missing: int | None = None, optional: Sequence[str] = ()
) -> list[Case]:
    """Every case of a folder, in the order of their names.

    nnU-Net itself passes over files that it does not understand, or cuts five characters off their names.

    Args:
        folder: holds ``NAME_0000{ending}``, ``NAME_0001{ending}``, ...
        ending: ``file_ending`` of dataset.json.
        channels: how many images make a case.
        missing: the channel that no case has, or that is to be passed over.
        optional: the channels' names, where the model can do without one of them.

    Raises:
        DataProblem: there is no folder or no case, an image has no channel suffix, or a case lacks a channel or has one
            too many (rows 7 and 8 of the faults).
    """
    if not folder.is_dir():
        what = "is a file, expected a folder of images" if folder.exists() else "does not exist"
        raise DataProblem(f"-i {folder} {what}.")
    names = sorted(name for name in os.listdir(folder) if not name.startswith(".") and (folder / name).is_file())
    found: dict[str, dict[int, Path]] = {}
    problems = []
    for name in (name for name in names if name.endswith(ending)):
        stem = name.removesuffix(ending)
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        if match is None:
            problems.append(f"{folder / name} has no channel suffix; rename to {stem}_0000{ending}.")
        else:
            found.setdefault(match[1], {})[int(match[2])] = folder / name
    expected = [channel for channel in range(channels) if channel != missing]
    for case, files in found.items():
        if missing is not None:
            files.pop(missing, None)
        if sorted(files) != expected:
            absent = [channel for channel in expected if channel not in files]
            hint = ""
            if optional and missing is None and len(absent) == 1 and len(files) == channels - 1:
                hint = (
                    f" Without {optional[absent[0]]} it can be predicted, too: put such cases into a folder of their "
                    f"own and add --missing {optional[absent[0]]}."
                )
            problems.append(
                f"case {case}: expected channels {_list(expected)}; found {_list(files) or 'none'} in {folder}.{hint}"
            )
    if problems:
        raise DataProblem(numbered("The images need nnU-Net's names, CASE_CHANNEL:", problems))
    if not found:
        there = f"; it holds {first_names(names)}" if names else ", it is empty"
        raise DataProblem(
            f"-i {folder} holds no image that ends in _{expected[0]:04d}{ending}, as the model's data set does{there}."
        )
    return [Case(case, tuple(files[index] for index in sorted(files))) for case, files in sorted(found.items())]


def _list(channels: Iterable[int]) -> str:
    return ",".join(f"{channel:04d}" for channel in sorted(channels))
