"""``nnunet_multimodal doctor``: what is wrong with the installation or a data set, and what to type.

The checks go from the cheap to the dear: variables and versions first, what must import torch and nnU-Net last.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import inspect
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nnunet_multimodal.commands.env import export_line, guess_shell
from nnunet_multimodal.environment import (
    EXTENSION_VARIABLE,
    FOLDER_VARIABLES,
    find_raw_dataset,
    is_extension_folder,
    is_misplaced,
    listed_extension_folders,
    require_nnunet_path,
    unexpanded_characters,
)
from nnunet_multimodal.errors import DataProblem, EnvironmentProblem
from nnunet_multimodal.registry import TRAINERS

DESCRIPTION = """\
Check the installation: nnU-Net's variables and folders, versions, and that nnU-Net finds the trainers.
With -d, check a data set in nnUNet_raw instead.
Ends with 0 if nothing is in the way (warnings included), 3 if the installation is, 4 if the data set is."""

EXAMPLE = """\
nnunet_multimodal doctor
nnunet_multimodal doctor -d 7"""

TESTED = "nnunetv2>=2.8,<2.9"

# What nnU-Net asks of every trainer; the checkpoint and the predictor stand on these names.
CONTRACT = {
    "__init__": ("self", "plans", "configuration", "fold", "dataset_json", "device"),
    "build_network_architecture": (
        "plans_manager",
        "configuration_manager",
        "num_input_channels",
        "num_output_channels",
        "enable_deep_supervision",
    ),
}

_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

    what: str
    status: str  # ok, warning or error
    found: str
    fix: str = ""  # what to type or do; empty if ok

    def __str__(self) -> str:
        line = f"{_MARKS[self.status]} {self.what}: {self.found}"
        return f"{line}\n    -> {self.fix}" if self.fix else line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--dataset", metavar="DATASET", help="id or DatasetXXX_Name of a data set in nnUNet_raw")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.dataset is not None:
        return _check_dataset(find_raw_dataset(args.dataset), args.json)
    checks: list[Check] = []
    for check in _checks():
        checks.append(check)
        if not args.json:
            print(check, flush=True)  # at once: the last ones take seconds
    errors = sum(check.status == "error" for check in checks)
    if args.json:
        print(json.dumps({"ok": not errors, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    return EnvironmentProblem.exit_code if errors else 0


def _check_dataset(folder: Path, as_json: bool) -> int:
    from nnunet_multimodal.conversion.verify import check_raw_dataset

    findings = check_raw_dataset(folder)
    problems = findings.problems
    if as_json:
        content = {"ok": not problems, "folder": str(folder), "problems": problems, "warnings": findings.warnings}
        print(json.dumps(content, indent=2))
    else:
        for warning in findings.warnings:
            print(f"{_MARKS['warning']} {warning}")
        for problem in problems:
            print(f"{_MARKS['error']} {problem}")
        if not problems:
            print(f"{_MARKS['ok']} {folder.name}: nothing found that would stop nnU-Net")
    return DataProblem.exit_code if problems else 0


def _checks() -> Iterator[Check]:
    yield check_extension()
    for variable in FOLDER_VARIABLES:
        yield check_folder(variable)
    yield check_nnunet_version()
    yield check_torch_version()
    yield check_import("hooks", check_hooks)
    yield check_import("trainers", check_trainers)


def check_extension() -> Check:
    """nnUNet_extTrainer names our extension folder and no other folder of the package."""
    fix = f"Run: {export_line(guess_shell())}"
    folders = listed_extension_folders()
    if not folders:
        return Check(EXTENSION_VARIABLE, "error", "not set, so nnU-Net does not find the trainers", fix)
    for folder in folders:
        complaint = unexpanded_characters(EXTENSION_VARIABLE, folder)
        if complaint:
            return Check(EXTENSION_VARIABLE, "error", complaint, fix)
        if is_misplaced(folder):
            found = f"{folder} is not the extension folder; nnU-Net would import and then forget every module in it"
            return Check(EXTENSION_VARIABLE, "error", found, fix)
    value = os.pathsep.join(folders)
    if not any(is_extension_folder(folder) for folder in folders):
        return Check(EXTENSION_VARIABLE, "error", f"{value} does not hold the extension folder", fix)
    missing = [folder for folder in folders if not os.path.isdir(folder)]
    if missing:
        found = f"no such folder: {', '.join(missing)}"
        return Check(EXTENSION_VARIABLE, "warning", found, f"Take it out of {EXTENSION_VARIABLE}; nnU-Net skips it.")
    return Check(EXTENSION_VARIABLE, "ok", value)


def check_folder(variable: str) -> Check:
    """One of nnU-Net's three folders is set, exists and can be written to."""
    try:
        path = require_nnunet_path(variable)
    except EnvironmentProblem as problem:
        found, _, fix = str(problem).removeprefix(f"{variable} ").partition(" Run: ")
        return Check(variable, "error", found, f"Run: {fix}" if fix else f"Run: export {variable}=/full/path")
    if os.access(path, os.W_OK | os.X_OK):
        return Check(variable, "ok", str(path))
    if variable == "nnUNet_raw":  # often a read-only share, which is fine for planning and training
        return Check(variable, "warning", f"{path} is not writable", "Only `nnunet_multimodal convert` writes there.")
    return Check(variable, "error", f"{path} is not writable", f"Run: chmod u+wx {path}, or choose another folder")


