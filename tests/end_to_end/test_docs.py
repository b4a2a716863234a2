"""The README and docs/: every command block runs, or at least parses; the tables of columns are those of the files.

A block is run unchanged, in one folder that contains a reader's files (a scan, a store, a run). A comment above a block,
``<!-- needs: CT-RATE -->``, states that it needs something that a test lacks (data, a GPU, Slurm, a checkpoint, the network,
or minutes): then its commands are parsed by the real command line and its configurations loaded. ``docs/extending.md`` has
a separate test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pandas as pd
import pyarrow.parquet as pq
import pytest
import typer.main
import yaml

import ctclip
from ctclip.cli import app, main
from ctclip.config_files import load_config

from .conftest import TINY, run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "extending.md")]
BLOCK = re.compile(r'^(?:<!-- needs: (?P<needs>[^>]+?) -->\n)?```(?P<kind>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```', re.M | re.S)  # fmt: skip
NEEDS = {"CT-RATE", "GPU", "Slurm", "checkpoint", "network", "pip", "time"}
# Settings that make the commands smaller and faster.
SMALLER = {"train": [*TINY, "training.epochs=1"], "evaluate": ["--bootstrap", "20"]}
SHELL = {"source", "pip", "python", "hf", "curl", "docker", "apptainer"}


@dataclass(frozen=True)
class Block:
    page: str
    kind: str
    title: str
    text: str
    needs: str

    @property
    def commands(self) -> list[list[str]]:
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


BLOCKS = [
    Block(str(page.relative_to(ROOT)), m["kind"], m["title"] or "", m["text"], m["needs"] or "")
    for page in PAGES
    for m in BLOCK.finditer(page.read_text(encoding="utf-8"))
]
BASH = [block for block in BLOCKS if block.kind == "bash"]
RUN_PAGES = sorted({block.page for block in BASH if not block.needs})


def test_blocks_are_marked_with_what_is_known() -> None:
    assert {block.needs for block in BLOCKS if block.needs} <= NEEDS
    assert len(BASH) > 20


@pytest.mark.parametrize("block", BASH, ids=lambda block: f"{block.page}: {block.text[:40].splitlines()[0]}")
def test_every_command_parses(block: Block) -> None:
    for words in block.commands:
        _check(words)


def _check(words: list[str]) -> None:
    program, *arguments = words
    if program == "ctclip":
        _parse(arguments)
    elif "ctclip.train" in words:
        # A launcher: the words after the module are ours.
        _parse(["train", *words[words.index("ctclip.train") + 1 :]])
    elif program == "make":
        goals = [word for word in arguments if "=" not in word]
        assert all(re.search(rf"^{goal}:", (ROOT / "Makefile").read_text(), re.M) for goal in goals), words
    elif program == "sbatch":
        assert (ROOT / arguments[0]).is_file(), words
    else:
        assert program in SHELL, f"{words}: no program that this test knows"


def _parse(arguments: list[str]) -> None:
    """Parse with the real command line, without running it; a configuration that is named is loaded with its
    overrides."""
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        while arguments[0] == "--plugin":
            arguments = arguments[2:]
        if arguments[0].startswith("--"):
            known = [word for parameter in command.params for word in parameter.opts]
            assert arguments[0] in known, f"no option {arguments[0]}"
            return
        assert arguments[0] in command.commands, f"no command {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    given = command.make_context(command.name, list(arguments)).params
    config = given.get("config") or (given.get("name") if command.callback.__module__ == "ctclip.cli.config" else None)
    if config and (ROOT / "configs" / f"{config}.yaml").is_file():
        load_config(config, list(given.get("overrides") or []))


def test_the_parser_refuses_what_is_wrong() -> None:
    for wrong in ("ctclip zero-shot --modle m scan.nii.gz", "ctclip trian --config phantom_tiny", "ctclip --versoin"):
        with contextlib.redirect_stderr(io.StringIO()), pytest.raises((Exception, SystemExit)):
            _check(shlex.split(wrong))
    with pytest.raises(Exception, match=r"did you mean .training\.epochs"):
        _check(shlex.split("ctclip train --config phantom_tiny training.epoch=3"))


@pytest.fixture(scope="module")
def workplace(store: Path, trained: Path, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files that a reader of the pages has: a scan, some scans, a DICOM-like folder, a store, a run, and the files
    of the pages."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(store, folder / "store")
    shutil.copytree(trained, folder / "runs" / "first")
    scans = sorted(cohort.rglob("dataset/**/*.nii.gz"))
    for name in ("my_scan.nii.gz", "scan.nii.gz"):
        shutil.copy(scans[0], folder / name)
    # Pages that name the results of the demo.
    (folder / "runs" / "demo").mkdir()
    (folder / "runs" / "demo" / "train").symlink_to(trained)
    (folder / "runs" / "demo" / "cohort").symlink_to(cohort)
    for name in ("my_scans", "my_series"):
        (folder / name).mkdir()
        for letter, path in zip("abc", scans, strict=False):
            shutil.copy(path, folder / name / f"{letter}.nii.gz")
    for block in BLOCKS:
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
    findings = {"volume": ["a", "b"], "Nodule": [0, 1], "Effusion": [1, ""], "age": [40, 51]}
    pd.DataFrame(findings).to_csv(folder / "findings.csv", index=False)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.mark.integration
@pytest.mark.parametrize("page", RUN_PAGES)
def test_a_page_runs(page: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    allowed = {0, 3} if "lint" in "".join(block.text for block in BASH if block.page == page) else {0}
    # The phantom's spec never refuses the lungs of phantoms. A cohort in which some scans are refused also ends with 3.
    for block in BASH:
        if block.page != page or block.needs:
            continue
        for words in block.commands:
            code = _run(words)
            shown = capsys.readouterr()
            assert code in allowed, f"{shlex.join(words)}\n{shown.out[-1500:]}\n{shown.err[-1500:]}"


def _run(words: list[str]) -> int:
    assert words[0] == "ctclip", words
    arguments = [*words[1:], *SMALLER.get(words[1], [])] if "--plan" not in words else words[1:]
    if arguments[0] == "train" and "--plan" not in arguments:
        # A training in this process would leave the settings of its ranks behind.
        done = run(*arguments, folder=Path.cwd())
        print(done.stdout[-1000:], done.stderr[-2000:])
        return done.returncode
    return main(arguments)


@pytest.mark.integration
@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.kind == "python"], ids=lambda block: f"{block.page}: {block.title}"
)
def test_python_compiles_and_runs(block: Block, workplace: Path) -> None:
    code = compile(block.text, block.page, "exec")
    if "snapshot_download" not in block.text and not block.needs:
        exec(code, {"__name__": "__main__"})


def _reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.integration
def test_columns_are_those_of_the_files(workplace: Path) -> None:
    """Every column that a command writes is explained, and every explained column exists in some file."""
    described = {name: set(file["columns"]) for name, file in _reference().files().items() if "columns" in file}
    answers = workplace / "columns"
    assert _run(["ctclip", "zero-shot", "--model", "runs/first/model", "--store", "store", "--split", "valid", "--embed-reports", "--output", str(answers)]) == 0  # fmt: skip
    assert _run(["ctclip", "evaluate", str(answers / "predictions.csv"), "--store", "store", "--protocol", "phantom", "--output", str(answers / "evaluation")]) == 0  # fmt: skip
    labels = set(pd.read_parquet("store/cohort.parquet").select_dtypes("Int8").columns)
    written = {
        "predictions.csv": list(pd.read_csv(answers / "predictions.csv").columns),
        "embeddings.parquet": pq.read_schema(answers / "embeddings.parquet").names,
        "cohort.parquet": pq.read_schema("store/cohort.parquet").names,
        "outcomes.csv": list(pd.read_csv("store/outcomes.csv").columns),
        "metrics.csv": [re.sub("_(lower|upper)$", "", c) for c in pd.read_csv(answers / "evaluation" / "metrics.csv")],
    }
    for name, columns in written.items():
        names = {re.sub("^(margin|lower|upper):.*", r"\1:<label>", column) for column in columns}
        generic = {"<label>" if column in labels else column for column in names}
        assert not generic - described[name], f"docs/files.yaml does not explain these columns of {name}"
    optional = {
        "value:<name> [unit]",
        "adapted_on",
        "no_chest",
        "xy_spacing",
        "z_spacing",
        "image_orientation",
        "image_position",
    }
    for name, columns in written.items():
        absent = {c for c in described[name] if "<label>" not in c} - optional - set(columns)
        assert not absent, f"docs/files.yaml explains columns of {name} that are not written"


@pytest.mark.integration
def test_the_site_is_built_without_a_broken_link(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed; the extra [docs] brings it")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed; the extra [docs] brings it")
    pytest.importorskip("material", reason="mkdocs-material is not installed; the extra [docs] brings it")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
                          cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "--largest-gb" in page
    html = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html"))
    loaded = re.findall(r'<(?:script|link)[^>]+(?:src|href)="(https?://[^"]+)"', html)
    assert not [url for url in loaded if "canonical" not in url], "a page loads something from the network"


def test_links_of_files_outside_the_site_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        places = [place for place in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in place]
        assert not [place for place in places if not (ROOT / place).exists()], name


def test_the_citation_is_of_this_version() -> None:
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert facts["version"] == ctclip.__version__
    assert {"cff-version", "message", "title", "authors"} <= facts.keys()


def test_pictures_are_small() -> None:
    assert not [path for path in (ROOT / "docs").rglob("*.png") if path.stat().st_size > 300_000]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 90
