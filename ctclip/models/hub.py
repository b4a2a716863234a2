"""Pretrained models by name: a local folder, or a downloaded repository of the Hugging Face Hub.

Only data are brought: configuration, tokenizer and weights. Code that lies beside them stays where it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctclip.errors import CheckpointError

# Seconds the hub has to answer; a name server that is not there takes longer to say so.
PATIENCE = 8.0
DATA = ("*.json", "*.txt", "*.model")
WEIGHTS = {"model.safetensors": ("*.safetensors",), "pytorch_model.bin": ("pytorch_model*.bin",)}


def pretrained_folder(source: str | Path, key: str, *, weights: bool = True) -> Path:
    """The folder that ``source`` (a path, or the name of a hub repository) stands for.

    ``key``: the setting it comes from, named in errors. ``weights``: whether the weights are needed. Without a
    connection a repository that was fetched before is taken from the cache. Raises CheckpointError that tells a name
    that does not exist from a hub that cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    name = str(source)
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"{source}: no such folder; name an existing one in {key}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_patterns(name, key, weights), ignore_patterns="*/*"))
    except _Unreachable as unreachable:
        earlier = _fetched_before(name, weights)
        if earlier is None:
            raise CheckpointError(
                f"{name}: not a folder here, and the Hugging Face hub cannot be reached ({unreachable}). Fetch the "
                f"repository where there is a connection, and name its folder in {key}"
            ) from unreachable
        return earlier
    except CheckpointError:
        raise
    except Exception as error:  # a connection breaks in as many ways as there are libraries below
        raise CheckpointError(f"{name}: could not be fetched from the Hugging Face hub ({_reason(error)})") from error


def _fetched_before(name: str, weights: bool) -> Path | None:
    """The repository as an earlier run left it in the cache, or None."""
    from huggingface_hub import snapshot_download

    for patterns in WEIGHTS.values() if weights else [()]:
        with contextlib.suppress(OSError, ValueError):
            folder = Path(
                snapshot_download(name, allow_patterns=[*DATA, *patterns], ignore_patterns="*/*", local_files_only=True)
            )
            if not weights or any(any(folder.glob(pattern)) for pattern in patterns):
                return folder
    return None


class _Unreachable(Exception):
    """The hub did not answer; the message says why."""


def _patterns(name: str, key: str, weights: bool) -> list[str]:
    """What of the repository is fetched: safetensors where there are any."""
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
            f"{name}: neither a folder here nor a repository of the Hugging Face hub that may be read; check the "
            f"spelling of {key}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise _Unreachable("HF_HUB_OFFLINE is set") from error
    except Exception as error:
        raise _Unreachable(_reason(error)) from error
    files = {sibling.rfilename for sibling in listing.siblings or ()}
    if not weights:
        return list(DATA)
    for first, patterns in WEIGHTS.items():
        if first in files or f"{first}.index.json" in files:
            return [*DATA, *patterns]
    raise CheckpointError(f"{name}: this repository holds neither model.safetensors nor pytorch_model.bin")


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """``call()``, waited for no longer than that: nothing bounds the time that a name server may take."""
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
