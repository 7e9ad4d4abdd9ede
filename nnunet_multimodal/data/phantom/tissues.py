"""What the phantom's tissues are made of: published relaxation times, diffusion, fat and CT numbers.

Sources (the key in brackets stands behind each row):

[B] de Bazelaire et al., Radiology 2004;230:652: T1 and T2 of abdominal tissue in vivo at 3.0 T.
[S] Stanisz et al., Magn Reson Med 2005;54:507: blood and spinal cord at 3 T.
[T] Tirkes et al., Abdom Radiol 2019;44:3133: pancreas, T1 median 717 ms at 3 T (in agreement with [B]).
[J] Jafar et al., World J Radiol 2016;8:21: median ADC of 115 studies: liver 1.28, kidney 1.94, pancreas 1.60,
    spleen 0.85, gallbladder 2.73 (1e-3 mm2/s).
[M] Mueller et al., Radiology 1994;190:475: ADC of muscle 1.99.
[P] Piekarski et al., Radiology 1980;137:727: unenhanced liver a few HU above spleen.
[W] Woodard & White, Br J Radiol 1986;59:1209: water content, taken as the proton density of water.

Rows without a key (bowel content, skin, bone, lung) are chosen to be plausible; nobody is asked to segment them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Tissue(NamedTuple):
    """Properties at 3 T.

    Attributes:
        t1, t2: of its water, ms.
        density: protons that give signal, relative to water.
        adc: apparent diffusion coefficient, 1e-3 mm2/s.
        fat: share of the density that is fat (its T1 and T2 are those of the row ``fat``).
        hu: CT number without contrast agent, HU.
        texture: how much its values vary from place to place (standard deviation, relative; of 200 HU in CT).
        flow: how much of it stays in the slice between excitation and echo of a spin echo (vessels are dark).
    """

    t1: float
    t2: float
    density: float
    adc: float
    fat: float
    hu: float
    texture: float = 0.03
    flow: float = 1.0


TISSUES: dict[str, Tissue] = {
    "air": Tissue(1000, 50, 0.0, 0.0, 0.0, -1000, 0.0),
    "skin": Tissue(900, 30, 0.7, 1.0, 0.1, 40),
    "fat": Tissue(382, 68, 0.9, 0.2, 0.93, -100, 0.05),  # [B]
    "muscle": Tissue(898, 29, 0.73, 1.99, 0.03, 55, 0.06),  # [B] [M] [W]
    "lung": Tissue(1200, 30, 0.15, 1.5, 0.0, -820, 0.15),
    "marrow": Tissue(586, 49, 0.7, 0.5, 0.4, 170, 0.12),  # [B]
    "cortical_bone": Tissue(800, 1, 0.15, 0.5, 0.0, 700, 0.1),
    "disc": Tissue(1100, 70, 0.75, 1.6, 0.0, 80),
    "spinal_cord": Tissue(993, 78, 0.7, 0.9, 0.0, 38),  # [S]
    "fluid": Tissue(3500, 800, 1.0, 2.9, 0.0, 8, 0.02),  # CSF, stomach, small bowel
    "bowel_wall": Tissue(1000, 45, 0.75, 1.5, 0.02, 40, 0.05),
    "bowel_content": Tissue(700, 55, 0.6, 1.2, 0.08, 20, 0.25),  # stool: bright on T1, uneven
    "blood": Tissue(1932, 275, 0.85, 2.0, 0.0, 42, 0.02, flow=0.12),  # [S]
    "liver": Tissue(809, 34, 0.71, 1.28, 0.03, 58, 0.035),  # [B] [J] [P] [W]
    "liver_vessel": Tissue(1932, 180, 0.85, 2.0, 0.0, 42, 0.02, flow=0.35),  # slower
    "lesion": Tissue(1150, 80, 0.8, 1.1, 0.0, 38, 0.08),
    "spleen": Tissue(1328, 61, 0.78, 0.85, 0.0, 50, 0.03),  # [B] [J] [P] [W]
    "renal_cortex": Tissue(1142, 76, 0.8, 1.94, 0.0, 33, 0.03),  # [B] [J] [W]
    "renal_medulla": Tissue(1545, 81, 0.82, 1.94, 0.0, 30, 0.03),  # [B] [J] [W]
    "pancreas": Tissue(725, 43, 0.75, 1.60, 0.07, 40, 0.08),  # [B] [T] [J]
    "bile": Tissue(2500, 500, 0.95, 2.73, 0.0, 10, 0.02),  # [J]
}


def vary(rng: np.random.Generator) -> dict[str, Tissue]:
    """Somebody's tissues: T1 varies by 6, T2 by 8 % (about as in [B]), density by 3 %, CT by 4 HU; liver fat too."""
    factors = rng.normal(0, 1, (len(TISSUES), 5))
    varied = {}
    for (name, tissue), f in zip(TISSUES.items(), np.clip(factors, -2.5, 2.5)):
        varied[name] = tissue._replace(
            t1=tissue.t1 * (1 + 0.06 * f[0]),
            t2=tissue.t2 * (1 + 0.08 * f[1]),
            density=tissue.density * (1 + 0.03 * f[2]),
            adc=tissue.adc * (1 + 0.08 * f[3]),
            hu=tissue.hu + 4 * f[4] * (name not in ("air", "lung")),
        )
    steatosis = min(0.2, 0.03 * float(np.exp(0.6 * rng.standard_normal())))
    varied["liver"] = varied["liver"]._replace(fat=steatosis, hu=varied["liver"].hu - 150 * (steatosis - 0.03))
    return varied


NAMES: tuple[str, ...] = tuple(TISSUES)
CODE: dict[str, int] = {name: code for code, name in enumerate(NAMES)}
"""Number of a tissue in the phantom's tissue maps."""
