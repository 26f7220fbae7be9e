"""The optimizers Gauss-Newton is compared with: AdamW, Adam, SGD, Muon, SOAP, K-FAC, and the learning-rate schedules.

    opt = make_optimizer("soap", model)                     # any nn.Module; lr=None takes DEFAULT_LR
    base = [group["lr"] for group in opt.param_groups]
    for step in range(total_steps):
        factor = lr_schedule(step, total_steps, "cosine", warmup_steps=10)
        for group, lr in zip(opt.param_groups, base):
            group["lr"] = lr * factor
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()

To add an optimizer: write it as an Optimizer (below: a torch.optim.Optimizer that defines `move`), give it a
row in DEFAULT_LR and one in DEFAULTS, and add its branch to make_optimizer; the trainer and the tests find it
in BASELINES. Use Combined if it suits only some of the parameters. Its step() must leave p.grad as it was.
"""
import contextlib
import math
import warnings
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn as nn

DEFAULT_LR = {  # peak rates: the best of 2 to 6 each for preset tiny on Python source at 16k tokens a step; retune elsewhere
    "adamw": 1e-2,
    "adam": 1e-2,
    "sgd": 3e-1,
    "muon": 3e-2,
    "soap": 1e-2,
    "kfac": 3e-2,
}
DEFAULTS = {  # everything else, as each method's reference has it
    "adamw": dict(betas=(0.9, 0.95), weight_decay=0.1),     # GPT-3: arXiv 2005.14165, appendix B
    "adam": dict(betas=(0.9, 0.999), weight_decay=0.0),     # arXiv 1412.6980, algorithm 1
    "sgd": dict(momentum=0.9, weight_decay=0.0),            # Sutskever et al. 2013, Nesterov's form
    "muon": dict(momentum=0.95, betas=(0.9, 0.95), weight_decay=0.1),  # Jordan 2024; decay and scale: arXiv 2502.16982
    "soap": dict(betas=(0.95, 0.95), weight_decay=0.01, precondition_frequency=10),  # arXiv 2409.11321
    "kfac": dict(momentum=0.9, weight_decay=0.0, precondition_frequency=10),         # arXiv 1503.05671; KL clipping: 1708.05144
}
BASELINES = tuple(DEFAULTS)


def make_optimizer(name, model, lr=None, weight_decay=None, betas=None, momentum=None, precondition_frequency=None):
    """One of BASELINES for a model's trainable parameters. None takes the default; what a method does not use it ignores.

    weight_decay reaches matrices (ndim >= 2) only, never norms and biases. It is decoupled, p -= lr * weight_decay * p,
    but for adam and sgd, where it is the L2 term of the gradient. Muon's betas belong to the AdamW beside it."""
    if name not in DEFAULTS:
        raise ValueError(f"unknown optimizer {name!r}; choose from {', '.join(BASELINES)}")
    lr = DEFAULT_LR[name] if lr is None else lr
    given = dict(weight_decay=weight_decay, betas=betas, momentum=momentum, precondition_frequency=precondition_frequency)
    o = {**DEFAULTS[name], **{k: v for k, v in given.items() if v is not None}}

    if ranks()[1] > 1 and name != "kfac":                                   # which divides its own work
        return Divided(one_process(name, model, lr, o))
    return one_process(name, model, lr, o)


def one_process(name, model, lr, o):
    """make_optimizer for a process that steps every parameter itself; o: all other settings."""
    params = [p for p in model.parameters() if p.requires_grad]            # a tied matrix comes once

    def decayed(params):
        return [dict(params=[p for p in params if p.ndim >= 2], weight_decay=o["weight_decay"]),
                dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)]

    if name == "adamw":
        return torch.optim.AdamW(decayed(params), lr=lr, betas=o["betas"])
    if name == "adam":
        return torch.optim.Adam(decayed(params), lr=lr, betas=o["betas"])
    if name == "sgd":
        return torch.optim.SGD(decayed(params), lr=lr, momentum=o["momentum"], nesterov=o["momentum"] > 0)
    if name == "soap":
        return SOAP(decayed(params), lr=lr, betas=o["betas"], precondition_frequency=o["precondition_frequency"])
    if name == "kfac":
        return KFACOptimizer(model, decayed(params), lr, o["momentum"], precondition_frequency=o["precondition_frequency"])
    if name == "muon":  # match_rms_adamw: steps of AdamW's size, 0.2 sqrt(max(m, n)) U V^T, so that one rate suits both
        hidden = hidden_matrices(model)
        rest = [p for p in params if p not in set(hidden)]
        muon = torch.optim.Muon([dict(params=hidden)], lr=lr, momentum=o["momentum"], weight_decay=o["weight_decay"],
                                adjust_lr_fn="match_rms_adamw")
        return Combined([muon, torch.optim.AdamW(decayed(rest), lr=lr, betas=o["betas"])])


