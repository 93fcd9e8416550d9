"""Base model, tokenizer and adapters: every way to load them, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import run_glue
import run_gsm8k
import run_memory_throughput
from hyclora.utils.args import LoraArguments, ModelArguments
from hyclora.utils.errors import UserError
from hyclora.utils.heads import NEXT_TOKEN
from hyclora.utils.loading import check_model, find_base, keep_initial_adapters, load_model, load_tokenizer
from tests.helpers.small_roberta import write_roberta

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PEFT computes LoftQ on a GPU")
IDS = torch.arange(40).view(2, 20)


def load(folder, lora=None, seed=0, device=CPU, tell=print, **settings):
    arguments = ModelArguments(model_name=folder.name, model_dir=str(folder.parent), **settings)
    lora = lora or LoraArguments(lora_rank=4, lora_alpha=4)
    return load_model(arguments, lora, find_base(arguments, lora), device, seed, tell=tell)


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def weight_error(model, reference):
    """Mean squared distance of the weights that the model applies (base and adapters) from the reference's."""
    wanted = dict(reference.named_modules())
    errors = []
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            identity = torch.eye(layer.in_features, device=model.device)
            errors.append((layer(identity).T.cpu() - wanted[name].weight).square().mean())
    assert len(errors) == 14
    return torch.stack(errors).mean().item()


@pytest.mark.parametrize("init", ["qlora", "gaussian", "pissa"])
def test_float_model_starts_as_the_stock_one(tiny_llama_folder, init):
    model = load(tiny_llama_folder, LoraArguments(lora_rank=4, lora_alpha=8, lora_init_type=init))
    assert isinstance(model, PeftModel) and model.config.use_cache is False
    assert torch.allclose(model(IDS).logits, stock(tiny_llama_folder)(IDS).logits, atol=1e-4)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}


def test_adapters_follow_the_seed(tiny_llama_folder):
    def adapters(seed):
        return torch.cat(
            [p.flatten() for n, p in load(tiny_llama_folder, seed=seed).named_parameters() if "lora_A" in n]
        )

    assert torch.equal(adapters(1), adapters(1)) and not torch.equal(adapters(1), adapters(2))


def test_base_dtype_is_as_asked_and_adapters_stay_float32(tiny_llama_folder):
    model = load(tiny_llama_folder, dtype="bfloat16")
    dtypes = {("lora_" in name, p.dtype) for name, p in model.named_parameters()}
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}


