"""The study: a list of command lines, and a loop that makes those of them that are not recorded yet.

    python results/study.py                          # what is missing, as many runs at once as cores
    python results/study.py --only quick             # one seed, no tuning, to 1.75: 11 minutes on two cores
    python results/study.py --only 'batch | K-FAC'   # the lines that contain this
    python results/study.py --records again.jsonl --out out/again       # everything anew, recorded there

study.txt is the list, `stage | method | which | flags of train.py`; runs.jsonl has a line for each run that
is complete. Runs lie under --out; one that was cut off goes on from its checkpoint. English text has to be
there already, in out/study/english: protocol.md says where it comes from.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
EVERY_RUN = "--threads 1 --sample 0 --eval_interval 1 --overwrite"


class Line(NamedTuple):
    stage: str
    method: str
    which: str
    flags: str

    @property
    def name(self):
        return " | ".join(self[:3])

    @property
    def key(self):
        return self.flags.removeprefix("was ")

    @property
    def folder(self):  # a warmup's has the name that others start from
        return self.which if self.stage == "warmup" else re.sub(r"[^\w.]+", "-", self.flags).strip("-")

    @property
    def gone(self):  # flags of an earlier program: a record, and no way to make it again
        return self.key != self.flags


def read_list(path=HERE / "study.txt"):
    lines = path.read_text().splitlines()
    return [Line(*line.split(" | ")) for line in lines if line and line[0] != "#"]


def read_rows(path):
    """What a file of JSON has, line by line; nothing where there is no file."""
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


def read_records(path=HERE / "runs.jsonl"):
    """{flags: record}; of two records with the same flags the later one."""
    return {record["flags"]: record for record in read_rows(path)}


def read_log(folder):
    """(first line, the lines of steps, those of them that were evaluated) of a run's log. A last line that
    was cut off by a kill is left out."""
    *lines, _ = (Path(folder) / "log.jsonl").read_text().split("\n")
    head, *rows = map(json.loads, lines)
    return head, rows, [row for row in rows if row["val_loss"] is not None]


def summary(folder):
    """The record of a complete run: what it took to its target, or its end. None of one that was cut off."""
    head, rows, evaluated = read_log(folder)
    config = head["config"]
    last = evaluated[-1]  # a run ends where it reaches its target
    hit = last["val_loss"] <= config["target_loss"]
    given_up = not any(row.get("accepted", True) for row in rows[-8:])
    if not hit and not given_up and rows[-1]["step"] < config["steps"]:
        return None
    work = last["grad_equivalents"] * config["batch_tokens"] / 1e6  # in gradients of a million tokens
    return {
        **{key: head[key] for key in ("device", "torch", "commit", "command")},
        "target": config["target_loss"],
        "steps": last["step"] if hit else None,
        "ran": last["step"],
        "loss": last["val_loss"],
        "tokens": last["tokens"],
        "gradients": round(work, 3),
        "seconds": round(last["seconds"], 1),
        "batch_tokens": config["batch_tokens"],
        "curve": [[row["step"], round(row["val_loss"], 6)] for row in evaluated],
    }


def make(line, out, records):
    """Make a run, or finish it, record it, and say in a line what came of it; whether it is complete."""
    folder = out / line.folder
    flags = "--resume" if (folder / "checkpoint.pt").exists() else f"{line.flags} {EVERY_RUN}"
    command = [sys.executable, HERE.parent / "train.py", *flags.split(), "--out_dir", folder.name]
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, cwd=out, text=True, capture_output=True)
    run = None
    with suppress(OSError, ValueError, IndexError):  # there is no log, or nothing in it
        run = summary(folder)
    if not run:
        told = f"nothing\n{done.stdout}{done.stderr}".strip().splitlines()[-1]
        print(f"{line.name}: failed: train.py ended with {done.returncode}, saying {told}")
        return False
    with open(records, "a") as f:
        f.write(json.dumps({"flags": line.flags, **run}) + "\n")
    print(f"{line.name}: {run['ran']} steps, val {run['loss']:.4f}, {run['seconds']} s")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="the lines that contain this")
    parser.add_argument("--list", type=Path, default=HERE / "study.txt")
    parser.add_argument("--records", type=Path, default=HERE / "runs.jsonl")
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="the runs' folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    every = [line for line in read_list(args.list) if not line.gone]
    lines = [line for line in every if args.only in line.name and line.stage != "warmup"]
    recorded = read_records(args.records)
    missing = {line.flags: line for line in lines if line.flags not in recorded}
    warmups = [
        line
        for line in every
        if line.stage == "warmup" and any(f"--init_from {line.which} " in flags + " " for flags in missing)
    ]
    print(f"{len(lines)} lines, {len(missing)} runs to make, {args.jobs} at a time in {args.out}")

    def made(line):  # a warmup's weights are needed where it is recorded, too
        return make(line, args.out, os.devnull if line.flags in recorded else args.records)

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for runs in (warmups, missing.values()):  # these start from the weights of those
                if not all(list(pool.map(made, runs))):
                    return 1
        except KeyboardInterrupt:  # no more runs; those at work have it too: they save and end
            return 130


if __name__ == "__main__":
    sys.exit(main())
