"""Write data_samples/: what the tiny model is trained and tested on, and the smallest real file of every format.

The same bytes every time. Nine sets for the tiny model:
  sft.jsonl               the form <think>thought</think><answer>answer</answer>. Half of the thoughts, drawn at random,
                          are plain and half hedge, so that a preference stage has something to prefer. Its sums never
                          carry and its differences never borrow: it teaches the form, not arithmetic.
  heldout.jsonl           questions of every task about facts and numbers that sft.jsonl never asks
  arithmetic.jsonl        held-out sums and differences, half of them with a carry or a borrow
  arithmetic-train.jsonl  the same for training by reinforcement, none of them held out
  preferences.jsonl       held-out questions with a plain thought (chosen) and a hedging one (rejected), both right
  preferences-train.jsonl the same for training, none of them held out
  feedback-train.jsonl    questions of every task, none of them held out, each with one completion: a plain thought
                          marked good (40 in 100), or a hedging one marked bad
  scores.jsonl            questions of every task, a quarter of them sums and none held out, each with two answers and
                          their scores: 4.5 for a right answer after a plain thought, and for the other 2.5 after a
                          hedging thought, 1.5 if it answers another question or 1 out of form; up to 0.3 of noise
  scores-heldout.jsonl    the same of held-out questions
And compare.jsonl, prompts written by hand for two models to answer side by side.
Left out: anything a person did not write or a rule did not make; no text here comes from another data set.

    python scripts/tiny/samples.py --output data_samples
"""

import argparse
import csv
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from random import Random

import pyarrow
import pyarrow.parquet
from compare_prompts import COMPARE, QUESTIONS
from formats import ALPACA, CHATML, DOCUMENTS, FEEDBACK, MESSAGES, PROMPT_COMPLETION, SHAREGPT, SHAREGPT_TOOLS
from sums import arithmetic, draw_problem
from world import TASKS, Question

LANGUAGES = ("en", "zh")
HEDGES = {"en": "Hmm, maybe, I am not sure: ", "zh": "嗯，也许，我不确定："}
SYSTEMS = {
    "en": ["You are a patient teacher.", "Answer in one word if you can.", "You help people who learn Chinese."],
    "zh": ["你是一位耐心的老师。", "能用一个词回答就用一个词。", "你帮助学习英语的人。"],
}
SPLIT = 223  # with this number every task, however few its facts, has some on both sides
SFT_ROWS, HELDOUT_ROWS, ARITHMETIC_ROWS, ARITHMETIC_TRAIN_ROWS = 1280, 200, 200, 1000
PREFERENCE_ROWS, PREFERENCE_TRAIN_ROWS, FEEDBACK_TRAIN_ROWS = 200, 640, 640
SCORE_ROWS, SCORE_HELDOUT_ROWS = 300, 100


def held_out(key: str) -> bool:
    """One fact, number or problem in five is kept from every training set, in both languages and all wordings."""
    return zlib.crc32(f"{SPLIT} {key}".encode()) % 5 == 0


def draw(rng: Random, language: str, task: str, held: bool, hard: bool) -> Question:
    """A question of this task from the wanted side of the split. `hard` counts only for arithmetic."""
    while True:
        if task == "arithmetic":
            question = arithmetic(draw_problem(rng, hard), rng, language)
        else:
            question = TASKS[task](rng, language)
        if held_out(question.key) == held:
            return question


def form(thought: str, answer: str) -> str:
    return f"<think>{thought}</think><answer>{answer}</answer>"


def plain(question: Question) -> str:
    return form(question.sentence, question.answer)


def hedging(question: Question) -> str:
    return form(HEDGES[question.language] + question.statement, question.answer)


def sft_rows() -> list[dict]:
    rng = Random("sft")
    rows, drawn = [], set()
    while len(rows) < SFT_ROWS:
        language = rng.choice(LANGUAGES)
        messages = []
        if rng.random() < 0.08:
            messages.append({"role": "system", "content": rng.choice(SYSTEMS[language])})
        for _ in range(rng.choice((2, 3)) if rng.random() < 0.06 else 1):
            task = "arithmetic" if rng.random() < 0.25 else rng.choice(list(TASKS))
            question = draw(rng, language, task, held=False, hard=False)
            answer = rng.choice((plain, hedging))(question)
            messages.append({"role": "user", "content": question.prompt})
            messages.append({"role": "assistant", "content": answer})
        conversation = " ".join(message["content"] for message in messages if message["role"] != "assistant")
        if conversation not in drawn:
            drawn.add(conversation)
            rows.append({"messages": messages})
    return rows


def heldout_rows() -> list[dict]:
    """As many of each task as of any other, arithmetic counting as one; every second sum is hard."""
    rng = Random("heldout")
    tasks = ["arithmetic", *TASKS]
    rows, drawn = [], set()
    while len(rows) < HELDOUT_ROWS:
        task = tasks[len(rows) % len(tasks)]
        question = draw(rng, rng.choice(LANGUAGES), task, held=True, hard=rng.random() < 0.5)
        if question.prompt not in drawn:
            drawn.add(question.prompt)
            rows.append({"prompt": question.prompt, "answer": question.answer, "task": question.task})
    return rows


def arithmetic_rows(name: str, rows_wanted: int, held: bool) -> list[dict]:
    rng = Random(name)
    rows, drawn = [], set()
    while len(rows) < rows_wanted:
        question = draw(rng, rng.choice(LANGUAGES), "arithmetic", held, hard=len(rows) % 2 == 0)
        if question.key not in drawn:
            drawn.add(question.key)
            rows.append({"prompt": question.prompt, "answer": question.answer})
    rng.shuffle(rows)
    return rows


