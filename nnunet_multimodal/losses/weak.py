"""The loss of training from scribbles: what is drawn is learned, and the rest is kept plausible."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Regulariser = Callable[[Tensor, Tensor], Tensor]  # probabilities [B, C, ...], image [B, channels, ...] -> number


class WeakLoss(nn.Module):
    """L = L_partial(output, target) + r L_regulariser(softmax(output), image).

    r, between 0 and 1, grows while training goes on: probabilities that are still noise should not be sharpened.
    The regulariser is computed in fp32 whatever the network's precision is, and on the full resolution alone.

    Args:
        partial: loss of what is drawn, (logits [B, C, ...], target [B, 1, ...]) -> number.
        regulariser: (probabilities, image) -> number, weights included; None for the partial loss alone.
        scales: weight of each map of deep supervision, finest first; None where there is one map, which is no list.
    """

    def __init__(
        self,
        partial: nn.Module,
        regulariser: Regulariser | None = None,
        scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.partial, self.regulariser, self.scales = partial, regulariser, scales
        self.ramp = 1.0  # r; the trainer sets it before each step
        self.parts: dict[str, Tensor] = {}  # what the last call added up, for the log

    def forward(
        self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor], image: Tensor | None = None
    ) -> Tensor:
        """Logits, labels and the network's input; without the input (in validation) only what is drawn counts."""
        loss = self.of_drawn(output, target)
        self.parts = {"partial": loss.detach()}
        if image is None or self.regulariser is None:
            return loss
        finest = output if isinstance(output, Tensor) else output[0]
        with torch.autocast(finest.device.type, enabled=False):
            term = self.regulariser(finest.float().softmax(1), image.float())
        self.parts["regulariser"] = term.detach()
        return loss + self.ramp * term

    def of_drawn(self, output: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Tensor:
        """The partial loss, summed over the scales of deep supervision; a map without a label in it adds exactly 0."""
        if isinstance(output, Tensor) or isinstance(target, Tensor):
            loss: Tensor = self.partial(output, target)
            return loss
        assert self.scales is not None and len(self.scales) == len(output) == len(target)
        return torch.stack([w * self.partial(o, t) for w, o, t in zip(self.scales, output, target)]).sum()
