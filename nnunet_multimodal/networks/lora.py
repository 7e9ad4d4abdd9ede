"""Low-rank adaptation (LoRA) of a trained network: frozen layers, each with a small correction that learns.

    y = W x + s B A x,    s = alpha / r  (classic)  or  alpha / sqrt(r)  (rank-stabilised, which SegEVOLution uses)

For a convolution A is the same convolution to r channels, and B a 1x1 convolution from these, so that the correction
is a convolution with W's own kernel and can be added to it: ``merge_lora`` gives the plain network back. B begins at
zero, so an adapted network begins as the one it was made from.

paper: Hu et al., LoRA (ICLR 2022); Kalajdzievski, rank-stabilised scaling (arXiv 2312.03732).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nnunet_multimodal.networks.replace import replace_layers

ALL_BUT_HEADS = r"^(?!.*seg_layers\.)"  # a regular expression that is searched for in a layer's name
HEADS = r"seg_layers\."

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


class LowRank(nn.Module):
    """s B A of one layer: what is added to its output.

    Args:
        layer: Conv1d/2d/3d, ConvTranspose1d/2d/3d or Linear. With groups each group has factors of its own.
        rank: r; a layer whose own matrix [out, in * kernel] has a lower rank gets that.
        scale: s.

    Raises:
        TypeError: a layer of another kind.
    """

    def __init__(self, layer: Any, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        if not isinstance(layer, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
            raise TypeError(f"{type(layer).__name__} cannot have low-rank factors: a convolution or Linear can.")
        like: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        if isinstance(layer, nn.Linear):
            self.groups = 1
            self.rank = min(rank, layer.in_features, layer.out_features)
            self.down: nn.Module = nn.Linear(layer.in_features, self.rank, bias=False, **like)
            self.up: nn.Module = nn.Linear(self.rank, layer.out_features, bias=False, **like)
        else:
            self.groups = layer.groups
            into, out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
            self.rank = min(rank, into * math.prod(layer.kernel_size), out)
            how: dict[str, Any] = {
                "kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding,
                "dilation": layer.dilation, "padding_mode": layer.padding_mode, "groups": layer.groups, "bias": False,
            }  # fmt: skip
            if isinstance(layer, _TRANSPOSED):
                how["output_padding"] = layer.output_padding
            kind: Any = (_TRANSPOSED if isinstance(layer, _TRANSPOSED) else _CONVOLUTIONS)[len(layer.kernel_size) - 1]
            pointwise: Any = _CONVOLUTIONS[len(layer.kernel_size) - 1]
            self.down = kind(layer.in_channels, layer.groups * self.rank, **how, **like)
            self.up = pointwise(
                layer.groups * self.rank, layer.out_channels, 1, groups=layer.groups, bias=False, **like
            )
        nn.init.zeros_(self.up.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """The layer's input (and output_size of a transposed convolution) -> what is added to its output."""
        added: Tensor = self.up(self.scale * self.down(x, *arguments, **named))
        return added

    def delta(self) -> Tensor:
        """s B A in the shape of the layer's weight."""
        down, up = self.down.weight, self.up.weight
        assert isinstance(down, Tensor) and isinstance(up, Tensor)
        if isinstance(self.down, nn.Linear):
            return self.scale * (up @ down)
        by_group = up.reshape(self.groups, -1, self.rank)  # [g, out / g, r]
        if isinstance(self.down, _TRANSPOSED):  # [in, r, kernel] -> [in, out / g, kernel]
            parts = down.reshape(self.groups, -1, *down.shape[1:])
            return self.scale * torch.einsum("gir...,gor->gio...", parts, by_group).flatten(0, 1)
        parts = down.reshape(self.groups, self.rank, *down.shape[1:])  # [g, r, in / g, kernel]
        return self.scale * torch.einsum("gri...,gor->goi...", parts, by_group).flatten(0, 1)


class AdaptedLayer(nn.Module):
    """A layer of a trained network with something added: ``base`` is the layer as it was, its keys ``base.*``."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = base


class LoRALayer(AdaptedLayer):
    """The layer and its low-rank correction.

    ``weight`` and ``bias`` are the corrected layer's, for modules that use a layer's weight without calling it.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float) -> None:
        super().__init__(base)
        self.lora = LowRank(base, rank, scale)

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """As the layer's."""
        output: Tensor = self.base(x, *arguments, **named) + self.lora(x, *arguments, **named)
        return output

    @property
    def weight(self) -> Tensor:
        """W + s B A."""
        weight: Tensor = self.base.weight + self.lora.delta()
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        bias: Tensor | None = self.base.bias
        return bias


