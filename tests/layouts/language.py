"""Text: token ids in, with masks, positions, weight tying and bags of words."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.layouts.efficient_kan import KAN, KANLinear
from tests.layouts.layout import Arrays, Layout, normal, seeded

_VOCABULARY, _LENGTH = 30, 8


def _tokens(*names: str, low: int = 0, high: int = _VOCABULARY) -> Any:
    return lambda rng: {name: rng.integers(low, high, (20, _LENGTH)) for name in names}


class _CausalAttention(nn.Module):
    bias: Tensor

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.c_attn, self.c_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        mask = torch.tril(torch.ones(_LENGTH, _LENGTH)).view(1, 1, _LENGTH, _LENGTH)
        self.register_buffer("bias", mask)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, dim = x.size()
        q, k, v = self.c_attn(x).split(self.dim, dim=2)
        q, k, v = (
            y.view(batch, time, self.heads, dim // self.heads).transpose(1, 2) for y in (q, k, v)
        )
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :time, :time] == 0, float("-inf"))
        y = functional.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, time, dim))


class _GPT(nn.Module):
    """A GPT with KANs for its MLPs, tied weights, `return logits, loss` (AdityaNG/kan-gpt)."""

    def __init__(self) -> None:
        super().__init__()
        dim = 8
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(_VOCABULARY, dim),
                "wpe": nn.Embedding(_LENGTH, dim),
                "drop": nn.Dropout(0.1),
                "attn": nn.ModuleList(_CausalAttention(dim, 2) for _ in range(2)),
                "mlp": nn.ModuleList(KAN([dim, 4 * dim, dim]) for _ in range(2)),
                "ln": nn.ModuleList(nn.LayerNorm(dim) for _ in range(5)),
            }
        )
        self.lm_head = nn.Linear(dim, _VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        device = idx.device
        _, time = idx.size()
        assert time <= _LENGTH, f"cannot forward a sequence of length {time}"
        pos = torch.arange(0, time, dtype=torch.long, device=device).unsqueeze(0)
        parts: Any = self.transformer
        x = parts["drop"](parts["wte"](idx) + parts["wpe"](pos))
        for i in range(2):
            x = x + parts["attn"][i](parts["ln"][2 * i](x))
            x = x + parts["mlp"][i](parts["ln"][2 * i + 1](x))
        logits = self.lm_head(parts["ln"][4](x))
        loss = None
        if targets is not None:
            loss = functional.cross_entropy(logits.view(-1, _VOCABULARY), targets.view(-1))
        return logits, loss


def gpt() -> nn.Module:
    return seeded(_GPT)


class _RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class _RotaryDecoder(nn.Module):
    """Llama-like: RMSNorm, rotary embedding as complex numbers, KAN projections for q, k and v.

    Follows gjyotin305/KanLightning and Llama-KAN projects.
    """

    freqs: Tensor

    def __init__(self, complex_numbers: bool) -> None:
        super().__init__()
        self.complex_numbers = complex_numbers
        self.embed = nn.Embedding(_VOCABULARY, 8)
        self.norm1, self.norm2, self.norm = _RMSNorm(8), _RMSNorm(8), _RMSNorm(8)
        self.q_proj, self.k_proj, self.v_proj = KANLinear(8, 8), KANLinear(8, 8), KANLinear(8, 8)
        self.gate, self.up, self.down = (nn.Linear(8, 12), KANLinear(8, 12), nn.Linear(12, 8))
        self.head = nn.Linear(8, _VOCABULARY)
        steps = torch.outer(torch.arange(_LENGTH), 1.0 / 10 ** (torch.arange(0, 4, 2) / 4))
        self.register_buffer("freqs", steps, persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        angle = self.freqs[None, : x.shape[1], None]
        if self.complex_numbers:
            product = torch.view_as_complex(pairs) * torch.polar(torch.ones_like(angle), angle)
            return torch.view_as_real(product).flatten(3)
        real, imaginary = pairs.unbind(-1)
        cos, sin = angle.cos(), angle.sin()
        turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
        return torch.stack(turned, -1).flatten(3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        batch, time, _ = h.shape
        y = self.norm1(h)
        q = self.rotate(self.q_proj(y).view(batch, time, 2, 4)).transpose(1, 2)
        k = self.rotate(self.k_proj(y).view(batch, time, 2, 4)).transpose(1, 2)
        v = self.v_proj(y).view(batch, time, 2, 4).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + attended.transpose(1, 2).reshape(batch, time, 8)
        y = self.norm2(h)
        h = h + self.down(functional.silu(self.gate(y)) * self.up(y))
        return self.head(self.norm(h)).float()


def rotary_decoder() -> nn.Module:
    return seeded(lambda: _RotaryDecoder(complex_numbers=True))


class _BERT(nn.Module):
    """BERT with KANLinear in its output layers, position and type ids, an additive mask.

    Follows KanBert; a tuple of sequence and pooled output.
    """

    position_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = (
            nn.Embedding(_VOCABULARY, 8, padding_idx=0),
            nn.Embedding(_LENGTH, 8),
        )
        self.types, self.norm = nn.Embedding(2, 8), nn.LayerNorm(8, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(_LENGTH).expand(1, -1), persistent=False)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.output, self.norm2 = KAN([8, 12, 8]), nn.LayerNorm(8, eps=1e-12)
        self.pooler, self.classify = KANLinear(8, 8), KANLinear(8, 3)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        time = input_ids.size(1)
        x = self.words(input_ids) + self.positions(self.position_ids[:, :time])
        x = self.norm(x + self.types(token_type_ids))
        mask = attention_mask[:, None, None, :].to(dtype=x.dtype)
        mask = (1.0 - mask) * torch.finfo(x.dtype).min
        q, k, v = (
            part(x).view(x.shape[0], time, 2, 4).permute(0, 2, 1, 3)
            for part in (self.query, self.key, self.value)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(4) + mask
        context = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).flatten(2)
        x = self.norm2(x + self.output(context))
        return x, self.classify(torch.tanh(self.pooler(x[:, 0])))


def bert() -> nn.Module:
    return seeded(_BERT)


def _bert_rows(rng: np.random.Generator) -> Arrays:
    lengths = rng.integers(2, _LENGTH + 1, (20, 1))
    mask = (np.arange(_LENGTH) < lengths).astype(np.int64)
    ids = rng.integers(1, _VOCABULARY, (20, _LENGTH)) * mask
    types = rng.integers(2, size=(20, _LENGTH)) * mask
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask}


class _EncoderClassifier(nn.Module):
    """nn.TransformerEncoder with batch_first and padding mask, KAN head (hoangthangta/ThangKAN)."""

    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = KAN([8, 6, 3])

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        h = self.encoder(self.embed(tokens), src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(h.dtype)
        return self.head((h * kept).sum(1) / kept.sum(1).clamp(min=1))


def encoder_classifier() -> nn.Module:
    return seeded(_EncoderClassifier)


class _Tagger(_EncoderClassifier):
    """A label for every token, padding included (sequence labelling).

    In evaluation mode torch's nested tensors answer 0 at padded positions, in training and where it
    is traced they do not.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0))


