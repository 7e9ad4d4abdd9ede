"""The command line: help, errors and exit codes, and rows 1 to 6 of faults.md with the real commands."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_multimodal import __version__, cli, environment
from nnunet_multimodal.commands import doctor
from nnunet_multimodal.commands.env import export_line, guess_shell
from nnunet_multimodal.environment import extension_folder, find_raw_dataset, require_nnunet_path, use_own_trainers
from nnunet_multimodal.errors import DataProblem, EnvironmentProblem
from nnunet_multimodal.registry import TRAINERS

OURS = str(extension_folder())


# Help, and what it costs


@pytest.mark.parametrize("arguments", [["--help"], ["env"], ["list"], *([name, "--help"] for name in cli.COMMANDS)])
def test_nothing_heavy_is_imported(run_python, arguments: list[str]) -> None:
    code = (
        "import sys; from nnunet_multimodal import cli; code = cli.main(sys.argv[1:])\n"
        "heavy = sorted({'torch', 'nnunetv2'} & {*sys.modules}); sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    result = run_python("-c", code, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_ends_with_an_example_that_parses(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"] if command else ["--help"]) == 0
    example = capsys.readouterr().out.partition("\nexample:\n")[2].replace("\\\n", " ")
    calls = [shlex.split(line) for line in example.splitlines() if line.split()[:1] == [cli.PROGRAM]]
    calls += [shlex.split(inner) for inner in re.findall(r"\$\((.*?)\)", example)]
    assert calls
    for program, *arguments in calls:
        assert program == cli.PROGRAM
        parser, _ = cli._build_parser(arguments[0])
        if "--help" not in arguments:  # which argparse answers by ending the process
            parser.parse_args(arguments)


def test_the_example_of_env_works_in_a_shell(tmp_path: Path) -> None:
    script = f"{shlex.quote(sys.executable)} -m nnunet_multimodal.cli env --shell bash"
    command = f'eval "$({script})"; printf %s "$nnUNet_extTrainer"'
    clean = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    # not in the repository: -m would find the package there instead of the installed one
    result = subprocess.run(["sh", "-c", command], env=clean, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert result.stdout == OURS


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"nnunet_multimodal {__version__}"


def test_no_command_shows_the_help_and_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dokter"], "unknown command 'dokter'. Did you mean doctor?"),
        (["xyzzy"], "unknown command 'xyzzy'. Commands: env, doctor, list"),
        (["list", "--jsn"], "unrecognized arguments: --jsn"),
        (["env", "--shell", "tcsh"], "invalid choice: 'tcsh'"),
        (["doctor", "--dataset"], "expected one argument"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


# What becomes of an exception


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make ``nnunet_multimodal list`` raise."""

    def fail(error: BaseException) -> None:
        def run(args: object) -> int:
            raise error

        monkeypatch.setattr(importlib.import_module("nnunet_multimodal.commands.list"), "run", run)

    return fail


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataProblem("case 7 is torn"), 4, "error: case 7 is torn"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/a.nii"), 1,
         "error: cannot write /d/a.nii: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: cannot write: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", b"/d/a"), 1, "error: cannot write /d/a: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "/d"), 1, "error: cannot write /d: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/d/t", None, "/d/a"), 1,
         "error: cannot write /d/a: File name too long"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/d"), 1,
         "unexpected error: FileNotFoundError: [Errno 2] No such file: '/d'; rerun with --debug and report it"),
        (ValueError("two\n  lines"), 1, "unexpected error: ValueError: two lines; rerun with --debug and report it"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_a_code(failing, capsys, error: BaseException, code: int, message: str) -> None:
    failing(error)
    assert cli.main(["list"]) == code
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [message]
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["--debug", "list"], ["list", "--debug"], ["list", "--debug", "--json"]])
def test_debug_shows_the_traceback(failing, capsys, arguments: list[str]) -> None:
    failing(DataProblem("case 7 is torn"))
    assert cli.main(arguments) == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: case 7 is torn"


