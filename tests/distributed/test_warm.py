"""A process that starts warm is one like any other: its arguments, environment, output, status and signals."""

import json
import os
import signal
import subprocess

import pytest

from tests import warm

pytestmark = pytest.mark.distributed

SAYS = """
import json, os, sys, time
told = [sys.argv[1:], os.environ.get("SAID"), os.getcwd(), __name__, "torch" in sys.modules, hash("a")]
print(json.dumps(told), flush=True)
if "wait" in sys.argv:
    time.sleep(60)
sys.exit(int(sys.argv[1]))
"""


def command(tmp_path, *arguments):
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    return [warm.python(), "-u", str(script), *arguments]


@pytest.mark.parametrize("status", [0, 3])
def test_it_is_told_what_a_process_is_told_and_its_status_comes_back(tmp_path, status):
    environment = {**os.environ, "SAID": "so"}
    done = subprocess.run(command(tmp_path, str(status)), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == status
    assert json.loads(done.stdout)[:5] == [[str(status)], "so", str(tmp_path), "__main__", True]


def test_an_error_is_seen(tmp_path):
    done = subprocess.run(command(tmp_path, "no number"), capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: invalid literal" in done.stderr


def test_ranks_differ_in_their_hashes(tmp_path):
    hashes = set()
    for rank in ("0", "1"):
        done = subprocess.run(command(tmp_path, "0"), env={**os.environ, "RANK": rank}, capture_output=True, text=True)
        hashes.add(json.loads(done.stdout)[5])
    assert len(hashes) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it(tmp_path, number):
    process = subprocess.Popen(command(tmp_path, "0", "wait"), stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # it runs
    process.send_signal(number)
    assert process.wait(10) == -number
    with process.stdout:
        assert process.stdout.read() == ""  # returns once nobody is left that could write
