//! `fathom inspect`: sizes to the byte, and a readable report.

use fathom_weights::report::{Totals, tensor_list};
use fathom_weights::{Checkpoint, InspectReport, Variant, parse_config};

use crate::nano::nano_dir;

fn flash() -> InspectReport {
    let json = include_bytes!("../../../models/flash/config.json");
    InspectReport::of_config(&parse_config(json).expect("published"), "models/flash".to_owned())
}

fn pro() -> InspectReport {
    let json = include_bytes!("../../../models/pro/config.json");
    InspectReport::of_config(&parse_config(json).expect("published"), "models/pro".to_owned())
}

fn component_bytes(report: &InspectReport) -> Vec<(&'static str, u64)> {
    report.components.iter().map(|row| (row.component, row.bytes)).collect()
}

fn layer_bytes(report: &InspectReport, layer: usize) -> (u64, u64) {
    (report.layers[layer].bytes, report.layers[layer].routed_bytes)
}

#[test]
fn flash_has_the_published_size_of_every_component() {
    let flash = flash();
    let expected = [
        ("embed", 1_059_061_760),
        ("lm_head", 1_059_061_760),
        ("attention core", 4_599_478_144),
        ("compressors", 525_722_624),
        ("indexers", 275_353_344),
        ("hyper-connections", 135_537_756),
        ("router gates", 90_218_496),
        ("tid2eid", 18_616_320),
        ("shared experts", 1_082_196_480),
        ("norms", 712_704),
        ("routed experts", 147_169_738_752),
    ];
    assert_eq!(component_bytes(&flash), expected);
    let Totals { main_bytes, mtp_bytes, bytes, n_tensors, expert_bytes, .. } = flash.totals;
    assert_eq!((main_bytes, mtp_bytes, bytes), (156_015_698_140, 3_593_787_756, 159_609_485_896));
    assert_eq!((n_tensors, expert_bytes), (69_187, 13_369_344));
}

#[test]
fn pro_has_the_published_size_of_every_component() {
    let pro = pro();
    let expected = [
        ("embed", 1_853_358_080),
        ("lm_head", 1_853_358_080),
        ("attention core", 18_294_854_528),
        ("compressors", 1_344_566_272),
        ("indexers", 625_367_040),
        ("hyper-connections", 336_278_412),
        ("router gates", 335_895_552),
        ("tid2eid", 18_616_320),
        ("shared experts", 4_029_923_520),
        ("norms", 1_763_328),
        ("routed experts", 822_054_223_872),
    ];
    assert_eq!(component_bytes(&pro), expected);
    let Totals { main_bytes, mtp_bytes, bytes, n_tensors, expert_bytes, .. } = pro.totals;
    assert_eq!((main_bytes, mtp_bytes, bytes), (850_748_205_004, 13_956_587_692, 864_704_792_696));
    assert_eq!((n_tensors, expert_bytes), (145_116, 35_094_528));
}

#[test]
fn layers_have_the_published_sizes_by_kind() {
    let flash = flash();
    let routed = 3_422_552_064;
    assert_eq!(layer_bytes(&flash, 0), (3_566_148_952, routed));
    assert_eq!(layer_bytes(&flash, 1), (3_566_148_952, routed));
    assert_eq!(layer_bytes(&flash, 2), (3_596_055_640, routed));
    assert_eq!(layer_bytes(&flash, 3), (3_568_596_312, routed));
    assert_eq!(layer_bytes(&flash, 4), (3_589_851_224, routed));
    let pro = pro();
    let routed = 13_476_298_752;
    assert_eq!(layer_bytes(&pro, 0), (13_874_466_328, routed));
    assert_eq!(layer_bytes(&pro, 2), (13_909_746_200, routed));
    assert_eq!(layer_bytes(&pro, 59), (13_868_262_424, routed));
    assert_eq!(layer_bytes(&pro, 60), (13_903_542_296, routed));
}

#[test]
fn parameters_are_those_of_the_published_names() {
    let billions = |n: u64| format!("{:.2}", n as f64 / 1e9);
    let flash = flash().totals;
    assert_eq!(billions(flash.main_params), "284.33");
    assert_eq!(billions(flash.active_params), "13.27");
    assert_eq!(billions(flash.params), "290.94");
    let pro = pro().totals;
    assert_eq!(billions(pro.main_params), "1573.00");
    assert_eq!(billions(pro.active_params), "48.85");
    assert_eq!(billions(pro.params), "1598.84");
}

#[test]
fn the_report_of_flash_reads_well() {
    insta::assert_snapshot!(flash());
}

#[test]
fn the_json_report_keeps_its_shape() {
    let mut report = InspectReport::of_dir(&nano_dir(), false).unwrap();
    report.source = "models/nano".to_owned();
    insta::assert_json_snapshot!(report);
}

#[test]
fn a_checkpoint_and_its_config_alone_report_the_same_sizes() {
    let nano = Checkpoint::open(&nano_dir()).unwrap();
    let with = InspectReport::of_checkpoint(&nano, String::new());
    let without = InspectReport::of_config(nano.parsed_config(), String::new());
    assert_eq!(with.totals, without.totals);
    assert_eq!(component_bytes(&with), component_bytes(&without));
    assert_eq!(with.totals.bytes, nano.n_bytes());
}

#[test]
fn the_tensor_lists_in_the_tree_are_those_of_the_configs() {
    let list = |json: &[u8]| {
        let config = parse_config(json).expect("published").config;
        tensor_list(&config, Variant::of(&config))
    };
    let flash = list(include_bytes!("../../../models/flash/config.json"));
    assert_eq!(flash, include_str!("../../../models/flash/tensors.txt"));
    let pro = list(include_bytes!("../../../models/pro/config.json"));
    assert_eq!(pro, include_str!("../../../models/pro/tensors.txt"));
}

#[test]
fn a_refused_config_is_reported_with_its_reason_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let json = r#"{"model_type": "deepseek_v41", "text_config": {}}"#;
    std::fs::write(dir.path().join("config.json"), json).unwrap();
    let report = InspectReport::of_dir(dir.path(), false).unwrap();
    assert!(!report.accepted);
    assert!(report.refused[0].contains("DeepSeek-V4.1 is not supported"), "{}", report.refused[0]);
    assert!(report.to_string().ends_with("Fathom refuses this checkpoint.\n"));
}
