from __future__ import annotations

from typing import Any

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_multimodal.data.phantom.signal import CONTRASTS
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.text import output_names
from nnunet_multimodal.text.names import find_row
from nnunet_multimodal.text.templates import find_template, make_prompts, modality_words

PLAIN = {"background": 0, "liver": 2, "spleen": 1, "ignore": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}


@pytest.mark.parametrize(
    ("labels", "order", "names"),
    [
        (PLAIN, None, ("background", "spleen", "liver")),
        ({"background": [0], "b": [2], "a": 1}, None, ("background", "a", "b")),
        (REGIONS, (1, 2, 3), ("whole", "core", "enhancing")),
    ],
)
def test_names_are_the_networks_outputs(labels: dict[str, Any], order: Any, names: tuple[str, ...]) -> None:
    assert output_names(labels) == names
    if labels["background"] == 0:  # nnU-Net takes no list there
        assert LabelManager(labels, order).num_segmentation_heads == len(names)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"liver": 1}, r'has no "background": 0'),
        ({"background": 1, "liver": 0}, r"background must be 0, found 1"),
        ({"background": 0, "liver": "1"}, r"label 'liver' is '1'; expected an id"),
        ({"background": 0, "liver": []}, r"label 'liver' is \[\]"),
        ({"background": 0, "liver": 1, "hepar": 1}, r"label id 1 has two names, liver and hepar"),
        ([], r"found \[\]"),
    ],
)
def test_labels_that_nnunet_cannot_use(labels: Any, message: str) -> None:
    with pytest.raises(DataProblem, match=message):
        output_names(labels, "x.json")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("right_kidney", "Right Kidney"),
        ("RIGHT-kidney", "Right Kidney"),
        ("kidney_right", "Right Kidney"),
        ("kidney_left", "Left Kidney"),
        ("gallbladder", "Gall Bladder"),
        ("liver", "liver"),  # as written before any looser way
    ],
)
def test_rows_are_found_however_they_are_written(name: str, row: str) -> None:
    rows = ["Left Kidney", "Right Kidney", "Gall Bladder", "Liver", "liver"]
    assert rows[find_row(name, rows, "embedding", "FILE")] == row


def test_rows_are_not_guessed() -> None:
    rows = ["Left Kidney", "left-kidney", "Arota", "Spleen"]
    with pytest.raises(UsageError, match=r"'left_kidney' could be 'Left Kidney', 'left-kidney' in FILE"):
        find_row("left_kidney", rows, "embedding", "FILE")
    with pytest.raises(
        UsageError, match=r"no embedding for 'aorta' \(did you mean 'Arota'\?\) in FILE, which has Left"
    ):
        find_row("aorta", rows, "embedding", "FILE")
    with pytest.raises(UsageError, match=r"no embedding for 'kidney'"):  # neither left nor right
        find_row("kidney", rows, "embedding", "FILE")
    with pytest.raises(UsageError, match=r"no embedding for '___' in FILE"):
        find_row("___", rows, "embedding", "FILE")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("V1", "A photo of a right kidney."),
        ("v2", "There is a right kidney in this magnetic resonance."),
        ("V3", "A magnetic resonance imaging of a right kidney."),
        ("[CLS] in {modality}", "right kidney in magnetic resonance"),
        ("{organ}, {{seen}}", "right kidney, {seen}"),
    ],
)
def test_the_papers_templates(template: str, prompt: str) -> None:
    prompts = make_prompts(template, ["CT", "MR"], ["background", "right_kidney"])
    assert prompts[1][1] == prompt
    assert len(prompts) == len(prompts[0]) == 2


def test_words_replace_names() -> None:
    words = {"ivc": "inferior vena cava", "MR": "T2 MRI"}
    prompts = make_prompts("V3", ["CT", "MR"], ["background", "ivc"], words)
    assert prompts[0][1] == "A computed tomography imaging of a inferior vena cava."
    assert prompts[1][0] == "A T2 MRI imaging of a background."


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CT", "computed tomography"),
        ("MRI", "magnetic resonance"),
        ("T1w", "T1-weighted magnetic resonance"),
        ("MR_T2-w", "T2-weighted magnetic resonance"),
        ("dwi", "diffusion-weighted magnetic resonance"),
        ("PET", "positron emission tomography"),
        ("my_scanner", "my scanner"),
    ],
)
def test_modalities_are_written_out(name: str, words: str) -> None:
    assert modality_words(name) == words


def test_every_contrast_of_the_phantom_has_words() -> None:
    for name in CONTRASTS:
        assert modality_words(name) not in (name, name.replace("_", " "))


@pytest.mark.parametrize(
    "template", ["V4", "a photo", "{modality}", "{organ} {size}", "{organ.real}", "{organ!r}", "{0}"]
)
def test_templates_that_are_none(template: str) -> None:
    with pytest.raises(UsageError, match=r"unknown template .*Take V1, V2, V3, or your own text with \{organ\}"):
        find_template(template)


@pytest.mark.parametrize(
    ("labels", "words", "message"),
    [
        (["background", "_"], {}, r"prompt for '_' is empty"),
        (["background", "liver"], {"liver": " "}, r"prompt for 'liver' is empty"),
        (["background", "liver"], {"lever": "liver"}, r"no label or modality 'lever'\. Did you mean 'liver'\?"),
        (["a_b", "a b"], {}, r"'a_b' and 'a b' both read 'a b'"),
    ],
)
def test_prompts_that_say_nothing(labels: list[str], words: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_prompts("V3", ["CT"], labels, words)


def test_unpaired_braces() -> None:
    with pytest.raises(UsageError, match="unpaired braces"):
        find_template("{organ")
