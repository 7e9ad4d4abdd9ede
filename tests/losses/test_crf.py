"""GatedCRFLoss and MultiViewCRFLoss against double loops, the unfold formulation of public code, and algebra."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from nnunet_multimodal.losses import GatedCRFLoss, MultiViewCRFLoss, pairwise

BOTH = {"weight": 0.9, "sigma_xy": 6.0, "sigma_intensity": 0.1}
POSITION = {"weight": 0.4, "sigma_xy": 3.0}
BRIGHTNESS = {"weight": 0.2, "sigma_intensity": 0.25}
KERNELS = [[BOTH], [POSITION], [BRIGHTNESS], [BOTH, POSITION], [BOTH, POSITION, BRIGHTNESS]]
SHAPES = [((2, 3, 6, 7), 2), ((1, 2, 4, 3), 5), ((2, 2, 1, 6), 3), ((1, 2, 6, 1), 3), ((1, 4, 1, 1), 1)]


def case(shape: tuple[int, ...], channels: int = 1, dtype: torch.dtype = torch.float64, sum_to_one: bool = False):
    """Probabilities, which need not sum to 1, and an image with differences of about one sigma."""
    draw = torch.Generator().manual_seed(0)
    p = torch.rand(shape, generator=draw, dtype=torch.float64).to(dtype)
    p = (3 * p).softmax(1).requires_grad_() if sum_to_one else p.requires_grad_()
    return p, (0.2 * torch.randn(shape[0], channels, *shape[2:], generator=draw, dtype=torch.float64)).to(dtype)


def similarity(difference: torch.Tensor, squared_distance: float, kernels) -> torch.Tensor:
    total = torch.zeros((), dtype=difference.dtype)
    for kernel in kernels:
        exponent = torch.zeros((), dtype=difference.dtype)
        if "sigma_xy" in kernel:
            exponent = exponent - squared_distance / (2 * kernel["sigma_xy"] ** 2)
        if "sigma_intensity" in kernel:
            exponent = exponent - (difference**2).sum() / (2 * kernel["sigma_intensity"] ** 2)
        total = total + kernel.get("weight", 1.0) * exponent.exp()
    return total


def double_loop(p: torch.Tensor, image: torch.Tensor, kernels, radius: int, spacing=(1.0, 1.0)) -> torch.Tensor:
    """1/V sum_i sum_j K_ij (1 - p_i . p_j) over all ordered pairs of one image's pixels, far ones left out."""
    batch, _, height, width = p.shape
    pixels = list(itertools.product(range(height), range(width)))
    total = torch.zeros((), dtype=p.dtype)
    for b, (y, x), (v, u) in itertools.product(range(batch), pixels, pixels):
        if (y, x) == (v, u) or max(abs(y - v), abs(x - u)) > radius:
            continue
        squared = ((y - v) * spacing[0]) ** 2 + ((x - u) * spacing[1]) ** 2
        weight = similarity(image[b, :, y, x] - image[b, :, v, u], squared, kernels)
        total = total + weight * (1 - (p[b, :, y, x] * p[b, :, v, u]).sum())
    return total / (batch * height * width)


def unfolded(p: torch.Tensor, image: torch.Tensor, kernel, radius: int) -> torch.Tensor:
    """The sum as PyMIC, GatedCRFLoss and PA-Seg form it: a copy per neighbour, zeros outside the image."""
    (batch, _, height, width), side = p.shape, 2 * radius + 1

    def neighbours(x: torch.Tensor) -> torch.Tensor:
        return F.unfold(x, side, padding=radius).view(batch, x.shape[1], side * side, height, width)

    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).to(p.dtype)
    seen = torch.cat([grid.expand(batch, -1, -1, -1) / kernel["sigma_xy"], image / kernel["sigma_intensity"]], 1)
    weight = kernel["weight"] * (-0.5 * (neighbours(seen) - seen.unsqueeze(2)).square().sum(1)).exp()
    weight[:, side * side // 2] = 0
    return (weight * (1 - (neighbours(p) * p.unsqueeze(2)).sum(1))).sum() / (batch * height * width)


def gradient(loss: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, p)[0]


@pytest.fixture(params=[2**17, 100, 1], ids=["one block", "blocks of rows", "smallest blocks"])
def block(request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairwise, "BLOCK", request.param)


@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize("kernels", KERNELS)
def test_value_and_gradient_are_those_of_the_double_loop(kernels, sum_to_one: bool, block) -> None:
    p, image = case((2, 3, 6, 5), channels=2, sum_to_one=sum_to_one)
    found, expected = GatedCRFLoss(kernels, 2)(p, image), double_loop(p, image, kernels, 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(found, p), gradient(expected, p), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "radius"), SHAPES)
