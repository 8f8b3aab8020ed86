"""The registered names: complete, resolvable, and cheap to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from lmms_eval.models import get_model, get_model_manifest
from lmms_eval.models.registry_v2 import ModelRegistryV2

from sparsemm_lmms.families import ANY, FAMILIES
from sparsemm_lmms.model_wrappers.lmms_eval.manifest import manifests
from sparsemm_lmms.presets import FREE, METHODS

NAMES = (*METHODS, FREE)

HEAVY = ("torch", "triton", "transformers", "datasets", "accelerate", "numpy")


def test_every_family_and_method_has_a_manifest() -> None:
    assert {"llava_next", "qwen2_vl"} <= set(FAMILIES)
    wanted = {f"{family}_{method}" for family in (*FAMILIES, ANY) for method in NAMES}
    assert {manifest.model_id for manifest in manifests()} == wanted
    assert all(manifest.simple_class_path is None for manifest in manifests())


def test_the_host_accepts_the_entry_points_value() -> None:
    registry = ModelRegistryV2()
    assert len(registry._coerce_payload_to_manifests(manifests)) == (len(FAMILIES) + 1) * len(NAMES)


@pytest.mark.parametrize("name", sorted(manifest.model_id for manifest in manifests()))
def test_installed_names_resolve_to_their_class(name: str) -> None:
    assert get_model_manifest(name).chat_class_path  # through the installed entry point
    model = get_model(name)
    assert f"{ANY if model.any_checkpoint else model.family.model_type}_{model.method}" == name
    assert not model.is_simple


def test_importing_the_manifest_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sparsemm_lmms.model_wrappers.lmms_eval.manifest import manifests; manifests();"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    before = "import sys, lmms_eval.models.registry_v2;" + f"print([name for name in {HEAVY} if name in sys.modules])"
    loaded = [
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True) for c in (code, before)
    ]
    assert loaded[0].stdout == loaded[1].stdout
    assert "torch" not in loaded[0].stdout
