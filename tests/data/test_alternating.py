"""Cross-check 17 of methods.md: the order and the number of batches."""

from __future__ import annotations

import itertools

import pytest

from nnunet_multimodal.data.alternating import Alternating, rounds
from nnunet_multimodal.errors import UsageError


def test_ct_and_mr_in_turn_the_shorter_one_cycled() -> None:
    ct, mr = [f"ct{i}" for i in range(3)], [f"mr{i}" for i in range(7)]
    steps = list(itertools.islice(Alternating({"CT": ct, "MR": mr}), 2 * max(len(ct), len(mr))))
    assert steps == [
        "ct0", "mr0", "ct1", "mr1", "ct2", "mr2", "ct0", "mr3", "ct1", "mr4", "ct2", "mr5", "ct0", "mr6",
    ]  # fmt: skip


def test_three_modalities_in_their_order() -> None:
    loaders = {name: itertools.repeat(name) for name in ("MR", "CT", "PET")}
    assert list(itertools.islice(Alternating(loaders), 7)) == ["MR", "CT", "PET", "MR", "CT", "PET", "MR"]


def test_goes_on_where_it_was() -> None:
    whole = Alternating({"CT": itertools.repeat("CT"), "MR": itertools.repeat("MR")}, {"CT": 2})
    order = list(itertools.islice(whole, 20))
    assert order[:6] == ["CT", "MR", "CT"] * 2
    for step in range(10):
        whole.start_at(step)
        assert list(itertools.islice(whole, 5)) == order[step : step + 5]


@pytest.mark.parametrize(
    ("ratio", "order"),
    [
        ({}, ["CT", "MR"]),
        ({"CT": 3}, ["CT", "MR", "CT", "CT"]),
        ({"CT": 2, "MR": 2}, ["CT", "MR", "CT", "MR"]),
        ({"MR": 3}, ["CT", "MR", "MR", "MR"]),
    ],
)
def test_a_round_holds_each_as_often_as_its_ratio(ratio: dict[str, int], order: list[str]) -> None:
    assert rounds(["CT", "MR"], ratio) == order


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        ({"PET": 1}, "'PET'; the modalities are CT, MR"),
        ({"CT": 0}, "of CT has to be a whole number from 1 on, found 0"),
        ({"CT": 1.5}, "found 1.5"),
        ({"CT": True}, "found True"),
    ],
)
def test_a_wrong_ratio_is_named(ratio: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rounds(["CT", "MR"], ratio)


def test_finishes_every_loader() -> None:
    finished = []

    class Loader:
        def __init__(self, name: str) -> None:
            self.name = name

        def __iter__(self):
            return iter([self.name])

        def _finish(self) -> None:
            finished.append(self.name)

    Alternating({"CT": Loader("CT"), "MR": Loader("MR"), "list": ["no workers"]})._finish()
    assert finished == ["CT", "MR"]
