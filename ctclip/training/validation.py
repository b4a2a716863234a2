"""Validation on held-out volumes: loss, retrieval, modality gap, zero-shot AUROC."""

from __future__ import annotations

import math

import numpy as np
import torch

from ctclip import distributed
from ctclip.config import Config
from ctclip.data.dataset import StoredVolumes
from ctclip.evaluation.metrics import auroc, mean_defined
from ctclip.evaluation.retrieval import retrieval
from ctclip.heads.prompts import pair_vectors
from ctclip.labels import LabelSet
from ctclip.prompts import PromptSet
from ctclip.training.engine import Engine
from ctclip.training.step import pairs_of, parts_of


class Validation:
    """Uses the first reconstruction of up to ``validate_volumes`` scans of the validation split, divided among ranks.

    ``valid_loss`` is the training loss on them, with the same objectives, batch size and identities.
    """

    def __init__(self, config: Config, engine: Engine, labels: LabelSet | None, prompts: PromptSet) -> None:
        self.engine = engine
        self.data = StoredVolumes(
            config.data.model_copy(update={"views_per_volume": 1}), config.data.valid_split, seed=config.seed,
            training=False, columns=engine.module.columns, labels=labels if config.reads("labels") else None,
            sentences=engine.module.sentences,
        )  # fmt: skip
        self.data.tokenisers = engine.tokenisers
        self.data.body = engine.module.model.volume_encoder.body_tokens()
        first = np.unique(self.data.scan_numbers, return_index=True)[1]
        written = [int(row) for row in first if self.data.reports[row].text()]
        self.rows = written[: config.training.validate_volumes]
        self.batch = config.training.batch
        # Labels only show progress; they never affect training or the choice of a checkpoint.
        columns = {} if labels is None else labels.columns(self.data.table.columns)
        self.names = list(columns)
        table = self.data.table.iloc[self.rows]
        self.labels = table[[columns[name][0] for name in columns]].to_numpy(dtype=float, na_value=np.nan)
        self.prompts = prompts

    def __call__(self, progress: float) -> dict[str, float]:
        """Run a validation, a collective operation. ``valid_loss`` is in nats; the result is empty if the split has no
        report."""
        if not self.rows:
            return {}
        engine, ranks, rank = self.engine, distributed.world_size(), distributed.rank()
        engine.deepspeed.eval()
        # All ranks must run the same number of forward passes of equal size, so the last batch is filled with the first
        # rows. Repeated scans are not negatives of each other.
        share = self.batch // ranks
        padded = np.resize(self.rows, math.ceil(len(self.rows) / self.batch) * self.batch)
        losses, volumes, texts = [], [], []
        with torch.no_grad():
            for start in range(0, len(padded), self.batch):
                mine = padded[start + rank * share : start + (rank + 1) * share]
                batch = self.data.batch([(int(row), 0) for row in mine]).to(engine.device, self.data.spec)
                encoded = [engine.deepspeed(part, progress=progress) for part in parts_of(batch, engine.parts)]
                features = tuple(
                    torch.cat([getattr(one, side) for one in encoded]).float() for side in ("volumes", "texts")
                )
                loss, _ = engine.deepspeed(None, pairs_of(batch), features, progress)
                tokens = torch.stack([sum(one.losses.values(), loss.new_zeros(())) for one in encoded]).mean()
                losses.append(float(distributed.mean_over_ranks((loss + tokens).reshape(1).float())))
                similarity = engine.module.model.similarity
                volumes.append(distributed.gather(similarity.volume(features[0])).cpu())
                texts.append(distributed.gather(similarity.text(features[1])).cpu())
        count = len(self.rows)
        return self._figures(losses, torch.cat(volumes)[:count], torch.cat(texts)[:count])

    def _figures(self, losses: list[float], volumes: torch.Tensor, texts: torch.Tensor) -> dict[str, float]:
        identity = np.arange(len(volumes))
        hits = retrieval(texts.numpy(), volumes.numpy(), identity, identity)
        figures = {
            "valid_loss": float(np.mean(losses)),
            "valid_modality_gap": float((volumes.mean(dim=0) - texts.mean(dim=0)).norm()),
            **{f"valid_{name}": hits[name] for name in ("recall@1", "recall@10", "median_rank") if name in hits},
        }
        if self.names:
            with self.engine.gathered():
                positive, negative = pair_vectors(self.engine.module.model, self.prompts, self.names)
            scores = volumes.numpy() @ (positive - negative).float().cpu().numpy().T
            known = ~np.isnan(self.labels)
            values = [auroc(self.labels[k, i], scores[k, i]) for i, k in enumerate(known.T) if k.any()]
            mean = mean_defined(values)
            if math.isfinite(mean):
                figures["valid_auroc"] = mean
        return figures
