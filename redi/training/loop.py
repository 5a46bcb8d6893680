"""THE loop, the same for both stages: packed traces in, one number out.

A step is `train_batch_size` examples in data order (a function of seed and epoch). Its traces are
packed into micro-batches; every denominator is counted over the whole step before the first
forward; so how a step is split never changes its gradient beyond rounding.
"""

import gc
import hashlib
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from redi_kernels.anatomy import blocks_of

from redi import preflight
from redi.config import TrainConfig
from redi.data.divergence import push_from_divergence
from redi.data.pack import Pack, pack_step
from redi.data.read import SAME, read_examples
from redi.data.tokenize import ChatFormat, Dropped, Tokenized, Trace, tokenize_examples
from redi.errors import Interrupted, RediError
from redi.files import claim
from redi.recipe import load_config, make_config
from redi.training import checkpoint, distributed, selfcheck
from redi.training.dpo_reference import with_reference
from redi.training.export import export, model_card, whole_weights
from redi.training.faults import StopRequest, nonfinite_step
from redi.training.fingerprint import (
    TrainResult,
    agreed,
    check_same,
    identify,
    read_result,
    write_result,
)
from redi.training.guard import CollapseGuard
from redi.training.logging import MetricsFile, TrainState, notify, read_metrics, say
from redi.training.metrics import NUM_SUMS, PROBE_STEPS, entropy_sums, pack_sums, step_means
from redi.training.model import PackedLM, bf16_note, load_model, load_tokenizer
from redi.training.objectives import NEEDS_PAIRS, PackLoss, StepCounts, make_objective
from redi.training.prefetch import Prefetch, pin
from redi.training.schedule import Schedule
from redi.training.start import check_output_dir
from redi.training.terminal import Screen
from redi.training.throughput import Meter
from redi.training.trackers import trackers


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
    preflight.check_training(config)
    check_output_dir(config)
    ranks = distributed.setup()
    with ExitStack() as until_done:
        claimed = claim(Path(config.output_dir), "run")
        try:
            ranks.together(lambda: until_done.enter_context(claimed), main=True)
        except OSError as error:
            raise RediError(f"{config.output_dir}: cannot be written: {error}") from None
        return _train(config, ranks, callbacks, name)


def _train(
    config: TrainConfig, ranks: distributed.Ranks, callbacks: Sequence[Any], name: str
) -> TrainResult:
    tokenizer = load_tokenizer(config)
    data = load_data(config, tokenizer)
    held_out = load_held_out(config, tokenizer)
    output_dir = Path(config.output_dir)
    identity = agreed(identify(config, data), ranks)
    result = ranks.together(lambda: read_result(output_dir, identity), main=True)[0]
    if result is not None:
        return result

    gc.collect()  # an earlier stage's model, which cycles of references keep, may be gigabytes
    model = load_model(config, device=ranks.device)
    _check_fits(config, model, [*data.traces, held_out])
    distributed.shard(model, list(blocks_of(model.lm)), ranks, bf16=config.bf16 is not False)
    apart = selfcheck.keep_apart(model, config.max_tokens_per_batch, check=config.model_check)
    for line in filter(None, (bf16_note(model), selfcheck.router_note(model.lm), apart)):
        if ranks.is_main:
            say(line)
    if config.objective == "dpo":
        data = replace(data, traces=with_reference(data.traces, model, config, ranks))
        held_out = with_reference([held_out], model, config, ranks)[0] if held_out else []
    loop = Loop(config, model, data, identity, ranks, held_out)
    state = TrainState(
        total_steps=loop.schedule.total_steps, output_dir=output_dir, name=name, model=model.lm
    )
    loop.resume(state)
    listeners: list[Any] = []
    if ranks.is_main:
        listeners = [MetricsFile(output_dir / "metrics.jsonl"), Screen()]
        listeners += [*trackers(config, name), *callbacks]
        say(_announcement(state, data, ranks))
    metrics = loop.run(state, listeners)

    result = TrainResult(output_dir, state.step, metrics, len(data.traces), len(data.dropped))
    weights = whole_weights(model.lm, config, keep=ranks.is_main)

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
            f"free space and run the same command: it {_continues(output_dir)}"
        ) from None
    return result


