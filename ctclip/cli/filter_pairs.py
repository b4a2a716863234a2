"""`ctclip filter-pairs`: find reports that do not match their volume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ctclip.cli.reading import BATCH, EMBEDDINGS, FORCE


def filter_pairs(
    model: str = typer.Option(..., "--model", "-m", help="A model folder whose embeddings are compared."),
    store: Path = typer.Option(..., help="A store written by `ctclip preprocess` with reports."),
    split: str = typer.Option("train", help="Split with the pairs to score."),
    output: Path = typer.Option(Path("pairs"), "--output", "-o", help="Folder for pairs.csv and pairs.html."),
    sides: bool = typer.Option(
        True, "--sides/--no-sides", help="Encode mirror images too, to find reports with left and right exchanged."
    ),
    keep: bool = typer.Option(
        False, "--keep", help="Save the scores in the store, for data.min_pair_score and data.best_pairs."
    ),
    embeddings: Path = EMBEDDINGS,
    batch: int = BATCH,
    seed: int = typer.Option(0, min=0, help="Seed of the folds of patients."),
    force: bool = FORCE,
) -> None:
    """Score every pair of volume and report, to inspect or leave out swapped pairs and exchanged sides.

    `ctclip filter-pairs --model runs/demo/train/model --store store --split train --keep --output pairs`

    `ctclip train --store store data.best_pairs=0.9` then trains without the worst tenth of the pairs.
    """
    from ctclip import distributed
    from ctclip.audit.filter_pairs import TABLES
    from ctclip.audit.filter_pairs import filter_pairs as run
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.outputs import check_folder, made_by_us
    from ctclip.preprocessing.store import VolumeStore

    check_folder(output, made_by_us, "output of `ctclip filter-pairs`")
    loaded = load_model(model, distributed.device())
    pairs, wrong = run(
        loaded,
        VolumeStore(store),
        output,
        split=split,
        sides=sides,
        keep=keep,
        embeddings=embeddings,
        batch=batch,
        seed=seed,
        force=force,
    )
    pair: Any
    for pair in pairs[pairs["note"] == ""].head(10).itertuples():
        sides_words = f", sides {pair.side:.1f}" if pair.side == pair.side else ""
        print(f"{pair.volume}: score {pair.score:.1f} (match {pair.match:.1f}{sides_words})")
    counts = f"{len(pairs)} pairs, {int((pairs['note'] != '').sum())} of them without a report or copies of another"
    if wrong.informative:
        print(
            f"{counts}; about {wrong.swapped:.0%} of the reports seem to belong to another volume, {wrong.exchanged:.0%} to "
            f"exchange left and right"
        )
    else:
        print(f"{counts}; this model does not distinguish their reports, so its scores are meaningless")
    if keep and wrong.informative:
        best = max(0.01, 1 - wrong.wrong)
        print(f"kept in {store}: `ctclip train data.best_pairs={best:.2f}` leaves out as many, those that fit least")
    print(f"table and page: {output} ({', '.join(TABLES)})")
