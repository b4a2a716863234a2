"""The preprocessing spec: the geometry and HU window of a model's volumes, frozen and with a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numba
import numpy as np
import yaml

from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import text_of, write_text
from ctclip.preprocessing.named_files import find_file
from ctclip.preprocessing.plain_yaml import load_yaml

LARGEST_VOXELS = 2**31


@dataclass(frozen=True)
class PreprocessingSpec:
    """Spacing in mm and shape in voxels along [slice, row, column]; intensities in HU.

    ``interpolation`` is linear along each axis: ``antialiased`` (the filter widens where the grid gets coarser) or
    plain ``linear``. ``published_geometry`` reproduces CT-CLIP's loader: values clipped to the window before plain
    linear resampling, sizes rounded down and stretched to fit, and voxels indexed [slice, column, row]. Otherwise
    voxels have the exact spacing and are centred on the volume.
    """

    name: str
    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]
    hu_window: tuple[float, float] = (-1000.0, 1000.0)
    fill: float = -1000.0
    orientation: str = "LPS"
    published_geometry: bool = False
    interpolation: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not isinstance(self.published_geometry, bool):
            raise PreprocessingError("preprocessing spec: name must be text, and published_geometry true or false")
        for name in ("spacing", "shape", "hu_window"):
            object.__setattr__(self, name, _numbers(getattr(self, name), int if name == "shape" else float))
        usual = "linear" if self.published_geometry else "antialiased"
        object.__setattr__(self, "interpolation", self.interpolation or usual)
        wrong = (
            (len(self.spacing) != 3 or min(self.spacing) <= 0, "spacing must be three positive numbers (mm)"),
            (
                len(self.shape) != 3 or min(self.shape) <= 0 or math.prod(self.shape) > LARGEST_VOXELS,
                "shape must be three positive whole numbers, for a grid that fits into memory",
            ),
            (
                len(self.hu_window) != 2 or self.hu_window[0] >= self.hu_window[1],
                "hu_window must be a low and a high HU",
            ),
            (
                self.orientation != "LPS",
                "orientation must be LPS: columns to the left, rows to the back, slices up",
            ),
            (
                self.interpolation not in ("antialiased", "linear"),
                "interpolation must be antialiased or linear",
            ),
            (
                self.published_geometry and self.interpolation != "linear",
                "the published geometry requires linear interpolation",
            ),
            # Values are not converted, because the hashes of stores depend on them.
            (
                not _numbers([self.fill], float) or not -32768 <= self.fill <= 32767,
                "fill must be a value that fits int16 (HU)",
            ),
        )
        for fault, remedy in wrong:
            if fault:
                raise PreprocessingError(f"preprocessing spec {self.name!r}: {remedy}")

    @property
    def hash(self) -> str:
        """Eight hex digits that depend on everything except the name."""
        values = dataclasses.asdict(self) | {"name": ""}
        if values["interpolation"] == ("linear" if self.published_geometry else "antialiased"):
            # Added after the first stores; the default value does not change their hashes.
            del values["interpolation"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def window(self) -> tuple[float, float, float, float]:
        """(low, high, middle, gain): voxels are (HU clipped to [low, high] - middle) * gain."""
        low, high = self.hu_window
        return low, high, (low + high) / 2, 2 / (high - low)

    def normalise(
        self, hu: np.ndarray, out: np.ndarray | None = None, corner: tuple[int, ...] = (0, 0, 0)
    ) -> np.ndarray:
        """HU (D, H, W) of any dtype -> float32 in [-1, 1], with the window's limits at -1 and 1.

        If ``out``, a larger C-ordered array, is given, the result is written to it at ``corner``, and ``out`` is
        returned.
        """
        source = hu if hu.dtype in (np.int16, np.float32) else hu.astype(np.float32)
        voxels = np.empty(hu.shape, np.float32) if out is None else out
        low, high, middle, gain = map(np.float32, self.window)
        _windowed(source, low, high, middle, gain, voxels, corner)
        return voxels

    def save(self, path: str | os.PathLike[str], *, once: bool = False) -> None:
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        write_text(path, yaml.safe_dump(values, sort_keys=False), once=once)

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, whole: bool = False) -> PreprocessingSpec:
        """Load a spec from a YAML file, or by its name in ``configs/preprocessing``; see ``find_file``. ``whole``: the
        file was written by ``save`` and must state every value; otherwise it is damaged and refused."""
        path = find_file(source, "preprocessing")
        try:
            values = load_yaml(text_of(path))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PreprocessingError(f"{path}: not a preprocessing spec ({' '.join(str(error).split())})") from error
        known = [field.name for field in dataclasses.fields(cls)]
        # The first versions of the file had no ``interpolation``.
        needed = known[:-1] if whole else ("name", "spacing", "shape")
        due = [name for name in needed if name not in (values if isinstance(values, dict) else {})]
        if due:
            raise PreprocessingError(f"{path}: not a preprocessing spec (it has no {due[0]!r})")
        if unknown := [str(name) for name in values if name not in known]:
            raise PreprocessingError(
                f"{path}: not a preprocessing spec ({unknown[0][:40]!r} is none of {', '.join(known)})"
            )
        try:
            return cls(**values)
        except PreprocessingError as error:
            raise PreprocessingError(f"{path}: {error}") from error


def _numbers(values: Any, kind: type[int] | type[float]) -> tuple[int | float, ...]:
    """Finite (whole) numbers as a tuple; an empty tuple if there are other values."""
    several: list[Any] = list(values) if isinstance(values, list | tuple | np.ndarray) else []
    if any(isinstance(v, bool) or not isinstance(v, Real) for v in several):
        return ()
    if not all(math.isfinite(v) and kind(v) == v for v in several):
        return ()
    return tuple(kind(value) for value in several)


@numba.njit(cache=True, nogil=True)
def _windowed(hu, low, high, middle, gain, voxels, corner):  # type: ignore[no-untyped-def]
    """Clip, convert and scale in one pass over memory instead of four."""
    z, y, x = corner
    for i in range(hu.shape[0]):
        for j in range(hu.shape[1]):
            read, written = hu[i, j], voxels[z + i, y + j][x : x + hu.shape[2]]
            for k in range(len(read)):
                written[k] = (min(max(np.float32(read[k]), low), high) - middle) * gain
