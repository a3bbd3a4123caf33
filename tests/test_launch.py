"""Launches of scripts that need no KerasTuner, and with -m slow of searches in which processes die."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kopt.tuner.launch import Launch, parsed
from kopt.tuner.processes import Child
from tests.conftest import BACKEND

pytestmark = pytest.mark.skipif(
    BACKEND != "tensorflow", reason="processes that train nothing: a backend is as good as another"
)

SEARCH = """
import os, signal, sys, time
from pathlib import Path
import keras_tuner

DIRECTORY, MODE = Path(sys.argv[1]), sys.argv[2]

class Tuner(keras_tuner.GridSearch if MODE == "grid" else keras_tuner.RandomSearch):
    def run_trial(self, trial):
        x = trial.hyperparameters.get("x")
        dies = DIRECTORY / "dies"
        if trial.trial_id == "2" and not dies.exists():
            dies.touch()
            if MODE in ("chief", "grid"):
                os.kill(int((DIRECTORY / "pid").read_text()), signal.SIGKILL)
            if MODE == "worker":
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        if MODE == "broken":
            raise KeyError("a mistake")
        return float("nan") if MODE == "nan" else x * x

if os.environ["KERASTUNER_TUNER_ID"] == "chief":
    (DIRECTORY / "pid").write_text(str(os.getpid()))
space = keras_tuner.HyperParameters()
space.Float("x", -1, 1, step=0.25 if MODE == "grid" else None)
options = {"directory": DIRECTORY, "project_name": "search", "overwrite": MODE != "kept"}
tuner = Tuner(hyperparameters=space, max_trials=8, seed=1, **options)
print("trials at the beginning:", len(getattr(tuner.oracle, "trials", [])))
tuner.search()
print("best:", tuner.oracle.get_best_trials()[0].score)
"""


@pytest.fixture
def launched(tmp_path, capfd):
    """Launch a script in this process: its exit code, its lines, and what the launcher said."""

    def launch(script, *options, arguments=()):
        (tmp_path / "script.py").write_text(script)
        given = [*options, "--workers", "2", str(tmp_path / "script.py"), *map(str, arguments)]
        code = Launch(parsed(given)).run()
        captured = capfd.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return launch


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it has taken too long"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--workers", "0"], "`workers` must be an integer of 1 or more, below 2**31. Received: workers=0"),
        (["--workers", "two"], "`workers` must be an integer of 1 or more, below 2**31. Received: workers='two'"),
        (["--restarts", "-1"], "`restarts` must be an integer of 0 or more, below 2**31. Received: restarts=-1"),
        (["--grace", "nan"], "`grace` must be a finite number of 0 or more. Received: grace=nan"),
        (["--port", "65536"], "Received: port=65536"),
        (["--port", "0"], "`port` must be an integer of 1 or more, below 2**31. Received: port=0"),
        (["--gpus"], "Received: gpus=True"),
    ],
)
def test_what_is_refused(given, message, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as refused:
        parsed(["--workers", "1", *given, __file__])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_a_script_and_a_free_port_are_needed(capsys, tmp_path):
    for given in (["--workers", "1", str(tmp_path)], ["--workers", "1", "none.py"]):
        with pytest.raises(SystemExit):
            parsed(given)
        assert f"`script` must be a file. Received: script={given[-1]!r}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed([__file__])
    assert "--workers" in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            parsed(["--workers", "1", "--port", str(port), __file__])
        assert re.search(rf"`port` must be a free port .*in use.* Received: port={port}", capsys.readouterr().err)
    assert parsed(["--workers", "1", "--port", str(port), __file__]).port == port


def test_each_has_its_place_and_the_arguments_of_the_script(launched, tmp_path):
    script = """
