"""Parquet files: a flipped bit is noticed, and files of other programs are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import ctclip
from ctclip.errors import CtclipError
from ctclip.evaluation.tables import read_embeddings
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.parquet import open_parquet, parquet_writer, read_parquet, write_parquet
from ctclip.preprocessing.tables import read_own_parquet, read_table

VECTORS = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)


def embeddings() -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(VECTORS.ravel()), 8)
    return pa.table({"volume": [f"v{number}" for number in range(len(VECTORS))], "volume_embedding": column})


def table() -> pd.DataFrame:
    numbers = np.random.default_rng(1)
    return pd.DataFrame({"volume": [f"v{n}" for n in range(200)], "score": numbers.normal(size=200)})


@pytest.mark.parametrize(
    ("content", "read"),
    [
        (embeddings(), read_embeddings),
        (table(), lambda path: read_own_parquet(path, "run it again", numbers=("score",))),
        (table(), read_table),
        (table(), lambda path: open_parquet(path).read().to_pandas()),
    ],
)
def test_a_flipped_bit_is_noticed(content: Any, read: Callable[[Path], Any], tmp_path: Path) -> None:
    path, random, noticed = tmp_path / "t.parquet", np.random.default_rng(0), 0
    write_parquet(path, content)
    whole, kept = read(path), path.read_bytes()
    for _ in range(150):
        damaged = bytearray(kept)
        damaged[random.integers(len(kept))] ^= 1 << random.integers(8)
        path.write_bytes(bytes(damaged))
        try:
            found = read(path)
        except (CtclipError, PreprocessingError, OSError, ValueError, pa.ArrowException):
            noticed += 1
            continue
        if isinstance(whole, dict):
            assert all(np.array_equal(values, found[name]) for name, values in whole.items())
        else:
            # The metadata at the end of a file have no checksum: names may differ, values may not.
            np.testing.assert_array_equal(whole.to_numpy(), found.to_numpy())
    assert noticed > 50


def test_tables_are_written_in_parts_and_read_by_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with parquet_writer(path, embeddings().schema) as writer:
        writer.write_table(embeddings().slice(0, 10))
        writer.write_table(embeddings().slice(10))
    assert read_parquet(path).equals(embeddings())
    assert read_parquet(path, ["volume"]).column_names == ["volume"]
    without = tmp_path / "other.parquet"
    table().to_parquet(without, index=False)
    pd.testing.assert_frame_equal(read_parquet(without).to_pandas(), table())


def test_every_parquet_file_is_written_and_read_with_checksums() -> None:
    """No module calls pyarrow or pandas directly."""
    direct = re.compile(r"\.to_parquet\(|pd\.read_parquet\(|pq\.(read_table|write_table|ParquetWriter|ParquetFile)\(")
    package = Path(ctclip.__file__).parent
    # One of its folders may be a link, which ``rglob`` does not follow.
    files = [path for folder in (package, package / "preprocessing") for path in folder.rglob("*.py")]
    assert {path.name for path in files if direct.search(path.read_text(encoding="utf-8"))} == {"parquet.py"}
