"""Write a model folder from any checkpoint of a run, during training or afterwards."""

from __future__ import annotations

from pathlib import Path

from ctclip.config_files import build_config, read_mapping
from ctclip.errors import CheckpointError
from ctclip.models.folder import check_output, read_architecture
from ctclip.preprocessing.whole_numbers import whole_number
from ctclip.training.checkpoints import Checkpoints, read_checkpoint
from ctclip.training.run_model import ARCHITECTURE, save_run_model


def export_checkpoint(run: Path, output: Path, which: str = "newest") -> Path:
    """Write ``output`` from the checkpoint ``which`` (newest, best, or a step) and return the checkpoint's folder.
    Needs only the run folder, neither the store nor a pretrained folder."""
    check_output(output)
    if not (run / "config.yaml").is_file() or not (run / ARCHITECTURE).is_dir():
        raise CheckpointError(f"{run}: not a run folder of `ctclip train` (no config.yaml, or no {ARCHITECTURE}/)")
    config = build_config(read_mapping(run / "config.yaml"), str(run / "config.yaml"))
    built = read_architecture(run / ARCHITECTURE)
    checkpoints = Checkpoints(run / "checkpoints", config.training.keep_checkpoints, built.spec.hash)
    known = dict(checkpoints.found())
    if which == "best":
        path = checkpoints.best()
    elif which == "newest":
        path = known[max(known)] if known else None
    else:
        step = whole_number(which)
        path = None if step is None else known.get(step)
    if path is None:
        there = ", ".join(str(step) for step in sorted(known)) or "none"
        raise CheckpointError(f"{run}: no checkpoint {which!r} (there: {there}; best needs training.validate_every)")
    save_run_model(output, config, run, built.model, read_checkpoint(path))
    return path