def test_images_narrower_than_the_window(shape, radius: int, block) -> None:
    p, image = case(shape)
    found, expected = GatedCRFLoss([BOTH, POSITION], radius)(p, image), double_loop(p, image, [BOTH, POSITION], radius)
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        torch.testing.assert_close(gradient(found, p), gradient(expected, p))
    else:  # a single pixel has no neighbour
        assert found == 0 and (gradient(found, p) == 0).all()


def test_a_narrow_kernel_reaches_fewer_neighbours_and_the_narrowest_none() -> None:
    p, image = case((1, 2, 5, 6))
    kernels = [{"sigma_xy": 0.2, "sigma_intensity": 0.2}, {"sigma_xy": 0.3}]
    expected = double_loop(p, image, kernels, 3)
    found = GatedCRFLoss(kernels, 3)(p, image)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient(found, p), gradient(expected, p), rtol=1e-9, atol=0)
    nothing = GatedCRFLoss([{"sigma_xy": 0.01}], 3)(p, image)
    assert nothing.item() == 0 and (gradient(nothing, p) == 0).all()


def test_more_threads_make_larger_blocks_and_the_same_sum() -> None:
    p, image = case((1, 3, 300, 400), dtype=torch.float32, sum_to_one=True)
    expected = GatedCRFLoss(radius=2)(p, image)
    slope = gradient(expected, p)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = GatedCRFLoss(radius=2)(p, image)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradient(found, p), slope)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sum_to_one", [True, False])
def test_single_precision_is_within_1e_5(sum_to_one: bool) -> None:
    p, image = case((1, 4, 8, 7), dtype=torch.float32, sum_to_one=sum_to_one)
    found, expected = GatedCRFLoss()(p, image), double_loop(p.double(), image.double(), [{**BOTH, "weight": 1}], 5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(found, p), gradient(expected, p), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(12, 15), (70, 300)])  # the larger one is cut into blocks of the real size
def test_gradient_is_that_of_the_unfold_formulation_but_not_its_border(size) -> None:
    p, image = case((2, 3, *size), sum_to_one=True)
    found, reference = GatedCRFLoss([BOTH], 5)(p, image), unfolded(p, image, BOTH, 5)
    torch.testing.assert_close(gradient(found, p), gradient(reference, p), rtol=0, atol=1e-12)
    assert reference > found * 1.001  # neighbours outside, where p is 0, count there


def test_two_pixels_by_hand() -> None:
    a, b, step = 0.8, 0.3, 0.15
    p = torch.tensor([[a, b], [1 - a, 1 - b]], dtype=torch.float64).view(1, 2, 1, 2)
    image = torch.tensor([0.0, step], dtype=torch.float64).view(1, 1, 1, 2)
    weight = math.exp(-1 / (2 * 6**2) - step**2 / (2 * 0.1**2))
    expected = 2 * weight * (1 - a * b - (1 - a) * (1 - b)) / 2
    assert GatedCRFLoss()(p, image).item() == pytest.approx(expected, abs=1e-12)
    assert GatedCRFLoss()(p.float(), image.float()).item() == pytest.approx(0.198508, abs=1e-6)
    assert GatedCRFLoss(radius=9)(p, image).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [1, 4, 14])
