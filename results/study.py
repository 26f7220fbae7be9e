"""The study: a list of command lines, and a loop that makes those of them that are not recorded yet.

    python results/study.py                          # what is missing, as many runs at once as cores
    python results/study.py --quick                  # one seed, no tuning, to 1.75: 15 minutes on two cores
    python results/study.py --only 'batch | K-FAC'   # the lines that contain this
    python results/study.py --records again.jsonl --out out/again       # everything anew, recorded there

study.txt is the list, `stage | method | which | flags of train.py`; runs.jsonl has a line for each run that
is complete. Runs lie under --out; one that was cut off goes on from its checkpoint. English text has to be
there already: python results/english.py out/study/english
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
    def gone(self):              # flags of an earlier program: a record, and no way to make it again
        return self.key != self.flags


def read_list(path=HERE / "study.txt"):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return [Line(*(cell.strip() for cell in line.split("|"))) for line in lines]


def read_records(path=HERE / "runs.jsonl"):
    """{flags: record}; of two records with the same flags the later one."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["flags"]: record for record in map(json.loads, lines)}


def read_log(folder):
    """(first line, the other lines) of a run's log. A last line that was cut off by a kill is left out."""
    lines = (Path(folder) / "log.jsonl").read_text().splitlines(keepends=True)
    head, *rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return head, rows


def summary(folder):
    """The record of a complete run: what it took to its target, or its end. None of one that was cut off."""
    head, rows = read_log(folder)
    config = head["config"]
    target = config["target_loss"]
    evaluated = [row for row in rows if row["val_loss"] is not None]
    curve = [[row["step"], round(row["val_loss"], 6)] for row in evaluated]
    hits = [row for row in evaluated if target is not None and row["val_loss"] <= target]
    given_up = len(rows) > 8 and not any(row["accepted"] for row in rows[-8:])
    if not evaluated or not (hits or given_up or rows[-1]["step"] >= config["steps"]):
        return None
    last = [*hits, evaluated[-1]][0]
    work = last["grad_equivalents"] * config["batch_tokens"] / 1e6       # in gradients of a million tokens
    return {
        **{key: head.get(key) for key in ("device", "torch", "commit", "command")},
        "target": target,
        "steps": last["step"] if hits else None,
        "ran": last["step"],
        "loss": last["val_loss"],
        "tokens": last["tokens"],
        "gradients": round(work, 3),
        "seconds": round(last["seconds"], 1),
        "batch_tokens": config["batch_tokens"],
        "curve": [point for point in curve if point[0] <= last["step"]]}


def make(flags, folder):
    """Make one run, or finish it; returns its record. RuntimeError where train.py failed or was stopped."""
    resume = (folder / "checkpoint.pt").exists()
    words = ["--resume"] if resume else [*flags.split(), *EVERY_RUN.split()]
    command = [sys.executable, str(HERE.parent / "train.py"), *words, "--out_dir", folder.name]
    done = subprocess.run(command, cwd=folder.parent, text=True, capture_output=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    record = None
    with suppress(OSError, ValueError):          # there is no log, or nothing in it
        record = summary(folder)
    if done.returncode > 1 or not record:
        told = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"train.py ended with {done.returncode}, saying {told}")
    return {"flags": flags, **record}


def make_and_record(line, folder, path):
    """Make a run, append it to the records, and say in a line what came of it; whether it is complete."""
    try:
        run = make(line.flags, folder)
    except RuntimeError as e:
        print(f"{line.name}: failed: {e}", flush=True)
        return False
    with open(path, "a") as f:
        f.write(json.dumps(run) + "\n")
    missed = " (above the target)" if run["target"] and not run["steps"] else ""
    print(f"{line.name}: {run['ran']} steps, val {run['loss']:.4f}{missed}, {run['seconds']} s", flush=True)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the stages of the quick study alone")
    parser.add_argument("--only", default="", help="of these, the lines that contain this")
    parser.add_argument("--list", type=Path, default=HERE / "study.txt")
    parser.add_argument("--records", type=Path, default=HERE / "runs.jsonl")
    parser.add_argument("--out", type=Path, default=Path("out/study"), help="the runs' folders")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    args = parser.parse_args()
    every = read_list(args.list)
    lines = [line for line in every if not line.gone and args.only in line.name
             and line.stage != "warmup" and line.stage.startswith("quick") == args.quick]
    recorded = read_records(args.records)
    missing = {line.flags: line for line in lines if line.flags not in recorded}
    print(f"{len(lines)} lines, {len(missing)} runs to make, {args.jobs} at a time in {args.out}", flush=True)
    if not missing:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    for line in every:                     # the runs whose weights others start from, in folders of that name
        if line.stage == "warmup" and any(f"--init_from {line.which} " in flags + " " for flags in missing):
            path = os.devnull if line.flags in recorded else args.records
            if not make_and_record(line, args.out / line.which, path):       # at once where it is complete
                return 1
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = [args.out / re.sub(r"[^\w.]+", "-", flags).strip("-") for flags in missing]
        futures = [pool.submit(make_and_record, line, folder, args.records)
                   for line, folder in zip(missing.values(), folders)]
        try:
            return 0 if all([future.result() for future in futures]) else 1
        except KeyboardInterrupt:          # the runs have it too: they finish their step, save and end
            pool.shutdown(cancel_futures=True)
            return 130


if __name__ == "__main__":
    sys.exit(main())
