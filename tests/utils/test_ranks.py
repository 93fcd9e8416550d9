"""Two processes evaluate as one does, each a share of the rows: with whole models, and with weights that they share."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hyclora.utils.args import EvalArguments, GenerationArguments
from hyclora.utils.classification import collator, encode_rows, outputs_of
from hyclora.utils.data.gsm8k import prompt_of
from hyclora.utils.data.tokens import IGNORED
from hyclora.utils.metrics import evaluate_generation, evaluate_loss
from hyclora.utils.ranks import n_ranks, of_all, of_first, share_batches
from hyclora.utils.results import once
from hyclora.utils.sharded import rest_gathered, shard
from tests.helpers.kernel_checks import DEVICE
from tests.helpers.ranks import run_ranks

NEW = 6
QUESTIONS = [{"question": "What is 1 + 1?" + " Think." * i, "answer": "#### 2"} for i in (4, 0, 7, 3, 9)]


def deal(rank: int) -> None:
    for n in (0, 1, 2, 3, 7):
        computed = []

        def compute(batch, computed=computed):
            computed.append(batch)
            return [i * i for i in batch]

        found = share_batches([10 - i for i in range(n)], 2, compute)
        assert [i for batch, _ in found for i in batch] == list(range(n))
        assert all(len(batch) <= 2 and squares == [i * i for i in batch] for batch, squares in found)
        batches = [batch for batch, _ in found]
        assert len(computed) == -(-len(batches) // 2)
        assert computed == (batches if len(batches) % 2 == 0 else [*batches, batches[-1]])[rank::2]
    assert of_first(lambda: ("of", rank)) == ("of", 0) and n_ranks() == 2
    assert of_all(("of", rank)) == [("of", 0), ("of", 1)]


def test_batches_are_dealt_in_turns_of_all(tmp_path):
    run_ranks(deal, tmp_path)


def ask_once(rank: int, folder: str) -> None:
    """Both find out, or neither does, wherever the file is."""
    asked = []
    file = Path(folder, f"{rank}.json")
    for _ in range(2):
        assert once(file, {"rows": 3}, lambda: asked.append(rank) or {"loss": 0.5}) == {"loss": 0.5}
    assert asked == [rank] and file.is_file() == (rank == 0)


def test_what_was_found_before_is_known_to_all(tmp_path):
    run_ranks(ask_once, tmp_path, str(tmp_path))


class Watched:
    """The rows of each forward call of a model's first layer."""

    def __init__(self, model):
        self.rows = []
        layer = model.model.layers[0]
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: self.rows.append(len(kwargs.get("hidden_states", *args[:1]))), with_kwargs=True
        )

    def taken(self) -> list[int]:
        rows, self.rows = self.rows, []
        return rows


def judge(folder: str, n: int, sharded: bool) -> tuple[list, list]:
    """The numbers of n rows, and the calls that each took."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.eos_token = "<s>", "right", find_eos(folder, tokenizer)
    questions, found, calls = QUESTIONS[:n], [], []
    rows = [{"input_ids": tokenizer(row["question"]).input_ids} for row in questions]
    for row in rows:
        row["labels"] = [IGNORED] * 3 + row["input_ids"][3:]
    texts = encode_rows([{"texts": [row["question"]], "label": 0} for row in questions], tokenizer, 64).rows
    model = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    classifier.score.weight.data.copy_(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)))
    for one in (model, classifier.to(DEVICE)):
        if sharded:
            shard(one, torch.device(DEVICE))
    watched = Watched(model), Watched(classifier)
    with rest_gathered(model):
        watched[0].taken()
        for options in ({"greedy": True}, {"temperature": 3.0}):
            args = GenerationArguments(max_new_tokens=NEW, eval_batch_size=1, **options)
            found.append(evaluate_generation(model, tokenizer, questions, args))
            calls.append(watched[0].taken())
        found.append(evaluate_loss(model, rows, 0, EvalArguments(eval_batch_size=2)))
        calls.append(watched[0].taken())
    with rest_gathered(classifier):
        watched[1].taken()
        found.append(outputs_of(classifier, texts, collator(tokenizer), 2).tolist())
        calls.append(watched[1].taken())
    return json.loads(json.dumps(found)), calls


def judge_all(rank: int, folder: str, results: str) -> None:
    found = {f"{n} {sharded}": judge(folder, n, sharded) for n in (1, 5) for sharded in (False, True)}
    Path(results, f"{rank}.json").write_text(json.dumps(found))


def find_eos(folder: str, tokenizer) -> str:
    """What one answer has, and another one has not."""
    model = AutoModelForCausalLM.from_pretrained(folder).to(DEVICE)
    # both processes answer one of these in the second turn, by length
    asked = [tokenizer(prompt_of(QUESTIONS[i]["question"]), return_tensors="pt").to(DEVICE) for i in (0, 3)]
    one, other = (model.generate(**ids, max_new_tokens=NEW, do_sample=False)[0, -NEW:].tolist() for ids in asked)
    token = next(id for id in one[:-1] if id not in other)
    return tokenizer.convert_ids_to_tokens(token)


def test_two_processes_find_what_one_finds_in_half_of_the_calls(tiny_llama_folder, tmp_path):
    """Of five rows, and of one; answers end at different tokens, and those who share weights wait for each other."""
    ranks = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run_ranks(judge_all, folder, str(tiny_llama_folder), str(folder), processes=processes)
        ranks.append([json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)])
    (one,), ranks = ranks
    for n in (1, 5):
        expected, alone = one[f"{n} False"]
        for sharded in (False, True):
            (found, calls), (other, calls_of_other) = (rank[f"{n} {sharded}"] for rank in ranks)
            assert found == other == expected
            pairs = list(zip(alone, calls, calls_of_other, strict=True))
            if sharded or n == 1:
                assert all(len(mine) == len(others) for _, mine, others in pairs)
            else:
                assert len(calls[0]) != len(calls_of_other[0])
            assert n == 1 or all(sum(mine) < sum(all_) for all_, mine, _ in pairs)
    assert len({row["prediction"] for row in expected[0][1]}) > 1 and expected[0][1] != expected[1][1]
