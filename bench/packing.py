"""How evenly a step's traces fall on the ranks: `python bench/packing.py`. Seconds, on any CPU.

Lengths are drawn, since the paper gives only its limits (prompts of 800 tokens, completions of
19,000): `paper` is log-normal with a median of 4,500 tokens for chosen and 7,500 for rejected
completions and a sigma of 0.65, cut at the limit as the paper's filter does; `heavy` is a Pareto
tail of exponent 1.5 from 1,000 tokens on, cut at 32,768. Cost: tokens + 2.8e-5 x squared lengths.

balance    the busiest rank's cost over the mean; 1 is perfect. Median and worst of the steps
at best    what no arrangement of whole traces can beat: the costliest trace (or pair) over the mean
           cost of a rank, if above 1. Worst of the steps
over       steps with a balance above 1.05 that whole traces would have allowed
forwards   micro-batches of a rank in a step, mean; least: as few as the tokens fit into
in step    time of ranks that wait for each other after every forward, over the mean rank's cost
"""

import argparse

import numpy as np

from redi.data.pack import arrange, trace_cost

LIMIT = 1.05


def paper_pairs(num_pairs: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts [pairs, 1] and of completions [pairs, (chosen, rejected)]."""
    draws = rng.lognormal(np.log([4500, 7500]), 0.65, (64 * num_pairs, 2))
    kept = draws[(draws <= 19000).all(1)][:num_pairs]
    return rng.integers(40, 400, (num_pairs, 1)), kept


def paper_lengths(num_pairs: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of [pairs, (chosen, rejected)] traces, prompt included."""
    prompts, completions = paper_pairs(num_pairs, rng)
    return (prompts + completions).astype(int)


def heavy_lengths(num_pairs: int, rng: np.random.Generator) -> np.ndarray:
    """As `paper_lengths`, from a Pareto tail."""
    draws = 1000 * (1 + rng.pareto(1.5, (64 * num_pairs, 2)))
    return draws[(draws <= 32768).all(1)][:num_pairs].astype(int)


def costs(lengths: np.ndarray, world_size: int, pairs: bool, max_tokens: int) -> np.ndarray:
    """Cost [ranks, forwards] of a step."""
    keys = [i for i, _ in enumerate(lengths) for _ in range(2)] if pairs else None
    flat = lengths.flatten().tolist()
    ranks = arrange(flat, max_tokens, world_size=world_size, keys=keys)
    return np.array([[sum(trace_cost(flat[i]) for i in pack) for pack in packs] for packs in ranks])


def balance(costs_RF: np.ndarray) -> float:
    return costs_RF.sum(1).max() / costs_RF.sum(1).mean()


def at_best(lengths: np.ndarray, world_size: int, pairs: bool) -> float:
    cost = trace_cost(lengths.astype(float))
    return max(1.0, (cost.sum(1) if pairs else cost).max() * world_size / cost.sum())


def row(draw, num_traces: int, world_size: int, pairs: bool, steps: int, max_tokens: int) -> str:
    found = []
    for step in range(steps):
        lengths = draw(num_traces // 2, np.random.default_rng(step))
        costs_RF = costs(lengths, world_size, pairs, max_tokens)
        mean = costs_RF.sum() / world_size
        least = np.ceil(lengths.sum() / max_tokens / world_size)
        best = at_best(lengths, world_size, pairs)
        waits = costs_RF.max(0).sum() / mean
        found.append((balance(costs_RF), best, costs_RF.shape[1], least, waits))
    got, best, forwards, least, waits = np.array(found).T
    over = (got > LIMIT * best).mean()
    return (
        f"{np.median(got):8.3f} {got.max():7.3f} {best.max():8.3f} {over:6.0%}"
        f" {forwards.mean():9.2f} {least.mean():6.2f} {np.median(waits):8.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="steps of each row")
    parser.add_argument("--max-tokens", type=int, default=32768, help="max_tokens_per_batch")
    args = parser.parse_args()
    print(f"{args.steps} steps a row, packs of {args.max_tokens:,} tokens")
    print(
        f"{'lengths':8} {'traces':>6} {'kept':>6} {'ranks':>5} {'balance':>8} {'worst':>7} "
        f"{'at best':>8} {'over':>6} {'forwards':>9} {'least':>6} {'in step':>8}"
    )
    for name, draw in (("paper", paper_lengths), ("heavy", heavy_lengths)):
        for num_traces in (64, 256, 1024):
            for pairs in (False, True):
                for world_size in (2, 8, 32):
                    kept = "pairs" if pairs else "traces"
                    text = row(draw, num_traces, world_size, pairs, args.steps, args.max_tokens)
                    print(f"{name:8} {num_traces:6} {kept:>6} {world_size:5} {text}", flush=True)


if __name__ == "__main__":
    main()
