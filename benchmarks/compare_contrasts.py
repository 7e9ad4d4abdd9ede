"""Comparisons of kind one: trained on one contrast of the phantom, tested on every contrast of other subjects."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import common
import numpy as np
from compare_runner import (
    DATASETS,
    METRICS,
    Workshop,
    call,
    case,
    cell,
    devices_of,
    evaluate,
    fresh,
    lines,
    make_phantom,
    mean_over,
    metric_title,
    of_seeds,
    plan_and_preprocess,
    plans_name,
    read_rows,
    records,
    require_images,
    say,
    train,
    training_lines,
    write_plans,
)
from comparisons import Comparison
from main_job import ENDING, link


def comparison_of(shop: Workshop) -> Comparison:
    assert isinstance(shop.comparison, Comparison)
    return shop.comparison


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(shop: Workshop, methods: Iterable[str], phantom: Path | None) -> None:
    """Everything before the first training."""
    comparison, work = comparison_of(shop), shop.work
    make_phantom(shop, phantom)
    learned, test = shop.subjects
    needed = [(comparison.reference, subject) for subject in learned]
    require_images(shop, [*needed, *((contrast, subject) for contrast in comparison.contrasts for subject in test)])
    for subject in learned:
        for kind in ("images", "labels"):
            link(
                work / f"phantom/{kind}/{comparison.reference}/{subject}{ENDING}",
                work / f"train/{kind}/{subject}{ENDING}",
            )
    for subject in test:
        for contrast in comparison.contrasts:
            label = work / f"phantom/labels/{contrast}/{subject}{ENDING}"
            link(label, work / f"truth/{subject}/{contrast}{ENDING}")
            link(label, work / f"inputs/labels/{case(subject, contrast)}{ENDING}")
    kinds = {comparison.methods[name].data for name in methods}
    for kind in sorted(kinds):
        make_dataset(shop, kind)
        make_inputs(shop, kind)
    for name in methods:
        write_plans(shop, name)


def make_dataset(shop: Workshop, kind: str) -> None:
    """Raw data, and nnU-Net's plans and preprocessed data of it."""
    (number, name), work = DATASETS[kind], shop.work
    flag = "--reference-images" if kind == "crossmr" else "--images"
    if not (work / f"nnUNet_raw/Dataset{number}_{name}").exists():
        names = [f"{organ}={value}" for organ, value in shop.organs.items()]
        call("nnunet_multimodal", "convert", kind, flag, work / "train/images", "--labels", work / "train/labels",
             "-d", number, "--name", name, "--label-names", *names)  # fmt: skip
    plan_and_preprocess(shop, kind, work / "train/images")


def make_inputs(shop: Workshop, kind: str) -> None:
    """The test images as each kind of method takes them; the scribbles are of the same simulation for all."""
    folder = shop.work / "inputs" / kind
    if folder.exists():
        return
    reference, contrasts = comparison_of(shop).reference, comparison_of(shop).contrasts
    images, drawn = shop.work / "phantom/images", shop.work / "inputs/scribbles"
    if kind != "plain" and not (drawn / "coverage.json").exists():
        call("nnunet_multimodal", "scribbles", "simulate", "--labels", shop.work / "inputs/labels", "-o", drawn,
             "--seed", "1")  # fmt: skip
    partial = fresh(folder.with_name(f"{kind}.partial"))
    for subject in shop.subjects[1]:
        if kind == "crossmr":
            link(images / f"{reference}/{subject}{ENDING}", partial / f"{subject}/reference{ENDING}")
            link(drawn / f"{case(subject, reference)}{ENDING}", partial / f"{subject}/scribbles{ENDING}")
        for contrast in contrasts:
            image = images / f"{contrast}/{subject}{ENDING}"
            if kind == "crossmr":
                link(image, partial / f"{subject}/{contrast}{ENDING}")
                continue
            link(image, partial / f"{case(subject, contrast)}_0000{ENDING}")
            if kind == "scribble":  # of this very image: the baseline is told where the organ is in the target
                split_scribbles(drawn / f"{case(subject, contrast)}{ENDING}", partial, list(shop.organs.values()))
    partial.rename(folder)


def split_scribbles(drawn: Path, folder: Path, organs: Sequence[int]) -> None:
    """A binary channel per organ behind the image's, as `convert scribble` has them."""
    import nibabel as nib

    image = nib.load(drawn)
    values = np.asarray(image.dataobj)
    for channel, organ in enumerate(organs, start=1):
        name = f"{drawn.name.removesuffix(ENDING)}_{channel:04d}{ENDING}"
        nib.save(nib.Nifti1Image((values == organ).astype(np.uint8), image.affine), folder / name)


