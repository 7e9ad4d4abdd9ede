"""predict on volumes: in slabs, with sides put right, and however an image is stored (cross-checks 25 to 27)."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from tiny_mixed import TRAINER, mixed_result_folder, picture
from tiny_model import save
from tiny_volumes import LABELS, volume_model

from nnunet_multimodal.cli import main
from nnunet_multimodal.environment import extension_value

AFFINE = np.array([[1.2, 0, 0, -15], [0, 1.5, 0, -20], [0, 0, 2.5, 30], [0, 0, 0, 1]])
SHAPE = (20, 24, 18)  # x, y, z: all different, as are the spacings


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
        yield {
            "3d": volume_model(3),
            "itk": volume_model(
                3, name="nnUNetTrainerMRSegmentator_2epochs", top={"image_reader_writer": "SimpleITKIOWithReorient"}
            ),
            "text": mixed_result_folder(),
        }


def volume(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """float32 [X, Y, Z]."""
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5).astype(np.float32) * 100


def predict(model: Path, images: Path, out: Path, *more: str) -> int:
    return main(["predict", "-i", str(images), "-o", str(out), "-m", str(model), "-f", "0", "-device", "cpu", *more])


def report(out: Path) -> Any:
    return json.loads((out / "predictions.json").read_text(encoding="utf-8"))


def store(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


# --- slabs -----------------------------------------------------------------------------------------------------------


def test_slabs_write_the_same_files(models: dict[str, Path], tmp_path: Path) -> None:
    for case in ("a", "b"):
        store(tmp_path / f"in/{case}_0000.nii.gz", volume(ord(case)))
    assert predict(models["3d"], tmp_path / "in", tmp_path / "whole") == 0
    assert predict(models["3d"], tmp_path / "in", tmp_path / "slabs", "--slabs", "3") == 0
    for case in ("a", "b"):
        files = [tmp_path / folder / f"{case}.nii.gz" for folder in ("whole", "slabs")]
        first, second = (gzip.decompress(file.read_bytes()) for file in files)
        assert first == second and len(np.unique(np.asarray(nib.load(files[0]).dataobj))) > 2
    assert report(tmp_path / "whole") == report(tmp_path / "slabs"), "the result is the same: so is its record"
    assert predict(models["3d"], tmp_path / "in", tmp_path / "whole", "--slabs", "2", "--continue") == 0


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_slabs_infer_the_modality_of_the_whole(models: dict[str, Path], tmp_path: Path, modality: str) -> None:
    """Each tile has one vote, whichever slabs it reaches into; told, it obeys."""
    save(tmp_path / "in/c_0000.nii.gz", picture(modality, 1))
    other = "MR" if modality == "CT" else "CT"
    for told in ((), ("--modality", other)):
        more = ("--disable_tta", *told)
        assert predict(models["text"], tmp_path / "in", tmp_path / "whole", *more) == 0
        assert predict(models["text"], tmp_path / "in", tmp_path / "slabs", "--slabs", "9", *more) == 0
        whole, slabs = (np.asarray(nib.load(tmp_path / f"{name}/c.nii.gz").dataobj) for name in ("whole", "slabs"))
        assert np.array_equal(whole, slabs)
        assert report(tmp_path / "whole") == report(tmp_path / "slabs")
    assert report(tmp_path / "slabs")["cases"]["c"]["inferred"] == modality


def test_slabs_predict_again_where_tiles_disagree(models: dict[str, Path], tmp_path: Path) -> None:
    mixed = np.concatenate((picture("MR", 3, (2, 40, 36)), picture("CT", 4, (4, 40, 36))))
    save(tmp_path / "in/c_0000.nii.gz", mixed)
    assert predict(models["text"], tmp_path / "in", tmp_path / "whole", "--disable_tta") == 0
    assert predict(models["text"], tmp_path / "in", tmp_path / "slabs", "--disable_tta", "--slabs", "3") == 0
    assert report(tmp_path / "slabs") == report(tmp_path / "whole")
    assert report(tmp_path / "slabs")["cases"]["c"]["predicted_twice"]
    whole, slabs = (np.asarray(nib.load(tmp_path / f"{name}/c.nii.gz").dataobj) for name in ("whole", "slabs"))
    assert np.array_equal(whole, slabs) and TRAINER in report(tmp_path / "slabs")["trainer"]


def test_slabs_and_probabilities_do_not_go_together(models, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store(tmp_path / "in/a_0000.nii.gz", volume())
    assert predict(models["3d"], tmp_path / "in", tmp_path / "out", "--slabs", "2", "--save_probabilities") == 2
    assert "--slabs never has all probabilities at once" in capsys.readouterr().err
    assert predict(models["3d"], tmp_path / "in", tmp_path / "out", "--slabs", "0") == 2
    assert not (tmp_path / "out").exists()


# --- sides -----------------------------------------------------------------------------------------------------------


def body(exchanged: bool = False) -> np.ndarray:
    """uint8 [Z, Y, X]: a spine and two kidneys, the left one at small x."""
    labels = np.zeros(SHAPE[::-1], np.uint8)
    labels[:, 16:19, 9:11] = LABELS["spine"]
    labels[5:12, 8:14, 2:6], labels[5:12, 8:14, 14:18] = (3, 2) if exchanged else (2, 3)
    return labels


@pytest.mark.parametrize("slabs", [(), ("--slabs", "2")])
@pytest.mark.parametrize("reader", ["3d", "itk"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAL"])
def test_sides_are_put_right_in_what_is_written(
    models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, slabs: tuple[str, ...], reader: str, codes: str
) -> None:
    """The network's answer is exchanged kidneys, on the grid of an image that is stored in some order."""
    from nnunet_multimodal.inference import folder

    image = nib.Nifti1Image(volume(), AFFINE)
    orientation = nib.orientations.axcodes2ornt(codes)
    stored = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(AFFINE), orientation))
    (tmp_path / "in").mkdir()
    nib.save(stored, tmp_path / "in/a_0000.nii.gz")

    if slabs:
        monkeypatch.setattr(folder.ModalityPredictor, "segment_in_slabs", lambda *arguments: body(exchanged=True))
    else:
        convert = "convert_predicted_logits_to_segmentation_with_correct_shape"
        monkeypatch.setattr(folder, convert, lambda *arguments: body(exchanged=True))
    assert predict(models[reader], tmp_path / "in", tmp_path / "out", "--fix-sides", *slabs) == 0
    written = nib.as_closest_canonical(nib.load(tmp_path / "out/a.nii.gz"))
    assert np.array_equal(np.asarray(written.dataobj).transpose(2, 1, 0), body())
    content = report(tmp_path / "out")
    assert content["fix_sides"] is True
    voxels = int((body() == 2).sum())
    assert content["cases"]["a"]["sides"] == {
        "changed": [
            {"from": "left_kidney", "to": "right_kidney", "pieces": 1, "voxels": voxels},
            {"from": "right_kidney", "to": "left_kidney", "pieces": 1, "voxels": voxels},
        ],
        "ambiguous": [],
    }
    assert f"sides put right in a: {voxels} voxels of left_kidney are right_kidney" in capsys.readouterr().out


