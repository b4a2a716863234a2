"""Convert published CT-CLIP checkpoints, in all their variants, to the state of our modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctclip.config import ModelConfig, TextConfig
from ctclip.errors import CheckpointError
from ctclip.models.ctvit import CTViT, CTViTConfig
from ctclip.models.dual_encoder import DualEncoder
from ctclip.models.text import TextEncoder
from ctclip.preprocessing.errors import UNFIT
from ctclip.preprocessing.spec import PreprocessingSpec

_NORM = {"gamma": "weight", "beta": "bias"}
_SCALE = {"q_scale": "query_scale", "k_scale": "key_scale"}
_LINEAR = {"to_q": "to_query", "to_kv": "to_key_value", "to_out": "out", "1": "up_gate", "4": "down"}

# Pairs of the published name (a pattern) and ours. Details are in ctvit.py.
LAYER = r"visual_transformer\.enc_(spatial|temporal)_transformer"
RENAMED: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (r"visual_transformer\.to_patch_emb\.([123])\.(weight|bias)", lambda m: f"volume_encoder.embed.{int(m[1]) - 1}.{m[2]}"),
    (r"visual_transformer\.spatial_rel_pos_bias\.net\.([01])\.0\.(weight|bias)", lambda m: f"volume_encoder.bias.net.{2 * int(m[1])}.{m[2]}"),
    (r"visual_transformer\.spatial_rel_pos_bias\.net\.2\.(weight|bias)", lambda m: f"volume_encoder.bias.net.4.{m[1]}"),
    (LAYER + r"\.layers\.(\d+)\.0\.dsconv\.(weight|bias)", lambda m: f"volume_encoder.{m[1]}.{m[2]}.convolution.{m[3]}"),
    (LAYER + r"\.layers\.(\d+)\.1\.norm\.(gamma|beta)", lambda m: f"volume_encoder.{m[1]}.{m[2]}.norm.{_NORM[m[3]]}"),
    (LAYER + r"\.layers\.(\d+)\.1\.(q_scale|k_scale)", lambda m: f"volume_encoder.{m[1]}.{m[2]}.{_SCALE[m[3]]}"),
    (LAYER + r"\.layers\.(\d+)\.1\.(to_q|to_kv|to_out)\.weight", lambda m: f"volume_encoder.{m[1]}.{m[2]}.{_LINEAR[m[3]]}.weight"),
    (LAYER + r"\.layers\.(\d+)\.3\.0\.(weight|bias)", lambda m: f"volume_encoder.{m[1]}.{m[2]}.mlp_norm.{m[3]}"),
    (LAYER + r"\.layers\.(\d+)\.3\.(1|4)\.weight", lambda m: f"volume_encoder.{m[1]}.{m[2]}.{_LINEAR[m[3]]}.weight"),
    (LAYER + r"\.norm_out\.(gamma|beta)", lambda m: f"volume_encoder.{m[1]}_norm.{_NORM[m[2]]}"),
    (r"visual_transformer\.vq\._codebook\.embed", lambda m: "volume_encoder.codebook.rows"),
    (r"text_transformer\.(?!pooler)(.+)", lambda m: f"text_encoder.bert.{m[1]}"),
    (r"to_text_latent\.weight", lambda m: "text_projection.weight"),
    (r"to_visual_latent\.weight", lambda m: "volume_projection.weight"),
    (r"temperature", lambda m: "similarity.logit_scale"),
)  # fmt: skip
# Known keys without effect on the output.
UNUSED = re.compile(
    r"to_(text|visual)_latent_extra\.weight|visual_transformer\.to_(patch_emb_first_frame|pixels).*"
    r"|visual_transformer\.vq\._codebook\.(cluster_size|initted|embed_avg)|text_transformer\.(pooler\..*|embeddings\.(position_ids|token_type_ids))"
    r"|.*\.null_kv|.*\.context_norm\.(gamma|beta)|classifier\.(weight|bias)"
)
LARGEST_BYTES = 16 * 2**30


@dataclass
class Published:
    """The content of a checkpoint: our configuration (without the files of the text encoder) and state, and the LiPro
    head.

    ``plane``: number of rows and columns of a volume; the number of slices cannot be inferred from the weights.
    """

    volume: CTViTConfig
    plane: int
    dim: int
    bert: dict[str, int]
    state: dict[str, Tensor]
    classifier: dict[str, Tensor]


def read_published(path: str | Path, ignore: Sequence[str] = ()) -> Published:
    """Read a published checkpoint without running anything in it; all sizes are inferred from the tensors.

    Raises CheckpointError for any other file, and for unknown keys unless ``ignore`` names them (``*`` matches
    anything).
    """
    tensors = _tensors(Path(path))
    state: dict[str, Tensor] = {}
    strange = []
    for key, value in tensors.items():
        name = next((rename(m) for pattern, rename in RENAMED if (m := re.fullmatch(pattern, key))), None)
        if any(fnmatchcase(key, given) for given in ignore):
            continue
        # Null keys and values of any length would take part in attention; the published model has none.
        if UNUSED.fullmatch(key) and not (key.endswith("null_kv") and value.numel()):
            continue
        if name is None:
            strange.append(key)
        else:
            state[name] = value
    if strange:
        raise CheckpointError(
            f"{path}: {len(strange)} keys are unknown: {', '.join(strange)}; use --ignore to leave out those that are not needed (many at once: `--ignore 'decoder.*'`)"
        )
    try:
        state["similarity.logit_scale"] = state["similarity.logit_scale"].reshape(1)
        state["volume_encoder.codebook.rows"] = state["volume_encoder.codebook.rows"][0]
        volume, plane, dim, bert = _sizes(tensors, state)
    except (*UNFIT, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a CT-CLIP checkpoint, {' '.join(str(error).split())[:160]} is missing or has an unexpected shape"
        ) from error
    classifier = {
        key.removeprefix("classifier."): tensors[key]
        for key in ("classifier.weight", "classifier.bias")
        if key in tensors
    }
    return Published(volume, plane, dim, bert, state, classifier)


def to_model(published: Published, bert: Any, tokenizer: Any, text: TextConfig, spec: PreprocessingSpec) -> DualEncoder:
    """Our dual encoder with the published weights; ``bert``: a BertModel of the checkpoint's shape; ``spec``: the
    geometry of its volumes."""
    config = ModelConfig(volume=published.volume, text=text, dim=published.dim, logit_scale_max=1e4)
    model = DualEncoder(CTViT(published.volume, spec), TextEncoder(bert, tokenizer, text), config)
    state = {**published.state, "similarity.logit_bias": model.similarity.logit_bias.detach()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"the text configuration does not fit the checkpoint: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.eval()


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size > LARGEST_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size / 2**30:.0f} GiB, more than any published checkpoint has")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch parses untrusted bytes, which can make it raise any exception.
        raise CheckpointError(
            f"{path}: not a checkpoint of plain tensors ({type(error).__name__}); other pickles are never opened; download the file from its authors again"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(k, str) for k in loaded):
        raise CheckpointError(f"{path}: does not hold a dictionary of tensors")
    if set(loaded) == {"state", "param_groups"}:
        # The published fine-tuning code overwrites its last model with the optimizer.
        raise CheckpointError(
            f"{path}: holds the state of an optimizer, not of a model; give the checkpoint of an earlier step"
        )
    tensors = {}
    for key, value in loaded.items():
        if isinstance(value, Tensor):
            # Nested wrappers leave several prefixes.
            tensors[re.sub(r"^((module|trained_model|model)\.)+", "", key)] = value
    return tensors


def _sizes(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[CTViTConfig, int, int, dict[str, int]]:
    width, inside = state["volume_encoder.embed.1.weight"].shape
    heads = state["volume_encoder.bias.net.4.weight"].shape[0]
    head_width = state["volume_encoder.spatial.0.query_scale"].shape[0]
    dim, flat = state["volume_projection.weight"].shape
    side = round((flat / width) ** 0.5)
    # The weights give the number of voxels of a patch. The otherwise unused embedding of a single slice gives its
    # in-plane size; if it was stripped, the published ratio of in-plane size to depth, 2 : 1, is assumed.
    slice_of_patch = tensors.get("visual_transformer.to_patch_emb_first_frame.1.weight")
    patch = round((2 * inside) ** (1 / 3) if slice_of_patch is None else slice_of_patch.numel() ** 0.5)
    depth = inside // patch**2
    if side * side * width != flat or depth * patch**2 != inside:
        raise ValueError("to_visual_latent.weight or to_patch_emb")
    layers = {kind: _layers(state, rf"volume_encoder\.{kind}\.(\d+)\.") for kind in ("spatial", "temporal")}
    volume = CTViTConfig(
        patch=(depth, patch, patch), width=width, heads=heads,
        head_width=head_width, spatial_depth=layers["spatial"], temporal_depth=layers["temporal"],
        codebook_size=state["volume_encoder.codebook.rows"].shape[0],
    )  # fmt: skip
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    bert = {
        "vocab_size": words.shape[0], "hidden_size": words.shape[1],
        "max_position_embeddings": state["text_encoder.bert.embeddings.position_embeddings.weight"].shape[0],
        "intermediate_size": state["text_encoder.bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": _layers(state, r"text_encoder\.bert\.encoder\.layer\.(\d+)\."),
    }  # fmt: skip
    return volume, side * patch, dim, bert


def _layers(state: dict[str, Tensor], pattern: str) -> int:
    """The number of layers whose keys match. Raises ValueError if one of them is missing, so that no memory is allocated for a
    number that no weights belong to."""
    numbers = {found[1] for key in state if (found := re.match(pattern, key))}
    if not numbers or numbers != {str(number) for number in range(len(numbers))}:
        raise ValueError(f"a layer ({pattern})")
    return len(numbers)
