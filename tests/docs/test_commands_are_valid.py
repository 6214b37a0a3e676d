"""No page tells a reader to type what the programs do not take: every command is read by its own.

Commands are parsed, and what their values mean is looked up; nothing is run. That they do what
the page says is test_pages_run.py's to show.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from cgfedllm.analysis.candidates import candidates_of
from cgfedllm.analysis.peers import peer_names
from cgfedllm.analysis.tuning import parse_tuning
from cgfedllm.cli import app
from cgfedllm.codecs import base, make_codec
from cgfedllm.config import Config, load_config
from cgfedllm.evaluation.catalogue import find_benchmark
from cgfedllm.pairs import read_codec
from cgfedllm.pretraining import learned_codec
from cgfedllm.reproduce.scales import experiment_config, find_scale

from .pages import ALL, PAGES, ROOT, SHELL, Block, Command, blocks, inline

PROGRAM = typer.main.get_command(app)
# of the shell and of other projects: their own arguments are theirs to check
OTHERS = {"export", "hf", "kill", "ls", "mkdir", "pip", "ssh-keygen", "until"}
OTHERS |= {"flower-superlink", "flower-supernode", "flwr"}
# in the text only: no commands, though they begin like one
NO_COMMANDS = {"cgfedllm secagg mask": "a label that keys are derived with"}
PYTHON = [block for page in PAGES for block in blocks(page, "python")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As where a reader stands: in the repository, with the configuration that README shows."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    mine = next(block for block in blocks("README.md", "toml"))
    for name in ("mine.toml", "experiment.toml", "my.toml"):
        (tmp_path / name).write_text(mine.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.where)
def test_a_command_is_valid(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command.folder != ROOT:
        monkeypatch.chdir(command.folder)
    for word in command.words:
        if re.fullmatch(r"(configs|benchmarks|examples|docs|src|tests)/[\w/.-]+\.\w+", word):
            assert (ROOT / word).is_file(), f"{word} is not in the repository"
    if command.program == "cgfedllm":
        check_values(*parsed(command.words))
    elif command.program == "python":
        check_script(command, monkeypatch)
    elif command.program == "make":
        check_target(command)
    elif command.program.startswith("./"):
        assert os.access(command.folder / command.program, os.X_OK)
    else:
        assert command.program in OTHERS, f"{command}: no test knows this program"
        if command.program.startswith("fl"):
            assert shutil.which(command.program, path=Path(sys.executable).parent)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in inline(page):
        first, _, rest = command.text.partition(" ")
        if not rest or command.text in NO_COMMANDS:
            continue
        if first == "cgfedllm":
            parsed(command.words, whole=False)
        elif first == "python":
            check_script(command, monkeypatch)
        elif first == "make":
            check_target(command)


def test_what_is_no_command_is_still_on_a_page() -> None:
    found = {command.text for page in PAGES for command in inline(page)}
    assert NO_COMMANDS.keys() <= found


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_another_block(page: str) -> None:
    """What is to be typed stands in a block marked `sh`, where these tests find it."""
    programs = (*("cgfedllm", "python", "make"), *OTHERS - {"export", "until"})
    for block in blocks(page):
        if block.language in ("", "text"):
            for line in block.text.splitlines():
                first, _, rest = line.strip().removeprefix("$ ").partition(" ")
                assert not (rest and first in programs), f"{block}: mark the block `sh`: {line}"
        else:
            assert block.language in (*SHELL, "python", "toml"), f"{block}: {block.language}?"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_block_names_what_exists(block: Block) -> None:
    tree = ast.parse(block.text, str(block))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                assert hasattr(importlib.import_module(node.module or ""), name.name), name.name
        elif isinstance(node, ast.Import):
            for name in node.names:
                modules[name.name.partition(".")[0]] = importlib.import_module(name.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if (top := path.partition(".")[0]) in modules and re.fullmatch(r"[\w.]+", path):
                look_up(sys.modules[top], path)


# ---- what a command says ------------------------------------------------------------------------


def parsed(words: list[str], *, whole: bool = True) -> tuple[str, dict[str, Any]]:
    """Name and parameters of a `cgfedllm` command, read by the program itself.

    What is quoted in a text need not be whole: required arguments may be missing.
    """
    command, name, rest = PROGRAM, words[0], words[1:]
    context = None
    while isinstance(command, click.Group):
        if not rest and not whole:
            return name, {}
        assert rest, f"{name} needs a command"
        name, *rest = rest
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    try:
        context = command.make_context(name, rest)
    except click.MissingParameter:
        assert not whole, f"{' '.join(words)}: an argument is missing"
    return name, context.params if context else {}


def check_values(command: str, values: dict[str, Any]) -> None:
    """What the values name exists: keys of the configuration, codecs, benchmarks, peers."""
    config = (
        experiment_config(find_scale(values["scale"]), values["experiment"], values["settings"])
        if command == "paper"
        else load_config(values.get("config_file"), values.get("settings") or ())
    )
    codecs = values.get("codecs") or ()
    if command == "compare":
        seeds = [int(seed) for seed in values["seeds"].split(",")]
        candidates_of(config, codecs, values["variants"] or (), values["references"] or ())
        parse_tuning(values["tune"] or (), values["tune_rounds"], config, seeds)
    elif command == "pretrain":
        learned_codec(config, values["codec"])
    else:
        for codec in (*codecs, *filter(None, [values.get("codec")])):
            make_codec(*read_codec(codec))
    for name in values.get("benchmarks") if command == "evaluate" else ():
        find_benchmark(name)
    assert set(values.get("peers") or ()) <= set(peer_names())
    assert isinstance(config, Config)


def check_script(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script of the repository takes the arguments; it stops once it has read them."""
    script = command.folder / command.words[1]
    if not script.is_file():
        script = ROOT / command.words[1]
    assert script.is_file(), command

    class Read(Exception):
        pass

    original: Callable[..., Any] = argparse.ArgumentParser.parse_args

    def read(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        raise Read

    before = set(sys.modules)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        patch.setattr(os, "environ", dict(os.environ))  # some choose their threads
        patch.setattr(sys, "argv", command.words[1:])
        # what a script imports from beside itself or from the tests may register codecs
        patch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        try:
            with pytest.raises(Read):
                runpy.run_path(str(script), run_name="__main__")
        finally:
            for name in set(sys.modules) - before:
                file = Path(getattr(sys.modules[name], "__file__", None) or "/")
                if any(
                    file.is_relative_to(ROOT / top) for top in ("benchmarks", "examples", "tests")
                ):
                    del sys.modules[name]


def check_target(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE)
    for word in command.words[1:]:
        assert "=" in word or word in targets, f"make has no target {word!r}"


def look_up(thing: Any, path: str) -> None:
    for name in path.split(".")[1:]:
        assert hasattr(thing, name), f"there is no {path}"
        thing = getattr(thing, name)
