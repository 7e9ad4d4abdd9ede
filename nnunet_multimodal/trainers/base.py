"""What all our trainers share: settings from the plans, prompts kept out of intensities, nothing lost on a fault."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json, save_json
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from nnunet_multimodal.data.case_labels import KEY as CASE_LABELS
from nnunet_multimodal.data.case_labels import CaseLabels, has_case_labels
from nnunet_multimodal.data.modality import ModalityTable, first_names, has_table
from nnunet_multimodal.data.prompts import PromptsToImage, PromptsToSegmentation
from nnunet_multimodal.data.sides import sided_pairs
from nnunet_multimodal.data.splits import read_splits, stale_cases, stratified_splits
from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError
from nnunet_multimodal.registry import TRAINERS
from nnunet_multimodal.trainers.checkpoints import load_fitting, readable_checkpoint, write_whole
from nnunet_multimodal.trainers.settings import SECTION, fill_settings
from nnunet_multimodal.trainers.transfer import StartingModel, fit_by_name, names_of, starting_model

STOCK_INTENSITY = (
    GaussianNoiseTransform,
    GaussianBlurTransform,
    MultiplicativeBrightnessTransform,
    ContrastTransform,
    SimulateLowResolutionTransform,
    GammaTransform,
)


class TrainingStopped(MultimodalError):
    """Training cannot go on; what was saved before is good."""


class MultimodalTrainer(nnUNetTrainer):
    """nnU-Net's trainer with the plugin's contracts. A method's trainer overrides one hook per idea.

    ``settings_defaults`` holds every key of the plans' section ``nnunet_multimodal`` that the trainer knows, with its
    default; ``self.settings`` is what holds in this training.
    """

    fixed_epochs: ClassVar[int | None] = None  # set by a name such as ..._50epochs (trainers/__init__.py)
    settings_defaults: ClassVar[dict[str, Any]] = {
        "num_epochs": 1000,
        "num_iterations_per_epoch": 250,
        "num_val_iterations_per_epoch": 50,
        "initial_lr": 1e-2,
        "weight_decay": 3e-5,
        "save_every": 10,  # nnU-Net's 50 epochs are hours of work lost to a reboot
        "starting_model": None,  # checkpoint file or result folder whose fitting weights training starts from
    }

    deep_supervision: ClassVar[bool] = True
    fixed_settings: ClassVar[dict[str, Any]] = {}  # what makes an ablation one; wins over the plans
    own_weights: ClassVar[tuple[str, ...]] = ()  # beginnings of the names that a starting model must not bring
    settled_settings: ClassVar[tuple[str, ...]] = ()  # those that a checkpoint must agree with
    partial_labels: ClassVar[bool] = False  # whether cases may be annotated in part (data/case_labels.py)

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008, nnU-Net's signature, which it inspects
    ) -> None:
        self.settings = fill_settings(
            plans, configuration, self.settings_defaults, _all_settings(), self.fixed_settings
        )
        self.complete_settings(dataset_json, plans, configuration)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = self.settings["initial_lr"]
        self.weight_decay = self.settings["weight_decay"]
        self.num_epochs = self.fixed_epochs or self.settings["num_epochs"]
        self.num_iterations_per_epoch = self.settings["num_iterations_per_epoch"]
        self.num_val_iterations_per_epoch = self.settings["num_val_iterations_per_epoch"]
        self.save_every = self.settings["save_every"]
        self.enable_deep_supervision = self.deep_supervision
        self.step = 0  # training steps done in this epoch
        self.bar: tqdm | None = None
        self.check_dataset()
        if (
            not self.partial_labels
            and has_case_labels(dataset_json)
            and CaseLabels.from_dataset_json(dataset_json).partial
        ):
            raise DataProblem(
                f'{self.plans_manager.dataset_name} has "{CASE_LABELS}": not every class is annotated in every case. '
                f"{type(self).__name__} would learn that they are background there. Take nnUNetTrainerContextPrior"
                + ("." if has_table(dataset_json) else "_noModality: there is no modality table.")
            )

    def complete_settings(self, dataset_json: dict, plans: dict, configuration: str) -> None:
        """Writes into ``self.settings`` what prediction must know of the data set; called before nnU-Net starts."""

    def check_dataset(self) -> None:
        """Raises DataProblem where the data set is not what the method needs; the default needs nothing."""

    @property
    def channel_names(self) -> list[str]:
        """The input channels' names in order."""
        names = self.dataset_json["channel_names"]
        return [names[key] for key in sorted(names, key=int)]

    @property
    def prompt_channels(self) -> list[int]:
        """Channels that are no images: those nnU-Net is told not to normalise (contract 4)."""
        return [i for i, name in enumerate(self.channel_names) if name.casefold() == "nonorm"]

    # --- network -----------------------------------------------------------------------------------------------------

    def bare_network(self) -> torch.nn.Module:
        """The network without the wrappers of distributed training and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):  # is_ddp is true before nnU-Net wraps the network
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def on_train_start(self) -> None:
        """Loads the starting model, if any, then nnU-Net's own start, which replaces the result folder's plans."""
        self._require_same_folds()
        if not self.was_initialized:
            self.initialize()
        if self.settings["starting_model"] is not None and self.current_epoch == 0:
            self._start_from(starting_model(Path(self.settings["starting_model"]), self.fold))
        super().on_train_start()

    def _start_from(self, model: StartingModel) -> None:
        """Loads what fits, classes and channels by their names, and logs what was loaded, is new, and was skipped."""
        network = self.bare_network()
        weights = {key: value for key, value in model.weights.items() if not key.startswith(self.own_weights)}
        weights, lines = fit_by_name(weights, model.names, network.state_dict(), names_of(self.dataset_json))
        self.print_to_log_file("\n".join([*origin_of(model), load_fitting(network, weights), *lines]))

    # --- data --------------------------------------------------------------------------------------------------------

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """Stock, but without mirroring where labels have sides: it teaches that both kidneys are left (contract 8)."""
        rotation, dummy_2d, initial_patch, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        pairs = sided_pairs(list(self.dataset_json["labels"]))
        if pairs:
            self.print_to_log_file(f"no mirroring: labels have sides, {pairs[0][0]} and {pairs[0][1]}")
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch, mirror_axes

    def get_training_transforms(
        self,
        patch_size,
        rotation_for_DA,
        deep_supervision_scales,
        mirror_axes,
        do_dummy_2d_data_aug,
        use_mask_for_norm=None,
        is_cascaded=False,
        foreground_labels=None,
        regions=None,
        ignore_label=None,
    ) -> BasicTransform:
        """nnU-Net's training transforms, rearranged by ``arrange`` (a static method there; called the same way)."""
        stock = nnUNetTrainer.get_training_transforms(
            patch_size, rotation_for_DA, deep_supervision_scales, mirror_axes, do_dummy_2d_data_aug,
            use_mask_for_norm, is_cascaded, foreground_labels, regions, ignore_label,
        )  # fmt: skip
        return ComposeTransforms(self.arrange(keep_padding_unlabelled(stock.transforms, ignore_label)))

    def get_validation_transforms(
        self, deep_supervision_scales, is_cascaded=False, foreground_labels=None, regions=None, ignore_label=None
    ) -> BasicTransform:
        """nnU-Net's validation transforms; padding stays unlabelled."""
        stock = nnUNetTrainer.get_validation_transforms(
            deep_supervision_scales, is_cascaded, foreground_labels, regions, ignore_label
        )
        return ComposeTransforms(keep_padding_unlabelled(stock.transforms, ignore_label))

    def arrange(self, stock: list[BasicTransform]) -> list[BasicTransform]:
        """Prompts travel with the labels: same geometry, nearest values, out of reach of intensities (contract 7)."""
        if not self.prompt_channels:
            return self.replace_intensity(stock)
        at = after_labels(stock)
        return [
            PromptsToSegmentation(self.prompt_channels),
            *self.replace_intensity(stock[:at]),
            PromptsToImage(len(self.prompt_channels)),
            *stock[at:],
        ]

    def replace_intensity(self, stock: list[BasicTransform]) -> list[BasicTransform]:
        """Where a method has its own intensity transforms; the default keeps nnU-Net's."""
        return stock

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's folds; stratified where there is a modality table (contract 1), checked where there is a file.

        An existing splits_final.json is used as it is, if it still fits the cases (faults.md row 40).
        """
        splits_file = join(self.preprocessed_dataset_folder_base, "splits_final.json")
        if self.fold != "all":
            dataset = infer_dataset_class(self.preprocessed_dataset_folder)
            present = set(dataset.get_identifiers(self.preprocessed_dataset_folder))
            if isfile(splits_file):
                gone, new = stale_cases(read_splits(Path(splits_file)), present)
                if gone:
                    raise DataProblem(
                        f"{splits_file} names {len(gone)} cases that are not preprocessed: {first_names(gone)}. Run "
                        "nnUNetv2_preprocess, or delete the file: new splits are then made."
                    )
                if new:
                    self.print_to_log_file(
                        f"WARNING: {len(new)} cases are in no split and will not be used: {first_names(new)}. Add them "
                        f"to {splits_file}, or delete it: new splits are then made."
                    )
            elif has_table(self.dataset_json):
                where = join(self.preprocessed_dataset_folder_base, "dataset.json")
                table = self.table_of_folds(present, where)
                splits = stratified_splits(sorted(present), table)
                write_whole(Path(splits_file), lambda path: save_json(splits, path))
                self.print_to_log_file(f"new splits, stratified by modality: {splits_file}")
        return super().do_split()

    def table_of_folds(self, cases: set[str], where: str) -> ModalityTable:
        """The modality of every case, for folds in which each modality has its share.

        Raises:
            DataProblem: a case has none (faults.md row 32).
        """
        table = ModalityTable.from_dataset_json(self.dataset_json, where)
        table.require(cases, where)
        return table

    # --- one step and one epoch --------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Opens the epoch's progress bar (none where the output is no terminal)."""
        super().on_train_epoch_start()
        self.step = 0
        self.bar = tqdm(
            total=self.num_iterations_per_epoch,
            desc=f"epoch {self.current_epoch + 1}/{self.num_epochs}",
            unit="step",
            leave=False,
            disable=None if self.local_rank == 0 else True,
        )

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step, then a look at the loss: training on after a NaN only destroys what was learned.

        AMP's scaler forgives infinite gradients, which come from its scale; the loss itself it does not scale.
        """
        result = self.learn(batch)
        loss = float(result["loss"])
        if not np.isfinite(loss):
            self._stop_not_finite(loss, batch)
        self.step += 1
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self.bar.update()
        return result

    def learn(self, batch: dict) -> dict:
        """One step of the optimiser, ``{"loss": number, ...}``; nnU-Net's, where a method has none of its own."""
        return super().train_step(batch)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Closes the progress bar."""
        if self.bar is not None:
            self.bar.close()
        super().on_train_epoch_end(train_outputs)

    def _stop_not_finite(self, loss: float, batch: dict) -> None:
        if self.bar is not None:
            self.bar.close()
        saved = [n for n in ("checkpoint_latest.pth", "checkpoint_best.pth") if isfile(join(self.output_folder, n))]
        rates = ", ".join(f"{group['lr']:.3g}" for group in self.optimizer.param_groups)
        message = (
            f"loss is {loss} at epoch {self.current_epoch} step {self.step}; cases {[str(k) for k in batch['keys']]}; "
            f"learning rate {rates}. "
            + (f"Last good checkpoint: {join(self.output_folder, saved[0])}. " if saved else "No checkpoint yet. ")
            + "Look at these cases (nnunet_multimodal doctor -d DATASET) or lower initial_lr in the plans' section "
            "nnunet_multimodal, then go on with --c."
        )
        self.print_to_log_file(message, also_print_to_console=False)
        raise TrainingStopped(message)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """nnU-Net's pseudo Dice; an epoch in which no class was seen leaves the moving average as it was.

        Its mean is NaN there, and NaN times 0.9 plus anything stays NaN for ever: no best checkpoint any more.
        """
        with np.errstate(invalid="ignore"):  # 0/0 of an absent class is expected
            super().on_validation_epoch_end(val_outputs)
        averages = self.logger.get_value("ema_fg_dice", step=None)
        if np.isnan(averages[-1]):
            before = averages[-2] if len(averages) > 1 else 0.0
            averages[-1] = before
            self.logger.get_value("mean_fg_dice", step=None)[-1] = before
            self.print_to_log_file("no class was seen in this epoch's validation patches; moving average unchanged")

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, written whole."""
        write_whole(Path(filename), super().save_checkpoint)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's loading; where the file is incomplete, the next best one with a message (faults.md row 35)."""
        if not isinstance(filename_or_checkpoint, str):
            raise UsageError("load_checkpoint takes a file name: nnU-Net 2.8 cannot load from a dict either.")
        path, message = readable_checkpoint(Path(filename_or_checkpoint))
        if message:
            self.print_to_log_file(message)
        self._require_same_settings(path)
        try:
            super().load_checkpoint(str(path))
        except RuntimeError as error:
            if "state_dict" not in str(error):
                raise
            raise UsageError(
                f"{path} does not fit this network: {str(error).splitlines()[-1].strip()} It was trained with other "
                f"plans or settings; go on with those ({join(self.output_folder_base, 'plans.json')}), or train anew "
                "without --c."
            ) from error

    def _require_same_settings(self, path: Path) -> None:
        """What gives the weights their meaning is as it was when they were learned."""
        if not self.settled_settings:
            return
        saved = torch.load(path, map_location="cpu", weights_only=False, mmap=True)["init_args"]["plans"]
        change = self._change_since(saved)
        if change:
            raise UsageError(f"{path} was trained with {change}. Bring that back, or train anew without --c.")

    def _require_same_folds(self) -> None:
        """All folds of a result folder are predicted by its one plans.json."""
        folder, path = Path(self.output_folder_base), Path(self.output_folder_base, "plans.json")
        others = [each.parent for each in sorted(folder.glob("fold_*/checkpoint_*.pth"))]
        others = [each for each in others if each != Path(self.output_folder)]
        if not (others and path.is_file()):
            return
        change = self._change_since(load_json(str(path)))
        if change:
            raise UsageError(
                f"{others[0]} was trained with {change}: both would be predicted by the latter. Bring the former back, "
                "give the plans another name (-p), or remove the folds that were trained so."
            )

    def _change_since(self, plans: dict) -> str | None:
        """The first setting that gives the weights their meaning and is not as in these plans, in words."""
        before = _as_written(plans["configurations"].get(self.configuration_name, {}).get(SECTION, {}))
        for key in self.settled_settings:
            if key in before and before[key] != _as_written(self.settings[key]):
                return f"{key} {before[key]}; now it is {self.settings[key]}"
        return None


