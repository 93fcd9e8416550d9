"""What others put around a patched forward: it is called, it stays, and it is no obstacle to remove or apply again."""

import copy
import functools
import gc
import inspect
import pickle
import weakref
from types import MethodType

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

from hyclora import HycloraConfig, apply_hyclora, remove_hyclora
from hyclora.models.patch import find_patch
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.offloading import equal
from tests.helpers.small_models import gradients, largest_error, llama, padded_batch

BASELINE = HycloraConfig(layer_type="baseline")


def scaled(output):
    """What a wrapper makes of an output: another value, which shows in every gradient."""
    if isinstance(output, tuple):
        return 1.5 * output[0], *output[1:]
    if isinstance(output, torch.Tensor):
        return 1.5 * output
    output.loss = 1.5 * output.loss
    return output


def closure(module, calls):
    inner = module.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return scaled(inner(*args, **kwargs))

    module.forward = forward


def wraps(module, calls):
    inner = module.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        calls.append(1)
        return scaled(inner(*args, **kwargs))

    module.forward = forward


def _call(calls, inner, *args, **kwargs):
    calls.append(1)
    return scaled(inner(*args, **kwargs))


def partial(module, calls):
    module.forward = functools.update_wrapper(functools.partial(_call, calls, module.forward), module.forward)


def method(module, calls):
    inner = module.forward.__func__

    @functools.wraps(inner)
    def forward(self, *args, **kwargs):
        calls.append(1)
        return scaled(inner(self, *args, **kwargs))

    module.forward = MethodType(forward, module)


def hook(module, calls):
    class Scale(ModelHook):
        def post_forward(self, module, output):
            calls.append(1)
            return scaled(output)

    add_hook_to_module(module, Scale())


class Opaque:
    def __init__(self, inner, calls):
        self.private, self.calls = inner, calls

    def __call__(self, *args, **kwargs):
        return _call(self.calls, self.private, *args, **kwargs)


def opaque(module, calls):
    module.forward = Opaque(module.forward, calls)


WRAPPERS = [closure, wraps, partial, method, hook, opaque]
MODULES = ["", "model.layers.0", "model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.0.input_layernorm",
           "model.norm"]  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_since_is_called_and_stays(wrap, name):
    """Patched, taken off and patched again inside of it, gradients are those of the stock model with the wrapper."""
    batch, calls = padded_batch(), []
    stock = llama()
    wrap(stock.get_base_model().get_submodule(name), [])
    loss, exact = gradients(stock, batch)
    model = llama()
    module = model.get_base_model().get_submodule(name)
    apply_hyclora(model, BASELINE)
    wrap(module, calls)

    def check(tolerance):
        calls.clear()
        our_loss, ours = gradients(model, batch)
        assert calls == [1]
        assert abs(our_loss - loss) <= tolerance and largest_error(ours, exact) <= tolerance

    for _ in range(2):
        check(1e-5)
        remove_hyclora(model)
        check(0)
        report = apply_hyclora(model, BASELINE)
        reached = name != "" or wrap is not opaque
        assert (report.head is not None) == reached == (model(**batch).logits is None)
        assert reached or any("lm_head: its forward was replaced by another one" in r for r in report.not_patched)


