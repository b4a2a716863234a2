"""`ctclip phantom`: a synthetic cohort on disk."""

from __future__ import annotations

from pathlib import Path

import typer


def phantom(
    out: Path = typer.Argument(..., help="Folder to write; scans already in it are kept."),
    volumes: int = typer.Option(2000, min=2, help="Reconstructions in total."),
    seed: int = typer.Option(0, min=0, help="The same seed gives the same bytes."),
    scale: float = typer.Option(4.0, min=1.0, help="Factor on the in-plane spacing of 0.6-0.9 mm; 1 is full size."),
    rare_floor: float = typer.Option(
        0.0, min=0.0, max=0.9, help="Least prevalence of any abnormality; 0: CT-RATE's own."
    ),
    valid_fraction: float = typer.Option(0.2, min=0.0, max=1.0, help="Share of patients held out."),
    workers: int = typer.Option(None, help="Processes; all cores if not given."),
) -> None:
    """Write a cohort of chest-CT phantoms with reports, laid out on disk as CT-RATE is.

    `ctclip phantom cohort --volumes 200 --seed 1`
    """
    from ctclip.phantom.cohort import Options, make_cohort

    options = Options(volumes, seed, scale, rare_floor, valid_fraction)
    make_cohort(out, options, workers)
    print(f"cohort: {out} ({volumes} volumes)")
