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


def show(title, header, rows):
    print(f"\n**{title}**\n")
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(map(str, row)) + " |")


def grouped(stage, records):
    """{method: [(which, record), ...]} of a stage, in the list's order."""
    methods = {}
    for line in read_list():
        record = records.get(line.flags.removeprefix("was "))
        if line.stage == stage and record:
            methods.setdefault(line.method, []).append((line.which, record))
    return methods


def crossing(run):
    """Steps to the target, between two evaluations by the logarithm of the loss; None of a run that missed."""
    if not run["steps"]:
        return None
    (before, high), (after, low) = run["curve"][-2:]
    return before + (after - before) * math.log(high / run["target"]) / math.log(high / low)


def work(run):
    """Gradients of a million tokens up to there, or in all."""
    return run["gradients"] * (crossing(run) or run["ran"]) / run["ran"]


def outcome(run):
    """Steps to the target, or how many were too few and the loss after them; without a target the loss."""
    if run["steps"]:
        return f"{crossing(run):.1f}"
    return f"> {run['ran']} ({run['loss']:.3f})" if run["target"] else f"{run['loss']:.3f}"


def deviation(values):
    return stdev(values) if len(values) > 1 else 0.0


def race(title, stage, records):
    """Methods by their steps to the target, the best first: mean ± standard deviation of a run. A run that
    missed it counts with its length. Ratios to the first method, with their standard error."""
    methods = {method: [run for _, run in runs] for method, runs in grouped(stage, records).items()}
    steps = {method: [crossing(run) or run["ran"] for run in runs] for method, runs in methods.items()}
    rows = []
    for method, counts in sorted(steps.items(), key=lambda item: mean(item[1])):
        best = min(steps.values(), key=mean)
        runs = methods[method]
        missed = "" if all(run["steps"] for run in runs) else "> "
        ratio = mean(counts) / mean(best)
        errors = [(deviation(values) / mean(values)) ** 2 / len(values) for values in (counts, best)]
        core = [run["seconds"] for run in runs if run["device"].startswith("cpu")]
        rows.append([
            method,
            f"{runs[0]['batch_tokens'] // 1024}k",
            f"{missed}{mean(counts):.1f} ± {deviation(counts):.1f}" if len(runs) > 1 else f"{missed}{counts[0]:.1f}",
            ", ".join(map(outcome, runs)),
            f"{missed}{ratio:.2f} ± {ratio * sum(errors) ** 0.5:.2f}" if counts is not best else "",
            f"{mean(map(work, runs)):.3g}",
            f"{mean(core):,.0f}" if core else ""])
    show(title, ["method", "batch", "steps", "each seed", "ratio", "gradients", "seconds"], rows)


def frontier(records):
    """{method: {batch: (work, steps)}}, means over seeds, at the best of the settings that were tried there."""
    found = {}
    same = grouped("same batch", records)
    for method, runs in grouped("batch", records).items():
        tried = {}
        for run in {run["flags"]: run for _, run in runs + same[method]}.values():
            if run["steps"]:
                settings = re.sub(r"--seed \d+", "", run["flags"])
                tried.setdefault((run["batch_tokens"], settings), []).append((work(run), crossing(run)))
        for (size, _), points in sorted(tried.items()):
            point = tuple(map(mean, zip(*points)))
            old = found.setdefault(method, {}).get(size, point)
            found[method][size] = min(point, old, key=lambda p: p[1])
    return found


def steps_for(work, points):
    """Steps that a method takes with so much work, between two of its batches by the logarithms; None outside
    of them."""
    points = sorted(points)
    for (less, many), (more, few) in zip(points, points[1:]):
        if less <= work <= more:
            return many * (few / many) ** (math.log(work / less) / math.log(more / less))
    return None


def batches(records):
    methods = frontier(records)
    sizes = sorted(set().union(*methods.values()))
    rows = [[method, *("{1:.1f} ({0:.3g})".format(*found[size]) if size in found else "" for size in sizes)]
            for method, found in methods.items()]
    show("Steps to 1.60 (gradients) at a batch of", ["tokens", *(f"{size // 1024}k" for size in sizes)], rows)
    rows = []
    for method, found in methods.items():
        for size, (work, steps) in found.items():
            if method.startswith("full GN"):
                others = [steps_for(work, points.values()) for name, points in methods.items()
                          if not name.startswith("full GN")]
                cells = [f"{other:.1f} ({other / steps:.2g})" if other else "" for other in others]
                rows.append([method, f"{size // 1024}k", f"{steps:.1f}", f"{work:.3g}", *cells])
    names = [name for name in methods if not name.startswith("full GN")]
    show("Steps to 1.60 with the same work (times full GN's)", ["", "batch", "steps", "gradients", *names], rows)


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
    """{share of the batch that G is made from: {iterations: (work, how far the loss fell)}}, one step each."""
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
        run = records.pop(line.flags.removeprefix("was "), None)
        if run:
            stages.setdefault(line.stage, []).append(run["gradients"])
    rows = [[stage, len(work), f"{sum(work):,.0f}"] for stage, work in stages.items()]
    show("What the study took", ["stage", "runs", "gradients"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=HERE / "runs.jsonl")
    records = read_records(parser.parse_args().records)
    race("To 1.60 from the warmup, every method with 262,144 tokens a step", "same batch", records)
    race("To 1.60 from the warmup, batches that large ones help", "large batch", records)
    batches(records)
    race("To 1.33 from the warmup", "slow", records)
    race("To 1.60 from random initialisation", "random", records)
    race("41 thousand parameters", "41k parameters", records)
    race("1.1 million parameters", "1.1M parameters", records)
    race("English", "English", records)
    solves(records)
    inline("From random initialisation at 262,144 tokens a step, 68 steps, to 1.60", "random tuning", records)
    inline("One thing changed: loss after 10 steps (CG 6, baselines 40)", "ablation", records)
    inline("An earlier CG", "earlier CG", records)
    inline("Tuning: steps to 1.60 at half the batch, seed 0", "tuning", records)
    inline("Endings of the baselines: steps to 1.60, seed 0", "ending", records)
    inline("Other runs to 1.33", "slow trials", records)
    race("The quick study: steps to 1.75", "quick", records)
    totals(records)
    for folder in ("default_run", "choosing_defaults", "bf16_and_fp32"):
        logs(folder)
    print("\n**bench/89558e7-cpu-fp32.txt**\n")
    print("```\n" + (HERE / "bench/89558e7-cpu-fp32.txt").read_text() + "```")


if __name__ == "__main__":
    main()
