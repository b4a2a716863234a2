"""Small dual encoders on pretrained folders, and helpers for the tests of such folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf

from ctclip.config import ModelConfig, TextConfig, objective_configs
from ctclip.labels import labels_of_columns
from ctclip.models.dual_encoder import DualEncoder, build_model
from ctclip.models.text import TextEncoder, build_text_encoder
from ctclip.models.vit3d import ViT3DConfig
from ctclip.objectives.objective import Context
from ctclip.training.step import Pairs, Part, TrainingStep
from tests.unit.models.families import REPORTS
from tests.unit.small import spec_of

SPEC, LABELS = spec_of((8, 8, 8)), labels_of_columns("two", ["Nodule", "Effusion"])
VOLUME = ViT3DConfig(patch=(4, 4, 4), stages=(), width=16, depth=1, heads=2, registers=1)
TEXTS = [*REPORTS[:4], " ".join(REPORTS), ""]
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 8}


def vision_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder with a vision transformer of one layer with random weights."""
    torch.manual_seed(0)
    hf.ViTModel(hf.ViTConfig(**SMALL, **IMAGE)).to(dtype).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    return folder


def dual_encoder(folder: Path, **text: object) -> DualEncoder:
    torch.manual_seed(1)
    return build_model(
        ModelConfig(volume=VOLUME, text=TextConfig(pretrained=str(folder), lora_rank=2, **text), dim=8), SPEC
    )


def train_one_step(model: DualEncoder) -> None:
    """One step of AdamW; every parameter that learns must have a gradient."""
    step = TrainingStep(Context(model.train()), objective_configs({"clip": 1}))
    learning = {name: parameter for name, parameter in step.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    volumes = torch.rand(4, 1, 8, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    part = Part(volumes, model.text_encoder.tokenise(TEXTS[1:5]))
    loss, _ = step(part, Pairs(torch.arange(4), torch.arange(4), {}))
    loss.backward()
    assert [name for name, parameter in learning.items() if parameter.grad is None] == []
    optimizer.step()
    model.eval()


def encoder(folder: Path | str, **options: object) -> TextEncoder:
    return build_text_encoder(TextConfig(pretrained=str(folder), lora_rank=2, **options)).eval()


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def scan() -> torch.Tensor:
    return torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
