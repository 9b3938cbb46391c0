"""Pretrain the small T5 that the seq2seq quickstart adapts, so that it needs no network.

    python recipes/quickstart/make_t5_base.py --out recipes/quickstart/t5-base --steps 1500

Text from `corpus.py` and the tokens of the quickstart's own base -> spans of each document cut out,
to be written by the decoder (span corruption: Raffel et al. 2020, arXiv:1910.10683) -> bf16
safetensors, and beside them t5-retention.jsonl. The same seed, versions, processor and number of
threads give the same bytes.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from corpus import END, PAD, documents
from make_base import orthonormal
from pretraining import IGNORED, Batch, command, mean_loss, pretrain, save
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

HERE = Path(__file__).parent
SENTINELS = [f"<extra_id_{number}>" for number in range(32)]
RETENTION_ROWS = 120
#: Share of a document's tokens that is cut out, and tokens of one span on average. T5 cuts out
#: 0.15; a run as short as this one learns more from each document with more.
CUT_SHARE, SPAN_TOKENS = 0.3, 3.0
#: Rows of a batch, tokens of the longest, and what lengths are padded to a multiple of.
ROWS, LONGEST, ALIGN = 40, 128, 16
DRILL_SHARE = 0.1

# What `build_in_copying` starts from.
PREVIOUS_LEAD = 10.0  # attention logits by which the token before leads the others
MATCH_SCORE = 25.0  # attention logit of a match
NOTED_LENGTH = 1.0  # of the token before, relative to an embedding's own length
COPIED_LENGTH = 4.0  # of the token that the decoder copies

#: What is left of a document, and what is to be written.
Pair = tuple[list[int], list[int]]


def tokenizer_with_sentinels(base: Path) -> PreTrainedTokenizerFast:
    """The quickstart's tokens, the marks of cut spans, and END behind every text."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SENTINELS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}",
        pair=f"$A {END} $B {END}",
        special_tokens=[(END, tokenizer.token_to_id(END))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=SENTINELS,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """2.4 M parameters, one matrix for both embeddings and the head."""
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=48,
            d_ff=512,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    build_in_copying(model)
    return model


@torch.no_grad()
def build_in_copying(model: T5ForConditionalGeneration) -> None:
    """Start with copying in place, so that training refines it and need not discover it.

    As in `make_base.py` (induction, Olsson et al. 2022, arXiv:2209.11895), over two stacks: in the
    encoder's first block half of the heads look at the token before, by their position bias, and
    write it down turned by a rotation S. In the decoder's first block as many heads ask where the
    token before was the one just written, and copy what stands there.

    H model width, K rows of the heads that copy.
    """
    config = model.config
    hidden, kept = config.d_model, config.num_heads // 2
    rows = kept * config.d_kv
    turn_HH, read_KH, copied_KH = (orthonormal(n, hidden) for n in (hidden, rows, rows))
    unit = hidden**0.5  # what a norm gives a vector's length

    looking = model.encoder.block[0].layer[0].SelfAttention
    # Bucket 1 is distance 1 to the left (`T5Attention._relative_position_bucket`).
    looking.relative_attention_bias.weight[1, :kept] = PREVIOUS_LEAD
    looking.q.weight[:rows] *= 0.1
    looking.v.weight[:rows] = read_KH
    looking.o.weight[:, :rows] = NOTED_LENGTH * hidden / rows * turn_HH @ read_KH.T

    asking = model.decoder.block[0].layer[1].EncDecAttention
    strength = (MATCH_SCORE * kept / (unit**2 * rows / hidden)) ** 0.5
    asking.q.weight[:rows] = strength * read_KH
    asking.k.weight[:rows] = strength * read_KH @ turn_HH.T * 2**0.5
    asking.v.weight[:rows] = copied_KH
    asking.o.weight[:, :rows] = COPIED_LENGTH * hidden / rows * copied_KH.T

    # What was built is not to be covered: all else starts quietly.
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            block.layer[-1].DenseReluDense.wo.weight.mul_(0.1)
    for block in model.decoder.block:
        block.layer[0].SelfAttention.o.weight.mul_(0.3)


def cut_spans(row: list[int], marks: list[int], end: int, rng: random.Random) -> Pair:
    """A row with spans replaced by marks, and the spans behind their marks; both end in `end`."""
    cut = max(1, round(len(row) * CUT_SHARE))
    spans = max(1, min(round(cut / SPAN_TOKENS), cut, len(row) - cut, len(marks) - 1))
    source: list[int] = []
    target: list[int] = []
    place = 0
    parts = zip(pieces(len(row) - cut, spans, rng), pieces(cut, spans, rng), marks, strict=False)
    for left, taken, mark in parts:
        source += [*row[place : place + left], mark]
        target += [mark, *row[place + left : place + left + taken]]
        place += left + taken
    return [*source, end], [*target, marks[spans], end]


def pieces(total: int, count: int, rng: random.Random) -> list[int]:
    """`count` whole numbers from 1 that sum to `total`."""
    cuts = sorted(rng.sample(range(1, total), count - 1))
    return [b - a for a, b in itertools.pairwise([0, *cuts, total])]


def batch_of(pairs: list[Pair]) -> Batch:
    """Padded to few shapes: oneDNN compiles a bfloat16 product anew for each."""
    sources, targets = zip(*pairs, strict=True)
    ids_BT = padded(sources, 0)
    # The padding token has the id 0, and no text holds it.
    labels_BT = padded(targets, IGNORED)
    return {"input_ids": ids_BT, "attention_mask": (ids_BT != 0).long(), "labels": labels_BT}


def padded(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    """int64 [B, T], T a multiple of `ALIGN`."""
    width = -(-max(map(len, rows)) // ALIGN) * ALIGN
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def drill(marks: list[int], end: int, words: int, rng: random.Random) -> Pair:
    """Random tokens, and some of them again, of which the last ones are to be written: copying of
    any token, which the documents alone would narrow to the words that they repeat."""
    row = [rng.randrange(words // 8, words) for _ in range(rng.randint(8, 32))]
    start = rng.randrange(len(row) - 6)
    length = rng.randint(4, min(12, len(row) - start))
    known = rng.randint(1, length - 2)
    again = row[start : start + length]
    return [*row, *again[:known], marks[0], end], [marks[0], *again[known:], marks[1], end]


def training_batches(tokenizer: PreTrainedTokenizerFast, split: str, seed: int) -> Iterator[Batch]:
    """Batches of rows of like length, without end; every document is drawn afresh."""
    rng = random.Random(seed)
    marks, end = tokenizer.convert_tokens_to_ids(SENTINELS), tokenizer.eos_token_id
    texts = (text.removesuffix(END) for text in documents(split, seed))
    while True:
        encoded = tokenizer(list(itertools.islice(texts, 1000)), add_special_tokens=False)
        rows = [row[:LONGEST] for row in encoded["input_ids"] if len(row) >= 8]
        pairs = [cut_spans(row, marks, end, rng) for row in rows]
        pairs.sort(key=lambda pair: len(pair[0]))
        batches = [pairs[start : start + ROWS] for start in range(0, len(pairs) - ROWS + 1, ROWS)]
        for _ in range(round(DRILL_SHARE * len(batches))):
            batches.append([drill(marks, end, len(tokenizer), rng) for _ in range(ROWS)])
        rng.shuffle(batches)
        yield from map(batch_of, batches)


def optimizer_of(model: T5ForConditionalGeneration, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW of rates that are a share of each weight's own size at the start, as T5's own
    Adafactor has them: T5's weights start from sizes far apart."""
    groups = [
        {"params": [weight], "lr": learning_rate * float(weight.detach().square().mean().sqrt())}
        for weight in model.parameters()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def build(out: Path, steps: int, seed: int, learning_rate: float) -> None:
    """Write the whole base to `out`; other files there, such as its README, stay."""
    torch.manual_seed(seed)
    tokenizer = tokenizer_with_sentinels(HERE / "base")
    model = new_model(tokenizer)
    heldout = list(itertools.islice(training_batches(tokenizer, "heldout", seed), 12))
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary")
    batches = training_batches(tokenizer, "pretrain", seed)
    pretrain(model, optimizer_of(model, learning_rate), batches, {"spans": heldout}, steps)
    model.to(torch.bfloat16)
    print(f"held out: loss {mean_loss(model, heldout):.4f} (weights in bf16)")
    save(model, tokenizer, out)
    write_retention(
        out.parent / "t5-retention.jsonl", tokenizer_with_sentinels(HERE / "base"), seed
    )


def write_retention(place: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """What the base can do and the task does not ask for: documents of their own with spans cut
    out, as rows of the recipe."""
    rng = random.Random(seed)
    marks, end = tokenizer.convert_tokens_to_ids(SENTINELS), tokenizer.eos_token_id
    texts = (text.removesuffix(END) for text in documents("retention", seed))
    with place.open("w", encoding="utf-8") as file:
        for text in itertools.islice(texts, RETENTION_ROWS):
            row = tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST]
            source, target = (
                tokenizer.decode(part[:-1]) for part in cut_spans(row, marks, end, rng)
            )
            file.write(
                json.dumps({"prompt": source, "completion": target}, ensure_ascii=False) + "\n"
            )


if __name__ == "__main__":
    command(__doc__, build, HERE / "t5-base", steps=1500, learning_rate=3e-2)
