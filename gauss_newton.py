"""Full Gauss-Newton for language models, Hessian-free: the matrix is used through products alone, and never
formed.

One outer step at parameters θ (arXiv 2510.09378; Martens 2010, "Deep learning via Hessian-free
optimization"):

    1. linearise   z(θ + d) ≈ z + J d, the logits; with it the loss becomes a local model m(d), convex:
                   prox-linear   m(d) = L(z + J d)                     the loss itself (the default)
                   GN            m(d) = L + gᵀd + ½ dᵀG d              to second order in the logits
                   g = Jᵀ ∂L/∂z,   G = Jᵀ H J,   H = ∂²L/∂z² = (diag(p) − ppᵀ) / N
    2. solve       d ≈ argmin m(d), by a solver: ConjugateGradients, or the paper's InnerSolver
    3. search      f(θ + αd) over α; α = 0 when nothing is better
    4. update      θ ← θ + αd; the solver adapts to α, and CG's damping to ρ, actual over predicted decrease

Any nn.Module will do whose forward(inputs) gives logits (..., classes):

    opt = GaussNewton(model)
    for inputs, targets in batches:          # large batches: this is a method for few, good steps
        record = opt.step(inputs, targets)
        print(record["loss"], record["rho"], record["reason"])
"""

import math
import warnings
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.autograd.graph import get_gradient_edge
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from baselines import (
    IGNORED,
    KFAC,
    assign,
    batch_grad,
    batch_loss,
    check_logits,
    check_targets,
    cosine,
    counted_rows,
    cross_entropy_grad,
    cross_entropy_sum,
    evaluate,
    flatten,
    free_memory,
    full_precision,
    graph_of,
    logits,
    make_optimizer,
    per_token,
    pieces,
    reduce,
    reduce_number,
    share,
    trainable,
    unflatten,
)
from model import differentiable_attention

SEARCH_FRAC = 1 / 16  # share of a batch that the line search is on


class Solution(NamedTuple):
    """What a solver found for a batch."""

    loss: float  # of the batch at θ
    direction: torch.Tensor  # d (P,)
    slope: float  # gᵀd
    decrease: float  # m(0) − m(d), which the local model promises
    trouble: str  # why d is not to be used, or ""
    record: dict  # for the log; "work" in gradients of the batch


class GaussNewton:
    """Gauss-Newton steps for any nn.Module whose forward(inputs) gives logits (..., classes).

    solver         what minimises the local model; None: ConjugateGradients(model, **settings)
    parts          partition of the parameters as a list of lists of them (layerwise: curvature across parts
                   is dropped, each part has a local model of its own); None: one part, full Gauss-Newton
    line_search    one of LINE_SEARCHES, on the last rows of the batch, a share SEARCH_FRAC of them, unless
                   step() is given others (in a large batch no Newton step has any of them)
    micro_batch    rows worked on at a time; None: all at once
    progress       called as progress(what) or progress("cg", done, total) inside long steps
    """

    def __init__(
        self,
        model,
        solver=None,
        parts=None,
        line_search="armijo",
        micro_batch=None,
        progress=None,
        **settings,
    ):
        check_choice("line_search", line_search, LINE_SEARCHES)
        if solver and settings:
            raise TypeError(f"{', '.join(settings)}: the settings of a solver that is given are its own")
        self.model = model
        self.solver = solver or ConjugateGradients(model, micro_batch=micro_batch, **settings)
        self.params = self.solver.params
        self.parts = self._indices(parts or [self.params])
        self.line_search = line_search
        self.micro_batch = micro_batch
        self.progress = self.solver.progress = progress or no_progress
        self.rejections = 0  # in a row

    @torch.inference_mode(False)
    def step(self, inputs, targets, search=None):
        """One outer step on a batch, inputs (B, ...) and int64 classes (B, ...); returns its record, a flat
        dict.

        search    (inputs, targets) of other data for the line search; default: the batch's last rows.
        Rows must be in random order: some stand for all, in the search, in Newton steps and for K-FAC.
        A loss, gradient or product that is not finite, an indefinite product, or a search without a decrease
        rejects the step: parameters stay bitwise as they were, and record["reason"] says why ("" when all
        went well). Inside torch.autocast the model's forward alone has its dtype, the solver keeps float32.
        """
        self._check_parameters()
        batch = inputs, targets, *(search or ())  # tensors of inference mode have no derivatives, copies do
        inputs, targets, *search = (t.clone() if t.is_inference() else t for t in batch)
        targets, n_targets = check_targets(inputs, targets)
        inputs, targets = counted_rows(inputs, targets)
        theta = [p.detach().clone() for p in self.params]
        rows = subset_rows(len(inputs), n_targets, SEARCH_FRAC)
        x, y = search or (inputs[-rows:], targets[-rows:])
        accepted = False

        def move(alpha):
            d = unflatten(found.direction, self.params)
            assign(self.params, [t + alpha * v for t, v in zip(theta, d)])

        def loss_at(alpha):
            self.progress("line search")
            record["work"] += y.numel() / targets.numel() / 3
            move(alpha)
            return batch_loss(self.model, x, y, self.micro_batch)

        try:
            with full_precision(self.model):
                found = self.solver.solve(self.parts, inputs, targets)
                refuse_writing(self.model, theta)
                record = {"alpha": 0.0, "rho": None, **found.record}
                record.update(loss=found.loss, reason=found.trouble)
                if not found.trouble:
                    record.update(self._search(found, loss_at))
            if not record["reason"]:
                move(record["alpha"])
                accepted = True
        finally:
            if not accepted:  # rejected or interrupted: θ is as it was
                assign(self.params, theta)
                self.solver.forget()
        self.solver.adapt(record["rho"], record["alpha"])
        self.rejections = 0 if accepted else self.rejections + 1
        return {**record, "accepted": accepted}

    def _search(self, found, loss_at):
        """What the record holds of a search along d: "reason", "" where it found an α to take."""
        slope = found.slope
        if not slope < 0:
            return {"reason": f"no descent direction (slope {slope:.1e})"}
        loss0 = loss_at(0.0)
        alpha, loss, tries, reason = line_search(loss_at, loss0, slope, self.line_search)
        if alpha == 0:
            return {"reason": f"line search: {reason}"}
        change = loss - loss0
        # The model along d, a parabola with its slope at 0 and its value at 1; exact for GN by CG.
        predicted = alpha * slope + alpha**2 * (-found.decrease - slope)
        if self.line_search != "none" and change > 1e-4 * predicted:
            # the rounding of a huge loss can look like a small decrease
            return {"reason": f"the loss fell by {-change:.1e} where the model promised {-predicted:.1e}"}
        return {
            "reason": "",
            "alpha": alpha,
            "search_tries": tries,
            "predicted": predicted,
            "actual": change,
            "rho": change / predicted if predicted < 0 else 0.0,
        }

    def _indices(self, parts):
        index = {p: i for i, p in enumerate(self.params)}
        parts = [[index.get(p, -1) for p in part] for part in parts]
        if sorted(sum(parts, [])) != list(range(len(self.params))) or [] in parts:
            raise ValueError(
                "parts, none empty, must hold every parameter that the solver moves exactly once"
            )
        return parts

    def _check_parameters(self):
        if any(p.is_inference() for p in self.params):
            raise ValueError("no step can change a model that was made inside torch.inference_mode")
        if list(map(id, self.params)) != list(map(id, trainable(self.model))):
            raise ValueError(
                f"this {type(self.solver).__name__} was made for other trainable parameters than the model "
                "has (frozen or unfrozen since, or another model?): make a new one, and a new GaussNewton"
            )

    def state_dict(self):
        """Everything that the next step depends on beside the parameters, in tensors and plain types."""
        return {"solver": self.solver.state_dict(), "rejections": self.rejections}

    def load_state_dict(self, state):
        self.solver.load_state_dict(state["solver"])
        self.rejections = state["rejections"]


