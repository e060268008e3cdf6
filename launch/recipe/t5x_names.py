"""What stands here for the macros, bindings, references and flags of T5X, as data.

Names are those of T5X's documentation and of `t5x/configs/runs` and `t5x/examples` (sources of 2026-04).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

# An answer: lines of gin, with {value} where T5X's value stands; or `# why` where there is nothing to write.
Answer = str | Callable[[Any], str]

PAGE = "docs/coming_from_t5x.md"
GREEDY = "sampling.Sampling.top_k = 1"  # T5X's default, where nothing binds topk
_CACHED = "# tasks are cached when they are first read; include 'data/streamed.gin' streams them instead"
_INCLUDED = "# the included files bring it"
_OF_TASK = "# vocabularies are those of the task's features"
_EVAL = "# `meshway eval` and `meshway infer` take this from the run: --model_dir=DIR"


def _mesh(devices: int) -> str:
    if devices == 1:
        return "LAYOUT = 'data'"
    return f"LAYOUT = 'model_1d'\nmesh.MeshShape.ici = {{'data': -1, 'model': {devices}}}"


def _partitions(value: Any) -> str:
    return _mesh(value) if isinstance(value, int) else "# LAYOUT says how arrays are sharded; the default is 'data'"


def _submesh(value: Any) -> str:
    """T5X's (x, y, z, cores) of a tile of the model: only their product matters here."""
    whole = isinstance(value, tuple | list) and all(isinstance(size, int) for size in value)
    return _mesh(math.prod(value)) if whole else "# LAYOUT says how arrays are sharded"


def _seed(value: Any) -> str:
    return "# SEED = 0 is the default: every run can be repeated" if value is None else "SEED = {value}"


def _factored(value: Any) -> str:
    return "# layers are matrices, factored by size; `meshway convert --optimizer_state` binds what a checkpoint needs"


def _initial(value: Any) -> str:
    if value in (None, []):
        return "# nothing: parameters begin at random"
    return "INITIAL_CHECKPOINT_PATH = {value}"


def _beams(value: Any) -> str:
    if value == 1:
        return "# greedy decoding is the default"
    return "evaluation.Evaluation.decoder = @beam_search.BeamSearch()\nbeam_search.BeamSearch.num_beams = {value}"


def _decodes(value: Any) -> str:
    if value == 1:
        return "# one prediction of each example is the default"
    return f"{GREEDY}\nevaluation.Evaluation.decoder = @sampling.Sampling()\nsampling.Sampling.num_decodes = {{value}}"


def _top_p(value: Any) -> str:
    return "sampling.Sampling.top_p = " + ("1.0" if value == 0 else "{value}")


def _microbatches(value: Any) -> str:
    return "# the whole batch at once is the default" if value is None else "NUM_MICROBATCHES = {value}"


def _statistics(value: Any) -> str:
    return "# off is the default" if value is None else "WEIGHT_STATISTICS_PERIOD = 1000  # steps"


def _prefix(value: Any) -> str:
    if not value:
        return "features.LanguageModel.inputs = True"
    return (
        "FEATURE_CONVERTER = @features.PrefixLanguageModel()\nfeatures.PrefixLanguageModel.pack = %PACK\n"
        "objectives.DecoderOnly.prefix = True"
    )


def _listed(macro: str, scope: str) -> Answer:
    return lambda value: f"{macro} = None" if value is None else f"{macro} = [@{scope}/schedule.EvalDataset()]"


def _two_dimensions(value: Any) -> str:
    return "LAYOUT = 'model_2d'" if value == 2 else "# the default of LAYOUT = 'model_1d'"


_DATA: Mapping[str, Answer] = {
    "mixture_or_task_name": "MIXTURE_OR_TASK_NAME = {value}",
    "task_feature_lengths": "TASK_FEATURE_LENGTHS = {value}",
    "batch_size": "BATCH_SIZE = {value}",
    "module": "MIXTURE_OR_TASK_MODULE = {value}",
    "use_cached": _CACHED,
    "use_custom_packing_ops": "# there is one packing",
    "use_memory_cache": "# evaluation reads the cache",
    "trim_output_features": "# converters trim, and count what they trim",
    "num_workers": "grain_loader.CachedData.num_workers = {value}",
    "num_prefetch_threads": "# measured",
    "shuffle": "grain_loader.CachedData.shuffle = {value}",
    "seed": _seed,
    "split": "grain_loader.CachedData.train_split = {value}",
    "pack": "PACK = {value}",
}


