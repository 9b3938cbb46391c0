"""Pretrain the small Llama that the quickstart adapts, so that it needs no network.

    python recipes/quickstart/make_base.py --out recipes/quickstart/base --steps 1200

Text from `corpus.py` -> a byte-level BPE tokenizer -> packed sequences, each token seen once ->
bf16 safetensors. The same seed, versions, processor and number of threads give the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from corpus import ASSISTANT, BOS, END, PAD, USER, documents
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
TOKENIZER_DOCUMENTS = 20_000
HELDOUT_SEQUENCES = 128
WARMUP_SHARE = 0.05
FINAL_LEARNING_RATE_SHARE = 0.05

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('the roles are user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Digits stay single, so that a number is copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, BOS, END, USER, ASSISTANT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def packed(
    tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], sequences: int, length: int
) -> torch.Tensor:
    """`sequences` rows of `length` tokens: documents end to end, each `BOS … END`."""
    tokens: list[int] = []
    while len(tokens) < sequences * length:
        batch = [
            text if text.endswith(END) else text + END for text in itertools.islice(texts, 2000)
        ]
        for ids in tokenizer(batch)["input_ids"]:
            tokens.extend(ids)
    return torch.tensor(tokens[: sequences * length], dtype=torch.int16).view(sequences, length)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """3.7 M parameters; embeddings tied, two query heads to a key-value head."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=768,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to FINAL_LEARNING_RATE_SHARE of the peak."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    floor = FINAL_LEARNING_RATE_SHARE
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def sequence_loss(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats a token) of B packed sequences of T tokens."""
    ids_BT = ids_BT.long()
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, ids_ST: torch.Tensor) -> float:
    """Mean cross-entropy (nats a token) over S held-out sequences."""
    model.eval()
    losses = [sequence_loss(model, batch) for batch in ids_ST.split(32)]
    model.train()
    return torch.stack(losses).mean().item()


def pretrain(
    model: LlamaForCausalLM,
    train_ST: torch.Tensor,
    heldout_ST: torch.Tensor,
    steps: int,
    learning_rate: float,
) -> None:
    """AdamW over `steps` equal batches, in the order of the corpus."""
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    kept = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, steps)
    )
    started = time.perf_counter()
    for step, batch_BT in enumerate(train_ST.chunk(steps), start=1):
        loss = sequence_loss(model, batch_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            seconds = time.perf_counter() - started
            print(
                f"step {step}/{steps}  loss {loss.item():.3f}  "
                f"{step * batch_BT.numel() / seconds:,.0f} tokens/s",
                flush=True,
            )
        if step % 300 == 0:
            print(f"held-out loss {heldout_loss(model, heldout_ST):.4f}", flush=True)


def build(
    out: Path, steps: int, seed: int, batch_sequences: int, length: int, learning_rate: float
) -> None:
    """Write the whole base to `out`, replacing what is there but its README."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(itertools.islice(documents("pretrain", seed), TOKENIZER_DOCUMENTS))
    train_ST = packed(tokenizer, documents("pretrain", seed), steps * batch_sequences, length)
    heldout_ST = packed(tokenizer, documents("heldout", seed), HELDOUT_SEQUENCES, length)
    model = new_model(tokenizer)
    print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary, "
        f"{train_ST.numel():,} training tokens"
    )

    pretrain(model, train_ST, heldout_ST, steps, learning_rate)

    model.to(torch.bfloat16)
    loss = heldout_loss(model, heldout_ST)
    print(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.3f} (weights in bf16)")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir()):
        path.replace(out / path.name)
    partial.rmdir()
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens a packed sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=3)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    print(f"python {platform.python_version()}, {versions}")
    print(f"cpu {torch.backends.cpu.get_cpu_capability()}, {vars(args)}")
    build(args.out, args.steps, args.seed, args.batch_sequences, args.length, args.learning_rate)


if __name__ == "__main__":
    main()
