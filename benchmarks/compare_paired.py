"""Comparisons of kind four: trained from scribbles on registered pairs, judged on dense labels of other patients.

Below the work folder: pairs/{images/CHANNEL,labels}/CASE.nii.gz, inputs/seed_0/CASE_0000.nii.gz,
pred/METHOD/seed_0/CASE.nii.gz and, where one channel was taken away, pred/METHOD_without_CHANNEL.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import common
import numpy as np
from compare_runner import (
    DATASETS,
    Workshop,
    call,
    cell,
    devices_of,
    fresh,
    lines,
    make_phantom,
    mean_over,
    of_seeds,
    plan_and_preprocess,
    plans_name,
    records,
    say,
    settings_of,
    train,
    training_lines,
    write_plans,
)
from compare_scribbles import make_dense, real_images, share
from comparisons_paired import PairedComparison
from main_job import ENDING, link

# Name to title; "largest" keeps the largest component of each structure, as nnU-Net's post-processing may.
METRICS = {
    "DSC": "DSC",
    "ASD": "ASD, mm",
    "DSC_largest": "DSC of each structure's largest component",
    "ASD_largest": "ASD of each structure's largest component, mm",
}


@dataclass(frozen=True)
class PairedWorkshop(Workshop):
    """A workshop of pairs: the phantom's, or real ones of which each is left out once."""

    @property
    def organs(self) -> dict[str, int]:
        return dict(comparison_of(self).label_names)

    @property
    def subjects(self) -> tuple[list[str], list[str]]:
        """Names of those to train on and of those to test on; they are the same where each is left out once."""
        comparison = comparison_of(self)
        if not comparison.source:
            return super().subjects
        folder = real_images() / comparison.source / "labels"
        names = sorted(path.name.removesuffix(ENDING) for path in folder.iterdir())
        return names, names

    def tested(self, seed: int) -> list[str]:
        """Those that the training of this seed has not seen."""
        names = self.subjects[1]
        return [names[seed]] if comparison_of(self).source else names

    def fold_of(self, seed: int) -> str:
        """nnU-Net's fold that this seed trains."""
        return str(seed) if comparison_of(self).source else "all"


def comparison_of(shop: Workshop) -> PairedComparison:
    assert isinstance(shop.comparison, PairedComparison)
    return shop.comparison


# --- data ------------------------------------------------------------------------------------------------------------


def prepare(shop: Workshop, methods: Iterable[str], phantom: Path | None) -> None:
    """Everything before the first training."""
    assert isinstance(shop, PairedWorkshop)
    if comparison_of(shop).source:
        link_real(shop)
    else:
        make_phantom(shop, phantom)
        link_phantom(shop)
    make_inputs(shop)
    make_scribbles(shop)
    make_dense(shop)
    methods = list(methods)
    for kind in sorted({shop.comparison.methods[name].data for name in methods}):
        plan_and_preprocess(shop, kind, shop.work / "train/labels")
        unmask(shop, kind)
        if comparison_of(shop).source:
            leave_one_out(shop, kind)
    for name in methods:
        write_plans(shop, name)


def link_real(shop: PairedWorkshop) -> None:
    """Images by channel; one label for all of the tumour."""
    import nibabel as nib

    source = real_images() / comparison_of(shop).source
    for subject in shop.subjects[0]:
        for channel, end in comparison_of(shop).channels.items():
            link(source / f"images/{subject}_{end}{ENDING}", shop.work / f"pairs/images/{channel}/{subject}{ENDING}")
        target = shop.work / f"pairs/labels/{subject}{ENDING}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            label = nib.load(source / f"labels/{subject}{ENDING}")
            whole = (np.asarray(label.dataobj) > 0).astype(np.uint8)
            nib.save(nib.Nifti1Image(whole, label.affine), target)


def link_phantom(shop: Workshop) -> None:
    """The phantom's contrasts, all of them on one grid, and one label for them."""
    folder = shop.work / "phantom"
    for channel, contrast in comparison_of(shop).channels.items():
        for subject in [name for names in shop.subjects for name in names]:
            link(
                folder / f"images/{contrast}/{subject}{ENDING}", shop.work / f"pairs/images/{channel}/{subject}{ENDING}"
            )
            link(folder / f"labels/{contrast}/{subject}{ENDING}", shop.work / f"pairs/labels/{subject}{ENDING}")


