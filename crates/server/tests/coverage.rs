//! Which test shows which requirement of the HTTP contract.
//!
//! An id is found by searching this file for it; a test is written `module::name` if it is in this
//! crate, `crate::module::name` if it is elsewhere. The one test here keeps the table honest: every
//! test it names exists. No requirement is without one.
//!
//! `E` and `M` are the rows of the contract's table of bad requests.

use std::path::{Path, PathBuf};

/// Requirement, and the tests that show it.
#[rustfmt::skip]
const TABLE: &[(&str, &[&str])] = &[
    // Endpoints and paths.
    ("A-101", &["answers::every_path_of_the_endpoint_answers_alike"]),
    ("A-102", &["completions::a_text_is_continued", "endpoints::every_path_leads_to_its_endpoint"]),
    ("A-103", &["operations::the_model_list_shows_canonical_ids_and_each_name_can_be_asked_for"]),
    ("A-104", &["messages::names_of_anthropic_lead_to_a_model_and_come_back"]),
    ("A-105", &["messages::a_count_is_what_the_request_is_charged_and_what_chat_counts"]),
    ("A-106", &["tokenize::text_and_tokens_are_turned_into_each_other"]),
    ("A-107", &["operations::a_failed_model_fails_health", "operations::every_metric_of_the_contract_is_there_and_typed"]),
    ("A-108", &["operations::the_version_is_a_version"]),
    ("A-109", &["responses::every_path_answers_and_nothing_is_kept"]),
    ("A-110", &["endpoints::every_path_leads_to_its_endpoint"]),
    ("A-111", &["operations::the_model_list_shows_canonical_ids_and_each_name_can_be_asked_for"]),
    ("A-112", &["transport::http2_answers_requests_without_being_negotiated", "transport::a_connection_serves_one_request_after_another", "tls::an_answer_comes_encrypted", "tls::http2_is_negotiated_with_clients_that_know_it"]),
    ("A-113", &["bad_requests::beta_features_can_be_kept_to_their_path"]),
    ("A-114", &["bad_requests::methods_and_paths", "endpoints::a_wrong_method_is_told_the_right_ones", "endpoints::what_can_be_got_can_be_asked_for_its_head", "browsers::a_named_origin_is_answered_and_told_what_it_may_read"]),
    // Transport, limits, order of checks.
    ("A-201", &["bad_requests::media_types_and_encodings", "browsers::a_compressed_body_is_read_if_the_server_is_told_so"]),
    ("A-202", &["bodies::large_bodies_are_read_where_they_delay_nobody", "bad_requests::bodies_over_the_limit", "browsers::the_limit_is_for_what_a_compressed_body_becomes", "bodies::thirty_four_megabytes_are_too_many_however_they_come"]),
    ("A-203", &["transport::too_many_or_too_large_headers_get_an_envelope", "transport::a_client_that_never_finishes_its_head_is_dropped", "transport::a_body_that_does_not_come_times_out", "settings::a_body_that_trickles_for_too_long_times_out", "bodies::heads_within_64_kib_are_read_and_larger_ones_refused", "load::heads_and_bodies_that_trickle_in_are_cut_off_and_hold_nothing"]),
    ("A-204", &["protocol::bodies::what_is_not_one_json_object_is_refused", "protocol::bodies::of_duplicate_keys_the_last_one_wins"]),
    ("A-205", &["fuzz::corpus::grammar", "protocol::bodies::no_value_of_any_field_makes_the_reader_panic", "transport::garbage_is_answered_or_closed_but_never_fatal", "bodies::numbers_keys_and_strings_of_any_size_are_survived"]),
    ("A-206", &["protocol::good_requests::null_means_absent_everywhere"]),
    ("A-207", &["protocol::bad_requests::unknown_fields_are_refused_only_when_told_so", "bad_requests::fields"]),
    ("A-208", &["protocol::bad_requests::of_two_mistakes_the_earlier_check_reports", "bad_requests::keys", "bad_requests::models"]),
    ("A-209", &["operations::a_clients_request_id_is_adopted_if_it_is_one", "answers::a_plain_answer_has_the_fields_of_the_contract"]),
    ("A-210", &["protocol::responses::an_impossible_token_has_a_finite_logprob", "browsers::answers_are_compressed_for_those_who_ask_and_streams_for_nobody"]),
    // Authentication, keys, quota.
    ("A-301", &["auth::either_header_carries_the_key_and_bearer_wins"]),
    ("A-302", &["bad_requests::keys", "auth::an_error_shows_no_more_than_the_end_of_a_key"]),
    ("A-303", &["bad_requests::keys", "settings::metrics_can_be_kept_to_those_with_a_key"]),
    ("A-304", &["keys::tokens_are_limited_per_minute_and_in_all", "keys::requests_per_minute_and_at_once_are_limited", "bad_requests::a_key_may_be_kept_to_some_models", "keys::a_changed_file_of_keys_is_read_without_disturbing_what_runs"]),
    ("A-305", &["keys::requests_per_minute_and_at_once_are_limited", "bad_requests::a_full_queue", "messages::a_full_queue_is_529"]),
    ("A-306", &["engine::nano::bf16_tokens_do_not_depend_on_batch_chunks_cache_hits_or_preemption"]),
    // Models and aliases.
    ("A-401", &["cli::names::released_models_are_known_by_their_dimensions"]),
    ("A-402", &["answers::aliases_are_echoed_and_lead_to_the_loaded_model", "operations::aliases_are_listed_if_the_server_is_told_so"]),
    ("A-403", &["answers::every_toggle_and_alias_switches_thinking", "settings::what_the_contract_lets_operators_decide_can_be_decided"]),
    ("A-404", &["answers::aliases_are_echoed_and_lead_to_the_loaded_model"]),
    ("A-405", &["bad_requests::models"]),
    ("A-406", &["operations::the_model_list_shows_canonical_ids_and_each_name_can_be_asked_for", "protocol::responses::the_model_list_satisfies_both_sdks"]),
    ("A-407", &["messages::names_of_anthropic_lead_to_a_model_and_come_back", "settings::names_of_the_messages_surface_can_be_mapped"]),
    // Limits.
    ("A-501", &["cli::memory::a_context_that_was_asked_for_is_never_cut_and_others_are"]),
    ("A-502", &["settings::every_limit_on_a_request_can_be_set"]),
    ("A-503", &["settings::a_default_number_of_tokens_can_be_set"]),
    ("A-504", &["settings::every_limit_on_a_request_can_be_set"]),
    ("A-505", &["settings::every_limit_on_a_request_can_be_set"]),
    ("A-506", &["settings::every_limit_on_a_request_can_be_set", "protocol::schemas::nesting_is_bounded"]),
    ("A-507", &["settings::every_limit_on_a_request_can_be_set"]),
    ("A-508", &["bad_requests::a_full_queue", "settings::a_request_that_waits_too_long_is_told_so"]),
    ("A-509", &["constrained::a_compilation_has_a_budget"]),
    ("A-510", &["settings::a_default_number_of_tokens_can_be_set", "bad_requests::what_does_not_fit_the_context"]),
    ("A-511", &["bad_requests::what_does_not_fit_the_context", "protocol::good_requests::a_clipping_server_cuts_the_token_limit"]),
    ("A-512", &["protocol::good_requests::the_newer_name_of_the_token_limit_wins", "answers::a_token_limit_is_met_exactly"]),
    ("A-513", &["logs::an_effort_that_the_context_has_no_room_for_is_warned_of_and_kept"]),
    // Chat request body.
    ("A-601", &["protocol::bad_requests::the_model_comes_before_everything_else"]),
    ("A-602", &["protocol::bad_requests::messages_must_be_a_list_of_known_things"]),
    ("A-603", &["rows::every_row_about_sampling"]),
    ("A-604", &["engine::sampling::greedy_takes_the_lowest_id_on_ties", "rows::every_row_about_sampling"]),
    ("A-605", &["engine::sampling::the_draw_is_the_noisiest_of_the_tokens_that_the_definition_keeps", "rows::every_row_about_sampling"]),
    ("A-606", &["engine::sampling::the_draw_is_the_noisiest_of_the_tokens_that_the_definition_keeps", "rows::every_row_about_sampling"]),
    ("A-607", &["answers::an_answer_ends_before_its_stop_string"]),
    ("A-608", &["streams::a_short_stream_byte_by_byte"]),
    ("A-609", &["streams::a_short_stream_byte_by_byte", "streams::usage_is_on_every_chunk_if_asked_for", "completions::usage_is_on_every_chunk_if_asked_for", "rows::every_row_about_sampling"]),
    ("A-610", &["answers::several_choices_are_sorted_and_counted_together"]),
    ("A-611", &["rows::every_row_about_sampling"]),
    ("A-612", &["answers::logprobs_cover_the_text_and_nothing_else"]),
    ("A-613", &["rows::every_row_about_sampling"]),
    ("A-614", &["rows::every_row_about_sampling"]),
    ("A-615", &["protocol::bad_requests::tools_are_checked_one_by_one"]),
    ("A-616", &["protocol::good_requests::the_default_tool_choice_depends_on_whether_there_are_tools"]),
    ("A-617", &["answers::one_call_at_a_time_if_the_client_wants_it_so"]),
    ("A-618", &["protocol::bad_requests::response_formats_are_checked"]),
    ("A-619", &["protocol::good_requests::toggles_and_efforts_have_one_meaning_each"]),
    ("A-620", &["settings::users_share_cached_prompts_only_if_the_server_is_told_so", "rows::every_row_about_sampling"]),
    ("A-621", &["protocol::bad_requests::sampling_fields_have_types_and_ranges", "engine::serving::nothing_ends_an_answer_before_its_minimum_but_its_maximum"]),
    ("A-622", &["protocol::bad_requests::unknown_fields_are_refused_only_when_told_so"]),
    ("A-623", &["protocol::bad_requests::sampling_fields_have_types_and_ranges", "protocol::bad_requests::numbers_beyond_every_range_are_out_of_range_and_not_of_the_wrong_type"]),
    ("A-624", &["engine::nano::bf16_tokens_do_not_depend_on_batch_chunks_cache_hits_or_preemption", "engine::sampling::draws_follow_the_distribution_over_positions_seeds_and_choices"]),
    ("A-625", &["answers::a_plain_answer_has_the_fields_of_the_contract"]),
    // Messages.
    ("A-701", &["protocol::bad_requests::messages_must_be_a_list_of_known_things", "settings::what_the_contract_lets_operators_decide_can_be_decided", "settings::the_encodings_own_roles_are_accepted_if_the_server_is_told_so"]),
    ("A-702", &["protocol::good_requests::an_sdk_message_is_accepted_back_with_its_nulls", "rows::every_row_about_messages"]),
    ("A-703", &["protocol::bad_requests::messages_must_be_a_list_of_known_things"]),
    ("A-704", &["protocol::bad_requests::unknown_fields_are_refused_only_when_told_so"]),
    ("A-705", &["protocol::bad_requests::calls_and_results_must_pair_up_in_order", "answers::tool_history_is_rendered_and_answered"]),
    ("A-706", &["answers::a_trailing_assistant_message_begins_a_new_turn", "rows::a_trailing_assistant_message_where_it_is_refused"]),
    ("A-707", &["bad_requests::reasoning_can_be_demanded_back", "chat::prompts::reasoning_that_a_client_did_not_send_back_renders_as_empty", "agents::reasoning_comes_back_under_either_name_or_not_at_all"]),
    ("A-708", &["answers::a_prefix_is_continued_and_not_repeated", "protocol::bad_requests::a_prefix_is_the_last_message_and_the_assistants"]),
    ("A-709", &["chat::goldens::control_tokens_spelled_by_a_user_stay_text", "settings::control_tokens_in_text_are_text_unless_the_server_is_told_otherwise"]),
    ("A-710", &["chat::goldens::every_encode_golden_renders_to_the_same_text_and_ids", "chat::recipe::prompts_and_their_ids_equal_those_of_the_hosted_apis_library"]),
    // Thinking mode.
    ("A-801", &["answers::thinking_is_on_by_default_and_kept_apart_from_the_answer", "settings::thinking_can_be_off_by_default"]),
    ("A-802", &["answers::every_toggle_and_alias_switches_thinking", "protocol::bad_requests::thinking_fields_must_make_sense_and_agree"]),
    ("A-803", &["answers::every_toggle_and_alias_switches_thinking"]),
    ("A-804", &["protocol::good_requests::toggles_and_efforts_have_one_meaning_each", "settings::efforts_and_budgets_can_be_mapped_and_ignored"]),
    ("A-805", &["answers::a_reasoning_budget_forces_the_end_of_reasoning", "settings::efforts_and_budgets_can_be_mapped_and_ignored"]),
    ("A-806", &["answers::thinking_mode_ignores_sampling_and_says_so", "settings::sampling_parameters_can_be_honoured_while_thinking"]),
    ("A-807", &["answers::thinking_is_on_by_default_and_kept_apart_from_the_answer", "answers::reasoning_that_never_ends_leaves_the_content_empty"]),
    ("A-808", &["answers::every_toggle_and_alias_switches_thinking", "streams::reasoning_has_a_second_name_if_the_server_is_told_so"]),
    ("A-809", &["answers::a_token_limit_is_met_exactly"]),
    // Chat response.
    ("A-901", &["answers::several_choices_are_sorted_and_counted_together"]),
    ("A-902", &["protocol::responses::a_call_only_answer_has_null_content"]),
    ("A-903", &["answers::a_token_limit_is_met_exactly", "shutdown::a_cut_generation_can_end_with_the_hosted_finish_reason"]),
    ("A-904", &["answers::an_answer_ends_before_its_stop_string"]),
    ("A-905", &["answers::stop_strings_do_not_apply_to_reasoning", "chat::answers::stop_strings_end_the_answer_text_and_nothing_else"]),
    ("A-906", &["chat::text::an_unfinished_character_becomes_one_replacement_character"]),
    ("A-907", &["answers::a_token_limit_is_met_exactly", "tokenize::a_conversation_counts_what_chat_would_charge", "answers::a_repeated_prompt_reports_its_cached_tokens"]),
    ("A-908", &["protocol::responses::a_completion_has_the_fields_of_the_contract_in_its_order"]),
    ("A-910", &["answers::logprobs_cover_the_text_and_nothing_else"]),
    ("A-911", &["answers::logprobs_cover_the_text_and_nothing_else", "protocol::responses::an_impossible_token_has_a_finite_logprob"]),
    // Tools.
    ("A-1001", &["protocol::bad_requests::tools_are_checked_one_by_one"]),
    ("A-1002", &["protocol::bad_requests::a_tool_choice_must_be_possible", "answers::a_forbidden_call_is_not_even_sampled"]),
    ("A-1003", &["constrained::a_forced_call_is_made_with_and_without_thinking", "chat::grammar::arguments_of_calls_are_valid_after_the_parser_put_them_together"]),
    ("A-1004", &["constrained::a_forced_call_is_made_with_and_without_thinking", "constrained::a_forced_call_in_thinking_mode_can_be_refused_or_end_the_thinking"]),
    ("A-1005", &["constrained::a_block_that_the_model_opens_is_held_to_names_and_schemas", "constrained::arguments_of_tools_that_are_not_strict_can_be_left_to_the_model"]),
    ("A-1006", &["answers::tool_calls_are_parsed_and_their_arguments_are_json", "answers::markup_without_tools_on_offer_is_neither_a_call_nor_text"]),
    ("A-1007", &["streams::reasoning_content_and_a_call_come_in_their_order"]),
    ("A-1008", &["protocol::schemas::strict_mode_wants_closed_objects_at_every_level", "chat::grammar::json_under_a_schema_is_valid_or_cut_by_length", "constrained::what_cannot_be_enforced_or_compiled_is_422"]),
    ("A-1009", &["protocol::schemas::ordinary_schemas_are_accepted", "chat::grammar::a_pattern_that_cannot_be_enforced_is_an_error_in_strict_mode_only"]),
    ("A-1010", &["chat::grammar::some_json_object_is_an_object_and_white_space_is_bounded"]),
    ("A-1011", &["constrained::a_compilation_has_a_budget", "fuzz::corpus::grammar", "chat::grammar::what_is_malformed_or_too_complex_is_refused_and_nothing_breaks"]),
    // response_format.
    ("A-1101", &["protocol::bad_requests::response_formats_are_checked"]),
    ("A-1102", &["rows::every_row_about_tools_formats_and_thinking", "settings::what_the_contract_lets_operators_decide_can_be_decided"]),
    ("A-1103", &["constrained::a_json_object_is_one_or_the_beginning_of_one", "chat::grammar::an_answer_under_a_grammar_never_ends_before_it_says_something"]),
    ("A-1104", &["constrained::a_schema_is_followed_and_reasoning_comes_before_it"]),
    ("A-1105", &["constrained::an_answer_is_a_call_or_json_where_both_are_possible", "constrained::a_schema_is_followed_and_reasoning_comes_before_it"]),
    ("A-1106", &["constrained::structured_outputs_hold_and_conflict_with_other_demands", "completions::a_text_can_be_held_to_a_schema_an_expression_a_choice_or_a_language"]),
    // Streaming.
    ("A-1201", &["streams::a_refused_stream_is_an_ordinary_error"]),
    ("A-1202", &["streams::a_short_stream_byte_by_byte"]),
    ("A-1203", &["streams::silence_is_filled_with_comments", "settings::whole_answers_can_be_waited_for_with_line_ends"]),
    ("A-1204", &["streams::a_short_stream_byte_by_byte"]),
    ("A-1205", &["streams::reasoning_content_and_a_call_come_in_their_order"]),
    ("A-1206", &["streams::choices_may_interleave_but_each_is_whole"]),
    ("A-1207", &["streams::a_short_stream_byte_by_byte", "streams::usage_is_on_the_last_chunk_of_a_choice_if_the_server_is_told_so"]),
    ("A-1208", &["streams::a_short_stream_byte_by_byte"]),
    ("A-1209", &["streams::a_stream_says_what_the_whole_answer_says"]),
    ("A-1210", &["streams::a_stream_that_fails_ends_with_an_error_event_and_without_done"]),
    ("A-1211", &["disconnects::a_stream_whose_reader_leaves_is_cancelled", "disconnects::a_whole_answer_that_nobody_waits_for_is_cancelled", "disconnects::a_request_that_still_waits_is_cancelled_in_the_queue", "load::a_thousand_streams_of_which_a_third_is_dropped_leave_nothing_behind"]),
    ("A-1212", &["disconnects::a_reader_that_takes_nothing_is_given_up", "load::floods_and_slow_readers_do_not_hurt_who_behaves"]),
    ("A-1213", &["shutdown::running_requests_end_and_new_ones_are_refused", "shutdown::what_outlasts_the_drain_ends_with_an_error_event"]),
    // Prefix caching.
    ("A-1301", &["answers::a_repeated_prompt_reports_its_cached_tokens", "agents::a_hundred_turns_find_all_but_the_last_in_the_cache"]),
    ("A-1302", &["engine::nano::bf16_tokens_do_not_depend_on_batch_chunks_cache_hits_or_preemption"]),
    ("A-1303", &["settings::users_share_cached_prompts_only_if_the_server_is_told_so", "engine::tiers::other_models_users_and_salts_find_nothing"]),
    ("A-1304", &["answers::a_repeated_prompt_reports_its_cached_tokens"]),
    // Text and FIM completions.
    ("A-1401", &["completions::sixteen_tokens_unless_told_otherwise", "completions::a_prompt_may_be_token_ids", "completions::several_prompts_are_answered_one_after_the_other"]),
    ("A-1402", &["completions::a_gap_is_filled_in_even_before_an_empty_suffix", "settings::fill_in_the_middle_has_a_cap_of_its_own"]),
    ("A-1403", &["completions::a_stream_says_what_the_whole_answer_says"]),
    // Messages.
    ("A-1501", &["messages::keys_and_limits_answer_in_the_same_envelope"]),
    ("A-1502", &["protocol::anthropic::each_refusal_names_its_field", "messages::ignored_sampling_is_named"]),
    ("A-1503", &["protocol::anthropic::blocks_become_messages_and_one_role_speaks_once", "messages::a_last_assistant_message_is_continued", "protocol::anthropic::an_answer_without_a_word_comes_back"]),
    ("A-1504", &["messages::a_request_that_says_nothing_thinks_unless_the_server_is_told_otherwise", "messages::thinking_is_signed_and_may_be_left_out"]),
    ("A-1505", &["messages::at_most_one_call_if_asked_for", "protocol::anthropic::tools_and_effort_are_those_of_the_chat_surface"]),
    ("A-1506", &["messages::a_stream_says_what_the_whole_answer_says"]),
    ("A-1507", &["messages::a_stream_says_what_the_whole_answer_says", "messages::a_full_context_has_a_reason_of_its_own"]),
    ("A-1508", &["messages::a_count_is_what_the_request_is_charged_and_what_chat_counts"]),
    ("A-1509", &["messages::a_stream_of_thinking_text_and_calls_byte_by_byte", "messages::silence_is_filled_with_pings", "messages::a_stream_that_fails_ends_with_an_error_event"]),
    ("A-1510", &["messages::a_count_is_what_the_request_is_charged_and_what_chat_counts"]),
    ("A-1511", &["protocol::responses::each_status_has_the_types_of_both_surfaces", "messages::a_full_queue_is_529"]),
    // Responses, utilities, operations.
    ("A-1601", &["responses::a_stream_of_thinking_text_and_calls_byte_by_byte", "responses::an_agent_goes_on_with_its_reasoning_calls_and_results", "responses::each_bad_request_names_its_field", "responses::usage_counts_what_chat_counts"]),
    ("A-1610", &["tokenize::text_and_tokens_are_turned_into_each_other", "tokenize::a_conversation_counts_what_chat_would_charge", "tokenize::control_tokens_are_read_only_if_asked_for"]),
    ("A-1620", &["operations::a_failed_model_fails_health", "operations::a_step_that_takes_too_long_fails_health_until_it_ends", "bad_requests::a_model_that_is_not_there_yet"]),
    ("A-1630", &["operations::every_metric_of_the_contract_is_there_and_typed", "operations::metrics_count_requests_and_tokens_under_bounded_labels"]),
    ("A-1640", &["logs::a_request_is_one_line_of_numbers_and_none_of_its_text"]),
    // Errors.
    ("A-1701", &["messages::errors_name_the_fields_that_were_sent", "responses::errors_name_the_fields_that_were_sent", "protocol::responses::both_envelopes_hold_all_their_keys", "protocol::bad_requests::messages_quote_at_most_64_characters_of_the_request"]),
    ("A-1702", &["rows::every_row_about_messages"]),
    ("A-1703", &["protocol::responses::each_status_has_the_types_of_both_surfaces"]),
    ("A-1704", &["bad_requests::fields", "rows::every_row_about_tools_formats_and_thinking"]),
    ("A-1705", &["keys::tokens_are_limited_per_minute_and_in_all"]),
    ("A-1706", &["bad_requests::a_request_whose_numbers_break_gets_a_generic_error"]),
    ("A-1901", &["rows::every_row_about_messages", "rows::every_row_about_sampling", "protocol::bodies::no_value_of_any_field_makes_the_reader_panic"]),
    ("A-1902", &["types::every_kind_of_chat_answer_is_read", "types::every_chunk_of_a_chat_stream_is_read", "types::responses_and_their_events_are_read"]),
    // Bad requests.
    ("E01-E06", &["bad_requests::bodies_that_are_not_a_json_object"]),
    ("E07", &["bad_requests::media_types_and_encodings"]),
    ("E08", &["bad_requests::bodies_over_the_limit"]),
    ("E09-E10", &["bad_requests::methods_and_paths"]),
    ("E11-E12", &["bad_requests::keys"]),
    ("E13-E26c, E28, E34", &["rows::every_row_about_messages"]),
    ("E27", &["rows::a_trailing_assistant_message_where_it_is_refused"]),
    ("E29-E33, E35-E52, E73-E75", &["rows::every_row_about_sampling"]),
    ("E53-E72", &["rows::every_row_about_tools_formats_and_thinking"]),
    ("E76-E78", &["completions::each_bad_request_names_its_field"]),
    ("E79", &["tokenize::each_bad_request_names_its_field"]),
    ("E80", &["bad_requests::keys"]),
    ("E81", &["bad_requests::a_full_queue"]),
    ("E82", &["bad_requests::a_model_that_is_not_there_yet"]),
    ("M01-M10", &["messages::each_bad_request_gets_its_status_and_type"]),
    ("M11-M12", &["messages::keys_and_limits_answer_in_the_same_envelope"]),
    // The program around it.
    ("types", &["answers::a_plain_answer_has_the_fields_of_the_contract", "responses::a_plain_answer_has_the_fields_of_the_contract"]),
    ("configuration", &["cli::command_line::the_help_of_serve_lists_every_setting", "cli::example::the_example_in_the_repository_is_what_the_program_prints"]),
    ("traces", &["traces::a_request_becomes_a_span_with_its_phases_and_no_text"]),
    ("openapi", &["openapi::every_field_that_is_read_is_described"]),
];

/// Rust files below a directory.
fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_test_that_the_table_names_exists() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for (id, tests) in TABLE {
        assert!(!tests.is_empty(), "{id} names no test");
        for test in *tests {
            let mut parts: Vec<&str> = test.split("::").collect();
            let name = parts.pop().unwrap();
            let module = parts.pop().unwrap();
            let owner = parts.pop().unwrap_or("server");
            let mut candidates = Vec::new();
            files(&crates.join(owner).join("tests"), &mut candidates);
            files(&crates.join(owner).join("src"), &mut candidates);
            let declares = format!("fn {name}(");
            let is_there = candidates.iter().any(|path| {
                let stem = path.file_stem().unwrap();
                let is_module = stem == module
                    || (stem == "mod" && path.parent().unwrap().file_name().unwrap() == module);
                is_module && std::fs::read_to_string(path).unwrap().contains(&declares)
            });
            assert!(is_there, "{id}: there is no {test}");
        }
    }
}
