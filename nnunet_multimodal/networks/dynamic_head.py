"""Per-class 1x1 convolutions whose weights are computed from the image and a text (MulModSeg, Eq. 2 to 4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HIDDEN = 8  # channels of the head feature and of the two hidden layers
WEIGHTS = (HIDDEN * HIDDEN, HIDDEN * HIDDEN, HIDDEN)
BIASES = (HIDDEN, HIDDEN, 1)
PARAMETERS = sum(WEIGHTS) + sum(BIASES)  # 153
GROUPS = 16

# Values of one hidden layer that are alive at a time: on a CPU what its cache holds, on a GPU what keeps it busy.
ALIVE_ON_CPU, ALIVE_ON_GPU = 2**18, 2**26


class DynamicHead(nn.Module):
    """theta_k = controller(GAP(bottleneck) + text_k); logits_k = ((F * theta_k1) * theta_k2) * theta_k3.

    Source: MulModSeg (methods.md 2.1); shapes, normalisation and the single-layer controller are those of its code. F
    has 8 channels, the first two convolutions 8 outputs each with ReLU, the last one 1. One controller serves all
    scales of deep supervision; each scale has its own reduction to F.

    Args:
        bottleneck: S1, channels of the coarsest feature.
        scales: S2 of each output scale, finest first.
        text: E, length of a text embedding.
        ndim: 2 or 3.
        width: channels of the pooled image feature and of the projected text.
    """

    def __init__(self, bottleneck: int, scales: list[int], text: int, ndim: int, width: int = 256) -> None:
        super().__init__()
        convolution = nn.Conv2d if ndim == 2 else nn.Conv3d
        pool = nn.AdaptiveAvgPool2d if ndim == 2 else nn.AdaptiveAvgPool3d
        self.pool = nn.Sequential(
            _group_norm(bottleneck), nn.ReLU(), pool(1), convolution(bottleneck, width, 1), nn.Flatten()
        )
        self.text_to_vision = nn.Sequential(nn.Linear(text, width), nn.ReLU())
        self.controller = nn.Linear(2 * width, PARAMETERS)
        self.reduce = nn.ModuleList(
            nn.Sequential(_group_norm(channels), nn.ReLU(inplace=True), convolution(channels, HIDDEN, 1))
            for channels in scales
        )

    def parameters_of(self, pooled: Tensor, text: Tensor) -> Tensor:
        """The convolutions of each class: pooled [B, width] and text [B, C, E] -> [B, C, 153].

        The controller sees [image, text] in this order.
        """
        projected = self.text_to_vision(text)
        image = pooled[:, None].expand(-1, projected.shape[1], -1)
        return self.controller(torch.cat((image, projected), dim=2))

    def forward(self, feature: Tensor, theta: Tensor, scale: int = 0) -> Tensor:
        """feature [B, S2, ...] of a scale, theta [B, C, 153] -> logits [B, C, ...]."""
        reduce = self.reduce[scale]
        if torch.is_grad_enabled():  # what it keeps would be as large as the feature itself; it costs little again
            reduced = checkpoint(reduce, feature, use_reentrant=False, preserve_rng_state=False)
        else:
            reduced = reduce(feature)
        return dynamic_convolutions(reduced.flatten(2), theta).unflatten(2, feature.shape[2:])


def split_parameters(theta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """[..., 153] -> weights [..., 64], [..., 64], [..., 8] and biases [..., 8], [..., 8], [..., 1].

    All weights come first, then all biases, as in the reference code.
    """
    parts = theta.split((*WEIGHTS, *BIASES), dim=-1)
    return list(parts[:3]), list(parts[3:])


def dynamic_convolutions(feature: Tensor, theta: Tensor, alive: int | None = None) -> Tensor:
    """Three small convolutions per sample and class, for a piece of the voxels at a time.

    The hidden layers have 8 * C channels, more than any layer of the network has at full resolution. They exist only
    for a piece of the voxels, and in training they are computed again in the backward pass instead of being kept.

    Args:
        feature: [B, 8, N], N voxels.
        theta: [B, C, 153].
        alive: values of a hidden layer to hold at a time; default by device.

    Returns:
        [B, C, N].
    """
    classes, samples = theta.shape[1], feature.shape[0]
    device = feature.device.type
    if torch.is_autocast_enabled(device):  # one type throughout: the backward pass has no autocast
        feature, theta = (each.to(torch.get_autocast_dtype(device)) for each in (feature, theta))
    (w1, w2, w3), (b1, b2, b3) = split_parameters(theta)
    if alive is None:
        alive = ALIVE_ON_CPU if device == "cpu" else ALIVE_ON_GPU
    logits: Tensor = _ThreeLayers.apply(
        feature,
        w1.reshape(samples, classes * HIDDEN, HIDDEN),
        b1.reshape(samples, classes * HIDDEN, 1),
        w2.reshape(samples * classes, HIDDEN, HIDDEN),
        b2.reshape(samples * classes, HIDDEN, 1),
        w3.reshape(samples * classes, 1, HIDDEN),
        b3.reshape(samples * classes, 1, 1),
        max(1, alive // (samples * classes * HIDDEN)),
    )
    return logits


class _ThreeLayers(torch.autograd.Function):
    """The layers and their gradients, piece by piece.

    Written out because autograd over pieces leaves holes of a hidden layer's size between the pieces' results: with 41
    classes at 128^3, 5 GB of them. The first layer's classes share x, the others have their own input.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        """x [B, 8, N], weights and biases as above, voxels of a piece -> [B, C, N]."""
        *layers, piece = arguments
        ctx.save_for_backward(x, *layers)
        ctx.piece = piece
        classes = layers[2].shape[0] // x.shape[0]
        logits = x.new_empty(x.shape[0], classes, x.shape[2])
        for begin in range(0, x.shape[2], piece):
            part = x[:, :, begin : begin + piece]
            _, second = _hidden(part, *layers[:4])
            logits[:, :, begin : begin + piece] = torch.baddbmm(layers[5], layers[4], second).view(
                x.shape[0], classes, -1
            )
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of [B, C, N] to x and all weights and biases; sums over voxels in at least float32."""
        (gradient,) = gradients
        x, *layers = ctx.saved_tensors
        w1, b1, w2, b2, w3, _ = layers
        to_x = torch.empty_like(x)
        sums = [torch.zeros_like(layer, dtype=torch.promote_types(layer.dtype, torch.float32)) for layer in layers]
        for begin in range(0, x.shape[2], ctx.piece):
            part = x[:, :, begin : begin + ctx.piece]
            first, second = _hidden(part, w1, b1, w2, b2)
            third = gradient[:, :, begin : begin + ctx.piece].reshape(w3.shape[0], 1, -1)
            to_second = _relu_backward(torch.bmm(w3.mT, third), second)
            to_first = _relu_backward(torch.bmm(w2.mT, to_second), first)
            sums[4] += torch.bmm(third, second.mT)
            sums[5] += third.sum(2, keepdim=True)
            sums[2] += torch.bmm(to_second, first.mT)
            sums[3] += to_second.sum(2, keepdim=True)
            to_first = to_first.view(x.shape[0], -1, part.shape[2])
            sums[0] += torch.bmm(to_first, part.mT)
            sums[1] += to_first.sum(2, keepdim=True)
            to_x[:, :, begin : begin + ctx.piece] = torch.bmm(w1.mT, to_first)
        return to_x, *(total.to(layer.dtype) for total, layer in zip(sums, layers)), None


def _hidden(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, 8, n] -> first and second layer after ReLU, both [B * C, 8, n]."""
    first = torch.baddbmm(b1, w1, x).relu_().view(w2.shape[0], HIDDEN, -1)
    return first, torch.baddbmm(b2, w2, first).relu_()


def _relu_backward(gradient: Tensor, result: Tensor) -> Tensor:
    """The gradient where ReLU let something through."""
    return torch.ops.aten.threshold_backward(gradient, result, 0)


def _group_norm(channels: int) -> nn.GroupNorm:
    """16 groups as in the reference; as many as divide the channels where the plans have odd ones."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)
