"""Train a GPT with full Gauss-Newton or a baseline; one command, no set-up.

    python train.py --opt full_gn                                # tiny GPT on Python's library, 4 minutes
    python train.py --opt layerwise_gn                           # with curvature inside each layer only
    python train.py --opt full_gn --solver soap                  # solved by an optimizer: soap, muon, adamw
    python train.py --opt soap --batch_tokens 65536              # or adamw, sgd, muon, kfac
    python train.py --opt adamw --steps 60 --out_dir out/warmup
    python train.py --opt full_gn --init_from out/warmup         # start from its weights
    python train.py --resume --out_dir out/my_run                # go on where a run stopped
    python train.py --data shakespeare --model small --opt muon  # other data, other size
    torchrun --standalone --nproc_per_node=2 train.py            # each batch shared by 2 cores or GPUs
    python train.py --help                                       # every flag, its unit and default

Each run owns a folder: log.jsonl (first line the configuration, then one line a step) and checkpoint.pt.
Ctrl-C ends the step, saves, and says how to go on.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401 (imported by torch in a step, it would never free the group)

from baselines import (
    DEFAULTS,
    KFACOptimizer,
    assign,
    batch_grad,
    batch_loss,
    flatten,
    free_memory,
    local_rows,
    lr_schedule,
    make_optimizer,
    on_gpu,
    peak_memory_mb,
    ranks,
    same_everywhere,
    sum_number,
    trainable,
    tune_allocator,
    unflatten,
)
from data import TOKENIZERS, get_batch, prepare, val_batch
from gauss_newton import (
    LINE_SEARCHES,
    SCHEDULES,
    SEARCH_FRAC,
    ConjugateGradients,
    GaussNewton,
    InnerSolver,
    first_line,
    row_bytes,
    subset_rows,
)
from model import GPT, PRESETS, GPTConfig

MAX_REJECTIONS = 8  # in a row, before a run gives up


def main(argv):
    """Flags as typed -> the exit status: 0, also after a signal; 1 for a run that had to stop; 2 for settings
    or data that cannot be used; 130 where Ctrl-C ended it at once."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it was closed
    with suppress(AttributeError):  # stdout may be no file
        sys.stdout.reconfigure(errors="replace")  # for terminals that do not have λ
    process = os.environ["RANK"] if dist.is_torchelastic_launched() else ""  # its number, as text
    try:
        args, given = resolve(argv)
        checkpoint = None
        if args.resume:
            args, checkpoint = stored_settings(args, given)
        if process:
            join_group(args)
        status = start(args, given, checkpoint, shlex.join(["python", "train.py", *argv]))
    except UsageError as e:
        if not process or os.environ["LOCAL_RANK"] == "0":  # all of a machine's processes found it
            complain(e)
        status = 2
    except (OSError, MemoryError, RuntimeError) as e:  # a full disk, too large a batch, another process gone
        if isinstance(e, RuntimeError) and not process and "allocate" not in str(e):
            raise  # not out of memory: a defect, shown whole
        who = f"process {process}: " if process else ""
        complain(f"{who}{first_line(e)}; the last checkpoint, if there is one, is whole")
        return 1
    except KeyboardInterrupt:
        complain("interrupted; the last checkpoint, if there is one, is whole")
        return 130
    if process and dist.is_initialized():  # threads that outlive the interpreter abort it
        dist.destroy_process_group()
    return status


