"""Train a GPT with full Gauss-Newton or a baseline; one command, no set-up.

    python train.py --opt full_gn                               # tiny GPT, Python's own library as text, 4 minutes
    python train.py --opt layerwise_gn                          # the same with curvature inside each layer only
    python train.py --opt full_gn --solver cg                   # the local model minimised by conjugate gradients
    python train.py --opt soap --batch_tokens 65536             # a baseline: adamw, adam, sgd, muon, soap, kfac
    python train.py --opt adamw --steps 60 --out_dir out/warmup
    python train.py --opt full_gn --init_from out/warmup        # start from its weights
    python train.py --resume --out_dir out/my_run               # go on where a run stopped
    python train.py --data shakespeare --model small --opt muon # other data, other size
    torchrun --standalone --nproc_per_node=2 train.py           # each batch shared by 2 processes (cores, GPUs)
    python train.py --help                                      # every flag, its unit and default

Each run owns a folder: log.jsonl (first line the configuration, then one line a step) and checkpoint.pt.
Ctrl-C ends the step, saves, and says how to go on.
"""
import argparse
import copy
import ctypes
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import resource
except ImportError:      # Windows
    resource = None

from baselines import (BASELINES, DEFAULT_LR, assign, flatten, lr_schedule, make_optimizer, ranks, reduce_number,
                       trainable, unflatten)
from data import TOKENIZERS, DataError, get_batch, prepare, val_batch
from gauss_newton import (SCHEDULES, ConjugateGradients, GaussNewton, InnerSolver, batch_grad, batch_loss,
                          first_line)
from model import GPT, PRESETS, GPTConfig

GN = ("full_gn", "layerwise_gn")
KINDS = ("inner", "cg", "baseline")   # of runs: Gauss-Newton by a streaming optimizer, by CG, and all else
DEFAULTS = {  # what suits a method that takes few, large steps, and one that takes many
    "inner": dict(steps=10, batch_tokens=1048576, eval_interval=1, checkpoint_interval=1),
    "cg": dict(steps=12, batch_tokens=131072, eval_interval=1, checkpoint_interval=1),
    "baseline": dict(steps=300, batch_tokens=16384, eval_interval=10, checkpoint_interval=50),
}
# Share of the batch that the line search is on. After a streaming solve, ten steps on all of it ended at 1.554 nats and
# on a sixteenth at 1.556; a candidate on all of it costs a fifth of the solve.
SEARCH_FRAC = {"inner": 1 / 16, "cg": 1.0, "baseline": 0.0}
MAX_REJECTIONS = 8   # in a row, before a run gives up
# What --resume may change; every other setting is the stored run's.
RESUMABLE = {"resume", "out_dir", "data_dir", "steps", "target_loss", "sample", "threads", "device",
             "checkpoint_interval"}


# ---------------------------------------------------------------------------------------------------------
# Flags


class UsageError(ValueError):
    """A setting that cannot be used, told in one line; the program ends with status 2."""


class Parser(argparse.ArgumentParser):
    """Flags under headings; `used_by` has the KINDS of run that use each. A mistake is a UsageError."""

    def heading(self, title, *kinds):
        """A function that adds a flag under it."""
        return partial(self.flag, self.add_argument_group(title), kinds or KINDS)

    def flag(self, group, kinds, name, kind, default, text, **extra):
        """kind: a type, bool for a switch, or a list of choices."""
        if kind is bool:
            extra["action"] = "store_true"
        elif callable(kind):
            extra["type"] = kind
        else:
            extra["choices"] = list(kind)
        shown = f" (default {default})" if default not in (None, False) else ""
        action = group.add_argument(name, default=default, help=text + shown, **extra)
        self.used_by[action.dest] = kinds

    def error(self, message):
        raise UsageError(f"{message} (--help lists all flags)")


def number(low, high=1e38, kind=float):     # float32 ends at 3.4e38
    """A type for argparse: numbers from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:        # NaN too
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value
    convert.__name__ = kind.__name__        # argparse tells it where text is no number
    return convert


def device(text):
    """A type for argparse: a device that works."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {first_line(e)}") from e
    return text


