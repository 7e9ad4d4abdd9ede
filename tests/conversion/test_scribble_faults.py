"""Rows 22 to 28 of the faults, each by the real command: exit code, message, and nothing written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_data import AFFINE, SHAPE, make_image, make_label, save
from tiny_scribbles import Scribbled, make_scribbled, make_scribbles

Call = Callable[..., tuple[int, str, str]]
Fault = Callable[[Scribbled], list[str]]  # spoils the input, and returns options of the command

NAMED = ["--label-names", "liver=1", "spleen=2"]


@pytest.fixture
def scribbled(tmp_path: Path, nnunet_folders: dict[str, str]) -> Scribbled:
    return make_scribbled(tmp_path / "in", Path(nnunet_folders["nnUNet_raw"]))


def change(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> list[str]:
    save(path, array, affine)
    return []


def drawn(**changes: int) -> np.ndarray:
    """The scribbles with one voxel (10, 6, 2) changed."""
    array = make_scribbles().astype(np.int16)
    array[10, 6, 2] = changes["value"]
    return array


def mask_0_255(s: Scribbled) -> list[str]:
    return [*NAMED, *change(s.scribbles(), np.where(make_scribbles() == 1, 255, 0).astype(np.uint8))]


def mask_255_is_unlabelled(s: Scribbled) -> list[str]:
    return [*NAMED, *change(s.scribbles(), make_scribbles(unlabelled=255))]


def fractions(s: Scribbled) -> list[str]:
    return change(s.scribbles(), make_scribbles().astype(np.float32) * np.float32(0.9999))


def negative(s: Scribbled) -> list[str]:
    return change(s.scribbles(), drawn(value=-1))


def dense_fractions(s: Scribbled) -> list[str]:
    change(s.dense(), make_label().astype(np.float32) * np.float32(0.9999))
    return ["--dense", str(s.dense().parent)]


def undeclared(s: Scribbled) -> list[str]:
    return [*NAMED, *change(s.scribbles(), drawn(value=5))]


def gap(s: Scribbled) -> list[str]:
    return change(s.scribbles(), drawn(value=7))


def dense_undeclared(s: Scribbled) -> list[str]:
    change(s.dense(), np.where(make_label() == 2, 3, make_label()))
    return [*NAMED, "--dense", str(s.dense().parent)]


def ignore_twice(s: Scribbled) -> list[str]:
    return [*NAMED, "ignore=0"]


def all_empty(s: Scribbled) -> list[str]:
    for case in "ab":
        change(s.scribbles(case), np.full(SHAPE, 4, np.uint8))
    return []


def no_background(s: Scribbled) -> list[str]:
    for case in "ab":
        array = make_scribbles()
        array[array == 0] = 4
        change(s.scribbles(case), array)
    return []


def class_never_drawn(s: Scribbled) -> list[str]:
    return ["--label-names", "liver=1", "spleen=2", "kidney=3"]


def only_background(s: Scribbled) -> list[str]:
    for case in "ab":
        array = make_scribbles()
        array[(array == 1) | (array == 2)] = 4
        change(s.scribbles(case), array)
    return []


def dense_as_scribbles(s: Scribbled) -> list[str]:
    for case in "ab":
        change(s.scribbles(case), make_label())
    return []


def itk_snap_misread(s: Scribbled) -> list[str]:
    for case in "ab":
        change(s.scribbles(case), make_scribbles(unlabelled=0, background=3))
    return []


def outside_body(s: Scribbled) -> list[str]:
    """A body in the middle, and a stroke of the spleen in the corner far from it."""
    image = np.zeros((40, 40, 6), np.int16)
    image[12:26, 12:26] = 100
    array = np.full(image.shape, 4, np.uint8)
    array[14:18, 14, 2], array[14:18, 16, 2], array[3, 36, 3], array[:5, 1, 2] = 1, 2, 2, 0
    change(s.image(), image)
    return [*NAMED, *change(s.scribbles(), array)]


def other_shape(s: Scribbled) -> list[str]:
    return change(s.scribbles(), make_scribbles()[:-1])


def other_spacing(s: Scribbled) -> list[str]:
    return change(s.scribbles(), make_scribbles(), AFFINE @ np.diag([1, 1, 1.5, 1]))


def other_place(s: Scribbled) -> list[str]:
    moved = AFFINE.copy()
    moved[1, 3] += 3
    return change(s.scribbles(), make_scribbles(), moved)


def dense_other_shape(s: Scribbled) -> list[str]:
    change(s.dense(), make_label()[:-1])
    return ["--dense", str(s.dense().parent)]


def other_channel_grid(s: Scribbled) -> list[str]:
    for case in "ab":
        save(s.root / "ct" / f"{case}.nii.gz", make_image()[:-1])
    return ["--images", f"MR={s.image().parent}", f"CT={s.root / 'ct'}"]


def scribble_missing(s: Scribbled) -> list[str]:
    s.scribbles("b").rename(s.scribbles("c"))
    return []


def dense_of_nobody(s: Scribbled) -> list[str]:
    s.dense("b").rename(s.dense("c"))
    return ["--dense", str(s.dense().parent)]


def truncated(s: Scribbled) -> list[str]:
    s.scribbles().write_bytes(s.scribbles().read_bytes()[:60])
    return []


def not_ct(s: Scribbled) -> list[str]:
    return ["--channel-name", "CT", "--strict"]


def zero_is_nothing_known(s: Scribbled) -> list[str]:
    for case in "ab":
        scribbles = make_scribbles(background=9)
        scribbles[2:14, 10, 2] = 0
        save(s.scribbles(case), scribbles)
    return ["--background-label", "9"]


FAULTS: dict[str, tuple[Fault, int, str]] = {
    "9 scribbles missing": (scribble_missing, 4, r"(?s)1 images without a scribble file: b.*1 .*without an image: c"),
    "9 dense without image": (dense_of_nobody, 4, r"1 dense labels in .* without an image: c"),
    "11 truncated": (truncated, 4, r"Cannot read .*scribbles/a\.nii\.gz"),
    "21 no CT": (not_ct, 4, r"(?s)case a: CT has no value below -200.*case b"),
    "23 mask of 0 and 255": (mask_0_255, 4, r"a\.nii\.gz holds a 0/255 mask, found 255 \(3 voxels\).*--unlabelled 255"),
    "23 255 unlabelled": (mask_255_is_unlabelled, 4, r"undeclared labels, found 255 \(\d+ voxels\).*--unlabelled 255"),
    "23 fractions": (fractions, 4, r"no whole numbers, found 0\.9999 \(3 voxels\), .*never rounded"),
    "23 negative": (negative, 4, r"negative labels, found -1 \(1 voxel\)"),
    "23 dense fractions": (dense_fractions, 4, r"dense/a\.nii\.gz holds values that are no whole numbers"),
    "24 undeclared": (undeclared, 4, r"undeclared labels, found 5 \(1 voxel\), declared 0, 1, 2, 4"),
    "24 zero": (zero_is_nothing_known, 4, r"undeclared labels, found 0 \(12 voxels\).*--unlabelled 0; if it is backgr"),
    "24 gap": (gap, 4, r"gaps: found 1, 2, 7, but not 3, 5, 6"),
    "24 dense undeclared": (dense_undeclared, 4, r"dense/a\.nii\.gz holds undeclared labels, found 3"),
    "25 ignore is another value": (ignore_twice, 2, r"--unlabelled is 4, but the label names have ignore=0"),
    "26 nobody drew": (all_empty, 4, r"Nobody drew on any of the 2 cases: all voxels are 4"),
    "no background": (no_background, 4, r"background \(0\) is drawn in no case\. .*everything becomes foreground"),
    "class never drawn": (class_never_drawn, 4, r"kidney \(3\): drawn in no case"),
    "only background": (only_background, 4, r"No class is drawn in any case"),
    "dense labels": (dense_as_scribbles, 4, r"has the unlabelled value 4; found 0, 1, 2\. .*scribbles simulate"),
    "ITK-SNAP misread": (itk_snap_misread, 4, r"0 fills 98\.\d% .*--unlabelled 0 --background-label N"),
    "27 outside the body": (
        outside_body,
        4,
        r"scribbles/a\.nii\.gz has 1 scribbled voxels outside the body \(spleen\), the first at voxel \(36, 36, 3\)",
    ),
    "28 other shape": (other_shape, 4, r"scribble .*scribbles/a\.nii\.gz has shape 15x14x6, its image .* 16x14x6"),
    "28 other spacing": (other_spacing, 4, r"scribble .*a\.nii\.gz has spacing \(1\.5, 1\.5, 9\.0\) mm, its image"),
    "28 other place": (other_place, 4, r"scribble .*a\.nii\.gz does not lie where .* origin by 3\.00 mm"),
    "28 dense": (dense_other_shape, 4, r"dense label .*dense/a\.nii\.gz has shape 15x14x6"),
    "28 channels": (other_channel_grid, 4, r"channel .*ct/a\.nii\.gz has shape 15x14x6, its image .*images/a\.nii\.gz"),
}


@pytest.mark.parametrize(("fault", "code", "message"), FAULTS.values(), ids=[*FAULTS])
def test_fault(fault: Fault, code: int, message: str, scribbled: Scribbled, call: Call) -> None:
    options = fault(scribbled)
    found, _, error = call(scribbled.arguments(*options))
    assert found == code, error
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not any(scribbled.raw.iterdir())


@pytest.mark.parametrize(
    ("options", "unlabelled", "message"),
    [
        ([], "0", "--background-label N; if nobody drew background, pass --no-background"),
        (["--background-label", "1", *NAMED], "4", "liver cannot be 1, which is drawn background"),
        (["--label-names", "liver=4"], "4", "liver cannot be 4, which is --unlabelled"),
        (["--label-names", "liver=1", "spleen=1,2"], "4", "Label ids must differ, found 1 for liver, spleen"),
        (["--label-names", "liver=1", "liver=2"], "4", "liver more than once"),
        (["--label-names", "liver"], "4", "expected NAME=ID"),
        (["--label-names", "background=1", "liver=2"], "4", "label names have background=1"),
        (["--label-names", "background=0"], "4", "hold no class"),
        (["-d", "1000"], "4", "from 1 to 999"),
        (["--images", "/nowhere"], "4", "No such folder of MR images: /nowhere"),
    ],
)
def test_usage(options: list[str], unlabelled: str, message: str, scribbled: Scribbled, call: Call) -> None:
    code, _, error = call(scribbled.arguments(*options, unlabelled=unlabelled))
    assert (code, message in error) == (2, True), error
    assert not any(scribbled.raw.iterdir())


def test_unlabelled_value_has_to_be_told(scribbled: Scribbled, call: Call) -> None:
    words = scribbled.arguments()
    at = words.index("--unlabelled")
    code, _, error = call(words[:at] + words[at + 2 :])
    assert code == 2 and "--unlabelled N" in error


def test_used_id_is_refused_and_replaced_on_demand(scribbled: Scribbled, call: Call) -> None:
    assert call(scribbled.arguments())[0] == 0
    code, _, error = call(scribbled.arguments("--name", "Other"))
    assert code == 2 and "Data set 7 exists" in error
    negative(scribbled)
    before = sorted(path.relative_to(scribbled.raw) for path in scribbled.raw.rglob("*"))
    assert call(scribbled.arguments("--overwrite"))[0] == 4  # the old one stays
    assert sorted(path.relative_to(scribbled.raw) for path in scribbled.raw.rglob("*")) == before


def test_interrupted_leaves_nothing(scribbled: Scribbled, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_multimodal.conversion.scribble_dataset._place_labels", stop)
    assert call(scribbled.arguments())[0] == 130
    assert not any(scribbled.raw.iterdir())


# --- what is allowed on demand ---------------------------------------------------------------------------------------


def test_case_that_nobody_drew_on(scribbled: Scribbled, call: Call, caplog: pytest.LogCaptureFixture) -> None:
    """Row 26: left out and named, or kept."""
    change(scribbled.scribbles("b"), np.full(SHAPE, 4, np.uint8))
    assert call(scribbled.arguments())[0] == 0
    assert "1 cases that nobody drew on are left out: b" in caplog.text
    content = json.loads((scribbled.dataset / "dataset.json").read_text(encoding="utf-8"))
    assert content["numTraining"] == 1
    assert [path.name for path in (scribbled.dataset / "labelsTr").iterdir()] == ["a.nii.gz"]
    report = json.loads((scribbled.dataset / "coverage.json").read_text(encoding="utf-8"))
    assert report["not_drawn_on"] == ["b"] and [*report["cases"]] == ["a"]

    assert call(scribbled.arguments("--keep-empty", "--overwrite"))[0] == 0
    assert "are kept: b" in caplog.text
    assert len([*(scribbled.dataset / "labelsTr").iterdir()]) == 2
    code, text, _ = call(["doctor", "-d", "7"])
    assert code == 0 and "! 1 cases have no annotated voxel: b" in text


def test_without_background(scribbled: Scribbled, call: Call, caplog: pytest.LogCaptureFixture) -> None:
    no_background(scribbled)
    assert call(scribbled.arguments("--no-background"))[0] == 0
    assert "nobody drew background" in caplog.text
    code, text, _ = call(["doctor", "-d", "7"])
    assert code == 4 and "background (0) is drawn in no case" in text and "everything becomes foreground" in text


def test_outside_the_body_on_demand(scribbled: Scribbled, call: Call) -> None:
    options = outside_body(scribbled)
    assert call(scribbled.arguments(*options, "--allow-outside-body"))[0] == 0


def test_background_may_be_drawn_in_the_air(scribbled: Scribbled, call: Call) -> None:
    array = make_scribbles()
    array[0, :, 2] = 0
    change(scribbled.scribbles(), array)
    assert call(scribbled.arguments())[0] == 0


def test_header_of_the_image_on_demand(scribbled: Scribbled, call: Call) -> None:
    other_place(scribbled)
    assert call(scribbled.arguments("--fix-header"))[0] == 0
    assert call(["doctor", "-d", "7"])[0] == 0


def test_mr_in_a_channel_called_ct_is_a_warning(
    scribbled: Scribbled, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    assert call(scribbled.arguments("--channel-name", "CT"))[0] == 0
    assert "case a: CT has no value below -200" in caplog.text


# --- doctor, and the other converters --------------------------------------------------------------------------------


def spoil_labels(labels: dict[str, int]) -> Callable[[Scribbled], None]:
    def spoil(s: Scribbled) -> None:
        path = s.dataset / "dataset.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["labels"] = labels
        path.write_text(json.dumps(content), encoding="utf-8")

    return spoil


def replace_labels(array: np.ndarray, part: str = "labelsTr") -> Callable[[Scribbled], None]:
    def spoil(s: Scribbled) -> None:
        for case in "ab":
            path = s.dataset / part / f"{case}.nii.gz"
            path.unlink()
            save(path, array)

    return spoil


def rename_dense(s: Scribbled) -> None:
    (s.dataset / "labelsTr_dense" / "a.nii.gz").rename(s.dataset / "labelsTr_dense" / "z.nii.gz")


WITHOUT_2 = np.where(make_scribbles(unlabelled=3) == 2, 3, make_scribbles(unlabelled=3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        (spoil_labels({"background": 0, "liver": 1, "ignore": 2, "spleen": 3}), 4, "ignore must be 4 .* found 2"),
        (spoil_labels({"background": 0, "liver": 1, "spleen": 2, "Ignore": 3}), 4, "must be named 'ignore'"),
        (spoil_labels({"background": 0, "liver": 1, "ignore": 2}), 4, r"undeclared labels, found 3 .*declared 0\.\.2"),
        (replace_labels(WITHOUT_2), 4, "spleen: drawn in no case"),
        (replace_labels(np.full(SHAPE, 3, np.uint8)), 4, "Nobody drew on any of the 2 cases"),
        (replace_labels(make_label()), 0, r"ignore \(3\) is declared, but in no label file: are these dense"),
        (replace_labels(make_scribbles(3), "labelsTr_dense"), 4, "labelsTr_dense/a.nii.gz holds undeclared labels"),
        (replace_labels(make_label()[:-1], "labelsTr_dense"), 4, "dense label .* has shape 15x14x6"),
        (rename_dense, 4, "1 files in labelsTr_dense are of no case: z"),
    ],
)
def test_doctor_on_a_spoilt_data_set(
    spoil: Callable[[Scribbled], None], code: int, message: str, scribbled: Scribbled, call: Call
) -> None:
    assert call(scribbled.arguments(*NAMED, "--dense", str(scribbled.dense().parent)))[0] == 0
    assert call(["doctor", "-d", "7"])[0] == 0
    spoil(scribbled)
    found, text, _ = call(["doctor", "-d", "7"])
    assert found == code, text
    assert re.search(message, text), text


@pytest.mark.parametrize(("names", "found"), [(["a=1", "b=2", "ignore=0"], "0"), (["a=1", "ignore=2", "b=3"], "2")])
def test_ignore_of_other_converters_is_the_highest(
    names: list[str], found: str, scribbled: Scribbled, call: Call
) -> None:
    """Row 25."""
    folders = ["--images", str(scribbled.image().parent), "--labels", str(scribbled.scribbles().parent)]
    code, _, error = call(["convert", "plain", *folders, "-d", "8", "--label-names", *names])
    assert code == 4, error
    assert re.search(rf"(found {found}|differ, found 0)", error), error
    assert not any(scribbled.raw.iterdir())


def test_ct_window_for_mr(scribbled: Scribbled, call: Call) -> None:
    """Row 22: a channel called CT in a data set of MR."""
    assert call(scribbled.arguments("--channel-name", "CT", "--patient-pattern", "."))[0] == 0
    path = scribbled.dataset / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["nnunet_multimodal"]["modalities"] = ["MR"]
    content["nnunet_multimodal"]["case_modality"] = {"a": "MR", "b": "MR"}
    path.write_text(json.dumps(content), encoding="utf-8")
    code, text, _ = call(["doctor", "-d", "7"])
    assert code == 4 and "channel name 'CT' turns on CT clipping for MR" in text
