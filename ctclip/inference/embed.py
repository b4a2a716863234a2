"""Write embeddings to a file: Parquet with ids, or only the vectors as .npy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ctclip.data.reports import Report
from ctclip.errors import DataError
from ctclip.evaluation.tables import embedding_table
from ctclip.inference.run import REPORT, VOLUME, batches, check_count, report_embeddings, run_key
from ctclip.inference.scans import Scans
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing.files import written_beside
from ctclip.preprocessing.outputs import check_file, claimed_file
from ctclip.preprocessing.parquet import parquet_writer
from ctclip.preprocessing.progress import track
from ctclip.report_reading.reports import load_reports

CHUNK = 256
# Key in the metadata of a Parquet file that identifies model and scans.
KEY = b"ctclip.run"


def embed_scans(
    loaded: ModelFolder, scans: Scans, output: Path, batch: int, refused: dict[str, str], *, force: bool = False
) -> int:
    """Embed volumes and write them to ``output``; return their number. Refused scans are added to ``refused``.
    ``force``: replace embeddings of another run."""
    key = run_key(loaded.hash, loaded.spec.hash, loaded.model.precision, list(scans.table["volume"]), scans.origin())
    tables = _volumes(loaded.model, scans, batch, refused)
    with claimed_file(output):
        check_embeddings(output, key, force=force)
        rows = write_tables(output, tables, refused, key)
    check_count(output, rows, len(scans.table) - len(refused))
    return rows


def embed_reports(loaded: ModelFolder, source: Path, output: Path, *, force: bool = False) -> int:
    """Embed the reports of a .txt file (one per line) or a CSV and write them to ``output``; return their number."""
    model = loaded.model
    names, texts = read_reports(source)
    starts = range(0, len(texts), CHUNK)

    def tables() -> Iterator[pa.Table]:
        for start in track(starts, len(starts), "embedding", "batches"):
            vectors = report_embeddings(model, texts[start : start + CHUNK])
            yield embedding_table(names[start : start + CHUNK], **{REPORT: vectors})

    key = run_key(loaded.hash, names, texts)
    with claimed_file(output):
        check_embeddings(output, key, force=force)
        rows = write_tables(output, tables(), key=key)
    check_count(output, rows, len(names))
    return rows


def check_embeddings(path: Path, key: str | None = None, *, force: bool = False) -> None:
    """Raise PreprocessingError unless embeddings of the run ``key`` (None: of any run) may be written to ``path``. A
    .npy file does not state its origin, and is never replaced without ``force``."""
    check_file(path, lambda existing: _key_of(existing) is not None, force=force)
    kept = None if force or not path.exists() else _key_of(path)
    if key is not None and kept is not None and kept != key:
        raise DataError(
            f"{path}: holds embeddings of another run (other scans or another model); give another --output, or replace "
            f"them with --force"
        )


def _key_of(path: Path) -> str | None:
    try:
        return (pq.read_schema(path.absolute()).metadata or {}).get(KEY, b"").decode() or None
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return None


def read_reports(source: Path) -> tuple[list[str], list[str]]:
    """Names and texts of a table of reports, or of a text file with one on each line; see ``load_reports``. A
    placeholder report becomes "". Raises DataError or PreprocessingError if the file cannot be read."""
    reports = load_reports(source)
    sections = (
        dict(zip(reports.sections, parts, strict=True)) for parts in zip(*reports.sections.values(), strict=True)
    )
    texts = [Report(parts).text() for parts in sections]
    if not any(texts):
        raise DataError(f"{source}: holds no report")
    return reports.ids, texts


def write_tables(path: Path, tables: Iterator[pa.Table], refused: dict[str, str] | None = None, key: str = "") -> int:
    """Stream tables of vectors into one file, atomically; a .npy file gets the single column of vectors. ``key`` is
    stored in the metadata of a Parquet file."""
    rows = 0
    with written_beside(path) as partial:
        writer: pq.ParquetWriter | None = None
        vectors: list[np.ndarray] = []
        for table in tables:
            rows += len(table)
            if path.suffix == ".npy":
                column = table.column(1).combine_chunks()
                vectors.append(column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1))
                continue
            table = table.replace_schema_metadata({KEY: key.encode()})
            writer = writer or parquet_writer(partial, table.schema)
            writer.write_table(table)
        if rows == 0:
            raise DataError(next(iter((refused or {}).values()), "nothing to embed"))
        if writer is not None:
            writer.close()
        else:
            with partial.open("wb") as stream:
                np.save(stream, np.concatenate(vectors))
    return rows


def _volumes(model: DualEncoder, scans: Scans, batch: int, refused: dict[str, str]) -> Iterator[pa.Table]:
    names = scans.table["volume"]
    device = model.device
    for indices, voxels, _ in batches(scans, list(range(len(names))), batch, refused, "embedding"):
        with torch.inference_mode():
            vectors = model.encode_volume(torch.from_numpy(voxels).to(device))
        yield embedding_table([str(names.iloc[i]) for i in indices], **{VOLUME: vectors.float().cpu().numpy()})
