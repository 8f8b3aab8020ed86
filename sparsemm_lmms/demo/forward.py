"""The text model's forward over packed batches, with the real model's own modules."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from sparsemm_lmms.demo.packing import Layout

ATTENTION = "sparsemm_demo_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    layout: Layout,
    valid: Tensor,
    scaling: float,
    **_,
) -> tuple[Tensor, None]:
    """Attention over packed rows: query [B, Hq, L, d], key and value [B, Hkv, L, d]; out [B, L, Hq, d].

    valid: bool [B, P], which places of the prefix are no padding. Groups are separate calls on small shapes: one
    masked call over the whole row would cost about three times as much.
    """  # fmt: skip
    batch, heads, _, width = query.shape
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    size = layout.prefix
    own = [x[:, :, :size] for x in (query, key, value)]
    out = [scaled_dot_product_attention(*own, is_causal=True, scale=scaling)]
    at = size
    for count, slot, sees in layout.groups:
        # [B, H, count * slot, d] -> [B, H, count, slot, d]
        q, k, v = (
            x[:, :, at : at + count * slot].reshape(batch, heads, count, slot, width) for x in (query, key, value)
        )
        mask = torch.ones(slot, slot, dtype=torch.bool, device=q.device).tril()[None, None, None]
        if sees:
            k, v = (
                torch.cat([p[:, :, None].expand(-1, -1, count, -1, -1), x], dim=3)
                for p, x in zip(own[1:], (k, v), strict=True)
            )
            seen = valid[:, None, None, None].expand(-1, -1, -1, slot, -1)
            mask = torch.cat([seen, mask.expand(batch, -1, -1, -1, -1)], dim=-1)
        q, k, v = (x.transpose(1, 2).reshape(batch * count, heads, -1, width) for x in (q, k, v))
        mask = mask.expand(batch, count, 1, slot, -1).reshape(batch * count, 1, slot, -1)
        part = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        out.append(part.view(batch, count, heads, slot, width).transpose(1, 2).reshape(batch, heads, -1, width))
        at += count * slot
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, packed_attention)


def image_features(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own image features of one image each, right-padded: [B, N, D]."""
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    features = model.get_image_features(**{name: inputs[name] for name in names if name in inputs}).pooler_output
    if "num_patches" in inputs:  # InternVL: [tiles, N, D]
        features = [tiles.flatten(0, 1) for tiles in features.split([int(n) for n in inputs["num_patches"]])]
    return nn.utils.rnn.pad_sequence(list(features), batch_first=True)


def embed(model: nn.Module, batch: dict[str, Tensor], features: Tensor) -> Tensor:
    """Input embeddings [B, L, D] of a packed batch; features [B, N, D] in the model's order of image items."""
    image, index = batch["image"], batch["index"]
    words = model.get_input_embeddings()(index.where(~image, 0))
    rows = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
    return torch.where(image[..., None], features[rows, index.where(image, 0)].to(words.dtype), words)


def logits(model: nn.Module, batch: dict[str, Tensor], layout: Layout, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, vocabulary] and labels [N] at the N supervised places of a packed batch.

    The text model must run with the attention ATTENTION.
    """
    positions = batch["positions"]
    if model.config.model_type != "qwen2_vl":
        positions = positions[0]
    hidden = model.model.language_model(
        inputs_embeds=embeddings, position_ids=positions, use_cache=False, layout=layout, valid=batch["valid"]
    ).last_hidden_state
    chosen = batch["labels"] >= 0
    return model.lm_head(hidden[chosen]), batch["labels"][chosen]
