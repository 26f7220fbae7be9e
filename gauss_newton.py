"""Full Gauss-Newton for language models, Hessian-free: the matrix is never formed, only its products are.

One outer step at parameters θ (arXiv 2510.09378; Martens 2010, "Deep learning via Hessian-free
optimization"):

    1. linearise   z(θ + d) ≈ z + J d, the logits. With them the loss L(z) becomes a convex local model m(d):
                   prox-linear   m(d) = L(z + J d)                     the loss itself (the default)
                   GN            m(d) = L(z) + gᵀd + ½ dᵀG d           to second order in the logits
                   g = Jᵀ ∂L/∂z,   G = Jᵀ H J,   H = ∂²L/∂z² = (diag(p) − ppᵀ) / N,   p = softmax(z)
    2. solve       d ≈ argmin m(d), by a solver: ConjugateGradients, or the paper's InnerSolver
    3. search      the true loss at θ + αd, over α; α = 0 where none is lower
    4. update      θ ← θ + αd. Both solvers adapt to α; ConjugateGradients adapts its damping to ρ too, the
                   actual over the predicted decrease

The model is any nn.Module whose forward(inputs) gives logits (..., classes):

    opt = GaussNewton(model)
    for inputs, targets in batches:          # large batches: this is a method for few, good steps
        record = opt.step(inputs, targets)
        print(record["loss"], record["rho"], record["reason"])
"""

import math
import weakref
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import geometric_mean
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.autograd.graph import get_gradient_edge
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
    local_rows,
    logits,
    make_optimizer,
    per_token,
    pieces,
    sum_number,
    sum_over_processes,
    trainable,
    unflatten,
)
from model import differentiable_attention

SEARCH_FRAC = 1 / 16  # share of a batch's rows on which the line search takes the loss


class Solution(NamedTuple):
    """What a solver found for a batch."""

    loss: float  # of the batch at θ
    direction: torch.Tensor  # d (P,)
    slope: float  # gᵀd
    decrease: float  # m(0) − m(d), which the local model promises
    trouble: str  # why d must not be used, or ""
    record: dict  # for the log; "work" is in gradients of the batch


