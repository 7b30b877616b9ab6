//! Conversations that clients send back as JSON: found in the prefix cache as they were generated.
//!
//! The model here spells much of what it says letter by letter, so that no answer encodes to the
//! tokens that were sampled.

use std::sync::LazyLock;

use fathom_chat::Special;
use fathom_core::TokenId;
use fathom_engine::scripted::Reply;
use serde_json::{Value, json};

use crate::rig::{Options, Rig, tokenizer};

const N_TURNS: usize = 100;

fn special(which: Special) -> TokenId {
    tokenizer().special().get(which).unwrap()
}

/// What the model says in turn `turn`, in as many tokens as it takes.
fn spelt(turn: usize) -> Vec<TokenId> {
    let text = format!(
        "I ask.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"get\">\n\
         <｜DSML｜parameter name=\"n\" string=\"false\">[{turn},2]</｜DSML｜parameter>\n\
         </｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    );
    let letters = |(n, id): (usize, TokenId)| match tokenizer().special().of(id) {
        Some(_) => vec![id],
        None if n % 3 > 0 => vec![id],
        None => {
            let text = tokenizer().decode(&[id]);
            text.chars().flat_map(|c| tokenizer().encode_plain(&c.to_string()).unwrap()).collect()
        }
    };
    let ids = tokenizer().encode_with_special(&text).unwrap();
    let mut ids: Vec<TokenId> = ids.into_iter().enumerate().flat_map(letters).collect();
    ids.push(special(Special::Eos));
    ids
}

/// Thinks for a token, then says what the turn's number makes it say.
fn script(tokens: &[TokenId]) -> Reply {
    static ANSWERS: LazyLock<Vec<Vec<TokenId>>> =
        LazyLock::new(|| (0..=N_TURNS).map(spelt).collect());
    // Once, not for each token.
    let opener = special(Special::Assistant);
    let openers = tokens.iter().enumerate().filter(|(_, token)| **token == opener);
    let (turn, (opened, _)) = openers.enumerate().last().unwrap();
    let said = &tokens[opened + 2..];
    let thinks = tokens[opened + 1] == special(Special::ThinkStart);
    Reply::Token(match said.len() {
        0 if thinks => tokenizer().encode_plain("h").unwrap()[0],
        1 if thinks => special(Special::ThinkEnd),
        n => ANSWERS[turn][n - if thinks { 2 } else { 0 }],
    })
}

fn options() -> Options {
    Options { script, max_model_len: 16_384, ..Options::default() }
}

/// A conversation as a client keeps it.
#[derive(Clone)]
struct Client {
    messages: Vec<Value>,
    /// Fields beside the messages.
    fields: Value,
}

/// What a turn used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Used {
    prompt: u64,
    cached: u64,
    completion: u64,
}

impl Client {
    fn new(fields: Value) -> Self {
        Self { messages: vec![json!({"role": "user", "content": "Begin."})], fields }
    }

    fn body(&self) -> Value {
        let function = json!({"name": "get", "parameters": {"type": "object",
            "properties": {"n": {"type": "array"}}}});
        let mut body = json!({
            "model": "deepseek-v4-flash",
            "messages": self.messages,
            "tools": [{"type": "function", "function": function}],
        });
        body.as_object_mut().unwrap().extend(self.fields.as_object().unwrap().clone());
        body
    }

    /// Asks, and keeps the answer and the result of its call.
    fn turn(&mut self, rig: &Rig) -> Used {
        let response = rig.chat(&self.body());
        assert_eq!(response.status, 200, "{}", response.body);
        let json = response.json();
        let message = &json["choices"][0]["message"];
        let call = message["tool_calls"][0]["id"].clone();
        assert!(call.is_string(), "{json}");
        self.messages.push(message.clone());
        self.messages.push(json!({"role": "tool", "tool_call_id": call, "content": "1"}));
        let usage = &json["usage"];
        Used {
            prompt: usage["prompt_tokens"].as_u64().unwrap(),
            cached: usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(),
            completion: usage["completion_tokens"].as_u64().unwrap(),
        }
    }
}

/// Full blocks of what has been computed: the last sampled token is not.
fn computed(used: Used) -> u64 {
    (used.prompt + used.completion - 1) / 256 * 256
}

#[test]
fn every_turn_of_a_long_tool_conversation_resumes_at_the_last_block_also_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let start = || Rig::with(Options { cache_dir: Some(directory.path().to_owned()), ..options() });
    let mut rig = start();
    let mut client = Client::new(json!({}));
    let mut before = client.turn(&rig);
    assert_eq!(before.cached, 0);
    for turn in 1..N_TURNS {
        if turn == N_TURNS / 2 {
            drop(rig);
            rig = start();
        }
        let used = client.turn(&rig);
        assert_eq!(used.cached, computed(before), "turn {turn}: {used:?} after {before:?}");
        assert!(used.prompt > before.prompt + before.completion);
        before = used;
    }
    assert!(before.cached > 10 * 256, "{before:?}");
}

#[test]
fn an_answer_is_nobody_elses_and_a_changed_one_is_encoded_as_it_was_sent() {
    let rig = Rig::with(options());
    let mut client = Client::new(json!({"user_id": "a", "cache_salt": "x"}));
    client.turn(&rig);
    let cost = |client: &Client| {
        let body = client.body();
        rig.post("/tokenize", &body).json()["count"].as_u64().unwrap()
    };
    let own = cost(&client);
    assert_eq!(client.clone().turn(&rig).prompt, own);

    // Encoded, the same words take fewer tokens than letter by letter.
    let mut others = Vec::new();
    for fields in [json!({"user_id": "b", "cache_salt": "x"}), json!({"user_id": "a"}), json!({})] {
        others.push(cost(&Client { fields, ..client.clone() }));
    }
    assert!(others[0] < own && others.iter().all(|&other| other == others[0]), "{others:?} {own}");
    let mut changed = client.clone();
    changed.messages[1]["content"] = "I ask!".into();
    assert!(cost(&changed) < own);
    // An earlier message that changed makes it another conversation.
    let mut changed = client.clone();
    changed.messages[0]["content"] = "Begin!".into();
    assert!(cost(&changed) < own);
}

#[test]
fn reasoning_that_is_left_out_stays_out() {
    let rig = Rig::start();
    let ask = |messages: Value| {
        let body = json!({"model": "deepseek-v4-flash", "messages": messages});
        let response = rig.chat(&body);
        assert_eq!(response.status, 200, "{}", response.body);
        response.json()
    };
    let user = json!({"role": "user", "content": "Hm.</think>Yes."});
    let answer = ask(json!([user]));
    let message = &answer["choices"][0]["message"];
    assert_eq!(message["reasoning_content"], "Hm.");
    // Without tools the reasoning of earlier turns is not part of the prompt, sent back or not.
    let stripped = json!({"role": "assistant", "content": "Yes."});
    let tokens = |message: &Value| {
        ask(json!([user, message, user]))["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    assert_eq!(tokens(message), tokens(&stripped));
}

#[test]
fn a_server_that_remembers_no_answers_encodes_them() {
    let second_prompt = |remember_answers_mb| {
        let mut options = options();
        options.config.cache.remember_answers_mb = remember_answers_mb;
        let rig = Rig::with(options);
        let mut client = Client::new(json!({}));
        client.turn(&rig);
        client.turn(&rig).prompt
    };
    // What was said letter by letter encodes to fewer tokens.
    assert!(second_prompt(0) < second_prompt(64));
}
