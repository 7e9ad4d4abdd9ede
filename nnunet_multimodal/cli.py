"""The command line: parse, validate, and only then let a command import torch.

Each command is a module in ``nnunet_multimodal/commands`` with ``add_arguments(parser)`` and ``run(args) -> int``, and
may define ``DESCRIPTION`` and ``EXAMPLE`` for its help. Only the module of the command that was asked for is imported.
Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 environment, 4 bad data, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from types import ModuleType

from nnunet_multimodal import __version__
from nnunet_multimodal.errors import MultimodalError, UsageError

PROGRAM = "nnunet_multimodal"

COMMANDS: dict[str, tuple[str, str]] = {
    "env": ("nnunet_multimodal.commands.env", "print the line that makes nnU-Net find the trainers"),
    "doctor": ("nnunet_multimodal.commands.doctor", "check the installation or a data set, and say what to type"),
    "list": ("nnunet_multimodal.commands.list", "show the trainers, their papers and the data sets they need"),
    "demo": ("nnunet_multimodal.commands.demo", "show it all on made-up patients, in minutes and without data"),
    "convert": ("nnunet_multimodal.commands.convert", "make the data set that a trainer needs"),
    "phantom": ("nnunet_multimodal.commands.phantom", "write made-up abdomens in several MR contrasts and CT"),
    "scribbles": ("nnunet_multimodal.commands.scribbles", "make a data set of scribbles, or simulate scribbles"),
    "embed": ("nnunet_multimodal.commands.embed", "make the text embeddings of a data set of mixed modalities"),
    "predict": ("nnunet_multimodal.commands.predict", "predict images, told or finding out of which modality they are"),
    "refer": ("nnunet_multimodal.commands.refer", "segment an image by a scribbled reference image"),
    "relabel": ("nnunet_multimodal.commands.relabel", "grow labels in cycles: propose, correct, accept, retrain"),
    "adapt": ("nnunet_multimodal.commands.adapt", "adapt a trained model to another modality by few parameters"),
    "evaluate": ("nnunet_multimodal.commands.evaluate", "measure predictions per case, organ and modality"),
}

EXAMPLE = """\
eval "$(nnunet_multimodal env)"
nnunet_multimodal doctor
nnunet_multimodal list"""

_DEBUG_HELP = "show the traceback of an error"

# What the file system, not the user's data, has against us; anything else of the kind is a bug or a bad path.
_CANNOT_WRITE = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTDIR}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples; wide enough for each option to stand beside its help."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors become one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Taken out by hand: it then works in any place, also behind a subcommand's own, and when parsing itself fails.
    arguments = [word for word in words if word != "--debug"]
    debug = len(arguments) < len(words)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without ✓ must not end us
    try:
        code = _run(arguments, debug)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug)
    except MultimodalError as error:
        return _fail(f"error: {error}", error.exit_code, debug)
    except BrokenPipeError:  # as in `nnunet_multimodal list | head -1`; nothing may be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in _CANNOT_WRITE:
            return _fail(f"error: {_describe(error)}", 1, debug)
        return _fail(_unexpected(error), 1, debug)
    except Exception as error:
        return _fail(_unexpected(error), 1, debug)


def _run(arguments: list[str], debug: bool) -> int:
    # The options before the command take no values, so the first word without a dash is the command.
    command = next((word for word in arguments if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown command '{command}'. {hint}Commands: {', '.join(COMMANDS)}.")
    parser, module = _build_parser(command)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has said what there is to say: 0 after --help, 2 after a wrong argument
        return stop.code if isinstance(stop.code, int) else 2
    if module is None:
        parser.print_help(sys.stderr)
        return 2
    args.debug = debug
    code: int = module.run(args)
    return code


def _build_parser(command: str | None) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """The parser with all commands by name, of which only the chosen one is imported and knows its arguments."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Multi-modal segmentation on top of the stock nnU-Net v2 pipeline.",
        epilog=_epilog(EXAMPLE),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)  # for the help; main() has taken it out
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    chosen = None
    for name, (module_name, summary) in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=summary)
            continue
        chosen = importlib.import_module(module_name)
        subparser = commands.add_parser(
            name,
            help=summary,
            description=getattr(chosen, "DESCRIPTION", f"{summary[0].upper()}{summary[1:]}."),
            epilog=_epilog(getattr(chosen, "EXAMPLE", f"{PROGRAM} {name} --help")),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        subparser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
        chosen.add_arguments(subparser)
    return parser, chosen


def _epilog(example: str) -> str:
    return "example:\n" + textwrap.indent(textwrap.dedent(example).strip(), "  ")


def _fail(message: str, code: int, debug: bool) -> int:
    """Say it on stderr, after the traceback if that was asked for."""
    if debug:
        traceback.print_exc()
    print(message, file=sys.stderr)
    return code


def _describe(error: OSError) -> str:
    """``cannot write P: No space left on device``; a failed write to an open file knows no P."""
    path = error.filename2 or error.filename
    if path is None:
        return f"cannot write: {error.strerror}"
    unreadable = error.errno == errno.EACCES and os.path.isfile(path) and not os.access(path, os.R_OK)
    return f"cannot {'read' if unreadable else 'write'} {os.fsdecode(path)}: {error.strerror}"


def _unexpected(error: Exception) -> str:
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"unexpected error: {what}; rerun with --debug and report it"


if __name__ == "__main__":
    sys.exit(main())
