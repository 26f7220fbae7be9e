"""Full Gauss-Newton for language models: Hessian-free conjugate gradients on the generalised Gauss-Newton matrix.

One outer step at parameters θ (arXiv 2510.09378; Martens 2010, "Deep learning via Hessian-free optimization"):

    1. linearise   z(θ + d) ≈ z + J d,  and the loss to second order in the logits:
                   m(d) = L + gᵀd + ½ dᵀG d,   g = Jᵀ ∂L/∂z,   G = Jᵀ H J,   H = ∂²L/∂z² = (diag(p) − ppᵀ) / N
    2. solve       (G + λI) d = −g by preconditioned CG, with products G v only: G is never formed
    3. search      f(θ + αd) over α; α = 0 when nothing is better
    4. update      θ ← θ + αd, and λ by the ratio of actual to predicted decrease (Levenberg-Marquardt)

`GGN`, `cg`, `KFAC` and `line_search` stand alone; `GaussNewton` puts them together and works on any nn.Module whose
forward(inputs) gives logits (..., classes):

    opt = GaussNewton(model)
    for inputs, targets in batches:          # large batches: this is a method for few, good steps
        record = opt.step(inputs, targets)
        print(record["loss"], record["rho"], record["reason"])
"""
import math
import os
import random
import warnings
import weakref
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from baselines import full_precision, make_optimizer, owners, ranks, reduce, reduce_number, share

# ---------------------------------------------------------------------------------------------------------------------
# Vectors over parameters, and the loss in the logits


def trainable(model):
    """The parameters that a step moves, tied ones once, in the order of model.parameters(). Raises ValueError where there
    are none, or where they do not make one float32 or float64 vector."""
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("the model has no trainable parameters")
    dtypes = {p.dtype for p in params}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise ValueError("trainable parameters must all be float32, or all float64, and these are "
                         f"{' and '.join(sorted(str(t) for t in dtypes))}; for products in bfloat16 open "
                         "torch.autocast inside the model's forward")
    return params


@contextmanager
def placed(model, tensors):
    """While open, the model has other tensors in place of its trainable parameters; whatever happens, it gets back the
    very objects it had. (torch.func.functional_call leaves tensors behind where one module stands in several places.)"""
    new = {id(p): t for p, t in zip(trainable(model), tensors)}
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if id(p) in new]
    try:
        for m, name, p in places:
            m._parameters[name] = new[id(p)]
        yield
    finally:
        for m, name, p in places:
            m._parameters[name] = p
        for m in model.modules():
            if isinstance(m, nn.RNNBase):               # keeps a second list of them
                m._init_flat_weights()


def flatten(tensors):
    """Tensors of any shapes -> one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector, like):
    """One vector -> views of it with the shapes of the tensors in `like`."""
    return [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in like]), like)]


def select(vector, like, part):
    """The elements of a vector over the tensors in `like` that belong to those with indices in `part`, as a vector."""
    tensors = unflatten(vector, like)
    return flatten([tensors[i] for i in part])


def join(vectors, like, parts):
    """The inverse of `select`: one vector per part, parts together all indices -> the vector over the tensors in `like`."""
    tensors = [None] * len(like)
    for vector, part in zip(vectors, parts):
        for i, t in zip(part, unflatten(vector, [like[i] for i in part])):
            tensors[i] = t
    return flatten(tensors)


@torch.no_grad()
def assign(params, values):
    """Put tensors into parameters, bit for bit."""
    for p, v in zip(params, values):
        p.copy_(v)


def pieces(idx, targets, micro_batch):
    """Split a batch along its first dimension into pieces of at most micro_batch rows (None: the whole batch)."""
    step = micro_batch or len(idx)
    return [(idx[i:i + step], targets[i:i + step]) for i in range(0, len(idx), step)]


def derivative(outputs, inputs, cotangents, **settings):
    """torch.autograd.grad on a graph that stays; an input that plays no part has derivative 0."""
    settings = {"retain_graph": True, "materialize_grads": True, "allow_unused": True, **settings}
    try:
        return torch.autograd.grad(outputs, inputs, cotangents, **settings)
    except RuntimeError as e:
        if "checkpoint" not in str(e):
            raise
        raise ValueError("activation checkpointing does not go with Gauss-Newton, which differentiates a graph more than "
                         "once: switch it off (micro_batch bounds the memory)") from e


IGNORED = -100          # the target of tokens that are left out of loss and count, as in torch.nn.functional.cross_entropy


def check_targets(idx, targets):
    """The targets as int64, and how many count. Raises ValueError for what are not classes for these inputs."""
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be class numbers (int64), not {targets.dtype}: soft targets are not supported")
    if len(idx) != len(targets):
        raise ValueError(f"inputs have {len(idx)} rows and targets {len(targets)}")
    targets = targets.long()
    n = int((targets != IGNORED).sum())
    if n == 0:
        raise ValueError(f"the batch is empty: it has {len(idx)} rows and no target that counts")
    return targets, n


def check_logits(z, y):
    """Raises ValueError unless z are logits (..., V) for the targets y (...)."""
    if not torch.is_tensor(z):
        raise ValueError(f"""the model must return logits, and it returns a {type(z).__name__}; wrap it:
    class Logits(torch.nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): return self.model(x){".logits" if hasattr(z, "logits") else "[0]"}""")
    if z.shape[:-1] != y.shape:
        raise ValueError(f"logits of shape {tuple(z.shape)} do not fit targets of shape {tuple(y.shape)}: "
                         "there must be one row of logits, over all classes, for each target")
    low, high = (int(t) for t in torch.aminmax(torch.where(y == IGNORED, 0, y)))
    if low < 0 or high >= z.shape[-1]:
        raise ValueError(f"targets reach from {low} to {high}, and the model has classes 0 .. {z.shape[-1] - 1} "
                         f"({IGNORED} marks targets to leave out)")


def logits(model, x, y=None):
    """z = model(x) (..., V), in float32 at least; checked against the targets, if they are given."""
    z = model(x)
    if y is not None:
        check_logits(z, y)
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


def evaluate(model, x, y):
    """The same without a graph, by the path on which the model is differentiated: with gradients off torch takes another
    in nn.TransformerEncoder, whose loss is another function."""
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda t: t):
        return logits(model, x, y).detach()


def per_token(targets, n):
    """What each token's loss is divided by, (...,) -> (..., 1): n, or infinity for those that are left out."""
    return torch.where(targets == IGNORED, math.inf, n).unsqueeze(-1)


def cross_entropy_sum(z, targets):
    return F.cross_entropy(z.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORED)


def cross_entropy_grad(probs, targets, n):
    """∂L/∂z = (p − onehot(y)) / n.  probs (..., V), targets (...), n a number or `per_token` -> (..., V)."""
    u = probs.clone()
    u.scatter_add_(-1, targets.clamp_min(0).unsqueeze(-1), torch.full_like(u[..., :1], -1.0))
    return u.div_(n)


def cross_entropy_hvp(probs, t, n):
    """H t = p ∘ (t − ⟨p, t⟩) / n, the logit Hessian in closed form: differentiating cross-entropy twice would hold
    about ten times the logits, and its backward has no forward-mode derivative."""
    mean = torch.einsum("...v,...v->...", probs, t).unsqueeze(-1)
    return (t - mean).mul_(probs).div_(n)               # one tensor of the logits' size


def batch_loss(model, idx, targets, micro_batch=None):
    """Mean cross-entropy (nats per token) without a graph, as a float; attention may be fused."""
    targets, n = check_targets(idx, targets)
    total = sum(cross_entropy_sum(evaluate(model, x, y), y).item()
                for x, y in pieces(*share(idx, targets), micro_batch))
    return reduce_number(total) / n


def batch_grad(model, idx, targets, micro_batch=None):
    """Loss (float) and flat gradient by ordinary backward passes."""
    targets, n = check_targets(idx, targets)
    params, loss, grad = trainable(model), 0.0, None
    for x, y in pieces(*share(idx, targets), micro_batch):
        part = cross_entropy_sum(logits(model, x, y), y) / n
        g = flatten(torch.autograd.grad(part, params, materialize_grads=True, allow_unused=True))
        loss, grad = loss + part.item(), g if grad is None else grad.add_(g)
    return reduce_number(loss), reduce(grad)[0]


