"""A model's configuration as frozen data: mirrors of the official proto, with the proto's names.

Holds only what the server acts on; what it refuses is listed in `refusals.py`, what must hold
between fields in `checks.py`. Made by `pbtxt.parse`, filled in by `complete.normalise`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Reshape(_Frozen):
    """The model's view of a tensor whose client view is `dims`; () is a scalar per row."""

    shape: tuple[int, ...] = ()


class ModelInput(_Frozen):
    """`dims` is the client's view without the batch dimension; -1 is any size.

    An `optional` one may be left out of a request: `forward`'s default takes its place.
    """

    name: str = ""
    data_type: str = "TYPE_INVALID"
    format: str = "FORMAT_NONE"
    dims: tuple[int, ...] = ()
    reshape: Reshape | None = None
    optional: bool = False
    allow_ragged_batch: bool = False

    @property
    def model_dims(self) -> tuple[int, ...]:
        """What the model sees, without the batch dimension."""
        return self.dims if self.reshape is None else self.reshape.shape

    @property
    def carries_shape(self) -> bool:
        """Whether how many strings there are leaves their shape open, so that it goes with them."""
        return self.data_type == "TYPE_STRING" and self.model_dims.count(-1) > 1


class ModelOutput(_Frozen):
    name: str = ""
    data_type: str = "TYPE_INVALID"
    dims: tuple[int, ...] = ()
    reshape: Reshape | None = None
    label_filename: str = ""

    @property
    def model_dims(self) -> tuple[int, ...]:
        """What the model produces, without the batch dimension."""
        return self.dims if self.reshape is None else self.reshape.shape


class BatchInput(_Frozen):
    """A tensor that the server makes for the model from the shapes of one input in a batch."""

    kind: str = "BATCH_ELEMENT_COUNT"
    target_name: tuple[str, ...] = ()
    data_type: str = "TYPE_INVALID"
    source_input: tuple[str, ...] = ()


class BatchOutput(_Frozen):
    """An output that is cut by the shape of an input, not by rows."""

    target_name: tuple[str, ...] = ()
    kind: str = "BATCH_SCATTER_WITH_INPUT_SHAPE"
    source_input: tuple[str, ...] = ()


class VersionPolicy(_Frozen):
    """Exactly one of the three is in force."""

    latest: int | None = None
    all: bool = False
    specific: tuple[int, ...] | None = None


class InstanceGroup(_Frozen):
    """`count` instances, per listed GPU for KIND_GPU; 0 until `complete.normalise` fills it.

    Passive instances are loaded and get no requests.
    """

    name: str = ""
    kind: str = "KIND_AUTO"
    count: int = 0
    gpus: tuple[int, ...] = ()
    passive: bool = False
    host_policy: str = ""


class DynamicBatching(_Frozen):
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    preserve_ordering: bool = False


class PinnedMemoryBuffer(_Frozen):
    enable: bool = False


class Optimization(_Frozen):
    input_pinned_memory: PinnedMemoryBuffer | None = None
    output_pinned_memory: PinnedMemoryBuffer | None = None


class WarmupInput(_Frozen):
    """One of the last three is given, whatever its value: where the data comes from.

    `dims` are those of one row, in the client's view. `input_data_file` lies in the model's
    `warmup` folder.
    """

    data_type: str = "TYPE_INVALID"
    dims: tuple[int, ...] = ()
    zero_data: bool | None = None
    random_data: bool | None = None
    input_data_file: str | None = None


class ModelWarmup(_Frozen):
    """A sample that each instance runs before the model is ready: `batch_size` requests of one
    row in a batch, `count` times (0 is once)."""

    name: str = ""
    batch_size: int = 0
    inputs: dict[str, WarmupInput] = {}
    count: int = 0


class ModelConfig(_Frozen):
    """`parameters` holds each parameter's string_value.

    `open_batch`: nothing says max_batch_size, so that the model may. No field of the proto.
    """

    name: str = ""
    platform: str = ""
    backend: str = ""
    runtime: str = ""
    version_policy: VersionPolicy | None = None
    max_batch_size: int = 0
    input: tuple[ModelInput, ...] = ()
    output: tuple[ModelOutput, ...] = ()
    batch_input: tuple[BatchInput, ...] = ()
    batch_output: tuple[BatchOutput, ...] = ()
    optimization: Optimization | None = None
    instance_group: tuple[InstanceGroup, ...] = ()
    default_model_filename: str = ""
    cc_model_filenames: dict[str, str] = {}
    metric_tags: dict[str, str] = {}
    dynamic_batching: DynamicBatching | None = None
    parameters: dict[str, str] = {}
    model_warmup: tuple[ModelWarmup, ...] = ()
    open_batch: bool = Field(False, exclude=True)

    @property
    def passive(self) -> bool:
        """Whether no instance takes requests."""
        groups = self.instance_group
        return bool(groups) and all(group.passive for group in groups)
