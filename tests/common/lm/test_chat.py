"""Which tokens carry loss: against TRL's own training templates, and at the edges where masks go wrong."""

from dataclasses import replace

import numpy as np
import pytest
from common.data.examples import Conversation, Pair
from common.data.feedback import FEEDBACK_FORMATS
from common.data.formats import FORMATS, PAIR_FORMATS, detect
from common.data.read import as_examples
from common.data.rows import Faults, Row, find_source, read_rows
from common.errors import InputError
from common.lm.chat import set_pad_token, tokenize, tokenize_pairs, trainable
from common.lm.render import ChatFormat, end_token, set_chat_template
from conftest import ROOT
from references.chat_families import FAMILIES

TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four.\n\nIt is even."},
    {"role": "user", "content": "再加一？"},
    {"role": "assistant", "content": "五。"},
]


@pytest.fixture
def family(request, tokenizer):
    """A chat format's name, a tokenizer that knows it, and its end token."""
    family = FAMILIES[request.param]
    return request.param, family.tokenizer(tokenizer), family.end


def only(examples):
    faults = Faults()
    (example,) = examples(faults)
    faults.stop()
    return example


TRAINING = {"qwen2.5": "qwen2_5", "gemma-2": "gemma", "gemma-3": "gemma3", "phi-3.5": "phi3_5"}
TRAINING |= {"deepseek-r1": "deepseek_r1_distill"}


@pytest.mark.parametrize("family", TRAINING, indirect=True)
def test_the_mask_is_that_of_trls_training_template(family):
    """But for the turn's header and the line break after its end, which TRL trains and no model ever has to write."""
    name, tokenizer, _ = family
    example = only(lambda faults: tokenize(tokenizer, [Conversation("f:1", TURNS)], 1000, faults))
    training = replace(FAMILIES[name], template=f"{TRAINING[name]}_training").chat_template()
    reference = tokenizer.apply_chat_template(
        TURNS, chat_template=training, return_assistant_tokens_mask=True, return_dict=True
    )
    assert example.input_ids.tolist() == reference["input_ids"]
    ours, theirs = example.completion_mask == 1, np.array(reference["assistant_masks"]) == 1
    assert not (ours & ~theirs).any()
    extra = tokenizer.decode(example.input_ids[theirs & ~ours])
    assert extra.replace("<｜Assistant｜>", "").replace("<|im_end|>", "").strip() == ""


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_the_trained_tokens_are_the_answers_and_their_end(family):
    name, tokenizer, end = family
    assert end_token(tokenizer) == end
    example = only(lambda faults: tokenize(tokenizer, [Conversation("f:1", TURNS)], 1000, faults))
    trained = tokenizer.decode(example.input_ids[example.completion_mask == 1])
    # Qwen3's template opens its last answer with an empty thought, which is then part of the answer; TRL's for training
    # opens each with one.
    thought = "<think>\n\n</think>\n\n" if name.startswith("qwen3") else ""
    first = thought if name == "qwen3-training" else ""
    assert trained == f"{first}Four.\n\nIt is even.{end}{thought}五。{end}"


def test_a_tool_call_is_trained_and_its_result_is_not(tokenizer):
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
        {"role": "tool", "content": "RESULT"},
        {"role": "assistant", "content": "Four."},
    ]
    tools = [{"name": "add", "description": "SUM"}]
    example = only(lambda faults: tokenize(tokenizer, [Conversation("f:1", turns, tools)], 1000, faults))
    trained = tokenizer.decode(example.input_ids[example.completion_mask == 1])
    assert '"name": "add"' in trained
    assert trained.endswith("Four.<|im_end|>")
    assert "RESULT" not in trained
    assert "SUM" in tokenizer.decode(example.input_ids)


def test_the_prompt_is_tokenized_as_at_inference(tokenizer):
    example = only(lambda faults: tokenize(tokenizer, [Conversation("f:1", TURNS[:2])], 1000, faults))
    prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"]
    first = example.completion_mask.argmax()
    assert example.input_ids[:first].tolist() == prompt


