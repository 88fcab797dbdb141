//! JSON as Python's `json` module speaks it: what it prints (`", "`, `": "`, escapes for all that is not ASCII,
//! `NaN`), and what it reads beyond the standard (`NaN`, `Infinity`). Reading keeps the text of each part as it
//! came, so that numbers of any size and precision are passed on unchanged.

use std::borrow::Cow;
use std::fmt::{self, Write as _};
use std::marker::PhantomData;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use indexmap::IndexMap;
use serde::de::{Deserializer as _, MapAccess, SeqAccess, Visitor};
use serde::ser::{self, Serialize};
use serde_json::value::RawValue;

/// What cannot be read or printed as JSON.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct JsonError(String);

impl ser::Error for JsonError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

impl From<serde_json::Error> for JsonError {
    fn from(error: serde_json::Error) -> Self {
        Self(error.to_string())
    }
}

/// The members of a JSON object as text, in order; of two with one name the last counts.
///
/// # Errors
/// When the text is not one JSON object.
pub fn members(text: &str) -> Result<IndexMap<String, &str>, JsonError> {
    let shielded = shield(text);
    let mut reader = serde_json::Deserializer::from_str(&shielded);
    let parts = reader.deserialize_map(Members(PhantomData))?;
    reader.end()?;
    Ok(parts.into_iter().map(|(key, part)| (key, same_place(text, &shielded, part))).collect())
}

/// The elements of a JSON array as text.
///
/// # Errors
/// When the text is not one JSON array.
pub fn elements(text: &str) -> Result<Vec<&str>, JsonError> {
    let shielded = shield(text);
    let mut reader = serde_json::Deserializer::from_str(&shielded);
    let parts = reader.deserialize_seq(Elements(PhantomData))?;
    reader.end()?;
    Ok(parts.into_iter().map(|part| same_place(text, &shielded, part)).collect())
}

/// Checks that the text is one JSON value.
///
/// # Errors
/// When it is not.
pub fn check(text: &str) -> Result<(), JsonError> {
    let _: &RawValue = serde_json::from_str(&shield(text))?;
    Ok(())
}

/// The text with Python's `NaN` and `Infinity` replaced by numbers of the same length: a standard reader takes it,
/// and each part lies where it lay before.
fn shield(text: &str) -> Cow<'_, str> {
    if !text.contains("NaN") && !text.contains("Infinity") {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let literal = ["NaN", "Infinity"].into_iter().find(|literal| !in_string && rest.starts_with(literal));
        let taken = literal.map_or(next.len_utf8(), str::len);
        match literal {
            Some(literal) => out.extend(std::iter::repeat_n('9', literal.len())),
            None => out.push(next),
        }
        if in_string && !escaped {
            escaped = next == '\\';
            in_string = next != '"';
        } else if in_string {
            escaped = false;
        } else {
            in_string = next == '"';
        }
        rest = &rest[taken..];
    }
    Cow::Owned(out)
}

fn same_place<'t>(text: &'t str, shielded: &str, part: &RawValue) -> &'t str {
    let start = part.get().as_ptr() as usize - shielded.as_ptr() as usize;
    &text[start..start + part.get().len()]
}

struct Members<'de>(PhantomData<&'de ()>);

impl<'de> Visitor<'de> for Members<'de> {
    type Value = IndexMap<String, &'de RawValue>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut members = IndexMap::new();
        while let Some((key, part)) = access.next_entry()? {
            members.insert(key, part);
        }
        Ok(members)
    }
}

struct Elements<'de>(PhantomData<&'de ()>);

impl<'de> Visitor<'de> for Elements<'de> {
    type Value = Vec<&'de RawValue>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(part) = access.next_element()? {
            elements.push(part);
        }
        Ok(elements)
    }
}

/// A value as `json.dumps` of Celery prints it. Bytes are written as kombu does, which Python reads back as bytes.
///
/// # Errors
/// When the value refuses to be serialized, or a map has keys that no JSON object can have.
pub fn to_string<T: Serialize + ?Sized>(value: &T) -> Result<String, JsonError> {
    let mut out = String::new();
    value.serialize(Printer { out: &mut out })?;
    Ok(out)
}

/// Appends a string literal, ASCII only.
pub fn write_string(out: &mut String, text: &str) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(character),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    // Writing into a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
}

