//! Constrained answers: whatever a model says under a grammar is what was asked for.

use fathom_chat::grammar::{
    AnswerConstraint, AnswerRules, Calls, Enforcement, Fault, Format, GrammarSpec, Part, Start,
};
use fathom_chat::{AnswerEnd, Opening};
use fathom_core::TokenConstraint;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::grammar_walk::{
    Dice, allowed, call_rules, compile, forced, functions, json_schema, rules, spelled, text, walk,
};
use crate::support::tokenizer;

fn is_valid(schema: &Value, value: &Value) -> bool {
    let options = jsonschema::options().should_validate_formats(true);
    options.build(schema).unwrap().is_valid(value)
}

/// A schema of strings, numbers and so on, with the keywords of strict mode.
fn schema(dice: &mut Dice, depth: usize) -> Value {
    let kinds = if depth == 0 { 12 } else { 16 };
    match dice.below(kinds) {
        0 => json!({"type": "string"}),
        1 => json!({"type": "string", "minLength": dice.below(4), "maxLength": 4 + dice.below(4)}),
        2 => {
            let pattern = ["^[a-c]{1,3}$", "x", "^a|b$"][dice.below(3)];
            json!({"type": "string", "pattern": pattern})
        }
        3 => {
            let formats =
                ["email", "hostname", "ipv4", "ipv6", "uuid", "date", "date-time", "time"];
            let format = formats[dice.below(8)];
            json!({"type": "string", "format": format})
        }
        4 => json!({"type": "integer", "minimum": -5, "maximum": 300}),
        5 => json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}),
        6 => json!({"type": "integer", "multipleOf": 3}),
        7 => json!({"type": ["boolean", "null"]}),
        8 => json!({"enum": ["red", "</", 3, null, "a \"b\""]}),
        9 => json!({"const": "only\nthis"}),
        10 => json!({"type": ["string", "null"], "maxLength": 3}),
        11 => json!({"anyOf": [{"type": "integer"}, {"type": "string"}], "description": "either"}),
        12 | 13 => {
            let items = schema(dice, depth - 1);
            json!({"type": "array", "items": items, "minItems": 1, "maxItems": 3})
        }
        _ => object(dice, depth - 1),
    }
}

/// A closed object, some of whose properties are required.
fn object(dice: &mut Dice, depth: usize) -> Value {
    let mut properties = serde_json::Map::new();
    let mut required = Vec::new();
    for key in ["path", "n", "größe", "a b", "opts"].into_iter().take(dice.below(5)) {
        properties.insert(key.to_owned(), schema(dice, depth));
        if dice.below(2) == 0 {
            required.push(key);
        }
    }
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn json_under_a_schema_is_valid_or_cut_by_length(seed: u64) {
        let schema = object(&mut Dice::new(seed), 2);
        let grammar = compile(&json_schema(&schema)).unwrap();
        let walk = walk(rules(Some(grammar)), None, seed, 400, &[]);
        if walk.ended {
            prop_assert_eq!(walk.summary.end, AnswerEnd::Stop);
            let value: Value = serde_json::from_str(&walk.message.content).unwrap();
            prop_assert!(is_valid(&schema, &value), "{value} is not valid for {schema}");
        } else {
            prop_assert_eq!(walk.summary.end, AnswerEnd::Length);
            prop_assert_eq!(walk.message.content.chars().next(), Some('\u{7b}'));
        }
    }

    #[test]
    fn arguments_of_calls_are_valid_after_the_parser_put_them_together(seed: u64, single: bool) {
        let dice = &mut Dice::new(seed);
        let tools = [("read_file", object(dice, 2)), ("f", object(dice, 1)), ("g", object(dice, 0))];
        let grammar = compile(&forced(&tools, single)).unwrap();
        let functions = functions(&tools);
        let walk = walk(rules(Some(grammar)), Some(&functions), seed, 400, &[]);
        prop_assert_eq!(&walk.message.content, "");
        for call in &walk.message.tool_calls {
            let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
            let tool = tools.iter().find(|(name, _)| *name == call.name);
            let (_, schema) = tool.unwrap();
            prop_assert!(
                is_valid(schema, &arguments),
                "{arguments} is not valid for {schema}, from {:?}", walk.text()
            );
        }
        if walk.ended {
            prop_assert_eq!(walk.summary.end, AnswerEnd::ToolCalls);
            prop_assert!(!walk.message.tool_calls.is_empty());
        }
        if single {
            prop_assert!(walk.message.tool_calls.len() <= 1);
        }
    }
}

