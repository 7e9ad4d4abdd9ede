from __future__ import annotations

import hashlib
import importlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tiny_clip
import torch
from huggingface_hub import constants

from nnunet_multimodal.errors import DataProblem, EnvironmentProblem, UsageError
from nnunet_multimodal.text import TextEmbeddings, clip, weights

MODALITIES, LABELS = ("CT", "MR"), ("background", "right_kidney")
PROMPTS = [
    "A computed tomography imaging of a background.",
    "A computed tomography imaging of a right kidney.",
    "A magnetic resonance imaging of a background.",
    "A magnetic resonance imaging of a right kidney.",
]
SECONDS = 8.0  # offline, where open_clip alone takes 47


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip.make(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights on this computer, and a hub that refuses connections."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "URL_CACHE", tmp_path / "clip")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    use_hub(monkeypatch, "http://127.0.0.1:9")


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags of the tiny model, as ViT-B-32 has them: openai's with QuickGELU, another without."""
    table = importlib.import_module("open_clip.pretrained")
    openai = {"hf_hub": "some/tiny.openai/", "url": "https://openaipublic.azureedge.net/x/tiny.pt", "quick_gelu": True}
    monkeypatch.setitem(table._PRETRAINED, tiny_clip.NAME, {"openai": openai, "laion": {"hf_hub": "some/tiny.laion/"}})


def test_features_are_open_clips(model: Path) -> None:
    found = TextEmbeddings.from_open_clip(MODALITIES, LABELS, tiny_clip.NAME, checkpoint=tiny_clip.weights_of(model))
    torch.testing.assert_close(found.embeddings.reshape(4, 16), tiny_clip.by_hand(model, PROMPTS))
    assert [prompt for row in found.prompts for prompt in row] == PROMPTS
    assert (found.encoder, found.template, found.normalised) == (
        f"{tiny_clip.NAME} (open_clip_model.safetensors)",
        "V3",
        False,
    )
    assert not torch.allclose(found.embeddings.norm(dim=2), torch.ones(2, 2), atol=0.01)


def test_normalised_features_are_open_clips(model: Path) -> None:
    found = TextEmbeddings.from_open_clip(
        MODALITIES, LABELS, tiny_clip.NAME, checkpoint=tiny_clip.weights_of(model), normalise=True
    )
    raw = tiny_clip.by_hand(model, PROMPTS)
    torch.testing.assert_close(found.embeddings.reshape(4, 16), torch.nn.functional.normalize(raw, dim=1))
    assert found.normalised


@pytest.mark.parametrize("tag", ["openai", "laion", None])
def test_the_activation_follows_the_weights(model: Path, own_weights: None, tag: str | None) -> None:
    found = TextEmbeddings.from_open_clip(
        MODALITIES, LABELS, tiny_clip.NAME, tag, checkpoint=tiny_clip.weights_of(model)
    )
    quick, plain = (tiny_clip.by_hand(model, PROMPTS, quick_gelu) for quick_gelu in (True, False))
    assert not torch.allclose(quick, plain, atol=1e-5)
    assert torch.equal(found.embeddings.reshape(4, 16), plain if tag == "laion" else quick)
    gelu = "GELU" if tag == "laion" else "QuickGELU"
    assert f"taken for weights like '{tag or 'openai'}' ({gelu})" in found.notes[0]


def test_a_model_folder(model: Path) -> None:
    found = TextEmbeddings.from_open_clip(MODALITIES, LABELS, f"local-dir:{model}", template="V1")
    expected = tiny_clip.by_hand(model, ["A photo of a background.", "A photo of a right kidney."])
    assert torch.equal(found.embeddings, torch.stack([expected, expected]))
    assert found.notes == ("the template names no modality: CT, MR share their embeddings",)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_openais_own_archive_only(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their clip package caches TorchScript, which torch runs as a program: read by its published digest only."""
    network = open_clip.create_model(tiny_clip.NAME, pretrained=str(tiny_clip.weights_of(model))).eval()
    del network._buffers["attn_mask"]  # theirs keeps it out of the state_dict
    archive = tmp_path / "tiny.pt"
    example = {"encode_image": torch.zeros(1, 3, 32, 32)}
    torch.jit.trace_module(network, example, check_trace=False).save(str(archive))
    make = partial(TextEmbeddings.from_open_clip, MODALITIES, LABELS, tiny_clip.NAME, checkpoint=archive)
    with pytest.raises(DataProblem, match=r"is a program \(TorchScript\) and none that OpenAI published"):
        make()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    published = clip._published_digests(open_clip)
    assert "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af" in published  # ViT-B-32.pt
    monkeypatch.setattr(clip, "_published_digests", lambda _: published | {digest})
    torch.testing.assert_close(make().embeddings.reshape(4, 16), tiny_clip.by_hand(model, PROMPTS))


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "ViT-B-23"}, r"unknown encoder 'ViT-B-23'\. Did you mean ViT-B-32"),
        ({"encoder": "biomedklip"}, r"Did you mean biomedclip\?"),
        ({"pretrained": "opanai"}, r"no weights 'opanai' for ViT-B-32; expected one of openai"),
        ({"encoder": tiny_clip.NAME}, r"expected --checkpoint FILE, open_clip has none"),
        ({"checkpoint": "nowhere.pt"}, r"nowhere\.pt does not exist"),
        ({"encoder": "hf-hub:tiny"}, r"expected hf-hub:ORG/NAME"),
        ({"encoder": "local-dir:nowhere"}, r"nowhere has no open_clip_config\.json"),
        ({"encoder": "biomedclip", "checkpoint": "x.pt"}, r"brings its own weights"),
    ],
)
def test_encoders_that_do_not_exist(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TextEmbeddings.from_open_clip(MODALITIES, LABELS, **options)


def test_checkpoints_that_are_unfit(model: Path, tmp_path: Path) -> None:
    make = partial(TextEmbeddings.from_open_clip, MODALITIES, LABELS, tiny_clip.NAME)
    file = tmp_path / "x.pt"
    for content, message in (
        ({"state_dict": {"a": torch.zeros(1)}}, r"Cannot load .*x\.pt as weights of .*[Mm]issing key"),
        ({"state_dict": Path("x")}, r"holds more than tensors.*it was not read"),
        ({}, r"Cannot load .*x\.pt as weights of"),
    ):
        torch.save(content, file)
        with pytest.raises(DataProblem, match=message):
            make(checkpoint=file)
    file.write_bytes(b"")
    with pytest.raises(DataProblem, match=r"Cannot load .*x\.pt"):
        make(checkpoint=file)


def test_a_folder_without_weights_does_not_stay_random(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "open_clip_config.json", tmp_path)
    with pytest.raises(DataProblem, match="could not be loaded"):
        TextEmbeddings.from_open_clip(MODALITIES, LABELS, f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("encoder", "repository", "by_hand"),
    [
        ("ViT-B-32", "timm/vit_base_patch32_clip_224.openai", r"download http://127\.0\.0\.1:9/timm/\S+ and give"),
        ("biomedclip", "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "--from-file"),
    ],
)
def test_a_hub_that_refuses(tmp_path: Path, encoder: str, repository: str, by_hand: str) -> None:
    started = time.monotonic()
    with pytest.raises(
        EnvironmentProblem, match=rf"not found in .*cannot be downloaded.*'hf download {repository}'.*{by_hand}"
    ):
        TextEmbeddings.from_open_clip(MODALITIES, LABELS, encoder)
    assert time.monotonic() - started < SECONDS
    assert not (tmp_path / "hub").exists()


def test_a_hub_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(
            EnvironmentProblem, match=r"127\.0\.0\.1:\d+ (does not answer within 0\.5 s|cannot be reached)"
        ):
            TextEmbeddings.from_open_clip(MODALITIES, LABELS)
        assert time.monotonic() - started < SECONDS


def test_switched_off_means_not_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentProblem, match="HF_HUB_OFFLINE is set"):
        TextEmbeddings.from_open_clip(MODALITIES, LABELS, "hf-hub:some/tiny")
    assert hub.asked == []


def test_models_of_transformers_need_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (model / "open_clip_config.json").read_text(encoding="utf-8")
    named = text.replace('"text_cfg": {', '"text_cfg": {"hf_model_name": "some/bert", ')
    (tmp_path / "open_clip_config.json").write_text(named, encoding="utf-8")
    monkeypatch.setattr(clip.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        EnvironmentProblem, match=r"transformers is not installed.*pip install 'nnunet_multimodal\[text\]'"
    ):
        TextEmbeddings.from_open_clip(MODALITIES, LABELS, f"local-dir:{tmp_path}")


# --- a hub on this computer ------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Serves ``folder`` as the repositories some/tiny and some/tiny.openai, the way Hugging Face does."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.asked: list[str] = []


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, with_content: bool) -> None:
        self.server.asked.append(self.path)
        repository, _, name = self.path.strip("/").partition("/resolve/main/")
        file = self.server.folder / name
        there = repository in ("some/tiny", "some/tiny.openai") and name and file.is_file()
        content = file.read_bytes() if there else b""
        self.send_response(200 if there else 404)
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("Content-Length", str(len(content)))
        if there:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(model) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        use_hub(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def test_weights_are_downloaded_once(hub: Hub, model: Path, own_weights: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for encoder, quick_gelu in ((tiny_clip.NAME, True), ("hf-hub:some/tiny", False)):
        first = TextEmbeddings.from_open_clip(MODALITIES, LABELS, encoder)
        torch.testing.assert_close(first.embeddings.reshape(4, 16), tiny_clip.by_hand(model, PROMPTS, quick_gelu))
        asked = len(hub.asked)
        assert asked > 0
        again = TextEmbeddings.from_open_clip(MODALITIES, LABELS, encoder)
        assert len(hub.asked) == asked  # nothing more was asked for
        assert again.checksum == first.checksum
        hub.asked.clear()
    assert constants.HF_HUB_OFFLINE is False


def test_a_repository_without_weights(hub: Hub, tmp_path: Path, model: Path) -> None:
    hub.folder = tmp_path
    shutil.copy(model / "open_clip_config.json", tmp_path)
    with pytest.raises(
        EnvironmentProblem, match=r"weights of some/tiny not found .*some/tiny has none of open_clip_model"
    ):
        TextEmbeddings.from_open_clip(MODALITIES, LABELS, "hf-hub:some/tiny")
