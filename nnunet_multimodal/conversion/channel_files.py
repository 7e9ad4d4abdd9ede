"""The images of a case in several contrasts: one folder per contrast, or one folder with the contrast in the names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nnunet_multimodal.conversion.dataset import case_id, find_files, first_names
from nnunet_multimodal.conversion.images import split_suffix
from nnunet_multimodal.errors import DataProblem


def find_channel_files(folders: Mapping[str, Path]) -> dict[str, tuple[Path, ...]]:
    """Case -> its file of each channel, in the order of ``folders``.

    A file is named CASE, CASE_NAME (CASE_Flair for the channel FLAIR) or CASE_000N for the N-th channel from 0. Where
    several channels share a folder, only the latter two tell which is which. In a folder of its own a file may be named
    as the case is in the first channel's, with a number at its end (p_0001) or nnU-Net's _0000.

    Args:
        folders: name of each channel, and where its images are.

    Raises:
        UsageError: a folder is missing.
        DataProblem: a folder has no image of its channel, two files are one case's, or a case lacks a channel.
    """
    of_channel: dict[str, dict[str, Path]] = {}
    for index, (name, folder) in enumerate(folders.items()):
        shared = sum(other.resolve() == folder.resolve() for other in folders.values()) > 1
        first = next(iter(of_channel.values()), {})
        of_channel[name] = _of_channel(folder, name, index, None if shared else first)
    cases = sorted(set().union(*of_channel.values()))
    lacking = []
    for name, files in of_channel.items():
        without = [case for case in cases if case not in files]
        if without:
            lacking.append(f"  {name} ({folders[name]}): {len(without)} cases without an image: {first_names(without)}")
    if lacking:
        heading = f"Every case needs the channels {', '.join(folders)}, in files of the same case name."
        raise DataProblem("\n".join([heading, *lacking, "Add, rename or take away files until all agree."]))
    return {case: tuple(files[case] for files in of_channel.values()) for case in cases}


def _of_channel(folder: Path, name: str, index: int, first: Mapping[str, Path] | None) -> dict[str, Path]:
    """Case -> file; ``first`` is that of the first channel, None in a folder that several share."""
    files: dict[str, Path] = {}
    for path in find_files(folder, f"{name} image").values():
        stem = split_suffix(path)[0]
        case = _strip(stem, name, index)
        if first is not None and (case is None or stem in first):
            case = case_id(path)
        if case is None:
            continue  # of another channel
        if case in files:
            raise DataProblem(f"Case id '{case}' comes from {files[case]} and {path}. Rename one of them.")
        files[case] = path
    if not files:
        raise DataProblem(
            f"{folder} holds no image of {name}. Several channels are in that folder, so their files must end in "
            f"_{name} or _{index:04d}."
        )
    return files


def _strip(stem: str, name: str, index: int) -> str | None:
    """The case in a file's name, or None where it does not end like this channel's."""
    for ending in (f"_{index:04d}", f"_{name.casefold()}"):
        if stem.casefold().endswith(ending) and len(stem) > len(ending):
            return stem[: -len(ending)]
    return None
