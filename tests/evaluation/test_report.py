"""report.html: one file, everything from outside escaped, every part there."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny_folders import organs, save, shifted

from nnunet_multimodal.evaluation import evaluate_folders

EVIL = "<script>alert(1)<_script>"  # a slash cannot be in a file name


class Page(HTMLParser):
    """Tags that are open at the end, all tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text += data

    def pictures(self) -> list[np.ndarray]:
        from matplotlib.image import imread

        sources = [value for name, value in self.attributes if name == "src"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [imread(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    """Six cases with every kind of trouble, with images for some."""
    root = tmp_path_factory.mktemp("report")
    label = "<b>liver$_{x}$</b>"
    for number in range(6):
        name = EVIL if number == 0 else f"case_{number}"
        save(root / "ref" / f"{name}.nii.gz", organs())
        save(root / "pred" / f"{name}.nii.gz", shifted(3 - min(number, 3)))
        if number % 2 == 0:
            image = np.random.default_rng(number).normal(size=organs().shape).astype(np.float32)
            save(root / "images" / f"{name}{'_0000' if number else ''}.nii.gz", image)
    (root / "pred" / "case_5.nii.gz").unlink()
    save(root / "pred" / "case_4.nii.gz", organs()[1:])
    save(root / "pred" / "case_6.nii.gz", organs())
    (root / "ref" / "case_6.nii.gz").write_bytes(b"PK")
    save(root / "images" / "case_2_0000.nii.gz", organs()[1:])
    save(root / "pred" / f"{EVIL}2.nii.gz", organs())
    save(root / "pred" / "case_3.nii.gz", np.where(organs() == 2, 8, organs()).astype(np.uint8))
    evaluate_folders(
        root / "pred",
        root / "ref",
        root / "out",
        {label: 1, "spleen": 2},
        modality_map={"case_1": "<i>T1</i>", "case_2": "T2", "case_9": "T2"},
        images=root / "images",
        progress=False,
    )
    return Page((root / "out" / "report.html").read_text(encoding="utf-8"))


def test_what_comes_from_files_is_escaped(page):
    assert "script" not in page.tags and "i" not in page.tags
    assert EVIL in page.text and f"{EVIL}2" in page.text and "<i>T1</i>" in page.text
    assert page.text.count("<b>liver$_{x}$</b>") >= 3


def test_it_is_whole_and_loads_nothing(page):
    assert page.open == []
    assert not {"link", "iframe", "object"} & {*page.tags}
    links = [value for name, value in page.attributes if name in ("src", "href", "srcset")]
    assert links and all(value.startswith("data:image/png;base64,") for value in links)


def test_every_part_is_there(page):
    for words in (
        "border",
        "tolerance 2 mm",
        "Predictions that cannot be used: 1.",
        "case_4",
        "Could not be measured: 1. Not in any mean.",
        "case_6",
        "keys of --modality-map that are no case (1): case_9",
        "image not shown: ",
        "shape found 15x14x6, expected 16x14x6",
        "Without a prediction: 1.",
        "case_5",
        "Predictions without a reference: 1.",
        "taken for background",
        "No modality is known of",
        "mean of the organs' means",
        "(missed)",
        "no image case_1 (or case_1_0000)",
    ):
        assert words in page.text, words
    assert "--fix-header" not in page.text
    # two box plots; then the cases that have a prediction and were measured: all but case_4 and case_5
    pictures = page.pictures()
    assert len(pictures) == 2 + 4
    for picture in pictures:
        assert picture.std() > 0.01  # something is drawn
    assert re.search(r"case_3, spleen:\s+DSC 0.000", re.sub(r"\s+", " ", page.text).replace(", -", ""))


def overlay_colours(image: np.ndarray | None) -> set[str]:
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from nnunet_multimodal.conversion.images import Volume
    from nnunet_multimodal.evaluation.pictures import PREDICTION, REFERENCE, overlay

    reference = Volume(Path("r"), organs().T, np.eye(4), (6.0, 1.5, 1.5))
    png = imread(io.BytesIO(overlay(shifted(2).T, reference, [1], image)))[..., :3]
    png = png[: int(0.85 * len(png))]  # without the legend
    colours = {"reference": REFERENCE, "prediction": PREDICTION}
    return {name for name, c in colours.items() if (np.abs(png - to_rgb(c)).max(axis=-1) < 0.05).sum() > 50}


@pytest.mark.parametrize("image", [None, np.zeros(organs().T.shape, np.float32)])
def test_overlays_show_both_outlines(image):
    assert overlay_colours(image) == {"reference", "prediction"}


def test_the_patients_right_is_on_the_left(monkeypatch):
    """RAS: the last column is the patient's right, and is drawn first."""
    from matplotlib.axes import Axes

    from nnunet_multimodal.conversion.images import Volume
    from nnunet_multimodal.evaluation import pictures

    drawn = []
    monkeypatch.setattr(Axes, "imshow", lambda self, data, **options: drawn.append((np.asarray(data), options)))
    label = np.zeros((4, 10, 10), np.uint8)
    label[:, 4:7, 7:9] = 1
    pictures.overlay(label, Volume(Path("r"), label, np.eye(4), (6.0, 60.0, 60.0)), [1], None)
    shown, options = drawn[0]
    assert options["origin"] == "lower"
    filled = np.flatnonzero(shown.any(axis=0))
    assert filled.mean() < shown.shape[1] / 2


def test_many_organs_get_several_rows_of_boxes():
    from matplotlib.image import imread

    from nnunet_multimodal.evaluation.pictures import box_plots

    few = {f"organ_{i}": {"CT": [0.5] * 6, "MR": []} for i in range(3)}
    many = {f"quite_a_long_name_of_an_organ_{i}": {"CT": [0.5], "MR": [0.1] * 300} for i in range(40)}
    heights = [imread(io.BytesIO(box_plots(values, "DSC"))).shape[0] for values in (few, many)]
    assert heights[1] > 3 * heights[0]
