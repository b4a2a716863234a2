"""The command line: parses, calls one function, prints. Each command is one file of this package.

Heavy packages are imported inside the commands, so that ``ctclip --help`` answers at once.
"""

from __future__ import annotations

import itertools
import sys
from typing import NoReturn

import typer
from typer.core import TyperCommand

from ctclip import __version__
from ctclip.cli.adapt import adapt
from ctclip.cli.analyze import analyze
from ctclip.cli.ask import ask
from ctclip.cli.audit import audit
from ctclip.cli.calibrate import calibrate
from ctclip.cli.check_precision import check_precision
from ctclip.cli.clean_reports import clean_reports
from ctclip.cli.command import Command
from ctclip.cli.config import config
from ctclip.cli.demo import demo
from ctclip.cli.draft import draft
from ctclip.cli.embed import embed
from ctclip.cli.evaluate import evaluate
from ctclip.cli.explain import explain
from ctclip.cli.export import export
from ctclip.cli.filter_pairs import filter_pairs
from ctclip.cli.find import find
from ctclip.cli.imagine import imagine
from ctclip.cli.import_checkpoint import import_checkpoint
from ctclip.cli.index import index, similar
from ctclip.cli.labels import labels
from ctclip.cli.locate import locate
from ctclip.cli.models import models
from ctclip.cli.phantom import phantom
from ctclip.cli.preprocess import preprocess
from ctclip.cli.probe import probe
from ctclip.cli.prompts import prompts
from ctclip.cli.publish import publish
from ctclip.cli.quality import quality
from ctclip.cli.read_reports import read_reports
from ctclip.cli.renamed import renamed
from ctclip.cli.report import report
from ctclip.cli.serve import serve
from ctclip.cli.soup import soup
from ctclip.cli.summarise import summarise
from ctclip.cli.train import train
from ctclip.cli.zero_shot import zero_shot
from ctclip.versions import COMMAND

# The exit code that shells expect after Ctrl-C, which Typer uses too.
INTERRUPTED = 130

app = typer.Typer(
    help="3-D vision-language learning on chest CT: preprocess volumes, train a model, detect abnormalities from text prompts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command()(phantom)
app.command(
    cls=renamed({"--calibration": "--calibration-fraction", "--cohort": "--layout", "--labels": "--label-set"})
)(preprocess)
app.command()(quality)
app.command()(train)
app.command("zero-shot", cls=renamed({"--reports": "--embed-reports"}))(zero_shot)
app.command()(explain)
app.command()(find)
app.command()(locate)
app.command()(probe)
app.command()(adapt)
app.command()(soup)
app.command()(summarise)
app.command()(calibrate)
app.command("check-precision")(check_precision)
app.command()(evaluate)
app.command()(report)
app.command()(serve)
app.command()(embed)
app.command()(index)
app.command()(similar)
app.command()(ask)
app.command()(draft)
app.command()(imagine)
app.command("read-reports")(read_reports)
app.command("clean-reports")(clean_reports)
app.command()(analyze)
app.command("filter-pairs")(filter_pairs)
app.add_typer(audit, name="audit")
app.add_typer(prompts, name="prompts")
app.add_typer(labels, name="labels")
app.add_typer(config, name="config")
app.command()(export)
app.command("import-checkpoint", cls=renamed({"--text": "--text-encoder"}))(import_checkpoint)
app.command()(models)
app.command()(publish)
app.command()(demo)

for group in (app, audit, prompts, labels, config):
    for registered in group.registered_commands:
        registered.cls = Command if registered.cls in (None, TyperCommand) else registered.cls


def _version(asked: bool) -> None:
    if asked:
        print(f"ctclip {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the full traceback when a command fails."),
    plugin: list[str] = typer.Option(
        None,
        "--plugin",
        metavar="MODULE",
        help="Import this module before the command runs, so that a model can use its classes. May be repeated.",
    ),
) -> None:
    """Options that precede the command."""
    if plugin:
        from ctclip.plugins import import_own

        for module in plugin:
            import_own(module, f"--plugin {module}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line in this Python process, a notebook's for example, and return its exit code: 2 after an error
    that the user can act on, which is printed in one line."""
    from concurrent.futures import BrokenExecutor

    from ctclip.errors import CtclipError
    from ctclip.preprocessing.errors import PreprocessingError, printable

    words = sys.argv[1:] if arguments is None else list(arguments)
    first, rest = options_first(words)
    code, outer = 0, COMMAND.set(["ctclip", *words])
    try:
        # Commands that start ranks of themselves pass on their arguments, without the program name.
        app([*first, *rest], obj=[*first, *rest[1:]])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except (CtclipError, PreprocessingError, OSError) as error:
        if "--debug" in first:
            raise
        # A message may quote any part of a file.
        print(f"error: {printable(str(error))}", file=sys.stderr)
        code = 2
    except BrokenExecutor:
        if "--debug" in first:
            raise
        print("error: a worker process was killed, probably because memory ran out; end other programs, and run the same "
              "command again", file=sys.stderr)  # fmt: skip
        code = 2
    finally:
        COMMAND.reset(outer)
    # If this module (which imports torch, for seconds) is not loaded, this process is not a rank.
    distributed = sys.modules.get("ctclip.distributed")
    if code == INTERRUPTED and (distributed is None or distributed.launched_rank() == 0):
        print("interrupted", file=sys.stderr, flush=True)
    return code


def command(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the console script: run the command line, and exit with its code."""
    code = main(arguments)
    distributed = sys.modules.get("ctclip.distributed")
    if distributed is not None:
        distributed.leave(code)
    sys.exit(code)


def options_first(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split ``--debug`` and ``--plugin MODULE``, which must precede the command, from the other arguments; under a
    launcher, users of `ctclip.train` cannot put them first."""
    first: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--debug" or word.startswith("--plugin="):
            first.append(word)
        elif word == "--plugin":
            first += [word, *itertools.islice(words, 1)]
        elif word == "--":
            rest += [word, *words]
        else:
            rest.append(word)
    return first, rest
