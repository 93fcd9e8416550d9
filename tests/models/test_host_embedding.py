"""Embeddings that wait in host memory: the same numbers, where the weight is, and what cannot be so."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora, verify
from hyclora.models import host_embedding
from hyclora.models.origin import Batch, origin
from hyclora.models.patch import find_patch
from hyclora.models.sharding import MANAGED
from hyclora.utils.profiling import host_bytes
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.replaying import CALIBRATION, batches, graphed, replayed, train
from tests.helpers.small_models import gradients, llama, mistral, padded_batch, qwen3, roberta

MIB = 2**20
FAMILIES = {
    "llama": llama,
    "mistral": mistral,
    "qwen3": qwen3,
    "padding_idx": lambda: llama(pad_token_id=3),
    "nf4": lambda: llama(base="nf4"),
    "roberta": lambda: roberta(task="classification"),
}

COPIES = copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))


def lookup(model) -> nn.Embedding:
    return model.get_base_model().get_input_embeddings()


def config(on_host: bool = True, **options) -> HycloraConfig:
    return HycloraConfig(iteration_threshold=1, offload_embeddings=on_host, **options)


def steps(model, on_host: bool, batch: dict, **options) -> list[tuple]:
    """Three of them: one calibrates."""
    apply_hyclora(model, config(on_host, **options))
    return [gradients(model, batch) for _ in range(3)]


def same(ours: list[tuple], theirs: list[tuple]) -> bool:
    """Losses and gradients, to the bit."""
    pairs = zip(ours, theirs, strict=True)
    return all(
        a == b and found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
        for (a, found), (b, expected) in pairs
    )


def labelled(model, **options) -> dict:
    batch = padded_batch(**options)
    if model.config.model_type == "roberta":
        batch["labels"] = torch.arange(len(batch["labels"]), device=DEVICE) % 3
    return batch


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_losses_and_gradients_are_the_same_bits(make, monkeypatch, deterministic_attention):
    """Also where rows are sent in pieces of two."""
    model = make()
    batch = labelled(model)
    monkeypatch.setattr(host_embedding, "PIECE", 2 * 4 * lookup(model).embedding_dim)
    assert same(steps(make(), True, batch), steps(model, False, batch))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_gradient_checkpointing(use_reentrant):
    """Embeddings that are to want a gradient do, by Hugging Face's hook on the module."""
    found = []
    for on_host in (True, False):
        model = llama()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        found.append(steps(model, on_host, padded_batch()))
    assert same(*found)


def test_with_layers_that_keep_their_input():
    ours, theirs = (steps(llama(), on_host, padded_batch(), layers="input4") for on_host in (True, False))
    assert same(ours, theirs)


def test_a_stream_is_looked_up_as_a_row(any_dtype, monkeypatch):
    model, seen = llama(), []
    apply_hyclora(model, config(stream=True, cuda_graphs=False))
    forward = host_embedding.HostEmbedding.forward
    monkeypatch.setattr(
        host_embedding.HostEmbedding, "forward", lambda self, ids: (seen.append(ids.shape), forward(self, ids))[1]
    )
    batch = padded_batch()
    gradients(model, batch)
    assert seen == [(1, int(batch["attention_mask"].sum()))]


def test_layers_are_replayed():
    """Whatever the replay starts from, the numbers are those of layer by layer."""
    given = batches(CALIBRATION + 4)
    expected = llama()
    apply_hyclora(expected, HycloraConfig(iteration_threshold=CALIBRATION, cuda_graphs=False))
    expected = train(expected, given)
    model = llama()
    graphs = graphed(model, {"offload_embeddings": True})
    found = train(model, given)
    assert graphs.recordings and replayed(model, graphs, given[-1])
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.allclose(ours[n], theirs[n], rtol=1e-5, atol=1e-7) for n in theirs)


def test_embeddings_that_are_given_are_not_looked_up():
    model, batch = llama(), padded_batch()
    batch["inputs_embeds"] = lookup(model)(batch.pop("input_ids")).detach()
    apply_hyclora(model, config())
    lookup(model).forward = None  # not to be called
    assert model(**batch).loss.isfinite()


def test_where_the_weight_is_and_what_is_told():
    model = llama()
    module, parameter = lookup(model), lookup(model).weight
    device, dtype, names = model.device, model.dtype, [name for name, _ in model.named_parameters()]
    report = apply_hyclora(model, config())
    assert module.weight is parameter and parameter.device.type == "cpu"
    assert (model.device, model.dtype) == (device, dtype) and [name for name, _ in model.named_parameters()] == names
    left = model.get_parameter(names[0]), module._parameters["weight"]
    assert left[0] is parameter and left[1].numel() == 0 and left[1].device == device
    assert f"embeddings wait in host memory: base_model.model.model.embed_tokens, {128 * 96 * 4 / MIB:.1f} MiB" in str(
        report
    )
    assert not any("embed_tokens" in name for name in report.not_patched)
    assert host_bytes(model) == 128 * 96 * 4
    told = str(apply_hyclora(llama(), config(False)))
    assert "host memory" not in told and "embed_tokens" in told


