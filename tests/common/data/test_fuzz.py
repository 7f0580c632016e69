"""Broken files of every kind: each is read or refused with a place and a reason, soon, and in little memory.

The suite tries a few hundred, in a process of its own. The whole of it, with as many as wanted:

    python tests/common/data/test_fuzz.py 10000
"""

import copy
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = 40  # in the suite
SECONDS = 5  # for one file and one task
MEMORY_GIB = 1.2  # a row of 1.8 MB takes 0.45 in the tokenizer, what is imported 0.5


@pytest.mark.slow
def test_broken_files_are_refused_and_nothing_worse():
    done = subprocess.run(
        [sys.executable, __file__, str(FILES)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_the_peak_memory_is_that_of_the_process_alone():
    held = bytearray(400 * 2**20)  # by the process that starts it
    held[::4096] = b"x" * len(held[::4096])
    program = "import sys; sys.path.insert(0, sys.argv[1]); import test_fuzz; print(test_fuzz.peak_gib())"
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.2


# 1. Ways to break the bytes of a file.


def flip(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 20)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def insert(rng: random.Random, data: bytes) -> bytes:
    what = rng.choice(
        [
            *(b"\xef\xbb\xbf", b"\x00", b"\r", b"\xff\xfe", b"\n\n", b'"', b"{", b"]", b"\\", b"\\ud800", b"\\u0000"),
            *(b"<|im_end|>", b"{{ 7 }}", b"\xed\xa0\x80", "\u2028".encode(), b"</think>", b"1e999", b"NaN", b"\x1a"),
        ]
    )
    place = rng.choice([0, rng.randrange(len(data) + 1)])
    return data[:place] + what + data[place:]


def line_ends(rng: random.Random, data: bytes) -> bytes:
    return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\x0b", b""]))


def encode_a_line(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    text = lines[at].decode("utf-8", "replace")
    lines[at] = text.encode(rng.choice(["utf-16", "utf-32", "gb18030", "latin-1", "utf-7"]), "replace")
    return b"\n".join(lines)


def nest(rng: random.Random, data: bytes) -> bytes:
    """A value thousands of brackets deep, closed or not."""
    depth = rng.choice([50, 500, 990, 5_000, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    value = opening * depth + b"1" + closing * rng.choice([depth, depth - 1, 0])
    at = data.find(b":", rng.randrange(len(data)))
    return data[: at + 1] + value + data[at + 1 :] if at >= 0 else value


def nonsense(rng: random.Random, _: bytes) -> bytes:
    return rng.randbytes(rng.randint(0, 3000))


# 2. Ways to break the rows of JSON lines, so that they are read and then do not fit.

ODD = [None, True, False, 0, -1, 1.5, 1e308, 10**30, float("nan"), float("inf"), "", " ", "x", [], {}, [[]], ["x"]]
ODD += [{"role": "user"}, [{"role": "user", "content": "x"}], [{"role": "assistant", "content": None}], "\ud800", "\0"]
ODD += [{"from": "gpt", "value": "x"}, '{"name": 1}', "[[[", "1" * 5000, [None], [{"from": 1}], {"a": {"b": [1]}}]


def places_in(value: object, found: list) -> list:
    """Every (container, key) below a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        found.append((value, key))
        places_in(below, found)
    return found


def break_rows(rng: random.Random, data: bytes) -> bytes:
    rows = [json.loads(line) for line in data.splitlines()]
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places_in(rng.choice(rows), []) or [(rows, 0)])
        value = container[key]
        match rng.choice(["odd", "odd", "huge", "remove", "rename", "swap", "repeat", "row"]):
            case "odd":
                container[key] = copy.deepcopy(rng.choice(ODD))
            case "huge":
                word = value if isinstance(value, str) and value else "很长 long "
                container[key] = word * (rng.choice([1_000, 300_000]) // len(word) + 1)
            case "remove" if isinstance(container, dict):
                del container[key]
            case "rename" if isinstance(container, dict):
                container[rng.choice(["prompt", "text", "score", "value", "\ud800", "", "a" * 10_000])] = value
            case "swap":
                other, place = rng.choice(places_in(rng.choice(rows), []) or [(rows, 0)])
                container[key] = copy.deepcopy(other[place])
            case "repeat" if isinstance(value, list):
                container[key] = value * rng.choice([0, 2, 500])
            case _:
                rows[rng.randrange(len(rows))] = copy.deepcopy(rng.choice(ODD))
    lines = [json.dumps(row) for row in rows]
    if rng.random() < 0.3:
        at = rng.randrange(len(lines))  # the same key twice
        lines[at] = lines[at].replace("{", '{"prompt": [1], "messages": 7, ', 1)
    if rng.random() < 0.1:
        lines[rng.randrange(len(lines))] = '{"prompt": ' + "9" * 6000 + "}"  # more digits than Python turns into an int
    return "\n".join(lines).encode("utf-8", "surrogatepass")


BREAKERS = [flip, truncate, insert, line_ends, encode_a_line, nest, nonsense]


def broken(rng: random.Random, files: list[Path]) -> tuple[str, bytes, str]:
    """The suffix and bytes of a broken file, and how it came about."""
    file = rng.choice(files)
    data = file.read_bytes()
    suffix = file.suffix if rng.random() < 0.9 else rng.choice([".jsonl", ".json", ".csv", ".parquet"])
    how = [file.name]
    if file.suffix == ".jsonl" and rng.random() < 0.6:
        data = break_rows(rng, data)
        how.append("break_rows")
    if len(how) == 1 or rng.random() < 0.3:
        for breaker in rng.choices(BREAKERS, k=rng.choice([1, 1, 2])):
            data = breaker(rng, data or b"\n")
            how.append(breaker.__name__)
    return suffix, data, " ".join(how)


# 3. What is done with each: everything that check-data does, for every task, without and now and then with tokens.


class TooSlow(BaseException):
    pass


def too_slow(*_: object) -> None:
    raise TooSlow(f"more than {SECONDS} s")


def peak_gib() -> float:
    """The peak memory of this process. ru_maxrss would be at least that of the process which started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20  # it is in kB


def main(count: int, seed: int) -> int:
    sys.path[:0] = [str(ROOT / "recipes"), str(ROOT / "scripts")]
    from check_data import cleaned, figures, page, report
    from check_data.findings import Findings, RecordedFaults
    from check_data.lengths import Lengths
    from check_data.limits import Limits
    from check_data.survey import Survey
    from check_data.tasks import TASKS
    from common import environment
    from common.data.rows import Faults, read_rows
    from common.errors import InputError
    from common.lm.hub import find_model
    from rich.console import Console

    def check(path: Path, task: object, lengths: Lengths | None) -> int:
        """Read, survey, report and clean one file; how many rows of it are usable."""
        findings = Findings(keep_all=True)
        faults = RecordedFaults(findings)
        limits = Limits(task.name, 256, 256, findings)
        survey = Survey(findings, estimate=None if lengths else limits)
        examples = []
        for example in task.read(read_rows([path], faults), faults):
            survey.add(example)
            examples.append(example)
        if lengths and examples:
            lengths.faults, lengths.limits = faults, limits
            lengths.add(examples)
        survey.finish()
        facts = {"data": str(path), "identity": "", "task": task.name, "format": "", "eval_data": None}
        facts |= {"other_formats": [], "notes": faults.notes()}
        facts |= {"model": "tiny", "chat_template": "its own", "date": "today", "code": code}
        facts |= {"seconds": 1.0, "rows_per_second": 1.0}
        found = figures.figures(survey, findings, lengths, limits, {**facts, "peak_mib": 1.0})
        report.show(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), width=100), found)
        if lengths:
            page.write(path.with_suffix(".html"), found, lengths, examples[:5])
        cleaned.write(
            path.with_name("out"), path.with_name("dropped"), read_rows([path], Faults()), findings, {"fault"}
        )
        return survey.rows

    files = sorted((ROOT / "data_samples" / "formats").iterdir())
    lengths = Lengths(find_model("tiny"), None, Limits("sft", 256, 256, Findings()), Faults())
    code = environment.describe_code()
    signal.signal(signal.SIGPROF, too_slow)
    signal.signal(signal.SIGALRM, too_slow)
    outcomes, slowest, failures = Counter(), 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            suffix, data, how = broken(rng, files)
            path = Path(folder, f"broken{suffix}")
            path.write_bytes(data)
            for task in TASKS:
                started = time.process_time()
                signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time, whatever else the machine does
                signal.alarm(60)  # and no waiting for anything
                try:
                    usable = check(path, task, lengths if number % 10 == 0 else None)
                    outcomes["some rows usable" if usable else "no row usable"] += 1
                except InputError:
                    outcomes["refused"] += 1
                except (Exception, TooSlow) as error:  # noqa: BLE001  every other is what is looked for
                    outcomes["failed"] += 1
                    failures.append(f"{number} {task.name} {how}: {type(error).__name__}: {str(error)[:200]}")
                    if len(failures) <= 5:
                        traceback.print_exc(limit=-4)
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    signal.alarm(0)
                slowest = max(slowest, time.process_time() - started)
    gib = peak_gib()
    print(f"{count} files, {len(TASKS)} readers each: {dict(outcomes)}; slowest {slowest:.2f} s, peak {gib:.2f} GiB")
    print("\n".join(failures[:50]))
    return 1 if failures or gib > MEMORY_GIB else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
