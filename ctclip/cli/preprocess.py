"""`ctclip preprocess`: a cohort on disk to a store of model-ready volumes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ctclip.preprocessing.pipeline import Outcome


SHOWN = 20


class Trusted(StrEnum):
    auto = "auto"
    file = "trust-file"
    table = "trust-table"


class Expected(StrEnum):
    any = "any"
    chest = "chest"


def preprocess(
    cohort: Path = typer.Argument(
        ...,
        help="CT-RATE's or RAD-ChestCT's folder, a folder of volumes or DICOM series, a CSV with a `path` column, or one scan.",
    ),
    output: Path = typer.Option(..., "--output", "-o", help="The store; volumes already in it are kept."),
    spec: str = typer.Option("ct_224", help="A YAML file, or the name of one in configs/preprocessing."),
    workers: int = typer.Option(None, help="Processes; all cores if not given."),
    layout: str = typer.Option("auto", "--cohort", help="How it lies on disk: auto, ct-rate, rad-chestct or folder."),
    hu: Trusted = typer.Option(Trusted.auto, help="Whom to believe about Hounsfield units."),
    expect: Expected = typer.Option(Expected.any, help="Refuse what is not a chest."),
    series: str = typer.Option(
        None,
        help="SeriesInstanceUID to take of a DICOM folder of several; else the original axial one with most slices.",
    ),
    labels: str = typer.Option(
        None,
        help="Label set: a YAML file, or the name of one in configs/labels; made of the label columns if not given.",
    ),
    shard: str = typer.Option("1/1", help="i/n: take every n-th volume from the i-th on, for job arrays."),
    merge: bool = typer.Option(False, "--merge", help="Join the outcomes of all shards; no volume is read."),
    calibration: float = typer.Option(
        0.0, min=0.0, max=0.9, help="Share of the training patients to hold out as the split `calibration`."
    ),
    partial: bool = typer.Option(
        False,
        "--partial",
        help="Take what is there: volumes without a report without text, reports without a volume not.",
    ),
    verify: bool = typer.Option(
        False, "--verify", help="Check every stored volume, set damaged ones aside, rebuild them."
    ),
) -> None:
    """Bring every volume of a cohort to one geometry and keep it in a store.

    Exit code 0: all done; 3: some refused (see outcomes.csv in the store); 2: could not run.

    `ctclip preprocess CT-RATE --output store --spec ct_224`
    """
    from ctclip.labels import keep_labels, load_labels
    from ctclip.preprocessing.pipeline import (
        Options,
        merge_shards,
        outcomes_name,
        preprocess_cohort,
        quarantine_damaged,
    )
    from ctclip.preprocessing.spec import PreprocessingSpec
    from ctclip.preprocessing.store import VolumeStore

    if labels is not None:
        load_labels(labels)  # what is wrong with it is said before hours of work
    if merge:
        _said(merge_shards(output), output / outcomes_name())
        return
    if verify:
        for damaged in quarantine_damaged(output):
            print(f"damaged, set aside, rebuilding: {damaged}")
    outcomes = preprocess_cohort(
        cohort,
        output,
        PreprocessingSpec.load(spec),
        layout=layout,
        options=Options(trust=hu.value, expect=expect.value, series=series),
        workers=workers,
        shard=_shard(shard),
        calibration=calibration,
        partial=partial,
    )
    kept = keep_labels(VolumeStore(output), labels)
    if kept is not None:
        print(f"label set: {kept.name} ({len(kept.names)} labels)")
    _said(outcomes, output / outcomes_name(_shard(shard)))


def _said(outcomes: list[Outcome], table: Path) -> None:
    refused = [outcome for outcome in outcomes if outcome.refused]
    for outcome in refused[:SHOWN]:
        print(f"refused {outcome.volume}: {outcome.refused}")
    if len(refused) > SHOWN:
        print(f"... and {len(refused) - SHOWN} more")
    print(f"{len(outcomes) - len(refused)} done, {len(refused)} refused; each with its reason: {table}")
    if refused:
        raise typer.Exit(3)


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise typer.BadParameter(f"{text!r}: write it as i/n with i from 1 to n, for example 3/16")
    return int(part), int(parts)