MIXED = {
    "": {},
    "lm_head in float32, the rest in bfloat16": {"lm_head": torch.float32},
    "lm_head in float16, the rest in bfloat16": {"lm_head": torch.float16},
    "model.layers.0.input_layernorm and 4 more in float32, the rest in bfloat16": {"norm": torch.float32},
    "model.layers.0.input_layernorm and 18 more in bfloat16, the rest in float32": {
        "embed_tokens": torch.float32, "lm_head": torch.float32,
    },
    "lm_head in float32, model.norm in float16, the rest in bfloat16": {
        "lm_head": torch.float32, "model.norm": torch.float16,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype, why", [("auto", "dtype auto on a CPU"), ("bfloat16", "dtype bfloat16 is set")])
@pytest.mark.parametrize("stored", MIXED)
@pytest.mark.parametrize("shards", [1, 2])
def test_one_dtype_for_all_and_the_checkpoints_are_said(tiny_llama_folder, tmp_path, stored, dtype, why, shards):
    """Transformers' own "auto" takes the first tensor's: one float32 tensor makes all of them float32."""
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        other = [chosen for part, chosen in MIXED[stored].items() if part in name]
        tensors[name] = tensor.to(*other or [torch.bfloat16])
    (folder / "model.safetensors").unlink()
    files = [f"model-{i}.safetensors" if shards > 1 else "model.safetensors" for i in range(shards)]
    held = {file: dict(list(tensors.items())[i::shards]) for i, file in enumerate(files)}
    for file, part in held.items():
        save_file(part, folder / file, {"format": "pt"})
    if shards > 1:
        where = {name: file for file, part in held.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        save_file({"x": torch.ones(10**5)}, folder / "consolidated.safetensors")  # not what transformers reads
    said = []
    model = load(folder, tell=said.append, dtype=dtype)
    loaded = torch.float32 if dtype == "auto" else torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {loaded}
    assert said == [f"base weights: {str(loaded)[6:]} ({why}); in the checkpoint {stored or 'bfloat16'}"]


def test_quantized_and_random_weights_say_their_dtype_too(tiny_llama_folder, capsys):
    load(tiny_llama_folder, load_in_4bit=True)
    load(tiny_llama_folder, random_weights=True, dtype="bfloat16")
    quantized, random = capsys.readouterr().out.splitlines()
    assert quantized == (
        "base weights: NF4, the rest and what is computed float32 (dtype auto on a CPU); in the checkpoint float32"
    )
    assert random == "base weights: random, bfloat16 (dtype bfloat16 is set)"


@pytest.mark.parametrize("init", ["qlora", "gaussian", "pissa"])
def test_nf4_base_trains(tiny_llama_folder, init):
    lora = LoraArguments(lora_rank=4, lora_alpha=8, lora_init_type=init)
    model = load(tiny_llama_folder, lora, load_in_4bit=True)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
    assert type(model.get_base_model().lm_head) is torch.nn.Linear
    packed = weight.clone()
    with torch.no_grad():
        model.eval()(IDS)
    assert torch.equal(weight, packed) and weight.quant_state.nested
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("init", ["pissa", pytest.param("loftq", marks=needs_gpu)])
def test_the_start_is_closer_than_plain_quantization(tiny_llama_folder, init):
    device = torch.device("cuda" if init == "loftq" else "cpu")

    def error(init):
        lora = LoraArguments(lora_rank=8, lora_alpha=16, lora_init_type=init)
        model = load(tiny_llama_folder, lora, device=device, load_in_4bit=True, dtype="float32")
        return weight_error(model, stock(tiny_llama_folder))

    assert error(init) < 0.9 * error("qlora")


def test_random_weights_need_a_configuration_only(tiny_llama_folder, tmp_path):
    shutil.copytree(tiny_llama_folder, tmp_path / "shape", ignore=shutil.ignore_patterns("*.safetensors"))
    model = load(tmp_path / "shape", random_weights=True, load_in_4bit=True)
    layers = model.get_base_model().model.layers
    assert layers[0].self_attn.k_proj.base_layer.weight.quant_state.shape == (32, 64)
    assert model(IDS, labels=IDS).loss.isfinite()


def test_saved_adapters_load_into_the_stock_model(tiny_llama_folder, tmp_path):
    for init in ("qlora", "pissa"):
        model = load(tiny_llama_folder, LoraArguments(lora_rank=4, lora_alpha=4, lora_init_type=init))
        initial = keep_initial_adapters(model, tmp_path / "initial")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        trained = model(IDS).logits
        model.save_pretrained(tmp_path / init, path_initial_model_for_weight_conversion=initial)
        again = PeftModel.from_pretrained(stock(tiny_llama_folder), tmp_path / init)
        assert torch.allclose(again(IDS).logits, trained, atol=1e-4)


def write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def write_settings(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def index(folder, names):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "model.safetensors").unlink()


def remove(folder, pattern):
    for file in folder.glob(pattern):
        file.unlink()


BROKEN = {
    "no config.json": lambda folder: remove(folder, "config.json"),
    "not the configuration of a model": lambda folder: (folder / "config.json").write_text("{"),
    "is not the configuration of a model: copy": lambda folder: (folder / "config.json").write_text("[]"),
    "cannot work: .*hidden size .* not a multiple": lambda folder: write_config(folder, num_attention_heads=7),
    "is a gpt2 model": lambda folder: write_config(folder, model_type="gpt2"),
    "no tokenizer": lambda folder: remove(folder, "tokenizer*"),
    "no weights": lambda folder: remove(folder, "model.safetensors"),
    "only PyTorch .bin weights": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "model.safetensors is torn, or no safetensors file": lambda folder: cut(folder / "model.safetensors"),
    "model.safetensors.index.json names no files": lambda folder: index(folder, []),
    "model.safetensors.index.json names no files of weights": lambda folder: index(folder, {"x": 1}),
    "lacks b.safetensors, which model.safetensors.index.json names": lambda folder: index(
        folder, {"x": "b.safetensors"}
    ),
    "config.json asks for Python code of its own": lambda folder: write_config(
        folder, auto_map={"AutoConfig": "code.C"}
    ),
    "tokenizer_config.json asks for Python code": lambda folder: write_settings(
        folder, auto_map={"AutoTokenizer": "t.T"}
    ),
    "generation_config.json is not a configuration of writing": lambda f: (f / "generation_config.json").write_text(
        "[]"
    ),
    "config.json cannot be read .Is a directory": lambda folder: (
        remove(folder, "config.json"),
        (folder / "config.json").mkdir(),
    ),
    "config.json: a model of its|config.json cannot work": lambda folder: write_config(folder, rms_norm_eps="no"),
    "config.json cannot work: vocab_size is -7: copy": lambda folder: write_config(folder, vocab_size=-7),
    "config.json cannot work: num_hidden_layers is 10{30}: copy": lambda f: write_config(f, num_hidden_layers=10**30),
    "500 tokens, the model only 400": lambda folder: write_config(folder, vocab_size=400),
}


@pytest.mark.parametrize("named", BROKEN)
def test_a_broken_checkpoint_is_named(tiny_llama_folder, tmp_path, named):
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "copy"))
    BROKEN[named](folder)
    with pytest.raises(UserError, match=named) as caught:
        source = find_base(ModelArguments(model_name="copy", model_dir=str(tmp_path)), LoraArguments())
        load_tokenizer(source)
        check_model(source, NEXT_TOKEN, LoraArguments())
    assert str(folder) in str(caught.value)


def test_code_in_a_folder_is_ignored_if_that_is_asked_for(tiny_llama_folder, tmp_path):
    """The code is never there: it would be run if it were."""
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "copy"))
    write_config(folder, auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    write_settings(folder, auto_map={"AutoTokenizer": ["code.T", None]})
    for name in ("code.py", "t.py"):
        (folder / name).write_text("raise SystemExit('run')")
    model = load(folder, ignore_remote_code=True)
    assert type(model.get_base_model()).__module__.startswith("transformers.") and load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda weights: weights | {"lm_head.weight": torch.zeros(7, 64)}, "weights have other shapes than its config"),
        (lambda weights: {n: w for n, w in weights.items() if "layers.1." not in n}, "no weights for model.layers.1"),
    ],
    ids=["shapes", "missing"],
)
def test_weights_that_are_not_of_the_configuration_are_refused(tiny_llama_folder, tmp_path, change, said):
    folder = Path(shutil.copytree(tiny_llama_folder, tmp_path / "copy"))
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=said):
        load(folder)