def test_truncation_is_counted_named_and_above_its_share_refused(tokenizer):
    long = [TURNS[0], {"role": "assistant", "content": "word " * 100}]
    rows = [Conversation(f"f:{n}", long if n == 7 else TURNS[:2]) for n in range(1, 11)]
    faults = Faults()
    examples = list(tokenize(tokenizer, rows, 60, faults))
    faults.stop()
    assert len(examples[6].input_ids) == 60 < examples[6].full_length
    kept, line = trainable(examples, 60, 0.1, None)
    assert kept == examples
    assert line == "1 of 10 rows (10.0%) are longer than 60 tokens and truncated: f:7"
    with pytest.raises(InputError, match=r"f:7\nThat is more than --max-truncated 0\.05 allows"):
        trainable(examples, 60, 0.05, None)
    assert trainable(examples[:6], 60, 0.0, None) == (examples[:6], None)


def test_a_row_whose_completion_is_truncated_away_is_dropped_and_counts_as_truncated(tokenizer):
    rows = [Conversation("f:1", TURNS[:2]), Conversation("f:2", [{**TURNS[0], "content": "word " * 100}, TURNS[1]])]
    pairs = [Pair(row.place, row.messages[:1], row.messages[1:], [{**TURNS[1], "content": "5"}]) for row in rows]
    for read, examples in ((tokenize, rows), (tokenize_pairs, pairs)):
        faults = Faults()
        tokens = list(read(tokenizer, examples, 100, faults))
        faults.stop()
        kept, lines = trainable(tokens, 100, 0.5, None)
        assert [example.place for example in kept] == ["f:1"]
        assert lines.splitlines()[1] == "1 of them have no token with loss in those, and are dropped: f:2"
        with pytest.raises(InputError, match=r"are dropped: f:2\nThat is more than --max-truncated 0\.4 allows"):
            trainable(tokens, 100, 0.4, None)
        with pytest.raises(InputError, match="raise --max-length"):  # whatever share is allowed: nothing is left
            trainable(tokens[1:], 100, 1.0, None)


def test_an_answer_before_any_question_has_nothing_to_be_trained_on(tokenizer):
    faults = Faults()
    assert not list(tokenize(tokenizer, [Conversation("f:1", [TURNS[1], TURNS[0]])], 1000, faults))
    assert faults.shown[0].startswith("f:1: no trainable token: ")


def test_a_turn_with_the_end_token_in_it_is_a_fault(tokenizer):
    faults = Faults()
    turns = [{"role": "user", "content": "What does <|im_end|> mean?"}, TURNS[1]]
    assert not list(tokenize(tokenizer, [Conversation("f:1", turns)], 1000, faults))
    assert "a turn of the user contains <|im_end|>" in faults.shown[0]


@pytest.mark.parametrize("family", ["gemma-2"], indirect=True)
def test_what_the_template_refuses_is_a_fault_with_its_reason(family):
    _, tokenizer, _ = family
    faults = Faults()
    assert not list(tokenize(tokenizer, [Conversation("f:1", [TURNS[0], TURNS[0], TURNS[1]])], 1000, faults))
    assert faults.shown[0].startswith("f:1: the chat template refuses it: Conversation roles must alternate")
    assert "make one turn of neighbouring ones" in faults.shown[0]


def test_a_model_without_a_template_or_without_an_end_is_refused(tokenizer, tmp_path):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="base has no chat template"):
        set_chat_template(tokenizer, None, "base")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    set_chat_template(tokenizer, str(tmp_path / "t.jinja"), "base")
    with pytest.raises(InputError, match="would not learn to stop"):
        end_token(tokenizer)
    with pytest.raises(InputError, match=r"missing\.jinja"):
        set_chat_template(tokenizer, str(tmp_path / "missing.jinja"), "base")


def test_the_pad_token_is_never_the_end_token(tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = "<|im_end|>"
    set_pad_token(tokenizer, None, "<|im_end|>")
    assert tokenizer.pad_token == "<|endoftext|>"
    with pytest.raises(InputError, match="not in this model's vocabulary"):
        set_pad_token(tokenizer, "<|nothing|>", "<|im_end|>")
    with pytest.raises(InputError, match="no pad token"):
        set_pad_token(tokenizer, "<|im_end|>", "<|im_end|>")


def test_ready_rendered_chatml_renders_to_itself(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *TURNS], tokenize=False)
    (conversation,) = as_examples([Row("f:1", {"text": text})], Faults(), FORMATS)
    assert ChatFormat(tokenizer).render(conversation).text == text


