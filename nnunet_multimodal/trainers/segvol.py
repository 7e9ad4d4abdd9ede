"""SegVol: ask an image for an organ by text, points or a box."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, autocast, nn

from nnunet_multimodal.data.prompt_sampling import COMBINATIONS, box_of, grow_box, sample_points
from nnunet_multimodal.data.whole import SometimesWhole
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.losses.prompted import PromptedByText, PromptedLoss
from nnunet_multimodal.networks.segvol import Prompts, SegVolNetwork
from nnunet_multimodal.networks.segvol.network import patch_for
from nnunet_multimodal.text import TextEmbeddings, output_names
from nnunet_multimodal.text.find import agreeing, source_of
from nnunet_multimodal.text.organs import find_organ_texts
from nnunet_multimodal.trainers.base import MultimodalTrainer
from nnunet_multimodal.trainers.schedule import WarmupCosine, adamw
from nnunet_multimodal.trainers.segvol_weights import load_segvol_weights
from nnunet_multimodal.trainers.settings import read_settings

NETWORK_SETTINGS: dict[str, Any] = {
    "vit_width": 768,  # SegVol's, as all of these
    "vit_layers": 12,
    "vit_heads": 12,
    "vit_hidden": 3072,
    "decoder_depth": 2,
    "decoder_heads": 8,
    "decoder_hidden": 2048,
    "as_segvol": False,  # two peculiarities that SegVol's public weights need (networks/segvol)
}


class nnUNetTrainerSegVol(MultimodalTrainer):
    """A vision transformer that is asked for one organ at a time, by text, points, a box, or two of these.

    paper: SegVol (Du et al. 2023), trained as in SegEVOLution.
    dataset: any 3d nnU-Net data set with labels (no regions), as it is.
    differs: network, loss, AdamW; each step asks for an organ of each image in all combinations of prompts drawn from
        its label. Some images are the whole volume, resized: what zooming out looks at.
    """

    deep_supervision = False
    settings_defaults: ClassVar[dict[str, Any]] = {
        **MultimodalTrainer.settings_defaults,
        "num_epochs": 500,
        "initial_lr": 1e-4,
        "weight_decay": 1e-5,
        "warmup_epochs": 10,  # at most a tenth of the training
        "gradient_clip": 1.0,  # nnU-Net's for its own transformer; SegEVOLution has 0.5, SegVol none
        "text": "auto",  # "one_hot", a file of `nnunet_multimodal embed`, or that file beside the plans if there is one
        "organs_per_image": 1,
        "combinations_per_step": len(COMBINATIONS),  # fewer are drawn by chance
        "absent_share": 0.2,  # of the organs asked for: one that is not there, by text alone
        "whole_share": 0.25,  # of the images: the whole volume, resized to the window
        "positive_points": 10,  # at most, beside the one that there always is
        "negative_points": 10,  # at most
        "box_growth": 0.1,  # of the box's edge: a user draws it so much too large, at most
        "segvol_weights": None,  # SegVol's file, whose fitting weights training starts from
        "vit_patch": [],  # as isotropic as can be with at most 2048 tokens
        **NETWORK_SETTINGS,
        # written by the trainer, for prediction:
        "organs": [],
        "text_dimension": 0,
        "text_source": {},
    }
    own_weights = ("text_embeddings",)  # a starting model may have other organs in these rows
    settled_settings = ("organs", "text_source", "vit_patch", *NETWORK_SETTINGS)
    texts: TextEmbeddings

    # --- settings and checks -----------------------------------------------------------------------------------------

    def complete_settings(self, dataset_json: dict, plans: dict, configuration: str) -> None:
        """The organs, their texts, and a patch that divides the window."""
        dataset_name = plans["dataset_name"]
        own = PlansManager(plans).get_configuration(configuration)
        window = own.patch_size
        if len(window) != 3:
            raise UsageError(
                f"{type(self).__name__} is three-dimensional: train 3d_fullres or 3d_lowres, not {configuration}."
            )
        if not self.settings["vit_patch"]:
            self.settings["vit_patch"] = list(patch_for(window, own.spacing))
        self._check_sizes([int(size) for size in window])
        names = output_names(dataset_json["labels"], f"dataset.json of {dataset_name}")
        if any(isinstance(value, (list, tuple)) for value in dataset_json["labels"].values()):
            raise DataProblem(f"{dataset_name} has regions; {type(self).__name__} needs labels that do not overlap.")
        organs = names[1:]
        if not organs:
            raise DataProblem(f"{dataset_name} has no label but background: there is nothing to ask for.")
        beside = Path(join(nnUNet_preprocessed, dataset_name)) if nnUNet_preprocessed.is_set() else None
        model = f"{type(self).__name__}__{plans['plans_name']}__{configuration}"
        results = Path(join(nnUNet_results, dataset_name, model)) if nnUNet_results.is_set() else None
        self.texts = find_organ_texts(self.settings["text"], beside, organs)
        self.texts = agreeing(self.texts, self.settings["text"], results, configuration)
        self.settings["organs"] = list(organs)
        self.settings["text_dimension"] = self.texts.dimension
        self.settings["text_source"] = source_of(self.texts)

    def _check_sizes(self, window: list[int]) -> None:
        """The network can be built with these settings."""
        settings, where = self.settings, "in the plans' section nnunet_multimodal"
        patch = settings["vit_patch"]
        whole = all(isinstance(cell, int) and not isinstance(cell, bool) and cell > 0 for cell in patch)
        if len(patch) != 3 or not whole or any(size % cell for size, cell in zip(window, patch)):
            choices = [[d for d in range(1, size + 1) if size % d == 0 and 4 <= d <= 32] or [size] for size in window]
            raise UsageError(
                f"vit_patch {patch} {where} does not divide the plans' patch size {window}. Along the three axes it "
                f"may be {', '.join(' or '.join(map(str, each)) for each in choices)}; [] chooses for you."
            )
        width, heads, decoder = settings["vit_width"], settings["vit_heads"], settings["decoder_heads"]
        numbers = ("vit_layers", "vit_hidden", "decoder_depth", "decoder_hidden", "vit_heads", "decoder_heads")
        for name in (*numbers, "organs_per_image"):
            if settings[name] < 1:
                raise UsageError(f"{name} {settings[name]} {where}: expected 1 or more.")
        if width < 8 or width % 8 or width % heads or (width // 2) % decoder:
            raise UsageError(
                f"vit_width {width} {where} must be divisible by 8 and by vit_heads ({heads}), its half by "
                f"decoder_heads ({decoder})."
            )
        if not 1 <= settings["combinations_per_step"] <= len(COMBINATIONS):
            raise UsageError(
                f"combinations_per_step {settings['combinations_per_step']} {where}: expected 1 to {len(COMBINATIONS)}."
            )
        for name in ("absent_share", "whole_share", "box_growth"):
            if not 0 <= settings[name] <= 1:
                raise UsageError(f"{name} {settings[name]} {where}: expected a share from 0 to 1.")
        for name in ("positive_points", "negative_points"):
            if settings[name] < 0:
                raise UsageError(f"{name} {settings[name]} {where}: expected 0 or more.")

    def check_dataset(self) -> None:
        """No cascade, and one starting point."""
        if self.is_cascaded:
            raise UsageError(f"{type(self).__name__} has no cascade: train 3d_fullres or 3d_lowres.")
        if self.settings["segvol_weights"] is not None and self.settings["starting_model"] is not None:
            raise UsageError("segvol_weights and starting_model are both set: training starts from one of them.")

    # --- network, loss, optimiser ------------------------------------------------------------------------------------

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """SegVol for the plans' patch size; a text for each class but the background."""
        settings = read_settings(configuration_manager.configuration)
        return SegVolNetwork(
            [int(size) for size in configuration_manager.patch_size],
            settings["vit_patch"],
            num_output_channels - 1,
            settings["text_dimension"],
            num_input_channels,
            **{key.removeprefix("vit_"): settings[key] for key in NETWORK_SETTINGS},
        )

    def initialize(self) -> None:
        """nnU-Net's, then the texts into the network; a checkpoint brings its own."""
        super().initialize()
        network = self.bare_network()
        assert isinstance(network, SegVolNetwork)
        network.text_embeddings.copy_(self.texts.embeddings[0])
        source = self.settings["text_source"]
        window, patch = list(network.window), list(network.patch)
        self.print_to_log_file(f"window {window}, patch {patch}: {np.prod(network.grid)} tokens")
        self.print_to_log_file(f"text: {source['encoder']}, template {source['template']}", *self.texts.notes)

    def on_train_start(self) -> None:
        """SegVol's weights, if any, then what all our trainers start with."""
        if not self.was_initialized:
            self.initialize()
        if self.settings["segvol_weights"] is not None and self.current_epoch == 0:
            self.print_to_log_file(load_segvol_weights(Path(self.settings["segvol_weights"]), self.bare_network()))
            if not self.settings["as_segvol"]:
                self.print_to_log_file(
                    "WARNING: SegVol's weights know points in its own frame; set as_segvol to true to keep what they "
                    "have learned of points and boxes"
                )
        super().on_train_start()

    def _do_i_compile(self) -> bool:
        """Never: how many questions there are differs from step to step, and each number would compile anew."""
        return False

    def _build_loss(self) -> nn.Module:
        """Of the validation patches, which are asked for all organs by text; training's is the same for each mask."""
        self.prompted_loss = PromptedLoss()
        return PromptedByText(self.label_manager.foreground_labels, self.label_manager.ignore_label)

    def configure_optimizers(self):
        """AdamW with warm-up and half a cosine."""
        return adamw(self, self.network.parameters(), WarmupCosine)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none to switch."""

    # --- data --------------------------------------------------------------------------------------------------------

    def get_tr_and_val_datasets(self):
        """Some training cases are the whole volume."""
        train, val = super().get_tr_and_val_datasets()
        share = self.settings["whole_share"]
        return (SometimesWhole(train, self.configuration_manager.patch_size, share) if share else train), val

    # --- one step ----------------------------------------------------------------------------------------------------

    def learn(self, batch: dict) -> dict:
        """One step of the optimiser on questions about the batch."""
        images = batch["data"].to(self.device, non_blocking=True)
        questions, masks, labelled = self.ask(batch["target"])
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device.type) if self.device.type == "cuda" else nullcontext():
            answers = self.network(images, [question.to(self.device) for question in questions])
        losses = []
        for question, answer, mask in zip(questions, answers, masks):
            known = None if labelled is None else labelled[question.image].to(self.device)
            losses.append(self.prompted_loss(answer, mask.to(self.device), known))
        loss = torch.stack(losses).mean()
        if self.is_ddp:  # what no question needed in this step has a gradient of 0, for which the others wait
            loss = loss + 0 * sum(parameter.sum() for parameter in self.network.parameters())
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)  # the schedule clips before the step
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy()}

    def ask(self, target: Tensor) -> tuple[list[Prompts], list[Tensor], Tensor | None]:
        """Questions about a batch, drawn from its labels.

        An organ that is not there can be asked for by text only. Each combination of prompts is one question about all
        images that have what it asks for. What nobody labelled may be the organ: no negative point lies there.

        Args:
            target: [B, 1, ...], label map.

        Returns:
            Questions, the masks [P, 1, ...] that answer them, and where it is known [B, 1, ...] (None: everywhere).
        """
        settings = self.settings
        rng = np.random.default_rng(np.random.randint(2**31))  # nnU-Net's generator decides
        labels = target[:, 0].cpu().numpy()
        chosen = self._choose_organs(labels, rng)
        count = settings["combinations_per_step"]
        drawn = [COMBINATIONS[i] for i in sorted(rng.choice(len(COMBINATIONS), count, replace=False))]
        there = [pair for pair in chosen if pair[2].any()]
        if not there or (len(there) < len(chosen) and ("text",) not in drawn):
            drawn = [("text",), *(kinds for kinds in drawn if there and kinds != ("text",))]
        ignore = self.label_manager.ignore_label
        labelled = None if ignore is None else (target != ignore).cpu()
        known = None if labelled is None else labelled[:, 0].numpy()
        questions, masks = [], []
        for kinds in drawn:
            pairs = chosen if kinds == ("text",) else there
            questions.append(self._question(kinds, pairs, rng, known))
            masks.append(torch.from_numpy(np.stack([mask for _, _, mask in pairs]))[:, None])
        return questions, masks, labelled

    def _choose_organs(self, labels: np.ndarray, rng: np.random.Generator) -> list[tuple[int, int, np.ndarray]]:
        """(image, organ, its mask) for each question; labels [B, ...]."""
        organs = self.label_manager.foreground_labels
        chosen = []
        for image, label_map in enumerate(labels):
            values = set(np.unique(label_map).tolist())
            present = [row for row, label in enumerate(organs) if label in values]
            absent = [row for row in range(len(organs)) if row not in present]
            for _ in range(self.settings["organs_per_image"]):
                rows = absent if not present or (absent and rng.random() < self.settings["absent_share"]) else present
                row = int(rng.choice(rows))
                chosen.append((image, row, label_map == organs[row]))
        return chosen

    def _question(
        self,
        kinds: tuple[str, ...],
        pairs: list[tuple[int, int, np.ndarray]],
        rng: np.random.Generator,
        known: np.ndarray | None,
    ) -> Prompts:
        """One question in one way about each (image, organ, mask); known: bool [B, ...], None for everywhere."""
        settings = self.settings
        text = points = labels = boxes = None
        if "text" in kinds:
            text = torch.tensor([row for _, row, _ in pairs])
        if "points" in kinds:
            most = settings["positive_points"], settings["negative_points"]
            drawn = [
                sample_points(mask, rng, *most, None if known is None else known[image]) for image, _, mask in pairs
            ]
            points, labels = (torch.from_numpy(np.stack(each)) for each in zip(*drawn))
        if "box" in kinds:
            found = []
            for _, _, mask in pairs:
                box = box_of(mask)
                assert box is not None
                found.append(grow_box(box, rng, settings["box_growth"], mask.shape))
            boxes = torch.from_numpy(np.stack(found)).float()
        return Prompts(torch.tensor([image for image, _, _ in pairs]), text, points, labels, boxes)
