"""Every table of results/README.md, from the records: python results/tables.py [--records FILE]

Steps and work to a target are interpolated between two evaluations; a gradient is one over a million tokens;
mean seconds are of the runs on one core, other devices left out.
"""
import argparse
import re
from collections import defaultdict
from math import hypot, isnan, log, nan
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from study import HERE, read_list, read_log, read_records

STUDY = "tuning", "ending", "batch", "same batch", "large batch"   # stages that go from the warmup to 1.60
RACES = {
    "same batch": "To 1.60 from the warmup, every method with 262,144 tokens a step",
    "large batch": "To 1.60 from the warmup, batches that large ones help",
    "slow": "To 1.33 from the warmup",
    "random": "To 1.60 from random initialisation",
    "49k parameters": "49 thousand parameters, to 1.77 from a warmup of their own",
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
    "ablation": "One thing changed: loss after 10 steps (CG 6, baselines 40)"}


def show(title, rows):
    """Print a table of rows {column: cell}, all with the same columns; none where there are no rows."""
    if not rows:
        return
    print(f"\n**{title}**\n")
    for cells in [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]:
        print("| " + " | ".join(map(str, cells)) + " |")


def grid(title, corner, column, cell, points):
    """Print {row: {column: point}}, given how a column and a point are written."""
    columns = sorted(set().union(*points.values()))
    show(title, [{corner: name, **{column.format(c): cell.format(*row[c]) if c in row else ""
                                   for c in columns}} for name, row in points.items()])


def load(path=HERE / "runs.jsonl"):
    """The lines of the list that have a record, in its order: {stage, method, which, flags, *the record}."""
    records = read_records(path)
    return [{**records[line.key], **line._asdict()} for line in read_list() if line.key in records]


def grouped(runs, key):
    """{what runs have under this key: the runs that have it}."""
    groups = defaultdict(list)
    for run in runs:
        groups[run[key]].append(run)
    return groups


def methods_of(stage, runs):
    """{method: its runs in a stage}."""
    return grouped(grouped(runs, "stage")[stage], "method")


def crossing(run):
    """Steps to the target, between two evaluations by the logarithm of the loss; all, if it missed."""
    if run["steps"] is None:
        return run["ran"]
    before, high = run["curve"][-2]
    share = log(high / run["target"]) / log(high / run["loss"])
    return before + (run["steps"] - before) * share


def cost(run):
    """Gradients of a million tokens up to there."""
    return run["gradients"] * crossing(run) / run["ran"]


def outcome(run):
    """Steps to the target, or how many were too few and the loss after them; without a target the loss."""
    if run["steps"]:
        return f"{crossing(run):.1f}"
    return f"> {run['ran']} ({run['loss']:.3f})" if run["target"] else f"{run['loss']:.3f}"


def with_error(value, error, digits):
    """The number, and its error unless that is not known (NaN)."""
    return f"{value:.{digits}f}" + ("" if isnan(error) else f" ± {error:.{digits}f}")


def race(title, methods):
    """Methods by their steps to the target, the best first: mean ± standard deviation of a run. A run that
    missed counts with its length. Ratios to the first method, with their standard error."""
    ranked = []
    for method, runs in methods.items():
        steps = [crossing(run) for run in runs]
        missed = None in [run["steps"] for run in runs]
        spread = nan if missed or len(runs) == 1 else stdev(steps)
        ranked.append((missed, mean(steps), spread, spread / mean(steps) / len(runs) ** 0.5, method, runs))
    ranked.sort()
    rows = []
    for missed, steps, spread, error, method, runs in ranked:
        _, best, _, best_error, *_ = ranked[0]
        ratio = steps / best
        seconds = [run["seconds"] for run in runs if run["device"] == "cpu, 1 thread(s)"]
        rows.append({
            "method": method,
            "batch": f"{runs[0]['batch_tokens'] // 1024}k",
            "steps": "> " * missed + with_error(steps, spread, 1),
            "each run": ", ".join(map(outcome, runs)),
            "ratio": "> " * missed + with_error(ratio, ratio * hypot(error, best_error), 2) if rows else "",
            "gradients": f"{mean(map(cost, runs)):.3g}",
            "seconds": f"{mean(seconds):,.0f}" if seconds else ""})
    show(title, rows)


