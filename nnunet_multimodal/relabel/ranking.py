"""Which cases of the pool come next."""

from __future__ import annotations

import numpy as np

from nnunet_multimodal.relabel.ledger import POOL, Ledger, Row

ORDERS = {
    "uncertainty": "those first on which the model's folds disagree most (needs a prediction of the whole pool)",
    "random": "drawn by chance: what a fair curve of the report needs",
    "first": "in the order of registration",
}


def pool_in_order(ledger: Ledger, order: str, seed: int, limit: int | None = None) -> list[int]:
    """The ids of the pool in the order in which they are to be looked at; no prediction is needed.

    Args:
        ledger: of the project.
        order: ``first``, or else in random order.
        seed: of the order; the batches of a project have seeds of their own.
        limit: how many at most.
    """
    ids = [row[0] for row in ledger.all("SELECT id FROM cases WHERE state = ? ORDER BY id", POOL)]
    if order != "first":
        ids = [ids[index] for index in np.random.default_rng(seed).permutation(len(ids))]
    return ids[:limit]


def most_uncertain(ledger: Ledger, model: int, limit: int, among: set[int] | None = None) -> list[Row]:
    """Cases of the pool (``id``, ``name``, ``score``) that a model is least sure of; among equals the first.

    Args:
        ledger: of the project.
        model: whose predictions.
        limit: how many.
        among: only these; None for all.
    """
    found = []
    rows = ledger.connection.execute(
        "SELECT c.id, c.name, p.score FROM predictions p JOIN cases c ON c.id = p.case_id "
        "WHERE p.model = ? AND c.state = ? ORDER BY p.score DESC, c.id",
        (model, POOL),
    )
    for row in rows:
        if among is None or row["id"] in among:
            found.append(row)
        if len(found) == limit:
            break
    return found
