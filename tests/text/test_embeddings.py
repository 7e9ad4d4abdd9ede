from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.text import TextEmbeddings, output_names

MODALITIES, LABELS = ("CT", "MR"), ("background", "right_kidney", "left_kidney")


def made() -> TextEmbeddings:
    numbers = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    prompts = tuple(tuple(f"{label} in {modality}, größer" for label in LABELS) for modality in MODALITIES)
    return TextEmbeddings(numbers, MODALITIES, LABELS, "V3", "tiny/random", False, prompts, ("a note",))


def test_one_hot_is_the_identity() -> None:
    codes = TextEmbeddings.one_hot(MODALITIES, LABELS)
    assert torch.equal(codes.embeddings.reshape(6, 6), torch.eye(6))
    assert (codes.encoder, codes.template, codes.normalised, codes.dimension) == ("one_hot", None, True, 6)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_gives_back_what_was_saved(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"text{suffix}"
    made().save(path)
    found = TextEmbeddings.from_file(path, MODALITIES, LABELS)
    assert torch.equal(found.embeddings, made().embeddings)
    for name in ("modalities", "labels", "template", "encoder", "normalised", "prompts", "notes", "checksum"):
        assert getattr(found, name) == getattr(made(), name)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_no_template_stays_none(tmp_path: Path, suffix: str) -> None:
    codes = TextEmbeddings.one_hot(MODALITIES, LABELS)
    codes.save(tmp_path / f"text{suffix}")
    found = TextEmbeddings.from_file(tmp_path / f"text{suffix}", MODALITIES, LABELS)
    assert (found.template, found.prompts, found.checksum) == (None, (), codes.checksum)


def test_rows_come_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "text.npz"
    made().save(path)
    found = TextEmbeddings.from_file(path, ("MRI", "ct"), ("Left Kidney", "background"))
    for m, modality in enumerate((1, 0)):
        for c, label in enumerate((2, 0)):
            assert torch.equal(found.embeddings[m, c], made().embeddings[modality, label])
            assert found.prompts[m][c] == made().prompts[modality][label]
    assert found.labels == ("Left Kidney", "background")
    assert found.notes[-1] == "rows by another name: Left Kidney = 'left_kidney'"


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("what", ["number", "order"])
def test_a_changed_file_is_noticed(tmp_path: Path, suffix: str, what: str) -> None:
    path = tmp_path / f"text{suffix}"
    made().save(path)
    if suffix == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
        if what == "number":
            arrays["embeddings"][1, 2, 3] += 1e-3
        else:
            arrays["labels"] = arrays["labels"][[0, 2, 1]]
        np.savez(path, **arrays)
    else:
        content = path.read_bytes()
        if what == "number":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        else:
            path.write_bytes(
                content.replace(b'\\"right_kidney\\", \\"left_kidney\\"', b'\\"left_kidney\\", \\"right_kidney\\"')
            )
        assert path.read_bytes() != content
    with pytest.raises(DataProblem, match=r"was changed after it was written: checksum \w{12}, expected \w{12}"):
        TextEmbeddings.from_file(path, MODALITIES, LABELS)


@pytest.mark.parametrize("change", ["encoder", "template", "labels", "normalised", "embeddings"])
def test_the_checksum_covers_names_and_numbers(change: str) -> None:
    other = {
        "encoder": "x",
        "template": "V2",
        "labels": ("background", "left_kidney", "right_kidney"),
        "normalised": True,
        "embeddings": made().embeddings + 1e-6,
    }
    assert replace(made(), **{change: other[change]}).checksum != made().checksum  # type: ignore[arg-type]


# --- bare tensors ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """[4, 3] in float16, with its names beside it."""
    path = tmp_path / "features.pth"
    torch.save(torch.arange(12, dtype=torch.float16).reshape(4, 3), path)
    (tmp_path / "organ_names.txt").write_text("Spleen\nRight Kidney\nLeft Kidney\nArota\n", encoding="utf-8")
    return path


def test_a_tensor_without_modalities_serves_all(bare: Path) -> None:
    found = TextEmbeddings.from_file(
        bare, MODALITIES, ("background", "left_kidney", "spleen", "aorta"), words={"aorta": "Arota"}
    )
    expected = [[0, 0, 0], [6, 7, 8], [0, 1, 2], [9, 10, 11]]
    assert found.embeddings.tolist() == [expected, expected]
    assert found.notes == (
        "names of rows from organ_names.txt",
        "rows by another name: left_kidney = 'Left Kidney', spleen = 'Spleen', aorta = 'Arota'",
        "the file has no background: its embedding is zeros",
        "the file has no modalities: CT, MR share their embeddings",
    )


def test_normalise_leaves_zeros_alone(bare: Path) -> None:
    found = TextEmbeddings.from_file(bare, ("CT",), ("background", "left_kidney"), normalise=True)
    assert found.normalised
    torch.testing.assert_close(found.embeddings.norm(dim=2), torch.tensor([[0.0, 1.0]]))
    assert found.cosines()[0, 0].isnan().all()
    assert found.cosines()[0, 1, 0, 1].item() == pytest.approx(1)


def test_a_tensor_with_modalities_says_which(bare: Path) -> None:
    torch.save(torch.arange(24.0).reshape(2, 4, 3), bare)
    with pytest.raises(UsageError, match=r"shape \[2, 4, 3\], so 2 modalities, and does not say which"):
        TextEmbeddings.from_file(bare, MODALITIES, ("spleen",))
    found = TextEmbeddings.from_file(bare, MODALITIES, ("spleen",), file_modalities=["MR", "CT"])
    assert found.embeddings.tolist() == [[[12, 13, 14]], [[0, 1, 2]]]
    with pytest.raises(UsageError, match=r"no modality for 'PET' in .*which has MR, CT"):
        TextEmbeddings.from_file(bare, ("PET",), ("spleen",), file_modalities=["MR", "CT"])


def test_the_real_features(data_dir: Path) -> None:
    labels = output_names({"background": 0, "liver": 3, "right_kidney": 1, "left_kidney": 2, "gallbladder": 4})
    found = TextEmbeddings.from_file(data_dir / "text" / "txt_encoding.pth", MODALITIES, labels)
    stored = torch.load(data_dir / "text" / "txt_encoding.pth", map_location="cpu", weights_only=True).float()
    assert torch.equal(found.embeddings[1, 1:], stored[[1, 2, 5, 3]])
    # CLIP hardly tells the sides apart: closer than any other pair here
    cosines = found.cosines()[0, :, 0]
    assert cosines[1, 2].item() == pytest.approx(0.98945, abs=1e-4)
    assert cosines[1, 2] > max(cosines[1, 3], cosines[1, 4], cosines[2, 3], cosines[2, 4], cosines[3, 4]) + 0.05


# --- faults ----------------------------------------------------------------------------------------------------------


class _Malicious:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, (str(self.sentinel),)


def test_an_untrusted_file_is_not_executed(tmp_path: Path) -> None:
    sentinel, path = tmp_path / "executed", tmp_path / "features.pth"
    (tmp_path / "features.txt").write_text("liver\n", encoding="utf-8")
    for save in (torch.save, lambda value, to: to.write_bytes(pickle.dumps(value))):
        save(_Malicious(sentinel), path)
        with pytest.raises(DataProblem, match=r"holds more than tensors.*it was not read"):
            TextEmbeddings.from_file(path, ("CT",), ("liver",))
    np.savez(tmp_path / "x.npz", embeddings=np.array([_Malicious(sentinel)], dtype=object), allow_pickle=True)
    with pytest.raises(DataProblem):
        TextEmbeddings.from_file(tmp_path / "x.npz", ("CT",), ("liver",))
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"spleen": torch.zeros(3)}, r"holds a dict with spleen; expected one tensor"),
        (torch.zeros(4, 3, dtype=torch.int64), r"holds a tensor of torch\.int64"),
        (torch.zeros(4), r"has shape \[4\], expected \[C, E\] or \[M, C, E\]"),
        (torch.full((4, 3), torch.nan), r"embedding of 'spleen' in CT .* 3 of 3 values that are NaN or infinite"),
        (torch.ones(4, 3), r"'spleen' and 'left_kidney' have the same embedding in CT"),
    ],
)
def test_tensors_that_are_unfit(bare: Path, content: object, message: str) -> None:
    torch.save(content, bare)
    with pytest.raises(DataProblem, match=message):
        TextEmbeddings.from_file(bare, ("CT",), ("spleen", "left_kidney"))