#[test]
fn some_json_object_is_an_object_and_white_space_is_bounded() {
    let grammar = compile(&text(Format::JsonObject)).unwrap();
    for seed in 0..20 {
        let walk = walk(rules(Some(grammar.clone())), None, seed, 300, &[]);
        if walk.ended {
            let value: Value = serde_json::from_str(&walk.message.content).unwrap();
            assert!(value.is_object());
        }
    }
    // After one line break with its indent there must be something else.
    let tokenizer = tokenizer();
    let mut constraint = AnswerConstraint::new(rules(Some(grammar)), &tokenizer).unwrap();
    for id in spelled("{\n  ") {
        constraint.commit(id).unwrap();
    }
    for _ in 0..40 {
        let space = spelled(" ")[0];
        if !allowed(Some(&mut constraint), &tokenizer).contains(&space) {
            return;
        }
        constraint.commit(space).unwrap();
    }
    panic!("white space has no end");
}

#[test]
fn an_answer_under_a_grammar_never_ends_before_it_says_something() {
    let tokenizer = tokenizer();
    let eos = tokenizer.special().eos();
    let grammar = compile(&text(Format::JsonObject)).unwrap();
    let mut constraint = AnswerConstraint::new(
        AnswerRules { opening: Opening::Reasoning, ..rules(Some(grammar)) },
        &tokenizer,
    )
    .unwrap();
    assert!(!allowed(Some(&mut constraint), &tokenizer).contains(&eos));
    constraint.commit(tokenizer.special().think_end()).unwrap();
    let first = allowed(Some(&mut constraint), &tokenizer);
    assert!(first.iter().all(|&id| tokenizer.token_bytes(id).unwrap().starts_with(b"{")));
}

#[test]
fn reasoning_is_free_and_its_end_is_forced_when_the_budget_is_spent() {
    let tokenizer = tokenizer();
    let think_end = tokenizer.special().think_end();
    let budget = AnswerRules {
        opening: Opening::Reasoning,
        reasoning_budget: Some(2),
        ..rules(Some(compile(&text(Format::JsonObject)).unwrap()))
    };
    let mut constraint = AnswerConstraint::new(budget, &tokenizer).unwrap();
    for id in spelled("ab") {
        assert!(allowed(Some(&mut constraint), &tokenizer).len() > 100);
        constraint.commit(id).unwrap();
    }
    let n = spelled("ab").len();
    if n < 2 {
        constraint.commit(spelled("c")[0]).unwrap();
    }
    assert_eq!(allowed(Some(&mut constraint), &tokenizer), [think_end]);
}

#[test]
fn white_space_and_unseen_calls_are_no_answer_where_one_is_required() {
    let tokenizer = tokenizer();
    let (eos, marker) = (tokenizer.special().eos(), tokenizer.special().dsml());
    let must_answer = || AnswerRules { must_answer: true, ..rules(None) };
    let mut constraint = AnswerConstraint::new(must_answer(), &tokenizer).unwrap();
    // The ideographic space may be several tokens, none of which is white space by itself.
    for id in spelled(" \n\n\u{3000}\t") {
        assert!(!allowed(Some(&mut constraint), &tokenizer).contains(&eos));
        constraint.commit(id).unwrap();
    }
    let before = allowed(Some(&mut constraint), &tokenizer);
    // Without tools, calls are dropped.
    assert!(!before.contains(&eos) && !before.contains(&marker));
    constraint.commit(spelled("a")[0]).unwrap();
    assert!(allowed(Some(&mut constraint), &tokenizer).contains(&eos));
}

