"""A trainer's settings: the paper's defaults, changed by the user in the plans (design.md, contract 2).

They live in ``plans["configurations"][configuration]["nnunet_multimodal"]``. The trainer fills the section up before
nnU-Net sees the plans, nnU-Net writes the plans into the result folder, and prediction builds the network from there.
"""

from __future__ import annotations

import difflib
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_multimodal.errors import UsageError

SECTION = "nnunet_multimodal"


def fill_settings(
    plans: dict, configuration: str, defaults: dict[str, Any], foreign: set[str], fixed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Defaults, overridden by the plans' section, written back into ``plans`` in place.

    Args:
        plans: nnU-Net plans.
        configuration: ``2d``, ``3d_fullres``, ...; a section of a configuration it inherits from counts.
        defaults: every key that the trainer knows.
        foreign: keys that belong to other trainers: the plans are shared, so they are left out, not refused.
        fixed: what makes an ablation one; the plans cannot undo it.

    Raises:
        UsageError: an unknown key, or a value of another type than the default.
    """
    known = PlansManager(plans).get_configuration(configuration).configuration.get(SECTION, {})
    where = f'plans["configurations"]["{configuration}"]["{SECTION}"]'
    settings = dict(defaults)
    for key, value in known.items():
        if key not in defaults:
            if key in foreign:
                continue
            close = difflib.get_close_matches(key, defaults, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{where}: unknown setting {key!r}.{hint} Known: {', '.join(sorted(defaults))}.")
        default = defaults[key]
        if not _fits(value, default):
            raise UsageError(f"{where}[{key!r}]: expected {_kind(default)}, found {value!r}.")
        settings[key] = value
    settings |= fixed or {}
    plans["configurations"][configuration][SECTION] = settings
    return settings


def read_settings(configuration: dict[str, Any]) -> dict[str, Any]:
    """The section of a configuration that a trainer has filled; all that prediction knows."""
    try:
        return configuration[SECTION]
    except KeyError:
        raise UsageError(
            f"the plans have no section {SECTION!r}: this is not the plans.json of a result folder that one of "
            "our trainers wrote."
        ) from None


def _fits(value: Any, default: Any) -> bool:
    if default is None or value is None:
        return default is None and (value is None or isinstance(value, str))
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def _kind(default: Any) -> str:
    return "a string or null" if default is None else f"{type(default).__name__} (default {default!r})"
