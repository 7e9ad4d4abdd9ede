"""Several adapters in one network: for each image a gate says which of them correct it, and how much.

    y = W x + sum_e g_e(x) s B_e A_e x

With all g_e = 0, the identity adapter, not even a zero is added: the output is the base network's, bit by bit.

paper: SegEVOLution (top-1 by modality, where CT takes the identity); the general form is Shazeer et al. (ICLR 2017).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_multimodal.networks.lora import (
    ALL_BUT_HEADS,
    HEADS,
    AdaptedLayer,
    LowRank,
    freeze,
    layers_to_adapt,
    scale_of,
)
from nnunet_multimodal.networks.replace import replace_layers

NEVER = -100.0  # the bias of a class that a head must not answer with


class Gates:
    """What all adapted layers of a network ask; it is no module, because it belongs to an image, not to the weights.

    Attributes:
        weights: [B, E], of each image and adapter; None: the identity for all.
        active: indices of the adapters that are asked at all.
        whole: of these, those that take every image with weight 1, so that nothing has to be weighted.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None
        self.active: tuple[int, ...] = ()
        self.whole: frozenset[int] = frozenset()

    def close(self) -> None:
        """The identity, for all images."""
        self.weights, self.active, self.whole = None, (), frozenset()

    def open(self, weights: Tensor, ask_all: bool = False) -> None:
        """Set them for the next images.

        Args:
            weights: [B, E].
            ask_all: ask adapters of weight 0 too; nothing changes but that they take part in the gradient, which
                distributed training wants.
        """
        values = weights.detach().cpu()
        self.weights = weights
        self.active = tuple(e for e in range(weights.shape[1]) if ask_all or bool((values[:, e] != 0).any()))
        self.whole = frozenset(e for e in self.active if bool((values[:, e] == 1).all()))

    def column(self, adapter: int, like: Tensor) -> Tensor:
        """[B, 1, ...], the weights of one adapter in the shape of what they are multiplied with."""
        assert self.weights is not None
        return self.weights[:, adapter].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class MixtureLayer(AdaptedLayer):
    """A layer and the low-rank corrections of all adapters."""

    def __init__(self, base: nn.Module, adapters: Sequence[str], rank: int, scale: float, gates: Gates) -> None:
        super().__init__(base)
        self.adapters = nn.ModuleDict({name: LowRank(base, rank, scale) for name in adapters})
        self.gates = gates

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """As the layer's, of images [B, ...]."""
        output: Tensor = self.base(x, *arguments, **named)
        for index, adapter in enumerate(self.adapters.values()):
            if index in self.gates.active:
                corrected = adapter(x, *arguments, **named)
                if index not in self.gates.whole:
                    weight = self.gates.column(index, corrected)
                    corrected = torch.where(weight != 0, weight * corrected, -0.0)  # x + -0.0 is x, bit by bit
                output = output + corrected
        return output


class MixtureHead(AdaptedLayer):
    """An output layer of which each adapter has one of its own."""

    def __init__(self, base: nn.Module, adapters: Sequence[str], gates: Gates) -> None:
        super().__init__(base)
        self.heads = nn.ModuleDict({name: copy.deepcopy(base) for name in adapters})
        self.gates = gates

    def forward(self, x: Tensor) -> Tensor:
        """The base's and the adapters' answers, weighted; what the adapters leave to 1 is the base's share."""
        base: Tensor = self.base(x)
        output = base
        for index, head in enumerate(self.heads.values()):
            if index in self.gates.whole and len(self.gates.active) == 1:  # others, if active, want their gradient
                return head(x)
            if index in self.gates.active:
                answer = head(x)
                weight = self.gates.column(index, answer)
                share = torch.where(weight == 1, answer - output, weight * (answer - base))
                output = torch.where(weight == 0, output, output + share)
        return output

    @torch.no_grad()
    def start(self, new: Sequence[int]) -> None:
        """Each adapter's head begins as the base's; the base never answers with the ``new`` classes it does not know.

        In an adapter's head those rows keep what they were initialised with in ``base``.
        """
        for head in self.heads.values():
            head.load_state_dict(self.base.state_dict())
        for row in new:
            self.base.weight[row] = 0
            self.base.bias[row] = NEVER


def inject_adapters(
    network: nn.Module,
    adapters: Sequence[str],
    rank: int = 8,
    alpha: float = 8.0,
    rank_stabilised: bool = True,
    layers: str = ALL_BUT_HEADS,
    heads: str = HEADS,
) -> Gates:
    """Freezes a network and gives its layers several adapters, in place; the gates are closed.

    Args:
        network, rank, alpha, rank_stabilised, layers: see ``inject_lora``.
        adapters: their names, E of them.
        heads: regular expression for the layers of which each adapter has its own; "" for none.

    Returns:
        The gates.

    Raises:
        ValueError: as ``inject_lora``, or there is no adapter.
    """
    if rank < 1 or not adapters:
        raise ValueError(f"rank {rank} and {len(adapters)} adapters: 1 or more are needed of each.")
    wanted, scale, gates = layers_to_adapt(network, layers, heads), scale_of(rank, alpha, rank_stabilised), Gates()
    freeze(network)

    def replacement(name: str, layer: nn.Module) -> nn.Module | None:
        if heads and hasattr(layer, "weight") and re.search(heads, name):
            return MixtureHead(layer, adapters, gates).requires_grad_(True)
        return MixtureLayer(layer, adapters, rank, scale, gates) if name in wanted else None

    replace_layers(network, replacement)
    for module in network.modules():
        if isinstance(module, MixtureHead):
            module.base.requires_grad_(False)
    return gates


@torch.no_grad()
def merge_adapter(network: nn.Module, adapter: str | None) -> nn.Module:
    """The plain network with one adapter added to its weights, in place; None: without any, the base."""

    def replacement(name: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, AdaptedLayer):
            return None
        base: nn.Module = layer.base
        if adapter is not None and isinstance(layer, MixtureHead):
            return layer.heads[adapter]
        if adapter is not None and isinstance(layer, MixtureLayer):
            low_rank: Any = layer.adapters[adapter]
            base.weight += low_rank.delta().to(base.weight)
        return base

    replace_layers(network, replacement)
    return network
