"""The optimizers that Gauss-Newton is compared with (AdamW, SGD, Muon, SOAP, K-FAC) and their schedule.
Then what it shares with them: Kronecker factors, vectors over parameters, processes, memory, the loss.

    opt = make_optimizer("soap", model)                     # any nn.Module; lr=None takes the default
    base = [group["lr"] for group in opt.param_groups]
    for step in range(total_steps):
        factor = lr_schedule(step, total_steps, "cosine", warmup_steps=10)
        for group, lr in zip(opt.param_groups, base):
            group["lr"] = lr * factor
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()                                          # kfac: after opt.observe(inputs, targets)
        opt.zero_grad()

To add an optimizer: write it as an Optimizer (below: a torch.optim.Optimizer that defines `move`), give it a
row in DEFAULTS, and add its branch to make_optimizer. The trainer and the tests find it there. Use
Combined if it suits only some of the parameters. Its step() must leave p.grad as it was.
"""

import ctypes
import math
import os
import sys
import warnings
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.backends import mha

# Each method's settings, as its reference has them. But lr, the peak rate, is the best of 2 to 6 that were
# tried with preset tiny, Python's library and 16k tokens a step. Other models and data need others.
DEFAULTS = {
    "adamw": dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),  # GPT-3: arXiv 2005.14165, appendix B
    "sgd": dict(lr=0.3, momentum=0.9, weight_decay=0.0),  # Sutskever et al. 2013, Nesterov's form
    # Jordan 2024; decay and scale: arXiv 2502.16982
    "muon": dict(lr=0.03, momentum=0.95, betas=(0.9, 0.95), weight_decay=0.1, muon_scale="match_rms_adamw"),
    # arXiv 2409.11321
    "soap": dict(lr=1e-2, betas=(0.95, 0.95), weight_decay=0.01, precondition_frequency=10),
    # arXiv 1503.05671; clipping in KL: ACKTR, arXiv 1708.05144
    "kfac": dict(lr=0.03, momentum=0.9, weight_decay=0.0, precondition_frequency=10),
}


def make_optimizer(
    name,
    model,
    lr=None,
    weight_decay=None,
    betas=None,
    momentum=None,
    precondition_frequency=None,
    muon_scale=None,
):
    """One of those in DEFAULTS for a model's trainable parameters. None stands for the default. A method
    ignores what it does not use.

    weight_decay reaches matrices (ndim >= 2) only, never norms and biases. It is decoupled, p -= lr *
    weight_decay * p, except in sgd, where it is the L2 term of the gradient. Muon's betas belong to the
    AdamW beside it. Its steps are U Vᵀ times muon_scale: "match_rms_adamw" 0.2 sqrt(max(m, n)), steps of
    AdamW's size, so that one rate suits both; "original" sqrt(max(1, m / n)), the paper's.
    Raises ValueError for an unknown name, and as `trainable` does.
    """
    given = locals()  # each argument by its name
    if name not in DEFAULTS:
        raise ValueError(f"unknown optimizer {name!r}; choose from {', '.join(DEFAULTS)}")
    o = {key: default if given[key] is None else given[key] for key, default in DEFAULTS[name].items()}
    params = trainable(model)
    plain = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "soap": SOAP}
    if name == "sgd":
        o["nesterov"] = o["momentum"] > 0
    if name in plain:
        return plain[name](decay_groups(params), **o)
    if name == "kfac":
        return KFACOptimizer(model, **o)
    hidden = hidden_matrices(model)
    rest = [p for p in params if p not in set(hidden)]
    adamw = torch.optim.AdamW(
        decay_groups(rest), lr=o["lr"], betas=o.pop("betas"), weight_decay=o["weight_decay"]
    )
    muon = torch.optim.Muon([{"params": hidden}], adjust_lr_fn=o.pop("muon_scale"), **o)
    return Combined([muon, adamw])


