"""Train a GPT with full Gauss-Newton or a baseline; one command, no set-up.

    python train.py --opt full_gn                               # tiny GPT, Python's own library as text, 4 minutes
    python train.py --opt layerwise_gn                          # the same with curvature inside each layer only
    python train.py --opt soap --batch_tokens 65536             # a baseline: adamw, adam, sgd, muon, soap, kfac
    python train.py --opt adamw --steps 60 --out_dir out/warmup
    python train.py --opt full_gn --init_from out/warmup        # start from its weights
    python train.py --resume --out_dir out/my_run               # go on where a run stopped
    python train.py --data shakespeare --model small --opt muon # other data, other size
    python train.py --compare out/a out/b --plot loss.svg       # steps, tokens, work and seconds to each loss
    python train.py --study headline --quick                    # every method to the same loss: table and pictures
    torchrun --standalone --nproc_per_node=2 train.py           # each batch shared by 2 processes (cores, GPUs)
    python train.py --help                                      # every flag, its unit and default

Each run owns a folder: log.jsonl (first line the configuration, then one line a step) and checkpoint.pt.
"""
import argparse
import copy
import ctypes
import hashlib
import html
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import resource
except ImportError:      # Windows
    resource = None

from baselines import BASELINES, DEFAULT_LR, lr_schedule, make_optimizer, ranks, reduce_number
from data import TOKENIZERS, DataError, get_batch, prepare, val_batch
from gauss_newton import (GGN, KFAC, SCHEDULES, ConjugateGradients, GaussNewton, InnerSolver, assign, batch_grad, batch_loss, cg,
                          flatten, line_search, select, trainable, unflatten)
from model import GPT, PRESETS, GPTConfig

GN = ("full_gn", "layerwise_gn")
RUN_DEFAULTS = {  # what suits a method that takes few, large steps, and one that takes many
    "gn": dict(solver="soap", steps=10, batch_tokens=1048576, eval_interval=1, checkpoint_interval=1,
               line_search="armijo", search_frac=0.0625),
    "cg": dict(solver="cg", steps=12, batch_tokens=131072, eval_interval=1, checkpoint_interval=1,
               line_search="armijo", search_frac=1.0),
    "baseline": dict(solver="cg", steps=300, batch_tokens=16384, eval_interval=10, checkpoint_interval=50,
                     line_search="none", search_frac=1.0),
}
# What --resume may change; every other setting is the stored run's.
RESUMABLE = {"resume", "out_dir", "data_dir", "steps", "target_loss", "sample", "threads", "device", "cache_gb",
             "checkpoint_interval", "max_rejections"}

CG_ONLY = {"newton_steps", "geodesic", "power", "damping", "damping_metric", "cg_iters", "cg_tol", "cg_rtol", "precond",
           "precond_interval", "precond_frac", "curvature_frac", "curvature_data", "warm_start"}
INNER_ONLY = {"inner_tokens", "inner_lr", "inner_schedule", "inner_warmup", "inner_weight_decay", "inner_clip",
              "inner_l2", "inner_average", "inner_reset"}
GN_ONLY = CG_ONLY | INNER_ONLY | {"local_model", "solver", "compile"}
BASELINE_ONLY = {"lr", "schedule", "warmup_steps", "clip", "weight_decay", "betas", "momentum",
                 "precondition_frequency"}


class UsageError(ValueError):
    """A setting that cannot be used, told in one line; the program ends with status 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Settings


def build_parser():
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UsageError(message + " (--help lists all flags)")

    p = Parser(prog="train.py", usage="python train.py [flags]", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def group(title):
        g = p.add_argument_group(title)

        def flag(name, kind, default, text, **extra):
            if kind is bool:
                action = argparse.BooleanOptionalAction if default else "store_true"
                g.add_argument(name, action=action, default=default, help=text + " (default on)" * default)
            else:
                shown = "" if default is None else f" (default {default})"
                g.add_argument(name, type=kind, default=default, help=text + shown, **extra)
        return flag

    flag = group("what to run")
    flag("--opt", str, "full_gn", "optimizer", choices=GN + BASELINES)
    flag("--steps", int, None, "optimizer steps; for Gauss-Newton, outer steps (default 10 for GN, "
         "12 with --solver cg, 300 for baselines)")
    flag("--batch_tokens", int, None, "tokens per step, a multiple of the block size (default 1048576 for GN, "
         "131072 with --solver cg, 16384 for baselines)")
    flag("--micro_batch", int, None, "sequences worked on at a time; changes memory and speed, not results "
         "(default: about 8192 tokens, more on a GPU)")
    flag("--seed", int, 0, "of initialisation, batches and sampled labels")
    flag("--target_loss", float, None, "stop at the first evaluation at or below this validation loss, "
         "in nats per token")
    flag("--init_from", str, None, "checkpoint (or its run's folder) whose weights to start from")
    flag("--device", str, "auto", "auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ...")
    flag("--dtype", str, "fp32", "fp32; tf32: shorter mantissas in matrix products on GPUs; "
         "bf16: those products in bfloat16 (autocast); solver vectors, sums and losses stay fp32",
         choices=("fp32", "tf32", "bf16"))
    flag("--threads", int, None, "CPU threads (default: all cores)")

    flag("--line_search", str, None, "along each step: armijo (backtracking), grid (best of all candidates) or none "
         "(default armijo for GN, none for baselines)", choices=("armijo", "grid", "none"))
    flag("--line_search_data", str, "same", "search on the batch or on as many fresh tokens", choices=("same", "fresh"))
    flag("--search_frac", float, None, "share of the batch, or of as many fresh tokens, that the search is on "
         "(default 1 with --solver cg and for baselines, else 0.0625)")
    flag("--search_candidates", int, 10, "step lengths 2^(-i/2), i = 0, 1, ..., at most")

    flag = group("model")
    flag("--model", str, "tiny", "size: layers, heads, width and block size", choices=list(PRESETS))
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        flag(f"--{name}", int, None, f"override the preset's {name}")
    flag("--tie_weights", bool, False, "one matrix for embedding and head")

    flag = group("data")
    flag("--data", str, "stdlib", "stdlib (Python's own library, no download), shakespeare (1 MB), "
         "c4 (English web pages, 319 MB a shard), or a file or folder: text, or .jsonl and .json with a document "
         "per line in \"text\", each also as .gz")
    flag("--shards", int, 1, "C4 files to download and use")
    flag("--tokenizer", str, "bytes", "bytes (256 tokens) or gpt2 (50257)", choices=TOKENIZERS)
    flag("--data_dir", str, "data", "where prepared data is kept")

    flag = group("Gauss-Newton (full_gn, layerwise_gn)")
    flag("--local_model", str, "prox_linear", "loss to second order in the logits, "
         "or the full loss of the linearised network", choices=("gn", "prox_linear"))
    flag("--solver", str, None, "what minimises the local model: conjugate gradients, "
         "or an optimizer that streams over the batch (default soap; cg where one of its own flags is given)",
         choices=("cg", "muon", "soap", "adamw"))
    flag("--newton_steps", int, 4, "prox_linear with cg: Newton steps per outer step, each with --cg_iters iterations")
    flag("--geodesic", bool, True, "correct each CG step along the model's own curvature (a second solve), "
         "where that helps; --no-geodesic: never")
    flag("--power", float, 1.0, "1 for a step by G^-1; 0.5 for G^-1/2 by Lanczos, without preconditioner, "
         "on the gn model, identity metric")
    flag("--damping", float, 0.3, "λ at the start, adapted by Levenberg-Marquardt from then on")
    flag("--damping_metric", str, "kfac", "damp by λI, or by λ times the square root of the K-FAC curvature",
         choices=("identity", "kfac"))
    flag("--cg_iters", int, 8, "conjugate-gradient iterations per solve, at most")
    flag("--cg_tol", float, 0.0, "stop CG when its quadratic gains less than this fraction per iteration; 0 = off")
    flag("--cg_rtol", float, 0.0, "stop CG at this relative residual; 0 = off")
    flag("--precond", str, "kfac", "preconditioner of CG", choices=("kfac", "none"))
    flag("--precond_interval", int, 1, "steps between new K-FAC factors")
    flag("--precond_frac", float, 0.25, "share of the curvature sequences that factors are made from")
    flag("--curvature_frac", float, 0.25, "share of the batch that the GN matrix is made from; "
         "the gradient uses all of it")
    flag("--curvature_data", str, "same", "GN matrix on the batch's own or on fresh sequences",
         choices=("same", "fresh"))
    flag("--warm_start", float, 1.0, "start CG from this multiple of the last solution; 0 = from zero")
    flag("--cache_gb", float, None, "memory for kept graphs, in GB, which save a forward per product "
         "(default: 40 %% of what is free)")
    flag("--compile", bool, False, "compile products and inner steps: half a minute to some minutes at the start, "
         "for long runs (needs a C++ compiler)")
    flag("--max_rejections", int, 8, "stop after this many rejected steps in a row")

    flag = group("Gauss-Newton with --solver muon, soap or adamw")
    flag("--inner_tokens", int, 4096, "tokens per inner step; a batch gives batch_tokens / inner_tokens inner steps")
    flag("--inner_lr", float, 8e-3, "inner learning rate")
    flag("--inner_schedule", str, "constant_with_inner_cosine", "inner rate over an outer step and the run",
         choices=SCHEDULES)
    flag("--inner_warmup", int, 0, "inner steps of linear warmup")
    flag("--inner_weight_decay", float, 1e-3, "decoupled, on matrices")
    flag("--inner_clip", float, 1.0, "clip the inner gradient's norm, per part; 0 = off")
    flag("--inner_l2", float, 0.0, "pull toward the parameters of the outer step")
    flag("--inner_average", float, 0.0, "share of the inner steps, counted from the last, whose mean is the solution; "
         "0 = the last one")
    flag("--inner_reset", bool, False, "start each inner solve at the parameters with fresh moments, "
         "not where the last one ended")

    flag = group("baselines")
    flag("--lr", float, None, "peak learning rate (default "
         + ", ".join(f"{k} {v:g}" for k, v in DEFAULT_LR.items()) + ")")
    flag("--schedule", str, "constant", "after warmup; wsd decays over the last fifth",
         choices=("constant", "cosine", "wsd"))
    flag("--warmup_steps", int, 0, "steps of linear warmup")
    flag("--clip", float, 1.0, "clip the gradient's norm; 0 = off")
    flag("--weight_decay", float, None, "on matrices only (default: the optimizer's own)")
    flag("--betas", float, None, "two averaging constants (default: the optimizer's own)",
         nargs=2, metavar=("B1", "B2"))
    flag("--momentum", float, None, "of sgd and muon (default 0.9, 0.95)")
    flag("--precondition_frequency", int, None, "steps between SOAP's basis updates (default 10)")

    flag = group("records")
    flag("--out_dir", str, None, "the run's folder (default: a fresh one under out/)")
    flag("--resume", bool, False, "go on from the checkpoint in --out_dir, with its settings")
    flag("--overwrite", bool, False, "replace an earlier run in --out_dir")
    flag("--eval_interval", int, None, "steps between evaluations (default 1 for GN, 10 for baselines)")
    flag("--eval_tokens", int, 65536, "validation tokens, the same ones for every optimizer and seed")
    flag("--ema", float, 0.0, "evaluate an average of the weights over steps with this decay; "
         "0 = the weights themselves")
    flag("--checkpoint_interval", int, None, "steps between checkpoints (default 1 for GN, 50 for baselines)")
    flag("--compare", str, None, "read the logs of these runs, print what each took to each target loss, and stop",
         nargs="+", metavar="OUT")
    flag("--plot", str, None, "with --compare: also draw loss against steps, tokens and gradients into this .svg")
    flag("--bench", bool, False, "print what products and everything else cost on this machine, in gradients, "
         "on one thread unless --threads is given, and stop")
    flag("--study", str, None, "make all runs of a study under --out_dir (default: out/ and its name), "
         "one thread each and as many at once as there are cores, without repeating what is complete; "
         "then print its table and draw its pictures", choices=("headline",))
    flag("--quick", bool, False, "with --study: middle settings instead of tuning, a higher target, one seed; "
         "minutes instead of hours")
    flag("--sample", int, 200, "tokens of text to generate at the end; 0 = none")
    return p


def resolve(argv):
    """Flags -> settings with every default filled in, and the set of flags that were given. Raises UsageError."""
    parser, missing = build_parser(), object()
    args = parser.parse_args(argv)
    marked = parser.parse_args(argv, argparse.Namespace(**{k: missing for k in vars(args)}))
    given = {k for k, v in vars(marked).items() if v is not missing}
    by_cg = args.solver == "cg" or (args.solver is None and given & CG_ONLY)       # a flag of CG's asks for CG
    for key, value in RUN_DEFAULTS["baseline" if args.opt not in GN else "cg" if by_cg else "gn"].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    # What was not asked for gives way to what was; what was asked for and does not go together, GaussNewton refuses.
    yielding = {"geodesic": False} if args.solver != "cg" else {}
    if args.power != 1:
        yielding = {"geodesic": False, "precond": "none", "damping_metric": "identity", "local_model": "gn"}
    for key, value in yielding.items():
        if key not in given:
            setattr(args, key, value)
    for key in ("steps", "batch_tokens", "micro_batch", "threads", "cg_iters", "newton_steps", "inner_tokens", "shards",
                "precond_interval", "search_candidates", "max_rejections", "eval_interval", "eval_tokens",
                "checkpoint_interval", "precondition_frequency"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UsageError(f"--{key} must be at least 1, got {getattr(args, key)}")
    for key in ("damping", "lr", "inner_lr"):
        if getattr(args, key) is not None and not 0 < getattr(args, key) < 1e38:         # float32 ends at 3.4e38
            raise UsageError(f"--{key} must be positive and below 1e38, got {getattr(args, key)}")
    for key in ("cg_tol", "cg_rtol", "warm_start", "warmup_steps", "clip", "weight_decay", "cache_gb", "sample", "seed",
                "inner_warmup", "inner_weight_decay", "inner_clip", "inner_l2", "inner_average"):
        if getattr(args, key) is not None and not 0 <= getattr(args, key) < math.inf:
            raise UsageError(f"--{key} must not be negative, got {getattr(args, key)}")
    if args.seed >= 2 ** 63:
        raise UsageError(f"--seed must be below 2^63, got {args.seed}")
    if args.target_loss is not None and math.isnan(args.target_loss):
        raise UsageError("--target_loss must be a number, got nan")
    for key in ("precond_frac", "curvature_frac", "search_frac"):
        if not 0 < getattr(args, key) <= 1:
            raise UsageError(f"--{key} must be above 0 and at most 1, got {getattr(args, key)}")
    for key, value in [("ema", args.ema), ("momentum", args.momentum), *(("betas", b) for b in args.betas or ())]:
        if value is not None and not 0 <= value < 1:
            raise UsageError(f"--{key} must be at least 0 and below 1, got {value}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as e:
        raise UsageError(f"--device {args.device} cannot be used: {str(e).splitlines()[0]}") from e
    return args, given


def stored_settings(args, given):
    """For --resume: the stored run's settings and its checkpoint, changed only where RESUMABLE flags were given."""
    if args.out_dir is None:
        raise UsageError("--resume needs the run's --out_dir")
    checkpoint = load_checkpoint(args.out_dir)
    stored = argparse.Namespace(**checkpoint["config"])
    for key in sorted(given):
        if key in RESUMABLE:
            setattr(stored, key, getattr(args, key))
        elif getattr(args, key) != getattr(stored, key, None):
            raise UsageError(f"--{key} {getattr(args, key)} differs from the stored run's "
                             f"{getattr(stored, key, None)}; --resume may change only "
                             f"{', '.join('--' + k for k in sorted(RESUMABLE - {'resume', 'out_dir'}))}")
    stored.resume, stored.overwrite, stored.out_dir = True, False, args.out_dir
    if "device" not in given:
        stored.device = args.device
    return stored, checkpoint


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