def test_one_class_everywhere_is_exactly_zero(classes: int) -> None:
    _, image = case((2, 1, 20, 33), channels=2, dtype=torch.float32)
    p = F.one_hot(torch.full((2, 20, 33), classes - 1), classes).movedim(-1, 1).float()
    assert GatedCRFLoss([BOTH, POSITION, BRIGHTNESS])(p, image).item() == 0
    volume, image = case((1, classes, 5, 6, 7), dtype=torch.float32)
    p = torch.zeros_like(volume)
    p[:, classes // 2] = 1
    assert MultiViewCRFLoss()(p, image).item() == 0


def test_order_of_classes_images_rows_and_columns_does_not_matter() -> None:
    p, image = case((3, 4, 8, 9), channels=2)
    loss = GatedCRFLoss([BOTH, POSITION], 3)
    expected = loss(p, image)
    for other, other_image in (
        (p[:, [2, 0, 3, 1]], image),
        (p[[2, 0, 1]], image[[2, 0, 1]]),
        (p.flip(2), image.flip(2)),  # K_ij = K_ji
        (p.flip(3), image.flip(3)),
        (p.transpose(2, 3), image.transpose(2, 3)),
        (p, image[:, [1, 0]]),
        (p, image + 7),
    ):
        torch.testing.assert_close(loss(other, other_image), expected, rtol=1e-12, atol=0)


def test_is_the_sum_over_classes_of_p_times_one_minus_p_where_probabilities_sum_to_one() -> None:
    p, image = case((1, 3, 4, 4), sum_to_one=True)
    expected = 0.0
    for (y, x), (v, u) in itertools.permutations(itertools.product(range(4), range(4)), 2):
        if max(abs(y - v), abs(x - u)) <= 2:
            weight = similarity(image[0, :, y, x] - image[0, :, v, u], (y - v) ** 2 + (x - u) ** 2, [BOTH])
            expected += weight * (p[0, :, y, x] * (1 - p[0, :, v, u])).sum() / 16
    torch.testing.assert_close(GatedCRFLoss([BOTH], 2)(p, image), expected)


@pytest.mark.parametrize("loss", [GatedCRFLoss([BOTH, POSITION], 2), GatedCRFLoss([BRIGHTNESS], 4)])
def test_gradcheck(loss) -> None:
    p, image = case((2, 2, 4, 5))
    assert torch.autograd.gradcheck(lambda x: loss(x, image), p)
    assert torch.autograd.gradcheck(lambda x: 3 * loss(x.softmax(1), image), p)


def test_gradcheck_of_the_volume() -> None:
    p, image = case((1, 2, 3, 4, 3))
    assert torch.autograd.gradcheck(lambda x: MultiViewCRFLoss([BOTH, POSITION], 2, (2.5, 1, 1))(x, image), p)


def test_gradient_twice_from_one_forward_pass_is_the_same() -> None:
    p, image = case((1, 2, 5, 5))
    loss = GatedCRFLoss()(p, image)
    first = torch.autograd.grad(loss, p, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, p)[0])


