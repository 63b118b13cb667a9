"""Gauges of a machine: CPU and memory of this one, GPUs of a library that answers as NVML does."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from configs.server import ServerSettings
from deployments.gauges import GPU_FAMILIES, Cpu, Gauges, Gpus, busy, find_gpus, sources


def values(lines):
    """By name and labels, as Prometheus's own parser for Python reads them."""
    return {
        (sample.name.removesuffix("_total"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families("\n".join(lines) + "\n")
        for sample in family.samples
    }


# --- CPU and memory ------------------------------------------------------------------------------


def test_cpu_and_memory_are_those_of_this_machine():
    found = values(Cpu().read())
    assert set(found) == {
        ("nv_cpu_utilization",),
        ("nv_cpu_memory_total_bytes",),
        ("nv_cpu_memory_used_bytes",),
    }
    assert 0 <= found["nv_cpu_utilization",] <= 1
    total = found["nv_cpu_memory_total_bytes",]
    assert total == psutil.virtual_memory().total
    assert 0 < found["nv_cpu_memory_used_bytes",] < total


def times(**spent):
    names = ("user", "nice", "system", "irq", "softirq", "steal", "idle", "iowait")
    return SimpleNamespace(**{name: float(spent.get(name, 0)) for name in names})


@pytest.mark.parametrize(
    ("later", "wanted"),
    [
        (times(user=30, idle=70), 0.3),
        (times(user=10, system=10, steal=10, irq=10, idle=20, iowait=40), 0.4),
        (times(idle=100), 0.0),
        (times(nice=50, softirq=50), 1.0),
        (times(), 0.0),  # the very same moment
    ],
)
def test_utilization_is_the_share_of_time_that_was_not_idle(later, wanted):
    assert busy(times(), later) == pytest.approx(wanted)


def test_systems_that_count_less_are_understood():
    assert busy(SimpleNamespace(user=1.0, idle=1.0), SimpleNamespace(user=2.0, idle=2.0)) == 0.5


# --- GPUs ----------------------------------------------------------------------------------------


class Nvml:
    """Two devices that answer as NVML does; of the second, energy is not supported."""

    def __init__(self, lost=False):
        self.lost = lost

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetUUID(self, gpu):
        return ["GPU-aaaa-1", b"GPU-bbbb-2"][gpu]

    def nvmlDeviceGetUtilizationRates(self, gpu):
        if self.lost:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(gpu=25 + gpu, memory=1)

    def nvmlDeviceGetMemoryInfo(self, gpu):
        if self.lost:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(total=80 << 30, used=1 << 30, free=79 << 30)

    def nvmlDeviceGetPowerUsage(self, gpu):
        if self.lost:
            raise RuntimeError("GPU is lost")
        return 71_500

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        if self.lost:
            raise RuntimeError("GPU is lost")
        return 700_000

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu):
        if gpu or self.lost:
            raise RuntimeError("Not Supported")
        return 123_456


def test_every_family_of_a_gpu_in_tritons_units():
    found = values(Gpus(Nvml()).read())
    first = {name: value for (name, uuid), value in found.items() if uuid == "GPU-aaaa-1"}
    assert first == {
        "nv_gpu_utilization": 0.25,
        "nv_gpu_memory_total_bytes": 80 << 30,
        "nv_gpu_memory_used_bytes": 1 << 30,
        "nv_gpu_power_usage": 71.5,
        "nv_gpu_power_limit": 700,
        "nv_energy_consumption": 123.456,
    }
    assert set(first) == {family.name for family in GPU_FAMILIES}


def test_labels_and_numbers_are_written_as_triton_writes_them():
    lines = Gpus(Nvml()).read()
    assert 'nv_gpu_memory_total_bytes{gpu_uuid="GPU-aaaa-1"} 85899345920' in lines
    assert 'nv_gpu_utilization{gpu_uuid="GPU-bbbb-2"} 0.26' in lines


def test_what_a_device_does_not_tell_has_no_series_and_the_rest_is_there():
    found = values(Gpus(Nvml()).read())
    second = {name for name, uuid in found if uuid == "GPU-bbbb-2"}
    assert second == {family.name for family in GPU_FAMILIES} - {"nv_energy_consumption"}
    library = Nvml()
    gpus = Gpus(library)
    library.lost = True
    assert gpus.read() == []


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        ("", {"GPU-aaaa-1", "GPU-bbbb-2"}),
        ("1", {"GPU-bbbb-2"}),
        ("0, 1", {"GPU-aaaa-1", "GPU-bbbb-2"}),
        ("GPU-aaaa", {"GPU-aaaa-1"}),
        ("7", set()),
    ],
)
def test_only_devices_that_the_server_may_use(visible, wanted):
    assert {uuid for _, uuid in values(Gpus(Nvml(), visible).read())} == wanted


def test_without_the_library_there_are_no_gpus_and_only_who_asked_is_told(caplog):
    assert find_gpus(asked=False, module="no_such_nvml") is None
    assert caplog.messages == []
    assert find_gpus(asked=True, module="no_such_nvml") is None
    assert caplog.messages == ["no metrics of GPUs: the package nvidia-ml-py is not installed"]


def test_without_a_driver_there_are_no_gpus(caplog):
    assert find_gpus(asked=True, module="json") is None  # has no nvmlInit
    assert "NVML does not start" in caplog.text


# --- what there is, and when it is read ----------------------------------------------------------


def kinds(**settings):
    return [type(one) for one in sources(ServerSettings(**settings))]


def test_each_kind_can_be_turned_off():
    assert Cpu in kinds()
    assert Cpu not in kinds(allow_cpu_metrics=False)
    assert kinds(allow_metrics=False) == []
    assert kinds(allow_gpu_metrics=False) == [Cpu]


class Counted:
    """A source that counts how often it was read, and cannot be the second time."""

    def __init__(self):
        self.reads = 0

    def read(self):
        self.reads += 1
        if self.reads == 2:
            raise RuntimeError("lost")
        return [f"reads {self.reads}"]


def test_they_are_read_again_and_again_and_a_failure_leaves_nothing_that_looks_alive():
    async def run():
        source = Counted()
        gauges = Gauges([source], 0.001)
        assert gauges.render() == ""
        task = asyncio.create_task(gauges.run())
        seen: list[str] = []
        while source.reads < 4:
            if gauges.render() not in seen[-1:]:
                seen.append(gauges.render())
            await asyncio.sleep(0)
        task.cancel()
        return seen

    assert asyncio.run(run())[:3] == ["", "reads 1\n", ""]


def test_with_nothing_to_read_the_task_goes_on():
    async def run():
        task = asyncio.create_task(Gauges([], 0.001).run())
        await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()

    asyncio.run(run())
