"""CmFNet: two registered modalities, trained from scribbles, fused in a third branch."""

from __future__ import annotations

from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_multimodal.errors import DataProblem, UsageError
from nnunet_multimodal.losses.cmfnet import CmFNetLoss
from nnunet_multimodal.losses.coarser import Coarser
from nnunet_multimodal.networks.cmfnet import CmFNet, levels_of
from nnunet_multimodal.networks.vnet import Layout
from nnunet_multimodal.trainers.settings import read_settings
from nnunet_multimodal.trainers.weak import CRF_SETTINGS, WeakTrainer

PAPER = (3, 4)  # down-samplings of the CT and the MR branch


class nnUNetTrainerCmFNet(WeakTrainer):
    """Scribbles on registered pairs: each image has its branch, a third one fuses their features and answers.

    paper: CmFNet (cross-modal fusion network for weakly supervised segmentation).
    dataset: two registered image channels (or one, which then feeds both branches), and an ignore label for what
        nobody drew (``scribbles import``).
    differs: V-Net branches on the plans' resolutions; what is not drawn follows both images (multi-view CRF; in 2d the
        CRF of the slice) and what the other branches say.
    """

    settings_defaults: ClassVar[dict[str, Any]] = {
        **{key: value for key, value in WeakTrainer.settings_defaults.items() if key != "supervise_deep"},
        "optimizer": "adamw",  # the paper: Adam
        "initial_lr": 1e-3,  # the paper's 1e-5 is for a sum over voxels: set reduction with it
        "dropout": 0.5,
        "downsamplings": [],  # of the CT and the MR branch; empty: the paper's 3 and 4, or what the plans have
        "cff": True,
        "cfe": True,
        "lambda_ct": 0.2,
        "lambda_mr": 0.2,
        "alpha_ct": 0.8,
        "alpha_mr": 0.8,
        "detach": False,  # y_mm in the consistency of the branches
        **CRF_SETTINGS,
        "crf_resize": 2,  # the CRF's grid is so much coarser, along axes that are not much coarser already
        # written by the trainer, for prediction:
        "channels": [],
    }
    settled_settings = ("downsamplings", "channels", "cff", "cfe")
    loss: CmFNetLoss

    # --- settings and checks -----------------------------------------------------------------------------------------

    @property
    def deep_supervision(self) -> bool:  # type: ignore[override]
        """Each branch has one output."""
        return False

    def complete_settings(self, dataset_json: dict, plans: dict, configuration: str) -> None:
        """Which channel is whose, and how deep each branch is."""
        settings = self.settings
        names = [name for _, name in sorted(dataset_json["channel_names"].items(), key=lambda item: int(item[0]))]
        if len(names) > 2 or "nonorm" in map(str.casefold, names):
            raise DataProblem(
                f"{plans['dataset_name']} has channels {', '.join(names)}; {type(self).__name__} fuses two registered "
                "images, such as CT and MR (of one image, both branches see the same)."
            )
        ct = next((index for index, name in enumerate(names) if name.casefold() == "ct"), 0)
        settings["channels"] = [ct, 1 - ct] if len(names) == 2 else [0, 0]
        layout = layout_of(PlansManager(plans).get_configuration(configuration))
        if not settings["downsamplings"]:
            most = len(layout.features) - 1
            settings["downsamplings"] = [min(PAPER[0], most - 1), min(PAPER[1], most)]
        depths, levels = settings["downsamplings"], len(layout.features)
        right = len(depths) == 2 and all(type(depth) is int and depth > 0 for depth in depths)
        if not right or levels_of((depths[0], depths[1]), settings["cfe"]) > levels:
            raise UsageError(
                f"downsamplings: expected two numbers from 1, of the CT and the MR branch, found {depths}. The plans "
                f"have {levels} resolutions, so the larger one can be {levels - 1}, and the smaller one {levels - 2}."
            )

    def check_dataset(self) -> None:
        """Scribbles, no cascade, whose first stage no branch would look at, and weights that make sense."""
        super().check_dataset()
        settings = self.settings
        if self.is_cascaded:
            raise UsageError(f"{type(self).__name__} has no cascade: train 2d, 3d_fullres or 3d_lowres.")
        for key in ("lambda_ct", "lambda_mr", "alpha_ct", "alpha_mr"):
            if settings[key] < 0:
                raise UsageError(f"{key}: expected a weight of 0 or more; found {settings[key]!r}.")
        if not 0 <= settings["dropout"] < 1:
            raise UsageError(f"dropout: expected a share from 0 to below 1; found {settings['dropout']!r}.")
        if settings["crf_resize"] < 1:
            raise UsageError(f"crf_resize: expected 1 (as it is), 2, ...; found {settings['crf_resize']!r}.")
        self.coarser_crf()

    # --- network and loss --------------------------------------------------------------------------------------------

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """Three V-Net branches with the plans' features, kernels and strides."""
        settings = read_settings(configuration_manager.configuration)
        return CmFNet(
            layout_of(configuration_manager),
            num_output_channels,
            tuple(settings["channels"]),
            tuple(settings["downsamplings"]),
            settings["dropout"],
            settings["cff"],
            settings["cfe"],
        )

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none to switch."""

    def coarser_crf(self) -> nn.Module:
        """The CRF where slices keep their thickness and pixels are ``crf_resize`` times as large."""
        spacing = self.configuration_manager.spacing
        factors = [self.settings["crf_resize"] if size < 2 * min(spacing) else 1 for size in spacing]
        return Coarser(self.crf(factors), factors)

    def weak_loss(self) -> nn.Module:
        """Scribbles, images and branches."""
        settings = self.settings
        return CmFNetLoss(
            self.partial_loss(),
            self.coarser_crf(),
            (settings["lambda_ct"], settings["lambda_mr"]),
            (settings["alpha_ct"], settings["alpha_mr"]),
            tuple(settings["channels"]),
            settings["detach"],
        )


def layout_of(configuration: ConfigurationManager) -> Layout:
    """The plans' resolutions, whatever network they are made for."""
    network = configuration.network_arch_init_kwargs
    ndim = len(configuration.patch_size)

    def each_axis(sizes: list[Any]) -> tuple[tuple[int, ...], ...]:
        return tuple((size,) * ndim if isinstance(size, int) else tuple(size) for size in sizes)

    return Layout(
        tuple(network["features_per_stage"]), each_axis(network["kernel_sizes"]), each_axis(network["strides"])
    )


