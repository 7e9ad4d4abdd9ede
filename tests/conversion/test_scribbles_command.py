"""``scribbles simulate``: files, coverage, and what happens with a bad file among good ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from tiny_data import AFFINE, Inputs, make_image, make_label, save

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


# --- styles, background, and the data set at once --------------------------------------------------------------------


@pytest.mark.parametrize("style", ["skeleton", "contour"])
@pytest.mark.parametrize("background", ["drawn", "erode"])
def test_files_that_import_takes(inputs: Inputs, call: Call, tmp_path: Path, style: str, background: str) -> None:
    out = tmp_path / "out"
    words = ["scribbles", "simulate", "--labels", str(inputs.labels), "-o", str(out)]
    words += ["--style", style, "--background", background]
    code, text, error = call(words)
    assert code == 0, error
    assert "scribbles import --images DIR" in text and "--unlabelled 255" in text
    drawn, label = voxels(out / "a.nii.gz"), make_label()
    assert set(np.unique(drawn)) == {0, 1, 2, 255}
    assert (drawn == label)[drawn != 255].all()
    report = json.loads((out / "coverage.json").read_text(encoding="utf-8"))
    assert (report["style"], report["background"], report["unlabelled"]) == (style, background, 255)
    assert report["coverage"]["a"]["0"] == pytest.approx((drawn == 0).sum() / (label == 0).sum(), abs=1e-4)
    (out / "coverage.json").unlink()
    words = ["scribbles", "import", "--images", str(inputs.images), "--scribbles", str(out), "--unlabelled", "255"]
    assert call([*words, "-d", "9", "--dense", str(inputs.labels)])[0] == 0


def test_background_does_not_change_the_organs(inputs: Inputs, call: Call, tmp_path: Path) -> None:
    words = ["scribbles", "simulate", "--labels", str(inputs.label())]
    assert call([*words, "-o", str(tmp_path / "with"), "--background", "drawn"])[0] == 0
    assert call([*words, "-o", str(tmp_path / "without")])[0] == 0
    drawn, alone = voxels(tmp_path / "with" / "a.nii.gz"), voxels(tmp_path / "without" / "a.nii.gz")
    assert ((drawn > 0) & (drawn < 255) == (alone > 0)).all()


def test_data_set_at_once(inputs: Inputs, call: Call) -> None:
    """Both organs merged, dense labels merged alike, two channels, nothing left behind."""
    channels = ["--images", f"T1={inputs.images}", f"T2={inputs.images}"]
    for path in [*inputs.images.iterdir()]:
        save(path.with_name(path.name.replace("_0000", "_0001")), make_image())
    words = ["scribbles", "simulate", "--labels", str(inputs.labels), *channels, "-d", "9", "--style", "skeleton"]
    code, text, error = call([*words, "--label-names", "tumour=1,2"])
    assert code == 0, error
    assert [path.name for path in inputs.raw.iterdir()] == ["Dataset009_Simulated"]
    made = inputs.raw / "Dataset009_Simulated"
    content = json.loads((made / "dataset.json").read_text(encoding="utf-8"))
    assert content["labels"] == {"background": 0, "tumour": 1, "ignore": 2}
    assert content["nnunet_multimodal"]["source"]["background"] == "drawn"
    drawn, label = voxels(made / "labelsTr" / "a.nii.gz"), make_label()
    assert set(np.unique(drawn)) == {0, 1, 2}
    assert ((drawn == 1) <= (label > 0)).all() and ((drawn == 0) <= (label == 0)).all()
    assert (voxels(made / "labelsTr_dense" / "a.nii.gz") == (label > 0)).all()
    assert "tumour:" in text and "nnUNetTrainerCmFNet" in text
    assert call(["doctor", "-d", "9"])[0] == 0
    before = (made / "labelsTr" / "a.nii.gz").read_bytes()
    assert call([*words, "--label-names", "tumour=1,2", "--overwrite"])[0] == 0
    assert voxels(made / "labelsTr" / "a.nii.gz").tobytes() == drawn.tobytes() and before


def test_data_set_of_some_organs(inputs: Inputs, call: Call, tmp_path: Path) -> None:
    """The other organ is background, and the scribble files stay where the user wants them."""
    words = ["scribbles", "simulate", "--labels", str(inputs.labels), "--images", str(inputs.images), "-d", "9"]
    code, _, error = call([*words, "--organs", "2", "-o", str(tmp_path / "kept"), "--background", "erode"])
    assert code == 0, error
    made = inputs.raw / "Dataset009_Simulated"
    assert (voxels(made / "labelsTr_dense" / "a.nii.gz") == (make_label() == 2)).all()
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["a.nii.gz", "b.nii.gz", "coverage.json"]


def test_patient_without_an_organ(inputs: Inputs, call: Call, tmp_path: Path) -> None:
    """Has background to draw on, and is of the data set; of files without any organ the user is told."""
    save(inputs.label("b"), np.zeros_like(make_label()))
    words = ["scribbles", "simulate", "--labels", str(inputs.labels)]
    code, _, error = call([*words, "--images", str(inputs.images), "-d", "9"])
    assert code == 0, error
    made = inputs.raw / "Dataset009_Simulated"
    assert set(np.unique(voxels(made / "labelsTr" / "b.nii.gz"))) == {0, 3}
    assert not voxels(made / "labelsTr_dense" / "b.nii.gz").any()
    code, _, error = call([*words, "-o", str(tmp_path / "out"), "--background", "erode", "--organs", "9"])
    assert code == 0 and "no label map holds any of the labels" in error
    assert set(np.unique(voxels(tmp_path / "out" / "a.nii.gz"))) == {0, 255}


def test_input_in_the_data_set_that_is_replaced(inputs: Inputs, call: Call) -> None:
    """It would be deleted, and the new data set's links lead nowhere."""
    old = inputs.raw / "Dataset009_Mine"
    inputs.images.parent.rename(old)
    images, labels = ["--images", str(old / "images")], ["--labels", str(old / "labels")]
    code, _, error = call(["scribbles", "simulate", *labels, *images, "-d", "9", "--overwrite"])
    assert code == 2 and "which --overwrite would delete" in error
    code, _, error = call(["convert", "plain", *images, *labels, "-d", "9", "--overwrite"])
    assert code == 2 and "which --overwrite would delete" in error
    assert [path.name for path in inputs.raw.iterdir()] == [old.name]
    assert len([*(old / "images").iterdir()]) == 2
    assert call(["scribbles", "simulate", *labels, *images, "-d", "8"])[0] == 0


