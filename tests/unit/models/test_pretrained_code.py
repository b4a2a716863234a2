"""Architectures that come as code, and names of the hub: only data are downloaded, and no foreign code is run."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ctclip.errors import CheckpointError
from ctclip.models.dual_encoder import build_volume_encoder
from ctclip.models.folder import load_model, save_model
from ctclip.models.slices import SlicesConfig
from tests.unit.models.fake_hub import hub
from tests.unit.models.pretrained import LABELS, SPEC, TEXTS, change, dual_encoder, encoder


def with_code(folder: Path, kind: str) -> Path:
    """``folder`` as a repository with its own architecture; its code leaves a mark if it is run."""
    mark = folder / "ran"
    for module in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{module}.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n")
    own = {
        "AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own", "AutoTokenizer": ["tokenization_own.Own", None],
    }  # fmt: skip
    change(folder / "config.json", model_type=kind, auto_map=own, _attn_implementation="someone/kernels")
    change(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")
    return mark


@pytest.mark.usefixtures("silent")
def test_an_architecture_that_comes_as_code_is_refused(bert: Path) -> None:
    mark = with_code(bert, "new")
    with pytest.raises(CheckpointError, match=r"config\.json: the architecture 'new' .* never run"):
        encoder(bert)
    with pytest.raises(CheckpointError, match=r"config\.json: the architecture 'new' .* never run"):
        build_volume_encoder(SlicesConfig(pretrained=str(bert)), SPEC)
    assert not mark.exists()


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("kind", ["bert", "cxr-bert"])
def test_code_beside_a_plain_bert_is_left_alone(bert: Path, kind: str, tmp_path: Path) -> None:
    plain = encoder(bert)
    expected = plain(**plain.tokenise(TEXTS))
    mark = with_code(bert, kind)
    model = dual_encoder(bert)
    text = model.text_encoder.eval()
    assert torch.equal(text(**text.tokenise(TEXTS)), expected)
    assert text.bert.config._attn_implementation == "sdpa"
    save_model(tmp_path / "model", model.eval(), LABELS)
    assert "auto_map" not in "".join(file.read_text() for file in (tmp_path / "model").rglob("*.json"))
    loaded = load_model(tmp_path / "model").model
    assert torch.equal(loaded.encode_text(TEXTS), model.encode_text(TEXTS))
    assert not mark.exists()


@pytest.mark.usefixtures("silent")
def test_a_model_folder_names_no_code_either(bert: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", dual_encoder(bert), LABELS)
    settings = tmp_path / "model" / "text_config.json"
    change(settings, auto_map={"AutoModel": "someone/else--modeling.Own"}, _attn_implementation="someone/kernels")
    assert load_model(tmp_path / "model").model.text_encoder.bert.config._attn_implementation == "sdpa"
    change(settings, model_type="own")
    with pytest.raises(CheckpointError, match=r"text_config\.json: the architecture 'own'"):
        load_model(tmp_path / "model")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """The hub at an address, with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def turn(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")  # fmt: skip

    return turn


@pytest.mark.usefixtures("silent")
def test_a_hub_name_is_a_folder_of_data(bert: Path, at: Callable[[str], None]) -> None:
    mark = with_code(bert, "cxr-bert")
    (bert / "onnx").mkdir()
    (bert / "onnx" / "config.json").write_text("{}")
    (bert / "pytorch_model.bin").write_bytes(b"never read")
    local = encoder(bert)
    with hub("someone/cxr-bert", bert) as (address, fetched):
        at(address)
        named = encoder("someone/cxr-bert")
        assert sorted(fetched) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert torch.equal(named(**named.tokenise(TEXTS)), local(**local.tokenise(TEXTS)))
    # Without a connection, files that were downloaded are used.
    again = encoder("someone/cxr-bert")
    assert torch.equal(again(**again.tokenise(TEXTS)), local(**local.tokenise(TEXTS)))
    assert not mark.exists()


def test_no_connection_and_no_such_name_are_told_apart(
    bert: Path, at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    with hub("someone/else", bert) as (address, _):
        at(address)
        for name in ("someone/bert", "bert-bass-uncased", "not a name!"):
            with pytest.raises(CheckpointError, match=rf"{name}: neither a local folder nor a readable repository"):
                encoder(name)
        with pytest.raises(CheckpointError, match="someone/model: neither a local folder nor a readable repository"):
            load_model("someone/model")
        with pytest.raises(CheckpointError, match=r"someone/else: .*holds no model of this package"):
            load_model("someone/else")
    with pytest.raises(CheckpointError, match=r"cannot be reached .*refused"):
        encoder("someone/bert")
    with pytest.raises(CheckpointError, match=r"cannot be reached .*refused"):
        build_volume_encoder(SlicesConfig(pretrained="someone/vit"), SPEC)
    with pytest.raises(CheckpointError, match=r"cannot be reached .*refused"):
        load_model("someone/model")
    for name in ("folder/that/is/gone", "./gone", "/gone", "~/gone", "~nobody/gone"):
        with pytest.raises(CheckpointError, match="no such folder"):
            encoder(name)
        with pytest.raises(CheckpointError, match="no such model folder"):
            load_model(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        encoder("someone/bert")
    assert time.monotonic() - began < 10


def test_a_model_on_the_hub_is_a_folder(
    bert: Path, tmp_path: Path, at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if its name is that of a home folder (~) and, without a connection, if it was downloaded before."""
    save_model(tmp_path / "model", dual_encoder(bert).eval(), LABELS)
    expected = load_model(tmp_path / "model").model.encode_text(TEXTS)
    with hub("someone/model", tmp_path / "model") as (address, _):
        at(address)
        assert torch.equal(load_model("someone/model").model.encode_text(TEXTS), expected)
    assert torch.equal(load_model("someone/model").model.encode_text(TEXTS), expected)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").rename("~")
    assert torch.equal(load_model("~").model.encode_text(TEXTS), expected)


def test_a_hub_that_does_not_answer_is_not_waited_for(
    at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server, or a firewall that drops packets, gives no answer at all."""
    monkeypatch.setattr("ctclip.models.hub.PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(CheckpointError, match="cannot be reached"):
            encoder("someone/bert")
        assert time.monotonic() - began < 3
