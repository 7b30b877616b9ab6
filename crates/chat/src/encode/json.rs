//! JSON text as Python's `json.dumps(ensure_ascii=False)` writes it.
//!
//! Separators `", "` and `": "`, keys in insertion order, non-ASCII as is, `/` unescaped. Integers
//! keep their digits whatever their size; everything with `.`, `e` or `E` goes through a double
//! and comes out as Python's `repr`.
//!
//! Relies on serde_json's `preserve_order` and `arbitrary_precision`, which keep the client's key
//! order and number spelling.

use std::fmt::Write as _;

use serde_json::{Number, Value};

/// `value` as Python writes it.
pub fn to_python_json(value: &Value) -> String {
    let mut out = String::new();
    write_value(value, &mut out);
    out
}

/// `text` as a JSON string, quotes included.
pub fn to_python_json_string(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    escape_into(text, &mut out);
    out.push('"');
    out
}

/// Appends `text` with JSON escapes, without the quotes.
pub(crate) fn escape_into(text: &str, out: &mut String) {
    let mut plain_from = 0;
    for (at, byte) in text.bytes().enumerate() {
        let escape = match byte {
            b'"' => "\\\"",
            b'\\' => "\\\\",
            b'\n' => "\\n",
            b'\r' => "\\r",
            b'\t' => "\\t",
            0x08 => "\\b",
            0x0c => "\\f",
            0x00..=0x1f => "",
            _ => continue,
        };
        out.push_str(&text[plain_from..at]);
        plain_from = at + 1;
        if escape.is_empty() {
            write!(out, "\\u{byte:04x}").expect("writing to a string cannot fail");
        } else {
            out.push_str(escape);
        }
    }
    out.push_str(&text[plain_from..]);
}

fn write_value(value: &Value, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => write_number(number, out),
        Value::String(text) => {
            out.push('"');
            escape_into(text, out);
            out.push('"');
        }
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                write_value(item, out);
            }
            out.push(']');
        }
        Value::Object(entries) => {
            out.push('{');
            for (i, (key, item)) in entries.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                out.push('"');
                escape_into(key, out);
                out.push_str("\": ");
                write_value(item, out);
            }
            out.push('}');
        }
    }
}

fn write_number(number: &Number, out: &mut String) {
    let spelling = number.as_str();
    if !spelling.contains(['.', 'e', 'E']) {
        // Python reads an integer, and there is only one zero among them.
        out.push_str(if spelling == "-0" { "0" } else { spelling });
        return;
    }
    match spelling.parse::<f64>() {
        Ok(value) => write_float(value, out),
        // Not reachable with numbers that came out of a JSON parser.
        Err(_) => out.push_str(spelling),
    }
}

/// Python's `repr` of a float, with JSON's names for what is not finite.
fn write_float(value: f64, out: &mut String) {
    if !value.is_finite() {
        out.push_str(if value.is_nan() {
            "NaN"
        } else if value > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        });
        return;
    }
    // Both languages print the shortest digits that read back as the same double; Python writes
    // them in scientific notation if the exponent is below -4 or above 15.
    let scientific = format!("{value:e}");
    let (mantissa, exponent) =
        scientific.split_once('e').expect("LowerExp of a finite float has an exponent");
    let exponent: i32 = exponent.parse().expect("LowerExp writes a decimal exponent");
    if (-4..16).contains(&exponent) {
        let plain = format!("{value}");
        out.push_str(&plain);
        if !plain.contains('.') {
            out.push_str(".0");
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        write!(out, "{mantissa}e{sign}{:02}", exponent.unsigned_abs())
            .expect("writing to a string cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(json: &str) -> String {
        to_python_json(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn floats_are_written_as_python_repr() {
        // Left: JSON as a client may spell it. Right: json.dumps(json.loads(left)) of Python 3.12.
        for (json, python) in [
            ("1E5", "100000.0"),
            ("1.0", "1.0"),
            ("0.1", "0.1"),
            ("3.0e-5", "3e-05"),
            ("0.0001", "0.0001"),
            ("0.00012345", "0.00012345"),
            ("0.00001", "1e-05"),
            ("1e15", "1000000000000000.0"),
            ("1e16", "1e+16"),
            ("1e20", "1e+20"),
            ("1e22", "1e+22"),
            ("123456789012345678.0", "1.2345678901234568e+17"),
            ("9007199254740993.0", "9007199254740992.0"),
            ("1.7976931348623157e308", "1.7976931348623157e+308"),
            ("5e-324", "5e-324"),
            ("2.5e-7", "2.5e-07"),
            ("-0.0", "-0.0"),
            ("-1.5e3", "-1500.0"),
            ("1e400", "Infinity"),
            ("-1e400", "-Infinity"),
            ("1e-400", "0.0"),
        ] {
            assert_eq!(rewritten(json), python, "{json}");
        }
    }

    #[test]
    fn integers_keep_every_digit() {
        for (json, python) in [
            ("-0", "0"),
            ("0", "0"),
            ("18446744073709551616", "18446744073709551616"),
            ("123456789012345678901234567890", "123456789012345678901234567890"),
            ("-9223372036854775809", "-9223372036854775809"),
        ] {
            assert_eq!(rewritten(json), python, "{json}");
        }
    }

    #[test]
    fn strings_are_escaped_as_python_does_without_ascii_mode() {
        let text = "\u{0}\u{1}\u{8}\t\n\u{b}\u{c}\r\u{1f}\"\\/\u{7f}é中😀\u{2028}";
        assert_eq!(
            to_python_json_string(text),
            "\"\\u0000\\u0001\\b\\t\\n\\u000b\\f\\r\\u001f\\\"\\\\/\u{7f}é中😀\u{2028}\""
        );
    }

    #[test]
    fn objects_keep_their_order_and_get_python_separators() {
        assert_eq!(
            rewritten(r#"{"z":[1,{"b":null,"a":true}],"":{},"e":[]}"#),
            r#"{"z": [1, {"b": null, "a": true}], "": {}, "e": []}"#
        );
    }
}
