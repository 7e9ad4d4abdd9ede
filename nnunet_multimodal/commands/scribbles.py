"""``nnunet_multimodal scribbles``: scribbles simulated inside label maps, as files to train, test or look at."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunet_multimodal.commands import scribbles_import
from nnunet_multimodal.commands.convert import add_kind, natural_number
from nnunet_multimodal.errors import DataProblem, UsageError

DESCRIPTION = """\
simulate: draw a scribble inside each organ of label maps, slice by slice across the coarsest axis.
The files are label maps on the same grid: 0 none, k organ k. How much of each organ is covered is printed and written
to coverage.json. A file that cannot be read is reported, the others are done, and the command ends with 1."""

EXAMPLE = """\
nnunet_multimodal scribbles simulate --labels labelsTr -o scribbles --every 3
nnunet_multimodal scribbles simulate --labels case_01.nii.gz -o scribbles --organs 1 4 --seed 7"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    scribbles_import.add_arguments(
        add_kind(actions, "import", scribbles_import.WHAT, scribbles_import.DESCRIPTION, scribbles_import.EXAMPLE)
    )
    simulate = actions.add_parser("simulate", help="draw scribbles inside label maps", allow_abbrev=False)
    simulate.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    simulate.add_argument("--labels", type=Path, required=True, metavar="PATH", help="a label map, or a folder of them")
    simulate.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the scribbles go")
    simulate.add_argument("--every", type=int, default=1, metavar="N", help="draw on every n-th slice of an organ")
    simulate.add_argument("--seed", type=natural_number, default=0, help="same seed, same scribbles (%(default)s)")
    simulate.add_argument(
        "--organs", type=natural_number, nargs="+", metavar="ID", help="which labels (default: all that are found)"
    )
    simulate.add_argument("--style", choices=("freeform",), default="freeform", help="of the strokes (%(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.action == "import":
        return scribbles_import.run(args)
    from tqdm import tqdm

    from nnunet_multimodal.conversion.dataset import find_files, write_json

    if args.every < 1:
        raise UsageError(f"--every counts slices and must be at least 1, found {args.every}.")
    if args.organs is not None and 0 in args.organs:
        raise UsageError("--organs names labels from 1 on; 0 is background.")
    if args.labels.is_dir():
        paths = [*find_files(args.labels, "label").values()]
    else:
        paths = [args.labels]
    _refuse_own_input(paths, args.output)

    args.output.mkdir(parents=True, exist_ok=True)
    shares: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for path in tqdm(paths, desc="drawing scribbles", unit="file", disable=None):
        try:
            name, shares_of_file = _simulate_file(path, args)
        except DataProblem as problem:
            failed[str(path)] = str(problem)
            continue
        shares[name] = shares_of_file
    settings = {"seed": args.seed, "every": args.every, "style": args.style}
    write_json(args.output / "coverage.json", {"coverage": shares, "failed": failed, **settings})
    _print(shares, failed)
    if failed and not shares:
        return DataProblem.exit_code
    return 1 if failed else 0


def _refuse_own_input(paths: Sequence[Path], output: Path) -> None:
    """Scribbles have the name of their label map: in the same folder they would replace it."""
    for path in paths:
        if path.parent.resolve() == output.resolve():
            raise UsageError(f"{output} holds {path.name}, which would be overwritten. Take another folder.")


def _simulate_file(path: Path, args: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Write the scribbles of one file; the file's case id and the share of each organ that is covered."""
    import numpy as np

    from nnunet_multimodal.conversion.crossmr import draw_scribbles
    from nnunet_multimodal.conversion.dataset import FILE_ENDING, case_id
    from nnunet_multimodal.conversion.images import check_label_values, read_labels, write_like
    from nnunet_multimodal.data.scribbles import coverage

    volume = read_labels(path)
    values = np.unique(volume.data)
    check_label_values(volume, {int(value) for value in values if value >= 0 and value == np.rint(value)} | {0})
    organs = args.organs or [int(value) for value in values if value > 0]
    if not np.isin(organs, values).any():
        wanted = f", wanted {', '.join(map(str, organs))}" if organs else ""
        found = ", ".join(f"{value:g}" for value in values[:10])
        raise DataProblem(f"{path} has nothing to scribble on: found {found}{wanted}.")
    drawn = draw_scribbles(volume, organs, args.seed, case_id(path), args.every)
    kind = np.uint8 if max(organs) < 256 else np.uint16
    write_like(args.output / f"{case_id(path)}{FILE_ENDING}", drawn.astype(kind), volume)
    shares = coverage(drawn, volume.data, organs)
    return case_id(path), {str(organ): round(share, 4) for organ, share in shares.items()}


def _print(shares: dict[str, dict[str, float]], failed: dict[str, str]) -> None:
    for name, of_file in shares.items():
        print(f"{name}: " + ", ".join(f"{organ} {share:.1%}" for organ, share in of_file.items()))
    for problem in failed.values():
        print(f"failed: {problem}", file=sys.stderr)
