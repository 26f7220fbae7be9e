"""A GPT in LLaMA's form: RMSNorm, rotary positions, SwiGLU, no biases, untied head by default.

    x = E[idx]                                              token embedding
    x = x + Attn(RMSNorm(x));  x = x + MLP(RMSNorm(x))      n_layer times
    logits = RMSNorm(x) W_headᵀ

With qk_norm and gelu it is the model that the paper's authors released: LayerNorm with bias over the whole
width of q and of k, all heads together, and an MLP of two matrices.

Below it is attention with the derivatives that Gauss-Newton takes, for this model and others.

Sizes, epsilon and initialisation follow "The Potential of Second-Order Optimization for LLMs" (arXiv
2510.09378).

    from model import GPT, GPTConfig, PRESETS
    model = GPT(GPTConfig(vocab_size=256, **PRESETS["tiny"]))
    logits = model(idx)                                     # (B, T) int64 -> (B, T, vocab_size)
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

RELEASED = dict(block_size=1024, qk_norm=True, gelu=True)  # by the paper's authors
PRESETS = {  # everything but vocab_size, which the tokenizer decides
    "tiny": dict(n_layer=2, n_head=4, n_embd=64, block_size=64),  # 164k parameters with bytes
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=256),  # 1.1M with bytes
    # the paper's two as released, with its vocabulary of 32k: 45.4M and 134M
    "45m": dict(n_layer=4, n_head=8, n_embd=512, **RELEASED),
    "150m": dict(n_layer=12, n_head=16, n_embd=768, **RELEASED),
}

Linear = partial(nn.Linear, bias=False)  # every one in this file


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 64  # longest sequence, in tokens
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    ff_mult: int = 4  # width of the MLP in multiples of n_embd (the paper's ff = 4d)
    qk_norm: bool = False  # LayerNorm of q and of k
    gelu: bool = False  # down(GELU(up x)), not SwiGLU
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
            raise ValueError(
                f"rotary positions need an even head size, got n_embd / n_head = {self.n_embd // self.n_head}"
            )


def rotate(x, cos, sin):
    """Rotary position embedding (arXiv 2104.09864): turn each pair (x_i, x_{i+hs/2}) by its position's
    angle."""
    x1, x2 = x.chunk(2, dim=-1)  # (B, nh, T, hs/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        square = partial(Linear, c.n_embd, c.n_embd)
        self.wq = square()
        self.wk = square()
        self.wv = square()
        self.wo = square()
        norm = partial(nn.LayerNorm, c.n_embd, c.norm_eps) if c.qk_norm else nn.Identity
        self.qnorm = norm()
        self.knorm = norm()

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        q, k, v = (
            t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
            for t in (self.qnorm(self.wq(x)), self.knorm(self.wk(x)), self.wv(x))
        )
        # Fused for training and evaluation; `differentiable_attention` replaces the same call where
        # derivatives are taken that the fused kernels lack.
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c.ff_mult * c.n_embd
        self.gate = None if c.gelu else Linear(c.n_embd, width)
        self.up = Linear(c.n_embd, width)
        self.down = Linear(width, c.n_embd)

    def forward(self, x):
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.attn = Attention(c)
        self.norm2 = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin):
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """`GPT(config)(idx)`: idx (B, T) int64 -> logits (B, T, vocab_size). Causal; T may be anything up to
    block_size."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bf16 = False  # bf16: matrix products in bfloat16 (autocast), logits in float32
        c = config
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.RMSNorm(c.n_embd, eps=c.norm_eps)
        self.head = Linear(c.n_embd, c.vocab_size)
        hs = c.n_embd // c.n_head
        freq = c.rope_theta ** (-torch.arange(0, hs, 2, dtype=torch.float64) / hs)
        positions = torch.arange(c.block_size, dtype=torch.float64)
        angle = positions[:, None] * freq  # (block_size, hs/2)
        self.tables = angle.cos(), angle.sin()  # float64, which some devices lack: not moved with the model
        self._apply(lambda t: t)  # sets self.cos and self.sin
        self.apply(self._init_weights)
        if c.tie_weights:
            # one matrix, so it takes the head's scale: N(0, 1) rows would start the loss near n_embd
            self.embed.weight = self.head.weight

    def _apply(self, fn, recurse=True):
        """What to(), double(), cuda() and the like call; rounds the tables anew, to the weights' dtype."""
        super()._apply(fn, recurse)
        self.cos, self.sin = (table.to(self.embed.weight) for table in self.tables)
        return self

    @staticmethod
    def _init_weights(module):
        """Embedding N(0, 1), matrices N(0, 1/fan_in) (the paper's setting); norms stay at one."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, idx):
        if not self.bf16:
            return self._forward(idx)
        with torch.autocast(idx.device.type, torch.bfloat16):
            return self._forward(idx).float()

    def _forward(self, idx):
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {self.config.block_size}")
        x = self.embed(idx)  # (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.head(self.norm(x))  # (B, T, vocab_size)

    def layers(self):
        """The partition of layerwise Gauss-Newton (paper, section on layerwise GN): a list of lists of
        parameters, {embedding}, each block (the final norm with the last one), {head}. A tied matrix is
        counted with the embedding."""
        parts = [list(module.parameters()) for module in (self.embed, *self.blocks, self.head)]
        parts[-2] += list(self.norm.parameters())
        return parts[:-1] if self.config.tie_weights else parts

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0.8):
        """Continue idx (B, T) by max_new_tokens sampled tokens; T >= 1."""
        for _ in range(max_new_tokens):
            logits = self(idx[:, -self.config.block_size :])[:, -1]
            probs = F.softmax(logits / max(temperature, 1e-6), dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs, 1)), dim=1)
        return idx


# ------------------------------------------------------------------------------------------------------------
# Attention with the derivatives that Gauss-Newton takes


@contextmanager
def differentiable_attention():
    """While open, every scaled_dot_product_attention, in this model or another, is _Attention; what that does
    not cover (a mask, grouped queries, nn.MultiheadAttention) takes the backend of differentiable operations.
    """
    with sdpa_kernel(SDPBackend.MATH), _AttentionMode():
        yield


class _AttentionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            function = attention
        return function(*args, **(kwargs or {}))


def attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    """torch's scaled_dot_product_attention, by _Attention where it can be."""
    qkv = query, key, value
    device = query.device.type
    # Autocast would have done this further down. It leaves float64 alone.
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        qkv = [t.to(torch.get_autocast_dtype(device)) for t in qkv]
    # Where they are not alike, torch may broadcast. Where they are no plain tensors (nested, or inside vmap),
    # it has rules of its own.
    alike = len({(t.shape[:-2], t.dtype) for t in qkv}) == 1
    plain = all(type(t) in (torch.Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(t) for t in qkv)
    if attn_mask is not None or dropout_p or enable_gqa or not (plain and alike):
        return F.scaled_dot_product_attention(
            *qkv,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    q, k, v = qkv
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q * scale, k, v, is_causal)


class _Attention(torch.autograd.Function):
    """o = P v, P = softmax(q kᵀ + mask), (..., T, head size), q with the scale in it; P is kept, and every
    derivative is written out:

        Jᵀ    v̄ = Pᵀ w,   t = P ∘ (W − rowsum(P ∘ W)),  W = w vᵀ,   q̄ = t k,   k̄ = tᵀ q
        J     o' = t v + P v',   t = P ∘ (D − rowsum(P ∘ D)),   D = q' kᵀ + q k'ᵀ

    The fused kernels have no derivative of their backward, and each of their calls makes P anew. The graph of
    the backward is to be differentiated by the cotangent w alone, in which it is linear, so that its
    transpose is J; what depends on q, k and v in it counts as constant.
    """

    @staticmethod
    def forward(ctx, q, k, v, causal):
        out = []
        P = []
        for rows, keys in causal_blocks(q.shape[-2], causal):
            scores = q[..., rows, :] @ k[..., keys, :].transpose(-1, -2)
            if causal:
                future = scores.new_ones(scores.shape[-2:], dtype=torch.bool)
                scores.masked_fill_(future.triu_(rows.start + 1), -math.inf)
            P.append(torch.softmax(scores, -1).to(scores.dtype))  # autocast on a GPU gives float32
            out.append(P[-1] @ v[..., keys, :])
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, *P)
        return torch.cat(out, -2)

    @staticmethod
    def backward(ctx, w):
        return *_AttentionBackward.apply(w, ctx.causal, *ctx.saved_tensors), None


