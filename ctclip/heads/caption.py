"""The decoder of the captioning objective as a head: it scores findings by the likelihood of their prompts, and writes
texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.heads.head import Head
from ctclip.heads.prompts import PromptHead, read_names
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.models.text import TextEncoder
from ctclip.objectives.words import WordDecoder
from ctclip.preprocessing.plain_yaml import read_yaml
from ctclip.prompts import PromptSet, load_prompts
from ctclip.sentences import sentences

SIZE, WEIGHTS, WRITES = "decoder.yaml", "decoder.safetensors", "report.yaml"
# In a state_dict under two names: word vectors are shared by the input and the output of the decoder.
TIED = "language.lm_head.weight"


# What WordPiece leaves inside words and numbers: "effu ##sion", "ground - glass", "2. 5".
APART = [(re.compile(r"\s*##"), ""), (re.compile(r"(?<=\w) - (?=\w)"), "-"), (re.compile(r"(?<=\d)([.,]) (?=\d)"), r"\1"), (re.compile(r"(?<=\w) / (?=\w)"), "/")]  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """How words are chosen: the best of ``beams`` texts, or, with ``nucleus``, drawn from the likeliest words that share
    this probability (Holtzman et al. 2020) with a seed."""

    beams: int = 1
    nucleus: float | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """For the ``generate`` of Transformers."""
        if self.nucleus is not None:
            return {"do_sample": True, "top_p": self.nucleus, "top_k": 0}
        return {"do_sample": False, "num_beams": self.beams}


class ReportTokens:
    """A report as the decoder's tokens: findings to write about (if it is ``prompted``), then each section, every part
    with an end mark."""

    def __init__(self, text_encoder: TextEncoder, length: int, *, prompted: bool) -> None:
        before, after = text_encoder.marks
        self.before, self.end = list(before), after[-1]
        self.text_encoder, self.length, self.prompted = text_encoder, length, prompted

    def prefix(self, told: Sequence[str] | None) -> list[int]:
        """The tokens before the first section. told: names of findings; None: nothing is known of the findings."""
        if not self.prompted:
            return self.before
        named = [] if told is None else self._ids("; ".join(told) + ".")
        return [*self.before, *named[: self.length // 2], self.end]

    def whole(self, sections: Sequence[str], told: Sequence[str] | None) -> tuple[list[int], int]:
        """All tokens of a report, cut at ``length``, and how many of them are the prefix, which is not learned."""
        prefix = self.prefix(told)
        written = [token for text in sections for token in (*self._ids(text), self.end)]
        return [*prefix, *written][: self.length], len(prefix)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.text_encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


class CaptionHead(Head):
    """Scores a finding by how much more likely its positive prompts are than its negative ones, given the volume (a
    captioner as classifier: Tschannen et al. 2023, CapPa, section 4.1)."""

    kind = "caption"

    def __init__(
        self,
        model: DualEncoder,
        decoder: WordDecoder,
        prompts: PromptSet,
        names: Sequence[str],
        sections: Sequence[str] = ("findings",),
        *,
        prompted: bool = False,
    ) -> None:
        """``decoder``: trained by ``Captioning`` together with ``model``, or by `ctclip adapt --method caption` after it;
        ``names``: the findings, named in ``prompts`` or not; ``sections``: what it writes, in order (a decoder of
        ``Captioning`` writes one text); ``prompted``: whether it was trained to be told findings."""
        super().__init__(model)
        self.sections, self.prompted = tuple(sections), prompted
        self.decoder = decoder.to(model.device).eval().requires_grad_(False)
        self.prompts, self.names = prompts, tuple(names)
        self.source = prompts.identity()
        self.tokens = ReportTokens(model.text_encoder, decoder.size["length"], prompted=prompted)

    @torch.inference_mode()
    def generate(self, encoded: Encoded, decoding: Decoding, told: Sequence[str] | None = None) -> dict[str, str]:
        """Write each section of the report of one volume. ``told``: names of findings to write about, for a head that is
        ``prompted``. An incomplete last sentence is left out."""
        given = self.decoder.attended(encoded)
        ids = self.tokens.prefix(told)
        texts = dict.fromkeys(self.sections, "")
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(decoding.seed)
            for section in self.sections:
                room = self.tokens.length - len(ids)
                if room < 2:
                    break
                start = torch.tensor([ids], device=self.model.device)
                language: Any = self.decoder.language
                written = language.generate(
                    input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=room, use_cache=True,
                    eos_token_id=self.tokens.end, pad_token_id=self.tokens.end, **given, **decoding.arguments(),
                )[0, len(ids) :].tolist()  # fmt: skip
                ended = self.tokens.end in written
                body = written[: written.index(self.tokens.end)] if ended else written
                ids = [*ids, *body, self.tokens.end]
                texts[section] = self._text(body, ended)
        return texts

    def _text(self, ids: Sequence[int], ended: bool) -> str:
        text = str(
            self.model.text_encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        )
        for pattern, replacement in APART:
            text = pattern.sub(replacement, text)
        written = sentences(text)
        # A sentence that was cut off claims something else than it would have.
        written = written if ended or text.rstrip().endswith((".", "!", "?")) else written[:-1]
        return " ".join(sentence[:1].upper() + sentence[1:] for sentence in written)

    @torch.inference_mode()
    def score(self, encoded: Encoded) -> Tensor:
        """Mean log-likelihood (nats per text) of the positive phrasings minus that of the negative ones."""
        columns = []
        for name in self.names:
            sides = (self.prompts.side(name, positive) for positive in (True, False))
            positive, negative = (self.log_likelihood(encoded, texts).mean(dim=1) for texts in sides)
            columns.append(positive - negative)
        return torch.stack(columns, dim=1)

    @torch.inference_mode()
    def log_likelihood(self, encoded: Encoded, texts: Sequence[str]) -> Tensor:
        """(B, texts) float32: log-likelihood (nats) of each text, including its end, given each of B volumes."""
        longest = min(self.tokens.length - self.prompted, self.model.text_encoder.max_tokens)
        tokens = self.model.text_encoder.whole(texts, longest)
        ids, mask = (tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        if self.prompted:
            # The empty place of the findings to write about.
            first = len(self.tokens.before)
            ids, mask = (
                torch.cat([part[:, :first], part.new_full((len(part), 1), value), part[:, first:]], dim=1)
                for part, value in ((ids, self.tokens.end), (mask, 1))
            )
        columns = []
        for one, words in zip(ids, mask, strict=True):
            given = one.expand(len(encoded.tokens), -1), words.expand(len(encoded.tokens), -1)
            scores = self.decoder(given[0][:, :-1], given[1][:, :-1], encoded).float()
            losses = F.cross_entropy(scores.transpose(1, 2), given[0][:, 1:], reduction="none")
            columns.append(-(losses * given[1][:, 1:]).sum(dim=1))
        return torch.stack(columns, dim=1)

    def fingerprint(self, probe: Tensor) -> bytes:
        state = self.decoder.state_dict()
        return b"".join(state[name].double().sum().cpu().numpy().tobytes() for name in sorted(state))

    def save(self, folder: Path) -> None:
        self.write(folder, self.decoder.size, self.decoder.state_dict(), self.prompts, self.names)
        writes = {"sections": list(self.sections), "prompted": self.prompted}
        (folder / WRITES).write_text(yaml.safe_dump(writes, sort_keys=False), encoding="utf-8")

    @staticmethod
    def write(
        folder: Path, size: dict[str, Any], state: dict[str, Tensor], prompts: PromptSet, names: Sequence[str]
    ) -> None:
        """Write what ``save`` writes, from a decoder's ``size`` and state: in training its weights may be sharded over
        ranks."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items() if name != TIED}
        save_file(tensors, folder / WEIGHTS)
        (folder / SIZE).write_text(yaml.safe_dump(size, sort_keys=False), encoding="utf-8")
        PromptHead.write(folder, prompts, names)

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> CaptionHead:
        try:
            size = read_yaml(folder / SIZE)
            tensors = load_file(folder / WEIGHTS)
            _check_size(size, tensors)
            decoder = WordDecoder(**size)
            # Heads of before drafting write one text.
            writes = read_yaml(folder / WRITES) if (folder / WRITES).is_file() else {}
            if unknown := writes.keys() - {"sections", "prompted"}:
                raise ValueError(f"{WRITES}: {unknown}")
            sections, prompted = (
                tuple(map(str, writes.get("sections", ("findings",)))),
                bool(writes.get("prompted", False)),
            )
            decoder.load_state_dict(tensors | {TIED: tensors["language.transformer.wte.weight"]})
        except (
            OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, yaml.YAMLError
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{folder}: its caption head is missing or damaged; copy the model folder again"
            ) from error
        if decoder.memory.in_features != model.volume_encoder.token_width:
            raise CheckpointError(
                f"{folder}: its decoder expects tokens of width {decoder.memory.in_features}, but those of the model have "
                f"{model.volume_encoder.token_width}: it belongs to another model"
            )
        prompts = load_prompts(folder / "prompts.yaml")
        return cls(model, decoder, prompts, read_names(folder), sections, prompted=prompted)


def _check_size(size: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises ValueError unless a stranger's sizes are those of the weights beside them: memory is taken for no others."""
    layers = {name.split(".")[3] for name in tensors if name.startswith("language.transformer.h.")}
    words, places = (tensors[f"language.transformer.{name}.weight"] for name in ("wte", "wpe"))
    there = (*words.shape, tensors["memory.weight"].shape[1], len(places), len(layers))
    if tuple(size[name] for name in ("vocabulary", "width", "token_width", "length", "depth")) != there:
        raise ValueError("sizes and weights do not agree")