def predict(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    output = shop.predictions(name, seed)
    if output.exists():
        return
    method = shop.comparison.methods[name]
    say(f"predict {name} seed {seed}")
    partial = output.with_name(f"{output.name}.partial")
    begin = time.perf_counter()
    model = ["-d", DATASETS[method.data][0], "-c", "2d", "-tr", method.trainer, "-p", plans_name(name), "-f", "all"]
    results = {"nnUNet_results": str(shop.results(seed))}
    if method.data == "crossmr":
        call("nnunet_multimodal", "refer", "--subjects", shop.work / "inputs/crossmr", "-o", partial, *model,
             "--device", shop.device, "--no-overlays", "--continue", log=log, **results)  # fmt: skip
    else:
        flat = fresh(partial) / "flat"
        call("nnUNetv2_predict", "-i", shop.work / "inputs" / method.data, "-o", flat, *model, "-device", shop.device,
             "-npp", "1", "-nps", "1", log=log, **results)  # fmt: skip
        for subject in shop.subjects[1]:
            (partial / subject).mkdir()
            for contrast in shop.comparison.contrasts:
                (flat / f"{case(subject, contrast)}{ENDING}").rename(partial / subject / f"{contrast}{ENDING}")
        shutil.rmtree(flat)
    (partial / "seconds.json").write_text(json.dumps(round(time.perf_counter() - begin, 1)))
    partial.rename(output)


def score(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    seen = comparison_of(shop).reference
    evaluate(shop, shop.predictions(name, seed), shop.scores(name, seed), log, "--in-distribution", seen)


STEPS = (train, predict, score)


# --- table ------------------------------------------------------------------------------------------------------------


def summarise(shop: Workshop, seeds: Iterable[int], names: Iterable[str]) -> dict[str, Any]:
    """What is there of each method: per seed and metric the means by contrast and by organ, and the training."""
    comparison, summary = comparison_of(shop), {}
    for name in names:
        results = {}
        for seed in seeds:
            path = shop.scores(name, seed) / "evaluation.json"
            if path.exists():
                results[str(seed)] = summarise_seed(shop, read_rows(path)) | records(shop, name, name, seed)
        if results:
            settings = {**comparison.train_options, **comparison.methods[name].settings}
            summary[name] = {"settings": settings, "seeds": results}
    return summary


def summarise_seed(shop: Workshop, rows: list[dict[str, Any]]) -> dict[str, Any]:
    comparison, organs = comparison_of(shop), shop.organs
    result: dict[str, Any] = {}
    for metric in METRICS:
        contrasts = {
            contrast: mean_over((r for r in rows if r["contrast"] == contrast), metric, organs)
            for contrast in comparison.contrasts
        }
        groups = {**{c: (c,) for c in comparison.contrasts}, "unseen": comparison.unseen}
        by_organ = {
            group: {
                organ: mean_over((r for r in rows if r["contrast"] in members), metric, [organ]) for organ in organs
            }
            for group, members in groups.items()
        }
        defined = [contrasts[c] for c in comparison.unseen if contrasts[c] is not None]
        unseen = round(float(np.mean(defined)), 4) if defined else None
        result[metric] = {"contrasts": contrasts, "unseen": unseen, "organs": by_organ}
    return result


def markdown(comparison: Comparison, summary: Mapping[str, Any], organs: Iterable[str]) -> str:
    """The tables that the README shows."""
    organs = list(organs)
    mean_name = "mean of " + ", ".join(comparison.unseen)
    parts: list[str] = []
    for metric in METRICS:
        rows = [
            [
                name,
                *(cell(of_seeds(entry, metric, "contrasts", contrast)) for contrast in comparison.contrasts),
                cell(of_seeds(entry, metric, "unseen")),
            ]
            for name, entry in summary.items()
        ]
        parts += [*lines([metric_title(comparison, metric), *comparison.contrasts, mean_name], rows), ""]
    rows = [
        [name, *(cell(of_seeds(entry, "DSC", "organs", "unseen", organ)) for organ in organs)]
        for name, entry in summary.items()
    ]
    parts += [*lines([f"DSC, {mean_name}", *organs], rows), ""]
    parts += training_lines(summary)
    return "\n".join(parts) + "\n"


def write_table(shop: Workshop, name: str, seeds: Sequence[int], methods: Sequence[str]) -> None:
    summary = summarise(shop, seeds, methods)
    if not summary:
        print("nothing is finished yet: no table")
        return
    comparison = comparison_of(shop)
    devices = devices_of(summary)
    measured = {
        "title": comparison.title,
        "train_subjects": comparison.train_subjects,
        "test_subjects": comparison.test_subjects,
        "trained_on": comparison.reference,
        "unseen": list(comparison.unseen),
        "nsd_tolerance_mm": comparison.nsd_tolerance,
        "trained_with": devices,
        "methods": summary,
    }
    note = (
        f"2d, {comparison.pixels} mm pixels, batch {comparison.batch_size}, fold all; means over organs and subjects; "
        "scribbles simulated on every slice, on the reference for CrossMR, on the target itself for Scribble"
    )
    path = common.write_result(name, measured, note)
    table = markdown(comparison, summary, shop.organs)
    text = f"{comparison.title}\n\n{table}\nTrained with: {'; '.join(devices)}.\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{path} and {path.with_suffix('.md').name}")
