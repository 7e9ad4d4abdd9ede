"""What the scripts that make one data set of CT and MR share: their arguments, the balance, the last step."""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from nnunet_multimodal.commands.convert import add_repairs, repairs_of
from nnunet_multimodal.conversion.dataset import FILE_ENDING, CaseFiles, require_free
from nnunet_multimodal.conversion.harmonise import METHODS
from nnunet_multimodal.conversion.mixed import Source, convert_mixed
from nnunet_multimodal.conversion.script import WriteCase, write_cases
from nnunet_multimodal.environment import require_nnunet_path
from nnunet_multimodal.errors import DataProblem, UsageError

Case = TypeVar("Case")

ONE_ROOT = {"root": "the unpacked data set"}


def make_mixed_parser(
    description: str | None, default_name: str, roots: Mapping[str, str] = ONE_ROOT, output: bool = True
) -> argparse.ArgumentParser:
    """A parser with the arguments that all these scripts have.

    Args:
        description: the script's docstring.
        default_name: of the data set.
        roots: positional folders and their help.
        output: whether images or labels have to be rewritten, into a folder that goes on where it stopped.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    for root, what in roots.items():
        parser.add_argument(root, type=Path, help=what)
    parser.set_defaults(roots=[*roots])
    if output:
        parser.add_argument("-o", "--output", type=Path, required=True, help="gets images/ and labels/ as NIfTI")
    parser.add_argument("-d", "--dataset-id", type=int, required=True, metavar="ID", help="of the data set, 1 to 999")
    parser.add_argument("--name", default=default_name, help="of the data set (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set of this id")
    parser.add_argument("--harmonise", choices=METHODS, help="store the images on one scale of intensities")
    parser.add_argument(
        "--balance", type=positive_ratio, metavar="RATIO", help="as many cases as there can be with RATIO CT per MR"
    )
    parser.add_argument("--seed", type=int, default=0, help="which cases --balance takes (default: %(default)s)")
    parser.add_argument(
        "--strict", action="store_true", help="an image that does not look like its modality is an error"
    )
    add_repairs(parser)
    return parser


def positive_ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not (math.isfinite(ratio) and ratio > 0):
        raise argparse.ArgumentTypeError(f"expected CT cases per MR case such as 1 or 2.5, found {text!r}")
    return ratio


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, once it is clear that the data set can be made: reading may take hours."""
    args = parser.parse_args(argv)
    for root in args.roots:
        if not getattr(args, root).is_dir():
            raise UsageError(f"No such folder: {getattr(args, root)}")
    require_free(require_nnunet_path("nnUNet_raw"), args.dataset_id, args.name, args.overwrite)
    return args


def choose_cases(args: argparse.Namespace, found: Mapping[str, Mapping[str, Case]]) -> dict[str, dict[str, Case]]:
    """The cases of each modality, after ``--balance``.

    Args:
        args: balance, seed, and the folders for the message.
        found: modality -> case -> whatever stands for it.

    Raises:
        DataProblem: a modality has no case.
    """
    cases = {modality: dict(sorted(of.items())) for modality, of in found.items()}
    _require_all(cases, "found in " + " and ".join(str(getattr(args, root)) for root in args.roots))
    if args.balance is not None:
        ratio = args.balance
        pairs = min(len(cases["MR"]), int(len(cases["CT"]) / ratio + 1e-9))
        count = {"CT": round(pairs * ratio), "MR": pairs}
        if not all(count.values()):
            raise UsageError(
                f"--balance {ratio:g} leaves no case of {len(cases['CT'])} CT and {len(cases['MR'])} MR cases; "
                "take a ratio nearer to theirs."
            )
        cases = {modality: _draw(of, count[modality], args.seed) for modality, of in cases.items()}
    print("chosen: " + " and ".join(f"{len(of)} {modality} cases" for modality, of in cases.items()))
    return cases


def _draw(cases: Mapping[str, Case], count: int, seed: int) -> dict[str, Case]:
    chosen = set(random.Random(seed).sample(sorted(cases), count))
    return {case: value for case, value in cases.items() if case in chosen}


def _require_all(cases: Mapping[str, Mapping[str, object]], where: str) -> None:
    if not all(cases.values()):
        counts = " and ".join(f"{len(of)} {modality}" for modality, of in cases.items())
        raise DataProblem(
            f"{counts} cases {where}; a mixed data set needs both. "
            "Expected the files and folders that this script's --help shows."
        )


def write_and_convert(
    args: argparse.Namespace,
    found: Mapping[str, Mapping[str, WriteCase]],
    labels: Mapping[str, Mapping[str, int]],
    settings: Mapping[str, object],
    wanted: Mapping[str, int] | None = None,
    patients: Mapping[str, str] | None = None,
    keep: Callable[[CaseFiles], bool] | None = None,
) -> int:
    """Write the cases into ``--output``, then make the data set of those that could be read; the exit code.

    Args:
        args: of the script.
        found: modality -> case -> what writes its image and label; case ids differ between the modalities too.
        labels: modality -> organ -> id in the labels that are written.
        settings: what the written files depend on.
        wanted: organ -> id in the data set; None takes the organs that the modalities have in common.
        patients: case -> patient.
        keep: which of the written cases go into the data set; None is all.
    """
    cases = choose_cases(args, found)
    everything = {case: write for of in cases.values() for case, write in of.items()}
    failed = write_cases(args.output, everything, settings, args.name)
    sources = []
    for modality, of in cases.items():
        files = [
            CaseFiles(case, *(args.output / part / f"{case}{FILE_ENDING}" for part in ("images", "labels")))
            for case in of
            if case not in failed
        ]
        kept = [one for one in files if keep is None or keep(one)]
        if len(kept) < len(files):
            print(f"left out: {len(files) - len(kept)} {modality} cases without a labelled voxel")
        known = {one.case: patients[one.case] for one in kept} if patients else {}
        sources.append(Source(modality, kept, labels[modality], known))
    _require_all({source.modality: {one.case: one for one in source.cases} for source in sources}, "can be read")
    return convert_sources(args, sources, wanted) or (1 if failed else 0)


def convert_sources(args: argparse.Namespace, sources: Sequence[Source], wanted: Mapping[str, int] | None) -> int:
    """Make the data set and say how to go on; the exit code."""
    folder = convert_mixed(
        sources,
        args.dataset_id,
        args.name,
        wanted,
        harmonise=args.harmonise,
        repairs=repairs_of(args),
        overwrite=args.overwrite,
        strict=args.strict,
    )
    print(folder)
    print(f"Next: nnUNetv2_plan_and_preprocess -d {args.dataset_id} -c 3d_fullres --verify_dataset_integrity")
    print(f"      nnUNetv2_train {args.dataset_id} 3d_fullres 0 -tr nnUNetTrainerMulModSeg")
    return 0
