"""Feed damaged files of every kind to every reader: ``python -m tests.robustness.fuzz --files 5000 --minutes 10``.

Each file is read in a child process, which may crash, hang or run out of memory without harm. Accepted volumes are
compared with the undamaged one. If one differs without a warning, an independent decoder (nibabel, ITK, pydicom) reads
the same bytes. If it agrees, the file really states this, as headers have no checksum; otherwise the file is saved and
counted as silently wrong. Exit code 1 if a file caused a crash, a hang, an unexpected exception, excessive use of
memory, or a silently wrong volume.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import json
import multiprocessing
import os
import resource
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ctclip.preprocessing import PreprocessingError, prepare
from ctclip.preprocessing.child import decode_in_child
from ctclip.preprocessing.cohorts import read_cohort
from ctclip.preprocessing.geometry import orient
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.volume import Volume
from tests.robustness.fuzz_files import AFFINE, SPEC, Good, good, spoil, stored_hu, truth
from tests.unit.preprocessing.scan_files import RAS

# A read counts as a hang after this many seconds of processor time, or after this much time on the clock; the latter is longer,
# because the machine may be busy.
SECONDS, LONGEST_WAIT = 120.0, 900.0
MEMORY_MB = 1500
# Slices that are stored uncompressed at the end of the damaged file.
RAW = dict.fromkeys(("nifti", "nifti sform only", "nifti2", "nrrd", "mha", "dicom multi-frame"), len(truth())) | {
    "dicom": 1
}
BAD = ("silently wrong", "other exception", "crash", "hang", "memory")
OUTCOMES = ("refused", "accepted", "accepted with a warning", "accepted as stated", *BAD)


def outcome_of(number: int, seed: int, folder: Path) -> tuple[str, str, str]:
    """Build file ``number`` and read it; return its kind, the outcome, and details."""
    random = np.random.default_rng([seed, number])
    names = sorted(good())
    name = names[number % len(names)]
    scan = good()[name]
    content, done = spoil(scan, random)
    for file, kept in scan.files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if file == scan.spoiled else kept)
    try:
        outcome = {"scan": _scan, "csv": _csv, "store": _store}[scan.kind](folder / scan.named, name)
        if outcome == "silently wrong" and scan.kind == "scan" and _only_voxels(scan, content, folder, name):
            outcome = "accepted as stated"
    except PreprocessingError as error:
        clear = "\n" not in str(error) and "fault" not in str(error)
        return name, "refused" if clear else "other exception", done
    except Exception as error:
        return name, "other exception", f"{done}: {type(error).__name__} {error}"
    return name, outcome, done


def _scan(path: Path, name: str) -> str:
    ready = prepare(path, SPEC)
    assert np.isfinite(ready.voxels).all()
    expected = prepared_truth(name)
    if _alike(ready.scan, expected):
        return "accepted"
    if set(ready.warnings) - set(expected.warnings):
        return "accepted with a warning"
    try:
        array, affine = decode_in_child(
            "tests.robustness.fuzz:by_another", str(path), source=str(path), seconds=LONGEST_WAIT
        )
    except PreprocessingError:
        return "silently wrong"
    stated = orient(Volume(array, np.array(affine), ""))
    return "accepted as stated" if _alike(ready.scan, stated) else "silently wrong"


def _only_voxels(scan: Good, content: bytes, folder: Path, name: str) -> bool:
    """Whether the volume read equals the good file with only the changed voxels: uncompressed voxels have no
    checksum."""
    if name not in RAW:
        return False
    read, size = prepare(folder / scan.named, SPEC).scan, RAW[name] * truth()[0].nbytes
    (folder / scan.spoiled).write_bytes(scan.content[:-size] + content[-size:])
    return _alike(read, prepare(folder / scan.named, SPEC).scan)


_TRUTHS: dict[str, Volume] = {}


def prepared_truth(name: str) -> Volume:
    """The volume read from the undamaged file of a kind, which equals the phantom voxel by voxel."""
    if name not in _TRUTHS:
        scan = good()[name]
        with tempfile.TemporaryDirectory() as folder:
            for file, content in scan.files.items():
                path = Path(folder, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            _TRUTHS[name] = prepare(Path(folder, scan.named), SPEC).scan
        turned = _TRUTHS[name].array[::-1] if name == "npz" else _TRUTHS[name].array
        assert np.array_equal(turned, truth())
        assert name == "npz" or "dicom" in name or np.allclose(_TRUTHS[name].affine, AFFINE)
    return _TRUTHS[name]


def _alike(one: Volume, other: Volume) -> bool:
    if one.array.shape != other.array.shape or not np.allclose(one.affine, other.affine, rtol=1e-4, atol=1e-2):
        return False
    return bool(np.abs(one.array.astype(np.float64) - other.array).max() <= 0.5)


def by_another(path: str) -> tuple[np.ndarray, Any]:
    """Voxels and affine (to LPS mm) by nibabel or ITK, in the child process, which they may crash."""
    suffix = Path(path).suffix
    if suffix == ".tar":
        # Members of this archive have no checksum.
        with tarfile.open(path) as archive:
            archive.extractall(Path(path).parent, filter="data")
        path, suffix = str(next(Path(path).parent.rglob("*.nii"))), ".nii"
    if suffix in (".zip", ".gz", ".npz") and not path.endswith(".nii.gz"):
        # The contents of these have a checksum; no difference is acceptable.
        raise ValueError(suffix)
    if Path(path).is_dir():
        import SimpleITK as sitk

        files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(path)
        # A series reader adds a fourth axis to a single file.
        image = sitk.ReadImage(files if len(files) > 1 else files[0])
    elif suffix in (".nii", ".gz", ".hdr"):
        import nibabel as nib

        loaded = nib.load(path)
        array = np.asarray(loaded.dataobj)
        return array.reshape(array.shape[:3]), (RAS @ loaded.affine).tolist()
    else:
        import SimpleITK as sitk

        image = sitk.ReadImage(_without_bzip2(path) if suffix == ".nrrd" else path)
    affine = np.eye(4)
    affine[:3, :3] = (np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing())[:, ::-1]
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine.tolist()


def _without_bzip2(path: str) -> str:
    """An NRRD file with decompressed voxels, because ITK cannot read bzip2; the header is unchanged."""
    header, between, voxels = Path(path).read_bytes().partition(b"\n\n")
    if b"encoding: bzip2" in header:
        Path(path).write_bytes(header.replace(b"encoding: bzip2", b"encoding: raw") + between + bz2.decompress(voxels))
    return path


def _csv(path: Path, name: str) -> str:
    table = read_cohort(path).table
    assert len(table)
    stated = _slopes_stated(path) if path.suffix == ".csv" else None
    return "accepted" if stated in (None, table["rescale_slope"].tolist()) else "silently wrong"


def _slopes_stated(path: Path) -> list[float] | None:
    """The column of slopes by Python's csv module; None if it finds no such table."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        records = [record for record in csv.DictReader(stream, skipinitialspace=True) if any(record.values())]
    if not records or not {"path", "volume", "split", "rescale_slope"} <= set(records[0]):
        return None
    try:
        slopes = [record["rescale_slope"] for record in records]
        return [1.0 if slope in ("", "nan", None) else float(slope) for slope in slopes]
    except (TypeError, ValueError):
        return None