def preference_rows(name: str, rows_wanted: int, held: bool) -> list[dict]:
    rng = Random(name)
    tasks = ["arithmetic", *TASKS]
    rows, drawn = [], set()
    while len(rows) < rows_wanted:
        question = draw(rng, rng.choice(LANGUAGES), tasks[len(rows) % len(tasks)], held, hard=False)
        if question.prompt not in drawn:
            drawn.add(question.prompt)
            rows.append({"prompt": question.prompt, "chosen": plain(question), "rejected": hedging(question)})
    rng.shuffle(rows)
    return rows


def feedback_rows(name: str, rows_wanted: int, held: bool) -> list[dict]:
    rng = Random(name)
    rows = []
    for row in preference_rows(name, rows_wanted, held):
        good = rng.random() < 0.4
        completion = row["chosen" if good else "rejected"]
        rows.append({"prompt": row["prompt"], "completion": completion, "label": good})
    return rows


def beside_the_point(rng: Random, question: Question) -> str:
    """In form, but the answer to another question of the same task, from the same side of the split."""
    task = question.task if question.task in TASKS else "arithmetic"
    while True:
        other = draw(rng, question.language, task, held_out(question.key), hard=False)
        if other.answer != question.answer:
            return plain(other)


def out_of_form(rng: Random, question: Question) -> str:
    """The right answer without the form, or the form broken in one of the ways a policy finds."""
    return rng.choice(
        (
            question.answer,
            question.sentence,
            plain(question).removesuffix("</answer>"),
            f"<answer>{question.answer}</answer>",
            form("", question.answer),
            form(" ".join([question.sentence] * 3), question.answer),
        )
    )


def score_rows(name: str, rows_wanted: int, held: bool) -> list[dict]:
    """Each question with two answers, one plain and right; of 11 others six hedge, one is beside the point, four are
    out of form. A quarter of the questions are sums, which `make ppo` practises.

    Were each question answered once, and sums as rare as any task, chance would leave kinds of sums that only hedging
    answers, and whether a reward model holds the sum for the hedge would depend on how a processor rounds.
    """
    rng = Random(name)
    tasks = list(TASKS)
    rows, drawn = [], set()
    while len(rows) < rows_wanted:
        turn = len(drawn)
        task = "arithmetic" if turn % 4 == 3 else tasks[(turn - turn // 4) % len(tasks)]
        question = draw(rng, rng.choice(LANGUAGES), task, held, hard=False)
        if question.prompt in drawn:
            continue
        drawn.add(question.prompt)
        other = rng.choices((2.5, 1.5, 1.0), (30, 5, 20))[0]
        if other == 2.5:
            response = hedging(question)
        elif other == 1.5:
            response = beside_the_point(rng, question)
        else:
            response = out_of_form(rng, question)
        for level, answer in ((4.5, plain(question)), (other, response)):
            score = round(level + rng.uniform(-0.3, 0.3), 1)
            rows.append({"instruction": question.prompt, "response": answer, "score": score})
    rng.shuffle(rows)
    return rows


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def write_formats(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "alpaca.jsonl", ALPACA)
    (folder / "alpaca.json").write_text(
        json.dumps(ALPACA, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n"
    )
    with (folder / "alpaca.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(ALPACA)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ALPACA), folder / "alpaca.parquet")
    write_jsonl(folder / "sharegpt.jsonl", SHAREGPT)
    write_jsonl(folder / "sharegpt-tools.jsonl", SHAREGPT_TOOLS)
    write_jsonl(folder / "messages.jsonl", MESSAGES)
    write_jsonl(folder / "prompt-completion.jsonl", PROMPT_COMPLETION)
    turns = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"].strip()}],
        }
        for row in PROMPT_COMPLETION
    ]
    write_jsonl(folder / "prompt-completion-messages.jsonl", turns)
    write_jsonl(folder / "chatml-text.jsonl", CHATML)
    write_jsonl(folder / "text.jsonl", DOCUMENTS)
    for name, rows in FEEDBACK.items():
        write_jsonl(folder / f"{name}.jsonl", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data_samples"), help="folder; files in it are replaced")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    write_jsonl(output / "sft.jsonl", sft_rows())
    write_jsonl(output / "heldout.jsonl", heldout_rows())
    write_jsonl(output / "arithmetic.jsonl", arithmetic_rows("arithmetic", ARITHMETIC_ROWS, held=True))
    write_jsonl(
        output / "arithmetic-train.jsonl", arithmetic_rows("arithmetic-train", ARITHMETIC_TRAIN_ROWS, held=False)
    )
    write_jsonl(output / "preferences.jsonl", preference_rows("preferences", PREFERENCE_ROWS, held=True))
    write_jsonl(
        output / "preferences-train.jsonl", preference_rows("preferences-train", PREFERENCE_TRAIN_ROWS, held=False)
    )
    write_jsonl(output / "feedback-train.jsonl", feedback_rows("feedback-train", FEEDBACK_TRAIN_ROWS, held=False))
    write_jsonl(output / "scores.jsonl", score_rows("scores", SCORE_ROWS, held=False))
    write_jsonl(output / "scores-heldout.jsonl", score_rows("scores-heldout", SCORE_HELDOUT_ROWS, held=True))
    write_jsonl(output / "compare.jsonl", COMPARE)
    write_jsonl(output / "questions.jsonl", QUESTIONS)
    write_formats(output / "formats")


if __name__ == "__main__":
    main()
