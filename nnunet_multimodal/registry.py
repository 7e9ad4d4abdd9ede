"""Which trainers this package ships: plain data, from which the command line, nnU-Net's lookup and the tests are fed.

Nothing here imports torch, so that ``list`` and nnU-Net's question "is this name one of yours?" cost nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from nnunet_multimodal.errors import UsageError

_SCRIBBLES = (
    "scribbles, with nnU-Net's ignore label for what nobody drew; made with `nnunet_multimodal scribbles import`"
)
_CROSSMR_PAPER = "CrossMR (All You Need Is a Reference: cross-modality referring segmentation for abdominal MRI)"

# Nine digits are enough for anybody, and keep int() and file names far from their limits.
_LENGTH = re.compile(r"(?P<stem>.+)_(?:(?P<epochs>[1-9][0-9]{0,8})epochs|(?P<one>1)epoch)", re.DOTALL)


@dataclass(frozen=True)
class TrainerEntry:
    """One trainer: where its class lives, and what a user has to know before choosing it."""

    name: str
    module: str
    paper: str
    dataset: str  # what the data set must look like, and the command that makes it so
    differs: str  # from the stock nnUNetTrainer
    ablations: Mapping[str, str] = field(default_factory=dict)  # word behind the name -> what it leaves out or adds

    @property
    def names(self) -> tuple[str, ...]:
        """The trainer's own name, then those of its ablations; each is a class in ``module``."""
        return (self.name, *(f"{self.name}_{word}" for word in self.ablations))


