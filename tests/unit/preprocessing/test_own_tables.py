"""Damaged files of our own commands are reported in one line that names the file and the remedy."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ctclip.audit.pictures import keep_array, kept_array
from ctclip.config_files import read_mapping
from ctclip.data.pair_scores import FILE, read_pair_scores
from ctclip.errors import ConfigError, DataError
from ctclip.evaluation.tables import embedding_table, read_embeddings
from ctclip.inference.index import ROWS, Index
from ctclip.inference.run import Summary, _done, _join, _write_part
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.cohorts import check_table
from ctclip.preprocessing.cohorts.table import cohort_table
from ctclip.preprocessing.errors import PreprocessingError
from ctclip.preprocessing.files import LARGEST_TEXT
from ctclip.preprocessing.outcomes import read_outcomes
from ctclip.preprocessing.plain_yaml import load_yaml
from ctclip.preprocessing.spec import PreprocessingSpec
from ctclip.preprocessing.store import VolumeStore
from ctclip.preprocessing.tables import MOST_ROWS, read_own_parquet, read_table

GOOD = pd.DataFrame({"volume": ["a", "b"], "score": [0.1, 0.2], "worse_share": [0.25, 0.75]})


def store(folder: Path) -> VolumeStore:
    return VolumeStore.create(folder, PreprocessingSpec("tiny", spacing=(1.0, 1.0, 1.0), shape=(2, 2, 2)))


@pytest.mark.parametrize(
    ("table", "what"),
    [
        (GOOD.drop(columns="score"), "column 'score' is missing"),
        (GOOD.assign(score=["x", "y"]), "column 'score' holds no numbers"),
        (GOOD.assign(volume=[1, 2]), "column 'volume' holds no text"),
        (GOOD.assign(volume=[None, "b"]), "column 'volume' holds no text"),
        (b"", "cannot be read as Parquet"),
        (b"PAR1 and no more", "cannot be read as Parquet"),
    ],
)
def test_scores_of_pairs(tmp_path: Path, table: pd.DataFrame | bytes, what: str) -> None:
    kept = store(tmp_path)
    if isinstance(table, bytes):
        (kept.path / FILE).write_bytes(table)
    else:
        table.to_parquet(kept.path / FILE, index=False)
    with pytest.raises(PreprocessingError, match=rf"{FILE}: {what}.*; delete it, and run `ctclip filter-pairs --keep`"):
        read_pair_scores(kept)


@pytest.mark.parametrize(
    "content", [b"", b"volume,outcome\n\"a,done\n", b"volume,outcome\na,done,1,2,3\n", b"\xff\xfev\0", b"<html>", b"volume;x"]
)  # fmt: skip
def test_outcomes(tmp_path: Path, content: bytes) -> None:
    kept = store(tmp_path)
    (kept.path / "outcomes.csv").write_bytes(content)
    with pytest.raises(
        PreprocessingError, match=r"outcomes\.csv: .* delete it, and run `ctclip preprocess` on this store"
    ):
        read_outcomes(kept)


def test_a_cohort_table_holds_text(tmp_path: Path) -> None:
    table = cohort_table([{"volume": name, "path": f"{name}.nii.gz"} for name in "ab"])
    assert len(check_table(table, tmp_path)) == 2
    for change, what in (
        ({"patient": [1, 2]}, "'patient' holds int"), ({"findings": ["", None]}, "'findings' holds NoneType"),
        ({"scan": ["a", ""]}, "'scan' has empty cells"),
    ):  # fmt: skip
        with pytest.raises(PreprocessingError, match=f"column {what}; `ctclip preprocess` writes text there"):
            check_table(
                table.assign(**{name: pd.Series(values, dtype=object) for name, values in change.items()}), tmp_path
            )
    damaged = store(tmp_path / "store")
    (damaged.path / "cohort.parquet").write_bytes(b"PAR1")
    with pytest.raises(PreprocessingError, match=r"cohort\.parquet: cannot be read as Parquet"):
        _ = damaged.cohort


def test_an_index_whose_files_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pd.DataFrame({name: ["a", "b", "c"] for name in ROWS})
    vectors = np.eye(3, 4, dtype=np.float32)
    Index.build(rows, vectors, vectors, "m").save(tmp_path)
    opened = Index.load(tmp_path, "m")
    assert opened.similar(vectors[1], 1)["volume"].tolist() == ["b"]
    with pytest.raises(DataError, match="vectors of 4 numbers, not 3"):
        opened.similar(vectors[1, :3], 1)
    # As versions before 1.1 wrote it, without checksums.
    facts = json.loads((tmp_path / "index.json").read_text())
    del facts["sha256"]
    (tmp_path / "index.json").write_text(json.dumps(facts))
    for table, what in (
        (rows.drop(columns="scan"), "column 'scan' is missing"), (rows.assign(findings=None), "'findings' holds no text"),
    ):  # fmt: skip
        table.to_parquet(tmp_path / "rows.parquet", index=False)
        with pytest.raises(PreprocessingError, match=rf"rows\.parquet: .*{what}; run `ctclip index` again"):
            Index.load(tmp_path, "m")
    # Reports of a fourth volume, which is not in the other files.
    rows.head(2).to_parquet(tmp_path / "rows.parquet", index=False)
    with pytest.raises(DataError, match=r"reports\.faiss does not fit the other files"):
        Index.load(tmp_path, "m")

    def too_large(path: str) -> None:
        # For a damaged size.
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("faiss.read_index", too_large)
    with pytest.raises(DataError, match="not a readable index"):
        Index.load(tmp_path, "m")


@pytest.mark.parametrize("name", ["volumes.faiss", "reports.faiss", "rows.parquet"])
def test_a_flipped_bit_in_an_index_is_found(tmp_path: Path, name: str) -> None:
    vectors = np.eye(3, 4, dtype=np.float32)
    Index.build(pd.DataFrame({name: ["a", "b", "c"] for name in ROWS}), vectors, vectors, "m").save(tmp_path)
    damaged = bytearray((tmp_path / name).read_bytes())
    damaged[-3] ^= 4
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(DataError, match=rf"{name} is damaged, its SHA-256 is not that of index\.json"):
        Index.load(tmp_path, "m")
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match="not a readable index"):
        Index.load(tmp_path, "m")


def test_a_damaged_part_of_an_interrupted_run_is_named(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    for name in "ab":
        _write_part(parts, [embedding_table([name], volume_embedding=np.ones((1, 4), np.float32))])
    assert _done(parts) == {"a", "b"}
    part = next(parts.glob("*.parquet"))
    whole = part.read_bytes()
    other = io.BytesIO()
    pd.DataFrame({"volume": ["a"], "other": [1]}).to_parquet(other)
    summary = Summary(tmp_path / "predictions.csv", tmp_path / "embeddings.parquet", 2)
    for content in (b"", whole[:-9], whole[:4] + bytes(40) + whole[44:], other.getvalue()):
        part.write_bytes(content)
        with pytest.raises(DataError, match=r"\.parquet: damaged; delete it and run the same command again"):
            _join(parts, summary, dict.fromkeys(_done(parts), 0))
        assert list(tmp_path.iterdir()) == [parts]


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.json"
    os.mkfifo(fifo)
    with pytest.raises(OSError, match="is a FIFO, not a file"):
        plain_json.read(fifo)
    with pytest.raises(ConfigError, match=r"fifo\.json: cannot be read as YAML .*is a FIFO"):
        read_mapping(fifo)
    for read in (lambda path: read_own_parquet(path, "copy it again"), read_table):
        os.replace(fifo, fifo := fifo.with_suffix(".parquet"))
        with pytest.raises(PreprocessingError, match="cannot be read as Parquet"):
            read(fifo)
    with pytest.raises(OSError, match="is a device"):
        plain_json.read(Path("/dev/null"))
    assert kept_array(fifo) is None


@pytest.mark.parametrize("value", ["1" + "0" * 400, '"\\ud800"', '{"\\udc00": 1}', "[" * 100_000])
def test_a_value_that_no_later_step_could_use_is_refused(value: str) -> None:
    """Numbers too large for a float, halves of a surrogate pair, and nesting too deep for the parser."""
    with pytest.raises(ValueError, match=r"too large|surrogate|too deep"):
        plain_json.loads(f'{{"a": {value}}}')
    with pytest.raises(yaml.YAMLError, match=r"too long|surrogate|nested deeper"):
        load_yaml(f"a: {value}")


def test_values_that_look_unusable_are_read() -> None:
    # Transformers writes int(1e30) as the length of texts.
    for text, value in (
        ('"\\ud83d\\ude00 \\\\ud800"', "\U0001f600 \\ud800"),
        (str(int(1e30)), int(1e30)),
        ("[-0, 1]", [0, 1]),
    ):
        assert plain_json.loads(text) == load_yaml(text) == value
    assert load_yaml("1:59:59") == 7199
    with pytest.raises(yaml.YAMLError, match="a number is too long"):
        load_yaml("1" + ":59" * 1000)


def test_sizes_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "large.yaml"
    with text.open("wb") as stream:
        stream.truncate(LARGEST_TEXT + 1)
    with pytest.raises(OSError, match="is larger than 256 MiB"):
        plain_json.read(text)
    with pytest.raises(ConfigError, match=r"large\.yaml: cannot be read as YAML .*larger than 256 MiB"):
        read_mapping(text)
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"volume": pa.nulls(MOST_ROWS + 1, pa.bool_())}), rows)
    assert rows.stat().st_size < 100_000
    for read in (lambda path: read_own_parquet(path, "copy it again"), read_table, read_embeddings):
        with pytest.raises(PreprocessingError, match=r"rows\.parquet: has 10,000,001 rows"):
            read(rows)


def test_a_damaged_array_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "kept.npy"
    assert kept_array(path) is None
    keep_array(path, np.arange(6.0))
    assert kept_array(path, mapped=True) == pytest.approx(np.arange(6.0))
    whole = path.read_bytes()
    flipped = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in range(len(whole))]
    for content in (b"", whole[:-3], whole[:-4], b"\x93NUMPY\x01\0\xff\xff", b"PK\x03\x04", *flipped):
        path.write_bytes(content)
        assert kept_array(path) is None
