"""Fine-tune on GSM8K, generated word problems or your own rows with HyC-LoRA; report what that changed, and its bytes.

    bash run_gsm8k.sh                                          # demo, minutes on a CPU
    model_name=llama-2-7b-hf data_name=gsm8k bash run_gsm8k.sh
    model_name=llama-2-7b-hf data_name=json data_dir=my_rows.jsonl bash run_gsm8k.sh

The settings are at the top of run_gsm8k.sh; `python run_gsm8k.py --help` lists all of them.
"""

from hyclora import apply_hyclora, remove_hyclora
from hyclora.utils import results
from hyclora.utils.args import parse_arguments
from hyclora.utils.data.tokens import Collator
from hyclora.utils.disk import check_output, checkpoint_bytes
from hyclora.utils.errors import entry_point
from hyclora.utils.loading import checkpoint_layers, find_base, keep_initial_adapters, load_model, load_tokenizer
from hyclora.utils.profiling import buffered_bytes
from hyclora.utils.runs.card import save_adapters, write_card
from hyclora.utils.runs.identity import digest_of
from hyclora.utils.runs.run import begin
from hyclora.utils.tasks import load_task
from hyclora.utils.trainer import HycloraTrainer


@entry_point
def main(argv=None):
    groups = parse_arguments(argv)
    model_args, data_args, lora_args, hyclora_args, eval_args, training = groups
    source = find_base(model_args, lora_args)
    decided = []
    tokenizer = load_tokenizer(source, decided.append)
    task = load_task(data_args, eval_args, tokenizer)

    run = begin(groups, source, task.train, argv)
    core = results.core_of(training, len(task.train))
    with run.at_work():
        results.print_settings(groups[:-1], core)
        print(*decided, task.summary, sep="\n")
        clock = results.Clock()
        model = load_model(model_args, lora_args, source, training.device, training.seed)
        clock.lap("load")
        initial = keep_initial_adapters(model, run.folder / "initial_adapters")
        check_output(run.folder, needed=checkpoint_bytes(model, training.save_total_limit))
        scores = {}
        if eval_args.evaluate_before and task.test:
            asked = {**vars(eval_args), "rows": digest_of(task.test)}
            scores["before"] = results.once(
                run.folder / "evaluated_before.json", asked, lambda: task.evaluate(model)[0]
            )
            print(*map(": ".join, task.shown(scores)))
            clock.lap("evaluate before")
        if hyclora_args.use_hyclora:
            print(apply_hyclora(model, hyclora_args.config()))

        collator = Collator(tokenizer.pad_token_id)
        trainer = HycloraTrainer(
            model=model,
            args=training,
            train_dataset=task.train,
            data_collator=collator,
            processing_class=tokenizer,
            compressed=hyclora_args.use_hyclora,
        )
        trainer.train(run.checkpoint)
        clock.lap("train")
        batch = trainer._prepare_inputs(collator(task.train[: training.per_device_train_batch_size]))
        with trainer.compute_loss_context_manager():
            buffered = measure_buffers(model, batch, hyclora_args.use_hyclora)
        if not training.should_save:
            return
        save_adapters(model, run.folder, initial)
        tokenizer.save_pretrained(run.folder)
        if task.test:
            scores["after"], predictions = task.evaluate(model)
            clock.lap("evaluate after")
            if predictions:
                results.write_json(run.folder / "predictions.json", predictions)

        found = {
            "settings": results.settings(*groups),
            "core": core,
            "environment": results.environment(),
            task.metric.replace(" ", "_"): scores,
            "shown": dict(task.shown(scores)),
            "final_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
            "buffered_bytes": buffered,
            "train": trainer.progress.totals,
            "seconds": clock.seconds,
            "log_history": trainer.state.log_history,
        }
        print(results.closing_table(found))
        write_card(run.folder, found, len(task.train))
        run.finish(found)
        print(f"results: {run.folder}.json, log: {run.folder}.log, adapters: {run.folder}")


def measure_buffers(model, batch, compressed: bool) -> dict[str, int]:
    """Bytes kept for backward on one batch: compressed, and as plain LoRA, which the model is afterwards.

    The last one is with checkpointing, which stays on.
    """
    buffered = {}
    if compressed:
        buffered["hyclora"] = buffered_bytes(model, batch)
        remove_hyclora(model)
    buffered["lora"] = buffered_bytes(model, batch)
    checkpoint_layers(model)
    return buffered | {"lora_checkpointing": buffered_bytes(model, batch)}


if __name__ == "__main__":
    main()
