"""What compare.py can rerun on real scribbles: data only.

A comparison trains each method on the same patients, on their scribbles or on their dense labels, and judges it on the
dense labels of other patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from comparisons import Method


@dataclass(frozen=True)
class ScribbleComparison:
    """Methods on patients; ``images``, ``scribbles`` and ``labels`` lie in ``source`` below the folder of real data."""

    title: str
    source: str
    methods: Mapping[str, Method]  # name in the table (and of files) to method; its data: scribbles or dense
    label_names: Mapping[str, int]
    unlabelled: int  # value of a scribble file where nobody drew
    train_cases: tuple[int, int]  # first and one behind the last, in the order of their names
    test_cases: tuple[int, int]
    pixels: float  # in the headers' mm, within the slice; slices keep their thickness
    patch: tuple[int, int]
    batch_size: int
    most_features: int  # of a stage
    divisor: int = 2  # of nnU-Net's numbers of features
    full: str = "nnUNetTrainer"  # the method whose Dice is 100 %
    train_options: Mapping[str, Any] = field(default_factory=dict)  # settings of every method
    rates: str = ""  # how learning rates and weights were chosen
    not_measured: tuple[str, ...] = ()


_RATE = {"initial_lr": 3e-3}
_NAME = "nnUNetTrainerPartialCE"


def _scribbled(trainer: str, **settings: Any) -> Method:
    return Method(trainer, "scribbles", {**_RATE, **settings}, adamw=True)


# WSL4MIS scales images to 0 to 1, where 0.1 is 0.4 of these images' deviations; nnU-Net's unit is a deviation.
_WIDE = [{"weight": 1.0, "sigma_xy": 6.0, "sigma_intensity": 0.4}]
# A tenth of 250,000 steps is enough for the network to know something; a tenth of 800 is not.
_LATE = {"ramp_up": 0.6}

_METHODS = {
    # Our trainers do not mirror labels that have sides, and these have: right and left ventricle.
    "nnUNetTrainerNoMirroring": Method("nnUNetTrainerNoMirroring", "dense", _RATE, adamw=True),
    "nnUNetTrainerNoMirroring-scribbles": _scribbled("nnUNetTrainerNoMirroring"),  # nnU-Net's own ignore label
    _NAME: _scribbled(_NAME),
    **{f"{_NAME}{word}": _scribbled(f"{_NAME}{word}", **_LATE) for word in ("_EM", "_TV", "_MS", "_CRF")},
    f"{_NAME}_CRF-0.4": _scribbled(f"{_NAME}_CRF", crf_kernels=_WIDE, **_LATE),
    "nnUNetTrainerDMSPS": _scribbled("nnUNetTrainerDMSPS", **_LATE),
    "nnUNetTrainerUSTM": _scribbled("nnUNetTrainerUSTM", teacher_passes=2),  # 8 would take three times as long
    "nnUNetTrainerScribble2Label": _scribbled(
        "nnUNetTrainerScribble2Label", ensemble_every=1, ensemble_step=1.0, **_LATE
    ),
}
# Trials: how soon and how strongly the CRF counts.
_TRIALS = {
    "nnUNetTrainerNoMirroring": _METHODS["nnUNetTrainerNoMirroring"],
    f"{_NAME}_CRF-0.4": _scribbled(f"{_NAME}_CRF", crf_kernels=_WIDE),
    f"{_NAME}_CRF-0.4-late": _METHODS[f"{_NAME}_CRF-0.4"],
    f"{_NAME}_CRF-0.4-late-light": _scribbled(f"{_NAME}_CRF", crf_kernels=_WIDE, crf_weight=0.02, **_LATE),
    f"{_NAME}_CRF-0.4-light": _scribbled(f"{_NAME}_CRF", crf_kernels=_WIDE, crf_weight=0.02),
    "nnUNetTrainerDMSPS-plain": _scribbled("nnUNetTrainerDMSPS", pseudo_sharpened=False),
}

_RATES = (
    "AdamW 3e-3 for all, as in phantom_table1; weights of the trainers' defaults. That regularisers grow over 60 % of "
    "the steps was chosen in trials of the CRF on 15 training patients, judged on 5 others of them: mean Dice .79; "
    "with a fifth of the weight .71; with a fifth of the weight and the default 10 % .77."
)

_CARDIAC: dict[str, Any] = {
    "source": "cardiac_scribble",
    "full": "nnUNetTrainerNoMirroring",
    "label_names": {"right_ventricle": 1, "myocardium": 2, "left_ventricle": 3},
    "unlabelled": 4,
    "pixels": 2.5,
    "patch": (128, 128),
    "batch_size": 2,
    "most_features": 64,
    "divisor": 4,
}
_LENGTH = {
    "num_epochs": 8,
    "num_iterations_per_epoch": 100,
    "num_val_iterations_per_epoch": 1,
    "save_every": 2,
}

SCRIBBLE_COMPARISONS: dict[str, ScribbleComparison] = {
    "cardiac_scribble": ScribbleComparison(
        title="Trained from real scribbles on cine MR of 20 patients, judged on dense labels of 10 others",
        methods=_METHODS,
        train_cases=(0, 20),
        test_cases=(20, 30),
        train_options=_LENGTH,
        rates=_RATES,
        not_measured=(
            "the spread over seeds, unless several are shown",
            "trainings of a usual length: full supervision itself is far from what it reaches then",
            "other rates than 3e-3, other weights than those of public code, except the CRF's",
            "3d, other data",
        ),
        **_CARDIAC,
    ),
    # Whether it is the length that is missing.
    "cardiac_scribble_long": ScribbleComparison(
        title="The same with three times as many steps",
        methods=_METHODS,
        train_cases=(0, 20),
        test_cases=(20, 30),
        train_options={**_LENGTH, "num_epochs": 24},
        rates=_RATES,
        not_measured=("the spread over seeds, unless several are shown", "3d, other data"),
        **_CARDIAC,
    ),
    # Where rates and weights were chosen: patients of the training part only.
    "cardiac_scribble_tuning": ScribbleComparison(
        title="The same within the 20: trained on 15, judged on 5",
        methods=_TRIALS,
        train_cases=(0, 15),
        test_cases=(15, 20),
        train_options=_LENGTH,
        **_CARDIAC,
    ),
}
