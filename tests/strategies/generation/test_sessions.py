"""Sessions of generation: together as alone, bounded, and none in another's cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models import Cut
from models.parts import Part, split_unchecked
from models.ragged import Ragged, Unbatchable
from models.tiny import roughen, tiny_config
from strategies.errors import TrunkError
from strategies.generation.engine import GenerationEngine
from strategies.generation.memory import MIB, Limits

D = 32


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> Iterator[None]:
    with torch.no_grad():
        yield


def trunk(family: str = "mistral") -> Part:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager")
    return split_unchecked(roughen(model).eval(), Cut(1, 1)).trunk


def engine(family: str = "mistral", **limits: Any) -> GenerationEngine:
    return GenerationEngine(trunk(family), Limits(**limits))


def noise(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(rows, tokens, D, generator=torch.Generator().manual_seed(seed))


def texts(number: int) -> list[Tensor]:
    """Activations of texts of different lengths, (1, T, D)."""
    return [noise(1, 5 + 2 * i, seed=i) for i in range(number)]


def step_by_step(session: Any, h_1TD: Tensor) -> Tensor:
    """The trunk's output for a text whose first three positions come at once, the others singly."""
    outputs = [session.forward(h_1TD[:, :3])]
    for at in range(3, h_1TD.shape[1]):
        outputs.append(session.forward(h_1TD[:, at : at + 1], length=at))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2", "qwen2", "deepseek_v2"])
def test_sessions_together_are_each_alone(family: str) -> None:
    part, served = trunk(family), engine(family)
    assert bool(served.one_by_one) == (family == "deepseek_v2")
    bell = threading.Barrier(6)

    def one(i: int, h_1TD: Tensor) -> Tensor:
        session = served.open(str(i))
        bell.wait()
        return step_by_step(session, h_1TD)

    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(one, range(6), texts(6)))
    for output, h_1TD in zip(got, texts(6), strict=True):
        assert torch.allclose(output, part(h_1TD), atol=1e-5)


def test_tokens_that_wait_go_together() -> None:
    served, started, go = engine(), threading.Event(), threading.Event()
    sessions = [served.open(str(i)) for i in range(5)]
    for session in sessions:
        session.forward(noise(1, 4, seed=1))
    run = served._batcher._alone

    def slow(job: Any) -> Tensor:
        started.set()
        go.wait(10)
        return run(job)

    served._batcher._alone = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(sessions[0].forward, noise(1, 3, seed=2), length=4)
        started.wait(10)
        rest = [pool.submit(each.forward, noise(1, 1, seed=3), length=4) for each in sessions[1:]]
        while served.waiting < 4:
            pass
        go.set()
        outputs = [each.result() for each in rest]
        first.result()
    assert served.forwards == (5 + 1 + 1, 5 + 1 + 4)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_family_that_is_not_the_same_together_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.ragged._own", lambda module: lambda *args, **kw: (args[1] * 0,))
    with pytest.raises(Unbatchable, match="differ"):
        Ragged(trunk())


def test_rows_are_chosen_and_set_back() -> None:
    part, session = trunk(), engine().open("one")
    h_BTD, new_BTD = noise(3, 6, seed=1), noise(2, 2, seed=2)
    session.forward(h_BTD)

    got = session.forward(new_BTD, rows=(2, 0), length=4)

    want = part(torch.cat([h_BTD[[2, 0], :4], new_BTD], 1))[:, 4:]
    assert torch.allclose(got, want, atol=1e-5)


def test_a_window_that_is_forgotten_is_gone() -> None:
    session = engine().open("one")
    for at in range(0, 12, 2):
        session.forward(noise(1, 2, seed=at), length=at)
    with pytest.raises(TrunkError, match="forgotten") as caught:
        session.forward(noise(1, 1, seed=0), length=6)
    assert caught.value.kind == "gone"
    with pytest.raises(TrunkError, match="lost by an error"):
        session.forward(noise(1, 1, seed=0), length=6)


