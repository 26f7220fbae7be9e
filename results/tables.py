"""Every table of results/README.md, from the records: python results/tables.py [--records FILE]

Steps and work to a target are interpolated between two evaluations; a gradient is one over a million tokens;
mean seconds are of the runs on one core, other devices left out.
"""
import argparse
import math
import re
from pathlib import Path
from statistics import mean, stdev

from study import HERE, read_list, read_log, read_records

STUDY = "tuning", "ending", "batch", "same batch", "large batch"   # stages that go from the warmup to 1.60
RACES = {
    "same batch": "To 1.60 from the warmup, every method with 262,144 tokens a step",
    "large batch": "To 1.60 from the warmup, batches that large ones help",
    "slow": "To 1.33 from the warmup",
    "random": "To 1.60 from random initialisation",
    "41k parameters": "41 thousand parameters, to 1.77 from a warmup of their own",
    "1.1M parameters": "1.1 million parameters, to 1.39 from a warmup of their own",
    "English": "English, to 1.54 from a warmup of its own",
    "quick": "The quick study: steps to 1.75"}
TRIALS = {
    "tuning": "Tuning: steps to 1.60 at half the batch, seed 0",
    "ending": "Endings of the baselines: steps to 1.60, seed 0",
    "slow trials": "Other runs to 1.33",
    "small batch": "Small batches, steps to 1.75",
    "random tuning": "From random initialisation at 262,144 tokens a step, 68 steps, to 1.60",
    "starts": "Five steps from random weights with nothing set but the batch: validation loss",
    "ablation": "One thing changed: loss after 10 steps (CG 6, baselines 40)",
    "earlier CG": "An earlier CG"}


def show(title, header, rows):
    print(f"\n**{title}**\n")
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(map(str, row)) + " |")


def grouped(stage, records):
    """{method: [(which, record), ...]} of a stage, in the list's order."""
    methods = {}
    for line in read_list():
        record = records.get(line.key)
        if line.stage == stage and record:
            methods.setdefault(line.method, []).append((line.which, record))
    return methods


def crossing(run):
    """Steps to the target, between two evaluations by the logarithm of the loss; all, if it missed."""
    if run["steps"] is None:
        return run["ran"]
    before, high = run["curve"][-2]
    over = math.log(max(high, run["target"]) / run["target"])
    under = math.log(run["target"] / run["loss"])
    return before + (run["steps"] - before) * over / (over + under + 1e-12)


def cost(run):
    """Gradients of a million tokens up to there."""
    return run["gradients"] * crossing(run) / run["ran"]


def outcome(run):
    """Steps to the target, or how many were too few and the loss after them; without a target the loss."""
    if run["steps"]:
        return f"{crossing(run):.1f}"
    return f"> {run['ran']} ({run['loss']:.3f})" if run["target"] else f"{run['loss']:.3f}"


def race(title, stage, records):
    """Methods by their steps to the target, the best first: mean ± standard deviation of a run. A run that
    missed counts with its length. Ratios to the first method, with their standard error."""
    ranked = []
    for method, named in grouped(stage, records).items():
        runs = [run for _, run in named]
        steps = [crossing(run) for run in runs]
        missed = any(run["steps"] is None for run in runs)
        spread = None if missed or len(runs) == 1 else stdev(steps)
        ranked.append((missed, mean(steps), method, runs, spread))
    ranked.sort(key=lambda entry: entry[:2])
    rows = []
    for missed, steps, method, runs, spread in ranked:
        _, best, _, best_runs, best_spread = ranked[0]
        ratio = steps / best
        error = ""
        if spread is not None and best_spread is not None:
            parts = (spread / steps) ** 2 / len(runs) + (best_spread / best) ** 2 / len(best_runs)
            error = f" ± {ratio * parts ** 0.5:.2f}"
        seconds = [run["seconds"] for run in runs if run["device"] == "cpu, 1 thread(s)"]
        rows.append([
            method,
            f"{runs[0]['batch_tokens'] // 1024}k",
            "> " * missed + f"{steps:.1f}" + (f" ± {spread:.1f}" if spread is not None else ""),
            ", ".join(map(outcome, runs)),
            "> " * missed + f"{ratio:.2f}{error}" if rows else "",
            f"{mean(map(cost, runs)):.3g}",
            f"{mean(seconds):,.0f}" if seconds else ""])
    show(title, ["method", "batch", "steps", "each run", "ratio", "gradients", "seconds"], rows)


