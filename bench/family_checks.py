"""One family, tried in every way that docs/models.md has a column for (bench/families.py)."""

import contextlib
import io
import json
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from redi_kernels.hf import patch
from tiny_families import perturb, tiny_config
from torch import Tensor

from redi.config import TrainConfig
from redi.data.arithmetic import write_tokenizer
from redi.errors import RediError
from redi.training import distributed
from redi.training.loop import Loop, load_data, make_optimizer, train
from redi.training.model import load_model, load_tokenizer
from redi.training.plan import describe

ALONE = distributed.Ranks(0, 1, torch.device("cpu"))
MODES = ("none", "selective", "full", "offload")
WIDE = 256  # windows and chunks longer than the traces, where redi refuses shorter ones
# Rounding of a few layers in fp32 is below 1e-4, also after two steps of AdamW with this epsilon;
# what leaks or is left out of a model whose every weight was moved shows at 1e-2 and above.
LOSS, UPDATE, LOGITS = 2e-4, 5e-3, 5e-3
RATE, EPSILON = 3e-3, 1e-3
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity(50)


class Differs(Exception):
    """Two things that should be equal are not."""


class Draws(Exception):
    """In training, the family's routers draw: one trace at a time, other numbers than in a pack."""


@contextlib.contextmanager
def _untrained_mode() -> Iterator[None]:
    """Every model stays in eval mode, where nothing is drawn; gradients are the same code's."""
    train_mode = torch.nn.Module.train
    torch.nn.Module.train = lambda self, mode=True: train_mode(self, False)
    try:
        yield
    finally:
        torch.nn.Module.train = train_mode


def check_family(family: str, *, quick: bool) -> dict[str, Any]:
    """The family's row: `outcome`, `why`, `kind`, and one word a column."""
    started = time.perf_counter()
    row: dict[str, Any] = {"family": family}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        try:
            row |= _check(family, Path(folder), quick)
        except Draws:
            with _untrained_mode():
                row |= {"quiet": True} | _check(family, Path(folder) / "quiet", quick)
        except Exception as error:
            row |= {"outcome": "crashed", "why": f"in the check itself: {_told(error)}"}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def _check(family: str, folder: Path, quick: bool) -> dict[str, Any]:
    try:
        reference = Reference(family, folder / "tight", quick)
    except Draws:
        raise
    except Exception as error:
        return {"outcome": "not buildable", "why": _told(error), "kind": "other"}
    row: dict[str, Any] = {"kind": reference.kind, "class": type(reference.lm).__name__}
    row["packed"], row["packed_why"] = _tried(lambda: _train(reference))
    within = ""
    if row["packed"] == "refused" and "max_length" in row["packed_why"]:
        with contextlib.suppress(Exception):
            wide = Reference(family, folder / "wide", quick, window=WIDE)
            packed, why = _tried(lambda: _train(wide))
            if packed == "right":
                within, reference = row["packed_why"], wide
            row["packed"], row["packed_why"] = packed, why or row["packed_why"]
    row["within"], row["alone"] = within, reference.alone
    row["patch"], row["patch_why"] = _tried(lambda: _patch(reference))
    for mode in MODES[1:] if row["packed"] == "right" and not quick else ():
        row[mode], row[f"{mode}_why"] = _tried(lambda mode=mode: _mode(reference, mode))
    if not quick:
        row["plan"], row["plan_why"] = _tried(lambda: _plan(reference))
    columns = [name for name in ("packed", "patch", *MODES[1:], "plan") if name in row]
    bad = [name for name in columns if row[name] not in ("right", "refused")]
    if bad:
        outcome = row[bad[0]]
        why = "; ".join(f"{name}: {row[f'{name}_why']}" for name in bad)
        return row | {"outcome": outcome, "why": why}
    return row | {"outcome": row["packed"], "why": row["packed_why"]}


def _tried(what: Callable[[], None]) -> tuple[str, str]:
    """right, refused (by a sentence of ours), wrong or crashed; and why."""
    try:
        what()
    except Differs as error:
        return "wrong", str(error)
    except Exception as error:
        return ("refused", str(error)) if _is_ours(error) else ("crashed", _told(error))
    return "right", ""


def _is_ours(error: Exception) -> bool:
    """RediError; of `patch`, the TypeErrors and ValueErrors that it raises itself."""
    if isinstance(error, RediError):
        return "\n" not in str(error).strip()
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, TypeError | ValueError) and "redi_kernels" in last


def _told(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} [{place}]"


