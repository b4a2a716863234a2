"""A language model whose answers are always valid JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ctclip.errors import CheckpointError, ConfigError
from ctclip.labels import load_labels
from ctclip.report_reading import language_model
from ctclip.report_reading.answers import Answers
from ctclip.report_reading.json_decoding import Choices, OnlyValid, Vocabulary, object_of
from ctclip.report_reading.language_model import LanguageModelReader
from ctclip.report_reading.reader import Options, Reading, Statement, Status
from tests.unit.report_reading.tiny_models import causal_model, tokenizer

LABELS = load_labels({"name": "two", "labels": ["Lung nodule", {"name": "Pleural effusion", "aliases": ["Effusion"]}]})
TEXTS = ["A nodule is seen in the left lung.", "No pleural effusion. The heart is large. Emphysema.", "Nodules."]
FIELDS = [(name, [("status", [s.value for s in Status]), ("sentence", list(range(13)))]) for name in LABELS.names]


def schema_holds(answer: dict[str, dict[str, object]], sentences: int) -> bool:
    return list(answer) == list(LABELS.names) and all(
        list(said) == ["status", "sentence"]
        and said["status"] in [status.value for status in Status]
        and said["sentence"] in range(sentences + 1)
        for said in answer.values()
    )


@pytest.mark.parametrize("seed", range(30))
def test_any_scores_write_valid_json(seed: int) -> None:
    """Random scores, and scores that favour nonsense: the output is always an answer of the schema, and ends."""
    words = tokenizer(size=280 + 40 * (seed % 6))
    vocabulary, choices = Vocabulary(words), object_of(FIELDS)
    random = torch.Generator().manual_seed(seed)
    rows = torch.zeros(2, 1, dtype=torch.long)
    processor = OnlyValid(vocabulary, [choices, choices], 1)
    for _ in range(400):
        scores = torch.randn(2, len(words), generator=random) * 10
        scores[:, 7] = 1e4
        if seed % 3 == 0:
            scores[0] = float("nan")
        chosen = processor(rows, scores).argmax(dim=1)
        rows = torch.cat([rows, chosen[:, None]], dim=1)
        if (chosen == vocabulary.end).all():
            break
    for row in rows[:, 1:].tolist():
        assert vocabulary.end in row
        assert schema_holds(json.loads(words.decode(row, skip_special_tokens=True)), 12)


def test_numbers_that_begin_alike_can_all_be_written() -> None:
    words = tokenizer()
    vocabulary, choices = Vocabulary(words), Choices([["n"], ["1", "12", "123"], ["}"]])
    for text in ("n1}", "n12}", "n123}"):
        states = choices.start()
        for character in text:
            allowed = {vocabulary.texts[token][:1] for token in vocabulary.allowed(choices, states)}
            assert character in allowed
            states = choices.advance(states, character)
        assert choices.ended(states)
    assert not choices.advance(choices.start(), "n2")


def test_the_models_preference_decides_where_there_is_a_choice() -> None:
    words = tokenizer()
    vocabulary = Vocabulary(words)
    choices = Choices([['"'], ["absent", "present"], ['"']])
    rows = torch.zeros(1, 1, dtype=torch.long)
    processor = OnlyValid(vocabulary, [choices], 1)
    for _ in range(20):
        scores = torch.zeros(1, len(words))
        for text, token in vocabulary.tokens.items():
            scores[0, token] = 5.0 if text.startswith("p") else 0.0
        rows = torch.cat([rows, processor(rows, scores).argmax(dim=1)[:, None]], dim=1)
        if rows[0, -1] == vocabulary.end:
            break
    assert words.decode(rows[0, 1:], skip_special_tokens=True) == '"present"'


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_random_model_answers_in_the_schema_one_at_a_time_and_in_batches(kind: str, tmp_path: Path) -> None:
    folder = causal_model(tmp_path / "model", kind=kind)
    read = [LanguageModelReader.build(LABELS, Options(model=folder, batch=batch)).read(TEXTS) for batch in (1, 3)]
    assert read[0] == read[1], "what is beside a report in a batch changes nothing"
    for text, reading in zip(TEXTS, read[0], strict=True):
        assert set(reading) <= set(LABELS.names)
        for statement in reading.values():
            assert statement.sentence in ("", *(f"{part}." for part in text.rstrip(".").split(". ")))


def test_answers_are_kept_and_a_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = causal_model(tmp_path / "model")
    options = Options(model=folder, batch=1, cache=tmp_path / "answers")
    reader = LanguageModelReader.build(LABELS, options)
    asked: list[str] = []
    ask = reader._ask

    def ask_twice(parts: list[list[str]]) -> list[Reading]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(parts[0][0])
        return ask(parts)

    monkeypatch.setattr(reader, "_ask", ask_twice)
    with pytest.raises(KeyboardInterrupt):
        reader.read(TEXTS)
    (kept,) = (tmp_path / "answers").iterdir()
    # Killed in the middle of writing a line.
    kept.write_text(kept.read_text() + '{"text": "cut o')
    again = LanguageModelReader.build(LABELS, options)
    resumed: list[str] = []
    monkeypatch.setattr(again, "_ask", lambda parts: (resumed.append(parts[0][0]), ask(parts))[1])
    result = again.read(TEXTS)
    assert resumed == ["Nodules."]
    assert result == LanguageModelReader.build(LABELS, Options(model=folder)).read(TEXTS)
    third = LanguageModelReader.build(LABELS, options)
    monkeypatch.setattr(third, "_ask", lambda parts: pytest.fail("all answers are kept"))
    assert third.read(TEXTS) == result


def test_answers_of_another_reader_are_not_taken(tmp_path: Path) -> None:
    reading = {"Lung nodule": Statement(Status.present, "A nodule.")}
    Answers(tmp_path, "one").add(["text"], [reading])
    assert Answers(tmp_path, "one").get("text") == reading
    assert Answers(tmp_path, "other").get("text") is None
    assert Answers(tmp_path, "one").get("another text") is None


def test_a_report_of_5000_words_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = LanguageModelReader.build(LABELS, Options(model=causal_model(tmp_path / "m", context=2600)))
    parts: list[list[str]] = []

    def answer(several: list[list[str]]) -> list[Reading]:
        parts.extend(several)
        return [
            {"Lung nodule": Statement(Status.present if "Here." in part else Status.absent, part[0])}
            for part in several
        ]

    monkeypatch.setattr(reader, "_ask", answer)
    text = "No nodule is seen. " * 300 + "Here. " + "No nodule is seen. " * 300 + "word " * 1200
    assert reader.read([text])[0]["Lung nodule"].status is Status.present
    assert len(parts) > 5
    assert all(reader._room(reader._length(part)) >= 0 for part in parts)
    assert " ".join(word for part in parts for piece in part for word in piece.split()) == " ".join(text.split())


def cut_short(folder: Path) -> Path:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def test_folders_that_cannot_read_are_refused_in_one_line(tmp_path: Path) -> None:
    cases = [
        (None, ConfigError, "needs --reader-model"),
        (tmp_path, CheckpointError, "no config.json"),
        (causal_model(tmp_path / "plain", template=None), CheckpointError, "has no chat template"),
        (cut_short(causal_model(tmp_path / "cut")), CheckpointError, "cannot be read as a causal language model"),
        (causal_model(tmp_path / "short", context=128), CheckpointError, "its context of 128 tokens leaves no room"),
    ]
    for folder, error, message in cases:
        with pytest.raises(error, match=message) as refused:
            LanguageModelReader.build(LABELS, Options(model=folder))
        assert "\n" not in str(refused.value)


def test_the_prompt_has_labels_aliases_and_numbered_sentences(tmp_path: Path) -> None:
    reader = LanguageModelReader.build(LABELS, Options(model=causal_model(tmp_path / "m")))
    prompt = reader._prompt(["One.", "Two."])
    assert "Labels: Lung nodule; Pleural effusion / Effusion" in prompt
    assert prompt.endswith("1. One.\n2. Two.<|assistant|>")
    assert language_model.INSTRUCTION in prompt