def encoder_tagger() -> nn.Module:
    return seeded(_Tagger)


def encoder_tagger_without_nested_tensors() -> nn.Module:
    return seeded(lambda: _Tagger(nested=False))


def _padded(rng: np.random.Generator) -> Arrays:
    return {"tokens": _bert_rows(rng)["input_ids"]}


class _BagOfWords(nn.Module):
    """nn.EmbeddingBag over rows of token ids, KAN behind it (fastText-KAN, Burmese news)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(_VOCABULARY, 6, mode="mean")
        self.kan = KAN([6, 5, 4])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.kan(self.embedding(tokens))


def bag_of_words() -> nn.Module:
    return seeded(_BagOfWords)


class _TextCNN(nn.Module):
    """Convolutions of several widths over embeddings, max over time, KAN head (TextCNN-KAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCABULARY, 6)
        self.convs = nn.ModuleList(nn.Conv1d(6, 4, width) for width in (2, 3, 4))
        self.head = KANLinear(12, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(1, 2)
        pooled = [functional.relu(conv(x)).max(dim=2).values for conv in self.convs]
        return torch.log_softmax(self.head(torch.cat(pooled, dim=-1)), dim=-1)


def text_cnn() -> nn.Module:
    return seeded(_TextCNN)


class _Kansformer(nn.Module):
    """Attention of which every projection is a KAN over precomputed embeddings (kansformers)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleDict({name: KANLinear(8, 4) for name in ("q", "k", "v")}) for _ in range(2)
        )
        self.proj, self.ln = KANLinear(8, 8), nn.LayerNorm(8)
        self.register_buffer("tril", torch.tril(torch.ones(_LENGTH, _LENGTH, dtype=torch.bool)))

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        mask: Any = self.tril
        outs = []
        for head in self.heads:
            parts: Any = head
            q, k, v = (parts[name](self.ln(x)) for name in ("q", "k", "v"))
            weights = torch.einsum("bti,bsi->bts", q, k) * 4**-0.5
            weights = weights.masked_fill(~mask[:time, :time], float("-inf")).softmax(-1)
            outs.append(torch.einsum("bts,bsi->bti", weights, v))
        return x + self.proj(torch.cat(outs, dim=-1))


def kansformer() -> nn.Module:
    return seeded(_Kansformer)


LAYOUTS = (
    Layout(gpt, 4, samples=_tokens("idx")),
    Layout(rotary_decoder, 4, samples=_tokens("tokens")),
    Layout(bert, 4, samples=_bert_rows),
    Layout(encoder_classifier, 2, samples=_padded),
    Layout(
        encoder_tagger,
        2,
        samples=_padded,
        refusal="enable_nested_tensor=False",
        remedy=Layout(encoder_tagger_without_nested_tensors, 2, samples=_padded),
    ),
    Layout(bag_of_words, 2, samples=_tokens("tokens")),
    Layout(text_cnn, 1, samples=_tokens("tokens")),
    Layout(kansformer, 7, samples=lambda rng: {"x": normal(rng, 16, _LENGTH, 8)}),
)
