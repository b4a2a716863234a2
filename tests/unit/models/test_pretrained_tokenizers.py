"""Tokenizers of pretrained folders: tokens added, without a fast form, without their library, and texts too long for the encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from ctclip.errors import CheckpointError
from ctclip.models.folder import load_model, save_model
from ctclip.models.text import load_tokenizer, train_tokenizer
from tests.unit.models.families import SIZES, family_folder
from tests.unit.models.pretrained import LABELS, TEXTS, change, dual_encoder, encoder, train_one_step


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
        with pytest.raises(CheckpointError, match=r"2 tokens that the .* no embeddings for \('hydropneumothorax'"):
            encoder(folder, tuning=tuning)


def test_a_padding_token_that_was_added_needs_no_vector(tmp_path: Path) -> None:
    folder = family_folder("gpt2", tmp_path / "gpt2")
    before = encoder(folder, tuning="frozen")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    text = encoder(folder, tuning="frozen")
    assert torch.equal(text(**text.tokenise(TEXTS)), before(**before.tokenise(TEXTS)))


def test_a_damaged_tokenizer_is_told_when_it_is_loaded(tmp_path: Path) -> None:
    model = dual_encoder(family_folder("bert", tmp_path / "bert"))
    save_model(tmp_path / "model", model, LABELS)
    path = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"model_max_length": [None]}))
    with pytest.raises(CheckpointError, match="tokenizer: no tokenizer could be loaded"):
        load_model(tmp_path / "model")
    # A token without a vector in the encoder would cause an index error at the first text that contains it.
    path.write_text(json.dumps(whole | {"sep_token": "another"}))
    with pytest.raises(CheckpointError, match=r"text_config\.json: knows \d+ tokens, but the tokenizer beside it"):
        load_model(tmp_path / "model")


def test_a_tokenizer_that_makes_its_library_panic_is_told(tmp_path: Path) -> None:
    """A panic of code in Rust is no Exception of Python."""
    train_tokenizer(TEXTS * 20, 200).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["post_processor"]["single"][0]["SpecialToken"]["id"] = "another"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(
        CheckpointError, match=r"no tokenizer could be loaded \(no entry found for key\)\. Put tokenizer"
    ):
        load_tokenizer(tmp_path)


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


def test_reports_longer_than_the_positions_are_cut_where_they_end(tmp_path: Path) -> None:
    """RoBERTa's family counts positions from 2: 42 positions hold 40 tokens."""
    for name in ("roberta", "longformer"):
        text = encoder(family_folder(name, tmp_path / name))
        assert text.bert.config.max_position_embeddings == 42
        tokens = text.tokenise(["nodule " * 100])
        assert tokens["input_ids"].shape[1] == 40
        assert text(**tokens).isfinite().all()