def test_what_is_ignored_in_the_label_map_is_not_taken_for_background(
    inputs: Inputs, call: Call, tmp_path: Path
) -> None:
    words = ["scribbles", "simulate", "--labels", str(inputs.labels), "--label-names", "a=1", "b=2", "ignore=3"]
    assert call([*words, "--images", str(inputs.images), "-d", "8"])[0] == 0  # named, but nowhere
    label = make_label()
    label[..., 5] = 3
    save(inputs.label("b"), label)
    code, _, error = call([*words, "--images", str(inputs.images), "-d", "9"])
    assert code == 4 and "b.nii.gz has voxels labelled ignore (3)" in error
    code, _, error = call([*words, "-o", str(tmp_path / "out"), "--background", "erode"])
    assert code == 1 and "labelled ignore (3)" in error
    assert call([*words, "-o", str(tmp_path / "strokes")])[0] == 0  # of organs alone


def test_output_is_a_file(inputs: Inputs, call: Call) -> None:
    code, _, error = call(["scribbles", "simulate", "--labels", str(inputs.labels), "-o", str(inputs.image())])
    assert code == 2 and "is a file, expected a folder" in error


def test_background_within_the_body(inputs: Inputs, call: Call, tmp_path: Path) -> None:
    words = ["scribbles", "simulate", "--labels", str(inputs.labels), "-o", str(tmp_path / "out"), "--seed", "3"]
    image = np.zeros((40, 40, 6), np.int16)
    image[8:30, 8:30] = 100 + np.arange(22)[:, None, None]
    label = np.zeros(image.shape, np.uint8)
    label[12:20, 12:20, 2] = 1
    for case in "ab":
        save(inputs.image(case), image)
        save(inputs.label(case), label)
    code, _, error = call([*words, "--background", "drawn", "--within-body", "--images", str(inputs.images)])
    assert code == 0, error
    drawn = voxels(tmp_path / "out" / "a.nii.gz") == 0
    assert drawn.any() and not drawn[:5].any() and not drawn[:, 33:].any()  # the body is taken a little too large
    save(inputs.image("a"), image[:-1])
    inputs.image("b").unlink()
    code, _, error = call([*words, "--background", "drawn", "--within-body", "--images", str(inputs.images)])
    assert code == 4 and "has shape 40x40x6, its image" in error and "has no image of its name" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give a folder for the scribbles"),
        (["-d", "9"], "-d needs --images"),
        (["-o", "out", "--within-body"], "--within-body needs --images"),
        (["-o", "out", "--organs", "1", "--label-names", "a=1"], "both say which labels"),
        (["-o", "out", "--background", "crayon"], "invalid choice: 'crayon'"),
    ],
)
def test_wrong_combinations(options: list[str], message: str, inputs: Inputs, call: Call) -> None:
    code, _, error = call(["scribbles", "simulate", "--labels", str(inputs.label()), *options])
    assert (code, message in error) == (2, True), error


def test_bad_label_map_stops_the_data_set(inputs: Inputs, call: Call) -> None:
    inputs.label("a").write_bytes(b"")
    words = ["scribbles", "simulate", "--labels", str(inputs.labels), "--images", str(inputs.images), "-d", "9"]
    code, _, error = call(words)
    assert code == 4 and "Cannot read" in error
    assert not any(inputs.raw.iterdir())


def test_too_many_classes_for_a_background(inputs: Inputs, call: Call, tmp_path: Path) -> None:
    save(inputs.label("a"), make_label().astype(np.int16) * 255)
    words = ["scribbles", "simulate", "--labels", str(inputs.label("a")), "-o", str(tmp_path / "out")]
    code, _, error = call([*words, "--background", "drawn"])
    assert code == 4 and "has class 510; with background, classes up to 254" in error
    assert call(words)[0] == 0
