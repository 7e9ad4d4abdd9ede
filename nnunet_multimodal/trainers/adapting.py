"""What trainers share that keep a trained model and add to it: nothing frozen may be left without weights."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from nnunet_multimodal.data.modality import first_names
from nnunet_multimodal.errors import UsageError
from nnunet_multimodal.networks.adapters import MixtureHead
from nnunet_multimodal.networks.lora import ALL_BUT_HEADS, HEADS, count_parameters, keep_statistics, plain_names
from nnunet_multimodal.networks.mixture import start_heads
from nnunet_multimodal.trainers.base import MultimodalTrainer, origin_of
from nnunet_multimodal.trainers.checkpoints import load_fitting
from nnunet_multimodal.trainers.schedule import adamw
from nnunet_multimodal.trainers.settings import SECTION, fill_settings
from nnunet_multimodal.trainers.transfer import HEADS as HEAD_NAMES
from nnunet_multimodal.trainers.transfer import Names, StartingModel, fit_by_name, names_of

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

    @classmethod
    def fill_section(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        """Fills the plans' section as a training would, without one: enough to build its network."""
        blank = cls.__new__(cls)
        own = plans["configurations"][configuration].get(SECTION, {})
        blank.settings = fill_settings(plans, configuration, cls.settings_defaults, set(own), cls.fixed_settings)
        blank.complete_settings(dataset_json, plans, configuration)

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
        """As every trainer does, into the layers inside; refused if something that is frozen would stay random."""
        lines = start_adapted(self.bare_network(), model, names_of(self.dataset_json), self.plans_manager.plans_name)
        self.print_to_log_file("\n".join(lines))

    def on_train_epoch_start(self) -> None:
        """What is frozen does not gather statistics either."""
        super().on_train_epoch_start()
        keep_statistics(self.bare_network())

    def configure_optimizers(self):
        """AdamW on what learns, with a short warm-up and polynomial decay."""
        learning = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return adamw(self, learning)


def start_adapted(network: nn.Module, model: StartingModel, target: Names, plans_name: str) -> list[str]:
    """Brings a model's weights into the layers inside an adapted network, classes by their names.

    Args:
        network: with factors, as its plans make it.
        model: the one that it adapts.
        target: what the network's channels stand for.
        plans_name: for messages.

    Returns:
        What was loaded, is new, and was skipped, in words.

    Raises:
        UsageError: another architecture, other channels, or new classes for frozen output layers.
    """
    if any(part in key for key in model.weights for part in FACTORS):
        raise UsageError(
            f"{model.file} is an adapted model itself. Make a plain one of it and start from that: "
            "nnunet_multimodal adapt --merge RESULT_FOLDER -o OUT"
        )
    inside = plain_names(network)
    weights = {key: value for key, value in model.weights.items() if key not in set(inside.values())}
    weights |= {own: model.weights[name] for own, name in inside.items() if name in model.weights}
    frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad and HEAD_NAMES not in name}
    wrong = [name for name, p in frozen.items() if name not in weights or weights[name].shape != p.shape]
    if wrong:
        name = wrong[0]
        found = list(weights[name].shape) if name in weights else "nothing"
        raise UsageError(
            f"{model.file} (of {model.trainer or 'an unknown trainer'}) does not fit the network of the plans "
            f"{plans_name}: {len(wrong)} of {len(frozen)} frozen tensors, first {name}: found {found}, expected "
            f"{list(frozen[name].shape)}. The plans have to be made from those of the model. {ADAPT}"
        )
    outputs = target.outputs or ()
    new = [name for name in outputs if name not in (model.names.outputs or ())]
    own_heads = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, MixtureHead))
    still = [name for name, p in network.named_parameters() if HEAD_NAMES in name and not p.requires_grad]
    if new and any(not name.startswith(own_heads) for name in still):
        raise UsageError(
            f"the starting model does not know {first_names(new)}, and its output layers are frozen. Set "
            f"'trained_layers' to {HEADS!r} in the plans' section nnunet_multimodal."
        )
    weights, lines = fit_by_name(weights, model.names, network.state_dict(), target)
    lines = [*origin_of(model), load_fitting(network, weights), *lines]
    start_heads(network, [outputs.index(name) for name in new])
    return lines


def low_rank_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments that ``inject_lora`` and ``inject_adapters`` share."""
    return {
        "rank": settings["rank"],
        "alpha": settings["alpha"],
        "rank_stabilised": settings["rank_stabilised"],
        "layers": settings["adapted_layers"],
    }
