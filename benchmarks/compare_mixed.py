"""Comparisons of kind two: trained on unpaired modalities, tested in each, told the modality or not.

Below the work folder: train/MODALITY/{images,labels}, and of methods that were told something, pred/METHOD_told_right
and pred/METHOD_told_wrong beside pred/METHOD, whose modality is inferred.
"""

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
    SECTION,
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
    settings_of,
    train,
    training_lines,
    write_plans,
)
from comparisons_mixed import MixedComparison
from main_job import ENDING, link

INFERRED, RIGHT, WRONG = "", "_told_right", "_told_wrong"


def comparison_of(shop: Workshop) -> MixedComparison:
    assert isinstance(shop.comparison, MixedComparison)
    return shop.comparison


# --- data ------------------------------------------------------------------------------------------------------------


def training_images(shop: Workshop) -> dict[str, list[tuple[str, str]]]:
    """Of each modality the images (contrast, subject): each subject in one of them only, contrasts in turn."""
    comparison, (subjects, _) = comparison_of(shop), shop.subjects
    images, each = {}, comparison.subjects_each
    for index, (modality, contrasts) in enumerate(comparison.modalities.items()):
        of_modality = subjects[index * each : (index + 1) * each]
        images[modality] = [(contrasts[i % len(contrasts)], subject) for i, subject in enumerate(of_modality)]
    return images


