"""Tables that several commands print."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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


def print_report_scores(result: dict[str, Any]) -> None:
    """Print what ``ctclip.evaluation.run_reports`` returns."""
    from rich.console import Console
    from rich.table import Table

    from ctclip.evaluation.pages import number

    names = {"macro_f1": "macro F1", "micro_f1": "micro F1", "crg": "CRG", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "meteor": "METEOR"}  # fmt: skip
    ours = result["results"]["drafts"]["scores"]
    grid = Table(title=f"{result['volumes']} volumes of {result['patients']} patients")
    grid.add_column("reports")
    for name in ours:
        grid.add_column(names[name], justify="right")
    for name, one in result["results"].items():
        grid.add_row(name, *(number(one["scores"].get(metric, {}).get("value")) for metric in ours))
    Console(width=max(Console().width, 100)).print(grid)
    low, high = ours["macro_f1"]["lower"], ours["macro_f1"]["upper"]
    print(f"macro F1 {number(ours['macro_f1']['value'])} ({number(low)} to {number(high)})")
    sides = result["results"]["drafts"]["sides"]
    print(
        f"sides: {sides['named']} sentences name a side, {sides['compared']} of them can be compared, {sides['wrong']} "
        f"name the "
        "wrong side"
    )
    if result["without_report"]:
        print(f"note: {result['without_report']} drafts have no report to compare with in the store")
    if result["empty_drafts"]:
        print(f"note: {result['empty_drafts']} drafts are empty")
    if "bleu_4" not in ours:
        print('note: BLEU-4 and ROUGE-L are not computed: pip install "ctclip[reports]"')
    elif ours["meteor"]["value"] is None:
        print("note: METEOR is not computed: it needs NLTK's WordNet (`python -m nltk.downloader wordnet`)")
    if not result["trusted"]:
        print("note: there are too few patients for reliable intervals")
