"""Gauges of the machine that a Router runs on: CPU, memory and, through NVML, its GPUs.

Owns Triton's names and units for them, and when they are read. The Router adds `render()` to the
page; each tells of its own node, and Routers on one node tell the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import psutil

from configs.server import ServerSettings

from .metrics import head, line

logger = logging.getLogger("manta.gauges")


class Family(NamedTuple):
    """`value` reads the number of one device; what it raises leaves the series out."""

    name: str
    kind: str
    help: str
    value: Callable[[Any, Any], int | float]


class Source(Protocol):
    """One kind of hardware."""

    def read(self) -> list[str]:
        """Lines of the page. Blocks for milliseconds."""
        ...


class Gauges:
    """Lines as they were read last; `run` reads them again and again, off the loop."""

    def __init__(self, sources: Iterable[Source], interval_s: float) -> None:
        self._sources = tuple(sources)
        self._interval_s = interval_s
        self._lines: list[str] = []

    async def run(self) -> None:
        while self._sources:
            try:
                self._lines = await asyncio.to_thread(self.read)
            except Exception:  # a device that is lost, say: old values would look alive
                self._lines = []
            await asyncio.sleep(self._interval_s)
        await asyncio.get_running_loop().create_future()  # nothing to read, and no reason to end

    def read(self) -> list[str]:
        return [each for source in self._sources for each in source.read()]

    def render(self) -> str:
        return "".join(f"{each}\n" for each in self._lines)


def sources(settings: ServerSettings, visible_gpus: str = "") -> Iterator[Source]:
    """What the settings allow and the machine has. `visible_gpus` as in CUDA_VISIBLE_DEVICES."""
    if not settings.allow_metrics:
        return
    if settings.allow_gpu_metrics:
        gpus = find_gpus("allow_gpu_metrics" in settings.model_fields_set, visible_gpus)
        if gpus is not None:
            yield gpus
    if settings.allow_cpu_metrics:
        yield Cpu()


# --- CPU and memory ------------------------------------------------------------------------------


class Cpu:
    """Of the whole machine, also inside a container, as in Triton."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def read(self) -> list[str]:
        now = psutil.cpu_times()
        memory = psutil.virtual_memory()
        values = (
            ("nv_cpu_utilization", "CPU utilization rate [0.0 - 1.0]", busy(self._before, now)),
            ("nv_cpu_memory_total_bytes", "CPU total memory (RAM), in bytes", memory.total),
            (
                "nv_cpu_memory_used_bytes",
                "CPU used memory (RAM), in bytes",
                memory.total - memory.available,
            ),
        )
        self._before = now
        lines: list[str] = []
        for name, text, value in values:
            lines += (*head(name, "gauge", text), line(name, {}, value))
        return lines


def busy(before: Any, now: Any) -> float:
    """The share of time that was not idle between two readings, 0 to 1."""
    names = ("user", "nice", "system", "irq", "softirq", "steal", "idle", "iowait")
    spent = {n: getattr(now, n, 0.0) - getattr(before, n, 0.0) for n in names}
    total = sum(spent.values())
    idle = spent["idle"] + spent["iowait"]
    return min(1.0, max(0.0, 1 - idle / total)) if total > 0 else 0.0


# --- GPUs ----------------------------------------------------------------------------------------


def find_gpus(asked: bool, visible: str = "", module: str = "pynvml") -> Gpus | None:
    """None without NVML's bindings or its driver; only who asked for it is told why."""
    try:
        library = import_module(module)
        library.nvmlInit()
        return Gpus(library, visible)
    except ImportError:
        reason = "the package nvidia-ml-py is not installed"
    except Exception as error:  # NVML's own: there is no driver, say
        reason = f"NVML does not start: {error}"
    if asked:
        logger.warning("no metrics of GPUs: %s", reason)
    return None


GPU_FAMILIES = (
    Family(
        "nv_gpu_utilization",
        "gauge",
        "GPU utilization rate [0.0 - 1.0)",
        lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    ),
    Family(
        "nv_gpu_memory_total_bytes",
        "gauge",
        "GPU total memory, in bytes",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
    ),
    Family(
        "nv_gpu_memory_used_bytes",
        "gauge",
        "GPU used memory, in bytes",
        lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
    ),
    Family(
        "nv_gpu_power_usage",
        "gauge",
        "GPU power usage in watts",
        lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    ),
    Family(
        "nv_gpu_power_limit",
        "gauge",
        "GPU power management limit in watts",
        lambda nvml, gpu: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
    ),
    # Triton counts from its own start. Routers of one node start at different times, and what they
    # tell must not go back and forth.
    Family(
        "nv_energy_consumption",
        "counter",
        "GPU energy consumption in joules since the driver was loaded",
        lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000,
    ),
)


class Gpus:
    """Devices by UUID. What a device does not tell (a slice of one, say) has no series."""

    def __init__(self, library: Any, visible: str = "") -> None:
        self._nvml = library
        self._devices = dict(_chosen(_devices(library), visible))

    def read(self) -> list[str]:
        lines: list[str] = []
        for family in GPU_FAMILIES:
            samples = [
                line(family.name, {"gpu_uuid": uuid}, value)
                for uuid, gpu in self._devices.items()
                if (value := self._value(family, gpu)) is not None
            ]
            if samples:
                lines += (*head(family.name, family.kind, family.help), *samples)
        return lines

    def _value(self, family: Family, gpu: Any) -> int | float | None:
        try:
            return family.value(self._nvml, gpu)
        except Exception:  # NVML's own error: not supported here, or lost
            return None


def _devices(library: Any) -> dict[str, Any]:
    found = {}
    for index in range(library.nvmlDeviceGetCount()):
        gpu = library.nvmlDeviceGetHandleByIndex(index)
        uuid = library.nvmlDeviceGetUUID(gpu)
        found[uuid.decode() if isinstance(uuid, bytes) else uuid] = gpu
    return found


def _chosen(devices: Mapping[str, Any], visible: str) -> Iterator[tuple[str, Any]]:
    """All, or those of a list of indices and beginnings of UUIDs."""
    wanted = [word.strip() for word in visible.split(",") if word.strip()]
    for index, (uuid, gpu) in enumerate(devices.items()):
        if not wanted or any(w == str(index) or uuid.startswith(w) for w in wanted):
            yield uuid, gpu
