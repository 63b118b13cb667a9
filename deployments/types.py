"""The vocabulary that the rooms share: frozen data, no behaviour beyond derived properties.

Imports nothing of ours at run time but configs. Everything here crosses process borders by pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

import numpy as np

from configs.model import ModelConfig

from .errors import MantaError

Array: TypeAlias = np.ndarray[Any, Any]
ParameterValue: TypeAlias = bool | int | float | str


# --- requests, as the edges hand them to `inference` -------------------------------------------


@dataclass(frozen=True, slots=True)
class Tensor:
    """One named tensor.

    `shape` is the client's view. `data` has that shape and the datatype's numpy type, with two
    exceptions: BF16 is carried as uint16, and BYTES as a flat uint8 array in wire form (each
    element a little-endian uint32 length and its bytes).
    `placed`: its bytes lie in the client's own memory, and `data` is empty.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Array
    placed: bool = False


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """Part of a region of shared memory that a client has registered under that name."""

    region: str
    byte_size: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class LentInput:
    """A tensor that lies in the client's memory; `position` is its place among all inputs."""

    position: int
    name: str
    datatype: str
    shape: tuple[int, ...]
    memory: MemoryRange


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """`binary_data` concerns HTTP only; `classification` is 0 when not asked for, and `memory` is
    where the bytes go instead of into the answer."""

    name: str
    binary_data: bool = False
    classification: int = 0
    memory: MemoryRange | None = None


@dataclass(frozen=True, slots=True)
class InferRequest:
    """`model_version` "" means the newest ready one; no `outputs` means all of them.

    `chain` has the versions (`name/1`) that wait for the answer, outermost first, where a model
    asks. `lent` are inputs beside `inputs`, in ascending order, until their bytes are fetched.
    """

    model_name: str
    model_version: str
    id: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    chain: tuple[str, ...] = ()
    lent: tuple[LentInput, ...] = ()

    @property
    def extra(self) -> bool:
        """Whether it asks for more than tensors in and tensors out: `extras` has a part in it."""
        for output in self.outputs:
            if output.classification or output.memory is not None:
                return True
        return bool(self.lent)


@dataclass(frozen=True, slots=True)
class InferResponse:
    model_name: str
    model_version: str
    id: str
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)


# --- batches, between Router and replica ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What a model that is handed whole requests may ask about one of them, beside its inputs.

    `parameters` is a JSON object, `chain` that of InferRequest.
    """

    id: str = ""
    parameters: str = "{}"
    outputs: tuple[str, ...] = ()
    chain: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One execution's worth of requests.

    `rows[k]` is the batch size of member k (1 for a model without a batch dimension).
    `inputs[i][k]` is member k's array for config input i, in the model's view (reshape applied;
    strings as `Tensor` has them, and after their shape where `ModelInput.carries_shape`), or None
    where an optional input is absent. `outputs` names the config outputs that some member
    wants. Where `joined[i]` is an array, it holds all members' rows of input i one after another,
    and `inputs[i]` is empty. `facts` are by member, and empty for models that do not ask for them.
    """

    rows: tuple[int, ...]
    inputs: tuple[tuple[Array | None, ...], ...]
    outputs: tuple[str, ...]
    joined: tuple[Array | None, ...] = ()
    facts: tuple[RequestFacts, ...] = ()

    def member(self, index: int, k: int) -> Array | None:
        """Member k's array of input `index`, however it came."""
        whole = self.joined[index] if self.joined else None
        if whole is None:
            return self.inputs[index][k]
        start = sum(self.rows[:k])
        rows: Array = whole[start : start + self.rows[k]]
        return rows


