"""Kill every command that writes, and start pairs of them into one output.

``python -m tests.robustness.kills --kills 200``: a command (alone, or with its child processes) is killed with SIGKILL
at a random moment, one to three times, and started again until it finishes. Its output must equal, byte for byte, the
output of a command that was not killed. ``--pairs 50``: two commands, with the same or with different inputs, write
into one output at the same time. Each must end with exit code 0 or be refused in one line, and the output must be that
of exactly one of the two commands. Exit code 1 if any of this fails.

Files that differ between two undisturbed runs are not compared: lock files, times in the metrics of a training,
TensorBoard events, and the random salt of a calibration with the digests that depend on it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ctclip.preprocessing.spec import PreprocessingSpec
from tests.benchmarks.common import machine, table
from tests.end_to_end.conftest import TINY
from tests.robustness.processes import FORKED, Command, Done

# Imported before a command starts, so that kills hit its work and not its imports.
FORKED.set_forkserver_preload([
    "torch", "deepspeed", "torch.utils.tensorboard", "numba", "nibabel", "faiss", "matplotlib.pyplot", "sklearn.ensemble",
    "transformers.models.bert.modeling_bert", "ctclip.cli", "ctclip.phantom.cohort", "ctclip.preprocessing.quality",
    "ctclip.training.loop", "ctclip.training.export", "ctclip.models.vit3d", "ctclip.inference.model",
    "ctclip.inference.index", "ctclip.inference.import_published", "ctclip.evaluation.run_evaluation",
])  # fmt: skip
PUBLISHED = Path(__file__).parents[1] / "golden" / "data"
VOLUMES, SCALE = 16, 12
# Keys whose values are times and rates.
TIMED = ("second", "time", "per_s", "memory", "wait", "rate_of", "volumes_s")
# The demo's spec at half its resolution; and a coarser one, for a store with another spec.
SPECS = {
    "half": ((9.0, 6.4, 6.4), (32, 48, 64)),
    "coarse": ((18.0, 12.8, 12.8), (16, 32, 32)),
}
BUSY = ("is writing it", "run is going on")
SECONDS = 600


@dataclass
class Case:
    """A command that writes to ``place``; ``other``: the same command with different inputs; ``given``: files that must
    be in ``place`` beforehand, by name."""

    name: str
    place: Path
    arguments: list[str]
    other: list[str] | None = None
    given: dict[str, Path] = field(default_factory=dict)
    seconds: float = 0.0

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        for name, source in self.given.items():
            shutil.copytree(source, self.place / name)

    def whole(self, other: bool = False) -> dict[str, str]:
        """The output of the undisturbed command, and its duration."""
        self.reset()
        began = time.monotonic()
        done = start(self, other).wait(SECONDS)
        self.seconds = time.monotonic() - began
        if done.returncode:
            raise RuntimeError(f"{self.name}: exit code {done.returncode}: {done.stderr[-2000:]}")
        return tree(self.place)


def start(case: Case, other: bool = False) -> Command:
    """The command, with its own temporary folder beside the output."""
    scratch = case.place.with_name(f"{case.place.name}.tmp")
    scratch.mkdir(exist_ok=True)
    patch = f"import os, tempfile; os.environ['TMPDIR'] = {str(scratch)!r}; tempfile.tempdir = None"
    return Command(case.other if other and case.other else case.arguments, patch)


def cases(work: Path) -> list[Case]:
    """Every command that writes, with inputs made by the commands before it."""
    inputs, out = work / "inputs", work / "out"
    text = _published_text(work / "text")
    specs = {}
    for name, (spacing, shape) in SPECS.items():
        specs[name] = work / f"{name}.yaml"
        PreprocessingSpec(name, spacing=spacing, shape=shape).save(specs[name])
    small, cohort, store, run = (inputs / name for name in ("small", "cohort", "store", "run"))
    model, first, second = run / "model", inputs / "first", inputs / "second"
    tiny = [*TINY, "training.keep_checkpoints=4", f"preprocessing={specs['half']}"]
    scored = ["--store", str(store), "--protocol", "phantom", "--bootstrap", "20"]
    ready = work / "ready"
    for name, arguments in {} if ready.exists() else {
        "small": ["phantom", str(small), "--volumes", "8", "--scale", str(SCALE), "--seed", "3"],
        "cohort": ["phantom", str(cohort), "--volumes", str(VOLUMES), "--scale", str(SCALE), "--rare-floor", "0.5", "--valid-fraction", "0.5"],
        "store": ["preprocess", str(cohort), "--output", str(store), "--spec", str(specs["half"])],
        "run": ["train", "--config", "phantom_tiny", "--store", str(store), "--output", str(run), *tiny, "training.epochs=1"],
        "first": ["zero-shot", "--model", str(model), "--store", str(store), "--embed-reports", "--output", str(first)],
        "second": ["zero-shot", "--model", str(model), "--store", str(store), "--split", "valid", "--embed-reports", "--output", str(second)],
        "index": ["index", "--model", str(model), "--store", str(store), "--output", str(inputs / "index")],
        "scored": ["evaluate", str(first / "predictions.csv"), *scored, "--output", str(inputs / "scored")],
        "rescored": ["evaluate", str(second / "predictions.csv"), *scored, "--output", str(inputs / "rescored")],
    }.items():  # fmt: skip
        done = Command(arguments).wait(SECONDS)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    ready.touch()

    def case(
        name: str, *words: object, other: list[object] | None = None, given: dict[str, Path] | None = None
    ) -> Case:
        place = out / name.replace(" ", "-")
        fill = lambda all_words: [str(word).replace("OUT", str(place)) for word in all_words]  # noqa: E731
        command = name.split()
        return Case(name, place, [*command, *fill(words)], [*command, *fill(other)] if other else None, given or {})

    used = ["--model", model, "--store", store]
    predicted = first / "predictions.csv", second / "predictions.csv"
    scan, another = sorted(cohort.rglob("*.nii.gz"))[:2]
    table = cohort / "labels.csv"
    pd.read_parquet(store / "cohort.parquet").to_csv(table, index=False)
    return [
        case("phantom", "OUT/c", "--volumes", 8, "--scale", SCALE, "--seed", 3, "--workers", 2,
             other=["OUT/c", "--volumes", 8, "--scale", SCALE, "--seed", 4, "--workers", 2]),
        case("preprocess", small, "--output", "OUT/s", "--spec", specs["half"], "--workers", 2,
             other=[small, "--output", "OUT/s", "--spec", specs["coarse"], "--workers", 2]),
        case("quality", store, "--output", "OUT/q.html", other=[store, "--output", "OUT/q.html", "--split", "valid"]),
        case("train", "--config", "phantom_tiny", "--store", store, "--output", "OUT/r", *tiny, "training.epochs=1",
             other=["--config", "phantom_tiny", "--store", store, "--output", "OUT/r", *tiny, "training.epochs=1", "seed=1"]),
        case("export", run, "--output", "OUT/m"),
        case("import-checkpoint", PUBLISHED / "checkpoint.pt", "--text-encoder", text, "--output", "OUT/m"),
        case("zero-shot", *used, "--output", "OUT/p", "--batch", 1, "--embed-reports",
             other=[*used, "--output", "OUT/p", "--batch", 1, "--split", "valid"]),
        case("embed", *used, "--output", "OUT/e.parquet", other=[*used, "--output", "OUT/e.parquet", "--split", "valid"]),
        case("index", *used, "--output", "OUT/i", other=[*used, "--output", "OUT/i", "--split", "valid"]),
        case("calibrate", predicted[0], "--model", "OUT/model", "--store", store, given={"model": model},
             other=[predicted[0], "--model", "OUT/model", "--store", store, "--method", "temperature"]),
        case("evaluate", predicted[0], *scored, "--run", run, "--output", "OUT/v",
             other=[predicted[1], *scored, "--output", "OUT/v"]),
        case("report", inputs / "scored", inputs / "rescored", "--output", "OUT/r.html",
             other=[inputs / "rescored", "--output", "OUT/r.html"]),
        case("explain", scan, "--model", model, "--output", "OUT/x", "--abnormality", "Emphysema",
             other=[another, "--model", model, "--output", "OUT/x", "--abnormality", "Emphysema"]),
        case("find", scan, "a nodule", "--model", model, "--output", "OUT/f",
             other=[another, "a nodule", "--model", model, "--output", "OUT/f"]),
        case("probe", "--model", "OUT/model", "--store", store, "--output", "OUT/p", "--percent", "100", given={"model": model}),
        case("read-reports", store, "--label-set", "ct_rate_18", "--output", "OUT/labels.csv",
             other=[table, "--label-set", "ct_rate_18", "--output", "OUT/labels.csv"]),
        case("clean-reports", store, "--label-set", "ct_rate_18", "--output", "OUT/findings.csv"),
        case("prompts mine", "--store", store, "--output", "OUT/mined.yaml",
             other=["--store", store, "--output", "OUT/mined.yaml", "--split", "valid"]),
        case("labels from-csv", table, "--output", "OUT/mine.yaml"),
        case("draft", "--store", store, "--model", model, "--method", "template", "--count", 6, "--output", "OUT/d.csv",
             other=["--store", store, "--model", model, "--method", "template", "--count", 4, "--output", "OUT/d.csv"]),
        case("audit doubles", "--store", store, "--output", "OUT/d"),
        case("similar", "--text", "a nodule", "--index", inputs / "index", "--output", "OUT/s.csv",
             other=["--text", "an effusion", "--index", inputs / "index", "--output", "OUT/s.csv"]),
        case("publish", model, "--output", "OUT/copy", "--licence", "other"),
    ]  # fmt: skip


def _published_text(folder: Path) -> Path:
    """The tokenizer and configuration of the recorded checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"w{i}" for i in range(115))]))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    shape = json.loads((PUBLISHED / "config.json").read_text())["bert"]
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **shape}))
    return folder


