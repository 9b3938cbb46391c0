"""Makes the retention text of recipes/gsm8k.yaml: stories that the untouched base itself tells.

    cd recipes && python stories_retention.py models/stories260K data/stories_retention.jsonl

What a model says when nobody has tuned it is the text on which forgetting shows most plainly.
Seeded sampling at temperature 0.8, 100 stories of up to 200 tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

STORIES = 100
TOKENS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    model = AutoModelForCausalLM.from_pretrained(arguments.base).eval()
    start = torch.full((STORIES, 1), tokenizer.bos_token_id)
    tokens = model.generate(
        start, do_sample=True, temperature=0.8, max_new_tokens=TOKENS, attention_mask=start * 0 + 1
    )
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    lines = [json.dumps({"text": text.strip()}) for text in texts if text.strip()]
    arguments.out.write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} stories: {arguments.out}")


if __name__ == "__main__":
    main()
