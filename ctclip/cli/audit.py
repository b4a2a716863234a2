"""`ctclip audit`: duplicates in a cohort, differences between its groups, and where a model makes errors."""

from __future__ import annotations

from pathlib import Path

import typer

from ctclip.cli.audit_all import all_
from ctclip.cli.reading import BATCH, EMBEDDINGS, FORCE
from ctclip.cli.unused import refuse_unused

DEFAULT_SPLITS = ["train", "valid"]

audit = typer.Typer(help="Examine a cohort or a model before you trust its figures.", no_args_is_help=True)
audit.command("all")(all_)


@audit.command("doubles")
def doubles(
    context: typer.Context,
    store: Path = typer.Option(..., help="A store written by `ctclip preprocess`."),
    split: str = typer.Option(
        None, help="Only this split of the cohort. Default: all, to detect leaks between splits."
    ),
    model: str = typer.Option(
        None, "--model", "-m", help="Also compare the nearest neighbours in this model's embeddings."
    ),
    output: Path = typer.Option(
        Path("doubles"), "--output", "-o", help="Folder for doubles.csv, recurring_reports.csv and doubles.html."
    ),
    embeddings: Path = EMBEDDINGS,
    batch: int = typer.Option(8, min=1, help="With --model: number of volumes in a batch."),
    force: bool = FORCE,
) -> None:
    """Find copies of volumes in a cohort, in two splits or under two patients, and reports that recur.

    `ctclip audit doubles --store store --output doubles`

    Copies are found after resampling, added noise, cropping, and with reversed slices. Reconstructions of one scan are
    not compared.
    """
    from functools import partial

    from ctclip import distributed
    from ctclip.adaptation.examples import cached_embeddings
    from ctclip.audit.doubles_page import TABLES, write_doubles
    from ctclip.inference.scans import StoredScans
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.outputs import check_folder, made_by_us
    from ctclip.preprocessing.store import VolumeStore

    if model is None:
        refuse_unused(context, "needs --model", "batch")
    check_folder(output, made_by_us, "output of `ctclip audit doubles`")
    opened, embed = VolumeStore(store), None
    if model is not None:
        loaded = load_model(model, distributed.device())
        scans = StoredScans(opened, split, loaded.spec, loaded.path)
        embed = partial(cached_embeddings, loaded, scans, embeddings or output / "embeddings", batch)
    result = write_doubles(opened, output, split=split, embed=embed, cache=embeddings, force=force)
    pairs = result.pairs
    for pair in pairs.head(10).itertuples():
        print(f"{pair.first} and {pair.second}: {pair[9]}, correlation {pair.correlation:.2f}")
    if len(pairs) > 10:
        print(f"... and {len(pairs) - 10} more")
    print(f"{len(pairs)} possible copies among {result.volumes} volumes; {len(result.reports)} reports recur")
    print(f"tables and page: {output} ({', '.join(TABLES)})")


