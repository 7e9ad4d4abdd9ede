"""Slabs give what the whole gives: logits and labels, 2d and 3d, whatever the shape and the resampling (check 26)."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from tiny_volumes import volume_model

from nnunet_multimodal.environment import extension_value
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.inference.modality import ModalityPredictor
from nnunet_multimodal.inference.slabs import Labels, plan_work, slab_logits, tiles_to_predict


@pytest.fixture(autouse=True)
def folders(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setenv("nnUNet_extTrainer", extension_value())
    Path(nnunet_folders["nnUNet_raw"], "Dataset001_Tiny").mkdir()
    yield


def predictor_of(folder: Path, folds: tuple[int, ...] = (0,), **arguments: Any) -> ModalityPredictor:
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = ModalityPredictor(device=torch.device("cpu"), allow_tqdm=False, **arguments)
        predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    """float32 [1, Z, Y, X], smooth enough for a network to say something about."""
    from scipy import ndimage

    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, 1.5)[None].astype(np.float32)


def prepared(predictor: ModalityPredictor, image: np.ndarray, spacing: list[float]) -> tuple[torch.Tensor, dict]:
    """As nnU-Net preprocesses it."""
    configuration = predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(
        image, None, {"spacing": spacing}, predictor.plans_manager, configuration, predictor.dataset_json
    )
    return torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)), properties


def whole(predictor: ModalityPredictor, data: torch.Tensor, properties: dict) -> np.ndarray:
    """By nnU-Net: all logits, then the export's own function."""
    logits = predictor.predict_logits_from_preprocessed_data(data).numpy()
    return convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, predictor.plans_manager, predictor.configuration_manager, predictor.label_manager, properties
    )


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("shape", [(33, 20, 17), (9, 21, 40), (6, 41, 12), (8, 16, 12)])
def test_logits_are_bit_for_bit_those_of_the_whole(dimensions: int, shape: tuple[int, ...]) -> None:
    """Two folds, with the longest axis first, last and in the middle; also one that is shorter than a tile."""
    predictor = predictor_of(volume_model(dimensions, (0, 1)), (0, 1))
    data = torch.from_numpy(picture(*shape))
    expected = predictor.predict_logits_from_preprocessed_data(data)
    for slabs in (1, 2, 3, 5):
        work, cuts = plan_work(predictor, data, slabs)
        assert len(cuts) == slabs and cuts[0][0] == 0 and cuts[-1][1] == shape[work.axis]
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(cuts)) and all(a < b for a, b in cuts)
        assert shape[work.axis] == (max(shape) if dimensions == 3 else shape[0])
        parts = [slab_logits(work, *cut) for cut in cuts]
        assert parts[0].dtype == torch.half
        assert torch.equal(torch.cat(parts, dim=work.axis + 1), expected)