import os, sys
sys.stdin.read()
named = ("IP", "PORT", "ID")
print([os.environ[key] for key in ("KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT", "KERASTUNER_TUNER_ID")])
print(__name__, sys.argv[1:], sys.path[0] == os.path.dirname(__file__), "keras" in sys.modules)
"""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    code, out, err = launched(script, "--port", port, arguments=["--workers", "7", "x"])
    assert code == 0
    assert err[-1] == "[launch] All have finished."
    for name in ("chief", "worker0", "worker1"):
        assert f"[{name}] ['127.0.0.1', '{port}', '{name}']" in out
        assert f"[{name}] __main__ ['--workers', '7', 'x'] True False" in out


def test_gpus_go_around(launched, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-7")
    _, out, _ = launched("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])", "--gpus")
    assert sorted(out) == ["[chief] ", "[worker0] 5", "[worker1] GPU-7"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    _, out, _ = launched("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])", "--gpus")
    assert sorted(out) == ["[chief] ", "[worker0] 3", "[worker1] 3"]


def test_no_line_is_lost(launched):
    script = """
import os, sys
for i in range(20_000):
    print(i)
os.write(2, b"a\\rb\\r\\n\\xff\\nno end")
os._exit(0)
"""
    _, out, _ = launched(script)
    for name in ("chief", "worker0", "worker1"):
        lines = [line.removeprefix(f"[{name}] ") for line in out if line.startswith(f"[{name}]")]
        assert lines[:20_000] == [str(i) for i in range(20_000)]
        assert lines[20_000:] == ["a", "b", "\ufffd", "no end"] or lines[20_000:][:2] == ["a", "b"]


def test_lines_come_when_they_are_printed(launched, tmp_path, monkeypatch):
    script = """
import os, sys, time
print("on")
for _ in range(2000):
    time.sleep(0.01)
    if os.path.exists(f"{sys.argv[1]}/{os.environ['KERASTUNER_TUNER_ID']}"):
        sys.exit()
sys.exit("nobody has read this")
"""
    monkeypatch.setattr(Child, "_pass_on", lambda child, lines: (tmp_path / child.name).touch() if lines else None)
    assert launched(script, "--restarts", "0", arguments=[tmp_path])[0] == 0


@pytest.mark.parametrize("dying", ["sys.exit(3)", "os.kill(os.getpid(), 9)", "1 / 0"])
@pytest.mark.parametrize("name", ["chief", "worker1"])
def test_who_dies_is_started_again(name, dying, launched, tmp_path):
    script = f"""
import os, sys, time
from pathlib import Path
name = os.environ["KERASTUNER_TUNER_ID"]
print("I begin")
if name == {name!r} and not Path(sys.argv[1]).exists():
    Path(sys.argv[1]).touch()
    {dying}
while not Path(sys.argv[1]).exists():
    time.sleep(0.01)
time.sleep(0.5)
"""
    code, out, err = launched(script, "--restarts", "1", arguments=[tmp_path / "marker"])
    assert code == 0
    assert out.count(f"[{name}] I begin") == 2
    assert out.count("[worker0] I begin") == 1
    how = "was killed by SIGKILL" if "kill" in dying else f"ended with exit code {3 if 'exit' in dying else 1}"
    assert f"[launch] {name} {how}; it is started again (1 of 1)." in err


def test_who_always_dies_ends_the_launch(launched, tmp_path):
    script = """
import os, subprocess, sys, time
from pathlib import Path
name = os.environ["KERASTUNER_TUNER_ID"]
(Path(sys.argv[1]) / f"{os.getpid()}.pid").touch()
if name == "worker0":
    while len(list(Path(sys.argv[1]).glob("*.pid"))) < 5:
        time.sleep(0.01)
    print("too bad")
    sys.exit(4)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
