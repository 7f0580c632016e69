"""Reading files: every kind gives the same rows with their places, and every broken one says where it broke."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from common.data.rows import Faults, find_source, read_rows, source_identity
from common.errors import InputError

ROWS = [{"prompt": "Häuser\nund 树", "completion": 'a, "b"'}, {"prompt": "2", "completion": "two"}]


def read(path):
    faults = Faults()
    return list(read_rows(find_source(str(path)), faults)), faults


def write(path):
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(ROWS)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize(
    ("name", "lines"), [("a.jsonl", [1, 2]), ("a.json", [2, 6]), ("a.csv", [2, 4]), ("a.parquet", [1, 2])]
)
def test_every_kind_of_file_gives_the_same_rows_with_their_lines(tmp_path, name, lines):
    path = write(tmp_path / name)
    rows, faults = read(path)
    assert [row.fields for row in rows] == ROWS
    assert [row.place for row in rows] == [f"{path}:{line}" for line in lines]
    assert faults.count == 0


def test_json_lines_under_the_name_json_are_read_as_such(tmp_path):
    path = write(tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert [row.fields for row in read(path)[0]] == ROWS


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n\r\n{"prompt": "y"}\r\n')
    rows, faults = read(path)
    assert [(row.place, row.fields["prompt"]) for row in rows] == [(f"{path}:1", "x"), (f"{path}:3", "y")]
    assert faults.count == 0


def test_a_folder_is_all_its_files_in_order(tmp_path):
    for name in ("b.csv", "a.jsonl", "c.parquet"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("not data")
    assert [row.place.rpartition("/")[2] for row in read(tmp_path)[0]] == [
        "a.jsonl:1", "a.jsonl:2", "b.csv:2", "b.csv:4", "c.parquet:1", "c.parquet:2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n' * 16 + b'{"a": \n', 17, "broken JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', 2, "an array, expected a JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', 2, "byte 8 is 0xff, which is not UTF-8"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", 1, "broken JSON: nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}\n", 1, "broken JSON: an integer of thousands of digits"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\\ud83d"}\n', 2, "half of a surrogate pair"),
        ("a.json", b'[\n{"a": 1},\n{"\\udc00": 1}]', 3, "half of a surrogate pair"),
        ("a.json", b'[\n{"a": ' + b"9" * 5000 + b"}]", 2, "broken JSON: an integer of thousands of digits"),
        ("a.json", b'[\n{"a": 1},\n{"a": }\n]', 3, "broken JSON"),
        ("a.json", b'[\n{"a": 1},\n', 3, "broken JSON"),
        ("a.json", b'[\n{"a": 1},\n\n7]', 4, "a number, expected a JSON object"),
        ("a.json", b'[{"a": 1}]\n[{"a": 2},\n{"b": ]', 3, "broken JSON: expecting value at column 7; the rest of the"),
        ("a.json", b'[{"a": 1}]\n}', 2, "broken JSON: expecting value at column 1; the rest of the file"),
        ("a.json", b'{"a": 1,\n "b": }', 2, "broken JSON"),
        ("a.json", b'[{"a": 1},\n{"a": 1, "b": {"c": 1, "c": 1}}]', 2, "the key 'c' is there twice"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', 2, "byte 8 is 0xff, which is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', 2, "the key 'a' is there twice in one object; remove one"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1}{"a": 2}\n', 2, "broken JSON: extra data at column 9"),
        ("a.csv", b"a,b,a\n1,2,3\n", 1, "two columns have the name 'a'"),
        ("a.csv", b"a,b\n1,2\n3\n", 3, "b: missing"),
        ("a.csv", b"a,b\n1,2,3\n", 2, "more cells than the 2 columns"),
        ("a.csv", b'a,b\n1,"2\n', 2, "broken CSV"),
        ("a.csv", b"a,b\n1,\xe9\n", 2, "not UTF-8"),
    ],
)
def test_a_broken_line_is_named_with_what_is_wrong(tmp_path, name, content, line, says):
    path = tmp_path / name
    path.write_bytes(content)
    _, faults = read(path)
    with pytest.raises(InputError) as error:
        faults.stop()
    assert str(error.value).startswith(f"{path}:{line}: "), error.value
    assert says in str(error.value)


def values(path, content):
    path.write_text(content, encoding="utf-8")
    rows, faults = read(path)
    return [(row.fields["a"], int(row.place.rpartition(":")[2])) for row in rows], faults.shown


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ('[{"a": 1}][{"a": 2}]', [(1, 1), (2, 1)]),  # cat a.json b.json
        ('[{"a": 1},\n{"a": 2}]\n\n[\n{"a": 3}\n]\n', [(1, 1), (2, 2), (3, 5)]),
        ('[]\n[{"a": 1}]', [(1, 2)]),
        ('[{"a": 1}]\n\ufeff[{"a": 2}]', [(1, 1), (2, 2)]),
        ('{\n "a": 1\n}\n{\n "a": 2\n}\n', [(1, 1), (2, 4)]),
        ('{"a": 1}{"a": 2}', [(1, 1), (2, 1)]),
        ('{"a": 1}\n[{"a": 2}]', None),  # a line of JSON Lines that is no object
    ],
)
def test_a_json_file_is_read_to_its_end(tmp_path, content, found):
    rows, shown = values(tmp_path / "a.json", content)
    assert rows == (found or [(1, 1)])
    assert len(shown) == (found is None)


@pytest.mark.parametrize("content", ['[{"a": 1},\n{"a": 2}\n]', '[\n {"a": 1},\n {"a": 2}]', '{\n"a": 1}\n{\n"a": 2}'])
def test_an_array_or_long_objects_under_the_name_jsonl_are_read_as_such(tmp_path, content):
    rows, shown = values(tmp_path / "a.jsonl", content)
    assert [value for value, _ in rows] == [1, 2]
    assert shown == []


def test_an_object_over_several_lines_is_one_row_and_a_broken_one_is_one_fault(tmp_path):
    assert values(tmp_path / "a.json", '{"a": 1,\n "b": 2}') == ([(1, 1)], [])
    rows, shown = values(tmp_path / "b.json", '{"a": 1,\n "b": 2,\n "c"\n}')
    assert rows == []
    assert len(shown) == 1


def test_a_broken_first_line_of_json_lines_is_the_only_fault(tmp_path):
    rows, shown = values(tmp_path / "a.jsonl", '{"a": \n{"a": 2}\n{"a": 3}\n')
    assert rows == [(2, 2), (3, 3)]
    assert len(shown) == 1


def test_the_nulls_of_arrow_are_left_out_at_all_depths_and_counted(tmp_path):
    """Two rows of one Parquet file have all keys of both; a chat template would write the ones that are null."""
    calls = [{"city": "Oslo"}, {"a": {"b": [{"c": 1}, {"d": None}]}}, {"city": "Rome"}]
    rows = [{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": call}]}]} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found, faults = read(tmp_path / "a.parquet")
    assert [row.fields["messages"][0]["tool_calls"][0]["arguments"] for row in found] == [
        {"city": "Oslo"}, {"a": {"b": [{"c": 1}, {}]}}, {"city": "Rome"},
    ]  # fmt: skip
    assert faults.notes() == [
        "nulls inside a column, which Parquet has for keys that a row lacks, are left out "
        f"(in 3 rows, the first is {tmp_path / 'a.parquet'}:1)"
    ]
    write(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[1].notes() == []


def test_the_columns_of_parquet_are_those_of_its_schema(tmp_path):
    pq.write_table(pa.table({"instruction": ["a", "b"], "output": [None, "c"]}), tmp_path / "a.parquet")
    assert [list(row.fields) for row in read(tmp_path / "a.parquet")[0]] == [["instruction", "output"]] * 2
    pq.write_table(pa.table({"a": ["b"], "never": pa.nulls(1)}), tmp_path / "b.parquet")
    assert [list(row.fields) for row in read(tmp_path / "b.parquet")[0]] == [["a"]]


def test_a_map_of_parquet_is_an_object_and_two_columns_of_a_name_are_refused(tmp_path):
    column = pa.array([[("city", "Oslo")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"arguments": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0][0].fields == {"arguments": {"city": "Oslo"}}
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="two columns have the name 'a'"):
        read(tmp_path / "b.parquet")
    column = pa.array([[("city", "Oslo"), ("city", "Rome")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"arguments": column}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"c\.parquet: .*city"):
        read(tmp_path / "c.parquet")


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert "the file is empty" in read(tmp_path / "a.jsonl")[1].shown[0]


def test_both_halves_of_a_surrogate_pair_are_one_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\\ud83d\\ude00"}\n')
    rows, faults = read(tmp_path / "a.jsonl")
    assert rows[0].fields == {"a": "\N{GRINNING FACE}"}
    assert faults.count == 0


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"a": f"text {number}"} for number in range(1000)]), path)
    content = bytearray(path.read_bytes())
    content[100:400] = bytes(300)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file"):
        read(path)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"a\.parquet: not a readable Parquet file"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("data", ["/no/such/folder", "./missing.jsonl", "missing.csv", "missing", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_without_a_request_to_the_hub(data):
    with pytest.raises(InputError, match="no such file or folder"):
        find_source(data)


def test_a_hub_id_is_not_a_path():
    assert find_source("openai/gsm8k") == "openai/gsm8k"


def test_an_unknown_kind_of_file_and_an_empty_folder_are_refused(tmp_path):
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(InputError, match=r"unknown kind of file '\.xlsx'"):
        find_source(str(tmp_path / "a.xlsx"))
    with pytest.raises(InputError, match="holds no data file"):
        find_source(str(tmp_path))


def test_twenty_faults_are_shown_and_the_rest_counted():
    faults = Faults()
    for number in range(25):
        faults.add(f"f:{number}", "wrong")
    with pytest.raises(InputError) as error:
        faults.stop()
    lines = str(error.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "... and 5 more, 25 in all"


def test_the_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"ab")
    (tmp_path / "b.csv").write_bytes(b"c")
    # sha256 of "abc", from FIPS 180-2
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert source_identity(find_source(str(tmp_path))) == expected


def test_notes_are_counted_and_their_kinds_are_few():
    faults = Faults()
    for number in range(1, 101):
        faults.note(f"f:{number}", f"the column '{number}' is not read")
        faults.note(f"f:{number}", "the column 'id' is not read")
    assert faults.notes()[1] == "the column 'id' is not read (in 100 rows, the first is f:1)"
    assert len(faults.notes()) == 21
    assert faults.notes()[-1] == "other things that are not read (in 81 rows, the first is f:20)"
