"""MRSegmentator's 40 classes, and how the classes of public data sets are called there: plain data.

Sources: MRSegmentator, the class table of its README and ``evaluation/mappings.py``, ``metadata/total2new.json``;
TotalSegmentator, ``totalsegmentator/map_to_binary.py``; AMOS22, dataset.json in its zip.

Not all that is called the same is the same: MRSegmentator's spine is the vertebral bodies, without arches and discs
(its issue 23); TotalSegmentator's vertebrae have their arches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nnunet_multimodal.errors import UsageError

# Class k of MRSegmentator is the k-th of these; 0 is background.
MRSEGMENTATOR = (
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "liver",
    "stomach",
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
    "left_lung",
    "right_lung",
    "heart",
    "aorta",
    "inferior_vena_cava",
    "portal_vein_and_splenic_vein",
    "left_iliac_artery",
    "right_iliac_artery",
    "left_iliac_vena",
    "right_iliac_vena",
    "esophagus",
    "small_bowel",
    "duodenum",
    "colon",
    "urinary_bladder",
    "spine",
    "sacrum",
    "left_hip",
    "right_hip",
    "left_femur",
    "right_femur",
    "left_autochthonous_muscle",
    "right_autochthonous_muscle",
    "left_iliopsoas_muscle",
    "right_iliopsoas_muscle",
    "left_gluteus_maximus",
    "right_gluteus_maximus",
    "left_gluteus_medius",
    "right_gluteus_medius",
    "left_gluteus_minimus",
    "right_gluteus_minimus",
)

_VERTEBRAE = [
    "vertebrae_S1",
    *(f"vertebrae_{part}{number}" for part, last in (("L", 5), ("T", 12), ("C", 7)) for number in range(last, 0, -1)),
]
_RIBS = [f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13)]
_LIMBS_AND_MUSCLES = [
    f"{name}_{side}"
    for name in ("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas")
    for side in ("left", "right")
]


def _numbered(*names: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(names, start=1)}


# Classes of the label files: name -> id.
AMOS = _numbered(
    "spleen", "right_kidney", "left_kidney", "gall_bladder", "esophagus", "liver", "stomach", "aorta", "postcava",
    "pancreas", "right_adrenal_gland", "left_adrenal_gland", "duodenum", "bladder", "prostate_uterus",
)  # fmt: skip
_ABDOMEN = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas", "adrenal_gland_right",
    "adrenal_gland_left",
)  # fmt: skip
_ILIAC = ("iliac_artery_left", "iliac_artery_right", "iliac_vena_left", "iliac_vena_right")
TOTALSEGMENTATOR_CT = _numbered(
    *_ABDOMEN, "lung_upper_lobe_left", "lung_lower_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right",
    "lung_lower_lobe_right", "esophagus", "trachea", "thyroid_gland", "small_bowel", "duodenum", "colon",
    "urinary_bladder", "prostate", "kidney_cyst_left", "kidney_cyst_right", "sacrum", *_VERTEBRAE, "heart", "aorta",
    "pulmonary_vein", "brachiocephalic_trunk", "subclavian_artery_right", "subclavian_artery_left",
    "common_carotid_artery_right", "common_carotid_artery_left", "brachiocephalic_vein_left",
    "brachiocephalic_vein_right", "atrial_appendage_left", "superior_vena_cava", "inferior_vena_cava",
    "portal_vein_and_splenic_vein", *_ILIAC, "humerus_left", "humerus_right", "scapula_left", "scapula_right",
    "clavicula_left", "clavicula_right", "femur_left", "femur_right", "hip_left", "hip_right", "spinal_cord",
    *_LIMBS_AND_MUSCLES, "brain", "skull", *_RIBS, "sternum", "costal_cartilages",
)  # fmt: skip
_MR_TRUNK = (
    *_ABDOMEN, "lung_left", "lung_right", "esophagus", "small_bowel", "duodenum", "colon", "urinary_bladder",
    "prostate", "sacrum", "vertebrae", "intervertebral_discs", "spinal_cord", "heart", "aorta", "inferior_vena_cava",
    "portal_vein_and_splenic_vein", *_ILIAC, "humerus_left", "humerus_right",
)  # fmt: skip
TOTALSEGMENTATOR_MR = _numbered(
    *_MR_TRUNK, "scapula_left", "scapula_right", "clavicula_left", "clavicula_right", "femur_left", "femur_right",
    "hip_left", "hip_right", *_LIMBS_AND_MUSCLES, "brain",
)  # fmt: skip
# The first release had other classes from 32 on: the same ids mean other organs.
TOTALSEGMENTATOR_MR_56 = _numbered(
    *_MR_TRUNK, "fibula", "tibia", "femur_left", "femur_right", "hip_left", "hip_right", *_LIMBS_AND_MUSCLES,
    *(f"{name}_{side}" for name in ("quadriceps_femoris", "thigh_medial_compartment", "thigh_posterior_compartment",
                                    "sartorius") for side in ("left", "right")),
    "brain",
)  # fmt: skip

# What these classes are called in MRSegmentator; a class that is not here is background there.
_AMOS_NAMES = {
    **{name: name for name in AMOS if name in MRSEGMENTATOR},
    "gall_bladder": "gallbladder",
    "postcava": "inferior_vena_cava",
    # not the bladder: MRSegmentator leaves AMOS's out as well
}
_SIDED = {
    "kidney": "kidney",
    "adrenal_gland": "adrenal_gland",
    "lung": "lung",
    "lung_upper_lobe": "lung",
    "lung_middle_lobe": "lung",
    "lung_lower_lobe": "lung",
    "iliac_artery": "iliac_artery",
    "iliac_vena": "iliac_vena",
    "hip": "hip",
    "femur": "femur",
    "autochthon": "autochthonous_muscle",
    "iliopsoas": "iliopsoas_muscle",
    "gluteus_maximus": "gluteus_maximus",
    "gluteus_medius": "gluteus_medius",
    "gluteus_minimus": "gluteus_minimus",
}
_TOTALSEGMENTATOR_NAMES = {
    **{name: name for name in MRSEGMENTATOR if not name.startswith(("left_", "right_")) and name != "spine"},
    **{f"{theirs}_{side}": f"{side}_{ours}" for theirs, ours in _SIDED.items() for side in ("left", "right")},
    **dict.fromkeys(("vertebrae", *_VERTEBRAE), "spine"),
}


@dataclass(frozen=True)
class LabelMap:
    """How a data set's classes become MRSegmentator's.

    Attributes:
        what: the data set, for people.
        classes: name -> id, as in its label files.
        names: class -> MRSegmentator's name for it; several classes may become one.
    """

    what: str
    classes: Mapping[str, int]
    names: Mapping[str, str]

    def ids(self) -> dict[str, list[int]]:
        """MRSegmentator's name -> the data set's ids that become it, in the order of the 40 classes."""
        found: dict[str, list[int]] = {name: [] for name in MRSEGMENTATOR}
        for theirs, value in self.classes.items():
            if theirs in self.names:
                found[self.names[theirs]].append(value)
        return {name: values for name, values in found.items() if values}

    def left_out(self) -> dict[str, int]:
        """The classes that MRSegmentator has not, with their ids."""
        return {name: value for name, value in self.classes.items() if name not in self.names}


LABEL_MAPS = {
    "amos": LabelMap("AMOS22, 15 classes", AMOS, _AMOS_NAMES),
    "totalsegmentator_ct": LabelMap(
        "TotalSegmentator v2, task total, 117 classes", TOTALSEGMENTATOR_CT, _TOTALSEGMENTATOR_NAMES
    ),
    "totalsegmentator_mr": LabelMap(
        "TotalSegmentator v2, task total_mr, 50 classes", TOTALSEGMENTATOR_MR, _TOTALSEGMENTATOR_NAMES
    ),
    "totalsegmentator_mr_56": LabelMap(
        "TotalSegmentator's MRI data set as first published, 56 classes",
        TOTALSEGMENTATOR_MR_56,
        _TOTALSEGMENTATOR_NAMES,
    ),
}


def find_label_map(name: str) -> LabelMap:
    """The label map of this name.

    Raises:
        UsageError: there is none; lists those that there are.
    """
    if name not in LABEL_MAPS:
        known = "; ".join(f"{key} ({each.what})" for key, each in LABEL_MAPS.items())
        raise UsageError(f"there is no label map '{name}'. There are: {known}.")
    return LABEL_MAPS[name]
