"""Tests of the whole project: `pytest test_gn.py`, no network, no GPU, one thread; GN_LONG=1 adds the slow ones.

References are independent of the code under test: dense matrices from torch.func, plain loops, torch.optim, closed forms.
"""
import contextlib
import copy
import functools
import gc
import gzip
import hashlib
import http.client
import http.server
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import warnings
import xml.etree.ElementTree
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, hessian, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

import data as D
import gauss_newton as gn
import train
from baselines import BASELINES, DEFAULT_LR, SOAP, hidden_matrices, lr_schedule, make_optimizer
from data import DataError, get_batch, get_encoding, prepare, val_batch
from gauss_newton import GGN, KFAC, GaussNewton, cg, line_search
from model import GPT, PRESETS, GPTConfig

torch.set_num_threads(1)
HERE = Path(__file__).parent
long = pytest.mark.skipif(os.environ.get("GN_LONG") != "1", reason="slow; set GN_LONG=1")


# ---- models and dense references ----

def gpt(tie=False, seed=0, **sizes):
    """A float64 GPT of some 400 parameters."""
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=4, ff_mult=2, tie_weights=tie), **sizes})).double()


def tokens(rows=5, length=6, vocab=7, seed=0):
    both = torch.randint(0, vocab, (2, rows, length), generator=torch.Generator().manual_seed(seed))
    return both[0], both[1]


def linear_softmax(n=40, seed=0):
    """The one model whose Gauss-Newton matrix is its Hessian: a linear map, with inputs (n, 4) and classes (n,)."""
    torch.manual_seed(seed)
    x = torch.randn(n, 4).double()
    return nn.Linear(4, 3, bias=False).double(), x, (x[:, :3] + torch.randn(n, 3)).argmax(1)


def theta_of(model):
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters() if p.requires_grad])


def with_theta(model, theta):
    params = [p for p in model.parameters() if p.requires_grad]
    gn.assign(params, gn.unflatten(theta, params))
    return model


def same_bits(a, b):
    return torch.equal(a.view(torch.int64), b.view(torch.int64))


def plain_attention(q, k, v, is_causal=False, **_):
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -math.inf) if is_causal else scores).softmax(-1) @ v


class Dense:
    """Loss, gradient g (P,), J (tokens, V, P), H (tokens, V, V) and G = JᵀHJ of a batch, from torch.func alone."""

    def __init__(self, model, idx, targets):
        names, params = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
        self.sizes = [p.numel() for p in params]

        def logits(theta):
            values = {n: t.view_as(p) for n, t, p in zip(names, theta.split(self.sizes), params)}
            return functional_call(model, values, (idx,)).flatten(0, -2)
        with sdpa_kernel(SDPBackend.MATH):
            z, y, theta = model(idx).detach().flatten(0, -2), targets.flatten(), theta_of(model)
            self.J = jacrev(logits)(theta)
            self.g = jacrev(lambda t: F.cross_entropy(logits(t), y))(theta)
        self.loss = F.cross_entropy(z, y).item()
        self.H = torch.stack([hessian(F.cross_entropy)(z[i], y[i]) for i in range(len(y))]) / len(y)
        self.G = torch.einsum("nvp,nvw,nwq->pq", self.J, self.H, self.J)

    def index(self, part):
        """Where the parameters in part lie in a flat vector."""
        starts = np.cumsum([0, *self.sizes])
        return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in part])


def close(a, b, tol=1e-9):
    return ((a - b).norm() <= tol * b.norm()).item()


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def stdlib(data_dir):
    return prepare("stdlib", cache_dir=data_dir, block_size=64)


# ---- model ----

@pytest.mark.parametrize("tie", [False, True])
def test_attention_is_causal_softmax_of_scaled_scores(tie, monkeypatch):
    """The fused kernel and the MATH backend are attention written out, in the logits and in every gradient."""
    model, (idx, targets) = gpt(tie), tokens()

    def both():
        z = model(idx)
        return [z, *torch.autograd.grad(F.cross_entropy(z.flatten(0, 1), targets.flatten()), list(model.parameters()))]
    fused = both()
    with sdpa_kernel(SDPBackend.MATH):
        math_backend = both()
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    for a, b, c in zip(fused, math_backend, both()):
        assert torch.allclose(a, c, rtol=0, atol=1e-12) and torch.allclose(b, c, rtol=0, atol=1e-12)


def test_later_tokens_do_not_change_earlier_logits():
    """Causality, at every position; and the changed position itself does change."""
    model, (idx, _) = gpt(), tokens()
    z = model(idx)
    for t in range(6):
        other = idx.clone()
        other[:, t] = (other[:, t] + 1) % 7
        change = (model(other) - z).abs().amax((0, 2))
        assert (change[:t] < 1e-14).all() and change[t] > 1e-3 and (t == 5 or change[t + 1:].min() > 1e-6)


def test_rotary_scores_depend_on_relative_position(monkeypatch):
    """With one token everywhere, what attention compares at (i, j) is a function of i − j, and not a constant one;
    rotation changes no length."""
    seen = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **o: seen.append((q, k)) or plain_attention(q, k, v, **o))
    gpt(n_embd=16)(torch.full((1, 8), 3))
    for q, k in seen:
        scores = (q @ k.transpose(-1, -2))[0]                                           # (nh, T, T)
        assert torch.allclose(scores[:, 1:, 1:], scores[:, :-1, :-1], rtol=0, atol=1e-6)   # cos and sin are float32
        assert (scores[:, 0].std(-1) > 1e-2).all() and (scores[:, 1, 0] - scores[:, 0, 1]).abs().min() > 1e-3
        assert torch.allclose(q.norm(dim=-1).diff(dim=-1), torch.zeros(1).double(), atol=1e-6)


@pytest.mark.parametrize("name, layers, heads, width, block, low, high", [
    ("tiny", 2, 4, 64, 64, 1e5, 2e5), ("small", 4, 4, 128, 256, 1.0e6, 1.2e6),
    ("45m", 4, 8, 512, 1024, 45e6, 50e6), ("150m", 12, 16, 768, 1024, 150e6, 165e6)])
def test_presets_have_the_stated_sizes(name, layers, heads, width, block, low, high):
    """Depth, heads, width, context and parameter count (bytes for the small ones, the paper's 32k for its two)."""
    vocab = 256 if name in ("tiny", "small") else 32_000
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=vocab, **PRESETS[name]))
    assert (len(model.blocks), model.blocks[0].attn.n_head, *model.head.weight.shape) == (layers, heads, vocab, width)
    count = sum(p.numel() for p in model.parameters())
    assert model.config.block_size == block and model.blocks[0].mlp.up.weight.shape == (4 * width, width)
    assert count == 2 * vocab * width + layers * (16 * width * width + 2 * width) + width and low <= count <= high


def test_model_errors_name_the_values():
    """What cannot be is a ValueError with the numbers in it."""
    for settings, numbers in [(dict(n_embd=6, n_head=4), "6.*4"), (dict(n_embd=6, n_head=2), "3"), (dict(n_layer=0), "n_layer.*0")]:
        with pytest.raises(ValueError, match=numbers):
            gpt(**settings)
    with pytest.raises(ValueError, match="9 tokens.*8"):
        gpt()(torch.zeros(1, 9, dtype=torch.long))
    for bad in (-1, 7):
        with pytest.raises(ValueError, match=f"{bad}.*0 .. 6"):
            gpt()(torch.tensor([[0, bad]]))


def test_layers_partition_and_generate():
    """layers() holds every parameter once, {embedding}, blocks, {head} (tied: no head); generate runs past block_size,
    repeats itself with the same generator, and at temperature 0 takes the likeliest token."""
    for tie in (False, True):
        model = gpt(tie)
        flat = [id(p) for part in model.layers() for p in part]
        assert sorted(flat) == sorted(id(p) for p in model.parameters()) and len(model.layers()) == 4 - tie
    start, seeded = torch.zeros(2, 1, dtype=torch.long), lambda: torch.Generator().manual_seed(1)
    out = model.generate(start, 12, generator=seeded())
    assert out.shape == (2, 13) and torch.equal(out, model.generate(start, 12, generator=seeded()))
    greedy = model.generate(start, 3, temperature=0)
    assert torch.equal(greedy[:, 1:], model(greedy[:, :-1]).argmax(-1))


# ---- the Gauss-Newton product ----

@pytest.mark.parametrize("tie", [False, True])
def test_ggn_equals_dense(tie):
    """Loss, gradient, J v and G v are the dense ones, tied weights counted once; with `part`, G's diagonal blocks. So G is
    symmetric, positive and linear."""
    model, (idx, targets) = gpt(tie), tokens()
    ggn, dense = GGN(model, idx, targets), Dense(model, idx, targets)
    assert len(ggn.grad) == len(theta_of(model)) == len(dense.g) == (368 if tie else 396)
    assert abs(ggn.loss - dense.loss) < 1e-12 and close(ggn.grad, dense.g)
    for v in torch.randn(3, len(dense.g)).double():
        assert close(ggn.jvp(v).flatten(0, 1), dense.J @ v) and ggn.jvp(v).shape == (5, 6, 7)
        assert close(ggn.matvec(v), dense.G @ v)
        index = {id(p): i for i, p in enumerate(model.parameters())}
        for part in model.layers() + [[model.norm.weight, model.embed.weight]]:
            part = [index[id(p)] for p in part]
            at = dense.index(part)
            assert close(ggn.matvec(v[at], part), dense.G[at][:, at] @ v[at])
            assert close(ggn.jvp(v[at], part).flatten(0, 1), dense.J[..., at] @ v[at])
    for u, v in torch.randn(5, 2, len(dense.g)).double():
        Gu, Gv = ggn.matvec(u), ggn.matvec(v)
        assert torch.isclose(u.dot(Gv), v.dot(Gu), rtol=1e-10) and v.dot(Gv) > 0 and close(ggn.matvec(2 * u - v), 2 * Gu - Gv, 1e-12)


def test_linear_softmax_closed_form():
    """G = (1/N) Σ (diag p − ppᵀ) ⊗ xxᵀ for z = Wx."""
    model, x, y = linear_softmax()
    P = model(x).softmax(-1).detach()
    G = sum(torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(a, a)) for p, a in zip(P, x)) / len(x)
    ggn = GGN(model, x, y, micro_batch=7)
    assert close(torch.stack([ggn.matvec(e) for e in torch.eye(12).double()]), G, 1e-12)


def test_logit_derivatives_against_autograd():
    """cross_entropy_grad and cross_entropy_hvp are gradient and Hessian of the mean cross-entropy in the logits."""
    torch.manual_seed(0)
    z, t, y = (3 * torch.randn(2, 3, 5)).double(), torch.randn(2, 3, 5).double(), torch.randint(0, 5, (2, 3))

    def loss(z):
        return F.cross_entropy(z.flatten(0, 1), y.flatten())
    p = z.softmax(-1)
    H = hessian(loss)(z).reshape(30, 30)
    assert close(gn.cross_entropy_grad(p, y, 6), jacrev(loss)(z), 1e-13) and torch.equal(p, z.softmax(-1))
    assert close(gn.cross_entropy_hvp(p, t, 6).flatten(), H @ t.flatten(), 1e-13)


@pytest.mark.parametrize("cache", [0, 2, 3, None])
def test_micro_batches_equal_the_whole(cache):
    """Pieces of 2, 2 and 1 rows, with none, some or all of their graphs kept: loss, gradient, product and jvp of the whole."""
    model, (idx, targets) = gpt(), tokens()
    whole = GGN(model, idx, targets)
    piece_bytes = whole._measure(idx[:2], targets[:2])[1]
    ggn = GGN(model, idx, targets, micro_batch=2, cache_gb=None if cache is None else cache * piece_bytes * 1.01 / 1e9)
    assert len(ggn.data) == 3 and len(ggn.cache) == (3 if cache is None else cache) and len(whole.cache) == 1
    v = torch.randn(len(whole.grad)).double()
    assert abs(ggn.loss - whole.loss) < 1e-13 and close(ggn.grad, whole.grad, 1e-13)
    assert close(ggn.matvec(v), whole.matvec(v), 1e-13) and close(ggn.jvp(v), whole.jvp(v), 1e-13)
    assert close(ggn.matvec(v[:28], [0]), whole.matvec(v[:28], [0]), 1e-13)
    loss, grad = gn.batch_grad(model, idx, targets, 2)
    assert abs(loss - whole.loss) < 1e-13 and close(grad, whole.grad, 1e-13)
    assert abs(gn.batch_loss(model, idx, targets, 2) - whole.loss) < 1e-13


def test_jvp_is_the_derivative_of_the_logits():
    """J v against central differences, (z(θ + εv) − z(θ − εv)) / 2ε."""
    model, (idx, targets) = gpt(), tokens()
    v, eps, theta = torch.randn(396).double(), 1e-6, theta_of(model)
    Jv, z = GGN(model, idx, targets).jvp(v), {}
    for sign in (1, -1):
        torch.nn.utils.vector_to_parameters(theta + sign * eps * v, model.parameters())
        z[sign] = model(idx).detach()
    assert close((z[1] - z[-1]) / (2 * eps), Jv, 1e-7)


def test_work_and_products_are_counted():
    """In gradients of this batch: 1 to begin; 4/3 a product, with a block alone 4/3 for its own weights and 2/3 for those
    behind it; and for every piece that was not kept its share of another gradient."""
    model, (idx, targets) = gpt(), tokens(6)
    for cache_gb, redone in ((1, 0), (0, 1)):
        ggn = GGN(model, idx, targets, micro_batch=2, cache_gb=cache_gb)
        assert (ggn.products, ggn.work) == (0, 1.0)
        ggn.matvec(ggn.grad)
        assert ggn.products == 1 and math.isclose(ggn.work, 1 + 4 / 3 + redone)
        ggn.matvec(ggn.grad[:28], [0])
        assert ggn.products == 2 and math.isclose(ggn.work, 1 + 4 / 3 + redone + (4 * 28 + 2 * 368) / 396 / 3 + redone)


MEMORY = """
import torch
torch.set_num_threads(1)
from gauss_newton import GGN, KFAC, batch_grad, batch_loss
from model import GPT, GPTConfig
model, peaks = GPT(GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=32)), []
for rows, cache_gb in ((16, 0), (256, 0), (256, 10)):
    data = torch.randint(0, 64, (2, rows, 64))
    batch_loss(model, *data, 8), batch_grad(model, *data, 8), KFAC(model).update(*data, 8)
    ggn = GGN(model, *data, micro_batch=8, cache_gb=cache_gb)
    ggn.matvec(ggn.matvec(ggn.grad)), ggn.jvp(ggn.grad) if cache_gb else None
    peaks.append(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))    # ru_maxrss begins at the parent's
print(*peaks)
"""


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(6, 6), (150, 150), (300, 300), (70, 90), (90, 70)])
def test_attention_has_the_derivatives_of_its_formula(queries, keys, causal):
    """Output, backward, J by the backward's own backward and by forward mode, against softmax written out: lengths of one and of
    several blocks of rows, uneven, and of keys unlike queries."""
    torch.manual_seed(0)
    q, k, v, dq, dk, dv = (torch.randn(2, 3, n, 4).double().requires_grad_() for n in (queries, keys, keys) * 2)
    future = torch.ones(queries, keys, dtype=torch.bool).triu(1) & causal

    def formula(q, k, v):
        return (q @ k.transpose(-1, -2) * 0.3).masked_fill(future, -math.inf).softmax(-1) @ v

    def ours(q, k, v):
        with gn.differentiable_attention():
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
    want, J = torch.func.jvp(formula, (q, k, v), (dq, dk, dv))
    out, w = ours(q, k, v), torch.randn_like(want).requires_grad_()
    grads = torch.autograd.grad(out, (q, k, v), w, create_graph=True)
    assert close(out, want) and all(map(close, grads, torch.autograd.grad(want, (q, k, v), w)))
    assert close(torch.autograd.grad(grads, w, (dq, dk, dv))[0], J)
    with forward_ad.dual_level():
        dual = ours(*[forward_ad.make_dual(t.detach(), d.detach()) for t, d in ((q, dq), (k, dk), (v, dv))])
        assert close(forward_ad.unpack_dual(dual).tangent, J)


@pytest.mark.parametrize("build", [lambda: gpt(n_layer=1), lambda: gpt(tie=True, n_layer=1), lambda: Spare(), lambda: frozen()], ids=["gpt", "tied", "spare", "frozen"])
def test_expand_once_is_the_local_model(build):
    """m(v) − L, ∇m(v) and g of a batch used once, by forward mode and as a compiler sees it, against GGN's, GN and prox-linear."""
    torch.manual_seed(0)
    model = build().double()
    idx, targets = tokens() if isinstance(model, GPT) else (torch.randn(20, 4).double(), torch.randint(0, 4, (20,)))
    params, v = gn.trainable(model), torch.randn(sum(p.numel() for p in gn.trainable(model))).double()
    for prox, traced in ((False, False), (False, True), (True, False), (True, True)):
        ggn = GGN(model, idx, targets)
        loss, g, Gv = ggn.loss, ggn.grad, ggn.matvec(v)
        fall, gradient = (g @ v + v @ Gv / 2).item(), g + Gv
        if prox:
            ggn.shift(v)
            fall, gradient = ggn.loss - loss, ggn.grad
        got = gn.expand_once(model, params, idx, targets, gn.unflatten(v, params), prox, True, traced)
        k = len(params)
        assert math.isclose(got[0], loss, rel_tol=1e-9) and math.isclose(got[1], fall, rel_tol=1e-9)
        assert close(gn.flatten(got[2:2 + k]), gradient) and close(gn.flatten(got[2 + k:]), g)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(monkeypatch):
    """One traced and compiled program, for pieces of its shape: loss, gradient, products (of a part too), J v and the shifted model as
    eager, in float64; the inner step likewise; a program whose product is wrong is refused, and a step goes on eagerly with a warning."""
    model, (idx, targets) = gpt(n_layer=1), tokens(7)
    program = gn.Program(model, idx[:3], targets[:3])
    eager, compiled = GGN(model, idx, targets, 3, 1.0), GGN(model, idx, targets, 3, 1.0, program)
    assert [type(piece).__name__ for piece in compiled.cache] == ["_CompiledPiece", "_CompiledPiece", "_Piece"]
    v = torch.randn(len(eager.grad)).double()
    for _ in range(2):
        assert math.isclose(compiled.loss, eager.loss, rel_tol=1e-12) and close(compiled.grad, eager.grad)
        assert close(compiled.matvec(v), eager.matvec(v)) and close(compiled.jvp(v), eager.jvp(v))
        own = gn.select(v, eager.params, [1, 4])
        assert close(compiled.matvec(own, [1, 4]), eager.matvec(own, [1, 4]))
        assert close(compiled.pull_back_curvature(v, 0.1), eager.pull_back_curvature(v, 0.1))
        eager.shift(v), compiled.shift(v)
    a, b = (gn.InnerSolver(model, rows=3, compile=c)._expand(idx[:3], targets[:3], v, [list(range(len(eager.params)))], True, True) for c in (False, True))
    assert math.isclose(a[1], b[1], rel_tol=1e-9) and close(b[2][0], a[2][0]) and close(b[3], a[3])
    layers = [[0, 1, 2], list(range(3, len(eager.params)))]
    a, b = (gn.InnerSolver(model, rows=3, compile=c) for c in (False, True))
    for prox_linear in (False, True):
        want, got = (solver._expand_parts(idx[:3], targets[:3], v, layers, prox_linear, True) for solver in (a, b))
        assert math.isclose(got[1], want[1], rel_tol=1e-9) and all(close(g, w) for g, w in zip(got[2], want[2])) and close(got[3], want[3])
    assert not a.programs and isinstance(b.programs[idx[:3].shape], gn.Program)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = GaussNewton(model, compile=True, cg_iters=5)
        monkeypatch.setattr(gn, "Program", lambda *_: program)
        assert opt.step(idx[:3], targets[:3])["accepted"] and opt.program is program
    monkeypatch.undo()
    monkeypatch.setattr(gn._CompiledPiece, "product", lambda self, v, part: 1.001 * v)
    with pytest.warns(UserWarning, match="not compiled: the compiled product differs"):
        opt = GaussNewton(model, compile=True, cg_iters=5)
        assert opt.step(idx[:3], targets[:3])["accepted"] and opt.program is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_batch():
    """Loss, gradient, K-FAC factors and products without a cache: 16 times the rows cost under 10 MB more at the peak; keeping every
    graph costs over 100 MB."""
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, cwd=HERE, check=True).stdout
    small, large, cached = (int(n) / 1e3 for n in out.split())
    assert large - small < 10 and cached - large > 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_linearisation_leaves_nothing_behind():
    """Linearised, measured for the cache, multiplied with and dropped ten times: every graph is freed."""
    model, (x, y) = GPT(GPTConfig(vocab_size=256, **PRESETS["tiny"])), torch.randint(0, 256, (2, 32, 64))

    def graphs():
        ggn = GGN(model, x, y, micro_batch=16, cache_gb=1)
        ggn.matvec(ggn.grad)
        return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
    graphs()
    before = graphs()
    assert ([graphs() for _ in range(10)][-1] - before) / 1e3 < 60


VOCABULARY = """
import torch
torch.set_num_threads(1)
from gauss_newton import GGN
from model import GPT, GPTConfig, PRESETS
def kilobytes(name):
    return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith(name)))
model, data = GPT(GPTConfig(vocab_size=50257, **PRESETS["small"])), torch.randint(0, 50257, (2, 8, 256))
before, ggn = kilobytes('VmRSS'), GGN(model, *data)
ggn.matvec(ggn.grad)
print(kilobytes('VmHWM') - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_product_at_gpt2s_vocabulary_takes_under_3_gb():
    """2,048 tokens of 50,257 logits, 412 MB a copy: linearisation and product, beyond the model."""
    out = subprocess.run([sys.executable, "-c", VOCABULARY], capture_output=True, text=True, cwd=HERE, check=True).stdout
    assert 1e6 < int(out) < 3e6


def test_active_randomness_is_refused():
    """Dropout, attention's dropout and batch norm in training mode are errors that name the module; in eval mode, or at
    rate 0, they are welcome."""
    x, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    for bad in (nn.Dropout(0.1), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.2)), Attends(dropout=0.1)):
        model = nn.Sequential(bad, nn.Linear(4, 4))
        data = (x[None], y[None]) if isinstance(bad, Attends) else (x, y)
        with pytest.raises(ValueError, match=r"eval\(\)"):
            GGN(model, *data)
        assert math.isfinite(GGN(model.eval(), *data).loss)
    assert math.isfinite(GGN(nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 4)), x, y).loss)


class Attends(nn.Module):
    """nn.MultiheadAttention, or bare F.scaled_dot_product_attention, between linear maps."""

    def __init__(self, bare=False, dropout=0.0):
        super().__init__()
        self.bare, self.inp, self.head = bare, nn.Linear(4, 4), nn.Linear(4, 4)
        self.attn = None if bare else nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)

    def forward(self, x):
        h = self.inp(x)
        return self.head(F.scaled_dot_product_attention(h, h, x) if self.bare else self.attn(h, h, x, need_weights=False)[0])


class Spare(nn.Module):
    """A parameter that forward does not use, before and after those that it does."""

    def __init__(self):
        super().__init__()
        self.a, self.lin, self.z = nn.Parameter(torch.ones(3)), nn.Linear(4, 4), nn.Linear(2, 2)

    def forward(self, x):
        return self.lin(x.tanh())


def frozen():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("build", [lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4)), Spare, frozen,
                                   Attends, lambda: Attends(bare=True)], ids=["mlp", "spare", "frozen", "multihead", "sdpa"])
def test_foreign_modules(build):
    """Biases, unused and frozen parameters, other people's attention: the product is the dense one, K-FAC is made, and
    three steps lower the loss and leave alone what is frozen or unused."""
    torch.manual_seed(0)
    model, x, y = build().double(), torch.randn(6, 5, 4).double(), torch.randint(0, 4, (6, 5))
    ggn, dense = GGN(model, x, y, micro_batch=4), Dense(model, x, y)
    v = torch.randn(len(dense.g)).double()
    assert close(ggn.grad, dense.g) and close(ggn.matvec(v), dense.G @ v) and close(ggn.jvp(v).flatten(0, 1), dense.J @ v)
    idle = [p for p in model.parameters() if not p.requires_grad or p.shape in [(3,), (2, 2), (2,)]]
    before = [p.detach().clone() for p in idle]
    opt = GaussNewton(model, damping=0.1)
    losses = [opt.step(x, y)["loss"] for _ in range(4)]
    assert all(b < a for a, b in zip(losses, losses[1:]))
    assert all(torch.equal(p, b) for p, b in zip(idle, before))
    if build is frozen:                                                   # the bias of a frozen weight has its curvature all the same
        assert opt.kfac.spectra[0].max() > 1e-3


class Everywhere(nn.Module):
    """One block at three depths, one embedding under two names."""

    def __init__(self):
        super().__init__()
        self.embed, block, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.again, self.blocks = self.embed, nn.ModuleList([block] * 3)

    def forward(self, idx):
        h = self.embed(idx) + self.again(idx).sin()
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return self.head(h)


@pytest.mark.parametrize("settings", [dict(), dict(geodesic=True), dict(local_model="prox_linear"), dict(inner="adamw"),
                                      dict(inner="adamw", parts=True)], ids=str)
def test_a_module_in_several_places_keeps_its_parameters(settings):
    """After two steps a model holds the very Parameters it was made with, each moved; the gradient is autograd's."""
    torch.manual_seed(0)
    model, (idx, _) = Everywhere().double(), tokens(20)
    targets = (3 * idx + 1) % 7
    before, values = list(model.parameters()), theta_of(model)
    loss = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    want = gn.flatten(torch.autograd.grad(loss, before))
    assert close(GGN(model, idx, targets).grad, want)
    if settings.pop("parts", False):
        settings["parts"] = [before[:1], before[1:]]
    if "inner" in settings:
        settings["inner"] = gn.InnerSolver(model, settings["inner"], rows=2, lr=0.02)
    opt = GaussNewton(model, **settings)
    for _ in range(2):
        assert opt.step(idx, targets)["accepted"]
        assert [id(p) for p in model.parameters()] == [id(p) for p in before]
        assert model.blocks[2].weight is before[-2] and model.again.weight is before[0]
    assert not torch.eq(theta_of(model), values).any()


