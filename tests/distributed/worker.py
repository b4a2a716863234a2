"""Training steps of a small model on fixed data, one case after the other in one process group; run by a launcher.

The first argument is a JSON file: a list of cases, each a mapping with ``name`` and what differs from the plain run.
Rank 0 writes ``name.safetensors`` (the state after the last step) and ``name.json`` (losses, or why it was refused).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ctclip import distributed

BATCH = 8
WORDS = ["heart", "nodule", "effusion", "normal", "lobe", "left", "right", "seen"]
# Texts of all lengths, without a word that every text has: what all texts share has no gradient, and Adam would turn
# rounding errors into steps.
TEXTS = [
    " ".join(WORDS[(5 * text + 3 * place * (1 + text // 8)) % 8] for place in range(2 + text // 2))
    for text in range(16)
]
MODEL = {
    "dim": 16, "standardise": True, "logit_scale": 2.0,
    "volume": {"kind": "vit3d", "stages": [[4, 1]], "patch": [2, 2, 2], "width": 12, "heads": 2, "depth": 1, "registers": 1},
    "text": {"width": 16, "depth": 1, "heads": 2, "max_tokens": 32},
}  # fmt: skip

# The published encoder, whose codes change without gradients.
CODES = {
    "kind": "ctvit", "patch": [4, 4, 4], "width": 12, "spatial_depth": 1, "temporal_depth": 1,
    "heads": 2, "head_width": 8, "codebook_size": 8,
}  # fmt: skip
SHAPE = (8, 8, 8)


def main() -> None:
    cases = Path(sys.argv[1])
    with distributed.process_group() as device:
        for case in json.loads(cases.read_text()):
            run(case, cases.parent, device)
    distributed.leave(0)


def run(case: dict[str, Any], folder: Path, device: torch.device) -> None:
    from ctclip.config import TextWarmupConfig
    from ctclip.data.reports import Report
    from ctclip.errors import ConfigError
    from ctclip.labels import labels_of_columns
    from ctclip.models.dual_encoder import build_model
    from ctclip.models.text import train_tokenizer
    from ctclip.objectives.objective import Context
    from ctclip.phantom.prevalence import FINDINGS
    from ctclip.preprocessing.spec import PreprocessingSpec
    from ctclip.prompts import load_prompts
    from ctclip.training.engine import Engine
    from ctclip.training.step import TrainingStep
    from ctclip.training.text_warmup import warm_up_text

    config = configuration(case)
    torch.manual_seed(0)
    spec = PreprocessingSpec("test", spacing=(1.5, 1.5, 3.0), shape=SHAPE)
    model = build_model(config.model, spec, train_tokenizer(TEXTS * 4, 80))
    # A normalisation removes these two again: their exact gradient is zero, and Adam would turn its rounding errors
    # into steps.
    model.text_encoder.bert.encoder.layer[-1].output.LayerNorm.bias.requires_grad_(False)
    if hasattr(getattr(getattr(model.volume_encoder, "stem", None), "embed", None), "bias"):
        model.volume_encoder.stem.embed.bias.requires_grad_(False)
    if case.get("warm_up"):
        reports = [
            Report({"findings": f"{text} {TEXTS[-index]}", "impression": f"{text} again {index}."})
            for index, text in enumerate(TEXTS)
        ]
        warm_up_text(model, reports, TextWarmupConfig(steps=3, batch=8, learning_rate=1e-4), seed=0, device=device)
    resumed = load_file(folder / f"{case['resume']}.safetensors") if "resume" in case else None
    try:
        if case.get("locked"):
            model.lock_text()
        labels = labels_of_columns("test", FINDINGS[:3])
        context = Context(model, labels, load_prompts("report_style"), sentences=tuple(WORDS))
        engine = Engine(TrainingStep(context, config.objectives), config, device, resumed)
    except ConfigError as error:
        return write(folder, case["name"], {"refused": str(error)}, {})
    first, last = case.get("steps", (0, 5))
    for number in range(first, last):
        engine.step(batch(number, engine.tokenisers), number, 5)
    losses = [logged["loss"] for logged in engine.read()]
    return write(folder, case["name"], {"losses": losses}, engine.state())


def configuration(case: dict[str, Any]) -> Any:
    from ctclip.config import Config

    volume, stage = dict(MODEL["volume"]), case.get("stage", 0)  # type: ignore[call-overload]
    if case.get("linear"):
        # Batch norm uses a whole batch, GradCache a part of it: they are compared on a stem without batch norm.
        volume["stages"] = []
    if case.get("codes"):
        volume = dict(CODES)
    volume["activation_checkpointing"] = case.get("checkpointed", False)
    training = {
        "batch": BATCH, "learning_rate": 5e-4, "zero": {"stage": stage, "offload": case.get("offload", False)},
        **{key: case[key] for key in ("micro_batch", "precision", "compile", "gradient_clip") if key in case},
    }  # fmt: skip
    model = {**MODEL, "volume": volume}
    return Config.model_validate(
        {"model": model, "training": training, "objectives": case.get("objectives", {"clip": 1})}
    )


def batch(step: int, tokenisers: Any) -> Any:
    """This rank's share of a global batch: eight of sixteen scans, each a bright cell in noise at a different
    position."""
    from ctclip.data.batch import Batch
    from ctclip.data.reports import sentence_numbers

    random = torch.Generator().manual_seed(step)
    rows = torch.randperm(len(TEXTS), generator=random)[:BATCH]
    volumes = 0.2 * torch.rand(BATCH, 1, *SHAPE, generator=random) - 0.9
    for volume, row in zip(volumes, rows.tolist(), strict=True):
        z, y, x = 4 * (row // 8), 4 * (row // 4 % 2), 4 * (row // 2 % 2)
        volume[0, z : z + 4, y : y + 4, x : x + 4] += 0.7 + row % 2
    labels = (rows[:, None] >> torch.arange(3) & 1).float()
    share = BATCH // distributed.world_size()
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    texts = [TEXTS[row] for row in rows[mine]]
    # Each word of a text as a sentence.
    said = sentence_numbers([list(dict.fromkeys(text.split())) for text in TEXTS], WORDS)[rows[mine]]
    size = share // tokenisers.parts
    parts = [texts[first : first + size] for first in range(0, share, size)]
    return Batch(
        volumes[mine],
        [tokenisers.texts(part) for part in parts],
        rows[mine],
        rows[mine],
        words=None if tokenisers.words is None else [tokenisers.words(part) for part in parts],
        columns={"labels": labels[mine], "sentences": torch.from_numpy(said)},
    )


def write(folder: Path, name: str, outcome: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    if distributed.is_main():
        save_file(state, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
