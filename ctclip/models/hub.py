"""Pretrained models by name: a local folder, or a downloaded repository of the Hugging Face Hub.

Only data are downloaded: configuration, tokenizer and weights, never code.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctclip.errors import CheckpointError

# Timeout of the hub in seconds; an unreachable name server would take longer.
PATIENCE = 8.0
DATA = ("*.json", "*.txt", "*.model")
WEIGHTS = {"model.safetensors": ("*.safetensors",), "pytorch_model.bin": ("pytorch_model*.bin",)}


def pretrained_folder(source: str | Path, key: str, *, weights: bool = True) -> Path:
    """The folder for ``source``, a path or the name of a hub repository.

    ``key``: the setting it comes from, named in errors. ``weights``: whether the weights are needed. Without a
    connection, a repository downloaded earlier is used from the cache. The CheckpointError distinguishes a name that
    does not exist from a hub that cannot be reached.
    """
    folder = local_path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    if folder.exists() or not _may_be_repository(name):
        raise CheckpointError(f"{source}: no such folder; name an existing one in {key}")
    cached = {kind[0]: [*DATA, *kind] for kind in WEIGHTS.values()} if weights else {"*.json": list(DATA)}
    return _snapshot(name, key, lambda files: _patterns(name, files, weights), cached, "*/*")


def model_folder(source: str | Path, patterns: list[str], required: str) -> Path:
    """The model folder for ``source``, a path or the name of a hub repository. From a repository, the files that match
    ``patterns`` are downloaded; ``required`` must be among them. Raises CheckpointError like ``pretrained_folder``."""
    folder = local_path(source)
    if folder.is_dir():
        return folder
    name = str(source)
    if folder.exists() or not _may_be_repository(name) or "/" not in name:
        raise CheckpointError(f"{source}: no such model folder")

    def of_a_model(files: set[str]) -> list[str]:
        if required not in files:
            raise CheckpointError(f"{name}: this repository holds no model of this package ({required} is missing)")
        return patterns

    return _snapshot(name, "the model", of_a_model, {required: patterns}, None)


def local_path(source: str | Path) -> Path:
    """The path as given if it exists, else with ``~`` expanded to the home directory."""
    path = Path(source)
    if not path.exists() and str(source).startswith("~"):
        with contextlib.suppress(RuntimeError):  # unknown user, or user without a home directory
            return path.expanduser()
    return path


def _may_be_repository(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _snapshot(
    name: str, key: str, wanted: Callable[[set[str]], list[str]], cached: dict[str, list[str]], ignored: str | None
) -> Path:
    """Download the ``wanted`` files of a repository. Without a connection, use files downloaded earlier with one of the
    lists of patterns in ``cached``; each of its patterns must match a file."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=wanted(_files(name, key)), ignore_patterns=ignored))
    except _Unreachable as unreachable:
        earlier = _fetched_before(name, cached, ignored)
        if earlier is None:
            raise CheckpointError(
                f"{name}: not a folder here, and the Hugging Face hub cannot be reached ({unreachable}). Fetch the "
                f"repository where there is a connection, and name its folder in {key}"
            ) from unreachable
        return earlier
    except CheckpointError:
        raise
    except Exception as error:  # the libraries below raise many kinds of connection errors
        raise CheckpointError(f"{name}: could not be fetched from the Hugging Face hub ({_reason(error)})") from error


def _fetched_before(name: str, cached: dict[str, list[str]], ignored: str | None) -> Path | None:
    """The cached repository of an earlier run, or None."""
    from huggingface_hub import snapshot_download

    for required, patterns in cached.items():
        with contextlib.suppress(OSError, ValueError):
            folder = Path(
                snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored, local_files_only=True)
            )
            if any(folder.glob(required)):
                return folder
    return None


class _Unreachable(Exception):
    """The hub did not answer; the message states the reason."""


def _files(name: str, key: str) -> set[str]:
    """The files of a repository. Raises _Unreachable, or CheckpointError if access is not allowed."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        listing = _within(PATIENCE, lambda: HfApi().model_info(name, timeout=PATIENCE / 2))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: access to this repository is restricted; accept its terms on the hub's page and log in (`hf auth login`)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{name}: neither a local folder nor a readable repository of the Hugging Face hub; check the spelling of "
            f"{key}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise _Unreachable("HF_HUB_OFFLINE is set") from error
    except Exception as error:
        raise _Unreachable(_reason(error)) from error
    return {sibling.rfilename for sibling in listing.siblings or ()}


def _patterns(name: str, files: set[str], weights: bool) -> list[str]:
    """The patterns of files to download from a pretrained repository; safetensors are preferred."""
    if not weights:
        return list(DATA)
    for first, patterns in WEIGHTS.items():
        if first in files or f"{first}.index.json" in files:
            return [*DATA, *patterns]
    raise CheckpointError(f"{name}: this repository holds neither model.safetensors nor pytorch_model.bin")


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call ``call()`` with a timeout, because a name server may take any time."""
    result: list[Any] = []
    fault: list[Exception] = []

    def work() -> None:
        try:
            result.append(call())
        except Exception as error:
            fault.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if fault:
        raise fault[0]
    if not result:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return result[0]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
