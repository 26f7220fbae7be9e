"""What one direction is worth: from one point and one batch, how far the loss on unseen tokens falls along
each method's direction, at the length that is best for it.

python results/directions.py warmup late               # weights by the commands in step.py; hours on one core
python results/directions.py warmup_1.1M --like warmup --batches 1      # by what was best at warmup

A direction is where a command of train.py goes in its first step. The ladder leads from the gradient to G of
all parameters at once. On half of the first batch a rung's knob (a damping or a rate) is changed by its
factor while that helps, and then more iterations are tried. The best setting goes along whole batches. A
line of directions.jsonl has the fall, the work in gradients of the batch, and on the second batch and later
the cosine, in G's metric, with inner SOAP's direction on half of the first.
"""

import argparse
import json
import re
from functools import partial
from typing import NamedTuple

from step import begin, loss_at, probe
from tables import DIRECTIONS, directions

from gauss_newton import GGN, GaussNewton

CG = "--opt full_gn --line_search none --curvature_frac 0.125 --damping {} --newton_steps"
INNER = "--opt full_gn --line_search none --solver soap --inner_lr {} --inner_passes"
# Baselines as tuned for this batch; neither rate nor weight decay belongs to a direction.
ADAMW = "--opt adamw --clip 0.1 --weight_decay 0"
MUON = "--opt muon --momentum 0.9 --clip 0.1 --weight_decay 0"
SOAP = "--opt soap --betas 0.9 0.99 --precondition_frequency 1 --clip 0.1 --weight_decay 0"
KFAC = "--opt kfac --momentum 0.8 --precondition_frequency 1"
# name | blocks | history | knob | factor | flags, ...: see Rung
LADDER = f"""
inner SOAP, 2   | all     | 0 | 0.008 | 2                  | {INNER} 2
inner SOAP, 1   | all     | 0 | 0.008 | 2                  | {INNER} 1
CG, all, 1      | all     | 0 | 0.3   | 3.1622776601683795 | {CG} 1 --cg_iters 12 | {CG} 1 --cg_iters 30
CG, all, 8      | all     | 0 | 3     | 3.1622776601683795 | {CG} 8 --cg_iters 4 | {CG} 8 --cg_iters 12
CG, layers, 1   | layers  | 0 | 0.3   | 3.1622776601683795 | {CG} 1 --cg_iters 12 | {CG} 1 --cg_iters 30
CG, layers, 8   | layers  | 0 | 3     | 3.1622776601683795 | {CG} 8 --cg_iters 4 | {CG} 8 --cg_iters 12
CG, kinds, 1    | kinds   | 0 | 0.3   | 3.1622776601683795 | {CG} 1 --cg_iters 12 | {CG} 1 --cg_iters 30
CG, kinds, 8    | kinds   | 0 | 3     | 3.1622776601683795 | {CG} 8 --cg_iters 4 | {CG} 8 --cg_iters 12
CG, tensors, 1  | tensors | 0 | 0.3   | 3.1622776601683795 | {CG} 1 --cg_iters 12 | {CG} 1 --cg_iters 30
CG, tensors, 8  | tensors | 0 | 3     | 3.1622776601683795 | {CG} 8 --cg_iters 4 | {CG} 8 --cg_iters 12
K-FAC's inverse | all     | 0 | 0.03  | 10                 | {CG} 1 --cg_iters 1
AdamW, moments  | all     | 8 | 0     | 0                  | {ADAMW}
AdamW           | all     | 0 | 0     | 0                  | {ADAMW}
Muon, moments   | all     | 8 | 0     | 0                  | {MUON}
Muon            | all     | 0 | 0     | 0                  | {MUON}
SOAP, moments   | all     | 8 | 0     | 0                  | {SOAP}
SOAP            | all     | 0 | 0     | 0                  | {SOAP}
K-FAC, moments  | all     | 8 | 0     | 0                  | {KFAC}
K-FAC           | all     | 0 | 0     | 0                  | {KFAC}
gradient        | all     | 0 | 0     | 0                  | --opt sgd --momentum 0
"""
KINDS = "norm", "attn", "mlp", ""  # of tensors, by their names
FIRST = {}  # {weights: the direction that was measured first from there}