def load_data(config: TrainConfig, tokenizer: Any) -> Tokenized:
    """The traces that the objective trains on: of each example the chosen one (SFT), all (REDI), or
    both (DPO, SimPO; an example that lacks one is dropped and counted).

    Raises RediError when nothing is left, or when there is no rejected trace to train on.
    """
    name, objective = config.dataset_name, config.objective
    examples = read_examples(name)
    dropped: list[Dropped] = []
    if objective == "sft":
        dropped = [Dropped(e.id, "no chosen trace") for e in examples if e.chosen is None]
        examples = [replace(e, rejected=None) for e in examples if e.chosen is not None]
    elif all(e.rejected is None for e in examples):
        raise RediError(
            f"{name}: has no rejected traces, which objective: {objective} needs; "
            "use objective: sft"
        )
    elif objective in NEEDS_PAIRS:
        dropped = [Dropped(e.id, "not a pair") for e in examples if len(e.sides) < 2]
        examples = [e for e in examples if len(e.sides) == 2]
    elif config.rejected_tokens == "diverging":
        why = "no chosen trace to diverge from"
        dropped = [Dropped(e.id, why) for e in examples if e.chosen is None]
        examples = [e for e in examples if e.chosen is not None]
    dropped += [Dropped(e.id, SAME) for e in examples if e.chosen == e.rejected]
    examples = [e for e in examples if e.chosen != e.rejected]
    if not examples or (objective != "sft" and all(e.rejected is None for e in examples)):
        what = "chosen traces" if objective == "sft" else "pairs"
        raise RediError(f"{name}: has no {what}, which objective: {objective} needs")
    data = tokenize_examples(
        examples,
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
    )
    traces = data.traces
    if config.rejected_tokens == "diverging":
        traces = [push_from_divergence(pair, config.rejected_window) for pair in traces]
    return replace(data, traces=traces, dropped=dropped + data.dropped)


def _check_fits(config: TrainConfig, model: PackedLM, examples: Sequence[Any]) -> None:
    """No trace may have more tokens than the model knows positions: it would train, and then be
    refused by whoever serves it. None may have a token that the model lacks."""
    longest = max(len(trace.input_ids) for traces in examples for trace in traces)
    text_config = model.lm.config.get_text_config(decoder=True)
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise RediError(
            f"{config.dataset_name}: {longest} tokens in a trace, {positions} positions in the "
            "model; lower max_length, or set max_position_embeddings (and rope_theta)"
        )
    highest = max(int(trace.input_ids.max()) for traces in examples for trace in traces)
    size = model.lm.get_input_embeddings().weight.shape[0]
    if highest >= size:
        raise RediError(
            f"{config.tokenizer_name_or_path or config.model_name_or_path}: its tokenizer gives "
            f"token {highest}, and the model has embeddings for {size}; set "
            "tokenizer_name_or_path to the one that belongs to the model, or give the model more "
            "embeddings first (transformers' resize_token_embeddings)"
        )


def load_held_out(config: TrainConfig, tokenizer: Any) -> list[Trace]:
    """The traces of `eval_dataset_name`, if it is set."""
    if config.eval_dataset_name is None:
        return []
    held_out = config.model_copy(update={"dataset_name": config.eval_dataset_name})
    return [trace for example in load_data(held_out, tokenizer).traces for trace in example]


