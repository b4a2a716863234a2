"""A few training steps of a small model on fixed data; rank 0 writes losses and parameters. Run by a launcher."""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file, save_file

from ctclip import distributed


def main() -> None:
    settings = json.loads(sys.argv[-1])
    with distributed.process_group() as device:
        run(settings, device)


def run(settings: dict, device: torch.device) -> None:
    from ctclip.config import Config
    from ctclip.data.dataset import Batch
    from ctclip.models.dual_encoder import build_model
    from ctclip.models.text import train_tokenizer
    from ctclip.training.engine import Engine
    from ctclip.training.step import ContrastiveStep

    words = ["heart", "nodule", "effusion", "normal", "lobe", "left", "right", "seen"]
    texts = [f"The {a} and {b} are seen." for a in words for b in words][:16]
    config = Config.model_validate(
        {
            "model": {
                "dim": 8, "standardise": True,
                "volume": {"kind": "vit3d", "stages": [[4, 1]], "patch": [2, 2, 2], "width": 12, "heads": 2, "depth": 1, "registers": 1},
                "text": {"width": 8, "depth": 1, "heads": 2, "max_tokens": 32},
            },
            "training": {"batch": 8, "learning_rate": 1e-4, "zero": settings["zero"], "micro_batch": settings.get("micro_batch"),
                         "precision": settings.get("precision", "fp32")},
        }
    )  # fmt: skip
    if settings.get("checkpointed"):
        volume = config.model.volume.model_copy(update={"activation_checkpointing": True})
        config = config.model_copy(update={"model": config.model.model_copy(update={"volume": volume})})
    if settings.get("compile"):
        config = config.model_copy(update={"training": config.training.model_copy(update={"compile": True})})
    if settings.get("linear"):
        # Batch norm sees a whole batch, GradCache a part of it: a stem without it is what the two share.
        volume = config.model.volume.model_copy(update={"stages": ()})
        config = config.model_copy(update={"model": config.model.model_copy(update={"volume": volume})})
    torch.manual_seed(0)
    model = build_model(config.model, train_tokenizer(texts * 4, 80))
    if settings.get("warm_up"):
        from ctclip.config import TextWarmupConfig
        from ctclip.data.reports import Report
        from ctclip.training.text_warmup import warm_up_text

        reports = [Report(f"{text} {texts[-index]}", f"{text} again {index}.") for index, text in enumerate(texts)]
        warm_up_text(model, reports, TextWarmupConfig(steps=3, batch=8, learning_rate=1e-4), seed=0, device=device)
    engine = Engine(
        ContrastiveStep(model, config.objectives),
        config,
        device,
        load_file(settings["resume"]) if "resume" in settings else None,
    )
    random = torch.Generator().manual_seed(1)
    losses = []
    share = 8 // distributed.world_size()
    first = distributed.rank() * share
    for step in range(settings["steps"]):
        volumes = torch.rand(8, 1, 8, 8, 8, generator=random) * 2 - 1
        rows = [int(i) for i in torch.randint(0, len(texts), (8,), generator=random)]
        mine = slice(first, first + share)
        batch = Batch(
            volumes[mine], [texts[i] for i in rows[mine]], torch.arange(8)[mine], torch.tensor(rows)[mine], None
        )
        if step < settings.get("from", 0) or step >= settings.get("until", settings["steps"]):
            continue
        losses.append(engine.step(batch, step, settings["steps"])["loss"])
    state = engine.state()
    if distributed.is_main():
        save_file(state, settings["output"])
        print(json.dumps(losses))


if __name__ == "__main__":
    main()
