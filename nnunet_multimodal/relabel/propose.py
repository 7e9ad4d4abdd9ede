"""The next batch: predict the pool, choose, enter it into the ledger, make the packages; each can be interrupted."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_multimodal.conversion.dataset import write_json
from nnunet_multimodal.conversion.images import compare_geometry, read_labels, read_volume
from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError
from nnunet_multimodal.relabel.ledger import POOL, PROPOSED, Row
from nnunet_multimodal.relabel.packages import unfinished_batches, write_batch
from nnunet_multimodal.relabel.pool import checked_hash, nifti_of, remember_hash
from nnunet_multimodal.relabel.predicting import FoldPredictor, How, Job, finished, label_table, load, predict
from nnunet_multimodal.relabel.project import SURELY_LEFT, Project, remove_partials
from nnunet_multimodal.relabel.ranking import most_uncertain, pool_in_order

CHUNK = 32  # cases between two looks into the ledger
TODO = "todo.json"


@dataclass
class Outcome:
    """What ``propose`` did.

    Attributes:
        batch: its folder; None where nothing could be proposed.
        cases: how many are in it.
        failed: case -> what is wrong.
        messages: what the user should know.
    """

    batch: Path | None = None
    cases: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


def current_model(project: Project) -> dict[str, Any]:
    """Raises UsageError where there is none yet."""
    model = project.model()
    if model is None:
        raise UsageError(
            f"{project.folder} has no model to propose with. Train one from the labels that you have "
            f"(nnunet_multimodal relabel train {shlex.quote(str(project.folder))}), or start with one: init --model."
        )
    return model


def how_to_predict(
    project: Project, model: dict[str, Any], device: str, mirroring: bool, step_size: float, processes: int
) -> How:
    folds = tuple(json.loads(model["folds"]))
    return How(project.model_folder(model), folds, model["checkpoint"], device, mirroring, step_size, processes)


def propose(
    project: Project,
    count: int,
    order: str,
    who: str,
    how: Callable[[dict[str, Any]], How],
    candidates: int | None = None,
) -> Outcome:
    """Proposes the next batch.

    Args:
        project: open.
        count: cases in the batch.
        order: a key of ``ORDERS``.
        who: enters it into the ledger.
        how: the model's row -> how to predict with it.
        candidates: predict and rank only so many of the pool, drawn by chance.

    Raises:
        UsageError: there is no model.
    """
    with project.working("propose", "propose"):
        project.tidy()
        outcome = Outcome()
        left = unfinished_batches(project)
        if left:
            for batch in left:
                outcome.batch = write_batch(project, batch)
            outcome.cases = project.ledger.value("SELECT count(*) FROM proposals WHERE batch = ?", left[-1])
            outcome.messages.append(f"batch {left[-1]} had been chosen before; its packages are now complete")
            return outcome
        model = current_model(project)
        _forget_older_predictions(project, model["id"])
        session = _Session(project, model, how(model), outcome)
        session.collect_finished()
        seed = project.ledger.setting("seed") + 1000 * project.ledger.value("SELECT count(*) FROM batches")
        pool = pool_in_order(project.ledger, order, seed, candidates if order == "uncertainty" else None)
        if order == "uncertainty":
            session.predict_all(pool)
            among = None if candidates is None else set(pool)
            chosen = session.ready([row["id"] for row in most_uncertain(project.ledger, model["id"], count, among)])
        else:
            chosen = session.first_ready(pool, count)
        if not chosen:
            outcome.messages.append("the pool is empty" if not pool else "none of these cases could be predicted")
            return outcome
        batch = _enter(project, model["id"], chosen, order, who)
        outcome.batch, outcome.cases = write_batch(project, batch), len(chosen)
        return outcome


class _Session:
    """Predictions of one model, as far as they are needed."""

    def __init__(self, project: Project, model: dict[str, Any], how: How, outcome: Outcome) -> None:
        self.project, self.model, self.how, self.outcome = project, model["id"], how, outcome
        self.folder = project.predictions(self.model)
        self.predictor: FoldPredictor | None = None

    def collect_finished(self) -> None:
        """Enters what other processes (``--part``) have predicted, or we before we were interrupted."""
        if not self.folder.is_dir():
            return
        remove_partials(self.folder, SURELY_LEFT)
        ledger = self.project.ledger
        known = {row[0] for row in ledger.all("SELECT case_id FROM predictions WHERE model = ?", self.model)}
        ids = {row["name"]: row["id"] for row in ledger.all("SELECT id, name FROM cases WHERE state = ?", POOL)}
        new = [path.stem for path in self.folder.glob("*.json") if path.stem in ids and ids[path.stem] not in known]
        for start in range(0, len(new), 1000):
            self._enter([(ids[name], name) for name in new[start : start + 1000]])

    def _enter(self, cases: Sequence[tuple[int, str]]) -> None:
        ledger = self.project.ledger
        with ledger.transaction():
            for case_id, name in cases:
                record = finished(self.folder, name)
                row = ledger.one("SELECT * FROM cases WHERE id = ?", case_id)
                if record is None or row is None or row["image_hash"] not in (None, record["image_hash"]):
                    continue
                ledger.run("INSERT OR REPLACE INTO predictions VALUES (?, ?, ?)", self.model, case_id, record["score"])

    def predict_all(self, ids: Sequence[int]) -> None:
        """Predicts those that are not yet."""
        query = "SELECT case_id FROM predictions WHERE model = ?"
        known = {row[0] for row in self.project.ledger.all(query, self.model)}
        missing = [case_id for case_id in ids if case_id not in known]
        if not missing:
            return
        with tqdm(total=len(missing), desc="predicting", unit="case", disable=None) as bar:
            for start in range(0, len(missing), CHUNK):
                self._predict(missing[start : start + CHUNK], bar)

    def _predict(self, ids: Sequence[int], bar: Any = None) -> None:
        project, jobs, of_name = self.project, [], {}
        for case_id in ids:
            row = project.ledger.one("SELECT * FROM cases WHERE id = ?", case_id)
            assert row is not None
            try:
                job, seen = job_of(project, row)
            except (DataProblem, FileNotFoundError) as problem:
                self.fail(row["name"], problem)
                continue
            with project.ledger.transaction():
                remember_hash(project.ledger, case_id, job.image_hash, seen)
            jobs.append(job)
            of_name[job.name] = case_id
        if self.predictor is None and jobs:
            self.predictor = load(self.how, self.outcome.messages)
            self._say_labels(self.predictor)

        def done(name: str, score: float) -> None:
            self._enter([(of_name[name], name)])
            if bar is not None:
                bar.update()

        if self.predictor is not None:
            predict(self.predictor, jobs, self.folder, project.labels, self.how.processes, done, self.fail)

    def _say_labels(self, predictor: FoldPredictor) -> None:
        _, unknown, dropped = label_table(predictor.dataset_json["labels"], self.project.labels)
        if unknown:
            self.outcome.messages.append(f"the model does not know, so never proposes: {', '.join(unknown)}")
        if dropped:
            self.outcome.messages.append(
                f"the model's labels that the project has not are left out: {', '.join(dropped)}"
            )

    def fail(self, name: str, error: Exception) -> None:
        text = str(error) if isinstance(error, MultimodalError) else f"{type(error).__name__}: {error}"
        self.outcome.failed[name] = text

    def first_ready(self, pool: Sequence[int], count: int) -> list[tuple[Row, str, float]]:
        """The first of these that can be predicted."""
        chosen: list[tuple[Row, str, float]] = []
        for start in range(0, len(pool), count):
            if len(chosen) >= count:
                break
            part = pool[start : start + count]
            self.predict_all(part)
            chosen += self.ready(part)
        return sorted(chosen[:count], key=lambda entry: -entry[2])

    def ready(self, ids: Sequence[int]) -> list[tuple[Row, str, float]]:
        """Case, mask in the store and score, of those whose prediction is there; a lost file is predicted again."""
        result = []
        for case_id in ids:
            row = self.project.ledger.one(
                "SELECT c.*, p.score AS score FROM cases c JOIN predictions p ON p.case_id = c.id "
                "WHERE c.id = ? AND p.model = ?",
                case_id,
                self.model,
            )
            if row is None:
                continue
            path = self.folder / f"{row['name']}.nii.gz"
            if not path.is_file():
                self._predict([case_id])
            try:
                image_hash, _ = checked_hash(row)
                image = read_volume(nifti_of(row, image_hash, self.project.images), nan_to=0.0, reorthonormalize=True)
                mask = compare_geometry(image, read_labels(path, reorthonormalize=True), "prediction")
            except DataProblem as problem:
                self.fail(row["name"], problem)
                continue
            result.append((row, self.project.masks.put(mask.data, image), row["score"]))
        return result


def job_of(project: Project, row: Row) -> tuple[Job, tuple[int, int]]:
    """What predicting a case needs, and the stamp of its image.

    Raises:
        DataProblem: the image is gone, was changed, or cannot be read.
    """
    image_hash, seen = checked_hash(row)
    return Job(row["name"], nifti_of(row, image_hash, project.images), image_hash, row["modality"]), seen


def _enter(project: Project, model: int, chosen: Sequence[tuple[Row, str, float]], order: str, who: str) -> int:
    """The batch, in one transaction; its number."""
    ledger = project.ledger
    with project.changing("propose", patient=True), ledger.transaction():
        batch = ledger.run("INSERT INTO batches (model, ordering) VALUES (?, ?)", model, order)
        operation = ledger.new_operation()
        for row, mask, score in chosen:
            if ledger.value("SELECT state FROM cases WHERE id = ?", row["id"]) != POOL:
                continue  # accepted or rejected while we predicted
            proposal = ledger.run(
                "INSERT INTO proposals (batch, case_id, mask, score) VALUES (?, ?, ?, ?)", batch, row["id"], mask, score
            )
            changes = {"state": PROPOSED, "proposal": proposal}
            details = {"batch": batch, "model": model, "score": score}
            ledger.change_case(row["id"], changes, "propose", who, operation, details)
    return batch


def _forget_older_predictions(project: Project, model: int) -> None:
    """Predictions of the pool by models before this one take space and serve nobody; proposals are in the store."""
    parent = project.predictions(model).parent
    for folder in parent.glob("predictions_*"):
        number = folder.name.rpartition("_")[2]
        if number.isdecimal() and int(number) < model:
            shutil.rmtree(folder, ignore_errors=True)


# --- shards for several machines -------------------------------------------------------------------------------------


def write_todo(project: Project, device: str, mirroring: bool, step_size: float) -> int:
    """Lists what is to be predicted for machines that cannot open the ledger; how many cases.

    SQLite's WAL does not work over network file systems; one file that is only read does.
    """
    with project.working("propose", "propose --shards"):
        model = current_model(project)
        how = how_to_predict(project, model, device, mirroring, step_size, 0)
        rows = project.ledger.all(
            "SELECT * FROM cases WHERE state = ? AND id NOT IN (SELECT case_id FROM predictions WHERE model = ?) "
            "ORDER BY id",
            POOL,
            model["id"],
        )
        folder = project.predictions(model["id"])
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "model": model["id"],
            "how": {**how.__dict__, "folder": str(how.folder), "folds": list(how.folds)},
            "labels": project.labels,
            "cases": [
                {key: row[key] for key in ("name", "image", "kind", "size", "mtime_ns", "image_hash", "modality")}
                for row in rows
            ],
        }
        write_json(folder / TODO, content)
        return len(rows)


def predict_part(folder: Path, part: int, of: int, processes: int, device: str) -> Outcome:
    """Predicts every ``of``-th case of the list, beginning with the ``part``-th; opens no ledger.

    Args:
        folder: of the project.
        part, of: 1 to ``of``.
        processes: see ``How``.
        device: of this machine.

    Raises:
        UsageError: there is no list.
    """
    lists = sorted(folder.glob(f"cache/predictions_*/{TODO}"))
    if not lists:
        raise UsageError(
            f"{folder} has no list of cases to predict. Make it on one machine first: nnunet_multimodal relabel "
            f"propose {shlex.quote(str(folder))} --shards {of}"
        )
    output = lists[-1].parent
    content = json.loads(lists[-1].read_text(encoding="utf-8"))
    outcome = Outcome()
    how = replace(
        How(**{**content["how"], "folder": Path(content["how"]["folder"]), "folds": tuple(content["how"]["folds"])}),
        processes=processes,
        device=device,
    )
    mine = [row for row in content["cases"][part - 1 :: of] if finished(output, row["name"]) is None]

    def fail(name: str, error: Exception) -> None:
        outcome.failed[name] = str(error) if isinstance(error, MultimodalError) else f"{type(error).__name__}: {error}"

    def jobs() -> Iterator[Job]:
        for row in mine:
            try:
                image_hash, _ = checked_hash(row)
                cache = folder.resolve() / "cache" / "images"
                yield Job(row["name"], nifti_of(row, image_hash, cache), image_hash, row["modality"])
            except (DataProblem, FileNotFoundError) as problem:
                fail(row["name"], problem)

    listed = [*jobs()]
    with tqdm(total=len(listed), desc=f"part {part}/{of}", unit="case", disable=None) as bar:

        def done(name: str, score: float) -> None:
            outcome.cases += 1
            bar.update()

        if listed:
            predict(load(how, outcome.messages), listed, output, content["labels"], processes, done, fail)
    return outcome
