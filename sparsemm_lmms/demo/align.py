"""First stage of the training: the vision tower learns to write each symbol's embedding into its image token.

From scratch the joint model sits at chance for long; aligned patches make a page read like text.
"""

import numpy as np
import torch
from torch import Tensor, nn

from sparsemm_lmms.demo.architecture import SQUARE, TILE
from sparsemm_lmms.demo.glyphs import CELL
from sparsemm_lmms.demo.packing import NEWLINE, OVERVIEW, image_items
from sparsemm_lmms.demo.pages import FORMS, GRIDS, SYMBOLS, sample_page
from sparsemm_lmms.demo.render import render

BLANKS = (0.2, 1.0)  # share of blank cells of a tile: pages have full, sparse and empty tiles


def symbol_embeddings(model: nn.Module, tokenizer) -> Tensor:
    """Embedding [symbols, D] of every page symbol."""
    return model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(list(SYMBOLS))]


def symbolic_features(model: nn.Module, tokenizer, family: str, cells: list[np.ndarray]) -> Tensor:
    """What a perfect vision tower would give: [B, N, D], right-padded; overview tokens are those of blanks."""
    table = symbol_embeddings(model, tokenizer)
    rows = []
    for grid in cells:
        items = image_items(family, *grid.shape)
        known = torch.from_numpy(np.where(items >= 0, grid.ravel()[np.maximum(items, 0)], 0))
        features = table[known.to(table.device)]
        if family == "llava_next":
            kind = torch.from_numpy(items).to(table.device)[:, None]
            features = torch.where(kind == NEWLINE, model.model.image_newline, features)
            features = torch.where(kind == OVERVIEW, torch.zeros_like(features), features)
        rows.append(features)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def random_tiles(rng: np.random.Generator, count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey tiles, uint8 [count, side * CELL, side * CELL], and their symbols [count, side, side].

    Each tile has its own font, contrast and share of blank cells.
    """
    cells = rng.integers(0, len(SYMBOLS), (count, side, side))
    cells[rng.random(cells.shape) < rng.uniform(*BLANKS, (count, 1, 1))] = 0
    return np.stack([render(rng, grid) for grid in cells]), cells


def blacken(rng: np.random.Generator, tiles: np.ndarray, cells: np.ndarray, share: float = 0.3) -> None:
    """Two black rows of cells at the top or the bottom of some tiles, as any-resolution padding has them: in place."""
    for tile, grid in zip(tiles, cells, strict=True):
        if rng.random() < share:
            top = rng.random() < 0.5
            tile[slice(0, 2 * CELL) if top else slice(-2 * CELL, None)] = 0
            grid[slice(0, 2) if top else slice(-2, None)] = 0


def overviews(rng: np.random.Generator, processor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Overviews of random pages as the tower sees them, too small to read: every cell shall look blank."""
    pages = [sample_page(rng, FORMS[i % len(FORMS)], *GRIDS[int(rng.integers(len(GRIDS)))]) for i in range(count)]
    images = [np.repeat(render(rng, page.cells)[..., None], 3, -1) for page in pages]
    inputs = processor.image_processor(images=images, return_tensors="np")
    if "num_patches" in inputs:  # InternVL: one row of tiles, the overview after the image's own
        pixels, side = inputs["pixel_values"][np.cumsum(inputs["num_patches"]) - 1, 0], SQUARE
    else:
        pixels, side = inputs["pixel_values"][:, 0, 0], TILE
    grey = np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)
    return grey, np.zeros((count, side, side), np.int64)


def tile_features(model: nn.Module, tiles: np.ndarray) -> Tensor:
    """Image features [count, cells, D] of square grey tiles as the model's tower gives them for one tile each."""
    device = model.get_input_embeddings().weight.device
    pixels = (torch.from_numpy(tiles).to(device).float() / 255 - 0.5) / 0.5
    count, side, _ = tiles.shape
    if model.config.model_type == "llava_next":
        out = model.model.vision_tower(pixels[:, None].expand(-1, 3, -1, -1), output_hidden_states=True)
        return model.model.multi_modal_projector(out.hidden_states[model.config.vision_feature_layer][:, 1:])
    if model.config.model_type == "internvl":
        return model.model.get_image_features(pixels[:, None].expand(-1, 3, -1, -1)).pooler_output
    config = model.config.vision_config
    patch, merge = config.patch_size, config.spatial_merge_size
    cells = side // (patch * merge)
    patches = pixels.view(count, cells, merge, patch, cells, merge, patch).permute(0, 1, 4, 2, 5, 3, 6)
    patches = patches.reshape(count * (side // patch) ** 2, 1, patch * patch)
    patches = patches.expand(-1, config.in_channels * config.temporal_patch_size, -1).flatten(1)
    grids = torch.tensor([[1, side // patch, side // patch]] * count, device=device)
    return model.model.visual(patches, grid_thw=grids).pooler_output.view(count, cells * cells, -1)


def align_loss(model: nn.Module, tokenizer, tiles: np.ndarray, cells: np.ndarray) -> tuple[Tensor, Tensor]:
    """Loss (which symbol is nearest, and how near) and the share of cells whose symbol is nearest."""
    table = symbol_embeddings(model, tokenizer).detach()
    features = tile_features(model, tiles).flatten(0, 1)
    wanted = torch.from_numpy(cells.ravel()).to(features.device)
    scale = table.pow(2).sum(-1).mean()
    distance = (features[:, None] - table[None]).pow(2).sum(-1) / scale  # [N, symbols]
    loss = nn.functional.cross_entropy(-8 * distance, wanted) + distance.gather(1, wanted[:, None]).mean()
    return loss, (distance.argmin(-1) == wanted).float().mean()