class nnUNetTrainerCmFNet_SSL(nnUNetTrainerCmFNet):
    """Scribbles alone."""

    fixed_settings: ClassVar[dict[str, Any]] = dict.fromkeys(("lambda_ct", "lambda_mr", "alpha_ct", "alpha_mr"), 0.0)


class nnUNetTrainerCmFNet_SSL_IMR(nnUNetTrainerCmFNet):
    """Scribbles and images: the branches need not agree."""

    fixed_settings: ClassVar[dict[str, Any]] = {"alpha_ct": 0.0, "alpha_mr": 0.0}


class nnUNetTrainerCmFNet_SSL_IMC(nnUNetTrainerCmFNet):
    """Scribbles and branches: no CRF."""

    fixed_settings: ClassVar[dict[str, Any]] = {"lambda_ct": 0.0, "lambda_mr": 0.0}


class nnUNetTrainerCmFNet_noCFE(nnUNetTrainerCmFNet):
    """No extraction below the coarsest common level: the fused features there are the bottleneck."""

    fixed_settings: ClassVar[dict[str, Any]] = {"cfe": False}


class nnUNetTrainerCmFNet_noCFF(nnUNetTrainerCmFNet):
    """Features of the branches are concatenated, not fused by a convolution."""

    fixed_settings: ClassVar[dict[str, Any]] = {"cff": False}