@pytest.mark.parametrize("name", ["x.pth", "x.npz", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x80\x02" + b"x" * 100])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "x.txt").write_text("liver", encoding="utf-8")
    with pytest.raises(DataProblem, match=name):
        TextEmbeddings.from_file(tmp_path / name, ("CT",), ("liver",))


def test_files_of_others(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    np.savez(tmp_path / "x.npz", features=np.zeros((2, 3)))
    save_file({"features": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    for name in ("x.npz", "x.safetensors"):
        with pytest.raises(DataProblem, match=r"was not written by nnunet_multimodal: .*found features"):
            TextEmbeddings.from_file(tmp_path / name, ("CT",), ("liver",))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("Spleen\nLiver\n", r"has 4 rows, .*organ_names\.txt has 2 names"),
        ("Spleen\n\nLiver\nColon\n", r"line 2: empty name"),
        ("Spleen\nLiver\nSpleen\nColon\n", r"line 3: 'Spleen' was there before"),
    ],
)
def test_names_that_do_not_fit(bare: Path, names: str, message: str) -> None:
    (bare.parent / "organ_names.txt").write_text(names, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        TextEmbeddings.from_file(bare, ("CT",), ("spleen",))


def test_names_that_are_not_there(bare: Path) -> None:
    (bare.parent / "readme.txt").write_text("about", encoding="utf-8")
    with pytest.raises(UsageError, match=r"several could be its names: organ_names\.txt, readme\.txt.*--names FILE"):
        TextEmbeddings.from_file(bare, ("CT",), ("spleen",))
    found = TextEmbeddings.from_file(bare, ("CT",), ("spleen",), bare.parent / "organ_names.txt")
    assert found.embeddings.tolist() == [[[0, 1, 2]]]
    for text in bare.parent.glob("*.txt"):
        text.unlink()
    with pytest.raises(UsageError, match=r"none is beside it"):
        TextEmbeddings.from_file(bare, ("CT",), ("spleen",))


def test_the_dimension_is_checked(bare: Path) -> None:
    with pytest.raises(UsageError, match=r"found 3, expected 768"):
        TextEmbeddings.from_file(bare, ("CT",), ("spleen",), expected_dimension=768)


def test_shapes_and_names_have_to_agree() -> None:
    for changed in ({"labels": LABELS[:2]}, {"modalities": ("CT",)}, {"embeddings": made().embeddings[..., :0]}):
        with pytest.raises(DataProblem, match=r"must be \[\d, \d, 'E'\], found"):
            replace(made(), **changed)  # type: ignore[arg-type]
    with pytest.raises(DataProblem, match="distinct name for each label"):
        replace(made(), labels=("a", "b", "a"))
