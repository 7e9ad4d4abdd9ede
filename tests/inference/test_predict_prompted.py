"""predict by text, points and boxes, through the command: what is written, what is refused, what a study measures."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import tifffile
import torch
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_segvol import echo, segvol_model
from tiny_volumes import volume_model
from torch import Tensor

from nnunet_multimodal.cli import main
from nnunet_multimodal.environment import extension_value
from nnunet_multimodal.inference.prompted import Asker, Question
from nnunet_multimodal.inference.prompts import Located
from nnunet_multimodal.networks.segvol import Prompts, SegVolNetwork

AFFINE = np.array([[2.0, 0, 0, -15], [0, 2.0, 0, -20], [0, 0, 2.0, 30], [0, 0, 0, 1]])
SHAPE = (20, 26, 18)  # x, y, z: several windows of 12 x 16 x 8
LIVER = (slice(3, 9), slice(4, 12), slice(2, 7))
SPLEEN = (slice(12, 18), slice(15, 22), slice(9, 16))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_compile", "f")
        patch.setenv("nnUNet_extTrainer", extension_value())
        (root / "raw/Dataset001_Tiny").mkdir()
        itk = {"image_reader_writer": "SimpleITKIO"}
        yield {
            "segvol": segvol_model(folds=(0, 1)),
            "itk": segvol_model(name="nnUNetTrainerSegVol_2epochs", top=itk),
            "stock": volume_model(3),
            "tiff": tiff_model(),
        }


def tiff_model() -> Path:
    folder = segvol_model(name="nnUNetTrainerSegVol_5epochs", top={"image_reader_writer": "Tiff3DIO"})
    dataset = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps({**dataset, "file_ending": ".tif"}), encoding="utf-8")
    return folder


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[Prompts]:
    """The networks answer what they are asked (tiny_segvol.echo); all questions are kept."""
    asked: list[Prompts] = []

    def answer(network: SegVolNetwork, features: Tensor, prompts: Prompts) -> Tensor:
        asked.append(prompts)
        return echo(network, features, prompts)

    monkeypatch.setattr(SegVolNetwork, "embed", lambda network, images: images)
    monkeypatch.setattr(SegVolNetwork, "answer", answer)
    return asked


def store(path: Path, array: np.ndarray, orientation: str = "RAS") -> None:
    """array [X, Y, Z] in RAS, stored in another order of axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, AFFINE)
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt(tuple(orientation)))
    nib.save(image.as_reoriented(turn), path)


