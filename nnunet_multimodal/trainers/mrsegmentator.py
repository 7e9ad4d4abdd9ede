"""One network for the organs of CT and MR, trained in cycles of proposal and correction."""

from __future__ import annotations

from nnunet_multimodal.data.modality import first_names
from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.trainers.base import MultimodalTrainer

CONVERT = (
    "Make the data set with nnunet_multimodal relabel train, nnunet_multimodal convert mixed, or nnunet_multimodal "
    "convert plain --channel-name CT_or_MR, and plan it anew."
)


class nnUNetTrainerMRSegmentator(MultimodalTrainer):
    """The stock network, never mirrored, on images of CT and MR that all lie the same way.

    Since MRSegmentator 1.1 nothing is mirrored, which ended its mixing up of left and right; here the reader that turns
    each image to the same axes is required too, because else left is not left in every array. ``starting_model`` in the
    settings takes a model of other classes: what has the same name is taken over (trainers/transfer.py).

    paper: MRSegmentator (arXiv 2405.06463), without its test time: five folds are averaged by nnU-Net already.
    dataset: one image channel that is not called CT (z-score for all), with a reader that reorients.
    differs: no mirroring, in training and at prediction; folds by modality where the data set has the table.
    """

    def check_dataset(self) -> None:
        """One channel, z-scored, of a reorienting reader."""
        where = f"dataset.json of {self.plans_manager.dataset_name}"
        names = self.channel_names
        if len(names) != 1:
            raise DataProblem(
                f"{where} has {len(names)} channels ({first_names(names)}); nnUNetTrainerMRSegmentator takes one, "
                f"for CT and MR alike. {CONVERT}"
            )
        schemes = self.configuration_manager.normalization_schemes
        if schemes != ["ZScoreNormalization"]:
            raise DataProblem(
                f"{where} calls its channel '{names[0]}', so the plans have {schemes[0]}; expected "
                "ZScoreNormalization, which any name but CT, noNorm and the like brings: CT would clip MR to the range "
                f"of CT. {CONVERT}"
            )
        reader = self.plans_manager.plans["image_reader_writer"]
        if "Reorient" not in reader:
            raise DataProblem(
                f"the plans of {self.plans_manager.dataset_name} have the reader {reader}; expected "
                "NibabelIOWithReorient (or SimpleITKIOWithReorient): as files are stored in different orders, left "
                f"would be right in some arrays. {CONVERT}"
            )

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """Stock, but nothing is mirrored, whatever the labels are called."""
        rotation, dummy_2d, initial_patch, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch, None
