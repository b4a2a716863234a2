"""`ctclip draft`: the draft of a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ctclip.cli.reading import EXPECT, GEOMETRY, HU, LARGEST_GB, SERIES, Expected, Geometry, Trusted, reading_of

if TYPE_CHECKING:
    from ctclip.drafting.drafter import Drafting
    from ctclip.inference.model import Model


DRAFTS = Path("drafts.csv")


def draft(
    scan: Path = typer.Argument(None, help="A volume file, a DICOM folder, or an archive of one of these."),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    method: str = typer.Option(
        None,
        help="caption: a caption head writes; retrieval: the report of the nearest scan of --index; template: a sentence for "
        "each finding of the detector. Default: caption if the model has a caption head, else retrieval if --index is "
        "given, else template.",
    ),
    head: str = typer.Option(None, help="caption: the name of the caption head. Default: the first of the model."),
    prompted: bool = typer.Option(False, "--prompted", help="caption: write about the findings of the detector."),
    beams: int = typer.Option(
        1, min=1, max=64, help="caption: number of beams; 1 takes the most likely word each time."
    ),
    nucleus: float = typer.Option(
        None, min=0.01, max=1, help="caption: draw words from the most likely ones that together have this probability."
    ),
    seed: int = typer.Option(0, min=0, help="Seed of --nucleus."),
    detector: str = typer.Option("prompts", help="The head that checks the sentences, calibrated if possible."),
    index: Path = typer.Option(None, help="retrieval: the folder written by `ctclip index`."),
    store: Path = typer.Option(
        None, help="Instead of a scan: draft the volumes of this store into a table for `ctclip evaluate --reports`."
    ),
    split: str = typer.Option("valid", help="The split of --store."),
    count: int = typer.Option(None, min=1, help="Draft only the first volumes of --store."),
    terms: str = typer.Option(
        None,
        help="A YAML file of terms, or the name of one in configs/terms. Default: the terms of the model's label set.",
    ),
    language: str = typer.Option("english", help="A YAML file, or the name of one in configs/languages."),
    output: Path = typer.Option(
        None, "--output", "-o", help="draft.json or draft.txt; with --store, drafts.csv. Default: print only."
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite a file that is not a draft."),
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
) -> None:
    """Draft a report: findings and impression, each sentence with the probability of what it claims and its place.

    `ctclip draft scan.nii.gz --model model --output draft.json`

    `ctclip draft --store store --split valid --model model --method retrieval --index index --output drafts.csv`

    A sentence that the detector denies is marked with [!]. For research only, not for diagnosis.
    """
    from ctclip import distributed
    from ctclip.drafting.draft import check_output
    from ctclip.drafting.drafter import Drafting, Method
    from ctclip.drafting.store import check_drafts
    from ctclip.errors import DataError
    from ctclip.heads.caption import Decoding
    from ctclip.inference.model import load

    if (scan is None) == (store is None):
        raise DataError("give either a scan or --store")
    if beams > 1 and nucleus is not None:
        raise DataError("give either --beams or --nucleus")
    settings = Drafting(Method.named(method), head, index, prompted, Decoding(beams, nucleus, seed), terms, language)
    if store is not None:
        check_drafts(output or DRAFTS, force=force)
        _draft_store(load(model, distributed.device()), settings, detector, store, split, count, output, force)
        return
    if output is not None:
        check_output(output, force=force)
    loaded = load(model, distributed.device())
    drafter = loaded.drafter(settings, detector)
    ready = loaded.prepare(scan, **reading_of(hu, geometry, expect, series, largest_gb))
    warnings = (*ready.warnings, *loaded.folder.trained_on.caveats())
    drafted = drafter.draft(ready, Path(ready.scan.source).name, warnings)
    print(drafted)
    if output is not None:
        print(f"draft: {drafted.save(output, force=force)}")
    if not drafter.detector.thresholds():
        print("note: the detector is not calibrated: findings are called at 0.5; run `ctclip calibrate`")


def _draft_store(
    loaded: Model, settings: Drafting, detector: str, store: Path, split: str, count: int | None, output: Path | None,
    force: bool,
) -> None:  # fmt: skip
    from ctclip.drafting.store import draft_store, write_drafts
    from ctclip.inference.scans import StoredScans
    from ctclip.preprocessing.store import VolumeStore

    output = output or DRAFTS
    drafter = loaded.drafter(settings, detector)
    scans = StoredScans(VolumeStore(store), split, loaded.spec, loaded.folder.path)
    refused: dict[str, str] = {}
    table = draft_store(loaded.folder, drafter.detector, drafter.writer, scans, drafter.words, refused, count=count)
    write_drafts(table, output, force=force)
    for reason in refused.values():
        print(f"refused: {reason}")
    print(f"drafts: {output} ({len(table)} volumes, {drafter.words})")
    if refused:
        raise typer.Exit(3)
