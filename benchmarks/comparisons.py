"""What compare.py can rerun: data only.

A comparison trains each method on one contrast of the phantom and tests it on every contrast of other subjects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Method:
    """One row of the table.

    ``settings`` go into the section ``nnunet_multimodal`` of the method's own copy of the plans; those that stock
    trainers have too (epochs, iterations, learning rate) are set on them by train_one.py.
    """

    trainer: str
    data: str  # plain, scribble or crossmr: which `nnunet_multimodal convert` made its data set
    settings: Mapping[str, Any]
    adamw: bool = False  # CrossMR's optimiser and schedule in place of the trainer's own


@dataclass(frozen=True)
class Comparison:
    """Methods on subjects on contrasts."""

    title: str
    methods: Mapping[str, Method]  # name in the table (and of files) to method
    reference: str  # the contrast that is trained on, and scribbled on at test
    contrasts: tuple[str, ...]  # all that are tested
    unseen: tuple[str, ...]  # those of the mean column
    train_subjects: int
    test_subjects: int
    pixels: float  # in mm, within the slice; slices keep their thickness
    batch_size: int
    most_features: int  # of a stage; nnU-Net's are halved first
    nsd_tolerance: float = 2.0  # mm
    phantom_seed: int = 0
    phantom_options: tuple[str, ...] = ()
    train_options: Mapping[str, Any] = field(default_factory=dict)  # settings of every method


# Each family has the rate that learned fastest in short trials of ContrastAug: AdamW 3e-3 (after 400 steps pseudo Dice
# .78), 1e-3 (.51), stock's SGD 1e-2 or 5e-2 (only the liver is found). CrossMR and its ablations have its default,
# 1e-3; rows of their own have 3e-3.
_PLAIN = {"initial_lr": 3e-3}
_CROSSMR_SETTINGS = {"initial_lr": 1e-3}
_FASTER = {"initial_lr": 3e-3}
_CROSSMR = ("", "_noVisualTokens", "_noOrganMatch", "_noPairedAug", "_visualAcrossBatch")
_LONGER = (
    "nnUNetTrainerNoMirroring",
    "nnUNetTrainerContrastAug",
    "nnUNetTrainerCrossMR-3e-3",
    "nnUNetTrainerContrastAug-repainted",
    "nnUNetTrainerCrossMR-repainted-3e-3",
)

_TABLE1 = Comparison(
    title="CrossMR's Table 1 in small: trained on the T1w of a phantom's subjects, tested on others' contrasts",
    methods={
        "nnUNetTrainer": Method("nnUNetTrainer", "plain", _PLAIN, adamw=True),
        "nnUNetTrainerNoMirroring": Method("nnUNetTrainerNoMirroring", "plain", _PLAIN, adamw=True),
        "nnUNetTrainerContrastAug": Method("nnUNetTrainerContrastAug", "plain", _PLAIN, adamw=True),
        "nnUNetTrainerScribble": Method("nnUNetTrainerScribble", "scribble", _PLAIN, adamw=True),
        **{
            f"nnUNetTrainerCrossMR{word}": Method(f"nnUNetTrainerCrossMR{word}", "crossmr", _CROSSMR_SETTINGS)
            for word in _CROSSMR
        },
        # the same trainers with one of their settings: regions of the image get contrasts of their own
        "nnUNetTrainerContrastAug-repainted": Method(
            "nnUNetTrainerContrastAug", "plain", {**_PLAIN, "repainted": 0.4}, adamw=True
        ),
        "nnUNetTrainerCrossMR-repainted": Method(
            "nnUNetTrainerCrossMR", "crossmr", {**_CROSSMR_SETTINGS, "repainted": 0.4}
        ),
        "nnUNetTrainerCrossMR-3e-3": Method("nnUNetTrainerCrossMR", "crossmr", _FASTER),
        "nnUNetTrainerCrossMR-repainted-3e-3": Method("nnUNetTrainerCrossMR", "crossmr", {**_FASTER, "repainted": 0.4}),
    },
    reference="T1w",
    contrasts=("T1w", "T2w", "DWI", "InPhase", "OpposedPhase", "CT"),
    unseen=("T2w", "DWI", "InPhase", "OpposedPhase"),
    train_subjects=32,
    test_subjects=8,
    pixels=4.0,
    batch_size=6,
    most_features=128,
    train_options={
        "num_epochs": 15,
        "num_iterations_per_epoch": 100,
        "num_val_iterations_per_epoch": 1,
        "save_every": 2,
    },
)

COMPARISONS: dict[str, Comparison] = {
    "phantom_table1": _TABLE1,
    "phantom_table1_long": replace(
        _TABLE1,
        title=f"{_TABLE1.title}, three times as long",
        methods={name: _TABLE1.methods[name] for name in _LONGER},
        train_options={**_TABLE1.train_options, "num_epochs": 45},
    ),
    # Nothing to be learned from its numbers: it shows in minutes that the machinery works.
    "phantom_tiny": Comparison(
        title="a test of the runner",
        methods={
            "nnUNetTrainer": Method("nnUNetTrainer", "plain", _PLAIN, adamw=True),
            "nnUNetTrainerScribble": Method("nnUNetTrainerScribble", "scribble", _PLAIN, adamw=True),
            "nnUNetTrainerCrossMR": Method(
                "nnUNetTrainerCrossMR",
                "crossmr",
                {**_CROSSMR_SETTINGS, "width": 16, "hidden": 16, "layers": 2, "queries": 3},
            ),
        },
        reference="T1w",
        contrasts=("T1w", "T2w", "CT"),
        unseen=("T2w",),
        train_subjects=2,
        test_subjects=1,
        pixels=5.5,
        batch_size=2,
        most_features=8,
        train_options={
            "num_epochs": 2,
            "num_iterations_per_epoch": 2,
            "num_val_iterations_per_epoch": 1,
            "save_every": 1,
        },
    ),
}