#[test]
fn a_choice_an_expression_and_a_language_are_kept_to() {
    let tokenizer = tokenizer();
    let say =
        |format, seed| walk(rules(Some(compile(&text(format)).unwrap())), None, seed, 80, &[]);
    for seed in 0..8 {
        let choice = Format::Choice(vec!["yes".into(), "no".into(), "\"quoted\"".into()]);
        let walk = say(choice, seed);
        assert!(walk.ended);
        assert!(["yes", "no", "\"quoted\""].contains(&walk.message.content.as_str()));

        let walk = say(Format::Regex(r"[0-9]{3}-[a-f/]{2}".into()), seed);
        assert!(walk.ended && walk.message.content.len() == 6, "{}", walk.text());

        let lark = "start: \"(\" inner \")\"\ninner: \"x\" | \"(\" inner \")\"";
        let walk = say(Format::Grammar(lark.into()), seed);
        let content = &walk.message.content;
        assert!(!walk.ended || content.matches('(').count() == content.matches(')').count());
    }
    assert!(tokenizer.vocab_size() > 256);
}

#[test]
fn a_text_may_come_before_a_block_and_the_block_follows_the_schema() {
    let schema = json!({
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    });
    let tools = [("weather", schema)];
    let spec =
        GrammarSpec { format: None, calls: Some(call_rules(&tools, false)), start: Start::Marker };
    let auto = AnswerRules { calls: Calls::Constrained(compile(&spec).unwrap()), ..rules(None) };
    let block = "Let me see.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"weather\">\n\
        <｜DSML｜parameter name=\"days\" string=\"false\">3</｜DSML｜parameter>\n\
        <｜DSML｜parameter name=\"city\" string=\"true\">a \"b\" </x> 2>&1\n</｜DSML｜parameter>\n\
        </｜DSML｜invoke>\n</｜DSML｜tool_calls>";
    let script = spelled(block);
    let functions = functions(&tools);
    let walk = walk(auto, Some(&functions), 1, script.len() + 1, &script);
    assert!(walk.ended, "{}", walk.text());
    assert_eq!(walk.message.content, "Let me see.");
    let call = &walk.message.tool_calls[0];
    assert_eq!(call.arguments, "{\"days\": 3, \"city\": \"a \\\"b\\\" </x> 2>&1\\n\"}");
}

#[test]
fn the_marker_comes_only_where_a_tag_can_begin_and_never_where_calls_are_forbidden() {
    let tokenizer = tokenizer();
    let dsml = tokenizer.special().dsml();
    let spec = GrammarSpec {
        format: None,
        calls: Some(call_rules(&[("f", json!({"type": "object"}))], false)),
        start: Start::Marker,
    };
    for (calls, after_angle) in
        [(Calls::Constrained(compile(&spec).unwrap()), true), (Calls::Forbidden, false)]
    {
        let with = AnswerRules { calls, ..rules(None) };
        let mut constraint = AnswerConstraint::new(with, &tokenizer).unwrap();
        for (text, expected) in [("a", false), ("<", after_angle), ("/", false)] {
            for id in spelled(text) {
                constraint.commit(id).unwrap();
            }
            let next = allowed(Some(&mut constraint), &tokenizer);
            assert_eq!(next.contains(&dsml), expected, "after {text:?}");
        }
    }
}

