"""What compare.py can rerun on unpaired modalities: data only.

A comparison trains each method on subjects of whom each was seen in one modality only, and tests it on other subjects
in every modality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from comparisons import Method


@dataclass(frozen=True)
class MixedComparison:
    """Methods on subjects on modalities; a modality is one or several contrasts of the phantom."""

    title: str
    methods: Mapping[str, Method]  # name in the table (and of files) to method
    modalities: Mapping[str, tuple[str, ...]]  # name to its contrasts; training alternates in this order
    subjects_each: int  # trained on, of each modality; its contrasts take turns, one per subject
    test_subjects: int  # each in every contrast
    pixels: float  # in mm, within the slice; slices keep their thickness
    batch_size: int
    most_features: int  # of a stage; nnU-Net's are halved first
    informed: tuple[str, ...] = ()  # methods that also predict told the right modality, and told a wrong one
    # methods that were trained on one modality, which is told of every image: a guess of another would be by chance
    specialists: Mapping[str, str] = field(default_factory=dict)
    nsd_tolerance: float = 2.0  # mm
    phantom_seed: int = 0
    phantom_options: tuple[str, ...] = ()
    train_options: Mapping[str, Any] = field(default_factory=dict)  # settings of every method
    rates: str = ""  # why the learning rates are what they are
    not_measured: tuple[str, ...] = ()

    @property
    def train_subjects(self) -> int:
        return self.subjects_each * len(self.modalities)

    @property
    def contrasts(self) -> tuple[str, ...]:
        """All that are tested."""
        return tuple(contrast for contrasts in self.modalities.values() for contrast in contrasts)

    def modality_of(self, contrast: str) -> str:
        return next(modality for modality, contrasts in self.modalities.items() if contrast in contrasts)


# Trials of 300 steps, pseudo Dice in CT and MR on training images (no test subject was looked at): with text 1e-3 (the
# paper's) .747 and .757, 3e-3 .800 and .744; without text 1e-3 .288 and .301, 3e-3 .703 and .717. Stock's: see
# phantom_table1.
_STOCK = {"initial_lr": 3e-3}
_TEXT = {"initial_lr": 1e-3}
_NO_TEXT = {"initial_lr": 3e-3}
_RATES = (
    "Rates: with text the paper's 1e-3, without text 3e-3, nnUNetTrainer as in phantom_table1; AdamW for all. In "
    "trials of 300 steps, judged on training images, mean Dice was .75 (1e-3) and .77 (3e-3) with text, "
    ".29 and .71 without."
)
_NAME = "nnUNetTrainerMulModSeg"

_METHODS = {
    _NAME: Method(_NAME, "mixed", _TEXT),
    f"{_NAME}_noText": Method(f"{_NAME}_noText", "mixed", _NO_TEXT),
    f"{_NAME}_noALT": Method(f"{_NAME}_noALT", "mixed", _TEXT),
    # neither text nor alternation, and all else as in the others: stock has its own schedule, and it mirrors
    f"{_NAME}_noText-mixed": Method(f"{_NAME}_noText", "mixed", {**_NO_TEXT, "alternating": False}),
    "nnUNetTrainer": Method("nnUNetTrainer", "mixed", _STOCK, adamw=True),
    f"{_NAME}_CTonly": Method(f"{_NAME}_CTonly", "mixed", _TEXT),
    f"{_NAME}_MRonly": Method(f"{_NAME}_MRonly", "mixed", _TEXT),
}
# The paper's iteration is a batch of CT and one of MR, each with its own step: a network of one modality sees as many
# batches of it, and makes half the steps.
_FAIR = {
    name: replace(method, settings={**method.settings, "num_epochs": 8}) if "only" in name else method
    for name, method in _METHODS.items()
}

_SPECIALISTS = {f"{_NAME}_CTonly": "CT", f"{_NAME}_MRonly": "MR"}

MIXED_COMPARISONS: dict[str, MixedComparison] = {
    "phantom_table6": MixedComparison(
        title="MulModSeg's Table 6 in small: unpaired CT and MR of a phantom's subjects, tested on other subjects",
        methods=_FAIR,
        modalities={"CT": ("CT",), "MR": ("T1w", "T2w")},
        subjects_each=24,
        test_subjects=8,
        pixels=4.0,
        batch_size=6,
        most_features=128,
        informed=(_NAME,),
        specialists=_SPECIALISTS,
        rates=_RATES,
        not_measured=(
            "the spread over seeds, unless several are shown",
            "embeddings of CLIP (one-hot codes stand for them where no weights were at hand)",
            "longer trainings, more than two rates",
            "SwinUNETR",
            "3d",
            "harmonised intensities",
            "modalities of unequal number",
            "real images",
        ),
        train_options={
            "num_epochs": 16,
            "num_iterations_per_epoch": 100,
            "num_val_iterations_per_epoch": 4,
            "save_every": 2,
        },
    ),
    # Nothing to be learned from its numbers: it shows in minutes that the machinery works.
    "phantom_tiny_mixed": MixedComparison(
        title="a test of the runner",
        methods=_METHODS,
        modalities={"CT": ("CT",), "MR": ("T1w", "T2w")},
        subjects_each=2,
        test_subjects=1,
        pixels=5.5,
        batch_size=2,
        most_features=8,
        informed=(_NAME,),
        specialists=_SPECIALISTS,
        train_options={
            "num_epochs": 2,
            "num_iterations_per_epoch": 2,
            "num_val_iterations_per_epoch": 2,
            "save_every": 1,
        },
    ),
}
