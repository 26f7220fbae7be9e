"""Pictures, by matplotlib.

python results/plot.py                 # frontier.svg, loss.svg, exactness.svg
python results/plot.py out/a out/b     # any runs: what each took to each loss, and a picture, loss.svg
"""

import argparse
import math
from contextlib import contextmanager
from pathlib import Path

from study import HERE, read_log
from tables import exactness, frontier, load, methods_of

LOSS = "validation loss, nats per token"


@contextmanager
def picture(path, width, height, panels=1, **options):
    """A panel of matplotlib, or panels, to draw in; then the file."""
    import matplotlib
    from matplotlib.figure import Figure

    tab = matplotlib.colormaps["tab20"].colors  # ten, and a pale one of each
    matplotlib.rcParams.update(
        {
            "axes.grid": True,
            "grid.alpha": 0.3,
            "svg.fonttype": "none",
            "svg.hashsalt": "the same file each time",
            "axes.prop_cycle": matplotlib.cycler(color=tab[::2] + tab[1::2]),
        }
    )
    figure = Figure((width, height), layout="constrained")
    yield figure.subplots(1, panels, **options)
    figure.savefig(path, metadata={"Date": None})
    print(f"drawn: {path}")


def draw(axis, lines, colours, marker="", **settings):
    """Lines {name: [[(x, y), ...], ...]} into a panel, the first name on top; a colour a name, the next one
    for a name that has none yet. Logarithmic axes have 1, 2, 5, 10, ..."""
    for depth, (name, curves) in enumerate(lines.items()):
        colour = colours.setdefault(name, f"C{len(colours)}")
        for i, curve in enumerate(curves):
            axis.plot(*zip(*curve), color=colour, label="_" * i + name, zorder=9 - depth, marker=marker)
    axis.set(xscale="log", **settings)
    for side in (axis.xaxis, axis.yaxis):
        if side.get_scale() == "log":
            side.get_major_locator().set_params(subs=(1, 2, 5))
            side.set_major_formatter("{x:,.10g}")
            side.set_minor_formatter("")


def one_curve(groups):
    """{name: {key: point}} as lines."""
    return {name: [points.values()] for name, points in groups.items()}


def against_steps(stage, runs):
    """{method: curves of its runs}, without step 0, which a logarithmic axis does not have."""
    return {method: [run["curve"][1:] for run in found] for method, found in methods_of(stage, runs).items()}


def study(runs):
    colours = {}
    methods = frontier(runs)
    with picture(HERE / "frontier.svg", 10, 5) as axis:
        draw(
            axis,
            one_curve(methods),
            colours,
            "o",
            xlabel="work to 1.60, gradients of a million tokens",
            ylabel="whole steps to 1.60",
            yscale="log",
        )
        for name, points in methods.items():
            for batch, point in points.items():
                axis.annotate(
                    f"{batch}k",
                    point,
                    xytext=(4, 3),
                    textcoords="offset points",
                    fontsize=7,
                    color=colours[name],
                )
        axis.figure.legend(loc="outside right upper")

    with picture(HERE / "loss.svg", 11, 5, panels=2) as (left, right):
        draw(
            left,
            against_steps("same batch", runs),
            colours,
            ylim=(1.55, 2.5),
            ylabel=LOSS,
            xlabel="outer steps of 262,144 tokens, to 1.60",
        )
        draw(
            right,
            against_steps("slow", runs),
            colours,
            ylim=(1.3, 2.5),
            xlabel="outer steps, to 1.33, with a rate that falls",
        )
        left.figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)

    curves = one_curve(exactness(runs))
    for name in ("full GN, inner SOAP, betas 0.9 0.999", "full GN, inner Muon"):
        curves[name] = [
            [
                (run["gradients"] / run["ran"], run["curve"][0][1] - run["curve"][1][1])
                for run in methods_of("large batch", runs)[name]
            ]
        ]
    with picture(HERE / "exactness.svg", 6.5, 4) as axis:
        draw(
            axis,
            curves,
            {},
            "o",
            xlabel="work of one step, gradients of a million tokens",
            ylabel="fall of the validation loss",
        )
        axis.legend()


def compare(folders, path):
    """Print what each run took to each loss, and draw its loss against steps, tokens and work."""
    runs = {}
    for folder in folders:
        head, _, evaluated = read_log(folder)
        scale = head["config"]["batch_tokens"] / 1e6  # work is logged in gradients of the batch
        runs[Path(folder).name] = [
            (
                row["step"],
                row["tokens"] / 1e6,
                scale * row["grad_equivalents"],
                row["seconds"],
                row["val_loss"],
            )
            for row in evaluated
        ]
    reached = max(min(point[-1] for point in points) for points in runs.values())
    common = math.ceil(20 * reached) / 20  # of all of them, rounded up
    print(f"{'loss':6}{'run':30}{'steps':>8}{'M tokens':>10}{'gradients of 1M':>18}{'seconds':>10}")
    for loss in (common + 0.4, common + 0.2, common):
        for name, points in runs.items():
            hits = [point for point in points if point[-1] <= loss]
            step, tokens, work, seconds, _ = [*hits, points[-1]][0]
            missed = "" if hits else ">"
            print(f"{loss:<6.2f}{name:30}{missed:>2}{step:6}{tokens:10.2f}{work:18.2f}{seconds:10.0f}")
    colours = {}
    with picture(path, 14, 4.2, panels=3, sharey=True) as panels:
        for i, label in enumerate(("outer steps", "M tokens", "work, gradients of 1M tokens")):
            lines = {name: [[(point[i], point[-1]) for point in points[1:]]] for name, points in runs.items()}
            draw(panels[i], lines, colours, xlabel=label)
        panels[0].set_ylabel(LOSS)
        panels[0].legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs; none: the study's pictures")
    parser.add_argument("--save", type=Path, default=Path("loss.svg"), help="where to, .svg or .png")
    args = parser.parse_args()
    try:
        if args.runs:
            compare(args.runs, args.save)
        else:
            study(load())
    except ImportError:
        parser.exit(2, "plot.py: error: pictures need matplotlib: pip install matplotlib\n")
    except (OSError, ValueError) as e:
        parser.error(f"cannot draw these runs: {e}")


if __name__ == "__main__":
    main()
