"""A FAISS index of volume embeddings with their reports, for finding earlier scans that resemble a new one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ctclip import extras
from ctclip.errors import DataError
from ctclip.inference.run import batches, check_count, report_embeddings, report_texts, run_key
from ctclip.inference.scans import StoredScans
from ctclip.models.checksums import sha256
from ctclip.models.folder import ModelFolder
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.files import regular, write_text, written_beside
from ctclip.preprocessing.formats.streams import DAMAGE
from ctclip.preprocessing.outputs import check_folder, claimed_folder, made_by_us
from ctclip.preprocessing.parquet import write_parquet
from ctclip.preprocessing.tables import read_own_parquet

FILES = ("volumes.faiss", "reports.faiss", "rows.parquet", "index.json")
ROWS = ("volume", "patient", "scan", "findings", "impression")


@dataclass
class Index:
    """``rows``: one row per volume (``ROWS``); ``volumes``, ``reports``: FAISS indices of unit vectors, by inner
    product."""

    rows: pd.DataFrame
    volumes: Any
    reports: Any
    model: str
    path: str = ""

    @classmethod
    def build(
        cls, rows: pd.DataFrame, volumes: np.ndarray, reports: np.ndarray | None, model: str, path: str = ""
    ) -> Index:
        """Build an index from ``volumes`` (n, dim), unit vectors in the order of ``rows``, ``reports`` likewise, NaN
        where there is none, and the hash and path of the model that encoded them."""
        return cls(rows.loc[:, list(ROWS)].reset_index(drop=True), _flat(volumes), _reports(reports), model, path)

    def save(self, folder: Path) -> None:
        """Write the index to a new folder; see ``index_store`` for an existing folder."""
        faiss = extras.require("faiss")
        for name, index in (("volumes", self.volumes), ("reports", self.reports)):
            if index is None:
                # Remove the file of an earlier index.
                (folder / f"{name}.faiss").unlink(missing_ok=True)
                continue
            with written_beside(folder / f"{name}.faiss") as partial:
                faiss.write_index(index, str(partial))
        with written_beside(folder / "rows.parquet") as partial:
            write_parquet(partial, self.rows)
        sums = {name: sha256(folder / name) for name in FILES[:3] if (folder / name).exists()}
        facts = {"model": self.model, "path": self.path, "volumes": len(self.rows), "sha256": sums}
        write_text(folder / "index.json", json.dumps(facts))

    @classmethod
    def load(cls, folder: Path, model: str) -> Index:
        """Load an index. Refuses an index of another model than ``model``."""
        faiss = extras.require("faiss")
        facts = index_facts(folder)
        _check_sums(folder, facts.get("sha256", {}))
        try:
            rows = read_own_parquet(folder / "rows.parquet", "run `ctclip index` again", texts=ROWS)
            volumes = faiss.read_index(str(regular(folder / "volumes.faiss")))
            path = folder / "reports.faiss"
            reports = faiss.read_index(str(regular(path))) if path.exists() else None
        except DAMAGE as error:
            raise DataError(f"{folder}: not a readable index; `ctclip index` writes one") from error
        if facts["model"] != model:
            raise DataError(f"{folder}: made with model {facts['model']}, not {model}: run `ctclip index` again")
        if reports is not None and not (
            reports.d == volumes.d and hasattr(reports, "id_map")
            and np.isin(faiss.vector_to_array(reports.id_map), np.arange(len(rows))).all()
        ):  # fmt: skip
            raise DataError(f"{folder}: reports.faiss does not fit the other files: run `ctclip index` again")
        if volumes.ntotal != len(rows):
            raise DataError(f"{folder}: {volumes.ntotal} vectors for {len(rows)} rows: run `ctclip index` again")
        return cls(rows, volumes, reports, model, str(facts.get("path", "")))

    def similar(self, query: np.ndarray, count: int, *, reports: bool = False) -> pd.DataFrame:
        """The ``count`` scans whose volume (or whose report) is nearest to the unit vector ``query`` (dim,).

        Reconstructions of one scan, and identical reports, are listed once. Columns of ``rows`` and ``similarity``,
        nearest first.
        """
        index = self.reports if reports else self.volumes
        if index is None:
            return self.rows.head(0).assign(similarity=[])
        if index.d != len(query):
            raise DataError(f"the index holds vectors of {index.d} numbers, not {len(query)}: run `ctclip index` again")
        by = ["findings", "impression"] if reports else ["scan"]
        depth = count
        while True:
            depth = min(index.ntotal, depth * 4)
            similarity, positions = index.search(np.ascontiguousarray(query[None], dtype=np.float32), depth)
            hits = self.rows.iloc[positions[0][positions[0] >= 0]].assign(similarity=similarity[0][positions[0] >= 0])
            distinct = hits.drop_duplicates(by)
            if len(distinct) >= count or depth == index.ntotal:
                return distinct.head(count).reset_index(drop=True)


def _flat(vectors: np.ndarray, ids: np.ndarray | None = None) -> Any:
    """Exact search: 50,000 vectors of 512 dimensions take 5 ms, and no match is missed."""
    faiss = extras.require("faiss")
    index = faiss.IndexFlatIP(vectors.shape[1])
    if ids is None:
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
        return index
    mapped = faiss.IndexIDMap(index)
    mapped.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), ids)
    return mapped


def _reports(vectors: np.ndarray | None) -> Any:
    if vectors is None:
        return None
    reported = np.flatnonzero(np.isfinite(vectors).all(axis=1))
    return _flat(vectors[reported], reported) if len(reported) else None


def _check_sums(folder: Path, sums: Any) -> None:
    """Raise DataError if a file differs from its SHA-256 in ``sums``: FAISS would load a vector with a flipped bit.
    Indices of versions before 1.1 have no checksums."""
    try:
        damaged = [name for name in FILES if name in sums and sha256(regular(folder / name)) != sums[name]]
    except UNFIT as error:
        raise DataError(f"{folder}: not a readable index; `ctclip index` writes one") from error
    if damaged:
        raise DataError(
            f"{folder}: {damaged[0]} is damaged, its SHA-256 is not that of index.json: run `ctclip index` again"
        )


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index, or tables of other ctclip commands."""
    return made_by_us(folder, {"index.json": b'"volumes"'})


