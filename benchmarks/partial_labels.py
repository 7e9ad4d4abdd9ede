"""Toy images: is an organ found in a modality in which nobody ever annotated it?

    python benchmarks/partial_labels.py

Two organs in 16 x 16 pixels. CT is plain and has the liver annotated alone; MR is striped and has liver and spleen. A
tiny U-Net with context priors learns from both, with each way to deal with the missing annotations, then segments new
CT and MR in full, the modality told.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from typing import Any

import torch
from common import write_result
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from nnunet_multimodal.losses import MarginalLoss, MaskedTaskLoss
from nnunet_multimodal.networks import ContextPriorUNet

ORGANS, MODALITIES = ("liver", "spleen"), ("CT", "MR")
WAYS = {
    "taught as background": {},
    "softmax, marginal loss": {"told": True},
    "sigmoid, null tasks": {"told": True, "sigmoid": True, "null": True},
    "sigmoid, all tokens": {"told": True, "sigmoid": True},
}


def make_batch(generator: torch.Generator, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [B, 1, 16, 16], labels of all organs, and the modality of each."""
    modality, labels = torch.arange(entries) % 2, torch.zeros(entries, 1, 16, 16)
    for entry in range(entries):
        for organ, (y, x) in enumerate(torch.randint(0, 4, (2, 2), generator=generator).tolist(), start=1):
            labels[entry, 0, (organ - 1) * 8 + y : (organ - 1) * 8 + y + 5, x + 2 : x + 9] = organ
    stripes = 0.7 * torch.cos(torch.arange(16) * math.pi / 2)
    image = labels + 0.4 * torch.randn(labels.shape, generator=generator) + stripes * modality.view(-1, 1, 1, 1)
    return (image - image.mean((2, 3), keepdim=True)) / image.std((2, 3), keepdim=True), labels, modality


def make_network(sigmoid: bool) -> ContextPriorUNet:
    unet = PlainConvUNet(
        1, 3, [8, 12, 16], nn.Conv2d, 3, [1, 2, 2], 1, 3, 1, True, nn.InstanceNorm2d, {"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    return ContextPriorUNet(unet, MODALITIES, 3, [1, 2], False, modality_tokens=2, subtract_background=sigmoid)


def learn(seed: int, steps: int, told: bool = False, sigmoid: bool = False, null: bool = False) -> dict[str, float]:
    """Dice of each modality and organ."""
    torch.manual_seed(seed)
    network = make_network(sigmoid).train()
    loss: Any = (MaskedTaskLoss if sigmoid else MarginalLoss)(batch_dice=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        image, labels, modality = make_batch(generator, 4)
        ct = modality == 0
        annotated = torch.ones(4, 3, dtype=torch.bool)
        annotated[ct, 2] = False
        labels[ct] = labels[ct].where(labels[ct] != 2, 0)
        loss.annotated = annotated if told else None
        network.tell(modality)
        network.ask(annotated if null else None)
        optimizer.zero_grad()
        loss(network(image).segmentation, labels).backward()
        optimizer.step()
    image, labels, modality = make_batch(torch.Generator().manual_seed(1000), 64)
    network.eval().tell(modality)
    network.ask(None)
    with torch.inference_mode():
        predicted = network(image).argmax(1, keepdim=True)
    dice = {}
    for index, name in enumerate(MODALITIES):
        for value, organ in enumerate(ORGANS, start=1):
            found, there = ((each == value)[modality == index] for each in (predicted, labels))
            dice[f"{name} {organ}"] = float(2 * (found & there).sum() / (found.sum() + there.sum()))
    return dice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    measured: dict[str, Any] = {"steps": args.steps, "seeds": args.seeds, "dice": {}}
    for way, how in WAYS.items():
        runs = [learn(seed, args.steps, **how) for seed in range(args.seeds)]
        found = {key: [round(run[key], 3) for run in runs] for key in runs[0]}
        measured["dice"][way] = {
            key: {"mean": round(statistics.fmean(values), 3), "runs": values} for key, values in found.items()
        }
        print(way, json.dumps(measured["dice"][way]), flush=True)
    print(write_result("partial_labels", measured, "64 new images; CT spleen was never annotated in training"))


if __name__ == "__main__":
    main()
