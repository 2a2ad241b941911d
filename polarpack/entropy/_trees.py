"""Counts that adapt: the trees of ``_block_kernels.encode_adaptive`` laid out for a block."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Int = npt.NDArray[np.int64]
Symbols = npt.NDArray[Any]  # (n, n_fields), uint8 or uint16

MAX_CONTEXT_BITS = 4  # leading bits of the context symbol that count


def n_contexts(alphabet_size: int) -> int:
    """Number of contexts that a symbol of this alphabet makes."""
    return (alphabet_size - 1 >> context_shift(alphabet_size)) + 1


def context_shift(alphabet_size: int) -> int:
    """Low bits of a context symbol that do not count."""
    return max(0, (alphabet_size - 1).bit_length() - MAX_CONTEXT_BITS)


def levels_of(k: int) -> list[tuple[int, int]]:
    """Levels of the tree over k symbols, from the root: (bits known above it, bits it decides). The
    root decides 1 to 4 bits, every other level 4."""
    n_bits = max(1, (k - 1).bit_length())
    root = (n_bits - 1) % 4 + 1
    return [(0, root), *((known, 4) for known in range(root, n_bits, 4))]


def initial_tree(k: int) -> npt.NDArray[np.uint64]:
    """Words of a tree over k symbols: INITIAL for each branch that leads to one, none elsewhere.
    (No symbol passes a node that leads to none; its total is kept above zero all the same.)"""
    from . import _block_kernels as kernels

    n_bits = max(1, (k - 1).bit_length())
    branch = np.arange(kernels.BRANCHES)
    nodes = []
    for known, width in levels_of(k):
        lowest = (np.arange(1 << known)[:, None] << width | branch) << n_bits - known - width
        possible = (branch < 1 << width) & (lowest < k)
        possible[:, 0] = True
        below = np.zeros((1 << known, 4 * kernels.NODE_WORDS), np.uint64)
        below[:, 1 : kernels.BRANCHES + 1] = np.cumsum(possible * kernels.INITIAL, axis=1)
        nodes.append(below)
    lanes = np.concatenate(nodes).reshape(-1, 4)
    shifts = (16 * np.arange(4)).astype(np.uint64)
    return np.asarray((lanes << shifts).sum(axis=1, dtype=np.uint64))


class Trees:
    """One tree, or one for each context, per group of fields, and the coding of blocks with them.

    alphabet_sizes: (n_fields,). context_of: (n_fields,) an earlier field or -1. pooled: fields of
    equal alphabet size and number of contexts are one group; else each field is its own.
    """

    def __init__(self, alphabet_sizes: Int, context_of: Int, *, pooled: bool) -> None:
        seen = np.where(context_of >= 0, alphabet_sizes[context_of], 1)  # one context if none
        different = np.unique(np.concatenate([alphabet_sizes, seen])).tolist()
        shifts = {k: context_shift(k) for k in different}
        trees = {k: n_contexts(k) for k in different}
        nodes = {k: sum(1 << known for known, _ in levels_of(k)) for k in different}
        sizes, seen_sizes = alphabet_sizes.tolist(), seen.tolist()
        self.context_of = context_of
        self._n_bits = np.array([max(1, (k - 1).bit_length()) for k in sizes], np.int64)
        self._n_nodes = np.array([nodes[k] for k in sizes], np.int64)
        self._shift = np.array([shifts[k] for k in seen_sizes], np.int64)
        self._n_trees = np.array([trees[k] for k in seen_sizes], np.int64)
        first = group = np.arange(len(sizes))
        if pooled:
            key = alphabet_sizes * (2 << MAX_CONTEXT_BITS) + self._n_trees
            _, first, group = np.unique(key, return_index=True, return_inverse=True)
        self._group = group
        self._group_trees = [(sizes[i], int(self._n_trees[i])) for i in first]
        self._group_nodes = (self._n_trees * self._n_nodes)[first]
        self.n_nodes = int(self._group_nodes.sum())

    @cached_property
    def _layout(self) -> tuple[Int, Int, Int, Int, Int, Int]:
        """What the kernels want to know of each field."""
        from . import _block_kernels as kernels

        ends = np.cumsum(self._group_nodes)
        start = np.asarray((ends - self._group_nodes)[self._group] * kernels.NODE_WORDS)
        return self._n_bits, start, self._n_nodes, self.context_of, self._shift, self._n_trees

    @cached_property
    def _initial(self) -> npt.NDArray[np.uint64]:
        """All trees before the first symbol."""
        tree = {k: initial_tree(k) for k, _ in set(self._group_trees)}
        return np.concatenate([np.tile(tree[k], n_trees) for k, n_trees in self._group_trees])

    def encode(self, symbols: Symbols) -> bytes:
        """One checked block -> bytes, one message."""
        from . import _block_kernels as kernels
        from . import range_coder as rc

        n_branches = len(symbols) * int((self._n_bits + 3 >> 2).sum())
        words = np.empty(rc.capacity(n_branches // 2 + 1), np.uint32)  # each is below 16 bits
        length = kernels.encode_adaptive(symbols, *self._layout, self._initial.copy(), words)
        return rc.words_to_bytes(words, length)

    def decode(self, data: bytes | memoryview, symbols: Symbols) -> None:
        """Inverse of ``encode``, into ``symbols``."""
        from . import _block_kernels as kernels
        from . import range_coder as rc

        words = rc.words_from_bytes(data)
        kernels.decode_adaptive(words, *self._layout, self._initial.copy(), symbols)

    def rate_bits(self, symbols: Symbols) -> float:
        """Ideal length of ``encode(symbols)``."""
        from . import _block_kernels as kernels

        return float(kernels.adaptive_bits(symbols, *self._layout, self._initial.copy()))
