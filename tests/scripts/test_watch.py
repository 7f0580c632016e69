"""`make watch` and `make report` as a user types them: what is served, to whom, and how it ends."""

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
import watch
from common.errors import InputError
from conftest import ROOT

RECORD = {"recipe": "sft", "status": "running", "arguments": {"model": {"value": "tiny", "from": "recipe"}}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has begun and logged nothing."""
    folder = tmp_path / "try"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture
def port(run: Path) -> Iterator[int]:
    with watch.server([run], 0) as serving:
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield serving.server_port
        serving.shutdown()


def get(port: int, path: str = "/", host: str = "localhost") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def log(run: Path, step: int) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": step, "loss": 1 / step}) + "\n")


def test_a_run_is_served_from_before_its_first_metric_to_its_end(run, port):
    assert "No step has been logged yet" in get(port)[1]
    log(run, 1)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    status, page = get(port)
    assert (status, '"y":[1.0]' in page) == (200, True)
    (run / "run.json").write_text(json.dumps(RECORD | {"status": "done"}))
    assert "done</b>" in get(port)[1]
    assert len(page) < 100_000  # the library is fetched once
    assert get(port, "/plotly.js")[0] == 200
    shutil.rmtree(run)
    assert get(port) == (404, f"{run}: holds no run; give the folder of a run, which has a run.json")


def test_only_this_machine_is_served_and_only_the_report(port):
    assert [get(port, host=host)[0] for host in ("127.0.0.1", f"localhost:{port}", "[::1]:1")] == [200, 200, 200]
    assert [get(port, host=host)[0] for host in ("evil.example", "localhost.evil.example:80", "", "[")] == [403] * 4
    assert [get(port, path)[0] for path in ("/run.json", "/../run.json", "/%2e%2e/run.json")] == [404, 404, 404]


def test_a_port_that_is_in_use_or_is_none_is_refused(run, port):
    with pytest.raises(InputError, match=rf"--port {port}: in use; give another one"):
        watch.server([run], port)
    with pytest.raises(InputError, match=r"--port 70000: expected 0 to 65535"):
        watch.server([run], 70000)


@pytest.mark.slow
def test_ctrl_c_ends_watch_and_report_writes_the_file(run):
    command = [sys.executable, str(ROOT / "scripts" / "watch.py"), "--run", str(run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    port = int(re.search(r"http://127\.0\.0\.1:(\d+) shows", process.stdout.readline())[1])
    assert get(port)[0] == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    assert process.communicate()[1] == ""
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), "--run"]
    done = subprocess.run([*command, str(run)], capture_output=True, text=True)
    assert done.stdout == f"{run}/report.html written\n", done.stderr
    assert "SFT of tiny" in (run / "report.html").read_text(encoding="utf-8")
    done = subprocess.run([*command, str(run / "none")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    record = (run / "run.json").read_bytes()
    done = subprocess.run([*command, str(run), "--output", str(run / "run.json")], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert (run / "run.json").read_bytes() == record


@pytest.mark.slow
@pytest.mark.skipif(browser.PROGRAM is None, reason="chromium is not installed")
def test_a_browser_follows_a_run(run, port, monkeypatch):
    monkeypatch.setattr("common.pages.report.REFRESH", 0.2)
    with browser.browser() as tab:
        tab.open(f"http://127.0.0.1:{port}/")
        assert "No step has been logged yet" in tab.value("document.body.innerText")
        for step in (1, 2, 3):
            log(run, step)
        tab.wait("document.querySelector('.plot')?.data?.[0].x.length === 3")
        tab.value("Plotly.relayout(document.querySelector('.plot'), {'xaxis.range': [1, 2]})&&0")
        log(run, 4)
        tab.wait("document.querySelector('.plot').data[0].x.length === 4")
        assert tab.value("document.querySelector('.plot').layout.xaxis.range") == [1, 2]  # what the reader zoomed to
        (run / "run.json").write_text(json.dumps(RECORD | {"status": "done"}))
        tab.wait("document.querySelector('#outcome b').textContent === 'done'")
        assert tab.errors == []
        assert {request.rsplit("/", 1)[0] for request in tab.requests} == {f"http://127.0.0.1:{port}"}
