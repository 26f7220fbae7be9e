"""Tests of the whole project: `pytest test_gn.py`; no network, no GPU, one thread.

References are independent of the code under test: dense matrices from torch.func, plain loops, torch.optim,
closed forms.
"""

import argparse
import bz2
import collections
import copy
import functools
import gc
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import time
import urllib.response
import weakref
import zipfile
from concurrent.futures import ThreadPoolExecutor
from math import cos, hypot, inf, isclose, isfinite, nan, pi, prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from pytest import raises
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import baselines
import data as D
import gauss_newton as gn
import train
from baselines import DEFAULTS, KFAC, SOAP, hidden_matrices, lr_schedule, make_optimizer
from data import DataError, get_batch, get_encoding, prepare, val_batch
from gauss_newton import (
    GGN,
    ConjugateGradients,
    GaussNewton,
    InnerSolver,
    batch_grad,
    batch_loss,
    cg,
    levenberg_marquardt,
    line_search,
    local_model_once,
    unflatten,
    working_eps,
)
from model import GPT, PRESETS, GPTConfig, differentiable_attention

torch.set_num_threads(1)
HERE = Path(__file__).parent
parametrize = pytest.mark.parametrize
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# ---- models and dense references ----


def gpt(tie=False, seed=0, **sizes):
    """A float64 GPT of some 200 parameters."""
    torch.manual_seed(seed)
    small = dict(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=4, ff_mult=2)
    return GPT(GPTConfig(tie_weights=tie, **{**small, **sizes})).double()


def tokens(rows=5, length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 7, (2, rows, length), generator=generator))


class Between(nn.Module):
    """Any function of the hidden vectors (..., 4) and of this module, between two linear maps; float64."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function = function
        self.inp = nn.Linear(4, 4)
        self.inner = nn.Sequential(*modules)
        self.head = nn.Linear(4, 4)
        self.double()

    def forward(self, x):
        return self.head(self.function(self.inp(x), self))


def slope_of_tanh(h, m):
    with torch.enable_grad():
        h = h if h.requires_grad else h.requires_grad_()
        return torch.autograd.grad(h.tanh().sum(), h, create_graph=True)[0]


attention = F.scaled_dot_product_attention
FOREIGN = dict(
    spare=lambda: Between(lambda h, m: h.tanh(), nn.Linear(2, 2)),
    frozen=lambda: Between(lambda h, m: m.inner(h.tanh()), nn.Linear(4, 4).requires_grad_(False)),
    twice=lambda: Between(lambda h, m: m.inner(h.tanh()), *[nn.Linear(4, 4)] * 2),
    multihead=lambda: Between(
        lambda h, m: m.inner[0](h, h, h, need_weights=False)[0], nn.MultiheadAttention(4, 2, batch_first=True)
    ),
    lstm=lambda: Between(lambda h, m: m.inner(h)[0], nn.LSTM(4, 4, batch_first=True)),
    derivative=lambda: Between(slope_of_tanh),
    transformed=lambda: Between(lambda h, m: torch.func.grad(lambda t: attention(t, t, t).sum())(h)),
    padded=lambda: nn.Sequential(Between(lambda h, m: h.tanh()), nn.ConstantPad1d((0, 1), -inf)),
)


def vectors(rows=6):
    """Inputs (rows, 5, 4) for these, and their largest as the class; seeds the models made next."""
    torch.manual_seed(0)
    x = torch.randn(rows, 5, 4).double()
    return x, x.argmax(-1)


def theta_of(model):
    return gn.flatten(p for p in model.parameters() if p.requires_grad).detach()


def with_theta(model, theta):
    params = gn.trainable(model)
    gn.assign(params, unflatten(theta, params))
    return model


def either(model, inner, **settings):
    """Gauss-Newton by an inner AdamW on micro-batches of two rows, or else by conjugate gradients."""
    return GaussNewton(model, InnerSolver(model, "adamw", rows=2, lr=0.02) if inner else None, **settings)


def scrambled(model):
    """A partition whose parts are neither in order nor in one piece."""
    params = list(model.parameters())
    return [params[-2::-2], params[::-2]]


def close(a, b, tol=1e-9):
    return ((a - b).norm() <= tol * b.norm()).item()


def python(*args, cwd=HERE, **env):
    """A Python process of its own, ended, with what it printed."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def child(script):
    """The numbers that a process of its own prints."""
    return [float(n) for n in python("-c", script).stdout.split()]


def moved_to(ggn, d, prox_linear=False, part=None):
    """(m(d) − m(0), ∇m(d)), where matvec has H from now on."""
    return ggn.move_to(d, part or range(len(ggn.params)), prox_linear)


class Dense:
    """A batch by torch.func alone: loss, gradient g, J (tokens, V, P), G, and the local models as functions
    of v."""

    def __init__(self, model, inputs, targets):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        names, self.params = zip(*named)

        def logits(theta):
            values = dict(zip(names, unflatten(theta, self.params)))
            return functional_call(model, values, (inputs,)).flatten(0, -2)

        theta = theta_of(model)
        self.y = targets.flatten()
        model = copy.deepcopy(model)  # functional_call leaves tensors in modules used twice
        with sdpa_kernel(SDPBackend.MATH):
            self.z = logits(theta).detach()
            self.J = jacrev(logits)(theta)
        self.loss = F.cross_entropy(self.z, self.y).item()
        _, self.g, self.G = self.local(0 * theta, True)

    def local(self, v, prox):
        """What the local model at v is more than the loss, its gradient, and its matrix JᵀHJ."""
        if not prox:
            Gv = self.G @ v
            return (self.g + Gv / 2) @ v, self.g + Gv, self.G
        z = self.z + self.J @ v
        J = self.J
        H = vmap(hessian(F.cross_entropy))(z, self.y) / len(z)
        g = torch.einsum("nvp,nv->p", J, jacrev(F.cross_entropy)(z, self.y))
        G = torch.einsum("nvp,nvw,nwq->pq", J, H, J)
        return F.cross_entropy(z, self.y).item() - self.loss, g, G

    def mask(self, part):
        """1 at the parameters in part, 0 elsewhere."""
        return gn.flatten(torch.full_like(p, i in part) for i, p in enumerate(self.params))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Where every test begins."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


# ---- model ----


@parametrize(
    "name, sizes, vocab, millions",
    [
        ("tiny", "2 4 64 64", 256, 0.164),
        ("small", "4 4 128 256", 256, 1.12),
        ("45m", "4 8 512 1024 True True", 32_000, 45.4),
        ("150m", "12 16 768 1024 True True", 32_000, 134.1),
    ],
)
def test_presets_have_the_stated_sizes(name, sizes, vocab, millions):
    """Depth, heads, width, context and parameters (bytes for the small ones, the paper's 32k for its two, in
    the form of its code)."""
    assert " ".join(map(str, PRESETS[name].values())) == sizes
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab, **PRESETS[name]))
    assert isclose(sum(p.numel() for p in model.parameters()) / 1e6, millions, rel_tol=0.005)


def test_model_errors_name_the_values():
    """What cannot be is a ValueError with the numbers in it."""
    sizes = {"6.*4": dict(n_embd=6, n_head=4), "3": dict(n_embd=6), "r.*0": dict(n_layer=0)}
    for told, wrong in sizes.items():
        with raises(ValueError, match=told):
            gpt(**wrong)
    with raises(ValueError, match="9 tokens.*8"):
        gpt()(torch.zeros(1, 9).long())


@parametrize("tie", [False, True])
def test_layers_partition_and_generate(tie):
    """layers() holds every parameter once (else GaussNewton would refuse it), {embedding}, blocks, {head}
    (tied: no head); generate runs past block_size, and at temperature 0 takes the likeliest token."""
    model = gpt(tie, n_layer=2)
    assert len(GaussNewton(model, parts=model.layers()).parts) == 4 - tie
    start = torch.zeros(2, 1).long()
    assert model.generate(start, 12).shape == (2, 13)
    greedy = model.generate(start, 3, temperature=0)
    assert torch.equal(greedy[:, 1:], model(greedy[:, :-1]).argmax(-1))


# ---- baselines ----

every_baseline = parametrize("name", DEFAULTS)


def baseline_steps(model, opt, seeds):
    """A step for each seed, on next-token cross-entropy of random tokens."""
    for seed in seeds:
        inputs, targets = tokens(4, 8, seed=seed)
        model.zero_grad()
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        if hasattr(opt, "observe"):
            opt.observe(inputs, targets)
        opt.step()


def named(model):
    """A copy of all parameters, by their names."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    """The names of the parameters that are not, bit for bit, what they were."""
    return {name for name, p in named(model).items() if not torch.equal(p, before[name])}


def decayed(params, decay):
    """A group for each parameter; norms and biases do not decay."""
    return [dict(params=[p], weight_decay=decay * (p.ndim > 1)) for p in params]


def dense_soap(x, grads, Q, sides):
    """SOAP on a flattened parameter x in the basis U = Q_L (x) Q_R as one matrix (mn, mn), the first moment
    in the original space, as the paper has it: rate 0.02, decay 0.3, a new basis every 4th step. Yields x
    after each step."""
    b1, b2 = 0.9, 0.95
    m = 0
    v = 0
    C = [0, 0]
    for t, G in enumerate(grads, 1):
        U = np.kron(*Q)
        u = U.T @ G.ravel()
        m = b1 * m + (1 - b1) * U @ u
        v = b2 * v + (1 - b2) * u**2
        direction = U.T @ m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-3)
        x = x - 0.02 * (0.3 * x + U @ direction)
        yield x
        C = [b2 * C[0] + G @ G.T, b2 * C[1] + G.T @ G]
        for k in sides if t % 4 == 0 else ():
            order = np.argsort([-q @ C[k] @ q for q in Q[k].T])
            Q[k] = np.linalg.qr(C[k] @ Q[k][:, order])[0]
            v = v.reshape(G.shape).take(order, axis=k).ravel()


@parametrize("shape, limit, sides", [((3, 7), 99, (0, 1)), ((7, 4), 5, (1,))])
def test_soap_equals_dense_kronecker_derivation(shape, limit, sides):
    """SOAP is Adam in the basis Q_L (x) Q_R written out as one dense matrix, over 12 steps and 3 refreshes,
    also where long sides keep the identity. The first basis is shared, for null vectors are arbitrary; the
    next test shows that it is one of eigenvectors. Gradients are correlated and badly scaled, so that the
    bases move; eps is 1e-3, so that rounding beside a zero does not become a step."""
    rng = np.random.default_rng(0)
    seen = []
    A, B = (rng.normal(size=(d, d)) for d in shape)
    grads = [A @ (rng.normal(size=shape) + 0.3) @ B * 10 ** rng.uniform(-1, 0) for _ in range(12)]
    W = nn.Parameter(torch.from_numpy(rng.normal(size=shape)))
    start = W.detach().numpy().flatten()
    opt = SOAP([W], 0.02, (0.9, 0.95), 1e-3, 0.3, 4, limit)
    for G in grads:
        W.grad = torch.from_numpy(G)
        opt.step()
        seen.append(W.detach().numpy().flatten())
        if len(seen) == 1:
            Q = [np.eye(d) if q is None else q.numpy().copy() for q, d in zip(opt.state[W]["basis"], shape)]
    want = dense_soap(start, grads, Q, sides)
    assert np.allclose(seen, list(want), rtol=0, atol=1e-11)


@parametrize("shape", [(4, 9), (9, 4)])
@parametrize("dtype, tol", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_soap_first_step_is_the_polar_factor(shape, dtype, tol):
    """The first step is not lost: it is lr U Vᵀ of the gradient, so lr along each singular direction and
    nothing else (in float32 too, where rounding beside the diagonal must not become steps of its own)."""
    U, _, Vh = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    W = nn.Parameter(torch.zeros(shape, dtype=dtype))
    W.grad = (U * torch.logspace(0, -1.5, U.shape[1]) @ Vh).to(dtype)
    SOAP([W], lr=0.05).step()
    assert torch.allclose(W.detach().double(), -0.05 * U @ Vh, rtol=0, atol=0.05 * tol)


@pytest.mark.filterwarnings("ignore:an eigendecomposition failed")
@parametrize("fails", [False, True])
@parametrize("name", ["soap", "kfac"])
def test_steps_survive_their_eigendecompositions(name, fails, monkeypatch):
    """float32's eigh, whose LAPACK returns NaN without a word on some gradients of rare tokens, is not asked;
    where float64's fails, the steps are finite all the same."""
    eigh = torch.linalg.eigh

    def treacherous(A):
        assert A.dtype == torch.float64
        if fails:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(A)

    monkeypatch.setattr(torch.linalg, "eigh", treacherous)
    model = gpt().float()
    before = named(model)
    baseline_steps(model, make_optimizer(name, model, precondition_frequency=1), range(2))
    assert moved(model, before) == set(before)
    assert theta_of(model).isfinite().all()


class Short(torch.Tensor):
    """Stands for a tensor on a device without float64."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        out = super().__torch_function__(function, types, args, kwargs)
        if getattr(out, "dtype", None) == torch.float64:
            raise TypeError("this device does not support float64")
        return out


def test_eigendecompositions_need_no_float64_on_the_device():
    """They go over the CPU, with the same result. (A stand-in: no such device was at hand.)"""
    C = torch.randn(5, 5)
    C = C @ C.T
    assert all(map(torch.equal, baselines.eigh(C.as_subclass(Short)), baselines.eigh(C)))


def test_kfac_baseline_equals_dense_derivation():
    """Averaged factors, eigenbases anew every 2nd step, [(L + γ/π) ⊗ (R + γπ)]⁻¹ g with dense matrices, one
    KL clip for groups of unequal rates, momentum, decay on matrices; each step from the same parameters."""
    model = gpt()
    gamma = 3e-4**0.5
    momentum_buffer = 0
    opt = make_optimizer("kfac", model, lr=0.3, momentum=0.8, weight_decay=0.1, precondition_frequency=2)
    opt.param_groups[1]["lr"] = 2.0  # norms, which do not decay
    model(tokens()[0]).sum().backward()
    with raises(RuntimeError, match="observe"):
        opt.step()
    reference = KFAC(model)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        theta, (inputs, targets) = theta_of(model), tokens(8, seed=step)
        reference.update(inputs[:2], targets[:2], None, generator, step / (step + 1))  # a quarter of the rows
        if step % 2 == 0:
            used = factors_of(reference)
        g = batch_grad(model, inputs, targets)[1]
        n = []
        for p, grad, sides in zip(model.parameters(), unflatten(g, reference.params), used):
            p.grad = grad
            if len(sides) == 1:
                n.append(grad / (sides[0] + gamma**2))
                continue
            L, R = (torch.diag(side) if side.ndim == 1 else side for side in sides)
            pi = (R.diag().mean() / L.diag().mean()).sqrt()
            L = L + gamma / pi * torch.eye(len(L))
            R = R + gamma * pi * torch.eye(len(R))
            n.append(torch.linalg.solve(torch.kron(L, R), grad.flatten()))
        n = gn.flatten(n)
        matrix = gn.flatten(torch.full_like(p, p.ndim > 1) for p in model.parameters())
        rate = 2.0 - 1.7 * matrix
        kl = (rate**2 * n * g).sum()
        assert kl > 2e-2  # the clip is on
        momentum_buffer = 0.8 * momentum_buffer + n * (1e-2 / kl).sqrt()
        assert isclose(opt.observe(inputs, targets), 2 / 3 / 4)
        opt.step()
        assert close(theta_of(model), theta - rate * (0.1 * matrix * theta + momentum_buffer), 1e-7)


@parametrize("tie, scale", [(False, "match_rms_adamw"), (True, "original")])
def test_muon_is_torchs_on_the_hidden_matrices(tie, scale):
    """Bitwise torch.optim.Muon on wq, wk, wv, wo, gate, up and down of every block, its steps of AdamW's size
    or of the paper's, and torch.optim.AdamW on embedding, head (tied or not) and norms, run apart."""
    joint = gpt(tie)
    apart = gpt(tie)
    args, _ = train.resolve(f"--opt muon --lr 0.02 --weight_decay 0.1 --muon_scale {scale}".split())
    opt = train.make_stepper(joint, args).optimizer
    hidden = [p for p in apart.blocks.parameters() if p.ndim == 2]
    rest = set(apart.parameters()) - set(hidden)
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, adjust_lr_fn=scale)
    adamw = torch.optim.AdamW(decayed(rest, 0.1), lr=0.02, betas=(0.9, 0.95))
    for seed in range(4):
        baseline_steps(joint, opt, [seed])
        baseline_steps(apart, muon, [seed])  # leaves gradients for the others
        adamw.step()
    assert torch.equal(theta_of(joint), theta_of(apart))


def test_hidden_matrices_of_another_model():
    """The last nn.Linear is its head, and what is frozen is out."""
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5))
    assert hidden_matrices(net) == [net[1].weight]
    net[1].weight.requires_grad_(False)
    assert hidden_matrices(net) == []


