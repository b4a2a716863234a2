"""Detection on many scans in batches, with one prediction table and constant memory use.

Finished batches are kept as small Parquet files in ``parts/`` until all are done, so that an interrupted run resumes.
Several processes share the scans, each writing its own parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ctclip import distributed
from ctclip.data.reports import reports_of
from ctclip.drift.summary import TrainingSummary
from ctclip.errors import DataError
from ctclip.evaluation.adapted import FILE as ADAPTATION
from ctclip.evaluation.adapted import Adaptation
from ctclip.evaluation.tables import IDENTITY, check_names, embedding_table, prediction_table
from ctclip.heads.head import Head
from ctclip.inference.drift import drift_warnings, usable_summary
from ctclip.inference.scans import Scans, prefetch
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.csv_files import read_csv, write_csv
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import regular, written_beside
from ctclip.preprocessing.formats.streams import DAMAGE
from ctclip.preprocessing.outputs import check_folder, claimed_folder, made_by_us
from ctclip.preprocessing.parquet import open_parquet, parquet_writer, read_parquet, write_parquet
from ctclip.preprocessing.progress import track

VOLUME, REPORT = "volume_embedding", "report_embedding"
PART_BATCHES = 8
EMBEDDINGS, TABLES = "embeddings.parquet", ("predictions.csv", "predictions.parquet", "embeddings.parquet")
# Marks predictions of version 0.2, which wrote no run.json.
MARKS = {"predictions.csv": b"volume,patient,scan,"}


@dataclass
class Summary:
    """The paths of the tables, the number of volumes, and the refused scans with their reasons."""

    predictions: Path
    embeddings: Path
    volumes: int
    refused: dict[str, str] = field(default_factory=dict)

    def table(self, rows: int | None = None) -> pd.DataFrame:
        """The prediction table, or its first ``rows``, read back."""
        if self.predictions.suffix == ".parquet":
            stream = open_parquet(self.predictions)
            return (
                stream.read() if rows is None else pa.Table.from_batches([next(stream.iter_batches(rows))])
            ).to_pandas()
        # Only warnings may be empty; a scan may be called NA.
        return read_csv(self.predictions, dtype=dict.fromkeys(IDENTITY, str), nrows=rows)


def detect(
    loaded: ModelFolder,
    head: Head,
    scans: Scans,
    output: Path,
    *,
    batch: int = 8,
    reports: bool = False,
    suffix: str = ".csv",
    force: bool = False,
) -> Summary:
    """Write ``predictions.csv`` (or ``.parquet``) and ``embeddings.parquet`` to ``output``.

    ``reports``: also embed each volume's report. A refused scan does not stop the others; if all are refused, DataError
    is raised. Raises PreprocessingError if another process writes there, or if other scans or another model were
    predicted there before and ``force`` is not given.
    """
    check_names(head.names)
    summary = usable_summary(loaded)
    key = _key(loaded, head, scans, reports, summary)
    with contextlib.ExitStack() as stack:
        claim = claimed_folder(output, "zero-shot", key, TABLES, is_output, force=force)
        distributed.on_main(lambda: stack.enter_context(claim))
        return _detect(loaded, head, scans, output, output / "parts" / key, batch, reports, suffix, summary)


def check_output(output: Path) -> None:
    """Raise PreprocessingError unless ``detect`` may write to ``output``."""
    check_folder(output, is_output, "output of `ctclip zero-shot`")


def is_output(folder: Path) -> bool:
    """Whether commands of ctclip have written tables into this folder."""
    return made_by_us(folder, MARKS)


def _detect(
    loaded: ModelFolder, head: Head, scans: Scans, output: Path, parts: Path, batch: int, reports: bool, suffix: str,
    training: TrainingSummary | None,
) -> Summary:  # fmt: skip
    for folder in (parts.parent, parts):
        if folder.is_symlink():
            raise DataError(f"{folder}: is a symbolic link; remove it")
    parts.mkdir(parents=True, exist_ok=True)
    # Read once for all ranks; a late rank would see more finished parts and divide the scans differently.
    done = set(distributed.broadcast_json(sorted(_done(parts))))
    remaining = [index for index, name in enumerate(scans.table["volume"]) if name not in done]
    # Each rank gets consecutive scans, so that the joined table keeps the order of the scans.
    share = [int(index) for index in np.array_split(remaining, distributed.world_size())[distributed.rank()]]
    refused: dict[str, str] = {}
    waiting: list[pa.Table] = []
    for indices, voxels, warnings in batches(scans, share, batch, refused):
        waiting.append(_scored(loaded, head, scans, indices, voxels, warnings, reports, training))
        if len(waiting) == PART_BATCHES:
            _write_part(parts, waiting)
    _write_part(parts, waiting)
    refusals = distributed.gather_json(refused)
    refused = {name: reason for each in refusals for name, reason in each.items()}
    done = set(distributed.broadcast_json(sorted(_done(parts))))
    summary = Summary(output / f"predictions{suffix}", output / EMBEDDINGS, len(done), refused)
    if summary.volumes == 0 and distributed.is_main():
        raise DataError(next(iter(refused.values()), "no scans given"))
    if summary.volumes == 0:
        return summary
    if distributed.is_main():
        names = list(scans.table["volume"])
        _check_volumes(output, done, set(names) - set(refused))
        _join(parts, summary, {name: row for row, name in enumerate(names)})
        for path in (summary.predictions, summary.embeddings):
            _check_volumes(output, _volumes_of(path), done)
        shutil.rmtree(parts)
        # Parts of other interrupted runs are kept.
        with contextlib.suppress(OSError):
            parts.parent.rmdir()
    distributed.barrier()
    return summary


def check_count(output: Path, rows: int, expected: int) -> None:
    """Raise DataError if a table does not have a row for each scan that was not refused."""
    if rows != expected:
        raise DataError(f"{output}: {rows} rows for {expected} scans that were not refused; run the same command again")


def _volumes_of(path: Path) -> set[str]:
    if path.suffix == ".csv":
        return set(read_csv(path, usecols=["volume"], dtype=str)["volume"])
    return set(read_parquet(path.absolute(), ["volume"])["volume"].to_pylist())


def _check_volumes(output: Path, volumes: set[str], expected: set[str]) -> None:
    """Raise DataError if the table lacks a scan that was not refused, or has rows of other scans."""
    if volumes != expected:
        missing, foreign = len(expected - volumes), len(volumes - expected)
        raise DataError(
            f"{output}: {len(expected)} scans were not refused, {missing} of them have no row and {foreign} rows are of other "
            f"scans; run the same command again into an empty folder"
        )


@torch.inference_mode()
def report_embeddings(model: DualEncoder, texts: list[str], batch: int = 32) -> np.ndarray:
    """Unit embeddings (n, dim) of reports; an empty report becomes NaN, equal ones are encoded once."""
    # Texts of one length in their order, not in that of a set: sums depend on what shares a batch.
    distinct = sorted(dict.fromkeys(filter(None, texts)), key=len)
    vectors: dict[str, np.ndarray] = {}
    for start in range(0, len(distinct), batch):
        part = distinct[start : start + batch]
        vectors |= dict(zip(part, model.encode_text(part).float().cpu().numpy(), strict=True))
    empty = np.full(model.config.dim, np.nan, dtype=np.float32)
    return np.stack([vectors.get(text, empty) for text in texts])


def report_texts(table: pd.DataFrame, sections: Sequence[str]) -> list[str]:
    """The texts of the reports, with their sections joined as in training."""
    return [report.text() for report in reports_of(table, sections)]


def batches(
    scans: Scans, indices: list[int], batch: int, refused: dict[str, str], what: str = "detecting"
) -> Iterator[tuple[list[int], np.ndarray, list[str]]]:
    """(indices, voxels (b, 1, D, H, W) float32, warnings) of full batches; refused scans are added to ``refused``."""
    members: list[int] = []
    voxels: list[np.ndarray] = []
    warnings: list[str] = []
    ready = zip(indices, prefetch(scans.voxels, indices), strict=True)
    for index, result in track(ready, len(indices), what, "scans"):
        try:
            prepared, warning = result()
        except PreprocessingError as error:
            refused[str(scans.table["volume"].iloc[index])] = str(error)
            continue
        members.append(index)
        voxels.append(prepared)
        warnings.append(warning)
        if len(members) == batch:
            yield members, np.stack(voxels)[:, None], warnings
            members, voxels, warnings = [], [], []
    if members:
        yield members, np.stack(voxels)[:, None], warnings


def _scored(
    loaded: ModelFolder,
    head: Head,
    scans: Scans,
    indices: list[int],
    voxels: np.ndarray,
    warnings: list[str],
    reports: bool,
    training: TrainingSummary | None,
) -> pa.Table:
    with torch.inference_mode():
        encoded = loaded.model.encode(torch.from_numpy(voxels).to(loaded.model.device))
        scores, values = head.score(encoded).float(), head.values(encoded).float()
        probabilities = head.probabilities(scores)
    assert encoded.embedding is not None
    vectors = {VOLUME: encoded.embedding.float().cpu().numpy()}
    if training is not None:
        sources = [scans.source(index) for index in indices]
        far = drift_warnings(training, loaded.spec, voxels[:, 0], vectors[VOLUME], sources)
        warnings = ["; ".join(filter(None, pair)) for pair in zip(warnings, far, strict=True)]
    identity = scans.table.iloc[indices].loc[:, ["volume", "patient", "scan"]].assign(warnings=warnings)
    table = prediction_table(
        identity, list(head.names), probabilities.cpu().numpy(), scores.cpu().numpy(),
        dict(zip(head.values_of, values.cpu().numpy().T, strict=True)), intervals=head.intervals(scores), **provenance(loaded, head),
        adapted_on=adapted_on(adaptations(loaded, head), identity["patient"]),
    )  # fmt: skip
    if reports:
        vectors[REPORT] = report_embeddings(
            loaded.model, report_texts(scans.table.iloc[indices], loaded.trained_on.sections)
        )
    columns = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata(None)
    for name, column in zip((*vectors,), embedding_table(list(identity["volume"]), **vectors).columns[1:], strict=True):
        columns = columns.append_column(name, column)
    return columns


def provenance(loaded: ModelFolder, head: Head) -> dict[str, str]:
    """The columns of a prediction table that state the origin of its scores."""
    return {
        "model": loaded.hash, "supervision": supervision(loaded, head), "spec": loaded.spec.hash, "prompts": head.source,
        "labels": loaded.labels.identity if set(head.names) == set(loaded.labels.names) else "",
        "trained_on": loaded.trained_on.words(), "precision": loaded.model.precision,
    }  # fmt: skip


def adaptations(loaded: ModelFolder, head: Head) -> list[Adaptation]:
    """The records of adaptation of the model and the head."""
    of_model = [Adaptation.load(loaded.path / ADAPTATION)] if (loaded.path / ADAPTATION).is_file() else []
    return of_model if head.adaptation is None else [*of_model, head.adaptation]


def adapted_on(records: Sequence[Adaptation], patients: Iterable[str]) -> np.ndarray | None:
    """Whether any of ``records`` used labels of each patient: (patients,) bool; None without records."""
    if not records:
        return None
    names = [str(patient) for patient in patients]
    seen = {name for record in records for name in record.saw(dict.fromkeys(names))}
    return np.array([name in seen for name in names])


def supervision(loaded: ModelFolder, head: Head) -> str:
    """The supervision of model and head: label-supervised if either was trained on labels."""
    return loaded.trained_on.supervision if head.supervision == "none" else head.supervision


def _key(loaded: ModelFolder, head: Head, scans: Scans, reports: bool, summary: TrainingSummary | None) -> str:
    """The key of this run's parts; it differs for other models, prompts, calibrations or scans."""
    names = list(scans.table["volume"])
    facts = [
        loaded.hash,
        loaded.spec.hash,
        head.names,
        head.values_of,
        reports,
        names,
        scans.origin(),
        head.identity(),
        loaded.model.precision,
    ]
    return run_key(*facts, *([] if summary is None else [summary.limit]))


