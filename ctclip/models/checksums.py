"""Checks of weights files: their SHA-256, in ``SHA256SUMS`` beside them, which ``sha256sum -c`` also reads, and values.

A safetensors file has no checksum of its own: a flipped bit in a weight would be loaded and change the scores.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.preprocessing.errors import printable
from ctclip.preprocessing.files import regular, text_of, write_text

FILE = "SHA256SUMS"
# Bytes of the largest file of checksums that is read.
LARGEST = 2**20


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def finite(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file. Raises CheckpointError if one holds NaN or infinity, of which scores would be NaN."""
    for name, tensor in tensors.items():
        plain = tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0
        if plain and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise CheckpointError(
                f"{path}: {printable(name)} holds values that are not finite numbers; copy it again from its source, or "
                f"take another checkpoint of its training"
            )
    return tensors


def write_checksums(folder: Path) -> None:
    """Write the checksums of all safetensors files of a folder, if it has any. Call it before the folder is moved into place."""
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        write_text(folder / FILE, "".join(f"{sha256(path)}  {path.name}\n" for path in weights))


def checked_sha256(path: Path) -> str:
    """The SHA-256 of a weights file, in hex. Raises CheckpointError if the folder's checksums list another for it.
    Files without a checksum, such as those of versions before 1.1, are accepted."""
    sums = path.with_name(FILE)
    try:
        own = sha256(regular(path))
        if sums.exists() and sums.stat().st_size > LARGEST:
            raise CheckpointError(f"{sums}: too large for a list of checksums; copy the folder again")
        lines = text_of(sums).splitlines() if sums.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.parent}: {printable(str(error))[:200]}; copy the folder again") from error
    for line in lines:
        expected, _, name = line.partition(" ")
        # As other programs write it: `sha256sum -b` puts an asterisk before a name, and `find` a dot and a slash.
        if name.lstrip(" *").removeprefix("./") == path.name and expected.lower() != own:
            raise CheckpointError(
                f"{path}: damaged: its SHA-256 is {own[:12]}..., but {FILE} lists {printable(expected)[:12]}...; copy "
                f"it again from its source, or delete {FILE} if you changed the weights yourself"
            )
    return own