def test_soap_is_adamw_on_what_has_not_two_dimensions():
    ours = nn.ParameterList([torch.randn(6).double(), torch.randn(2, 3, 4).double()])
    theirs = copy.deepcopy(ours)
    opt = make_optimizer("soap", ours, 0.02, weight_decay=0.1)
    other = torch.optim.AdamW(decayed(theirs, 0.1), lr=0.02, betas=(0.95, 0.95))
    for _ in range(8):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn_like(a)
        opt.step()
        other.step()
    assert torch.allclose(theta_of(ours), theta_of(theirs), rtol=0, atol=1e-13)


def test_lr_schedule_values():
    """Factors at chosen steps of 100, ten of them warmup: no zero step in warmup, a plateau of 1, both decays
    at halves and ends."""
    steps = 0, 9, 10, 55, 90, 500
    wanted = dict(
        constant=[0.1, 1, 1, 1, 1, 1],
        cosine=[0.1, 1, 1, 0.5, 0.5 * (1 + cos(pi * 8 / 9)), 0],
        wsd=[0.1, 1, 1, 1, 0.5, 0],
    )
    for schedule, want in wanted.items():
        assert np.allclose([lr_schedule(step, 100, schedule, 10) for step in steps], want)


def test_baselines_refuse_nonsense():
    """Unknown names say what there is to choose; settings that SOAP cannot use raise. SOAP and K-FAC refuse
    bfloat16 before the first step, and say what to do instead."""
    with raises(ValueError, match="adamw, sgd, muon, soap"):
        make_optimizer("adamx", gpt())
    with raises(ValueError, match="wsd"):
        lr_schedule(0, 10, "linear")
    with raises(ValueError):
        SOAP([nn.Parameter(torch.zeros(2, 2))], eps=nan)
    for name in ("soap", "kfac"):
        with raises(ValueError, match="bfloat16.*autocast"):
            make_optimizer(name, gpt().bfloat16())


# ---- what torch promises of an optimizer ----


@every_baseline
def test_optimizer_groups(name):
    """Every parameter sits in one group at its default rate, also where a group is added (K-FAC, which has no
    factors for it, makes no step then); rates of 0 stop all."""
    model = gpt(n_layer=2)
    model.blocks[1].requires_grad_(False)
    opt = make_optimizer(name, model)
    model.requires_grad_(True)
    baseline_steps(model, opt, [9])
    opt.add_param_group(dict(params=list(model.blocks[1].parameters())))
    if name == "kfac":
        before = named(model)
        with raises(RuntimeError, match="new optimizer"):
            baseline_steps(model, opt, [9])
        assert not moved(model, before)
        opt = make_optimizer(name, model)
    grouped = [id(p) for group in opt.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert {group["lr"] for group in opt.param_groups} == {DEFAULTS[name]["lr"]}
    before = named(model)
    for group in opt.param_groups:
        group["lr"] = 0.0
    baseline_steps(model, opt, range(2))
    assert not moved(model, before)


@every_baseline
def test_optimizer_step(name):
    """step(closure) returns its loss; gradients keep their bits, and so does a parameter without one, though
    it had one before, momentum and decay included."""
    model = gpt(n_layer=2)
    opt = make_optimizer(name, model, weight_decay=0.1, precondition_frequency=3)
    baseline_steps(model, opt, range(2))
    if name == "kfac":
        opt.observe(*tokens())
    before = named(model)
    grads = {}

    def closure():
        opt.zero_grad()
        loss = model(tokens()[0]).square().mean()
        loss.backward()
        model.blocks[1].zero_grad()
        grads.update({p: p.grad.clone() for p in model.parameters() if p.grad is not None})
        return loss

    assert opt.step(closure).item() > 0
    assert moved(model, before) == {n for n in before if not n.startswith("blocks.1")}
    assert all(torch.equal(p.grad, grad) for p, grad in grads.items())


@every_baseline
def test_optimizer_goes_on_bit_for_bit_from_its_state_dict(name):
    """In the middle of a run, under a scheduler: the original's next steps and its twin's have the same bits,
    and neither moves the other."""
    model = gpt(n_layer=2)
    opt = make_optimizer(name, model, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    for seed in range(7):
        baseline_steps(model, opt, [seed])
        schedule.step()
    twin = gpt(seed=1, n_layer=2)
    again = make_optimizer(name, twin)
    baseline_steps(twin, again, [99])  # one in use takes the state too
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    start = named(model)
    baseline_steps(model, opt, range(7, 12))  # refreshes eigenbases, at step 10
    assert not moved(twin, start)
    baseline_steps(twin, again, range(7, 12))
    assert torch.equal(theta_of(twin), theta_of(model))


# ---- Kronecker factors ----


def make_kfac(model, inputs, targets, micro_batch=None, **settings):
    kfac = KFAC(model, **settings)
    kfac.update(inputs, targets, micro_batch, torch.Generator().manual_seed(0))
    kfac.decompose()
    return kfac


def factors_of(kfac):
    return [state["factors"] for state in kfac.state.values()]


def readable(tie):
    """An embedding, a norm, biases: one of each kind of parameter, no mixing of tokens."""
    model = nn.Sequential(
        nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 7, bias=False)
    )
    if tie:
        model[0].weight = model[4].weight
    return model.double()


def plain_factors(model, inputs, targets, batch_labels):
    """{parameter: [L, R] or [diagonal]}, L = mean δδᵀ and R = mean aaᵀ, module by module, for the labels at
    three quarters of the probability, or the targets; the diagonal from squares of sums over three rows."""
    h = [inputs]
    for m in model:
        h.append(m(h[-1]))
        h[-1].retain_grad()
    z = h[-1].flatten(0, 1)
    y = targets.flatten() if batch_labels else (z.softmax(-1).cumsum(-1) > 0.75).int().argmax(-1)
    F.cross_entropy(z, y, reduction="sum").backward()
    found = {}
    n = inputs.numel()
    for m, a, out in zip(model, h, h[1:]):
        delta = out.grad
        L = torch.einsum("rti,rtj->ij", delta, delta) / n
        if isinstance(m, nn.LayerNorm):
            for p, grads in ((m.weight, delta * F.layer_norm(a, (4,))), (m.bias, delta)):
                found[p] = [torch.diag(sum(rows.sum((0, 1)) ** 2 for rows in grads.split(3))) / n]
        elif isinstance(m, nn.Linear):
            found[m.weight] = [L, torch.einsum("rti,rtj->ij", a, a) / n]
            if m.bias is not None:
                found[m.bias] = [L, torch.ones(1, 1).double()]
        elif isinstance(m, nn.Embedding) and m.weight is not model[4].weight:
            found[m.weight] = [torch.diag(a.flatten().bincount(minlength=7)).double() / n, L]
    return found


@parametrize("batch_labels", [False, True])
@parametrize("tie", [False, True])
@parametrize("max_side", [4096, 5])
def test_kfac_is_the_kronecker_product_of_plain_factors(tie, max_side, batch_labels, monkeypatch):
    """For weights, embedding (its side the token frequencies; tied: the head's factors), biases and norms
    (a diagonal) `apply` is the dense K = L ⊗ R in K (K + λI)⁻¹, from two squares of uneven pieces and a
    running average; sides above max_side are diagonal. Every draw is 3/4 here: no sign changes."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, 0.75))
    monkeypatch.setattr(KFAC, "SQUARES", 2)
    torch.manual_seed(0)
    model = readable(tie)
    wanted = []
    batches = tokens(seed=1), tokens()
    kfac = make_kfac(model, *batches[0], micro_batch=2, max_side=max_side, batch_labels=batch_labels)
    kfac.update(*batches[1], micro_batch=2, decay=0.75)
    kfac.decompose()
    first, second = (plain_factors(model, *batch, batch_labels) for batch in batches)
    v = torch.randn_like(theta_of(model))
    for p, own in zip(kfac.params, unflatten(v, kfac.params)):
        sides = [0.75 * a + 0.25 * b for a, b in zip(first[p], second[p])]
        K = functools.reduce(torch.kron, [torch.diag(S.diag()) if len(S) > max_side else S for S in sides])
        A = K + 0.1 * torch.eye(len(K)).double()
        wanted.append(torch.linalg.solve(A, K @ own.flatten()))
    for part in (range(len(wanted)), [3, 1]):
        own = gn.select(v, kfac.params, part)
        got = kfac.apply(own, lambda S: S / (S + 0.1), part)
        assert close(got, torch.cat([wanted[i] for i in part]), 1e-6)  # the labels' softmax is float32


def test_kfac_of_batch_labels_adds_up_squares_of_sequences(monkeypatch):
    """Random signs make the square of a sum of sequences' gradients, for a norm (it has no factors), that of
    their squares: the mean of 4,000 draws is within five standard errors, at most √2 of the mean each."""
    monkeypatch.setattr(KFAC, "SQUARES", 1)
    model = readable(False)
    inputs, targets = tokens(6)
    gradients = [Dense(model, x, y).g[28:32] for x, y in zip(inputs.split(1), targets.split(1))]
    want = sum(g**2 for g in gradients)
    kfac = KFAC(model, batch_labels=True)
    generator = torch.Generator().manual_seed(0)
    got = 0
    for _ in range(4_000):
        kfac.update(inputs, targets, 4, generator)
        got = got + factors_of(kfac)[1][0] / 4_000
    assert ((got - want).abs() < 5 * (2 / 4_000) ** 0.5 * want).all()


def test_kfac_sees_what_multiplies_its_input(monkeypatch):
    """A linear map that two rows do not use, as an expert's: the factors that it has anyway. Written another
    way, its weight kept as (in, out) as in GPT-2: nn.Linear's factors in reverse."""
    monkeypatch.setattr(KFAC, "SQUARES", 1)
    (x, y), linear = vectors(), nn.Linear(4, 4)
    model = Between(lambda h, m: m.inner(h), linear)
    want = factors_of(make_kfac(model, x, y))
    model.function = lambda h, m: m.inner(h) if len(h) > 2 else h
    torch.testing.assert_close(factors_of(make_kfac(model, x, y)), want)
    use, rest = model.function, lambda h, m: h
    for first, second in ((use, rest), (rest, use)):  # a whole batch without it
        model.function = first
        kfac = make_kfac(model, x, y)
        model.function = second
        kfac.update(x, y, None, torch.Generator().manual_seed(0), 0.5)
        torch.testing.assert_close(factors_of(kfac)[2], want[2])
    want[2].reverse()
    linear.weight.data = linear.weight.data.T.clone()
    model.function = lambda h, m: torch.addmm(linear.bias, h.flatten(0, 1), linear.weight).view_as(h)
    torch.testing.assert_close(factors_of(make_kfac(model, x, y)), want, rtol=1e-9, atol=1e-12)


def hugging_face(name):
    """A small GPT-2 or Llama with random weights; it returns logits."""
    hf = pytest.importorskip("transformers")
    config = hf.AutoConfig.for_model(
        name,
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.register_forward_hook(lambda m, x, out: out.logits)
    return model


@parametrize("kind", ["perceptron", "perceptron 100", "gpt2", "gpt2 inner", "llama", "llama inner"])
def test_steps_start_anywhere(kind):
    """Five steps with nothing set, on five batches of a classification or a counting task, whatever the
    inputs' scale, and by inner steps on other libraries' models (GPT-2 has transposed weights, Llama grouped
    queries, both tied): none is rejected, and the loss on other data is lower than by AdamW at the best of
    three rates. K-FAC has factors for all of GPT-2's maps."""
    name, *how = kind.split()
    torch.manual_seed(1)
    centres = torch.randn(10, 16)

    def batch(seed):
        torch.manual_seed(seed)
        if name == "perceptron":
            y = torch.randint(0, 10, (512,))
            return (centres[y] + torch.randn(512, 16)) * (100 if how else 1), y
        x = torch.randint(0, 50, (128, 12))
        return x, (3 * x + 1) % 50

    def build():
        torch.manual_seed(0)
        if name != "perceptron":
            return hugging_face(name)
        hidden = nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(64, 10))

    model = build()
    opt = GaussNewton(model, InnerSolver(model, "muon", rows=4) if "inner" in how else None)
    assert all(opt.step(*batch(seed))["accepted"] for seed in range(5))
    if kind == "gpt2":
        # embeddings, maps, their biases
        assert sum(len(sides) == 2 for sides in factors_of(opt.solver.kfac)) >= 17
    loss = batch_loss(model, *batch(9))
    for lr in (3e-3, 1e-2, 3e-2):
        other = build()
        adam = torch.optim.AdamW(other.parameters(), lr)
        for seed in range(5):
            x, y = batch(seed)
            adam.zero_grad()
            F.cross_entropy(other(x).flatten(0, -2), y.flatten()).backward()
            adam.step()
        assert loss < batch_loss(other, *batch(9))


def test_kfac_of_odd_parameters():
    """nn.MultiheadAttention's in_proj_weight (3E, E): L is E[δδᵀ] of all three together, R is E[aaᵀ]. A 1-D
    parameter that is added to no vector of its own length has no such factors, but its diagonal."""
    batch = vectors()
    model = FOREIGN["multihead"]()
    factors = factors_of(make_kfac(model, *batch))  # of inp's weight and bias, then of its
    a = model.inp(batch[0]).flatten(0, 1)
    assert factors[2][0].shape == (12, 12) and close(factors[2][1], a.T @ a / len(a))
    assert [side.shape for side in factors[3]] == [(12, 12), (1,)]
    for size in (4, 1):
        model = Between(lambda h, m: h * (1 + m.scale) if size > 1 else h + m.scale)
        model.scale = nn.Parameter(torch.full((size,), 0.1).double())
        factors = factors_of(make_kfac(model, *batch))
        assert [len(sides) for sides in factors].count(1) == 1


# ---- one Gauss-Newton step ----


@parametrize("layerwise", [False, True])
@parametrize("search", [None, tokens(3, seed=3)], ids=["rows", "other"])
def test_a_step_is_its_solvers_along_its_search(layerwise, search, monkeypatch):
    """The solver is given the parts, and of the batch the 20 rows that have targets (that it gives
    −(G + λI)⁻¹ g is shown below). The last 8 of them (40 %), or other data, decide α by their least loss;
    θ moves by αd, and the record and the next λ are their definitions, recomputed."""
    model, (inputs, targets) = gpt(), tokens(20)
    solver = ConjugateGradients(model, "gn", 1, 300, 0.01, "none", curvature_frac=1.0)
    monkeypatch.setattr(gn, "SEARCH_FRAC", 0.4)
    opt = GaussNewton(model, solver, scrambled(model) if layerwise else None, "grid")
    theta = theta_of(model)
    dense = Dense(model, inputs, targets)
    d = copy.deepcopy(solver).solve(opt.parts, inputs, targets).direction
    ignored = torch.full_like(targets, -100)
    record = opt.step(inputs.repeat(3, 1), torch.cat([ignored, targets, ignored]), search)
    alpha = record["alpha"]
    assert 0 < alpha < 1 and close(theta_of(model) - theta, alpha * d)
    assert close(solver.direction, alpha * d)
    x, y = search or (inputs[-8:], targets[-8:])
    lengths = [2 ** (-i / 2) for i in range(10)]
    start, *losses = (batch_loss(with_theta(model, theta + t * d), x, y) for t in [0, *lengths])
    slope = dense.g @ d
    wanted = dict(
        alpha=lengths[np.argmin(losses)],
        loss=dense.loss,
        predicted=alpha * slope + alpha**2 * (-slope - 0.01 * d @ d) / 2,
        actual=min(losses) - start,
        damping=0.01,
        grad_norm=dense.g.norm(),
        work=2 + 4 / 3 * record["products"] + 4 / 3 + 11 / 3 * len(x) / 20,
    )
    if layerwise:
        del wanted["work"]
    for key, want in wanted.items():
        assert isclose(record[key], want, rel_tol=1e-6), key
    assert isclose(solver.damping, levenberg_marquardt(0.01, record["rho"], alpha))


def test_a_short_step_gives_lambda_back():
    """Slices had lowered it to 1/8 of what the step began with; λ / α of that is next."""
    solver = ConjugateGradients(gpt())
    solver.damping, solver.next_damping, solver.direction = 0.8, 0.1, torch.zeros(1)
    solver.adapt(0.9, 0.25)
    assert isclose(solver.damping, 0.8 / 0.25)


def test_a_part_at_rest_leaves_lambda_alone():
    """Two of six parameters are not used. Raised in each slice, their λ would make the mean 25-fold."""
    data, model = vectors(64), FOREIGN["spare"]()
    assert GaussNewton(model, parts=[[p] for p in model.parameters()]).step(*data)["damping"] < 6


@parametrize(
    "owner, name, change, reason",
    [
        (baselines, "cross_entropy_sum", lambda t, call: t * nan, "loss or gradient not finite"),
        (GGN, "matvec", lambda t, call: t * inf, "nonfinite"),
        (GGN, "matvec", lambda t, call: t * -1e6, "indefinite"),
        (gn, "batch_loss", lambda t, call: t * 10 if call else t, "line search: no decrease"),
        (gn, "batch_loss", lambda t, call: 2 - 1e-9 if call else 2, "the loss fell by 1.0e-09"),
    ],
)
def test_rejected_step_changes_no_parameter(owner, name, change, reason, monkeypatch):
    """Whatever the trouble: parameters bitwise as they were, λ 16 times the last one, the last direction
    forgotten, the reason recorded; and once it is over the next step is taken."""
    model = gpt()
    data = tokens(8)
    monkeypatch.setattr(gn, "SEARCH_FRAC", 1.0)
    opt = GaussNewton(model, newton_steps=1, line_search="grid")
    opt.step(*data)
    before = named(model)
    damping = opt.solver.damping
    healthy = getattr(owner, name)
    with monkeypatch.context() as m:
        calls = itertools.count()
        m.setattr(owner, name, lambda *arguments: change(healthy(*arguments), next(calls)))
        record = opt.step(*data)
        assert not record["accepted"] and reason in record["reason"]
        assert not moved(model, before)
        assert isclose(opt.solver.damping, damping * 16)
        assert opt.solver.direction is None
    assert opt.step(*data)["accepted"]


@parametrize("where", ["gradient", "kfac", "linearise", "cg", "line search", "inner"])
def test_interrupted_step_restores_the_parameters(where):
    """Ctrl-C or out-of-memory at any stage, the third trial of a step length included, which says nothing
    about λ; the next step goes well."""
    model = gpt()
    data = tokens(8)
    seen = []

    def progress(what, done=0, total=0):
        seen.append(what)
        if what == where and seen.count(what) == (1 if what in ("gradient", "linearise", "kfac") else 3):
            raise KeyboardInterrupt

    opt = either(model, where == "inner", line_search="grid", progress=progress)
    before, damping = named(model), opt.solver.damping
    with raises(KeyboardInterrupt):
        opt.step(*data)
    assert not moved(model, before)
    assert opt.solver.damping == damping
    assert opt.step(*data)["accepted"]


def test_what_cannot_be_stepped_is_named():
    """No or mixed parameters, parts that are no partition (missing, empty, foreign), unknown words,
    numbers out of range, settings that would be left aside: an error with the cause, before anything is
    computed; and parameters that are another model's, or changed since, before a step."""
    model = gpt()
    mixed = gpt()
    mixed.head.float()
    layers = model.layers()
    cases = [
        (gpt().requires_grad_(False), None, "no trainable"),
        (mixed, None, "float32 and torch.float64"),
        (model, layers[1:], "exactly once"),
        (model, [*layers, []], "none empty"),
        (model, layers + [[nn.Parameter(torch.ones(1))]], "exactly once"),
    ]
    for bad, parts, named in cases:
        with raises(ValueError, match=named):
            GaussNewton(bad, parts=parts)
    settings = {
        "line_search": "grit",
        "curvature_frac": 0,
    }
    of_inner = {"rows": 0, "damping": nan}
    for build, wrong in ((GaussNewton, settings), (InnerSolver, of_inner)):
        for name, value in wrong.items():
            with raises(ValueError, match=name):
                build(model, **{name: value})
    with raises(TypeError, match="damping"):
        GaussNewton(model, InnerSolver(model), damping=1.0)
    with raises(ValueError, match="InnerSolver was made for other"):
        GaussNewton(model, InnerSolver(gpt())).step(*tokens())
    opt = GaussNewton(model)
    model.embed.requires_grad_(False)
    with raises(ValueError, match="frozen"):
        opt.step(*tokens())


@parametrize("name", ["full_gn", "inner", *DEFAULTS])
def test_step_inside_autocast(name):
    """Only the model works in bfloat16, in the closure and in K-FAC's observe too: the steps are those
    of a model whose own forward opens autocast. The GPT leaves that of others alone."""
    ends = []
    for outside in (False, True):
        x, y = vectors(16)
        x = x.float()
        model = Between(lambda h, m: h.tanh()).float()
        if not outside:
            model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)

        def closure():
            loss = F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())
            opt.zero_grad()
            loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            if name in DEFAULTS:
                opt = make_optimizer(name, model, precondition_frequency=2)
                for _ in range(4):
                    if name == "kfac":
                        opt.observe(x, y)
                    opt.step(closure)
            else:
                assert either(model, name == "inner").step(x, y)["accepted"]
            assert torch.is_autocast_enabled("cpu") == outside
        ends.append(theta_of(model))
    assert torch.equal(*ends)
    with torch.autocast("cpu", torch.bfloat16):
        assert GaussNewton(gpt()).step(*tokens())["accepted"]


