"""Kills training runs, hundreds of times, and checks each time that nothing is lost or broken.

    python bench/chaos.py            (make chaos) 160 kills on one rank, 40 on two

A tiny model trains for 12 steps, saving every 1 to 3. A kill is SIGKILL to one rank: at a random
moment, or at a fault point, which is one of the file operations of a save (each open, mkdir,
rename and removal, and the middle of writing a file of tensors). The same command then goes on.
Checked:

- after each kill: every checkpoint-N is intact, sha256 and all; `latest` names one of them; every
  line of metrics.jsonl is whole but for the last; the other rank, told to stop by SIGTERM as
  launchers do, has ended within a minute
- after each start: it goes on from the last save that was completed, not from an earlier one
- at the end of each run: weights, AdamW moments and metrics.jsonl (but for its timing fields) are
  bit for bit those of a run that nobody disturbed

Prints a table; exits with 1 if anything failed.
"""

import argparse
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from warm import Ranks, warm_up

from redi.data.arithmetic import write_tokenizer
from redi.training import checkpoint, distributed
from redi.training.logging import timeless

STEPS, LIMIT = 12, 60.0  # steps of a run; seconds until a run counts as hung
KILLS_A_RUN = 10
STARTING, RESUMING, STEPPING, SAVING, EXPORTING, ENDED = range(6)
PHASES = ("starting", "resuming", "between saves", "in a save", "exporting", "ended")
ALONE = distributed.Ranks(0, 1, torch.device("cpu"))


class Shared(ctypes.Structure):
    """What a killed rank leaves for its parent to read."""

    _fields_ = [(name, ctypes.c_int) for name in ("phase", "resumed", "done", "saved", "points")]


