"""Measure a checkpoint with stock transformers alone: print P and exact match on a file of questions and answers."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (one.from_pretrained(sys.argv[1]) for one in (AutoModelForCausalLM, AutoTokenizer))
found = []
for row in map(json.loads, Path(sys.argv[2]).read_text().splitlines()):
    prompt = f"Question: {row['question']}\nAnswer: "
    tokens = tokenizer(prompt + row["answer"], return_offsets_mapping=True)
    ids = [*tokens["input_ids"], tokenizer.eos_token_id]
    first = next(i for i, (_, end) in enumerate(tokens["offset_mapping"]) if end > len(prompt))
    logits, answer = model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1), torch.tensor(ids[first:])
    found.append((logits.gather(1, answer[:, None]).mean().exp().item(), bool((logits.argmax(1) == answer).all())))
assert "loraprune" not in sys.modules
print(json.dumps([sum(column) / len(found) for column in zip(*found, strict=True)]))
