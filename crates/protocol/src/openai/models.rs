//! The model list: one object that satisfies the OpenAI and the Anthropic SDK.

use serde::Serialize;

/// All served models.
#[derive(Debug, Clone, Serialize)]
pub struct ModelList {
    object: &'static str,
    data: Vec<Model>,
    has_more: bool,
    first_id: Option<String>,
    last_id: Option<String>,
}

impl ModelList {
    /// A list of one page.
    #[must_use]
    pub fn new(data: Vec<Model>) -> Self {
        let id = |model: &Model| model.id.clone();
        let (first_id, last_id) = (data.first().map(id), data.last().map(id));
        Self { object: "list", data, has_more: false, first_id, last_id }
    }
}

/// One served model.
#[derive(Debug, Clone, Serialize)]
pub struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    #[serde(rename = "type")]
    kind: &'static str,
    display_name: String,
    created_at: String,
    lifecycle: &'static str,
    max_model_len: u32,
    max_output_tokens: u32,
    max_input_tokens: u32,
    max_tokens: u32,
}

impl Model {
    /// The entry of `id`, loaded at `created` (Unix seconds), with a context of `max_model_len`
    /// tokens of which one answer may use `max_output_tokens`.
    #[must_use]
    pub fn new(id: &str, created: u64, max_model_len: u32, max_output_tokens: u32) -> Self {
        let output = max_output_tokens.min(max_model_len);
        Self {
            id: id.to_owned(),
            object: "model",
            created,
            owned_by: "deepseek-ai",
            kind: "model",
            display_name: id.to_owned(),
            created_at: rfc3339(created),
            lifecycle: "active",
            max_model_len,
            max_output_tokens: output,
            max_input_tokens: max_model_len,
            max_tokens: output,
        }
    }
}

/// Unix seconds as `YYYY-MM-DDTHH:MM:SSZ`.
#[must_use]
pub fn rfc3339(unix_seconds: u64) -> String {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    // Years that begin in March put the leap day last; 719,468 days lie between the start of such
    // a year 0 and 1970, and 146,097 days are 400 years.
    let day = days + 719_468;
    let (era, day_of_era) = (day / 146_097, day % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (second / 3_600, second / 60 % 60);
    let second = second % 60;
    format!("{year:04}-{month:02}-{day_of_month:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::rfc3339;

    #[test]
    fn days_around_leap_years_have_their_dates() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(rfc3339(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