def free_memory(device):
    """Bytes that the device has free (4 GB where nobody says); on a CPU, this process's part of them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            free = next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
            return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    except (OSError, StopIteration):
        return 4e9


_deterministic = weakref.WeakKeyDictionary()      # models that passed the check below -> the modes of their modules


def refuse_randomness(model, x):
    """A derivative of a function that changes between calls means nothing: raises ValueError for a model that gives the
    first rows of x other logits when it is called again, or whose batch norm makes them depend on the other rows.
    Checked once for a model and its modes (train or eval)."""
    modes = tuple(m.training for m in model.modules())
    if _deterministic.get(model) == modes:
        return
    advice = "Gauss-Newton needs a deterministic model; call model.eval() or set its rates to 0"
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None):
            raise ValueError(f"{name or 'the model'} ({type(m).__name__}) is active in training mode: {advice}")

    def generators():
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in {x.device} if d.type == "cuda")]
    with torch.no_grad():
        before, python, first = generators(), random.getstate(), model(x[:8])
        moved = random.getstate() != python or not all(map(torch.equal, before, generators()))
        for _ in range(9 if moved else 1):              # rare events take more calls to be seen
            again = model(x[:8])
            if torch.is_tensor(first) and ((again - first).abs() > 1e3 * torch.finfo(first.dtype).eps * first.abs().max()).any():
                raise ValueError(f"the model gives the same inputs other logits at each call (dropout?): {advice}")
    _deterministic[model] = modes


# ---------------------------------------------------------------------------------------------------------------------
# Attention with the derivatives that Gauss-Newton takes


class _Attention(torch.autograd.Function):
    """o = P v, P = softmax(s q kᵀ + mask), (..., T, head size), with P kept and every derivative written out:

        Jᵀ    v̄ = Pᵀ w,   T = P ∘ (W − rowsum(P ∘ W)),  W = w vᵀ,   q̄ = s T k,   k̄ = s Tᵀ q
        J     o' = t v + P v',   t = P ∘ (D − rowsum(P ∘ D)),   D = s (q' kᵀ + q k'ᵀ)

    The fused kernels have no derivative of their backward nor a forward-mode one, and each of their calls makes P anew. The graph of
    the backward is to be differentiated by the cotangent w alone, in which it is linear, so that its transpose is J; what depends on
    q, k and v in it counts as constant.
    """

    @staticmethod
    def forward(ctx, q, k, v, causal, scale):
        P, ctx.causal, ctx.scale = _Attention.probs(q, k, causal, scale), causal, scale
        ctx.save_for_backward(q, k, v, *P)
        ctx.save_for_forward(q, k, v, *P)
        return torch.cat([p @ v[..., :seen, :] for p, (_, _, seen) in zip(P, _Attention.blocks(q.shape[-2], causal))], -2)

    @staticmethod
    def backward(ctx, w):
        return *_AttentionBackward.apply(w, ctx.causal, ctx.scale, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx, dq, dk, dv, *_):
        return _Attention.tangent(dq, dk, dv, ctx.causal, ctx.scale, *ctx.saved_tensors)

    @staticmethod
    def blocks(T, causal):
        """Rows of P from, to, and the keys that they see, to: in four blocks, causal attention has 5/8 of the square to do."""
        size = max(64, -(-T // 4)) if causal else T
        return [(i, min(i + size, T), min(i + size, T) if causal else None) for i in range(0, T, size)]

    @staticmethod
    def probs(q, k, causal, scale):
        P = []
        for i, j, seen in _Attention.blocks(q.shape[-2], causal):
            scores = (q[..., i:j, :] * scale) @ k[..., :seen, :].transpose(-1, -2)
            if causal:
                scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(i + 1), -math.inf)
            P.append(torch.softmax(scores, -1).to(scores.dtype))       # autocast on a GPU gives float32
        return P

    @staticmethod
    def tangent(dq, dk, dv, causal, scale, q, k, v, *P):
        out, left, right = [], torch.cat((dq, q), -1), torch.cat((k, dk), -1).transpose(-1, -2)
        for p, (i, j, seen) in zip(P, _Attention.blocks(q.shape[-2], causal)):
            D = (left[..., i:j, :] @ right[..., :seen]).mul_(scale)                 # q' kᵀ + q k'ᵀ as one product
            t = torch.ops.aten._softmax_backward_data(D, p, -1, p.dtype)
            out.append(t @ v[..., :seen, :] + p @ dv[..., :seen, :])
        return torch.cat(out, -2)

    @staticmethod
    def transpose(w, causal, scale, q, k, v, *P):
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        for p, (i, j, seen) in zip(P, _Attention.blocks(q.shape[-2], causal)):
            W = (w[..., i:j, :] * scale) @ v[..., :seen, :].transpose(-1, -2)
            t = torch.ops.aten._softmax_backward_data(W, p, -1, p.dtype)
            dq.append(t @ k[..., :seen, :])
            dk[..., :seen, :] += t.transpose(-1, -2) @ q[..., i:j, :]
            dv[..., :seen, :] += p.transpose(-1, -2) @ w[..., i:j, :]
        return torch.cat(dq, -2), dk, dv


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, causal, scale, *saved):
        ctx.save_for_backward(*saved)
        ctx.causal, ctx.scale = causal, scale
        return _Attention.transpose(w, causal, scale, *saved)

    @staticmethod
    def backward(ctx, dq, dk, dv):
        return _Attention.tangent(dq, dk, dv, ctx.causal, ctx.scale, *ctx.saved_tensors), *[None] * (2 + len(ctx.saved_tensors))


class _AttentionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        return function(*args, **kwargs)

    @staticmethod
    def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        q, k, v = query, key, value
        alike = q.shape[:-2] == k.shape[:-2] == v.shape[:-2] and q.dtype == k.dtype == v.dtype      # else torch may broadcast
        if alike and attn_mask is None and not dropout_p and not enable_gqa:
            if torch.is_autocast_enabled(q.device.type):        # which would have done it further down
                q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
            return _Attention.apply(q, k, v, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


@contextmanager
def differentiable_attention():
    """While open, every scaled_dot_product_attention, in our models or others', is _Attention; what that does not cover (a mask,
    grouped queries, nn.MultiheadAttention) takes the backend that is the same in differentiable operations."""
    with sdpa_kernel(SDPBackend.MATH), _AttentionMode():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The Gauss-Newton matrix


class _Piece:
    """One piece of the batch, linearised: z (..., V), probs = softmax(z), and by double backward

        vjp   Jᵀw, an ordinary backward of z
        jvp   J v: the gradient g = Jᵀu with its graph is linear in u, so that differentiating gᵀv by u gives J v
    """

    def __init__(self, model, params, x, y, n):
        self.params, self.weight = params, per_token(y, n)
        with differentiable_attention(), torch.enable_grad():
            self.z = logits(model, x, y)
            self.probs = torch.softmax(self.z.detach(), dim=-1)
            self.u = cross_entropy_grad(self.probs, y, self.weight).requires_grad_()
            self.g = derivative(self.z, params, self.u, create_graph=True, materialize_grads=False)

    def grad(self):
        return flatten([torch.zeros_like(p) if g is None else g.detach() for g, p in zip(self.g, self.params)])

    def jvp(self, v, part):
        pairs = [(self.g[i], t) for i, t in zip(part, unflatten(v, [self.params[i] for i in part])) if self.g[i] is not None]
        return derivative([g for g, _ in pairs], self.u, [t for _, t in pairs])[0]

    def vjp(self, w, part):
        return flatten(derivative(self.z, [self.params[i] for i in part], w))

    def product(self, v, part):
        return self.vjp(cross_entropy_hvp(self.probs, self.jvp(v, part), self.weight), part)


class Program:
    """The same piece, traced once for one shape, split into what is made once per batch and what is made once per product, each
    half compiled (torch.compile; minutes for a large model, so for long runs).

    All of it is traced in one graph, F(θ, x, y, v, P, w) -> z, probs, g | J v, JᵀH_P J v, Jᵀw. What depends on (θ, x, y) alone is
    the first half, and what crosses the cut is saved; the second is cut anew for each of the three results.

        program = Program(model, idx, targets)      # then GGN(..., program=program); pieces of other shapes stay eager

    Raises RuntimeError where the compiled product on (x, y) differs from the eager one by more than rounding: compilers have
    given wrong second derivatives without a word.
    """

    def __init__(self, model, x, y):
        params = self.params = trainable(model)
        self.shape = x.shape

        def everything(theta, x, y, v, P, w):
            theta = [p.detach().requires_grad_() for p in theta]
            one = per_token(y, 1.0)                                           # / n is left to the piece
            with differentiable_attention(), torch.enable_grad(), placed(model, theta):
                z = logits(model, x)
                probs = torch.softmax(z.detach(), dim=-1)
                u = cross_entropy_grad(probs, y, one).requires_grad_()
                g = derivative(z, theta, u, create_graph=True)
                Jv = derivative(g, u, v)[0]
                Gv = derivative(z, theta, cross_entropy_hvp(P, Jv, one))
                return z.detach(), probs, *[t.detach() for t in g], Jv, *Gv, *derivative(z, theta, w)
        with torch.no_grad():
            z, k = logits(model, x), len(params)
        graph = trace(everything, [p.detach() for p in params], x, y, [torch.zeros_like(p) for p in params], z, z.clone())
        inputs, outputs = [node for node in graph.graph.nodes if node.op == "placeholder"], graph.graph.output_node().args[0]
        once, v, (P, w) = inputs[:k + 2], inputs[k + 2:-2], inputs[-2:]
        late = {*v, P, w}
        for node in graph.graph.nodes:
            if any(a in late for a in node.all_input_nodes):
                late.add(node)
        wanted = {"jvp": (v, outputs[k + 2:k + 3]), "product": ([*v, P], outputs[k + 3:2 * k + 3]), "vjp": ([w], outputs[2 * k + 3:])}
        cuts = {name: sorted({a for node in _needed(out, late) for a in node.all_input_nodes if a not in late and a.op != "get_attr"} |
                             {node for node in out if node not in late}, key=lambda a: a.name) for name, (_, out) in wanted.items()}
        saved = sorted({a for cut in cuts.values() for a in cut}, key=lambda a: a.name)
        self._first = _compile(graph, once, [*outputs[:k + 2], *saved])
        self._second = {name: _compile(graph, cuts[name] + ins, out) for name, (ins, out) in wanted.items()}
        self._at = {name: [saved.index(a) for a in cut] for name, cut in cuts.items()}
        self.tolerance = tolerance(graph)
        self._check(model, x, y)

    def _check(self, model, x, y):
        n, part = int((y != IGNORED).sum()) or 1, range(len(self.params))
        eager, compiled = _Piece(model, self.params, x, y, n), self.linearise(x, y, n)
        v = eager.grad()
        for name, a, b in (("gradient", v, compiled.grad()), ("product", eager.product(v, part), compiled.product(v, part))):
            error = ((a - b).norm() / a.norm()).item()
            if not error < self.tolerance:
                raise RuntimeError(f"the compiled {name} differs from the eager one by {error:.1e}")

    @torch.no_grad()
    def linearise(self, x, y, n):
        piece, k = _CompiledPiece(), len(self.params)
        piece.z, piece.probs, *rest = self._first(*[p.detach() for p in self.params], x, y)
        piece.program, piece.n, piece.weight = self, n, per_token(y, n)
        piece.g, piece.saved = rest[:k], rest[k:]
        return piece

    @torch.no_grad()
    def call(self, name, saved, *args):
        return self._second[name](*[saved[i] for i in self._at[name]], *args)


def program_or_none(model, x, y):
    """A Program, or None, with a warning, where that fails or its results differ."""
    try:
        return Program(model, x, y)
    except Exception as e:
        warnings.warn(f"not compiled: {_first_line(e)}")
        return None


class _CompiledPiece:
    """A piece made by a Program; see _Piece."""

    def grad(self):
        return flatten(self.g).div_(self.n)

    def _full(self, v, part):
        params = self.program.params
        full = [torch.zeros_like(p) for p in params] if len(part) < len(params) else [None] * len(params)
        for i, t in zip(part, unflatten(v, [params[i] for i in part])):
            full[i] = t
        return full

    def jvp(self, v, part):
        return self.program.call("jvp", self.saved, *self._full(v, part))[0]

    def vjp(self, w, part):
        out = self.program.call("vjp", self.saved, w)
        return flatten([out[i] for i in part])

    def product(self, v, part):
        out = self.program.call("product", self.saved, *self._full(v, part), self.probs)
        return flatten([out[i] for i in part]).div_(self.n)


def trace(function, *examples):
    """The function's operations on tensors, derivatives and all, as one torch.fx graph for the examples' shapes."""
    graph = make_fx(torch.func.functionalize(make_fx(function)(*examples)))(*examples)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def tolerance(graph):
    """How far two evaluations of it may differ: the root of the coarsest precision that it works in."""
    values = (node.meta.get("val") for node in graph.graph.nodes)
    return max(torch.finfo(t.dtype).eps for t in values if torch.is_tensor(t) and t.dtype.is_floating_point) ** 0.5


def compiled_or_eager(function, *examples):
    """The function compiled for the examples' shapes; itself, with a warning, where that fails or the results differ."""
    try:
        graph = trace(lambda *arguments: function(*arguments, double_backward=True), *examples)
        compiled = torch.no_grad()(torch.compile(graph, dynamic=False))
        for a, b in zip(function(*examples), compiled(*examples)):
            size = a.norm() if a.dim() else 1.0         # loss and decrease: rounding of the loss, however small the decrease
            if not (a - b).norm() <= tolerance(graph) * (size + 1e-3):
                raise RuntimeError("the compiled result differs from the eager one")
        return compiled
    except Exception as e:
        warnings.warn(f"not compiled: {_first_line(e)}")
        return function


