"""The linear probe that comes with CT-LiPro: 18 logits of the volume's embedding, learned from labels. Not zero-shot."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ctclip.errors import CheckpointError
from ctclip.findings import FINDINGS
from ctclip.inference.detector import Detector
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import ModelFolder


class LinearProbe(Detector):
    """Scores the 18 abnormalities by ``classifier.safetensors`` of a model folder: Linear(ReLU(unit embedding)), one
    sigmoid a label (the published ImageLatentsClassifier). ``margins`` are its logits."""

    def __init__(self, folder: ModelFolder) -> None:
        path = Path(folder.path) / "classifier.safetensors"
        if not path.is_file():
            raise CheckpointError(
                f"{folder.path}: has no linear head; `ctclip import-checkpoint CT_LiPro_v2.pt` makes a folder with one"
            )
        head = load_file(path, device=str(folder.model.similarity.logit_scale.device))
        if head["weight"].shape != (len(FINDINGS), folder.model.config.dim):
            raise CheckpointError(f"{path}: a head of {tuple(head['weight'].shape)}, expected {len(FINDINGS)} labels")
        self.model: DualEncoder = folder.model
        self.weight, self.bias = head["weight"].float(), head["bias"].float()
        self.abnormalities = FINDINGS
        self.prompts = "linear head"
        self.calibration = None
        self.grades, self.graded, self.ladders = [], (), []

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def identity(self) -> bytes:
        return self.weight.cpu().numpy().tobytes()

    @torch.inference_mode()
    def margins(self, embeddings: Tensor) -> Tensor:
        """Unit volume embeddings (n, dim) -> logits (n, 18)."""
        return embeddings.relu() @ self.weight.T + self.bias
