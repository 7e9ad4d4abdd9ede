"""How a project stands, out of a few indexed queries: a second for 100,000 cases."""

from __future__ import annotations

import json
from typing import Any

from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.relabel.cycles import open_cycle, stale
from nnunet_multimodal.relabel.ledger import ACCEPTED, PROPOSED, Row
from nnunet_multimodal.relabel.project import Project


def status(project: Project) -> dict[str, Any]:
    """What ``relabel status --json`` prints."""
    ledger = project.ledger
    states = ledger.counts()
    model = project.model()
    begun = open_cycle(project)
    data = begun["number"] if begun is not None else None if model is None else model["cycle"] or None
    changed, new = ([], []) if data is None else stale(project, data)
    predicted = 0
    if model is not None:
        query = (
            "SELECT count(*) FROM predictions p JOIN cases c ON c.id = p.case_id WHERE p.model = ? AND c.state = 'pool'"
        )
        predicted = ledger.value(query, model["id"])
    return {
        "project": str(project.folder),
        "labels": project.labels,
        "cases": sum(states.values()),
        "states": states,
        "modalities": modalities(project),
        "model": None if model is None else {key: model[key] for key in ("id", "cycle", "folder")},
        "predicted": predicted,
        "batches": batches(project),
        "cycles": cycles(project),
        "open_cycle": None if begun is None else begun["number"],
        "stale": {"cycle": data, "changed": changed, "new": new},
    }


def modalities(project: Project) -> dict[str, dict[str, int]]:
    """modality -> state -> number of cases; only if a modality is known."""
    rows = project.ledger.all("SELECT coalesce(modality, '-') m, state, count(*) n FROM cases GROUP BY m, state")
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        found.setdefault(row["m"], {})[row["state"]] = row["n"]
    return {} if set(found) == {"-"} else found


def batches(project: Project) -> list[dict[str, Any]]:
    """Each batch: by which cycle's model, in which order, how many cases, how many still to be corrected."""
    rows = project.ledger.all(
        "SELECT b.id, m.cycle, b.ordering, count(p.id) AS cases, "
        "sum(c.state = 'proposed' AND c.proposal = p.id) AS to_do, "
        "sum(c.state = 'accepted' AND c.proposal = p.id) AS done "
        "FROM batches b JOIN models m ON m.id = b.model LEFT JOIN proposals p ON p.batch = b.id "
        "LEFT JOIN cases c ON c.id = p.case_id GROUP BY b.id ORDER BY b.id"
    )
    return [{"batch": r["id"], "cycle": r["cycle"], "order": r["ordering"], "cases": r["cases"],
             "to_correct": r["to_do"] or 0, "accepted": r["done"] or 0} for r in rows]  # fmt: skip


def cycles(project: Project) -> list[dict[str, Any]]:
    """Each training: its state, options, and how many cases of each fold."""
    result = []
    for row in project.ledger.all("SELECT * FROM cycles ORDER BY number"):
        counts = project.ledger.all(
            "SELECT fold, count(*) FROM cycle_cases WHERE cycle = ? GROUP BY fold ORDER BY fold", row["number"]
        )
        options = json.loads(row["options"])
        folds = {str(each[0]): each[1] for each in counts}
        result.append({"cycle": row["number"], "state": row["state"], "cases": sum(folds.values()), "folds": folds,
                       "trainer": options["trainer"], "configuration": options["configuration"],
                       "trained_folds": options["folds"]})  # fmt: skip
    return result


def log(project: Project, limit: int | None, case: str | None = None) -> list[dict[str, Any]]:
    """The newest events first; ``limit`` None for all."""
    where, values = "", []
    if case is not None:
        (row,) = project.ledger.require_cases([case])
        where, values = "WHERE e.case_id = ?", [row["id"]]
    rows = project.ledger.all(
        "SELECT e.*, c.name, (SELECT u.id FROM events u WHERE u.undoes = e.id) AS undone_by FROM events e "
        f"LEFT JOIN cases c ON c.id = e.case_id {where} ORDER BY e.id DESC LIMIT ?",
        *values,
        -1 if limit is None else limit,
    )
    return [_event(row) for row in rows]


def _event(row: Row) -> dict[str, Any]:
    content = {key: row[key] for key in ("id", "operation", "time", "kind", "who", "undoes", "undone_by")}
    loaded = {key: None if row[key] is None else json.loads(row[key]) for key in ("before", "after", "details")}
    return {**content, "case": row["name"], **loaded}


def verify(project: Project) -> list[str]:
    """Reads everything again: ledger against events, every accepted and proposed mask, every image that was used."""
    from nnunet_multimodal.relabel.pool import checked_hash  # status itself reads no image

    problems = project.ledger.contradictions()
    rows = project.ledger.all("SELECT * FROM cases WHERE state IN (?, ?) OR image_hash IS NOT NULL", ACCEPTED, PROPOSED)
    for row in rows:
        wanted = [row["mask"]] if row["state"] == ACCEPTED else []
        if row["proposal"] is not None:
            wanted.append(project.ledger.value("SELECT mask FROM proposals WHERE id = ?", row["proposal"]))
        for mask in wanted:
            try:
                project.masks.read(mask)
            except DataProblem as problem:
                problems.append(f"{row['name']}: {problem}")
        try:
            checked_hash(row)
        except (DataProblem, OSError) as problem:
            problems.append(f"{row['name']}: {problem}")
    return problems