def labelled() -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    labels[LIVER], labels[SPLEEN] = 1, 2
    return labels


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two cases stored in other orders of axes, with labels."""
    for case, orientation in (("a", "RAS"), ("b", "LIP")):
        noise = np.random.default_rng(0).normal(size=SHAPE)
        store(tmp_path / f"in/{case}_0000.nii.gz", (noise + 5 * labelled()).astype(np.float32), orientation)
        store(tmp_path / f"labels/{case}.nii.gz", labelled(), orientation)
    return tmp_path


def predict(model: Path, work: Path, *more: str) -> int:
    given = ["predict", "-i", str(work / "in"), "-o", str(work / "out"), "-m", str(model), "-f", "0", "-device", "cpu"]
    return main([*given, *more])


def report(work: Path) -> dict[str, Any]:
    return json.loads((work / "out/predictions.json").read_text(encoding="utf-8"))


def result(work: Path, case: str) -> np.ndarray:
    """[X, Y, Z] in RAS, after a look whether it lies where its image does."""
    image, source = nib.load(work / f"out/{case}.nii.gz"), nib.load(work / f"in/{case}_0000.nii.gz")
    np.testing.assert_allclose(image.affine, source.affine, atol=1e-4)
    return np.asanyarray(nib.as_closest_canonical(image).dataobj)


def mm(voxel: tuple[float, ...]) -> list[float]:
    return (AFFINE @ [*voxel, 1])[:3].tolist()


def corners(organ: tuple[slice, ...]) -> list[list[float]]:
    """mm just inside the outer border of the first and last voxel."""
    return [mm(tuple(part.start - 0.4 for part in organ)), mm(tuple(part.stop - 0.6 for part in organ))]


def write(work: Path, content: Any, name: str = "prompts.json") -> str:
    (work / name).write_text(json.dumps(content), encoding="utf-8")
    return str(work / name)


def boxes_of_both() -> dict[str, Any]:
    organs = {"liver": {"box": corners(LIVER)}, "spleen": {"box": corners(SPLEEN)}}
    return {"units": "mm", "cases": {"a": organs, "b": organs}}


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zoom", [False, True])
@pytest.mark.parametrize("model", ["segvol", "itk"])
def test_boxes_in_mm_whatever_the_order_of_storage(models, work: Path, known, model: str, zoom: bool) -> None:
    more = ["--zoom"] if zoom else []
    assert predict(models[model], work, "--box", write(work, boxes_of_both()), *more) == 0
    for case in ("a", "b"):
        found = result(work, case)
        if not zoom:
            assert (found == labelled()).all()
        else:  # what is not one window is asked for by what was seen from afar
            assert ((found > 0)[labelled() > 0]).all() and set(np.unique(found)) == {0, 1, 2}
        entry = report(work)["cases"][case]["organs"]
        assert entry["spleen"]["label"] == 2 and entry["spleen"]["prompts"] == ["box"]
        if not zoom:
            assert entry["liver"]["millilitres"] == pytest.approx(6 * 8 * 5 * 8 / 1000)
        assert ("found_from_afar" in entry["liver"]) is zoom
    labels = json.loads((work / "out/dataset.json").read_text(encoding="utf-8"))["labels"]
    assert labels == {"background": 0, "liver": 1, "spleen": 2}


def test_points_of_the_command_line_in_mm_and_in_voxels(models, work: Path, known) -> None:
    (work / "in/a_0000.nii.gz").unlink()
    point = (4, 5, 3)
    inside = tuple(np.argwhere(np.asanyarray(nib.load(work / "labels/b.nii.gz").dataobj) == 1)[0].tolist())
    for given, organ, where in (
        (["--points=" + ",".join(map(str, mm(point)))], "object", point),
        (["--points", " " + ", ".join(map(str, mm(point))), "--text", "Liver"], "liver", point),
        (["--points", ",".join(map(str, inside)), "--voxels"], "object", None),
    ):
        assert predict(models["segvol"], work, *given) == 0
        found = result(work, "b")
        value = {"object": 3, "liver": 1}[organ]
        assert report(work)["cases"]["b"]["organs"][organ]["label"] == value
        if organ == "object":
            assert np.count_nonzero(found) == 1
        else:  # windows without the point are asked by the text alone
            assert (found[found > 0] == value).all()
        if where is not None:
            assert found[where] == value
        else:
            assert (labelled()[found > 0] == 1).all()
        labels = json.loads((work / "out/dataset.json").read_text(encoding="utf-8"))["labels"]
        assert labels[organ] == value


def test_many_points_of_the_command_line(models, work: Path, known) -> None:
    """More than a file's name may be long."""
    (work / "in/b_0000.nii.gz").unlink()
    voxels = [(x, y, 3) for x in range(3, 9) for y in range(4, 12)]
    assert predict(models["segvol"], work, "--points=" + ";".join(",".join(map(str, mm(each))) for each in voxels)) == 0
    found = result(work, "a")
    assert np.count_nonzero(found) == 48 and (found[LIVER][..., 1] == 3).all()


def test_kinds_of_prompts_are_combined_as_was_said(models, work: Path, known) -> None:
    content = boxes_of_both()
    for organs in content["cases"].values():
        organs["liver"] |= {"points": [mm((4, 5, 3))], "negative_points": [mm((7, 8, 5))]}
        organs["spleen"] |= {"points": [mm((15, 18, 12))]}
    path = write(work, content)
    for more, kinds, negative in (
        (["--points", path], {"points"}, True),
        (["--box", path], {"box"}, False),
        (["--points", path, "--box", path], {"points", "box"}, True),
        (["--points", path, "--text"], {"text", "points"}, True),
    ):
        known.clear()
        assert predict(models["segvol"], work, *more) == 0
        for case in report(work)["cases"].values():
            assert {kind for organ in case["organs"].values() for kind in organ["prompts"]} == kinds
        assert any(q.labels is not None and (q.labels == 0).any() for q in known) is negative
        rows = {None if q.text is None else int(q.text[0]) for q in known}
        assert rows == ({0, 1} if "text" in kinds else {None})


def test_one_organ_of_a_file(models, work: Path, known) -> None:
    assert predict(models["segvol"], work, "--box", write(work, boxes_of_both()), "--text", "SPLEEN") == 0
    assert set(report(work)["cases"]["a"]["organs"]) == {"spleen"}


