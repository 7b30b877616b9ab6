//! How the weights are quantised, as `config.json` says it.

use fathom_core::ExpertFormat;
use serde_json::Value;

use super::ConfigError;
use super::keys::{Keys, show};

const PATH: &str = "quantization_config.";

/// The routed experts' format where a key names it; it may have moved into quantization_config.
pub(super) fn expert_format(keys: Keys<'_>) -> Result<Option<ExpertFormat>, ConfigError> {
    let nested = keys.opt_object("quantization_config", PATH)?;
    let outer = match keys.value("expert_dtype") {
        Some(value) => Some((keys, value)),
        None => nested.and_then(|n| n.value("expert_dtype").map(|value| (n, value))),
    };
    let Some((owner, value)) = outer else { return Ok(None) };
    match value.as_str() {
        Some("fp4") => Ok(Some(ExpertFormat::Fp4)),
        Some("fp8") => Ok(Some(ExpertFormat::Fp8)),
        _ => Err(owner.out_of_range("expert_dtype", value, "\"fp4\" or \"fp8\"".to_owned())),
    }
}

/// Checks `quantization_config`, or its flat keys in inference/config.json.
pub(super) fn check(
    keys: Keys<'_>,
    inference_names: bool,
    notices: &mut Vec<String>,
) -> Result<(), ConfigError> {
    let why = "the release's formats are FP8 E4M3 and E8M0 scales";
    if inference_names {
        keys.fixed_str(&["dtype"], "fp8", why)?;
        keys.fixed_str(&["scale_fmt"], "ue8m0", why)?;
        return Ok(());
    }
    let Some(quantization) = keys.opt_object("quantization_config", PATH)? else {
        return Err(ConfigError::Missing {
            key: "quantization_config".to_owned(),
            expected: "quant_method fp8 with 128x128 blocks".to_owned(),
        });
    };
    if let Some(value) = quantization.value("moe_quant_algo") {
        let key = quantization.name("moe_quant_algo");
        return Err(ConfigError::Requantised { key, found: show(value) });
    }
    match quantization.value("quant_method") {
        Some(value) if value == "fp8" => {}
        Some(value) => {
            let key = quantization.name("quant_method");
            return Err(ConfigError::Requantised { key, found: show(value) });
        }
        None => {
            let (key, expected) = (quantization.name("quant_method"), "\"fp8\"".to_owned());
            return Err(ConfigError::Missing { key, expected });
        }
    }
    quantization.fixed_str(&["fmt"], "e4m3", why)?;
    quantization.fixed_str(
        &["activation_scheme"],
        "dynamic",
        "activations are quantised as they come",
    )?;
    if !quantization.fixed_str(&["scale_fmt"], "ue8m0", why)? {
        notices.push(
            "quantization_config.scale_fmt is absent (re-saved checkpoint?): ue8m0 is assumed"
                .to_owned(),
        );
    }
    let block = quantization.value("weight_block_size");
    let is_128 = |value: &Value| {
        value.as_array().is_some_and(|b| b.len() == 2 && b.iter().all(|n| n.as_u64() == Some(128)))
    };
    match block {
        Some(value) if !is_128(value) => Err(ConfigError::Unsupported {
            key: quantization.name("weight_block_size"),
            found: show(value),
            expected: "[128,128]".to_owned(),
            why,
        }),
        _ => Ok(()),
    }
}
