//! Damaged files: each kind has its own error, naming tensor, file, expected and found.

use serde_json::json;

use crate::copy::{Copy, INDEX, SHARD_1, SHARD_2, SHARD_3};

const APE: &str = "layers.1.attn.compressor.ape";

#[test]
fn a_checkpoint_of_links_opens() {
    Copy::of_nano().open().unwrap();
}

#[test]
fn a_truncated_shard_is_named_with_both_lengths() {
    let copy = Copy::of_nano();
    copy.edit_bytes(SHARD_2, |bytes| bytes.truncate(bytes.len() - 1));
    assert_eq!(
        copy.refusal(),
        "model-00002-of-00003.safetensors has 5759779 bytes, its header implies 5759780: \
         the download is incomplete"
    );
}

#[test]
fn bytes_behind_the_last_tensor_are_refused() {
    let copy = Copy::of_nano();
    copy.edit_bytes(SHARD_2, |bytes| bytes.push(0));
    assert_eq!(
        copy.refusal(),
        "model-00002-of-00003.safetensors has 5759781 bytes, its header implies 5759780: \
         bytes follow the last tensor"
    );
}

#[test]
fn a_transposed_shape_is_told_with_the_expected_one() {
    let copy = Copy::of_nano();
    copy.edit_tensor(SHARD_1, "embed.weight", |tensor| {
        tensor["shape"] = json!([256, 1024]);
    });
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors: `embed.weight` has shape [256, 1024], \
         config.json implies [1024, 256]"
    );
}

#[test]
fn a_tensor_cast_to_bf16_is_told_with_the_expected_format() {
    let copy = Copy::of_nano();
    copy.edit_tensor(SHARD_1, APE, |tensor| {
        tensor["dtype"] = json!("BF16");
        tensor["shape"] = json!([4, 2048]);
    });
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors: `layers.1.attn.compressor.ape` is BF16, expected F32; \
         a re-saved checkpoint may have been cast: re-download the original checkpoint"
    );
}

#[test]
fn a_format_that_v4_does_not_use_is_named() {
    let copy = Copy::of_nano();
    copy.edit_tensor(SHARD_1, APE, |tensor| tensor["dtype"] = json!("U32"));
    assert!(copy.refusal().contains("`layers.1.attn.compressor.ape` is U32, expected F32"));
}

#[test]
fn a_missing_tensor_is_told_with_what_it_should_be() {
    let copy = Copy::of_nano();
    copy.rename(|name| name.replace("layers.2.attn.wkv.scale", "layers.9.attn.wkv.scale"));
    assert_eq!(
        copy.refusal(),
        "no tensor `layers.2.attn.wkv.scale`: config.json implies F8_E8M0 [4, 2]; \
         found in no shard"
    );
}

#[test]
fn a_surplus_tensor_is_refused() {
    let copy = Copy::of_nano();
    copy.add_empty("layers.0.attn.wq_c.weight");
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors holds `layers.0.attn.wq_c.weight`, \
         which no DeepSeek-V4 model of this config.json has"
    );
}

#[test]
fn a_surplus_mtp_tensor_is_left_out_with_a_notice() {
    let copy = Copy::of_nano();
    copy.add_empty("mtp.0.emb.tok_emb.weight");
    let checkpoint = copy.open().unwrap();
    assert!(!checkpoint.contains("mtp.0.emb.tok_emb.weight"));
    let expected = "1 mtp.* tensors (0 bytes) are not needed and left unread";
    assert_eq!(checkpoint.notices(), [expected]);
}

#[test]
fn overlapping_tensors_are_named_both() {
    let copy = Copy::of_nano();
    copy.edit_tensor(SHARD_1, "layers.0.attn.attn_sink", |tensor| {
        tensor["data_offsets"] = json!([49148, 49164]);
    });
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors: `layers.0.attn.attn_sink` begins at byte 49148, \
         inside `layers.1.ffn.gate.tid2eid`, which ends at 49152"
    );
}

#[test]
fn a_gap_between_tensors_is_refused() {
    let copy = Copy::of_nano();
    copy.edit_shard(SHARD_1, |header, _| {
        header.remove("layers.0.attn.attn_sink");
    });
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors: `layers.0.hc_attn_base` begins at byte 49168, \
         expected 49152: the gap is unowned"
    );
}

