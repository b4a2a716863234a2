"""A model folder of any checkpoint of a run, while it goes on or after."""

from __future__ import annotations

from pathlib import Path

from ctclip.config_files import build_config, read_mapping
from ctclip.data.dataset import stored_rows
from ctclip.errors import CheckpointError
from ctclip.models.dual_encoder import build_model
from ctclip.preprocessing.store import VolumeStore
from ctclip.training.checkpoints import Checkpoints, read_checkpoint
from ctclip.training.loop import run_tokenizer, save_run_model


def export_checkpoint(run: Path, output: Path, which: str = "newest") -> Path:
    """Write ``output`` from the checkpoint ``which`` (newest, best, or a step) and return the checkpoint's folder."""
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: no run folder of `ctclip train` (no config.yaml)")
    config = build_config(read_mapping(run / "config.yaml"), str(run / "config.yaml"))
    store = VolumeStore(Path(str(config.data.store)))
    checkpoints = Checkpoints(run / "checkpoints", config.training.keep_checkpoints, store.spec.hash)
    found = dict(checkpoints.found())
    if which == "best":
        path = checkpoints.best()
    elif which == "newest":
        path = found[max(found)] if found else None
    else:
        path = found.get(int(which)) if which.isdigit() else None
    if path is None:
        there = ", ".join(str(step) for step in sorted(found)) or "none"
        raise CheckpointError(f"{run}: no checkpoint {which!r} (there: {there}; best needs training.validate_every)")
    state = read_checkpoint(path)
    model = build_model(config.model, run_tokenizer(config, run, None))
    rows = stored_rows(store, config.data.train_split)
    save_run_model(output, config, model, store.spec, len(rows), state)
    return path