def _first_line(e):
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def _needed(outputs, among):
    """The nodes in `among` that the outputs are made from."""
    found, stack = set(), [node for node in outputs if node in among]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [a for a in node.all_input_nodes if a in among]
    return found


def _compile(graph, inputs, outputs):
    """The part of a graph from some of its nodes to others, compiled."""
    new, made = torch.fx.Graph(), {}
    for node in inputs:
        made[node] = new.placeholder(node.name)
    needed = _needed(outputs, {node for node in graph.graph.nodes if node not in made})
    for node in graph.graph.nodes:
        if node in needed:
            made[node] = new.node_copy(node, made.__getitem__)
    new.output(tuple(made[node] for node in outputs))
    return torch.compile(torch.fx.GraphModule(graph, new), dynamic=False)


class GGN:
    """One batch linearised at the model's current parameters: `loss`, `grad`, `jvp(v)` and `matvec(v)` = JᵀHJ v.

    idx, targets   inputs (B, ...) and int64 classes (B, ...), as the model takes them; logits are (B, ..., V)
    micro_batch    rows worked on at a time; None: all at once. The result does not depend on it
    cache_gb       with micro_batch: pieces keep their graphs while they fit in this many GB (None: 40 % of what is free), so
                   that a product repeats no forward; the others are linearised anew at each product, in memory that does
                   not grow with the batch
    program        a compiled Program for pieces of its shape

    loss           mean cross-entropy in nats per token, a float
    grad           its gradient (P,), parameters flattened in the order of model.parameters(), tied ones once
    products, work   products made, and all work so far in gradients of this batch, by matrix multiplications: a gradient
                     has 3 per weight, a product 4, with a block alone 4 for its own weights and 2 for those behind it

    With several processes idx and targets are the whole batch on each; each works on its share, and sums are reduced.
    The parameters must not change while the object is in use. Raises ValueError for active dropout or batch norm.
    Double backward (`create_graph`) instead of torch.func: the graph of the gradient is the graph of J's transpose, and
    it is reused by every product: 1.3 gradients each, where jvp + vjp take 2.3.
    """

    def __init__(self, model, idx, targets, micro_batch=None, cache_gb=0.0, program=None):
        targets, self.n = check_targets(idx, targets)
        self.model, self.params, self.program = model, trainable(model), program
        self.batch, self.data, self.cache, self.offset = (idx, targets), pieces(*share(idx, targets), micro_batch), [], None
        self.products, self.work = 0, 1.0
        self.loss, self.grad = 0.0, 0.0
        refuse_randomness(model, self.data[0][0])
        room = math.inf if micro_batch is None else 0.4 * free_memory(self.params[0].device) if cache_gb is None else cache_gb * 1e9
        for i, (x, y) in enumerate(self.data):
            if i == 0 and room < math.inf:      # the first piece is the largest
                piece, piece_bytes = self._measure(x, y)
            else:
                piece = self._linearise(x, y)
            self.loss += cross_entropy_sum(piece.z.detach(), y).item() / self.n
            self.grad += piece.grad()
            if room == math.inf or (i + 1) * piece_bytes <= room:
                self.cache.append(piece)
            del piece
        self.loss, self.grad = reduce_number(self.loss), reduce(self.grad)[0]

    def _linearise(self, x, y):
        if self.program and self.program.shape == x.shape:
            return self.program.linearise(x, y, self.n)
        return _Piece(self.model, self.params, x, y, self.n)

    def _measure(self, x, y):
        """A linearised piece and the bytes that keeping it costs: every storage that its graphs save, once."""
        storages = {}

        def count(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t.detach()                           # t itself, where it is a node's output, would keep that node alive for ever
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            piece = self._linearise(x, y)
        for t in getattr(piece, "saved", ()):
            count(t)
        for p in self.params:
            storages.pop(p.untyped_storage().data_ptr(), None)
        return piece, sum(storages.values()) + 3 * piece.z.numel() * piece.z.element_size()

    def _pieces(self):
        """The linearised pieces: first those that were kept, then the others one by one."""
        yield from self.cache
        for x, y in self.data[len(self.cache):]:
            yield self._shifted(self._linearise(x, y))

    def _shifted(self, piece):
        if self.offset is not None:
            piece.probs = torch.softmax(piece.z.detach() + piece.jvp(*self.offset), dim=-1)
        return piece

    def shift(self, v, part=None):
        """Expand at v the loss of the linearised model, f¹(v) = L(z + Jv): from now on `loss`, `grad` and `matvec`'s H are
        those of f¹ at v, while J stays (GN-prox-linear). With `part`, v moves those parameters alone and `grad` is theirs."""
        part = self._select(part)
        self.offset, self.loss, self.grad = (v, part), 0.0, 0.0
        for i, ((x, y), piece) in enumerate(zip(self.data, self._pieces())):
            if i < len(self.cache):
                self._shifted(piece)
            chosen = piece.probs.gather(-1, y.clamp_min(0).unsqueeze(-1)).clamp_min(torch.finfo(piece.probs.dtype).tiny)
            self.loss -= (chosen.log() / piece.weight).sum().item()
            self.grad += piece.vjp(cross_entropy_grad(piece.probs, y, piece.weight), part)
        self.loss, self.grad = reduce_number(self.loss), reduce(self.grad)[0]
        self.work += self._product_work(part)

    def _select(self, part):
        return range(len(self.params)) if part is None else part

    def jvp(self, v, part=None):
        """J v: the change of every logit (of this process's share), (B, ..., V), for the parameter change v (P,)."""
        return torch.cat([piece.jvp(v, self._select(part)) for piece in self._pieces()])

    def matvec(self, v, part=None):
        """G v = JᵀHJ v, (P,) -> (P,). With `part`, a list of parameter indices, v and the result hold those parameters
        alone: the product with G's diagonal block (layerwise Gauss-Newton)."""
        part, out = self._select(part), None
        for piece in self._pieces():
            product = piece.product(v, part)
            out = product if out is None else out.add_(product)
        self.products += 1
        self.work += self._product_work(part)
        return reduce(out)[0]

    @torch.no_grad()
    def pull_back_curvature(self, d, h):
        """JᵀH f''(d, d) (P,), the second directional derivative of the logits by a difference of step h; see
        GaussNewton.geodesic. The parameters stay where they are: the graphs belong to them."""
        out, everything = 0.0, self._select(None)
        moved = [p + h * t for p, t in zip(self.params, unflatten(d, self.params))]
        for (x, y), piece in zip(self.data, self._pieces()):
            with placed(self.model, [m.requires_grad_() for m in moved]):
                z = evaluate(self.model, x, y)
            second = 2 / h * ((z - piece.z.detach()) / h - piece.jvp(d, everything))
            out = out + piece.vjp(cross_entropy_hvp(piece.probs, second, piece.weight), everything)
        self.products += 1
        self.work += 1 / 3 + self._product_work(everything)
        return reduce(out)[0]

    def _product_work(self, part):
        own, behind = (sum(self.params[i].numel() for i in ids) for ids in (part, range(max(part) + 1, len(self.params))))
        return 4 / 3 * (own + behind / 2) / sum(p.numel() for p in self.params) + 1 - len(self.cache) / len(self.data)


# ---------------------------------------------------------------------------------------------------------------------
# Conjugate gradients


class CGResult(NamedTuple):
    x: torch.Tensor
    iterations: int
    reason: str     # "residual", "progress", "max_iter", "zero" (b = 0), "indefinite" or "nonfinite"
    values: list    # ½xᵀAx − bᵀx at every iterate, the start included: iterations + 1 floats


def cg(matvec, b, x0=None, precond=None, max_iter=50, tol=0.0, rtol=0.0, every=None):
    """Solve A x = b, A symmetric positive definite and given by matvec(v) = A v; equivalently minimise ½xᵀAx − bᵀx.

    x0        start (default 0, which saves a product)
    precond   v -> M⁻¹v, M ≈ A symmetric positive definite
    tol       Martens' relative progress (2010, section 4.4): stop at iteration k once the quadratic fell by less than
              tol·j of its value over the last j = max(10, k/10) iterations; 0 = off
    rtol      stop at ‖b − Ax‖ <= rtol ‖b‖; below machine epsilon: at that, which is all that the numbers can resolve
    every     iterations between two tests of anything, for which the host waits for the device (default: 1 on a CPU, else 4)

    Differs from the textbook in: 1. x0 is first scaled to its best multiple, (bᵀx0 / x0ᵀA x0) x0, since a direction
    kept from an earlier system can begin uphill. 2. `tol` as above. 3. Trouble is a `reason`, not an exception: on
    "indefinite" (pᵀAp <= 0, or a preconditioner that is not positive) or "nonfinite" x is the last good iterate. 4. Scalars stay
    on the device between tests; with every > 1 "last good" is the iterate at the last test.
    """
    x, r, every = torch.zeros_like(b), b.clone(), every or (1 if b.device.type == "cpu" else 4)
    eps = torch.finfo(b.dtype).eps
    bnorm = b.norm()
    if not bnorm.isfinite():
        return CGResult(x, 0, "nonfinite", [0.0])
    if bnorm == 0:
        return CGResult(x, 0, "zero", [0.0])
    if x0 is not None and x0.any():
        Ax0 = matvec(x0)
        xAx = x0.dot(Ax0).item()
        if 0 < xAx < math.inf:
            scale = b.dot(x0).item() / xAx
            x, r = scale * x0, b - scale * Ax0
    values, p, rz, good = [-0.5 * (x.dot(b) + x.dot(r))], None, None, True

    def result(x, k, reason):
        return CGResult(x, k, reason, torch.stack(values[:k + 1]).tolist())
    for k in range(max_iter + 1):
        looking = k % every == 0
        if looking and r.norm() <= max(rtol, eps) * bnorm:
            return result(x, k, "residual")
        j = max(10, k // 10)
        if looking and tol > 0 and k >= j and values[-1] < 0 and values[-1 - j] - values[-1] < tol * j * -values[-1]:
            return result(x, k, "progress")
        if k == max_iter:
            return result(x, k, "max_iter")
        z = r if precond is None else precond(r)
        rz, rz_old = r.dot(z), rz
        solved = rz == 0
        if looking:
            if solved:
                return result(x, k, "residual")
            last = (x if every == 1 else x.clone()), k
        p = z.clone() if p is None else p.mul_(torch.where(solved, rz, rz / rz_old)).add_(z)
        del z                                           # six vectors: b, x, r, p, Ap, and `last` where it is a copy
        Ap = matvec(p)
        pAp = p.dot(Ap)
        good = good & pAp.isfinite() & rz.isfinite() & (solved | ((pAp > 0) & (rz > 0)))
        if ((k + 1) % every == 0 or k + 1 == max_iter) and not good:
            if not (pAp.isfinite() and rz.isfinite()):
                return result(*last, "nonfinite")
            # Of a residual this small rounding is no small part any more, and a sign that it decided tells nothing.
            return result(*last, "residual" if r.norm() <= eps ** 0.5 * bnorm else "indefinite")
        step = torch.where(solved, rz, rz / pAp)
        x.addcmul_(p, step)
        r.addcmul_(Ap, step, value=-1)
        values.append(-0.5 * (x.dot(b) + x.dot(r)))


def lanczos(matvec, b, function, iters):
    """x = function(A) b for symmetric A by Lanczos with full reorthogonalisation, and xᵀA x; returns (x, xᵀAx, iterations).

        A V = V T + residual,  V orthonormal with first column b/‖b‖,  T tridiagonal;   function(A) b ≈ ‖b‖ V function(T) e₁
    """
    basis, diagonal, off = [b / b.norm()], [], []
    for k in range(iters):
        w = matvec(basis[k])
        diagonal.append(w.dot(basis[k]).item())
        for _ in range(2):                              # twice is enough (Parlett)
            for v in basis:
                w = w - w.dot(v) * v
        beta = w.norm().item()
        if k + 1 == iters or not beta > 1e-12 * max(abs(t) for t in diagonal):     # done, or an invariant subspace
            break
        off.append(beta)
        basis.append(w / beta)
    T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    T += torch.diag(torch.tensor(off, dtype=torch.float64), 1) + torch.diag(torch.tensor(off, dtype=torch.float64), -1)
    if not T.isfinite().all():
        return torch.full_like(b, math.nan), math.nan, len(basis)
    values, vectors = torch.linalg.eigh(T)
    y = vectors @ (function(values.clamp_min(0)) * vectors[0]) * b.norm().item()
    return sum(c * v for c, v in zip(y.tolist(), basis)), y.dot(T @ y).item(), len(basis)


# ---------------------------------------------------------------------------------------------------------------------
# K-FAC, the preconditioner


def linear_maps(z, params):
    """What multiplies a parameter in the graph of z, by a walk through it, whatever modules made it:

        weights      (i, a, edge, flip)    s = a Wᵀ with W = params[i] (out, in), as in nn.Linear; flip: s = a W, W (in, out)
        embeddings   (i, tokens, edge)     s = W[tokens]
        biases       (i, edge)             s = ... + b

    a (rows, in); edge: where the derivative by s arrives, for torch.autograd.grad. Products of more than two dimensions
    (einsum, convolutions, recurrent layers) are not among them.
    """
    index = {id(p): i for i, p in enumerate(params)}
    weights, embeddings, biases, seen, stack = [], [], [], set(), [z.grad_fn]

    def leaf(node):
        """The index of the parameter that a node hands on, or None, and whether it comes transposed."""
        flips = 0
        while node is not None and node.name() in ("TBackward0", "TransposeBackward0", "PermuteBackward0", "ToCopyBackward0"):
            flips += node.name() != "ToCopyBackward0"           # a cast, by autocast
            node = node.next_functions[0][0]
        return index.get(id(getattr(node, "variable", None))), flips % 2 == 1
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        inputs, edge = [function for function, _ in node.next_functions], torch.autograd.graph.GradientEdge(node, 0)
        stack += inputs
        if node.name() in ("MmBackward0", "AddmmBackward0"):    # a W, or b + a W
            i, transposed = leaf(inputs[-1])
            if i is not None:
                a = node._saved_self if node.name() == "MmBackward0" else node._saved_mat1
                weights.append((i, a.detach(), edge, not transposed))
        elif node.name() == "EmbeddingBackward0" and leaf(inputs[0])[0] is not None:
            embeddings.append((leaf(inputs[0])[0], node._saved_indices, edge))
        if node.name() in ("AddBackward0", "AddmmBackward0"):
            added = [leaf(function)[0] for function in inputs]
            biases += [(i, edge) for i in added if i is not None and params[i].dim() == 1]
    return weights, embeddings, biases


class KFAC:
    """The Gauss-Newton matrix as a Kronecker product per weight (Martens & Grosse 2015), in its eigenbasis.

    For a linear map s = W a the block of W (out, in) is approximated by L ⊗ R, with L = E[δ δᵀ], R = E[a aᵀ], the
    expectations over tokens and over labels sampled from the model, and δ = ∂(loss of one sequence)/∂s. With
    L = Q_L Λ_L Q_Lᵀ, R = Q_R Λ_R Q_Rᵀ, and S = λ_L λ_Rᵀ (out, in) the products of their eigenvalues,

        (L ⊗ R + λI)⁻¹ V = Q_L [ (Q_Lᵀ V Q_R) / (S + λ) ] Q_Rᵀ,                   the damping exact.

    A weight kept as (in, out) has the two the other way round. Which parameters are such weights is seen from the graph
    (`linear_maps`), not from classes of modules. Embedding (tokens, width): L is diagonal, the frequency of each token,
    and R = E[δ δᵀ]. A bias: R = 1. A side above `max_side`: diagonal. All other parameters (norms, say): a diagonal, the
    mean square of the gradient with sampled labels. A weight shared by an embedding and a linear map takes the map's
    factors.
    """

    FAILED = "an eigendecomposition failed: K-FAC takes that factor's diagonal"

    def __init__(self, model, max_side=4096):
        self.model, self.max_side, self.params = model, max_side, trainable(model)
        self.repaired = ""                                # what went wrong in the last update or decomposition, and was mended
        self.factors = {}                                 # per parameter index: (L, R), or (diagonal,)
        self.bases = [(None, None)] * len(self.params)    # per parameter: Q_L and Q_R, None for the identity
        self.values = [None] * len(self.params)           # per parameter: (Λ_L, Λ_R), or (diagonal,)
        self.spectra = [None] * len(self.params)          # per parameter: S, as a matrix or in the parameter's shape

    def add(self, params):
        """More parameters of the model: the next `update` gives them factors, and `decompose` is due then."""
        self.params = self.params + params
        self.bases += [(None, None)] * len(params)
        self.values += [None] * len(params)
        self.spectra += [None] * len(params)

    def update(self, idx, targets, micro_batch=None, generator=None, decay=0.0):
        """Factors from a batch (labels are sampled; targets say which tokens count), averaged with the earlier ones by
        `decay`; then `decompose` makes them ready for use."""
        targets, n = check_targets(idx, targets)
        (mine,), rows = share(range(len(idx))), len(idx)
        with torch.enable_grad():
            z = logits(self.model, idx[:2])
        check_logits(z, targets[:2])
        classes, maps = z.shape[-1], linear_maps(z, self.params)
        factored = {entry[0] for kind in maps for entry in kind}
        diagonal = [i for i, p in enumerate(self.params) if i not in factored and p.requires_grad]
        sides = {}                                      # (parameter, side) -> its sum over rows, and what that is divided by
        squares = {i: torch.zeros_like(self.params[i]) for i in diagonal}
        del z, maps
        for first in range(0, rows, micro_batch or rows):
            last = min(first + (micro_batch or rows), rows)
            # argmax p / e with exponential e has the distribution p. All processes draw for all rows, so that labels do not
            # depend on who has them.
            draws = torch.empty(targets[first:last].numel(), classes, device=idx.device).exponential_(generator=generator)
            start, end = max(first, mine.start), min(last, mine.stop)
            grads = [torch.zeros_like(self.params[i]) for i in diagonal]
            if start < end:
                draws = draws.view(last - first, *targets.shape[1:], classes)[start - first:end - first]
                grads = self._add_sides(sides, n, idx[start:end], targets[start:end], draws, diagonal)
            # Labels of different tokens are independent: the mean square of a sum over some is that over all.
            for i, g in zip(diagonal, reduce(*grads)):
                squares[i] += g * g
        self.repaired = ""
        flat = reduce(*(t for pair in sides.values() for t in pair))
        sides = {key: total / torch.where(rows > 0, rows, n) for key, total, rows in zip(sides, flat[::2], flat[1::2])}
        for i, p in enumerate(self.params):
            new = (sides[i, 0], sides[i, 1]) if (i, 0) in sides else (squares.get(i, torch.zeros_like(p)) / n,)
            old = self.factors.get(i)
            if not all(f.isfinite().all() for f in new):
                self.repaired = "K-FAC factors not finite"
                new = old or tuple(torch.zeros_like(f) for f in new)
            if old is not None and decay > 0:
                new = tuple(decay * o + (1 - decay) * f for o, f in zip(old, new))
            self.factors[i] = new

    def _add_sides(self, sides, n, x, y, draws, diagonal):
        """Add the factors' sums over some rows to `sides`; returns the gradients of the parameters without factors."""
        with torch.enable_grad():
            z = logits(self.model, x, y)
        weights, embeddings, biases = linear_maps(z, self.params)
        orientation = {}
        weights = [w for w in weights if orientation.setdefault(w[0], w[3]) == w[3]]
        embeddings = [e for e in embeddings if e[0] not in orientation]
        probs = torch.softmax(z.detach().float(), dim=-1)
        labels = (probs / draws).argmax(-1)
        u = cross_entropy_grad(probs, labels, per_token(y, 1.0)).to(z.dtype)          # a sum over tokens: each one's own
        edges = [entry[2] for entry in weights + embeddings] + [edge for _, edge in biases]
        grads = derivative(z, edges + [self.params[i] for i in diagonal], u, retain_graph=False, materialize_grads=False)
        dtype = self.params[0].dtype                    # autocast's are shorter

        def add(i, side, value, rows=0):
            """The side of what comes out is a mean over the n tokens, that of what goes in one over its own rows."""
            total = sides.setdefault((i, side), [torch.zeros_like(value), value.new_zeros(())])
            total[0] += value
            total[1] += rows
        for (i, a, _, flip), delta in zip(weights, grads):
            if delta is not None:
                add(i, int(flip), self._gram(delta.to(dtype)))                          # delta (rows, out)
                add(i, 1 - int(flip), self._gram(a.to(dtype)), len(a))
        for (i, tokens, _), delta in zip(embeddings, grads[len(weights):]):
            if delta is not None:
                counts = torch.bincount(tokens.flatten(), minlength=len(self.params[i]))
                add(i, 0, counts.to(dtype), tokens.numel())
                add(i, 1, self._gram(delta.to(dtype).flatten(0, -2)))
        for (i, _), delta in zip(biases, grads[len(weights) + len(embeddings):]):
            if delta is not None and delta.shape[-1] == len(self.params[i]):
                add(i, 0, self._gram(delta.to(dtype).flatten(0, -2)))
                add(i, 1, delta.new_ones(1, dtype=dtype), 1)
        return [torch.zeros_like(self.params[i]) if g is None else g for i, g in zip(diagonal, grads[len(edges):])]

    def decompose(self):
        """Eigenvalues and eigenvectors of the factors; with several processes each decomposes some of them, and all have the results."""
        matrices = {(i, k): side for i, sides in self.factors.items() if len(sides) == 2 for k, side in enumerate(sides) if side.ndim == 2}
        owner = owners([len(side) ** 3 for side in matrices.values()])
        pairs = [self._eigh(side) if who == ranks()[0] else (torch.zeros_like(side[0]), torch.zeros_like(side))
                 for who, side in zip(owner, matrices.values())]
        flat = reduce(*(t for pair in pairs for t in pair))
        found = dict(zip(matrices, zip(flat[::2], flat[1::2])))
        if reduce_number(self.repaired == self.FAILED):
            self.repaired = self.FAILED
        for i, sides in self.factors.items():
            if len(sides) == 2:
                (lL, QL), (lR, QR) = (found.get((i, k), (side, None)) for k, side in enumerate(sides))      # None: the identity
                self.bases[i], self.values[i], self.spectra[i] = (QL, QR), (lL, lR), torch.outer(lL, lR)
            else:
                self.values[i], self.spectra[i] = sides, sides[0]

    def tikhonov(self, gamma):
        """Spectra with factored damping (Martens & Grosse, section 6.3): (Λ_L + γ/π) (Λ_R + γπ)ᵀ, π² = mean(Λ_R) / mean(Λ_L)."""
        out = []
        for sides in self.values:
            if len(sides) == 1:
                out.append(sides[0] + gamma ** 2)
                continue
            pi = ((sides[1].mean() + 1e-30) / (sides[0].mean() + 1e-30)).sqrt()
            out.append(torch.outer(sides[0] + gamma / pi, sides[1] + gamma * pi))
        return out

    def _gram(self, m):
        """mᵀm (side, side), or its diagonal where the side is too large to decompose."""
        return m.T @ m if m.shape[1] <= self.max_side else (m * m).sum(0)

    def _eigh(self, side):
        """Eigenvalues, not negative, and eigenvectors; the diagonal and the identity where LAPACK fails."""
        try:
            values, vectors = torch.linalg.eigh(side.double())   # in float32 it can return NaN, without a word, where entries underflow
        except torch.linalg.LinAlgError:
            self.repaired = self.FAILED
            return side.diagonal().clamp_min(0), torch.eye(len(side), dtype=side.dtype, device=side.device)
        return values.clamp_min(0).to(side.dtype), vectors.to(side.dtype)

    def apply(self, v, function, part=None, spectra=None):
        """function(K) v, the function taken on the eigenvalues (or on other `spectra` in the same basis); v flat (P,), or
        over the parameters in `part`.

            K = Q S Qᵀ,   function(K) V = Q_L [ function(S) ∘ (Q_Lᵀ V Q_R) ] Q_Rᵀ
        """
        part = range(len(self.params)) if part is None else part
        out = []
        for i, t in zip(part, unflatten(v, [self.params[i] for i in part])):
            (QL, QR), S = self.bases[i], (spectra or self.spectra)[i]
            t = t.reshape(S.shape)
            t = t if QL is None else QL.T @ t
            t = t if QR is None else t @ QR
            t = t * function(S)
            t = t if QL is None else QL @ t
            t = t if QR is None else t @ QR.T
            out.append(t)
        return flatten(out)

    def state_dict(self):
        return {"factors": self.factors, "bases": self.bases, "values": self.values, "spectra": self.spectra}

    def load_state_dict(self, state):
        def place(x):
            if isinstance(x, dict):
                return {k: place(v) for k, v in x.items()}
            return x.to(self.params[0].device) if torch.is_tensor(x) else type(x)(place(v) for v in x) if x is not None else None
        self.factors, self.bases, self.values, self.spectra = (place(state[k]) for k in ("factors", "bases", "values", "spectra"))


# ---------------------------------------------------------------------------------------------------------------------
# Step length and damping


class Search(NamedTuple):
    alpha: float      # 0.0: nothing was better
    loss: float       # at alpha
    tries: int        # losses evaluated
    reason: str       # "armijo", "grid", "none", "no decrease" or "nonfinite" (no candidate had a finite loss)


def line_search(loss_at, loss0, slope, kind="armijo", candidates=10, c=1e-2):
    """Choose α among 2^(−i/2), i = 0, 1, ..., or 0.

    loss_at   α -> loss;   loss0 = loss_at(0);   slope = gᵀd < 0
    armijo    the first α with loss <= loss0 + c α slope, then on while the loss still falls: a loss that is not quadratic
              often has a better α right behind the first acceptable one
    grid      the best of all candidates (the paper's; it takes 5 or 10, has no α = 0 and so no rejection)
    none      α = 1 if its loss is finite
    A loss that is not finite counts as infinite.
    """
    if kind not in ("armijo", "grid", "none"):
        raise ValueError(f"line search must be armijo, grid or none, got {kind!r}")
    best, finite, tries = (0.0, loss0), False, 0
    for i in range(1 if kind == "none" else candidates):
        alpha = 2 ** (-i / 2)
        loss, tries = loss_at(alpha), tries + 1
        finite |= math.isfinite(loss)
        if kind == "armijo" and best[0] > 0 and not loss < best[1]:
            break
        enough = {"armijo": loss <= loss0 + c * alpha * slope, "grid": True, "none": math.isfinite(loss)}[kind]
        if enough and (loss < best[1] or kind == "none"):
            best = (alpha, loss)
    return Search(*best, tries, kind if best[0] else "no decrease" if finite else "nonfinite")


def levenberg_marquardt(damping, rho, alpha, raise_by=2.0, lower_by=0.4, floor=1e-8, ceiling=1e4):
    """The next λ. ρ, actual over predicted decrease at the step taken, near 1: the model was right, trust it further.

    λ falls if ρ > 3/4 at (nearly) full length, and grows if ρ < 1/4 or the search had to cut the step below 0.4: a cut
    step can have ρ near 1 while the model was far off at the length it asked for. Martens (2010, section 4.1) has
    factors 3/2 and 2/3, made for hundreds of steps; here a run has tens.
    """
    if not rho >= 0.25 or alpha < 0.4:
        damping *= raise_by
    elif rho > 0.75 and alpha > 0.9:
        damping *= lower_by
    return min(max(damping, floor), ceiling)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's solver: an ordinary optimizer on the local model

SCHEDULES = ("constant_with_inner_cosine", "cosine_with_global_schedule", "global_cosine", "constant")


def inner_schedule(kind, outer, outer_steps, k, n, warmup=0):
    """Factor of the inner rate at inner step k of n in outer step `outer` (all counted from 0).

    global_cosine                  one cosine over all inner steps of all outer steps
    cosine_with_global_schedule    a cosine inside each outer step, whose peaks follow a cosine over the outer steps
    constant_with_inner_cosine     a cosine inside each outer step, constant peaks
    constant                       no decay
    The first `warmup` inner steps of the run are scaled by (steps done + 1) / warmup.
    """
    if kind not in SCHEDULES:
        raise ValueError(f"inner schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}")
    done = outer * n + k

    def cosine(part):
        return 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))
    factor = {"global_cosine": lambda: cosine(done / (outer_steps * n)),
              "cosine_with_global_schedule": lambda: cosine(outer / outer_steps) * cosine(k / n),
              "constant_with_inner_cosine": lambda: cosine(k / n),
              "constant": lambda: 1.0}[kind]()
    return factor * (min(1.0, (done + 1) / warmup) if warmup else 1.0)


