"""Labels by a language model: any causal model of Transformers in a local folder that has a chat template.

The model is shown the report as numbered sentences and answers in JSON with the status of each label and the number of
the sentence that states it. The schema is enforced during decoding (``json_decoding.py``). Nothing leaves the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ctclip.errors import CheckpointError, ConfigError
from ctclip.labels import LabelSet
from ctclip.models.huggingface import one_line_errors
from ctclip.report_reading.answers import Answers
from ctclip.report_reading.classifier import REMEDY
from ctclip.report_reading.json_decoding import Choices, OnlyValid, Vocabulary, most_tokens, object_of
from ctclip.report_reading.reader import NOTHING, Options, Reader, Reading, Statement, Status, strongest
from ctclip.sentences import sentences

INSTRUCTION = """You read radiology reports. For each label, give its status in the report:
"present": the report states that the finding is there; "absent": it states that it is not there, or is normal;
"uncertain": it states that it is possible or cannot be excluded; "not mentioned": it does not mention it.
Findings of earlier examinations that have resolved are absent. Give the number of the sentence that states the status, 0
if there is none. Answer in JSON and nothing else."""
STATUS, SENTENCE = "status", "sentence"
# Minimum number of tokens for each part of a report.
ROOM = 64


class LanguageModelReader(Reader):
    """Asks a local model. Reports too long for its context are read in parts; the strongest statement counts."""

    def __init__(self, model: Any, tokenizer: Any, labels: LabelSet, options: Options, name: str) -> None:
        """Raises CheckpointError for a tokenizer without a chat template, or a model with too short a context."""
        if not getattr(tokenizer, "chat_template", None):
            raise CheckpointError(
                f"{name}: has no chat template, so it does not follow instructions; use a model with a chat_template"
            )
        self.model, self.tokenizer, self.labels, self.options = model, tokenizer, labels, options
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.vocabulary = Vocabulary(tokenizer)
        self.name = name
        self.context = int(
            getattr(model.config, "max_position_embeddings", 0) or getattr(model.config, "n_positions", 2048)
        )
        self.answers = Answers(options.cache, self.identity)
        if self._room(self._length([])) < ROOM:
            raise CheckpointError(
                f"{name}: its context of {self.context} tokens leaves no room for a report with {len(labels.names)} labels"
            )

    @classmethod
    def build(cls, labels: LabelSet, options: Options) -> LanguageModelReader:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = options.model
        if folder is None:
            raise ConfigError(
                "the reader 'language-model' needs --reader-model: a local folder of a causal language model"
            )
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; --reader-model takes a local model folder")
        with one_line_errors(folder, "cannot be read as a causal language model", REMEDY):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype="auto"
            )
            return cls(
                model.to(options.device).eval(),
                tokenizer,
                labels,
                options,
                f"{folder.resolve().name} {_digest(folder)}",
            )

    @property
    def identity(self) -> str:
        asked = hashlib.sha256("\n".join([INSTRUCTION, *self._names()]).encode()).hexdigest()[:8]
        return f"language model: {self.name}, instruction {asked}"

    def read(self, texts: Sequence[str]) -> list[Reading]:
        parts = {text: self._parts(text) for text in texts if text and self.answers.get(text) is None}
        waiting = [(text, part) for text, several in parts.items() for part in several]
        stated: dict[str, list[Reading]] = {text: [] for text in parts}
        for start in range(0, len(waiting), self.options.batch):
            batch = waiting[start : start + self.options.batch]
            for (text, _), reading in zip(batch, self._ask([part for _, part in batch]), strict=True):
                stated[text].append(reading)
            done = [text for text, readings in stated.items() if len(readings) == len(parts[text])]
            self.answers.add(done, [_joined(stated.pop(text)) for text in done])
        return [self.answers.get(text) or {} for text in texts]

    @torch.inference_mode()
    def _ask(self, parts: Sequence[list[str]]) -> list[Reading]:
        """The model's answer for each list of sentences."""
        prompts = [self._prompt(part) for part in parts]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(
            self.model.device
        )
        length = inputs["input_ids"].shape[1]
        choices = [self._choices(len(part)) for part in parts]
        written = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            logits_processor=[OnlyValid(self.vocabulary, choices, length)],
            max_new_tokens=max(most_tokens(self.vocabulary, one) for one in choices),
            do_sample=False,
            num_beams=1,
            eos_token_id=self.vocabulary.end,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        answers = ["".join(self.vocabulary.texts[token] for token in row) for row in written[:, length:].tolist()]
        return [_reading(json.loads(answer), part) for answer, part in zip(answers, parts, strict=True)]

    def _choices(self, count: int) -> Choices:
        """The schema of an answer about ``count`` sentences."""
        inner: list[tuple[str, Sequence[Any]]] = [
            (STATUS, [status.value for status in Status]), (SENTENCE, list(range(count + 1))),
        ]  # fmt: skip
        return object_of([(name, inner) for name in self.labels.names])

    def _prompt(self, part: Sequence[str]) -> str:
        report = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(part, start=1))
        messages = [
            {"role": "user", "content": f"{INSTRUCTION}\n\nLabels: {'; '.join(self._names())}\n\nReport:\n{report}"}
        ]
        prompt: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return prompt

    def _names(self) -> list[str]:
        return [" / ".join([label.name, *label.aliases]) for label in self.labels.labels]

    def _parts(self, text: str) -> list[list[str]]:
        """The sentences of a text, in lists that fit into the model's context together with the answer."""
        parts: list[list[str]] = [[]]
        for sentence in sentences(text):
            for piece in self._pieces(sentence):
                if parts[-1] and self._room(self._length([*parts[-1], piece])) < 0:
                    parts.append([])
                parts[-1].append(piece)
        return [part for part in parts if part]

    def _pieces(self, sentence: str) -> list[str]:
        """A sentence, halved until each part fits."""
        words = sentence.split()
        if len(words) < 2 or self._room(self._length([sentence])) >= 0:
            return [sentence]
        half = len(words) // 2
        return [*self._pieces(" ".join(words[:half])), *self._pieces(" ".join(words[half:]))]

    def _length(self, part: Sequence[str]) -> int:
        prompt = len(self.tokenizer(self._prompt(part), add_special_tokens=False, verbose=False)["input_ids"])
        return prompt + most_tokens(self.vocabulary, self._choices(len(part)))

    def _room(self, length: int) -> int:
        return self.context - length


def _reading(answer: dict[str, dict[str, Any]], part: Sequence[str]) -> Reading:
    statements = {
        name: Statement(Status(statement[STATUS]), part[statement[SENTENCE] - 1] if statement[SENTENCE] else "")
        for name, statement in answer.items()
    }
    return {name: statement for name, statement in statements.items() if statement.status is not NOTHING.status}


def _joined(readings: Sequence[Reading]) -> Reading:
    names = dict.fromkeys(name for reading in readings for name in reading)
    return {name: strongest([reading[name] for reading in readings if name in reading]) for name in names}


def _digest(folder: Path) -> str:
    """A digest of the names, sizes and times of files; weights of many gigabytes are not read."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".json", ".model"))
    facts = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]