def test_what_is_not_clear_is_named(models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from nnunet_multimodal.inference import folder

    labels = np.where(body() == 3, 3, 0).astype(np.uint8)  # one kidney, and no spine that tells whose
    monkeypatch.setattr(folder.ModalityPredictor, "segment_in_slabs", lambda *arguments: labels)
    store(tmp_path / "in/a_0000.nii.gz", volume())
    assert predict(models["3d"], tmp_path / "in", tmp_path / "out", "--fix-sides", "--slabs", "1") == 0
    (entry,) = report(tmp_path / "out")["cases"]["a"]["sides"]["ambiguous"]
    assert entry["organ"] == "right_kidney" and "no organ tells" in entry["why"]
    assert "sides not clear, left as they are (see predictions.json): a" in capsys.readouterr().out
    assert np.array_equal(np.asarray(nib.load(tmp_path / "out/a.nii.gz").dataobj).transpose(2, 1, 0), labels)


def test_without_the_option_nothing_is_touched_and_continuing_wants_the_same(models, tmp_path: Path, capsys) -> None:
    store(tmp_path / "in/a_0000.nii.gz", volume())
    assert predict(models["3d"], tmp_path / "in", tmp_path / "out") == 0
    assert "sides" not in report(tmp_path / "out")["cases"]["a"]
    assert predict(models["3d"], tmp_path / "in", tmp_path / "out", "--fix-sides", "--continue") == 2
    assert "was predicted with fix_sides None, now it is True" in capsys.readouterr().err
    assert predict(models["3d"], tmp_path / "in", tmp_path / "out", "--fix-sides") == 0
    assert predict(models["3d"], tmp_path / "in", tmp_path / "out", "--continue") == 2
    assert "was predicted with fix_sides True, now it is None" in capsys.readouterr().err


def test_probabilities_beside_corrected_sides_are_the_networks(models, tmp_path: Path) -> None:
    store(tmp_path / "in/a_0000.nii.gz", volume())
    for out, more in (("plain", ()), ("fixed", ("--fix-sides",))):
        assert predict(models["3d"], tmp_path / "in", tmp_path / out, "--save_probabilities", *more) == 0
    plain, fixed = (np.load(tmp_path / f"{out}/a.npz")["probabilities"] for out in ("plain", "fixed"))
    assert np.array_equal(plain, fixed) and (tmp_path / "fixed/a.pkl").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {"background": 0, "liver": 1, "left_lung": 2},
            "no labels of the model come in a left and a right: background",
        ),
        ({"background": 0, "left_kidney": [1, 2], "right_kidney": [3]}, "the model predicts regions"),
    ],
)
def test_a_model_without_sides(labels: dict[str, Any], message: str) -> None:
    from nnunet_multimodal.commands.predict import _require_sides
    from nnunet_multimodal.errors import UsageError

    with pytest.raises(UsageError, match=message):
        _require_sides(labels)


