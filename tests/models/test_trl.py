"""TRL's trainers on a patched model: its losses, batches and reference passes, with the gradients of plain PEFT."""

import math
from dataclasses import dataclass, field

import datasets
import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from hyclora import CalibrationCallback, HycloraConfig, NonFiniteCallback, apply_hyclora
from hyclora.models.patch import find_patch
from hyclora.utils.data.word_problems import word_problems
from tests.helpers.counting import kept
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.small_models import largest_error

trl = pytest.importorskip("trl", "1.15", "TRL's trainers are NOT tested: pip install 'trl>=1.15'")
orpo, cpo = (pytest.importorskip(f"trl.experimental.{name}") for name in ("orpo", "cpo"))
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that transformers and TRL will give up

EXACT, STEPS, THRESHOLD = HycloraConfig(layer_type="baseline"), 4, 2
CHAT = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)


def completions(n=16) -> list[dict]:
    """Of many lengths."""
    rows = word_problems(n, 0)
    texts = ((row["question"][: 20 + 5 * i], row["answer"][: 9 + 7 * i]) for i, row in enumerate(rows))
    return [{"prompt": question, "completion": answer} for question, answer in texts]


def chats() -> list[dict]:
    said = (zip(("user", "assistant"), row.values(), strict=True) for row in completions())
    return [{"messages": [{"role": role, "content": text} for role, text in row]} for row in said]


def preferences() -> list[dict]:
    rows = completions()
    others = [row["completion"] for row in reversed(rows)]
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
        for row, other in zip(rows, others, strict=True)
    ]


def judged() -> list[dict]:
    return [row | {"label": i % 3 > 0} for i, row in enumerate(completions())]


def prompts() -> list[dict]:
    return [{"prompt": row["prompt"]} for row in completions()]


def variety(completions, **_) -> list[float]:
    return [float(len(set(text))) for text in completions]


@dataclass(frozen=True)
class Case:
    """A trainer as a user makes it. trained: of adapters that were trained before, and not by a peft_config.

    streams: whether no padding is computed in training; ORPO, CPO, GRPO and RLOO read something of all places.
    """

    name: str
    rows: object
    options: dict = field(default_factory=dict)
    module: object = trl
    trained: bool = False
    streams: bool = True
    more: dict = field(default_factory=dict)


