"""MulModSeg: one model for unpaired CT and MR, conditioned on text, trained in alternation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import join, load_pickle
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import nn

from nnunet_multimodal.data.alternating import Alternating, rounds
from nnunet_multimodal.data.modality import ModalityTable
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.losses.modality import ModalityLoss
from nnunet_multimodal.networks import TextConditionedNetwork, TextSwinUNETR, TextUNet
from nnunet_multimodal.text import TextEmbeddings, output_names
from nnunet_multimodal.text.find import agreeing, find_embeddings, source_of
from nnunet_multimodal.trainers.base import MultimodalTrainer
from nnunet_multimodal.trainers.schedule import WarmupCosine, adamw
from nnunet_multimodal.trainers.settings import read_settings

BACKBONES = ("unet", "swin_unetr")
OPTIMIZERS = ("adamw", "sgd")


class nnUNetTrainerMulModSeg(MultimodalTrainer):
    """One network for several modalities of other patients each: CT and MR, or any two or more.

    paper: MulModSeg (unpaired CT and MR, modality-conditioned text embedding, alternating training).
    dataset: one image channel, and a modality table in dataset.json (``convert mixed`` or ``convert table``).
    differs: each class's last convolutions come from the image and a frozen text embedding of modality x class; whole
        batches of one modality in turn; AdamW with warm-up and cosine.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **MultimodalTrainer.settings_defaults,
        "initial_lr": 1e-3,
        "weight_decay": 1e-4,
        "optimizer": "adamw",  # or "sgd", nnU-Net's: set initial_lr and weight_decay with it
        "warmup_epochs": 10,  # at most a tenth of the training
        "gradient_clip": 12.0,  # nnU-Net's
        "backbone": "unet",  # the plans' own, or "swin_unetr"
        "feature_size": 48,  # of swin_unetr
        "text": "auto",  # "one_hot", a file of `nnunet_multimodal embed`, or that file beside the plans if there is one
        "text_head": True,
        "alternating": True,
        "sampling_ratio": {},  # batches of a modality in a round, such as {"CT": 2}
        "only_modality": None,  # train on this one of a mixed data set
        "modality_loss": 0.01,
        "allow_absent_classes": False,
        # written by the trainer, for prediction:
        "modalities": [],
        "text_dimension": 0,
        "text_source": {},
    }
    # A starting model may have other modalities or classes in these rows.
    own_weights = ("text_embeddings", "modality_head.")
    settled_settings = ("modalities", "text_source", "text_head", "backbone", "feature_size")
    table: ModalityTable
    embeddings: TextEmbeddings | None = None

    # --- settings and checks -----------------------------------------------------------------------------------------

    def complete_settings(self, dataset_json: dict, plans: dict, configuration: str) -> None:
        """The modalities and the embeddings' shape and source."""
        dataset_name = plans["dataset_name"]
        self.table = ModalityTable.from_dataset_json(dataset_json, f"dataset.json of {dataset_name}")
        self.settings["modalities"] = list(self.table.modalities)
        if self.settings["text_head"]:
            labels = output_names(dataset_json["labels"])
            beside = Path(join(nnUNet_preprocessed, dataset_name)) if nnUNet_preprocessed.is_set() else None
            model = f"{type(self).__name__}__{plans['plans_name']}__{configuration}"
            results = Path(join(nnUNet_results, dataset_name, model)) if nnUNet_results.is_set() else None
            self.embeddings = find_embeddings(self.settings["text"], beside, self.table.modalities, labels)
            self.embeddings = agreeing(self.embeddings, self.settings["text"], results, configuration)
            self.settings["text_dimension"] = self.embeddings.dimension
            self.settings["text_source"] = source_of(self.embeddings)

    def check_dataset(self) -> None:
        """One channel for all modalities, and at least two of these."""
        name, modalities = self.plans_manager.dataset_name, self.table.modalities
        for key, known in (("backbone", BACKBONES), ("optimizer", OPTIMIZERS)):
            if self.settings[key] not in known:
                raise UsageError(f"{key} has to be one of {', '.join(known)}; found {self.settings[key]!r}.")
        rounds(list(modalities), self.settings["sampling_ratio"])
        only = self.settings["only_modality"]
        if only is not None and only not in modalities:
            raise DataProblem(f"{type(self).__name__} trains on {only}; {name} has {', '.join(modalities)}.")
        if len(modalities) < 2:
            raise DataProblem(
                f"{name} has one modality, {modalities[0]}; {type(self).__name__} needs two or more. For one, take "
                "nnUNetTrainer; or add the others: nnunet_multimodal convert mixed"
            )
        if len(self.channel_names) != 1:
            raise DataProblem(
                f"{name} has {len(self.channel_names)} channels ({', '.join(self.channel_names)}); "
                f"{type(self).__name__} needs one, which holds the image whatever its modality is."
            )
        # The plans decide: a channel renamed after planning is still clipped.
        if "CTNormalization" in self.configuration_manager.normalization_schemes:
            others = ", ".join(modality for modality in modalities if modality.casefold() != "ct")
            raise DataProblem(
                f"{name}: the channel name 'CT' turns on CT clipping for {others}. Name the channel 'CT_or_MR' in "
                "nnUNet_raw's dataset.json, then run nnUNetv2_plan_and_preprocess again."
            )
        if not self.settings["text_head"] and self.settings["backbone"] != "unet":
            raise UsageError("without text_head it is the plans' U-Net: backbone has to be 'unet'.")

    @property
    def deep_supervision(self) -> bool:  # type: ignore[override]
        """SwinUNETR has none, as in the paper's code."""
        return self.settings["backbone"] == "unet"

    # --- network, loss, optimiser ------------------------------------------------------------------------------------

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The plans' U-Net or a SwinUNETR under the text-conditioned head; the stock network without it."""
        settings = read_settings(configuration_manager.configuration)
        if settings["backbone"] == "unet":
            unet = nnUNetTrainer.build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            )
            if not settings["text_head"]:
                return unet
        modalities, text = tuple(settings["modalities"]), settings["text_dimension"]
        only = None if settings["only_modality"] is None else modalities.index(settings["only_modality"])
        if settings["backbone"] == "unet":
            return TextUNet(unet, modalities, num_output_channels, text, enable_deep_supervision, only)
        return TextSwinUNETR(
            len(configuration_manager.patch_size),
            modalities,
            num_output_channels,
            text,
            settings["feature_size"],
            num_input_channels,
            only,
        )

    def initialize(self) -> None:
        """nnU-Net's, then the text into the network; a checkpoint brings its own."""
        super().initialize()
        self._warn_of_idle_settings()
        network = self.bare_network()
        if isinstance(network, TextConditionedNetwork) and self.embeddings is not None:
            network.text_embeddings.copy_(self.embeddings.embeddings)
            source = self.settings["text_source"]
            self.print_to_log_file(f"text: {source['encoder']}, template {source['template']}", *self.embeddings.notes)

    def _warn_of_idle_settings(self) -> None:
        """Settings that somebody changed and that nothing reads in this training."""
        settings = self.settings
        idle = {
            "sampling_ratio": not settings["alternating"] or settings["only_modality"] is not None,
            "warmup_epochs": settings["optimizer"] == "sgd",
            "gradient_clip": settings["optimizer"] == "sgd",
            "text": not settings["text_head"],
            "modality_loss": not settings["text_head"],
            "feature_size": settings["backbone"] == "unet",
        }
        names = [name for name, unread in idle.items() if unread and settings[name] != self.settings_defaults[name]]
        if names:
            self.print_to_log_file(f"WARNING: without effect in this training: {', '.join(names)}")

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Our network has the switch itself; SwinUNETR has no deep supervision to switch."""
        network = self.bare_network()
        if isinstance(network, TextConditionedNetwork):
            network.deep_supervision = enabled and self.enable_deep_supervision
        else:
            super().set_deep_supervision_enabled(enabled)

    def _build_loss(self) -> nn.Module:
        return ModalityLoss(super()._build_loss(), self.settings["modality_loss"])

    def configure_optimizers(self):
        """AdamW with warm-up and half a cosine (the paper's), or nnU-Net's SGD."""
        if self.settings["optimizer"] == "sgd":
            return super().configure_optimizers()
        return adamw(self, self.network.parameters(), WarmupCosine)

    # --- data --------------------------------------------------------------------------------------------------------

    def get_dataloaders(self):
        """Batches of one modality in turn for training and, with every setting, for validation."""
        self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        train, val = map(self.table.by_modality, self.cases_of_fold())
        rotation, dummy_2d, initial_patch, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        labels, scales = self.label_manager, self._get_deep_supervision_scales()
        which = {
            "is_cascaded": self.is_cascaded,
            "foreground_labels": labels.foreground_labels,
            "regions": labels.foreground_regions if labels.has_regions else None,
            "ignore_label": labels.ignore_label,
        }
        patch = self.configuration_manager.patch_size
        masks = self.configuration_manager.use_mask_for_norm
        train_transforms = self.get_training_transforms(
            patch, rotation, scales, mirror_axes, dummy_2d, use_mask_for_norm=masks, **which
        )
        val_transforms = self.get_validation_transforms(scales, **which)
        if self.settings["only_modality"] is not None:
            wanted = [self.settings["only_modality"]]
        else:
            wanted = list(self.table.modalities)
        groups = {name: train[name] for name in wanted}
        if not self.settings["alternating"]:
            groups = {"all": [case for cases in groups.values() for case in cases]}
        # A fold may have no validation case of the one modality that is trained on; then the others are judged.
        judged = {name: val[name] for name in wanted if val[name]} or {n: cases for n, cases in val.items() if cases}
        workers = get_allowed_n_proc_DA()
        training = {
            name: self._batches(cases, initial_patch, train_transforms, workers, len(groups), 6)
            for name, cases in groups.items()
        }
        validation = {
            name: self._batches(cases, patch, val_transforms, workers // 2, len(judged), 3)
            for name, cases in judged.items()
        }
        ratio = {name: share for name, share in self.settings["sampling_ratio"].items() if name in training}
        return Alternating(training, ratio), Alternating(validation)

    def _batches(self, cases, initial_patch, transforms, workers: int, of: int, cached: int) -> Any:
        """nnU-Net's loader and workers over some of the cases; ``of`` loaders share the workers."""
        dataset = self.dataset_class(
            self.preprocessed_dataset_folder,
            cases,
            folder_with_segs_from_previous_stage=self.folder_with_segs_from_previous_stage,
        )
        loader = nnUNetDataLoader(
            dataset,
            self.batch_size,
            initial_patch,
            self.configuration_manager.patch_size,
            self.label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            probabilistic_oversampling=self.probabilistic_oversampling,
            transforms=transforms,
        )
        if get_allowed_n_proc_DA() == 0:
            return SingleThreadedAugmenter(loader, None)
        processes = max(1, workers // of)
        batches = NonDetMultiThreadedAugmenter(
            loader, None, processes, max(cached // of, processes // 2, 2), pin_memory=self.device.type == "cuda",
            wait_time=0.002,
        )  # fmt: skip
        batches._start()  # the workers of all loaders begin at the same time
        return batches

    def cases_of_fold(self) -> tuple[list[str], list[str]]:
        """Training and validation cases, after a look whether all modalities are there (faults.md row 31).

        Raises:
            DataProblem: a case without a modality, a modality without a training case, a class without a voxel in it.
        """
        train, val = self.do_split()
        where = join(self.preprocessed_dataset_folder_base, "dataset.json")
        self.table.require([*train, *val], where)
        of_train, of_val = self.table.by_modality(train), self.table.by_modality(val)
        wanted = [self.settings["only_modality"]] if self.settings["only_modality"] else self.table.modalities
        counts = ", ".join(f"{len(of_train[name])} {name}" for name in self.table.modalities)
        self.print_to_log_file(f"fold {self.fold} trains on {counts}")
        if not all(of_train[name] for name in wanted):
            raise DataProblem(
                f"fold {self.fold} has {counts} training cases; {type(self).__name__} needs {' and '.join(wanted)}. "
                f"Change {join(self.preprocessed_dataset_folder_base, 'splits_final.json')}, or delete it: new splits "
                "are stratified by modality. One patient's cases stay together."
            )
        if not val:
            raise DataProblem(
                f"fold {self.fold} has no validation case: there are fewer patients than folds. Train another fold, or "
                "all."
            )
        unjudged = [name for name in wanted if not of_val[name]]
        if unjudged:
            self.print_to_log_file(f"WARNING: fold {self.fold} has no validation case of {', '.join(unjudged)}")
        if not self.settings["allow_absent_classes"]:
            self._require_classes({name: of_train[name] for name in wanted})
        return train, val

    def _require_classes(self, train: Mapping[str, list[str]]) -> None:
        """Every class occurs in every modality; where it does not, training would teach that it is background there."""
        labels = self.label_manager
        wanted = labels.foreground_regions if labels.has_regions else labels.foreground_labels
        names = output_names(self.dataset_json["labels"])[-len(wanted) :]
        for modality, cases in train.items():
            seen: set[Any] = set()
            for case in cases:
                found = load_pickle(join(self.preprocessed_dataset_folder, f"{case}.pkl"))["class_locations"]
                seen |= {_label_key(label) for label, places in found.items() if len(places)}
                if len(seen) >= len(found):
                    break
            absent = [name for name, label in zip(names, wanted) if _label_key(label) not in seen]
            if absent:
                raise DataProblem(
                    f"{', '.join(absent)} is in no {modality} training case of fold {self.fold}, so training would "
                    f"teach that it is background in {modality}. Leave it out of the labels (convert mixed --organs), "
                    'or set "allow_absent_classes" to true in the plans\' section nnunet_multimodal.'
                )

    # --- one step and one epoch --------------------------------------------------------------------------------------

    def tell(self, batch: dict | None) -> torch.Tensor | None:
        """Says to the network of which modality the batch's images are; None: let it find out."""
        network = self.bare_network()
        ids = None if batch is None else torch.tensor([self.table.index(str(case)) for case in batch["keys"]])
        if isinstance(network, TextConditionedNetwork):
            network.tell(ids)
        return ids

    def on_train_epoch_start(self) -> None:
        """The order of batches follows from the epoch, so that it is the same after an interruption."""
        super().on_train_epoch_start()
        self.dataloader_train.start_at(self.current_epoch * self.num_iterations_per_epoch)

    def train_step(self, batch: dict) -> dict:
        """nnU-Net's step on images of a known modality."""
        self.tell(batch)
        return super().train_step(batch)

    def on_validation_epoch_start(self) -> None:
        """Where an epoch has fewer validation batches than there are modalities, each has its turn."""
        super().on_validation_epoch_start()
        self.dataloader_val.start_at(self.current_epoch * self.num_val_iterations_per_epoch)

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step, told the modality; notes which it was, and whether the network would have known."""
        ids = self.tell(batch)
        assert ids is not None
        result = super().validation_step(batch)
        network = self.bare_network()
        known = float("nan")
        if isinstance(network, TextConditionedNetwork) and network.modality_logits is not None:
            known = float((network.modality_logits.argmax(1).cpu() == ids).float().mean())
        return result | {"modality": int(ids[0]), "known": known}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Pseudo Dice per modality; their mean decides on the best checkpoint."""
        super().on_validation_epoch_end(val_outputs)
        counted = [
            (each["modality"], each["known"], each["tp_hard"], each["fp_hard"], each["fn_hard"]) for each in val_outputs
        ]
        if self.is_ddp:
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, counted)
            counted = [each for rank in of_ranks for each in rank]
        dice = dice_of_modalities(counted, len(self.table.modalities))
        means = [float(np.nanmean(row)) if np.isfinite(row).any() else float("nan") for row in dice]
        for name, mean, row in zip(self.table.modalities, means, dice):
            if np.isfinite(mean):
                self.print_to_log_file(f"Pseudo dice {name} {mean:.4f}", [round(float(each), 4) for each in row])
        known = [each[1] for each in counted]
        if np.isfinite(known).all():
            self.print_to_log_file(f"modality recognised in {100 * np.mean(known):.1f} % of the validation patches")
        if not np.isfinite(means).any():
            return
        averages, pooled = (self.logger.get_value(key, step=None) for key in ("ema_fg_dice", "mean_fg_dice"))
        pooled[-1] = float(np.nanmean(means))
        averages[-1] = 0.9 * averages[-2] + 0.1 * pooled[-1] if len(averages) > 1 else pooled[-1]

    def on_train_end(self) -> None:
        """nnU-Net's end, and ours of the workers, which it does not know."""
        super().on_train_end()
        for loader in (self.dataloader_train, self.dataloader_val):
            if isinstance(loader, Alternating):
                loader._finish()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnUNetv2_predict does it: nobody says which modality a case is of."""
        self.tell(None)
        super().perform_actual_validation(save_probabilities)


def dice_of_modalities(counted: list[tuple], modalities: int) -> np.ndarray:
    """Global Dice 2 TP / (2 TP + FP + FN) over all patches of a modality, per class.

    Args:
        counted: (modality, _, tp [K], fp [K], fn [K]) per batch.
        modalities: M.

    Returns:
        [M, K], NaN where a class was neither there nor predicted.
    """
    classes = len(counted[0][2])
    sums = np.zeros((modalities, 3, classes))
    for modality, _, *counts in counted:
        sums[modality] += np.stack(counts)
    tp, fp, fn = sums[:, 0], sums[:, 1], sums[:, 2]
    with np.errstate(invalid="ignore"):
        return 2 * tp / (2 * tp + fp + fn)


def _label_key(label: Any) -> Any:
    """A region is a list in JSON and a tuple in nnU-Net's keys."""
    return tuple(label) if isinstance(label, (list, tuple)) else int(label)


class nnUNetTrainerMulModSeg_noText(nnUNetTrainerMulModSeg):
    """The stock network, trained in alternation ("ALT only")."""

    fixed_settings: ClassVar[dict[str, Any]] = {"text_head": False, "backbone": "unet"}


class nnUNetTrainerMulModSeg_noALT(nnUNetTrainerMulModSeg):
    """Batches mix the modalities, as nnU-Net draws them."""

    fixed_settings: ClassVar[dict[str, Any]] = {"alternating": False}


class nnUNetTrainerMulModSeg_CTonly(nnUNetTrainerMulModSeg):
    """Trained on the CT cases of the mixed data set alone."""

    fixed_settings: ClassVar[dict[str, Any]] = {"only_modality": "CT"}


class nnUNetTrainerMulModSeg_MRonly(nnUNetTrainerMulModSeg):
    """Trained on the MR cases of the mixed data set alone."""

    fixed_settings: ClassVar[dict[str, Any]] = {"only_modality": "MR"}