def expand_once(model, theta, x, y, v, prox_linear, at_theta, double_backward=False, n=None):
    """The local model of a micro-batch that is used once, at v, all parameters one part; theta, v: lists of tensors. Sums
    over tokens are divided by n, by default their number.

        forward mode   z, J v in one pass               1/3 + 2/3 of a gradient by matrix multiplications
        backward       ∇m(v) = Jᵀ(u + H J v), or Jᵀ ∂L/∂z(z + J v) for prox-linear       2/3

    5/3 in all, where GGN and its first product take 7/3. Returns [L(θ), m(v) − L(θ), *∇m(v)], and with at_theta behind them
    *g, the gradient at θ, for 2/3 more. double_backward: J v by that, for compilers, which know no forward mode (the gradient
    that it makes on its way is dead code there), and for models that have no forward-mode rule.
    """
    theta = [p.detach().requires_grad_() for p in theta]
    with differentiable_attention(), torch.enable_grad():
        if double_backward:
            with placed(model, theta):
                z = logits(model, x)
            u = torch.zeros_like(z, requires_grad=True)
            g = derivative(z, theta, u, create_graph=True)
            Jv = derivative(g, u, v)[0]
        else:
            with forward_ad.dual_level(), placed(model, map(forward_ad.make_dual, theta, v)):
                z, Jv = forward_ad.unpack_dual(logits(model, x, y))
    with torch.no_grad():
        n = (y != IGNORED).sum() if n is None else n
        weight, loss = per_token(y, n), cross_entropy_sum(z, y) / n
        Jv = torch.zeros_like(z) if Jv is None else Jv.detach()
        probs = torch.softmax(z, dim=-1)
        u = cross_entropy_grad(probs, y, weight)
        if prox_linear:
            fall = cross_entropy_sum(z + Jv, y) / n - loss
            w = cross_entropy_grad(torch.softmax(z + Jv, dim=-1), y, weight)
        else:
            HJv = cross_entropy_hvp(probs, Jv, weight)
            fall, w = (Jv * (u + 0.5 * HJv)).sum(), u + HJv
    return [loss, fall, *derivative(z, theta, w), *(derivative(z, theta, u) if at_theta else ())]


