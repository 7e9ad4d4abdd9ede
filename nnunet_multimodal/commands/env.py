"""``nnunet_multimodal env``: the line that points nnUNet_extTrainer at the extension folder."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from nnunet_multimodal.environment import EXTENSION_VARIABLE, extension_value

DESCRIPTION = """\
Print the line that makes nnU-Net find the trainers, for the shell to evaluate.
Other folders in nnUNet_extTrainer are kept. Put the line below into your shell's start file to have it always;
fish: nnunet_multimodal env --shell fish | source
PowerShell: nnunet_multimodal env --shell powershell | Invoke-Expression"""

EXAMPLE = 'eval "$(nnunet_multimodal env)"'

SHELLS = ("bash", "zsh", "fish", "powershell")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shell", choices=SHELLS, help="whose syntax to print (default: guessed from $SHELL, or bash)")


def run(args: argparse.Namespace) -> int:
    print(export_line(args.shell or guess_shell()))
    return 0


def guess_shell() -> str:
    """The user's login shell if we know its syntax, else bash."""
    name = Path(os.environ.get("SHELL", "")).stem
    if name == "pwsh":
        return "powershell"
    return name if name in SHELLS else "bash"


def export_line(shell: str) -> str:
    """The statement, quoted so that the shell gets the value whatever characters the path holds."""
    value = extension_value()
    if shell == "fish":
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -gx {EXTENSION_VARIABLE} '{escaped}'"
    if shell == "powershell":
        escaped = value.replace("'", "''")
        return f"$env:{EXTENSION_VARIABLE} = '{escaped}'"
    return f"export {EXTENSION_VARIABLE}={shlex.quote(value)}"
