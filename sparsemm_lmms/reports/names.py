"""How a sweep names its rows: a method, a control of it, and behind `#` the number of a draw.

`sparsemm_bacon@permuted#3` is the fourth draw of `sparsemm_bacon` with permuted head scores. The controls of `sparsemm`
stand without its name: `permuted` and `layer_mean`, and `random`, which is a method of the package.
"""

from __future__ import annotations

from dataclasses import dataclass

WORDS = ("random", "permuted", "layer_mean", "uniform")
"""Head scores in place of the measured ones: drawn, dealt to other heads, alike in a layer, alike everywhere."""
SHORT = ("permuted", "layer_mean", "uniform")
"""Controls of sparsemm that are no method of the package."""
CONTROLS_OF = {"random": "sparsemm", "mask_random": "mask"}
"""Methods that are controls themselves, and of what."""


@dataclass(frozen=True)
class RowName:
    """A name taken apart.

    Attributes:
        method: a method of the package, or `SCORER+ALLOCATOR`.
        control: one of `WORDS` where the method runs with those head scores, else empty.
        draw: what stands behind `#`, else empty.
    """

    method: str
    control: str = ""
    draw: str = ""

    @property
    def is_control(self) -> bool:
        return bool(self.control) or self.method in CONTROLS_OF

    @property
    def of(self) -> str:
        """The method of which it is a control; of others itself."""
        return self.method if self.control else CONTROLS_OF.get(self.method, self.method)

    @property
    def word(self) -> str:
        """What kind of control it is; empty for none."""
        return self.control or ("random" if self.method in CONTROLS_OF else "")

    @property
    def is_drawn(self) -> bool:
        """Whether the seed decides it."""
        return self.word in ("random", "permuted")


def split_name(name: str) -> RowName:
    """A name taken apart.

    >>> split_name("sparsemm_bacon@permuted#3")
    RowName(method='sparsemm_bacon', control='permuted', draw='3')
    >>> split_name("layer_mean")
    RowName(method='sparsemm', control='layer_mean', draw='')
    """
    rest, _, draw = name.partition("#")
    if rest in SHORT:
        return RowName("sparsemm", rest, draw)
    method, _, control = rest.partition("@")
    return RowName(method, control, draw)


def without_draw(name: str) -> str:
    """The name of the row that a draw belongs to.

    >>> without_draw("random#3")
    'random'
    """
    return name.partition("#")[0]


def normal_name(name: str) -> str:
    """One name for one row: `sparsemm@permuted` is `permuted`.

    >>> normal_name("sparsemm@random#2")
    'random#2'
    """
    return name.removeprefix("sparsemm@")
