"""Embeddings that wait in host memory, in models that are changed afterwards: tied, resized, sharded, merged, moved."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from hyclora import apply_hyclora, remove_hyclora
from hyclora.models.sharding import MANAGED
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import llama, padded_batch
from tests.models.test_host_embedding import config, lookup


def assign(module: nn.Module, weight: torch.Tensor) -> None:
    module.weight = nn.Parameter(weight.to(DEVICE), requires_grad=False)


def tie(model: nn.Module) -> None:
    model.get_base_model().config.tie_word_embeddings = True
    model.get_base_model().tie_weights()


def tie_by_hand(model: nn.Module) -> None:
    model.get_output_embeddings().weight = lookup(model).weight


def resize_tied(model: nn.Module) -> None:
    model.get_base_model().config.tie_word_embeddings = True
    model.resize_token_embeddings(130)


TIES = [tie, tie_by_hand, resize_tied]


@pytest.mark.parametrize(
    "change, said",
    [(way, "embed_tokens was tied to the head since, which needs it on the device: tie weights before") for way in TIES]
    + [
        (lambda model: lookup(model).requires_grad_(True), "embed_tokens is trained now"),
        (lambda model: lookup(model).weight.requires_grad_(True), "embed_tokens is trained now"),
        (
            lambda model: vars(lookup(model)).update({MANAGED: True}),
            "is in host memory, and fully_shard needs it on the device",
        ),
        (lambda model: model.set_input_embeddings(nn.Embedding(128, 96)), "embed_tokens was replaced since"),
        (lambda model: assign(lookup(model), torch.zeros(128, 96)), "embed_tokens was replaced since"),
    ],
    ids=[way.__name__ for way in TIES] + ["the module", "the weight", "sharded", "another module", "another weight"],
)
def test_what_is_done_to_it_later_is_noticed(change, said):
    model, batch = llama(), padded_batch()
    apply_hyclora(model, config())
    change(model)
    with pytest.raises(ValueError, match=said):
        model(**batch)


@pytest.mark.parametrize("way", TIES)
def test_tied_weights_are_one_when_it_is_removed(way, tmp_path):
    """And are saved as one, if the model knows of it."""
    model = llama()
    apply_hyclora(model, config())
    way(model)
    model.to(DEVICE)
    remove_hyclora(model)
    assert lookup(model)._parameters["weight"] is model.get_output_embeddings().weight
    assert lookup(model).weight.device == model.device and model(**padded_batch()).loss.isfinite()
    model.config.tie_word_embeddings = True
    model.unload().save_pretrained(tmp_path)
    again = type(model.get_base_model()).from_pretrained(tmp_path)
    assert torch.equal(again.get_output_embeddings().weight, lookup(model).weight.cpu())


def test_a_model_that_is_sent_to_no_memory_is_there_when_it_is_removed():
    model = llama()
    apply_hyclora(model, config())
    model.to("meta")
    remove_hyclora(model)
    assert all(p.is_meta for p in model.parameters()) and lookup(model).weight.shape == (128, 96)


@torch.no_grad()
def test_merged_adapters_leave_it_in_host_memory(tmp_path):
    """Until it is removed; what is merged evaluates, and is saved."""
    ours, theirs, batch = llama(), llama(), padded_batch()
    apply_hyclora(ours, config())
    ours, theirs = (model.merge_and_unload().eval() for model in (ours, theirs))
    embedding = ours.get_input_embeddings()
    assert torch.equal(ours(**batch).loss, theirs(**batch).loss) and embedding.weight.device.type == "cpu"
    for name, model in {"ours": ours, "theirs": theirs}.items():
        model.save_pretrained(tmp_path / name)
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "theirs")]
    assert saved[0] == saved[1]
    remove_hyclora(ours)
    assert embedding._parameters["weight"].device == ours.device
    assert torch.equal(ours(**batch).loss, theirs(**batch).loss)


def test_resized_embeddings_stay_in_host_memory():
    """Transformers gives the same module more rows."""
    model, ids = llama(), torch.tensor([[127, 128, 129]], device=DEVICE)
    apply_hyclora(model, config())
    model.resize_token_embeddings(130)
    assert model(input_ids=ids, labels=ids).loss.isfinite() and lookup(model).weight.device.type == "cpu"
    remove_hyclora(model)
    assert lookup(model)._parameters["weight"].shape == (130, 96)


@pytest.mark.parametrize("part", [lambda model: model, lookup], ids=["the model", "the embeddings"])
def test_sharding_it_later_is_refused(one_process, part):
    """At once, and it can be taken off; layers may be sharded, or all but the embeddings."""
    ours, theirs, batch = llama(), llama(), padded_batch()
    apply_hyclora(ours, config())
    with pytest.raises(ValueError, match="^offload_embeddings=True: .*embed_tokens is in host memory, and fully_shard"):
        fully_shard(part(ours))
    remove_hyclora(ours)
    assert type(vars(lookup(ours))["_parameters"]) is dict and lookup(ours).weight.shape == (128, 96)
    apply_hyclora(theirs, config())
    fully_shard(theirs.get_base_model().model.layers[0])
    assert theirs(**batch).loss.isfinite()
