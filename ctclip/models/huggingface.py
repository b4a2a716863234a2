"""Models of Transformers: one constructor for pretrained weights and for our own model folders.

A configuration is data: entries that name code to run, libraries to load or number formats are ignored. Parameters are
converted to float32, and every weight must be in the file: a missing weight is an error instead of being initialised at
random.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctclip.errors import CheckpointError, CtclipError
from ctclip.models.hub import pretrained_folder
from ctclip.preprocessing import plain_json
from ctclip.preprocessing.errors import PreprocessingError

# Architectures published with their own code and name that are equal to one in Transformers.
PLAIN = {"cxr-bert": "bert"}
# Keys of a configuration that name code, files or number formats, or change what a model returns.
LEFT_OUT = frozenset({
    "auto_map", "custom_pipelines", "_name_or_path", "name_or_path", "transformers_weights",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "experts_implementation", "_experts_implementation", "use_kernels", "use_kernel_forward_from_hub",
    "dtype", "torch_dtype", "torchscript", "return_dict", "use_return_dict", "reference_compile",
    "output_attentions", "output_hidden_states", "use_cache", "gradient_checkpointing",
})  # fmt: skip
# Upper limits of sizes in a configuration, well above the largest existing models.
MOST = {"layer": 512, "depth": 512, "block": 512, "expert": 4096}
# Buffers that older versions saved with the weights and that are now computed.
COMPUTED = re.compile(r"(position_ids|token_type_ids|masked_bias|attn\.bias|inv_freq|relative_position_index)$")
# Number formats of trainable weights; others are only for inference.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError naming the file."""
    try:
        values = plain_json.read(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({_reason(error)})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object of names and values, not a {type(values).__name__}")
    return values


def shape_of(values: dict[str, Any], source: str | Path) -> Any:
    """The Transformers configuration for ``values``, the contents of ``config.json``. ``source`` is named in errors."""
    from transformers import CONFIG_MAPPING

    values = _data_alone(values)
    kind = values.pop("model_type", "bert")
    kind = PLAIN.get(kind, kind) if isinstance(kind, str) else repr(kind)[:40]
    if values.get("quantization_config"):
        raise CheckpointError(f"{source}: these weights are quantised and cannot be trained; take the original ones")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{source}: the architecture {kind!r} is not part of Transformers: it would need code that comes "
            f"with the checkpoint, which is never run here. Choose a model of a known architecture"
        )
    _check_parts(values, source)
    with one_line_errors(source, "describes no model"):
        shape = CONFIG_MAPPING[kind].from_dict(values)
    if hasattr(shape, "use_cache"):
        # Not needed without generation.
        shape.use_cache = False
    return shape


def text_model(source: str | Path, *, weights: bool = True) -> nn.Module:
    """The text encoder of a folder or hub repository; ``weights`` False: its architecture, freshly initialised."""
    return _pretrained(source, "text", weights)


def vision_model(source: str | Path, *, weights: bool = True) -> nn.Module:
    """Like ``text_model``, for an encoder of 2-D images."""
    return _pretrained(source, "vision", weights)


def text_model_of(values: dict[str, Any], source: str | Path) -> nn.Module:
    """The text encoder that a configuration describes, freshly initialised."""
    return _fresh(shape_of(values, source), "text", source)


def vision_model_of(values: dict[str, Any], source: str | Path) -> nn.Module:
    """Like ``text_model_of``, for an encoder of 2-D images."""
    return _fresh(shape_of(values, source), "vision", source)