def build_parser():
    p = Parser(prog="train.py", usage="python train.py [flags]", description=__doc__,
               formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.used_by = {}
    count, natural, seed = number(1, kind=int), number(0, kind=int), number(0, 2 ** 63 - 1, int)
    positive, not_negative = number(1e-38), number(0)
    share, decay = number(1e-6, 1), number(0, 0.999999)

    flag = p.heading("what to run")
    flag("--opt", GN + BASELINES, "full_gn", "optimizer")
    flag("--steps", count, None, "optimizer steps; for Gauss-Newton, outer steps "
         "(default 10 for GN, 12 with --solver cg, 300 for baselines)")
    flag("--batch_tokens", count, None, "tokens per step, a multiple of the block size "
         "(default 1048576 for GN, 131072 with --solver cg, 16384 for baselines)")
    flag("--micro_batch", count, None, "sequences worked on at a time; changes memory and speed, not results "
         "(default: about 8192 tokens, more on a GPU)")
    flag("--seed", seed, 0, "of initialisation, batches and sampled labels")
    flag("--target_loss", not_negative, 0.0, "stop at the first evaluation at or below this validation loss, in nats "
         "per token; 0 = never")
    flag("--init_from", str, None, "checkpoint (or its run's folder) whose weights to start from")
    flag("--device", device, "auto", "auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, ...")
    flag("--dtype", ("fp32", "tf32", "bf16"), "fp32", "tf32: shorter mantissas in matrix products on GPUs; bf16: "
         "those products in bfloat16 (autocast); solver vectors, sums and losses stay fp32")
    flag("--threads", count, None, "CPU threads (default: all cores)")

    flag = p.heading("model")
    flag("--model", PRESETS, "tiny", "size: layers, heads, width and block size")
    for name in PRESETS["tiny"]:
        flag(f"--{name}", count, None, f"override the preset's {name}")
    flag("--tie_weights", bool, False, "one matrix for embedding and head")

    flag = p.heading("data")
    flag("--data", str, "stdlib", "stdlib (Python's own library, no download), shakespeare (1 MB), c4 (English "
         "web pages, 319 MB a shard), or a file or folder: text, or .jsonl and .json with a document per line "
         "in \"text\", each also as .gz")
    flag("--shards", count, 1, "C4 files to download and use")
    flag("--tokenizer", TOKENIZERS, "bytes", "bytes (256 tokens) or gpt2 (50257)")
    flag("--data_dir", str, "data", "where prepared data is kept")

    flag = p.heading("Gauss-Newton (full_gn, layerwise_gn)", "inner", "cg")
    flag("--local_model", ("gn", "prox_linear"), "prox_linear", "the loss to second order in the logits, or the "
         "loss itself on the linearised network")
    flag("--solver", ("cg", "muon", "soap", "adamw"), None, "what minimises the local model: conjugate "
         "gradients, or an optimizer that streams over the batch (default soap; cg where one of its own flags "
         "is given)")
    flag("--line_search", ("armijo", "grid", "none"), "armijo", "along each step: backtracking, the best of all "
         "candidates, or none")
    flag("--line_search_data", ("same", "fresh"), "same", "search on the batch or on fresh tokens")

    flag = p.heading("Gauss-Newton with --solver cg", "cg")
    flag("--damping", positive, 0.3, "λ at the start, adapted by Levenberg-Marquardt from then on")
    flag("--cg_iters", count, 8, "conjugate-gradient iterations per solve, at most")
    flag("--newton_steps", count, 4, "prox_linear: Newton steps per outer step, each of --cg_iters iterations")
    flag("--precond", ("kfac", "none"), "kfac", "preconditioner, and what λ multiplies: K-FAC and the square "
         "root of its curvature, or the identity for both")
    flag("--curvature_frac", share, 0.25, "share of the batch that the GN matrix is made from; the gradient "
         "uses all of it")

    flag = p.heading("Gauss-Newton with --solver muon, soap or adamw", "inner")
    flag("--inner_tokens", count, 4096, "tokens per inner step, of which a batch gives batch_tokens / inner_tokens")
    flag("--inner_lr", positive, 8e-3, "inner learning rate")
    flag("--inner_schedule", SCHEDULES, "constant_with_inner_cosine", "inner rate over an outer step and the run")
    flag("--inner_warmup", natural, 0, "inner steps of linear warmup")
    flag("--inner_reset", bool, False, "start each inner solve at the parameters with fresh moments, not where "
         "the last one ended")
    flag("--compile", bool, False, "compile inner steps (full_gn): half a minute to some minutes at the start, for "
         "long runs (needs a C++ compiler)")

    flag = p.heading("baselines", "baseline")
    rates = ", ".join(f"{name} {lr:g}" for name, lr in DEFAULT_LR.items())
    flag("--lr", positive, None, f"peak learning rate (default {rates})")
    flag("--schedule", ("constant", "cosine", "wsd"), "constant", "after warmup; wsd decays over the last fifth")
    flag("--warmup_steps", natural, 0, "steps of linear warmup")
    flag("--clip", not_negative, 1.0, "clip the gradient's norm; 0 = off")
    flag("--weight_decay", not_negative, None, "on matrices only (default: the optimizer's own)")
    flag("--betas", decay, None, "two averaging constants (default: the optimizer's own)", nargs=2)
    flag("--momentum", decay, None, "of sgd, muon and kfac (default 0.9, 0.95, 0.9)")
    flag("--precondition_frequency", count, None, "steps between basis updates of soap and kfac (default 10)")

    flag = p.heading("records")
    flag("--out_dir", str, None, "the run's folder (default: a fresh one under out/)")
    flag("--resume", bool, False, "go on from the checkpoint in --out_dir, with its settings")
    flag("--overwrite", bool, False, "replace an earlier run in --out_dir")
    flag("--eval_interval", count, None, "steps between evaluations (default 1 for GN, 10 for baselines)")
    flag("--eval_tokens", count, 65536, "validation tokens, the same ones for every optimizer and seed")
    flag("--ema", decay, 0.0, "evaluate an average of the weights over steps with this decay; 0 = the weights")
    flag("--checkpoint_interval", count, None, "steps between checkpoints (default 1 for GN, 50 for baselines)")
    flag("--sample", natural, 200, "tokens of text to generate at the end; 0 = none")
    return p


def resolve(argv):
    """Flags -> settings with every default filled in, and {flag that was given: KINDS of run that use it}."""
    parser, unset = build_parser(), object()
    args = parser.parse_args(argv)
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    given = {key: parser.used_by[key] for key, value in vars(marked).items() if value is not unset}
    if args.opt in GN and args.solver is None:
        args.solver = "cg" if ("cg",) in given.values() else "soap"
    args.kind = "baseline" if args.opt in BASELINES else "cg" if args.solver == "cg" else "inner"
    for key, value in DEFAULTS[args.kind].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args, given


def stored_settings(args, given):
    """For --resume: the stored run's settings, changed where RESUMABLE flags were given, and its checkpoint."""
    if args.out_dir is None:
        raise UsageError("--resume needs the run's --out_dir")
    checkpoint = load_checkpoint(args.out_dir)
    stored = argparse.Namespace(**checkpoint["config"])
    stored.overwrite = False
    for key in sorted({*given, "device"}):
        new, old = getattr(args, key), getattr(stored, key)
        if new != old and key not in RESUMABLE:
            raise UsageError(f"--{key} {new} differs from the stored run's {old}; --resume may change only "
                             f"{', '.join(sorted(RESUMABLE))}")
        setattr(stored, key, new)
    return stored, checkpoint


# ---------------------------------------------------------------------------------------------------------
# Set-up


def build_model(args, vocab_size):
    sizes = {key: getattr(args, key) or preset for key, preset in PRESETS[args.model].items()}
    try:
        config = GPTConfig(vocab_size=vocab_size, tie_weights=args.tie_weights, **sizes)
    except ValueError as e:
        raise UsageError(str(e)) from e
    torch.manual_seed(args.seed)
    model = GPT(config)
    model.bf16 = args.dtype == "bf16"
    return model


def load_weights(model, checkpoint):
    theirs = checkpoint["model_config"]
    ours = vars(model.config)
    differ = [f"{k} {theirs.get(k)} there and {ours[k]} here" for k in ours if theirs.get(k) != ours[k]]
    if differ:
        raise UsageError(f"the checkpoint's model is another one: {', '.join(differ)}")
    model.load_state_dict(checkpoint["model"])


def check_sizes(args, block_size, val_rows):
    """Raises UsageError where tokens are not whole blocks, or a process would have nothing of what all share."""
    used = ["batch_tokens", "inner_tokens"] if args.kind == "inner" else ["batch_tokens"]
    for name in used:
        if getattr(args, name) % block_size:
            raise UsageError(f"--{name} {getattr(args, name)} is not a multiple of the block size {block_size}")
    rows = args.batch_tokens // block_size
    shared = [rows, val_rows]
    if args.kind == "inner":
        inner = args.inner_tokens // block_size
        shared += [inner, rows % inner or inner, rows * SEARCH_FRAC["inner"]]
    elif args.kind == "cg":                             # K-FAC's factors are from a quarter of these
        shared.append(rows * args.curvature_frac / 4)
    elif args.opt == "kfac":
        shared.append(rows / 4)
    fewest, processes = math.ceil(min(shared)), ranks()[1]
    if fewest < processes:
        raise UsageError(f"{processes} processes cannot share {fewest} sequence{'s' * (fewest > 1)}: give more "
                         "--batch_tokens, --eval_tokens, --inner_tokens or --curvature_frac")


def default_micro_batch(config, device):
    """Sequences: 8,192 tokens fit a CPU's caches, a GPU wants more; their logits stay under 256 MB."""
    tokens = 8192
    if on_gpu(device):
        tokens = max(tokens, 2 ** 23 // (config.n_layer * config.n_embd))
    return max(1, min(tokens, 2 ** 26 // config.vocab_size) // config.block_size)


def make_stepper(model, args, progress):
    """The optimizer, with step(idx, targets) -> record, rejections (in a row) and state_dict."""
    if args.kind == "baseline":
        return FirstOrder(model, args)
    if args.kind == "cg":
        solver = ConjugateGradients(model, args.local_model, args.newton_steps, args.cg_iters, args.damping,
                                    args.precond, args.curvature_frac, args.micro_batch, seed=args.seed)
    else:
        rows = args.inner_tokens // model.config.block_size
        solver = InnerSolver(model, args.solver, rows, args.inner_lr, args.local_model, args.inner_schedule,
                             args.inner_warmup, args.steps, args.inner_reset, args.compile)
    parts = model.layers() if args.opt == "layerwise_gn" else None
    return GaussNewton(model, solver, parts, args.line_search, SEARCH_FRAC[args.kind], args.micro_batch,
                       progress)


class FirstOrder:
    """A baseline behind the interface of GaussNewton: gradient, clipping, schedule, one optimizer step."""

    def __init__(self, model, args):
        self.model = model
        self.args = args
        self.params = trainable(model)
        self.optimizer = make_optimizer(args.opt, model, args.lr, args.weight_decay, args.betas, args.momentum,
                                        args.precondition_frequency)
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = 0
        self.rejections = 0

    def step(self, idx, targets):
        args, optimizer, params = self.args, self.optimizer, self.params
        factor = lr_schedule(self.steps, args.steps, args.schedule, args.warmup_steps)
        for group, lr in zip(optimizer.param_groups, self.base):
            group["lr"] = lr * factor
        self.steps += 1
        self.rejections += 1                            # until it is accepted
        loss, grad = batch_grad(self.model, idx, targets, args.micro_batch)
        norm = grad.norm().item()
        record = {"accepted": False, "reason": "loss or gradient not finite", "loss": loss, "grad_norm": norm,
                  "lr": self.base[0] * factor, "alpha": 1.0, "work": 1.0}
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return record
        if args.opt == "kfac":                          # curvature from this batch
            record["work"] += optimizer.observe(idx, targets, args.micro_batch)
            record["repaired"] = optimizer.kfac.repaired or None
        clipped = grad * (args.clip / norm) if args.clip and norm > args.clip else grad
        for p, g in zip(params, unflatten(clipped, params)):
            p.grad = g
        before = flatten(params).detach()
        optimizer.step()
        d = flatten(params).detach() - before
        length = d.norm().item()
        if not math.isfinite(length):
            assign(params, unflatten(before, params))
            return {**record, "reason": "step not finite"}
        self.rejections = 0
        slope = grad.dot(d).item()                      # a first-order method promises what its gradient does
        return {**record, "accepted": True, "reason": "", "predicted": slope, "step_norm": length,
                "cosine": -slope / (norm * length + 1e-30)}

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps, "rejections": self.rejections}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        self.rejections = state["rejections"]


def open_out_dir(args):
    """The run's folder: a fresh one under out/, or the named one if there is no run to lose in it."""
    name = f"out/{args.opt}-{args.model}-{time.strftime('%m%d-%H%M%S')}"
    fresh = [name + end for end in ("", "-2", "-3", "-4") if not Path(name + end).exists()]
    args.out_dir = args.out_dir or fresh[0]
    out = Path(args.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"--out_dir {out} cannot be used: {e}") from e
    if any(out.iterdir()) and not (args.resume or args.overwrite):
        raise UsageError(f"--out_dir {out} is not empty; give --resume to go on with its run "
                         "or --overwrite to replace it")
    if args.overwrite:
        for file in ("log.jsonl", "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.tmp"):
            (out / file).unlink(missing_ok=True)
    return out


def device_name(device):
    name = f"cpu, {torch.get_num_threads()} thread(s)"
    if on_gpu(device):
        name = torch.cuda.get_device_name(device)
    return f"{ranks()[1]} processes, {name} each" if ranks()[1] > 1 else name


def git_commit():
    """Of the folder that this file is in; None without a repository or without git."""
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                                       stderr=subprocess.DEVNULL, timeout=10).strip()


# ---------------------------------------------------------------------------------------------------------
# The run

STEP_FIELDS = dict.fromkeys(  # in every row of every method, null where it has no such thing
    "predicted actual actual_fresh rho alpha damping cosine step_norm layer_norms products cg_iterations cg_reason "
    "repaired".split())


class Run:
    """Data, model, optimizer and folder of one run, and where it stands."""

    def __init__(self, args, checkpoint):
        """checkpoint: where to go on, or None. Refuses what cannot be used before there is a folder."""
        self.args = args
        self.progress = {"step": 0, "tokens": 0, "distinct_tokens": 0, "grad_equivalents": 0.0, "seconds": 0.0}
        self.losses = {}                                # step: validation loss, where it was evaluated
        self.began = time.time()                        # the step
        self.asked = False                              # to stop, by a signal
        self.stopped = False                            # once all processes know
        block_size = args.block_size or PRESETS[args.model]["block_size"]
        self.data = prepare(args.data, args.tokenizer, args.data_dir, block_size, partial(self.bar, "data"),
                            args.shards)                # by one process at a time
        self.val = [t.to(args.device) for t in val_batch(self.data.val, block_size, args.eval_tokens)]
        self.model = build_model(args, self.data.vocab_size)
        check_sizes(args, block_size, len(self.val[0]))
        if checkpoint or args.init_from:
            load_weights(self.model, checkpoint or load_checkpoint(args.init_from))
        self.model.to(args.device)
        self.averaged = copy.deepcopy(self.model) if args.ema else self.model
        self.rows = args.batch_tokens // block_size
        fresh = args.line_search != "none" and args.line_search_data == "fresh"
        self.search_rows = math.ceil(SEARCH_FRAC[args.kind] * self.rows) if fresh else 0
        args.micro_batch = args.micro_batch or default_micro_batch(self.model.config, args.device)
        try:
            self.stepper = make_stepper(self.model, args, self.bar)
        except ValueError as e:                         # settings that do not go together
            raise UsageError(str(e)) from e
        if checkpoint:
            self.restore(checkpoint)
        self.out = by_first(open_out_dir, args)

    def restore(self, checkpoint):
        self.stepper.load_state_dict(checkpoint["optimizer"])
        self.progress = checkpoint["progress"]
        self.losses = checkpoint["losses"]
        if self.args.ema:
            self.averaged.load_state_dict(checkpoint["ema"])

    def introduce(self, given):
        args, data = self.args, self.data
        say(f"{args.opt} | {args.model} GPT, {sum(p.numel() for p in self.stepper.params):,} parameters | "
            f"{device_name(args.device)}, torch {torch.__version__} | seed {args.seed}")
        say(f"data: {args.data}, {data.meta['documents']:,} documents, {len(data.train):,} training and "
            f"{len(data.val):,} validation tokens ({args.tokenizer}), sha256 {data.meta['sha256'][:12]}")
        say(f"batch: {args.batch_tokens:,} tokens = {self.rows:,} x {self.model.config.block_size} | "
            f"guessing evenly is a loss of {math.log(data.vocab_size):.3f} nats per token")
        unused = sorted(f"--{key}" for key, kinds in given.items() if args.kind not in kinds)
        if unused:
            say(f"note: {args.opt}{f' by {args.solver}' * (args.opt in GN)} does not use {', '.join(unused)}")

    def header(self, command):
        """The log's first line: all that it takes to make the run again."""
        return {"config": vars(self.args), "parameters": sum(p.numel() for p in self.stepper.params),
                "torch": torch.__version__, "python": platform.python_version(), "commit": git_commit(),
                "device": device_name(self.args.device), "threads": torch.get_num_threads(),
                "model": vars(self.model.config), "data": self.data.meta, "command": command}

    def begin(self, log):
        """Step 0: the loss to start from, and a checkpoint."""
        val_loss = self.evaluate()
        say(f"step 0/{self.args.steps} | val {val_loss:.3f}")
        write_row(log, {**self.progress, "train_loss": None, "val_loss": val_loss})
        self.save()

    def train(self, log):
        """To the last step, the target loss, a signal, or too many rejections; returns the exit status."""
        args = self.args
        while self.progress["step"] < args.steps and not self.reached() and not self.stopped:
            row = self.step()
            write_row(log, row)
            say(step_line(row, args))
            if self.ending() or self.reached() or row["step"] % args.checkpoint_interval == 0:
                self.save()
            if self.given_up():
                say(f"stopped: {MAX_REJECTIONS} steps in a row were rejected, the last because of: "
                    f"{row['reason']}; {self.out}/checkpoint.pt holds the parameters before them")
                return 1
        return 0

    def step(self):
        """One step and, where it is due, an evaluation; returns its row of the log."""
        args, progress, params = self.args, self.progress, self.stepper.params
        self.began = time.time()
        before = {p: p.detach().clone() for p in params}
        batch = self.batch(0, self.rows)
        fresh = {"search": self.batch(2, self.search_rows)} if self.search_rows else {}
        record = {**STEP_FIELDS, **self.stepper.step(*batch, **fresh)}
        if args.ema:
            average = [p.detach() for p in trainable(self.averaged)]
            torch._foreach_lerp_(average, [p.detach() for p in params], 1 - args.ema)
        seconds = time.time() - self.began
        progress["step"] += 1
        progress["tokens"] += args.batch_tokens
        progress["distinct_tokens"] += (self.rows + self.search_rows) * self.model.config.block_size
        progress["grad_equivalents"] += record.pop("work")
        progress["seconds"] += seconds
        self.stopped = bool(reduce_number(self.asked))
        due = self.ending() or progress["step"] % args.eval_interval == 0
        val_loss = self.evaluate() if due else None
        if record["accepted"]:
            self.describe(record, before, batch)
        return {**progress, "train_loss": record.pop("loss"), "val_loss": val_loss, "step_seconds": seconds,
                **record, "peak_memory_mb": peak_memory_mb(args.device)}

    def describe(self, record, before, batch):
        """Add what the optimizer does not measure: how far each layer moved, and what the loss fell, on the batch
        (a baseline's) and on tokens that the step has not seen."""
        record["layer_norms"] = []
        for layer in self.model.layers():
            moved = flatten([p.detach() - before[p] for p in layer])
            record["layer_norms"].append(moved.norm().item())
        step = self.progress["step"]
        old = self.losses.get(step - 1)
        new = self.losses.get(step)
        if self.search_rows:
            record["actual_fresh"] = record["search_loss"] - record["search_loss0"]
        elif old is not None and new is not None and not self.args.ema:
            record["actual_fresh"] = new - old
        if new is not None and record["actual"] is None:
            record["actual"] = batch_loss(self.model, *batch, self.args.micro_batch) - record["loss"]
            record["rho"] = record["actual"] / record["predicted"] if record["predicted"] < 0 else 0.0

    def batch(self, stream, rows):
        """Random sequences and their targets, (rows, block size) each, by the step's number in this stream."""
        found = get_batch(self.data.train, self.model.config.block_size, rows, self.args.seed,
                          self.progress["step"], stream)
        return [t.to(self.args.device) for t in found]

    def evaluate(self):
        """Validation loss, of the weights' average where there is one."""
        self.bar("evaluate")
        loss = batch_loss(self.averaged, *self.val, self.args.micro_batch)
        self.losses[self.progress["step"]] = loss
        return loss

    def last_loss(self):
        return self.losses[max(self.losses)]

    def reached(self):
        return self.last_loss() <= self.args.target_loss

    def given_up(self):
        return self.stepper.rejections >= MAX_REJECTIONS

    def ending(self):
        return self.stopped or self.given_up() or self.progress["step"] == self.args.steps

    def on_signal(self, number, frame):
        """The first Ctrl-C or SIGTERM ends the run after its step, a second one at once."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("\nstopping after this step, with a checkpoint (once more: at once, from the last one)")

    def save(self):
        check_equal(self.model, self.progress["step"])
        if ranks()[0] == 0:
            save_checkpoint(self.out / "checkpoint.pt", config=vars(self.args), model=self.model.state_dict(),
                            model_config=vars(self.model.config), optimizer=self.stepper.state_dict(),
                            ema=self.averaged.state_dict() if self.args.ema else None, progress=self.progress,
                            losses=self.losses)

    def finish(self):
        """The closing lines: what was reached and at what cost, where it lies, some text of the model's own."""
        args, progress = self.args, self.progress
        target = f"target {args.target_loss:g} {'' if self.reached() else 'not '}reached: " if args.target_loss else ""
        say(f"{target}val {self.last_loss():.4f} after {progress['step']} steps, {progress['tokens']:,} tokens, "
            f"{progress['grad_equivalents']:.0f} gradient-equivalents, {duration(progress['seconds'])}")
        how = f"; go on with: python train.py --resume --out_dir {self.out}" if self.stopped else ""
        say(f"records: {self.out}/log.jsonl and checkpoint.pt{how}")
        if args.sample and not self.stopped and ranks()[0] == 0:
            say(f"\n{args.sample} tokens from the model:\n{self.sample()}")

    def sample(self):
        encoding = self.data.encoding
        begin = torch.tensor([encoding.encode_ordinary("\n")], device=self.args.device)
        generator = torch.Generator(device=self.args.device).manual_seed(self.args.seed)
        tokens = self.model.generate(begin, self.args.sample, generator=generator)
        return encoding.decode(tokens[0].tolist()).strip("\n")

    def bar(self, what, done=0, total=0):
        """Where a long step stands, on one line of a terminal that the next line replaces."""
        text = f"{self.progress['step']}/{self.args.steps} steps | {what}"
        if done and total:
            left = (time.time() - self.began) * (total - done) / done
            text += f" [{'#' * (20 * done // total):.<20}] {done}/{total} | eta {duration(left)}"
        if sys.stdout.isatty() and ranks()[0] == 0:
            print(clear(sys.stdout) + text, end="", flush=True)


def start(args, given, checkpoint, command):
    """A run from set-up to the closing lines; returns the exit status."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if args.dtype == "tf32" else "highest")
    tune_allocator()
    run = Run(args, checkpoint)
    run.introduce(given)
    path = run.out / "log.jsonl" if ranks()[0] == 0 else Path(os.devnull)
    step = run.progress["step"]
    kept, last = lines_until(path, step)
    if kept:
        os.truncate(path, kept)
    with open(path, "a" if kept else "w") as log, signals(run.on_signal):
        if not kept:
            write_row(log, run.header(command))
        if checkpoint is None:
            run.begin(log)
        else:
            say(f"resuming {run.out} after step {step}")
        if checkpoint and last != step:
            say(f"note: {path} lacks rows up to this step; it goes on after what is whole in it")
        status = run.train(log)
    run.finish()
    return status


# ---------------------------------------------------------------------------------------------------------
# What a person sees

LINE = {  # what a step's line shows of its row, each where the row has it
    "train_loss": " | loss {:.3f}", "val_loss": " | val {:.3f}", "actual": " | fell {:+.3f}",
    "actual_fresh": ", fresh {:+.3f}", "predicted": ", model {:+.3f}", "cg_iterations": " | cg {}",
    "cg_reason": " ({})", "products": ", {} products", "damping": " | damping {:.1e}", "inner_steps": " | inner {}",
    "lr": " | lr {:.1e}", "rho": " | rho {:.2f}", "alpha": " | alpha {:.2f}", "cosine": " | cos {:.2f}",
    "norms": " | |d| {}", "repaired": " | repaired: {}", "reason": " | REJECTED: {}",
    "grad_equivalents": " | work {:.4g}", "step_seconds": " | {:.1f} s", "rate": " | {:,.0f} tok/s",
    "eta": " | eta {}"}


def step_line(row, args):
    step, norms = row["step"], row["layer_norms"] or []
    shown = {**row, "norms": " ".join(f"{norm:.2g}" for norm in norms),
             "rate": args.batch_tokens / row["step_seconds"],
             "eta": duration(row["seconds"] / step * (args.steps - step))}
    found = [text.format(shown[key]) for key, text in LINE.items() if shown.get(key) not in (None, "")]
    return f"step {step}/{args.steps}" + "".join(found)


def say(text):
    if ranks()[0] == 0:
        print(clear(sys.stdout) + text, flush=True)


def clear(stream):
    """What takes the bar off a terminal."""
    return "\r\033[K" if stream.isatty() else ""


def duration(seconds):
    s = round(seconds)
    if s < 100:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 6000 else f"{s // 3600}h{s % 3600 // 60:02d}m"


# ---------------------------------------------------------------------------------------------------------
# The log and checkpoints

FORMAT = 4   # of a checkpoint; raise it when an older program could not read a newer one, or the other way round


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
    """One JSON line, on disk before the next step; what is not finite is null, JSON has no other word for it."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    log.write(json.dumps(clean) + "\n")
    log.flush()


def load_checkpoint(path):
    """The dict in a checkpoint file, or in checkpoint.pt of a folder, every byte checked."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        with zipfile.ZipFile(path) as archive:          # torch.load does not compare the checksums in it
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"it has format {checkpoint['format']}")
    except FileNotFoundError as e:
        raise UsageError(f"there is no checkpoint at {path}") from e
    except Exception as e:
        raise UsageError(f"{path} is damaged or no checkpoint of format {FORMAT} ({type(e).__name__}: "
                         f"{first_line(e)}); the one before it is checkpoint.previous.pt") from e
    return checkpoint


def save_checkpoint(path, **content):
    """Written under a temporary name and renamed: whatever happens, checkpoint.pt is whole; the one before it is
    kept beside it. Raises OSError."""
    temp, previous = path.with_suffix(".tmp"), path.with_name("checkpoint.previous.pt")
    try:
        with open(temp, "wb") as f:
            torch.save({"format": FORMAT, **content}, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:                # torch's writer turns the one into the other
        temp.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({first_line(e)})") from e
    if path.exists():
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError:                                 # a file system without links
            shutil.copyfile(path, previous)
    os.replace(temp, path)


# ---------------------------------------------------------------------------------------------------------
# Processes, signals, memory


@contextmanager
def process_group(args):
    """Under torchrun: the processes joined, each with a GPU of its own where they run on GPUs."""
    if not dist.is_torchelastic_launched():
        yield
        return
    if on_gpu(args.device):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if on_gpu(args.device) else "gloo")
    yield
    dist.destroy_process_group()


def by_first(function, *arguments):
    """The result of function(*arguments), which process 0 alone calls, in all of them; so is its UsageError."""
    told = [None]
    if ranks()[0] == 0:
        try:
            told = [function(*arguments)]
        except UsageError as e:
            told = [e]
    if ranks()[1] > 1:
        dist.broadcast_object_list(told)
    if isinstance(told[0], UsageError):
        raise told[0]
    return told[0]


def check_equal(model, step):
    """Raises RuntimeError where the processes' parameters differ in a bit: what they replicate has come apart."""
    if ranks()[1] > 1:
        checksum = zlib.crc32(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters()))
        if reduce_number(checksum) != ranks()[1] * checksum:
            raise RuntimeError(f"after step {step} the processes' parameters are not the same; the last checkpoint "
                               "is whole")


@contextmanager
def signals(handler):
    """Ctrl-C and SIGTERM go to handler, in the main thread."""
    old = {}
    with suppress(ValueError):                          # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def on_gpu(device):
    return torch.device(device).type == "cuda"


def tune_allocator():
    """Keep freed memory (glibc only). Its default gives every large tensor back to the system at once and takes
    the page faults again at the next: a fifth of a gradient's time at the tiny size."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)                                 # M_TRIM_THRESHOLD: never
        mallopt(-3, 1 << 30)                            # M_MMAP_THRESHOLD


def peak_memory_mb(device):
    if on_gpu(device):
        return torch.cuda.max_memory_allocated(device) / 1e6
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3        # bytes there, kilobytes elsewhere


# ---------------------------------------------------------------------------------------------------------


def main(argv=None):
    """Returns the exit status: 0, 1 for a run that had to stop, 2 for settings or data that cannot be used, 130 for
    a second Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    process = os.environ["RANK"] if dist.is_torchelastic_launched() else ""
    try:
        args, given = resolve(argv)
        checkpoint = None
        if args.resume:
            args, checkpoint = stored_settings(args, given)
        with process_group(args):
            return start(args, given, checkpoint, shlex.join(["python", "train.py", *argv]))
    except (UsageError, DataError) as e:
        if process in ("", "0"):                        # all of them found it
            complain(e)
        return 2
    except (OSError, torch.OutOfMemoryError) as e:      # a full disk, too large a --micro_batch
        complain(f"{first_line(e)}; the last checkpoint is whole")
    except RuntimeError as e:                           # another process is gone, or has come apart from this one
        if not process:
            raise
        complain(f"process {process}: {first_line(e)}")
    except KeyboardInterrupt:
        complain("interrupted; the last checkpoint is whole")
        return 130
    return 1


def complain(message):
    print(f"{clear(sys.stderr)}train.py: error: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
