"""`ctclip preprocess`: turn a cohort on disk into a store of model-ready volumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ctclip.cli.reading import (
    EXPECT,
    GEOMETRY,
    HU,
    LARGEST_GB,
    LINKAGE,
    SERIES,
    Expected,
    Geometry,
    Trusted,
    reading_of,
)
from ctclip.cli.unused import refuse_unused

if TYPE_CHECKING:
    from ctclip.preprocessing.cohort_run import Report
    from ctclip.preprocessing.outcomes import Outcome


SHOWN, SHOWN_KINDS = 20, 6


def preprocess(
    context: typer.Context,
    cohort: Path = typer.Argument(
        ...,
        help="The folder of CT-RATE or RAD-ChestCT, a folder of volumes or DICOM series, a CSV, TSV or Parquet table "
        "with a `path` column, or one scan.",
    ),
    output: Path = typer.Option(
        ..., "--output", "-o", help="Folder for the store. Volumes that are already in it are kept."
    ),
    spec: str = typer.Option("ct_224", help="A YAML file, or the name of one in configs/preprocessing."),
    workers: int = typer.Option(None, help="Number of worker processes. Default: one per core."),
    layout: str = typer.Option(
        "auto",
        help="Layout of the cohort on disk: auto, ct-rate, rad-chestct, folder, or your own reader as module:function.",
    ),
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
    linkage: Path = LINKAGE,
    label_set: str = typer.Option(
        None,
        help="A label set: a YAML file, or the name of one in configs/labels. Default: created from the label columns "
        "of the cohort.",
    ),
    shard: str = typer.Option("1/1", help="i/n: process every n-th volume, starting with the i-th. For job arrays."),
    merge: bool = typer.Option(False, "--merge", help="Join the outcome tables of all shards. No volume is read."),
    calibration_fraction: float = typer.Option(
        0.0,
        min=0.0,
        max=0.9,
        help="Fraction (0 to 0.9) of the training patients to hold out as a split named `calibration`.",
    ),
    partial: bool = typer.Option(
        False,
        "--partial",
        help="Accept an incomplete cohort: volumes without a report are stored without text, and reports without a "
        "volume are ignored.",
    ),
    keep_no_chest: bool = typer.Option(
        False, "--keep-no-chest", help="Keep the volumes that CT-RATE lists as showing no chest."
    ),
    verify: bool = typer.Option(
        False, "--verify", help="Check every stored volume first; set damaged ones aside and rebuild them."
    ),
) -> None:
    """Resample every volume of a cohort to one geometry and write it to a store.

    Exit code 0: every volume was stored or left out by a rule. 3: some volumes were refused; outcomes.csv in the store gives
    the reasons. 2: the command could not run.

    `ctclip preprocess CT-RATE --output store --spec ct_224`
    """
    from ctclip.labels import expected, keep_labels, label_columns_of, load_labels
    from ctclip.preprocessing.cohort_run import Report, merge_shards, preprocess_cohort, quarantine_damaged
    from ctclip.preprocessing.doubles import double_notes
    from ctclip.preprocessing.outcomes import outcomes_name
    from ctclip.preprocessing.spec import PreprocessingSpec
    from ctclip.preprocessing.store import VolumeStore

    if merge:
        refuse_unused(
            context, "does not apply to --merge, which reads no volume", "shard", "workers", "verify", "linkage"
        )
    # Refuse a bad label set before hours of work.
    labels = load_labels(label_set) if label_set is not None else None
    columns = label_columns_of(cohort, labels) if labels is not None else None
    reading = reading_of(hu, geometry, expect, series, largest_gb)
    if labels is not None:
        reading["expect"] = expected(labels.body_part, reading["expect"])
    if merge:
        store = VolumeStore(output)
        _tell(Report(merge_shards(output), double_notes(store, store.cohort), {}), output / outcomes_name())
        return
    if verify:
        for damaged in quarantine_damaged(output):
            print(f"damaged: {damaged}; set aside, will be rebuilt")
    report = preprocess_cohort(
        cohort,
        output,
        PreprocessingSpec.load(spec),
        layout=layout,
        reading=reading,
        workers=workers,
        shard=_shard(shard),
        calibration=calibration_fraction,
        partial=partial,
        keep_no_chest=keep_no_chest,
        labels=columns,
        linkage=linkage,
    )
    kept = keep_labels(VolumeStore(output), label_set)
    if kept is not None:
        print(f"label set: {kept.name} ({len(kept.names)} labels)")
    _tell(report, output / outcomes_name(_shard(shard)))


def _tell(report: Report, table: Path) -> None:
    refused = [outcome for outcome in report.outcomes if outcome.refused]
    for outcome in refused[:SHOWN]:
        print(f"refused {outcome.volume}: {outcome.refused}")
    if len(refused) > SHOWN:
        print(f"... and {len(refused) - SHOWN} more")
    warned = _warned(report.outcomes)
    for volume, warnings in list(warned.items())[:SHOWN]:
        print(f"warning {volume}: {'; '.join(warnings)}")
    if len(warned) > SHOWN:
        print(f"... and warnings of {len(warned) - SHOWN} more")
    for note in report.notes:
        print(f"note: {note}")
    print(_summary(report.outcomes, report.unused, table))
    if refused:
        raise typer.Exit(3)


def _warned(outcomes: list[Outcome]) -> dict[str, list[str]]:
    """Warnings by volume. Values that are already in HU, as in CT-RATE's second release, cause no warning."""
    from ctclip.preprocessing.hounsfield import ALREADY_HU

    warnings = {o.volume: [warning for warning in o.warnings if warning != ALREADY_HU] for o in outcomes}
    return {volume: several for volume, several in warnings.items() if several}


def _summary(outcomes: list[Outcome], unused: dict[str, int], table: Path) -> str:
    """The last line: counts of volumes by outcome, and of unused files."""
    counts = {word: sum(outcome.word == word for outcome in outcomes) for word in ("done", "refused", "left out")}
    words = [f"{counts['done']} done", f"{counts['refused']} refused"]
    if counts["left out"]:
        words.append(f"{counts['left out']} left out (listed as showing no chest; --keep-no-chest keeps them)")
    warned = len(_warned(outcomes))
    line = f"{', '.join(words)}, {warned} with warnings" if warned else ", ".join(words)
    line += f"; reasons and warnings are in {table}"
    if not unused:
        return line
    kinds = sorted(unused.items(), key=lambda kind: (-kind[1], kind[0]))
    listed = ", ".join(f"{kind}: {count}" for kind, count in kinds[:SHOWN_KINDS])
    others = sum(count for _, count in kinds[SHOWN_KINDS:])
    return f"{line}; files not used: {sum(unused.values())} ({listed}" + f", other kinds: {others}" * bool(others) + ")"


def _shard(text: str) -> tuple[int, int]:
    from ctclip.preprocessing.whole_numbers import whole_number

    part, _, parts = map(whole_number, text.partition("/"))
    if part is None or parts is None or not 1 <= part <= parts:
        raise typer.BadParameter(f"{text!r}: write it as i/n with i from 1 to n, for example 3/16")
    return part, parts
