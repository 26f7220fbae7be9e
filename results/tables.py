"""Every table of the records: python results/tables.py [FILE] > results/tables.md"""

import re
import sys
from collections import defaultdict
from math import hypot, isnan, log, nan
from pathlib import Path
from statistics import mean, stdev

from study import HERE, read_list, read_records, read_rows

FIRST_LINES = """# Tables, printed by `python results/tables.py > results/tables.md`

Change the records or that program, not this page.

- **steps**: whole ones, until the run was evaluated at or under its target. `>` marks a run that missed it,
  with its length and its last loss.
- **each run**: a number for each seed.
- **batch**: tokens a step; k is 1,024.
- **work**: gradients of a million tokens, to the end of the last step.
- **CG**: of the GN model, with six iterations, unless the row or protocol.md says otherwise.
- **ratio**: to the steps of the table's first row.
- **interpolated**: between the last two evaluations, by the logarithm of the loss. ± is the deviation of one
  run, or the standard error of a ratio.

How the runs were made is in [protocol.md](protocol.md). CG's work in the older ones is
[a little too low](protocol.md#what-an-older-program-did).
"""
DIRECTIONS = HERE / "directions.jsonl"
STUDY = "tuning", "ending", "batch", "same batch", "large batch"  # stages that go from the warmup to 1.60
MAIN = {  # of the stage "same batch": the name in the main comparison
    "full GN, inner SOAP, 2 passes": "**full GN, inner SOAP**, two passes",
    "full GN, inner SOAP": "full GN, inner SOAP, one pass",
    "full GN, CG, GN model": "**full GN, CG**, GN model, six iterations",
    "full GN, CG, as by default": "full GN, CG, as by default",
    "full GN, inner Muon": "full GN, inner Muon, one pass",
    "K-FAC": "K-FAC",
    "SOAP": "SOAP",
    "Muon": "Muon",
    "AdamW": "AdamW",
}
MAIN_COLUMNS = "method", "steps", "each run", "ratio", "work", "interpolated steps", "interpolated ratio"
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
    "exactness": "One step of a million tokens, by iterations of CG",
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


def show(title, rows, wanted=None):
    """Print a table of rows {column: cell}, without columns that are empty; none where there are no rows."""
    if not rows:
        return
    columns = [column for column in wanted or rows[0] if any(row[column] for row in rows)]
    print(f"\n## {title}\n")
    for cells in [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]:
        print("| " + " | ".join(cells) + " |")


def load(path=HERE / "runs.jsonl"):
    """The lines of the list that have a record, in its order: {stage, method, which, flags, *the record}. Added
    are its machine, and its steps "between" the last two evaluations."""
    records = read_records(path)
    runs = [{**records[line.key], **line._asdict()} for line in read_list() if line.key in records]
    for run in runs:
        run["machine"] = re.search("H100|H200|cpu", run["device"])[0].upper()
        run["between"] = crossing(run)
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


def listed(runs, text=whole):
    return ", ".join(filter(None, map(text, runs)))


def average(key, runs):
    return mean(run[key] for run in runs)


def with_error(value, error, digits):
    """The number, and its error unless that is not known (NaN)."""
    return f"{value:.{digits}f}" + ("" if isnan(error) else f" ± {error:.{digits}f}")


def rank(runs):
    """(whether one of them missed, mean steps, interpolated ones): the less the better."""
    return None in [run["steps"] for run in runs], average("ran", runs), average("between", runs)


def spread(runs):
    """Standard deviation of one run, if all arrived, over the mean of all."""
    between = [run["between"] for run in runs]
    return nan if rank(runs)[0] or len(runs) == 1 else stdev(between) / mean(between)


def race(methods):
    """Rows of methods by their steps to the target, the best first. A run that missed counts as its length."""
    rows = []
    ranked = sorted(methods.items(), key=lambda item: rank(item[1]))
    for method, runs in ranked:
        _, best = ranked[0]
        missed, steps, between = rank(runs)
        over = "> " * missed
        ratio = between / average("between", best)
        error = hypot(*(spread(each) / len(each) ** 0.5 for each in (runs, best)))
        row = {
            "method": method,
            "batch": f"{runs[0]['batch_tokens'] // 1024}k",
            "steps": f"{over}{steps:.1f}",
            "each run": listed(runs),
            "ratio": f"{over}{steps / average('ran', best):.2f}",
            "work": f"{average('gradients', runs):.3g}",
            "interpolated steps": over + with_error(between, between * spread(runs), 1),
            "each run, interpolated": listed(runs, interpolated),
            "interpolated ratio": over + with_error(ratio, ratio * error, 2),
            "machine": ", ".join(grouped(runs, "machine")),
        }
        if not rows:
            row.update({"ratio": "", "interpolated ratio": ""})
        rows.append(row)
    return rows


