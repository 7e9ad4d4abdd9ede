"""README and docs/ speak of what exists: trainers, commands, files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nnunet_multimodal.cli import COMMANDS, main
from nnunet_multimodal.registry import TRAINERS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines() -> list[str]:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    blocks = [block for page in pages for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)]
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("name", [name for entry in TRAINERS.values() for name in entry.names])
def test_names_every_trainer(name: str) -> None:
    """By its name, or by the word behind that of its row above."""
    words = {name.removeprefix(entry.name) for entry in TRAINERS.values() if name.startswith(f"{entry.name}_")}
    assert any(f"| `{row}` |" in README for row in {name, *words})


@pytest.mark.parametrize("command", COMMANDS)
def test_names_every_command(command: str) -> None:
    assert f"nnunet_multimodal {command}" in README


def test_own_commands_in_the_shell_blocks_parse(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that the README uses is one that the command's help names."""
    lines = [shlex.split(line) for line in shell_lines() if line.startswith("nnunet_multimodal ")]
    assert lines
    for words in lines:
        command = words[1:3] if words[1] in ("convert", "scribbles", "relabel") else words[1:2]
        assert main([*command, "--help"]) == 0
        known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", capsys.readouterr().out))
        assert {word for word in words if word.startswith("-")} <= known, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_it_points_to_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"(?:python |`)(benchmarks/[\w/]+\.\w+)", text):
        assert (ROOT / path).exists(), path


def test_names_every_page() -> None:
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in README


def test_test_command_is_what_ci_runs() -> None:
    command = "pip install '.[test]' && pytest -n 2"
    assert command in shell_lines()
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
