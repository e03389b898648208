# cython: language_level=3, boundscheck=False, wraparound=False
"""The compiled twin of ``_key_search_py``, with the same names.

HMAC-SHA256 (RFC 2104, FIPS 180-4) of one message with several keys at once: the same
operation runs on LANES keys. A prepared key is the state of both hashes after their
first block, which depends on the key alone. No branch and no address depends on a key.
"""

from cpython.bytes cimport (
    PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
)
from cpython.object cimport PyObject
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

import hashlib

NAME = "compiled"
SLICE = 512

cdef extern from "Python.h":
    # Borrowed references, not counted.
    PyObject* PyList_GET_ITEM(object, Py_ssize_t)
    Py_ssize_t PyList_GET_SIZE(object)

cdef extern from *:
    """
    #if defined(__GNUC__)
    #define LANES 8
    typedef uint32_t lanes __attribute__((vector_size(4 * LANES), may_alias));
    #else
    #define LANES 1
    typedef uint32_t lanes;
    #endif
    #if defined(__GNUC__) && defined(__x86_64__) && defined(__GLIBC__)
    /* Compiled twice: the processor's own instructions are three times as fast. */
    #define CLONED __attribute__((target_clones("avx2", "default")))
    #else
    #define CLONED
    #endif
    #define ROTATED(x, n) ((x) >> (n) | (x) << (32 - (n)))

    static const uint32_t ROUND_CONSTANTS[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
        0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
        0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
        0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
        0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
        0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
        0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
        0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
        0xc67178f2};

    /* FIPS 180-4, 6.2.2: one block; words becomes the message schedule. */
    CLONED static void compress(lanes state[8], lanes words[16]) {
        lanes a = state[0], b = state[1], c = state[2], d = state[3];
        lanes e = state[4], f = state[5], g = state[6], h = state[7];
        for (int round = 0; round < 64; round++) {
            lanes word = words[round & 15];
            if (round >= 16) {
                lanes w15 = words[(round + 1) & 15], w2 = words[(round + 14) & 15];
                word += (ROTATED(w15, 7) ^ ROTATED(w15, 18) ^ w15 >> 3) + words[(round + 9) & 15] +
                        (ROTATED(w2, 17) ^ ROTATED(w2, 19) ^ w2 >> 10);
                words[round & 15] = word;
            }
            lanes t1 = h + (ROTATED(e, 6) ^ ROTATED(e, 11) ^ ROTATED(e, 25)) +
                       (g ^ (e & (f ^ g))) + ROUND_CONSTANTS[round] + word;
            lanes t2 = (ROTATED(a, 2) ^ ROTATED(a, 13) ^ ROTATED(a, 22)) +
                       ((a & b) | (c & (a | b)));
            h = g; g = f; f = e; e = d + t1;
            d = c; c = b; b = a; a = t1 + t2;
        }
        state[0] += a; state[1] += b; state[2] += c; state[3] += d;
        state[4] += e; state[5] += f; state[6] += g; state[7] += h;
    }
    """
    enum:
        LANES
    # A word of each lane: an array of LANES numbers.
    ctypedef struct lanes:
        pass
    void compress(lanes* state, lanes* words) noexcept

cdef enum:
    BLOCK = 64
    DIGEST = 32
    WORDS = 8
    PREPARED = 2 * DIGEST
    #: Blocks of the longest message: a challenge has at most 256 bytes.
    MOST_BLOCKS = 5

cdef uint32_t[8] _START = [
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19
]


cdef inline void _set(lanes* word, uint32_t value) noexcept:
    """Set a word of all lanes."""
    cdef int lane
    for lane in range(LANES):
        (<uint32_t*> word)[lane] = value


cdef inline uint32_t _big_endian(const uint8_t* data) noexcept:
    return (
        <uint32_t> data[0] << 24 | <uint32_t> data[1] << 16 | <uint32_t> data[2] << 8 | data[3]
    )


cdef void _load(lanes* words, const uint8_t* block) noexcept:
    """Set the words of all lanes to one block."""
    cdef int number
    for number in range(16):
        _set(&words[number], _big_endian(block + 4 * number))