class InnerSolver:
    """Minimise the local model by an optimizer that reads the batch once, one inner step per micro-batch (paper, Algorithm 1).

        v = θ̂ − θ;  per micro-batch, with its own J, u = ∂L/∂z and H:
        GN            ∇ = Jᵀ(u + H J v) + l2 v
        prox-linear   ∇ = Jᵀ ∂L/∂z(z + J v) + l2 v
        θ̂ ← optimizer(θ̂, ∇)

    g = Jᵀu at θ, and the decrease m(θ̂ − θ) − m(0), are means over the last sixteenth of the micro-batches, each taken before its
    inner step: on data that the step has not been fitted to.

    optimizer     a name for baselines.make_optimizer: "muon", "adamw", ...
    rows          sequences in a micro-batch: a batch of B rows gives B / rows inner steps
    lr, weight_decay, betas    the optimizer's; schedule, warmup: see inner_schedule
    clip          norm that the gradient of each part is clipped to; 0 = off
    l2            pull toward θ
    average       share of the inner steps, counted from the end, whose mean is the solution θ̂, free of most of the noise of the last
                  of them (Polyak & Juditsky 1992); 0 = the last. The next solve goes on from the last one either way
    reset         start every outer step at θ with fresh moments; else at the last θ̂, before the line search, with the old ones
    compile       compile what is done per micro-batch; eager, with a warning, where that fails
    """

    def __init__(self, model, optimizer="muon", rows=64, lr=3e-3, weight_decay=1e-3, betas=(0.9, 0.999), clip=1.0, l2=0.0,
                 average=0.0, schedule="constant_with_inner_cosine", warmup=0, outer_steps=100, reset=False, compile=False):
        inner_schedule(schedule, 0, 1, 0, 1)
        if not 0 <= average <= 1:
            raise ValueError(f"average must be a share of the inner steps, from 0 to 1, got {average}")
        self.model, self.rows, self.lr, self.clip, self.l2, self.reset = model, rows, lr, clip, l2, reset
        self.average, self.schedule, self.warmup = average, schedule, warmup
        self.outer_steps, self.compile, self.programs, self.double_backward = outer_steps, compile, {}, False
        self.settings = optimizer, model, lr, weight_decay, betas
        self.ends = [nn.Parameter(p.detach().clone()) for p in trainable(model)]       # θ̂
        self.outer, self.stale = 0, False
        self._start()

    def _start(self):
        """An optimizer of θ̂, with fresh moments."""
        with placed(self.model, self.ends):
            self.optimizer = make_optimizer(*self.settings)

    def solve(self, parts, idx, targets, prox_linear, record, progress):
        """Loss of the batch and gradient at θ, the direction θ̂ − θ, and the decrease that the local model promises for it."""
        targets, n = check_targets(idx, targets)
        refuse_randomness(self.model, idx)
        params, ends = trainable(self.model), self.ends
        batches = [(x, y) for x, y in pieces(idx, targets, self.rows) if (y != IGNORED).any()]
        if self.outer == 0 or self.reset or self.stale:
            assign(ends, params)
            self._start()
            self.stale = False
        first_late = len(batches) - math.ceil(len(batches) / 16)
        counts = [int((y != IGNORED).sum()) for _, y in batches]
        n_late = sum(counts[first_late:])
        loss, grad, decrease, theta = 0.0, 0.0, 0.0, flatten([p.detach() for p in params])
        averaged, mean = len(batches) - math.ceil(self.average * len(batches)), 0.0        # the first inner step in the mean
        local = self._expand if len(parts) == 1 else self._expand_parts
        for k, (x, y) in enumerate(batches):
            progress("inner", k, len(batches))
            v, late = flatten([e.detach() for e in ends]) - theta, k >= first_late
            value, fall, gradients, at_theta, work = local(x, y, v, parts, prox_linear, late)
            if late and k > averaged:                   # what the mean so far promises
                fall, extra = (local(x, y, mean - theta, parts, prox_linear, False)[i] for i in (1, 4))
                work += extra
            loss = loss + value * (counts[k] / n)
            if late:
                grad, decrease = grad + at_theta * (counts[k] / n_late), decrease + fall * (counts[k] / n_late)
            norms = []
            for part, g in zip(parts, gradients):
                g = g + self.l2 * select(v, params, part)
                norms.append(g.norm())
                if self.clip:
                    g = g * (self.clip / (norms[-1] + 1e-12)).clamp(max=1.0)
                for i, t in zip(part, unflatten(g, [params[i] for i in part])):
                    ends[i].grad = t
            factor = inner_schedule(self.schedule, self.outer, self.outer_steps, k, len(batches), self.warmup)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * factor
            self.optimizer.step()
            if k >= averaged:
                mean = mean + (flatten([e.detach() for e in ends]) - mean) / (k - averaged + 1)
            record["work"] += work * y.numel() / targets.numel()
        self.outer += 1
        record.update(inner_steps=len(batches), inner_grad_norm=torch.stack(norms).norm().item())
        found = mean if self.average else flatten([e.detach() for e in ends])
        return float(loss), grad, found - theta, float(decrease)

    def _expand(self, x, y, v, parts, prox_linear, at_theta):
        """The local model of a micro-batch at v: L at θ, m(v) − L, ∇m(v) for each part, g or None, and the work."""
        n = (y != IGNORED).sum()
        x, y = share(x, y)
        params = trainable(self.model)
        arguments, key = ([p.detach() for p in params], x, y, unflatten(v, params), n), (x.shape, prox_linear, at_theta)

        def function(theta, x, y, v, n, double_backward=self.double_backward):
            return expand_once(self.model, theta, x, y, v, prox_linear, at_theta, double_backward, n)
        try:
            if self.compile and key not in self.programs:
                self.programs[key] = compiled_or_eager(function, *arguments)
            found = self.programs.get(key, function)(*arguments)
        except NotImplementedError:                     # an operation without a forward-mode rule
            self.double_backward = True
            found = function(*arguments, double_backward=True)
        loss, fall, *g = reduce(*found)
        k = len(params)
        return loss, fall, [flatten(g[:k])], flatten(g[k:]) if at_theta else None, (7 if at_theta else 5) / 3

    def _expand_parts(self, x, y, v, parts, prox_linear, at_theta):
        """The same for several parts, each with the others at rest, all on one linearisation."""
        if self.compile and x.shape not in self.programs:
            self.programs[x.shape] = program_or_none(self.model, *share(x, y))
        params, ggn, fall, gradients = trainable(self.model), GGN(self.model, x, y, program=self.programs.get(x.shape)), 0.0, []
        loss, at_zero = ggn.loss, ggn.grad
        for part in parts:
            v_part, g = select(v, params, part), select(at_zero, params, part)
            if prox_linear:
                ggn.shift(v_part, part)
                fall, g = fall + ggn.loss - loss, ggn.grad
            else:
                Gv = ggn.matvec(v_part, part)
                fall, g = fall + g.dot(v_part) + 0.5 * Gv.dot(v_part), g + Gv
            gradients.append(g)
        return loss, fall, gradients, at_zero, ggn.work

    def restart(self):
        """Start the next solve at θ with fresh moments."""
        self.stale = True

    def state_dict(self):
        return {"copy": [p.detach() for p in self.ends], "optimizer": self.optimizer.state_dict(), "outer": self.outer, "stale": self.stale}

    def load_state_dict(self, state):
        assign(self.ends, state["copy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.outer, self.stale = state["outer"], state["stale"]


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


class GaussNewton:
    """Damped Gauss-Newton steps for any nn.Module whose forward(inputs) gives logits (..., classes).

    parts            partition of the parameters as a list of lists of them (layerwise: curvature across parts is dropped,
                     each part has a CG of its own); None: one part, full Gauss-Newton
    damping          λ at the start; then Levenberg-Marquardt, not below a tenth of it
    damping_metric   "identity": λI.  "kfac": λ (L ⊗ R)^½ in K-FAC's eigenbasis, so that directions of large curvature,
                     along which the linearisation fails first, are held back more
    precond          "kfac" or "none"; precond_interval: steps between new factors, made from precond_frac of the curvature
                     batch's rows
    cg_iters, cg_tol, cg_rtol     see cg
    warm_start       start CG from this multiple of the last solution (0: from zero)
    curvature_frac   share of the batch's rows that G is made from, unless step() is given others; the gradient is always
                     the whole batch's
    line_search      "armijo", "grid" or "none", with search_candidates step lengths, on the last search_frac of the batch's rows unless
                     step() is given others
    micro_batch      rows worked on at a time; cache_gb: see GGN
    local_model      "gn": the loss to second order in the logits.  "prox_linear": the loss itself on the linearised logits,
                     by newton_steps Newton-CG steps per outer step, each with H at the current linearised logits
    geodesic         correct the step along the model's curvature, θ + αd + α²a, where that lowers the loss further (CG only)
    power            1: d = −(G + λI)⁻¹ g.  0.5: d = −(G + λI)^(−½) g by Lanczos, λ fixed, scaled to the model's minimum along
                     it; without preconditioner, identity metric, GN
    inner            an InnerSolver in place of CG; damping, preconditioner and curvature settings are then not used
    compile          compile the product (see Program; for CG: an InnerSolver has its own); eager, with a warning, where that fails
    seed             of the sampled labels
    progress         called as progress(what) or progress("cg", done, total) inside long steps
    """

    METRICS = {"identity": torch.ones_like,                      # K-FAC's eigenvalues S -> those of the damping
               "kfac": lambda S: (S + 1e-6).sqrt()}              # kept away from 0 where S is: tokens never seen

    def __init__(self, model, parts=None, damping=1.0, damping_metric="kfac", precond="kfac", precond_interval=1,
                 precond_frac=0.25, cg_iters=20, cg_tol=0.0, cg_rtol=0.0, warm_start=1.0, curvature_frac=1.0,
                 line_search="armijo", search_candidates=10, search_frac=1.0, local_model="gn", newton_steps=3, geodesic=False, power=1.0,
                 inner=None, micro_batch=None, cache_gb=None, compile=False, seed=0, progress=None):
        if damping_metric not in self.METRICS:
            raise ValueError(f"damping_metric must be identity or kfac, got {damping_metric!r}")
        if precond not in ("kfac", "none"):
            raise ValueError(f"precond must be kfac or none, got {precond!r}")
        if local_model not in ("gn", "prox_linear"):
            raise ValueError(f"local_model must be gn or prox_linear, got {local_model!r}")
        if power != 1 and (power != 0.5 or precond != "none" or damping_metric != "identity" or inner or local_model != "gn" or geodesic):
            raise ValueError("power must be 1 or 0.5, and 0.5 goes without preconditioner, inner solver, prox_linear and geodesic, with "
                             "damping_metric identity: Lanczos makes a function of G + λI alone")
        if geodesic and inner:
            raise ValueError("the geodesic correction is a second CG solve; it does not go with an inner solver")
        if not all(0 < share <= 1 for share in (curvature_frac, precond_frac, search_frac)):
            raise ValueError("curvature_frac, precond_frac and search_frac must be in (0, 1]")
        if not 0 < damping < math.inf:
            raise ValueError(f"damping must be positive and finite, got {damping}")
        self.model, self.params = model, trainable(model)
        index = {id(p): i for i, p in enumerate(self.params)}
        self.parts = [[index.get(id(p), -1) for p in part] for part in parts] if parts else [list(range(len(self.params)))]
        if sorted(i for part in self.parts for i in part) != list(range(len(self.params))):
            raise ValueError("parts must hold every trainable parameter of the model exactly once")
        self.damping, self.damping_metric, self.precond = damping, damping_metric, precond
        # ρ stays near 1 for ever smaller λ, but few iterations of CG then find less and less: with batches of a million tokens and λ
        # from 0.1 down, 20 steps from a warmup checkpoint ended at 1.61 nats, and at 1.42 with λ held above 0.02.
        self.floor = 0.1 * damping
        self.metric = self.METRICS[damping_metric]
        self.kfac = None if precond == "none" and damping_metric == "identity" else KFAC(model)
        self.precond_interval, self.precond_frac = precond_interval, precond_frac
        self.cg_iters, self.cg_tol, self.cg_rtol, self.warm_start = cg_iters, cg_tol, cg_rtol, warm_start
        self.curvature_frac, self.search_frac = curvature_frac, search_frac
        self.line_search, self.search_candidates = line_search, search_candidates
        self.local_model, self.newton_steps, self.inner = local_model, newton_steps, inner
        self.geodesic, self.power = geodesic, power
        self.micro_batch, self.cache_gb, self.compile, self.program = micro_batch, cache_gb, compile, None
        self.progress = progress or (lambda what, done=0, total=0: None)
        self.direction, self.steps, self.rejections = None, 0, 0      # rejections in a row
        self.generator = torch.Generator(device=self.params[0].device).manual_seed(seed)

    def step(self, idx, targets, curvature=None, search=None):
        """One outer step on a batch; returns its record, a flat dict.

        curvature, search    (idx, targets) of other data for G and for the line search; default: the batch itself.
        A loss, gradient or product that is not finite, an indefinite product, or a search without a decrease rejects the
        step: parameters stay bitwise as they were, λ is raised, and record["reason"] says why ("" when all went well).
        Inside torch.autocast the model alone works in short numbers.
        """
        with full_precision(self.params[0].device.type, self.model):
            return self._step(idx, targets, curvature, search)

    def _step(self, idx, targets, curvature, search):
        if [id(p) for p in trainable(self.model)] != [id(p) for p in self.params]:
            raise ValueError("the model's trainable parameters are no longer those that this GaussNewton was made for "
                             "(frozen or unfrozen since?): make a new one")
        targets, _ = check_targets(idx, targets)
        if search is not None:
            search = search[0], check_targets(*search)[0]
        if curvature is not None:
            curvature = curvature[0], check_targets(*curvature)[0]
        theta = [p.detach().clone() for p in self.params]
        record = {"accepted": False, "reason": "", "damping": self.damping, "alpha": 0.0, "rho": None, "work": 0.0}
        try:
            # 1, 2. Linearise, and minimise the local model.
            if self.inner:
                self.progress("inner")
                loss, grad, d, decrease = self.inner.solve(self.parts, idx, targets, self.local_model == "prox_linear", record, self.progress)
                bend = None
            else:
                loss, grad, d, decrease, bend = self._solve(idx, targets, curvature, record)
            slope = grad.dot(d).item()
            record.update(loss=loss, grad_norm=grad.norm().item())
            if not (math.isfinite(loss) and math.isfinite(record["grad_norm"])):
                return self._reject(record, "loss or gradient not finite")
            if record.get("cg_reason") in ("nonfinite", "indefinite") or not slope < 0:
                return self._reject(record, f"no descent direction ({record.get('cg_reason', 'inner')}, slope {slope:.1e})")
            # 3. Search along θ + αd, and along θ + αd + α²a where there is a correction a.
            rows = math.ceil(self.search_frac * len(idx))
            x, y = search or (idx[-rows:], targets[-rows:])

            def loss_at(alpha, bend=None, x=x, y=y):
                self.progress("line search")
                self._move(theta, d, alpha, bend)
                record["work"] += y.numel() / targets.numel() / 3
                return batch_loss(self.model, x, y, self.micro_batch)
            loss0 = loss if search is None and rows == len(idx) else loss_at(0.0)
            found = line_search(loss_at, loss0, slope, self.line_search, self.search_candidates)
            if bend is not None:
                bent = line_search(lambda alpha: loss_at(alpha, bend), loss0, slope, self.line_search, self.search_candidates)
                found, bend = (bent, bend) if bent.loss < found.loss else (found, None)
            record.update(alpha=found.alpha, search_loss0=loss0, search_loss=found.loss, search_tries=found.tries, bent=bend is not None)
            if found.alpha == 0:
                assign(self.params, theta)
                return self._reject(record, f"line search: {found.reason}")
            # 4. Update θ and λ.
            actual = found.loss - loss0 if search is None else loss_at(found.alpha, bend, idx, targets) - loss
            # The model along d, a parabola with its slope at 0 and its value at 1; exact for GN.
            predicted = found.alpha * slope + found.alpha ** 2 * (decrease - slope)
            if search is None and self.line_search != "none" and actual > 1e-4 * predicted:    # a decrease that is rounding of a huge loss, say
                assign(self.params, theta)
                return self._reject(record, f"the loss fell by {-actual:.1e} where the model promised {-predicted:.1e}")
            self._move(theta, d, found.alpha, bend)
            return self._accept(record, actual, predicted, grad, d, slope)
        except BaseException:                           # out of memory, Ctrl-C: as if the step had not begun
            assign(self.params, theta)
            raise

    def _linearise(self, idx, targets, curvature, record):
        """The curvature batch linearised, and loss and gradient of the whole batch."""
        self.progress("linearise")
        rows = math.ceil(self.curvature_frac * len(idx))
        x, y = curvature or (idx[:rows], targets[:rows])
        piece = pieces(*share(x, y), self.micro_batch)[0]
        if self.compile and (self.program is None or self.program.shape != piece[0].shape):
            self.progress("compile")
            self.program = program_or_none(self.model, *piece)
            self.compile = self.program is not None
        ggn = GGN(self.model, x, y, self.micro_batch, self.cache_gb, self.program)
        loss, grad = ggn.loss, ggn.grad
        if curvature is not None or rows < len(idx):    # the rows whose gradient G did not give
            rest = 0 if curvature is not None else rows
            weight = (targets[rest:] != IGNORED).sum().item() / (targets != IGNORED).sum().item()
            if weight > 0:
                rest_loss, rest_grad = batch_grad(self.model, idx[rest:], targets[rest:], self.micro_batch)
                loss, grad = (1 - weight) * loss + weight * rest_loss, (1 - weight) * grad + weight * rest_grad
            record["work"] += targets[rest:].numel() / targets.numel()
        record.update(pieces=len(ggn.data), pieces_kept=len(ggn.cache))
        return ggn, loss, grad

    def _precondition(self, ggn, record):
        if self.kfac and (self.steps % self.precond_interval == 0 or not self.kfac.factors):
            self.progress("kfac")
            x, y = ggn.batch
            rows = math.ceil(self.precond_frac * len(x))
            self.kfac.update(x[:rows], y[:rows], self.micro_batch, self.generator)
            self.kfac.decompose()
            record["repaired"] = self.kfac.repaired or None
            ggn.work += 2 / 3 * rows / len(x)           # a forward, and a backward for the activations alone

    def _solve(self, idx, targets, curvature, record):
        """Minimise m(d) + λ/2 dᵀM d by CG for each part, curvature across parts left out. Returns loss and gradient of the
        batch at θ, d (P,), the decrease m(d) − m(0) that the local model promises, damping left out, and the geodesic
        correction or None.

        GN: (G + λM) d = −g, one solve. Prox-linear: Newton steps (G_d + λM) δ = −(∇f¹(d) + λM d), d ← d + δ, halved while
        they do not lower the objective. Where G's batch is not the gradient's, m has G's curvature and the batch's slope.
        """
        ggn, loss, grad = self._linearise(idx, targets, curvature, record)
        if not (math.isfinite(loss) and grad.isfinite().all()):
            return loss, grad, torch.zeros_like(grad), 0.0, None
        self._precondition(ggn, record)
        lam, kfac, metric, prox = self.damping, self.kfac, self.metric, self.local_model == "prox_linear"
        reasons, iterations, total, solutions = [], 0, 0.0, []

        def damp(v, part):
            return lam * (v if self.damping_metric == "identity" else kfac.apply(v, metric, part))

        budget = len(self.parts) * self.cg_iters * ((self.newton_steps if prox else 1) + self.geodesic)    # iterations, at most

        def matvec(v, part, damped=True):
            self.progress("cg", min(ggn.products, budget), budget)
            return ggn.matvec(v, part) + (damp(v, part) if damped else 0)

        def solve(b, part, x0=None):
            nonlocal iterations
            precond = (lambda v: kfac.apply(v, lambda S: 1 / (S + lam * metric(S)), part)) if self.precond == "kfac" else None
            result = cg(lambda v: matvec(v, part), b, x0, precond, self.cg_iters, self.cg_tol, self.cg_rtol)
            reasons.append(result.reason)
            iterations += result.iterations
            return result

        correction, own_loss = grad - ggn.grad, ggn.loss
        for part in self.parts:
            g, c = select(grad, self.params, part), select(correction, self.params, part)
            x0 = self.warm_start * select(self.direction, self.params, part) if self.warm_start and self.direction is not None else None
            if self.power != 1:
                # The power −½ has no natural length: d is scaled to the minimum of m along it.
                x, xGx, n = lanczos(lambda v: matvec(v, part, False), -g, lambda S: (S + lam) ** -self.power, self.cg_iters)
                scale = -g.dot(x).item() / xGx if xGx > 0 else math.nan
                x, iterations = scale * x, iterations + n
                reasons.append("lanczos" if math.isfinite(scale) else "nonfinite")
                total += 0.5 * g.dot(x).item()
            elif not prox:
                result = solve(-g, part, x0)
                x = result.x
                # CG's last value is ½ xᵀ(G + λM)x + gᵀx, so that the decrease costs no product.
                total += result.values[-1] - 0.5 * x.dot(damp(x, part)).item()
            else:
                x, objective, slope = torch.zeros_like(g), own_loss, g - c
                if ggn.offset is not None:              # another part's solve has moved the logits
                    ggn.shift(x, part)
                for _ in range(self.newton_steps):
                    delta = solve(-(slope + c + damp(x, part)), part, x0).x
                    for t in (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125, 0.0):
                        moved = x + t * delta
                        ggn.shift(moved, part)
                        value = ggn.loss + c.dot(moved).item() + 0.5 * moved.dot(damp(moved, part)).item()
                        if value <= objective or t == 0:
                            break
                    x0, x, objective, slope = None, moved, value, ggn.grad
                    if t == 0:
                        break
                total += ggn.loss - own_loss + c.dot(x).item()
            solutions.append(x)
        trouble, d, bend = [r for r in reasons if r in ("nonfinite", "indefinite")], join(solutions, self.params, self.parts), None
        if self.geodesic and not trouble and d.isfinite().all() and d.any():
            bend = self._geodesic(ggn, d, solve)
            record["bend"] = 2 * (bend.norm() / d.norm()).item()
            bend = bend if record["bend"] <= 0.75 else None         # beyond it the series is not to be trusted (the same source)
        record.update(cg_iterations=iterations, products=ggn.products, cg_reason=trouble[0] if trouble else "+".join(sorted(set(reasons))))
        record["work"] += ggn.work * ggn.batch[1].numel() / targets.numel()
        return loss, grad, d, total, bend

    def _geodesic(self, ggn, d, solve, h=0.1):
        """Second-order correction of the step along the model's own curvature, "geodesic acceleration" (Transtrum & Sethna 2012):

            (G + λM) a = −½ JᵀH f''(d, d),   f''(d, d) ≈ (2/h) ((z(θ + hd) − z(θ)) / h − J d)
        """
        rhs = ggn.pull_back_curvature(d, h)
        return join([solve(-0.5 * select(rhs, self.params, part), part).x for part in self.parts], self.params, self.parts)

    def _accept(self, record, actual, predicted, grad, d, slope):
        alpha = record["alpha"]
        rho = actual / predicted if predicted < 0 else 0.0
        if self.inner is None and self.power == 1:      # the others have no λ to adapt
            self.damping = levenberg_marquardt(self.damping, rho, alpha, floor=self.floor)
        self.direction, self.steps, self.rejections = d, self.steps + 1, 0
        record.update(accepted=True, new_loss=record["loss"] + actual, predicted=predicted, actual=actual, rho=rho,
                      cosine=-slope / (grad.norm() * d.norm()).item(), step_norm=alpha * d.norm().item())
        return record

    def _reject(self, record, reason):
        """λ up, the last direction and inner state forgotten: what led nowhere must not lead there again."""
        self.damping = levenberg_marquardt(self.damping, 0.0, 0.0, floor=self.floor)
        if self.inner:
            self.inner.restart()
        self.direction, self.steps, self.rejections = None, self.steps + 1, self.rejections + 1
        record.update(reason=reason, alpha=0.0)
        return record

    def _move(self, theta, d, alpha, bend=None):
        """θ + αd, or θ + αd + α²a, into the model; at α = 0 θ itself, bit for bit."""
        if alpha == 0:
            return assign(self.params, theta)
        move = alpha * d if bend is None else alpha * d + alpha ** 2 * bend
        assign(self.params, [t + m for t, m in zip(theta, unflatten(move, self.params))])

    def state_dict(self):
        """Everything that the next step depends on beside the parameters, in tensors and plain types."""
        state = {"damping": self.damping, "steps": self.steps, "rejections": self.rejections, "direction": self.direction,
                 "generator": self.generator.get_state()}
        if self.inner:
            state["inner"] = self.inner.state_dict()
        if self.kfac and self.precond_interval > 1:
            state["kfac"] = self.kfac.state_dict()
        return state

    def load_state_dict(self, state):
        self.damping, self.steps, self.rejections = state["damping"], state["steps"], state["rejections"]
        device = self.params[0].device
        self.direction = None if state["direction"] is None else state["direction"].to(device)
        self.generator.set_state(state["generator"].cpu())
        if "inner" in state:
            self.inner.load_state_dict(state["inner"])
        if "kfac" in state:
            self.kfac.load_state_dict(state["kfac"])
