//! Tokenizer and detokeniser.

use fathom_chat::{Detokenizer, Special, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde_json::Value;

use crate::support::{nano_json, tokenizer};

/// Text with every kind of trouble: control-token spellings, long runs, broken-looking Unicode.
fn any_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z0-9 .,!?]{0,12}",
        2 => "\\PC{0,6}",
        1 => any::<char>().prop_map(String::from),
        1 => prop::sample::select(&Special::ALL[..]).prop_map(|s| s.text().to_owned()),
        1 => "[ \t\r\n]{0,6}",
        1 => "[一-龥ぁ-んァ-ヶ가-힣]{1,5}",
    ];
    prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

/// A tokenizer.json like nano's with one change.
fn changed(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, TokenizerError> {
    let mut json: Value = serde_json::from_slice(&nano_json()).unwrap();
    change(&mut json);
    Tokenizer::from_json(&serde_json::to_vec(&json).unwrap())
}

fn remove_added(json: &mut Value, text: &str) {
    json["added_tokens"].as_array_mut().unwrap().retain(|token| token["content"] != text);
}

#[test]
fn a_tokenizer_without_a_needed_control_token_is_refused_by_name() {
    for special in Special::ALL {
        let result = changed(|json| {
            remove_added(json, special.text());
            json["model"]["vocab"].as_object_mut().unwrap().remove(special.text());
        });
        match result {
            Ok(tokenizer) => {
                assert!(!special.is_required());
                assert_eq!(tokenizer.special().get(special), None);
            }
            Err(error) => {
                assert!(special.is_required());
                assert!(error.to_string().contains(special.text()), "{error}");
            }
        }
    }
}

#[test]
fn fill_in_the_middle_is_supported_only_with_all_three_tokens() {
    assert!(tokenizer().special().supports_fim());
    let without = changed(|json| remove_added(json, Special::FimHole.text())).unwrap();
    assert!(!without.special().supports_fim());
    let prompt = fathom_chat::Prompt::fill_in_the_middle("a", "b");
    assert!(prompt.token_ids(&tokenizer()).is_ok());
    assert!(matches!(
        prompt.token_ids(&without),
        Err(TokenizerError::MissingToken { token }) if token == Special::FimHole.text()
    ));
}

#[test]
fn a_file_that_is_no_byte_level_tokenizer_is_refused() {
    assert!(matches!(Tokenizer::from_json(b"{"), Err(TokenizerError::Malformed { .. })));
    assert!(matches!(
        changed(|json| json["decoder"] = Value::Null),
        Err(TokenizerError::Decoder { .. })
    ));
}

#[test]
fn token_bytes_are_defined_for_every_id_of_the_file_and_no_other() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.vocab_size(), 1024);
    assert_eq!(tokenizer.token_bytes(tokenizer.special().dsml()), Some("｜DSML｜".as_bytes()));
    assert!((0..1024).all(|id| tokenizer.token_bytes(id).is_some_and(|bytes| !bytes.is_empty())));
    assert_eq!(tokenizer.token_bytes(1024), None);
    assert_eq!(tokenizer.token_bytes(u32::MAX), None);
    // All 256 bytes have a token of their own, so any text can be encoded.
    let single: std::collections::BTreeSet<u8> = (0..1024)
        .filter_map(|id| match tokenizer.token_bytes(id) {
            Some([byte]) => Some(*byte),
            _ => None,
        })
        .collect();
    assert_eq!(single.len(), 256);
}

#[test]
fn a_character_split_over_tokens_comes_out_whole() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode_plain("😀").unwrap();
    assert!(ids.len() > 1);
    let mut detokenizer = Detokenizer::new(&tokenizer, true);
    let (last, first) = ids.split_last().unwrap();
    assert!(first.iter().all(|&id| detokenizer.push(id).is_empty()));
    assert_eq!(detokenizer.push(*last), "😀");
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn an_unfinished_character_becomes_one_replacement_character() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode_plain("a😀").unwrap();
    let mut detokenizer = Detokenizer::new(&tokenizer, true);
    let text: String = ids[..ids.len() - 1].iter().map(|&id| detokenizer.push(id)).collect();
    assert_eq!(text, "a");
    assert_eq!(detokenizer.finish(), "\u{fffd}");
    assert_eq!(detokenizer.finish(), "", "finishing twice adds nothing");
}

