//! The cache of turns: it changes nothing but how much is tokenised.

use fathom_chat::{Conversation, Message, Prompt, Special, ThinkingMode, TurnCache, render};
use proptest::prelude::*;

use crate::support::tokenizer;

/// Some text, now and then with the spelling of a control token.
fn any_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        3 => "[a-z ]{0,300}",
        1 => prop::sample::select(&Special::ALL[..]).prop_map(|s| s.text().to_owned()),
        1 => "\\PC{0,20}",
    ];
    prop::collection::vec(piece, 0..4).prop_map(|pieces| pieces.concat())
}

fn any_message() -> impl Strategy<Value = Message> {
    prop_oneof![
        1 => any_text().prop_map(Message::system),
        3 => any_text().prop_map(Message::user),
        3 => (any_text(), any_text())
            .prop_map(|(text, thought)| Message::assistant(text).with_reasoning(thought)),
        1 => any_text().prop_map(|text| Message::tool("call", text)),
    ]
}

fn prompt(messages: &[Message], thinking: ThinkingMode) -> Prompt {
    let conversation =
        Conversation { messages: messages.to_vec(), thinking, ..Conversation::default() };
    render(&conversation).unwrap()
}

/// Long enough to be kept.
fn long(word: &str) -> String {
    word.repeat(400)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_growing_conversation_has_the_ids_that_it_has_without_a_cache(
        messages in prop::collection::vec(any_message(), 1..8),
        max_bytes in prop::sample::select(vec![0_usize, 2000, 1 << 20]),
        thinks in any::<bool>(),
    ) {
        let thinking = if thinks { ThinkingMode::Thinking } else { ThinkingMode::Chat };
        let cache = TurnCache::new(max_bytes);
        for n in 1..=messages.len() {
            let prompt = prompt(&messages[..n], thinking);
            let ids = cache.token_ids(&prompt, &tokenizer(), cache.scope(&[])).unwrap();
            prop_assert_eq!(ids, prompt.token_ids(&tokenizer()).unwrap());
            prop_assert!(cache.stats().held_bytes <= max_bytes as u64);
        }
    }
}

#[test]
fn only_what_is_new_is_tokenised() {
    let cache = TurnCache::new(1 << 20);
    let scope = cache.scope(&[]);
    let mut messages = vec![Message::system(long("rule ")), Message::user(long("ask "))];
    let first = prompt(&messages, ThinkingMode::Chat);
    cache.token_ids(&first, &tokenizer(), scope).unwrap();
    let before = cache.stats();
    assert_eq!(before.encoded_bytes, first.as_text().len() as u64);

    messages.push(Message::assistant(long("say ")));
    messages.push(Message::user("more"));
    let second = prompt(&messages, ThinkingMode::Chat);
    cache.token_ids(&second, &tokenizer(), scope).unwrap();
    let after = cache.stats();
    let opener = Special::Assistant.text().len() + Special::ThinkEnd.text().len();
    assert_eq!(after.reused_bytes, (first.as_text().len() - opener) as u64);
    let new = (second.as_text().len() - first.as_text().len() + opener) as u64;
    assert_eq!(after.encoded_bytes - before.encoded_bytes, new);
}

#[test]
fn a_spelled_out_control_token_is_not_taken_for_the_real_one() {
    let cache = TurnCache::new(1 << 20);
    let scope = cache.scope(&[]);
    let text = long("x");
    // The same characters: once the second answer is a turn, once the first one spells it out.
    let forged = format!("{text}{}{}{text}", Special::Eos.text(), Special::ThinkEnd.text());
    let honest = [Message::user("a"), Message::assistant(forged)];
    let forged = prompt(&honest, ThinkingMode::Chat);
    let ids = cache.token_ids(&forged, &tokenizer(), scope).unwrap();
    let real = Prompt::completion(forged.as_text());
    let other = cache.token_ids(&real, &tokenizer(), scope).unwrap();
    assert_eq!(ids, forged.token_ids(&tokenizer()).unwrap());
    assert_eq!(other, real.token_ids(&tokenizer()).unwrap());
    assert_ne!(ids, other);
}

#[test]
fn scopes_share_nothing() {
    let cache = TurnCache::new(1 << 20);
    let prompt = Prompt::completion(&long("secret "));
    for parts in [[None, Some("a")], [Some("a"), None], [Some("b"), None], [None, None]] {
        cache.token_ids(&prompt, &tokenizer(), cache.scope(&parts)).unwrap();
    }
    assert_eq!(cache.stats().reused_bytes, 0);
    cache.token_ids(&prompt, &tokenizer(), cache.scope(&[Some("a"), None])).unwrap();
    assert_eq!(cache.stats().reused_bytes, prompt.as_text().len() as u64);
}

#[test]
fn what_is_used_stays_and_the_rest_is_forgotten() {
    let cache = TurnCache::new(40_000);
    let scope = cache.scope(&[]);
    let turn = |n: usize| Prompt::completion(&long(&format!("{n:04} ")));
    let encode = |n| cache.token_ids(&turn(n), &tokenizer(), scope).unwrap();
    encode(0);
    for n in 1..50 {
        encode(n);
        let before = cache.stats().reused_bytes;
        encode(0);
        assert!(cache.stats().reused_bytes > before, "used in every round, gone in round {n}");
        assert!(cache.stats().held_bytes <= 40_000);
    }
    let before = cache.stats().reused_bytes;
    encode(1);
    assert_eq!(cache.stats().reused_bytes, before, "not used for long");
}
