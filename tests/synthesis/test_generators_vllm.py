"""vLLM itself: the engine and its server on 127.0.0.1 with the nano backbone. Needs `make vllm-env`.

What every generator promises is asked of both in test_generators.py.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from data_tools.generators import GENERATORS, Answer, GeneratorDown, Request, Sampling
from mmembed.media import MediaStore
from tests.synthesis.record import CASES, ask
from tests.synthesis.servers import FaultyProxy
from tests.synthesis.stand_in import RECORDED
from tests.synthesis.test_generators_processes import alive, wait_until_gone

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def question(number):
    return Request(str(number), ({"role": "user", "content": f"a bus {number}"},), Sampling(seed=number, max_tokens=16))


def descendants(pid):
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:
            continue
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found[1:]


def test_engine_and_server_give_the_same_answers_in_the_form_that_was_recorded(vllm, served):
    answers, others = ask(vllm), ask(served)
    assert {key: answer for key, answer in answers.items() if isinstance(answer, Answer)} == {
        key: answer for key, answer in others.items() if isinstance(answer, Answer)
    }
    recorded = json.loads(RECORDED.read_text())
    assert [(one.key, set(said)) for one, (_, said) in zip(CASES, recorded["worker"]["exchanges"], strict=True)] == [
        (key, {"error"} if isinstance(answer, str) else {"text", "finish", "prompt_tokens", "tokens"})
        for key, answer in answers.items()
    ]


def test_the_real_server_through_a_proxy_that_spoils_a_fifth(served):
    requests = [question(number) for number in range(100)]
    expected = [future.result(120) for future in [served.submit(request) for request in requests]]
    proxy = FaultyProxy(served.server.port, share=0.2, seed=3)
    generator = GENERATORS.build({"type": "openai", "model": "mmembed-nano", "url": proxy.url, "concurrency": 16})
    generator.start(MediaStore())
    assert [future.result(120) for future in [generator.submit(request) for request in requests]] == expected
    generator.close()
    proxy.close()
    assert sum(proxy.counts[kind] for kind in FaultyProxy.KINDS) > 10


def test_an_engine_killed_in_the_middle_of_a_batch_is_asked_again(vllm):
    requests = [question(number) for number in range(120)]
    expected = [future.result(120) for future in [vllm.submit(request) for request in requests]]
    futures = [vllm.submit(request) for request in requests]
    futures[0].result(60)
    worker, guard = vllm._process, vllm._process.process.pid
    processes = descendants(guard)
    assert len(processes) >= 3, "the worker, the engine's process, and its worker"
    os.kill(processes[-1], signal.SIGKILL)
    assert [future.result(300) for future in futures] == expected
    assert vllm._process is not worker and wait_until_gone([guard, *processes], 5)


def test_a_server_killed_in_the_middle_of_a_batch_is_started_again(served):
    requests = [question(number) for number in range(120)]
    expected = [future.result(120) for future in [served.submit(request) for request in requests]]
    futures = [served.submit(request) for request in requests]
    futures[0].result(60)
    guard = served.server._child.process.pid
    processes = descendants(guard)
    os.kill(processes[0], signal.SIGKILL)
    assert [future.result(300) for future in futures] == expected
    assert wait_until_gone([guard, *processes], 5)


def test_an_argument_that_the_engine_has_not_is_named(need_vllm):
    generator = GENERATORS.build({"type": "vllm", "model": "mmembed-nano", "engine": {"max_model_length": 512}})
    with pytest.raises(GeneratorDown, match="vLLM has no option 'max_model_length'; did you mean 'max_model_len'?"):
        generator.start(MediaStore())
    generator.close()


def test_nothing_is_left_of_what_was_closed(vllm, served):
    """The last test of this module and of the session's generators that uses them."""
    for generator, guard in ((vllm, vllm._process.process.pid), (served, served.server._child.process.pid)):
        processes = [guard, *descendants(guard)]
        began = time.monotonic()
        generator.close()
        assert time.monotonic() - began < 20 and not any(map(alive, processes))
