"""`ctclip explain`: where a model sees a finding in a scan."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

import typer

from ctclip.cli.reading import EXPECT, GEOMETRY, HU, LARGEST_GB, SERIES, Expected, Geometry, Trusted, reading_of
from ctclip.cli.unused import refuse_unused


class By(StrEnum):
    similarity = "similarity"
    contribution = "contribution"
    occlusion = "occlusion"
    gradcam = "gradcam"
    attention = "attention"
    counterfactual = "counterfactual"
    learned = "learned"


SHIFTS = typer.Option(
    None,
    min=1,
    max=8,
    help="Number of positions of the cells along each axis. More give finer maps; the time grows with the cube of the number. "
    "Default: 2 for the method learned, else 1.",
)


# Methods that --budget limits.
BUDGETED = (By.occlusion, By.counterfactual)


def refuse_unused_budget(context: typer.Context, method: By | None) -> None:
    """Refuse --budget for a method that it does not limit."""
    if method not in BUDGETED:
        refuse_unused(context, "applies only to --method occlusion and counterfactual", "budget")


def explain(
    context: typer.Context,
    scan: Path = typer.Argument(..., help="A volume file, a DICOM folder, or an archive of one of these."),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    output: Path = typer.Option(
        Path("explanation"), "--output", "-o", help="Folder for maps, masks, findings.json and page.html."
    ),
    abnormality: list[str] = typer.Option(
        None, help="A finding to locate. May be repeated. Default: all findings at or above their decision threshold."
    ),
    head: str = typer.Option(None, help="The head of the model to explain. Default: prompts."),
    method: By = typer.Option(
        None,
        help="Default: learned if the model has a locator, else similarity. learned: the output of a locator trained "
        "with `ctclip adapt --method locate`; similarity: the score of each location by itself; contribution: "
        "what a location adds to the score; occlusion: how much the score falls when a location is hidden (slow, "
        "works with every model); gradcam; attention: for "
        "transformers; counterfactual: the smallest smooth change of the scan that moves the score across its threshold (slow).",
    ),
    level: float = typer.Option(
        0.5, min=0.01, max=0.99, help="Fraction of the peak of a map down to which its region and mask extend."
    ),
    budget: int = typer.Option(
        600,
        min=8,
        help="Occlusion: maximum number of encodings; more give finer maps. Counterfactual: for each finding.",
    ),
    shifts: int = SHIFTS,
    dicom: bool = typer.Option(
        False,
        "--dicom",
        help="For a DICOM series: also write a DICOM segmentation, a structured report and images to OUTPUT/dicom. "
        "They contain the patient's name, as the series does.",
    ),
    hu: Trusted = HU,
    geometry: Geometry = GEOMETRY,
    expect: Expected = EXPECT,
    series: str = SERIES,
    largest_gb: float = LARGEST_GB,
) -> None:
    """Show where in a scan a model sees each finding: maps and a mask on the scan's own grid, and a page of slices.

    `ctclip explain scan.nii.gz --model runs/demo/train/model --abnormality "Pleural effusion" --output where`

    The maps can be opened over the scan in 3D Slicer and ITK-SNAP. They show what influenced the score of the model. For
    research only, not for diagnosis.
    """
    from ctclip import distributed, extras
    from ctclip.explanation.dicom.save import FOLDER, save_dicom
    from ctclip.explanation.dicom.source import source_images
    from ctclip.explanation.explain import check_output
    from ctclip.inference.model import load
    from ctclip.preprocessing.errors import counted

    refuse_unused_budget(context, method)
    if dicom:
        extras.check("dicom")
    check_output(output)
    loaded = load(model, distributed.device())
    reading = reading_of(hu, geometry, expect, series, largest_gb)
    reading["headers"] = dicom
    ready = loaded.prepare(scan, **reading)
    if dicom:
        # Check before the maps, which may take minutes.
        source_images(ready)
    result = loaded.explain(
        ready,
        abnormality or None,
        head=head,
        method=method and method.value,
        level=level,
        budget=budget,
        shifts=shifts,
    )
    page = result.save(output)
    print(result)
    if dicom:
        names = ", ".join(path.name for path in save_dicom(result, output / FOLDER))
        print(f"DICOM, with the patient's name: {output / FOLDER} ({names})")
    print(f"{counted(len(result.places), 'map')} in {result.seconds:.1f} s; page: {page}")