# of a checkpoint; raise it whenever an older program could not read a newer one, or the other way round
FORMAT = 3


def load_checkpoint(path):
    """The dict in a checkpoint file, or in checkpoint.pt of a folder, every byte checked. Raises UsageError."""
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint at {path}")
    try:
        return read_checkpoint(path)
    except Exception as e:
        previous, offer = path.with_name("checkpoint.previous.pt"), ""
        if path.name == "checkpoint.pt":
            with suppress(Exception):
                offer = (f"; the one before it, of step {read_checkpoint(previous)['progress']['step']}, is whole: "
                         f"copy {previous} over it")
        told = e if isinstance(e, UsageError) else f"is no checkpoint of this program, or damaged ({type(e).__name__})"
        raise UsageError(f"{path} {told}{offer}") from e


def read_checkpoint(path):
    # torch.load does not compare the checksums that torch.save wrote
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["format"] != FORMAT:
        raise UsageError(f"has format {checkpoint['format']}, and this program reads format {FORMAT}")
    return {k: checkpoint[k] for k in ("config", "model_config", "model", "optimizer", "ema", "progress")}


def save_checkpoint(path, **content):
    """Written under a temporary name and renamed: whatever happens, checkpoint.pt is whole; the one before it is kept
    beside it. Raises OSError."""
    temp, previous = path.with_suffix(".tmp"), path.with_name("checkpoint.previous.pt")
    try:
        with open(temp, "wb") as f:
            torch.save({"format": FORMAT, **content}, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:                # torch's writer turns the one into the other
        with suppress(OSError):
            temp.unlink()
        raise OSError(f"cannot write {path} ({str(e).splitlines()[0]}); what is there is as it was") from e
    if path.exists():
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError:                                 # a file system without links
            shutil.copyfile(path, previous)
    os.replace(temp, path)


# ---------------------------------------------------------------------------------------------------------------------
# One step of any optimizer: step(idx, targets) -> record

STEP_FIELDS = dict.fromkeys(  # in every row of every method, null where it has no such thing
    ("predicted", "actual", "actual_fresh", "rho", "alpha", "damping", "cosine", "step_norm", "layer_norms", "products",
     "cg_iterations", "cg_reason", "repaired"))


class FirstOrder:
    """A baseline behind the interface of GaussNewton: gradient in pieces, clipping, schedule, one optimizer step."""

    def __init__(self, model, args):
        self.model, self.params, self.args = model, trainable(model), args
        self.optimizer = make_optimizer(args.opt, model, args.lr, args.weight_decay, args.betas, args.momentum,
                                        args.precondition_frequency)
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.steps, self.rejections = 0, 0

    def step(self, idx, targets, search=None):
        args = self.args
        factor = lr_schedule(self.steps, max(args.steps, self.steps + 1), args.schedule, args.warmup_steps)
        for group, lr in zip(self.optimizer.param_groups, self.base):
            group["lr"] = lr * factor
        loss, grad = batch_grad(self.model, idx, targets, args.micro_batch)
        norm, self.steps = grad.norm().item(), self.steps + 1
        record = {"accepted": False, "reason": "", "loss": loss, "grad_norm": norm, "lr": self.base[0] * factor,
                  "alpha": 1.0, "work": 1.0}
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.rejections += 1
            return {**record, "reason": "loss or gradient not finite"}
        if hasattr(self.optimizer, "observe"):          # kfac: curvature from this batch
            record["work"] += self.optimizer.observe(idx, targets, args.micro_batch)
            record["repaired"] = self.optimizer.kfac.repaired or None
        clipped = grad * (args.clip / norm) if args.clip and norm > args.clip else grad
        for p, g in zip(self.params, unflatten(clipped, self.params)):
            p.grad = g
        before = flatten([p.detach() for p in self.params])
        self.optimizer.step()
        d, alpha = flatten([p.detach() for p in self.params]) - before, 1.0
        slope, length = grad.dot(d).item(), d.norm().item()
        if not math.isfinite(length):
            assign(self.params, unflatten(before, self.params))
            self.rejections += 1
            return {**record, "reason": "step not finite"}
        if args.line_search != "none":                  # along the optimizer's own step, which may also be refused
            rows = math.ceil(args.search_frac * len(idx))
            x, y = search or (idx[-rows:], targets[-rows:])

            def loss_at(alpha):
                record["work"] += y.numel() / targets.numel() / 3
                with weights(self.params, unflatten(before + alpha * d, self.params)):
                    return batch_loss(self.model, x, y, args.micro_batch)
            loss0 = loss if search is None and rows == len(idx) else loss_at(0.0)
            found = line_search(loss_at, loss0, slope, args.line_search, args.search_candidates)
            alpha = found.alpha
            assign(self.params, unflatten(before + alpha * d if alpha else before, self.params))
            record.update(alpha=alpha, search_loss0=loss0, search_loss=found.loss, search_tries=found.tries)
            if search is None and alpha:
                record["actual"] = found.loss - loss0
            if not alpha:
                self.rejections += 1
                return {**record, "reason": f"line search: {found.reason}"}
        # A first-order method promises what its gradient does.
        record.update(predicted=alpha * slope, cosine=-slope / (norm * length + 1e-30), step_norm=alpha * length)
        self.rejections = 0
        return {**record, "accepted": True}

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps, "rejections": self.rejections}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps, self.rejections = state["steps"], state["rejections"]