# ---- the solver by conjugate gradients ----


def test_preconditioner_inverts_what_it_stands_for(monkeypatch):
    """With K-FAC's matrix in G's place one iteration of CG is the whole solve, damping included, which is no
    part of the decrease. M by dense roots: √unit √(block of K + unit / 100), unit² = (mean eigenvalue of K)
    (that of the block + a millionth of K's)."""
    model = gpt()
    data = tokens(8)
    solver = ConjugateGradients(model, "gn", newton_steps=1, cg_iters=1, damping=0.3)
    parts = GaussNewton(model, solver, scrambled(model)).parts
    monkeypatch.setattr(GGN, "matvec", lambda ggn, v, part: solver.kfac.apply(v, torch.clone, part))
    found = solver.solve(parts, *data)
    g = Dense(model, *data).g
    K = torch.stack([solver.kfac.apply(e, torch.clone) for e in torch.diag(g / g)])  # of the identity
    mean = K.diag().mean()
    roots = []
    for own in torch.arange(len(g)).split([p.numel() for p in solver.params]):
        block = K[own][:, own]
        unit = (mean * (block.diag().mean() + 1e-6 * mean)) ** 0.5
        values, Q = torch.linalg.eigh(unit * block)
        roots.append(Q * (values + 0.01 * unit**2) ** 0.5 @ Q.T)
    d = torch.linalg.solve(K + 0.3 * torch.block_diag(*roots), -g)
    assert close(found.direction, d)
    assert isclose(found.decrease, -(g + K @ d / 2) @ d)


@parametrize("prox", [False, True])
@parametrize("layerwise", [False, True])
def test_newton_steps_are_the_dense_ones(prox, layerwise):
    """Two outer steps, each of three Newton steps on 32 of 100 rows with the slope of all: each length, λ and
    step by dense matrices, from half of the last outer step; and what is promised is m(0) − m(d), to second
    order in the last Newton step."""
    model = gpt()
    local_model = "prox_linear" if prox else "gn"
    solver = ConjugateGradients(model, local_model, 3, 400, 0.01, "none", curvature_frac=0.97)
    parts = GaussNewton(model, solver, scrambled(model) if layerwise else None).parts
    last = 0 * theta_of(model)
    start = 0.01
    lengths = set()
    for outer in range(2):
        inputs, targets = tokens(100, 3, seed=outer)
        theta = theta_of(model)
        whole = Dense(model, inputs, targets)
        found = solver.solve(parts, inputs, targets)
        d = 0 * theta
        ends = []
        promised = 0.0
        for part in parts:
            damping = start
            mask = whole.mask(part)
            own = 0.5 * last * mask
            delta = None
            for x, y in zip(inputs.split(32)[:3], targets.split(32)):
                few = Dense(model, x, y)
                correction = whole.g - few.g

                def m(v):
                    return few.local(v, prox)[0] + correction @ v

                if delta is not None:
                    t = min([0, *(2**-i for i in range(6))], key=lambda t: m(own + t * delta))
                    lengths.add(t)
                    own = own + t * delta
                    damping *= 0.5 if t == 1 else 1 / max(t, 1 / 4)
                _, slope, G = few.local(own, prox)
                slope = slope + correction
                A = G * torch.outer(mask, mask) + damping * torch.eye(len(mask))
                delta = torch.linalg.solve(A, -slope * mask)
            promised -= m(own) + slope @ delta + delta @ G @ delta / 2
            d += own + delta
            ends.append(damping)
        assert close(found.direction, d, 1e-6)
        assert isclose(found.decrease, promised, rel_tol=1e-6)
        start = prod(ends) ** (1 / len(ends))
        assert isclose(found.record["damping"], start, rel_tol=1e-9)
        solver.adapt(0.5, 0.5)
        last = 0.5 * d
        with_theta(model, theta + last)
    assert len(lengths) > 1  # or the test would show too little


# ---- the inner solver ----


@parametrize("bf16", [False, True])
def test_difference_of_logits(bf16):
    """G v by the inner solver's J v, a difference over h: rounding by eps makes an error of some √eps, in
    each precision by its own h, however large the rows of tokens never seen. With the h of float32 nothing is
    left of G v in bfloat16."""
    model, (inputs, targets) = gpt(vocab_size=9), tokens()
    model.embed.weight.data[7:] *= 1e4
    ggn = GGN(model, inputs, targets)
    v = ggn.grad
    Gv = ggn.matvec(v)
    model.float().bf16 = bf16
    theta = list(model.parameters())

    def found(eps):
        batch = theta, inputs, targets, unflatten(v.float(), theta), targets.numel()
        return gn.flatten(local_model_once(model, [range(len(theta))], False, eps, *batch)[3:]) - v

    eps = working_eps(model, inputs, targets)
    assert eps == 2.0 ** (-7 if bf16 else -23)
    assert close(found(eps), Gv, 5 * eps**0.5) and bf16 != close(found(2**-23), Gv, 0.5)


@parametrize("prox", [False, True])
@parametrize("layerwise", [False, True])
def test_inner_solver_is_a_plain_loop(prox, layerwise):
    """Three solves, each of one or two passes over 17 micro-batches, the last of one row, against AdamW on
    dense J and H, its decay that of v: v, and loss, slope and decrease weighted by rows. The second begins
    with what the first step left of v and the old moments, which a checkpoint holds, the third, after
    `forget` or by `reset`, at 0."""
    model, shift, (inputs, targets) = gpt(), gpt(), tokens(33, 2)
    passes = 1 if prox else 2
    local_model = "prox_linear" if prox else "gn"
    settings = dict(local_model=local_model, schedule="global_cosine", warmup=9, outer_steps=3)
    build = functools.partial(InnerSolver, model, "adamw", 2, passes, 0.05, (0.7, 0.9), **settings)
    solver = build(damping=0.4)
    parts = GaussNewton(model, solver, scrambled(model) if layerwise else None).parts
    params = list(shift.parameters())  # v
    for outer in range(3):
        theta = theta_of(model)
        loss = slope = fall = 0.0
        if outer == 1:
            state = solver.state_dict()
            solver = build(damping=0.4)
            solver.load_state_dict(state)
        else:
            with_theta(shift, 0 * theta)
            adam = torch.optim.AdamW(decayed(params, 0.4), betas=(0.7, 0.9))
        if outer == 2:
            solver.reset = layerwise
            if not layerwise:
                solver.forget()
        for k, (x, y) in enumerate([*zip(inputs.split(2), targets.split(2))] * passes):
            dense = Dense(model, x, y)
            v = theta_of(shift)
            late = len(x) / 3 * (k >= 17 * passes - 2)  # the last sixteenth of the last pass, rounded up
            total = 0.0
            for part in parts:
                mask = dense.mask(part)
                change, g, _ = dense.local(v * mask, prox)
                fall = fall - late * float(change)
                total = total + g * mask * min(1.0, 1 / (g * mask).norm().item())
            for p, t in zip(params, unflatten(total, params)):
                p.grad = t
            loss += len(x) / 33 / passes * dense.loss
            slope += late * float(dense.g @ v)
            for group in adam.param_groups:
                group["lr"] = 0.05 * gn.inner_schedule("global_cosine", outer, 3, k, 17 * passes, 9)
            adam.step()
        found = solver.solve(parts, inputs, targets)
        each = sum(1 / 3 + gn.backward_work(solver.params, part) for part in parts)  # a J v and a backward
        assert isclose(found.record["work"], passes * (1 / 3 + each))
        d = theta_of(shift)
        assert close(found.direction, d, 1e-6)
        assert isclose(found.loss, loss, rel_tol=1e-6) and isclose(found.slope, slope, rel_tol=1e-6)
        # a difference of larger numbers, by a J v that is known to some √eps
        assert isclose(found.decrease, fall, rel_tol=1e-5, abs_tol=1e-7)
        with_theta(model, theta + 0.7 * d)
        with_theta(shift, 0.3 * d)
        solver.adapt(None, 0.7)


def test_inner_schedule_values():
    """Factors in the middle of the third of 4 outer steps of 10 inner ones; warmup."""
    wanted = dict(
        constant_with_inner_cosine=0.5,
        cosine_with_global_schedule=0.25,
        global_cosine=(1 + cos(pi * 5 / 8)) / 2,
    )
    for kind, want in wanted.items():
        assert isclose(gn.inner_schedule(kind, 2, 4, 5, 10), want)
    assert isclose(gn.inner_schedule("constant_with_inner_cosine", 1, 4, 0, 10, warmup=20), 0.55)


# ---- the authors' code: natalieabreu/full-gauss-newton, commit 0c14e7e, in float64 ----


def authors_case(released=False):
    """A GPT in LLaMA's form or as they released it, rows of tokens, and v, as their code was given them."""
    model = GPT(GPTConfig(97, 12, 2, 2, 16, qk_norm=released, gelu=released)).double()
    of_weights, of_v = (np.random.RandomState(seed).standard_normal for seed in (0, 1))
    v = []
    for name, p in model.named_parameters():
        mean = float("norm" in name and "bias" not in name)
        std = 0.1 if p.ndim == 1 else 1.0 if name == "embed.weight" else p.shape[1] ** -0.5
        p.data = torch.tensor(mean + std * of_weights(p.shape))
        v.append(torch.tensor(0.1 * (mean or std) * of_v(p.shape)))
    rows = """40 15 72 22 43 82 75 7 34 49 95 75 85 47 63 31 90 20 37 39 67 4 42 51 38 33
        58 67 69 88 68 46 70 95 83 31 66 80 52 76 50 4 90 63 79 49 39 46 8 50 15 8"""
    return model, torch.tensor(np.fromstring(rows, int, sep=" ").reshape(4, 13)), gn.flatten(v)


def shifted(rows):
    return rows[:, :-1], rows[:, 1:]


@parametrize(
    "released, numbers",
    [
        (
            False,
            """5.19557876045
            5.16207422549 1.34060150754    5.16178950382 1.34058253572
            5.20991814542 0.206021114334   5.20995944646 0.206049642153
            5.19190987787 0.918732866694   5.1916347418  0.919108363874
            5.17118864182 0.75164469541    5.17117565836 0.751029379358
            5.17766595392 0.598559071121   5.17767871647 0.598504193523""",
        ),
        (
            True,
            """4.86746680821
            4.92396025921 1.49836379533    4.92429676061 1.50356754179
            4.86442929446 0.222268952941   4.86444909576 0.222357985379
            4.88354595644 1.07563647132    4.88348117245 1.07752815373
            4.92526890629 0.833202326636   4.92524518521 0.833183131563
            4.85705628286 0.579263884837   4.85704095909 0.579304032789""",
        ),
    ],
)
def test_local_models_are_the_authors(released, numbers):
    """The loss, and at v the objective and the norm of the gradient of GN and of prox-linear: all parameters,
    then each layer with the others at rest. So rotary positions and causality are theirs too."""
    model, rows, v = authors_case(released)
    ggn = GGN(model, *shifted(rows))
    found = [ggn.loss]
    parts = GaussNewton(model).parts + GaussNewton(model, parts=model.layers()).parts
    for part, prox in itertools.product(parts, (False, True)):
        change, gradient = moved_to(ggn, gn.select(v, ggn.params, part), prox, part)
        found += [ggn.loss + change, gradient.norm()]
    assert np.allclose(found, np.fromstring(numbers, sep=" "), rtol=1e-11, atol=0)


@parametrize(
    "local_model, rate, numbers",
    [
        ("gn", 0.02, "1 45.5267856119 1 45.6405878047 1 45.8174263805"),
        ("prox_linear", 0.1, "0.5 46.1928983305 0.353553390593 47.3194064619 0.353553390593 48.8105270282"),
    ],
)
def test_whole_runs_are_the_authors(local_model, rate, numbers):
    """α and the norm of θ after each of three steps: five inner steps of AdamW and a line search on as many
    new rows. J v is exact there, a difference of logits here."""
    r = np.random.RandomState(3)
    follows = r.permutation(97)
    columns = [r.randint(0, 97, 120)]
    for _ in range(12):
        columns.append(np.where(r.rand(120) < 0.8, follows[columns[-1]], r.randint(0, 97, 120)))
    batches = torch.tensor(np.stack(columns, 1)).view(3, 2, 20, 13)
    model = authors_case()[0]
    solver = InnerSolver(model, "adamw", 4, 1, rate, (0.9, 0.999), local_model=local_model)
    opt = GaussNewton(model, solver, line_search="grid5")
    found = []
    for batch, others in batches:
        found += [opt.step(*shifted(batch), shifted(others))["alpha"], theta_of(model).norm()]
    assert np.allclose(found, np.fromstring(numbers, sep=" "), rtol=2e-9)


