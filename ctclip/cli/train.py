"""`ctclip train`: train a model on the volumes and reports of a store."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.unused import refuse_unused


def train(
    context: typer.Context,
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Values that override the configuration, such as training.epochs=5."
    ),
    config: str = typer.Option(..., "--config", "-c", help="A YAML file, or the name of one in configs/."),
    output: Path = typer.Option(
        None, "--output", "-o", help="Run folder. If it holds an interrupted run, that run is resumed."
    ),
    store: Path = typer.Option(None, help="The store written by `ctclip preprocess`; the same as data.store=STORE."),
    processes: int = typer.Option(
        1, min=1, help="Number of DeepSpeed processes to start on this machine. Leave it at 1 under a launcher."
    ),
    plan: bool = typer.Option(
        False, "--plan", help="Estimate the memory and time that the run needs, without running it."
    ),
    card: str = typer.Option(
        "h100", help="With --plan: a10, rtx4090, a100-40, a100, h100, h200, or cpu (measured on this machine)."
    ),
    scans: int = typer.Option(
        24128, min=1, help="With --plan: number of scans in an epoch. The default is the training split of CT-RATE."
    ),
    force: bool = typer.Option(
        False, "--force", help="Resume the run although its configuration or data have changed."
    ),
    local_rank: int = typer.Option(0, "--local_rank", hidden=True, help="Set by the DeepSpeed launcher."),
) -> None:
    """Train a dual encoder on volumes and reports.

    Exit code 75: Ctrl-C, SIGTERM or SIGUSR1 stopped the run after it wrote a checkpoint; the same command resumes it.
    130: Ctrl-C stopped the run at once, before the first step or because it was pressed twice.

    The command works under every launcher:

    `ctclip train --config phantom_tiny --store store --output runs/first training.epochs=5`

    `deepspeed --module ctclip.train --config phantom_tiny --store store --output runs/first`

    `ctclip train --plan --config ct_rate_vit3d_base --processes 8 --card h100`

    `torchrun --nproc-per-node 4 -m ctclip.train --config phantom_tiny --store store --output runs/first`
    """
    from ctclip import distributed, extras
    from ctclip.config_files import load_config
    from ctclip.errors import ConfigError

    # Quote the path, because YAML might parse it as another type.
    given = {"data.store": str(store)} if store is not None else {}
    if plan:
        from ctclip.training.plan import CARDS, describe, make_plan

        if card not in (*CARDS, "cpu"):
            raise ConfigError(f"--card {card}: choose one of {', '.join((*CARDS, 'cpu'))}")
        configuration = load_config(config, overrides or [], given)
        print(describe(configuration, make_plan(configuration, processes, card=card != "cpu"), card, scans))
        return
    refuse_unused(context, "needs --plan", "card", "scans")
    if output is None:
        raise ConfigError("--output is missing: name the run folder")
    extras.check("train")
    if processes > 1 and not distributed.launched():
        raise typer.Exit(distributed.launch(processes, "ctclip.train", context.obj))
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
