//! `fathom bench sim`: a table for people, JSON for programs, and refusals by name.

use crate::fathom;

fn sim(args: &[&str]) -> (bool, String) {
    let output = fathom().args(["bench", "sim"]).args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn a_simulation_says_what_it_is_and_the_same_in_both_forms() {
    let args = ["--trace", "bursts", "--gpu", "b200", "--gpus", "1"];
    let (ok, table) = sim(&args);
    assert!(ok && table.contains("flash on 1 x b200 at 0.6 of the roofline: simulated"), "{table}");
    let row = table.lines().find(|line| line.starts_with("requests")).unwrap();
    assert_eq!(row.split_whitespace().nth(1), Some("256"), "{table}");

    let (ok, json) = sim(&[&args[..], &["--json"]].concat());
    assert!(ok, "{json}");
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let class = &json["classes"][0];
    assert_eq!((&class["class"], &class["answers"]), (&"requests".into(), &256.into()));
    let median = class["ttft"]["p50_s"].as_f64().unwrap();
    assert!(row.contains(&format!("{:.1} ms", median * 1e3)), "{median} is not in {row}");
}

#[test]
fn what_cannot_be_simulated_is_named() {
    for (args, expected) in [
        (&["--gpu", "h900"][..], "there is no GPU `h900`, only a100, h100, h200, b200"),
        (&["--model", "tiny"], "there is no model `tiny`, only flash, pro"),
        (&["--trace", "none"], "there is no trace `none`"),
        (&["--gpus", "1"], "flash does not fit 1 x h200"),
        (&["--efficiency", "2"], "efficiency is 2"),
    ] {
        let (ok, text) = sim(args);
        assert!(!ok && text.contains(expected), "{expected:?} is not in {text}");
    }
}
