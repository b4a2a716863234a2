"""`ctclip phantom`: write a synthetic cohort."""

from __future__ import annotations

from pathlib import Path

import typer


def phantom(
    out: Path = typer.Argument(..., help="Folder for the cohort. Scans that are already in it are kept."),
    volumes: int = typer.Option(2000, min=2, help="Total number of volumes (reconstructions)."),
    seed: int = typer.Option(0, min=0, help="Random seed. The same seed gives identical files."),
    scale: float = typer.Option(
        4.0, min=1.0, help="Multiplies the in-plane spacing of 0.6 to 0.9 mm; 1 writes scans of full size."
    ),
    rare_floor: float = typer.Option(
        0.0, min=0.0, max=0.9, help="Minimum prevalence of every abnormality; 0 keeps the prevalences of CT-RATE."
    ),
    valid_fraction: float = typer.Option(0.2, min=0.0, max=1.0, help="Fraction of patients in the validation split."),
    reconstructions: int = typer.Option(
        3, min=1, max=3, help="Maximum number of reconstructions per scan; with 1, every volume is a separate scan."
    ),
    workers: int = typer.Option(None, help="Number of worker processes. Default: one per core."),
) -> None:
    """Write a cohort of synthetic chest CT scans with reports, in the folder layout of CT-RATE.

    `ctclip phantom cohort --volumes 200 --seed 1`
    """
    from ctclip.phantom.cohort import Options, make_cohort

    options = Options(volumes, seed, scale, rare_floor, valid_fraction, reconstructions)
    make_cohort(out, options, workers)
    print(f"cohort: {out} ({volumes} volumes)")
