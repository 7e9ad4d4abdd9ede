"""``nnunet_multimodal adapt``: plans for another data set, merged models, adapter files, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_training import tiny_dataset, tiny_plans

from nnunet_multimodal import trainers
from nnunet_multimodal.cli import main
from nnunet_multimodal.networks.lora import LowRank
from nnunet_multimodal.networks.mixture import ModalityMixture

LORA, MOA = "nnUNetTrainerLoRA", "nnUNetTrainerMoA"
TARGET = "Dataset605_Target"
CPU = torch.device("cpu")
FEATURES = [32, 64, 128]  # enough for an adapter to be small beside it


@pytest.fixture(autouse=True)
def quiet(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("nnUNet_compile", "f")
    torch.manual_seed(0)
    yield


def save_model(
    trainer: Any, plans: dict[str, Any], dataset: dict[str, Any], fold: int | str = 0, settle: Any = None
) -> Path:
    """A result folder as a training leaves it; its path."""
    plans["continue_training"] = False
    made: Any = trainer(plans, "2d", fold, dataset, CPU)
    made.print_to_log_file = lambda *args, **kwargs: None
    data = Path(made.preprocessed_dataset_folder)
    data.mkdir(parents=True, exist_ok=True)
    (data / "case.b2nd").touch()  # the ending tells nnU-Net how the data are stored
    made.initialize()
    if settle is not None:
        settle(made)
    made.save_checkpoint(str(Path(made.output_folder) / "checkpoint_final.pth"))
    folder = Path(made.output_folder_base)
    (folder / "plans.json").write_text(json.dumps(made.plans_manager.plans), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return folder


def base_model(
    organs: dict[str, int] | None = None,
    channel: str = "CT_or_MR",
    scheme: str = "ZScoreNormalization",
    reader: str = "NibabelIOWithReorient",
    fold: int | str = 0,
    own: Any = None,
    **description: Any,
) -> Path:
    """A model of nnUNetTrainer; ``own`` changes its plans' configuration, ``description`` its dataset.json."""
    plans = tiny_plans(2, 1, {})
    del plans["configurations"]["2d"]["nnunet_multimodal"]
    plans["image_reader_writer"] = reader
    plans["configurations"]["2d"]["normalization_schemes"] = [scheme]
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = FEATURES
    plans["configurations"]["2d"] |= own or {}
    dataset = tiny_dataset(LORA, organs or {"liver": 1, "spleen": 2}) | {"channel_names": {"0": channel}} | description
    return save_model(nnUNetTrainer, plans, dataset, fold)


def target(organs: dict[str, int] | None = None, channel: str = "CT_or_MR", **more: Any) -> Path:
    """A data set without images: what is asked of it is its description."""
    folder = Path(os.environ["nnUNet_raw"], TARGET)
    folder.mkdir(exist_ok=True)
    dataset = tiny_dataset(LORA, organs or {"liver": 1, "spleen": 2}) | {"channel_names": {"0": channel}}
    (folder / "dataset.json").write_text(json.dumps(dataset | more), encoding="utf-8")
    return folder


def plans_of(name: str = "nnUNetPlansFrom601") -> Any:
    path = Path(os.environ["nnUNet_preprocessed"], TARGET, f"{name}.json")
    return json.loads(path.read_text(encoding="utf-8"))


def adapted_model(name: str, base: Path, fold: int | str = 0, *more: str) -> Path:
    """A result folder of this trainer by the command's plans, with factors as after a training."""
    target()
    assert main(["adapt", "--from", str(base), "-d", "605", "-tr", name, "--rank", "2", "--overwrite", *more]) == 0

    def learn(trainer: Any) -> None:
        from nnunet_multimodal.trainers.transfer import starting_model

        trainer._start_from(starting_model(Path(trainer.settings["starting_model"]), trainer.fold))
        with torch.no_grad():
            for module in trainer.network.modules():
                if isinstance(module, LowRank):
                    module.up.weight.normal_(std=0.3)  # type: ignore[operator, union-attr]

    dataset = json.loads(Path(os.environ["nnUNet_raw"], TARGET, "dataset.json").read_text(encoding="utf-8"))
    return save_model(getattr(trainers, name), plans_of(), dataset, fold, learn)


