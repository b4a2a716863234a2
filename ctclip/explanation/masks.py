"""Reference masks of findings: the layout of a folder of masks, and the masks of one volume."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from ctclip.config_files import find_config, read_mapping
from ctclip.errors import ExplanationError
from ctclip.labels import load_labels
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.readers import read
from ctclip.preprocessing.volume import FileGrid
from ctclip.schema import Section, validated

# Two files belong to different scans if their positions of the same voxel differ by more than this (mm).
SAME_PLACE_MM = 0.5


class MaskLayout(Section):
    """A file of ``configs/masks``."""

    name: str
    describes: str
    file: str = Field(description="file name of a volume's masks; {volume} stands for its id")
    kind: Literal["bits", "labels", "channels"] = Field(
        description="bits: bit i of a voxel is the i-th label; labels: value i + 1 is the i-th label; "
        "channels: one volume for each sentence"
    )
    labels: tuple[str, ...] = Field(
        (), description="label names, or the name of a label set; channels: not used, labels come from the sentences"
    )
    sentences: str = Field("", description="channels: the JSON file with the sentences of each volume")

    @model_validator(mode="before")
    @classmethod
    def _labels_of_a_set(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("labels"), str):
            return values | {"labels": list(load_labels(values["labels"]).names)}
        return values

    @model_validator(mode="after")
    def _complete(self) -> MaskLayout:
        if "{volume}" not in self.file:
            raise ValueError("file: must hold {volume}, which stands for the volume's id")
        if self.kind == "channels" and not self.sentences:
            raise ValueError("kind 'channels' needs 'sentences', the JSON file with the sentences of each volume")
        if self.kind != "channels" and not self.labels:
            raise ValueError(f"{self.kind} need labels")
        return self


def load_layout(name: str) -> MaskLayout:
    """A layout by path, or by the name of one in ``configs/masks``."""
    path = find_config(name, "masks")
    return validated(MaskLayout, read_mapping(path), str(path))


class Masks:
    """A folder of masks. ``volumes``: the ids of its volumes, with their files."""

    def __init__(self, folder: Path, layout: MaskLayout) -> None:
        if not folder.is_dir():
            raise ExplanationError(f"{folder}: no such folder of masks")
        self.folder, self.layout = folder, layout
        before, after = layout.file.split("{volume}")
        self.volumes = {
            path.name.removeprefix(before).removesuffix(after): path
            for path in sorted(folder.rglob(layout.file.replace("{volume}", "*")))
            if path.is_file()
        }
        if not self.volumes:
            raise ExplanationError(
                f"{folder}: holds no file {layout.file!r}; give another folder, or another --mask-layout"
            )
        self.texts: dict[str, list[str]] = {}
        self.categories: dict[str, list[str]] = {}
        if layout.kind == "channels":
            self._read_sentences()

    def of(self, volume: str, grid: FileGrid) -> Iterator[tuple[str, np.ndarray]]:
        """The findings of a volume with their masks, bool [slice, row, column] on the scan's ``grid``. Raises
        ExplanationError if the masks lie on another grid, or have values that are not in the layout."""
        path = self.volumes[volume]
        if self.layout.kind == "channels":
            yield from self._channels(volume, path, grid)
            return
        taken = read(path)
        own = FileGrid.of(taken.array.shape, taken.affine, taken.columns_first)
        values = taken.array.transpose(2, 1, 0) if taken.columns_first else taken.array
        _check_grid(path, own, grid)
        names = self.layout.labels
        values = _whole(path, values, 2 ** len(names) - 1 if self.layout.kind == "bits" else len(names))
        for number, name in enumerate(names):
            mask = (values >> number) & 1 == 1 if self.layout.kind == "bits" else values == number + 1
            if mask.any():
                yield name, mask

    def _channels(self, volume: str, path: Path, grid: FileGrid) -> Iterator[tuple[str, np.ndarray]]:
        """The sentences of a volume with their masks. Channels are the first or the last axis of the file, whichever
        leaves an array with the shape of the scan."""
        import nibabel as nib

        try:
            image: Any = nib.load(path)
            array = np.asarray(image.dataobj)
        except Exception as error:  # nibabel raises many kinds of error for damaged files
            raise ExplanationError(f"{path}: cannot be read as NIfTI; copy it again") from error
        expected = grid.shape[::-1]
        array = array[..., None] if array.ndim == 3 else array
        if array.ndim == 4 and array.shape[1:] == expected and array.shape[:3] != expected:
            array = np.moveaxis(array, 0, -1)
        texts = self.texts.get(volume, [])
        if array.ndim != 4 or array.shape[:3] != expected or array.shape[3] != len(texts):
            raise ExplanationError(
                f"{path}: {' x '.join(map(str, array.shape))} voxels; the scan has {' x '.join(map(str, expected))} and "
                f"{self.layout.sentences} names {len(texts)} sentences of it"
            )
        array = _whole(path, array)
        for number, text in enumerate(texts):
            mask = array[..., number].transpose(2, 1, 0) > 0
            if mask.any():
                yield text, mask

    def _read_sentences(self) -> None:
        """The sentences of each volume in the order of its channels, with the category of each sentence."""
        beside = (self.folder / self.layout.sentences, self.folder.parent / self.layout.sentences)
        path = next((path for path in beside if path.is_file()), None)
        if path is None:
            raise ExplanationError(f"{self.folder}: there is no {self.layout.sentences} in this folder or beside it")
        try:
            kept = plain_json.read(path)
            records = [one for part in kept.values() for one in part] if isinstance(kept, dict) else list(kept)
            for record in records:
                volume = str(record["name"]).removesuffix(".nii.gz")
                self.texts[volume] = _in_order(record["findings"])
                categories = _in_order(record.get("categories", []))
                whole = len(categories) == len(self.texts[volume])
                self.categories[volume] = categories if whole else ["sentence"] * len(self.texts[volume])
        except UNFIT as error:
            raise ExplanationError(f"{path}: does not list volumes by name with their findings") from error


def _in_order(values: Any) -> list[str]:
    """A list as it is; a mapping from numbers, sorted by number."""
    ordered = [values[key] for key in sorted(values, key=int)] if isinstance(values, dict) else list(values)
    return [str(value) for value in ordered]


def _whole(path: Path, values: np.ndarray, largest: int | None = None) -> np.ndarray:
    """Values of masks as int64. Raises ExplanationError for a value that no mask of the layout has."""
    low, high = (float(bound) for bound in (values.min(initial=0), values.max(initial=0)))
    # A bound is NaN if a value is.
    if not (low >= 0 and high < 2**62) or (values.dtype.kind == "f" and not np.array_equal(values, np.trunc(values))):
        raise ExplanationError(
            f"{path}: holds values from {low:g} to {high:g}, but masks are whole numbers from 0; is it the scan, or a map of "
            f"probabilities?"
        )
    if largest is not None and high > largest:
        raise ExplanationError(
            f"{path}: holds the value {int(high)}, but the labels of the layout end at {largest}; give another --mask-layout, "
            f"or name every label in it"
        )
    return values.astype(np.int64)


def _check_grid(path: Path, own: FileGrid, grid: FileGrid) -> None:
    corners = np.array([[z, y, x, 1] for z in (0, 1) for y in (0, 1) for x in (0, 1)], dtype=float)
    corners[:, :3] *= np.array(grid.shape) - 1
    away = np.abs(corners @ (own.affine - grid.affine).T).max()
    if own.shape != grid.shape or away > SAME_PLACE_MM:
        raise ExplanationError(
            f"{path}: is a mask of {' x '.join(map(str, own.shape[::-1]))} voxels, {away:.1f} mm away from the scan of "
            f"{' x '.join(map(str, grid.shape[::-1]))}: it belongs to another scan, or was resampled; give masks on "
            f"the scan's grid"
        )
