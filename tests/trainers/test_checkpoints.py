"""Checkpoints that survive what happens to computers: power cuts, full disks, half-copied files (rows 35 and 38)."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_training import log_of, make_trainer

from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError
from nnunet_multimodal.trainers.checkpoints import (
    is_complete,
    load_fitting,
    readable_checkpoint,
    write_whole,
)
from nnunet_multimodal.trainers.transfer import starting_model


def save(path: Path, number: int = 0, size: int = 1000) -> None:
    torch.save({"current_epoch": number, "network_weights": {"w": torch.full((size,), float(number))}}, path)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk on which no file can grow beyond this; the error is the system's own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- writing ---------------------------------------------------------------------------------------------------------

# One process imports torch, its forks save as fast as they can and are killed at a random moment.
KILLED_WHILE_SAVING = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from nnunet_multimodal.trainers.checkpoints import is_complete, write_whole

torch.set_num_threads(1)
path = Path(sys.argv[1])

def save(number):
    content = {"number": number, "weights": [torch.full((1_250_000,), float(number)) for _ in range(4)]}
    write_whole(path, lambda name: torch.save(content, name))

save(0)
random.seed(0)
interrupted = newest = 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        for number in range(newest + 1, newest + 1000):
            save(number)
    time.sleep(random.uniform(0.02, 0.25))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for temporary in path.parent.glob(f".{path.name}.{child}.*"):
        interrupted += 1
        temporary.unlink()
    assert is_complete(path), "not complete"
    content = torch.load(path)
    assert content["number"] >= newest, f"an older file is back: {content['number']} after {newest}"
    newest = content["number"]
    assert all((weights == newest).all() for weights in content["weights"]), "parts of two checkpoints"
print(interrupted, newest, sorted(os.listdir(path.parent)))
"""


