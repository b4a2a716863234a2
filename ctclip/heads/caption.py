"""A caption decoder as a head: it scores findings by the likelihood of their prompts, and writes reports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.heads.head import Head, reading
from ctclip.heads.plan import Plan, plan_features
from ctclip.heads.prompts import PromptHead, pair_vectors, read_names
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.models.text import TextEncoder
from ctclip.objectives.words import WordDecoder
from ctclip.preprocessing.plain_yaml import read_yaml
from ctclip.prompts import PromptSet, load_prompts
from ctclip.sentences import sentences

SIZE, WEIGHTS, WRITES = "decoder.yaml", "decoder.safetensors", "report.yaml"
# The state_dict holds this tensor under two names, because the decoder's input and output share word vectors.
TIED = "language.lm_head.weight"
PLAN = "plan."


# Artefacts of WordPiece inside words and numbers: "effu ##sion", "ground - glass", "2. 5".
APART = [(re.compile(r"\s*##"), ""), (re.compile(r"(?<=\w) - (?=\w)"), "-"), (re.compile(r"(?<=\d)([.,]) (?=\d)"), r"\1"), (re.compile(r"(?<=\w) / (?=\w)"), "/")]  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """How words are chosen: by beam search with ``beams`` beams or, with ``nucleus``, by sampling from the most likely
    words whose probabilities add up to this value (Holtzman et al. 2020), with a seed."""

    beams: int = 1
    nucleus: float | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """Arguments for ``generate`` of Transformers."""
        if self.nucleus is not None:
            return {"do_sample": True, "top_p": self.nucleus, "top_k": 0}
        return {"do_sample": False, "num_beams": self.beams}


class ReportTokens:
    """Encodes a report as tokens: the prompted findings (if ``prompted``), then each section, each part followed by an
    end token."""

    def __init__(self, text_encoder: TextEncoder, length: int, *, prompted: bool) -> None:
        before, after = text_encoder.marks
        self.before, self.end = list(before), after[-1]
        self.text_encoder, self.length, self.prompted = text_encoder, length, prompted

    def prefix(self, told: Sequence[str] | None) -> list[int]:
        """The tokens before the first section. ``told``: the findings to prompt with; None: no prompt."""
        if not self.prompted:
            return self.before
        named = [] if told is None else self._ids("; ".join(told) + ".")
        return [*self.before, *named[: self.length // 2], self.end]

    def whole(self, sections: Sequence[str], told: Sequence[str] | None) -> tuple[list[int], int]:
        """All tokens of a report, cut at ``length``, and the length of the prefix, which does not count in the loss."""
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
        plan: Plan | None = None,
    ) -> None:
        """``decoder``: trained by ``Captioning`` together with ``model``, or by `ctclip adapt --method caption` after
        it; ``names``: the findings, named in ``prompts`` or not; ``sections``: the sections it writes, in order (a
        decoder of ``Captioning`` writes one text); ``prompted``: whether it was trained with prompts of findings;
        ``plan``: chooses the findings to prompt with."""
        super().__init__(model)
        self.plan = None if plan is None else plan.to(model.device).eval().requires_grad_(False)
        # The left-right axis of the grid.
        self.lateral = 1 if model.spec.published_geometry else 2
        self.sections, self.prompted = tuple(sections), prompted
        self.decoder = decoder.to(model.device).eval().requires_grad_(False)
        self.prompts, self.names = prompts, tuple(names)
        self.source = prompts.identity()
        self.tokens = ReportTokens(model.text_encoder, decoder.size["length"], prompted=prompted)

    @torch.inference_mode()
    def told(self, encoded: Encoded, findings: Sequence[Sequence[str]] | None = None) -> list[list[str]] | None:
        """The prompt for each volume: ``findings`` (names, for each volume), or those of the plan, with sides where the
        plan is certain. None without findings and plan."""
        planned = self.planned(encoded)
        if planned is None:
            return None if findings is None else [list(names) for names in findings]
        chosen = [stated for stated, _ in planned] if findings is None else findings
        return [
            [statement(name, sides.get(name, "")) for name in names]
            for names, (_, sides) in zip(chosen, planned, strict=True)
        ]

    @torch.inference_mode()
    def planned(self, encoded: Encoded) -> list[tuple[list[str], dict[str, str]]] | None:
        """For each volume, the findings to state, and the side of every finding for which the plan is certain of the
        side (if the finding is present); None without a plan. Raises CheckpointError for a plan of another model."""
        if self.plan is None:
            return None
        features = plan_features(encoded, self.lateral)
        if features.shape[1] != self.plan.linear.in_features:
            raise CheckpointError(
                f"the plan of this caption head reads {self.plan.linear.in_features} features, but the encoder gives "
                f"{features.shape[1]}: it belongs to another model"
            )
        logits = self.plan(features)
        return list(zip(self.plan.findings(logits), self.plan.sides(logits), strict=True))

    def generate(self, encoded: Encoded, decoding: Decoding, told: Sequence[str] | None = None) -> dict[str, str]:
        """Write each section of the report of one volume. ``told``: names of findings to write about, for a head that
        is ``prompted``; None: those of its plan, if it has one. An incomplete last sentence is dropped."""
        return self.write(encoded, decoding, None if told is None else [told])[0]

    @torch.inference_mode()
    def write(
        self, encoded: Encoded, decoding: Decoding, findings: Sequence[Sequence[str]] | None = None
    ) -> list[dict[str, str]]:
        """Like ``generate``, for several volumes. ``findings``: those of each volume."""
        given = self.decoder.attended(encoded)
        told = self.told(encoded, findings)
        rows = [self.tokens.prefix(None if told is None else told[row]) for row in range(len(encoded.tokens))]
        texts = [dict.fromkeys(self.sections, "") for _ in rows]
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(decoding.seed)
            for section in self.sections:
                longest = max(map(len, rows))
                if self.tokens.length - longest < 2:
                    break
                for row, text, body in zip(rows, texts, self._continued(rows, longest, given, decoding), strict=True):
                    ended = self.tokens.end in body
                    words = body[: body.index(self.tokens.end)] if ended else body
                    row += [*words, self.tokens.end]
                    text[section] = self._text(words, ended)
        return texts

    def _continued(
        self, rows: Sequence[list[int]], longest: int, given: dict[str, Tensor], decoding: Decoding
    ) -> list[list[int]]:
        """Generate the tokens that follow each of ``rows``, which are left-padded to ``longest``."""
        ids = [[self.tokens.end] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        start, seen = (torch.tensor(part, device=self.model.device) for part in (ids, mask))
        language: Any = self.decoder.language
        written: list[list[int]] = language.generate(
            input_ids=start, attention_mask=seen, max_new_tokens=self.tokens.length - longest, use_cache=True,
            eos_token_id=self.tokens.end, pad_token_id=self.tokens.end, **given, **decoding.arguments(),
        )[:, longest:].tolist()  # fmt: skip
        return written

    def _text(self, ids: Sequence[int], ended: bool) -> str:
        text = str(
            self.model.text_encoder.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        )
        for pattern, replacement in APART:
            text = pattern.sub(replacement, text)
        written = sentences(text)
        # A truncated sentence may have a different meaning.
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
            # The empty prompt of findings.
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

    def texts(self) -> Tensor:
        return pair_vectors(self.model, self.prompts, self.names)[0]

    def fingerprint(self, probe: Tensor) -> bytes:
        state = self._state()
        return b"".join(state[name].double().sum().cpu().numpy().tobytes() for name in sorted(state))

    def _state(self) -> dict[str, Tensor]:
        state = dict(self.decoder.state_dict())
        return (
            state
            if self.plan is None
            else state | {PLAN + name: value for name, value in self.plan.state_dict().items()}
        )

    def save(self, folder: Path) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in self._state().items() if name != TIED}
        save_file(tensors, folder / WEIGHTS)
        (folder / SIZE).write_text(yaml.safe_dump(self.decoder.size, sort_keys=False), encoding="utf-8")
        PromptHead.write(folder, self.prompts, self.names)
        writes = {"sections": list(self.sections), "prompted": self.prompted}
        (folder / WRITES).write_text(yaml.safe_dump(writes, sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> CaptionHead:
        with reading(folder, "its caption head is"):
            size = read_yaml(folder / SIZE)
            tensors = load_file(folder / WEIGHTS)
            plan = _plan_of(tensors, read_names(folder))
            tensors = {name: value for name, value in tensors.items() if not name.startswith(PLAN)}
            _check_size(size, tensors)
            decoder = WordDecoder(**size)
            # Heads saved before drafting existed write one text.
            writes = read_yaml(folder / WRITES) if (folder / WRITES).is_file() else {}
            if unknown := writes.keys() - {"sections", "prompted"}:
                raise ValueError(f"{WRITES}: {unknown}")
            sections, prompted = (
                tuple(map(str, writes.get("sections", ("findings",)))),
                bool(writes.get("prompted", False)),
            )
            decoder.load_state_dict(tensors | {TIED: tensors["language.transformer.wte.weight"]})
        if decoder.size["token_width"] != model.volume_encoder.token_width:
            raise CheckpointError(
                f"{folder}: its decoder expects tokens of width {decoder.size['token_width']}, but those of the model have "
                f"{model.volume_encoder.token_width}: it belongs to another model"
            )
        prompts = load_prompts(folder / "prompts.yaml")
        return cls(model, decoder, prompts, read_names(folder), sections, prompted=prompted, plan=plan)


def statement(finding: str, side: str) -> str:
    """A finding as it appears in the prompt, with its side if known."""
    return f"{finding} {side}".rstrip()


def _plan_of(tensors: dict[str, Tensor], names: Sequence[str]) -> Plan | None:
    """Load the plan from ``tensors``. Raises KeyError or RuntimeError for weights that do not fit."""
    weights = {name.removeprefix(PLAN): value for name, value in tensors.items() if name.startswith(PLAN)}
    if not weights:
        return None
    plan = Plan(names, weights["linear.weight"].shape[1])
    plan.load_state_dict(weights)
    return plan


def _check_size(size: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless the sizes in an untrusted file match its weights, before memory is allocated for them."""
    layers = {name.split(".")[3] for name in tensors if name.startswith("language.transformer.h.")}
    words, places = (tensors[f"language.transformer.{name}.weight"] for name in ("wte", "wpe"))
    there = (*words.shape, tensors["memory.weight"].shape[1], len(places), len(layers))
    stated = tuple(size[name] for name in ("vocabulary", "width", "token_width", "length", "depth"))
    if (*stated[:2], stated[2] + size.get("local_width", 0), *stated[3:]) != there:
        raise ValueError("sizes and weights do not agree")