def test_removing_puts_the_same_parameter_back():
    model, batch = llama(), padded_batch()
    module, parameter = lookup(model), lookup(model).weight
    before, value = dict(vars(module)), parameter.detach().clone()
    expected = gradients(model, batch)
    apply_hyclora(model, config())
    gradients(model, batch)
    remove_hyclora(model)
    assert module._parameters["weight"] is parameter and parameter.device == model.device
    assert torch.equal(parameter, value) and vars(module).keys() == before.keys()
    assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks
    assert same([gradients(model, batch)], [expected])


def test_it_goes_where_the_model_is_moved_to():
    """Host memory stays: a trainer moves models that are there already. Their dtype is that of the rows."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, config())
    address = lookup(model).weight.data_ptr()
    model.to(DEVICE)
    assert lookup(model).weight.data_ptr() == address
    expected = lookup(model)(batch["input_ids"]).half()
    model.half()
    assert torch.equal(lookup(model)(batch["input_ids"]), expected) and lookup(model).weight.data_ptr() == address
    remove_hyclora(model)
    assert lookup(model).weight.dtype == torch.float16


def test_evaluation_and_generation():
    model, batch = llama().eval(), padded_batch()
    ids = batch["input_ids"][:1]
    settings = {"max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        expected = model(input_ids=ids).logits, model.generate(input_ids=ids, **settings)
        apply_hyclora(model, config())
        assert torch.equal(model(input_ids=ids).logits, expected[0])
        assert torch.equal(model.generate(input_ids=ids.to(model.device), **settings), expected[1])


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_the_model_looks_up_by_itself(copied):
    model, batch = llama(), padded_batch()
    expected = steps(model, True, batch)
    twin = copied(model)
    assert same([gradients(twin, batch)], expected[-1:])
    assert lookup(twin).weight is not lookup(model).weight
    remove_hyclora(twin)
    assert lookup(twin)._parameters["weight"].shape == (128, 96) and find_patch(model).embedding is not None
    assert same([gradients(model, batch)], expected[-1:])


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_the_embedding_is_stock(copied):
    """As PEFT makes one to train it whole; before, what a copy had to train were no rows."""
    model = llama()
    value, parameter = lookup(model).weight.detach().clone(), lookup(model).weight
    apply_hyclora(model, config())
    twin = copied(lookup(model))
    assert torch.equal(twin.weight, value) and twin.weight is next(twin.parameters()) is not parameter
    assert not twin._state_dict_hooks and not twin._load_state_dict_pre_hooks and "weight" not in vars(twin)
    twin.requires_grad_(True)(torch.tensor([3], device=DEVICE)).sum().backward()
    assert twin.weight.grad[3].eq(1).all() and lookup(model).weight is parameter
    assert copied(twin).weight.shape == value.shape


def test_an_adapter_that_trains_embeddings_may_come_after_it_is_removed():
    ours, theirs = llama(), llama()
    apply_hyclora(ours, config())
    for model in (ours, theirs):
        torch.manual_seed(0)
        model.add_adapter("whole", LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
        model.set_adapter("whole")
    with pytest.raises(ValueError, match="embed_tokens was replaced since"):
        ours(**padded_batch())
    remove_hyclora(ours)
    assert same([gradients(ours, padded_batch())], [gradients(theirs, padded_batch())])


def test_a_state_dict_is_as_ever_and_is_loaded(tmp_path):
    model = llama()
    stock = {name: t.clone() for name, t in model.state_dict().items()}
    apply_hyclora(model, config())
    state = model.state_dict()
    assert list(state) == list(stock) and all(torch.equal(state[name].cpu(), t.cpu()) for name, t in stock.items())
    name = next(name for name in state if "embed_tokens" in name)
    model.load_state_dict(state | {name: stock[name] + 1})
    assert torch.equal(lookup(model).weight, stock[name].cpu() + 1) and lookup(model).weight.device.type == "cpu"
    with pytest.raises(RuntimeError, match="embed_tokens"):
        model.load_state_dict(state | {name: stock[name][1:]})
    with pytest.raises(ValueError, match="embed_tokens.weight is in host memory and cannot be assigned"):
        model.load_state_dict(state, assign=True)
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_a_base_model_is_saved_whole(tmp_path):
    model = llama()
    apply_hyclora(model, config())
    expected = lookup(model).weight.detach().clone()
    model.unload().save_pretrained(tmp_path)
    again = type(model.get_base_model()).from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, expected.cpu())


def test_gradients_are_verified_while_it_waits():
    model, batch = llama(), padded_batch()
    apply_hyclora(model, config())
    found = verify(model, [batch, batch])
    assert found.summary.cosine > 0.9 and lookup(model).weight.device.type == "cpu"
    assert find_patch(model).embedding.bound.block is find_patch(model).embedding


def test_what_is_not_finite_is_found_while_it_waits():
    """By the module that looks it up."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, config())
    gradients(model, batch)
    lookup(model).weight.data[batch["input_ids"][0, 0].item()] = torch.nan
    assert "embed_tokens" in str(origin(model, [Batch(model, (), batch, None)]))


