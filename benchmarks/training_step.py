"""Time and memory of a training step, and time of a prediction, against stock nnUNetTrainer with the same plans.

    python benchmarks/training_step.py 601 2d

needs a planned and preprocessed CrossMR data set (nnUNet_preprocessed set). The trainers take turns, step by step, in
one process, with data augmentation in that process; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["nnUNet_n_proc_DA"] = "0"  # augmentation in this process, or it would run beside what is timed
os.environ.setdefault("nnUNet_compile", "f")
os.environ["nnUNet_results"] = tempfile.mkdtemp()

import torch
from common import write_result
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_multimodal import trainers


def build(cls, folder: Path, plans_name: str, configuration: str, device: str):
    plans = json.loads((folder / f"{plans_name}.json").read_text(encoding="utf-8"))
    plans["continue_training"] = False
    trainer = cls(
        plans, configuration, 0, json.loads((folder / "dataset.json").read_text(encoding="utf-8")), torch.device(device)
    )
    trainer.print_to_log_file = lambda *args, **kwargs: None
    trainer.initialize()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.network.train()
    return trainer


def step(trainer) -> tuple[float, float]:
    """Seconds of data and of the step."""
    begin = time.perf_counter()
    batch = next(trainer.dataloader_train)
    middle = time.perf_counter()
    trainer.train_step(batch)  # ends with the loss on the CPU, so the device is done
    return middle - begin, time.perf_counter() - middle


def memory(trainer) -> int:
    """Bytes of activations kept for backward (each storage once), parameters, gradients and optimiser state."""
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.train_step(next(trainer.dataloader_train))
    parameters = sum(p.numel() * p.element_size() for p in trainer.network.parameters())
    states = sum(
        value.numel() * value.element_size()
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    own = {p.untyped_storage().data_ptr() for p in trainer.network.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in own) + 2 * parameters + states


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def predict(stock, crossmr, targets: int) -> tuple[float, float]:
    """Seconds for one slice in `targets` contrasts: stock on each, and one reference kept for all."""
    size = stock.configuration_manager.patch_size
    stock.network.eval(), crossmr.network.eval()
    stock.set_deep_supervision_enabled(False)
    x = torch.randn(1, stock.num_input_channels, *size, device=stock.device)
    scribbles = torch.zeros(1, stock.num_input_channels - 2, *size, dtype=torch.bool, device=stock.device)
    scribbles[:, :, size[0] // 2, size[1] // 4 : size[1] // 2] = True
    network = crossmr.bare_network()
    with torch.inference_mode():
        begin = time.perf_counter()
        for _ in range(targets):
            stock.network(x)
        wait(stock.device)
        middle = time.perf_counter()
        prompt = network.prompt(x[:, :1], scribbles)
        for _ in range(targets):
            network.segment(x[:, :1], prompt)
        wait(stock.device)
        end = time.perf_counter()
    stock.set_deep_supervision_enabled(True)
    stock.network.train(), crossmr.network.train()
    return middle - begin, end - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("configuration")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    folder = Path(str(nnUNet_preprocessed)) / maybe_convert_to_dataset_name(int(args.dataset))
    names = ("nnUNetTrainerContrastAug", "nnUNetTrainerCrossMR")
    classes = {"nnUNetTrainer": nnUNetTrainer, **{name: getattr(trainers, name) for name in names}}
    built = {name: build(cls, folder, args.plans, args.configuration, args.device) for name, cls in classes.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in built}
    predictions = []
    for round_ in range(args.steps + 2):
        for name, trainer in built.items():
            measured = step(trainer)
            if round_ >= 2:
                times[name].append(measured)
        if round_ >= 2:
            predictions.append(predict(built["nnUNetTrainer"], built["nnUNetTrainerCrossMR"], targets=4))
    bytes_ = {name: memory(trainer) for name, trainer in built.items()}
    stock = "nnUNetTrainer"

    def median(name: str, part) -> float:
        return statistics.median(part(t) for t in times[name])

    result = {
        "patch": list(built[stock].configuration_manager.patch_size),
        "batch": built[stock].batch_size,
        "steps": args.steps,
        "step_seconds": {n: round(median(n, lambda t: t[1]), 4) for n in built},
        "data_seconds": {n: round(median(n, lambda t: t[0]), 4) for n in built},
        "step_ratio": {n: round(median(n, lambda t: t[1]) / median(stock, lambda t: t[1]), 3) for n in built},
        "data_and_step_ratio": {n: round(median(n, sum) / median(stock, sum), 3) for n in built},
        "memory_ratio": {n: round(b / bytes_[stock], 3) for n, b in bytes_.items()},
        "memory_megabytes": {n: round(b / 1e6, 1) for n, b in bytes_.items()},
        "prediction_ratio_four_targets": round(
            statistics.median(p[1] for p in predictions) / statistics.median(p[0] for p in predictions), 3
        ),
    }
    print(json.dumps(result, indent=2))
    note = (
        "memory: activations kept for backward + parameters + gradients + optimiser state, counted, not the process's; "
        "prediction: network time of one patch in four contrasts, no mirroring, reference encoded once"
    )
    print(write_result(f"training_step_{args.configuration}_{args.plans}", result, note))


if __name__ == "__main__":
    main()
