"""nnUNetTrainerSegVol: its questions, its settings, its texts, SegVol's weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import SMALL, log_of, make_trainer, tiny_plans

from nnunet_multimodal import trainers
from nnunet_multimodal.data.prompt_sampling import COMBINATIONS
from nnunet_multimodal.errors import DataProblem, EnvironmentProblem, UsageError
from nnunet_multimodal.networks.segvol import NEGATIVE, POSITIVE, Prompts, SegVolNetwork
from nnunet_multimodal.text import FILE_NAME, TextEmbeddings
from nnunet_multimodal.trainers.segvol import nnUNetTrainerSegVol
from nnunet_multimodal.trainers.segvol_weights import load_segvol_weights

NAME = "nnUNetTrainerSegVol"


@pytest.fixture(autouse=True)
def _folders(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    yield


def make(**settings: Any) -> nnUNetTrainerSegVol:
    trainer = make_trainer(NAME, 3, **settings)
    assert isinstance(trainer, nnUNetTrainerSegVol)
    return trainer


def labels(*present: int) -> torch.Tensor:
    """[B, 1, 4, 16, 16]: image b has a block of organ present[b]; 0 for none."""
    target = torch.zeros(len(present), 1, 4, 16, 16, dtype=torch.int16)
    for image, label in enumerate(present):
        target[image, 0, 1:3, 4:12, 5:9] = label
    return target


# --- questions -------------------------------------------------------------------------------------------------------


def kinds_of(question: Prompts) -> tuple[str, ...]:
    parts = (("text", question.text), ("points", question.points), ("box", question.boxes))
    return tuple(kind for kind, part in parts if part is not None)


def test_every_combination_is_asked_about_what_is_there() -> None:
    trainer = make(absent_share=0.0)
    target = labels(1, 2)
    np.random.seed(0)
    questions, masks, labelled = trainer.ask(target)
    assert tuple(map(kinds_of, questions)) == COMBINATIONS and labelled is None
    for question, mask in zip(questions, masks):
        assert question.image.tolist() == [0, 1]
        assert torch.equal(mask, target > 0)
        if question.text is not None:
            assert question.text.tolist() == [0, 1]
        if question.points is not None and question.labels is not None:
            for row in range(2):
                at = question.points[row].long().T
                values = mask[row, 0][tuple(at)]
                assert values[question.labels[row] == POSITIVE].all()
                assert not values[question.labels[row] == NEGATIVE].any()
                assert (question.labels[row] == POSITIVE).any()
        if question.boxes is not None:
            low, high = question.boxes[:, 0], question.boxes[:, 1]
            assert (low <= torch.tensor([1, 4, 5])).all() and (high >= torch.tensor([2, 11, 8])).all()
            assert (low >= 0).all() and (high < torch.tensor([4, 16, 16])).all()


def test_what_is_not_there_is_asked_for_by_text_alone() -> None:
    trainer = make(absent_share=0.5)
    absent = present = 0
    for seed in range(40):
        np.random.seed(seed)
        questions, masks, _ = trainer.ask(labels(1, 0))
        for question, mask in zip(questions, masks):
            if kinds_of(question) == ("text",):
                assert question.image.tolist() == [0, 1] and question.text is not None
                there = mask.flatten(1).any(1).tolist()
                assert there == [int(question.text[0]) == 0, False]
                absent, present = absent + (not there[0]), present + there[0]
            else:
                assert question.image.tolist() == [0] and mask.any()
    assert absent > 8 and present > 8


def test_a_batch_without_organs_is_asked_by_text() -> None:
    trainer = make(combinations_per_step=1)
    for seed in range(10):
        np.random.seed(seed)
        questions, masks, _ = trainer.ask(labels(0, 0))
        assert [kinds_of(question) for question in questions] == [("text",)] and not masks[0].any()


def test_so_many_organs_and_combinations_as_was_said() -> None:
    trainer = make(organs_per_image=3, combinations_per_step=2, absent_share=0.0)
    seen = set()
    for seed in range(30):
        np.random.seed(seed)
        questions, _, _ = trainer.ask(labels(1, 2))
        assert len(questions) == 2 and all(question.image.tolist() == [0, 0, 0, 1, 1, 1] for question in questions)
        seen |= {kinds_of(question) for question in questions}
    assert seen == set(COMBINATIONS)


def test_numpys_generator_decides() -> None:
    trainer = make()
    asked = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        questions, _, _ = trainer.ask(labels(1, 2))
        asked.append(next(question.points for question in questions if question.points is not None))
    assert torch.equal(asked[0], asked[1]) and not torch.equal(asked[0], asked[2])


def test_what_nobody_labelled_is_not_learned() -> None:
    trainer = make_trainer(NAME, 3, ignore=True)
    assert isinstance(trainer, nnUNetTrainerSegVol)
    target = labels(1, 2)
    target[:, :, 3] = 3
    _, masks, labelled = trainer.ask(target)
    assert labelled is not None and torch.equal(labelled, target != 3)
    assert not masks[0][target == 3].any()


def test_no_negative_point_where_nobody_labelled() -> None:
    """What is ignored there may be the organ."""
    trainer = make_trainer(NAME, 3, ignore=True)
    assert isinstance(trainer, nnUNetTrainerSegVol)
    target = labels(1, 2)
    target[1, :, :, :8] = 3
    np.random.seed(0)
    negative = 0
    for _ in range(5):
        for question in trainer.ask(target)[0]:
            for row, image in enumerate(question.image.tolist() if question.points is not None else []):
                assert question.points is not None and question.labels is not None
                at = question.points[row][question.labels[row] == NEGATIVE].long().T
                assert not (target[image, 0][tuple(at)] == 3).any()
                negative += at.shape[1]
    assert negative > 50


def test_a_fresh_loss_falls_on_one_batch() -> None:
    """Forty steps on the same images: asked in all ways, the loss falls by a fifth at least."""
    trainer = make(initial_lr=5e-3, warmup_epochs=0, num_epochs=1000)
    trainer.on_train_start()
    torch.manual_seed(0)
    batch = {"data": torch.randn(2, 1, 4, 16, 16), "target": labels(1, 2), "keys": ["a", "b"]}
    batch["data"] += 3 * (batch["target"] > 0)
    losses = []
    for step in range(40):
        np.random.seed(step % 3)
        losses.append(float(trainer.train_step(batch)["loss"]))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3]), losses


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"vit_patch": [3, 4, 4]},
            r"vit_patch \[3, 4, 4\] .* does not divide the plans' patch size \[4, 16, 16\].*4, 4 or 8",
        ),
        ({"vit_patch": [4, 4]}, "does not divide"),
        ({"vit_patch": [4, 4, 0]}, "does not divide"),
        ({"vit_width": 20}, "vit_width 20 .* divisible by 8 and by vit_heads"),
        ({"vit_heads": 3}, r"by vit_heads \(3\)"),
        ({"decoder_heads": 3}, r"decoder_heads \(3\)"),
        ({"vit_layers": 0}, "vit_layers 0 .* expected 1 or more"),
        ({"combinations_per_step": 7}, "expected 1 to 6"),
        ({"absent_share": 1.5}, "expected a share from 0 to 1"),
        ({"negative_points": -1}, "expected 0 or more"),
        ({"segvol_weights": "a.pth", "starting_model": "b.pth"}, "starts from one of them"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**settings)


def test_it_is_three_dimensional_and_needs_labels() -> None:
    with pytest.raises(UsageError, match="three-dimensional: train 3d_fullres or 3d_lowres, not 2d"):
        make_trainer(NAME, 2)
    with pytest.raises(DataProblem, match="has regions"):
        make_trainer(NAME, 3, organs={"whole": [1, 2], "core": [2]})  # type: ignore[dict-item]
    with pytest.raises(DataProblem, match="no label but background"):
        make_trainer(NAME, 3, organs={})


def test_the_patch_is_derived_and_kept_for_prediction() -> None:
    trainer = make()
    section = trainer.plans_manager.plans["configurations"]["3d_fullres"]["nnunet_multimodal"]
    assert section["vit_patch"] == [4, 4, 4] and section["organs"] == ["liver", "spleen"]
    assert make(vit_patch=[2, 8, 8]).settings["vit_patch"] == [2, 8, 8]


def test_a_training_goes_on_where_it_was_and_not_with_another_network() -> None:
    trainer = make()
    trainer.on_train_start()
    trainer.train_step(next(trainer.dataloader_train))
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.current_epoch = 3
    trainer.save_checkpoint(str(path))
    again = make()
    again.initialize()
    again.load_checkpoint(str(path))
    assert again.current_epoch == 4
    expected = trainer.bare_network().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.bare_network().state_dict().items())
    other = make(vit_layers=2)
    other.initialize()
    with pytest.raises(UsageError, match="was trained with vit_layers 1; now it is 2"):
        other.load_checkpoint(str(path))


def test_some_training_cases_are_whole_and_none_in_validation() -> None:
    trainer = make(whole_share=1.0)
    trainer.dataset_class = None
    trainer.initialize()
    trainer.get_dataloaders()
    train, validation = trainer.get_tr_and_val_datasets()
    assert train.load_case(train.identifiers[0])[0].shape[1:] == (4, 16, 16)
    assert validation.load_case(validation.identifiers[0])[0].shape[1:] == (6, 20, 18)


# --- texts -----------------------------------------------------------------------------------------------------------


def test_without_a_file_each_organ_has_a_code_of_its_own() -> None:
    trainer = make()
    trainer.initialize()
    network = trainer.bare_network()
    assert isinstance(network, SegVolNetwork)
    assert torch.equal(network.text_embeddings, torch.eye(2)) and trainer.settings["text_dimension"] == 2


def test_the_file_of_embed_is_found_by_name_and_its_modalities_averaged(nnunet_folders: dict[str, str]) -> None:
    folder = Path(nnunet_folders["nnUNet_preprocessed"]) / "Dataset601_Tiny"
    folder.mkdir(exist_ok=True)
    rows = torch.randn(2, 3, 5)
    TextEmbeddings(rows, ("CT", "MR"), ("background", "spleen", "liver"), "V3", "made-up", False).save(
        folder / FILE_NAME
    )
    trainer = make()
    trainer.initialize()
    network = trainer.bare_network()
    assert isinstance(network, SegVolNetwork)
    torch.testing.assert_close(network.text_embeddings, rows.mean(0)[[2, 1]])
    assert "the mean of the texts of CT, MR" in log_of(trainer)
    TextEmbeddings(rows, ("CT", "MR"), ("a", "spleen", "b"), "V3", "made-up", False).save(folder / "other.npz")
    with pytest.raises(UsageError, match="no embedding for 'liver'"):
        make(text="other.npz")
    with pytest.raises(EnvironmentProblem, match=r"text embeddings .*none\.npz not found"):
        make(text="none.npz")


# --- SegVol's weights ------------------------------------------------------------------------------------------------


def public_weights(width: int = 16, layers: int = 1, tokens: int = 16, window: tuple[int, ...] = (2, 8, 8)) -> dict:
    """Names as in BAAI-DCAI/SegVol's SegVol_v1.pth; sizes ours, numbers by chance."""
    shapes: dict[str, tuple[int, ...]] = {
        "image_encoder.patch_embedding.position_embeddings": (1, tokens, width),
        "image_encoder.patch_embedding.patch_embeddings.1.weight": (width, 64),
        "image_encoder.patch_embedding.patch_embeddings.1.bias": (width,),
        "image_encoder.norm.weight": (width,),
        "image_encoder.norm.bias": (width,),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (3, width // 2),
        **{f"prompt_encoder.point_embeddings.{i}.weight": (1, width) for i in range(4)},
        "prompt_encoder.not_a_point_embed.weight": (1, width),
        "prompt_encoder.no_mask_embed.weight": (1, width),
        "prompt_encoder.mask_downscaling.0.weight": (4, 1, 2, 2),  # never used, and not ours
        "mask_decoder.iou_token.weight": (1, width),
        "mask_decoder.mask_tokens.weight": (4, width),
        "mask_decoder.output_upscaling.0.weight": (width, width // 4, 2, 2, 2),
        "mask_decoder.output_upscaling.0.bias": (width // 4,),
        "mask_decoder.output_upscaling.1.weight": (width // 4, *window),
        "mask_decoder.output_upscaling.1.bias": (width // 4, *window),
        "mask_decoder.output_upscaling.3.weight": (width // 4, width // 8, 2, 2, 2),
        "mask_decoder.output_upscaling.3.bias": (width // 8,),
        "mask_decoder.iou_prediction_head.layers.0.weight": (256, width),  # never trained, and not ours
        "mask_decoder.txt_align_upscaled_embedding.weight": (width // 8, width),
        "mask_decoder.txt_align_upscaled_embedding.bias": (width // 8,),
        "text_encoder.clip_text_model.text_model.final_layer_norm.weight": (512,),  # CLIP's
        "text_encoder.dim_align.weight": (width, 512),
    }
    for layer in range(layers):
        block = f"image_encoder.blocks.{layer}"
        shapes |= {
            f"{block}.mlp.linear1.weight": (16, width),
            f"{block}.mlp.linear1.bias": (16,),
            f"{block}.mlp.linear2.weight": (width, 16),
            f"{block}.mlp.linear2.bias": (width,),
            f"{block}.attn.qkv.weight": (3 * width, width),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            **{f"{block}.norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")},
        }
    for number in range(4):
        for layer, rows in enumerate((width, width, width // 8)):
            shapes[f"mask_decoder.output_hypernetworks_mlps.{number}.layers.{layer}.weight"] = (rows, width)
            shapes[f"mask_decoder.output_hypernetworks_mlps.{number}.layers.{layer}.bias"] = (rows,)
    attention = "mask_decoder.transformer.layers.0.self_attn"
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{attention}.{part}.weight": (width, width), f"{attention}.{part}.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


SKIPPED = 1 + 1 + 1 + 1 + 3 * 6  # masks, IoU, CLIP, its projection (512 in, ours 2), three hyper-networks


@pytest.mark.parametrize(("container", "prefix"), [("model", "module."), (None, "model."), ("state_dict", "")])
def test_segvols_weights_load_by_name(tmp_path: Path, container: str | None, prefix: str) -> None:
    weights = public_weights()
    content: Any = {prefix + name: value for name, value in weights.items()}
    if container:
        content = {container: content, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}}
    torch.save(content, tmp_path / "SegVol_v1.pth")
    trainer = make(as_segvol=True, segvol_weights=str(tmp_path / "SegVol_v1.pth"))
    trainer.on_train_start()
    own = trainer.bare_network().state_dict()
    loaded = [name for name in weights if name in own and own[name].shape == weights[name].shape]
    assert len(loaded) == len(weights) - SKIPPED
    assert all(torch.equal(own[name], weights[name]) for name in loaded)
    said = re.search(
        r"SegVol's weights \(SegVol_v1.pth\): (\d+) tensors loaded, (\d+) new, (\d+) skipped", log_of(trainer)
    )
    assert said is not None
    assert [int(number) for number in said.groups()] == [len(loaded), len(own) - len(loaded), SKIPPED]
    assert torch.equal(own["text_embeddings"], torch.eye(2)) and "WARNING" not in log_of(trainer)


def test_without_as_segvol_the_fixed_norm_stays_new_and_a_warning_says_why(tmp_path: Path) -> None:
    torch.save({"model": public_weights()}, tmp_path / "a.pth")
    trainer = make(segvol_weights=str(tmp_path / "a.pth"))
    trainer.on_train_start()
    assert f"{SKIPPED + 2} skipped" in log_of(trainer) and "set as_segvol to true" in log_of(trainer)


def test_a_pretrained_vision_transformer_alone(tmp_path: Path) -> None:
    encoder = {
        name.replace("image_encoder.", "model.encoder."): value
        for name, value in public_weights().items()
        if name.startswith("image_encoder.")
    }
    torch.save({"state_dict": encoder}, tmp_path / "vit.pth")
    network = SegVolNetwork((4, 16, 16), (4, 4, 4), 2, 2, 1, 16, 1, 2, 16, 1, 2, 16)
    assert f"{len(encoder)} tensors loaded" in load_segvol_weights(tmp_path / "vit.pth", network)


class Runs:
    """What a checkpoint from a stranger can hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_file_that_runs_code_is_not_read(tmp_path: Path) -> None:
    torch.save({"model": public_weights(), "more": Runs(tmp_path / "was_here")}, tmp_path / "evil.pth")
    network = SegVolNetwork((4, 16, 16), (4, 4, 4), 2, 2, 1, 16, 1, 2, 16, 1, 2, 16)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(DataProblem, match="could run foreign code; it was not read"):
        load_segvol_weights(tmp_path / "evil.pth", network)
    assert not (tmp_path / "was_here").exists()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "was_here").exists()  # it would have


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, EnvironmentProblem, "not found. Download SegVol_v1.pth"),
        (b"PK\x03\x04 not a zip", DataProblem, "cannot be read"),
        ([torch.zeros(3)], DataProblem, "holds a list"),
        (
            {"model": {"conv.weight": torch.zeros(3)}},
            DataProblem,
            "nothing fits this network, found no tensor of SegVol",
        ),
        ({"image_encoder.norm.weight": torch.zeros(24)}, DataProblem, r"found image_encoder.norm.weight \[24\]"),
    ],
)
def test_files_that_hold_nothing_of_use(tmp_path: Path, content: Any, error: type[Exception], message: str) -> None:
    path = tmp_path / "a.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    network = SegVolNetwork((4, 16, 16), (4, 4, 4), 2, 2, 1, 16, 1, 2, 16, 1, 2, 16)
    with pytest.raises(error, match=message):
        load_segvol_weights(path, network)


def test_safetensors_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = public_weights()
    save_file(weights, tmp_path / "model.safetensors")
    network = SegVolNetwork((4, 16, 16), (4, 4, 4), 2, 2, 1, 16, 1, 2, 16, 1, 2, 16, as_segvol=True)
    assert f"{len(weights) - SKIPPED} tensors loaded" in load_segvol_weights(tmp_path / "model.safetensors", network)


def test_the_network_of_the_plans_is_the_predictors() -> None:
    """What build_network_architecture gives from plans.json alone has the same parameters, and settings are JSON."""
    trainer = make()
    trainer.initialize()
    plans = json.loads(json.dumps(trainer.plans_manager.plans))
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    network = trainers.nnUNetTrainerSegVol.build_network_architecture(
        manager, manager.get_configuration("3d_fullres"), 1, 3, enable_deep_supervision=False
    )
    network.load_state_dict(trainer.network.state_dict(), strict=True)
    assert tiny_plans(3, 1)["configurations"]["3d_fullres"]["patch_size"] == list(network.window)
    assert SMALL["vit_width"] == network.prompt_encoder.width
