"""Pictures, by matplotlib.

python results/plot.py                 # the study's: directions.svg, frontier.svg, leads.svg, step.svg
python results/plot.py out/a           # what each step of a run did, in run.svg
python results/plot.py out/a out/b     # what each run took to each loss, and a picture of it, run.svg
"""

import argparse
import math
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

from study import HERE, read_log, read_rows
from tables import average, directions, frontier, grouped, lead, leads, load

LOSS = "validation loss, nats per token"
COLOURS = {}  # {name: the one that it has in every picture}
PANELS = {  # of one run: {label: ({curve: its key in the log}, settings)}
    "loss": ({"on the batch, before its step": "train_loss", "validation": "val_loss"}, {}),
    "ρ and α": ({"ρ, actual over promised change": "rho", "α, how much of d was taken": "alpha"}, {}),
    "solver": (
        {"iterations of CG": "cg_iterations", "inner steps": "inner_steps", "learning rate": "lr"},
        {"ylim": (0, None)},
    ),
}
COSTS = {  # of runs that are compared
    "step": "outer steps",
    "tokens": "M tokens",
    "grad_equivalents": "work, gradients of 1M tokens",
}
LADDER = {  # {what is kept of G: its directions in directions.jsonl, the pale one first}
    "nothing: the gradient": ["gradient"],
    "a diagonal: AdamW": ["AdamW", "AdamW, moments"],
    "Muon": ["Muon", "Muon, moments"],
    "SOAP": ["SOAP", "SOAP, moments"],
    "K-FAC": ["K-FAC", "K-FAC, moments"],
    "K-FAC, the best damping": ["K-FAC's inverse"],
    "exact blocks of tensors": ["CG, tensors, 1", "CG, tensors, 8"],
    "blocks of kinds of tensors": ["CG, kinds, 1", "CG, kinds, 8"],
    "blocks of layers": ["CG, layers, 1", "CG, layers, 8"],
    "all of G": ["CG, all, 1", "CG, all, 8"],
    "all, by inner SOAP": ["inner SOAP, 1", "inner SOAP, 2"],
}
STEP = {  # {curve of step.jsonl, first on unseen tokens, then on the line search's rows: its style}
    "\u2002network, unseen tokens": "C0-",
    "\u2002linearised": "C1-",
    "\u2002GN, a parabola": "C2-",
    "\u2002network, rows of the search": "C0:",
    "\u2002linearised, these rows": "C1:",
}


@contextmanager
def picture(path, width, height, rows=1, columns=1, **options):
    """Panels of matplotlib to draw in, a list; then the file."""
    import matplotlib.style
    from matplotlib.figure import Figure

    matplotlib.style.use(HERE / "pictures.mplstyle")
    figure = Figure((width, height), layout="constrained")
    yield figure.subplots(rows, columns, squeeze=False, **options).ravel()
    figure.savefig(path, metadata={"Date": None})
    print(f"drawn: {path}")


def draw(axis, lines, marker="", **settings):
    """Lines {name: [[(x, y), ...], ...]} into a panel, the first name on top; logarithmic axes."""
    for depth, (name, curves) in enumerate(lines.items()):
        colour = COLOURS.setdefault(name, f"C{len(COLOURS)}")
        for i, curve in enumerate(curves):
            axis.plot(*zip(*curve), color=colour, label="_" * i + name, zorder=9 - depth, marker=marker)
    axis.set(xscale="log", **settings)
    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() == "log":
            side.get_major_locator().set_params(subs=(1, 2, 3, 5))
            side.set_major_formatter("{x:.7g}")
            side.set_minor_formatter("")


def study(runs):
    methods = frontier(runs)
    with picture(HERE / "frontier.svg", 10, 5) as [axis]:
        draw(
            axis,
            {name: [points.values()] for name, points in methods.items()},
            "o",
            xlabel="work to a validation loss of 1.60, in gradients of a million tokens",
            ylabel="whole steps",
            yscale="log",
        )
        for name, points in methods.items():
            for batch, point in points.items():
                axis.text(*point, f"\u2002{batch}k", fontsize=7, color=COLOURS[name])
        axis.figure.legend(loc="outside right upper")

    curves = defaultdict(list)
    for solver, parameters, batch, its, baseline in leads(runs):
        point = 1.024 * batch, parameters / 1000, lead(its, baseline)
        curves[f"{solver}, {parameters:,} parameters"].append(point)
    with picture(HERE / "leads.svg", 11, 5, 1, 2, sharey=True) as panels:
        for power, axis in enumerate(panels):
            lines = {name: [[(x / p**power, y) for x, p, y in found]] for name, found in curves.items()}
            labels = "thousand tokens a step", "tokens a step for each parameter"
            draw(axis, lines, "o", xlabel=labels[power], yscale="log")
        panels[0].set_ylabel("lead: steps of the best baseline / full GN's, interpolated")
        panels[0].legend()

    points = read_rows(HERE / "step.jsonl")
    with picture(HERE / "step.svg", 12, 4.5, 1, len(points)) as panels:
        for axis, point in zip(panels, points):
            alphas = point["alphas"]
            for (label, style), losses in zip(STEP.items(), point["unseen"] + point["search"]):
                axis.plot(alphas, losses, style)
                axis.text(alphas[-1], losses[-1], label, color=style[:2], va="center", fontsize=8)
            network, linear, _ = point["unseen"]
            axis.fill_between(alphas, network, linear, color="C1", alpha=0.15)
            axis.axvline(point["alpha"], color="grey")
            axis.set(
                title=f"From a loss of {network[0]:.2f}",
                xlabel="length α; the line search takes {alpha:.2f}, where ρ = {rho:.2f}".format(**point),
                ylabel="loss, nats per byte",
            )


