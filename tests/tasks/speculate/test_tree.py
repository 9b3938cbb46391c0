"""Trees of drafts, against slow references and against themselves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tasks.speculate.decode import Writer
from tasks.speculate.draft import Drafter
from tasks.speculate.heads import HeadsConfig, TurboHeads
from tasks.speculate.lookup import Lookup, graft
from tasks.speculate.tree import Tree, root_alone

D, V, K = 12, 7, 3


class Fixture:
    """Heads, an lm_head and embeddings drawn at random, in double precision: exact to compare."""

    def __init__(self, state: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.heads = TurboHeads(HeadsConfig(K, 4, state, D, V)).double()
        for parameter in self.heads.parameters():
            parameter.data = torch.randn_like(parameter) * 0.5
        self.heads.requires_grad_(False)
        self.scored_VD = torch.randn(V, D).double()
        self.embedding_VD = torch.randn(V, D).double()
        self.x_BD = torch.randn(3, D).double()
        self.root_B = torch.tensor([1, 5, 1])

    def draft(self, nodes: int, depth: int | None = None) -> Tree:
        drafter = Drafter(
            self.heads,
            lambda x: x @ self.scored_VD.T,
            self.scored_VD,
            lambda ids: self.embedding_VD[ids],
        )
        return drafter.tree(self.x_BD, self.root_B, nodes, depth)

    def chance(self, row: int, path: tuple[int, ...]) -> float:
        """Of a path behind the root, straight from the formula in heads.py."""
        heads, x_D = self.heads, self.x_BD[row]
        total, before = 0.0, int(self.root_B[row])
        state_S = None
        for k, token in enumerate(path):
            low_R = heads.down_KRD[k] @ x_D
            head_D = x_D + torch.nn.functional.silu(heads.up_KDR[k] @ low_R + heads.bias_KD[k])
            if heads.config.state:
                sum_S = heads.state_token_SD @ self.embedding_VD[before]
                sum_S = sum_S + heads.state_hidden_SD @ x_D
                if state_S is not None:
                    sum_S = sum_S + heads.state_SS @ state_S
                state_S = torch.nn.functional.silu(sum_S)
                head_D = head_D + heads.out_DS @ state_S
            total += float((self.scored_VD @ head_D).log_softmax(-1)[token])
            before = token
        return float(torch.tensor(total).exp())


def paths_of(tree: Tree, row: int) -> dict[tuple[int, ...], float]:
    """Each node as the tokens from behind the root to it, and its chance."""
    tokens, parents = tree.tokens_BN[row].tolist(), tree.parents_BN[row].tolist()
    found: dict[tuple[int, ...], float] = {}
    path: list[tuple[int, ...]] = []
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        path.append(() if node == 0 else (*path[parent], token))
        found[path[-1]] = float(tree.chance_BN[row, node])
    return found


@pytest.mark.parametrize("state", [0, 5])
def test_the_likeliest_of_all_paths(state: int) -> None:
    """All 7 + 49 + 343 paths by the formula. Of a vocabulary of 7 every token is a candidate, and
    the ten best of a level hold the twelve best of all levels together with their parents."""
    made = Fixture(state)
    tree = made.draft(12)
    for row in range(3):
        every = {
            path: made.chance(row, path)
            for depth in range(K + 1)
            for path in itertools.product(range(V), repeat=depth)
        }
        best = sorted(every, key=every.__getitem__, reverse=True)[:12]
        found = paths_of(tree, row)
        assert set(found) == set(best)
        for path, chance in found.items():
            # The state's part is float32 in the draft.
            assert chance == pytest.approx(every[path], rel=1e-5)


@pytest.mark.parametrize("state", [0, 5])
def test_closed_and_falling(state: int) -> None:
    """Parents come before their children, no child is likelier, and depths count the way up."""
    tree = Fixture(state).draft(28)
    nodes = torch.arange(1, 28)
    assert (tree.parents_BN[:, 1:] < nodes).all()
    assert (tree.chance_BN.diff(dim=1) <= 0).all()
    above = tree.depth_BN.gather(1, tree.parents_BN)
    assert (tree.depth_BN[:, 1:] == above[:, 1:] + 1).all()
    assert (tree.depth_BN <= tree.levels).all()
    for row in range(3):
        assert len(paths_of(tree, row)) == 28


@pytest.mark.parametrize("state", [0, 5])
@pytest.mark.parametrize("nodes", [1, 2, 8, 16])
def test_the_first_are_a_tree_of_so_many(state: int, nodes: int) -> None:
    made = Fixture(state)
    some, all_ = made.draft(nodes), made.draft(28).first(nodes)
    for name in ("tokens_BN", "parents_BN", "depth_BN"):
        assert torch.equal(getattr(some, name), getattr(all_, name))
    # Products over other numbers of paths, in float32.
    torch.testing.assert_close(some.chance_BN, all_.chance_BN, rtol=1e-5, atol=0)
    assert torch.equal(some.ancestors(), all_.ancestors())


def test_depth_is_a_limit() -> None:
    assert int(Fixture(5).draft(28, depth=1).depth_BN.max()) == 1


def test_equal_chances_stay_in_order() -> None:
    """With weights of zero all tokens are as likely: a child ties with nothing above it, but its
    parent still comes first."""
    made = Fixture(5)
    made.scored_VD = torch.zeros_like(made.scored_VD)
    tree = made.draft(28)
    assert (tree.parents_BN[:, 1:] < torch.arange(1, 28)).all()


def test_ancestors() -> None:
    parents = [0, 0, 0, 2, 1, 3]
    tree = Tree(
        torch.tensor([[9, 1, 2, 3, 4, 5]]),
        torch.tensor([parents]),
        torch.tensor([[0, 1, 1, 2, 2, 3]]),
        torch.ones(1, 6),
        3,
    )
    for node in range(6):
        above = {node}
        while node:
            node = parents[node]
            above.add(node)
        at = max(above)
        assert set(tree.ancestors()[0, at].nonzero().flatten().tolist()) == above


def test_heads_begin_as_the_models_own_guess(small: Any) -> None:
    """Untrained, each head gives what the lm_head gives."""
    parts = small.parts
    config = HeadsConfig(4, 8, 8, parts.scored.shape[1], parts.scored.shape[0])
    heads = TurboHeads(config)
    x_ND = torch.randn(5, config.hidden_size)
    assert torch.equal(heads.ahead(x_ND), x_ND.expand(4, -1, -1))
    state = heads.follow(None, heads.read(torch.randn(5, config.hidden_size)), heads.begin(x_ND))
    assert state.abs().max() > 0
    assert not heads.correction(state).any()


@pytest.mark.parametrize("state", [0, 6])
@pytest.mark.parametrize("rank", [0, 5])
def test_parameters_are_counted(state: int, rank: int, tmp_path: Any) -> None:
    """The formula against what the file holds."""
    from safetensors.torch import load_file

    heads = TurboHeads(HeadsConfig(3, rank, state, 16, 50))
    heads.save(tmp_path)
    stored = load_file(tmp_path / "turbo_heads.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == heads.config.parameters
    loaded = TurboHeads.load(tmp_path)
    assert loaded.config == heads.config
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_pass_over_a_tree_is_each_path_alone(speaker: Any) -> None:
    """With other rows beside it, of other lengths. In float32, sums in another order: 3e-6 was
    measured on the widest of these models; hidden states are about 1 in size."""
    prompts = speaker.prompts[:3]
    roots = torch.tensor([4, 5, 6])
    parts = speaker.parts
    drafter = Drafter(speaker.heads, parts.lm_head, parts.scored, parts.embed)
    made = drafter.tree(torch.randn(3, parts.scored.shape[1]), roots, 16)
    writer = Writer(speaker.parts)
    x_BND = writer.read_tree(prompts, made)
    assert int(made.depth_BN.max()) > 1
    for row, prompt in enumerate(prompts):
        for node in range(16):
            path = made.ancestors()[row, node].nonzero().flatten()
            ids = torch.tensor([[*prompt, *made.tokens_BN[row, path].tolist()]])
            with torch.no_grad():
                alone_D = speaker.parts.layers(input_ids=ids, use_cache=False)[0][0, -1]
            apart = (x_BND[row, node] - alone_D).abs().max() / alone_D.abs().max()
            assert apart < 2e-5


def test_grafting_a_chain() -> None:
    """What the heads drafted too is there once, and no node is likelier than its parent."""
    made = Fixture(5)
    tree = made.draft(8)
    here = max((path for path in paths_of(tree, 0) if path), key=len)
    chains = [[*here, 3, 2], [], [6, 6, 6]]
    both = graft(tree, chains, 0.8)
    for row, chain in enumerate(chains):
        found, old = paths_of(both, row), paths_of(tree, row)
        if row == 0:
            assert set(found) >= set(old) | {tuple(chain[:n]) for n in range(1, len(chain) + 1)}
        for path, chance in old.items():
            assert found[path] >= chance * (1 - 1e-6)
        for path, chance in found.items():
            if path:
                assert chance <= found[path[:-1]] * (1 + 1e-6)
    assert (both.parents_BN[:, 1:] < torch.arange(1, both.tokens_BN.shape[1])).all()
    assert graft(tree, [[], [], []], 0.8) is tree
    alone = graft(root_alone(torch.tensor([1])), [[4, 4]], 0.5)
    assert paths_of(alone, 0) == {(): 1.0, (4,): 0.5, (4, 4): 0.25}


def test_lookup_is_a_search_from_behind() -> None:
    """Against the plain search, token by token."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (300,), generator=generator).tolist()
    lookup = Lookup(tokens[:2])
    for end in range(2, 300):
        lookup.extend([tokens[end]])
        text, expected = tokens[: end + 1], []
        for count in (3, 2):
            earlier = [
                at
                for at in range(count, len(text))
                if text[at - count : at] == text[len(text) - count :]
            ]
            if earlier:
                expected = text[earlier[-1] : earlier[-1] + 8]
                break
        assert lookup.continuation() == expected