@dataclass(frozen=True)
class StepWork:
    """What one optimizer step computes on this rank."""

    indices: list[int]  # its examples
    traces: list[Trace]  # over all ranks, as `counts`
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
        held_out: Sequence[Trace] = (),
    ):
        self.config, self.model, self.data, self.held_out = config, model, data, held_out
        self.identity, self.ranks = identity, ranks
        self.schedule = Schedule(len(data.traces), config)
        self.objective = make_objective(config)
        self.pairs = config.objective in NEEDS_PAIRS
        self.optimizer = make_optimizer(model, config)
        self.guard = CollapseGuard()
        self.meter = Meter(ranks.device, ranks.world_size)
        self.squares = model.cost_of_squares()
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
            named = wanted not in ("auto", True)  # by the recipe: then it may be a shorter run's
            check_same(found, saved["identity"], self.identity, any_length=named)
            if saved["step"] > state.total_steps:
                raise RediError(
                    f"{found}: {saved['step']} steps are done there, and this run has "
                    f"{state.total_steps}; raise max_steps or num_train_epochs"
                )
            checkpoint.load(found, self.model, self.optimizer)
            state.step, state.skipped = saved["step"], saved["skipped"]
            self.guard.history = saved.get("guard", {})  # none in a checkpoint of an older redi

    def run(self, state: TrainState, listeners: list[Any]) -> dict[str, float]:
        """Trains from `state` to the end; returns the last logged metrics."""
        self.stop_if_collapsed(state)
        with StopRequest() as stop:
            try:
                notify(listeners, "on_train_begin", state)
                while state.step < state.total_steps:
                    metrics = self.step(state)
                    last = state.step == state.total_steps
                    alarm = self.watch(state, metrics)
                    evaluating = bool(self.held_out) and self._due(state, self.config.eval_steps)
                    if evaluating:
                        metrics |= self.evaluate()
                        notify(listeners, "on_evaluate", state, metrics)
                    if alarm or evaluating or self._due(state, self.config.logging_steps):
                        notify(listeners, "on_log", state, metrics | self.meter.row())
                    notify(listeners, "on_step_end", state)
                    stopping = distributed.any_rank(stop.asked, self.ranks) and not last
                    if stopping or alarm or self._due(state, self.config.save_steps):
                        self.save(state, listeners)
                    if stopping:
                        raise Interrupted(
                            f"{_stopped(state)}; {self._how_to_continue()}", stop.exit_code
                        )
                    self.stop_if_collapsed(state)
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
        self.meter.start()
        work = self.work.get(state.step)
        with self.seeded(state.step):
            means = self.learn(work)
        loss, grad_norm = means["loss"], means["grad_norm"]
        learning_rate = self.schedule.learning_rate(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        is_skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        if not is_skipped:
            self.optimizer.step()
        else:
            numbers = {"loss": loss, "grad_norm": grad_norm}
            skip, is_main = self.config.nonfinite == "skip", self.ranks.is_main
            nonfinite_step(state, self.data, work.indices, numbers, skip=skip, is_main=is_main)
        state.step += 1
        state.epoch = state.step / self.schedule.steps_per_epoch
        self.meter.mark("optimizer")
        row = {
            "step": state.step,
            "epoch": round(state.epoch, 4),
            **means,
            "learning_rate": learning_rate,
            **self.meter.speed(self.model.lm, [len(trace.input_ids) for trace in work.traces]),
            "time": time.time(),
        }
        if (state.step - 1) % PROBE_STEPS == 0:
            row |= self.entropy(work.traces)
        if self.model.why_alone is not None:  # else as many as fit
            row["packs"] = len(work.packs)
        if state.skipped:
            row["skipped_steps"] = len(state.skipped)
        if is_skipped:
            row["skipped"] = True
        return {key: value for key, value in row.items() if math.isfinite(value)}

    @contextmanager
    def seeded(self, step: int) -> Iterator[None]:
        """Some routers draw noise: the same in a step whatever ran before it, as exact resuming
        needs, and another on each rank, which has other tokens."""
        key = f"{self.config.seed} {step} {self.ranks.rank}".encode()
        device = self.ranks.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
            yield

    def prepare(self, step: int) -> StepWork:
        """The packs of a step; a function of the step alone, called ahead in a thread."""
        indices = self.schedule.examples(step)
        traces = [trace for i in indices for trace in self.data.traces[i]]
        packs = self._packs_of_this_rank(traces)
        if self.ranks.device.type == "cuda":
            packs = [pin(pack) for pack in packs]
        return StepWork(indices, traces, StepCounts.of(traces), packs)

    def learn(self, work: StepWork) -> dict[str, float]:
        """Puts one step's gradient, clipped, into the parameters; returns the loss, the traces'
        log-probs and the gradient's norm, over all ranks. Waits for the device here only, once."""
        # Kept, not freed: made anew amid the first pack's tensors, gradients would leave holes
        # behind that fit no other pack's (a quarter of the peak on a CPU, bench/trainer_table.py).
        self.optimizer.zero_grad(set_to_none=False)
        sums = distributed.all_sum(self.accumulate(work.packs, work.counts))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        *numbers, grad_norm = torch.cat([sums, distributed.whole(norm).reshape(1)]).tolist()
        kinds = {"rewards": self.pairs, "fast": self.config.loss_tolerance > 0}
        return step_means(numbers, work.counts, **kinds) | {"grad_norm": grad_norm}

    def accumulate(self, packs: list[Pack], counts: StepCounts) -> torch.Tensor:
        """Adds this rank's packs' gradient to the parameters (where gradients are on); returns the
        sums that `step_means` reads, still on the device."""
        device, world_size = self.ranks.device, self.ranks.world_size
        sums = torch.zeros(NUM_SUMS, device=device)

        def head(*inputs: Any) -> PackLoss:  # runs inside the model's forward
            self.meter.mark("forward")
            out = self.objective(counts, *inputs)
            self.meter.mark("loss")
            return out

        for pack in packs:
            pack = pack.to(device)
            self.meter.mark("data")
            out = self.model(pack, head)
            if torch.is_grad_enabled():
                # FSDP averages gradients over ranks; the objective is a mean over all of them.
                (out.loss * world_size).backward()
            sums += pack_sums(pack, out)
            self.meter.mark("backward")
        return sums

    def entropy(self, traces: list[Trace]) -> dict[str, float]:
        with self.meter.only("eval"):
            sums = entropy_sums(self.model, traces, self.ranks.rank, self.ranks.world_size)
            distributed.reshard(self.model)
        total, num_tokens = distributed.all_sum(sums).tolist()
        return {"entropy": total / num_tokens} if num_tokens else {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and log-probs of the held-out traces, as one step's would be counted."""
        with self.meter.only("eval"):
            counts = StepCounts.of(self.held_out)
            sums = self.accumulate(self._packs_of_this_rank(self.held_out), counts)
            distributed.reshard(self.model)
            means = step_means(distributed.all_sum(sums).tolist(), counts, rewards=self.pairs)
        return {f"eval_{name}": value for name, value in means.items()}

    def watch(self, state: TrainState, metrics: dict[str, float]) -> bool:
        """Shows the step to the collapse guard; whether it has just raised an alarm."""
        if self.config.collapse_guard == "off" or not self.guard.watch(metrics):
            return False
        metrics["alarms"] = len(self.guard.alarms())
        if self.ranks.is_main:
            say(f"WARNING: step {state.step}: {self.guard.verdict()}")
        return True

    def stop_if_collapsed(self, state: TrainState) -> None:
        if self.config.collapse_guard == "stop" and self.guard.alarms():
            raise RediError(
                f"{_stopped(state)}: {self.guard.verdict()} "
                "Set collapse_guard: warn to train on from there"
            )

    def save(self, state: TrainState, listeners: list[Any]) -> None:
        """A full disk is said loudly but does not end a run that may outlive it."""
        content = {"step": state.step, "skipped": state.skipped, "identity": self.identity}
        content["guard"] = self.guard.history
        keep = self.config.save_total_limit
        try:
            with self.meter.only("save"):
                checkpoint.save(
                    state.output_dir, self.model, self.optimizer, content, self.ranks, keep=keep
                )
        except OSError as error:
            if self.ranks.is_main:
                say(f"WARNING: {error}; the last save: {_last_save(state.output_dir)}")
        else:
            notify(listeners, "on_save", state)

    def _how_to_continue(self) -> str:
        if _last_save(Path(self.config.output_dir)) == "none":
            return "nothing is saved: free space, and run the same command to start anew"
        if self.config.resume_from_checkpoint in ("auto", True):
            return "run the same command to continue"
        return "to continue run it with resume_from_checkpoint: auto"  # else it starts over

    def _due(self, state: TrainState, every: int) -> bool:
        return state.step % every == 0 or state.step == state.total_steps

    def _packs_of_this_rank(self, traces: Sequence[Trace]) -> list[Pack]:
        return pack_step(
            traces,
            self.model.pack_size(self.config.max_tokens_per_batch),
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            pairs=self.pairs,
            squares=self.squares,
        )


def make_optimizer(model: PackedLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only, and not on norms and biases, of which some are matrices
    (Cohere's norms, one vector a head; biases of experts): as transformers does."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = lambda name, p: p.ndim >= 2 and not re.search(r"bias|norm(\.|$)", name.lower())
    groups = [
        {
            "params": [p for name, p in trained if decays(name, p)],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in trained if not decays(name, p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def _announcement(state: TrainState, data: Tokenized, ranks: distributed.Ranks) -> str:
    reasons = Counter(dropped.reason for dropped in data.dropped)
    why = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
    dropped = f", {len(data.dropped)} dropped ({why})" if data.dropped else ""
    where = f" on {ranks.world_size} ranks" if ranks.world_size > 1 else ""
    continued = f", continuing after step {state.step}" if state.step else ""
    steps = f"{state.total_steps} steps{where}{continued}"
    return f"{state.name}: {len(data.traces)} examples{dropped}, {steps}"


def _stopped(state: TrainState) -> str:
    last = _last_save(state.output_dir)
    saved = "checkpoint saved" if last == str(state.step) else f"NOT saved (the last save: {last})"
    return f"stopped after step {state.step} of {state.total_steps}, {saved}"


def _last_save(output_dir: Path) -> str:
    return str(max(checkpoint.checkpoints(output_dir), default="none"))


def _continues(output_dir: Path) -> str:
    last = _last_save(output_dir)
    if last == "none":
        return "starts anew, since no checkpoint could be saved either: what was trained is lost"
    return f"continues from the last checkpoint, of step {last}"


def _checked(config: TrainConfig | dict[str, Any] | str | Path) -> TrainConfig:
    if isinstance(config, TrainConfig):
        return config
    if isinstance(config, dict):
        return make_config(TrainConfig, config, "config")
    return load_config(TrainConfig, config, {})
