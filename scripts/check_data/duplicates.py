"""Near duplicates by MinHash, and the diversity of n-grams: the same in every run, whatever PYTHONHASHSEED.

MinHash (Broder 1997) estimates the Jaccard similarity of two sets; locality-sensitive hashing finds the candidates
without comparing all with all. The candidates that look most alike are then compared by the shingles themselves, so
none that is named is a false alarm, and hardly any is missed. Shingles are three tokens, where a token is a word, a
Chinese character or a sign; one that is repeated counts each time. Of a text with more than 2,048 shingles the smallest
hashes stand for all (bottom-k sketch, doi:10.1145/1281100.1281133): the similarity's standard error is then below 0.01.
"""

import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from datasketch import MinHash, MinHashLSH

from check_data.texts import TOKEN

Token = TypeVar("Token", str, bytes)

SIMILAR = 0.8  # Jaccard similarity from which two texts are near duplicates
CANDIDATE = 0.5  # the threshold of the hash table; with it fewer than 1 in 1,000 near duplicates are missed
PERMUTATIONS = 64
COMPARED = 50  # candidates compared with one text
SHINGLE = 3
KEPT_SHINGLES = 2048
REPEATED = np.uint32(0x9E3779B1)  # odd and large, so that the hashes of a shingle's repetitions are spread
EMPTY = MinHash(num_perm=PERMUTATIONS, hashfunc=int)  # copied, because to make its permutations takes long


@dataclass(frozen=True, slots=True)
class Shingles:
    """The hashes of a text's shingles, of a long text the smallest; and whether these are all."""

    hashes: np.ndarray  # uint32, in order, each once
    complete: bool

    @classmethod
    def of(cls, text: str) -> "Shingles":
        tokens = [token.encode(errors="replace") for token in TOKEN.findall(text.lower())]
        shingles = map(b" ".join, _ngrams(tokens, SHINGLE))
        hashes = np.fromiter(map(zlib.crc32, shingles), np.uint32, max(len(tokens) - SHINGLE + 1, 0))
        ordered = np.sort(hashes)
        repeated = ordered[1:] == ordered[:-1]
        if repeated.any():  # one that is repeated counts each time
            index = np.arange(1, len(ordered), dtype=np.uint32)
            first = np.maximum.accumulate(np.where(repeated, 0, index))  # of its kind, for all but the first
            ordered[1:] += (index - first) * REPEATED
            ordered = np.unique(ordered)
        return cls(ordered[:KEPT_SHINGLES].copy(), len(ordered) <= KEPT_SHINGLES)

    def similarity(self, other: "Shingles") -> float:
        """The Jaccard similarity: exact when both are complete, else estimated from the hashes that both cover."""
        one, two = self.hashes, other.hashes
        if not (self.complete and other.complete):
            highest = min(each.hashes[-1] for each in (self, other) if not each.complete)
            one, two = one[one <= highest], two[two <= highest]
        shared = len(np.intersect1d(one, two, assume_unique=True))
        return shared / (len(one) + len(two) - shared) if shared else 0.0


class NearDuplicates:
    """Texts by their likeness. Only a text that is like none before it is kept, so one large cluster costs little."""

    def __init__(self) -> None:
        self.table = MinHashLSH(threshold=CANDIDATE, num_perm=PERMUTATIONS)
        self.kept: list[tuple[str, Shingles]] = []
        self.sketches: list[np.ndarray] = []

    def find(self, text: str | Shingles) -> tuple[str, float] | None:
        """The kept text most like this one, by name, and their similarity; None if it is below 0.8."""
        return self._find(text if isinstance(text, Shingles) else Shingles.of(text))[0]

    def find_or_keep(self, name: str, text: str | Shingles) -> tuple[str, float] | None:
        """As `find`; a text that is like no other is kept under `name`."""
        shingles = text if isinstance(text, Shingles) else Shingles.of(text)
        found, sketch = self._find(shingles)
        if sketch and not found:
            self.table.insert(len(self.kept), sketch, check_duplication=False)
            self.kept.append((name, shingles))
            self.sketches.append(sketch.hashvalues)
        return found

    def _find(self, shingles: Shingles) -> tuple[tuple[str, float] | None, MinHash | None]:
        """What `find` returns, and the sketch of the shingles; None of none."""
        if not len(shingles.hashes):
            return None, None
        sketch = EMPTY.copy()
        sketch.update_batch(shingles.hashes.tolist())
        # In order, as that of a set would differ from run to run.
        candidates: list[Any] = sorted(self.table.query(sketch))  # pyrefly: ignore[bad-specialization]  they are int
        if len(candidates) > COMPARED:
            alike = [np.count_nonzero(self.sketches[index] == sketch.hashvalues) for index in candidates]
            candidates = [candidates[index] for index in np.argsort(alike, kind="stable")[: -COMPARED - 1 : -1]]
        best, highest = 0, 0.0
        for index in candidates:
            similarity = shingles.similarity(self.kept[index][1])
            if (similarity, -index) > (highest, -best):
                best, highest = index, similarity
        return ((self.kept[best][0], highest) if highest >= SIMILAR else None), sketch


def _ngrams(tokens: Sequence[Token], length: int) -> Iterator[tuple[Token, ...]]:
    return zip(*(tokens[start:] for start in range(length)), strict=False)


def distinct(texts: Iterable[str], length: int) -> float | None:
    """The share of distinct n-grams among all n-grams of the texts (distinct-n, arXiv:1510.03055); None without any."""
    hashes = array("q")
    for text in texts:
        hashes.extend(map(hash, _ngrams(TOKEN.findall(text.lower()), length)))
    return len(np.unique(np.frombuffer(hashes, dtype=np.int64))) / len(hashes) if hashes else None
