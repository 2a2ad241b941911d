"""A small real embedding table shipped with the package: 8000 GloVe word vectors.

Source and licence (public domain, PDDL) stand in ``SOURCE.txt`` beside this file.
"""

from __future__ import annotations

from importlib import resources

import numpy as np
import numpy.typing as npt


def load() -> tuple[list[str], npt.NDArray[np.float32]]:
    """The words, most frequent first, and their vectors, one row a word.

    Returns a list of 8000 strings and a (8000, 50) float32 array. Reads 0.9 MB.
    Source: Pennington, Socher, Manning, "GloVe: Global Vectors for Word Representation", EMNLP
    2014.

    >>> words, vectors = load()
    >>> words[:3], vectors.shape
    (['the', 'of', 'to'], (8000, 50))
    """
    folder = resources.files(__name__)
    words = folder.joinpath("words.txt").read_text("utf-8").split()
    with folder.joinpath("vectors.npy").open("rb") as file:
        vectors = np.load(file, allow_pickle=False)
    return words, vectors.astype(np.float32)