@dataclass
class Tally:
    kills: Counter = field(default_factory=Counter)  # by phase
    resumes: int = 0
    runs: int = 0
    lost: list[int] = field(default_factory=list)  # steps done again, by kill
    problems: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=int, default=160, help="kills of runs on one rank")
    parser.add_argument("--two", type=int, default=40, help="kills of runs on two ranks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        settings = write_recipe(Path(folder))
        warm_up(settings)
        tallies = {}
        for world_size, kills in ((1, options.one), (2, options.two)):
            rng = random.Random(f"{options.seed} {world_size}")
            campaign = Campaign(Path(folder) / f"on-{world_size}", settings, world_size, rng)
            tallies[world_size] = campaign.run(kills)
    print(table(tallies), f"\n{time.monotonic() - started:.0f} s, seed {options.seed}")
    problems = [problem for tally in tallies.values() for problem in tally.problems]
    if sum(tally.kills[SAVING] for tally in tallies.values()) < (options.one + options.two) // 4:
        problems.append("fewer than a quarter of the kills were in a save")
    print("\n".join(problems) or "nothing corrupted, no completed save lost, every end bit for bit")
    sys.exit(bool(problems))


def write_recipe(folder: Path) -> dict[str, Any]:
    """A model of 6k parameters on 16 sums, told right and wrong."""
    write_tokenizer(folder / "tokenizer")
    rows = [
        {"id": f"sum-{i}", "prompt": f"{i}+{i % 7}=", "chosen": f"{i + i % 7}", "rejected": f"{i}"}
        for i in range(16)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "architecture": {
            "model_type": "qwen2", "hidden_size": 16, "intermediate_size": 24, "vocab_size": 65,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "max_position_embeddings": 64, "tie_word_embeddings": True,
        },
        "tokenizer_name_or_path": str(folder / "tokenizer"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "train_batch_size": 4, "max_tokens_per_batch": 48, "max_steps": STEPS,
        "learning_rate": 1e-3, "output_dir": str(folder),
    }  # fmt: skip


class Campaign:
    """Kills on `world_size` ranks, run after run."""

    def __init__(self, folder: Path, settings: dict, world_size: int, rng: random.Random):
        self.folder, self.settings, self.world_size, self.rng = folder, settings, world_size, rng
        self.tally = Tally()
        folder.mkdir()

    def run(self, kills: int) -> Tally:
        """Every other kill is at a fault point."""
        self.start("straight", save_steps=3)
        began = time.monotonic()
        assert self.ranks.wait(LIMIT) and set(self.ranks.codes.values()) == {0}, self.log()
        self.seconds = time.monotonic() - began
        self.expected, points = self.outcome(), [s.points for s in self.shared]
        left = kills
        while left and not self.tally.problems:
            name = f"run-{self.tally.runs}"
            self.tally.runs += 1
            options = {"save_steps": self.rng.randint(1, 3)}
            options["save_total_limit"] = self.rng.randint(1, 2)
            saved = done = 0
            for _ in range(min(KILLS_A_RUN, left)):
                victim = self.rng.randrange(self.world_size)
                point = self.rng.randint(1, points[victim]) if left % 2 else 0
                self.start(name, victim, point, **options)
                killed = self.kill(victim, at_point=bool(point))
                self.check(name, saved, done)
                if not killed:  # it ended first
                    break
                left -= 1
                saved, done = max(s.saved for s in self.shared), self.shared[0].done
                if not left % 20:
                    print(f"{self.world_size} ranks: {left} kills left", file=sys.stderr)
            self.start(name, **options)
            ended = self.ranks.wait(LIMIT)
            self.check(name, saved, done)
            self.fail_unless(ended and set(self.ranks.codes.values()) == {0}, name, self.log())
            self.fail_unless(self.outcome() == self.expected, name, "ends in other bits")
            if not self.tally.problems:
                shutil.rmtree(self.output)
        return self.tally

    def start(self, name: str, victim: int = 0, point: int = 0, **options: int) -> None:
        """Forks the ranks of a run; `victim` kills itself at its `point`-th file operation in
        saves."""
        self.output = self.folder / name
        recipe = self.folder / f"{name}.yaml"
        settings = self.settings | options | {"output_dir": str(self.output)}
        recipe.write_text(yaml.safe_dump(settings))
        (self.folder / "log").unlink(missing_ok=True)
        self.shared = [RawValue(Shared) for _ in range(self.world_size)]
        self.ranks = Ranks(
            recipe,
            self.world_size,
            self.folder / "log",
            lambda rank: watch(self.shared[rank], point if rank == victim else 0),
        )

    def kill(self, victim: int, *, at_point: bool) -> bool:
        """Kills the victim, or waits until it has; whether it had not ended before."""
        if not at_point:
            deadline = time.monotonic() + self.rng.uniform(0, self.seconds)
            while time.monotonic() < deadline and not self.ranks.poll():
                time.sleep(0.001)
            self.ranks.kill(victim)
        while not self.ranks.codes:  # a rank
            self.ranks.poll()
            time.sleep(0.001)
        for rank in range(self.world_size):  # a launcher tells the others
            self.ranks.kill(rank, signal.SIGTERM)
        ended = self.ranks.wait(LIMIT)
        phases = ", ".join(PHASES[shared.phase] for shared in self.shared)
        self.fail_unless(ended, self.output.name, f"a rank outlived another's death ({phases})")
        killed = self.ranks.codes[victim] == -signal.SIGKILL
        if killed:
            self.tally.kills[self.shared[victim].phase] += 1
        return killed

    def check(self, name: str, saved: int, done: int) -> None:
        """The promises, after a start that was to continue from step `saved` or later."""
        first = self.shared[0]
        if first.phase > RESUMING:
            self.tally.resumes += saved > 0
            self.tally.lost.append(max(done - first.resumed, 0))
            self.fail_unless(
                first.resumed >= saved, name, f"went on at {first.resumed}; {saved} was saved"
            )
        found = checkpoint.checkpoints(self.output)
        for folder in found.values():
            problem = checkpoint.damage(folder, ALONE)
            self.fail_unless(problem is None, name, f"{folder.name}: {problem}")
        latest = self.output / "latest"
        if latest.exists():
            self.fail_unless((self.output / latest.read_text().strip()).is_dir(), name, "latest")
        log = self.output / "metrics.jsonl"
        if log.exists():
            for line in log.read_text().split("\n")[:-1]:
                json.loads(line)

    def outcome(self) -> tuple[Any, ...]:
        """What must come out equal: metrics, exported weights, the last checkpoint's tensors."""
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        rows = [timeless(json.loads(x)) for x in lines]
        tensors = sorted(self.output.glob(f"checkpoint-{STEPS}/*.safetensors"))
        bits = hashlib.sha256()
        for file in [self.output / "model.safetensors", *tensors]:
            for name, tensor in sorted(load_file(file).items()):
                bits.update(name.encode() + tensor.numpy().tobytes())
        return rows, bits.hexdigest()

    def fail_unless(self, good: bool, name: str, what: str) -> None:
        if not good:
            self.tally.problems.append(f"{self.world_size} ranks, {name}: {what}")

    def log(self) -> str:
        return (self.folder / "log").read_text()[-9000:]


def watch(shared: Any, point: int) -> None:
    """In a child: notes the phase for the parent, and dies at the `point`-th operation in saves."""
    from redi.training import loop

    def during(phase: int, owner: Any, name: str, after: Any = None) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            before, shared.phase = shared.phase, phase
            result = inner(*args, **kwargs)
            shared.phase = before
            if after is not None:
                after(*args)
            return result

        setattr(owner, name, outer)

    during(RESUMING, loop.Loop, "resume", lambda _, state: setattr(shared, "resumed", state.step))
    during(STEPPING, loop.Loop, "run")
    during(STEPPING, loop.Loop, "step", lambda _, state: setattr(shared, "done", state.step))
    saved = lambda output_dir, model, optimizer, state, ranks: setattr(
        shared, "saved", state["step"]
    )
    during(SAVING, checkpoint, "save", saved)
    during(EXPORTING, loop, "export")

    def count(at_point: Any = lambda: None) -> None:
        if shared.phase == SAVING:
            shared.points += 1
            if shared.points == point:
                at_point()
                os.kill(os.getpid(), signal.SIGKILL)

    operations = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
    sys.addaudithook(lambda event, args: count() if event in operations else None)
    save_file = checkpoint.save_file

    def save_file_in_halves(tensors: Any, file: Path, metadata: Any) -> None:
        save_file(tensors, file, metadata)
        count(lambda: os.truncate(file, os.path.getsize(file) // 2))

    checkpoint.save_file = save_file_in_halves


def table(tallies: dict[int, Tally]) -> str:
    lines = ["| | " + " | ".join(f"{n} rank{'s' * (n > 1)}" for n in tallies) + " |"]
    lines.append("| :-- |" + " --: |" * len(tallies))
    for phase, title in enumerate(PHASES[:ENDED]):
        lines.append(f"| killed {title} | {_row(t.kills[phase] for t in tallies.values())} |")
    lines.append(f"| kills | {_row(t.kills.total() for t in tallies.values())} |")
    lines.append(f"| runs | {_row(t.runs for t in tallies.values())} |")
    lines.append(f"| resumed from a checkpoint | {_row(t.resumes for t in tallies.values())} |")
    most = (max(t.lost, default=0) for t in tallies.values())
    lines.append(f"| steps done twice, at most | {_row(most)} |")
    lines.append(f"| problems | {_row(len(t.problems) for t in tallies.values())} |")
    return "\n".join(lines)


def _row(values: Any) -> str:
    return " | ".join(str(value) for value in values)


if __name__ == "__main__":
    main()
