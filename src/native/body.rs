//! The body of a task message, for native tasks: JSON, and pickles that hold plain data.

use indexmap::IndexMap;
use serde::ser::{Error as _, Serialize, SerializeMap as _, SerializeSeq as _, Serializer};
use serde_json::Value;

use super::extract::Arguments;
use crate::protocol::{Json, json};

/// What a body comes to.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Body {
    /// The arguments.
    pub(super) arguments: Arguments,
    /// What is to be continued after the task, by name: `callbacks`, `errbacks`, `chain`, `chord`.
    pub(super) continuations: Vec<&'static str>,
}

/// Why a body is no task.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It cannot be read.
    Undecodable(String),
    /// It can, and is no `[args, kwargs, embed]`.
    Malformed(String),
}

const CONTINUATIONS: [&str; 4] = ["callbacks", "errbacks", "chain", "chord"];

/// Reads a body.
pub(super) fn decode(content_type: &str, headers: &Json, body: &[u8]) -> Result<Body, Refused> {
    let undecodable = |error: &dyn ToString| Refused::Undecodable(error.to_string());
    let compression = headers.value().ok().and_then(|headers| headers.get("compression").cloned());
    if let Some(compression) = compression.filter(|compression| !compression.is_null()) {
        return Err(Refused::Undecodable(format!(
            "native tasks do not read compressed bodies ({compression})"
        )));
    }
    let text = match content_type {
        "application/json" => std::str::from_utf8(body).map_err(|error| undecodable(&error))?.to_owned(),
        "application/x-python-serialize" => unpickle(body).map_err(Refused::Undecodable)?,
        other => return Err(Refused::Undecodable(format!("native tasks do not read {other}"))),
    };
    json::check(&text).map_err(|error| undecodable(&error))?;
    parts(&text)
}

/// The JSON text of a pickle. Data alone: one that names a class or a function is refused.
///
/// Reading is recursive and a pickle may be nested as deeply as it has containers, so it is read on a stack of its own
/// that is large enough for that; pages of it are only touched when it really is that deep.
fn unpickle(body: &[u8]) -> Result<String, String> {
    let stack = 1024 * 1024 + containers(body).saturating_mul(STACK_OF_A_LEVEL);
    if stack > LARGEST_STACK {
        return Err("the pickle has too many containers for a native task".to_owned());
    }
    std::thread::scope(|scope| {
        let read = || {
            let value = serde_pickle::value_from_slice(body, serde_pickle::DeOptions::new())
                .map_err(|error| error.to_string())?;
            json::to_string(&Plain(&value)).map_err(|error| error.to_string())
        };
        let reader = std::thread::Builder::new().name("unpickle".to_owned()).stack_size(stack);
        match reader.spawn_scoped(scope, read) {
            Ok(reader) => reader.join().unwrap_or_else(|_| Err("the pickle cannot be read".to_owned())),
            Err(error) => Err(format!("no thread to read the pickle: {error}")),
        }
    })
}

/// Stack that reading one level takes, generously: a debug build needs the most.
const STACK_OF_A_LEVEL: usize = 16 * 1024;
/// A stack that any machine can map.
const LARGEST_STACK: usize = 1 << 30;

/// How many containers a pickle may build: its opcodes that make or fill one, payloads skipped.
fn containers(body: &[u8]) -> usize {
    let mut rest = body;
    let mut count = 0;
    while let Some((opcode, tail)) = rest.split_first() {
        let length = |bytes: usize| {
            let prefix = tail.get(..bytes).unwrap_or_default();
            let length = prefix.iter().rev().fold(0_u64, |length, byte| (length << 8) | u64::from(*byte));
            usize::try_from(length).unwrap_or(usize::MAX).saturating_add(bytes)
        };
        let payload = match opcode {
            // Text up to the end of the line.
            b'I' | b'L' | b'F' | b'S' | b'V' | b'g' | b'p' | b'P' | b'c' | b'i' => {
                tail.iter().position(|byte| *byte == b'\n').map_or(tail.len(), |end| end + 1)
            }
            b'K' | b'q' | b'h' | 0x80 | 0x82 => 1,
            b'M' | 0x83 => 2,
            b'J' | b'r' | b'j' | 0x84 => 4,
            b'G' | 0x95 => 8,
            b'C' | b'U' | 0x8a | 0x8c => length(1),
            b'X' | b'B' | b'T' | 0x8b => length(4),
            0x8d | 0x8e | 0x96 => length(8),
            _ => {
                count += usize::from(b"](}dlt)ae\x85\x86\x87\x8f\x91su".contains(opcode));
                0
            }
        };
        rest = tail.get(payload..).unwrap_or_default();
    }
    count
}

