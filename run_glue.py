"""Fine-tune on a task of GLUE, or on generated reviews, with HyC-LoRA; report what that changed, and its bytes.

    bash run_glue.sh                                                       # demo, a minute on a CPU
    data_name=rte model_name=roberta-base bash run_glue.sh
    data_name=rte data_dir=data/glue model_name=roberta-base bash run_glue.sh

The model tells a class of a text or of a pair, or gives a score (stsb). Its head is drawn anew, and trained and saved
beside the adapters. The settings are at the top of run_glue.sh and in utils/settings.sh; `python run_glue.py --help`
lists all of them.
"""

import hyclora.utils.interrupts

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hyclora.utils.args import ALL_LINEAR, DataArguments, EvalArguments, option
from hyclora.utils.classification import METRICS, collator, encode_rows, metric, outputs_of
from hyclora.utils.data.glue import GLUE, described, load_rows
from hyclora.utils.driver import Driver
from hyclora.utils.heads import classifier
from hyclora.utils.tasks import Task


@dataclass
class GlueArguments(DataArguments):
    data_name: Literal[tuple(GLUE)] = option("demo", "A task of GLUE; demo: generated reviews, good or bad.")
    data_dir: str = option(
        "",
        "Folder of the official tsv files, such as RTE/train.tsv and RTE/dev.tsv (of MNLI dev_matched.tsv and "
        "dev_mismatched.tsv); '' downloads nyu-mll/glue.",
    )
    seq_len: int = option(
        512, "Longest row in tokens, at most the positions of the model: of a pair the longer text is cut."
    )


def glue(data: GlueArguments, evaluation: EvalArguments, tokenizer: PreTrainedTokenizerBase) -> Task:
    task = GLUE[data.data_name]
    metrics = {name: metric(name) for name in task.metrics}
    rows = {split: load_rows(data, split) for split in ("train", *task.tests)}
    encoded = {split: encode_rows(found, tokenizer, data.seq_len) for split, found in rows.items()}
    collate = collator(tokenizer)
    names = dict(enumerate(task.labels))

    def evaluate(model: PreTrainedModel) -> tuple[dict[str, float], list[dict]]:
        scores, predictions = {}, []
        for split, part in task.tests.items():
            outputs = outputs_of(model, encoded[split].rows, collate, evaluation.eval_batch_size)
            found = outputs.argmax(dim=-1).tolist() if task.labels else outputs[:, 0].tolist()
            labels = [row["label"] for row in rows[split]]
            scores |= {f"{name} {part}".strip(): compute(labels, found) for name, compute in metrics.items()}
            told = zip(rows[split], found, strict=True)
            predictions += [
                {"split": split, "texts": row["texts"]}
                | {"label": names.get(row["label"], row["label"]), "prediction": names.get(answer, answer)}
                for row, answer in told
            ]
        return scores, predictions

    return Task(
        train=encoded["train"].rows,
        test=[row for split in task.tests for row in encoded[split].rows],
        summary="\n".join(f"{described(rows[s], task, s)}, {encoded[s]}" for s in rows if rows[s]),
        forms={f"{name} {part}".strip(): METRICS[name].form for part in task.tests.values() for name in metrics},
        evaluate=evaluate,
        collate=collate,
        head=classifier(task.n_outputs, tokenizer.pad_token_id),
    )


TASKS = dict.fromkeys(GLUE, glue)
DEFAULTS = {"target_modules": [ALL_LINEAR], "learning_rate": 5e-4, "lr_scheduler_type": "linear"}
DRIVER = Driver("glue", GlueArguments, EvalArguments, TASKS, DEFAULTS)
main = DRIVER.main

if __name__ == "__main__":
    main()
