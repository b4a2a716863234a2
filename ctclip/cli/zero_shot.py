"""`ctclip zero-shot`: abnormalities of scans from prompts."""

from __future__ import annotations

from pathlib import Path

import typer


def zero_shot(
    scans: list[Path] = typer.Argument(None, help="Volume files, DICOM folders, or folders of volumes."),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a hub name."),
    store: Path = typer.Option(None, help="A store of `ctclip preprocess` instead of scans."),
    split: str = typer.Option(None, help="With --store: one split of the cohort."),
    output: Path = typer.Option(
        Path("predictions"), "--output", "-o", help="Folder for predictions.csv and embeddings.npz."
    ),
    prompts: str = typer.Option(
        None, help="A prompt file, or the name of one in configs/prompts; the model's own if not given."
    ),
    abnormality: list[str] = typer.Option(None, help="Detect this instead, listed or not; may be repeated."),
    batch: int = typer.Option(8, min=1, help="Volumes encoded at once."),
    hu: str = typer.Option("auto", help="Whom to believe about Hounsfield units: auto, trust-file."),
    expect: str = typer.Option("any", help="any, or chest: refuse what is not a chest."),
) -> None:
    """Detect abnormalities by prompts, without any labelled example.

    `ctclip zero-shot --model runs/demo/train/model scan.nii.gz`

    `ctclip zero-shot --model runs/demo/train/model --store store --split valid --output predictions`
    """
    import numpy as np

    from ctclip.errors import DataError
    from ctclip.evaluation.tables import write_predictions
    from ctclip.inference.detector import Detector
    from ctclip.inference.prompts import load_prompts
    from ctclip.inference.run import detect_files, detect_store, report_embeddings
    from ctclip.inference.show import table_of
    from ctclip.models.folder import load_model
    from preprocessing.files import written_beside

    if bool(scans) == (store is not None):
        raise DataError("give either scans or --store")
    loaded = load_model(model)
    detector = Detector(loaded.model, load_prompts(prompts or loaded.prompts or "report_style"), abnormality or None)
    arrays: dict[str, np.ndarray] = {}
    if store is not None:
        from ctclip.data.dataset import stored_rows
        from preprocessing.store import VolumeStore

        opened = VolumeStore(store)
        found = detect_store(loaded, detector, opened, split, batch)
        arrays["report_embeddings"] = report_embeddings(loaded, stored_rows(opened, split))
    else:
        found = detect_files(loaded, detector, scans, trust=hu, expect=expect)
        table_of(found.table, detector.abnormalities)
    write_predictions(output / "predictions.csv", found.table)
    with written_beside(output / "embeddings.npz", suffix=".npz") as partial:
        volumes = found.table["volume"].to_numpy(dtype=str)
        arrays |= {"volume": volumes, "volume_embeddings": found.embeddings}
        np.savez(partial, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    for reason in found.refused.values():
        print(f"refused: {reason}")
    print(f"predictions: {output / 'predictions.csv'} ({len(found.table)} volumes)")
    if found.refused:
        raise typer.Exit(3)
