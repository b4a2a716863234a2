"""`ctclip audit`: doubles in a cohort, what differs between groups of it, and where a model errs."""

from __future__ import annotations

from pathlib import Path

import typer

audit = typer.Typer(help="Look inside a cohort or a model before trusting a figure.", no_args_is_help=True)


@audit.command("doubles")
def doubles(
    store: Path = typer.Option(..., help="A store of `ctclip preprocess`."),
    split: str = typer.Option(None, help="Only this split of the cohort. Default: all, so that leaks are seen."),
    model: str = typer.Option(
        None, "--model", "-m", help="Also compare the nearest neighbours in this model's embeddings."
    ),
    output: Path = typer.Option(
        Path("doubles"), "--output", "-o", help="Folder for doubles.csv, recurring_reports.csv and doubles.html."
    ),
    batch: int = typer.Option(8, min=1, help="With --model: volumes encoded at once."),
    force: bool = typer.Option(False, "--force", help="Replace the tables of another run."),
) -> None:
    """Find volumes that are in a cohort twice, in two splits or under two patients, and reports that recur.

    `ctclip audit doubles --store store --output doubles`

    Copies are found after resampling, added noise, cropping, and with reversed slices. Reconstructions of one scan are
    not compared.
    """
    from ctclip import distributed
    from ctclip.adaptation.examples import cached_embeddings
    from ctclip.audit.doubles_page import TABLES, write_doubles
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    opened = VolumeStore(store)
    embeddings = None
    if model is not None:
        loaded = load_model(model, distributed.device())
        scans = StoredScans(opened, split, loaded.spec, loaded.path)
        embeddings = cached_embeddings(loaded, scans, output.with_name(f"{output.name}_embeddings"), batch)
    result = write_doubles(opened, output, split=split, embeddings=embeddings, force=force)
    pairs = result.pairs
    for pair in pairs.head(10).itertuples():
        print(f"{pair.first} and {pair.second}: {pair[9]}, correlation {pair.correlation:.2f}")
    if len(pairs) > 10:
        print(f"... and {len(pairs) - 10} more")
    print(f"{len(pairs)} pairs of copies among {result.volumes} volumes; {len(result.reports)} reports recur")
    print(f"tables and page: {output} ({', '.join(TABLES)})")
