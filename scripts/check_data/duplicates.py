"""Near duplicates by MinHash, and the diversity of n-grams.

MinHash (Broder 1997) estimates the Jaccard similarity of two sets; locality-sensitive hashing finds the candidates
without comparing all with all. Every candidate is then compared exactly, so none that is named is a false
alarm, and hardly any is missed. Shingles are three tokens, where a token is a word, a Chinese character or a sign.
"""

import zlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
from datasketch import MinHash, MinHashLSH

from check_data.texts import TOKEN

SIMILAR = 0.8  # Jaccard similarity from which two texts are near duplicates
CANDIDATE = 0.5  # the threshold of the hash table; with it fewer than 1 in 1,000 near duplicates are missed
PERMUTATIONS = 64
COMPARED = 50  # candidates looked at for one text
SHINGLE = 3
EMPTY = MinHash(num_perm=PERMUTATIONS, hashfunc=int)  # copied, because to make its permutations takes long


class NearDuplicates:
    """Texts by their likeness. Only a text that is like none before it is kept, so one large cluster costs little."""

    def __init__(self) -> None:
        self.table = MinHashLSH(threshold=CANDIDATE, num_perm=PERMUTATIONS)
        self.shingles: dict[str, frozenset[int]] = {}

    def find(self, text: str) -> tuple[str, float] | None:
        """The kept text most like this one, by name, and their similarity; None if it is below 0.8."""
        return self._find(*_hashed(text))

    def find_or_keep(self, name: str, text: str) -> tuple[str, float] | None:
        """As `find`; a text that is like no other is kept under `name`."""
        shingles, sketch = _hashed(text)
        found = self._find(shingles, sketch)
        if not found and shingles:
            self.shingles[name] = shingles
            self.table.insert(name, sketch, check_duplication=False)
        return found

    def _find(self, shingles: frozenset[int], sketch: MinHash) -> tuple[str, float] | None:
        if not shingles:
            return None
        best_name, highest = "", 0.0
        for name in map(str, self.table.query(sketch)[:COMPARED]):
            kept = self.shingles[name]
            similarity = len(shingles & kept) / len(shingles | kept)
            if (similarity, name) > (highest, best_name):
                best_name, highest = name, similarity
        return (best_name, highest) if highest >= SIMILAR else None


def _hashed(text: str) -> tuple[frozenset[int], MinHash]:
    tokens = TOKEN.findall(text.lower())
    shingles = frozenset(zlib.crc32(" ".join(shingle).encode()) for shingle in _ngrams(tokens, SHINGLE))
    sketch = EMPTY.copy()
    sketch.update_batch(shingles)
    return shingles, sketch


def _ngrams(tokens: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[start:] for start in range(length)), strict=False)


def distinct(texts: Iterable[str], length: int) -> float | None:
    """The share of distinct n-grams among all n-grams of the texts (distinct-n, arXiv:1510.03055); None without any."""
    hashes = array("q")
    for text in texts:
        hashes.extend(map(hash, _ngrams(TOKEN.findall(text.lower()), length)))
    return len(np.unique(np.frombuffer(hashes, dtype=np.int64))) / len(hashes) if hashes else None
