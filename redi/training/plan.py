"""What a recipe will need and take, before it does: `redi plan`, `redi train --dry-run`.

Memory is counted on shapes (rehearsal.py) and added to what FSDP2 and AdamW hold; time is
modelled. So a recipe for eight GPUs can be checked on a laptop, offline if it embeds `architecture`
and `expected_examples`. docs/scaling.md has the formulas and how far they were checked.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi_kernels.anatomy import blocks_of

from redi import preflight
from redi.config import TrainConfig
from redi.errors import RediError
from redi.training.model import PackedLM, load_model, load_model_config
from redi.training.objectives import NEEDS_PAIRS
from redi.training.rehearsal import Bytes, rehearse
from redi.training.schedule import Schedule
from redi.training.throughput import PEAK_FLOPS, idle_weights, model_flops

GIB = 2**30
# Recomputing is a quarter of the work; without attention and the last block, a fifth.
ASSUMED_MFU = {"none": 0.40, "selective": 0.32, "full": 0.30, "offload": 0.28}
CUDA_CONTEXT = 0.8 * GIB  # driver, cuBLAS and NCCL
FRAGMENTATION = 1.05  # what the allocator holds over what is in use
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU at the peak of a step."""

    weights: float  # float32, this GPU's shard
    gradients: float
    optimizer: float
    gathered: float  # weights in use and gradients on their way to their shards
    activations: float  # with the loss, when the sum is largest
    loss: float  # of them, while the loss runs

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """As torch.cuda.max_memory_allocated counts it."""
        return self.state + self.gathered + self.activations

    @property
    def needed(self) -> float:
        return self.peak * FRAGMENTATION + CUDA_CONTEXT


