"""Whatever is written down is run."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tinybert.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def _blocks(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    found = [text for name, text in blocks if name == language]
    assert found, f"the README has no {language} block"
    return found


def _tracked_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()]


def test_file_tree_of_the_readme_is_the_tree() -> None:
    """A newcomer finds every file the README names, and the README names every file."""
    tree = next(block for block in _blocks("") if "src/tinybert/" in block)
    named, folder = set(), ""
    for line in tree.splitlines():
        entry = line.split()[0]
        if entry.endswith("/"):
            folder = entry
        else:
            named.add((folder if line.startswith(" ") else "") + entry)
    assert named == set(_tracked_files())


def _help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_commands_of_the_readme_parse_into_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    """No command a reader copies fails on a misspelt option."""
    shown = [
        shlex.split(line, comments=True)
        for block in _blocks("bash")
        for line in block.splitlines()
        if line.startswith("tinybert ")
    ]
    assert len(shown) >= 3
    assert {command for _, command, *_ in shown} <= set(COMMANDS)
    listed = {command: _help(command, capsys) for command in {command for _, command, *_ in shown}}
    for _, command, *options in shown:
        for option in (option for option in options if option.startswith("--")):
            assert f"{option} " in listed[command], f"{option} is no option of tinybert {command}"


def test_make_targets_of_the_readme_exist() -> None:
    """Both first commands of the README are targets of the Makefile."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    wanted = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert {"quickstart", "test"} <= set(wanted) <= set(targets)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(document: Path) -> None:
    """No link of the documentation is dead."""
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_test_files_of_the_architecture_exist() -> None:
    """The table equation -> function -> test names real tests and real functions."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)`", text)
    assert named
    assert all((ROOT / name).exists() for name in named)