def frontier(runs):
    """{method: {batch in 1024 tokens: (gradients, steps)}} to 1.60 from the warmup, means over seeds, at the
    best of all settings that were tried with that batch and arrived with every seed; for full GN of those
    with three seeds, where there are any."""
    settings = defaultdict(dict)           # {(method, batch, flags without the seed): {flags: run}}
    for run in runs:
        if run["stage"] in STUDY and not run["flags"].startswith("was"):
            method = re.split(", G from|, λ|, betas", run["method"])[0]
            setting = method, run["batch_tokens"] // 1024, re.sub(r"--seed \d+", "", run["flags"])
            settings[setting][run["flags"]] = run
    best = defaultdict(dict)
    for (method, batch, _), found in settings.items():
        if None in [run["steps"] for run in found.values()]:
            continue
        seeds = min(len(found), 3) if " GN" in method else 0
        steps, gradients = (mean(map(of, found.values())) for of in (crossing, cost))
        point = -seeds, steps, gradients
        best[method][batch] = min(point, best[method].get(batch, point))
    return {method: {batch: (gradients, steps) for batch, (_, steps, gradients) in sorted(points.items())}
            for method, points in best.items() if len(points) > 2}


def steps_for(gradients, points):
    """Steps that a method takes with so much work: between two of its batches by the logarithms, none of
    which a smaller batch beats; 0 below the smallest."""
    best = [(work, steps) for work, steps in sorted(points)
            if steps == min(others for less, others in points if less <= work)]
    return np.exp(np.interp(log(gradients), *np.log(best).T, left=-np.inf))


def batches(runs):
    methods = frontier(runs)
    grid("Steps to 1.60 (gradients) at a batch of", "tokens", "{}k", "{1:.1f} ({0:.3g})", methods)
    baselines = [name for name in methods if " GN" not in name]
    rows = []
    for method in sorted(methods.keys() - baselines):
        for batch, (gradients, steps) in methods[method].items():
            row = {"": method, "batch": f"{batch}k", "steps": f"{steps:.1f}", "gradients": f"{gradients:.3g}"}
            for name in baselines:
                other = steps_for(gradients, methods[name].values())
                row[name] = f"{other:.1f} ({other / steps:.2g})" if other else ""
            rows.append(row)
    show("Steps to 1.60 with the same work (times full GN's)", rows)


def inline(title, methods):
    """A row a method, all its runs in one cell; those that are named alike, seeds, beside each other."""
    rows = []
    for method, runs in methods.items():
        cells = [f"{which}: {', '.join(map(outcome, alike))}"
                 for which, alike in grouped(runs, "which").items()]
        rows.append({"method": method, "runs": "; ".join(cells)})
    show(title, rows)


def exactness(runs):
    """{share of the batch that G is made from: {iterations: (work, fall of the loss)}}, one step each."""
    return {share: {int(run["which"]): (run["gradients"], run["curve"][0][1] - run["loss"]) for run in found}
            for share, found in methods_of("exactness", runs).items()}


def logs(folder):
    """The validation losses of a folder's runs."""
    rows = []
    for path in sorted((HERE / folder).iterdir()):
        *_, evaluated = read_log(path)
        losses = [f"{row['val_loss']:.3f}" for row in evaluated[1:]]
        if len(losses) > 12:
            losses[12:] = [f"... {losses[-1]}"]
        rows.append({"run": f"`{path.name}`", "losses": ", ".join(losses)})
    show(f"{folder}: validation loss after each step", rows)


def totals(runs):
    """What the stages took; a run that two of them share counts for the first."""
    counted = {run["flags"]: run for run in reversed(runs)}
    rows = []
    for stage, found in grouped(reversed(counted.values()), "stage").items():
        work = sum(run["gradients"] for run in found)
        rows.append({"stage": stage, "runs": len(found), "gradients": f"{work:,.0f}"})
    show("What the study took", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=HERE / "runs.jsonl")
    runs = load(parser.parse_args().records)
    for stage, title in RACES.items():
        race(title, methods_of(stage, runs))
    batches(runs)
    grid("One step of a million tokens: fall of the loss (gradients) by CG's iterations", "", "{}",
         "{1:.3f} ({0:.3g})", exactness(runs))
    for stage, title in TRIALS.items():
        inline(title, methods_of(stage, runs))
    totals(runs)
    logs("default_run")
    text = (HERE / "bench/9e7bc24-cpu-fp32.txt").read_text()
    print(f"\n**bench/9e7bc24-cpu-fp32.txt**\n\n```\n{text}```")


if __name__ == "__main__":
    main()