def ladder(rows):
    """What one direction is worth, a panel a point. What is not recorded yet has no bar."""
    points = grouped(rows, "point").values()
    with picture(HERE / "directions.svg", 12, 5, 1, len(points), sharey=True) as panels:
        for axis, found in zip(panels, points):
            rungs = grouped(found, "rung")
            for y, names in enumerate(LADDER.values()):
                for name in filter(rungs.get, names):
                    fall, work = (average(key, rungs[name]) for key in ("fall", "work"))
                    side = y + 0.2 * (len(names) - 1) - 0.4 * names.index(name)
                    axis.barh(side, fall, 0.4, color="C0", alpha=1 if name == names[-1] else 0.4)
                    axis.text(fall, side, f"\u2002{fall:.3f} ({work:.1f})", va="center", fontsize=7)
            axis.set_title("loss {loss:.2f}, {parameters:,} parameters".format(**found[0]))
            axis.margins(x=0.3)
        axis.figure.supxlabel(
            "fall of the loss on unseen tokens (and work, in gradients of the batch)\n"
            "pale: one system, one pass, no moments; dark: eight systems, two passes, moments; "
            "no bar: not measured",
            fontsize=9,
        )
        panels[0].set_yticks(range(len(LADDER)), LADDER)


def one_run(folder, path):
    """What each step did. A panel for which the run has no numbers is left out."""
    head, rows, _ = read_log(folder)
    layers = ["embedding", *(f"block {i + 1}" for i in range(head["model"]["n_layer"])), "head"]
    for row in rows:
        row.update(zip(layers, row.get("layer_norms") or []))

    def curve(key):
        before = key == "train_loss"
        return [(row["step"] - before, row[key]) for row in rows if row.get(key) is not None]

    panels = {**PANELS, "how far a layer moved": (dict(zip(layers, layers)), {"yscale": "log"})}
    panels = {label: panel for label, panel in panels.items() if any(map(curve, panel[0].values()))}
    with picture(path, 8, 9, len(panels), sharex=True) as axes:
        for axis, (label, (keys, settings)) in zip(axes, panels.items()):
            for name, key in keys.items():
                if curve(key):
                    axis.plot(*zip(*curve(key)), label=name, marker=".")
            for row in rows:
                if row.get("accepted") is False:
                    axis.axvline(row["step"], color="red", linestyle=":")
            axis.set(ylabel=label, **settings)
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=6)
        axis.set_xlabel("step (dotted: rejected)")
        if curve("damping"):
            right = axes[1].twinx()
            right.semilogy(*zip(*curve("damping")), "C2.-")
            right.set_ylabel("damping λ", color="C2")


def compare(folders, path):
    """Print what each run took to each loss, and draw its loss against steps, tokens and work."""
    runs = {}
    for folder in folders:
        head, _, runs[folder] = read_log(folder)
        batch = head["config"]["batch_tokens"] / 1e6  # work is logged in gradients of it
        for row in runs[folder]:
            row["tokens"] /= 1e6
            row["grad_equivalents"] *= batch
    reached = max(min(row["val_loss"] for row in rows) for rows in runs.values())
    common = math.ceil(20 * reached) / 20  # of all of them, rounded up
    print(f"{'loss':6}{'run':30}{'steps':>8}{'M tokens':>10}{'gradients of 1M':>18}{'seconds':>10}")
    for loss in (common + 0.4, common + 0.2, common):
        for name, rows in runs.items():
            hits = [row for row in rows if row["val_loss"] <= loss]
            missed = "" if hits else ">"
            print(f"{loss:<6.2f}{name:30}{missed:>2}", end="")
            print(
                "{step:6}{tokens:10.2f}{grad_equivalents:18.2f}{seconds:10.0f}".format(**[*hits, rows[-1]][0])
            )
    with picture(path, 14, 4.2, 1, 3, sharey=True) as panels:
        for axis, (key, label) in zip(panels, COSTS.items()):
            lines = {name: [[(row[key], row["val_loss"]) for row in rows[1:]]] for name, rows in runs.items()}
            draw(axis, lines, xlabel=label)
        panels[0].set_ylabel(LOSS)
        panels[0].legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs; none: the study's pictures")
    parser.add_argument("--save", type=Path, default="run.svg", help="where to, .svg or .png")
    args = parser.parse_args()
    try:
        if len(args.runs) > 1:
            compare(args.runs, args.save)
        elif args.runs:
            one_run(*args.runs, args.save)
        else:
            study(load())
            ladder(directions())
    except (ImportError, OSError, ValueError) as e:
        parser.exit(2, f"plot.py: error: cannot draw this: {e}\n")


if __name__ == "__main__":
    main()
