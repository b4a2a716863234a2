"""`ctclip train`: a store to a model folder."""

from __future__ import annotations

from pathlib import Path

import typer


def train(
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Values that replace the configuration's."
    ),
    config: str = typer.Option(..., "--config", "-c", help="A YAML file, or the name of one in configs/."),
    output: Path = typer.Option(None, "--output", "-o", help="Run folder; an interrupted run in it is continued."),
    store: Path = typer.Option(None, help="Store of `ctclip preprocess`; the same as data.store=."),
    processes: int = typer.Option(
        1, min=1, help="Start this many DeepSpeed processes here; under a launcher leave it at 1."
    ),
    plan: bool = typer.Option(False, "--plan", help="Say what the run would need, and do not run it."),
    card: str = typer.Option("h100", help="With --plan: a10, rtx4090, a100-40, a100, h100, h200, or cpu (measured)."),
    volumes: int = typer.Option(
        24128, min=1, help="With --plan: scans of an epoch; CT-RATE's training scans if not given."
    ),
    force: bool = typer.Option(False, "--force", help="Continue a run folder of another configuration."),
    local_rank: int = typer.Option(0, "--local_rank", hidden=True, help="Set by the deepspeed launcher."),
) -> None:
    """Train a dual encoder on volumes and reports.

    Exit code 75: stopped by Ctrl-C, SIGTERM or SIGUSR1 after writing a checkpoint; the same command continues. 130: stopped
    at once, by a second Ctrl-C or before the first step.

    The same command runs under every launcher:

    `ctclip train --config phantom_tiny --store store --output runs/first training.epochs=5`

    `deepspeed --module ctclip.train --config phantom_tiny --store store --output runs/first`

    `ctclip train --plan --config ct_rate_vit3d_base --processes 8 --card h100`

    `torchrun --nproc-per-node 4 -m ctclip.train --config phantom_tiny --store store --output runs/first`
    """
    from ctclip import distributed, extras
    from ctclip.config_files import load_config
    from ctclip.errors import ConfigError

    # A path is a path, whatever YAML would make of it.
    given = {"data.store": str(store)} if store is not None else {}
    if plan:
        from ctclip.training.plan import CARDS, describe, make_plan

        if card not in (*CARDS, "cpu"):
            raise ConfigError(f"--card {card}: choose one of {', '.join((*CARDS, 'cpu'))}")
        wanted = load_config(config, overrides or [], given)
        print(describe(wanted, make_plan(wanted, processes, card=card != "cpu"), card, volumes))
        return
    if output is None:
        raise ConfigError("--output is missing: name the run folder")
    extras.check("train")
    if processes > 1 and not distributed.launched():
        raise typer.Exit(distributed.launch(processes, "ctclip.train"))
    distributed.prepare_environment()
    from ctclip.training.loop import INTERRUPTED, Interrupted
    from ctclip.training.loop import train as run

    try:
        folder = run(load_config(config, overrides or [], given), output, force=force)
    except Interrupted as reason:
        if distributed.launched_rank() == 0:
            print(f"interrupted: {reason}", flush=True)
        raise typer.Exit(INTERRUPTED) from reason
    if distributed.launched_rank() == 0:
        print(f"model: {folder}")
