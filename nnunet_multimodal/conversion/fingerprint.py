"""The fingerprint of a data set of scribbles, with the intensities of what was drawn.

nnU-Net takes every label above 0 for foreground when it collects the intensities by which a CT channel is clipped and
normalised, and ``ignore`` is the highest label. With scribbles that is nearly the whole image, air included: the mean
becomes some -400 HU, the standard deviation some 500, and a contrast of 20 HU a few hundredths of it.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_multimodal.conversion.dataset import write_json
from nnunet_multimodal.conversion.verify import REQUIRED, load_json
from nnunet_multimodal.data.modality import SECTION
from nnunet_multimodal.errors import DataProblem

FILE_NAME = "dataset_fingerprint.json"
SAMPLES = 100_000  # intensities of each case, with replacement, so that all cases count alike as they do in nnU-Net


def write_fingerprint(folder: Path, preprocessed: Path) -> dict[str, dict[str, float]]:
    """Write dataset_fingerprint.json, which ``nnUNetv2_plan_and_preprocess`` then takes instead of making its own.

    It is computed by nnU-Net's own functions, from labels in which ignore is background.

    Args:
        folder: of the raw data set.
        preprocessed: nnUNet_preprocessed.

    Returns:
        mean, std, percentiles... of the intensities of each channel, by its number.

    Raises:
        DataProblem: the data set has no ignore label, no class is drawn in it, or something of it cannot be read.
    """
    content, problems = load_json(folder)
    if content is None:
        raise DataProblem(problems[0])
    look = f"Run: nnunet_multimodal doctor -d {folder.name}"
    if lacking := [key for key in REQUIRED if key not in content]:
        raise DataProblem(f"{folder / 'dataset.json'} lacks {', '.join(lacking)}. {look}")
    ignore = content["labels"].get("ignore")
    if ignore is None:
        raise DataProblem(f"{folder.name} has no ignore label, so nnU-Net's own fingerprint is right.")
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net says which of its variables are not set
        from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
        from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        files = get_filenames_of_train_images_and_targets(str(folder), content) if _has_images(folder) else {}
        if not files:
            raise DataProblem(f"{folder / 'imagesTr'} holds no training image. {look}")
        first = next(iter(files.values()))["images"][0]
        reader = determine_reader_writer_from_dataset_json(content, first, verbose=False)()
    shapes, spacings, sizes, samples = [], [], [], []
    for case, of_case in tqdm(files.items(), desc=f"reading {folder.name}", unit="case", disable=None):
        try:
            images, properties = reader.read_images(of_case["images"])
            labels, _ = reader.read_seg(of_case["label"])
        except Exception as error:  # each reader has errors of its own
            raise DataProblem(f"Cannot read case {case}: {' '.join(str(error).split())} {look}") from error
        data, labels, _ = crop_to_nonzero(images, np.where(labels == ignore, 0, labels))
        drawn, _ = DatasetFingerprintExtractor.collect_foreground_intensities(labels, data, num_samples=SAMPLES)
        shapes.append([int(size) for size in data.shape[1:]])
        spacings.append([float(size) for size in properties["spacing"]])
        sizes.append(float(np.prod(data.shape[1:]) / np.prod(images.shape[1:])))
        samples.append(drawn)
    statistics = {
        str(channel): _statistics(np.concatenate([drawn[channel] for drawn in samples]), folder)
        for channel in range(len(content["channel_names"]))
    }
    target = preprocessed / folder.name / FILE_NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    fingerprint: dict[str, Any] = {
        "spacings": spacings,
        "shapes_after_crop": shapes,
        "foreground_intensity_properties_per_channel": statistics,
        "median_relative_size_after_cropping": float(np.median(sizes)),
        SECTION: {"intensities": "drawn"},  # by which `doctor` knows it
    }
    write_json(target, fingerprint)
    return statistics


def _has_images(folder: Path) -> bool:
    """Whether nnU-Net finds a folder to look for them in."""
    return (folder / "imagesTr").is_dir()


def _statistics(values: np.ndarray, folder: Path) -> dict[str, float]:
    """The figures that nnU-Net stores of a channel."""
    if not len(values):
        raise DataProblem(f"No class is drawn in any case of {folder.name}.")
    low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
    return {
        "mean": float(np.mean(values)),
        "median": float(median),
        "std": float(np.std(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
        "percentile_99_5": float(high),
        "percentile_00_5": float(low),
    }