/// A float as Python prints it: the shortest digits that read back the same, an exponent below 1e-4 and from 1e16.
pub fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let fixed = format!("{value}");
        return if fixed.contains('.') { fixed } else { fixed + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

struct Printer<'o> {
    out: &'o mut String,
}

/// Prints what lies between brackets.
struct Inside<'o> {
    out: &'o mut String,
    first: bool,
    close: &'static str,
}

impl<'o> Printer<'o> {
    fn open(self, open: &str, close: &'static str) -> Inside<'o> {
        self.out.push_str(open);
        Inside { out: self.out, first: true, close }
    }

    fn variant(self, name: &str, open: &str, close: &'static str) -> Inside<'o> {
        self.out.push('{');
        write_string(self.out, name);
        self.out.push_str(": ");
        self.open(open, close)
    }
}

impl Inside<'_> {
    fn separate(&mut self) {
        if !std::mem::take(&mut self.first) {
            self.out.push_str(", ");
        }
    }

    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), JsonError> {
        self.separate();
        value.serialize(Printer { out: self.out })
    }

    fn member<T: Serialize + ?Sized>(&mut self, key: &str, value: &T) -> Result<(), JsonError> {
        self.separate();
        write_string(self.out, key);
        self.out.push_str(": ");
        value.serialize(Printer { out: self.out })
    }

    fn finish(self) -> Result<(), JsonError> {
        self.out.push_str(self.close);
        Ok(())
    }
}

/// What Python prints as Rust does.
macro_rules! displayed {
    ($($method:ident: $type:ty,)*) => {
        $(fn $method(self, value: $type) -> Result<(), JsonError> {
            write!(self.out, "{value}").map_err(ser::Error::custom)
        })*
    };
}

impl<'o> ser::Serializer for Printer<'o> {
    type Ok = ();
    type Error = JsonError;
    type SerializeSeq = Inside<'o>;
    type SerializeTuple = Inside<'o>;
    type SerializeTupleStruct = Inside<'o>;
    type SerializeTupleVariant = Inside<'o>;
    type SerializeMap = Inside<'o>;
    type SerializeStruct = Inside<'o>;
    type SerializeStructVariant = Inside<'o>;

    displayed!(
        serialize_bool: bool, serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_i128: i128, serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64,
        serialize_u128: u128,
    );

    fn serialize_f32(self, value: f32) -> Result<(), JsonError> {
        // Through the shortest decimal text, so that 0.1 stays 0.1.
        self.serialize_f64(if value.is_finite() {
            value.to_string().parse().unwrap_or(f64::from(value))
        } else {
            f64::from(value)
        })
    }
    fn serialize_f64(self, value: f64) -> Result<(), JsonError> {
        self.out.push_str(&match value {
            _ if value.is_nan() => "NaN".to_owned(),
            f64::INFINITY => "Infinity".to_owned(),
            f64::NEG_INFINITY => "-Infinity".to_owned(),
            _ => float(value),
        });
        Ok(())
    }
    fn serialize_char(self, value: char) -> Result<(), JsonError> {
        self.serialize_str(value.encode_utf8(&mut [0; 4]))
    }
    fn serialize_str(self, value: &str) -> Result<(), JsonError> {
        write_string(self.out, value);
        Ok(())
    }
    fn serialize_bytes(self, value: &[u8]) -> Result<(), JsonError> {
        let mut object = self.open("{", "}");
        match std::str::from_utf8(value) {
            Ok(text) => {
                object.member("__type__", "bytes")?;
                object.member("__value__", text)?;
            }
            Err(_) => {
                object.member("__type__", "base64")?;
                object.member("__value__", &STANDARD.encode(value))?;
            }
        }
        object.finish()
    }
    fn serialize_none(self) -> Result<(), JsonError> {
        self.serialize_unit()
    }
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), JsonError> {
        value.serialize(self)
    }
    fn serialize_unit(self) -> Result<(), JsonError> {
        self.out.push_str("null");
        Ok(())
    }
    fn serialize_unit_struct(self, _: &'static str) -> Result<(), JsonError> {
        self.serialize_unit()
    }
    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<(), JsonError> {
        self.serialize_str(variant)
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), JsonError> {
        value.serialize(self)
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<(), JsonError> {
        let mut object = self.open("{", "}");
        object.member(variant, value)?;
        object.finish()
    }
    fn serialize_seq(self, _: Option<usize>) -> Result<Inside<'o>, JsonError> {
        Ok(self.open("[", "]"))
    }
    fn serialize_tuple(self, _: usize) -> Result<Inside<'o>, JsonError> {
        Ok(self.open("[", "]"))
    }
    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Inside<'o>, JsonError> {
        Ok(self.open("[", "]"))
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Inside<'o>, JsonError> {
        Ok(self.variant(variant, "[", "]}"))
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Inside<'o>, JsonError> {
        Ok(self.open("{", "}"))
    }
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Inside<'o>, JsonError> {
        Ok(self.open("{", "}"))
    }
    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        _: usize,
    ) -> Result<Inside<'o>, JsonError> {
        Ok(self.variant(variant, "{", "}}"))
    }
}

