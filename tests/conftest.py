"""Settings that must stand before the first import of torch, triton or transformers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only spin against each other, tenfold slower

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton picks its interpreter when it is first imported