class Reference:
    """A family's tiny model on disk, and what transformers alone makes of it in two REDI steps."""

    def __init__(self, family: str, folder: Path, quick: bool, **window: Any):
        config = tiny_config(family, **window)
        torch.manual_seed(0)
        lm = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        )
        perturb(lm)
        lm.save_pretrained(folder / "model")
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        write_tokenizer(tokenizer)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in _rows()))
        self.folder, self.kind = folder, kind_of(lm)
        # As transformers reads it: some families set a weight anew when they are loaded (zaya), and
        # one that it cannot read again nobody can train.
        self.lm = lm = self.fresh()
        self.steps = 1 if quick else 2
        self.config = self.recipe()
        self.data = load_data(self.config, load_tokenizer(self.config))
        self.start = {k: v.clone() for k, v in lm.state_dict().items()}
        self.alone = False
        self.losses: list[float] = []
        self.norms: list[float] = []
        if self._draws():
            raise Draws
        self._learn()

    def _draws(self) -> bool:
        self.lm.train()
        seen = []
        with torch.no_grad():
            for seed in (0, 1):
                torch.manual_seed(seed)
                seen.append(self.logits(self.longest()))
        return not torch.equal(*seen)

    def recipe(self, **changes: Any) -> TrainConfig:
        settings = {
            "model_name_or_path": str(self.folder / "model"),
            "tokenizer_name_or_path": str(self.folder / "tokenizer"),
            "dataset_name": str(self.folder / "pairs.jsonl"),
            "output_dir": str(self.folder / "out"),
            "objective": "redi", "max_steps": self.steps, "train_batch_size": 2,
            "max_length": WIDE // 2, "max_tokens_per_batch": 3 * WIDE // 2,
            "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_ratio": 0.0,
            "adam_epsilon": EPSILON, "weight_decay": 0.1, "save_steps": 1000,
        }  # fmt: skip
        return TrainConfig(**(settings | changes))

    def _learn(self) -> None:
        """One trace at a time; the gradient of the first step is kept."""
        from redi.training.schedule import Schedule

        self.lm.train()
        schedule, optimizer = (
            Schedule(len(self.data.traces), self.config),
            make_optimizer(self.lm, self.config),
        )
        for step in range(self.steps):
            pairs = [self.data.traces[i] for i in schedule.examples(step)]
            traces = [trace for pair in pairs for trace in pair]
            chosen = sum(trace.is_chosen for trace in traces)
            optimizer.zero_grad()
            total = 0.0
            for trace in traces:
                ids = torch.from_numpy(trace.input_ids.astype(np.int64))
                logp_T = self.logits(ids)[:-1].log_softmax(-1)
                logp_T = logp_T.gather(1, ids[1:, None])[max(trace.num_prompt_tokens, 1) - 1 :]
                count = chosen if trace.is_chosen else len(traces) - chosen
                weight = -1.0 if trace.is_chosen else self.config.alpha
                loss = weight * logp_T.mean() / count
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(self.lm.parameters(), self.config.max_grad_norm)
            self.losses.append(total)
            self.norms.append(norm.item())
            if step == 0:
                self.gradient = {
                    name: p.grad.clone()
                    for name, p in self.lm.named_parameters()
                    if p.grad is not None
                }
            optimizer.step()
        self.lm.eval()
        with torch.no_grad():
            self.after = self.logits(self.longest())
        if not (np.isfinite(self.losses).all() and np.isfinite(self.norms).all()):
            raise FloatingPointError(f"losses {self.losses}, gradient norms {self.norms}")

    def longest(self) -> Tensor:
        traces = [trace for pair in self.data.traces for trace in pair]
        ids = max(traces, key=lambda trace: len(trace.input_ids)).input_ids
        return torch.from_numpy(ids.astype(np.int64))

    def logits(self, ids: Tensor, lm: Any = None) -> Tensor:
        return (lm or self.lm)(input_ids=ids[None], use_cache=False).logits[0].float()

    def fresh(self, folder: Path | None = None) -> Any:
        """The model of a folder (the start), as transformers reads it."""
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder or self.folder / "model", attn_implementation="eager", dtype=torch.float32
        )


def _rows() -> list[dict[str, Any]]:
    """Pairs of 20 to 100 tokens: longer than the windows, of unequal length."""
    rows = []
    for i in range(4):
        a, b = 137 * i + 41, 59 * i + 83
        work = "".join(f"{a + k}+{b}={a + b + k};" for k in range(2 + 2 * (i % 3)))
        slip = "".join(f"{a}+{b + k}={a + b + k + 1};" for k in range(1 + 2 * (i % 2)))
        rows.append({"id": f"sum-{i}", "prompt": f"{a}+{b}=", "chosen": work, "rejected": slip})
    return rows


