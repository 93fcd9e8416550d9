"""Fine-tune on GSM8K, or on generated word problems, with HyC-LoRA; report accuracy and the bytes kept for backward.

    bash run_gsm8k.sh                                          # demo, minutes on a CPU
    model_name=llama-2-7b-hf data_name=gsm8k bash run_gsm8k.sh

The settings are at the top of run_gsm8k.sh; `python run_gsm8k.py --help` lists all of them.
"""

from hyclora import apply_hyclora, remove_hyclora
from hyclora.utils import results
from hyclora.utils.args import parse_arguments
from hyclora.utils.card import save_adapters, write_card
from hyclora.utils.data.gsm8k import Collator, load_rows, tokenize_rows
from hyclora.utils.disk import check_output, checkpoint_bytes
from hyclora.utils.errors import entry_point
from hyclora.utils.loading import find_base, keep_initial_adapters, load_model, load_tokenizer
from hyclora.utils.metrics import evaluate_generation
from hyclora.utils.profiling import buffered_bytes
from hyclora.utils.runs import begin
from hyclora.utils.trainer import HycloraTrainer


@entry_point
def main(argv=None):
    groups = parse_arguments(argv)
    model_args, data_args, lora_args, hyclora_args, eval_args, training = groups
    source = find_base(model_args, lora_args)
    train_rows, test_rows = load_rows(data_args, "train"), load_rows(data_args, "test")
    tokenizer = load_tokenizer(source)
    train_set = tokenize_rows(train_rows, tokenizer, data_args.seq_len)

    run = begin(groups, source, train_set.rows, argv)
    core = results.core_of(training, len(train_set.rows))
    with run.at_work():
        results.print_settings(groups[:-1], core)
        print(train_set)
        clock = results.Clock()
        model = load_model(model_args, lora_args, source, training.device, training.seed)
        clock.lap("load")
        initial = keep_initial_adapters(model, run.folder / "initial_adapters")
        check_output(run.folder, needed=checkpoint_bytes(model, training.save_total_limit))
        accuracy = {}
        if eval_args.evaluate_before and test_rows:
            asked = {**vars(eval_args), "rows": len(test_rows)}
            accuracy["before"] = results.once(
                run.folder / "accuracy_before.json",
                asked,
                lambda: evaluate_generation(model, tokenizer, test_rows, eval_args)[0],
            )
            print(f"accuracy before training: {accuracy['before']:.2%}")
            clock.lap("evaluate before")
        if hyclora_args.use_hyclora:
            print(apply_hyclora(model, hyclora_args.config()))

        collator = Collator(tokenizer.pad_token_id)
        trainer = HycloraTrainer(
            model=model,
            args=training,
            train_dataset=train_set.rows,
            data_collator=collator,
            processing_class=tokenizer,
            compressed=hyclora_args.use_hyclora,
        )
        trainer.train(run.checkpoint)
        clock.lap("train")
        batch = trainer._prepare_inputs(collator(train_set.rows[: training.per_device_train_batch_size]))
        with trainer.compute_loss_context_manager():
            buffered = measure_buffers(model, batch, hyclora_args.use_hyclora)
        if not training.should_save:
            return
        save_adapters(model, run.folder, initial)
        tokenizer.save_pretrained(run.folder)
        if test_rows:
            accuracy["after"], predictions = evaluate_generation(model, tokenizer, test_rows, eval_args)
            clock.lap("evaluate after")
            results.write_json(run.folder / "predictions.json", predictions)

        found = {
            "settings": results.settings(*groups),
            "core": core,
            "environment": results.environment(),
            "accuracy": accuracy,
            "final_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1],
            "buffered_bytes": buffered,
            "train": trainer.progress.totals,
            "seconds": clock.seconds,
            "log_history": trainer.state.log_history,
        }
        print(results.closing_table(found))
        write_card(run.folder, found, len(train_set.rows))
        run.finish(found)
        print(f"results: {run.folder}.json, log: {run.folder}.log, adapters: {run.folder}")


def measure_buffers(model, batch, compressed: bool) -> dict[str, int]:
    """Bytes kept for backward on one batch, with and without compression; leaves the model without."""
    buffered = {}
    if compressed:
        buffered["hyclora"] = buffered_bytes(model, batch)
        remove_hyclora(model)
    return buffered | {"lora": buffered_bytes(model, batch)}


if __name__ == "__main__":
    main()
