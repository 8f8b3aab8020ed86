"""What a plugin may not do to its host: shadow other packages, or make every start slow."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "triton", "transformers", "datasets", "matplotlib")


def run(code: str, **kwargs) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["", ".demo", ".presets", ".families", ".model_wrappers.lmms_eval.manifest"])
def test_light_imports(module):
    loaded = run(f"import sys, sparsemm_lmms{module}; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_entry_point_is_what_the_host_loads():
    entries = [e for e in importlib.metadata.entry_points(group="lmms_eval.models") if e.name == "sparsemm_lmms"]
    assert [entry.value for entry in entries] == ["sparsemm_lmms.model_wrappers.lmms_eval.manifest:manifests"]


def test_our_kernels_folder_never_shadows_the_kernels_package(tmp_path):
    """Started from a clone, `import kernels` must find Hugging Face's package: a namespace folder loses to it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'the real one'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.WHOSE)"
    assert run(code, cwd=ROOT).strip() == "the real one"


def test_a_llama_is_built_from_the_clone():
    """transformers looks for Hugging Face's `kernels`; our folder on sys.path must not confuse it."""
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM as M;"
        "M(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1));"
        "print('built')"
    )
    assert run(code, cwd=ROOT).strip() == "built"


def test_version_has_one_source():
    import sparsemm_lmms

    assert importlib.metadata.version("sparsemm-lmms") == sparsemm_lmms.__version__


def test_public_api():
    import sparsemm_lmms

    assert all(getattr(sparsemm_lmms, name) is not None for name in sparsemm_lmms.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sparsemm_lmms.nonsense


def test_a_clone_on_the_path_finds_its_own_folders():
    """`python -m lmms_eval` from the root of a clone, with the package installed elsewhere and not editable."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r});"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import sparsemm_lmms.kernels as k, sparsemm_lmms.cpu_kernels as c, sparsemm_lmms.task_overrides as t;"
        "import sparsemm_lmms.model_wrappers.lmms_eval.manifest;"
        "print(k.__file__, c.__file__, t.__file__)"
    )
    found = run(code, cwd=ROOT).split()
    folders = ("kernels/triton", "kernels/cpu", "task_overrides")
    assert found == [str(ROOT / folder / "__init__.py") for folder in folders]