def make_stepper(model, args, progress):
    if args.opt in BASELINES:
        return FirstOrder(model, args)
    settings = dict(local_model=args.local_model)
    if args.solver == "cg":
        for key in ("newton_steps", "cg_iters", "damping", "precond", "curvature_frac", "micro_batch", "cache_gb", "seed"):
            settings[key] = getattr(args, key)
        solver = ConjugateGradients(model, **settings)
    else:
        solver = InnerSolver(model, args.solver, args.inner_tokens // model.config.block_size, args.inner_lr,
                             schedule=args.inner_schedule, warmup=args.inner_warmup, outer_steps=args.steps,
                             reset=args.inner_reset, compile=args.compile, **settings)
    parts = model.layers() if args.opt == "layerwise_gn" else None
    return GaussNewton(model, solver, parts, args.line_search, args.search_frac, args.micro_batch, progress)


# ---------------------------------------------------------------------------------------------------------------------
# What a person sees


def say(text=""):
    if ranks()[0] == 0:
        print(f"{text}\n", end="", flush=True)     # one write, so that the lines of a study's threads stay whole


def duration(seconds):
    s = int(round(seconds))
    return f"{s}s" if s < 100 else f"{s // 60}m{s % 60:02d}s" if s < 6000 else f"{s // 3600}h{s % 3600 // 60:02d}m"