def make_inputs(shop: PairedWorkshop) -> None:
    """The training's folders, and what each seed predicts."""
    trained, work = shop.subjects[0], shop.work
    for subject in trained:
        link(work / f"pairs/labels/{subject}{ENDING}", work / f"train/labels/{subject}{ENDING}")
    channels = list(comparison_of(shop).channels)
    for number, channel in enumerate(channels):
        for subject in trained:
            link(work / f"pairs/images/{channel}/{subject}{ENDING}", work / f"train/{channel}/{subject}{ENDING}")
        for subject in shop.subjects[1]:
            link(
                work / f"pairs/images/{channel}/{subject}{ENDING}",
                work / f"inputs/{subject}/{subject}_{number:04d}{ENDING}",
            )


def make_scribbles(shop: Workshop) -> None:
    """Simulated, by the command a user types."""
    (number, name), work, comparison = DATASETS["scribbles"], shop.work, comparison_of(shop)
    if not (work / f"nnUNet_raw/Dataset{number}_{name}").exists():
        names = [f"{organ}={value}" for organ, value in comparison.label_names.items()]
        images = [f"{channel}={work}/train/{channel}" for channel in comparison.channels]
        call("nnunet_multimodal", "scribbles", "simulate", "--labels", work / "train/labels", "--images", *images,
             "--style", comparison.style, "--background", comparison.background, "-d", number, "--name", name,
             "--label-names", *names)  # fmt: skip


def unmask(shop: Workshop, kind: str) -> None:
    """Where nnU-Net would normalise within a mask of the labels, it does so within the whole image instead."""
    number, name = DATASETS[kind]
    path = shop.work / f"nnUNet_preprocessed/Dataset{number}_{name}/nnUNetPlans.json"
    plans = json.loads(path.read_text(encoding="utf-8"))
    configuration = plans["configurations"]["2d"]
    if any(configuration["use_mask_for_norm"]):
        configuration["use_mask_for_norm"] = [False] * len(configuration["use_mask_for_norm"])
        path.write_text(json.dumps(plans, indent=4), encoding="utf-8")
        call("nnUNetv2_preprocess", "-d", number, "-c", "2d", "-np", "2")


def leave_one_out(shop: Workshop, kind: str) -> None:
    """nnU-Net's folds: each patient once."""
    number, name = DATASETS[kind]
    names = shop.subjects[0]
    splits = [{"train": [other for other in names if other != one], "val": [one]} for one in names]
    path = shop.work / f"nnUNet_preprocessed/Dataset{number}_{name}/splits_final.json"
    path.write_text(json.dumps(splits, indent=2), encoding="utf-8")


# --- after training --------------------------------------------------------------------------------------------------


def rows_of(comparison: PairedComparison, name: str) -> list[tuple[str | None, str]]:
    """What is missing in a prediction of this method, and what the row is called."""
    gone = comparison.channels if name in comparison.missing else ()
    return [(None, name), *((channel, f"{name}_without_{channel}") for channel in gone)]