def test_by_text_a_real_network_answers_as_in_the_stock_prediction(models) -> None:
    """Without mirroring, over two folds: the same windows and weights, so the same logits."""
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(models["segvol"]), (0, 1))
    for parameters in predictor.list_of_parameters:
        parameters["mask_decoder.txt_align_upscaled_embedding.weight"] *= 100
    torch.manual_seed(0)
    image = torch.randn(1, 13, 25, 12)
    expected = predictor.predict_logits_from_preprocessed_data(image).float()
    found, asked = Asker(predictor).sliding(image, [Question(row, Located()) for row in range(2)])
    assert asked.all() and not expected[0].any()
    # nnU-Net adds up in half precision: in the volume's corners, where weights are tiny, little is left of a logit.
    inner = (slice(None), slice(3, -3), slice(5, -5), slice(3, -3))
    difference = (found - expected[1:])[inner].abs()
    assert float(expected[1:][inner].std()) > 50 * float(difference.max())


def test_what_is_finished_is_kept_and_other_prompts_are_another_prediction(models, work: Path, known, capsys) -> None:
    path = write(work, boxes_of_both())
    assert predict(models["segvol"], work, "--box", path) == 0
    (work / "out/b.nii.gz").unlink()
    before = (work / "out/a.nii.gz").stat().st_mtime_ns
    assert predict(models["segvol"], work, "--box", path, "--continue") == 0
    assert "1 predicted, 1 kept from before" in capsys.readouterr().out
    assert (work / "out/a.nii.gz").stat().st_mtime_ns == before and (work / "out/b.nii.gz").is_file()
    before = (work / "out/dataset.json").read_bytes()
    assert predict(models["segvol"], work, "--text", "--zoom", "--continue") == 2
    assert "was predicted with zoom False, now it is True" in capsys.readouterr().err
    assert (work / "out/dataset.json").read_bytes() == before


def test_a_prompt_that_was_put_right_costs_its_image_only(models, work: Path, known, capsys) -> None:
    assert predict(models["segvol"], work, "--points", write(work, case_of(points=[[500, 0, 0]]))) == 1
    mended = write(work, case_of(points=[mm((5, 6, 4))]), "mended.json")
    assert predict(models["segvol"], work, "--points", mended, "--continue") == 0
    assert "1 predicted, 1 kept from before, 0 failed" in capsys.readouterr().out
    again = write(work, case_of(points=[mm((6, 7, 5))]))
    assert predict(models["segvol"], work, "--points", again, "--continue") == 0
    assert "1 predicted, 1 kept from before, 0 failed" in capsys.readouterr().out
    assert result(work, "a")[6, 7, 5] == 1 and result(work, "a").sum() == 1


def test_an_object_is_another_prediction_and_nothing_changes(models, work: Path, known, capsys) -> None:
    """Its label is in dataset.json, which is left as it was."""
    (work / "in/b_0000.nii.gz").unlink()
    point = "--points=" + ",".join(map(str, mm((4, 5, 3))))
    assert predict(models["segvol"], work, point) == 0
    before = {path.name: path.read_bytes() for path in (work / "out").iterdir()}
    assert predict(models["segvol"], work, "--text", "--continue") == 2
    assert "was predicted with objects {'object': 3}, now it is {}" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (work / "out").iterdir()} == before


def test_a_tiff_gets_its_spacing_beside_it_and_nothing_else_is_left(models, work: Path, known) -> None:
    """nnU-Net's reader of TIFFs writes two files; such an image lies nowhere in space."""
    shutil.rmtree(work / "in")
    (work / "in").mkdir()
    tifffile.imwrite(work / "in/a_0000.tif", np.random.default_rng(0).normal(size=SHAPE[::-1]).astype(np.float32))
    (work / "in/a.json").write_text('{"spacing": [2, 2, 2]}', encoding="utf-8")
    assert predict(models["tiff"], work, "--text") == 0
    assert sorted(path.name for path in (work / "out").iterdir()) == [
        "a.json", "a.tif", "dataset.json", "predictions.json",
    ]  # fmt: skip
    assert json.loads((work / "out/a.json").read_text(encoding="utf-8")) == {"spacing": [2, 2, 2]}
    assert predict(models["tiff"], work, "--points", "4,5,3", "--voxels") == 0
    assert tifffile.imread(work / "out/a.tif")[3, 5, 4] == 3
    (work / "out/a.json").unlink()
    assert predict(models["tiff"], work) == 0  # all texts, as nnU-Net asks
    assert json.loads((work / "out/a.json").read_text(encoding="utf-8")) == {"spacing": [2, 2, 2]}