#[test]
fn offsets_that_disagree_with_the_shape_are_refused() {
    let copy = Copy::of_nano();
    copy.edit_tensor(SHARD_1, "layers.0.attn.attn_sink", |tensor| tensor["shape"] = json!([5]));
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors: `layers.0.attn.attn_sink` is F32 [5], \
         but its data offsets span 16 bytes"
    );
}

#[test]
fn a_shape_whose_product_leaves_64_bits_is_refused() {
    let copy = Copy::of_nano();
    copy.edit_tensor(SHARD_1, "layers.0.attn.attn_sink", |tensor| {
        tensor["shape"] = json!([1_u64 << 40, 1_u64 << 40]);
    });
    assert!(copy.refusal().contains("but its data offsets span 16 bytes"));
}

#[test]
fn an_end_before_the_begin_is_refused() {
    let copy = Copy::of_nano();
    copy.edit_tensor(SHARD_1, "layers.0.attn.attn_sink", |tensor| {
        tensor["data_offsets"] = json!([49168, 49152]);
    });
    assert!(copy.refusal().contains(
        "`layers.0.attn.attn_sink` has data offsets [49168, 49152], expected begin <= end"
    ));
}

#[test]
fn a_header_length_of_2_gb_is_refused_before_anything_is_read() {
    let copy = Copy::of_nano();
    copy.edit_bytes(SHARD_1, |bytes| bytes[..8].copy_from_slice(&(2_u64 << 30).to_le_bytes()));
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors: header length 2147483648 exceeds the limit of \
         100000000 bytes; the file is damaged"
    );
}

#[test]
fn a_header_longer_than_its_file_is_an_incomplete_download() {
    let copy = Copy::of_nano();
    copy.edit_bytes(SHARD_1, |bytes| bytes.truncate(1000));
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors: header of 16576 bytes in a file of 1000: \
         the download is incomplete"
    );
}

#[test]
fn a_file_too_short_for_a_header_length_is_refused() {
    let copy = Copy::of_nano();
    copy.replace(SHARD_1, b"abc");
    assert!(copy.refusal().contains("has 3 bytes: a shard begins with an 8-byte header length"));
    copy.replace(SHARD_1, b"");
    assert!(copy.refusal().contains("has 0 bytes: a shard begins with an 8-byte header length"));
}

#[test]
fn a_git_lfs_pointer_is_recognised() {
    let copy = Copy::of_nano();
    copy.replace(SHARD_1, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
    assert!(copy.refusal().contains("is a Git LFS pointer, not the weights: run `git lfs pull`"));
}

#[test]
fn a_header_that_is_not_utf8_or_not_json_is_refused() {
    let copy = Copy::of_nano();
    copy.edit_bytes(SHARD_1, |bytes| bytes[20] = 0xff);
    assert!(
        copy.refusal().starts_with("model-00001-of-00003.safetensors: the header is not UTF-8")
    );
    copy.edit_bytes(SHARD_1, |bytes| bytes[20] = b'\n');
    assert!(copy.refusal().contains("the header is not a safetensors header: control character"));
}

#[test]
fn a_name_listed_twice_is_refused_in_header_and_index() {
    let copy = Copy::of_nano();
    let twice = |bytes: &mut Vec<u8>, from: &str, to: &str| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        assert!(text.contains(from));
        // Same length: the header length still fits.
        *bytes = text.replacen(from, to, 1).into_bytes();
    };
    copy.edit_bytes(INDEX, |bytes| twice(bytes, "\"hc_head_base\"", "\"hc_head_fn\""));
    assert_eq!(copy.refusal(), "model.safetensors.index.json lists `hc_head_fn` twice");

    let copy = Copy::of_nano();
    copy.edit_bytes(SHARD_1, |bytes| {
        let name = b"layers.0.ffn.gate.tid2eid";
        let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
        bytes[at + 7] = b'1';
    });
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors: the header lists `layers.1.ffn.gate.tid2eid` twice"
    );
}

#[test]
fn a_wrong_total_size_is_told_with_the_sum_found() {
    let copy = Copy::of_nano();
    copy.edit_json(INDEX, |index| index["metadata"]["total_size"] = json!(12_351_789));
    assert_eq!(
        copy.refusal(),
        "model.safetensors.index.json says total_size 12351789, \
         but the shards hold 12351788 bytes of tensors"
    );
}

