"""Raw text is a document, as it is; text that a chat template has written is not."""

import csv
import json

import pytest
from common.data.examples import Conversation, Document
from common.data.formats import SFT_FORMATS
from common.data.read import read_examples
from common.data.rows import find_source
from common.errors import InputError
from conftest import ROOT

CHATML = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"


def read(path, rows=(), **options):
    if rows:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return read_examples(find_source(str(path)), SFT_FORMATS, **options)


def test_a_text_column_is_read_by_what_it_holds(tmp_path):
    data = read(tmp_path / "a.jsonl", [{"text": " Once,\r\n从前。 "}, {"text": "An end. <b>[INST]</b>"}])
    assert data.row_format == "text"
    assert [example.text for example in data.examples] == [" Once,\r\n从前。 ", "An end. <b>[INST]</b>"]
    assert [type(example) for example in data.examples] == [Document] * 2
    data = read(tmp_path / "b.jsonl", [{"text": CHATML}])
    assert (data.row_format, type(data.examples[0])) == ("chatml-text", Conversation)
    assert read(ROOT / "data_samples" / "formats" / "text.jsonl").row_format == "text"


@pytest.mark.parametrize(("rows", "says"), [
    ([{"text": "Once."}, {"text": CHATML}], ":2: this row is chatml-text, but {path}:1 is text"),
    ([{"text": CHATML}, {"text": "Once."}], ":2: this row is text, but {path}:1 is chatml-text"),
    ([{"text": "Once."}, {"messages": []}], ":2: this row is messages, but {path}:1 is text"),
    ([{"text": "Once."}, {"content": "Twice."}], ":2: text: missing"),
    ([{"text": "Once."}, {"text": " \n"}], ":2: text: is empty; expected text"),
    ([{"text": None}], ":1: text: should be a valid string, found null"),
    ([{"text": ["Once."]}], ":1: text: should be a valid string, found a list of 1"),
    ([{"body": "Once."}], ":1: unknown format: the columns are body"),
])  # fmt: skip
def test_a_fault_names_its_line_and_its_cause(tmp_path, rows, says):
    path = tmp_path / "a.jsonl"
    with pytest.raises(InputError) as refused:
        read(path, rows)
    assert says.format(path=path) in str(refused.value)


@pytest.mark.parametrize("text", [
    "<s>[INST] 2 + 2? [/INST] 4</s>",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n2 + 2? [/INST] 4",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>",
    "<bos><start_of_turn>user\n2 + 2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n",
    "<|user|>\n2 + 2?<|end|>\n<|assistant|>\n4<|end|>\n",
    "<｜begin▁of▁sentence｜><｜User｜>2 + 2?<｜Assistant｜>4",
    "Below is an instruction that describes a task.\n\n### Instruction:\n2 + 2?\n\n### Response:\n4",
    "### Human: 2 + 2?\n### Assistant: 4",
    "\n\nHuman: 2 + 2?\n\nAssistant: 4",
    "USER: 2 + 2?\nASSISTANT: 4",
    '[{"role": "user", "content": "2 + 2?"}]',
    "[{'from': 'human', 'value': '2 + 2?'}]",
])  # fmt: skip
def test_a_rendered_conversation_is_no_document(tmp_path, text):
    """All of it would carry loss, the turns of the user too."""
    with pytest.raises(InputError, match=":1: text: is a conversation written as text"):
        read(tmp_path / "a.jsonl", [{"text": text}])


@pytest.mark.parametrize("text", [
    "The mark [INST] begins a turn of Llama 2.",
    "Human: a short history\n\nPeople have assistants.",
    "### Response: none came.",
    "Below is an instruction that describes a task. It is short.",
])  # fmt: skip
def test_a_document_about_conversations_is_a_document(tmp_path, text):
    assert read(tmp_path / "a.jsonl", [{"text": text}]).examples[0].text == text


def test_every_kind_of_file_holds_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["Once,\nupon.", "从前。"]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["text"], *([text] for text in texts)])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    for name in ("a.csv", "a.parquet", "a.json"):
        assert [example.text for example in read(tmp_path / name).examples] == texts
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")
    assert [example.text for example in read(tmp_path / "b.jsonl", columns=["text=body"]).examples] == texts


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffOne\nline.\r\n".encode())
    (tmp_path / "a.TXT").write_text("Two.", encoding="utf-8")
    (tmp_path / "README.md").write_text("not data")
    data = read(tmp_path)
    assert [(example.place, example.text) for example in data.examples] == [
        (f"{tmp_path}/a.TXT:1", "Two."),
        (f"{tmp_path}/b.txt:1", "One\nline.\r\n"),
    ]
    assert read(tmp_path / "b.txt").examples == data.examples[1:]


@pytest.mark.parametrize(("content", "says"), [
    (b"", "the file is empty"),
    (b" \n\n", ":1: text: is empty; expected text"),
    (b"Caf\xe9", "byte 4 is 0xe9, which is not UTF-8"),
    (CHATML.encode(), "this row is chatml-text, but"),
])  # fmt: skip
def test_a_text_file_that_holds_no_text_is_refused(tmp_path, content, says):
    (tmp_path / "a.txt").write_text("Once.")
    (tmp_path / "b.txt").write_bytes(content)
    with pytest.raises(InputError) as refused:
        read(tmp_path)
    assert f"{tmp_path}/b.txt" in str(refused.value)
    assert says in str(refused.value)


def test_a_text_file_beside_files_of_rows_is_a_note(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("Free.")
    assert len(read(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}]).examples) == 1
    assert read(tmp_path).row_format == "prompt-completion"