def start(args, given, checkpoint, command):
    """A run from set-up to the closing lines; returns the exit status."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if args.dtype == "tf32" else "highest")
    tune_allocator()
    try:
        run = Run(args, checkpoint)
        path = run.out / "log.jsonl" if is_first() else Path(os.devnull)
        log = open(path, "a")
        if is_first():
            lock(log)
    except (ValueError, OSError) as e:  # of settings that do not fit, say
        raise UsageError(str(e)) from e
    run.introduce(given)
    step = run.progress["step"]
    kept, last = lines_until(path, step) if checkpoint else (0, None)
    with log, signals(run.on_signal):
        if is_first():
            if args.overwrite:
                for name in ("checkpoint.pt", "checkpoint.previous.pt", "checkpoint.tmp"):
                    (run.out / name).unlink(missing_ok=True)
            log.truncate(kept)
        if not kept:
            write_row(log, run.header(command))
        if checkpoint:
            say(f"resuming {run.out} after step {step}")
            if last != step:
                say(f"note: {path} lacks rows up to this step; it goes on after what is whole in it")
        else:
            write_row(log, {**run.progress, "train_loss": None, "val_loss": run.evaluate()})
            if args.resume:
                say(f"no run to resume in {run.out}: it begins")
            say(f"step 0/{args.steps} | val {run.last_loss():.3f}")
            run.save()
        status = run.train(log)
    run.finish()
    return status


# ---------------------------------------------------------------------------------------------------------
# The run

STEP_FIELDS = dict.fromkeys(  # in every row of every method, null where it has no such thing
    "predicted actual actual_val rho alpha damping cosine layer_norms products cg_iterations "
    "cg_reason repaired".split()
)


class Run:
    """Data, model, optimizer and folder of one run, and where it stands."""

    def __init__(self, args, checkpoint):
        """checkpoint: from where to go on. ValueError for what cannot be used, before there is a folder."""
        self.args = args
        self.progress = {"step": 0, "tokens": 0, "seconds": 0.0, "grad_equivalents": 0.0}
        self.losses = {}  # step: validation loss, where it was evaluated
        self.rejections = 0  # in a row
        self.began = self.told = time.perf_counter()  # when the step began; when `bar` last spoke
        self.asked = False  # to stop, by a signal
        self.stopped = False  # once all processes know
        block_size = args.block_size or PRESETS[args.model]["block_size"]
        self.rows = in_blocks("--batch_tokens", args.batch_tokens, block_size)
        self.data = prepare(  # by one process at a time
            args.data,
            args.tokenizer,
            cache_dir=args.data_dir,
            block_size=block_size,
            progress=partial(self.bar, "data"),
            shards=args.shards,
        )
        found = self.data.meta["sha256"]  # kept with the settings, for --resume to compare
        if vars(args).setdefault("data_sha256", found) != found:
            raise ValueError(
                f"--data {args.data} is no longer what this run began with (other files? another Python?)"
            )
        self.val = [t.to(args.device) for t in val_batch(self.data.val, block_size, args.eval_tokens)]
        self.model = build_model(args, self.data.vocab_size)
        if checkpoint or args.init_from is not None:
            load_weights(self.model, checkpoint or load_checkpoint(args.init_from))
        frac = {"same": 0, "fresh": SEARCH_FRAC, "fresh_batch": 1}[args.line_search_data]
        searches = frac and args.kind != "baseline"  # on fresh data
        self.search_rows = subset_rows(self.rows, args.batch_tokens, frac) if searches else 0
        args.micro_batch = args.micro_batch or default_micro_batch(self.model, *self.val)
        self.stepper = make_stepper(self.model, args, self.bar)
        self.size = sum(p.numel() for p in trainable(self.model))
        least = self.stepper.least_rows(self.rows, args.batch_tokens)
        local_rows(range(min(least, len(self.val[0]))))  # ValueError where a process would get none
        if checkpoint:
            self.stepper.load_state_dict(checkpoint["optimizer"])
            self.rejections = checkpoint["rejections"] % MAX_REJECTIONS  # after giving up, all tries anew
            self.progress = checkpoint["progress"]
            self.losses = checkpoint["losses"]
        self.out = open_out_dir(args)

    def introduce(self, given):
        args = self.args
        meta = self.data.meta
        say(
            f"{args.opt} | {args.model} GPT, {self.size:,} parameters | {device_name(args.device)}, "
            f"torch {torch.__version__} | seed {args.seed}\n"
            f"data: {args.data}, {meta['documents']:,} documents, {meta['train_tokens']:,} training and "
            f"{meta['val_tokens']:,} validation tokens ({args.tokenizer}), sha256 {meta['sha256'][:12]}\n"
            f"batch: {args.batch_tokens:,} tokens = {self.rows:,} x {self.model.config.block_size} | "
            f"guessing evenly is a loss of {math.log(self.data.vocab_size):.3f} nats per token"
        )
        if meta["left_out"]:
            say(f"note: left out of --data {args.data}: {meta['left_out']}")
        own = DEFAULTS.get(args.opt, DEFAULTS.get(args.solver, ()))
        others = set().union(*DEFAULTS.values()) - set(own)  # settings that only other optimizers have
        unused = [f"--{key}" for key, kinds in given.items() if args.kind not in kinds or key in others]
        if unused:
            say(f"note: {args.opt} ({args.kind}) does not use {', '.join(unused)}")

    def header(self, command):
        """The log's first line: all that it takes to make the run again, as it began."""
        return {
            "config": vars(self.args),
            "parameters": self.size,
            "torch": torch.__version__,
            "commit": git_commit(),
            "device": device_name(self.args.device),
            "model": vars(self.model.config),
            "data": self.data.meta,
            "command": command,
        }

    def train(self, log):
        """Steps until the run is over; returns the exit status."""
        while not self.over():
            row = self.step()
            write_row(log, row)
            say(step_line(row, self.args))
            if self.over() or row["step"] % self.args.checkpoint_interval == 0:
                self.save()
        if self.rejections < MAX_REJECTIONS:
            return 0
        say(
            f"stopped: {MAX_REJECTIONS} steps in a row were rejected, the last because of: {row['reason']}; "
            f"{self.out}/checkpoint.pt holds the parameters before them"
        )
        return 1

    def over(self):
        """After the last step, at the target, by a signal, or for too many rejections in a row."""
        return (
            self.last_loss() <= self.args.target_loss
            or self.rejections >= MAX_REJECTIONS
            or self.stopped
            or self.progress["step"] >= self.args.steps
        )

    def step(self):
        """One step and, where it is due, an evaluation; returns its row of the log."""
        args = self.args
        progress = self.progress
        self.began = self.told = time.perf_counter()
        before = [flatten(layer).detach() for layer in self.model.layers()]
        batch = self.batch(0, self.rows)
        fresh = {"search": self.batch(2, self.search_rows)} if self.search_rows else {}
        record = {**STEP_FIELDS, **self.stepper.step(*batch, **fresh)}
        self.rejections = 0 if record["accepted"] else self.rejections + 1
        seconds = time.perf_counter() - self.began
        progress["step"] += 1
        progress["tokens"] += (self.rows + self.search_rows) * self.model.config.block_size
        progress["grad_equivalents"] += record.pop("work")
        progress["seconds"] += seconds
        self.stopped = sum_number(self.asked) > 0
        due = self.over() or progress["step"] % args.eval_interval == 0
        last = self.losses.get(progress["step"] - 1)
        val_loss = self.evaluate() if due else None
        if record["accepted"]:
            record["layer_norms"] = [
                (flatten(layer).detach() - old).norm().item()
                for layer, old in zip(self.model.layers(), before)
            ]
            if last and val_loss:  # both evaluated, on tokens that the step has not seen
                record["actual_val"] = val_loss - last
        return {
            **progress,
            "train_loss": record.pop("loss"),
            "val_loss": val_loss,
            "step_seconds": seconds,
            **record,
            "peak_memory_mb": peak_memory_mb(args.device),
        }

    def batch(self, stream, rows):
        """Random sequences and their targets, (rows, block size) each: a function of step and stream. Stream
        0 is for training, 2 for the line search."""
        return [
            t.to(self.args.device)
            for t in get_batch(
                self.data.train,
                self.model.config.block_size,
                rows,
                self.args.seed,
                self.progress["step"],
                stream,
            )
        ]

    def evaluate(self):
        """Validation loss."""
        self.bar("evaluate")
        loss = batch_loss(self.model, *self.val, self.args.micro_batch)
        self.losses[self.progress["step"]] = loss
        return loss

    def last_loss(self):
        return self.losses[max(self.losses)]

    def save(self):
        """Raises RuntimeError where the processes' parameters differ in a bit: they have come apart."""
        if ranks()[1] > 1:
            weights = flatten(self.model.parameters()).detach().cpu()
            if not same_everywhere(zlib.crc32(weights.numpy())):
                raise RuntimeError(
                    f"after step {self.progress['step']} the processes' parameters are not "
                    "the same; the last checkpoint is whole"
                )
        if is_first():
            save_checkpoint(
                self.out / "checkpoint.pt",
                config=vars(self.args),
                model_config=vars(self.model.config),
                model=self.model.state_dict(),
                optimizer=self.stepper.state_dict(),
                progress=self.progress,
                losses=self.losses,
                rejections=self.rejections,
            )

    def finish(self):
        """The closing lines: what was reached, at what cost, where it lies, and text of the model's own."""
        args = self.args
        reached = "reached" if self.last_loss() <= args.target_loss else "not reached"
        target = f"target {args.target_loss:g} {reached}: " if args.target_loss else ""
        folder = shlex.quote(str(self.out))
        how = f"; go on with: python train.py --resume --out_dir {folder}" if self.stopped else ""
        say(
            f"{target}val {self.last_loss():.4f} after {self.progress['step']} steps, "
            f"{self.progress['tokens']:,} tokens, {self.progress['grad_equivalents']:.0f} "
            f"gradient-equivalents, {duration(self.progress['seconds'])}\n"
            f"records: {self.out}/log.jsonl and checkpoint.pt{how}"
        )
        if args.sample and not self.stopped and math.isfinite(self.last_loss()) and is_first():
            encoding = self.data.encoding
            torch.manual_seed(args.seed)
            newline = torch.tensor([encoding.encode_ordinary("\n")], device=args.device)
            tokens = self.model.generate(newline, args.sample)[0].tolist()
            text = encoding.decode(tokens).strip("\n")
            say(f"\n{args.sample} tokens from the model:\n{text}")

    def on_signal(self, number, frame):
        """The first Ctrl-C or SIGTERM ends the run after its step, a second one at once."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("\nstopping after this step, with a checkpoint (once more: at once, from the last one)")

    def bar(self, what, done=0, total=0):
        """Say where a long step stands: on a terminal in its last line, in a file twice a minute."""
        text = f"{self.progress['step']}/{self.args.steps} steps | {what}"
        if done and total:
            left = (time.perf_counter() - self.began) * (total - done) / done
            text += f" [{'#' * (20 * done // total):.<20}] {done}/{total} | eta {duration(left)}"
        if sys.stdout.isatty():
            say(text, end="\r")  # go back to the line's start
        elif time.perf_counter() > self.told + 30:
            self.told = time.perf_counter()
            say(text)


# ---------------------------------------------------------------------------------------------------------
# A baseline's step


@dataclass(eq=False)
class FirstOrder:
    """A baseline behind the interface of GaussNewton. Its step:

        g ← gradient of the batch's loss
        rate ← optimizer's own * lr_schedule(step, total_steps, schedule, warmup_steps)
        g′ ← g min(1, clip / ‖g‖)            clip 0: g′ = g
        θ ← optimizer(θ, g′)                 K-FAC observes the batch first

    A loss, gradient or step that is not finite leaves the parameters bitwise as they were.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer  # from make_optimizer
    total_steps: int
    schedule: str
    warmup_steps: int
    clip: float
    micro_batch: int

    def __post_init__(self):
        self.lr = self.optimizer.param_groups[0]["lr"]
        self.steps = 0

    @torch.no_grad()
    def step(self, inputs, targets):
        """One step on a batch; returns its record, a flat dict."""
        lr = self.lr * lr_schedule(self.steps, self.total_steps, self.schedule, self.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.steps += 1
        params = trainable(self.model)
        loss, grad = batch_grad(self.model, inputs, targets, self.micro_batch)
        norm = grad.norm().item()
        record = {"accepted": False, "loss": loss, "grad_norm": norm, "lr": lr, "work": 1.0}
        if not math.isfinite(loss + norm):
            return {**record, "reason": "loss or gradient not finite"}
        if isinstance(self.optimizer, KFACOptimizer):
            record["work"] += self.optimizer.observe(inputs, targets, self.micro_batch)
            record["repaired"] = self.optimizer.kfac.repaired or None
        clipped = grad * (self.clip / norm) if 0 < self.clip < norm else grad
        for p, g in zip(params, unflatten(clipped, params)):
            p.grad = g
        before = flatten(params)
        self.optimizer.step()
        d = flatten(params) - before
        length = d.norm().item()
        if not math.isfinite(length):
            assign(params, unflatten(before, params))
            return {**record, "reason": "step not finite"}
        cos = -grad.dot(d).item() / (norm * length + 1e-30)
        return {**record, "accepted": True, "reason": "", "cosine": cos}

    def least_rows(self, rows, n_targets):
        """Of a batch: the fewest rows that processes divide among them in a step."""
        return self.optimizer.curvature_rows(rows) if isinstance(self.optimizer, KFACOptimizer) else rows

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


# ---------------------------------------------------------------------------------------------------------
# Set-up


def build_model(args, vocab_size):
    sizes = {key: getattr(args, key, None) or preset for key, preset in PRESETS[args.model].items()}
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(vocab_size, tie_weights=args.tie_weights, **sizes))
    model.bf16 = args.dtype == "bf16"
    return model.to(args.device)


