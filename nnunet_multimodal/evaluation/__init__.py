"""Metrics per case, organ and modality; what is missing is defined and counted, never dropped."""

from nnunet_multimodal.evaluation.evaluate import evaluate_folders
from nnunet_multimodal.evaluation.labels import Labels
from nnunet_multimodal.evaluation.measures import Measures, measure

__all__ = ["Labels", "Measures", "evaluate_folders", "measure"]
