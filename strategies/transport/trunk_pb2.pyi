from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("shape", "codec", "offset", "size")
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    codec: str
    offset: int
    size: int
    def __init__(self, shape: _Optional[_Iterable[int]] = ..., codec: _Optional[str] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class NamedTensor(_message.Message):
    __slots__ = ("name", "tensor", "rows")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensor: Tensor
    rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., rows: _Optional[_Iterable[int]] = ...) -> None: ...

class Compute(_message.Message):
    __slots__ = ("step", "micro", "activations", "mask", "frozen", "names", "known", "tags")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro: int
    activations: Tensor
    mask: bytes
    frozen: bool
    names: bytes
    known: bytes
    tags: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., micro: _Optional[int] = ..., activations: _Optional[_Union[Tensor, _Mapping]] = ..., mask: _Optional[bytes] = ..., frozen: _Optional[bool] = ..., names: _Optional[bytes] = ..., known: _Optional[bytes] = ..., tags: _Optional[_Iterable[int]] = ...) -> None: ...

class Backward(_message.Message):
    __slots__ = ("step", "micro", "gradient", "last", "tokens")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro: int
    gradient: Tensor
    last: bool
    tokens: int
    def __init__(self, step: _Optional[int] = ..., micro: _Optional[int] = ..., gradient: _Optional[_Union[Tensor, _Mapping]] = ..., last: _Optional[bool] = ..., tokens: _Optional[int] = ...) -> None: ...

class GetGradients(_message.Message):
    __slots__ = ("step", "micro")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro: int
    def __init__(self, step: _Optional[int] = ..., micro: _Optional[int] = ...) -> None: ...

class Apply(_message.Message):
    __slots__ = ("step", "client_square_norm", "tokens", "loss", "seconds_bottom", "seconds_network", "seconds_top", "gradients")
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SQUARE_NORM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_BOTTOM_FIELD_NUMBER: _ClassVar[int]
    SECONDS_NETWORK_FIELD_NUMBER: _ClassVar[int]
    SECONDS_TOP_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    client_square_norm: float
    tokens: int
    loss: float
    seconds_bottom: float
    seconds_network: float
    seconds_top: float
    gradients: _containers.RepeatedCompositeFieldContainer[NamedTensor]
    def __init__(self, step: _Optional[int] = ..., client_square_norm: _Optional[float] = ..., tokens: _Optional[int] = ..., loss: _Optional[float] = ..., seconds_bottom: _Optional[float] = ..., seconds_network: _Optional[float] = ..., seconds_top: _Optional[float] = ..., gradients: _Optional[_Iterable[_Union[NamedTensor, _Mapping]]] = ...) -> None: ...