def check_output(folder: Path) -> None:
    """Raise PreprocessingError unless an index may be written to ``folder``."""
    check_folder(folder, is_index, "output of `ctclip index`")


def index_facts(folder: Path) -> dict[str, Any]:
    """``model`` (hash), ``path`` of the model folder, ``volumes``."""
    try:
        facts: dict[str, Any] = plain_json.read(folder / "index.json")
        return facts | {"model": str(facts["model"])}
    except UNFIT as error:
        raise DataError(f"{folder}: not a readable index; `ctclip index` writes one") from error


def index_store(
    loaded: ModelFolder, scans: StoredScans, folder: Path, batch: int, refused: dict[str, str], *, force: bool = False
) -> Index:
    """Run ``build_index`` and write to ``folder``. Raises PreprocessingError if the folder holds other files, another
    process writes there, or it holds an index of other scans or another model and ``force`` is not given."""
    extras.check("index")
    key = run_key(loaded.hash, loaded.spec.hash, loaded.model.precision, list(scans.table["volume"]), scans.origin())
    with claimed_folder(folder, "index", key, FILES, is_index, force=force):
        index = build_index(loaded, scans, batch, refused)
        index.save(folder)
    return index


def build_index(loaded: ModelFolder, scans: StoredScans, batch: int, refused: dict[str, str]) -> Index:
    """Encode the volumes and reports of a store and index them; volumes that cannot be read are added to
    ``refused``."""
    extras.check("index")
    order, vectors = [], []
    for indices, voxels, _ in batches(scans, list(range(len(scans.table))), batch, refused, "indexing"):
        with torch.inference_mode():
            encoded = loaded.model.encode_volume(torch.from_numpy(voxels).to(loaded.model.device))
        order += indices
        vectors.append(encoded.float().cpu().numpy())
    if not order:
        raise DataError(next(iter(refused.values()), f"{scans.store.path}: no volume to index"))
    check_count(scans.store.path, len(order), len(scans.table) - len(refused))
    rows = scans.table.iloc[order]
    reports = report_embeddings(loaded.model, report_texts(rows, loaded.trained_on.sections))
    return Index.build(rows, np.concatenate(vectors), reports, loaded.hash, str(loaded.path.resolve()))
