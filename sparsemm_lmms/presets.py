"""The methods by name: which scorer ranks the tokens of a head, and which allocator says how many it keeps.

The only list of method names: lmms-eval's manifest, VLMEvalKit's names, sweeps, figures, cards and the docs read
it. Imported at every start of lmms-eval, so nothing heavy may be imported here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """A method.

    Attributes:
        scorer: name of a file in `scorers/` or of an entry point `sparsemm_lmms.scorers`; None for no ranking.
        allocator: name of a file in `allocators/` or of an entry point `sparsemm_lmms.allocators`.
        tokens, counts: which tokens of a head stay, and how many; the words of the documentation.
    """

    scorer: str | None
    allocator: str
    tokens: str
    counts: str


WINDOW = "attention of the last `window_size` queries"
BEHIND = "attention of the queries behind the images"
LAST = f"{WINDOW}, corrected by what the last one alone sees"
MIXED = f"{WINDOW}, size of the value and difference of the key"
BY_HEAD = f"{MIXED}, mixed head by head (`h`)"
METHODS = {
    "sparsemm": Preset(
        "window_attention", "head_scores", WINDOW, "by visual-head scores over the whole model, floor `ratio`"
    ),
    "waterfill": Preset(
        "window_attention",
        "waterfill",
        WINDOW,
        "half by visual-head scores, half by measured retention (`score_share`), exactly `budget`",
    ),
    "snapkv": Preset("window_attention", "uniform", WINDOW, "`budget` for every head"),
    "pyramidkv": Preset("window_attention", "pyramid", WINDOW, "less with depth (`beta`)"),
    "adakv": Preset(
        "window_attention",
        "adakv",
        WINDOW,
        "shared out inside a layer by attention (`floor_ratio`, `normalize`, `skip`)",
    ),
    "random": Preset(
        "window_attention", "random_heads", WINDOW, "as `sparsemm` with random scores (`seed`): the control"
    ),
    "local_window": Preset("recency", "uniform", "the most recent", "`budget` for every head"),
    "fullkv": Preset(None, "everything", "all", "all: the baseline, through the same cache"),
    "mask": Preset(None, "mask", "all", "all; the `mask_ratio` best visual heads are silenced"),
    "mask_random": Preset(None, "mask_random", "all", "all; as many other heads (`seed`) are silenced: the control"),
    "bacon": Preset("bacon", "uniform", LAST, "`budget` for every head"),
    "sparsemm_bacon": Preset("bacon", "head_scores", LAST, "as `sparsemm`"),
    "adakv_bacon": Preset("bacon", "adakv", LAST, "as `adakv`, by the uncorrected attention"),
    "mixkv": Preset("mixkv", "uniform", MIXED, "`budget` for every head"),
    "headwisemixkv": Preset("headwisemixkv", "uniform", BY_HEAD, "`budget` for every head"),
    "sparsemm_mixkv": Preset("headwisemixkv", "head_scores", BY_HEAD, "as `sparsemm`"),
    "keydiff": Preset("keydiff", "uniform", "keys least like the mean key", "`budget` for every head"),
    "expected_attention": Preset(
        "expected_attention", "uniform", "attention expected of the queries to come", "`budget` for every head"
    ),
    "vlcache": Preset(
        "post_vision", "layer_sparsity", BEHIND, "shared out among layers by how many tokens those queries attend to"
    ),
    "tgvkv": Preset(
        "tgv",
        "tgv_layers",
        "text; of images what the question's weightiest words attend to",
        "shared out among layers by the question's attention to the images",
    ),
    "cake": Preset(
        "cake",
        "cake",
        f"mean and variance (`gamma`) of the {WINDOW}",
        "shared out among layers by entropy (`tau1`) and variance (`tau2`) of that attention",
    ),
}
"""Method name -> what it is made of, in the order of tables."""

FREE = "compressed"
"""The name under which hosts offer any scorer with any allocator: `<family>_compressed`."""
FREE_PARTS = {"scorer": "window_attention", "allocator": "uniform"}
"""Its two arguments of their own, and their defaults."""