def _own_data(scope: str) -> dict[str, Answer]:
    """Returns the rows of `scope`/utils.DatasetConfig: what differs from the run's own data is read by a source of its
    own, of which all else is as the run's."""

    def own(parameter: str, kinds: Any = (str, int)) -> Answer:
        lines = (
            f"{scope}/schedule.EvalDataset.data = @{scope}/grain_loader.CachedData()",
            f"{scope}/grain_loader.CachedData.{parameter} = {{value}}",
        )
        return lambda value: "\n".join(lines) if isinstance(value, kinds) else "# evaluation has the recipe's"

    return {
        "mixture_or_task_name": own("mixture_or_task_name"),
        "module": own("module", str),
        "batch_size": own("batch_size"),
        "task_feature_lengths": own("eval_lengths", (Mapping, type(None))),
        "split": f"{scope}/schedule.EvalDataset.split = {{value}}",
        "use_cached": _CACHED,
        "use_custom_packing_ops": "# there is one packing",
        "use_memory_cache": "# evaluation reads the cache",
        "shuffle": "# evaluation reads in order",
        "seed": "# evaluation reads in order",
        "pack": "# evaluation does not pack: an example counts once",
    }


def _actions(value: Any) -> str:
    if "EarlyStoppingAction" in repr(value):
        return "train.train.hooks = [@training_hooks.EarlyStopping()]"
    return "# train.train.hooks = [@mylab.Hook()], a class with after_evaluation or after_report"


def _results(value: Any) -> str:
    if value is None:
        return "evaluation.Evaluation.keep_predictions = True"
    return "evaluation.Evaluation.num_samples = {value}"


_TRAIN: Mapping[str, Answer] = {
    "total_steps": "TRAIN_STEPS = {value}",
    "relative_steps": "TRAIN_STEPS_RELATIVE = {value}",
    "eval_period": "EVAL_PERIOD = {value}",
    "stats_period": "REPORT_PERIOD = {value}",
    "eval_steps": "evaluation.Evaluation.max_batches = {value}",
    "random_seed": _seed,
    "use_hardware_rng": "USE_HARDWARE_RNG = {value}",
    "model_dir": "MODEL_DIR = {value}",
    "model": "MODEL = {value}",
    "train_eval_dataset_cfg": _listed("TRAIN_EVAL", "train_eval"),
    "infer_eval_dataset_cfg": _listed("INFER_EVAL", "infer_eval"),
    "actions": _actions,
    "run_eval_before_training": "# the first evaluation is before the first step",
    "train_dataset_cfg": _INCLUDED,
    "checkpoint_cfg": _INCLUDED,
    "partitioner": "# LAYOUT says how arrays are sharded",
    "trainer_cls": "# there is one step",
    "summarize_config_fn": "# config.gin and model_info.txt are always written",
    "inference_evaluator_cls": "# there is one evaluator",
    "concurrent_metrics": "# always",
    "gc_period": "# Python's collector runs between steps",
    "use_orbax": "# always",
    "verify_matching_vocabs_fn": "# always",
}
_ADAFACTOR = (
    *("decay_rate", "step_offset", "clipping_threshold", "multiply_by_parameter_scale", "min_dim_size_to_factor"),
    *("beta1", "epsilon1", "epsilon2", "factored", "weight_decay_rate_lr_exponent", "global_norm_clip_threshold"),
    *("max_parameter_scale", "skip_nan_updates", "dtype_momentum"),
)
_STOPPING = ("metric", "mode", "patience", "atol", "rtol")
_DECODES: Mapping[str, Answer] = {
    "return_all_decodes": "evaluation.Evaluation.all_decodes = {value}",
    "prompt_with_targets": "evaluation.Evaluation.prompt_with_targets = {value}",
}
_SCORES: Mapping[str, Answer] = {"return_intermediates": "evaluation.Evaluation.return_intermediates = {value}"}
_RATES = ("decay_factor", "steps_per_decay", "steps_per_cycle", "step_offset", "min_learning_rate")
_SIZES: Mapping[str, Answer] = {
    "vocab_size": "VOCAB_SIZE = {value}",
    "emb_dim": "D_MODEL = {value}",
    "mlp_dim": "D_FF = {value}",
    "num_heads": "NUM_HEADS = {value}",
    "head_dim": "HEAD_DIM = {value}",
    "num_encoder_layers": "NUM_ENCODER_LAYERS = {value}",
    "num_decoder_layers": "NUM_DECODER_LAYERS = {value}",
    "num_layers": "NUM_LAYERS = {value}",
    "mlp_activations": "ACTIVATIONS = {value}",
    "dropout_rate": "DROPOUT_RATE = {value}",
    "logits_via_embedding": "TIED_LOGITS = {value}",
    "dtype": "DTYPE = {value}",
    "scan_layers": "SCAN = {value}",
    "remat_policy": "REMAT = {value}",
    "param_scan_axis": "# layers are the first axis of a scanned parameter",
}
_MODEL: Mapping[str, Answer] = {
    "z_loss": "Z_LOSS = {value}",
    "label_smoothing": "LABEL_SMOOTHING = {value}",
    "loss_normalizing_factor": "LOSS_NORMALIZING_FACTOR = {value}",
    "optimizer_def": _INCLUDED,
    "decode_fn": "evaluation.Evaluation.decoder = {value}",
    "vocabulary": _OF_TASK,
    "input_vocabulary": _OF_TASK,
    "output_vocabulary": _OF_TASK,
    "feature_converter_cls": "include 'objectives/seqio_converter.gin'\nSEQIO_CONVERTER = {value}",
}


