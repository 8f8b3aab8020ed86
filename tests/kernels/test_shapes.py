"""Every group size with every head_dim, and segments of 0, 1, 31, 33 and 1000 rows, in all four kernels."""

import pytest

from . import test_append as append
from . import test_evict as evict
from . import test_ragged_decode as decode
from . import test_window_score as score

LENGTHS = [0, 1, 31, 33, 1000]
GROUPS, HEAD_DIMS = (1, 4, 7), (64, 80, 96, 128)


def padded_batch(count):
    """Two sequences, the second with less of its newest tokens real; a segment holds at least what was appended."""
    rows = [LENGTHS, LENGTHS[::-1]]
    return rows if count is None else [[max(x, new) for x in row] for row, new in zip(rows, count, strict=True)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("tokens, count", [(1, None), (3, [3, 2])])
def test_ragged_decode(group, head_dim, tokens, count):
    decode.check(padded_batch(count), group, tokens, head_dim, count=count, backend="torch")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("count", [None, [3, 2]])
@pytest.mark.parametrize("room", [2, 3])
def test_append(head_dim, count, room):
    """Room 3: exactly full afterwards. Room 2: refused where three tokens come, and nothing else touched."""
    assert append.check([LENGTHS, LENGTHS[::-1]], 3, head_dim, room=room, count=count) == (room == 2)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("n", [1000, 1007])
def test_evict(head_dim, n):
    evict.check([LENGTHS, LENGTHS[::-1]], n, head_dim, layout="transposed")


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_window_score(group, head_dim, length):
    shape = (2, 2 * group, 2, 8, length + 8, head_dim)
    score.check(shape, "avgpool", "mean", pad=[0, length // 3], backend="torch")


def test_append_interpreter(interpreter):
    append.check([LENGTHS], 1, 80, room=1, backend="triton")  # exactly full afterwards


def test_evict_interpreter(interpreter):
    evict.check([LENGTHS], 1000, 96, backend="triton")


def test_ragged_decode_interpreter(interpreter):
    decode.check([LENGTHS], 7, 1, 80, max_length=1000, backend="triton")
