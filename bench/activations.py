"""Real hidden states for the benchmarks: `python bench/activations.py MODEL DATA.jsonl`.

Random states flatter or punish; these are a model's own, on text it is trained on. DATA has a
question and an answer per line, as GSM8K. Writes runs/activations.pt: the final hidden states that
predict answer tokens, those tokens, and the LM head.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import torch


def collect(model_name: str, data: Path, num_tokens: int) -> dict[str, torch.Tensor | str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    lm = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    x, y, total = [], [], 0
    with data.open() as lines:
        for row in islice(map(json.loads, lines), 10_000):
            messages = [{"role": "user", "content": row["question"]}]
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            num_prompt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
            text = tokenizer(prompt + row["answer"], add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                states_TH = lm.model(**text).last_hidden_state[0]
            x.append(states_TH[num_prompt - 1 : -1])
            y.append(text.input_ids[0, num_prompt:])
            total += len(y[-1])
            if total >= num_tokens:
                break
    w_VH = lm.get_output_embeddings().weight.detach()
    x_TH, y_T = torch.cat(x)[:num_tokens].clone(), torch.cat(y)[:num_tokens].clone()
    return {
        "x_TH": x_TH,
        "w_VH": w_VH,
        "y_T": y_T,
        "source": f"{Path(model_name).name}, {data.stem}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("data", type=Path, help="JSON lines with question and answer")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=Path("runs/activations.pt"))
    args = parser.parse_args()
    made = collect(args.model, args.data, args.tokens)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, args.output)
    nll = torch.nn.functional.cross_entropy(made["x_TH"] @ made["w_VH"].T, made["y_T"])
    print(f"{args.output}: {len(made['y_T'])} tokens of {made['source']}, {nll:.3f} nats per token")
