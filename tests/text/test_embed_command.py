from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_clip
import torch

from nnunet_multimodal import cli
from nnunet_multimodal.text import FILE_NAME, TextEmbeddings

LABELS = ("background", "right_kidney", "left_kidney", "gallbladder")


@pytest.fixture
def folder(nnunet_folders: dict[str, str]) -> Path:
    """The preprocessed folder of a raw data set that was not preprocessed yet."""
    tiny_clip.write_dataset(Path(nnunet_folders["nnUNet_raw"]))
    return Path(nnunet_folders["nnUNet_preprocessed"]) / "Dataset602_Abdomen"


@pytest.fixture
def features(tmp_path: Path) -> Path:
    path = tmp_path / "features.pth"
    torch.save(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).half(), path)
    (tmp_path / "features.txt").write_text("Left Kidney\nRight Kidney\nGall Bladder\nArota\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.make(tmp_path_factory.mktemp("clip") / "tiny")


def run(*words: Any) -> int:
    return cli.main(["embed", *map(str, words)])


def test_one_hot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(602, "--one-hot") == 0
    output = capsys.readouterr().out
    assert "one_hot, 2 modalities x 4 classes x 8" in output
    assert "every code is at a right angle" in output
    found = TextEmbeddings.from_file(folder / FILE_NAME, ("CT", "MR"), LABELS)
    assert torch.equal(found.embeddings.reshape(8, 8), torch.eye(8))
    with np.load(folder / FILE_NAME, allow_pickle=False) as file:  # plain enough for numpy alone
        assert file["labels"].tolist() == [*LABELS]
        assert file["modalities"].tolist() == ["CT", "MR"]


def test_text_of_a_local_model(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Dataset602_Abdomen", "--encoder", f"local-dir:{model}", "--words", "gallbladder=gall bladder") == 0
    output = capsys.readouterr().out
    assert "A magnetic resonance imaging of a gall bladder.\n" in output
    assert "A computed tomography imaging of a right kidney.\n" in output
    assert "closest of 6 pairs of classes" in output
    assert re.search(r"same class in CT and MR: -?\d\.\d{3} \(", output)
    assert "next:\n  nnUNetv2_plan_and_preprocess -d 602 --verify_dataset_integrity\n" in output
    assert output.endswith("  nnUNetv2_train 602 3d_fullres 0 -tr nnUNetTrainerMulModSeg\n")
    found = TextEmbeddings.from_file(folder / FILE_NAME, ("CT", "MR"), LABELS)
    prompts = [f"A {words} imaging of a right kidney." for words in ("computed tomography", "magnetic resonance")]
    torch.testing.assert_close(found.embeddings[:, 1], tiny_clip.by_hand(model, prompts))


def test_features_of_others_as_json(folder: Path, features: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(602, "--from-file", features, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["labels"] == [*LABELS]
    assert content["dimension"] == 8
    assert content["notes"][-1] == "the file has no modalities: CT, MR share their embeddings"
    assert len(content["pairs"]) == 3  # a background of zeros has no angle
    values = torch.load(features, weights_only=True).double()
    closest = content["pairs"][0]
    rows = {"left_kidney": 0, "right_kidney": 1, "gallbladder": 2}
    expected = torch.cosine_similarity(*(values[rows[label]] for label in closest["labels"]), dim=0)
    assert closest["cosine"]["CT"] == pytest.approx(expected.item())
    assert content["same_organ_between_modalities"][0]["lowest"] == pytest.approx(1)


def test_a_saved_file_goes_to_another_computer(folder: Path, features: Path, tmp_path: Path) -> None:
    assert run(602, "--from-file", features, "-o", tmp_path / "out" / "text.safetensors") == 0
    assert not folder.exists()
    assert run(602, "--from-file", tmp_path / "out" / "text.safetensors") == 0
    one, two = (
        TextEmbeddings.from_file(path, ("CT", "MR"), LABELS)
        for path in (tmp_path / "out" / "text.safetensors", folder / FILE_NAME)
    )
    assert one.checksum == two.checksum


def test_the_preprocessed_data_set_goes_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels are those that training uses, and the next command is one that the plans know."""
    tiny_clip.write_dataset(folder.parent, {"background": 0, "whole": [1, 2], "core": [2]}, ("T1w", "T2w", "CT"))
    (folder / "nnUNetPlans.json").write_text('{"configurations": {"2d": {}}}', encoding="utf-8")
    assert run("0602", "--one-hot", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["labels"] == ["whole", "core"]
    assert content["modalities"] == ["T1w", "T2w", "CT"]
    assert content["next"] == ["nnUNetv2_train 602 2d 0 -tr nnUNetTrainerMulModSeg"]


def test_a_file_is_not_replaced_by_accident(folder: Path, features: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(602, "--one-hot") == 0
    before = (folder / FILE_NAME).read_bytes()
    assert run(602, "--from-file", features) == 2
    assert "exists" in capsys.readouterr().err
    assert (folder / FILE_NAME).read_bytes() == before
    assert run(602, "--from-file", features, "--overwrite") == 0
    assert (folder / FILE_NAME).read_bytes() != before


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--template", "V9"], r"unknown template 'V9'"),
        (["--words", "gallbladder="], r"the prompt for 'gallbladder' is empty"),
        (["--words", "galbladder=bile"], r"no label or modality 'galbladder'\. Did you mean 'gallbladder'\?"),
        (["--words", "gallbladder"], r"expected NAME=TEXT"),
        (["--words", "MR=a", "MR=b"], r"--words has MR more than once"),
        (["--one-hot", "--template", "V1"], r"--template has no effect with --one-hot"),
        (["--names", "x.txt"], r"They belong to --from-file"),
        (["--one-hot", "--from-file", "x.npz"], r"take one"),
        (["--one-hot", "-o", "text.txt"], r"ends in \.npz or \.safetensors"),
        (["--from-file", "nowhere.npz"], r"nowhere\.npz does not exist"),
        (["--from-file", "dataset.csv"], r"is of no kind we read"),
        (
            ["--from-file", "FEATURES", "--words", "gallbladder=Gal Blader"],
            r"no embedding for 'Gal Blader' \(did you mean 'Gall Bladder'.*--words gallbladder='Gall Bladder'",
        ),
        (["--from-file", "FEATURES", "--words", "gallbladder= "], r"--words gallbladder= is empty"),
    ],
)
def test_wrong_usage(
    folder: Path, features: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(602, *(features if word == "FEATURES" else word for word in words)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nnunet_multimodal": {}}, r"has no modality table"),
        ({"labels": {"liver": 1}}, r'has no "background"'),
        ("{", r"is not valid JSON"),
        (None, r"dataset\.json does not exist"),
    ],
)
def test_data_sets_that_cannot_be_used(
    folder: Path, nnunet_folders: dict[str, str], capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    file = Path(nnunet_folders["nnUNet_raw"]) / folder.name / "dataset.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    if change is None:
        file.unlink()
    else:
        file.write_text(change if isinstance(change, str) else json.dumps(content | change), encoding="utf-8")
    assert run(602, "--one-hot") == 4
    assert re.search(message, capsys.readouterr().err)
    assert not folder.exists()


def test_no_such_data_set(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(603, "--one-hot") == 4
    assert "Data set 603 not found" in capsys.readouterr().err
    monkeypatch.delenv("nnUNet_preprocessed")
    assert run(602, "--one-hot") == 3
    assert "nnUNet_preprocessed is not set" in capsys.readouterr().err


def test_an_unknown_class_in_a_fresh_process(
    folder: Path, features: Path, nnunet_folders: dict[str, str], run_command: Any
) -> None:
    """faults.md 33"""
    (features.with_suffix(".txt")).write_text("Left Kidney\nRight Kidny\nGall Bladder\nArota\n", encoding="utf-8")
    done = run_command("embed", 602, "--from-file", features, env=nnunet_folders)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: no embedding for 'right_kidney' \(did you mean 'Right Kidny'\?\) in .*features\.pth, which has Left "
        r"Kidney, .*Say which row is meant: --words right_kidney='Right Kidny'\n",
        done.stderr,
    )
    assert not folder.exists()


def test_no_weights_and_no_network_in_a_fresh_process(
    folder: Path, nnunet_folders: dict[str, str], run_command: Any, tmp_path: Path
) -> None:
    """faults.md 34; how long it may take is in test_open_clip.py, where a busy machine's imports do not count."""
    offline = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path)}
    done = run_command("embed", 602, env={**nnunet_folders, **offline})
    assert done.returncode == 3
    assert re.fullmatch(
        r"error: weights of ViT-B-32/openai not found in .*hub, and cannot be downloaded: 127\.0\.0\.1:9 cannot be "
        r"reached .*--checkpoint FILE\. Or --from-file FILE .*, or --one-hot \(no text\)\.\n",
        done.stderr,
    )
    assert not folder.exists()


def test_without_open_clip(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert run(602) == 3
    message = r"open_clip is not installed.*pip install 'nnunet_multimodal\[text\]'.*--from-file FILE.*--one-hot"
    assert re.search(message, capsys.readouterr().err)
    assert not folder.exists()
