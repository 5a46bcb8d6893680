"""What every way of splitting a step must reproduce: tests/redi/training/trajectories.json.

    python tests/tools/trajectories.py            how far each split is from the stored numbers
    python tests/tools/trajectories.py --write    makes the numbers anew first

The stored loss and gradient norm of each step come from one process that runs a step as one pack.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import tiny

from redi.data import pack
from redi.training import distributed
from redi.training.logging import read_metrics
from redi.training.schedule import Schedule

FILE = Path(__file__).parents[1] / "redi" / "training" / "trajectories.json"
OBJECTIVES = ("sft", "redi", "dpo", "simpo")
WHOLE = {"max_tokens_per_batch": 100_000}
# Name: (recipe changes, is the step's order reversed?). Budgets make packs of 1 and 3 pairs and the
# like; a budget of 1 is one trace, or pair, at a time.
SPLITS = {
    "one pack": (WHOLE, False),
    "uneven packs": ({"max_tokens_per_batch": 96}, False),
    "one at a time": ({"max_tokens_per_batch": 1}, False),
    "reversed, uneven packs": ({"max_tokens_per_batch": 96}, True),
    "selective": ({"max_tokens_per_batch": 96, "gradient_checkpointing": "selective"}, False),
    "checkpointed": ({"max_tokens_per_batch": 96, "gradient_checkpointing": "full"}, False),
    "offloaded": ({"max_tokens_per_batch": 96, "gradient_checkpointing": "offload"}, False),
}


def settings(folder: Path, objective: str, **changes) -> dict:
    """5 pairs, 5 pairs and 2 pairs in a step, twice; rates at which every step changes the loss."""
    fixed = {"objective": objective, "num_train_epochs": 2, "save_steps": 100}
    return tiny.train_settings(folder, **fixed | changes)


def trajectory(folder: Path) -> list[list[float]]:
    rows = read_metrics(folder / "out" / "metrics.jsonl")
    return [[row["loss"], row["grad_norm"]] for row in rows]


def run(folder: Path, objective: str, split: str) -> list[tuple[int, ...]]:
    """Trains in `folder`; returns, of each step, the traces in each pack of rank 0."""
    from redi.training.loop import train

    changes, is_reversed = SPLITS[split]
    examples, arrange, sizes = Schedule.examples, pack.arrange, []

    def noted(*args, **kwargs):
        ranks = arrange(*args, **kwargs)
        sizes.append(tuple(len(members) for members in ranks[0]))
        return ranks

    def ordered(self, step):
        return examples(self, step)[:: -1 if is_reversed else 1]

    with (
        mock.patch.object(pack, "arrange", noted),
        mock.patch.object(Schedule, "examples", ordered),
    ):
        train(settings(folder, objective, **changes))
    first = objective == "dpo"  # the reference's packs come before; a step made ahead, after
    return sizes[first:][:6]


def launch(num_ranks: int, *program: str) -> None:
    """`torchrun PROGRAM` on so many CPU processes of one thread; fails with what they said."""
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
    command = [*start, str(num_ranks), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def distance(got: list[list[float]], want: list[list[float]]) -> float:
    """Largest difference, relative to the number or, where a loss is near 0, to 1."""
    assert len(got) == len(want)
    pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    return max(abs(a - b) / max(abs(b), 1.0) for a, b in pairs)


def stored() -> dict[str, list[list[float]]]:
    return json.loads(FILE.read_text())


def table() -> None:
    print(f"{'split':24}" + "".join(f"{objective:>9}" for objective in OBJECTIVES) + "  packs")
    for split in SPLITS:
        far = []
        for objective in OBJECTIVES:
            with tempfile.TemporaryDirectory() as folder:
                sizes = run(Path(folder), objective, split)
                far.append(distance(trajectory(Path(folder)), stored()[objective]))
        print(f"{split:24}" + "".join(f"{x:9.1e}" for x in far) + f"  {sizes[0]}", flush=True)
    for num_ranks in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            launch(num_ranks, __file__, "--into", folder)
            far = [distance(trajectory(Path(folder) / o), stored()[o]) for o in OBJECTIVES]
        print(f"{num_ranks} ranks, uneven packs".ljust(24) + "".join(f"{x:9.1e}" for x in far))


def prepare(folder: Path) -> None:
    """The data and tokenizer of every objective, before ranks read them."""
    for objective in OBJECTIVES:
        settings(folder / objective, objective)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="store one pack's numbers first")
    parser.add_argument("--into", type=Path, help="train OBJECTIVES there (what ranks do)")
    parser.add_argument("objectives", nargs="*", default=OBJECTIVES)
    args = parser.parse_args()
    if args.into:
        for objective in args.objectives:
            run(args.into / objective, objective, "uneven packs")
        distributed.teardown()
        sys.exit()
    if args.write:
        made = {}
        for objective in OBJECTIVES:
            with tempfile.TemporaryDirectory() as folder:
                run(Path(folder), objective, "one pack")
                made[objective] = trajectory(Path(folder))
        FILE.write_text(json.dumps(made, indent=1) + "\n")
    table()
