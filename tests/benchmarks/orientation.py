"""False alarms and misses of the orientation check: ``python -m tests.benchmarks.orientation COHORT``.

``COHORT``: a synthetic cohort (``ctclip phantom DIR --volumes 300 --scale 8``). Each volume is checked as it is, and
rotated by 180 degrees about each axis, as if its header were wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ctclip.preprocessing.anatomy import find_lungs, orientation_doubt
from ctclip.preprocessing.geometry import orient
from ctclip.preprocessing.hounsfield import to_hu
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.volume import Volume

TURNS = {"as it is": (), "about left-right": (0, 1), "about front-back": (0, 2), "about head-feet": (1, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("cohort", type=Path)
    paths = sorted((parser.parse_args().cohort / "dataset").rglob("*.nii.gz"))
    doubted = dict.fromkeys(TURNS, 0)
    for path in paths:
        volume = orient(to_hu(read(path)))
        for name, axes in TURNS.items():
            turned = Volume(np.flip(volume.array, axes), volume.affine, volume.source)
            doubted[name] += orientation_doubt(find_lungs(turned)) is not None
    for name, count in doubted.items():
        print(f"{name}: doubted {count} of {len(paths)}")


if __name__ == "__main__":
    main()
