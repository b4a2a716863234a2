"""The scores that rank volumes: the uncalibrated margins of a model."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ctclip.evaluation.protocol import Protocol
from ctclip.evaluation.tables import MARGIN


def ranking_scores(predictions: pd.DataFrame, protocol: Protocol) -> np.ndarray:
    """Scores (n, labels): the margin of each label if the table has it, else its probability.

    AUROC, average precision and paired tests use these, because calibration cannot improve a ranking, and a calibration
    fitted to few volumes may reverse one. ``predictions``: rows returned by ``align``. If a protocol defines a label as
    the maximum of several scores, the maximum of their margins is used.
    """
    columns = []
    for name in protocol.labels:
        margins = [f"{MARGIN}{part}" for part in protocol.scores.get(name, (name,))]
        present = all(column in predictions.columns for column in margins)
        columns.append(predictions[margins if present else [name]].max(axis=1).to_numpy(dtype=float))
    return np.stack(columns, axis=1)