def _under(name: str, rows: Mapping[str, Answer]) -> dict[str, Answer]:
    return {f"{name}.{parameter}": answer for parameter, answer in rows.items()}


# `[scope/]module.Class.parameter`, modules by the last word of T5X's, its programs as `main`.
BINDINGS: Mapping[str, Answer] = {
    **_under("utils.DatasetConfig", {**dict.fromkeys(_DATA, _EVAL), "batch_size": _DATA["batch_size"]}),
    **_under("train/utils.DatasetConfig", _DATA),
    **_under("train_eval/utils.DatasetConfig", _own_data("train_eval")),
    **_under("infer_eval/utils.DatasetConfig", _own_data("infer_eval")),
    **_under("main.train", _TRAIN),
    **_under("main.evaluate", dict.fromkeys(("model", "dataset_cfg", "partitioner", "output_dir"), _EVAL)),
    **_under("main.infer", dict.fromkeys(("model", "dataset_cfg", "partitioner", "output_dir"), _EVAL)),
    "main.evaluate.inference_evaluator_cls": "# there is one evaluator",
    "main.evaluate.restore_checkpoint_cfg": _EVAL,
    "main.infer.restore_checkpoint_cfg": _EVAL,
    "main.infer.num_shards": "# meshway infer --num_shards=N --shard_id=I",
    "main.infer.shard_id": "# meshway infer --num_shards=N --shard_id=I",
    "main.infer.write_fn": "# meshway infer --writer=mylab.writers.Csv, a class with suffix and encode(rows, name)",
    "main.infer.merge_fn": "# the method merge(paths, file) of that class",
    "main.infer.merge_chunked_results": "# meshway infer --output=FILE.jsonl is merged, --output=DIR is not",
    "main.infer.file_extension": "# that of --output",
    "main.write_inferences_to_file.include_all_inputs": "# meshway infer --fields=all",
    "main.write_inferences_to_file.input_fields_to_include": "# meshway infer --fields=a,b",
    "main.write_inferences_to_file.output_ids": "# always: the field tokens",
    "main.create_task_from_tfexample_file.*": "# meshway infer --input=FILES --inputs_field=NAME --targets_field=NAME",
    "main.precompile.*": "# `meshway train --dry_run` compiles nothing, and tells the memory of the step",
    "export_lib.*": "# meshway export --model_dir=DIR --output=DIR",
    "models.get_input_vocabulary.*": _OF_TASK,
    "models.get_output_vocabulary.*": _OF_TASK,
    "main.infer.mode": "# meshway infer --mode=predict, score or predict_with_aux",
    "main.infer.checkpoint_period": "# meshway infer --chunk_size=RECORDS",
    "utils.CheckpointConfig.save": _INCLUDED,
    "utils.CheckpointConfig.restore": "# INITIAL_CHECKPOINT_PATH says what a fresh run begins from",
    "utils.SaveCheckpointConfig.period": "CHECKPOINT_PERIOD = {value}",
    "utils.SaveCheckpointConfig.keep": "manager.Keep.latest = {value}",
    "utils.SaveCheckpointConfig.dtype": "# checkpoints have the parameters' own dtype",
    "utils.SaveCheckpointConfig.save_dataset": "# always: the position in the data is a few numbers",
    "utils.SaveCheckpointConfig.keep_dataset_checkpoints": "# part of the checkpoint",
    "utils.SaveCheckpointConfig.checkpointer_cls": "# there is one",
    "utils.RestoreCheckpointConfig.path": _initial,
    "utils.RestoreCheckpointConfig.mode": "# a run's directory means its latest; .../checkpoints/STEP that one",
    "utils.RestoreCheckpointConfig.restore_dataset": "# a run that is resumed always does",
    "utils.RestoreCheckpointConfig.dtype": "# parameters have the model's dtype",
    "utils.RestoreCheckpointConfig.strict": "mapping.Initial.left_at_init = []  # patterns that may be missing",
    "utils.RestoreCheckpointConfig.assignment_map": "mapping.Initial.renames = {value}",
    "utils.RestoreCheckpointConfig.fallback_to_scratch": "# leave INITIAL_CHECKPOINT_PATH out",
    "utils.RestoreCheckpointConfig.checkpointer_cls": "# there is one",
    "utils.get_training_eval_datasets.*": "# evaluation reads each example once, in order",
    **{f"trainer.EarlyStoppingAction.{each}": f"training_hooks.EarlyStopping.{each} = {{value}}" for each in _STOPPING},
    "trainer.TerminateOnNanAction.*": "# a run whose loss is not finite stops by itself",
    "trainer.MoeTrainer.num_expert_partitions": "LAYOUT = 'expert'",
    "trainer.MoeTrainer.num_microbatches": _microbatches,
    "trainer.MoeTrainer.learning_rate_fn": _INCLUDED,
    "trainer.Trainer.num_microbatches": _microbatches,
    "trainer.Trainer.learning_rate_fn": _INCLUDED,
    "trainer.Trainer.weight_metrics_computer": _statistics,
    "utils.create_learning_rate_scheduler.factors": "schedules.t5_factors.factors = {value}",
    "utils.create_learning_rate_scheduler.base_learning_rate": "LEARNING_RATE = {value}",
    "utils.create_learning_rate_scheduler.warmup_steps": "WARMUP_STEPS = {value}",
    **{f"utils.create_learning_rate_scheduler.{each}": f"schedules.t5_factors.{each} = {{value}}" for each in _RATES},
    "partitioning.PjitPartitioner.num_partitions": _partitions,
    "partitioning.PjitPartitioner.model_parallel_submesh": _submesh,
    "partitioning.PjitPartitioner.logical_axis_rules": "# the layout's, partitioner.Layout.parameters and .activations",
    "partitioning.PjitPartitioner.params_on_devices": "# always",
    "partitioning.PjitPartitioner.backend": "# JAX_PLATFORMS=cpu, cuda or tpu in the environment",
    "partitioning.standard_logical_axis_rules.activation_partitioning_dims": _two_dimensions,
    "partitioning.standard_logical_axis_rules.parameter_partitioning_dims": _two_dimensions,
    "partitioning.MoePjitPartitioner.num_expert_partitions": "LAYOUT = 'expert'",
    "partitioning.MoePjitPartitioner.num_partitions": _partitions,
    "partitioning.MoePjitPartitioner.model_parallel_submesh": _submesh,
    **_under("models.EncoderDecoderModel.predict_batch_with_aux", _DECODES),
    **_under("models.DecoderOnlyModel.predict_batch_with_aux", _DECODES),
    **_under("models.EncoderDecoderModel.score_batch", _SCORES),
    **_under("models.DecoderOnlyModel.score_batch", _SCORES),
    "models.EncoderDecoderModel.predict_batch_with_aux.num_decodes": _beams,
    "models.DecoderOnlyModel.predict_batch_with_aux.num_decodes": _decodes,
    "models.DecoderOnlyModel.inputs_bidirectional_attention": _prefix,
    **_under("models.EncoderDecoderModel", _MODEL),
    **_under("models.DecoderOnlyModel", _MODEL),
    "models.EncoderDecoderModel.module": "objectives.EncoderDecoder.network = {value}",
    "models.DecoderOnlyModel.module": "objectives.DecoderOnly.network = {value}",
    "decoding.temperature_sample.temperature": "sampling.Sampling.temperature = {value}",
    "decoding.temperature_sample.topk": "sampling.Sampling.top_k = {value}",
    "decoding.temperature_sample.topp": _top_p,
    "decoding.temperature_sample.rescale_log_probs": "sampling.Sampling.rescale_log_probs = {value}",
    "decoding.beam_search.alpha": "beam_search.BeamSearch.alpha = {value}",
    **{f"adafactor.Adafactor.{each}": f"optimizers.adafactor.{each} = {{value}}" for each in _ADAFACTOR},
    "adafactor.Adafactor.weight_decay_rate": "optimizers.adafactor.weight_decay_rate = {value}\n"
    "optimizers.adafactor.decay_vectors = True",
    "adafactor.Adafactor.learning_rate": "LEARNING_RATE = {value}",
    "adafactor.Adafactor.logical_factor_rules": _factored,
    **_under("network.T5Config", _SIZES),
    **_under("network.TransformerConfig", _SIZES),
    "network.Transformer.config": _INCLUDED,
    "network.DecoderWrapper.config": _INCLUDED,
    "seqio.Evaluator.sequence_length": "EVAL_FEATURE_LENGTHS = {value}",
    "seqio.Evaluator.logger_cls": "# metrics.jsonl, TensorBoard, eval/TASK.jsonl and report.html are always written",
    "seqio.Evaluator.num_examples": "evaluation.Evaluation.max_predictions = {value}",
    "seqio.Evaluator.use_memory_cache": "# evaluation reads the cache",
    "seqio.JSONLogger.write_n_results": _results,
    "seqio.SentencePieceVocabulary.sentencepiece_model_file": _OF_TASK,
}
MACROS: Mapping[str, Answer] = {
    "USE_CACHED_TASKS": _CACHED,
    "RANDOM_SEED": _seed,
    "SHUFFLE_TRAIN_EXAMPLES": "grain_loader.CachedData.shuffle = {value}",
    "EVAL_STEPS": "evaluation.Evaluation.max_batches = {value}",
    "EVALUATOR_NUM_EXAMPLES": "evaluation.Evaluation.max_predictions = {value}",
    "EVALUATOR_USE_MEMORY_CACHE": "# evaluation reads the cache",
    "JSON_WRITE_N_RESULTS": _results,
    "CHECKPOINT_PATH": "# meshway eval, meshway infer: --model_dir=DIR, of a run or of what `meshway convert` made",
    "EVAL_OUTPUT_DIR": "# `meshway eval` writes into the run's directory",
    "INFER_OUTPUT_DIR": "# meshway infer --output=FILE",
    "TF_EXAMPLE_FILE_PATHS": "# meshway infer --input=FILES",
    "TF_EXAMPLE_FILE_TYPE": "# told by the files' names",
    "FEATURE_LENGTHS": "TASK_FEATURE_LENGTHS = {value}",
    "BEAM_SIZE": "# meshway infer --beams=N",
    "OUTPUT_FEATURES": _OF_TASK,
    "MODEL_NAME": "# meshway export --output=DIR names it",
    "MODEL_OUTPUT_DIR": "# meshway export --output=DIR",
    "VOCABULARY": _OF_TASK,
    "NUM_EXPERT_PARTITIONS": "LAYOUT = 'expert'",
    "NUM_MODEL_PARTITIONS": _partitions,
    "MODEL_PARALLEL_SUBMESH": _submesh,
    "ACTIVATION_DTYPE": "DTYPE = {value}",
}
# What a macro or an argument may be bound to, by the name after `@`.
REFERENCES: Mapping[str, str] = {
    "adafactor.Adafactor": "include 'optimizers/adafactor.gin'",
    "optimizers.adamw": "include 'optimizers/adamw.gin'",
    "optimizers.lion": "include 'optimizers/lion.gin'",
    "optimizers.sgd": "include 'optimizers/sgd.gin'",
    "models.EncoderDecoderModel": "include 'objectives/encoder_decoder.gin'",
    "models.DecoderOnlyModel": "include 'objectives/decoder_only.gin'",
    "network.Transformer": "include 'models/t5_1_1/common.gin'",
    "scalable_t5.network.Transformer": "include 'models/umt5/common.gin'",  # a position bias in each layer
    "network.DecoderWrapper": "include 'models/t5x_decoder/common.gin'",
    "decoding.beam_search": "# beams are asked for by num_decodes; one is greedy decoding, the default",
    "decoding.temperature_sample": f"{GREEDY}\nevaluation.Evaluation.decoder = @sampling.Sampling()",
}
FLAGS: Mapping[str, str] = {
    "--gin_bindings": "--gin.NAME=VALUE",
    "--run_mode": "the verb: meshway train, eval, infer",
    "--process_count": "--num_processes=N",
    "--process_index": "--process_id=I",
    "--multiprocess_gpu": "nothing: a cluster's processes are found; else --coordinator_address, --num_processes and "
    "--process_id",
    "--initialization_timeout": "MESHWAY_START_SECONDS=N in the environment",
    "--tfds_data_dir": "TFDS_DATA_DIR=DIR in the environment",
    "--seqio_additional_cache_dirs": "--gin.SEQIO_CACHE_DIRS=['DIR']",
}
