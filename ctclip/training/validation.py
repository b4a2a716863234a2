"""What a run shows of itself on volumes it does not learn from: loss, retrieval, modality gap, zero-shot AUROC."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from ctclip import distributed
from ctclip.config import Config
from ctclip.data.dataset import StoredVolumes
from ctclip.evaluation.metrics import auroc, mean_defined
from ctclip.evaluation.retrieval import retrieval
from ctclip.findings import FINDINGS
from ctclip.inference.detector import Detector
from ctclip.inference.prompts import load_prompts
from ctclip.training.engine import Engine

BATCH = 8


class Validation:
    """The first reconstruction of up to ``validate_volumes`` scans of the validation split, shared among ranks."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = StoredVolumes(config.data, config.data.valid_split, seed=config.seed, training=False)
        first = np.unique(self.data.scan_numbers, return_index=True)[1]
        self.rows = [int(row) for row in first if self.data.reports[row].text()][: config.training.validate_volumes]
        known = [name for name in FINDINGS if name in self.data.rows.columns]
        # Labels are read to show progress, never to learn from or to choose a checkpoint by.
        self.labels = self.data.rows.iloc[self.rows][known].to_numpy(dtype=float, na_value=np.nan) if known else None
        self.names = known

    def __call__(self, engine: Engine) -> dict[str, float]:
        """A collective. ``valid_loss`` in nats, over batches of the training batch's size."""
        model = engine.module.model
        engine.deepspeed.eval()
        mine = self.rows[distributed.rank() :: distributed.world_size()]
        # At ZeRO 3 every forward is a collective: all ranks make as many, an empty-handed one repeats its last volume.
        share = math.ceil(len(self.rows) / distributed.world_size())
        padded = (mine * share)[:share] if len(mine) < share else mine
        volumes, texts = [], []
        with torch.no_grad():
            for start in range(0, share, BATCH):
                rows = padded[start : start + BATCH]
                voxels = self.data.batch([(row, 0) for row in rows]).on(engine.device, self.data.spec).volumes
                reports = [self.data.reports[row].text() for row in rows]
                tokens = {name: ids.to(engine.device) for name, ids in engine.tokenise(reports).items()}
                volume, text, _ = engine.deepspeed("features", volumes=voxels, tokens=tokens)
                volumes.append(model.similarity.volume(volume.float()).cpu())
                texts.append(model.similarity.text(text.float()).cpu())
            found = distributed.gather_objects((mine, torch.cat(volumes)[: len(mine)], torch.cat(texts)[: len(mine)]))
            detector = self._detector(engine)
        order = np.argsort([row for rows, _, _ in found for row in rows])
        vectors, reports_ = (torch.cat([part[side] for part in found])[order] for side in (1, 2))
        scale = float(engine.scale())
        return self._figures(vectors, reports_, scale, detector)

    def _detector(self, engine: Engine) -> tuple[np.ndarray, np.ndarray] | None:
        """Positive and negative prompt vectors. At ZeRO 3 the text side is gathered for them."""
        if self.labels is None:
            return None
        prompts = load_prompts(self.config.prompts)
        with engine.gathered():
            detector = Detector(engine.module.model, prompts, self.names)
        return detector.positive.float().cpu().numpy(), detector.negative.float().cpu().numpy()

    def _figures(
        self, volumes: torch.Tensor, reports: torch.Tensor, scale: float, detector: tuple[np.ndarray, np.ndarray] | None
    ) -> dict[str, float]:
        losses = []
        for start in range(0, len(volumes) - 1, self.config.training.batch):
            part = slice(start, start + self.config.training.batch)
            logits = scale * volumes[part] @ reports[part].T
            target = torch.arange(len(logits))
            losses.append(float((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2))
        identity = np.arange(len(volumes))
        hits = retrieval(reports.numpy(), volumes.numpy(), identity, identity)
        figures = {
            "valid_loss": float(np.mean(losses)) if losses else math.nan,
            "valid_modality_gap": float((volumes.mean(dim=0) - reports.mean(dim=0)).norm()),
            **{f"valid_{name}": hits[name] for name in ("recall@1", "recall@10", "median_rank") if name in hits},
        }
        if detector is not None and self.labels is not None:
            scores = volumes.numpy() @ (detector[0] - detector[1]).T
            known = ~np.isnan(self.labels)
            values = [
                auroc(self.labels[k, i], scores[k, i])
                for i, k in enumerate(known.T)
                if np.nansum(self.labels[:, i]) > 0
            ]
            figures["valid_auroc"] = mean_defined(values) if values else math.nan
        return figures
