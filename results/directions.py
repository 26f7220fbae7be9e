"""What one direction is worth: from one point and one batch, how far the loss on unseen tokens falls along each
method's direction, at the length that is best for it.

python results/directions.py warmup late               # weights by the commands in step.py; hours on one core
python results/directions.py big --like warmup --batches 1     # with the settings that were best at warmup

A direction is where a command of train.py goes in its first step. The ladder leads from the gradient to G of
all parameters at once. On half of the first batch a rung's knob (a damping or a rate) is changed by its factor
while that helps, and then more iterations are tried. The best setting goes along whole batches. A line of
directions.jsonl has the fall, the work in gradients of the batch, and on the second batch and later the cosine,
in G's metric, with inner SOAP's direction on half of the first.
"""

import argparse
import json
from typing import NamedTuple

from step import begin, loss_at, probe
from tables import DIRECTIONS, directions

from gauss_newton import GGN, GaussNewton

METRIC = 16384  # tokens that G is taken from, for cosines
HISTORY = 8  # quarters of a batch, from which a baseline gathers its moments at the point
CG = "--opt full_gn --line_search none --curvature_frac 0.125 --damping {}"
INNER = "--opt full_gn --line_search none --solver soap --inner_lr {}"
BASELINES = {  # as tuned for this batch; neither rate nor weight decay belongs to a direction
    "AdamW": "--opt adamw --clip 0.1 --weight_decay 0",
    "Muon": "--opt muon --momentum 0.9 --clip 0.1 --weight_decay 0",
    "SOAP": "--opt soap --betas 0.9 0.99 --precondition_frequency 1 --clip 0.1 --weight_decay 0",
    "K-FAC": "--opt kfac --momentum 0.8 --precondition_frequency 1",
}
KINDS = "norm", "attn", "mlp", ""  # of tensors, by their names
FIRST = {}  # {weights: the direction that was measured first from there}


class Rung(NamedTuple):
    name: str
    flags: list  # a command with {} for its knob, and others, which are tried with the best knob
    knob: float = 1.0
    factor: float = 1.0
    blocks: str = "all"  # of G, that CG has
    history: int = 0


def ladder():
    """Inner SOAP first: the others are compared with its direction."""
    for passes in (2, 1):
        yield Rung(f"inner SOAP, {passes}", [f"{INNER} --inner_passes {passes}"], 0.008, 2)
    for blocks in ("all", "layers", "kinds", "tensors"):
        for systems, iterations, damping in ((1, (12, 30), 0.3), (8, (4, 12), 3.0)):
            flags = [f"{CG} --newton_steps {systems} --cg_iters {i}" for i in iterations]
            yield Rung(f"CG, {blocks}, {systems}", flags, damping, 10**0.5, blocks)
    yield Rung("K-FAC's inverse", [f"{CG} --newton_steps 1 --cg_iters 1"], 0.03, 10)
    for name, flags in BASELINES.items():
        yield Rung(f"{name}, moments", [flags], history=HISTORY)
        yield Rung(name, [flags])
    yield Rung("gradient", ["--opt sgd --momentum 0"])


def partition(model, blocks):
    """The parameters in lists, for each of which CG has a block of G."""
    if blocks == "layers":
        return model.layers()
    if blocks == "tensors":
        return [[p] for p in model.parameters()]
    parts = {kind: [] for kind in KINDS}
    for name, p in model.named_parameters():
        kind = next(kind for kind in KINDS if kind in name)
        parts[kind].append(p)
    return list(parts.values())


def climb(function, x, factor):
    """(function(x), x), the best of x factor^k on the way up."""
    best = function(x), x
    for ratio in (1 / factor, factor):
        while (moved := (function(best[1] * ratio), best[1] * ratio)) > best:
            best = moved
    return best


def measure(weights, rung, flags, knob, batch, share=1.0):
    """The fall along the direction that a command has on a share of a batch; recorded."""
    run = begin(weights, f"{flags.format(knob)} --batch_tokens 262144")
    micro_batch = run.args.micro_batch
    if rung.blocks != "all":
        parts = partition(run.model, rung.blocks)
        run.stepper = GaussNewton(run.model, run.stepper.solver, parts, "none", micro_batch)
    rows = METRIC // run.model.config.block_size
    ggn = GGN(run.model, *run.batch(0, rows), micro_batch, keep_rows=0)  # no graph outlives a step
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
    if rung.factor == 1.0:
        return first, rung.knob
    fall, knob = climb(lambda knob: measure(weights, rung, first, knob, 0, 0.5), rung.knob, rung.factor)
    tried = [(fall, first), *((measure(weights, rung, flags, knob, 0, 0.5), flags) for flags in others)]
    return max(tried)[1], knob


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
                measure(weights, rung, flags, knob, batch)


if __name__ == "__main__":
    main()