def test_missing_layers_and_devices_are_named(tiny_llama_folder):
    with pytest.raises(UserError, match="z_proj"):
        load(tiny_llama_folder, LoraArguments(target_modules=["q_proj", "z_proj"]))
    with pytest.raises(UserError, match="loftq"):
        load(tiny_llama_folder, LoraArguments(lora_init_type="loftq"))
    with pytest.raises(UserError, match="not on cpu"):
        load(tiny_llama_folder, LoraArguments(lora_init_type="loftq"), load_in_4bit=True)


def test_an_unreachable_hub_says_where_to_put_the_files(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ModelArguments(model_name="nobody/nothing", model_dir="")
    with pytest.raises(UserError, match="nobody/nothing .* --model_dir"):
        load_tokenizer(find_base(arguments, LoraArguments()))


@pytest.mark.parametrize("main", [run_gsm8k.main, run_memory_throughput.main])
def test_an_encoder_predicts_no_next_token(main, tmp_path, capsys):
    """Said before a run is begun."""
    write_roberta(tmp_path / "roberta")
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as exit:
        main(["--model_dir", str(tmp_path), "--model_name", "roberta", "--output_dir", str(output)])
    assert exit.value.code == 2 and not output.exists()
    assert "is a roberta model, which predicts no next token: it is for run_glue.sh" in capsys.readouterr().err


@pytest.mark.parametrize("main", [run_glue.main, run_gsm8k.main, run_memory_throughput.main])
def test_layers_that_are_not_there_are_told_before_a_run_is_begun(main, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--target_modules", "q_proj", "query", "--output_dir", str(tmp_path / "out")])
    assert exit.value.code == 2 and not (tmp_path / "out").exists()
    assert "target_modules: the model has no layer named query" in capsys.readouterr().err