#[test]
fn an_answer_is_json_or_a_block_where_both_are_asked_for() {
    let tools = [("f", json!({"type": "object", "properties": {"n": {"type": "integer"}}}))];
    let functions = functions(&tools);
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"], "additionalProperties": false});
    let spec = GrammarSpec { calls: Some(call_rules(&tools, false)), ..json_schema(&schema) };
    let grammar = compile(&spec).unwrap();
    let mut seen = [false; 2];
    for (seed, begin) in [(0, "\n\n<"), (1, "{"), (2, "")] {
        let script = spelled(begin);
        let walk = walk(rules(Some(grammar.clone())), Some(&functions), seed, 300, &script);
        if !walk.ended {
            continue;
        }
        let is_call = walk.summary.end == AnswerEnd::ToolCalls;
        seen[usize::from(is_call)] = true;
        if !is_call {
            let value: Value = serde_json::from_str(&walk.message.content).unwrap();
            assert!(is_valid(&schema, &value));
        }
    }
    assert_eq!(seen, [true; 2]);
}

#[test]
fn a_block_that_the_prompt_opened_goes_on_with_a_call() {
    let tools = [("f", json!({"type": "object", "additionalProperties": false}))];
    let spec = GrammarSpec { start: Start::ToolBlock, ..forced(&tools, true) };
    let with = AnswerRules { opening: Opening::ToolBlock, ..rules(Some(compile(&spec).unwrap())) };
    let functions = functions(&tools);
    let walk = walk(with, Some(&functions), 3, 80, &[]);
    assert!(walk.ended, "{}", walk.text());
    assert_eq!(walk.message.tool_calls[0].arguments, "{}");
}

#[test]
fn references_lead_to_definitions_of_the_whole_schema() {
    let schema = json!({
        "type": "object",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"sub": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}},
                "required": ["sub"],
                "additionalProperties": false,
            },
            "name": {"type": "string", "enum": ["x", "y"]},
        },
        "properties": {"tree": {"$ref": "#/$defs/tree"}, "name": {"$ref": "#/$defs/name"}},
        "required": ["tree", "name"],
        "additionalProperties": false,
    });
    let tools = [("f", schema.clone())];
    let functions = functions(&tools);
    let grammar = compile(&forced(&tools, true)).unwrap();
    let mut n_ended = 0;
    for seed in 0..10 {
        let walk = walk(rules(Some(grammar.clone())), Some(&functions), seed, 300, &[]);
        for call in &walk.message.tool_calls {
            let value: Value = serde_json::from_str(&call.arguments).unwrap();
            assert!(is_valid(&schema, &value));
            n_ended += 1;
        }
    }
    assert!(n_ended > 5);
}

/// Parameters of tools as people write them, not only as strict mode wants them.
fn shapes() -> Vec<Value> {
    let many: serde_json::Map<String, Value> =
        (0..70).map(|i| (format!("p{i}"), json!({"type": "boolean"}))).collect();
    let two = |a: &str, b: &str| {
        json!({"type": "object", "properties": {a: {"type": "integer"}, b: {"type": "boolean"}},
            "required": [a, b], "additionalProperties": false})
    };
    vec![
        json!({"type": "object"}),
        json!({"type": "object", "properties": {}, "additionalProperties": false}),
        json!({"type": "object", "additionalProperties": {"type": "integer"}}),
        json!({"type": "object", "properties": {"a": {"type": "null"}, "ab": {"type": "null"}},
            "additionalProperties": {"enum": ["x", 1]}, "required": ["ab"]}),
        json!({"type": "object", "properties": many, "required": ["p69"]}),
        json!({"anyOf": [two("a", "b"), two("c", "d")]}),
        json!({"$ref": "#/$defs/args", "$defs": {"args": two("a", "b")}}),
        json!({"type": "object", "required": ["undeclared"]}),
        json!({"type": "object", "properties": {"a\"b": {}, "ok": {"type": "null"}}}),
        json!({"type": "object", "properties": {"arguments": {"type": "string", "maxLength": 2},
            "input": {"type": "array", "items": {"type": "null"}, "maxItems": 1}}}),
        json!({"type": "object", "properties": {
            "p": {"type": "string", "pattern": "^a/b\\.[0-9]$|^\\w\\s$"},
            "q": {"type": "string", "pattern": "^x", "maxLength": 3},
            "r": {"allOf": [{"enum": ["yes", "no"]}], "default": "no"},
            "s": {"type": ["string", "integer"], "enum": ["1", 1]},
            "t": false}, "required": ["p", "q", "r", "s"]}),
        json!({"type": "object", "properties": {"u": {"oneOf": [{"type": "string", "maxLength": 1},
            {"type": "null"}]}}, "required": ["u"]}),
        json!({"type": "object", "properties": {"w": {"type": "object", "patternProperties":
            {"^x[0-9]$": {"type": "integer"}}, "additionalProperties": false}},
            "patternProperties": {"^y": {"type": "null"}}, "required": ["w"]}),
    ]
}