def test_loss_and_linearisation_are_one_function():
    """nn.TransformerEncoder with masked rows: in eval mode and without gradients torch computes another function there.
    The search's loss is the linearisation's, and what is recorded is what happened."""
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)
            self.embed, self.body, self.head = nn.Embedding(7, 4), nn.TransformerEncoder(layer, 2), nn.Linear(4, 7)

        def forward(self, idx):
            return self.head(self.body(self.embed(idx), src_key_padding_mask=idx == 0))
    torch.manual_seed(0)
    model, (idx, targets) = Masked().eval(), tokens()
    idx[:, -2:] = 0
    idx[:, 0] = 1

    def loss():
        return F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()).item()
    before = loss()
    assert math.isclose(gn.batch_loss(model, idx, targets), before, rel_tol=1e-5)
    record = GaussNewton(model).step(idx, targets)
    assert record["accepted"] and math.isclose(record["actual"], loss() - before, rel_tol=1e-3)


class Random(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.lin, self.head, self.rrelu = kind, nn.Linear(4, 4), nn.Linear(4, 4), nn.RReLU()
        self.rnn = nn.LSTM(4, 4, 2, dropout=0.2, batch_first=True)

    def forward(self, x):
        h = {"rnn": lambda h: self.rnn(h)[0],
             "functional": lambda h: F.dropout(h, 0.02, self.training),
             "attention": lambda h: F.scaled_dot_product_attention(h, h, h, dropout_p=0.3 * self.training),
             "rrelu": self.rrelu,
             "skipped": lambda h: h if self.training and random.random() < 0.5 else h.tanh(),
             "noise": lambda h: h + 1e-3 * torch.randn_like(h) * self.training}[self.kind](self.lin(x))
        return self.head(h)


@pytest.mark.parametrize("kind", ["rnn", "functional", "attention", "rrelu", "skipped", "noise"])
def test_any_randomness_is_refused(kind):
    """Random in training mode however it is done: a ValueError; welcome in eval mode, and refused again after train()."""
    torch.manual_seed(0)
    random.seed(0)
    model, x, y = Random(kind), torch.randn(6, 5, 4), torch.randint(0, 4, (6, 5))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"eval\(\)"):
            GGN(model.train(), x, y)
        assert math.isfinite(GGN(model.eval(), x, y).loss)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        gn.GaussNewton(model.train(), inner=gn.InnerSolver(model, "adamw", rows=2)).step(x, y)


@pytest.mark.parametrize("kind", ["keywords", "one key head", "no batch of keys", "other width of values"])
def test_attention_in_every_form_that_torch_takes(kind):
    """Keyword arguments and shapes that broadcast: the product is that of attention written out."""
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.head = nn.Linear(4, 12), nn.Linear(4 if kind != "other width of values" else 2, 4)

        def forward(self, x):
            q, k, v = self.inp(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)       # (B, 2, T, 2) each
            if kind == "one key head":
                k, v = k[:, :1], v[:, :1]
            elif kind == "no batch of keys":
                k, v = k[:1], v[:1]
            elif kind == "other width of values":
                v = v[..., :1]
            return self.head(self.attend(query=q, key=k, value=v, is_causal=True).transpose(1, 2).flatten(2))

        def attend(self, **arguments):
            return F.scaled_dot_product_attention(**arguments)
    torch.manual_seed(0)
    model, x, y = Model().double(), torch.randn(3, 5, 4).double(), torch.randint(0, 4, (3, 5))
    ggn, v = GGN(model, x, y), torch.randn(sum(p.numel() for p in model.parameters())).double()
    product = ggn.matvec(v)
    model.attend = lambda query, key, value, is_causal: plain_attention(query, key, value, is_causal)
    dense = Dense(model, x, y)
    assert close(ggn.grad, dense.g) and close(product, dense.G @ v)


def test_checkpointing_is_one_clear_message():
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.reentrant, self.inp = reentrant, nn.Linear(4, 4)
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, x):
            attend = lambda h: F.scaled_dot_product_attention(*self.qkv(h).chunk(3, -1))        # noqa: E731
            return self.head(checkpoint(attend, self.inp(x), use_reentrant=self.reentrant))
    x, y = torch.randn(6, 5, 4), torch.randint(0, 4, (6, 5))
    for reentrant in (False, True):
        model = Model(reentrant)
        for opt in (GaussNewton(model), GaussNewton(model, inner=gn.InnerSolver(model, "adamw", rows=2))):
            with pytest.raises(ValueError, match="activation checkpointing"):
                opt.step(x, y)


@pytest.mark.parametrize("kind", ["lstm", "gru", "weight_norm", "old_weight_norm", "function"])
def test_without_a_forward_mode_rule_the_inner_solver_works(kind):
    """What forward-mode autodiff does not know is differentiated twice in reverse; the model keeps its Parameters."""
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            make = dict(lstm=lambda: nn.LSTM(4, 4, batch_first=True), gru=lambda: nn.GRU(4, 4, batch_first=True),
                        weight_norm=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
                        old_weight_norm=lambda: nn.utils.weight_norm(nn.Linear(4, 4)), function=lambda: nn.Linear(4, 4))
            self.mid, self.head = make[kind](), nn.Linear(4, 4)

        def forward(self, x):
            h = self.mid(x)
            h = Twice.apply(h) if kind == "function" else h
            return self.head(h[0] if isinstance(h, tuple) else h)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # one of them is deprecated
        model = Model()
    x, y = torch.randn(8, 5, 4), torch.randint(0, 4, (8, 5))
    before, loss = list(model.parameters()), gn.batch_loss(model, x, y)
    opt = GaussNewton(model, inner=gn.InnerSolver(model, "adamw", rows=2, lr=0.05))
    losses = [opt.step(x, y)["loss"] for _ in range(4)]
    assert math.isclose(losses[0], loss, rel_tol=1e-5) and losses[-1] < loss
    assert all(a is b for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_ignored_targets_are_left_out(micro_batch):
    """Targets of -100 are as if their tokens were not there: loss, gradient, product, prox-linear, inner steps, K-FAC's
    output side. A map on each token alone is the reference, without those tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 5, 4).double(), torch.randint(0, 3, (6, 5))
    y[:, 3:], y[2] = -100, -100
    few_x, few_y = x[y != -100], y[y != -100]
    v = torch.randn(sum(p.numel() for p in model.parameters())).double()
    masked, few = GGN(model, x, y, micro_batch), GGN(model, few_x, few_y)
    assert math.isclose(masked.loss, few.loss) and close(masked.grad, few.grad) and close(masked.matvec(v), few.matvec(v))
    for shifted in (masked, few):
        shifted.shift(v)
    assert math.isclose(masked.loss, few.loss) and close(masked.grad, few.grad)
    assert math.isclose(gn.batch_loss(model, x, y, micro_batch), gn.batch_loss(model, few_x, few_y))
    assert close(gn.batch_grad(model, x, y, micro_batch)[1], gn.batch_grad(model, few_x, few_y)[1])
    a, b = KFAC(model), KFAC(model)
    a.update(x[y != -100].view(-1, 3, 4), y[y != -100].view(-1, 3))
    b.update(x[[0, 1, 3, 4, 5]], y[[0, 1, 3, 4, 5]])
    assert a.factors[2][0].diagonal().sum() > 0.1 * b.factors[2][0].diagonal().sum() > 0
    found = []
    for data in ((x, y), (x[[0, 1, 3, 4, 5], :3], y[[0, 1, 3, 4, 5], :3])):
        solver = gn.InnerSolver(model, "adamw", rows=1)
        found.append(solver.solve([list(range(4))], *data, True, {"work": 0.0}, lambda *where: None))
    assert math.isclose(found[0][0], found[1][0]) and close(found[0][2], found[1][2]) and close(found[0][1], found[1][1])


def test_batches_that_cannot_be_learned_from_are_named():
    """Targets of other integer types are classes; everything else that is wrong with a batch is a ValueError that says so."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(8, 4), torch.randint(0, 3, (8,))
    loss = gn.batch_loss(model, x, y)
    for dtype in (torch.int32, torch.uint8, torch.int16):
        assert GGN(model, x, y.to(dtype)).loss == loss == gn.batch_loss(model, x, y.to(dtype))

    class Wrong(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap, self.lin = wrap, nn.Linear(4, 3)

        def forward(self, x):
            return self.wrap(self.lin(x))
    output = type("Output", (), {})
    cases = [(model, x, y.clone().fill_(3), "classes 0 .. 2"), (model, x, y.clone().fill_(-1), "-1"),
             (model, x, torch.rand(8, 3), "soft targets"), (model, x[:4], y, "4 rows and targets 8"),
             (model, x[:0], y[:0], "empty"), (model, x, y.clone().fill_(-100), "no target that counts"),
             (Wrong(lambda z: z.sum(-1)), x, y, "do not fit"), (Wrong(lambda z: (z, None)), x, y, r"self.model\(x\)\[0\]"),
             (Wrong(lambda z: setattr(out := output(), "logits", z) or out), x, y, r"self.model\(x\).logits")]
    for bad, inputs, targets, named in cases:
        calls = [lambda: GGN(bad, inputs, targets), lambda: gn.batch_loss(bad, inputs, targets),
                 lambda: KFAC(bad).update(inputs, targets), lambda: GaussNewton(bad).step(inputs, targets),
                 lambda: GaussNewton(bad, inner=gn.InnerSolver(bad, "adamw", rows=2)).step(inputs, targets)]
        before = theta_of(bad)
        for call in calls:
            with pytest.raises(ValueError, match=named):
                call()
        assert torch.equal(theta_of(bad), before)


def test_parameters_that_cannot_be_stepped_are_named():
    """No, mixed or short parameters, and a set of them that changed since: a ValueError with the cause."""
    def model():
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    with pytest.raises(ValueError, match="no trainable parameters"):
        GaussNewton(model().requires_grad_(False))
    with pytest.raises(ValueError, match="bfloat16"):
        GaussNewton(model().bfloat16())
    mixed = model()
    mixed[0].double()
    with pytest.raises(ValueError, match="float32 and torch.float64"):
        GaussNewton(mixed)
    for first in (True, False):
        changing = model()
        changing[0].requires_grad_(first)
        opt = GaussNewton(changing)
        opt.step(x, y)
        changing[0].requires_grad_(not first)
        with pytest.raises(ValueError, match="frozen"):
            opt.step(x, y)
    for damping in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping"):
            GaussNewton(model(), damping=damping)


@pytest.mark.parametrize("inner", [None, "soap"])
def test_step_inside_autocast(inner):
    """Only the model works in short numbers: the step is that of a model whose own forward opens autocast."""
    class Inside(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)
    torch.manual_seed(1)
    x = torch.randn(16, 4)
    y, moved = x[:, :3].argmax(1), []
    for outside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        model = model if outside else Inside(model)
        opt = GaussNewton(model, damping=10.0, inner=inner and gn.InnerSolver(model, inner, rows=4, lr=0.03))
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            record = opt.step(x, y)
            assert record["accepted"], record
        moved.append(theta_of(model))
    assert torch.equal(*moved)


# ---- conjugate gradients ----

def spd(n=30, low=-3, seed=0):
    """A (n, n) with eigenvalues from 10^low to 1, b, and a close but not perfect M⁻¹."""
    torch.manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n).double()).Q
    ew = torch.logspace(low, 0, n).double()
    return (Q * ew) @ Q.T, torch.randn(n).double(), (Q / (ew * (1 + torch.rand(n)))) @ Q.T


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("rtol", [1e-1, 1e-4, 1e-9])
def test_cg_keeps_its_residual_bound(preconditioned, rtol):
    """reason "residual" means ‖b − Ax‖ <= rtol ‖b‖, reached at that iteration and not before."""
    A, b, M = spd()
    kwargs = dict(precond=M.matmul if preconditioned else None, rtol=rtol)
    result = cg(A.matmul, b, max_iter=1000, **kwargs)
    assert result.reason == "residual" and (b - A @ result.x).norm() <= rtol * b.norm() * (1 + 1e-6)
    before = cg(A.matmul, b, max_iter=result.iterations - 1, **kwargs)
    assert before.reason == "max_iter" and (b - A @ before.x).norm() > rtol * b.norm()


@pytest.mark.parametrize("start", [None, "far", "uphill"])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_values_are_the_quadratic(start, preconditioned):
    """values[k] = ½xᵀAx − bᵀx at the k-th iterate, the start included, never rising; and each iterate is the least value in
    its Krylov space, so CG is CG."""
    A, b, M = spd()
    x0 = {None: None, "far": 100 * torch.randn(30).double(), "uphill": -torch.linalg.solve(A, b)}[start]
    M = M if preconditioned else torch.eye(30).double()
    whole = cg(A.matmul, b, x0, M.matmul, max_iter=12)
    assert len(whole.values) == whole.iterations + 1 and (start == "uphill" or whole.iterations == 12)    # its best multiple is x
    space, r0 = [], None
    for k, value in enumerate(whole.values):
        x = cg(A.matmul, b, x0, M.matmul, max_iter=k).x
        assert math.isclose(value, (0.5 * x @ A @ x - b @ x).item(), rel_tol=1e-9, abs_tol=1e-12)
        if k == 0:
            first, r0 = x.clone(), M @ (b - A @ x)
            continue
        space.append(r0 if k == 1 else M @ A @ space[-1])
        B = torch.linalg.qr(torch.stack(space, 1)).Q
        least = first + B @ torch.linalg.solve(B.T @ A @ B, B.T @ (b - A @ first))
        assert k > 8 or math.isclose(value, (0.5 * least @ A @ least - b @ least).item(), rel_tol=1e-7, abs_tol=1e-12)
    assert all(b <= a + 1e-13 * abs(a) for a, b in zip(whole.values, whole.values[1:]))


def test_cg_trouble_is_a_reason():
    """b = 0 gives exactly 0; b or products that are not finite, an indefinite matrix or preconditioner: the last good
    iterate, finite, and the reason."""
    A, b, _ = spd()
    zero = cg(A.matmul, torch.zeros(30), x0=b)
    assert zero.reason == "zero" and not zero.x.any() and zero.iterations == 0
    for bad in (math.nan, math.inf):
        result = cg(A.matmul, torch.cat([b[:-1], torch.tensor([bad])]))
        assert result.reason == "nonfinite" and not result.x.any()
    good = cg(A.matmul, b, max_iter=3)
    for spoil in (lambda Av: Av * math.nan, lambda Av: Av * math.inf):
        calls = []
        result = cg(lambda v: calls.append(1) or (A @ v if len(calls) < 4 else spoil(A @ v)), b)
        assert result.reason == "nonfinite" and torch.equal(result.x, good.x) and result.values == good.values
    assert cg(A.matmul, b, x0=b * math.nan, max_iter=3).reason == "max_iter"              # a spoilt start is no start
    result = cg((A - 0.01 * torch.eye(30)).matmul, b, max_iter=200)
    assert result.reason == "indefinite" and result.iterations > 0 and result.x.isfinite().all()
    assert cg((-A).matmul, b, x0=b).reason == cg(A.matmul, b, precond=lambda v: -v).reason == "indefinite"
    assert cg((-A).matmul, b, x0=b).values == [0.0]                                       # not started uphill either


def test_cg_ends_at_the_precisions_limit():
    """Well-conditioned float32 systems with more iterations than they need: "residual", solved to rounding, never
    "indefinite"; with a start and a preconditioner, and a singular system whose right side it can reach."""
    for seed in range(100):
        torch.manual_seed(seed)
        n = (3, 10)[seed % 2]
        Q, scale = torch.linalg.qr(torch.randn(n, n)).Q, torch.logspace(-1, 0, n)
        A, b = (Q * scale) @ Q.T, torch.randn(n)
        for x0, precond in ((None, None), (torch.randn(n), lambda r: 2 * r)):
            result = cg(A.matmul, b, x0, precond, max_iter=60)
            assert result.reason == "residual" and (b - A @ result.x).norm() < 1e-5 * b.norm()
        scale[0] = 0
        A = (Q * scale) @ Q.T
        assert cg(A.matmul, A @ b, max_iter=60).reason == "residual"