def _store(path: Path, name: str) -> str:
    store = VolumeStore(path)
    store.intact("a")
    return "accepted" if np.array_equal(store.read("a"), stored_hu()) else "silently wrong"


def work(connection: Connection, seed: int) -> None:
    """The child process that reads files. Its parent kills it if it hangs."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    for name in good():
        if good()[name].kind == "scan":
            prepared_truth(name)
    connection.send("ready")
    while True:
        number = connection.recv()
        with tempfile.TemporaryDirectory(prefix="ctclip-fuzz-") as folder:
            answer = outcome_of(number, seed, Path(folder))
        connection.send((*answer, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000))


class Worker:
    """A child process that reads files and is restarted when it ends."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.seed), daemon=True)
        self.process.start()
        theirs.close()
        assert self.connection.recv() == "ready"

    def ask(self, number: int) -> tuple[str, str, str]:
        names = sorted(good())
        kind = names[number % len(names)]
        try:
            self.connection.send(number)
            if not self._answered():
                self.stop()
                self._start()
                return kind, "hang", f"file {number}"
            name, outcome, detail, megabytes = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self._start()
            return kind, "crash", f"file {number}: exit code {code}"
        if megabytes > MEMORY_MB:
            self.stop()
            self._start()
            return name, "memory", f"{detail}: {megabytes} MB"
        return name, outcome, detail

    def _answered(self) -> bool:
        until, spent = time.monotonic() + LONGEST_WAIT, self._processor_seconds()
        while not self.connection.poll(2.0):
            if time.monotonic() > until or self._processor_seconds() > spent + SECONDS:
                return False
        return True

    def _processor_seconds(self) -> float:
        """Peak memory of the process and of its children that have ended."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--kind", default="", help="only kinds with this in their name")
    parser.add_argument("--json", type=Path, help="write the counts here")
    given = parser.parse_args()
    worker, until = Worker(given.seed), time.monotonic() + 60 * given.minutes
    names = sorted(good())
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    for number in range(given.first, given.first + given.files):
        if time.monotonic() > until:
            break
        if given.kind not in names[number % len(names)]:
            continue
        name, outcome, detail = worker.ask(number)
        counts[name][outcome] += 1
        if outcome in BAD:
            print(f"{outcome}: {name}, file {number} of seed {given.seed}: {detail}", flush=True)
    worker.stop()
    _print(counts)
    if given.json:
        given.json.write_text(json.dumps(counts, indent=1))
    return int(any(counts[name][outcome] for name in names for outcome in BAD))


def _print(counts: dict[str, Counter[str]]) -> None:
    heads = ["kind", "files", *OUTCOMES]
    rows = [[name, sum(count.values()), *(count[outcome] for outcome in OUTCOMES)] for name, count in counts.items()]
    rows.append(["all", *(sum(row[column] for row in rows) for column in range(1, len(heads)))])
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    sys.exit(main())