def test_a_name_too_long_is_reported_by_the_file_system_itself(failing, capsys, tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        (tmp_path / ("x" * 300)).write_text("")
    failing(raised.value)
    assert cli.main(["list"]) == 1
    assert re.match(r"error: cannot write .*x{300}: File name too long", capsys.readouterr().err)


def test_a_closed_pipe_is_no_traceback() -> None:
    list_command = [sys.executable, "-m", "nnunet_multimodal.cli", "list"]
    process = subprocess.Popen(list_command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 1
    assert errors == b""


def test_a_terminal_without_check_marks(run_command) -> None:
    result = run_command("doctor", env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 3
    assert "\\u2717 nnUNet_raw: is not set" in result.stdout


# env


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", [OURS]),
        ("{ours}", ["{ours}"]),
        ("{ours}/:{other}:{ours}", ["{ours}", "{other}"]),
        ("{other}:/gone/site-packages/nnunet_multimodal/extension", ["{ours}", "{other}"]),
        ("{other}:/gone/elsewhere:{other}", ["{ours}", "{other}", "/gone/elsewhere"]),
        ("{package}:{package}/trainers:{repository}", ["{ours}"]),
        ("'{ours}':\"{other}\": :", ["{ours}", "{other}"]),
        ("~/mine", ["{ours}", "{home}/mine"]),
    ],
)
def test_env_keeps_what_is_right(before: str, after: list[str], tmp_path, clean_environment, monkeypatch) -> None:
    package = extension_folder().parent
    words = {"ours": OURS, "other": str(tmp_path), "package": str(package), "repository": str(package.parent)}
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("nnUNet_extTrainer", before.replace(":", os.pathsep).format(**words))
    expected = [folder.format(**words, home="/home/somebody") for folder in after]
    use_own_trainers()
    assert os.environ[environment.EXTENSION_VARIABLE].split(os.pathsep) == expected
    use_own_trainers()  # nothing grows
    assert os.environ[environment.EXTENSION_VARIABLE].split(os.pathsep) == expected


def test_env_prints_only_the_line(run_command) -> None:
    result = run_command("env", env={"nnUNet_extTrainer": "/my trainers", "SHELL": "/bin/bash"})
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"export nnUNet_extTrainer={shlex.quote(OURS + os.pathsep + '/my trainers')}\n"


NASTY = '/a b/it\'s $HOME `id` "x" \\ end!'


@pytest.mark.parametrize(
    ("shell", "command"),
    [
        ("bash", ["bash", "-c"]),
        ("zsh", ["zsh", "-fc"]),
        ("fish", ["fish", "--no-config", "-c"]),
        ("powershell", ["pwsh", "-NoProfile", "-Command"]),
    ],
)
def test_shells_read_back_any_path(shell: str, command: list[str], clean_environment, monkeypatch) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    monkeypatch.setenv("nnUNet_extTrainer", NASTY)
    show = f"{sys.executable} -c 'import os; print(os.environ[\"nnUNet_extTrainer\"])'"
    output = subprocess.run([*command, f"{export_line(shell)}\n{show}"], capture_output=True, text=True, timeout=60)
    assert output.stdout.strip() == OURS + os.pathsep + NASTY


def test_quoting_of_shells_that_are_rarely_installed(clean_environment, monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", "/it's\\")
    assert export_line("fish") == f"set -gx nnUNet_extTrainer '{OURS}{os.pathsep}/it\\'s\\\\'"
    assert export_line("powershell") == f"$env:nnUNet_extTrainer = '{OURS}{os.pathsep}/it''s\\'"


@pytest.mark.parametrize(
    ("value", "shell"),
    [("/usr/bin/fish", "fish"), ("/bin/zsh", "zsh"), ("/opt/pwsh", "powershell"), ("/bin/tcsh", "bash"), ("", "bash")],
)
def test_guess_shell(value: str, shell: str, monkeypatch) -> None:
    monkeypatch.setenv("SHELL", value)
    assert guess_shell() == shell


# list


def test_list_shows_every_trainer(capsys) -> None:
    assert cli.main(["list"]) == 0
    text = capsys.readouterr().out
    for entry in TRAINERS.values():
        assert re.search(rf"^{entry.name}$", text, re.MULTILINE)
        assert all(f"_{word} " in text for word in entry.ablations)
    assert max(map(len, text.splitlines())) <= 100


def test_list_json(capsys) -> None:
    assert cli.main(["list", "--json", "nnUNetTrainerCrossMR_noPairedAug_3epochs"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["name"] == "nnUNetTrainerCrossMR"
    assert entry["ablations"].keys() == {"noVisualTokens", "noOrganMatch", "noPairedAug", "visualAcrossBatch"}


def test_row_4_unknown_trainer(run_command) -> None:
    result = run_command("list", "nnUNetTrainerCrosMR_5epochs")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: Unknown trainer 'nnUNetTrainerCrosMR_5epochs'. Did you mean nnUNetTrainerCrossMR_5epochs? "
        "Run: nnunet_multimodal list\n"
    )


# doctor: rows 1, 2, 3, 5 and 6


def diagnose(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code and the checks by name of ``doctor --json``, run in this process, which has torch already."""
    capsys.readouterr()
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {check["what"]: check for check in report["checks"]}


def with_status(checks: dict[str, dict[str, str]], status: str) -> set[str]:
    return {what for what, check in checks.items() if check["status"] == status}


@pytest.fixture
def healthy(nnunet_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Everything set as it should be; a test breaks one thing."""
    monkeypatch.setenv("nnUNet_extTrainer", OURS)
    return {**nnunet_folders, "nnUNet_extTrainer": OURS}


def test_a_healthy_installation(healthy, run_command) -> None:
    result = run_command("doctor", env=healthy)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line[0] for line in result.stdout.splitlines()] == ["✓"] * 8


def test_row_1_folder_unset(healthy, run_command) -> None:
    del healthy["nnUNet_raw"]
    result = run_command("doctor", env=healthy)
    assert result.returncode == 3
    assert "✗ nnUNet_raw: is not set.\n    -> Run: export nnUNet_raw=/path (see README, Setup)." in result.stdout
    assert result.stdout.count("✗") == 1
    result = run_command("doctor", "-d", "1", env=healthy)
    assert result.returncode == 3
    assert result.stderr == "error: nnUNet_raw is not set. Run: export nnUNet_raw=/path (see README, Setup).\n"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"C:\\data"', "nnUNet_raw='\"C:\\\\data\"' contains quote characters; remove them."),
        ("'/data'", "contains quote characters; remove them."),
        ("~/data", "nnUNet_raw='~/data' contains '~', which nnU-Net does not expand; write /home/me/data instead."),
        ("~you/data", "contains '~', which nnU-Net does not expand"),
        ("  ", "nnUNet_raw is not set"),
        ("/no/such/folder", "nnUNet_raw=/no/such/folder does not exist."),
        (__file__, "is a file, expected a folder"),
    ],
)
def test_row_2_folder_that_is_none(healthy, monkeypatch, capsys, value: str, message: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("nnUNet_raw", value)
    with pytest.raises(EnvironmentProblem, match=re.escape(message)):
        require_nnunet_path("nnUNet_raw")
    assert cli.main(["doctor", "-d", "1"]) == 3
    assert message in capsys.readouterr().err
    check = doctor.check_folder("nnUNet_raw")
    assert check.status == "error"
    assert check.fix.startswith("Run: export nnUNet_raw=")


def test_quotes_and_tildes_within_a_path_are_legal(tmp_path: Path, clean_environment, monkeypatch) -> None:
    folder = tmp_path / "O'Brien~1"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(folder))
    assert require_nnunet_path("nnUNet_raw") == folder