def run_key(*facts: object) -> str:
    """Sixteen hex digits that distinguish runs with the same output folder: a digest of ``facts``."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _done(parts: Path) -> set[str]:
    names: set[str] = set()
    for path in parts.glob("*.parquet"):
        names |= set(_part(path, ["volume"])["volume"].to_pylist())
    return names


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Context manager for reading a part. Raises DataError if an interrupted run or a full disk has damaged it."""
    try:
        yield
    except (*DAMAGE, pa.ArrowException) as error:
        raise DataError(f"{path}: damaged; delete it and run the same command again") from error


def _part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A part, or some of its columns."""
    with _reading(path):
        return read_parquet(regular(path).absolute(), columns)


def _schema(files: Sequence[Path]) -> pa.Schema:
    """The schema that all parts must have."""
    schemas: list[pa.Schema] = []
    for path in files:
        with _reading(path):
            schemas.append(pq.read_schema(path))
            # Damaged names are noticed only when they are decoded.
            if schemas[-1].names != schemas[0].names or schemas[-1] != schemas[0]:
                raise ValueError("other columns than those of another part")
    return schemas[0]


def _write_part(parts: Path, waiting: list[pa.Table]) -> None:
    if not waiting:
        return
    table = pa.concat_tables(waiting)
    first = hashlib.sha256("\n".join(table["volume"].to_pylist()).encode()).hexdigest()[:16]
    with written_beside(parts / f"{first}.parquet") as partial:
        write_parquet(partial, table)
    waiting.clear()


def _join(parts: Path, summary: Summary, order: dict[str, int]) -> None:
    """Join parts into the two final tables, one part in memory at a time, in the order of the scans."""
    files = sorted(
        parts.absolute().glob("*.parquet"), key=lambda path: order.get(_part(path, ["volume"])["volume"][0].as_py(), 0)
    )
    first = _schema(files)
    vectors = [name for name in (VOLUME, REPORT) if name in first.names]
    with written_beside(summary.embeddings) as partial:
        names = ["volume", *vectors]
        with parquet_writer(partial, pa.schema([first.field(name) for name in names])) as writer:
            for path in files:
                writer.write_table(_part(path, names))
    with written_beside(summary.predictions) as partial:
        if summary.predictions.suffix == ".parquet":
            with parquet_writer(partial, _part(files[0]).drop_columns(vectors).schema) as writer:
                for path in files:
                    writer.write_table(_part(path).drop_columns(vectors))
            return
        with partial.open("w", encoding="utf-8", newline="") as stream:
            for number, path in enumerate(files):
                table = _part(path).drop_columns(vectors).to_pandas()
                write_csv(stream, table, header=number == 0, float_format="%.9g")
