"""A GPT in LLaMA's form: RMSNorm, rotary positions, SwiGLU, no biases, untied head by default.

    x = E[idx]                                              token embedding
    x = x + Attn(RMSNorm(x));  x = x + SwiGLU(RMSNorm(x))   n_layer times
    logits = RMSNorm(x) W_head^T

Sizes, epsilon and initialisation follow "The Potential of Second-Order Optimization for LLMs" (arXiv 2510.09378).

    from model import GPT, GPTConfig, PRESETS
    model = GPT(GPTConfig(vocab_size=256, **PRESETS["tiny"]))
    logits = model(idx)                                     # (B, T) int64 -> (B, T, vocab_size)
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {  # everything but vocab_size, which the tokenizer decides
    "tiny": dict(n_layer=2, n_head=4, n_embd=64, block_size=64),       # 164k parameters with bytes
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=256),    # 1.1M with bytes
    "45m": dict(n_layer=4, n_head=8, n_embd=512, block_size=1024),     # the paper's, with a 32k vocabulary
    "150m": dict(n_layer=12, n_head=16, n_embd=768, block_size=1024),  # the paper's, likewise
}


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 64      # longest sequence, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    ff_mult: int = 4          # SwiGLU width in multiples of n_embd (the paper's ff = 4d)
    tie_weights: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "ff_mult"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) is not divisible by n_head ({self.n_head})")
        if (self.n_embd // self.n_head) % 2:
            raise ValueError(f"rotary positions need an even head size, got n_embd / n_head = {self.n_embd // self.n_head}")


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864): turn each pair (x_i, x_{i+hs/2}) by its position's angle."""
    x1, x2 = x.chunk(2, dim=-1)                       # (B, nh, T, hs/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.wq = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.wk = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.wv = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.wo = nn.Linear(c.n_embd, c.n_embd, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q, k, v = (w(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for w in (self.wq, self.wk, self.wv))
        # Fused for training and evaluation; the Gauss-Newton code switches the same call to its differentiable
        # backend, since the fused kernels have no second derivative.
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate = nn.Linear(c.n_embd, c.ff_mult * c.n_embd, bias=False)
        self.up = nn.Linear(c.n_embd, c.ff_mult * c.n_embd, bias=False)
        self.down = nn.Linear(c.ff_mult * c.n_embd, c.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.attn = Attention(c)
        self.norm2 = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.mlp = SwiGLU(c)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """`GPT(config)(idx)`: idx (B, T) int64 -> logits (B, T, vocab_size). Causal; T may be anything up to block_size."""

    def __init__(self, config):
        super().__init__()
        self.config, self.bf16 = config, False      # bf16: matrix products in bfloat16 (autocast), logits in float32
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        hs = c.n_embd // c.n_head
        freq = c.rope_theta ** (-torch.arange(0, hs, 2, dtype=torch.float64) / hs)
        angle = torch.arange(c.block_size, dtype=torch.float64)[:, None] * freq   # (block_size, hs/2)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        self.apply(self._init_weights)
        if c.tie_weights:  # one matrix, so it takes the head's scale: N(0, 1) rows would start the loss near n_embd
            self.embed.weight = self.head.weight

    @staticmethod
    def _init_weights(module):
        """Embedding N(0, 1), matrices N(0, 1/fan_in) (the paper's setting); norms stay at one."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features ** -0.5)

    def forward(self, idx):
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=self.bf16):
            return self._forward(idx).float() if self.bf16 else self._forward(idx)

    def _forward(self, idx):
        T, vocab = idx.shape[1], self.config.vocab_size
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {self.config.block_size}")
        try:
            x = self.embed(idx)                                                 # (B, T, C)
        except IndexError as e:      # on a CPU; a GPU stops with an assertion of its own
            low, high = (int(i) for i in torch.aminmax(idx))
            raise ValueError(f"token ids reach from {low} to {high}, outside 0 .. {vocab - 1} (vocab_size {vocab})") from e
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.head(self.norm(x))                                          # (B, T, vocab_size)

    def layers(self):
        """The partition of layerwise Gauss-Newton (paper, section on layerwise GN): a list of lists of parameters,
        {embedding}, each block (the final norm with the last one), {head}. A tied matrix is counted with the embedding."""
        parts = [list(self.embed.parameters()), *(list(b.parameters()) for b in self.blocks), list(self.head.parameters())]
        parts[-2] += list(self.norm.parameters())
        return parts[:-1] if self.config.tie_weights else parts

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0.8, generator=None):
        """Continue idx (B, T) by max_new_tokens sampled tokens; T >= 1."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size:])[:, -1].float()
            probs = F.softmax(logits / max(temperature, 1e-6), dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs, 1, generator=generator)), dim=1)
        return idx
