"""A CUDA graph's behaviour on the CPU, to prove what a captured decode step does without having a GPU.

`capture` runs a step once and undoes what it did; it notes every ATen operator and every kernel launch with the very
tensors and the Python numbers they got. `replay` repeats them on the same memory, and no Python of the model runs. So
a number that Python counts and bakes in, a tensor that moved, or a step that waits for the device shows as wrong
tokens or as an error, as it would with the real thing. Triton's interpreter needs seconds for a step, so most tests run
under `emulations`: the launchers as they are, and the torch reference in place of each launch.
"""

from __future__ import annotations

import dis
import importlib
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

KERNELS = {"append": ["_append_kernel"], "ragged_decode": ["_decode_kernel", "_merge_kernel"]}
# What waits for the device, has a size that depends on data, or copies from host memory.
SYNCHRONISES = {
    "_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "repeat_interleave", "multinomial", "lift_fresh", "bincount",
}  # fmt: skip


def emulations():
    """(module, name, value) of what makes launches do what the torch references do, on the same arguments.

    Prompts are compressed by the torch form.
    """
    decode = importlib.import_module("sparsemm_lmms.kernels.ragged_decode")
    append = importlib.import_module("sparsemm_lmms.kernels.append")

    def appended(grid, keys, values, start, length, capacity, new_keys, new_values, count, overflow, *numbers, **_):
        count = count if numbers[-1] else None
        append.append_torch(keys, values, start, length, capacity, new_keys, new_values, overflow, count)

    def decoded(
        grid, query, keys, values, start, length, count, out, part_out, part_lse, *numbers, softcap, sinks, **_
    ):
        scaling, cap = numbers[3] / decode.LOG2E, None if softcap is None else softcap / decode.LOG2E
        count = count if numbers[-1] else None
        store = keys, values, start, length
        out.copy_(decode.ragged_decode_torch(query, *store, scaling, count, softcap=cap, sinks=sinks))

    for module, kernel, form in (
        (append, "_append_kernel", appended),
        (decode, "_decode_kernel", decoded),
        (decode, "_merge_kernel", lambda grid, *_, **__: None),
    ):
        yield module, kernel, Emulated(form)
    for name in ("evict", "window_score"):
        module = importlib.import_module(f"sparsemm_lmms.kernels.{name}")
        yield module, "resolve_backend", lambda *_: "torch"


class Emulated(SimpleNamespace):
    def __init__(self, form):
        super().__init__(form=form)

    def __getitem__(self, grid):
        return lambda *args, **constants: self.form(grid, *args, **constants)


class TapeGraph:
    """In place of `decode_graph.CudaGraph`; counts its captures and replays."""

    def __init__(self):
        self.captures = self.replays = 0
        self.tape = []

    @torch.inference_mode()
    def capture(self, step):
        self.tape = []
        self.captures += 1
        random, recorder = torch.get_rng_state(), Recorder(self.tape)
        try:
            with ExitStack() as stack:
                for name, kernels in KERNELS.items():
                    module = importlib.import_module(f"sparsemm_lmms.kernels.{name}")
                    for kernel in kernels:
                        stack.enter_context(
                            mock.patch.object(module, kernel, Launches(getattr(module, kernel), recorder))
                        )
                stack.enter_context(recorder)
                step()
        finally:
            torch.set_rng_state(random)
            for storage, before in recorder.before.values():
                storage.copy_(before)

    @torch.inference_mode()  # as the step was recorded; the real thing does not know of such modes
    def replay(self):
        self.replays += 1
        for action in self.tape:
            action()


class Recorder(TorchDispatchMode):
    def __init__(self, tape):
        super().__init__()
        self.tape = tape
        self.own = {}  # storages made by the step, kept alive as a graph's pool keeps them
        self.before = {}  # storages from outside that the step writes: what they held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        name += "_" * (func._overloadname == "self_int")  # repeat_interleave by a number: no more than an expand
        indices = [x for x in tree_leaves(args[1:2]) if isinstance(x, torch.Tensor)]
        if (name in SYNCHRONISES and not (name == "lift_fresh" and assigns_a_number())) or (
            name.startswith("index") and any(x.dtype == torch.bool for x in indices)
        ):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        given = [*zip(func._schema.arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        writes = [x for a, x in given if a.alias_info is not None and a.alias_info.is_write]
        self.save(writes)
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        fresh = [x for x in outputs if x.untyped_storage().data_ptr() not in inputs]
        for x in fresh:
            self.own[x.untyped_storage().data_ptr()] = x
        if fresh or writes:
            self.tape.append(lambda: copy_all(fresh, outputs, func(*args, **kwargs)))
        return result

    def save(self, tensors):
        for x in tree_leaves(tensors):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in {*self.own, *self.before}:
                with _disable_current_modes():
                    whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                    self.before[x.untyped_storage().data_ptr()] = whole, whole.clone()


def assigns_a_number():
    """`x[...] = 0` makes a tensor of the number on the CPU; on CUDA it is a fill."""
    frame = sys._getframe(2)
    while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_code[frame.f_lasti] == dis.opmap["STORE_SUBSCR"]


def copy_all(fresh, outputs, again):
    """Results of a repeated operator go where the recorded ones lie."""
    again = [x for x in tree_leaves(again) if isinstance(x, torch.Tensor)]
    for old, new in zip(outputs, again, strict=True):
        if any(old is x for x in fresh):
            old.copy_(new)


class Launches:
    """Stands in for a Triton kernel while a step is recorded."""

    def __init__(self, kernel, recorder):
        self.kernel, self.recorder = kernel, recorder

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.recorder.save(list(args))
            plain = tree_map_only(torch.Tensor, lambda x: x, args)
            with _disable_current_modes():
                self.kernel[grid](*plain, **constants)
            self.recorder.tape.append(lambda: self.kernel[grid](*plain, **constants))

        return launch
