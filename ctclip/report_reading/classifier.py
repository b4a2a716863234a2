"""Labels by a text classifier: any sequence classifier of Transformers in a local folder, or CT-CLIP's own.

CT-CLIP's classifier (RadBERT with a linear layer on its pooled output) is published as the weights alone. Put the file
into a folder with the ``config.json`` and the tokenizer of ``zzxslp/RadBERT-RoBERTa-4m``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctclip.errors import CheckpointError, ConfigError
from ctclip.labels import LabelSet
from ctclip.models.huggingface import one_line_errors, read_settings
from ctclip.report_reading.reader import Options, Reader, Reading, Statement, Status
from ctclip.sentences import sentences

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Prefixes of the two parts of CT-CLIP's classifier.
BODY, MAP = "model.", "classifier."
LONGEST = 512
REMEDY = "; copy the folder again from its source"


class ClassifierReader(Reader):
    """A label is present if its probability reaches the threshold, and absent otherwise. A text that is too long for
    the model is read in parts, and the highest probability counts. The sentence reported is the one with the highest
    probability."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, columns: dict[str, int], options: Options, name: str, longest: int
    ) -> None:
        """``columns``: for each label, the index of the model's output."""
        self.model, self.tokenizer, self.columns = model.to(options.device).eval(), tokenizer, columns
        self.options, self.name, self.longest = options, name, longest

    @classmethod
    def build(cls, labels: LabelSet, options: Options) -> ClassifierReader:
        from transformers import AutoTokenizer

        if options.model is None:
            raise ConfigError("the reader 'classifier' needs --reader-model: a local folder of a sequence classifier")
        folder = options.model
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; --reader-model takes a local model folder")
        config, state = read_settings(folder / "config.json"), _own_state(folder)
        with one_line_errors(folder, "cannot be read as a classifier", REMEDY):
            model = _published(folder, config, state) if state is not None else _sequence_classifier(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            outputs = 0 if state is None else len(state[f"{MAP}weight"])
            # CT-CLIP's outputs have no names; they are in the order of the label set.
            columns = _columns(folder, config, labels) if state is None else _in_order(folder, labels, outputs)
            # RoBERTa starts counting positions after the padding index.
            places = int(config.get("max_position_embeddings", LONGEST))
            longest = min(places - 2 if config.get("model_type") == "roberta" else places, LONGEST)
            reader = cls(model, tokenizer, columns, options, f"{folder.resolve().name} {_digest(folder)}", longest)
            # A setting with the wrong type fails only when it is used.
            reader.read(["."])
        return reader

    @property
    def identity(self) -> str:
        return f"classifier: {self.name}, threshold {self.options.threshold:g}"

    def read(self, texts: Sequence[str]) -> list[Reading]:
        parts = [(row, part) for row, text in enumerate(texts) for part in self._parts(text)]
        if not parts:
            return [{} for _ in texts]
        scores = self._probabilities([part for _, part in parts])
        best = torch.zeros(len(texts), scores.shape[1])
        for (row, _), values in zip(parts, scores, strict=True):
            best[row] = torch.maximum(best[row], values)
        return [self._reading(text, values.tolist()) for text, values in zip(texts, best, strict=True)]

    def _reading(self, text: str, values: list[float]) -> Reading:
        if not text.strip():
            return {}
        stated = {name: values[column] for name, column in self.columns.items()}
        present = [name for name, value in stated.items() if value >= self.options.threshold]
        likeliest: dict[str, str] = {}
        if present:
            written = sentences(text) or [text]
            scores = self._probabilities(written)
            likeliest = {name: written[int(scores[:, self.columns[name]].argmax())] for name in present}
        return {
            name: Statement(
                Status.present if name in likeliest else Status.absent, likeliest.get(name, ""), round(value, 4)
            )
            for name, value in stated.items()
        }

    def _parts(self, text: str) -> list[str]:
        """The text, or groups of its sentences that fit into the model."""
        if not text.strip():
            return []
        if self._length(text) <= self.longest:
            return [text]
        parts: list[str] = []
        for sentence in sentences(text):
            joined = f"{parts[-1]} {sentence}" if parts else sentence
            if parts and self._length(joined) <= self.longest:
                parts[-1] = joined
            else:
                parts.append(sentence)
        return parts

    def _length(self, text: str) -> int:
        return len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    @torch.inference_mode()
    def _probabilities(self, texts: Sequence[str]) -> Tensor:
        """(texts, outputs) in the order of ``texts``."""
        scores = []
        for start in range(0, len(texts), self.options.batch):
            batch = self.tokenizer(
                list(texts[start : start + self.options.batch]),
                truncation=True, max_length=self.longest, padding=True, return_tensors="pt",
            ).to(self.options.device)  # fmt: skip
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            scores.append(getattr(logits, "logits", logits).float().sigmoid().cpu())
        return torch.cat(scores)


class _Published(nn.Module):
    """CT-CLIP's RadBertClassifier: a linear layer on the pooled output."""

    def __init__(self, model: nn.Module, outputs: int) -> None:
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(model.config.hidden_size, outputs)  # type: ignore[arg-type,union-attr]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        pooled: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        logits: Tensor = self.classifier(pooled)
        return logits


def _own_state(folder: Path) -> dict[str, Tensor] | None:
    """The weights of CT-CLIP's classifier, if the folder holds a ``.pth`` or ``.pt`` file but no weights of
    Transformers."""
    files = sorted([*folder.glob("*.pth"), *folder.glob("*.pt")])
    if any((folder / name).is_file() for name in WEIGHTS) or not files:
        return None
    try:
        # Tensors only: a pickle may run code.
        state = torch.load(files[0], map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{files[0]}: cannot be read as weights ({type(error).__name__})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {str(key).removeprefix("module."): value for key, value in state.items()}
    if f"{MAP}weight" not in state or not any(key.startswith(BODY) for key in state):
        raise CheckpointError(
            f"{files[0]}: has no weights 'model.*' and 'classifier.weight', so it is not CT-CLIP's classifier"
        )
    return state


def _published(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = _Published(AutoModel.from_config(settings), len(state[f"{MAP}weight"]))
    # Older versions of Transformers saved position ids as a buffer.
    given = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    with one_line_errors(folder, "the weights do not fit config.json"):
        model.load_state_dict(given)
    return model


def _sequence_classifier(folder: Path) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return model


def _in_order(folder: Path, labels: LabelSet, outputs: int) -> dict[str, int]:
    if outputs != len(labels.names):
        raise CheckpointError(
            f"{folder}: has {outputs} outputs, the label set {labels.name!r} {len(labels.names)} labels"
        )
    return {name: number for number, name in enumerate(labels.names)}


def _columns(folder: Path, config: dict[str, Any], labels: LabelSet) -> dict[str, int]:
    """The index of the output for each label, by the names in config.json. Every label must have one, so that a label
    unknown to the classifier is never taken as absent."""
    named = {labels.resolve(str(name)): int(number) for number, name in dict(config.get("id2label") or {}).items()}
    if lacking := [name for name in labels.names if name not in named]:
        raise CheckpointError(
            f"{folder}: no output for {lacking[0]!r} of {labels.name!r} (id2label of its config.json has "
            f"{', '.join(map(str, list(dict(config.get('id2label') or {}).values())[:4]))} ...); add that name to the label's aliases"
        )
    return {name: named[name] for name in labels.names}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:8]
