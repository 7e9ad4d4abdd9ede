"""What trainers share that keep a trained model and add to it: nothing frozen may be left without weights."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from nnunet_multimodal.data.modality import first_names
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.networks.lora import ALL_BUT_HEADS, HEADS, count_parameters, keep_statistics, plain_names
from nnunet_multimodal.trainers.base import MultimodalTrainer, origin_of
from nnunet_multimodal.trainers.checkpoints import load_fitting
from nnunet_multimodal.trainers.schedule import WarmupPoly
from nnunet_multimodal.trainers.transfer import HEADS as HEAD_NAMES
from nnunet_multimodal.trainers.transfer import StartingModel, fit_by_name, names_of

ADAPT = "Prepare it: nnunet_multimodal adapt --from RESULT_FOLDER -d DATASET -c CONFIGURATION"
FACTORS = (".lora.", ".adapters.", ".heads.")  # in the names of what our adapted networks add


class AdaptingTrainer(MultimodalTrainer):
    """A trained model that stays as it is, and factors of low rank that learn.

    The network is built adapted, from the plans alone; the starting model's weights go to the layers inside. So a
    checkpoint is complete: it continues and predicts without the starting model.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **MultimodalTrainer.settings_defaults,
        "num_epochs": 100,  # few parameters, and a start near the goal
        "initial_lr": 5e-4,
        "weight_decay": 1e-2,  # AdamW's own
        "warmup_iterations": 50,
        "gradient_clip": 0.5,
        "rank": 8,
        "alpha": 8.0,
        "rank_stabilised": True,  # scale alpha / sqrt(rank); false: alpha / rank
        "adapted_layers": ALL_BUT_HEADS,  # regular expression, searched for in names of layers
        "trained_layers": HEADS,  # trained whole; "" for none
    }
    settled_settings: ClassVar[tuple[str, ...]] = (
        "rank",
        "alpha",
        "rank_stabilised",
        "adapted_layers",
        "trained_layers",
    )

    def initialize(self) -> None:
        """nnU-Net's, then how much of the network learns."""
        super().initialize()
        trainable, original = count_parameters(self.bare_network())
        self.print_to_log_file(
            f"trainable: {trainable:,} parameters, {100 * trainable / original:.2f} % of the model's {original:,}"
        )

    def on_train_start(self) -> None:
        """A frozen network without a starting model would stay random."""
        if self.settings["starting_model"] is None and self.current_epoch == 0:
            raise UsageError(
                f"{type(self).__name__} adapts a trained model, and the plans {self.plans_manager.plans_name} name "
                f"none ('starting_model' in the section nnunet_multimodal). {ADAPT}"
            )
        super().on_train_start()

    def _start_from(self, model: StartingModel) -> None:
        """As every trainer does, into the layers inside; refused if something that is frozen would stay random.

        Raises:
            UsageError: another architecture, other channels, or new classes for frozen output layers.
        """
        network = self.bare_network()
        if any(part in key for key in model.weights for part in FACTORS):
            raise UsageError(
                f"{model.file} is an adapted model itself. Make a plain one of it and start from that: "
                "nnunet_multimodal adapt --merge RESULT_FOLDER -o OUT"
            )
        inside = plain_names(network)
        weights = {key: value for key, value in model.weights.items() if key not in set(inside.values())}
        weights |= {own: model.weights[name] for own, name in inside.items() if name in model.weights}
        self._require_frozen(network, model, weights)
        own, target = network.state_dict(), names_of(self.dataset_json)
        weights, lines = fit_by_name(weights, model.names, own, target)
        self.print_to_log_file("\n".join([*origin_of(model), load_fitting(network, weights), *lines]))
        self.started(network, model, target.outputs or ())

    def _require_frozen(self, network: nn.Module, model: StartingModel, weights: dict[str, torch.Tensor]) -> None:
        frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad and HEAD_NAMES not in name}
        wrong = [name for name, p in frozen.items() if name not in weights or weights[name].shape != p.shape]
        if wrong:
            name = wrong[0]
            found = list(weights[name].shape) if name in weights else "nothing"
            raise UsageError(
                f"{model.file} (of {model.trainer or 'an unknown trainer'}) does not fit the network of the plans "
                f"{self.plans_manager.plans_name}: {len(wrong)} of {len(frozen)} frozen tensors, first {name}: found "
                f"{found}, expected {list(frozen[name].shape)}. The plans have to be made from those of the model. "
                f"{ADAPT}"
            )
        new = self.new_classes(model)
        if new and not self.settings["trained_layers"]:
            raise UsageError(
                f"the starting model does not know {first_names(new)}, and its output layers are frozen. Set "
                f"'trained_layers' to {HEADS!r} in the plans' section nnunet_multimodal."
            )

    def new_classes(self, model: StartingModel) -> list[str]:
        """Classes of this data set that the starting model has no output for; all, if its outputs have no names."""
        return [name for name in names_of(self.dataset_json).outputs or () if name not in (model.names.outputs or ())]

    def started(self, network: nn.Module, model: StartingModel, classes: tuple[str, ...]) -> None:
        """What is left to do when the starting model's weights are in the network."""

    def on_train_epoch_start(self) -> None:
        """What is frozen does not gather statistics either."""
        super().on_train_epoch_start()
        keep_statistics(self.bare_network())

    def configure_optimizers(self):
        """AdamW on what learns, with a short warm-up and polynomial decay."""
        learning = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=self.initial_lr, weight_decay=self.weight_decay)
        schedule = WarmupPoly(
            optimizer,
            self.initial_lr,
            self.num_epochs,
            self.num_iterations_per_epoch,
            self.settings["warmup_iterations"],
            self.settings["gradient_clip"],
        )
        return optimizer, schedule


def low_rank_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments that ``inject_lora`` and ``inject_adapters`` share."""
    return {
        "rank": settings["rank"],
        "alpha": settings["alpha"],
        "rank_stabilised": settings["rank_stabilised"],
        "layers": settings["adapted_layers"],
    }
