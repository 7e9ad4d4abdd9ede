"""propose: what is predicted, chosen and packed; nnU-Net's own numbers; shards; what goes on after a crash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from tiny_model import tiny_plans
from tiny_project import LABELS, SHAPE, Workshop, anatomy, load, picture, save

from nnunet_multimodal.commands import relabel as command
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.relabel.formats import ITK, NIFTI, is_dicom, read_mask, split_format
from nnunet_multimodal.relabel.pool import pattern_traits, scan
from nnunet_multimodal.relabel.predicting import How, label_table
from nnunet_multimodal.relabel.predicting import load as load_model
from nnunet_multimodal.relabel.ranking import ORDERS, most_uncertain, pool_in_order
from nnunet_multimodal.relabel.uncertainty import disagreement, entropy_score


def names_of(workshop: Workshop, batch: int = 1) -> list[str]:
    return sorted(path.name for path in (workshop.place / f"batches/batch_{batch:03d}").iterdir() if path.is_dir())


# --- scores ----------------------------------------------------------------------------------------------------------


def test_disagreement_is_one_minus_the_mean_pairwise_dice() -> None:
    a, b, c = np.array([1, 1, 0, 2]), np.array([1, 0, 0, 2]), np.array([0, 0, 0, 2])
    # Dice of label 1: ab 2/3, ac 0, bc 0; of label 2: 1, 1, 1
    assert disagreement([a, b, c], [1, 2]) == pytest.approx(1 - (2 / 3 + 3) / 6)
    assert disagreement([a, a], [1, 2, 3]) == 0
    assert disagreement([0 * a, 0 * a], [1]) == 0, "all agree that there is nothing"


def test_entropy_counts_only_where_background_is_not_sure() -> None:
    probabilities = np.array([[0.995, 0.5, 0.25], [0.005, 0.5, 0.25], [0, 0, 0.25], [0, 0, 0.25]])
    score, each = entropy_score(probabilities)
    assert each[1:] == pytest.approx([0.5, 1.0])  # log 2 and log 4 of log 4
    assert score == pytest.approx(0.75)
    assert entropy_score(np.array([[1.0], [0.0]]))[0] == 0


# --- choosing --------------------------------------------------------------------------------------------------------


def test_orders(call, workshop: Workshop) -> None:
    ledger = workshop.project.ledger
    assert list(ORDERS) == list(command.ORDERS)
    assert pool_in_order(ledger, "first", 0) == [3, 4, 5, 6, 7, 8]
    assert sorted(pool_in_order(ledger, "random", 1)) == [3, 4, 5, 6, 7, 8]
    assert pool_in_order(ledger, "random", 1) == pool_in_order(ledger, "random", 1)
    assert len({tuple(pool_in_order(ledger, "random", seed)) for seed in range(9)}) > 5
    ledger.close()
    assert call("propose", workshop.place, "-n", 2, "-device", "cpu")[0] == 0
    assert names_of(workshop) == ["p6", "p7"]  # the highest scores
    ledger = workshop.project.ledger
    assert [row["name"] for row in most_uncertain(ledger, 1, 2)] == ["p5", "p4"], "what is proposed is not in the pool"
    ledger.close()
    assert call("propose", workshop.place, "-n", 3, "--order", "first", "-device", "cpu")[0] == 0
    assert names_of(workshop, 2) == ["p2", "p3", "p4"]
    code, out, _ = call("propose", workshop.place, "-n", 3, "--order", "random", "-device", "cpu")
    assert code == 0 and "1 cases" in out
    assert "the pool is empty" in call("propose", workshop.place, "-device", "cpu")[1]


# --- packages --------------------------------------------------------------------------------------------------------


def test_a_package_has_all_that_a_person_needs(call, workshop: Workshop) -> None:
    call("propose", workshop.place, "-n", 2, "-device", "cpu")
    batch = workshop.place / "batches/batch_001"
    package = batch / "p7"
    assert sorted(path.name for path in package.iterdir()) == [
        "doubt.nii.gz",
        "image.nii.gz",
        "mask.nii.gz",
        "worst.png",
    ]
    assert (package / "image.nii.gz").resolve() == workshop.images / "p7.nii.gz"
    image, mask = nibabel.load(package / "image.nii.gz"), nibabel.load(package / "mask.nii.gz")
    np.testing.assert_array_equal(image.affine, mask.affine)
    assert image.shape == mask.shape
    assert (package / "worst.png").read_bytes().startswith(b"\x89PNG")
    lines = (batch / "labels_itksnap.txt").read_text(encoding="utf-8").splitlines()
    named = {int(line.split()[0]): line.split('"')[1] for line in lines if not line.startswith("#")}
    assert named == {0: "Clear Label", **{value: name for name, value in LABELS.items()}}
    table = [line.split() for line in (batch / "labels_slicer.ctbl").read_text(encoding="utf-8").splitlines()[1:]]
    assert {int(row[0]): row[1] for row in table} == {0: "Background", **{v: n for n, v in LABELS.items()}}
    page = (batch / "index.html").read_text(encoding="utf-8")
    assert page.index("p7") < page.index("p6"), "the worst first"
    assert "http" not in page.replace("http-equiv", "")


def test_names_in_the_page_are_escaped(call, tmp_path: Path, clean_environment) -> None:
    made = Workshop(tmp_path)
    made.make_images(1)
    evil = "a<script>alert(1)<%2Fscript> ü"
    (made.images / "p0.nii.gz").rename(made.images / f"{evil}.nii.gz")
    (made.truth / "p0.nii.gz").rename(made.truth / f"{evil}.nii.gz")
    made.names = [evil]
    made.init()
    made.pretend_model()
    assert call("propose", made.place, "-n", 1, "-device", "cpu")[0] == 0
    made.correct(evil)
    assert call("accept", made.place)[0] == 0
    assert call("report", made.place)[0] == 0
    for page in (made.place / "batches/batch_001/index.html", made.place / "report/report.html"):
        text = page.read_text(encoding="utf-8")
        assert "<script" not in text and "&lt;script&gt;" in text


def test_a_batch_whose_folder_is_not_there_is_made_again(call, workshop: Workshop) -> None:
    """As after a crash between the ledger and the folder; accepted cases are not packed again."""
    call("propose", workshop.place, "-n", 2, "-device", "cpu")
    workshop.correct("p7")
    call("accept", workshop.place)
    shutil.rmtree(workshop.place / "batches/batch_001")
    code, out, _ = call("accept", workshop.place)
    assert code == 1
    code, out, _ = call("propose", workshop.place, "-n", 2, "-device", "cpu")
    assert code == 0 and "batch 1 had been chosen before" in out
    assert names_of(workshop) == ["p6"]
    project = workshop.project
    assert project.ledger.value("SELECT count(*) FROM batches") == 1
    project.ledger.close()


def test_a_bad_image_costs_its_case(call, workshop: Workshop) -> None:
    (workshop.images / "p7.nii.gz").write_bytes(b"")
    code, _, err = call("propose", workshop.place, "-n", 2, "-device", "cpu")
    assert code == 1 and "p7" in err and "reject the cases" in err
    assert names_of(workshop) == ["p6"]


def test_without_a_model(call, tmp_path: Path, clean_environment) -> None:
    made = Workshop(tmp_path)
    made.make_images(1)
    made.init()
    code, _, err = call("propose", made.place, "-device", "cpu")
    assert code == 2 and "has no model to propose with" in err


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_of_all_formats_are_cases_and_stay_where_they_are(call, tmp_path: Path, data_dir: Path) -> None:
    images = tmp_path / "images"
    source = save(images / "a_0000.nii.gz", picture(0))
    for name in ("b.nii", "c.nrrd", "sub/d.mha"):
        (images / name).parent.mkdir(exist_ok=True)
        sitk.WriteImage(sitk.ReadImage(str(source)), str(images / name))
    (images / "series").symlink_to(data_dir / "dicom_ct")
    (images / "notes.txt").write_text("no image", encoding="utf-8")
    found = scan(images)
    assert [each.name for each in found][:4] == ["a", "b", "c", "d"]
    assert [each.kind for each in found][:4] == [NIFTI, NIFTI, ITK, ITK]
    before = {path: path.stat().st_mtime_ns for path in images.rglob("*")}
    assert call("init", tmp_path / "P", "--images", images, "--label-names", "liver=1")[0] == 0
    from nnunet_multimodal.conversion.images import read_volume
    from nnunet_multimodal.relabel.pool import checked_hash, nifti_of
    from nnunet_multimodal.relabel.project import Project

    project = Project(tmp_path / "P")
    expected = read_volume(source)
    for name in "bcd":
        row = project.ledger.case(name)
        assert row is not None
        volume = read_volume(nifti_of(row, checked_hash(row)[0], project.images))
        np.testing.assert_array_equal(volume.data, expected.data)
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)
    assert before == {path: path.stat().st_mtime_ns for path in images.rglob("*")}


def test_a_dicom_series_is_a_case(call, tmp_path: Path, data_dir: Path) -> None:
    files = [path for path in (data_dir / "dicom_ct").rglob("*") if path.is_file() and is_dicom(path)]
    folder = tmp_path / "images" / "patient7"
    folder.mkdir(parents=True)
    for path in files:
        shutil.copy(path, folder)
    (found,) = scan(tmp_path / "images")
    assert (found.name, found.kind) == ("patient7", "dicom")
    from nnunet_multimodal.conversion.images import read_volume
    from nnunet_multimodal.relabel.formats import write_nifti

    write_nifti(folder, "dicom", tmp_path / "c.nii.gz")
    assert read_volume(tmp_path / "c.nii.gz").data.shape[0] == len(files)


def test_names_are_unique_and_one_image_is_one_case(call, tmp_path: Path) -> None:
    save(tmp_path / "i/a.nii.gz", picture(0))
    save(tmp_path / "i/b/a.nii.gz", picture(1))
    code, _, err = call("init", tmp_path / "P", "--images", tmp_path / "i", "--label-names", "liver=1")
    assert code == 4 and "Case 'a' comes from" in err and not (tmp_path / "P").exists()
    shutil.rmtree(tmp_path / "i/b")
    save(tmp_path / "i/a_0001.nii.gz", picture(1))
    with pytest.raises(DataProblem, match="looks like a second channel of a"):
        scan(tmp_path / "i")
    assert split_format(Path("x.txt"))[1] is None


def test_patterns_say_modality_and_patient(tmp_path: Path) -> None:
    save(tmp_path / "CT/p1.nii.gz", picture(0))
    (found,) = scan(tmp_path)
    assert pattern_traits(r"/(?P<modality>CT|MR)/(?P<patient>p\d+)", None)(found) == ("CT", "p1")
    assert pattern_traits(None, "MR")(found) == ("MR", None)
    with pytest.raises(UsageError, match="needs a group"):
        pattern_traits("CT", None)
    with pytest.raises(UsageError, match="no regular expression"):
        pattern_traits("(", None)
    with pytest.raises(DataProblem, match="does not match"):
        pattern_traits("(?P<modality>PET)", None)(found)


def test_masks_read_from_other_formats_lie_where_they_did(tmp_path: Path) -> None:
    source = save(tmp_path / "a.nii.gz", anatomy(1))
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(sitk.ReadImage(str(source)), str(tmp_path / name))
        ours, theirs = read_mask(tmp_path / name), read_mask(source)
        np.testing.assert_array_equal(ours.data, theirs.data)
        np.testing.assert_allclose(ours.affine, theirs.affine, atol=1e-5)


# --- init again ------------------------------------------------------------------------------------------------------


def test_init_again_adds_what_is_new(call, workshop: Workshop) -> None:
    save(workshop.images / "p9.nii.gz", picture(9))
    code, out, _ = call("init", workshop.place, "--images", workshop.images)
    assert code == 0 and out.startswith("1 new images, 9 in all")
    code, _, err = call("init", workshop.place, "--images", workshop.images, "--label-names", "liver=1")
    assert code == 2 and "has the labels" in err
    shutil.move(workshop.images / "p9.nii.gz", workshop.folder / "elsewhere_p9.nii.gz")
    other = workshop.folder / "other"
    save(other / "p9.nii.gz", picture(10))
    code, _, err = call("init", workshop.place, "--images", other)
    assert code == 4 and "p9.nii.gz is taken" in err


def test_init_again_does_not_bring_old_labels_back(call, workshop: Workshop) -> None:
    """A first label that was corrected or undone since stays so; after an interruption the missing ones come."""
    corrected = anatomy(0)
    corrected[1, 3, 3] = 0
    save(workshop.folder / "given/p0.nii.gz", corrected)
    assert call("accept", workshop.place, workshop.folder / "given")[0] == 0
    assert call("undo", workshop.place, "p1")[0] == 0
    before = workshop.state("p0"), workshop.state("p1")
    save(workshop.folder / "start/p2.nii.gz", anatomy(2))
    again = ("init", workshop.place, "--images", workshop.images, "--labels", workshop.folder / "start")
    code, out, _ = call(*again)
    assert code == 0 and "1 labels accepted, 2 were accepted before" in out
    assert (workshop.state("p0"), workshop.state("p1")) == before
    assert workshop.state("p2")["state"] == "accepted"


# --- a real network --------------------------------------------------------------------------------------------------


def result_folder(root: Path, labels: dict[str, int], folds: tuple[int, ...]) -> Path:
    """A 2d U-Net of nnU-Net with random weights."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    dataset = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    for fold in folds:
        plans = tiny_plans(2)
        configuration = plans["configurations"]["2d"]
        configuration |= {"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}
        del configuration["nnunet_multimodal"]
        torch.manual_seed(fold + 1)
        trainer = nnUNetTrainer(plans, "2d", fold, dataset, torch.device("cpu"))
        trainer.print_to_log_file = lambda *args, **kwargs: None  # type: ignore[method-assign]
        data = Path(trainer.preprocessed_dataset_folder)
        data.mkdir(parents=True, exist_ok=True)
        (data / "case.b2nd").touch()
        trainer.initialize()
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    folder = Path(trainer.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(trainer.plans_manager.plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    """Two folds that know Right Kidney and a lung, and no other organ of the project."""
    root = tmp_path_factory.mktemp("nnunet")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_compile", "f")
        (root / "raw/Dataset001_Tiny").mkdir()
        yield result_folder(root, {"background": 0, "Right Kidney": 1, "lung": 2}, (0, 1))


@pytest.fixture
def started(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.setenv("nnUNet_compile", "f")
    made = Workshop(tmp_path)
    made.make_images(4)
    made.init(model=model)
    return made


def test_labels_are_matched_by_name() -> None:
    table, unknown, dropped = label_table({"background": 0, "Right Kidney": 1, "lung": 2, "ignore": 3}, LABELS)
    assert table.tolist() == [0, 2, 0]
    assert unknown == ["liver", "left_kidney"]
    assert dropped == ["lung"]


def test_proposals_are_what_nnunet_predicts(call, started: Workshop, model: Path) -> None:
    """Folds predicted one by one and averaged are, bit for bit, the stock predictor's logits; labels get new ids."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    how = How(model, ("0", "1"), "checkpoint_final.pth", "cpu")
    ours = load_model(how, [])
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), (0, 1))
    image = torch.from_numpy(picture(3))[None] / 20 - 5
    expected = stock.predict_logits_from_preprocessed_data(image)
    assert torch.equal(ours.predict_logits_from_preprocessed_data(image), expected)
    assert 0 < ours.score <= 1 and ours.map.shape == SHAPE

    code, out, err = call("propose", started.place, "-n", 4, "-device", "cpu", "--debug")
    assert code == 0, err
    assert "never proposes: liver, left_kidney" in out and "left out: lung" in out
    predicted = started.folder / "stock"
    stock.predict_from_files(
        [[str(started.images / "p3.nii.gz")]], [str(predicted)], num_processes_preprocessing=1,
        num_processes_segmentation_export=1,
    )  # fmt: skip
    theirs = load(Path(f"{predicted}.nii.gz"))
    assert set(np.unique(theirs)) == {0, 1, 2}, "random weights of nnU-Net say something"
    np.testing.assert_array_equal(load(started.package("p3") / "mask.nii.gz"), np.array([0, 2, 0])[theirs])
    doubt = load(started.package("p3") / "doubt.nii.gz")
    assert 0 < doubt.max() <= 100


def test_an_interrupted_prediction_goes_on(call, started: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_multimodal.relabel import predicting

    write, done = predicting.write, []

    def fails_later(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(arguments[-2].name)
        write(*arguments)

    monkeypatch.setattr(predicting, "write", fails_later)
    assert call("propose", started.place, "-n", 3, "-device", "cpu")[0] == 130
    assert not list(started.place.glob("batches/*"))
    monkeypatch.setattr(predicting, "write", lambda *arguments: (done.append(arguments[-2].name), write(*arguments)))
    assert call("propose", started.place, "-n", 3, "-device", "cpu")[0] == 0
    assert sorted(done) == ["p0", "p1", "p2", "p3"], "each once"


def test_shards_of_several_machines(call, started: Workshop) -> None:
    """--shards lists the work, --part does a share of it without the ledger, propose takes what they have done."""
    code, _, err = call("propose", started.place, "--part", "1/2")
    assert code == 2 and "--shards 2" in err
    code, out, _ = call("propose", started.place, "--shards", 2, "-n", 2, "-device", "cpu")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("# 4 cases")
    ledger = started.place / "relabel.sqlite"
    hidden = ledger.with_name("hidden")
    ledger.rename(hidden)
    for line in lines[1:3]:
        code, out, err = call(*line.split()[2:], "-device", "cpu")
        assert code == 0 and out.startswith("2 predicted"), err
    hidden.rename(ledger)
    code, out, _ = call(*lines[3].split()[2:], "-device", "cpu")
    assert code == 0 and "2 cases" in out
    project = started.project
    assert project.ledger.value("SELECT count(*) FROM predictions") == 4
    project.ledger.close()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b"])
def test_parts_that_are_none(call, started: Workshop, part: str) -> None:
    assert call("propose", started.place, "--part", part)[0] == 2


def test_models_that_do_not_fit(call, tmp_path: Path, started: Workshop, model: Path) -> None:
    code, _, err = call("init", tmp_path / "Q", "--images", started.images, "--model", tmp_path)
    assert code == 3 and "no plans.json" in err
    copy = tmp_path / "regions"
    shutil.copytree(model, copy)
    dataset = json.loads((copy / "dataset.json").read_text(encoding="utf-8"))
    dataset |= {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    (copy / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    code, _, err = call("init", tmp_path / "Q", "--images", started.images, "--model", copy)
    assert code == 2 and "predicts regions" in err
    code, _, _ = call("init", tmp_path / "Q", "--images", started.images, "--model", model)
    assert code == 0, "the labels are the model's"
    assert json.loads(call("status", tmp_path / "Q", "--json")[1])["labels"] == {
        "background": 0,
        "Right Kidney": 1,
        "lung": 2,
    }
