"""A phantom data set on disk: subjects x contrasts, images and labels, the same bytes for the same seed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from nnunet_multimodal.data.phantom.acquire import acquire, draw_position
from nnunet_multimodal.data.phantom.anatomy import EXTRA_ORGANS, ORGANS, make_anatomy
from nnunet_multimodal.data.phantom.signal import CONTRASTS, on_same_grid
from nnunet_multimodal.data.phantom.tissues import vary
from nnunet_multimodal.errors import EnvironmentProblem, UsageError

BODY = (380.0, 280.0, 186.0)
"""Field of view of the default size, mm."""


@dataclass(frozen=True)
class PhantomOptions:
    """What a phantom data set is made of; the same options give the same files.

    Attributes:
        contrasts: names from ``CONTRASTS``.
        seed: of everything.
        spacing: mm of a voxel; each contrast has its own multiple of it.
        extent: mm of the field of view along x, y, z.
        noise: times each contrast's own noise; 0 for none.
        motion: times the usual displacement between sessions; 0 for none.
        organs: labelled beside liver, kidneys and spleen: from ``EXTRA_ORGANS``. They are in the images anyway, but
            for lesions, which are there only if they are named here.
        same_grid: all contrasts in one position on one grid, as registered images of a patient are.
    """

    contrasts: tuple[str, ...] = tuple(CONTRASTS)
    seed: int = 0
    spacing: tuple[float, float, float] = (1.6, 1.6, 6.0)
    extent: tuple[float, float, float] = BODY
    noise: float = 1.0
    motion: float = 1.0
    organs: tuple[str, ...] = ()
    same_grid: bool = False

    @property
    def labels(self) -> dict[str, int]:
        """Number of each labelled organ in the label maps: the four first, then ``organs`` in their order."""
        return {**ORGANS, **{name: len(ORGANS) + 1 + i for i, name in enumerate(self.organs)}}


def subject_name(index: int) -> str:
    """``phantom_007``."""
    return f"phantom_{index:03d}"


def scan_subject(index: int, options: PhantomOptions) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """A subject in every contrast: (contrast, image int16 [X, Y, Z], labels uint8 [X, Y, Z], affine to RAS+ mm).

    Which contrasts are asked for changes nothing about any of them.
    """
    rng = np.random.default_rng([options.seed, index])
    fine = [s * share for s, share in zip(options.spacing, (0.8, 0.8, 1 / 3))]  # finer than any contrast
    margins = (24.0, 24.0, 60.0)  # what motion may bring into view: most along the body
    reach = [e + m * max(1.0, options.motion) for e, m in zip(options.extent, margins)]
    anatomy = make_anatomy(rng, reach, fine, lesion="lesion" in options.organs)
    tissues = vary(rng)
    numbers = _label_numbers(options)
    for name in options.contrasts:
        contrast = on_same_grid(CONTRASTS[name]) if options.same_grid else CONTRASTS[name]
        session = np.random.default_rng([options.seed, index, zlib.crc32((contrast.session or name).encode())])
        position = draw_position(session, options.motion, options.spacing)
        scan = np.random.default_rng([options.seed, index, zlib.crc32(f"scan {name}".encode())])
        image, organs, affine = acquire(
            anatomy, contrast, position, tissues, options.extent, options.spacing, scan, options.noise
        )
        yield name, image, numbers[organs], affine


def write_phantom(output: Path, subjects: int, options: PhantomOptions, processes: int = 1) -> Iterator[str]:
    """Write OUT/images/CONTRAST/SUBJECT.nii.gz, OUT/labels/... and OUT/phantom.json; yields each subject that is done.

    Files that are there already are kept: an interrupted run goes on. ``output`` must not hold a phantom of other
    options (see ``read_options``).
    """
    output.mkdir(parents=True, exist_ok=True)
    finished = set(_finished_subjects(output, options))
    _describe(output, options, finished)
    jobs = [(index, str(output), options) for index in range(subjects)]
    for name in _run(jobs, min(processes, subjects)):
        finished.add(name)
        _describe(output, options, finished)
        yield name


def _run(jobs: list[tuple[int, str, PhantomOptions]], processes: int) -> Iterator[str]:
    if processes < 2:
        yield from map(_write_subject, jobs)
        return
    # an executor notices when a process was killed; a multiprocessing.Pool would wait for it for ever
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_ignore_interrupt)
    try:
        for future in as_completed([pool.submit(_write_subject, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "A process was killed, most likely because memory ran out. Use one (-j 1), a coarser --spacing, or a "
            "smaller --size; what is finished is kept."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    """Ctrl-C goes to all processes of the terminal; the first one tells the others to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _describe(output: Path, options: PhantomOptions, subjects: set[str]) -> None:
    description = {
        **json_options(options),
        "subjects": sorted(subjects),
        "labels": {"background": 0, **options.labels},
        "axes": "voxels x, y, z to the patient's right, front, head (RAS+), mm",
    }
    _write_whole(
        output / "phantom.json",
        lambda path: path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8"),
    )


def json_options(options: PhantomOptions) -> dict[str, Any]:
    """The options as phantom.json has them."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(options)))
    if not options.same_grid:
        del content["same_grid"]  # a later option: the files of the older ones stay what they are, to the byte
    return content


def read_description(output: Path) -> dict[str, Any] | None:
    """phantom.json of a folder, or None where there is none; UsageError where it is something else."""
    path = output / "phantom.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}); choose another folder.") from error
    if not isinstance(content, dict) or "contrasts" not in content:
        raise UsageError(f"{path} does not describe a phantom; choose another folder.")
    return content


def _label_numbers(options: PhantomOptions) -> np.ndarray:
    """From the anatomy's numbers to those of the label maps, where organs that nobody asked for are background."""
    numbers = np.zeros(len(ORGANS) + len(EXTRA_ORGANS) + 1, np.uint8)
    for number in ORGANS.values():
        numbers[number] = number
    for i, name in enumerate(options.organs):
        numbers[len(ORGANS) + 1 + EXTRA_ORGANS.index(name)] = len(ORGANS) + 1 + i
    return numbers


def _finished_subjects(output: Path, options: PhantomOptions) -> list[str]:
    """Those of phantom.json whose files are all there."""
    description = read_description(output)
    named = description.get("subjects", []) if description else []
    return [name for name in named if all(path.is_file() for pair in _places(output, name, options) for path in pair)]


def _places(output: Path, name: str, options: PhantomOptions) -> list[tuple[Path, Path]]:
    """Image and labels of a subject in each contrast."""
    images, labels, file = output / "images", output / "labels", f"{name}.nii.gz"
    return [(images / contrast / file, labels / contrast / file) for contrast in options.contrasts]


def _write_subject(job: tuple[int, str, PhantomOptions]) -> str:
    index, output, options = job
    name = subject_name(index)
    places = _places(Path(output), name, options)
    if all(path.is_file() for pair in places for path in pair):
        return name
    for (_, image, labels, affine), (image_path, labels_path) in zip(scan_subject(index, options), places):
        _write_nifti(image_path, image, affine)
        _write_nifti(labels_path, labels, affine)
    return name


def _write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    nifti = nib.Nifti1Image(voxels, affine)
    nifti.header.set_xyzt_units("mm")
    nifti.set_qform(affine, code=1)
    nifti.set_sform(affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, lambda temporary: nib.save(nifti, temporary))


def _write_whole(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