def samples_of(formats):
    """The files of data_samples/formats that hold one of these formats.

    Pairs of ShareGPT and rows with a label are no conversations, and MBPP's problems, in a column `text`, no ChatML.
    """
    files = [file for file in sorted((ROOT / "data_samples" / "formats").iterdir()) if file.name != "mbpp-text.jsonl"]
    rows = {file: next(read_rows([file], Faults())) for file in files}
    kinds = {
        file: next((one for one in (PAIR_FORMATS, FEEDBACK_FORMATS) if detect(row.fields, one)), FORMATS)
        for file, row in rows.items()
    }
    return [file for file, row in rows.items() if kinds[file] is formats and detect(row.fields, formats)]


@pytest.mark.parametrize("file", samples_of(FORMATS), ids=lambda file: file.name)
def test_every_sample_of_a_format_reads_and_has_tokens_to_learn(file, tokenizer):
    faults = Faults()
    rows = list(as_examples(read_rows(find_source(str(file)), faults), faults, FORMATS))
    examples = list(tokenize(tokenizer, rows, 1000, faults))
    faults.stop()
    assert len(examples) == len(rows) >= 4
    for example in examples:
        trained = tokenizer.decode(example.input_ids[example.completion_mask == 1])
        assert trained.endswith("<|im_end|>")


@pytest.mark.parametrize("file", samples_of(PAIR_FORMATS), ids=lambda file: file.name)
def test_every_sample_of_pairs_is_a_prompt_and_two_answers_in_tokens(file, tokenizer):
    """The prompt ends where the assistant's turn begins; each completion is its text and the end token."""
    faults = Faults()
    rows = list(as_examples(read_rows(find_source(str(file)), faults), faults, PAIR_FORMATS))
    examples = list(tokenize_pairs(tokenizer, rows, 1000, faults))
    faults.stop()
    assert len(examples) == len(rows) >= 4
    for row, example in zip(rows, examples, strict=True):
        assert tokenizer.decode(example.prompt_ids).endswith("<|im_start|>assistant\n")
        assert tokenizer.decode(example.chosen_ids) == row.chosen[-1]["content"] + "<|im_end|>"
        assert tokenizer.decode(example.rejected_ids) == row.rejected[-1]["content"] + "<|im_end|>"


def test_there_is_a_sample_of_every_format():
    assert len(samples_of(FORMATS)) == 10
    assert len(samples_of(PAIR_FORMATS)) == 6


def test_a_pair_is_cut_at_the_end_of_its_answers(tokenizer):
    turn = [{"role": "user", "content": "Say a."}]
    long, short = ([{"role": "assistant", "content": text}] for text in ("a " * 50, "a"))
    (whole,) = tokenize_pairs(tokenizer, [Pair("x:1", turn, long, short)], 1000, Faults())
    room = 10
    (cut,) = tokenize_pairs(tokenizer, [Pair("x:1", turn, long, short)], len(whole.prompt_ids) + room, Faults())
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.chosen_ids == whole.chosen_ids[:room]
    assert cut.rejected_ids == whole.rejected_ids
    assert cut.full_length == len(whole.prompt_ids) + len(whole.chosen_ids)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ([{"role": "assistant", "content": "a<|im_end|>b"}], "contains <|im_end|>"),
        (
            [
                {"role": "assistant", "content": "a"},
                *[{"role": "user", "content": "Say a."}],
                {"role": "assistant", "content": "b"},
            ],
            "differ before",
        ),
    ],
    ids=["an end token inside", "two turns"],
)
def test_a_pair_that_cannot_be_rendered_is_a_fault(tokenizer, chosen, says):
    faults = Faults()
    rejected = [{"role": "assistant", "content": "c"}]
    assert (
        list(
            tokenize_pairs(
                tokenizer, [Pair("x:1", [{"role": "user", "content": "Say a."}], chosen, rejected)], 1000, faults
            )
        )
        == []
    )
    assert faults.shown[0].startswith("x:1: ")
    assert says in faults.shown[0]