class _AttentionBackward(torch.autograd.Function):
    """Jᵀ w; its backward is J. So dq, dk, dv are q̄, k̄, v̄ in forward, q', k', v' in backward."""

    @staticmethod
    def forward(ctx, w, causal, q, k, v, *P):
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, *P)
        dq = []
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for p, (rows, keys) in zip(P, causal_blocks(q.shape[-2], causal)):
            W = w[..., rows, :] @ v[..., keys, :].transpose(-1, -2)
            t = torch.ops.aten._softmax_backward_data(W, p, -1, p.dtype)
            dq.append(t @ k[..., keys, :])
            dk[..., keys, :] += t.transpose(-1, -2) @ q[..., rows, :]
            dv[..., keys, :] += p.transpose(-1, -2) @ w[..., rows, :]
        return torch.cat(dq, -2), dk, dv

    @staticmethod
    def backward(ctx, dq, dk, dv):
        q, k, v, *P = ctx.saved_tensors
        out = []
        left = torch.cat((dq, q), -1)
        right = torch.cat((k, dk), -1).transpose(-1, -2)
        for p, (rows, keys) in zip(P, causal_blocks(q.shape[-2], ctx.causal)):
            D = left[..., rows, :] @ right[..., keys]  # q' kᵀ + q k'ᵀ as one product
            t = torch.ops.aten._softmax_backward_data(D, p, -1, p.dtype)
            out.append(t @ v[..., keys, :] + p @ dv[..., keys, :])
        return torch.cat(out, -2), *[None] * (1 + len(ctx.saved_tensors))


def causal_blocks(T, causal):
    """Rows of P, and the keys that they see: in four blocks, causal attention has 5/8 of the square."""
    size = max(64, -(-T // 4)) if causal else T
    starts = range(0, T, size)
    return [(slice(i, i + size), slice(i + size if causal else None)) for i in starts]