def _pretrained(source: str | Path, side: str, weights: bool) -> nn.Module:
    key = {"text": "model.text", "vision": "model.volume"}[side]
    folder = pretrained_folder(source, f"{key}.pretrained", weights=weights)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no {side} model could be loaded (config.json is missing). The folder needs config.json, "
            f"{'the tokenizer' if side == 'text' else 'preprocessor_config.json'} and model.safetensors"
        )
    shape = shape_of(read_settings(folder / "config.json"), folder / "config.json")
    if not weights:
        return _fresh(shape, side, folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder}: holds an adapter; merge it into its model and save that (merge_and_unload)")
    if not any(any(folder.glob(f"{stem}*")) for stem in ("model*.safetensors", "pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder}: no {side} model could be loaded (model.safetensors is missing; {key}.weights=random works "
            f"without it)"
        )
    _check_kinds(folder)
    return _trained(folder, shape, side)


def _check_kinds(folder: Path) -> None:
    """Refuse weights that are integers or have 8 bits: they are quantised, even if config.json does not say so, and
    their scale is lost."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("model*.safetensors")):
        # Damaged files are reported later.
        with contextlib.suppress(SafetensorError, OSError), safe_open(path, "pt") as weights:
            names: list[str] = weights.keys()
            kinds = {name: weights.get_slice(name).get_dtype() for name in names if name.endswith(".weight")}
            coarse = next((name for name, kind in kinds.items() if kind not in FLOATS), None)
            if coarse is not None:
                raise CheckpointError(
                    f"{path}: these weights are quantised and cannot be trained ({coarse} is {kinds[coarse]}); take the "
                    f"original ones"
                )


def _trained(folder: Path, shape: Any, side: str) -> nn.Module:
    kind, shape, options = _architecture(shape, side, folder / "config.json")
    with _quiet(), one_line_errors(folder, "the weights do not fit config.json, or a file is damaged"):
        model, report = kind.from_pretrained(
            str(folder), config=shape, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
            output_loading_info=True, **options,
        )  # fmt: skip
    missing = set(report["missing_keys"])
    if any("pooler" in name for name in missing) and "add_pooling_layer" in options and options["add_pooling_layer"]:
        # The model was saved from a task without a pooler; a random pooler must not be mixed with trained weights.
        shape.add_pooling_layer = False
        return _trained(folder, shape, side)
    lacking = sorted(name for name in missing if "pooler" not in name)
    if lacking:
        raise CheckpointError(
            f"{folder}: the weights belong to another architecture than config.json describes: {len(lacking)} "
            f"parameters are missing, for example {lacking[0]}"
        )
    left = sorted(name for name in report["unexpected_keys"] if _of_a_layer(model, name))
    if left:
        raise CheckpointError(
            f"{folder}: the weights belong to another architecture than config.json describes: {len(left)} of them "
            f"do not belong to it, for example {left[0]}"
        )
    return _encoder(model, side)


def _fresh(shape: Any, side: str, source: str | Path) -> nn.Module:
    kind, shape, options = _architecture(shape, side, source)
    with _quiet(), one_line_errors(source, "describes no model that can be built"):
        # AutoModel.from_config calls `_from_config`, but does not accept options of the architecture.
        model = kind._from_config(shape, dtype=torch.float32, **options)
    return _encoder(model, side)


def _architecture(shape: Any, side: str, source: str | Path) -> tuple[Any, Any, dict[str, Any]]:
    """The Transformers class for one side, its configuration and the constructor options."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    # The requested side of a model of images and text (CLIP, SigLIP).
    shape = getattr(shape, f"{side}_config", None) or shape
    pooled = bool(getattr(shape, "add_pooling_layer", True)) and side == "vision"
    kind: Any = None
    if side == "text":
        kind = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(shape), None)
    kind = kind or MODEL_MAPPING.get(type(shape), None)
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    if kind is None:
        raise CheckpointError(f"{source}: Transformers has no {side} encoder of the architecture {shape.model_type}")
    if getattr(shape, "is_encoder_decoder", False) and "Encoder" not in kind.__name__:
        raise CheckpointError(
            f"{source}: {shape.model_type} is an encoder-decoder model whose encoder cannot be used alone; "
            f"use a T5 model, or one that is only an encoder or only a decoder"
        )
    options: dict[str, Any] = {"attn_implementation": "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"}
    if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
        options["add_pooling_layer"] = pooled
    _check_memory(kind, shape, options, source)
    return kind, copy.deepcopy(shape), options


def _encoder(model: Any, side: str) -> nn.Module:
    model = model.float()
    if side == "vision":
        return getattr(model, "vision_model", model)
    # T5's encoder class holds its word vectors under two names; the stack inside has only one.
    return model.encoder if getattr(model.config, "is_encoder_decoder", False) or hasattr(model, "shared") else model


def freeze_unused(model: nn.Module, output: Tensor) -> None:
    """Freeze the parameters of ``model`` that ``output`` does not depend on, so that the optimizer keeps no moments for
    them.

    Examples are poolers, a Longformer's global projections, and mask tokens. They are found in the autograd graph of
    ``output``, not by name.
    """
    seen: set[Any] = set()
    used: set[int] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        waiting.extend(parent for parent, _ in node.next_functions)
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def _of_a_layer(model: nn.Module, name: str) -> bool:
    """Whether an unexpected weight belongs to a layer of the architecture."""
    name = name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    inside = name.split(".", 1)[0] in dict(model.named_children())
    return inside and re.search(r"\.\d+\.", name) is not None and COMPUTED.search(name) is None


def _data_alone(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _data_alone(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in LEFT_OUT
    }


def _check_parts(values: dict[str, Any], source: str | Path) -> None:
    """Check the numbers of parts before any part is built."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_parts(value, source)
        bounds = [bound for part, bound in MOST.items() if part in str(name)]
        for number in value if isinstance(value, list | tuple) else [value]:
            if bounds and isinstance(number, int | float) and number > min(bounds) and "size" not in str(name):
                raise CheckpointError(f"{source}: {name} {number:.3g} is more than any known model has")


def _check_memory(kind: Any, shape: Any, options: dict[str, Any], source: str | Path) -> None:
    """Check that the model fits into memory, by counting its size on the meta device."""
    with torch.device("meta"), _quiet(), one_line_errors(source, "describes no model that can be built"):
        model = kind._from_config(copy.deepcopy(shape), dtype=torch.float32, **options)
    needed = sum(4 * p.numel() for p in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise CheckpointError(
            f"{source}: the {shape.model_type} model it describes needs {needed / 2**30:.3g} GiB, but this machine has "
            f"{memory / 2**30:.3g}"
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and reports of Transformers; relevant facts are reported in one line of ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def one_line_errors(source: str | Path, fault: str, remedy: str = "") -> Iterator[None]:
    """Turn any exception into a one-line CheckpointError, because untrusted files can make Transformers and its optional
    libraries raise any exception."""
    try:
        yield
    except (CtclipError, PreprocessingError):
        raise
    except BaseException as error:
        # A panic of code in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{source}: {fault} ({_reason(error)}){remedy}") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
