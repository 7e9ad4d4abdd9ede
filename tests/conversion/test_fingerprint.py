"""``scribbles fingerprint``: CT statistics of what was drawn; nnU-Net's own count what nobody drew on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_data import make_image, save
from tiny_scribbles import Scribbled, make_scribbled, make_scribbles

Call = Callable[..., tuple[int, str, str]]


def ct(seed: int) -> np.ndarray:
    image = make_image(seed)
    return np.where(image == 0, -1000, image).astype(np.int16)


@pytest.fixture
def paired(tmp_path: Path, nnunet_folders: dict[str, str], call: Call) -> Scribbled:
    scribbled = make_scribbled(tmp_path / "in", Path(nnunet_folders["nnUNet_raw"]))
    for seed, case in enumerate("ab"):
        save(scribbled.root / "ct" / f"{case}.nii.gz", ct(seed))
    images = ["--images", f"CT={scribbled.root / 'ct'}", f"MR={scribbled.image().parent}"]
    code, text, error = call(scribbled.arguments(*images))
    assert code == 0, error
    assert text.index("scribbles fingerprint -d 7") < text.index("nnUNetv2_plan_and_preprocess -d 7")
    return scribbled


def test_statistics_of_what_was_drawn(paired: Scribbled, nnunet_folders: dict[str, str], call: Call) -> None:
    path = Path(nnunet_folders["nnUNet_preprocessed"]) / "Dataset007_Tiny" / "dataset_fingerprint.json"
    code, text, error = call(["scribbles", "fingerprint", "-d", "7"])
    assert code == 0, error
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content["foreground_intensity_properties_per_channel"]["0"]
    organs = np.isin(make_scribbles(), (1, 2))
    drawn = [ct(seed)[organs] for seed in (0, 1)]
    every = np.concatenate(drawn)  # as many of each case: the mean of all is that of the cases
    assert (found["min"], found["max"]) == (every.min(), every.max())
    assert found["mean"] == pytest.approx(every.mean(), abs=0.2)
    assert found["std"] == pytest.approx(every.std(), rel=0.02)
    assert found["percentile_00_5"] >= every.min() > -200
    assert content["spacings"] == [[6.0, 1.5, 1.5]] * 2
    assert content["shapes_after_crop"] == [[6, 14, 16]] * 2
    assert content["median_relative_size_after_cropping"] == 1.0
    assert "CT: mean" in text and str(path) in text


def test_doctor_tells_stock_statistics(paired: Scribbled, nnunet_folders: dict[str, str], call: Call) -> None:
    folder = Path(nnunet_folders["nnUNet_preprocessed"]) / "Dataset007_Tiny"
    folder.mkdir()
    stock = {"foreground_intensity_properties_per_channel": {"0": {"mean": -415.8}, "1": {"mean": 52.7}}}
    (folder / "dataset_fingerprint.json").write_text(json.dumps(stock), encoding="utf-8")
    code, text, _ = call(["doctor", "-d", "7"])
    assert code == 0 and "mean of -416 HU for CT" in text and "scribbles fingerprint -d Dataset007_Tiny" in text
    assert call(["scribbles", "fingerprint", "-d", "7"])[0] == 0
    code, text, _ = call(["doctor", "-d", "7"])
    assert code == 0 and "HU" not in text


def test_what_it_is_not_for(paired: Scribbled, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    path = paired.dataset / "dataset.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["labels"]["ignore"]
    path.write_text(json.dumps(content), encoding="utf-8")
    code, _, error = call(["scribbles", "fingerprint", "-d", "7"])
    assert code == 4 and "no ignore label" in error
    assert call(["scribbles", "fingerprint", "-d", "8"])[0] == 4  # there is no data set 8
    monkeypatch.delenv("nnUNet_preprocessed")
    code, _, error = call(["scribbles", "fingerprint", "-d", "7"])
    assert code == 3 and "nnUNet_preprocessed is not set" in error


def test_data_sets_that_cannot_be_read(paired: Scribbled, call: Call) -> None:
    words = ["scribbles", "fingerprint", "-d", "7"]
    (paired.dataset / "labelsTr" / "b.nii.gz").unlink()
    code, _, error = call(words)
    assert code == 4 and "Cannot read case b" in error and "doctor -d Dataset007_Tiny" in error
    for path in (paired.dataset / "imagesTr").iterdir():
        path.unlink()
    code, _, error = call(words)
    assert code == 4 and "imagesTr holds no training image" in error
    (paired.dataset / "imagesTr").rmdir()
    assert call(words)[0] == 4
    content = json.loads((paired.dataset / "dataset.json").read_text(encoding="utf-8"))
    del content["labels"], content["file_ending"]
    (paired.dataset / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    code, _, error = call(words)
    assert code == 4 and "dataset.json lacks labels, file_ending" in error
