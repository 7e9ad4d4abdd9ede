"""What the cycles brought: how good the proposals were, how much was left to do, and which cases were worst.

report.html    curves, tables, pictures; one file
cases.csv      one row for each accepted case
organs.csv     one row for each accepted case and organ
report.json    all of it
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nnunet_multimodal import __version__
from nnunet_multimodal.conversion.dataset import write_json
from nnunet_multimodal.conversion.images import read_volume, written_whole
from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.evaluation.output import all_or_none, write_csv
from nnunet_multimodal.relabel.ledger import ACCEPTED
from nnunet_multimodal.relabel.pool import checked_hash, nifti_of
from nnunet_multimodal.relabel.project import Project, remove_partials
from nnunet_multimodal.relabel.status import batches, cycles

WORST = 6
GOOD_SHARE = 0.7  # of the edited voxels saved: from there on, proposals are worth their while (issue 6)
CASE_COLUMNS = (
    "case", "modality", "cycle", "batch", "who", "time", "minutes", "voxels", "changed", "saved", "mean_dsc", "doubts",
)  # fmt: skip
ORGAN_COLUMNS = ("case", "cycle", "organ", "dsc", "voxels", "added", "removed")
_TEMPLATE = "report.html.jinja"


def write_report(project: Project, output: Path) -> dict[str, Any]:
    """Writes the report's files, all or none; returns what is in report.json."""
    content = collect(project)
    if output.is_dir():
        remove_partials(output)
    with all_or_none(output) as folder:
        write_json(folder / "report.json", content)
        write_csv(
            folder / "cases.csv",
            CASE_COLUMNS,
            ({**case, "doubts": "; ".join(case["doubts"])} for case in content["cases"]),
        )
        write_csv(
            folder / "organs.csv",
            ORGAN_COLUMNS,
            (
                {"case": case["case"], "cycle": case["cycle"], "organ": organ, **measured}
                for case in content["cases"]
                for organ, measured in case["organs"].items()
            ),
        )
        with written_whole(folder / "report.html") as temporary:
            temporary.write_text(_page(project, content), encoding="utf-8")
    return content


def collect(project: Project) -> dict[str, Any]:
    """The accepted cases that stand, and means over them."""
    rows = project.ledger.all(
        "SELECT c.name, c.modality, e.who, e.time, e.details FROM cases c JOIN events e ON e.id = c.acceptance "
        "WHERE c.state = ? ORDER BY e.id",
        ACCEPTED,
    )
    cases = [_case(dict(row)) for row in rows]
    organs = [*project.organs]
    return {
        "project": project.folder.name,
        "nnunet_multimodal": __version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "labels": project.labels,
        "states": project.ledger.counts(),
        "trainings": cycles(project),
        "batches": batches(project),
        "curve": [
            _of_cycle(cycle, cases, organs) for cycle in sorted({c["cycle"] for c in cases if c["cycle"] is not None})
        ],
        "good_share": GOOD_SHARE,
        "good_from_cycle": good_from(cases),
        "cases": cases,
    }


def _case(row: Mapping[str, Any]) -> dict[str, Any]:
    details = json.loads(row["details"])
    dice = [each["dsc"] for each in details["organs"].values() if each["dsc"] is not None]
    changed, voxels = details["changed"], details["voxels"]
    return {
        "case": row["name"],
        "modality": row["modality"],
        "cycle": details.get("cycle"),
        "batch": details.get("batch"),
        "who": row["who"],
        "time": row["time"],
        "minutes": details["minutes"],
        "voxels": voxels,
        "changed": changed,
        "saved": None if changed is None or not voxels else 1 - changed / voxels,
        "mean_dsc": fmean(dice) if dice else None,
        "doubts": details["doubts"],
        "organs": {name: {"added": None, "removed": None, **each} for name, each in details["organs"].items()},
    }


def _of_cycle(cycle: int, cases: Sequence[Mapping[str, Any]], organs: Sequence[str]) -> dict[str, Any]:
    """Means over the cases that one cycle's model proposed."""
    mine = [case for case in cases if case["cycle"] == cycle]
    dice = {name: [c["organs"][name]["dsc"] for c in mine if c["organs"][name]["dsc"] is not None] for name in organs}
    of_organs = {name: fmean(values) if values else None for name, values in dice.items()}
    known = [value for value in of_organs.values() if value is not None]
    minutes = [case["minutes"] for case in mine if case["minutes"] is not None]
    return {
        "cycle": cycle,
        "cases": len(mine),
        "dsc": fmean(known) if known else None,
        "dsc_of_organs": of_organs,
        "changed_median": median(case["changed"] for case in mine),
        "voxels_median": median(case["voxels"] for case in mine),
        "saved": saved_share(mine),
        "minutes_median": median(minutes) if minutes else None,
        "unchanged": sum(case["changed"] == 0 for case in mine),
    }


