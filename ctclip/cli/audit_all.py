"""`ctclip audit all`: every audit of a store and a model, one per core, after one pass over the volumes."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from pathlib import Path

import typer

from ctclip.cli.reading import BATCH, EMBEDDINGS, FORCE

_ALONE = threading.Lock()


def all_(
    context: typer.Context,
    model: str = typer.Option(..., "--model", "-m", help="A model folder."),
    store: Path = typer.Option(..., help="A store written by `ctclip preprocess` with reports and labels."),
    output: Path = typer.Option(
        Path("audits"), "--output", "-o", help="Folder for the outputs of the audits, one folder for each."
    ),
    embeddings: Path = EMBEDDINGS,
    batch: int = BATCH,
    force: bool = FORCE,
) -> None:
    """Run doubles, data, filter-pairs, model and analyze with their defaults, one per core, after one pass over the volumes.

    `ctclip audit all --model runs/demo/train/model --store store --output audits`

    Exit code 0: every audit ran. 3: some were refused, in a store without labels for example; the others ran.
    """
    from ctclip.cli import options_first
    from ctclip.preprocessing.outputs import check_folder
    from ctclip.preprocessing.progress import track
    from ctclip.preprocessing.workers import worker_pool

    folders = {
        "audit doubles": "doubles", "audit data": "data", "filter-pairs": "pairs", "audit model": "model", "analyze": "analysis",
    }  # fmt: skip
    ours = {*folders.values(), "embeddings"}
    check_folder(
        output, lambda folder: {path.name for path in folder.iterdir()} <= ours, "output of `ctclip audit all`"
    )
    first, shared = options_first(context.obj)[0], str(embeddings or output / "embeddings")
    common = ["--store", str(store), "--embeddings", shared, *["--force"] * force]
    audits = {
        command: [*first, *command.split(), *common, "--output", str(output / folder),
                  *(["--model", model, "--batch", str(batch)] if command != "audit doubles" else [])]
        for command, folder in folders.items()
    }  # fmt: skip
    _import()
    refused = []
    with worker_pool(min(len(audits), len(os.sched_getaffinity(0)))) as pool:
        # Not in this process: those forked afterwards could not use torch or a GPU.
        pool.submit(_read_once, model, store, Path(shared), batch).result()
        outcomes = pool.map(_outcome, audits.values())
        for command, (code, printed) in zip(audits, track(outcomes, len(audits), "auditing", "audits"), strict=True):
            print(f"\nctclip {command}\n{printed}")
            refused += [command] if code else []
    if refused:
        print(f"\nrefused: {', '.join(refused)}")
        raise typer.Exit(3)


def _import() -> None:
    """Import what the audits use, so that forked processes need not."""
    import ctclip.audit.analyze_page
    import ctclip.audit.audit_page
    import ctclip.audit.doubles_page
    import ctclip.audit.filter_pairs  # noqa: F401


def _read_once(model: str, store: Path, embeddings: Path, batch: int) -> None:
    """Embed and measure all volumes, so that each audit finds them in the shared folder ``embeddings``."""
    from ctclip import distributed
    from ctclip.adaptation.examples import cached_embeddings
    from ctclip.audit.pictures import PICTURES, pictures
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.store import VolumeStore

    loaded = load_model(model, distributed.device())
    scans = StoredScans(VolumeStore(store), None, loaded.spec, loaded.path)
    vectors = cached_embeddings(loaded, scans, embeddings, batch)
    pictures(scans.store, [name for name in scans.table["volume"] if name in vectors], embeddings / PICTURES)


def _outcome(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what it printed, without its progress."""
    import torch
    from threadpoolctl import threadpool_limits

    from ctclip.cli import main

    printed, errors = io.StringIO(), io.StringIO()
    # One core each; only one at a time in threads, which share one output.
    torch.set_num_threads(1)
    with _ALONE, threadpool_limits(1), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main(arguments)
    told = [line for line in errors.getvalue().splitlines() if line.startswith(("warning", "error"))]
    return code, "\n".join([printed.getvalue().rstrip(), *told]).strip()