def _as_written(settings: Any) -> Any:
    """As they come back from a file, which knows no tuples."""
    return json.loads(json.dumps(settings))


def origin_of(model: StartingModel) -> list[str]:
    """Lines that say which file the weights come from."""
    lines = [] if model.message is None else [model.message]
    return lines if model.file is None else [*lines, f"starting model: {model.file} ({model.trainer or 'no trainer'})"]


def after_labels(transforms: list[BasicTransform]) -> int:
    """Where nnU-Net is done with geometry and padding: behind RemoveLabel, before regions and deep supervision."""
    return 1 + next(i for i, t in enumerate(transforms) if isinstance(t, RemoveLabelTansform))


def keep_padding_unlabelled(transforms: list[BasicTransform], ignore_label: int | None) -> list[BasicTransform]:
    """Padding (-1) becomes the ignore label where there is one: it was never drawn as background (contract 5)."""
    if ignore_label is None:
        return list(transforms)
    return [RemoveLabelTansform(-1, ignore_label) if isinstance(t, RemoveLabelTansform) else t for t in transforms]


def thick_axes(stock: list[BasicTransform]) -> tuple[int, ...] | None:
    """The axis along which nnU-Net augments slice by slice, because its voxels are too thick to be blurred together."""
    return (0,) if any(isinstance(transform, Convert2DTo3DTransform) for transform in stock) else None


def is_intensity(transform: BasicTransform) -> bool:
    """Whether it is one of nnU-Net's intensity transforms."""
    return isinstance(transform, RandomTransform) and isinstance(transform.transform, STOCK_INTENSITY)


def _all_settings() -> set[str]:
    """Every setting of every trainer: plans are shared between trainers, so another one's key is no mistake."""
    keys: set[str] = set()
    for entry in TRAINERS.values():
        keys |= set(getattr(importlib.import_module(entry.module), entry.name).settings_defaults)
    return keys
