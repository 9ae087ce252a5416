"""A process of one's own for a benchmark: told what to do over a pipe, ended with its context."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


@contextmanager
def worker(
    work: Callable[..., None], *arguments: Any, patience: float = 10.0
) -> Iterator[tuple[Connection, BaseProcess]]:
    """Run `work(pipe, *arguments)` in a fresh process, whose pipe ends with the context.

    Parameters
    ----------
    work : callable
        A function of a module; it returns when its pipe ends.
    *arguments : Any
        What it takes besides; they must pickle.
    patience : float
        Seconds that it has for that, before it is terminated.

    Yields
    ------
    tuple
        The pipe to it, and the process.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    try:
        yield here, process
    finally:
        here.close()
        process.join(patience)
        if process.is_alive():
            process.terminate()
            process.join(5)
