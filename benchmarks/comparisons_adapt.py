"""What compare.py can rerun on adapting a model of one modality to another: data only.

A base model is trained on the CT of some subjects. Each method adapts it to the MR of others, of whom it sees all, or
only some, and is tested in both modalities on subjects that nothing was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from comparisons import Method


@dataclass(frozen=True)
class AdaptComparison:
    """Rows x numbers of training cases; the images are the phantom's, or real ones.

    Attributes:
        rows: what a method is called in the table, to how it adapts; ``options`` of ``nnunet_multimodal adapt`` are
            in ``adapt``.
        counts: of MR training cases; None is all.
        old, new: the contrasts; of real images, the folders below the example images.
    """

    title: str
    rows: Mapping[str, Method]
    adapt: Mapping[str, tuple[str, ...]]
    base: Method
    counts: tuple[int | None, ...]
    pixels: float  # in mm, within the slice; slices keep their thickness
    batch_size: int
    most_features: int  # of a stage
    divisor: int = 1  # of nnU-Net's features: with few features, factors are no small part
    old: str = "CT"
    new: str = "T2w"
    real: bool = False
    labels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # of real images: folder -> organ -> value
    base_subjects: int = 0
    new_subjects: int = 0
    test_subjects: int = 0  # of real images: so many of the new ones, and one of the old ones
    nsd_tolerance: float = 2.0  # mm
    phantom_seed: int = 0
    phantom_options: tuple[str, ...] = ()
    train_options: Mapping[str, Any] = field(default_factory=dict)  # settings of every method
    rates: str = ""
    not_measured: tuple[str, ...] = ()

    @property
    def methods(self) -> dict[str, Method]:
        """Each row with each number of cases; the base model is a row of its own, which is not trained."""
        made = {f"{row}-{count_name(count)}": method for row, method in self.rows.items() for count in self.counts}
        return {"base": self.base, **made}

    @property
    def train_subjects(self) -> int:
        return self.base_subjects + self.new_subjects

    @property
    def contrasts(self) -> tuple[str, str]:
        """All that are tested; what was seen by the base model first."""
        return (self.old, self.new)


def count_name(count: int | None) -> str:
    return "all" if count is None else str(count)


_FULL = "nnUNetTrainerMRSegmentator"  # the stock network, never mirrored
_RATE = {"initial_lr": 3e-3}
_RATES = (
    "AdamW for all: the base model 3e-3 (as in the other comparisons), full fine-tuning and context priors (which also "
    "train the whole network) 1e-3 and adapters 5e-3, where the row says no other."
)
_ADAPTERS = {"initial_lr": 5e-3, "warmup_iterations": 20}
_LORA, _MOA = "nnUNetTrainerLoRA", "nnUNetTrainerMoA"
_PHANTOM = AdaptComparison(
    title="A CT model adapted to T2w: a phantom's subjects, unpaired, tested in both on others",
    base=Method(_FULL, "base", {**_RATE, "num_epochs": 8}, adamw=True),
    rows={
        "full": Method(_FULL, "adapt", {"initial_lr": 1e-3}, adamw=True),
        "full_3e-4": Method(_FULL, "adapt", {"initial_lr": 3e-4}, adamw=True),
        "full_3e-3": Method(_FULL, "adapt", {"initial_lr": 3e-3}, adamw=True),
        "full_1e-2": Method(_FULL, "adapt", {"initial_lr": 1e-2}, adamw=True),
        "LoRA_r4": Method(_LORA, "adapt", _ADAPTERS),
        "LoRA_r8": Method(_LORA, "adapt", _ADAPTERS),
        "LoRA_r8_1e-2": Method(_LORA, "adapt", {**_ADAPTERS, "initial_lr": 1e-2}),
        "LoRA_r8_norm": Method(_LORA, "adapt", _ADAPTERS),
        "LoRA_r16": Method(_LORA, "adapt", _ADAPTERS),
        "MoA_r8": Method(_MOA, "adapt", _ADAPTERS),
        "ContextPrior": Method("nnUNetTrainerContextPrior", "adapt", {"initial_lr": 1e-3}),
        # three times as many steps, at the rates that did best
        "full_long": Method(_FULL, "adapt", {"initial_lr": 3e-3, "num_epochs": 15}, adamw=True),
        "LoRA_r8_long": Method(_LORA, "adapt", {**_ADAPTERS, "num_epochs": 15}),
    },
    adapt={
        "LoRA_r4": ("--rank", "4", "--alpha", "4"),
        "LoRA_r8_norm": ("--train-norm", "--train-bias"),
        "LoRA_r16": ("--rank", "16", "--alpha", "16"),
        "MoA_r8": ("--base-modality", "CT"),
    },
    counts=(None, 8, 4),
    pixels=4.0,
    batch_size=4,
    most_features=512,
    base_subjects=16,
    new_subjects=16,
    test_subjects=6,
    rates=_RATES,
    not_measured=("the spread over seeds, unless several are shown", "3d", "longer trainings", "other ranks' rates"),
    train_options={
        "num_epochs": 5,
        "num_iterations_per_epoch": 50,
        "num_val_iterations_per_epoch": 1,
        "save_every": 2,
    },
)
_ORGANS = {
    "abdomen_ct": {"liver": 5, "right_kidney": 2, "left_kidney": 3, "spleen": 1},
    "abdomen_mr_t2": {"liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4},
}

ADAPT_COMPARISONS: dict[str, AdaptComparison] = {
    "phantom_adapt": _PHANTOM,
    "abdomen_adapt": replace(
        _PHANTOM,
        title="A CT model adapted to T2-SPIR MR, real images: 1 CT and 10 MR to train, 4 MR and 1 CT to test",
        old="abdomen_ct",
        new="abdomen_mr_t2",
        real=True,
        labels=_ORGANS,
        pixels=4.0,
        test_subjects=4,
        not_measured=(
            "the spread over seeds, unless several are shown",
            "3d",
            "longer trainings of the rows that do not say so",
            "other rates of the rows that are shown with one",
            "how good the base model is: it saw one CT, and the other may be of the same patient",
        ),
    ),
    # Nothing to be learned from its numbers: it shows in minutes that the machinery works.
    "phantom_tiny_adapt": replace(
        _PHANTOM,
        title="a test of the runner",
        counts=(None, 1),
        base_subjects=2,
        new_subjects=2,
        test_subjects=1,
        pixels=8.0,
        batch_size=2,
        most_features=16,
        phantom_options=("--spacing", "6", "6", "12"),
        train_options={
            "num_epochs": 1,
            "num_iterations_per_epoch": 2,
            "num_val_iterations_per_epoch": 1,
            "save_every": 1,
        },
    ),
}
