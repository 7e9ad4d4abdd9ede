"""The sequences' equations against numbers worked out by hand, and what they must make of the published tissues."""

from __future__ import annotations

import pytest

from nnunet_multimodal.data.phantom.signal import (
    CONTRASTS,
    Contrast,
    diffusion,
    spin_echo,
    spoiled_gradient_echo,
    tissue_signal,
)
from nnunet_multimodal.data.phantom.tissues import TISSUES, Tissue

FAT = TISSUES["fat"]


def signal(name: str, contrast: str) -> float:
    return tissue_signal(TISSUES[name], FAT, CONTRASTS[contrast])


def test_spoiled_gradient_echo_by_hand():
    # E1 = exp(-100/1000) = 0.904837; 90 degrees: 1 - E1 = 0.095163; T2* decay exp(-2 (1/50 + 0.02)) = 0.923116
    assert spoiled_gradient_echo(1000, 50, tr=100, te=2, flip=90) == pytest.approx(0.095163 * 0.923116, rel=1e-5)
    # 30 degrees: 0.5 * 0.095163 / (1 - 0.866025 * 0.904837) = 0.219889 at TE 0
    assert spoiled_gradient_echo(1000, 50, tr=100, te=0, flip=30) == pytest.approx(0.219889, rel=1e-5)


def test_spin_echo_and_diffusion_by_hand():
    # (1 - exp(-2)) exp(-1) = 0.864665 * 0.367879
    assert spin_echo(1000, 80, tr=2000, te=80) == pytest.approx(0.318092, rel=1e-5)
    assert diffusion(adc=1.0, b=1000) == pytest.approx(0.367879, rel=1e-5)


def test_water_and_fat_add_in_phase_and_cancel_opposed():
    half = Tissue(FAT.t1, FAT.t2, 1.0, FAT.adc, 0.5, 0)
    in_phase = Contrast("gradient_echo", tr=130, te=2.3, flip=65)
    opposed = Contrast("gradient_echo", tr=130, te=2.3, flip=65, fat=-1)
    whole = spoiled_gradient_echo(FAT.t1, FAT.t2, 130, 2.3, 65)
    assert tissue_signal(half, FAT, in_phase) == pytest.approx(whole)
    assert tissue_signal(half, FAT, opposed) == pytest.approx(0, abs=1e-12)


def test_ct_is_the_published_number():
    assert signal("liver", "CT") == 58
    assert signal("fat", "CT") == -100


@pytest.mark.parametrize(
    ("contrast", "brighter", "darker"),
    [
        ("T1w", "liver", "spleen"),  # shorter T1
        ("T1w", "liver", "renal_medulla"),
        ("T1w", "renal_cortex", "renal_medulla"),
        ("T1w", "liver", "fat"),  # suppressed
        ("InPhase", "fat", "liver"),
        ("T2w", "spleen", "liver"),  # longer T2
        ("T2w", "renal_medulla", "muscle"),
        ("T2w", "bile", "spleen"),
        ("T2w", "spleen", "blood"),  # flow void
        ("DWI", "spleen", "liver"),  # lowest ADC, longer T2
        ("DWI", "spleen", "fat"),
        ("CT", "liver", "spleen"),
        ("CT", "spleen", "renal_cortex"),
    ],
)
def test_order_that_radiologists_know(contrast: str, brighter: str, darker: str):
    assert signal(brighter, contrast) > signal(darker, contrast)


def test_fatty_liver_loses_signal_in_opposed_phase_only():
    fatty = TISSUES["liver"]._replace(fat=0.2)
    lean = TISSUES["liver"]._replace(fat=0.0)
    for contrast, loses in (("OpposedPhase", True), ("InPhase", False)):
        ratio = tissue_signal(fatty, FAT, CONTRASTS[contrast]) / tissue_signal(lean, FAT, CONTRASTS[contrast])
        assert (ratio < 0.75) is loses