_ENTRIES = (
    TrainerEntry(
        name="nnUNetTrainerCrossMR",
        module="nnunet_multimodal.trainers.crossmr",
        paper=_CROSSMR_PAPER,
        dataset=(
            "channels target, reference, then one noNorm scribble channel per organ in label order; "
            "made with `nnunet_multimodal convert crossmr`"
        ),
        differs=(
            "the scribbled points of the reference image become tokens; each organ's own queries attend to them and to "
            "the target image, and answer with that organ's mask. Trained on pairs made from one image by two "
            "independent intensity augmentations, with AdamW"
        ),
        ablations={
            "noVisualTokens": "The queries do not see the tokens of the scribbled reference.",
            "noOrganMatch": "Any query may be matched to any organ, not only those of the organ's own block.",
            "noPairedAug": "Target and reference are the same image, under the stock intensity transforms.",
            "visualAcrossBatch": "An organ's tokens are drawn from the scribbles of the whole batch.",
        },
    ),
    TrainerEntry(
        name="nnUNetTrainerCrossMR_openSet",
        module="nnunet_multimodal.trainers.open_set",
        paper=f"{_CROSSMR_PAPER}: its task for organs without labels, which is ours, by a space-time memory network",
        dataset="as nnUNetTrainerCrossMR; made with `nnunet_multimodal convert crossmr`",
        differs=(
            "what a scribble says is remembered for each place of the reference and read by the target's places; one "
            "organ at a time, whichever it is. Half of what training asks for are structures found without labels, and "
            "some images are painted. At prediction any organ may be scribbled, labelled in training or not"
        ),
    ),
    TrainerEntry(
        name="nnUNetTrainerContrastAug",
        module="nnunet_multimodal.trainers.contrast_aug",
        paper=f"{_CROSSMR_PAPER}: its target-like augmentation alone",
        dataset="any nnU-Net data set, as it is",
        differs=(
            "stock network and loss; the paper's intensity chain that makes an image look like another modality, "
            "strengthened, in place of the stock intensity augmentation"
        ),
    ),
    TrainerEntry(
        name="nnUNetTrainerMulModSeg",
        module="nnunet_multimodal.trainers.mulmodseg",
        paper="MulModSeg (unpaired CT and MR: modality-conditioned text embedding and alternating training)",
        dataset=(
            "one image channel and a table of which case is of which modality; made with "
            "`nnunet_multimodal convert mixed`, or `convert table` for a data set that you have"
        ),
        differs=(
            "each class's last convolutions are computed from the image and a frozen text embedding of modality and "
            "class; whole batches of one modality in turn. The network tells the modality itself, or is told by "
            "`nnunet_multimodal predict`"
        ),
        ablations={
            "noText": "The stock network without text, trained in alternation.",
            "noALT": "Batches mix the modalities.",
            "CTonly": "Trained on the CT cases of a mixed data set alone.",
            "MRonly": "Trained on the MR cases of a mixed data set alone.",
        },
    ),
    TrainerEntry(
        name="nnUNetTrainerCmFNet",
        module="nnunet_multimodal.trainers.cmfnet",
        paper="CmFNet (cross-modal fusion network: weak supervision by scribbles on registered CT and MR)",
        dataset=(
            "two registered image channels, or one, and the label `ignore` for what nobody drew; made with "
            "`nnunet_multimodal scribbles import`"
        ),
        differs=(
            "a V-Net branch for each image and one that fuses their features and answers. What nobody drew is "
            "regularised: by a CRF on both images, and by the branches' agreement. At prediction one image may be "
            "missing: `nnunet_multimodal predict --missing MR`"
        ),
        ablations={
            "SSL": "Scribbles alone: neither the images nor the branches regularise.",
            "SSL_IMR": "The images regularise (CRF), the branches need not agree.",
            "SSL_IMC": "The branches have to agree, without a CRF.",
            "noCFE": "No extraction below the coarsest level that both branches have.",
            "noCFF": "Features of the branches are concatenated, without the fusing convolution.",
        },
    ),
    TrainerEntry(
        name="nnUNetTrainerPartialCE",
        module="nnunet_multimodal.trainers.partial_ce",
        paper="CmFNet's baselines for training from scribbles, as in WSL4MIS (Luo et al., MICCAI 2022)",
        dataset=_SCRIBBLES,
        differs=(
            "partial cross-entropy: what is drawn is learned, the rest is free. No deep supervision; padding is "
            "unlabelled. The validation ends with the Dice against dense labels, where there are any"
        ),
        ablations={
            "CRF": "Neighbours that look alike are of one class (gated CRF).",
            "EM": "The network is to be sure of itself (entropy minimisation).",
            "TV": "Borders are to be short (total variation).",
            "MS": "A class is to be of one intensity, and its borders short (Mumford-Shah).",
        },
    ),
    TrainerEntry(
        name="nnUNetTrainerDMSPS",
        module="nnunet_multimodal.trainers.dmsps",
        paper="DMSPS (Han et al., Medical Image Analysis 2024), its first stage",
        dataset=_SCRIBBLES,
        differs=(
            "as nnUNetTrainerPartialCE, with a second decoder behind dropout; a random mixture of both answers is the "
            "soft pseudo label of each. The first decoder predicts"
        ),
    ),
    TrainerEntry(
        name="nnUNetTrainerUSTM",
        module="nnunet_multimodal.trainers.ustm",
        paper="USTM (Liu et al., Pattern Recognition 2022)",
        dataset=_SCRIBBLES,
        differs=(
            "as nnUNetTrainerPartialCE, with a teacher: the moving average of the network, which answers several times "
            "for noisy images. Where it is sure, the network follows it"
        ),
    ),
    TrainerEntry(
        name="nnUNetTrainerScribble2Label",
        module="nnunet_multimodal.trainers.scribble2label",
        paper="Scribble2Label (Lee and Jeong, MICCAI 2020)",
        dataset=_SCRIBBLES,
        differs=(
            "as nnUNetTrainerPartialCE; every few epochs the training cases are predicted, and where the average of "
            "these predictions is sure, it is the label. Needs disk: 2 bytes x classes x voxels of all training cases"
        ),
    ),
    TrainerEntry(
        name="nnUNetTrainerMRSegmentator",
        module="nnunet_multimodal.trainers.mrsegmentator",
        paper="MRSegmentator (arXiv 2405.06463): its training in cycles of proposal and correction",
        dataset=(
            "one image channel that is not called CT, of CT, MR or both, and the reorienting reader; made with "
            "`nnunet_multimodal relabel train`, `convert mixed` or `convert plain`"
        ),
        differs=(
            "nothing is ever mirrored, and left is left in every array; folds by modality where there is the table. A "
            "starting model of other classes gives what has the same name; in `relabel train`, each fold starts from "
            "its own weights of the cycle before"
        ),
    ),
    TrainerEntry(
        name="nnUNetTrainerSegVol",
        module="nnunet_multimodal.trainers.segvol",
        paper="SegVol (Du et al., NeurIPS 2024), trained as in SegEVOLution",
        dataset="any 3d nnU-Net data set with labels (no regions), as it is",
        differs=(
            "a vision transformer that is asked for one organ at a time, by text, points, a box or two of these, drawn "
            "from the labels. nnUNetv2_predict asks for every organ by text; `nnunet_multimodal predict --text | "
            "--points | --box` asks for what you say, with --zoom first coarsely"
        ),
    ),
    TrainerEntry(
        name="nnUNetTrainerLoRA",
        module="nnunet_multimodal.trainers.lora",
        paper="SegEVOLution (adapting a CT model to MRI by LoRA)",
        dataset="images of the new modality, in plans made from a trained model by `nnunet_multimodal adapt`",
        differs=(
            "the network of the trained model is frozen; factors of low rank beside its layers learn, and its output "
            "layers. A few per cent of the parameters, in a file of their own with `adapt --export`; `adapt --merge` "
            "makes a stock model of it"
        ),
    ),
    TrainerEntry(
        name="nnUNetTrainerMoA",
        module="nnunet_multimodal.trainers.moa",
        paper="SegEVOLution (mixture of adapters)",
        dataset=(
            "as nnUNetTrainerLoRA, from a model that z-scores; with a modality table it may hold several modalities"
        ),
        differs=(
            "each new modality has adapters of its own, and the trained model's own modality has none: its images are "
            "answered exactly as before. The network tells the modality itself, or is told by "
            "`nnunet_multimodal predict`"
        ),
        ablations={"learned": "The shares of two adapters and of the identity are learned from the image."},
    ),
    TrainerEntry(
        name="nnUNetTrainerContextPrior",
        module="nnunet_multimodal.trainers.context_prior",
        paper="SegEVOLution's context priors, after Hermes (Gao et al., CVPR 2024)",
        dataset=(
            "a table of which case is of which modality, and, where cases are annotated in part, `case_labels`; made "
            "with `nnunet_multimodal convert mixed` (`--partial`) or `convert table`"
        ),
        differs=(
            "learned tokens of all classes and of the modality look at the deep features, and these at them; then the "
            "tokens move the weights of the last convolution. A starting model's answers are where training begins. "
            "Classes that a case does not annotate have no part in its loss"
        ),
        ablations={
            "multiplicative": "The tokens give the last convolution's weights alone, as in Hermes.",
            "sigmoid": "Each class is a task of its own; what a case does not annotate is a null task, as in Hermes.",
            "noModality": "No tokens of modalities; needs no table.",
            "sharedTokens": "One pool of tokens for all stages.",
        },
    ),
    TrainerEntry(
        name="nnUNetTrainerScribble",
        module="nnunet_multimodal.trainers.scribble",
        paper=f"{_CROSSMR_PAPER}: its baseline nnUNet-Scribble",
        dataset="image, then one noNorm scribble channel per organ; made with `nnunet_multimodal convert scribble`",
        differs=(
            "stock network and loss; the scribbles are further input channels, drawn anew in every training sample and "
            "left alone by intensity augmentation"
        ),
    ),
)