class Rung(NamedTuple):
    """A line of LADDER. Inner SOAP comes first: the others are compared with its direction."""

    name: str
    blocks: str  # of G, that CG has
    history: int  # quarters of a batch, from which a baseline gathers its moments at the point
    knob: float
    factor: float  # 0: there is no knob
    flags: list  # a command with {} for its knob, and another, which is tried with the best knob


def ladder():
    for line in LADDER.strip().splitlines():
        name, blocks, history, knob, factor, *flags = re.split(r" *\| ", line)
        yield Rung(name, blocks, int(history), float(knob), float(factor), flags)


def partition(model, blocks):
    """The parameters in lists, for each of which CG has a block of G."""
    if blocks == "layers":
        return model.layers()
    if blocks == "tensors":
        return [[p] for p in model.parameters()]
    parts = {kind: [] for kind in KINDS}
    for name, p in model.named_parameters():
        parts[next(kind for kind in KINDS if kind in name)].append(p)
    return list(parts.values())


def climb(function, x, factor):
    """(function(x), x), the best of x factor^k on the way up."""
    value = function(x)
    for ratio in (1 / factor, factor):
        while (moved := function(x * ratio)) > value:
            value = moved
            x *= ratio
    return value, x


def measure(weights, rung, batch, share, flags, knob):
    """The fall along the direction that a command has on a share of a batch; recorded."""
    run = begin(weights, f"{flags.format(knob)} --batch_tokens 262144")
    micro_batch = run.args.micro_batch
    if rung.blocks != "all":
        parts = partition(run.model, rung.blocks)
        run.stepper = GaussNewton(run.model, run.stepper.solver, parts, "none", micro_batch)
    sample = run.batch(0, run.rows // 16)
    ggn = GGN(run.model, *sample, micro_batch, keep_rows=0)  # no graph outlives a step
    work = 0.0
    for k in range(rung.history):
        run.progress["step"] = k
        work += probe(run, 1, run.rows // 4)[1]["work"] / 4
    run.progress["step"] = batch
    d, record = probe(run, 0, int(share * run.rows))
    Gd = ggn.matvec(d)
    before = run.evaluate()
    length = abs(ggn.grad.dot(d) / d.dot(Gd)).item()
    fall, length = climb(lambda t: before - loss_at(run, t * d, *run.val), length, 1.25)
    first = FIRST.setdefault(weights, d)
    cosine = first.dot(Gd) / (first.dot(ggn.matvec(first)) * d.dot(Gd)).sqrt()
    row = {
        "point": weights,
        "parameters": run.size,
        "loss": before,
        "rung": rung.name,
        "flags": flags.format(f"{knob:.3g}"),
        "batch": batch,
        "share": share,
        "fall": fall,
        "length": length,
        "work": work + record["work"],
        "cosine": cosine.item() if batch else None,
    }
    with open(DIRECTIONS, "a") as f:
        f.write(json.dumps(row) + "\n")
    print(f"{weights}, {batch} x {share}: {rung.name}: {row['flags']}: {fall:.4f}", flush=True)
    return fall


def best(weights, rung):
    """(flags, knob) that are worth most on half of the first batch."""
    first, *others = rung.flags
    if not rung.factor:
        return first, rung.knob
    half = partial(measure, weights, rung, 0, 0.5)
    fall, knob = climb(partial(half, first), rung.knob, rung.factor)
    falls = {first: fall, **{flags: half(flags, knob) for flags in others}}
    return max(falls, key=falls.get), knob


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("weights", nargs="+", help="folders of runs")
    parser.add_argument("--like", help="a folder that is recorded already: take its settings, scan none")
    parser.add_argument("--batches", type=int, default=3)
    args = parser.parse_args()
    settings = {row["rung"]: row["flags"] for row in directions() if row["point"] == args.like}
    for weights in args.weights:
        for rung in ladder():
            flags, knob = (settings[rung.name], 0) if args.like else best(weights, rung)
            for batch in range(args.batches):
                measure(weights, rung, batch, 1.0, flags, knob)


if __name__ == "__main__":
    main()
