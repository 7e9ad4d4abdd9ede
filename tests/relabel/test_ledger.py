"""The ledger: all or nothing, nothing forgotten, and undone as often as you like."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError
from nnunet_multimodal.relabel import ledger as module
from nnunet_multimodal.relabel.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "relabel.sqlite", create=True)
    with made.transaction():
        made.run_many(
            "INSERT INTO cases (name, image, kind, size, mtime_ns) VALUES (?, '/i', 'nifti', 1, 1)",
            [(name,) for name in "abc"],
        )
    return made


def accept(ledger: Ledger, case: int, mask: str, operation: int) -> int:
    with ledger.transaction():
        changes = {"state": "accepted", "mask": mask, "acceptance": ledger.next_event()}
        return ledger.change_case(case, changes, "accept", "me", operation, {"start": False})


def state(ledger: Ledger, name: str) -> tuple:
    row = ledger.case(name)
    assert row is not None
    return row["state"], row["mask"], row["acceptance"]


def test_a_transaction_that_fails_leaves_nothing(ledger: Ledger) -> None:
    with pytest.raises(KeyboardInterrupt), ledger.transaction():
        ledger.change_case(1, {"state": "rejected"}, "reject", "me", 1, {})
        raise KeyboardInterrupt
    assert state(ledger, "a") == ("pool", None, None)
    assert ledger.one("SELECT 1 FROM events") is None


def test_undo_takes_back_a_whole_command_and_then_the_one_before(ledger: Ledger) -> None:
    accept(ledger, 1, "x", 1)
    second = [accept(ledger, 1, "y", 2), accept(ledger, 2, "z", 2)]
    assert state(ledger, "a") == ("accepted", "y", second[0])
    with ledger.transaction():
        ledger.undo(ledger.last_events(), "me")
    assert state(ledger, "a") == ("accepted", "x", 1)
    assert state(ledger, "b") == ("pool", None, None)
    with ledger.transaction():
        ledger.undo(ledger.last_events(), "me")
    assert state(ledger, "a") == ("pool", None, None)
    with pytest.raises(UsageError, match="nothing to undo"):
        ledger.last_events()
    assert ledger.value("SELECT count(*) FROM events") == 6, "nothing is deleted"
    assert ledger.contradictions() == []


def test_undo_of_one_case_leaves_the_rest_of_its_command(ledger: Ledger) -> None:
    accept(ledger, 1, "x", 1)
    accept(ledger, 2, "y", 1)
    with ledger.transaction():
        ledger.undo(ledger.last_events(["a"]), "me")
    assert (state(ledger, "a")[0], state(ledger, "b")[0]) == ("pool", "accepted")
    with ledger.transaction():
        ledger.undo(ledger.last_events(), "me")  # what is left of the command
    assert state(ledger, "b")[0] == "pool"
    assert ledger.contradictions() == []
    with pytest.raises(UsageError, match="a is as it was registered"):
        ledger.last_events(["a"])
    with pytest.raises(UsageError, match="no such case: q"):
        ledger.last_events(["q"])


def test_an_event_is_undone_once(ledger: Ledger) -> None:
    accept(ledger, 1, "x", 1)
    events = ledger.last_events()
    with ledger.transaction():
        ledger.undo(events, "me")
    with pytest.raises(sqlite3.IntegrityError), ledger.transaction():
        ledger.undo(events, "me")


def test_a_clock_that_goes_backwards_changes_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime as real

    accept(ledger, 1, "x", 1)

    class Earlier(real.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(1999, 1, 1, tzinfo=tz)

    monkeypatch.setattr(module.datetime, "datetime", Earlier)
    accept(ledger, 1, "y", 2)
    with ledger.transaction():
        ledger.undo(ledger.last_events(), "me")
    assert state(ledger, "a")[1] == "x"
    assert ledger.all("SELECT time FROM events ORDER BY id")[1][0].startswith("1999")
    assert ledger.contradictions() == []


def test_a_ledger_that_another_program_keeps(ledger: Ledger) -> None:
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    ledger.connection.execute("PRAGMA busy_timeout = 50")
    with pytest.raises(MultimodalError, match=r"database is locked\. This step changed nothing"):
        accept(ledger, 1, "x", 1)
    other.execute("ROLLBACK")
    accept(ledger, 1, "x", 1)


def test_contradictions_are_found(ledger: Ledger) -> None:
    accept(ledger, 1, "x", 1)
    ledger.connection.execute("UPDATE cases SET mask = 'other' WHERE id = 1")
    ledger.connection.execute("UPDATE cases SET state = 'rejected' WHERE id = 3")
    assert len(ledger.contradictions()) == 2


def test_reopened_it_is_as_it_was_and_durable(ledger: Ledger) -> None:
    accept(ledger, 1, "x", 1)
    ledger.close()
    again = Ledger(ledger.path)
    assert state(again, "a") == ("accepted", "x", 1)
    assert again.value("PRAGMA journal_mode") == "wal"
    assert again.value("PRAGMA synchronous") == 2  # FULL
    with again.transaction():
        again.set_setting("version", 99)
    again.close()
    with pytest.raises(DataProblem, match="is of version 99, expected 1"):
        Ledger(ledger.path)


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to be looked at" * 20, b"SQLite format 3\0" + b"x" * 9000]
)
def test_a_file_that_is_no_ledger(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "relabel.sqlite"
    path.write_bytes(content)
    with pytest.raises(DataProblem, match="cannot be used"):
        Ledger(path)
    assert path.read_bytes() == content


def test_events_hold_what_was_before_and_after(ledger: Ledger) -> None:
    accept(ledger, 1, "x", 1)
    row = ledger.one("SELECT * FROM events")
    assert row is not None
    assert json.loads(row["before"]) == {"state": "pool", "mask": None, "proposal": None, "acceptance": None}
    assert json.loads(row["after"]) == {"state": "accepted", "mask": "x", "proposal": None, "acceptance": 1}
