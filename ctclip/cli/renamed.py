"""Earlier option names, which commands still accept but do not list in their help."""

from __future__ import annotations

from typing import Any, ClassVar

from ctclip.cli.command import Command


class Renamed(Command):
    """A command with renamed options; see ``renamed``."""

    earlier: ClassVar[dict[str, str]] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [self._current(word) for word in args])

    def _current(self, word: str) -> str:
        option, equals, value = word.partition("=")
        return self.earlier.get(option, option) + equals + value


def renamed(earlier: dict[str, str]) -> type[Renamed]:
    """A command class that accepts the options of ``earlier`` (earlier name: current name) under both names."""
    return type("Renamed", (Renamed,), {"earlier": earlier})