def test_folders_that_cannot_be_written_to(healthy, monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, who often runs tests, may write anywhere
    assert doctor.check_folder("nnUNet_results").status == "error"
    assert doctor.check_folder("nnUNet_results").found == f"{healthy['nnUNet_results']} is not writable"
    assert doctor.check_folder("nnUNet_raw").status == "warning"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "not set"),
        ("", "not set"),
        ("/no/such/folder", "/no/such/folder does not hold the extension folder"),
        (str(Path(OURS).parent), "is not the extension folder"),
        (str(Path(OURS).parent / "trainers"), "is not the extension folder"),
        (OURS + os.pathsep + str(Path(OURS).parents[1]), "is not the extension folder"),
        (f'"{OURS}"', "contains quote characters"),
    ],
)
def test_row_3_extension_unset_or_wrong(healthy, monkeypatch, value: str | None, message: str) -> None:
    if value is None:
        monkeypatch.delenv("nnUNet_extTrainer")
    else:
        monkeypatch.setenv("nnUNet_extTrainer", value)
    check = doctor.check_extension()
    assert check.status == "error"
    assert message in check.found
    assert check.fix == f"Run: {export_line(guess_shell())}"
    monkeypatch.setenv("nnUNet_extTrainer", environment.extension_value())  # what that line does
    assert doctor.check_extension().status in ("ok", "warning")


def test_row_3_without_the_variable_nnunet_finds_nothing(healthy, run_command) -> None:
    del healthy["nnUNet_extTrainer"]
    result = run_command("doctor", env=healthy | {"SHELL": "/bin/bash"})
    assert result.returncode == 3
    assert [line.split(":")[0] for line in result.stdout.splitlines() if line.startswith("✗")] == [
        "✗ nnUNet_extTrainer",
        "✗ trainers",
    ]
    assert f"-> Run: export nnUNet_extTrainer={shlex.quote(OURS)}\n" in result.stdout


def test_a_folder_that_is_gone_is_a_warning(healthy, monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([OURS, "/no/such/folder"]))
    check = doctor.check_extension()
    assert (check.status, check.found) == ("warning", "no such folder: /no/such/folder")


def pretend(folder: Path, package: str, version: str) -> None:
    """Let importlib.metadata see another version, once ``folder`` comes first on sys.path."""
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_row_5_another_nnunet_is_a_warning(healthy, tmp_path, monkeypatch, capsys) -> None:
    pretend(tmp_path, "nnunetv2", "2.7.3")
    monkeypatch.syspath_prepend(tmp_path)
    code, checks = diagnose(capsys)
    assert code == 0, checks
    assert with_status(checks, "warning") == {"nnunetv2"}
    assert checks["nnunetv2"]["found"] == "found 2.7.3, tested with nnunetv2>=2.8,<2.9"