def check_nnunet_version() -> Check:
    """nnU-Net is there; another version than the tested one is a warning, because the hooks are checked themselves."""
    version = _version("nnunetv2")
    if version is None:
        return Check("nnunetv2", "error", "not installed", f'Run: pip install "{TESTED}"')
    if _major_minor(version) != (2, 8):
        return Check("nnunetv2", "warning", f"found {version}, tested with {TESTED}", f'Run: pip install "{TESTED}"')
    return Check("nnunetv2", "ok", version)


def check_torch_version() -> Check:
    version = _version("torch")
    if version is None:
        return Check("torch", "error", "not installed", "See https://pytorch.org for the command of your machine")
    if _major_minor(version) == (2, 9):
        found = f"found {version}: torch 2.9 is excluded by nnunetv2 (slow/oom 3D conv, pytorch#166122)."
        return Check("torch", "error", found, 'Run: pip install "torch!=2.9.*"')
    return Check("torch", "ok", version)


def check_import(what: str, check: Callable[[], Check]) -> Check:
    """Run a check that imports torch and nnU-Net; what they print is not ours to show, what they raise is a finding."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check()
    except Exception as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(what, "error", found, "Install the package and nnU-Net again (see README, Setup)")


def check_hooks() -> Check:
    """nnU-Net still calls its trainers the way ours are written."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    from nnunet_multimodal import trainers

    own = [getattr(trainers, name) for entry in TRAINERS.values() for name in entry.names]
    changed = changed_hooks(nnUNetTrainer, own)
    if changed:
        return Check("hooks", "error", "; ".join(changed), f'Run: pip install "{TESTED}"')
    return Check("hooks", "ok", "nnUNetTrainer's methods take the parameters that the trainers expect")


def changed_hooks(stock: type, own: Iterable[type]) -> list[str]:
    """Where the stock trainer breaks ``CONTRACT``, and where an override takes other parameters than its original."""
    changed = []
    for name, expected in CONTRACT.items():
        found = tuple(inspect.signature(getattr(stock, name)).parameters)
        if found != expected:
            changed.append(f"{stock.__name__}.{name} takes ({', '.join(found)}), expected ({', '.join(expected)})")
    classes = dict.fromkeys(part for trainer in own for part in trainer.__mro__ if part not in stock.__mro__)
    for owner in classes:
        for name in vars(owner):
            original, override = getattr(stock, name, None), getattr(owner, name)
            if not (inspect.isfunction(original) and inspect.isfunction(override)):
                continue
            ours, theirs = inspect.signature(override).parameters, inspect.signature(original).parameters
            takes_anything = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in ours.values())
            # nnU-Net calls its static methods on the instance, so an override may be an ordinary method.
            if not takes_anything and [n for n in ours if n != "self"] != [n for n in theirs if n != "self"]:
                changed.append(
                    f"{stock.__name__}.{name} takes ({', '.join(theirs)}), "
                    f"{owner.__name__} overrides it with ({', '.join(ours)})"
                )
    return changed


def check_trainers() -> Check:
    """nnU-Net's own finder resolves every trainer, ablation and a length."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    names = [name for entry in TRAINERS.values() for name in (*entry.names, f"{entry.name}_50epochs")]
    missing = []
    for name in names:
        try:
            recursive_find_trainer_class_by_name(name)
        except RuntimeError:  # the finder's "not found"; whatever a broken module raises goes up and is shown
            missing.append(name)
    if missing:
        found = f"nnU-Net does not find {missing[0]}" + (f" and {len(missing) - 1} others" if missing[1:] else "")
        return Check("trainers", "error", found, f"Run: {export_line(guess_shell())}")
    return Check("trainers", "ok", f"nnU-Net finds {', '.join(TRAINERS)}, their ablations and lengths")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _major_minor(version: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None