def test_no_second_derivative_and_none_of_the_image() -> None:
    p, image = case((1, 2, 4, 4))
    image.requires_grad_()
    slope = torch.autograd.grad(GatedCRFLoss()(p, image), p, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()
    GatedCRFLoss()(p, image).backward()
    assert image.grad is None
    assert not GatedCRFLoss()(p.detach(), image).requires_grad


def test_any_layout_in_memory() -> None:
    p, image = case((2, 4, 8, 12), channels=2)
    loss, expected = GatedCRFLoss(radius=3), GatedCRFLoss(radius=3)(p, image)
    slope = gradient(expected, p)
    for change in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        other = change(p.detach()).requires_grad_()
        assert not other.is_contiguous()
        found = loss(other, change(image))
        assert torch.equal(found, expected) and torch.equal(gradient(found, other), slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    """(Delta I / sigma)^2 of a CT in Hounsfield units is far beyond fp16."""
    p, image = case((1, 3, 6, 6), dtype=torch.float32)
    p, image = p.detach().to(dtype).requires_grad_(), (2000 * image).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = GatedCRFLoss([BOTH, POSITION])(p, image)
    expected = GatedCRFLoss([BOTH, POSITION])(p.float(), image.float())
    assert found.dtype == torch.float32 and torch.isfinite(found) and torch.equal(found, expected)
    assert gradient(found, p).dtype == dtype


def test_far_intensities_have_no_similarity_and_no_nan() -> None:
    p = torch.full((1, 2, 1, 2), 0.5, requires_grad=True)
    image = torch.tensor([-6e4, 6e4]).view(1, 1, 1, 2)
    loss = GatedCRFLoss()(p, image)
    assert 0 <= loss.item() < 1e-15 and gradient(loss, p).abs().max() < 1e-15


@pytest.mark.parametrize("radius", [1, 5])
def test_memory_does_not_grow_with_the_window(radius: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
            return result

    monkeypatch.setattr(pairwise, "BLOCK", 2048)
    p, image = case((1, 4, 64, 64), dtype=torch.float32)
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.untyped_storage().nbytes()
        return tensor

    with Largest() as mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        GatedCRFLoss(radius=radius)(p, image).backward()
    size = p.numel() * p.element_size()
    assert mode.bytes <= 1.25 * size and kept <= 1.25 * size


def slices(x: torch.Tensor, axis: int) -> torch.Tensor:
    """[B, C, Z, Y, X] -> all slices across one axis as a batch of images."""
    return x.movedim(axis, 1).flatten(0, 1)


@pytest.mark.parametrize("sum_to_one", [True, False])
@pytest.mark.parametrize("kernels", [KERNELS[0], KERNELS[-1]])
@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 7), (1, 2, 1, 5, 4), (1, 2, 3, 1, 1), (1, 2, 2, 3, 9)])
def test_multi_view_is_the_mean_of_three_two_dimensional_losses(kernels, shape, sum_to_one: bool, block) -> None:
    p, image = case(shape, channels=2, sum_to_one=sum_to_one)
    flat = GatedCRFLoss(kernels, 3)
    expected = sum(flat(slices(p, axis), slices(image, axis)) for axis in (2, 3, 4)) / 3
    found = MultiViewCRFLoss(kernels, 3)(p, image)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(found, p), gradient(expected, p), rtol=1e-10, atol=1e-12)


def test_multi_view_of_a_large_volume_in_single_precision() -> None:
    p, image = case((1, 3, 12, 40, 70), dtype=torch.float32, sum_to_one=True)
    flat = GatedCRFLoss([BOTH], 5)
    expected = sum(flat(slices(p, axis), slices(image, axis)) for axis in (2, 3, 4)) / 3
    found = MultiViewCRFLoss([BOTH], 5)(p, image)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(found, p), gradient(expected, p), rtol=1e-5, atol=1e-9)


def test_spacing_sets_distances_not_the_window() -> None:
    p, image = case((1, 2, 3, 4, 3))
    spacing = (2.5, 1.2, 0.7)
    expected = torch.zeros((), dtype=p.dtype)
    for axis in range(3):
        plane = [s for other, s in enumerate(spacing) if other != axis]
        expected = expected + double_loop(slices(p, axis + 2), slices(image, axis + 2), [BOTH, POSITION], 2, plane)
    found = MultiViewCRFLoss([BOTH, POSITION], 2, spacing)(p, image)
    torch.testing.assert_close(found, expected / 3)
    torch.testing.assert_close(gradient(found, p), gradient(expected / 3, p))
    assert MultiViewCRFLoss(spacing=(1, 1, 1))(p, image) == MultiViewCRFLoss()(p, image) != found


def test_views_of_a_cube_are_alike() -> None:
    p, image = case((2, 3, 6, 6, 6))
    loss = MultiViewCRFLoss([BOTH, POSITION], 3)
    for order in itertools.permutations((2, 3, 4)):
        torch.testing.assert_close(
            loss(p.permute(0, 1, *order), image.permute(0, 1, *order)), loss(p, image), rtol=1e-12, atol=0
        )


