"""`ctclip index` and `ctclip similar`: find earlier scans that resemble this one."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.reading import (
    BATCH,
    EXPECT,
    GEOMETRY,
    HU,
    LARGEST_GB,
    PRECISION,
    SERIES,
    Expected,
    Geometry,
    Precision,
    Trusted,
    reading_of,
)
from ctclip.cli.unused import READING, refuse_unused


def index(
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    store: Path = typer.Option(..., help="The store with the volumes and reports to index."),
    split: str = typer.Option(None, help="Only this split of the cohort."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder for the index."),
    batch: int = BATCH,
    precision: Precision = PRECISION,
    force: bool = typer.Option(False, "--force", help="Overwrite the index of another run."),
) -> None:
    """Build an index of the volumes and reports in a store, for `ctclip similar`.

    `ctclip index --model runs/demo/train/model --store store --split train --output index`
    """
    from ctclip import distributed, extras
    from ctclip.inference.index import check_output, index_store
    from ctclip.inference.precision import set_precision
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    extras.check("index")
    check_output(output)
    loaded = load_model(model, distributed.device())
    set_precision(loaded, precision.value)
    scans = StoredScans(VolumeStore(store), split, loaded.spec, loaded.path)
    refused: dict[str, str] = {}
    content = index_store(loaded, scans, output, batch, refused, force=force)
    for reason in refused.values():
        print(f"refused: {reason}")
    print(f"index: {output} ({len(content.rows)} volumes)")
    if refused:
        raise typer.Exit(3)


def similar(
    context: typer.Context,
    scan: Path = typer.Argument(None, help="A volume file, a DICOM folder, or an archive of one of these."),
    text: str = typer.Option(None, help="A text to search for, instead of a scan."),
    plus: list[str] = typer.Option(
        None,
        help="Find scans like this one, but with this finding, such as 'Pleural effusion is seen.' May be repeated.",
    ),
    minus: list[str] = typer.Option(None, help="Find scans like this one, but without this finding. May be repeated."),
    weight: float = typer.Option(1.0, min=0.0, help="Weight of --plus and --minus relative to the scan."),
    model: str = typer.Option(
        None, "--model", "-m", help="The model that the index was built with. Needed only if its folder has moved."
    ),
    index: Path = typer.Option(..., help="The folder written by `ctclip index`."),
    count: int = typer.Option(5, "--count", "-k", min=1, help="Number of scans and of reports to show."),
    output: Path = typer.Option(None, "--output", "-o", help="Also write the results to this CSV file."),
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
) -> None:
    """Show the scans and reports of an index that are most similar to a scan or to a text.

    `ctclip similar scan.nii.gz --index index`

    `ctclip similar --text "Large right pleural effusion." --index index`

    `ctclip similar scan.nii.gz --plus "Pleural effusion is seen." --minus "A nodule is seen." --index index`
    """
    import pandas as pd

    from ctclip.errors import DataError
    from ctclip.evaluation.retrieval import compose
    from ctclip.evaluation.tables import write_predictions
    from ctclip.inference.index import Index, index_facts
    from ctclip.inference.model import load
    from ctclip.inference.show import neighbours
    from ctclip.preprocessing.outputs import check_file, file_holds

    if output is not None:
        check_file(output, file_holds(b",nearest"))
    if (scan is None) == (text is None):
        raise DataError("give either a scan or --text")
    if scan is None and (plus or minus):
        raise DataError("--plus and --minus need a scan")
    if scan is None:
        refuse_unused(context, "applies to a scan, not to --text", *READING)
    if not (plus or minus):
        refuse_unused(context, "needs --plus or --minus", "weight")
    model_path = str(index_facts(index).get("path", ""))
    if model is None and not Path(model_path).is_dir():
        raise DataError(
            f"{index}: built with the model {model_path}, which is no longer there; give its folder with --model"
        )
    loaded = load(model or model_path)
    opened = Index.load(index, loaded.folder.hash)
    reading = reading_of(hu, geometry, expect, series, largest_gb)
    query = loaded.embed(scan, **reading) if scan is not None else loaded.encode_text([text])[0].numpy()
    if plus or minus:
        added, removed = (
            [loaded.encode_text([words])[0].float().numpy() for words in side or []] for side in (plus, minus)
        )
        query = compose(query, added, removed, weight=weight)
    scans, reports = opened.similar(query, count), opened.similar(query, count, reports=True)
    neighbours("Nearest scans", scans)
    neighbours("Nearest reports", reports)
    if output is not None:
        write_predictions(output, pd.concat([scans.assign(nearest="scan"), reports.assign(nearest="report")]))
        print(f"written: {output}")
