//! Bytes from outside: whatever they are, the parsers answer and never panic.

use fathom_weights::config::config_json;
use fathom_weights::shard::{HeaderDtype, parse_shard};
use fathom_weights::{StoredDtype, parse_config};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Map, Value, json};

const NANO: &[u8] = include_bytes!("../../../models/nano/config.json");

/// Any JSON value, with the numbers that parsers stumble over.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0_u64..600).prop_map(Value::from),
        any::<f64>().prop_map(|x| json!(x)),
        ".{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 12, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((".{0,6}", inner), 0..4)
                .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// Tensors with names, formats and shapes as a writer could have them.
fn any_tensors() -> impl Strategy<Value = Vec<(String, Dtype, Vec<usize>)>> {
    let dtype = prop_oneof![
        Just(Dtype::F8_E4M3),
        Just(Dtype::F8_E8M0),
        Just(Dtype::I8),
        Just(Dtype::BF16),
        Just(Dtype::F32),
        Just(Dtype::I64),
        Just(Dtype::F16),
    ];
    let tensor = (".{1,20}", dtype, prop::collection::vec(0_usize..5, 0..4));
    prop::collection::vec(tensor, 0..8).prop_map(|mut tensors| {
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        tensors.dedup_by(|a, b| a.0 == b.0);
        tensors.retain(|(name, ..)| name != "__metadata__");
        tensors
    })
}

proptest! {
    #[test]
    fn no_bytes_make_the_header_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_shard(&bytes, "f");
    }

    #[test]
    fn no_header_text_makes_the_parser_panic(value in any_json(), payload in 0_usize..64) {
        let header = value.to_string();
        let length = (header.len() as u64).to_le_bytes();
        let file = [&length[..], header.as_bytes(), &vec![0; payload]].concat();
        let _ = parse_shard(&file, "f");
    }

    #[test]
    fn what_the_reference_writes_is_read_with_the_same_places(tensors in any_tensors()) {
        let bytes = vec![0; 8 * 4 * 4 * 4];
        let views = tensors.iter().map(|(name, dtype, shape)| {
            let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorView::new(*dtype, shape.clone(), &bytes[..len]).unwrap())
        });
        let file = serialize(views, None).unwrap();
        let read = parse_shard(&file, "f").unwrap();
        let (_, expected) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        prop_assert_eq!(read.len(), tensors.len());
        for tensor in read {
            let reference = expected.info(&tensor.name).unwrap();
            prop_assert_eq!(&*tensor.shape, &reference.shape[..]);
            let (begin, end) = reference.data_offsets;
            prop_assert_eq!((tensor.begin, tensor.end), (begin as u64, end as u64));
            let known = StoredDtype::from_name(&reference.dtype.to_string());
            prop_assert_eq!(matches!(tensor.dtype, HeaderDtype::Known(_)), known.is_some());
        }
    }

    #[test]
    fn a_header_with_one_changed_byte_is_accepted_only_if_the_reference_accepts_it(
        tensors in any_tensors(), at: prop::sample::Index, byte: u8,
    ) {
        let bytes = vec![0; 8 * 4 * 4 * 4];
        let views = tensors.iter().map(|(name, dtype, shape)| {
            let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name, TensorView::new(*dtype, shape.clone(), &bytes[..len]).unwrap())
        });
        let mut file = serialize(views, None).unwrap();
        let at = at.index(file.len());
        file[at] = byte;
        if let Ok(read) = parse_shard(&file, "f")
            && read.iter().all(|tensor| matches!(tensor.dtype, HeaderDtype::Known(_)))
        {
            prop_assert!(safetensors::SafeTensors::deserialize(&file).is_ok());
        }
    }

    #[test]
    fn no_bytes_make_the_config_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        let _ = parse_config(&bytes);
    }

    #[test]
    fn no_value_of_any_key_makes_the_config_parser_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4),
    ) {
        let mut config: Map<String, Value> = serde_json::from_slice(NANO).unwrap();
        let mut keys: Vec<String> = config.keys().cloned().collect();
        let extra = ["layer_types", "mlp_layer_types", "rope_parameters", "compress_rates", "dim",
            "n_layers", "partial_rotary_factor", "vision_n_layers", "n_routed_experts_score"];
        keys.extend(extra.map(str::to_owned));
        for (key, value) in edits {
            config.insert(keys[key.index(keys.len())].clone(), value);
        }
        if let Ok(parsed) = parse_config(Value::Object(config).to_string().as_bytes()) {
            // What is accepted can be enumerated without overflow.
            let variant = fathom_weights::Variant::of(&parsed.config);
            prop_assert!(fathom_weights::expected::expected_count(&parsed.config, variant) > 0);
            let _ = fathom_weights::InspectReport::of_config(&parsed, String::new()).to_string();
            let written = config_json(&parsed.config).to_string();
            prop_assert_eq!(parse_config(written.as_bytes()).unwrap().config, parsed.config);
        }
    }
}
