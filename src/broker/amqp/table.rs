//! AMQP's field tables to and from JSON, with py-amqp's choice of types and kombu's notation for what JSON lacks.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use lapin::types::{AMQPValue, DecimalValue, FieldArray, FieldTable, LongString, ShortString};
use serde_json::{Map, Value};

/// The JSON text of a table. Its depth is bounded: [`super::frames`] sees to it.
pub(super) fn to_json(table: &FieldTable) -> Vec<u8> {
    let mut out = Vec::with_capacity(1024);
    write_table(&mut out, table);
    out
}

fn write_table(out: &mut Vec<u8>, table: &FieldTable) {
    out.push(b'{');
    for (index, (name, value)) in table.inner().iter().enumerate() {
        if index > 0 {
            out.extend_from_slice(b", ");
        }
        write_text(out, name.as_str());
        out.extend_from_slice(b": ");
        write_value(out, value);
    }
    out.push(b'}');
}

fn write_value(out: &mut Vec<u8>, value: &AMQPValue) {
    match value {
        AMQPValue::Boolean(value) => out.extend_from_slice(if *value { b"true" } else { b"false" }),
        AMQPValue::ShortShortInt(value) => write_display(out, value),
        AMQPValue::ShortShortUInt(value) => write_display(out, value),
        AMQPValue::ShortInt(value) => write_display(out, value),
        AMQPValue::ShortUInt(value) => write_display(out, value),
        AMQPValue::LongInt(value) => write_display(out, value),
        AMQPValue::LongUInt(value) => write_display(out, value),
        AMQPValue::LongLongInt(value) => write_display(out, value),
        AMQPValue::Float(value) => write_float(out, f64::from(*value)),
        AMQPValue::Double(value) => write_float(out, *value),
        AMQPValue::DecimalValue(value) => write_typed(out, "decimal", &decimal(*value)),
        AMQPValue::ShortString(value) => write_text(out, value.as_str()),
        AMQPValue::LongString(value) => match std::str::from_utf8(value.as_bytes()) {
            Ok(text) => write_text(out, text),
            // py-amqp leaves such a string as bytes.
            Err(_) => write_bytes(out, value.as_bytes()),
        },
        AMQPValue::FieldArray(values) => {
            out.push(b'[');
            for (index, value) in values.as_slice().iter().enumerate() {
                if index > 0 {
                    out.extend_from_slice(b", ");
                }
                write_value(out, value);
            }
            out.push(b']');
        }
        AMQPValue::Timestamp(seconds) => match datetime(*seconds) {
            Some(text) => write_typed(out, "datetime", &text),
            None => write_display(out, seconds),
        },
        AMQPValue::FieldTable(table) => write_table(out, table),
        AMQPValue::ByteArray(bytes) => write_bytes(out, bytes.as_slice()),
        AMQPValue::Void => out.extend_from_slice(b"null"),
    }
}

fn write_display(out: &mut Vec<u8>, value: &impl ToString) {
    out.extend_from_slice(value.to_string().as_bytes());
}

/// NaN and the infinities, which JSON lacks, become `null`: the supervisor must be able to read the headers.
fn write_float(out: &mut Vec<u8>, value: f64) {
    out.extend_from_slice(Value::from(value).to_string().as_bytes());
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("text can always be written to memory");
}

fn write_typed(out: &mut Vec<u8>, kind: &str, text: &str) {
    out.extend_from_slice(b"{\"__type__\": \"");
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(b"\", \"__value__\": ");
    write_text(out, text);
    out.push(b'}');
}

/// As kombu's encoder: text where the bytes are UTF-8.
fn write_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => write_typed(out, "bytes", text),
        Err(_) => write_typed(out, "base64", &BASE64.encode(bytes)),
    }
}

/// The number as text, without trailing zeros, as Python divides.
fn decimal(value: DecimalValue) -> String {
    // The number is signed on the wire; lapin hands its bits on as unsigned.
    let number = i64::from(value.value.cast_signed());
    let sign = if number < 0 { "-" } else { "" };
    let digits = format!("{:0>width$}", number.abs(), width = usize::from(value.scale) + 1);
    let (whole, fraction) = digits.split_at(digits.len() - usize::from(value.scale));
    match fraction.trim_end_matches('0') {
        "" => format!("{sign}{whole}"),
        fraction => format!("{sign}{whole}.{fraction}"),
    }
}

/// UTC without an offset, as py-amqp; none past the year 9999.
fn datetime(seconds: u64) -> Option<String> {
    let moment = jiff::Timestamp::from_second(i64::try_from(seconds).ok()?).ok()?;
    Some(moment.strftime("%Y-%m-%dT%H:%M:%S").to_string())
}

/// The table that py-amqp would send for this object. RabbitMQ compares the arguments of a declaration
/// with those of the existing queue, types included.
pub(super) fn from_json(map: &Map<String, Value>) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in map {
        match ShortString::try_new(name.as_str()) {
            Ok(name) => {
                table.insert(name, value_of(value));
            }
            Err(_) => tracing::warn!(
                target: "celery.worker.consumer",
                name,
                "A header or argument with a name longer than 255 bytes cannot be sent and is left out."
            ),
        }
    }
    table
}

