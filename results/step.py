"""What a step sees: the loss along its d, and what the local models say of it, in step.jsonl for plot.py.

python train.py --opt adamw --lr 0.003 --steps 60 --out_dir warmup
python train.py --opt soap --lr 0.02 --betas 0.9 0.99 --warmup_steps 10 --schedule wsd \\
    --batch_tokens 32768 --steps 110 --init_from warmup --out_dir late
python results/step.py warmup late         # a step of CG from the weights of each of these runs
"""

import json
import sys

import torch
from study import HERE

sys.path.append(f"{HERE}/..")
import train  # noqa: E402
from baselines import assign, batch_loss, flatten, pieces, trainable, unflatten  # noqa: E402
from gauss_newton import SEARCH_FRAC, Piece, local_change, swapped_parameters  # noqa: E402

FLAGS = "--opt full_gn --batch_tokens 262144"
ALPHAS = [i / 20 for i in range(33)]


def begin(weights, flags):
    """A run of train.py from the weights in a run's folder, before its first step. It has a model, a stepper,
    batch(stream, rows), and val: validation tokens, which no step sees."""
    size = train.load_checkpoint(weights)["model_config"]
    flags += "".join(f" --{key} {size[key]}" for key in train.PRESETS["tiny"])
    flags += f" --init_from {weights} --out_dir out/begun --overwrite"
    args, _ = train.resolve(flags.split())
    return train.Run(args, None)


def probe(run, stream, rows):
    """A step of the run, taken back: how it moved the weights, and its record."""
    params = trainable(run.model)
    theta = flatten(params).detach()
    record = run.stepper.step(*run.batch(stream, rows))
    d = flatten(params).detach() - theta
    assign(params, unflatten(theta, params))
    return d, record


def loss_at(run, d, x, y):
    """The loss on x, y where d is added to the weights."""
    params = trainable(run.model)
    moved = flatten(params).detach() + d
    with swapped_parameters(run.model, unflatten(moved, params)):
        return batch_loss(run.model, x, y, run.args.micro_batch)


def along(run, d, x, y):
    """Losses on x, y for each of ALPHAS: the network's at θ + αd, the linearised network's, GN's."""
    network = [loss_at(run, alpha * d, x, y) for alpha in ALPHAS]
    params = trainable(run.model)
    changes = torch.zeros(2, len(ALPHAS))
    for inputs, targets in pieces(x, y, run.args.micro_batch):
        piece = Piece(run.model, params, inputs, targets, y.numel())
        z = piece.z0
        Jd = piece.jvp(d, range(len(params)))
        for i, alpha in enumerate(ALPHAS):
            for row, prox_linear in zip(changes, (True, False)):
                row[i] += local_change(z, alpha * Jd, targets, y.numel(), prox_linear, False)[0]
    return network, *(changes + network[0]).tolist()


def main():
    lines = []
    for weights in sys.argv[1:]:
        run = begin(weights, FLAGS)
        d, record = probe(run, 0, run.rows)
        d /= record["alpha"]
        search = [t[-int(SEARCH_FRAC * run.rows) :] for t in run.batch(0, run.rows)]
        row = {
            "from": weights,
            "flags": FLAGS,
            "alphas": ALPHAS,
            **record,
            "unseen": along(run, d, *run.val),
            "search": along(run, d, *search),
        }
        lines.append(json.dumps(row) + "\n")
    (HERE / "step.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