class GaussNewton:
    """Gauss-Newton steps for any nn.Module whose forward(inputs) gives logits (..., classes).

    solver         what minimises the local model; None: ConjugateGradients(model, **settings)
    parts          partition of the parameters, a list of lists of them. Each part has a local model of its
                   own (layerwise), without the curvature across parts; None: one part, full Gauss-Newton
    line_search    one of LINE_SEARCHES; it takes the loss of the batch's last rows, unless step() is given
                   other data (in a large batch no Newton step has any of these rows)
    micro_batch    rows worked on at a time; None: all at once. A solver that is given has its own
    progress       called inside long steps, as progress(what) or progress(what, done, total)
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

    def step(self, inputs, targets, search=None):
        """One outer step on a batch: inputs (B, ...) and int64 classes (B, ...). Returns its record, a flat
        dict.

        search    (inputs, targets), other data for the line search; default: the batch's last rows.

        Rows must be in random order: some stand for all in the search, in Newton steps and for K-FAC. The
        step is rejected for a loss, gradient or product that is not finite, an indefinite system, no descent
        direction, or too small a decrease. Then the parameters stay bitwise as they were, and
        record["reason"] says why; it is "" for an accepted step. torch.autocast outside works on the model's
        forward alone.
        """
        self._check_parameters()
        targets, n_targets = check_targets(inputs, targets)
        inputs, targets = counted_rows(inputs, targets)
        theta = [p.detach().clone() for p in self.params]
        rows = subset_rows(len(inputs), n_targets, SEARCH_FRAC)
        x, y = search or (inputs[-rows:], targets[-rows:])
        accepted = False

        def move(alpha):
            d = unflatten(solution.direction, self.params)
            assign(self.params, [t + alpha * v for t, v in zip(theta, d)])

        def loss_at(alpha):
            self.progress("line search")
            record["work"] += y.numel() / targets.numel() / 3
            move(alpha)
            return batch_loss(self.model, x, y, self.micro_batch)

        try:
            with full_precision(self.model):
                solution = self.solver.solve(self.parts, inputs, targets)
                refuse_writing(self.model, theta)
                record = {**solution.record, "alpha": 0.0, "rho": None, "loss": solution.loss}
                record["reason"] = solution.trouble
                if not solution.trouble:
                    record.update(self._search(solution, loss_at))
            if not record["reason"]:
                move(record["alpha"])
                accepted = True
        finally:
            if not accepted:  # rejected or interrupted: θ is as it was
                assign(self.params, theta)
                self.solver.forget()
        self.solver.adapt(record["rho"], record["alpha"])
        return {**record, "accepted": accepted}

    def least_rows(self, rows, n_targets):
        """The fewest rows of such a batch that processes divide among them in a step."""
        return min(subset_rows(rows, n_targets, SEARCH_FRAC), self.solver.least_rows(rows, n_targets))

    def _search(self, solution, loss_at):
        """Fields of the record: a reason to reject the step, or the α to take and what it brings.
        loss_at: α -> the loss at θ + αd."""
        slope = solution.slope
        if not slope < 0:
            return {"reason": f"no descent direction (slope {slope:.1e})"}
        loss0 = loss_at(0.0)
        alpha, loss, tries, reason = line_search(loss_at, loss0, slope, self.line_search)
        if alpha == 0:
            return {"reason": f"line search: {reason}"}
        change = loss - loss0
        # The local model along d as a parabola, by its slope at 0 and its value at 1. For GN it is one.
        predicted = alpha * slope + alpha**2 * (-solution.decrease - slope)
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
                "parts, none empty, must hold each parameter that the solver moves exactly once, and no other"
            )
        return parts

    def _check_parameters(self):
        if torch.is_inference_mode_enabled():
            raise ValueError("no step is possible inside torch.inference_mode")
        if list(map(id, self.params)) != list(map(id, trainable(self.model))):
            raise ValueError(
                f"this {type(self.solver).__name__} was made for other trainable parameters than the model "
                "has (frozen or unfrozen since, or another model?): make a new one, and a new GaussNewton"
            )

    def state_dict(self):
        """All that the next step depends on, beside the parameters; tensors and plain types."""
        return self.solver.state_dict()

    def load_state_dict(self, state):
        self.solver.load_state_dict(state)


def subset_rows(rows, n_targets, frac, least=32):
    """How many of a batch's rows stand for all of them: the share `frac`, but enough to hold `least` of the
    n_targets targets that count, if each row holds as many."""
    enough = math.ceil(least * rows / n_targets)
    return min(rows, max(enough, int(frac * rows + 1e-9)))


def no_progress(what, done=0, total=0):
    pass


# ------------------------------------------------------------------------------------------------------------
# Solvers


@dataclass
class PartState:
    """What one part carries from slice to slice, in the letters of ConjugateGradients."""

    part: list  # indices of the part's parameters
    d: torch.Tensor
    damping: float  # λ
    delta: torch.Tensor = None  # δ, not yet in d
    decrease: float = 0.0  # m_k(0) − m_k(d + δ)


@dataclass(eq=False)
class ConjugateGradients:
    """Hessian-free optimization: minimise a local model over the displacement d of each part, the other
    parameters fixed. Full Gauss-Newton has one part, all parameters; layerwise has a part for each layer.

    Martens (2010) solves one damped system by conjugate gradients. Here d is a sum of Newton steps δ. Each
    δ solves a system of its own, made from one slice of the batch. Slice k has logits z, their Jacobian J,
    the loss L(z), its gradient g_k and the Gauss-Newton matrix G_k. The gradient of the whole batch is g.
    The slice's local model is

        m_k(d) = L(z + J d) − L(z) + (g − g_k)ᵀd           prox-linear
                 g_kᵀd + ½ dᵀG_k d + (g − g_k)ᵀd           GN

    Its last term, the correction, makes ∇m_k(0) = g (a control variate). Each slice first judges the δ of
    the slice before, then makes a new one:

        judge    t ← argmin m_k(d + tδ) over t in LENGTHS
                 λ ← LOWER · λ where t = 1, else λ / max(t, 1/4)
                 d ← d + tδ
        solve    δ ← −(∇²m_k(d) + λM)⁻¹ ∇m_k(d)            by cg_iters iterations of conjugate gradients from
                                                           0, preconditioned by P = K + λM

    So t tests δ on rows that it was not fitted to. The first slice has no δ to judge, and starts from d =
    MOMENTUM times the last outer step. The δ of the last slice is added to d whole. The model of that slice
    gives the decrease that the step promises (for prox-linear to second order in δ). A system that is not
    finite, or by rounding indefinite, rejects the outer step.

    λ is Martens' damping. He adapts it once a step by ρ, the actual over the promised decrease. Here t adapts
    it in every slice but the first, and ρ after the line search (`adapt`). Each part has its own λ; the
    next outer step starts all from their geometric mean. All slices linearise at the same θ, and can agree
    on a d where the network is far from linear. So where α < 0.4, `adapt` raises λ, from no less than its
    value before the step.

    K is K-FAC's approximation of the curvature, made with the batch's own labels (an empirical Fisher
    matrix). The metric M = unit^(1 − POWER) K^POWER stands where Martens has the identity, and damps
    directions of large curvature more than the identity would. Each weight matrix has a `unit`: the geometric
    mean of K's mean eigenvalues, over all parameters and over that matrix. So K doubled is M doubled, and λ
    is a pure number. (`metric` adds floors, so that M is not singular.) The constants come from trials, in
    results/notes.md.
    """

    LENGTHS = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    LOWER = 0.5
    POWER = 0.5
    MOMENTUM = 0.5
    KFAC_TARGETS = 16384

    model: nn.Module
    local_model: str = "prox_linear"  # the loss itself on the linearised network; "gn": to second order in z
    newton_steps: int = 8  # slices in an outer step; fewer in a batch with under 32 targets for each
    cg_iters: int = 4  # conjugate-gradient iterations of a Newton step, at most
    damping: float = 3.0  # λ at the start
    precond: str = "kfac"  # P and M as above; "none": both are the identity
    curvature_frac: float = 0.25  # share of the batch's rows in slices; more if one had under 32 targets
    micro_batch: int = None  # rows worked on at a time; None: all of a batch, all of a slice

    def __post_init__(self):
        check_choice("local_model", self.local_model, ("gn", "prox_linear"))
        check_choice("precond", self.precond, ("kfac", "none"))
        if not 0 < self.curvature_frac <= 1:
            raise ValueError(f"curvature_frac must be in (0, 1], got {self.curvature_frac}")
        check_positive(self, "damping", "cg_iters", "newton_steps")
        self.params = trainable(self.model)
        self.kfac = KFAC(self.model, batch_labels=True) if self.precond == "kfac" else None
        self.prox_linear = self.local_model == "prox_linear"
        self.free = None  # bytes in the first step, before torch's allocator keeps memory for later use
        self.progress = no_progress
        self.direction = None  # of the last outer step, at the length that was taken

    def solve(self, parts, inputs, targets):
        """The Solution for a batch: inputs (B, ...), int64 classes (B, ...). Each part is a list of indices
        into self.params."""
        check_model(self.model, inputs, targets, twice=True)
        self.next_damping = self.damping  # until the slices have adapted it
        n_targets = (targets != IGNORED).sum().item()
        self.free = self.free or free_memory(inputs.device)
        self.progress("gradient")
        loss, grad = batch_grad(self.model, inputs, targets, self.micro_batch)
        record = {"work": 1.0, "grad_norm": grad.norm().item(), "products": 0}
        if not math.isfinite(loss + record["grad_norm"]):
            return Solution(loss, torch.zeros_like(grad), 0.0, 0.0, "loss or gradient not finite", record)
        if self.kfac:
            self._precondition(inputs, targets, n_targets, record)
        start = torch.zeros_like(grad)
        if self.direction is not None:
            start = self.MOMENTUM * self.direction.to(grad)  # a checkpoint's is on the CPU
        states = [PartState(part, select(start, self.params, part), self.damping) for part in parts]
        solves = []  # (iterations, reason) of each slice and part
        rows = self.least_rows(len(inputs), n_targets)  # of a slice
        steps = min(self.newton_steps, len(inputs) // rows)
        keep_rows = self._rows_that_fit(inputs, targets, rows)
        most = len(parts) * self.cg_iters  # products of a slice, at most
        for k, (x, y) in enumerate(pieces(inputs, targets, rows)[:steps]):
            self.progress("linearise", k, steps)
            ggn = GGN(self.model, x, y, self.micro_batch, keep_rows)
            for s in states:
                solves.append(self._newton_step(s, grad, ggn, k * most, steps * most))
            record["products"] += ggn.products
            record["work"] += ggn.work * rows / len(inputs)
            del ggn  # before the next one is made: memory holds one slice
        d = self.direction = torch.zeros_like(grad)  # of all parts
        views = unflatten(d, self.params)  # what is written into them is in d
        for s in states:
            own = [views[i] for i in s.part]
            assign(own, unflatten(s.d + s.delta, own))
        self.next_damping = geometric_mean(s.damping for s in states)
        iterations, reasons = zip(*solves)
        bad = sorted({"nonfinite", "indefinite"}.intersection(reasons))
        slope = grad.dot(d).item()
        record.update(
            damping=self.next_damping,
            cosine=-slope / (record["grad_norm"] * d.norm().item() + 1e-30),
            cg_iterations=sum(iterations),
            cg_reason="+".join(bad or sorted(set(reasons))),
        )
        trouble = f"no descent direction ({bad[0]})" if bad else ""
        return Solution(loss, d, slope, sum(s.decrease for s in states), trouble, record)

    def least_rows(self, rows, n_targets):
        """Rows of a slice, the fewest that processes divide."""
        return subset_rows(rows, n_targets, self.curvature_frac / self.newton_steps)

    def _rows_that_fit(self, inputs, targets, rows):
        """How many rows' graphs fit into three eighths of the free memory. (Another eighth is left for the
        piece that is worked on.) Raises MemoryError where not even one piece fits."""
        each = row_bytes(self.model, inputs, targets)
        needed = each * min(self.micro_batch or rows, rows)
        if needed > self.free:
            raise MemoryError(
                f"a micro-batch takes {needed / 1e9:.1f} GB to linearise, and {self.free / 1e9:.1f} GB are "
                "free: --micro_batch must be smaller"
            )
        return int(3 / 8 * self.free / each)

    def _newton_step(self, s, grad, ggn, done, total):
        """A slice's work for one part: judge the δ of the slice before, and make a new one.

        grad: of the whole batch. done, total: CG's iterations, for progress. Returns how many iterations CG
        made, and why it ended."""
        correction = select(grad - ggn.grad, self.params, s.part)
        if s.delta is not None and s.delta.any():
            extra = correction.dot(s.delta).item()
            t = ggn.best_length(s.d, s.delta, self.LENGTHS, extra, s.part, self.prox_linear)
            s.d = s.d + t * s.delta
            s.damping = bounded(s.damping * (self.LOWER if t == 1 else 1 / max(t, 0.25)))
        change, gradient = ggn.move_to(s.d, s.part, self.prox_linear)

        def matvec(v):
            self.progress("cg", done + ggn.products, total)
            return ggn.matvec(v, s.part) + s.damping * self._times_metric(v, s.part)

        found = cg(matvec, -(gradient + correction), self._preconditioner(s.damping, s.part), self.cg_iters)
        s.delta = found.x
        # m_k(0) − m_k(d + δ). From 0 to d it is −(change + correctionᵀd). From d to d + δ, to second order,
        # it is −(the system's last value − penalty), the penalty ½ λ δᵀM δ.
        penalty = 0.5 * s.damping * s.delta.dot(self._times_metric(s.delta, s.part)).item()
        s.decrease = penalty - found.values[-1] - change - correction.dot(s.d).item()
        return found.iterations, found.reason

    def _precondition(self, inputs, targets, n_targets, record):
        """K-FAC's factors, from as many rows as a slice has, but at least KFAC_TARGETS targets."""
        self.progress("kfac")
        rows = subset_rows(len(inputs), n_targets, self.curvature_frac / self.newton_steps, self.KFAC_TARGETS)
        # A random sign for each sequence, the same in every step: K-FAC's diagonals are Σ g² over sequences,
        # which (Σ ± g)² is in the mean
        signs = torch.Generator().manual_seed(0)
        self.kfac.update(inputs[:rows], targets[:rows], self.micro_batch, signs)
        self.kfac.decompose()
        # K's mean eigenvalue: its trace over its size. Tr(L ⊗ R) = Tr L Tr R
        traces = [math.prod(S.sum().item() for S, _ in self.kfac.state[p]["eigen"]) for p in self.params]
        self.mean_eigenvalue = sum(traces) / sum(p.numel() for p in self.params) + 1e-18
        record["repaired"] = self.kfac.repaired or None
        record["work"] += 2 / 3 * rows / len(inputs)  # a forward, and a backward for the activations alone

    def metric(self, S):
        """K's eigenvalues S -> M's, with a floor where S is 0, as for tokens that never came."""
        unit = (self.mean_eigenvalue * (S.mean() + 1e-6 * self.mean_eigenvalue)).sqrt()
        return unit ** (1 - self.POWER) * (S + 0.01 * unit) ** self.POWER

    def _times_metric(self, v, part):
        """M v."""
        return self.kfac.apply(v, self.metric, part) if self.kfac else v

    def _preconditioner(self, damping, part):
        if self.kfac:
            return lambda v: self.kfac.apply(v, lambda S: 1 / (S + damping * self.metric(S)), part)

    def adapt(self, rho, alpha):
        """After every step, of αd; α = 0: it was rejected."""
        if alpha < 0.4:
            self.next_damping = max(self.next_damping, self.damping)
        self.damping = levenberg_marquardt(self.next_damping, rho, alpha)
        if alpha:
            self.direction = alpha * self.direction

    def forget(self):
        """After a step that was rejected or interrupted, before `adapt`: the next one starts from d = 0."""
        self.direction = None

    def state_dict(self):
        return {"damping": self.damping, "direction": self.direction}

    def load_state_dict(self, state):
        self.damping = state["damping"]
        self.direction = state["direction"]


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
    (paper, Algorithm 1; there in one pass). v is the paper's letter for the displacement d.

        v ← (1 − α) v           what the last outer step left of it; 0 at first, and after a rejected step
        for each micro-batch, with its own J, u = ∂L/∂z and H:
            ∇ = Jᵀ(u + H J v)             GN
                Jᵀ ∂L/∂z(z + J v)         prox-linear
            v ← (1 − η λ) v               the optimizer's weight decay, of matrices only; η: its rate
            v ← optimizer(v, ∇)           ∇ clipped in norm for each part

    The damping λ keeps v near 0 where micro-batches do not agree. Where they agree, it keeps entries of v
    below about 1 / λ. (sgd has no such decay: λ v is added to ∇.)

    J v is a difference of logits (see local_model_once). So the model's backward must be the derivative of
    its forward: no straight-through estimators, no stopped gradients, no jumps. (A top-k router's jumps make
    J v huge for the tokens that change experts.)

    Slope gᵀv and decrease m(0) − m(v) are means over the last sixteenth of the batch in the last pass. Each
    micro-batch gives them at its first v, before its own inner step; earlier passes have fitted v to it.
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
    schedule: str = "constant_with_inner_cosine"  # of lr, with warmup and outer_steps: see inner_schedule
    warmup: int = 0
    outer_steps: int = 100
    reset: bool = False  # start every outer step at v = 0, and the moments at 0
    compile: bool = False  # local_model_once by torch.compile, which needs a C++ compiler

    def __post_init__(self):
        check_choice("local_model", self.local_model, ("gn", "prox_linear"))
        check_choice("schedule", self.schedule, SCHEDULES)
        check_positive(self, "rows", "passes", "lr", "outer_steps")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping must not be negative, and finite, got {self.damping}")
        self.params = trainable(self.model)
        self.prox_linear = self.local_model == "prox_linear"
        self.local_model_once = local_model_once
        if self.compile:
            self.local_model_once = torch.compile(local_model_once, dynamic=False)
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
        loss, change, slope = map(float, (loss, change, slope))
        trouble = "" if math.isfinite(loss + change + slope) else "loss or local model not finite"
        # local_model_once: a forward, and for each part a J v and a backward
        work = (1 + len(parts)) / 3 + sum(backward_work(self.params, part) for part in parts)
        record = {"work": passes * work, "inner_steps": len(batches)}
        return Solution(loss, flatten(self.v).detach(), slope, -change, trouble, record)

    def least_rows(self, rows, n_targets):
        """Rows of the last micro-batch, which may be shorter than the others."""
        return rows % self.rows or self.rows

    def _inner_step(self, parts, gradient, k, steps):
        """v ← optimizer(v, ∇) by the k-th micro-batch's gradient, clipped for each part."""
        for v, g in zip(self.v, gradient):
            v.grad = g
        for part in parts:
            nn.utils.clip_grad_norm_([self.v[i] for i in part], self.CLIP)
        factor = inner_schedule(self.schedule, self.outer, self.outer_steps, k, steps, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.step()

    def _local_model(self, x, y, parts):
        """local_model_once for a micro-batch, summed over the processes, which share its rows."""
        n_targets = (y != IGNORED).sum()
        x, y = local_rows(x, y)
        theta = [p.detach() for p in self.params]
        v = [t.detach() for t in self.v]
        return sum_over_processes(
            *self.local_model_once(self.model, parts, self.prox_linear, self.eps, theta, x, y, v, n_targets)
        )

    def adapt(self, rho, alpha):
        """After a step of αv: v is what is left of it."""
        self.outer += 1
        assign(self.v, [(1 - alpha) * v for v in self.v])

    def forget(self):
        """The next solve starts at v = 0, and the moments at 0."""
        self.v = [nn.Parameter(torch.zeros_like(p)) for p in self.params]
        with swapped_parameters(self.model, self.v):
            self.optimizer = make_optimizer(
                self.name,
                self.model,
                lr=self.lr,
                weight_decay=self.damping,
                betas=self.betas,
                muon_scale=self.muon_scale,
            )

    def state_dict(self):
        return {
            "v": [v.detach() for v in self.v],
            "optimizer": self.optimizer.state_dict(),
            "outer": self.outer,
        }

    def load_state_dict(self, state):
        assign(self.v, state["v"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.outer = state["outer"]


SCHEDULES = ("constant_with_inner_cosine", "cosine_with_global_schedule", "global_cosine")


def inner_schedule(kind, outer, outer_steps, k, steps, warmup=0):
    """Factor of the inner rate in inner step k, one of `steps`, in outer step `outer` (counted from 0).

    global_cosine                  one cosine over all inner steps of all outer steps
    cosine_with_global_schedule    a cosine inside each outer step, whose peaks follow a cosine over the outer
                                   steps
    constant_with_inner_cosine     a cosine inside each outer step, constant peaks

    The first `warmup` inner steps of the run are scaled by (inner steps done + 1) / warmup.
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
    reason: str  # "residual", "max_iter", "indefinite" or "nonfinite"
    values: list  # ½xᵀAx − bᵀx at every iterate, the start included: iterations + 1 floats


def cg(matvec, b, precond=None, max_iter=50, rtol=0.0):
    """Solve A x = b, A symmetric positive definite and given by matvec(v) = A v; equivalently minimise ½xᵀAx
    − bᵀx.

    precond   v -> P⁻¹v, P ≈ A symmetric positive definite
    rtol      stop at ‖b − Ax‖ <= rtol ‖b‖; machine epsilon where rtol is less, since numbers resolve no more

    From x = 0. Trouble is a `reason`, not an exception: "indefinite" (pᵀAp <= 0, or rᵀP⁻¹r <= 0), where x is
    the last good iterate, or "nonfinite", where x may not be finite itself.
    """
    x = torch.zeros_like(b)
    r = b.clone()
    eps = torch.finfo(b.dtype).eps
    bnorm = b.norm()
    values = [0.0]
    if not bnorm.isfinite():
        return CGResult(x, 0, "nonfinite", values)
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
    reason: str  # the kind, "no decrease" or "nonfinite" (no candidate had a finite loss)


def line_search(loss_at, loss0, slope, kind="armijo"):
    """Choose α among 2^(−i/2), i = 0, 1, ..., or 0.

    loss_at   α -> loss;   loss0 = loss_at(0);   slope = gᵀd < 0
    armijo    the first α with loss <= loss0 + 0.01 α slope, then on while the loss still falls: often the
              next α is better, since the loss is no parabola
    grid      the best of ten candidates (the paper's for 150M and layerwise; there it never rejects a step)
    grid5     the best of five (the paper's for 45M)
    none      α = 1 if its loss is finite
    A loss that is not finite is no candidate.
    """
    best = (0.0, loss0)
    finite = False
    for i in range(LINE_SEARCHES[kind]):
        alpha = 2 ** (-i / 2)
        loss = loss_at(alpha)
        finite |= math.isfinite(loss)
        better = math.isfinite(loss) if kind == "none" else loss < best[1]
        if kind == "armijo" and best[0] and not better:
            break
        if better and (kind != "armijo" or loss <= loss0 + 0.01 * alpha * slope):
            best = (alpha, loss)
    return Search(*best, i + 1, kind if best[0] else "no decrease" if finite else "nonfinite")


def bounded(damping):
    return min(max(damping, 1e-8), 1e8)


def levenberg_marquardt(damping, rho, alpha):
    """The next λ. ρ is the actual over the predicted decrease of the step that was taken. Where it is near 1
    the model was right, and is trusted further. α is 1, 0.71, 0.5, ... or 0, which is a rejected step.

    λ / α       for α < 0.4, at most 16 λ. So short a step can have ρ near 1 although the model was far off
                at α = 1
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
    """One batch linearised at the model's current parameters: `loss`, `grad`, and `matvec(v)` = JᵀHJ v. H is
    the loss's Hessian at the model's logits, or at those to which `move_to` has moved it.

    inputs         (B, ...), as the model takes them; its logits are (B, ..., V)
    targets        (B, ...), int64 classes; those of -100 are left out
    micro_batch    rows worked on at a time; None: all at once. The result does not depend on it
    keep_rows      rows whose graphs are kept (None: all), so that a product repeats no forward. The others
                   are linearised anew at each product, in memory that does not grow with the batch

    loss           mean cross-entropy in nats per token, a float
    grad           its gradient (P,): parameters flattened in the order of model.parameters(), tied ones once
    products       how many were made
    work           all so far, in gradients of this batch, by matrix multiplications: a gradient has 3 per
                   weight, a product 4. A product with a block has 4 per weight of its own and 2 per weight
                   between them and the logits

    With several processes inputs and targets are the whole batch on each; each works on its own rows, and
    results are summed. The parameters must not change while the object is in use. Raises ValueError for a
    model or batch that it cannot work with.

    Products are by double backward (`create_graph`), not by torch.func. The graph of the gradient is the
    graph of Jᵀ, and all products use it: 1.3 gradients each, where torch.func's jvp and vjp take 2.3.
    """

    def __init__(self, model, inputs, targets, micro_batch=None, keep_rows=None):
        targets, self.n_targets = check_targets(inputs, targets)
        self.model = model
        self.params = trainable(model)
        self.data = pieces(*local_rows(inputs, targets), micro_batch)
        self.cache = []
        self.offset = None  # (d, part): where H is, if not at z
        self.shifts = []  # J d of the kept pieces: left by best_length, used by move_to
        self.products = 0
        self.work = 0.0
        self.loss = 0.0
        self.grad = 0.0
        check_model(model, *self.data[0], twice=True)
        rows = 0
        for piece in self._pieces():  # none is kept yet
            self.loss += cross_entropy_sum(piece.z0, piece.y).item() / self.n_targets
            self.grad += flatten(piece.g).detach()
            piece.g = [get_gradient_edge(t) for t in piece.g]  # products need its graph, not its values
            rows += len(piece.y)
            if keep_rows is None or rows <= keep_rows:
                self.cache.append(piece)
        self.loss, self.grad = sum_number(self.loss), sum_over_processes(self.grad)[0]

    def matvec(self, v, part=None):
        """G v = JᵀHJ v, (P,) -> (P,). With `part`, a list of parameter indices, v and the result hold those
        parameters alone. That is the product with G's diagonal block (layerwise Gauss-Newton)."""
        part = part or range(len(self.params))
        out = 0.0
        for piece in self._pieces(self.offset):
            HJv = cross_entropy_hvp(piece.probs, piece.jvp(v, part), piece.divisor)
            out += piece.vjp(HJv, part)
        self.products += 1
        self.work += 2 * backward_work(self.params, part)
        return sum_over_processes(out)[0]

    def best_length(self, d, delta, lengths, extra_slope, part, prox_linear):
        """The t of `lengths` with the least m(d + tδ) + t extra_slope, m the local model (see local_change).
        d and δ move the parameters in `part` alone. The next move_to must be to d + tδ with this t."""
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
        _, t = min((sum_number(m.item()) + t * extra_slope, t) for m, t in zip(totals, lengths))
        self.shifts = [Jd + t * Jdelta for Jd, Jdelta in along]
        return t

    def move_to(self, d, part, prox_linear):
        """(m(d) − m(0), ∇m(d)), for d and a gradient of the parameters in `part` alone. From now on matvec's
        H is the one at z + J d, for GN at z; J stays."""
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
        return sum_number(change), sum_over_processes(gradient)[0]

    def _pieces(self, offset=None):
        """The linearised pieces: first those that are kept, then the others, linearised one by one. The
        others get H at the offset, (d, part); those that are kept have it."""
        yield from self.cache
        for x, y in self.data[len(self.cache) :]:
            piece = Piece(self.model, self.params, x, y, self.n_targets)
            if offset:
                piece.set_hessian_at(piece.jvp(*offset))
                self.work += backward_work(self.params, offset[1]) / len(self.data)
            self.work += 1 / len(self.data)
            yield piece


class Piece:
    """One piece of the batch, linearised: z (..., V), probs = softmax(z), and by double backward

    vjp   Jᵀw, an ordinary backward of z
    jvp   J v, by the graph of the gradient g = Jᵀu: g is linear in u, so that the derivative of gᵀv by u is
          J v. `g` holds tensors, or their edges in the graph
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
    """Bytes that keep one more row of a batch linearised; where two rows do not fit, those of one."""
    one, two = (graph_bytes(model, x[[0] * rows], y[[0] * rows]) for rows in (1, 2))
    return abs(two - one) or 1


def graph_bytes(model, x, y):
    """Bytes that a linearised piece keeps: each storage that its graphs save, once, and three of logits."""
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
    """The local model of a micro-batch at a single v: for each part a model of its own, the others at rest.
    theta, v: lists of tensors; sums over tokens are divided by n_targets; eps: see working_eps.

        forward        z, with its graph                        1/3 of a gradient by matrix multiplications
        difference     J v ≈ (z(θ + hv) − z(θ)) / h             1/3, for each part
        backward       ∇m(v), see local_change                  2/3, for one part

    That is 4/3 for a single part. Forward mode takes 5/3, GGN with its first product 7/3.

    Returns [L(θ), m(v) − L(θ), gᵀv = ⟨u, J v⟩, *∇m(v)], the second and third summed over the parts.
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

    It errs by h/2 times the second derivative along v, and by eps / h times z for rounding. In a smooth model
    the two are about equal where ‖hv‖ is √eps times ‖θ‖. So h, at most 1, solves eps = Σ ‖hv‖² / (‖θ‖² +
    ‖v‖²) over tensors.
    """
    sizes = [(v[i].norm() ** 2, theta[i].norm() ** 2) for i in part]
    h = (eps / sum(a / (a + b + 1e-30) for a, b in sizes)).sqrt().clamp(max=1.0)
    there = [t + h * v[i] if i in part else t for i, t in enumerate(theta)]
    with swapped_parameters(model, there):
        z1 = evaluate(model, x)
    return torch.where(z1 == z0, 0.0, (z1 - z0) / h), h  # 0 between logits of −inf


def backward_work(params, part):
    """The work, in gradients, of a backward pass to the parameters in `part`. Per weight a gradient has 3
    multiplications; this has 2 for weights in `part`, 1 for those between them and the logits."""
    sizes = [p.numel() for p in params]
    own = sum(sizes[i] for i in part)
    behind = sum(sizes[max(part) + 1 :])
    return (2 * own + behind) / sum(sizes) / 3


def derivative(outputs, inputs, cotangents, retain_graph=True, create_graph=False):
    """torch.autograd.grad, where the derivative by an input that is not used is 0."""
    return torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph, create_graph, materialize_grads=True
    )


def local_change(z, s, y, n_targets, prox_linear, differentiate=True):
    """The local model at logits z + s, (..., V): its change from z, and its derivative by s (it may be None,
    unless asked for). Sums over tokens are divided by n_targets.

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
    """Of a vector over the tensors in `like`, the elements of those with indices in `part`, as a vector."""
    tensors = unflatten(vector, like)
    return flatten([tensors[i] for i in part])


@contextmanager
def swapped_parameters(model, tensors):
    """While open, the model has other tensors in place of its trainable parameters. Whatever happens, it gets
    back the very objects it had. (torch.func.functional_call does not where a module stands in several
    places.)
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
    """Machine epsilon of the coarsest numbers in which the model computes its first row: that of its dtype,
    or a larger one by autocast, casts or TF32. Raises ValueError where its logits do not fit the targets."""
    dtypes = set()

    class Watch(TorchFunctionMode):
        # A mode of torch's dispatcher would see more, but inside one torch runs neither compiled code nor
        # higher-order operators, such as flex_attention.
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.is_floating_point():
                dtypes.add(out.dtype)
            return out

    with Watch():
        z = evaluate(model, x[:1], y[:1])
    check_logits(z.expand(len(y), *z.shape[1:]), y)
    matmul = 2.0**-10
    with suppress(RuntimeError):  # where torch.backends has a setting of its own
        matmul = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]
    return max([torch.finfo(t).eps for t in dtypes] + [matmul] * (torch.float32 in dtypes))


CHECKED = weakref.WeakKeyDictionary()  # model -> {(twice, train or eval of each module), ...}


def check_model(model, x, y, twice):
    """Raises ValueError for a model that cannot be worked with, seen on the first rows of a batch. Done for
    a model in its modes (train or eval) until all was seen; twice: see refuse_derivatives."""
    done = CHECKED.setdefault(model, set())
    modes = twice, *(m.training for m in model.modules())
    if modes not in done:
        refuse_randomness(model, x[:8], y[:8])
        if refuse_derivatives(model, x[:2], y[:2], twice):
            done.add(modes)


def refuse_randomness(model, x, y):
    """Raises ValueError for a model that gives the same rows other logits when it is called again, or whose
    batch norm makes them depend on other rows. Derivatives of such a function mean nothing."""
    advice = "Gauss-Newton needs a deterministic model; call model.eval() or set its rates to 0"
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} ({type(m).__name__}) is active in training mode: {advice}"
            )
    theta = [p.detach().clone() for p in trainable(model)]
    first = evaluate(model, x, y)
    refuse_writing(model, theta)
    seen = torch.softmax(first, dim=-1) > 0  # leaves out masked classes, whose logits are −1e9, say
    tolerance = working_eps(model, x, y) ** 0.5 * first.abs().where(seen, 0).max()
    for _ in range(9):  # some models change their logits only now and then
        change = (evaluate(model, x, y) - first).abs()
        if (change.where(seen, 0) > tolerance).any():
            raise ValueError(f"the model gives the same inputs other logits every time (dropout?): {advice}")


def refuse_writing(model, theta):
    """Raises ValueError where the trainable parameters are no longer theta, and restores them."""
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
    """Raises ValueError unless cᵀ(J v) = (Jᵀc)ᵀv for each parameter. Jᵀ is the model's backward, and c is
    H ∂L/∂z. v is a cosine, then a sine, nonzero in nearly every entry. Returns whether each parameter had a
    derivative to judge by. J v is

    twice        the derivative of that backward, as in GGN. Models without one are refused, and hooks that
                 are not linear
    not twice    a difference of logits, as in an InnerSolver. A backward that is not the derivative of the
                 forward is refused. J v errs by √eps, and by eps / h of z. The difference is central, since
                 the second derivative along a wave can be large
    """
    needs, advice = REFUSALS[twice]
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
        total = flatten(gradient).norm()
        own = {t.name() for t in graph_of(z) if isinstance(t, torch.autograd.function.BackwardCFunction)}
        for i, (name, g) in enumerate(zip(trainable_names(model), gradient)):
            where = f" in the derivative by {name}, among {', '.join(sorted(own)) or 'operations'} and hooks"
            angle = torch.arange(g.numel()).to(g).view_as(g)
            if g.norm() <= 1e-7 * total:  # rounding
                continue
            for v in (angle.cos(), angle.sin()):
                if twice:
                    Jv, h = piece.jvp(v.flatten(), [i]), 1.0
                else:
                    (ahead, h), (behind, _) = (
                        difference(model, x, z0, theta, {i: w}, [i], eps) for w in (v, -v)
                    )
                    Jv = (ahead - behind) / 2  # the second derivative along v cancels
                forward = c * Jv
                backward = g * v
                scale = backward.sum().abs() + backward.norm() + forward.norm()
                allowed = max(0.1, 10 * eps**0.5) * scale + rounding / h
                if (forward.sum() - backward.sum()).abs() > allowed:
                    raise RuntimeError(
                        "a second derivative is missing, or the gradient is changed (by a straight-through "
                        "estimator, a stopped gradient, a hook or a jump),"
                    )
    except RuntimeError as e:
        if "allocate" in str(e):  # want of memory, whose own message is the right one
            raise
        raise ValueError(f"{needs}: {first_line(e)}{where}; {advice}") from e
    return all(0 < g.norm() < math.inf for g in gradient)


REFUSALS = {  # by `twice`: what is needed, and what to do without it
    True: (
        "GGN differentiates the model twice",
        "switch off what is in the way (activation checkpointing, compilation), or take an InnerSolver",
    ),
    False: (
        "an InnerSolver needs a gradient that is the derivative of the model's forward",
        "replace what is named, or take ConjugateGradients",
    ),
}


def first_line(e):
    return (str(e).strip() or type(e).__name__).splitlines()[0]
