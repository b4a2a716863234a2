"""Text classifiers: of Transformers, and CT-CLIP's own checkpoint; probabilities compared with an independent
computation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaModel,
)

from ctclip.errors import CheckpointError, ConfigError
from ctclip.labels import load_labels
from ctclip.report_reading.classifier import ClassifierReader
from ctclip.report_reading.reader import Options, Status
from tests.unit.report_reading.tiny_models import tokenizer

LABELS = load_labels({"name": "two", "labels": ["Lung nodule", {"name": "Pleural effusion", "aliases": ["effusion"]}]})
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXTS = ["A nodule is seen in the left lung.", "No pleural effusion is observed. Nodules.", ""]


def folder_of(path: Path, names: dict[int, str], places: int = 64) -> Path:
    words = tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        id2label=names,
        max_position_embeddings=places,
        num_labels=len(names),
        pad_token_id=1,
        **SMALL,
    )
    model = BertForSequenceClassification(config)
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.6)
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def test_outputs_are_found_by_name_and_alias_in_any_order(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", {0: "Effusion", 1: "something else", 2: "lung nodule"})
    read = ClassifierReader.build(LABELS, Options(model=folder, batch=2)).read(TEXTS)
    model, words = AutoModelForSequenceClassification.from_pretrained(folder), tokenizer()
    for text, reading in zip(TEXTS[:2], read, strict=False):
        wanted = model.eval()(**{k: v for k, v in words(text, return_tensors="pt").items() if k != "token_type_ids"})
        probabilities = wanted.logits[0].sigmoid().tolist()
        for name, column in (("Pleural effusion", 0), ("Lung nodule", 2)):
            assert reading[name].probability == pytest.approx(probabilities[column], abs=1e-3)
            assert (reading[name].status is Status.present) == (probabilities[column] >= 0.5)
    assert read[2] == {}, "an empty report says nothing"


class RadBertClassifier(nn.Module):
    """The module of CT-CLIP's text_classifier: a body, and a linear map of its pooled output."""

    def __init__(self, config: RobertaConfig, outputs: int) -> None:
        super().__init__()
        self.model = RobertaModel(config)
        self.classifier = nn.Linear(config.hidden_size, outputs)


def published_folder(path: Path, outputs: int = 2) -> tuple[Path, RadBertClassifier]:
    words = tokenizer()
    config = RobertaConfig(
        vocab_size=len(words), max_position_embeddings=40, type_vocab_size=1, pad_token_id=1, **SMALL
    )
    torch.manual_seed(1)
    module = RadBertClassifier(config, outputs).eval()
    for weights in module.parameters():
        nn.init.normal_(weights, std=0.6)
    config.save_pretrained(path)
    words.save_pretrained(path)
    # As saved, with or without DataParallel, with the buffer of older versions.
    state = {f"module.{key}": value for key, value in module.state_dict().items()}
    state["module.model.embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, path / "RadBertClassifier.pth")
    return path, module


def test_the_published_checkpoint_gives_its_own_probabilities(tmp_path: Path) -> None:
    folder, module = published_folder(tmp_path / "radbert")
    read = ClassifierReader.build(LABELS, Options(model=folder)).read(TEXTS[:2])
    words = tokenizer()
    for text, reading in zip(TEXTS, read, strict=False):
        inputs = words(text, return_tensors="pt")
        pooled = module.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        wanted = module.classifier(pooled)[0].sigmoid().tolist()
        assert [reading[name].probability for name in LABELS.names] == pytest.approx(wanted, abs=1e-3)


def test_a_report_of_5000_words_is_read_in_parts_and_the_highest_counts(tmp_path: Path) -> None:
    folder, _ = published_folder(tmp_path / "radbert")
    reader = ClassifierReader.build(LABELS, Options(model=folder, batch=64))
    # Positions 0 and 1 are reserved by RoBERTa.
    assert reader.longest == 38
    sentences = ["A nodule is seen in the left lung.", "No pleural effusion is observed.", "Lungs are large."]
    text = " ".join(sentences * 400)
    assert len(text.split()) > 5000
    parts = reader._parts(text)
    assert all(reader._length(part) <= 38 for part in parts)
    assert " ".join(parts) == text
    best = reader._probabilities(parts).max(dim=0).values.tolist()
    reading = reader.read([text])[0]
    assert [reading[name].probability for name in LABELS.names] == pytest.approx(best, abs=1e-3)


def test_the_sentence_is_the_one_the_model_finds_likeliest(tmp_path: Path) -> None:
    folder, _ = published_folder(tmp_path / "radbert")
    reader = ClassifierReader.build(LABELS, Options(model=folder, threshold=0.0))
    assert reader.read(["."])[0]["Lung nodule"].sentence == ".", "a report without a sentence"
    reading = reader.read([TEXTS[1]])[0]
    parts = ["No pleural effusion is observed.", "Nodules."]
    scores = reader._probabilities(parts)
    for column, name in enumerate(LABELS.names):
        assert reading[name].sentence == parts[int(scores[:, column].argmax())]


def damaged(folder: Path, name: str, damage: Callable[[bytes], bytes]) -> Path:
    folder_of(folder, {0: "effusion", 1: "lung nodule"})
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    return folder


def test_what_is_no_classifier_of_these_labels_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other, _ = published_folder(tmp_path / "three", outputs=3)
    pickled, _ = published_folder(tmp_path / "pickled")
    torch.save({"model": RadBertClassifier}, pickled / "RadBertClassifier.pth")
    bare, _ = published_folder(tmp_path / "bare")
    torch.save({"weights": torch.zeros(2)}, bare / "RadBertClassifier.pth")
    cases = [
        (None, ConfigError, "needs --reader-model"),
        (tmp_path / "empty", CheckpointError, "no config.json"),
        (folder_of(tmp_path / "names", {0: "a", 1: "effusion"}), CheckpointError, "no output for 'Lung nodule'"),
        (other, CheckpointError, "has 3 outputs, the label set 'two' 2 labels"),
        (pickled, CheckpointError, "cannot be read as weights"),
        (
            damaged(tmp_path / "cut", "model.safetensors", lambda whole: whole[:-100]),
            CheckpointError,
            "cannot be read as a classifier",
        ),
        (
            damaged(tmp_path / "words", "tokenizer.json", lambda whole: b"[]"),
            CheckpointError,
            "cannot be read as a classifier",
        ),
        (
            damaged(tmp_path / "names2", "config.json", lambda whole: whole.replace(b'"0"', b'"9"')),
            CheckpointError,
            "cannot be read as a classifier",
        ),
        (bare, CheckpointError, "is not CT-CLIP's classifier|so it is not CT-CLIP's classifier"),
    ]
    for folder, error, message in cases:
        with pytest.raises(error, match=message) as refused:
            ClassifierReader.build(LABELS, Options(model=folder))
        assert "\n" not in str(refused.value)
    (tmp_path / "names" / "config.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"config\.json: expected an object"):
        ClassifierReader.build(LABELS, Options(model=tmp_path / "names"))
