"""What the pages of docs/ load by name, made small and random: the blocks then run without a network."""

from __future__ import annotations

from pathlib import Path

import torch


def tiny_tokenizer(folder):
    """Save a tokenizer of single bytes to ``folder`` and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<|im_start|>", "<|im_end|>", *alphabet]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_llama(folder):
    """Save a random language model of Llama's kind, with its tokenizer, to ``folder``, as the pages name one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    Path(folder).mkdir(parents=True)
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def tiny_text_classifier(folder):
    """Save a random text classifier of DistilBERT's kind, with its tokenizer, to ``folder``."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    Path(folder).mkdir(parents=True)
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=64, hidden_dim=128, n_layers=2, n_heads=2)
    DistilBertForSequenceClassification(config).save_pretrained(folder)
