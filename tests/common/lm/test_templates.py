"""The chat format of every model card: what a row says carries loss, is named as lost, or the row is refused."""

import ast
import copy
import re

import pytest
from common.data.examples import Conversation, Pair, Prompt, Rating
from common.data.prompts import render_prompts
from common.data.rows import Faults
from common.errors import InputError
from common.lm import pieces
from common.lm.cards import card_names, read_card
from common.lm.chat import set_pad_token, tokenize, tokenize_pairs, trainable
from common.lm.hub import embedding_rows, find_model
from common.lm.load import load_chat_tokenizer
from common.lm.render import ChatFormat, end_token, prompt_texts, render_turns
from common.rewards.classifier import RewardModel
from common.rewards.specification import columns_of
from common.rewards.tokens import as_tokens
from conftest import ROOT
from references.chat_families import FAMILIES, family_of

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather.", "parameters": {"type": "object"}},
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, None, True]}}}
SYSTEM = [
    {"role": "system", "content": "Be brief."},
    user("Q1"),
    assistant("Answer one."),
    user("Q2"),
    assistant("Two."),
]
CALLED = [
    user("Q"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "Rain, 7 °C"},
    assistant("It rains."),
]
BESIDE = [user("Q"), assistant("Let me look.", tool_calls=[CALL])]
THOUGHT = [user("Q"), assistant("Four.", reasoning_content="Two and two.")]
TAGGED = [user("Q"), assistant("<think>\nTwo and two.\n</think>\n\nFour.")]
OLD = [*TAGGED, user("And one?"), assistant("<think>\nFour and one.\n</think>\n\nFive.")]


@pytest.fixture(scope="module")
def known(tokenizer):
    return {name: family.tokenizer(tokenizer) for name, family in FAMILIES.items()}


def outcome(tokenizer, turns, tools=None, untrained=()):
    """The texts with loss and what is named as lost; or the fault."""
    faults = Faults()
    conversation = Conversation("f:1", turns, tools, frozenset(untrained))
    if not list(tokenize(tokenizer, [conversation], 10_000, faults)):
        return faults.shown[0]
    rendered = ChatFormat(tokenizer).render(conversation)
    return [rendered.text[start:stop] for start, stop in rendered.spans], set(rendered.lost) - {pieces.OPENED}


def test_every_card_has_its_format_in_these_tests(known):
    for name in card_names():
        assert end_token(known[family_of(name)]) == FAMILIES[family_of(name)].end == read_card(name).end_token
    assert {family_of(name) for name in card_names()} == {name for name in FAMILIES if "training" not in name}


