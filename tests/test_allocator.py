"""Freed memory is kept where the C library can be told so, and nothing happens elsewhere."""

from __future__ import annotations

import platform

import pytest

from cgfedllm.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_glibc_accepts_the_settings():
    assert keep_freed_memory()


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert not keep_freed_memory()
