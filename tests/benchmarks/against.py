"""Preprocessing against an earlier checkout: ``python -m tests.benchmarks.against /tmp/before --rounds 9``.

One process of each checkout runs throughout, and the two take turns, so that other work on the machine affects both
equally. It reports the median processor seconds, their ratio, the interquartile range of the ratios, and the least seconds
of each, to which other work adds nothing. To get the earlier checkout: ``git archive COMMIT | tar x -C /tmp/before``.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.benchmarks.common import machine, table
from tests.benchmarks.preprocessing import write_scan
from tests.unit.preprocessing import dicom_builder

CASES = ("one scan, .nii.gz", "one DICOM series", "one training sample, ct_clip")
# Runs in both checkouts; ``preprocessing`` was a top-level package before it became part of ctclip.
ASKED = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
scan, series, store = sys.argv[1:]
try:
    from ctclip.preprocessing import prepare, PreprocessingSpec
    from ctclip.preprocessing.store import VolumeStore
except ImportError:
    from preprocessing import prepare, PreprocessingSpec
    from preprocessing.store import VolumeStore
import numpy as np

def seconds():
    kept = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        kept += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") * (int(fields[1]) == os.getpid())
    return time.process_time() + kept

spec = PreprocessingSpec.load("ct_clip")
ready = prepare(scan, spec)
kept = VolumeStore.create(store, spec)
kept.write("a", ready.stored if hasattr(ready, "stored") else np.rint(ready.hu).astype(np.int16))
kept, sample = VolumeStore(store), np.empty(spec.shape, np.int16)
work = [lambda: prepare(scan, spec).voxels, lambda: prepare(series, spec).voxels, lambda: kept.read_into("a", sample)]
for line in sys.stdin:
    case, times = map(int, line.split())
    began = seconds()
    for _ in range(times):
        work[case]()
    print("took", (seconds() - began) / times, flush=True)
"""


def write_series(folder: Path, scan: Path) -> None:
    """The scan as slices of an uncompressed DICOM series."""
    image = nib.load(scan)
    columns, rows, slices = (float(step) for step in image.header.get_zooms())
    dicom_builder.SPACING = (slices, rows, columns)
    hu = np.asarray(image.dataobj).transpose(2, 1, 0).astype(np.int16)
    dicom_builder.write(folder, dicom_builder.series(np.clip(hu, -1024, 3071)))


def asked(process: subprocess.Popen[str], case: int, times: int) -> float:
    """Mean processor seconds per case over ``times`` repetitions."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(case, times, file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith("took "):
            return float(line.split()[1])
    raise RuntimeError("a checkout's process ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("before", type=Path, help="folder of the earlier checkout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, help="folder in which to keep the inputs for another run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.work or Path(temporary)
        scan, series = folder / "scan.nii.gz", folder / "dicom"
        if not series.exists():
            write_scan(scan, 15, 1.0)
            write_series(series, scan)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", ASKED, str(scan), str(series), str(Path(temporary, name))],
                cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for name, place in (("before", given.before), ("now", Path.cwd()))
        ]  # fmt: skip
        rows = []
        for case, name in enumerate(CASES):
            times = 1 if case < 2 else 10
            for process in processes:
                asked(process, case, 1)
            pairs = [tuple(asked(process, case, times) for process in processes) for _ in range(given.rounds)]
            before, now = (statistics.median(column) for column in zip(*pairs, strict=True))
            low, _, high = statistics.quantiles([new / old for old, new in pairs], n=4)
            least = [min(column) for column in zip(*pairs, strict=True)]
            rows.append([name, f"{before:.3f}", f"{now:.3f}", f"{now / before:.3f}", f"{low:.3f} to {high:.3f}",
                         f"{least[0]:.3f}", f"{least[1]:.3f}", f"{least[1] / least[0]:.3f}"])  # fmt: skip
            print(rows[-1], flush=True)
        for process in processes:
            process.kill()
    print(machine())
    heads = [
        "",
        "before, s",
        "now, s",
        "ratio",
        "middle half of the ratios",
        "least before, s",
        "least now, s",
        "their ratio",
    ]
    print(table(f"{given.rounds} rounds", heads, rows))


if __name__ == "__main__":
    main()