def subset_rows(rows, n_targets, frac, least=32):
    """How many of a batch's rows stand for all of them: the share `frac`, but enough to hold `least` of the
    n_targets targets that count, if each row holds as many."""
    enough = math.ceil(least * rows / n_targets)
    return min(rows, max(enough, int(frac * rows)))


def no_progress(what, done=0, total=0):
    pass


# ------------------------------------------------------------------------------------------------------------
# Solvers


@dataclass
class Newton:
    """Where Newton's method stands that minimises one part's local model."""

    part: list  # indices of its parameters
    d: torch.Tensor
    damping: float  # λ
    delta: torch.Tensor = None  # δ, the last Newton step: judged, then taken, by the next one
    decrease: float = 0.0  # m(0) − m(d + δ)


@dataclass(eq=False)
class ConjugateGradients:
    """Hessian-free optimization: minimise the local model m over each part's d, the other parts at rest.

    Martens (2010) linearises a batch, and solves one damped system by conjugate gradients. Here d is the sum
    of several such solutions, Newton steps δ. Each is made on rows of its own, linearised for it alone. In
    Newton step k, with the local model m_k, the slope g_k and the loss L of its rows, and g the slope of the
    whole batch:

        judge      t ← argmin m_k(d + tδ) over LENGTHS            the last δ, by rows that did not make it
                   d ← d + tδ
                   λ ← LOWER λ where t = 1, else λ / t, at most 4 λ
        solve      δ ← −(∇²m_k(d) + λM)⁻¹ ∇m_k(d)                 by preconditioned conjugate gradients

        m_k(d) = L(z + J d) − L(z) + (g − g_k)ᵀd   (prox-linear)
                 gᵀd + ½ dᵀG d                     (GN)

    The correction g − g_k, a control variate, gives the model of few rows the slope of all. The first Newton
    step has no δ to judge, and starts from d = MOMENTUM times the last outer step. The last δ is added whole:
    the line search judges it along with d, and changes λ once more (levenberg_marquardt).

    K is K-FAC's matrix, from the batch's own labels, and K + λM the preconditioner. M = s^(1 − POWER) K^POWER
    holds directions of large curvature back, since along them the linearisation fails first, and gives λ no
    unit; s is the geometric mean of K's mean eigenvalue and the weight's own. (`metric` adds floors, so that
    M is not singular.)
    """

    LENGTHS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    LOWER = 0.5
    POWER = 0.25
    MOMENTUM = 0.5
    KFAC_TARGETS = 16384

    model: nn.Module
    local_model: str = "prox_linear"  # the loss itself on the linearised network; "gn": to second order in z
    newton_steps: int = 8  # in an outer step; fewer on a batch that has no 32 targets for each
    cg_iters: int = 4  # conjugate-gradient iterations of each, at most
    damping: float = 3.0  # λ at the start; with K-FAC it has no unit
    precond: str = "kfac"  # K preconditions, with M as above; "none": nothing does, and M = I
    curvature_frac: float = 0.25  # share of the batch's rows that the Newton steps divide among them
    micro_batch: int = None  # rows worked on at a time; None: those of a Newton step

    def __post_init__(self):
        check_choice("local_model", self.local_model, ("gn", "prox_linear"))
        check_choice("precond", self.precond, ("kfac", "none"))
        if not 0 < self.curvature_frac <= 1:
            raise ValueError(f"curvature_frac must be in (0, 1], got {self.curvature_frac}")
        check_positive(self, "damping", "cg_iters", "newton_steps")
        self.params = trainable(self.model)
        self.kfac = KFAC(self.model, batch_labels=True) if self.precond == "kfac" else None
        self.prox_linear = self.local_model == "prox_linear"
        self.keep_rows = None  # found in the first step, since torch keeps the memory that it frees
        self.progress = no_progress
        self.mean_eigenvalue = 1.0  # mean eigenvalue of K
        self.direction = None  # of the last outer step, at the length that was taken

    def solve(self, parts, inputs, targets):
        check_model(self.model, inputs, targets, twice=True)
        n_targets = (targets != IGNORED).sum().item()
        self.progress("gradient")
        loss, grad = batch_grad(self.model, inputs, targets, self.micro_batch)
        record = {"work": 1.0, "grad_norm": grad.norm().item(), "products": 0}
        if not (math.isfinite(loss) and math.isfinite(record["grad_norm"])):
            return Solution(loss, torch.zeros_like(grad), 0.0, 0.0, "loss or gradient not finite", record)
        if self.kfac:
            self._precondition(inputs, targets, n_targets, torch.ones_like(grad), record)
        if self.direction is None:
            self.direction = torch.zeros_like(grad)
        states = [
            Newton(part, self.MOMENTUM * select(self.direction, self.params, part), self.damping)
            for part in parts
        ]
        solves = []  # (iterations, reason) of each Newton step of each part
        rows = subset_rows(len(inputs), n_targets, self.curvature_frac / self.newton_steps)
        steps = min(self.newton_steps, len(inputs) // rows)
        if self.keep_rows is None:
            self.keep_rows = self._rows_that_fit(inputs, targets, rows)
        products = len(parts) * self.cg_iters  # of a Newton step, at most
        for k, (x, y) in enumerate(pieces(inputs[: rows * steps], targets[: rows * steps], rows)):
            self.progress("linearise", k, steps)
            ggn = GGN(self.model, x, y, self.micro_batch, self.keep_rows)
            for s in states:
                solves.append(self._newton_step(s, grad, ggn, k * products, steps * products))
            record["products"] += ggn.products
            record["work"] += ggn.work * rows / len(inputs)
            del ggn  # before the next one is made: the memory is one Newton step's
        d = self.direction = torch.zeros_like(grad)  # of all parts together
        views = unflatten(d, self.params)
        for s in states:
            own = [views[i] for i in s.part]
            assign(own, unflatten(s.d + s.delta, own))
        self.damping = geometric_mean(s.damping for s in states)
        iterations, reasons = zip(*solves)
        bad = sorted({"nonfinite", "indefinite"}.intersection(reasons))
        slope = grad.dot(d).item()
        record.update(
            damping=self.damping,
            cosine=-slope / (record["grad_norm"] * d.norm().item() + 1e-30),
            cg_iterations=sum(iterations),
            cg_reason="+".join(bad or sorted(set(reasons))),
        )
        trouble = f"no descent direction ({bad[0]})" if bad else ""
        return Solution(loss, d, slope, sum(s.decrease for s in states), trouble, record)

    def _rows_that_fit(self, inputs, targets, rows):
        """How many rows' graphs three eighths of the free memory hold; with a piece of an eighth it is half.
        Raises MemoryError where all of it does not hold a piece."""
        free = free_memory(inputs.device)
        each = row_bytes(self.model, inputs, targets)
        needed = each * min(self.micro_batch or rows, rows)
        if needed > free:
            raise MemoryError(
                f"a micro-batch takes {needed / 1e9:.1f} GB to linearise, and {free / 1e9:.1f} GB are free: "
                "--micro_batch must be smaller"
            )
        return int(3 / 8 * free / each)

    def _newton_step(self, s, grad, ggn, done, total):
        """One Newton step of a part on the slice in `ggn`, which judges the last step and makes the next.
        grad: of the whole batch. Returns how many iterations CG made, and its reason."""
        correction = select(grad - ggn.grad, self.params, s.part)
        if s.delta is not None:
            slope = correction.dot(s.delta).item()
            t = ggn.best_length(s.d, s.delta, self.LENGTHS, slope, s.part, self.prox_linear)
            s.d = s.d + t * s.delta
            s.damping = bounded(s.damping * (self.LOWER if t == 1 else 1 / max(t, 0.25)))
        change, gradient = ggn.move_to(s.d, s.part, self.prox_linear)

        def matvec(v):
            self.progress("cg", done + ggn.products, total)
            return ggn.matvec(v, s.part) + s.damping * self._damp(v, s.part)

        precond = self._preconditioner(s.damping, s.part)
        found = cg(matvec, -(gradient + correction), precond, self.cg_iters)
        s.delta = found.x
        # m(0) − m(d + δ): what m is at d, and what the system promises, its damping left out
        damped = 0.5 * s.damping * s.delta.dot(self._damp(s.delta, s.part)).item()
        s.decrease = damped - found.values[-1] - change - correction.dot(s.d).item()
        return found.iterations, found.reason

    def _precondition(self, inputs, targets, n_targets, ones, record):
        """K-FAC factors from as many rows as a Newton step has, but KFAC_TARGETS targets at least."""
        self.progress("kfac")
        rows = subset_rows(len(inputs), n_targets, self.curvature_frac / self.newton_steps, self.KFAC_TARGETS)
        signs = torch.Generator(device=inputs.device).manual_seed(0)
        self.kfac.update(inputs[:rows], targets[:rows], self.micro_batch, signs)
        self.kfac.decompose()
        self.mean_eigenvalue = self.kfac.apply(ones, lambda S: S.mean().expand_as(S)).mean().item() + 1e-30
        record["repaired"] = self.kfac.repaired or None
        record["work"] += 2 / 3 * rows / len(inputs)  # a forward, and a backward for the activations alone

    def metric(self, S):
        """K-FAC's eigenvalues -> those of M; kept away from 0 where S is: tokens never seen."""
        s = (self.mean_eigenvalue * (S.mean() + 1e-6 * self.mean_eigenvalue)).sqrt()
        return s ** (1 - self.POWER) * (S + 0.01 * s) ** self.POWER

    def _damp(self, v, part):
        """M v."""
        return self.kfac.apply(v, self.metric, part) if self.kfac else v

    def _preconditioner(self, damping, part):
        if self.kfac:
            return lambda v: self.kfac.apply(v, lambda S: 1 / (S + damping * self.metric(S)), part)

    def adapt(self, rho, alpha):
        """After a step; alpha 0: it was rejected."""
        self.damping = levenberg_marquardt(self.damping, rho, alpha)
        if alpha:
            self.direction = alpha * self.direction

    def forget(self):
        """After a step that was not taken: the next one does not start from it."""
        self.direction = None

    def state_dict(self):
        return {"damping": self.damping, "direction": self.direction}

    def load_state_dict(self, state):
        self.damping = state["damping"]
        self.direction = state["direction"]
        if self.direction is not None:
            self.direction = self.direction.to(self.params[0].device)


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def check_positive(settings, *names):
    for name in names:
        value = getattr(settings, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


@dataclass(eq=False)
class InnerSolver:
    """Minimise the local model by an optimizer that streams over the batch, one inner step per micro-batch
    (paper, Algorithm 1; there in one pass).

        v ← (1 − α) v           what the last outer step left;  0 at first, and after a rejected one
        per micro-batch, with its own J, u = ∂L/∂z and H:
        GN            ∇ = Jᵀ(u + H J v)
        prox-linear   ∇ = Jᵀ ∂L/∂z(z + J v)
        v ← (1 − η λ) v         the optimizer's weight decay, of matrices only;  η: its rate
        v ← optimizer(v, ∇)     ∇ clipped in norm for each part

    λ, a damping, keeps v near 0 where micro-batches do not agree and its entries below some 1 / λ where they
    do. (adam and sgd have no such decay: λ v is added to ∇.)

    J v is a difference of logits (see local_model_once). So the model's backward must be the derivative of
    its forward: no straight-through estimators, no stopped gradients, no jumps. (A top-k router's jumps make
    J v huge for the tokens that change experts.)

    Slope gᵀv and decrease m(0) − m(v) are means over the last sixteenth of the batch in the last pass, each
    at the v that its micro-batch began with: on data that v has been fitted to in the passes before, if any.
    """

    CLIP = 1.0  # the paper's

    model: nn.Module
    name: str = "soap"  # of an optimizer for baselines.make_optimizer
    rows: int = 32  # sequences in a micro-batch: a batch of B rows gives B / rows inner steps in a pass
    passes: int = 2  # over the batch in an outer step; at least two where it is a single micro-batch
    lr: float = 8e-3  # the optimizer's
    betas: tuple = (0.8, 0.99)  # the optimizer's (of Muon its AdamW's): short memories, unlike a baseline's
    muon_scale: str = None  # see make_optimizer
    damping: float = 0.0  # λ
    local_model: str = "prox_linear"  # or "gn"
    schedule: str = "constant_with_inner_cosine"  # of lr, with the next two: see inner_schedule
    warmup: int = 0
    outer_steps: int = 100
    reset: bool = False  # start every outer step at v = 0, and the moments at 0
    compile: bool = False  # what is done per micro-batch; eager, with a warning, where that fails

    def __post_init__(self):
        if self.name == "kfac":
            raise ValueError("kfac cannot be an inner solver: it has to observe each batch")
        check_choice("local_model", self.local_model, ("gn", "prox_linear"))
        check_choice("schedule", self.schedule, SCHEDULES)
        check_positive(self, "rows", "passes", "lr", "outer_steps")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must not be negative, and finite, got {self.damping}")
        self.params = trainable(self.model)
        self.prox_linear = self.local_model == "prox_linear"
        self.programs = {}
        self.progress = no_progress
        self.outer = 0
        self.forget()

    def solve(self, parts, inputs, targets):
        check_model(self.model, inputs, targets, twice=False)
        self.eps = working_eps(self.model, inputs, targets)
        batches = pieces(inputs, targets, self.rows)
        passes = max(self.passes, 3 - len(batches))  # the first inner step, where v is 0, has no slope
        counts = [(y != IGNORED).sum().item() for _, y in batches] * passes
        late = len(counts) - math.ceil(len(batches) / 16)
        batches *= passes
        if self.reset:
            self.forget()
        n_targets = sum(counts)
        n_late = sum(counts[late:])
        loss = 0.0
        change = 0.0
        slope = 0.0
        for k, (x, y) in enumerate(batches):
            self.progress("inner", k, len(batches))
            L, m, gv, *gradient = self._local_model(x, y, parts)
            loss += L * (counts[k] / n_targets)
            if k >= late:
                change += m * (counts[k] / n_late)
                slope += gv * (counts[k] / n_late)
            self._inner_step(parts, gradient, k, len(batches))
        self.outer += 1
        loss, change, slope = map(float, (loss, change, slope))
        trouble = "" if math.isfinite(loss + change + slope) else "loss or local model not finite"
        # A forward, a J v for each part, and their backward passes: by local_model_once
        work = (1 + len(parts)) / 3 + sum(backward_work(self.params, part) for part in parts)
        record = {"work": passes * work, "inner_steps": len(batches)}
        return Solution(loss, flatten(self.v).detach(), slope, -change, trouble, record)

    def _inner_step(self, parts, gradient, k, steps):
        """v ← optimizer(v, ∇) by the k-th micro-batch's gradient, clipped for each part."""
        for part in parts:
            norm = flatten([gradient[i] for i in part]).norm()
            clip = (self.CLIP / (norm + 1e-12)).clamp(max=1.0)
            for i in part:
                self.v[i].grad = clip * gradient[i]
        factor = inner_schedule(self.schedule, self.outer, self.outer_steps, k, steps, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.step()

    def _local_model(self, x, y, parts):
        """local_model_once for a micro-batch, all processes' rows of it."""
        n_targets = (y != IGNORED).sum()
        x, y = share(x, y)
        theta = [p.detach() for p in self.params]
        v = [t.detach() for t in self.v]
        function = partial(local_model_once, self.model, parts, self.prox_linear, self.eps)
        modes = tuple(m.training for m in self.model.modules())
        key = x.shape, self.eps, str(parts), modes
        if self.compile and key not in self.programs:
            anywhere = [p.clone() for p in theta]  # v may be 0, where J v would tell nothing
            tolerance = self.eps**0.25  # two differences of logits are some √eps apart
            self.programs[key] = compiled_or_eager(function, tolerance, theta, x, y, anywhere, n_targets)
        return reduce(*self.programs.get(key, function)(theta, x, y, v, n_targets))

    def adapt(self, rho, alpha):
        """After a step by αv: what is left of v."""
        assign(self.v, [(1 - alpha) * v for v in self.v])

    @torch.inference_mode(False)
    def forget(self):
        """The next solve starts at v = 0, and the moments at 0."""
        self.v = [nn.Parameter(torch.zeros_like(p)) for p in self.params]
        with swapped_parameters(self.model, self.v):
            self.optimizer = make_optimizer(
                self.name, self.model, self.lr, self.damping, self.betas, muon_scale=self.muon_scale
            )

    def state_dict(self):
        return {
            "v": [v.detach() for v in self.v],
            "optimizer": self.optimizer.state_dict(),
            "damping": self.damping,  # which that has too
            "outer": self.outer,
        }

    def load_state_dict(self, state):
        assign(self.v, state["v"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.damping = state["damping"]
        self.outer = state["outer"]


SCHEDULES = ("constant_with_inner_cosine", "cosine_with_global_schedule", "global_cosine")


def inner_schedule(kind, outer, outer_steps, k, steps, warmup=0):
    """Factor of the inner rate in inner step k, one of `steps`, in outer step `outer` (counted from 0).

    global_cosine                  one cosine over all inner steps of all outer steps
    cosine_with_global_schedule    a cosine inside each outer step, whose peaks follow a cosine over the outer
                                   steps
    constant_with_inner_cosine     a cosine inside each outer step, constant peaks
    The first `warmup` inner steps of the run are scaled by (steps done + 1) / warmup.
    """
    done = outer * steps + k
    factor = {
        "global_cosine": cosine(done / (outer_steps * steps)),
        "cosine_with_global_schedule": cosine(outer / outer_steps) * cosine(k / steps),
        "constant_with_inner_cosine": cosine(k / steps),
    }[kind]
    return factor * (min(1.0, (done + 1) / warmup) if warmup else 1.0)


# ------------------------------------------------------------------------------------------------------------
# Conjugate gradients, step length, damping


class CGResult(NamedTuple):
    x: torch.Tensor
    iterations: int
    reason: str  # "residual", "max_iter", "zero" (b = 0), "indefinite" or "nonfinite"
    values: list  # ½xᵀAx − bᵀx at every iterate, the start included: iterations + 1 floats


def cg(matvec, b, precond=None, max_iter=50, rtol=0.0):
    """Solve A x = b, A symmetric positive definite and given by matvec(v) = A v; equivalently minimise ½xᵀAx
    − bᵀx.

    precond   v -> P⁻¹v, P ≈ A symmetric positive definite
    rtol      stop at ‖b − Ax‖ <= rtol ‖b‖; below machine epsilon: at that, which is all that the numbers
              resolve

    From x = 0. Trouble is a `reason`, not an exception: on "indefinite" (pᵀAp <= 0, or a preconditioner that
    is not positive) or "nonfinite" x is the last good iterate.
    """
    x = torch.zeros_like(b)
    r = b.clone()
    eps = torch.finfo(b.dtype).eps
    bnorm = b.norm()
    values = [0.0]
    if not bnorm.isfinite():
        return CGResult(x, 0, "nonfinite", values)
    if bnorm == 0:
        return CGResult(x, 0, "zero", values)
    p = torch.zeros_like(b)
    rz = 1.0
    for k in range(max_iter + 1):
        if r.norm() <= max(rtol, eps) * bnorm:
            return CGResult(x, k, "residual", values)
        if k == max_iter:
            return CGResult(x, k, "max_iter", values)
        z = r if precond is None else precond(r)
        rz, rz_old = r.dot(z), rz
        p.mul_(rz / rz_old).add_(z)
        del z  # five vectors: b, x, r, p, Ap
        Ap = matvec(p)
        pAp = p.dot(Ap)
        if not (pAp.isfinite() and rz.isfinite()):
            return CGResult(x, k, "nonfinite", values)
        if not (pAp > 0 and rz > 0):
            # A residual this small is mostly rounding, and so is the sign.
            return CGResult(x, k, "residual" if r.norm() <= eps**0.5 * bnorm else "indefinite", values)
        x.addcmul_(p, rz / pAp)
        r.addcmul_(Ap, rz / pAp, value=-1)
        values.append(-0.5 * (x.dot(b) + x.dot(r)).item())


LINE_SEARCHES = {"armijo": 10, "grid": 10, "grid5": 5, "none": 1}  # candidates, at most


class Search(NamedTuple):
    alpha: float  # 0.0: nothing was better
    loss: float  # at alpha
    tries: int  # losses evaluated
    reason: str  # "armijo", "grid", "none", "no decrease" or "nonfinite" (no candidate had a finite loss)


def line_search(loss_at, loss0, slope, kind="armijo"):
    """Choose α among 2^(−i/2), i = 0, 1, ..., or 0.

    loss_at   α -> loss;   loss0 = loss_at(0);   slope = gᵀd < 0
    armijo    the first α with loss <= loss0 + 0.01 α slope, then on while the loss still falls: a loss that
              is not quadratic often has a better α right behind the first acceptable one
    grid      the best of ten candidates (the paper's for 150M and layerwise; it has no α = 0, no rejection)
    grid5     the best of five (the paper's for 45M)
    none      α = 1 if its loss is finite
    A loss that is not finite counts as infinite.
    """
    check_choice("line_search", kind, LINE_SEARCHES)
    best = (0.0, loss0)
    finite = False
    for i in range(LINE_SEARCHES[kind]):
        alpha = 2 ** (-i / 2)
        loss = loss_at(alpha)
        finite |= math.isfinite(loss)
        lower = loss < best[1]
        if kind == "armijo" and best[0] > 0 and not lower:
            break
        wanted = {
            "armijo": lower and loss <= loss0 + 0.01 * alpha * slope,
            "none": math.isfinite(loss),
        }.get(kind, lower)  # grid and grid5
        if wanted:
            best = (alpha, loss)
    return Search(*best, i + 1, kind if best[0] else "no decrease" if finite else "nonfinite")


def bounded(damping):
    return min(max(damping, 1e-8), 1e8)


def levenberg_marquardt(damping, rho, alpha):
    """The next λ. ρ is the actual over the predicted decrease of the step that was taken: near 1 the model
    was right, and is trusted further. α is 1, 0.71, 0.5, ... or 0, which is a rejected step.

    λ / α       for α < 0.4, at most 16 λ: a step that was cut so short can have ρ near 1 while the model was
                far off at the length that it asked for
    2 λ         else for ρ < 1/4
    0.4 λ       for ρ > 3/4 and α = 1
    Martens (2010, section 4.1) has factors 3/2 and 2/3, made for hundreds of steps; here a run has tens.
    """
    if alpha < 0.4:
        damping /= max(alpha, 0.0625)
    elif not rho >= 0.25:
        damping *= 2
    elif rho > 0.75 and alpha > 0.9:
        damping *= 0.4
    return bounded(damping)


# ------------------------------------------------------------------------------------------------------------
# The linearised batch


class GGN:
    """One batch linearised at the model's current parameters: `loss`, `grad`, and `matvec(v)` = JᵀHJ v, where
    H is the loss's Hessian at the logits, or at those that `move_to` has moved it to.

    inputs, targets   (B, ...), as the model takes them, and int64 classes (B, ...); logits are (B, ..., V)
    micro_batch    rows worked on at a time; None: all at once. The result does not depend on it
    keep_rows      of so many rows (None: of all) pieces keep their graphs, so that a product repeats no
                   forward; the others are linearised anew at each product, in memory that does not grow with
                   the batch

    loss           mean cross-entropy in nats per token, a float; targets of -100 are left out
    grad           its gradient (P,), parameters flattened in the order of model.parameters(), tied ones once
    products, work   products made, and all work so far in gradients of this batch, by matrix multiplications:
                     a gradient has 3 per weight, a product 4, with a block alone 4 for its own weights and 2
                     for those behind it

    With several processes inputs and targets are the whole batch on each; each works on its share, and sums
    are reduced. The parameters must not change while the object is in use. Raises ValueError for a model or
    batch that it cannot work with. Double backward (`create_graph`) instead of torch.func: the graph of the
    gradient is the graph of J's transpose, and it is reused by every product: 1.3 gradients each, where jvp +
    vjp take 2.3.
    """

    def __init__(self, model, inputs, targets, micro_batch=None, keep_rows=None):
        targets, self.n_targets = check_targets(inputs, targets)
        self.model = model
        self.params = trainable(model)
        self.data = pieces(*share(inputs, targets), micro_batch)
        self.cache = []
        self.offset = None  # (d, part): where H is, if not at z
        self.shifts = []  # J d of the kept pieces, where it is known already
        self.products = 0
        self.work = 0.0
        self.loss = 0.0
        self.grad = 0.0
        check_model(model, *self.data[0], twice=True)
        rows = 0
        for piece in self._pieces():
            self.loss += cross_entropy_sum(piece.z0, piece.y).item() / self.n_targets
            self.grad += flatten(piece.g).detach()
            piece.g = [get_gradient_edge(t) for t in piece.g]  # products need the graph, not the values
            rows += len(piece.y)
            if keep_rows is None or rows <= keep_rows:
                self.cache.append(piece)
        self.loss, self.grad = reduce_number(self.loss), reduce(self.grad)[0]

    def matvec(self, v, part=None):
        """G v = JᵀHJ v, (P,) -> (P,). With `part`, a list of parameter indices, v and the result hold those
        parameters alone: the product with G's diagonal block (layerwise Gauss-Newton)."""
        part = part or range(len(self.params))
        out = 0.0
        for piece in self._pieces(self.offset):
            HJv = cross_entropy_hvp(piece.probs, piece.jvp(v, part), piece.divisor)
            out += piece.vjp(HJv, part)
        self.products += 1
        self.work += 2 * backward_work(self.params, part)
        return reduce(out)[0]

    def best_length(self, d, delta, lengths, extra_slope, part, prox_linear):
        """The t of `lengths` with the least m(d + tδ) + t extra_slope, m the local model (see local_change);
        d and δ move the parameters in `part` alone."""
        self.work += 2 * backward_work(self.params, part)  # J d and J δ
        totals = [0.0] * len(lengths)  # of m
        along = []  # of the pieces that are kept
        for piece in self._pieces():
            Jd = piece.jvp(d, part)
            Jdelta = piece.jvp(delta, part)
            for j, t in enumerate(lengths):
                s = Jd + t * Jdelta
                totals[j] += local_change(piece.z0, s, piece.y, self.n_targets, prox_linear, False)[0]
            if len(along) < len(self.cache):
                along.append((Jd, Jdelta))
        _, t = min((reduce_number(m.item()) + t * extra_slope, t) for m, t in zip(totals, lengths))
        self.shifts = [Jd + t * Jdelta for Jd, Jdelta in along]
        return t

    def move_to(self, d, part, prox_linear):
        """(m(d) − m(0), ∇m(d)), the gradient by the parameters in `part`, which alone d moves; after
        best_length d is the one that was best. From now on matvec's H is the one at z + J d, for GN at z; J
        stays."""
        known = len(self.shifts) / len(self.data)
        self.work += (2 - known) * backward_work(self.params, part)
        change = 0.0
        gradient = 0.0
        for piece in self._pieces():
            s = self.shifts.pop(0) if self.shifts else piece.jvp(d, part)
            m, w = local_change(piece.z0, s, piece.y, self.n_targets, prox_linear)
            piece.set_hessian_at(s if prox_linear else 0.0)
            change += m.item()
            gradient += piece.vjp(w, part)
        self.offset = (d, part) if prox_linear else None
        return reduce_number(change), reduce(gradient)[0]

    def _pieces(self, offset=None):
        """The linearised pieces: first those that were kept, then the others, linearised one by one, and
        moved by the offset."""
        yield from self.cache
        for x, y in self.data[len(self.cache) :]:
            piece = Piece(self.model, self.params, x, y, self.n_targets)
            if offset:
                piece.set_hessian_at(piece.jvp(*offset))
            self.work += (5 / 3 if offset else 1) / len(self.data)
            yield piece


class Piece:
    """One piece of the batch, linearised: z (..., V), probs = softmax(z), and by double backward

    vjp   Jᵀw, an ordinary backward of z
    jvp   J v: the gradient g = Jᵀu with its graph is linear in u, so that differentiating gᵀv by u gives J v
    """

    def __init__(self, model, params, x, y, n_targets):
        self.params = params
        self.y = y
        self.divisor = per_token(y, n_targets)
        with differentiable_attention(), torch.enable_grad():
            self.z = logits(model, x, y)
            self.z0 = self.z.detach()
            self.probs = torch.softmax(self.z0, dim=-1)
            self.u = cross_entropy_grad(self.probs, y, self.divisor).requires_grad_()
            self.g = derivative(self.z, params, self.u, create_graph=True)

    def set_hessian_at(self, s):
        """H is the one at z + s from now on."""
        self.probs = torch.softmax(self.z0 + s, dim=-1)

    def jvp(self, v, part):
        v = unflatten(v, [self.params[i] for i in part])
        return derivative([self.g[i] for i in part], self.u, v)[0]

    def vjp(self, w, part):
        return flatten(derivative(self.z, [self.params[i] for i in part], w))


def row_bytes(model, x, y):
    """What it takes to keep one more row of a batch linearised."""
    one, two = (graph_bytes(model, x[:rows], y[:rows]) for rows in (1, 2))
    return max(two - one, 1)


def graph_bytes(model, x, y):
    """What the graphs of a linearised piece keep: every storage that they save, once, and three of logits."""
    storages = {}

    def count(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()  # t itself, a node's output, would keep that node alive for ever

    with suppress(RuntimeError), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        piece = Piece(model, trainable(model), x, y, 1.0)
        return sum(storages.values()) + 3 * piece.z.nbytes
    return 0  # torch.func's transforms, inside a model, refuse such hooks


@torch.no_grad()
def local_model_once(model, parts, prox_linear, eps, theta, x, y, v, n_targets):
    """The local model of a micro-batch that is used once, at v, each of the parts with the others at rest.
    theta, v: lists of tensors; sums over tokens are divided by n_targets; eps: see working_eps.

        forward        z, with its graph                        1/3 of a gradient by matrix multiplications
        difference     J v ≈ (z(θ + hv) − z(θ)) / h             1/3, for each part
        backward       ∇m(v), see local_change                  2/3, for one part

    4/3 in all for one part, where forward mode takes 5/3, GGN and its first product 7/3.

    Returns [L(θ), m(v) − L(θ), gᵀv = ⟨u, J v⟩, *∇m(v)].
    """
    leaves = [p.detach().requires_grad_() for p in theta]
    with torch.enable_grad(), swapped_parameters(model, leaves):
        z = logits(model, x)
    z0 = z.detach()
    change = 0.0
    slope = 0.0
    gradient = [None] * len(theta)
    for part in parts:
        Jv, _ = difference(model, x, z0, theta, v, part, eps)
        part_change, w = local_change(z0, Jv, y, n_targets, prox_linear)
        change = change + part_change
        slope = slope + cross_entropy_slope(z0, Jv, y, n_targets)
        found = derivative(z, [leaves[i] for i in part], w, retain_graph=part is not parts[-1])
        for i, g in zip(part, found):
            gradient[i] = g
    return [cross_entropy_sum(z0, y) / n_targets, change, slope, *gradient]


def difference(model, x, z0, theta, v, part, eps):
    """(J v ≈ (z(θ + hv) − z(θ)) / h, h) for the v of the parameters in `part`, with z0 = z(θ).

    It errs by h/2 times the second derivative along v, and by eps / h times z for rounding. They are alike
    where hv is √eps of θ, in the root of the sum over tensors of ‖hv‖² / (‖θ‖² + ‖v‖²); h is at most 1.
    """
    sizes = [(v[i].norm() ** 2, theta[i].norm() ** 2) for i in part]
    h = (eps / sum(a / (a + b + 1e-30) for a, b in sizes)).sqrt().clamp(max=1.0)
    there = list(theta)
    for i in part:
        there[i] = theta[i] + h * v[i]
    with swapped_parameters(model, there):
        z1 = evaluate(model, x)
    return torch.where(z1 == z0, 0.0, (z1 - z0) / h), h  # 0 between logits of −inf


def backward_work(params, part):
    """The work, in gradients, of a backward pass to the parameters in `part`: of a gradient's 3
    multiplications per weight it has 2 for their own, and 1 for those between them and the logits."""
    sizes = [p.numel() for p in params]
    own = sum(sizes[i] for i in part)
    behind = sum(sizes[max(part) + 1 :])
    return (2 * own + behind) / sum(sizes) / 3


def derivative(outputs, inputs, cotangents, retain_graph=True, create_graph=False):
    """torch.autograd.grad, where an input that plays no part has derivative 0."""
    return torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph, create_graph, materialize_grads=True
    )


def local_change(z, s, y, n_targets, prox_linear, differentiate=True):
    """The local model of the loss at logits z + s, (..., V): its change from z, and its derivative by s (or
    None); sums over tokens are divided by n_targets.

    prox-linear    L(z + s) − L(z)              ∂L/∂z at z + s
    GN             ⟨u, s⟩ + ½ ⟨s, H s⟩          u + H s,        u = ∂L/∂z and H = ∂²L/∂z² at z
    """
    divisor = per_token(y, n_targets)
    if prox_linear:
        change = (cross_entropy_sum(z + s, y) - cross_entropy_sum(z, y)) / n_targets
        if not differentiate:
            return change, None
        return change, cross_entropy_grad(torch.softmax(z + s, dim=-1), y, divisor)
    probs = torch.softmax(z, dim=-1)
    u = cross_entropy_grad(probs, y, divisor)
    Hs = cross_entropy_hvp(probs, s, divisor)
    return (s * (u + 0.5 * Hs)).sum(), u + Hs


def cross_entropy_slope(z, s, y, n_targets):
    """⟨∂L/∂z, s⟩ = Σ (⟨p, s⟩ − s_y) / n_targets over tokens. It makes no ∂L/∂z, which takes time with large
    vocabularies."""
    mean = torch.einsum("...v,...v->...", torch.softmax(z, dim=-1), s).unsqueeze(-1)
    own = s.gather(-1, y.clamp_min(0).unsqueeze(-1))
    return ((mean - own) / per_token(y, n_targets)).sum()


def cross_entropy_hvp(probs, t, divisor):
    """H t = p ∘ (t − ⟨p, t⟩) / divisor, the logit Hessian in closed form. Differentiating cross-entropy
    twice would hold about ten times the logits."""
    mean = torch.einsum("...v,...v->...", probs, t).unsqueeze(-1)
    return (t - mean).mul_(probs).div_(divisor)  # one tensor of the logits' size


def select(vector, like, part):
    """The elements of a vector over the tensors in `like` that belong to those with indices in `part`, as a
    vector."""
    tensors = unflatten(vector, like)
    return flatten([tensors[i] for i in part])


@contextmanager
def swapped_parameters(model, tensors):
    """While open, the model has other tensors in place of its trainable parameters; whatever happens, it gets
    back the very objects it had. (torch.func.functional_call leaves tensors behind where a module stands in
    several places.)
    """
    new = dict(zip(trainable(model), tensors))
    places = [(m._parameters, dict(m._parameters)) for m in model.modules()]
    try:
        for held, before in places:
            held.update((name, new.get(p, p)) for name, p in before.items())
        yield
    finally:
        for held, before in places:
            held.update(before)
        for m in model.modules():
            if isinstance(m, nn.RNNBase):  # keeps a second list of them
                m._init_flat_weights()


def working_eps(model, x, y):
    """Machine epsilon of the coarsest numbers that the model computes in, seen on its first row: float32's,
    or more by autocast, casts or TF32. Raises ValueError where its logits do not fit the targets."""
    dtypes = set()

    class Watch(TorchFunctionMode):
        # A mode of torch's dispatcher would see more, but torch runs neither compiled code nor higher-order
        # operators, such as flex_attention, inside one.
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.is_floating_point():
                dtypes.add(out.dtype)
            return out

    with Watch():
        z = evaluate(model, x[:1], y[:1])
    check_logits(z.expand(len(y), *z.shape[1:]), y)
    products = 2.0**-10
    with suppress(RuntimeError):  # where torch.backends has a setting of its own
        products = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    return max([torch.finfo(t).eps for t in dtypes] + [products] * (torch.float32 in dtypes))


CHECKED = weakref.WeakKeyDictionary()  # a model: how it has been checked, and in which modes


def check_model(model, x, y, twice):
    """Raises ValueError for a model that cannot be worked with, seen on the first rows of a batch. Made once
    for a model and its modes (train or eval); twice: see refuse_derivatives."""
    done = CHECKED.setdefault(model, set())
    modes = twice, *(m.training for m in model.modules())
    if modes not in done:
        refuse_randomness(model, x[:8], y[:8])
        refuse_derivatives(model, x[:2], y[:2], twice)
        done.add(modes)


def refuse_randomness(model, x, y):
    """A derivative of a function that changes between calls means nothing: raises ValueError for a model that
    gives the same rows other logits when it is called again, or whose batch norm makes them depend on other
    rows."""
    advice = "Gauss-Newton needs a deterministic model; call model.eval() or set its rates to 0"
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} ({type(m).__name__}) is active in training mode: {advice}"
            )
    theta = [p.detach().clone() for p in trainable(model)]
    first = evaluate(model, x, y)
    refuse_writing(model, theta)
    seen = torch.softmax(first, dim=-1) > 0  # not of classes that are masked by −1e9, say
    tolerance = working_eps(model, x, y) ** 0.5 * first.abs().where(seen, 0).max()
    for _ in range(9):  # rare events take some calls to be seen
        change = (evaluate(model, x, y) - first).abs()
        if (change.where(seen, 0) > tolerance).any():
            raise ValueError(f"the model gives the same inputs other logits every time (dropout?): {advice}")


def refuse_writing(model, theta):
    """Raises ValueError where the trainable parameters are no longer theta, which they get back."""
    params = trainable(model)
    for name, p, t in zip(trainable_names(model), params, theta):
        if ((p != t) & t.isfinite()).any():
            assign(params, theta)
            raise ValueError(
                f"the model's forward writes its parameter {name}, which the optimizer alone may: let the "
                "forward compute with a changed copy"
            )


def trainable_names(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def refuse_derivatives(model, x, y, twice):
    """Raises ValueError unless cᵀ(J v) = (Jᵀc)ᵀv for each parameter, where Jᵀ is the model's backward, c is
    H ∂L/∂z, and v is Jᵀc, or a wave that meets all entries. J v is

    twice        the derivative of that backward, as in GGN: refused are a model without one, and a hook that
                 is not linear
    not twice    a difference of logits, as in an InnerSolver: refused is a backward that is not the
                 derivative of the forward. J v errs by √eps, and by eps / h of z
    """
    needs, advice = DERIVATIVES[twice]
    params = trainable(model)
    theta = [p.detach() for p in params]
    where = ""
    try:
        if twice:
            piece = Piece(model, params, x, y, 1.0)
            z = piece.z
            eps = 0.0
        else:
            eps = working_eps(model, x, y)
            with torch.enable_grad():
                z = logits(model, x)
        z0 = z.detach()
        divisor = per_token(y, 1.0)
        probs = torch.softmax(z0, dim=-1)
        c = cross_entropy_hvp(probs, cross_entropy_grad(probs, y, divisor), divisor)
        rounding = 5 * eps * (c * z0).nan_to_num_(0).norm()
        gradient = derivative(z, params, c, retain_graph=twice)
        own = {t.name() for t in graph_of(z) if isinstance(t, torch.autograd.function.BackwardCFunction)}
        for i, (name, g) in enumerate(zip(trainable_names(model), gradient)):
            where = f" in the derivative by {name}, among {', '.join(sorted(own)) or 'operations'} and hooks"
            wave = torch.arange(g.numel()).to(g).cos().view_as(g)
            for v in (g, wave) if g.any() else ():
                if twice:
                    Jv, h = piece.jvp(v.flatten(), [i]), 1.0
                else:
                    Jv, h = difference(model, x, z0, theta, {i: v}, [i], eps)
                one = c * Jv
                other = g * v
                scale = other.sum().abs() + other.norm() + one.norm()
                allowed = max(0.1, 10 * eps**0.5) * scale + rounding / h
                if (one.sum() - other.sum()).abs() > allowed:
                    raise RuntimeError(
                        "a second derivative is missing, or the gradient is changed (by a straight-through "
                        "estimator, a stopped gradient, a hook or a jump),"
                    )
    except torch.OutOfMemoryError:  # says what it needs to
        raise
    except RuntimeError as e:
        if "nference" in str(e):
            advice = "make what the model keeps outside of torch.inference_mode"
        raise ValueError(f"{needs}: {first_line(e)}{where}; {advice}") from e


DERIVATIVES = {  # by `twice`: what is needed, and what to do without it
    True: (
        "GGN differentiates the model twice",
        "switch off what is in the way (activation checkpointing, compilation), or take an InnerSolver",
    ),
    False: (
        "an InnerSolver needs a gradient that is the derivative of the model's forward",
        "replace what is named, or take ConjugateGradients",
    ),
}


# ------------------------------------------------------------------------------------------------------------
# Compilation


def trace(function, *examples):
    """The function's operations on tensors, derivatives and all, as one torch.fx graph for the examples'
    shapes."""
    graph = make_fx(torch.func.functionalize(make_fx(function)(*examples)))(*examples)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def compiled_or_eager(function, tolerance, *examples):
    """The function compiled for the examples' shapes; itself, with a warning, where that fails or the results
    differ by more than the tolerance."""
    try:
        compiled = torch.no_grad()(torch.compile(trace(function, *examples), dynamic=False))
        for a, b in zip(function(*examples), compiled(*examples)):
            size = a.norm() if a.dim() else 1.0  # loss, decrease, slope: rounding of the loss, however small
            if not (a - b).norm() <= tolerance * (size + 1e-3):
                raise RuntimeError("the compiled result differs from the eager one")
        return compiled
    except Exception as e:
        warnings.warn(f"not compiled: {first_line(e)}")
        return function


def first_line(e):
    return (str(e).strip() or type(e).__name__).splitlines()[0]
