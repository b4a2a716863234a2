"""Zero-shot scores of the model's own prompts on the same volumes, for comparison."""

from __future__ import annotations

import numpy as np
import torch

from ctclip.adaptation.examples import Examples
from ctclip.adaptation.protocol import aurocs
from ctclip.evaluation.metrics import mean_defined
from ctclip.heads.folder import FOLDER, PROMPTS, list_heads
from ctclip.heads.prompts import PromptHead
from ctclip.inference.model import usable_head
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.named_files import installed_file
from ctclip.prompts import PromptSet, load_prompts


def zero_shot_auroc(loaded: ModelFolder, test: Examples) -> float | None:
    """Mean AUROC of the model's prompts on the test volumes, over the labels that the prompts cover."""
    scores = zero_shot_scores(loaded, test)
    value = mean_defined(aurocs(test, scores)) if scores is not None else float("nan")
    return value if np.isfinite(value) else None


def zero_shot_scores(loaded: ModelFolder, test: Examples) -> np.ndarray | None:
    """Margins (n, L) of the model's own prompts, NaN for labels that they do not cover; None without a prompt head."""
    if PROMPTS not in [one.name for one in list_heads(loaded.path)]:
        return None
    head = usable_head(loaded, PROMPTS)
    if not isinstance(head, PromptHead):
        return None
    with torch.inference_mode():
        margins = head.score_embeddings(torch.from_numpy(test.vectors).to(loaded.model.device)).float().cpu().numpy()
    columns = {name: margins[:, index] for index, name in enumerate(head.names)}
    asked = [columns.get(loaded.labels.resolve(name) or name) for name in test.names]
    return np.stack([np.full(len(test.vectors), np.nan) if column is None else column for column in asked], axis=1)


def own_prompts(loaded: ModelFolder) -> PromptSet:
    """The model's own prompt set, or else the prompt set of its label set, or else templates for any name."""
    if PROMPTS in [one.name for one in list_heads(loaded.path)]:
        path = loaded.path / FOLDER / PROMPTS / "prompts.yaml"
        if path.is_file():
            return load_prompts(path)
    return load_prompts(installed_file(loaded.labels.prompts or "generic", "prompts"))
