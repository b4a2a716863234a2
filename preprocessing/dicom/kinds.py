"""The kind of values according to a header: original or derived, Hounsfield units or another quantity."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

ORIGINAL, DERIVED, REFORMATTED, ALTERED = range(4)
# Words in ImageType and descriptions for values that are not plain attenuation at one location.
ALTERING = {
    "a projection (MIP)": r"MIP|MINIP|MAX_?IP|MIN_?IP|PROJECTION|AVERAGE_?IP|RAYSUM|VRT|VOLREN|VOLUME_RENDER\w*|SSD|3D_?RENDER\w*",
    "virtual non-contrast": r"VNC|VUE|VNCA|VIRTUAL_?NON_?\w+|VIRTUAL_?UNENHANCED|WATER_?NO_?IODINE|\w*_NO_IODINE",
    "a material map": r"IODINE|IODINE_?MAP|IODINE_?OVERLAY|IODINE_?WATER|WATER_?IODINE|URIC_?ACID|FAT_?MAP|Z_?EFF|"
    r"EFFECTIVE_?Z|EFF_?Z|ELECTRON_?DENSITY|RHO_?Z|MATERIAL|MATERIAL_?BASIS|PBV|LUNG_?PBV|GSI_?MD",
    "mono-energetic": r"MONO|MONOE|MONO_?PLUS|MONO_?ENERGETIC|MONOENERGETIC|MONOCHROMATIC|VMI|VME|MONO_?\d+_?KEV|\d+_?KEV|GSI_?MONO",
    "subtracted": r"SUBTRACT\w*|BONE_?REMOVAL|BONE_?REMOVED",
    "a parameter map": r"PERFUSION\w*|CBF|CBV|MTT|TTP|BLOOD_?FLOW|PARAMETRIC|PARAM_?MAP|COLOR_?MAP",
}  # fmt: skip
REFORMATTING = r"MPR|CPR|REFORMATTED|REFORMAT|RESAMPLED|CSA_MPR|COR|SAG|CORONAL|SAGITTAL|OBLIQUE"
HU_TYPES = ("", "HU", "US", "UNSPECIFIED")


def image_types(header: Any) -> list[str]:
    """The values of ImageType in capitals, whatever type a file states for them."""
    value = header.get("ImageType", None)
    several = value if isinstance(value, Iterable) and not isinstance(value, str | bytes) else [value]
    return [str(kind).upper() for kind in several if kind is not None]


def words(header: Any) -> str:
    """ImageType and descriptions in one string, with spaces around each word."""
    text = " ".join([*image_types(header), str(header.get("SeriesDescription", "") or "").upper()])
    return f" {re.sub(r'[^A-Z0-9_]+', ' ', text)} "


def altered_as(header: Any) -> str | None:
    """How the values of an image were altered, or None for a plain reconstruction."""
    text = words(header).replace(" ", "_")
    return next((kind for kind, pattern in ALTERING.items() if re.search(rf"_(?:{pattern})_", text)), None)


def alteration(header: Any) -> int:
    """ORIGINAL, DERIVED, REFORMATTED or ALTERED; smaller values are closer to the measurement."""
    if altered_as(header) is not None:
        return ALTERED
    text = words(header).replace(" ", "_")
    if re.search(rf"_(?:{REFORMATTING})_", text):
        return REFORMATTED
    return DERIVED if "_DERIVED_" in text or "_SECONDARY_" in text else ORIGINAL


def in_hu(header: Any) -> bool:
    """Whether RescaleType is HU or missing."""
    return str(header.get("RescaleType", "") or "").strip().upper() in HU_TYPES