def decay_groups(params):
    """Two groups: matrices, which decay as the optimizer is told, and all else, which does not."""
    return [
        {"params": [p for p in params if p.ndim >= 2]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


def lr_schedule(step, total_steps, schedule="constant", warmup_steps=0):
    """The factor in [0, 1] for the base rate at `step`, which counts from 0.

    Warmup is linear, (step + 1) / warmup_steps, so that no step is lost. Then "constant" stays at 1; "cosine"
    falls to 0 at step == total_steps (Loshchilov & Hutter 2017); "wsd", warmup-stable-decay (arXiv
    2404.06395), holds 1 and falls linearly to 0 over the last fifth of total_steps."""
    if schedule not in ("constant", "cosine", "wsd"):
        raise ValueError(f"unknown schedule {schedule!r}; choose from constant, cosine, wsd")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        return cosine((step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "wsd":
        return min(1.0, max(0, total_steps - step) / max(1.0, 0.2 * total_steps))
    return 1.0


def cosine(done):
    """From 1 at 0 to 0 at 1 and beyond."""
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


# ------------------------------------------------------------------------------------------------------------
# Optimizers that torch does not have


class Optimizer(torch.optim.Optimizer):
    """torch.optim's contract. A subclass defines `move`."""

    def move(self):
        """One step of all parameters that have a gradient; no autograd, no autocast."""
        raise NotImplementedError

    def with_grad(self):
        """(group, parameter) for every parameter that has a gradient."""
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        devices = (p.device.type for _, p in self.with_grad())
        with torch.autocast(next(devices, "cpu"), enabled=False):
            self.move()
        return loss


class Combined(Optimizer):
    """Optimizers over disjoint parameters as one. Its param_groups are theirs in order, and its state is
    theirs; a group that is added later is the last one's. (Of torch's schedulers, those that cycle momentum
    need cycle_momentum=False.)"""

    parts = ()

    def __init__(self, parts):
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts

    def add_param_group(self, group):
        if self.parts:  # none in __init__, whose groups are complete
            group = {**self.parts[-1].defaults, **group}
        super().add_param_group(group)

    def move(self):
        groups = self.param_groups
        # linked at every step, since load_state_dict puts new objects in their place
        for part in self.parts:
            count = None if part is self.parts[-1] else len(part.param_groups)
            part.param_groups = groups[:count]
            groups = groups[count:]
            part.state = self.state
            part.step()


def hidden_matrices(model):
    """The trainable 2-D parameters that are neither an embedding nor the output head, which is `model.head`
    or else the last nn.Linear. A matrix tied to either is out too. Muon's orthogonal steps are meant for
    these only (Jordan 2024).
    """
    modules = [*model.modules(), getattr(model, "head", None)]
    head = [m for m in modules if isinstance(m, nn.Linear)][-1:]
    embeddings = [m for m in modules if isinstance(m, nn.Embedding)]
    outer = {p for m in head + embeddings for p in m.parameters()}
    return [p for p in trainable(model) if p.ndim == 2 and p not in outer]


class SOAP(Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321, algorithm 3). For a matrix of
    gradient G (m, n):

        L  ← β₂ L + (1 − β₂) G Gᵀ                         Shampoo's two sides
        R  ← β₂ R + (1 − β₂) Gᵀ G
        G′ = Q_Lᵀ G Q_R                                   the gradient in the basis
        M  ← β₁ M + (1 − β₁) G′                           Adam's moments, with bias correction
        V  ← β₂ V + (1 − β₂) G′ ∘ G′
        W  ← W − lr wd W − lr Q_L (M / (√V + eps)) Q_Rᵀ
        every f-th step, for Q_L by L and Q_R by R:       one power iteration (algorithm 4)
            sort Q's columns, and V with them, by diag(Qᵀ L Q), largest first
            Q = orthonormal factor of QR(L Q)
            M = the same vector in the new basis

    Differs from the published code in: 1. The first step is taken, not skipped: L, R and (by eigh) Q_L, Q_R
    come from the first gradient, so that step is lr times its polar factor U Vᵀ, short of singular values
    lost to rounding. 2. eps is added to the bias-corrected root, as in torch.optim.Adam. 3. Weights decay
    before the step, not after it. Like that code, and unlike the paper, it holds M in the basis, which saves
    two products and changes rounding only.

    betas: b1, b2. precondition_frequency: f, in steps. A side longer than max_precond_dim keeps the identity
    for its basis, and so do both sides of anything not 2-D, which makes it AdamW. Parameters: float32 or
    float64. Memory: 2 (m^2 + n^2 + mn) numbers per matrix."""

    def __init__(
        self,
        params,
        lr=3e-3,
        betas=(0.95, 0.95),
        eps=1e-8,
        weight_decay=0.01,
        precondition_frequency=10,
        max_precond_dim=10_000,
    ):
        settings = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
        )
        least = lr, eps, weight_decay, *betas, precondition_frequency - 1
        if not all(x >= 0 for x in least) or max(betas) >= 1:
            raise ValueError(
                "lr, eps and weight_decay must not be negative, betas in [0, 1), precondition_frequency at "
                f"least 1, and the settings are {settings}"
            )
        super().__init__(params, settings)

    def move(self):
        for group, p in self.with_grad():
            G = p.grad
            s = self.state[p]
            lr = group["lr"]
            b1, b2 = group["betas"]
            sides = [k for k in (0, 1) if G.ndim == 2 and G.shape[k] <= group["max_precond_dim"]]
            first = not s
            if first:
                s.update(
                    step=0,
                    M=torch.zeros_like(p),
                    V=torch.zeros_like(p),
                    cov=[None, None],
                    basis=[None, None],  # the identity
                )
            s["step"] += 1
            M = s["M"]
            V = s["V"]
            cov = s["cov"]  # L (m, m), R (n, n)
            basis = s["basis"]  # Q_L, Q_R
            for k in sides:
                new = G @ G.T if k == 0 else G.T @ G
                if first:
                    cov[k] = new * (1 - b2)
                    basis[k] = eigh(cov[k])[1]
                else:
                    cov[k].lerp_(new, 1 - b2)

            G_rot = to_basis(G, basis)  # (m, n)
            if first and sides:
                # In its own eigenbasis G is diagonal, but L = G Gᵀ resolves its singular values only down to
                # sqrt(machine eps) of the largest. Adam would enlarge what rounding leaves below that to full
                # steps.
                G_rot = G_rot.where(G_rot.abs() > torch.finfo(G.dtype).eps ** 0.5 * G_rot.abs().max(), 0)
            M.lerp_(G_rot, 1 - b1)
            V.mul_(b2).addcmul_(G_rot, G_rot, value=1 - b2)
            m_hat = M / (1 - b1 ** s["step"])
            v_hat = V / (1 - b2 ** s["step"])
            p.mul_(1 - lr * group["weight_decay"])
            p.sub_(from_basis(m_hat / (v_hat.sqrt() + group["eps"]), basis), alpha=lr)

            if s["step"] % group["precondition_frequency"] == 0:
                M = from_basis(M, basis)
                for k in sides:
                    moved = cov[k] @ basis[k]
                    order = (basis[k] * moved).sum(0).argsort(descending=True)  # by diag(Qᵀ L Q)
                    basis[k] = torch.linalg.qr(moved[:, order]).Q
                    V = V.index_select(k, order)
                s["M"] = to_basis(M, basis)
                s["V"] = V


def to_basis(X, basis):
    """Q_Lᵀ X Q_R; None stands for the identity."""
    left, right = basis
    X = X if left is None else left.T @ X
    return X if right is None else X @ right


def from_basis(X, basis):
    """Q_L X Q_Rᵀ; None stands for the identity."""
    return to_basis(X, [None if q is None else q.T for q in basis])


def eigh(C, warn=warnings.warn):
    """Eigenvalues, not negative, and eigenvectors of a symmetric C (d, d), found in float64: in float32
    LAPACK can return NaN, without a word, where entries underflow. Where it fails, the diagonal and the
    identity, with a warning. On the CPU where the device has no float64 (Apple's mps)."""
    try:
        double = C.double()
    except (TypeError, RuntimeError):
        double = C.cpu().double()
    try:
        values, vectors = torch.linalg.eigh(double)
    except torch.linalg.LinAlgError as e:
        warn(f"an eigendecomposition failed, the matrix's diagonal takes its place: {str(e).splitlines()[0]}")
        return C.diagonal().clamp_min(0), torch.eye(len(C)).to(C)
    return values.clamp_min(0).to(C), vectors.to(C)


# ------------------------------------------------------------------------------------------------------------
# Kronecker factors


def linear_maps(z, params):
    """What multiplies a parameter in the graph of z, found by a walk through it, whatever modules made it.
    Yields (i, side, edge, inputs): parameter i; the side of it that the map's output s has; where the
    derivative by s arrives, for torch.autograd.grad; and what goes in:

        s = a Wᵀ, as in nn.Linear    side 0    a (rows, in)
        s = a W, W (in, out)         side 1    a (rows, in)
        s = W[tokens]                side 1    tokens, int64
        s = ... + b                  side 0    None

    Products of more than two dimensions (einsum, convolutions, recurrent layers) are not among them. A
    parameter used in several ways, on either side or as a linear map and an embedding, is yielded for the
    first way only, and for a linear map rather than an embedding.
    """
    index = {p: i for i, p in enumerate(params)}
    first_use = {}
    # embeddings last, so that a tied matrix has the factors of its linear map
    for node in sorted(graph_of(z), key=lambda node: node.name() == "EmbeddingBackward0"):
        name = node.name()
        edge = torch.autograd.graph.GradientEdge(node, 0)
        if name in MULTIPLIER:
            i, side = origin(node.next_functions[-1][0], index)
            a = getattr(node, MULTIPLIER[name])
            if i is not None:  # else a need not have been kept
                use = side, a.is_floating_point()
                if first_use.setdefault(i, use) == use:
                    yield i, side, edge, a
        if name in ("AddBackward0", "AddmmBackward0"):
            shape = node._input_metadata[0].shape
            for term, _ in node.next_functions:
                i, _ = origin(term, index)
                if i is not None and len(shape) > 1 and params[i].shape == tuple(shape[-1:]):
                    yield i, 0, edge, None


MULTIPLIER = {  # where a node of the graph keeps what multiplies its last input, a weight
    "MmBackward0": "_saved_self",  # a W
    "AddmmBackward0": "_saved_mat1",  # b + a W
    "EmbeddingBackward0": "_saved_indices",  # W[tokens]
}


def graph_of(z):
    """Yields the nodes of z's graph, each once."""
    seen = {None}
    stack = [z.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack += [function for function, _ in node.next_functions]


def origin(node, index):
    """The index of the parameter that a node of the graph hands on, or None; and the side of it that s = a W
    has: 1, or 0 where it comes transposed."""
    side = 1
    while node is not None and node.name() in (
        "TBackward0",
        "TransposeBackward0",
        "PermuteBackward0",
        "ToCopyBackward0",
    ):
        if node.name() != "ToCopyBackward0":  # which is a cast, by autocast
            side = 1 - side
        node = node.next_functions[0][0]
    return index.get(getattr(node, "variable", None)), side


class KFAC:
    """The Gauss-Newton matrix as a Kronecker product per weight (Martens & Grosse 2015), in its eigenbasis.

    For a linear map s = W a the block of W (out, in) is approximated by L ⊗ R, with L = E[δ δᵀ], R = E[a aᵀ],
    the expectations over tokens and over labels sampled from the model, and δ = ∂(loss of one sequence)/∂s.
    With batch_labels they are the batch's, as in the empirical Fisher matrix, which knows from the first step
    on which tokens are frequent.
    With L = Q_L Λ_L Q_Lᵀ, R = Q_R Λ_R Q_Rᵀ, and S = diag(Λ_L) diag(Λ_R)ᵀ (out, in), products of eigenvalues,

        (L ⊗ R + λI)⁻¹ V = Q_L [ (Q_Lᵀ V Q_R) / (S + λ) ] Q_Rᵀ,                   the damping exact.

    A weight kept as (in, out) has the two the other way round. Embedding (tokens, width): L is diagonal, the
    frequency of each token, and R = E[δ δᵀ]. A bias: R = 1. A side above `max_side`: diagonal. All other
    parameters (norms, say): a diagonal, the mean square of the gradient with sampled labels, or with the
    batch's and a random sign for each sequence. Of tokens whose targets are left out a counts, δ does not.
    """

    SQUARES = 8  # diagonals are made from so many gradients, each of a part of the rows

    def __init__(self, model, max_side=4096, batch_labels=False):
        self.model = model
        self.max_side = max_side
        self.batch_labels = batch_labels
        self.params = trainable(model)
        self.repaired = ""  # what went wrong in the last update or decomposition, and was mended
        # Each parameter's, as in an optimizer of torch. "factors": the sides [L, R], or [diagonal] in its
        # shape. "eigen": the same as [(eigenvalues, eigenvectors or None for the identity), ...]
        self.state = defaultdict(dict)

    @torch.enable_grad()
    def update(self, inputs, targets, micro_batch=None, generator=None, decay=0.0):
        """Factors from a batch, averaged with the earlier ones by `decay`; then `decompose` makes them ready
        for use. Where labels are sampled, targets say which tokens count."""
        targets, n_targets = check_targets(inputs, targets)
        sums, squares = self._sums(inputs, targets, micro_batch, generator)
        uses = sorted(sums)
        if not same_everywhere(hash(tuple(uses)) >> 20):  # exact as a float
            raise ValueError("K-FAC needs every process's rows to take the same paths through the model")
        found = {i: [square / n_targets] for i, square in squares.items() if square.any()}
        for i, side in uses:
            dd, aa, count = sum_over_processes(*sums[i, side])
            # Σ δδᵀ is divided by the batch's targets, Σ aaᵀ by the number of its own terms. The two differ
            # where a map is used at several positions a token.
            found[i] = [dd / n_targets, aa / count]
            if side == 1:
                found[i].reverse()
        self.repaired = ""
        for i, p in enumerate(self.params):
            state = self.state[p]
            before = state.get("factors", [torch.zeros_like(p)])
            new = found.get(i, before)  # not there: not used in this batch
            if not all(side.isfinite().all() for side in new):
                self.repaired = "K-FAC factors not finite"
                new = before
            if "factors" in state and len(before) == len(new):
                new = [decay * o + (1 - decay) * side for o, side in zip(before, new)]
            state["factors"] = new

    def _sums(self, inputs, targets, micro_batch, generator):
        """Two dicts of sums over a batch. {(i, side): [Σ δδᵀ, Σ aaᵀ, number of terms]}, of this process's
        rows, for parameter i and the side of it that s has. {i: Σ g²}, of all rows, for parameters without
        factors."""
        all_rows = torch.arange(len(inputs))
        [own_rows] = local_rows(all_rows)
        z = logits(self.model, inputs[:2], targets[:2])
        shape = [1] * targets.ndim if self.batch_labels else [*targets.shape[1:], 1]  # of a row's draws
        factored = {i for i, *_ in linear_maps(z, self.params)}
        del z
        sums = {}
        others = [i for i, p in enumerate(self.params) if i not in factored and p.requires_grad]
        squares = dict.fromkeys(others, 0.0)
        for rows_of_a_square in all_rows.split(math.ceil(len(inputs) / self.SQUARES)):
            grads = {i: torch.zeros_like(self.params[i]) for i in others}
            for rows in rows_of_a_square.split(micro_batch or len(inputs)):
                # Each process draws for all rows, on the CPU: labels and signs depend on nothing else.
                draws = torch.rand(len(rows), *shape, generator=generator)
                own = torch.isin(rows, own_rows)
                if own.any():
                    self._add(inputs[rows[own]], targets[rows[own]], draws[own], sums, grads)
            # Labels or signs are independent, so that in the mean the square of a sum is the sum of squares.
            for i, g in zip(others, sum_over_processes(*grads.values())):
                squares[i] += g * g
        return sums, squares

    def _add(self, x, y, draws, sums, grads):
        """Add some rows to the factors' sums, and to the gradients of the parameters that have no factors."""
        z = logits(self.model, x)
        maps = list(linear_maps(z, self.params))
        probs = torch.softmax(z.detach(), dim=-1)
        draws = draws.to(z.device)
        labels = y
        if not self.batch_labels:  # a number drawn from 0 to 1 is in label k's share of them
            labels = (probs.cumsum(-1) <= draws).sum(-1).clamp_max(probs.shape[-1] - 1)
        # a sum over tokens, so that each has its own gradient
        u = cross_entropy_grad(probs, labels, per_token(y, 1.0))
        if self.batch_labels:
            u *= (draws - 0.5).sign()
        edges = [edge for _, _, edge, _ in maps]
        rest = [self.params[i] for i in grads]
        found = torch.autograd.grad(z, edges + rest, u, allow_unused=True)
        for (i, side, _, a), delta in zip(maps, found):
            if delta is None:
                continue
            delta = delta.to(self.params[i].dtype).flatten(0, -2)  # (rows, out); autocast's is bfloat16, say
            count = delta.new_tensor([len(delta)])
            if a is None:
                aa = count
            elif a.is_floating_point():
                aa = self._gram(a.detach().to(delta.dtype))
            else:
                aa = torch.bincount(a.flatten(), minlength=len(self.params[i])).to(delta.dtype)
            new = self._gram(delta), aa, count
            sums[i, side] = [old + t for old, t in zip(sums.get((i, side), (0, 0, 0)), new)]
        for grad, g in zip(grads.values(), found[len(maps) :]):
            if g is not None:
                grad += g

    def _gram(self, m):
        """mᵀm (side, side), or its diagonal where the side is too large to decompose."""
        return m.T @ m if m.shape[1] <= self.max_side else (m * m).sum(0)

    def decompose(self):
        """Eigenvalues and eigenvectors of the factors."""
        failures = []
        for p in self.params:
            sides = self.state[p]["factors"]
            self.state[p]["eigen"] = [
                eigh(side, failures.append) if len(sides) == side.ndim == 2 else (side, None)
                for side in sides  # a single one is the diagonal, of any shape
            ]
        if failures:
            self.repaired = self.repaired or failures[0]

    def apply(self, v, function, part=None):
        """function(K) v, the function taken on the eigenvalues; v flat (P,), or over the parameters in
        `part`."""
        params = [self.params[i] for i in part] if part else self.params
        tensors = unflatten(v, params)
        return flatten([apply_to_one(t, function, self.state[p]["eigen"]) for p, t in zip(params, tensors)])


def apply_to_one(V, function, sides):
    """function(K) V for one parameter, its sides [(eigenvalues, eigenvectors), ...]:

    K = Q S Qᵀ,   function(K) V = Q_L [ function(S) ∘ (Q_Lᵀ V Q_R) ] Q_Rᵀ
    """
    values, bases = zip(*sides)
    if len(sides) == 1:
        return V * function(*values)
    S = torch.outer(*values)
    return from_basis(to_basis(V.reshape(S.shape), bases) * function(S), bases).reshape_as(V)


def tikhonov(sides, gamma):
    """One parameter's sides with factored damping (Martens & Grosse, section 6.3): Λ_L + γ/π and Λ_R + γπ
    with π² = mean(Λ_R) / mean(Λ_L)."""
    shifts = [gamma**2]
    if len(sides) == 2:
        left, right = (values.mean() + 1e-30 for values, _ in sides)
        pi = (right / left).sqrt()
        shifts = gamma / pi, gamma * pi
    return [(values + shift, Q) for (values, Q), shift in zip(sides, shifts)]


class KFACOptimizer(Optimizer):
    """Natural gradient with Kronecker factors (Martens & Grosse 2015) and momentum, its step clipped in KL:

        L, R  running averages of E[δδᵀ], E[aaᵀ], labels sampled from the model, by `observe`
        natural ← [(L + γ/π) ⊗ (R + γπ)]⁻¹ g              factored Tikhonov damping, γ = √DAMPING
        natural ← natural min(1, √(KL_CLIP / Σ lr² naturalᵀg))    Σ over the groups (ACKTR: arXiv 1708.05144)
        momentum_buffer ← momentum momentum_buffer + natural
        W ← W − lr wd W − lr momentum_buffer

    Call `observe(inputs, targets)` before each step. Differs from the 2015 paper in: 1. damping is fixed, not
    adapted. 2. momentum is fixed, not solved for by the quadratic. 3. factors come from the first
    CURVATURE_FRAC of each batch's rows, eigenbases anew every precondition_frequency steps."""

    DAMPING = 3e-4
    KL_CLIP = 1e-2
    STAT_DECAY = 0.95
    CURVATURE_FRAC = 0.25

    def __init__(self, model, precondition_frequency, **settings):
        """For all of a model's trainable parameters. settings: lr, momentum and weight_decay."""
        self.kfac = KFAC(model)
        super().__init__(decay_groups(self.kfac.params), settings)
        self.kfac.state = self.state  # so that torch saves and loads it
        self.frequency = precondition_frequency
        self.steps = 0
        self.generator = torch.Generator().manual_seed(0)  # on the CPU

    def curvature_rows(self, rows):
        """How many of a batch's rows the factors are made from."""
        return math.ceil(self.CURVATURE_FRAC * rows)

    def observe(self, inputs, targets, micro_batch=None):
        """Factors from a share of the batch; returns the work in gradients of the whole batch."""
        inputs, targets = counted_rows(inputs, targets)
        rows = self.curvature_rows(len(inputs))
        decay = min(1 - 1 / (self.steps + 1), self.STAT_DECAY)  # as the paper starts its average
        with full_precision(self.kfac.model):
            self.kfac.update(inputs[:rows], targets[:rows], micro_batch, self.generator, decay)
            if self.steps % self.frequency == 0:
                self.kfac.decompose()
        return 2 / 3 * rows / len(inputs)

    def move(self):
        moved = self.with_grad()
        if not all("eigen" in self.state[p] for _, p in moved):
            raise RuntimeError(
                "call observe(inputs, targets) before the first step, which makes K-FAC's factors; for "
                "parameters that the model did not train at the start, make a new optimizer"
            )
        natural = {}
        for _, p in moved:
            sides = tikhonov(self.state[p]["eigen"], self.DAMPING**0.5)
            natural[p] = apply_to_one(p.grad, torch.reciprocal, sides)
        kl = float(sum(group["lr"] ** 2 * (natural[p] * p.grad).sum() for group, p in moved))
        clip = min(1.0, math.sqrt(self.KL_CLIP / max(kl, 1e-30)))
        for group, p in moved:
            momentum_buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            momentum_buffer.mul_(group["momentum"]).add_(clip * natural[p])
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(momentum_buffer, alpha=group["lr"])
        self.steps += 1

    def state_dict(self):
        return {**super().state_dict(), "steps": self.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.kfac.state = self.state  # load_state_dict made a new dict
        self.steps = state["steps"]
        self.generator.set_state(state["generator"])


# ------------------------------------------------------------------------------------------------------------
# Vectors over parameters


def trainable(model):
    """The parameters that a step moves, tied ones once, in the order of model.parameters(). Raises ValueError
    where there are none, where they do not make one float32 or float64 vector, and for a hook on one."""
    for name, p in model.named_parameters():
        if p.requires_grad and (p._backward_hooks or p._post_accumulate_grad_hooks):
            raise ValueError(
                f"{name} has a hook on its gradient, which not every solver would follow: remove it, and "
                "change the forward instead, or freeze the parameter"
            )
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("the model has no trainable parameters")
    dtypes = {p.dtype for p in params}
    if dtypes not in ({torch.float32}, {torch.float64}):
        raise ValueError(
            "trainable parameters must all be float32, or all float64, and these are "
            f"{' and '.join(sorted(str(t) for t in dtypes))}; for products in bfloat16 open "
            "torch.autocast inside the model's forward"
        )
    return params


def flatten(tensors):
    """Tensors of any shapes -> one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector, like):
    """One vector -> views of it with the shapes of the tensors in `like`."""
    return [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in like]), like)]


@torch.no_grad()
def assign(params, values):
    """Put tensors into parameters, bit for bit."""
    for p, v in zip(params, values):
        p.copy_(v)


def pieces(inputs, targets, micro_batch):
    """Split a batch along its first dimension into pieces of at most micro_batch rows (None: the whole
    batch)."""
    rows = micro_batch or len(inputs)
    return list(zip(inputs.split(rows), targets.split(rows)))


# ------------------------------------------------------------------------------------------------------------
# Many processes (torchrun): each has all parameters and a share of every batch's rows


def ranks():
    """This process's number, and how many there are; (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def local_rows(*tensors):
    """This process's slice of the rows of tensors that every process holds whole. Raises ValueError for fewer
    rows than processes."""
    rank, world = ranks()
    rows = len(tensors[0])
    if rows < world:
        raise ValueError(f"{rows} sequences cannot be shared by {world} processes")
    return tuple(t[rows * rank // world : rows * (rank + 1) // world] for t in tensors)


def sum_over_processes(*tensors):
    """Each tensor's sum over the processes, with the same bits on all of them; all of one dtype. In one
    process, what was given."""
    if ranks()[1] == 1 or not tensors:
        return tensors
    flat = flatten(tensors)
    dist.all_reduce(flat)
    return unflatten(flat, tensors)


def sum_number(x):
    """The same for a float or an int, in float64."""
    if ranks()[1] == 1:
        return x
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return sum_over_processes(torch.tensor(x, dtype=torch.float64, device=device))[0].item()


def same_everywhere(number):
    """Whether all processes have the same integer, below 2^53."""
    return sum_number(number) == ranks()[1] * number


# ------------------------------------------------------------------------------------------------------------
# Memory


def on_gpu(device):
    return "cuda" in str(device)


def tune_allocator():
    """Keep freed memory (glibc only). Its default gives every large tensor back to the system at once and
    takes the page faults again at the next: a fifth of a gradient's time at the tiny size."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD


def peak_memory_mb(device):
    if on_gpu(device):
        return torch.cuda.max_memory_allocated(device) / 1e6
    with suppress(ImportError):  # Windows
        import resource

        unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def free_memory(device):
    """Bytes that this process can take on the device. On a CPU: its share of what the machine has left, or of
    what its control group (a container, a job) has left, if that is less. 4 GB where the system does not say.
    """
    if on_gpu(device):
        return torch.cuda.mem_get_info(device)[0]
    return min(left_on_cpu(), default=4e9) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def left_on_cpu():
    """Yields what the machine has left, then what each of this process's control groups has: its limit less
    what is used. Pages of files do not count as used: the system can take them back."""
    with suppress(OSError, StopIteration), open("/proc/meminfo") as f:
        yield next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controller, path = line.split(":", 2)
            if controller not in CONTROL_GROUPS:
                continue
            root, cached, *names = CONTROL_GROUPS[controller]
            for folder in (Path(root + path) / "memory.stat").parents:  # the group's, and those above
                with suppress(OSError, ValueError, KeyError):  # not mounted here, or "max"
                    limit, used, stat = ((folder / name).read_text() for name in names)
                    sizes = dict(line.split() for line in stat.splitlines())
                    yield int(limit) - int(used) + int(sizes[cached])


CONTROL_GROUPS = {  # by the controller that a line of /proc/self/cgroup names; version 2 names none
    "": "/sys/fs/cgroup inactive_file memory.max memory.current memory.stat".split(),
    "memory": "/sys/fs/cgroup/memory total_inactive_file "
    "memory.limit_in_bytes memory.usage_in_bytes memory.stat".split(),
}


# ------------------------------------------------------------------------------------------------------------
# The loss: mean cross-entropy in nats per token


# The target of tokens that are left out of loss and count, as in torch.nn.functional.cross_entropy.
IGNORED = -100


def check_targets(inputs, targets):
    """The targets as int64, and how many count. Raises ValueError for what are not classes for these
    inputs."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(
            f"targets must be class numbers (int64), not {targets.dtype}: soft targets are not supported"
        )
    if len(inputs) != len(targets):
        raise ValueError(f"inputs have {len(inputs)} rows and targets {len(targets)}")
    targets = targets.long()
    n = int((targets != IGNORED).sum())
    if n == 0:
        raise ValueError(f"the batch is empty: it has {len(inputs)} rows and no target that counts")
    return targets, n


def check_logits(z, y):
    """Raises ValueError unless z are logits (..., V) for the targets y (...)."""
    if not torch.is_tensor(z):
        raise ValueError(f"""the model must return logits, and it returns a {type(z).__name__}; wrap it:
    class Logits(torch.nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): return self.model(x){".logits" if hasattr(z, "logits") else "[0]"}""")
    if z.shape[:-1] != y.shape:
        raise ValueError(
            f"logits of shape {tuple(z.shape)} do not fit targets of shape {tuple(y.shape)}: "
            "there must be one row of logits, over all classes, for each target"
        )
    low, high = torch.aminmax(torch.where(y == IGNORED, 0, y))
    if low < 0 or high >= z.shape[-1]:
        raise ValueError(
            f"targets reach from {low} to {high}, and the model has classes 0 .. {z.shape[-1] - 1} "
            f"({IGNORED} marks targets to leave out)"
        )


def logits(model, x, y=None):
    """z = model(x) (..., V), in float32 at least; checked against the targets, if they are given."""
    z = model(x)
    if y is not None:
        check_logits(z, y)
    return z if z.dtype == torch.float64 else z.float()


def counted_rows(inputs, targets):
    """The rows that have a target that counts, so that any subset of them has some."""
    counted = (targets != IGNORED).reshape(len(targets), -1).any(1)
    return (inputs, targets) if counted.all() else (inputs[counted], targets[counted])


def per_token(targets, n):
    """What each token's loss is divided by, (...,) -> (..., 1): n, or infinity for those that are left
    out."""
    return torch.where(targets == IGNORED, math.inf, n).unsqueeze(-1)


def cross_entropy_sum(z, targets):
    return F.cross_entropy(z.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORED)


def cross_entropy_grad(probs, targets, n):
    """∂L/∂z = (p − onehot(y)) / n.  probs (..., V), targets (...), n a number or `per_token` -> (..., V)."""
    own = targets.clamp_min(0).unsqueeze(-1)  # (..., 1)
    return probs.scatter(-1, own, probs.gather(-1, own) - 1).div_(n)


def evaluate(model, x, y=None):
    """Logits without a graph. With gradients off, nn.TransformerEncoder would take a faster path, which is
    another function than the one that is differentiated: here it does not."""
    fast = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return logits(model, x, y).detach()
    finally:
        mha.set_fastpath_enabled(fast)


@contextmanager
def full_precision(model):
    """Autocast is off inside, for a solver's own algebra; calls of `model` keep the caller's. Its cache of
    bfloat16 weights is off too: inside a context it would outlive a change of the weights."""
    device_type = next(model.parameters()).device.type
    outside = torch.autocast(device_type, enabled=torch.is_autocast_enabled(device_type), cache_enabled=False)

    # A compiler must leave the two hooks alone, or it would compile anew for every context. To name
    # torch.compiler.disable loads the compiler, which takes a second. So it is used where that is loaded.
    disable = torch.compiler.disable if "torch._dynamo" in sys.modules else lambda hook: hook

    @disable
    def enter(*_):
        torch.clear_autocast_cache()  # of a forward that @torch.autocast decorates
        outside.__enter__()

    @disable
    def leave(*_):
        outside.__exit__(None, None, None)

    with (
        model.register_forward_pre_hook(enter),
        model.register_forward_hook(leave, always_call=True),
        torch.autocast(device_type, enabled=False, cache_enabled=False),
    ):
        yield


def batch_loss(model, inputs, targets, micro_batch=None):
    """Mean cross-entropy (nats per token) without a graph, as a float; attention may be fused."""
    targets, n = check_targets(inputs, targets)
    batches = pieces(*local_rows(inputs, targets), micro_batch)
    return sum_number(sum(cross_entropy_sum(evaluate(model, x, y), y).item() for x, y in batches)) / n


@torch.enable_grad()
def batch_grad(model, inputs, targets, micro_batch=None):
    """Loss (float) and flat gradient by ordinary backward passes."""
    targets, n = check_targets(inputs, targets)
    params = trainable(model)
    loss = 0.0
    grad = 0.0
    for x, y in pieces(*local_rows(inputs, targets), micro_batch):
        mean = cross_entropy_sum(logits(model, x, y), y) / n
        loss += mean.item()
        grad += flatten(torch.autograd.grad(mean, params, materialize_grads=True))
    return sum_number(loss), sum_over_processes(grad)[0]
