"""Tables that several commands print."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from ctclip.heads.head import Head


def print_settings(title: str, summary: pd.DataFrame, zero_shot: float | None) -> None:
    """Print one row for each setting of ``ctclip.adaptation.protocol.summary``, below the AUROC of the prompts without labels."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title)
    for head in ("labels used", "patients", "volumes", "draws", "mean AUROC", "95 % interval over draws"):
        grid.add_column(head, justify="left" if head == "labels used" else "right")
    if zero_shot is not None:
        grid.add_row("none (prompts)", "0", "0", "", f"{zero_shot:.3f}", "")
    for record in summary.to_dict("records"):
        row = SimpleNamespace(**{str(key): value for key, value in record.items()})
        interval = f"{row.lower:.3f} to {row.upper:.3f}" if row.draws > 1 else ""
        grid.add_row(
            str(row.setting),
            f"{row.patients:.0f}",
            f"{row.volumes:.0f}",
            str(row.draws),
            f"{row.mean_auroc:.3f}",
            interval,
        )
    console = Console()
    Console(width=max(console.width, 90)).print(grid)


def print_contexts(head: Head, most: int = 12) -> None:
    """Print the words nearest to each learned vector of the first prompts, with the label's own name in brackets."""
    from ctclip.heads.contexts import ContextHead, prompts_in_words

    if not isinstance(head, ContextHead):
        return
    texts = prompts_in_words(head)
    print("words nearest to the learned vectors (the label's name in brackets):")
    for text in texts[:most]:
        print(f"  {text}")
    if len(texts) > most:
        print(f"  ... and {len(texts) - most} more")
