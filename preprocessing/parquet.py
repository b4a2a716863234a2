"""Parquet files whose pages have checksums, so that a flipped bit is noticed when they are read.

Files without checksums, of earlier versions or other programs, are read as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


def write_parquet(path: str | os.PathLike[str], table: pd.DataFrame | pa.Table) -> None:
    """Write a table without its index."""
    if isinstance(table, pd.DataFrame):
        table = pa.Table.from_pandas(table, preserve_index=False)
    pq.write_table(table, path, write_page_checksum=True)


def parquet_writer(path: str | os.PathLike[str], schema: pa.Schema) -> pq.ParquetWriter:
    """A writer to which tables are given one after another."""
    return pq.ParquetWriter(path, schema, write_page_checksum=True)


def read_parquet(path: str | os.PathLike[str], columns: Sequence[str] | None = None) -> pa.Table:
    """A table, or some of its columns. Raises OSError or an error of pyarrow if the file is damaged."""
    return pq.read_table(path, columns=columns, page_checksum_verification=True)


def open_parquet(path: str | os.PathLike[str]) -> pq.ParquetFile:
    """A file that is read in parts."""
    return pq.ParquetFile(path, page_checksum_verification=True)
