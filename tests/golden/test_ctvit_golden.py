"""Outputs of the published CT-CLIP, reproduced from its own checkpoint format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from ctclip.config import TextConfig
from ctclip.errors import CheckpointError
from ctclip.heads.folder import list_heads, load_head
from ctclip.inference.import_published import import_published
from ctclip.models.ctvit import CTViT
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import load_model
from ctclip.models.published import Published, read_published, to_model
from ctclip.objectives.clip import clip
from ctclip.preprocessing.spec import PreprocessingSpec


@pytest.fixture(scope="module")
def parity() -> Path:
    """The recorded outputs; data/README.md describes them."""
    return Path(__file__).parent / "data"


def spec_of(published: Published, slabs: int = 4) -> PreprocessingSpec:
    """The geometry of the recorded volumes: the number of slices, in SLABS slabs, cannot be derived from the
    weights."""
    side = published.plane
    return PreprocessingSpec(
        "test", (1.5, 0.75, 0.75), (published.volume.patch[0] * slabs, side, side), published_geometry=True
    )


def build(parity: Path, file: Path | None = None, **changes: Any) -> DualEncoder:
    published = read_published(file or parity / "checkpoint.pt")
    shape = json.loads((parity / "config.json").read_text())["bert"]
    assert all(shape[name] == value for name, value in published.bert.items()), "sizes are inferred from the tensors"
    published.volume = published.volume.model_copy(update=changes)
    bert = BertModel(BertConfig(**shape), add_pooling_layer=False)
    return to_model(published, bert, None, TextConfig(pooling="cls", max_tokens=32), spec_of(published))


@pytest.mark.parametrize("kind", ["plain", "checkpointed", pytest.param("compiled", marks=pytest.mark.integration)])
def test_every_recorded_output(parity: Path, kind: str) -> None:
    golden = load_file(parity / "golden.safetensors")
    model = build(parity, activation_checkpointing=kind == "checkpointed")
    encoder = model.volume_encoder
    close = lambda a, name: torch.testing.assert_close(a, golden[name], atol=1e-5, rtol=0)  # noqa: E731

    def every(volume: torch.Tensor) -> tuple[torch.Tensor, ...]:
        patches = encoder.patches(volume)
        encoded = encoder.encode(patches)
        return patches, encoded, *encoder.codebook(encoded)

    run = torch.compile(every) if kind == "compiled" else every
    with torch.set_grad_enabled(kind == "checkpointed"):
        patches, encoded, quantised, codes = run(golden["volume"])
        volumes = model.encode_volume(golden["volume"])
        texts = model.encode_text(input_ids=golden["input_ids"], attention_mask=golden["attention_mask"])
    close(patches, "patch_tokens")
    close(encoded, "encoded_tokens")
    assert torch.equal(codes, golden["codebook_ids"])
    close(quantised, "quantized_tokens")
    close(volumes, "image_latents")
    close(texts, "text_latents")
    close(model.logits(volumes, texts).diagonal(), "pair_logits")
    close(clip(volumes, texts, model.similarity.scale()).reshape(1), "contrastive_loss")


def test_any_batch_gives_the_same(parity: Path) -> None:
    golden = load_file(parity / "golden.safetensors")
    model = build(parity)
    three = torch.cat([golden["volume"], golden["volume"][:1]])
    with torch.no_grad():
        together, alone = model.encode_volume(three), model.encode_volume(golden["volume"][:1])
    torch.testing.assert_close(together[:2], golden["image_latents"], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, together[2:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("slabs", [1, 3, 6])
def test_any_number_of_slabs_fits_the_weights(parity: Path, slabs: int) -> None:
    """Before the layers that look along slabs nothing of a slab depends on how many there are, but for the convolution
    that reaches two slabs back: whatever follows, the first slabs give the recorded patches and the same tokens."""
    golden, encoder = load_file(parity / "golden.safetensors"), build(parity).volume_encoder
    depth = encoder.config.patch[0]
    volume = golden["volume"].repeat(1, 1, 2, 1, 1)[:, :, : slabs * depth]
    with torch.no_grad():
        encoded = encoder(volume)
        patches = encoder.patches(volume)
        encoder.temporal = torch.nn.ModuleList()
        spatial, whole = encoder.encode(patches), encoder.encode(golden["patch_tokens"])
    assert encoded.grid == (slabs, 4, 4)
    assert encoded.pooled.shape == (2, encoder.width)
    assert encoded.pooled.isfinite().all()
    shared = min(slabs, 4)
    torch.testing.assert_close(patches[:, :shared], golden["patch_tokens"][:, :shared], atol=1e-5, rtol=0)
    torch.testing.assert_close(spatial[:, :shared], whole[:, :shared], atol=1e-5, rtol=0)
    if slabs < 4:
        assert not torch.allclose(encoded.tokens, golden["quantized_tokens"][:, :slabs].flatten(1, 3))
    with pytest.raises(ValueError, match="any multiple of 5 slices, found"):
        encoder(volume[:, :, 1:])


def test_it_trains_with_the_quantiser_off(parity: Path) -> None:
    published = read_published(parity / "checkpoint.pt")
    model = CTViT(published.volume.model_copy(update={"quantise": False}), spec_of(published)).train()
    prefix = "volume_encoder."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in published.state.items() if k.startswith(prefix) and "codebook" not in k})  # fmt: skip
    golden = load_file(parity / "golden.safetensors")
    found = model(golden["volume"])
    torch.testing.assert_close(found.tokens, golden["encoded_tokens"].flatten(1, 3), atol=1e-5, rtol=0)
    found.pooled.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_it_trains_with_the_quantiser_on(parity: Path) -> None:
    model = build(parity).train()
    codebook, volume = model.volume_encoder.codebook, load_file(parity / "golden.safetensors")["volume"]
    before = codebook.rows.clone()
    found = model.volume_encoder(volume)
    found.pooled.sum().backward()
    assert model.volume_encoder.spatial[0].to_query.weight.grad.abs().sum() > 0
    assert torch.equal(before, codebook.rows)
    # Row by row, by the published decay: only the rows that were used.
    model.volume_encoder.end_step()
    tokens = model.volume_encoder.encode(model.volume_encoder.patches(volume))
    codes = torch.nn.functional.normalize(tokens, dim=-1) @ torch.nn.functional.normalize(before, dim=-1).T
    codes = codes.argmax(dim=-1).flatten()
    for code, (row, moved) in enumerate(zip(before, codebook.rows, strict=True)):
        members = torch.nn.functional.normalize(tokens.flatten(0, 3)[codes == code], dim=-1)
        if len(members):
            mean = torch.nn.functional.normalize(members.sum(dim=0), dim=0)
            row = torch.nn.functional.normalize(0.8 * row + 0.2 * mean, dim=0)
        torch.testing.assert_close(moved, row, atol=1e-5, rtol=0)


def variants(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    buffers = {
        f"text_transformer.embeddings.{name}": torch.arange(32)[None] for name in ("position_ids", "token_type_ids")
    }
    head = {"classifier.weight": torch.zeros(18, 24), "classifier.bias": torch.zeros(18)}
    return {
        "stray buffers": state | buffers,
        "wrapped": {f"module.{key}": value for key, value in state.items()},
        "wrapped twice": {f"model.module.{key}": value for key, value in state.items()},
        "wrapped, with optimizer": {"model": {f"module.{key}": v for key, v in state.items()}, "optim": {"step": 3}},
        "with optimizer": {"model": state, "optim": {"state": {}}},
        "LiPro": {f"trained_model.{key}": value for key, value in state.items()} | head,
    }


def test_checkpoints_as_they_circulate(parity: Path, tmp_path: Path) -> None:
    golden = load_file(parity / "golden.safetensors")
    state = torch.load(parity / "checkpoint.pt", weights_only=True)
    for name, content in variants(state).items():
        torch.save(content, tmp_path / "c.pt")
        with torch.no_grad():
            found = build(parity, tmp_path / "c.pt").encode_volume(golden["volume"])
        torch.testing.assert_close(found, golden["image_latents"], atol=1e-5, rtol=0, msg=name)


def test_bfloat16_leaves_no_trace(parity: Path) -> None:
    """The position bias that an encoding under autocast keeps for the next one is exact."""
    golden, encoder = load_file(parity / "golden.safetensors"), build(parity).volume_encoder
    patches = golden["patch_tokens"]
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            encoder.encode(patches)
        torch.testing.assert_close(encoder.encode(patches), golden["encoded_tokens"], atol=1e-5, rtol=0)


def test_sizes_of_a_patch_come_from_the_tensors(parity: Path, tmp_path: Path) -> None:
    """Patches of 3 x 10 x 10 are distinguished from those of 5 x 10 x 10; without any information 2 : 1 is assumed."""
    state = torch.load(parity / "checkpoint.pt", weights_only=True)
    first = {key for key in state if "first_frame" in key}
    flat = {key: value for key, value in state.items() if ".to_patch_emb." in key and 500 in value.shape}
    flat = {key: value[..., :300].clone() for key, value in flat.items()}
    found = {}
    for name, content in {
        "as it is": state,
        "flat": state | flat,
        "stripped": {key: value for key, value in state.items() if key not in first},
    }.items():
        torch.save(content, tmp_path / "c.pt")
        found[name] = read_published(tmp_path / "c.pt").volume.patch
    assert found == {"as it is": (5, 10, 10), "flat": (3, 10, 10), "stripped": (5, 10, 10)}
    torch.save(state | {key: value[..., :250].clone() for key, value in flat.items()}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="to_patch_emb is missing or has an unexpected shape"):
        read_published(tmp_path / "c.pt")


LAYER = "visual_transformer.enc_spatial_transformer.layers.{}.1.q_scale"


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("temperature", "temperature", torch.zeros(2)),
        ("visual_transformer.vq._codebook.embed", "visual_transformer.vq._codebook.embed", torch.zeros(())),
        ("to_visual_latent.weight", "to_visual_latent.weight", torch.zeros(3)),
        (LAYER.format(0), LAYER.format(10**11), torch.zeros(24)),
        (LAYER.format(0), LAYER.format("²"), torch.zeros(24)),
    ],
)  # fmt: skip
def test_a_weight_of_another_shape_or_name_is_named(
    key: str, name: str, value: torch.Tensor, parity: Path, tmp_path: Path
) -> None:
    state = torch.load(parity / "checkpoint.pt", weights_only=True)
    assert state.pop(key) is not None
    torch.save(state | {name: value}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt: .*(is missing or has an unexpected shape|are unknown)") as error:
        read_published(tmp_path / "c.pt")
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_is_named_whatever_its_reader_raises(tmp_path: Path) -> None:
    """In the older format of torch: struct.error, IndexError, AssertionError and others."""
    path = tmp_path / "c.pt"
    torch.save({"a": torch.zeros(30), "b": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        for damaged in (content[:at], content[:at] + b"9" + content[at + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=r"c\.pt: ") as error:
                read_published(path)
            assert "\n" not in str(error.value)


def test_the_command_makes_a_folder_that_loads(parity: Path, tmp_path: Path) -> None:
    """With a tokenizer made here for the checkpoint's size: the small checkpoint has 120 words."""
    text = tmp_path / "text"
    text.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(115))]
    (text / "vocab.txt").write_text("\n".join(words))
    (text / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    shape = json.loads((parity / "config.json").read_text())["bert"]
    (text / "config.json").write_text(json.dumps({"model_type": "bert", **shape}))
    import_published(parity / "checkpoint.pt", tmp_path / "model", str(text))
    loaded = load_model(tmp_path / "model")
    golden = load_file(parity / "golden.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.model.encode_volume(golden["volume"]), golden["image_latents"], atol=1e-5, rtol=0
        )
    assert loaded.spec.published_geometry
    (text / "config.json").write_text(json.dumps({"model_type": "bert", **shape, "hidden_size": 64}))
    with pytest.raises(CheckpointError, match="hidden_size 64, the checkpoint has 32"):
        import_published(parity / "checkpoint.pt", tmp_path / "again", str(text))


def test_vocabfine_detects_as_published(parity: Path, tmp_path: Path) -> None:
    """CT_VocabFine_v2.pt is the state of the whole model after tuning on the prompts."""
    from ctclip.heads.prompts import PromptHead
    from ctclip.prompts import load_prompts

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "emphysema", "nodule", "is", "not", "present", "."]
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *(f"w{i}" for i in range(120 - len(words)))]))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    shape = json.loads((parity / "config.json").read_text())["bert"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", **shape}))
    state = torch.load(parity / "checkpoint.pt", weights_only=True)
    state["to_text_latent.weight"] = state["to_text_latent.weight"].flip(0)  # tuned: different from the initial value
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "CT_VocabFine_v2.pt")
    import_published(tmp_path / "CT_VocabFine_v2.pt", tmp_path / "model", str(tmp_path))
    model = load_model(tmp_path / "model").model
    volume, latents = (load_file(parity / "golden.safetensors")[name] for name in ("volume", "image_latents"))
    names = ["emphysema", "nodule"]
    head = PromptHead(model, load_prompts("published"), names)
    with torch.no_grad():
        found = head.probabilities(head.score(model.encode(volume)))

    # Step by step, with Hugging Face's BERT.
    bert, prefix = BertModel(BertConfig(**shape), add_pooling_layer=False).eval(), "text_transformer."
    bert.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, strict=False)
    for column, name in enumerate(names):
        pair = []
        for said in (f"[CLS] {name} is present . [SEP]", f"[CLS] {name} is not present . [SEP]"):
            with torch.no_grad():
                read = bert(torch.tensor([[words.index(word) for word in said.split()]])).last_hidden_state[:, 0]
            pair.append(torch.nn.functional.normalize(read @ state["to_text_latent.weight"].T, dim=-1))
        logits = state["temperature"].exp() * latents @ torch.cat(pair).T
        torch.testing.assert_close(found[:, column], logits.softmax(dim=1)[:, 0], atol=1e-5, rtol=0)


