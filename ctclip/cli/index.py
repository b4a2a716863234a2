"""`ctclip index` and `ctclip similar`: which earlier scans are like this one."""

from __future__ import annotations

from pathlib import Path

import typer


def index(
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a hub name."),
    store: Path = typer.Option(..., help="The store whose volumes and reports are indexed."),
    split: str = typer.Option(None, help="One split of the cohort."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the index."),
    batch: int = typer.Option(8, min=1, help="Volumes encoded at once."),
    force: bool = typer.Option(False, "--force", help="Replace an index of another run."),
) -> None:
    """Index the volumes and reports of a store for `ctclip similar`.

    `ctclip index --model runs/demo/train/model --store store --split train --output index`
    """
    from ctclip import distributed, extras
    from ctclip.inference.index import check_output, index_store
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    extras.check("index")
    check_output(output)
    loaded = load_model(model, distributed.device())
    scans = StoredScans(VolumeStore(store), split, loaded.spec, loaded.path)
    refused: dict[str, str] = {}
    made = index_store(loaded, scans, output, batch, refused, force=force)
    for reason in refused.values():
        print(f"refused: {reason}")
    print(f"index: {output} ({len(made.rows)} volumes)")
    if refused:
        raise typer.Exit(3)


def similar(
    scan: Path = typer.Argument(None, help="A volume file or DICOM folder."),
    text: str = typer.Option(None, help="Find volumes for this text instead of a scan."),
    model: str = typer.Option(None, "--model", "-m", help="The model the index was made with, if it has moved."),
    index: Path = typer.Option(..., help="Folder of `ctclip index`."),
    count: int = typer.Option(5, "--count", "-k", min=1, help="Scans and reports to show."),
    output: Path = typer.Option(None, "--output", "-o", help="Write them as CSV as well."),
) -> None:
    """The scans and reports of an index that are nearest to a scan, or to a text.

    `ctclip similar scan.nii.gz --index index`

    `ctclip similar --text "Large right pleural effusion." --index index`
    """
    import pandas as pd

    from ctclip.errors import DataError
    from ctclip.evaluation.tables import write_predictions
    from ctclip.inference.index import Index, index_facts
    from ctclip.inference.model import load
    from ctclip.inference.show import neighbours

    if (scan is None) == (text is None):
        raise DataError("give either a scan or --text")
    made_with = str(index_facts(index).get("path", ""))
    if model is None and not Path(made_with).is_dir():
        raise DataError(f"{index}: made with the model {made_with}, which is no longer there; name it with --model")
    loaded = load(model or made_with)
    opened = Index.load(index, loaded.folder.hash)
    query = loaded.embed(scan) if scan is not None else loaded.encode_text([text])[0].numpy()
    scans, reports = opened.similar(query, count), opened.similar(query, count, reports=True)
    neighbours("Nearest scans", scans)
    neighbours("Nearest reports", reports)
    if output is not None:
        write_predictions(output, pd.concat([scans.assign(nearest="scan"), reports.assign(nearest="report")]))
        print(f"written: {output}")