@dataclass(frozen=True, slots=True)
class OutputArray:
    """One output over all rows of an execution, in the model's view.

    For BYTES `data` is the flat wire form and `offsets` (int64, elements + 1) says where each
    element starts, so that rows can be cut out without a second parse; `shape` is that of the
    elements, unless they are one row.
    """

    data: Array
    offsets: Array | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The outcome of one execution for `members` (indices into the batch, ascending).

    A batch is one part unless it had to be run again in pieces. Either `outputs` is whole or
    `error` says why not. Durations are those that Triton counts, per execution.

    `run_rows` is -1 where `outputs` holds the rows of all members one after another. Else this is
    the answer to one member alone, as it is, and so many rows are counted with it as an execution:
    all of its run for one of the run's parts, 0 for the others.
    """

    members: tuple[int, ...]
    outputs: Mapping[str, OutputArray]
    error: MantaError | None = None
    input_ns: int = 0
    infer_ns: int = 0
    output_ns: int = 0
    run_rows: int = -1


@dataclass(frozen=True, slots=True)
class BatchReply:
    """`refused` means that no instance was free and nothing ran: the batch may be sent again.

    `waited_ns` is how long a batch that was sent ahead waited for its instance.
    """

    parts: tuple[Part, ...]
    refused: bool = False
    waited_ns: int = 0


# --- what is loaded, between Controller, Routers and replicas ------------------------------------


class ModelState(str, Enum):
    """The repository index's states."""

    UNKNOWN = "UNKNOWN"
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class ChannelAddress:
    """Where a replica listens for Routers on its own node, and what a Router must show there."""

    path: str
    token: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A live replica. `channel` is None where it has none; others reach it through Serve."""

    replica_id: str
    node_id: str
    instances: int
    channel: ChannelAddress | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A deployment of a model's application, and how many batches its live replicas can run."""

    deployment: str
    slots: int
    endpoints: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class VersionSnapshot:
    """One model version as the Controller sees it. `version` 0: the model never got that far.

    `resting`: it has no replica since nobody asks, or not yet again; a request that comes now is
    held and answered."""

    model_name: str
    version: int
    state: ModelState
    reason: str = ""
    config: ModelConfig | None = None
    application: str = ""
    targets: tuple[Target, ...] = ()
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    load_duration_s: float = 0.0
    resting: bool = False


@dataclass(frozen=True, slots=True)
class LogSettings:
    """What is logged, and how. `changed_ns` is when a client last changed it, 0 for never: of two,
    the later is in force."""

    info: bool = True
    warning: bool = True
    error: bool = True
    verbose: int = 0
    format: str = "default"
    changed_ns: int = 0


@dataclass(frozen=True, slots=True)
class TraceSettings:
    """Which requests are traced: one of `rate`, `count` of them at most, or all for -1; and what
    is kept of them, nothing without a `level`."""

    level: tuple[str, ...] = ()
    rate: int = 1000
    count: int = -1
    log_frequency: int = 0


@dataclass(frozen=True, slots=True)
class TraceScope:
    """Fields of TraceSettings that a client has set, for all models or for one, and when."""

    values: Mapping[str, Any]
    changed_ns: int


@dataclass(frozen=True, slots=True)
class TraceChanges:
    """What clients have changed of the settings that the server began with, by model, "" for all.
    `changed_ns` is as in LogSettings."""

    scopes: Mapping[str, TraceScope] = field(default_factory=dict)
    changed_ns: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What Routers follow. `epoch` names the Controller's life, `sequence` the change within it."""

    epoch: int
    sequence: int
    started: bool
    ready: bool
    versions: tuple[VersionSnapshot, ...]
    closing: bool = False
    log: LogSettings = LogSettings()
    trace: TraceChanges = field(default_factory=TraceChanges)


@dataclass(frozen=True, slots=True)
class Override:
    """What a load request has given instead of what is on disk: a ModelConfig as JSON and, unless
    `folder` is "", the model's files, which are in a folder of its name there."""

    config: str
    folder: str = ""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica tells the Controller, at registration and at every heartbeat.

    `fingerprint` is that of its spec, `config` its spec's as the model has completed it; `log` are
    the lines that it wrote while it loaded, `fresh` those since the last report.
    """

    application: str
    deployment: str
    replica_id: str
    node_id: str
    pid: int
    instances: int
    device: str
    fingerprint: str
    config: ModelConfig
    error: str = ""
    loaded: bool = False
    healthy: bool = True
    draining: bool = False
    load_duration_s: float = 0.0
    weight_pointers: tuple[int, ...] = ()
    channel: ChannelAddress | None = None
    log: tuple[str, ...] = ()
    details: Mapping[str, str] = field(default_factory=dict)
    passive: bool = False
    override: Override | None = None
    fresh: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """What a replica needs to load one instance group of one model version by itself.

    The artifact is read from `repository`/`model_name`/`version` on the replica's own node and must
    have `content_hash`. `fingerprint` also covers placement and settings: two replicas of equal
    fingerprint do the same. `gpu` is the listed index that the replica makes its only device.
    A passive one loads, and is never sent a batch. `complete`: the model may add to `config`.
    `call_limit_s` and `by_reference_bytes` are for models that call others: for how long, and what
    goes by reference. `config_name` and `override`: where the configuration was read.
    `logging` is how the log begins; what changes, the Controller says.
    """

    controller_application: str
    application: str
    deployment: str
    repository: str
    model_name: str
    version: int
    config: ModelConfig
    content_hash: str
    fingerprint: str
    kind: str
    gpu: int | None
    instances: int
    threads: int
    max_execution_s: float
    logical_gpus: bool = False
    complete: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    passive: bool = False
    call_limit_s: float = 120.0
    by_reference_bytes: int = 1 << 20
    config_name: str = ""
    override: Override | None = None
    logging: LogSettings = LogSettings()