SPACINGS = {
    "as the plans": [2.0, 2.0, 2.0],
    "finer": [1.1, 1.3, 1.7],
    "coarser": [3.1, 2.9, 4.3],
    "thick slices": [7.0, 1.5, 1.5],  # nnU-Net resamples these by nearest neighbour between slices
    "one axis": [2.0, 1.0, 2.0],
}


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("depth", [24, 25])
def test_labels_are_those_of_the_whole(spacing: str, depth: int) -> None:
    """0 to 3 levels (1 to 8 slabs) of an even and of an odd depth; what is cropped and transposed comes back."""
    folder = volume_model(3, top={"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]})
    predictor = predictor_of(folder)
    image = picture(depth, 14, 19)
    image[:, :3] = image[:, :, :1] = 0  # nnU-Net crops it
    data, properties = prepared(predictor, image, SPACINGS[spacing])
    expected = whole(predictor, data, properties)
    assert expected.shape == image.shape[1:] and len(np.unique(expected)) > 2
    for slabs in (1, 2, 4, 8):
        found = predictor.segment_in_slabs(data, properties, slabs)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert np.array_equal(found, expected), slabs


GEOMETRIES = {  # preprocessed shape, image's shape, axis of the slabs, spacing of both
    "first axis": ((30, 23, 21), (47, 51, 37), 0, [2.0, 2.0, 2.0], [1.3, 0.9, 1.1]),
    "middle axis": ((20, 43, 21), (27, 70, 10), 1, [2.0, 2.0, 2.0], [1.5, 1.2, 4.2]),
    "last axis": ((20, 21, 40), (17, 20, 81), 2, [2.0, 2.0, 2.0], [2.4, 2.1, 1.0]),
    "thick, cut in the plane": ((15, 30, 35), (15, 51, 53), 2, [5.0, 2.0, 2.0], [5.0, 1.2, 1.3]),
    "thick in the image, cut in the plane": ((21, 30, 35), (10, 51, 53), 2, [2.0, 2.0, 2.0], [6.5, 1.2, 1.3]),
    "thick, cut between slices": ((45, 20, 22), (21, 40, 41), 0, [2.0, 2.0, 2.0], [6.5, 1.0, 1.1]),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("slabs", [1, 4])
def test_resampled_logits_are_bit_for_bit_those_of_the_whole(geometry: str, slabs: int) -> None:
    shape, wanted, axis, own, spacing = GEOMETRIES[geometry]
    words = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    logits = np.random.default_rng(0).normal(0, 5, (3, *shape)).astype(np.float16)
    expected = resample_data_or_seg_to_shape(logits, wanted, own, spacing, **words)
    seen: list[np.ndarray] = []

    def keep(part: np.ndarray) -> np.ndarray:
        seen.append(part)
        return part.argmax(0)

    predictor: Any = SimpleNamespace(
        plans_manager=SimpleNamespace(transpose_forward=[0, 1, 2]),
        configuration_manager=SimpleNamespace(
            spacing=own, resampling_fn_probabilities=partial(resample_data_or_seg_to_shape, **words)
        ),
        label_manager=SimpleNamespace(foreground_labels=[1, 2], convert_logits_to_segmentation=keep),
    )
    properties = {"shape_after_cropping_and_before_resampling": wanted, "spacing": spacing}
    labels = Labels(predictor, properties, shape, axis)
    cuts = np.linspace(0, shape[axis], slabs + 1).astype(int).tolist()
    for start, stop in itertools.pairwise(cuts):
        labels.add(logits.take(range(start, stop), axis + 1), start)
    assert np.array_equal(np.concatenate(seen, axis + 1), expected)
    assert np.array_equal(labels.segmentation, expected.argmax(0))


@pytest.mark.parametrize("shape", [(5, 30, 22), (20, 18, 15)])
def test_two_dimensions(shape: tuple[int, ...]) -> None:
    """Cut between slices where there are enough of them, else in the plane."""
    predictor = predictor_of(volume_model(2))
    data, properties = prepared(predictor, picture(*shape), [4.0, 1.5, 1.2])
    expected = whole(predictor, data, properties)
    for slabs in (1, 3, 7):
        work, cuts = plan_work(predictor, data, slabs)
        assert work.axis == (0 if slabs <= shape[0] else int(np.argmax(data.shape[1:])))
        if work.axis == 0:
            assert tiles_to_predict(work, cuts) == len(work.tiles), "nothing is predicted twice"
        assert np.array_equal(predictor.segment_in_slabs(data, properties, slabs), expected)


def test_regions() -> None:
    labels = {"background": 0, "body": [1, 2, 3], "kidneys": [2, 3], "left_kidney": [2]}
    predictor = predictor_of(volume_model(3, labels=labels))
    data, properties = prepared(predictor, picture(20, 15, 18), [1.5, 1.5, 1.5])
    expected = whole(predictor, data, properties)
    assert len(np.unique(expected)) > 2
    assert np.array_equal(predictor.segment_in_slabs(data, properties, 3), expected)


@pytest.mark.parametrize("spacing", ["finer", "thick slices"])
def test_resampling_by_torch(spacing: str) -> None:
    """Single precision may turn a voxel on the border between two classes."""
    words = {"is_seg": False, "force_separate_z": None, "memefficient_seg_resampling": False}
    folder = volume_model(
        3,
        resampling_fn_probabilities="resample_torch_fornnunet",
        resampling_fn_probabilities_kwargs=words,
    )
    predictor = predictor_of(folder)
    data, properties = prepared(predictor, picture(30, 15, 18), SPACINGS[spacing])
    expected = whole(predictor, data, properties)
    found = predictor.segment_in_slabs(data, properties, 4)
    assert (found != expected).mean() <= 1e-4 and found.shape == expected.shape


def test_resampling_that_is_not_known_is_refused() -> None:
    cubic = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    predictor = predictor_of(volume_model(3, resampling_fn_probabilities_kwargs=cubic))
    data, properties = prepared(predictor, picture(20, 15, 18), [1.5, 1.5, 1.5])
    with pytest.raises(UsageError, match=r"--slabs can resample linearly.*the plans have resample_data.*'order': 3"):
        predictor.segment_in_slabs(data, properties, 2)
    data, properties = prepared(predictor, picture(20, 15, 18), [2.0, 2.0, 2.0])
    expected = whole(predictor, data, properties)
    assert np.array_equal(predictor.segment_in_slabs(data, properties, 2), expected), "nothing is to be resampled"


def test_more_slabs_than_voxels() -> None:
    predictor = predictor_of(volume_model(3))
    data, properties = prepared(predictor, picture(4, 5, 6), [2.0, 2.0, 2.0])
    assert np.array_equal(predictor.segment_in_slabs(data, properties, 99), whole(predictor, data, properties))


def test_cuts_are_where_few_tiles_reach_over_them() -> None:
    """Tiles of 8 at 0, 4, 8, ...: a cut at 16 is in the midst of one of them, one at 15 of two."""
    predictor = predictor_of(volume_model(3))
    work, cuts = plan_work(predictor, torch.zeros(1, 32, 16, 12), 2)
    assert cuts == [(0, 16), (16, 32)]
    assert tiles_to_predict(work, cuts) == len(work.tiles) + 1 == 8
    work, cuts = plan_work(predictor, torch.zeros(1, 36, 16, 12), 2)
    assert cuts in ([(0, 16), (16, 36)], [(0, 20), (20, 36)])


def test_progress_ends_at_one_and_never_goes_back() -> None:
    predictor = predictor_of(volume_model(3, (0, 1)), (0, 1))
    seen: list[float] = []
    predictor.on_progress = seen.append
    data, properties = prepared(predictor, picture(20, 15, 18), [2.0, 2.0, 2.0])
    predictor.segment_in_slabs(data, properties, 3)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1)


def test_memory_holds_the_logits_of_one_slab(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that is made is a slab's, not the volume's."""
    predictor = predictor_of(volume_model(3))
    data = torch.from_numpy(picture(64, 16, 12))
    made: list[int] = []
    zeros = torch.zeros

    def counting(shape: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        made.append(int(np.prod(shape)))
        return zeros(shape, *args, **kwargs)

    monkeypatch.setattr(torch, "zeros", counting)
    work, cuts = plan_work(predictor, data, 4)
    for cut in cuts:
        slab_logits(work, *cut)
    assert max(made) <= 5 * (64 // 4 + 4) * 16 * 12


def test_mirroring() -> None:
    folder = volume_model(3, labels={"background": 0, "a": 1, "b": 2}, name="nnUNetTrainerContrastAug")
    predictor = predictor_of(folder)
    predictor.allowed_mirroring_axes = (0, 2)
    data, properties = prepared(predictor, picture(20, 15, 18), [1.5, 1.5, 1.5])
    assert np.array_equal(predictor.segment_in_slabs(data, properties, 3), whole(predictor, data, properties))