def test_cg_that_looks_at_every_fourth_iteration():
    """The same iterates; it stops at the first multiple of four where a test holds, and trouble in between gives the iterate at
    the last test; an exact solution in between stays one."""
    A, b, _ = spd()
    every, fourth = [cg(A.matmul, b, max_iter=200, rtol=1e-6, every=n) for n in (1, 4)]
    assert fourth.reason == "residual" and fourth.iterations == -(-every.iterations // 4) * 4
    assert torch.equal(cg(A.matmul, b, max_iter=8, every=4).x, cg(A.matmul, b, max_iter=8).x)
    assert cg(A.matmul, b, max_iter=6, every=4).values == cg(A.matmul, b, max_iter=6).values
    for spoil, reason in ((lambda Av: Av * math.nan, "nonfinite"), (lambda Av: -Av, "indefinite")):
        for max_iter in (7, 50):
            calls = []
            result = cg(lambda v: calls.append(1) or (spoil(A @ v) if len(calls) == 6 else A @ v), b, max_iter=max_iter, every=4)
            good = cg(A.matmul, b, max_iter=4)
            assert result.reason == reason and result.iterations == 4 and torch.equal(result.x, good.x) and result.values == good.values
    exact = cg(lambda v: 2 * v, b, max_iter=9, every=4)
    assert exact.reason == "residual" and exact.iterations == 4 and torch.allclose(exact.x, b / 2)


@pytest.mark.parametrize("every", [1, 4])
def test_cg_holds_six_vectors_at_most(every):
    """All tensors of the system's size that live while a product or an application of the preconditioner runs, b and the operand included."""
    n, most = 1021, 0

    def count(v):
        nonlocal most
        gc.collect()
        most = max(most, len({t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == n}))
        return 2 * v
    before = len({t.data_ptr() for t in gc.get_objects() if type(t) is torch.Tensor and t.numel() == n})
    cg(count, torch.randn(n), precond=count, max_iter=9, every=every)
    assert 3 <= most - before <= 6


def test_cg_perfect_preconditioner_needs_one_iteration():
    """M = A: one iteration to rounding."""
    A, b, _ = spd()
    result = cg(A.matmul, b, precond=torch.linalg.inv(A).matmul, rtol=1e-9)
    assert (result.iterations, result.reason) == (1, "residual") and close(A @ result.x, b)


def test_cg_start_is_scaled_to_its_best_multiple():
    """A start is worth −½ (bᵀx0)² / x0ᵀAx0, uphill or not; the solution itself, and its negative, need no iteration."""
    A, b, _ = spd()
    for x0 in (torch.randn(30).double(), -b, 1e6 * b):
        kept = x0.clone()
        start = cg(A.matmul, b, x0, max_iter=0)
        assert math.isclose(start.values[0], (-0.5 * (b @ x0) ** 2 / (x0 @ A @ x0)).item(), rel_tol=1e-9) and start.values[0] <= 0
        assert torch.equal(x0, kept)
    for scale in (1, -3):
        result = cg(A.matmul, b, scale * torch.linalg.solve(A, b), rtol=1e-8)
        assert (result.iterations, result.reason) == (0, "residual") and close(A @ result.x, b, 1e-8)


@pytest.mark.parametrize("tol, least", [(5e-3, 10), (1e-4, 110)])
def test_cg_stops_by_martens_rule(tol, least):
    """The first iteration k with φ(x_k) < 0 and (φ(x_k) − φ(x_{k−j})) / φ(x_k) < j tol, j = max(10, 0.1 k) (2010, section 4.4),
    found again in the values of a run that does not stop."""
    ew = torch.logspace(-5, 0, 600).double()
    result, free = cg(lambda v: ew * v, ew.sqrt(), max_iter=900, tol=tol), cg(lambda v: ew * v, ew.sqrt(), max_iter=900).values

    def enough(k):
        j = max(10, int(0.1 * k))
        return k >= j and free[k] < 0 and (free[k] - free[k - j]) / free[k] < j * tol
    assert result.reason == "progress" and result.iterations == next(k for k in range(900) if enough(k)) >= least


def test_damped_solve_equals_the_dense_inverse():
    """CG on G + λI from products alone is torch.linalg.solve on the dense matrix, plain and with K-FAC."""
    model, (idx, targets), lam = gpt(n_layer=1), tokens(), 1e-2
    ggn, dense, kfac = GGN(model, idx, targets), Dense(model, idx, targets), make_kfac(model, idx, targets)
    d = torch.linalg.solve(dense.G + lam * torch.eye(len(dense.g)), -dense.g)
    for precond in (None, lambda v: kfac.apply(v, lambda S: 1 / (S + lam))):
        result = cg(lambda v: ggn.matvec(v) + lam * v, -ggn.grad, precond=precond, max_iter=1000, rtol=1e-8)
        assert result.reason == "residual" and close(result.x, d, 1e-6)


def test_lanczos_is_a_function_of_the_matrix():
    """With as many iterations as dimensions function(A) b and xᵀAx are the dense ones; it stops when the space is exhausted."""
    A, b, _ = spd(20, low=-2)
    ew, Q = torch.linalg.eigh(A)
    for function in (lambda ew: (ew + 0.1) ** -0.5, lambda ew: 1 / (ew + 0.1), lambda ew: ew):
        x, xAx, n = gn.lanczos(A.matmul, b, function, 20)
        want = Q @ (function(ew) * (Q.T @ b))
        assert close(x, want) and math.isclose(xAx, (want @ A @ want).item(), rel_tol=1e-9) and n == 20
    x, _, n = gn.lanczos(A.matmul, Q[:, -3:].sum(1), torch.sqrt, 20)
    assert n == 3 and close(x, Q[:, -3:] @ ew[-3:].sqrt())
    assert gn.lanczos(lambda v: v * math.nan, b, torch.sqrt, 5)[0].isnan().all()


# ---- K-FAC ----

class Readable(nn.Module):
    """Embedding, biases, a norm: one of each kind of parameter, no mixing of tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.mid, self.head = nn.Linear(4, 3), nn.Linear(3, 7, bias=False)

    def forward(self, idx):
        return self.head(torch.tanh(self.mid(self.norm(self.embed(idx)))))


def make_kfac(model, idx, targets, micro_batch=None, **settings):
    kfac = KFAC(model, **settings)
    kfac.update(idx, targets, micro_batch, torch.Generator().manual_seed(0))
    kfac.decompose()
    return kfac


def sampled(model, idx, seed=0):
    """The labels that KFAC.update draws from a generator with this seed."""
    probs = model(idx).detach().float().softmax(-1)
    return torch.multinomial(probs.flatten(0, -2), 1, generator=torch.Generator().manual_seed(seed)).view_as(idx)


def loop_factors(model, idx, labels):
    """{parameter: dense K} by plain loops: sequence by sequence, token by token, L = mean δδᵀ and R = mean aaᵀ."""
    calls, n = [], idx.numel()
    hooks = [m.register_forward_hook(lambda m, a, out: (out.retain_grad(), calls.append((m, a[0], out)))[1])
             for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    linear, L, R, total = [m.weight for m in model.modules() if isinstance(m, nn.Linear)], {}, {}, 0.0
    for row, label in zip(idx, labels):
        calls.clear()
        model.zero_grad()
        F.cross_entropy(model(row[None])[0], label, reduction="sum").backward()
        total = total + torch.cat([p.grad.flatten() for p in model.parameters()])
        for m, a, out in calls:
            for t in range(len(row)):
                delta = out.grad[0, t]
                if isinstance(m, nn.Embedding):
                    if any(m.weight is w for w in linear):
                        continue
                    left, right = torch.diag(F.one_hot(a[0, t], m.num_embeddings).double()), torch.outer(delta, delta)
                else:
                    left, right = torch.outer(delta, delta), torch.outer(a[0, t], a[0, t]).detach()
                L[m.weight], R[m.weight] = L.get(m.weight, 0) + left / n, R.get(m.weight, 0) + right / n
                if getattr(m, "bias", None) is not None:
                    L[m.bias], R[m.bias] = L.get(m.bias, 0) + left / n, torch.ones(1, 1).double()
    for h in hooks:
        h.remove()
    square = total.split([p.numel() for p in model.parameters()])
    return L, R, {p: torch.diag(s * s / n) for p, s in zip(model.parameters(), square) if p not in L}


@pytest.mark.parametrize("build", [Readable, gpt, lambda: gpt(True)], ids=["readable", "gpt", "tied"])
@pytest.mark.parametrize("max_side", [4096, 5])
def test_kfac_is_the_kronecker_product_of_loop_factors(build, max_side):
    """For weights, embedding (its side the token frequencies; tied: the head's factors), biases and norms (a diagonal),
    apply is the dense K = L ⊗ R from plain per-token loops: K itself, (K + λI)⁻¹ and (K + λI)^½; sides above max_side are
    diagonal."""
    torch.manual_seed(0)
    model, (idx, targets) = build().double(), tokens()
    L, R, diagonals = loop_factors(model, idx, sampled(model, idx))
    kfac = make_kfac(model, idx, targets, max_side=max_side)

    def side(M):
        return torch.diag(torch.diag(M)) if len(M) > max_side else M
    for i, p in enumerate(model.parameters()):
        K = diagonals[p] if p in diagonals else torch.kron(side(L[p]), side(R[p]))
        v, eye = torch.randn(p.numel()).double(), torch.eye(p.numel()).double()
        ew, Q = torch.linalg.eigh(K + 0.1 * eye)
        assert close(kfac.apply(v, lambda S: S, [i]), K @ v, 1e-6)                      # labels are drawn in float32
        assert close(kfac.apply(v, lambda S: 1 / (S + 1e-2), [i]), torch.linalg.solve(K + 1e-2 * eye, v), 1e-6)
        assert close(kfac.apply(v, lambda S: (S + 0.1).sqrt(), [i]), Q @ (ew.sqrt() * (Q.T @ v)), 1e-6)
    v = torch.randn(len(theta_of(model))).double()
    apart = [kfac.apply(t, torch.sqrt, [i]) for i, t in enumerate(v.split([p.numel() for p in model.parameters()]))]
    assert torch.equal(kfac.apply(v, torch.sqrt), torch.cat(apart))


def test_kfac_micro_batches_and_averages(monkeypatch):
    """Pieces change no factor (with the same labels; the norms' diagonal, from sums over a piece, is another estimate of the
    same); `decay` averages factors of several batches; factored damping is (L + γ/π I) ⊗ (R + γπ I)."""
    model, first, second = gpt(), tokens(), tokens(seed=1)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda draws, generator=None: draws.fill_(1.0))     # the likeliest label
    whole, parts, both = make_kfac(model, *first), make_kfac(model, *first, micro_batch=2), make_kfac(model, *second)
    other = make_kfac(model, *second).factors
    both.update(*first, decay=0.75)
    both.decompose()
    for i, p in enumerate(model.parameters()):
        v = torch.randn(p.numel()).double()
        for a, b, c, d in zip(whole.factors[i], parts.factors[i], both.factors[i], other[i]):
            assert (p.ndim == 1 or close(a, b)) and close(c, 0.75 * d + 0.25 * a, 1e-12)
        if p.ndim == 2:
            L, R = (torch.diag(f) if f.ndim == 1 else f for f in whole.factors[i])
            pi = (R.trace() / len(R) / (L.trace() / len(L))).sqrt()
            K = torch.kron(L + 0.1 / pi * torch.eye(len(L)).double(), R + 0.1 * pi * torch.eye(len(R)).double())
            assert close(whole.apply(v, lambda S: S, [i], whole.tikhonov(0.1)), K @ v)


def test_kfac_estimates_the_gauss_newton_matrix():
    """Where its assumption holds (one input for all), L ⊗ R with sampled labels tends to G, whose labels are all: 30,000
    tokens bring it to 3 %, so the scale is right and the true targets play no part."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(4).double().expand(30_000, 4), torch.zeros(30_000, dtype=torch.long)
    kfac, dense = make_kfac(model, x, y), Dense(model, x[:50], y[:50])
    K = torch.stack([kfac.apply(e, lambda S: S) for e in torch.eye(15).double()])
    assert close(K[:12, :12], dense.G[:12, :12], 0.03) and close(K[12:, 12:], dense.G[12:, 12:], 0.03)


def iterations_to_residual(model, block_size, rows, steps, train_tokens, lam=1e-3, rtol=0.1):
    """CG iterations without and with K-FAC (from a quarter of the rows, as in GaussNewton) after some steps of AdamW."""
    opt = make_optimizer("adamw", model)
    for step in range(steps + 1):
        idx, targets = get_batch(train_tokens, block_size, rows, seed=0, step=step)
        if step < steps:
            opt.zero_grad()
            F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
    ggn, kfac = GGN(model, idx, targets, 64, 4.0), make_kfac(model, idx[:rows // 4], targets[:rows // 4])
    results = [cg(lambda v: ggn.matvec(v) + lam * v, -ggn.grad, precond=precond, max_iter=500, rtol=rtol)
               for precond in (None, lambda v: kfac.apply(v, lambda S: 1 / (S + lam)))]
    assert [r.reason for r in results] == ["residual"] * 2
    return [r.iterations for r in results]


@pytest.mark.parametrize("preset, steps, rows", [(dict(block_size=32, n_layer=1, n_head=2, n_embd=32), 30, 64),
                                                 pytest.param(PRESETS["tiny"], 60, 256, marks=long, id="tiny")])
def test_kfac_at_least_halves_cg_iterations(stdlib, preset, steps, rows):
    """On real text in float32, at λ = 1e-3, to the residual 0.1 that the 20 iterations of a step can reach."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, **preset))
    plain, preconditioned = iterations_to_residual(model, preset["block_size"], rows, steps, stdlib.train)
    assert preconditioned <= plain / 2


class Conv1D(nn.Module):
    """A linear map that keeps its weight as (in, out), as GPT-2 does in Hugging Face's transformers."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = nn.Parameter(linear.weight.detach().T.clone()), nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Spelled(nn.Linear):
    """nn.Linear, written another way."""
    way = None

    def forward(self, x):
        return {"x @ W.T + b": lambda: x @ self.weight.T + self.bias,
                "matmul": lambda: torch.matmul(x, self.weight.transpose(0, 1)).add(self.bias),
                "not contiguous": lambda: F.linear(x.transpose(0, 1), self.weight, self.bias).transpose(0, 1),
                }[self.way]()


@pytest.mark.parametrize("way", ["transposed", "x @ W.T + b", "matmul", "not contiguous"])
def test_kfac_sees_what_multiplies_its_input(way):
    """However a linear map is written, its factors are nn.Linear's; of a weight kept as (in, out) the other way round."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    other.load_state_dict(plain.state_dict())
    for i in (0, 2):
        if way == "transposed":
            other[i] = Conv1D(other[i])
        else:
            other[i].__class__ = type("Way", (Spelled,), {"way": way})
    x, y = torch.randn(6, 5, 4).double(), torch.randint(0, 3, (6, 5))
    factors = []
    for model in (plain, other):
        kfac = KFAC(model)
        kfac.update(x, y, micro_batch=4, generator=torch.Generator().manual_seed(0))
        factors.append(kfac.factors)
    for i in range(4):
        sides = factors[1][i][::-1] if way == "transposed" and i % 2 == 0 else factors[1][i]
        assert len(sides) == 2 and all(close(a, b) for a, b in zip(sides, factors[0][i]))


def test_kfac_gives_a_packed_projection_factors():
    """nn.MultiheadAttention's in_proj_weight (3E, E): L is E[δδᵀ] of query, key and value together, R is E[aaᵀ]."""
    model = Attends().double()
    model.forward = lambda x: model.head(model.attn(*[model.inp(x)] * 3, need_weights=False)[0])
    kfac, x, y = KFAC(model), torch.randn(6, 5, 4).double(), torch.randint(0, 4, (6, 5))
    kfac.update(x, y)
    shapes = [tuple(tuple(side.shape) for side in kfac.factors[i]) for i, _ in enumerate(kfac.params)]
    names = [name for name, _ in model.named_parameters()]
    assert dict(zip(names, shapes))["attn.in_proj_weight"] == ((12, 12), (4, 4))
    assert dict(zip(names, shapes))["attn.in_proj_bias"] == ((12, 12), (1,))
    a = model.inp(x).flatten(0, 1)
    assert close(kfac.factors[names.index("attn.in_proj_weight")][1], a.T @ a / len(a))


def test_kfac_memory_is_flat():
    """Parameters without factors: at most a few of their gradients are alive at once, however many micro-batches."""
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(1, 300, 300) / 17)

        def forward(self, x):
            return torch.einsum("bi,kio->bo", x, self.w)
    model, most = Model(), [0]

    def alive(*_):
        gc.collect()
        most[0] = max(most[0], sum(torch.is_tensor(t) and t.numel() == 90_000 for t in gc.get_objects()))
    model.register_forward_hook(alive)
    KFAC(model).update(torch.randn(40, 300), torch.randint(0, 300, (40,)), micro_batch=1)
    assert 1 < most[0] < 8


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hugging_face_models_train(name):
    """GPT-2 (transposed weights, tied) and Llama (grouped queries, tied) with random weights, by CG, an inner solver and
    layers: the loss falls at each step; and K-FAC is a preconditioner worth its name on GPT-2."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=50, use_cache=False)
    if name == "gpt2":
        config = transformers.GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
                                         attn_pdrop=0.0, **sizes)
    else:
        config = transformers.LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                                          num_key_value_heads=2, tie_word_embeddings=True, **sizes)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = transformers.AutoModelForCausalLM.from_config(config)

        def forward(self, x):
            return self.model(x).logits
    idx, targets = tokens(24, 12, 50)
    targets = (3 * idx + 1) % 50
    for solver in ("cg", "inner", "layers"):
        model = Logits()
        params = gn.trainable(model)
        parts = [params[:3], params[3:]] if solver == "layers" else None
        inner = gn.InnerSolver(model, "muon", rows=2) if solver == "inner" else None
        opt = GaussNewton(model, parts, inner=inner, damping=0.1)
        losses = [opt.step(idx, targets)["loss"] for _ in range(4)]
        assert all(b < a for a, b in zip(losses, losses[1:])), (solver, losses)
        if name == "gpt2" and solver == "cg":
            assert sum(len(f) == 2 for f in opt.kfac.factors.values()) >= 17      # embeddings, maps, their biases
            falls = []
            for precond in ("kfac", "none"):
                ggn, kfac = GGN(model, idx, targets), opt.kfac
                apply = (lambda v: kfac.apply(v, lambda S: 1 / (S + 1e-3))) if precond == "kfac" else None
                falls.append(cg(lambda v: ggn.matvec(v) + 1e-3 * v, -ggn.grad, precond=apply, max_iter=5).values[-1])
            assert falls[0] < falls[1]


# ---- step length and damping ----

def test_line_search_follows_its_rules():
    """300 random tables of losses, some not finite: armijo takes the first α = 2^(−i/2) with f(α) <= f(0) + 0.01 α slope and goes
    on while the loss still falls, grid the best below f(0), none α = 1 if finite; α = 0 and a reason otherwise."""
    rng = np.random.default_rng(0)
    alphas, seen = [2 ** (-i / 2) for i in range(10)], set()
    for n in range(300):
        table = list(1 + rng.normal(0.1 if n % 2 else -0.02, 0.1, 10) + rng.normal(0, 0.03, 10).cumsum())
        for i in np.flatnonzero(rng.random(10) < (0.97 if n % 10 == 0 else 0.2)):
            table[i] = rng.choice([math.nan, math.inf])
        f, slope = dict(zip(alphas, table)), -float(rng.random())
        for kind in ("armijo", "grid", "none"):
            calls = []
            got = line_search(lambda a: calls.append(a) or f[a], 1.0, slope, kind)
            assert calls == alphas[:got.tries] and got.tries == (10 if kind == "grid" else 1 if kind == "none" else got.tries)
            finite = [a for a in calls if math.isfinite(f[a])]
            if kind == "armijo":
                want = next((i for i, a in enumerate(alphas) if f[a] <= 1 + 0.01 * a * slope and f[a] < 1), None)
                while want is not None and want < 9 and f[alphas[want + 1]] < f[alphas[want]]:
                    want += 1
                want = 0.0 if want is None else alphas[want]
                assert got.tries == min(10, alphas.index(want) + 2 if want else 10)
            elif kind == "grid":
                want = min([a for a in alphas if f[a] < 1], key=f.get, default=0.0)
            else:
                want = 1.0 if math.isfinite(f[1.0]) else 0.0
            assert got.alpha == want and got.loss == (f[want] if want else 1.0)
            assert got.reason == (kind if want else "no decrease" if finite else "nonfinite")
            seen.add((kind, got.reason, got.alpha == 1))
    assert len(seen) == 10                      # each kind's outcomes all came up
    assert line_search(lambda a: 0.5, 1.0, -1.0, "grid", candidates=3).tries == 3
    with pytest.raises(ValueError, match="armijo, grid or none.*'wolfe'"):
        line_search(lambda a: 0.0, 1.0, -1.0, "wolfe")


@pytest.mark.parametrize("rho, alpha, factor", [
    (0.9, 1.0, 0.4), (5.0, 1.0, 0.4), (0.75, 1.0, 1), (0.76, 0.95, 0.4), (0.9, 0.71, 1), (0.5, 0.5, 1), (0.25, 1.0, 1), (0.24, 1.0, 2),
    (-1.0, 1.0, 2), (math.nan, 1.0, 2), (0.9, 0.36, 2), (0.0, 0.0, 2)])
def test_levenberg_marquardt_moves_as_documented(rho, alpha, factor):
    """λ × 0.4 if ρ > 3/4 at nearly full length, × 2 if ρ < 1/4 (or no number) or α < 0.4, else unchanged; between floor and
    ceiling, whatever comes."""
    move = gn.levenberg_marquardt
    assert math.isclose(move(3.0, rho, alpha), 3.0 * factor) and move(3.0, rho, alpha, floor=2.9, ceiling=3.1) == min(max(3 * factor, 2.9), 3.1)
    assert move(1e4, 0.0, 1.0) == 1e4 and move(1e-8, 1.0, 1.0) == 1e-8


# ---- one Gauss-Newton step ----

def damping_matrix(opt, metric):
    """The damping per λ, from K-FAC applied to unit vectors one by one."""
    n = len(theta_of(opt.model))
    return torch.eye(n).double() if metric == "identity" else torch.stack([opt.kfac.apply(e, opt.metric) for e in torch.eye(n).double()], 1)


def test_damping_has_a_floor():
    """Steps whose model is right lower λ to a tenth of its start and no further."""
    model, data = gpt(n_layer=1), tokens(8)
    opt = GaussNewton(model, damping=30.0)
    seen = [opt.step(*data)["rho"] and opt.damping for _ in range(6)]
    assert seen[:2] == pytest.approx([12.0, 4.8]) and min(seen) == 3.0


@pytest.mark.parametrize("metric, precond", [("identity", "none"), ("identity", "kfac"), ("kfac", "kfac")])
@pytest.mark.parametrize("layerwise", [False, True])
def test_step_is_the_dense_one(metric, precond, layerwise):
    """d = −(G + λD)⁻¹ g with dense matrices, D = I or K-FAC's root, G whole or its layers' diagonal blocks; θ moves by αd; the
    record's ρ, slope, cosine, losses and λ are their definitions recomputed."""
    model, (idx, targets) = gpt(n_layer=1), tokens(8)
    parts = model.layers() if layerwise else None
    opt = GaussNewton(model, parts, damping=0.3, damping_metric=metric, precond=precond, cg_iters=500, cg_rtol=1e-9, micro_batch=3)
    theta, dense = theta_of(model), Dense(model, idx, targets)
    record = opt.step(idx, targets)
    G, D = dense.G, damping_matrix(opt, metric)
    if layerwise:
        mask = torch.zeros_like(G)
        for part in opt.parts:
            at = dense.index(part)
            mask[at[:, None], at] = 1
        G = G * mask
    d = torch.linalg.solve(G + 0.3 * D, -dense.g)
    assert record["accepted"] and record["reason"] == "" and record["cg_reason"] == "residual" and close(opt.direction, d, 1e-6)
    alpha, new_loss = record["alpha"], Dense(model, idx, targets).loss
    assert alpha > 0 and torch.allclose(theta_of(model), theta + alpha * opt.direction, rtol=0, atol=1e-14)
    slope, dGd = dense.g @ d, d @ G @ d
    predicted = alpha * slope + alpha ** 2 * dGd / 2
    for key, want in dict(loss=dense.loss, new_loss=new_loss, search_loss=new_loss, search_loss0=dense.loss, grad_norm=dense.g.norm(),
                          predicted=predicted, actual=new_loss - dense.loss, rho=(new_loss - dense.loss) / predicted, damping=0.3,
                          cosine=-slope / (d.norm() * dense.g.norm()), step_norm=alpha * d.norm(), pieces=3).items():
        assert math.isclose(record[key], float(want), rel_tol=1e-5), key
    assert opt.damping == gn.levenberg_marquardt(0.3, record["rho"], alpha) and (opt.steps, opt.rejections) == (1, 0)


def test_one_part_is_full():
    """Layerwise with a single part is full Gauss-Newton, bit for bit, over three steps."""
    a, b, (idx, targets) = gpt(), gpt(), tokens(8)
    full, one = GaussNewton(a), GaussNewton(b, parts=[list(b.parameters())])
    assert [full.step(idx, targets) for _ in range(3)] == [one.step(idx, targets) for _ in range(3)]
    assert torch.equal(theta_of(a), theta_of(b))


def test_newton_convergence_where_g_is_the_hessian():
    """Close to the optimum of a linear softmax model the quadratic is exact to third order: one all but undamped step divides
    the gradient by over 100, and ρ is 1."""
    model, x, y = linear_softmax()
    opt = GaussNewton(model, damping=1e-8, damping_metric="identity", precond="none", cg_iters=100, cg_rtol=1e-10)
    norms = [opt.step(x, y)["grad_norm"] for _ in range(6)]
    model.weight.data += 1e-3 * torch.randn(3, 4)
    first, second = opt.step(x, y), opt.step(x, y)
    assert norms[-1] < 1e-6 and second["grad_norm"] < 1e-2 * first["grad_norm"] and abs(first["rho"] - 1) < 1e-2


def test_classifier_in_five_lines():
    """The module's docstring as it stands: any nn.Module, here an MLP on three rings, is fitted in a few steps."""
    torch.manual_seed(0)
    angle, y = 2 * math.pi * torch.rand(600), torch.arange(600) % 3
    x = (1 + y + 0.1 * torch.randn(600))[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    opt = GaussNewton(model)
    for _ in range(30):
        record = opt.step(x, y)
    assert record["loss"] < 0.05 and gn.batch_loss(model, x, y) < 0.05


@pytest.mark.parametrize("trouble, reason", [
    ("loss", "loss or gradient not finite"), ("nan product", "nonfinite"), ("inf product", "nonfinite"),
    ("indefinite", "indefinite"), ("no decrease", "line search: no decrease"), ("nonfinite", "line search: nonfinite")])
@pytest.mark.parametrize("metric", ["identity", "kfac"])
def test_rejected_step_changes_no_parameter(trouble, reason, metric, monkeypatch):
    """Whatever the trouble: every parameter bitwise as it was, λ doubled, the last direction forgotten, the reason in the
    record, rejections counted; and once it is over the next step is taken."""
    model, (idx, targets) = gpt(), tokens(8)
    opt = GaussNewton(model, damping=0.5, damping_metric=metric, precond_interval=4)
    opt.step(idx, targets)
    lam, matvec, loss = opt.damping, GGN.matvec, gn.batch_loss
    healthy = theta_of(model)
    with monkeypatch.context() as m:
        if trouble == "loss":
            model.head.weight.data[0, 0] = math.nan
        elif trouble in ("no decrease", "nonfinite"):
            m.setattr(gn, "batch_loss", lambda *a: loss(*a) * (10 if trouble == "no decrease" else math.nan))
        else:
            factor = {"nan product": math.nan, "inf product": math.inf, "indefinite": -1e6}[trouble]
            m.setattr(GGN, "matvec", lambda self, v, part=None: matvec(self, v, part) * factor)
        before = theta_of(model)
        for n in (1, 2):
            record = opt.step(idx, targets)
            assert not record["accepted"] and reason in record["reason"] and record["damping"] == lam * 2 ** (n - 1)
            assert same_bits(theta_of(model), before) and opt.damping == lam * 2 ** n
            assert opt.direction is None and (opt.steps, opt.rejections) == (1 + n, n) and record["alpha"] == 0
            json.dumps(record)
    torch.nn.utils.vector_to_parameters(healthy, model.parameters())
    assert opt.step(idx, targets)["accepted"] and opt.rejections == 0


def test_trouble_in_the_first_step_does_not_last():
    """A first step that ends before factors are made leaves a usable optimizer, also if they are only due every 3 steps."""
    model, (idx, targets) = gpt(), tokens(8)
    opt, bad = GaussNewton(model, precond_interval=3), gpt().head.weight.data[0, 0].item()
    model.head.weight.data[0, 0] = math.nan
    assert not opt.step(idx, targets)["accepted"]
    model.head.weight.data[0, 0] = bad
    assert opt.step(idx, targets)["accepted"]


def test_without_a_line_search_every_finite_step_is_taken():
    """An inner rate that is far too high: Armijo shortens or refuses the step, `none` takes all of it although the loss rises."""
    found = {}
    for kind in ("armijo", "none"):
        model, (idx, targets) = gpt(n_layer=1), tokens(12)
        before, inner = theta_of(model), gn.InnerSolver(model, "adamw", rows=2, lr=3.0)
        found[kind] = GaussNewton(model, line_search=kind, inner=inner).step(idx, targets)
        moved = theta_of(model) - before
        assert close(moved, found[kind]["alpha"] * (theta_of(inner.copy) - before))
    assert found["none"]["accepted"] and found["none"]["alpha"] == 1 and found["none"]["actual"] > 0
    assert found["armijo"]["alpha"] < 1


@pytest.mark.parametrize("where", ["cg", "line search", "linearise", "kfac"])
def test_exception_in_a_step_restores_the_parameters(where):
    """Ctrl-C or out-of-memory at any stage, the third trial of a step length included: as if the step had not begun."""
    model, (idx, targets) = gpt(), tokens(8)
    opt = GaussNewton(model, search_candidates=4, line_search="grid")
    opt.step(idx, targets)
    before, seen = theta_of(model), []

    def progress(what, done=0, total=0):
        seen.append(what)
        if what == where and seen.count(what) == (1 if where in ("linearise", "kfac") else 3):
            raise KeyboardInterrupt
    opt.progress = progress
    state = {k: v for k, v in opt.state_dict().items() if not torch.is_tensor(v)}
    with pytest.raises(KeyboardInterrupt):
        opt.step(idx, targets)
    assert same_bits(theta_of(model), before) and state == {k: v for k, v in opt.state_dict().items() if not torch.is_tensor(v)}


def test_curvature_and_search_batches():
    """`curvature` makes G and nothing else: d = −(G' + λI)⁻¹ g; `search` decides α; ρ compares losses of the batch itself; work
    counts it all, in gradients of the batch."""
    model, (idx, targets), other, third = gpt(n_layer=1), tokens(8), tokens(3, seed=1), tokens(4, seed=2)
    opt = GaussNewton(model, damping=0.3, damping_metric="identity", cg_iters=500, cg_rtol=1e-9, line_search="grid", micro_batch=2)
    dense, G = Dense(model, idx, targets), Dense(model, *other).G
    theta, search0 = theta_of(model), Dense(model, *third).loss
    record = opt.step(idx, targets, curvature=other, search=third)
    d = torch.linalg.solve(G + 0.3 * torch.eye(len(dense.g)), -dense.g)
    losses = {}
    for alpha in [2 ** (-i / 2) for i in range(10)]:
        torch.nn.utils.vector_to_parameters(theta + alpha * d, model.parameters())
        losses[alpha] = [Dense(model, *data).loss for data in ((idx, targets), third)]
    best = min(losses, key=lambda a: losses[a][1])
    rho = (losses[best][0] - dense.loss) / (best * dense.g @ d + best ** 2 * d @ G @ d / 2).item()
    assert close(opt.direction, d, 1e-6) and record["alpha"] == best and math.isclose(record["rho"], rho, rel_tol=1e-5)
    for key, want in dict(loss=dense.loss, new_loss=losses[best][0], search_loss0=search0, search_loss=losses[best][1]).items():
        assert math.isclose(record[key], want, rel_tol=1e-6), key
    work = 3 / 8 + 1 + 3 / 8 * (2 / 3 * 1 / 3 + 4 / 3 * record["products"]) + (11 * 4 / 8 + 1) / 3
    assert math.isclose(record["work"], work, rel_tol=1e-9)


def test_curvature_frac_keeps_the_whole_gradient():
    """G from the first 3 of 8 rows (the share rounds up), the gradient from all of them, no row twice: 1 gradient of work."""
    model, (idx, targets) = gpt(n_layer=1), tokens(8)
    opt = GaussNewton(model, damping=0.3, damping_metric="identity", precond="none", cg_iters=500, cg_rtol=1e-9, curvature_frac=0.3)
    dense, G = Dense(model, idx, targets), Dense(model, idx[:3], targets[:3]).G
    record = opt.step(idx, targets)
    assert close(opt.direction, torch.linalg.solve(G + 0.3 * torch.eye(len(dense.g)), -dense.g), 1e-6)
    assert math.isclose(record["loss"], dense.loss, rel_tol=1e-12) and math.isclose(record["grad_norm"], dense.g.norm().item(), rel_tol=1e-9)
    assert math.isclose(record["work"], 1 + 3 / 8 * 4 / 3 * record["products"] + record["search_tries"] / 3, rel_tol=1e-9)


@pytest.mark.parametrize("interval, before", [(1, 3), (2, 3), (3, 0)])
def test_step_state_resumes_bit_for_bit(interval, before):
    """Some steps, parameters and state through torch.save and torch.load(weights_only=True) into fresh objects, the rest: the
    uninterrupted run's bits, also while factors are kept between steps, and before the first step."""
    batches = [tokens(8, seed=i) for i in range(6)]

    def build(seed):
        model = gpt(seed=seed)
        return model, GaussNewton(model, model.layers(), precond_interval=interval, cg_iters=5, warm_start=0.9)
    whole, opt = build(0)
    for batch in batches[:before]:
        opt.step(*batch)
    file = io.BytesIO()
    torch.save((whole.state_dict(), opt.state_dict()), file)
    file.seek(0)
    resumed, fresh = build(1)
    if before:
        fresh.step(*batches[0])                                           # one already in use takes the state too
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    fresh.load_state_dict(state)
    for batch in batches[before:]:
        assert opt.step(*batch) == fresh.step(*batch)
    assert torch.equal(theta_of(whole), theta_of(resumed)) and opt.damping == fresh.damping


def test_gauss_newton_refuses_nonsense():
    """parts that are no partition (missing, twice, foreign or frozen), unknown words, shares outside (0, 1]."""
    model = gpt()
    layers = model.layers()
    for parts in (layers[1:], layers + layers[:1], layers + [[nn.Parameter(torch.ones(1))]]):
        with pytest.raises(ValueError, match="exactly once"):
            GaussNewton(model, parts)
    model.embed.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="exactly once"):
        GaussNewton(model, layers)
    for bad in (dict(damping_metric="l2"), dict(precond="kfca"), dict(curvature_frac=0), dict(precond_frac=1.1)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GaussNewton(gpt(), **bad)


# ---- other local models and solvers ----

def at_logits(dense, targets, v, model, idx):
    """f¹(v) = L(z + Jv) from dense parts: its value, gradient and Gauss-Newton matrix."""
    z = (model(idx).detach().flatten(0, 1) + dense.J @ v).requires_grad_()
    loss = F.cross_entropy(z, targets.flatten())
    H = torch.stack([hessian(F.cross_entropy)(row, y) for row, y in zip(z.detach(), targets.flatten())]) / len(z)
    return loss.item(), torch.einsum("nvp,nv->p", dense.J, torch.autograd.grad(loss, z)[0]), torch.einsum("nvp,nvw,nwq->pq", dense.J, H, dense.J)


@pytest.mark.parametrize("micro_batch, cache_gb", [(None, 0), (2, 0), (2, 1)])
def test_shift_expands_the_linearised_network(micro_batch, cache_gb):
    """After shift(v), twice, loss, gradient and product are those of f¹ at v, built from dense J; with `part` too."""
    model, (idx, targets) = gpt(n_layer=1), tokens()
    ggn, dense = GGN(model, idx, targets, micro_batch, cache_gb), Dense(model, idx, targets)
    for v in torch.randn(2, len(dense.g)).double():
        ggn.shift(v)
        loss, grad, G = at_logits(dense, targets, v, model, idx)
        assert math.isclose(ggn.loss, loss, rel_tol=1e-9) and close(ggn.grad, grad) and close(ggn.matvec(v), G @ v)
    ggn.shift(v[:28], [0])
    loss, grad, _ = at_logits(dense, targets, torch.cat([v[:28], 0 * v[28:]]), model, idx)
    assert math.isclose(ggn.loss, loss, rel_tol=1e-9) and close(ggn.grad, grad[:28])


@pytest.mark.parametrize("layerwise", [False, True])
def test_prox_linear_step_is_the_minimum_of_its_model(layerwise):
    """∇f¹(d) + λd = 0, for each part with the others at rest, and the decrease that ρ is measured against is Σ f¹(d) − f¹(0)."""
    model, (idx, targets) = gpt(n_layer=1), tokens(8)
    opt = GaussNewton(model, model.layers() if layerwise else None, damping=0.3, damping_metric="identity", local_model="prox_linear",
                      newton_steps=12, cg_iters=400, cg_rtol=1e-6)
    dense, z0 = Dense(model, idx, targets), gpt(n_layer=1)
    record, promised = opt.step(idx, targets), 0.0
    for part in opt.parts:
        at, v = dense.index(part), torch.zeros_like(dense.g)
        v[at] = opt.direction[at]
        loss, grad, _ = at_logits(dense, targets, v, z0, idx)
        assert (grad + 0.3 * v)[at].norm() < 1e-5 * dense.g[at].norm()
        promised += loss - dense.loss
    slope, alpha = (dense.g @ opt.direction).item(), record["alpha"]
    assert math.isclose(record["predicted"], alpha * slope + alpha ** 2 * (promised - slope), rel_tol=1e-5)


def test_first_newton_step_of_every_part_is_the_gn_step():
    """Prox-linear's first Newton step starts at θ for each part, whatever the parts before it did to the linearised logits."""
    directions = []
    for settings in (dict(local_model="gn"), dict(local_model="prox_linear", newton_steps=1)):
        model = gpt(n_layer=1)
        opt = GaussNewton(model, model.layers(), 1.0, "identity", "none", cg_iters=400, cg_rtol=1e-9, **settings)
        opt.step(*tokens(8))
        directions.append(opt.direction)
    assert close(*directions, 1e-6)


def test_geodesic_correction():
    """JᵀH f''(d, d) against torch.func's second directional derivative, and a = −½ (G + λI)⁻¹ of it; the bent step is taken only if
    better."""
    model, (idx, targets) = gpt(n_layer=1), tokens(8)
    theta, dense = theta_of(model), Dense(model, idx, targets)
    names, params = zip(*model.named_parameters())
    d = 0.1 * torch.randn(len(dense.g)).double()

    def logits(t):
        return functional_call(model, {n: v.view_as(p) for n, v, p in zip(names, t.split(dense.sizes), params)}, (idx,)).flatten(0, 1)
    with sdpa_kernel(SDPBackend.MATH):
        second = torch.func.jacfwd(torch.func.jacfwd(lambda s: logits(theta + s * d)))(torch.zeros(()).double())
    got = GGN(model, idx, targets, 3).pull_back_curvature(d, 1e-4)
    want = torch.einsum("nvp,nvw,nw->p", dense.J, dense.H, second)
    assert close(got, want, 1e-3)
    a = GaussNewton(model)._geodesic(GGN(model, idx, targets), d, lambda b, part: gn.CGResult(torch.linalg.solve(
        dense.G + 0.3 * torch.eye(len(b)), b), 1, "residual", []), h=1e-4)
    assert close(a, -0.5 * torch.linalg.solve(dense.G + 0.3 * torch.eye(len(d)), want), 1e-3)
    settings, twin = dict(damping=0.3, cg_iters=30), gpt(n_layer=1)
    bent, straight = GaussNewton(model, geodesic=True, **settings).step(idx, targets), GaussNewton(twin, **settings).step(idx, targets)
    assert bent["bent"] == (bent["new_loss"] < straight["new_loss"]) or bent["bend"] > 0.75
    assert bent["new_loss"] <= straight["new_loss"] and math.isclose(bent["new_loss"], Dense(model, idx, targets).loss, rel_tol=1e-9)


def test_power_half_step():
    """power 0.5: d is −(G + λI)^(−½) g from a dense eigendecomposition, scaled to the minimum of the undamped model along it."""
    model, (idx, targets) = gpt(n_layer=1), tokens(8)
    opt = GaussNewton(model, damping=0.3, damping_metric="identity", precond="none", power=0.5, cg_iters=len(theta_of(model)))
    dense = Dense(model, idx, targets)
    ew, Q = torch.linalg.eigh(dense.G)
    x = -Q @ ((ew + 0.3) ** -0.5 * (Q.T @ dense.g))
    opt.step(idx, targets)
    assert close(opt.direction, -(dense.g @ x) / (x @ dense.G @ x) * x, 1e-6) and opt.damping == 0.3
    for bad in (dict(power=0.7), dict(power=0.5), dict(power=0.5, precond="none"), dict(local_model="full")):
        with pytest.raises(ValueError, match=next(iter(bad))):
            GaussNewton(model, **bad)


class PlainMuon:
    """Muon for one matrix, written out: M = μM + (1 − μ)G, Nesterov's (1 − μ)G + μM through five Newton-Schulz iterations in
    bfloat16, scaled by 0.2 √max(m, n); decoupled decay."""

    def __init__(self, p, decay, momentum=0.95):
        self.p, self.decay, self.momentum, self.M = p, decay, momentum, torch.zeros_like(p)

    def step(self, lr):
        G, mu = self.p.grad, self.momentum
        self.M = mu * self.M + (1 - mu) * G
        X = ((1 - mu) * G + mu * self.M).bfloat16()
        X = X.T if X.shape[0] > X.shape[1] else X
        X = X / X.norm().clamp(min=1e-7)
        for _ in range(5):
            A = X @ X.T
            X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
        X = X.T if G.shape[0] > G.shape[1] else X
        with torch.no_grad():
            self.p.mul_(1 - lr * self.decay).sub_(X, alpha=lr * 0.2 * math.sqrt(max(G.shape)))


@pytest.mark.parametrize("solver", ["adamw", "muon"])
@pytest.mark.parametrize("prox", [False, True])
@pytest.mark.parametrize("layerwise", [False, True])
def test_inner_solver_is_a_plain_loop(prox, layerwise, solver):
    """Two outer steps, the second with the old moments and end point, against a loop over micro-batches on dense J and H: the
    gradient of the local model with its pull toward θ, clipped by part, into AdamW and Muon; θ̂ − θ, the decrease promised (at
    the last micro-batch, before its inner step), the step length, and the parameters."""
    model, (idx, targets), wd = gpt(n_layer=1), tokens(8), 0.1
    inner = gn.InnerSolver(model, solver, rows=3, lr=0.02, weight_decay=wd, clip=0.05, l2=0.2, schedule="constant_with_inner_cosine")
    opt = GaussNewton(model, model.layers() if layerwise else None, inner=inner, local_model="prox_linear" if prox else "gn")
    end, z0, muons = gpt(n_layer=1), gpt(n_layer=1), []
    if solver == "muon":
        muons = [PlainMuon(p, wd) for n, p in end.named_parameters() if "blocks" in n and p.ndim == 2]
        assert len(muons) == 7
    rest = [p for p in end.parameters() if all(p is not m.p for m in muons)]
    adam = torch.optim.AdamW([dict(params=[p for p in rest if (p.ndim > 1) == m], weight_decay=wd * m) for m in (True, False)], betas=(0.9, 0.999))
    for _ in range(2):
        gn.assign(z0.parameters(), model.parameters())
        theta, pieces = theta_of(model), [(idx[i:i + 3], targets[i:i + 3]) for i in (0, 3, 6)]
        for k, (x, y) in enumerate(pieces):
            dense, v = Dense(z0, x, y), theta_of(end) - theta
            g, promised = torch.zeros_like(v), 0.0
            for part in opt.parts:
                at, own = dense.index(part), torch.zeros_like(v)
                own[at] = v[at]
                value, full = at_logits(dense, y, own, z0, x)[:2] if prox else (dense.loss + dense.g @ own + 0.5 * own @ dense.G @ own, dense.g + dense.G @ own)
                promised += float(value) - dense.loss
                g[at] = full[at] + 0.2 * v[at]
                g[at] *= min(1.0, 0.05 / g[at].norm().item())
            for p, t in zip(end.parameters(), g.split(dense.sizes)):
                p.grad = t.view_as(p).clone()
            lr = 0.02 * 0.5 * (1 + math.cos(math.pi * k / 3))
            for group in adam.param_groups:
                group["lr"] = lr
            adam.step()
            for muon in muons:
                muon.step(lr)
        record, d = opt.step(idx, targets), theta_of(end) - theta
        alpha, slope = record["alpha"], (dense.g @ d).item()
        assert record["inner_steps"] == 3 and close(opt.direction, d, 1e-6) and close(theta_of(model), theta + alpha * d, 1e-6) and alpha > 0
        assert math.isclose(record["predicted"], alpha * slope + alpha ** 2 * (promised - slope), rel_tol=1e-5)
        assert math.isclose(record["rho"], record["actual"] / record["predicted"])


@pytest.mark.parametrize("layerwise", [False, True])
def test_inner_average(layerwise):
    """With average = 1/2 (1/3) the inner steps go the same way, the solution is the mean of the last three (two) of six, and the promise is about what the local
    model has there; the next solve starts where the last one ended, not at the mean."""
    torch.manual_seed(3)
    model, (idx, targets) = gpt(n_layer=1), tokens(12)
    parts = GaussNewton(model, model.layers() if layerwise else None).parts
    found, ways = {}, {}
    for average in (0, 1 / 2, 1 / 3):
        inner = gn.InnerSolver(model, "adamw", rows=2, lr=0.02, average=average)
        way, step = ways.setdefault(average, []), inner.optimizer.step
        inner.optimizer.step = lambda inner=inner, way=way, step=step: (step(), way.append(gn.flatten(inner.ends).detach()))
        inner._start = lambda: None                     # it has just been made
        for _ in range(2):
            found.setdefault(average, []).append(inner.solve(parts, idx, targets, True, {"work": 0.0}, lambda *where: None))
    assert len(ways[0]) == 12 and all(torch.equal(a, b) for way in ways.values() for a, b in zip(ways[0], way))
    for outer in range(2):
        way = ways[0][6 * outer:6 * outer + 6]
        for average, last in ((0, 1), (1 / 2, 3), (1 / 3, 2)):
            _, _, solution, fall = found[average][outer]
            assert close(solution, torch.stack(way[-last:]).mean(0) - theta_of(model)) and fall < 0
    with pytest.raises(ValueError, match="average"):
        gn.InnerSolver(model, average=1.5)


@pytest.mark.parametrize("layerwise", [False, True])
def test_solvers_agree(layerwise):
    """On one fixed batch with λ = 1e-2, an L2 pull in each: CG, inner AdamW and inner Muon, run long with rates that fall to 0,
    reach the same value of the quadratic, and of the prox-linear objective, to 1 %."""
    model, (idx, targets), lam = gpt(n_layer=1), tokens(8), 1e-2
    dense = Dense(model, idx, targets)
    tiled = idx.repeat(600, 1), targets.repeat(600, 1)          # every micro-batch of the inner solvers is the batch

    def objective(opt, d, prox):
        total = 0.0
        for part in opt.parts:
            at, own = dense.index(part), torch.zeros_like(d)
            own[at] = d[at]
            value = at_logits(dense, targets, own, gpt(n_layer=1), idx)[0] if prox else (dense.loss + dense.g @ own + 0.5 * own @ dense.G @ own).item()
            total += value - dense.loss + lam / 2 * (own @ own).item()
        return total
    for prox in (False, True):
        values, parts, local = {}, model.layers() if layerwise else None, "prox_linear" if prox else "gn"
        for solver in ("cg", "adamw", "muon"):
            inner = None if solver == "cg" else gn.InnerSolver(model, solver, rows=8, lr=0.1, weight_decay=0.0, clip=0.0, l2=lam)
            opt = GaussNewton(model, parts, lam, "identity", "none", inner=inner, local_model=local, newton_steps=15, cg_iters=400, cg_rtol=1e-8)
            if inner:
                d = inner.solve(opt.parts, *tiled, prox, {"work": 0.0}, opt.progress)[2]
            else:
                d = opt._solve(idx, targets, None, {"work": 0.0})[2]
            values[solver] = objective(opt, d, prox)
        assert values["cg"] < -0.05 and all(values["cg"] - 1e-9 <= v <= 0.99 * values["cg"] for v in values.values()), values


def test_inner_schedule_values():
    """Factors at the ends and in the middle of 4 outer steps of 10 inner ones, with and without warmup."""
    at = [(0, 0), (0, 5), (2, 0), (2, 5)]
    for kind, want in {"constant": [1, 1, 1, 1], "constant_with_inner_cosine": [1, 0.5, 1, 0.5],
                       "cosine_with_global_schedule": [1, 0.5, 0.5, 0.25],
                       "global_cosine": [1, (1 + math.cos(math.pi / 8)) / 2, 0.5, (1 + math.cos(math.pi * 5 / 8)) / 2]}.items():
        assert np.allclose([gn.inner_schedule(kind, outer, 4, k, 10) for outer, k in at], want)
    assert np.allclose([gn.inner_schedule("constant", outer, 4, k, 10, warmup=20) for outer, k in at], [0.05, 0.3, 1, 1])
    with pytest.raises(ValueError, match="inner schedule"):
        gn.inner_schedule("cosine", 0, 1, 0, 1)


# ---- baselines ----

def baseline_steps(model, opt, seeds):
    """A step for each seed, on next-token cross-entropy of random tokens."""
    for seed in seeds:
        idx, targets = tokens(4, 8, seed=seed)
        model.zero_grad()
        F.cross_entropy(model(idx).flatten(0, 1), targets.flatten()).backward()
        if hasattr(opt, "observe"):
            opt.observe(idx, targets)
        opt.step()


class DenseSOAP:
    """SOAP on the flattened parameter with the explicit Kronecker basis U = Q_L (x) Q_R of size (mn, mn), the first moment
    in the original space as the paper has it, and L and R as explicit weighted sums over all past gradients."""

    def __init__(self, W, lr, b1, b2, b3, eps, wd, f):
        self.x, self.shape, self.t = W.ravel().copy(), W.shape, 0
        self.lr, self.b1, self.b2, self.b3, self.eps, self.wd, self.f = lr, b1, b2, b3, eps, wd, f
        self.m, self.v, self.grads = np.zeros(W.size), np.zeros(W.size), []

    def step(self, G, first_basis, sides):
        self.t, self.Q = self.t + 1, self.Q if self.t else first_basis
        self.grads.append(G)
        U = np.kron(*self.Q)
        u = U.T @ G.ravel()
        if self.t == 1:
            u[np.abs(u) < 1e-9 * np.abs(u).max()] = 0                     # zero but for rounding
            self.m, direction = (1 - self.b1) * U @ u, u / (np.abs(u) + self.eps)
            self.v = (1 - self.b2) * u**2
        else:
            self.m, self.v = self.b1 * self.m + (1 - self.b1) * G.ravel(), self.b2 * self.v + (1 - self.b2) * u**2
            direction = (U.T @ self.m) / (1 - self.b1**self.t) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)
        self.x = self.x - self.lr * self.wd * self.x - self.lr * U @ direction
        if self.t % self.f == 0:
            orders = [np.arange(d) for d in self.shape]
            for k in (0, 1):
                if sides[k]:
                    C = sum(self.b3 ** (self.t - 1 - i) * (g @ g.T if k == 0 else g.T @ g) for i, g in enumerate(self.grads))
                    orders[k] = np.argsort([-q @ C @ q for q in self.Q[k].T])
                    self.Q[k] = np.linalg.qr(C @ self.Q[k][:, orders[k]])[0]
            self.v = self.v.reshape(self.shape)[np.ix_(*orders)].ravel()


@pytest.mark.parametrize("shape, limit, b3", [((5, 5), 99, -1), ((3, 7), 99, 0.8), ((7, 4), 99, -1), ((7, 4), 5, 0.8), ((4, 7), 5, -1)])
def test_soap_equals_dense_kronecker_derivation(shape, limit, b3):
    """SOAP is Adam in the basis Q_L (x) Q_R written out as one dense matrix, over 30 steps and 7 refreshes, also where a
    long side keeps the identity; the first basis is checked to be eigenvectors, then shared (null vectors are arbitrary).
    Gradients are correlated and badly scaled, so that the eigenbases are far from the identity and move."""
    rng, sides = np.random.default_rng(0), [d <= limit for d in shape]
    A, B = rng.normal(size=(shape[0], shape[0])), rng.normal(size=(shape[1], shape[1]))
    W = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    opt = SOAP([W], lr=0.02, betas=(0.9, 0.95), shampoo_beta=b3, weight_decay=0.3, precondition_frequency=4, max_precond_dim=limit)
    dense = DenseSOAP(W.detach().numpy(), 0.02, 0.9, 0.95, 0.95 if b3 < 0 else b3, 1e-8, 0.3, 4)
    for t in range(30):
        G = A @ (rng.normal(size=shape) + 0.3) @ B * 10 ** rng.uniform(-1, 0)
        W.grad = torch.from_numpy(G)
        opt.step()
        if t == 0:
            Q = [np.eye(d) if q is None else q.numpy().copy() for q, d in zip(opt.state[W]["basis"], shape)]
            for q, C, side in zip(Q, (G @ G.T, G.T @ G), sides):
                D = q.T @ C @ q
                assert np.allclose(q.T @ q, np.eye(len(q)), atol=1e-12)
                assert not side or np.allclose(D, np.diag(np.diag(D)), atol=1e-10 * np.abs(D).max())
        dense.step(G, Q, sides)
        assert np.allclose(W.detach().numpy().ravel(), dense.x, rtol=0, atol=1e-8), f"step {t + 1}"


@pytest.mark.parametrize("shape", [(6,), (5, 3), (2, 3, 4)])
def test_soap_in_the_identity_basis_is_adamw(shape):
    """Without a basis (1-D, 3-D, or sides above max_precond_dim) SOAP is torch.optim.AdamW, bias correction and decay too."""
    torch.manual_seed(0)
    a = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    b = nn.Parameter(a.detach().clone())
    soap = SOAP([a], lr=0.01, betas=(0.9, 0.99), weight_decay=0.2, precondition_frequency=2, max_precond_dim=2)
    adamw = torch.optim.AdamW([b], lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.2)
    for _ in range(12):
        a.grad = torch.randn(shape, dtype=torch.float64)
        b.grad = a.grad.clone()
        soap.step(), adamw.step()
    assert torch.allclose(a, b, rtol=0, atol=1e-13)


def test_eigenvectors_do_not_trust_float32(monkeypatch):
    """A float32 eigh that returns NaN without an error, as LAPACK's does on some gradients of rare tokens, spoils neither SOAP nor K-FAC."""
    eigh = torch.linalg.eigh

    def treacherous(A):
        values, vectors = eigh(A)
        return type("R", (tuple,), {"eigenvalues": property(lambda r: r[0]), "eigenvectors": property(lambda r: r[1])})(
            (values, vectors) if A.dtype == torch.float64 else (values * math.nan, vectors * math.nan))
    monkeypatch.setattr(torch.linalg, "eigh", treacherous)
    model = gpt().float()
    x, y = tokens()
    F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    SOAP(model.parameters(), lr=1e-2).step()
    kfac = KFAC(model)
    kfac.update(x, y)
    kfac.decompose()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(S.isfinite().all() for S in kfac.spectra)


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4)])
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_soap_first_step_is_the_polar_factor(shape, dtype, tol):
    """The first step is not lost: it is lr U V^T of the gradient, so lr along each singular direction and nothing else
    (in float32 too, where rounding beside the diagonal must not be enlarged to steps of its own)."""
    torch.manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    W = nn.Parameter(torch.zeros(shape, dtype=dtype))
    W.grad = (U * torch.logspace(0, -1.5, U.shape[1]) @ Vh).to(dtype)
    SOAP([W], lr=0.05).step()
    assert torch.allclose(W.detach().double(), -0.05 * U @ Vh, rtol=0, atol=0.05 * tol)