@audit.command("data")
def data(
    model: str = typer.Option(..., "--model", "-m", help="The model folder; its embeddings score the concepts."),
    store: Path = typer.Option(..., help="A store written by `ctclip preprocess`."),
    concepts: str = typer.Option("chest", help="Concepts: a YAML file, or the name of one in configs/concepts."),
    splits: str = typer.Option(
        ",".join(DEFAULT_SPLITS), help="Two splits to compare: is a concept associated with a label in both?"
    ),
    output: Path = typer.Option(
        Path("audit"), "--output", "-o", help="Folder for data_audit.csv, concepts.csv and data_audit.html."
    ),
    embeddings: Path = EMBEDDINGS,
    batch: int = BATCH,
    force: bool = FORCE,
) -> None:
    """Find unwanted associations with a split, a scanner or a label: devices, kernels, tables, contrast, position.

    `ctclip audit data --model runs/demo/train/model --store store --output audit`
    """
    from ctclip import distributed
    from ctclip.audit.associations import FEWEST_PATIENTS
    from ctclip.audit.audit_page import DATA_TABLES, write_data_audit
    from ctclip.audit.concepts import load_concepts
    from ctclip.errors import DataError
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.outputs import check_folder, made_by_us
    from ctclip.preprocessing.store import VolumeStore

    check_folder(output, made_by_us, "output of `ctclip audit data`")
    chosen = load_concepts(concepts)
    loaded = load_model(model, distributed.device())
    pair, opened = [name.strip() for name in splits.split(",") if name.strip()], VolumeStore(store)
    known = sorted(map(str, opened.cohort["split"].unique()))
    # The default is for cohorts that have these splits.
    if pair != DEFAULT_SPLITS and (len(pair) != 2 or not set(pair) <= set(known)):
        raise DataError(f"--splits {splits}: give two splits of the cohort, which has: {', '.join(known)}")
    lines = write_data_audit(
        loaded, opened, output, chosen, splits=pair, embeddings=embeddings, batch=batch, force=force
    )
    for line in lines.head(10).itertuples():
        mark = "*" if line.significant else " "
        print(f"{mark} {line.concept} | {line.group} | {line.where}: {line.difference:+.2f} ({line.lower:+.2f} to {line.upper:+.2f}), adjusted p {line.adjusted_p:.2g}")  # fmt: skip
    if lines.empty:
        print(f"note: nothing could be compared: every comparison needs {FEWEST_PATIENTS} patients on each side")
    print(f"{len(lines)} comparisons, {int(lines['significant'].sum())} significant after correction (*)")
    print(f"tables and page: {output} ({', '.join(DATA_TABLES)})")


@audit.command("model")
def model_(
    model: str = typer.Option(..., "--model", "-m", help="A model folder."),
    store: Path = typer.Option(..., help="A store written by `ctclip preprocess` with labels."),
    split: str = typer.Option("valid", help="Split that is scored."),
    concepts: str = typer.Option("chest", help="Concepts: a YAML file, or the name of one in configs/concepts."),
    head: str = typer.Option("prompts", help="Head of the model that is audited."),
    output: Path = typer.Option(
        Path("model_audit"), "--output", "-o", help="Folder for errors.csv, fairness.csv, shortcuts.csv and the page."
    ),
    embeddings: Path = EMBEDDINGS,
    batch: int = BATCH,
    force: bool = FORCE,
) -> None:
    """Find concepts with larger errors, groups with a lower AUROC, and traces of the scanner in the embeddings.

    `ctclip audit model --model runs/demo/train/model --store store --split valid --output model_audit`
    """
    from ctclip import distributed
    from ctclip.audit.associations import FEWEST_PATIENTS
    from ctclip.audit.audit_page import MODEL_TABLES, write_model_audit
    from ctclip.audit.concepts import load_concepts
    from ctclip.inference.model import usable_head
    from ctclip.models.folder import load_model
    from ctclip.preprocessing.outputs import check_folder, made_by_us
    from ctclip.preprocessing.store import VolumeStore

    check_folder(output, made_by_us, "output of `ctclip audit model`")
    chosen = load_concepts(concepts)
    loaded = load_model(model, distributed.device())
    wrong, fair, short = write_model_audit(
        loaded,
        usable_head(loaded, head),
        VolumeStore(store),
        output,
        chosen,
        split=split,
        embeddings=embeddings,
        batch=batch,
        force=force,
    )
    if wrong.empty and fair.empty and short.empty:
        print(f"note: nothing could be compared: every comparison needs {FEWEST_PATIENTS} patients on each side")
    for line in wrong.head(5).itertuples():
        print(f"{'*' if line.significant else ' '} errors with {line.concept}: {line.difference:+.2f} ({line.lower:+.2f} to {line.upper:+.2f})")  # fmt: skip
    for line in fair.head(3).itertuples():
        print(f"  {line.group} {line.value}: mean AUROC {line.mean_auroc:.3f}, {line.difference:+.3f} from the others "
              f"({line.difference_lower:+.3f} to {line.difference_upper:+.3f})")  # fmt: skip
    for line in short.head(3).itertuples():
        print(f"  {line.group} from embeddings {line.embeddings:.2f}, from histograms {line.histogram:.2f}, by chance {line.chance:.2f}")  # fmt: skip
    print(f"tables and page: {output} ({', '.join(MODEL_TABLES)})")
