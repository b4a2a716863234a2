"""Mutation testing: the share of small faults in a module that its tests detect: ``python -m tests.benchmarks.mutants
MODULE TESTFILE...``.

One operator, number, condition or returned value is changed at a time (in memory; no file is touched) and the tests run
with the changed module in a separate process. A mutant is killed if a test fails, or if the tests take too long. Numba
is disabled, because it would reuse the compiled code of the unchanged module.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
SLOWEST = 5.0  # Timeout as a multiple of the time for the unchanged module; at least half a minute.


def changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str, object]]:
    """(node, field, new value) of every mutant; annotations and strings are left alone."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
        if isinstance(part := getattr(node, field, None), ast.AST)
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Compare):
            for index, operator in enumerate(node.ops):
                if type(operator) in SWAPS:
                    yield node, "ops", [*node.ops[:index], SWAPS[type(operator)](), *node.ops[index + 1 :]]
        elif isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in SWAPS:
            yield node, "op", SWAPS[type(node.op)]()
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
            yield node, "op", ast.UAdd() if isinstance(node.op, ast.USub) else None
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            yield node, "value", not node.value if isinstance(node.value, bool) else node.value + 1
        elif isinstance(node, ast.Return) and node.value is not None:
            yield node, "value", ast.Constant(None)


def mutants(source: str, sample: int | None = None, seed: int = 0) -> Iterator[tuple[int, str, CodeType]]:
    """Line, words and code of every mutant of a module's source, or of a random sample of them."""
    count = len(list(changes(ast.parse(source))))
    indices = range(count) if sample is None else sorted(random.Random(seed).sample(range(count), min(sample, count)))
    for index in indices:
        tree = ast.parse(source)
        node, field, value = list(changes(tree))[index]
        before = ast.unparse(node)
        if value is None:  # `not x` and `~x` become x
            operand = copy.deepcopy(node.operand)  # type: ignore[attr-defined]
            node.__class__, node.__dict__ = operand.__class__, operand.__dict__  # type: ignore[assignment]
        else:
            setattr(node, field, value)
        ast.fix_missing_locations(tree)
        line = getattr(node, "lineno", 0)
        yield line, f"{before}  ->  {ast.unparse(node)}", compile(tree, "<mutant>", "exec")


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Load the code of a mutant when the module is imported."""

    def __init__(self, name: str, file: str, code: CodeType) -> None:
        self.name, self.file, self.code = name, file, code

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> object:  # type: ignore[override]
        return (
            importlib.util.spec_from_file_location(fullname, self.file, loader=self) if fullname == self.name else None
        )  # type: ignore[arg-type]

    def exec_module(self, module: ModuleType) -> None:
        exec(self.code, module.__dict__)


def passes(finder: Changed, files: Sequence[str], seconds: float) -> bool:
    """Whether the tests pass with the changed module, in a fork of this process."""
    child = os.fork()
    if child == 0:
        os.setsid()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        sys.meta_path.insert(0, finder)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *files])))
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def preload() -> None:
    """Import third-party packages once instead of for every mutant."""
    for name in ("pytest", "numpy", "pandas", "pyarrow.parquet", "scipy.stats", "scipy.optimize", "scipy.integrate", "scipy.ndimage", "sklearn.metrics", "sklearn.calibration", "sklearn.linear_model", "sklearn.ensemble", "hypothesis", "numba", "torch", "transformers.models.bert.modeling_bert", "pydantic", "deepspeed"):  # fmt: skip
        importlib.import_module(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="such as ctclip.evaluation.metrics")
    parser.add_argument("tests", nargs="+", help="the module's test files")
    parser.add_argument("--sample", type=int, default=None, help="number of mutants to draw at random; default: all")
    parser.add_argument("--seed", type=int, default=0, help="which sample")
    parser.add_argument("--select", default="", help="options for pytest, such as '-k name'")
    chosen = parser.parse_args()
    os.environ |= {
        "NUMBA_DISABLE_JIT": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONHASHSEED": "0",
        "HYPOTHESIS_DATABASE_FILE": os.devnull,
    }
    file = Path(*chosen.module.split(".")).with_suffix(".py")
    source = file.read_text(encoding="utf-8")
    preload()
    tests = [*chosen.select.split(), *chosen.tests]
    began = time.monotonic()
    if not passes(Changed(chosen.module, str(file), compile(source, str(file), "exec")), tests, 600):
        sys.exit(f"{chosen.module}: its tests fail without any change; fix that first")
    limit = max(30.0, SLOWEST * (time.monotonic() - began))
    survivors, total = [], 0
    for line, words, code in mutants(source, chosen.sample, chosen.seed):
        total += 1
        if passes(Changed(chosen.module, str(file), code), tests, limit):
            survivors.append((line, words))
            print(f"survived: {file}:{line}: {words}", flush=True)
    killed = total - len(survivors)
    words = "" if chosen.sample is None else f" (a sample of {len(list(changes(ast.parse(source))))})"
    print(f"{chosen.module}{words}: {killed} of {total} mutants killed ({killed / max(total, 1):.1%})")


if __name__ == "__main__":
    main()