def load_weights(model, checkpoint):
    stored = vars(GPTConfig(1)) | checkpoint["model_config"]  # an older one's, with defaults for the rest
    differ = dict(stored.items() - vars(model.config).items())
    if differ:
        raise UsageError(f"the checkpoint's model is another one: it has {differ}")
    model.load_state_dict(checkpoint["model"])


def in_blocks(flag, tokens, block_size):
    """How many sequences these tokens make."""
    if tokens % block_size:
        raise UsageError(f"{flag} {tokens} is not a multiple of the block size {block_size}")
    return tokens // block_size


def default_micro_batch(model, x, y):
    """Sequences: 8,192 tokens fit a CPU's caches, a GPU wants more. Their logits stay under 256 MB, and what
    is kept of them to be differentiated under an eighth of the memory that is free."""
    c = model.config
    tokens = max(8192, 2**23 // (c.n_layer * c.n_embd)) if on_gpu(x.device) else 8192
    fit = int(free_memory(x.device) / 8 / row_bytes(model, x, y))
    return max(1, min(min(tokens, 2**26 // c.vocab_size) // c.block_size, fit))


def make_stepper(model, args, progress=None):
    """The optimizer, with step(inputs, targets) -> record and state_dict."""
    if args.kind == "baseline":
        own = settings(args, "lr weight_decay betas momentum precondition_frequency muon_scale")
        return FirstOrder(
            model,
            make_optimizer(args.opt, model, **own),
            total_steps=args.steps,
            **settings(args, "schedule warmup_steps clip micro_batch"),
        )
    if args.kind == "cg":
        solver = ConjugateGradients(
            model,
            **settings(args, "local_model newton_steps cg_iters damping precond curvature_frac micro_batch"),
        )
    else:
        if args.compile:
            check_compiler(args.device)
        solver = InnerSolver(
            model,
            name=args.solver,
            rows=in_blocks("--inner_tokens", args.inner_tokens, model.config.block_size),
            outer_steps=args.steps,
            **settings(
                args,
                "local_model muon_scale compile inner_passes inner_lr inner_betas inner_damping "
                "inner_schedule inner_warmup inner_reset",
            ),
        )
    return GaussNewton(
        model,
        solver,
        parts=model.layers() if args.opt == "layerwise_gn" else None,
        progress=progress,
        **settings(args, "line_search micro_batch"),
    )


def check_compiler(device):
    """Raises UsageError where torch cannot compile for the device."""
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except RuntimeError as e:
        raise UsageError(f"--compile cannot be used: {e}") from e


def settings(args, names):
    """{argument: value} of the flags in `names`; an argument has the name of its flag, without "inner_"."""
    return {name.removeprefix("inner_"): getattr(args, name) for name in names.split()}


def open_out_dir(args):
    """The run's folder: a fresh one under out/, or the named one if there is no run to lose in it."""
    out = Path(args.out_dir or f"out/{args.opt}-{args.model}-{time.strftime('%m%d-%H%M%S')}")
    while args.out_dir is None and out.exists():
        out = out.with_name(f"{out.name}-2")
    if out.exists() and any(out.iterdir()) and not (args.resume or args.overwrite):
        raise UsageError(
            f"--out_dir {out} is not empty; give --resume to go on with its run or --overwrite to replace it"
        )
    sum_number(0)  # a barrier: each process has looked before there is a folder
    if is_first():
        out.mkdir(parents=True, exist_ok=True)
    args.out_dir = str(out)
    return out


def device_name(device):
    name = f"cpu, {torch.get_num_threads()} thread(s)"
    if on_gpu(device):
        name = torch.cuda.get_device_name(device)
    return f"{ranks()[1]} processes, {name} each" if ranks()[1] > 1 else name


def git_commit():
    """Of the folder that this file is in; None without a repository or without git."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()


# ---------------------------------------------------------------------------------------------------------
# Flags

# By kind of run. Gauss-Newton, by CG or by an inner optimizer, takes few, large steps; a baseline many.
RUN_DEFAULTS = {
    "cg": {"steps": 30, "batch_tokens": 131072, "eval_interval": 1, "checkpoint_interval": 1},
    "inner": {"steps": 15, "batch_tokens": 262144, "eval_interval": 1, "checkpoint_interval": 1},
    "baseline": {"steps": 300, "batch_tokens": 16384, "eval_interval": 10, "checkpoint_interval": 50},
}

# What --resume may change; every other setting is the stored run's.
RESUMABLE = """resume out_dir data_dir steps target_loss sample threads device micro_batch
    checkpoint_interval""".split()


class UsageError(ValueError):
    """A setting that cannot be used, told in one line; the program ends with status 2."""


class Parser(argparse.ArgumentParser):
    """Flags under headings; `used_by` has the kinds of run that use each. A mistake is a UsageError."""

    def heading(self, title, *kinds):
        """A function that adds a flag under it."""
        return partial(self.flag, self.add_argument_group(title), kinds or RUN_DEFAULTS)

    def flag(self, group, kinds, name, text, values, default=None, **extra):
        """values: a type, bool for a switch, or a list of choices."""
        if values is bool:
            extra = {"action": "store_true"}
        else:
            extra |= {"type" if callable(values) else "choices": values, "default": default}
        shown = "" if default is None else f" (default {default})"
        action = group.add_argument(name, help=text + shown, **extra)
        self.used_by[action.dest] = kinds

    def error(self, message):
        raise UsageError(f"{message} (--help lists all flags)")


def number(low, high=9e18, kind=float):  # below 2^63
    """A type for argparse: numbers from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:  # NaN too
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse tells it where text is no number
    return convert


def device(text):
    """A type for argparse: a device that works."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, ImportError) as e:
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {first_line(e)}") from e
    return text


def build_parser():
    p = Parser(
        usage="python train.py [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.used_by = {}
    count = number(1, 10**9, int)
    natural = number(0, kind=int)
    positive = number(1e-38)
    not_negative = number(0)
    decay = number(0, 0.999999)

    flag = p.heading("what to run")
    flag("--opt", "optimizer", ("full_gn", "layerwise_gn", *DEFAULTS), "full_gn")
    flag(
        "--muon_scale",
        "size of muon's steps, as --opt or --solver: like adamw's, or, as in the paper, "
        "sqrt(max(1, out / in))",
        ("match_rms_adamw", "original"),
        "match_rms_adamw",
    )
    flag(
        "--steps",
        "optimizer steps; for Gauss-Newton, outer steps (default 30 for CG, 15 for other "
        "solvers, 300 for baselines)",
        count,
    )
    flag(
        "--batch_tokens",
        "tokens per step, a multiple of the block size (default 131072 for CG, 262144 for "
        "other solvers, 16384 for baselines)",
        count,
    )
    flag(
        "--micro_batch",
        "sequences worked on at a time; changes memory and speed, results by rounding only (default: "
        "about 8192 tokens, more on a GPU, fewer where memory is short)",
        count,
    )
    flag("--seed", "of initialisation and batches", natural, 0)
    flag(
        "--target_loss",
        "stop at the first evaluation at or below this validation loss, in nats per token; 0 = never",
        not_negative,
        0.0,
    )
    flag("--init_from", "checkpoint (or its run's folder) whose weights to start from", str)
    flag("--device", "auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, mps, ...", device, "auto")
    flag(
        "--dtype",
        "tf32: shorter mantissas in matrix products on GPUs; bf16: those products in bfloat16 "
        "(autocast); solver vectors, sums and losses stay fp32",
        ("fp32", "tf32", "bf16"),
        "fp32",
    )
    flag("--threads", "CPU threads (default: all cores, one under torchrun)", number(1, 1024, int))

    flag = p.heading("model")
    flag(
        "--model",
        "layers, heads, width and block size: tiny 2, 4, 64, 64; small 4, 4, 128, 256; the paper's, "
        "with LayerNorm of q and k and an MLP of two matrices: 45m 4, 8, 512, 1024; 150m 12, 16, 768, 1024",
        PRESETS,
        "tiny",
    )
    for name in PRESETS["tiny"]:
        flag(f"--{name}", f"override the preset's {name}", count)
    flag("--tie_weights", "one matrix for embedding and head", bool)

    flag = p.heading("data")
    flag(
        "--data",
        "stdlib (Python's own library, no download), shakespeare (1 MB), c4 (English web pages, "
        "319 MB a shard), or a file or folder: text (UTF-8, or UTF-16 with its mark), or .jsonl and .json "
        'with a document per line in "text", each also as .gz, .xz or .bz2; a folder\'s other files, but '
        "for hidden ones, are named and left out",
        str,
        "stdlib",
    )
    flag("--shards", "C4 files to download and use, of 1024", number(1, 1024, int), 1)
    flag("--tokenizer", "bytes (256 tokens) or gpt2 (50257)", TOKENIZERS, "bytes")
    flag("--data_dir", "where prepared data is kept", str, "data")

    flag = p.heading("Gauss-Newton (full_gn, layerwise_gn)", "cg", "inner")
    flag(
        "--local_model",
        "the loss to second order in the logits, or the loss itself on the linearised network",
        ("gn", "prox_linear"),
        "prox_linear",
    )
    flag(
        "--solver",
        "what minimises the local model: conjugate gradients, or, as in the paper, an optimizer "
        "that streams over the batch",
        ("cg", "muon", "soap", "adamw"),
        "cg",
    )
    flag(
        "--line_search",
        "armijo: backtracking; grid, grid5: the best of ten or five lengths; none: the whole step",
        LINE_SEARCHES,
        "armijo",
    )
    flag(
        "--line_search_data",
        "what the search is on. same: the last sixteenth of the batch; fresh: as many new tokens, which no "
        "solver has fitted (safer with small batches); fresh_batch: as many new tokens as the batch has",
        ("same", "fresh", "fresh_batch"),
        "same",
    )

    flag = p.heading("Gauss-Newton with --solver cg", "cg")
    flag("--damping", "λ at the start; each Newton step adapts it", positive, 3.0)
    flag("--newton_steps", "Newton steps per outer step, each on rows of its own", count, 8)
    flag("--cg_iters", "conjugate-gradient iterations per Newton step, at most", count, 4)
    flag(
        "--precond",
        "preconditioner, and what λ multiplies: K-FAC and a power of its curvature, or the identity for both",
        ("kfac", "none"),
        "kfac",
    )
    flag(
        "--curvature_frac",
        "share of the batch that the Newton steps divide among them, up to 1 for a model with more "
        "parameters than a batch has tokens; the gradient uses all of it",
        number(1e-6, 1),
        0.25,
    )

    flag = p.heading("Gauss-Newton with --solver muon, soap or adamw", "inner")
    flag(
        "--inner_tokens",
        "tokens per inner step, of which a pass over the batch has batch_tokens / inner_tokens",
        count,
        2048,
    )
    flag("--inner_passes", "passes over the batch in an outer step (the paper: 1)", count, 2)
    flag("--inner_lr", "inner learning rate", positive, 8e-3)
    flag(
        "--inner_betas",
        "averaging constants of the inner optimizer (of muon: of its adamw)",
        decay,
        [0.8, 0.99],
        nargs=2,
    )
    flag(
        "--inner_damping",
        "how strongly inner steps are drawn to the outer parameters; 0.3 suits a million tokens a step",
        not_negative,
        0.0,
    )
    flag(
        "--inner_schedule",
        "inner rate over an outer step and the run",
        SCHEDULES,
        "constant_with_inner_cosine",
    )
    flag("--inner_warmup", "inner steps of linear warmup", natural, 0)
    flag(
        "--inner_reset",
        "start each inner solve at the parameters with fresh moments, not where the last one ended",
        bool,
    )
    flag(
        "--compile",
        "compile inner steps: half a minute to some minutes at the start, for long "
        "runs (needs a C++ compiler)",
        bool,
    )

    flag = p.heading("baselines", "baseline")
    rates = {name: defaults["lr"] for name, defaults in DEFAULTS.items()}
    flag("--lr", f"peak learning rate (default {rates})", positive)
    flag(
        "--schedule",
        "after warmup; wsd decays over the last fifth",
        ("constant", "cosine", "wsd"),
        "constant",
    )
    flag("--warmup_steps", "steps of linear warmup", natural, 0)
    flag("--clip", "clip the gradient's norm; 0 = off", not_negative, 1.0)
    flag("--weight_decay", "on matrices only (default: the optimizer's own)", not_negative)
    flag("--betas", "two averaging constants (default: the optimizer's own)", decay, nargs=2)
    flag("--momentum", "of sgd, muon and kfac (default 0.9, 0.95, 0.9)", decay)
    flag("--precondition_frequency", "steps between basis updates of soap and kfac (default 10)", count)

    flag = p.heading("records")
    flag("--out_dir", "the run's folder (default: a fresh one under out/)", str)
    flag(
        "--resume",
        "go on from the checkpoint in --out_dir, with its settings (--steps, --target_loss and a few more "
        "may change); where the folder is empty or absent, begin, so that one command can be given again "
        "and again",
        bool,
    )
    flag("--overwrite", "replace an earlier run in --out_dir", bool)
    flag("--eval_interval", "steps between evaluations (default 1 for GN, 10 for baselines)", count)
    flag("--eval_tokens", "validation tokens, the same ones for every optimizer and seed", count, 65536)
    flag("--checkpoint_interval", "steps between checkpoints (default 1 for GN, 50 for baselines)", count)
    flag("--sample", "tokens of text to generate at the end; 0 = none", natural, 200)
    return p


def resolve(argv):
    """Flags -> settings with their kind of run's defaults, and {flag that was given: kinds that use it}."""
    parser = build_parser()
    args = parser.parse_args(argv)
    words = {word.split("=")[0] for word in argv}
    given = {key: kinds for key, kinds in parser.used_by.items() if f"--{key}" in words}
    kind = "baseline" if args.opt in DEFAULTS else "cg" if args.solver == "cg" else "inner"
    parser.set_defaults(kind=kind, **RUN_DEFAULTS[kind])
    return parser.parse_args(argv), given


def stored_settings(args, given):
    """For --resume: the stored run's settings, changed by the RESUMABLE flags that were given, and its
    checkpoint. Where no run has made a step: args as they are, and None."""
    if not args.out_dir:
        raise UsageError("--resume needs the run's --out_dir")
    out = Path(args.out_dir)
    left = {path.name for path in out.glob("*")}
    if not left - {"log.jsonl", "checkpoint.tmp"} and not lines_until(out / "log.jsonl", math.inf)[1]:
        return args, None
    checkpoint = load_checkpoint(args.out_dir)
    stored = argparse.Namespace(**vars(args) | checkpoint["config"])
    stored.overwrite = False
    for key in [*given, "device"]:
        new = getattr(args, key)
        old = getattr(stored, key)
        if new != old and key not in RESUMABLE:
            raise UsageError(
                f"--{key} {new} differs from the stored run's {old}; --resume may change only "
                f"{', '.join(RESUMABLE)}"
            )
        setattr(stored, key, new)
    return stored, checkpoint


# ---------------------------------------------------------------------------------------------------------
# What a person sees

LINE = {  # what a step's line shows of its row, each where the row has it
    "train_loss": " | loss {:.3f}",
    "val_loss": " | val {:.3f}",
    "actual": " | change {:+.3f}",
    "predicted": ", model {:+.3f}",
    "actual_val": " | change on val {:+.3f}",
    "cg_iterations": " | cg {}",
    "cg_reason": " ({})",
    "damping": " | damping {:.1e}",
    "inner_steps": " | inner {}",
    "lr": " | lr {:.1e}",
    "rho": " | rho {:.2f}",
    "alpha": " | alpha {:.2f}",
    "cosine": " | cos {:.2f}",
    "layer_norms": " | |d| {}",
    "repaired": " | repaired: {}",
    "reason": " | REJECTED: {}",
    "grad_equivalents": " | work {:.4g}",
    "step_seconds": " | {:.1f} s",
    "rate": " | {:,.0f} tok/s",
    "eta": " | eta {}",
}


def step_line(row, args):
    step = row["step"]
    shown = {
        **row,
        "layer_norms": " ".join(f"{norm:.2g}" for norm in row["layer_norms"] or []),
        "rate": args.batch_tokens / row["step_seconds"],
        "eta": duration(row["seconds"] / step * (args.steps - step)),
    }
    found = [text.format(shown[key]) for key, text in LINE.items() if shown.get(key) not in (None, "")]
    return f"step {step}/{args.steps}" + "".join(found)


def say(text, end="\n"):
    if is_first():
        clear = "\033[K" if sys.stdout.isatty() else ""  # what is left of a longer bar
        print(f"{text}{clear}", end=end, flush=True)


def complain(message):
    print("train.py: error:", *str(message).splitlines(), file=sys.stderr)


def duration(seconds):
    s = round(seconds)
    if s < 100:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 6000 else f"{s // 3600}h{s % 3600 // 60:02d}m"


# ---------------------------------------------------------------------------------------------------------
# The log and checkpoints

# Raise it when an older program could not read a newer one's checkpoints, or the reverse.
CHECKPOINT_FORMAT = 9


def lines_until(path, step):
    """Bytes of a log up to the last whole row at or before `step`, and that row's step."""
    size = end = 0
    last = None
    with suppress(FileNotFoundError, NotADirectoryError):
        for line in path.read_bytes().splitlines(keepends=True):
            end += len(line)
            with suppress(ValueError, AttributeError, TypeError):  # cut off, or no row
                row = json.loads(line)
                if row.get("step", 0) <= step and line.endswith(b"\n"):
                    size, last = end, row.get("step")
    return size, last


def lock(log):
    """Raises UsageError where another run holds it; Windows and some network file systems do not tell."""
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run is writing {log.name}") from None


def write_row(log, row):
    """Write a line, and hand it to the system at once. JSON has no NaN or infinity: they become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    log.write(json.dumps(clean) + "\n")
    log.flush()


def load_checkpoint(path):
    """The dict in a checkpoint file, or in checkpoint.pt of a folder, every byte checked."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums in it
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"it has format {checkpoint['format']}")
    except Exception as e:
        raise UsageError(
            f"{path} is missing, damaged or no checkpoint of format {CHECKPOINT_FORMAT} ({type(e).__name__}"
            f": {first_line(e)}); a run keeps the one before as checkpoint.previous.pt"
        ) from e
    return checkpoint


def save_checkpoint(path, **content):
    """Written under a temporary name and renamed: whatever happens, checkpoint.pt is whole; the one before it
    is kept beside it. Raises OSError."""
    temp = path.with_suffix(".tmp")
    previous = path.with_name("checkpoint.previous.pt")
    try:
        with open(temp, "wb") as f:
            torch.save({"format": CHECKPOINT_FORMAT, **content}, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:  # torch's writer turns the one into the other
        temp.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({first_line(e)})") from e
    if path.exists():
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError:  # a file system without links
            shutil.copyfile(path, previous)
    os.replace(temp, path)


# ---------------------------------------------------------------------------------------------------------
# Processes, signals


def join_group(args):
    """Under torchrun: one of its processes, with a GPU of its own where they run on GPUs."""
    if on_gpu(args.device):
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if on_gpu(args.device) else "gloo")


def is_first():
    """Process 0 alone speaks and writes."""
    return ranks()[0] == 0


@contextmanager
def signals(handler):
    """Ctrl-C and SIGTERM go to handler, in the main thread."""
    old = {}
    with suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