def best_runs(runs, stages, family, fair):
    """{method: {batch in 1024 tokens: the runs of its best setting, one for each seed}}.

    The best takes the fewest steps, interpolated. A setting must arrive with each of its seeds. Full GN's must
    have three seeds where any has; if `fair`, baselines' too. Left out are runs of an earlier program, and
    methods that say that they had the earlier M."""
    chosen = {
        run["flags"]: run
        for run in runs
        if run["stage"] in stages
        and not run["flags"].startswith("was")
        and "fourth root" not in run["method"]
    }
    settings = defaultdict(list)
    for flags, run in chosen.items():
        method = re.match(family, run["method"])[0]
        settings[method, run["batch_tokens"] // 1024, re.sub(r"--seed \d+", "", flags)].append(run)

    def order(found):
        return -min(len(found), 3) * (fair or "gn" in found[0]["flags"]), average("between", found)

    best = defaultdict(dict)
    for (method, batch, _), found in settings.items():
        if not rank(found)[0]:
            best[method][batch] = min(found, best[method].get(batch, found), key=order)
    return best


def frontier(runs):
    """{method: {batch in 1024 tokens: (work, steps)}} to 1.60 from the warmup, means over seeds."""
    best = best_runs(runs, STUDY, FAMILY + "(, 2 passes)?", fair=False)
    return {
        method: {
            batch: (average("gradients", found), average("ran", found))
            for batch, found in sorted(points.items())
        }
        for method, points in best.items()
        if len(points) > 2
    }


def batches(methods):
    every = sorted(set().union(*methods.values()))
    rows = []
    for method, points in methods.items():
        row = {"tokens": method}
        for size in every:
            row[f"{size}k"] = "{1:.1f} ({0:.3g})".format(*points[size]) if size in points else ""
        rows.append(row)
    show("Steps at each batch, to 1.60 (work)", rows)


def leads(runs):
    """Full GN's runs beside the best baseline's with the same batch, or with the largest of a baseline. Yields
    (solver, parameters, batch in 1024 tokens, its runs, the baseline's)."""
    for parameters, stages in SIZES.items():
        best = best_runs(runs, stages, FAMILY, fair=True)
        baselines = [
            (batch, average("between", found), name, found)
            for name, points in best.items()
            for batch, found in points.items()
            if " GN" not in name
        ]
        for solver in ("inner SOAP", "CG"):
            for batch, its in sorted(best[f"full GN, {solver}"].items()):
                same = [row for row in baselines if row[0] == min(batch, max(baselines)[0])]
                if same:
                    yield solver, parameters, batch, its, min(same)[-1]


def lead(its, baseline, key="between"):
    return average(key, baseline) / average(key, its)


def sizes(runs):
    show(
        "Lead by size",
        [
            {
                "solver": solver,
                "parameters": f"{parameters:,}",
                "tokens a step": f"{batch}k",
                "tokens a parameter": f"{1024 * batch / parameters:.2g}",
                "steps": listed(its),
                "best baseline": "{method}: ".format(**baseline[0]) + listed(baseline),
                "lead": f"{lead(its, baseline, 'ran'):.1f}",
                "interpolated": f"{lead(its, baseline):.1f}",
            }
            for solver, parameters, batch, its, baseline in leads(runs)
        ],
    )


def directions():
    """What directions were worth on whole batches; the records of the scans are left out."""
    return [row for row in read_rows(DIRECTIONS) if row["share"] == 1]


def worth(rows):
    """A row for each direction from a point."""
    rungs = grouped(rows, "rung").items()
    show(
        "One direction from {loss:.2f}, {parameters:,} parameters".format(**rows[0]),
        [
            {
                "direction": rung,
                "fall of the loss": f"{average('fall', found):.3g}",
                "each batch": listed(found, lambda row: f"{row['fall']:.4f}"),
                "work": f"{average('work', found):.3g}",
                "cosine": listed(found, lambda row: row["cosine"] and f"{row['cosine']:.2f}"),
                "flags": f"`{found[0]['flags'].removeprefix('--opt full_gn --line_search none ')}`",
            }
            for rung, found in sorted(rungs, key=lambda item: average("fall", item[1]))
        ],
    )


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
                "work": f"{average('gradients', alike):.3g}",
            }
            for method, runs in methods.items()
            for which, alike in grouped(runs, "which").items()
        ],
    )


def main():
    runs = load(*map(Path, sys.argv[1:]))
    print(FIRST_LINES, end="")
    same = methods_of("same batch", runs)
    rows = race({name: same[method] for method, name in MAIN.items() if method in same})
    show("The main comparison", rows, MAIN_COLUMNS)
    for stage, title in RACES.items():
        show(title, race(methods_of(stage, runs)))
    batches(frontier(runs))
    sizes(runs)
    for rows in grouped(directions(), "point").values():
        worth(rows)
    for stage, title in TRIALS.items():
        trials(title, methods_of(stage, runs))


if __name__ == "__main__":
    main()
