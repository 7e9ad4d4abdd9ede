"""Context priors: the plans' U-Net, told by learned tokens what is asked for and of which modality an image is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join, save_json
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import get_tp_fp_fn_tn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunet_multimodal.data.case_labels import CaseLabels
from nnunet_multimodal.data.modality import ModalityTable, first_names
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.losses.modality import ModalityLoss
from nnunet_multimodal.losses.partial_labels import MarginalLoss, MaskedTaskLoss, PartialLabelLoss
from nnunet_multimodal.networks.context_prior import UNKNOWN, ContextPriorUNet, fused_stages
from nnunet_multimodal.trainers.base import MultimodalTrainer
from nnunet_multimodal.trainers.checkpoints import write_whole
from nnunet_multimodal.trainers.schedule import adamw
from nnunet_multimodal.trainers.settings import read_settings
from nnunet_multimodal.trainers.transfer import HEADS, StartingModel, fit_by_name, names_of

SUMMARY = "summary_annotated.json"  # in the folder of the validation


class nnUNetTrainerContextPrior(MultimodalTrainer):
    """The plans' U-Net with context priors; cases need not be annotated in full.

    paper: SegEVOLution's context priors (additive), after Hermes (Gao et al., CVPR 2024; multiplicative).
    dataset: a modality table (``convert mixed`` or ``convert table``); with ``"case_labels"`` beside it, each case may
        have annotations of some classes only.
    differs: tokens of all classes and of the modality look at the deep features, and these at them; what the tokens
        have become moves the weights of the last convolution. Any nnU-Net model can be the ``starting_model``: the
        training then begins with its very answers.
    """

    partial_labels = True
    settings_defaults: ClassVar[dict[str, Any]] = {
        **MultimodalTrainer.settings_defaults,
        "initial_lr": 5e-4,  # SegEVOLution's
        "weight_decay": 1e-4,
        "optimizer": "adamw",  # or "sgd", nnU-Net's: set initial_lr and weight_decay with it
        "warmup_epochs": 5,  # Hermes'; at most a tenth of the training
        "gradient_clip": 12.0,  # nnU-Net's
        "prototypes": "additive",  # or "multiplicative"
        "task_loss": "softmax",  # or "sigmoid": each class a task of its own (always so for regions)
        "null_tasks": True,  # of sigmoids: the null token for what a case does not annotate, as in Hermes
        "use_modality": True,
        "modality_loss": 0.01,
        "allow_unknown_modality": False,  # training cases that are not in the table get the null token
        "modality_tokens": 10,
        "fusion_blocks": 1,  # at each stage; Hermes' 2 (4 at its bottleneck) would double a 2d network's parameters
        "shared_tokens": False,
        "fused_stages": [],  # none: chosen by max_fused_voxels, written down below
        "max_fused_voxels": 32768,  # Hermes' largest stage: 32 x 32 x 32
        "freeze_unet": False,  # train the priors and the last layers alone
        # written by the trainer, for prediction:
        "modalities": [],
        "subtract_background": False,
    }
    # A starting model gives its U-Net; its tokens may be of other classes or modalities.
    own_weights = ("modality_head.", "tokens.", "pool.", "fusions.", "prototypes.")
    settled_settings = ("modalities", "prototypes", "fused_stages", "fusion_blocks", "shared_tokens", "task_loss")
    table: ModalityTable | None = None
    case_labels: CaseLabels
    partial: PartialLabelLoss | None = None  # the innermost loss, which is told what is annotated

    # --- settings and checks -----------------------------------------------------------------------------------------

    def complete_settings(self, dataset_json: dict, plans: dict, configuration: str) -> None:
        """The modalities, the stages of the plans' network that are fused, and whether background is subtracted."""
        settings, where = self.settings, f"dataset.json of {plans['dataset_name']}"
        self.case_labels = CaseLabels.from_dataset_json(dataset_json, where)
        settings["modalities"] = []
        if settings["use_modality"]:
            self.table = ModalityTable.from_dataset_json(dataset_json, where)
            settings["modalities"] = list(self.table.modalities)
        manager = PlansManager(plans)
        regions = manager.get_label_manager(dataset_json).has_regions
        settings["subtract_background"] = settings["task_loss"] == "sigmoid" and not regions
        planned = manager.get_configuration(configuration)
        strides = planned.network_arch_init_kwargs.get("strides")
        if not strides:
            raise UsageError(
                f"{type(self).__name__} needs a U-Net of nnU-Net's (plain or residual); the plans have "
                f"{planned.network_arch_class_name}. Plan with nnU-Net's own planners."
            )
        if not settings["fused_stages"]:
            settings["fused_stages"] = fused_stages(planned.patch_size, strides, settings["max_fused_voxels"])
        chosen = settings["fused_stages"]
        if any(stage not in range(1, len(strides)) for stage in chosen) or len({*chosen}) < len(chosen):
            raise UsageError(
                f"fused_stages has to list stages from 1 to {len(strides) - 1}, once each; found {chosen}."
            )

    def check_dataset(self) -> None:
        """Settings that are possible, and no CT clipping of other modalities."""
        settings = self.settings
        choices = {
            "optimizer": ("adamw", "sgd"),
            "prototypes": ("additive", "multiplicative"),
            "task_loss": ("softmax", "sigmoid"),
        }
        for key, known in choices.items():
            if settings[key] not in known:
                raise UsageError(f"{key} has to be one of {', '.join(known)}; found {settings[key]!r}.")
        for key in ("modality_tokens", "fusion_blocks", "max_fused_voxels"):
            if settings[key] < 1:
                raise UsageError(f"{key} has to be at least 1; found {settings[key]!r}.")
        if settings["freeze_unet"] and settings["starting_model"] is None:
            raise UsageError("freeze_unet needs a starting_model: a U-Net that has learned nothing would stay so.")
        others = [name for name in settings["modalities"] if name.casefold() != "ct"]
        # The plans decide: a channel renamed after planning is still clipped.
        if others and "CTNormalization" in self.configuration_manager.normalization_schemes:
            raise DataProblem(
                f"{self.plans_manager.dataset_name}: the channel name 'CT' turns on CT clipping for "
                f"{', '.join(others)}. Name the channel 'CT_or_MR' in nnUNet_raw's dataset.json, then run "
                "nnUNetv2_plan_and_preprocess again."
            )

    # --- network, loss, optimiser ------------------------------------------------------------------------------------

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The plans' U-Net with its priors."""
        settings = read_settings(configuration_manager.configuration)
        unet = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return ContextPriorUNet(
            unet,
            tuple(settings["modalities"]),
            num_output_channels,
            settings["fused_stages"],
            enable_deep_supervision,
            settings["prototypes"] == "multiplicative",
            settings["modality_tokens"],
            settings["fusion_blocks"],
            settings["shared_tokens"],
            settings["subtract_background"],
        )

    def initialize(self) -> None:
        """nnU-Net's, and in the log where priors and features are fused."""
        super().initialize()
        network = self.bare_network()
        added = sum(
            p.numel() for name, p in network.named_parameters() if not name.startswith(("encoder.", "decoder."))
        )
        total = sum(parameter.numel() for parameter in network.parameters())
        self.print_to_log_file(
            f"context priors at stages {self.settings['fused_stages']}: {added / 1e6:.2f} M of {total / 1e6:.2f} M "
            "parameters"
        )

    def _start_from(self, model: StartingModel) -> None:
        """As the base; a U-Net that is to stay as it is must have come from the model, whole."""
        if self.settings["freeze_unet"]:
            own = self.bare_network().state_dict()
            weights, _ = fit_by_name(model.weights, model.names, own, names_of(self.dataset_json))
            strange = [
                key
                for key, value in own.items()
                if key.startswith(("encoder.", "decoder."))
                and HEADS not in key
                and (key not in weights or weights[key].shape != value.shape)
            ]
            if strange:
                raise DataProblem(
                    f"freeze_unet: {self.settings['starting_model']} has other layers than the plans' U-Net, which "
                    f"would stay random: {first_names(strange)}. Plan with the model's own plans: nnunet_multimodal "
                    "adapt --from MODEL"
                )
        super()._start_from(model)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Our network has the switch itself."""
        network: Any = self.bare_network()
        network.deep_supervision = enabled and self.enable_deep_supervision

    @property
    def sigmoid(self) -> bool:
        """Whether each class is a task of its own."""
        return self.label_manager.has_regions or self.settings["task_loss"] == "sigmoid"

    def _build_loss(self) -> nn.Module:
        """nnU-Net's where all is annotated, or ours of what is; then the modality's."""
        labels = self.label_manager
        if not self.case_labels.partial and (labels.has_regions or not self.sigmoid):
            return ModalityLoss(super()._build_loss(), self.settings["modality_loss"])
        how = (self.configuration_manager.batch_dice, 1e-5, sum_over_ranks if self.is_ddp else None)
        if self.sigmoid:
            partial: Any = MaskedTaskLoss(*how, regions=labels.has_regions, ignore_label=labels.ignore_label)
        else:
            partial = MarginalLoss(*how, ignore_label=labels.ignore_label)
        self.partial = loss = partial
        if self.enable_deep_supervision:
            loss = DeepSupervisionWrapper(loss, self.scale_weights())
        return ModalityLoss(loss, self.settings["modality_loss"])

    def scale_weights(self) -> list[float]:
        """nnU-Net's weights of deep supervision, finest first."""
        halves = 0.5 ** np.arange(len(self._get_deep_supervision_scales()))
        # Distributed training stops on what no loss reaches.
        halves[1:][-1:] = 1e-6 if self.is_ddp and not self._do_i_compile() else 0.0
        weights: list[float] = (halves / halves.sum()).tolist()
        return weights

    def configure_optimizers(self):
        """AdamW with warm-up and a polynomial, or nnU-Net's SGD; of the priors alone where the U-Net is frozen."""
        network: Any = self.bare_network()
        if self.settings["freeze_unet"]:
            network.encoder.requires_grad_(False)
            network.decoder.requires_grad_(False)
            network.decoder.seg_layers.requires_grad_(True)  # a class that the starting model lacks is learned there
        if self.settings["optimizer"] == "sgd":
            return super().configure_optimizers()
        learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return adamw(self, learned)

    # --- data --------------------------------------------------------------------------------------------------------

    def table_of_folds(self, cases: set[str], where: str) -> ModalityTable:
        """Cases of unknown modality, where they are allowed, are spread over the folds too."""
        if not self.settings["allow_unknown_modality"]:
            return super().table_of_folds(cases, where)
        table = ModalityTable.from_dataset_json(self.dataset_json, where)
        unknown = dict.fromkeys(sorted(cases - table.case_modality.keys()), "")
        return replace(table, modalities=(*table.modalities, ""), case_modality={**table.case_modality, **unknown})

    def get_tr_and_val_datasets(self):
        """nnU-Net's, after a look whether every modality and every class can be learned.

        Raises:
            DataProblem: a case without a modality, or ``case_labels`` of a case that does not exist.
        """
        where = join(self.preprocessed_dataset_folder_base, "dataset.json")
        dataset = infer_dataset_class(self.preprocessed_dataset_folder)
        present = dataset.get_identifiers(self.preprocessed_dataset_folder)
        self.case_labels.require_known(present, where)
        train, val = self.do_split()
        if self.table is not None:
            if self.settings["allow_unknown_modality"]:
                unknown = [case for case in train if case not in self.table.case_modality]
                if unknown:
                    self.print_to_log_file(f"{len(unknown)} training cases of unknown modality: {first_names(unknown)}")
            else:
                self.table.require([*train, *val], where)
            known = [case for case in train if case in self.table.case_modality]
            counts = {name: len(cases) for name, cases in self.table.by_modality(known).items()}
            self.print_to_log_file(
                f"fold {self.fold} trains on {', '.join(f'{count} {name}' for name, count in counts.items())}"
            )
            for name in [name for name, count in counts.items() if not count]:
                self.print_to_log_file(f"WARNING: no training case of {name}: its tokens learn nothing")
        if self.case_labels.partial:
            of_class = self.case_labels.count(train)
            annotated = ", ".join(f"{name} in {count}" for name, count in of_class.items())
            self.print_to_log_file(f"annotated, of {len(train)} training cases: {annotated}")
            never = [name for name, count in of_class.items() if not count]
            if never:
                raise DataProblem(
                    f"{', '.join(never)} is annotated in no training case of fold {self.fold}, so it cannot be "
                    f'learned. Look at "case_labels" in {where}, or train another fold.'
                )
        return super().get_tr_and_val_datasets()

    # --- one step and one epoch --------------------------------------------------------------------------------------

    def tell(self, batch: dict | None) -> Tensor | None:
        """Says to the network of which modality the batch's images are and what is asked for, and to the loss what is
        annotated; None: every class, and the network finds the modality out.

        Returns:
            bool [B, C], what is annotated; None where everything is.
        """
        network: Any = self.bare_network()
        if batch is None:
            network.tell(None)
            network.ask(None)
            return None
        cases = [str(case) for case in batch["keys"]]
        if self.table is not None:
            known = self.table.case_modality
            ids = [self.table.index(case) if case in known else UNKNOWN for case in cases]
            network.tell(torch.tensor(ids))
        annotated = None
        if self.case_labels.partial:
            annotated = torch.from_numpy(self.case_labels.mask(cases)).to(self.device, non_blocking=True)
        if self.partial is not None:
            self.partial.annotated = annotated
        # Of a softmax all classes are asked for: what is not annotated shares the background.
        network.ask(annotated if self.sigmoid and self.settings["null_tasks"] else None)
        return annotated

    def learn(self, batch: dict) -> dict:
        """nnU-Net's step, the modality told."""
        self.tell(batch)
        return super().learn(batch)

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step, the modality told; where a case does not annotate a class, the class does not count.

        All classes are asked for, as at prediction.
        """
        annotated = self.tell(batch)
        network: Any = self.bare_network()
        network.ask(None)
        if annotated is None:
            return super().validation_step(batch)
        data = batch["data"].to(self.device, non_blocking=True)
        given = batch["target"]
        deep = isinstance(given, list)
        target: Any = [each.to(self.device) for each in given] if deep else given.to(self.device)
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):  # nnU-Net's rule
            output = self.network(data)
            loss = self.loss(output, target)
        logits, truth = (output[0], target[0]) if deep else (output, target)
        counts = annotated_counts(logits, truth, annotated, self.label_manager)
        named = zip(("tp_hard", "fp_hard", "fn_hard"), counts)
        return {"loss": loss.detach().cpu().numpy(), **{name: count.cpu().numpy() for name, count in named}}

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnUNetv2_predict does it: nobody says which modality a case is of; then Dice of what is annotated."""
        self.tell(None)
        super().perform_actual_validation(save_probabilities)
        if not self.case_labels.partial or self.local_rank != 0:
            return
        folder = Path(join(self.output_folder, "validation"))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        found = annotated_dice(summary, self.case_labels, self.label_manager, self.dataset_json["file_ending"])
        write_whole(folder / SUMMARY, lambda path: save_json(found, path, sort_keys=False))
        self.print_to_log_file(
            "The Mean Validation Dice above is nnU-Net's: it takes classes that a case does not annotate for absent."
        )
        of_class = ", ".join(f"{name} {each['Dice']:.4f}" for name, each in found["classes"].items())
        self.print_to_log_file(f"Dice of annotated classes: {found['mean']:.4f} ({of_class})")


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over all processes, with gradient."""
    total: Tensor = AllGatherGrad.apply(x).sum(0, dtype=torch.float32)
    return total


def annotated_counts(logits: Tensor, target: Tensor, annotated: Tensor, labels: Any) -> list[Tensor]:
    """True positives, false positives and false negatives of each class in the samples that annotate it.

    Args:
        logits: [B, C, ...].
        target: [B, 1, ...] labels, or [B, C (+ 1), ...] of regions, the ignored voxels last.
        annotated: [B, C] bool.
        labels: nnU-Net's label manager.

    Returns:
        three tensors, [foreground classes or regions] each.
    """
    if labels.has_regions:
        predicted = (logits.sigmoid() > 0.5).float()
        mask = ~target[:, -1:].bool() if labels.has_ignore_label else None
        target = target[:, :-1] if labels.has_ignore_label else target
    else:
        predicted = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1)
        mask = target != labels.ignore_label if labels.has_ignore_label else None
        target = target if mask is None else target.where(mask, 0)
    axes = list(range(2, logits.ndim))
    counts = get_tp_fp_fn_tn(predicted, target, axes, None if mask is None else mask.float())[:3]
    summed = [(count * annotated).sum(0) for count in counts]
    return summed if labels.has_regions else [count[1:] for count in summed]


def annotated_dice(summary: dict, case_labels: CaseLabels, labels: Any, ending: str) -> dict[str, Any]:
    """nnU-Net's summary of a validation, with the classes that a case does not annotate left out.

    Args:
        summary: content of summary.json.
        case_labels: what is annotated.
        labels: nnU-Net's label manager.
        ending: of the files.

    Returns:
        ``{"mean": number, "classes": {name: {"Dice": number, "cases": n}}}``; a class in none of whose annotated cases
        Dice is defined has NaN, and no part in the mean.
    """
    of_class: dict[str, list[float]] = {name: [] for name in case_labels.outputs if name != "background"}
    measured = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    keys = {str(key): name for key, name in zip(measured, of_class)}
    for case in summary["metric_per_case"]:
        unannotated = case_labels.unannotated(Path(case["prediction_file"]).name.removesuffix(ending))
        for key, found in case["metrics"].items():
            name = keys.get(key)
            if name in of_class and name not in unannotated and np.isfinite(found["Dice"]):
                of_class[name].append(float(found["Dice"]))
    classes = {
        name: {"Dice": float(np.mean(values)) if values else float("nan"), "cases": len(values)}
        for name, values in of_class.items()
    }
    known = [each["Dice"] for each in classes.values() if each["cases"]]
    return {"mean": float(np.mean(known)) if known else float("nan"), "classes": classes}


class nnUNetTrainerContextPrior_multiplicative(nnUNetTrainerContextPrior):
    """Class weights from the posterior alone, as in Hermes."""

    fixed_settings: ClassVar[dict[str, Any]] = {"prototypes": "multiplicative"}


class nnUNetTrainerContextPrior_sigmoid(nnUNetTrainerContextPrior):
    """Each class a task of its own; tasks that a case does not annotate are null, as in Hermes."""

    fixed_settings: ClassVar[dict[str, Any]] = {"task_loss": "sigmoid"}


class nnUNetTrainerContextPrior_noModality(nnUNetTrainerContextPrior):
    """Without tokens of modalities."""

    fixed_settings: ClassVar[dict[str, Any]] = {"use_modality": False}


class nnUNetTrainerContextPrior_sharedTokens(nnUNetTrainerContextPrior):
    """One pool of tokens for all stages."""

    fixed_settings: ClassVar[dict[str, Any]] = {"shared_tokens": True}
