"""One name for one thing: options that several commands share have the same meaning, and messages name existing
options."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import ctclip
from ctclip.cli import app

PACKAGE = Path(ctclip.__file__).parent
# Options whose name is self-explanatory, although the command determines the details: a method of what, a seed of which
# draws.
SAME_NAME = {
    "--batch", "--budget", "--calibration", "--cohort", "--config", "--count", "--draws", "--expect", "--force", "--geometry", "--head",
    "--hu", "--index", "--label-set", "--labels", "--language", "--largest-gb", "--level", "--linkage", "--method", "--model",
    "--concepts", "--embeddings", "--masks", "--output",
    "--precision", "--processes", "--prompts", "--reader", "--reader-model", "--reports", "--seed", "--series", "--spec", "--split",
    "--shifts", "--store", "--terms", "--test-split", "--train-split", "--workers", "--abnormality", "--against", "--shots", "--percent",
}  # fmt: skip
# Options with the same name that take a list in one command and one value in another.
LISTS = {"--shots", "--percent"}
# Options of other programs, and of the command line as a whole.
OTHERS = {
    "--shm-size",
    "--debug",
    "--plugin",
    "--version",
    "--help",
    "--install-completion",
    "--show-completion",
    "--slow",
    "--module",
    "--mca",
}


def commands(group: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    group = group or typer.main.get_command(app)
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {key}".strip())
        else:
            yield f"{name} {key}".strip(), command


def options(command: Any) -> dict[str, Any]:
    """The options of a command, by their long names."""
    return {word: one for one in command.params for word in one.opts if word.startswith("--") and not one.hidden}


COMMANDS = dict(commands())
OPTIONS = {name: options(command) for name, command in COMMANDS.items()}


def kind_of(command: Any, option: Any) -> str:
    """flag, number or word, from the annotation of the function's parameter."""
    annotation = str(inspect.signature(command.callback).parameters[option.name].annotation)
    element = annotation.removeprefix("list[").removesuffix("]")
    return {"bool": "flag", "int": "number", "float": "number"}.get(element, "word")


def test_a_shared_option_takes_the_same_kind_of_value_everywhere() -> None:
    kinds = defaultdict(list)
    for name, given in OPTIONS.items():
        for word, option in given.items():
            kinds[word].append(kind_of(COMMANDS[name], option))
    shared = {word: set(kind) for word, kind in kinds.items() if len(kind) > 1}
    for word, kind in shared.items():
        assert len(kind) == 1 or word in LISTS, (word, kind)
    assert set(shared) <= SAME_NAME, (
        f"make sure that these mean the same, or rename one: {sorted(set(shared) - SAME_NAME)}"
    )


def test_one_short_name_is_one_option() -> None:
    short = defaultdict(set)
    for command in COMMANDS.values():
        for option in command.params:
            for word in option.opts:
                if re.fullmatch(r"-\w", word):
                    short[word].add(max(option.opts, key=len))
    assert all(len(names) == 1 for names in short.values()), dict(short)


def test_every_output_is_minus_o() -> None:
    for name, given in OPTIONS.items():
        if "--output" in given:
            assert "-o" in given["--output"].opts, name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    for option in COMMANDS[name].params:
        text = getattr(option, "help", "") or ""
        assert len(text) > 10 or option.hidden or option.name == "help", (name, option.name)
        assert text.endswith((".", "...", "?", ")")) or option.hidden or option.name == "help", (name, text)


def test_every_command_that_reads_a_scan_takes_the_options_of_reading() -> None:
    reading = {"--hu", "--geometry", "--expect", "--series", "--largest-gb"}
    readers = [name for name, one in COMMANDS.items() if {"scan", "scans"} & {part.name for part in one.params}]
    # `train --plan --scans` is a number.
    readers.remove("train")
    assert {"zero-shot", "explain", "find", "ask", "similar", "embed"} <= set(readers)
    for name in readers:
        assert reading <= set(OPTIONS[name]), name


def messages() -> Iterator[tuple[Path, int, str]]:
    """Texts of the package that name an option: file, line, text. Values in an f-string become ``{}``."""
    files = [*PACKAGE.glob("**/*.py"), *(PACKAGE / "preprocessing").glob("**/*.py")]
    for path in sorted(set(files)):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = {
            id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in ast.walk(node)
        } - {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
        for node in ast.walk(tree):
            text = None
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                text = node.value
            if text and "var(--" not in text and " " in text and re.search(r"(?<![\w-])--[a-z]", text):
                yield path, node.lineno, text


# Files of the command line that contain several commands, or parts of commands.
FILES_OF_SEVERAL = {"__init__", "reading", "renamed", "tables", "show_readings", "index", "prompts", "labels", "config"}


def named(text: str) -> Iterator[tuple[str | None, str]]:
    """(command or None, option) for each option in a text: that of the ``ctclip COMMAND`` before it, in one pair of backquotes."""
    for part in re.split(r"(`[^`]*`)", text):
        command = None
        if part.startswith("`"):
            match = re.match(r"`ctclip ([a-z-]+(?: (?:list|show|lint|mine|from-csv|explain))?)", part)
            command = next((one for one in (match[1], match[1].split()[0]) if one in OPTIONS), None) if match else None
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", part):
            yield command, option


def test_messages_name_options_that_exist() -> None:
    every = {word for given in OPTIONS.values() for word in given} | OTHERS
    texts = list(messages())
    assert len(texts) > 60
    for path, line, text in texts:
        own = path.stem.replace("_", "-") if path.parent.name == "cli" and path.stem not in FILES_OF_SEVERAL else None
        for command, option in named(text):
            where = f"{path}:{line}: {option}"
            if re.search(rf"(pip|srun|torchrun|mpirun|deepspeed|hf|curl|sbatch)\b[^`]*{option}", text):
                continue
            if command is not None:
                assert option in OPTIONS[command] or option in OTHERS, f"{where} is no option of `ctclip {command}`"
            elif own in OPTIONS and not text.startswith("ctclip"):
                assert option in OPTIONS[own] or option in OTHERS, f"{where} is no option of `ctclip {own}`"
            else:
                assert option in every, f"{where} is no option of any command"


@pytest.mark.parametrize(
    ("command", "arguments", "present"),
    [
        ("preprocess", ["x", "--output", "s", "--cohort", "ct-rate"], {"layout": "ct-rate"}),
        ("preprocess", ["x", "--output", "s", "--calibration=0.1", "--labels", "l"], {"calibration_fraction": 0.1, "label_set": "l"}),
        ("zero-shot", ["--model", "m", "--store", "s", "--reports"], {"embed_reports": True}),
        ("import-checkpoint", ["x.pt", "--text", "bert", "--output", "m"], {"text_encoder": "bert"}),
    ],
)  # fmt: skip
def test_names_of_earlier_versions_are_accepted(command: str, arguments: list[str], present: dict[str, Any]) -> None:
    given = COMMANDS[command].make_context(command, arguments).params
    assert {key: given[key] for key in present} == present


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("ctclip pre", "preprocess"),
        ("ctclip zero-shot --emb", "--embed-reports"),
        ("ctclip preprocess x --hu t", "trust-file"),
    ],
)
def test_a_shell_completes_commands_options_and_choices(typed: str, offered: str, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("_CTCLIP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    with pytest.raises(SystemExit):
        app(prog_name="ctclip")
    assert offered in capsys.readouterr().out.split()
