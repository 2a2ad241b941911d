"""Every example in README.md, docs/ and the docstrings runs as it is printed.

- Blocks marked ``python`` of one file run in order in one namespace, in an empty folder; those with
  ``>>>`` prompts are compared with the results they show. A line ``<!-- no-run -->`` above a block
  (for a model or a cluster a reader has and the tests have not) leaves only its syntax checked.
- ``polarpack ...`` commands of the other blocks must name existing commands and options.
"""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import polarpack
from polarpack.errors import MissingDependencyError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NO_RUN = "<!-- no-run -->"
OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```[ \t]*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    text: str
    line: int  # of the block's first line, from 1
    runs: bool


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a Markdown file."""
    page = path.read_text("utf-8")
    found = []
    for match in FENCE.finditer(page):
        indent, language, text = match.groups()
        text = "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        above = page[: match.start()].rstrip().rpartition("\n")[2].strip()
        line = page.count("\n", 0, match.start(3)) + 1
        found.append(Block(language.strip().split(" ")[0], text, line, above != NO_RUN))
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(path):
        if block.language != "python":
            continue
        where = f"{name(path)}:{block.line}"
        if ">>>" in block.text:
            example = doctest.DocTestParser().get_doctest(
                block.text, namespace, where, str(path), block.line - 1
            )
            if block.runs:
                runner = doctest.DocTestRunner(optionflags=OPTIONS)
                report: list[str] = []
                runner.run(example, out=report.append, clear_globs=False)
                namespace.update(example.globs)
                assert not report, "".join(report)
            continue
        # empty lines above, so that a traceback shows the line of the page
        code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
        if block.runs:
            exec(code, namespace)


@cache
def help_of(*command: str) -> str:
    """What ``polarpack COMMAND --help`` prints, without colours and line breaks inside options."""
    program = [sys.executable, "-c", "from polarpack.cli import main; main()"]
    plain = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    child = subprocess.run(
        [*program, *command, "--help"], capture_output=True, text=True, env=plain, check=False
    )
    assert child.returncode == 0, f"polarpack {shlex.join(command)} --help: {child.stderr}"
    return re.sub(r"\x1b\[[0-9;]*m", "", child.stdout)


def commands(path: Path) -> list[tuple[int, list[str]]]:
    """The words of each ``polarpack`` command in shell blocks, up to a pipe or the like."""
    found = []
    for block in blocks(path):
        if block.language not in ("bash", "sh", "shell", "console"):
            continue
        text = block.text.replace("\\\n", "  ")
        for offset, line in enumerate(text.splitlines()):
            for part in re.split(r"[|;&]+", line.removeprefix("$ ")):
                words = shlex.split(part, comments=True)
                if words[:1] == ["polarpack"]:
                    found.append((block.line + offset, words[1:]))
    return found


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_commands_exist(path):
    for line, words in commands(path):
        command = [word for word in words[:1] if not word.startswith("-")]
        text = help_of(*command)
        for word in words:
            if re.match(r"--?[a-zA-Z]", word):
                option = word.partition("=")[0]
                known = re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text)
                assert known, f"{name(path)}:{line}: polarpack {shlex.join(words)}: no {option}"


def test_readme_names_the_two_commands():
    readme = (ROOT / "README.md").read_text("utf-8")
    for command in (
        'pip install -c constraints.txt ".[all]" && polarpack demo',
        'pip install -c constraints.txt ".[all,test]" && pytest',
    ):
        assert command in readme


def test_install_lines_name_existing_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    texts = {name(path): path.read_text("utf-8") for path in PAGES}
    sources = [
        p for folder in ("polarpack", "polarpack_image") for p in (ROOT / folder).rglob("*.py")
    ]
    texts |= {name(path): path.read_text("utf-8") for path in sources}
    for where, text in texts.items():
        for extras in re.findall(r"polarpack\[([a-z, ]+)\]", text):
            for extra in extras.replace(" ", "").split(","):
                assert extra in project["optional-dependencies"], f"{where}: [{extra}]"


def module_names() -> list[str]:
    walked = pkgutil.walk_packages(polarpack.__path__, "polarpack.", onerror=lambda _: None)
    return ["polarpack", *(module.name for module in walked)]


@pytest.mark.parametrize("module", module_names())
def test_docstrings(module, tmp_path, monkeypatch):
    try:
        loaded = importlib.import_module(module)
    except MissingDependencyError as missing:
        pytest.skip(str(missing))
    monkeypatch.chdir(tmp_path)
    failures = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(loaded):
        report: list[str] = []
        runner.run(test, out=report.append)
        failures += report
    assert not failures, "".join(failures)
