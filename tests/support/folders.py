"""Local folders of Hugging Face with small models of random weights, as users have them."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ["the", "a", "good", "bad", "film", "plot", "was", "is", "not", "very", "great", "dull", "and", "it", "of"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SPECIAL = ["[PAD]", "[UNK]", "[EOS]"]


def text(count: int) -> str:
    """Return so many words, seeded."""
    order = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(0))
    return " ".join(WORDS[i] for i in order.tolist())


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*_SPECIAL, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=64
    )
    fast.save_pretrained(folder)


def write_classifier(folder: Path) -> Path:
    """Write a BERT that tells two classes of texts apart."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.BertConfig(
        **SMALL, vocab_size=len(_SPECIAL) + len(WORDS), max_position_embeddings=64, id2label={0: "bad", 1: "good"}
    )
    tf.BertForSequenceClassification(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_language_model(folder: Path) -> Path:
    """Write a Llama in bfloat16."""
    import transformers as tf

    torch.manual_seed(0)
    tokens = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    config = tf.LlamaConfig(
        **SMALL, **tokens, vocab_size=len(_SPECIAL) + len(WORDS), num_key_value_heads=1, max_position_embeddings=64
    )
    tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_image_classifier(folder: Path) -> Path:
    """Write a ViT for images of 16×16, with its processor."""
    import transformers as tf

    torch.manual_seed(0)
    config = tf.ViTConfig(**SMALL, image_size=16, patch_size=8, id2label={0: "dark", 1: "light"})
    tf.ViTForImageClassification(config).save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    tf.ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=half, image_std=half).save_pretrained(folder)
    return folder