# ---- cg ----


def spd(n=30, low=-3, seed=0):
    """A (n, n) with eigenvalues from 10^low to 1, b, and a close but not perfect inverse, P⁻¹."""
    torch.manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n).double()).Q
    ew = torch.logspace(low, 0, n).double()
    inverse = (Q / (ew * (1 + torch.rand(n)))) @ Q.T
    return (Q * ew) @ Q.T, torch.randn(n).double(), inverse


@parametrize("preconditioned", [False, True])
def test_cg_iterates_are_the_least_of_their_krylov_spaces(preconditioned):
    """values[k] is the quadratic at the k-th iterate and the least over the k-th Krylov space, so that it
    never rises: CG is CG, with any preconditioner. It ends with "residual" at the first of these iterates
    with ‖b − Ax‖ <= rtol ‖b‖."""
    A, b, inverse = spd()
    inverse = inverse if preconditioned else torch.eye(30).double()
    B = torch.zeros(30, 0).double()
    residuals = []

    def phi(x):
        return (0.5 * x @ A @ x - b @ x).item()

    for k in range(9):
        x, iterations, reason, values = cg(A.matmul, b, inverse.matmul, max_iter=k)
        least = B @ torch.linalg.solve(B.T @ A @ B, B.T @ b)
        assert iterations == len(values) - 1 == k and reason == "max_iter"
        for want in (phi(x), phi(least)):
            assert isclose(values[k], want, rel_tol=1e-7, abs_tol=1e-12)
        residuals.append(((b - A @ x).norm() / b.norm()).item())
        new = A @ B[:, -1:] if k else b[:, None]
        B = torch.linalg.qr(torch.cat([B, inverse @ new], 1)).Q
    for rtol in residuals:
        first = [r <= rtol for r in residuals].index(True)
        # r leaves b − Ax by some eps ‖x‖/‖b‖ < 5e-14
        last = cg(A.matmul, b, inverse.matmul, rtol=rtol + 1e-12)
        assert (last.reason, last.iterations) == ("residual", first)


def test_cg_trouble_is_a_reason():
    """b = 0 gives exactly 0; numbers that are not finite, an indefinite matrix or preconditioner: the last
    good iterate and the reason."""
    A, b, _ = spd()
    zero = cg(A.matmul, 0 * b)
    assert zero.reason == "residual" and not zero.x.any()
    assert not cg(A.matmul, b * nan).x.any()
    good = cg(A.matmul, b, max_iter=3)
    for factor, reason in ((inf, "nonfinite"), (-1, "indefinite")):
        factors = iter([1, 1, 1, factor])
        result = cg(lambda v: next(factors) * (A @ v), b)
        assert result.reason == reason and torch.equal(result.x, good.x)
    assert cg(A.matmul, b, precond=lambda v: -v).reason == "indefinite"


def test_cg_ends_at_the_precisions_limit():
    """Well-conditioned float32 systems with more iterations than they need: "residual", solved to rounding,
    never "indefinite"."""
    for seed in range(50):
        A, b, _ = (t.float() for t in spd((3, 10)[seed % 2], -1, seed))
        result = cg(A.matmul, b, max_iter=60)
        assert result.reason == "residual"
        assert (b - A @ result.x).norm() < 1e-5 * b.norm()


# ---- step length and damping ----


@parametrize(
    "kind, losses, i, reason",
    [
        ("armijo", [5, 0.9, 0.8, 0.8], 2, "armijo"),  # on while it falls
        ("armijo", [5, 2, 0.9, 1.5], 2, "armijo"),  # the first that is low enough
        ("armijo", [0.9999, 1.5, 0.9, inf], 2, "armijo"),  # too small a fall is none
        ("armijo", [2] * 10, None, "no decrease"),
        ("grid", [0.9999, 2, 0.8] + [0.9] * 6 + [nan], 2, "grid"),
        ("grid5", [0.8] + [0.9] * 4, 0, "grid5"),
        ("none", [7], 0, "none"),
        ("none", [inf], None, "nonfinite"),
    ],
)
def test_line_search_follows_its_rules(kind, losses, i, reason):
    """From a loss of 1 with slope −0.1, over α = 2^(−i/2): armijo takes the first with f(α) <= 1 − 0.001 α
    and goes on while the loss falls, both grids the best below 1, none α = 1 if finite; else α = 0 and a
    reason."""
    lengths = [2 ** (-i / 2) for i in range(len(losses))]
    loss_at = dict(zip(lengths, losses)).get  # of no other length, and so many are tried
    want = (0.0, 1.0) if i is None else (lengths[i], losses[i])
    assert line_search(loss_at, 1.0, -0.1, kind) == (*want, len(losses), reason)


@parametrize(
    "rho, alpha, want",
    [
        (0.76, 0.95, 1.2),
        (0.75, 1, 3),
        (0.9, 0.71, 3),
        (0.25, 1, 3),
        (0.24, 1, 6),
        (nan, 1, 6),
        (0.9, 0.3, 10),
        (0.0, 0.0, 48),
    ],
)
def test_levenberg_marquardt_moves_as_documented(rho, alpha, want):
    """λ × 0.4 if ρ > 3/4 at nearly full length, × 2 if ρ < 1/4 (or no number), λ / α if α < 0.4, at most 16
    λ, else unchanged; never above 1e8."""
    assert isclose(levenberg_marquardt(3.0, rho, alpha), want)
    assert levenberg_marquardt(1e8, 0.0, 0.0) == 1e8


# ---- the linearised batch ----


@parametrize("tie, micro_batch, kept", [(False, None, None), (True, 2, 0), (False, 2, 4)])
def test_ggn_is_the_dense_matrix(tie, micro_batch, kept):
    """Loss, gradient, J v, G v and its diagonal blocks, tied weights counted once, whole or in pieces of 2,
    2 and 1 rows of which none or two are kept; and the same after a move to v, the linearised network at
    v, and after a search along a line; then G v again after the expansion to second order. (Expansions of
    blocks, and to second order, are in the solvers' tests.)"""
    model, (inputs, targets) = gpt(tie), tokens()
    ggn = GGN(model, inputs, targets, micro_batch, kept)
    assert len(ggn.cache) == {None: 1, 0: 0, 4: 2}[kept]
    dense = Dense(model, inputs, targets)
    G = dense.G
    part = [6, 0, 3]
    everything = range(len(ggn.params))
    at = gn.select(torch.arange(len(G)), ggn.params, part)
    assert isclose(ggn.loss, dense.loss) and close(ggn.grad, dense.g)
    for v in torch.randn(3, len(dense.g)).double():
        assert close(ggn.matvec(v), G @ v)
        assert close(ggn.matvec(v[at], part), G[at][:, at] @ v[at])
        change, slope = moved_to(ggn, v, prox_linear=True)
        want, g, G = dense.local(v, True)
        assert isclose(change, want) and close(slope, g)
    ends = [dense.local(v - 2 * t * v, True)[0] for t in (0, 1)]
    for extra in (0, ends[0] - ends[1] - 0.1, ends[0] - ends[1] + 0.1):
        t = ggn.best_length(v, -2 * v, [0.0, 1.0], extra, everything, True)
        change, slope = moved_to(ggn, v - 2 * t * v, prox_linear=True)
        want, g, G = dense.local(v - 2 * t * v, True)
        assert t == (ends[1] + extra < ends[0]) and isclose(change, want)
        assert close(slope, g) and close(ggn.matvec(v), G @ v)
    moved_to(ggn, v)
    assert close(ggn.matvec(v), dense.G @ v)


def test_sampled_labels_make_kfac_the_gauss_newton_matrix():
    """G = (diag p − ppᵀ) ⊗ xxᵀ for z = Wx and one x. L ⊗ R with sampled labels tends to it: 30,000 tokens
    bring it to 3 %, so its scale is right and the true targets play no part."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(4).double()
    p = model(x).softmax(-1).detach()
    G = torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(x, x))
    kfac = make_kfac(model, x.expand(30_000, 4), torch.zeros(30_000).long())
    v = torch.randn(12).double()
    assert close(kfac.apply(v, lambda S: S), G @ v, 0.03)


def test_work_and_products_are_counted():
    """In gradients of this batch: 1 to begin; 4/3 a product or an expansion, with a block alone 4/3 for its
    own weights and 2/3 for those behind it; 2 a search; and for every piece that was not kept its share of
    another gradient each time it is gone through, and in a search of a J v more."""
    model, (inputs, targets) = gpt(), tokens(6)
    for kept, redone in ((None, 0), (0, 1)):
        ggn = GGN(model, inputs, targets, 2, kept)
        g = ggn.grad
        ggn.matvec(g)
        ggn.matvec(g[:28], [0])
        moved_to(ggn, g)
        ggn.best_length(g, g, [0.0, 1.0], 0.0, range(len(ggn.params)), False)
        moved_to(ggn, g)
        ggn.move_to(g[:28], [0], True)
        ggn.matvec(g[:28], [0])  # pieces that were not kept are moved to z + J d once more
        part = (4 * 28 + 2 * 200) / 228 / 3
        again = 4 + (2 + 2 / 3) + (1 + part / 2)  # the search, and the last product
        assert ggn.products == 3
        assert isclose(ggn.work, 1 + 2 * 4 / 3 + 3 * part + 2 + again * redone)


@parametrize("kind", FOREIGN)
def test_foreign_modules(kind):
    """Biases, unused and frozen parameters, a module in two places, others' attention, an
    LSTM, a class that never is: the product is the dense one, both solvers lower the loss, and the model
    keeps its Parameters, those moved that can be."""
    for inner in (False, True):
        x, y = vectors()
        model = FOREIGN[kind]()
        params = list(model.parameters())
        before = named(model)
        ggn = GGN(model, x, y, micro_batch=4)
        dense = Dense(model, x, y)
        assert close(ggn.grad, dense.g)
        assert close(ggn.matvec(dense.g), dense.G @ dense.g)
        opt = either(model, inner)
        losses = [opt.step(x, y)["loss"] for _ in range(3)]
        assert losses[0] > losses[1] > losses[2]
        assert list(model.parameters()) == params  # the very objects
        idle = {n for n in before if kind in ("spare", "frozen") and n.startswith("inner")}
        assert moved(model, before) == set(before) - idle


@parametrize("causal", [False, True])
@parametrize(
    "queries, keys, heads, width",
    [
        (150, 150, 3, 4),  # several blocks of rows
        (90, 70, 3, 2),
        (6, 6, 1, 4),  # these are broadcast
    ],
)
def test_attention_has_the_derivatives_of_its_formula(queries, keys, heads, width, causal):
    """Output, backward, and J by the backward's backward, against softmax written out, in every form that
    torch's own takes."""

    def formula(q, k, v):
        scores = 0.3 * q @ k.transpose(-1, -2)
        future = torch.ones(scores.shape[-2:]).triu(1).bool() & causal
        return scores.masked_fill(future, -inf).softmax(-1) @ v

    torch.manual_seed(0)
    shapes = (2, 3, queries, 4), (2, heads, keys, 4), (2, heads, keys, width)
    qkv = q, k, v = tuple(torch.randn(shape).double().requires_grad_() for shape in shapes)
    d = tuple(map(torch.randn_like, qkv))
    want, J = torch.func.jvp(formula, qkv, d)
    with differentiable_attention():
        out = attention(query=q, key=k, value=v, is_causal=causal, scale=0.3)
    w = torch.randn_like(want).requires_grad_()
    grads = torch.autograd.grad(out, qkv, w, create_graph=True)
    assert close(out, want)
    assert all(map(close, grads, torch.autograd.grad(want, qkv, w)))
    assert close(torch.autograd.grad(grads, w, d)[0], J)


def test_loss_and_linearisation_are_one_function():
    """nn.TransformerEncoder with masked rows: in eval mode and without gradients torch computes another
    function. The search's loss is the linearisation's, and so are the logits whose difference is J v."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = Between(
        lambda h, m: m.inner[0](h, src_key_padding_mask=(torch.arange(5) > 2).expand(len(h), 5)),
        nn.TransformerEncoder(layer, 2),
    ).eval()
    x, y = vectors()
    assert isclose(batch_loss(model, x, y), GGN(model, x, y).loss)
    with torch.no_grad():
        assert GaussNewton(model, InnerSolver(model, rows=2, lr=1e-3)).step(x, y)["rho"] > 0.5


MEMORY = """
import torch
torch.set_num_threads(1)
from baselines import KFAC
from gauss_newton import GGN, batch_grad, batch_loss
from model import GPT, GPTConfig, PRESETS
def kilobytes(name):                                    # ru_maxrss begins at the parent's
    return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith(name)))
"""
GROWTH = (
    MEMORY
    + """
class Model(GPT):                                   # with a parameter of 1 MB that has no Kronecker factors
    def __init__(self):
        super().__init__(GPTConfig(vocab_size=64, n_layer=1, n_head=2, n_embd=32))
        self.w = torch.nn.Parameter(torch.randn(64, 64, 64) / 99)
    def forward(self, idx):
        return torch.einsum('btv,vwu->btw', super().forward(idx), self.w)
model = Model()
for rows, kept in ((16, 0), (128, 0), (128, None)):
    data = torch.randint(0, 64, (2, rows, 64))
    batch_loss(model, *data, 4), batch_grad(model, *data, 4), KFAC(model).update(*data, 4)
    ggn = GGN(model, *data, 4, kept)
    ggn.matvec(ggn.grad)
    print(kilobytes('VmHWM'))
"""
)
LEFT = (
    MEMORY
    + """
model, (x, y) = GPT(GPTConfig(vocab_size=256, **PRESETS["tiny"])), torch.randint(0, 256, (2, 16, 64))
for i in range(12):
    ggn = GGN(model, x, y, micro_batch=8)
    ggn.matvec(ggn.grad)
    if i in (1, 11):
        print(kilobytes('VmRSS'))
"""
)
KEPT = (
    MEMORY
    + """
wide = torch.nn.Sequential(torch.nn.Linear(999, 1000), torch.nn.Tanh(), torch.nn.Linear(1000, 4))
for rows in (4, 64):
    ggn = GGN(wide, torch.randn(rows, 999), torch.arange(rows) % 4, micro_batch=1)
    print(kilobytes('VmRSS'), len(ggn.cache))
"""
)
VOCABULARY = (
    MEMORY
    + """
model = GPT(GPTConfig(vocab_size=50257, block_size=256, n_layer=1, n_head=2, n_embd=32))
data = torch.randint(0, 50257, (2, 8, 256))
before, ggn = kilobytes('VmRSS'), GGN(model, *data)
ggn.matvec(ggn.grad)
print(kilobytes('VmHWM') - before)
"""
)


@linux
def test_memory_does_not_grow_with_the_batch():
    """Loss, gradient, K-FAC and products without a cache: 8 times the rows cost under 10 MB more at the
    peak, where keeping every graph costs over 50 MB. Linearised and dropped ten times, every graph is
    freed."""
    small, large, cached = child(GROWTH)
    assert large - small < 10e3 and cached - large > 50e3
    first, last = child(LEFT)
    assert last - first < 30e3


def test_one_newton_step_is_linearised_at_a_time(monkeypatch):
    """Of three, each by two parts. With little memory free as many of its rows keep their graphs as three
    eighths of that hold; with next to none the message names the flag."""
    made = []
    healthy = GGN.__init__

    def init(ggn, *arguments):
        assert not any(one() for one in made)
        made.append(weakref.ref(ggn))
        healthy(ggn, *arguments)

    monkeypatch.setattr(GGN, "__init__", init)
    model, data = gpt(), tokens(100)
    each = gn.row_bytes(model, *data)
    monkeypatch.setattr(gn, "free_memory", lambda device: 16 * each)
    opt = GaussNewton(model, parts=scrambled(model), newton_steps=3, micro_batch=2)
    assert opt.step(*data)["accepted"] and len(made) == 3
    assert all(opt.solver._rows_that_fit(*t, 1) == 6 for t in (data, tokens(1)))
    monkeypatch.setattr(gn, "free_memory", lambda device: each)
    with raises(MemoryError, match="--micro_batch"):
        GaussNewton(model, micro_batch=2).step(*data)


@parametrize(
    "line, tree",
    [
        (
            "0::/job/step",
            {
                "job/memory.max": "9000",
                "job/memory.current": "5000",
                "job/memory.stat": "anon 7\ninactive_file 500",
                "job/step/memory.max": "max",
                "job/step/memory.current": "1",
                "job/step/memory.stat": "inactive_file 0",
            },
        ),
        (
            "4:memory:/job/step",
            {
                "memory/job/memory.limit_in_bytes": "9000",
                "memory/job/memory.usage_in_bytes": "5000",
                "memory/job/memory.stat": "cache 7\ntotal_inactive_file 500",
            },
        ),
    ],
)
def test_free_memory_is_the_control_groups(line, tree, tmp_path, monkeypatch):
    """The limit of the group above, of either version, less what is used but for 500 bytes of files; shared
    by two processes."""
    monkeypatch.setattr(baselines, "Path", lambda path: tmp_path / path.strip("/"))
    write("proc/self/cgroup", f"12:cpu,cpuacct:/other\n{line}\n")
    for name, text in tree.items():
        write(f"sys/fs/cgroup/{name}", text)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert baselines.free_memory(torch.device("cpu")) == 2250


@linux
def test_pieces_keep_their_graphs_alone():
    """60 pieces of a row more, kept for products: the values of their gradients would take 240 MB."""
    small, _, large, kept = child(KEPT)
    assert kept == 64 and large - small < 60e3


@linux
def test_a_product_at_gpt2s_vocabulary_takes_under_3_gb():
    """2,048 tokens of 50,257 logits, 412 MB a copy: linearisation and product, beyond the model."""
    assert 1e6 < child(VOCABULARY)[0] < 3e6


# ---- what the product refuses ----


class Tanh(torch.autograd.Function):
    """As kernels of other libraries are: its backward is beyond autograd."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h.tanh())
        return h.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0] ** 2)


