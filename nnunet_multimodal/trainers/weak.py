"""What the trainers that learn from scribbles share: the partial loss, unlabelled padding, honest validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunet_multimodal.data.drawn import DrawnCases
from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.losses import GatedCRFLoss, MultiViewCRFLoss, PartialCrossEntropyLoss, ramp_up
from nnunet_multimodal.losses.weak import Regulariser, WeakLoss
from nnunet_multimodal.trainers.base import MultimodalTrainer
from nnunet_multimodal.trainers.checkpoints import readable_checkpoint, write_whole
from nnunet_multimodal.trainers.dense import dense_validation
from nnunet_multimodal.trainers.schedule import adamw

DENSE_LABELS = "labelsTr_dense"  # beside labelsTr; `nnunet_multimodal scribbles import` fills it
STATE = "nnunet_multimodal"  # key of a checkpoint: what a method must know to go on, beyond the network
CRF_SETTINGS: dict[str, Any] = {
    "crf_kernels": [{"weight": 1.0, "sigma_xy": 6.0, "sigma_intensity": 0.1}],
    "crf_radius": 5,  # of the window, in voxels
    "crf_spacing_aware": False,  # in 3d: distances in units of the finest spacing instead of voxels
}


class WeakTrainer(MultimodalTrainer):
    """A trainer whose labels are scribbles: nnU-Net's ignore label is what nobody drew.

    A method gives a ``regulariser`` (a term of the probabilities and the image), or a ``weak_loss``, or overrides
    ``training_loss`` where it needs more than the network's output.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **MultimodalTrainer.settings_defaults,
        "optimizer": "sgd",  # nnU-Net's, or "adamw" (set initial_lr with it): poly by the step, with a warm-up
        "warmup_epochs": 5,  # of adamw; at most a tenth of the training
        "gradient_clip": 12.0,  # nnU-Net's
        "reduction": "mean",  # of the partial cross-entropy; "sum" is CmFNet's formula, for rates near 1e-5
        "ramp_up": 0.1,  # share of the training in which the regulariser grows to its weight
        "supervise_deep": False,  # thin scribbles vanish on the lower scales
    }
    loss: WeakLoss | Any

    # --- settings and checks -----------------------------------------------------------------------------------------

    @property
    def deep_supervision(self) -> bool:  # type: ignore[override]
        """Off unless the setting turns it on."""
        return self.settings["supervise_deep"]

    def check_dataset(self) -> None:
        """Scribbles: an ignore label, no regions, and no masked normalisation, which nnU-Net gets wrong with them."""
        name, settings = self.plans_manager.dataset_name, self.settings
        if settings["optimizer"] not in ("sgd", "adamw"):
            raise UsageError(f"optimizer: expected 'sgd' or 'adamw', found {settings['optimizer']!r}.")
        if settings["reduction"] not in ("mean", "sum"):
            raise UsageError(f"reduction: expected 'mean' or 'sum', found {settings['reduction']!r}.")
        if not 0 <= settings["ramp_up"] <= 1:
            raise UsageError(f"ramp_up: expected a share of the training, 0 to 1; found {settings['ramp_up']!r}.")
        if not self.label_manager.has_ignore_label:
            raise DataProblem(
                f"{name} has labels {list(self.dataset_json['labels'])} and no label named 'ignore'; "
                f"{type(self).__name__} trains on scribbles, where 'ignore' is what nobody drew. Make such a data set: "
                "nnunet_multimodal scribbles import"
            )
        if self.label_manager.has_regions:
            raise DataProblem(
                f"{name} has regions; a scribble belongs to one class. Give each class a label of its own, then "
                "nnunet_multimodal scribbles import"
            )
        # Its mask is "not drawn as background", not "not black": unlabelled black voxels count in mean and deviation,
        # but not at prediction, where there are no labels.
        if any(self.configuration_manager.use_mask_for_norm):
            raise DataProblem(
                f"{name}: the plans normalise within a mask (use_mask_for_norm), which nnU-Net takes from the labels: "
                "with scribbles it is another one in training than at prediction. Set use_mask_for_norm to false in "
                f"{self.plans_manager.plans_name}.json, configuration {self.configuration_name}, then run "
                "nnUNetv2_preprocess again."
            )

    # --- network, loss, optimiser ------------------------------------------------------------------------------------

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The plans' network; without deep supervision its unused heads wait for no gradient, as distributed training
        would have them do."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        if not enable_deep_supervision:
            freeze_unused_heads(network.decoder)
        return network

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """nnU-Net switches it on after validation, also where it was off."""
        super().set_deep_supervision_enabled(enabled and self.enable_deep_supervision)

    def regulariser(self) -> Regulariser | None:
        """(probabilities [B, C, ...], image [B, channels, ...]) -> number, weighted; the default has none."""
        return None

    def weak_loss(self) -> nn.Module:
        """Loss (output, target, image); without the image, in validation, it judges what is drawn."""
        return WeakLoss(self.partial_loss(), self.regulariser(), self.scales())

    def scales(self) -> list[float] | None:
        """Weights of the maps of deep supervision, finest first, as nnU-Net has them; None without it."""
        if not self.enable_deep_supervision:
            return None
        halves = 0.5 ** np.arange(len(self._get_deep_supervision_scales()))
        halves[1:][-1:] = 0.0
        weights: list[float] = (halves / halves.sum()).tolist()
        return weights

    def partial_loss(self) -> PartialCrossEntropyLoss:
        """Cross-entropy of what is drawn."""
        return PartialCrossEntropyLoss(self.label_manager.ignore_label, self.settings["reduction"])

    def crf(self, coarser: Sequence[int] = (1, 1, 1)) -> Regulariser:
        """The gated CRF of ``CRF_SETTINGS``: in the slice for 2d, from three sides for 3d.

        Args:
            coarser: by how much the grid that it is given is coarser than the plans' along Z, Y, X.

        Raises:
            UsageError: kernels or radius are not what the loss takes.
        """
        settings = self.settings
        try:
            if len(self.configuration_manager.patch_size) == 2:
                return GatedCRFLoss(settings["crf_kernels"], settings["crf_radius"])
            spacing = np.asarray(self.configuration_manager.spacing, dtype=float) * coarser
            apart = (spacing / spacing.min()).tolist() if settings["crf_spacing_aware"] else None
            return MultiViewCRFLoss(settings["crf_kernels"], settings["crf_radius"], apart)
        except (TypeError, ValueError) as error:
            raise UsageError(f"crf_kernels and crf_radius: {error}") from error

    def _build_loss(self) -> nn.Module:
        return self.weak_loss()

    def configure_optimizers(self):
        """nnU-Net's SGD, or AdamW."""
        if self.settings["optimizer"] == "sgd":
            return super().configure_optimizers()
        return adamw(self, self.network.parameters())

    # --- data --------------------------------------------------------------------------------------------------------

    def get_tr_and_val_datasets(self):
        """nnU-Net's, with drawn background kept apart from padding."""
        train, val = super().get_tr_and_val_datasets()
        return DrawnCases(train), DrawnCases(val)

    # --- one step and one epoch --------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1."""
        return (self.current_epoch + self.step / self.num_iterations_per_epoch) / self.num_epochs

    @property
    def ramp(self) -> float:
        """How far the regulariser has grown, 0 to 1."""
        return ramp_up(self.progress, self.settings["ramp_up"])

    def training_loss(self, image: Tensor, target: Tensor | list[Tensor], batch: dict) -> Tensor:
        """What one step minimises; image and target are on the device.

        In a cascade the previous stage's labels lie behind the images; no regulariser may take them for brightness.
        """
        loss: Tensor = self.loss(self.network(image), target, image[:, : len(self.channel_names)])
        return loss

    def after_step(self) -> None:
        """For what follows the weights, such as a teacher."""

    def learn(self, batch: dict) -> dict:
        """nnU-Net's step, whose loss also sees the image; notes whether anything was drawn in the batch."""
        image = batch["data"].to(self.device, non_blocking=True)
        given = batch["target"]
        if isinstance(given, list):
            target: Any = [each.to(self.device, non_blocking=True) for each in given]
        else:
            target = given.to(self.device, non_blocking=True)
        self.loss.ramp = self.ramp
        self.optimizer.zero_grad(set_to_none=True)
        # nnU-Net's rule: autocast on GPUs only.
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            loss = self.training_loss(image, target, batch)
        clip = self.settings["gradient_clip"]
        if self.grad_scaler is None:
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), clip)
            self.optimizer.step()
        else:
            self.grad_scaler.scale(loss).backward()
            self.grad_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), clip)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        self.after_step()
        parts = {name: float(value) for name, value in self.loss.parts.items()}
        return {"loss": loss.detach().cpu().numpy(), **parts, "undrawn": self.nothing_drawn(given)}

    def nothing_drawn(self, target: Tensor | list[Tensor]) -> float:
        """1 where every voxel of the batch is unlabelled, else 0."""
        finest = target if isinstance(target, Tensor) else target[0]  # [B, 1 or more, ...], drawn labels first
        return float(bool((finest[:, 0] == self.label_manager.ignore_label).all()))

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Logs the parts of the loss, and the batches that had nothing to say (faults.md row 29)."""
        super().on_train_epoch_end(train_outputs)
        names = [name for name in train_outputs[0] if name not in ("loss", "undrawn")]
        means = {name: float(np.mean([each[name] for each in train_outputs])) for name in names}
        if len(means) > 1:
            terms = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
            self.print_to_log_file(f"train_loss is made of {terms} (ramp {self.loss.ramp:.2f})")
        self._log_undrawn(train_outputs, "training", "; they teach nothing of what is drawn")

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's step, by what is drawn."""
        undrawn = self.nothing_drawn(batch["target"])  # nnU-Net's step writes into the target
        return super().validation_step(batch) | {"undrawn": undrawn}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """nnU-Net's pseudo Dice; it counts drawn voxels only."""
        super().on_validation_epoch_end(val_outputs)
        self._log_undrawn(val_outputs, "validation", "")

    def _log_undrawn(self, outputs: list[dict], where: str, what: str) -> None:
        found = [each["undrawn"] for each in outputs]
        if self.is_ddp:
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, found)
            found = [each for rank in of_ranks for each in rank]
        if any(found):
            self.print_to_log_file(f"nothing was drawn in {int(sum(found))} of {len(found)} {where} batches{what}")

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a method must know to go on and the network does not hold; kept in the checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what ``state`` gave, or ``{}`` from a checkpoint without it, after the network has its weights."""

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint with ``state`` in it, written whole."""
        write_whole(Path(filename), self._write_checkpoint)

    def _write_checkpoint(self, filename: str) -> None:
        super().save_checkpoint(filename)
        state = self.state()
        if state and Path(filename).exists():  # not on other ranks, nor with checkpointing off
            content = torch.load(filename, map_location="cpu", weights_only=False)
            torch.save({**content, STATE: state}, filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's loading, and ``state``."""
        super().load_checkpoint(filename_or_checkpoint)
        path, _ = readable_checkpoint(Path(str(filename_or_checkpoint)))  # the one that was loaded
        self.load_state(torch.load(path, map_location=self.device, weights_only=False).get(STATE, {}))

    # --- validation of the whole training ----------------------------------------------------------------------------

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's validation, then the same predictions against dense labels, where there are any."""
        super().perform_actual_validation(save_probabilities)
        if self.local_rank != 0:
            return
        self.print_to_log_file(
            "The Mean Validation Dice above is nnU-Net's: it counts the voxels that were drawn, and no others."
        )
        if not nnUNet_raw.is_set():
            self.print_to_log_file("No dense Dice: nnUNet_raw is not set.")
            return
        dense = Path(join(nnUNet_raw, self.plans_manager.dataset_name, DENSE_LABELS))
        found = dense_validation(
            Path(join(self.output_folder, "validation")),
            dense,
            self.do_split()[1],
            self.dataset_json["file_ending"],
            self.label_manager.foreground_labels,
            self.plans_manager.image_reader_writer_class(),
        )
        if found.cases:
            labels = self.dataset_json["labels"].items()  # nnU-Net takes a list of one for its id
            names = {value[0] if isinstance(value, (list, tuple)) else value: name for name, value in labels}
            of_class = ", ".join(f"{names[label]} {dice:.4f}" for label, dice in found.of_class.items())
            self.print_to_log_file(f"Dense Dice: {found.mean:.4f} ({of_class}) of {len(found.cases)} cases")
        elif not dense.is_dir():
            self.print_to_log_file(
                f"No dense Dice: {dense} does not exist. With dense labels of validation cases there, "
                "nnUNetv2_train ... --val measures it."
            )
        for case, why in found.left_out.items() if dense.is_dir() else ():
            self.print_to_log_file(f"WARNING: {case} is not in the dense Dice: {why}")


def freeze_unused_heads(decoder: Any) -> None:
    """nnU-Net's decoder has a head for each scale; without deep supervision the finest alone is used."""
    for head in decoder.seg_layers[:-1]:
        head.requires_grad_(False)
