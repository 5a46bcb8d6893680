"""What `redi plan` says of four set-ups at 32k tokens: the table of docs/scaling.md.

python bench/plan_answers.py                          print it
python bench/plan_answers.py --write docs/scaling.md  and put it between the page's markers
"""

import argparse
from pathlib import Path

from pages import replace_between

from redi.config import TrainConfig
from redi.recipe import load_config
from redi.training.plan import GIB, Planner

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "qwen-redi-1.5b-sft.yaml"  # max_length and pack: 32,768 tokens
SEVEN = {"architecture.hidden_size": 3584, "architecture.intermediate_size": 18944,
         "architecture.num_attention_heads": 28, "architecture.num_key_value_heads": 4,
         "architecture.vocab_size": 152064, "architecture.tie_word_embeddings": False}  # fmt: skip
SETUPS = (("1.5B", {}, 1, 24), ("1.5B", {}, 1, 80), ("1.5B", {}, 8, 80), ("7B", SEVEN, 8, 80))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    lines = [
        "| Qwen2.5-Math | on | checkpointing | state | gathered | activations, loss | needed "
        "| verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    planners: dict[tuple[str, str], Planner] = {}
    for name, changes, gpus, gb in SETUPS:
        for checkpointing in ("none", "selective", "full"):
            key = (name, checkpointing)
            if key not in planners:
                start = {"gradient_checkpointing": checkpointing, **changes}
                planners[key] = Planner(load_config(TrainConfig, RECIPE, start))
            planner = planners[key]
            memory, limit = planner.memory(gpus), gb * 1e9
            cells = [memory.state, memory.gathered, memory.activations, memory.needed]
            if memory.needed <= limit:
                kept = planner.kept_blocks(gpus, limit) if checkpointing == "selective" else 1
                verdict = "fits" + (f", with kept_blocks: {kept} too" if kept > 1 else "")
            else:
                remedies = planner.remedies(gpus, limit)
                verdict = "no; would do: " + ", ".join(remedies) if remedies else "no"
            head = f"| {name} | {gpus} x {gb} GB | {checkpointing} | "
            numbers = " | ".join(f"{b / GIB:.1f}" for b in cells)
            lines.append(f"{head}{numbers} of {limit / GIB:.1f} | {verdict} |")
            print(lines[-1], flush=True)
    if args.write:
        replace_between(args.write, "plan_answers", "\n".join(lines))


if __name__ == "__main__":
    main()
