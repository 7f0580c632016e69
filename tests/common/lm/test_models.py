"""Model cards, what a model's name means, and the command that lists and pins cards."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from common.errors import InputError, MachineError
from common.lm import cards as models
from common.lm import hub as hub_module
from common.lm.cards import card_names, method_settings, read_card
from common.lm.hub import base_sha256, fetch, find_model, load_tokenizer, resolved_revision

REPOSITORY = Path(__file__).parents[3]
COMMIT = "a09a35458c702b33eeacc393d103063234e8bc28"
# By the start of the hub id or path; the first that fits.
MODEL_TYPES = {
    "data_samples/tiny": "qwen2",
    "Qwen/Qwen3": "qwen3",
    "Qwen/Qwen2": "qwen2",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen": "qwen2",
    "meta-llama/Llama-3": "llama",
    "google/gemma-2": "gemma2",
    "google/gemma-3": "gemma3",
    "microsoft/": "phi3",
}
# google/gemma-3-4b-it's image tower, which its card's total includes.
GEMMA3_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 896,
    "vision_use_head": False,
}


@pytest.fixture
def cards(tmp_path, monkeypatch):
    """A folder of cards to write into; it starts with qwen2.5-7b."""
    folder = tmp_path / "cards"
    folder.mkdir()
    shutil.copy(models.CARDS / "qwen2.5-7b.toml", folder)
    monkeypatch.setattr(models, "CARDS", folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"one")
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"two")
    return folder


# --- the cards


def test_the_cards_are_the_promised_ones():
    assert set(card_names()) >= {
        "tiny",
        *(f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b")),
        *("qwen2-1.5b", "qwen3-4b", "qwen3-8b", "llama-3.1-8b", "llama-3.2-1b", "gemma-2-9b", "gemma-3-4b"),
        *("deepseek-r1-distill-qwen-7b", "phi-3.5-mini", "phi-4"),
    }


@pytest.mark.parametrize("name", card_names())
def test_a_card_says_where_from_and_how_it_stops(name):
    card = read_card(name)
    assert card.end_token != card.pad_token
    assert card.methods
    assert card.hub_id or (REPOSITORY / card.path).is_dir()
    assert card.gated == (card.chat_format in ("llama3", "gemma"))


def transformers_config(card):
    """The model's config, from nothing but the card and its family's defaults."""
    from transformers import AutoConfig

    sizes = {
        "hidden_size": card.architecture.hidden_size,
        "intermediate_size": card.architecture.intermediate_size,
        "num_hidden_layers": card.architecture.layers,
        "num_attention_heads": card.architecture.heads,
        "num_key_value_heads": card.architecture.kv_heads,
        "head_dim": card.architecture.head_dim,
        "vocab_size": card.architecture.vocab_size,
        "tie_word_embeddings": card.architecture.tied_embeddings,
    }
    family = next(kind for start, kind in MODEL_TYPES.items() if (card.hub_id or card.path).startswith(start))
    if family == "gemma3":
        return AutoConfig.for_model(family, text_config=sizes, vision_config=GEMMA3_VISION)
    return AutoConfig.for_model(family, **sizes)


@pytest.mark.parametrize("name", card_names())
def test_parameters_are_those_of_the_architecture(name):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    card = read_card(name)
    config = transformers_config(card)
    auto = AutoModelForImageTextToText if config.model_type == "gemma3" else AutoModelForCausalLM
    with torch.device("meta"):  # shapes only: a 72B model takes no memory
        model = auto.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == card.parameters
    attention = next(module for module in model.modules() if type(module).__name__.endswith("DecoderLayer")).self_attn
    assert attention.head_dim == card.architecture.head_dim


def test_the_tiny_card_agrees_with_the_files_it_points_at():
    card = read_card("tiny")
    folder = REPOSITORY / card.path
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == MODEL_TYPES[card.path]
    sizes = card.architecture
    assert config["max_position_embeddings"] == card.context
    assert (config["hidden_size"], config["intermediate_size"]) == (sizes.hidden_size, sizes.intermediate_size)
    assert (config["num_hidden_layers"], config["vocab_size"]) == (sizes.layers, sizes.vocab_size)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (sizes.heads, sizes.kv_heads)
    assert config["tie_word_embeddings"] == sizes.tied_embeddings
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == (card.end_token, card.pad_token)


# --- mistakes in a card


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("context =", "contxt =", ["contxt: unknown key (did you mean context?)"]),
        ("kv_heads =", "kv_head =", ["architecture.kv_head: unknown key (did you mean kv_heads?)"]),
        ("context = 32768", 'context = "32768"', ["context: ", "integer"]),
        ("gated = false", "gated = 0", ["gated: ", "boolean"]),
        ('"dpo"', '"dpoo"', ["methods.1: ", "'dpo'"]),
        ('"chatml"', '"chatlm"', ["chat_format: ", "'chatml'"]),
        ("<|endoftext|>", "<|im_end|>", ["pad_token must differ from end_token"]),
        ("hub_id =", "# hub_id =", ["give hub_id or path"]),
        ("licence =", 'revision = "main"\nlicence =', ["revision: "]),
        ("licence =", 'name = "q"\nlicence =', ["name: "]),
        ("layers = 28", "layers =", ["not TOML"]),
    ],
)
def test_a_wrong_line_is_named_with_its_file(cards, old, new, says):
    file = cards / "qwen2.5-7b.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as refusal:
        find_model("qwen2.5-7b")
    assert str(refusal.value).startswith(f"{file}: ")
    for part in says:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


# --- what differs per method


def test_method_settings_are_what_the_card_says():
    assert method_settings(read_card("qwen2.5-72b"), "sft", ["learning_rate"]) == {"learning_rate": 1e-4}
    assert method_settings(read_card("qwen2.5-7b"), "sft", ["learning_rate"]) == {}
    assert method_settings(None, "sft", []) == {}


def test_an_unknown_setting_is_refused_with_the_nearest_argument(cards):
    with (cards / "qwen2.5-7b.toml").open("a") as file:
        file.write("[dpo]\nlearning_rat = 1e-6\n")
    with pytest.raises(InputError, match=r"qwen2.5-7b.toml: dpo.learning_rat: .*did you mean learning_rate\?"):
        method_settings(read_card("qwen2.5-7b"), "dpo", ["model", "learning_rate"])


def test_a_method_the_card_is_not_offered_for_is_refused():
    with pytest.raises(InputError, match=r"qwen2.5-72b is not offered for ppo, only for sft, dpo, kto, grpo, reward"):
        method_settings(read_card("qwen2.5-72b"), "ppo", [])


# --- what a name means


def test_a_card_comes_before_a_directory_of_its_name(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    checkpoint.rename("qwen2.5-7b")
    model = find_model("qwen2.5-7b")
    assert (model.source, model.local) == ("Qwen/Qwen2.5-7B-Instruct", False)
    assert model.card == read_card("qwen2.5-7b")
    assert find_model("./qwen2.5-7b").local


def test_a_directory_comes_before_a_hub_id(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    assert not find_model("Qwen/Qwen3-8B").local
    Path("Qwen").mkdir()
    checkpoint.rename("Qwen/Qwen3-8B")
    model = find_model("Qwen/Qwen3-8B")
    assert (model.name, model.source, model.local) == ("Qwen3-8B", str(checkpoint.parent / "Qwen/Qwen3-8B"), True)
    assert (model.card, model.revision) == (None, None)


def test_a_hub_id_is_taken_as_it_is():
    model = find_model("Qwen/Qwen2.5-7B")
    assert (model.name, model.source, model.card, model.local) == ("Qwen2.5-7B", "Qwen/Qwen2.5-7B", None, False)


def test_a_pinned_card_gives_its_revision(cards):
    file = cards / "qwen2.5-7b.toml"
    file.write_text(file.read_text().replace("licence =", f'revision = "{COMMIT}"\nlicence ='))
    assert find_model("qwen2.5-7b").revision == COMMIT


def test_a_card_with_a_path_is_a_directory_of_the_repository(cards, checkpoint, monkeypatch):
    monkeypatch.setattr(hub_module, "ROOT", checkpoint.parent)
    text = (cards / "qwen2.5-7b.toml").read_text()
    (cards / "small.toml").write_text(re.sub(r"hub_id = .*", 'path = "checkpoint"', text))
    model = find_model("small")
    assert (model.name, model.source, model.revision, model.local) == ("small", str(checkpoint), None, True)


@pytest.mark.parametrize("name", ["qwen2.5-7", "./qwen2.5-7b", "a/b/c", "/no/such/place", ""])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(InputError, match="make models"):
        find_model(name)


def test_the_nearest_card_is_offered():
    with pytest.raises(InputError, match=r"did you mean qwen2.5-7b\?"):
        find_model("qwen2.5-7")
    with pytest.raises(InputError, match=r"did you mean llama-3.1-8b\?"):
        read_card("lama-3.1-8b")


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        find_model(str(tmp_path))


def test_an_adapter_is_refused_by_the_name_of_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-7B-Instruct"}')
    with pytest.raises(InputError, match=r"adapter of Qwen/Qwen2.5-7B-Instruct.*merge"):
        find_model(str(tmp_path))
    # With a config.json beside it too: transformers would load the adapter, on the base that it names.
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter of Qwen/Qwen2.5-7B-Instruct.*merge"):
        find_model(str(tmp_path))


# --- which weights exactly


def test_the_commit_is_read_from_the_cache(checkpoint, tmp_path, monkeypatch):
    # The layout of the hub's cache, as huggingface_hub documents it.
    repository = tmp_path / "models--Qwen--Qwen3-8B"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    shutil.move(checkpoint, repository / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolved_revision(find_model("Qwen/Qwen3-8B")) == COMMIT
    assert resolved_revision(find_model("Qwen/Qwen3-4B")) is None
    assert resolved_revision(find_model(str(repository / "snapshots" / COMMIT))) is None


def test_base_sha256_is_the_hash_it_is_documented_to_be(checkpoint):
    (checkpoint / "README.md").write_text("not part of it")
    (checkpoint / "tokenizer.json").write_text("a part of it")
    contents = {"config.json": b"{}", "model-00001-of-00002.safetensors": b"one"}
    contents |= {"model-00002-of-00002.safetensors": b"two", "tokenizer.json": b"a part of it"}
    lines = [f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in contents.items()]
    assert base_sha256(checkpoint) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_base_sha256_follows_the_contents_and_not_the_place(checkpoint, tmp_path):
    before = base_sha256(checkpoint)
    assert base_sha256(shutil.copytree(checkpoint, tmp_path / "elsewhere")) == before
    (checkpoint / "config.json").write_text('{"rope_theta": 1}')
    assert base_sha256(checkpoint) != before


def test_a_file_is_hashed_once_until_it_changes(checkpoint, tmp_path, monkeypatch):
    """In any process: what is known is a file of the cache."""
    monkeypatch.setattr(hub_module, "HASHES", tmp_path / "hashes")
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda stream, name: hashed.append(Path(stream.name).name) or digest(stream, name)
    )
    before = base_sha256(checkpoint)
    assert len(hashed) == 3
    base_sha256(checkpoint)
    assert len(hashed) == 6  # written just now, so they may be written again without another time

    monkeypatch.setattr(hub_module, "SETTLED", -1.0)
    base_sha256(checkpoint)
    del hashed[:]
    assert base_sha256(checkpoint) == before
    assert hashed == []

    weights = checkpoint / "model-00001-of-00002.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    weights.write_bytes(b"ONE")  # as long as before, and dated back
    os.utime(weights, ns=times)
    changed = base_sha256(checkpoint)
    assert changed != before
    assert hashed == [weights.name]
    weights.unlink()  # another file in its place
    weights.write_bytes(b"one")
    assert base_sha256(checkpoint) == before


def test_hashes_that_cannot_be_kept_are_made_again(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(hub_module, "HASHES", tmp_path / "file" / "hashes")
    monkeypatch.setattr(hub_module, "SETTLED", -1.0)
    assert base_sha256(checkpoint) == base_sha256(checkpoint)


def test_base_sha256_refuses_a_checkpoint_without_safetensors(checkpoint):
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InputError, match="safetensors"):
        base_sha256(checkpoint)


# --- the command, in a copy of the repository, as a user runs it


@pytest.fixture
def copy(tmp_path):
    """A repository of what the command needs; pinning writes into it."""
    copy = tmp_path / "repository"
    (copy / "scripts").mkdir(parents=True)
    for name in ("models.py", "pin.py"):
        shutil.copy(REPOSITORY / "scripts" / name, copy / "scripts")
    shutil.copytree(REPOSITORY / "recipes/common", copy / "recipes/common")
    shutil.copytree(models.CARDS, copy / "recipes/models")
    return copy


def run_script(copy, name, *arguments, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, f"scripts/{name}.py", *arguments],
        cwd=copy,
        env={**clean, "PYTHONPATH": str(copy / "recipes"), "HF_HOME": str(copy / "hub-cache"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


class Hub(http.server.BaseHTTPRequestHandler):
    """Replies as the hub does to a request for a model: one open, one gated, one that does not exist."""

    commit = COMMIT

    def do_GET(self):
        path = self.path.partition("?")[0].removesuffix("/revision/main")
        if path == "/api/models/Qwen/Qwen2.5-7B-Instruct":
            return self.answer(200, {"id": "Qwen/Qwen2.5-7B-Instruct", "sha": self.commit})
        if path == "/api/models/google/gemma-2-9b-it":
            if self.headers.get("Authorization") == "Bearer hf_good":
                return self.answer(200, {"id": "google/gemma-2-9b-it", "sha": self.commit})
            return self.answer(401, {"error": "gated"}, error="GatedRepo")
        return self.answer(404, {"error": "Repository not found"}, error="RepoNotFound")

    def answer(self, status, body, error=None):
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_pin_writes_one_line_and_touches_nothing_else(copy, hub, monkeypatch):
    file = copy / "recipes/models/qwen2.5-7b.toml"
    before = file.read_bytes().splitlines(keepends=True)
    others = {other: other.read_bytes() for other in file.parent.iterdir() if other != file}

    done = run_script(copy, "pin", "--model", "qwen2.5-7b", HF_ENDPOINT=hub)
    assert (done.returncode, done.stderr) == (0, "")
    assert COMMIT in done.stdout
    after = file.read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(before) if line.startswith(b"hub_id")) + 1
    assert after == [*before[:place], f'revision = "{COMMIT}"\n'.encode(), *before[place:]]

    # Pinned again after a push: the line is replaced, what stands behind it stays.
    after[place] = f'revision = "{COMMIT}"  # seen to work\r\n'.encode()
    file.write_bytes(b"".join(after))
    monkeypatch.setattr(Hub, "commit", "b" * 40)
    assert run_script(copy, "pin", "--model", "qwen2.5-7b", HF_ENDPOINT=hub).returncode == 0
    after[place] = f'revision = "{"b" * 40}"  # seen to work\r\n'.encode()
    assert file.read_bytes() == b"".join(after)
    assert {other: other.read_bytes() for other in file.parent.iterdir() if other != file} == others


@pytest.mark.slow
def test_pin_shows_the_hub_the_token(copy, hub):
    file = copy / "recipes/models/gemma-2-9b.toml"
    before = file.read_bytes()
    refused = run_script(copy, "pin", "--model", "gemma-2-9b", HF_ENDPOINT=hub)
    assert refused.returncode == 3
    assert "licence is not accepted, or HF_TOKEN is not set" in refused.stderr
    assert file.read_bytes() == before
    assert run_script(copy, "pin", "--model", "gemma-2-9b", HF_ENDPOINT=hub, HF_TOKEN="hf_good").returncode == 0
    assert f'revision = "{COMMIT}"'.encode() in file.read_bytes()


@pytest.mark.slow
def test_pin_without_the_repository_or_the_hub_changes_nothing(copy, hub):
    file = copy / "recipes/models/qwen3-8b.toml"
    before = file.read_bytes()
    missing = run_script(copy, "pin", "--model", "qwen3-8b", HF_ENDPOINT=hub)
    unreachable = run_script(copy, "pin", "--model", "qwen3-8b", HF_ENDPOINT="http://127.0.0.1:9")
    offline = run_script(copy, "pin", "--model", "qwen3-8b", HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    for refused in (missing, unreachable, offline):
        assert (refused.returncode, refused.stdout) == (3, "")
        assert refused.stderr.startswith("cannot pin Qwen/Qwen3-8B")
        assert refused.stderr.count("\n") == 1
    assert "no such repository" in missing.stderr
    assert file.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["pin", "--model", "tiny"], ["pin", "--model", "qwen2.5-7"], ["pin"], ["models", "--all"]]
)
def test_wrong_arguments_exit_2(copy, arguments):
    refused = run_script(copy, *arguments)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "Traceback" not in refused.stderr


def test_list_piped_is_one_whole_line_per_card(copy):
    done = run_script(copy, "models", COLUMNS="40")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert lines.keys() == set(card_names())
    assert lines["qwen2.5-72b"].split() == [
        *("qwen2.5-72b", "72.7", "B", "32768", "Qwen", "no", "sft", "dpo", "kto", "grpo", "reward"),
        "Qwen/Qwen2.5-72B-Instruct",
    ]
    for name, line in lines.items():
        assert line.rstrip().endswith(read_card(name).hub_id or read_card(name).path)


def test_list_fits_a_screen_of_100_columns_and_without_hub_ids_one_of_80(copy):
    done = run_script(copy, "models", COLUMNS="100", TTY_COMPATIBLE="1", NO_COLOR="1")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert max(map(len, plain.splitlines())) <= 100
    assert "meta-llama/Llama-3.1-8B-Instruct" in plain
    done = run_script(copy, "models", COLUMNS="80", TTY_COMPATIBLE="1", NO_COLOR="1")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    assert max(map(len, lines)) <= 80
    assert "meta-llama" not in done.stdout  # in 12 columns an id would be broken several times
    assert len(lines) <= len(card_names()) + 5  # a line for each, but for lists of methods


def test_a_hub_model_that_cannot_be_downloaded_has_a_message_of_two_lines():
    """conftest.py sets HF_HUB_OFFLINE, so this is a machine without a network and an empty cache."""
    with pytest.raises(MachineError, match=r"^nobody/nothing cannot be loaded: .*\nCheck the network, HF_ENDPOINT"):
        load_tokenizer(find_model("nobody/nothing"))


def test_a_directory_without_a_tokenizer_has_a_message_of_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(find_model(str(tmp_path)))


def test_modelscope_is_used_with_its_variable_only(monkeypatch):
    hub, tiny = find_model("nobody/nothing"), find_model("tiny")
    assert fetch(hub) == hub
    monkeypatch.setenv("UNSLOTH_USE_MODELSCOPE", "1")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)  # not 4 tries in 7 s
    assert fetch(tiny) == tiny
    with pytest.raises(MachineError, match=r"^nobody/nothing: cannot be downloaded from ModelScope"):
        fetch(hub)