def logits(folder: Path, x: torch.Tensor, fold: str = "0", modality: int | None = None) -> torch.Tensor:
    """As nnUNetv2_predict loads the model."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_multimodal.environment import use_own_trainers

    use_own_trainers()
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), [fold])
    network = predictor.network.eval()
    if isinstance(network, ModalityMixture):
        network.tell(modality)
    with torch.no_grad():
        return network(x)


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    """What a refused command says; it has this exit code."""
    capsys.readouterr()
    assert main(["adapt", *arguments]) == code
    return capsys.readouterr().err


# --- plans ------------------------------------------------------------------------------------------------------------


def test_the_models_plans_for_the_data_set_and_what_to_type_next(capsys: pytest.CaptureFixture[str]) -> None:
    base, raw = base_model(), target({"spleen": 1, "liver": 2, "kidney": 3})
    assert main(["adapt", "--from", str(base), "-d", "605", "--rank", "4", "--classic-scale"]) == 0
    plans, before = plans_of(), json.loads((base / "plans.json").read_text(encoding="utf-8"))
    assert plans["dataset_name"] == TARGET and plans["plans_name"] == "nnUNetPlansFrom601"
    own, old = plans["configurations"]["2d"], before["configurations"]["2d"]
    assert own.pop("data_identifier") == "nnUNetPlansFrom601_2d" and old.pop("data_identifier")
    section = own.pop("nnunet_multimodal")
    assert section == {"starting_model": str(base.resolve()), "rank": 4, "rank_stabilised": False}
    assert own == old
    description = Path(os.environ["nnUNet_preprocessed"], TARGET, "dataset.json")
    assert description.read_bytes() == (raw / "dataset.json").read_bytes()
    said = capsys.readouterr().out
    assert "classes: 2 known to the model (spleen, liver); 1 new (kidney)" in said
    assert "to be trained: " in said and " % of " in said
    assert [line.removeprefix("Next:").strip() for line in said.splitlines()[-4:]] == [
        "nnUNetv2_extract_fingerprint -d 605",
        "nnUNetv2_preprocess -d 605 -plans_name nnUNetPlansFrom601 -c 2d",
        "nnUNetv2_train 605 2d 0 -tr nnUNetTrainerLoRA -p nnUNetPlansFrom601",
        "nnunet_multimodal predict -i IMAGES -o OUT -d 605 -c 2d -tr nnUNetTrainerLoRA -p nnUNetPlansFrom601",
    ]


def test_plans_are_not_overwritten_silently(capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model()
    target()
    words = ["--from", str(base), "-d", "605"]
    assert main(["adapt", *words]) == 0 and main(["adapt", *words]) == 0, "the same again is no harm"
    assert "exists and is different" in failed([*words, "--rank", "3"], capsys, 2)
    assert "rank" not in plans_of()["configurations"]["2d"]["nnunet_multimodal"]
    assert main(["adapt", *words, "--rank", "3", "--overwrite"]) == 0
    assert plans_of()["configurations"]["2d"]["nnunet_multimodal"]["rank"] == 3
    target({"liver": 1})
    assert "dataset.json differs" in failed([*words, "-p", "Other"], capsys, 2)


def test_a_ct_model_and_mr_images_have_each_their_normalisation(capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model(channel="CT", scheme="CTNormalization")
    words = ["--from", str(base), "-d", "605", "--overwrite"]
    target(channel="MR")
    assert main(["adapt", *words]) == 0
    assert plans_of()["configurations"]["2d"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert "cannot predict the model's own images any more" in capsys.readouterr().out
    assert main(["adapt", *words, "--normalisation", "base"]) == 0
    assert plans_of()["configurations"]["2d"]["normalization_schemes"] == ["CTNormalization"]
    assert "the model's is kept" in capsys.readouterr().out
    said = failed([*words, "-tr", MOA, "--base-modality", "CT", "--modality", "MR"], capsys, 4)
    assert "normalised as CT" in said and "nnUNetTrainerLoRA" in said
    target(channel="CT")
    assert main(["adapt", *words]) == 0
    assert "normalisation: CT, by the range in HU of Dataset601_Tiny" in capsys.readouterr().out


def test_a_range_in_hu_is_the_data_sets_own_where_the_model_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    """A model of MR, whose intensities say nothing about CT."""
    base = base_model(channel="MR")
    target(channel="CT")
    words = ["--from", str(base), "-d", "605"]
    said = failed(words, capsys, 2)
    assert "has not been measured yet. First: nnUNetv2_extract_fingerprint" in said and "--normalisation base" in said
    assert not Path(os.environ["nnUNet_preprocessed"], TARGET).exists()
    assert main(["adapt", *words, "-p", "Kept", "--normalisation", "base"]) == 0
    assert plans_of("Kept")["configurations"]["2d"]["normalization_schemes"] == ["ZScoreNormalization"]
    own = {"0": {"mean": 60.0, "std": 20.0, "percentile_00_5": -50.0, "percentile_99_5": 200.0}}
    path = Path(os.environ["nnUNet_preprocessed"], TARGET, "dataset_fingerprint.json")
    path.write_text(json.dumps({"foreground_intensity_properties_per_channel": own}), encoding="utf-8")
    assert main(["adapt", *words]) == 0
    plans = plans_of()
    assert plans["configurations"]["2d"]["normalization_schemes"] == ["CTNormalization"]
    assert plans["foreground_intensity_properties_per_channel"] == own


def test_of_a_cascade_the_first_stage_stands_alone() -> None:
    """Its plans have no second stage, which the validation at a training's end would look for."""
    target()
    assert main(["adapt", "--from", str(base_model(own={"next_stage": "3d_cascade_fullres"})), "-d", "605"]) == 0
    assert "next_stage" not in plans_of()["configurations"]["2d"]


