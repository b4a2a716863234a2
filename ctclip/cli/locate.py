"""`ctclip locate`: compare the maps of a model with masks."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.explain import SHIFTS, By, refuse_unused_budget


def locate(
    context: typer.Context,
    cohort: Path = typer.Argument(..., help="The cohort, as for `ctclip preprocess`."),
    masks: Path = typer.Option(..., help="The folder of masks; each must lie on the grid of its scan."),
    model: str = typer.Option(..., "--model", "-m", help="A model folder, or a name on the Hugging Face Hub."),
    mask_layout: str = typer.Option(
        "phantom", help="Layout of the masks: a YAML file, or the name of one in configs/masks."
    ),
    split: str = typer.Option(None, help="Only this split of the cohort."),
    head: str = typer.Option(None, help="The head of the model to explain. Default: prompts."),
    method: By = typer.Option(None, help="How maps are computed; `ctclip explain --help` describes the methods."),
    budget: int = typer.Option(
        600, min=8, help="Occlusion: maximum number of encodings per scan. Counterfactual: for each finding."
    ),
    shifts: int = SHIFTS,
    count: int = typer.Option(None, "--count", "-k", min=2, help="Number of scans to draw at random. Default: all."),
    seed: int = typer.Option(0, help="Seed of the draw, the controls and the bootstrap."),
    output: Path = typer.Option(Path("locate.json"), "--output", "-o", help="The JSON file to write."),
) -> None:
    """Compare the maps of a model with masks: pointing game, voxel AUROC, Dice, free-response curve, and two controls.

    `ctclip locate runs/demo/cohort --masks runs/demo/cohort/masks --model runs/demo/train/model --split valid`
    """
    from ctclip import distributed
    from ctclip.evaluation.pages import number
    from ctclip.explanation.masks import Masks, load_layout
    from ctclip.inference.locate import CONTROLS, chosen_volumes, locate_cohort, write_result
    from ctclip.inference.model import load
    from ctclip.preprocessing.cohorts import read_cohort
    from ctclip.preprocessing.outputs import check_file, file_holds

    refuse_unused_budget(context, method)
    check_file(output, file_holds(b'"pointing"'))
    drawn = Masks(masks, load_layout(mask_layout))
    loaded = load(model, distributed.device())
    scans = read_cohort(cohort)
    volumes = chosen_volumes(scans, drawn, split, count, seed)
    result = locate_cohort(
        loaded.dual,
        loaded.head(head or "prompts"),
        scans,
        drawn,
        volumes,
        by=method.value if method else loaded.method(),
        budget=budget,
        shifts=shifts,
        locator=loaded.locator(),
        seed=seed,
    )
    write_result(output, result)
    print(f"{'finding':<36} scans  pointing (95 % interval)   AUROC   Dice")
    for name, entry in sorted(result["findings"].items(), key=lambda item: -(item[1]["map"]["pointing"]["value"] or 0)):
        scores = entry["map"]
        point = scores["pointing"]
        limits = f"({number(point['lower'], 2)} to {number(point['upper'], 2)})"
        print(f"{name:<36} {scores['scans']:>5}  {number(point['value'], 2):>8} {limits:<18} {number(scores['auroc']['value'], 2):>5}  {number(scores['dice']['value'], 2):>5}")  # fmt: skip
    for kind in ("map", *CONTROLS):
        means = result["means"][kind]
        print(f"{'mean, ' + kind:<36}        {number(means['pointing'], 2):>8} {'':<18} {number(means['auroc'], 2):>5}  {number(means['dice'], 2):>5}")  # fmt: skip
    print(f"{result['scans']} scans of {result['patients']} patients, method {result['method']}: {output}")
