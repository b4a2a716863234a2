"""`ctclip embed`: embeddings of volumes or reports."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.reading import (
    BATCH,
    EXPECT,
    GEOMETRY,
    HU,
    LARGEST_GB,
    LINKAGE,
    PRECISION,
    SERIES,
    Expected,
    Geometry,
    Precision,
    Trusted,
    reading_of,
)
from ctclip.cli.unused import READING, STORED, refuse_unused


def embed(
    context: typer.Context,
    scans: list[Path] = typer.Argument(
        None, help="Volume files, DICOM folders, folders of these, or quoted patterns such as 'scans/*.nii.gz'."
    ),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    store: Path = typer.Option(None, help="Read volumes from this store of `ctclip preprocess` instead of scan files."),
    split: str = typer.Option(None, help="With --store: only this split of the cohort."),
    reports: Path = typer.Option(
        None,
        help="Embed reports instead of volumes: a .txt file with one report per line, or a CSV file with a text "
        "column, findings and impression columns, or CT-RATE's columns.",
    ),
    output: Path = typer.Option(
        Path("embeddings.parquet"),
        "--output",
        "-o",
        help="Output file. .parquet: names and vectors; .npy: vectors only.",
    ),
    batch: int = BATCH,
    precision: Precision = PRECISION,
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
    linkage: Path = LINKAGE,
    force: bool = typer.Option(False, "--force", help="Overwrite the embeddings of another run."),
) -> None:
    """Embed volumes or reports as unit vectors in the shared space of volumes and texts.

    `ctclip embed --model runs/demo/train/model --store store --split valid --output valid.parquet`

    `ctclip embed --model runs/demo/train/model --reports reports.csv --output reports.npy`
    """
    from ctclip import distributed
    from ctclip.errors import DataError
    from ctclip.inference.embed import check_embeddings, embed_reports, embed_scans
    from ctclip.inference.precision import set_precision
    from ctclip.inference.scans import ScanFiles, Scans, StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.linkage import check_linkage
    from ctclip.preprocessing.store import VolumeStore

    if bool(scans) + (store is not None) + (reports is not None) != 1:
        raise DataError("give exactly one of: scans, --store, --reports")
    if output.suffix not in (".parquet", ".npy"):
        raise DataError(f"{output}: end the name in .parquet or .npy")
    if linkage is not None and not scans:
        raise DataError("--linkage needs scans; for a store, `ctclip preprocess --linkage` writes it")
    if store is None:
        refuse_unused(context, "needs --store", "split")
    if store is not None:
        refuse_unused(context, STORED, *READING)
    if reports is not None:
        refuse_unused(context, "applies to volumes, not to reports", *READING, "batch")
    check_embeddings(output, force=force)
    if linkage is not None:
        check_linkage(linkage, output)
    loaded = load_model(model, distributed.device())
    set_precision(loaded, precision.value)
    refused: dict[str, str] = {}
    if reports is not None:
        count = embed_reports(loaded, reports, output, force=force)
    else:
        source: Scans
        if store is not None:
            source = StoredScans(VolumeStore(store), split, loaded.spec, loaded.path)
        else:
            reading = loaded.reading(reading_of(hu, geometry, expect, series, largest_gb))
            source = ScanFiles(scans, loaded.spec, **reading)
            if linkage is not None:
                source.link(linkage)
        count = embed_scans(loaded, source, output, batch, refused, force=force)
    for reason in refused.values():
        print(f"refused: {reason}")
    print(f"embeddings: {output} ({count} rows of {loaded.model.config.dim})")
    if refused:
        raise typer.Exit(3)