def checkpointed(h, m):
    return checkpoint(lambda h: attention(h, h, m.head(h)), h, use_reentrant=False)


def hooked(change):
    def function(h, m):
        h = h.tanh()
        if h.requires_grad:
            h.register_hook(change)
        return h

    return function


OTHER = "in the derivative by inp.weight, among"


@parametrize(
    "function, by_cg, by_inner",
    [
        (hooked(lambda g: g * torch.arange(4) / 2), None, OTHER),
        (hooked(lambda g: g / g.norm()), OTHER, OTHER),
        (hooked(lambda g: None), None, None),
        (lambda h, m: h + ((4 * h).round() / 4 - h).detach(), None, OTHER),
        (lambda h, m: torch.cond(torch.tensor(True), torch.sin, torch.cos, (h,)), "CondAutogradOp", None),
        (lambda h, m: torch.heaviside(h, h), "heaviside", "heaviside"),
        (lambda h, m: Tanh.apply(h), "second derivative", None),
        (checkpointed, "activation checkpointing", None),
    ],
    ids="scaled normed seen straight cond none once checkpointed".split(),
)
def test_what_is_differentiated_is_what_is_computed(function, by_cg, by_inner):
    """A backward that is no derivative of the forward is refused by name: by conjugate gradients where it is
    not linear, by an inner solver always; so is what torch cannot differentiate, or, by conjugate gradients,
    not twice. All else is welcome."""
    data = vectors()
    for told, inner in ((by_cg, False), (by_inner, True)):
        opt = either(Between(function), inner)
        if told:
            with raises(ValueError, match=told):
                opt.step(*data)
        else:
            assert opt.step(*data)["reason"] in ("", "line search: no decrease")


@parametrize("bf16", [False, True])
@torch.no_grad()
def test_a_gpt_is_welcome(bf16):
    """Differences of its logits have large second derivatives, by steps as long as bfloat16 needs, and where
    weights are large."""
    model = GPT(GPTConfig(256, **PRESETS["tiny"]))
    model.bf16 = bf16
    for p in model.parameters():
        p *= 1.7
    x = torch.randint(256, (2, 64))
    gn.refuse_derivatives(model, x, x, False)


def clamped(h, m):
    m.head.weight.data.clamp_(-5, 5)
    return h


def test_parameters_are_the_optimizers_alone():
    """A forward that writes one, be it not in the first step, and hooks on one are refused by name;
    parameters stay as they were."""
    (x, y), model = vectors(), Between(clamped)
    opt = GaussNewton(model)
    assert opt.step(x, y)["accepted"]
    model.head.weight.data[0, 0] = 9
    before = named(model)
    with raises(ValueError, match="writes its parameter head.weight"):
        opt.step(x, y)
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        handle = getattr(model.inp.weight, hook)(print)
        with raises(ValueError, match="inp.weight has a hook"):
            opt.step(x, y)
        handle.remove()
    assert not moved(model, before)


@parametrize(
    "function, modules",
    [
        (lambda h, m: m.inner(h.flatten(0, 1)).view_as(h), [nn.BatchNorm1d(4)]),
        (lambda h, m: h if m.training and random.random() < 0.5 else h.tanh(), []),
        (lambda h, m: F.dropout(h, 0.02, m.training), []),
        (lambda h, m: h + 1e-3 * torch.randn_like(h) * m.training, []),
    ],
    ids=["batch norm", "skipped", "dropout", "noise"],
)
def test_randomness_is_refused(function, modules):
    """Random in training mode, whatever does it and however rarely: a ValueError, from every solver; welcome
    in eval mode, and refused again after train()."""
    random.seed(0)
    data, model = vectors(), Between(function, *modules)
    for inner in (False, True):
        opt = either(model, inner)
        with raises(ValueError, match=r"eval\(\)"):
            opt.step(*data)
        model.eval()
        opt.step(*data)
        model.train()


@parametrize("inner", [False, True])
def test_a_step_inside_inference_mode(inner):
    """It is refused, and so is a batch that was made there; the next step is as ever."""
    model = gpt()
    opt = either(model, inner)
    with torch.inference_mode():
        data = tokens()
        with raises(ValueError, match="possible inside torch.inference_mode"):
            opt.step(*tokens())
    with raises(ValueError, match="Inference tensors"):
        opt.step(*data)
    assert opt.step(*tokens())["accepted"]


def test_randomness_is_seen_behind_large_and_short_numbers():
    """Dropout, where a class is masked and the model works in bfloat16; and once a head is no longer zero."""
    x, y = vectors()
    dropping = Between(lambda h, m: F.dropout(h, 0.5, m.training))
    model = nn.Sequential(dropping, nn.ConstantPad1d((0, 1), -1e9)).float()
    with torch.autocast("cpu", torch.bfloat16), raises(ValueError, match=r"eval\(\)"):
        GaussNewton(model).step(x.float(), y)
    opt = GaussNewton(dropping.double())
    nn.init.zeros_(dropping.head.weight)
    assert opt.step(x, y)["accepted"]
    with raises(ValueError, match=r"eval\(\)"):
        opt.step(x, y)


def test_rows_stand_for_targets_that_count(monkeypatch):
    """A sixteenth of 64 rows of 32 targets is enough. In a step the rows searched, and those of each of eight
    Newton steps, hold 32: six rows of six targets; where one in each counts 32 rows, in two Newton steps."""
    assert gn.subset_rows(64, 64 * 32, 1 / 16) == 4
    searched = []
    healthy = gn.batch_loss
    monkeypatch.setattr(gn, "batch_loss", lambda m, x, y, _: searched.append(len(y)) or healthy(m, x, y))
    inputs, targets = tokens(64)
    for rows, most in ((6, 48), (32, 12)):
        iterations = GaussNewton(gpt()).step(inputs, targets)["cg_iterations"]
        assert set(searched) == {rows} and most / 2 < iterations <= most
        targets[:, 1:] = -100
        searched.clear()


