"""Every table of the records: python results/tables.py [--records FILE] > results/tables.md"""

import argparse
import re
from collections import defaultdict
from math import hypot, isnan, log, nan
from pathlib import Path
from statistics import mean, stdev

from study import HERE, read_list, read_log, read_records

FIRST_LINES = """# Tables, printed by `python results/tables.py > results/tables.md`

Change the records or that program, not this page.

- **steps**: whole ones, until the run was evaluated at or under its target. `>` marks a run that missed it,
  with its length and its last loss.
- **each run**: a number for each seed, by the machine that it was made on.
- **work**: gradients of a million tokens, to the end of the last step.
- **ratio**: to the steps of the table's first row.
- **interpolated**: between the last two evaluations, by the logarithm of the loss. ± is the deviation of one
  run, or the standard error of a ratio.
- **seconds**: means of the runs that had a core of an idle machine.

How the runs were made is in [protocol.md](protocol.md). CG's work is by
[an older account](protocol.md#what-an-older-program-did), which is a little too low.
"""
STUDY = "tuning", "ending", "batch", "same batch", "large batch"  # stages that go from the warmup to 1.60
MAIN = {  # of the stage "same batch": the name in the main comparison
    "full GN, inner SOAP, 2 passes": "**full GN, inner SOAP**, two passes",
    "full GN, inner SOAP": "full GN, inner SOAP, one pass",
    "full GN, CG, prox-linear, G from 1/2": "**full GN, CG**, prox-linear, G from a half ¹ ²",
    "full GN, CG": "full GN, CG, GN model, G from a quarter ¹",
    "full GN, inner Muon": "full GN, inner Muon, one pass",
    **{name: name for name in ("K-FAC", "SOAP", "Muon", "AdamW")},
}
RACES = {
    "same batch": "The same batch, 262,144 tokens, to 1.60",
    "large batch": "Larger batches, to 1.60",
    "slow": "Late, to 1.33",
    "random": "From random weights, to 1.60",
    "49k parameters": "49 thousand parameters, to 1.77",
    "1.1M parameters": "1.1 million parameters, to 1.39",
    "English": "English, to 1.54",
    "quick": "The quick study, to 1.75",
}
SIZES = {49_312: ["49k parameters"], 164_160: STUDY, 1_115_264: ["1.1M parameters"]}
TRIALS = {
    "tuning": "Tuning at half of the batch, to 1.60",
    "ending": "Endings of the baselines, to 1.60",
    "slow trials": "Other runs to 1.33",
    "small batch": "Small batches, to 1.75",
    "random tuning": "Tuning from random weights, to 1.60",
    "starts": "Five steps from random weights",
    "ablation": "One thing changed",
    "earlier CG": "An earlier CG",
}
FAMILY = r"(\w+ GN, )?[^,]+"  # of a method's name; G's share, rates, betas and the like follow


def show(title, rows):
    """Print a table of rows {column: cell}, without columns that are empty; none where there are no rows."""
    columns = [column for column in rows[0] if any(row[column] for row in rows)] if rows else []
    if not columns:
        return
    print(f"\n## {title}\n")
    for cells in [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]:
        print("| " + " | ".join(map(str, cells)) + " |")


def grid(title, corner, column, cell, points):
    """Print {row: {column: point}}, given how a column and a point are written."""
    columns = sorted(set().union(*points.values()))
    show(
        title,
        [
            {corner: name, **{column.format(c): cell.format(*row[c]) if c in row else "" for c in columns}}
            for name, row in points.items()
        ],
    )


def load(path=HERE / "runs.jsonl"):
    """The lines of the list that have a record, in its order: {stage, method, which, flags, *the record}. Added
    are steps and work "between" the last two evaluations."""
    records = read_records(path)
    runs = [{**records[line.key], **line._asdict()} for line in read_list() if line.key in records]
    for run in runs:
        run["between"] = crossing(run)
        run["work between"] = run["gradients"] * run["between"] / run["ran"]
    return runs


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


