"""The labels' colours, and the files that tell ITK-SNAP and 3D Slicer of them."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping

GOLDEN_ANGLE = 0.618034  # of the colour circle: neighbours in the list are far apart, however many there are

_ITKSNAP_HEAD = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
################################################
"""


def colour_of(label: int) -> tuple[int, int, int]:
    """Red, green and blue from 0 to 255 of a label from 1 on; the same in all projects.

    >>> colour_of(1) != colour_of(2)
    True
    """
    hue = (0.02 + (label - 1) * GOLDEN_ANGLE) % 1
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if label % 2 else 0.6, 1.0 if label % 3 else 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def itksnap_labels(organs: Mapping[str, int]) -> str:
    """A label description file (ITK-SNAP: Segmentation > Import Label Descriptions)."""
    lines = [f'{0:5d} {0:5d} {0:4d} {0:4d} {0:8.2f} {0:3d} {0:3d}    "Clear Label"']
    for name, label in organs.items():
        red, green, blue = colour_of(label)
        quoted = name.replace('"', "'")
        lines.append(f'{label:5d} {red:5d} {green:4d} {blue:4d} {1:8.2f} {1:3d} {1:3d}    "{quoted}"')
    return _ITKSNAP_HEAD + "\n".join(lines) + "\n"


def slicer_colours(organs: Mapping[str, int]) -> str:
    """A colour table (3D Slicer: drag it in first, and choose it as colour node when the mask is loaded)."""
    lines = ["# Color table file of nnunet_multimodal relabel", "0 Background 0 0 0 0"]
    lines += [
        f"{label} {name.replace(' ', '_')} {' '.join(map(str, colour_of(label)))} 255" for name, label in organs.items()
    ]
    return "\n".join(lines) + "\n"
