"""Ask a SegVol network about a volume: window by window, or all of it at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import Tensor
from torch.nn import functional as F

from nnunet_multimodal.data.whole import resize_image
from nnunet_multimodal.inference.prompts import Located, resized, within
from nnunet_multimodal.networks.segvol import Prompts, SegVolNetwork

ABSENT = -10.0  # logit of a voxel about which no window was asked


@dataclass(frozen=True)
class Question:
    """What is asked for in a volume.

    Attributes:
        text: row of the network's texts; None for no text.
        located: points and box, in the volume.
    """

    text: int | None
    located: Located

    def within(self, begin: Sequence[int], size: Sequence[int]) -> Question | None:
        """The part of it that a window can be asked; None if that says nothing."""
        part = Question(self.text, within(self.located, begin, size))
        return part if part.asks else None

    @property
    def asks(self) -> bool:
        """Whether there is more than points where nothing is."""
        return self.text is not None or self.located.shows

    def prompts(self, device: torch.device) -> Prompts:
        """As the network takes it: one question about one image."""
        text = points = labels = boxes = None
        if self.text is not None:
            text = torch.tensor([self.text], device=device)
        if len(self.located.points):
            points = torch.from_numpy(self.located.points).float().to(device)[None]
            labels = torch.from_numpy(self.located.labels).to(device)[None]
        if self.located.box is not None:
            boxes = torch.from_numpy(self.located.box).float().to(device)[None]
        return Prompts(torch.zeros(1, dtype=torch.long, device=device), text, points, labels, boxes)


# begin of a window in the volume -> what it is asked, one a question; None where it is not asked
Asking = Callable[[tuple[int, ...]], list[Question | None]]


class Asker:
    """A trained SegVol network, its folds and its device.

    Args:
        predictor: nnU-Net's, with a model loaded.
        step_size: of the windows, as a share of a window.

    Attributes:
        windows: how many windows were encoded so far, in all folds.
    """

    def __init__(self, predictor: nnUNetPredictor, step_size: float = 0.5) -> None:
        network = getattr(predictor.network, "_orig_mod", predictor.network)
        assert isinstance(network, SegVolNetwork)
        self.network, self.device, self.step_size = network, predictor.device, step_size
        self.folds: Sequence[Any] = predictor.list_of_parameters
        self.window = network.window
        self.windows = 0

    @torch.inference_mode()
    def whole(self, image: Tensor, questions: Sequence[Question]) -> Tensor:
        """All of a volume as one window, zoomed out.

        Args:
            image: [C, Z, Y, X], preprocessed.
            questions: about it.

        Returns:
            Logits [questions, Z, Y, X], of the volume's own size.
        """
        shape = tuple(image.shape[1:])
        small = resize_image(image, self.window)
        asked = [Question(q.text, resized(q.located, shape, self.window)) for q in questions]
        low = self._mean_of_folds(lambda: torch.stack([a for a in self._ask(small, asked) if a is not None]))
        if shape == self.window:
            return low
        return F.interpolate(low[:, None], size=shape, mode="trilinear", align_corners=False)[:, 0]

    @torch.inference_mode()
    def sliding(
        self, image: Tensor, questions: Sequence[Question], asking: Asking | None = None
    ) -> tuple[Tensor, Tensor]:
        """A volume window by window, blended with nnU-Net's Gaussian.

        Args:
            image: [C, Z, Y, X], preprocessed.
            questions: about it.
            asking: what each window is asked; None: the part of each question that lies in it.

        Returns:
            Logits [questions, Z, Y, X] and bool of the same shape: where a window was asked. Elsewhere it is ABSENT.
        """
        shape = tuple(image.shape[1:])
        before = tuple(max(0, size - length) // 2 for size, length in zip(self.window, shape))
        padding = [(b, max(0, size - length) - b) for b, size, length in zip(before, self.window, shape)]
        padded = F.pad(image, [side for pair in reversed(padding) for side in pair])

        def parts(begin: tuple[int, ...]) -> list[Question | None]:
            return [question.within(begin, self.window) for question in questions]

        ask = parts if asking is None else asking
        steps = compute_steps_for_sliding_window(tuple(padded.shape[1:]), self.window, self.step_size)
        begins = [(z, y, x) for z in steps[0] for y in steps[1] for x in steps[2]]
        weights = compute_gaussian(self.window, 1.0 / 8, 1.0, torch.float32, torch.device("cpu"))
        asked_anywhere = torch.zeros((len(questions), *padded.shape[1:]), dtype=torch.bool)

        def blended() -> Tensor:
            total = torch.zeros((len(questions), *padded.shape[1:]))
            weight = torch.zeros_like(total)
            for begin in begins:
                place = tuple(slice(b, b + size) for b, size in zip(begin, self.window))
                of_volume = tuple(b - lead for b, lead in zip(begin, before))
                wanted = ask(of_volume)
                if not any(question is not None for question in wanted):
                    continue  # nothing to ask: not even encoded
                answers = self._ask(padded[spatial(place)], wanted)
                for row, answer in enumerate(answers):
                    if answer is not None:
                        total[row][place] += answer * weights
                        weight[row][place] += weights
                        asked_anywhere[row][place] = True
            return torch.where(weight > 0, total / weight.clamp(min=torch.finfo(torch.float32).tiny), ABSENT)

        logits = self._mean_of_folds(blended)
        inner = tuple(slice(b, b + length) for b, length in zip(before, shape))
        return logits[spatial(inner)], asked_anywhere[spatial(inner)]

    def _ask(self, image: Tensor, questions: Sequence[Question | None]) -> list[Tensor | None]:
        """image [C, *window] -> logits [*window] on the CPU for each question; None for None."""
        self.windows += 1
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda") if cuda else contextlib.nullcontext():
            features = self.network.embed(image[None].to(self.device))
            return [
                None
                if question is None
                else self.network.answer(features, question.prompts(self.device))[0, 0].float().cpu()
                for question in questions
            ]

    def _mean_of_folds(self, predict: Callable[[], Tensor]) -> Tensor:
        self.network.to(self.device).eval()
        result: Tensor | None = None
        for parameters in self.folds:
            self.network.load_state_dict(parameters)
            found = predict()
            result = found if result is None else result + found
        assert result is not None
        return result / len(self.folds)


def spatial(place: Sequence[slice]) -> tuple[Any, ...]:
    """An index of the last axes, for whatever comes before them."""
    return (..., *place)


def to_labels(
    logits: Tensor, values: Sequence[int], properties: dict[str, Any], plans: Any, configuration: Any
) -> np.ndarray:
    """The label map of an image as read: each voxel is what is surest there, if anything is (p > 0.5).

    Args:
        logits: [organs, Z, Y, X] of the preprocessed image.
        values: label of each.
        properties: nnU-Net's, of the preprocessed case.
        plans, configuration: nnU-Net's managers.

    Returns:
        uint8 or uint16 [Z, Y, X].
    """
    best = labels = None
    for mask, value in zip(logits, values):  # one after the other: on the image's grid they are large
        found = on_image(mask[None], properties, plans, configuration)[0]
        if best is None or labels is None:
            best = np.zeros(found.shape, np.float32)
            labels = np.zeros(found.shape, np.uint8 if max(values) < 256 else np.uint16)
        labels[found > best] = value
        np.maximum(best, found, out=best)
    assert labels is not None
    return labels


def on_image(logits: Tensor, properties: dict[str, Any], plans: Any, configuration: Any) -> np.ndarray:
    """Logits on the grid of the image as read, float32 [organs, Z, Y, X]; ABSENT where nnU-Net cropped it.

    Args:
        logits, properties, plans, configuration: as in ``to_labels``.
    """
    spacing = [properties["spacing"][axis] for axis in plans.transpose_forward]
    cropped = properties["shape_after_cropping_and_before_resampling"]
    resampled = np.asarray(
        configuration.resampling_fn_probabilities(logits, cropped, configuration.spacing, spacing), dtype=np.float32
    )
    full = np.full((len(logits), *properties["shape_before_cropping"]), ABSENT, np.float32)
    full[spatial([slice(*ends) for ends in properties["bbox_used_for_cropping"]])] = resampled
    return full.transpose([0, *(axis + 1 for axis in plans.transpose_backward)])
