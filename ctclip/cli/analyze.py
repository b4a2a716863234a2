"""`ctclip analyze`: the geometry of a model's embeddings, and its relation to accuracy."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.reading import BATCH, EMBEDDINGS


def analyze(
    model: list[str] = typer.Option(
        ...,
        "--model",
        "-m",
        help="A model folder, or a run folder of `ctclip train`: then the untrained model, every saved checkpoint "
        "and the trained model are compared. May be repeated.",
    ),
    store: Path = typer.Option(..., help="A store written by `ctclip preprocess` with reports."),
    split: str = typer.Option("valid", help="Split to embed, with the first volume of each scan."),
    output: Path = typer.Option(Path("analysis"), "--output", "-o", help="Folder for analysis.json and analysis.html."),
    embeddings: Path = EMBEDDINGS,
    batch: int = BATCH,
    force: bool = typer.Option(False, "--force", help="Overwrite the analysis of another run."),
) -> None:
    """Measure the modality gap, cones, alignment, uniformity, effective rank and neighbours of embeddings.

    `ctclip analyze --model runs/demo/train/model --store store --split valid --output analysis`

    `ctclip analyze --model runs/demo/train --store store` compares the untrained model, checkpoints and the trained model.
    """
    from ctclip import distributed
    from ctclip.audit.analyze_page import TABLES, numbers_table, write_analysis
    from ctclip.preprocessing.outputs import check_folder, made_by_us
    from ctclip.preprocessing.store import VolumeStore

    check_folder(output, made_by_us, "output of `ctclip analyze`")
    analyses = write_analysis(
        model,
        VolumeStore(store),
        output,
        distributed.device(),
        split=split,
        embeddings=embeddings,
        batch=batch,
        force=force,
    )
    for analysis in analyses:
        head, row = numbers_table([analysis.facts])
        print(f"{row[0]}: {', '.join(f'{name} {value}' for name, value in zip(head[1:], row[1:], strict=True))}")
        if points := analysis.facts.get("shift"):
            best = max(points, key=lambda point: point["mean_auroc"])
            now = next(point for point in points if point["share"] == 0)
            print(
                f"  mean AUROC {now['mean_auroc']:.3f}; {best['mean_auroc']:.3f} with {best['share']:.0%} of the gap closed"
            )
    print(f"page and numbers: {output} ({', '.join(TABLES)})")
