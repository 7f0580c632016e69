"""The built-in reward functions: pure, a batch in, one float a completion out.

Each has TRL's signature, f(prompts, completions, **columns) -> list[float | None]. A completion is text, or the chat
messages of the assistant; a column holds one value for each completion, the same row's. None means that the reward
does not apply to that row, because it has no value in the column that the reward reads.
"""

import json
import re
from collections.abc import Sequence
from typing import Any
from xml.parsers import expat

import jsonschema
import referencing

from common.rewards.answers import final_answer, gold, same
from common.rewards.sandbox import extract_code, run_many

TextOrMessages = str | list[dict[str, Any]]
Scores = list[float | None]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORM = re.compile(r"\s*<think>\s*\S.*</think>\s*<answer>\s*\S.*</answer>\s*", re.DOTALL)
NGRAM = 4  # words; shorter phrases recur in any honest calculation
HAN = r"[\u3400-\u9fff]"


def text_of(turns: TextOrMessages) -> str:
    """The text of a completion, or of a prompt: of chat messages, what the last of them says, its thoughts included."""
    if isinstance(turns, str):
        return turns
    last = turns[-1] if turns else {}
    content = last.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    thoughts = last.get("reasoning_content")
    return f"<think>{thoughts}</think>{content}" if thoughts else content


def math_reward(completions: Sequence[TextOrMessages], answer: Sequence[str | None], **_: Any) -> Scores:
    """1 if the final answer is the row's `answer`, else 0; what is the same is said in answers.py.

    Raises ValueError for an answer that cannot be compared with; check_prompts finds those before a run.
    """
    return [
        None if right is None else float(same(gold(right), final_answer(text_of(completion))))
        for completion, right in zip(completions, answer, strict=True)
    ]


