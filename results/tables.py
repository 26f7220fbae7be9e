"""Every table of results/README.md, from the records: python results/tables.py [--records FILE]

Mean seconds are of the runs on one core, other devices left out; a gradient is one over a million tokens.
"""
import argparse
from pathlib import Path
from statistics import mean, stdev

from study import HERE, read_list, read_log, read_records


def show(title, header, rows):
    print(f"\n**{title}**\n")
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(map(str, row)) + " |")


def average(values):
    """Mean ± standard error."""
    error = f" ± {stdev(values) / len(values) ** 0.5:.2g}" if len(set(values)) > 1 else ""
    return f"{mean(values):.4g}{error}"


def grouped(stage, records):
    """{method: [(which, record), ...]} of a stage, in the list's order."""
    methods = {}
    for line in read_list():
        record = records.get(line.flags.removeprefix("was "))
        if line.stage == stage and record:
            methods.setdefault(line.method, []).append((line.which, record))
    return methods


def outcome(run):
    """Steps to the target, or how many were too few and the loss after them; without a target the loss."""
    missed = f"> {run['ran']} ({run['loss']:.3f})" if run["target"] else f"{run['loss']:.3f}"
    return str(run["steps"] or missed)


def race(title, stage, records):
    """Methods by their steps to the target, the best first. A run that missed it counts with its length."""
    methods = {method: [run for _, run in runs] for method, runs in grouped(stage, records).items()}
    steps = {method: mean(run["ran"] for run in runs) for method, runs in methods.items()}
    rows = []
    for method in sorted(steps, key=steps.get):
        runs = methods[method]
        missed = "" if all(run["steps"] for run in runs) else "> "
        ratio = steps[method] / min(steps.values())
        core = [run["seconds"] for run in runs if run["device"].startswith("cpu")]
        rows.append([
            method,
            f"> {steps[method]:.4g}" if missed else average([run["steps"] for run in runs]),
            ", ".join(map(outcome, runs)),
            f"{missed}{ratio:.3g}",
            f"{runs[0]['batch_tokens'] // 1024}k",
            f"{mean(run['tokens'] for run in runs) / 1e6:.3g}",
            f"{mean(run['gradients'] for run in runs):.3g}",
            f"{mean(core):,.0f}" if core else ""])
    show(title, ["method", "steps", "each seed", "ratio", "batch", "M tokens", "gradients", "seconds"], rows)


def best_steps(records):
    """{method: {batch: steps to the target}}, at the better of the rates that were tried there."""
    found = {}
    for method, runs in grouped("batch", records).items():
        found[method] = {}
        for _, run in runs:
            size = run["batch_tokens"]
            found[method][size] = min(run["steps"] or run["ran"], found[method].get(size, run["ran"]))
    return found


def batches(records):
    methods = best_steps(records)
    sizes = sorted(set().union(*methods.values()))
    rows = [[method, *(steps.get(size, "") for size in sizes)] for method, steps in methods.items()]
    show("Steps to 1.60 at a batch of", ["tokens", *(f"{size // 1024}k" for size in sizes)], rows)


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
    race("Steps to 1.60 from the warmup, three seeds", "steep", records)
    race("Steps to 1.33 from the warmup", "slow", records)
    race("Steps to 1.60 from random initialisation", "random", records)
    batches(records)
    inline("From random initialisation at 262,144 tokens a step, 68 steps, to 1.60", "random tuning", records)
    solves(records)
    inline("One thing changed: loss after 10 steps (CG 6, baselines 40)", "ablation", records)
    inline("An earlier CG", "earlier CG", records)
    inline("Tuning: steps to 1.60 at half the batch, seed 0", "tuning", records)
    inline("Endings of the baselines: steps to 1.60, seed 0", "ending", records)
    inline("Other runs to 1.33", "slow trials", records)
    race("The quick study: steps to 1.75", "quick", records)
    inline("The quick study, smaller batches", "quick batch", records)
    totals(records)
    for folder in ("default_run", "choosing_defaults", "bf16_and_fp32"):
        logs(folder)
    print("\n**bench/89558e7-cpu-fp32.txt**\n")
    print("```\n" + (HERE / "bench/89558e7-cpu-fp32.txt").read_text() + "```")


if __name__ == "__main__":
    main()
