"""`ctclip zero-shot`: detect abnormalities in scans with text prompts."""

from __future__ import annotations

from enum import StrEnum
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


class Format(StrEnum):
    csv = "csv"
    parquet = "parquet"


def zero_shot(
    context: typer.Context,
    scans: list[Path] = typer.Argument(
        None, help="Volume files, DICOM folders, folders of these, or quoted patterns such as 'scans/*.nii.gz'."
    ),
    model: list[str] = typer.Option(
        ...,
        "--model",
        "-m",
        help="A model folder, or a name on the Hugging Face Hub. Several: their probabilities are averaged.",
    ),
    store: Path = typer.Option(None, help="Read volumes from this store of `ctclip preprocess` instead of scan files."),
    split: str = typer.Option(None, help="With --store: only this split of the cohort."),
    output: Path = typer.Option(
        Path("predictions"), "--output", "-o", help="Folder for the predictions and embeddings.parquet."
    ),
    format: Format = typer.Option(Format.csv, help="Format of the prediction table."),
    prompts: str = typer.Option(
        None,
        help="A prompt set: a YAML file, or the name of one in configs/prompts. Default: the prompts of the model.",
    ),
    abnormality: list[str] = typer.Option(
        None, help="A finding to detect instead of those in the prompt set, in your own words. May be repeated."
    ),
    head: str = typer.Option(
        None,
        help="The head of the model that computes the scores; `ctclip models --model MODEL` lists them. Default: "
        "prompts.",
    ),
    embed_reports: bool = typer.Option(
        False, "--embed-reports", help="With --store: also embed the reports, for retrieval."
    ),
    batch: int = BATCH,
    precision: Precision = PRECISION,
    processes: int = typer.Option(None, min=1, help="Number of processes that share the scans. Default: one per GPU."),
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
    linkage: Path = LINKAGE,
    force: bool = typer.Option(False, "--force", help="Overwrite the predictions of another run."),
    local_rank: int = typer.Option(0, "--local_rank", hidden=True, help="Set by the DeepSpeed launcher."),
) -> None:
    """Detect abnormalities with text prompts, without labelled training data.

    `ctclip zero-shot --model runs/demo/train/model scan.nii.gz`

    `ctclip zero-shot --model runs/demo/train/model --store store --split valid --output predictions`

    `ctclip zero-shot --model A --model B --store store --output predictions` averages models with the same label set.

    After an interruption the same command resumes where it stopped. Exit code 3: some scans were refused.
    """
    import contextlib

    from ctclip import distributed
    from ctclip.errors import DataError
    from ctclip.inference.run import check_output, detect
    from ctclip.preprocessing.errors import counted
    from ctclip.preprocessing.linkage import check_linkage

    if bool(scans) == (store is not None):
        raise DataError("give either scans or --store")
    if store is not None and linkage is not None:
        raise DataError("--linkage needs scans; for a store, `ctclip preprocess --linkage` writes it")
    if store is None and (split is not None or embed_reports):
        raise DataError(f"{'--split' if split is not None else '--embed-reports'} needs --store")
    if store is not None:
        refuse_unused(context, STORED, *READING)
    if head is not None and (prompts or abnormality):
        raise DataError("--head scores its own findings: leave out --prompts and --abnormality")
    check_output(output)
    if linkage is not None:
        check_linkage(linkage, output)
    if not distributed.launched():
        processes = processes or distributed.gpus()
        if processes > 1:
            raise typer.Exit(distributed.launch(processes, "ctclip.zero_shot", context.obj))
        distributed.say_unused_tasks()

    from ctclip.heads.folder import PROMPTS
    from ctclip.heads.head import Head
    from ctclip.inference.ensemble import detect_together
    from ctclip.inference.model import asking, usable_head
    from ctclip.inference.precision import set_precision
    from ctclip.inference.scans import ScanFiles, Scans, StoredScans
    from ctclip.inference.show import table_of
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    group = distributed.process_group() if distributed.launched() else contextlib.nullcontext(distributed.device())
    with group as device:
        folders = [load_model(one, device) for one in model]
        scorers: list[Head] = []
        sources: list[Scans] = []
        for loaded in folders:
            set_precision(loaded, precision.value)
            scorer = usable_head(loaded, head or PROMPTS)
            if prompts or abnormality:
                scorer = asking(loaded, prompts or scorer.prompts, abnormality or None, scorer)  # type: ignore[attr-defined]
            scorers.append(scorer)
            if store is not None:
                sources.append(StoredScans(VolumeStore(store), split, loaded.spec, loaded.path))
            else:
                reading = loaded.reading(reading_of(hu, geometry, expect, series, largest_gb))
                source = ScanFiles(scans, loaded.spec, **reading)
                if linkage is not None and distributed.is_main():
                    source.link(linkage)
                sources.append(source)
        options = {"batch": batch, "reports": embed_reports, "suffix": f".{format.value}", "force": force}
        if len(model) > 1:
            summary = detect_together(folders, scorers, sources, output, **options)  # type: ignore[arg-type]
        else:
            summary = detect(folders[0], scorers[0], sources[0], output, **options)  # type: ignore[arg-type]
    if distributed.launched_rank() != 0:
        return
    table_of(summary.table(rows=6), scorers[0], summary.volumes)
    for folder in folders:
        print(f"the model was trained on: {folder.trained_on.words()}")
        for caveat in folder.trained_on.caveats():
            print(f"warning: {caveat}")
    for reason in summary.refused.values():
        print(f"refused: {reason}")
    print(f"predictions: {summary.predictions} ({counted(summary.volumes, 'volume')})")
    if summary.refused:
        raise typer.Exit(3)