def test_kfac_baseline_equals_dense_derivation():
    """Averaged factors, eigenbases anew every 2nd step, [(L + γ/π) ⊗ (R + γπ)]⁻¹ g with dense matrices, one KL clip for all,
    momentum, decay on matrices; observe says what it cost and step without it is an error."""
    model, lr, gamma = gpt(), 0.3, 1e-3 ** 0.5
    opt = make_optimizer("kfac", model, lr=lr, momentum=0.8, weight_decay=0.1, precondition_frequency=2)
    with pytest.raises(RuntimeError, match="observe"):
        opt.step()
    reference, averages, M = KFAC(model), None, torch.zeros(396).double()
    generator = torch.Generator().manual_seed(0)
    for k in range(5):
        theta, dense = theta_of(model), Dense(model, *tokens(8, seed=k))
        reference.update(*(t[:2] for t in tokens(8, seed=k)), generator=generator)       # a quarter of the rows
        decay, new = min(1 - 1 / (k + 1), 0.95), list(reference.factors.values())
        averages = new if k == 0 else [tuple(decay * o + (1 - decay) * f for o, f in zip(*both)) for both in zip(averages, new)]
        used, n = averages if k % 2 == 0 else used, []
        for g, sides in zip(dense.g.split(dense.sizes), used):
            if len(sides) == 1:
                n.append(g / (sides[0] + gamma ** 2))
                continue
            L, R = (torch.diag(s) if s.ndim == 1 else s for s in sides)
            pi = (R.diag().mean() / L.diag().mean()).sqrt()
            n.append(torch.linalg.solve(torch.kron(L + gamma / pi * torch.eye(len(L)).double(), R + gamma * pi * torch.eye(len(R)).double()), g))
        n = torch.cat(n)
        M = 0.8 * M + n * min(1, math.sqrt(1e-2 / (lr ** 2 * n @ dense.g)))
        shrink = torch.cat([torch.full((s,), 1 - lr * 0.1 * (p.ndim > 1)) for s, p in zip(dense.sizes, model.parameters())])
        for p, g in zip(model.parameters(), dense.g.split(dense.sizes)):
            p.grad = g.view_as(p).clone()
        assert math.isclose(opt.observe(*tokens(8, seed=k)), 2 / 3 / 4)
        opt.step()
        assert torch.allclose(theta_of(model), shrink * theta - lr * M, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_step_leaves_gradients(name):
    """step() changes every parameter and not one bit of the gradients, across basis refreshes too."""
    model = gpt()
    opt = make_optimizer(name, model, precondition_frequency=2)
    for seed in range(4):
        before, step, grads = theta_of(model), opt.step, []
        opt.step = lambda: (grads.extend(p.grad.clone() for p in model.parameters()), step())
        baseline_steps(model, opt, [seed])
        opt.step = step
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads)) and len(grads) == 21
        assert all((p.flatten() != b).any() for p, b in zip(model.parameters(), before.split([p.numel() for p in model.parameters()])))


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_resumes_bit_for_bit(name):
    """7 steps, state through torch.save and torch.load(weights_only=True) into a fresh optimizer, 5 more: bitwise the 12 steps
    of an uninterrupted run, with a rate that was changed on the groups before saving."""
    def build(model):
        return make_optimizer(name, model, weight_decay=0.1, precondition_frequency=3)
    whole, resumed = gpt(), gpt(seed=1)
    opt, fresh, file = build(whole), build(resumed), io.BytesIO()
    baseline_steps(whole, opt, range(7))
    for group in opt.param_groups:
        group["lr"] *= 0.5
    torch.save({"model": whole.state_dict(), "opt": opt.state_dict()}, file)
    baseline_steps(whole, opt, range(7, 12))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    baseline_steps(resumed, fresh, [99])                                  # an optimizer already in use takes the state too
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["opt"])
    baseline_steps(resumed, fresh, range(7, 12))
    assert torch.equal(theta_of(whole), theta_of(resumed))


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_groups(name):
    """Every parameter sits in exactly one visible group at DEFAULT_LR, and lr = 0 there stops everything; at zero gradient
    matrices shrink by exactly 1 − lr wd (decoupled methods) and norms stay."""
    model = gpt()
    opt = make_optimizer(name, model)
    grouped = [p for group in opt.param_groups for p in group["params"]]
    assert isinstance(opt, torch.optim.Optimizer) and {group["lr"] for group in opt.param_groups} == {DEFAULT_LR[name]}
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(model.parameters())
    baseline_steps(model, opt, range(2))
    opt.load_state_dict(opt.state_dict())                                 # which puts new group objects in place
    before = theta_of(model)
    for group in opt.param_groups:
        group["lr"] = 0.0
    baseline_steps(model, opt, range(2, 4))
    assert torch.equal(theta_of(model), before)

    opt = make_optimizer(name, model, lr=0.1, weight_decay=0.5)
    assert all(group["weight_decay"] == 0.5 * any(p.ndim >= 2 for p in group["params"]) for group in opt.param_groups)
    if hasattr(opt, "observe"):
        opt.observe(*tokens())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    for p, b in zip(model.parameters(), before.split([p.numel() for p in model.parameters()])):
        if p.ndim < 2 or name not in ("adam", "sgd"):
            assert torch.allclose(p.flatten(), (0.95 if p.ndim >= 2 else 1) * b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("tie", [False, True])
def test_muon_takes_exactly_the_hidden_matrices(tie):
    """Muon has wq, wk, wv, wo, gate, up, down of every block; embedding, head (tied or not) and norms are AdamW's. In another
    model the last nn.Linear is the head, and what is frozen is out."""
    model = gpt(tie)
    names = {p: name for name, p in model.named_parameters()}
    want = {f"blocks.{i}.{m}.weight" for i in range(2) for m in ("attn.wq", "attn.wk", "attn.wv", "attn.wo", "mlp.gate", "mlp.up", "mlp.down")}
    groups = make_optimizer("muon", model).param_groups
    assert {names[p] for g in groups if "ns_steps" in g for p in g["params"]} == want
    assert {names[p] for g in groups if "betas" in g for p in g["params"]} == set(names.values()) - want
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    assert hidden_matrices(net) == [net[1].weight] and hidden_matrices(net[:1]) == []
    net[1].weight.requires_grad_(False)
    assert hidden_matrices(net) == []


def test_muon_parts_equal_torch_optimizers_apart():
    """The combination is bitwise torch.optim.Muon on the hidden matrices and torch.optim.AdamW on the rest, run apart."""
    joint, apart = gpt(), gpt()
    opt = make_optimizer("muon", joint, lr=0.02, weight_decay=0.1)
    muon = torch.optim.Muon([p for n, p in apart.named_parameters() if n.startswith("blocks") and p.ndim == 2], lr=0.02, weight_decay=0.1,
                            momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([dict(params=[apart.embed.weight, apart.head.weight], weight_decay=0.1),
                               dict(params=[p for p in apart.parameters() if p.ndim == 1], weight_decay=0.0)], lr=0.02, betas=(0.9, 0.95))
    for seed in range(6):
        if seed == 3:
            for group in opt.param_groups + muon.param_groups + adamw.param_groups:
                group["lr"] = 0.01
        baseline_steps(joint, opt, [seed])
        baseline_steps(apart, muon, [seed])                               # moves the hidden ones, and leaves gradients for the others
        adamw.step()
    assert torch.equal(theta_of(joint), theta_of(apart))


@pytest.mark.parametrize("name, build", [
    ("adamw", lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)),
    ("adam", lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.9, 0.999))),
    ("sgd", lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True))])
