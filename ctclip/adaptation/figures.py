"""The curve of a probe: mean AUROC against the number of labelled patients."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ctclip.evaluation.figures import BAR, CONTROL
from ctclip.preprocessing.files import written_beside


def label_curve(path: Path, method: str, summary: pd.DataFrame, zero_shot: float | None) -> None:
    """``summary`` as ``protocol.summary`` gives it; ``zero_shot``: mean AUROC without any label."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axis = figure.subplots()
    shares = summary["setting"].str.endswith("%")
    # Shots count patients per class and label, percentages all patients, so they are two curves.
    for kind, colour, part in (
        ("percentage of the patients", BAR, summary[shares]),
        ("shots per label", CONTROL, summary[~shares]),
    ):
        table = part.sort_values("patients")
        if table.empty:
            continue
        axis.plot(table["patients"], table["mean_auroc"], "o-", color=colour, label=f"{method}, {kind}", lw=1.4, ms=5)
        drawn = table.dropna(subset=["lower"])
        axis.vlines(
            drawn["patients"], drawn["lower"].clip(0, 1), drawn["upper"].clip(0, 1), color=colour, alpha=0.35, lw=5
        )
        for row in table.itertuples():
            axis.annotate(str(row.setting), (row.patients, row.mean_auroc), textcoords="offset points", xytext=(7, -9), fontsize=7, color="0.3")  # fmt: skip
    if zero_shot is not None:
        axis.axhline(zero_shot, color="0.45", lw=0.9, ls="--", label=f"prompts, no labels ({zero_shot:.3f})")
    axis.axhline(0.5, color="0.85", lw=0.8)
    axis.set_xscale("log")
    axis.margins(x=0.08)
    axis.set_xlabel("labelled patients used")
    axis.set_ylabel("mean AUROC on held-out patients")
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    with written_beside(path, suffix=".png") as partial:
        figure.savefig(partial, dpi=130, format="png")
