//! Reading the fields of a JSON object so that each failure names its code and its field.
//!
//! [`Fields`] is the hand-written visitor behind every request type: it checks JSON types, treats
//! `null` as absent, remembers which fields were asked for, and reports the rest as unknown.
//! [`Path`] is a field's place, written as `a.b[0].c` only when an error needs it.
//!
//! Not here: which fields exist, and what they mean.

use std::fmt;

use serde_json::Value;

use crate::error::{ApiError, ErrorCode};
use crate::json::Object;

/// Where a value sits in the request; linked, so that a valid request allocates nothing for it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Path<'a> {
    /// The request itself.
    Root,
    /// A field of an object.
    Key(&'a Path<'a>, &'a str),
    /// An element of an array.
    Index(&'a Path<'a>, usize),
}

impl<'a> Path<'a> {
    pub(crate) const fn key(&'a self, name: &'a str) -> Self {
        Self::Key(self, name)
    }

    pub(crate) const fn index(&'a self, index: usize) -> Self {
        Self::Index(self, index)
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Key(Self::Root, name) => f.write_str(name),
            Self::Key(parent, name) => write!(f, "{parent}.{name}"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

/// An object's fields, read one by one.
pub(crate) struct Fields<'a> {
    object: &'a Object,
    path: Path<'a>,
    asked: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(object: &'a Object, path: Path<'a>) -> Self {
        Self { object, path, asked: Vec::new() }
    }

    /// The value of `name`, if it is there and not `null`.
    pub(crate) fn get(&mut self, name: &'static str) -> Option<&'a Value> {
        self.asked.push(name);
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// The value of `name`, which must be there.
    pub(crate) fn required(&mut self, name: &'static str) -> Result<&'a Value, ApiError> {
        self.get(name).ok_or_else(|| missing(&self.path.key(name)))
    }

    pub(crate) fn boolean(&mut self, name: &'static str) -> Result<Option<bool>, ApiError> {
        self.typed(name, "a boolean", |value| value.as_bool())
    }

    pub(crate) fn string(&mut self, name: &'static str) -> Result<Option<&'a str>, ApiError> {
        self.typed(name, "a string", |value| value.as_str())
    }

    pub(crate) fn required_string(&mut self, name: &'static str) -> Result<&'a str, ApiError> {
        self.required(name)?;
        Ok(self.string(name)?.expect("the field was there"))
    }

    pub(crate) fn integer(&mut self, name: &'static str) -> Result<Option<i128>, ApiError> {
        self.typed(name, "an integer", integer)
    }

    pub(crate) fn number(&mut self, name: &'static str) -> Result<Option<f64>, ApiError> {
        self.typed(name, "a number", number)
    }

    pub(crate) fn array(&mut self, name: &'static str) -> Result<Option<&'a [Value]>, ApiError> {
        self.typed(name, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    pub(crate) fn object(&mut self, name: &'static str) -> Result<Option<&'a Object>, ApiError> {
        self.typed(name, "an object", Value::as_object)
    }

    fn typed<T>(
        &mut self,
        name: &'static str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match read(value) {
            Some(read) => Ok(Some(read)),
            None => Err(invalid_type(&self.path.key(name), expected, value)),
        }
    }

    /// Adds the places of the fields nobody asked for to `unknown`.
    pub(crate) fn report_unknown(self, unknown: &mut Vec<String>) {
        let rest = self.object.keys().filter(|name| !self.asked.contains(&name.as_str()));
        unknown.extend(rest.map(|name| self.path.key(name).to_string()));
    }
}

/// The value as an integer: `2` and `2.0` are, `2.5` and `"2"` are not. What exceeds 128 bits is
/// clamped, and so fails the range check that follows.
pub(crate) fn integer(value: &Value) -> Option<i128> {
    let text = value.as_number()?.as_str();
    if let Ok(exact) = text.parse::<i128>() {
        return Some(exact);
    }
    let float = text.parse::<f64>().ok()?;
    #[expect(clippy::cast_possible_truncation, reason = "out of range clamps, as documented")]
    (float.is_infinite() || float.fract() == 0.0).then_some(float as i128)
}

/// The value as a number; beyond the range of `f64` it is an infinity, and fails the range check.
pub(crate) fn number(value: &Value) -> Option<f64> {
    value.as_number()?.as_str().parse().ok()
}

/// What kind of value it is, in the words of an error message.
pub(crate) const fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

pub(crate) fn missing(path: &Path<'_>) -> ApiError {
    let message = format!("`{path}` is required.");
    ApiError::at(ErrorCode::MissingRequiredParameter, path, message)
}

pub(crate) fn invalid_type(path: &Path<'_>, expected: &str, got: &Value) -> ApiError {
    let message = match (got, expected) {
        (Value::Number(_), "an integer") => format!("`{path}` must be an integer."),
        _ => format!("`{path}` must be {expected}, not {}.", kind_of(got)),
    };
    ApiError::at(ErrorCode::InvalidType, path, message)
}

pub(crate) fn invalid_value(path: &Path<'_>, message: impl Into<String>) -> ApiError {
    ApiError::at(ErrorCode::InvalidValue, path, message)
}

/// Checks `min <= value <= max` and narrows.
pub(crate) fn integer_in<T: TryFrom<i128>>(
    path: &Path<'_>,
    value: i128,
    min: i128,
    max: i128,
) -> Result<T, ApiError> {
    let code = match value {
        _ if value < min => ErrorCode::IntegerBelowMin,
        _ if value > max => ErrorCode::IntegerAboveMax,
        _ => {
            return Ok(T::try_from(value).ok().expect("each caller's bounds fit its narrow type"));
        }
    };
    let message = format!("`{path}` is {value}, but must be in the range [{min}, {max}].");
    Err(ApiError::at(code, path, message))
}

/// Checks `min <= value <= max`.
pub(crate) fn number_in(path: &Path<'_>, value: f64, min: f64, max: f64) -> Result<f64, ApiError> {
    let code = match value {
        _ if value < min => ErrorCode::DecimalBelowMin,
        _ if value > max => ErrorCode::DecimalAboveMax,
        _ => return Ok(value),
    };
    let message = format!("`{path}` must be in the range [{min}, {max}].");
    Err(ApiError::at(code, path, message))
}

/// Checks that a string is at most `max_bytes` long.
pub(crate) fn at_most_bytes(
    path: &Path<'_>,
    value: &str,
    max_bytes: usize,
) -> Result<(), ApiError> {
    if value.len() <= max_bytes {
        return Ok(());
    }
    let message =
        format!("`{path}` is {} bytes long, but at most {max_bytes} are allowed.", value.len());
    Err(ApiError::at(ErrorCode::StringAboveMaxLength, path, message))
}

/// Checks that an array has at most `max` elements.
pub(crate) fn at_most_items(path: &Path<'_>, len: usize, max: usize) -> Result<(), ApiError> {
    if len <= max {
        return Ok(());
    }
    let message = format!("`{path}` has {len} elements, but at most {max} are allowed.");
    Err(ApiError::at(ErrorCode::ArrayAboveMaxLength, path, message))
}

/// Whether `name` matches `^[a-zA-Z0-9_-]{1,longest}$`, the pattern of function and schema names.
pub(crate) fn is_identifier(name: &str, longest: usize) -> bool {
    (1..=longest).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
}