fn value_of(value: &Value) -> AMQPValue {
    match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(value) => AMQPValue::Boolean(*value),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            // The odd lower limit is py-amqp's.
            (Some(number), _) => match i32::try_from(number) {
                Ok(number) if number > i32::MIN => AMQPValue::LongInt(number),
                _ => AMQPValue::LongLongInt(number),
            },
            (None, Some(number)) => AMQPValue::Double(number),
            (None, None) => AMQPValue::Void,
        },
        Value::String(text) => AMQPValue::LongString(LongString::from(text.as_str())),
        Value::Array(values) => {
            AMQPValue::FieldArray(FieldArray::from(values.iter().map(value_of).collect::<Vec<_>>()))
        }
        Value::Object(map) => typed(map).unwrap_or_else(|| AMQPValue::FieldTable(from_json(map))),
    }
}

/// What kombu's notation stands for, where AMQP has a type for it.
fn typed(map: &Map<String, Value>) -> Option<AMQPValue> {
    let (kind, text) = (map.get("__type__")?.as_str()?, map.get("__value__")?.as_str()?);
    if map.len() != 2 {
        return None;
    }
    match kind {
        "bytes" => Some(AMQPValue::LongString(LongString::from(text))),
        "base64" => Some(AMQPValue::LongString(LongString::from(BASE64.decode(text).ok()?))),
        "datetime" => {
            let moment = match text.parse::<jiff::Timestamp>() {
                Ok(moment) => moment,
                Err(_) => text
                    .parse::<jiff::civil::DateTime>()
                    .ok()?
                    .to_zoned(jiff::tz::TimeZone::UTC)
                    .ok()?
                    .timestamp(),
            };
            Some(AMQPValue::Timestamp(u64::try_from(moment.as_second()).ok()?))
        }
        "decimal" => {
            let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
            let value: i32 = format!("{whole}{fraction}").parse().ok()?;
            let scale = u8::try_from(fraction.len()).ok()?;
            Some(AMQPValue::DecimalValue(DecimalValue { scale, value: value.cast_unsigned() }))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn json_of(value: AMQPValue) -> Value {
        let mut table = FieldTable::default();
        table.insert(ShortString::from("x"), value);
        let value: Value = serde_json::from_slice(&to_json(&table)).unwrap();
        value["x"].clone()
    }

    #[test]
    fn every_field_type_becomes_what_py_amqp_and_kombu_make_of_it() {
        let typed = |kind: &str, text: &str| json!({"__type__": kind, "__value__": text});
        for (value, expected) in [
            (AMQPValue::Boolean(true), json!(true)),
            (AMQPValue::ShortShortInt(-1), json!(-1)),
            (AMQPValue::ShortShortUInt(255), json!(255)),
            (AMQPValue::ShortInt(-300), json!(-300)),
            (AMQPValue::ShortUInt(60000), json!(60000)),
            (AMQPValue::LongInt(-70000), json!(-70000)),
            (AMQPValue::LongUInt(4_000_000_000), json!(4_000_000_000_u32)),
            (AMQPValue::LongLongInt(i64::MIN), json!(i64::MIN)),
            (AMQPValue::Float(0.5), json!(0.5)),
            (AMQPValue::Double(1e300), json!(1e300)),
            (AMQPValue::Double(f64::NAN), json!(null)),
            (AMQPValue::LongString("é\"\n".into()), json!("é\"\n")),
            (AMQPValue::LongString(LongString::from(vec![0xff])), typed("base64", "/w==")),
            (AMQPValue::ByteArray(b"abc".to_vec().into()), typed("bytes", "abc")),
            (AMQPValue::Timestamp(1_763_805_086), typed("datetime", "2025-11-22T09:51:26")),
            (AMQPValue::Timestamp(u64::MAX), json!(u64::MAX)),
            (AMQPValue::DecimalValue(DecimalValue { scale: 2, value: 150 }), typed("decimal", "1.5")),
            (
                AMQPValue::DecimalValue(DecimalValue { scale: 3, value: (-5_i32).cast_unsigned() }),
                typed("decimal", "-0.005"),
            ),
            (AMQPValue::DecimalValue(DecimalValue { scale: 0, value: 7 }), typed("decimal", "7")),
            (AMQPValue::Void, json!(null)),
            (AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::Void])), json!([null])),
            (AMQPValue::FieldTable(FieldTable::default()), json!({})),
        ] {
            assert_eq!(json_of(value.clone()), expected, "{value:?}");
        }
    }

    #[test]
    fn numbers_are_sent_with_the_types_that_py_amqp_chooses() {
        let map = json!({
            "x-max-priority": 10, "big": 2_147_483_648_i64, "least": -2_147_483_648_i64, "f": 1.0,
            "b": true, "n": null, "s": "text", "l": [1], "t": {"a": 1},
        });
        let table = from_json(map.as_object().unwrap());
        let type_of = |name: &str| table.inner()[name].get_type().get_id();
        let types: String =
            ["x-max-priority", "big", "least", "f", "b", "n", "s", "l", "t"].map(type_of).iter().collect();
        assert_eq!(types, "IlldtVSAF");
    }

    #[test]
    fn what_json_lacks_survives_the_way_there_and_back() {
        let text = json!({
            "at": {"__type__": "datetime", "__value__": "2025-11-22T09:51:26"},
            "money": {"__type__": "decimal", "__value__": "-1.25"},
            "raw": {"__type__": "base64", "__value__": "/w=="},
            "own": {"__type__": "mine", "__value__": 1},
        });
        let there = from_json(text.as_object().unwrap());
        let back: Value = serde_json::from_slice(&to_json(&there)).unwrap();
        assert_eq!(back, text);
    }
}
