"""Where zero-shot performance is lost: linear probes on the embeddings of both encoders: ``python -m
tests.benchmarks.probe runs/demo``.

Logistic regression on the held-out volumes, cross-validated over patients. A probe of report embeddings shows what the
text encoder represents, a probe of volume embeddings what the volume encoder represents; the rest is lost by the
prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from ctclip.phantom.prevalence import FINDINGS
from tests.benchmarks.common import table


def probe(vectors: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> float:
    """AUROC of out-of-fold decisions, five folds of patients."""
    scores = cross_val_predict(
        LogisticRegression(max_iter=1000),
        vectors,
        labels,
        groups=patients,
        cv=GroupKFold(5),
        method="decision_function",
    )
    return float(roc_auc_score(labels, scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("demo", type=Path, help="a finished `ctclip demo`")
    folder = parser.parse_args().demo
    held = pd.read_parquet(folder / "predictions" / "embeddings.parquet").merge(
        pd.read_parquet(folder / "store" / "cohort.parquet"), on="volume"
    )
    zero_shot = json.loads((folder / "metrics.json").read_text())["zero_shot"]["auroc"]
    rows, patients = [], held["patient"].to_numpy()
    for label in FINDINGS:
        known = held[label].astype(int).to_numpy()
        probes = [
            probe(np.stack(held[f"{side}_embedding"].to_list()), known, patients) for side in ("report", "volume")
        ]
        rows.append([zero_shot[label]["value"], *probes])
    shown = [[label, *(f"{value:.3f}" for value in row)] for label, row in zip(FINDINGS, rows, strict=True)]
    shown.append(["mean", *(f"{value:.3f}" for value in np.mean(rows, axis=0))])
    print(table("AUROC", ["", "zero-shot", "probe of the reports", "probe of the volumes"], shown))


if __name__ == "__main__":
    main()
