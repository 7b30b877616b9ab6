//! Damaged values: NaN scales, impossible expert ids, weights that are not finite.

use crate::copy::{Copy, SHARD_1};

/// Overwrites 8 bytes of a hash table of shard 1.
fn with_expert_id(entry: usize, id: i64) -> Copy {
    let copy = Copy::of_nano();
    let at = copy.offset(SHARD_1, "layers.0.ffn.gate.tid2eid") + 8 * entry;
    copy.edit_bytes(SHARD_1, |bytes| bytes[at..at + 8].copy_from_slice(&id.to_le_bytes()));
    copy
}

#[test]
fn a_scale_of_255_opens_but_is_never_handed_out() {
    let copy = Copy::of_nano();
    let name = "layers.0.attn.wo_b.scale";
    let at = copy.offset(SHARD_1, name);
    // Shape [2, 2]: entry 3 is row 1, column 1.
    copy.edit_bytes(SHARD_1, |bytes| bytes[at + 3] = 255);
    let checkpoint = copy.open().unwrap();
    let expected = "model-00001-of-00003.safetensors: `layers.0.attn.wo_b.scale` has the NaN \
                    scale 255 at [1, 1]: re-download the original checkpoint";
    assert_eq!(copy.text(&checkpoint.tensor(name).unwrap_err()), expected);
    assert_eq!(copy.text(&checkpoint.verify().unwrap_err()), expected);
    checkpoint.tensor("layers.0.attn.wo_b.weight").unwrap();
}

#[test]
fn an_expert_id_out_of_range_names_token_and_expert() {
    let table = "layers.0.ffn.gate.tid2eid";
    for id in [8, -1, i64::MIN, 1 << 20] {
        let copy = with_expert_id(3 * 700 + 1, id);
        assert_eq!(
            copy.text(&copy.open().unwrap().tid2eid(table).unwrap_err()),
            format!(
                "model-00001-of-00003.safetensors: `layers.0.ffn.gate.tid2eid` sends token 700 \
                 to expert {id}, expected 0..8"
            )
        );
    }
}

#[test]
fn a_token_that_names_an_expert_twice_is_refused() {
    let table = "layers.0.ffn.gate.tid2eid";
    let sound = Copy::of_nano().open().unwrap().tid2eid(table).unwrap();
    let first = sound[3 * 5];
    let copy = with_expert_id(3 * 5 + 2, i64::from(first));
    assert_eq!(
        copy.text(&copy.open().unwrap().verify().unwrap_err()),
        format!(
            "model-00001-of-00003.safetensors: `layers.0.ffn.gate.tid2eid` sends token 5 to \
             expert {first} twice"
        )
    );
}

#[test]
fn a_table_narrows_to_the_ids_it_stores() {
    let nano = Copy::of_nano().open().unwrap();
    let table = "layers.0.ffn.gate.tid2eid";
    let wide = nano.tensor(table).unwrap();
    let stored: Vec<u16> =
        wide.data.chunks(8).map(|id| u16::from_le_bytes([id[0], id[1]])).collect();
    assert_eq!(nano.tid2eid(table).unwrap(), stored);
}

#[test]
fn verify_finds_weights_that_are_not_finite() {
    for (name, element, bytes) in [
        ("layers.0.attn.wq_a.weight", 300, vec![0xff]),
        ("layers.0.attn_norm.weight", 7, vec![0x80, 0x7f]),
        ("layers.0.hc_attn_base", 23, f32::NAN.to_le_bytes().to_vec()),
    ] {
        let copy = Copy::of_nano();
        let at = copy.offset(SHARD_1, name) + element * bytes.len();
        copy.edit_bytes(SHARD_1, |file| file[at..at + bytes.len()].copy_from_slice(&bytes));
        let error = copy.text(&copy.open().unwrap().verify().unwrap_err());
        assert!(error.contains(&format!("`{name}` is not finite at")), "{error}");
    }
}

#[test]
fn inspect_reports_what_verify_finds() {
    let copy = with_expert_id(0, 99);
    let seen = |verify| fathom_weights::InspectReport::of_dir(copy.dir(), verify).unwrap();
    assert!(seen(false).accepted, "headers alone cannot tell");
    assert!(seen(true).refused[0].contains("sends token 0 to expert 99, expected 0..8"));
}