def prepare(bytes key not None):
    """Return a key in the form that ``find`` needs; as secret as the key."""
    cdef uint8_t[BLOCK] block
    cdef lanes[8] state
    cdef lanes[16] words
    cdef uint32_t[16] prepared
    cdef int part, pad, number
    cdef Py_ssize_t position
    if PyBytes_GET_SIZE(key) > BLOCK:
        key = hashlib.sha256(key).digest()
    for part, pad in ((0, 0x36), (1, 0x5C)):
        memset(block, pad, BLOCK)
        for position in range(PyBytes_GET_SIZE(key)):
            block[position] ^= <uint8_t> PyBytes_AS_STRING(key)[position]
        for number in range(WORDS):
            _set(&state[number], _START[number])
        _load(words, block)
        compress(state, words)
        for number in range(WORDS):
            prepared[part * WORDS + number] = (<uint32_t*> &state[number])[0]
    return PyBytes_FromStringAndSize(<char*> prepared, PREPARED)


def find(list prepared not None, Py_ssize_t start, Py_ssize_t stop, bytes message not None,
         bytes mac not None):
    """Return the position of the first key, in a part of a list, that made a MAC, or -1.

    Args:
        prepared: What ``prepare`` returned for each key.
        message: The input of the MAC, at most 256 bytes.
    """
    cdef uint8_t[MOST_BLOCKS * BLOCK] padded
    cdef uint32_t[WORDS] wanted
    cdef lanes[8] state
    cdef lanes[16] words
    cdef const uint32_t* keys[LANES]
    cdef Py_ssize_t size = PyBytes_GET_SIZE(message)
    cdef Py_ssize_t blocks = (size + 9 + BLOCK - 1) // BLOCK
    cdef uint64_t bits = (BLOCK + size) * 8
    cdef Py_ssize_t first, last = min(stop, PyList_GET_SIZE(prepared)) - 1
    cdef uint32_t differences
    cdef int lane, number, position
    cdef PyObject* item
    if blocks > MOST_BLOCKS or PyBytes_GET_SIZE(mac) != DIGEST:
        raise ValueError("the message is too long, or the MAC has not 32 bytes")
    memset(padded, 0, sizeof(padded))
    memcpy(padded, PyBytes_AS_STRING(message), size)
    padded[size] = 0x80
    for position in range(8):
        padded[blocks * BLOCK - 1 - position] = <uint8_t> (bits >> 8 * position & 0xFF)
    for number in range(WORDS):
        wanted[number] = _big_endian(<uint8_t*> PyBytes_AS_STRING(mac) + 4 * number)
    for first in range(start, last + 1, LANES):
        for lane in range(LANES):
            # The last keys may not fill all lanes: the last key fills the rest.
            item = PyList_GET_ITEM(prepared, min(first + lane, last))
            if not PyBytes_CheckExact(<object> item) or PyBytes_GET_SIZE(<object> item) != PREPARED:
                raise TypeError("an item is not a prepared key")
            keys[lane] = <const uint32_t*> PyBytes_AS_STRING(<object> item)
            for number in range(WORDS):
                (<uint32_t*> &state[number])[lane] = keys[lane][number]
        for number in range(blocks):
            _load(words, padded + number * BLOCK)
            compress(state, words)
        # The outer hash: 32 bytes behind the key's block.
        for number in range(WORDS):
            words[number] = state[number]
            _set(&words[WORDS + number], 0)
        _set(&words[8], 0x80000000)
        _set(&words[15], (BLOCK + DIGEST) * 8)
        for lane in range(LANES):
            for number in range(WORDS):
                (<uint32_t*> &state[number])[lane] = keys[lane][WORDS + number]
        compress(state, words)
        for lane in range(LANES):
            differences = 0
            for number in range(WORDS):
                differences |= (<uint32_t*> &state[number])[lane] ^ wanted[number]
            if not differences:
                return min(first + lane, last)
    return -1
