"""Generate the pages of the reference when the documentation is built: commands, configuration, files and columns.

A hook of MkDocs (see ``mkdocs.yml``). Each description is written once: in the help of a command, in the schema of the
configuration, or in ``docs/files.yaml``, which a test compares with the files that commands write.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import yaml

INTRODUCTION = {
    "commands": "# Commands\n\nGenerated from the help of each command, which `ctclip COMMAND --help` prints.\n\n"
    "Exit codes: 0 done; 2 failed, with one line that gives the reason and the remedy; 3 done, but some scans were "
    "refused; 75 a training "
    "run stopped after writing a checkpoint; 130 interrupted.\n\n`--debug` shows the traceback of an error; `--plugin MODULE` imports a "
    "module first. Both may be given anywhere.\n",
    "configuration": "# Configuration\n\nEvery key of a training recipe, with its default and meaning; `ctclip config explain KEY` "
    "prints the same. On the command line: `training.epochs=5`.\n",
    "files": "# Files and columns\n\nEvery file that a command writes, and its content. A column in angle brackets stands for one column per label.\n",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_config(config: Any) -> Any:
    """Put pages of docs/ that the navigation does not name under "How to"."""
    named = set(_leaves(config.nav))
    how_to = next(section["How to"] for section in config.nav if "How to" in section)
    how_to += [page.name for page in sorted(Path(config.docs_dir).glob("*.md")) if page.name not in named]
    return config


def _leaves(nav: Any) -> Iterator[str]:
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            yield from _leaves(value) if isinstance(value, list) else [value]


def pages() -> dict[str, str]:
    """Markdown of each generated page, by its name."""
    # Import ctclip from this checkout, whatever else is installed. MkDocs reverts changes of the path made while a hook
    # is loaded.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    made = {"commands": commands(), "configuration": configuration(), "files": written_files()}
    return {name: f"{INTRODUCTION[name]}\n{text}" for name, text in made.items()}


def commands() -> str:
    """Help, arguments and options of every command."""
    import typer.main

    from ctclip.cli import app

    return "\n".join(_command(command, f"ctclip {name}") for name, command in _tree(typer.main.get_command(app)))


def _tree(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _tree(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _command(command: Any, name: str) -> str:
    lines = [
        f"## {name}",
        "",
        inspect.cleandoc(command.help or ""),
        "",
        "| | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        words = (
            [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else [parameter.name]
        )
        names = ", ".join(f"`{word}`" for word in words)
        default = "required" if parameter.required else _default(parameter)
        lines.append(f"| {names} | {_kind(parameter)} | {default} | {_cell(parameter.help or '')} |")
    return "\n".join([*lines, ""])


def _kind(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return "flag"
    kind = parameter.type_descriptor.annotation
    inner = next(iter(get_args(kind)), kind)
    if isinstance(inner, type) and issubclass(inner, Enum):
        return ", ".join(str(choice.value) for choice in inner)
    words = {str: "text", int: "whole number", float: "number", Path: "path", bool: "flag"}.get(inner, str(inner))
    return words if inner is kind else f"{words}, several"


def _default(parameter: Any) -> str:
    value = parameter.default
    # Show 0 as a default, but not false for flags or missing defaults.
    if value is None or value is False or value in ("", ()) or callable(value):
        return ""
    return f"`{getattr(value, 'value', value)}`"


def configuration() -> str:
    """Every key of the schema, section by section; then those of label sets, prompt sets and protocols."""
    from ctclip.config_keys import keys, section_keys
    from ctclip.evaluation.protocol import Protocol
    from ctclip.labels import LabelSet
    from ctclip.prompts import PromptSet

    sections: dict[str, list[Any]] = {}
    for key in keys():
        parents = key.path.rpartition(".")[0] or "The run itself"
        inside = parents == "model.volume" and key.kind
        sections.setdefault(f"{parents}, kind {key.kind}" if inside else parents, []).append(key)
    for title, schema in (("Label sets", LabelSet), ("Prompt sets", PromptSet), ("Protocols", Protocol)):
        sections[f"{title} (`configs/{title.lower().removesuffix(' sets').rstrip('s')}s`)"] = section_keys(schema)
    parts = []
    for title, members in sections.items():
        rows = [
            f"| `{key.path}` | {_cell(key.type)} | `{_cell(key.default)}` | {_cell(key.meaning)} |" for key in members
        ]
        parts.append(
            "\n".join([f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])
        )
    return "\n".join(parts)


def written_files() -> str:
    """The description of every file in ``docs/files.yaml``."""
    parts = []
    for name, file in files().items():
        parts += [f"## {name}", "", f"Written by `{file['by']}`; version {file['version']}. {file['is']}", ""]
        if "columns" in file:
            parts += ["| column | unit or type | meaning |", "|---|---|---|"]
            parts += [
                f"| `{column}` | {_cell(unit)} | {_cell(meaning)} |"
                for column, (unit, meaning) in file["columns"].items()
            ]
            parts.append("")
    return "\n".join(parts)


def files() -> dict[str, Any]:
    """``docs/files.yaml``."""
    known: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("files.yaml").read_text(encoding="utf-8"))
    return known


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")