(Path(sys.argv[1]) / f"{child.pid}.pid").touch()
time.sleep(100)
"""
    code, out, err = launched(script, "--restarts", "2", arguments=[tmp_path])
    assert code == 1
    assert out.count("[worker0] too bad") == 3
    assert err[-3:] == [
        "[launch] The last lines of worker0:",
        "[launch]   too bad",
        "[launch] Stopped: worker0 ended with exit code 4 after 2 restarts.",
    ]
    pids = [int(file.stem) for file in tmp_path.glob("*.pid")]
    assert len(pids) == 7
    until(lambda: all(map(gone, pids)), 2)  # a killed process takes a moment to end


def test_a_chief_that_does_not_end_is_ended(launched):
    script = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(100 if os.environ["KERASTUNER_TUNER_ID"] == "chief" else 0)
"""
    code, _, err = launched(script, "--grace", "0.5")
    assert code == 1
    assert err[-1] == "[launch] Stopped: chief had not ended 0.5 s (--grace) after the last worker."


def test_a_chief_that_fails_after_the_search_is_not_started_again(launched):
    script = """
import os, time
if os.environ["KERASTUNER_TUNER_ID"] == "chief":
    time.sleep(1)
    raise RuntimeError("no results")
"""
    code, out, err = launched(script)
    assert code == 1
    assert out.count("[chief] RuntimeError: no results") == 1
    assert err[-2:] == [
        "[launch]   RuntimeError: no results",
        "[launch] Stopped: chief ended with exit code 1 when the search was over.",
    ]


def test_a_worker_without_a_chief_is_ended(launched):
    script = "import os, time; time.sleep(100 if os.environ['KERASTUNER_TUNER_ID'] == 'worker1' else 0)"
    code, _, err = launched(script, "--grace", "0.5")
    assert code == 1
    assert err[-1] == "[launch] Stopped: worker1 had not ended 0.5 s (--grace) after the chief."


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGPIPE])
def test_a_launcher_that_ends_leaves_no_child(number, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.SIG_IGN)
(Path(sys.argv[1]) / f"{os.getpid()}.pid").touch()
while True:
    print("on")
    time.sleep(0.1)
""")
    command = [sys.executable, "-m", "kopt.tuner.launch", "--workers", "2", str(script), str(tmp_path)]
    heard = [signal.SIGINT, signal.SIGTERM]  # of which a shell has the first ignored by what runs in the background
    before = [signal.signal(one, signal.SIG_DFL) for one in heard]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for one, handler in zip(heard, before, strict=True):
        signal.signal(one, handler)
    until(lambda: len(list(tmp_path.glob("*.pid"))) == 3, 60)
    if number == signal.SIGPIPE:
        launcher.stdout.close()
    else:
        launcher.send_signal(number)
    try:
        err = launcher.communicate(timeout=20)[1]
    finally:
        launcher.kill()
    assert launcher.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    until(lambda: all(gone(int(file.stem)) for file in tmp_path.glob("*.pid")), 2)
    if number != signal.SIGKILL:
        assert err.splitlines()[-1] == f"[launch] Stopped by {signal.Signals(number).name}."


def statuses(tmp_path, project="search"):
    return [json.loads(file.read_text())["status"] for file in sorted(tmp_path.glob(f"{project}/trial_*/trial.json"))]


def restarted(err):
    return [line.split()[1] for line in err if "started again" in line]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nobody", "worker", "chief", "grid"])
def test_a_search_ends_whoever_dies(mode, launched, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    began = time.monotonic()
    code, out, err = launched(SEARCH, arguments=[tmp_path, mode])
    assert code == 0
    assert statuses(tmp_path) == ["COMPLETED"] * 8
    state = json.loads((tmp_path / "search" / "oracle.json").read_text())
    assert sorted(state["end_order"]) == [str(i) for i in range(8)]  # none twice
    for name in ("chief", "worker0", "worker1"):
        assert sum(bool(re.match(rf"\[{name}\] best: 0\.", line)) for line in out) == 1
    assert [name.rstrip("01") for name in restarted(err)] == {"nobody": [], "worker": ["worker"]}.get(mode, ["chief"])
    if mode in ("chief", "grid"):
        assert any(re.fullmatch(r"\[chief\] trials at the beginning: [34]", line) for line in out)
    assert time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["nan", "broken"])
def test_a_search_of_failures_ends_and_says_so(mode, launched, tmp_path):
    began = time.monotonic()
    code, out, err = launched(SEARCH, arguments=[tmp_path, mode])
    assert code == 0
    stopped = "[chief] The search is stopped. Number of consecutive failures exceeded the limit of 3."
    assert out.count(stopped) == 1
    assert any("KeyError: 'a mistake'" in line for line in out) == (mode == "broken")
    assert not restarted(err)
    assert set(statuses(tmp_path)) == {"FAILED"}
    assert 3 <= len(statuses(tmp_path)) <= 4  # one may have run beside the third
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_overwrite_wipes_once_and_nothing_else_does(launched, tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "old.txt").touch()
    launched(SEARCH, arguments=[tmp_path, "nobody"])
    assert not (tmp_path / "search" / "old.txt").exists()
    (tmp_path / "search" / "old.txt").touch()
    code, out, _ = launched(SEARCH, arguments=[tmp_path, "kept"])
    assert code == 0
    assert "[chief] trials at the beginning: 8" in out
    assert (tmp_path / "search" / "old.txt").exists()
    assert statuses(tmp_path) == ["COMPLETED"] * 8


@pytest.mark.slow
def test_the_script_chooses_the_backend(launched, tmp_path):
    script = """
