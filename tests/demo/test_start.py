"""A demo model that starts with another's text model."""

import torch

from sparsemm_lmms.demo import model_path
from sparsemm_lmms.demo.architecture import build_model
from sparsemm_lmms.demo.evaluate import load
from sparsemm_lmms.demo.train import start_from
from sparsemm_lmms.demo.vocabulary import build_tokenizer


def test_layers_and_known_tokens_are_taken_over():
    model, (given, _) = build_model("internvl"), load(model_path("llava_next"))
    drawn = build_model("internvl").get_input_embeddings().weight
    start_from(model, "internvl", "llava_next")
    layers = dict(model.get_decoder().named_parameters())
    for name, value in given.get_decoder().named_parameters():
        assert name == "embed_tokens.weight" or torch.equal(layers[name], value)
    new, old = build_tokenizer("internvl"), build_tokenizer("llava_next")
    table, source = model.get_input_embeddings().weight, given.get_input_embeddings().weight
    pairs = {"A": "A", " line": " line", "<|im_end|>": "</s>", "assistant": "ASSISTANT:"}
    for token, known in pairs.items():
        row = table[new.convert_tokens_to_ids(token)]
        assert torch.equal(row, source[old.convert_tokens_to_ids(known)])
    image = new.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert torch.equal(table[image], drawn[image])
