"""Slice matching with numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nnunet_multimodal.data.slices import SliceMatch, match_slices, nearest_scribbled


def axial(slices_mm: float, start_mm: float = 0.0, x_mm: float = 0.0) -> np.ndarray:
    affine = np.diag([1.0, 1.0, slices_mm, 1.0])
    affine[:3, 3] = x_mm, 0, start_mm
    return affine


def tilted(degrees: float) -> np.ndarray:
    """Axial slices turned about the x axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(4)
    turn[1:3, 1:3] = [[c, -s], [s, c]]
    return turn @ axial(5)


@pytest.mark.parametrize(
    ("target", "count", "expected"),
    [
        (axial(5), 4, [0, 1, 2, 3]),
        (axial(10), 2, [0, 2]),
        (axial(5, 6.0), 4, [1, 2, 3, -1]),  # centres 6, 11, 16, 21; the last reference slice ends at 17.5
        (axial(5, -7.0), 4, [-1, 0, 1, 2]),  # centres -7, -2, 3, 8; the first begins at -2.5
        (axial(2, 1.0), 6, [0, 1, 1, 1, 2, 2]),  # centres 1, 3, 5, 7, 9, 11
    ],
)
def test_by_position(target: np.ndarray, count: int, expected: list[int]) -> None:
    match = match_slices(target, (count, 20, 20), axial(5), (4, 30, 30))
    assert match.method == "position"
    assert match.index.tolist() == expected


def test_slices_stored_top_down() -> None:
    upside_down = axial(-5, 15.0)
    match = match_slices(upside_down, (4, 20, 20), axial(5), (4, 20, 20))
    assert (match.method, match.index.tolist()) == ("position", [3, 2, 1, 0])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis(axis: int) -> None:
    """The same stack, with the slices along z, y or x."""
    shape = tuple(4 if other == axis else 20 for other in range(3))
    reference = np.eye(4)
    reference[2 - axis, 2 - axis] = 5
    target = reference.copy()
    target[2 - axis, 3] = 6
    match = match_slices(target, shape, reference, shape, slice_axis=axis)
    assert (match.method, match.index.tolist()) == ("position", [1, 2, 3, -1])


@pytest.mark.parametrize(
    ("why", "target"),
    [
        ("tilted by 25 degrees", tilted(25)),
        ("overlap of 9 of 20 mm", axial(5, 11.0)),
        ("beside it", axial(5, 0.0, x_mm=40.0)),
    ],
)
def test_by_order_where_frames_disagree(why: str, target: np.ndarray) -> None:
    match = match_slices(target, (4, 20, 20), axial(5), (7, 20, 20) if why.startswith("tilted") else (4, 20, 20))
    assert match.method == "order"
    assert match.index.tolist() == ([0, 2, 4, 6] if why.startswith("tilted") else [0, 1, 2, 3])


@pytest.mark.parametrize(("degrees", "method"), [(19, "position"), (21, "order")])
def test_tilt_limit(degrees: float, method: str) -> None:
    assert match_slices(tilted(degrees), (4, 20, 20), axial(5), (4, 20, 20)).method == method


@pytest.mark.parametrize(("start", "method"), [(9.5, "position"), (10.5, "order")])
def test_overlap_limit(start: float, method: str) -> None:
    """Both stacks are 20 mm long."""
    assert match_slices(axial(5, start), (4, 20, 20), axial(5), (4, 20, 20)).method == method


def test_short_target_inside_a_long_reference() -> None:
    """Half of the shorter extent has to overlap, so two slices anywhere in a long reference are matched by position."""
    match = match_slices(axial(5, 100.0), (2, 20, 20), axial(5), (40, 20, 20))
    assert (match.method, match.index.tolist()) == ("position", [20, 21])


@pytest.mark.parametrize(
    ("targets", "references", "expected"),
    [(5, 9, [0, 2, 4, 6, 8]), (3, 4, [0, 2, 3]), (4, 1, [0] * 4), (1, 5, [2]), (9, 3, [0, 0, 0, 1, 1, 1, 2, 2, 2])],
)
def test_relative_order(targets: int, references: int, expected: list[int]) -> None:
    """round(i (n_ref - 1) / (n_tgt - 1)), halves to the even number as Python's round."""
    match = match_slices(axial(5, 1000.0), (targets, 20, 20), axial(5), (references, 20, 20))
    assert match.method == "order"
    if targets > 1:
        assert expected == [round(i * (references - 1) / (targets - 1)) for i in range(targets)]
    assert match.index.tolist() == expected


def order(count: int) -> SliceMatch:
    return SliceMatch(np.arange(count), "order", np.arange(float(count)))


@pytest.mark.parametrize(
    ("scribbled", "reach", "expected"),
    [
        ([], math.inf, [-1, -1, -1, -1, -1, -1, -1]),
        ([3], 0.0, [-1, -1, -1, 3, -1, -1, -1]),
        ([3], 4.9, [-1, -1, -1, 3, -1, -1, -1]),
        ([3], 5.0, [-1, -1, 3, 3, 3, -1, -1]),
        ([3], math.inf, [3, 3, 3, 3, 3, 3, 3]),
        ([1, 5], 0.0, [-1, 1, 1, 1, 5, 5, -1]),  # slice 3 lies between them: the lower
        ([1, 2, 5], 10.0, [1, 1, 2, 2, 5, 5, 5]),
    ],
)
def test_serving_slices(scribbled: list[int], reach: float, expected: list[int]) -> None:
    mask = np.isin(np.arange(7), scribbled)
    assert nearest_scribbled(order(7), mask, reach, spacing_mm=5.0).tolist() == expected


def test_target_slices_outside_the_reference_are_served_within_reach_only() -> None:
    match = match_slices(axial(5, -10.0), (6, 20, 20), axial(5), (4, 20, 20))
    assert match.index.tolist() == [-1, -1, 0, 1, 2, 3]
    mask = np.array([True, False, False, False])
    assert nearest_scribbled(match, mask, 0.0, 5.0).tolist() == [-1, -1, 0, -1, -1, -1]
    assert nearest_scribbled(match, mask, 5.0, 5.0).tolist() == [-1, 0, 0, 0, -1, -1]
    assert nearest_scribbled(match, mask, math.inf, 5.0).tolist() == [0] * 6
