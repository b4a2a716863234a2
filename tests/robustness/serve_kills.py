"""Kill ``ctclip serve``, or only its model process, with SIGKILL at random moments, and repeat the request.

``python -m tests.robustness.serve_kills --kills 40``: a service is killed while it starts, waits, answers a request or
receives an upload. The next service, with the same settings, must get the same port and answer as an undisturbed one does,
and nothing of the killed one may remain: no upload, lock, socket, shared memory, temporary file or process. If only the
model process is killed, the current request must be answered, or refused with 503 and a one-line error, and the next
request must be answered. Exit code 1 if any of this fails.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import SimpleITK as sitk

from tests.benchmarks.common import machine, table
from tests.robustness.kills import end, members
from tests.robustness.processes import FORKED, Command

FORKED.set_forkserver_preload(["torch", "ctclip.cli", "ctclip.serve.run"])

MOMENTS = ("start", "idle", "request", "upload")
# When the whole service is killed, the answer to an upload is not waited for.
PATHS = {"/v1/detect": {}, "/v1/explain": {"finding": "Emphysema"}}
TIMED = ("scan", "seconds")
UNTIL_READY = 300.0
ENLARGED = 2
HEADS = ["kills", "ended before", "port taken", "files left", "shared memory left", "processes left", "other answer", "no clean 503", "next failed"]  # fmt: skip
SLOWEST = "slowest end of the children, s"


@dataclass(frozen=True)
class Question:
    """A request, and the time that an idle service takes to answer it."""

    path: str
    file: Path
    answer: dict[str, Any] = field(hash=False)
    seconds: float

    def ask(self, address: str) -> httpx.Response:
        with self.file.open("rb") as stream:
            sent = {"scan": (self.file.name, stream)}
            return httpx.post(f"{address}{self.path}", files=sent, data=PATHS[self.path], timeout=UNTIL_READY)


class Service:
    """`ctclip serve` in a separate session, forked from a server that has imported its modules. ``scratch``: its
    TMPDIR."""

    def __init__(self, arguments: list[str], port: int, scratch: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        # Without a main module: otherwise the model process would import the main module of this command.
        patch = (
            f"import os, sys, tempfile; os.environ['TMPDIR'] = {str(scratch)!r}; tempfile.tempdir = None; "
            f"main = sys.modules['__main__']; main.__spec__ = main.__file__ = None"
        )
        self.command = Command(["serve", *arguments, "--port", str(port)], patch)
        self.pid = self.command.pid

    @property
    def runs(self) -> bool:
        return self.command.process.exitcode is None

    def output(self) -> str:
        return Path(self.command.said[1]).read_text()[-2000:]

    def wait(self) -> bool:
        """Whether the model was loaded in time."""
        until = time.monotonic() + UNTIL_READY
        while self.runs and time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.address}/healthz").status_code == 200:
                    return True
            time.sleep(0.1)
        return False

    def worker(self) -> int:
        """The model process, as soon as it exists."""
        while self.runs:
            for pid in children(self.pid):
                with contextlib.suppress(OSError):
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() and runs(pid):
                        return pid
            time.sleep(0.01)
        raise RuntimeError(self.output())

    def kill(self) -> float:
        """Kill the service itself; returns the seconds until the last of its children ended, or infinity."""
        os.kill(self.pid, signal.SIGKILL)
        self.command.process.join()
        began = time.monotonic()
        while members(self.pid):
            if time.monotonic() > began + 60:
                return np.inf
            time.sleep(0.02)
        return time.monotonic() - began


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def below(pid: int) -> list[int]:
    """A process and its descendants. Threads have children too."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [each for word in task.read_text().split() for each in below(int(word))]
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def shared_memory(session: int) -> set[Path]:
    """The named shared memory in use by processes of a session."""
    names = set()
    for pid in members(session):
        with contextlib.suppress(OSError):
            names.update(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))
        for entry in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                names.add(os.readlink(entry))
    return {Path(name) for name in names if name.startswith("/dev/shm/")}


def left_in(scratch: Path) -> list[str]:
    """Files and folders in TMPDIR, except the folder of one idle service, which contains no files."""
    folders = [path for path in scratch.iterdir() if path.is_dir() and path.name.startswith("ctclip-serve-")]
    left = [path for path in scratch.rglob("*") if not path.is_dir()]
    left += [path for path in scratch.iterdir() if path not in folders[:1]]
    return sorted(str(path.relative_to(scratch)) for path in left)


def names_of(folders: list[Path]) -> set[tuple[str, int]]:
    """Every file in some folders, including locks, with the time of its last change."""
    return {(str(path), path.stat().st_mtime_ns) for folder in folders for path in folder.rglob("*")}


