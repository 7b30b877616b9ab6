//! The result of a slice as an SVG picture: the share of the floor by batch, one line per context.
//!
//! Text that is the same for the same result, so a picture can be kept beside it and compared.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Result, ensure};
use serde_json::Value;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 400.0;
/// Room for the axes' labels.
const LEFT: f64 = 60.0;
const RIGHT: f64 = 130.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 50.0;
/// Told apart also without colour vision.
const COLOURS: [&str; 5] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9"];

/// What a line connects: batches and shares, ascending.
type Lines = BTreeMap<(u64, bool), Vec<(u64, f64)>>;

fn lines(result: &Value) -> Lines {
    let mut lines = Lines::new();
    for case in result["cases"].as_array().into_iter().flatten() {
        let point = (case["context"].as_u64(), case["batch"].as_u64(), case["of_floor"].as_f64());
        if case["work"] == "decode"
            && let (Some(context), Some(batch), Some(share)) = point
        {
            lines.entry((context, case["routing"] == "zipf")).or_default().push((batch, share));
        }
    }
    lines.values_mut().for_each(|points| points.sort_by_key(|&(batch, _)| batch));
    lines
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn readable(tokens: u64) -> String {
    if tokens >= 1024 && tokens.is_multiple_of(1024) {
        format!("{}K", tokens / 1024)
    } else {
        tokens.to_string()
    }
}

/// Draws the decode cases of a result of `fathom bench slice`.
///
/// # Errors
/// If there are none in it.
pub(crate) fn svg(result: &Value) -> Result<String> {
    let lines = lines(result);
    let batches: Vec<u64> = lines.values().flatten().map(|&(batch, _)| batch).collect();
    ensure!(!batches.is_empty(), "no decode case of `fathom bench slice` is in it");
    let (first, last) = (batches.iter().min().copied(), batches.iter().max().copied());
    let log = |batch: u64| (batch.max(1) as f64).log2();
    let (low, high) = (log(first.unwrap_or(1)), log(last.unwrap_or(1)));
    let x = |batch: u64| {
        let share = if high > low { (log(batch) - low) / (high - low) } else { 0.5 };
        LEFT + share * (WIDTH - LEFT - RIGHT)
    };
    let y = |share: f64| HEIGHT - BOTTOM - share.clamp(0.0, 1.0) * (HEIGHT - TOP - BOTTOM);

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    let model = escaped(result["model"].as_str().unwrap_or("?"));
    // The device's name without its figures.
    let device = result["device"].as_str().unwrap_or("?");
    let device = escaped(device.split(['(', ',']).next().unwrap_or(device).trim());
    let caveat = if result["is_emulator"] == true { ": emulated, no times of a GPU" } else { "" };
    writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"20\" font-size=\"14\">Decode, {model} on {device}{caveat}</text>\n\
         <text x=\"{LEFT}\" y=\"38\">share of the floor that bytes and operations set</text>"
    )?;
    for tenth in (0..=10).step_by(2) {
        let share = f64::from(tenth) / 10.0;
        let at = y(share);
        writeln!(
            out,
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{share:.1}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            at + 4.0,
        )?;
    }
    let mut ticks = batches.clone();
    ticks.sort_unstable();
    ticks.dedup();
    for batch in ticks {
        writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{batch}</text>",
            x(batch),
            HEIGHT - BOTTOM + 18.0,
        )?;
    }
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    writeln!(
        out,
        "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">sequences</text>",
        HEIGHT - BOTTOM + 38.0,
    )?;
    for (index, ((context, zipf), points)) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let dashes = if *zipf { " stroke-dasharray=\"4 3\"" } else { "" };
        let path: Vec<String> = points
            .iter()
            .map(|&(batch, share)| format!("{:.1},{:.1}", x(batch), y(share)))
            .collect();
        writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes}/>",
            path.join(" "),
        )?;
        for &(batch, share) in points {
            let (x, y) = (x(batch), y(share));
            writeln!(
                out,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"><title>{share:.2}</title></circle>"
            )?;
        }
        let label_y = TOP + 10.0 + 18.0 * index as f64;
        let routing = if *zipf { ", Zipf" } else { "" };
        writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{label_y:.1}\" fill=\"{colour}\">context {}{routing}</text>",
            WIDTH - RIGHT + 10.0,
            readable(*context),
        )?;
    }
    out += "</svg>\n";
    Ok(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn case(batch: u64, context: u64, of_floor: f64, routing: &str) -> Value {
        json!({ "work": "decode", "batch": batch, "context": context, "of_floor": of_floor,
                "routing": routing })
    }

    #[test]
    fn a_picture_has_a_line_per_context_and_stays_as_it_is() {
        let result = json!({
            "model": "flash",
            "device": "Some <card> (139 GiB), figures",
            "is_emulator": false,
            "cases": [
                case(8, 1024, 0.5, "uniform"), case(1, 1024, 0.25, "uniform"),
                case(64, 1024, 0.75, "uniform"), case(1, 131_072, 0.2, "uniform"),
                case(64, 131_072, 0.6, "uniform"), case(64, 1024, 0.7, "zipf"),
                json!({ "work": "prefill", "batch": 8192, "context": 0, "of_floor": 0.4 }),
            ],
        });
        insta::assert_snapshot!(svg(&result).unwrap());
    }

    #[test]
    fn a_file_without_decode_cases_is_refused() {
        let error = svg(&json!({ "cases": [] })).unwrap_err().to_string();
        assert!(error.contains("fathom bench slice"), "{error}");
    }
}
