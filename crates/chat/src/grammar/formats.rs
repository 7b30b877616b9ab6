//! The string formats that are enforced, as regular expressions.
//!
//! They are stricter than the mask engine's own where those let invalid texts through: a date
//! exists in its year, and a domain of an email address has at least two labels.

use std::fmt::Write;
use std::sync::LazyLock;

use fathom_core::json_schema::FORMATS;

static PATTERNS: LazyLock<[String; 8]> = LazyLock::new(|| FORMATS.map(pattern));

/// The expression that a text of this format matches as a whole; `None` for other formats.
pub(super) fn lookup(name: &str) -> Option<&'static str> {
    let index = FORMATS.iter().position(|known| *known == name)?;
    Some(&PATTERNS[index])
}

fn pattern(name: &str) -> String {
    // At most 62 characters, and no two hyphens in a row, which announce another encoding.
    const LABEL: &str = "[A-Za-z0-9]{1,20}(?:-[A-Za-z0-9]{1,20}){0,2}";
    const ATOM: &str = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,30}";
    match name {
        // Local part, domain and whole stay below 64, 253 and 254 characters.
        "email" => format!(r"{ATOM}(?:\.{ATOM})?@{LABEL}(?:\.{LABEL}){{1,2}}"),
        "hostname" => format!(r"{LABEL}(?:\.{LABEL}){{0,3}}"),
        "ipv4" => format!(r"{OCTET}(?:\.{OCTET}){{3}}"),
        "ipv6" => ipv6(),
        "uuid" => "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}".to_owned(),
        "date" => date(),
        "time" => TIME.to_owned(),
        _ => format!("(?:{})T{TIME}", date()),
    }
}

const OCTET: &str = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";

/// RFC 3339, without leap seconds: whether one exists depends on the date.
const TIME: &str = concat!(
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?",
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])",
);

/// Days that exist, from the year 1 on: every month has its length, and 29 February its years.
fn date() -> String {
    const YEAR: &str = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})";
    let fours = "(?:0[48]|[2468][048]|[13579][26])";
    let leap = format!("(?:[0-9]{{2}}{fours}|{fours}00)");
    let days = "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])\
                |(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)\
                |02-(?:0[1-9]|1[0-9]|2[0-8])";
    format!("{YEAR}-(?:{days})|{leap}-02-29")
}

/// Eight groups, or fewer around one `::`.
fn ipv6() -> String {
    const GROUP: &str = "[0-9a-fA-F]{1,4}";
    let mut pattern = format!("(?:{GROUP}:){{7}}{GROUP}");
    for left in 0..=7 {
        let right = 7 - left;
        pattern.push('|');
        if left > 0 {
            write!(pattern, "{GROUP}(?::{GROUP}){{{}}}", left - 1).expect("a String takes writes");
        }
        pattern.push_str("::");
        if right > 0 {
            write!(pattern, "(?:{GROUP}(?::{GROUP}){{0,{}}})?", right - 1)
                .expect("a String takes writes");
        }
    }
    pattern
}