PACKED = {"packing": True, "max_length": 64}
DRAWN = {"num_generations": 4, "max_completion_length": 8}
CASES = {
    "sft, completions": Case("SFT", completions),
    "sft, whole rows": Case("SFT", completions, {"completion_only_loss": False}),
    "sft, assistant": Case("SFT", chats, {"assistant_only_loss": True}),
    "sft, packed": Case("SFT", completions, PACKED),
    "sft, packed whole": Case("SFT", completions, PACKED | {"completion_only_loss": False}),
    "sft, cut and packed": Case("SFT", completions, PACKED | {"packing_strategy": "wrapped"}),
    "sft, padding-free": Case("SFT", completions, {"padding_free": True, "max_length": None}),
    "sft, smoothed": Case("SFT", completions, {"label_smoothing_factor": 0.1}, streams=False),
    "sft, dft": Case("SFT", completions, {"loss_type": "dft"}),
    "dpo": Case("DPO", preferences),
    "dpo, trained before": Case("DPO", preferences, trained=True),
    "dpo, references first": Case("DPO", preferences, {"precompute_ref_log_probs": True}),
    "kto": Case("KTO", judged),
    "kto, trained before": Case("KTO", judged, trained=True),
    "reward": Case("Reward", preferences),
    "orpo": Case("ORPO", preferences, module=orpo, streams=False),
    "cpo": Case("CPO", preferences, module=cpo, streams=False),
    "grpo": Case("GRPO", prompts, DRAWN | {"beta": 0.1}, streams=False, more={"reward_funcs": variety}),
    "rloo": Case("RLOO", prompts, DRAWN, streams=False, more={"reward_funcs": variety}),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Gradients(TrainerCallback):
    """Those of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def make(tiny_llama_folder, tmp_path):
    def base(case: Case):
        torch.manual_seed(0)
        if case.name != "Reward":
            return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
        return AutoModelForSequenceClassification.from_pretrained(tiny_llama_folder, dtype=torch.float32, num_labels=1)

    def adapted(case: Case):
        whole = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        return LoraConfig(r=4, target_modules="all-linear", **(whole if case.name == "Reward" else {}))

    def make(case: Case, config: HycloraConfig | None, early=False, **options):
        """A trainer with a patch, or with none, and the Gradients that it will find; early: patched before."""
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.chat_template = CHAT
        fixed = {
            "output_dir": str(tmp_path / "run"), "use_cpu": DEVICE == "cpu", "bf16": False, "max_steps": 1,
            "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-2,
            "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1, "report_to": "none",
            "disable_tqdm": True,
        }  # fmt: skip
        arguments = getattr(case.module, f"{case.name}Config")(**fixed | case.options | options)
        model, more = base(case), {"peft_config": adapted(case)}
        if case.trained:
            model, more = get_peft_model(model, adapted(case)), {}
            spread(model)
        if early:
            apply_hyclora(model, config)
        rows, found = case.rows(), Gradients()
        trainer = getattr(case.module, f"{case.name}Trainer")(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
            eval_dataset=datasets.Dataset.from_list(rows[:4]), processing_class=tokenizer, callbacks=[found],
            **more, **case.more,
        )  # fmt: skip
        spread(trainer.model)
        if config is not None and not early:
            apply_hyclora(trainer.model, config)
        return trainer, found

    make.base = base
    return make


def spread(model):
    """B as after some training, that all gradients are there."""
    draw = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B.default" in name:
            p.data.copy_(torch.randn(p.shape, generator=draw) * 0.02)


def logged(trainer, name="loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def compare(make, case, **options) -> None:
    """The first loss and its gradients are those of TRL on plain PEFT."""
    found = []
    for config in (None, EXACT):
        trainer, gradients = make(case, config, **options)
        trainer.train()
        found.append((logged(trainer)[0], gradients.found))
    (loss, exact), (ours, grads) = found
    assert ours == pytest.approx(loss, rel=1e-5, abs=1e-5) and largest_error(grads, exact) < 1e-4
    assert all(g.any() for g in exact.values()) and len(exact) >= 2 * 7 * 2
    assert find_patch(trainer.model).step.index == 1


@ALL
@pytest.mark.usefixtures("any_dtype")
def test_the_first_step_is_that_of_plain_peft(case, make, shapes):
    compare(make, case)
    assert (min(shapes)[0] == 1) == case.streams


@pytest.mark.parametrize("case", [CASES[n] for n in ("sft, packed", "dpo, trained before", "kto", "reward", "orpo")])
@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(case, reentrant, make):
    """TRL has it on unless it is told otherwise; the reference is run without."""
    kwargs = {"use_reentrant": reentrant}
    compare(make, case, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)


@ALL
def test_four_bits_train_and_go_on_from_a_checkpoint(case, make, tmp_path):
    """With evaluations between the steps, bit for bit; PEFT loads what was trained."""
    if case.trained and Version(transformers.__version__) < Version("5.24"):
        pytest.skip("Trainer of transformers 5.17 does not load adapters that are beside others, in plain PEFT either")
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    config = HycloraConfig(iteration_threshold=THRESHOLD)
    trained = []
    for resumed in (None, str(tmp_path / "run/checkpoint-2")):
        trainer, _ = make(case, config, max_steps=STEPS, **saving)
        for callback in (CalibrationCallback(), NonFiniteCallback("stop")):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resumed)
        told = logged(trainer) + logged(trainer, "eval_loss")
        assert len(told) >= STEPS + 2 and all(map(math.isfinite, told))
        step = find_patch(trainer.model).step
        assert step.index == STEPS and not step.calibrating
        trained.append(trainer.model.eval())
    whole, resumed = (dict(model.named_parameters()) for model in trained)
    assert all(torch.equal(resumed[name], p) for name, p in whole.items())

    loaded = PeftModel.from_pretrained(make.base(case), tmp_path / f"run/checkpoint-{STEPS}").to(DEVICE).eval()
    ids = torch.arange(5, 25, device=DEVICE)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained[0](ids).logits)


@pytest.mark.parametrize("name", ["dpo", "dpo, trained before", "kto", "kto, trained before"])
def test_a_reference_pass_neither_calibrates_nor_keeps(name, make):
    trainer, _ = make(CASES[name], HycloraConfig(iteration_threshold=THRESHOLD))
    trainer.model.train()
    patch = find_patch(trainer.model)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert kept(lambda: trainer.compute_ref_log_probs(trainer.model, batch)) == 0
    assert patch.step.index == 0 and patch.calibration.seen is None
    assert not any(s.state_dict() for block in patch.blocks for s in block.savers.values())


def test_a_trainer_that_is_made_later_is_told_of(make, caplog):
    case = Case("SFT", completions, trained=True)
    expected, exact = make(case, None)
    expected.train()
    trainer, ours = make(case, EXACT, early=True)
    trainer.train()
    assert largest_error(ours.found, exact.found) < 1e-4
    assert caplog.text.count("TRL's trainer was made after apply_hyclora") == 1


def test_the_report_says_whose_head_it_is(make):
    trainer, _ = make(CASES["sft, completions"], None)
    report = apply_hyclora(trainer.model, EXACT)
    assert "lm_head: TRL's own forward scores the tokens that have a label, in pieces" in report.not_patched[-1]
