"""Models that can be text encoders; others are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from ctclip.config import ModelConfig, TextConfig
from ctclip.errors import CheckpointError, ConfigError
from ctclip.models.sizes import measure
from tests.unit.models.families import FAMILIES, SIZES, family_folder, wordpiece
from tests.unit.models.pretrained import IMAGE, SMALL, SPEC, TEXTS, VOLUME, encoder


def _cannot_serve() -> list[tuple[str, Callable[[int], torch.nn.Module], str]]:
    bart = {f"{side}_{part}": number for side in ("encoder", "decoder") for part, number in
            (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    return [
        ("fnet", lambda n: hf.FNetModel(hf.FNetConfig(vocab_size=n, **SIZES)), "depend on the padding"),
        ("bart", lambda n: hf.BartModel(hf.BartConfig(vocab_size=n, d_model=32, **bart)), "an encoder-decoder model"),
        ("vit", lambda n: hf.ViTModel(hf.ViTConfig(**SMALL, **IMAGE)), "architecture vit cannot serve as text encoder"),
        ("resnet", lambda n: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])), "resnet"),
        ("siglip", lambda n: hf.SiglipModel(hf.SiglipConfig(text_config={**SMALL, "vocab_size": n}, vision_config={**SMALL, **IMAGE})), "no text encoder"),
    ]  # fmt: skip


@pytest.mark.parametrize(("kind", "build", "reason"), _cannot_serve())
def test_what_cannot_read_reports_is_refused(
    kind: str, build: Callable[[int], torch.nn.Module], reason: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer = wordpiece()
    build(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=reason) as error:
        encoder(tmp_path)
    assert kind in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "pooling", "remedy"), [("gpt2", "cls", "last"), ("qwen2", "cls", "last"), ("t5", "cls", "mean")])  # fmt: skip
def test_a_pooling_that_no_token_stands_for_is_refused(name: str, pooling: str, remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"set model.text.pooling={remedy}"):
        encoder(family_folder(name, tmp_path), pooling=pooling)


def test_adapters_are_refused_where_there_is_nothing_to_adapt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = wordpiece()
    hf.XLNetModel(hf.XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=1, n_head=2, d_inner=48)).save_pretrained(tmp_path)  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    text = encoder(tmp_path)
    assert text(**text.tokenise(TEXTS)).isfinite().all()
    with pytest.raises(ConfigError, match=r"xlnet .* set model.text.tuning=full or frozen"):
        encoder(tmp_path, tuning="lora")


def test_no_room_for_a_word_is_refused(bert: Path) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 3"):
        encoder(bert, max_tokens=2)
    text = encoder(bert, max_tokens=3)
    assert text(**text.tokenise(TEXTS)).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parameters_of_any_family_are_counted(name: str, tmp_path: Path) -> None:
    folder = family_folder(name, tmp_path)
    config = ModelConfig(volume=VOLUME, text=TextConfig(pretrained=str(folder)))
    counted = measure(config, SPEC).text_parameters
    assert counted == sum(parameter.numel() for parameter in encoder(folder).bert.parameters())
