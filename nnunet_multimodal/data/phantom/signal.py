"""From tissue to signal: the equations of the sequences, and their usual settings for the abdomen at 3 T.

Water and fat are summed as the sequence sees them, signed, so that a voxel holding both loses signal in opposed phase
(also at the border of an organ in fat: the dark line that radiologists know).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import cos, exp, radians, sin
from types import MappingProxyType

from nnunet_multimodal.data.phantom.tissues import Tissue

STATIC_DEPHASING = 0.020  # 1/T2* = 1/T2 + 20/s, about what the abdomen has at 3 T


def spoiled_gradient_echo(t1: float, t2: float, tr: float, te: float, flip: float) -> float:
    """Ernst: sin(a) (1 - E1) / (1 - cos(a) E1) exp(-TE/T2*), E1 = exp(-TR/T1); times in ms, flip in degrees."""
    e1, a = exp(-tr / t1), radians(flip)
    return sin(a) * (1 - e1) / (1 - cos(a) * e1) * exp(-te * (1 / t2 + STATIC_DEPHASING))


def spin_echo(t1: float, t2: float, tr: float, te: float) -> float:
    """(1 - exp(-TR/T1)) exp(-TE/T2); times in ms."""
    return (1 - exp(-tr / t1)) * exp(-te / t2)


def diffusion(adc: float, b: float) -> float:
    """exp(-b ADC); ADC in 1e-3 mm2/s, b in s/mm2 (Stejskal and Tanner)."""
    return exp(-b * adc * 1e-3)


@dataclass(frozen=True)
class Contrast:
    """A sequence and what its images look like.

    Attributes:
        sequence: ``gradient_echo``, ``spin_echo`` or ``ct``.
        tr, te: ms. flip: degrees. b: s/mm2.
        fat: weight of the fat signal: 1, -1 opposed to water's, 0.1 suppressed.
        pixel, thickness: size of a voxel relative to the phantom's spacing.
        snr: of fat or the brightest organ; in CT, HU that the noise has.
        warp: mm of smooth distortion along the phase-encoding axis (echo-planar readout).
        session: contrasts of one session are taken together: same position, same grid.
    """

    sequence: str
    tr: float = 0.0
    te: float = 0.0
    flip: float = 90.0
    b: float = 0.0
    fat: float = 1.0
    pixel: float = 1.0
    thickness: float = 1.0
    snr: float = 40.0
    warp: float = 0.0
    session: str = ""


CONTRASTS: Mapping[str, Contrast] = MappingProxyType(
    {
        # 3D spoiled gradient echo with fat suppression (VIBE, LAVA)
        "T1w": Contrast("gradient_echo", tr=4.5, te=1.5, flip=12, fat=0.15),
        # single-shot turbo spin echo (HASTE)
        "T2w": Contrast("spin_echo", tr=2500, te=70, pixel=0.9, thickness=1.1),
        # echo-planar, b = 400 s/mm2, fat suppressed
        "DWI": Contrast("spin_echo", tr=4000, te=60, b=400, fat=0.05, pixel=1.6, thickness=1.15, snr=22, warp=3.0),
        # dual echo, one breath hold: fat is opposed at 1.15 ms and back in phase at 2.3 ms at 3 T
        "InPhase": Contrast("gradient_echo", tr=130, te=2.3, flip=65, pixel=1.1, session="dual_echo"),
        "OpposedPhase": Contrast("gradient_echo", tr=130, te=1.15, flip=65, fat=-1, pixel=1.1, session="dual_echo"),
        "CT": Contrast("ct", pixel=0.8, thickness=0.85, snr=14),
    }
)


def on_same_grid(contrast: Contrast) -> Contrast:
    """The contrast as it is after perfect registration to the others: one session, one voxel size, no distortion."""
    return replace(contrast, pixel=1.0, thickness=1.0, warp=0.0, session="same_grid")


def tissue_signal(tissue: Tissue, fat: Tissue, contrast: Contrast) -> float:
    """Signal of a tissue, relative to water's magnetisation (signed: opposed fat is below 0); HU in CT.

    S = density ((1 - fat fraction) S_water + weight * fat fraction * S_fat); ``fat`` gives the T1 and T2 of fat.
    """
    if contrast.sequence == "ct":
        return tissue.hu
    water_part = tissue.density * (1 - tissue.fat) * _signal(tissue.t1, tissue.t2, tissue.adc, contrast)
    fat_part = tissue.density * tissue.fat * _signal(fat.t1, fat.t2, fat.adc, contrast)
    moved = tissue.flow if contrast.sequence == "spin_echo" else 1.0
    return moved * water_part + contrast.fat * fat_part


def _signal(t1: float, t2: float, adc: float, contrast: Contrast) -> float:
    if contrast.sequence == "gradient_echo":
        return spoiled_gradient_echo(t1, t2, contrast.tr, contrast.te, contrast.flip)
    return spin_echo(t1, t2, contrast.tr, contrast.te) * diffusion(adc, contrast.b)
