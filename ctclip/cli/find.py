"""`ctclip find`: find the regions of a scan that a text describes."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.explain import SHIFTS, By, refuse_unused_budget
from ctclip.cli.reading import EXPECT, GEOMETRY, HU, LARGEST_GB, SERIES, Expected, Geometry, Trusted, reading_of


def find(
    context: typer.Context,
    scan: Path = typer.Argument(..., help="A volume file, a DICOM folder, or an archive of one of these."),
    text: str = typer.Argument(..., help="What to find, in your own words."),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    output: Path = typer.Option(
        Path("found"), "--output", "-o", help="Folder for the map, the regions' mask, findings.json and page.html."
    ),
    count: int = typer.Option(5, "--count", "-k", min=1, help="Maximum number of regions."),
    method: By = typer.Option(None, help="How the map is computed; `ctclip explain --help` describes the methods."),
    level: float = typer.Option(
        0.5, min=0.01, max=0.99, help="Fraction of the peak of the map down to which a region extends."
    ),
    refine: bool = typer.Option(
        False, "--refine", help="Grow the regions of the mask to edges in the image (watershed on HU)."
    ),
    budget: int = typer.Option(600, min=8, help="Occlusion and counterfactual: maximum number of encodings."),
    shifts: int = SHIFTS,
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
) -> None:
    """Find what a text describes in a scan: regions with position, size and score. For research only, not for diagnosis.

    `ctclip find scan.nii.gz "a nodule larger than 10 mm" --model runs/demo/train/model --output found`

    The model cannot measure. A size in the text keeps only regions whose longest side has that size.
    """
    from ctclip import distributed
    from ctclip.explanation.explain import check_output
    from ctclip.inference.model import load

    refuse_unused_budget(context, method)
    check_output(output)
    loaded = load(model, distributed.device())
    place = loaded.find(
        scan, text, method=method and method.value, level=level, most=count, budget=budget, shifts=shifts,
        **reading_of(hu, geometry, expect, series, largest_gb),
    )  # fmt: skip
    page = place.save(output, refined=refine)
    print(place)
    print(f"page: {page}")
