"""`ctclip labels`: look at label sets, and make one of a table."""

from __future__ import annotations

from pathlib import Path

import typer

labels = typer.Typer(help="Label sets: list them, show one, make one of a table.", no_args_is_help=True)


@labels.command("list")
def list_sets() -> None:
    """The label sets of configs/labels.

    `ctclip labels list`
    """
    from ctclip.labels import installed_sets

    for label_set in installed_sets():
        print(f"{label_set.name}: {len(label_set.names)} labels, {label_set.body_part}. {label_set.description}")


@labels.command("show")
def show_set(name: str = typer.Argument(..., help="A YAML file, or the name of one in configs/labels.")) -> None:
    """The labels of a set, with their aliases.

    `ctclip labels show merlin_30`
    """
    from ctclip.labels import load_labels

    label_set = load_labels(name)
    print(f"{label_set.identity} ({label_set.body_part})")
    for label in label_set.labels:
        print(f"  {label.name}" + (f" ({', '.join(label.aliases)})" if label.aliases else ""))


@labels.command("from-csv")
def from_csv(
    table: Path = typer.Argument(..., help="A CSV, TSV or Parquet file with label columns of 0, 1 and empty cells."),
    output: Path = typer.Option(..., "--output", "-o", help="The YAML file to write."),
    name: str = typer.Option(None, help="What to call the set; the output's name if not given."),
    column: list[str] = typer.Option(
        None,
        help="A column that is a label; may be repeated. All columns of 0 and 1 that do not describe the patient or the "
        "scan (such as `sex`) if not given.",
    ),
    body_part: str = typer.Option("any", help="chest, abdomen, head or any: what its scans show."),
) -> None:
    """Make a label set of a table's binary columns. Edit the file to add aliases and prompts.

    `ctclip labels from-csv abdomen.csv --output abdomen.yaml --body-part abdomen`
    """
    from ctclip.evaluation.tables import binary_columns
    from ctclip.labels import labels_of_columns
    from ctclip.preprocessing.outputs import check_file

    # Whatever it is, it may have been edited since.
    check_file(output, lambda _: False)
    chosen = binary_columns(table, column or None)
    columns = chosen.labels
    label_set = labels_of_columns(name or output.stem, columns, body_part)  # type: ignore[arg-type]
    label_set.save(output)
    if not column and chosen.metadata:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in chosen.metadata.items())
        print(f"note: not taken as labels: {reasons}; name a label column with --column")
    print(f"label set: {output} ({len(columns)} labels: {', '.join(columns[:5])}{' ...' if len(columns) > 5 else ''})")