#[test]
fn schemas_of_every_shape_are_followed() {
    for schema in shapes() {
        let tools = [("f", schema.clone())];
        let functions = functions(&tools);
        let grammar = match compile(&forced(&tools, true)) {
            Ok(grammar) => grammar,
            Err(error) => panic!("{schema}: {error}"),
        };
        let mut n_calls = 0;
        for seed in 0..4 {
            let walk = walk(rules(Some(grammar.clone())), Some(&functions), seed, 400, &[]);
            for call in &walk.message.tool_calls {
                let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
                assert!(is_valid(&schema, &arguments), "{arguments} for {schema}: {}", walk.text());
                n_calls += 1;
            }
        }
        // A walk among endless or very many parameters may take longer than it may.
        let is_endless =
            schema["additionalProperties"].is_object() || schema["properties"].is_null();
        let n_properties = schema["properties"].as_object().map_or(0, serde_json::Map::len);
        assert!(n_calls > 0 || is_endless || n_properties > 16, "no call ends for {schema}");
    }
}

#[test]
fn declared_parameters_come_in_any_order_and_each_once() {
    let flag = json!({"type": "boolean"});
    let schema = json!({"type": "object", "properties": {"a": flag, "b": flag, "c": flag},
        "required": ["a", "c"]});
    let tools = [("f", schema)];
    let grammar = compile(&forced(&tools, true)).unwrap();
    let given = |keys: &[&str]| {
        let tags: Vec<String> = keys
            .iter()
            .map(|key| {
                format!(
                    "<｜DSML｜parameter name=\"{key}\" string=\"false\">true</｜DSML｜parameter>"
                )
            })
            .collect();
        let text = format!(
            "\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n{}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
            tags.join("\n")
        );
        let tokenizer = tokenizer();
        let mut constraint =
            AnswerConstraint::new(rules(Some(grammar.clone())), &tokenizer).unwrap();
        spelled(&text).into_iter().all(|id| {
            allowed(Some(&mut constraint), &tokenizer).contains(&id)
                && constraint.commit(id).is_ok()
        })
    };
    assert!(given(&["a", "c"]) && given(&["c", "b", "a"]) && given(&["b", "c", "a"]));
    assert!(!given(&["a", "b"]) && !given(&["a", "c", "a"]) && !given(&["a", "c", "d"]));
    assert!(!given(&[]));
}

#[test]
fn strict_schemas_with_keywords_that_cannot_be_enforced_are_refused_by_tool() {
    let schema = json!({"type": "object", "properties": {"a": {"not": {"type": "null"}}}});
    let mut calls = call_rules(&[("ok", json!({"type": "object"})), ("bad", schema)], false);
    let mut spec = |enforcement| {
        calls.tools.iter_mut().for_each(|tool| tool.enforcement = enforcement);
        GrammarSpec { format: None, calls: Some(calls.clone()), start: Start::Answer }
    };
    let error = compile(&spec(Enforcement::Strict)).unwrap_err();
    assert_eq!((error.fault, error.part), (Fault::Unsupported, Part::Tool("bad".into())));
    assert!(compile(&spec(Enforcement::Lenient)).is_ok());
}