# --- orientation -----------------------------------------------------------------------------------------------------

ORIENTATIONS = [
    np.column_stack((axes, flips))
    for axes in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def same_however_it_is_stored(model: Path, tmp_path: Path, orientations: list[np.ndarray]) -> None:
    """One image, stored in several ways: the labels are the same voxel by voxel, on each file's own grid."""
    image = nib.Nifti1Image(volume(), AFFINE)
    (tmp_path / "in").mkdir()
    for number, orientation in enumerate(orientations):
        nib.save(image.as_reoriented(orientation), tmp_path / f"in/{number:02d}_0000.nii.gz")
    assert predict(model, tmp_path / "in", tmp_path / "out") == 0
    first = None
    for number in range(len(orientations)):
        stored = nib.load(tmp_path / f"in/{number:02d}_0000.nii.gz")
        found = nib.load(tmp_path / f"out/{number:02d}.nii.gz")
        assert found.shape == stored.shape
        np.testing.assert_allclose(found.affine, stored.affine, atol=1e-5)
        labels = np.asarray(nib.as_closest_canonical(found).dataobj)
        first = labels if first is None else first
        # a random network is nowhere sure, and sums are rounded as memory happens to lie
        assert (labels != first).mean() < 1e-3, orientations[number].tolist()
    assert first is not None and first.shape == SHAPE and len(np.unique(first)) > 3


@pytest.mark.parametrize("reader", ["3d", "itk"])
def test_some_ways_to_store_an_image(models, tmp_path: Path, reader: str) -> None:
    """Sagittal and coronal ones, too, whose spacing goes along other axes (MRSegmentator's issue 23)."""
    same_however_it_is_stored(models[reader], tmp_path, ORIENTATIONS[::9])


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["3d", "itk"])
def test_all_48_ways_to_store_an_image(models, tmp_path: Path, reader: str) -> None:
    assert len(ORIENTATIONS) == 48
    same_however_it_is_stored(models[reader], tmp_path, ORIENTATIONS)


def test_where_an_array_lies_by_every_reader(tmp_path: Path) -> None:
    """The affine leads each voxel of a reader's array to the same place in the patient."""
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

    from nnunet_multimodal.inference.position import affine_of

    array = np.zeros(SHAPE, np.float32)
    array[3, 5, 7] = 1
    turned = nib.Nifti1Image(array, AFFINE).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    path = tmp_path / "a.nii.gz"
    nib.save(turned, path)
    for reader in (NibabelIO, NibabelIOWithReorient, SimpleITKIO, SimpleITKIOWithReorient):
        image, properties = reader().read_images((str(path),))
        z, y, x = np.argwhere(image[0] == 1)[0]
        affine = affine_of(properties)
        assert affine is not None
        np.testing.assert_allclose(affine @ [x, y, z, 1], AFFINE @ [3, 5, 7, 1], atol=1e-4, err_msg=reader.__name__)
    assert affine_of({"spacing": [999, 1, 1]}) is None