def test_the_linear_head_and_a_configuration_by_itself(
    parity: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(115))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    shape = json.loads((parity / "config.json").read_text())["bert"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "bert", **shape}))
    state = torch.load(parity / "checkpoint.pt", weights_only=True)
    head = {"classifier.weight": torch.randn(18, 24), "classifier.bias": torch.randn(18)}
    torch.save({f"trained_model.{key}": value for key, value in state.items()} | head, tmp_path / "lipro.pt")
    # Files of the working directory with the same names as the spec and prompts of the published model.
    monkeypatch.chdir(tmp_path)
    for name in ("ct_clip", "published"):
        Path(f"{name}.yaml").write_text("mine: true\n")
    import_published(tmp_path / "lipro.pt", tmp_path / "model", None, text_config=config)
    loaded = load_model(tmp_path / "model")
    facts = {one.name: one.supervision for one in list_heads(loaded.path)}
    assert facts == {"prompts": "none", "linear": "label-supervised"}
    linear = load_head(loaded.path, "linear", loaded.model)
    assert linear.names == loaded.labels.names
    golden = load_file(parity / "golden.safetensors")
    expected = torch.nn.functional.linear(golden["image_latents"].relu(), *head.values()).sigmoid()
    with torch.no_grad():
        probabilities = linear.probabilities(linear.score(loaded.model.encode(golden["volume"])))
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0)
    import_published(parity / "checkpoint.pt", tmp_path / "plain", None, text_config=config)
    plain = load_model(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"no head 'linear' \(it has: prompts\)"):
        load_head(plain.path, "linear", plain.model)
    with pytest.raises(CheckpointError, match="--text-encoder"):
        import_published(parity / "checkpoint.pt", tmp_path / "none", None)


