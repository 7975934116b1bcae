"""Read the pickles of EDM2's reference without executing anything in them.

A pickle may name any function to call. Here it may name the few in `ALLOWED`, and even those are not called: each
becomes an inert Node that records its arguments, read afterwards. What a maintainer must not break: no name in ALLOWED
is ever replaced by the real thing, because REDUCE and BUILD would then run its code with the file's arguments.
"""

import io
import math
import pickle
import pickletools
import warnings

import torch
from torch import Tensor

PERSISTENCE_VERSION = 6  # of the reference's pickled classes

# Everything that the published snapshots ask for (facts measured on them); numpy's module was renamed in numpy 2.
ALLOWED = {
    ("collections", "OrderedDict"),
    ("dnnlib.util", "EasyDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.nn.modules.container", "ModuleDict"),
    ("torch.storage", "_load_from_bytes"),
    ("torch_utils.persistence", "_reconstruct_persistent_obj"),
}


class Refused(ValueError):
    """A pickle that asks for what no EDM2 snapshot needs."""


class Node:
    """What a call or an object in the pickle becomes: its kind, arguments, items and state, with no behaviour."""

    kind = ""

    def __new__(cls, *args, **kwargs):
        node = super().__new__(cls)
        node.args, node.items, node.state = args, {}, None
        return node

    def __init__(self, *args, **kwargs):
        pass

    def __setitem__(self, key, value):
        self.items[key] = value

    def __setstate__(self, state):
        self.state = state


class InertUnpickler(pickle.Unpickler):
    """Unpickle into Nodes; refuse every name that is not in ALLOWED."""

    def __init__(self, file):
        super().__init__(file)
        self.known = {name: type("Node", (Node,), {"kind": ".".join(name)}) for name in ALLOWED}

    def find_class(self, module, name):
        if (module, name) not in self.known:
            raise Refused(f"refused: it asks for {module}.{name}, which no EDM2 snapshot needs")
        return self.known[module, name]

    def persistent_load(self, pid):
        raise Refused("refused: it refers to objects outside of the file, which no EDM2 snapshot does")


def read_nodes(data: bytes):
    """Return the pickle's content as Nodes and plain data; raise ValueError, with nothing executed, where it is refused."""
    try:
        _check_memo(data)
        return InertUnpickler(io.BytesIO(data)).load()
    except Refused:
        raise
    except Exception as error:  # forged opcodes can raise anything; nothing of it has run any code
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"no readable pickle ({reason}); it is cut off, damaged or of another kind") from None


def _check_memo(data: bytes) -> None:
    """Refuse memo slots beyond what the file can fill: the unpickler would allocate all slots below, up to 32 GiB."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > count:
            raise Refused(f"refused: it numbers an object {argument} where there are at most {count}")


def plain(value):
    """Return lists for tuples and lists of plain numbers and text; refuse Nodes."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"refused: {type(value).__name__} where a number or text is expected")


def persistent(node, *class_names: str) -> dict:
    """Return the state of a pickled object of the reference's class; raise ValueError for any other thing."""
    wanted = " or ".join(class_names)
    if not isinstance(node, Node) or not node.kind.endswith("_reconstruct_persistent_obj") or len(node.args) != 1:
        raise ValueError(f"refused: no object of class {wanted} where a snapshot of EDM2 has one")
    meta = node.args[0]
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise ValueError(f"refused: the object of class {wanted} has an unknown form")
    if meta.get("version") != PERSISTENCE_VERSION:
        raise ValueError(f"refused: class format {meta.get('version')!r} instead of {PERSISTENCE_VERSION}")
    if meta.get("class_name") not in class_names:
        raise ValueError(f"refused: an object of class {meta.get('class_name')!r} where {wanted} is expected")
    return meta["state"]


def tensor(node) -> Tensor:
    """Return the tensor that a Node describes, checked against the bounds of its storage."""
    if isinstance(node, Node) and node.kind == "torch._utils._rebuild_parameter":
        node = node.args[0] if node.args else None
    if not isinstance(node, Node) or node.kind != "torch._utils._rebuild_tensor_v2" or len(node.args) < 4:
        raise ValueError("refused: something else where a tensor is expected")
    source, offset, shape, strides = node.args[:4]
    numbers = (offset, *shape, *strides) if isinstance(shape, tuple) and isinstance(strides, tuple) else ("",)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("refused: a tensor with a malformed shape")
    flat = _storage(source)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and (last >= flat.numel() or math.prod(shape) > flat.numel()):
        raise ValueError("refused: a tensor that reaches beyond its storage")
    return torch.as_strided(flat, shape, strides, offset).contiguous()


def _storage(node) -> Tensor:
    """Return a nested torch.save stream as a 1-D tensor, read by torch's own restricted loader."""
    is_bytes = isinstance(node, Node) and len(node.args) == 1 and isinstance(node.args[0], bytes)
    if not is_bytes or node.kind != "torch.storage._load_from_bytes":
        raise ValueError("refused: something else where a tensor's bytes are expected")
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols: a refusal below says what matters
            storage = torch.load(io.BytesIO(node.args[0]), map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises many kinds; all of them mean that the bytes are not a plain storage
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"refused: the bytes of a tensor are not a plain storage ({reason})") from None
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError(f"refused: {type(storage).__name__} where a tensor's storage is expected")
    return torch.tensor([], dtype=storage.dtype).set_(storage)
