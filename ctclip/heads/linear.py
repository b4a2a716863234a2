"""A linear layer from the volume's embedding to logits, learned from labels: CT-LiPro's classifier, or a linear probe."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.heads.head import Head, reading
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.encoded import Encoded
from ctclip.preprocessing.plain_yaml import read_yaml


class LinearHead(Head):
    """Logits ``weight @ embedding + bias``; ``relu`` takes only the positive part of the embedding, as the published
    ImageLatentsClassifier (CT-LiPro) does."""

    kind = "linear"
    supervision = "label-supervised"

    def __init__(
        self, model: DualEncoder, names: Sequence[str], weight: Tensor, bias: Tensor, *, relu: bool = False
    ) -> None:
        """``weight`` (names, dim), ``bias`` (names,)."""
        super().__init__(model)
        self.names, self.relu = tuple(names), relu
        if weight.shape != (len(self.names), model.config.dim) or bias.shape != (len(self.names),):
            raise CheckpointError(
                f"a linear head with weights {tuple(weight.shape)} and biases {tuple(bias.shape)}; expected {len(self.names)} labels of "
                f"{model.config.dim} dimensions"
            )
        self.weight, self.bias = weight.float().to(model.device), bias.float().to(model.device)
        # The hash keeps two linear heads of one model from using each other's calibration.
        self.source = f"linear head {hashlib.sha256(self.fingerprint(self.bias)).hexdigest()[:8]}"

    def score(self, encoded: Encoded) -> Tensor:
        if encoded.embedding is None:
            raise ValueError("these volumes were encoded without their embedding; call DualEncoder.encode")
        features = encoded.embedding.relu() if self.relu else encoded.embedding
        return features @ self.weight.T + self.bias

    def fingerprint(self, probe: Tensor) -> bytes:
        return self.weight.cpu().numpy().tobytes() + self.bias.cpu().numpy().tobytes()

    def save(self, folder: Path) -> None:
        save_file(
            {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()},
            folder / "linear.safetensors",
        )
        facts = {"names": list(self.names), "relu": self.relu}
        (folder / "linear.yaml").write_text(
            yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path, model: DualEncoder) -> LinearHead:
        with reading(folder, "its linear head is"):
            facts = read_yaml(folder / "linear.yaml")
            tensors = load_file(folder / "linear.safetensors")
            return cls(
                model,
                [str(name) for name in facts["names"]],
                tensors["weight"],
                tensors["bias"],
                relu=bool(facts["relu"]),
            )
