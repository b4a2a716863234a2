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
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.common import machine, table
from tests.robustness.kill_cases import SECONDS, Case, cases, start, tree
from tests.robustness.processes import FORKED, Done

# Imported before a command starts, so that kills hit its work and not its imports.
FORKED.set_forkserver_preload([
    "torch", "deepspeed", "torch.utils.tensorboard", "numba", "nibabel", "faiss", "matplotlib.pyplot", "sklearn.ensemble",
    "transformers.models.bert.modeling_bert", "ctclip.cli", "ctclip.phantom.cohort", "ctclip.preprocessing.quality",
    "ctclip.training.loop", "ctclip.training.export", "ctclip.models.vit3d", "ctclip.inference.model",
    "ctclip.inference.index", "ctclip.inference.import_published", "ctclip.evaluation.run_evaluation",
])  # fmt: skip
BUSY = ("is writing it", "run is using this folder")


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
        began = time.monotonic()
        command = start(case)
        sessions.append(command.pid)
        command.process.join(random.uniform(0, case.seconds))
        if command.process.exitcode is not None:
            seen["ended before"] += 1
            # The first run of a command also filled caches: later kills must not wait as long.
            case.seconds = min(case.seconds, time.monotonic() - began)
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
    """Counts per command for ``wanted`` kills or pairs, or for as many as time allowed."""
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
