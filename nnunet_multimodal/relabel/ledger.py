"""The project's memory: one SQLite file, every step a transaction, every change an event that is never deleted.

The table ``cases`` says how things are; ``events`` says how they came to be. Each event holds the fields of its case
(or of the project) before and after, so that undoing is one more event with the two exchanged, and the present follows
from the events alone (:meth:`Ledger.contradictions` compares).

Events are ordered by their number. Times are for people: a clock may go backwards.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError

VERSION = 1
POOL, PROPOSED, ACCEPTED, REJECTED = "pool", "proposed", "accepted", "rejected"
STATES = (POOL, PROPOSED, ACCEPTED, REJECTED)
FIELDS = ("state", "mask", "proposal", "acceptance")  # of a case: what events change and undoing brings back
UNDOABLE = ("propose", "accept", "reject", "train")

_SCHEMA = """
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE cases (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    image TEXT NOT NULL,            -- where it lies; it is never copied or changed
    kind TEXT NOT NULL,             -- nifti, itk or dicom
    size INTEGER NOT NULL,          -- of the file (DICOM: of all), and its time: a quick look whether it has changed
    mtime_ns INTEGER NOT NULL,
    image_hash TEXT,                -- known from the first use on: hashing 100,000 images would take hours
    modality TEXT,
    patient TEXT,
    fold INTEGER,                   -- given with the first training, never changed
    state TEXT NOT NULL DEFAULT 'pool',
    mask TEXT,                      -- the accepted one
    proposal INTEGER REFERENCES proposals,
    acceptance INTEGER              -- the event of it
);
CREATE INDEX cases_state ON cases (state, id);
CREATE TABLE models (
    id INTEGER PRIMARY KEY,
    cycle INTEGER NOT NULL,         -- 0: the one that the project started from
    folder TEXT NOT NULL,
    folds TEXT NOT NULL,
    checkpoint TEXT NOT NULL
);
CREATE TABLE predictions (          -- of the pool; the masks lie in files that a newer model makes worthless
    model INTEGER NOT NULL REFERENCES models,
    case_id INTEGER NOT NULL REFERENCES cases,
    score REAL NOT NULL,
    PRIMARY KEY (model, case_id)
) WITHOUT ROWID;
CREATE INDEX predictions_score ON predictions (model, score DESC);
CREATE TABLE batches (id INTEGER PRIMARY KEY, model INTEGER NOT NULL REFERENCES models, ordering TEXT NOT NULL);
CREATE TABLE proposals (
    id INTEGER PRIMARY KEY,
    batch INTEGER NOT NULL REFERENCES batches,
    case_id INTEGER NOT NULL REFERENCES cases,
    mask TEXT NOT NULL,
    score REAL NOT NULL
);
CREATE INDEX proposals_batch ON proposals (batch);
CREATE TABLE cycles (
    number INTEGER PRIMARY KEY,
    state TEXT NOT NULL,            -- begun, trained or abandoned
    options TEXT NOT NULL
);
CREATE TABLE cycle_cases (          -- what a cycle was trained on
    cycle INTEGER NOT NULL REFERENCES cycles,
    case_id INTEGER NOT NULL REFERENCES cases,
    mask TEXT NOT NULL,
    image_hash TEXT NOT NULL,
    fold INTEGER NOT NULL,
    PRIMARY KEY (cycle, case_id)
) WITHOUT ROWID;
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    operation INTEGER NOT NULL,     -- one run of a command
    time TEXT NOT NULL,
    kind TEXT NOT NULL,
    who TEXT NOT NULL,
    case_id INTEGER REFERENCES cases,
    undoes INTEGER REFERENCES events,
    before TEXT,
    after TEXT,
    details TEXT NOT NULL
);
CREATE INDEX events_case ON events (case_id, id);
CREATE INDEX events_operation ON events (operation);
CREATE UNIQUE INDEX events_undoes ON events (undoes) WHERE undoes IS NOT NULL;
"""

Row = sqlite3.Row


class Ledger:
    """An open ledger; ``with ledger.transaction():`` around every change.

    Args:
        path: of the SQLite file.
        create: make it, unless it is there.

    Raises:
        DataProblem: it is no ledger, or of a newer version.
    """

    def __init__(self, path: Path, create: bool = False) -> None:
        if not create and not path.is_file():
            raise UsageError(f"{path.parent} is no relabel project. Make one: nnunet_multimodal relabel init --help")
        self.path = path
        try:
            self.connection = sqlite3.connect(path, timeout=60, isolation_level=None)
            self.connection.row_factory = sqlite3.Row
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = FULL")  # what was said to be accepted survives a power cut
            self.connection.execute("PRAGMA foreign_keys = ON")
            self._make_tables()
        except sqlite3.DatabaseError as error:
            raise DataProblem(
                f"{path} cannot be used: {error}. Restore it from a backup; the masks are in masks/."
            ) from error
        version = self.setting("version")
        if version != VERSION:
            raise DataProblem(f"{path} is of version {version}, expected {VERSION}. Update nnunet_multimodal.")

    def _make_tables(self) -> None:
        if self.one("SELECT 1 FROM sqlite_master WHERE name = 'events'") is None:
            # Two processes may have come to the same conclusion; the second finds the tables inside its transaction.
            with self.transaction():
                if self.one("SELECT 1 FROM sqlite_master WHERE name = 'events'") is None:
                    for statement in _SCHEMA.split(";\n"):
                        self.connection.execute(statement)
                    self.set_setting("version", VERSION)

    def close(self) -> None:
        self.connection.close()

    # --- asking ------------------------------------------------------------------------------------------------------

    def one(self, sql: str, *values: Any) -> Row | None:
        row: Row | None = self.connection.execute(sql, values).fetchone()
        return row

    def all(self, sql: str, *values: Any) -> list[Row]:
        return self.connection.execute(sql, values).fetchall()

    def value(self, sql: str, *values: Any) -> Any:
        """The first column of the first row; None if there is none."""
        row = self.one(sql, *values)
        return None if row is None else row[0]

    def setting(self, key: str, default: Any = None) -> Any:
        text = self.value("SELECT value FROM settings WHERE key = ?", key)
        return default if text is None else json.loads(text)

    def case(self, name: str) -> Row | None:
        return self.one("SELECT * FROM cases WHERE name = ?", name)

    def require_cases(self, names: Sequence[str]) -> list[Row]:
        """Raises UsageError for a name that no case has."""
        rows = [(name, self.case(name)) for name in names]
        unknown = [name for name, row in rows if row is None]
        if unknown:
            raise UsageError(
                f"no such case: {', '.join(unknown[:10])}. Cases are named by their images, without ending."
            )
        return [row for _, row in rows if row is not None]

    def counts(self) -> dict[str, int]:
        """state -> number of cases."""
        found = dict(tuple(row) for row in self.all("SELECT state, count(*) FROM cases GROUP BY state"))
        return {state: found.get(state, 0) for state in STATES}

    # --- changing ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the block, or nothing.

        Raises:
            MultimodalError: the disk is full or read-only, or another process keeps the file.
        """
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            yield
            self.connection.execute("COMMIT")
        except BaseException as error:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise MultimodalError(f"cannot write {self.path}: {error}. This step changed nothing.") from error
            raise

    def run(self, sql: str, *values: Any) -> int:
        """Inside a transaction; the id of the row that was inserted."""
        return int(self.connection.execute(sql, values).lastrowid or 0)

    def run_many(self, sql: str, rows: Any) -> None:
        self.connection.executemany(sql, rows)

    def set_setting(self, key: str, value: Any) -> None:
        self.run("INSERT OR REPLACE INTO settings VALUES (?, ?)", key, json.dumps(value))

    def new_operation(self) -> int:
        """The number of a run of a command, for its events."""
        return int(self.value("SELECT coalesce(max(operation), 0) + 1 FROM events"))

    def next_event(self) -> int:
        """The number that the next event of this transaction gets."""
        return int(self.value("SELECT coalesce(max(id), 0) + 1 FROM events"))

    def append(
        self,
        kind: str,
        who: str,
        operation: int,
        details: Mapping[str, Any],
        case_id: int | None = None,
        before: Mapping[str, Any] | None = None,
        after: Mapping[str, Any] | None = None,
        undoes: int | None = None,
    ) -> int:
        """One more event; its number."""
        time = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return self.run(
            "INSERT INTO events (operation, time, kind, who, case_id, undoes, before, after, details) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            operation,
            time,
            kind,
            who,
            case_id,
            undoes,
            None if before is None else json.dumps(before),
            None if after is None else json.dumps(after),
            json.dumps(details),
        )

    def change_case(
        self,
        case_id: int,
        changes: Mapping[str, Any],
        kind: str,
        who: str,
        operation: int,
        details: Mapping[str, Any],
        undoes: int | None = None,
    ) -> int:
        """Sets some of a case's ``FIELDS`` and appends the event that says so."""
        row = self.one(f"SELECT {', '.join(FIELDS)} FROM cases WHERE id = ?", case_id)
        assert row is not None
        before = dict(row)
        after = {**before, **changes}
        sets = ", ".join(f"{field} = ?" for field in FIELDS)
        self.run(f"UPDATE cases SET {sets} WHERE id = ?", *(after[field] for field in FIELDS), case_id)
        return self.append(kind, who, operation, details, case_id, before, after, undoes)

    # --- undoing -----------------------------------------------------------------------------------------------------

    def last_events(self, case_names: Sequence[str] = (), event: int | None = None) -> list[Row]:
        """What ``undo`` takes back: the last command that is not undone, or the last event of each of these cases.

        Args:
            case_names: none for the last command.
            event: only if the last command is the one of this event; nothing if that is undone already.

        Raises:
            UsageError: there is nothing to undo, or later commands have to be undone first.
        """
        kinds = ", ".join(f"'{kind}'" for kind in UNDOABLE)
        standing = f"kind IN ({kinds}) AND NOT EXISTS (SELECT 1 FROM events u WHERE u.undoes = e.id)"
        if case_names:
            found = []
            for case in self.require_cases(case_names):
                query = f"SELECT * FROM events e WHERE case_id = ? AND {standing} ORDER BY id DESC LIMIT 1"
                row = self.one(query, case["id"])
                if row is None:
                    raise UsageError(f"nothing to undo: {case['name']} is as it was registered.")
                found.append(row)
            return found
        last = self.value(f"SELECT operation FROM events e WHERE {standing} ORDER BY id DESC LIMIT 1")
        if event is not None:
            wanted = self.value("SELECT operation FROM events WHERE id = ?", event)
            if self.one(f"SELECT 1 FROM events e WHERE operation = ? AND {standing}", wanted) is None:
                return []
            if wanted != last:
                raise UsageError(f"event {event} is not of the last command; undo what came after it first (see log).")
        if last is None:
            raise UsageError("nothing to undo: no proposal, acceptance, rejection or training stands.")
        return self.all(f"SELECT * FROM events e WHERE operation = ? AND {standing} ORDER BY id DESC", last)

    def undo(self, events: Sequence[Row], who: str) -> None:
        """Appends an event for each that brings back what was before it; nothing is deleted."""
        operation = self.new_operation()
        for event in events:
            before = json.loads(event["before"])
            details = {"undone": event["kind"]}
            if event["case_id"] is None:
                self.set_setting("model", before["model"])
                self.append("undo", who, operation, details, None, json.loads(event["after"]), before, event["id"])
            else:
                self.change_case(event["case_id"], before, "undo", who, operation, details, event["id"])

    # --- checking ----------------------------------------------------------------------------------------------------

    def contradictions(self) -> list[str]:
        """Where the cases are not what the events make of them; empty for a sound ledger."""
        problems = [str(row[0]) for row in self.all("PRAGMA integrity_check") if row[0] != "ok"]
        rows = self.all(
            "SELECT c.*, e.after FROM cases c LEFT JOIN events e "
            "ON e.id = (SELECT max(id) FROM events WHERE case_id = c.id AND after IS NOT NULL)"
        )
        untouched = {"state": POOL, "mask": None, "proposal": None, "acceptance": None}
        for row in rows:
            expected = untouched if row["after"] is None else json.loads(row["after"])
            found = {field: row[field] for field in FIELDS}
            if found != expected:
                problems.append(f"case {row['name']} is {found}, its events say {expected}")
        after = self.value(
            "SELECT after FROM events WHERE case_id IS NULL AND after IS NOT NULL ORDER BY id DESC LIMIT 1"
        )
        if after is not None and json.loads(after)["model"] != self.setting("model"):
            problems.append(f"the model is {self.setting('model')}, the events say {json.loads(after)['model']}")
        return problems