class Planner:
    """Plans of one recipe and its variations; models and activations are measured once."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.model = load_model(config, device="meta")
        self.whole_config = load_model_config(config)
        # of the language model: itself, but for composite ones
        self.model_config = self.whole_config.get_text_config(decoder=True)
        self.num_blocks = len(blocks_of(self.model.lm))
        self.rehearsed: dict[tuple[int, str, int], Bytes] = {}

    def memory(self, gpus: int, config: TrainConfig | None = None) -> Memory:
        """Per GPU with FSDP2 over `gpus`; `gpus=0`: one CPU process."""
        config = config or self.config
        checkpointing = config.gradient_checkpointing
        sizes, ranks = Sizes.of(self.model), max(gpus, 1)
        activations = self.activations(config, checkpointing, cuda=gpus > 0)
        each = 4 * sizes.all / ranks
        gathered = 0.0
        if gpus:
            wide = 4 if config.bf16 is False else 2
            # Outermost group: weights all step long, dW of the head until the step's end. Blocks:
            # weights and gradients of two at a time, their float32 copies on the way to the shards.
            gathered = wide * (sizes.outer + sizes.head) + 2 * (2 * wide + 4) * sizes.block
        return Memory(each, each, 2 * each, gathered, activations.peak, activations.loss)

    def activations(self, config: TrainConfig, checkpointing: str, *, cuda: bool) -> Bytes:
        tokens = tokens_per_pack(config)
        blocks, kept = self.num_blocks, config.kept_blocks
        if checkpointing == "selective" and kept > 1 and blocks > 1:
            one = self.activations(
                config.model_copy(update={"kept_blocks": 1}), checkpointing, cuda=cuda
            )
            every = self.activations(config, "none", cuda=cuda)
            share = (min(kept, blocks) - 1) / (blocks - 1)
            pairs = zip(vars(one).values(), vars(every).values(), strict=True)
            return Bytes(*(round(a + share * (b - a)) for a, b in pairs))
        key = (tokens, checkpointing, kept if checkpointing == "selective" else 0)
        if key not in self.rehearsed:
            longest = min(config.max_length, tokens)
            rest = tokens % longest
            seqlens = (longest,) * (tokens // longest) + ((rest,) if rest else ())
            name = "full" if checkpointing == "offload" else checkpointing
            variant = config.model_copy(update={"gradient_checkpointing": name})
            found = rehearse(variant, self.whole_config, seqlens, cuda=cuda)
            if checkpointing == "offload":  # two blocks' inputs stay: one in use, one on its way
                inputs = 2 * tokens * self.model_config.hidden_size * max(blocks - 2, 0)
                found = Bytes(*(max(b - inputs, 0) for b in vars(found).values()))
            self.rehearsed[key] = found
        return self.rehearsed[key]

    def remedies(self, gpus: int, limit: float) -> list[str]:
        """Single changes after which the recipe fits, the cheapest first."""
        tried: list[tuple[str, int, dict[str, Any]]] = []
        kinds = list(ASSUMED_MFU)  # each keeps less than the one before
        thriftier = kinds[kinds.index(self.config.gradient_checkpointing) + 1 :]
        kept = self.config.kept_blocks
        also = "" if kept == 1 else ", kept_blocks: 1"
        recompute = [(f"gradient_checkpointing: {how}{also}", gpus,
                      {"gradient_checkpointing": how, "kept_blocks": 1})
                     for how in thriftier]  # fmt: skip
        fewer = self.kept_blocks(gpus, limit) if kept else kept
        if fewer < kept:
            tried.append((f"kept_blocks: {fewer}", gpus, {"kept_blocks": fewer}))
        tried += recompute[:-1]
        smaller = max(self.config.max_tokens_per_batch // 2, self.config.max_length)
        if smaller < tokens_per_pack(self.config):
            text = f"max_tokens_per_batch: {smaller}"
            tried.append((text, gpus, {"max_tokens_per_batch": smaller}))
        tried += recompute[-1:]
        tried += [(f"{n} GPUs", n, {}) for n in GPU_COUNTS if n > gpus]
        found = []
        for text, count, change in tried:
            memory = self.memory(count, self.config.model_copy(update=change))
            if memory.needed <= limit:
                found.append(f"{text} ({memory.needed / GIB:.1f} GiB)")
                if count > gpus:
                    break  # more GPUs yet would fit too
        return found

    def kept_blocks(self, gpus: int, limit: float) -> int:
        """The most blocks that could keep all their activations within the limit."""
        counts = range(self.num_blocks, 0, -1)
        variant = lambda kept: self.config.model_copy(update={"kept_blocks": kept})
        return next((k for k in counts if self.memory(gpus, variant(k)).needed <= limit), 0)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters; tied weights count once."""

    all: int
    block: int
    outer: int  # embeddings, final norm, head
    head: int

    @classmethod
    def of(cls, model: PackedLM) -> "Sizes":
        total = sum(p.numel() for p in model.parameters())
        layers = blocks_of(model.lm)
        inner = sum(p.numel() for p in layers.parameters())
        return cls(total, inner // len(layers), total - inner, model.head.weight.numel())


def tokens_per_pack(config: TrainConfig) -> int:
    """A trace longer than `max_tokens_per_batch` gets a pack of its own; so does a pair, where the
    objective needs it whole."""
    traces = 2 if config.objective in NEEDS_PAIRS else 1
    return max(config.max_tokens_per_batch, traces * config.max_length)


def describe(
    config: TrainConfig,
    *,
    gpus: int = 8,
    gpu_memory: float = 80,
    gpu: str = "A100",
    mean_length: int | None = None,
) -> str:
    """The plan as text. `gpu_memory` is in GB, as on the label of a card; `gpus=0`: a CPU.

    Raises RediError when the recipe does not say enough.
    """
    if gpu not in PEAK_FLOPS:
        raise RediError(f"--gpu {gpu}: not one of {', '.join(PEAK_FLOPS)}")
    preflight.check_plan(config)
    num_examples, source = _num_examples(config)
    planner = Planner(config)
    schedule = Schedule(num_examples, config)
    rows = [*_what(planner, schedule, source), *_memory(planner, gpus, gpu_memory)]
    if gpus:
        rows += [("time", _time(planner, schedule, gpus, gpu, mean_length))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _what(planner: Planner, schedule: Schedule, source: str) -> list[tuple[str, str]]:
    config, architecture = planner.config, planner.model_config
    unit = "traces" if config.objective == "sft" else "pairs"
    marks = sorted(
        {0, schedule.warmup_steps - 1, schedule.total_steps // 2, schedule.total_steps - 1}
    )
    name, count = type(planner.model.lm).__name__, Sizes.of(planner.model).all
    idle = idle_weights(planner.model.lm)
    return [
        ("objective", config.stage),
        ("model", f"{name}, {count:,} parameters" + (f", {count - idle:,} active" if idle else "")),
        ("context", f"{_positions(architecture)}, {_rope(architecture)}"),
        ("data", f"{schedule.num_examples:,} {unit} ({source})"),
        ("steps", f"{schedule.total_steps:,} of {config.train_batch_size} {unit} "
         f"({schedule.steps_per_epoch:,} an epoch)"),
        ("schedule", f"{config.lr_scheduler_type}, {schedule.warmup_steps:,} warm-up steps: "
         + ", ".join(f"{schedule.learning_rate(s):.2e} at {s + 1:,}" for s in marks if s >= 0)),
        ("lengths", f"traces over {config.max_length:,} tokens are dropped"
         + (f", prompts over {config.max_prompt_length:,}" if config.max_prompt_length else "")),
    ]  # fmt: skip


def _memory(planner: Planner, gpus: int, gpu_memory: float) -> list[tuple[str, str]]:
    config, memory = planner.config, planner.memory(gpus)
    checkpointing = config.gradient_checkpointing
    tokens, size = tokens_per_pack(config), lambda b: f"{b / GIB:.1f} GiB"
    place = f"{gpus} x {gpu_memory:g} GB" if gpus else "one CPU process"
    rows = [
        ("memory", f"per GPU on {place}" if gpus else place),
        ("  state", f"{size(memory.state)}: weights {size(memory.weights)}, gradients "
         f"{size(memory.gradients)}, AdamW {size(memory.optimizer)} (float32)"),
        ("  gathered", f"{size(memory.gathered)}: weights in use, gradients on their way"),
        ("  activations", f"{size(memory.activations)} with {tokens:,} tokens at once, "
         f"checkpointing {checkpointing} ({size(memory.loss)} while the loss runs)"),
        ("  peak", f"{size(memory.peak)} allocated"),
    ]  # fmt: skip
    if not gpus:
        return [row for row in rows if row[0] != "  gathered"]
    limit = gpu_memory * 1e9
    verdict = "fits" if memory.needed <= limit else "DOES NOT FIT"
    verdict += f": {size(memory.needed)} of {size(limit)} with the allocator's and CUDA's share"
    if memory.needed <= limit and checkpointing == "selective":
        kept = planner.kept_blocks(gpus, limit)
        if kept > config.kept_blocks:
            more = planner.memory(gpus, config.model_copy(update={"kept_blocks": kept}))
            verdict += f"; there is room for kept_blocks: {kept} ({size(more.needed)}), for speed"
    if memory.needed > limit:
        remedies = planner.remedies(gpus, limit)
        verdict += "; any one of these would do: " if remedies else "; no single change would do"
        verdict += ", ".join(remedies)
    return [*rows, ("  verdict", verdict)]


def _time(
    planner: Planner, schedule: Schedule, gpus: int, gpu: str, mean_length: int | None
) -> str:
    config = planner.config
    sides = 1 if config.objective == "sft" else 2
    traces = sides * schedule.total_steps * config.train_batch_size
    told = "as given" if mean_length else "assumed: a third of max_length; --mean-length sets it"
    length = mean_length or config.max_length // 3
    mfu = _mfu(config, planner.num_blocks)
    trace_hours = model_flops(planner.model.lm, [length]) / (PEAK_FLOPS[gpu] * gpus) / 3600
    hours, more = traces * trace_hours / mfu, ""
    if config.objective == "dpo":  # a forward of every trace, once
        reference = sides * schedule.num_examples * trace_hours / 3 / ASSUMED_MFU["none"]
        hours, more = hours + reference, f", {reference:.1f} of them for the reference's log-probs"
    return (
        f"{hours:.1f} hours{more} (modelled: {gpu}, {mfu:.0%} of its peak of "
        f"{PEAK_FLOPS[gpu] / 1e12:.0f} TFLOP/s, traces of {length:,} tokens {told})"
    )


def _mfu(config: TrainConfig, num_blocks: int) -> float:
    """Between no checkpointing's and selective's by how many blocks are computed again."""
    none, assumed = ASSUMED_MFU["none"], ASSUMED_MFU[config.gradient_checkpointing]
    if config.gradient_checkpointing != "selective" or num_blocks == 1:
        return assumed
    again = max(num_blocks - config.kept_blocks, 0) / (num_blocks - 1)
    return 1 / (1 / none + again * (1 / assumed - 1 / none))


def _num_examples(config: TrainConfig) -> tuple[int, str]:
    if Path(config.dataset_name).exists():
        from redi.data.read import read_examples

        return len(read_examples(config.dataset_name)), config.dataset_name
    assert config.expected_examples is not None  # the recipe was checked
    return config.expected_examples, f"expected; {config.dataset_name} is not here"


def _positions(architecture: Any) -> str:
    count = getattr(architecture, "max_position_embeddings", None)
    return f"{count:,} positions" if count else "positions without a limit"


def _rope(architecture: Any) -> str:
    rope = getattr(architecture, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(architecture, "rope_theta", None))
    return f"rope theta {theta:,.0f}" if theta else "no rope theta"