def test_what_is_no_checkpoint_is_said_in_one_line(parity: Path, tmp_path: Path) -> None:
    state = torch.load(parity / "checkpoint.pt", weights_only=True)
    torch.save(state | {"mystery.weight": torch.zeros(2)}, tmp_path / "strange.pt")
    with pytest.raises(CheckpointError, match=r"mystery\.weight.*--ignore"):
        read_published(tmp_path / "strange.pt")
    assert read_published(tmp_path / "strange.pt", ignore=["mystery.weight"]).dim == 24
    torch.save(state | {f"decoder.{i}": torch.zeros(2) for i in range(12)}, tmp_path / "strange.pt")
    with pytest.raises(CheckpointError, match=r"12 keys .*decoder\.0, .*decoder\.11; ") as refused:
        read_published(tmp_path / "strange.pt")
    assert "\n" not in str(refused.value)
    assert read_published(tmp_path / "strange.pt", ignore=["decoder.*"]).dim == 24
    null = next(key for key in state if key.endswith("null_kv"))
    torch.save(state | {null: torch.ones(2, 2, 1, 8)}, tmp_path / "other_model.pt")
    with pytest.raises(CheckpointError, match="null_kv"):
        read_published(tmp_path / "other_model.pt")
    (tmp_path / "text.pt").write_bytes(b"not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "code.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    # The file that the published fine-tuning script leaves in place of its last model.
    torch.save(torch.optim.AdamW([torch.zeros(2, requires_grad=True)]).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: holds the state of an optimizer"):
        read_published(tmp_path / "optimizer.pt")
    for name in ("text.pt", "other.pt", "code.pt", "absent.pt"):
        with pytest.raises(CheckpointError, match=name) as refused:
            read_published(tmp_path / name)
        assert "\n" not in str(refused.value)
