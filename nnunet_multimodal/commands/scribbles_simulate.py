"""``nnunet_multimodal scribbles simulate``: scribbles drawn inside label maps, as files or at once as a data set."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_multimodal.commands.convert import add_repairs, natural_number, repairs_of
from nnunet_multimodal.commands.scribbles_import import (
    add_checks,
    add_class_names,
    add_dataset_arguments,
    class_names_of,
    named_folders,
    print_report,
)
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import DataProblem, UsageError

if TYPE_CHECKING:
    from nnunet_multimodal.conversion.simulated import Drawing

WHAT = "draw scribbles inside label maps"

DESCRIPTION = """\
Draw a scribble inside each organ of label maps, slice by slice across the coarsest axis.

style       freeform: a few wandering strokes (SEEM's); skeleton: one stroke through the middle (WSL4MIS's, used for
            WORD); contour: a broken line inside the border (as ScribblePrompt's)
background  none; drawn: strokes of that style near the organs; erode: the skeleton of what is outside of them, which
            costs nobody any work

The files are label maps on the same grid. Without background: 0 none, k organ k. With it: 0 background, k organ k, 255
where nobody drew, as `scribbles import --unlabelled 255` takes them. With -d and --images that is done at once, and the
label maps are kept beside the data set as dense labels. How much of each organ is covered is printed and written to
coverage.json. A file that cannot be read is reported, the others are done, and the command ends with 1."""

EXAMPLE = """\
nnunet_multimodal scribbles simulate --labels labelsTr -o scribbles --every 3
nnunet_multimodal scribbles simulate --labels case_01.nii.gz -o scribbles --organs 1 4 --seed 7
nnunet_multimodal scribbles simulate --labels labels --images FLAIR=images T1c=images -d 604 --style skeleton \\
    --label-names tumour=1,2,3,4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--labels", type=Path, required=True, metavar="PATH", help="a label map, or a folder of them")
    data.add_argument(
        "--organs", type=natural_number, nargs="+", metavar="ID", help="which labels (default: all found)"
    )
    add_class_names(data)
    data.add_argument("--images", nargs="+", metavar="[NAME=]DIR", help="for -d and --within-body: of each channel")
    drawn = parser.add_argument_group("scribbles")
    drawn.add_argument("-o", "--output", type=Path, metavar="DIR", help="where the scribbles go")
    drawn.add_argument(
        "--style",
        choices=("freeform", "skeleton", "contour"),  # data.scribbles.STYLES, which takes numpy to import
        default="freeform",
        help="of the strokes (%(default)s)",
    )
    drawn.add_argument(
        "--background", choices=("none", "drawn", "erode"), help="(default: none, or drawn where -d makes a data set)"
    )
    drawn.add_argument("--within-body", action="store_true", help="no background scribbles in the air of --images")
    drawn.add_argument("--every", type=int, default=1, metavar="N", help="draw on every n-th slice of an organ")
    drawn.add_argument("--seed", type=natural_number, default=0, help="same seed, same scribbles (%(default)s)")
    add_dataset_arguments(parser, "Simulated", required=False)
    add_checks(parser, drawn_by_hand=False)
    add_repairs(parser)


def run(args: argparse.Namespace) -> int:
    _check_usage(args)
    if args.dataset_id is not None:
        require_nnunet_path("nnUNet_raw")  # before the imports, which take a second
    from nnunet_multimodal.conversion.dataset import find_files
    from nnunet_multimodal.conversion.simulated import Drawing

    background = args.background or ("none" if args.dataset_id is None else "drawn")
    drawing = Drawing(args.style, background, args.every, args.seed)
    if args.labels.is_dir():
        paths = [*find_files(args.labels, "label").values()]
    else:
        paths = [args.labels]
    return _run_files(args, paths, drawing) if args.dataset_id is None else _run_dataset(args, paths, drawing)


def _check_usage(args: argparse.Namespace) -> None:
    if args.every < 1:
        raise UsageError(f"--every counts slices and must be at least 1, found {args.every}.")
    if args.organs is not None and 0 in args.organs:
        raise UsageError("--organs names labels from 1 on; 0 is background.")
    if args.organs is not None and (args.label_names or args.labels_json):
        raise UsageError("--organs and label names both say which labels are drawn; give one of them.")
    if args.output is None and args.dataset_id is None:
        raise UsageError("Where to? Give a folder for the scribbles (-o), or -d and --images for a data set.")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise UsageError(f"-o {args.output} is a file, expected a folder for the scribbles.")
    if args.images is None and (args.dataset_id is not None or args.within_body):
        raise UsageError(f"{'-d' if args.dataset_id is not None else '--within-body'} needs --images, too.")
    if args.dataset_id is not None and not args.labels.is_dir():
        raise UsageError(f"-d needs a folder of label maps, found {args.labels}.")


def _run_files(args: argparse.Namespace, paths: Sequence[Path], drawing: Drawing) -> int:
    shares, failed = _simulate(args, paths, args.output, drawing)
    _print(shares, failed)
    if failed and not shares:
        return DataProblem.exit_code
    if shares and not any(share for of_file in shares.values() for organ, share in of_file.items() if organ != "0"):
        print("warning: no label map holds any of the labels; only background was drawn.", file=sys.stderr)
    if shares and drawing.background != "none":
        print(f"Next: nnunet_multimodal scribbles import --images DIR --scribbles {args.output} --unlabelled 255 -d ID")
    return 1 if failed else 0


def _run_dataset(args: argparse.Namespace, paths: Sequence[Path], drawing: Drawing) -> int:
    """The scribbles, and at once the data set of them; a label map that cannot be read stops it."""
    from nnunet_multimodal.conversion.dataset import numbered, require_free
    from nnunet_multimodal.conversion.scribble_dataset import find_scribbled_cases, import_scribbles
    from nnunet_multimodal.conversion.simulated import legend_of

    raw = require_nnunet_path("nnUNet_raw")
    require_free(raw, args.dataset_id, args.name, args.overwrite)
    folders = named_folders(args.images, args.channel_name, "--images")
    with _scribble_folder(args.output, raw) as output:
        _, failed = _simulate(args, paths, output, drawing)
        if failed:
            raise DataProblem(numbered("Nothing was made of them.", [*failed.values()]))
        folder, report = import_scribbles(
            find_scribbled_cases(folders, output, args.labels),
            [*folders],
            legend_of(drawing, _classes(args)),
            args.dataset_id,
            args.name,
            repairs=repairs_of(args),
            overwrite=args.overwrite,
            keep_empty=args.keep_empty,
            allow_unregistered=args.allow_unregistered,
            allow_outside_body=True,  # then the label map is outside, which is no slip of a pen
            strict=args.strict,
            source={
                "images": {name: str(path.resolve()) for name, path in folders.items()},
                "simulated_from": str(args.labels.resolve()),
                **vars(drawing),
            },
        )
    print_report(folder, report, args.dataset_id, [*folders])
    return 0


def _classes(args: argparse.Namespace) -> dict[str, tuple[int, ...]] | None:
    """Name -> values, without background and ignore; None takes what is found."""
    if args.organs is not None:
        return {f"class_{number}": (value,) for number, value in enumerate(sorted(set(args.organs)), start=1)}
    classes = class_names_of(args)
    return classes and {name: values for name, values in classes.items() if name not in ("background", "ignore")}


@contextlib.contextmanager
def _scribble_folder(output: Path | None, raw: Path) -> Iterator[Path]:
    """Where the scribble files go: what the user named, or a folder that goes when the data set has its own."""
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(dir=raw, prefix=".scribbles-") as folder:
        yield Path(folder)


def _simulate(
    args: argparse.Namespace, paths: Sequence[Path], output: Path, drawing: Drawing
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Write the scribbles of all files, and coverage.json; coverage by case and organ, problem by file."""
    from tqdm import tqdm

    from nnunet_multimodal.conversion.channel_files import find_channel_files
    from nnunet_multimodal.conversion.dataset import case_id, write_json
    from nnunet_multimodal.conversion.simulated import UNLABELLED, simulate_file

    _refuse_own_input(paths, output)
    classes = _classes(args)
    with_background = drawing.background != "none" or args.dataset_id is not None  # a data set judges by it, too
    unknown = (class_names_of(args) or {}).get("ignore", ()) if with_background else ()
    images = find_channel_files(named_folders(args.images, args.channel_name, "--images")) if args.within_body else None
    output.mkdir(parents=True, exist_ok=True)
    shares: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for path in tqdm(paths, desc="drawing scribbles", unit="file", disable=None):
        case = case_id(path)
        try:
            if images is not None and case not in images:
                raise DataProblem(f"{path} has no image of its name, so the body is not known.")
            body = images[case] if images else ()
            shares[case] = simulate_file(path, case, output, drawing, classes, body, unknown)
        except DataProblem as problem:
            failed[str(path)] = str(problem)
    unlabelled = {} if drawing.background == "none" else {"unlabelled": UNLABELLED}
    write_json(output / "coverage.json", {"coverage": shares, "failed": failed, **vars(drawing), **unlabelled})
    return shares, failed


def _refuse_own_input(paths: Sequence[Path], output: Path) -> None:
    """Scribbles have the name of their label map: in the same folder they would replace it."""
    for path in paths:
        if path.parent.resolve() == output.resolve():
            raise UsageError(f"{output} holds {path.name}, which would be overwritten. Take another folder.")


def _print(shares: dict[str, dict[str, float]], failed: dict[str, str]) -> None:
    for name, of_file in shares.items():
        print(f"{name}: " + ", ".join(f"{organ} {share:.1%}" for organ, share in of_file.items()))
    for problem in failed.values():
        print(f"failed: {problem}", file=sys.stderr)
