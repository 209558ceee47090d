"""Every remedy that a message names is tried in a test, in which what was refused then succeeds.

A remedy is what a message tells the user to do: a clause that begins with one of these verbs. Such clauses are found in
the syntax trees of the package, in all texts of more than two words that are no docstrings, and each must be listed
here by some of its words. A new message with a remedy therefore fails this test until a test tries it.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bigload"
VERBS = (
    "add|build|call|cast|check|choose|download|drop|fetch|free|freeze|give|install|keep|leave|let|load|move|name|"
    "offload|pass|put|raise|remove|restart|run|save|say|set|train|try|use|wait|write"
)
# At the beginning of a text, after punctuation, or after "or", "and", "then".
_BEFORE = r"(?:[;:.(,?]|\bor|\band|\bthen)\s+(?:then |or |and |first )?"
_REMEDY = re.compile(rf"{_BEFORE}({VERBS})\b", re.IGNORECASE)
_AT_THE_START = re.compile(rf"({VERBS})\b(?! is)")

CHECKPOINT, MODEL = "checkpoint/test_remedies.py::", "model/test_remedies.py::"
PLANNING, OFFLOAD, ENTRY = "planning/test_remedies.py::", "offload/test_remedies.py::", "test_entry_remedies.py::"
DECODING, RANKS = "decoding/test_remedies.py::", "distributed/test_remedies.py::"
STAGES = "distributed/test_stages.py::"
# File -> words of the remedy -> the test that tries it.
SCALED = "checkpoint/test_scaled.py::"
TRIED = {
    "checkpoint/card.py": {
        "Remove this line": "checkpoint/test_card.py::test_card_that_its_owner_wrote_stays_and_ours_is_replaced",
    },
    "checkpoint/checkpoint.py": {
        "is quantized by llama.cpp": "checkpoint/test_foreign.py::test_gguf_is_named",
        "say where the weights are": CHECKPOINT + "test_file_that_is_named_is_loaded",
        "download the checkpoint again": CHECKPOINT + "test_file_that_is_fetched_again_is_loaded",
        "name the one to load": CHECKPOINT + "test_file_that_is_named_is_loaded",
        "is a pipeline of diffusers": "checkpoint/test_checkpoint.py::"
        "test_folder_of_a_pipeline_names_the_folders_with_weights",
    },
    "checkpoint/folders.py": {
        "is a file: name a folder": CHECKPOINT + "test_folder_of_another_name_is_written",
        "name a folder inside it": "checkpoint/test_folders.py::test_overwriting_what_is_no_checkpoint_is_refused",
        "pass overwrite=True": "checkpoint/test_folders.py::test_folder_that_is_not_empty_is_replaced_only_when_asked",
        "replaces checkpoints only; name another folder": CHECKPOINT + "test_folder_of_another_name_is_written",
        "is a link out of its folder": "faults/test_hostile_files.py::test_link_out_of_the_folder_is_not_copied",
    },
    "checkpoint/hub.py": {
        "hf download": "checkpoint/test_hub.py::test_repository_that_was_fetched_is_loaded",
    },
    "checkpoint/merged.py": {
        "are not quantized: use": PLANNING + "test_experts_in_int8_that_are_merged_are_loaded_from_the_original",
    },
    "checkpoint/scaled/fp8.py": {
        "put the checkpoint's config.json beside": SCALED + "test_damaged_checkpoints_load_once_they_are_sound",
    },
    "checkpoint/scaled/int8.py": {
        "quantized symmetrically": SCALED + "test_damaged_checkpoints_load_once_they_are_sound",
    },
    "checkpoint/scaled/merge.py": {
        "scales of weights in fp8, but": SCALED + "test_damaged_checkpoints_load_once_they_are_sound",
        "is missing: download": SCALED + "test_damaged_checkpoints_load_once_they_are_sound",
        "remove quantization_config": "checkpoint/test_scaled.py::"
        "test_what_was_dequantized_loads_without_the_stale_config",
    },
    "checkpoint/scaled/stated.py": {
        "which bigload does not read": CHECKPOINT + "test_original_of_what_another_method_quantized_is_loaded",
    },
    "checkpoint/scaled/tensor.py": {
        "download it again": SCALED + "test_damaged_checkpoints_load_once_they_are_sound",
    },
    "checkpoint/pickled.py": {
        "save that part alone": CHECKPOINT + "test_state_dict_that_is_saved_alone_is_loaded",
        "save its state_dict alone": CHECKPOINT + "test_state_dict_that_is_saved_alone_is_loaded",
    },
    "checkpoint/record.py": {
        "remove it to load the weights": CHECKPOINT + "test_record_that_is_damaged_is_removed_or_written_again",
        "install a newer one": CHECKPOINT + "test_record_that_is_damaged_is_removed_or_written_again",
    },
    "checkpoint/safetensors.py": {
        "the header describes": CHECKPOINT + "test_file_that_is_fetched_again_is_loaded",
        "git lfs pull": CHECKPOINT + "test_file_that_is_fetched_again_is_loaded",
        "its first bytes say": CHECKPOINT + "test_file_that_is_fetched_again_is_loaded",
    },
    "checkpoint/stored_config.py": {
        "pass None for the": CHECKPOINT + "test_config_that_contradicts_is_left_out_or_the_original_is_loaded",
        "instead of None": "checkpoint/test_stored_config.py::"
        "test_float32_that_the_config_beside_says_is_warned_of_once_and_the_remedies_work",
    },
    "cli/arguments.py": {
        "means so many bytes": "cli/test_messages.py::test_what_was_meant_is_said_and_works",
        "is not a size": "cli/test_messages.py::test_what_was_meant_is_said_and_works",
        "set one budget for each device": "cli/test_messages.py::test_one_budget_is_set_for_each_device",
        "name a file in a folder that exists": "cli/test_messages.py::test_a_picture_is_drawn_where_it_can_be",
    },
    "cli/load.py": {
        "pass both, or neither": "cli/test_messages.py::test_tokens_are_generated_with_a_prompt_only",
        "can load: {}; leave --prompt out": "cli/test_messages.py::"
        "test_without_a_tokenizer_a_model_is_loaded_without_a_prompt",
        "generate text; leave --prompt out": ENTRY + "test_prompt_is_left_out_for_a_model_that_generates_nothing",
        "does not run: leave --prompt out": "interop/test_code_beside_weights.py::"
        "test_a_tokenizer_made_by_code_is_refused_without_asking",
    },
    "cli/locations.py": {
        "name a folder with a config.json": "cli/test_hub_ids.py::test_a_folder_with_a_config_is_named",
        "name the folder that it is in": "cli/test_messages.py::test_a_file_in_a_models_folder_leads_to_the_folder",
    },
    "cli/parser.py": {
        "is not a value for it": "cli/test_messages.py::test_what_was_meant_is_said_and_works",
        "is not a command": "cli/test_messages.py::test_what_was_meant_is_said_and_works",
    },
    "cli/plan.py": {
        "pass --ranks too": "distributed/test_ranks_plan.py::test_command_refuses_what_it_would_not_count",
        "does not count this; leave it out": "distributed/test_ranks_plan.py::"
        "test_command_refuses_what_it_would_not_count",
        "is not divided among processes; use": "distributed/test_ranks_plan.py::"
        "test_command_refuses_what_it_would_not_count",
        "is not known; leave --context out": "cli/test_messages.py::test_what_keeps_no_cache_is_planned_without_one",
    },
    "config.py": {
        "set bnb_4bit_compute_dtype": "test_config.py::test_what_the_warning_of_float32_names_is_not_warned_of",
        "give a config or one of": "checkpoint/test_stored_config.py::"
        "test_none_for_a_checkpoint_that_is_not_quantized_is_refused_with_the_remedy",
        "choose one of": ENTRY + "test_a_mode_and_a_device_that_exist_are_taken",
    },
    "conversion.py": {
        "pass an empty one as model=": ENTRY + "test_checkpoint_is_quantized_where_and_from_what_the_error_says",
        "give the original checkpoint": ENTRY + "test_checkpoint_is_quantized_where_and_from_what_the_error_says",
        "name another folder": ENTRY + "test_checkpoint_is_quantized_where_and_from_what_the_error_says",
        "load the model with load_and_quantize_model": ENTRY
        + "test_extra_state_is_saved_as_a_tensor_or_loaded_without_quantizing_beforehand",
        "wait for it": "test_conversion.py::test_a_second_run_for_the_same_folder_is_refused_while_one_is_at_work",
    },
    "decoding/capture.py": {
        "are captured already: call remove() first": DECODING + "test_what_is_removed_can_be_captured_again_and_copied",
    },
    "decoding/decode_steps.py": {
        "before the model is copied or pickled": DECODING + "test_what_is_removed_can_be_captured_again_and_copied",
        "keep what a step changes in a cache object or a buffer": DECODING
        + "test_what_a_step_changes_is_captured_in_a_cache_object_and_in_a_buffer",
    },
    "decoding/obstacles.py": {
        "llm_int8_threshold=0.0": "decoding/test_generating.py::"
        "test_int8_is_captured_where_the_gpu_alone_finds_outliers",
        "call it under torch.no_grad()": DECODING
        + "test_steps_are_captured_without_gradients_in_eval_mode_and_with_a_static_cache",
        "call model.eval()": DECODING
        + "test_steps_are_captured_without_gradients_in_eval_mode_and_with_a_static_cache",
    },
    "distributed/joint_load.py": {
        "leave them out (adapters can be added": RANKS + "test_replicas_take_no_options_of_fully_shard",
        "all weights on one; leave it out": RANKS + "test_arguments_that_a_mesh_leaves_no_choice_of_are_left_out",
        "pass the mesh of them too": RANKS + "test_mesh_is_passed_for_what_processes_share",
        "use 'nf4' or 'int8' with adapters": RANKS + "test_int8_training_is_left_to_one_process",
    },
    "distributed/joint_save.py": {
        "of PEFT; save the adapter by": RANKS + "test_adapters_are_saved_beside_the_model",
        "save into one that they share": RANKS + "test_folder_that_all_hosts_share_is_saved_into",
    },
    "distributed/ranks.py": {
        "let all ranks make the same calls": "distributed/test_calls.py::"
        "test_calls_that_only_some_make_are_refused_and_later_ones_work",
        "pass one with one dimension": RANKS + "test_mesh_has_one_dimension_or_two_with_names",
        "pass a longer timeout": "distributed/test_faults.py::test_a_rank_that_fails_is_named",
    },
    "distributed/sharding.py": {
        "give it to no DistributedDataParallel": RANKS
        + "test_sharded_model_is_trained_without_ddp_or_replicated_for_it",
        "save_pretrained would save the parts": RANKS + "test_adapters_are_saved_whole",
        "each process would train its own: pass": RANKS + "test_adapters_are_passed_to_the_load",
        "load such weights by load_and_quantize_model": RANKS + "test_sharded_weights_are_loaded_by_a_load",
        "call that instead of the layer alone": RANKS + "test_layers_are_called_by_their_block",
        "divided among processes: build it again": RANKS + "test_sharded_model_is_built_again_to_be_loaded",
        "save_pretrained cannot save a model that": RANKS + "test_model_of_transformers_is_saved_by_all_processes",
        "pass, for example, lambda model": RANKS + "test_adapters_return_the_model",
    },
    "distributed/stages.py": {
        "pass one of its dimensions": STAGES + "test_a_pipeline_has_a_mesh_of_one_dimension",
        "which stages cannot be made of: use": STAGES + "test_what_no_stages_are_made_of_is_loaded_by_one_process",
        "use a mesh of fewer processes": STAGES + "test_what_has_too_few_blocks_is_loaded_when_they_are_named",
        "stages send a tensor from block to block": STAGES + "test_blocks_that_return_tuples_are_left_to_one_process",
    },
    "distributed/shards.py": {
        "pass torch_dtype and keep_in_fp32_modules": RANKS + "test_what_casts_the_weights_is_said_in_the_config",
        "load the model and its adapter by one process": RANKS + "test_adapters_are_merged_into_whole_models",
        "leave it to forwards": RANKS + "test_parts_of_quantized_weights_are_left_to_forwards",
    },
    "hardware/devices.py": {
        "use 'cpu' or 'cuda:N'": ENTRY + "test_a_mode_and_a_device_that_exist_are_taken",
    },
    "hardware/free_memory.py": {
        "choose another folder": ENTRY + "test_disk_that_says_what_is_free_is_taken",
    },
    "lightning/building.py": {
        "make the optimizer after fabric.setup": "lightning/test_building.py::"
        "test_an_optimizer_that_would_not_train_empty_layers_is_refused_and_the_remedy_works",
    },
    "lightning/converting.py": {
        "name modules to leave in": "lightning/test_advice.py::"
        "test_a_model_that_mostly_stays_plain_is_warned_of_in_terms_of_the_plugin",
        "set it up with a Fabric or Trainer without": "lightning/test_fabric.py::"
        "test_a_model_without_linear_layers_is_refused_and_runs_without_the_plugin",
        "then get_peft_model": "lightning/test_fabric.py::"
        "test_adapters_of_peft_are_refused_and_made_after_the_conversion",
        "use the ignore_modules": "lightning/test_building.py::"
        "test_a_quantized_layer_is_not_loaded_into_one_that_stays_plain",
    },
    "lightning/in_place.py": {
        "call the plugin's convert_module": "lightning/test_trainer.py::"
        "test_what_was_read_quantized_is_saved_and_refuses_to_compute_before_it_is_converted",
        "use the mode that it was saved in": "lightning/test_building.py::"
        "test_a_checkpoint_quantized_in_another_mode_is_refused_without_strict_too",
        "or build the model without empty_init": "lightning/test_building.py::"
        "test_a_layer_that_was_never_loaded_refuses_to_compute_and_is_named",
        "or call to_empty()": "lightning/test_building.py::"
        "test_a_layer_that_waits_on_meta_may_be_cast_and_moved_but_not_emptied",
    },
    "model/experts.py": {
        "give it the parameters": "model/test_experts.py::test_both_remedies_for_a_declared_module_work",
    },
    "model/initialization.py": {
        "build its module outside of": "planning/test_missing_parametrized.py::"
        "test_what_only_a_constructor_makes_is_refused_and_the_remedy_works",
        "give it values before the load": MODEL
        + "test_new_part_whose_class_does_not_initialise_it_is_loaded_with_values_of_its_own",
    },
    "model/quantizable_experts.py": {
        "both must be; use the original": "model/test_quantizable_experts.py::"
        "test_experts_of_which_half_is_stored_quantized_are_loaded_from_the_original",
        "remove it from there": "model/test_quantizable_experts.py::"
        "test_a_config_that_names_experts_which_are_stored_quantized_is_refused",
        "other values: use the original": "interop/test_experts_of_others.py::"
        "test_parametrized_experts_in_the_other_layout_are_refused",
    },
    "model/quantizable.py": {
        "build the model without the tie": MODEL
        + "test_tied_layers_that_are_stored_quantized_load_without_the_tie_or_from_the_original",
        "build the model from this checkpoint's config, or name its class": MODEL
        + "test_layers_of_a_class_that_is_not_known_load_where_it_is_named_or_not_used",
        "build the model that was saved": MODEL
        + "test_layers_of_a_class_that_is_not_known_load_where_it_is_named_or_not_used",
        "remove them from it": MODEL + "test_quantized_layers_that_a_config_skips_load_without_it_or_from_the_original",
    },
    "model/tensors.py": {
        "build the model anew": MODEL + "test_model_that_is_built_anew_or_called_or_run_once_is_loaded",
        "run the lazy modules once": MODEL + "test_model_that_is_built_anew_or_called_or_run_once_is_loaded",
    },
    "model/transformers_facts.py": {
        "build the model with transformers'": "interop/test_code_beside_weights.py::"
        "test_from_files_to_files_takes_the_model_that_the_error_asks_for",
    },
    "model/view.py": {
        "call it": MODEL + "test_model_that_is_built_anew_or_called_or_run_once_is_loaded",
    },
    "offload/at_rest.py": {
        "then load the state_dict": OFFLOAD + "test_state_dict_is_loaded_into_weights_that_were_in_files",
        "load the state_dict after its forward": "offload/test_residency.py::"
        "test_state_dict_is_not_loaded_into_weights_that_are_on_the_device",
    },
    "offload/engine.py": {
        "give it values": OFFLOAD + "test_weight_on_meta_is_given_values",
    },
    "offload/files.py": {
        "it was changed since": OFFLOAD + "test_model_whose_files_changed_is_loaded_again",
        "it was truncated since": OFFLOAD + "test_model_whose_files_changed_is_loaded_again",
    },
    "offload/forwards.py": {
        "load the model without offloading": "offload/test_export.py::test_both_remedies_work",
        "freeze it": OFFLOAD + "test_weight_that_would_be_trained_is_frozen_or_kept",
        "run forward again": OFFLOAD + "test_backward_after_remove_is_right_once_forward_has_run_again",
    },
    "offload/device_hooks.py": {
        "load the model again": "interop/test_diffusers_pipelines.py::test_sequential_offload_of_4_bit_is_refused",
    },
    "offload/handle.py": {
        "or build it again": OFFLOAD + "test_offloaded_model_is_loaded_again",
    },
    "offload/leaves.py": {
        "save its state_dict": OFFLOAD + "test_copy_is_made_of_the_state_dict_of_a_part_or_after_remove",
        "load it again": OFFLOAD + "test_layers_of_bitsandbytes_are_streamed_once_they_are_quantized",
        "move the model to its device": OFFLOAD + "test_layers_of_bitsandbytes_are_streamed_once_they_are_quantized",
        "before a weight is parametrized": OFFLOAD + "test_weight_is_pruned_after_remove",
    },
    "offload/model_device.py": {
        "load it with device_map='balanced'": "quantization/test_copied_layers.py::"
        "test_data_parallel_is_refused_and_its_remedy_works",
        "use it where it is": "offload/test_device_hooks.py::"
        "test_model_on_two_gpus_is_not_moved_and_both_remedies_work",
        "then change the model": OFFLOAD + "test_model_is_cast_after_remove",
        "keeps it on its device": OFFLOAD + "test_head_is_resized_after_remove_or_where_it_is_kept",
    },
    "offload/on_device/expert_cache.py": {
        "call remove() outside": "offload/test_expert_cache.py::test_removed_experts_are_resident",
        "run the model without one": "offload/test_expert_cache.py::test_a_graph_is_refused_and_without_one_it_runs",
    },
    "offload/on_device/slot_pool.py": {
        "run the model again": "offload/test_engine.py::test_engine_is_removed_while_threads_run_the_model",
        "call remove() outside": OFFLOAD + "test_remove_is_called_outside_of_what_uses_the_weights",
    },
    "offload/weight_cache.py": {
        "name an offload_folder of your own": OFFLOAD + "test_folder_of_ones_own_is_written",
    },
    "pipeline/dequantizing.py": {
        "call remove_hook_from_submodules": ENTRY + "test_layer_with_a_hook_of_accelerate_is_dequantized_without_it",
        "load the unquantized checkpoint": OFFLOAD + "test_offloaded_model_is_dequantized_after_remove",
    },
    "pipeline/adapters.py": {
        "target_modules, which adapts it": "pipeline/test_adapters.py::"
        "test_a_trained_copy_of_a_quantized_layer_is_refused_and_both_remedies_work",
        "load the model again, and leave": "pipeline/test_adapters.py::"
        "test_an_initialization_that_writes_over_packed_bytes_is_refused_and_the_remedies_work",
        "use LoRA": "pipeline/test_adapters.py::"
        "test_an_adapter_that_reads_packed_bytes_is_refused_and_both_remedies_work",
        "keep the adapter": "pipeline/test_adapters.py::"
        "test_merges_that_peft_cannot_do_are_refused_and_the_adapter_stays",
    },
    "pipeline/exchange.py": {
        "in skip_modules": "pipeline/test_exchange.py::"
        "test_a_held_weight_of_a_layer_to_quantize_is_refused_and_its_remedy_works",
    },
    "pipeline/execute.py": {
        "add these to skip_modules": ENTRY + "test_values_too_large_for_a_format_are_loaded_in_another",
        "choose a smaller mode or free": ENTRY + "test_memory_that_ran_out_is_enough_once_some_is_free",
    },
    "pipeline/file_output.py": {
        "add it to skip_modules": ENTRY + "test_values_too_large_for_a_format_are_loaded_in_another",
    },
    "pipeline/optimizers.py": {
        "or set eps=1e-4": "interop/test_optimizers.py::"
        "test_an_optimizer_that_would_divide_by_zero_is_refused_before_its_step_and_both_remedies_work",
    },
    "pipeline/refusals.py": {
        "or call bigload.dequantize_model": "interop/test_mixtures.py::"
        "test_save_pretrained_is_refused_and_both_remedies_save",
        "name attention": "interop/test_trained_mixtures.py::"
        "test_adapters_of_packed_experts_are_refused_and_both_remedies_work",
    },
    "planning/advice.py": {
        "choose a smaller mode": PLANNING + "test_model_that_a_map_puts_where_it_does_not_fit_is_planned",
    },
    "planning/placing/expert_caches.py": {
        "name the modules of the experts": "planning/test_expert_caches.py::"
        "test_a_cache_that_nothing_has_is_said_and_the_remedy_gives_it",
    },
    "planning/leftover.py": {
        "name modules to leave in skip_modules": "planning/test_leftover.py::test_each_remedy_works",
    },
    "planning/load_rules.py": {
        "Load the model with load_state_dict": "planning/test_load_rules.py::"
        "test_what_cannot_be_followed_is_refused_with_a_remedy_that_works",
        "use the original": PLANNING + "test_layer_that_computes_with_what_it_loads_is_loaded_from_the_original",
    },
    "planning/missing.py": {
        "name them in initialize_missing": "planning/test_missing.py::"
        "test_what_is_on_meta_is_an_error_that_names_a_remedy_that_works",
        "train them": PLANNING + "test_values_that_were_kept_are_trained",
        "try key_mapping={{}": "planning/test_sources.py::"
        "test_prefix_that_only_the_checkpoint_has_comes_with_the_mapping_that_works",
        "try key_mapping={'^'": "planning/test_sources.py::"
        "test_prefix_that_only_the_model_has_comes_with_the_mapping_that_works",
        "non-persistent buffers are on meta": PLANNING + "test_buffer_is_real_where_the_model_is_built_as_asked",
        "after to_empty() these are arbitrary": PLANNING + "test_buffer_is_real_where_the_model_is_built_as_asked",
        "pass tied_parameters": PLANNING + "test_head_of_the_shape_of_the_embedding_is_tied_to_it",
    },
    "planning/placement.py": {
        "name an offload_folder too": PLANNING + "test_disk_with_a_budget_is_used_where_a_folder_is_named",
    },
    "planning/planned_tensors.py": {
        "build the model from this": PLANNING + "test_model_of_the_checkpoints_sizes_is_loaded",
        "use bnb_4bit_quant_storage": PLANNING + "test_layer_that_does_not_fill_its_storage_is_loaded_otherwise",
    },
    "planning/planner.py": {
        "add them to skip_modules": PLANNING + "test_layer_with_extra_state_is_loaded_where_it_stays_plain",
        "offload none of them": PLANNING + "test_int8_training_that_is_not_offloaded_is_planned",
        "name an offload_folder": PLANNING + "test_plan_is_made_of_what_the_error_asks_for",
        "or drop llm_int8_enable": PLANNING
        + "test_quantized_blocks_are_streamed_or_the_original_is_computed_on_the_cpu",
        "keep it on the device": "pipeline/test_scripted.py::"
        "test_offloaded_scripted_weights_are_refused_and_the_remedy_works",
        "pass the weights_location": PLANNING + "test_weights_are_loaded_from_where_they_are_said_to_be",
    },
    "planning/request.py": {
        "pass what to load it as": "checkpoint/test_scaled.py::test_a_mode_is_what_the_error_without_one_asks_for",
        "add their blocks": PLANNING + "test_plan_is_made_of_what_the_error_asks_for",
        "set one budget for each": PLANNING + "test_plan_is_made_of_what_the_error_asks_for",
    },
    "planning/sources.py": {
        "build the model from this": PLANNING + "test_model_of_the_checkpoints_sizes_is_loaded",
        "with their scales": PLANNING + "test_weights_of_integers_without_scales_are_loaded_from_the_original",
        "build the model without": PLANNING + "test_two_weights_that_the_model_ties_are_both_loaded_without_the_tie",
    },
    "quantization/copied_layers.py": {
        "load the model with device_map='balanced'": "quantization/test_copied_layers.py::"
        "test_data_parallel_is_refused_and_its_remedy_works",
    },
    "quantization/layers.py": {
        "load a checkpoint that holds them": "lightning/test_loaded_models.py::"
        "test_layers_without_values_are_neither_saved_nor_dequantized",
        "load the model by one process": RANKS + "test_model_to_dequantize_is_loaded_whole",
        "or call merge_and_unload": ENTRY + "test_model_with_an_adapter_is_saved_merged_or_by_peft",
        "load the model again": ENTRY
        + "test_layers_that_are_not_quantized_or_were_packed_are_saved_after_a_move_or_a_load",
        "move the model to its": ENTRY
        + "test_layers_that_are_not_quantized_or_were_packed_are_saved_after_a_move_or_a_load",
    },
    "quantization/packed_experts.py": {
        "which casts leave alone": "quantization/test_experts.py::"
        "test_packed_bytes_stored_as_integers_are_left_alone_by_casts",
        "the weight there is not any more": "quantization/test_experts.py::test_a_weight_that_was_replaced_is_named",
    },
    "quantization/quantized_weight.py": {
        "holds of it": "quantization/test_loaded_states.py::test_a_state_that_cannot_be_loaded_is_refused",
        "with a scale for each: load all": "quantization/test_loaded_states.py::"
        "test_int8_takes_rows_and_scales_together_or_refuses_them",
        "its weight was replaced": "quantization/test_loaded_states.py::"
        "test_a_layer_whose_weight_was_replaced_takes_a_state_once_it_is_loaded_again",
    },
    "quantization/own_forwards.py": {
        "in skip_modules, or cast it": "quantization/test_own_forwards.py::"
        "test_both_remedies_for_an_input_of_integers_work",
        "move the input": "quantization/test_own_forwards.py::"
        "test_an_input_on_another_device_is_refused_and_the_remedy_works",
    },
    "quantization/saved_experts.py": {
        "remove these hooks": "model/test_quantizable_experts.py::"
        "test_experts_that_a_hook_renames_are_saved_without_it",
    },
    "loading.py": {
        "slots and caches of offloaded weights": "offload/test_expert_cache_faults.py::"
        "test_a_load_that_finds_no_room_for_the_cache_says_so_and_what_it_names_helps",
    },
    "saving.py": {
        "reads no fused experts": "model/test_quantizable_experts.py::"
        "test_saving_warns_of_what_transformers_does_not_read",
        "return it as a tensor, and its set_extra_state": "planning/test_attributes_of_rules.py::"
        "test_what_would_be_lost_is_not_saved_and_the_remedy_works",
        "Remove such hooks for the save": "inspection/test_own_saving.py::"
        "test_a_hook_that_changes_quantized_weights_is_refused_and_the_remedy_works",
        "no subclasses of nn.Linear": "interop/test_saved_by_bigload.py::"
        "test_saving_warns_of_layers_that_transformers_does_not_make",
        "a name without dots": "interop/test_diffusers.py::"
        "test_a_layer_that_diffusers_cannot_tell_from_others_is_said_once",
        "save it as any other model": ENTRY + "test_model_that_is_whole_is_saved_and_one_that_is_plain_as_any_other",
        "load the weights first": ENTRY + "test_model_that_is_whole_is_saved_and_one_that_is_plain_as_any_other",
        "let get_extra_state return": ENTRY
        + "test_extra_state_is_saved_as_a_tensor_or_loaded_without_quantizing_beforehand",
        "set config.tie_word_embeddings": "interop/test_saved_by_bigload.py::"
        "test_head_that_is_untied_in_a_model_that_ties_is_refused",
    },
}
# File -> words -> why no test tries it.
NOT_TRIED = {
    "distributed/shards.py": {"this version of torch": "needs another version of torch"},
    "hardware/pinned.py": {"Raise the limit of locked memory": "a setting of the machine"},
    "planning/missing.py": {"build the model with the version": "needs another version of transformers"},
}


def texts(tree):
    """Yield the texts in a file: strings and f-strings, with {} for what is put in, but no docstrings and no help."""
    left_out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out |= {inner for part in ast.iter_child_nodes(node) for inner in ast.walk(part)}
        elif isinstance(node, ast.Expr) or (
            isinstance(node, ast.keyword) and node.arg in ("help", "description", "examples")
        ):
            left_out.add(node.value)  # a docstring
    for node in set(ast.walk(tree)) - left_out:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)


def remedies(package):
    """Yield the file and the text of each message that tells the user what to do."""
    for path in sorted(package.rglob("*.py")):
        if path.match("cli/messages.py"):
            continue  # the remedies of other files in the words of the command line: see cli/test_messages.py
        for text in texts(ast.parse(path.read_text())):
            if text.count(" ") > 1 and (_REMEDY.search(text) or _AT_THE_START.match(text)):
                yield path.relative_to(package).as_posix(), text


def listed_by_file():
    files = TRIED.keys() | NOT_TRIED.keys()
    return {file: {**TRIED.get(file, {}), **NOT_TRIED.get(file, {})} for file in files}


def test_every_remedy_is_listed_once():
    listed = listed_by_file()
    found = list(remedies(PACKAGE))
    unlisted = [f"{file}: {text}" for file, text in found if sum(words in text for words in listed.get(file, ())) != 1]
    assert unlisted == [], "try it in a test and list it here, by words that no other message of the file has"
    stale = [
        f"{file}: {words}"
        for file, table in listed.items()
        for words in table
        if not any(file == other and words in text for other, text in found)
    ]
    assert stale == []


@functools.cache
def functions_of(file):
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("test", sorted({test for table in TRIED.values() for test in table.values()}))
def test_the_test_that_tries_it_exists(test):
    file, _, name = test.partition("::")
    assert name in functions_of(ROOT / "tests" / file)


@pytest.mark.parametrize(
    ("code", "has_one"),
    [
        ('raise ValueError(f"{x} is no folder: name another one")', True),
        ('raise ValueError("it is gone; then load it again")', True),
        ('logger.warning("%s is slow. If that matters, set fast=True", x)', True),
        ('hint = "pass a folder"\n', True),
        ('raise ValueError(f"{x} is no folder")', False),
        ('raise ValueError("it names what is not there")', False),
        ('def f():\n    """Load it; call it again."""', False),
    ],
)
def test_a_remedy_is_told_from_what_is_none(tmp_path, code, has_one):
    (tmp_path / "a.py").write_text(code)
    assert len(list(remedies(tmp_path))) == has_one
