"""The built-in reward functions: pure functions of a batch that return one float for each completion.

Each has TRL's signature, f(prompts, completions, **columns) -> list[float | None]. A completion is text, or the chat
messages of the assistant; a column holds one value for each completion, from its own row. None means that the reward
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
FORMAT = re.compile(r"\s*<think>\s*\S.*</think>\s*<answer>\s*\S.*</answer>\s*", re.DOTALL)
NGRAM = 4  # words; shorter phrases recur in any correct calculation
HAN = r"[\u3400-\u9fff]"


def text_of(turns: TextOrMessages) -> str:
    """The text of a completion or a prompt; of chat messages, that of the last one, its reasoning included."""
    if isinstance(turns, str):
        return turns
    last = turns[-1] if turns else {}
    content = last.get("content") or ""
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    thoughts = last.get("reasoning_content")
    return f"<think>{thoughts}</think>{content}" if thoughts else content


def math_reward(completions: Sequence[TextOrMessages], answer: Sequence[str | None], **_: Any) -> Scores:
    """1 if the final answer is the row's `answer`, else 0; answers.py defines which answers are the same.

    Raises ValueError for a gold answer that nothing can be compared with; check_prompts finds those before a run.
    """
    return [
        None if right is None else float(same(gold(right), final_answer(text_of(completion))))
        for completion, right in zip(completions, answer, strict=True)
    ]


def format_reward(completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """1 if the completion is <think>...</think><answer>...</answer>, each tag once and neither part empty, else 0."""
    return [
        float(FORMAT.fullmatch(text) is not None and all(text.count(tag) == 1 for tag in TAGS))
        for text in map(text_of, completions)
    ]


def tags_reward(completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """A quarter for each of the four tags that is there once and in order: a smooth path to the full format."""
    scores: Scores = []
    for text in map(text_of, completions):
        score, last = 0.0, -1
        for tag in TAGS:
            index = text.find(tag)
            if index > last and text.count(tag) == 1:
                score, last = score + 0.25, index
        scores.append(score)
    return scores


def length_reward(completion_ids: Sequence[Sequence[int]], max_completion_length: int, **_: Any) -> Scores:
    """0 for no tokens, down to -1 for `max_completion_length`: of two right answers the shorter one is better."""
    return [-min(len(ids) / max_completion_length, 1.0) for ids in completion_ids]


def overlong_reward(completion_ids: Sequence[Sequence[int]], max_completion_length: int, **_: Any) -> Scores:
    """0 up to four fifths of `max_completion_length` tokens, from there down to -1 at the limit.

    The soft overlong punishment of DAPO (equation 13, https://arxiv.org/abs/2503.14476), where the last fifth is 4,096
    of 20,480 tokens.
    """
    margin = max_completion_length / 5
    return [-min(max(len(ids) - 4 * margin, 0.0) / margin, 1.0) for ids in completion_ids]


def repetition_reward(completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """0 if no four words in a row come twice, down to almost -1: minus the share of repeated n-grams.

    "Demystifying Long Chain-of-Thought Reasoning in LLMs", appendix C.2, https://arxiv.org/abs/2502.03373. A Chinese
    character counts as a word.
    """
    scores: Scores = []
    for text in map(text_of, completions):
        words = re.findall(rf"{HAN}|\w+|[^\w\s]", text)
        ngrams = list(zip(*(words[first:] for first in range(NGRAM)), strict=False))
        scores.append(len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0)
    return scores


def language_reward(prompts: Sequence[TextOrMessages], completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """The share of a completion's words that are in the script of its prompt, Chinese or Latin; 0 for no completion.

    As in DeepSeek-R1 (section 2.3.2, https://arxiv.org/abs/2501.12948), but by script. Tags, LaTeX commands and single
    letters do not count as words; a completion without words scores 1. None where the prompt has no words either.
    """
    scores: Scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt_han, prompt_latin = _words(text_of(prompt))
        han, latin = _words(text_of(completion))
        if prompt_han == prompt_latin == 0:
            scores.append(None)
        elif not text_of(completion).strip():
            scores.append(0.0)
        elif han == latin == 0:
            scores.append(1.0)
        else:
            scores.append((han if prompt_han > prompt_latin else latin) / (han + latin))
    return scores


def json_reward(completions: Sequence[TextOrMessages], **_: Any) -> Scores:
    """1 if the answer is a JSON object or array, with nothing around it but a code fence; else 0."""
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
    """1 if the answer is one well-formed XML element, with nothing around it but a code fence; else 0.

    A document type scores 0: its entities could grow without limit.
    """
    scores: Scores = []
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
        index: (code, wanted)
        for index, (completion, wanted) in enumerate(zip(completions, tests, strict=True))
        if wanted is not None and (code := extract_code(text_of(completion))) is not None
    }
    for index, result in zip(programs, run_many(list(programs.values())), strict=True):
        scores[index] = result.share
    return scores


def schema_validator(schema: Any) -> jsonschema.protocols.Validator:
    """The validator of a JSON schema, given as an object or as JSON text. Raises ValueError for anything else."""
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        validator.check_schema(schema)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected a JSON schema, found text that is not JSON: {error}") from None
    except TypeError:
        raise ValueError(f"expected a JSON schema, found {schema!r}") from None
    except jsonschema.SchemaError as error:
        raise ValueError(f"not a JSON schema: {error.message}") from None
    return validator(schema, registry=referencing.Registry())  # an empty one: a $ref elsewhere is not fetched


def _words(text: str) -> tuple[int, int]:
    """The number of Chinese characters, and of Latin words of two letters or more."""
    text = re.sub(r"<[^<>]*>|\\[a-zA-Z]+", " ", text)
    return len(re.findall(HAN, text)), len(re.findall(r"[A-Za-z\u00c0-\u024f]{2,}", text))


def _answer_part(text: str) -> str:
    """The text after the reasoning, without the tags of the answer and a code fence around it."""
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
    raise ValueError(f"{name} is Python, not JSON")