def test_a_fork_goes_on_by_itself() -> None:
    part, served = trunk("llama"), engine("llama")
    one, h_1TD = served.open("one"), noise(1, 9, seed=1)
    one.forward(h_1TD[:, :6])
    other = served.open("two", fork="one")

    ahead = one.forward(h_1TD[:, 6:], length=6)
    got = other.forward(h_1TD[:, 7:8], length=5)

    assert torch.allclose(ahead, part(h_1TD)[:, 6:], atol=1e-5)
    want = part(torch.cat([h_1TD[:, :5], h_1TD[:, 7:8]], 1))[:, 5:]
    assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(TrunkError, match="not there"):
        served.open("three", fork="nobody")


def test_memory_is_bounded_and_the_idle_give_way() -> None:
    small = engine("llama", total_mb=0.1, session_mb=0.06, idle=0.0, tokens=400, length=400)
    positions = int(0.05 * MIB / small._each)
    first, second = small.open("first"), small.open("second")
    long_1TD = torch.zeros(1, positions, D)
    first.forward(long_1TD)
    second.forward(long_1TD)
    assert 0 < first.bytes <= 0.06 * MIB

    third = small.open("third")
    third.forward(long_1TD[:, : positions // 2])

    assert small.memory.bytes <= 0.1 * MIB
    with pytest.raises(TrunkError, match="others needed its memory") as caught:
        first.forward(long_1TD[:, :1], length=positions)
    assert caught.value.kind == "gone"
    with pytest.raises(TrunkError, match="--session-kv-mb") as caught:
        third.forward(torch.zeros(3, positions, D))
    assert caught.value.kind == "full"


def test_who_is_at_work_does_not_give_way() -> None:
    busy = engine("llama", total_mb=0.02, idle=60.0)
    busy.open("first").forward(torch.zeros(1, 60, D))
    with pytest.raises(TrunkError, match="--kv-mb") as caught:
        busy.open("second").forward(torch.zeros(1, 60, D))
    assert caught.value.kind == "full"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"h": noise(1, 1, 0)[:, :, :5]}, "takes"),
        ({"h": noise(2, 1, 0)}, "2 rows came"),
        ({"h": noise(1, 1, 0) / 0}, "not finite"),
        ({"h": noise(1, 1, 0), "length": 5}, "are there"),
        ({"h": noise(1, 1, 0), "length": -1}, "are there"),
        ({"h": noise(1, 1, 0), "rows": (3,)}, "rows 3 to 3"),
        ({"h": noise(1, 1, 0), "mask_BT": torch.ones(1, 2)}, "mask have shape"),
        ({"h": noise(1, 1, 0), "positions_BT": torch.tensor([[64]])}, "beyond"),
        ({"h": noise(1, 61, 0)}, "the model has 64"),
        ({"h": noise(65, 1, 0), "length": 0}, "65 rows"),
        ({"h": noise(1, 1, 0), "keep": False}, "must keep"),
    ],
)
def test_a_forward_that_makes_no_sense_is_refused(how: dict[str, Any], words: str) -> None:
    session = engine("llama").open("one")
    h_1TD = noise(1, 4, seed=1)
    session.forward(h_1TD)
    h_BTD = how.pop("h")
    with pytest.raises(TrunkError, match=words):
        session.forward(h_BTD, **{"length": 4, **how})
    session.forward(h_1TD[:, :1], length=4)  # nothing is lost


def test_a_session_that_is_closed_holds_nothing() -> None:
    served = engine("llama")
    session = served.open("one")
    session.forward(noise(1, 4, seed=1))
    served.close("one")
    assert served.memory.bytes == 0
    with pytest.raises(TrunkError, match="closed"):
        session.forward(noise(1, 1, seed=1), length=4)


def test_what_waits_is_done_before_the_end() -> None:
    served = engine("llama")
    sessions = [served.open(str(i)) for i in range(4)]
    go, run = threading.Event(), served._batcher._alone

    def slow(job: Any) -> Tensor:
        go.wait(10)
        return run(job)

    served._batcher._alone = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(each.forward, noise(1, 3, seed=1)) for each in sessions]
        time.sleep(0.3)  # one is at work, the others wait
        end = pool.submit(served._batcher.stop)
        go.set()
        end.result(timeout=20)
        assert all(each.result(timeout=20).shape == (1, 3, D) for each in waiting)
    with pytest.raises(TrunkError, match="has stopped"):
        sessions[0].forward(noise(1, 1, seed=1), length=3)