@pytest.mark.parametrize("wrap", [partial, method])
def test_a_wrapper_that_can_be_copied_is_bound_to_the_copy(wrap):
    """As that of a stock model: what the copy runs are its own weights."""
    model, batch = llama(), padded_batch()
    apply_hyclora(model, BASELINE)
    wrap(model.get_base_model(), [])
    _, expected = gradients(model, batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert equal(gradients(twin, batch)[1], expected)


def test_a_wrapper_that_is_taken_off_again():
    """Before or after remove_hyclora."""
    model, batch = llama(), padded_batch()
    base = model.get_base_model()
    _, exact = gradients(model, batch)
    for early in (True, False):
        apply_hyclora(model, BASELINE)
        inner = base.forward
        closure(base, [])
        if early:
            base.forward = inner
        remove_hyclora(model)
        if not early:
            base.forward = inner
        assert equal(gradients(model, batch)[1], exact)
        assert apply_hyclora(model, BASELINE).head is not None and model(**batch).logits is None
        remove_hyclora(model)
        assert not [n for n, m in model.named_modules() for k in m.__dict__ if k == "forward" or "hyclora" in k]


def test_accelerates_hooks_before_and_since():
    """device_map puts them on before the patch, dispatch_model after it; they can be taken off at any time."""
    model, batch = llama(), padded_batch()
    base = model.get_base_model()
    _, exact = gradients(model, batch)
    add_hook_to_module(base.model.layers[0], ModelHook())
    apply_hyclora(model, BASELINE)
    add_hook_to_module(base.model.layers[1], ModelHook())
    assert largest_error(gradients(model, batch)[1], exact) < 1e-5
    remove_hyclora(model)
    for layer in base.model.layers:
        remove_hook_from_module(layer)
    assert equal(gradients(model, batch)[1], exact)


@pytest.fixture
def accelerator():
    """Accelerate's, in bf16, which is one for the process."""
    AcceleratorState._reset_state(True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=DEVICE == "cpu")
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("order", ["stays", "unwrap, remove", "remove, unwrap", "twice"])
def test_accelerates_autocast(order, accelerator):
    """Its wrapper on the causal LM itself, as where LoRA came by model.add_adapter; unwrapped or not, all is right."""
    batch = padded_batch()
    losses, gradient, chunked = [], [], []
    for patched in (True, False):
        model = llama().get_base_model()
        if patched:
            apply_hyclora(model, BASELINE)
        prepared = accelerator.prepare_model(model)
        if order == "twice":
            prepared = accelerator.prepare_model(model)
        if patched:
            losses.append(gradients(prepared, batch)[0])
            chunked.append(prepared(**batch).logits is None)
        if order == "unwrap, remove":
            assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
            if patched:
                chunked.append(model(**batch).logits is None)
        if patched:
            remove_hyclora(model)
        if order == "remove, unwrap":
            accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        losses.append(gradients(model, batch)[0])
        gradient.append(gradients(model, batch)[1])
        if patched:
            assert apply_hyclora(model, BASELINE).head is not None
            assert model(**batch).logits is None
            remove_hyclora(model)
            assert equal(gradients(model, batch)[1], gradient[0])
    assert equal(*gradient) and all(chunked)
    assert losses[1] == losses[2] and abs(losses[0] - losses[1]) < 0.05


def test_a_copy_of_what_accelerate_has_prepared(accelerator):
    """It has its own weights; after pickling, which drops Accelerate's wrapper from any model, a stock head."""
    model, batch = llama().get_base_model(), padded_batch()
    apply_hyclora(model, BASELINE)
    accelerator.prepare_model(model)
    expected = gradients(model, batch)
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loss, ours = gradients(twin, batch)
    assert loss == expected[0] and equal(ours, expected[1])
    assert abs(gradients(loaded, batch)[0] - loss) < 0.05
    remove_hyclora(loaded)


def test_the_trainer_twice_on_one_model(tmp_path):
    """Each time Accelerate wraps it anew; then it is taken off, and trained once more."""
    rows = [{name: t[0] for name, t in padded_batch(rows=1, seed=seed).items()} for seed in range(4)]
    options = {"max_steps": 2, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": DEVICE == "cpu"}
    losses = []
    for patched in (True, False):
        model = llama().get_base_model()
        if patched:
            apply_hyclora(model, BASELINE)
        for turn in range(3):
            if patched and turn == 2:
                remove_hyclora(model)
            trainer = Trainer(model, TrainingArguments(str(tmp_path), bf16=True, **options), train_dataset=rows)
            losses.append(trainer.train().training_loss)
    AcceleratorState._reset_state(True)
    assert losses[:3] == pytest.approx(losses[3:], abs=2e-3)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_statistics_are_freed_inside_of_a_wrapper(wrap):
    model = llama()
    apply_hyclora(model, HycloraConfig(iteration_threshold=1))
    for name in ("", "model.layers.0.mlp"):
        wrap(model.get_base_model().get_submodule(name), [])
    gradients(model, padded_batch())
    alive = [weakref.ref(saver) for block in find_patch(model).blocks for saver in block.savers.values()]
    remove_hyclora(model)
    gc.collect()
    assert alive and not any(saver() for saver in alive)


def test_the_signature_is_the_models():
    """HF's Trainer picks the columns of a data set by it, generate its inputs, wherever it is read from."""
    model = llama()
    base = model.get_base_model()
    signature = inspect.signature(base.forward)
    apply_hyclora(model)
    assert inspect.signature(base.forward) == signature and base.forward.__name__ == "forward"
    inner = base.forward
    for wrap in (wraps, method, partial, hook):
        base.forward = inner
        wrap(base, [])
        assert inspect.signature(base.forward) == signature