def tree(place: Path) -> dict[str, str]:
    """The digest of each file below ``place``, by its relative name."""
    digests = {}
    for path in sorted(place.rglob("*")):
        if path.name.endswith(".lock") or "tensorboard" in path.parts or not path.is_file():
            continue
        digests[str(path.relative_to(place))] = hashlib.sha256(_content(path)).hexdigest()
    return digests


def _content(path: Path) -> bytes:
    if path.name in ("calibration.json", "adaptation.json"):
        values = json.loads(path.read_text())
        return json.dumps({**values, "salt": "", "patients": len(values["patients"])}).encode()
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return json.dumps([{k: v for k, v in line.items() if not any(word in k for word in TIMED)} for line in lines]).encode()  # fmt: skip
    if path.name == "page.html":
        # How long the maps took is written on it.
        return re.sub(rb"[\d.]+ s\b", b"", path.read_bytes())
    return path.read_bytes()


def members(session: int) -> list[int]:
    """Processes of a session that are still running."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else None
        except OSError:
            continue
        if fields and fields[0] != "Z" and int(fields[3]) == session:
            found.append(int(entry.name))
    return found


def end(session: int) -> None:
    for process in members(session):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def killed(case: Case, whole: dict[str, str], random: np.random.Generator) -> Counter[str]:
    """Kill ``case`` one to three times at random moments, let it finish, and describe what is wrong."""
    case.reset()
    seen: Counter[str] = Counter()
    sessions = []
    for _ in range(random.integers(1, 4)):
        command = start(case)
        sessions.append(command.pid)
        command.process.join(random.uniform(0, case.seconds))
        if command.process.exitcode is not None:
            seen["ended before"] += 1
            break
        seen["kills"] += 1
        if random.random() < 0.5:
            os.kill(command.pid, signal.SIGKILL)
        else:
            end(command.pid)
        command.wait(SECONDS)
    done, waited = _to_its_end(case)
    seen["had to wait"] += waited
    seen["child processes left"] += any(members(session) for session in sessions)
    for session in sessions:
        end(session)
    if done.returncode:
        seen["no end"] += 1
        print(f"{case.name}: exit code {done.returncode} after a kill: {done.stderr[-600:]}", flush=True)
        return seen
    left = tree(case.place)
    differing = sorted(name for name in whole if left.get(name) != whole[name])
    more = sorted(set(left) - set(whole))
    seen["not identical"] += bool(differing)
    seen["files left"] += bool(more)
    scratch = case.place.with_name(f"{case.place.name}.tmp")
    temporary = sorted(path.name for path in scratch.iterdir())
    seen["TMPDIR"] += bool(temporary)
    if differing or more or temporary:
        print(f"{case.name}: differing {differing}, left {more}, in TMPDIR {temporary}", flush=True)
    shutil.rmtree(scratch)
    return seen


def _to_its_end(case: Case) -> tuple[Done, bool]:
    """Run the command again. If it is refused because children of the killed command are still writing, retry."""
    until, waited = time.monotonic() + 60, False
    while True:
        done = start(case).wait(SECONDS)
        if done.returncode != 2 or not any(words in done.stderr for words in BUSY) or time.monotonic() > until:
            return done, waited
        waited = True
        time.sleep(0.5)


def paired(case: Case, wholes: list[dict[str, str]], other: bool, random: np.random.Generator) -> Counter[str]:
    """Two commands at once. ``other``: the second has different inputs. ``wholes``: the output of each command alone."""
    case.reset()
    running = [start(case)]
    time.sleep(random.uniform(0, 0.5 * case.seconds))
    running.append(start(case, other))
    ended = [command.wait(SECONDS) for command in running]
    seen = Counter({"pairs": 1, "both to their end": 0, "one refused": 0, "wrong": 0})
    codes = [done.returncode for done in ended]
    seen["both to their end"] += codes == [0, 0]
    seen["one refused"] += sorted(codes) == [0, 2]
    left = tree(case.place)
    # Files of the first command may remain beside those that the second replaced.
    whole = any(all(left.get(name) == digest for name, digest in one.items()) for one in wholes[: 1 + other])
    clear = all(done.returncode == 0 or (done.returncode == 2 and _one_line(done.stderr)) for done in ended)
    if not (whole and clear and 0 in codes):
        seen["wrong"] += 1
        lines = [done.stderr.strip().splitlines()[-1:] for done in ended]
        differing = [sorted(name for name in one if left.get(name) != one[name])[:5] for one in wholes]
        print(f"{case.name} ({'other' if other else 'same'} inputs): {codes}, {lines}, differing {differing}", flush=True)  # fmt: skip
    shutil.rmtree(case.place.with_name(f"{case.place.name}.tmp"))
    return seen


def _one_line(text: str) -> bool:
    return "Traceback" not in text and bool(text.strip()) and len(text.strip().splitlines()[-1]) < 500


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="number of kills, distributed over the commands")
    parser.add_argument("--pairs", type=int, default=0, help="number of pairs, distributed over the commands")
    parser.add_argument("--minutes", type=float, default=600, help="stop after this time and report what was done")
    parser.add_argument("--only", default="", help="commands, separated by commas")
    parser.add_argument("--work", type=Path, help="keep the inputs in this folder, and reuse those already there")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * given.minutes
    work = given.work or Path(tempfile.mkdtemp(prefix="ctclip-kills-"))
    try:
        every = [case for case in cases(work) if not given.only or case.name in given.only.split(",")]
        print(f"{machine()}, {date.today()}\n", flush=True)
        counts = {}
        if given.kills:
            counts["kill -9 at random moments"] = _in_turn(every, "kills", given.kills, until, given.seed)
        if given.pairs:
            counts["Two commands into one output"] = _in_turn(every, "pairs", given.pairs, until, given.seed)
    finally:
        if given.work is None:
            shutil.rmtree(work, ignore_errors=True)
    for title, by_command in counts.items():
        heads = KILL_HEADS if title.startswith("kill") else PAIR_HEADS
        rows = [[name, *(str(count[head]) for head in heads)] for name, count in by_command.items()]
        total = sum(by_command.values(), Counter[str]())
        print(table(title, ["command", *heads], [*rows, ["all", *(str(total[head]) for head in heads)]]), flush=True)
    return int(any(count[word] for by_command in counts.values() for count in by_command.values() for word in WRONG))


KILL_HEADS = [
    "kills",
    "ended before",
    "not identical",
    "no end",
    "TMPDIR",
    "files left",
    "had to wait",
    "child processes left",
]
PAIR_HEADS = ["pairs", "both to their end", "one refused", "wrong"]
WRONG = ("not identical", "no end", "TMPDIR", "files left", "wrong")


def _in_turn(every: list[Case], what: str, wanted: int, until: float, seed: int) -> dict[str, Counter[str]]:
    """Counts by command for ``wanted`` kills or pairs, or as many as time allowed."""
    random = np.random.default_rng(seed)
    seen: dict[str, Counter[str]] = {case.name: Counter() for case in every}
    wholes: dict[str, list[dict[str, str]]] = {}
    for case in itertools.cycle(every):
        if sum(count[what] for count in seen.values()) >= wanted or time.monotonic() > until:
            return seen
        if case.name not in wholes:
            wholes[case.name] = [case.whole(other=True)] if what == "pairs" and case.other else []
            wholes[case.name].insert(0, case.whole())
        if what == "kills":
            seen[case.name] += killed(case, wholes[case.name][0], random)
        else:
            other = case.other is not None and seen[case.name]["pairs"] % 2 == 1
            seen[case.name] += paired(case, wholes[case.name], other, random)
        print(f"{case.name}: {dict(seen[case.name])}", flush=True)
    return seen


if __name__ == "__main__":
    sys.exit(main())
