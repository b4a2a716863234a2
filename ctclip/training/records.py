"""The records of a run: configuration, versions, seed, revision, metrics."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

from ctclip import extras
from ctclip.config import Config
from ctclip.config_files import build_config, differing_keys, dump_config, flat_values, read_mapping
from ctclip.errors import TrainingError
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import kind_of, refuse_special, write_text
from ctclip.preprocessing.outputs import check_folder, made_by_us
from ctclip.versions import COMMAND, revision, versions

# Keys that do not affect the weights; a run may resume with other values.
FREE_KEYS = (
    "data.store",
    "data.workers",
    "training.micro_batch",
    "training.zero.",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.log_every",
    "training.validate_every",
    "training.validate_volumes",
    "training.wandb_project",
)
# Marks run folders of version 0.2 without a lock file.
MARKS = {"run.json": b'"revision"'}


def check_run_folder(folder: Path) -> None:
    """Raise PreprocessingError unless ``folder`` is new, empty, or a run folder."""
    check_folder(folder, lambda path: made_by_us(path, MARKS), "run of `ctclip train`")


def open_run(folder: Path, config: Config, *, force: bool = False) -> None:
    """Write ``config.yaml`` and ``run.json``; a folder with another configuration is refused unless ``force``."""
    saved = folder / "config.yaml"
    if kind_of(saved) == "a file":
        changed = differing_keys(build_config(read_mapping(saved), str(saved)), config)
        changed = [key for key in changed if not key.startswith(FREE_KEYS)]
        if changed and not force:
            raise TrainingError(
                f"{saved}: this run folder belongs to another configuration (differs in {', '.join(changed)}). "
                f"Choose another --output, or resume with the new configuration with --force"
            )
    write_text(saved, dump_config(config))
    facts = {"seed": config.seed, "revision": revision(), "versions": versions(), "command": COMMAND.get()}
    write_text(folder / "run.json", json.dumps(facts, indent=2))


# TensorBoard groups scalars by prefix; keys without a group are losses of objectives.
GROUPS = {
    "loss": "loss/total", "learning_rate": "optimiser/learning_rate", "gradient_norm": "optimiser/gradient_norm",
    "logit_scale": "optimiser/logit_scale", "epoch": "progress/epoch", "volumes_per_second": "speed/volumes_per_second",
    "data_wait": "speed/data_wait", "memory_gb": "speed/memory_gb",
}  # fmt: skip


def board_name(key: str) -> str:
    """The name in TensorBoard of a key of ``metrics.jsonl``: ``loss/total``, ``loss/clip``, ``valid/auroc``."""
    if key.startswith("valid_"):
        return f"valid/{key.removeprefix('valid_')}"
    return GROUPS.get(key, f"loss/{key}")


class MetricsLog:
    """``metrics.jsonl`` (one line per logged step), TensorBoard events and, if requested, Weights & Biases."""

    def __init__(
        self, folder: Path, first_step: int, wandb_project: str | None = None, config: Config | None = None
    ) -> None:
        """``config``: its values appear as hyper-parameters in TensorBoard."""
        self.path = folder / "metrics.jsonl"
        refuse_special(self.path)
        if self.path.is_file():
            # Steps after the checkpoint will be repeated; keep one line per step.
            kept = [
                line for line in self.path.read_text("utf-8", "replace").splitlines() if _step_of(line) < first_step
            ]
            write_text(self.path, "".join(f"{line}\n" for line in kept))
        self.board = extras.require("torch.utils.tensorboard").SummaryWriter(
            str(folder / "tensorboard"), purge_step=first_step
        )
        if config is not None and first_step == 0:
            self._write_hyper_parameters(flat_values(config))
        self.wandb = _wandb(folder, wandb_project) if wandb_project else None

    def _write_hyper_parameters(self, values: dict[str, Any]) -> None:
        """TensorBoard's HPARAMS tab, which compares runs by their configuration."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in values.items()
        }
        for summary in hparams(plain, dict.fromkeys(("loss/total", "valid/loss", "valid/auroc"), 0.0)):
            self.board.file_writer.add_summary(summary)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the figures of a training step (with ``loss``) or of a validation (keys begin with ``valid_``)."""
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, **values}) + "\n")
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(board_name(name), value, step)
        except OSError as error:
            raise TrainingError(
                f"{self.path}: could not be written ({error.strerror}); free some space and start the same command again: it "
                f"resumes from the last checkpoint"
            ) from error
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _wandb(folder: Path, project: str) -> Any:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        print(
            "warning: training.wandb_project is set, but wandb is not installed: `pip install wandb`", file=sys.stderr
        )
        return None
    # A resumed run keeps its W&B id; another folder with the same name gets a new one.
    known = f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"
    return wandb.init(project=project, name=folder.name, dir=str(folder), resume="allow", id=known)


def _step_of(line: str) -> int:
    try:
        return int(plain_json.loads(line)["step"])
    except UNFIT:
        # A line cut short by a crash.
        return sys.maxsize
