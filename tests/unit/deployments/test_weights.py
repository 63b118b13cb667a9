from __future__ import annotations

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from deployments.weights import WeightCache, weight_key


class Weights:
    """Something that a weak reference can watch."""


def test_two_that_load_at_once_load_once():
    cache, started = WeightCache(), threading.Barrier(8)
    loads: list[Weights] = []

    def load() -> Weights:
        loads.append(Weights())
        return loads[-1]

    def lease():
        started.wait(10)
        return cache.lease("k", load)

    with ThreadPoolExecutor(8) as pool:
        leases = [f.result(10) for f in [pool.submit(lease) for _ in range(8)]]
    assert len(loads) == 1
    assert sum(lease.reused for lease in leases) == 7
    assert {id(lease.value) for lease in leases} == {id(loads[0])}


def test_weights_go_with_the_last_lease():
    cache = WeightCache()
    first, second = cache.lease("k", Weights), cache.lease("k", Weights)
    watch = weakref.ref(first.value)
    first.release()
    first.release()
    gc.collect()
    assert watch() is not None and cache.leases("k") == 1
    second.release()
    assert watch() is None and len(cache) == 0
    with pytest.raises(RuntimeError):
        _ = second.value
    with cache.lease("k", Weights) as third:
        assert not third.reused


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failed_load_leaves_no_trace(failure):
    cache = WeightCache()

    def fail() -> Weights:
        raise failure()

    with pytest.raises(failure):
        cache.lease("k", fail)
    assert len(cache) == 0
    assert not cache.lease("k", Weights).reused


def test_who_waits_for_a_failing_load_loads_itself():
    cache, loading, go_on = WeightCache(), threading.Event(), threading.Event()

    def fail() -> Weights:
        loading.set()
        assert go_on.wait(10)
        raise ValueError

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.lease, "k", fail)
        assert loading.wait(10)
        second = pool.submit(cache.lease, "k", Weights)
        go_on.set()
        assert isinstance(first.exception(10), ValueError)
        assert not second.result(10).reused


def test_different_keys_load_side_by_side():
    cache, both = WeightCache(), threading.Barrier(2)

    def load() -> Weights:
        both.wait(10)  # each needs the other to be loading too
        return Weights()

    with ThreadPoolExecutor(2) as pool:
        leases = [pool.submit(cache.lease, key, load) for key in ("a", "b")]
        assert not any(lease.result(10).reused for lease in leases)


def test_key_follows_the_file_and_the_device(tmp_path):
    file, link = tmp_path / "model.pt", tmp_path / "link.pt"
    file.write_bytes(b"one")
    link.symlink_to(file)
    key = weight_key(file, "cpu")
    assert weight_key(link, "cpu") == key
    assert weight_key(file, "cuda:0") != key
    assert weight_key(file, "cpu", "option") != key
    replacement = tmp_path / "new.pt"
    replacement.write_bytes(b"two")
    os.replace(replacement, file)
    assert weight_key(file, "cpu") != key