def test_images_that_were_harmonised_and_others_that_were_not(capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model(nnunet_multimodal={"harmonise": "paper"})
    target()
    assert main(["adapt", "--from", str(base), "-d", "605"]) == 0
    assert "those of the model's images were harmonised, those of Dataset605_Target were not" in capsys.readouterr().err
    words = ["--from", str(base), "-d", "605", "-tr", MOA, "--base-modality", "CT", "--modality", "MR"]
    assert "A mixture prepares all its images alike" in failed(words, capsys, 4)
    target(nnunet_multimodal={"harmonise": "paper"})
    assert main(["adapt", *words, "--overwrite"]) == 0


def test_classes_that_a_mixture_cannot_answer_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model()
    words = ["--from", str(base), "-d", "605", "--overwrite"]
    moa = ["-tr", MOA, "--base-modality", "CT", "--modality", "MR"]
    target({"liver": 1})
    assert main(["adapt", *words]) == 0 and "lacks" not in capsys.readouterr().err
    assert main(["adapt", *words, *moa]) == 0
    assert "Dataset605_Target lacks spleen: the mixture does not answer with it" in capsys.readouterr().err
    target(labels={"background": 0, "both": [1, 2], "spleen": 2}, regions_class_order=[1, 2])
    assert main(["adapt", *words]) == 0
    said = failed([*words, *moa], capsys, 2)
    assert "the model answers with labels, Dataset605_Target has regions" in said


def test_a_mixture_is_told_what_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model()
    target()
    words = ["--from", str(base), "-d", "605", "-tr", f"{MOA}_5epochs"]
    assert "needs --base-modality" in failed(words, capsys, 2)
    assert "give --modality" in failed([*words, "--base-modality", "CT"], capsys, 2)
    assert "would change what" in failed([*words, "--base-modality", "CT", "--train-norm"], capsys, 2)
    assert main(["adapt", *words, "--base-modality", "CT", "--modality", "MR"]) == 0
    section = plans_of()["configurations"]["2d"]["nnunet_multimodal"]
    assert (section["base_modalities"], section["new_modality"]) == (["CT"], "MR")
    assert "makes one adapter" in failed(["--from", str(base), "-d", "605", "--modality", "MR"], capsys, 2)


def test_the_readers_axes(capsys: pytest.CaptureFixture[str]) -> None:
    target(overwrite_image_reader_writer="SimpleITKIO")
    assert main(["adapt", "--from", str(base_model()), "-d", "605"]) == 0
    assert plans_of()["image_reader_writer"] == "NibabelIOWithReorient"
    assert "reader: NibabelIOWithReorient, the model's" in capsys.readouterr().out
    words = ["--from", str(base_model(reader="SimpleITKIO")), "-d", "605", "--overwrite"]
    assert main(["adapt", *words]) == 0
    assert "does not turn images to the same axes" in capsys.readouterr().out
    target(file_ending=".png")
    base = base_model()
    assert main(["adapt", "--from", str(base), "-d", "605", "--overwrite"]) == 0
    assert "cannot read .png" in capsys.readouterr().err


def test_full_fine_tuning_and_other_trainers_get_what_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model()
    target()
    words = ["--from", str(base), "-d", "605", "--overwrite"]
    assert main(["adapt", *words, "-tr", "nnUNetTrainer"]) == 0
    checkpoint = base / "fold_0/checkpoint_final.pth"
    assert f"-tr nnUNetTrainer -p nnUNetPlansFrom601 -pretrained_weights {checkpoint}" in capsys.readouterr().out
    assert main(["adapt", *words, "-tr", "nnUNetTrainer_250epochs"]) == 0
    assert f"-tr nnUNetTrainer_250epochs -p nnUNetPlansFrom601 -pretrained_weights {checkpoint}" in (
        capsys.readouterr().out
    )
    assert "Unknown trainer 'nnUNetTrainer_fast'" in failed([*words, "-tr", "nnUNetTrainer_fast"], capsys, 2)
    assert main(["adapt", *words, "-tr", "nnUNetTrainerMRSegmentator", "--rank", "3"]) == 0
    assert plans_of()["configurations"]["2d"]["nnunet_multimodal"] == {"starting_model": str(base.resolve())}
    assert "Did you mean nnUNetTrainerLoRA" in failed([*words, "-tr", "nnUNetTrainerLORA"], capsys, 2)


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        ({"channel_names": {"0": "T1", "1": "T2"}}, "input channels found 2, expected 1", 4),
        ({"labels": {"liver": 1}}, "labels of Dataset605_Target cannot be read", 4),
    ],
)
def test_a_data_set_that_does_not_fit(
    change: dict[str, Any], message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    target(**change)
    assert message in failed(["--from", str(base_model()), "-d", "605"], capsys, code)
    assert not Path(os.environ["nnUNet_preprocessed"], TARGET).exists(), "nothing was written"


def test_a_channel_at_another_place_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Not only where both have the same channels."""
    two = {"normalization_schemes": ["ZScoreNormalization"] * 2, "use_mask_for_norm": [False] * 2}
    base = base_model(own=two, channel_names={"0": "T1", "1": "T2"})
    target(channel_names={"0": "T2", "1": "PD"})
    assert "has T2 at another place: T2, PD" in failed(["--from", str(base), "-d", "605"], capsys, 4)
    target(channel_names={"0": "PD", "1": "T2"})
    assert main(["adapt", "--from", str(base), "-d", "605"]) == 0


def test_no_class_in_common_is_likely_a_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    target({"Leber": 1})
    assert main(["adapt", "--from", str(base_model()), "-d", "605"]) == 0
    assert "Are names spelled differently?" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["zip", "checkpoint", "around", "nothing", "adapted", "other configuration", "empty"])
def test_what_is_no_model_to_start_from(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model()
    target()
    more: list[str] = []
    if what == "adapted":
        base = adapted_model(LORA, base)
    path = {
        "zip": tmp_path / "model.zip",
        "checkpoint": base / "fold_0/checkpoint_final.pth",
        "around": base.parent,
        "nothing": tmp_path / "nowhere",
    }.get(what, base)
    if what == "other configuration":
        more = ["-c", "3d_fullres"]
    if what == "empty":
        (base / "fold_0/checkpoint_final.pth").unlink()
    message, code = {
        "zip": ("nnUNetv2_install_pretrained_model_from_zip", 2),
        "checkpoint": (f"give the result folder with its plans.json, here {base}", 2),
        "around": (f"Did you mean {base}?", 2),
        "nothing": ("does not exist", 2),
        "adapted": ("adapt --merge", 2),
        "other configuration": ("was trained in 2d; adapt that", 2),
        "empty": ("no checkpoint in", 4),
    }[what]
    assert message in failed(["--from", str(path), "-d", "605", "-p", "New", *more], capsys, code)
    assert not Path(os.environ["nnUNet_preprocessed"], TARGET, "New.json").exists()


# --- faults 35 to 37 --------------------------------------------------------------------------------------------------


def test_a_truncated_checkpoint_is_replaced_by_the_next_best(capsys: pytest.CaptureFixture[str]) -> None:
    """Row 35, in both directions."""
    base = base_model()
    adapted = adapted_model(LORA, base)
    for folder in (base, adapted):
        final = folder / "fold_0/checkpoint_final.pth"
        whole = final.read_bytes()
        final.with_name("checkpoint_best.pth").write_bytes(whole)
        final.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert main(["adapt", "--from", str(base), "-d", "605", "-p", "New"]) == 0
    assert "checkpoint_final.pth is incomplete; using checkpoint_best.pth" in capsys.readouterr().out
    assert main(["adapt", "--merge", str(adapted), "-o", str(adapted.parent / "merged")]) == 0
    assert "checkpoint_final.pth is incomplete; using checkpoint_best.pth" in capsys.readouterr().out
    (adapted / "fold_0/checkpoint_best.pth").unlink()
    said = failed(["--merge", str(adapted), "-o", str(adapted.parent / "again")], capsys, 4)
    assert "is incomplete, and no other checkpoint" in said and not (adapted.parent / "again").exists()


def test_a_checkpoint_of_other_plans_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Row 36."""
    base = base_model()
    target()
    path = base / "fold_0/checkpoint_final.pth"
    content = torch.load(path, weights_only=False)
    content["init_args"]["plans"] = content["init_args"]["plans"] | {"plans_name": "Others"}
    torch.save(content, path)
    said = failed(["--from", str(base), "-d", "605"], capsys, 2)
    assert "was trained with -d Dataset601_Tiny -tr nnUNetTrainer -p Others -c 2d" in said
    adapted_model(LORA, base_model())
    adapted = Path(os.environ["nnUNet_results"], TARGET, f"{LORA}__nnUNetPlansFrom601__2d")
    moved = adapted.rename(adapted.with_name(f"{MOA}__nnUNetPlansFrom601__2d"))
    said = failed(["--merge", str(moved), "-o", str(moved.parent / "merged")], capsys, 2)
    assert f"was trained with -tr {LORA}" in said and f"its folder is for -tr {MOA}" in said
    moved.rename(adapted)
    plans = json.loads((adapted / "plans.json").read_text(encoding="utf-8"))
    plans["configurations"]["2d"]["nnunet_multimodal"]["rank"] = 3
    (adapted / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    said = failed(["--merge", str(adapted), "-o", str(adapted.parent / "merged")], capsys, 2)
    assert "does not fit the network of" in said and "size mismatch" in said
    assert "has no adapters" in failed(["--merge", str(base), "-o", str(base.parent / "merged")], capsys, 2)


class Touch:
    """What a checkpoint could hold that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_files_that_would_run_code_are_refused_and_do_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 37: a downloaded model, an adapted one, and an adapter file."""
    base = base_model()
    adapted = adapted_model(LORA, base)
    sentinel, evil = tmp_path / "touched", tmp_path / "evil.pt"
    for folder in (base, adapted):
        path = folder / "fold_0/checkpoint_final.pth"
        torch.save({**torch.load(path, weights_only=False), "extra": Touch(sentinel)}, path)
    torch.save({"format": "nnunet_multimodal adapter 1", "extra": Touch(sentinel)}, evil)
    for words in (
        ["--from", str(base), "-d", "605", "-p", "New"],
        ["--merge", str(adapted), "-o", str(tmp_path / "out")],
        ["--export", str(adapted), "-o", str(tmp_path / "out")],
        ["--merge", str(evil), "--from", str(base), "-o", str(tmp_path / "out")],
    ):
        said = failed(words, capsys, 4)
        assert "is refused: it holds more than weights and settings, and reading that could run code" in said
        assert not sentinel.exists() and not (tmp_path / "out").exists()
    torch.load(evil, weights_only=False)
    assert sentinel.exists(), "it would have"


def test_an_existing_model_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 37."""
    adapted = adapted_model(LORA, base_model())
    output, link, other = tmp_path / "merged", tmp_path / "link", tmp_path / "photos"
    words = ["--merge", str(adapted), "-o"]
    assert main(["adapt", *words, str(output)]) == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert "exists and is not empty" in failed([*words, str(output)], capsys, 4)
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert main(["adapt", *words, str(output), "--overwrite"]) == 0
    link.symlink_to(output)
    assert "is a link" in failed([*words, str(link), "--overwrite"], capsys, 4)
    other.mkdir()
    (other / "picture.jpg").touch()
    assert "no model that could be replaced: it holds picture.jpg" in failed(
        [*words, str(other), "--overwrite"], capsys, 4
    )
    assert (other / "picture.jpg").exists()
    for model in (adapted, adapted / "fold_0"):
        said = failed(["--merge", str(model), "-o", str(adapted), "--overwrite"], capsys, 2)
        assert "is the model that is read" in said and (adapted / "fold_0/checkpoint_final.pth").exists()
    file = tmp_path / "adapter.pt"
    assert main(["adapt", "--export", str(adapted), "-o", str(file)]) == 0
    assert "or --overwrite" in failed(["--export", str(adapted), "-o", str(file)], capsys, 4)


# --- results ----------------------------------------------------------------------------------------------------------


def test_a_merged_model_is_nnunets_own_and_answers_the_same(tmp_path: Path) -> None:
    base = base_model()
    adapted = adapted_model(LORA, base, 1)
    assert adapted_model(LORA, base, 0) == adapted
    output, x = tmp_path / "merged", torch.randn(1, 1, 16, 16)
    assert main(["adapt", "--merge", str(adapted), "-o", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == ["dataset.json", "fold_0", "fold_1", "plans.json"]
    for fold in ("0", "1"):
        checkpoint = torch.load(output / f"fold_{fold}/checkpoint_final.pth", weights_only=True)
        assert checkpoint["trainer_name"] == "nnUNetTrainer"
        torch.testing.assert_close(logits(output, x, fold), logits(adapted, x, fold), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits(output, x, fold), logits(base, x), atol=1e-2)
    file = tmp_path / "adapter.pt"
    assert main(["adapt", "--export", str(adapted / "fold_1"), "-o", str(file)]) == 0, "the fold that was named"
    assert torch.load(file, weights_only=True)["fold"] == 1
    plans = json.loads((output / "plans.json").read_text(encoding="utf-8"))
    assert "nnunet_multimodal" not in json.dumps(plans)
    target()
    assert main(["adapt", "--from", str(output), "-d", "605", "-p", "Again"]) == 0, "and can be adapted again"


@pytest.mark.parametrize(("modality", "index"), [("CT", 0), ("MR", 1), ("mr", 1), (None, 1)])
def test_of_a_mixture_one_modality_is_merged(tmp_path: Path, modality: str | None, index: int) -> None:
    base = base_model()
    adapted = adapted_model(MOA, base, 0, "--base-modality", "CT", "--modality", "MR")
    x, output = torch.randn(1, 1, 16, 16), tmp_path / "merged"
    words = ["adapt", "--merge", str(adapted), "-o", str(output)]
    assert main(words + ([] if modality is None else ["--modality", modality])) == 0
    torch.testing.assert_close(logits(output, x), logits(adapted, x, "0", index), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(output, x), logits(base, x)) == (index == 0)


def test_what_cannot_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model()
    learned = adapted_model(f"{MOA}_learned", base)
    words = ["-o", str(tmp_path / "merged")]
    assert "differ from image to image" in failed(["--merge", str(learned), *words], capsys, 2)
    file = tmp_path / "learned.pt"
    assert "neither merged nor exported" in failed(["--export", str(learned), "-o", str(file)], capsys, 2)
    assert not file.exists()
    lora = adapted_model(LORA, base)
    assert "Leave it out" in failed(["--merge", str(lora), "--modality", "MR", *words], capsys, 2)
    moa = adapted_model(MOA, base, 0, "--base-modality", "CT", "--modality", "MR")
    said = failed(["--merge", str(moa), "--modality", "PET", *words], capsys, 2)
    assert "does not know the modality 'PET'" in said
    assert "fold 3 was not trained" in failed(["--merge", str(lora), "-f", "3", *words], capsys, 2)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", [LORA, MOA])
def test_an_adapter_file_is_small_and_fits_its_model_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_model(fold=0)
    more = ("--base-modality", "CT", "--modality", "MR") if name == MOA else ()
    adapted = adapted_model(name, base, 0, *more)
    file, output, x = tmp_path / "adapter.pt", tmp_path / "merged", torch.randn(1, 1, 16, 16)
    assert main(["adapt", "--export", str(adapted), "-o", str(file)]) == 0
    weights = torch.load(base / "fold_0/checkpoint_final.pth", weights_only=False)["network_weights"]
    whole = sum({v.data_ptr(): v.numel() * v.element_size() for v in weights.values()}.values())
    content = torch.load(file, weights_only=True)
    tensors = sum(v.numel() * v.element_size() for v in content["tensors"].values())
    assert tensors < 0.05 * whole
    assert (content["settings"]["rank"], content["settings"]["alpha"]) == (2, 8.0)

    torch.manual_seed(7)
    base_model(fold=1)  # other weights: its file is found by its fingerprint
    assert main(["adapt", "--merge", str(file), "--from", str(base), "-o", str(output)]) == 0
    torch.testing.assert_close(logits(output, x), logits(adapted, x, "0", 1), atol=1e-5, rtol=1e-5)

    other = base / "fold_1"
    said = failed(["--merge", str(file), "--from", str(other), "-o", str(tmp_path / "wrong")], capsys, 2)
    assert "was learned for another model" in said and content["base_fingerprint"][:12] in said
    assert not (tmp_path / "wrong").exists()
    assert "with --from" in failed(["--merge", str(file), "-o", str(tmp_path / "wrong")], capsys, 2)


def test_a_file_that_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model()
    words = ["--from", str(base), "-o", str(tmp_path / "merged")]
    checkpoint = base / "fold_0/checkpoint_final.pth"
    assert "is no adapter file of this version" in failed(["--merge", str(checkpoint), *words], capsys, 4)
    half = tmp_path / "half.pt"
    half.write_bytes(checkpoint.read_bytes()[:1000])
    assert f"{half} cannot be read" in failed(["--merge", str(half), *words], capsys, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Give --from RESULT_FOLDER -d DATASET, --merge or --export"),
        (["--from", "A"], "--from needs -d"),
        (["--merge", "A"], "--merge needs -o"),
        (["--export", "A", "-o", "B", "-d", "605"], "-d belongs to --from"),
        (["--merge", "A", "--export", "A"], "not allowed with"),
        (["--from", "A", "-d", "605", "--rank", "0"], "expected 1, 2, 3"),
    ],
)
def test_wrong_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failed(words, capsys, 2)


def test_the_identity_of_a_mixture_at_stock_prediction() -> None:
    """Check 19, from the files: nobody says the modality, and the only trained one is assumed."""
    base = base_model()
    adapted = adapted_model(MOA, base, 0, "--base-modality", "CT", "--modality", "MR")
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(logits(adapted, x, "0", 0), logits(base, x))
    assert torch.equal(logits(adapted, x, "0", None), logits(adapted, x, "0", 1))
    assert np.abs((logits(adapted, x, "0", 1) - logits(base, x)).numpy()).max() > 0.01