/// The six traits of sequences and structures, which differ in their names alone.
macro_rules! inside {
    ($($trait:ident $method:ident $call:ident ($($key:ident: $type:ty)?),)*) => {
        $(impl ser::$trait for Inside<'_> {
            type Ok = ();
            type Error = JsonError;
            fn $method<T: Serialize + ?Sized>(
                &mut self,
                $($key: $type,)?
                value: &T,
            ) -> Result<(), JsonError> {
                self.$call($($key,)? value)
            }
            fn end(self) -> Result<(), JsonError> {
                self.finish()
            }
        })*
    };
}

inside!(
    SerializeSeq serialize_element element (),
    SerializeTuple serialize_element element (),
    SerializeTupleStruct serialize_field element (),
    SerializeTupleVariant serialize_field element (),
    SerializeStruct serialize_field member (key: &'static str),
    SerializeStructVariant serialize_field member (key: &'static str),
);

impl ser::SerializeMap for Inside<'_> {
    type Ok = ();
    type Error = JsonError;
    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), JsonError> {
        self.separate();
        // As Python: numbers, booleans and null become text.
        let text = to_string(key)?;
        match text.as_bytes().first() {
            Some(b'"') => self.out.push_str(&text),
            Some(b'[' | b'{') | None => return Err(JsonError("a key must be text or a number".to_owned())),
            Some(_) => write_string(self.out, &text),
        }
        Ok(())
    }
    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), JsonError> {
        self.out.push_str(": ");
        value.serialize(Printer { out: self.out })
    }
    fn end(self) -> Result<(), JsonError> {
        self.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn floats_are_printed_as_python_prints_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (3.0, "3.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.25e-7, "1.25e-07"),
            (9_007_199_254_740_993.0, "9007199254740992.0"),
            (5e-324, "5e-324"),
            (f64::MAX, "1.7976931348623157e+308"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn values_are_printed_as_python_prints_them() {
        #[derive(serde::Serialize)]
        enum Shape {
            Point,
            Circle(f32),
            Box { sides: (u8, u8) },
        }
        let text = to_string(&(
            "it's \"q\" \\ ü€😀\n\u{7f}\u{1}",
            [1.0, f64::NAN, f64::INFINITY],
            None::<u8>,
            BTreeMap::from([(1, true)]),
            (Shape::Point, Shape::Circle(0.1), Shape::Box { sides: (1, 2) }),
            Vec::<u8>::new(),
        ));
        assert_eq!(
            text.unwrap(),
            r#"["it's \"q\" \\ \u00fc\u20ac\ud83d\ude00\n\u007f\u0001", [1.0, NaN, Infinity], null, "#
                .to_owned()
                + r#"{"1": true}, ["Point", {"Circle": 0.1}, {"Box": {"sides": [1, 2]}}], []]"#
        );
    }

    #[test]
    fn parts_are_given_as_they_came_also_beside_not_a_number() {
        let text = r#" {"a\u0062": [1.50, NaN], "NaN \" NaN": -Infinity, "c": {"x" :1e400}, "c": "\ud800"} "#;
        let parts = members(text).unwrap();
        let expected = [("ab", "[1.50, NaN]"), ("NaN \" NaN", "-Infinity"), ("c", r#""\ud800""#)];
        assert_eq!(parts.iter().map(|(key, part)| (key.as_str(), *part)).collect::<Vec<_>>(), expected);
        assert_eq!(elements("[NaN, 1 ,[2]]").unwrap(), ["NaN", "1", "[2]"]);
    }

    #[test]
    fn what_is_no_json_is_refused() {
        for text in ["", "[1", "[1] 2", "{'a': 1}", "{\"a\": N}", "nan"] {
            assert!(members(text).is_err() && elements(text).is_err() && check(text).is_err(), "{text}");
        }
    }
}
