"""Vision models that can be slice encoders, with the same outputs as in Transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from ctclip.errors import CheckpointError
from ctclip.models.dual_encoder import build_volume_encoder
from ctclip.models.huggingface import vision_model_of
from ctclip.models.slices import SlicesConfig
from tests.unit.models.pretrained import IMAGE, SMALL, SPEC, scan

STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "image_size": 64}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
VISION: dict[str, Callable[[], torch.nn.Module]] = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**SMALL, **IMAGE)),
    "vit that classifies": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **IMAGE)),
    "swin": lambda: hf.SwinModel(hf.SwinConfig(**SWIN)),
    "convnext": lambda: hf.ConvNextModel(hf.ConvNextConfig(**STAGES)),
    "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SMALL, **IMAGE)),
    "clip": lambda: hf.CLIPModel(hf.CLIPConfig(text_config={**SMALL, "vocab_size": 50}, vision_config={**SMALL, **IMAGE})),
    "siglip": lambda: hf.SiglipModel(hf.SiglipConfig(text_config={**SMALL, "vocab_size": 50}, vision_config={**SMALL, **IMAGE})),
    "mobilevit": lambda: hf.MobileViTModel(hf.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 32], num_attention_heads=2)),
}  # fmt: skip


@pytest.mark.parametrize("kind", VISION)
def test_slices_of_other_kinds_stand_without_their_folder(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    VISION[kind]().save_pretrained(tmp_path / "vision")
    config = SlicesConfig(pretrained=str(tmp_path / "vision"), heads=2)
    slices = build_volume_encoder(config, SPEC)
    volume = torch.cat([scan(), -scan()])
    slices(volume).pooled.square().sum().backward()
    learning = {name for name, parameter in slices.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, parameter in slices.named_parameters() if parameter.grad is not None}
    settings = json.loads(json.dumps(slices.vision.config.to_dict(), default=str))
    (tmp_path / "vision").rename(tmp_path / "gone")
    again = build_volume_encoder(config, SPEC, vision=vision_model_of(settings, "vision_config.json")).eval()
    again.load_state_dict(slices.state_dict())
    assert torch.equal(again(volume).pooled, slices.eval()(volume).pooled)


def test_slices_are_encoded_as_transformers_does(tmp_path: Path) -> None:
    """A pooler that was never trained has no weights: the classifier's ViT pools by the mean."""
    torch.manual_seed(0)
    model = VISION["vit that classifies"]().eval()
    model.save_pretrained(tmp_path)
    slices = build_volume_encoder(SlicesConfig(pretrained=str(tmp_path), aggregator="mean"), SPEC).eval()
    images = torch.rand(2, 3, 16, 16)
    expected = model.vit(pixel_values=images).last_hidden_state.mean(dim=1)
    assert slices.width == 16
    given: list[torch.Tensor] = []
    slices.vision.register_forward_hook(lambda _, args, output: given.append(output.last_hidden_state.mean(dim=1)))
    slices.vision(pixel_values=images)
    assert torch.allclose(given[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SMALL, **IMAGE)), "the same vector each time"),
        (lambda: hf.BertModel(hf.BertConfig(vocab_size=50, **SMALL)), "cannot serve as slice encoder"),
    ],
)
def test_what_cannot_see_slices_is_refused(build: Callable[[], torch.nn.Module], reason: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=reason) as error:
        build_volume_encoder(SlicesConfig(pretrained=str(tmp_path)), SPEC)
    assert "\n" not in str(error.value)
