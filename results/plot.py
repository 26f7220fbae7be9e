"""Pictures, by matplotlib.

    python results/plot.py                 # frontier.svg, loss.svg, exactness.svg
    python results/plot.py out/a out/b     # any runs: what each took to each loss, and a picture, loss.svg
"""
import argparse
import math
import sys
from pathlib import Path

from study import HERE, read_log, read_records
from tables import exactness, frontier, grouped

LOSS = "validation loss, nats per token"


def coloured(names):
    return {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(names))}


def subplots(*shape, **options):
    """matplotlib's, or a line and status 2 where it is missing."""
    try:
        import matplotlib
    except ImportError:
        print("plot.py: error: pictures need matplotlib: pip install matplotlib", file=sys.stderr)
        sys.exit(2)
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams["axes.grid"] = True
    pyplot.rcParams["grid.alpha"] = 0.3
    pyplot.rcParams["svg.hashsalt"] = "the same file each time"
    pyplot.rcParams["svg.fonttype"] = "none"
    return pyplot.subplots(*shape, layout="constrained", **options)


def draw(axis, lines, colours, label, **style):
    """Lines {name: [[(x, y), ...], ...]} into a panel, the first name on top; a colour a name."""
    for depth, (name, curves) in enumerate(lines.items()):
        for i, curve in enumerate(curves):
            axis.plot(*zip(*curve), color=colours[name], label="_" * i + name, zorder=9 - depth, **style)
    axis.set(xscale="log", xlabel=label)
    plain_numbers(axis.xaxis)


def plain_numbers(axis):
    """1, 2, 5, 10, ... on a logarithmic axis."""
    axis.get_major_locator().set_params(subs=(1, 2, 5))
    axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_formatter("")


def save(figure, path):
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"drawn: {path}")


def against_steps(stage, records):
    """{method: curves of its runs}, without step 0, which a logarithmic axis does not have."""
    return {method: [run["curve"][1:] for _, run in runs] for method, runs in grouped(stage, records).items()}


def study(records, folder):
    methods = frontier(records)
    steep = against_steps("same batch", records)
    slow = against_steps("slow", records)
    colours = coloured([*methods, *steep, *slow])
    figure, axis = subplots(figsize=(8, 5))
    draw(axis, {name: [list(found.values())] for name, found in methods.items()}, colours,
         "work to 1.60, gradients of a million tokens", marker="o")
    for name, found in methods.items():
        for size, point in found.items():
            axis.annotate(f"{size // 1024}k", point, xytext=(4, 3), textcoords="offset points", fontsize=7,
                          color=colours[name])
    axis.set(yscale="log", ylabel="steps to 1.60")
    plain_numbers(axis.yaxis)
    axis.legend()
    save(figure, folder / "frontier.svg")

    figure, (left, right) = subplots(1, 2, figsize=(11, 5))
    draw(left, steep, colours, "outer steps of 262,144 tokens, to 1.60")
    left.set(ylim=(1.55, 2.5), ylabel=LOSS)
    draw(right, slow, colours, "outer steps, to 1.33, with a rate that falls")
    right.set_ylim(1.3, 2.5)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(figure, folder / "loss.svg")

    figure, axis = subplots(figsize=(6.5, 4))
    curves = {share: [list(found.values())] for share, found in exactness(records).items()}
    for name in ("full GN, inner SOAP", "full GN, inner Muon"):
        curves[name] = [[(run["gradients"] / run["ran"], run["curve"][0][1] - run["curve"][1][1])
                         for _, run in grouped("large batch", records).get(name, [])]]
    draw(axis, curves, coloured(curves), "work of one step, gradients of a million tokens", marker="o")
    axis.set(ylabel="fall of the validation loss")
    axis.legend()
    save(figure, folder / "exactness.svg")


def compare(folders, path):
    """Print what each run took to each loss, and draw its loss against steps, tokens and work."""
    runs = {}
    for folder in folders:
        head, rows = read_log(folder)
        scale = head["config"]["batch_tokens"] / 1e6     # work is logged in gradients of the batch
        runs[Path(folder).name] = [
            (r["step"], r["tokens"] / 1e6, scale * r["grad_equivalents"], r["seconds"], r["val_loss"])
            for r in rows if r["val_loss"] is not None]
    reached = max(min(point[-1] for point in points) for points in runs.values())
    common = math.ceil(20 * reached) / 20                # of all of them, rounded up
    print(f"{'loss':6}{'run':30}{'steps':>8}{'M tokens':>10}{'gradients of 1M':>18}{'seconds':>10}")
    for loss in (common + 0.4, common + 0.2, common):
        for name, points in runs.items():
            hit = next((point for point in points if point[-1] <= loss), None)
            step, tokens, work, seconds, _ = hit or points[-1]
            missed = "" if hit else ">"
            print(f"{loss:<6.2f}{name:30}{missed:>2}{step:6}{tokens:10.2f}{work:18.2f}{seconds:10.0f}")
    figure, panels = subplots(1, 3, figsize=(14, 4.2), sharey=True)
    labels = ("outer steps", "M tokens", "work, gradients of 1M tokens")
    for i, (axis, label) in enumerate(zip(panels, labels)):
        lines = {name: [[(point[i], point[-1]) for point in points[1:]]] for name, points in runs.items()}
        draw(axis, lines, coloured(lines), label)
    panels[0].set_ylabel(LOSS)
    panels[0].legend()
    save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs; none: the study's pictures")
    parser.add_argument("--save", type=Path, default=Path("loss.svg"), help="where to, .svg or .png")
    args = parser.parse_args()
    if args.runs:
        try:
            compare(args.runs, args.save)
        except (OSError, ValueError) as e:
            parser.error(f"no log of a run: {e}")
    else:
        study(read_records(), HERE)


if __name__ == "__main__":
    main()