# --- what is refused -------------------------------------------------------------------------------------------------


def case_of(**entry: Any) -> dict[str, Any]:
    return {"cases": {"a": {"liver": entry}, "b": {"liver": {"points": [mm((4, 5, 3))]}}}}


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--text", "liwer"], 2, r"no organ for 'liwer' \(did you mean 'liver'\?\) in the model \(--text\)"),
        (["--text", "liver", "liver"], 2, "names an organ twice"),
        (["--text", "object"], 2, "has texts of liver, spleen only"),
        (["--points", "1,2"], 2, "expected x,y,z and a semicolon"),
        (["--points", ""], 2, "--points '' holds no point"),
        (["--points", "1,2,3"], 2, "for one image, found 2 cases: a, b"),
        (["--box", "1,2,3"], 2, "expected two corners"),
        (["--points", "none.json"], 2, "Cannot read none.json: No such file"),
        (["--zoom"], 2, "--zoom goes with a prompt"),
        (["--text", "--slabs", "2"], 2, "--slabs does not go with prompts"),
        (["--text", "--modality", "CT"], 2, "--modality does not go with prompts"),
        (["--negative-points", "1,2,3", "--text"], 2, "--negative-points go with --points"),
        (["--box-from-labels", "nowhere"], 4, "--box-from-labels nowhere is no folder"),
        (["--text", "--box-shift", "1"], 2, "--box-shift needs --box-from-labels"),
        (["--box-from-labels", ".", "--box-shift", "1", "--seed", "-1"], 2, "--seed -1: expected 0 or more"),
    ],
)
def test_options_that_do_not_fit(models, work: Path, capsys, more: list[str], code: int, message: str) -> None:
    assert predict(models["segvol"], work, *more) == code
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not (work / "out/a.nii.gz").exists()


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ({"cases": {"a": {"liver": {"points": [[0, 0, 35]]}}}}, 2, "has no prompts for b"),
        (
            {"cases": {case: {"liver": {"points": [[0, 0, 35]]}} for case in "abc"}},
            2,
            "has prompts for c, which is not in",
        ),
        (
            {"cases": {case: {"kidney": {"points": [[0, 0, 35]]}} for case in "ab"}},
            2,
            "no organ for 'kidney'.*is called object, or object_2",
        ),
        (
            {"cases": {case: {"liver": {"negative_points": [[0, 0, 35]]}} for case in "ab"}},
            2,
            "nothing says where it is, only where it is not",
        ),
        ({"cases": {case: {"liver": {"box": corners(LIVER)}} for case in "ab"}}, 2, "holds no positive points"),
    ],
)
def test_files_that_do_not_fit(models, work: Path, capsys, content: Any, code: int, message: str) -> None:
    assert predict(models["segvol"], work, "--points", write(work, content)) == code
    said = capsys.readouterr().err
    assert re.search(message, said), said


def test_a_bad_prompt_costs_its_case(models, work: Path, known, capsys) -> None:
    assert predict(models["segvol"], work, "--points", write(work, case_of(points=[[500, 0, 0]]))) == 1
    said = capsys.readouterr().err
    assert (
        "case a: point of liver" in said and "(500, 0, 0) lies outside of the image, which reaches from x -16" in said
    )
    assert list(report(work)["cases"]) == ["b"] and report(work)["failed"]["a"]["exit_code"] == 4
    assert (work / "out/b.nii.gz").is_file() and not (work / "out/a.nii.gz").exists()


def test_a_model_without_prompts(models, work: Path, capsys) -> None:
    assert predict(models["stock"], work, "--text") == 2
    assert "nnUNetTrainerMRSegmentator, which takes no prompts. Train nnUNetTrainerSegVol" in capsys.readouterr().err


# --- boxes of labels -------------------------------------------------------------------------------------------------


