"""Types of cached keys and values: their precision, their size, and what an outlier spoils."""

from __future__ import annotations

import numpy as np
import pytest

from edgelm.cache import PAGE
from edgelm.flags import CACHE_TYPES, cache_type
from edgelm.gguf_model import usual_kv_type
from edgelm.kv_types import KV_TYPES, bfloat16, both, hadamard, named

BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q4_0": 4.5}

# Of normal numbers, relative, root of mean square.
ERRORS = {"f32": 0, "f16": 3e-4, "bf16": 2.4e-3, "q8_0": 7e-3, "q4_0": 0.11}

USUAL = usual_kv_type("auto")


def test_flags_name_every_type():
    assert set(CACHE_TYPES) == set(KV_TYPES) == set(BITS) == set(ERRORS)


@pytest.mark.parametrize(("k", "v", "interpreter", "kv_type"), [
    ("q8_0", "q8_0", None, "q8_0"), ("q8_0", None, None, f"q8_0/{USUAL}"), (None, "q4_0", None, f"{USUAL}/q4_0"),
    (USUAL, None, "program", USUAL), ("q4_0", None, "reference", "q4_0/f32"),
    ("f32", None, "onnxruntime", f"f32/{USUAL}"),
])
def test_flags(k, v, interpreter, kv_type):
    """As llama.cpp's: each is for one of the two, and the other stays what it is."""
    assert cache_type({"cache_type_k": k, "cache_type_v": v, "interpreter": interpreter}) == {"kv_type": kv_type}
    assert named(*both(kv_type)) == kv_type
    assert cache_type({"interpreter": interpreter}) == {}


@pytest.mark.parametrize("kv_type", [*KV_TYPES])
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("dim", [1, 3, 16, 24, 32, 64, 80, 96, 256])
def test_types(kv_type, keys, dim):
    """Precision, size, and that a position depends on nothing but itself: neither on the call nor on what was there."""
    array, rng = KV_TYPES[kv_type](keys, 2, dim), np.random.default_rng(dim)
    x = rng.standard_normal((PAGE, 2, dim), np.float32)
    page, other = (np.full(array.n_bytes, fill, np.uint8) for fill in (0, 0xFF))
    array.write(page, 0, x)
    for at, n in ((63, 1), (0, 5), (5, 58)):
        array.write(other, at, x[at : at + n])
    y = array.read(page)
    np.testing.assert_array_equal(array.read(other), y)
    assert np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2)) <= ERRORS[kv_type]
    if dim % 32 == 0:
        assert 8 * array.n_bytes == PAGE * 2 * dim * BITS[kv_type]
    array.keep(other, 7)
    np.testing.assert_array_equal(array.read(other)[:7], y[:7])
    assert not array.read(other)[7:].any()


def test_bfloat16():
    """The upper half of a float32, to nearest even; what is subnormal is zero with its sign, NaN stays one."""
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF, 0x7F7FFFFF, 0xFF800000, 0x7F800001, 0x807FFFFF, 0x00800000]
    want = [0x3F80, 0x3F82, 0x3F81, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 0x8000, 0x0080]
    assert bfloat16(np.array(bits, np.uint32).view(np.float32)).tolist() == want


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_outliers_spoil_their_block_alone(kv_type):
    array = KV_TYPES[kv_type](True, 1, 96)
    x = np.random.default_rng(0).standard_normal((PAGE, 1, 96)).astype(np.float32)
    y, page = x.copy(), np.zeros(array.n_bytes, np.uint8)
    y[:, :, 40] = 1000
    array.write(page, 0, y)
    read = array.read(page)
    assert np.abs(read - y)[:, :, 32:64].max() <= 1000 / 32**0.5 / (127 if kv_type == "q8_0" else 8) * 6
    assert np.abs(read - y)[:, :, [*range(32), *range(64, 96)]].max() < (0.1 if kv_type == "q8_0" else 1.5)


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_what_is_not_finite_is_not_a_number(kv_type):
    array, x = KV_TYPES[kv_type](False, 1, 64), np.ones((3, 1, 64), np.float32)
    page = np.zeros(array.n_bytes, np.uint8)
    x[0, 0, 5], x[1, 0, 40] = np.nan, -np.inf
    array.write(page, 0, x)
    broken = np.isnan(array.read(page)[:3, 0])
    assert broken.all(axis=1).tolist() == [False] * 3
    assert broken.sum(axis=1).tolist() == [32, 32, 0]


def test_hadamard():
    h = hadamard(np.eye(32, dtype=np.float32)).astype(np.float64)
    np.testing.assert_allclose(h @ h.T, np.eye(32), atol=1e-6)
    np.testing.assert_allclose(np.abs(h), 32**-0.5, atol=1e-7)
    sylvester = np.ones((1, 1))
    for _ in range(5):
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    np.testing.assert_array_equal(np.sign(h), sylvester)