#[test]
fn a_pattern_that_cannot_be_enforced_is_an_error_in_strict_mode_only() {
    let schema = json!({"type": "object", "properties": {
        "v": {"type": "string", "pattern": "\\bx\\b"}}, "required": ["v"]});
    let spec = |strict| text(Format::JsonSchema { schema: schema.clone(), strict });
    assert_eq!(compile(&spec(true)).unwrap_err().fault, Fault::Unsupported);
    assert!(compile(&spec(false)).is_ok());
    assert!(compile(&forced(&[("f", schema.clone())], false)).is_ok());
}

#[test]
fn a_schema_that_cannot_be_used_is_given_up_only_where_that_is_allowed() {
    let schema = json!({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}});
    let mut calls = call_rules(&[("f", schema)], false);
    for (enforcement, works) in [(Enforcement::Lenient, false), (Enforcement::BestEffort, true)] {
        calls.tools[0].enforcement = enforcement;
        let spec = GrammarSpec { format: None, calls: Some(calls.clone()), start: Start::Answer };
        assert_eq!(compile(&spec).is_ok(), works, "{enforcement:?}");
    }
}

#[test]
fn what_is_malformed_or_too_complex_is_refused_and_nothing_breaks() {
    let fault = |format| compile(&text(format)).unwrap_err().fault;
    assert_eq!(fault(Format::Regex("(a".into())), Fault::Malformed);
    assert_eq!(fault(Format::Grammar("start: nowhere".into())), Fault::Malformed);
    assert_eq!(fault(Format::Grammar("(".repeat(60_000))), Fault::TooComplex);
    let chain: Vec<String> = (0..1900).map(|i| format!("r{i}: r{} \"x\"", i + 1)).collect();
    let chain = format!("start: r0\n{}\nr1900: \"y\"", chain.join("\n"));
    assert!(compile(&text(Format::Grammar(chain))).is_ok());
    let hops: serde_json::Map<String, Value> = (0..5000)
        .map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)})))
        .chain([("d5000".to_owned(), json!({"type": "null"}))])
        .collect();
    let hops = json!({"$defs": hops, "$ref": "#/$defs/d0"});
    // Whatever it is, it is an answer.
    let _ = compile(&json_schema(&hops));
    let deep = json!({"type": "string", "pattern": "(a{1,200}){1,200}(b{1,200}){1,200}"});
    let _ = compile(&json_schema(&deep));
    let unsatisfiable = json!({"type": "integer", "minimum": 3, "maximum": 2});
    assert_eq!(compile(&json_schema(&unsatisfiable)).unwrap_err().fault, Fault::Unsupported);
}

#[test]
fn control_tokens_are_never_part_of_a_text() {
    let tokenizer = tokenizer();
    let user = tokenizer.special().get(fathom_chat::Special::User).unwrap();
    let grammar = format!("start: (<[{user}]> | \"a\" | \"<｜User｜>\") \"b\"");
    let grammar = compile(&text(Format::Grammar(grammar))).unwrap();
    let mut constraint = AnswerConstraint::new(rules(Some(grammar)), &tokenizer).unwrap();
    let first = allowed(Some(&mut constraint), &tokenizer);
    assert!(first.contains(&spelled("a")[0]) && !first.contains(&user));
}

#[test]
fn a_grammar_serves_one_answer_after_another() {
    let grammar = compile(&forced(&[("f", json!({"type": "object"}))], false)).unwrap();
    let functions = functions(&[("f", json!({"type": "object"}))]);
    let first = walk(rules(Some(grammar.clone())), Some(&functions), 7, 200, &[]);
    for _ in 0..3 {
        let again = walk(rules(Some(grammar.clone())), Some(&functions), 7, 200, &[]);
        assert_eq!(again.ids, first.ids);
    }
}
