"""nnU-Net's environment variables and folders, checked once for all commands, without importing torch."""

from __future__ import annotations

import os
from pathlib import Path

from nnunet_multimodal.errors import DataProblem, EnvironmentProblem

EXTENSION_VARIABLE = "nnUNet_extTrainer"
FOLDER_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

_PACKAGE = Path(__file__).resolve().parent


def extension_folder() -> Path:
    """The one folder that nnUNet_extTrainer has to name."""
    return _PACKAGE / "extension"


def is_extension_folder(folder: str) -> bool:
    """Whether this entry of nnUNet_extTrainer is ours, however it is written."""
    return Path(folder).resolve() == extension_folder()


def is_misplaced(folder: str) -> bool:
    """Whether an entry of nnUNet_extTrainer is this package, a folder inside it other than ours, or the one around it.

    nnU-Net would import every module there and then forget it, which breaks pickling (methods.md, 0.1).
    """
    path = Path(folder).resolve()
    if path == extension_folder():
        return False
    return path == _PACKAGE.parent or path.is_relative_to(_PACKAGE)


def listed_extension_folders() -> list[str]:
    """The entries of nnUNet_extTrainer, as nnU-Net reads them."""
    return [folder for folder in os.environ.get(EXTENSION_VARIABLE, "").split(os.pathsep) if folder.strip()]


def extension_value() -> str:
    """What nnUNet_extTrainer should be: our folder, then the user's others.

    Entries that cannot be right are left out: this package's other folders, and our folder in an installation that is
    gone; quotes and ``~``, with which nnU-Net finds nothing, are resolved. Ours comes first, so that a broken module
    in another folder does not stop nnU-Net from reaching it.
    """
    ours = extension_folder()
    kept: list[str] = []
    for entry in listed_extension_folders():
        folder = os.path.expanduser(entry.strip().strip("'\""))
        gone = Path(folder).parts[-2:] == ours.parts[-2:] and not Path(folder).exists()
        if not (gone or is_extension_folder(folder) or is_misplaced(folder) or folder in kept):
            kept.append(folder)
    return os.pathsep.join([str(ours), *kept])


def use_own_trainers() -> None:
    """Let nnU-Net find our trainers in this process and its children, whether or not the user set the variable."""
    os.environ[EXTENSION_VARIABLE] = extension_value()


def unexpanded_characters(variable: str, value: str) -> str | None:
    """The complaint about a path that a shell should have unquoted or expanded; None for a good one.

    Only at the ends, because a quote or a tilde within a path is legal (``/data/O'Brien``, ``C:\\USERS~1``).
    """
    path = value.strip()
    if path[:1] in ("'", '"') or path[-1:] in ("'", '"'):
        return f"{variable}={value!r} contains quote characters; remove them."
    if path.startswith("~"):
        expanded = Path(path).expanduser() if path[1:2] in ("", "/", os.sep) else "/path"
        return f"{variable}={value!r} contains '~', which nnU-Net does not expand; write {expanded} instead."
    return None


def require_nnunet_path(variable: str) -> Path:
    """The existing folder that one of nnU-Net's variables names.

    Raises:
        EnvironmentProblem: it is unset, holds quotes or ``~``, or does not name a folder.
    """
    value = os.environ.get(variable, "")
    if not value.strip():
        raise EnvironmentProblem(f"{variable} is not set. Run: export {variable}=/path (see README, Setup).")
    complaint = unexpanded_characters(variable, value)
    if complaint:
        raise EnvironmentProblem(complaint)
    path = Path(value)
    if not path.exists():
        raise EnvironmentProblem(f"{variable}={value} does not exist. Create the folder or correct the variable.")
    if not path.is_dir():
        raise EnvironmentProblem(f"{variable}={value} is a file, expected a folder. Correct the variable.")
    return path


def find_raw_dataset(id_or_name: str | int) -> Path:
    """The folder in nnUNet_raw of a data set named by its id (``7``, ``007``) or its full name (``Dataset007_Liver``).

    Raises:
        EnvironmentProblem: nnUNet_raw is unfit.
        DataProblem: no data set, or more than one, answers to it.
    """
    raw = require_nnunet_path("nnUNet_raw")
    wanted = str(id_or_name)
    names = sorted(path.name for path in raw.glob("Dataset*_*") if path.is_dir())
    if wanted.isdecimal():
        found = [name for name in names if _dataset_id(name) == int(wanted)]
    else:
        found = [name for name in names if name == wanted]
    if len(found) == 1:
        return raw / found[0]
    if found:
        raise DataProblem(f"Data set {wanted} is ambiguous in {raw}: {', '.join(found)}. Rename all but one.")
    there = f"There are: {', '.join(names)}." if names else "It holds no DatasetXXX_Name folder."
    raise DataProblem(f"Data set {wanted} not found in {raw}. {there}")


def _dataset_id(name: str) -> int | None:
    digits = name.removeprefix("Dataset").partition("_")[0]
    return int(digits) if digits.isdecimal() else None
