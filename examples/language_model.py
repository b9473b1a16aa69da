"""Compress a language model of transformers to a share of its blocks' parameters, and print its perplexity.

python examples/language_model.py MODEL TEXT [--share 0.8] [--save DIR]
python examples/language_model.py --quick

MODEL is a folder or a name that transformers knows, such as HuggingFaceTB/SmolLM2-135M-Instruct, TEXT a file of text
like what the model will read. With --quick the model is tiny and random, and so is the text.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import fxlrd

LENGTH = 128
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?")
parser.add_argument("text", nargs="?")
parser.add_argument("--share", type=float, default=0.8, help="of the parameters of the blocks' linear layers")
parser.add_argument("--sequences", type=int, default=256, help="of calibration")
parser.add_argument("--save", metavar="DIR")
parser.add_argument("--quick", action="store_true", help="a tiny random model: tests the script")


def from_files(model: str, text: str) -> tuple[nn.Module, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), tokens


def random_model() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = LlamaConfig(vocab_size=256, num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).eval(), torch.randint(0, 256, (40 * LENGTH,))


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor) -> float:
    losses = []
    for ids in sequences.split(4):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    return torch.stack(losses).mean().exp().item()


arguments = parser.parse_args()
if not arguments.quick and arguments.text is None:
    parser.error("give MODEL and TEXT, or --quick")
torch.manual_seed(0)
model, tokens = random_model() if arguments.quick else from_files(arguments.model, arguments.text)
sequences = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
held_out, calibration = sequences[:16], sequences[16 : 16 + arguments.sequences]
batches = [{"input_ids": ids, "use_cache": False} for ids in calibration.split(4)]
result = fxlrd.compress(
    model,
    batches[0],
    budget=fxlrd.Budget(layers=arguments.share),
    skip="lm_head",
    calibration=batches,
    measure=False,
    progress=True,
)
print(result.report.to_table())
print(f"perplexity {perplexity(model, held_out):.2f} → {perplexity(result.model, held_out):.2f}")
if arguments.save is not None:
    result.model.save_pretrained(arguments.save)