def frontier(records):
    """{method: {batch: (gradients, steps)}} to 1.60 from the warmup, means over seeds, at the best of all
    settings that were tried with that batch; for full GN of those with three seeds, where there are any."""
    found = {}
    for line in read_list():
        run = records.get(line.key)
        method = line.method.split(", G from")[0]
        if line.stage in STUDY and run and run["steps"] and not line.gone:
            settings = run["batch_tokens"], re.sub(r"--seed \d+", "", run["flags"])
            found.setdefault(method, {}).setdefault(settings, {})[run["flags"]] = cost(run), crossing(run)
    drawn = {}
    for method, tried in found.items():
        ranked = {}
        for (size, _), points in sorted(tried.items()):
            gradients, steps = map(mean, zip(*points.values()))
            seeds = min(len(points), 3) if " GN" in method else 0
            ranked.setdefault(size, []).append((-seeds, steps, gradients))
        best = {size: min(settings) for size, settings in ranked.items()}
        drawn[method] = {size: (gradients, steps) for size, (_, steps, gradients) in best.items()}
    return {method: points for method, points in drawn.items() if len(points) > 2}


def steps_for(gradients, points):
    """Steps that a method takes with so much work: between two of its batches by the logarithms, none of
    which a smaller batch beats; None below the smallest."""
    best = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    if gradients < best[0][0]:
        return None
    for (less, many), (more, few) in zip(best, best[1:]):
        if gradients < more:
            return many * (few / many) ** (math.log(gradients / less) / math.log(more / less))
    return best[-1][1]


def batches(records):
    methods = frontier(records)
    baselines = [name for name in methods if " GN" not in name]
    sizes = sorted(set().union(*methods.values()))
    rows = [[method, *("{1:.1f} ({0:.3g})".format(*points[size]) if size in points else "" for size in sizes)]
            for method, points in methods.items()]
    show("Steps to 1.60 (gradients) at a batch of", ["tokens", *(f"{size // 1024}k" for size in sizes)], rows)
    rows = []
    for method in methods.keys() - baselines:
        for size, (gradients, steps) in methods[method].items():
            others = [steps_for(gradients, methods[name].values()) for name in baselines]
            cells = [f"{other:.1f} ({other / steps:.2g})" if other else "" for other in others]
            rows.append([method, f"{size // 1024}k", f"{steps:.1f}", f"{gradients:.3g}", *cells])
    header = ["", "batch", "steps", "gradients", *baselines]
    show("Steps to 1.60 with the same work (times full GN's)", header, sorted(rows, key=lambda row: row[0]))


def inline(title, stage, records):
    """A row a method, all its runs in one cell; those that are named alike, seeds, beside each other."""
    rows = []
    for method, runs in grouped(stage, records).items():
        alike = {}
        for which, run in runs:
            alike.setdefault(which, []).append(outcome(run))
        rows.append([method, "; ".join(f"{which}: {', '.join(found)}" for which, found in alike.items())])
    show(title, ["method", "runs"], rows)


def exactness(records):
    """{share of the batch that G is made from: {iterations: (work, fall of the loss)}}, one step each."""
    return {share: {which: (run["gradients"], run["curve"][0][1] - run["loss"]) for which, run in runs}
            for share, runs in grouped("exactness", records).items()}


def solves(records):
    sizes = "1 2 4 8 16 32 64".split()
    rows = [[share, *(f"{found[k][1]:.3f} ({found[k][0]:.3g})" if k in found else "" for k in sizes)]
            for share, found in exactness(records).items()]
    show("One step of a million tokens: fall of the loss (gradients) by CG's iterations", ["", *sizes], rows)


def logs(folder):
    """What the runs of a folder lost after each step."""
    rows = []
    for path in sorted((HERE / folder).iterdir()):
        losses = [f"{row['val_loss']:.3f}" for row in read_log(path)[1][1:] if row["val_loss"] is not None]
        rows.append([f"`{path.name}`", ", ".join(losses[:12]) + f", ... {losses[-1]}" * (len(losses) > 12)])
    show(f"{folder}: validation loss after each step", ["run", "losses"], rows)


def totals(records):
    """What the stages took; a run that two of them share counts for the first."""
    stages = {}
    for line in read_list():
        run = records.pop(line.key, None)
        if run:
            stages.setdefault(line.stage, []).append(run["gradients"])
    rows = [[stage, len(work), f"{sum(work):,.0f}"] for stage, work in stages.items()]
    show("What the study took", ["stage", "runs", "gradients"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=HERE / "runs.jsonl")
    records = read_records(parser.parse_args().records)
    for stage, title in RACES.items():
        race(title, stage, records)
    batches(records)
    solves(records)
    for stage, title in TRIALS.items():
        inline(title, stage, records)
    totals(records)
    for folder in ("default_run", "choosing_defaults", "bf16_and_fp32"):
        logs(folder)
    print("\n**bench/89558e7-cpu-fp32.txt**\n")
    print("```\n" + (HERE / "bench/89558e7-cpu-fp32.txt").read_text() + "```")


if __name__ == "__main__":
    main()
