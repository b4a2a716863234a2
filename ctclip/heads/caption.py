"""The decoder of the captioning objective as a head: it scores findings by the likelihood of their prompts, and writes
texts."""

from __future__ import annotations

from collections.abc import Sequence
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
from ctclip.heads.prompts import PromptHead
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.objectives.words import LONGEST, WordDecoder
from ctclip.prompts import PromptSet, load_prompts

SIZE, WEIGHTS = "decoder.yaml", "decoder.safetensors"
# In a state_dict under two names: word vectors are shared by the input and the output of the decoder.
TIED = "language.lm_head.weight"


class CaptionHead(Head):
    """Scores a finding by how much more likely its positive prompts are than its negative ones, given the volume (a
    captioner as classifier: Tschannen et al. 2023, CapPa, section 4.1)."""

    kind = "caption"

    def __init__(self, model: DualEncoder, decoder: WordDecoder, prompts: PromptSet, names: Sequence[str]) -> None:
        """``decoder``: trained by ``Captioning`` together with ``model``; ``names``: the findings, named in ``prompts``
        or not."""
        super().__init__(model)
        self.decoder = decoder.to(model.device).eval().requires_grad_(False)
        self.prompts, self.names = prompts, tuple(names)
        self.source = prompts.identity()

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
        longest = min(LONGEST, self.model.text_encoder.max_tokens)
        tokens = {
            name: ids.to(self.model.device) for name, ids in self.model.text_encoder.whole(texts, longest).items()
        }
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
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
            size = yaml.safe_load((folder / SIZE).read_text(encoding="utf-8"))
            names = yaml.safe_load((folder / "names.yaml").read_text(encoding="utf-8"))
            decoder = WordDecoder(**size)
            tensors = load_file(folder / WEIGHTS)
            decoder.load_state_dict(tensors | {TIED: tensors["language.transformer.wte.weight"]})
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, yaml.YAMLError) as error:
            raise CheckpointError(
                f"{folder}: its caption head is missing or damaged; copy the model folder again"
            ) from error
        if decoder.memory.in_features != model.volume_encoder.token_width:
            raise CheckpointError(
                f"{folder}: its decoder expects tokens of width {decoder.memory.in_features}, but those of the model have "
                f"{model.volume_encoder.token_width}: it belongs to another model"
            )
        return cls(model, decoder, load_prompts(folder / "prompts.yaml"), [str(name) for name in names])