def format_reward(completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """1 if the whole completion is <think>...</think><answer>...</answer>, each tag once and neither empty, else 0."""
    return [
        float(FORM.fullmatch(text) is not None and all(text.count(tag) == 1 for tag in TAGS))
        for text in map(text_of, completions)
    ]


def tags_reward(completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """A quarter for each of the four tags that is there exactly once, after those before it: a way up to the format."""
    scores = []
    for text in map(text_of, completions):
        score, last = 0.0, -1
        for tag in TAGS:
            place = text.find(tag)
            if place > last and text.count(tag) == 1:
                score, last = score + 0.25, place
        scores.append(score)
    return scores


def length_reward(completion_ids: Sequence[Sequence[int]], max_completion_length: int, **_: Any) -> Scores:
    """0 for nothing, down to -1 for `max_completion_length` tokens: of two right answers the shorter is better."""
    return [-min(len(ids) / max_completion_length, 1.0) for ids in completion_ids]


def overlong_reward(completion_ids: Sequence[Sequence[int]], max_completion_length: int, **_: Any) -> Scores:
    """0 up to four fifths of `max_completion_length` tokens, from there down to -1 at the limit.

    The soft over-long punishment of DAPO (equation 13, https://arxiv.org/abs/2503.14476), whose 4,096 tokens of 20,480
    are that fifth.
    """
    margin = max_completion_length / 5
    return [-min(max(len(ids) - 4 * margin, 0.0) / margin, 1.0) for ids in completion_ids]


def repetition_reward(completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """0 if no four words in a row come twice, down to nearly -1: minus the share of repeated n-grams.

    "Demystifying Long Chain-of-Thought Reasoning in LLMs", appendix C.2, https://arxiv.org/abs/2502.03373. A Chinese
    character counts as a word.
    """
    scores = []
    for text in map(text_of, completions):
        words = re.findall(rf"{HAN}|\w+|[^\w\s]", text)
        ngrams = list(zip(*(words[first:] for first in range(NGRAM)), strict=False))
        scores.append(len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0)
    return scores


def language_reward(prompts: Sequence[TextOrMessages], completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """The share of a completion's words that are in the script of its prompt, Chinese or Latin; 0 for no completion.

    As in DeepSeek-R1 (section 2.3.2, https://arxiv.org/abs/2501.12948), told by script. Tags, LaTeX commands and single
    letters are no words; without any, the score is 1. None where the prompt has no words either.
    """
    scores: Scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked_han, asked_latin = _words(text_of(prompt))
        said_han, said_latin = _words(text_of(completion))
        if asked_han == asked_latin == 0:
            scores.append(None)
        elif not text_of(completion).strip():
            scores.append(0.0)
        elif said_han == said_latin == 0:
            scores.append(1.0)
        else:
            own = said_han if asked_han > asked_latin else said_latin
            scores.append(own / (said_han + said_latin))
    return scores


def json_reward(completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """1 if the answer is a JSON object or array, and nothing else but a code fence around it; else 0."""
    return [float(_parse_json(text_of(completion)) is not None) for completion in completions]


def json_schema_reward(completions: Sequence[TextOrMessages], schema: Sequence[Any], **_: Any) -> Scores:
    """1 if the answer is a JSON object or array that the row's `schema` allows, else 0."""
    scores: Scores = []
    for completion, wanted in zip(completions, schema, strict=True):
        if wanted is None:
            scores.append(None)
            continue
        instance = _parse_json(text_of(completion))
        scores.append(float(instance is not None and schema_validator(wanted).is_valid(instance)))
    return scores


def xml_reward(completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """1 if the answer is one well-formed XML element, and nothing else but a code fence around it; else 0.

    A document type is refused: its entities could grow without bound.
    """
    scores = []
    for text in map(_answer_part, map(text_of, completions)):
        try:
            expat.ParserCreate().Parse(text, True)
            scores.append(float("<!DOCTYPE" not in text))
        except (expat.ExpatError, ValueError):
            scores.append(0.0)
    return scores


def code_reward(completions: Sequence[TextOrMessages], tests: Sequence[Sequence[str] | None], **_: Any) -> Scores:
    """The share of the row's `tests` that the completion's code passes in the sandbox; 0 without code.

    Raises MachineError where this machine cannot confine a program.
    """
    scores: Scores = [None if wanted is None else 0.0 for wanted in tests]
    programs = {
        place: (code, wanted)
        for place, (completion, wanted) in enumerate(zip(completions, tests, strict=True))
        if wanted is not None and (code := extract_code(text_of(completion))) is not None
    }
    for place, result in zip(programs, run_many(list(programs.values())), strict=True):
        scores[place] = result.share
    return scores


def schema_validator(schema: Any) -> jsonschema.protocols.Validator:
    """The validator of a JSON schema, given as an object or as JSON text. Raises ValueError if it is none."""
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        validator.check_schema(schema)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON schema, found no JSON: {error}") from None
    except TypeError:
        raise ValueError(f"expected a JSON schema, found {schema!r}") from None
    except jsonschema.SchemaError as error:
        raise ValueError(f"no JSON schema: {error.message}") from None
    return validator(schema, registry=referencing.Registry())  # an empty one: a $ref elsewhere is not fetched


def _words(text: str) -> tuple[int, int]:
    """How many Chinese characters and how many Latin words of two letters or more."""
    text = re.sub(r"<[^<>]*>|\\[a-zA-Z]+", " ", text)
    return len(re.findall(HAN, text)), len(re.findall(r"[A-Za-z\u00c0-\u024f]{2,}", text))


def _answer_part(text: str) -> str:
    """What follows the thoughts, without the answer's tags and a code fence around it."""
    text = text.rpartition("</think>")[2].strip()
    if text.startswith("<answer>") and text.endswith("</answer>"):
        text = text[len("<answer>") : -len("</answer>")].strip()
    fenced = re.fullmatch(r"```\w*\n(.*)\n```", text, re.DOTALL)
    return fenced[1].strip() if fenced else text


def _parse_json(text: str) -> dict | list | None:
    try:
        value = json.loads(_answer_part(text), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is Python's, not JSON's")
