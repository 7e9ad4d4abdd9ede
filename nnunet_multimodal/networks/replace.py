"""Layers of a network put in place of others, wherever the network holds them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_layers(network: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]) -> list[str]:
    """Replaces layers in place; one that the network holds under several names gets one replacement under all.

    nnU-Net's blocks hold each convolution as ``conv`` and as ``all_modules.0``, and its decoder holds the encoder:
    ``forward`` uses the one, names come from the other.

    Args:
        network: changed in place.
        replacement: called once for each layer with its first name; what it gives takes the layer's place, None keeps
            it.

    Returns:
        The first names of what was replaced.
    """
    first = dict(network.named_modules())  # each module once
    new = {}
    for name, layer in first.items():
        put = replacement(name, layer) if layer is not network else None
        if put is not None:
            new[id(layer)] = put
    for parent in list(first.values()):
        for name, child in list(parent._modules.items()):  # named_children would leave out the second name
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    return [name for name, layer in first.items() if id(layer) in new]
