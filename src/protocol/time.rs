//! `eta` and `expires`: ISO 8601 text to seconds since the epoch.

use jiff::fmt::temporal::Pieces;
use jiff::tz::TimeZone;
use serde_json::Value;

/// Why a time in a header cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TimeError {
    /// Not ISO 8601.
    #[error("{0}")]
    Unparsable(String),
    /// ISO 8601, and outside of all time that a timestamp can name.
    #[error("year is out of range")]
    OutOfRange,
}

/// Python's `datetime.min` in UTC: nothing before it is a time there.
const YEAR_ONE: i64 = -62_135_596_800;

/// The moment that a header names; a time without offset is in `zone`.
///
/// # Errors
/// [`TimeError`] says which of Celery's two complaints it is.
pub fn parse(value: &Value, zone: &TimeZone) -> Result<f64, TimeError> {
    let Value::String(text) = value else {
        return Err(TimeError::Unparsable(format!("expected an ISO 8601 string, got {value}")));
    };
    let unparsable = |error: jiff::Error| TimeError::Unparsable(error.to_string());
    let pieces = Pieces::parse(text.trim()).map_err(unparsable)?;
    let civil = pieces.date().to_datetime(pieces.time().unwrap_or_default());
    let zone = match pieces.to_numeric_offset() {
        Some(offset) => TimeZone::fixed(offset),
        None => zone.clone(),
    };
    let moment = zone.to_timestamp(civil).map_err(|_| TimeError::OutOfRange)?;
    if moment.as_second() < YEAR_ONE {
        return Err(TimeError::OutOfRange);
    }
    Ok(moment.as_second() as f64 + f64::from(moment.subsec_nanosecond()) / 1e9)
}

/// The moment of a header as Python's `isoformat` writes it; none for what is no time.
pub fn isoformat(value: &Value, zone: &TimeZone) -> Option<String> {
    let pieces = Pieces::parse(value.as_str()?.trim()).ok()?;
    let civil = pieces.date().to_datetime(pieces.time().unwrap_or_default());
    let offset = match pieces.to_numeric_offset() {
        Some(offset) => offset,
        None => zone.to_offset(zone.to_timestamp(civil).ok()?),
    };
    let micros = civil.subsec_nanosecond() / 1000;
    let fraction = if micros == 0 { String::new() } else { format!(".{micros:06}") };
    let (sign, seconds) =
        if offset.is_negative() { ('-', -offset.seconds()) } else { ('+', offset.seconds()) };
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let rest = if rest == 0 { String::new() } else { format!(":{rest:02}") };
    Some(format!("{}{fraction}{sign}{hours:02}:{minutes:02}{rest}", civil.strftime("%Y-%m-%dT%H:%M:%S")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_python_reads_them() {
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        for (text, expected) in [
            ("2026-11-22T09:51:26.150807+00:00", 1_795_341_086.150_807),
            ("2026-11-22T10:51:26+01:00", 1_795_341_086.0),
            ("2026-11-22T09:51:26Z", 1_795_341_086.0),
            ("2026-11-22T10:51:26", 1_795_341_086.0),
            ("2026-11-22 10:51:26", 1_795_341_086.0),
            ("20261122T105126", 1_795_341_086.0),
            ("2026-11-22", 1_795_302_000.0),
        ] {
            let parsed = parse(&Value::from(text), &berlin).unwrap();
            assert!((parsed - expected).abs() < 1e-6, "{text}: {parsed}");
        }
    }

    #[test]
    fn times_are_written_as_python_writes_them() {
        let berlin = TimeZone::get("Europe/Berlin").unwrap();
        for (text, expected) in [
            ("2026-11-22T09:51:26.150807+00:00", "2026-11-22T09:51:26.150807+00:00"),
            ("2026-11-22T09:51:26Z", "2026-11-22T09:51:26+00:00"),
            ("2026-11-22 10:51:26.5", "2026-11-22T10:51:26.500000+01:00"),
            ("2026-07-22T10:51:26-03:30", "2026-07-22T10:51:26-03:30"),
        ] {
            assert_eq!(isoformat(&Value::from(text), &berlin).as_deref(), Some(expected));
        }
        assert_eq!(isoformat(&Value::from("soon"), &berlin), None);
    }

    #[test]
    fn what_is_no_time_says_so_and_what_is_no_python_time_too() {
        assert!(matches!(parse(&Value::from("soon"), &TimeZone::UTC), Err(TimeError::Unparsable(_))));
        assert!(matches!(parse(&Value::from(12), &TimeZone::UTC), Err(TimeError::Unparsable(_))));
        assert_eq!(
            parse(&Value::from("0001-01-01T00:00:00+14:00"), &TimeZone::UTC),
            Err(TimeError::OutOfRange)
        );
    }
}
