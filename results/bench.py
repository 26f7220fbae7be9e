"""What a product and the rest of a step cost, in gradients of the same model and batch.

    python results/bench.py                             # one thread, fp32, here: some minutes
    python results/bench.py --device cuda --dtype bf16
    python results/bench.py --rounds 2 --small          # a look

A gradient is forward, loss and backward, with fused attention. All ways are timed in each round, so that a
slow moment of the machine meets all of them. Printed are median and quartiles of the ratio to a gradient, and
the error against float64. What a whole step takes is in the log of any run (step_seconds).
"""

import argparse
import copy
import platform
import sys

import torch
from torch.utils.benchmark import timer

sys.path.append(sys.path[0] + "/..")
from baselines import KFAC, flatten, trainable, unflatten
from gauss_newton import GGN, GaussNewton, batch_grad, batch_loss, cg, local_model_once, select, working_eps
from model import GPT, GPTConfig

SMALL = GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=512)
LARGER = GPTConfig(n_layer=6, n_head=8, n_embd=256, block_size=256, vocab_size=2048)
TOKENS = 2048  # of a batch


def ours(model, x, y, v):
    """{what: function}; a name up to its comma says which exact result it must have."""
    params = trainable(model)
    layers = GaussNewton(model, parts=model.layers()).parts
    ggn = GGN(model, x, y)
    kfac = KFAC(model)
    quarter = x[::4], y[::4]
    kfac.update(*quarter)
    kfac.decompose()
    local = model, [range(len(params))], False, working_eps(model, x, y)
    batch = params, x, y, unflatten(v, params), y.numel()
    return {
        "gradient": lambda: batch_grad(model, x, y)[1],
        "product": lambda: ggn.matvec(v),
        "gradient, with all that products need": lambda: GGN(model, x, y).grad,
        "local gradient, on a batch used once": lambda: flatten(local_model_once(*local, *batch)[3:]),
        "layerwise products": lambda: [ggn.matvec(select(v, params, part), part) for part in layers],
        "line-search candidate": lambda: batch_loss(model, x, y),
        "K-FAC factors, a quarter of the sequences": lambda: kfac.update(*quarter),
        "K-FAC application": lambda: kfac.apply(v, lambda s: 1 / (s + 1e-3)),
        "vectors of a CG iteration": lambda: cg(lambda p: p, v, max_iter=1),
    }


def seconds(function):
    start = timer()  # when the device has done what it was given
    function()
    return timer() - start


def report(ways, rounds, exact):
    """Time the ways, after one round to warm up; print each one's ratio to a gradient."""
    errors = {}
    for what, function in ways.items():
        result = function()
        want = exact.get(what.split(",")[0])
        if want is not None:
            errors[what] = f"  error {(result.double() - want).norm() / want.norm():.0e}"
    times = torch.tensor([[seconds(function) for function in ways.values()] for _ in range(rounds)])
    quartiles = (times / times[:, :1]).quantile(torch.tensor([0.25, 0.5, 0.75]), 0)
    for what, (low, middle, high) in zip(ways, quartiles.T):
        print(f"  {what:45}{middle:7.3f}  ({low:.3f} - {high:.3f}){errors.get(what, '')}", flush=True)
    print(f"  (one gradient: {1000 * times[:, 0].min():.1f} ms at best)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=9, help="of all ways")
    parser.add_argument("--small", action="store_true", help="the smaller model alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(platform.machine(), args.device, args.dtype, "torch", torch.__version__)
    for config in [SMALL] if args.small else [SMALL, LARGER]:
        print(f"\n{config}, {TOKENS:,} tokens")
        model = GPT(config).to(args.device)
        shape = 2, TOKENS // config.block_size, config.block_size
        x, y = torch.randint(config.vocab_size, shape, device=args.device)
        reference = GGN(copy.deepcopy(model).double(), x, y)
        v = torch.randn(len(reference.grad), device=args.device)
        product = reference.matvec(v.double())
        exact = {"gradient": reference.grad, "product": product, "local gradient": reference.grad + product}
        model.bf16 = args.dtype == "bf16"
        report(ours(model, x, y, v), args.rounds, exact)


if __name__ == "__main__":
    main()
