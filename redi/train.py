"""THE loop, the same for both stages: packed traces in, one number out.

A step is `train_batch_size` examples in data order (a function of seed and epoch). Its traces are packed into
micro-batches; every denominator is counted over the whole step before the first forward; so how a
step is split never changes its gradient beyond rounding.
"""

import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from redi import checkpoint, distributed
from redi.config import TrainConfig, load_config, make_config
from redi.data.pack import Pack, pack_traces
from redi.data.read import read_examples
from redi.data.tokenize import ChatFormat, Tokenized, Trace, tokenize_examples
from redi.errors import Interrupted, RediError
from redi.model import PackedLM, export, load_model, load_tokenizer
from redi.monitor import MetricsFile, Progress, TrainState, notify
from redi.objectives import Objective, StepCounts, make_objective

RESULT = "train_result.json"
# Settings that do not change what is learned (beyond rounding): free to change between interruptions.
FREE = {
    "output_dir", "logging_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "max_tokens_per_batch", "gradient_checkpointing", "expected_examples", "num_epochs",
}  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    output_dir: Path
    steps: int
    metrics: dict[str, float]  # the last logged step's
    num_examples: int
    num_dropped: int


def train(
    config: TrainConfig | dict[str, Any] | str | Path,
    callbacks: Sequence[Any] = (),
    *,
    name: str = "train",
) -> TrainResult:
    """Trains one stage and writes an ordinary Hugging Face folder to `config.output_dir`.

    Continues from the newest complete checkpoint there; returns at once when the folder already holds
    this run's result. `callbacks` are objects with methods of `redi.monitor.Callback`.

    Raises RediError for anything the user can put right (data, model, recipe, NaN loss, full disk) and
    Interrupted after SIGINT or SIGTERM, when a checkpoint has been saved.
    """
    if isinstance(config, (str, Path)):
        config = load_config(TrainConfig, config, {})
    elif isinstance(config, dict):
        config = make_config(TrainConfig, config, "config")
    ranks = distributed.setup()
    output_dir = Path(config.output_dir)
    tokenizer = load_tokenizer(config)
    data = load_data(config, tokenizer)
    identity = fingerprint(config, data)
    done = finished(output_dir, identity)
    if done is not None:
        return done
    output_dir.mkdir(parents=True, exist_ok=True)

    model = load_model(config, device=ranks.device)
    distributed.shard(model, list(model.lm.model.layers), ranks, bf16=config.bf16 is not False)
    optimizer = make_optimizer(model, config)
    plan = Schedule(len(data.traces), config)
    state = TrainState(total_steps=plan.total_steps, output_dir=output_dir, name=name)
    found = checkpoint.find(output_dir, config.resume_from_checkpoint)
    if found is not None:
        saved = checkpoint.read_state(found)
        _check_same_run(found, saved["identity"], identity)
        checkpoint.load(found, model, optimizer)
        state.step = saved["step"]

    listeners: list[Any] = []
    if ranks.is_main:
        listeners = [MetricsFile(output_dir / "metrics.jsonl"), Progress(), *callbacks]
        _say(
            f"{name}: {len(data.traces)} examples, {len(data.dropped)} dropped, {plan.total_steps} steps"
            + (f", continuing after step {state.step}" if state.step else "")
        )
    loop = Loop(config, model, optimizer, plan, data, ranks)
    logs = loop.run(state, listeners, identity)

    weights = _export_state(model)
    if ranks.is_main:
        try:
            export(
                model.lm, weights, tokenizer, output_dir, dtype=config.dtype,
                eos_token_ids=ChatFormat(tokenizer).eos_token_ids, card=_model_card(config, state, logs),
            )  # fmt: skip
            result = {
                "identity": identity,
                "steps": state.step,
                "metrics": logs,
                "num_examples": len(data.traces),
                "num_dropped": len(data.dropped),
            }
            (output_dir / f"{RESULT}.tmp").write_text(json.dumps(result, indent=2) + "\n")
            (output_dir / f"{RESULT}.tmp").replace(output_dir / RESULT)
        except OSError as error:
            raise RediError(
                f"{output_dir}: the model could not be written ({error}); "
                "free space and run the same command: it continues from the last checkpoint"
            ) from None
    ranks.barrier()
    done = finished(output_dir, identity)
    assert done is not None
    return done


