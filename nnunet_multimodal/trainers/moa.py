"""Mixture of adapters: a trained model learns further modalities and answers its own exactly as before."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_multimodal.data.modality import ModalityTable, has_table, known_spelling
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.losses.load_balance import LoadBalanceLoss
from nnunet_multimodal.losses.modality import ModalityLoss
from nnunet_multimodal.networks.adapters import inject_adapters
from nnunet_multimodal.networks.mixture import LearnedMixture, ModalityMixture
from nnunet_multimodal.trainers.adapting import ADAPT, AdaptingTrainer, low_rank_settings
from nnunet_multimodal.trainers.settings import read_settings
from nnunet_multimodal.trainers.transfer import StartingModel

GATES = ("modality", "learned")


class nnUNetTrainerMoA(AdaptingTrainer):
    """Adapters of low rank, one for each modality but the starting model's own, which takes none.

    paper: SegEVOLution (mixture of adapters, top-1 by modality, CT by the identity).
    dataset: images of the new modality, or of several with the modality table; plans made by ``adapt``.
    differs: as nnUNetTrainerLoRA; what a modality's adapter learns reaches no other modality.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **AdaptingTrainer.settings_defaults,
        "gate": "modality",  # or "learned": shares from the image's features, with a balance
        "base_modalities": [],  # those that the starting model answers as it is
        "new_modality": None,  # of all cases, where the data set has no modality table
        "modality_loss": 0.01,
        "experts": 2,  # of a learned gate, beside the identity
        "top_k": 0,  # of these and the identity only so many, 2 or more; 0: all
        "load_balance": 0.01,
        # written by the trainer, for prediction:
        "modalities": [],
        "trained_modality": None,
        "unseen_modalities": [],
    }
    settled_settings: ClassVar[tuple[str, ...]] = (
        *AdaptingTrainer.settled_settings,
        "gate",
        "base_modalities",
        "modalities",
        "trained_modality",
        "unseen_modalities",
        "experts",
        "top_k",
    )
    table: ModalityTable | None = None
    base_mirroring: tuple[int, ...] | None = None  # axes along which the starting model's predictions are mirrored

    def complete_settings(self, dataset_json: dict, plans: dict, configuration: str) -> None:
        """All modalities, the starting model's own first."""
        if self.settings["gate"] not in GATES:
            raise UsageError(f"gate has to be one of {', '.join(GATES)}; found {self.settings['gate']!r}.")
        if self.settings["gate"] == "learned":
            if self.settings["top_k"] == 1:
                raise UsageError(
                    "top_k is 1: the one that is taken gets the whole share, whatever the gate says of it, so that the "
                    "gate would learn nothing. Take 2 or more, or 0 for all."
                )
            return
        where, new = f"dataset.json of {plans['dataset_name']}", self.settings["new_modality"]
        if has_table(dataset_json):
            self.table = ModalityTable.from_dataset_json(dataset_json, where)
            there = [name for name in self.table.modalities if name in self.table.case_modality.values()]
            if new is not None and known_spelling(new, there) is None:
                raise UsageError(
                    f"the cases are {new} by 'new_modality' (--modality), and {', '.join(there)} by the modality table "
                    f"of {where}. Leave the former out."
                )
        elif new is not None:
            there = [new]
        else:
            raise DataProblem(
                f"nobody says of which modality the cases are: {where} has no modality table, and the plans' section "
                f"nnunet_multimodal no 'new_modality'. {ADAPT} -tr nnUNetTrainerMoA --modality MR --base-modality CT"
            )
        base = list(dict.fromkeys(known_spelling(name, there) or name for name in self.settings["base_modalities"]))
        self.settings["base_modalities"] = base
        self.settings["modalities"] = [*base, *(name for name in there if name not in base)]
        self.settings["trained_modality"] = there[0] if len(there) == 1 else None
        self.settings["unseen_modalities"] = [name for name in base if name not in there]

    def check_dataset(self) -> None:
        """Something is to be adapted, and something is to stay."""
        if self.settings["gate"] == "learned":
            return
        base, known = self.settings["base_modalities"], self.settings["modalities"]
        if not base:
            raise UsageError(
                "'base_modalities' in the plans' section nnunet_multimodal is empty: nobody says which modality the "
                f"starting model was trained on. {ADAPT} -tr nnUNetTrainerMoA --base-modality CT"
            )
        if len(known) == len(base):
            raise DataProblem(
                f"{self.plans_manager.dataset_name} has no case of another modality than {', '.join(base)}, which the "
                "starting model answers as it is: there is nothing to adapt."
            )
        if "CTNormalization" in self.configuration_manager.normalization_schemes:
            raise DataProblem(
                "the plans normalise as CT (clipped to a range in HU), which makes nothing of MR. One model for both "
                "needs a starting model of z-scored images: name its channel CT_or_MR and train it anew; or take "
                "nnUNetTrainerLoRA, for a second model."
            )

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The stock network with adapters and a gate."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        settings = read_settings(configuration_manager.configuration)
        learned = settings["gate"] == "learned"
        if learned:
            adapters = [f"expert_{number}" for number in range(1, settings["experts"] + 1)]
        else:
            adapters = [name for name in settings["modalities"] if name not in settings["base_modalities"]]
        try:
            gates = inject_adapters(network, adapters, **low_rank_settings(settings), heads=settings["trained_layers"])
        except ValueError as error:
            raise UsageError(f"settings of the adapters in the plans: {error}") from error
        if learned:
            return LearnedMixture(network, gates, len(adapters), settings["top_k"])
        return ModalityMixture(
            network,
            gates,
            tuple(settings["modalities"]),
            adapters,
            settings["trained_modality"],
            settings.get("unseen_modalities", []),
        )

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.settings["gate"] == "learned":
            return LoadBalanceLoss(loss, self.settings["load_balance"])
        return ModalityLoss(loss, self.settings["modality_loss"])

    # --- prediction as the starting model's ---------------------------------------------------------------------------

    def _start_from(self, model: StartingModel) -> None:
        super()._start_from(model)
        self.base_mirroring = model.mirroring

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's; mirrored as before the interruption."""
        super().load_checkpoint(filename_or_checkpoint)
        self.base_mirroring = self.inference_allowed_mirroring_axes

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """Stock; predictions are mirrored along no axis along which the starting model's are not."""
        configured = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.settings["gate"] == "modality":
            own, base = self.inference_allowed_mirroring_axes or (), self.base_mirroring or ()
            self.inference_allowed_mirroring_axes = tuple(axis for axis in own if axis in base) or None
            if not set(base) <= set(own):
                self.print_to_log_file(
                    "the starting model's predictions are means over mirrored images, this model's are not: images of "
                    f"{', '.join(self.settings['base_modalities'])} are answered alike with --disable_tta"
                )
        return configured

    # --- whose images ------------------------------------------------------------------------------------------------

    def do_split(self) -> tuple[list[str], list[str]]:
        """The fold, after a look whether the modality of each of its cases is known (faults.md row 32)."""
        train, val = super().do_split()
        if self.table is not None:
            self.table.require([*train, *val], f"dataset.json of {self.plans_manager.dataset_name}")
            seen = {self.table.case_modality[case] for case in train}
            new = [name for name in self.settings["modalities"] if name not in self.settings["base_modalities"]]
            absent = [name for name in new if name not in seen]
            if self.settings["gate"] == "modality" and absent:
                self.print_to_log_file(
                    f"WARNING: fold {self.fold} trains on no case of {', '.join(absent)}, whose images it will answer "
                    "as the starting model does. More cases, or fold all, would teach it better."
                )
        return train, val

    def tell(self, batch: dict | None) -> None:
        """Says to the network of which modality the batch's images are; None: let it find out."""
        network = self.bare_network()
        if not isinstance(network, ModalityMixture):
            return
        if batch is None:
            network.tell(None)
            return
        of_case = {} if self.table is None else self.table.case_modality
        names = [of_case.get(str(case), self.settings["new_modality"]) for case in batch["keys"]]
        network.tell(torch.tensor([network.modalities.index(str(name)) for name in names]))

    def learn(self, batch: dict) -> dict:
        """nnU-Net's step on images of known modality."""
        self.tell(batch)
        return super().learn(batch)

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's, told the modality."""
        self.tell(batch)
        result: dict = super().validation_step(batch)
        return result

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnUNetv2_predict does it: nobody says which modality a case is of."""
        self.tell(None)
        super().perform_actual_validation(save_probabilities)


class nnUNetTrainerMoA_learned(nnUNetTrainerMoA):
    """Shares of the identity and of the adapters are learned from the image."""

    fixed_settings: ClassVar[dict[str, Any]] = {"gate": "learned"}
