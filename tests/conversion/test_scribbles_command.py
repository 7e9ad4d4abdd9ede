"""``scribbles simulate``: files, coverage, and what happens with a bad file among good ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny_data import AFFINE, Inputs, make_label, save

Call = Callable[..., tuple[int, str, str]]


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)


def test_folder(inputs: Inputs, call: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, error = call(["scribbles", "simulate", "--labels", str(inputs.labels), "-o", str(out)])
    assert code == 0, error
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "coverage.json"]
    drawn, label = voxels(out / "a.nii.gz"), make_label()
    assert set(np.unique(drawn)) == {0, 1, 2}
    assert (drawn[drawn > 0] == label[drawn > 0]).all()
    report = json.loads((out / "coverage.json").read_text(encoding="utf-8"))
    for organ in (1, 2):
        share = (drawn == organ).sum() / (label == organ).sum()
        assert report["coverage"]["a"][str(organ)] == pytest.approx(share, abs=1e-4)
        assert f"{organ} {share:.1%}" in text
    assert report["failed"] == {} and report["seed"] == 0
    assert np.allclose(nibabel.load(out / "a.nii.gz").affine, AFFINE)


def test_chosen_organs_slices_and_seed(inputs: Inputs, call: Call, tmp_path: Path) -> None:
    def simulate(name: str, *more: str) -> np.ndarray:
        words = ["scribbles", "simulate", "--labels", str(inputs.label()), "-o", str(tmp_path / name), *more]
        code, _, error = call(words)
        assert code == 0, error
        return voxels(tmp_path / name / "a.nii.gz")

    first = simulate("first", "--organs", "1", "--every", "4")
    assert set(np.unique(first)) == {0, 1}
    assert first.any(axis=(0, 1)).sum() == 1  # one of the four slices of organ 1
    assert (simulate("same", "--organs", "1", "--every", "4") == first).all()
    assert (simulate("other", "--organs", "1", "--every", "4", "--seed", "5") != first).any()


def test_bad_file_is_reported_and_the_rest_is_done(inputs: Inputs, call: Call, tmp_path: Path) -> None:
    inputs.label("a").write_bytes(b"")
    save(inputs.labels / "empty.nii.gz", np.zeros_like(make_label()))
    code, _, error = call(["scribbles", "simulate", "--labels", str(inputs.labels), "-o", str(tmp_path / "out")])
    assert code == 1
    assert "Cannot read" in error and "nothing to scribble on" in error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.nii.gz", "coverage.json"]
    failed = json.loads((tmp_path / "out" / "coverage.json").read_text(encoding="utf-8"))["failed"]
    assert sorted(Path(path).name for path in failed) == ["a.nii.gz", "empty.nii.gz"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--every", "0"], 2, "at least 1, found 0"),
        (["--organs", "0"], 2, "0 is background"),
        (["--organs", "9"], 4, "nothing to scribble on: found 0, 1, 2, wanted 9"),
        (["--style", "crayon"], 2, "invalid choice: 'crayon'"),
    ],
)
def test_wrong_options(options: list[str], code: int, message: str, inputs: Inputs, call: Call, tmp_path: Path) -> None:
    words = ["scribbles", "simulate", "--labels", str(inputs.label()), "-o", str(tmp_path / "out"), *options]
    found, _, error = call(words)
    assert (found, message in error) == (code, True), error
    assert not [*(tmp_path / "out").glob("*.nii.gz")]


def test_label_maps_are_never_overwritten(inputs: Inputs, call: Call) -> None:
    before = inputs.label().read_bytes()
    code, _, error = call(["scribbles", "simulate", "--labels", str(inputs.labels), "-o", str(inputs.labels)])
    assert code == 2 and "would be overwritten" in error
    assert inputs.label().read_bytes() == before
