"""The trainers by name, each imported only when it is asked for.

nnU-Net's finder asks a module ``hasattr(module, name)``. Answering from the registry costs no import for the names of
others, and makes every length (``nnUNetTrainerCrossMR_50epochs``) available without a class being written for it.
Length classes live in this module, not in the shim that nnU-Net forgets after each lookup, so they can be pickled.
"""

from __future__ import annotations

import importlib
from typing import Any

from nnunet_multimodal.registry import TRAINERS, parse_trainer_name


def __getattr__(name: str) -> Any:
    parsed = parse_trainer_name(name)
    if parsed is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in globals():  # the shim borrows this function but not these globals: the same object as last time
        return globals()[name]
    entry, ablation, epochs = parsed
    base = _import_class(entry.module, f"{entry.name}_{ablation}" if ablation else entry.name)
    if epochs is None:
        return globals().setdefault(name, base)
    # __init__ stays the base's: nnU-Net reads its signature to store the arguments in the checkpoint.
    body = {"fixed_epochs": epochs, "__module__": __name__, "__doc__": f"{base.__name__}, {epochs} epochs long."}
    return globals().setdefault(name, type(name, (base,), body))


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for entry in TRAINERS.values() for name in entry.names)})


def _import_class(module: str, name: str) -> type:
    """Import a registered class. An AttributeError on the way would mean "no such trainer" to hasattr: rename it."""
    try:
        trainer: type = getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ImportError(f"{name} cannot be imported from {module}: {error}", name=module) from error
    return trainer