#[test]
fn the_release_tokenizer_takes_our_own_pipeline_and_a_different_one_does_not() {
    assert!(tokenizer().is_fast());
    let other = changed(|json| {
        json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}".into();
    });
    assert!(!other.as_ref().unwrap().is_fast());
    let ids = other.unwrap().encode_plain("a 12").unwrap();
    assert!(!ids.is_empty(), "it still works");
    assert!(!changed(|json| json["model"]["ignore_merges"] = true.into()).unwrap().is_fast());
    assert!(
        !changed(|json| json["normalizer"] = serde_json::json!({"type": "NFC"})).unwrap().is_fast()
    );
}

/// Letters in an order in which no two of them follow each other twice: 2,704.
fn letters_in_pairs() -> String {
    let letters: Vec<char> = ('a'..='z').chain('A'..='Z').collect();
    let mut sequence = String::new();
    for (i, &first) in letters.iter().enumerate() {
        sequence.push(first);
        for &second in &letters[i + 1..] {
            sequence.extend([first, second]);
        }
    }
    sequence
}

#[test]
fn long_pieces_are_encoded_like_the_reference_where_merges_reach_far() {
    // Of the pairs in the sequence the last merges first. What the first letter merges with then
    // depends on where the sequence ends, far beyond what two windows have in common.
    let sequence = letters_in_pairs();
    let tokenizer = changed(|json| {
        let pairs = (1..sequence.len()).rev().map(|end| &sequence[end - 1..=end]);
        let vocab = json["model"]["vocab"].as_object_mut().unwrap();
        for (pair, id) in pairs.clone().zip(5000..) {
            vocab.entry(pair).or_insert_with(|| id.into());
        }
        json["model"]["merges"] =
            pairs.map(|pair| serde_json::json!([pair[..1], pair[1..]])).collect();
    });
    let tokenizer = tokenizer.unwrap();
    assert!(tokenizer.is_fast());
    for n_cut in 0..4 {
        let text = sequence.repeat(6)[n_cut..].to_owned() + &sequence[..1000 + n_cut / 2];
        assert_eq!(
            tokenizer.encode_plain(&text).unwrap(),
            tokenizer.encode_plain_reference(&text).unwrap()
        );
    }
}

#[test]
fn a_long_run_of_anything_is_encoded_like_the_reference() {
    let tokenizer = tokenizer();
    for unit in ["a", " ", "\n", "1", "-", "中", "é", "the ", "　", "the", "returnse", "🎉"] {
        let text = unit.repeat(20_000 / unit.len());
        assert_eq!(
            tokenizer.encode_plain(&text).unwrap(),
            tokenizer.encode_plain_reference(&text).unwrap(),
            "{unit:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn our_own_pipeline_gives_the_ids_of_the_reference(text in any_text()) {
        let tokenizer = tokenizer();
        prop_assert_eq!(
            tokenizer.encode_plain(&text).unwrap(),
            tokenizer.encode_plain_reference(&text).unwrap()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn long_pieces_get_the_ids_of_the_reference(
        mut random in any::<u64>(),
        syllables in prop::sample::select(vec![
            &["a", "b"][..],
            &["th", "e", "in", "er", "on", "re", "s", "t"],
            &["e", "t", "a", "o", "i", "n", "s", "h", "r", "d", "l", "u", "def", "return"],
            &["é", "ß", "a", "ñ", "ο", "ж"],
        ]),
    ) {
        // One piece of several windows: nothing but letters.
        let mut text = String::new();
        while text.len() < 12_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            text.push_str(syllables[(random >> 33) as usize % syllables.len()]);
        }
        let tokenizer = tokenizer();
        prop_assert_eq!(
            tokenizer.encode_plain(&text).unwrap(),
            tokenizer.encode_plain_reference(&text).unwrap()
        );
    }
}

proptest! {
    #[test]
    fn plain_text_never_becomes_a_control_token_and_always_comes_back(text in any_text()) {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode_plain(&text).unwrap();
        prop_assert!(ids.iter().all(|&id| tokenizer.special().of(id).is_none()));
        prop_assert_eq!(tokenizer.decode(&ids), text);
    }

    #[test]
    fn raw_encoding_comes_back_too(text in any_text()) {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode_with_special(&text).unwrap();
        prop_assert_eq!(tokenizer.decode(&ids), text);
    }

    #[test]
    fn detokenising_one_by_one_equals_decoding_all(
        ids in prop::collection::vec(0u32..1030, 0..40),
        keep_special in any::<bool>(),
    ) {
        let tokenizer = tokenizer();
        let mut detokenizer = Detokenizer::new(&tokenizer, keep_special);
        let mut text = String::new();
        for &id in &ids {
            text += &detokenizer.push(id);
        }
        text += &detokenizer.finish();
        let whole = if keep_special {
            tokenizer.decode(&ids)
        } else {
            tokenizer.decode_skip_special(&ids)
        };
        prop_assert_eq!(text, whole);
    }
}
