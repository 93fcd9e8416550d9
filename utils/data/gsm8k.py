"""GSM8K (Cobbe et al., 2021) as the paper trains it: question and instruction in, rationale and final number out.

`load_rows` gives rows {"question", "answer"} from the hub, from a folder of the original jsonl files or from the
generator of demo problems; `examples_of` gives what is learned of them: the answer, after question and instruction.
"""

from pathlib import Path

from hyclora.utils.args import DataArguments
from hyclora.utils.data.files import read_each, response_of, text_of
from hyclora.utils.data.hub import download
from hyclora.utils.data.tokens import Example
from hyclora.utils.data.word_problems import word_problems
from hyclora.utils.errors import UserError

INSTRUCTION = "\nAnswer the above question. First think step by step and then answer the final number.\n"
FINAL_ANSWER = "The final answer is: "
HUB_ID = "openai/gsm8k"
BY_HAND = "put gsm8k's train.jsonl and test.jsonl into a folder and give it with --data_dir"
DEMO_ROWS = {"train": 2400, "test": 200}
DEMO_SEED = 0


def load_rows(args: DataArguments, split: str) -> list[dict]:
    """The rows of a split ("train" or "test")."""
    limit = args.max_train_samples if split == "train" else args.max_eval_samples
    if args.data_name == "demo":
        return word_problems(DEMO_ROWS[split] if limit is None else limit, DEMO_SEED, split=split)
    rows = read_jsonl(Path(args.data_dir), split) if args.data_dir else download(HUB_ID, "main", split, BY_HAND)
    return rows[:limit]


def read_jsonl(folder: Path, split: str) -> list[dict]:
    """The rows of `folder`/`split`.jsonl; a mistake in the file is named by line."""
    file = folder / f"{split}.jsonl"
    if not folder.is_dir():
        raise UserError(f"data folder {folder} does not exist: --data_dir is the folder of train.jsonl and test.jsonl")
    if not file.is_file():
        raise UserError(f"{file} does not exist: put gsm8k's {split}.jsonl into the folder given by --data_dir")

    def read(place: str, row: dict) -> dict:
        return {"question": text_of(row, "question", place), "answer": response_of(row, "answer", place)}

    return read_each(file, read)


def prompt_of(question: str) -> str:
    return question + INSTRUCTION


def target_of(answer: str) -> str:
    return answer.replace("#### ", FINAL_ANSWER)


def examples_of(rows: list[dict]) -> list[Example]:
    """The rows as a model learns them."""
    return [Example([(prompt_of(row["question"]), target_of(row["answer"]))]) for row in rows]
