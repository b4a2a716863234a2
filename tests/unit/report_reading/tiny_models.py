"""Tiny models of Transformers with random weights, as folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "A nodule is seen in the left lung. No pleural effusion is observed.",
    '{"Lung nodule":{"status":"present","sentence":1},"Pleural effusion":{"status":"not mentioned","sentence":0}}',
    "present absent uncertain not mentioned status sentence report label",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, size: int = 500, roberta: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer like those of GPT-2, RoBERTa and Llama 3."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(WORDS * 20, vocab_size=size, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.chat_template = template
    return wrapped


def causal_model(
    folder: Path, *, seed: int = 0, template: str | None = TEMPLATE, context: int = 4096, kind: str = "llama"
) -> Path:
    words = tokenizer(template)
    torch.manual_seed(seed)
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words) + 3, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=context, bos_token_id=0, eos_token_id=2, pad_token_id=1,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(words),
                n_embd=32,
                n_layer=1,
                n_head=2,
                n_positions=context,
                bos_token_id=0,
                eos_token_id=2,
            )
        )
    # Logits of a new model are nearly equal; these differ.
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