def enlarged(scan: Path, folder: Path) -> list[Path]:
    """A scan with more voxels, so that reading it takes some time: as NIfTI, in an archive, and as MetaImage, which a child
    process decodes."""
    image = nib.load(scan)
    array = np.asarray(image.dataobj).repeat(ENLARGED, 0).repeat(ENLARGED, 1).repeat(ENLARGED, 2)
    affine = image.affine @ np.diag([1 / ENLARGED] * 3 + [1])
    plain, packed, meta = (folder / f"scan.{ending}" for ending in ("nii.gz", "zip", "mha"))
    nib.save(nib.Nifti1Image(array.astype(np.int16), affine), plain)
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(plain, plain.name)
    sitk.WriteImage(sitk.ReadImage(str(plain)), str(meta), True)
    return [plain, packed, meta]


def content(answer: httpx.Response) -> dict[str, Any]:
    return {key: value for key, value in answer.json().items() if key not in TIMED}


def asked(address: str, path: str, file: Path) -> Question:
    """The question, with the answer of an undisturbed service."""
    began = time.monotonic()
    answer = Question(path, file, {}, 0.0).ask(address).raise_for_status()
    return Question(path, file, content(answer), time.monotonic() - began)


@contextlib.contextmanager
def pending(service: Service, question: Question) -> Iterator[list[httpx.Response | Exception]]:
    """Ask in a thread. The list contains the answer or the error as soon as there is one; when the block ends, there is
    one."""
    answers: list[httpx.Response | Exception] = []

    def ask() -> None:
        try:
            answers.append(question.ask(service.address))
        except httpx.TransportError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    yield answers
    thread.join()


