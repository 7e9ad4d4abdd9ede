"""Intensity chains: golden numbers, untouched channels (cross-check 28), no NaN, and numpy as the only dice."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnunet_multimodal.data.contrast import ContrastChain, ReferenceContrast, TargetContrast, zscore
from nnunet_multimodal.data.intensity import BiasField, Blur, Gibbs, Noise, Remap, Scale, Sometimes
from nnunet_multimodal.data.intensity.remap import piecewise_linear

SHAPES = [(2, 40, 36), (2, 12, 20, 24)]
ALL_ON = {f"p_{step}": 1.0 for step in ("remap", "gamma", "bias", "blur", "low_resolution", "gibbs", "noise")}
MILD_ALL_ON = {f"p_{step}": 1.0 for step in ("scale", "gamma", "noise")}


def image(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Smooth and z-scored, as preprocessed images are."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = np.stack([gaussian_filter(channel, 2) for channel in noise])
    return torch.from_numpy((smooth - smooth.mean()) / smooth.std()).float()


@pytest.fixture(autouse=True)
def seeded() -> None:
    np.random.seed(0)


# --- the curve ---------------------------------------------------------------------------------------------------


def test_piecewise_linear_by_hand() -> None:
    """Knots (0, 0), (1, 2), (2, 1), (4, 1.5): read off the drawing, constant beyond the ends."""
    x = torch.tensor([-5.0, 0.0, 0.5, 1.0, 1.25, 2.0, 3.0, 4.0, 9.0])
    out = piecewise_linear(x, np.array([0.0, 1, 2, 4]), np.array([0.0, 2, 1, 1.5]))
    assert torch.allclose(out, torch.tensor([0.0, 0.0, 1.0, 2.0, 1.75, 1.0, 1.25, 1.5, 1.5]), atol=1e-6)


def test_piecewise_linear_is_numpy_interp() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        positions, levels = np.sort(rng.normal(size=6)) + np.arange(6) * 0.1, rng.uniform(size=6)
        x = rng.normal(0, 2, size=(20, 20)).astype(np.float32)
        out = piecewise_linear(torch.from_numpy(x), positions, levels)
        np.testing.assert_allclose(out.numpy(), np.interp(x, positions, levels), atol=2e-5)


def test_remap_by_hand() -> None:
    """0..1000, its middle lifted: the curve saturates at the 0.5 % quantiles, 5 and 995, and is 0.8 at 500."""
    ramp = torch.arange(1001.0).reshape(1, 7, 143)
    params = {"knots": np.array([0.0, 0.5, 1.0]), "levels": np.array([0.0, 0.8, 1.0]), "air": None}
    for by_quantile in (True, False):  # a ramp has its quantiles at the same places
        out = Remap().apply({"image": ramp}, by_quantile=by_quantile, **params)["image"].flatten()
        assert out[[0, 5, 500, 995, 1000]].tolist() == pytest.approx([0.0, 0.0, 0.8, 1.0, 1.0], abs=1e-5)
        assert float(out[250]) == pytest.approx(0.8 * 245 / 495, abs=1e-5)


def test_remap_keeps_air_dark_in_an_inverted_image() -> None:
    """Falling from 1 to 0 with air up to 10 % of the range: 0 at the bottom, 0.9 where air ends, then falling."""
    ramp = torch.arange(1001.0).reshape(1, 7, 143)
    params = {"knots": np.array([0.0, 1.0]), "levels": np.array([1.0, 0.0]), "by_quantile": False, "air": 0.1}
    out = Remap().apply({"image": ramp}, **params)["image"].flatten()
    assert out[[0, 5, 104, 995]].tolist() == pytest.approx([0.0, 0.0, 0.9, 0.0], abs=1e-5)
    assert float(out[550]) == pytest.approx(1 - 545 / 990, abs=1e-5)


def test_remap_thirds_rise_fall_and_do_as_they_like() -> None:
    draws = [np.diff(Remap().get_parameters()["levels"]) for _ in range(900)]
    rising, falling = (np.mean([(sign * steps > 0).all() for steps in draws]) for sign in (1, -1))
    # arbitrary levels of 4 to 8 knots are monotone by chance in 1.1 % of the samples, each way
    assert rising == pytest.approx(1 / 3, abs=0.06) and falling == pytest.approx(1 / 3, abs=0.06)


def test_remap_survives_few_grey_values() -> None:
    binary = torch.zeros(1, 16, 16)
    binary[:, 4:8] = 1
    for _ in range(100):
        out = Remap()(image=binary)["image"]
        assert torch.isfinite(out).all() and out.min() >= -1e-5 and out.max() <= 1 + 1e-5


# --- the other steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_field_is_smooth_and_bounded(shape: tuple[int, ...]) -> None:
    """On a step image min = 0, rest 1 the field itself is what comes out."""
    flat = torch.ones(shape)
    flat[(slice(None),) + (0,) * (len(shape) - 1)] = 0
    field = BiasField(strength=(0.5, 0.5))(image=flat)["image"][0]
    inner = field[tuple(slice(1, None) for _ in shape[1:])]
    assert np.exp(-0.5) - 1e-4 <= inner.min() and inner.max() <= np.exp(0.5) + 1e-4
    assert inner.log().abs().max() > 0.3  # it does something
    for axis in range(inner.ndim):
        # a cosine of order 3 and amplitude 1 turns by at most 3 pi / n a voxel; amplitudes add up to a few halves
        assert inner.diff(dim=axis).abs().max() < 6 * np.pi / inner.shape[axis]
    assert float(field.flatten()[0]) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transform", [BiasField(), Blur(), Gibbs(), Noise(), Noise(p_rician=1.0)])
def test_constants_stay_constant(transform, shape: tuple[int, ...]) -> None:
    out = transform(image=torch.full(shape, 3.0))["image"]
    assert torch.allclose(out, torch.full(shape, 3.0), atol=1e-5)


def test_gibbs_keeps_slow_waves_and_removes_fast_ones() -> None:
    x = torch.arange(64) * (2 * np.pi / 64)
    slow, fast = torch.cos(3 * x), torch.cos(25 * x)
    out = Gibbs().apply({"image": (slow + fast).expand(1, 32, 64)}, kept={1: 0.5})["image"]
    assert torch.allclose(out, slow.expand(1, 32, 64), atol=1e-5)


def test_gibbs_rings_at_an_edge() -> None:
    """The overshoot of a truncated Fourier series is 9 % of the jump (Gibbs, 1899)."""
    edge = torch.zeros(1, 4, 256)
    edge[..., 64:192] = 1
    out = Gibbs().apply({"image": edge}, kept={1: 0.25})["image"]
    assert float(out.max()) == pytest.approx(1.0895, abs=0.02)


def test_gibbs_leaves_the_slice_axis_alone() -> None:
    assert all(set(Gibbs().get_parameters(image=torch.zeros(1, 8, 9, 10))["kept"]) <= {1, 2} for _ in range(50))


@pytest.mark.parametrize("shape", SHAPES)
def test_blur_is_the_gaussian(shape: tuple[int, ...]) -> None:
    sigma = [1.0, 0.6, 1.3][: len(shape) - 1]
    x = image(shape)
    out = Blur().apply({"image": x}, sigma=sigma)["image"]
    expected = np.stack([gaussian_filter(c, sigma, mode="nearest", truncate=6) for c in x.numpy().astype(float)])
    np.testing.assert_allclose(out.numpy(), expected, atol=0.01)  # 0.3 % of the kernel is cut off, images are +-3


def test_noise_has_the_strength_it_says() -> None:
    x = image((1, 200, 200))
    out = Noise().apply({"image": x}, strength=0.2, rician=False, seed=1)["image"]
    assert float((out - x).std()) == pytest.approx(0.2, rel=0.03)
    assert float((out - x).mean()) == pytest.approx(0, abs=0.005)


def test_noise_differs_from_sample_to_sample() -> None:
    noise, x = Noise(strength=(1, 1), p_rician=0), image((1, 40, 40))
    first, second = (noise(image=x)["image"] - x for _ in range(2))
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.2


def test_rician_noise_brightens_the_dark() -> None:
    """Where there is no signal, magnitudes of noise have the mean sigma * sqrt(pi / 2)."""
    x = torch.zeros(1, 200, 200)
    x[:, 100:] = 2.0  # standard deviation 1
    out = Noise().apply({"image": x}, strength=0.2, rician=True, seed=1)["image"]
    assert float(out[:, :100].mean()) == pytest.approx(0.2 * np.sqrt(np.pi / 2), rel=0.03)
    assert float(out[:, 100:].mean()) == pytest.approx(2.0 + 0.2**2 / 4, abs=0.01)


def test_scale_is_affine() -> None:
    out = Scale().apply({"image": torch.tensor([[[1.0, -2.0]]])}, factor=1.1, shift=0.5)["image"]
    assert out.flatten().tolist() == pytest.approx([1.6, -1.7])


# --- the chains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_target_is_zscored_and_finite(shape: tuple[int, ...]) -> None:
    for make in (TargetContrast(), TargetContrast(**ALL_ON)):
        for seed in range(20):
            x = image(shape, seed)
            out = make(image=x.clone())["image"]
            assert out.shape == x.shape and out.dtype == torch.float32 and torch.isfinite(out).all()
            for channel in out:
                assert float(channel.mean()) == pytest.approx(0, abs=1e-4)
                assert float(channel.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chain", [TargetContrast(**ALL_ON), ReferenceContrast(**MILD_ALL_ON)])
@pytest.mark.parametrize("value", [0.0, -1.3, 1000.1])
def test_no_nan_on_a_constant_image(chain: ContrastChain, shape: tuple[int, ...], value: float) -> None:
    for _ in range(10):
        out = chain(image=torch.full(shape, value))["image"]
        assert torch.isfinite(out).all()
        if isinstance(chain, TargetContrast):
            assert not out.any()


def test_zscore_lets_nan_through_and_flattens_constants() -> None:
    assert zscore(torch.tensor([float("nan"), 1.0])).isnan().all()
    assert zscore(torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0]
    assert not zscore(torch.full((1000,), 0.1)).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [TargetContrast, ReferenceContrast])
def test_other_channels_and_labels_stay_bit_for_bit(shape: tuple[int, ...], kind: type) -> None:
    settings = ALL_ON if kind is TargetContrast else MILD_ALL_ON
    x = torch.cat([image(shape), (image(shape) > 1).float()])  # two images, two prompts
    labels = torch.randint(-1, 5, (1, *shape[1:]), dtype=torch.int16)
    sample = {"image": x.clone(), "segmentation": labels.clone()}
    out = kind(channels=[1], **settings)(**sample)
    assert torch.equal(out["image"][[0, 2, 3]], x[[0, 2, 3]])
    assert not torch.equal(out["image"][1], x[1])
    assert torch.equal(out["segmentation"], labels)


def test_channels_draw_for_themselves() -> None:
    one = image((1, 40, 40))
    out = TargetContrast(p_remap=1.0)(image=one.repeat(2, 1, 1))["image"]
    assert not torch.allclose(out[0], out[1], atol=0.1)


def test_reference_stays_close_and_is_often_unchanged() -> None:
    chain, x = ReferenceContrast(), image((1, 40, 40))
    outs = [chain(image=x.clone())["image"] for _ in range(200)]
    assert 0.15 < np.mean([torch.equal(out, x) for out in outs]) < 0.45
    assert min(float(torch.corrcoef(torch.stack([out.flatten(), x.flatten()]))[0, 1]) for out in outs) > 0.97


def test_everything_random_is_drawn_in_get_parameters() -> None:
    chain, x = TargetContrast(**ALL_ON), image((1, 24, 24))
    drawn = chain.get_parameters(image=x)
    first = chain.apply({"image": x.clone()}, **drawn)["image"]
    np.random.seed(99)
    torch.manual_seed(99)
    assert torch.equal(first, chain.apply({"image": x.clone()}, **drawn)["image"])


@pytest.mark.parametrize("chain", [TargetContrast(), TargetContrast(**ALL_ON), ReferenceContrast(**MILD_ALL_ON)])
def test_numpy_seeds_it_and_torch_does_not(chain: ContrastChain) -> None:
    x = image((1, 24, 24))

    def run(numpy_seed: int, torch_seed: int) -> torch.Tensor:
        np.random.seed(numpy_seed)
        torch.manual_seed(torch_seed)
        return torch.stack([chain(image=x.clone())["image"] for _ in range(10)])

    assert torch.equal(run(1, 1), run(1, 2))
    assert not torch.equal(run(1, 1), run(2, 1))


def test_sometimes_is_as_often_as_it_says() -> None:
    gate = Sometimes(Scale((2, 2), (0, 0)), 0.3)
    hits = [float(gate(image=torch.ones(1, 1, 1))["image"]) == 2 for _ in range(1000)]
    assert np.mean(hits) == pytest.approx(0.3, abs=0.05)


def _worker(numpy_seed: int, queue) -> None:
    np.random.seed(numpy_seed)  # what nnU-Net's augmenter does in its workers; torch keeps the parent's state
    torch.set_num_threads(1)
    queue.put((numpy_seed, TargetContrast(**ALL_ON)(image=image((1, 24, 24)))["image"].numpy()))


def test_forked_workers_draw_differently() -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(seed, queue)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert not np.allclose(results[1], results[2], atol=0.1)
