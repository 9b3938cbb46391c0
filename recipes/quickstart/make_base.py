"""Pretrain the small Llama that the quickstart adapts, so that it needs no network.

    python recipes/quickstart/make_base.py --out recipes/quickstart/base --steps 3000

Text from `corpus.py` -> a byte-level BPE tokenizer -> rows of documents, each drawn once ->
bf16 safetensors. The same seed, versions, processor and number of threads give the same bytes.
Six million tokens take a quarter of an hour on one idle core.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import ASSISTANT, BOS, END, PAD, USER, documents
from pretraining import IGNORED, Batch, command, mean_loss, pretrain, save
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
TOKENIZER_DOCUMENTS = 20_000
CONTEXT = 512
BATCH_TOKENS = 2048
STEP_SHARES = {"drills": 0.1, "single documents": 0.65, "packed": 0.25}

# What `build_in_copying` starts from; lengths are relative to an embedding's own length, 1.
SHARED_LENGTH = 0.5
NOTED_LENGTH = 2.0  # of the token before, as layer 0 writes it down
COPIED_LENGTH = 8.0  # of the token that layer 1 copies
PREVIOUS_LEAD = 10.0  # attention logits by which the token before leads its neighbours
MATCH_SCORE = 20.0  # attention logit of a match
FAST = 5  # frequencies that tell neighbours apart
RANDOM_SHARE = 0.3  # of the usual random weights, left in queries and keys

SPECIAL_TOKENS = (PAD, BOS, END, USER, ASSISTANT)

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
            special_tokens=list(SPECIAL_TOKENS),
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
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def drills(rng: torch.Generator) -> Batch:
    """Random tokens, each row's own sequence twice, with or without a gap; only the second counts.

    They keep copying general, of any token, where the documents alone would narrow it to the words
    that they repeat.
    """
    rows, longest, widest_gap = 80, 10, 6
    width = 2 * longest + widest_gap
    ids_BT = torch.randint(len(SPECIAL_TOKENS), VOCABULARY, (rows, width), generator=rng)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    for ids_T, labels_T in zip(ids_BT, labels_BT, strict=True):
        length = int(torch.randint(3, longest + 1, (), generator=rng))
        again = length + int(torch.randint(0, widest_gap + 1, (), generator=rng))
        ids_T[again : again + length] = ids_T[:length].clone()
        # The first repeated token cannot be foreseen.
        labels_T[again + 1 : again + length] = ids_T[1:length]
    return {"input_ids": ids_BT, "labels": labels_BT}


def encoded(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> Iterator[list[list[int]]]:
    """The tokens `BOS … END` of the next thousand documents, and the next."""
    while True:
        batch = [text.removesuffix(END) + END for text in itertools.islice(texts, 1000)]
        yield tokenizer(batch)["input_ids"]


def single_documents(
    documents_ids: Iterator[list[list[int]]], rng: random.Random
) -> Iterator[Batch]:
    """One document a row, rows of like length together: nothing to attend to but the document."""
    for ids in documents_ids:
        ids.sort(key=len)
        batches, rows = [], []
        for row in ids:
            if (len(rows) + 1) * len(row) > BATCH_TOKENS:
                batches.append(rows)
                rows = []
            rows.append(row)
        batches.append(rows)
        rng.shuffle(batches)
        for rows in batches:
            ids_BT = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            # The padding token has the id 0 and lies behind the text, where nothing sees it.
            labels_BT = ids_BT.masked_fill(ids_BT == 0, IGNORED)
            yield {"input_ids": ids_BT, "labels": labels_BT}


def packed(documents_ids: Iterator[list[list[int]]]) -> Iterator[Batch]:
    """Documents end to end, in rows of CONTEXT tokens."""
    tokens: list[int] = []
    for ids in documents_ids:
        tokens.extend(itertools.chain.from_iterable(ids))
        while len(tokens) >= BATCH_TOKENS:
            ids_BT = torch.tensor(tokens[:BATCH_TOKENS]).view(-1, CONTEXT)
            tokens = tokens[BATCH_TOKENS:]
            yield {"input_ids": ids_BT, "labels": ids_BT}


def training_batches(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches of the three kinds, shuffled together; every document is drawn afresh."""
    rng = random.Random(seed)
    drill_rng = torch.Generator().manual_seed(seed)
    documents_ids = encoded(tokenizer, documents("pretrain", seed))
    singles, rows = single_documents(documents_ids, rng), packed(documents_ids)
    for kind in rng.choices(list(STEP_SHARES), list(STEP_SHARES.values()), k=steps):
        if kind == "drills":
            yield drills(drill_rng)
        else:
            yield next(singles if kind == "single documents" else rows)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """3.7 M parameters; embeddings tied, two query heads to a key-value head."""
    hidden = 256
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=768,
            max_position_embeddings=CONTEXT,
            # High, so that half of a head's frequencies hardly turn within the context.
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            # Embeddings of length 1; the usual 0.02 is meant for wider models.
            initializer_range=hidden**-0.5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    build_in_copying(model)
    return model


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    """`rows` random directions of length 1 in `columns` dimensions, square to each other."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].T.contiguous()


@torch.no_grad()
def build_in_copying(model: LlamaForCausalLM) -> None:
    """Start with an induction head in place, so that training refines copying, not discovers it.

    Induction (Olsson et al. 2022, arXiv:2209.11895) goes on from `… a b … a` with `b`. From random
    weights a model of this size finds it only after several million tokens. Built in, it copies
    random tokens before the first step, and a run of minutes is enough. Two layers make it:

    Layer 0 looks at the token before. Queries and keys see only the direction u that all embeddings
    share, and the key is the query turned by one position: under RoPE the score at distance d is
    sum_f cos(theta_f (d - 1)), highest at d = 1. The token found is written down turned by a
    rotation S, apart from the token's own embedding.

    Layer 1 matches a token against the tokens before the others: the query reads an embedding, the
    key reads what layer 0 wrote, through S^T, both in slow frequencies only, where distance does
    not count. What followed the same token is copied to the output.

    H hidden width, D head width, F frequencies, Q all query heads' rows, K all key heads' rows.
    """
    config = model.config
    hidden, head = config.hidden_size, config.head_dim
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    group = heads // key_heads
    first, second, *rest = model.model.layers

    def for_queries(weight_KH: torch.Tensor) -> torch.Tensor:
        """The rows of each key head, once for each query head that shares it."""
        return weight_KH.view(key_heads, head, hidden).repeat_interleave(group, 0).flatten(0, 1)

    def mix(linear: torch.nn.Linear, weight: torch.Tensor) -> None:
        linear.weight.mul_(RANDOM_SHARE).add_(weight)

    shared_H = torch.nn.functional.normalize(torch.randn(hidden), dim=0)
    embeddings_VH = model.model.embed_tokens.weight
    embeddings_VH -= torch.outer(embeddings_VH @ shared_H, shared_H)
    embeddings_VH += SHARED_LENGTH * shared_H

    # RMSNorm gives a vector the length sqrt(hidden): this much of it falls to each unit of length.
    unit = math.sqrt(hidden / (1 + SHARED_LENGTH**2))
    half = head // 2
    theta_F = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)

    fast_F = theta_F[:FAST]
    query_D, key_D = torch.zeros(head), torch.zeros(head)
    query_D[:FAST] = 1.0
    key_D[:FAST], key_D[half : half + FAST] = fast_F.cos(), fast_F.sin()
    lead = (1 - fast_F.cos()).sum().item()  # of distance 1 over distances 0 and 2
    strength = math.sqrt(PREVIOUS_LEAD * math.sqrt(head) / lead) / (unit * SHARED_LENGTH)
    mix(first.self_attn.q_proj, strength * torch.outer(query_D.repeat(heads), shared_H))
    mix(first.self_attn.k_proj, strength * torch.outer(key_D.repeat(key_heads), shared_H))

    copied_KH = orthonormal(key_heads * head, hidden)
    turn_HH = orthonormal(hidden, hidden)
    first.self_attn.v_proj.weight.copy_(copied_KH * NOTED_LENGTH / unit)
    first.self_attn.o_proj.weight.copy_(turn_HH @ for_queries(copied_KH).T / group)

    # Half of an embedding's square lies in the copied directions, as these are half of all.
    unit = math.sqrt(hidden / (1 + SHARED_LENGTH**2 + NOTED_LENGTH**2 / 2))
    slow = half - FAST
    read = torch.zeros(key_heads, head, hidden)
    rows = orthonormal(key_heads * 2 * slow, key_heads * head) @ copied_KH
    read[:, FAST:half], read[:, half + FAST :] = rows.view(key_heads, 2, slow, hidden).unbind(1)
    read_KH = read.flatten(0, 1)
    strength = math.sqrt(
        MATCH_SCORE * math.sqrt(head) / (unit**2 * NOTED_LENGTH * 2 * slow / hidden)
    )
    mix(second.self_attn.q_proj, strength * for_queries(read_KH))
    mix(second.self_attn.k_proj, strength * read_KH @ turn_HH.T)

    output_KH = orthonormal(key_heads * head, hidden)
    second.self_attn.v_proj.weight.copy_(output_KH * COPIED_LENGTH / unit)
    second.self_attn.o_proj.weight.copy_(for_queries(output_KH).T / group)

    # Everything else starts almost silent, so as not to cover what was built.
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.1)
    for layer in rest:
        layer.self_attn.o_proj.weight.mul_(0.1)


def optimizer_of(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW, whose decay is of the matrices alone."""
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    kept = [weight for weight in model.parameters() if weight.ndim == 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def build(out: Path, steps: int, seed: int, learning_rate: float) -> None:
    """Write the whole base to `out`; other files there, such as its README, stay."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(itertools.islice(documents("pretrain", seed), TOKENIZER_DOCUMENTS))
    model = new_model(tokenizer)
    unseen = encoded(tokenizer, documents("heldout", seed))
    heldout = {
        "documents": list(itertools.islice(single_documents(unseen, random.Random(seed)), 8)),
        "packed": list(itertools.islice(packed(unseen), 8)),
        "drills": [drills(torch.Generator().manual_seed(seed + 1))],
    }
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary")

    batches = training_batches(tokenizer, steps, seed)
    pretrain(model, optimizer_of(model, learning_rate), batches, heldout, steps)

    model.to(torch.bfloat16)
    loss = mean_loss(model, heldout["packed"])
    print(f"held out, packed: loss {loss:.4f}, perplexity {math.exp(loss):.3f} (weights in bf16)")
    save(model, tokenizer, out)


if __name__ == "__main__":
    command(__doc__, build, Path(__file__).parent / "base", steps=3000, learning_rate=2e-3)