def test_baseline_is_the_torch_optimizer(name, build):
    """adamw, adam and sgd are torch.optim's with the betas and momentum their references give."""
    ours, theirs = gpt(), gpt()
    baseline_steps(ours, make_optimizer(name, ours, lr=0.02, weight_decay=0.0), range(5))
    baseline_steps(theirs, build(list(theirs.parameters())), range(5))
    assert torch.allclose(theta_of(ours), theta_of(theirs), rtol=0, atol=1e-14)


def test_optimizer_closure_and_missing_gradients():
    """step(closure) returns the loss and differentiates inside; parameters without a gradient are left alone."""
    for name in ("soap", "muon"):
        model = gpt()
        opt = make_optimizer(name, model)
        norm, head = model.norm.weight.detach().clone(), model.head.weight.detach().clone()

        def closure():
            opt.zero_grad()
            loss = model(torch.arange(7)[None]).logsumexp(-1).mean()
            loss.backward()
            model.norm.weight.grad = None
            return loss
        assert opt.step(closure).item() > 0
        assert torch.equal(model.norm.weight, norm) and not torch.equal(model.head.weight, head)


def test_lr_schedule_values():
    """Factors at chosen steps: no zero step in warmup, plateaus of 1, both decays at their halves and ends."""
    assert [lr_schedule(k, 100, "constant", warmup_steps=4) for k in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    cosine = [lr_schedule(k, 110, "cosine", warmup_steps=10, min_ratio=0.1) for k in (0, 9, 10, 35, 60, 110, 500)]
    assert np.allclose(cosine, [0.1, 1, 1, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 0.55, 0.1, 0.1])
    wsd = [lr_schedule(k, 100, "wsd", warmup_steps=10, decay_frac=0.2) for k in (0, 9, 50, 80, 90, 99, 100, 200)]
    assert np.allclose(wsd, [0.1, 1, 1, 1, 0.5, 0.05, 0, 0])
    assert np.isclose(lr_schedule(95, 100, "wsd", decay_frac=0.1, min_ratio=0.5), 0.75)
    for schedule in ("constant", "cosine", "wsd"):
        assert all(0 < lr_schedule(k, 20, schedule, warmup_steps=3) <= 1 for k in range(20)) and lr_schedule(0, 1, schedule) == 1


def test_baselines_refuse_nonsense():
    """Unknown names say what there is to choose; impossible settings raise."""
    for call, told in ((lambda: make_optimizer("adamx", gpt()), "adamw, adam, sgd, muon, soap"), (lambda: lr_schedule(0, 10, "linear"), "wsd")):
        with pytest.raises(ValueError, match=told):
            call()
    for bad in (dict(step=-1), dict(total_steps=0), dict(warmup_steps=-1), dict(decay_frac=1.5), dict(min_ratio=-0.1)):
        with pytest.raises(ValueError):
            lr_schedule(**{"step": 0, "total_steps": 10, "schedule": "wsd", **bad})
    for bad in (dict(lr=-1.0), dict(betas=(1.0, 0.9)), dict(shampoo_beta=1), dict(eps=-1.0), dict(weight_decay=-1.0), dict(precondition_frequency=0)):
        with pytest.raises(ValueError):
            SOAP([nn.Parameter(torch.zeros(2, 2))], **bad)


# ---- what torch promises of an optimizer ----

"""Every name in BASELINES keeps what torch.optim promises:

    add_param_group   its parameters are trained from the next step on; or it raises, and changes nothing
    copies            deepcopy and pickle, together with the model, go on as the original does, bit for bit
    state_dict        through a file, weights only, into a fresh optimizer of a fresh model: bit for bit too
    autocast          step() inside it has the bits of step() outside
    dtypes            what the algebra cannot do is refused before the first step, with the remedy
    lr_scheduler      all of them; the lr and the momentum that a group shows are what the next step uses
    step, zero_grad   closures keep their autocast, hooks are called, what has no gradient is left alone
"""

FROZEN = "blocks.1"


def optimizer_of(name, model):
    """An optimizer to which the second block's parameters are added; then it is the whole model's."""
    frozen = [p for n, p in model.named_parameters() if n.startswith(FROZEN)]
    for p in frozen:
        p.requires_grad_(False)
    opt = make_optimizer(name, model, precondition_frequency=3)
    baseline_steps(model, opt, [0])
    for p in frozen:
        p.requires_grad_(True)
    opt.add_param_group(dict(params=frozen, weight_decay=0.25))
    return opt


@pytest.mark.parametrize("name", BASELINES)
def test_optimizer_trains_an_added_group(name):
    """All of it moves in the next step, at its own rate and decay, which is not a step at which eigenbases
    are due."""
    model = gpt()
    opt, frozen = optimizer_of(name, model), [p for n, p in model.named_parameters() if n.startswith(FROZEN)]
    before = [p.detach().clone() for p in frozen]
    baseline_steps(model, opt, [1])
    assert all((p != b).all() for p, b in zip(frozen, before))
    assert opt.param_groups[-1]["weight_decay"] == 0.25 and opt.param_groups[-1]["lr"] == DEFAULT_LR[name]
    groups, before = len(opt.param_groups), theta_of(model)
    with pytest.raises(ValueError):                     # it has them already
        opt.add_param_group(dict(params=frozen))
    opt.param_groups[-1]["lr"] = 0.0
    baseline_steps(model, opt, [2])
    moved = [torch.any(p.flatten() != b).item()
             for p, b in zip(model.parameters(), before.split([p.numel() for p in model.parameters()]))]
    assert moved == [not n.startswith(FROZEN) for n, _ in model.named_parameters()]
    assert len(opt.param_groups) == groups


def through_a_file(triple):
    (model, opt, name), file = triple, io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
    file.seek(0)
    saved, model = torch.load(file, weights_only=True), gpt(seed=1)
    opt = optimizer_of(name, model)
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["opt"])
    return model, opt


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda triple: pickle.loads(pickle.dumps(triple)),
                                    through_a_file], ids=["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("name", BASELINES)
def test_optimizer_copies_go_on_bit_for_bit(name, copied):
    """Copied before and after an added group was used, under a scheduler: the original's next steps and the
    copy's have the same bits, and neither moves the other."""
    model = gpt()
    opt = optimizer_of(name, model)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5)
    for seed in (1, 5):
        twin, again, *_ = copied((model, opt, name))
        start = theta_of(model)
        baseline_steps(model, opt, range(seed, seed + 4))
        assert torch.equal(theta_of(twin), start)
        baseline_steps(twin, again, range(seed, seed + 4))
        assert torch.equal(theta_of(twin), theta_of(model)) and not torch.equal(theta_of(twin), start)
        assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in opt.param_groups]


class Unmoved(nn.Module):
    """A model that computes the same inside autocast and outside, and says where it was called."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, idx):
        self.seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        with torch.autocast("cpu", enabled=False):
            return self.model(idx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BASELINES)
def test_optimizer_steps_inside_autocast(name, dtype):
    """With float32 parameters and the same gradients, step() and K-FAC's observe have the bits that they have
    outside; the model is called under the caller's autocast, in observe and in a closure, and it is on
    afterwards."""
    ends = []
    for enabled in (False, True):
        model = Unmoved(gpt().float())
        opt = make_optimizer(name, model, precondition_frequency=2)

        def closure():
            opt.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            with torch.autocast("cpu", enabled=False):
                loss.backward()
            return loss
        for seed in range(4):
            x, y = tokens(seed=seed)
            with torch.autocast("cpu", dtype, enabled):
                if hasattr(opt, "observe"):
                    opt.observe(x, y)
                opt.step(closure)
                assert torch.is_autocast_enabled("cpu") == enabled and not model._forward_hooks
        assert set(model.seen) == {enabled and dtype}
        ends.append(theta_of(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BASELINES)
def test_optimizer_refuses_or_trains_short_dtypes(name, dtype):
    """SOAP and K-FAC at construction, whatever group it is in, and in add_param_group, which leaves the
    groups as they were; the others train in bfloat16. K-FAC refuses two dtypes, and parameters that are not
    its model's."""
    def refused(function, told):
        with pytest.raises(ValueError, match=told):
            function()
    if name not in ("soap", "kfac"):
        model = gpt().bfloat16()
        before = theta_of(model)
        baseline_steps(model, make_optimizer(name, model), range(3))
        assert not torch.equal(theta_of(model), before) and theta_of(model).isfinite().all()
        return
    model = gpt()
    opt = make_optimizer(name, model)
    groups = len(opt.param_groups)
    short = nn.Parameter(torch.zeros(3, 2, dtype=dtype))
    refused(lambda: opt.add_param_group(dict(params=[short])), f"{dtype}.*autocast")
    if name == "kfac":
        refused(lambda: opt.add_param_group(dict(params=nn.Parameter(torch.zeros(3).double()))), "its model")
        model.head.float()
        refused(lambda: make_optimizer(name, model), "one dtype")
    assert len(opt.param_groups) == groups
    model.norm.to(dtype)
    refused(lambda: make_optimizer(name, model), f"{dtype}.*autocast")


