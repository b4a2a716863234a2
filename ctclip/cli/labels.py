"""`ctclip labels`: show label sets, or create one from a table."""

from __future__ import annotations

from pathlib import Path

import typer

labels = typer.Typer(help="List label sets, show one, or create one from a table.", no_args_is_help=True)


@labels.command("list")
def list_sets() -> None:
    """List the label sets in configs/labels.

    `ctclip labels list`
    """
    from ctclip.labels import installed_sets

    for label_set in installed_sets():
        print(f"{label_set.name}: {len(label_set.names)} labels, {label_set.body_part}. {label_set.description}")


@labels.command("show")
def show_set(name: str = typer.Argument(..., help="A YAML file, or the name of one in configs/labels.")) -> None:
    """Show the labels of a label set and their aliases.

    `ctclip labels show merlin_30`
    """
    from ctclip.labels import load_labels

    label_set = load_labels(name)
    print(f"{label_set.identity} ({label_set.body_part})")
    for label in label_set.labels:
        print(f"  {label.name}" + (f" ({', '.join(label.aliases)})" if label.aliases else ""))


@labels.command("from-csv")
def from_csv(
    table: Path = typer.Argument(..., help="A CSV, TSV or Parquet file whose label columns hold 0, 1 or empty cells."),
    output: Path = typer.Option(..., "--output", "-o", help="The YAML file to write."),
    name: str = typer.Option(None, help="Name of the label set. Default: the name of the output file."),
    column: list[str] = typer.Option(
        None,
        help="A column to use as a label. May be repeated. Default: every column of 0 and 1 that does not describe the patient "
        "or the scan (such as `sex`).",
    ),
    body_part: str = typer.Option("any", help="The body part that the scans show: chest, abdomen, head or any."),
) -> None:
    """Create a label set from the binary columns of a table. Edit the YAML file to add aliases and prompts.

    `ctclip labels from-csv abdomen.csv --output abdomen.yaml --body-part abdomen`
    """
    from ctclip.evaluation.tables import binary_columns
    from ctclip.labels import labels_of_columns
    from ctclip.preprocessing.outputs import check_file, file_holds

    check_file(output, file_holds(b"labels:"))
    chosen = binary_columns(table, column or None)
    columns = chosen.labels
    label_set = labels_of_columns(name or output.stem, columns, body_part)  # type: ignore[arg-type]
    # A different file may have been edited since.
    check_file(output, lambda path: path.read_bytes() == label_set.text().encode())
    label_set.save(output)
    if not column and chosen.metadata:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in chosen.metadata.items())
        print(f"note: not used as labels: {reasons}; name a label column with --column")
    print(f"label set: {output} ({len(columns)} labels: {', '.join(columns[:5])}{' ...' if len(columns) > 5 else ''})")
