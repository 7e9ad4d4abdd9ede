"""Cross-check 28: prompts go through nnU-Net's augmentation as labels do, and intensities never reach them."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_multimodal.data.contrast import TargetContrast
from nnunet_multimodal.data.prompts import PromptsToImage, PromptsToSegmentation, SimulatePrompts
from nnunet_multimodal.errors import UsageError

SHAPES = [(48, 40), (14, 32, 28)]
STRONG = {f"p_{step}": 1.0 for step in ("remap", "gamma", "bias", "blur", "low_resolution", "gibbs", "noise")}


def blob(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A binary label [1, ...] with an irregular border."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape) - np.reshape([n / 2 for n in shape], (-1,) + (1,) * len(shape))
    distance = np.sqrt((grid**2).sum(axis=0)) + rng.normal(0, 1, shape)
    return torch.from_numpy((distance < min(shape) / 2.5).astype(np.int16))[None]


def spatial(shape: tuple[int, ...]) -> SpatialTransform:
    """nnU-Net's, but in every sample."""
    return SpatialTransform(
        shape, patch_center_dist_from_border=0, random_crop=False, p_rotation=1, rotation=(-0.5, 0.5), p_scaling=1,
        scaling=(0.7, 1.4), p_synchronize_scaling_across_axes=1, border_mode_seg="constant", padding_value_seg=-1,
    )  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_take_the_geometry_of_the_label_and_no_intensity(shape: tuple[int, ...]) -> None:
    label = blob(shape)
    appearance = torch.randn(1, *shape)
    chain = ComposeTransforms(
        [
            PromptsToSegmentation([1, 2]),
            spatial(shape),
            MirrorTransform((0, 1)),
            TargetContrast(**STRONG),
            PromptsToImage(2),
        ]
    )
    for _ in range(10):
        out = chain(image=torch.cat([appearance, label.float(), 1 - label.float()]), segmentation=label.clone())
        image, segmentation = out["image"], out["segmentation"]
        assert image.shape == (3, *shape) and segmentation.shape == (1, *shape)
        assert torch.equal(image[1], (segmentation[0] == 1).float())
        assert torch.equal(image[2], (segmentation[0] == 0).float())  # and so not what was padded with -1


def test_prompts_survive_the_whole_stock_augmentation() -> None:
    label = blob((64, 64))
    stock = nnUNetTrainer.get_training_transforms(np.array([48, 48]), (-3, 3), None, (0, 1), False)
    chain = ComposeTransforms([PromptsToSegmentation([1]), *stock.transforms, PromptsToImage(1)])
    for _ in range(20):
        image = torch.cat([torch.randn(1, 64, 64), label.float()])
        out = chain(image=image, segmentation=label.clone())
        assert out["image"].shape == (2, 48, 48)
        assert torch.equal(out["image"][1], (out["segmentation"][0] == 1).float())


def test_there_and_back_is_the_identity_up_to_the_threshold() -> None:
    image = torch.tensor([[[9.0, 9.0, 9.0, 9.0]], [[0.0, 0.5, 0.6, 1.2]], [[7.0, 7.0, 7.0, 7.0]]])
    segmentation = torch.tensor([[[0, 1, 2, -1]]], dtype=torch.int16)
    moved = PromptsToSegmentation([1])(image=image, segmentation=segmentation)
    assert moved["image"].tolist() == [[[9.0] * 4], [[7.0] * 4]]
    assert moved["segmentation"].dtype == torch.int16
    assert moved["segmentation"].tolist() == [[[0, 1, 2, -1]], [[0, 0, 1, 1]]]
    back = PromptsToImage(1)(**moved)
    assert back["image"].tolist() == [[[9.0] * 4], [[7.0] * 4], [[0.0, 0.0, 1.0, 1.0]]]
    assert torch.equal(back["segmentation"], segmentation)


def test_negative_channels_count_from_the_end() -> None:
    image = torch.stack([torch.zeros(2, 2), torch.ones(2, 2), torch.full((2, 2), 5.0)])
    moved = PromptsToSegmentation([-2])(image=image, segmentation=torch.zeros(1, 2, 2, dtype=torch.int16))
    assert moved["image"][:, 0, 0].tolist() == [0.0, 5.0]


# --- simulated ---------------------------------------------------------------------------------------------------


def labelled(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Organs 1 and 3; no organ 2; one image channel."""
    labels = blob(shape)
    labels[0, ..., shape[-1] // 2 :] *= 3
    return {"image": torch.randn(1, *shape), "segmentation": labels}


@pytest.mark.parametrize("shape", SHAPES)
def test_simulated_prompts_lie_in_their_organs(shape: tuple[int, ...]) -> None:
    np.random.seed(0)
    sample = labelled(shape)
    for _ in range(10):
        out = SimulatePrompts([1, 2, 3], replace=False)(**sample)
        image, labels = out["image"], sample["segmentation"][0]
        assert image.shape == (4, *shape) and image.dtype == torch.float32
        assert torch.equal(image[0], sample["image"][0])
        assert set(image[1:].unique().tolist()) == {0.0, 1.0}
        for prompt, organ in zip(image[1:], [1, 2, 3]):
            assert (labels[prompt > 0] == organ).all()
            assert prompt.any() == (organ != 2)
        assert torch.equal(out["segmentation"], sample["segmentation"])


def test_volumes_are_scribbled_on_a_few_slices() -> None:
    np.random.seed(0)
    counts = []
    for _ in range(60):
        prompt = SimulatePrompts([1], slices_3d=(2, 4), replace=False)(**labelled((14, 32, 28)))["image"][1]
        counts.append(int(prompt.any(dim=2).any(dim=1).sum()))
    assert set(counts) == {2, 3, 4}


def test_organ_on_fewer_slices_than_asked_for() -> None:
    labels = torch.zeros(1, 6, 8, 8, dtype=torch.int16)
    labels[0, 2, 2:6, 2:6] = 1
    sample = {"image": torch.zeros(1, 6, 8, 8), "segmentation": labels}
    prompt = SimulatePrompts([1], slices_3d=(4, 4), replace=False)(**sample)["image"][1]
    assert prompt.any(dim=2).any(dim=1).nonzero().tolist() == [[2]]


def test_replacing_keeps_the_number_of_channels() -> None:
    sample = labelled((48, 40))
    sample["image"] = torch.cat([sample["image"], torch.full((3, 48, 40), 7.0)])
    out = SimulatePrompts([1, 2, 3], replace=True)(**sample)["image"]
    assert out.shape == (4, 48, 40) and out[1:].max() == 1
    with pytest.raises(UsageError, match="only 1 channel"):
        SimulatePrompts([1, 2, 3], replace=True)(**labelled((48, 40)))


def _worker(transform: BasicTransform, numpy_seed: int, queue) -> None:
    np.random.seed(numpy_seed)  # what nnU-Net's augmenter does in its workers; torch keeps the parent's state
    torch.set_num_threads(1)
    queue.put((numpy_seed, transform(**labelled((48, 40)))["image"][1:].numpy()))


def test_forked_workers_draw_different_scribbles() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    transform = SimulatePrompts([1, 3], replace=False)
    workers = [context.Process(target=_worker, args=(transform, seed, queue)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert results[1].any() and results[2].any()
    assert not np.array_equal(results[1], results[2])