def scale_of(rank: int, alpha: float, rank_stabilised: bool) -> float:
    """s: alpha / sqrt(r) if rank-stabilised, else alpha / r."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def inject_lora(
    network: nn.Module,
    rank: int = 8,
    alpha: float = 8.0,
    rank_stabilised: bool = True,
    layers: str = ALL_BUT_HEADS,
    trained: str = HEADS,
    train_norm: bool = False,
    train_bias: bool = False,
) -> nn.Module:
    """Freezes a network and adds factors to its convolutions and linear layers, in place.

    Args:
        network: any; it begins as what it is, because B is zero.
        rank, alpha, rank_stabilised: see above.
        layers: regular expression, searched for in names of layers: those that get factors.
        trained: the same for layers that are trained whole instead, such as output layers of new classes; "" for none.
        train_norm: train scale and shift of normalisation layers.
        train_bias: train the biases of the layers that have factors.

    Returns:
        The network.

    Raises:
        ValueError: it has factors already, the rank is below 1, or no layer has such a name.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected 1 or more.")
    scale = scale_of(rank, alpha, rank_stabilised)
    wanted = layers_to_adapt(network, layers, trained)
    freeze(network, trained, train_norm)

    def replacement(name: str, layer: nn.Module) -> nn.Module | None:
        if name not in wanted:
            return None
        if train_bias and layer.bias is not None:
            layer.bias.requires_grad_(True)
        return LoRALayer(layer, rank, scale)

    replace_layers(network, replacement)
    return network


def layers_to_adapt(network: nn.Module, layers: str, trained: str) -> list[str]:
    """The first names of the convolutions and linear layers that ``layers`` finds and ``trained`` does not.

    Raises:
        ValueError: there are none, the network has factors already, or an expression is wrong.
    """
    if any(isinstance(module, AdaptedLayer) for module in network.modules()):
        raise ValueError("the network is adapted already: merge it first (merge_lora).")
    try:
        found, whole = re.compile(layers), re.compile(trained) if trained else None
    except re.error as error:
        raise ValueError(f"{error.pattern!r} is no regular expression: {error}.") from None
    plain = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)  # of this very class: others may use their weights otherwise
    of_kind = [name for name, module in network.named_modules() if type(module) in plain]
    wanted = [name for name in of_kind if found.search(name) and not (whole and whole.search(name))]
    if not wanted:
        some = ", ".join(of_kind[:5]) or "none"
        raise ValueError(f"no convolution or linear layer has a name with {layers!r} in it; there are: {some}, ...")
    return wanted


def freeze(network: nn.Module, trained: str = "", train_norm: bool = False) -> None:
    """Nothing learns but the layers in whose names ``trained`` is found and, if wanted, normalisation layers."""
    network.requires_grad_(False)
    for name, parameter in network.named_parameters():
        if trained and re.search(trained, name.rpartition(".")[0]):
            parameter.requires_grad_(True)
    for module in network.modules():
        if train_norm and isinstance(module, _NORMS):
            module.requires_grad_(True)


def keep_statistics(network: nn.Module) -> None:
    """Frozen normalisation layers with running statistics keep those; to be called after ``network.train()``."""
    for module in network.modules():
        if isinstance(module, _NormBase) and module.track_running_stats and not _learns(module):
            module.eval()


@torch.no_grad()
def merge_lora(network: nn.Module) -> nn.Module:
    """Adds each correction to its layer's weight and puts the plain layer back, in place: the original keys."""

    def replacement(name: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, LoRALayer):
            return None
        layer.base.weight += layer.lora.delta().to(layer.base.weight)
        base: nn.Module = layer.base
        return base

    replace_layers(network, replacement)
    return network


# --- names and files --------------------------------------------------------------------------------------------------


def plain_names(network: nn.Module) -> dict[str, str]:
    """Of each tensor of the original network, aliases included: its key now -> its key as it was."""
    adapted = {f"{n}." for n, m in network.named_modules(remove_duplicate=False) if isinstance(m, AdaptedLayer)}
    names = {}
    for key in network.state_dict():
        prefix = next((key[: at + 1] for at, c in enumerate(key) if c == "." and key[: at + 1] in adapted), None)
        if prefix is None:
            names[key] = key
        elif key.startswith(f"{prefix}base."):
            names[key] = prefix + key.removeprefix(f"{prefix}base.")
    return names


def lora_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """All that an adapted network has learned, each tensor once: what is trainable, and statistics that go with it."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _learned(network).items()}


@torch.no_grad()
def load_lora_state_dict(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The reverse, into a network adapted in the same way.

    Raises:
        ValueError: names or shapes differ.
    """
    own = _learned(network)
    differ = sorted(own.keys() ^ tensors.keys()) or [n for n, p in own.items() if p.shape != tensors[n].shape]
    if differ:
        raise ValueError(f"the adapter does not fit the network: {len(differ)} tensors differ, such as {differ[0]}.")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def base_fingerprint(network: nn.Module) -> str:
    """SHA-256 of all that is frozen: what an adapter was learned for, and does not work without."""
    digest = hashlib.sha256()
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name in sorted(tensors.keys() - _learned(network).keys()):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _learns(module: nn.Module) -> bool:
    parameters = [*module.parameters()]
    return bool(parameters) and all(parameter.requires_grad for parameter in parameters)


def _learned(network: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
    for prefix, module in network.named_modules():
        if _learns(module):
            tensors |= dict(module.named_buffers(prefix, recurse=False))
    return tensors


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """Trainable, and all of the network that was adapted (without what was added to it)."""
    originals = set(plain_names(network))
    parameters = dict(network.named_parameters())
    return (
        sum(p.numel() for p in parameters.values() if p.requires_grad),
        sum(p.numel() for name, p in parameters.items() if name in originals),
    )
