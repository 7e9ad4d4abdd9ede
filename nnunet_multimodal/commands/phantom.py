"""``nnunet_multimodal phantom``: the same made-up patients in several MR contrasts and CT."""

from __future__ import annotations

import argparse
import difflib
import math
from pathlib import Path

from nnunet_multimodal.commands.convert import natural_number
from nnunet_multimodal.errors import UsageError

DESCRIPTION = """\
Write a data set of made-up abdomens, each seen in several contrasts: liver, kidneys and spleen among fat, muscle,
bones, vessels and bowel, different in every subject. Contrasts are computed from published T1, T2, diffusion, fat and
HU values by the signal equations of the sequences; each session has its own position, grid, coil and noise.

Contrasts: T1w T2w DWI InPhase OpposedPhase CT. More organs: stomach gallbladder pancreas aorta lesion (lesions are only
there if they are asked for).

OUT/images/CONTRAST/phantom_000.nii.gz, OUT/labels/CONTRAST/phantom_000.nii.gz, OUT/phantom.json. The same seed and
options give the same bytes on the same machine; files that are there already are kept."""

EXAMPLE = """\
nnunet_multimodal phantom PHANTOM --subjects 20 --contrasts T1w T2w DWI InPhase OpposedPhase CT
nnunet_multimodal phantom SMALL --subjects 4 --contrasts T1w,T2w --spacing 4 4 12 --organs stomach lesion"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of the data set")
    what = parser.add_argument_group("what")
    what.add_argument("--subjects", type=natural_number, default=20, metavar="N", help="how many (%(default)s)")
    what.add_argument("--contrasts", nargs="+", default=None, metavar="NAME", help="default: all that are known")
    what.add_argument("--organs", nargs="+", default=[], metavar="NAME", help="label these, too (see below)")
    what.add_argument("--seed", type=natural_number, default=0, help="same seed, same subjects (%(default)s)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--spacing", type=float, nargs=3, default=(1.6, 1.6, 6.0), metavar=("X", "Y", "Z"),
        help="mm of a T1w voxel; other contrasts are a little finer or coarser (1.6 1.6 6)",
    )  # fmt: skip
    how.add_argument(
        "--size", type=natural_number, nargs=3, metavar=("X", "Y", "Z"), help="voxels of T1w (default: the whole body)"
    )
    how.add_argument("--noise", type=float, default=1.0, metavar="F", help="times the usual noise, 0 for none")
    how.add_argument("--motion", type=float, default=1.0, metavar="F", help="times the usual motion between contrasts")
    how.add_argument(
        "--same-grid",
        action="store_true",
        help="all contrasts in one position on the grid of T1w, as registered images are (for CmFNet)",
    )
    how.add_argument("-j", "--processes", type=natural_number, default=2, metavar="N", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Checks the options against what is there, then writes."""
    from tqdm import tqdm

    from nnunet_multimodal.data.phantom import CONTRASTS, EXTRA_ORGANS, PhantomOptions, write_phantom
    from nnunet_multimodal.data.phantom.write import BODY, json_options, read_description

    contrasts = _known(args.contrasts, tuple(CONTRASTS), "contrast") if args.contrasts else tuple(CONTRASTS)
    organs = _known(args.organs, EXTRA_ORGANS, "organ")
    for name, values in (("--spacing", args.spacing), ("--noise", [args.noise]), ("--motion", [args.motion])):
        low = 0.2 if name == "--spacing" else 0.0
        if not all(math.isfinite(v) and v >= low for v in values):
            raise UsageError(f"{name} {' '.join(map(str, values))}: expected numbers of {low:g} or more.")
    for name, value in (("--subjects", args.subjects), *(("--size", n) for n in args.size or ())):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, found {value}.")
    extent = tuple(n * s for n, s in zip(args.size, args.spacing)) if args.size else BODY
    options = PhantomOptions(
        contrasts, args.seed, tuple(args.spacing), extent, args.noise, args.motion, organs, args.same_grid
    )

    if args.output.exists() and not args.output.is_dir():
        raise UsageError(f"{args.output} is a file; name a folder for the data set.")
    before = read_description(args.output)
    if before is None and args.output.exists() and any(args.output.iterdir()):
        raise UsageError(f"{args.output} is not empty and holds no phantom.json; choose an empty folder.")
    if before is not None:
        expected = {"same_grid": None, **json_options(options)}  # an option that is only there if it is used
        differing = [key for key, value in expected.items() if before.get(key) != value]
        if differing:
            found = ", ".join(f"{key} {before.get(key)}" for key in differing)
            raise UsageError(f"{args.output} holds a phantom of other options ({found}); choose another folder.")
    with tqdm(total=args.subjects, unit="subject", disable=None) as bar:
        for _ in write_phantom(args.output, args.subjects, options, args.processes):
            bar.update()
    print(f"{args.subjects} subjects in {', '.join(contrasts)}: {args.output}")
    print(f"labels: {', '.join(f'{name}={number}' for name, number in options.labels.items())}")
    return 0


def _known(words: list[str], known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """The names in the words, which may also be separated by commas; each once, in their order."""
    names = [name for word in words for name in word.split(",") if name]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"unknown {what} '{name}'.{hint} Known: {', '.join(known)}.")
    if words and not names:
        raise UsageError(f"no {what} is named in '{' '.join(words)}'. Known: {', '.join(known)}.")
    return tuple(dict.fromkeys(names))
