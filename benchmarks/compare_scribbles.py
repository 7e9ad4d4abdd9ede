"""Comparisons of kind three: trained from real scribbles, judged on dense labels of other patients.

Below the work folder: train/{images,scribbles,labels}, truth/CASE.nii.gz, inputs/CASE_0000.nii.gz,
pred/METHOD/seed_0/CASE.nii.gz and scores/METHOD/seed_0/cases.json.
"""

from __future__ import annotations

import json
import os
import shutil
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
from comparisons_scribbles import ScribbleComparison
from main_job import ENDING, link

# Name to title. nnU-Net's own first step of post-processing keeps the largest component of all foreground; "near" is
# the box around the true foreground and NEAR voxels more on each side, within the slice.
METRICS = {
    "DSC": "DSC",
    "HD95": "HD95, voxels",
    "DSC_largest": "DSC of the largest component",
    "HD95_largest": "HD95 of the largest component, voxels",
    "DSC_near": "DSC near the heart",
}
NEAR = 10


@dataclass(frozen=True)
class ScribbleWorkshop(Workshop):
    """A workshop whose patients are real ones."""

    @property
    def organs(self) -> dict[str, int]:
        return dict(comparison_of(self).label_names)

    @property
    def subjects(self) -> tuple[list[str], list[str]]:
        """Names of those to train on and of those to test on."""
        comparison, folder = comparison_of(self), real_images()
        names = sorted(path.name.removesuffix(ENDING) for path in (folder / comparison.source / "images").iterdir())
        return names[slice(*comparison.train_cases)], names[slice(*comparison.test_cases)]


def comparison_of(shop: Workshop) -> ScribbleComparison:
    assert isinstance(shop.comparison, ScribbleComparison)
    return shop.comparison


def real_images() -> Path:
    """The folder of real example images, as the tests find it."""
    default = Path(__file__).resolve().parents[2] / "shared/data"
    folder = Path(os.environ.get("NNUNET_MULTIMODAL_DATA", default))
    if not folder.is_dir():
        raise SystemExit(f"no real images: {folder} does not exist; set NNUNET_MULTIMODAL_DATA")
    return folder


# --- data ------------------------------------------------------------------------------------------------------------


def prepare(shop: Workshop, methods: Iterable[str], _phantom: Path | None) -> None:
    """Everything before the first training."""
    comparison, work = comparison_of(shop), shop.work
    source, (trained, tested) = real_images() / comparison.source, shop.subjects
    for subject in trained:
        for kind in ("images", "scribbles", "labels"):
            link(source / kind / f"{subject}{ENDING}", work / f"train/{kind}/{subject}{ENDING}")
    for subject in tested:
        link(source / f"labels/{subject}{ENDING}", work / f"truth/{subject}{ENDING}")
        link(source / f"images/{subject}{ENDING}", work / f"inputs/{subject}_0000{ENDING}")
    make_scribbles(shop)
    make_dense(shop)
    for kind in ("scribbles", "dense"):
        plan_and_preprocess(shop, kind, work / "train/images")
    for name in methods:
        write_plans(shop, name)


def make_scribbles(shop: Workshop) -> None:
    """The scribbles, by the command a user types."""
    (number, name), work, comparison = DATASETS["scribbles"], shop.work, comparison_of(shop)
    if not (work / f"nnUNet_raw/Dataset{number}_{name}").exists():
        names = [f"{organ}={value}" for organ, value in comparison.label_names.items()]
        call("nnunet_multimodal", "scribbles", "import", "--images", work / "train/images", "--scribbles",
             work / "train/scribbles", "--dense", work / "train/labels", "-d", number, "--name", name,
             "--unlabelled", comparison.unlabelled, "--label-names", *names)  # fmt: skip


