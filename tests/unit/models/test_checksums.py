"""A flipped bit in the weights of a model or of a head is noticed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ctclip.errors import CheckpointError
from ctclip.heads.folder import load_head, save_head
from ctclip.heads.linear import LinearHead
from ctclip.labels import load_labels
from ctclip.models.checksums import FILE, LARGEST, sha256
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import is_model_folder, load_model, save_model
from tests.unit.small import VIT, dual_encoder, spec_of

NAMES = ("Emphysema", "Hiatal hernia")


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    return dual_encoder(VIT, spec_of((8, 16, 12), (3.0, 1.5, 1.5)))


@pytest.fixture(scope="module")
def folder(model: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checksums") / "model"
    save_model(folder, model, load_labels("ct_rate_18"))
    dim = model.config.dim
    save_head(folder, "linear", LinearHead(model, NAMES, torch.randn(2, dim), torch.zeros(2)))
    return folder


def _flip(path: Path) -> Callable[[], int]:
    """Flip the lowest bit of a file's last byte, which belongs to a weight; returns a function that flips it back."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    content[-1] ^= 1
    return lambda: path.write_bytes(content)


def test_sha256sum_agrees(folder: Path) -> None:
    for place in (folder, folder / "heads" / "linear"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", FILE], cwd=place, check=True)
    assert is_model_folder(folder)


def test_a_flipped_bit_in_the_weights_is_noticed(folder: Path) -> None:
    weights = folder / "model.safetensors"
    mend = _flip(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged: its SHA-256 is .*copy it again"):
        load_model(folder)
    sums = (folder / FILE).read_bytes()
    # On purpose: a user who changes the weights deletes the checksums.
    (folder / FILE).unlink()
    changed = load_model(folder).hash
    mend()
    assert load_model(folder).hash != changed
    (folder / FILE).write_bytes(sums)
    load_model(folder)


def test_a_flipped_bit_in_a_head_is_noticed(folder: Path, model: DualEncoder) -> None:
    mend = _flip(folder / "heads" / "linear" / "linear.safetensors")
    with pytest.raises(CheckpointError, match=r"linear\.safetensors: damaged"):
        load_head(folder, "linear", model)
    mend()
    assert load_head(folder, "linear", model).names == NAMES


@pytest.mark.parametrize("style", ["{sum} *{name}", "{sum}  ./{name}", "{upper}  {name}"])
def test_checksums_as_other_programs_write_them(folder: Path, style: str) -> None:
    sums, weights = folder / FILE, folder / "model.safetensors"
    before = sums.read_bytes()
    digest = sha256(weights)
    sums.write_text(style.format(sum=digest, upper=digest.upper(), name=weights.name) + "\n")
    load_model(folder)
    mend = _flip(weights)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(folder)
    mend()
    sums.write_bytes(before)


def test_checksums_of_other_files_are_of_no_concern(folder: Path) -> None:
    sums = folder / FILE
    before = sums.read_bytes()
    sums.write_bytes(b"one word\n" * 3 + b"0" * 64 + b"  other.safetensors\n")
    load_model(folder)
    sums.write_bytes(b"\xff\xfe not text")
    with pytest.raises(CheckpointError, match="copy the folder again"):
        load_model(folder)
    sums.write_bytes(b"\n" * (LARGEST + 1))
    with pytest.raises(CheckpointError, match="too large"):
        load_model(folder)
    sums.write_bytes(before)
