"""Folders and hub names of strangers: half precision, code, weights of something else, damage. One line, or they work."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from fake_hub import hub
from families import FAMILIES, SIZES, family_folder, wordpiece
from safetensors.torch import load_file, save_file
from test_text_families import LABELS, SPEC, TEXTS, VOLUME, dual_encoder, train_one_step

from ctclip.config import ModelConfig, TextConfig
from ctclip.errors import CheckpointError, ConfigError
from ctclip.models.dual_encoder import build_model, build_volume_encoder
from ctclip.models.folder import load_model, save_model
from ctclip.models.huggingface import vision_model_of
from ctclip.models.sizes import measure
from ctclip.models.slices import SlicesConfig
from ctclip.models.text import TextEncoder, build_text_encoder, load_tokenizer

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 8}
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


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return family_folder("bert", tmp_path / "bert")


def encoder(folder: Path | str, **options: object) -> TextEncoder:
    return build_text_encoder(TextConfig(pretrained=str(folder), lora_rank=2, **options)).eval()


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def scan() -> torch.Tensor:
    return torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Half precision


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
    torch.manual_seed(0)
    VISION["vit"]().to(dtype).save_pretrained(tmp_path / "vit")
    volume = SlicesConfig(pretrained=str(tmp_path / "vit"), heads=2)
    text = TextConfig(pretrained=str(family_folder("bert", tmp_path / "bert")))
    model = build_model(ModelConfig(volume=volume, text=text, dim=8), SPEC)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    train_one_step(model)
    save_model(tmp_path / "model", model, LABELS)
    (tmp_path / "vit").rename(tmp_path / "gone")
    loaded = load_model(tmp_path / "model").model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.encode_volume(scan()), model.encode_volume(scan()))


# Code that comes with a checkpoint


def with_code(folder: Path, kind: str) -> Path:
    """``folder`` as a repository that brings its own architecture; its code leaves a mark where it is run."""
    mark = folder / "ran"
    for module in ("configuration_own", "modeling_own", "tokenization_own"):
        (folder / f"{module}.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n")
    own = {
        "AutoConfig": "configuration_own.Own", "AutoModel": "modeling_own.Own", "AutoTokenizer": ["tokenization_own.Own", None],
    }  # fmt: skip
    change(folder / "config.json", model_type=kind, auto_map=own, _attn_implementation="someone/kernels")
    change(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")
    return mark


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr("builtins.input", asked)


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


# Weights that do not fit


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_hidden_layers": 3}, "parameters are missing, for example encoder.layer.2"),
        ({"num_hidden_layers": 1}, "have no place in it, for example encoder.layer.1"),
        ({"hidden_size": 16}, "do not fit config.json"),
        ({"model_type": "gpt2"}, "another architecture"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1e.09 is more than any model known has"),
        ({"vocab_size": 10**12}, "GiB, this machine has"),
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


def test_a_pooler_may_be_missing_and_one_of_an_older_folder_is_left_out(bert: Path, tmp_path: Path) -> None:
    weights = bert / "model.safetensors"
    state = load_file(weights)
    pooler = {name: value for name, value in state.items() if "pooler" in name}
    assert pooler
    expected = encoder(bert)
    save_file({name: value for name, value in state.items() if name not in pooler}, weights, {"format": "pt"})
    text = encoder(bert)
    assert torch.equal(text(**text.tokenise(TEXTS)), expected(**expected.tokenise(TEXTS)))
    # Model folders of earlier versions hold it.
    model = dual_encoder(bert)
    save_model(tmp_path / "model", model, LABELS)
    weights = tmp_path / "model" / "model.safetensors"
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
        # All that is needed is in tokenizer.json, too.
        return
    with pytest.raises(CheckpointError, match=str(path.parent if content is None else path)) as error:
        load_model(tmp_path / "model")
    assert "\n" not in str(error.value)


# Tokenizers


@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_added_tokens_get_vectors_where_they_can_be_learned(name: str, tmp_path: Path) -> None:
    folder = family_folder(name, tmp_path / name)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["hydropneumothorax", "bronchiolitis"])
    tokenizer.save_pretrained(folder)
    texts = ["hydropneumothorax", "bronchiolitis", "The heart is enlarged."]
    model = dual_encoder(folder)
    train_one_step(model)
    save_model(tmp_path / "model", model, LABELS)
    expected = model.encode_text(texts)
    assert (expected[0] - expected[1]).abs().max() < 1e-4, "untrained, both are the mean of the others"
    assert torch.equal(load_model(tmp_path / "model").model.encode_text(texts), expected)
    for tuning in ("frozen", "lora"):
        with pytest.raises(CheckpointError, match=r"2 tokens that the .* no vectors for \('hydropneumothorax'"):
            encoder(folder, tuning=tuning)


def test_a_padding_token_that_was_added_needs_no_vector(tmp_path: Path) -> None:
    folder = family_folder("gpt2", tmp_path / "gpt2")
    before = encoder(folder, tuning="frozen")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    text = encoder(folder, tuning="frozen")
    assert torch.equal(text(**text.tokenise(TEXTS)), before(**before.tokenise(TEXTS)))


def test_a_tokenizer_without_a_fast_form_works(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "esm"
    letters = ["<cls>", "<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz.", "<mask>"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(letters))
    tokenizer = hf.EsmTokenizer(str(folder / "vocab.txt"))
    assert not tokenizer.is_fast
    hf.EsmModel(hf.EsmConfig(vocab_size=len(letters), pad_token_id=1, mask_token_id=31, max_position_embeddings=42, **SIZES)).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    model = dual_encoder(folder, pooling="cls")
    train_one_step(model)
    save_model(tmp_path / "model", model, LABELS)
    assert torch.equal(load_model(tmp_path / "model").model.encode_text(TEXTS), model.encode_text(TEXTS))


def test_a_tokenizer_whose_library_is_missing_is_named(bert: Path) -> None:
    change(bert / "tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer", word_tokenizer_type="mecab")
    (bert / "tokenizer.json").rename(bert / "vocab.txt")
    with pytest.raises(CheckpointError, match=r"no tokenizer could be loaded .*fugashi") as error:
        load_tokenizer(bert)
    assert "\n" not in str(error.value)


# Encoders that cannot serve


def _cannot_serve() -> list[tuple[str, Callable[[int], torch.nn.Module], str]]:
    bart = {f"{side}_{part}": number for side in ("encoder", "decoder") for part, number in
            (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    return [
        ("fnet", lambda n: hf.FNetModel(hf.FNetConfig(vocab_size=n, **SIZES)), "depend on the padding"),
        ("bart", lambda n: hf.BartModel(hf.BartConfig(vocab_size=n, d_model=32, **bart)), "an encoder with a decoder"),
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


# Slice encoders


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
    """A pooler that was never trained stands between no weights: the classifier's ViT pools by the mean."""
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
        (lambda: hf.ViTMAEModel(hf.ViTMAEConfig(**SMALL, **IMAGE)), "the same each time"),
        (lambda: hf.BertModel(hf.BertConfig(vocab_size=50, **SMALL)), "cannot serve as slice encoder"),
    ],
)
def test_what_cannot_see_slices_is_refused(build: Callable[[], torch.nn.Module], reason: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=reason) as error:
        build_volume_encoder(SlicesConfig(pretrained=str(tmp_path)), SPEC)
    assert "\n" not in str(error.value)


