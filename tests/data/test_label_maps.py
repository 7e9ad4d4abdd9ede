"""MRSegmentator's 40 classes and the label maps, against what the projects themselves publish."""

from __future__ import annotations

import pytest

from nnunet_multimodal.data.label_maps import LABEL_MAPS, MRSEGMENTATOR, find_label_map
from nnunet_multimodal.errors import UsageError

# As in MRSegmentator's evaluation/mappings.py and metadata/total2new.json; 0 is background there.
AMOS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 20, 6: 5, 7: 6, 8: 13, 9: 14, 10: 7, 11: 8, 12: 9, 13: 22, 14: 0, 15: 0}
MR_56 = {
    **{i: i for i in range(1, 12)}, 12: 20, 13: 21, 14: 22, 15: 23, 16: 24, 18: 26, 19: 25, 22: 12, 23: 13, 24: 14,
    25: 15, 26: 16, 27: 17, 28: 18, 29: 19, 34: 29, 35: 30, 36: 27, 37: 28, 38: 35, 39: 36, 40: 37, 41: 38, 42: 39,
    43: 40, 44: 31, 45: 32, 46: 33, 47: 34,
}  # fmt: skip
CT = {
    **{i: i for i in range(1, 10)}, 10: 10, 11: 10, 12: 11, 13: 11, 14: 11, 15: 20, 18: 21, 19: 22, 20: 23, 21: 24,
    25: 26, **dict.fromkeys(range(26, 51), 25), 51: 12, 52: 13, 63: 14, 64: 15, 65: 16, 66: 17, 67: 18, 68: 19, 75: 29,
    76: 30, 77: 27, 78: 28, 80: 35, 81: 36, 82: 37, 83: 38, 84: 39, 85: 40, 86: 31, 87: 32, 88: 33, 89: 34,
}  # fmt: skip


def published(name: str) -> dict[int, int]:
    """Our map in their terms: id of the data set -> id of MRSegmentator, without those that become background."""
    return {
        value: MRSEGMENTATOR.index(ours) + 1 for ours, values in find_label_map(name).ids().items() for value in values
    }


@pytest.mark.parametrize(
    ("name", "expected"), [("amos", AMOS), ("totalsegmentator_mr_56", MR_56), ("totalsegmentator_ct", CT)]
)
def test_maps_are_the_published_ones(name: str, expected: dict[int, int]) -> None:
    assert published(name) == {theirs: ours for theirs, ours in expected.items() if ours}


def test_the_forty_classes() -> None:
    assert len(MRSEGMENTATOR) == len(set(MRSEGMENTATOR)) == 40
    numbers = {name: number for number, name in enumerate(MRSEGMENTATOR, start=1)}
    assert [numbers[name] for name in ("spleen", "right_kidney", "left_kidney", "left_lung", "heart")] == [
        1,
        2,
        3,
        10,
        12,
    ]
    assert [numbers[name] for name in ("spine", "left_hip", "right_gluteus_minimus")] == [25, 27, 40]


@pytest.mark.parametrize("name", LABEL_MAPS)
def test_names_exist_and_ids_are_whole(name: str) -> None:
    entry = LABEL_MAPS[name]
    assert sorted(entry.classes.values()) == [*range(1, len(entry.classes) + 1)]
    assert set(entry.names.values()) <= {*MRSEGMENTATOR}
    assert entry.ids().keys() <= {*MRSEGMENTATOR} and not entry.left_out().keys() & entry.names.keys()
    used = [value for values in entry.ids().values() for value in values]
    assert sorted([*used, *entry.left_out().values()]) == [*range(1, len(entry.classes) + 1)], "each id once"
    assert list(entry.ids()) == [organ for organ in MRSEGMENTATOR if organ in entry.ids()], "in the order of the 40"


def test_sizes_and_the_trap_between_the_two_mr_releases() -> None:
    assert {name: len(entry.classes) for name, entry in LABEL_MAPS.items()} == {
        "amos": 15, "totalsegmentator_ct": 117, "totalsegmentator_mr": 50, "totalsegmentator_mr_56": 56,
    }  # fmt: skip
    new, old = find_label_map("totalsegmentator_mr").ids(), find_label_map("totalsegmentator_mr_56").ids()
    assert new["left_femur"] == [36] and old["left_femur"] == [34]
    assert new["right_iliopsoas_muscle"] == [49] and old["right_iliopsoas_muscle"] == [47]
    assert all(len(find_label_map(f"totalsegmentator_{kind}").ids()) == 40 for kind in ("ct", "mr", "mr_56"))


def test_an_unknown_map_is_named() -> None:
    with pytest.raises(UsageError, match=r"no label map 'total'.*totalsegmentator_mr_56 .*56 classes"):
        find_label_map("total")