class Generate(_message.Message):
    __slots__ = ("number", "length", "rows", "activations", "mask", "positions", "fork", "drop")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    FORK_FIELD_NUMBER: _ClassVar[int]
    DROP_FIELD_NUMBER: _ClassVar[int]
    number: int
    length: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    activations: Tensor
    mask: bytes
    positions: _containers.RepeatedScalarFieldContainer[int]
    fork: str
    drop: bool
    def __init__(self, number: _Optional[int] = ..., length: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., activations: _Optional[_Union[Tensor, _Mapping]] = ..., mask: _Optional[bytes] = ..., positions: _Optional[_Iterable[int]] = ..., fork: _Optional[str] = ..., drop: _Optional[bool] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ("early",)
    EARLY_FIELD_NUMBER: _ClassVar[int]
    early: bool
    def __init__(self, early: _Optional[bool] = ...) -> None: ...

class ClientFrame(_message.Message):
    __slots__ = ("version", "compute", "backward", "get_gradients", "apply", "close", "generate", "number", "seen")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    GET_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    version: int
    compute: Compute
    backward: Backward
    get_gradients: GetGradients
    apply: Apply
    close: Close
    generate: Generate
    number: int
    seen: int
    def __init__(self, version: _Optional[int] = ..., compute: _Optional[_Union[Compute, _Mapping]] = ..., backward: _Optional[_Union[Backward, _Mapping]] = ..., get_gradients: _Optional[_Union[GetGradients, _Mapping]] = ..., apply: _Optional[_Union[Apply, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., generate: _Optional[_Union[Generate, _Mapping]] = ..., number: _Optional[int] = ..., seen: _Optional[int] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("hidden_size", "steps", "codecs", "limit", "chunk", "names")
    class CodecsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    hidden_size: int
    steps: int
    codecs: _containers.ScalarMap[str, str]
    limit: int
    chunk: int
    names: bytes
    def __init__(self, hidden_size: _Optional[int] = ..., steps: _Optional[int] = ..., codecs: _Optional[_Mapping[str, str]] = ..., limit: _Optional[int] = ..., chunk: _Optional[int] = ..., names: _Optional[bytes] = ...) -> None: ...

class Activations(_message.Message):
    __slots__ = ("step", "micro", "activations", "seconds", "frozen", "changes", "changed", "kept")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FROZEN_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro: int
    activations: Tensor
    seconds: float
    frozen: bool
    changes: Tensor
    changed: bytes
    kept: bytes
    def __init__(self, step: _Optional[int] = ..., micro: _Optional[int] = ..., activations: _Optional[_Union[Tensor, _Mapping]] = ..., seconds: _Optional[float] = ..., frozen: _Optional[bool] = ..., changes: _Optional[_Union[Tensor, _Mapping]] = ..., changed: _Optional[bytes] = ..., kept: _Optional[bytes] = ...) -> None: ...

class Gradients(_message.Message):
    __slots__ = ("step", "micro", "gradient", "square_norm", "seconds")
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    SQUARE_NORM_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    step: int
    micro: int
    gradient: Tensor
    square_norm: float
    seconds: float
    def __init__(self, step: _Optional[int] = ..., micro: _Optional[int] = ..., gradient: _Optional[_Union[Tensor, _Mapping]] = ..., square_norm: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class Applied(_message.Message):
    __slots__ = ("step", "grad_norm", "lr", "seconds", "state")
    STEP_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    step: int
    grad_norm: float
    lr: float
    seconds: float
    state: _containers.RepeatedCompositeFieldContainer[NamedTensor]
    def __init__(self, step: _Optional[int] = ..., grad_norm: _Optional[float] = ..., lr: _Optional[float] = ..., seconds: _Optional[float] = ..., state: _Optional[_Iterable[_Union[NamedTensor, _Mapping]]] = ...) -> None: ...

class Generated(_message.Message):
    __slots__ = ("number", "activations", "seconds", "queued", "cache_bytes")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    number: int
    activations: Tensor
    seconds: float
    queued: float
    cache_bytes: int
    def __init__(self, number: _Optional[int] = ..., activations: _Optional[_Union[Tensor, _Mapping]] = ..., seconds: _Optional[float] = ..., queued: _Optional[float] = ..., cache_bytes: _Optional[int] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("steps", "tokens")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    tokens: int
    def __init__(self, steps: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("kind", "message", "step", "micro")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_FIELD_NUMBER: _ClassVar[int]
    kind: str
    message: str
    step: int
    micro: int
    def __init__(self, kind: _Optional[str] = ..., message: _Optional[str] = ..., step: _Optional[int] = ..., micro: _Optional[int] = ...) -> None: ...

class ServerFrame(_message.Message):
    __slots__ = ("version", "opened", "activations", "gradients", "applied", "closed", "failure", "generated", "number")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    GENERATED_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    version: int
    opened: Opened
    activations: Activations
    gradients: Gradients
    applied: Applied
    closed: Closed
    failure: Failure
    generated: Generated
    number: int
    def __init__(self, version: _Optional[int] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., activations: _Optional[_Union[Activations, _Mapping]] = ..., gradients: _Optional[_Union[Gradients, _Mapping]] = ..., applied: _Optional[_Union[Applied, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., generated: _Optional[_Union[Generated, _Mapping]] = ..., number: _Optional[int] = ...) -> None: ...