SCHEDULERS = {
    "LambdaLR": lambda opt, s: s.LambdaLR(opt, lambda step: 0.5 ** step),
    "CosineAnnealingLR": lambda opt, s: s.CosineAnnealingLR(opt, 5),
    "SequentialLR": lambda opt, s: s.SequentialLR(opt, [s.LinearLR(opt), s.ExponentialLR(opt, 0.9)], [2]),
    "ReduceLROnPlateau": lambda opt, s: s.ReduceLROnPlateau(opt, patience=0),
    "CyclicLR": lambda opt, s: s.CyclicLR(opt, 1e-3, 1e-2, 2, cycle_momentum=False),
    "CyclicLR, momentum": lambda opt, s: s.CyclicLR(opt, 1e-3, 1e-2, 2),
    "OneCycleLR": lambda opt, s: s.OneCycleLR(opt, 1e-2, total_steps=6, cycle_momentum=False),
    "OneCycleLR, momentum": lambda opt, s: s.OneCycleLR(opt, 1e-2, total_steps=6),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", BASELINES)
def test_optimizer_takes_every_scheduler(name, scheduler):
    """The same steps as with the rates (and momenta, where it cycles them) that its groups show set by
    hand."""
    scheduled, by_hand = gpt(), gpt()
    opt, other = make_optimizer(name, scheduled), make_optimizer(name, by_hand)
    schedule, shown = SCHEDULERS[scheduler](opt, torch.optim.lr_scheduler), []
    for seed in range(5):
        for group, source in zip(other.param_groups, opt.param_groups):
            group.update({key: source[key] for key in ("lr", "momentum", "betas") if key in source})
        shown.append([(group["lr"], group.get("momentum", group.get("betas"))) for group in opt.param_groups])
        baseline_steps(scheduled, opt, [seed])
        baseline_steps(by_hand, other, [seed])
        schedule.step(*[1.0] * (scheduler == "ReduceLROnPlateau"))
        assert torch.equal(theta_of(scheduled), theta_of(by_hand))
    for group in zip(*shown):
        assert len({lr for lr, _ in group}) > 1
        assert (len({momentum for _, momentum in group}) > 1) == ("momentum" in scheduler)


@pytest.mark.parametrize("name", BASELINES)
def test_optimizer_uses_the_rate_of_each_group(name):
    """At rate 0 a group stays, and the others move."""
    model = gpt()
    opt = make_optimizer(name, model, weight_decay=0.0)
    for still in range(len(opt.param_groups)):
        before = {p: p.detach().clone() for p in model.parameters()}
        for i, group in enumerate(opt.param_groups):
            group["lr"] = 0.0 if i == still else 1e-2
        baseline_steps(model, opt, [still])
        for i, group in enumerate(opt.param_groups):
            assert all(torch.equal(p, before[p]) == (i == still) for p in group["params"])


def test_kfac_baseline_clips_by_each_groups_own_rate():
    """The clip makes lr^2 n^T F n, summed over the groups, kl_clip, whichever of them has the larger rate:
    n^T F n is n^T g of the step without it, and the clip's factor squared beside."""
    def squared_length(rates, kl_clip):
        model = gpt()
        opt = make_optimizer("kfac", model, weight_decay=0.0)
        opt.kl_clip, before = kl_clip, [p.detach().clone() for p in model.parameters()]
        for group, lr in zip(opt.param_groups, rates):
            group["lr"] = lr
        rate = {p: group["lr"] for group in opt.param_groups for p in group["params"]}
        baseline_steps(model, opt, [0])
        return sum(rate[p] * ((b - p) * p.grad).sum().item() for p, b in zip(model.parameters(), before))
    for rates in ((0.0, 3.0), (3.0, 0.1)):
        whole = squared_length(rates, math.inf)
        factor = squared_length(rates, 1e-2) / whole
        assert factor < 0.5 and math.isclose(factor ** 2 * whole, 1e-2, rel_tol=1e-6)


def test_muon_momentum_is_the_beta1_of_its_adamw():
    """As a scheduler would set it, in an added group too; there it is first what its betas say."""
    ours, theirs = gpt(), gpt()
    opt = make_optimizer("muon", ours, lr=0.02)
    rest = [p for group in opt.param_groups[1:] for p in group["params"]]
    names = {id(p): n for n, p in ours.named_parameters()}
    same = [dict(theirs.named_parameters())[names[id(p)]] for p in rest]
    adamw = torch.optim.AdamW(same, lr=0.02, betas=(0.6, 0.95))
    for group in opt.param_groups[1:]:
        group.update(momentum=0.6, weight_decay=1e-2)
    for seed in range(3):
        baseline_steps(ours, opt, [seed])
        for p, like in zip(theirs.parameters(), ours.parameters()):
            p.grad = like.grad.clone()
        adamw.step()
    assert all(map(torch.equal, rest, same))
    opt.add_param_group(dict(params=nn.Parameter(torch.zeros(2)), betas=(0.3, 0.9)))
    assert opt.param_groups[-1]["momentum"] == 0.3 and opt.param_groups[-1]["eps"] == 1e-8


@pytest.mark.parametrize("name", BASELINES)
def test_optimizer_closure_hooks_and_missing_gradients(name):
    """step(closure) returns its loss, with hooks called once each, before and after; what has no gradient
    keeps its bits, though it had one before, momentum and decay included; zero_grad sets all to None."""
    model, calls = gpt(), []
    opt = make_optimizer(name, model, weight_decay=0.1)
    baseline_steps(model, opt, range(2))
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if hasattr(opt, "observe"):
        opt.observe(*tokens())

    def closure():
        calls.append("loss")
        opt.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        loss = F.cross_entropy(model(tokens()[0]).flatten(0, 1), tokens()[1].flatten())
        loss.backward()
        for n, p in model.named_parameters():
            if n.startswith(FROZEN):
                p.grad = None
        return loss
    assert opt.step(closure).item() > 0 and calls == ["before", "loss", "after"]
    assert all(torch.equal(p, before[n]) == n.startswith(FROZEN) for n, p in model.named_parameters())


# ---- trainer ----

SMALL = "--n_layer 1 --n_embd 32 --block_size 32 --batch_tokens 2048 --eval_tokens 2048 --cg_iters 5"
CLOCKS = ("seconds", "step_seconds", "peak_memory_mb", "pieces_kept")


@pytest.fixture
def go(tmp_path, monkeypatch, data_dir):
    """go("--flags as typed") -> exit status, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    base = f"--data_dir {data_dir} --threads 1 --sample 0"
    return lambda flags: train.main((base + " " + flags).split())


def log_of(out):
    """The configuration line, and the rows without what a clock or a memory meter says."""
    head, *rows = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return head, [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


def checkpoint_of(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def same_state(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same_state, a, b)) if isinstance(a, (list, tuple)) else a == b


@pytest.mark.parametrize("flags", [f"--opt {o}" for o in BASELINES] + [
    "--opt full_gn", "--opt layerwise_gn", "--opt full_gn --solver muon --inner_tokens 512", "--opt layerwise_gn --local_model prox_linear "
    "--newton_steps 2", "--opt full_gn --curvature_data fresh --curvature_frac 0.5 --line_search_data fresh --geodesic",
    "--opt full_gn --power 0.5", "--opt full_gn --dtype bf16", "--opt full_gn --solver muon --inner_tokens 512 --dtype bf16", "--opt soap --dtype bf16", "--opt adam --dtype tf32", "--opt muon --line_search armijo --line_search_data fresh --schedule wsd --warmup_steps 2"])
def test_every_optimizer_learns(go, flags, capsys):
    """Three steps: validation loss finite and lower at each; the log has what it promises; the output tells step and loss."""
    assert go(f"{flags} --steps 3 --eval_interval 1 --out_dir run --sample 20" + (" --batch_tokens 4096 --eval_tokens 4096 --cg_iters 6" if "--opt full_gn" == flags else " " + SMALL)) == 0
    head, rows = log_of("run")
    raw = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()][1:]
    losses = [row["val_loss"] for row in rows]
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(b < a for a, b in zip(losses, losses[1:]))
    assert {"config", "parameters", "torch", "python", "device", "threads", "model", "data", "command"} <= head.keys()
    assert head["config"]["steps"] == 3 and head["parameters"] == (164_160 if "--opt full_gn" == flags else 32_864)
    n = head["config"]["batch_tokens"]
    for i, row in enumerate(raw):
        assert {"step", "tokens", "distinct_tokens", "train_loss", "val_loss", "seconds", "grad_equivalents"} <= row.keys()
        assert row["tokens"] == i * n and (row["distinct_tokens"] > i * n) == ("fresh" in flags and i > 0)
        assert i == 0 or (row["accepted"] and row["seconds"] > raw[i - 1]["seconds"] and row["peak_memory_mb"] > 0)
        assert row["grad_equivalents"] == i if flags in [f"--opt {o}" for o in BASELINES if o != "kfac"] else row["grad_equivalents"] >= i
    assert checkpoint_of("run")["progress"]["step"] == 3
    out = capsys.readouterr().out
    assert "step 3/3 | loss" in out and f"val {losses[-1]:.3f}" in out and "20 tokens from the model:\n" in out


@pytest.mark.parametrize("precond", ["kfac", "none"])
@pytest.mark.parametrize("local_model", ["gn", "prox_linear"])
@pytest.mark.parametrize("solver", ["cg", "muon", "adamw"])
@pytest.mark.parametrize("opt", ["full_gn", "layerwise_gn"])
def test_every_combination_runs(go, opt, solver, local_model, precond):
    """opt x solver x local_model x precond: three steps are taken and lower the loss."""
    assert go(f"{SMALL} --opt {opt} --solver {solver} --local_model {local_model} --precond {precond} --inner_tokens 256 --newton_steps 2 --steps 3 --out_dir run") == 0
    losses = [row["val_loss"] for row in log_of("run")[1]]
    assert len(losses) == 4 and losses[3] < losses[0] - 0.2


@pytest.mark.parametrize("opt", ["full_gn", "layerwise_gn"])
@pytest.mark.parametrize("flag", ["--precond kfac", "--solver muon", "--solver adamw", "--local_model prox_linear", "--damping_metric kfac", "--geodesic"])
def test_lanczos_refuses_what_it_cannot_use(go, opt, flag, capsys):
    assert go(f"{SMALL} --opt {opt} --power 0.5 {flag} --out_dir run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Lanczos makes a function of G + λI alone" in error and not Path("run").exists()


@pytest.mark.parametrize("flags", ["--opt full_gn", "--opt layerwise_gn --solver muon --inner_tokens 512", "--opt soap --eval_interval 1",
                                   "--opt adamw --eval_interval 1 --line_search armijo", "--opt kfac --line_search grid --line_search_data fresh --eval_interval 1"])
def test_a_row_says_what_the_step_did(go, flags, capsys, monkeypatch):
    """For every method: losses before and after the step on its batch and on fresh tokens, what the method's model promised, their ratio,
    the step's length in each layer, and the angle to the gradient, recomputed from the weights before and after; the line says them too."""
    thetas, batches, evaluate = [], [], train.batch_loss
    step_of = {}
    for cls in (train.FirstOrder, train.GaussNewton):
        def step(self, idx, targets, search=None, original=cls.step, **extra):
            thetas.append(theta_of(self.model))
            batches.append((idx, targets, search))
            record = original(self, idx, targets, search=search, **extra)
            step_of.update(model=self.model, after=theta_of(self.model))
            return record
        monkeypatch.setattr(cls, "step", step)
    assert go(f"{SMALL} {flags} --steps 2 --out_dir run") == 0
    rows = log_of("run")[1]
    assert all(train.STEP_FIELDS.keys() <= row.keys() for row in rows[1:])
    model, row, before = step_of["model"], rows[2], thetas[1]
    moved, sizes = step_of["after"] - before, [p.numel() for p in model.parameters()]
    idx, targets, search = batches[1]
    share = slice(-4 if "muon" in flags else None, None)         # the rows that are searched on: a sixteenth with an inner solver
    grad = gn.batch_grad(with_theta(model, before), idx, targets)[1]
    loss_before = evaluate(model, idx[share], targets[share])
    if "muon" in flags:                                          # g is known from the last micro-batch
        grad = gn.batch_grad(model, idx[-16:], targets[-16:])[1]
    fresh = evaluate(model, *search) if search else None
    after = evaluate(with_theta(model, step_of["after"]), idx[share], targets[share])
    fresh = evaluate(model, *search) - fresh if search else row["val_loss"] - rows[1]["val_loss"]
    assert math.isclose(row["actual"], after - loss_before, abs_tol=2e-5) and math.isclose(row["actual_fresh"], fresh, abs_tol=2e-5)
    assert math.isclose(row["rho"], row["actual"] / row["predicted"], rel_tol=1e-5) and row["predicted"] < 0
    if "_gn" not in flags:
        assert math.isclose(row["predicted"], (grad @ moved).item(), rel_tol=1e-3)
    assert math.isclose(row["step_norm"], moved.norm().item(), rel_tol=1e-4)
    assert math.isclose(row["cosine"], -(grad @ moved / grad.norm() / moved.norm()).item(), rel_tol=1e-3, abs_tol=1e-4)
    index, pieces = {id(p): i for i, p in enumerate(model.parameters())}, moved.split(sizes)
    norms = [torch.cat([pieces[index[id(p)]] for p in layer]).norm().item() for layer in model.layers()]
    assert np.allclose(row["layer_norms"], norms, rtol=1e-4) and len(norms) == 3
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 2/2")][0]
    assert f"fell {row['actual']:+.3f}, fresh {row['actual_fresh']:+.3f}, model {row['predicted']:+.3f} |" in line
    assert f"rho {row['rho']:.2f} | alpha {row['alpha']:.2f} | cos {row['cosine']:.2f} | |d| " + " ".join(f"{t:.2g}" for t in norms) in line
    assert f"work {row['grad_equivalents']:.4g}" in line and ("products" in line) == ("--opt full_gn" == flags)


@pytest.mark.parametrize("flags", ["--opt full_gn", "--opt layerwise_gn --precond_interval 2 --curvature_data fresh --tie_weights",
                                   "--opt full_gn --solver muon --inner_tokens 512 --inner_schedule constant", "--opt soap --precondition_frequency 2",
                                   "--opt muon --line_search grid", "--opt kfac --precondition_frequency 2", "--opt adamw --ema 0.9"])
def test_resume_equals_the_uninterrupted_run(go, flags, monkeypatch):
    """2 steps, then --resume to 5; and a run that dies in step 4 with a checkpoint at 2, then --resume: the same rows, weights,
    average and optimizer state as 5 steps in one go, bit for bit."""
    flags = f"{flags} {SMALL} --eval_interval 1"
    assert go(f"{flags} --steps 5 --out_dir whole") == 0 and go(f"{flags} --steps 2 --out_dir parts") == 0
    assert go("--resume --steps 5 --out_dir parts") == 0
    step_line = train.step_line

    def die(row, *args):
        if row["step"] == 4:
            raise RuntimeError("power cut")
        return step_line(row, *args)
    with monkeypatch.context() as m, pytest.raises(RuntimeError):
        m.setattr(train, "step_line", die)
        go(f"{flags} --steps 5 --checkpoint_interval 2 --out_dir died")
    if "adamw" in flags:                                # killed between a step's row and its checkpoint
        with open("died/log.jsonl", "a") as f:
            f.write('{"step": 4, "half a li')
    assert go("--resume --out_dir died") == 0
    whole, (_, rows) = checkpoint_of("whole"), log_of("whole")
    assert [row["step"] for row in rows] == list(range(6)) and (whole["ema"] is None) == ("ema" not in flags)
    for out in ("parts", "died"):
        assert log_of(out)[1] == rows
        assert all(same_state(checkpoint_of(out)[k], whole[k]) for k in ("model", "ema", "optimizer"))


@pytest.mark.parametrize("damage", ["gone", "empty", "cut in a row", "cut in the first line", "a row less",
                                    "zeros"])
def test_resume_goes_on_with_what_is_whole_of_the_log(damage, go, capsys):
    """One line says so; the whole rows before, those of the steps after, and no others, with a first line in
    any case; --resume again, from the checkpoint before it too, repeats no row; the weights are the
    uninterrupted run's."""
    flags = f"--opt adamw --eval_interval 1 --checkpoint_interval 1 {SMALL}"
    assert go(f"{flags} --steps 2 --out_dir run") == 0 and go(f"{flags} --steps 4 --out_dir whole") == 0
    (head, rows), log = log_of("whole"), Path("run/log.jsonl")
    lines = log.read_bytes().splitlines(keepends=True)
    left, kept = {"gone": (None, 0), "empty": (b"", 0), "cut in the first line": (lines[0][:-9], 0),
                  "cut in a row": (b"".join(lines)[:-20], 2), "a row less": (b"".join(lines[:-1]), 2),
                  "zeros": (b"".join(lines[:-1]) + bytes(300), 2)}[damage]
    log.unlink() if left is None else log.write_bytes(left)
    capsys.readouterr()
    assert go("--resume --steps 3 --out_dir run") == 0
    assert capsys.readouterr().out.count("note: run/log.jsonl lacks rows") == 1
    shutil.copyfile("run/checkpoint.previous.pt", "run/checkpoint.pt")
    for steps in (3, 4):
        assert go(f"--resume --steps {steps} --out_dir run") == 0
        assert ("note: " in capsys.readouterr().out) == (steps == 3 and kept < 3)
        again, found = log_of("run")
        assert found == [*rows[:kept], *rows[3:steps + 1]] and again["model"] == head["model"]
    assert same_state(checkpoint_of("run")["model"], checkpoint_of("whole")["model"])
    assert b"\0" not in log.read_bytes() and train.main(["--compare", "run"]) == 0


def test_resume_of_a_run_without_a_step(go):
    """Interrupted before its first step, with factors that are only made every third one: as if it had not been."""
    flags = f"--opt full_gn --precond_interval 3 {SMALL} --steps 1 --eval_interval 1"
    assert go(f"{flags} --target_loss 99 --out_dir a") == 0 and len(log_of("a")[1]) == 1        # reached before any step
    assert go("--resume --target_loss 0.1 --out_dir a") == 0 and go(f"{flags} --out_dir b") == 0
    assert log_of("a")[1] == log_of("b")[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_with_a_checkpoint(number, tmp_path, data_dir, stdlib, go):
    """Ctrl-C or SIGTERM to the program: it ends its step, saves, says how to go on and exits with 0; --resume goes on."""
    flags = f"--opt adamw --steps 100000 --data_dir {data_dir} --threads 1 {SMALL} --out_dir run"
    process = subprocess.Popen([sys.executable, HERE / "train.py", *flags.split()], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 2/"):
            process.send_signal(number)
    assert process.wait(30) == 0 and "stopping after this step" in "".join(lines) and "train.py --resume --out_dir run" in lines[-1]
    step = checkpoint_of("run")["progress"]["step"]
    assert step >= 2 and len(log_of("run")[1]) == step + 1
    assert go(f"--resume --out_dir run --steps {step + 1}") == 0 and len(log_of("run")[1]) == step + 2


def test_second_signal_interrupts_at_once(go, monkeypatch, capsys):
    """Twice Ctrl-C inside one step: status 130, the last checkpoint is whole, earlier handlers are back, and it can go on."""
    step, before = train.FirstOrder.step, signal.getsignal(signal.SIGINT)

    def struck(self, *batch):
        if self.steps == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, *batch)
    with monkeypatch.context() as m:
        m.setattr(train.FirstOrder, "step", struck)
        assert go(f"--opt sgd --steps 4 --checkpoint_interval 1 --out_dir run {SMALL}") == 130
    assert "last checkpoint is whole" in capsys.readouterr().err and signal.getsignal(signal.SIGINT) is before
    assert checkpoint_of("run")["progress"]["step"] == 2 and go("--resume --out_dir run") == 0 and log_of("run")[1][-1]["step"] == 4


def test_target_loss_stops_the_run(go, capsys):
    """At the first evaluation at or below it, with a checkpoint; where it is not reached the last line says so."""
    flags = f"--opt adamw --steps 4 --eval_interval 1 {SMALL}"
    go(f"{flags} --out_dir a")
    target = log_of("a")[1][2]["val_loss"]
    assert go(f"{flags} --out_dir b --target_loss {target!r}") == 0
    assert log_of("b")[1] == log_of("a")[1][:3] and checkpoint_of("b")["progress"]["step"] == 2
    assert f"target {target:g} reached" in capsys.readouterr().out
    assert go(f"{flags} --out_dir c --target_loss 0.5") == 0 and "target 0.5 not reached" in capsys.readouterr().out


def test_init_from_and_out_dir(go, capsys, monkeypatch):
    """--init_from starts from the weights of a run, by folder or file, and refuses another model's; a run in use is refused,
    --overwrite replaces it; without --out_dir two runs in one second have fresh folders under out/."""
    go(f"--opt adamw --steps 3 --out_dir a {SMALL}")
    last = log_of("a")[1][-1]["val_loss"]
    for source in ("a", "a/checkpoint.pt"):
        assert go(f"--opt full_gn --steps 1 --init_from {source} --out_dir b --overwrite {SMALL}") == 0
        head, rows = log_of("b")
        assert rows[0]["val_loss"] == last > rows[1]["val_loss"] and head["config"]["init_from"] == source
    kept = Path("a/log.jsonl").read_bytes()
    capsys.readouterr()
    for flags, told in ((f"--init_from a --out_dir c {SMALL} --n_embd 64", "n_embd 32 there and 64 here"),
                        (f"--out_dir a {SMALL}", "--resume to go on with its run or --overwrite")):
        assert go(flags) == 2 and told in capsys.readouterr().err
    assert Path("a/log.jsonl").read_bytes() == kept and not Path("c").exists()
    monkeypatch.setattr(time, "strftime", lambda *a: "0102-030405")
    for _ in range(2):
        assert go(f"--opt sgd --steps 1 {SMALL}") == 0
    assert sorted(os.listdir("out")) == ["sgd-tiny-0102-030405", "sgd-tiny-0102-030405-2"]


def test_damaged_or_differing_checkpoints_are_refused(go, capsys):
    """--resume with another setting, without a folder or a checkpoint, or with a damaged one, and --init_from likewise:
    status 2, one line, and the run's files as they were."""
    go(f"--opt adamw --steps 2 --out_dir a {SMALL}")
    whole, log = Path("a/checkpoint.pt").read_bytes(), Path("a/log.jsonl").read_bytes()
    capsys.readouterr()

    def refused(flags, told):
        assert go(flags) == 2
        err = capsys.readouterr().err
        assert err.startswith("train.py: error: ") and err.count("\n") == 1 and told in err, err
        assert Path("a/log.jsonl").read_bytes() == log
    refused(f"--resume --out_dir a {SMALL} --lr 0.5", "--lr 0.5 differs from the stored run's None")
    refused("--resume", "--out_dir")
    for folder in ("b", "."):
        refused(f"--resume --out_dir {folder}", "no checkpoint")
    torch.save({"config": 1}, "other.pt")
    for raw in (b"", whole[:1000], whole[:-100], b"x" * 1000, Path("other.pt").read_bytes()):
        Path("a/checkpoint.pt").write_bytes(raw)
        refused("--resume --out_dir a", "damaged")
        refused(f"--init_from a --out_dir c {SMALL}", "damaged")
    # One bit of the weights, a version to come, another model; the checkpoint before is offered, and goes on to the same end.
    Path("a/checkpoint.pt").write_bytes(whole)
    storage = max(zipfile.ZipFile("a/checkpoint.pt").infolist(), key=lambda record: record.file_size)
    flipped = bytearray(whole)
    flipped[storage.header_offset + 200 + storage.file_size // 2] ^= 1
    torch.save({**torch.load(io.BytesIO(whole), weights_only=True), "format": 99}, "newer.pt")
    for raw, told in ((bytes(flipped), "damaged"), (Path("newer.pt").read_bytes(), "has format 99")):
        Path("a/checkpoint.pt").write_bytes(raw)
        refused("--resume --out_dir a", told)
        refused("--resume --out_dir a", "the one before it, of step 0, is whole: copy a/checkpoint.previous.pt over it")
    assert go(f"--init_from a/checkpoint.previous.pt --opt sgd --steps 1 --out_dir d {SMALL} --n_layer 2") == 2 and "another one: n_layer 1 there and 2 here" in capsys.readouterr().err
    shutil.copyfile("a/checkpoint.previous.pt", "a/checkpoint.pt")
    assert go("--resume --out_dir a") == 0 and Path("a/log.jsonl").read_bytes() != log and same_state(
        checkpoint_of("a")["model"], torch.load(io.BytesIO(whole), weights_only=True)["model"])
    assert go("--resume --out_dir a --steps 3") == 0 and not Path("c").exists()


def test_a_baseline_takes_any_block_size(go):
    """--inner_tokens, which no baseline uses, need not fit its blocks; for a streaming solver they must."""
    assert go(f"--opt sgd --steps 1 --out_dir a {SMALL} --block_size 33 --batch_tokens 1056") == 0
    assert go(f"--opt full_gn --solver soap --steps 1 --out_dir b {SMALL} --block_size 33 --batch_tokens 1056") == 2


def bad_gradient(value):
    def apply(m):
        init, plain, expand = GGN.__init__, gn.batch_grad, gn.expand_once

        def spoil(grad):
            grad = grad.clone()
            grad.view(-1)[5] = value
            return grad

        def ggn(self, *args, **kwargs):
            init(self, *args, **kwargs)
            self.grad = spoil(self.grad)
        m.setattr(GGN, "__init__", ggn)
        m.setattr(gn, "expand_once", lambda *a, **k: [*(out := expand(*a, **k))[:2], spoil(out[2]), *out[3:]])
        for module in (gn, train):
            m.setattr(module, "batch_grad", lambda *a, **k: ((out := plain(*a, **k))[0], spoil(out[1])))
    return apply


def failing_eigh(m):
    def eigh(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")
    m.setattr(torch.linalg, "eigh", eigh)


def huge_logit(m):
    forward = GPT._forward
    m.setattr(GPT, "_forward", lambda self, idx: forward(self, idx) + 1e30 * F.one_hot(torch.tensor(3), self.config.vocab_size))


def everywhere(name, value):
    return lambda m: [m.setattr(module, name, value) for module in (gn, train)]


FAULTS = {  # name: (what it does to the second step, whether that step is rejected; None: either)
    "a NaN in the gradient": (bad_gradient(math.nan), True), "an infinite gradient": (bad_gradient(math.inf), True),
    "NaN products": (lambda m: m.setattr(GGN, "matvec", lambda self, v, part=None: math.nan * v), True),
    "an indefinite product": (lambda m: m.setattr(GGN, "matvec", lambda self, v, part=None: -v), True),
    "NaN in the K-FAC factors": (lambda m: m.setattr(KFAC, "_gram", lambda self, a: math.nan * (a.T @ a)), False),
    "an eigendecomposition that fails": (failing_eigh, False),
    "NaN candidates": (everywhere("batch_loss", lambda *a, **k: math.nan), True), "a flat loss": (everywhere("batch_loss", lambda *a, **k: 7.0), True),
    "a batch of one token": (lambda m: m.setattr(train, "get_batch", lambda tokens, block, rows, *a, **k: torch.full((2, rows, block), 32)), None),
    "a logit of 1e30": (huge_logit, None),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("flags", ["--opt full_gn --cg_iters 3", "--opt layerwise_gn --cg_iters 3", "--opt full_gn --inner_tokens 256", "--opt soap --line_search armijo",
                                   "--opt kfac --line_search armijo"])
def test_numbers_gone_wrong(fault, flags, go, monkeypatch):
    """The second of four steps meets it: it is rejected with a reason, bitwise where it was, or repaired with a note, or it was no trouble; the others are
    accepted, and no loss, weight or row of the log is ever NaN without a word."""
    apply, rejected = FAULTS[fault]
    by_cg, touched = "cg_iters" in flags, {"NaN products": "cg_iters", "an indefinite product": "cg_iters", "NaN in the K-FAC factors": "kfac", "an eigendecomposition that fails": "kfac"}
    if touched.get(fault, "") not in flags and not (touched.get(fault) == "kfac" and by_cg):
        pytest.skip("it has none")
    stepper = train.FirstOrder if "soap" in flags or "kfac" in flags else GaussNewton
    original, seen = stepper.step, []

    def step(self, *args, **kwargs):
        seen.append([p.detach().clone() for p in self.params])
        with monkeypatch.context() as m:
            if len(seen) == 2:
                apply(m)
                if fault == "a batch of one token":
                    args = tuple(t.to(self.params[0].device) for t in train.get_batch(None, args[0].shape[1], len(args[0])))
            return original(self, *args, **kwargs)
    monkeypatch.setattr(stepper, "step", step)
    assert go(f"{SMALL.replace('--cg_iters 5', '')} {flags} --precondition_frequency 1 --steps 4 --eval_interval 1 --out_dir run") == 0
    _, (_, first, second, third, fourth) = log_of("run")
    if rejected is not None:
        assert second["accepted"] != rejected
    if not second["accepted"]:
        assert second["reason"] and all(torch.equal(a, b) for a, b in zip(seen[1], seen[2]))
    if rejected is False:
        assert "K-FAC" in second["repaired"]
    assert first["accepted"] and third["accepted"] and fourth["accepted"] and not (first["repaired"] or third["repaired"])
    assert all(math.isfinite(r["val_loss"]) for r in (first, second, third, fourth)) and fourth["val_loss"] < first["val_loss"]
    assert all(t.isfinite().all() for t in checkpoint_of("run")["model"].values())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_taken_back(wrong, go, monkeypatch):
    """SGD without a line search, its second step not finite in one weight: rejected, the weights bitwise as before it,
    the third accepted."""
    original, seen = torch.optim.SGD.step, []

    def step(self, closure=None):
        weight = self.param_groups[0]["params"][0]
        seen.append(weight.detach().clone())
        original(self)
        if len(seen) == 2:
            weight.data.view(-1)[0] = wrong
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert go(f"{SMALL} --opt sgd --steps 3 --eval_interval 1 --out_dir run") == 0
    rows = log_of("run")[1][1:]
    assert [row["accepted"] for row in rows] == [True, False, True] and rows[1]["reason"] == "step not finite"
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])


CHOICES = {  # flag: what it may be in a random run, also what goes with few other flags only, or with none
    "--opt": ["full_gn", "full_gn", "layerwise_gn", *BASELINES], "--solver": ["cg", "muon", "soap", "adamw"], "--local_model": ["gn", "prox_linear"], "--newton_steps": [1, 2],
    "--no-geodesic": [""], "--power": [1, 0.5], "--damping": [1e-8, 0.1, 10, 0], "--damping_metric": ["identity", "kfac"], "--cg_iters": [1, 3], "--cg_tol": [0, 0.1],
    "--cg_rtol": [0, 0.5], "--precond": ["kfac", "none"], "--precond_interval": [1, 3], "--precond_frac": [0.1, 1], "--curvature_frac": [0.01, 0.5, 1],
    "--curvature_data": ["same", "fresh"], "--warm_start": [0, 0.5, 1], "--cache_gb": [0, 0.001, 1], "--max_rejections": [1, 3], "--inner_tokens": [32, 512, 4096, 100],
    "--inner_lr": [1e-4, 1e-2, 1], "--inner_schedule": list(gn.SCHEDULES), "--inner_warmup": [0, 5], "--inner_weight_decay": [0, 0.1], "--inner_clip": [0, 1],
    "--inner_l2": [0, 1], "--inner_average": [0, 0.5, 1], "--inner_reset": [""], "--lr": [1e-5, 1e-2, 10, -1], "--schedule": ["constant", "cosine", "wsd"], "--warmup_steps": [0, 1, 9], "--clip": [0, 1],
    "--weight_decay": [0, 0.5], "--betas": ["0 0", "0.9 0.99", "0.9 1"], "--momentum": [0, 0.9, 1], "--precondition_frequency": [1, 5], "--line_search": ["armijo", "grid", "none"],
    "--line_search_data": ["same", "fresh"], "--search_frac": [0.01, 1], "--search_candidates": [1, 10], "--micro_batch": [1, 7, 1000], "--dtype": ["fp32", "tf32", "bf16"],
    "--ema": [0, 0.9], "--eval_interval": [1, 2, 5], "--eval_tokens": [1, 5000], "--seed": [0, 10 ** 12], "--target_loss": [0, 3, 99], "--checkpoint_interval": [1, 3],
}
SHAPES = {"--n_layer": [1, 2, 3], "--n_head": [1, 2, 4, 3], "--n_embd": [8, 16, 24, 48, 30], "--block_size": [1, 2, 16, 33, 64], "--tie_weights": [""]}


@pytest.mark.parametrize("kind", ["flags", "shapes"])
def test_random_settings_run_or_are_refused(kind, go, capsys):
    """Two steps, or one line and status 2; a run that had to stop says why, with status 1; never a traceback; at least half of them run. GN_LONG: 200 combinations
    of flags and 100 shapes."""
    rng, ran = random.Random(kind), 0
    total = (200 if kind == "flags" else 100) if os.environ.get("GN_LONG") else 24
    for number in range(total):
        choices = CHOICES if kind == "flags" else {"--opt": CHOICES["--opt"], "--solver": CHOICES["--solver"], **SHAPES}
        flags = [f"{flag} {rng.choice(choices[flag])}".strip() for flag in rng.sample(sorted(choices), rng.randint(1, 6))]
        if kind == "flags":
            flags = [f for f in flags if not f.startswith("--batch")] + [SMALL.replace("--cg_iters 5", "")]
        else:                                           # mostly a batch that the blocks fit
            block = int(next((f.split()[1] for f in flags if f.startswith("--block_size")), 64))
            flags.append(f"--batch_tokens {block * rng.randint(1, 30) + (rng.random() < 0.1)} --inner_tokens {block * rng.randint(1, 9)}")
        command = " ".join(flags) + (" --eval_tokens 512" if kind == "shapes" else "") + f" --steps 2 --out_dir run{number}"
        status = go(command)
        out, err = capsys.readouterr()
        assert status in (0, 1, 2), command
        if status == 2:
            assert err.startswith("train.py: error: ") and err.count("\n") == 1, command
        elif status == 1:
            assert "stopped: " in out or "error: " in err, command
        else:
            rows = log_of(f"run{number}")[1]
            assert rows[-1]["step"] == 2 or rows[-1]["val_loss"] <= 99, command
        ran += status == 0
    assert ran >= total / 2, (ran, total)


def in_children(*functions):
    """Run each in a forked process of its own, without output, all at once; their exit statuses, or minus the signal that ended one."""
    children = []
    for function in functions:
        children.append(os.fork())
        if not children[-1]:
            status = 99
            try:
                for stream in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
                status = function()
            finally:
                os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def in_a_child(function):
    return in_children(function)[0]


def count_lines(files, at=None, inside=None):
    """Count every line that Python executes in these files (and, with `inside`, in functions of these names alone) by a list of one number; SIGKILL at the
    one numbered `at`."""
    count = [0]

    def tracer(frame, event, arg):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and (inside is None or frame.f_code.co_name in inside):
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return tracer
    sys.settrace(tracer)
    return count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("flags", ["--opt full_gn --cg_iters 3 --newton_steps 2", "--opt layerwise_gn --solver muon --inner_tokens 512", "--opt soap --eval_interval 1 --checkpoint_interval 1 --ema 0.5"])
def test_killed_anywhere(flags, tmp_path, monkeypatch):
    """SIGKILL in the preparation of the data, inside a checkpoint's write, inside a line of the log, inside CG or an inner solve, and at random lines: what comes
    after, --resume or, before there is a checkpoint, the command again, ends with the parameters and rows of a run that was never killed. GN_LONG: 50 times in all."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(flags)
    Path("text.txt").write_text("".join(rng.choice("abc \n") for _ in range(30_000)))
    base = f"--data text.txt --threads 1 --sample 0 {flags} {SMALL.replace('--cg_iters 5', '')} --steps 4 --out_dir"
    files = {module.__file__ for module in (train, gn, D, torch.serialization)}

    def start(out, **where):
        def body():
            count = count_lines(files, **where)
            again = ["--resume", "--out_dir", out, "--data_dir", out + "-data"] if Path(out, "checkpoint.pt").exists() else f"{base} {out} --overwrite --data_dir {out}-data".split()
            status = train.main(again)
            sys.settrace(None)
            Path("lines.txt").write_text(str(count[0]))
            return status
        return in_a_child(body)
    lines = {}
    for inside in (None, ("build",), ("save_checkpoint", "save", "_save"), ("write_row",), ("cg", "solve", "matvec", "step")):
        shutil.rmtree("whole", ignore_errors=True), shutil.rmtree("whole-data", ignore_errors=True)
        assert start("whole", inside=inside) == 0
        lines[inside] = int(Path("lines.txt").read_text())
    assert all(lines.values())
    rows, weights, kills = log_of("whole")[1], checkpoint_of("whole")["model"], 0
    places = [inside for inside in lines if inside]
    for inside in places + [None] * (13 if os.environ.get("GN_LONG") else 0):
        shutil.rmtree("run", ignore_errors=True), shutil.rmtree("run-data", ignore_errors=True)
        ended = start("run", at=rng.randint(1, lines[inside]), inside=inside)
        while ended == -signal.SIGKILL:
            kills += 1
            if rng.random() < 0.5 and Path("run/checkpoint.pt").exists():
                with open("run/log.jsonl", "a") as log:                      # what a line of the log looks like when it is cut
                    log.write('{"step": 9, "tok')
            ended = start("run", **({"at": rng.randint(1, lines[None])} if rng.random() < 0.3 else {}))
        assert ended == 0 and log_of("run")[1] == rows and same_state(checkpoint_of("run")["model"], weights)
    assert kills >= len(places)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, and limits a file's size")
@pytest.mark.parametrize("limit", [100_000, 3_000])
def test_full_disk(limit, go, capfd):
    """A checkpoint, or a line of the log, that cannot be written whole: status 1, one line, the checkpoint before it as it was, nothing half-written beside it,
    and with room again the run goes on to the same end."""
    import resource
    assert go(f"--opt adamw --steps 2 --eval_interval 1 --out_dir whole {SMALL}") == 0 and go(f"--opt adamw --steps 1 --eval_interval 1 --out_dir run {SMALL}") == 0
    before = checkpoint_of("run")
    capfd.readouterr()

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with open("told.txt", "w") as told:
            sys.stderr = told
            return go("--resume --out_dir run --steps 2")
    assert in_a_child(limited) == 1
    told = Path("told.txt").read_text()
    assert told.startswith("train.py: error: ") and told.count("\n") == 1 and ("cannot write run/checkpoint.pt" in told) == (limit == 100_000)
    assert same_state(checkpoint_of("run")["model"], before["model"]) and not Path("run/checkpoint.tmp").exists()
    assert go("--resume --out_dir run --steps 2") == 0
    assert log_of("run")[1] == log_of("whole")[1] and same_state(checkpoint_of("run")["model"], checkpoint_of("whole")["model"])


def together(processes, function):
    """function(rank) in that many processes, joined as torchrun joins them; their exit statuses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])

    def joined(rank):
        n = str(processes)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")
        return function(rank)
    return in_children(*(functools.partial(joined, rank) for rank in range(processes)))


def losses_of(out):
    return np.array([[row["train_loss"] or 0.0, row["val_loss"]] for row in log_of(out)[1]])


SHARED = ["--opt full_gn --newton_steps 2", "--opt full_gn --local_model gn --curvature_data fresh --line_search_data fresh --no-geodesic", "--opt layerwise_gn --newton_steps 1 --precond_interval 2",
          "--opt full_gn --power 0.5", "--opt full_gn --solver soap --inner_tokens 512 --inner_average 0.5", "--opt full_gn --solver muon --inner_tokens 480",
          "--opt layerwise_gn --solver muon --inner_tokens 512", "--opt soap --precondition_frequency 2 --micro_batch 7", "--opt muon --line_search armijo", "--opt adamw --ema 0.5",
          "--opt sgd", "--opt kfac --precondition_frequency 2 --micro_batch 7"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("flags", SHARED)
def test_processes_make_the_run_of_one(flags, go, monkeypatch):
    """In float64, one, two and four processes: losses of five steps within 1e-8, parameters that are the same bits in all of them (the run itself compares
    them at each checkpoint) and the same numbers as one process's. A checkpoint of two processes goes on in one and in three as it would have in two.
    SOAP only rotates sides of at most 32 here: of a longer one, rank-deficient at first, it takes part of the basis from rounding."""
    flags = f"{flags} {SMALL} --eval_interval 1 --checkpoint_interval 1"
    init = torch.distributed.init_process_group
    monkeypatch.setattr(SOAP, "__init__", functools.partialmethod(SOAP.__init__, max_precond_dim=32))
    with monkeypatch.context() as m:
        torch.set_default_dtype(torch.float64)
        try:
            m.setattr(torch.distributed, "init_process_group", None)                     # one process has no use for it
            assert go(f"{flags} --steps 5 --out_dir one") == 0
            m.setattr(torch.distributed, "init_process_group", init)
            assert together(2, lambda rank: go(f"{flags} --steps 5 --out_dir two")) == [0] * 2
            assert together(4, lambda rank: go(f"{flags} --steps 5 --out_dir four")) == [0] * 4
            for n in (1, 3):
                assert together(2, lambda rank: go(f"{flags} --steps 2 --out_dir to{n}")) == [0] * 2
                resume = f"--resume --steps 5 --out_dir to{n}"
                assert (go(resume) if n == 1 else max(together(n, lambda rank: go(resume)))) == 0
        finally:
            torch.set_default_dtype(torch.float32)
    want, weights = losses_of("one"), checkpoint_of("one")["model"]
    assert want.shape == (6, 2) and want[5, 1] < want[0, 1] and next(iter(weights.values())).dtype == torch.float64
    for out in ("two", "four", "to1", "to3"):
        assert np.abs(losses_of(out) - want).max() < 1e-8, out
        assert all(close(t, weights[name], 1e-7) for name, t in checkpoint_of(out)["model"].items()), out
    assert log_of("two")[0]["device"].startswith("2 processes")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_processes_that_come_apart_stop(go, monkeypatch):
    """One process's weights differ in a bit: all end with status 1, the reason is told, and the checkpoint before it is whole. And settings that leave a
    process without a sequence are refused by all, in one line."""
    step = GaussNewton.step

    def run(rank, flags="--steps 4"):
        def spoiled(self, *args, **kwargs):
            record = step(self, *args, **kwargs)
            if rank == 1 and self.steps == 2:
                self.params[0].data[0, 0] *= 1 + 2 ** -23
            return record
        monkeypatch.setattr(GaussNewton, "step", spoiled)
        with open(f"told{rank}.txt", "w") as sys.stderr:
            return go(f"--opt full_gn --newton_steps 1 {SMALL} {flags}")
    assert together(2, lambda rank: run(rank, "--steps 4 --out_dir run")) == [1, 1]
    assert "process 0: after step 2 the parameters of process 1 are not those of process 0" in Path("told0.txt").read_text()
    assert checkpoint_of("run")["progress"]["step"] == 1 and sorted(os.listdir("run")) == ["checkpoint.previous.pt", "checkpoint.pt", "log.jsonl"]
    assert together(3, lambda rank: run(rank, "--curvature_frac 0.01 --out_dir refused")) == [2] * 3
    assert Path("told0.txt").read_text() == "train.py: error: --curvature_frac has 1 sequence for 3 processes\n" and Path("told1.txt").read_text() == ""
    assert not Path("refused").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_dies_ends_the_job(go, data_dir, stdlib):
    """torchrun itself, two processes, one of them killed in the middle of a run: the job ends with an error within a minute, and --resume goes on with one."""
    flags = f"--opt full_gn --newton_steps 1 {SMALL} --steps 9 --data_dir {data_dir} --sample 0"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "train.py"), *flags.split(), "--steps", "9999", "--out_dir", "run"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while time.time() < deadline and not (Path("run/log.jsonl").exists() and Path("run/log.jsonl").read_text().count("\n") > 3):
        time.sleep(0.1)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    start = time.time()
    told = job.communicate(timeout=60)[1]
    assert job.returncode != 0 and time.time() - start < 60 and "SIGKILL" in told
    done = checkpoint_of("run")["progress"]["step"]
    assert done >= 2 and go(f"--resume --steps {done + 1} --out_dir run") == 0 and log_of("run")[1][-1]["step"] == done + 1


@long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("flags, steps", [("--opt full_gn --batch_tokens 8192 --cg_iters 8", 300), ("--opt soap --batch_tokens 8192", 3000)])
def test_a_long_run_stays_as_it_is(flags, steps, tmp_path, data_dir, stdlib):
    """After a tenth of the run resident memory grows by under 2 %, and no file stays open; no loss is NaN, every row of the log and both checkpoints are whole."""
    out = tmp_path / "run"
    job = subprocess.Popen([sys.executable, str(HERE / "train.py"), *flags.split(), "--steps", str(steps), "--threads", "1", "--sample", "0", "--data_dir", str(data_dir),
                            "--out_dir", str(out)], stdout=subprocess.DEVNULL)
    samples = []                                        # (steps done, resident kilobytes, open files)
    while job.poll() is None:
        time.sleep(1)
        with contextlib.suppress(OSError, StopIteration):
            status = Path(f"/proc/{job.pid}/status").read_text().splitlines()
            resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
            samples.append(((out / "log.jsonl").read_text().count("\n") - 2, resident, len(os.listdir(f"/proc/{job.pid}/fd"))))
    rows = log_of(out)[1]
    assert job.returncode == 0 and [row["step"] for row in rows] == list(range(steps + 1))
    assert all(math.isfinite(row["val_loss"]) for row in rows if row["step"] % 10 == 0) and rows[-1]["val_loss"] < rows[10]["val_loss"]
    early = [s for s in samples if 0.1 * steps <= s[0] < 0.3 * steps]
    late = [s for s in samples if 0.8 * steps <= s[0] < steps]
    print(f"resident, MB: {max(s[1] for s in early) / 1e3:.1f} early, {max(s[1] for s in late) / 1e3:.1f} late")
    assert max(s[1] for s in late) <= 1.02 * max(s[1] for s in early)
    assert min(s[2] for s in late) <= min(s[2] for s in early)         # one more while a checkpoint is being written
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        assert train.read_checkpoint(out / name)["progress"]["step"] > 0.9 * steps


@pytest.mark.parametrize("flags", """--opt foo | --no_such_flag 1 | --step 3 | --steps 0 | --steps x | --batch_tokens 100 | --batch_tokens 0
    | --micro_batch 0 | --threads 0 | --n_embd 30 | --n_embd 12 | --n_head 3 | --n_layer 0 | --block_size 0 | --block_size -1
    | --block_size 10000000 | --device nope | --device cuda:99 | --data missing.txt | --data | --tokenizer gpt3 | --model huge | --lr -1 | --lr nan
    | --damping 0 | --damping inf | --damping_metric l2 | --cg_iters 0 | --cg_tol -1 | --cg_rtol nan | --precond_frac 0 | --curvature_frac 1.5
    | --betas 0.9 1.0 | --betas 0.9 | --momentum 1 | --ema 1 | --clip -1 | --seed -1 | --seed 99999999999999999999999 | --warm_start -1
    | --max_rejections 0 | --eval_interval 0 | --eval_tokens 0 | --sample -1 | --init_from missing | --resume --out_dir missing
    | --out_dir taken/x | --out_dir taken | --line_search wolfe | --local_model full | --solver sgd | --inner_tokens 100 --solver muon
    | --power 0.7 | --power 0.5 --precond kfac | --geodesic --solver muon | --compare missing | --shards 0 --data c4
    | --target_loss nan | --target_loss x | --cache_gb -1 | --device meta""".split("|"))
def test_bad_setting_is_one_line(go, flags, capsys, data_dir):
    """Status 2, one line on stderr that says what is wrong, nothing on stdout, and nothing created."""
    Path("taken").write_text("a file")
    before = sorted(os.listdir(data_dir))
    assert go(f"--steps 1 --out_dir new {flags}") == 2
    out, err = capsys.readouterr()
    assert err.startswith("train.py: error: ") and err.count("\n") == 1 and out == ""
    assert os.listdir() == ["taken"] and sorted(os.listdir(data_dir)) == before


def test_help_explains_every_flag(capsys):
    """Each flag is in --help, grouped, and has a text of its own."""
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    out = capsys.readouterr().out
    actions = [a for a in train.build_parser()._actions if a.dest != "help"]
    assert e.value.code == 0 and len(actions) > 50 and len({a.help for a in actions}) >= len(actions) - 4
    assert all(a.help and f"  {a.option_strings[0]}" in out for a in actions)


@pytest.mark.parametrize("opt", ["full_gn", "adamw"])
def test_stops_after_rejections_in_a_row(go, opt, monkeypatch, capsys):
    """Products or gradients that are NaN: --max_rejections rejected rows, status 1 and the reason, a checkpoint of the
    finite parameters that were there before; once the trouble is gone --resume goes on."""
    matvec, batch_grad = GGN.matvec, train.batch_grad
    with monkeypatch.context() as m:
        if opt == "full_gn":
            m.setattr(GGN, "matvec", lambda self, v, part=None: matvec(self, v, part) * math.nan)
        else:
            m.setattr(train, "batch_grad", lambda *a: (math.nan, batch_grad(*a)[1]))
        assert go(f"--opt {opt} --steps 9 --max_rejections 3 --eval_interval 1 --out_dir run {SMALL}") == 1
    out, (_, rows) = capsys.readouterr().out, log_of("run")
    assert "stopped: 3 steps in a row were rejected" in out and "finite" in out.split("stopped:")[1]
    assert [r.get("accepted") for r in rows] == [None] + [False] * 3 and all(r["reason"] for r in rows[1:])
    assert len({r["val_loss"] for r in rows}) == 1 and all(t.isfinite().all() for t in checkpoint_of("run")["model"].values())
    assert go("--resume --steps 4 --out_dir run") == 0 and log_of("run")[1][-1]["accepted"] and len(log_of("run")[1]) == 5


def test_compare_tells_what_each_run_took(tmp_path, monkeypatch, capsys):
    """Seeds of one configuration together: mean and standard error of steps, tokens, millions of gradient tokens and seconds to
    the first evaluation at or below the target; a configuration that did not always get there shows how far it went."""
    monkeypatch.chdir(tmp_path)
    for name, opt, seed, losses in (("a", "full_gn", 0, [5, 3.0, 2.0]), ("b", "full_gn", 1, [5, 2.4, 2.0]), ("c", "adamw", 0, [5, 4, 3])):
        Path(name).mkdir()
        rows = [dict(step=i, tokens=i * 1000, val_loss=v, grad_equivalents=10.0 * i, seconds=2.0 * i) for i, v in enumerate(losses)]
        config = dict(opt=opt, seed=seed, batch_tokens=1_000_000, out_dir=name)
        Path(name, "log.jsonl").write_text("\n".join(map(json.dumps, [dict(config=config), *rows])))
    assert train.main("--compare a b c --target_loss 2.5".split()) == 0
    _, gauss, adamw = capsys.readouterr().out.splitlines()
    assert gauss.split() == "2.50 full_gn 2/2 1.5 ± 0.5 1,500 ± 5e+02 15 ± 5 3 ± 1".split() and adamw.split() == "2.50 adamw 0/1 > 2".split()
    assert train.main("--compare a x".split()) == 2
    assert train.main("--compare a c --target_loss 2.5 --plot loss.svg".split()) == 0
    picture = xml.etree.ElementTree.parse("loss.svg").getroot()
    lines = [[tuple(map(float, point.split(","))) for point in e.attrib["points"].split()] for e in picture.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 3 * 2 and all(len(line) == 2 for line in lines)             # three views of two runs, step 0 left out
    (x0, y0), (x1, y1) = lines[0]
    assert x1 > x0 and y1 > y0 and math.isclose(y1 - y0, 300 * (3 - 2) / (4 - 2), abs_tol=0.2)      # down by its share of the losses' range
    assert train.main("--compare a --plot loss.png".split()) == 2 and not Path("loss.png").exists()


def test_compare_reads_a_log_that_was_cut_off(tmp_path, capsys):
    """The log without its last, incomplete line, wherever it was cut; a damaged line before is told, and so
    is a log without an evaluation."""
    config = dict(opt="adamw", seed=0, batch_tokens=1000)
    rows = [dict(step=i, tokens=i, val_loss=5.0 - i, grad_equivalents=i, seconds=2.0 * i) for i in range(4)]
    lines, log = [json.dumps(line) + "\n" for line in [dict(config=config), *rows]], tmp_path / "log.jsonl"

    def compared(text):
        log.write_text(text)
        status = train.main(["--compare", str(tmp_path), "--target_loss", "3"])
        return status, capsys.readouterr()
    whole = compared("".join(lines[:4]))
    assert whole[0] == 0
    for size in range(1, len(lines[4]) - 1):
        assert compared("".join(lines[:4]) + lines[4][:size]) == whole
    assert compared("".join(lines[:4]) + "\0" * 99) == whole
    head, cut = lines[0], lines[1][:9]
    for text in (head + cut + "\n" + lines[2], head, head + cut, head[:9], ""):
        status, told = compared(text)
        assert status == 2 and told.err.count("\n") == 1 and str(log) in told.err


def test_chart_ticks_are_round():
    assert train.ticks(3, 700, True) == [5, 10, 20, 50, 100, 200, 500] and train.ticks(1, 1e6, True) == [10.0 ** i for i in range(7)]
    assert [round(t, 9) for t in train.ticks(1.28, 2.3, False)] == [1.4, 1.6, 1.8, 2.0, 2.2] and len(train.ticks(1.6, 1.6, False)) <= 1


def test_a_study_runs_what_is_missing(tmp_path, monkeypatch, capsys, data_dir):
    """Two methods in small: every run in its folder with its command, the counts in headline.json are those of the logs, tables and pictures; a second
    call repeats nothing but a run that was cut off, which it ends as before; a third takes from headline.json what has no folder; a run that fails ends the study with its reason."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "TARGETS", {"quick": 3.3, "slow": 0, "steep": 0})
    monkeypatch.setattr(train, "WARMUP", "--opt adamw --lr 3e-3 --steps 2 --batch_tokens 4096")
    monkeypatch.setattr(train, "BATCHES", (4096,))
    monkeypatch.setattr(train, "STUDY", {train.BEST_GN: train.Method("--opt full_gn --solver soap --inner_tokens 512", "inner_lr", (1.6e-2,), "inner_tokens", (), 2 ** 15),
                                         "SOAP": train.Method("--opt soap --eval_tokens 4096", "lr", (2e-2,), "precondition_frequency", (), 2 ** 13)})
    Path("study").mkdir()
    Path("study/data").symlink_to(data_dir)
    assert train.main("--study headline --quick --threads 2 --out_dir study".split()) == 0
    out = capsys.readouterr().out
    found = json.loads(Path("study/headline.json").read_text())
    assert len(found["runs"]) == len(list(Path("study").glob("*/log.jsonl"))) == 1 + 2 + 3 and set(found["headline"]) == {train.BEST_GN, "SOAP"}
    for name, run in found["runs"].items():
        head, *rows = map(json.loads, Path("study", name, "log.jsonl").read_text().splitlines())
        assert run["command"] == head["command"] and all(len(r) == 2 for r in run["curve"])
        hit = next((row for row in rows if row["val_loss"] is not None and row["val_loss"] <= 3.3), None) if "warmup" not in name else None
        assert run["steps"] == (hit and hit["step"]) and (hit is None or (run["tokens"], run["loss"]) == (hit["tokens"], hit["val_loss"]))
    assert all(run["steps"] for name, run in found["runs"].items() if "-4k-" not in name and name != "warmup")
    table = [line for line in out.splitlines() if line.startswith(("SOAP  ", train.BEST_GN + "  "))]
    assert len(table) == 4 and any(f" {found['runs'][found['headline']['SOAP'][0]]['steps']} " in line for line in table)
    for picture in ("loss.svg", "batch.svg"):
        assert xml.etree.ElementTree.parse(f"study/{picture}").getroot().tag.endswith("svg")

    cut = Path("study", found["headline"]["SOAP"][0], "log.jsonl")
    whole = cut.read_text()
    cut.write_text("".join(whole.splitlines(keepends=True)[:2]))                    # as if it had been killed after its first checkpoint
    checkpoint = torch.load(cut.parent / "checkpoint.pt", weights_only=True)
    times = {path: path.stat().st_mtime_ns for path in Path("study").glob("*/log.jsonl") if path != cut}
    (cut.parent / "checkpoint.pt").unlink()
    assert train.main("--study headline --quick --threads 2 --out_dir study".split()) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in times.items())
    assert same_state(torch.load(cut.parent / "checkpoint.pt", weights_only=True)["model"], checkpoint["model"])
    assert [json.loads(line)["val_loss"] for line in cut.read_text().splitlines()[1:]] == [json.loads(line)["val_loss"] for line in whole.splitlines()[1:]]
    shutil.rmtree(cut.parent)                                                       # the record has it; of the warmup it takes the checkpoint too
    shutil.rmtree("study/warmup")
    assert train.main("--study headline --quick --threads 2 --out_dir study".split()) == 0 and not cut.parent.exists()
    assert json.loads(Path("study/headline.json").read_text())["runs"].keys() == found["runs"].keys() and Path("study/warmup/checkpoint.pt").exists()
    monkeypatch.setitem(train.STUDY, "SOAP", train.Method("--opt soap", "lr", (-1.0,), "precondition_frequency", (), 2 ** 13))
    assert train.main("--study headline --quick --out_dir study".split()) == 2 and "--lr must be positive" in capsys.readouterr().err


def test_the_study_tunes_all_methods_alike(tmp_path, monkeypatch):
    """The whole study with stand-ins for its runs, of which the third rate, the second value of the knob and the decay need the fewest steps: each
    method tries four rates and two values, each baseline three endings, the seeds get what was best, and every run has flags that resolve."""
    asked = {}

    def make(self, name, flags, method):
        train.resolve(flags)
        assert name not in asked
        asked[name], m, text = " ".join(flags), train.STUDY.get(method), " ".join(flags)
        steps = 40
        if m:
            steps -= 20 * (f"--{m.rate} {m.rates[2]:g} " in text) + 10 * (f"--{m.knob} {m.values[1]} " in text) + 5 * ("--schedule wsd" in text)
        self.found[name] = {"method": method, "target": 1.6, "steps": steps, "ran": steps, "loss": 1.6, "gradients": 1.0, "seconds": 1.0, "tokens": 1000,
                            "device": "cpu", "curve": [[0, 2.0], [steps, 1.6]]}
        return self.found[name]
    monkeypatch.setattr(train.Study, "_make", make)
    train.Study(tmp_path, 1, False).everything()
    for m in train.STUDY.values():
        def runs(flags, batch, seed):
            return [text for text in asked.values() if text.startswith(f"{flags} --batch_tokens {batch} ") and f"--target_loss 1.6 --eval_interval 1 --seed {seed} " in text]
        tuned = f"{m.flags} --{m.rate} {m.rates[2]:g} --{m.knob} {m.values[1]}"
        assert len(set(m.rates)) == 4 and len(set(m.values)) == 2
        for flags in [f"{m.flags} --{m.rate} {r:g}" for r in m.rates] + [f"{m.flags} --{m.rate} {m.rates[2]:g} --{m.knob} {v}" for v in m.values]:
            assert len(runs(flags, m.batch // 2, 0)) == 1
        endings = [tuned] if "_gn" in m.flags else [tuned, f"{tuned} --ema 0.9", f"{tuned} --schedule wsd"]
        assert "_gn" in m.flags or all(len(runs(flags, m.batch, 0)) == 1 for flags in endings)
        won, length = (f"{tuned} --schedule wsd", math.ceil(0.85 * 10)) if len(endings) > 1 else (tuned, 20)
        assert all(f"--steps {length} " in text for seed in train.SEEDS for text in runs(won, m.batch, seed)) and len(runs(won, m.batch, train.SEEDS[-1])) == 1
    record = json.loads((tmp_path / "headline.json").read_text())
    assert record["runs"].keys() == asked.keys() and set(record["slow"]) == set(train.SLOW) and set(record["random"]) == set(train.RANDOM)
    assert all(len(names) == 3 for names in record["headline"].values())
    assert sorted(len(names) for names in record["slow"].values()) == [1] * (len(train.SLOW) - 2) + [3, 3]       # the winners over seeds


@long
def test_bench_prints_checked_ratios(go, monkeypatch, capsys):
    """Each way of a tiny size with its ratio, and a small error where its result has a reference."""
    monkeypatch.setattr(train, "BENCH", {"tiny": (dict(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=16), 8)})
    assert go("--bench") == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("  ") and "(" in line and "measured" not in line and "one gradient" not in line]
    assert len(rows) >= 9 and "  gradient   " in rows[0] and "product" in rows[1]
    assert all(float(row.split("error")[1]) < 1e-5 for row in rows if "error" in row) and sum("error" in row for row in rows) >= 4


def test_ema_is_what_is_evaluated(go):
    """--ema 0.75: after one step the average is 0.75 θ₀ + 0.25 θ₁, the validation loss is its loss, and training goes on from θ₁."""
    flags = f"--opt adamw --steps 1 --eval_interval 1 {SMALL}"
    go(f"{flags} --target_loss 99 --out_dir zero"), go(f"{flags} --out_dir plain"), go(f"{flags} --ema 0.75 --out_dir ema")
    zero, plain, ema = (checkpoint_of(out) for out in ("zero", "plain", "ema"))
    mixed = {k: 0.75 * zero["model"][k] + 0.25 * v for k, v in plain["model"].items()}
    assert same_state(ema["model"], plain["model"]) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ema["ema"], mixed.values()))
    torch.save({**plain, "model": mixed}, "mixed.pt")
    go(f"{flags} --init_from mixed.pt --target_loss 99 --out_dir mixed")
    losses = [log_of(out)[1][-1]["val_loss"] for out in ("ema", "mixed", "plain")]
    assert math.isclose(losses[0], losses[1], rel_tol=1e-5) and abs(losses[0] - losses[2]) > 1e-2


def test_batches_of_a_run_do_not_depend_on_the_optimizer(go, monkeypatch):
    """Two optimizers with one seed start from the same weights, evaluate on the same tokens and see the same batches; micro-batches
    change the loss by rounding only."""
    firsts = {}
    for opt in ("adamw", "sgd"):
        for flags in ("", "--micro_batch 7"):
            go(f"--opt {opt} --steps 2 --eval_interval 1 --lr 1e-9 --out_dir {opt}{len(firsts)} {SMALL} {flags}")
            firsts[opt + flags] = [[row[k] for k in ("train_loss", "val_loss")] for row in log_of(f"{opt}{len(firsts)}")[1]]
    a, *others = [np.array([v for row in rows for v in row if v]) for rows in firsts.values()]
    assert all(np.allclose(a, b, rtol=1e-5) for b in others)


# ---- data ----

def error_of(*args, **kwargs):
    """The message of the DataError that prepare raises, which must be one line."""
    with pytest.raises(DataError) as e:
        prepare(*args, **kwargs)
    assert str(e.value) and len(str(e.value).splitlines()) == 1
    return str(e.value)


def make_folder(root, n=120, size=200):
    """n different little documents, d000.txt and on, no line in two of them."""
    for i in range(n):
        write(root / f"sub{i % 3}" / f"d{i:03}.txt", "".join(f"<{i} {j}>\n" for j in range(size // 8)))
    return root


def write(path, text):
    """text, or raw bytes, as path's name asks for: gzipped or not."""
    raw = text if isinstance(text, bytes) else text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


def jsonl(texts):
    return "".join(json.dumps({"url": "http://x", "text": text}) + "\n" for text in texts)


def left_in(cache):
    """What a reader of the cache directory would see: all but the locks."""
    return sorted(p.name for p in Path(cache).glob("*") if not p.name.endswith(".lock"))


def text_of(d, side=None):
    return d.encoding.decode(getattr(d, side).tolist()) if side else text_of(d, "train") + text_of(d, "val")


def same(a, b):
    return np.array_equal(a.train, b.train) and np.array_equal(a.val, b.val) and a.meta["sha256"] == b.meta["sha256"]


def test_tokenizers(tmp_path, monkeypatch):
    """bytes is UTF-8 through tiktoken's interface and gives any text back; gpt2 is uint16, ends every document with token 50256
    and never makes it from text; without its files the error is one line that names TIKTOKEN_CACHE_DIR."""
    encoding = get_encoding("bytes")
    text = "héllo\r\n\t日本 \0 𝒳 <|endoftext|> " + "x" * 1000 + "\n" * 70 + "".join(map(chr, range(0x300)))
    assert encoding.n_vocab == 256 and encoding.encode_ordinary(text) == list(text.encode()) == list(encoding.decode(list(text.encode())).encode())
    fake = tiktoken.Encoding("gpt2", pat_str=r"(?s:.{1,64})", mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: fake)
    write(make_folder(tmp_path / "text") / "z.txt", "a <|endoftext|> b")
    d = prepare(tmp_path / "text", "gpt2", tmp_path / "cache")
    assert d.vocab_size == 50257 and d.train.dtype == d.val.dtype == np.uint16 and d.train[-1] == d.val[-1] == 50256
    assert (d.train == 50256).sum() + (d.val == 50256).sum() == d.meta["documents"] == 121
    assert "a <|endoftext|> b<|endoftext|>" in text_of(d)

    def offline(name):
        raise ConnectionError("Max retries exceeded\nwith url")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    message = error_of("stdlib", "gpt2", tmp_path / "new")
    assert "TIKTOKEN_CACHE_DIR" in message and "ConnectionError" in message and not (tmp_path / "new").exists()


def test_stdlib_is_source_without_tests(tmp_path, monkeypatch):
    """The embedded source: .py files of the standard library in sorted order, no tests, nothing installed, no binaries; a
    Python without its sources is said in one line."""
    keep = ["a.py", "b/__init__.py", "b/latin.py", "contest.py", "testing.py"]
    drop = ["a.txt", "test/t.py", "b/tests/t.py", "idlelib/idle_test/t.py", "b/test_c.py", "b/c_test.py", "site-packages/p.py",
            "dist-packages/p.py", ".hidden.py"]
    for name in keep + drop:
        write(tmp_path / "lib" / name, f"# {name} {'x' * 100}\n")
    write(tmp_path / "lib/b/latin.py", b"# caf\xe9 " + b"y" * 100)
    monkeypatch.setattr(D, "VAL_FRACTION", 0.0)
    monkeypatch.setattr(D.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    d = prepare("stdlib", cache_dir=tmp_path / "cache")
    texts = [(tmp_path / "lib" / name).read_text(errors="replace") for name in keep]
    assert text_of(d) == "".join(t if t.endswith("\n") else t + "\n" for t in texts)
    assert d.meta["documents"] == len(keep) and d.meta["python_version"] == sys.version.split()[0]
    (tmp_path / "empty").mkdir()
    for path in ("empty", "missing"):
        monkeypatch.setattr(D.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / path)})
        assert "standard library" in error_of("stdlib", cache_dir=tmp_path / "none") and left_in(tmp_path / "none") == []


def test_stdlib_of_this_python(stdlib):
    """The default needs no network: over 5 MB of bytes, 1 to 12 % of them validation, as read-only memmaps."""
    assert len(stdlib.train) > 5e6 and 0.01 < len(stdlib.val) / len(stdlib.train) < 0.12 and stdlib.vocab_size == 256
    assert all(isinstance(t, np.memmap) and t.dtype == np.uint8 and not t.flags.writeable for t in (stdlib.train, stdlib.val))


def test_shakespeare(tmp_path, monkeypatch):
    """One download, kept as shakespeare.txt; a wrong hash, fresh or on disk, names both hashes and is not kept; no network,
    however it shows, is one line with the address and the place for the file."""
    for problem in (urllib.error.URLError("no\nroute"), TimeoutError("timed out"), http.client.IncompleteRead(b"")):
        def offline(url, timeout):
            raise problem
        monkeypatch.setattr(D.urllib.request, "urlopen", offline)
        message = error_of("shakespeare", cache_dir=tmp_path)
        assert D.SHAKESPEARE_URL in message and str(tmp_path / "shakespeare.txt") in message and left_in(tmp_path) == []
    text, calls = b"To be, or not to be.\n" * 30, []
    monkeypatch.setattr(D.urllib.request, "urlopen", lambda url, timeout: calls.append(url) or io.BytesIO(text))
    found = hashlib.sha256(text).hexdigest()
    message = error_of("shakespeare", cache_dir=tmp_path)
    assert found in message and D.SHAKESPEARE_SHA256 in message and left_in(tmp_path) == []
    monkeypatch.setattr(D, "SHAKESPEARE_SHA256", found)
    assert prepare("shakespeare", cache_dir=tmp_path).meta["sha256"] == found == prepare("shakespeare", cache_dir=tmp_path).meta["sha256"]
    assert calls == [D.SHAKESPEARE_URL] * 2 and (tmp_path / "shakespeare.txt").read_bytes() == text and len(left_in(tmp_path)) == 2
    write(tmp_path / "shakespeare.txt", "not to be")
    message = error_of("shakespeare", cache_dir=tmp_path)
    assert found in message and hashlib.sha256(b"not to be").hexdigest() in message and len(calls) == 2


def test_folder_of_mixed_kinds(tmp_path, monkeypatch):
    """A folder is its visible texts and records, gzipped or not, sorted by path; no binaries, nothing hidden; also when the
    cache lies inside it, so that it can be reused."""
    monkeypatch.setattr(D, "VAL_FRACTION", 0.0)
    root, want = tmp_path / "text", {}
    for name in ("a.txt", "b/c.txt.gz", "b/d.jsonl", "b/e.json", "b/h.json.txt", "f.jsonl.gz", "g.json.gz", "i.md"):
        texts = [f"{name} {i}" for i in range(30)]
        want[name] = "".join(t + "\n" for t in texts)
        write(root / name, jsonl(texts) if name.removesuffix(".gz").endswith(("json", "jsonl")) else want[name])
    write(root / "binary.gz", b"a\0b" * 1000), write(root / "x.bin", b"n\0o"), write(root / ".git/x", "no"), write(root / "a/.x", "no")
    write(root / "empty.jsonl", ""), write(root / "empty.txt", "")
    for cache in (root, root / "cache"):
        first = prepare(root, cache_dir=cache)
        assert text_of(first) == "".join(want.values()) and first.meta["documents"] == 4 * 30 + 4
        assert prepare(root, cache_dir=cache).meta["fingerprint"] == first.meta["fingerprint"]


def test_unusable_sources_are_errors(tmp_path, monkeypatch):
    """Empty, missing, broken, binary, unknown, unreadable: each a one-line DataError with nothing left in the cache."""
    cache = tmp_path / "cache"
    write(tmp_path / "empty.txt", ""), write(tmp_path / "binary", b"a\0b" * 1000), write(tmp_path / "line\nbreak", "")
    write(tmp_path / "short.txt", "x" * 128 + "\n")           # two blocks of 64 need 130
    (tmp_path / "folder").mkdir(), (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.txt").symlink_to(tmp_path / "nowhere")
    for source, told in [("empty.txt", "no text"), ("folder", "no text"), ("binary", "NUL"), ("links", "a.txt"), ("line\nbreak", "no text"),
                         ("links/a.txt", "no data called"), ("missing.txt", "shakespeare"), ("short.txt", "block_size 64 needs 65")]:
        assert told in error_of(tmp_path / source, cache_dir=cache) and left_in(cache) == []
    for unknown in ("shakespear", ""):
        message = error_of(unknown, cache_dir=cache)
        assert "stdlib" in message and "shakespeare" in message and "path" in message
    assert "bytes" in error_of("stdlib", "gpt3", cache) and "block_size" in error_of("stdlib", block_size=0)
    assert "empty.txt" in error_of(tmp_path / "short.txt", cache_dir=tmp_path / "empty.txt", block_size=8)     # cache is no folder
    assert prepare(tmp_path / "short.txt", cache_dir=tmp_path / "c2", block_size=40) and "66" in error_of(
        tmp_path / "short.txt", cache_dir=tmp_path / "c2", block_size=65)                                      # reused, and too short
    make_folder(tmp_path / "text", n=3)
    is_binary = D.is_binary

    def denied(path):
        if Path(path).name == "d001.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return is_binary(path)
    monkeypatch.setattr(D, "is_binary", denied)
    for source in ("text", "text/sub1/d001.txt"):
        message = error_of(tmp_path / source, cache_dir=cache)
        assert "Permission denied" in message and "d001.txt" in message and left_in(cache) == []


@pytest.mark.parametrize("name", ["t.jsonl", "t.json.gz"])
@pytest.mark.parametrize("n", [70, 400])
def test_a_record_is_a_document(tmp_path, name, n):
    """One document per line, its whole text, however few or long they are: an independent hash predicts its side, several
    lines and odd characters included; blank lines, \\r\\n and other fields change nothing, an empty text is no document."""
    texts = [f"document {i}\nhas é, 日本, \x85 and \u2028\n" + f"[{i}]" * (3 * i if i % 5 else 3000) for i in range(n)]
    odd = json.dumps({"text": "raw 日本 \u2028", "n": [1, {}]}, ensure_ascii=False)
    body = "\n \r\n" + odd + "\r\n" + jsonl(texts).replace("\n", "\r\n") + '{"text": ""}\n\t\n' + '{"text": "no newline, half \\ud800"}'
    d = prepare(write(tmp_path / name, body), cache_dir=tmp_path / "cache", block_size=1)
    sides = {True: "", False: ""}
    for text in ["raw 日本 \u2028", *texts, "no newline, half \ud800"]:
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        sides[int(digest, 16) < 0.05 * 2**256] += text.replace("\ud800", "\ufffd") + "\n"
    assert text_of(d, "train") == sides[False] and text_of(d, "val") == sides[True] != "" and d.meta["documents"] == n + 2


@pytest.mark.parametrize("line", ['{"text": "cut', "plain text", '{"txt": "x"}', '{"text": null}', '{"text": ["x"]}', '["text"]', '"text"', "7",
                                  "[" * 100_000, '{"text": "x"} {"text": "y"}', "\0"])
def test_bad_record_is_named(tmp_path, line):
    """Whatever is wrong with a record: one line that names the file and the line, and nothing left."""
    path = write(tmp_path / "t.jsonl", "\n" + jsonl("ok " * 4000 for i in range(5)) + line + "\n" + jsonl(["ok"] * 9))
    message = error_of(path, cache_dir=tmp_path / "cache")
    assert f"{path}, line 7 " in message and '"text"' in message and left_in(tmp_path / "cache") == []


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_gzip_changes_nothing_but_the_size(tmp_path, kind):
    """The same tokens to the last one, gzipped or not, even in several parts; cut short, a bit wrong, or no gzip at all: one
    line that names the file, and nothing left."""
    rng = random.Random(0)
    body = "".join(f"{rng.getrandbits(400):x}\n" for _ in range(12_000))   # 1 MB: pieces of 4096 characters either way
    body = jsonl(body.split()) if kind == "jsonl" else body
    sets = [prepare(write(tmp_path / name, body), cache_dir=tmp_path / "cache") for name in (f"a.{kind}", f"b.{kind}.gz")]
    path = write(tmp_path / f"bad.{kind}.gz", body)
    whole, half = path.read_bytes(), len(body) // 2
    path.write_bytes(gzip.compress(body[:half].encode()) + gzip.compress(body[half:].encode()))
    sets.append(prepare(path, cache_dir=tmp_path / "cache"))
    assert all(same(d, sets[0]) for d in sets) and sets[0].meta["documents"] == (12_000 if kind == "jsonl" else 1)

    def flipped(i):
        return whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1:]
    for raw in (whole[:5], whole[:len(whole) // 2], whole[:-1], whole[:-8], flipped(len(whole) // 2), flipped(-6), body.encode(), whole + b"rest"):
        path.write_bytes(raw)
        assert str(path) in error_of(path, cache_dir=tmp_path / "new") and left_in(tmp_path / "new") == []


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.txt", "t.jsonl.gz", "t.json.gz", "t.txt.gz"])
def test_byte_order_mark_changes_nothing(tmp_path, name):
    """A file that begins with UTF-8's mark, as Windows programs write it, is the file without it, records or
    text; a U+FEFF anywhere else stays."""
    texts = [f"\ufeffdocument {i}: é\ufeff" * 5 for i in range(150)]
    body = jsonl(texts) if ".json" in name else "\n".join(texts)[1:]
    a, b = (prepare(write(tmp_path / code / name, body.encode(code)), cache_dir=tmp_path / code, block_size=8)
            for code in ("utf-8", "utf-8-sig"))
    assert same(a, b) and text_of(b).count("\ufeff") == 150 * 10 - (".json" not in name)


def test_split_by_document_is_by_content_alone(tmp_path, monkeypatch):
    """With 100 documents or more, each goes whole to one side by its content: every line is on exactly one side, names
    and order change nothing, a copy joins its original, and an independent hash predicts the side."""
    monkeypatch.setattr(D, "PIECE", (64, 64))
    texts = [p.read_text() for p in sorted(make_folder(tmp_path / "a", n=300).rglob("*.txt"))]
    for i, text in enumerate(texts + texts):
        write(tmp_path / "b" / f"{997 * i % 1009:04}", text)
    a, b = (prepare(tmp_path / name, cache_dir=tmp_path / "cache") for name in "ab")
    a_train, a_val, b_train, b_val = (text_of(d, side).splitlines() for d in (a, b) for side in ("train", "val"))
    assert not set(a_train) & set(a_val) and len(set(a_train)) + len(set(a_val)) == 300 * 25
    assert sorted(a_train * 2) == sorted(b_train) and sorted(a_val * 2) == sorted(b_val)
    expected = [t for t in texts if int(hashlib.sha256(t.encode()).hexdigest(), 16) < 0.05 * 2**256]
    assert sorted(a_val) == sorted("".join(expected).splitlines()) and len(expected) > 3


def test_texts_are_split_in_pieces_at_line_ends(tmp_path):
    """A single text, or one beside a thousand records, is cut at line ends: no line is torn or lost, about 5 % is validation."""
    lines = [f"line {i} " + "é" * (i % 50) + ("\r\n" if i % 3 else "\n") for i in range(20_000)]
    write(tmp_path / "text/t.txt", "".join(lines)), write(tmp_path / "text/r.jsonl", jsonl(f"record {i}" for i in range(1000)))
    for source in ("text/t.txt", "text"):
        d = prepare(tmp_path / source, cache_dir=tmp_path / "cache")
        train_lines, val_lines = ([line for line in text_of(d, side).splitlines(True) if line[:4] == "line"] for side in ("train", "val"))
        assert sorted(train_lines + val_lines) == sorted(lines) and 0.02 < len("".join(val_lines)) / len("".join(lines)) < 0.09
        assert source == "text" or d.meta["sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("text", ["x" * 129 + "\n", "same line\n" * 13, "".join(f"{i}\n" for i in range(900))])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 1.0])
def test_both_sides_get_a_block_if_there_are_two(tmp_path, monkeypatch, text, fraction):
    """Down to exactly two blocks, in the worst splits too, both sides get one, and no token is lost or doubled."""
    monkeypatch.setattr(D, "VAL_FRACTION", fraction)
    d = prepare(write(tmp_path / "t", text), cache_dir=tmp_path / "cache", block_size=64)
    assert min(len(d.train), len(d.val)) >= 65 and sorted(text_of(d)) == sorted(text)
    get_batch(d.train, 64, 4, 0, 0), val_batch(d.val, 64, 64)


def test_prepared_data_is_reused_only_if_it_matches(tmp_path, monkeypatch):
    """Built once for any block size; anew if a file changes, if tokens.bin is cut short, meta.json damaged, or the format
    newer; several versions keep beside each other."""
    built, build = [], D.build
    monkeypatch.setattr(D, "build", lambda *args: built.append(1) or build(*args))
    path, cache = write(tmp_path / "t.txt", "one\ntwo\n" * 1000), tmp_path / "cache"

    def builds(**kwargs):
        before = len(built)
        assert sorted(text_of(prepare(path, cache_dir=cache, **kwargs))) == sorted(path.read_text())
        return len(built) - before
    assert [builds(), builds(), builds(block_size=512), builds(block_size=8)] == [1, 0, 0, 0]
    os.utime(path, ns=(1, 1))
    assert [builds(), builds()] == [1, 0]
    path.write_text("three\n" * 1000)
    assert [builds(), builds()] == [1, 0]
    for damage in (lambda f: os.truncate(f / "tokens.bin", 10), lambda f: (f / "tokens.bin").unlink(),
                   lambda f: (f / "meta.json").write_text('{"dtype'), lambda f: (f / "meta.json").write_text("[]"),
                   lambda f: (f / "meta.json").write_text((f / "meta.json").read_text().replace('print": "', 'print": "0'))):
        for folder in cache.glob("t.txt-bytes-*"):
            damage(folder)
        assert [builds(), builds()] == [1, 0]
    monkeypatch.setattr(D, "FORMAT", D.FORMAT + 1)
    assert [builds(), builds()] == [1, 0]
    assert len(list(cache.glob("t.txt-bytes-????????/meta.json"))) == 4 == len(left_in(cache))


@pytest.mark.parametrize("error", [OSError("disk\nfull"), KeyboardInterrupt(), RuntimeError("bug"), "killed"])
def test_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch, error):
    """Whatever stops it half-way: no folder (a process killed outright leaves a temporary one, which is never read and which
    the next run removes), and the next run makes the whole."""
    make_folder(tmp_path / "text")
    documents = D.documents

    def broken(files, piece):
        for i, document in enumerate(documents(files, piece)):
            if i == 60:
                raise error
            yield document
    if error == "killed":
        code = f"import os, sys; sys.path[:0] = {[str(HERE)]}; import data; data.shutil.copyfileobj = lambda *a: os._exit(9); " \
               f"data.prepare({str(tmp_path / 'text')!r}, cache_dir={str(tmp_path / 'cache')!r})"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 9
        assert [name[-4:] for name in left_in(tmp_path / "cache")] == [".tmp"]
    else:
        with monkeypatch.context() as m, pytest.raises(DataError if isinstance(error, OSError) else type(error)) as e:
            m.setattr(D, "documents", broken)
            prepare(tmp_path / "text", cache_dir=tmp_path / "cache")
        assert len(str(e.value).splitlines()) <= 1 and left_in(tmp_path / "cache") == []
    assert prepare(tmp_path / "text", cache_dir=tmp_path / "cache").meta["documents"] == 120
    [folder] = left_in(tmp_path / "cache")
    assert sorted(os.listdir(tmp_path / "cache" / folder)) == ["meta.json", "tokens.bin"]


class C4Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; server.seen is the (name, Range) of every request, and the settings break things."""

    def do_GET(self):
        server, name, asked = self.server, self.path[1:], self.headers["Range"]
        server.seen.append((name, asked))
        time.sleep(server.delay)
        body, start = server.files.get(name), 0
        if body is None:
            return self.send_error(404)
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                return self.send_error(416)
        self.send_response(206 if asked and server.ranges else 200)
        self.send_header("Content-Length", len(body) - start + server.lie)
        self.send_header("ETag", server.etag)
        self.end_headers()
        self.wfile.write(memoryview(body)[start:server.cut.pop(name, None)])

    def log_message(self, *args):
        pass


SHARDS = [f"c4-train.0000{i}-of-01024.json.gz" for i in (0, 1)]


@pytest.fixture
def c4(monkeypatch):
    """A C4 of two small shards on this machine."""
    server, rng = http.server.ThreadingHTTPServer(("127.0.0.1", 0), C4Handler), random.Random(0)
    server.files = {name: gzip.compress(jsonl(f"shard {i} page {j} {rng.getrandbits(800):x}" for j in range(300)).encode(), mtime=0)
                    for i, name in enumerate(SHARDS)}
    server.seen, server.cut, server.ranges, server.lie, server.etag, server.delay = [], {}, True, 0, '"v1"', 0
    monkeypatch.setattr(D, "C4_URL", f"http://127.0.0.1:{server.server_port}/")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown(), server.server_close()


def shards_in(cache):
    """What lies in cache/c4, the lock aside."""
    return {p.name: p.read_bytes() for p in (cache / "c4").iterdir() if p.name != ".lock"}


def test_c4_is_downloaded_once(tmp_path, c4):
    """The shards asked for, each fetched once even by runs that start together, and kept as it is, give one document per page;
    progress is told; more shards fetch only what is missing; what is there needs no network."""
    told, c4.delay = [], 0.2
    with ThreadPoolExecutor(3) as pool:
        one, *others = pool.map(lambda _: prepare("c4", cache_dir=tmp_path, progress=lambda *step: told.append(step)), range(3))
    assert c4.seen == [(SHARDS[0], None)] and all(same(d, one) for d in others) and shards_in(tmp_path) == {SHARDS[0]: c4.files[SHARDS[0]]}
    size = len(c4.files[SHARDS[0]])
    assert (size, size) in told and one.meta["documents"] == 300 and one.meta["source"] == "c4"
    two = prepare("c4", cache_dir=tmp_path, shards=2)
    assert c4.seen == [(name, None) for name in SHARDS] and shards_in(tmp_path) == c4.files and two.meta["documents"] == 600
    for side in ("train", "val"):
        lines, more = text_of(one, side).splitlines(), text_of(two, side).splitlines()
        assert lines and lines == [line for line in more if line.startswith("shard 0")] and len(more) > len(lines)
    c4.files.clear()
    assert same(prepare("c4", cache_dir=tmp_path), one) and same(prepare("c4", cache_dir=tmp_path, shards=2), two) and len(c4.seen) == 2


@pytest.mark.parametrize("change", [None, "etag", "longer", "shorter", "no ranges"])
def test_c4_goes_on_where_it_was_cut_off(tmp_path, c4, change):
    """A connection that ends half-way is one line that says so; what came is kept, the next run asks for the rest alone. It is not
    joined to the rest of another file: one with another ETag or length is fetched anew, and so it is from a server without ranges."""
    body, name = c4.files[SHARDS[0]], SHARDS[0]
    half = len(body) // 2
    c4.cut = {name: half}
    message = error_of("c4", cache_dir=tmp_path)
    assert f"{half} of {len(body)} bytes" in message and "run again" in message and str(tmp_path / "c4" / name) in message
    [part] = shards_in(tmp_path)
    assert part.startswith(name) and part.endswith(".part") and shards_in(tmp_path)[part] == body[:half]
    if change == "etag":
        c4.etag, c4.files[name] = '"v2"', body[:4] + b"\1" + body[5:]     # the date in gzip's header; as long as before
    elif change in ("longer", "shorter"):
        c4.files[name] = body * 2 if change == "longer" else gzip.compress(jsonl(f"{i} short" for i in range(50)).encode())
    c4.ranges = change != "no ranges"
    prepare("c4", cache_dir=tmp_path)
    again = [(name, None)] if change in ("etag", "longer", "shorter") else []
    assert c4.seen == [(name, None), (name, f"bytes={half}-"), *again] and shards_in(tmp_path) == {name: c4.files[name]}


def test_c4_trouble_is_one_line(tmp_path, c4, monkeypatch):
    """Fewer bytes than announced are never taken for the file; no network or a missing file names the address and the place,
    where it is then found; a file that is no gzip is named too, and a senseless number of shards."""
    place, url, body = tmp_path / "c4" / SHARDS[0], D.C4_URL + SHARDS[0], c4.files[SHARDS[0]]
    c4.lie = 7
    for _ in range(2):
        assert f"{len(body)} of {len(body) + 7} bytes" in error_of("c4", cache_dir=tmp_path) and not place.exists()
    c4.files.clear()
    assert "404" in error_of("c4", cache_dir=tmp_path)
    for problem in (urllib.error.URLError("no\nroute"), TimeoutError("timed out"), http.client.RemoteDisconnected("gone")):
        def offline(request, timeout):
            raise problem
        monkeypatch.setattr(D.urllib.request, "urlopen", offline)
        message = error_of("c4", cache_dir=tmp_path)
        assert url in message and str(place) in message
    place.write_bytes(b"<html>log in</html>")
    assert str(place) in error_of("c4", cache_dir=tmp_path)
    place.write_bytes(body)
    assert prepare("c4", cache_dir=tmp_path).meta["documents"] == 300
    assert all("1024" in error_of("c4", cache_dir=tmp_path, shards=shards) for shards in (0, -1, 1025))


def test_batch_row_is_a_function_of_seed_stream_step_and_index():
    """Row i does not depend on batch_size, start or stop, nor on what was drawn before; it does on seed, stream and step."""
    for n in (1000, 2**17):
        text = (np.arange(n) * 2654435761 >> 7).astype(np.uint16)
        whole = get_batch(text, 16, 64, seed=3, step=5)
        for smaller in (1, 7, 33):
            assert all(torch.equal(x, y[:smaller]) for x, y in zip(get_batch(text, 16, smaller, seed=3, step=5), whole))
        parts = [get_batch(text, 16, 64, 3, 5, start=a, stop=b) for a, b in ((0, 10), (10, 41), (41, None))]
        assert all(torch.equal(torch.cat(p), y) for p, y in zip(zip(*parts), whole))
        for other in (dict(seed=4, step=5), dict(seed=3, step=6), dict(seed=3, step=5, stream=1)):
            assert not torch.equal(get_batch(text, 16, 64, **other)[0], whole[0])


def test_batch_is_windows_of_the_text():
    """int64, contiguous, targets one token ahead; every window can come, the last one included, and none beyond it."""
    text = np.arange(20, dtype=np.uint8)
    idx, targets = get_batch(text, 16, 400, seed=0, step=0)
    assert idx.dtype == targets.dtype == torch.int64 and idx.shape == targets.shape == (400, 16)
    assert idx.is_contiguous() and targets.is_contiguous() and torch.equal(targets, idx + 1)
    assert torch.equal(idx, idx[:, :1] + torch.arange(16)) and set(idx[:, 0].tolist()) == {0, 1, 2, 3}
    assert torch.equal(get_batch(text[:17], 16, 2, 0, 0)[1][1], torch.arange(1, 17))
    for f in (lambda: get_batch(text[:16], 16, 1, 0, 0), lambda: val_batch(text[:16], 16, 16)):
        with pytest.raises(DataError, match="16 tokens"):
            f()


@pytest.mark.parametrize("n", [17, 33, 40, 1000, 1601])
def test_val_batch_is_spread_over_all_of_validation(n):
    """Fixed windows without overlap from the first token to the last, as many as asked for or as there are."""
    for n_tokens in (1, 16, 100, 500, 10**9):
        idx, targets = val_batch(np.arange(n, dtype=np.uint16), 16, n_tokens)
        starts = idx[:, 0]
        assert len(idx) == min(max(n_tokens // 16, 1), (n - 1) // 16) and torch.equal(targets, idx + 1)
        assert starts[0] == 0 and (starts.diff() >= 16).all() and torch.equal(idx, starts[:, None] + torch.arange(16))
        if len(idx) > 1:
            assert targets[-1, -1] == n - 1 and starts.diff().max() - starts.diff().min() <= 1