/// Unpickled data as JSON: tuples and sets become lists, as they do when kombu sends JSON.
struct Plain<'v>(&'v serde_pickle::Value);

impl Serialize for Plain<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde_pickle::Value;
        match self.0 {
            Value::None => serializer.serialize_unit(),
            Value::Bool(value) => serializer.serialize_bool(*value),
            Value::I64(value) => serializer.serialize_i64(*value),
            Value::Int(value) => match value.to_string().parse::<i128>() {
                Ok(value) => serializer.serialize_i128(value),
                Err(_) => Err(S::Error::custom("an integer has more than 127 bits")),
            },
            Value::F64(value) => serializer.serialize_f64(*value),
            Value::Bytes(value) => serializer.serialize_bytes(value),
            Value::String(value) => serializer.serialize_str(value),
            Value::List(values) | Value::Tuple(values) => serializer.collect_seq(values.iter().map(Plain)),
            Value::Set(values) | Value::FrozenSet(values) => {
                let mut list = serializer.serialize_seq(Some(values.len()))?;
                for value in values {
                    list.serialize_element(&Plain(&value.clone().into_value()))?;
                }
                list.end()
            }
            Value::Dict(members) => {
                let mut map = serializer.serialize_map(Some(members.len()))?;
                for (key, value) in members {
                    map.serialize_entry(&Plain(&key.clone().into_value()), &Plain(value))?;
                }
                map.end()
            }
        }
    }
}

fn parts(text: &str) -> Result<Body, Refused> {
    let malformed = |reason: &str| Refused::Malformed(reason.to_owned());
    let parts = json::elements(text).map_err(|_| malformed("the body is no list"))?;
    let [args, kwargs, embed] = parts.as_slice() else {
        return Err(malformed("the body is no list of arguments, keyword arguments and options"));
    };
    let args = json::elements(args).map_err(|_| malformed("Task arguments must be a list"))?;
    let kwargs = json::members(kwargs).map_err(|_| malformed("Task keyword arguments must be a mapping"))?;
    let embed = if *embed == "null" {
        IndexMap::new()
    } else {
        json::members(embed).map_err(|_| malformed("the options are no mapping"))?
    };
    let is_given = |name: &&str| embed.get(*name).is_some_and(|part| !matches!(*part, "null" | "[]" | "{}"));
    Ok(Body {
        arguments: Arguments {
            args: args.into_iter().map(plain).collect(),
            kwargs: kwargs.into_iter().map(|(name, value)| (name, plain(value))).collect(),
        },
        continuations: CONTINUATIONS.into_iter().filter(is_given).collect(),
    })
}

/// The text with kombu's extended types (`{"__type__": "datetime", …}`) replaced by the text of their values, which is
/// what serde types are read from.
fn plain(text: &str) -> String {
    if !text.contains("\"__type__\"") {
        return text.to_owned();
    }
    match serde_json::from_str(text) {
        Ok(mut value) => {
            unwrap(&mut value);
            json::to_string(&value).unwrap_or_else(|_| text.to_owned())
        }
        Err(_) => text.to_owned(),
    }
}

