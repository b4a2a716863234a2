"""The head that generates volumes from texts: a prior draws the embedding of a volume, a decoder the volume (unCLIP,
Ramesh et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.heads.decoder import Decoder, Networks, built
from ctclip.heads.head import reading
from ctclip.heads.prior import Prior, load_prior, save_prior
from ctclip.heads.prompts import PromptHead, read_names
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import axis_shape
from ctclip.preprocessing.plain_yaml import read_yaml
from ctclip.prompts import PromptSet, load_prompts
from ctclip.schema import validated

SIZE, WEIGHTS = "decoder.yaml", "decoder.safetensors"
# Defaults of `ctclip imagine`.
STEPS, GUIDANCE = 25, 4.0


class DecodeHead(PromptHead):
    """Scores findings with the model's prompts; generates the volumes of `ctclip imagine`."""

    kind = "decode"

    def __init__(
        self, model: DualEncoder, decoder: Decoder, prior: Prior, prompts: PromptSet, names: Sequence[str] | None
    ) -> None:
        super().__init__(model, prompts, names)
        self.decoder = decoder.to(model.device).eval().requires_grad_(False)
        self.prior = prior.to(model.device).eval().requires_grad_(False)

    @torch.inference_mode()
    def generate(self, text: str | None, seed: int, *, steps: int = STEPS, guidance: float = GUIDANCE) -> Tensor:
        """A volume (D, H, W) in [-1, 1] for a text, or for none: the prior draws the embedding of a volume with the
        text, and the decoder a volume with that embedding. ``guidance`` exaggerates what the prior draws; if the prior is
        a regression, what the decoder draws."""
        decoder, prior = self.decoder, self.prior
        draws = prior.kind == "diffusion"
        if text is not None:
            # One text at a time: batching changes the last bits of an embedding, and so the volume of a seed.
            vectors = prior.sample(self.model.encode_text([text]).float(), guidance=guidance, seed=seed)[:, 0]
            condition, guidance = decoder.condition(vectors), 1.0 if draws else guidance
        elif draws:
            condition, guidance = decoder.condition(prior.sample(prior.mean[None], guidance=0.0, seed=seed)[:, 0]), 1.0
        else:
            condition, guidance = decoder.condition(), 1.0
        return decoder.sample(condition, [seed], steps=steps, guidance=guidance)[0, 0]

    def save(self, folder: Path) -> None:
        super().save(folder)
        tensors = {name: value.cpu().contiguous() for name, value in self.decoder.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)
        (folder / SIZE).write_text(yaml.safe_dump(self.decoder.facts, sort_keys=False), encoding="utf-8")
        save_prior(folder, self.prior)

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> DecodeHead:
        with reading(folder, "its decoder is"):
            facts, tensors = read_yaml(folder / SIZE), load_file(folder / WEIGHTS)
            shape, dim = tuple(int(extent) for extent in facts["shape"]), int(facts["dim"])
        if shape != axis_shape(model.spec) or dim != model.config.dim:
            raise CheckpointError(
                f"{folder}: its decoder generates volumes of {' x '.join(map(str, shape))} voxels from embeddings of "
                f"{dim} dimensions, but the model has {' x '.join(map(str, axis_shape(model.spec)))} and "
                f"{model.config.dim}: it belongs to another model; train one with `ctclip adapt --method decode`"
            )
        with reading(folder, "its decoder is"):
            decoder = built(shape, dim, validated(Networks, facts["networks"], str(folder / SIZE)), tensors)
        prompts, names = load_prompts(folder / "prompts.yaml"), read_names(folder)
        return cls(model, decoder, load_prior(folder, model), prompts, names)