import os
os.environ["KERAS_BACKEND"] = "numpy"
import keras_tuner, keras
print(keras.backend.backend(), keras_tuner.engine.base_tuner.BaseTuner.__init__.__code__.co_filename)
"""
    _, out, _ = launched(script)
    assert sum(bool(re.match(r"\[.*\] numpy .*mends.py", line)) for line in out) == 3


RATES = """
import os, signal, sys
from pathlib import Path
import keras, numpy as np
import kopt.tuner

DIRECTORY, MODE = Path(sys.argv[1]), sys.argv[2]

def build(learning_rate):
    dies, name = DIRECTORY / "dies", os.environ.get("KERASTUNER_TUNER_ID")
    if MODE == "worker" and name == "worker1" and not dies.exists() and len(list(DIRECTORY.glob("*/trial_*"))) > 4:
        dies.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(kopt.SGD(learning_rate), loss="mse")
    return model

x = np.random.default_rng(0).normal(size=(64, 2)) * (np.nan if MODE == "nan" else 1)
search = kopt.tuner.LearningRateSearch(
    build, "loss", stages=[(4, 1), (2, 2)], confirm=1, max_widen=0, directory=DIRECTORY, project_name=MODE)
search.search(x, x.sum(1), epochs=2, batch_size=8, verbose=0)
print("answer:", search.best_learning_rate, len(search.result.trials))
"""


def answers(lines) -> list[str]:
    return [line.split("answer:")[1] for line in lines if "answer:" in line]


@pytest.mark.slow
def test_workers_find_the_rate_that_one_process_finds(launched, tmp_path):
    """Also where one of them is killed in a trial; launched again, the search is over."""
    code, out, err = launched(RATES, arguments=[tmp_path, "worker"])
    assert code == 0
    assert restarted(err) == ["worker1"]
    (alone,) = answers(
        subprocess.check_output([sys.executable, tmp_path / "script.py", tmp_path, "alone"], text=True).splitlines()
    )
    assert answers(out) == [alone] * 3
    assert statuses(tmp_path, "worker") == statuses(tmp_path, "alone")
    code, out, err = launched(RATES, arguments=[tmp_path, "worker"])
    assert (code, answers(out), restarted(err)) == (0, [alone] * 3, [])


@pytest.mark.slow
def test_workers_of_a_search_where_all_is_nan_end(launched, tmp_path):
    code, out, err = launched(RATES, arguments=[tmp_path, "nan"])
    assert code == 0
    assert not restarted(err)
    assert [answer.split()[0] for answer in answers(out)] == ["None"] * 3
    assert any("Every learning rate of stage 1 has diverged or failed" in line for line in out)
