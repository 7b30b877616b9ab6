//! Typed reading of JSON keys, with errors that name key, value and what was expected.
//!
//! Not here: which keys there are (`config`).

use serde_json::{Map, Value};

use super::ConfigError;

/// A JSON object that is read key by key.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    object: &'a Map<String, Value>,
    /// Path of the object inside the file, with a trailing dot; empty at the top.
    path: &'a str,
}

/// A value as an error shows it: its JSON, cut to a readable length.
pub(crate) fn show(value: &Value) -> String {
    const LIMIT: usize = 80;
    let text = match value {
        Value::Array(items) if items.len() > 16 => format!("an array of {} entries", items.len()),
        Value::Object(map) => format!("an object of {} keys", map.len()),
        other => other.to_string(),
    };
    match text.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

impl<'a> Keys<'a> {
    /// Reads the keys of `object`, which lies at `path` in its file.
    pub(crate) const fn new(object: &'a Map<String, Value>, path: &'a str) -> Self {
        Self { object, path }
    }

    /// The full name of `key`.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    /// The value of `key`; `null` counts as absent.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// The value under the first of `spellings` that is present, and that spelling.
    ///
    /// # Errors
    /// [`ConfigError::Conflict`] if two spellings are present with different values.
    pub(crate) fn any(
        &self,
        spellings: &[&'static str],
    ) -> Result<Option<(&'static str, &'a Value)>, ConfigError> {
        let mut found: Option<(&'static str, &'a Value)> = None;
        for &key in spellings {
            let Some(value) = self.value(key) else { continue };
            match found {
                None => found = Some((key, value)),
                Some((_, first)) if first == value => {}
                Some((first_key, first)) => {
                    return Err(ConfigError::Conflict {
                        key: self.name(first_key),
                        found: show(first),
                        other_key: self.name(key),
                        other: show(value),
                    });
                }
            }
        }
        Ok(found)
    }

    /// An integer in `min..=max` under one of `spellings`, or `None` where all are absent.
    pub(crate) fn opt_int(
        &self,
        spellings: &[&'static str],
        min: u64,
        max: u64,
    ) -> Result<Option<u64>, ConfigError> {
        let Some((key, value)) = self.any(spellings)? else { return Ok(None) };
        let expected = || format!("an integer from {min} to {max}");
        if !value.is_number() {
            return Err(self.wrong_type(key, value, expected()));
        }
        match value.as_u64() {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.out_of_range(key, value, expected())),
        }
    }

    /// As [`Keys::opt_int`], but the key must be there.
    pub(crate) fn int(
        &self,
        spellings: &[&'static str],
        min: u64,
        max: u64,
    ) -> Result<u64, ConfigError> {
        self.opt_int(spellings, min, max)?.ok_or_else(|| ConfigError::Missing {
            key: self.name(spellings[0]),
            expected: format!("an integer from {min} to {max}"),
        })
    }

    /// An integer that kernels are written for: absent, or exactly `only`.
    pub(crate) fn fixed_int(
        &self,
        spellings: &[&'static str],
        only: usize,
        why: &'static str,
    ) -> Result<(), ConfigError> {
        let Some((key, value)) = self.any(spellings)? else { return Ok(()) };
        if !value.is_number() {
            return Err(self.wrong_type(key, value, format!("the integer {only}")));
        }
        if value.as_u64() == Some(only as u64) {
            return Ok(());
        }
        Err(ConfigError::Unsupported {
            key: self.name(key),
            found: show(value),
            expected: only.to_string(),
            why,
        })
    }

    /// A string that must be `only` where it is present; returns whether it is.
    pub(crate) fn fixed_str(
        &self,
        spellings: &[&'static str],
        only: &'static str,
        why: &'static str,
    ) -> Result<bool, ConfigError> {
        let Some((key, value)) = self.any(spellings)? else { return Ok(false) };
        let Some(text) = value.as_str() else {
            return Err(self.wrong_type(key, value, format!("the string \"{only}\"")));
        };
        if text == only {
            return Ok(true);
        }
        let (found, expected) = (show(value), format!("\"{only}\""));
        Err(ConfigError::Unsupported { key: self.name(key), found, expected, why })
    }

    /// A truth value that must be `only` where it is present.
    pub(crate) fn fixed_bool(
        &self,
        key: &'static str,
        only: bool,
        why: &'static str,
    ) -> Result<(), ConfigError> {
        let Some(value) = self.value(key) else { return Ok(()) };
        match value.as_bool() {
            Some(found) if found == only => Ok(()),
            Some(found) => Err(ConfigError::Unsupported {
                key: self.name(key),
                found: found.to_string(),
                expected: only.to_string(),
                why,
            }),
            None => Err(self.wrong_type(key, value, "true or false".to_owned())),
        }
    }

    /// A number in `min..=max` under one of `spellings`, or `None` where all are absent.
    pub(crate) fn opt_number(
        &self,
        spellings: &[&'static str],
        min: f64,
        max: f64,
    ) -> Result<Option<f64>, ConfigError> {
        let Some((key, value)) = self.any(spellings)? else { return Ok(None) };
        let expected = || format!("a number from {min} to {max}");
        if !value.is_number() {
            return Err(self.wrong_type(key, value, expected()));
        }
        match value.as_f64() {
            Some(x) if (min..=max).contains(&x) => Ok(Some(x)),
            _ => Err(self.out_of_range(key, value, expected())),
        }
    }

    /// As [`Keys::opt_number`], but the key must be there.
    pub(crate) fn number(
        &self,
        spellings: &[&'static str],
        min: f64,
        max: f64,
    ) -> Result<f64, ConfigError> {
        self.opt_number(spellings, min, max)?.ok_or_else(|| ConfigError::Missing {
            key: self.name(spellings[0]),
            expected: format!("a number from {min} to {max}"),
        })
    }

    /// The array under `key`, of at most `limit` entries.
    pub(crate) fn opt_array(
        &self,
        key: &'static str,
        limit: usize,
    ) -> Result<Option<&'a [Value]>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let expected = || format!("an array of at most {limit} entries");
        match value.as_array() {
            Some(items) if items.len() <= limit => Ok(Some(items)),
            Some(_) => Err(self.out_of_range(key, value, expected())),
            None => Err(self.wrong_type(key, value, expected())),
        }
    }

    /// The object under `key`; `path` must be its full name with a trailing dot.
    pub(crate) fn opt_object(
        &self,
        key: &'static str,
        path: &'a str,
    ) -> Result<Option<Keys<'a>>, ConfigError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        match value.as_object() {
            Some(object) => Ok(Some(Keys::new(object, path))),
            None => Err(self.wrong_type(key, value, "an object".to_owned())),
        }
    }

    /// The names of all keys.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    pub(crate) fn wrong_type(&self, key: &str, value: &Value, expected: String) -> ConfigError {
        ConfigError::WrongType { key: self.name(key), found: show(value), expected }
    }

    pub(crate) fn out_of_range(&self, key: &str, value: &Value, expected: String) -> ConfigError {
        ConfigError::OutOfRange { key: self.name(key), found: show(value), expected }
    }
}
