"""States of interrupted runs: kept and read again, and every flipped bit noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ctclip.adaptation.state import read_state, write_state
from ctclip.errors import CheckpointError

TENSORS = {
    "whole": torch.arange(7), "half": torch.rand(3, 4).half(), "brain": torch.rand(5).bfloat16(), "one": torch.tensor(2.5),
    "none": torch.zeros(0, 3), "turned": torch.rand(4, 6).T,
}  # fmt: skip


def test_a_state_is_read_again_by_its_own_run(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    assert read_state(path, "a") is None
    write_state(path, "a", TENSORS, {"stage": 2, "losses": [["first", float("nan"), 0.1]]})
    kept = read_state(path, "a")
    assert kept is not None
    tensors, facts = kept
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert (facts["stage"], facts["losses"][0][2]) == (2, 0.1)
    assert read_state(path, "b") is None


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path, random = tmp_path / "state.safetensors", np.random.default_rng(0)
    write_state(path, "the run", TENSORS, [1, 2, 3])
    whole, damaged = path.read_bytes(), 0
    for _ in range(600):
        content = bytearray(whole)
        content[random.integers(len(whole))] ^= 1 << random.integers(8)
        path.write_bytes(bytes(content))
        try:
            kept = read_state(path, "the run")
        except CheckpointError as error:
            damaged += "delete it and run the same command again" in str(error)
            continue
        # The key itself was hit, so that the run begins again; or a character between values.
        assert kept is None or (kept[1] == [1, 2, 3] and all(torch.equal(kept[0][n], v) for n, v in TENSORS.items()))
    assert damaged > 400


def test_a_state_of_other_contents_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(path, "a")
