"""What a training recipe will do, before it does it: `redi train --dry-run`.

Builds the model on the meta device (shapes, no memory, no weights), so that a recipe for eight GPUs
can be checked on a laptop, offline if it embeds `architecture` and `expected_examples`.
"""

from pathlib import Path

from redi.config import TrainConfig
from redi.errors import RediError


def describe(config: TrainConfig) -> str:
    """Parameters, steps and schedule as text. Raises RediError when the recipe does not say
    enough."""
    from redi.model import load_model
    from redi.schedule import Schedule

    model = load_model(config, device="meta")
    num_parameters = sum(p.numel() for p in model.parameters())  # tied weights count once
    num_examples, source = _num_examples(config)
    schedule = Schedule(num_examples, config)
    architecture = model.lm.config
    unit = "traces" if config.objective == "sft" else "pairs"
    objective = "SFT" if config.objective == "sft" else f"REDI, alpha = {config.alpha}"
    marks = sorted(
        {0, schedule.warmup_steps - 1, schedule.total_steps // 2, schedule.total_steps - 1}
    )
    rows = [
        ("objective", objective),
        ("model", f"{type(model.lm).__name__}, {num_parameters:,} parameters"),
        ("context", f"{architecture.max_position_embeddings:,} positions, {_rope(architecture)}"),
        ("training state", f"{num_parameters * 16 / 2**30:.1f} GiB over all GPUs (fp32 weights, "
         "gradients, two AdamW moments)"),
        ("data", f"{num_examples:,} {unit} ({source})"),
        ("steps", f"{schedule.total_steps:,} of {config.train_batch_size} {unit} "
         f"({schedule.steps_per_epoch:,} an epoch)"),
        ("schedule", f"{config.lr_scheduler_type}, {schedule.warmup_steps:,} warm-up steps: "
         + ", ".join(f"{schedule.learning_rate(s):.2e} at {s + 1:,}" for s in marks if s >= 0)),
        ("lengths", f"traces over {config.max_length:,} tokens are dropped"
         + (f", prompts over {config.max_prompt_length:,}" if config.max_prompt_length else "")),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _num_examples(config: TrainConfig) -> tuple[int, str]:
    if Path(config.dataset_name).exists():
        from redi.data.read import read_examples

        return len(read_examples(config.dataset_name)), config.dataset_name
    if config.expected_examples is None:
        raise RediError(
            f"dataset_name: {config.dataset_name}: no such file; "
            "set expected_examples to plan without it"
        )
    return config.expected_examples, f"expected; {config.dataset_name} is not here"


def _rope(architecture) -> str:
    rope = getattr(architecture, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(architecture, "rope_theta", None))
    return f"rope theta {theta:,.0f}" if theta else "no rope theta"