def test_a_checkpoint_survives_kill_9_while_saving(run_python, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    result = run_python("-c", KILLED_WHILE_SAVING, folder / "checkpoint_latest.pth")
    assert result.returncode == 0, result.stderr
    interrupted, newest, left = result.stdout.split(maxsplit=2)
    assert int(interrupted) >= 5, "the kills came between two savings: this proves nothing"
    assert int(newest) >= 5, "hardly anything was saved: this proves nothing"
    assert left.strip() == "['checkpoint_latest.pth']"


def test_what_a_killed_process_left_is_cleared_away_and_a_running_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    old, fresh = tmp_path / ".checkpoint_latest.pth.1.tmp", tmp_path / ".checkpoint_latest.pth.2.tmp"
    other = tmp_path / ".checkpoint_best.pth.1.tmp"
    for file in (old, fresh, other):
        file.write_bytes(b"half")
    long_ago = time.time() - 3 * 3600
    os.utime(old, (long_ago, long_ago))
    os.utime(other, (long_ago, long_ago))
    write_whole(path, lambda name: save(Path(name)))
    assert files(tmp_path) == sorted([path.name, fresh.name, other.name])


def test_a_full_disk_leaves_the_old_checkpoint_and_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    write_whole(path, lambda name: save(Path(name), 1))
    before = path.read_bytes()
    with pytest.raises(MultimodalError) as error, largest_file(500_000):
        write_whole(path, lambda name: save(Path(name), 2, size=1_000_000))
    assert error.value.exit_code == 1
    message = str(error.value)
    assert message.startswith(f"cannot write {path}: ") and "untouched" in message and "--c" in message
    assert "\n" not in message
    assert path.read_bytes() == before and is_complete(path)
    assert files(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"No space left on device \(need ~2 MB or more\)"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64\nframe #0"), r"\[enforce fail"),
    ],
)
def test_the_message_says_what_the_system_said(error: Exception, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    path.write_bytes(b"old")

    def fail_half_way(name: str) -> None:
        Path(name).write_bytes(bytes(2_000_000))
        raise error

    with pytest.raises(MultimodalError, match=f"cannot write .*: {reason}") as raised:
        write_whole(path, fail_half_way)
    assert raised.value.__cause__ is error
    with pytest.raises(MultimodalError, match=r"Make room, then call somebody$"):
        write_whole(path, fail_half_way, "call somebody")
    assert path.read_bytes() == b"old" and files(tmp_path) == [path.name]


def test_a_folder_that_is_gone_is_an_error_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / "gone" / "checkpoint_latest.pth"
    with pytest.raises(MultimodalError, match=f"cannot write {path}"):
        write_whole(path, lambda name: save(Path(name)))


def test_interrupted_by_the_user_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    path.write_bytes(b"old")

    def interrupted(name: str) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_bytes() == b"old" and files(tmp_path) == [path.name]


def test_a_mistake_of_ours_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_whole(tmp_path / "c.pth", lambda name: {}["no such key"])


def test_nothing_written_is_no_error(tmp_path: Path) -> None:
    """nnU-Net writes nothing on other ranks, or with --disable_checkpointing."""
    path = tmp_path / "checkpoint_latest.pth"
    write_whole(path, lambda name: None)
    assert files(tmp_path) == []
    path.write_bytes(b"old")
    write_whole(path, lambda name: None)
    assert path.read_bytes() == b"old"


# --- reading ---------------------------------------------------------------------------------------------------------


def test_completeness(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    assert not is_complete(path)
    save(path)
    assert is_complete(path)
    whole = path.read_bytes()
    for kept in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        assert not is_complete(path), kept
    damaged = bytearray(whole)
    damaged[whole.index(bytes(400)) + 200] = 1  # in the midst of the weights, which are all zero
    path.write_bytes(damaged)
    assert not is_complete(path)
    assert not is_complete(tmp_path)  # a folder


@pytest.mark.parametrize(
    ("wanted", "others", "expected"),
    [
        ("checkpoint_latest.pth", {"checkpoint_best.pth": 140}, "checkpoint_best.pth"),
        ("checkpoint_latest.pth", {"checkpoint_best.pth": 140, "checkpoint_final.pth": 200}, "checkpoint_final.pth"),
        ("checkpoint_final.pth", {"checkpoint_best.pth": 140, "checkpoint_latest.pth": 190}, "checkpoint_latest.pth"),
        ("checkpoint_best.pth", {"checkpoint_latest.pth": 190}, "checkpoint_latest.pth"),
    ],
)
@pytest.mark.parametrize("damage", ["incomplete", "missing"])
def test_the_next_best_is_used_and_said(
    wanted: str, others: dict[str, int], expected: str, damage: str, tmp_path: Path
) -> None:
    for name, epoch in others.items():
        save(tmp_path / name, epoch)
    if damage == "incomplete":
        save(tmp_path / wanted)
        os.truncate(tmp_path / wanted, 700)
    path, message = readable_checkpoint(tmp_path / wanted)
    assert path == tmp_path / expected
    assert message == f"{wanted} is {damage}; using {expected} (epoch {others[expected]})."


def test_a_good_checkpoint_needs_no_message(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint_latest.pth")
    save(tmp_path / "checkpoint_best.pth")
    assert readable_checkpoint(tmp_path / "checkpoint_latest.pth") == (tmp_path / "checkpoint_latest.pth", None)


def test_without_any_good_checkpoint_the_user_is_told(tmp_path: Path) -> None:
    wanted = tmp_path / "checkpoint_latest.pth"
    with pytest.raises(DataProblem, match="is missing, and no other checkpoint"):
        readable_checkpoint(wanted)
    wanted.write_bytes(b"half")
    (tmp_path / "checkpoint_best.pth").write_bytes(b"")
    with pytest.raises(DataProblem, match=r"is incomplete, and no other checkpoint .* Train again without --c"):
        readable_checkpoint(wanted)


# --- starting models -------------------------------------------------------------------------------------------------


def test_starting_weights_come_from_a_file_or_the_first_fold(tmp_path: Path) -> None:
    for fold, number in ((1, 11), (0, 10)):
        (tmp_path / f"fold_{fold}").mkdir()
        save(tmp_path / f"fold_{fold}" / "checkpoint_final.pth", number)
    save(tmp_path / "fold_0" / "checkpoint_best.pth", 5)
    assert starting_model(tmp_path).weights["w"][0] == 10
    assert starting_model(tmp_path, 1).weights["w"][0] == 11, "the fold that has not seen what this one validates"
    assert starting_model(tmp_path, 3).weights["w"][0] == 10
    assert starting_model(tmp_path / "fold_1").weights["w"][0] == 11
    assert starting_model(tmp_path / "fold_0" / "checkpoint_best.pth").weights["w"][0] == 5
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataProblem, match=f"no checkpoint in {empty}"):
        starting_model(empty)
    with pytest.raises(DataProblem, match="is missing"):
        starting_model(empty / "checkpoint_final.pth")


def test_fitting_tensors_are_loaded_and_all_others_reported() -> None:
    network = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 3)})
    before = {key: value.clone() for key, value in network.state_dict().items()}
    weights = {"a.weight": torch.full((2, 2), 7.0), "b.weight": torch.zeros(9, 9), "head.bias": torch.zeros(1)}
    message = load_fitting(network, weights)
    assert message.splitlines() == [
        "starting model: 1 tensors loaded, 3 new, 2 skipped",
        "  new: a.bias, b.bias, b.weight",
        "  skipped: b.weight, head.bias",
    ]
    after = network.state_dict()
    assert (after["a.weight"] == 7).all()
    assert all(torch.equal(after[key], before[key]) for key in ("a.bias", "b.bias", "b.weight"))


