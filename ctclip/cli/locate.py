"""`ctclip locate`: how well a model's maps point, against masks."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.explain import By


def locate(
    cohort: Path = typer.Argument(..., help="Folder of scans, as `ctclip preprocess` takes it."),
    masks: Path = typer.Option(..., help="Folder of masks, each on the grid of its scan."),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a hub name."),
    layout: str = typer.Option(
        "phantom", help="How the masks are laid out: a YAML file, or the name of one in configs/masks."
    ),
    split: str = typer.Option(None, help="One split of the cohort."),
    head: str = typer.Option(None, help="Which of the model's heads to explain; prompts if not given."),
    method: By = typer.Option(By.similarity, help="As in `ctclip explain`."),
    budget: int = typer.Option(600, min=8, help="Occlusion: the most encodings a scan may take."),
    limit: int = typer.Option(None, min=2, help="So many scans, drawn; all if not given."),
    seed: int = typer.Option(0, help="Of the draw, the controls and the bootstrap."),
    output: Path = typer.Option(Path("locate.json"), "--output", "-o", help="JSON to write."),
) -> None:
    """Score where a model points against masks: pointing game, voxels, Dice, free-response curve, and two controls.

    `ctclip locate runs/demo/cohort --masks runs/demo/cohort/masks --model runs/demo/train/model --split valid`
    """
    from ctclip import distributed
    from ctclip.evaluation.pages import number
    from ctclip.explanation.masks import Masks, load_layout
    from ctclip.inference.locate import CONTROLS, chosen_volumes, locate_cohort, write_result
    from ctclip.inference.model import load
    from ctclip.preprocessing.cohorts import read_cohort
    from ctclip.preprocessing.files import refuse_special

    refuse_special(output)
    drawn = Masks(masks, load_layout(layout))
    loaded = load(model, distributed.device())
    scans = read_cohort(cohort)
    volumes = chosen_volumes(scans, drawn, split, limit, seed)
    result = locate_cohort(
        loaded.dual, loaded.head(head or "prompts"), scans, drawn, volumes, by=method.value, budget=budget, seed=seed
    )
    write_result(output, result)
    print(f"{'finding':<36} scans  pointing (95 % interval)   AUROC   Dice")
    for name, entry in sorted(result["findings"].items(), key=lambda item: -(item[1]["map"]["pointing"]["value"] or 0)):
        found = entry["map"]
        point = found["pointing"]
        limits = f"({number(point['lower'], 2)} to {number(point['upper'], 2)})"
        print(f"{name:<36} {found['scans']:>5}  {number(point['value'], 2):>8} {limits:<18} {number(found['auroc']['value'], 2):>5}  {number(found['dice']['value'], 2):>5}")  # fmt: skip
    for kind in ("map", *CONTROLS):
        means = result["means"][kind]
        print(f"{'mean, ' + kind:<36}        {number(means['pointing'], 2):>8} {'':<18} {number(means['auroc'], 2):>5}  {number(means['dice'], 2):>5}")  # fmt: skip
    print(f"{result['scans']} scans of {result['patients']} patients, method {result['method']}: {output}")
