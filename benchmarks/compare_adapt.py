"""Comparisons of kind five: a model of one modality adapted to another, judged in both.

Below the work folder: train/{OLD,NEW}/{images,labels}/SUBJECT.nii.gz, truth/SUBJECT/CONTRAST.nii.gz,
inputs/SUBJECT__CONTRAST_0000.nii.gz, pred/METHOD/seed_0/SUBJECT/CONTRAST.nii.gz. The data set of the new modality has
a fold for each number of training cases. The base model is trained once, with seed 0.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import common
import nibabel as nib
import numpy as np
from compare_runner import (
    DATASETS,
    METRICS,
    SECTION,
    Workshop,
    call,
    case,
    cell,
    dataset_name,
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
    require_images,
    say,
    settings_of,
    train,
    write_plans,
)
from compare_scribbles import real_images
from comparisons_adapt import AdaptComparison, count_name
from main_job import ENDING, link

BASE = "base"
DATA_IDENTIFIER = "nnUNetPlansAdapted_2d"  # what was preprocessed, for all methods
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class AdaptWorkshop(Workshop):
    """A workshop whose subjects are a phantom's, or real ones."""

    @property
    def organs(self) -> dict[str, int]:
        comparison = comparison_of(self)
        if comparison.real:
            return {organ: value for value, organ in enumerate(comparison.labels[comparison.new], start=1)}
        return super().organs

    @property
    def parts(self) -> tuple[list[str], list[str], list[tuple[str, str]]]:
        """Subjects of the base, subjects of the adaptation, and what is tested, as (subject, contrast)."""
        comparison = comparison_of(self)
        if comparison.real:
            old, new = (
                sorted(path.name.removesuffix(ENDING) for path in (real_images() / folder / "images").iterdir())
                for folder in comparison.contrasts
            )
            kept = comparison.test_subjects
            tested = [(old[-1], comparison.old), *((subject, comparison.new) for subject in new[-kept:])]
            return old[:-1], new[:-kept], tested
        train_subjects, test = self.subjects
        at = comparison.base_subjects
        return train_subjects[:at], train_subjects[at:], [(s, c) for s in test for c in comparison.contrasts]

    def fold_of_method(self, name: str) -> str:
        """nnU-Net's fold that this method trains: one for each number of cases."""
        if name == BASE:
            return "all"
        names = [count_name(count) for count in comparison_of(self).counts]
        return str(names.index(row_and_count(name)[1]))

    def fold(self, name: str, seed: int) -> Path:
        method = comparison_of(self).methods[name]
        row = BASE if name == BASE else row_and_count(name)[0]
        folder = f"{method.trainer}__{plans_name(row)}__2d/fold_{self.fold_of_method(name)}"
        return self.results(0 if name == BASE else seed) / dataset_name(method) / folder


def comparison_of(shop: Workshop) -> AdaptComparison:
    assert isinstance(shop.comparison, AdaptComparison)
    return shop.comparison


def row_and_count(name: str) -> tuple[str, str]:
    """``LoRA_r8-all`` -> (``LoRA_r8``, ``all``)"""
    row, _, count = name.rpartition("-")
    return row, count


# --- data ------------------------------------------------------------------------------------------------------------


def prepare(shop: Workshop, methods: Iterable[str], phantom: Path | None) -> None:
    """Everything before the first training."""
    assert isinstance(shop, AdaptWorkshop)
    comparison, work = comparison_of(shop), shop.work
    if not comparison.real:
        make_phantom(shop, phantom)
    base, new, tested = shop.parts
    trained = [*((subject, comparison.old) for subject in base), *((subject, comparison.new) for subject in new)]
    if not comparison.real:
        require_images(shop, [(contrast, subject) for subject, contrast in [*trained, *tested]])
    for subject, contrast in trained:
        for kind in ("images", "labels"):
            put(shop, kind, subject, contrast, work / f"train/{contrast}/{kind}/{subject}{ENDING}")
    for subject, contrast in tested:
        put(shop, "labels", subject, contrast, work / f"truth/{subject}/{contrast}{ENDING}")
        put(shop, "images", subject, contrast, work / f"inputs/{case(subject, contrast)}_0000{ENDING}")
    for kind, contrast, modality in ((BASE, comparison.old, "CT"), ("adapt", comparison.new, "MR")):
        number, name = DATASETS[kind]
        if not (work / f"nnUNet_raw/Dataset{number}_{name}").exists():
            names = [f"{organ}={value}" for organ, value in shop.organs.items()]
            folder = work / f"train/{contrast}"
            call("nnunet_multimodal", "convert", "plain", "--images", folder / "images", "--labels", folder / "labels",
                 "-d", number, "--name", name, "--channel-name", "CT_or_MR", "--modality", modality, "--label-names",
                 *names)  # fmt: skip
    plan_and_preprocess(shop, BASE, work / f"train/{comparison.old}/images")
    write_plans(shop, BASE)