def prepare(shop: Workshop, methods: Iterable[str], phantom: Path | None) -> None:
    """Everything before the first training."""
    comparison, work = comparison_of(shop), shop.work
    make_phantom(shop, phantom)
    chosen, (_, test) = training_images(shop), shop.subjects
    tested = [(contrast, subject) for contrast in comparison.contrasts for subject in test]
    require_images(shop, [*(image for images in chosen.values() for image in images), *tested])
    for modality, images in chosen.items():
        for contrast, subject in images:
            for kind in ("images", "labels"):
                source = work / f"phantom/{kind}/{contrast}/{subject}{ENDING}"
                link(source, work / f"train/{modality}/{kind}/{subject}{ENDING}")
    for contrast, subject in tested:
        image, label = (work / f"phantom/{kind}/{contrast}/{subject}{ENDING}" for kind in ("images", "labels"))
        link(label, work / f"truth/{subject}/{contrast}{ENDING}")
        link(image, work / f"inputs/{case(subject, contrast)}_0000{ENDING}")
    make_dataset(shop)
    for way in (RIGHT, WRONG):
        told = {case(subject, contrast): told_modality(comparison, contrast, way) for contrast, subject in tested}
        (work / f"inputs{way}.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
    for name in methods:
        write_plans(shop, name)


def told_modality(comparison: MixedComparison, contrast: str, way: str) -> str:
    """The modality of a contrast, or the one that follows it in the comparison."""
    names = list(comparison.modalities)
    right = names.index(comparison.modality_of(contrast))
    return names[right if way == RIGHT else (right + 1) % len(names)]


def make_dataset(shop: Workshop) -> None:
    """One data set of all modalities, by the command a user types."""
    (number, name), work = DATASETS["mixed"], shop.work
    if not (work / f"nnUNet_raw/Dataset{number}_{name}").exists():
        modalities = comparison_of(shop).modalities
        images, labels = (
            [f"{modality}={work}/train/{modality}/{kind}" for modality in modalities] for kind in ("images", "labels")
        )
        names = [f"{organ}={value}" for organ, value in shop.organs.items()]
        call("nnunet_multimodal", "convert", "mixed", "--images", *images, "--labels", *labels, "-d", number,
             "--name", name, "--label-names", *names)  # fmt: skip
    plan_and_preprocess(shop, "mixed", work / f"nnUNet_raw/Dataset{number}_{name}/imagesTr")


# --- after training --------------------------------------------------------------------------------------------------


def rows_of(comparison: MixedComparison, name: str) -> list[tuple[str, str]]:
    """The ways in which a method predicts and what each is called: the name of its folders and of its row."""
    ways = (INFERRED, RIGHT, WRONG) if name in comparison.informed else (INFERRED,)
    return [(way, f"{name}{way}") for way in ways]


def predict(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    for way, row in rows_of(comparison_of(shop), name):
        if not shop.predictions(row, seed).exists():
            predict_way(shop, name, seed, way, log)


def predict_way(shop: Workshop, name: str, seed: int, way: str, log: TextIO) -> None:
    method, output = shop.comparison.methods[name], shop.predictions(f"{name}{way}", seed)
    say(f"predict {name}{way} seed {seed}")
    partial = output.with_name(f"{output.name}.partial")
    flat = fresh(partial) / "flat"
    begin = time.perf_counter()
    told: list[object] = [] if way == INFERRED else ["--modality-map", shop.work / f"inputs{way}.json"]
    if name in comparison_of(shop).specialists:
        told = ["--modality", comparison_of(shop).specialists[name]]
    call("nnunet_multimodal", "predict", "-i", shop.work / "inputs", "-o", flat, "-d", DATASETS["mixed"][0],
         "-c", "2d", "-tr", method.trainer, "-p", plans_name(name), "-f", "all", "--device", shop.device, *told,
         log=log, nnUNet_results=str(shop.results(seed)))  # fmt: skip
    (partial / "seconds.json").write_text(json.dumps(round(time.perf_counter() - begin, 1)), encoding="utf-8")
    for subject in shop.subjects[1]:
        (partial / subject).mkdir()
        for contrast in shop.comparison.contrasts:
            (flat / f"{case(subject, contrast)}{ENDING}").rename(partial / subject / f"{contrast}{ENDING}")
    (flat / "predictions.json").rename(partial / "predictions.json")
    shutil.rmtree(flat)
    partial.rename(output)


def score(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    for _, row in rows_of(comparison_of(shop), name):
        evaluate(shop, shop.predictions(row, seed), shop.scores(row, seed), log)


STEPS = (train, predict, score)


# --- table -----------------------------------------------------------------------------------------------------------


def summarise(shop: Workshop, seeds: Iterable[int], names: Iterable[str]) -> dict[str, Any]:
    """What is there of each method and way to predict: per seed the means, modalities recognised, and the training."""
    comparison, summary = comparison_of(shop), {}
    for name in names:
        knows_several = name not in comparison.specialists
        for way, row in rows_of(comparison, name):
            results: dict[str, Any] = {}
            for seed in seeds:
                path = shop.scores(row, seed) / "evaluation.json"
                if path.exists():
                    entries = json.loads((shop.predictions(row, seed) / "predictions.json").read_text(encoding="utf-8"))
                    results[str(seed)] = {
                        **summarise_seed(shop, read_rows(path)),
                        "recognised": recognised(comparison, entries["cases"]) if knows_several else None,
                        **records(shop, name, row, seed),
                    }
            if results:
                modality = {INFERRED: "inferred", RIGHT: "told", WRONG: "told a wrong one"}[way]
                if not knows_several:
                    modality = f"told {comparison.specialists[name]}"
                summary[row] = {
                    "settings": settings_of(shop, name),
                    "modality": modality,
                    "training_of": name,
                    "text": text_source(shop.fold(name, int(next(iter(results)))).parent / "plans.json"),
                    "seeds": results,
                }
    return summary


def groups_of(comparison: MixedComparison) -> dict[str, tuple[str, ...]]:
    """What a mean is made of: each contrast, and each modality that has several."""
    several = {name: contrasts for name, contrasts in comparison.modalities.items() if contrasts != (name,)}
    return {contrast: (contrast,) for contrast in comparison.contrasts} | several


def summarise_seed(shop: Workshop, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Per metric the means of contrasts and modalities, of these by organ, and the mean of the modalities."""
    comparison, organs = comparison_of(shop), shop.organs
    result: dict[str, Any] = {}
    for metric in METRICS:
        images = {
            group: [row for row in rows if row["contrast"] in members]
            for group, members in groups_of(comparison).items()
        }
        means = {group: mean_over(found, metric, organs) for group, found in images.items()}
        by_organ = {
            group: {organ: mean_over(found, metric, [organ]) for organ in organs} for group, found in images.items()
        }
        defined = [mean for name in comparison.modalities if (mean := means[name]) is not None]
        overall = round(float(np.mean(defined)), 4) if len(defined) == len(comparison.modalities) else None
        result[metric] = {"means": means, "mean_of_modalities": overall, "organs": by_organ}
    return result


def recognised(comparison: MixedComparison, cases: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of each contrast in how many images the network itself takes the right modality for the likeliest; None: it has
    no opinion. ``unsure`` images are those in which single tiles disagree."""
    if not all("inferred" in entry for entry in cases.values()):
        return None
    found = {}
    for contrast in comparison.contrasts:
        entries = [entry for name, entry in cases.items() if name.endswith(f"__{contrast}")]
        right = comparison.modality_of(contrast)
        found[contrast] = {
            "right": sum(entry["inferred"] == right for entry in entries),
            "of": len(entries),
            "lowest_confidence": min((entry["inferred_confidence"] for entry in entries), default=None),
            "unsure": sum(entry["tiles_agreeing"] < entry["tiles"] for entry in entries),
        }
    return found


def text_source(plans: Path) -> dict[str, Any] | None:
    """Where the text embeddings of a training came from; None for one without text."""
    configuration = json.loads(plans.read_text(encoding="utf-8"))["configurations"]["2d"]
    return configuration.get(SECTION, {}).get("text_source") or None


def markdown(comparison: MixedComparison, summary: Mapping[str, Any], organs: Iterable[str]) -> str:
    """The tables that the README shows."""
    organs, groups = list(organs), groups_of(comparison)
    parts: list[str] = []
    for metric in METRICS:
        rows = [
            [
                row,
                *(cell(of_seeds(entry, metric, "means", group)) for group in groups),
                cell(of_seeds(entry, metric, "mean_of_modalities")),
            ]
            for row, entry in summary.items()
        ]
        titles = [title(group, members) for group, members in groups.items()]
        mean_name = "mean of " + ", ".join(comparison.modalities)
        parts += [*lines([metric_title(comparison, metric), *titles, mean_name], rows), ""]
    for metric in METRICS:
        header = [f"{metric_title(comparison, metric)}, by organ"]
        header += [f"{modality} {organ}" for modality in comparison.modalities for organ in organs]
        rows = [
            [
                row,
                *(
                    cell(of_seeds(entry, metric, "organs", modality, organ))
                    for modality in comparison.modalities
                    for organ in organs
                ),
            ]
            for row, entry in summary.items()
        ]
        parts += [*lines(header, rows), ""]
    rows = [
        [row, *(recognised_cell(of_seeds(entry, "recognised"), contrast) for contrast in comparison.contrasts)]
        for row, entry in summary.items()
        if entry["modality"] == "inferred"  # not by a specialist
    ]
    parts += [*lines(["modality recognised", *comparison.contrasts], rows), ""]
    trained = {row: entry for row, entry in summary.items() if entry["training_of"] == row}
    parts += training_lines(trained)
    return "\n".join(parts) + "\n"


def title(group: str, members: Sequence[str]) -> str:
    return group if members == (group,) else f"{group} ({', '.join(members)})"


def recognised_cell(of_all_seeds: Sequence[Mapping[str, Any] | None], contrast: str) -> str:
    """``k of n`` images over all seeds; a dash for a network that knows no modalities."""
    counts = [found[contrast] for found in of_all_seeds if found is not None]
    return f"{sum(c['right'] for c in counts)} of {sum(c['of'] for c in counts)}" if counts else "-"


def write_table(shop: Workshop, name: str, seeds: Sequence[int], methods: Sequence[str]) -> None:
    summary = summarise(shop, seeds, methods)
    if not summary:
        print("nothing is finished yet: no table")
        return
    comparison, devices = comparison_of(shop), devices_of(summary)
    images = training_images(shop)
    measured = {
        "title": comparison.title,
        "train_subjects": {
            modality: {c: sum(c == found for found, _ in of_modality) for c in comparison.modalities[modality]}
            for modality, of_modality in images.items()
        },
        "test_subjects": comparison.test_subjects,
        "test_images": {contrast: comparison.test_subjects for contrast in comparison.contrasts},
        "phantom_seed": comparison.phantom_seed,
        "nsd_tolerance_mm": comparison.nsd_tolerance,
        "trained_with": devices,
        "rates": comparison.rates,
        "not_measured": list(comparison.not_measured),
        "methods": summary,
    }
    note = (
        f"2d, {comparison.pixels} mm pixels, batch {comparison.batch_size}, fold all, the last checkpoint; means over "
        "images within an organ, then over organs; every method predicts by `nnunet_multimodal predict`. nnUNetTrainer "
        "mirrors, in training and at prediction; the others do not, because the labels have sides. CTonly and MRonly "
        "are told their own modality of every image; they make half the steps, and see as many batches of it"
    )
    path = common.write_result(name, measured, note)
    table = markdown(comparison, summary, shop.organs)
    text = f"{comparison.title}\n\n{table}\nTrained with: {'; '.join(devices)}. {comparison.rates}\n\n{note}.\n"
    if comparison.not_measured:
        text += "\nNot measured: " + "; ".join(comparison.not_measured) + ".\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{path} and {path.with_suffix('.md').name}")
