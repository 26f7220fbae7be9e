"""AdamW and Muon once more, by torch.optim alone: python results/check_baselines.py

Of this repository it has the model and the texts; batches, rates, clipping and evaluation are written here.
Each starts from a warmup of 60 AdamW steps, and has 262,144 tokens a step and the settings that the study
found best for it, but that norms decay too. Printed are steps and validation loss, until that is 1.60.
"""

import sys
from copy import deepcopy
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

sys.path.append(sys.path[0] + "/..")
from data import prepare, val_batch  # noqa: E402
from model import GPT, PRESETS, GPTConfig  # noqa: E402

AdamW = partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.1)


def mean_loss(model, x, y):
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(name, model, optimizers, steps, warmup, tail, rows):
    """The rate rises over `warmup` steps and falls to 0 over the last `tail`."""

    def rate(step):
        return min((step + 1) / warmup, 1.0, (steps - step) / tail)

    print(name)
    schedules = [LambdaLR(optimizer, rate) for optimizer in optimizers]
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - 64, (rows, 1))
        pieces = tokens[starts + torch.arange(65)].split(256)
        for piece in pieces:
            x = piece[:, :-1]
            y = piece[:, 1:]
            loss = mean_loss(model, x, y) / len(pieces)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        model.zero_grad()
        with torch.no_grad():
            loss = mean_loss(model, *validation)
        print(f"step {step} | val {loss:.4f}", flush=True)
        if loss <= 1.6:
            break


torch.manual_seed(0)
data = prepare("stdlib")
tokens = torch.tensor(data.train).long()
validation = val_batch(data.val, 64, 65536)
start = GPT(GPTConfig(vocab_size=data.vocab_size, **PRESETS["tiny"]))
optimizers = [AdamW(start.parameters(), lr=0.003)]
train("warmup", start, optimizers, 60, 1, 1, 256)
model = deepcopy(start)
optimizers = [AdamW(model.parameters(), lr=0.01)]
train("AdamW", model, optimizers, 82, 10, 16.4, 4096)
model = deepcopy(start)
hidden = [p for p in model.blocks.parameters() if p.ndim == 2]
rest = list(set(model.parameters()) - set(hidden))
optimizers = [
    torch.optim.Muon(hidden, lr=0.04, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    AdamW(rest, lr=0.04),
]
train("Muon", model, optimizers, 48, 5, 9.6, 4096)