# ---------------------------------------------------------------------------------------------------------------------
# Many processes (torchrun): each has all parameters and a share of every batch's rows


def ranks():
    """This process's number, and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def share(*tensors):
    """This process's rows, neighbours, of tensors that every process holds whole. Raises ValueError for fewer rows than processes."""
    (rank, world), rows = ranks(), len(tensors[0])
    if rows < world:
        raise ValueError(f"{rows} sequences cannot be shared by {world} processes")
    return tuple(t[rows * rank // world:rows * (rank + 1) // world] for t in tensors) if world > 1 else tensors


def reduce(*tensors):
    """Each tensor's sum over the processes, with the same bits on all of them; all of one dtype. In one process, what was given."""
    if ranks()[1] > 1 and tensors:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        return [t.view_as(like) for t, like in zip(flat.split([t.numel() for t in tensors]), tensors)]
    return tensors


def reduce_number(x):
    """The same for a float or an int, in float64."""
    if ranks()[1] == 1:
        return x
    return reduce(torch.tensor(float(x), dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu"))[0].item()


def owners(costs):
    """The process that each job is for: the dearest first, to the one with least to do."""
    load, owner = [0] * ranks()[1], [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = min(range(len(load)), key=load.__getitem__)
        load[owner[i]] += costs[i]
    return owner


class Divided:
    """An optimizer whose parameters are divided over the processes: each steps its own and keeps state for these alone, and sends
    them to the others. Every process needs all gradients. `state_dict` gathers: all processes call it together, and what they
    get is one process's, to be loaded into any number of them."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        owner = owners([p.numel() * (sum(p.shape) if p.ndim == 2 else 1) for p in self.params])
        self.mine = [o == ranks()[0] for o in owner]

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self):
        grads = [p.grad for p in self.params]
        for p, mine in zip(self.params, self.mine):
            p.grad = p.grad if mine else None
        self.optimizer.step()
        new = reduce(*(p if mine else torch.zeros_like(p) for p, mine in zip(self.params, self.mine)))
        for p, value, grad in zip(self.params, new, grads):
            p.copy_(value)
            p.grad = grad

    def state_dict(self):
        state, found = self.optimizer.state_dict(), [None] * ranks()[1]
        dist.all_gather_object(found, {i: s for i, s in state["state"].items() if self.mine[i]})
        return {**state, "state": {i: s for i, s in sorted(item for part in found for item in part.items())}}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict({**state, "state": {i: s for i, s in state["state"].items() if self.mine[i]}})


def hidden_matrices(model):
    """The trainable 2-D parameters that are neither an embedding nor the output head, which is `model.head` or else the
    last nn.Linear. A matrix tied to either is out too. Muon's orthogonal steps are meant for these only (Jordan 2024)."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = model.head if isinstance(getattr(model, "head", None), nn.Linear) else linears[-1] if linears else None
    outer = {p for m in model.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and p not in outer]


@contextlib.contextmanager
def full_precision(device_type, model=None):
    """Autocast is off inside, for a solver's own algebra; calls of `model` keep the caller's. Its cache of short weights is
    off too: inside a context it would outlive a change of the weights."""
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    outside = torch.autocast(device_type, dtype, enabled, cache_enabled=False)

    def enter(*_):
        outside.__enter__()

    def leave(*_):
        outside.__exit__(None, None, None)
    hooks = []
    if model is not None and enabled:
        hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        with torch.autocast(device_type, enabled=False, cache_enabled=False):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class Optimizer(torch.optim.Optimizer):
    """torch.optim's contract for what defines `move`, and `check` if it cannot train every parameter."""

    def move(self):
        """One step of all parameters that have a gradient; no autograd, no autocast."""
        raise NotImplementedError

    def check(self, params):
        """Raises ValueError if this optimizer cannot train params, a list."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        devices = (p.device.type for group in self.param_groups for p in group["params"])
        with full_precision(next(devices, "cpu")):
            self.move()
        return loss

    def add_param_group(self, group):
        super().add_param_group(group)
        try:
            self.check(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self):
        # For copies and pickles. torch would keep three attributes, we keep all but the private ones and
        # the `step` that a learning-rate scheduler puts here.
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "step"}


def check_dtypes(method, params):
    for p in params:
        if p.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{method} needs parameters in float32 or float64, and one is {p.dtype}: "
                             "keep them in float32 and call the model under torch.autocast")


class Combined(Optimizer):
    """Optimizers over disjoint parameters as one. Its param_groups are theirs in order, and its state is
    theirs; a group that is added later is the last one's. The `momentum` of every group is what schedulers
    cycle: an AdamW takes it for its beta1, whatever its betas say."""

    parts = ()

    def __init__(self, parts):
        super().__init__([group for part in parts for group in part.param_groups], dict(momentum=0.9))
        self.parts = parts

    def add_param_group(self, group):
        if self.parts:                                  # none in __init__, whose groups are complete
            group = {**self.parts[-1].defaults, **group}
        if "betas" in group:
            group.setdefault("momentum", group["betas"][0])
        super().add_param_group(group)

    def move(self):
        groups = iter(self.param_groups)
        for part in self.parts:  # linked at every step, since load_state_dict puts new objects in their place
            count = None if part is self.parts[-1] else len(part.param_groups)
            part.param_groups, part.state = list(islice(groups, count)), self.state
            for group in part.param_groups:
                if "betas" in group:
                    group["betas"] = (group["momentum"], *group["betas"][1:])
            part.step()


class SOAP(Optimizer):
    """Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321, algorithm 3). For a matrix of gradient G (m, n):

        G' = Q_L^T G Q_R                                  the gradient in the basis
        M  = b1 M + (1 - b1) G'                           Adam's moments, with bias correction
        V  = b2 V + (1 - b2) G' * G'
        W  = W - lr wd W - lr Q_L (M / (sqrt V + eps)) Q_R^T
        L  = b3 L + (1 - b3) G G^T                        Shampoo's two sides
        R  = b3 R + (1 - b3) G^T G
        every f-th step, for Q_L by L and Q_R by R:       one power iteration (algorithm 4)
            sort Q's columns, and V with them, by diag(Q^T L Q), largest first
            Q = orthonormal factor of QR(L Q)
            M = the same vector in the new basis

    Differs from the published code in: 1. The first step is taken, not skipped: L, R and (by eigh) Q_L, Q_R come from the
    first gradient, so that step is lr times its polar factor U V^T, short of singular values lost to rounding. 2. eps is
    added to the bias-corrected root, as in torch.optim.Adam. Like that code, and unlike the paper, it holds M in the basis,
    which saves two products and changes rounding only.

    betas: b1, b2. shampoo_beta: b3, negative for b2. precondition_frequency: f, in steps. A side longer than max_precond_dim
    keeps the identity for its basis, and so do both sides of anything not 2-D, which makes it AdamW. Parameters: float32
    or float64. Memory: 2 (m^2 + n^2 + mn) numbers per matrix."""

    def __init__(self, params, lr=3e-3, betas=(0.95, 0.95), shampoo_beta=-1, eps=1e-8, weight_decay=0.01,
                 precondition_frequency=10, max_precond_dim=10_000):
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr ({lr}), eps ({eps}) and weight_decay ({weight_decay}) must not be negative")
        if not all(0 <= b < 1 for b in betas) or shampoo_beta >= 1:
            raise ValueError(f"betas ({betas}) must lie in [0, 1) and shampoo_beta ({shampoo_beta}) below 1")
        if precondition_frequency < 1:
            raise ValueError(f"precondition_frequency must be at least 1, got {precondition_frequency}")
        super().__init__(params, dict(lr=lr, betas=betas, shampoo_beta=shampoo_beta, eps=eps, weight_decay=weight_decay,
                                      precondition_frequency=precondition_frequency, max_precond_dim=max_precond_dim))

    def check(self, params):
        check_dtypes("SOAP", params)

    def move(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, self.state[p], group)

    def _update(self, p, G, s, group):
        (b1, b2), b3, lr = group["betas"], group["shampoo_beta"], group["lr"]
        b3 = b2 if b3 < 0 else b3
        if first := not s:
            on = [d <= group["max_precond_dim"] for d in G.shape] if G.ndim == 2 else [False, False]
            cov = [None if c is None else c * (1 - b3) for c in covariances(G, on)]          # L (m, m), R (n, n)
            basis = [None if c is None else eigenvectors(c) for c in cov]                    # Q_L, Q_R
            s.update(step=0, M=torch.zeros_like(p), V=torch.zeros_like(p), cov=cov, basis=basis)
        s["step"] += 1
        M, V, cov, basis = s["M"], s["V"], s["cov"], s["basis"]
        rotated = any(q is not None for q in basis)

        G_rot = to_basis(G, basis)                                                          # (m, n)
        if first and rotated:
            # In its own eigenbasis G is diagonal, but L = G G^T resolves its singular values only down to sqrt(machine eps)
            # of the largest. Adam would enlarge what rounding leaves below that to full steps.
            G_rot = G_rot.where(G_rot.abs() > torch.finfo(G.dtype).eps ** 0.5 * G_rot.abs().max(), 0)
        M.lerp_(G_rot, 1 - b1)
        V.mul_(b2).addcmul_(G_rot, G_rot, value=1 - b2)
        m_hat, v_hat = M / (1 - b1 ** s["step"]), V / (1 - b2 ** s["step"])
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(from_basis(m_hat / (v_hat.sqrt() + group["eps"]), basis), alpha=lr)

        if not first:                                                                       # the first G is in L and R
            for c, new in zip(cov, covariances(G, [c is not None for c in cov])):
                if c is not None:
                    c.lerp_(new, 1 - b3)
        if s["step"] % group["precondition_frequency"] == 0 and rotated:
            M = from_basis(M, basis)
            for side in (0, 1):
                if cov[side] is not None:
                    basis[side], order = power_iteration(cov[side], basis[side])
                    V = V.index_select(side, order)
            s["M"], s["V"] = to_basis(M, basis), V


def eigenvectors(C):
    """Of a symmetric C (d, d), found in float64: in float32 LAPACK can return NaN, without a word, where entries underflow. Where
    it fails, the identity, with a warning: SOAP is Adam on that side until its next power iteration."""
    try:
        return torch.linalg.eigh(C.double()).eigenvectors.to(C.dtype)
    except torch.linalg.LinAlgError as e:
        warnings.warn(f"SOAP starts from the identity on one side: {str(e).splitlines()[0]}")
        return torch.eye(len(C), dtype=C.dtype, device=C.device)


def covariances(G, on):
    """G G^T (m, m) and G^T G (n, n), each only where it is on, since a side may be a vocabulary."""
    return G @ G.T if on[0] else None, G.T @ G if on[1] else None


def to_basis(X, basis):
    """Q_L^T X Q_R; None stands for the identity."""
    left, right = basis
    X = X if left is None else left.T @ X
    return X if right is None else X @ right


def from_basis(X, basis):
    """Q_L X Q_R^T; None stands for the identity."""
    return to_basis(X, [None if q is None else q.T for q in basis])


def power_iteration(C, Q):
    """One step from the basis Q towards the eigenvectors of C (d, d), and the order in which it took the old columns."""
    CQ = C @ Q
    order = (Q * CQ).sum(0).argsort(descending=True)        # diag(Q^T C Q) estimates the eigenvalues
    return torch.linalg.qr(CQ[:, order]).Q, order


class KFACOptimizer(Optimizer):
    """Natural gradient with Kronecker factors (Martens & Grosse 2015) and momentum, its step clipped in KL:

        L, R = running averages of E[delta delta^T], E[a a^T], labels sampled from the model    `observe`, each step
        n = [(L + gamma/pi) (x) (R + gamma pi)]^-1 g                       factored Tikhonov damping, gamma = sqrt(damping)
        n = n min(1, sqrt(kl_clip / sum of lr^2 n^T g over the groups))    Ba et al. 2017 (arXiv 1708.05144)
        M = momentum M + n;   W = W - lr wd W - lr M

    The factors are the preconditioner's own code (gauss_newton.KFAC). Call `observe(inputs, targets)` before each step.
    Differs from the 2015 paper in: 1. damping is fixed, not adapted. 2. momentum is fixed, not solved for by the quadratic.
    3. factors come from the first `curvature_frac` of each batch's rows, eigenbases anew every precondition_frequency steps."""

    def __init__(self, model, params, lr=3e-2, momentum=0.9, damping=1e-3, kl_clip=1e-2, stat_decay=0.95, precondition_frequency=10,
                 curvature_frac=0.25, seed=0):
        from gauss_newton import KFAC                       # here, since gauss_newton itself imports this file
        self.kfac, self.gamma, self.kl_clip, self.stat_decay = KFAC(model), damping ** 0.5, kl_clip, stat_decay
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=0.0))
        self.frequency, self.curvature_frac, self.steps = precondition_frequency, curvature_frac, 0
        self.generator = torch.Generator(device=self.kfac.params[0].device).manual_seed(seed)

    def check(self, params):
        everything = self.kfac.params + params
        check_dtypes("K-FAC", everything)
        if len({p.dtype for p in everything}) > 1:
            raise ValueError("K-FAC needs all parameters in one dtype, and they are in float32 and float64")
        if not set(params) <= {p for p in self.kfac.model.parameters() if p.requires_grad}:
            raise ValueError("K-FAC trains parameters of its model that require a gradient, and no others")

    def add_param_group(self, group):
        super().add_param_group(group)
        known = set(self.kfac.params)
        self.kfac.add([p for p in self.param_groups[-1]["params"] if p not in known])

    def observe(self, inputs, targets, micro_batch=None):
        """Factors from a share of the batch; returns the work in gradients of the whole batch."""
        kfac, rows = self.kfac, math.ceil(self.curvature_frac * len(inputs))
        decay = min(1 - 1 / (self.steps + 1), self.stat_decay)          # as the paper starts its average
        joined = len(kfac.factors) < len(kfac.params)                   # some parameters are new
        with full_precision(kfac.params[0].device.type, kfac.model):
            kfac.update(inputs[:rows], targets[:rows], micro_batch, self.generator, decay)
            if self.steps % self.frequency == 0 or joined:
                kfac.decompose()
        return 2 / 3 * rows / len(inputs)

    def move(self):
        params = self.kfac.params
        if len(self.kfac.factors) < len(params):
            raise RuntimeError("call observe(inputs, targets) before the step: K-FAC has no factors for it")
        g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in params])
        n = self.kfac.apply(g, lambda S: 1 / S, spectra=self.kfac.tikhonov(self.gamma))
        natural = dict(zip(params, n.split([p.numel() for p in params])))
        moved = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        kl = float(sum(group["lr"] ** 2 * natural[p].dot(p.grad.reshape(-1)) for group, p in moved))
        n *= min(1.0, math.sqrt(self.kl_clip / max(kl, 1e-30)))         # natural holds views of it
        for group, p in moved:
            M = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            M.mul_(group["momentum"]).add_(natural[p].view_as(p))
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(M, alpha=group["lr"])
        self.steps += 1

    def state_dict(self):
        return {**super().state_dict(), "kfac": self.kfac.state_dict(), "steps": self.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        super().load_state_dict({k: state[k] for k in ("state", "param_groups")})
        self.kfac.load_state_dict(state["kfac"])
        self.steps = state["steps"]
        self.generator.set_state(state["generator"].cpu())


def lr_schedule(step, total_steps, schedule="constant", warmup_steps=0, decay_frac=0.2, min_ratio=0.0):
    """The factor in [0, 1] for the base rate at `step`, which counts from 0.

    Warmup is linear, (step + 1) / warmup_steps, so that no step is lost. Then "constant" stays at 1; "cosine" falls to
    min_ratio at step == total_steps (Loshchilov & Hutter 2017); "wsd", warmup-stable-decay (arXiv 2404.06395), holds 1
    and falls linearly to min_ratio over the last decay_frac of total_steps."""
    if schedule not in ("constant", "cosine", "wsd"):
        raise ValueError(f"unknown schedule {schedule!r}; choose from constant, cosine, wsd")
    if step < 0 or total_steps < 1 or warmup_steps < 0:
        raise ValueError(f"need step >= 0, total_steps >= 1, warmup_steps >= 0, got {step}, {total_steps}, {warmup_steps}")
    if not 0 <= decay_frac <= 1 or not 0 <= min_ratio <= 1:
        raise ValueError(f"decay_frac ({decay_frac}) and min_ratio ({min_ratio}) must lie in [0, 1]")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    left = max(0, total_steps - step) / max(1.0, decay_frac * total_steps)
    return min_ratio + (1 - min_ratio) * min(1.0, left)
