"""Every kind of hostile file, each made anew from a random number generator."""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from tests.hostile.writing import (
    MARK,
    REDUCE,
    STOP,
    archive,
    call,
    get,
    layer,
    legacy,
    legacy_storage,
    named,
    pickled,
    push,
    put,
    safetensors,
    storage,
    tensor,
    text,
)

_MB = 2**20
_CONTROLS = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028\x7f\r\n"


@dataclass(frozen=True)
class Kind:
    """A kind of hostile file.

    Attributes:
        make: Makes one.
        suffix: Of its name.
        use: What it is given to: a checkpoint, samples, a report, or a bundle.
        may_pass: Whether some of them are harmless after all.
        slow: Whether it takes more than a moment.
    """

    make: Callable[[Random], bytes]
    suffix: str = ".pt"
    use: str = "checkpoint"
    may_pass: bool = False
    slow: bool = False


def _honest(random: Random) -> bytes:
    from kan_model import KAN

    torch.manual_seed(random.randrange(1000))
    content = io.BytesIO()
    torch.save(KAN([3, 4, 2]).state_dict(), content, _use_new_zipfile_serialization=True)
    return content.getvalue()


def _honest_legacy(random: Random) -> bytes:
    from kan_model import KAN

    content = io.BytesIO()
    torch.save(KAN([3, 4, 2]).state_dict(), content, _use_new_zipfile_serialization=False)
    return content.getvalue()


def _honest_safetensors(random: Random) -> bytes:
    from safetensors.torch import save

    from kan_model import KAN

    return save(KAN([3, 4, 2]).state_dict())


