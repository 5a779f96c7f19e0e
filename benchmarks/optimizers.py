"""Does AdamW in 8 bits, or with its states paged, learn what AdamW in 32 bits learns?

    python benchmarks/optimizers.py                      # the main job with each optimizer and seed: minutes, on any machine
    python benchmarks/optimizers.py --seeds 0,1 --optimizers adamw,adamw8bit -- --model falcon-7b --data my.jsonl

Each run is examples/finetune_falcon.py, in a process of its own, with the arguments behind `--`. Compared are the held-out losses at every
evaluation. The seed decides adapters, order and dropout, so the spread of AdamW over seeds is the noise: `off` is the mean of an
optimizer's loss less AdamW's, over the seeds, and `noise` the standard deviation of AdamW's own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import HERE, RESULTS, about, header, results_path, write_results

SCRIPT = HERE.parent / "examples" / "finetune_falcon.py"


def run(optimizer: str, seed: int, rest: list[str]) -> dict:
    """A fine-tune: its held-out losses {set: {step: loss}}, its training losses, and its speed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, SCRIPT, "--optimizer", optimizer, "--seed", str(seed), "--questions", "0", "--output", folder, *rest]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"optimizer": optimizer, "seed": seed, "failed": (done.stderr.strip().splitlines() or ["died without a word"])[-1][:200]}
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    losses, steps = {}, [line for line in lines if "set" not in line]
    for line in lines:
        if "set" in line:
            losses.setdefault(line["set"], {})[line["step"]] = line["loss"]
    # The second half, when everything that happens once has happened.
    middle, last = steps[len(steps) // 2], steps[-1]
    return {"optimizer": optimizer, "seed": seed, "losses": losses, "training": [line["loss"] for line in steps],
            "tokens_per_second": (last["tokens"] - middle["tokens"]) / (last["seconds"] - middle["seconds"])}


def summary(rows: list[dict]) -> str:
    """A line for each optimizer, set and evaluated step."""
    found = {}                                                       # (set, step) -> optimizer -> losses over the seeds
    for row in rows:
        for name, curve in row.get("losses", {}).items():
            for step, loss in curve.items():
                found.setdefault((name, int(step)), {}).setdefault(row["optimizer"], []).append(loss)
    lines = [f"{'held out':<12}{'step':>6}  {'optimizer':<11}{'loss':>8}{'off':>9}{'noise':>8}"]
    for (name, step), by_optimizer in sorted(found.items()):
        base = by_optimizer.get("adamw")
        for optimizer, losses in by_optimizer.items():
            mean = statistics.mean(losses)
            off = f"{mean - statistics.mean(base):+9.4f}" if base and optimizer != "adamw" else " " * 9
            noise = f"{statistics.stdev(base):8.4f}" if base and len(base) > 1 else ""
            lines.append(f"{name:<12}{step:>6}  {optimizer:<11}{mean:8.4f}{off}{noise}")
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        speeds = [row["tokens_per_second"] for row in rows if row["optimizer"] == optimizer and "failed" not in row]
        if speeds:
            lines.append(f"{optimizer}: {statistics.median(speeds):,.0f} tokens a second")
    return "\n".join(lines + [f"{row['optimizer']}, seed {row['seed']}: {row['failed']}" for row in rows if "failed" in row])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", default="adamw,adamw8bit,paged")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of what is written")
    parser.add_argument("--commit", default="", help="what the header says where git is not there")
    parser.add_argument("rest", nargs="*", help="behind `--`: arguments of finetune_falcon.py")
    args = parser.parse_args()
    head = header(args.commit, arguments=" ".join(args.rest))
    path = results_path("optimizers", head, args.output)
    print(about(head), flush=True)
    rows = []
    # A seed at a time: what is compared runs next to each other.
    for seed in map(int, args.seeds.split(",")):
        for optimizer in args.optimizers.split(","):
            rows.append(run(optimizer, seed, args.rest))
            write_results(path, head, rows)
            print(f"{optimizer}, seed {seed}: " + (rows[-1].get("failed") or "done"), flush=True)
    print(summary(rows))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