fn unwrap(value: &mut Value) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(unwrap),
        Value::Object(members) => {
            if let (2, Some(_), Some(inner)) =
                (members.len(), members.get("__type__"), members.get("__value__"))
            {
                let hex = inner.get("hex").and_then(Value::as_str);
                *value = match hex.and_then(|hex| uuid::Uuid::try_parse(hex).ok()) {
                    Some(id) => id.to_string().into(),
                    None => inner.clone(),
                };
            } else {
                members.values_mut().for_each(unwrap);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Body, Refused> {
        decode("application/json", &Json::empty(), body.as_bytes())
    }

    #[test]
    fn arguments_are_kept_as_they_came_but_for_extended_types() {
        let body = read(
            r#"[[1.50, {"a": {"__type__": "uuid", "__value__": {"hex": "00000000000000000000000000000001"}}}],
                {"day": {"__type__": "date", "__value__": "2026-01-02"}, "n": NaN}, null]"#,
        )
        .unwrap();
        assert_eq!(body.arguments.args_text(), r#"[1.50, {"a": "00000000-0000-0000-0000-000000000001"}]"#);
        assert_eq!(body.arguments.kwargs_text(), r#"{"day": "2026-01-02", "n": NaN}"#);
        assert!(body.continuations.is_empty());
    }

    #[test]
    fn what_is_to_be_continued_is_named() {
        let body = read(
            r#"[[], {}, {"callbacks": null, "errbacks": [], "chain": [{"task": "a"}], "chord": {"task": "b"}}]"#,
        );
        assert_eq!(body.unwrap().continuations, ["chain", "chord"]);
    }

    #[test]
    fn what_cannot_be_read_is_told_apart_from_what_is_no_task() {
        for body in ["", "[", "[[1], {}, {}", "\u{80}"] {
            assert!(matches!(read(body), Err(Refused::Undecodable(_))), "{body}");
        }
        for body in ["{}", "[]", "[[], {}]", "[1, {}, {}]", "[[], [], {}]", "[[], {}, 3]"] {
            assert!(matches!(read(body), Err(Refused::Malformed(_))), "{body}");
        }
        let compressed = Json(r#"{"compression": "application/x-gzip"}"#.into());
        assert!(matches!(decode("application/json", &compressed, b"[]"), Err(Refused::Undecodable(_))));
        assert!(matches!(decode("application/x-yaml", &Json::empty(), b"[]"), Err(Refused::Undecodable(_))));
    }

    #[test]
    fn pickles_of_data_are_read_and_pickles_of_code_refused() {
        // pickle.dumps(((4, b"x"), {"y": [1.5, None]}, {"callbacks": None}), 4)
        let data = b"\x80\x04\x95\x30\x00\x00\x00\x00\x00\x00\x00K\x04C\x01x\x94\x86\x94}\x94\x8c\x01y\x94]\x94(G?\xf8\x00\x00\x00\x00\x00\x00Nes}\x94\x8c\tcallbacks\x94Ns\x87\x94.";
        let body = decode("application/x-python-serialize", &Json::empty(), data).unwrap();
        assert_eq!(body.arguments.args_text(), r#"[4, "x"]"#);
        assert_eq!(body.arguments.kwargs_text(), r#"{"y": [1.5, null]}"#);
        // [[[…]]] as deep as it is long.
        let deep = [b"\x80\x04".to_vec(), b"]".repeat(20_000), b"a".repeat(19_999), b".".to_vec()].concat();
        let refused = decode("application/x-python-serialize", &Json::empty(), &deep);
        assert!(matches!(refused, Err(Refused::Malformed(_))), "{refused:?}");
        let deeper = b"]".repeat(1 << 20);
        let refused = decode("application/x-python-serialize", &Json::empty(), &deeper);
        assert!(matches!(refused, Err(Refused::Undecodable(_))), "{refused:?}");
        // A long text is no container.
        assert_eq!(containers(b"\x80\x04X\x03\x00\x00\x00]]]]."), 1);
        let code = b"cos\nsystem\n(S'true'\ntR.";
        assert!(matches!(
            decode("application/x-python-serialize", &Json::empty(), code),
            Err(Refused::Undecodable(_))
        ));
    }
}
