"""What a person gets to correct: a folder for each case of a batch, colours for the viewers, and a page of all.

batches/batch_001/index.html            the batch, worst first
batches/batch_001/labels_itksnap.txt    label descriptions for ITK-SNAP
batches/batch_001/labels_slicer.ctbl    colour table for 3D Slicer
batches/batch_001/CASE/image.nii.gz     a link
batches/batch_001/CASE/mask.nii.gz      the proposal: correct this file, and save it under this name
batches/batch_001/CASE/doubt.nii.gz     where the model doubts, in per cent
batches/batch_001/CASE/worst.png        the slices with most doubt
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_multimodal.conversion.dataset import link_or_copy
from nnunet_multimodal.conversion.images import compare_geometry, read_labels, read_volume
from nnunet_multimodal.errors import DataProblem
from nnunet_multimodal.relabel.colours import colour_of, itksnap_labels, slicer_colours
from nnunet_multimodal.relabel.ledger import Row
from nnunet_multimodal.relabel.pool import checked_hash, nifti_of
from nnunet_multimodal.relabel.project import Project
from nnunet_multimodal.relabel.store import sync_folder

MASK, IMAGE, DOUBT, PICTURE = "mask.nii.gz", "image.nii.gz", "doubt.nii.gz", "worst.png"
_TEMPLATE = "batch.html.jinja"


def batch_folder(project: Project, batch: int) -> Path:
    return project.batches / f"batch_{batch:03d}"


def proposals_of(project: Project, batch: int) -> list[Row]:
    """The batch's cases that are still to be corrected, worst first, each with ``proposed`` and ``score``."""
    return project.ledger.all(
        "SELECT c.*, p.mask AS proposed, p.score AS score, p.id AS proposal_id FROM proposals p "
        "JOIN cases c ON c.proposal = p.id WHERE p.batch = ? AND c.state = 'proposed' ORDER BY p.id",
        batch,
    )


def unfinished_batches(project: Project) -> list[int]:
    """Batches of the ledger whose folder is not there: their making was interrupted, or somebody deleted it."""
    rows = project.ledger.all(
        "SELECT DISTINCT p.batch FROM proposals p JOIN cases c ON c.proposal = p.id WHERE c.state = 'proposed'"
    )
    return [row[0] for row in rows if not batch_folder(project, row[0]).is_dir()]


def write_batch(project: Project, batch: int) -> Path:
    """Makes a batch's folder, which appears when it is complete; its path.

    Raises:
        DataProblem: an image is gone or was changed.
    """
    final = batch_folder(project, batch)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        rows = proposals_of(project, batch)
        entries = [_write_package(project, batch, row, partial / row["name"]) for row in rows]
        (partial / "labels_itksnap.txt").write_text(itksnap_labels(project.organs), encoding="utf-8")
        (partial / "labels_slicer.ctbl").write_text(slicer_colours(project.organs), encoding="utf-8")
        (partial / "index.html").write_text(_page(project, batch, entries), encoding="utf-8")
        for folder in (*(partial / row["name"] for row in rows), partial):
            _sync_files(folder)
        os.replace(partial, final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _write_package(project: Project, batch: int, row: Row, folder: Path) -> dict:
    from nnunet_multimodal.relabel.pictures import proposal_picture

    folder.mkdir()
    image_hash, _ = checked_hash(row)
    source = nifti_of(row, image_hash, project.images)
    if source.is_relative_to(project.folder):  # survives when the project is moved
        link_or_copy(Path(os.path.relpath(source, batch_folder(project, batch) / row["name"])), folder / IMAGE)
    else:
        link_or_copy(source, folder / IMAGE)
    shutil.copyfile(project.masks.path(row["proposed"]), folder / MASK)
    image = read_volume(source, nan_to=0.0, reorthonormalize=True)
    mask = project.masks.read(row["proposed"]).data
    doubt = np.zeros_like(mask)
    model = project.ledger.value("SELECT model FROM batches WHERE id = ?", batch)
    predicted = project.predictions(model) / f"{row['name']}.doubt.nii.gz"
    if predicted.is_file():  # gone once a newer model has predicted; the picture then shows the mask alone
        shutil.copyfile(predicted, folder / DOUBT)
        doubt = compare_geometry(image, read_labels(folder / DOUBT, reorthonormalize=True), "doubt").data
    (folder / PICTURE).write_bytes(proposal_picture(image, mask, doubt, project.organs))
    voxel_ml = float(np.prod(image.spacing)) / 1000
    volumes = {name: float((mask == value).sum()) * voxel_ml for name, value in project.organs.items()}
    return {"case": row["name"], "modality": row["modality"], "score": row["score"], "volumes": volumes}


def _page(project: Project, batch: int, entries: Sequence[dict]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    row = project.ledger.one(
        "SELECT m.*, b.ordering FROM batches b JOIN models m ON m.id = b.model WHERE b.id = ?", batch
    )
    assert row is not None
    colours = {name: "rgb({}, {}, {})".format(*colour_of(value)) for name, value in project.organs.items()}
    page: str = environment.get_template(_TEMPLATE).render(
        batch=batch,
        model=dict(row),
        entries=entries,
        organs=project.organs,
        colours=colours,
        project=project.folder.name,
    )
    return page


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def untouched(project: Project, proposed: str, path: Path) -> bool:
    """Whether a package's mask is, byte for byte, what was proposed: nobody has saved it."""
    original = project.masks.path(proposed)
    if not original.is_file():
        raise DataProblem(f"the proposal {original} is gone. Restore it from a backup.")
    return original.stat().st_size == path.stat().st_size and original.read_bytes() == path.read_bytes()
