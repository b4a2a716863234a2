"""Weights of pretrained folders: of half precision, of another architecture, damaged. They work, or are refused in one
line that gives the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctclip.config import ModelConfig, TextConfig
from ctclip.errors import CheckpointError
from ctclip.models.dual_encoder import build_model
from ctclip.models.folder import load_model, save_model
from ctclip.models.slices import SlicesConfig
from ctclip.preprocessing.errors import PreprocessingError
from tests.unit.models.families import family_folder
from tests.unit.models.pretrained import (
    LABELS,
    SPEC,
    TEXTS,
    change,
    dual_encoder,
    encoder,
    scan,
    train_one_step,
    vision_folder,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_text_of_half_precision_is_trained_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    for name in ("bert", "qwen2"):
        folder = family_folder(name, tmp_path / name, dtype)
        assert load_file(folder / "model.safetensors").popitem()[1].dtype == dtype
        model = dual_encoder(folder, pooling="mean")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        train_one_step(model)
        save_model(tmp_path / f"{name} model", model, LABELS)
        loaded = load_model(tmp_path / f"{name} model").model
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        assert torch.equal(loaded.encode_text(TEXTS), model.encode_text(TEXTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_half_precision_are_encoded_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    volume = SlicesConfig(pretrained=str(vision_folder(tmp_path / "vit", dtype)), heads=2)
    text = TextConfig(pretrained=str(family_folder("bert", tmp_path / "bert")))
    model = build_model(ModelConfig(volume=volume, text=text, dim=8), SPEC)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    train_one_step(model)
    save_model(tmp_path / "model", model, LABELS)
    (tmp_path / "vit").rename(tmp_path / "gone")
    loaded = load_model(tmp_path / "model").model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.encode_volume(scan()), model.encode_volume(scan()))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_hidden_layers": 3}, "parameters are missing, for example encoder.layer.2"),
        ({"num_hidden_layers": 1}, "do not belong to it, for example encoder.layer.1"),
        ({"hidden_size": 16}, "do not fit config.json"),
        ({"model_type": "gpt2"}, "another architecture"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1e.09 is more than any known model has"),
        ({"vocab_size": 10**12}, "GiB, but this machine has"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"model_type": ["bert"]}, "architecture"),
    ],
)  # fmt: skip
def test_weights_of_another_architecture_are_refused(bert: Path, values: dict, reason: str) -> None:
    change(bert / "config.json", **values)
    with pytest.raises(CheckpointError, match=reason) as error:
        encoder(bert)
    assert str(bert) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing.*weights=random"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), r"config\.json: expected an object"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no tensors"), "a file is damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter; merge it"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer knows 0 words: its vocabulary file is missing"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), r"tokenizer\.json: cannot be read as JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no tokenizer could be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").write_bytes(b"\xff\xfe"), r"tokenizer_config\.json"),
        (
            lambda folder: change(
                folder / "tokenizer.json",
                normalizer={"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
            ),
            r"tokenizer\.json: its replacements make a text",
        ),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_named(bert: Path, damage: Callable[[Path], None], reason: str) -> None:
    damage(bert)
    with pytest.raises(CheckpointError, match=reason) as error:
        encoder(bert)
    assert str(bert) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_quantised_without_a_word_are_refused(bert: Path, dtype: torch.dtype) -> None:
    path = bert / "model.safetensors"
    state = load_file(path)
    save_file({name: value.double() for name, value in state.items()}, path, {"format": "pt"})
    assert {parameter.dtype for parameter in encoder(bert).parameters()} == {torch.float32}
    save_file({name: value.to(dtype) for name, value in state.items()}, path, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: these weights are quantised .*weight is (I8|F8_E4M3)"
    ):
        encoder(bert)


def test_a_pooler_may_be_missing_and_one_of_an_older_folder_is_left_out(bert: Path, tmp_path: Path) -> None:
    weights = bert / "model.safetensors"
    state = load_file(weights)
    pooler = {name: value for name, value in state.items() if "pooler" in name}
    assert pooler
    expected = encoder(bert)
    save_file({name: value for name, value in state.items() if name not in pooler}, weights, {"format": "pt"})
    text = encoder(bert)
    assert torch.equal(text(**text.tokenise(TEXTS)), expected(**expected.tokenise(TEXTS)))
    # Model folders of earlier versions contain it.
    model = dual_encoder(bert)
    save_model(tmp_path / "model", model, LABELS)
    weights = tmp_path / "model" / "model.safetensors"
    (weights.parent / "SHA256SUMS").unlink()
    save_file(load_file(weights) | {f"text_encoder.bert.{name}": value for name, value in pooler.items()}, weights)
    assert torch.equal(load_model(tmp_path / "model").model.encode_text(TEXTS), model.eval().encode_text(TEXTS))


@pytest.mark.parametrize("file", ["text_config.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xff", b"[]"])
def test_a_damaged_file_of_a_model_folder_is_named(
    bert: Path, tmp_path: Path, file: str, content: bytes | None
) -> None:
    save_model(tmp_path / "model", dual_encoder(bert), LABELS)
    path = tmp_path / "model" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    elif file.endswith("tokenizer_config.json"):
        # tokenizer.json contains everything that is needed, too.
        assert load_model(tmp_path / "model").model.encode_text(TEXTS).isfinite().all()
        return
    with pytest.raises(CheckpointError, match=str(path.parent if content is None else path)) as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


def test_a_spec_that_was_cut_short_is_not_filled_up_with_defaults(bert: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", dual_encoder(bert), LABELS)
    path = tmp_path / "model" / "preprocessing.yaml"
    content = path.read_text()
    path.write_text(content[: content.index("hu_window")])
    with pytest.raises(PreprocessingError, match=r"preprocessing\.yaml: .*hu_window"):
        load_model(tmp_path / "model")
