"""`ctclip quality`: a page for looking through hundreds of stored scans."""

from __future__ import annotations

from pathlib import Path

import typer


def quality(
    store: Path = typer.Argument(..., help="The store written by `ctclip preprocess`."),
    output: Path = typer.Option(
        None, "--output", "-o", help="The HTML file to write. Default: quality.html in the store."
    ),
    split: str = typer.Option(None, help="Only this split of the cohort."),
    skip: int = typer.Option(0, min=0, help="Number of volumes to skip at the beginning."),
    count: int = typer.Option(150, "--count", "-k", min=1, help="Number of volumes on the page."),
    cohort: Path = typer.Option(
        None,
        help="With --masks: the cohort that the store was made from. Slices then go through the smallest finding of each "
        "volume instead of the middle.",
    ),
    masks: Path = typer.Option(None, help="Masks of the cohort, in the layout of `ctclip phantom`."),
) -> None:
    """Write a page with slices, spacing, HU histogram and warnings of each volume, and the refused scans.

    `ctclip quality store --output quality.html`
    """
    from ctclip.errors import DataError
    from ctclip.inference.focus import finding_place
    from ctclip.labels import store_labels
    from ctclip.preprocessing.quality import quality_page
    from ctclip.preprocessing.store import VolumeStore

    if (cohort is None) != (masks is None):
        raise DataError("--cohort and --masks go together")
    opened = VolumeStore(store)
    place_of = finding_place(cohort, masks, opened.spec) if cohort is not None and masks is not None else lambda _: None
    labels = store_labels(opened)
    page = output or store / "quality.html"
    replaced = page.exists()
    warned = quality_page(
        opened, page, split=split, first=skip, count=count, windows=labels.windows if labels is not None else None,
        place_of=place_of, expect="chest" if labels is not None and labels.body_part == "chest" else "any",
    )  # fmt: skip
    if replaced:
        print(f"note: replaced the previous page at {page}")
    print(f"quality page: {page} ({warned} volumes with warnings)")
