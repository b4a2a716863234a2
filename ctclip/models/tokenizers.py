"""Tokenizers: one learned from the training reports, or any Hugging Face tokenizer, without running code from a
repository."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ctclip.errors import CheckpointError
from ctclip.models.hub import pretrained_folder
from ctclip.models.huggingface import one_line_errors, read_settings

# If the vocabulary file is missing, Transformers still builds a tokenizer, with special tokens alone.
FEWEST_TOKENS = 8
# Maximum growth of a text by a tokenizer's replacements.
LARGEST_GROWTH = 64.0
REMEDY = (
    ". Put tokenizer.json, or vocab.txt with tokenizer_config.json, in a folder and name it in model.text.pretrained "
    "(--text-encoder of import-checkpoint)"
)


def train_tokenizer(reports: Iterable[str], vocabulary: int) -> Any:
    """A lower-casing WordPiece tokenizer (BERT's) for ``reports``: their most common words, and single characters to
    spell the others.

    The same reports give the same vocabulary: ties are broken alphabetically; the merging trainers of `tokenizers`
    depend on the order of a hash table and differ between runs.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    count: Counter[str] = Counter()
    for report in reports:
        count.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(report)))
    characters = sorted({character for word in count for character in word})
    words = sorted((word for word in count if len(word) > 1), key=lambda word: (-count[word], word))
    pieces = [*special, *characters, *[f"##{character}" for character in characters], *words]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces[:vocabulary])}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub repository, with padding on the right. Raises CheckpointError naming the
    file."""
    folder = pretrained_folder(source, "model.text.pretrained", weights=False)
    settings = {path.name: read_settings(path) for path in sorted(folder.glob("*.json")) if _is_read(path)}
    _check_growth(settings.get("tokenizer.json", {}), folder / "tokenizer.json")
    with one_line_errors(folder, "no tokenizer could be loaded", REMEDY):
        tokenizer = _tokenizer(folder, settings)
        words = len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        # A setting with the wrong type fails only when it is used.
        tokenizer("a")
    if words < FEWEST_TOKENS:
        raise CheckpointError(f"{folder}: the tokenizer knows {words} words: its vocabulary file is missing{REMEDY}")
    # Our model folders must not refer to code.
    tokenizer.init_kwargs.pop("auto_map", None)
    if tokenizer.pad_token is None:
        # Tokenizers of decoders (GPT-2) have no padding token. Any token serves, because the attention mask excludes
        # padding.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _is_read(path: Path) -> bool:
    return path.name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")  # fmt: skip


def _tokenizer(folder: Path, settings: dict[str, dict[str, Any]]) -> Any:
    from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

    own_code = any("auto_map" in settings.get(name, {}) for name in ("tokenizer_config.json", "config.json"))
    if own_code and (folder / "vocab.txt").is_file():
        return BertTokenizer.from_pretrained(str(folder), local_files_only=True)
    if own_code and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _check_growth(values: dict[str, Any], path: Path) -> None:
    """Limit replacements that make a text longer: forty that each double it would fill any memory."""
    growth = 1.0
    waiting: list[Any] = [values.get("normalizer"), values.get("pre_tokenizer"), values.get("decoder")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting.extend(part)
        elif isinstance(part, dict):
            waiting.extend(part.values())
            if part.get("type") == "Replace":
                pattern = part.get("pattern")
                literal = pattern.get("String", "") if isinstance(pattern, dict) else ""
                growth *= max(1.0, len(str(part.get("content", ""))) / max(1, len(str(literal))))
    if growth > LARGEST_GROWTH:
        raise CheckpointError(f"{path}: its replacements make a text {growth:.3g} times longer; take another tokenizer")
