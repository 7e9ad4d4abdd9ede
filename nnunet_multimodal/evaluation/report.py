"""report.html: one file that needs nothing else, for looking at and for printing."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_multimodal.conversion.images import SUFFIXES, Volume, compare_geometry, read_volume, written_whole
from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.evaluation.cases import Case, Settings, describe_grids, read_prediction, read_reference
from nnunet_multimodal.evaluation.terminal import describe_unannotated, probability, share_below

WORST = 6
_TEMPLATE = "report.html.jinja"


def write_report(
    path: Path, content: Mapping[str, Any], cases: Sequence[Case], settings: Settings, images: Path | None
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: the HTML file.
        content: what goes into evaluation.json; names in it come from files and are escaped.
        cases: to read the volumes of the worst ones again.
        settings: what they were measured with.
        images: folder (or file, for one case) of images to draw on; None draws on the label maps.
    """
    page = (
        environment()
        .get_template(_TEMPLATE)
        .render(
            content=content,
            plots=_plots(content),
            unannotated=describe_unannotated(content),
            worst=_worst(content, {case.name: case for case in cases}, settings, images),
            tolerances=describe_tolerances(settings.tolerances),
        )
    )
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def environment() -> Any:
    """Jinja's, for the templates beside this file: all that comes from outside is escaped, nothing may be missing."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    made.filters |= {"score": _score, "mm": _mm, "below": share_below, "p": probability}
    return made


def _plots(content: Mapping[str, Any]) -> list[dict[str, str]]:
    from nnunet_multimodal.evaluation.pictures import box_plots

    organs = [*content["settings"]["labels"]]
    modalities = sorted({case["modality"] for case in content["cases"] if case["organs"]})
    settings = content["settings"]
    nsd = f"NSD (surface {settings['surface']}, {describe_tolerances(settings['tolerances_mm'])})"
    plots = []
    for metric, title in (("dsc", "DSC"), ("nsd", nsd)):
        values: dict[str, dict[str, list[float]]] = {o: {m: [] for m in modalities} for o in organs}
        for case in content["cases"]:
            for organ, measures in case["organs"].items():
                if measures[metric] is not None:
                    values[organ][case["modality"]].append(measures[metric])
        plots.append({"title": title, "picture": embed(box_plots(values, title))})
    return plots


def _worst(
    content: Mapping[str, Any], cases: Mapping[str, Case], settings: Settings, images: Path | None
) -> list[dict[str, Any]]:
    """The cases with the lowest Dice of any organ, each with its worst organ; those without a usable prediction
    are listed elsewhere."""
    from nnunet_multimodal.evaluation.pictures import overlay

    of_cases = []
    for case in content["cases"]:
        organs = [(m["dsc"], m["nsd"], name) for name, m in case["organs"].items() if m["dsc"] is not None]
        if organs and case["prediction"] is not None and not case["failed"]:
            of_cases.append((*min(organs), case))
    worst = []
    for _, _, organ, case in sorted(of_cases, key=lambda entry: (entry[0], entry[1], entry[3]["case"]))[:WORST]:
        try:
            reference = read_reference(cases[case["case"]])
            prediction, _ = read_prediction(Path(case["prediction"]), reference, settings.resample)
            image, note = _image(images, case["case"], reference)
            ids = settings.labels.organs[organ]
            picture = embed(overlay(prediction.data, reference, [ids] if isinstance(ids, int) else ids, image))
        except (DataProblem, OSError) as problem:  # changed since it was measured
            picture, note = None, str(problem)
        worst.append({**case, "organ": organ, **case["organs"][organ], "picture": picture, "note": note})
    return worst


def _image(images: Path | None, case: str, reference: Volume) -> tuple[np.ndarray | None, str | None]:
    """The image of a case on its reference's grid, or why there is none."""
    if images is None:
        return None, None
    names = [f"{case}{tail}{suffix}" for tail in ("", "_0000") for suffix in SUFFIXES]
    candidates = [images] if images.is_file() else [images / name for name in names]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return None, f"no image {case} (or {case}_0000) in {images}"
    try:
        image = read_volume(path, nan_to=0.0, reorthonormalize=True)
    except DataProblem as problem:
        return None, f"image not shown: {problem}"
    try:
        compare_geometry(reference, image, "image")
    except DataProblem:
        grids = describe_grids(image, reference)
        return None, f"image not shown: {path} is not on the grid of the reference {reference.path}: {grids}"
    return image.data, None


def describe_tolerances(tolerances: Mapping[str, float]) -> str:
    """``2 mm``, or ``2 mm, liver 3 mm``: the most frequent, then those that differ."""
    values = [*tolerances.values()]
    usual = max(sorted({*values}), key=values.count)
    others = [f"{name} {value:g} mm" for name, value in tolerances.items() if value != usual]
    return ", ".join([f"tolerance {usual:g} mm", *others])


def embed(png: bytes) -> str:
    """A picture as the ``src`` of an image."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _mm(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
