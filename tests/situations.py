"""Situations in reports, tables, folders and machines: the source of each, the input, the right result, and its test.

``python -m tests.situations`` prints the table; with ``--run`` the fast ones are run (2 minutes), with ``--run --all`` those
that train, too. ``tests/unit/test_situations.py`` holds the table to the tests that there are.
"""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple


class Situation(NamedTuple):
    """``test``: a pytest node, or the beginning of its name."""

    source: str
    given: str
    right: str
    test: str

    @property
    def fast(self) -> bool:
        return self.test.startswith("tests/unit/")


TABLES = "tests/unit/preprocessing/test_tables.py::"
READ = f"{TABLES}test_a_table_is_read_or_refused_in_one_line"
COHORT = "tests/unit/preprocessing/test_any_cohort.py::"
TEXT = "tests/unit/models/test_text_families.py::test_a_model_folder_of_any_family_scores_as_the_model_did"
WEIGHTS = "tests/unit/models/test_pretrained_weights.py::"
TOKENS = "tests/unit/models/test_pretrained_tokenizers.py::"
CODE = "tests/unit/models/test_pretrained_code.py::"
SERVE = "tests/unit/models/test_pretrained_text.py::test_what_cannot_read_reports_is_refused"
PLACE = "tests/unit/test_launch.py::test_a_process_knows_which_one_it_is"
ARRAY = "tests/unit/test_launch.py::test_every_task_of_an_array_takes_its_own_shard"
BOUNDS = "tests/unit/test_config.py::test_every_number_has_bounds"
PATH = "tests/unit/test_config.py::test_a_path_is_a_path"
CACHES = "tests/unit/test_caches.py::"
SHARED = "tests/unit/data/test_shared_memory.py::"
SENTENCES = "tests/unit/test_sentences.py::test_sentences_of_reports_as_they_are_typed"
EVALUATE = "tests/unit/evaluation/test_evaluate.py::"
LAUNCHED = "tests/robustness/test_launched_ranks.py::"
INTERRUPTS = "tests/robustness/test_interrupts.py::"
FAULTS = "tests/robustness/test_training_faults.py::"
VALIDATION = "tests/end_to_end/test_validation.py::"
HF, TORCH, NUMBA = "huggingface/transformers", "pytorch/pytorch", "numba/numba"

