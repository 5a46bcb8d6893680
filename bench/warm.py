"""`redi train` in processes forked from a parent that has imported everything already.

A start takes milliseconds instead of seconds, so that hundreds of killed runs fit into minutes. The
parent never runs autograd and has one thread; torch allows both only to the children.

    python bench/warm.py    reads one JSON job a line, prints what became of its ranks (for tests)
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml


def warm_up(settings: dict[str, Any]) -> None:
    """Imports what a run imports; `settings` is any recipe for `redi train`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no threads before a fork
    torch.set_num_threads(1)
    from redi.config import TrainConfig
    from redi.recipe import make_config
    from redi.training.loop import load_data, make_optimizer
    from redi.training.model import load_model, load_tokenizer

    config = make_config(TrainConfig, settings, "warm_up")
    load_data(config, load_tokenizer(config))
    model = load_model(config)
    make_optimizer(model, config)
    with tempfile.TemporaryDirectory() as folder:
        model.lm.save_pretrained(folder)


class Ranks:
    """One run of `redi train` on `world_size` processes, its stderr appended to `log`."""

    def __init__(
        self,
        recipe: Path,
        world_size: int,
        log: Path,
        prepare: Callable[[int], None] = lambda rank: None,
    ):
        """`prepare(rank)` runs in each child before the command does."""
        # As torchrun does: where ranks meet is its own, so no port is taken from under them.
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        self.pids = []
        self.codes: dict[int, int] = {}  # by rank; negative: the signal that ended it
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _child(recipe, environment | {"RANK": str(rank)}, log, partial(prepare, rank))
            self.pids.append(pid)

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float) -> bool:
        """Waits for all to end; after `seconds` kills those that have not. Whether none had to."""
        deadline = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > deadline:
                for rank in set(range(len(self.pids))) - set(self.codes):
                    self.kill(rank)
                while not self.poll():
                    time.sleep(0.001)
                return False
            time.sleep(0.001)
        return True

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        if rank not in self.codes:
            os.kill(self.pids[rank], number)


def _child(recipe: Path, environment: dict[str, str], log: Path, prepare: Callable) -> None:
    """Becomes `redi train`; never returns."""
    code: Any = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        sys.argv = ["redi", "train", "--config", str(recipe)]
        prepare()
        from redi.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def serve() -> None:
    """Jobs: {settings, processes, folder, prepare}; `prepare` is Python that sees `rank`."""
    warm = False
    for line in sys.stdin:
        job = json.loads(line)
        if not warm:
            warm_up(job["settings"])
            warm = True
        recipe, log = Path(job["folder"], "recipe.yaml"), Path(job["folder"], "log")
        recipe.write_text(yaml.safe_dump(job["settings"]))
        log.unlink(missing_ok=True)
        started = time.monotonic()
        prepare = partial(_execute, job.get("prepare", ""))
        ranks = Ranks(recipe, job["processes"], log, prepare)
        ended = ranks.wait(job.get("seconds", 60))
        codes = [ranks.codes[r] for r in range(job["processes"])]
        took = time.monotonic() - started
        print(json.dumps({"codes": codes, "hung": not ended, "seconds": took}), flush=True)


def _execute(source: str, rank: int) -> None:
    exec(source, {"rank": rank})


if __name__ == "__main__":
    serve()
