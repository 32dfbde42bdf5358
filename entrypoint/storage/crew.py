"""Threads that never keep the process from ending."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Crew:
    """At most `size` threads that work through calls, in their order.

    The standard library's executors wait at the end of the process for each of their threads, and one of
    ours may wait half a minute for a server that says nothing.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name = size, name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()

    def submit(self, call: Callable[[], T]) -> "Future[T]":
        """What `call` will have returned, or raised."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        with self._lock:
            if self._threads < self._size:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._threads += 1
        return future

    def leave(self) -> None:
        """Let the threads end, each after the call that it is at and those that nobody has cancelled."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _work(self) -> None:
        while item := self._calls.get():
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)


def settle(futures: Iterable["Future[Any]"], timeout: float | None = None) -> None:
    """Cancel what has not begun, and wait for what has."""
    wait([future for future in futures if not future.cancel()], timeout)