REFUSED = {
    "lm_head shares its weight with .*embed_tokens .tie_word_embeddings.": lambda: llama(tie_word_embeddings=True),
    "decoder shares its weight with .*word_embeddings": roberta,
    "embed_tokens is trained, on the device: leave it out of modules_to_save": lambda: llama(
        lora={"modules_to_save": ["embed_tokens"]}
    ),
    "embed_tokens is trained.* target_modules": lambda: llama(lora={"target_modules": ["q_proj", "embed_tokens"]}),
    "embed_tokens is trained.* trainable_token_indices": lambda: llama(lora={"trainable_token_indices": [3]}),
    "embed_tokens is trained": lambda: changed(lambda module: module.requires_grad_(True)),
    "max_norm changes the weight": lambda: changed(lambda module: setattr(module, "max_norm", 1.0)),
    "its forward was replaced by another one": lambda: changed(lambda module: setattr(module, "forward", print)),
    "the model is sharded by fully_shard": lambda: changed(lambda module: vars(module).update({MANAGED: True})),
    "its weight is not in memory": lambda: changed(lambda module: module.to("meta")),
}


def changed(change) -> nn.Module:
    model = llama()
    change(lookup(model))
    return model


@pytest.mark.parametrize("said, make", REFUSED.items(), ids=list(REFUSED))
def test_what_cannot_wait_in_host_memory(said, make):
    """Nothing is patched then."""
    model = make()
    with pytest.raises(ValueError, match=f"^offload_embeddings=True: .*{said}.*; or drop that setting$"):
        apply_hyclora(model, config())
    assert apply_hyclora(model, config(False)).embeddings is None


def test_a_model_that_is_sharded_already_is_refused(one_process):
    with pytest.raises(ValueError, match="^offload_embeddings=True: the model is sharded by fully_shard, and"):
        apply_hyclora(fully_shard(llama()), config())


def test_data_parallel(one_process):
    """DDP takes models on one kind of device alone."""
    model, batch = llama(), padded_batch()
    expected = steps(llama(), True, batch)
    apply_hyclora(model, config())
    wrapped = DistributedDataParallel(model)
    for _, grads in expected:
        model.zero_grad()
        wrapped(**batch).loss.backward()
        assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters() if p.requires_grad)


@pytest.mark.skipif(DEVICE != "cuda", reason="memory of a GPU")
def test_it_frees_the_weights_bytes_on_the_gpu():
    model = llama()
    before = torch.cuda.memory_allocated()
    apply_hyclora(model, config())
    assert before - torch.cuda.memory_allocated() == 128 * 96 * 4
    remove_hyclora(model)
    assert torch.cuda.memory_allocated() == before


def test_part_of_a_vocabulary_is_refused():
    model = llama()

    class Part(nn.Parameter):
        pass

    lookup(model).weight = Part(lookup(model).weight.data, requires_grad=False)
    with pytest.raises(ValueError, match="a weight of type Part is not supported"):
        apply_hyclora(model, config())


def test_two_models_with_one_embedding():
    """The other one uses it as it is, and cannot send it away again."""
    model, other, batch = llama(), llama(), padded_batch()
    other.get_base_model().set_input_embeddings(lookup(model))
    expected = gradients(other, batch)
    apply_hyclora(model, config())
    assert same([gradients(other, batch)], [expected])
    with pytest.raises(ValueError, match="host memory for another patched model that shares it: call remove_hyclora"):
        apply_hyclora(other, config())
    with pytest.raises(ValueError, match="this model is patched already"):
        apply_hyclora(model, config())


def test_a_budget_leaves_embeddings_that_cannot_wait_where_they_are(monkeypatch):
    """It may choose for others."""
    seen = []

    def choose(model, config):
        seen.append(config.offload_embeddings)
        chosen = HycloraConfig(offload_embeddings=bool(config.offload_embeddings is None))
        return SimpleNamespace(config=chosen, load=None)

    monkeypatch.setattr("hyclora.models.patch._gpu", lambda layers, option: torch.device(DEVICE))
    monkeypatch.setattr("hyclora.utils.planning.budget.choose_for", choose)
    makes = llama, lambda: llama(tie_word_embeddings=True)
    told = [apply_hyclora(make(), HycloraConfig(memory_budget="80GiB")) for make in makes]
    assert seen == [None, False] and [report.embeddings is None for report in told] == [False, True]