def test_row_5_changed_hooks_are_an_error(healthy, monkeypatch, capsys) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    def old(architecture_class_name, arch_init_kwargs, num_input_channels): ...

    monkeypatch.setattr(nnUNetTrainer, "build_network_architecture", staticmethod(old))
    code, checks = diagnose(capsys)
    assert code == 3
    assert with_status(checks, "error") == {"hooks"}
    assert "build_network_architecture takes (architecture_class_name, arch_init_kwargs" in checks["hooks"]["found"]
    assert "expected (plans_manager, configuration_manager" in checks["hooks"]["found"]


def test_changed_hooks_compares_overrides_with_originals() -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Same(nnUNetTrainer):
        def train_step(self, batch): ...
        def do_split(self, *args, **kwargs): ...
        def helper_of_its_own(self, anything): ...

    class Drifted(Same):
        def validation_step(self, batch, extra): ...

    assert doctor.changed_hooks(nnUNetTrainer, [Same]) == []
    assert doctor.changed_hooks(nnUNetTrainer, [Same, Drifted]) == [
        "nnUNetTrainer.validation_step takes (self, batch), Drifted overrides it with (self, batch, extra)"
    ]


def test_row_6_torch_2_9(healthy, tmp_path, run_command) -> None:
    pretend(tmp_path, "torch", "2.9.1+cu128")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = run_command("doctor", "--json", env=healthy | {"PYTHONPATH": path})
    assert result.returncode == 3, result.stderr
    checks = {check["what"]: check for check in json.loads(result.stdout)["checks"]}
    assert with_status(checks, "error") == {"torch"}
    assert "torch 2.9 is excluded by nnunetv2 (slow/oom 3D conv, pytorch#166122)." in checks["torch"]["found"]


def test_packages_that_are_missing(monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert doctor.check_nnunet_version().found == doctor.check_torch_version().found == "not installed"
    assert doctor.check_nnunet_version().status == doctor.check_torch_version().status == "error"


def test_a_check_that_cannot_import_is_a_finding(capsys) -> None:
    def check() -> doctor.Check:
        print("chatter of the finder")
        raise ImportError("no module\nnamed x")

    assert doctor.check_import("hooks", check).found == "ImportError: no module named x"
    assert capsys.readouterr().out == ""


# doctor -d


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What check_raw_dataset will say; its own tests are elsewhere."""
    problems: list[str] = []
    module = types.ModuleType("nnunet_multimodal.conversion.verify")
    module.check_raw_dataset = lambda folder: types.SimpleNamespace(  # type: ignore
        problems=[f"{folder.name}: {problem}" for problem in problems], warnings=[]
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return problems


@pytest.mark.parametrize("wanted", ["7", "007", "Dataset007_Liver"])
def test_doctor_of_a_data_set(nnunet_folders, verified, capsys, wanted: str) -> None:
    (Path(nnunet_folders["nnUNet_raw"]) / "Dataset007_Liver").mkdir()
    (Path(nnunet_folders["nnUNet_raw"]) / "Dataset070_Other").mkdir()
    assert cli.main(["doctor", "-d", wanted]) == 0
    assert capsys.readouterr().out.startswith("✓ Dataset007_Liver")
    verified += ["case a is torn", "case b is empty"]
    assert cli.main(["doctor", "-d", wanted]) == 4
    assert capsys.readouterr().out == "✗ Dataset007_Liver: case a is torn\n✗ Dataset007_Liver: case b is empty\n"
    assert cli.main(["doctor", "-d", wanted, "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["problems"] == [
        "Dataset007_Liver: case a is torn",
        "Dataset007_Liver: case b is empty",
    ]


@pytest.mark.parametrize("wanted", ["8", "Liver", "Dataset007", "../nnUNet_raw/Dataset007_Liver", ""])
def test_a_data_set_that_is_not_there(nnunet_folders, capsys, wanted: str) -> None:
    (Path(nnunet_folders["nnUNet_raw"]) / "Dataset007_Liver").mkdir()
    (Path(nnunet_folders["nnUNet_raw"]) / "Dataset008_File").write_text("")
    assert cli.main(["doctor", "-d", wanted]) == 4
    assert "not found in" in (message := capsys.readouterr().err)
    assert "There are: Dataset007_Liver." in message


def test_two_data_sets_of_one_id(nnunet_folders) -> None:
    for name in ("Dataset007_A", "Dataset007_B"):
        (Path(nnunet_folders["nnUNet_raw"]) / name).mkdir()
    with pytest.raises(DataProblem, match=r"ambiguous in .*: Dataset007_A, Dataset007_B"):
        find_raw_dataset(7)
    assert find_raw_dataset("Dataset007_B").name == "Dataset007_B"
