"""The embedded demo models, their data and their training command (no torch import here)."""

from importlib.resources import files

FAMILIES = ("llava_next", "qwen2_vl", "internvl")


def model_path(family: str) -> str:
    """Folder of the embedded demo model of `family`, in the ordinary Hugging Face layout."""
    if family not in FAMILIES:
        raise ValueError(f"pretrained=demo: unknown demo family {family!r}; known: {', '.join(FAMILIES)}.")
    path = files(__package__) / "models" / family
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the demo model of {family!r} is not installed at {path}")
    return str(path)
