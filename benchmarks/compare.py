"""Rerun a comparison: methods x seeds on a phantom, by the commands a user types.

    python benchmarks/compare.py phantom_table1 --work DIR --seeds 0 1 2 --jobs 2
    python benchmarks/compare.py phantom_table6 --work DIR --only-table
    python benchmarks/compare.py cardiac_scribble --work DIR

There are five kinds: trained on one contrast and tested on all (comparisons.py, compare_contrasts.py), trained on
unpaired modalities and tested in each (comparisons_mixed.py, compare_mixed.py), trained from real scribbles
(comparisons_scribbles.py, compare_scribbles.py), or from simulated ones on registered pairs (comparisons_paired.py,
compare_paired.py), and a model of one modality adapted to another (comparisons_adapt.py, compare_adapt.py); the
folders of the latter three differ a little. Makes the phantom, converts it for
each kind of trainer, plans and preprocesses, trains (train_one.py), predicts every contrast of the test subjects,
evaluates, and writes benchmarks/results/NAME.json and NAME.md. What is finished is not done again; an interrupted
training goes on from its latest checkpoint. Below DIR:

    phantom/  train/  truth/SUBJECT/CONTRAST.nii.gz  inputs/  nnUNet_raw/  nnUNet_preprocessed/
    results/seed_0/          the nnUNet_results of that seed
    pred/METHOD/seed_0/SUBJECT/CONTRAST.nii.gz
    scores/METHOD/seed_0/    what `nnunet_multimodal evaluate` says
    logs/METHOD_seed_0.log
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import compare_adapt
import compare_contrasts
import compare_mixed
import compare_paired
import compare_scribbles
from compare_runner import Workshop, run_units, stop_all
from comparisons import COMPARISONS, Comparison
from comparisons_adapt import ADAPT_COMPARISONS, AdaptComparison
from comparisons_mixed import MIXED_COMPARISONS, MixedComparison
from comparisons_paired import PAIRED_COMPARISONS, PairedComparison
from comparisons_scribbles import SCRIBBLE_COMPARISONS, ScribbleComparison
from main_job import set_environment

ALL: dict[str, Comparison | MixedComparison | ScribbleComparison | AdaptComparison] = {
    **COMPARISONS,
    **MIXED_COMPARISONS,
    **SCRIBBLE_COMPARISONS,
    **PAIRED_COMPARISONS,
    **ADAPT_COMPARISONS,
}
KINDS: dict[type, tuple[Any, type[Workshop]]] = {
    Comparison: (compare_contrasts, Workshop),
    MixedComparison: (compare_mixed, Workshop),
    ScribbleComparison: (compare_scribbles, compare_scribbles.ScribbleWorkshop),
    PairedComparison: (compare_paired, compare_paired.PairedWorkshop),
    AdaptComparison: (compare_adapt, compare_adapt.AdaptWorkshop),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ALL)
    parser.add_argument("--work", type=Path, help="where it is worked on (default: ./NAME)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all of the comparison")
    parser.add_argument("-device", "--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many trainings at a time")
    parser.add_argument("--epochs", type=int, metavar="N", help="of every method that has no length of its own")
    parser.add_argument("--workers", type=int, help="processes for augmentation (default: 0 on a CPU, 8 on a GPU)")
    parser.add_argument("--phantom", type=Path, metavar="DIR", help="use this one instead of making one")
    parser.add_argument(
        "--results", type=Path, default=common.RESULTS, metavar="DIR", help="where NAME.json and .md go"
    )
    parser.add_argument("--only-data", action="store_true", help="stop before the first training")
    parser.add_argument("--only-table", action="store_true", help="of what is finished; runs nothing")
    args = parser.parse_args(argv)

    comparison = ALL[args.name]
    if args.epochs is not None:
        comparison = replace(comparison, train_options={**comparison.train_options, "num_epochs": args.epochs})
    kind, workshop = KINDS[type(comparison)]
    methods = args.methods or list(comparison.methods)
    unknown = [name for name in methods if name not in comparison.methods]
    if unknown:
        parser.error(f"unknown method {unknown[0]}; there are: {', '.join(comparison.methods)}")
    work = (args.work or Path(args.name)).resolve()
    workers = args.workers if args.workers is not None else (0 if args.device == "cpu" else 8)
    shop = workshop(comparison, work, args.device, workers)
    common.RESULTS = args.results
    failed: list[str] = []
    if not args.only_table:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
        set_environment(work)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends the trainings, too
        try:
            kind.prepare(shop, methods, args.phantom)
            if args.only_data:
                return 0
            units = [(name, seed) for seed in args.seeds for name in methods]
            failed = run_units(shop, units, args.jobs, kind.STEPS)
        except KeyboardInterrupt:
            stop_all()
            print("interrupted; the same command goes on", file=sys.stderr)
            return 130
    # All seeds that are there, whatever was asked for this time.
    seeds = sorted({int(path.name.removeprefix("seed_")) for path in work.glob("results/seed_*")})
    kind.write_table(shop, args.name, seeds, list(comparison.methods))
    if failed:
        print(f"{len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