#[test]
fn an_index_that_leaves_the_directory_is_refused() {
    for file in ["../nano/model.safetensors", "/etc/hostname", "a/../../b", "", "./x"] {
        let copy = Copy::of_nano();
        copy.edit_json(INDEX, |index| index["weight_map"]["norm.weight"] = json!(file));
        assert_eq!(
            copy.refusal(),
            format!(
                "the index places `norm.weight` in {file:?}, outside the checkpoint: \
                 expected a file name inside the directory"
            )
        );
    }
}

#[test]
fn an_index_that_is_no_index_is_refused() {
    let copy = Copy::of_nano();
    copy.replace(INDEX, b"{}");
    assert!(copy.refusal().contains("is not a valid index: missing field `weight_map`"));
    copy.replace(INDEX, br#"{"weight_map": {"norm.weight": 3}}"#);
    assert!(copy.refusal().contains("is not a valid index: invalid type: integer `3`"));
}

#[test]
fn index_and_headers_must_agree_on_every_name() {
    let copy = Copy::of_nano();
    copy.edit_json(INDEX, |index| index["weight_map"]["extra.weight"] = json!(SHARD_3));
    assert_eq!(
        copy.refusal(),
        "model-00003-of-00003.safetensors lacks `extra.weight`, which the index places there"
    );
    let copy = Copy::of_nano();
    copy.edit_json(INDEX, |index| {
        index["weight_map"].as_object_mut().unwrap().remove("norm.weight");
    });
    assert!(copy.refusal().ends_with("holds `norm.weight`, which the index does not list"));
    let copy = Copy::of_nano();
    copy.edit_json(INDEX, |index| index["weight_map"]["embed.weight"] = json!(SHARD_3));
    assert_eq!(
        copy.refusal(),
        "model-00001-of-00003.safetensors holds `embed.weight`, which the index places in \
         model-00003-of-00003.safetensors"
    );
}

#[test]
fn a_missing_shard_is_named_with_a_tensor_it_should_hold() {
    let copy = Copy::of_nano();
    copy.remove(SHARD_3);
    let refusal = copy.refusal();
    assert!(refusal.starts_with("the index places `mtp.0."), "{refusal}");
    assert!(
        refusal
            .ends_with("model-00003-of-00003.safetensors, which is missing: download that shard")
    );
}

#[test]
fn a_link_that_leads_to_itself_is_an_error_and_not_a_hang() {
    let copy = Copy::of_nano();
    copy.remove(SHARD_2);
    std::os::unix::fs::symlink(copy.path(SHARD_2), copy.path(SHARD_2)).unwrap();
    assert_eq!(
        copy.refusal(),
        "model-00002-of-00003.safetensors is a symbolic link that leads back to itself: \
         restore the file it stands for"
    );
}

#[test]
fn a_directory_in_the_place_of_a_shard_is_refused() {
    let copy = Copy::of_nano();
    copy.remove(SHARD_2);
    std::fs::create_dir(copy.path(SHARD_2)).unwrap();
    assert_eq!(copy.refusal(), "model-00002-of-00003.safetensors is not a regular file");
}

#[test]
fn a_directory_without_config_or_weights_says_what_is_missing() {
    let copy = Copy::of_nano();
    copy.remove(INDEX);
    assert!(copy.refusal().contains("holds config.json but no weights"));
    copy.remove("config.json");
    assert!(copy.refusal().starts_with("no config.json in "));
    let file = fathom_weights::Checkpoint::open(&copy.path("tokenizer.json")).unwrap_err();
    assert!(file.to_string().contains("is not a directory"));
    let nothing = fathom_weights::Checkpoint::open(&copy.path("absent")).unwrap_err();
    assert!(nothing.to_string().starts_with("cannot read"));
}

#[test]
fn inspect_shows_all_problems_of_a_checkpoint_at_once() {
    let copy = Copy::of_nano();
    copy.remove(SHARD_3);
    copy.edit_tensor(SHARD_1, "embed.weight", |tensor| tensor["shape"] = json!([256, 1024]));
    let report = fathom_weights::InspectReport::of_dir(copy.dir(), true).unwrap();
    assert_eq!(report.refused.len(), 2, "{:?}", report.refused);
    assert!(!report.accepted);
    assert!(report.refused[0].contains("download that shard"));
    assert!(report.refused[1].contains("has shape [256, 1024]"));
}