# Names of the hub


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
    # Without a connection what was fetched is there.
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
            with pytest.raises(CheckpointError, match=rf"{name}: neither a folder here nor a repository"):
                encoder(name)
    with pytest.raises(CheckpointError, match=r"cannot be reached .*refused"):
        encoder("someone/bert")
    with pytest.raises(CheckpointError, match=r"cannot be reached .*refused"):
        build_volume_encoder(SlicesConfig(pretrained="someone/vit"), SPEC)
    for name in ("folder/that/is/gone", "./gone", "/gone"):
        with pytest.raises(CheckpointError, match="no such folder"):
            encoder(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        encoder("someone/bert")
    assert time.monotonic() - began < 10


def test_a_hub_that_does_not_answer_is_not_waited_for(
    at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server, or a firewall that drops what it is sent, says nothing at all."""
    monkeypatch.setattr("ctclip.models.hub.PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(CheckpointError, match="cannot be reached"):
            encoder("someone/bert")
        assert time.monotonic() - began < 3


def test_reports_longer_than_the_positions_are_cut_where_they_end(tmp_path: Path) -> None:
    """RoBERTa's family counts positions from 2: 42 of them hold 40 tokens."""
    for name in ("roberta", "longformer"):
        text = encoder(family_folder(name, tmp_path / name))
        assert text.bert.config.max_position_embeddings == 42
        tokens = text.tokenise(["nodule " * 100])
        assert tokens["input_ids"].shape[1] == 40
        assert text(**tokens).isfinite().all()
