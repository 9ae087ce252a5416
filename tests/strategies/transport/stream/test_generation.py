"""Generation over the stream: equal to an engine nearby, whatever happens on the way."""

from __future__ import annotations

import torch

from tests.strategies.transport.stream.generation_helpers import (
    Near,
    SumEngine,
    numbers,
    opened,
    serving,
)


def test_a_session_far_away_does_what_one_nearby_does() -> None:
    """Prefill with padding, single tokens, rows chosen, set back, nothing kept."""
    engine, near = SumEngine(), Near()
    mask = torch.tensor([[False, True, True], [True, True, True]])
    calls = (
        (numbers(0), {"mask_BT": mask}),
        (numbers(1, 2, 1), {"length": 3}),
        (numbers(2, 3, 1), {"length": 4, "rows": (1, 0, 1)}),
        (numbers(3, 3, 2), {"length": 2, "positions_BT": torch.tensor([[7, 9]] * 3)}),
        (numbers(4, 3, 2), {"length": 4, "keep": False}),
        (numbers(7, 3, 9), {"length": 4}),
        (numbers(5, 3, 1), {"length": 4}),
        (numbers(6, 1, 1), {"length": 0}),
    )
    with serving(engine) as service:
        far = opened(service)
        for h, how in calls:
            assert torch.equal(far.forward(h, **how).h_BTD, near.forward(h, **how)), how
        far.close()
    assert engine.memory.bytes == 0