# --- in the trainer --------------------------------------------------------------------------------------------------


def test_a_truncated_latest_checkpoint_is_replaced_by_the_best(
    nnunet_folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    trainer.initialize()
    folder = Path(trainer.output_folder)
    trainer.current_epoch = 139
    trainer.save_checkpoint(str(folder / "checkpoint_best.pth"))
    best = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(1)
    trainer.current_epoch = 159
    latest = folder / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(latest))
    assert is_complete(latest) and sorted(path.name for path in folder.glob(".*")) == []

    again = make_trainer("nnUNetTrainerContrastAug")
    again.load_checkpoint(str(latest))
    assert again.current_epoch == 160 and "incomplete" not in log_of(again)

    os.truncate(latest, latest.stat().st_size // 2)
    again = make_trainer("nnUNetTrainerContrastAug")
    capsys.readouterr()
    again.load_checkpoint(str(latest))
    message = "checkpoint_latest.pth is incomplete; using checkpoint_best.pth (epoch 140)."
    assert message in capsys.readouterr().out and message in log_of(again)
    assert again.current_epoch == 140
    assert all(torch.equal(value, best[key]) for key, value in again.network.state_dict().items())


def test_a_full_disk_stops_the_training_with_a_message(nnunet_folders: dict[str, str]) -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    trainer.initialize()
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(latest))
    before = latest.read_bytes()
    with pytest.raises(MultimodalError, match=r"cannot write .*checkpoint_latest\.pth"), largest_file(len(before) // 2):
        trainer.save_checkpoint(str(latest))
    assert latest.read_bytes() == before
    assert sorted(path.name for path in latest.parent.glob("*checkpoint*")) == [latest.name]


def test_disabled_checkpointing_writes_nothing(nnunet_folders: dict[str, str]) -> None:
    trainer = make_trainer("nnUNetTrainerContrastAug")
    trainer.initialize()
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    assert list(Path(trainer.output_folder).glob("*checkpoint*")) == []


def test_only_a_file_name_can_be_loaded(nnunet_folders: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="takes a file name"):
        make_trainer("nnUNetTrainerContrastAug").load_checkpoint({"network_weights": {}})


@pytest.mark.usefixtures("nnunet_folders")
def test_a_checkpoint_of_other_settings_is_named() -> None:
    """Row 36: torch's list of tensors of another size is not what a user can act on."""
    from tiny_training import make_trainer

    from nnunet_multimodal.errors import UsageError

    trainer = make_trainer("nnUNetTrainerCrossMR")
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(path))
    other = make_trainer("nnUNetTrainerCrossMR", queries=5)
    with pytest.raises(UsageError, match=r"does not fit this network.*other plans or settings"):
        other.load_checkpoint(str(path))