def make_dense(shop: Workshop) -> None:
    """The same images with all of their labels, for full supervision."""
    folders = [shop.work / "nnUNet_raw/Dataset{}_{}".format(*DATASETS[kind]) for kind in ("scribbles", "dense")]
    scribbled, dense = folders
    if dense.exists():
        return
    partial = fresh(dense.with_name(f"{dense.name}.partial"))
    shutil.copytree(scribbled / "imagesTr", partial / "imagesTr")
    shutil.copytree(scribbled / "labelsTr_dense", partial / "labelsTr")
    content = json.loads((scribbled / "dataset.json").read_text(encoding="utf-8"))
    del content["labels"]["ignore"]
    (partial / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    partial.rename(dense)


# --- after training --------------------------------------------------------------------------------------------------


def predict(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    output = shop.predictions(name, seed)
    if output.exists():
        return
    method = shop.comparison.methods[name]
    say(f"predict {name} seed {seed}")
    partial = fresh(output.with_name(f"{output.name}.partial"))
    begin = time.perf_counter()
    call("nnUNetv2_predict", "-i", shop.work / "inputs", "-o", partial, "-d", DATASETS[method.data][0], "-c", "2d",
         "-tr", method.trainer, "-p", plans_name(name), "-f", "all", "-device", shop.device, "-npp", "0", "-nps", "0",
         "--disable_tta", log=log, nnUNet_results=str(shop.results(seed)))  # fmt: skip
    (partial / "seconds.json").write_text(json.dumps(round(time.perf_counter() - begin, 1)), encoding="utf-8")
    partial.rename(output)


def score(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    """Dice, and the Hausdorff distance in voxels: the true spacing of these images is not known."""
    import nibabel as nib

    from nnunet_multimodal.evaluation import measure

    output = shop.scores(name, seed) / "cases.json"
    if output.exists():
        return
    rows = []
    for subject in shop.subjects[1]:
        files = (shop.predictions(name, seed) / f"{subject}{ENDING}", shop.work / f"truth/{subject}{ENDING}")
        found, truth = (np.asarray(nib.load(file).dataobj).round().astype(int) for file in files)
        maps = [(found, truth), (largest_component(found), truth)]
        box = near(truth)
        maps.append((found[box], truth[box]))
        of_maps = [measure(*pair, (1, 1, 1), shop.organs) for pair in maps]
        for organ in shop.organs:
            row: dict[str, Any] = {"case": subject, "organ": organ}
            for of_organs, suffix in zip(of_maps, ("", "_largest", "_near")):
                measures = of_organs[organ]
                row[f"DSC{suffix}"] = None if np.isnan(measures.dsc) else measures.dsc
                row[f"HD95{suffix}"] = measures.hd95_mm if np.isfinite(measures.hd95_mm) else None
            rows.append(row)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def largest_component(found: np.ndarray) -> np.ndarray:
    """The label map without what does not touch the largest piece of foreground."""
    import cc3d

    kept: np.ndarray = np.where(cc3d.largest_k(found > 0, k=1, connectivity=26) > 0, found, 0)
    return kept


def near(truth: np.ndarray) -> tuple[slice, ...]:
    """The box around the foreground and a margin in the first two axes, those of the slice."""
    places = np.argwhere(truth > 0)
    margin = np.array([NEAR, NEAR, 0])
    low, high = np.maximum(places.min(0) - margin, 0), places.max(0) + margin + 1
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high))


STEPS = (train, predict, score)


# --- table -----------------------------------------------------------------------------------------------------------


def summarise(shop: Workshop, seeds: Iterable[int], names: Iterable[str]) -> dict[str, Any]:
    """What is there of each method: per seed the means and the training."""
    summary = {}
    for name in names:
        results = {}
        for seed in seeds:
            path = shop.scores(name, seed) / "cases.json"
            if path.exists():
                rows = json.loads(path.read_text(encoding="utf-8"))
                measured: dict[str, Any] = {}
                for metric in METRICS:
                    organs = {organ: mean_over(rows, metric, [organ]) for organ in shop.organs}
                    measured[metric] = {"organs": organs, "mean": mean_over(rows, metric, shop.organs)}
                results[str(seed)] = {**measured, **records(shop, name, name, seed)}
        if results:
            data = shop.comparison.methods[name].data
            summary[name] = {"labels": data, "settings": settings_of(shop, name), "seeds": results}
    return summary


def markdown(comparison: ScribbleComparison, summary: Mapping[str, Any], organs: Iterable[str]) -> str:
    """The tables that the README shows."""
    organs = list(organs)
    parts: list[str] = []
    for metric, title in METRICS.items():
        rows = []
        for name, entry in summary.items():
            means = of_seeds(entry, metric, "mean")
            row = [name, entry["labels"], *(cell(of_seeds(entry, metric, "organs", organ)) for organ in organs)]
            row.append(cell(means))
            if metric.startswith("DSC"):
                row.append(share(summary, comparison.full, means, metric))
            rows.append(row)
        of_full = ["of full supervision"] if metric.startswith("DSC") else []
        parts += [*lines([title, "trained on", *organs, "mean", *of_full], rows), ""]
    parts += training_lines(summary)
    return "\n".join(parts) + "\n"


def share(summary: Mapping[str, Any], full: str, means: Sequence[float | None], metric: str = "DSC") -> str:
    """The mean over seeds as a share of full supervision's."""
    if full not in summary or None in means:
        return "-"
    return f"{100 * np.mean(means) / np.mean(of_seeds(summary[full], metric, 'mean')):.1f} %"


def write_table(shop: Workshop, name: str, seeds: Sequence[int], methods: Sequence[str]) -> None:
    summary = summarise(shop, seeds, methods)
    if not summary:
        print("nothing is finished yet: no table")
        return
    comparison, devices = comparison_of(shop), devices_of(summary)
    trained, tested = shop.subjects
    measured = {
        "title": comparison.title,
        "train_cases": trained,
        "test_cases": tested,
        "trained_with": devices,
        "rates": comparison.rates,
        "not_measured": list(comparison.not_measured),
        "methods": summary,
    }
    note = (
        f"2d, {comparison.pixels:g} mm pixels (nominal), patch {comparison.patch[0]} x {comparison.patch[1]}, batch "
        f"{comparison.batch_size}, fold all, the last checkpoint, AdamW, the same network for all; predicted by "
        "nnUNetv2_predict --disable_tta; means over patients within a structure, then over structures. HD95 in voxels, "
        "each axis counting alike, because the true spacing is not known; a missed structure has none and is left out "
        "there"
    )
    path = common.write_result(name, measured, note)
    table = markdown(comparison, summary, shop.organs)
    text = f"{comparison.title}\n\n{table}\nTrained with: {'; '.join(devices)}. {comparison.rates}\n\n{note}.\n"
    if comparison.not_measured:
        text += f"\nNot measured: {'; '.join(comparison.not_measured)}.\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{path} and {path.with_suffix('.md').name}")
