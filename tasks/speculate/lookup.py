"""Drafts for nothing: where a text repeats itself, what stood there the last time.

After prompt lookup decoding (Saxena 2023): the last tokens are looked for earlier in the row, and
what followed them joins the tree as one more branch.
"""

from __future__ import annotations

import torch

from .tree import Tree

#: Tokens that must be alike, the longer first.
ALIKE = (3, 2)
#: Tokens that are copied at most.
COPIED = 8


class Lookup:
    """One row's text, and where each of its pairs and triples of tokens ended last.

    The text is looked through when a continuation is asked for: where no drafts are made, it costs
    nothing.
    """

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.ended: dict[tuple[int, ...], int] = {}
        #: Pairs and triples that end before here are known.
        self.known = 0

    def extend(self, tokens: list[int]) -> None:
        self.tokens += tokens

    def continuation(self) -> list[int]:
        """What followed the last tokens when they stood here before; often nothing."""
        # Those that end at the last token are known only when something follows them.
        for end in range(self.known, len(self.tokens)):
            for count in ALIKE:
                if end >= count:
                    self.ended[tuple(self.tokens[end - count : end])] = end
        self.known = len(self.tokens)
        for count in ALIKE:
            found = self.ended.get(tuple(self.tokens[-count:]))
            if found is not None and len(self.tokens) > count:
                return self.tokens[found : found + COPIED]
        return []


def graft(tree: Tree, chains: list[list[int]], chance: float) -> Tree:
    """The tree with each row's chain behind its root, nodes that are in both once.

    chance: that a copied token is right where the one before it was.
    """
    if not any(chains):
        return tree
    tokens, parents, depths, chances = (
        part.tolist() for part in (tree.tokens_BN, tree.parents_BN, tree.depth_BN, tree.chance_BN)
    )
    for row, chain in enumerate(chains):
        mine = tokens[row], parents[row], depths[row], chances[row]
        _join(*mine, chain, chance)
    widest = max(map(len, tokens))
    for row in range(len(tokens)):
        missing = widest - len(tokens[row])
        # Fill: likelier than nothing, and never accepted twice, as it repeats the root's token
        # behind a chance of 0.
        tokens[row] += tokens[row][:1] * missing
        parents[row] += [0] * missing
        depths[row] += [1] * missing
        chances[row] += [0.0] * missing
        order = sorted(range(widest), key=chances[row].__getitem__, reverse=True)
        place = {node: at for at, node in enumerate(order)}
        tokens[row] = [tokens[row][node] for node in order]
        parents[row] = [place[parents[row][node]] for node in order]
        depths[row] = [depths[row][node] for node in order]
        chances[row] = [chances[row][node] for node in order]
    device = tree.tokens_BN.device
    tokens_BN, parents_BN, depth_BN, chance_BN = (
        torch.tensor(part, device=device) for part in (tokens, parents, depths, chances)
    )
    levels = max(tree.levels, *map(len, chains))
    return Tree(tokens_BN, parents_BN, depth_BN, chance_BN, levels)


def _join(
    tokens: list[int],
    parents: list[int],
    depths: list[int],
    chances: list[float],
    chain: list[int],
    chance: float,
) -> None:
    """Put a chain into one row's lists. A node that the heads drafted too has the better chance
    of both; a copied one never a better one than its parent."""
    nodes = {(parents[node], tokens[node]): node for node in range(1, len(tokens))}
    at = 0
    for token in chain:
        likely = chances[at] * chance
        found = nodes.get((at, token))
        if found is None:
            found = len(tokens)
            tokens.append(token)
            parents.append(at)
            depths.append(depths[at] + 1)
            chances.append(likely)
        else:
            chances[found] = max(chances[found], likely)
        at = found