SITUATIONS = [
    # Encoders
    Situation(f"{HF} #15292", "BERT, built with a pooler, scored without", "trains, saves, loads: equal to 1e-6", f"{TEXT}[bert]"),
    Situation(f"{HF} #1363, #14243", "RoBERTa: positions begin at 2", "40 of 42 positions are used", f"{TEXT}[roberta]"),
    Situation(f"{HF} #15292", "XLM-R", "equal to 1e-6", f"{TEXT}[xlm-roberta]"),
    Situation(f"{HF} #1363", "Longformer, reports longer than its positions", "cut at sentence ends", f"{TOKENS}test_reports_longer_than_the_positions_are_cut_where_they_end"),
    Situation(HF, "DistilBERT, whose sizes have other names", "equal to 1e-6, LoRA too", f"{TEXT}[distilbert]"),
    Situation(HF, "ELECTRA, embeddings narrower than layers", "equal to 1e-6", f"{TEXT}[electra]"),
    Situation(HF, "DeBERTa, relative positions alone", "equal to 1e-6", f"{TEXT}[deberta-v2]"),
    Situation(HF, "ModernBERT, a fused projection", "equal to 1e-6, LoRA too", f"{TEXT}[modernbert]"),
    Situation(HF, "CLIP's text side, whose token for a text is the last", "equal to 1e-6", f"{TEXT}[clip]"),
    Situation(HF, "T5's encoder", "equal to 1e-6", f"{TEXT}[t5]"),
    Situation(f"{HF} #4122, #12594", "GPT-2, a tokenizer without padding", "equal to 1e-6, pooled by the last token", f"{TEXT}[gpt2]"),
    Situation(HF, "Qwen2, pooled by the last token", "equal to 1e-6", f"{TEXT}[qwen2]"),
    Situation(HF, "FNet: vectors depend on padding", "refused in one line", f"{SERVE}[fnet-"),
    Situation(HF, "BART, an encoder-decoder", "refused in one line", f"{SERVE}[bart-"),
    Situation(HF, "a vision transformer as text encoder", "refused in one line", f"{SERVE}[vit-"),
    Situation(HF, "pooling=cls of a decoder", "refused; pooling=last is named", "tests/unit/models/test_pretrained_text.py::test_a_pooling_that_no_token_stands_for_is_refused"),
    Situation(HF, "dtype is \"auto\" by default: a folder in float16", "float32 masters", f"{WEIGHTS}test_text_of_half_precision_is_trained_in_float32[dtype0]"),
    Situation(HF, "a folder in bfloat16", "float32 masters", f"{WEIGHTS}test_text_of_half_precision_is_trained_in_float32[dtype1]"),
    Situation(HF, "slices of a folder in float16", "float32 masters", f"{WEIGHTS}test_images_of_half_precision_are_encoded_in_float32"),
    Situation("nomic, gte: auto_map", "an architecture that comes as code", "refused; nothing is run or asked", f"{CODE}test_an_architecture_that_comes_as_code_is_refused"),
    Situation("CXR-BERT on the hub", "code beside a plain BERT", "left alone", f"{CODE}test_code_beside_a_plain_bert_is_left_alone"),
    Situation("a compute node", "no network, and no such name", "told apart", f"{CODE}test_no_connection_and_no_such_name_are_told_apart"),
    Situation("a firewall that drops packets", "a hub that does not answer", "said in under 10 s", f"{CODE}test_a_hub_that_does_not_answer_is_not_waited_for"),
    Situation("kpe/bert-for-tf2 #82", "weights without a pooler", "taken", f"{WEIGHTS}test_a_pooler_may_be_missing_and_one_of_an_older_folder_is_left_out"),
    Situation(f"{HF} #19111", "weights of fewer layers than config.json says", "refused, the first missing one named", f"{WEIGHTS}test_weights_of_another_architecture_are_refused"),
    Situation(f"{HF} #12763", "tokens added without resizing", "vectors that learn; frozen: refused", f"{TOKENS}test_added_tokens_get_vectors_where_they_can_be_learned"),
    Situation(HF, "a tokenizer without a fast form", "works", f"{TOKENS}test_a_tokenizer_without_a_fast_form_works"),
    Situation(HF, "a folder without its tokenizer, or with a damaged one", "one line names the file", f"{WEIGHTS}test_a_damaged_folder_is_named"),
    Situation("a copy that broke off", "a damaged file of a model folder", "one line names the file", f"{WEIGHTS}test_a_damaged_file_of_a_model_folder_is_named"),
    Situation(HF, "Swin and others over slices", "work without their folder", "tests/unit/models/test_pretrained_slices.py::test_slices_of_other_kinds_stand_without_their_folder"),
    # Tables
    Situation("Excel in Europe", "a byte order mark, semicolons, decimal commas", "read", f"{READ}[Excel in Europe: a mark, semicolons, decimal commas]"),
    Situation("pandas-dev/pandas #13497", "a byte order mark before a quoted name", "read", f"{COHORT}test_a_table_is_read_or_refused_with_the_line[byte order mark]"),
    Situation("Excel", "sep=; as first line, in quotes", "read", f"{READ}[Excel's separator in quotes]"),
    Situation("REDCap", "a header over two lines", "read; its separator is sniffed", f"{READ}[a header over two lines]"),
    Situation("pandas-dev/pandas #26446", "an index saved twice", "Unnamed columns are dropped", f"{READ}[pandas' index, saved twice]"),
    Situation("cat a.csv b.csv", "a header and a mark in the midst", "dropped", f"{READ}[files appended to each other]"),
    Situation("Excel: Unicode text", "UTF-16", "named", f"{READ}[UTF-16 with its mark]"),
    Situation("a Chinese Windows", "GB18030", "the line is named", f"{READ}[GB18030]"),
    Situation("a Western Windows", "Latin-1", "the line is named", f"{COHORT}test_a_table_is_read_or_refused_with_the_line[Latin-1]"),
    Situation("git clone of a data set", "a pointer of Git LFS", "named, with the remedy", f"{READ}[a pointer of Git LFS]"),
    Situation("a double click", "a spreadsheet called .csv", "named", f"{COHORT}test_a_table_is_read_or_refused_with_the_line[a spreadsheet]"),
    Situation("free text in CSV", "a comma that was not quoted", "refused with its line", f"{READ}[a comma that was not quoted]"),
    Situation("DataFrame.set_index", "names in the index of a Parquet file", "read", f"{TABLES}test_names_that_are_the_index_of_a_parquet_table_are_a_column"),
    Situation("Excel in Europe", "0,75; 0,8 and -1,024", "numbers; what has two meanings is refused", f"{TABLES}test_numbers_with_decimal_commas"),
    Situation("any registry", "columns of 0 and 1 called PatientSex, age>65, icu", "metadata, never labels", f"{TABLES}test_a_column_of_0_and_1_that_describes_the_patient_or_the_study_is_no_label"),
    Situation("RadBERT's grades", "a label that holds 2", "quoted with its line", f"{TABLES}test_columns_of_a_label_table_that_are_no_labels_are_kept"),
    Situation("ibrahimethemhamamci/CT-CLIP #55", "two tables that contradict each other", "refused, both lines named", f"{COHORT}test_rows_that_contradict_each_other_are_refused_and_repeated_ones_are_one"),
    Situation("CT-RATE", "reports that say Not given.", "empty, and counted aloud", f"{TABLES}test_no_report[Not dictated]"),
    Situation("pandas' str(nan)", "a report that says nan", "empty", f"{TABLES}test_no_report[nan nan]"),
    Situation("dictation", "See findings above", "empty", f"{TABLES}test_no_report[See findings above]"),
    Situation("dictation", "No findings.", "a report", f"{TABLES}test_a_report_however_short[No findings.]"),
    Situation("macOS, Windows", "names with umlauts, and names that differ in case", "never one id", f"{COHORT}test_a_folder_is_its_scans"),
    Situation("medspacy/medspacy #73", "lists by numbers, letters and dashes", "their items", f"{SENTENCES}[1. Cardiomegaly"),
    Situation("nipunsadvilkar/pySBD #86", "et al., approx. and decimals", "end nothing", f"{SENTENCES}[As described by Smith"),
    Situation("speedyk-005/yasbd-lib #30", "full stops of Chinese, Hindi and Arabic", "end sentences", f"{SENTENCES}[心"),
    # Surroundings
    Situation(f"{NUMBA} #4908, nf-core/sopa #20", "a read-only installation (Apptainer)", "numba's cache in TMPDIR", f"{CACHES}test_a_read_only_installation"),
    Situation("LMCache/LMCache #4597", "docker --user, no HOME", "caches in TMPDIR", f"{CACHES}test_no_writable_home"),
    Situation("su", "the home of another user", "is not entered", f"{CACHES}test_the_home_of_another_user_that_may_not_be_entered"),
    Situation(f"{TORCH} #5040", "docker's 64 MB of /dev/shm", "said at the start; fewer readers", f"{SHARED}test_fewer_workers_where_they_do_not"),
    Situation(f"{TORCH} #16979", "/dev/shm read-only or full", "its room is known", f"{SHARED}test_a_machine_with_another_shared_memory"),
    Situation("Lightning-AI/pytorch-lightning #19762", "salloc", "one process, which says so", f"{PLACE}[salloc]"),
    Situation("Lightning-AI/pytorch-lightning #20776", "srun --pty bash", "one process, which says so", f"{PLACE}[a shell of srun --pty]"),
    Situation("Lightning-AI/pytorch-lightning #10150", "a submit host with SLURM_NTASKS", "one process, which says so", f"{PLACE}[a submit host]"),
    Situation("sbatch without srun", "a batch script", "one process, which says so", f"{PLACE}[a batch script]"),
    Situation("Open MPI under Slurm", "mpirun's variables and Slurm's", "mpirun's rank", f"{PLACE}[Open MPI, whose helpers are tasks of a Slurm step]"),
    Situation("hpcaitech/ColossalAI #121", "mpirun over machines without MASTER_ADDR", "refused in one line", "tests/unit/test_launch.py::test_half_a_launcher_is_refused"),
    Situation("sbatch", "--array=0-15", "every shard once", f"{ARRAY}[0-15, the last]"),
    Situation("sbatch, again for those that failed", "--array=3,7", "refused at once without SHARDS", f"{ARRAY}[3,7]"),
    Situation("hydra-ecosystem/hydra #2599", "--store 1e5", "a folder", f"{PATH}[1e5]"),
    Situation("hydra-ecosystem/hydra #1163", "--store 1_000", "a folder", f"{PATH}[1_000]"),
    Situation("YAML 1.1", "--store 2024-01-05", "a folder", f"{PATH}[2024-01-05]"),
    Situation("YAML", "--store 'my store #1'", "a folder", f"{PATH}[my store #1]"),
    Situation("omry/omegaconf #56", "--store a=b", "a folder", f"{PATH}[a=b]"),
    Situation("Python 3.12, 3.13", "every file compiled, warnings as errors", "none", "tests/unit/test_pythons.py::test_every_declared_python_reads_the_files"),
    Situation("deepspeedai/DeepSpeed #3645", "Ctrl-C, once", "a checkpoint and one line", f"{INTERRUPTS}test_ctrl_c_writes_a_checkpoint_and_says_one_line"),
    Situation("hpcaitech/ColossalAI #121", "Ctrl-C, twice", "ends at once, no rank is left", f"{INTERRUPTS}test_the_second_ctrl_c_ends_at_once"),
    Situation("hpcaitech/ColossalAI #121", "Ctrl-C under torchrun, deepspeed and mpirun", "a checkpoint, no rank is left", f"{LAUNCHED}test_ctrl_c_under_a_launcher_writes_a_checkpoint"),
    Situation("a notebook", "main([... \"--processes\", \"2\"]), whose command line is the kernel's", "the ranks are given its words", "tests/unit/test_launch.py::test_ranks_are_given_all_but_the_command_itself"),
    Situation("macOS, Windows", "processes that are spawned, not forked", "the same losses", f"{LAUNCHED}test_called_from_python_where_processes_are_spawned"),
    Situation("a notebook", "two trainings in one kernel", "both are right", f"{FAULTS}test_a_second_training_in_one_process"),
    # Runs
    Situation("a hand on the keyboard", "seed=-1", "refused, the bound named", f"{BOUNDS}[seed=-1]"),
    Situation("a hand on the keyboard", "epochs=0", "refused, the bound named", f"{BOUNDS}[training.epochs=0]"),
    Situation("a hand on the keyboard", "heads=5", "refused, the width named", f"{BOUNDS}[model.volume.heads=5]"),
    Situation("a hand on the keyboard", "learning_rate=1e30", "refused, the bound named", f"{BOUNDS}[training.learning_rate=1e30]"),
    Situation("YAML", "seed=true", "refused: no number", f"{BOUNDS}[seed=true]"),
    Situation("a small cohort", "evaluate on one patient", "values without intervals", f"{EVALUATE}test_the_command_ends_well_on_one_patient"),
    Situation("a job that ran out of time", "predictions of part of a split", "said how many are missing", f"{EVALUATE}test_a_part_of_a_split_is_said_to_be_one"),
    Situation("JSON", "figures that do not exist", "null, never NaN", f"{EVALUATE}test_json_holds_no_nan"),
    Situation("a data set that grew", "another cohort on resume", "refused without --force; counted truly", "tests/unit/training/test_cohort.py::test_other_data_are_refused_unless_forced"),
    Situation("a small cohort", "one validation scan for two ranks", "finite figures, those of one rank", f"{VALIDATION}test_one_scan_for_two_ranks_is_what_it_is_for_one"),
    Situation("a data set without reports", "a validation split without any", "left out", f"{VALIDATION}test_a_split_without_reports_is_left_out"),
    Situation("a template", "all reports the same", "refused at the start", f"{FAULTS}test_reports_that_are_all_the_same_are_refused_at_the_start"),
]  # fmt: skip


def main(words: list[str]) -> int:
    """Print the table, or run its tests."""
    if "--run" in words:
        tests = list(dict.fromkeys(one.test for one in SITUATIONS if one.fast or "--all" in words))
        # The beginning of a node is passed to pytest as its function, the others unchanged.
        nodes = dict.fromkeys(
            test if test.endswith("]") or "[" not in test else test.partition("[")[0] for test in tests
        )
        return subprocess.run([sys.executable, "-m", "pytest", "-q", *nodes], check=False).returncode
    for one in SITUATIONS:
        print(f"{one.source}\t{one.given}\t{one.right}\t{one.test}")
    print(f"{len(SITUATIONS)} situations, {sum(one.fast for one in SITUATIONS)} of them fast", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