class Schedule:
    """Which examples each step trains on, and its learning rate: functions of the step alone."""

    def __init__(self, num_examples: int, config: TrainConfig):
        self.config, self.num_examples = config, num_examples
        self.steps_per_epoch = math.ceil(num_examples / config.train_batch_size)
        wanted = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.total_steps = config.max_steps if config.max_steps > 0 else wanted
        self.warmup_steps = math.ceil(config.warmup_ratio * self.total_steps)

    def examples(self, step: int) -> list[int]:
        """The examples of 0-based `step`; an epoch's last step holds what is left over."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(self.num_examples)
        size = self.config.train_batch_size
        return order[position * size : (position + 1) * size].tolist()

    def learning_rate(self, step: int) -> float:
        """Warm-up to the peak, then decay towards 0. As transformers' schedules of the same names, except
        that no step is spent at a rate of 0."""
        peak, kind = self.config.learning_rate, self.config.lr_scheduler_type
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if kind == "constant":
            return peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return peak * (
            1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        )


class Loop:
    """Steps, logs and saves until the schedule ends or a signal asks to stop."""

    def __init__(
        self,
        config: TrainConfig,
        model: PackedLM,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        data: Tokenized,
        ranks: distributed.Ranks,
    ):
        self.config, self.model, self.optimizer = config, model, optimizer
        self.schedule, self.data, self.ranks = schedule, data, ranks
        self.objective: Objective = make_objective(config.objective, config.alpha)

    def run(self, state: TrainState, listeners: list[Any], identity: dict) -> dict[str, float]:
        logs: dict[str, float] = {}
        notify(listeners, "on_train_begin", state)
        with _StopRequest() as stop:
            try:
                while state.step < state.total_steps:
                    row = self.step(state)
                    if (
                        state.step % self.config.logging_steps == 0
                        or state.step == state.total_steps
                    ):
                        logs = row
                        notify(listeners, "on_log", state, logs)
                    notify(listeners, "on_step_end", state)
                    stopping = distributed.any_rank(stop.asked, self.ranks)
                    if stopping or state.step % self.config.save_steps == 0:
                        self.save(state, listeners, identity)
                    if stopping and state.step < state.total_steps:
                        raise Interrupted(
                            f"stopped after step {state.step} of {state.total_steps}; checkpoint saved. "
                            "Run the same command to continue."
                        )
            finally:
                notify(listeners, "on_train_end", state)
        return logs or self._last_logs(state)

    def step(self, state: TrainState) -> dict[str, float]:
        """One optimizer step. Raises RediError, before the weights change, when the loss is not finite."""
        started = time.monotonic()
        chosen = self.schedule.examples(state.step)
        traces = [trace for i in chosen for trace in self.data.traces[i]]
        counts = StepCounts.of(traces)
        learning_rate = self.schedule.learning_rate(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        # loss, and for chosen and rejected traces the sum of their per-token mean log-probs
        sums = torch.zeros(3, device=self.ranks.device)
        for pack in self._packs_of_this_rank(traces):
            out = self.model(pack.to(self.ranks.device), self._head(counts))
            # FSDP averages gradients over ranks; the objective is already a mean over all of them.
            (out.loss * self.ranks.world_size).backward()
            mean_S = out.logps_S / out.lengths_S.clamp(min=1)
            is_chosen_S = pack.is_chosen_S.to(mean_S)
            sums += torch.stack(
                [
                    out.loss.detach(),
                    (mean_S * is_chosen_S).sum(),
                    (mean_S * (1 - is_chosen_S)).sum(),
                ]
            )
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.max_grad_norm
        )
        if isinstance(grad_norm, distributed.DTensor):
            grad_norm = grad_norm.full_tensor()
        loss, chosen_sum, rejected_sum = distributed.all_sum(sums).tolist()  # the step's one sync
        norm = float(grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RediError(
                f"step {state.step + 1}: loss {loss}, gradient norm {norm}; training stopped before the "
                f"weights changed, checkpoints in {state.output_dir} are good. Lower learning_rate or "
                f"look at this step's examples: {', '.join(self.data.example_ids[i] for i in chosen[:8])}"
                + (f" and {len(chosen) - 8} more" if len(chosen) > 8 else "")
            )
        self.optimizer.step()
        state.step += 1
        state.epoch = state.step / self.schedule.steps_per_epoch
        elapsed = time.monotonic() - started
        num_tokens = sum(len(t.input_ids) for t in traces)
        row = {
            "step": state.step,
            "epoch": round(state.epoch, 4),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "logps/chosen": chosen_sum / counts.num_chosen if counts.num_chosen else None,
            "logps/rejected": rejected_sum / counts.num_rejected if counts.num_rejected else None,
            "num_tokens": num_tokens,
            "tokens_per_second": num_tokens / elapsed,
            "time": time.time(),
        }
        return {key: value for key, value in row.items() if value is not None}

    def save(self, state: TrainState, listeners: list[Any], identity: dict) -> None:
        try:
            checkpoint.save(
                state.output_dir,
                self.model,
                self.optimizer,
                {"step": state.step, "identity": identity},
                self.ranks,
                keep=self.config.save_total_limit,
            )
        except OSError as error:  # a full disk must not end a run that may outlive it
            _say(f"WARNING: checkpoint of step {state.step} NOT saved: {error}")
        else:
            notify(listeners, "on_save", state)

    def _head(self, counts: StepCounts):
        return lambda x_TH, w_VH, pack, options: self.objective(x_TH, w_VH, pack, options, counts)

    def _packs_of_this_rank(self, traces: list[Trace]) -> list[Pack]:
        packs = pack_traces(traces, self.config.max_tokens_per_batch)
        mine = packs[self.ranks.rank :: self.ranks.world_size]
        # Sharded ranks must run equally many forwards; a repeat with no targets adds nothing.
        short = len(mine) < math.ceil(len(packs) / self.ranks.world_size)
        return mine + [packs[0].without_targets()] if short else mine

    def _last_logs(self, state: TrainState) -> dict[str, float]:
        from redi.monitor import read_metrics

        rows = read_metrics(state.output_dir / "metrics.jsonl")
        return rows[-1] if rows else {}


def make_optimizer(model: PackedLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, as transformers does."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def load_data(config: TrainConfig, tokenizer: Any) -> Tokenized:
    """The traces that the objective trains on: of each example the chosen one (SFT), or all (REDI).

    Raises RediError when nothing is left, or when REDI finds no rejected trace.
    """
    examples = read_examples(config.dataset_name)
    if config.objective == "sft":
        examples = [replace(e, rejected=None) for e in examples if e.chosen is not None]
        missing = "chosen"
    else:
        missing = "" if any(e.rejected is not None for e in examples) else "rejected"
    if not examples or missing == "rejected":
        raise RediError(
            f"{config.dataset_name}: has no {missing} traces, which objective: {config.objective} needs"
        )
    return tokenize_examples(
        examples,
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
    )


def fingerprint(config: TrainConfig, data: Tokenized) -> dict[str, Any]:
    """What decides a run's result: its settings, the tokens it trains on, the model it starts from."""
    digest = hashlib.sha256()
    for example in data.traces:
        for trace in example:
            digest.update(trace.input_ids.tobytes())
            digest.update(b"%d,%d;" % (trace.num_prompt_tokens, trace.is_chosen))
    settings = {k: v for k, v in config.model_dump().items() if k not in FREE}
    return {**settings, "tokens": digest.hexdigest(), "start": _model_fingerprint(config)}


