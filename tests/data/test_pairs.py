"""Referring pairs: what belongs to the target, what to the reference, and that both are told apart from the labels."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform

from nnunet_multimodal.data.contrast import ReferenceContrast, TargetContrast
from nnunet_multimodal.data.pairs import ReferenceJitter, ReferringPair
from nnunet_multimodal.errors import DataProblem

SHAPES = [(60, 40), (12, 40, 32)]


class Add(ImageOnlyTransform):
    """A chain whose doings can be read off its result."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def _apply_to_image(self, img: torch.Tensor, **params) -> torch.Tensor:
        return img.add_(self.value)


def sample(shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Two block organs, 1 and 3, and an image that shows them."""
    labels = torch.zeros(1, *shape, dtype=torch.int16)
    y, x = shape[-2:]
    labels[..., y // 5 : y // 2, x // 5 : 4 * x // 5] = 1
    labels[..., 3 * y // 5 : 4 * y // 5, x // 4 : 3 * x // 4] = 3
    return {"image": labels.float() - 1.0, "segmentation": labels}


@pytest.fixture(autouse=True)
def seeded() -> None:
    np.random.seed(0)


@pytest.mark.parametrize("shape", SHAPES)
def test_layout(shape: tuple[int, ...]) -> None:
    given = sample(shape)
    image, labels = given["image"].clone(), given["segmentation"].clone()
    out = ReferringPair([1, 2, 3], TargetContrast(), ReferenceContrast(), ReferenceJitter())(**given)
    assert out["image"].shape == (5, *shape) and out["image"].dtype == torch.float32
    assert torch.isfinite(out["image"]).all()
    assert set(out["image"][2:].unique().tolist()) == {0.0, 1.0}
    assert [bool(prompt.any()) for prompt in out["image"][2:]] == [True, False, True]
    assert torch.equal(out["segmentation"], labels)
    assert torch.equal(given["image"], image), "the caller's image was changed in place"


@pytest.mark.parametrize("shape", SHAPES)
def test_target_and_reference_go_through_their_own_chains(shape: tuple[int, ...]) -> None:
    given = sample(shape)
    out = ReferringPair([1, 3], Add(10), Add(20), None)(**given)["image"]
    assert torch.equal(out[0], given["image"][0] + 10)
    assert torch.equal(out[1], given["image"][0] + 20)


@pytest.mark.parametrize("shape", SHAPES)
def test_scribbles_lie_on_the_jittered_reference(shape: tuple[int, ...]) -> None:
    """The reference image is made of its labels: under each scribble it shows that organ, or its interpolated rim."""
    given, off_target, exactly = sample(shape), 0, []
    for _ in range(20):
        out = ReferringPair([1, 3], None, None, ReferenceJitter(translation=0.15))(**given)["image"]
        assert torch.equal(out[0], given["image"][0])
        for prompt, organ in zip(out[2:], (1, 3)):
            shown = out[1][prompt > 0] + 1
            # at a corner the nearest pixel has the weight 1/4 (1/8 in 3D) in the interpolation, and the rest shows 0
            assert (shown > organ * 0.5 ** len(shape) - 1e-4).all() and (shown < organ + 1e-4).all()
            exactly.append((shown - organ).abs() < 1e-4)
            off_target += int((given["segmentation"][0][prompt > 0] != organ).sum())
    assert torch.cat(exactly).float().mean() > 0.7  # inside the organ; the rest is rim
    assert off_target > 0, "the scribbles followed the target, not the reference"


def test_without_pairing_both_are_the_same_image() -> None:
    given = sample((60, 40))
    pair = ReferringPair([1, 3], TargetContrast(), ReferenceContrast(p_scale=1.0), ReferenceJitter(), paired=False)
    for _ in range(10):
        out = pair(**given)["image"]
        assert torch.equal(out[0], out[1])
        for prompt, organ in zip(out[2:], (1, 3)):
            assert prompt.any() and (given["segmentation"][0][prompt > 0] == organ).all()
    once = ReferringPair([1, 3], Add(10), Add(20), None, paired=False)(**given)["image"]
    assert torch.equal(once[1], given["image"][0] + 10)


def test_volumes_are_scribbled_on_one_to_four_slices() -> None:
    pair, counts = ReferringPair([1], None, None, None), set()
    for _ in range(40):
        prompt = pair(**sample((12, 40, 32)))["image"][2]
        counts.add(int(prompt.any(dim=2).any(dim=1).sum()))
    assert counts == {1, 2, 3, 4}


def test_organ_that_left_the_reference_has_no_scribble() -> None:
    """One pixel at the border, a shift of up to 40 %: sometimes it is gone, and then its channel is empty."""
    labels = torch.zeros(1, 40, 40, dtype=torch.int16)
    labels[0, 1, 20] = 1
    pair = ReferringPair([1], None, None, ReferenceJitter(0, 0.4, 0))
    present = [bool(pair(image=labels.float(), segmentation=labels)["image"][2].any()) for _ in range(40)]
    assert 0 < sum(present) < 40


def test_more_than_one_image_channel_is_an_error() -> None:
    given = sample((60, 40))
    given["image"] = given["image"].repeat(2, 1, 1)
    with pytest.raises(DataProblem, match="found 2"):
        ReferringPair([1], None, None, None)(**given)


# --- geometry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_no_jitter_is_the_identity(shape: tuple[int, ...]) -> None:
    given = sample(shape)
    out = ReferenceJitter(0, 0, 0)(**{k: v.clone() for k, v in given.items()})
    assert torch.allclose(out["image"], given["image"], atol=1e-5)
    assert torch.equal(out["segmentation"], given["segmentation"])


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_move_with_the_image(shape: tuple[int, ...]) -> None:
    """Resampled nearest and bilinearly, an organ of ones differs by the half of its rim at most."""
    mask = (sample(shape)["segmentation"] == 1).to(torch.int16)
    for _ in range(20):
        out = ReferenceJitter()(image=mask.float(), segmentation=mask)
        inside, outside = out["image"] > 0.76, out["image"] < 0.24
        assert (out["segmentation"][inside] == 1).all() and (out["segmentation"][outside] == 0).all()
        assert out["segmentation"].dtype == torch.int16


def landmark(image: torch.Tensor) -> np.ndarray:
    """Centre of mass in pixels, counted from the centre of the image."""
    weights = image[0].double()
    axes = [torch.arange(n).double() - (n - 1) / 2 for n in weights.shape]
    grids = torch.meshgrid(*axes, indexing="ij")
    return np.array([float((grid * weights).sum() / weights.sum()) for grid in grids])


@pytest.mark.parametrize("shape", [(41, 81), (9, 41, 81)])
def test_rotation_is_rigid_in_plane_on_a_rectangular_image(shape: tuple[int, ...]) -> None:
    """A dot 30 pixels along the long axis, turned by up to 20 degrees: still 30 pixels from the centre."""
    image = torch.zeros(1, *shape)
    image[..., 20, 70] = 1
    blurred = torch.nn.functional.avg_pool2d(image.reshape(-1, 1, 41, 81), 5, 1, 2).reshape(image.shape)
    angles = []
    for _ in range(10):
        moved = ReferenceJitter(rotation=20, translation=0, scaling=0)(image=blurred.clone())["image"]
        at = landmark(moved)
        assert np.hypot(*at[-2:]) == pytest.approx(30, abs=0.3)
        assert at[:-2] == pytest.approx(0, abs=1e-3)  # in 3D nothing leaves its slices
        angles.append(np.degrees(np.arctan2(at[-2], at[-1])))
    assert max(map(abs, angles)) <= 20.5 and np.ptp(angles) > 5


def test_translation_and_zoom_stay_within_their_bounds() -> None:
    image = torch.zeros(1, 100, 100)
    image[:, 40:60, 40:60] = 1
    for _ in range(30):
        moved = ReferenceJitter(rotation=0, translation=0.04, scaling=0)(image=image.clone())["image"]
        assert np.abs(landmark(moved)).max() <= 4 + 1e-3
        zoomed = ReferenceJitter(rotation=0, translation=0, scaling=0.05)(image=image.clone())["image"]
        assert 400 * 0.95**2 * 0.98 < float(zoomed.sum()) < 400 * 1.05**2 * 1.02


def test_pairs_of_a_real_slice(data_dir) -> None:
    case = data_dir / "abdomen_mr_t2"
    volume = nibabel.load(case / "images" / "mr01.nii.gz").get_fdata(dtype=np.float32)
    labels = np.asanyarray(nibabel.load(case / "labels" / "mr01.nii.gz").dataobj).astype(np.int16)
    z = max(range(labels.shape[2]), key=lambda i: len(np.unique(labels[..., i])))
    image = torch.from_numpy((volume - volume.mean()) / volume.std())[None, ..., z]
    pair = ReferringPair([1, 2, 3, 4], TargetContrast(), ReferenceContrast(), ReferenceJitter())
    outs = [pair(image=image, segmentation=torch.from_numpy(labels)[None, ..., z])["image"] for _ in range(10)]
    assert all(out[2:].flatten(1).any(dim=1).all() for out in outs), "an organ of the slice has no scribble"
    assert all(torch.isfinite(out).all() for out in outs)
    resemblance = [float(torch.corrcoef(torch.stack([out[0].flatten(), image.flatten()]))[0, 1]) for out in outs]
    assert min(resemblance) < 0.5 < max(resemblance), "targets should range from the same contrast to quite another"
