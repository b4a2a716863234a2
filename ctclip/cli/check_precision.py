"""`ctclip check-precision`: which numerical precision a model can use on this device."""

from __future__ import annotations

from pathlib import Path

import typer


def check_precision(
    model: str = typer.Option(..., "--model", "-m", help="A model folder."),
    store: Path = typer.Option(..., help="The store with the volumes to compare."),
    split: str = typer.Option(None, help="Only this split of the cohort."),
    count: int = typer.Option(64, "--count", "-k", min=16, help="Number of volumes to compare."),
    head: str = typer.Option("prompts", help="The head that computes the scores."),
    batch: int = typer.Option(4, min=1, help="Number of volumes in a batch."),
) -> None:
    """Compare the scores at each numerical precision with those in float32, and save the result with the model.

    `ctclip check-precision --model runs/demo/train/model --store store --split valid`

    `ctclip zero-shot --precision auto`, and other commands with this option, then use the fastest precision that
    agrees: no probability changes by more than 0.01, and the rank correlation of every finding's scores is at least
    0.999.
    """

    import torch

    from ctclip import distributed
    from ctclip.inference.model import usable_head
    from ctclip.inference.precision import check_precision, device_name, fastest, keep
    from ctclip.inference.run import batches
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import PRECISION, check_addition, load_model
    from ctclip.preprocessing.store import VolumeStore

    loaded = load_model(model, distributed.device())
    check_addition(loaded.path, PRECISION)
    scans = StoredScans(VolumeStore(store), split, loaded.spec, loaded.path)
    refused: dict[str, str] = {}
    stored = len(scans.table)
    # Spread over the cohort, because its first volumes may be similar.
    chosen = sorted({round(step * (stored - 1) / max(1, count - 1)) for step in range(count)}) if stored else []
    read = (torch.from_numpy(voxels) for _, voxels, _ in batches(scans, chosen, batch, refused, "comparing"))
    results, checked = check_precision(loaded, usable_head(loaded, head), read)
    print(f"{checked} volumes on {device_name(loaded.model.device)}")
    print(f"{'precision':<12}{'ms per volume':>14}{'largest change':>16}{'lowest rank correlation':>25}  agrees")
    for result in results:
        print(
            f"{result.precision:<12}{1000 * result.seconds:>14.1f}{result.change:>16.5f}{result.correlation:>25.6f}  "
            f"{'yes' if result.agrees else 'no'}"
        )
    print(f"`ctclip zero-shot --precision auto` uses {fastest(results)}; saved: {keep(loaded, results, checked)}")
