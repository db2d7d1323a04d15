"""Tests that wait for what other processes do."""

from __future__ import annotations

import time


def wait_for(happens) -> None:
    for _ in range(600):
        if happens():
            return
        time.sleep(0.1)
    raise AssertionError("it never happened")