def put(shop: Workshop, kind: str, subject: str, contrast: str, target: Path) -> None:
    """An image or label of the phantom, or a real one with the organs' common values."""
    comparison = comparison_of(shop)
    if not comparison.real:
        link(shop.work / f"phantom/{kind}/{contrast}/{subject}{ENDING}", target)
        return
    source = real_images() / f"{contrast}/{kind}/{subject}{ENDING}"
    if kind == "images":
        link(source, target)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        image = nib.load(source)
        data = np.asarray(image.dataobj)
        common_values = np.zeros(data.shape, np.uint8)
        for organ, value in comparison.labels[contrast].items():
            common_values[data == value] = shop.organs[organ]
        nib.save(nib.Nifti1Image(common_values, image.affine), target)


# --- training --------------------------------------------------------------------------------------------------------


def train_base(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    """The base model, before anything can be adapted."""
    with _one_at_a_time:
        train(shop, BASE, 0, log)


def adapt(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    """The method's plans by the command a user types, then the comparison's length; data are preprocessed once."""
    if name == BASE:
        return
    assert isinstance(shop, AdaptWorkshop)
    comparison, (row, _) = comparison_of(shop), row_and_count(name)
    method, own = comparison.rows[row], plans_name(row)
    folder = shop.work / f"nnUNet_preprocessed/{dataset_name(method)}"
    number = DATASETS["adapt"][0]
    with _one_at_a_time:
        path = folder / f"{own}.json"
        if not path.exists():
            draft = f"{own}_draft"
            call("nnunet_multimodal", "adapt", "--from", shop.fold(BASE, 0).parent, "-d", number, "-tr", method.trainer,
                 "-p", draft, "--overwrite", *comparison.adapt.get(row, ()), log=log)  # fmt: skip
            plans = json.loads((folder / f"{draft}.json").read_text(encoding="utf-8"))
            plans["plans_name"] = own
            configuration = plans["configurations"]["2d"]
            configuration["data_identifier"] = DATA_IDENTIFIER
            configuration[SECTION] = {**configuration[SECTION], **comparison.train_options, **method.settings}
            path.write_text(json.dumps(plans, indent=2), encoding="utf-8")
            (folder / f"{draft}.json").unlink()
        if not (folder / ".done").exists():
            call("nnUNetv2_extract_fingerprint", "-d", number, "-np", "1", log=log)
            call("nnUNetv2_preprocess", "-d", number, "-plans_name", own, "-c", "2d", "-np", "1", log=log)
            (folder / "splits_final.json").write_text(json.dumps(splits(shop), indent=2), encoding="utf-8")
            (folder / ".done").touch()


def splits(shop: AdaptWorkshop) -> list[dict[str, list[str]]]:
    """A fold for each number of cases: the first ones; the validation has to be of something."""
    _, new, _ = shop.parts
    return [{"train": new[:count], "val": new[:1]} for count in comparison_of(shop).counts]


def train_adapted(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    """By train_one.py, as every comparison does, in the method's fold."""
    assert isinstance(shop, AdaptWorkshop)
    if name == BASE or (shop.fold(name, seed) / "checkpoint_final.pth").exists():
        return
    method = comparison_of(shop).methods[name]
    say(f"train   {name} seed {seed}")
    call("python", Path(__file__).parent / "train_one.py", dataset_name(method), "2d", "-tr", method.trainer, "-p",
         plans_name(row_and_count(name)[0]), "--fold", shop.fold_of_method(name), "--seed", seed, "--device",
         shop.device, *(["--adamw"] if method.adamw else []), log=log, nnUNet_results=str(shop.results(seed)),
         nnUNet_n_proc_DA=str(shop.workers))  # fmt: skip


# --- after training --------------------------------------------------------------------------------------------------


def predict(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    """Both modalities; nobody says which an image is of. Then the size of the file that holds what was learned."""
    assert isinstance(shop, AdaptWorkshop)
    output = shop.predictions(name, seed)
    if output.exists():
        return
    say(f"predict {name} seed {seed}")
    partial = fresh(output.with_name(f"{output.name}.partial"))
    model, flat = shop.fold(name, seed).parent, partial / "flat"
    begin = time.perf_counter()
    call("nnunet_multimodal", "predict", "-i", shop.work / "inputs", "-o", flat, "-m", model, "-f",
         shop.fold_of_method(name), "--device", shop.device, "-npp", "0", "-nps", "0", log=log)  # fmt: skip
    seconds = round(time.perf_counter() - begin, 1)
    (partial / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    for subject, contrast in shop.parts[2]:
        (partial / subject).mkdir(exist_ok=True)
        (flat / f"{case(subject, contrast)}{ENDING}").rename(partial / subject / f"{contrast}{ENDING}")
    (flat / "predictions.json").rename(partial / "predictions.json")
    shutil.rmtree(flat)
    if comparison_of(shop).methods[name].trainer.startswith(("nnUNetTrainerLoRA", "nnUNetTrainerMoA")):
        call("nnunet_multimodal", "adapt", "--export", model, "-f", shop.fold_of_method(name), "-o",
             partial / "adapter.pt", log=log)  # fmt: skip
    partial.rename(output)


def score(shop: Workshop, name: str, seed: int, log: TextIO) -> None:
    evaluate(shop, shop.predictions(name, seed), shop.scores(name, seed), log)


STEPS = (train_base, adapt, train_adapted, predict, score)


# --- table -----------------------------------------------------------------------------------------------------------


def summarise(shop: AdaptWorkshop, seeds: Iterable[int], names: Iterable[str]) -> dict[str, Any]:
    """What is there of each method: per seed the means in both modalities, and the training."""
    comparison, summary = comparison_of(shop), {}
    base = shop.predictions(BASE, 0)
    for name in names:
        results: dict[str, Any] = {}
        for seed in seeds:
            path = shop.scores(name, seed) / "evaluation.json"
            if not path.exists():
                continue
            rows, folder = read_rows(path), shop.predictions(name, seed)
            adapter = folder / "adapter.pt"
            training = json.loads((shop.fold(name, seed) / "training.json").read_text(encoding="utf-8"))
            results[str(seed)] = {
                **{metric: means_of(comparison, rows, metric, list(shop.organs)) for metric in METRICS},
                "old_as_base": same_as(shop, folder, base) if base.exists() else None,
                "adapter_bytes": adapter.stat().st_size if adapter.exists() else None,
                "training": training,
                "seconds_of_prediction": json.loads((folder / "seconds.json").read_text(encoding="utf-8")),
            }
        if results:
            first, summary[name] = comparison.methods[name], {"seeds": results}
            summary[name] |= {"trainer": first.trainer, "adamw": first.adamw}
            if name == BASE:
                summary[name]["settings"] = settings_of(shop, BASE)
            else:
                plans = shop.fold(name, int(next(iter(results)))).parent / "plans.json"
                content = json.loads(plans.read_text(encoding="utf-8"))["configurations"]["2d"]
                kept = {key: value for key, value in content[SECTION].items() if key != "starting_model"}
                summary[name]["settings"] = kept
    return summary


def means_of(comparison: AdaptComparison, rows: list[dict[str, Any]], metric: str, organs: list[str]) -> dict[str, Any]:
    """Of each contrast the mean, and that of each organ."""
    result: dict[str, Any] = {}
    for contrast in comparison.contrasts:
        found = [row for row in rows if row["contrast"] == contrast]
        result[contrast] = {
            "mean": mean_over(found, metric, organs),
            "organs": {organ: mean_over(found, metric, [organ]) for organ in organs},
        }
    return result


def same_as(shop: AdaptWorkshop, folder: Path, base: Path) -> float:
    """The share of voxels in the old modality's test images that have the base model's label."""
    old = comparison_of(shop).old
    shares = []
    for subject, contrast in shop.parts[2]:
        if contrast == old:
            ours, theirs = (np.asarray(nib.load(f / subject / f"{contrast}{ENDING}").dataobj) for f in (folder, base))
            shares.append(float((ours == theirs).mean()))
    return float(np.mean(shares))


def markdown(shop: AdaptWorkshop, summary: Mapping[str, Any]) -> str:
    """Dice in both modalities for each number of cases; then what each row learns."""
    comparison = comparison_of(shop)
    parts: list[str] = []
    counts = [count_name(count) for count in comparison.counts]
    total = len(shop.parts[1])
    shown = [row for row in comparison.rows if any(f"{row}-{count}" in summary for count in counts)]
    titles = [f"{total if count == 'all' else count} cases" for count in counts]
    for metric in METRICS:
        header = [metric_title(comparison, metric)]  # type: ignore[arg-type]
        header += [f"{contrast}, {title}" for contrast in comparison.contrasts[::-1] for title in titles]
        rows = []
        for row in (BASE, *shown):
            cells = []
            for contrast in comparison.contrasts[::-1]:
                for count in counts:
                    entry = summary.get(BASE if row == BASE else f"{row}-{count}")
                    cells.append(cell(of_seeds(entry, metric, contrast, "mean")) if entry else "-")
            rows.append([row, *cells])
        parts += [*lines(header, rows), ""]
    rows = []
    for row in (BASE, *shown):
        entry = summary.get(BASE if row == BASE else f"{row}-{counts[0]}")
        if entry is None:
            continue
        training = of_seeds(entry, "training")[0]
        size, same = of_seeds(entry, "adapter_bytes")[0], of_seeds(entry, "old_as_base")[0]
        original = of_seeds(summary[BASE], "training")[0]["parameters"] if BASE in summary else training["parameters"]
        learns = 0 if row == BASE else training["trainable_parameters"]
        seconds = np.median(of_seeds(entry, "training", "seconds_per_iteration"))
        rows.append(
            [
                row,
                f"{learns / 1e6:.3f} M",
                f"{100 * learns / original:.1f} %",
                "-" if size is None else f"{size / 1e6:.2f} MB",
                "-" if same is None else f"{100 * same:.3f} %",
                f"{training['iterations']}",
                f"{seconds:.3f}",
            ]
        )
    header = ["what learns", "parameters", "of the model", "adapter file", f"{comparison.old} voxels as base"]
    parts += [*lines([*header, "steps", "s / step"], rows)]
    return "\n".join(parts) + "\n"


def write_table(shop: Workshop, name: str, seeds: Sequence[int], methods: Sequence[str]) -> None:
    assert isinstance(shop, AdaptWorkshop)
    summary = summarise(shop, seeds, methods)
    if not summary:
        print("nothing is finished yet: no table")
        return
    comparison, devices = comparison_of(shop), devices_of(summary)
    base, new, tested = shop.parts
    measured = {
        "title": comparison.title,
        "base_subjects": base,
        "new_subjects": new,
        "tested": [f"{subject} {contrast}" for subject, contrast in tested],
        "nsd_tolerance_mm": comparison.nsd_tolerance,
        "trained_with": devices,
        "rates": comparison.rates,
        "not_measured": list(comparison.not_measured),
        "methods": summary,
    }
    note = (
        f"2d, {comparison.pixels:g} mm pixels, batch {comparison.batch_size}, all images z-scored, the last "
        "checkpoint; means over images within an organ, then over organs; predicted by `nnunet_multimodal predict`, "
        "which is not told the modality. One base model for all"
    )
    path = common.write_result(name, measured, note)
    text = f"{comparison.title}\n\n{markdown(shop, summary)}\nTrained with: {'; '.join(devices)}. {comparison.rates}\n"
    text += f"\n{note}.\n"
    if comparison.not_measured:
        text += f"\nNot measured: {'; '.join(comparison.not_measured)}.\n"
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\n{path} and {path.with_suffix('.md').name}")