TRAINERS: dict[str, TrainerEntry] = {entry.name: entry for entry in _ENTRIES}


def split_length(name: str) -> tuple[str, int | None]:
    """``NAME_50epochs`` -> (``NAME``, 50); a name without a length -> (name, None)."""
    match = _LENGTH.fullmatch(name)
    if match is None:
        return name, None
    return match["stem"], int(match["epochs"] or match["one"])


def parse_trainer_name(name: str) -> tuple[TrainerEntry, str | None, int | None] | None:
    """Read ``NAME[_ablation][_Nepochs]``; ``_1epoch`` is allowed because nnU-Net has nnUNetTrainer_1epoch.

    Returns:
        (entry, ablation, epochs), or None for a name that is not ours: nnU-Net asks for any name, which is no error.
    """
    stem, epochs = split_length(name)
    for entry in TRAINERS.values():
        if stem == entry.name:
            return entry, None, epochs
        word = stem.removeprefix(f"{entry.name}_")
        if word != stem and word in entry.ablations:
            return entry, word, epochs
    return None


def suggest(name: str) -> str | None:
    """The shipped name closest to a mistyped one, with the length that was asked for; None if nothing is close."""
    stem, epochs = split_length(name)
    by_lower_case = {known.lower(): known for entry in TRAINERS.values() for known in entry.names}
    close = difflib.get_close_matches(stem.lower(), by_lower_case, n=1, cutoff=0.7)
    if not close:
        return None
    return by_lower_case[close[0]] + (f"_{epochs}epochs" if epochs else "")


def is_stock(name: str) -> bool:
    """Whether it is nnU-Net's own trainer, perhaps of another length: nnUNetTrainer, nnUNetTrainer_250epochs."""
    return split_length(name)[0] == "nnUNetTrainer"


def require_trainer(name: str) -> TrainerEntry:
    """The entry of a trainer that the user named; UsageError with the nearest name for one that does not exist."""
    parsed = parse_trainer_name(name)
    if parsed is None:
        near = suggest(name)
        hint = f" Did you mean {near}?" if near else ""
        raise UsageError(f"Unknown trainer '{name}'.{hint} Run: nnunet_multimodal list")
    return parsed[0]