def finished(output_dir: Path, identity: dict) -> TrainResult | None:
    """The result `output_dir` already holds, if it is this run's. Raises RediError if it is another's."""
    file = output_dir / RESULT
    if not file.exists():
        return None
    result = json.loads(file.read_text())
    _check_same_run(file, result["identity"], identity)
    return TrainResult(
        output_dir,
        result["steps"],
        result["metrics"],
        result["num_examples"],
        result["num_dropped"],
    )


def _check_same_run(where: Path, saved: dict, wanted: dict) -> None:
    # A field that a newer version added had its default's effect when `saved` was written.
    saved = {k: f.default for k, f in TrainConfig.model_fields.items() if k in wanted} | saved
    differ = [k for k in {**saved, **wanted} if saved.get(k) != wanted.get(k)]
    if differ:
        key = differ[0]
        what = {"tokens": "the data or its tokenization", "start": "the starting model"}.get(
            key, f"{key} ({saved.get(key)} there, {wanted.get(key)} now)"
        )
        raise RediError(
            f"{where}: belongs to a run that differs in {what}; "
            "choose another output_dir, or remove that folder to start anew"
        )


def _model_fingerprint(config: TrainConfig) -> str:
    """Of a local model folder: its training result if redi made it, else its files' names and sizes."""
    folder = Path(config.model_name_or_path or "")
    if config.model_name_or_path is None or not folder.is_dir():
        return str(config.model_name_or_path)
    result = folder / RESULT
    if result.exists():
        identity = json.loads(result.read_text())["identity"]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    files = sorted((f.name, f.stat().st_size) for f in folder.iterdir() if f.is_file())
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _export_state(model: PackedLM) -> dict[str, torch.Tensor]:
    """Whole float32 weights under transformers' names; tied weights appear once."""
    named = distributed.full_tensors(dict(model.named_parameters()))
    return {name.removeprefix("lm."): tensor for name, tensor in named.items()}


class _StopRequest:
    """Notes SIGINT and SIGTERM so that the loop can end between two steps; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "_StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the caller handles signals
                pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        _say("stopping after this step (again to stop at once, without saving)")


def _model_card(config: TrainConfig, state: TrainState, logs: dict[str, float]) -> str:
    import yaml

    recipe = yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False)
    stage = "SFT on right traces" if config.objective == "sft" else f"REDI, alpha = {config.alpha}"
    final = ", ".join(f"{k} {v:.4g}" for k, v in logs.items() if k in ("loss", "grad_norm"))
    return (
        f"---\nlibrary_name: transformers\ntags: [redi, {config.objective}]\n---\n\n"
        f"# {Path(config.output_dir).name}\n\n"
        f"Trained with Reinforcement Distillation (arXiv 2505.24850), stage: {stage}; "
        f"{state.step} steps ({final}).\n\n```yaml\n{recipe}```\n"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