class Bar:
    """Where a long step stands, on one line that the step's own line replaces; silent unless the output is a
    terminal."""

    def __init__(self):
        self.on, self.start, self.head, self.width = sys.stdout.isatty() and ranks()[0] == 0, time.time(), "", 0

    def begin(self, head):
        self.head, self.start = head, time.time()

    def __call__(self, what, done=0, total=0):
        if not self.on:
            return
        text = f"{self.head} | {what}"
        if total:
            filled = min(20, 20 * done // total)
            text += f" [{'#' * filled}{'.' * (20 - filled)}] {done}/{total}"
            if done:
                text += f" | eta {duration((time.time() - self.start) * (total - done) / done)}"
        self.width = max(self.width, len(text))
        print("\r" + text.ljust(self.width), end="", flush=True)

    def clear(self):
        if self.on and self.width:
            print("\r" + " " * self.width + "\r", end="", flush=True)
            self.width = 0


def step_line(row, steps, batch_tokens, remaining):
    parts = [f"step {row['step']}/{steps}",
             f"loss {row['train_loss']:.3f}" if row["train_loss"] is not None else "loss nan"]
    if row["val_loss"] is not None:
        parts.append(f"val {row['val_loss']:.3f}")
    if row["predicted"] is not None:                    # actual of predicted, and on data that the step has not seen
        known = [f"{k} {row[key]:+.3f}" for k, key in (("fell", "actual"), ("fresh", "actual_fresh"))
                 if row[key] is not None]
        parts.append(", ".join([*known, f"model {row['predicted']:+.3f}"]))
    if row["cg_iterations"] is not None:
        parts.append(f"cg {row['cg_iterations']} ({row['cg_reason']}), {row['products']} products | "
                     f"damping {row['damping']:.1e}")
    if "inner_steps" in row:
        parts.append(f"inner {row['inner_steps']}")
    if "lr" in row:
        parts.append(f"lr {row['lr']:.1e}")
    parts += [f"{name} {row[key]:.2f}" for name, key in (("rho", "rho"), ("alpha", "alpha"), ("cos", "cosine"))
              if row[key] is not None]
    if row["layer_norms"]:
        parts.append("|d| " + " ".join(f"{norm:.2g}" for norm in row["layer_norms"]))
    if row["repaired"]:
        parts.append(f"repaired: {row['repaired']}")
    if not row["accepted"]:
        parts.append(f"REJECTED: {row['reason']}")
    rate = batch_tokens / max(row["step_seconds"], 1e-9)
    parts += [f"work {row['grad_equivalents']:.4g}", f"{row['step_seconds']:.1f} s",
              f"{rate / 1000:.0f}k tok/s" if rate >= 1e4 else f"{rate:.0f} tok/s", f"eta {duration(remaining)}"]
    return " | ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The run


@contextmanager
def process_group(args):
    """Under torchrun: the processes joined, each with a GPU of its own where they run on GPUs. Alone: nothing."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if torch.device(args.device).type == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if torch.device(args.device).type == "cuda" else "gloo")
    yield
    dist.destroy_process_group()


def first_alone(function, again=False):
    """What touches the disk: process 0 calls function() while the others wait; then they call it too, or else take its
    result. What it cannot do there is every process's UsageError."""
    if ranks()[1] == 1:
        return function()
    told = [None, None]
    if ranks()[0] == 0:
        try:
            result = function()
            told = [None, None if again else result]
        except (UsageError, DataError) as e:
            told = [str(e), None]
    dist.broadcast_object_list(told)
    if told[0] is not None:
        raise UsageError(told[0])
    return result if ranks()[0] == 0 else function() if again else told[1]


def check_shares(args, batch_rows, val_rows):
    """Raises UsageError where there would be processes without a sequence to work on."""
    def part(rows, share):
        return math.ceil(share * rows)
    rows = {"--batch_tokens": batch_rows, "--eval_tokens": val_rows}
    if args.line_search != "none":
        rows["the line search (--search_frac)"] = part(batch_rows, args.search_frac)
    if args.opt in GN and args.solver != "cg":
        inner = args.inner_tokens * batch_rows // args.batch_tokens
        rows["an inner step (--inner_tokens)"] = min(inner, batch_rows % inner or inner)
    elif args.opt in GN:
        rows["--curvature_frac"] = curved = part(batch_rows, args.curvature_frac)
        if args.precond == "kfac" or args.damping_metric == "kfac":
            rows["K-FAC (--precond_frac)"] = part(curved, args.precond_frac)
    elif args.opt == "kfac":
        rows["K-FAC"] = part(batch_rows, 0.25)
    for what, n in rows.items():
        if n < ranks()[1]:
            raise UsageError(f"{what} has {n} sequence{'s' * (n != 1)} for {ranks()[1]} processes")


def check_equal(params, step):
    """Raises RuntimeError where the processes' parameters differ in a bit: what they replicate has come apart."""
    if ranks()[1] > 1:
        digests = [None] * ranks()[1]
        dist.all_gather_object(digests, hashlib.sha256(b"".join(
            p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for p in params)).hexdigest())
        odd = [i for i, d in enumerate(digests) if d != digests[0]]
        if odd:
            raise RuntimeError(f"after step {step} the parameters of process {', '.join(map(str, odd))} are not those "
                               "of process 0; the last checkpoint is whole")


def tune_allocator():
    """Keep freed memory (glibc only). Its default gives every large tensor back to the system at once and takes the
    page faults again at the next: a fifth of a gradient's time at the tiny size."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)          # M_TRIM_THRESHOLD: never
        mallopt(-3, 1 << 30)     # M_MMAP_THRESHOLD
    except (OSError, AttributeError):
        pass


def peak_memory_mb(device):
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return None if resource is None else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                                          * (1 / 1e6 if sys.platform == "darwin" else 1 / 1e3))


@contextmanager
def stop_on_signal():
    """A dict that turns true in "stop" at the first Ctrl-C or SIGTERM; a second one interrupts at once."""
    state = {"stop": False}

    def handler(number, frame):
        if state["stop"]:
            raise KeyboardInterrupt
        state["stop"] = True
        say("\nstopping after this step, with a checkpoint (once more: at once, from the last one)")
    old = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            old[number] = signal.signal(number, handler)
        except ValueError:       # not in the main thread
            pass
    try:
        yield state
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


@contextmanager
def weights(params, values):
    """The model with other weights for a while; None leaves it alone."""
    if values is None:
        yield
        return
    kept = [p.detach().clone() for p in params]
    assign(params, values)
    try:
        yield
    finally:
        assign(params, kept)


def open_out_dir(args):
    """The run's folder: a fresh one under out/, or the named one if there is no run to lose in it."""
    if args.out_dir is None:
        name = Path("out") / f"{args.opt}-{args.model}-{time.strftime('%m%d-%H%M%S')}"
        args.out_dir = next(str(p) for i in range(1, 1000) for p in [name if i == 1 else Path(f"{name}-{i}")]
                            if not p.exists())
    out = Path(args.out_dir)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out_dir {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not (args.resume or args.overwrite):
        raise UsageError(f"--out_dir {out} is not empty; give --resume to go on with its run "
                         "or --overwrite to replace it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if args.overwrite:
            for name in ("log.jsonl", "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.tmp"):
                (out / name).unlink(missing_ok=True)
    except OSError as e:
        raise UsageError(f"--out_dir {out} cannot be used: {e}") from e
    return out


def build_model(args, vocab_size):
    settings = {**PRESETS[args.model], **{k: getattr(args, k) for k in ("n_layer", "n_head", "n_embd", "block_size")
                                          if getattr(args, k) is not None}}
    try:
        config = GPTConfig(vocab_size=vocab_size, tie_weights=args.tie_weights, **settings)
    except ValueError as e:
        raise UsageError(str(e)) from e
    if args.batch_tokens % config.block_size:
        raise UsageError(f"--batch_tokens {args.batch_tokens} is not a multiple of the block size {config.block_size}")
    if args.solver != "cg" and args.inner_tokens % config.block_size:
        raise UsageError(f"--inner_tokens {args.inner_tokens} is not a multiple of the block size {config.block_size}")
    torch.manual_seed(args.seed)
    return GPT(config)


def load_weights(model, checkpoint, source):
    theirs, ours = checkpoint["model_config"], vars(model.config)
    differ = [f"{k} {theirs.get(k)} there and {ours[k]} here" for k in ours if theirs.get(k) != ours[k]]
    if differ:
        raise UsageError(f"the model in {source} is another one: {', '.join(differ)}")
    model.load_state_dict(checkpoint["model"])


def run(args, given, checkpoint):
    if args.threads:
        torch.set_num_threads(args.threads)
    tune_allocator()
    torch.set_float32_matmul_precision("high" if args.dtype == "tf32" else "highest")
    bar = Bar()
    block_size = args.block_size or PRESETS[args.model]["block_size"]
    data = first_alone(lambda: prepare(args.data, args.tokenizer, args.data_dir, block_size,
                                       lambda done, total: bar("data, MB", done >> 20, (total or 0) >> 20),
                                       shards=args.shards), again=True)
    bar.clear()
    model = build_model(args, data.vocab_size)
    if checkpoint:
        load_weights(model, checkpoint, args.out_dir)
    elif args.init_from:
        load_weights(model, load_checkpoint(args.init_from), args.init_from)
    model.to(args.device)
    model.bf16 = args.dtype == "bf16"
    params, batch_rows = trainable(model), args.batch_tokens // block_size
    # logits of a piece stay under 256 MB, and it fits a CPU's caches; a GPU wants larger ones
    if args.micro_batch is None:
        many = (max(8192, 2 ** 23 // (model.config.n_layer * model.config.n_embd))
                if torch.device(args.device).type == "cuda" else 8192)
        args.micro_batch = max(1, min(many, 2 ** 26 // data.vocab_size) // block_size)
    try:
        stepper = make_stepper(model, args, bar)
    except ValueError as e:                             # settings that do not go together
        raise UsageError(str(e)) from e
    ema = [p.detach().clone() for p in params] if args.ema else None
    val = [t.to(args.device) for t in val_batch(data.val, block_size, args.eval_tokens)]
    check_shares(args, batch_rows, len(val[0]))
    progress = {"step": 0, "tokens": 0, "distinct_tokens": 0, "grad_equivalents": 0.0, "seconds": 0.0,
                "val_loss": None, "evaluated": 0}
    if checkpoint:
        stepper.load_state_dict(checkpoint["optimizer"])
        ema, progress = checkpoint["ema"], checkpoint["progress"]
        ema = ema and [e.to(args.device) for e in ema]
    out = first_alone(lambda: open_out_dir(args))
    path, (rank, processes) = out / "checkpoint.pt", ranks()
    n_params, device = sum(p.numel() for p in params), args.device
    name = (torch.cuda.get_device_name(device) if torch.device(device).type == "cuda"
            else f"cpu, {torch.get_num_threads()} thread(s)")
    name = f"{processes} processes, {name} each" if processes > 1 else name

    say(f"{args.opt} | {args.model} GPT, {n_params:,} parameters | {name}, torch {torch.__version__} | "
        f"seed {args.seed}")
    say(f"data: {args.data}, {data.meta['documents']:,} documents, {len(data.train):,} training and "
        f"{len(data.val):,} validation tokens ({args.tokenizer}), sha256 {data.meta['sha256'][:12]}")
    say(f"batch: {args.batch_tokens:,} tokens = {batch_rows:,} x {block_size} | "
        f"guessing evenly is a loss of {math.log(data.vocab_size):.3f} nats per token")
    unused = sorted(given & (GN_ONLY if args.opt not in GN
                             else BASELINE_ONLY | (INNER_ONLY if args.solver == "cg" else CG_ONLY)))
    if unused:
        say(f"note: {args.opt}{f' by {args.solver}' * (args.opt in GN)} does not use "
            f"{', '.join('--' + k for k in unused)}")

    def evaluate():
        bar("evaluate")
        with weights(params, ema):
            return batch_loss(model, *val, args.micro_batch)

    def batch(stream, step, rows=batch_rows):
        return [t.to(device) for t in get_batch(data.train, block_size, rows, args.seed, step, stream=stream)]

    def save():
        check_equal(params, progress["step"])
        state = stepper.state_dict()                    # for all processes to call: each may hold a part
        if rank == 0:
            save_checkpoint(path, config=vars(args), model_config=vars(model.config), model=model.state_dict(),
                            optimizer=state, ema=ema, progress=progress)

    logged = out / "log.jsonl" if rank == 0 else Path(os.devnull)
    kept, last = lines_until(logged, progress["step"]) if checkpoint else (0, None)
    with open(logged, "r+" if kept else "w") as log, stop_on_signal() as signals:
        if kept:
            log.truncate(kept)
            log.seek(0, os.SEEK_END)
        else:
            header = {"config": vars(args), "parameters": n_params, "torch": torch.__version__,
                      "python": platform.python_version(), "device": name, "threads": torch.get_num_threads(),
                      "model": vars(model.config), "data": data.meta,
                      "command": shlex.join(["python", "train.py",
                                             *(sys.argv[1:] if args.argv is None else args.argv)])}
            log.write(json.dumps(header) + "\n")
        if checkpoint:
            say(f"resuming {out} after step {progress['step']}")
            if last != progress["step"]:
                say(f"note: {logged} lacks rows up to this step; it goes on after what is whole in it")
        else:
            progress["val_loss"] = evaluate()
            bar.clear()
            say(f"step 0/{args.steps} | val {progress['val_loss']:.3f}")
            write_row(log, {"step": 0, "tokens": 0, "distinct_tokens": 0, "train_loss": None,
                            "val_loss": progress["val_loss"], "seconds": 0.0, "grad_equivalents": 0.0})
            save()
        status, stopping, began, first, layers = 0, False, time.time(), progress["step"], model.layers()
        reached = (args.target_loss is not None and progress["val_loss"] is not None
                   and progress["val_loss"] <= args.target_loss)
        while progress["step"] < args.steps and not reached and not stopping:
            step, start = progress["step"], time.time()
            bar.begin(f"step {step + 1}/{args.steps}")
            extra = {}                                  # fresh data, each kind from a stream of its own
            if args.opt in GN and args.curvature_data == "fresh":
                extra["curvature"] = batch(1, step, math.ceil(args.curvature_frac * batch_rows))
            if args.line_search != "none" and args.line_search_data == "fresh":
                extra["search"] = batch(2, step, math.ceil(args.search_frac * batch_rows))
            before, (x, y) = [p.detach().clone() for p in params], batch(0, step)
            record = {**STEP_FIELDS, **stepper.step(x, y, **extra)}
            if ema:
                torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - args.ema)
            seconds = time.time() - start
            progress["step"] = step = step + 1
            progress["tokens"] += args.batch_tokens
            progress["distinct_tokens"] += args.batch_tokens + sum(y.numel() for _, y in extra.values())
            progress["grad_equivalents"] += record.pop("work")
            progress["seconds"] += seconds
            stopping, given_up = bool(reduce_number(signals["stop"])), stepper.rejections >= args.max_rejections
            due = step % args.eval_interval == 0 or step == args.steps or given_up or stopping
            val_loss = evaluate() if due else None
            bar.clear()
            if record["accepted"]:
                moved = dict(zip(params, torch._foreach_sub(params, before)))
                record["layer_norms"] = [flatten([moved[p] for p in layer]).norm().item() for layer in layers]
                if "search" in extra:
                    record["actual_fresh"] = record["search_loss"] - record["search_loss0"]
                elif due and progress["evaluated"] == step - 1 and not ema:
                    # the validation sample, before and after this step
                    record["actual_fresh"] = val_loss - progress["val_loss"]
                # a baseline without line search: like evaluation, outside its time and work
                if due and record["actual"] is None:
                    record["actual"] = batch_loss(model, x, y, args.micro_batch) - record["loss"]
                if record["actual"] is not None and record["rho"] is None:
                    record["rho"] = record["actual"] / record["predicted"] if record["predicted"] < 0 else 0.0
            if due:
                progress["val_loss"], progress["evaluated"] = val_loss, step
            reached = due and args.target_loss is not None and val_loss <= args.target_loss
            row = {"step": step, "tokens": progress["tokens"], "distinct_tokens": progress["distinct_tokens"],
                   "train_loss": record.pop("loss", None), "val_loss": val_loss, "seconds": progress["seconds"],
                   "step_seconds": seconds, "grad_equivalents": progress["grad_equivalents"], **record,
                   "peak_memory_mb": peak_memory_mb(device)}
            write_row(log, row)
            remaining = (time.time() - began) / (step - first) * (args.steps - step)
            say(step_line(row, args.steps, args.batch_tokens, remaining))
            if step % args.checkpoint_interval == 0 or step == args.steps or reached or given_up or stopping:
                save()
            if given_up:
                say(f"stopped: {stepper.rejections} steps in a row were rejected, the last because of: "
                    f"{record['reason']}; {path} holds the parameters before them")
                status = 1
                break
    finish(args, model, data, progress, reached, stopping, path)
    return status


def lines_until(path, step):
    """How many bytes of a log are whole lines up to this step's, and the step of the last of them."""
    size, last = 0, None
    with suppress(FileNotFoundError, ValueError):       # ValueError: a line that was cut off
        for line in path.read_bytes().splitlines(keepends=True):
            row = json.loads(line)
            if row.get("step", 0) > step or not line.endswith(b"\n"):
                break
            size, last = size + len(line), row.get("step")
    return size, last


def write_row(log, row):
    """One JSON line, on disk before the next step; what is not finite is null, as JSON has no other word for it."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    try:
        log.write(json.dumps(clean) + "\n")
        log.flush()
    except OSError as e:
        raise OSError(f"cannot write {log.name} ({e.strerror}); its last checkpoint is whole") from e


def finish(args, model, data, progress, reached, stopped, path):
    """The closing lines: what was reached and at what cost, where it lies, and some text of the model's own."""
    cost = (f"{progress['step']} steps, {progress['tokens']:,} tokens, "
            f"{progress['grad_equivalents']:.0f} gradient-equivalents, {duration(progress['seconds'])}")
    if reached:
        say(f"target {args.target_loss:g} reached: val {progress['val_loss']:.4f} after {cost}")
    elif args.target_loss is not None:
        say(f"target {args.target_loss:g} not reached in {cost}")
    else:
        say(f"val {progress['val_loss']:.4f} after {cost}")
    say(f"records: {path.parent}/log.jsonl and {path.name}" +
        (f"; go on with: python train.py --resume --out_dir {path.parent}" if stopped else ""))
    if args.sample and not stopped and ranks()[0] == 0:
        start = torch.tensor([data.encoding.encode_ordinary("\n")], device=args.device)
        generator = torch.Generator(device=args.device).manual_seed(args.seed)
        tokens = model.generate(start, args.sample, generator=generator)[0].tolist()
        say(f"\n{args.sample} tokens from the model:\n" + data.encoding.decode(tokens).strip("\n"))


# ---------------------------------------------------------------------------------------------------------------------
# Comparing runs

# Settings in which runs of one configuration may differ.
INCIDENTAL = RESUMABLE | {"bench", "study", "quick", "seed", "init_from", "overwrite", "argv", "compare", "plot",
                          "micro_batch", "eval_interval"}


def read_run(folder):
    """(configuration line, rows, those of them that were evaluated) of a run's log.jsonl."""
    path = Path(folder) / "log.jsonl"
    try:
        *lines, last = path.read_text().splitlines()
        lines = [json.loads(line) for line in lines]
        with suppress(ValueError):                      # cut off, where the run was killed
            lines.append(json.loads(last))
        head, *rows = lines
        evaluated = [r for r in rows if r["val_loss"] is not None]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(f"{path} cannot be read as a run's log ({type(e).__name__})") from e
    if not evaluated:
        raise UsageError(f"{path} holds no evaluation yet")
    return head, rows, evaluated


def mean_and_error(values):
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.4g}{error}"


def compare(folders, targets=(), plot=None):
    """Print, for each configuration (its seeds together) and target loss, the steps, tokens, gradients and seconds to
    the first evaluation at or below it: mean ± standard error. A gradient is one over a million tokens, so that batches
    compare."""
    groups = {}
    for folder in folders:
        head, _, rows = read_run(folder)
        foreign = BASELINE_ONLY if head["config"]["opt"] in GN else GN_ONLY
        key = json.dumps({k: v for k, v in head["config"].items() if k not in INCIDENTAL | foreign}, sort_keys=True)
        groups.setdefault(key, []).append((folder, head["config"], rows))
    configs = {key: json.loads(key) for key in groups}

    def name(key):       # the optimizer, and what tells its configurations apart
        c, same = configs[key], [o for o in configs.values() if o["opt"] == configs[key]["opt"]]
        return c["opt"] + "".join(f" {k}={c[k]}" for k in sorted(c) if any(o.get(k) != c[k] for o in same))
    names = {key: name(key) for key in groups}
    if not targets:      # what every run reached, rounded up, and two above
        best = max(min(r["val_loss"] for r in rows) for runs in groups.values() for _, _, rows in runs)
        targets = [math.ceil(best * 20) / 20 + extra for extra in (0.4, 0.2, 0.0)]
    table = [("target", "configuration", "runs", "steps", "tokens", "gradients of 1M tokens", "seconds")]
    for target in targets:
        for key, runs in groups.items():
            hits = [(next((r for r in rows if r["val_loss"] <= target), None), config, rows)
                    for _, config, rows in runs]
            found = [(r, c) for r, c, _ in hits if r]
            if len(found) < len(hits):
                cells = [f"> {max(rows[-1]['step'] for r, _, rows in hits if not r)}", "", "", ""]
            else:
                cells = [mean_and_error([r["step"] for r, _ in found]), mean_and_error([r["tokens"] for r, _ in found]),
                         mean_and_error([r["grad_equivalents"] * c["batch_tokens"] / 1e6 for r, c in found]),
                         mean_and_error([r["seconds"] for r, _ in found])]
            table.append((f"{target:.2f}", names[key], f"{len(found)}/{len(hits)}", *cells))
    print_table(table)
    if plot:
        draw({names[key]: runs for key, runs in groups.items()}, plot)
        say(f"drawn: {plot}")


def print_table(table):
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        say("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip())


def draw(groups, path):
    """Loss of every run in groups, {name: [(folder, configuration, rows)]}, against steps, tokens and work."""
    views = (("outer steps", lambda r, c: r["step"]), ("tokens", lambda r, c: r["tokens"]),
             ("work, in gradients of 1M tokens", lambda r, c: r["grad_equivalents"] * c["batch_tokens"] / 1e6))
    chart(path, [(label, {name: [[(view(r, c), r["val_loss"]) for r in rows if r["step"] > 0] for _, c, rows in runs]
                          for name, runs in groups.items()})
                 for label, view in views], "validation loss, nats per token")


COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b",
           "#17becf", "#e377c2", "#7f7f7f", "#bcbd22", "#000000", "#aa8800", "#393b79", "#f7a8a0")


def ticks(low, high, log):
    """Round numbers in [low, high]: on a logarithmic axis 1, 2 and 5 times powers of ten, else some five even ones."""
    if log:
        found = [m * 10.0 ** e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
                 for m in (1, 2, 5)]
        found = [t for t in found if low <= t <= high]
        return found if len(found) < 8 else [t for t in found if f"{t:e}"[0] == "1"]
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span))
    step *= next(m for m in (1, 0.5, 0.2, 0.1) if span / (m * step) >= 4)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(path, panels, y_label, x_log=True, y_log=False, marks=False, names=(), y_max=math.inf):
    """An SVG picture of lines: panels [(x label, {name: [curve, ...]})], a curve being [(x, y), ...]; the panels share
    names, colours and y. Pictures that are given the same `names` share colours too; above y_max lines are cut off."""
    if Path(path).suffix != ".svg":
        raise UsageError(f"--plot writes .svg, not {path}")
    panels = [(label, {name: [c for c in curves if c] for name, curves in lines.items() if any(curves)})
              for label, lines in panels]
    names = dict.fromkeys([*names, *(name for _, lines in panels for name in lines)])
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    names = [name for name in names if any(name in lines for _, lines in panels)]
    points = [p for _, lines in panels for curves in lines.values() for c in curves for p in c]
    if not points:
        raise UsageError(f"nothing to draw into {path}: no run has made a step")
    wide, high, left, top = 360 if len(panels) > 1 else 620, 300, 62, 14
    entry = max(205, 40 + 7 * max(map(len, names)))     # width of a name in the legend
    columns = max(1, len(panels) * (wide + 40) // entry)
    y0, y1 = min(y for _, y in points), min(y_max, max(y for _, y in points))
    height = high + 62 + 16 * -(-len(names) // columns)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + len(panels) * (wide + 40)} {height}" '
           f'width="{left + len(panels) * (wide + 40)}" font-family="sans-serif" font-size="12" fill="#333">'
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text transform="translate(14 {top + high / 2}) rotate(-90)" text-anchor="middle">{y_label}</text>']

    def place(value, low, high, log):                   # into 0 .. 1
        if log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / ((high - low) or 1)
    for i, (label, lines) in enumerate(panels):
        at, mine = left + i * (wide + 40), [p for curves in lines.values() for c in curves for p in c]
        x0, x1 = min(x for x, _ in mine), max(x for x, _ in mine)

        def xy(x, y):
            return f"{at + wide * place(x, x0, x1, x_log):.1f},{top + high * (1 - place(y, y0, y1, y_log)):.1f}"
        for t in ticks(x0, x1, x_log):
            x = at + wide * place(t, x0, x1, x_log)
            text = f"{t / 1e6:g}M" if t >= 1e6 else f"{t / 1e3:g}k" if t >= 1e3 else f"{t:g}"
            out.append(f'<path d="M{x:.1f} {top}v{high}" stroke="#ddd"/>'
                       f'<text x="{x:.1f}" y="{top + high + 16}" text-anchor="middle">{text}</text>')
        for t in ticks(y0, y1, y_log):
            y = top + high * (1 - place(t, y0, y1, y_log))
            out.append(f'<path d="M{at} {y:.1f}h{wide}" stroke="#ddd"/>'
                       + f'<text x="{at - 6}" y="{y + 4:.1f}" text-anchor="end">{t:g}</text>' * (i == 0))
        out.append(f'<clipPath id="panel{i}"><rect x="{at - 4}" y="{top}" width="{wide + 8}" height="{high + 4}"/>'
                   '</clipPath>')
        for name in reversed(names):                    # the first on top
            for curve in lines.get(name, []):
                out.append(f'<polyline points="{" ".join(xy(x, y) for x, y in curve)}" fill="none" '
                           f'stroke="{colours[name]}" stroke-width="1.6" clip-path="url(#panel{i})"/>')
                if marks:
                    out += [f'<circle cx="{p[0]}" cy="{p[1]}" r="3" fill="{colours[name]}"/>'
                            for p in (xy(x, y).split(",") for x, y in curve)]
        out.append(f'<rect x="{at}" y="{top}" width="{wide}" height="{high}" fill="none" stroke="#333"/>'
                   f'<text x="{at + wide / 2}" y="{top + high + 36}" text-anchor="middle">{label}</text>')
    for i, name in enumerate(names):
        x, y = left + i % columns * entry, top + high + 56 + 16 * (i // columns)
        out.append(f'<path d="M{x:.0f} {y - 4}h18" stroke="{colours[name]}" stroke-width="2.5"/>'
                   f'<text x="{x + 24:.0f}" y="{y}">{html.escape(name)}</text>')
    Path(path).write_text("\n".join(out) + "\n</svg>\n")


# ---------------------------------------------------------------------------------------------------------------------
# The study: outer steps to the same validation loss, every method tuned alike

class Method(NamedTuple):
    flags: str
    rate: str          # the flag that is tuned first, and four values; --quick takes the first
    rates: tuple
    knob: str          # the method's one other setting, and values beside the default
    values: tuple
    batch: int         # in tokens, beyond its critical one


# From AdamW's curve alone: its loss after 100 steps at a constant rate, and one for which it needs over 500 even with
# a decay.
TARGETS = {"steep": 1.60, "slow": 1.33, "quick": 1.75}
WARMUP = "--opt adamw --lr 3e-3 --steps 60"
BEST_GN, MILLION = "prox-linear GN, inner SOAP", 2 ** 20
STUDY = {  # the longest runs first
    "prox-linear GN, CG": Method("--opt full_gn --solver cg", "damping", (0.3, 0.03, 0.1, 1.0),
                                 "cg_iters", ("6", "12"), MILLION // 4),
    "AdamW": Method("--opt adamw", "lr", (1e-2, 5e-3, 2e-2, 4e-2),
                    "betas", ("0.9 0.99", "0.95 0.95"), MILLION // 4),
    "layerwise GN, inner SOAP": Method("--opt layerwise_gn --solver soap", "inner_lr", (8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
                                       "inner_tokens", ("2048", "8192"), MILLION),
    # Above 6e-2 K-FAC's KL clip sets the length of its step, not the rate: 0.12 and 0.24 make one and the same run, of
    # as many steps.
    "K-FAC": Method("--opt kfac", "lr", (6e-2, 7.5e-3, 1.5e-2, 3e-2),
                    "precondition_frequency", ("1", "3"), MILLION // 4),
    "SOAP": Method("--opt soap", "lr", (2e-2, 5e-3, 1e-2, 4e-2),
                   "precondition_frequency", ("1", "3"), MILLION // 4),
    "Muon": Method("--opt muon", "lr", (4e-2, 1e-2, 2e-2, 8e-2),
                   "momentum", ("0.9", "0.98"), MILLION // 4),
    BEST_GN: Method("--opt full_gn --solver soap", "inner_lr", (8e-3, 2e-3, 4e-3, 1.6e-2),
                    "inner_tokens", ("2048", "8192"), MILLION),
    "prox-linear GN, inner Muon": Method("--opt full_gn --solver muon", "inner_lr", (1e-2, 2.5e-3, 5e-3, 2e-2),
                                         "inner_tokens", ("2048", "8192"), MILLION),
    "GN, inner Muon": Method("--opt full_gn --solver muon --local_model gn", "inner_lr", (1e-2, 2.5e-3, 5e-3, 2e-2),
                             "inner_tokens", ("2048", "8192"), MILLION),
}
SEEDS, BATCHES = (1, 2, 3), tuple(2 ** k for k in range(14, 21))
# The slow target, with a rate that falls over the run: steps, factors on tuned flags, batch, other flags. There the
# noise of its solve is more than what one linearisation can gain, so that a search cuts full GN's steps to a quarter;
# it goes without, and the noise falls with the rate.
SLOW = {
    "K-FAC": (180, {}, MILLION // 4, "--schedule wsd"),
    "Muon": (200, {}, MILLION // 4, "--schedule wsd"),
    "SOAP": (220, {}, MILLION // 4, "--schedule wsd"),
    "AdamW": (560, {}, MILLION // 8, "--schedule wsd"),
    BEST_GN: (22, {"inner_lr": 0.5, "inner_tokens": 2}, 2 * MILLION,
              "--inner_schedule global_cosine --inner_warmup 1024 --line_search none --compile"),
}
RANDOM = ("K-FAC", "Muon", BEST_GN)         # from random initialisation
# what one setting does: ten steps of 262,144 tokens by the best solver, four of 131,072 by CG, forty of baselines
ABLATIONS = {
    "inner": ("--opt full_gn --solver soap --inner_lr 6e-3 --batch_tokens 262144 --steps 10", {
        "as it is": "",
        "no line search": "--line_search none",
        "searched on fresh data": "--line_search_data fresh",
        "searched on the whole batch": "--search_frac 1",
        "each solve from θ (no warm start)": "--inner_reset",
        "inner Muon": "--solver muon",
        "inner AdamW": "--solver adamw",
        "N = 32": "--inner_tokens 8192",
        "N = 128": "--inner_tokens 2048",
        "half the rate": "--inner_lr 3e-3",
        "twice the rate": "--inner_lr 1.2e-2",
        "constant rate, mean of the second half": "--inner_schedule constant --inner_average 0.5",
        "GN model": "--local_model gn",
        "bf16": "--dtype bf16"}),
    "CG": ("--opt full_gn --damping 0.1 --batch_tokens 131072 --steps 4", {
        "as it is": "",
        "GN model, 32 iterations": "--local_model gn --cg_iters 32",
        "no preconditioner": "--precond none",
        "damping λI": "--damping_metric identity --damping 1e-3",
        "4 iterations": "--cg_iters 4",
        "16 iterations": "--cg_iters 16",
        "curvature from 1/8": "--curvature_frac 0.125",
        "curvature from 1/2": "--curvature_frac 0.5",
        "no geodesic correction": "--no-geodesic",
        "no warm start": "--warm_start 0",
        "G^(-1/2)": "--power 0.5 --damping 1e-3 --cg_iters 32",
        "no line search": "--line_search none",
        "searched on fresh data": "--line_search_data fresh",
        "bf16": "--dtype bf16"}),
    "baselines": ("--batch_tokens 131072 --steps 40 --search_frac 0.25", {
        "SOAP": "--opt soap",
        "SOAP, line search": "--opt soap --line_search grid",
        "Muon": "--opt muon --lr 2e-2",
        "Muon, line search": "--opt muon --lr 2e-2 --line_search grid",
        "K-FAC": "--opt kfac",
        "K-FAC, line search": "--opt kfac --line_search grid"}),
}


def score(run):
    """Fewer steps to the target are better; of equal ones the lower loss then; of runs that missed it the lower
    loss."""
    return run["steps"] or math.inf, run["loss"]


def scaled(flags, name, factor):
    """The flags with the number behind --name multiplied."""
    return re.sub(rf"(--{name}) (\S+)", lambda m: f"{m[1]} {factor * float(m[2]):g}", flags)


class Study:
    """The headline study. Each method on its own: tuning at half its batch, for the baselines an ending, three other
    seeds. After that the batches, the slow target, random initialisation and ablations.

    Each run is an ordinary one of this program, in a folder of its own and on one thread, `width` at a time. What is
    complete is not run again, what was cut off goes on, and what a headline.json in `out` has (of an earlier study, or
    another machine) counts as complete. Runs of it that the study does not ask for are kept.
    """

    def __init__(self, out, width, quick):
        self.out, self.quick, self.target = Path(out), quick, TARGETS["quick" if quick else "steep"]
        self.pool, self.started, self.found = ThreadPoolExecutor(width), {}, {}
        record = self.out / "headline.json"
        self.recorded = json.loads(record.read_text())["runs"] if record.exists() else {}
        self.recorded.pop("warmup", None)           # of it a record is not enough: the others start from its checkpoint

    def start(self, name, flags, method, init=True):
        """A future of the run's dict; see `read`. Two calls with one name are one run."""
        name = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-")
        if name not in self.started:
            flags = f"{flags} --threads 1 --sample 0 --data_dir {shlex.quote(str(self.out / 'data'))}"
            flags += f" --init_from {shlex.quote(str(self.out / 'warmup'))}" * init
            self.started[name] = self.pool.submit(self._make, name, shlex.split(flags), method)
        return self.started[name]

    def _make(self, name, flags, method):
        folder = self.out / name
        result = self.read(name)
        if result is None and not folder.exists():
            result = self.recorded.get(name)
        if result is None:
            go_on = ["--resume"] if (folder / "checkpoint.pt").exists() else [*flags, "--overwrite"]
            done = subprocess.run([sys.executable, __file__, *go_on, "--out_dir", str(folder)], capture_output=True,
                                  text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            result = self.read(name)
            if result is None:
                told = done.stderr.strip() or done.stdout.strip() or "no output"
                raise UsageError(f"{folder} ended with {done.returncode}: {told.splitlines()[-1]}")
        run = self.found[name] = {**result, "method": method}
        reached = ""
        if run["target"] is not None:
            reached = (f"{run['target']:g} after {run['steps']} steps, " if run["steps"]
                       else f"> {run['ran']} steps to {run['target']:g}, ")
        say(f"{len(self.found):4d}  {name}: {reached}val {run['loss']:.4f}, {duration(run['seconds'])}")
        return run

    def read(self, name):
        """What a complete run's log holds, in short, or None: steps to its target, tokens, gradients of 1M tokens and
        seconds to there."""
        try:
            head, every, rows = read_run(self.out / name)
        except UsageError:
            return None
        c, rejected = head["config"], 0
        for row in every[1:]:
            rejected = 0 if row["accepted"] else rejected + 1
        hit = next((r for r in rows if c["target_loss"] is not None and r["val_loss"] <= c["target_loss"]), None)
        if not rows or not (hit or rows[-1]["step"] >= c["steps"] or rejected >= c["max_rejections"]):
            return None
        last = hit or rows[-1]
        return {"target": c["target_loss"], "steps": hit and hit["step"], "ran": last["step"], "loss": last["val_loss"],
                "tokens": last["tokens"], "gradients": round(last["grad_equivalents"] * c["batch_tokens"] / 1e6, 3),
                "seconds": round(last["seconds"], 1), "device": head["device"], "torch": head["torch"],
                "command": head["command"], "batch_tokens": c["batch_tokens"],
                "curve": [[r["step"], round(r["val_loss"], 4)] for r in rows if r["step"] <= last["step"]]}

    # ---- what is run ----

    def steep(self, method, flags, batch, seed=0, steps=None):
        own = flags[len(STUDY[method].flags):]
        steps = steps or (20 if "_gn" in flags else 250) * (1 if batch > 65536 else 6 if "_gn" in flags else 2)
        return self.start(f"{method} {own} {batch // 1024}k seed {seed}" + f" {steps}" * ("wsd" in flags),
                          f"{flags} --batch_tokens {batch} --steps {steps} --target_loss {self.target} "
                          f"--eval_interval 1 --seed {seed}", method)

    def slow(self, method, flags, seed=0):
        steps, factors, batch, falling = SLOW[method]
        for name, factor in factors.items():
            flags = scaled(flags, name, factor)
        own = f"{flags[len(STUDY[method].flags):]} {falling}"
        return self.start(f"slow {method} {own} {steps} steps seed {seed}",
                          f"{flags} {falling} --batch_tokens {batch} --steps {steps} "
                          f"--target_loss {TARGETS['slow']} --eval_interval 1 --seed {seed}", method)

    def best(self, tried):
        """The (flags, run) with the best score of {flags: future of a run}."""
        return min(((flags, run.result()) for flags, run in tried.items()), key=lambda pair: score(pair[1]))

    def headline(self, name):
        """Flags of the tuned method, and its runs over seeds."""
        m = STUDY[name]
        if self.quick:
            flags = f"{m.flags} --{m.rate} {m.rates[0]:g}"
            return flags, [self.steep(name, flags, m.batch // (4 if m.rate == "inner_lr" else 2)).result()]
        flags, _ = self.best({f: self.steep(name, f, m.batch // 2)
                              for f in (f"{m.flags} --{m.rate} {r:g}" for r in m.rates)})
        if float(flags.split()[-1]) in (min(m.rates), max(m.rates)):
            say(f"note: {name}: the best rate is at the edge of the grid, {flags.split()[-1]}")
        flags, run = self.best({f: self.steep(name, f, m.batch // 2)
                                for f in (flags, *(f"{flags} --{m.knob} {v}" for v in m.values))})
        ending, steps = flags, None
        if "_gn" not in m.flags:            # a constant rate, an average of the weights, or a decay
            decay = math.ceil(0.85 * (run["steps"] or run["ran"]))
            tried = {f: self.steep(name, f, m.batch) for f in (flags, f"{flags} --ema 0.9")}
            tried[f"{flags} --schedule wsd"] = self.steep(name, f"{flags} --schedule wsd", m.batch, steps=decay)
            ending, _ = self.best(tried)
            steps = decay if "wsd" in ending else None
        return flags, [run.result() for run in [self.steep(name, ending, m.batch, seed, steps) for seed in SEEDS]]

    def batches(self, method, flags):
        """[(batch, steps)]: batches doubled until the steps fall by under a tenth, small ones with half the rate as
        well."""
        found = []
        for size in BATCHES[:3:2] if self.quick else BATCHES:
            factors = (1, 0.5) if size < 2 ** 16 or "_gn" in flags else (1,)
            _, run = self.best({f: self.steep(method, f, size)
                                for f in (scaled(flags, STUDY[method].rate, factor) for factor in factors)})
            found.append((size, run["steps"]))
            if len(found) > 1 and all(steps for _, steps in found[-2:]) and found[-1][1] > 0.9 * found[-2][1]:
                break
        return found

    def random(self, method, flags):
        return self.start(f"random {method}",
                          f"{flags} --batch_tokens {STUDY[method].batch} --steps {30 if '_gn' in flags else 300} "
                          f"--target_loss {self.target} --eval_interval 1", method, init=False)

    def everything(self):
        found = {}
        self.start("warmup", WARMUP, "AdamW", init=False).result()
        # a chain waits for its runs; the runs themselves queue in order
        with ThreadPoolExecutor(64) as chains:
            try:
                first = {method: chains.submit(self.headline, method) for method in STUDY}
                tuned = {method: chain.result()[0] for method, chain in first.items()}
                found["headline"] = {method: chain.result()[1] for method, chain in first.items()}
                self.write(found)
                doubled = ("SOAP", BEST_GN) if self.quick else ("SOAP", "Muon", "AdamW", "K-FAC", BEST_GN)
                curves = {m: chains.submit(self.batches, m, tuned[m]) for m in doubled}
                if not self.quick:
                    late = {method: self.slow(method, tuned[method]) for method in SLOW}
                    random = {method: self.random(method, tuned[method]) for method in RANDOM}
                    ablations = [self.start(f"ablation {group} {name}", f"{base} {extra} --eval_interval 1",
                                            f"{group}: {name}")
                                 for group, (base, settings) in ABLATIONS.items() for name, extra in settings.items()]
                    found["slow"] = {method: [run.result()] for method, run in late.items()}
                    rival = min(late.keys() - {BEST_GN}, key=lambda method: score(late[method].result()))
                    again = {m: [self.slow(m, tuned[m], seed) for seed in SEEDS[:2]] for m in (BEST_GN, rival)}
                    for method, runs in again.items():                                  # the winners over seeds
                        found["slow"][method] += [run.result() for run in runs]
                    found["random"] = {method: [run.result()] for method, run in random.items()}
                    for run in ablations:
                        run.result()
                found["batches"] = {method: chain.result() for method, chain in curves.items()}
            except BaseException:                           # what is queued is dropped, what runs ends
                self.pool.shutdown(wait=False, cancel_futures=True)
                raise
        self.write(found)

    # ---- what is written ----

    def table(self, stage, seeds):
        """Print the rows of one stage, {method: [runs]}, the best first; returns the methods in this order."""
        # at least, where a run missed the target
        counts = {m: sum(r["steps"] or r["ran"] for r in runs) / len(runs) for m, runs in seeds.items()}
        goal = (f"steps to {TARGETS['slow'] if stage == 'slow' else self.target:g}"
                + ", random initialisation" * (stage == "random"))
        rows = [(goal, "mean", "each seed", "ratio", "M tokens", "gradients of 1M tokens", "core-seconds")]
        order = sorted(seeds, key=counts.get)
        for method in order:
            runs = seeds[method]
            missed = "> " * any(not r["steps"] for r in runs)
            mean = f"{counts[method]:.4g}" if missed else mean_and_error([r["steps"] for r in runs])
            on_cpu = [r["seconds"] for r in runs if r["device"].startswith("cpu")]
            rows.append((method, missed + mean, ", ".join(str(r["steps"] or f"> {r['ran']}") for r in runs),
                         f"{missed}{counts[method] / min(counts.values()):.1f}",
                         mean_and_error([r["tokens"] / 1e6 for r in runs]),
                         mean_and_error([r["gradients"] for r in runs]), mean_and_error(on_cpu) if on_cpu else ""))
        print_table(rows)
        say()
        return order

    def write(self, found):
        """headline.json with every run, the tables, and the pictures."""
        names = {id(run): name for name, run in self.found.items()}
        stages = {stage: found[stage] for stage in ("headline", "slow", "random") if stage in found}
        order, *_ = [self.table(stage, seeds) for stage, seeds in stages.items()]
        runs = self.found.values()
        record = {"targets": TARGETS, "gradients_of_1M_tokens": round(sum(r["gradients"] for r in runs), 1),
                  "hours": round(sum(r["seconds"] for r in runs) / 3600, 2),
                  **{stage: {m: [names[id(r)] for r in rs] for m, rs in seeds.items()}
                     for stage, seeds in stages.items()},
                  "batches": found.get("batches", {}), "runs": dict(sorted({**self.recorded, **self.found}.items()))}
        text = json.dumps(record, ensure_ascii=False).replace('"runs": {', '"runs": {\n').replace("]]}, ", "]]},\n")
        (self.out / "headline.json").write_text(text + "\n")
        # Muon and AdamW at their tuned rates first lose much more than this
        loss, top = "validation loss, nats per byte", 1.1 * self.found["warmup"]["loss"]
        for stage, picture in (("headline", "loss.svg"), ("slow", "slow.svg")):
            if stage in found:
                curves = {m: [[(s, v) for s, v in r["curve"] if s] for r in rs] for m, rs in found[stage].items()}
                chart(self.out / picture, [("outer steps", curves)], loss, names=order, y_max=top)
        curves = {m: [[(size, steps) for size, steps in curve if steps]]
                  for m, curve in found.get("batches", {}).items()}
        if any(any(c) for c in curves.values()):
            chart(self.out / "batch.svg", [("tokens per step", curves)], f"steps to {self.target:g}",
                  y_log=True, marks=True, names=order)
        ablations = sorted((*r["method"].split(": "), r["curve"]) for r in runs if ": " in r["method"])
        for group in dict.fromkeys(group for group, _, _ in ablations):
            ours = {name: curve for g, name, curve in ablations if g == group}
            print_table([(f"{group}, one thing changed", "steps", "loss")]
                        + [(name, str(c[-1][0]), f"{c[-1][1]:.3f}") for name, c in ours.items()])
            say()
            chart(self.out / f"ablation-{group}.svg", [("outer steps", {name: [c] for name, c in ours.items()})],
                  loss, x_log=False, y_max=top)
        say(f"written: {self.out}/headline.json and {', '.join(sorted(p.name for p in self.out.glob('*.svg')))}")


def study(args):
    out = Path(args.out_dir or "out/headline")
    width = args.threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    out.mkdir(parents=True, exist_ok=True)
    say(f"study {args.study}: {width} runs at a time, one thread each, in {out}; a line for each that is complete")
    Study(out, width, args.quick).everything()
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# What everything costs, in gradients

BENCH = {"4 layers, d 128, vocabulary 512, 16 x 128 tokens":
         (dict(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=512), 16),
         "6 layers, d 256, vocabulary 2048, 8 x 256 tokens":
         (dict(n_layer=6, n_head=8, n_embd=256, block_size=256, vocab_size=2048), 8)}


def bench(args, rounds=9):
    """Print what each piece of a step costs in gradients (forward, loss and backward, eager, fused attention) of the
    same model and batch: median and quartiles of the ratio within interleaved rounds, after its result was checked
    against float64."""
    torch.set_num_threads(args.threads or 1)
    torch.set_float32_matmul_precision("high" if args.dtype == "tf32" else "highest")
    tune_allocator()
    name = (torch.cuda.get_device_name(args.device) if torch.device(args.device).type == "cuda"
            else platform.processor() or platform.machine())
    say(f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {args.dtype}; "
        f"ratios to one gradient: median (quartiles) of {rounds} interleaved rounds; "
        "error: relative, against float64")
    for title, (sizes, rows) in BENCH.items():
        torch.manual_seed(0)
        model = GPT(GPTConfig(**sizes)).to(args.device)
        exact, model.bf16 = copy.deepcopy(model).double(), args.dtype == "bf16"
        x, y = torch.randint(0, sizes["vocab_size"], (2, rows, sizes["block_size"]), device=args.device)
        g = GGN(exact, x, y)
        v = torch.randn_like(g.grad)
        v /= v.norm()
        want = {"gradient": g.grad, "product": g.matvec(v), "inner": g.grad + g.matvec(v)}
        del exact, g
        ways, notes = bench_ways(model, x, y, v.to(torch.float32))
        say(f"\n{title}, {sum(p.numel() for p in model.parameters()):,} parameters")
        for note in notes:
            say(note)
        report(ways, rounds, x.is_cuda, want)
    say(f"\nthe {args.model} preset, 131,072 tokens, whole steps, line search included; ratios to SOAP's")
    steps = {"SOAP": "--opt soap", "full GN, inner Muon": "--opt full_gn --solver muon",
             "full GN, inner Muon, compiled": "--opt full_gn --solver muon --compile"}
    report({way: (None, bench_step(f"{flags} --model {args.model} --dtype {args.dtype} --device {args.device} "
                                   "--batch_tokens 131072"))
            for way, flags in steps.items()}, (rounds + 1) // 2, torch.device(args.device).type == "cuda")


def report(ways, rounds, is_cuda, want={}):
    """Time ways, {name: (kind, function)}, in interleaved rounds, and print each one's ratio to the first; the error of
    its result against want[kind]."""
    times, errors = {way: [] for way in ways}, {}
    for i in range(rounds + 2):
        for way, (kind, function) in ways.items():
            start = time.perf_counter()
            result = function()
            if is_cuda:
                torch.cuda.synchronize()
            times[way].append(time.perf_counter() - start)
            if i == 0 and kind in want:
                errors[way] = ((result.double() - want[kind]).norm() / want[kind].norm()).item()
    first, base = next(iter(times.items()))
    for way, t in times.items():
        ratios = sorted(a / b for a, b in zip(t[2:], base[2:]))
        error = f"  error {errors[way]:.0e}" if way in errors else ""
        say(f"  {way:58s} {ratios[rounds // 2]:6.3f}  "
            f"({ratios[rounds // 4]:.3f} - {ratios[-1 - rounds // 4]:.3f}){error}")
    say(f"  (one {first}: {1000 * sorted(base)[len(base) // 2]:.1f} ms)")


def bench_step(flags):
    """A function that makes one step of train.py's run with these flags, on tokens whose successor is a function of
    them."""
    args, _ = resolve(flags.split())
    model = build_model(args, 256).to(args.device)
    model.bf16, args.micro_batch = args.dtype == "bf16", 8192 // model.config.block_size
    x = torch.randint(0, 256, (args.batch_tokens // model.config.block_size, model.config.block_size),
                      device=args.device)
    stepper = make_stepper(model, args, lambda *where: None)
    return lambda: stepper.step(x, (5 * x + 1) % 256)


def bench_ways(model, x, y, v):
    """{name: (what it returns, function)}, and notes on what could not be measured."""
    params, notes, everything = trainable(model), [], list(range(len(trainable(model))))
    index = {id(p): i for i, p in enumerate(params)}
    layers = [[index[id(p)] for p in layer] for layer in model.layers()]
    ggn, kfac, inner = GGN(model, x, y), KFAC(model), InnerSolver(model)
    quarter = x[:len(x) // 4], y[:len(y) // 4]
    kfac.update(*quarter)
    kfac.decompose()

    def once(solver):
        return solver._expand(x, y, v, [everything], False, False)[2][0]
    ways = {"gradient": ("gradient", lambda: batch_grad(model, x, y)[1]),
            "product": ("product", lambda: ggn.matvec(v)),
            "set-up of a batch, its gradient included": ("gradient", lambda: GGN(model, x, y).grad),
            "local model's gradient, batch used once (inner solver)": ("inner", lambda: once(inner)),
            "layerwise product, all layers": (None, lambda: [ggn.matvec(select(v, params, layer), layer)
                                                             for layer in layers]),
            "line-search candidate": (None, lambda: batch_loss(model, x, y)),
            "K-FAC factors, from a quarter of the sequences": (None, lambda: kfac.update(*quarter)),
            "K-FAC application": (None, lambda: kfac.apply(v, lambda S: 1 / (S + 1e-3))),
            "vectors of a CG iteration": (None, lambda: cg(lambda p: p, v, max_iter=1))}
    try:
        program, compiled = Program(model, x, y), torch.compile(model, dynamic=False)
        kept = GGN(model, x, y, program=program)
        compiled_inner = InnerSolver(model, compile=True)
        once(compiled_inner)
        ways.update({"gradient, compiled": ("gradient", lambda: batch_grad(compiled, x, y)[1]),
                     "product, compiled": ("product", lambda: kept.matvec(v)),
                     "set-up, compiled": ("gradient", lambda: GGN(model, x, y, program=program).grad),
                     "local model's gradient, compiled": ("inner", lambda: once(compiled_inner))})
    except Exception as e:
        notes.append(f"  compiled: not measured ({str(e).splitlines()[0]})")
    flat_model = nn.Sequential(model, nn.Flatten(0, 1))                      # the peers want (N, classes)
    loss_function = nn.CrossEntropyLoss()
    try:
        from curvlinops import GGNLinearOperator
        operator = GGNLinearOperator(flat_model, loss_function, params, [(x, y.flatten())], check_deterministic=False,
                                     num_data=y.numel(), batch_size_fn=lambda x: x.numel())

        def curvlinops():
            with sdpa_kernel(SDPBackend.MATH):
                return flatten(operator @ unflatten(v, params))
        curvlinops()
        ways["product, curvlinops"] = ("product", curvlinops)
    except Exception as e:
        notes.append(f"  curvlinops: not measured ({type(e).__name__}: {str(e).splitlines()[0]})")
    try:
        from backpack.hessianfree.ggnvp import ggn_vector_product
        with sdpa_kernel(SDPBackend.MATH):
            output = flat_model(x)
            loss = loss_function(output, y.flatten())
        ways["product, BackPACK"] = ("product", lambda: flatten(
            ggn_vector_product(loss, output, flat_model, unflatten(v, params))))
        ways["product, BackPACK"][1]()
    except Exception as e:
        notes.append(f"  BackPACK: not measured ({type(e).__name__}: {str(e).splitlines()[0]})")
    return ways, notes


def main(argv=None):
    """Returns the exit status: 0, 1 for a run that had to stop, 2 for settings or data that cannot be used."""
    process = os.environ["RANK"] if dist.is_torchelastic_launched() else "0"
    try:
        args, given = resolve(argv)
        if dist.is_torchelastic_launched() and (args.compare or args.bench or args.study):
            raise UsageError("--bench, --compare and --study run in one process, without torchrun")
        checkpoint = None
        if args.compare:
            compare(args.compare, [args.target_loss] if args.target_loss is not None else (), args.plot)
            return 0
        if args.bench:
            bench(args)
            return 0
        if args.study:
            return study(args)
        if args.resume:
            args, checkpoint = stored_settings(args, given)
        args.argv = None if argv is None else list(argv)
        with process_group(args):
            return run(args, given, checkpoint)
    except (UsageError, DataError) as e:
        if process == "0":                              # all of them found it
            print(f"train.py: error: {e}", file=sys.stderr)
        return 2
    except OSError as e:                                # a full disk
        print(f"train.py: error: {e}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as e:
        print(f"train.py: error: {str(e).splitlines()[0].split('. ')[0]}; the last checkpoint is whole; "
              "--micro_batch and --cache_gb set what is held at once", file=sys.stderr)
        return 1
    except RuntimeError as e:                           # another process is gone, or has come apart from this one
        if not dist.is_torchelastic_launched():
            raise
        print(f"train.py: error: process {process}: {str(e).strip().splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; the last checkpoint is whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
