"""A sender written from docs/wire.md alone: its frames, made without any code of ours or cbor2, are read as meant.

The numbers in brackets are the rules of the document.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from edge_sdk.wire import Assembler, Message, decode_frame


def head(major: int, value: int) -> bytes:
    """The initial bytes of an item; always 8 bytes of length above 23, which [R17] allows."""
    return bytes([major << 5 | value]) if value < 24 else bytes([major << 5 | 27]) + struct.pack(">Q", value)


def uint(value: int) -> bytes:
    return head(0, value)


def text(value: str) -> bytes:
    return head(3, len(value.encode())) + value.encode()


def real(value: float) -> bytes:
    return b"\xfb" + struct.pack(">d", value)


def array(*items: bytes) -> bytes:
    return head(4, len(items)) + b"".join(items)


def mapping(**items: bytes) -> bytes:
    return head(5, len(items)) + b"".join(text(name.replace("__", ".")) + item for name, item in items.items())


def typed(tag: int, shape: Sequence[int], data: bytes) -> bytes:
    return head(6, 40) + array(array(*map(uint, shape)), head(6, tag) + head(2, len(data)) + data)


def int64(shape: Sequence[int], values: Sequence[int]) -> bytes:
    return mapping(data=typed(79, shape, struct.pack(f"<{len(values)}q", *values)))


def float32(shape: Sequence[int], values: Sequence[float]) -> bytes:
    return mapping(data=typed(85, shape, struct.pack(f"<{len(values)}f", *values)))


def float16(shape: Sequence[int], values: Sequence[float]) -> bytes:
    """[R27], [R28]"""
    largest = max(map(abs, values))
    scale = max(math.ldexp(1.0, math.frexp(largest)[1] - 15), 2.0**-126) if largest else 1.0
    data = struct.pack(f"<{len(values)}e", *(value / scale for value in values))
    return mapping(data=typed(84, shape, data), scale=real(scale))


def packed(shape: Sequence[int], values: Sequence[float], *, bits: int, low: float, high: float) -> bytes:
    """[R30], [R31], [R33]"""
    samples, *dims = shape
    count, last = math.prod(dims), 2**bits - 1
    data = b""
    for start in range(0, samples * count, count):
        digits = ""
        for value in values[start : start + count]:
            code = round((min(max(value, low), high) - low) * last / (high - low))  # ties to even, as Python rounds
            digits += f"{code:0{bits}b}"
        digits += "0" * (-len(digits) % 8)
        data += bytes(int(digits[at : at + 8], 2) for at in range(0, len(digits), 8))
    dimensions = array(*map(uint, dims))
    size = len(data) // samples
    return mapping(
        data=typed(64, [samples, size], data), bits=uint(bits), shape=dimensions, low=real(low), high=real(high)
    )


def crc32(data: bytes) -> int:
    """[R20]"""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0xEDB88320 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def frames(kind: str, run: str, session: str, step: int, fields: bytes, tensors: bytes, chunk: int) -> list[bytes]:
    """[R21], [R34]"""
    body = mapping(tensors=tensors, fields=fields, id=array(text(kind), text(run), text(session), uint(step)))
    pieces = [body[start : start + chunk] for start in range(0, len(body), chunk)]
    return [
        mapping(
            v=uint(1), kind=text(kind), run=text(run), session=text(session), step=uint(step),
            chunk=array(uint(index), uint(len(pieces))), size=uint(len(body)), crc=uint(crc32(body)),
            body=head(2, len(piece)) + piece,
        )
        for index, piece in enumerate(pieces)
    ]  # fmt: skip


def read(packets: list[bytes]) -> Message:
    assembler = Assembler()
    (message,) = [done for data in packets if (done := assembler.add(decode_frame(data))) is not None]
    return message


VALUES = [0.0, 0.125, -2.5, 1e-7, 65504.0, 3.0]


@pytest.mark.parametrize("chunk", [40, 65536])
@pytest.mark.parametrize("encode", [float32, float16])
def test_training_steps_and_stored_samples(
    encode: Callable[[Sequence[int], Sequence[float]], bytes], chunk: int
) -> None:
    tensors = mapping(labels=int64([2], [1, 0]), activations=encode([2, 3], VALUES))
    train = frames("train", "run", "a1", 2**53, mapping(front=uint(4), samples=uint(700)), tensors, chunk)
    fields = mapping(first=uint(10), total=uint(5000), front=uint(0), later=array(real(0.5), b"\xf6", b"\xf5"))
    store = frames("store", "run", "a1", 3, fields, tensors, chunk)
    assert (len(train) > 1) == (chunk == 40)
    message = read(train[::-1])
    assert (message.kind, message.run, message.session, message.step) == ("train", "run", "a1", 2**53)
    assert message.fields == {"front": 4, "samples": 700}
    assert message.tensors["labels"].tolist() == [1, 0]
    sent = np.array(VALUES, np.float32).reshape(2, 3)
    if encode is float32:
        assert np.array_equal(message.tensors["activations"], sent)
    else:
        assert np.allclose(message.tensors["activations"], sent, rtol=2**-11, atol=2.0**-39 * 65504)
    woven = [packet for pair in itertools.zip_longest(store, train) for packet in pair if packet is not None]
    assembler = Assembler()
    done = [message for data in woven if (message := assembler.add(decode_frame(data))) is not None]  # [R35]
    assert {message.kind for message in done} == {"train", "store"}
    stored = next(message for message in done if message.kind == "store")
    assert stored.fields == {"first": 10, "total": 5000, "front": 0, "later": [0.5, None, True]}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_activations_in_few_bits(bits: int) -> None:
    low, high, last = -1.5, 2.25, 2**bits - 1
    values = [-9.0, -1.5, 0.0, 0.375, 2.0, 2.25, 9.0, 1.0, 0.3, -0.2]
    question = mapping(activations=packed([2, 5, 1], values, bits=bits, low=low, high=high))
    got = read(frames("infer", "r", "s", 3, mapping(front=uint(1)), question, 1000)).tensors["activations"]
    assert got.shape == (2, 5, 1) and got.dtype == np.float32
    for value, mine in zip(got.reshape(-1).tolist(), values, strict=True):
        code = round((value - low) * last / (high - low))
        assert value == np.float32(low) + np.float32(code) * np.float32(high - low) / np.float32(last)  # [R32]
        assert abs(value - min(max(mine, low), high)) <= (high - low) / last / 2 + 1e-6


def test_fronts_questions_and_states() -> None:
    tensors = mapping(
        p__weight=float32([1, 2], [1.5, -2.0]), b__mean=float32([3], [0.0, 1.0, 2.0]), s__steps=float32([], [7.0])
    )
    front = read(frames("front", "r", "s", 1, mapping(front=uint(1)), tensors, 1000))
    assert {name: tensor.tolist() for name, tensor in front.tensors.items()} == {
        **{"p.weight": [[1.5, -2.0]], "b.mean": [0.0, 1.0, 2.0]},
        "s.steps": 7.0,
    }
    assert not read(frames("front", "r", "s", 2, mapping(front=uint(1)), mapping(), 1000)).tensors
    question = mapping(activations=float32([1, 1, 2, 1, 1, 1], [0.5, 0.25]))
    infer = read(frames("infer", "r", "s", 3, mapping(front=uint(1)), question, 1000))
    assert infer.tensors["activations"].shape == (1, 1, 2, 1, 1, 1)
    fields = mapping(status=text("online"), manifest=text("ab12"), speaks=array(uint(1)), bytes_per_sample=uint(12))
    state = read(frames("state", "", "s", 0, fields, mapping(), 1000))
    assert state.fields == {"status": "online", "manifest": "ab12", "speaks": [1], "bytes_per_sample": 12.0}
