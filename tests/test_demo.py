"""The demo: steps done once, options kept apart, interruption, and the real thing (slow)."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nnunet_multimodal import cli
from nnunet_multimodal.commands import demo as command
from nnunet_multimodal.demo import run as runner
from nnunet_multimodal.demo.recipe import QUICK, Options, Step, link_subjects, shrink_plans, steps
from nnunet_multimodal.demo.run import Record, duration, only_one, run_steps
from nnunet_multimodal.errors import DataProblem, MultimodalError, UsageError

ORGANS = {"liver": 1, "spleen": 2}


def python_step(name: str, code: str, **more: Any) -> Step:
    return Step(name, f"title of {name}", (sys.executable, "-c", code), **more)


def appending(path: Path, word: str) -> str:
    return f"open({str(path)!r}, 'a').write({word!r})"


# --- resuming --------------------------------------------------------------------------------------------------------


def test_every_step_is_done_once_and_a_failed_one_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, trace = tmp_path / "demo", tmp_path / "trace"
    fails_at_first = "import sys; print('no space <left>'); sys.exit(0 if '--c' in sys.argv else 7)"
    sequence = [
        python_step("first", appending(trace, "1")),
        python_step("second", fails_at_first),
        Step("third", "ours", ("write", "it"), do=lambda: trace.write_text(trace.read_text(encoding="utf-8") + "3")),
    ]
    with pytest.raises(MultimodalError, match=r"exit code 7(?s:.)*no space <left>"):
        run_steps(folder, QUICK, sequence, Record(folder, QUICK))
    assert trace.read_text(encoding="utf-8") == "1"
    assert not json.loads((folder / "demo.json").read_text(encoding="utf-8"))["steps"]["second"]["done"]

    sequence[1] = dataclasses.replace(sequence[1], go_on=lambda: ("--c",))
    capsys.readouterr()
    run_steps(folder, QUICK, sequence, Record(folder, QUICK))
    assert trace.read_text(encoding="utf-8") == "13"
    shown = capsys.readouterr().out
    assert "done before" in shown and " --c\n" in shown and "# write it" in shown
    record = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert all(step["done"] for step in record["steps"].values())
    assert not record["steps"]["second"]["command"].endswith("--c")  # the line that starts it, for the report


def test_commands_see_the_demos_folders_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_raw", "/elsewhere")
    monkeypatch.setenv("nnUNet_keep_files_open", "1")
    code = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('nnUNet_')}))"
    run_steps(tmp_path / "d", QUICK, [python_step("look", code)], Record(tmp_path / "d", QUICK))
    seen = json.loads((tmp_path / "d/logs/look.log").read_text(encoding="utf-8"))
    assert seen["nnUNet_raw"] == str(tmp_path / "d/nnUNet_raw")
    assert Path(seen["nnUNet_extTrainer"]).name == "extension" and "nnUNet_keep_files_open" not in seen


def test_a_folder_holds_one_demo(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    Record(folder, Options())
    Record(folder, Options())  # the same again is welcome
    with pytest.raises(UsageError, match=r"epochs: 10 there, 3 now.*rm -r"):
        Record(folder, Options(epochs=3))
    with pytest.raises(UsageError, match="contrasts"):
        Record(folder, QUICK)


def test_two_demos_in_one_folder_are_one_too_many(tmp_path: Path) -> None:
    with only_one(tmp_path):
        said = rf"locked by another demo \(pid {os.getpid()} since 20"
        with pytest.raises(UsageError, match=said), only_one(tmp_path):
            pass
    with only_one(tmp_path):  # free again
        pass


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds no demo\.json"):
        Record(tmp_path, Options())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "demo.json").write_text('{"options": 3')
    with pytest.raises(DataProblem, match="not what the demo wrote"):
        Record(tmp_path, Options())


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_the_command_and_what_it_started(tmp_path: Path, number: int) -> None:
    folder, pids = tmp_path / "demo", tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; "
        f"time.sleep(60)']); open({str(pids)!r} + '.new', 'w').write(f'{{os.getpid()}} {{child.pid}}'); "
        f"os.replace({str(pids)!r} + '.new', {str(pids)!r}); time.sleep(60)"
    )

    def interrupt() -> None:
        while not pids.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    record = Record(folder, QUICK)
    threading.Thread(target=interrupt, daemon=True).start()
    begin = time.perf_counter()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run_steps(folder, QUICK, [python_step("long", code)], record)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - begin < 40
    for pid in map(int, pids.read_text(encoding="utf-8").split()):
        for _ in range(100):  # the grandchild is ended with the group; whoever adopts it reaps it
            if not is_running(pid):
                break
            time.sleep(0.05)
        assert not is_running(pid)
    assert record.done("long") is None and record.content["steps"]["long"]["seconds"] > 0


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ctrl_c_ends_with_130_and_the_line_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_steps", interrupted)
    folder = tmp_path / "my demo"
    assert cli.main(["demo", "-o", str(folder), "--device", "cpu", "--epochs", "4"]) == 130
    assert f"nnunet_multimodal demo -o '{folder}' --device cpu --epochs 4" in capsys.readouterr().err


# --- options and steps -----------------------------------------------------------------------------------------------


def test_a_changed_option_is_an_error_of_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Record(tmp_path / "demo", Options())
    assert cli.main(["demo", "-o", str(tmp_path / "demo"), "--device", "cpu", "--subjects", "9"]) == 2
    assert "train_subjects: 24 there, 9 now" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [(["--subjects", "4"], "at least 5"), (["--epochs", "0"], "at least 1")])
def test_too_few(tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "-o", str(tmp_path / "demo"), "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "demo").exists()


def test_a_demo_that_goes_on_keeps_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_has_cuda", lambda: True)
    args = cli._build_parser("demo")[0].parse_args(["demo"])
    assert command._options(args, None).device == "cuda"
    assert command._options(args, {"options": Options(device="cpu").as_json()}).device == "cpu"


@pytest.mark.parametrize("options", [Options(), QUICK])
def test_the_commands_have_the_options_that_they_are_given(tmp_path: Path, options: Options) -> None:
    for step in steps(tmp_path, options, ORGANS):
        if step.do is None and step.command[0] == "nnunet_multimodal":
            cli._build_parser(step.command[1])[0].parse_args(step.command[1:])


def test_training_goes_on_only_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    train = next(step for step in steps(tmp_path, QUICK, ORGANS) if step.name == "train")
    assert train.go_on() == ()
    fold = tmp_path / "nnUNet_results/Dataset601_Demo/nnUNetTrainerCrossMR__nnUNetPlansDemo__2d/fold_0"
    fold.mkdir(parents=True)
    assert train.go_on() == ()
    (fold / "checkpoint_latest.pth").touch()
    assert train.go_on() == ("--c",)


def test_small_plans(tmp_path: Path) -> None:
    features = [32, 64, 128, 256, 512]
    plans = {
        "plans_name": "nnUNetPlans",
        "configurations": {"2d": {"batch_size": 40, "architecture": {"arch_kwargs": {"features_per_stage": features}}}},
    }
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans))
    shrink_plans(tmp_path, Options())
    small = json.loads((tmp_path / "nnUNetPlansDemo.json").read_text(encoding="utf-8"))
    assert small["plans_name"] == "nnUNetPlansDemo"
    configuration = small["configurations"]["2d"]
    assert configuration["batch_size"] == 6
    assert configuration["architecture"]["arch_kwargs"]["features_per_stage"] == [16, 32, 64, 128, 128]
    assert configuration["nnunet_multimodal"]["num_epochs"] == 10 and configuration["nnunet_multimodal"]["layers"] == 3


def test_subject_folders_hold_links_that_move_along(tmp_path: Path) -> None:
    folder, options = tmp_path / "demo", dataclasses.replace(QUICK, contrasts=("T1w", "T2w"))
    for kind in ("images", "labels"):
        for contrast in options.contrasts:
            path = folder / "test" / kind / contrast / "phantom_000.nii.gz"
            path.parent.mkdir(parents=True)
            path.write_text(f"{kind} {contrast}")
    (folder / "scribbles").mkdir()
    (folder / "scribbles/phantom_000.nii.gz").write_text("strokes")
    link_subjects(folder, options)
    link_subjects(folder, options)  # again, after an interruption
    folder = folder.rename(tmp_path / "moved")
    subject = folder / "subjects/phantom_000"
    assert (
        (subject / "reference.nii.gz").read_text(encoding="utf-8")
        == (subject / "T1w.nii.gz").read_text(encoding="utf-8")
        == "images T1w"
    )
    assert (subject / "scribbles.nii.gz").read_text(encoding="utf-8") == "strokes"
    assert (folder / "truth/phantom_000/T2w.nii.gz").read_text(encoding="utf-8") == "labels T2w"


def test_durations() -> None:
    assert [duration(s) for s in (0.2, 59.4, 59.6, 125)] == ["0 s", "59 s", "1 min 00 s", "2 min 05 s"]


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    from nnunet_multimodal.demo.story import results, write_story

    options = dataclasses.replace(QUICK, contrasts=("T1w",))
    row = {"dsc_mean": 0.87654, "nsd_mean": None}
    organs = {"<b>liver</b>": 1}
    evaluation = {
        "summary": [{"scope": "modality", "name": "T1w", "organ": o, **row} for o in ("all organs", *organs)],
        "settings": {"labels": organs, "tolerances_mm": {"<b>liver</b>": 2.0}},
    }
    for path, text in {
        "evaluation/evaluation.json": json.dumps(evaluation),
        "evaluation/report.html": '<p class="inner">"quoted"</p>',
        "found/overlays/phantom_000_T1w.png": "PNG",
        "subjects/phantom_000/T1w.nii.gz": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    done = {
        "a": {"title": "t", "command": "run <this>", "own": False, "seconds": 61.0, "cpu_seconds": 1.0, "done": True}
    }
    write_story(tmp_path / "report.html", tmp_path, options, done, {"nnUNet_raw": "/x"})
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>liver</b>" not in page and "&lt;b&gt;liver" in page and "run &lt;this&gt;" in page
    assert 'class="inner"' not in page and "class=&#34;inner&#34;" in page  # the evaluation lives in an attribute
    assert "0.877 / –" in page and "1 min 01 s" in page and "data:image/png;base64,UE5H" in page
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert results(evaluation, ["T1w"])["T1w"]["all organs"] == {"DSC": 0.87654, "NSD": None}


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quick_demo_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["demo", "-o", "demo", "--quick", "--device", "cpu"]
    assert cli.main(line) == 0
    shown = capfd.readouterr().out
    assert "$ nnUNetv2_train 601 2d 0 -tr nnUNetTrainerCrossMR" in shown and "tolerance 2 mm" in shown
    record = json.loads((tmp_path / "demo/demo.json").read_text(encoding="utf-8"))
    assert set(record["results"]) == {"T1w", "T2w", "CT"} and len(record["steps"]) == 10
    page = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= 3 and 'src="http' not in page

    begin = time.perf_counter()
    assert cli.main(line) == 0  # all done: the table again, nothing else
    assert time.perf_counter() - begin < 60
    assert capfd.readouterr().out.count("done before") == 10