def _mutated(honest: Callable[[Random], bytes]) -> Callable[[Random], bytes]:
    """Change, cut, repeat or insert a few bytes of an honest file."""

    def make(random: Random) -> bytes:
        content = bytearray(honest(random))
        for _ in range(random.choice((1, 1, 2, 8, 64))):
            at = random.randrange(len(content))
            match random.randrange(5):
                case 0:
                    content[at] ^= 1 << random.randrange(8)
                case 1:
                    content[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
                case 2:
                    del content[at : at + random.randrange(1, 200)]
                case 3:
                    content[at:at] = content[at : at + random.randrange(1, 200)]
                case 4:
                    content[at : at + 4] = random.randbytes(4)
            if not content:
                return b"\0"
        return bytes(content)

    return make


def _mutated_pickle(random: Random) -> bytes:
    """Change the pickle of an honest archive, and have its checksums right again."""
    content = io.BytesIO(_honest(random))
    with zipfile.ZipFile(content) as file:
        entries = {e.filename: file.read(e) for e in file.infolist()}
    root = next(iter(entries)).partition("/")[0]
    pickle = _mutated(lambda _: entries[f"{root}/data.pkl"])(random)
    records = {name.partition("/")[2]: inner for name, inner in entries.items()}
    return archive(pickle, records | {"data.pkl": pickle}, root=root)


def _raw(form: str, changes: dict[str, Any]) -> Callable[[Random], bytes]:
    """Change fields in an archive's directory: (offset in an entry, format, value)."""

    def make(random: Random) -> bytes:
        content = bytearray(archive(pickled(layer())))
        at = content.rindex(b"PK\1\2") if changes.get("last") else content.index(b"PK\1\2")
        struct.pack_into(form, content, at + changes["at"], changes["value"](random))
        return bytes(content)

    return make


def _bomb(name: str, given: Callable[[Random], tuple[Any, ...]]) -> Callable[[Random], bytes]:
    """A call that allocates what a number says, in either format, among honest tensors or alone."""

    def make(random: Random) -> bytes:
        value = call(name, *given(random))
        if random.random() < 0.3:
            value = call("torch._tensor._rebuild_from_type_v2", named(name), named("torch.Tensor"),
                         given(random), {})  # fmt: skip
        content: Any = value if random.random() < 0.5 else {**layer(), "x": value}
        return legacy(value) if random.random() < 0.3 else archive(pickled(content))

    return make


def _many(step: bytes, most: int = 3_000_000) -> Callable[[Random], bytes]:
    """A list of very many values."""

    def make(random: Random) -> bytes:
        count = random.randrange(most // 2, most)
        return archive(b"\x80\x02](" + step * count + b"e" + STOP)

    return make


def _laughs(random: Random) -> bytes:
    """Tuples of tuples, each twice in the next, as a key whose hash takes for ever."""
    steps = b"".join(put(i) + get(i) + b"\x86" for i in range(random.randrange(40, 400)))
    value = push(1) + steps
    pickle = random.choice((
        b"\x80\x02}" + value + b"Ns" + STOP,
        b"\x80\x02" + named("builtins.set") + b"](" + value + b"e\x85R" + STOP,
        b"\x80\x02" + named("collections.OrderedDict") + b"](" + value + b"N\x86e\x85R" + STOP,
    ))  # fmt: skip
    return archive(pickle)


def _deep(random: Random) -> bytes:
    count = random.randrange(50_000, 400_000)
    opened, closed = random.choice(((b"]", b"a"), (b"}N", b"s"), (b"", b"\x85")))
    inner = opened * count + b"N" + closed * count
    return archive(b"\x80\x02" + random.choice((inner, b"}" + inner + b"Ns")) + STOP)


def _colliding(random: Random) -> bytes:
    """Whole numbers, or tuples of them, with one hash."""
    prime = 2**61 - 1
    count = random.randrange(20_000, 30_000)
    keys = b"".join(push(random.randrange(1, 2**200) * prime) + b"N" for _ in range(count))
    return archive(b"\x80\x02}(" + keys + b"u" + STOP)


def _repeated(random: Random) -> bytes:
    """A list that a call copies again and again."""
    big = b"](" + b"K\1" * 20_000 + b"e" + put(0) + b"0"
    big = big[:-1]
    again = get(0) + b"\x85"
    name = random.choice(("builtins.set", "collections.Counter", "torch.Size"))
    one = named(name) + again + REDUCE
    return archive(b"\x80\x02](" + big + one * random.randrange(5_000, 10_000) + b"e" + STOP)


def _copied_text(random: Random) -> bytes:
    one = call("_codecs.encode", get(0), random.choice(("latin1", "utf-8", "zip", "idna")))
    if random.random() < 0.5:
        one = call("builtins.bytearray", get(0), "latin-1")
    return archive(b"\x80\x02](" + text("a" * _MB) + put(0) + one * 5_000 + b"e" + STOP)


def _long_key(random: Random) -> bytes:
    """One long key, and many values behind it."""
    key = "k" * random.randrange(_MB // 2, 20 * _MB)
    values: Any = dict.fromkeys(map(str, range(1000)), 1)
    if random.random() < 0.5:
        values = [push([])] * 1000
    return archive(pickled({key: values}))


def _long_path(random: Random) -> bytes:
    """Keys that are long together, and many tensors behind them."""
    key = "k" * random.randrange(500, 1000)
    inner = push(
        {str(i): tensor((2, 2), of=get(0) if i else storage(64) + put(0)) for i in range(2000)}
    )
    for _ in range(random.randrange(10, 90)):
        inner = push({key: inner})
    return archive(b"\x80\x02" + inner + STOP)


def _many_tensors(random: Random) -> bytes:
    first = tensor((2, 2), of=storage(64)) + put(0)
    stem = "n" * random.randrange(1, 900)
    names = range(random.randrange(150_000, 200_000))
    pairs = b"".join(text(f"{stem}{i}") + get(0) for i in names)
    return archive(b"\x80\x02}(" + text("first") + first + pairs + b"u" + STOP)


def _shared_modules(random: Random) -> bytes:
    """Modules that hold each other, named through ways without end."""

    def module(*children: bytes) -> bytes:
        state = {
            "_parameters": {}, "_buffers": {},
            "_modules": {chr(97 + i) * random.randrange(1, 50): c for i, c in enumerate(children)},
        }  # fmt: skip
        return named("somebody.Net") + b")\x81" + push(state) + b"b"

    value = module()
    for i in range(random.randrange(20, 60)):
        value = module(value + put(i), get(i))
    return archive(b"\x80\x02" + value + STOP)


def _many_classes(random: Random) -> bytes:
    count = random.randrange(6_000, 12_000)
    steps = b"".join(named(f"m{i}.C") + b")\x81" for i in range(count))
    return archive(b"\x80\x02](" + steps + b"e" + STOP)


def _many_kans(random: Random) -> bytes:
    count = random.randrange(3_000, 8_000)
    first = layer("a.")
    whole = b"\x80\x02}("
    for i, (name, value) in enumerate(first.items()):
        whole += text(name) + value + put(i)
    names = list(first)
    for n in range(count):
        for i, name in enumerate(names):
            whole += text(f"b{n}." + name[2:]) + get(i)
    return archive(whole + b"u" + STOP)


def _folded(random: Random) -> bytes:
    """Weights that are computed from tensors of no size."""
    side = random.randrange(2_000, 4_000)
    flat = tensor((side, side), (0, 0), of=storage(64))
    content: dict[str, Any] = {}
    for n in range(200):
        content |= {f"layers.{n}.base_weight_orig": flat, f"layers.{n}.base_weight_mask": flat}
        content |= {f"layers.{n}.spline_weight": flat, f"layers.{n}.grid": flat}
    return archive(pickled(content))


def _claimed(random: Random) -> bytes:
    """Layers whose tensors claim more than the file has, by strides of zero."""
    n = random.choice((1, 50))
    side = random.randrange(2**12, 2**14)
    content: dict[str, Any] = {}
    for i in range(n):
        content |= {
            f"layers.{i}.base_weight": tensor((side, side), (0, 0), of=storage(64)),
            f"layers.{i}.spline_weight": tensor((side, side, 8), (0, 0, 0), of=storage(64)),
            f"layers.{i}.grid": tensor((side, 12), (0, 1), of=storage(64)),
        }
    return archive(pickled(content))


def _beyond(random: Random) -> bytes:
    """A tensor, or a storage, that reaches beyond what the file holds."""
    n = random.randrange(10**3, 10**12)
    broken = random.choice((
        tensor((n,), of=storage(64)),
        tensor((n,), of=storage(n)),
        tensor((2, 2), (n, 1), of=storage(64)),
        tensor((4,), of=storage(64), offset=n),
        tensor((n, n, n), of=storage(64)),
        tensor((-1, 4), of=storage(64)),
        tensor((4,), (-1,), of=storage(64), offset=10),
        tensor((4,), of=storage(4, key="1")),
    ))  # fmt: skip
    return archive(pickled({**layer(), "layers.0.base_weight": broken}))


def _legacy_storage(random: Random) -> bytes:
    n = random.randrange(10**8, 10**11)
    value = tensor((2, 2), of=legacy_storage(n))
    return legacy({"layers.0.grid": value}, ["0"], struct.pack("<q", n) + bytes(100))


def _number_of_a_tensor(random: Random) -> bytes:
    """A tensor of one whole number, which a call takes for that number."""
    one = tensor((), of=storage(1, key="1", kind="LongStorage"))
    value = call(random.choice(("builtins.bytearray", "torch.Tensor", "torch.Size")), one)
    number = struct.pack("<q", random.randrange(10**9, 10**10))
    return archive(pickled({**layer(), "x": value}), {"data/1": number})


def _dimensions(random: Random) -> bytes:
    n = random.randrange(65, 200_000)
    return archive(pickled({"x": tensor((1,) * n, (0,) * n, of=storage(64))}))


def _device_copy(random: Random) -> bytes:
    flat = tensor((10**5, 10**5), (0, 0), of=storage(64))
    name = "torch._utils._rebuild_device_tensor_from_cpu_tensor"
    return archive(pickled(call(name, flat, named("torch.float64"), "cpu", False)))


def _quantized(random: Random) -> bytes:
    n = random.randrange(10**4, 10**6)
    scheme = (named("torch.per_tensor_affine"), 1.0, 0)
    value = call(
        "torch._utils._rebuild_qtensor", storage(64, kind="QInt8Storage"), 0, (n, n), (0, 0),
        scheme, False, call("collections.OrderedDict"),
    )  # fmt: skip
    return archive(pickled({"x": value}))


def _iterated(random: Random) -> bytes:
    """A tensor of no size that a call goes through number by number."""
    flat = tensor((10**9,), (0,), of=storage(64))
    name = random.choice(("builtins.set", "torch.Size", "collections.Counter"))
    return archive(pickled(call(name, flat)))


def _class_names(random: Random) -> bytes:
    """Controls in the names of classes, keys and activations."""
    controls = _CONTROLS.replace("\n", "").replace("\r", "")
    record = named(f"evil{controls}.Net{controls}") + b")\x81"
    value = random.choice((
        record,
        push({f"{controls}a": 1, "b": record}),
        push({f"{controls}.base_weight": tensor((2, 2), of=storage(64))}),
        push({f"layers.0.{controls}\n": tensor((2, 2), of=storage(64))} | layer()),
        push({f"{_CONTROLS}.layers.0." + k[9:]: v for k, v in layer().items()}),
        record + push({"_parameters": {}, "_buffers": {f"{controls}w": 1}, "_modules": {}}) + b"b",
    ))  # fmt: skip
    return archive(b"\x80\x02" + value + STOP)


def _entry_names(random: Random) -> bytes:
    names = random.choice((
        {"x" * 60_000: b""},
        {f"data/{_CONTROLS}": b"damaged"},
        {f"{'d' * 1000}/{i}": b"" for i in range(20_000)},
        {f"data/{i}": b"" for i in range(110_000)},
    ))  # fmt: skip
    content = bytearray(archive(pickled({}), names))
    at = content.find(b"damaged")
    if at > 0:
        content[at] ^= 1
    return bytes(content)


def _deflated(random: Random) -> bytes:
    method, megabytes = random.choice(((8, 100), (8, 400), (12, 30), (14, 30)))
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as file:
        file.writestr("archive/data.pkl", pickled({}))
        with file.open("archive/data/0", "w") as entry:
            for _ in range(megabytes):
                entry.write(bytes(_MB))
    return content.getvalue()


def _twice(random: Random) -> bytes:
    """Two entries of one name, as one of two readers compares names."""
    return archive(pickled(layer()), {random.choice(("DATA.PKL", "Data/0", "data/0 ")): b"x"})


def _overlapping(random: Random) -> bytes:
    """Entries that share their bytes."""
    content = bytearray(archive(pickled(layer()), {"data/1": bytes(256)}))
    first = content.index(b"PK\1\2")
    places = []
    while first >= 0:
        places.append(first)
        first = content.find(b"PK\1\2", first + 1)
    by_name = {}
    for at in places:
        length = struct.unpack_from("<H", content, at + 28)[0]
        by_name[bytes(content[at + 46 : at + 46 + length])] = at
    offset = struct.unpack_from("<I", content, by_name[b"archive/data/0"] + 42)[0]
    struct.pack_into("<I", content, by_name[b"archive/data/1"] + 42, offset)
    return bytes(content)


def _prepended(random: Random) -> bytes:
    content = archive(pickled(layer()))
    return random.choice((
        b"PK\3\4" + random.randbytes(random.randrange(1, 5000)) + content,
        content + random.randbytes(random.randrange(1, 5000)),
        content[:-2] + struct.pack("<H", 30) + b"c" * 30,
        content[: random.randrange(10, len(content) - 1)],
    ))  # fmt: skip


def _other_pickle(random: Random) -> bytes:
    """A pickle alone, of any protocol, with calls that allocate."""
    size = random.randrange(10**9, 10**10)
    return random.choice((
        pickled(call("builtins.bytearray", size)),
        b"cbuiltins\nbytearray\n(I%d\ntR." % size,
        b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"a.",
        b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"\xff" * 100 + b".",
        b"\x80\x02r" + struct.pack("<I", 2**32 - 1) + b".",
        b"I" + b"9" * 3 * _MB + b"\n.",
    ))  # fmt: skip


def _protocol(random: Random) -> bytes:
    """Opcodes of other protocols in an archive."""
    size = random.randrange(10**9, 10**10)
    return archive(random.choice((
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"a.",
        b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"\xff" * 100 + b".",
        b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",
        b"\x80\x02cbuiltins\nbytearray\n(I%d\ntR." % size,
        b"\x80\x02" + call("__builtin__.bytearray", size) + b".",
    )))  # fmt: skip


def _safetensors_header(random: Random) -> bytes:
    def entry(shape: Any, end: int = 4, dtype: Any = "F32", start: int = 0) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    deep = b'{"a":' * 100_000
    return random.choice((
        lambda: safetensors(b"{" + b" " * 9 * _MB + b"}"),
        lambda: safetensors(deep),
        lambda: safetensors(b'{"__metadata__":' + b"[" * 500_000),
        lambda: safetensors({"x" * 5000: entry([1])}, bytes(4)),
        lambda: safetensors({f"{_CONTROLS}": entry([2])}, bytes(4)),
        lambda: safetensors({"x": entry([1], dtype=f"F{_CONTROLS}")}, bytes(4)),
        lambda: safetensors({"x": entry([2**62, 4], 2**62)}, bytes(4)),
        lambda: safetensors({"x": entry([10**12], 4 * 10**12)}, bytes(4)),
        lambda: safetensors({"x": entry([1] * 100_000)}, bytes(4)),
        lambda: safetensors({"x": entry([1]), "y": entry([1])}, bytes(4)),
        lambda: safetensors({str(i): entry([0], 0) for i in range(120_000)}),
        lambda: safetensors({"x": entry([-1])}, bytes(4)),
        lambda: safetensors(b'{"x":' + b"9" * 100_000 + b"}"),
        lambda: safetensors(b"[1, 2]"),
        lambda: struct.pack("<Q", 2**63) + b"{}",
    ))()  # fmt: skip


def npy(header: str | bytes, numbers: bytes = b"") -> bytes:
    """A file of numpy's with a header of any kind."""
    written = header.encode() if isinstance(header, str) else header
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(written)) + written + numbers


def _header(kind: str, shape: str) -> str:
    return f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': ({shape}), }}\n"


def _npy(random: Random) -> bytes:
    n = random.randrange(10**9, 10**13)
    return random.choice((
        npy(_header("<f4", f"{n}, 3"), bytes(24)),
        npy(_header("|V0", f"{n}, 3")),
        npy(_header("<f4", f"{n}, 0")),
        npy(_header(f"|S{n % 2**31}", "1,")),
        npy(_header("|O", "1,"), pickled(1)),
        npy(_header("<f4", "9," * 50_000)),
        npy("[" * 5_000),
        npy(b"\xff" * 100),
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
        pickled(call("builtins.bytearray", n)),
    ))  # fmt: skip


def _npz(random: Random) -> bytes:
    content = io.BytesIO()
    header = npy(_header("<f4", f"{2**30 // 12}, 3"))
    method, megabytes = random.choice(((8, 200), (8, 600), (12, 30), (14, 30)))
    with zipfile.ZipFile(content, "w", method) as file:
        for name in ("x", "y")[: random.randrange(1, 3)]:
            with file.open(f"{name}.npy", "w") as entry:
                entry.write(header)
                for _ in range(megabytes):
                    entry.write(bytes(_MB))
    return content.getvalue()


def _npz_names(random: Random) -> bytes:
    content = io.BytesIO()
    one = npy(_header("<f4", "1, 3"), bytes(12))
    with zipfile.ZipFile(content, "w") as file:
        for name in random.choice((
            [f"{_CONTROLS}.npy"], ["x" * 60_000 + ".npy"], [f"n{i}.npy" for i in range(110_000)]
        )):  # fmt: skip
            file.writestr(name, one)
    return content.getvalue()


def _report(random: Random) -> bytes:
    from export.report_page.embedding import FORMAT

    def page(content: str | bytes) -> bytes:
        written = content.encode() if isinstance(content, str) else content
        opening = b'<script type="application/json" id="data">'
        return b"<html>" + opening + written + b"</script></html>"

    layer: dict[str, Any] = {
        "name": _CONTROLS, "in": 2**31, "out": 2**31, "order": 10**9, "steps": 10**9,
        "sampled": False, "inputs": "", "knots": "", "activation": "", "edges": "AAAAAA==",
        "importance": "AAAAAA==", "base": "AAAAAA==", "spline": "AAAAAA==",
    }  # fmt: skip
    return random.choice((
        lambda: page("[" * 10**6),
        lambda: page("[" + "{}," * 3 * 10**6 + "{}]"),
        lambda: page('["' + '","'.join(["abcd"] * 10**6) + '"]'),
        lambda: page(json.dumps({"format": FORMAT, "chain": True, "layers": [layer]})),
        lambda: page(json.dumps({"format": _CONTROLS, "chain": True, "layers": []})),
        lambda: page(json.dumps({"format": FORMAT, "chain": True, "layers": [{"order": 10}]})),
        lambda: page('{"format": %s, "layers": []}' % ("9" * 100_000)),
        lambda: page('{"format": 1e999}'),
        lambda: random.randbytes(1000),
    ))()  # fmt: skip


def _manifest(random: Random) -> bytes:
    """A manifest whose digest is right."""
    import hashlib

    body = random.choice((
        lambda: '{"format": ' + "[" * 10**6,
        lambda: '{"format": 2, "x": [' + "{}," * 2 * 10**6 + "{}]",
        lambda: '{"format": 2, "files": {' + ",".join(f'"{i}/": 1' for i in range(300_000)) + "}",
        lambda: '{"format": 2, "input_range": {"low": ["x"' + ',"x"' * 10**6 + '], "high": []}',
        lambda: '{"format": ' + "9" * 10**5,
        lambda: '{"format": 2, "version": 1e999',
        lambda: '{"format": ' + json.dumps(_CONTROLS),
        lambda: '{"format": 2, ' + json.dumps(_CONTROLS) + ": 1",
        lambda: '{"format": 2, "name": "x"',
        lambda: "[1",
    ))()  # fmt: skip
    unsigned = (body + ', "digest": ""\n}\n').encode()
    digest = hashlib.sha256(unsigned).hexdigest()
    return unsigned.removesuffix(b'""\n}\n') + f'"{digest}"\n}}\n'.encode()


def _random(random: Random) -> bytes:
    heads = (
        b"",
        b"PK\3\4",
        b"\x80\x02",
        b"\x93NUMPY",
        b"\x89HDF\r\n\x1a\n",
        b"\0" * 300,
        b"\x1b[2J",
    )
    return random.choice(heads) + random.randbytes(random.randrange(1, 20_000))


def _size(random: Random) -> tuple[int, ...]:
    return (random.randrange(10**9, 10**10),)


KINDS: dict[str, Kind] = {
    "bytearray(n)": Kind(_bomb("builtins.bytearray", _size)),
    "torch.Tensor(n)": Kind(_bomb("torch.Tensor", _size)),
    "torch.FloatTensor(n)": Kind(_bomb("torch.FloatTensor", _size)),
    "torch.sparse.FloatTensor(n)": Kind(_bomb("torch.sparse.FloatTensor", _size)),
    "UntypedStorage(n)": Kind(_bomb("torch.storage.UntypedStorage", _size)),
    "TypedStorage(n)": Kind(_bomb("torch.storage.TypedStorage", _size)),
    "range(n)": Kind(_bomb("builtins.range", _size), may_pass=True),
    "set(text)": Kind(_bomb("builtins.set", lambda r: ("x" * _MB,))),
    "a quantized tensor without numbers": Kind(_quantized),
    "a tensor copied to a device": Kind(_device_copy),
    "a tensor gone through number by number": Kind(_iterated),
    "a tensor or storage beyond its bytes": Kind(_beyond),
    "a storage larger than a legacy file": Kind(_legacy_storage),
    "a number in a tensor": Kind(_number_of_a_tensor),
    "dimensions without end": Kind(_dimensions),
    "claims by strides of zero": Kind(_claimed),
    "claims in folded weights": Kind(_folded),
    "very many lists": Kind(_many(b"]"), slow=True),
    "very many sets": Kind(_many(b"\x8f"), slow=True),
    "very many dicts": Kind(_many(b"}"), slow=True),
    "very many numbers": Kind(_many(b"G@\x08\0\0\0\0\0\0"), slow=True),
    "very many marks": Kind(_many(MARK), slow=True),
    "very many tensors by call": Kind(
        _many(named("torch.FloatTensor") + b")\x81", 600_000), slow=True
    ),
    "very many names of tensors": Kind(_many_tensors, slow=True),
    "very many KANs": Kind(_many_kans, slow=True),
    "very many classes": Kind(_many_classes),
    "a key of megabytes": Kind(_long_key),
    "keys that are long together": Kind(_long_path),
    "a hash without end": Kind(_laughs),
    "nested without end": Kind(_deep, may_pass=True, slow=True),
    "keys that collide": Kind(_colliding),
    "a list copied many times": Kind(_repeated),
    "a text copied many times": Kind(_copied_text),
    "modules within modules without end": Kind(_shared_modules),
    "controls in names": Kind(_class_names),
    "a pickle alone": Kind(_other_pickle),
    "opcodes of other protocols": Kind(_protocol),
    "an archive that inflates": Kind(_deflated, slow=True),
    "names of entries": Kind(_entry_names, slow=True),
    "two entries of a name": Kind(_twice),
    "entries that overlap": Kind(_overlapping),
    "bytes before or after an archive": Kind(_prepended),
    "version needed": Kind(_raw("<H", {"at": 6, "value": lambda r: r.choice((64, 100, 999))})),
    "an encrypted entry": Kind(_raw("<H", {"at": 8, "value": lambda r: r.choice((1, 33, 0x2041))})),
    "a method of compression": Kind(_raw("<H", {"at": 10, "value": lambda r: r.choice((1, 8, 9))})),
    "a wrong checksum": Kind(_raw("<I", {"at": 16, "value": lambda r: r.getrandbits(32)})),
    "a wrong size": Kind(_raw("<I", {"at": 24, "value": lambda r: r.getrandbits(32)})),
    "a wrong compressed size": Kind(_raw("<I", {"at": 20, "value": lambda r: r.getrandbits(32)})),
    "a wrong offset": Kind(_raw("<I", {"at": 42, "value": lambda r: r.getrandbits(31) + 1})),
    "a changed archive": Kind(_mutated(_honest), may_pass=True),
    "a changed pickle": Kind(_mutated_pickle, may_pass=True),
    "a changed legacy file": Kind(_mutated(_honest_legacy), may_pass=True),
    "changed safetensors": Kind(_mutated(_honest_safetensors), ".safetensors", may_pass=True),
    "a safetensors header": Kind(_safetensors_header, ".safetensors"),
    "random bytes": Kind(_random),
    "samples that claim": Kind(_npy, ".npy", "samples"),
    "samples that inflate": Kind(_npz, ".npz", "samples", slow=True),
    "names of samples": Kind(_npz_names, ".npz", "samples", slow=True),
    "random samples": Kind(_random, ".npz", "samples"),
    "a report": Kind(_report, ".html", "report"),
    "a manifest": Kind(_manifest, "", "bundle"),
}  # fmt: skip