def whole(run):
    """The steps that it took, or how many were too few and the loss after them; nothing without a target."""
    if run["steps"] or not run["target"]:
        return str(run["steps"] or "")
    return f"> {run['ran']} ({run['loss']:.3f})"


def interpolated(run):
    return f"{run['between']:.1f}" if run["steps"] else "-" * bool(run["target"])


def each(runs, text=whole):
    """A text for each run, by the machines that they were made on."""
    machines = defaultdict(list)
    for run in runs:
        machines[re.search("H100|H200|cpu", run["device"])[0].upper()].append(run)
    return "; ".join(f"{name} {listed(found, text)}" for name, found in machines.items())


def listed(runs, text=whole):
    return ", ".join(filter(None, map(text, runs)))


def average(key, runs):
    return mean(run[key] for run in runs)


def with_error(value, error, digits):
    """The number, and its error unless that is not known (NaN)."""
    return f"{value:.{digits}f}" + ("" if isnan(error) else f" ± {error:.{digits}f}")


def race(methods):
    """Rows of methods by their steps to the target, the best first. A run that missed counts as its length."""
    ranked = []
    for method, runs in methods.items():
        between = average("between", runs)
        missed = None in [run["steps"] for run in runs]
        spread = nan if missed or len(runs) == 1 else stdev(run["between"] for run in runs)
        ranked.append(
            (missed, average("ran", runs), between, spread, spread / between / len(runs) ** 0.5, method)
        )
    ranked.sort()
    rows = []
    for missed, steps, between, spread, error, method in ranked:
        _, best, best_between, _, best_error, _ = ranked[0]
        runs = methods[method]
        over = "> " * missed
        ratio = between / best_between
        seconds = [run["seconds"] for run in runs if run["device"] == "cpu, 1 thread(s)"]
        rows.append(
            {
                "method": method,
                "batch": f"{runs[0]['batch_tokens'] // 1024}k",
                "steps": f"{over}{steps:.1f}",
                "each run": each(runs),
                "ratio": f"{over}{steps / best:.2f}" if rows else "",
                "work": f"{average('gradients', runs):.3g}",
                "interpolated steps": over + with_error(between, spread, 1),
                "each run, interpolated": each(runs, interpolated),
                "interpolated ratio": over + with_error(ratio, ratio * hypot(error, best_error), 2)
                if rows
                else "",
                "interpolated work": f"{average('work between', runs):.3g}",
                "seconds": f"{mean(seconds):,.0f}" if seconds else "",
            }
        )
    return rows


def best_runs(runs, stages, family, fair):
    """{method: {batch in 1024 tokens: the runs of its best setting, one for each seed}}.

    The best takes the fewest steps, interpolated. A setting must arrive with each of its seeds. Full GN's must
    have three seeds where any has; if `fair`, baselines' too."""
    settings = defaultdict(dict)  # {(method, batch, flags without the seed): {flags: run}}
    for run in runs:
        if run["stage"] in stages and not run["flags"].startswith("was"):
            method = re.match(family, run["method"])[0]
            setting = method, run["batch_tokens"] // 1024, re.sub(r"--seed \d+", "", run["flags"])
            settings[setting][run["flags"]] = run

    def rank(found):
        return -min(len(found), 3) * (fair or "gn" in found[0]["flags"]), average("between", found)

    best = defaultdict(dict)
    for (method, batch, _), found in settings.items():
        found = list(found.values())
        if None not in [run["steps"] for run in found]:
            best[method][batch] = min(found, best[method].get(batch, found), key=rank)
    return best


def frontier(runs, work="gradients", steps="ran"):
    """{method: {batch in 1024 tokens: (work, steps)}} to 1.60 from the warmup, means over seeds."""
    best = best_runs(runs, STUDY, FAMILY + "(, 2 passes)?", fair=False)
    return {
        method: {
            batch: (average(work, found), average(steps, found)) for batch, found in sorted(points.items())
        }
        for method, points in best.items()
        if len(points) > 2
    }