def test_boxes_of_labels_are_taken_only_when_asked_for_and_it_is_said(models, work: Path, known, capsys) -> None:
    assert predict(models["segvol"], work, "--box-from-labels", str(work / "labels")) == 0
    assert "boxes are those of the labels in" in capsys.readouterr().out
    assert (result(work, "b") == labelled()).all()
    assert report(work)["boxes"] == f"from the labels in {work / 'labels'}"
    assert all(q.text is None for q in known)
    known.clear()
    assert predict(models["segvol"], work, "--box-from-labels", str(work / "labels"), "--text", "liver") == 0
    assert set(np.unique(result(work, "a"))) == {0, 1} and all(q.text is not None for q in known)
    assert predict(models["segvol"], work, "--text") == 0
    assert report(work)["boxes"] is None


def test_labels_that_do_not_fit(models, work: Path, known, capsys) -> None:
    (work / "labels/a.nii.gz").unlink()
    image = nib.load(work / "labels/b.nii.gz")
    moved = image.affine.copy()
    moved[0, 3] += 10
    nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj), moved), work / "labels/b.nii.gz")
    assert predict(models["segvol"], work, "--box-from-labels", str(work / "labels")) == 4
    said = capsys.readouterr().err
    assert "a.nii.gz (--box-from-labels) does not exist" in said and "lies elsewhere in space" in said
    store(work / "labels/b.nii.gz", labelled()[:-1])
    assert predict(models["segvol"], work, "--box-from-labels", str(work / "labels")) == 4
    assert "voxels (z, y, x), its image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:60]), r"Cannot read \S+labels/a.nii.gz: file ends early"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), r"labels/a.nii.gz is not NIfTI \(starts"),
        (lambda path: store(path, labelled() * 0.9999), r"labels/a.nii.gz is no label map: 534 voxels such as"),
    ],
)
@pytest.mark.parametrize("study", [[], ["--box-shift", "1"]])
def test_labels_that_are_none(models, work: Path, known, capsys, spoil: Any, message: str, study: list[str]) -> None:
    (work / "in/b_0000.nii.gz").unlink()
    spoil(work / "labels/a.nii.gz")
    words = ["--box-from-labels", str(work / "labels"), "--text", "liver", *study]
    assert predict(models["segvol"], work, *words) == 4
    assert re.search(message, capsys.readouterr().err)


def test_a_study_of_boxes(models, work: Path, known, capsys) -> None:
    """A network that fills its box is as good as the box; the same seed gives the same boxes."""
    words = ["--box-from-labels", str(work / "labels"), "--box-shift", "3", "1", "--draws", "2"]
    assert predict(models["segvol"], work, *words) == 0
    said = capsys.readouterr().out
    study = json.loads((work / "out/box_shift.json").read_text(encoding="utf-8"))
    rows = study["boxes"]
    assert len(rows) == 2 * 2 * (1 + 2 + 2)
    for row in rows:
        assert row["dice"] == pytest.approx(row["box_alone"], abs=1e-9)
        assert row["dice"] == 1 if row["shift"] == 0 else row["dice"] < 1
    means = [row["dice"] for row in study["mean"] if row["organ"] == "mean"]
    assert means == sorted(means, reverse=True) and means[0] == 1 and f"   3  {means[2]:.3f}" in said
    assert not (work / "out/a.nii.gz").exists() and (work / "out/box_shift.png").stat().st_size > 5000
    table = (work / "out/box_shift.csv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "case,organ,shift,draw,dice,box_alone" and len(table) == 21

    before = (work / "out/box_shift.json").read_bytes()
    assert predict(models["segvol"], work, *words) == 0
    assert (work / "out/box_shift.json").read_bytes() == before
    assert predict(models["segvol"], work, *words, "--seed", "1") == 0
    assert (work / "out/box_shift.json").read_bytes() != before


def test_a_study_does_not_count_what_nobody_labelled(models, work: Path, known) -> None:
    path = models["segvol"] / "dataset.json"
    dataset = path.read_text(encoding="utf-8")
    for case, orientation in (("a", "RAS"), ("b", "LIP")):
        labels = labelled()
        labels[3, 4, 2:7] = 3  # on the liver, in its box
        store(work / f"labels/{case}.nii.gz", labels, orientation)
    try:
        names = {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
        path.write_text(json.dumps({**json.loads(dataset), "labels": names}), encoding="utf-8")
        words = ["--box-from-labels", str(work / "labels"), "--box-shift", "0"]
        assert predict(models["segvol"], work, *words) == 0
    finally:
        path.write_text(dataset, encoding="utf-8")
    rows = json.loads((work / "out/box_shift.json").read_text(encoding="utf-8"))["boxes"]
    assert len(rows) == 4 and all(row["dice"] == row["box_alone"] == 1 for row in rows)
