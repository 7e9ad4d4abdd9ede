"""The page at the end: what was drawn, what was found, how well, and by which commands; one self-contained file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_multimodal.conversion.images import written_whole
from nnunet_multimodal.demo.recipe import REFERENCE, Options
from nnunet_multimodal.evaluation.summary import ALL_ORGANS, find_row
from nnunet_multimodal.programs import duration

_TEMPLATE = "story.html.jinja"


def results(evaluation: Mapping[str, Any], contrasts: Sequence[str]) -> dict[str, Any]:
    """DSC and NSD by contrast: all organs, then each; None where undefined."""
    rows = evaluation["summary"]
    organs = [ALL_ORGANS, *evaluation["settings"]["labels"]]
    of_contrasts: dict[str, Any] = {}
    for contrast in contrasts:
        found = {organ: find_row(rows, "modality", contrast, organ) for organ in organs}
        of_contrasts[contrast] = {
            organ: {"DSC": _rounded(row["dsc_mean"]), "NSD": _rounded(row["nsd_mean"])} for organ, row in found.items()
        }
    return of_contrasts


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def write_story(
    path: Path, folder: Path, options: Options, steps: Mapping[str, Any], environment: Mapping[str, str]
) -> None:
    """Write the page, whole or not at all.

    Args:
        path: the HTML file.
        folder: of the demo, with ``found``, ``evaluation`` and ``subjects``.
        options: of the demo.
        steps: as demo.json has them.
        environment: the variables that the commands ran with.
    """
    import jinja2

    evaluation = json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    report = folder / "evaluation" / "report.html"
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    pages.filters |= {"duration": duration, "score": lambda value: "–" if value is None else f"{value:.3f}"}
    page = pages.get_template(_TEMPLATE).render(
        reference=REFERENCE,
        options=options,
        table=results(evaluation, options.contrasts),
        organs=[ALL_ORGANS, *evaluation["settings"]["labels"]],
        tolerances=sorted(set(evaluation["settings"]["tolerances_mm"].values())),
        subjects=_pictures(folder, options.contrasts),
        environment=environment,
        steps=steps,
        total=sum(step["seconds"] for step in steps.values()),
        evaluation=report.read_text(encoding="utf-8"),
    )
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _pictures(folder: Path, contrasts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Subject -> contrast -> the overlay that `refer` made, as base64 of a PNG."""
    subjects: dict[str, dict[str, str]] = {}
    for subject in sorted(path.name for path in (folder / "subjects").iterdir()):
        files = {contrast: folder / "found" / "overlays" / f"{subject}_{contrast}.png" for contrast in contrasts}
        subjects[subject] = {
            contrast: base64.b64encode(file.read_bytes()).decode("ascii") for contrast, file in files.items()
        }
    return subjects