def sizes(runs):
    """Leads of full GN over the best baseline with the same batch, or with the largest of a baseline."""
    rows = []
    for parameters, stages in SIZES.items():
        best = best_runs(runs, stages, FAMILY, fair=True)
        baselines = [
            (batch, average("between", found), name, found)
            for name, points in best.items()
            if " GN" not in name
            for batch, found in points.items()
        ]
        for batch in sorted(best["full GN, inner SOAP"]):
            same = [row for row in baselines if row[0] == min(batch, max(baselines)[0])]
            if not same:
                continue
            at, _, name, found = min(same)
            row = {
                "parameters": f"{parameters:,}",
                "tokens a step": f"{batch}k",
                "tokens a parameter": f"{1024 * batch / parameters:.2g}",
                "best baseline": f"{name}, {at}k: {listed(found)}",
            }
            for solver in ("inner SOAP", "CG"):
                its = best[f"full GN, {solver}"].get(batch, [])
                leads = [average(key, found) / average(key, its) for key in ("ran", "between") if its]
                row[solver] = listed(its)
                row[f"{solver}'s lead (interpolated)"] = "{:.1f} ({:.1f})".format(*leads) if its else ""
            rows.append(row)
    show("Lead by size", rows)


def trials(title, methods):
    """A row for each setting of a method, with all its seeds; losses of runs that had no target."""
    show(
        title,
        [
            {
                "method": method,
                "setting": which,
                "steps": listed(alike),
                "interpolated": listed(alike, interpolated),
                "loss": "" if alike[0]["target"] else listed(alike, lambda run: f"{run['loss']:.3f}"),
            }
            for method, runs in methods.items()
            for which, alike in grouped(runs, "which").items()
        ],
    )


def exactness(runs):
    """{share of the batch that G is made from: {iterations: (work, fall of the loss)}}, one step each."""
    return {
        share: {int(run["which"]): (run["gradients"], run["curve"][0][1] - run["loss"]) for run in found}
        for share, found in methods_of("exactness", runs).items()
    }


def logs(folder):
    """The validation losses of a folder's runs."""
    rows = []
    for path in sorted((HERE / folder).iterdir()):
        *_, evaluated = read_log(path)
        rows.append(
            {"run": f"`{path.name}`", "losses": ", ".join(f"{row['val_loss']:.3f}" for row in evaluated[1:])}
        )
    show(f"Validation losses in {folder}/", rows)


def totals(runs):
    """What the stages took; a run that two of them share counts for the first."""
    counted = {run["flags"]: run for run in reversed(runs)}
    rows = []
    for stage, found in grouped(reversed(counted.values()), "stage").items():
        work = sum(run["gradients"] for run in found)
        rows.append({"stage": stage, "runs": len(found), "work": f"{work:,.0f}"})
    show("Runs and work of each stage", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=Path, default=HERE / "runs.jsonl")
    runs = load(parser.parse_args().records)
    print(FIRST_LINES, end="")
    columns = "method", "steps", "each run", "ratio", "work", "interpolated steps", "interpolated ratio"
    same = methods_of("same batch", runs)
    main_rows = race({MAIN[method]: same[method] for method in MAIN if method in same})
    show("The main comparison", [{column: row[column] for column in columns} for row in main_rows])
    for stage, title in RACES.items():
        show(title, race(methods_of(stage, runs)))
    cell = "{1:.1f} ({0:.3g})"
    grid("Steps at each batch, to 1.60 (work)", "tokens", "{}k", cell, frontier(runs))
    grid(
        "Interpolated steps at each batch, to 1.60 (work)",
        "tokens",
        "{}k",
        cell,
        frontier(runs, "work between", "between"),
    )
    sizes(runs)
    grid(
        "One step of a million tokens: fall of the loss (work) by CG's iterations",
        "",
        "{}",
        "{1:.3f} ({0:.3g})",
        exactness(runs),
    )
    for stage, title in TRIALS.items():
        trials(title, methods_of(stage, runs))
    totals(runs)
    logs("default_run")


if __name__ == "__main__":
    main()