def saved_share(cases: Sequence[Mapping[str, Any]]) -> float | None:
    """1 - (voxels changed) / (voxels that would have been drawn from empty), over all these cases together."""
    drawn = sum(case["voxels"] for case in cases)
    return 1 - sum(case["changed"] for case in cases) / drawn if drawn else None


def good_from(cases: Sequence[Mapping[str, Any]], share: float = GOOD_SHARE) -> int | None:
    """The first cycle from which on every cycle's proposals save at least this share; None if there is none."""
    found = None
    for cycle in sorted({case["cycle"] for case in cases if case["cycle"] is not None}, reverse=True):
        saved = saved_share([case for case in cases if case["cycle"] == cycle])
        if saved is None or saved < share:
            break
        found = cycle
    return found


# --- the page --------------------------------------------------------------------------------------------------------


def _page(project: Project, content: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "score": lambda value: "–" if value is None else f"{value:.3f}",
        "percent": lambda value: "–" if value is None else f"{100 * value:.0f} %",
        "count": lambda value: "–" if value is None else f"{value:,.0f}".replace(",", "\u202f"),
    }
    worst = _worst(project, content["cases"])
    page: str = environment.get_template(_TEMPLATE).render(content=content, plots=_plots(content), worst=worst)
    return page


def _plots(content: Mapping[str, Any]) -> list[dict[str, str]]:
    from nnunet_multimodal.relabel.pictures import curve, efforts

    points = content["curve"]
    if not points:
        return []
    across = "cycle of the model that proposed"
    organs = [name for name, value in content["labels"].items() if value and name != "ignore"]
    lines = {"mean": [(p["cycle"], p["dsc"]) for p in points if p["dsc"] is not None]}
    for name in organs:
        lines[name] = [(p["cycle"], p["dsc_of_organs"][name]) for p in points if p["dsc_of_organs"][name] is not None]
    plots = [{"title": "DSC of the proposals against the corrections", "png": _embed(curve(lines, across, "DSC"))}]
    saved = {"saved": [(p["cycle"], p["saved"]) for p in points if p["saved"] is not None]}
    title = "share of the edited voxels saved, compared with drawing from empty"
    plots.append({"title": title, "png": _embed(curve(saved, across, "saved"))})
    proposed = [case for case in content["cases"] if case["cycle"] is not None]
    changed = {p["cycle"]: [c["changed"] for c in proposed if c["cycle"] == p["cycle"]] for p in points}
    marks = {p["cycle"]: p["voxels_median"] for p in points}
    plots.append({"title": "voxels changed", "png": _embed(efforts(changed, "voxels changed", marks))})
    minutes = {
        p["cycle"]: [c["minutes"] for c in proposed if c["cycle"] == p["cycle"] and c["minutes"] is not None]
        for p in points
    }
    minutes = {cycle: values for cycle, values in minutes.items() if values}
    if minutes:
        plots.append({"title": "minutes of correction", "png": _embed(efforts(minutes, "minutes"))})
    return plots


def _worst(project: Project, cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cases whose proposals were worst in any organ, with pictures; of the newest cycle that has some."""
    from nnunet_multimodal.evaluation.pictures import overlay

    cycles_found = [case["cycle"] for case in cases if case["cycle"] is not None]
    entries = []
    for case in cases:
        dice = [(each["dsc"], name) for name, each in case["organs"].items() if each["dsc"] is not None]
        if case["cycle"] is not None and case["cycle"] == max(cycles_found) and dice:
            entries.append((*min(dice), case))
    result = []
    for dsc, organ, case in sorted(entries, key=lambda entry: (entry[0], entry[2]["case"]))[:WORST]:
        row = project.ledger.case(case["case"])
        assert row is not None
        try:
            proposed = project.ledger.value("SELECT mask FROM proposals WHERE id = ?", row["proposal"])
            accepted = project.masks.read(row["mask"])
            image_hash, _ = checked_hash(row)
            image = read_volume(nifti_of(row, image_hash, project.images), nan_to=0.0, reorthonormalize=True)
            picture = overlay(project.masks.read(proposed).data, accepted, [project.labels[organ]], image.data)
            result.append({"case": case, "organ": organ, "dsc": dsc, "png": _embed(picture), "note": None})
        except (DataProblem, OSError) as problem:
            result.append({"case": case, "organ": organ, "dsc": dsc, "png": None, "note": str(problem)})
    return result


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
