"""Scribble2Label: pseudo labels from what the network has thought of each training case, averaged over time."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor
from tqdm import tqdm

from nnunet_multimodal.data.drawn import DrawnCases
from nnunet_multimodal.data.pseudo_labels import PseudoLabelledCases, PseudoLabels
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.trainers.weak import WeakTrainer


class nnUNetTrainerScribble2Label(WeakTrainer):
    """Where an average over past predictions is sure, it is the label.

    paper: Scribble2Label (Lee and Jeong, MICCAI 2020), for several classes as in WSL4MIS.
    dataset: scribbles, with nnU-Net's ignore label for what nobody drew (``scribbles import``).
    differs: every few epochs all training cases are predicted in tiles, without mirroring, in preprocessed space. The
        averages lie in the fold's folder ``pseudo_labels`` while training goes on, so ``--c`` finds them there; they
        are deleted at its end. The first prediction begins the average, where the code begins with zeros.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **WeakTrainer.settings_defaults,
        "ramp_up": 0.0,
        "pseudo_label_weight": 0.5,
        "pseudo_label_start": 0.1,  # share of the training after which pseudo labels count
        "ensemble_every": 20,  # epochs between predictions of all training cases
        "ensemble_share": 0.2,  # of the newest prediction in the average
        "ensemble_confidence": 0.8,
        "ensemble_step": 0.5,  # of a tile
    }

    def check_dataset(self) -> None:
        """Numbers in their range; no cascade, whose segmentations have the place of the pseudo labels."""
        super().check_dataset()
        settings = self.settings
        if settings["pseudo_label_weight"] < 0:
            raise UsageError(f"pseudo_label_weight: expected at least 0, found {settings['pseudo_label_weight']!r}.")
        for key in ("pseudo_label_start", "ensemble_share", "ensemble_confidence", "ensemble_step"):
            if not 0 <= settings[key] <= 1 or (key in ("ensemble_share", "ensemble_step") and settings[key] == 0):
                raise UsageError(f"{key}: expected a share, 0 to 1; found {settings[key]!r}.")
        if settings["ensemble_every"] < 1:
            raise UsageError(f"ensemble_every: expected at least 1 epoch, found {settings['ensemble_every']!r}.")
        if self.is_cascaded:
            raise UsageError(f"{type(self).__name__} cannot train {self.configuration_name}, a cascade. Take another.")

    @property
    def pseudo(self) -> PseudoLabels:
        """The averages of this training."""
        return PseudoLabels(
            Path(join(self.output_folder, "pseudo_labels")),
            self.settings["ensemble_share"],
            self.settings["ensemble_confidence"],
            self.label_manager.ignore_label,
        )

    def get_tr_and_val_datasets(self):
        """Training cases bring their pseudo labels."""
        train, val = super().get_tr_and_val_datasets()
        return PseudoLabelledCases(train.dataset, self.pseudo), DrawnCases(val.dataset)

    def on_train_start(self) -> None:
        """A new training knows nothing of an earlier one; one that was stopped while it looked does so now."""
        if self.current_epoch == 0 and self.local_rank == 0:
            self.pseudo.clear()
        super().on_train_start()
        self.look_if_due()

    def training_loss(self, image: Tensor, target: Tensor | list[Tensor], batch: dict) -> Tensor:
        """What is drawn, and where nobody drew, what the average is sure of; target [B, 2, ...]."""
        maps = [target] if isinstance(target, Tensor) else target
        drawn = [one[:, :1] for one in maps]
        output = self.network(image)
        loss: Tensor = self.loss(output, drawn[0] if isinstance(target, Tensor) else drawn)
        if self.progress < self.settings["pseudo_label_start"]:
            return loss
        ignore = self.label_manager.ignore_label
        pseudo = maps[0][:, 1:].where(drawn[0] == ignore, torch.full_like(drawn[0], ignore))
        term = self.loss.partial(output if isinstance(output, Tensor) else output[0], pseudo)
        self.loss.parts["pseudo"] = term.detach()
        return loss + self.ramp * self.settings["pseudo_label_weight"] * term

    def on_epoch_end(self) -> None:
        """nnU-Net's, and every few epochs a new look at the training cases."""
        super().on_epoch_end()
        self.look_if_due()

    def look_if_due(self) -> None:
        """Once after every so many epochs, also where the checkpoint that training goes on from is older."""
        epoch = self.current_epoch
        due = 0 < epoch < self.num_epochs and epoch % self.settings["ensemble_every"] == 0
        if due and self.pseudo.looked_at() < epoch:
            self.look_again()

    def look_again(self) -> None:
        """Predicts the training cases and takes the answers into the averages; each rank does its share."""
        begin = perf_counter()
        cases = self.do_split()[0]
        if self.is_ddp:
            cases = cases[self.local_rank :: dist.get_world_size()]
        dataset = self.dataset_class(self.preprocessed_dataset_folder, cases)
        predictor = nnUNetPredictor(
            self.settings["ensemble_step"], use_mirroring=False, device=self.device, allow_tqdm=False
        )
        predictor.manual_initialization(
            self.bare_network(), self.plans_manager, self.configuration_manager, None, self.dataset_json,
            type(self).__name__, None,
        )  # fmt: skip
        self.set_deep_supervision_enabled(False)
        self.network.eval()
        shares = []
        for case in tqdm(dataset.identifiers, "pseudo labels", leave=False, disable=None):
            image = torch.from_numpy(dataset.load_case(case)[0][:])
            logits = predictor.predict_sliding_window_return_logits(image)
            shares.append(self.pseudo.add(case, logits.float().softmax(0).cpu().numpy()))
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        if self.is_ddp:
            dist.barrier()
        if self.local_rank == 0:
            self.pseudo.note_look(self.current_epoch)
        self.print_to_log_file(
            f"pseudo labels: {100 * sum(shares) / max(1, len(shares)):.1f} % of the voxels of {len(shares)} training "
            f"cases have one; {perf_counter() - begin:.0f} s"
        )

    def on_train_end(self) -> None:
        """nnU-Net's; the averages have served."""
        super().on_train_end()
        if self.local_rank == 0:
            self.pseudo.clear()
