"""What the scripts in ``dataset_conversion/`` share: they fill ``images/`` and ``labels/``, then call ``convert``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from nnunet_multimodal.conversion.dataset import FILE_ENDING, write_json
from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError

WriteCase = Callable[[Path, Path], None]  # (image file, label file) to write; the label last


def make_parser(description: str | None, default_name: str) -> argparse.ArgumentParser:
    """A parser with the arguments that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the unpacked data set")
    parser.add_argument("-o", "--output", type=Path, required=True, help="gets images/ and labels/ as NIfTI")
    parser.add_argument("-d", "--dataset-id", type=int, metavar="ID", help="also make a CrossMR data set of this id")
    parser.add_argument("--name", default=default_name, help="of that data set (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace that data set")
    return parser


def run_script(main: Callable[[], int]) -> None:
    """End the process as the ``nnunet_multimodal`` commands do: a message and an exit code instead of a traceback."""
    try:
        sys.exit(main())
    except MultimodalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def finish(args: argparse.Namespace, cases: Mapping[str, WriteCase], label_names: Mapping[str, int]) -> int:
    """Write all cases that are not there yet, and with ``-d`` convert them; the exit code.

    A case that cannot be read is reported and left out; the others are done.
    """
    if not cases:
        raise DataProblem(f"No case found in {args.root}. Expected the folders that this script's --help shows.")
    everywhere = {"output", "dataset_id", "name", "overwrite"}
    settings = {key: value for key, value in vars(args).items() if key not in everywhere}
    failed = write_cases(args.output, cases, settings, args.root.name)
    if len(failed) == len(cases):
        return DataProblem.exit_code
    if args.dataset_id is not None:
        code = _convert(args, args.output / "images", args.output / "labels", label_names)
        if code:
            return code
    return 1 if failed else 0


def match_template(root: Path, template: str) -> dict[str, Path]:
    """The files in a folder that a template such as ``{case}/T1.nii.gz`` fits, by case.

    Raises:
        UsageError: the template has no {case}.
        DataProblem: no file fits.
    """
    if "{case}" not in template:
        raise UsageError(f"The template {template!r} needs {{case}} where the name of the case stands.")
    head, *rest = map(re.escape, template.split("{case}"))
    pattern = re.compile(head + "(?P<case>[^/]+)" + "(?P=case)".join(rest))
    found = {}
    for path in sorted(root.glob(template.replace("{case}", "*"))):
        match = pattern.fullmatch(path.relative_to(root).as_posix())
        if match:
            found[match["case"]] = path
    if not found:
        raise DataProblem(f"No file in {root} fits {template!r}.")
    return found


def write_cases(output: Path, cases: Mapping[str, WriteCase], settings: Mapping[str, object], source: str) -> set[str]:
    """Fill ``output/images`` and ``output/labels`` with the cases that are not there yet.

    Args:
        output: gets the two folders, and source.json with the settings.
        cases: what to write.
        settings: what the files depend on; a folder made with others is refused.
        source: name of the data set, for the progress bar.

    Returns:
        The cases that could not be read; each is reported, and nothing of it is left.
    """
    _claim_output(output, settings)
    images, labels = output / "images", output / "labels"
    failed = {}
    for case, write in tqdm(cases.items(), desc=f"reading {source}", unit="case", disable=None):
        image, label = images / f"{case}{FILE_ENDING}", labels / f"{case}{FILE_ENDING}"
        if image.exists() and label.exists():
            continue
        for path in (image, label):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # half of a case, from a run that was interrupted
        try:
            write(image, label)
        except DataProblem as problem:
            failed[case] = str(problem)
            image.unlink(missing_ok=True)
    for case, problem_text in failed.items():
        print(f"failed: {case}: {problem_text}", file=sys.stderr)
    print(f"{len(cases) - len(failed)} of {len(cases)} cases in {output}")
    return set(failed)


def _claim_output(output: Path, settings: Mapping[str, object]) -> None:
    """Going on in a folder is right only for the same settings: two contrasts of a patient have the same case id."""
    content = {key: str(value) for key, value in sorted(settings.items())}
    record = output / "source.json"
    if record.exists():
        if json.loads(record.read_text(encoding="utf-8")) != content:
            raise UsageError(f"{output} was made with other settings ({record.name}). Take another folder.")
        return
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty. Take another folder.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(record, content)


def _convert(args: argparse.Namespace, images: Path, labels: Path, label_names: Mapping[str, int]) -> int:
    from nnunet_multimodal.cli import main

    names = [f"{name}={value}" for name, value in label_names.items()]
    arguments = ["--reference-images", str(images), "--labels", str(labels), "-d", str(args.dataset_id)]
    arguments += ["--name", args.name]
    if names:
        arguments += ["--label-names", *names]
    if args.overwrite:
        arguments.append("--overwrite")
    return main(["convert", "crossmr", *arguments])
