"""One nnU-Net training in a process of its own, seeded, resumable, and timed; compare.py starts it.

    python benchmarks/train_one.py Dataset701_Plain 2d -tr nnUNetTrainer -p nnUNetPlans_stock --seed 0 --device cpu

Trains on all cases (fold all; or on those of another fold) into nnUNet_results, as nnUNetv2_train would, but without
the validation after it, which says nothing where all cases were trained on. The section ``nnunet_multimodal`` of the
plans holds for stock trainers too: those of its keys that are attributes of the trainer are set. Beside the checkpoints
lies training.json with the time.

Every epoch starts with its own seed, so an interrupted training that went on is the same as one that never stopped
(where augmentation runs in this process, nnUNet_n_proc_DA=0, and the device is deterministic).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECTION = "nnunet_multimodal"
# What may be set on a stock trainer, which does not read the plans' section.
ATTRIBUTES = (
    "num_epochs",
    "num_iterations_per_epoch",
    "num_val_iterations_per_epoch",
    "initial_lr",
    "weight_decay",
    "save_every",
)
PACKAGES = ("nnunet-multimodal", "nnunetv2", "torch", "numpy", "batchgeneratorsv2")


def build(
    dataset: str,
    configuration: str,
    trainer_name: str,
    plans_name: str,
    device: str,
    adamw: bool = False,
    fold: str = "all",
) -> Any:
    """The trainer as nnUNetv2_train builds it, with the plans' settings; goes on from its latest checkpoint, if any."""
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
    from torch import device as torch_device

    trainer = get_trainer_from_args(
        dataset,
        configuration,
        fold if fold == "all" else int(fold),
        trainer_name,
        plans_name,
        False,
        device=torch_device(device),
    )
    if not hasattr(trainer, "settings"):  # not one of ours
        section = trainer.configuration_manager.configuration.get(SECTION, {})
        for key in ATTRIBUTES:
            if key in section:
                setattr(trainer, key, section[key])
    if adamw:
        use_adamw(trainer)
    if (Path(trainer.output_folder) / "checkpoint_latest.pth").exists():
        maybe_load_checkpoint(trainer, True, False)
    return trainer


def use_adamw(trainer: Any) -> None:
    """CrossMR's optimiser and schedule on any trainer, with the trainer's own rate: a comparison of methods, not of
    optimisers. Stock's SGD is made for 250,000 steps and has learned little after a few thousand.
    """
    import torch

    from nnunet_multimodal.trainers.schedule import WarmupPoly

    def configure_optimizers() -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW(trainer.network.parameters(), lr=trainer.initial_lr, weight_decay=1e-2)
        schedule = WarmupPoly(
            optimizer, trainer.initial_lr, trainer.num_epochs, trainer.num_iterations_per_epoch, 50, 1.0
        )
        return optimizer, schedule

    trainer.configure_optimizers = configure_optimizers


def seed_everything(seed: int, epoch: int) -> None:
    """A stream of random numbers for each epoch of each training."""
    import numpy as np
    import torch

    state = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def clock_for(trainer: Any) -> Callable[[], float]:
    """Processor time where one thread does everything, so that other work on the machine does not count; else wall."""
    import torch

    alone = torch.get_num_threads() == 1 and os.environ.get("nnUNet_n_proc_DA") == "0"
    return time.process_time if trainer.device.type == "cpu" and alone else time.perf_counter


def watch(trainer: Any, seed: int, seconds: list[float], write: Callable[[], None]) -> None:
    """Seeds each epoch and appends the seconds of its training part: data and steps, not validation and plots."""
    start, end, close = trainer.on_train_epoch_start, trainer.on_train_epoch_end, trainer.on_epoch_end
    begin, clock = [0.0], clock_for(trainer)

    def on_train_epoch_start() -> None:
        seed_everything(seed, trainer.current_epoch + 1)  # 0 is the initialisation
        start()
        begin[0] = clock()

    def on_train_epoch_end(outputs: list[dict[str, Any]]) -> None:
        seconds.append(clock() - begin[0])
        end(outputs)

    def on_epoch_end() -> None:
        close()
        write()

    trainer.on_train_epoch_start = on_train_epoch_start
    trainer.on_train_epoch_end = on_train_epoch_end
    trainer.on_epoch_end = on_epoch_end


def describe(trainer: Any, seed: int, seconds: list[float]) -> dict[str, Any]:
    """What the comparison's table says about a training."""
    import numpy as np
    import torch

    cuda = trainer.device.type == "cuda"
    return {
        "trainer": type(trainer).__name__,
        "seed": seed,
        "iterations": trainer.num_epochs * trainer.num_iterations_per_epoch,
        "epochs_done": len(seconds),
        "clock": clock_for(trainer).__name__,
        "batch_size": trainer.configuration_manager.batch_size,
        "patch_size": list(trainer.configuration_manager.patch_size),
        "initial_lr": trainer.initial_lr,
        "optimizer": type(trainer.optimizer).__name__,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "trainable_parameters": sum(p.numel() for p in trainer.network.parameters() if p.requires_grad),
        # the median: another process on the machine slows single epochs down, the first one also loads the data
        "seconds_per_iteration": float(np.median(seconds)) / trainer.num_iterations_per_epoch,
        "seconds_of_epochs": [round(value, 3) for value in seconds],
        "device": torch.cuda.get_device_name(0) if cuda else f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="full name, in nnUNet_preprocessed")
    parser.add_argument("configuration")
    parser.add_argument("-tr", "--trainer", default="nnUNetTrainer")
    parser.add_argument("-p", "--plans", default="nnUNetPlans")
    parser.add_argument("--fold", default="all", help="all, or 0, 1, ... of splits_final.json (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adamw", action="store_true", help="CrossMR's optimiser in place of the trainer's")
    parser.add_argument("-device", "--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()

    from nnunet_multimodal.environment import use_own_trainers

    use_own_trainers()
    seed_everything(args.seed, 0)
    trainer = build(args.dataset, args.configuration, args.trainer, args.plans, args.device, args.adamw, args.fold)
    folder = Path(trainer.output_folder)
    if (folder / "checkpoint_final.pth").exists():
        print(f"{folder} is trained already")
        return
    record = folder / "training.json"
    seconds: list[float] = []
    if trainer.current_epoch and record.exists():  # the epochs that the checkpoint has seen
        seconds = json.loads(record.read_text(encoding="utf-8"))["seconds_of_epochs"][: trainer.current_epoch]
    watch(trainer, args.seed, seconds, lambda: write_json(record, describe(trainer, args.seed, seconds)))
    trainer.run_training()


if __name__ == "__main__":
    main()
