//! The fixed texts of a V4 prompt: model data, byte for byte what the model was trained on.
//!
//! A test compares every constant with the release's own strings.

/// Between sections, content parts and the blocks of a user turn.
pub const SECTION_SEPARATOR: &str = "\n\n";

/// Introduces the tools; `{tool_schemas}` stands for their JSON, one per line. Control tokens in
/// it (`｜DSML｜`, `<think>`, `</think>`) are control tokens in the prompt too.
pub const TOOLS_TEMPLATE: &str = r#"## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{tool_schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"#;

/// Between two tool schemas.
pub const TOOL_SCHEMA_SEPARATOR: &str = "\n";

/// States a schema for the answer; `{schema}` stands for its JSON.
pub const RESPONSE_FORMAT_TEMPLATE: &str =
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n{schema}";

/// Asks for some JSON object.
pub const RESPONSE_FORMAT_JSON_OBJECT: &str = "You are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY.";

/// Around the content of a tool result.
pub const TOOL_RESULT_OPEN: &str = "<tool_result>";
/// Ends a tool result.
pub const TOOL_RESULT_CLOSE: &str = "</tool_result>";

/// What stands for a content part that is no text; `{type}` stands for its type.
pub const UNSUPPORTED_BLOCK: &str = "[Unsupported {type}]";

/// Before a tool-call block.
pub const TOOL_CALLS_BLOCK_PREFIX: &str = "\n\n";
/// Opens a tool-call block.
pub const TOOL_CALLS_OPEN: &str = "<｜DSML｜tool_calls>\n";
/// Closes a tool-call block.
pub const TOOL_CALLS_CLOSE: &str = "\n</｜DSML｜tool_calls>";
/// Opens a call, up to its name.
pub const INVOKE_OPEN: &str = "<｜DSML｜invoke name=\"";
/// Between a call's name and its parameters.
pub const INVOKE_NAME_END: &str = "\">\n";
/// Closes a call.
pub const INVOKE_CLOSE: &str = "\n</｜DSML｜invoke>";
/// Between two calls, and between two parameters.
pub const CALL_SEPARATOR: &str = "\n";
/// Opens a parameter, up to its name.
pub const PARAMETER_OPEN: &str = "<｜DSML｜parameter name=\"";
/// Between a parameter's name and its kind.
pub const PARAMETER_NAME_END: &str = "\" string=\"";
/// Between a parameter's kind and its value.
pub const PARAMETER_KIND_END: &str = "\">";
/// Closes a parameter.
pub const PARAMETER_CLOSE: &str = "</｜DSML｜parameter>";

/// Effort prompt: `max` of the preview, `high` of 0731.
pub const EFFORT_ABSOLUTE_MAXIMUM: &str = "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\nExplicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n";

/// Effort prompt: `max` of 0731.
pub const EFFORT_BEYOND_MAXIMUM: &str = "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\nYou MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface symptom.\nDo not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n";
