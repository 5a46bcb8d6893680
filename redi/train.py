"""THE loop, the same for both stages: packed traces in, one number out.

A step is `train_batch_size` examples in data order (a function of seed and epoch). Its traces are
packed into micro-batches; every denominator is counted over the whole step before the first
forward; so how a step is split never changes its gradient beyond rounding.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from redi import checkpoint, distributed
from redi.config import TrainConfig, load_config, make_config
from redi.data.pack import Pack, pack_traces
from redi.data.prefetch import Prefetch, pin
from redi.data.read import read_examples
from redi.data.tokenize import ChatFormat, Tokenized, Trace, tokenize_examples
from redi.errors import Interrupted, RediError
from redi.export import export, model_card, stored_dtype
from redi.faults import StopRequest, nonfinite_step
from redi.identity import TrainResult, check_same, identify, read_result, write_result
from redi.model import PackedLM, load_model, load_tokenizer
from redi.monitor import MetricsFile, Progress, TrainState, notify, read_metrics, say
from redi.objectives import StepCounts, make_objective
from redi.schedule import Schedule


def train(
    config: TrainConfig | dict[str, Any] | str | Path,
    callbacks: Sequence[Any] = (),
    *,
    name: str = "train",
) -> TrainResult:
    """Trains one stage and writes an ordinary Hugging Face folder to `config.output_dir`.

    Continues from the newest complete checkpoint there; returns at once when the folder already
    holds this run's result. `callbacks` are objects with methods of `redi.Callback`.

    Raises RediError for anything the user can put right (data, model, recipe, NaN loss, full disk)
    and Interrupted after SIGINT or SIGTERM, when a checkpoint has been saved.
    """
    config = _checked(config)
    ranks = distributed.setup()
    tokenizer = load_tokenizer(config)
    data = load_data(config, tokenizer)
    output_dir = Path(config.output_dir)
    identity = identify(config, data)
    result = read_result(output_dir, identity)
    if result is not None:
        return result

    model = load_model(config, device=ranks.device)
    distributed.shard(model, list(model.lm.model.layers), ranks, bf16=config.bf16 is not False)
    loop = Loop(config, model, data, identity, ranks)
    state = TrainState(total_steps=loop.schedule.total_steps, output_dir=output_dir, name=name)
    loop.resume(state)
    listeners: list[Any] = []
    if ranks.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        listeners = [MetricsFile(output_dir / "metrics.jsonl"), Progress(), *callbacks]
        dropped = f", {len(data.dropped)} dropped" if data.dropped else ""
        where = f" on {ranks.world_size} ranks" if ranks.world_size > 1 else ""
        continued = f", continuing after step {state.step}" if state.step else ""
        plan = f"{len(data.traces)} examples{dropped}, {state.total_steps} steps{where}{continued}"
        say(f"{name}: {plan}")
    metrics = loop.run(state, listeners)

    result = TrainResult(output_dir, state.step, metrics, len(data.traces), len(data.dropped))
    weights = _whole_weights(model, stored_dtype(model.lm, config.dtype), keep=ranks.is_main)

    def write() -> None:
        export(
            model.lm,
            weights,
            tokenizer,
            config,
            eos_token_ids=ChatFormat(tokenizer).eos_token_ids,
            card=model_card(config, state.step, metrics),
        )
        write_result(result, identity)

    try:
        ranks.together(write, main=True)
    except OSError as error:
        raise RediError(
            f"{output_dir}: the model could not be written ({error}); "
            "free space and run the same command: it continues from the last checkpoint"
        ) from None
    return result


def load_data(config: TrainConfig, tokenizer: Any) -> Tokenized:
    """The traces that the objective trains on: of each example the chosen one (SFT), or all (REDI).

    Raises RediError when nothing is left, or when REDI finds no rejected trace.
    """
    examples = read_examples(config.dataset_name)
    if config.objective == "sft":
        examples = [replace(e, rejected=None) for e in examples if e.chosen is not None]
    elif all(e.rejected is None for e in examples):
        raise RediError(
            f"{config.dataset_name}: has no rejected traces, which objective: redi needs; "
            "use objective: sft"
        )
    if not examples:
        raise RediError(f"{config.dataset_name}: has no chosen traces, which objective: sft needs")
    return tokenize_examples(
        examples,
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
    )


@dataclass(frozen=True)
class StepWork:
    """What one optimizer step computes on this rank."""

    indices: list[int]  # its examples
    num_tokens: int  # over all ranks, as `counts`
    counts: StepCounts
    packs: list[Pack]


class Loop:
    """Steps, logs and saves until the schedule ends or a signal asks to stop."""

    def __init__(
        self,
        config: TrainConfig,
        model: PackedLM,
        data: Tokenized,
        identity: dict[str, Any],
        ranks: distributed.Ranks,
    ):
        self.config, self.model, self.data = config, model, data
        self.identity, self.ranks = identity, ranks
        self.schedule = Schedule(len(data.traces), config)
        self.objective = make_objective(config.objective, config.alpha)
        self.optimizer = make_optimizer(model, config)
        self.work = Prefetch(self.prepare)

    def resume(self, state: TrainState) -> None:
        """Moves `state`, model and optimizer to the checkpoint to continue from, if there is
        one."""
        wanted = self.config.resume_from_checkpoint
        found, damaged = checkpoint.find(state.output_dir, wanted, self.ranks)
        for problem in damaged if self.ranks.is_main else []:
            say(f"WARNING: not continuing from a damaged checkpoint: {problem}")
        if found is not None:
            saved = checkpoint.read_state(found)
            check_same(found, saved["identity"], self.identity)
            checkpoint.load(found, self.model, self.optimizer)
            state.step, state.skipped = saved["step"], saved["skipped"]

    def run(self, state: TrainState, listeners: list[Any]) -> dict[str, float]:
        """Trains from `state` to the end; returns the last logged metrics."""
        notify(listeners, "on_train_begin", state)
        with StopRequest() as stop:
            try:
                while state.step < state.total_steps:
                    metrics = self.step(state)
                    last = state.step == state.total_steps
                    if last or state.step % self.config.logging_steps == 0:
                        notify(listeners, "on_log", state, metrics)
                    notify(listeners, "on_step_end", state)
                    stopping = distributed.any_rank(stop.asked, self.ranks) and not last
                    if stopping or last or state.step % self.config.save_steps == 0:
                        self.save(state, listeners)
                    if stopping:
                        raise Interrupted(
                            f"stopped after step {state.step} of {state.total_steps}, "
                            "checkpoint saved; run the same command to continue"
                        )
            finally:
                self.work.close()
                notify(listeners, "on_train_end", state)
        rows = read_metrics(state.output_dir / "metrics.jsonl")
        return rows[-1] if rows else {}

    def step(self, state: TrainState) -> dict[str, float]:
        """One optimizer step; returns its row for the log.

        A step whose loss or gradient is not finite leaves the weights alone: RediError, or a row
        that counts it as skipped, as `nonfinite` says.
        """
        started = time.monotonic()
        work = self.work.get(state.step)
        loss, chosen, rejected, grad_norm = self.accumulate(work)
        learning_rate = self.schedule.learning_rate(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
        else:
            numbers = {"loss": loss, "grad_norm": grad_norm}
            skip, is_main = self.config.nonfinite == "skip", self.ranks.is_main
            nonfinite_step(state, self.data, work.indices, numbers, skip=skip, is_main=is_main)
        state.step += 1
        state.epoch = state.step / self.schedule.steps_per_epoch
        row = {
            "step": state.step,
            "epoch": round(state.epoch, 4),
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "num_tokens": work.num_tokens,
            "tokens_per_second": work.num_tokens / (time.monotonic() - started),
            "time": time.time(),
        }
        if work.counts.num_chosen:
            row["logps/chosen"] = chosen / work.counts.num_chosen
        if work.counts.num_rejected:
            row["logps/rejected"] = rejected / work.counts.num_rejected
        if state.skipped:
            row["skipped_steps"] = len(state.skipped)
        return {key: value for key, value in row.items() if math.isfinite(value)}

    def prepare(self, step: int) -> StepWork:
        """The packs of a step; a function of the step alone, called ahead in a thread."""
        indices = self.schedule.examples(step)
        traces = [trace for i in indices for trace in self.data.traces[i]]
        packs = self._packs_of_this_rank(traces)
        if self.ranks.device.type == "cuda":
            packs = [pin(pack) for pack in packs]
        num_tokens = sum(len(trace.input_ids) for trace in traces)
        return StepWork(indices, num_tokens, StepCounts.of(traces), packs)

    def accumulate(self, work: StepWork) -> tuple[float, float, float, float]:
        """Puts one step's gradient, clipped, into the parameters, pack by pack.

        Returns, over all ranks: the loss, the sums over chosen and over rejected traces of their
        log-probs per token, and the norm of the gradient before clipping. Waits for the device
        here only, once.
        """
        device, world_size = self.ranks.device, self.ranks.world_size
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, device=device)
        for pack in work.packs:
            pack = pack.to(device)
            out = self.model(pack, partial(self.objective, work.counts))
            # FSDP averages gradients over ranks; the objective is already a mean over all of them.
            (out.loss * world_size).backward()
            mean_S = out.logps_S / out.lengths_S.clamp(min=1)
            chosen_S, zero = pack.is_chosen_S, mean_S.new_zeros(())
            chosen = torch.where(chosen_S, mean_S, zero).sum()
            rejected = torch.where(chosen_S, zero, mean_S).sum()
            sums += torch.stack([out.loss.detach(), chosen, rejected])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        numbers = torch.cat([distributed.all_sum(sums), distributed.whole(norm).reshape(1)])
        loss, chosen, rejected, grad_norm = numbers.tolist()
        return loss, chosen, rejected, grad_norm

    def save(self, state: TrainState, listeners: list[Any]) -> None:
        """A full disk is said loudly but does not end a run that may outlive it."""
        content = {"step": state.step, "skipped": state.skipped, "identity": self.identity}
        keep = self.config.save_total_limit
        try:
            checkpoint.save(
                state.output_dir, self.model, self.optimizer, content, self.ranks, keep=keep
            )
        except OSError as error:
            if self.ranks.is_main:
                say(f"WARNING: {error}")
        else:
            notify(listeners, "on_save", state)

    def _packs_of_this_rank(self, traces: list[Trace]) -> list[Pack]:
        packs = pack_traces(traces, self.config.max_tokens_per_batch)
        mine = packs[self.ranks.rank :: self.ranks.world_size]
        # Sharded ranks must run equally many forwards; a repeat with no targets adds nothing.
        short = len(mine) < math.ceil(len(packs) / self.ranks.world_size)
        return [*mine, packs[0].without_targets()] if short else mine


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


def _checked(config: TrainConfig | dict[str, Any] | str | Path) -> TrainConfig:
    if isinstance(config, TrainConfig):
        return config
    if isinstance(config, dict):
        return make_config(TrainConfig, config, "config")
    return load_config(TrainConfig, config, {})


def _whole_weights(model: PackedLM, dtype: torch.dtype, *, keep: bool) -> dict[str, torch.Tensor]:
    """Whole weights under transformers' names; tied weights appear once."""
    parameters = dict(model.named_parameters())
    named = distributed.full_tensors(parameters, dtype=dtype, keep=keep)
    return {name.removeprefix("lm."): tensor for name, tensor in named.items()}