def predict(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    assert isinstance(shop, PairedWorkshop)
    method = shop.comparison.methods[name]
    for gone, row in rows_of(comparison_of(shop), name):
        output = shop.predictions(row, seed)
        if output.exists():
            continue
        say(f"predict {row} seed {seed}")
        partial = fresh(output.with_name(f"{output.name}.partial"))
        begin = time.perf_counter()
        given = fresh(partial.with_name(f"{partial.name}_in"))
        for subject in shop.tested(seed):
            for path in (shop.work / f"inputs/{subject}").iterdir():
                link(path, given / path.name)
        missing: list[object] = [] if gone is None else ["--missing", gone]
        call("nnunet_multimodal", "predict", "-i", given, "-o", partial, "-d", DATASETS[method.data][0], "-c", "2d",
             "-tr", method.trainer, "-p", plans_name(name), "-f", shop.fold_of(seed), "--device", shop.device, *missing,
             log=log, nnUNet_results=str(shop.results(seed)))  # fmt: skip
        (partial / "seconds.json").write_text(json.dumps(round(time.perf_counter() - begin, 1)), encoding="utf-8")
        partial.rename(output)


def score(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    """Dice and the average surface distance."""
    import nibabel as nib

    from nnunet_multimodal.evaluation import measure

    assert isinstance(shop, PairedWorkshop)
    for _, row in rows_of(comparison_of(shop), name):
        output = shop.scores(row, seed) / "cases.json"
        if output.exists():
            continue
        rows = []
        for subject in shop.tested(seed):
            truth = nib.load(shop.work / f"pairs/labels/{subject}{ENDING}")
            found = nib.load(shop.predictions(row, seed) / f"{subject}{ENDING}")
            arrays = [np.asarray(each.dataobj).round().astype(int) for each in (found, truth)]
            maps = (arrays[0], largest_components(arrays[0]))
            of_maps = [measure(each, arrays[1], truth.header.get_zooms()[:3], shop.organs) for each in maps]
            for organ in shop.organs:
                measured: dict[str, Any] = {"case": subject, "organ": organ}
                for of_organs, suffix in zip(of_maps, ("", "_largest")):
                    measures = of_organs[organ]
                    measured[f"DSC{suffix}"] = None if np.isnan(measures.dsc) else measures.dsc
                    measured[f"ASD{suffix}"] = measures.asd_mm if np.isfinite(measures.asd_mm) else None
                rows.append(measured)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def largest_components(found: np.ndarray) -> np.ndarray:
    """The label map with one piece of each label, the largest."""
    import cc3d

    kept = np.zeros_like(found)
    for value in np.unique(found[found > 0]):
        kept[cc3d.largest_k(found == value, k=1, connectivity=26) > 0] = value
    return kept


STEPS = (train, predict, score)


# --- table -----------------------------------------------------------------------------------------------------------


def summarise(shop: Workshop, seeds: Iterable[int], names: Iterable[str]) -> dict[str, Any]:
    """What is there of each method and way to predict: per seed the means, the patients, and the training."""
    summary: dict[str, Any] = {}
    for name in names:
        for gone, row in rows_of(comparison_of(shop), name):
            results = {}
            for seed in seeds:
                path = shop.scores(row, seed) / "cases.json"
                if path.exists():
                    rows = json.loads(path.read_text(encoding="utf-8"))
                    measured: dict[str, Any] = {"cases": rows}
                    for metric in METRICS:
                        organs = {organ: mean_over(rows, metric, [organ]) for organ in shop.organs}
                        measured[metric] = {"organs": organs, "mean": mean_over(rows, metric, shop.organs)}
                    results[str(seed)] = {**measured, **records(shop, name, row, seed)}
            if results:
                summary[row] = {
                    "labels": shop.comparison.methods[name].data,
                    "settings": settings_of(shop, name),
                    "training_of": name,
                    "missing": gone,
                    "seeds": results,
                }
    return summary


def markdown(comparison: PairedComparison, summary: Mapping[str, Any], organs: Iterable[str]) -> str:
    """The tables that the README shows."""
    organs = list(organs)
    parts: list[str] = []
    for metric, title in METRICS.items():
        rows = []
        for name, entry in summary.items():
            means = of_seeds(entry, metric, "mean")
            row = [name, entry["labels"], *(cell(of_seeds(entry, metric, "organs", organ)) for organ in organs)]
            row += [cell(means)] if len(organs) > 1 else []
            row += [share(summary, comparison.full, means, metric)] if metric.startswith("DSC") else []
            rows.append(row)
        of_full = ["of full supervision"] if metric.startswith("DSC") else []
        mean = ["mean"] if len(organs) > 1 else []
        parts += [*lines([title, "trained on", *organs, *mean, *of_full], rows), ""]
    parts += training_lines({name: entry for name, entry in summary.items() if entry["training_of"] == name})
    return "\n".join(parts) + "\n"


def write_table(shop: Workshop, name: str, seeds: Sequence[int], methods: Sequence[str]) -> None:
    summary = summarise(shop, seeds, methods)
    if not summary:
        print("nothing is finished yet: no table")
        return
    comparison, devices = comparison_of(shop), devices_of(summary)
    trained, tested = shop.subjects
    coverage = shop.work / "nnUNet_raw/Dataset{}_{}/coverage.json".format(*DATASETS["scribbles"])
    measured = {
        "title": comparison.title,
        "train_cases": trained,
        "test_cases": tested,
        "drawn": json.loads(coverage.read_text(encoding="utf-8"))["classes"],
        "trained_with": devices,
        "rates": comparison.rates,
        "not_measured": list(comparison.not_measured),
        "methods": summary,
    }
    turns = "each patient is left out of one training" if comparison.source else "fold all"
    spread = "± is over the patients left out" if comparison.source else "± is over seeds"
    note = (
        f"2d, {comparison.pixels:g} mm pixels, patch {comparison.patch[0]} x {comparison.patch[1]}, batch "
        f"{comparison.batch_size}, {turns}, the last checkpoint, AdamW for all; {comparison.style} scribbles simulated "
        f"from the labels, background: {comparison.background}; predicted by `nnunet_multimodal predict`; means over "
        f"patients within a structure, then over structures; {spread}. A missed structure has no ASD and is left out "
        "there"
    )
    path = common.write_result(name, measured, note)
    table = markdown(comparison, summary, shop.organs)
    text = f"{comparison.title}\n\n{table}\nTrained with: {'; '.join(devices)}. {comparison.rates}\n\n{note}.\n"
    if comparison.not_measured:
        text += f"\nNot measured: {'; '.join(comparison.not_measured)}.\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{path} and {path.with_suffix('.md').name}")