# By format: a system turn, a call and its result, text beside a call, and thoughts in their own field, between tags,
# and of earlier turns. What is lost of it, or the reason for which it is refused.
WHOLE = set()
LOST = {pieces.THOUGHTS}
REFUSED = "function call is not in what"
EXPECTED = {
    "tiny": (WHOLE, WHOLE, WHOLE, LOST, WHOLE, WHOLE),
    "qwen2": (WHOLE, REFUSED, REFUSED, LOST, WHOLE, WHOLE),
    "qwen2.5": (WHOLE, WHOLE, WHOLE, LOST, WHOLE, WHOLE),
    "qwen3": (WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, LOST),
    "qwen3-training": (WHOLE, WHOLE, WHOLE, WHOLE, WHOLE, WHOLE),
    "llama-3.1": (WHOLE, WHOLE, {pieces.BESIDE_CALLS}, LOST, WHOLE, WHOLE),
    "llama-3.2": (WHOLE, WHOLE, {pieces.BESIDE_CALLS}, LOST, WHOLE, WHOLE),
    "gemma-2": ("--system-prompt", "must alternate", REFUSED, LOST, WHOLE, WHOLE),
    "gemma-3": (WHOLE, "must alternate", REFUSED, LOST, WHOLE, WHOLE),
    "phi-3.5": (WHOLE, REFUSED, REFUSED, LOST, WHOLE, WHOLE),
    "phi-4": (WHOLE, REFUSED, REFUSED, LOST, WHOLE, WHOLE),
    "deepseek-r1": (WHOLE, REFUSED, REFUSED, LOST, LOST, LOST),
    "deepseek-r1-training": (WHOLE, REFUSED, REFUSED, LOST, WHOLE, WHOLE),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_becomes_of_the_pieces_of_a_row(name, known):
    for turns, wanted in zip((SYSTEM, CALLED, BESIDE, THOUGHT, TAGGED, OLD), EXPECTED[name], strict=True):
        found = outcome(known[name], turns)
        if isinstance(wanted, str):
            assert isinstance(found, str), turns
            assert wanted in found
            assert "--chat-template-path" in found
        else:
            assert found[1] == wanted, turns
            answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
            for span, answer in zip(found[0], answers, strict=True):
                assert answer.rpartition("</think>")[2].strip() in span or wanted == {pieces.BESIDE_CALLS}
            if "tool_calls" in turns[1]:
                assert all(text in found[0][0] for text in ("weather", '{"city": "Zürich", "days": [1, null, true]}'))


def test_a_text_that_is_dropped_is_not_found_inside_of_a_call(known):
    _, lost = outcome(known["llama-3.1"], [user("Q"), assistant("Zürich", tool_calls=[CALL])])
    assert lost == {pieces.BESIDE_CALLS}


def test_an_answer_is_found_where_turns_before_it_are_rendered_differently_later(known):
    """In the prompt of its second answer Qwen3 renders the thought of the first; not so in the whole conversation."""
    call = assistant("", reasoning_content="Look.", tool_calls=[CALL])
    spans, lost = outcome(known["qwen3"], [user("Q"), call, *CALLED[2:], user("Thanks."), assistant("Bye.")])
    assert spans[1:] == ["It rains.<|im_end|>", "<think>\n\n</think>\n\nBye.<|im_end|>"]
    assert lost == {pieces.THOUGHTS}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_marked_as_untrained_carries_no_loss_and_stays_in_the_text(name, known):
    turns = [user("Q1"), assistant("BAD"), user("Q2"), assistant("Good.")]
    conversation = Conversation("f:1", turns, None, frozenset({1}))
    ((span,), lost) = outcome(known[name], turns, untrained={1})
    assert "Good." in span
    assert "BAD" not in span
    assert not lost
    assert "BAD" in ChatFormat(known[name]).render(conversation).text
    assert "no answer carries loss" in outcome(known[name], turns, untrained={1, 3})


@pytest.mark.parametrize("name", FAMILIES)
def test_tools_are_in_the_prompt_or_named_as_lost(name, known):
    (text,), line = render_prompts(known[name], [Prompt("f:1", [user("Q")], tools=[TOOL])])
    assert ("The weather." in text) == (line is None)
    assert line in (None, "1 of 1 rows (100.0%): the chat template drops the tools: f:1")
    assert prompt_texts(known[name], [Conversation("f:1", [user("Q")], [TOOL])]) == [text]


def test_lost_thoughts_above_the_share_stop_the_run_and_the_template_that_renders_them_is_named(known):
    tokens = list(tokenize(known["qwen3"], [Conversation("f:1", OLD), Conversation("f:2", THOUGHT)], 1000, Faults()))
    kept, line = trainable(tokens, 1000, 0.5, known["qwen3"].chat_template)
    assert kept == tokens
    assert line == "1 of 2 rows (50.0%): the chat template drops the thoughts of turns with loss: f:1"
    with pytest.raises(InputError, match=r"drops the thoughts.*f:1\n") as stopped:
        trainable(tokens, 1000, 0.4, known["qwen3"].chat_template)
    file = re.search(r"--chat-template-path (\S+\.jinja)", str(stopped.value))[1]
    (fixed,) = tokenize(known["qwen3-training"], [Conversation("f:1", OLD)], 1000, Faults())
    assert fixed.lost == ()
    with open(file, encoding="utf-8") as template:
        assert template.read() == known["qwen3-training"].chat_template


def test_thoughts_of_turns_without_loss_are_named_and_stop_nothing(known):
    tokens = list(tokenize(known["qwen3"], [Conversation("f:1", OLD, None, frozenset({1}))], 1000, Faults()))
    assert tokens[0].lost == (pieces.OLD_THOUGHTS,)
    assert trainable(tokens, 1000, 0.0, None) == (tokens, f"1 of 1 rows (100.0%): {pieces.OLD_THOUGHTS}: f:1")


@pytest.mark.parametrize("where", ["reasoning_content", "arguments", "key", "description"])
def test_the_end_token_is_refused_wherever_it_stands(where, tokenizer):
    end, function = "a<|im_end|>b", {"name": "weather", "arguments": {"city": "Oslo"}}
    function |= {"arguments": {"city": [end]}} if where == "arguments" else {}
    function |= {"arguments": {end: 1}} if where == "key" else {}
    more = {"reasoning_content": end if where == "reasoning_content" else "a", "tool_calls": [{"function": function}]}
    tools = [{"name": "weather", "description": end if where == "description" else ""}]
    assert "contain <|im_end|>" in outcome(tokenizer, [user("Q"), assistant("A", **more)], tools).replace(
        "contains", "contain"
    )


def test_other_special_tokens_in_a_text_are_named(tokenizer):
    spans, lost = outcome(tokenizer, [user("a <|im_start|>assistant\nNo."), assistant("Yes.")])
    assert (spans, lost) == (["Yes.<|im_end|>"], {pieces.SPECIAL})


# Prompt and completion apart.


@pytest.mark.parametrize("answer", ["\nYes", "\n\nYes", "  Yes", "\n"])
def test_a_prompt_has_the_tokens_of_inference_whatever_the_completion_begins_with(answer, tokenizer):
    prompt = tokenizer(render_turns(tokenizer, [user("q")], None, add_generation_prompt=True))["input_ids"]
    completion = tokenizer(answer + "<|im_end|>")["input_ids"]
    turns = [user("q"), assistant(answer + "x" * (not answer.strip()))]
    (example,) = tokenize(tokenizer, [Conversation("f:1", turns)], 1000, Faults())
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert example.completion_mask[: len(prompt)].sum() == 0
    assert example.completion_mask[len(prompt)] == 1
    if answer.strip():
        (pair,) = tokenize_pairs(tokenizer, [Pair("f:1", turns[:1], turns[1:], [assistant("No")])], 1000, Faults())
        assert (pair.prompt_ids, pair.chosen_ids) == (prompt, completion)
        rows, _ = as_tokens(tokenizer, [Rating("f:1", turns[:1], turns[1:], 1.0)], 1000, 0.0, whole=False)
        assert rows[0].answers == [prompt + completion]


def test_a_tokenizer_that_marks_the_beginning_of_a_text_marks_no_completion():
    """SentencePiece's, as Llama 2 has it: a text begins with the mark of a space, a completion does not."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = {token: index for index, token in enumerate(["<unk>", "</s>", "▁", *"abcdefghij:\nQ"])}
    core = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Replace("▁", " ")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ 'Q:' if turn.role == 'user' else 'a:' }}{{ turn.content }}"
        "{{ eos_token if turn.role == 'assistant' }}{% endfor %}{{ 'a:' if add_generation_prompt }}"
    )
    (example,) = tokenize(tokenizer, [Conversation("f:1", [user("bad"), assistant("cab")])], 1000, Faults())
    trained = example.input_ids[example.completion_mask == 1]
    assert tokenizer.convert_ids_to_tokens(trained) == ["c", "a", "b", "</s>"]


def test_pairs_that_a_template_renders_the_same_are_a_fault(known):
    faults = Faults()
    pair = Pair("f:1", [user("q")], [assistant("Yes")], [assistant("Yes \n")])
    assert not list(tokenize_pairs(known["llama-3.1"], [pair], 1000, faults))
    assert faults.shown == ["f:1: chosen and rejected are the same in tokens: the pair would teach nothing"]
    long = [Pair("f:2", [user("q")], [assistant("a " * 50 + end)], [assistant("a " * 50)]) for end in ("b", "")]
    assert not list(tokenize_pairs(known["tiny"], long[:1], 50, faults))
    assert "f:2: chosen and rejected are the same in the first 50 tokens" in faults.shown[1]


# One function renders.


def test_nothing_else_calls_a_chat_template():
    files = [file for folder in ("recipes", "scripts") for file in sorted((ROOT / folder).rglob("*.py"))]
    callers = [file.name for file in files if ".apply_chat_template(" in file.read_text(encoding="utf-8")]
    assert callers == ["render.py", "turns.py"]  # the latter takes a template apart, for Ollama's


def test_every_conversation_that_a_command_makes_has_the_tools_of_its_row():
    """Else a template that needs them renders another prompt than training: GRPO, PPO, distill, evaluate and others."""
    without = []
    for file in (file for folder in ("recipes", "scripts") for file in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Conversation" and len(node.args) < 3:
                without.append(file.name)
    assert without == ["judges.py", "headroom.py"]  # requests to a judge, and rows that have none


RAISING = {
    "a type": "{{ 1 + 'a' }}",
    "a name": "{{ nothing.at.all }}",
    "a division": "{{ 1 / 0 }}",
    "a syntax": "{% if %}",
    "a huge range": "{% for n in range(10 ** 9) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a filter": "{{ messages | nothing }}",
}


@pytest.mark.parametrize("kind", RAISING)
def test_whatever_a_template_raises_is_a_fault_of_its_row_or_of_the_model(kind, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    good = tokenizer.chat_template
    tokenizer.chat_template = RAISING[kind]
    with pytest.raises(InputError, match=r"the chat template refuses it: .*--chat-template-path"):
        end_token(tokenizer)
    tokenizer.chat_template = "{% if messages[0].content == 'Q' %}" + RAISING[kind] + "{% endif %}" + good
    if kind not in ("a syntax", "a filter"):  # which no row escapes
        faults = Faults()
        rows = [Conversation("f:1", [user("Q"), assistant("A")]), Conversation("f:2", [user("P"), assistant("A")])]
        assert [row.place for row in tokenize(tokenizer, rows, 100, faults)] == ["f:2"]
        assert faults.shown[0].startswith("f:1: the chat template refuses it: ")
        with pytest.raises(InputError, match=r"^f:7: the chat template refuses it"):
            prompt_texts(tokenizer, [Conversation("f:7", [user("Q")])])


def test_a_reward_model_reads_the_tools_of_a_prompt(classifier):
    prompts = [Prompt("f:1", [user("q")], tools=[TOOL]), Prompt("f:2", [user("q")])]
    assert columns_of(prompts) == {"tools": [[TOOL], None]}
    answers = [[assistant("a")]] * 2
    model = RewardModel(str(classifier))
    with_tools, without = model([one.prompt for one in prompts], answers, **columns_of(prompts))
    alone = model([prompts[1].prompt], answers[:1])[0]
    assert without == pytest.approx(alone, abs=1e-4)  # no more than padding changes
    assert abs(with_tools - alone) > 1e-3


# Ids and the embedding.


def test_a_token_that_the_embedding_lacks_is_no_pad_token_and_no_token_of_a_row(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.embedding_rows = rows
    with pytest.raises(InputError, match=rf"--pad-token <\|pad\|>: its id is {rows}, and .* {rows} rows"):
        set_pad_token(tokenizer, "<|pad|>", "<|im_end|>", rows)
    set_pad_token(tokenizer, None, "<|im_end|>", rows)
    assert tokenizer.pad_token == "<|endoftext|>"
    faults = Faults()
    conversations = [
        Conversation("f:1", [user("a"), assistant("<|pad|>")]),
        Conversation("f:2", [user("a"), assistant("b")]),
    ]
    assert [one.place for one in tokenize(tokenizer, conversations, 100, faults)] == ["f:2"]
    assert faults.shown[0].startswith(f"f:1: <|pad|> has the id {rows}, and the model's embedding has {rows} rows")


def test_a_model_saved_with_a_token_too_many_loads_with_another_pad_token(tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 2048}')
    loaded, end = load_chat_tokenizer(find_model(str(tmp_path)))
    assert (loaded.pad_token, loaded.embedding_rows, end) == ("<|endoftext|>", 2048, "<|im_end|>")
    assert embedding_rows(find_model("tiny")) == embedding_rows(find_model(str(tmp_path))) == 2048
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 2}')
    with pytest.raises(InputError, match=r"its end token <\|im_end\|> has the id"):
        load_chat_tokenizer(find_model(str(tmp_path)))
