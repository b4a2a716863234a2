"""Imports have one direction: a package imports only from lower layers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# As DESIGN.md has them, from the bottom up: a module may import its own layer and those before it.
LAYERS = [
    {"ctclip.preprocessing"},
    {
        "ctclip.caches",
        "ctclip.errors",
        "ctclip.extras",
        "ctclip.schema",
        "ctclip.plugins",
        "ctclip.config",
        "ctclip.config_files",
        "ctclip.config_keys",
        "ctclip.labels",
        "ctclip.language",
        "ctclip.prompts",
        "ctclip.sentences",
        "ctclip.versions",
        "ctclip.distributed",
        "ctclip.launchers",
    },
    {"ctclip.models", "ctclip.data", "ctclip.phantom", "ctclip.report_reading"},
    {"ctclip.evaluation", "ctclip.drift"},
    {"ctclip.objectives", "ctclip.heads"},
    {"ctclip.explanation"},
    {"ctclip.inference", "ctclip.training", "ctclip.drafting", "ctclip.imagining"},
    {"ctclip.adaptation"},
    {"ctclip.audit"},
    {"ctclip.serve"},
    {"ctclip.demo", "ctclip.train", "ctclip.adapt", "ctclip.zero_shot", "ctclip.cli", "ctclip.__main__"},
]


def layer(module: str) -> int:
    for height, names in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in names):
            return height
    raise AssertionError(f"{module} has no layer: give it one in this test")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "ctclip" and name != "ctclip.__version__"}


def test_no_import_points_upwards() -> None:
    upward = []
    for path in [*ROOT.glob("ctclip/**/*.py"), *ROOT.glob("preprocessing/**/*.py")]:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        module = module if module.startswith("ctclip") else f"ctclip.{module}"
        if module == "ctclip":
            continue
        upward += [
            f"{module} imports {name}" for name in imported(path) if name != "ctclip" and layer(name) > layer(module)
        ]
    assert not upward


def test_a_layer_below_is_noticed() -> None:
    assert layer("ctclip.preprocessing.store") < layer("ctclip.models.text") < layer("ctclip.cli.train")


def test_launchers_are_known_in_two_files() -> None:
    """The launcher is recognised in ``ctclip/launchers.py`` and ranks meet in ``ctclip/distributed.py``; commands
    accept DeepSpeed's own ``--local_rank`` and ignore it."""
    words = re.compile(r"environ\b|getenv|\bRANK\b|LOCAL_RANK|WORLD_SIZE|MASTER_(ADDR|PORT)|SLURM_|init_process_group")
    files = [*ROOT.glob("ctclip/**/*.py"), *ROOT.glob("preprocessing/**/*.py")]
    # caches.py reads the variables for the caches of libraries.
    files = [path for path in files if path.name != "caches.py"]
    reading = [path.name for path in files if words.search(path.read_text(encoding="utf-8"))]
    assert sorted(reading) == ["distributed.py", "launchers.py"]