def _train(reference: Reference) -> None:
    """`redi train`, then the exported folder against the reference."""
    out = reference.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    train(reference.config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for step, (loss, norm) in enumerate(zip(reference.losses, reference.norms, strict=True)):
        _same(f"loss of step {step + 1}", rows[step]["loss"], loss, LOSS * max(1, abs(loss)))
        _same(f"gradient norm of step {step + 1}", rows[step]["grad_norm"], norm, UPDATE * norm)
    reference.alone = "packs" in rows[0]  # one trace a pack, said so in the log
    exported = reference.fresh(out).eval()
    ours, own = exported.state_dict(), reference.lm.state_dict()
    if set(ours) != set(own):
        raise Differs(f"exported: other names of weights: {sorted(set(ours) ^ set(own))[:4]}")
    moves = {name: own[name].double() - reference.start[name].double() for name in own}
    misses = {name: ours[name].double() - own[name].double() for name in own}
    _compare("exported weights", misses, moves)
    with torch.no_grad():
        logits = reference.logits(reference.longest(), exported)
    error = (logits - reference.after).norm() / reference.after.norm()
    _same("logits of the export", error.item(), 0.0, LOGITS)


def _mode(reference: Reference, mode: str) -> None:
    """The first step's gradient under a checkpointing mode."""
    config = reference.recipe(gradient_checkpointing=mode, max_steps=1, model_check=False)
    model = load_model(config)
    model.why_alone = "as it trained without" if reference.alone else None
    loop = Loop(config, model, reference.data, {}, ALONE)
    try:
        means = loop.learn(loop.prepare(0))
    finally:
        loop.work.close()
    _same("loss", means["loss"], reference.losses[0], LOSS * max(1, abs(reference.losses[0])))
    _same("gradient norm", means["grad_norm"], reference.norms[0], UPDATE * reference.norms[0])
    ours = {name.removeprefix("lm."): p.grad for name, p in model.named_parameters()}
    ours = {name: grad for name, grad in ours.items() if grad is not None}
    own = reference.gradient
    misses = {n: ours.get(n, torch.zeros(())) - own.get(n, torch.zeros(())) for n in {*ours, *own}}
    _compare("gradient", misses, own)


def _patch(reference: Reference) -> None:
    """`patch` on the start: loss and gradient on one trace against the model's own logits."""
    lm = patch(reference.fresh().train())
    ids = reference.longest()[None]
    loss = lm(input_ids=ids, labels=ids).loss
    loss.backward()
    own = reference.fresh().train()
    logp_T = own(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    expected = -logp_T.gather(1, ids[0, 1:, None]).mean()
    expected.backward()
    _same("loss", loss.item(), expected.item(), LOSS * max(1, expected.item()))
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (lm, own)]
    misses = {n: grads[0].get(n, torch.zeros(())) - grad for n, grad in grads[1].items()}
    _compare("gradient", misses, grads[1])


def _plan(reference: Reference) -> None:
    describe(reference.config, gpus=0)


def _same(what: str, value: float, expected: float, slack: float) -> None:
    if not abs(value - expected) <= slack:
        raise Differs(f"{what}: {value:.6g} for {expected:.6g}")


def _compare(what: str, misses: dict[str, Tensor], moves: dict[str, Tensor]) -> None:
    """Each tensor's error beside its own size, or where that is small, the mean one's."""
    sizes = {name: move.double().norm().item() for name, move in moves.items()}
    floor = max(1e-12, 0.1 * float(np.sqrt(np.mean(np.square(list(sizes.values()))))))
    worst, name = max(
        (miss.double().norm().item() / max(sizes.get(name, 0.0), floor), name)
        for name, miss in misses.items()
    )
    if not worst <= UPDATE:
        raise Differs(f"{what}: {name} is off by {worst:.2g} of its size")


def kind_of(lm: Any) -> str:
    """dense, MoE, hybrid or recurrent, multimodal, other (decoders of encoder families)."""
    config = lm.config
    nested = [v for v in vars(config).values() if hasattr(v, "model_type")]
    text = config.get_text_config()
    classes = " ".join({type(module).__name__ for module in lm.modules()}).lower()
    states = ("mamba", "recurrent", "rwkv", "xlstm", "deltanet", "shortconv", "lightning",
              "ssm", "linearattention", "kda", "rglru")  # fmt: skip
    if any("vision" in v.model_type or "audio" in v.model_type for v in nested):
        return "multimodal"
    if any(word in classes for word in states):
        return "hybrid"
    if any("expert" in name and isinstance(v, int) and not isinstance(v, bool) and v > 1
           for name, v in vars(text).items()):  # fmt: skip
        return "MoE"
    return "dense" if not hasattr(text, "is_decoder") else "other"
