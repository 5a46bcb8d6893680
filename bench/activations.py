"""Real hidden states for the benchmarks: `python bench/activations.py MODEL DATA`.

Random states flatter or punish; these are a model's own, on text it is trained on or reads. DATA is
JSON lines with `question` and `answer` (GSM8K), a JSON list with `problem` and `solution` (AIME),
JSON lines with several models' marked solutions to a question (GSM8K's example solutions: the first
right and the first wrong one become a pair), or any other text, cut at empty lines.
Writes runs/activations.pt: the final hidden states that predict answer tokens, those tokens, the LM
head, and which tokens make a sequence, right or wrong.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

Example = tuple[str | None, str, bool]  # question, answer, is it right


def examples(data: Path) -> Iterator[Example]:
    if data.suffix == ".json":
        rows = json.loads(data.read_text())
    elif data.suffix == ".jsonl":
        rows = map(json.loads, data.read_text().splitlines())
    else:
        for paragraph in data.read_text(errors="replace").split("\n\n"):
            if len(paragraph) > 200:
                yield None, paragraph, True
        return
    for row in rows:
        if "answer" in row and "question" in row:
            yield row["question"], row["answer"], True
        elif "solution" in row:
            yield row["problem"], row["solution"], True
        else:
            marked = [v for v in row.values() if isinstance(v, dict)]
            right = [v["solution"] for v in marked if v["is_correct"]]
            wrong = [v["solution"] for v in marked if not v["is_correct"]]
            if right and wrong:
                yield row["question"], right[0], True
                yield row["question"], wrong[0], False


def collect(model_name: str, data: Path, num_tokens: int) -> dict[str, torch.Tensor | str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_name)
    lm = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    x, y, chosen, total = [], [], [], 0
    for question, answer, is_right in examples(data):
        prompt = tokenizer.bos_token or ""
        if question is not None:
            messages = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        num_prompt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        text = tokenizer(prompt + answer, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            states_TH = lm.model(**text).last_hidden_state[0]
        x.append(states_TH[num_prompt - 1 : -1])
        y.append(text.input_ids[0, num_prompt:])
        chosen.append(is_right)
        total += len(y[-1])
        if total >= num_tokens and (all(chosen) or not is_right):  # pairs stay whole
            break
    lengths = torch.tensor([0] + [len(part) for part in y])
    return {
        "x_TH": torch.cat(x)[:num_tokens].clone(),
        "w_VH": lm.get_output_embeddings().weight.detach(),
        "y_T": torch.cat(y)[:num_tokens].clone(),
        "cu_seqlens": lengths.cumsum(0).clamp(max=num_tokens),
        "is_chosen_S": torch.tensor(chosen),
        "source": f"{Path(model_name).name}, {data.stem}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub name")
    parser.add_argument("data", type=Path, help="questions and answers, pairs, or plain text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=Path("runs/activations.pt"))
    args = parser.parse_args()
    made = collect(args.model, args.data, args.tokens)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, args.output)
    nll = torch.nn.functional.cross_entropy(made["x_TH"] @ made["w_VH"].T, made["y_T"])
    print(f"{args.output}: {len(made['y_T'])} tokens of {made['source']}, {nll:.3f} nats per token")
