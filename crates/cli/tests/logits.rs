//! `fathom logits` against the golden file, through the command line.

use safetensors::SafeTensors;

use crate::fathom;

const NANO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/nano");

/// Relative L2 distance of two f32 tensors.
fn distance(got: &SafeTensors<'_>, expected: &SafeTensors<'_>, name: &str) -> f64 {
    let values = |file: &SafeTensors<'_>| -> Vec<f64> {
        let tensor = file.tensor(name).unwrap();
        let (values, _) = tensor.data().as_chunks::<4>();
        values.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect()
    };
    let (got, expected) = (values(got), values(expected));
    assert_eq!(got.len(), expected.len(), "{name}");
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
    let difference = square(&mut got.iter().zip(&expected).map(|(a, b)| a - b));
    (difference / square(&mut expected.iter().copied())).sqrt()
}

#[test]
fn the_file_written_holds_the_golden_logits_of_every_case() {
    let directory = tempfile::tempdir().unwrap();
    let manifest = std::fs::read(format!("{NANO}/goldens/nano_manifest.json")).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let names = ["p1", "p5", "p129"];
    manifest["cases"].as_object_mut().unwrap().retain(|name, _| names.contains(&name.as_str()));
    let cases = directory.path().join("cases.json");
    std::fs::write(&cases, manifest.to_string()).unwrap();

    let out = directory.path().join("logits.safetensors");
    let status = fathom()
        .args(["logits", "--model", NANO, "--numerics", "f32", "--chunk", "50", "--cases"])
        .arg(&cases)
        .arg("--out")
        .arg(&out)
        .status()
        .unwrap();
    assert!(status.success());

    let got = std::fs::read(&out).unwrap();
    let got = SafeTensors::deserialize(&got).unwrap();
    let expected = std::fs::read(format!("{NANO}/goldens/nano_f32.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&expected).unwrap();
    assert_eq!(got.len(), 2 * names.len());
    for name in names {
        for key in ["prefill/logits_last", "decode/logits"] {
            let distance = distance(&got, &expected, &format!("{name}/{key}"));
            // tolerances.json allows 1e-4 in mode f32; more than this means a changed order of sums.
            assert!(distance < 5e-6, "{name}/{key}: {distance}");
        }
    }
}