@contextlib.contextmanager
def uploading(service: Service, question: Question, share: float) -> Iterator[list[httpx.Response | Exception]]:
    """Send a share of the body, and the rest when the block ends."""
    body = question.file.read_bytes()
    head = f'--x\r\ncontent-disposition: form-data; name="scan"; filename="{question.file.name}"\r\n\r\n'.encode()
    fields = "".join(f'--x\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in PATHS[question.path].items())  # fmt: skip
    whole = fields.encode() + head + body + b"\r\n--x--\r\n"
    cut = int(share * len(whole))
    answers: list[httpx.Response | Exception] = []
    ready = threading.Event()

    def parts() -> Iterator[bytes]:
        yield whole[:cut]
        ready.wait()
        yield whole[cut:]

    def send() -> None:
        kind = {"content-type": "multipart/form-data; boundary=x", "content-length": str(len(whole))}
        try:
            answers.append(
                httpx.post(f"{service.address}{question.path}", content=parts(), headers=kind, timeout=UNTIL_READY)
            )
        except httpx.TransportError as error:
            answers.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    time.sleep(0.3)
    yield answers
    ready.set()
    thread.join()


class Trials:
    """``questions``: the possible requests; ``folders``: those that a service reads and must not change."""

    def __init__(self, arguments: list[str], folders: list[Path], work: Path, scans: list[Path], seed: int) -> None:
        self.arguments, self.folders = arguments, folders
        self.scratch = work / "tmp"
        self.scratch.mkdir()
        self.random = np.random.default_rng(seed)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        began = time.monotonic()
        self.service = self.start()
        if not self.service.wait():
            raise RuntimeError(self.service.output())
        self.seconds = time.monotonic() - began
        self.questions = [asked(self.service.address, path, scan) for path in PATHS for scan in scans]
        self.before = names_of(folders)
        self.counts: dict[str, Counter[str]] = {}
        self.slowest: dict[str, float] = {}

    def start(self) -> Service:
        return Service(self.arguments, self.port, self.scratch)

    def question(self) -> Question:
        return self.questions[self.random.integers(len(self.questions))]

    @contextlib.contextmanager
    def during(self, moment: str) -> Iterator[list[httpx.Response | Exception]]:
        """The activity at ``moment``; yields the answer, if there is one before the block ends."""
        if moment == "request":
            question = self.question()
            with pending(self.service, question) as answers:
                time.sleep(self.random.uniform(0, question.seconds))
                yield answers
        elif moment == "upload":
            with uploading(self.service, self.question(), self.random.uniform(0.05, 0.95)) as answers:
                yield answers
        else:
            time.sleep(self.random.uniform(0, 0.2))
            yield []

    def kill_service(self, moment: str) -> None:
        """Kill the whole service once, and start it again."""
        name = f"service, {moment}"
        seen = self.counts.setdefault(name, Counter())
        if moment == "start":
            os.kill(self.service.pid, signal.SIGTERM)
            self.service.command.process.join()
            self.service = self.start()
            time.sleep(self.random.uniform(0, self.seconds))
        with self.during(moment) as answers:
            seen["ended before"] += bool(answers)
            seen["kills"] += not answers
            memory = shared_memory(self.service.pid)
            ended = self.service.kill()
        self.slowest[name] = max(self.slowest.get(name, 0), ended)
        killed, self.service = self.service, self.start()
        if not self.service.wait():
            seen["port taken"] += 1
            self.tell(name, self.service.output())
            self.service = self.start()
            self.service.wait()
        seen["processes left"] += bool(members(killed.pid))
        end(killed.pid)
        seen["shared memory left"] += any(path.exists() for path in memory)
        self.look(name)

    def kill_worker(self, moment: str) -> None:
        """Kill only the model process once."""
        name = f"model process, {moment}"
        seen = self.counts.setdefault(name, Counter())
        if moment == "start":
            self.kill(self.service.worker())
            time.sleep(self.random.uniform(0, 0.7 * self.seconds))
        with self.during(moment) as answers:
            seen["ended before"] += bool(answers)
            seen["kills"] += not answers
            memory = shared_memory(self.service.pid)
            ended = self.kill(self.service.worker())
        self.slowest[name] = max(self.slowest.get(name, 0), ended)
        if moment in ("request", "upload") and not clean(answers[0]):
            seen["no clean 503"] += 1
            self.tell(name, repr(answers[0]) + getattr(answers[0], "text", ""))
        seen["processes left"] += not np.isfinite(ended)
        # The request arrives while the model is loading, or after it has loaded.
        self.look(name)
        seen["shared memory left"] += any(path.exists() for path in memory - shared_memory(self.service.pid))

    def kill(self, pid: int) -> float:
        """Kill a process; returns the seconds until it and its descendants ended, or infinity."""
        every = below(pid)
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        while any(runs(each) for each in every):
            if time.monotonic() > began + 60:
                return np.inf
            time.sleep(0.02)
        return time.monotonic() - began

    def look(self, name: str) -> None:
        """Ask, and look for files and processes that were left behind."""
        seen = self.counts[name]
        left = left_in(self.scratch) if name.startswith("service") else []
        question = self.question()
        try:
            answer = question.ask(self.service.address)
            if name.startswith("model") and answer.status_code == 503 and clean(answer):
                # Sent before the service had noticed the death: the client is told to send it again.
                answer = question.ask(self.service.address)
        except httpx.TransportError as error:
            seen["next failed"] += 1
            self.tell(name, repr(error))
            return
        if answer.status_code != 200:
            seen["next failed"] += 1
            self.tell(name, f"{answer.status_code} {answer.text}")
        elif content(answer) != question.answer:
            seen["other answer"] += 1
            self.tell(name, f"{question.path} {question.file.name}: {answer.text[:500]}")
        left += left_in(self.scratch)
        left += sorted(path for path, _ in names_of(self.folders) ^ self.before)
        seen["files left"] += bool(left)
        if left:
            self.tell(name, f"left {left}")

    def tell(self, name: str, what: str) -> None:
        print(f"{name}: {what}", flush=True)


def clean(answer: httpx.Response | Exception) -> bool:
    """Whether a request was answered, or refused with 503, a one-line error and a time after which to retry."""
    if isinstance(answer, Exception):
        return False
    if answer.status_code == 200:
        return True
    detail = answer.json().get("detail", "")
    return answer.status_code == 503 and "retry-after" in answer.headers and 0 < len(detail.splitlines()) < 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="number of kills, distributed over the moments")
    parser.add_argument("--minutes", type=float, default=600, help="stop after this time and report what was done")
    parser.add_argument(
        "--inputs", type=Path, required=True, help="the --work folder of tests.robustness.kills, for its inputs"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    inputs = given.inputs / "inputs"
    work = Path(tempfile.mkdtemp(prefix="ctclip-serve-kills-"))
    scans = enlarged(sorted((inputs / "cohort").rglob("*.nii.gz"))[0], work)
    folders = [inputs / "run" / "model", inputs / "store"]
    print(f"{machine()}, {date.today()}\n", flush=True)
    trials = None
    try:
        trials = Trials(["--model", str(folders[0]), "--store", str(folders[1])], folders, work, scans, given.seed)
        print(f"{trials.seconds:.1f} s to start; seconds of a request: {sorted(round(one.seconds, 2) for one in trials.questions)}", flush=True)  # fmt: skip
        for who, moment in itertools.cycle(itertools.product(("service", "worker"), MOMENTS)):
            if sum(count["kills"] for count in trials.counts.values()) >= given.kills or time.monotonic() > until:
                break
            getattr(trials, f"kill_{who}")(moment)
            print(f"{who}, {moment}: {dict(sum(trials.counts.values(), Counter()))}", flush=True)
    finally:
        if trials is not None:
            end(trials.service.pid)
        shutil.rmtree(work, ignore_errors=True)
    rows = [[name, *(str(count[head]) for head in HEADS), f"{trials.slowest[name]:.1f}"] for name, count in trials.counts.items()]  # fmt: skip
    total = sum(trials.counts.values(), Counter[str]())
    rows.append(["all", *(str(total[head]) for head in HEADS), f"{max(trials.slowest.values()):.1f}"])
    print(table("The service under kill -9", ["what is killed, when", *HEADS, SLOWEST], rows))
    return int(any(total[head] for head in HEADS[2:]))


if __name__ == "__main__":
    sys.exit(main())
