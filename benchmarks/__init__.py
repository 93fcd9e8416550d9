"""Measurements that anyone can run again: each appends JSON lines to results/, which report and figures read.

memory_throughput.py  a step against the peers               kernels.py         bandwidth of each kernel
real_rows.py          training on rows of many lengths       packed_rows.py     through TRL's trainer, packed
peers.py              one way of fine-tuning, measured       cross_entropy.py   LM head and loss against others
buffered.py           bytes kept by one layer                fidelity.py        how close gradients are to exact ones
peak_memory.py        what is alive at the peak of a step    finetune.py        whether fine-tuning notices
profile_step.py       where the time of a step goes          experiments.py     the paper's, on a small model
technique_grid.py     run_alpaca.py's techniques, on and off technique_peers.py  and Unsloth on the same rows
generation.py         writing with and without a cache     attention.py       its kernels, torch's and others
scaling.py            one GPU and several of one host
plan_check.py         what a plan predicts, and is so, of some sixty cases
plan_times.py         the times that a plan measures on few layers, and all layers take
longest_rows.py       tokens of one row that fit a card of so many GiB
kills.py              runs that are killed and resumed, against one that was not
faults.py             runs that break in other ways, and go on
steady.py             memory over thousands of steps
combinations.py       the tests of what people combine, counted

jobs.py               what a measurement is of               record.py          a line of a result file
ranks.py              a process a GPU                        rows.py            what the result files say
workers.py            many small runs side by side           repeatable.py      runs that can be compared bit by bit
random_checkpoint.py  a checkpoint of a shape
report.py             README's tables                        figures.py         figures/*.png
paper_tables.py       the paper's tables, of anyone's runs
report_real_rows.py   and those of rows of many lengths      report_experiments.py  and of the paper's experiments
technique_tables.py   those of a grid                        seed_reports.py    what two reports say of one
report_kills.py       and of runs that were killed           report_plan.py     what hyclora.plan counts, and is so
report_scaling.py     and of several GPUs                   report_longest_rows.py  and of the longest row a card
report_plan_check.py  and how far off that is, by kind      report_plan_times.py  and of times
report_generation.py  and of writing                        report_steady.py   and of memory over many steps
report_combinations.py  and of what was combined            report_attention.py  and of attention's kernels
tables.py             a table in Markdown
"""

import hyclora.utils.interrupts
