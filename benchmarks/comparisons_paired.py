"""What compare.py can rerun on registered pairs of images with scribbles: data only.

A comparison trains each method on the scribbles of some patients and judges it on the dense labels of others. The
images come from the phantom, or from a folder of the real data, where each patient is left out once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from comparisons import Method
from comparisons_scribbles import ScribbleComparison


@dataclass(frozen=True)
class PairedComparison(ScribbleComparison):
    """Methods on pairs; scribbles are simulated from the labels.

    Real images lie in ``source/images/CASE_ENDING.nii.gz``; without a source, they are the phantom's contrasts. The
    ranges of cases are not used: a phantom has so many to train and to test; of real patients, the seed is left out.
    """

    channels: Mapping[str, str] = None  # type: ignore[assignment]  # name to contrast, or to the end of file names
    missing: tuple[str, ...] = ()  # methods that also predict without each of the channels
    style: str = "skeleton"
    background: str = "erode"  # the paper's AutoBG; strokes near the organs leave the air to chance
    train_subjects: int = 0
    test_subjects: int = 0
    phantom_seed: int = 0
    phantom_options: tuple[str, ...] = ()

    @property
    def contrasts(self) -> tuple[str, ...]:
        """What the phantom is asked for."""
        return tuple(self.channels.values())


_RATE = {"initial_lr": 3e-3}
_CRF = {"lambda_ct": 0.02, "lambda_mr": 0.02}  # see _RATES
_NAME = "nnUNetTrainerCmFNet"
_RATES = (
    "AdamW 3e-3, as in the other comparisons. The CRF has a tenth of the paper's weight, 0.2: with that, and a ramp "
    "over half of 240 steps, CmFNet's pseudo Dice on training patches stayed below .5 (.9 without CRF): in so short a "
    "training the CRF is satisfied with one class everywhere before the scribbles are learned."
)


def _scribbled(trainer: str, **settings: Any) -> Method:
    return Method(trainer, "scribbles", {**_RATE, **settings}, adamw=True)


_METHODS = {
    "nnUNetTrainerPartialCE": _scribbled("nnUNetTrainerPartialCE"),
    "nnUNetTrainerPartialCE_CRF": _scribbled("nnUNetTrainerPartialCE_CRF", crf_weight=0.02),
    **{
        f"{_NAME}{word}": _scribbled(f"{_NAME}{word}", **_CRF)
        for word in ("_SSL", "_SSL_IMR", "_SSL_IMC", "", "_noCFE", "_noCFF")
    },
}
# Right and left kidney are labels, so the one that is to be reached must not mirror either.
_FULL = {"nnUNetTrainerNoMirroring": Method("nnUNetTrainerNoMirroring", "dense", _RATE, adamw=True)}
_MIRRORED = {"nnUNetTrainer": Method("nnUNetTrainer", "dense", _RATE, adamw=True)}
_PHANTOM = PairedComparison(
    title="CmFNet's Table VII in small: trained from simulated scribbles on a phantom's registered CT and T2w",
    source="",
    methods={**_FULL, **_METHODS},
    full="nnUNetTrainerNoMirroring",
    channels={"CT": "CT", "MR": "T2w"},
    missing=(_NAME,),
    label_names={"liver": 1, "right_kidney": 2, "left_kidney": 3, "spleen": 4},
    unlabelled=255,
    train_cases=(0, 0),
    test_cases=(0, 0),
    train_subjects=10,
    test_subjects=6,
    phantom_options=("--same-grid", "--spacing", "2.5", "2.5", "5"),
    pixels=5.0,
    patch=(48, 80),
    batch_size=4,
    most_features=128,
    divisor=4,
    rates=_RATES,
    not_measured=(
        "the spread over seeds, unless several are shown",
        "3d",
        "the paper's weights and length of training",
    ),
    train_options={
        "num_epochs": 30,
        "num_iterations_per_epoch": 40,
        "num_val_iterations_per_epoch": 1,
        "save_every": 2,
        "ramp_up": 0.5,
    },
)

PAIRED_COMPARISONS: dict[str, PairedComparison] = {
    "phantom_table7": _PHANTOM,
    # Whether it is the length that is missing.
    "phantom_table7_long": replace(
        _PHANTOM,
        title="The same with three times as many steps",
        train_options={**_PHANTOM.train_options, "num_epochs": 90},
    ),
    "brain_tumour_paired": replace(
        _PHANTOM,
        title="CmFNet on FLAIR and T1c of four patients with simulated scribbles, each patient left out once",
        source="brain_tumour_paired",
        methods={**_MIRRORED, **_METHODS},
        full="nnUNetTrainer",
        channels={"FLAIR": "Flair", "T1c": "T1c"},
        label_names={"tumour": 1},
        pixels=2.5,
        patch=(64, 64),
    ),
    # Nothing to be learned from its numbers: it shows in minutes that the machinery works.
    "phantom_tiny_paired": replace(
        _PHANTOM,
        title="a test of the runner",
        methods={**_FULL, **{name: _METHODS[name] for name in ("nnUNetTrainerPartialCE_CRF", _NAME)}},
        train_subjects=2,
        test_subjects=1,
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