def test_neighbours_on_an_axis_are_computed_once() -> None:
    assert sum(len(plane.offsets) for plane in MultiViewCRFLoss(radius=5).planes) == 165
    assert sum(len(plane.offsets) for plane in GatedCRFLoss(radius=5).planes) == 60


def test_a_volume_in_the_flat_loss_is_its_axial_slices() -> None:
    p, image = case((2, 3, 4, 5, 6))
    loss = GatedCRFLoss([BOTH], 2)
    torch.testing.assert_close(loss(p, image), loss(slices(p, 2), slices(image, 2)))


@pytest.mark.parametrize(
    ("kernels", "error", "words"),
    [
        ([], ValueError, "kernels is empty"),
        (BOTH, TypeError, "kernels must be a list"),
        ("gauss", TypeError, "kernels must be a list"),
        ([3], TypeError, r"kernels\[0\] must be a dictionary"),
        ([{"weight": 1}], ValueError, "neither sigma_xy nor sigma_intensity"),
        ([BOTH, {"sigma": 1}], ValueError, r"kernels\[1\] has unknown keys \['sigma'\]"),
        ([{"sigma_xy": 0}], ValueError, "sigma_xy must be a positive"),
        ([{"sigma_xy": -1}], ValueError, "sigma_xy must be a positive"),
        ([{"sigma_intensity": "0.1"}], ValueError, "sigma_intensity must be a positive"),
        ([{"sigma_intensity": math.nan}], ValueError, "sigma_intensity must be a positive"),
        ([{"weight": math.inf, "sigma_xy": 1}], ValueError, "weight must be a positive"),
        ([{"weight": True, "sigma_xy": 1}], ValueError, "weight must be a positive"),
        ([{"weight": None, "sigma_xy": 1}], ValueError, "weight must be a positive"),
    ],
)
@pytest.mark.parametrize("loss", [GatedCRFLoss, MultiViewCRFLoss])
def test_bad_kernels(loss, kernels, error, words: str) -> None:
    with pytest.raises(error, match=words):
        loss(kernels=kernels)


@pytest.mark.parametrize("loss", [GatedCRFLoss, MultiViewCRFLoss])
@pytest.mark.parametrize(("radius", "error"), [(0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_radius(loss, radius, error) -> None:
    with pytest.raises(error, match=r"radius must be .*found"):
        loss(radius=radius)


@pytest.mark.parametrize("spacing", [(1, 1), (1, 1, 0), (1, 1, -2), (1, 1, math.nan), (1, 1, "2"), 3, "123"])
def test_bad_spacing(spacing) -> None:
    with pytest.raises(ValueError, match="spacing must be"):
        MultiViewCRFLoss(spacing=spacing)


@pytest.mark.parametrize(
    ("p", "image", "words"),
    [
        ((1, 2, 4), (1, 1, 4), r"probabilities must be \[B, C, Y, X\] or \[B, C, Z, Y, X\]"),
        ((1, 2, 4, 4), (1, 4, 4), "axes and the batch"),
        ((1, 2, 4, 4), (2, 1, 4, 4), "axes and the batch"),
        ((1, 2, 4, 4), (1, 1, 4, 5), "same size"),
        ((1, 2, 0, 4), (1, 1, 0, 4), "must not be empty"),
        ((1, 2, 4, 4), (1, 0, 4, 4), "must not be empty"),
    ],
)
def test_bad_shapes(p, image, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GatedCRFLoss()(torch.rand(p), torch.rand(image))


def test_bad_inputs_of_the_volume() -> None:
    with pytest.raises(ValueError, match=r"probabilities must be \[B, C, Z, Y, X\]: found \(1, 2, 4, 4\)"):
        MultiViewCRFLoss()(torch.rand(1, 2, 4, 4), torch.rand(1, 1, 4, 4))
    with pytest.raises(ValueError, match="must be floating"):
        GatedCRFLoss()(torch.rand(1, 2, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.int16))


def test_kernels_of_a_plans_file_are_not_changed() -> None:
    kernels = [dict(BOTH), dict(POSITION)]
    GatedCRFLoss(kernels)
    assert kernels == [BOTH, POSITION]
