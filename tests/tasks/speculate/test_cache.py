"""Keys and values moved together in place, against a pass that never had the others."""

from __future__ import annotations

from typing import Any

import torch

from tasks.speculate.cache import SlotCache
from tasks.speculate.decode import Row, Writer
from tasks.speculate.tree import Tree, root_alone


def chain_and_branch(tokens: list[list[int]]) -> Tree:
    """A root, two children, and behind the second a child and its child."""
    rows = len(tokens)
    return Tree(
        torch.tensor(tokens),
        torch.tensor([[0, 0, 0, 2, 3]] * rows),
        torch.tensor([[0, 1, 1, 2, 3]] * rows),
        torch.ones(rows, 5),
        3,
    )


def test_accepted_drafts_are_as_if_written_one_by_one(speaker: Any) -> None:
    """The next token's x behind compacted keys and values equals that of a fresh pass over the
    text. Rounding in float32 of sums in another order; hidden states are about 1 in size."""
    prompts = speaker.prompts[:3]
    tokens = [[4, 9, 8, 7, 6], [5, 3, 2, 1, 4], [6, 5, 4, 3, 2]]
    paths = [[0, 2, 3, 4], [0, 1], [0]]
    tree = chain_and_branch(tokens)
    writer = Writer(speaker.parts)
    with torch.inference_mode():
        rows = [Row(at, len(prompt), 9) for at, prompt in enumerate(prompts)]
        cache = writer._cache(rows)
        writer._read(cache, prompts)
        lengths = [row.length for row in rows]
        writer._verify(cache, lengths, tree, tree.ancestors())
        cache.accept(lengths, paths)
        after = [length + len(path) for length, path in zip(lengths, paths, strict=True)]
        next_ = root_alone(torch.tensor([11, 12, 13]))
        x_B1D = writer._verify(cache, after, next_, next_.ancestors())
        for row, prompt in enumerate(prompts):
            text = [*prompt, *(tokens[row][node] for node in paths[row]), 11 + row]
            alone_D = speaker.parts.layers(input_ids=torch.tensor([text]), use_cache=False)[0][
                0, -1
            ]
            apart = (x_B1D[row, 0] - alone_D).abs().max() / alone_D.abs().max()
            assert apart < 2e-5


def filled(rows: int) -> SlotCache:
    """Every slot holds its own place in the whole."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=2, hidden_size=12, num_attention_heads=3, num_key_value_heads=3
    )
    cache = SlotCache(config, rows, 20, torch.float32, "cpu")
    cache.kv.copy_(torch.arange(cache.kv.numel()).view(cache.kv.shape))
    return cache


def test_one_move_for_all_rows() -> None:
    """Against moving token by token, from a copy."""
    cache = filled(4)
    before = cache.kv.clone()
    lengths, paths = [3, 7, 0, 9], [[0, 2, 5], [0, 1, 2], [0], [0, 4, 6, 7]]
    cache.accept(lengths, paths)
    expected = before.clone()
    for row, (length, path) in enumerate(zip(lengths, paths, strict=True)):
        for new, old in enumerate(path):
            expected[:, :, row, :, length + new] = before[:, :, row, :, length + old]
    assert torch.equal(cache.kv, expected)


def test_rows_leave_and_the_last_take_their_places() -> None:
    cache = filled(6)
    before = cache.kv.clone()
    cache.place([5, 2, 9, 9, 3, 4], 2)
    order = cache.keep([1, 3, 5])
    assert sorted(order) == [1, 3, 5]
    # Only what had to move did: row 1 stays.
    assert order[1] == 1
    assert torch.equal(cache.kv[..., : cache.width, :], before[:, :, order][..., : cache.width, :])
    # And moves of drafts still reach the rows that are left.
    cache.accept([4, 4, 4], [[0, 2], [0], [0, 3]])
    assert torch.equal(cache.kv[:, :, 0, :, 5], before[:, :, order[0], :, 6])
    assert torch.equal(cache.kv[:, :, 2, :, 5], before[:, :, order[2], :, 7])
