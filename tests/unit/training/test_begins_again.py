"""A run that was stopped before its first checkpoint starts again with the same initial weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from ctclip.config_files import load_config
from ctclip.data.reports import Report
from ctclip.models.dual_encoder import DualEncoder
from ctclip.training.run_model import build_run_model
from tests.end_to_end.conftest import TINY
from tests.unit.small import spec_of


def test_weights_do_not_depend_on_what_a_stopped_run_left(tmp_path: Path) -> None:
    config = load_config("phantom_tiny", TINY, {})
    data = SimpleNamespace(
        spec=spec_of((32, 48, 64)), reports=[Report({"findings": "A nodule.", "impression": "None."})]
    )

    def built(resumed: bool) -> DualEncoder:
        torch.manual_seed(config.seed)
        return build_run_model(config, tmp_path, data, None, resumed=resumed)[0]  # type: ignore[arg-type]

    first, again = built(False).state_dict(), built(False).state_dict()
    assert (tmp_path / "architecture" / "config.yaml").is_file()
    assert all(torch.equal(first[name], again[name]) for name in first)
    # When it continues from a checkpoint, only the run folder determines what is built.
    assert built(True).state_dict().keys() == first.keys()
