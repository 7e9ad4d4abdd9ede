"""CmFNet's loss: what is drawn supervises each branch, the images and the branches regularise the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_multimodal.losses.weak import Regulariser


class CmFNetLoss(nn.Module):
    """L = L_ssl + r (L_imr + L_imc), CmFNet's scribble supervision and its two regularisations.

    L_ssl = sum of L_partial over the three branches.
    L_imr = lambda_ct L_crf(p_mm | CT image) + lambda_mr L_crf(p_mm | MR image): the fused answer follows both images.
    L_imc = alpha_ct mean (p_mm - p_ct)^2 + alpha_mr mean (p_mm - p_mr)^2: the branches agree.

    p are probabilities. The regularisations are computed in fp32 whatever the network's precision is. The paper's
    r is 1; here it may grow while training goes on. Its text calls p_mm the reference of L_imc and its formula stops
    no gradient; ``detach`` does.

    Args:
        partial: loss of what is drawn, (logits [B, C, ...], target [B, 1, ...]) -> number.
        crf: (probabilities [B, C, ...], image [B, 1, ...]) -> number.
        lambdas, alphas: of CT and MR; a term whose weight is 0 is not computed.
        channels: of the image, for CT and MR; for images of one modality the same twice.
        detach: L_imc moves the branches of one modality towards the fused one, and not the other way as well.
    """

    def __init__(
        self,
        partial: nn.Module,
        crf: Regulariser,
        lambdas: tuple[float, float] = (0.2, 0.2),
        alphas: tuple[float, float] = (0.8, 0.8),
        channels: tuple[int, int] = (0, 1),
        detach: bool = False,
    ) -> None:
        super().__init__()
        self.partial, self.crf = partial, crf
        self.lambdas, self.alphas, self.channels, self.detach = lambdas, alphas, channels, detach
        self.ramp = 1.0  # r; the trainer sets it before each step
        self.parts: dict[str, Tensor] = {}  # what the last call added up, for the log

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor, image: Tensor | None = None) -> Tensor:
        """Logits and the network's input; without the input (in validation) only what is drawn counts.

        Args:
            output: in training [y_mm, y_ct, y_mr], in validation y_mm.
            target: [B, 1, ...].
            image: [B, channels, ...].
        """
        branches = [output] if isinstance(output, Tensor) else list(output)
        loss = torch.stack([self.partial(logits, target) for logits in branches]).sum()
        self.parts = {"ssl": loss.detach()}
        if image is None or not any((*self.lambdas, *self.alphas)):
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            fused, *single = (logits.float().softmax(1) for logits in branches)
            if any(self.lambdas):
                term = self.of_images(fused, image.float())
                self.parts["imr"] = term.detach()
                loss = loss + self.ramp * term
            if any(self.alphas):
                term = self.of_branches(fused, single)
                self.parts["imc"] = term.detach()
                loss = loss + self.ramp * term
        return loss

    def of_images(self, fused: Tensor, image: Tensor) -> Tensor:
        """L_imr."""
        weights: dict[int, float] = {}
        for channel, weight in zip(self.channels, self.lambdas):  # one image for both: the same term twice
            weights[channel] = weights.get(channel, 0.0) + weight
        terms = [w * self.crf(fused, image[:, channel : channel + 1]) for channel, w in weights.items() if w]
        return torch.stack(terms).sum()

    def of_branches(self, fused: Tensor, single: Sequence[Tensor]) -> Tensor:
        """L_imc."""
        reference = fused.detach() if self.detach else fused
        terms = [w * F.mse_loss(each, reference) for each, w in zip(single, self.alphas) if w]
        return torch.stack(terms).sum()
