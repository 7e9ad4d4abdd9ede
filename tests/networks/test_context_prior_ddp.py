"""Context priors under DistributedDataParallel as nnU-Net makes it: what a step leaves out stops the next one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_networks import make_unet
from torch.nn.parallel import DistributedDataParallel

from nnunet_multimodal.networks import ContextPriorUNet


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process: enough for the complaint, which each process makes by itself."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize("modalities", [(), ("CT", "MR")])
def test_every_parameter_has_a_part_in_every_step(multiplicative: bool, modalities: tuple[str, ...]) -> None:
    network = ContextPriorUNet(make_unet(), modalities, 3, [1, 2], True, multiplicative).train()
    wrapped = DistributedDataParallel(network)
    for ids, asked in ((0, None), (-1, torch.tensor([[True, False, True]] * 2)), (1, torch.ones(2, 3).bool())):
        if modalities:
            network.tell(torch.full((2,), ids))
        network.ask(asked)
        output = wrapped(torch.randn(2, 1, 16, 8))
        logits = output.segmentation if modalities else output
        loss = sum(each.square().mean() for each in logits)
        if modalities:
            loss = loss + 0 * output.modality_logits.sum()
        loss.backward()


def test_a_parameter_without_a_part_would_be_noticed() -> None:
    network = ContextPriorUNet(make_unet(), (), 3, [1, 2], True).train()
    wrapped = DistributedDataParallel(network)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        for _ in range(2):
            wrapped(torch.randn(2, 1, 16, 8))[0].mean().backward()  # the coarser scale is left out