def test_ignored_targets_are_left_out():
    """Targets of -100 are as if their tokens were not there, in loss, gradient, product, prox-linear and
    inner steps. The reference is a map on each token alone, without those tokens."""
    (x, y), model = vectors(), FOREIGN["twice"]()
    y[:, 3:] = -100
    y[2] = -100

    def found(x, y, micro_batch=None):
        ggn = GGN(model, x, y, micro_batch)
        v = ggn.grad
        change, slope = moved_to(ggn, v, prox_linear=True)
        loss, *solved = InnerSolver(model, "adamw", rows=1).solve([range(6)], *gn.counted_rows(x, y))[:4]
        exact = ggn.loss, batch_loss(model, x, y, micro_batch), change, loss, v, slope, ggn.matvec(v)
        return [*exact, *batch_grad(model, x, y, micro_batch)], solved

    exact, by_difference = found(x[y != -100].view(5, 3, 4), y[y != -100].view(5, 3))
    left_out = found(x, y, 2)
    torch.testing.assert_close(left_out[0], exact, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(left_out[1], by_difference, rtol=1e-5, atol=1e-8)


def test_batches_that_cannot_be_learned_from_are_named():
    """Targets of other integer types are classes; what else is wrong with a batch, or with what the model
    returns, is a ValueError that says so."""
    (x, y), model = vectors(), Between(lambda h, m: h)
    assert GGN(model, x, y.int()).loss == GGN(model, x, y).loss
    batches = {
        "classes 0 .. 3": (x, 0 * y + 4),
        "-1": (x, 0 * y - 1),
        "soft targets": (x, y.double()),
        "4 rows and targets 6": (x[:4], y),
        "empty: .* no target that counts": (x, 0 * y - 100),
    }
    outputs = {
        "do not fit": lambda m, x, z: z.sum(-1),
        r"self.model\(x\)\[0\]": lambda m, x, z: (z, None),
        r"self.model\(x\).logits": lambda m, x, z: SimpleNamespace(logits=z),
    }
    for named in [*batches, *outputs]:
        model = Between(lambda h, m: h)
        if named in outputs:
            model.register_forward_hook(outputs[named])
        for call in (either(model, False).step, either(model, True).step, KFAC(model).update):
            with raises(ValueError, match=named):
                call(*batches.get(named, (x, y)))


# ---- compilation ----


def test_compiled_equals_eager(monkeypatch):
    """What torch traces for its compiler gives the eager inner solver's steps, after a change of mode too,
    and is traced once: not anew in every outer step."""
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    counts = []
    found = []
    for compile in (False, True):
        model = gpt()
        opt = GaussNewton(model, InnerSolver(model, "adamw", rows=6, compile=compile), parts=model.layers())
        for _ in range(6):
            found.append(opt.step(*tokens())["loss"])
            counts.append(len(graphs))
        found.append(theta_of(model))
    torch.testing.assert_close(found[7:], found[:7], rtol=1e-4, atol=1e-5)
    assert counts[5] == 0 < counts[6] == counts[-1]
    model = Between(lambda h, m: h * (1 + m.training))
    solver = InnerSolver(model, "adamw", rows=6, compile=True)
    for _ in range(2):
        assert isclose(solver.solve([range(4)], *vectors()).loss, batch_loss(model, *vectors()), rel_tol=1e-6)
        model.eval()


# ---- trainer ----

SMALL = "--n_layer 1 --n_embd 8 --block_size 16 --batch_tokens 512 --eval_tokens 512 --eval_interval 1"
CG = "--opt full_gn --cg_iters 3 --newton_steps 2"
INNER = "--opt layerwise_gn --solver soap --inner_tokens 128"
METHODS = [CG, INNER, *(f"--opt {name}" for name in DEFAULTS)]
TEXT = argparse.__file__  # 100 kB of Python
CLOCKS = ("seconds", "step_seconds", "peak_memory_mb")


@pytest.fixture
def go(data_dir):
    """go("--flags as typed", status): the program, and that it ends so (None: anyhow)."""
    base = f"--data {TEXT} --data_dir {data_dir} --threads 1 --sample 0"

    def run(flags, status=0):
        found = train.main(f"{base} {flags}".split())
        assert status in (None, found)
        return found

    return run


def log_of(out):
    """The configuration line, and then the rows, without what a clock or a memory meter says."""
    lines = map(json.loads, Path(out, "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def checkpoint_of(out, name="checkpoint.pt"):
    return torch.load(Path(out, name), weights_only=True)


def same_state(a, b):
    """Whether two checkpoints, or parts of them, are equal bit for bit."""
    a, b = tree_map_only(torch.Tensor, lambda t: (t.dtype, t.tolist()), (a, b))
    return a == b


def same_run(a, b):
    """The same rows, weights and optimizer state."""
    ends = [checkpoint_of(out) for out in (a, b)]
    for end in ends:
        del end["config"], end["progress"]  # other folders, and seconds
    return log_of(a)[1:] == log_of(b)[1:] and same_state(*ends)


@pytest.fixture
def refused(go, capsys):
    """refused(flags, told): status 2, and one line on stderr that says what is wrong."""

    def check(flags, told):
        capsys.readouterr()
        go(flags, 2)
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(f"train.py: error: .*{re.escape(told)}.*\n", err)

    return check


@parametrize(
    "flags",
    [
        *METHODS,
        f"{CG} --precond none --local_model gn --line_search grid --dtype bf16",
        f"{CG} --model 45m --n_head 4",
        f"{INNER} --solver muon --dtype bf16 --line_search_data fresh",
        "--opt full_gn --solver adamw --inner_tokens 128 --local_model gn",
        "--opt adamw --dtype tf32 --schedule wsd --warmup_steps 2 --tie_weights",
    ],
)
def test_every_method_learns(go, flags, capsys):
    """Three steps lower the validation loss; the log has what it promises; the output tells steps, losses and
    a sample."""
    go(f"{SMALL} {flags} --steps 3 --out_dir run --sample 20")
    head, *rows = log_of("run")
    out = capsys.readouterr().out
    assert head["config"]["steps"] == 3
    assert "commit" in head
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[3]["val_loss"] < rows[0]["val_loss"]
    for row in rows[1:]:
        assert row["accepted"]
        assert row["tokens"] == (544 if "fresh" in flags else 512) * row["step"]
        assert train.STEP_FIELDS.keys() <= row.keys()
        work = row["grad_equivalents"] / row["step"]
        assert work > 1 if "gn" in flags or "kfac" in flags else work == 1
        assert f"step {row['step']}/3 | loss {row['train_loss']:.3f} | val {row['val_loss']:.3f}" in out
    assert "20 tokens from the model:\n" in out


def test_flags_reach_the_solver(monkeypatch):
    """Each of its settings, by the flag's name. Where torch has no compiler, --compile is refused."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    flags = {
        "cg": "--local_model gn --newton_steps 3 --cg_iters 5 --damping 0.7 --precond none "
        "--curvature_frac 0.3",
        "muon": "--inner_passes 3 --inner_lr 0.1 --inner_betas 0.5 0.6 --inner_damping 0.7 --local_model gn "
        "--inner_schedule global_cosine --inner_warmup 4 --steps 9 --inner_reset --compile "
        "--muon_scale original",
    }
    wanted = {
        "cg": dict(newton_steps=3, cg_iters=5, kfac=None, curvature_frac=0.3),
        "muon": dict(rows=8, passes=3, lr=0.1, schedule="global_cosine", betas=[0.5, 0.6], warmup=4)
        | dict(outer_steps=9, reset=True, compile=True),
    }
    for name, want in wanted.items():
        args, _ = train.resolve(f"--solver {name} {flags[name]} --inner_tokens 128 --micro_batch 4".split())
        solver = train.make_stepper(gpt(block_size=16), args).solver
        assert want.items() <= vars(solver).items() and solver.damping == 0.7 and not solver.prox_linear
    assert solver.optimizer.param_groups[0]["adjust_lr_fn"] == "original"
    monkeypatch.setattr(torch, "compile", lambda function: lambda t: torch.zeros(2) @ torch.zeros(3))
    with raises(train.UsageError, match="--compile cannot be used: .*size"):
        train.make_stepper(gpt(), args)


@parametrize(
    "flags",
    [
        CG,
        f"{CG} --line_search_data fresh",
        "--opt kfac",
        "--opt sgd --momentum 0 --clip 0.1 --warmup_steps 4",
    ],
)
def test_a_row_says_what_the_step_did(go, flags, data_dir, capsys):
    """The seed's weights and batches whatever the method; losses before and after on the searched rows, what
    was promised, their ratio, lengths and the angle to the gradient, recomputed from the checkpoints before
    and after; the printed line says them."""
    go(f"{SMALL} {flags} --steps 2 --checkpoint_interval 1 --out_dir run")
    before = checkpoint_of("run", "checkpoint.previous.pt")
    data = prepare(TEXT, cache_dir=data_dir, block_size=16)
    _, first, last, row = log_of("run")
    torch.manual_seed(0)
    model = GPT(GPTConfig(**before["model_config"]))
    assert isclose(first["val_loss"], batch_loss(model, *val_batch(data.val, 16, 512)), rel_tol=1e-5)
    whole = get_batch(data.train, 16, 32, 0, 1)
    searched = [t[-2:] for t in whole] if "gn" in flags else whole
    if "fresh" in flags:
        searched = get_batch(data.train, 16, 2, 0, 1, stream=2)
    thetas = []
    losses = []
    for stored in (before, checkpoint_of("run")):
        model.load_state_dict(stored["model"])
        thetas.append(theta_of(model))
        losses.append(batch_loss(model, *searched))
    d = thetas[1] - thetas[0]
    grad = batch_grad(with_theta(model, thetas[0]), *whole)[1]
    slope = grad @ d
    if "gn" in flags:
        assert isclose(row["actual"], losses[1] - losses[0], abs_tol=1e-5)
        assert isclose(row["rho"], row["actual"] / row["predicted"], rel_tol=1e-3)
    assert isclose(row["actual_val"], row["val_loss"] - last["val_loss"], abs_tol=1e-5)
    assert "sgd" not in flags or isclose(d.norm(), 0.3 * 0.5 * 0.1, rel_tol=1e-4)
    assert isclose(row["cosine"], -slope / (grad.norm() * d.norm()), rel_tol=1e-3, abs_tol=1e-4)
    assert isclose(hypot(*row["layer_norms"]), d.norm(), rel_tol=5e-5)
    line = capsys.readouterr().out.split("step 2/2")[1]
    assert f" | change on val {row['actual_val']:+.3f} | " in line
    assert f" | cos {row['cosine']:.2f} | |d| " in line
    assert "gn" not in flags or f" | rho {row['rho']:.2f} | alpha" in line


@parametrize(
    "flags",
    [
        CG,
        INNER,
        "--opt full_gn --solver muon --inner_tokens 128 --inner_reset",
        "--opt kfac --precondition_frequency 2",
        "--opt adamw --schedule wsd",
    ],
)
def test_resume_equals_the_uninterrupted_run(go, flags, monkeypatch):
    """A run that dies in step 4 with a checkpoint at 2, then --resume: the same as five steps in one go, bit
    for bit; and so after a stop before any step."""
    flags = f"{SMALL} {flags} --steps 5"
    go(f"{flags} --out_dir whole")

    def die(row, *args):
        if row["step"] == 4:
            raise RuntimeError("power cut")
        return ""

    with monkeypatch.context() as m, raises(RuntimeError):
        m.setattr(train, "step_line", die)
        go(f"{flags} --checkpoint_interval 2 --out_dir died")
    go("--resume --out_dir died")
    assert same_run("died", "whole")
    go(f"{flags} --target_loss 99 --out_dir none")
    go("--resume --target_loss 0 --out_dir none")
    assert same_run("none", "whole")


def test_resume_goes_on_with_what_is_whole_of_the_log(go, capsys):
    """One line says so; the whole rows before, those of the steps after, and no others, with a first line in
    any case; --resume from the checkpoint before it repeats no row."""
    flags = f"{SMALL} --opt adamw --checkpoint_interval 1 --out_dir"
    go(f"{flags} run --steps 2")
    go(f"{flags} whole --steps 4")
    head, *rows = log_of("whole")
    lines = Path("run/log.jsonl").read_bytes().splitlines(keepends=True)
    short = b"".join(lines[:-1])
    for left, kept in (
        (b"", 0),
        (lines[0][:-9], 0),
        (b"".join(lines)[:-20], 2),
        (short, 2),
        (short + bytes(300), 2),
        (short + b"[]\n", 2),
    ):
        shutil.copytree("run", "again", dirs_exist_ok=True)
        Path("again/log.jsonl").unlink()
        if left:
            write("again/log.jsonl", left)
        capsys.readouterr()
        go("--resume --steps 3 --out_dir again")
        assert capsys.readouterr().out.count("note: again/log.jsonl lacks rows") == 1
        shutil.copyfile("again/checkpoint.previous.pt", "again/checkpoint.pt")
        go("--resume --steps 4 --out_dir again")
        again, *found = log_of("again")
        assert found == [*rows[:kept], *rows[3:]]
        assert again["model"] == head["model"]


def test_the_same_command_begins_and_goes_on(go, refused, capsys):
    """--resume where no run is, and where one was killed before its first step: it begins, and says so; then
    it goes on. Now the rows at a time may change, and defaults be named. A log with steps and no
    checkpoint is a loss, and an error."""
    command = f"{SMALL} --opt adamw --steps 2 --resume --out_dir job"
    log = Path("job/log.jsonl")
    for _ in range(2):
        for told, more in (
            ("no run to resume in job: it begins\n", ""),
            ("resuming job after step 2", " --micro_batch 3 --inner_betas 0.8 0.99"),
        ):
            go(command + more)
            assert told in capsys.readouterr().out
            assert len(log_of("job")) == 4
        for path in Path("job").glob("*.pt"):
            path.unlink()
        refused(command, "job/checkpoint.pt is missing")
        write(log, "".join(log.read_text().splitlines(True)[:2]))


def test_a_long_step_says_where_it_is(go, capsys, monkeypatch):
    """Where the output is no terminal: every half minute, by a clock of 40 seconds a look."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 40).__next__)
    go(f"{SMALL} {CG} --steps 1 --out_dir a")
    assert re.search(r"\n0/1 steps \| cg \[#+\.+\] \d+/\d+ \| eta", capsys.readouterr().out)


@parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(go, monkeypatch, capsys, number):
    """Ctrl-C or SIGTERM in a step: it ends, saves, says how to go on, status 0. A second one in the same
    step: status 130 at once; checkpoints are whole. Earlier handlers are back, --resume goes on."""
    forward = GPT.forward
    handler = signal.getsignal(number)
    for out in ("whole", "run --target_loss 99"):
        go(f"{SMALL} --opt sgd --steps 5 --out_dir {out}")
    for times, status, told in ((1, 0, "--resume --out_dir run"), (2, 130, "is whole")):
        strokes = iter([number] * times)

        def struck(self, idx):
            for stroke in strokes:
                signal.raise_signal(stroke)
            return forward(self, idx)

        with monkeypatch.context() as m:
            m.setattr(GPT, "forward", struck)
            go("--resume --target_loss 0 --out_dir run", status)
        assert told in "".join(capsys.readouterr())
        assert checkpoint_of("run")["progress"]["step"] == 1
        assert signal.getsignal(number) is handler
    go("--resume --out_dir run")
    assert same_run("run", "whole")


def test_target_loss_stops_the_run(go, capsys):
    """At the first evaluation at or below it; where it is not reached, a line says so."""
    flags = f"{SMALL} --opt adamw --steps 4"
    go(f"{flags} --out_dir a")
    _, *rows = log_of("a")
    target = rows[2]["val_loss"]
    go(f"{flags} --out_dir b --target_loss {target!r}")
    assert log_of("b")[1:] == rows[:3]
    assert f"target {target:g} reached" in capsys.readouterr().out
    go(f"{flags} --out_dir c --target_loss 0.5")
    assert "target 0.5 not reached" in capsys.readouterr().out


def test_init_from_and_out_dir(go, refused, monkeypatch):
    """--init_from starts from the weights of a run, by folder or file, and refuses another model's; a run in
    use is refused, --overwrite replaces it; without --out_dir two runs in one second have folders of their
    own."""
    go(f"{SMALL} --opt adamw --steps 3 --out_dir a")
    for source in ("a", "a/checkpoint.pt"):
        go(f"{SMALL} --opt sgd --steps 1 --init_from {source} --out_dir b --overwrite")
        assert log_of("b")[1]["val_loss"] == log_of("a")[-1]["val_loss"]
        assert len(log_of("b")) == 3
    refused(f"{SMALL} --n_embd 16 --init_from a --out_dir c", "another one: it has {'n_embd': 8}")
    refused(f"{SMALL} --out_dir a", "--resume to go on with its run or --overwrite")
    assert len(log_of("a")) == 5
    monkeypatch.setattr(time, "strftime", lambda *_: "0102-030405")
    for _ in range(2):
        go(f"{SMALL} --opt sgd --steps 1")
    assert sorted(os.listdir("out")) == ["sgd-tiny-0102-030405", "sgd-tiny-0102-030405-2"]


def test_two_runs_cannot_have_one_folder(go, refused):
    go(f"{SMALL} --opt sgd --steps 2 --out_dir run")
    with open("run/log.jsonl") as log:
        train.lock(log)
        for again in ("--resume", f"{SMALL} --overwrite"):
            refused(f"{again} --out_dir run", "another run is writing run/log.jsonl")
    assert len(log_of("run")) == 4


def test_damaged_or_differing_checkpoints_are_refused(go, refused):
    """--resume with another setting, without a folder or a checkpoint, with a damaged one (down to one bit)
    or one of another version: one line, and the run's files as they were. The one before it is offered."""
    go(f"{SMALL} --opt adamw --steps 2 --out_dir a")
    kept = checkpoint_of("a")
    log = Path("a/log.jsonl").read_bytes()
    whole = Path("a/checkpoint.pt").read_bytes()
    refused(f"{SMALL} --resume --out_dir a --lr 0.5", "--lr 0.5 differs from the stored run's")
    refused("--resume", "--out_dir")
    refused("--resume --out_dir .", "is missing")
    write("own.txt", "abc " * 999)
    own = "--data own.txt --steps 2 --out_dir own"
    go(f"{SMALL} --opt sgd {own}")
    write("own.txt", "abd " * 999)
    refused(f"--resume {own}", "no longer what this run began with")
    storage = max(zipfile.ZipFile("a/checkpoint.pt").infolist(), key=lambda record: record.file_size)
    flipped = bytearray(whole)
    flipped[storage.header_offset + 200 + storage.file_size // 2] ^= 1
    torch.save({"config": 1}, "other.pt")
    torch.save({**kept, "format": 99}, "newer.pt")
    others = [Path(name).read_bytes() for name in ("other.pt", "newer.pt")]
    for raw in (b"", whole[:-100], flipped, *others):
        Path("a/checkpoint.pt").write_bytes(raw)
        refused("--resume --out_dir a", "damaged")
        refused(f"{SMALL} --init_from a --out_dir c", "checkpoint.previous.pt")
        assert Path("a/log.jsonl").read_bytes() == log
        assert not Path("c").exists()
    del kept["config"]["betas"], kept["model_config"]["gelu"]  # it is from before there were these
    torch.save(kept, "a/checkpoint.pt")
    refused(f"{SMALL} --model 45m --n_head 4 --init_from a --out_dir c", "'gelu': False")
    go("--resume --out_dir a --steps 3")
    shutil.copyfile("a/checkpoint.previous.pt", "a/checkpoint.pt")
    go("--resume --out_dir a")
    assert same_state(checkpoint_of("a")["model"], kept["model"])


FAULTS = {  # what becomes of the logits in a step, and whether it is rejected (None: either)
    "NaN": (lambda z: z * nan, True),
    "an infinite slope": (lambda z: z + (z - z.detach()).sqrt(), True),
    "no slope": (lambda z: z * 0, None),
    "a logit of 1e30": (lambda z: z + 1e30 * F.one_hot(torch.tensor(3), 256), None),
}


@parametrize("flags", [CG, INNER, "--opt kfac", "--opt sgd"])
@parametrize("fault", FAULTS)
def test_a_step_gone_wrong(fault, flags, go, monkeypatch):
    """It is rejected with a reason, every parameter bitwise where it was, or it was no trouble; the step
    after it is accepted, and no loss or weight is ever NaN."""
    spoil, rejected = FAULTS[fault]
    forward = GPT.forward
    go(f"{SMALL} {flags} --steps 1 --out_dir run")
    before = checkpoint_of("run")
    with monkeypatch.context() as m:
        m.setattr(GPT, "forward", lambda self, idx: spoil(forward(self, idx)))
        go("--resume --steps 2 --out_dir run")
    after = checkpoint_of("run")
    go("--resume --steps 3 --out_dir run")
    *_, row, last = log_of("run")
    still = same_state(after["model"], before["model"])
    assert row["accepted"] == (not still) == (not row["reason"])
    assert rejected in (None, still)
    assert last["accepted"]
    assert isfinite(last["val_loss"])
    assert all(t.isfinite().all() for t in checkpoint_of("run")["model"].values())


def test_stops_after_rejections_in_a_row(go, capsys, monkeypatch):
    """Steps too long for a float: eight rows, rejected with the reason, status 1, and the parameters bitwise
    as they were."""
    forward = GPT.forward

    def steep(self, idx):
        z = forward(self, idx)
        return z + 1e18 * (z - z.detach())

    with monkeypatch.context() as m:
        m.setattr(GPT, "forward", steep)
        go(f"{SMALL} --opt sgd --lr 1e18 --clip 0 --steps 20 --out_dir run", 1)
    told = capsys.readouterr().out
    assert "stopped: 8 steps in a row were rejected, the last because of: step not finite" in told
    assert [row["accepted"] for row in log_of("run")[2:]] == [False] * 8
    ends = [checkpoint_of("run", name)["model"] for name in ("checkpoint.pt", "checkpoint.previous.pt")]
    assert same_state(*ends)
    go("--resume --out_dir run", 1)  # eight more: momentum has it
    assert len(log_of("run")) == 18


def test_random_flags_run_or_are_refused(go, capsys):
    """One step, or one line and status 2; one that had to stop says why, with status 1; never a traceback."""
    rng = random.Random(0)
    ended = []
    skipped = "help steps data data_dir shards tokenizer model device compile out_dir resume init_from sample"
    actions = [a for a in train.build_parser()._actions if a.dest not in skipped.split()]
    for number in range(30):
        command = f"{SMALL} --steps 1 --out_dir run{number}"
        for action in rng.sample(actions, 3):
            values = action.choices or ["0", "1", "3", "8", "16", "0.5", "1e-8"]
            count = 1 if action.nargs is None else action.nargs
            command += " ".join(["", action.option_strings[0], *rng.choices(list(values), k=count)])
        ended.append(go(command, None))
        out, err = capsys.readouterr()
        told = err.startswith("train.py: error: ") and err.count("\n") == 1
        assert {0: True, 1: told or "stopped: " in out, 2: told}[ended[-1]], command
    assert ended.count(0) >= 5


@parametrize(
    "flags",
    """--opt foo | --no_such_flag 1 | --step 3 | --steps 0 | --steps x
    | --batch_tokens 100 | --n_embd 30 | --n_embd 12 | --n_embd 4000000000 | --block_size 10000000
    | --device nope
    | --device cuda:99 | --device meta | --data missing.txt | --data | --lr -1 | --lr nan | --damping 0
    | --damping inf
    | --curvature_frac 1.5 | --threads 99999 | --betas 0.9 1.0 | --betas 0.9 | --seed 99999999999999999999999
    | --init_from missing | --init_from= | --out_dir taken/x | --out_dir taken
    | --solver soap --inner_tokens 100 | --shards 2000 --data c4""".split("|"),
)
def test_bad_setting_is_one_line(refused, flags, data_dir):
    """Status 2, one line on stderr that says what is wrong, nothing on stdout, and nothing created."""
    write("taken", "a file")
    before = left_in(data_dir)
    refused(f"--steps 1 --out_dir new {flags}", "")
    assert os.listdir() == ["taken"]
    assert left_in(data_dir) == before


def test_flags_that_a_run_does_not_use_are_named(go, capsys):
    """Those of other kinds of runs, and settings that other baselines have."""
    unused = "--momentum 0.5 --damping 2 --muon_scale original"
    go(f"{SMALL} --opt adamw --betas 0.8 0.9 {unused} --steps 1 --out_dir a")
    assert "adamw (baseline) does not use --muon_scale, --damping, --momentum\n" in capsys.readouterr().out
    go(f"{SMALL} {CG} {unused} --steps 1 --out_dir b")
    assert "note: full_gn (cg) does not use --muon_scale, --momentum\n" in capsys.readouterr().out
    go(f"{SMALL} --opt full_gn --solver muon --inner_tokens 128 {unused} --steps 1 --out_dir c")
    assert "note: full_gn (inner) does not use --damping, --momentum\n" in capsys.readouterr().out


def test_help_explains_every_flag():
    """Each flag is in a group, with a text of its own; and --help can be told where there is no λ."""
    parser = train.build_parser()
    grouped = [a for group in parser._action_groups[2:] for a in group._group_actions]
    assert grouped == parser._actions[1:]
    assert len({a.help for a in grouped}) == len(grouped)
    assert python("train.py", "--help", PYTHONIOENCODING="cp1252").returncode == 0


def test_commands_of_the_papers_settings(go):
    """Those of README and of the page of costs, a tenth as wide, on other data: each takes its step, the line
    search with its candidates and as many new tokens as the step."""
    text = (HERE / "README.md").read_text() + (HERE / "results/costs.md").read_text()
    settings = dict(re.findall(r'^    (\w+)="(.*)"$', text, re.MULTILINE))
    small = f"""--data {TEXT} --tokenizer bytes --shards 1 --n_embd 64 --block_size 16 --batch_tokens 512
        --inner_tokens 128 --eval_tokens 512 --steps 1"""
    for command in re.findall(r"^    python train.py (.*\$c4.*)", text.replace("\\\n", ""), re.MULTILINE):
        go(f"{string.Template(command).substitute(settings)} {small}")
    for name, tries in (("45m", 5), ("150m", 10)):
        [run] = Path("out").glob(f"full_gn-{name}-*")
        row = log_of(run)[2]
        assert row["search_tries"] == tries
        assert row["tokens"] == 1024


def test_want_of_memory_is_one_line(go, capsys, monkeypatch):
    """What torch's allocator for CPUs says is a RuntimeError like any other. (Others are faults.)"""

    def build_model(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(train, "build_model", build_model)
    go(f"{SMALL} --out_dir run", 1)
    assert capsys.readouterr().err.startswith("train.py: error: DefaultCPUAllocator: can't")


def in_children(*functions):
    """Run each in a forked process of its own, all at once; their exit statuses, or minus the signal that
    ended one. They start when all are forked: a lock that a thread holds at a fork (that of a store which one
    of them talks to, say) would never open for the others."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    children = []
    forked = multiprocessing.Event()
    for function in functions:
        children.append(os.fork())
        if not children[-1]:
            status = 99
            try:
                forked.wait()
                status = function()
            finally:
                os._exit(status)
    forked.set()
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def traced(function, inside=None, at=None):
    """function(), with SIGKILL at the line numbered `at` of those that Python executes in functions of ours
    called `inside`; without a name, how many lines each has goes to lines.json."""
    files = {module.__file__ for module in (train, D, gn, torch.serialization)}
    lines = collections.Counter()

    def tracer(frame, event, arg):
        name = frame.f_code.co_name
        if frame.f_code.co_filename not in files or inside not in (None, name):
            return None
        lines[name] += event == "line"
        if lines[name] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return tracer

    sys.settrace(tracer)
    status = function()
    sys.settrace(None)
    Path("lines.json").write_text(json.dumps(lines))
    return status


@parametrize("flags", [CG, INNER, "--opt soap --checkpoint_interval 1"])
def test_killed_anywhere(flags):
    """SIGKILL in the preparation of the data, in a checkpoint's write, in a line of the log, in a step, and
    at random lines: what comes after, --resume or, before there is a checkpoint, the command again, ends with
    the parameters and rows of a run that was never killed."""
    rng = random.Random(flags)
    write("text.txt", "".join(rng.choices("abc \n", k=9_000)))

    def start(out, **where):
        command = f"{SMALL} {flags} --data text.txt --threads 1 --sample 0 --steps 3 --overwrite"
        if Path(out, "checkpoint.pt").exists():
            command = "--resume"
        command += f" --out_dir {out} --data_dir {out}-data"
        return in_children(lambda: traced(lambda: train.main(command.split()), **where))[0]

    assert start("whole") == 0
    lines = json.loads(Path("lines.json").read_text())
    anywhere = rng.choices(list(lines), lines.values(), k=2)
    for inside in ["build", "save_checkpoint", "write_row", "step", *anywhere]:
        shutil.rmtree("run", ignore_errors=True)
        shutil.rmtree("run-data", ignore_errors=True)
        assert start("run", inside=inside, at=rng.randint(1, lines[inside])) == -signal.SIGKILL
        if Path("run/checkpoint.pt").exists():
            with open("run/log.jsonl", "a") as log:  # as a line looks that is cut off
                log.write('{"step": 9, "tok')
        assert start("run", inside="nothing") == 0
        assert same_run("run", "whole")


@parametrize("limit, told", [(20_000, "cannot write run/checkpoint.pt"), (3_000, "")])
def test_full_disk(limit, told, go):
    """A checkpoint, or a line of the log, that cannot be written whole: status 1, one line, the checkpoint as
    it was, nothing half-written beside it, and with room again the run goes on to the same end."""
    resource = pytest.importorskip("resource")
    for out, steps in (("whole", 2), ("run", 1)):
        go(f"{SMALL} --opt adamw --steps {steps} --out_dir {out}")
    before = checkpoint_of("run")

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with open("told.txt", "w") as sys.stderr:
            return go("--resume --out_dir run --steps 2", None)

    assert in_children(limited) == [1]
    assert re.fullmatch(f"train.py: error: .*{told}.*\n", Path("told.txt").read_text())
    assert same_state(checkpoint_of("run"), before)
    assert not Path("run/checkpoint.tmp").exists()
    go("--resume --out_dir run --steps 2")
    assert same_run("run", "whole")


def together(processes, function):
    """function(rank) in that many processes, joined as torchrun joins them: the store is the parent's, which
    outlives them all. Their exit statuses."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def joined(rank):
        job = f"""RANK={rank} LOCAL_RANK={rank} WORLD_SIZE={processes} LOCAL_WORLD_SIZE={processes}
            MASTER_ADDR=127.0.0.1 MASTER_PORT={store.port} TORCHELASTIC_RUN_ID=test
            TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RESTART_COUNT=0"""
        os.environ.update(variable.split("=") for variable in job.split())
        return function(rank)

    return in_children(*(functools.partial(joined, rank) for rank in range(processes)))


@parametrize(
    "flags",
    [
        CG,
        f"{CG} --precond none --local_model gn --line_search_data fresh",
        INNER,
        "--opt full_gn --solver muon --inner_tokens 320 --inner_lr 0.5",  # the search cuts it
        "--opt soap --micro_batch 7",
        "--opt kfac --micro_batch 7",
    ],
)
def test_processes_make_the_step_of_one(flags, go, monkeypatch):
    """In float64, a step by two processes, and one by four from the two's checkpoint, give the losses, what
    the model promised (a baseline: the cosine), and the weights of one process from the same weights (that
    all have the same bits the run itself sees to). Other orders of summation are some 1e-14 off, a sum that
    lacks a row 1e-3, one in float32 1e-7. SOAP rotates only square sides here: of a longer one, rank-
    deficient at first, it takes part of the basis from rounding."""
    monkeypatch.setattr(SOAP, "__init__", functools.partialmethod(SOAP.__init__, max_precond_dim=8))
    monkeypatch.setattr(gn, "working_eps", lambda *_: 2.0**-23)  # a longer h, so that J v has less rounding

    def run(n, step, source):
        out = f"{n}at{step}"
        if source:
            shutil.copytree(source, out)
        start = "--resume" if source else f"{SMALL} {flags} --batch_tokens 1088"
        command = f"{start} --steps {step} --out_dir {out}"
        assert not any(together(n, lambda rank: go(command)))
        row = log_of(out)[-1]
        weights = gn.flatten(checkpoint_of(out)["model"].values())
        return weights, torch.tensor([row["train_loss"], row["val_loss"], row["predicted"] or row["cosine"]])

    torch.set_default_dtype(torch.float64)
    try:
        for n, step, source in ((2, 1, None), (4, 2, "2at1")):
            assert all(map(close, run(n, step, source), run(1, step, source)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert log_of("2at1")[0]["device"].startswith("2 processes")


def test_processes_that_come_apart_stop(go, monkeypatch):
    """One process's weights differ in a bit: all end with status 1, the reason is told, and the checkpoint
    before is whole. One is killed: the other ends too. Settings that leave one without a sequence: a line, on
    each machine, since what is missing may be missing there alone."""
    train_step = train.Run.step

    def run(rank, flags, fault=None):
        def spoiled(self):
            row = train_step(self)
            if rank == 1 and row["step"] == 2:
                fault(self.model.head.weight)
            return row

        if fault:
            monkeypatch.setattr(train.Run, "step", spoiled)
        with open(f"told{rank}.txt", "w") as sys.stderr:
            return go(f"{SMALL} {CG} --checkpoint_interval 1 --steps 4 {flags}", None)

    for fault, ends in (
        (lambda p: p.data.view(-1)[0].mul_(1 + 2**-23), [1, 1]),
        (lambda p: os.kill(os.getpid(), signal.SIGKILL), [1, -signal.SIGKILL]),
    ):
        assert together(2, lambda rank: run(rank, "--out_dir run --overwrite", fault)) == ends
        assert Path("told0.txt").read_text().startswith("train.py: error: process 0: ")
        assert checkpoint_of("run")["progress"]["step"] == 1
    one_left = "--solver adamw --batch_tokens 400 --inner_tokens 64"  # 25 sequences, 6 x 4 + 1
    for n, few in ((3, "--batch_tokens 32"), (2, one_left)):
        assert together(n, lambda rank: run(rank, f"{few} --out_dir none")) == [2] * n
        assert "".join(Path(f"told{rank}.txt").read_text() for rank in range(n)).count("\n") == 1
        assert not Path("none").exists()

    def on_a_machine_each(rank):
        os.environ["LOCAL_RANK"] = "0"
        return run(rank, "--out_dir none --init_from missing")

    assert together(2, on_a_machine_each) == [2, 2]
    assert all("missing" in Path(f"told{rank}.txt").read_text() for rank in (0, 1))
    go("--resume --out_dir run")


@linux
@parametrize("flags, status", [(CG, 0), ("--batch_tokens 8", 2)])
def test_no_thread_of_the_group_outlives_a_run(data_dir, tmp_path, flags, status):
    """One that is there when the interpreter ends aborts it, now and then."""
    argv = f"{SMALL} --data {TEXT} --data_dir {data_dir} --out_dir {tmp_path}/run --steps 1 {flags}".split()
    script = f"""
import train
status = train.main({argv})
print(status, *[name.read_text().strip() for name in train.Path("/proc/self/task").glob("*/comm")])"""
    job = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    last = python("-c", script, TORCHELASTIC_RUN_ID="test", **job).stdout.splitlines()[-1]
    assert last.startswith(f"{status} ") and "gloo" not in last


def test_kfac_refuses_processes_on_different_paths():
    """As where experts see no row of a process: a ValueError, before factors of other weights are added."""

    def update(rank):
        train.join_group(SimpleNamespace(device="cpu"))
        x, y = vectors()
        model = Between(lambda h, m: m.inner[rank](h), nn.Linear(4, 4), nn.Linear(4, 4))
        with raises(ValueError, match="same paths"):
            KFAC(model).update(x, y)
        return 0

    assert together(2, update) == [0, 0]


@parametrize("flags", [CG, INNER])
def test_nothing_is_left_of_a_step(flags, go, monkeypatch):
    """From the third step on no tensor and no open file is added by a step, so that memory stays as it is."""
    seen = []
    step_line = train.step_line

    def count(row, *args):
        gc.collect()
        numbers = sum(o.numel() for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
        seen.append((numbers, len(os.listdir("/dev/fd"))))
        return step_line(row, *args)

    monkeypatch.setattr(train, "step_line", count)
    go(f"{SMALL} {flags} --steps 4 --out_dir run")
    assert seen[2] == seen[3]


# ---- data ----


PACKERS = {".gz": gzip, ".xz": lzma, ".bz2": bz2}


def write(path, text):
    """text, or raw bytes, at path: compressed if its name ends so."""
    path = Path(path)
    raw = text if isinstance(text, bytes) else text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    packer = PACKERS.get(path.suffix.lower())
    path.write_bytes(packer.compress(raw) if packer else raw)
    return path


def jsonl(texts):
    return "".join(json.dumps({"url": "http://x", "text": text}) + "\n" for text in texts)


def left_in(cache):
    """Every file of a cache directory but the locks."""
    return sorted(p.name for p in Path(cache).rglob("*") if p.is_file() and p.suffix != ".lock")


def error_of(source, cache="cache", **kwargs):
    """The message of the DataError that prepare raises, as a run tells it; the cache is as it was."""
    before = left_in(cache)
    with raises(DataError) as e:
        prepare(source, cache_dir=cache, **kwargs)
    assert left_in(cache) == before
    return " ".join(str(e.value).splitlines())


def text_of(d):
    """Training text and validation text."""
    return [d.encoding.decode(side.tolist()) for side in (d.train, d.val)]


def sides(source, cache="cache", **kwargs):
    return text_of(prepare(source, cache_dir=cache, **kwargs))


def split(texts):
    """Texts for training and for validation, by a hash of our own."""
    result = [], []
    for text in texts:
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
        result[int(digest, 16) < 0.05 * 2**256].append(text)
    return result


def test_tokenizers(monkeypatch):
    """bytes is UTF-8 and gives any text back; gpt2 is uint16, ends every document with token 50256 and never
    makes it from text; without its files the error names TIKTOKEN_CACHE_DIR."""
    encoding = get_encoding("bytes")
    text = "héllo\r\n\t日本 \0 𝒳 <|endoftext|> " + "x" * 1000 + "\n" * 70
    ids = encoding.encode_ordinary(text)
    assert encoding.n_vocab == 256
    assert ids == list(text.encode())
    assert encoding.decode(ids) == text
    path = write("t.jsonl", jsonl(f"{i} <|endoftext|>" for i in range(100)))
    gpt2 = tiktoken.Encoding(
        "gpt2",
        pat_str=encoding._pat_str,
        mergeable_ranks=encoding._mergeable_ranks,
        special_tokens={"<|endoftext|>": 50256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: gpt2)
    d = prepare(path, "gpt2", "cache", block_size=8)
    assert d.vocab_size == 50257
    assert d.train.dtype == d.val.dtype == np.uint16
    for side, decoded in zip((d.train, d.val), text_of(d)):
        assert side[-1] == 50256
        assert decoded.count("<|endoftext|>") == 2 * (side == 50256).sum() > 0
    monkeypatch.setattr(tiktoken, "get_encoding", None)  # any exception will do
    assert "TIKTOKEN_CACHE_DIR" in error_of(path, tokenizer="gpt2")


def test_stdlib_is_source_without_tests(monkeypatch):
    """The default needs no network: over 5 MB of this Python's source. It is the .py files in sorted order,
    no tests, nothing installed; a Python without its source is said in one line."""
    stdlib = prepare("stdlib", cache_dir="cache")
    assert len(stdlib.train) > 5e6
    monkeypatch.setattr(D, "VAL_FRACTION", 0.0)
    monkeypatch.setattr(D.sysconfig, "get_paths", lambda: {"stdlib": "lib"})
    assert "standard library" in error_of("stdlib")
    for name in "test/t.py b/tests/t.py b/test_c.py b/c_test.py site-packages/p.py .h.py a.txt".split():
        write(f"lib/{name}", "no\n" * 100)
    keep = "a.py b/__init__.py contest.py testing.py".split()
    texts = [write(f"lib/{name}", name * 99 + "\n").read_text() for name in keep]
    assert "".join(sides("stdlib")) == "".join(texts)


def test_a_folder_is_its_texts_and_records(tmp_path, monkeypatch):
    """All that is visible, compressed or not, in any encoding with its mark, sorted by path; no binaries,
    nothing empty or hidden, of a run's folder only what the run did not write; also where the cache lies
    inside, so that it is used again."""
    monkeypatch.setattr(D, "VAL_FRACTION", 0.0)
    want = ""
    files = """a.txt:utf-8 b/c.txt.gz:utf-16-le b/d.jsonl:utf-8 b/h.json.txt:utf-16-be f.jsonl.gz:utf-32-le
        g.json:utf-16-le i.md:utf-8 j.GZ:utf-32-be k.JSONL.xz:utf-8 out/run/t:utf-8"""
    for file in files.split():
        name, codec = file.split(":")
        texts = [f"{name} {i} \ufeff" for i in range(30)]
        text = "\n".join(texts) + "\n"
        body = jsonl(texts) if re.search(r"(?i)\.jsonl?(\.gz|\.xz)?$", name) else text
        write(name, ("\ufeff" + body).encode(codec))
        want += text
    for name in "x.gz x.bin .git/x a/.x out/run/checkpoint.pt out/run/log.jsonl".split():
        write(name, "a\0b" if "x." in name else "hidden")
    write("e.jsonl", "")
    first, second = (prepare(tmp_path, cache_dir="cache") for _ in range(2))
    assert "".join(text_of(first)) == want
    assert first.meta["documents"] == 4 * 30 + 6
    assert second.meta["fingerprint"] == first.meta["fingerprint"]


def test_what_is_not_read_is_named(go, capsys):
    """Counted by reason, three by name, before a run begins, also where its data is taken from the cache; if
    there is nothing else it is an error. Of a text with a few bad bytes the rest is read."""
    told = {"zst": "zstd -d", "PARQUET": "pandas", "tar.gz": "unpack", "pdf": "pdftotext", "txt": "iconv"}
    for kind, advice in told.items():
        for i in range(4):
            path = write(f"text/{i}.{kind}", "привет ".encode("koi8-r"))
        assert advice in error_of(path)
    assert " 4 packed by zstd (unpack first: zstd -d): '0.zst', '1.zst', '2.zst', ..." in error_of("text")
    write("text/LICENSE", b"\xe9lan " + b"vital " * 60)
    write("text/ok", "a genuine one: \ufffd")
    os.mkfifo("text/pipe")
    Path("text/up").symlink_to("/")
    Path("text/nowhere").symlink_to("gone")
    for out in "ab":
        go(f"{SMALL} --opt sgd --steps 1 --data text --out_dir {out}")
        note = "\nnote: left out of .*; 3 that lead .*: 'nowhere', 'pipe', 'up'; 1 in part.* 'LICENSE'\n"
        assert re.search(note, capsys.readouterr().out)
    assert "".join(sides("text")) == "\ufffdlan " + "vital " * 60 + "\na genuine one: \ufffd\n"


def test_unusable_sources_are_errors(monkeypatch):
    """Empty, missing, broken, binary, too short, unknown, unreadable, or packed so that this Python
    cannot unpack it: each is told."""
    write("empty\nline", "")
    write("binary", b"a\0b")
    short = write("short.txt", "x" * 128 + "\n")  # two blocks of 64 need 130
    Path("links").mkdir()
    Path("links/a.txt").symlink_to("nowhere")
    for name, told in {
        "empty\nline": "no text",
        "binary": "NUL",
        "links": "a.txt",
        "missing": "shakespeare",
        "short.txt": "block_size 64 needs 65",
    }.items():
        assert told in error_of(name)
    assert "stdlib" in error_of("")
    assert "bytes" in error_of("stdlib", tokenizer="gpt3")
    assert "short.txt" in error_of(short, short, block_size=8)  # the cache is a file
    sides(short, block_size=40)
    assert "66" in error_of(short, block_size=65)  # reused, and too short

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(short))

    monkeypatch.setattr(gzip, "open", denied)
    assert "Permission denied" in error_of(write("a.gz", "text"))
    monkeypatch.setitem(sys.modules, "lzma", None)
    assert "a.xz cannot be read (import of lzma" in error_of(write("a.xz", "text"))


def test_a_record_is_a_document():
    """Its whole text, however few or long they are, goes where its hash says, odd characters included; blank
    lines, line ends and other fields change nothing, and an empty text is no document."""
    texts = [f"{i}\nhas é, \x85, \ud800\n" + f"[{i}]" * (3 * i if i % 5 else 3000) for i in range(70)]
    raw = '{"text": "日本 \u2028", "n": [1, {}]}'
    body = "\n \r\n" + raw + "\r\n" + jsonl(texts).replace("\n", "\r\n") + '{"text": ""}\n{"text": "end"}'
    d = prepare(write("t.json", body), cache_dir="cache", block_size=1)
    want = ["".join(text + "\n" for text in side) for side in split(["日本 \u2028", *texts, "end"])]
    assert text_of(d) == [side.replace("\ud800", "\ufffd") for side in want]
    assert d.meta["documents"] == 72


def test_bad_record_is_named():
    """Whatever is wrong with it: the line of its file."""
    for bad in ('{"text": "cut', '{"txt": "x"}', '{"text": null}', '["text"]', "7", "[" * 100_000, "\0"):
        path = write("t.jsonl", "\n" + jsonl(["ok " * 4000] * 5) + bad + "\n" + jsonl(["ok"]))
        assert f"{path}, line 7 " in error_of(path)


@parametrize("suffix, packer", PACKERS.items())
def test_compression_changes_nothing_but_the_size(suffix, packer):
    """The same tokens, also from several parts; cut short, a bit wrong, or not compressed at all names the
    file."""
    rng = random.Random(0)
    body = jsonl(f"{rng.getrandbits(400):x}" for _ in range(6_000)).encode()
    want = sides(write("a.jsonl", body))
    path = write(f"b.jsonl{suffix}", body)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[10] ^= 2  # of gzip the kind of the first block, of others a checksum
    assert sides(path) == want
    damaged = whole[:5], whole[:-1], whole[:-8] + bytes(8), flipped, body, whole + b"rest"
    for raw in damaged[: 5 + (packer is gzip)]:  # the last one is found in gzip alone
        path.write_bytes(raw)
        assert str(path) in error_of(path)
    path.write_bytes(packer.compress(body[:1000]) + packer.compress(body[1000:]))
    assert sides(path) == want


def test_split_by_document_is_by_content_alone():
    """Of 100 files or more each goes whole to the side that its hash says, whatever its name."""
    texts = ["".join(f"<{i} {j}>\n" for j in range(600)) for i in range(300)]  # longer than a piece
    for i, text in enumerate(texts):
        write(f"text/{997 * i % 1009:04}", text)
    for side, want in zip(sides("text"), split(texts)):
        assert len(want) > 3
        assert sorted(side.splitlines()) == sorted("".join(want).splitlines())


def test_texts_are_split_in_pieces_at_line_ends():
    """A single text, or one beside a thousand records: no line is torn or lost, about 5 % is validation."""
    lines = [f"line {i} " + "é" * (i % 50) + ("\r\n" if i % 3 else "\n") for i in range(20_000)]
    write("text/t.txt", "".join(lines))
    write("text/r.jsonl", jsonl(f"record {i}" for i in range(1000)))
    for source in ("text/t.txt", "text"):
        train_side, val_side = (
            [line for line in side.splitlines(True) if line.startswith("line")] for side in sides(source)
        )
        assert sorted(train_side + val_side) == sorted(lines)
        assert 0.02 < len(val_side) / len(lines) < 0.09


@parametrize("fraction", [0.0, 0.05, 1.0])
def test_both_sides_get_a_block_if_there_are_two(monkeypatch, fraction):
    """Down to exactly two blocks, in the worst splits too, and no token is lost or doubled."""
    monkeypatch.setattr(D, "VAL_FRACTION", fraction)
    for text in ("x" * 129 + "\n", "same line\n" * 90):
        both = sides(write("t", text), block_size=64)
        assert min(map(len, both)) >= 65
        assert sorted("".join(both)) == sorted(text)


def test_prepared_data_is_reused_only_if_it_matches(monkeypatch):
    """Built once for any block size; anew if the file or the format changes, or what was built is damaged."""
    built = []
    build = D.build
    monkeypatch.setattr(D, "build", lambda *args: built.append(1) or build(*args))
    path = write("t.txt", "one\ntwo\n" * 1000)

    def builds():
        built.clear()
        for block_size in (64, 512):
            assert sorted("".join(sides(path, block_size=block_size))) == sorted(path.read_text())
        return len(built)

    assert builds() == 1
    assert builds() == 0
    os.utime(path, ns=(1, 1))
    assert builds() == 1
    for name, raw in (("tokens.bin", "short"), ("meta.json", '{"dtype'), ("meta.json", "[]")):
        for folder in Path("cache").glob("t*"):
            write(folder / name, raw)
        assert builds() == 1
    monkeypatch.setattr(D, "DATA_FORMAT", D.DATA_FORMAT + 1)
    assert builds() == 1


SHARDS = [f"c4-train.0000{i}-of-01024.json.gz" for i in range(2)]


@pytest.fixture
def web(monkeypatch):
    """What urlopen finds: `files` by name, each cut off after `cut` bytes; `seen` is what was asked for."""
    web = SimpleNamespace(files={"input.txt": b"To be, or not to be.\n" * 30}, cut=None, seen=[])
    for name in SHARDS:
        web.files[name] = gzip.compress(jsonl(f"{name} page {i}" for i in range(300)).encode())

    def urlopen(url, timeout):
        name = url.split("/")[-1]
        web.seen.append(name)
        time.sleep(0.1)
        if name not in web.files:
            raise OSError("no\nroute")
        headers = {"Content-Length": len(web.files[name])}
        return urllib.response.addinfourl(io.BytesIO(web.files[name][: web.cut]), headers, url)

    monkeypatch.setattr(D.urllib.request, "urlopen", urlopen)
    return web


def test_downloads_come_once(web):
    """The shards asked for, each fetched once even by runs that start together and kept as it is, give one
    document a page; more shards fetch only what is missing; what is there needs no network."""
    told = []

    def c4(shards):
        return sides("c4", shards=shards, progress=lambda *done: told.append(done))

    with ThreadPoolExecutor(3) as pool:
        one, *others = pool.map(c4, [1] * 3)
    raw = web.files[SHARDS[0]]
    assert (len(raw), len(raw)) in told
    assert Path("cache/c4", SHARDS[0]).read_bytes() == raw
    for side, more in zip(one, c4(2)):
        assert side.splitlines() == [line for line in more.splitlines() if line.startswith(SHARDS[0])]
        assert more.count(SHARDS[1]) > 3
    assert [*others, c4(1)] == [one] * 3
    assert web.seen == SHARDS


@parametrize(
    "source, name, place",
    [("c4", SHARDS[0], f"c4/{SHARDS[0]}"), ("shakespeare", "input.txt", "shakespeare.txt")],
)
def test_downloads_are_whole_or_not_there(tmp_path, web, monkeypatch, source, name, place):
    """A connection that ends half-way, or no network: one line with the address and the place, where nothing
    lies but what is put there by hand. Damage is named: Shakespeare's by both hashes."""
    body = web.files.pop(name)
    web.cut = 100
    found = hashlib.sha256(body).hexdigest()
    assert re.search(rf"/{name} \(no route\): .* {tmp_path / place} ", error_of(source, tmp_path))
    web.files[name] = body
    assert f"100 of {len(body)} bytes" in error_of(source, tmp_path)
    (tmp_path / place).write_bytes(b"log in")
    assert str(tmp_path / place) in error_of(source, tmp_path)
    (tmp_path / place).write_bytes(body)
    if source == "shakespeare":
        assert f"{found}, not {D.SHAKESPEARE_SHA256}" in error_of(source, tmp_path)
    monkeypatch.setattr(D, "SHAKESPEARE_SHA256", found)
    assert len("".join(sides(source, tmp_path))) > 600


def test_batch_row_is_a_function_of_seed_stream_step_and_index():
    """Row i does not depend on batch_size; it does on seed, stream and step."""
    text = np.arange(1000, dtype=np.uint16)
    keys = (3, 5, 0), (4, 5, 0), (3, 6, 0), (3, 5, 1)
    rows, *others = (get_batch(text, 16, 64, *key)[0] for key in keys)
    assert torch.equal(get_batch(text, 16, 7, *keys[0])[0], rows[:7])
    assert not any(torch.equal(other, rows) for other in others)


def test_batch_is_windows_of_the_text():
    """Targets one token ahead; every window can come, the last one too, and none beyond it."""
    text = np.arange(20, dtype=np.uint8)
    inputs, targets = get_batch(text, 16, 400, seed=0, step=0)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(16))
    assert torch.equal(targets, inputs + 1)
    assert set(inputs[:, 0].tolist()) == {0, 1, 2, 3}
    with raises(DataError, match="16 tokens"):
        get_batch(text[:16], 16, 1, 0, 0)


@parametrize("n", [17, 40, 1601])
def test_val_batch_is_spread_over_all_of_validation(n):
    """Fixed windows that share no target, first token to last, as many as asked for or as there are."""
    for n_tokens in (1, 100, 10**9):
        inputs, targets = val_batch(np.arange(n, dtype=np.uint16), 16, n_tokens)
        starts = inputs[:, 0]
        count = min(max(n_tokens // 16, 1), (n - 1) // 16)
        assert torch.equal(inputs, starts[:, None] + torch.arange(16))
        ideal = torch.linspace(0, n - 17, count)
        assert len(inputs) == count
        assert (starts - ideal).abs().max() < 1
        assert (starts.diff() >= 16).all()


# ---- results ----


def test_study_makes_what_is_missing_and_goes_on_where_it_was_killed():
    """A run whose folder is as a kill leaves it, a row cut off, ends as the same run in one piece; what is
    recorded, or not to be made again, is left alone; a failure is told in one line."""
    small = "--opt adamw --batch_tokens 1024 --eval_tokens 1024 --n_layer 1"
    flags = f"{small} --steps 12 --checkpoint_interval 5 --init_from warmup"
    write(
        "list",
        f"warmup | AdamW | warmup | {small} --steps 2\n"
        f"steep | AdamW | whole | {flags} --seed 0\n"
        f"steep | AdamW | whole, again | {flags} --seed 0\n"
        "steep | AdamW | bad | --opt adamw --lr -1\n"
        "steep | AdamW | old | was --opt adamw --no_such_flag 1\n",
    )

    def study(records, only=""):
        flags = f"--list list --out out --jobs 1 --records {records} --only={only}".split()
        done = python(HERE / "results/study.py", *flags, cwd=".")
        return done, [json.loads(line) for line in Path(records).read_text().splitlines()]

    done, made = study("records")
    assert done.returncode == 1 and "3 lines, 2 runs to make" in done.stdout
    [failed] = [line for line in done.stdout.splitlines() if "failed" in line]
    assert "--lr" in failed and "| bad:" in failed
    assert [record["ran"] for record in made] == [2, 12]
    assert "2 lines, 0 runs" in study("records", "whole")[0].stdout
    [run] = Path("out").glob("opt-adamw*seed-0")
    shutil.copyfile(run / "checkpoint.previous.pt", run / "checkpoint.pt")
    os.truncate(run / "log.jsonl", os.path.getsize(run / "log.jsonl") - 99)
    _, made_again = study("again", "whole")
    assert made_again[-1]["curve"] == made[-1]["curve"]


def test_tables_come_from_the_records():
    """Those of tables.md, and the main comparison, the first of them, in the README of the results."""
    tables = python("results/tables.py").stdout
    assert (HERE / "results/tables.md").read_text() == tables
    _, main, *_ = tables.split("\n## ")
    assert main.split("\n\n")[1].strip() in (HERE / "results/README.md").read_text()


def test_every_run_of_the_list_is_recorded_and_its_flags_are_known():
    """Of those that can be made again."""
    sys.path.insert(0, str(HERE / "results"))
    from study import read_list, read_records

    records = read_records()
    for line in read_list():
        assert line.key in records
        args, given = (None, {}) if line.gone else train.resolve(line.flags.split())
        assert all(args.kind in kinds for kinds in given.values())  # none that the run would not use


LOG = """{"config": {"batch_tokens": 1000000}}
{"step": 0, "tokens": 0, "grad_equivalents": 0, "seconds": 0, "val_loss": 3.0}
{"step": 1, "tokens": 1e6, "grad_equivalents": 1, "seconds": 1, "val_loss": LOSS}
{"step": 2, "val"""


def test_plot_compares_runs_and_says_where_matplotlib_is_missing():
    """The last line of a log is cut off, as by a kill."""
    write("a/log.jsonl", LOG.replace("LOSS", "2.0"))
    write("b/log.jsonl", LOG.replace("LOSS", "2.5"))
    write("matplotlib.py", "raise ImportError")
    done = python(HERE / "results/plot.py", "a", "b", cwd=".", PYTHONPATH=".")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert " ".join(done.stdout.split()).endswith("2.50 a 1 1.00 1.00 1 2.50 b 1 1.00 1.00 1")


def test_plot_draws_a_run():
    """With the panels that it has numbers for."""
    pytest.importorskip("matplotlib")
    python(HERE / "results/plot.py", HERE / "results/default_run/cg", "--save", "cg.svg", cwd=".")
    text = Path("cg.svg").read_text()
    assert "damping" in text and "learning rate" not in text


README = (HERE / "README.md").read_text()


def test_what_the_readme_found_is_in_the_records():
    """Every figure of that section is in these pages of results, whose first table has its rows."""
    found = README[README.index("## What was found") : README.index("## Martens'")]
    main, *others = [
        (HERE / "results" / name).read_text() for name in ("README.md", "tables.md", "authors.md")
    ]
    for method, *numbers in re.findall(r"^\| (.*?)(?: \(`.*`\))? \| ([\d.]+) \| ([\d.]+) \|$", found, re.M):
        [row] = [line.split(" | ") for line in main.splitlines() if line.startswith(f"| {method} ")]
        assert [row[1], row[4]] == numbers
    figures = [set(re.findall(r"\d[\d,]*(?:\.\d+)?", text)) for text in (found, "".join([main, *others]))]
    assert figures[0] <= figures[1]


def test_the_defaults_are_as_the_readme_says():
    """Steps and tokens of the default run, and the loss at the end of its record."""
    args, _ = train.resolve([])
    *_, last = map(json.loads, (HERE / "results/default_run/cg/log.jsonl").read_text().splitlines())
    for told in (f"{args.steps} steps of {args.batch_tokens:,}", f"{last['val_loss']:.2f}"):
        assert told in README.replace("\n", " ")
    assert last["step"] == args.steps


def test_code_of_the_readme_runs():
    """Martens' step, a loop, and a solver of one's own, whose steps lower the loss."""
    model, (x, y) = gpt(), tokens(40)
    names = {**vars(gn), "model": model, "x": x, "y": y, "params": list(model.parameters())}
    names |= {"damping": 1.0, "batches": [(x, y)]}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)
    assert names["rho"] > 0.5
    opt = GaussNewton(model, names["OneSystem"](model))
    opt.load_state_dict(opt.state_dict())
    assert opt.step(x, y)["loss"] > opt.step(x, y)["loss"]
